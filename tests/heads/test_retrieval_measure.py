"""Retrieval scores measured in models: against dense rows, a written head, and the reader."""

from pathlib import Path

import numpy as np
import pytest
import torch

import interp
from interp.causal.metrics import AnswerAccuracy
from interp.causal.sweep import ablation_sweep, difference
from interp.core import Prompt, PromptError, SegmentNotFound
from interp.core.errors import NumericalError
from interp.heads import retrieval
from interp.models.model import Model
from interp.organisms import induction_circuit, reader
from interp.prompts.needle import synthetic

REFERENCE = Path(__file__).parents[3] / "shared/reference"
ANSWER = "needle_value"


@pytest.fixture(scope="module")
def small(tiny):
    return Model(tiny("llama"), "tiny-llama")


@pytest.fixture(scope="module")
def written():
    """A model written by hand in which L1H2 retrieves, and prompts for it."""
    rng = np.random.default_rng(0)
    prompts = []
    for length in (30, 24, 30, 24, 36, 30):
        ids, span = induction_circuit.needle(rng, length)
        prompts.append(Prompt.from_tokens(ids, {ANSWER: span}))
    return Model(induction_circuit.circuit(), "circuit"), prompts


@pytest.fixture(scope="module")
def bundled():
    return interp.open_model("reader")


@pytest.fixture(scope="module")
def needles():
    return [one.prompt for one in synthetic(
        reader.needle, (48, 64), (0.0, 0.5, 1.0), np.random.default_rng(0))]


@pytest.mark.parametrize("by", ["zero", "mean", "uniform"])
@pytest.mark.parametrize("phase", ["decode", "all"])
def test_the_written_head_is_needed_and_layer_matched_heads_are_not(written, by, phase):
    model, prompts = written
    ranking = retrieval.scores_of(retrieval.measure(model, prompts, new_tokens=3))
    answers = model.generate(prompts, 1)
    found = ablation_sweep(
        model, prompts, AnswerAccuracy(answers, decode_last=True), ranking, counts=(0, 1), by=by,
        phase=phase)
    assert bool(found["layer_matched"].sel(count=1)) and found.manifest["top"] == ["L1H2"]
    gap = difference(found, "accuracy", 1)
    print(by, phase, gap)
    assert gap.value < -0.9 and gap.interval[1] < -0.5


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_oss", "mistral"])
def test_streamed_scores_are_those_of_the_dense_rows(tiny, architecture):
    model = Model(tiny(architecture), architecture)
    rng = np.random.default_rng(1)
    prompts = [Prompt.from_tokens(rng.integers(3, 90, n), {ANSWER: (a, b)})
               for n, a, b in ((19, 3, 14), (23, 5, 22), (19, 12, 18))]
    steps = 5
    found = retrieval.measure(model, prompts, new_tokens=steps, min_recall=-1, batch_size=2)
    for number, prompt in enumerate(prompts):
        run = model.run(prompt, read="pattern", new_tokens=steps)
        n = len(prompt)
        rows = run.reads["pattern"].values[0][:, :, n - 1 : n - 1 + steps]
        said = run.new_tokens[0]
        stop = next((i for i, t in enumerate(said) if t in model.end_tokens), steps)
        rows = np.moveaxis(rows, 2, 0)[:stop]
        span = prompt.positions(ANSWER)
        for mode in ("set", "official"):
            dense = retrieval.score(rows, prompt.ids, said[:stop], (span[0], span[-1] + 1), mode)
            assert np.allclose(found[mode].values[number], dense, atol=1e-12)
        assert np.allclose(found["on_first"].values[number], rows[..., 0].mean(0), atol=1e-6)
        assert np.allclose(
            found["on_needle"].values[number], rows[..., list(span)].sum(-1).mean(0), atol=1e-5)


def test_the_written_head_is_found_and_no_other(written):
    model, prompts = written
    found = retrieval.measure(model, prompts, new_tokens=4)
    assert found.manifest["n_kept"] == len(prompts)
    truth = np.zeros((2, 4), dtype=bool)
    truth[induction_circuit.RETRIEVES] = True
    score = found["score"].values
    assert (score[truth] == 1).all() and (found["frequency"].values[truth] == 1).all()
    assert score[~truth].max() < 0.2
    assert 0.02 < float(found["null"][0, 0]) < 0.05
    assert float(found["shuffled"][induction_circuit.RETRIEVES]) == 0  # its tokens all differ
    # Set and official form agree where no token is said twice.
    assert np.array_equal(found["set"].values[:, truth], found["official"].values[:, truth])


def test_a_model_whose_head_looks_but_does_not_speak_fails_the_filter(written):
    prompts = written[1]
    found = retrieval.measure(
        Model(induction_circuit.circuit(speaks=False), "mute"), prompts, new_tokens=4)
    assert found.manifest["n_kept"] == 0 and np.isnan(found["score"].values).all()


def test_samples_are_averaged_and_counted(written):
    model, prompts = written
    # The model says the four tokens of the true needle; these spans hold 4, 3, 2, 1 of them.
    moved = []
    for by, prompt in enumerate([*prompts[:3], prompts[4]]):
        start = min(prompt.positions(ANSWER)) + by
        moved.append(Prompt.from_tokens(prompt.ids, {ANSWER: (start, start + 4)}))
    found = retrieval.measure(model, moved, new_tokens=4)
    assert found["recall"].values.tolist() == [1.0, 0.75, 0.5, 0.25]
    assert found["kept"].values.tolist() == [True, True, False, False]
    kept = found["set"].values[:2]
    assert found.manifest["n_kept"] == 2 and found.manifest["n_prompts"] == 4
    assert kept[:, 1, 2].tolist() == [1.0, 0.75]
    assert np.allclose(found["score"], kept.mean(0))
    assert np.allclose(found["frequency"], (kept > 0).mean(0))
    assert np.allclose(found["standard_error"], kept.std(0, ddof=1) / 2**0.5)
    scores = retrieval.scores_of(found)
    assert np.allclose(scores.samples.values, kept)
    assert np.array_equal(np.asarray(scores), found["score"].values)


def test_no_sample_that_retrieves_gives_nan_and_says_so(small):
    rng = np.random.default_rng(2)
    prompts = [Prompt.from_tokens(rng.integers(3, 90, 20), {ANSWER: (4, 8)}) for _ in range(3)]
    found = retrieval.measure(small, prompts, new_tokens=1)
    assert found.manifest["n_kept"] == 0 and "NaN, not zero" in found.manifest["note"]
    for name in ("score", "frequency", "standard_error", "null", "shuffled"):
        assert np.isnan(found[name].values).all()
    assert np.isfinite(found["set"].values).all()  # the failures are a map of their own
    with pytest.raises(ValueError, match="none of 3 prompts passed the success filter"):
        retrieval.scores_of(found)


def test_heads_with_a_short_window_are_ineligible_not_silent(tiny):
    model = Model(tiny("gemma3"), "gemma3")  # layers 0 and 2 see five tokens back
    rng = np.random.default_rng(3)
    far = Prompt.from_tokens(rng.integers(3, 90, 24), {ANSWER: (3, 6)})
    found = retrieval.measure(model, [far], new_tokens=2, min_recall=-1)
    assert found["eligible"].values.all(1).tolist() == [False, True, False]
    assert {h.layer for h in retrieval.scores_of(found).top(18)} == {1}
    near = Prompt.from_tokens(rng.integers(3, 90, 24), {ANSWER: (22, 24)})
    again = retrieval.measure(model, [near], new_tokens=2, min_recall=-1)
    assert again["eligible"].values.all()


def test_batches_and_order_do_not_matter(bundled, needles):
    one = retrieval.measure(bundled, needles, batch_size=1)
    other = retrieval.measure(bundled, needles[::-1], batch_size=8)
    assert np.array_equal(one["set"].values, other["set"].values[::-1])
    assert np.allclose(one["on_needle"].values, other["on_needle"].values[::-1], atol=1e-5)


def test_the_reader_retrieves_with_few_heads_above_both_chance_levels(bundled, needles):
    found = retrieval.measure(bundled, needles)
    assert found.manifest["n_kept"] >= 5
    best = retrieval.scores_of(found).top(1)[0]
    at = {"layer": best.layer, "head": best.head}
    assert float(found["score"].sel(at)) > 0.5 > 10 * float(found["null"].sel(at))
    assert float(found["shuffled"].sel(at)) < 0.5 * float(found["score"].sel(at))
    assert float((found["score"] >= retrieval.RETRIEVAL).mean()) < 0.5
    # The control: with other tokens written into the needle, nothing is said that stands there.
    rng = np.random.default_rng(1)
    emptied = []
    for prompt in needles:
        ids, span = list(prompt.ids), prompt.positions(ANSWER)
        for p in span:
            ids[p] = int(rng.integers(60, 100))
        asked = prompt.ids[-1]
        ids[prompt.positions("needle_key")[0]] = asked - 1 if asked > 0 else asked + 1
        emptied.append(Prompt.from_tokens(ids, {ANSWER: (span[0], span[-1] + 1)}))
    lost = retrieval.measure(bundled, emptied, min_recall=-1)
    assert float(lost["score"].max()) < 0.3


def test_chance_is_the_score_of_a_random_head():
    rng = np.random.default_rng(0)
    prompt, said = np.arange(10, 30), np.array([14, 15, 15, 16])
    visible = [20, 21, 22, 23]
    draws = np.stack([rng.integers(0, n, (1, 20000)) for n in visible])[:, :, :]
    for mode in ("set", "official"):
        heads = retrieval.score_from_top_keys(draws, prompt, said, (4, 7), mode)
        expected = retrieval.chance(said, prompt[4:7], visible, mode)
        assert abs(float(heads.mean()) - expected) < 5 * float(heads.std()) / 20000**0.5


@pytest.mark.parametrize(("said", "value"), [
    ([5, 6, 7], 1.0), ([7, 6, 5], 1.0), ([5, 5, 5], 1 / 3), ([], 0.0), ([9], 0.0)])
def test_recall_counts_each_word_as_often_as_the_answer_has_it(said, value):
    assert retrieval.recall([5, 6, 7], said) == pytest.approx(value)


def test_recall_reads_words_where_there_is_a_tokenizer(bundled):
    ids = [reader.TOKEN[w] for w in ("seven", "ten", "two")]
    assert retrieval.recall(ids, ids[::-1], bundled.tokenizer) == 1.0
    # A value without letters is compared by its tokens.
    assert retrieval.recall([reader.END], [reader.END], bundled.tokenizer) == 1.0
    assert retrieval.recall([reader.END], ids, bundled.tokenizer) == 0.0


def test_bad_prompts_are_named(small):
    with pytest.raises(PromptError, match="segment 'needle_value' of prompt 0 has gaps"):
        retrieval.measure(small, [Prompt.from_tokens(range(3, 20), {ANSWER: [3, 5, 6]})])
    with pytest.raises(SegmentNotFound, match="no segment 'needle_value'"):
        retrieval.measure(small, [Prompt.from_tokens(range(3, 20))])
    with pytest.raises(PromptError, match="no prompts"):
        retrieval.measure(small, [])
    with pytest.raises(PromptError, match="new_tokens >= 1"):
        retrieval.measure(small, [Prompt.from_tokens(range(3, 20), {ANSWER: (3, 6)})], new_tokens=0)


def test_released_scores_go_out_and_come_back_and_their_heads_can_be_ablated(
    bundled, needles, tmp_path
):
    found = retrieval.scores_of(retrieval.measure(bundled, needles))
    path = retrieval.write_released(found, tmp_path / "reader.json")
    again = retrieval.read_released(path)
    assert np.array_equal(again.samples.values, found.samples.values)
    assert again.top(5) == found.top(5) and np.allclose(again.frequency, found.frequency)
    retrieval.write_released(found, path)  # replaced, not appended to
    assert retrieval.read_released(path).samples.sizes == found.samples.sizes
    heads = again.top(4)
    before = bundled.generate(needles, 3)
    after = bundled.generate(needles, 3, write=interp.ablate(heads))
    answers = [[p.ids[i] for i in p.positions(ANSWER)] for p in needles]
    assert sum(a == b for a, b in zip(before, answers)) >= 5
    assert sum(a == b for a, b in zip(after, answers)) <= 1


def test_a_released_file_survives_a_round_trip_exactly(tmp_path):
    source = REFERENCE / "retrieval_head_scores/llama-2-7b-80k.json"
    if not source.exists():
        pytest.skip("the reference data lie outside the repository")
    found = retrieval.read_released(source)
    again = retrieval.read_released(retrieval.write_released(found, tmp_path / "copy.json"))
    assert np.array_equal(found.samples.values, again.samples.values)


def test_scores_that_the_format_cannot_hold_are_refused(tmp_path):
    made = retrieval.aggregate(torch.rand(3, 2, 4))
    with pytest.raises(ValueError, match="hold no samples"):
        retrieval.write_released(retrieval.RetrievalScores(made.scores), tmp_path / "a.json")
    bad = made.samples.copy()
    bad[0, 0, 0] = np.nan
    with pytest.raises(NumericalError):
        retrieval.write_released(
            retrieval.RetrievalScores(made.scores, samples=bad), tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_the_map_has_the_papers_bins(bundled, needles):
    from interp.figures.style import canvas

    figure, ax = canvas()
    retrieval.draw(retrieval.measure(bundled, needles[:2]), ax)
    labels = [t.get_text() for a in figure.axes for t in a.get_yticklabels()]
    assert {"0", "< 0.1", "0.1 to 0.5", "≥ 0.5"} <= set(labels)
