"""A sweep says what one whole pass per cell says, at the cost that its plan says."""

import functools

import numpy as np
import pytest
import torch

import interp
from interp.causal import memory
from interp.causal.cell_makers import every_edge, every_head, every_state, every_token
from interp.causal.grid import Sweep
from interp.causal.metrics import AnswerLogProb, LogitDifference, TextLoss
from interp.causal.patch import AnswerLogits
from interp.causal.removal import Removal
from interp.core import Prompt, PromptError, SiteRefused
from interp.core.errors import NotEnoughMemory
from interp.models.model import Model
from interp.models.variants import Variants

LENGTHS = (9, 11)


@pytest.fixture(scope="module")
def opened(tiny):
    @functools.cache
    def made(architecture):
        draw = np.random.default_rng(3)
        prompts = [Prompt.from_tokens(draw.integers(3, 90, n), {"image": (2, 5)}) for n in LENGTHS]
        return Model(tiny(architecture), f"tiny-{architecture}"), prompts

    return made


METRIC = LogitDifference([5, 6], [7, 8])


def whole(model, prompts, write, metric=METRIC):
    return metric(model, prompts, write)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss"])
def test_every_head_of_prompts_of_several_lengths(opened, architecture):
    model, prompts = opened(architecture)
    found = Sweep(model, prompts, every_head(), METRIC).run()
    assert found["value"].dims == ("layer", "head", "prompt")
    assert found["value"].shape == (model.n_layers, model.n_heads, 2)
    assert np.allclose(found["plain"], whole(model, prompts, ()), atol=1e-4)
    for layer, head in ((0, 0), (1, 4), (2, 5)):
        expected = whole(model, prompts, interp.ablate((layer, head)))
        assert np.allclose(found["value"].sel(layer=layer, head=head), expected, atol=1e-4)
    assert np.allclose(found["effect"], found["value"] - found["plain"])
    assert (np.abs(found["effect"]) > 1e-3).mean() > 0.9


def test_heads_by_the_mean_a_value_and_in_the_last_row_only(opened):
    model, prompts = opened("llama")
    from interp.causal.ablate import mean_output

    mean = mean_output(model, prompts)
    by_mean = Sweep(model, prompts, every_head("mean", layers=[1]), METRIC).run()["value"]
    given = Sweep(model, prompts, every_head(mean, heads=["L1H3"]), METRIC).run()["value"]
    assert by_mean.shape == (1, model.n_heads, 2) and given.shape == (1, 1, 2)
    expected = whole(model, prompts, interp.ablate("L1H3", "mean", value=mean))
    assert np.allclose(by_mean.sel(head=3), expected, atol=1e-5) and np.allclose(given, expected)
    last = Sweep(model, prompts, every_head(phase="last"), METRIC).run()["value"]
    assert np.allclose(last.sel(layer=1, head=2),
                       whole(model, prompts, interp.ablate("L1H2", phase="last")), atol=1e-5)


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "mlp_out", "z", "v"])
def test_every_state_from_another_prompt(opened, site):
    model, prompts = opened("llama")
    other = [Prompt.from_tokens(np.random.default_rng(9).integers(3, 90, n)) for n in LENGTHS]
    found = Sweep(model, prompts, every_state(site, other), METRIC).run()["value"]
    headed = ("head",) if site in "zv" else ()
    assert found.dims == ("layer", *headed, "position", "prompt")
    # The shorter prompt has no cells at the longer one's last positions.
    assert np.isnan(found.sel(position=[9, 10], prompt=0)).all()
    assert np.isfinite(found.sel(prompt=1)).all()
    reads = [model.run(p, read=site).reads[site].values[0] for p in (prompts[1], other[1])]
    for layer, at in ((0, 3), (1, 8), (2, 10)):
        value = reads[1][layer, at]
        if headed:
            value, value[1] = reads[0][layer, at].copy(), reads[1][layer, at, 1]
        write = interp.each([(), interp.patch(f"{site}.{layer}", value[None], [at])])
        here = found.sel(layer=layer, position=at, prompt=1)
        here = here.sel(head=1) if headed else here
        assert float(here) == pytest.approx(whole(model, prompts, write)[1], abs=1e-4)


def test_every_edge_and_every_token(opened):
    model, prompts = opened("llama")
    found = Sweep(model, prompts, every_edge(window=2), METRIC).run()["value"]
    assert found.dims == ("layer", "key", "prompt") and found.sizes["key"] == LENGTHS[1] - 1
    expected = whole(model, prompts, interp.block("last", [4], layers=[1, 2]))
    assert np.allclose(found.sel(layer=1, key=4), expected, atol=1e-5)
    assert np.allclose(found.sel(layer=2, key=4),
                       whole(model, prompts, interp.block("last", [4], layers=[2])), atol=1e-5)
    one = Sweep(model, prompts, every_edge(keys="image", heads="each"), METRIC).run()["value"]
    assert one.dims == ("layer", "head", "prompt")
    assert np.allclose(one.sel(layer=0, head=3),
                       whole(model, prompts, interp.block("last", "image", heads="L0H3")), atol=1e-5)

    for how in ("drop_keep_ids", "drop_compact_ids"):
        tokens = Sweep(model, prompts, every_token("image", how=how), METRIC).run()["value"]
        assert tokens.dims == ("layer", "position", "prompt")
        assert tokens["position"].values.tolist() == [2, 3, 4]
        rows = Removal(model, prompts[1], "image", how).logits(1, [(2, 4)])
        assert float(tokens.sel(layer=1, position=3, prompt=1)) == pytest.approx(
            float(rows[0, 6] - rows[0, 8]), abs=1e-4)


def test_a_picture(tiny):
    hf = tiny("llava")
    model = Model(hf, "tiny-llava")
    vision = hf.config.vision_config
    count = (vision.image_size // vision.patch_size) ** 2
    prompt = Prompt.from_tokens([5, 6, *[hf.config.image_token_id] * count, 7, 8, 9],
                                {"image": (2, 2 + count)})
    object.__setattr__(prompt, "inputs", {"pixel_values": np.random.default_rng(0).random(
        (1, 3, vision.image_size, vision.image_size), dtype=np.float32)})
    metric = AnswerLogits([[4, 5, 6]], log_prob=True)
    found = Sweep(model, [prompt], every_head(layers=[1]), metric).run()["value"]
    assert found.dims == ("layer", "head", "prompt", "outcome")
    assert np.allclose(found.sel(layer=1, head=2), metric(model, [prompt], interp.ablate("L1H2")),
                       atol=1e-4)
    tokens = Sweep(model, [prompt], every_token(layers=[1, 2]), AnswerLogProb([[4]])).run()["value"]
    cut = interp.block(range(4, len(prompt)), [3], layers=[1, 2])
    assert np.allclose(tokens.sel(layer=1, position=3),
                       AnswerLogProb([[4]])(model, [prompt], cut), atol=1e-4)


def test_the_plan_says_what_the_run_costs_and_what_is_used(opened):
    model, prompts = opened("llama")
    for cells in (every_head(), every_edge(), every_head(phase="last"),
                  every_state("resid_pre", prompts)):
        sweep = Sweep(model, prompts, cells, METRIC)
        plan = sweep.plan()
        sweep.run()
        assert plan.token_layers == pytest.approx(sweep.spent)
        assert plan.floor <= plan.token_layers < plan.naive / 2
        assert plan.values == plan.cells * 2 - {"every_edge": 6, "every_state": 6}.get(
            cells.about()["cells"], 0)
        said = str(plan)
        assert f"{plan.cells:,} cells x 2 prompts" in said and "MiB" in said
        assert "last row" in said and "not used" not in said
    assert 0 < plan.memory < plan.available


def test_models_that_cannot_be_resumed_are_right_and_the_plan_says_why(tiny, opened):
    hf = tiny("llama")
    model, prompts = Model(hf, "stacked"), opened("llama")[1]
    handle = hf.model.layers[2].register_forward_pre_hook(
        lambda m, args, kwargs: ((args[0] + 0.1, *args[1:]), kwargs), with_kwargs=True)
    try:
        sweep = Sweep(model, prompts, every_head(layers=[1]), METRIC)
        assert "adds something between blocks 1 and 2" in str(sweep.plan())
        found = sweep.run()
        expected = whole(model, prompts, interp.ablate("L1H3"))
        assert np.allclose(found["value"].sel(layer=1, head=3), expected, atol=1e-5)
        assert "between blocks" in found.manifest["not_resumed"]
        tokens = Sweep(model, prompts, every_token("image", [1]), METRIC).run()["value"]
        cut = [interp.block([*range(3), *range(4, n)], [3], layers=[1, 2]) for n in LENGTHS]
        assert np.allclose(tokens.sel(layer=1, position=3),
                           whole(model, prompts, interp.each(cut)), atol=1e-5)
    finally:
        handle.remove()

    bert = Model(tiny("bert"), "tiny-bert")
    sweep = Sweep(bert, prompts, every_head(layers=[1]), METRIC)
    assert "is an encoder" in str(sweep.plan()) and sweep.plan().token_layers == sweep.plan().naive
    assert np.allclose(sweep.run()["value"].sel(layer=1, head=3),
                       whole(bert, prompts, interp.ablate("L1H3")), atol=1e-5)


def test_edits_of_whole_rows_and_metrics_of_all_rows_run_whole_passes(opened):
    model, prompts = opened("llama")
    sweep = Sweep(model, prompts, every_head("uniform", layers=[1]), METRIC)
    assert "whole rows of attention" in str(sweep.plan()) and sweep.plan().forwards >= 12
    assert np.allclose(sweep.run()["value"].sel(layer=1, head=3),
                       whole(model, prompts, interp.ablate("L1H3", "uniform")), atol=1e-5)
    sweep = Sweep(model, prompts, every_head(layers=[1], heads=["L1H3", "L2H0"]), TextLoss())
    assert "more than the last row" in str(sweep.plan())
    found = sweep.run()["value"]
    assert found.shape == (1, 1, 2)
    assert np.allclose(found[0, 0], TextLoss()(model, prompts, interp.ablate("L1H3")), atol=1e-5)


class Entropy:
    """A metric as a user writes it: the members of the protocol, no more."""

    name, unit, dim, shared = "entropy", "nats", "prompt", "entropy"

    def passes(self, model, prompts, write):
        return model.run(prompts, write=write).logits

    def values(self, outcome):
        return np.array([float(torch.distributions.Categorical(logits=x[-1]).entropy())
                         for x in outcome])


def test_a_metric_of_the_users_own_needs_only_what_the_protocol_names(opened):
    model, prompts = opened("llama")
    found = Sweep(model, prompts, every_head(layers=[1]), Entropy()).run()["value"]
    logits = model.run(prompts, write=interp.ablate("L1H2")).logits
    expected = [float(-(x[-1].softmax(-1) * x[-1].log_softmax(-1)).sum()) for x in logits]
    assert np.allclose(found.sel(layer=1, head=2), expected, atol=1e-5)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"),
                                   RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_batches_are_halved_where_memory_runs_out(opened, hooks, monkeypatch, error):
    model, prompts = opened("llama")
    hooked = hooks(model.hf)
    expected = Sweep(model, prompts, every_head(), METRIC).run()["value"]
    sizes, real = [], Variants.run

    def small(self, courses):
        sizes.append(len(courses))
        if len(courses) > 4:
            raise error
        return real(self, courses)

    monkeypatch.setattr(Variants, "run", small)
    found = Sweep(model, prompts, every_head(), METRIC).run()["value"]
    assert np.allclose(found, expected, atol=1e-5)
    # It is tried once; after that no pass is larger than what fitted.
    first = next(i for i, size in enumerate(sizes) if size <= 4)
    assert sizes[:first] == [18, 9] and max(sizes[first:3]) <= 4
    assert sum(size for size in sizes if size <= 4) == 36

    def never(self, courses):
        raise error

    monkeypatch.setattr(Variants, "run", never)
    with pytest.raises(NotEnoughMemory, match="a single cell of a prompt of 9 tokens"):
        Sweep(model, prompts, every_head(), METRIC).run()
    assert hooks(model.hf) == hooked

    def other(self, courses):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Variants, "run", other)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        Sweep(model, prompts, every_head(), METRIC).run()


def test_little_memory_makes_small_batches(opened, monkeypatch):
    model, prompts = opened("llama")
    full = Sweep(model, prompts, every_head(), METRIC).plan()
    monkeypatch.setattr(memory, "available", lambda device: 20 * 9 * memory.per_row(model))
    small = Sweep(model, prompts, every_head(), METRIC).plan()
    assert full.batch == 18 and 1 <= small.batch < 18 and small.resumed > full.resumed
    assert Sweep(model, prompts, every_head(), METRIC, batch_size=5).plan().batch == 5


def test_finished_cells_are_kept_and_not_computed_again(opened, monkeypatch, tmp_path):
    model, prompts = opened("llama")
    expected = Sweep(model, prompts, every_head(), METRIC).run()["value"]
    done, real = [], Variants.run

    def counted(self, courses):
        if sum(done) >= 20:
            raise KeyboardInterrupt
        done.append(len(courses))
        return real(self, courses)

    monkeypatch.setattr(Variants, "run", counted)
    sweep = Sweep(model, prompts, every_head(), METRIC, folder=tmp_path, batch_size=4)
    with pytest.raises(KeyboardInterrupt):
        sweep.run()
    finished = sum(done)
    done.clear()
    monkeypatch.setattr(Variants, "run", lambda self, courses: (
        done.append(len(courses)), real(self, courses))[1])
    found = Sweep(model, prompts, every_head(), METRIC, folder=tmp_path, batch_size=4).run()
    assert np.allclose(found["value"], expected, atol=1e-5)
    assert 20 <= finished < 36 and sum(done) == 36 - finished
    done.clear()
    Sweep(model, prompts, every_head(), METRIC, folder=tmp_path).run()
    assert not done
    other = LogitDifference([9, 9], [7, 8])
    Sweep(model, prompts, every_head(layers=[1]), other, folder=tmp_path).run()
    assert sum(done) == 12


def test_what_is_asked_for_wrongly_is_said(opened):
    model, prompts = opened("llama")
    with pytest.raises(PromptError, match="give at least one"):
        Sweep(model, [], every_head(), METRIC)
    with pytest.raises(PromptError, match="texts of its own"):
        Sweep(model, prompts, every_head(), TextLoss(prompts))
    with pytest.raises(PromptError, match="cannot ablate every head by 'noise'"):
        every_head("noise")
    with pytest.raises(SiteRefused, match="cannot patch every state of 'pattern'"):
        every_state("pattern", prompts)
    with pytest.raises(PromptError, match="cannot remove by 'forget'"):
        Sweep(model, prompts, every_token(how="forget"), METRIC)
    with pytest.raises(PromptError):
        Sweep(model, prompts, every_state("resid_pre", prompts[::-1]), METRIC).run()
