"""Heads in text: planted offsets and delimiters are found, streamed equals dense, chance is measured."""

import copy
import functools

import numpy as np
import pytest
import torch

import interp
from interp.core.errors import NumericalError, OutOfRange, PromptError
from interp.heads import linguistic
from interp.models.model import Model

N = 11


@pytest.fixture(scope="module")
def opened(tiny):
    """architecture -> the tiny model, opened once."""
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def prompts(*lengths):
    rng = np.random.default_rng(1)
    return [interp.Prompt.from_tokens([1, *rng.integers(3, 90, n - 1)]) for n in lengths]


WHERE = [{"start": (0,), "separator": (4, 9), "punctuation": (2,)},
         {"start": (0,), "separator": (7,), "punctuation": ()}]


def dense(model, prompt):
    return torch.tensor(model.run(prompt, read="pattern").reads["pattern"].values[0])


# -- pure ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-3, -1, 0, 1])
def test_an_offset_head_is_found_and_only_there(offset):
    rows = torch.stack([torch.eye(N).roll(offset, 1), torch.full((N, N), 1 / N)])
    found = {o: linguistic.offset_mass(rows, o) for o in (-3, -1, 0, 1)}
    # The rolled identity wraps around, but the rows that have the key are whole.
    assert float(found.pop(offset)[0]) == 1.0
    assert max(float(f[0]) for f in found.values()) == 0.0
    official = linguistic.offset_mass(rows, offset, official=True)
    assert float(official[0]) == pytest.approx((N - abs(offset)) / N)
    assert float(linguistic.offset_mass(rows, offset)[1]) == pytest.approx(1 / N)


def test_masses_add_up_and_split_by_query():
    rows = torch.rand(3, N, N).softmax(-1)
    whole = linguistic.segment_mass(rows, range(4)) + linguistic.segment_mass(rows, slice(4, None))
    assert torch.allclose(whole, torch.ones(3), atol=1e-6)
    ends, others = [2, 7], [q for q in range(N) if q not in (2, 7)]
    both = 2 * linguistic.segment_mass(rows, ends, ends) + (N - 2) * linguistic.segment_mass(
        rows, ends, others)
    assert torch.allclose(both / N, linguistic.segment_mass(rows, ends), atol=1e-6)


def test_entropy_is_bounded_and_smoothing_is_tiny():
    rows = torch.rand(2, 5, N).mul(9).softmax(-1)
    plain, smooth = (linguistic.entropy(rows, smoothing=s) for s in (0, 1e-4))
    assert (plain > 0).all() and (plain <= np.log(N)).all()
    assert 0 < float((smooth - plain).max()) < 0.003
    even = linguistic.entropy(torch.full((1, 3, N), 1 / N))
    assert torch.allclose(even, torch.full((1, 3), float(np.log(N))))
    # A row that sees itself alone stays certain: what is mixed in is what it may see.
    eye = torch.eye(3)[None]
    assert float(linguistic.entropy(eye, visible=torch.eye(3, dtype=torch.bool)).max()) < 1e-6
    assert float(linguistic.entropy(eye).max()) > 1e-4


def test_later_labels_overwrite_earlier_ones():
    high, low = np.array([[0.9]]), np.array([[0.1]])
    order = ["next", "previous", "broad", "start", "separator", "punctuation"]
    values = {name: np.array([[9.0]]) if name == "broad" else high for name in order}
    for last in range(len(order)):
        shown = {n: values[n] if i <= last else low for i, n in enumerate(order)}
        assert linguistic.labels(shown).item() == order[last]
    assert linguistic.labels({"next": np.array([[0.5, 0.51, np.nan]])}).tolist() == [["", "next", ""]]
    with pytest.raises(ValueError, match="labels need some of"):
        linguistic.labels({"sideways": high})


def test_bad_maps_are_refused():
    with pytest.raises(OutOfRange, match="offset 3"):
        linguistic.offset_mass(torch.ones(1, 3, 3), 3)
    with pytest.raises(OutOfRange, match="position 3"):
        linguistic.segment_mass(torch.ones(1, 3, 3), [3])
    with pytest.raises(NumericalError):
        linguistic.entropy(torch.full((1, 2, 2), float("nan")))


# -- in models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt_oss", "bert"])
def test_streamed_equals_dense_and_uniform_is_what_the_mask_allows(opened, architecture):
    model, given = opened(architecture), prompts(13, 10)
    found = linguistic.measure(model, given, groups=WHERE)
    for i, prompt in enumerate(given):
        p = dense(model, prompt)
        seen = p > 0
        even = seen / seen.sum(-1, keepdim=True)
        for prefix, rows in (("", p), ("uniform_", even)):
            one = found.data.isel(sample=i)
            for name in linguistic.GROUPS:
                if WHERE[i][name]:
                    want = linguistic.segment_mass(rows, WHERE[i][name]).numpy()
                    got = one[f"{prefix}mass"].sel(segment=name).values
                    assert np.allclose(got, want, atol=1e-6)
            ends = WHERE[i]["separator"]
            want = linguistic.segment_mass(rows, ends, ends).numpy()
            assert np.allclose(one[f"{prefix}separator_to_separator"].values, want, atol=1e-6)
            previous = one[f"{prefix}offset_mass"].sel(offset=-1).values
            assert np.allclose(previous, linguistic.offset_mass(rows, -1).numpy(), atol=1e-6)
            total = rows.sum(-1, keepdim=True)
            spread = linguistic.entropy(rows / total, smoothing=0).mean(-1).numpy()
            assert np.allclose(one[f"{prefix}entropy"].values, spread, atol=1e-5)
    assert np.isnan(found["mass"].sel(segment="punctuation").isel(sample=1)).all()
    assert found.manifest["samples with punctuation"] == 1


def test_scores_have_errors_frequencies_and_a_null_that_was_measured(opened):
    model, given = opened("llama"), prompts(13, 13, 13, 13)
    where = [WHERE[0]] * 4
    found = linguistic.measure(model, given, "separator", groups=where)
    ranked = linguistic.scores(found, "separator")
    assert np.allclose(found["score"], found["samples"].mean("sample"))
    assert np.allclose(ranked.scores, found["score"]) and ranked.eligible.all()
    assert np.allclose(found["standard_error"], found["samples"].std("sample", ddof=1) / 2)
    # Under a causal mask position t sees t + 1 keys.
    chance = np.mean([sum(s <= t for s in (4, 9)) / (t + 1) for t in range(13)])
    assert np.allclose(found["null"], chance, atol=1e-6)


def test_what_cannot_be_seen_is_not_eligible(opened):
    decoder = linguistic.measure(opened("llama"), prompts(13), "next", groups=WHERE[:1])
    assert not decoder["eligible"].any() and decoder["score"].isnull().all()
    assert "note" in decoder.manifest
    encoder = linguistic.measure(opened("bert"), prompts(13), "next", groups=WHERE[:1])
    assert encoder["eligible"].all()
    nothing = linguistic.measure(opened("bert"), prompts(10), "punctuation", groups=WHERE[1:])
    assert nothing["score"].isnull().all() and not nothing["eligible"].any()
    # A window of five tokens: a start token is out of sight of most, the previous one of none.
    windowed = linguistic.measure(opened("mistral"), prompts(300), "start", groups=[{"start": (0,)}])
    assert float(windowed["null"].max()) < 0.01
    with pytest.raises(ValueError, match="behavior must be one of"):
        linguistic.measure(opened("bert"), prompts(10), "sideways")
    with pytest.raises(PromptError, match="no prompts"):
        linguistic.measure(opened("bert"), [])


def with_offset_head(hf, offset, n):
    """A GPT-2 whose head L0H3 looks `offset` tokens away: its queries and keys are place codes."""
    hf = copy.deepcopy(hf)
    block = hf.transformer.h[0]
    angles = torch.arange(n + 3)[:, None] * torch.tensor([0.5, 1.1, 1.9, 2.7])
    code = torch.cat([angles.sin(), angles.cos()], -1)
    with torch.no_grad():
        hf.transformer.wte.weight.mul_(1e-3)  # what a token is hardly shows beside where it is
        places = block.ln_1(hf.transformer.wpe.weight[:n])
        solve = torch.linalg.pinv(places)
        wanted = code[torch.arange(n) + offset] if offset >= 0 else code[
            (torch.arange(n) + offset).clamp_min(0)]
        for part, target in ((0, 12 * wanted), (1, code[:n])):
            columns = slice(48 * part + 24, 48 * part + 32)
            block.attn.c_attn.weight[:, columns] = solve @ target
            block.attn.c_attn.bias[columns] = 0
    return Model(hf, "planted")


@pytest.mark.parametrize("offset", [-1, 0, -2])
def test_a_planted_offset_head_is_found_and_the_twin_is_not(tiny, offset):
    model, given = with_offset_head(tiny("gpt2"), offset, 16), prompts(16, 16, 16)
    previous = linguistic.measure(model, given, "previous", groups=[{}] * 3)
    score = previous["score"]
    if offset == -1:
        assert float(score[0, 3]) > 0.9 and float(previous["frequency"][0, 3]) == 1.0
        assert [str(h) for h in linguistic.scores(previous, "previous").top(1)] == ["L0H3"]
        names = linguistic.labels({"previous": score.values})
        assert names[0, 3] == "previous" and (names != "").sum() == 1
    else:
        assert float(score[0, 3]) < 0.1
        own = linguistic.scores(previous, "self")["L0H3"]
        assert own > 0.9 if offset == 0 else own < 0.1


def test_delimiters_of_a_real_tokenizer():
    model = interp.open_model("all-minilm-l6-v2")
    ids = model.tokenizer("Rain, then sun.", "It stopped.")["input_ids"]
    where = linguistic.delimiters(model, interp.Prompt.from_tokens(ids))
    words = model.tokenizer.convert_ids_to_tokens(ids)
    assert [words[p] for p in where["separator"]] == ["[SEP]", "[SEP]"]
    assert [words[p] for p in where["punctuation"]] == [",", ".", "."] and where["start"] == (0,)
