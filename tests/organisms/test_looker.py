"""`looker`: what it is trained on is what it is asked, through the processor every user's model
takes.
"""

import json
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from interp.organisms import looker
from interp.prompts.scenes import (
    COLORS,
    GRID,
    SHAPES,
    SIDE,
    Question,
    cell_box,
    draw,
    questions,
    scene,
    scenes,
)

WEIGHTS = Path(looker.__file__).parent / "weights" / "looker"


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def randomized(seed: int = 0):
    """An untrained model with weights large enough that everything it sees matters."""
    model = looker.build(seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    return model


@pytest.fixture(scope="module")
def model():
    return randomized()


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("looker")
    looker.config().save_pretrained(folder)
    looker.export(looker.build(0), folder)
    return AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def bundled():
    return AutoModelForImageTextToText.from_pretrained(WEIGHTS).eval()


# --------------------------------------------------------------------------------- the processor


def chat(processor, text, images):
    content = [
        *({"type": "image", "image": image} for image in images),
        {"type": "text", "text": text},
    ]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
    )


def test_a_chat_about_a_picture_gives_the_tokens_and_the_pixels_of_training(processor):
    picture = scene(generator())
    for question in questions(picture, generator(), every=True):
        given = chat(processor, question.text, [draw(picture)])
        assert given["input_ids"][0].tolist() == looker.prompt(question)
    wanted = looker.normalize(picture.pixels[None], torch.zeros(1))
    torch.testing.assert_close(given["pixel_values"], wanted, atol=1e-6, rtol=0)


def test_people_may_type_as_they_like(processor):
    wanted = looker.prompt(Question("read", "what is the number ?", ""))
    typed = processor(
        text="USER: <image>\nWhat is  the NUMBER? ASSISTANT:",
        return_tensors="pt",
        images=[draw(scene(generator()))],
    )
    assert typed["input_ids"][0].tolist() == wanted
    tokens = processor.tokenizer.tokenize
    assert tokens("a red circle,and 47.") == ["a", "red", "circle", ",", "and", "4", "7", "."]
    assert tokens("Schrödinger")[0] == "<unk>"


def test_a_conversation_ends_every_answer(processor):
    text = processor.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "is there a red ring?"}],
            },
            {"role": "assistant", "content": "no"},
            {"role": "user", "content": "what is the number?"},
        ],
        add_generation_prompt=True,
    )
    picture = draw(scene(generator()))
    ids = processor(text=text, images=[picture])["input_ids"][0]
    assert ids[: len(looker.PREFIX)] == list(looker.PREFIX)
    assert processor.decode(ids[len(looker.PREFIX) :]) == (
        "is there a red ring ? ASSISTANT: no </s> USER: what is the number ? ASSISTANT:"
    )


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P"])
@pytest.mark.parametrize("size", [(SIDE, SIDE), (300, 120), (31, 47)])
def test_any_picture_becomes_36_visual_tokens(processor, mode, size):
    picture = Image.fromarray(generator().integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(
        mode
    )
    given = chat(processor, "describe the picture.", [picture])
    assert given["pixel_values"].shape == (1, 3, SIDE, SIDE)
    assert (given["input_ids"] == looker.IMAGE).sum() == looker.CELLS


def test_several_pictures_in_one_prompt(processor, model):
    pictures = [draw(picture) for picture in scenes(generator(), 2)]
    given = chat(processor, "what is the number?", pictures)
    assert (given["input_ids"] == looker.IMAGE).sum() == 2 * looker.CELLS
    swapped = chat(processor, "what is the number?", pictures[::-1])
    one, other = model(**given).logits[:, -1], model(**swapped).logits[:, -1]
    assert (one - other).abs().max() > 1e-4


def test_visual_token_i_is_grid_cell_i(processor, model):
    """Paint one cell: before the tower mixes, only that patch changes."""
    picture = draw(scene(generator(), shapes=3, numbers=1))
    embed = model.model.vision_tower.embeddings
    before = embed(processor.image_processor(picture, return_tensors="pt")["pixel_values"])
    for index in range(looker.CELLS):
        cell = divmod(index, GRID)
        painted = picture.copy()
        painted.paste((255, 0, 255), cell_box(cell))
        after = embed(processor.image_processor(painted, return_tensors="pt")["pixel_values"])
        changed = (after - before).abs().amax((0, 2)).gt(1e-4).nonzero().flatten().tolist()
        assert changed == [1 + index]  # 0 is the class token, which the projector never sees


def test_exported_tokenizer_opens_alone(processor, tmp_path):
    processor.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("is there a red ring?")["input_ids"][0] == looker.BOS == tokenizer.bos_token_id
    for word in looker.VOCABULARY[len(looker.SPECIAL) :]:
        assert tokenizer(word)["input_ids"] == [looker.BOS, looker.TOKEN[word]], word


# --------------------------------------------------------------------------------- training data


def rows(packed, row):
    """The pairs of a packed row, as (question tokens, answer tokens)."""
    for number in range(1, packed["pair"][row].max() + 1):
        where = np.flatnonzero(packed["pair"][row] == number)
        answered = where[packed["targets"][row, where] >= 0]
        yield where, answered


@pytest.mark.parametrize("conversation", [False, True])
def test_pairs_of_a_packed_row_are_the_scenes_questions_and_only_answers_are_learned(conversation):
    pictures = scenes(generator(), 12)
    packed = looker.pack(pictures, generator(1), 90, conversation)
    seen = 0
    for row, picture in enumerate(pictures):
        known = {
            (q.text, q.answer)
            for seed in range(60)
            for q in questions(picture, generator(seed), every=True)
        }
        for where, answered in rows(packed, row):
            assert (
                len(set(np.diff(answered))) <= 1 and packed["ids"][row, answered[0]] == looker.ASSISTANT
            )
            words = [looker.VOCABULARY[i] for i in packed["ids"][row, where[0] : answered[0]]]
            told = [looker.VOCABULARY[i] for i in packed["targets"][row, answered]]
            assert told[-1] == "</s>"
            asked = " ".join(word for word in words if word != "USER:")
            # count and existence questions are drawn anew at every call
            if not asked.startswith(("how many", "is there")):
                assert (asked, " ".join(told[:-1])) in known
            seen += 1
    assert seen > 60


def test_a_packed_pair_is_answered_as_if_it_were_asked_alone(model):
    pictures = scenes(generator(2), 3)
    packed = looker.pack(pictures, generator(3), 80, conversation=False)
    pixels = looker.normalize(np.stack([p.pixels for p in pictures]), model.lm_head.weight)
    batch = {key: torch.from_numpy(value) for key, value in packed.items()}
    with torch.no_grad():
        together = model(
            input_ids=batch["ids"],
            pixel_values=pixels,
            position_ids=batch["positions"],
            attention_mask=looker.visible(batch["pair"]),
            use_cache=False,
        ).logits
        chained = model(input_ids=batch["ids"], pixel_values=pixels, use_cache=False).logits
        compared = 0
        for row in range(len(pictures)):
            for number, (where, answered) in enumerate(rows(packed, row)):
                alone = [*looker.PREFIX, *packed["ids"][row, where]]
                logits = model(
                    input_ids=torch.tensor([alone]), pixel_values=pixels[row : row + 1]
                ).logits[0]
                wanted = logits[len(looker.PREFIX) + answered - where[0]]
                torch.testing.assert_close(together[row, answered], wanted, atol=2e-4, rtol=1e-3)
                if number:  # the control: with plain causal attention the other pairs leak in
                    assert (chained[row, answered] - wanted).abs().max() > 1e-2
                    compared += 1
    assert compared > 6


def test_the_loss_is_that_of_the_answers_and_half_precision_leaves_no_trace(model):
    pictures = scenes(generator(4), 2)
    packed = looker.pack(pictures, generator(5), 60, conversation=True)
    pixels = np.stack([p.pixels for p in pictures])
    with torch.no_grad():
        full = looker.forward_loss(model, packed, pixels, True)
        logits = model(
            input_ids=torch.from_numpy(packed["ids"]),
            use_cache=False,
            pixel_values=looker.normalize(pixels, model.lm_head.weight),
        ).logits
        wanted = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), torch.from_numpy(packed["targets"]).flatten(), ignore_index=-100
        )
        torch.testing.assert_close(full, wanted, atol=1e-4, rtol=1e-4)
        implementation = model.config.text_config._attn_implementation
        with pytest.raises(KeyError, match="planted"), looker._mixed_precision(model, True):
            half = looker.forward_loss(model, packed, pixels, True)
            raise KeyError("planted")
    assert model.config.text_config._attn_implementation == implementation
    assert 0 < abs(float(half - full)) < 0.05 * float(full)


def test_the_recipe_draws_the_same_batch_from_the_same_generator():
    recipe = looker.recipe(batch=4, length=50, sighted=3)
    network = looker.build(1)

    def loss(seed, step):
        with torch.no_grad():
            return float(recipe.loss(network, generator(seed), step))

    for step in (0, 5):  # the stage of the tower alone, and a later step
        assert loss(6, step) == loss(6, step) != loss(7, step)


def test_cell_labels_are_what_the_cells_show():
    pictures = scenes(generator(12), 5, shapes=(2, 5), numbers=(1, 2))
    colors, forms = [None, *COLORS], [None, *SHAPES]
    for picture, table in zip(pictures, looker.cell_labels(pictures), strict=True):
        shown = {}
        for thing in picture.objects:
            for place, cell in enumerate(thing.cells):
                shown[cell] = thing.digits[place] if thing.kind == "number" else thing.name
        for index, (color, form, digit, row, column) in enumerate(table):
            assert (row, column) == divmod(index, GRID)
            told = f"{colors[color]} {forms[form]}" if color else digit - 1 if digit else None
            assert shown.get((row, column)) == told
            assert not (digit and color)


def test_the_first_stage_reaches_the_tower_and_the_projector_only():
    network = looker.build(2)
    looker.cell_loss(network, scenes(generator(13), 2)).backward()
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    reached = {name for name, gradient in gradients.items() if gradient.any()}
    assert all("vision_tower" in name or "projector" in name for name in reached)
    assert any("projector" in name for name in reached)
    assert any("embeddings.patch" in name for name in reached)


# --------------------------------------------------------------------------------- measuring


def test_hiding_the_image_cuts_all_ways_from_it_and_is_undone(model):
    ids = torch.tensor([looker.prompt(Question("read", "what is the number ?", ""))])
    pixels = looker.normalize(
        np.stack([p.pixels for p in scenes(generator(8), 2)]), model.lm_head.weight
    )
    layers = model.config.text_config.num_hidden_layers

    def last(row):
        with torch.no_grad():
            return model(input_ids=ids, pixel_values=pixels[row : row + 1], use_cache=False).logits[
                0, -1
            ]

    plain = last(0)
    with looker._image_hidden_from(model, 0, ids.shape[1]):
        torch.testing.assert_close(last(0), last(1), atol=1e-5, rtol=0)
    with looker._image_hidden_from(model, layers - 1, ids.shape[1]):
        assert (last(0) - last(1)).abs().max() > 1e-3 and (last(0) - plain).abs().max() > 1e-4
    with looker._image_hidden_from(model, layers, ids.shape[1]):
        torch.testing.assert_close(last(0), plain)
    torch.testing.assert_close(last(0), plain)


def test_the_bundled_weights_open_like_any_model_and_fit(bundled):
    assert type(bundled).__name__ == "LlavaForConditionalGeneration"
    parameters = sum(p.numel() for p in bundled.parameters())
    assert 2e6 <= parameters <= 5e6
    assert all(path.stat().st_size <= 16 * 2**20 for path in WEIGHTS.iterdir())
    text = bundled.config.text_config
    assert text.num_attention_heads == 8 and text.num_hidden_layers >= 6
    processor = AutoProcessor.from_pretrained(WEIGHTS)
    assert processor.tokenizer.get_vocab() == looker.TOKEN
    right = []
    for seed in range(20):
        picture = scene(generator(seed))
        for question in questions(picture, generator(), tasks=("color", "position")):
            given = chat(processor, question.text.capitalize(), [draw(picture)])
            written = bundled.generate(**given, do_sample=False, max_new_tokens=4)
            text = processor.decode(written[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
            right.append(text == question.answer)
    assert len(right) > 30 and np.mean(right) > 0.9


TARGETS = {"color": 0.97, "shape": 0.97, "existence": 0.97, "digit": 0.95}


def test_the_bundled_weights_meet_the_targets_on_new_scenes(bundled):
    examples = 60
    measured = looker.evaluate(bundled, seed=20_000, examples=examples, described=2)
    for task, target in TARGETS.items():
        count = examples if task != "digit" else 2 * examples
        assert measured[task] >= target - 3 * sqrt(target * (1 - target) / count), measured


def test_the_bundled_model_really_looks(bundled):
    """The control: with the pictures exchanged, the same questions are answered near chance."""
    rng = generator(10)
    pictures = scenes(rng, 80, shapes=4, numbers=1)
    asked = [(p, questions(p, rng, tasks=("read",))[0]) for p in pictures]
    blind = [(other, q) for (_, q), other in zip(asked, [*pictures[1:], pictures[0]], strict=True)]
    right = np.mean([a == q.answer for a, (_, q) in zip(looker.answer(bundled, asked), asked)])
    wrong = np.mean([a == q.answer for a, (_, q) in zip(looker.answer(bundled, blind), blind)])
    assert right > 0.8 and wrong < 0.2


def test_the_card_says_what_was_measured():
    card = json.loads((WEIGHTS / "card.json").read_text(encoding="utf-8"))
    assert card["name"] == "looker" and card["seed"] is not None
    for task, target in TARGETS.items():
        assert card["accuracy"][task] >= target, task
    settings = looker.recipe().settings()
    for key in ("lr", "weight_decay", "steps", "betas"):
        assert card["recipe"][key] == settings[key], key
