"""`Model.run`: what comes back, what edits do, and that batching changes nothing."""

import copy
import pickle

import numpy as np
import pytest
import torch

import interp
from interp.core.errors import OutOfRange, PromptError, SegmentNotFound, SiteRefused
from interp.models.model import Model


@pytest.fixture(scope="module")
def llama(tiny):
    return Model(tiny("llama"), "tiny-llama")


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    lengths = (11, 7, 11, 13)
    return [
        interp.Prompt.from_tokens(rng.integers(3, 90, n), segments={"needle": (2, 5)})
        for n in lengths
    ]


def test_batching_changes_nothing(llama, prompts):
    together = llama.run(prompts, read=["resid_post", "pattern"], stats="received", batch_size=4)
    for i, prompt in enumerate(prompts):
        alone = llama.run(prompt, read=["resid_post", "pattern"], stats="received")
        assert torch.allclose(together.logits[i], alone.logits[0], atol=1e-5)
        n = len(prompt)
        for part in ("resid_post",):
            a = together.reads[part].isel(prompt=i, position=slice(n)).values
            assert np.allclose(a, alone.reads[part].values[0], atol=1e-5)
        a = together.reads["pattern"].isel(prompt=i, query=slice(n), key=slice(n)).values
        assert np.allclose(a, alone.reads["pattern"].values[0], atol=1e-6)
        a = together.stats["received"].isel(prompt=i, key=slice(n)).values
        assert np.allclose(a, alone.stats["received"].values[0], atol=1e-6)


def test_shorter_prompts_are_padded_with_nan(llama, prompts):
    run = llama.run(prompts, read="resid_post")
    assert run.reads["resid_post"].shape == (4, 3, 13, 48)
    assert np.isnan(run.reads["resid_post"].isel(prompt=1, position=slice(7, None)).values).all()


def test_statistics_agree_with_the_dense_pattern(llama, prompts):
    run = llama.run(prompts[0], read="pattern",
                    stats=["received", "entropy", "distance", "segments"])
    p = run.reads["pattern"].values[0, :, :, :11, :11]
    n = p.shape[-1]
    seen = np.tril(np.ones((n, n)))
    assert np.allclose(run.stats["received"].values[0], p.sum(-2) / seen.sum(0), atol=1e-6)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(p * np.log(p), -1)
    assert np.allclose(run.stats["entropy"].values[0], entropy, atol=1e-5)
    distance = (p * (np.arange(n)[:, None] - np.arange(n))).sum(-1)
    assert np.allclose(run.stats["distance"].values[0], distance, atol=1e-4)
    mass = run.stats["segments"].sel(segment="needle").values[0]
    assert np.allclose(mass, p[..., 2:5].sum(-1), atol=1e-6)


def test_a_site_is_read_as_it_was_written(llama, prompts):
    value = np.full(48, 0.25, dtype=np.float32)
    run = llama.run(prompts[0], read="resid_post.1",
                    write=interp.patch("resid_post.1", value, positions="needle"))
    read = run.reads["resid_post.1"].values[0, 0]
    assert np.allclose(read[2:5], 0.25)
    untouched = llama.run(prompts[0], read="resid_post.1").reads["resid_post.1"].values[0, 0]
    assert np.allclose(read[[0, 1, 5, 6]], untouched[[0, 1, 5, 6]], atol=1e-6)


def test_patching_every_residual_of_another_run_gives_that_run(llama, prompts):
    a, b = prompts[0], prompts[2]
    source = llama.run(b, read="resid_post.0")
    patched = llama.run(a, write=interp.patch("resid_post.0",
                                              source.reads["resid_post.0"].values[0, 0]))
    assert torch.allclose(patched.logits[0], source.logits[0], atol=1e-5)


@pytest.mark.parametrize("how, check", [
    ("add", lambda x, y: np.allclose(y, x + 2.0, atol=1e-5)),
    ("multiply", lambda x, y: np.allclose(y, x * 2.0, atol=1e-5)),
    ("norm", lambda x, y: np.allclose(np.linalg.norm(y, axis=-1), 2.0, atol=1e-4)),
])
def test_what_each_edit_does(llama, prompts, how, check):
    before = llama.run(prompts[0], read="mlp_out.1").reads["mlp_out.1"].values[0, 0]
    edit = interp.edit("mlp_out.1", how, 2.0, positions=[4])
    after = llama.run(prompts[0], read="mlp_out.1", write=edit).reads["mlp_out.1"].values[0, 0]
    assert check(before[4], after[4])
    assert np.allclose(np.delete(before, 4, 0), np.delete(after, 4, 0), atol=1e-6)


def test_a_direction_is_projected_out(llama, prompts):
    direction = np.random.default_rng(1).standard_normal(48)
    edit = interp.edit("resid_mid.1", "project_out", direction, positions="all")
    read = llama.run(prompts[0], read="resid_mid.1", write=edit).reads["resid_mid.1"].values[0, 0]
    assert np.abs(read @ direction).max() < 1e-4 * np.linalg.norm(read)


def test_single_coordinates_are_replaced(llama, prompts):
    edit = interp.edit("resid_pre.2", "replace", [0.0, 9.0], positions=[1], dims=[5, 40])
    read = llama.run(prompts[0], read="resid_pre.2", write=edit).reads["resid_pre.2"].values[0, 0]
    base = llama.run(prompts[0], read="resid_pre.2").reads["resid_pre.2"].values[0, 0]
    assert read[1, 5] == 0.0 and read[1, 40] == 9.0
    assert np.allclose(np.delete(read[1], [5, 40]), np.delete(base[1], [5, 40]), atol=1e-6)


def test_ablated_heads_write_nothing_and_others_are_untouched(llama, prompts):
    base = llama.run(prompts[0], read="z.1").reads["z.1"].values[0, 0]
    for by, value in (("zero", 0.0), ("mean", 0.5)):
        given = np.full((3, 6, 8), value, dtype=np.float32) if by == "mean" else None
        edit = interp.ablate("L1H4", by=by, value=given)
        z = llama.run(prompts[0], read="z.1", write=edit).reads["z.1"].values[0, 0]
        assert np.allclose(z[:, 4], value)
        assert np.allclose(np.delete(z, 4, 1), np.delete(base, 4, 1), atol=1e-6)


def test_uniform_ablation_spreads_over_visible_keys_only(llama, prompts):
    run = llama.run(prompts[0], read="pattern.1", write=interp.ablate("L1H4", by="uniform"))
    p = run.reads["pattern.1"].values[0, 0, 4]
    n = len(p)
    assert np.allclose(p, np.tril(np.ones((n, n))) / np.arange(1, n + 1)[:, None], atol=1e-6)


def test_phases_reach_the_rows_they_name(llama, prompts):
    prompt = prompts[0]
    base = llama.run(prompt, read="z.0", new_tokens=3).reads["z.0"].values[0, 0]
    n = len(prompt)
    rows = {"all": range(n + 3), "prefill": range(n), "decode": range(n, n + 3),
            "last": [n - 1, n, n + 1, n + 2]}
    for phase, wanted in rows.items():
        run = llama.run(prompt, read="z.0", write=interp.ablate("L0H2", phase=phase), new_tokens=3)
        z = run.reads["z.0"].values[0, 0]
        assert (np.abs(z[:, 2]).sum(-1) == 0).nonzero()[0].tolist() == list(wanted)
        assert np.allclose(z[:n, 0], base[:n, 0], atol=1e-6)


def test_statistics_while_generating_cover_every_row(llama, prompts):
    prompt = prompts[1]
    run = llama.run(prompt, stats=["received", "entropy"], new_tokens=4)
    full = interp.Prompt.from_tokens([*prompt.ids, *run.new_tokens[0]])
    expected = llama.run(full, stats=["received", "entropy"])
    for name in ("received", "entropy"):
        assert np.allclose(run.stats[name].values, expected.stats[name].values, atol=1e-5)


def test_redistribution_moves_mass_in_the_chosen_rows(llama, prompts):
    prompt = prompts[0].with_segments(image=(3, 9))
    edit = interp.redistribute([0], "image", 0.5, min_nonsink_share=None, min_image_mass=None,
                               heads=["L1H3"], queries="last")
    before = llama.run(prompt, read="pattern.1").reads["pattern.1"].values[0, 0]
    after = llama.run(prompt, read="pattern.1", write=edit).reads["pattern.1"].values[0, 0]
    assert np.isclose(after[3, -1, 0], 0.5 * before[3, -1, 0])
    assert np.allclose(after.sum(-1), 1.0, atol=1e-5)
    moved = np.abs(after - before).sum(-1) > 1e-7
    assert moved.sum() == 1 and moved[3, -1]


def bad(call, error, *words):
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value) or isinstance(caught.value, SiteRefused)


def test_bad_input_is_answered_in_one_sentence(llama, prompts):
    p = prompts[0]
    run = llama.run
    bad(lambda: run([]), PromptError, "no prompts")
    bad(lambda: interp.Prompt.from_tokens([]), PromptError, "empty")
    bad(lambda: run(interp.Prompt.from_tokens([96, 97])), OutOfRange, "token id 97", "0 to 96")
    bad(lambda: run(interp.Prompt.from_tokens([3] * 641)), PromptError, "641", "640", "shorten")
    bad(lambda: run(p, write=interp.block("neddle", "last")), SegmentNotFound, "'neddle'",
        "'needle'")
    bad(lambda: run(p, write=interp.ablate("L3H0")), OutOfRange, "L3H0", "0 to 2")
    bad(lambda: run(p, write=interp.ablate("L0H6")), OutOfRange, "L0H6", "0 to 5")
    bad(lambda: run(p, read="resid_post.3"), OutOfRange, "layer 3", "0 to 2")
    bad(lambda: run(p, read="residual"), SiteRefused, "'residual'", "resid_post")
    bad(lambda: run(p, stats="recieved"), ValueError, "'recieved'", "received")
    bad(lambda: run(p, write=interp.block("last", [50])), OutOfRange, "position 50", "11 tokens")
    bad(lambda: run(p, write=interp.patch("resid_post.1", np.zeros(7))), ValueError, "width 7",
        "48")
    bad(lambda: run(interp.Prompt.from_tokens([5, 6]), stats="segments"), SiteRefused, "segments")
    bad(lambda: run(p, write=interp.block([0], [0])), SiteRefused, "position 0", "without any key")


def test_an_image_for_a_text_model_is_refused(llama):
    prompt = interp.Prompt((5, 6, 7), inputs={"pixel_values": np.zeros((1, 3, 8, 8))})
    bad(lambda: llama.run(prompt), PromptError, "text model", "tiny-llama")


def test_nan_that_is_written_is_reported_with_its_layer(llama, prompts):
    edit = interp.patch("resid_post.1", np.full(48, np.nan), positions=[2])
    bad(lambda: llama.run(prompts[0], write=edit), interp.core.NumericalError, "NaN", "layer 1",
        "written value")


def test_a_site_the_architecture_lacks_is_refused_by_name(tiny):
    neox = Model(tiny("gpt_neox"), "tiny-neox")
    with pytest.raises(SiteRefused, match="cannot read 'resid_mid' on tiny-neox in lane 'hf'"):
        neox.run(interp.Prompt.from_tokens([5, 6, 7]), read="resid_mid")


def test_what_was_not_asked_for_says_how_to_ask(llama, prompts):
    run = llama.run(prompts[:2], read="resid_post.1", stats="received", new_tokens=3)
    for held in (run, pickle.loads(pickle.dumps(run)), copy.copy(run)):
        bad(lambda held=held: held.stats["entropy"], KeyError, "pass stats=['entropy'] to model.run",
            "holds 'received'")
        bad(lambda held=held: held.reads["resid_post"], KeyError, "pass read=['resid_post']",
            "'resid_post.1'")
        # A plain mapping otherwise.
        assert held.stats.get("entropy") is None and "entropy" not in held.stats
        assert list(held.reads) == ["resid_post.1"] and isinstance(held.reads, dict)
        assert np.array_equal(held.stats["received"], run.stats["received"], equal_nan=True)
    bad(lambda: interp.Run(()).stats["entropy"], KeyError, "this run holds none")
    assert repr(run) == ("Run(2 prompts; reads['resid_post.1'] 2 prompt x 1 layer x 14 position x 48 "
                         "d_model; stats['received'] 2 prompt x 3 layer x 6 head x 14 key; "
                         "6 new tokens)")


def test_misspelt_names_in_a_run_are_answered_by_the_near_ones(llama, prompts):
    p = prompts[0]
    bad(lambda: llama.run(p, stats="recieved"), ValueError, "Did you mean 'received'?")
    bad(lambda: llama.run(p, read="resid_pots"), SiteRefused, "Did you mean 'resid_post'?")
    bad(lambda: llama.run(p, read="blocks.1.hook_mlp_out"), SiteRefused, "the site is 'mlp_out.1'")
    bad(lambda: llama.run(p, write=interp.block("nedle", "last")), SegmentNotFound,
        "Did you mean 'needle'?")
    bad(lambda: llama.using("brigde"), interp.core.ModelRefused, "Did you mean 'bridge'?")
