"""Couplings of curves are found where planted and not in noise; changed tokens matter where read."""

import copy

import numpy as np
import pytest
import torch

import interp
from interp.core.errors import OutOfRange
from interp.heads import preplan_anchor
from interp.heads.preplan_anchor import coupling, intervene, peaks
from interp.models.model import Model


def together(first, second):
    return float(peaks(first)[peaks(second)].mean())


def smooth(rng, n=120):
    """Noise with an autocorrelation of its own, as attention curves have."""
    return np.convolve(rng.normal(size=n + 8), np.ones(9) / 9, "valid")


def test_a_planted_coupling_is_found():
    rng = np.random.default_rng(0)
    curves = [(x, x + 0.2 * smooth(rng)) for x in (smooth(rng) for _ in range(8))]
    found = coupling(together, curves)
    assert found.p < 0.02 and (found.observed - found.null).min() > 0.2
    assert np.allclose(found.null.mean(), 0.4, atol=0.05)  # 40 % are peaks


def test_independent_curves_are_not_coupled_more_often_than_the_level_says():
    rng, p = np.random.default_rng(1), []
    for seed in range(60):
        curves = [(smooth(rng, 60), smooth(rng, 60)) for _ in range(3)]
        p.append(coupling(together, curves, shifts=60, seed=seed).p)
    p = np.array(p)
    assert (p < 0.1).mean() < 0.22 and 0.35 < p.mean() < 0.65


def test_a_common_trend_looks_like_coupling_and_is_why_fai_is_taken_over_uniform():
    rng, n = np.random.default_rng(2), 100
    fall = 1 / np.arange(1, n + 1)
    noise = [(np.exp(0.2 * smooth(rng, n)), np.exp(0.2 * smooth(rng, n))) for _ in range(10)]
    raw = coupling(together, [(fall * a, fall * b) for a, b in noise])
    lift = coupling(together, noise)
    assert raw.p < 0.02 and (raw.observed - raw.null).mean() > 0.4
    assert lift.p > 0.05 and abs((lift.observed - lift.null).mean()) < 0.15


def test_texts_without_a_value_are_left_out():
    rng = np.random.default_rng(3)
    nothing = coupling(together, [(np.ones(4), np.ones(4))])
    assert not len(nothing.observed) and np.isnan(nothing.p)
    pair = (smooth(rng), smooth(rng))
    some = coupling(together, [pair, (np.ones(4), np.ones(4))])
    assert len(some.observed) == len(some.null) == 1


def test_nothing_changes_behind_a_token_that_the_model_cannot_tell_from_others(tiny):
    hf = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        hf.model.embed_tokens.weight[:] = hf.model.embed_tokens.weight[5].clone()
    prompts = [interp.Prompt.from_tokens([1, 9, 33, 7, 50, 61, 12, 8]),
               interp.Prompt.from_tokens([1, 40, 3, 77, 5])]
    places = {"anchor": [[3, 6], [2, 4]], "other": [[1, 2], [1, 3]]}
    blind = intervene(Model(hf, "blind"), prompts, places, new_tokens=6)["jaccard"]
    assert (blind == 1.0).all() and blind.dims == ("condition", "sample", "position")
    seeing = intervene(Model(tiny("llama"), "seeing"), prompts, places, new_tokens=6)["jaccard"]
    assert float(seeing.mean()) < 0.9 and (seeing >= 0).all()


def test_the_overlap_is_that_of_two_continuations_by_hand(tiny):
    model = Model(tiny("llama"), "tiny")
    prompt, place = interp.Prompt.from_tokens([1, 9, 33, 7, 50, 61]), 3

    def greedy(ids):
        ids = list(ids)
        with torch.no_grad():
            for _ in range(5):
                ids.append(int(tiny("llama")(torch.tensor([ids])).logits[0, -1].argmax()))
        return set(ids[place + 1 :])

    with torch.no_grad():
        row = tiny("llama")(torch.tensor([prompt.ids])).logits[0, place - 1].clone()
    row[prompt.ids[place]] = -1e9
    a, b = greedy(prompt.ids[: place + 1]), greedy([*prompt.ids[:place], int(row.argmax())])
    found = intervene(model, [prompt], {"anchor": [[place]]}, new_tokens=5)["jaccard"]
    assert float(found.item()) == pytest.approx(len(a & b) / len(a | b))


def test_positions_that_cannot_be_changed_are_refused(tiny):
    model, prompt = Model(tiny("llama"), "tiny"), interp.Prompt.from_tokens([1, 9, 33])
    with pytest.raises(OutOfRange, match="position 0 cannot be changed"):
        intervene(model, [prompt], {"anchor": [[0]]})
    with pytest.raises(OutOfRange, match="position 3"):
        intervene(model, [prompt], {"anchor": [[3]]})
    with pytest.raises(ValueError, match="equally many"):
        intervene(model, [prompt], {"anchor": [[1]], "other": [[1, 2]]})


def test_peaks_and_drops():
    assert preplan_anchor.change(np.array([1.0, 4.0, 2.0]), drop_only=True)[:2].tolist() == [0.0, 2.0]
    assert peaks(np.array([1.0, 2.0, 3.0, 4.0, 5.0])).sum() == 2
