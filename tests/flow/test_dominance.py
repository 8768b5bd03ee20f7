"""MDI and AEI: their identity, masses against dense patterns, compression against a shorter prompt."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import interp
from interp.core import OutOfRange, Prompt, PromptError
from interp.flow import dominance
from interp.models.model import Model

N, IMAGE, STEPS = 13, (3, 9), 4
positive = st.floats(1e-3, 1e3)
count = st.integers(1, 10_000)


@pytest.fixture(scope="module")
def opened(tiny):
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def prompts(number, seed=0):
    rng = np.random.default_rng(seed)
    segments = {"image": IMAGE, "question": (9, 12)}
    return [Prompt.from_tokens(rng.integers(3, 90, N), segments) for _ in range(number)]


# -- the numbers ---------------------------------------------------------------------------------


@given(positive, positive, count, count)
@settings(max_examples=60, deadline=None)
def test_one_index_is_a_function_of_the_other_and_the_counts(a, b, n, m):
    one, other = dominance.mdi(a, b, n, m), dominance.aei(a, b, n, m)
    assert float(dominance.aei_of_mdi(one, n / m)) == pytest.approx(float(other), rel=1e-9)
    assert float(other) <= 1 + m / n + 1e-9
    assert (one > 1) == (other > 1) or one == pytest.approx(1) or other == pytest.approx(1)
    # Swapping the sides inverts the first and not the second.
    assert float(one * dominance.mdi(b, a, m, n)) == pytest.approx(1, rel=1e-9)
    if abs(float(other) - 1) > 1e-3:
        assert float(dominance.implied_ratio(one, other)) == pytest.approx(n / m, rel=1e-4)


def test_even_attention_is_balanced_and_nothing_on_one_side_is_infinite():
    assert float(dominance.mdi(0.2, 0.8, 10, 40)) == pytest.approx(1)
    assert float(dominance.aei(0.2, 0.8, 10, 40)) == pytest.approx(1)
    assert np.isinf(dominance.mdi(1.0, 0.0, 3, 5)) and np.isnan(dominance.mdi(0.0, 0.0, 3, 5))
    for bad in ((-0.1, 1, 1, 1), (1, 1, 0, 1)):
        with pytest.raises(ValueError, match="cannot be negative"):
            dominance.mdi(*bad)
        with pytest.raises(ValueError, match="cannot be negative"):
            dominance.aei(*bad)


def test_the_published_pairs_cannot_come_from_one_ratio_of_tokens():
    ratios = [float(dominance.implied_ratio(*pair))
              for pair in ((1.58, 1.04), (10.23, 3.51), (17.37, 4.23))]
    assert [round(r, 2) for r in ratios] == [8.54, 0.26, 0.23]


def test_the_best_tokens_stay_and_never_none():
    scores = np.random.default_rng(0).permutation(40).astype(float)
    places = list(range(100, 140))
    for reduction, left in ((0.0, 40), (0.75, 10), (0.9, 4), (0.999, 1)):
        found = dominance.keep_best(scores, places, reduction)
        assert len(found) == left
        assert {scores[p - 100] for p in found} == set(range(40 - left, 40))
    with pytest.raises(ValueError, match="share below 1"):
        dominance.keep_best(scores, places, 1.0)


# -- masses --------------------------------------------------------------------------------------


def dense(model, prompt, first, steps):
    """[layer, step, key]: rows of the dense pattern over prompt and output, fed as one prompt."""
    made = model.run(prompt, new_tokens=steps).new_tokens[0]
    whole = Prompt.from_tokens([*prompt.ids, *made])
    pattern = model.run(whole, read="pattern").reads["pattern"].values[0].mean(1)
    return pattern[:, first : first + steps], made


@pytest.mark.parametrize("architecture, row", [
    ("llama", "own"), ("llama", "predicting"), ("gpt_oss", "own")])
def test_masses_are_sums_of_the_dense_pattern(opened, architecture, row):
    model, some = opened(architecture), prompts(3)
    sinks = [{0: [0, 5], 2: [4, 10]}, {1: [7]}, {}]
    found = dominance.measure(model, some, new_tokens=STEPS, row=row, sinks=sinks, batch_size=2)
    tables = {key: found[key].values for key in found.data.data_vars}
    image = set(range(*IMAGE))
    first = N - (row == "predicting")
    for number, prompt in enumerate(some):
        rows, made = dense(model, prompt, first, STEPS)
        ends = [i for i, token in enumerate(made) if token in model.end_tokens]
        last = min(STEPS, ends[0] + (row == "predicting")) if ends else STEPS
        for layer in range(model.n_layers):
            out = set(sinks[number].get(layer, ()))
            for step in range(last):
                a = rows[layer, step]
                text = {
                    "all": set(range(N)) - image, "no_bos": set(range(1, N)) - image,
                    "no_sinks": set(range(N)) - image - out, "question": {9, 10, 11},
                    "generated": set(range(first + step + 1)) - image}
                for name, keys in text.items():
                    own = image - out if name == "no_sinks" else image
                    one = {key: values[number, layer, step, dominance.KEYS.index(name)]
                           for key, values in tables.items()}
                    hidden = architecture == "gpt_oss" and layer != 1
                    if hidden and np.isnan(float(one["text"])):
                        continue  # outside of the sliding window
                    assert float(one["text"]) == pytest.approx(a[sorted(keys)].sum(), abs=2e-5)
                    assert int(one["n_text"]) == len(keys) and int(one["n_other"]) == len(own)
                    if not np.isnan(float(one["other"])):
                        assert float(one["other"]) == pytest.approx(a[sorted(own)].sum(), abs=2e-5)
        assert np.isnan(found["text"].isel(prompt=number, step=slice(last, None))).all()


def test_what_cannot_be_seen_is_not_counted_as_ignored(opened):
    """Every layer of Mistral has a window of five: the image is out of sight, not at zero."""
    found = dominance.measure(opened("mistral"), prompts(2), new_tokens=2)
    assert np.isnan(found["other"].isel(layer=0)).all()


def test_sinks_and_start_token_make_up_the_difference(opened):
    model, some = opened("llama"), prompts(2)
    found = dominance.measure(model, some, new_tokens=2, sinks=[{n: [0] for n in range(3)}] * 2)
    data = found.data
    assert np.allclose(data["text"].sel(segment="no_sinks"), data["text"].sel(segment="no_bos"),
                       equal_nan=True)
    assert (data["text"].sel(segment="all") > data["text"].sel(segment="no_bos")).any()
    bare = dominance.measure(model, some, new_tokens=2)
    assert np.isnan(bare["text"].sel(segment="no_sinks")).all()
    nothing = [Prompt.from_tokens(one.ids, {"image": IMAGE}) for one in some]
    unasked = dominance.measure(model, nothing, new_tokens=2)
    assert np.isnan(unasked["text"].sel(segment="question")).all()


def test_hidden_tokens_are_as_good_as_gone(opened):
    """Kept tokens of a long image equal a resumed run that never had the others."""
    model, some = opened("llama"), prompts(2, seed=4)
    kept = [[3, 6], [8, 5]]
    found = dominance.measure(model, some, new_tokens=1, row="predicting", keep=kept)
    assert found["n_other"].isel(step=0, layer=0).sel(segment="all").values.tolist() == [2, 2]
    for number, prompt in enumerate(some):
        rows = [p for p in range(N) if p not in range(*IMAGE) or p in kept[number]]
        logits = model.resumable(prompt).replay(0, torch.tensor([rows]))[0]
        assert found.manifest["output"][number] in ([int(logits.argmax())], [])
        gone = sorted(set(range(*IMAGE)) - set(kept[number]))
        pattern = model.run(prompt, write=interp.block("all", gone), read="pattern").reads["pattern"]
        last = pattern.values[0, :, :, -1].mean(1)
        for layer in range(3):
            one = found.data.isel(prompt=number, layer=layer, step=0).sel(segment="all")
            expected = last[layer, sorted(kept[number])].sum()
            assert float(one["other"]) == pytest.approx(expected, abs=1e-5)
            assert float(one["other"] + one["text"]) == pytest.approx(1, abs=1e-5)


def test_a_ratio_of_means_is_not_the_mean_of_ratios(opened):
    found = dominance.measure(opened("llama"), prompts(6), new_tokens=2)
    text, other = dominance.per_token(found, "all", [1, 2])
    one = found.data.sel(segment="all", layer=[1, 2])
    assert np.allclose(text, (one["text"] / one["n_text"]).mean(("layer", "step")))
    ratio = text.mean() / other.mean()
    assert abs(ratio - (text / other).mean()) > 1e-5


def test_wrong_questions_are_refused(opened):
    model, some = opened("llama"), prompts(2)
    with pytest.raises(OutOfRange, match="prompt 1: keep at least one"):
        dominance.measure(model, some, keep=[[3], []])
    with pytest.raises(OutOfRange, match="no others"):
        dominance.measure(model, some, keep=[[3], [0]])
    with pytest.raises(ValueError, match="'own', 'predicting'"):
        dominance.measure(model, some, row="last")
    with pytest.raises(PromptError, match="at least one"):
        dominance.measure(model, some, new_tokens=0)
