"""Ablations do what their names say, in every phase, on every architecture."""

import functools

import numpy as np
import pytest
import torch

import interp
from interp.models.model import Model

DECODERS = ("gpt2", "llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt_oss", "gpt_neox", "opt",
            "llava", "qwen2_5_vl")
HEAD = "L1H2"


@pytest.fixture(scope="module")
def opened(tiny):
    return functools.cache(lambda a, lane="hf": (
        Model(tiny(a), f"tiny-{a}") if lane == "hf" else opened_hf(tiny, a).using(lane)))


def opened_hf(tiny, architecture):
    return Model(tiny(architecture), f"tiny-{architecture}")


def prompt(n=11, seed=0):
    return interp.Prompt.from_tokens(np.random.default_rng(seed).integers(3, 90, n))


def z(run, layer=1):
    return run.reads["z"].sel(layer=layer).values[0]


@pytest.mark.parametrize("architecture", DECODERS)
def test_each_kind_replaces_the_output_of_the_named_head_and_of_no_other(opened, architecture):
    model, one = opened(architecture), prompt()
    read = ("z", "scores", "v")
    base = model.run(one, read=read)
    other = model.run(prompt(seed=1), read="z").reads["z"].values[0]
    mean = other.mean(1)
    made = {
        "zero": interp.ablate(HEAD),
        "mean": interp.ablate(HEAD, "mean", value=mean),
        "resample": interp.ablate(HEAD, "resample", value=other),
        "uniform": interp.ablate(HEAD, "uniform"),
    }
    runs = {by: model.run(one, read=read, write=write) for by, write in made.items()}
    rest = [h for h in range(model.n_heads) if h != 2]
    for run in runs.values():
        assert np.allclose(z(run)[:, rest], z(base)[:, rest], atol=1e-6)
        assert not torch.allclose(run.logits[0], base.logits[0], atol=1e-5)
    assert not z(runs["zero"])[:, 2].any()
    assert np.allclose(z(runs["mean"])[:, 2], mean[1, 2], atol=1e-6)
    assert np.allclose(z(runs["resample"])[:, 2], other[1, :, 2], atol=1e-6)
    # Uniform is no zero: it is the running mean of the values that the head may see.
    group = 2 // (model.n_heads // model.n_kv_heads)
    values = runs["uniform"].reads["v"].sel(layer=1).values[0][:, group]
    seen = np.isfinite(base.reads["scores"].sel(layer=1).values[0][2])
    expected = np.stack([values[row].mean(0) for row in seen])
    assert np.allclose(z(runs["uniform"])[:, 2], expected, atol=1e-5)
    assert np.linalg.norm(expected) > 0.1 * np.linalg.norm(z(base)[:, 2])


@pytest.mark.parametrize("lane", ["hf", "bridge", "nnsight"])
@pytest.mark.parametrize("architecture", DECODERS)
def test_decode_only_leaves_what_the_prefill_wrote_untouched(opened, architecture, lane):
    model, one = opened(architecture, lane), prompt()
    if "z" not in model.sites("write"):
        with pytest.raises(interp.UndertowError, match="'z'"):
            model.run(one, write=interp.ablate(HEAD))
        return
    n, read = len(one), [s for s in ("k", "v", "z") if s in model.sites()]
    base = model.run(one, read=read, new_tokens=2)
    cut = model.run(one, read=read, new_tokens=2, write=interp.ablate(HEAD, phase="decode"))
    for name in read:
        assert np.array_equal(cut.reads[name].values[:, :, :n], base.reads[name].values[:, :, :n])
    assert torch.equal(cut.logits[0][:n], base.logits[0][:n])
    ablated = cut.reads["z"].sel(layer=1).values[0][:, 2]
    assert ablated[:n].any(-1).all() and not ablated[n:].any()
    # With both phases the cache changes behind the head.
    both = model.run(one, read=read, write=interp.ablate(HEAD))
    assert not np.allclose(both.reads["z"].values[0, 2], base.reads["z"].values[0, 2, :n], atol=1e-6)


@pytest.mark.parametrize("architecture", DECODERS)
def test_the_last_prompt_token_can_be_the_first_decoding_step(opened, architecture):
    model, one = opened(architecture), prompt()
    base = model.run(one, new_tokens=3)
    held = model.run(one, new_tokens=3, decode_last=True)
    assert held.new_tokens == base.new_tokens
    assert torch.allclose(held.logits[0], base.logits[0], atol=1e-4)
    write = interp.ablate([f"L{layer}H{head}" for layer in range(3) for head in range(model.n_heads)],
                          phase="decode")
    n = len(one)
    late, early = (model.run(one, write=write, new_tokens=1, decode_last=x).logits[0][n - 1]
                   for x in (False, True))
    assert torch.allclose(late, base.logits[0][n - 1], atol=1e-5)
    assert not torch.allclose(early, late, atol=1e-3)
    last = model.run(one, write=write, decode_last=True, logits="last").logits[0]
    assert last.shape[0] == 1 and torch.allclose(last[0], early, atol=1e-4)


@pytest.mark.parametrize("architecture", DECODERS)
def test_exactly_the_named_heads_are_ablated_in_every_row(opened, architecture):
    """Counted: a released script's ablation never reached the heads of three of its models."""
    model, one = opened(architecture), prompt()
    named = ["L0H1", "L1H0", "L1H3", "L2H2"]
    run = model.run(one, read="z", new_tokens=2, write=interp.ablate(named))
    fired = {str(interp.Head(int(a), int(b))): int((~run.reads["z"].values[0][a, :, b].any(-1)).sum())
             for a in range(3) for b in range(model.n_heads)}
    assert {head for head, rows in fired.items() if rows} == set(named)
    assert {fired[head] for head in named} == {len(one) + 2}


@pytest.mark.parametrize("architecture", DECODERS)
def test_an_edit_that_changes_nothing_changes_nothing(opened, architecture):
    model, one = opened(architecture), prompt()
    base = model.run(one, read="z")
    own = base.reads["z"].values[0]
    for write in (interp.scale(HEAD, 1.0), interp.ablate(HEAD, "resample", value=own)):
        assert torch.allclose(model.run(one, write=write).logits[0], base.logits[0], atol=1e-5)


@pytest.mark.parametrize("lane", ["hf", "bridge", "nnsight"])
def test_rows_of_the_prompt_can_be_written_while_generating(opened, lane):
    model, one = opened("llama", lane), prompt()
    even = np.tril(np.ones((11, 11))) / np.arange(1, 12)[:, None]
    write = interp.patch("pattern.1", np.broadcast_to(even, (6, 11, 11)), phase="prefill")
    run = model.run(one, read="pattern.1", write=write, new_tokens=2)
    found = run.reads["pattern.1"].values[0, 0]
    assert np.allclose(found[:, :11, :11], even, atol=1e-6)
    assert not np.allclose(found[:, 11, :12], 1 / 12, atol=1e-3)


def test_every_prompt_can_have_interventions_of_its_own(opened):
    model, one = opened("llama"), prompt()
    writes = [interp.ablate("L0H1"), [], [interp.ablate("L1H0"), interp.block("last", [0])]]
    together = model.run([one] * 3, write=interp.each(writes)).logits
    for write, found in zip(writes, together):
        assert torch.allclose(model.run(one, write=write).logits[0], found, atol=1e-5)
    with pytest.raises(ValueError, match="3 prompts, but 2 are run"):
        model.run([one] * 2, write=interp.each(writes))


@pytest.mark.parametrize("lane", ["hf", "bridge", "nnsight"])
def test_tokens_that_are_fed_one_by_one_are_read_as_in_one_pass(opened, lane):
    model, long = opened("qwen3", lane), prompt(15)
    short = interp.Prompt.from_tokens(long.ids[:11])
    rows = model.run([short, short], new_tokens=[long.ids[11:], [5, 6, 7, 8]]).logits
    assert torch.allclose(rows[0], model.run(long).logits[0], atol=1e-4)
    assert not torch.allclose(rows[1][12:], rows[0][12:], atol=1e-2)
    with pytest.raises(ValueError, match="equally many"):
        model.run([short, short], new_tokens=[[1, 2], [3]])
    with pytest.raises(interp.UndertowError, match="new token 97 is not in the vocabulary"):
        model.run(short, new_tokens=[[97]])
    with pytest.raises(ValueError, match="for 1 prompts, but 2"):
        model.run([short, short], new_tokens=[[9]])


def test_generation_is_greedy_edited_and_stops_at_the_end_of_the_text(opened):
    model, one = opened("llama"), prompt()
    run = model.run(one, new_tokens=6)
    assert model.generate(one, 6) == run.new_tokens
    assert model.generate(one, 6, write=interp.ablate(["L0H0", "L0H1", "L1H3"])) == model.run(
        one, new_tokens=6, write=interp.ablate(["L0H0", "L0H1", "L1H3"])).new_tokens
    third = run.new_tokens[0][2]
    before = model.hf.generation_config.eos_token_id
    try:
        model.hf.generation_config.eos_token_id = [third]
        expected = run.new_tokens[0][: run.new_tokens[0].index(third)]
        assert model.generate(one, 6) == [expected]
    finally:
        model.hf.generation_config.eos_token_id = before


@pytest.mark.parametrize("make, words", [
    (lambda: interp.ablate(HEAD, "mean"), "needs value"),
    (lambda: interp.ablate(HEAD, "resample"), "another prompt"),
    (lambda: interp.ablate(HEAD, value=np.zeros((3, 6, 4))), "takes no value"),
    (lambda: interp.ablate(HEAD, "noise"), "choose one of: zero, mean, uniform, resample"),
    (lambda: interp.ablate([]), "no heads"),
    (lambda: interp.ablate(HEAD, phase="later"), "phase 'later'"),
])
def test_an_ablation_that_cannot_be_made_is_one_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_heads_and_values_that_do_not_fit_the_model_are_named(opened):
    model, one = opened("llama"), prompt()
    with pytest.raises(interp.UndertowError, match="L7H0 does not exist: the model has layers 0 to 2"):
        model.run(one, write=interp.ablate("L7H0"))
    wrong = np.zeros((3, 5, 6, 4))
    with pytest.raises(ValueError, match=r"by resample needs a value of shape \(3, 11, "):
        model.run(one, write=interp.ablate(HEAD, "resample", value=wrong))
    own = model.run(one, read="z").reads["z"].values[0]
    with pytest.raises(ValueError, match="no value for generated tokens"):
        model.run(one, new_tokens=2, write=interp.ablate(HEAD, "resample", value=own))
    kept = model.run(one, new_tokens=2, write=interp.ablate(HEAD, "resample", "prefill", value=own))
    assert kept.new_tokens == model.run(one, new_tokens=2).new_tokens
