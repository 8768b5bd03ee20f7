"""The subgraph's short form against masked runs; means against their definition; planted truth."""

import copy
import functools

import numpy as np
import pytest
import torch

import interp
from interp.causal.context_mean import ContextMeans
from interp.causal.removal import context_mean_states
from interp.core import ModelRefused, Prompt, PromptError
from interp.flow import all_for_one
from interp.flow.all_for_one import SlotTask, Subgraph
from interp.models.model import Model
from interp.organisms import adder_circuit

ARCHITECTURES = ("gpt2", "llama", "gemma2", "gpt_oss")
N = 7


def slots(count, seed=0, first=1):
    """Prompts of a template with three slots; other positions hold one token each."""
    rng = np.random.default_rng(seed)
    ids = np.tile([first, 40, 50, 41, 50, 42, 60], (count, 1))
    for position, base in ((1, 10), (3, 20), (5, 30)):
        ids[:, position] = base + rng.integers(0, 3, count)
    return ids


@pytest.fixture(scope="module")
def opened(tiny):
    @functools.cache
    def made(architecture):
        model = Model(tiny(architecture), f"tiny-{architecture}")
        prompts, pool = slots(5, 1), slots(75)  # Shares that are no round numbers.
        said = model.run([Prompt.from_tokens(row) for row in prompts], logits="last").logits
        answers = np.array([int(row[-1].argmax()) for row in said])
        answers[0] += 1  # One prompt that the model gets wrong.
        task = SlotTask("random", prompts, answers, pool)
        return model, task, Subgraph(model, task)

    return made


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_short_form_equals_the_masked_run(opened, architecture):
    """For every wait and window, with position 0 kept or cut, whatever kind of attention."""
    model, task, graph = opened(architecture)
    for bos in ("keep", "cut"):
        graph = Subgraph(model, task, bos=bos, means=graph.means)
        for wait in (0, 2) if bos == "keep" else (1,):
            windows = [(wait, 0), (wait, 1), (2, 1), (wait, 3 - wait)]
            short = graph.peeking_logits(wait, graph.windows(windows))
            for column, window in enumerate(windows):
                whole = graph.masked_run(wait, window)
                for number, logits in enumerate(short):
                    assert torch.allclose(logits[column], whole[number], atol=1e-5), (wait, window)
    kept, cut = (Subgraph(model, task, bos=bos, means=graph.means).masked_run(1, (1, 0))
                 for bos in ("keep", "cut"))
    assert not torch.allclose(kept, cut, atol=1e-3)


def test_the_masked_run_is_whole_passes_with_blocked_edges(opened):
    """Independently of resuming: states written into the stream, edges blocked by hand."""
    model, task, graph = opened("llama")
    wait, window = 1, (2, 1)
    found = graph.masked_run(wait, window)
    means = graph.means.entering(wait, task.prompts)
    for number, row in enumerate(task.prompts):
        write = [interp.patch(f"resid_pre.{wait}", means[number].numpy())]
        for layer in (1, 2):
            for query in range(1, N):
                hidden = [k for k in range(1, query)]
                if hidden and not (query == N - 1 and layer == 2):
                    write.append(interp.block(query, hidden, layers=[layer]))
        expected = model.run(Prompt.from_tokens(row), write=write).logits[0][-1]
        assert torch.allclose(found[number], expected, atol=1e-5)


def test_means_are_those_of_their_definition(opened):
    """One table for all prompts equals the mean over contexts that keep the own token, one by one."""
    model, task, graph = opened("llama")
    for row in task.prompts[:2]:
        expected = context_mean_states(
            model, Prompt.from_tokens(row), [Prompt.from_tokens(x) for x in task.pool])
        for layer in range(model.n_layers):
            assert np.allclose(graph.means.entering(layer, row[None])[0], expected[layer], atol=1e-5)
    pool = model.run([Prompt.from_tokens(x) for x in task.pool], read="resid_pre").reads["resid_pre"]
    everything = graph.means.entering(2, task.prompts, "mean")
    assert np.allclose(everything[0], pool.values[:, 2].mean(0), atol=1e-5)
    drawn = graph.means.entering(2, task.prompts, "cama_resample", np.random.default_rng(0))
    anyone = graph.means.entering(2, task.prompts, "resample", np.random.default_rng(0))
    for prompt, row in enumerate(task.prompts):
        for t in range(N):
            for states, same in ((drawn, True), (anyone, False)):
                gap = np.abs(pool.values[:, 2, t] - states[prompt, t].numpy()).max(-1)
                match = np.flatnonzero(gap < 1e-5)
                assert len(match)
                if same:
                    assert (task.pool[match, t] == row[t]).all()
    assert float(graph.means.entering(1, task.prompts, "zero").abs().max()) == 0
    ratio = graph.means.norm_ratio().values
    # What enters block 0 depends on nothing but token and position, so its mean is itself.
    assert ratio[0] == pytest.approx(1, abs=1e-5) and (ratio[1:] < 1 - 1e-6).all()


def test_waiting_for_block_0_changes_nothing(opened):
    """Embeddings know their own token and position, and nothing else."""
    model, task, graph = opened("gpt2")
    right, own = graph.waiting(0)
    assert (right == graph.right).all() and graph.right.tolist() == [False, *[True] * 4]
    logits = model.run([Prompt.from_tokens(row) for row in task.prompts], logits="last").logits
    expected = [float(x[-1].log_softmax(-1)[a]) for x, a in zip(logits, task.answers)]
    assert np.allclose(own, expected, atol=1e-4)
    assert not np.allclose(graph.waiting(1)[1], own, atol=1e-3)
    assert not np.allclose(graph.waiting(0, "mean")[1], own, atol=1e-3)


def test_without_reading_is_a_knockout_of_the_last_row(opened):
    model, task, graph = opened("gpt2")
    _, own = graph.without_reading([0, 2])
    cut = interp.block("last", list(range(1, N - 1)), layers=[0, 2])
    for number, row in enumerate(task.prompts):
        logits = model.run(Prompt.from_tokens(row), write=cut).logits[0][-1]
        assert own[number] == pytest.approx(
            float(logits.log_softmax(-1)[task.answers[number]]), abs=1e-4)


def test_heads_that_do_not_peek_see_themselves_and_position_0(opened):
    model, task, graph = opened("llama")
    peeks = torch.ones(1, 3, model.n_heads, dtype=torch.bool)
    peeks[0, 1, [0, 4]] = False
    (found, *_) = graph.peeking_logits(1, peeks)
    everywhere = graph.windows([(1, 2)])
    assert not torch.allclose(found, graph.peeking_logits(1, everywhere)[0], atol=1e-4)
    states = graph.means.entering(1, task.prompts)[0].numpy()
    write = [interp.patch("resid_pre.1", states),
             interp.block("last", list(range(1, N - 1)), heads=["L1H0", "L1H4"])]
    write += [interp.block(query, list(range(1, query)), layers=[1, 2]) for query in range(2, N - 1)]
    expected = model.run(Prompt.from_tokens(task.prompts[0]), write=write).logits[0][-1]
    assert torch.allclose(found[0], expected, atol=1e-5)


def test_the_search_takes_the_longest_wait_and_the_best_of_the_shortest_windows():
    assert all_for_one.longest_wait(np.array([1.0, 1.0, 0.96, 0.3, 1.0])) == 2
    assert all_for_one.longest_wait(np.array([1.0, 1.0])) == 1
    assert all_for_one.longest_wait(np.array([0.3, 1.0])) == 0
    table = np.full((4, 5), 0.1)
    table[1, 2], table[2, 2], table[0, 4] = 0.96, 0.99, 1.0
    assert all_for_one.shortest_window(table) == (2, 2)
    assert all_for_one.shortest_window(np.full((2, 3), 0.9)) is None
    with pytest.raises(PromptError, match="no prompt right"):
        all_for_one.faithfulness(np.ones((2, 3)), np.zeros(3, dtype=bool))


def adder(layers, transfer, relay=False):
    model = Model(adder_circuit.build(layers, transfer, relay), "adder")
    rng = np.random.default_rng(layers)
    numbers, pool = rng.integers(0, 10, (20, 3)), rng.integers(0, 10, (200, 3))
    return model, SlotTask("sum", adder_circuit.prompts(numbers), numbers.sum(1),
                           adder_circuit.prompts(pool))


@pytest.mark.parametrize("layers, transfer", [(4, (3,)), (5, (0, 1)), (6, (2, 3)), (7, (2, 3, 4))])
def test_the_planted_wait_and_window_are_recovered_exactly(layers, transfer):
    model, task = adder(layers, transfer)
    found = all_for_one.measure(model, task, by=("cama", "mean", "zero"))
    assert found["full"].all()
    assert int(found["wait"]) == int(found["first"]) == transfer[0]
    assert int(found["layers"]) == len(transfer)
    shares = found["waiting"].mean("prompt")
    assert (shares.sel(by="cama")[: transfer[0] + 1] == 1).all()
    # One layer later the last token has lost what it read; plain means lose it at once.
    assert (shares.sel(by="cama")[transfer[0] + 1 :] < 0.3).all()
    assert (shares.sel(by=["mean", "zero"]) < 0.3).all()
    assert float(found["prefills"]) < found.manifest["naive_prefills"]
    # Each layer of the window is needed, and of its heads as many as there are numbers to copy.
    graph = Subgraph(model, task)
    inside = all_for_one.ablate_peeking(graph, transfer[0], (transfer[0], len(transfer)))
    assert (inside["without"].mean("prompt") < 0.3).all()
    heads = len(transfer) * 4
    curve = inside["pruned"].mean("prompt").values
    assert (curve[: heads - 2] == 1).all() and (curve[heads - 2 :] < 0.5).all()
    needed = list(zip(inside["pruned_layer"].values, inside["pruned_head"].values))[-3:]
    assert sorted(needed) == sorted(zip((transfer * 3)[:3], range(3)))
    assert graph.without_reading(transfer)[0].mean() < 0.3
    others = [x for x in range(layers) if x not in transfer]
    assert graph.without_reading(others)[0].all()


def test_where_tokens_must_meet_before_the_last_one_reads_there_is_no_such_subgraph():
    """The twin: the numbers are gathered at the third one first."""
    model, task = adder(5, (1, 3), relay=True)
    found = all_for_one.measure(model, task, by=("cama",))
    assert found["full"].all() and int(found["wait"]) == 1
    assert int(found["first"]) == int(found["layers"]) == -1
    assert np.nanmax(found["transfer"].mean("prompt")) < 0.5


def test_bad_input_is_named(opened, tiny):
    model, task, graph = opened("llama")
    other = SlotTask("other", np.where(task.prompts == task.prompts[0, 1], 77, task.prompts),
                     task.answers, task.pool)
    with pytest.raises(PromptError, match="no prompt of the pool has token 77 at position 1"):
        Subgraph(model, other)
    varied = slots(6)
    varied[:, 0] = np.arange(6) + 3
    with pytest.raises(PromptError, match="begin with different tokens"):
        Subgraph(model, SlotTask("varied", varied, np.zeros(6, dtype=int), varied))
    with pytest.raises(PromptError, match="'keep' or 'cut'"):
        Subgraph(model, task, bos="maybe")
    with pytest.raises(PromptError, match="cannot replace by 'noise'"):
        graph.waiting(1, "noise")
    with pytest.raises(interp.UndertowError, match="no window of 3 layers from layer 1"):
        graph.windows([(1, 3)])
    with pytest.raises(PromptError, match="of 7 tokens each"):
        graph.means.at(np.zeros((2, 3), dtype=int))
    with pytest.raises(PromptError, match="pool of contexts is empty"):
        ContextMeans(model, task.pool[:0])
    encoder = Model(tiny("bert"), "tiny-bert")
    with pytest.raises(ModelRefused, match="encoder"):
        Subgraph(encoder, task)


def test_a_model_that_tells_its_blocks_more_than_the_stream_is_refused(tiny):
    """As models with embeddings of their own for every layer do."""
    hf = copy.deepcopy(tiny("llama"))
    layer, ids = hf.model.layers[1], []
    hf.model.register_forward_pre_hook(
        lambda m, args, kwargs: ids.append(kwargs["input_ids"]), with_kwargs=True)

    def more(module, args, kwargs):
        kwargs.setdefault("own_embedding", hf.model.embed_tokens(ids[-1]))
        return args, kwargs

    layer.register_forward_pre_hook(more, with_kwargs=True)

    class Told(type(layer)):
        def forward(self, *args, own_embedding, **kwargs):
            return super().forward(*args, **kwargs) + own_embedding

    layer.__class__ = Told
    task = SlotTask("told", slots(4), np.zeros(4, dtype=int), slots(40))
    with pytest.raises(ModelRefused, match="more about a prompt than its residual stream"):
        Subgraph(Model(hf, "told"), task)
