"""Focus directions: the moved rows are those of the model, keys are a no-op, learning raises mass."""

import numpy as np
import pytest
import torch

import interp
from interp.core.errors import OutOfRange, SiteRefused
from interp.heads import focus_directions as focus
from interp.models.model import Model
from interp.organisms import reader
from interp.prompts import documents
from interp.prompts.documents import Documents


def asked(seed: int) -> Documents:
    rng = np.random.default_rng(seed)
    gold = interp.Segment("gold", (3, 4, 5), "gold")
    prompt = interp.Prompt.from_tokens(rng.integers(3, 90, 12), {"gold": gold})
    return Documents(prompt, prompt, prompt, tuple(int(x) for x in rng.integers(3, 90, 2)), 0, 1)


def with_offset(model: Model, one: Documents, layer: int, site: str, value: np.ndarray) -> np.ndarray:
    """The model's own rows of the answer with an offset written into it."""
    longer = interp.Prompt.from_tokens([*one.prompt.ids, *one.answer])
    pattern = model.run(longer, read=f"pattern.{layer}",
                        write=interp.edit(f"{site}.{layer}", "add", value[None])).reads
    return pattern[f"pattern.{layer}"].values[0, 0][:, 11:13]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "gpt2", "qwen3"])
@pytest.mark.parametrize("layer", [0, 1])
def test_moved_rows_are_those_of_a_run_with_the_offset(tiny, architecture, layer):
    """Grouped keys, soft caps, windows and learned sinks: one formula, checked in the model."""
    model = Model(tiny(architecture), f"tiny-{architecture}")
    one = asked(1)
    (rows,) = focus.rows_of(model, [one], [layer])[layer]
    offset = np.random.default_rng(2).normal(0, 0.7, (6, 8)).astype(np.float32)
    moved = rows.moved(query=torch.tensor(offset)).numpy()
    assert np.allclose(moved, with_offset(model, one, layer, "q", offset), atol=3e-4)
    assert np.abs(moved - rows.weights.numpy()).max() > 0.02
    # Key offsets per key-value head, as the model can write them.
    n_kv = model.n_kv_heads
    keys = np.random.default_rng(3).normal(0, 0.7, (n_kv, 8)).astype(np.float32)
    repeated = torch.tensor(keys).repeat_interleave(6 // n_kv, 0)
    written = with_offset(model, one, layer, "k", keys)
    assert np.allclose(rows.moved(key=repeated).numpy(), written, atol=3e-4)
    change = np.abs(written - rows.weights.numpy()).max()
    broken = architecture == "gemma2" or architecture == "gpt_oss"
    # A key direction does nothing, unless a soft cap or a learned sink tells rows' levels apart.
    assert change > 1e-3 if broken else change < 1e-5


def test_a_key_direction_is_a_no_op_for_logits_and_a_query_direction_is_not(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    prompt = asked(5).prompt
    base = model.run(prompt).logits[0]
    rng = np.random.default_rng(0)
    for lane in ("hf", "bridge"):
        here = model.using(lane)
        for site, heads in (("k", 2), ("q", 6)):
            value = rng.normal(size=(3, 1, heads, 8)).astype(np.float32)
            gap = float((here.run(prompt, write=interp.edit(site, "add", value)).logits[0]
                         - base).abs().max())
            assert gap < 1e-3 if site == "k" else gap > 0.1


def test_learning_keys_only_learns_nothing_and_queries_learn(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    made = [asked(seed) for seed in range(6)]
    keys = focus.learn(model, made, which="key", learning_rate=0.05)
    assert np.allclose(keys["after"], keys["before"], atol=1e-5)
    assert np.abs(keys["query"]).max() == 0
    both = focus.learn(model, made, which="both", learning_rate=0.05, layers=[1])
    query = focus.learn(model, made, which="query", learning_rate=0.05, layers=[1])
    assert (query["after"] > query["before"] + 0.02).all()
    assert query["query"].sizes["layer"] == 1 and query["layer"].values.tolist() == [1]
    # With both, the keys add nothing: the rows are as far along as with the queries alone.
    assert np.allclose(both["after"], query["after"], atol=0.03)
    loss = query["loss"].values[0]
    assert loss[-1] < loss[0] and len(loss) == 10


def test_the_result_does_not_depend_on_how_layers_are_grouped(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    made = [asked(seed) for seed in range(3)]
    whole = focus.learn(model, made, epochs=2)
    pieces = focus.learn(model, made, epochs=2, memory=1.0)
    assert np.allclose(whole["query"], pieces["query"], atol=1e-6)
    other = focus.learn(model, made, epochs=2, seed=1)
    assert not np.allclose(whole["query"], other["query"])


def test_directions_written_into_the_model_raise_the_mass_in_their_heads_only(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    made = [asked(seed) for seed in range(6)]
    found = focus.learn(model, made, learning_rate=0.05)
    longer = [interp.Prompt.from_tokens([*one.prompt.ids, *one.answer]) for one in made]

    def gold_mass(write):
        pattern = model.run(longer, read="pattern.2", write=write).reads["pattern.2"].values[:, 0]
        return pattern[:, :, 11:13][..., 3:6].sum(-1).mean((0, 2))

    plain = gold_mass(())
    moved = gold_mass(focus.focus(found, ["L2H1", "L2H4"], 1.0))
    assert (moved[[1, 4]] > plain[[1, 4]] + 0.02).all()
    assert np.allclose(np.delete(moved, [1, 4]), np.delete(plain, [1, 4]), atol=1e-5)
    away = gold_mass(focus.focus(found, ["L2H1"], -1.0))
    assert away[1] < plain[1]
    assert np.allclose(gold_mass(focus.focus(found, ["L2H1"], 0.0)), plain, atol=1e-6)


def test_they_compose_with_other_interventions_and_generation():
    model = interp.open_model("reader")
    made = documents.synthetic(reader, np.random.default_rng(0), (0, 2), count=3, each=2)
    found = focus.learn(model, made, learning_rate=0.01, epochs=2, layers=[1])
    write = (*focus.focus(found, "L1H3", 0.2), interp.ablate("L3H0"))
    said = model.generate([one.prompt for one in made], 3, write)
    assert [tuple(answer) for answer in said] == [one.answer for one in made]
    assert len({one.key() for one in write}) == 2


def test_a_scale_that_does_not_explain_the_rows_is_refused():
    query, key = torch.randn(2, 3, 4), torch.randn(2, 6, 4)
    logits = torch.einsum("hqd,hkd->hqk", query, key)
    assert focus.scale_of((0.3 * logits).softmax(-1), query, key) == pytest.approx(0.3, rel=1e-3)
    capped = 2.0 * torch.tanh(0.9 * logits / 2.0)
    assert focus.scale_of(capped.softmax(-1), query, key, 2.0) == pytest.approx(0.9, rel=1e-2)
    biased = 0.3 * logits - torch.arange(6.0).flip(0)
    with pytest.raises(SiteRefused, match="not a multiple of q.k"):
        focus.scale_of(biased.softmax(-1), query, key)


def test_bad_heads_and_layers_are_one_sentence(tiny):
    model = Model(tiny("llama"), "tiny-llama")
    found = focus.learn(model, [asked(0)], epochs=1, layers=[0, 2])
    with pytest.raises(OutOfRange, match="L5H0"):
        focus.focus(found, "L5H0")
    with pytest.raises(ValueError, match="no direction was learned in layer 1"):
        focus.focus(found, "L1H0")
