"""First-token sinks in models: streamed as in the dense definition, and hidden against a control."""

import copy
import functools

import numpy as np
import pytest
import torch
import transformers as t

import interp
from interp.core.errors import PromptError
from interp.models.model import Model
from interp.sinks import first_token


@pytest.fixture(scope="module")
def opened(tiny):
    """architecture -> the tiny model, opened once."""
    return functools.cache(lambda architecture: Model(tiny(architecture), f"tiny-{architecture}"))


def prompts(count: int, length: int, seed: int = 0) -> list[interp.Prompt]:
    rng = np.random.default_rng(seed)
    return [interp.Prompt.from_tokens([1, *rng.integers(3, 90, length - 1)]) for _ in range(count)]


def seen_by(model: Model, length: int) -> np.ndarray:
    """Which keys each query may see, [layer, query, key], from the configuration alone."""
    distance = np.arange(length)[:, None] - np.arange(length)
    if model.kind == "encoder":
        return np.ones((model.n_layers, length, length), dtype=bool)
    config = model.hf.config
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(config, "sliding_window", None) else "full"] * 3
    window = [config.sliding_window if k == "sliding_attention" else length for k in kinds]
    return np.stack([(distance >= 0) & (distance < w) for w in window])


# -- alpha ------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", ["self", "later"])
@pytest.mark.parametrize("architecture, length", [
    ("llama", 13), ("mistral", 9), ("mistral", 14), ("gemma2", 8), ("gpt_oss", 9), ("bert", 11),
])
def test_streamed_alpha_is_the_definition_on_the_dense_pattern(opened, architecture, length, queries):
    model = opened(architecture)
    given = prompts(3, length)
    found = first_token.measure(model, given, queries=queries)
    assert found["alpha"].dims == ("prompt", "layer", "head", "key")
    pattern = model.run(given, read="pattern").reads["pattern"].values
    visible = seen_by(model, length)[:, None]
    expected = first_token.importance(pattern, queries=queries, visible=visible).numpy()
    if architecture == "bert" and queries == "later":
        # All queries but the one at the key itself, earlier ones too.
        own = np.eye(length, dtype=bool)
        expected = np.where(own, 0, pattern).sum(-2) / (length - 1)
    assert np.allclose(found["alpha"].values, expected, atol=2e-6, equal_nan=True)
    window = (visible.sum(-2)[:, 0, 0] < length / 2).any()
    assert np.isnan(found["alpha"].values[..., 0]).any() == window
    assert window == ((architecture, length) == ("mistral", 14))


def test_the_denominators_of_an_encoder_count_every_query(opened):
    model = opened("bert")
    given = prompts(2, 11)
    alpha = first_token.measure(model, given)["alpha"]
    # Rows sum to one and every key is divided by the same number, so the shares do too.
    assert np.allclose(alpha.sum("key"), 1, atol=1e-5)
    decoder = first_token.measure(opened("llama"), given)["alpha"]
    assert float(decoder.sum("key").min()) > 1.05


def test_norms_and_angles_are_those_of_the_reads(opened):
    model = opened("llama")
    given = prompts(2, 9)
    found = first_token.measure(model, given)
    reads = model.run(given, read=("resid_pre", "q", "k", "v")).reads
    q, k, v, x = (reads[name].values for name in ("q", "k", "v", "resid_pre"))
    assert np.allclose(found["residual_norm"], np.linalg.norm(x, axis=-1), rtol=1e-4)
    assert np.allclose(found["key_norm"], np.linalg.norm(k, axis=-1), rtol=1e-4)
    assert np.allclose(found["value_norm"], np.linalg.norm(v, axis=-1), rtol=1e-4)
    for head in range(6):
        key = k[:, :, 0, head // 3]  # three query heads share a key head
        later = q[:, :, 1:, head]
        cosine = (later * key[:, :, None]).sum(-1) / (
            np.linalg.norm(later, axis=-1) * np.linalg.norm(key, axis=-1)[..., None])
        assert np.allclose(found["angle"].sel(head=head), cosine.mean(-1), atol=1e-5)
        assert np.allclose(found["query_norm"].sel(head=head),
                           np.linalg.norm(later, axis=-1).mean(-1), rtol=1e-4)


# -- learned sinks ------------------------------------------------------------------------------


def with_sinks(hf: torch.nn.Module, value: float) -> Model:
    made = copy.deepcopy(hf)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("sinks"):
                weight.fill_(value)
    return Model(made, f"sinks {value:+g}")


def test_mass_on_a_learned_sink_is_what_the_rows_lack(opened):
    model, given = opened("gpt_oss"), prompts(3, 9)
    found = first_token.measure(model, given)
    pattern = model.run(given, read="pattern").reads["pattern"].values
    assert np.allclose(found["external"], (1 - pattern.sum(-1)).mean(-1), atol=1e-5)
    normal = first_token.importance(pattern, normalise=True, visible=seen_by(model, 9)[:, None])
    assert np.allclose(found["alpha_normalized"].values, normal, atol=2e-6, equal_nan=True)
    assert bool((found["alpha_normalized"] > found["alpha"]).where(found["alpha"] > 1e-6, True).all())


def test_a_stronger_learned_sink_takes_more_of_every_head(tiny):
    given = prompts(3, 9)
    weak, strong = (first_token.measure(with_sinks(tiny("gpt_oss"), s), given) for s in (-4.0, 4.0))
    # In the first layer everything but the sink is equal; deeper ones read changed residuals.
    assert bool((strong["external"] > weak["external"]).sel(layer=0).all())
    assert float(strong["external"].mean()) > float(weak["external"].mean()) + 0.1
    assert float(weak["external"].sel(layer=0).max()) < 0.2
    gone = first_token.measure(with_sinks(tiny("gpt_oss"), -80.0), given)
    assert float(np.abs(gone["external"]).max()) < 1e-5
    assert np.allclose(gone["alpha"], gone["alpha_normalized"], atol=1e-5, equal_nan=True)


def test_a_model_without_learned_sinks_has_no_external_mass_to_report(opened):
    found = first_token.measure(opened("llama"), prompts(2, 9))
    assert "external" not in found.data and "alpha_normalized" not in found.data
    assert found.manifest["length"] == 9 and found.manifest["n_prompts"] == 2


def test_prompts_of_different_lengths_are_refused(opened):
    model = opened("llama")
    with pytest.raises(PromptError, match=r"one length are needed, not \[9, 12\].*falls with the"):
        first_token.measure(model, [*prompts(1, 9), *prompts(1, 12)])
    with pytest.raises(PromptError, match="not none"):
        first_token.measure(model, [])


# -- hiding -------------------------------------------------------------------------------------


def rested(rests: bool = True) -> t.LlamaForCausalLM:
    """One block whose every query rests on the token BOS, whose value says which token follows.

    Residual coordinate 0 marks ordinary tokens and 1 marks BOS; attention writes what BOS holds
    to coordinate 5, and that favors token 7. With `rests=False` only the noise in all weights is
    left: attention is spread evenly and BOS holds nothing.
    """
    config = t.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=4, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, rope_theta=1e9,
    )
    torch.manual_seed(0)
    model = t.LlamaForCausalLM(config).eval()
    block = model.model.layers[0]
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.02) if weight.ndim > 1 else weight.fill_(1.0)
        table = model.model.embed_tokens.weight
        table[:, 0] += 1.0  # every token is alike ...
        table[1, :2] = torch.tensor([0.0, 1.0])  # ... but BOS
        if rests:
            # The slowest rotary pair (dimension 3) does not turn within a prompt.
            block.self_attn.q_proj.weight[3, 0] = 4.0
            block.self_attn.k_proj.weight[3, 1] = 4.0
            block.self_attn.v_proj.weight[0, 1] = 1.0
        block.self_attn.o_proj.weight[5, 0] = 1.0
        model.lm_head.weight[7, 5] = 3.0
    return model


def text(count: int, length: int = 24) -> list[interp.Prompt]:
    """BOS, a few tokens, and then the token 7 again and again."""
    rng = np.random.default_rng(0)
    return [interp.Prompt.from_tokens([1, *rng.integers(3, 11, 7), *[7] * (length - 8)])
            for _ in range(count)]


def test_hiding_hurts_only_where_the_first_token_was_made_to_matter():
    model = Model(rested(), "rested")
    assert model.run(text(1), stats="received").stats["received"][0, 0, 0, 0] > 0.95
    found = first_token.intervene(model, text(3), (1, 2), control_seeds=5)
    added = found["loss"] - found["baseline"]
    control = found["control"] - found["baseline"]
    assert float(added.min()) > 1.0 and float(np.abs(control).max()) < 0.05
    flat = first_token.intervene(Model(rested(False), "flat"), text(3), (1, 2))
    assert float(np.abs(flat["loss"] - flat["baseline"]).max()) < 0.05
    assert float(np.abs(flat["control"] - flat["baseline"]).max()) < 0.05


def test_what_is_hidden_is_what_was_asked_for_and_the_control_is_matched(opened, monkeypatch):
    """Every block that the model is asked for: same queries, same number, never the first n."""
    model, given = opened("llama"), prompts(3, 20)
    asked = []
    run = model.run
    monkeypatch.setattr(model, "run", lambda p, write=(), **more: (
        asked.append(tuple(write)), run(p, write=write, **more))[1])
    found = first_token.intervene(model, given, (1, 4), control_seeds=5, seed=3)
    assert found["loss"].sizes == {"prompt": 3, "n_first": 2}
    assert found["control"].sizes == {"sample": 5, "prompt": 3, "n_first": 2}
    base, rest = asked[:3], [write[0] for write in asked[3:]]
    assert base == [()] * 3 and len(rest) == 3 * 2 * (1 + 5)
    assert all(one.queries == ("slice", 10, None, None) and one.layers is None for one in rest)
    assert [one.keys for one in rest[:6]] == [(0,)] * 3 + [(0, 1, 2, 3)] * 3
    drawn = [one.keys for one in rest[6:]]
    for number, keys in enumerate(drawn):
        n = (1, 4)[number // 3 % 2]
        assert len(set(keys)) == n and min(keys) >= n and max(keys) < 10
    assert len({frozenset(k) for k in drawn if len(k) == 4}) > 5  # drawn anew every time


def test_a_baseline_loss_is_the_cross_entropy_of_the_second_half(opened):
    model, given = opened("llama"), prompts(2, 15)
    found = first_token.intervene(model, given, (1,), control_seeds=1)
    for i, prompt in enumerate(given):
        logits = model.run(prompt).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[7:14], torch.tensor(prompt.ids[8:]))
        assert float(found["baseline"][i]) == pytest.approx(float(loss), rel=1e-5)
    again = first_token.intervene(model, given, (1,), control_seeds=1)
    assert np.array_equal(again["control"], found["control"])


def test_too_short_prompts_are_refused(opened):
    model = opened("llama")
    with pytest.raises(PromptError, match=r"hiding \[1, 4\] first tokens needs .* 16 tokens, not 9"):
        first_token.intervene(model, prompts(2, 9), (4, 1))
    with pytest.raises(PromptError):
        first_token.intervene(model, prompts(2, 9), (0,))
