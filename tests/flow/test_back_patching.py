"""Back-patching against whole runs, and on a model whose repairs are known."""

import numpy as np
import pytest
import torch

from interp.core import OutOfRange, Prompt, PromptError, patch
from interp.flow import back_patching
from interp.models.model import Model
from interp.organisms import hop_circuit
from interp.organisms.hop_circuit import LAYERS, Hops


def questions(count=None):
    made = [hop_circuit.two_hops(p, f, s) for p in hop_circuit.PEOPLE for f in hop_circuit.FIRST
            for s in hop_circuit.SECOND]
    return made[:: max(1, len(made) // count)][:count] if count else made


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("position", [3, 7])
def test_a_replayed_patch_is_a_whole_run_with_it(tiny, architecture, position):
    model = Model(tiny(architecture), architecture)
    prompt = Prompt.from_tokens([1, 9, 30, 5, 71, 12, 8, 44])
    base = model.resumable(prompt)
    states = back_patching.block_outputs(base, position)
    read = model.run(prompt, read="resid_post").reads["resid_post"].values[0, :, position]
    assert np.allclose(states, read, atol=1e-3 * np.abs(read).max())
    for target in range(2):
        found = back_patching.patched_logits(base, position, states, target)
        for source in range(3):
            whole = model.run(prompt, write=patch(
                f"resid_post.{target}", states[source][None], positions=position)).logits[0][-1]
            assert torch.allclose(found[source], whole, atol=1e-3)
        assert torch.allclose(found[target], base.logits[-1].float(), atol=1e-3)
        assert not torch.allclose(found[2], base.logits[-1].float(), atol=1e-3)


def test_patches_at_the_last_position_cost_a_part_of_a_pass(tiny):
    model = Model(tiny("llama"), "llama")
    base = model.resumable(Prompt.from_tokens(range(3, 43)))
    back_patching.grid(base, 39, 5)
    # All sources of a target, one row each: L * (1 + .. + L - 1) token-layers, and one more.
    assert base.spent == 3 * (1 + 2) + 1 < base.prefill / 10


def test_both_hops_are_in_the_model_and_only_the_late_table_answers():
    for hops in (Hops(), Hops(resolve=4, move=6, table=2), Hops(table=6), Hops(table=5)):
        model = Model(hop_circuit.build(hops), "hops", hop_circuit.words())
        single = [hop_circuit.one_hop(*fact) for fact in (*hop_circuit.FACTS, *hop_circuit.TABLE)]
        double = questions(8)
        for some, wanted in ((single, True), (double, hops.answers)):
            run = model.run([prompt for prompt, _ in some], logits="last")
            right = [int(rows[-1].argmax()) == answer for rows, (_, answer) in zip(run.logits, some)]
            assert set(right) == {wanted}
    assert Hops(table=5).answers and not Hops().answers


@pytest.mark.parametrize("hops", [Hops(), Hops(resolve=4, move=6, table=2),
                                  Hops(resolve=1, move=6, table=4)])
def test_exactly_the_known_pairs_repair_it(hops):
    model = Model(hop_circuit.build(hops), "hops", hop_circuit.words())
    made = questions(4)
    found = back_patching.measure(model, [p for p, _ in made], [a for _, a in made], donors=2)
    assert not found["right"].any()
    pairs = back_patching.backward(LAYERS)
    for where in ("entity", "last"):
        for hit in found["hit"].sel(position=where).values:
            assert {tuple(map(int, pair)) for pair in np.argwhere(hit & pairs)} == \
                hops.repairs(where)
            assert not back_patching.repaired(hit, "forward")
    # Another prompt's states hold another bridge, or the same one by chance: never more repairs.
    own = back_patching.repaired(found["hit"].values)
    other = back_patching.repaired(found["donor_hit"].values)
    assert own.all() and other.mean() < own.mean()
    source, target = back_patching.mass_center(found["hit"].values)
    assert source > target


def test_a_model_that_answers_keeps_answering():
    hops = Hops(table=6)
    model = Model(hop_circuit.build(hops), "hops", hop_circuit.words())
    made = questions(3)
    found = back_patching.measure(model, [p for p, _ in made], [a for _, a in made], donors=1)
    assert found["right"].all()
    # Back-patched states already hold what is known by then.
    assert found["hit"].sel(position="last").values[:, back_patching.backward(LAYERS)].any()


def test_what_a_state_holds_is_said_by_a_describing_prompt():
    hops = Hops(resolve=2, move=5, table=6)
    model = Model(hop_circuit.build(hops), "hops", hop_circuit.words())
    prompt, answer = hop_circuit.two_hops("rosa", "teacher", "color")
    bridge = hop_circuit.TOKEN[hop_circuit.FACTS["rosa", "teacher"]]
    other = next(b for b in hop_circuit.BRIDGES if hop_circuit.TOKEN[b] != bridge)
    ids = [hop_circuit.TOKEN[w] for w in ("<bos>", other, "is")]
    target = model.resumable(Prompt.from_tokens(ids))
    base = model.resumable(prompt)
    at_entity = back_patching.describe(
        target, 1, back_patching.block_outputs(base, prompt.positions("entity")[0]), [bridge])
    # What comes before the describing prompt's own table it resolves itself; what comes later, not.
    assert back_patching.earliest(at_entity)[0] == 0
    assert back_patching.earliest(at_entity[:, hops.resolve :])[0] == hops.resolve
    at_last = back_patching.describe(
        target, 2, back_patching.block_outputs(base, len(prompt) - 1), [answer])
    assert back_patching.earliest(at_last)[0] == hops.arrival
    assert back_patching.earliest(at_last[:, hops.table :])[0] == hops.table
    assert np.isnan(back_patching.earliest(np.zeros((3, 2, 1), dtype=bool))[0])


def test_what_is_said_after_a_patch_is_the_answer():
    hops = Hops()
    model = Model(hop_circuit.build(hops), "hops", hop_circuit.words())
    prompt, answer = questions()[5]
    states = back_patching.block_outputs(model.resumable(prompt), len(prompt) - 1)
    assert back_patching.say(model, prompt, "last", states[6], 1, 1) == [answer]
    assert back_patching.say(model, prompt, "last", states[1], 0, 1) != [answer]


def test_bad_input_is_one_sentence(tiny):
    model = Model(tiny("llama"), "llama")
    base = model.resumable(Prompt.from_tokens(range(3, 9)))
    with pytest.raises(OutOfRange, match="blocks 0 to 1 have another one behind"):
        back_patching.patched_logits(base, 0, base.hidden[0][:1], 2)
    with pytest.raises(OutOfRange, match="position 6 does not exist"):
        back_patching.block_outputs(base, 6)
    with pytest.raises(PromptError, match="2 answers for 1 prompts"):
        back_patching.measure(model, [Prompt.from_tokens(range(3, 9))], [1, 2])
    with pytest.raises(ValueError, match="does not fit"):
        Hops(table=7)
