"""Saliency: equal to autograd through transformers' own attention, and true where truth is planted."""

import copy
import functools

import numpy as np
import pytest
import torch
from scipy import stats

from interp.core import Prompt, PromptError, block
from interp.core.errors import NumericalError, OutOfRange
from interp.flow import saliency
from interp.flow.rollout import rollout, uniform
from interp.flow.saliency import (
    Contrast,
    blank_out,
    correlations,
    explained,
    gradients,
    history_score,
    knockout,
    outcomes,
    red_flags,
    reliability,
    score,
)
from interp.models.input_gradients import input_gradients
from interp.models.model import Model
from interp.organisms import hidden_use, induction_circuit

IDS = tuple(range(5, 16))


@pytest.fixture(scope="module")
def opened(tiny):
    """Tiny models by architecture, each proven once."""
    return functools.lru_cache(lambda architecture: Model(tiny(architecture), architecture))


def eager(tiny, architecture):
    hf = copy.deepcopy(tiny(architecture)).eval()
    hf.set_attn_implementation("eager")
    return hf


def attention_and_gradient(hf, ids, row, token):
    """Attention [layer, head, query, key] and the gradient of -log p(token | row), by autograd."""
    out = hf(input_ids=torch.tensor([ids]), output_attentions=True)
    for weights in out.attentions:
        weights.retain_grad()
    (-out.logits[0, row].log_softmax(-1)[token]).backward()
    return (torch.cat([a.detach() for a in out.attentions]),
            torch.cat([torch.zeros_like(a) if a.grad is None else a.grad for a in out.attentions]))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3"])
def test_saliency_is_attention_times_gradient_in_the_predicting_row(tiny, opened, architecture):
    hf = eager(tiny, architecture)
    a, g = attention_and_gradient(hf, IDS, -1, 42)
    found = saliency.measure(opened(architecture), Contrast(Prompt(IDS), (42, 7)))
    expected = (a * g).abs()[:, :, -1].numpy()
    assert np.abs(found["product"].values[0] - expected).max() < 1e-5 * expected.max() + 1e-9
    assert np.abs(found["attention"].values[0] - a[:, :, -1].numpy()).max() < 1e-5
    rows = score(a, g)[:, -1].numpy()
    assert np.abs(found["saliency"].values[0] - rows).max() < 1e-4
    assert np.allclose(np.linalg.norm(rows, axis=-1), 1)


def test_the_row_that_the_released_code_reads_has_no_gradient(tiny):
    """It appends the candidate and reads its row, while the loss is that of the row before."""
    hf, candidate = eager(tiny, "llama"), 42
    a, g = attention_and_gradient(hf, (*IDS, candidate), -2, candidate)
    released, predicting = score(a, g)[:, -1], score(a, g)[:, -2]
    assert float(released.abs().max()) == 0 and float(predicting.norm(dim=-1).min()) > 0.99
    history = range(3, 8)
    assert history_score(released, history) == 0 < history_score(predicting, history)
    # The candidate itself changes nothing for the row that predicts it.
    alone, _ = attention_and_gradient(eager(tiny, "llama"), IDS, -1, candidate)
    assert torch.allclose(alone[:, :, -1], a[:, :, -2, :-1], atol=1e-6)


def test_a_score_is_the_mean_over_history_and_layers():
    rows = torch.rand(9, 12, generator=torch.Generator().manual_seed(0))
    assert history_score(rows, [4, 5], [6, 7, 8]) == pytest.approx(float(rows[6:9, 4:6].mean()))
    assert history_score(rows, []) == 1


def test_rows_are_scaled_and_rows_without_gradient_stay_zero():
    draw = torch.Generator().manual_seed(1)
    a, g = torch.rand(6, 4, 5, generator=draw), torch.randn(6, 4, 5, generator=draw)
    g[:, 2] = 0
    found = score(a, g)
    expected = (a * g).abs().mean(0)
    assert torch.allclose(found[0], (expected[0] / expected[0].norm()).double())
    assert float(found[2].abs().max()) == 0
    assert torch.allclose(score(a, 7 * g), found)  # no unit of the loss


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_by_the_embeddings_equal_autograd(tiny, opened, architecture):
    hf = eager(tiny, architecture)
    embedded = hf.get_input_embeddings()(torch.tensor([IDS])).detach().requires_grad_()
    p = hf(inputs_embeds=embedded).logits[0, -1].softmax(-1)
    (p[42] - p[7]).backward()
    g, x = embedded.grad[0], embedded.detach()[0]
    if architecture == "gpt2":  # What enters the first block has the positions in it.
        x = x + hf.transformer.wpe.weight[: len(IDS)].detach()
    model, item = opened(architecture), Contrast(Prompt(IDS), (42, 7))
    for kind, expected in (("gradient", g.sum(-1).abs()), ("norm", g.norm(dim=-1)),
                           ("gradient_input", (g * x).sum(-1).abs())):
        found = gradients(model, item, kind)
        if architecture == "gpt2" and kind == "gradient":
            # LayerNorm does not feel a shift of all coordinates: the sum says nothing, and is NaN.
            assert float(expected.max()) < 1e-5 * float(g.norm(dim=-1).max())
            assert np.isnan(found).all()
        else:
            assert np.abs(found - expected.numpy()).max() < 1e-4 * float(expected.max())


def test_the_gradient_by_what_enters_a_later_block_is_the_slope_there(opened):
    import interp

    model, prompt = opened("llama"), Prompt(IDS)
    found = input_gradients(model, prompt, lambda x: x[-1, 42], layer=2)
    step = 1e-2 * found.gradient / found.gradient.norm()
    values = [float(model.run(prompt, write=interp.edit(
        "resid_pre.2", "add", (sign * step).numpy())).logits[0][-1, 42]) for sign in (1, -1)]
    assert values[0] - values[1] == pytest.approx(0.02 * float(found.gradient.norm()), rel=2e-2)
    assert all(p.requires_grad for p in model.hf.parameters())
    # No hook stays: a plain run says what it said.
    assert float(model.run(prompt).logits[0][-1, 42]) == pytest.approx(found.value, abs=1e-5)
    with pytest.raises(OutOfRange, match="layer 3 does not exist"):
        input_gradients(model, prompt, lambda x: x[-1, 42], layer=3)
    with pytest.raises(NumericalError, match="no gradient"):
        input_gradients(model, prompt, lambda x: x[-1, 42] * torch.nan)
    with pytest.raises(ValueError, match="not 'mean'"):
        found.by_position("mean")


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_blanking_equals_the_loop_over_positions(tiny, opened, architecture):
    hf, row = tiny(architecture), -1 if architecture == "llama" else 4
    found = blank_out(opened(architecture), Contrast(Prompt(IDS), (42, 7), row), [90, 91])

    def number(ids):
        with torch.no_grad():
            p = hf(input_ids=torch.tensor([ids])).logits[0, row].softmax(-1)
        return float(p[42] - p[7])

    for draw, token in enumerate((90, 91)):
        for place in range(len(IDS)):
            changed = [*IDS[:place], token, *IDS[place + 1 :]]
            assert found[draw, place] == pytest.approx(abs(number(changed) - number(IDS)), abs=1e-6)
    assert float(found.max()) > 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert"])
def test_knocking_out_equals_blocking_the_key_everywhere(opened, architecture):
    model, row = opened(architecture), -1 if architecture != "bert" else 4
    item = Contrast(Prompt(IDS), (42, 7), row)
    found = knockout(model, item, scale="logit")
    base = outcomes(model, [item], scale="logit")[0]
    for place in (p for p in range(len(IDS)) if p != item.query):
        others = [q for q in range(len(IDS)) if q != place]
        rows = model.run(item.prompt, write=block(others, [place])).logits[0]
        expected = abs(float(rows[item.query, 42] - rows[item.query, 7]) - base)
        assert found[place] == pytest.approx(expected, abs=1e-5)
    assert np.isnan(found[item.query]) and np.nanmax(found) > 1e-4


def test_an_encoder_without_words_is_judged_by_a_partner(tiny):
    import transformers as t

    torch.manual_seed(0)
    model = Model(t.BertModel(tiny("bert").config).eval(), "encoder")
    partner = torch.randn(48, generator=torch.Generator().manual_seed(3))
    item = Contrast(Prompt(IDS), partner=partner, query=None)
    states = model.hf(input_ids=torch.tensor([IDS])).last_hidden_state[0].detach()
    expected = float(torch.cosine_similarity(states.mean(0), partner, dim=0))
    assert outcomes(model, [item])[0] == pytest.approx(expected, abs=1e-5)
    assert blank_out(model, item, [3]).shape == (1, 11)
    assert np.isfinite(knockout(model, item)).all() and np.isfinite(gradients(model, item)).all()
    found = saliency.measure(model, item)
    pattern = model.run(item.prompt, read="pattern").reads["pattern"].values[0]
    assert np.allclose(found["attention"].values[0], pattern.mean(-2), atol=1e-5)
    assert np.allclose(np.linalg.norm(found["saliency"].values[0], axis=-1), 1)


def induced(seed):
    """Random words, one pair a b among them, and a again: the answer is b."""
    ids = [int(t) for t in np.random.default_rng(seed).permutation(np.arange(3, 39))[:14]]
    return Contrast(Prompt((*ids, ids[5])), (ids[6], ids[9]))


def test_what_a_written_circuit_reads_is_found_and_nothing_in_its_silent_twin():
    model = Model(induction_circuit.circuit(), "circuit")
    twin = Model(induction_circuit.circuit(speaks=False), "twin")
    for seed in range(2):
        item = induced(seed)
        blank = blank_out(model, item, [39, 2])
        assert blank.shape == (2, 15) and (blank[:, 6] > 0.5).all()
        # The pair a b, and the a that asks: without any of them there is no answer.
        assert set(np.argsort(-blank.mean(0))[:3]) == {5, 6, 14}
        assert int(np.nanargmax(knockout(model, item))) in (5, 6)
        assert int(gradients(model, item)[:-1].argmax()) in (5, 6)
        rows = saliency.measure(model, item)["saliency"].values[0]
        assert int(rows[1].argmax()) == 6 and rows[1, 6] > 0.95
        assert blank_out(twin, item, [39]).max() < 1e-6
        assert np.nanmax(knockout(twin, item)) < 1e-6


def test_attention_that_hides_its_use_is_flagged_and_its_twin_is_not():
    cases = hidden_use.cases(2)
    flags = {}
    for kind in ("hidden", "open", "unused"):
        model = Model(hidden_use.build(kind), kind)
        of = []
        for prompt, answer, other in cases:
            item = Contrast(prompt, (answer, other))
            (place,) = prompt.positions("secret")
            mass = saliency.measure(model, item)["attention"].values[0, 1].mean(0)
            effect = knockout(model, item)
            base = outcomes(model, [item])[0] if kind != "unused" else 1.0
            of.append(str(red_flags(mass[[place]], effect[[place]] / base)[0]))
        flags[kind] = of
    assert flags == {"hidden": ["understates"] * 2, "open": [""] * 2, "unused": [""] * 2}


def test_flags_need_both_sides():
    mass = np.array([0.009, 0.009, 0.011, 0.31, 0.31, 0.31, 0.29])
    effect = np.array([0.06, 0.04, 0.06, 0.0, 0.0, -0.02, 0.0])
    value = np.array([0.0, 0.0, 0.0, 0.04, 0.06, 0.04, 0.04])
    assert red_flags(mass, effect, value).tolist() == [
        "understates", "", "", "overstates", "", "", ""]
    assert red_flags(mass, effect).tolist()[3] == ""


def test_correlations_are_those_of_scipy():
    draw = np.random.default_rng(0)
    rows, target = draw.random((3, 4, 9)), draw.random(9)
    keep = np.arange(9) > 1
    target[5] = np.nan
    known = keep & np.isfinite(target)
    for method, reference in (("spearman", stats.spearmanr), ("pearson", stats.pearsonr)):
        found = correlations(rows, target, keep, method)
        for i in range(3):
            for j in range(4):
                assert found[i, j] == pytest.approx(
                    float(reference(rows[i, j, known], target[known])[0]))
    rows[0, 0] = 0.5
    assert correlations(rows, target)[0, 0] == 0  # a constant row
    assert np.isnan(correlations(rows, np.ones(9))).all()
    assert np.isnan(correlations(rows, target, np.arange(9) < 2)).all()
    rows[1, 1, 3] = np.nan
    assert np.isnan(correlations(rows, target)[1, 1])


def test_rounding_errors_are_no_ranks():
    """Even attention without a mask rolls out evenly, up to rounding: it says nothing."""
    even = rollout(uniform(torch.ones(6, 11, 11)))[:, 4].numpy()[:, np.arange(11) != 4]
    assert np.ptp(even[-1]) > 0 or np.ptp(even[2]) > 0  # there is rounding error
    assert (correlations(even, np.random.default_rng(0).random(10)) == 0).all()
    # What differs in the eighth digit is still told apart, however small it is.
    small = 1e-12 * (1 + 1e-7 * np.arange(10.0))
    assert correlations(small, np.arange(10.0)) == pytest.approx(1)


def test_reliability_is_that_of_the_whole_map():
    # Signal and noise of one size: halves correlate by 1/2, two halves together by 2/3.
    draw = np.random.default_rng(0)
    signal = draw.standard_normal(20_000)
    first, second = (signal + draw.standard_normal(20_000) for _ in range(2))
    ranks = 2 / 3  # of values; of ranks a little less
    assert reliability(first, second) == pytest.approx(ranks, abs=0.03)
    assert reliability(draw.random(20_000), draw.random(20_000)) < 0.05
    # The signal itself correlates with the whole map by the square root.
    whole = correlations(signal, first + second).item()
    assert explained(whole, reliability(first, second)) == pytest.approx(1, abs=0.03)
    assert np.isnan(explained(0.5, 0.0))


def test_pictures_are_no_words_to_be_blanked(opened):
    model = opened("llama")
    prompt = Prompt.from_tokens(IDS, {"image": (2, 5)})
    found = blank_out(model, Contrast(prompt, (42, 7)), [90])
    assert np.isnan(found[0, 2:5]).all() and np.isfinite(np.delete(found[0], [2, 3, 4])).all()


def test_bad_input_is_named(opened):
    with pytest.raises(PromptError, match="two answers or a partner"):
        Contrast(Prompt(IDS))
    with pytest.raises(OutOfRange, match="query 11 is outside the 11"):
        Contrast(Prompt(IDS), (1, 2), 11)
    with pytest.raises(PromptError, match="give its query"):
        Contrast(Prompt(IDS), (1, 2), None)
    model = opened("llama")
    with pytest.raises(PromptError, match="no neutral token"):
        blank_out(model, Contrast(Prompt(IDS), (1, 2)), [])
    with pytest.raises(PromptError, match="nothing to measure"):
        saliency.measure(model, [])
    with pytest.raises(ValueError, match="'hidden', 'open' or 'unused'"):
        hidden_use.build("other")


def test_a_map_of_layers_and_keys_is_drawn(opened):
    from interp.figures.style import canvas

    model = opened("llama")
    items = [Contrast(Prompt(IDS), (42, 7)), Contrast(Prompt(IDS[:6]), (42, 7))]
    _, ax = canvas()
    saliency.draw(saliency.measure(model, items), ax, prompt=1)
    assert ax.images[0].get_array().shape == (3, 6)
