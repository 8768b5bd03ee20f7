"""Retrieval scores: the released rule, the released files, and planted heads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.core.errors import NumericalError, OutOfRange, ResultCorrupted
from interp.core.head import Head
from interp.heads import retrieval

REFERENCE = Path(__file__).parents[3] / "shared/reference"
needs_reference = pytest.mark.skipif(
    not REFERENCE.exists(), reason="the reference data lie outside the repository"
)
START, STOP, N_LAYERS, N_HEADS, N_KEYS = 9, 14, 3, 4, 30
PROMPT = torch.arange(100, 100 + 24)
ANSWER = PROMPT[START:STOP]


def planted(head: Head, keys=range(START, STOP), seed: int = 0) -> torch.Tensor:
    """Random decode rows in which one head's top key walks along `keys`."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.rand(STOP - START, N_LAYERS, N_HEADS, N_KEYS, generator=draw)
    for step, key in enumerate(keys):
        rows[step, head.layer, head.head, key] = 5.0
    return rows / rows.sum(-1, keepdim=True)


@needs_reference
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_official_mode_equals_the_released_rule(kind):
    data = np.load(REFERENCE / "released_code_outputs/retrieval_rule.npz")
    rows = data["decode_attention"] if kind == "numpy" else torch.from_numpy(
        data["decode_attention"])
    found = retrieval.score(
        rows, data["prompt_ids"], data["emitted"], data["needle"], mode="official")
    assert np.abs(found.numpy() - data["score"]).max() < 1e-5


def test_a_retrieval_head_is_found_only_where_it_was_planted():
    head = Head(1, 2)
    found = retrieval.score(planted(head), PROMPT, ANSWER, (START, STOP))
    scores = retrieval.aggregate(found[None])
    assert scores.top(1) == [head] and scores[head] == 1
    assert scores.without(head).max() < 0.5
    # Pointing at the needle while other tokens are spoken is no retrieval.
    silent = retrieval.score(planted(head), PROMPT, ANSWER.flip(0) + 50, (START, STOP))
    assert float(silent.max()) == 0
    # Nor is pointing at the right token outside the needle.
    assert float(retrieval.score(planted(head), PROMPT, ANSWER, (0, 3)).max()) == 0


def test_repeated_tokens_are_paid_once_in_set_mode_and_again_in_official_mode():
    keys = [START, START, START + 1, START, START + 1]
    rows = planted(Head(0, 0), keys=keys)
    spoken = PROMPT[keys]
    assert retrieval.score(rows, PROMPT, spoken, (START, STOP))[0, 0] == 2 / 5
    assert retrieval.score(rows, PROMPT, spoken, (START, STOP), mode="official")[0, 0] == 1
    longer = torch.cat([rows, rows])
    double = torch.cat([spoken, spoken])
    assert retrieval.score(longer, PROMPT, double, (START, STOP))[0, 0] == 2 / 5
    assert retrieval.score(longer, PROMPT, double, (START, STOP), mode="official")[0, 0] == 2


def test_a_needle_with_equal_tokens_counts_the_position_pointed_at():
    prompt = PROMPT.clone()
    prompt[START + 1] = prompt[START]  # the same token twice in the needle
    rows = planted(Head(2, 1), keys=[START + 1] * 5)
    found = retrieval.score(rows, prompt, prompt[START].repeat(5), (START, STOP))
    assert found[2, 1] == 1 / 5


def test_top_keys_give_the_same_score_as_rows():
    rows = planted(Head(1, 3), seed=4)
    arguments = (PROMPT, ANSWER, slice(START, STOP))
    found = retrieval.score(rows, *arguments)
    assert torch.equal(retrieval.score_from_top_keys(rows.argmax(-1), *arguments), found)
    none = torch.full((5, N_LAYERS, N_HEADS), -1)
    assert float(retrieval.score_from_top_keys(none, *arguments).max()) == 0


def test_rows_without_attention_point_nowhere():
    rows = torch.zeros(5, N_LAYERS, N_HEADS, N_KEYS)
    assert float(retrieval.score(rows, PROMPT, PROMPT[:5], (0, 5)).max()) == 0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), order=st.permutations(range(N_HEADS)), more=st.integers(1, 6),
       scale=st.floats(0.1, 10))
def test_head_order_scale_and_context_after_the_prompt_do_not_matter(seed, order, more, scale):
    rows = planted(Head(1, 2), seed=seed)
    arguments = (PROMPT, ANSWER, (START, STOP))
    found = retrieval.score(rows, *arguments)
    assert torch.equal(retrieval.score(rows[:, :, order], *arguments), found[:, order])
    padded = torch.nn.functional.pad(rows, (0, more))
    assert torch.equal(retrieval.score(padded, *arguments), found)
    assert torch.equal(retrieval.score(scale * rows, *arguments), found)
    assert float(found.max()) <= 1


TABLE = {  # heads.md, card 1: shape, samples, >= 0.5, >= 0.1, between, zero, always active
    "llama-2-7b-80k": ((32, 32), 586, 6, 33, 272, 719, 12,
                       {"16-19": .943, "11-15": .920, "8-26": .800, "6-9": .618, "7-12": .614,
                        "17-22": .557}),
    "Mistral-7B-v0.2-hf": ((32, 32), 362, 5, 43, 315, 666, 31,
                           {"18-0": .943, "12-7": .928, "12-6": .774, "18-2": .743,
                            "18-3": .603}),
    "Qwen1.5-14B-Chat": ((40, 40), 221, 1, 68, 394, 1138, 0,
                         {"14-12": .525, "20-7": .422, "23-16": .413, "12-2": .405,
                          "22-6": .395}),
}


@needs_reference
@pytest.mark.parametrize("name", TABLE)
def test_released_files_give_the_published_shares_and_heads(name):
    shape, n, half, tenth, between, zero, always, top = TABLE[name]
    found = retrieval.read_released(REFERENCE / f"retrieval_head_scores/{name}.json")
    mean = found.scores.values
    assert mean.shape == shape and found.samples.sizes["sample"] == n
    assert [int((mean >= x).sum()) for x in (0.5, 0.1)] == [half, tenth]
    assert int(((mean > 0) & (mean < 0.1)).sum()) == between and int((mean == 0).sum()) == zero
    assert int((found.frequency.values == 1).sum()) == always
    ranked = found.top(len(top))
    assert [f"{h.layer}-{h.head}" for h in ranked] == list(top)
    assert [round(found[h], 3) for h in ranked] == list(top.values())


@needs_reference
def test_empty_samples_of_the_chat_model_are_dropped_on_request():
    path = REFERENCE / "retrieval_head_scores/Qwen1.5-14B-Chat.json"
    found = retrieval.read_released(path, drop_empty_samples=True)
    assert found.samples.sizes["sample"] == 221 - 8
    assert int((found.frequency.values == 1).sum()) == 29


@needs_reference
def test_unrelated_models_of_one_size_share_no_retrieval_heads():
    one, other = (retrieval.read_released(REFERENCE / f"retrieval_head_scores/{name}.json")
                  for name in ("llama-2-7b-80k", "Mistral-7B-v0.2-hf"))
    pearson = np.corrcoef(one.scores.values.ravel(), other.scores.values.ravel())[0, 1]
    assert abs(pearson) < 0.1 and len(set(one.top(30)) & set(other.top(30))) <= 1


def test_aggregation_is_mean_frequency_and_error_over_samples():
    samples = torch.rand(6, 2, 3, generator=torch.Generator().manual_seed(1)).double()
    samples[samples < 0.4] = 0
    found = retrieval.aggregate(samples)
    assert np.allclose(found.scores, samples.mean(0))
    assert np.allclose(found.frequency, (samples > 0).double().mean(0))
    assert np.allclose(found.standard_error, samples.std(0) / 6**0.5)
    assert found.samples.dims == ("sample", "layer", "head")
    assert set(found.to_dataframe()) >= {"layer", "head", "score", "frequency"}


@pytest.mark.parametrize(("content", "sentence"), [
    ("[1]", "is not a released"), ("{", "is not a released"), ("{}", "is not a released"),
    (json.dumps({"0-0": [1], "1-1": [1]}), "2 heads, not 2 x 2"),
    (json.dumps({"0-0": [1, 2], "0-1": [1]}), "is not a released"),
    (json.dumps({"a": [1]}), "is not a released"),
])
def test_a_broken_file_is_refused(tmp_path, content, sentence):
    (tmp_path / "scores.json").write_text(content)
    with pytest.raises(ResultCorrupted, match=sentence):
        retrieval.read_released(tmp_path / "scores.json")


def test_bad_input_is_named():
    rows = planted(Head(0, 0))
    with pytest.raises(ValueError, match="4 emitted tokens but attention of 5 steps"):
        retrieval.score(rows, PROMPT, ANSWER[:4], (START, STOP))
    with pytest.raises(ValueError, match="the needle is empty"):
        retrieval.score(rows, PROMPT, ANSWER, (5, 5))
    with pytest.raises(OutOfRange, match=r"needle \(20, 25\) is outside the prompt of 24 tokens"):
        retrieval.score(rows, PROMPT, ANSWER, (20, 25))
    with pytest.raises(ValueError, match="has 20 keys but the prompt has 24 tokens"):
        retrieval.score(rows[..., :20], PROMPT, ANSWER, (START, STOP))
    with pytest.raises(NumericalError, match="NaN"):
        retrieval.score(rows * torch.nan, PROMPT, ANSWER, (START, STOP))
