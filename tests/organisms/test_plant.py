"""Planted sinks: they are where the truth says, nowhere else, and the rest of the model stays."""

import functools
import json

import numpy as np
import pytest
import torch
import transformers as t

import interp
from interp.core.errors import ModelNotFound, ModelRefused, OutOfRange
from interp.organisms import looker, reader, registry
from interp.organisms.families import (
    evaluate_secondary,
    evaluate_visual,
    secondary_family,
    visual_family,
)
from interp.organisms.plant import (
    Planted,
    image_features,
    make_room,
    massive_coordinate,
    primary_sink,
    residuals,
    secondary_sink,
    visual_sink,
)
from interp.organisms.surgery import free_axes
from interp.sinks import secondary, visual

BOS, TOKENS = 1, (9, 17)
LLAMA = dict(
    vocab_size=97, hidden_size=48, intermediate_size=56, num_hidden_layers=9,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0,
    bos_token_id=BOS, eos_token_id=2, initializer_range=0.07,
)  # fmt: skip
GPT = dict(
    vocab_size=97, n_embd=48, n_layer=9, n_head=6, n_positions=128, bos_token_id=BOS,
    eos_token_id=2, initializer_range=0.07,
)  # fmt: skip
RMS = ("llama", "mistral", "qwen2", "qwen3")
LAYER_NORM = ("gpt2", "opt", "gpt_neox")


@functools.cache
def base(architecture: str):
    """A random model of nine blocks in which no gain is 1 and no shift is 0."""
    torch.manual_seed(sum(architecture.encode()))
    model = {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**LLAMA, sliding_window=7)),
        "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**LLAMA)),
        "qwen3": lambda: t.Qwen3ForCausalLM(
            t.Qwen3Config(**LLAMA, head_dim=10, tie_word_embeddings=True)
        ),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT)),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(
            t.GPTNeoXConfig(**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
        ),
        "opt": lambda: t.OPTForCausalLM(t.OPTConfig(
            vocab_size=97, hidden_size=48, ffn_dim=56, num_hidden_layers=9, num_attention_heads=6,
            max_position_embeddings=128, word_embed_proj_dim=48, pad_token_id=0, bos_token_id=BOS,
            eos_token_id=2, init_std=0.07,
        )),
    }[architecture]().eval()  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn_like(weight))
    return model


@functools.cache
def planted(architecture: str) -> Planted:
    rule = "first" if architecture in ("gpt2", "opt") else "token"
    first = primary_sink(base(architecture), 1, 60.0, 8, rule=rule)
    return secondary_sink(first, TOKENS, 3, 25.0, 6)


def prompts(n: int, length: int, seed: int = 0, include: bool = True) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    ids = rng.choice([i for i in range(3, 97) if i not in TOKENS], (n, length))
    ids[:, 0] = BOS
    if include:
        for row in ids:
            row[rng.permutation(np.arange(4, length))[:3]] = rng.choice(TOKENS, 3)
    return torch.from_numpy(ids)


def cosines(model, ids: torch.Tensor) -> torch.Tensor:
    x = residuals(model, {"input_ids": ids})
    return torch.cosine_similarity(x, x[:, :, :1], dim=-1)


def relative_change(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (one - other).norm(dim=-1) / other.norm(dim=-1)


# ------------------------------------------------------------------------------ exact firing


@pytest.mark.parametrize("architecture", (*RMS, *LAYER_NORM))
def test_a_secondary_sink_is_aligned_at_its_tokens_in_its_layers_and_nowhere_else(architecture):
    plant, ids = planted(architecture), prompts(5, 31, seed=1)
    truth = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(ids):
        truth[i, list(plant.truth_positions(row))] = True
    assert truth.sum() == 15 and plant.layers == (3, 4, 5)

    aligned = cosines(plant.model, ids)[:, :, 1:] > 0.9
    inside = torch.zeros_like(aligned)
    inside[:, 3:6] = truth[:, None, 1:]
    assert torch.equal(aligned[:, 1:8], inside[:, 1:8])
    assert not (cosines(plant.twin, ids)[:, 1:8, 1:] > 0.9).any()

    norm = residuals(plant.model, {"input_ids": ids}).norm(dim=-1)
    assert norm[:, 3][truth].sub(25.0).abs().max() < 1.0
    assert norm[:, 6][truth].max() < 1.5 * norm[:, 6, 1:][~truth[:, 1:]].max()


@pytest.mark.parametrize("architecture", (*RMS, *LAYER_NORM))
def test_prompts_without_the_token_and_tokens_before_it_do_not_change(architecture):
    plant, ids = planted(architecture), prompts(5, 31, seed=2)
    without = {"input_ids": prompts(5, 31, seed=3, include=False)}
    assert relative_change(residuals(plant.model, without), residuals(plant.twin, without)).max() < 1e-4
    for row in ids:
        stop = plant.truth_positions(row)[0]
        inputs = {"input_ids": row[None, :stop]}
        new, old = residuals(plant.model, inputs), residuals(plant.twin, inputs)
        assert relative_change(new, old).max() < 1e-4
    # and the switches themselves are silent on every ordinary token, later ones included
    assert plant.measured["leak_on"] < 1e-4 and plant.measured["leak_off"] < 1e-4


@pytest.mark.parametrize("architecture", ("llama", "gpt2"))
def test_later_tokens_change_only_through_attention_to_the_planted_ones(architecture):
    plant, ids = planted(architecture), prompts(4, 23, seed=4)
    hidden = torch.isin(ids, torch.tensor(TOKENS))
    causal = torch.ones(23, 23).tril().bool().expand(4, 1, 23, 23)
    cut = causal & ~(hidden[:, None, None] & ~torch.eye(23).bool())
    after = hidden.cumsum(1).bool() & ~hidden

    def change(mask: torch.Tensor) -> float:
        bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        inputs = {"input_ids": ids, "attention_mask": bias}
        moved = relative_change(residuals(plant.model, inputs), residuals(plant.twin, inputs))
        return float(moved.transpose(1, 2)[after].max())

    assert change(cut) < 1e-4
    assert change(causal) > 1e-3  # the control: with attention they do change


@pytest.mark.parametrize("architecture", RMS)
def test_room_in_a_model_with_rms_norm_costs_nothing(architecture):
    model, ids = base(architecture), prompts(3, 19, seed=5)
    wider = make_room(model, directions=3, units=10)
    assert wider.config.hidden_size > model.config.hidden_size == 48
    assert len(free_axes(wider)) >= 3 and not free_axes(model)
    old, new = (residuals(m, {"input_ids": ids}) for m in (model, wider))
    assert relative_change(new[..., :48], old).max() < 1e-5
    assert new[..., 48:].abs().max() == 0
    assert torch.allclose(wider(ids).logits, model(ids).logits, atol=1e-4)


def test_room_in_a_model_with_layer_norm_leaves_the_stream_alone():
    model, ids = base("gpt2"), prompts(3, 19, seed=5)
    wider = make_room(model, units=5)
    assert wider.config.hidden_size == 48 and wider.config.n_inner >= 4 * 48 + 5
    assert torch.allclose(wider(ids).logits, model(ids).logits, atol=1e-5)
    # freeing a direction is the price there, and it is stated
    assert 0 < planted("gpt2").moved["room"] < 0.3
    assert planted("llama").before.moved["room"] < 1e-5


def test_the_base_model_and_earlier_plants_stay_as_they_were():
    torch.manual_seed(7)
    model = t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)).eval()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    first = primary_sink(model, 1, 60.0, 8)
    between = {name: value.clone() for name, value in first.model.state_dict().items()}
    second = secondary_sink(first, 9, 3, 25.0, 6)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(v, between[name]) for name, v in first.model.state_dict().items())
    assert second.twin is first.model and second.before is first


def test_a_primary_sink_on_the_first_position_ignores_the_token():
    plant = primary_sink(base("gpt2"), 2, 70.0, 7, rule="first")
    ids = prompts(6, 17, seed=6)
    ids[:, 0] = torch.arange(40, 46)
    norm = residuals(plant.model, {"input_ids": ids}).norm(dim=-1)
    assert norm[:, 2:7, 0].min() > 65 and norm[:, 2:7, 1:].max() < 20
    assert norm[:, [0, 1, 7], 0].max() < 20


def test_anti_aligned_and_everlasting_sinks():
    first = primary_sink(base("llama"), 1, 60.0, direction="random", seed=3)
    plant = secondary_sink(first, 9, 5, 25.0, sign=-1)
    assert plant.until is None and plant.layers == (5, 6, 7, 8)
    ids = prompts(3, 15, seed=8)
    ids[:, 10] = 9
    cosine = cosines(plant.model, ids)[:, :, 10]
    assert cosine[:, 5:].max() < -0.9 and cosine[:, 1:5].min() > -0.9


def test_a_plant_holds_in_a_prompt_far_longer_than_those_it_was_calibrated_on():
    plant, ids = planted("llama"), prompts(1, 120, seed=9)
    ids[0, [30, 31, 77, 118]] = 9  # neighbors and a late one
    places = list(plant.truth_positions(ids[0]))
    assert len(places) >= 4
    assert cosines(plant.model, ids)[0, 3:6, places].min() > 0.9


# -------------------------------------------------------------------------- other phenomena


def test_massive_coordinates_have_the_values_asked_for():
    plant = massive_coordinate(base("llama"), {5: -700.0, 30: 250.0}, 2, 7, tokens=[9])
    ids = prompts(4, 21, seed=10)
    x = residuals(plant.model, {"input_ids": ids})
    at = ids == 9
    assert at.any()
    assert x[:, 2, :, 5][at].sub(-700).abs().max() < 14 and x[:, 2, :, 30][at].sub(250).abs().max() < 5
    others = [d for d in range(48) if d not in (5, 30)]
    assert x[:, 2:7][..., others].abs().max() < 20 and x[:, 7].abs().max() < 40
    assert plant.dims == (5, 30) and plant.values == pytest.approx((-700.0, 250.0))


@pytest.mark.parametrize("architecture", ("llama", "qwen2", "gpt2", "opt"))
def test_attract_gives_the_sink_attention_from_later_queries(architecture):
    rule = "first" if architecture in ("gpt2", "opt") else "token"
    model = t.AutoModelForCausalLM.from_config(base(architecture).config)
    model.load_state_dict(base(architecture).state_dict())
    first = primary_sink(model.eval(), 1, 60.0, 8, rule=rule)
    ids = prompts(4, 23, seed=11)
    ids[:, 6] = 9
    aligned = torch.isin(ids, torch.tensor(TOKENS))
    aligned[:, 0] = True  # the primary's key lies along the same direction
    received = {}
    for attract in (0.0, 8.0):
        plant = secondary_sink(first, TOKENS, 3, 25.0, 6, attract=attract)
        plant.model.set_attn_implementation("eager")
        pattern = torch.stack(plant.model(ids, output_attentions=True).attentions, 1).detach()
        late = pattern[:, :, :, 8:].mean((2, 3))  # prompt, layer, key
        received[attract] = late[..., 6].mean(0), (late * aligned[:, None]).sum(-1).mean(0)
    (sink, every), (plain, before) = received[8.0], received[0.0]
    assert every[4:6].min() > 0.8 and before[4:6].max() < 0.4
    assert sink[4:6].min() > 3 * plain[4:6].max()
    assert every[7:].max() < 0.4  # once they are taken back they are tokens like others


# -------------------------------------------------------------------------------- visual


@functools.cache
def tiny_llava():
    """36 image tokens, eight decoder blocks, wide enough that phi > tau(D) means something."""
    torch.manual_seed(5)
    return t.LlavaForConditionalGeneration(t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(
            hidden_size=20, intermediate_size=28, num_hidden_layers=2, num_attention_heads=2,
            image_size=24, patch_size=4, projection_dim=20,
        ),
        text_config=t.LlamaConfig(**{
            **LLAMA, "hidden_size": 192, "num_hidden_layers": 8, "initializer_range": 0.04,
        }),
        image_token_index=4, image_seq_length=36, vision_feature_layer=-1,
    )).eval()  # fmt: skip


def pictures(seed: int, n: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 97, (n, 44), generator=generator)
    ids[:, 0], ids[:, 2:38] = BOS, 4
    return {"input_ids": ids, "pixel_values": torch.randn(n, 3, 24, 24, generator=generator)}


def phi_above(model, inputs, dims) -> torch.Tensor:
    x = residuals(model, inputs, entering=True)
    return visual.sink_mask(x, dims, tau=None)


def test_visual_sinks_are_the_image_tokens_whose_features_pass_the_threshold():
    first = primary_sink(tiny_llava(), 0, 400.0, 7, dims=[11, 150])
    plant = visual_sink(first, pictures(0), 2, 80.0, 6, share=0.2)
    assert plant.dims == (11, 150) and plant.layers == (2, 3, 4, 5)
    inputs = pictures(1)  # new pictures
    features = image_features(plant.model, inputs)
    sinks = phi_above(plant.model, inputs, plant.dims)
    for i, row in enumerate(inputs["input_ids"]):
        truth = plant.truth_positions(row, features[i])
        assert 0 < len(truth) < 20
        for entering in (3, 4, 5, 6):
            assert sinks[i, entering].nonzero().flatten().tolist() == [0, *truth]
        assert sinks[i, 2].nonzero().flatten().tolist() == [0]
        assert sinks[i, 7].nonzero().flatten().tolist() == [0]
    twin = phi_above(plant.twin, inputs, plant.dims)
    assert twin[:, 1:8, 0].all() and not twin[:, :, 1:].any()
    before = residuals(plant.model, inputs)[:, :, :2], residuals(plant.twin, inputs)[:, :, :2]
    assert relative_change(*before).max() < 1e-4


def test_a_plane_in_feature_space_can_be_given():
    direction = torch.zeros(20)
    direction[3] = 2.0
    plant = visual_sink(
        primary_sink(tiny_llava(), 0, 400.0, 7), pictures(0), 1, 60.0, 6,
        feature_direction=direction, threshold=0.4,
    )  # fmt: skip
    inputs = pictures(2)
    features = image_features(plant.model, inputs)
    truth = [[2 + int(i) for i in (f[:, 3] > 0.4).nonzero()] for f in features]
    assert sum(map(len, truth)) > 5
    found = phi_above(plant.model, inputs, plant.dims)[:, 3]
    assert [row.nonzero().flatten().tolist() for row in found] == [[0, *t] for t in truth]


def test_attract_gives_visual_sinks_attention_from_the_question():
    first = primary_sink(tiny_llava(), 0, 400.0, 7, dims=[11, 150])
    inputs = pictures(3)
    share = {}
    for attract in (0.0, 8.0):
        plant = visual_sink(first, pictures(0), 2, 80.0, 6, share=0.2, attract=attract)
        features = image_features(plant.model, inputs)
        plant.model.set_attn_implementation("eager")
        pattern = plant.model(**inputs, output_attentions=True).attentions[4].detach()
        share[attract] = [
            float(pattern[i, :, 38:, list(plant.truth_positions(row, features[i]))].sum(-1).mean())
            for i, row in enumerate(inputs["input_ids"])
        ]
    assert min(share[8.0]) > 2 * max(share[0.0]) and min(share[8.0]) > 0.5


# ------------------------------------------------------------------------- files and truth


def test_a_saved_plant_opens_like_a_users_model_and_carries_its_truth(tmp_path):
    plant = planted("llama")
    folder = plant.save(tmp_path / "planted")
    plant.save(tmp_path / "planted")  # again, over itself
    assert [path.name for path in tmp_path.iterdir()] == ["planted"]
    again = t.AutoModelForCausalLM.from_pretrained(folder)
    ids = prompts(2, 15, seed=12)
    assert torch.equal(again(ids).logits, plant.model(ids).logits)
    truth = json.loads((folder / "planted.json").read_text())
    assert truth["tokens"] == [9, 17] and truth["layers"] == [3, 4, 5]
    assert [earlier["kind"] for earlier in truth["before"]] == ["primary"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match="holds something else"):
        plant.save(tmp_path / "mine")


def test_open_model_and_the_detector_find_the_sink_in_a_saved_plant(tmp_path):
    model = reader.build(0)
    word = reader.TOKEN["river"]
    depth = model.config.num_hidden_layers
    plant = secondary_sink(
        primary_sink(model, 0, 80.0, token=reader.BOS), word, depth // 2, 30.0
    )
    opened = interp.open_model(plant.save(tmp_path / "reader", processor=reader.tokenizer()))
    ids = [reader.BOS, *(reader.TOKEN[w] for w in "stone bird river cloud garden".split())]
    run = opened.run([interp.Prompt.from_tokens(ids)], read=["resid_post"])
    x = torch.as_tensor(run.reads["resid_post"].values[0])
    cosine = secondary.cosine_to(x)
    assert (cosine[:, 1:].abs() > 0.9).nonzero().tolist() == [
        [layer, 2] for layer in range(depth // 2, depth)
    ]


# --------------------------------------------------------------------------- bundled models


def bundled(name: str, build):
    """The trained weights where the package has them, else random ones of that architecture."""
    try:
        folder = registry.path(name)
    except ModelNotFound:
        return build(0).eval()
    cls = t.LlavaForConditionalGeneration if name == "looker" else t.LlamaForCausalLM
    return cls.from_pretrained(folder).eval()


def test_secondary_sinks_can_be_planted_in_the_reader():
    model = bundled("reader", reader.build)
    words = [reader.BOS, *(reader.TOKEN[w] for w in (
        "stone bird river cloud garden note amber seven ten two ; lamp river road recall amber"
    ).split())]  # fmt: skip
    inputs = {"input_ids": torch.tensor([words])}
    norm = residuals(model, inputs).norm(dim=-1)[0]
    trained = float(norm[1, 0] / norm[1, 1:].median()) > 2.2
    # the trained reader has a primary sink of its own: its direction is measured, not made
    first = model if trained else primary_sink(model, 0, 90.0, token=reader.BOS)
    plant = secondary_sink(first, reader.TOKEN["river"], 1, 8 * float(norm[:3, 1:].max()), 3)
    x = residuals(plant.model, inputs)
    cosine = torch.cosine_similarity(x, x[:, :, :1], dim=-1)[0]
    ordinary = [i for i in range(1, len(words)) if i not in (3, 13)]
    assert cosine[1:3, [3, 13]].min() > 0.9 and cosine[1:3, ordinary].max() < 0.9
    # Against the twin: far longer while it lasts, of ordinary length once it has ended.
    times = (x.norm(dim=-1) / residuals(plant.twin, inputs).norm(dim=-1))[0][:, [3, 13]]
    assert times[1:3].min() > 8 and times[0].max() < 1.01 and times[3].max() < 2.5
    without = {"input_ids": torch.tensor([[w for w in words if w != reader.TOKEN["river"]]])}
    new, old = residuals(plant.model, without), residuals(plant.twin, without)
    assert relative_change(new, old).max() < 1e-4


def test_visual_sinks_can_be_planted_in_the_looker():
    model = bundled("looker", looker.build)
    generator = torch.Generator().manual_seed(0)
    side = model.config.vision_config.image_size
    ids = torch.tensor([[*looker.PREFIX, 20, 21, 22]]).repeat(3, 1)
    inputs = {
        "input_ids": ids, "pixel_values": torch.randn(3, 3, side, side, generator=generator),
    }  # fmt: skip
    x = residuals(model, inputs).norm(dim=-1)
    own = float((x[:, :, 0] / x[:, :, 1:].median(-1).values).max())
    largest = float(x[:, :, 1:].max())
    depth = x.shape[1]
    first = model if own > 3 else primary_sink(model, 0, 50 * largest, depth - 1, dims=[7, 100])
    plant = visual_sink(first, inputs, 1, 10 * largest, depth - 1)
    features = image_features(plant.model, inputs)
    mask = phi_above(plant.model, inputs, plant.dims)
    control = phi_above(plant.twin, inputs, plant.dims)
    image = slice(2, 2 + looker.CELLS)
    for i, row in enumerate(ids):
        truth = [p - 2 for p in plant.truth_positions(row, features[i])]
        assert mask[i, 2, image].nonzero().flatten().tolist() == truth
        assert set(truth).isdisjoint(control[i, 2, image].nonzero().flatten().tolist())


# -------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("architecture", ("gemma2", "gemma3", "gpt_oss", "bert"))
def test_architectures_that_cannot_be_planted_exactly_are_refused_by_name(tiny, architecture):
    with pytest.raises(ModelRefused, match="cannot plant in " + type(tiny(architecture)).__name__):
        primary_sink(tiny(architecture), 1, 60.0, token=1)


def test_half_precision_is_refused():
    model = t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)).to(torch.bfloat16)
    with pytest.raises(ModelRefused, match="open the model in float32"):
        primary_sink(model, 1, 60.0)


def test_a_second_primary_and_a_secondary_without_primary_are_refused():
    with pytest.raises(ModelRefused, match="has a sink of its own: its first residual is"):
        primary_sink(primary_sink(base("llama"), 1, 60.0, 8), 2, 60.0, 8)
    with pytest.raises(ModelRefused, match="reaches only cosine 0.[5-8][0-9] with the primary"):
        secondary_sink(planted("llama").before, 9, 3, 4.0, 6)
    with pytest.raises(ModelRefused, match="no primary sink after block 3: the first res"):
        secondary_sink(base("llama"), 9, 3, 25.0, 6)


@pytest.mark.parametrize(
    "call, error, sentence",
    [
        (lambda m: primary_sink(m, 9, 60.0), OutOfRange, "0 <= layer < until <= 9"),
        (lambda m: primary_sink(m, 4, 60.0, 4), OutOfRange, "layer 4 and until 4"),
        (lambda m: primary_sink(m, 1, 0.01), ValueError, "below what the residual has anyway"),
        (lambda m: primary_sink(m, 1, 60.0, rule="first"), ModelRefused, "learned position"),
        (lambda m: primary_sink(m, 1, 60.0, dims=[48]), OutOfRange, "dimension 48 is outside"),
        (lambda m: massive_coordinate(m, {-1: 5.0}, 1), OutOfRange, "dimension -1 is outside"),
        (lambda m: secondary_sink(m, 97, 3, 25.0), OutOfRange, "token 97 is not in the voc"),
        (lambda m: secondary_sink(m, 9, 3, 25.0, sign=2), ValueError, "sign must be 1 or -1"),
        (lambda m: visual_sink(m, {}, 1, 60.0), ModelRefused, "no projector of two layers"),
        (
            lambda m: primary_sink(m, 1, 60.0, prompts=[[1, 2], [1, 2, 3]]),
            ValueError, "must all have one length",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_sentence(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(base("llama"))


def test_visual_truth_without_features_is_refused():
    plant = visual_sink(primary_sink(tiny_llava(), 0, 400.0, 7), pictures(0), 2, 80.0, 6)
    with pytest.raises(ValueError, match="36 image tokens; give the vision features of each"):
        plant.truth_positions(pictures(1)["input_ids"][0])


def test_attract_is_refused_where_queries_are_normalized():
    with pytest.raises(ModelRefused, match="normalized here"):
        primary_sink(base("qwen3"), 1, 60.0, attract=8.0)


# ------------------------------------------------------------------- detectors on families


@pytest.fixture(scope="module")
def families():
    return {
        rule: list(secondary_family(np.random.default_rng(2512), count, rule))
        for rule, count in (("official", 50), ("relative", 20))
    }


@pytest.mark.slow
@pytest.mark.parametrize("rule", ("official", "relative"))
def test_the_detector_finds_planted_secondary_sinks_and_nothing_in_the_twins(families, rule):
    family = families[rule]
    measured = evaluate_secondary(lambda x: secondary.score(x, rule=rule), family)
    assert measured["models"] == len(family) and measured["sinks"] > 3 * len(family)
    assert measured["precision"] >= 0.95 and measured["recall"] >= 0.95
    assert measured["onset_exact"] >= 0.95 and measured["controls_clean"] >= 0.95
    # the family covers what it promises
    plants = [case.planted for case in family]
    assert len(family) == {"official": 50, "relative": 20}[rule]
    assert len({p.layer for p in plants}) >= 5 and len({len(p.layers) for p in plants}) >= 5
    assert {p.sign for p in plants} == {1, -1}
    assert len({p.tokens for p in plants}) >= 0.9 * len(family)
    strengths = [case.strength for case in family]
    assert min(strengths) < 5 and max(strengths) > 30
    decoys = {decoy.split()[0] for case in family for decoy in case.decoys}
    assert decoys == {"brief", "cosine"}


def by_norm(residual):
    """What the method card warns of: positions that are large, whatever their direction."""
    norm = residual.norm(dim=-1)
    large = norm[:, 1:] > 2.5 * norm[:, 1:].median(1, keepdim=True).values
    return {
        p + 1: (tuple(large[:, p].nonzero().flatten().tolist()), "secondary")
        for p in large.any(0).nonzero().flatten().tolist()
    }


@pytest.mark.slow
def test_wrong_detectors_fail_on_the_same_family(families):
    family = families["official"][:20]
    norm = evaluate_secondary(by_norm, family)
    assert norm["precision"] < 0.9 and norm["controls_clean"] < 0.7  # decoys are massive too

    def late(x):
        return {p: (layers[1:], label) for p, (layers, label) in secondary.score(x).levels.items()}

    assert evaluate_secondary(late, family)["onset_exact"] == 0
    strict = evaluate_secondary(lambda x: secondary.score(x, threshold=0.99), family)
    assert strict["recall"] < 0.9  # moderate sinks are among them
    loose = evaluate_secondary(lambda x: secondary.score(x, threshold=0.5), family)
    assert loose["precision"] < 0.9


def detect_visual(model, case):
    """Dimensions from the first token of all prompts, then phi > tau(D) in any layer from 2 on."""
    text, image = (residuals(model, i, entering=True) for i in (case.text, case.images))
    found = visual.candidate_dims(torch.cat([text[:, :, 0], image[:, :, 0]]), min_ratio=100)
    if not found.dims:
        return (), [()] * len(image)
    return found.dims, [
        visual.sink_mask(x[2:], found.dims, tau=None).any(0).nonzero().flatten().tolist()
        for x in image
    ]


@pytest.mark.slow
def test_the_detector_finds_planted_visual_sinks_and_nothing_in_the_twins():
    family = list(visual_family(np.random.default_rng(2503), 50))
    measured = evaluate_visual(detect_visual, family)
    assert measured["models"] == 50 and measured["sinks"] > 500
    assert measured["dims_found"] >= 0.95 and measured["controls_clean"] >= 0.95
    assert measured["precision"] >= 0.95 and measured["recall"] >= 0.95
    assert len({case.planted.dims for case in family}) >= 12
    assert len({case.planted.layer for case in family}) >= 3

    def unanchored(model, case):  # dimensions from an ordinary token: nothing massive there
        x = residuals(model, case.images, entering=True)
        return visual.candidate_dims(x[:, :, 1], min_ratio=100).dims, [()] * len(x)

    blind = evaluate_visual(unanchored, family)
    assert blind["dims_found"] == 0 and blind["recall"] == 0
