"""Patching: both engines agree, the direct path is the direct path, and its shortcut is exact."""

import numpy as np
import pytest
import torch

import interp
from interp.causal import patch as patching
from interp.causal.metrics import LogitDifference, TextLoss
from interp.causal.patch import (
    AnswerLogits,
    activation_patching,
    path_attribution,
    path_patching,
)
from interp.core import Prompt, PromptError, SiteRefused
from interp.models import tl_patching
from interp.models.head_gradients import head_gradients
from interp.models.model import Model

COUNT, LENGTH = 4, 7
METRIC = LogitDifference([11, 12, 13, 14], [51, 52, 53, 54])


@pytest.fixture(scope="module")
def model(tiny):
    made = {}
    return lambda name: made.setdefault(name, Model(tiny(name), f"tiny-{name}"))


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(3)
    clean = rng.integers(3, 90, (COUNT, LENGTH))
    corrupt = clean.copy()
    corrupt[:, 2] = (corrupt[:, 2] + 17) % 80 + 3
    return [[Prompt.from_tokens(row) for row in ids] for ids in (clean, corrupt)]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "z", "v"])
def test_transformer_lens_and_our_engine_agree(model, pairs, architecture, site):
    one = model(architecture)
    both = [activation_patching(one, *pairs, METRIC, site, engine=engine)
            for engine in ("transformer_lens", "own")]
    assert [found.manifest["engine"] for found in both] == ["transformer_lens", "own"]
    np.testing.assert_allclose(both[0]["value"], both[1]["value"], atol=2e-4)
    assert both[0]["effect"].dims == both[1]["effect"].dims
    heads = {"z": 6, "v": one.n_kv_heads}.get(site)
    assert both[0]["effect"].shape == (COUNT, 3, heads)[: 2 + (heads is not None)]
    # There is something to agree about.
    assert float(abs(both[0]["effect"]).mean()) > 1e-3


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_positions_one_by_one_agree_and_only_reached_ones_act(model, pairs, architecture):
    one = model(architecture)
    both = [activation_patching(one, *pairs, METRIC, "resid_pre", positions="each", engine=engine)
            for engine in ("auto", "own")]
    assert both[0].manifest["engine"] == "transformer_lens"
    np.testing.assert_allclose(both[0]["value"], both[1]["value"], atol=2e-4)
    first = both[1]["effect"].sel(layer=0)
    assert (abs(first.isel(position=[0, 1, 3, 4, 5, 6])) < 1e-4).all()
    # Patching the one token that differs makes the corrupted prompt of the clean one.
    np.testing.assert_allclose(both[1]["value"].sel(layer=0, position=2), both[1]["corrupt"],
                               atol=2e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "gpt_oss", "gpt_neox"])
def test_the_whole_stream_patched_is_the_other_prompt(model, pairs, architecture):
    found = activation_patching(model(architecture), *pairs, METRIC, "resid_post", engine="own")
    for layer in range(3):
        np.testing.assert_allclose(found["value"].sel(layer=layer), found["corrupt"], atol=2e-3)


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_path_patching_agrees_with_transformer_lens_under_frozen_heads(model, pairs, architecture):
    one = model(architecture)
    ours, theirs = (path_patching(one, *pairs, METRIC, engine=engine)
                    for engine in ("own", "transformer_lens"))
    np.testing.assert_allclose(ours["value"], theirs["value"], atol=2e-4)
    assert theirs.manifest["engine"] == "transformer_lens" and ours.manifest["rows"] == "last"
    total = activation_patching(one, *pairs, METRIC, "z", engine="own")
    # The total effect differs before the last block, where other heads could react, only.
    assert float(abs(total["value"] - ours["value"]).sel(layer=[0, 1]).max()) > 1e-2
    np.testing.assert_allclose(total["value"].sel(layer=2), ours["value"].sel(layer=2), atol=2e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3",
                                          "gpt_oss", "gpt_neox", "opt"])
def test_the_last_row_alone_gives_the_same_as_whole_prompts(
    model, pairs, architecture, monkeypatch
):
    one = model(architecture)
    short = path_patching(one, *pairs, METRIC)
    assert short.manifest["rows"] == "last"
    monkeypatch.setattr(patching, "_last_rows", lambda *_: None)
    whole = path_patching(one, *pairs, METRIC)
    assert whole.manifest["rows"] == "all"
    np.testing.assert_allclose(short["value"], whole["value"], atol=1e-3)
    assert float(abs(whole["effect"]).max()) > 1e-2


def test_only_the_last_position_of_a_head_has_a_direct_path_to_the_last_row(model, pairs):
    found = path_patching(model("llama"), *pairs, METRIC, ["L0H1", "L2H5"], positions="each")
    effect = found["effect"]
    assert effect.dims == ("prompt", "layer", "head", "position")
    for layer, head in ((0, 1), (2, 5)):
        one = effect.sel(layer=layer, head=head)
        assert float(abs(one.isel(position=slice(0, -1))).max()) < 1e-4
        assert float(abs(one.isel(position=-1)).max()) > 1e-3
    assert np.isnan(effect.sel(layer=1)).all() and np.isnan(effect.sel(layer=0, head=0)).all()


def test_a_metric_of_every_row_sees_other_positions(model, pairs):
    metric = TextLoss()
    found = path_patching(model("llama"), *pairs, metric, ["L1H2"], positions="each")
    moved = abs(found["effect"].sel(layer=1, head=2)).max("prompt").values
    # The last row predicts no token of the prompt; rows before the change hold no difference.
    assert moved[-1] < 1e-5 and (moved[:2] < 1e-5).all() and moved[2:-1].max() > 1e-4
    with pytest.raises(SiteRefused, match="shows the last row"):
        path_patching(model("llama"), *pairs, metric, engine="transformer_lens")


def test_what_is_not_there_changes_nothing(model, pairs):
    clean = pairs[0]
    for found in (path_patching(model("llama"), clean, clean, METRIC),
                  activation_patching(model("llama"), clean, clean, METRIC, "q")):
        assert float(abs(found["effect"]).max()) < 1e-4


def test_pictures_are_patched_by_our_engine(model, tiny):
    one, rng = model("llava"), np.random.default_rng(0)
    ids = [5, 6, *[96] * 9, 7, 8, 9]
    made = [Prompt.from_tokens(ids, {"image": (2, 11)}) for _ in range(2)]
    clean, corrupt = ([Prompt(p.ids, p.segments, inputs={
        "pixel_values": rng.standard_normal((1, 3, 24, 24)).astype(np.float32)})] for p in made)
    metric = LogitDifference([11], [51])
    found = activation_patching(one, clean, corrupt, metric, "resid_pre", positions="image")
    assert found.manifest["engine"] == "own"
    assert "one position or all" in found.manifest["not_transformer_lens"]
    whole = activation_patching(one, clean, corrupt, metric, "attn_out")
    assert "tokens only" in whole.manifest["not_transformer_lens"]
    np.testing.assert_allclose(found["value"].sel(layer=0), found["corrupt"], atol=2e-4)
    path = path_patching(one, clean, corrupt, metric)
    assert path.manifest["rows"] == "last" and float(abs(path["effect"]).max()) > 1e-4


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "gpt_oss"])
def test_the_gradient_is_that_of_the_direct_path(model, pairs, architecture):
    one, clean = model(architecture), pairs[0][0]
    found = head_gradients(one, clean, lambda x: x[-1, 11] - x[-1, 51], direct=True).z[:, -1].numpy()
    z = one.run(clean, read="z").reads["z"].values[0]
    step, direction = 0.02, np.random.default_rng(0).standard_normal(one.d_head).astype(np.float32)
    held = interp.patch("z", z, slice(0, LENGTH))
    metric = LogitDifference([11], [51])
    for layer, head in ((0, 1), (1, 4), (2, 3)):
        ends = []
        for sign in (1, -1):
            moved = z[layer].copy()
            moved[-1, head] += sign * step * direction
            ends.append(metric(one, [clean], [held, interp.patch(f"z.{layer}", moved)])[0])
        slope = (ends[0] - ends[1]) / (2 * step)
        assert found[layer, head] @ direction == pytest.approx(slope, rel=0.05, abs=2e-3)


def test_attribution_ranks_heads_as_patching_does_for_small_changes(model, pairs):
    one = model("llama")
    toward, against = [11, 12, 13, 14], [51, 52, 53, 54]
    guess = path_attribution(one, *pairs, toward, against)["estimate"]
    exact = path_patching(one, *pairs, METRIC)["effect"]
    assert guess.dims == exact.dims
    assert np.corrcoef(guess.values.ravel(), exact.values.ravel())[0, 1] > 0.8


def test_logits_of_several_answers_at_once(model, pairs):
    tokens = [[11, 51], [12, 52], [13, 53], [14, 54]]
    both = path_patching(model("llama"), *pairs, AnswerLogits(tokens))
    assert both["effect"].dims == ("prompt", "layer", "head", "outcome")
    single = path_patching(model("llama"), *pairs, METRIC)
    np.testing.assert_allclose(both["value"].isel(outcome=0) - both["value"].isel(outcome=1),
                               single["value"], atol=1e-5)
    logs = AnswerLogits(tokens, log_prob=True)(model("llama"), pairs[0])
    assert (logs < 0).all()


def test_a_model_that_mixes_positions_elsewhere_is_not_cut_to_one_row(model, pairs, tiny):
    """The shortcut is taken only where one row alone gives the logits of the whole prompt."""
    one = model("llama")
    mixing = one.hf.model.layers[1].mlp.register_forward_hook(
        lambda _, args, out: out + 0.5 * out.mean(1, keepdim=True))
    try:
        found = path_patching(one, *pairs, METRIC, ["L0H0"])
    finally:
        mixing.remove()
    assert found.manifest["rows"] == "all"


def test_refusals_are_sentences(model, pairs):
    one, (clean, corrupt) = model("llama"), pairs
    shorter = [Prompt.from_tokens(p.ids[:-1]) for p in corrupt]
    with pytest.raises(PromptError, match="one has 7 tokens, the other 6"):
        path_patching(one, clean, shorter, METRIC)
    with pytest.raises(PromptError, match="4 clean prompts but 3"):
        path_patching(one, clean, corrupt[:3], METRIC)
    with pytest.raises(SiteRefused, match="one at a time"):
        activation_patching(one, clean, corrupt, METRIC, "pattern")
    with pytest.raises(SiteRefused, match="has no heads"):
        activation_patching(one, clean, corrupt, METRIC, "mlp_out", heads=["L0H0"])
    with pytest.raises(SiteRefused, match="another place by 'q'"):
        activation_patching(one, clean, corrupt, METRIC, "q", engine="transformer_lens")
    with pytest.raises(interp.core.OutOfRange, match="L9H0"):
        path_patching(one, clean, corrupt, METRIC, ["L9H0"])
    with pytest.raises(PromptError, match="equally many"):
        AnswerLogits([[1, 2], [3]])
    with pytest.raises(PromptError, match="texts of its own"):
        path_patching(one, clean, corrupt, TextLoss(corrupt))
    mixed = [*clean[:3], Prompt.from_tokens([4, 5, 6])]
    with pytest.raises(PromptError, match="of one length"):
        activation_patching(one, mixed, mixed, METRIC, "resid_pre", positions="each")


def test_no_hook_is_left_behind(model, pairs):
    one = model("gpt2")
    before = one.run(pairs[0], logits="last").logits
    path_patching(one, *pairs, METRIC, engine="transformer_lens")
    path_attribution(one, *pairs, [1] * COUNT, [2] * COUNT)
    after = one.run(pairs[0], logits="last").logits
    assert all(torch.equal(a, b) for a, b in zip(before, after))
    assert not any(point.fwd_hooks for point in one.bridge.hook_dict.values())
    from transformer_lens import patching as theirs

    assert theirs.tqdm.__module__.startswith("tqdm")
    assert tl_patching.EVERY == -1
