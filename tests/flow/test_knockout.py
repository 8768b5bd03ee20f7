"""Knockout by resuming equals whole passes with blocked edges; a planted route is found."""

import copy
import functools

import numpy as np
import pytest
import torch

import interp
from interp.core import OutOfRange, Prompt, PromptError
from interp.flow import knockout
from interp.models.model import Model

N = 14


@pytest.fixture(scope="module")
def opened(tiny):
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def prompts(count=2):
    rng = np.random.default_rng(0)
    return [Prompt.from_tokens(rng.integers(3, 90, N), {"early": (1, 5), "tail": (10, N)})
            for _ in range(count)]


@pytest.mark.parametrize("queries", ["last", "tail"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_every_cell_is_a_whole_pass_with_blocked_edges(opened, architecture, queries):
    model, given = opened(architecture), prompts()
    where = {"early": "early", "late": [7, 9], "first": [0]}
    found = knockout.measure(model, given, where, queries=queries, width=2, min_probability=0)
    assert found["effective_width"].values.tolist() == [1, 2, 2]
    for number, prompt in enumerate(given):
        base = model.run(prompt).logits[0][-1].softmax(-1)
        answer = int(base.argmax())
        assert int(found["answer"][number]) == answer
        for name, keys in where.items():
            for layer in range(3):
                span = list(knockout.window(layer, 2, 3))
                cut = interp.block(queries, keys, layers=span)
                p = float(model.run(prompt, write=cut).logits[0][-1].softmax(-1)[answer])
                one = found.data.sel(segment=name, layer=layer).isel(prompt=number)
                assert float(one["p"]) == pytest.approx(p, abs=1e-6)
                change = 100 * (p / float(base[answer]) - 1)
                assert float(one["relative"]) == pytest.approx(change, abs=2e-2)


def test_zeroed_weights_are_not_renormalized(opened):
    model, (given, _) = opened("llama"), prompts()
    found = knockout.measure(model, given, [3, 4], width=1, layers=[1], renormalize=False,
                             min_probability=0)
    pattern = model.run(given, read="pattern.1").reads["pattern.1"].values[0, 0]
    pattern[:, -1, [3, 4]] = 0
    write = interp.patch("pattern.1", pattern)
    answer = int(found["answer"][0])
    expected = float(model.run(given, write=write).logits[0][-1].softmax(-1)[answer])
    assert found["p"].item() == pytest.approx(expected, abs=1e-6)
    cut = knockout.measure(model, given, [3, 4], width=1, layers=[1], min_probability=0)
    assert abs(cut["p"].item() - found["p"].item()) > 1e-7


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_oss"])
def test_one_layer_follows_from_its_own_weights_and_values(opened, architecture):
    """Both variants of a knockout in one layer, without running it (E7)."""
    model, given = opened(architecture), prompts(1)[0]
    base, last, keys, layer = model.resumable(given), torch.tensor([[N - 1]]), [0, 3, 8], 1
    seen, plain = {}, {"v": [], "z": []}
    base.replay(layer, last, context=torch.arange(N - 1), until=layer + 1, watch=seen.__setitem__)
    base.replay(layer, torch.arange(N)[None], until=layer + 1, into=plain)
    weights, values = seen[layer][0, :, 0], plain["v"][0][0].transpose(0, 1)
    values = values.repeat_interleave(len(weights) // len(values), 0)
    assert torch.allclose(torch.einsum("hk,hkd->hd", weights, values), plain["z"][0][0, -1], atol=1e-5)
    cut = torch.zeros(1, 1, 1, N, dtype=torch.bool)
    cut[..., keys] = True
    for found, edit in zip(knockout.single_layer(weights, values, keys), ("blocked", "zeroed")):
        held = {"z": []}
        base.replay(layer, last, context=torch.arange(N - 1), until=layer + 1, into=held,
                    **{edit: lambda _: cut})
        assert torch.allclose(found, held["z"][0][0, 0], atol=1e-5)
    nothing, _ = knockout.single_layer(weights, values, range(N))
    assert architecture == "gpt_oss" or nothing.isnan().all()


def test_a_planted_route_is_found_in_its_layer_and_random_keys_are_not(tiny):
    """Only block 1 lets attention write, and its weight is large: other blocks carry nothing."""
    hf = copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for number in (0, 2):
            hf.model.layers[number].self_attn.o_proj.weight.zero_()
        hf.model.layers[1].self_attn.o_proj.weight *= 5
    model, given = Model(hf, "planted"), prompts(6)
    found = knockout.measure(model, given, {"all": list(range(1, N - 1))}, width=1, min_probability=0)
    size = np.abs(found["relative"]).mean("prompt").values[0]
    assert size[0] < 1e-3 and size[2] < 1e-3 and size[1] > 1
    drawn = {knockout.random_keys(given[0], [2, 3], seed=s) for s in range(20)}
    assert len(drawn) > 10 and not any({2, 3, N - 1} & set(one) for one in drawn)


def test_windows_are_those_of_the_released_code():
    assert list(knockout.window(10, 9, 48)) == list(range(6, 15))
    assert list(knockout.window(10, 10, 48)) == list(range(5, 15))
    assert list(knockout.window(47, 9, 48)) == list(range(43, 48))
    with pytest.raises(OutOfRange, match="around layer 48"):
        knockout.window(48, 9, 48)


def test_the_cost_for_the_last_row_is_a_few_prefills(opened):
    model = opened("llama")
    ids = np.random.default_rng(1).integers(3, 90, 100)
    found = knockout.measure(model, Prompt.from_tokens(ids), {str(i): [i] for i in range(20)},
                             width=1, min_probability=0)
    # One row per set and window, from the window's layer on.
    assert float(found["prefills"]) == pytest.approx(1 + 20 * (3 + 2 + 1) / (100 * 3))
    assert found.manifest["naive_prefills"] == 60


def test_improbable_answers_have_no_relative_change_and_bad_input_is_named(opened):
    model, given = opened("llama"), prompts()
    found = knockout.measure(model, given, [0], answers=[4, 5], min_probability=0.9)
    assert found["relative"].isnull().all() and found.manifest["too_improbable"] == 2
    assert np.isfinite(found["log_ratio"]).all()
    with pytest.raises(PromptError, match="1 answers for 2 prompts"):
        knockout.measure(model, given, [0], answers=[4])
    with pytest.raises(interp.UndertowError, match="no segment 'image'"):
        knockout.measure(model, given, "image")
    with pytest.raises(OutOfRange, match="12 random positions are needed, but only 1"):
        knockout.random_keys(given[0], list(range(12)), seed=0)


def test_the_figure_is_drawn_from_the_result_alone(opened):
    from interp.figures.style import canvas

    _, ax = canvas()
    knockout.draw(knockout.measure(opened("llama"), prompts(), "early", min_probability=0), ax)
    assert "9 layers" in ax.get_xlabel() and "%" in ax.get_ylabel()
