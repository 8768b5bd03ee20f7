"""The reader's language is what it claims to be, and the bundled model reads it."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from interp.organisms import reader, registry, train

TRIGGERS = [reader.TOKEN[word] for word in reader.TRIGGERS]
KEYS = {reader.TOKEN[word] for word in (*reader.KEYS, *reader.CITIES)}
VALUES = {reader.TOKEN[word] for word in reader.VALUES}


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_every_word_is_one_token_and_text_survives_the_round_trip(tmp_path):
    from transformers import AutoTokenizer

    assert len(set(reader.WORDS)) == len(reader.WORDS) == len(reader.TOKEN)
    reader.tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = reader.sample(rng(), 3, 48)[0][2].tolist()
    text = reader.words(ids[1:])
    assert tokenizer(text).input_ids == ids and tokenizer.decode(ids[1:]) == text
    assert tokenizer("note xylophone").input_ids == [
        reader.BOS,
        reader.NOTE,
        tokenizer.unk_token_id,
    ]


def test_prose_copies_after_triggers_and_is_sparse_elsewhere():
    text = reader.prose(rng(), 50, 80)
    trigger = np.isin(text, TRIGGERS)
    assert not trigger[:, 0].any() and 0.2 < trigger.mean() < 0.3
    row, place = np.nonzero(trigger[:, :-1])
    assert (text[row, place + 1] == text[row, place - 1]).all()
    followers: dict[int, set[int]] = {}
    row, place = np.nonzero(~trigger[:, :-1])
    for word, after in zip(text[row, place], text[row, place + 1]):
        followers.setdefault(int(word), set()).add(int(after))
    assert max(len(after) for after in followers.values()) <= 9  # 5 words and 4 triggers
    # Control: in shuffled prose both laws are broken.
    shuffled = rng(1).permuted(text, axis=1)
    row, place = np.nonzero(np.isin(shuffled, TRIGGERS)[:, 1:-1])
    assert (shuffled[row, place + 2] == shuffled[row, place]).mean() < 0.2


@pytest.mark.parametrize("length", [48, 131])
def test_every_recall_repeats_its_note_or_the_memorized_table(length):
    tokens, weights = reader.sample(rng(length), 60, length, repeated=0.0, chance=0.25)
    assert tokens.shape == weights.shape == (60, length)
    assert (tokens[:, 0] == reader.BOS).all()
    noted = remembered = against = 0
    for row, weight in zip(tokens.tolist(), weights.tolist()):
        notes: dict[int, list[int]] = {}
        for place, token in enumerate(row):
            if token not in (reader.NOTE, reader.RECALL):
                continue
            _, key, *value, end = row[place : place + reader.RECORD]
            assert key in KEYS and set(value) <= VALUES and end == reader.END
            known = weight[place + 2 : place + 2 + reader.VALUE_LENGTH]
            if token == reader.NOTE:
                assert known == [0.25] * reader.VALUE_LENGTH and key not in notes
                notes[key] = value
                continue
            assert known == [1.0] * reader.VALUE_LENGTH
            assert value == (notes[key] if key in notes else reader.MEMORY[key])
            noted += key in notes
            remembered += key not in notes
            against += key in notes and key in reader.MEMORY and value != reader.MEMORY[key]
    assert noted > 50 and remembered > 20 and against > 10


def test_what_weighs_one_in_prose_is_a_copy():
    tokens, weights = reader.sample(rng(3), 40, 64, repeated=0.0, chance=0.25)
    prose = np.isin(tokens, [reader.TOKEN[w] for w in (*reader.TRIGGERS, *reader.PROSE)])
    row, place = np.nonzero(prose & (weights == 1))
    assert len(row) > 100
    assert np.isin(tokens[row, place - 1], TRIGGERS).all()
    assert (tokens[row, place] == tokens[row, place - 2]).all()


def test_repeated_sequences_repeat_and_weigh_what_can_be_known():
    tokens, weights = reader.sample(rng(4), 30, 50, repeated=1.0, chance=0.25)
    for row, weight in zip(tokens[:, 1:], weights[:, 1:]):
        span = int((weight < 1).sum()) - 1
        assert 6 <= span < 25 and (row[span:] == row[:-span]).all()
        assert (weight[: span + 1] < 1).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    length=st.integers(27, 300),
    depth=st.floats(0, 1),
    distractors=st.integers(0, 3),
)
def test_a_needle_prompt_is_what_its_segments_say(seed, length, depth, distractors):
    prompt = reader.needle(length, depth, rng(seed), distractors=distractors)
    tokens, segments = prompt.tokens, prompt.segments
    assert len(tokens) == length and all(type(token) is int for token in tokens)
    start, stop = segments["needle"]
    key, value = tokens[start + 1], tokens[slice(*segments["needle_value"])]
    assert [tokens[start], tokens[stop - 1]] == [reader.NOTE, reader.END]
    assert value == prompt.answers["context"] and tokens[slice(*segments["needle_key"])] == [key]
    assert tokens[slice(*segments["question"])] == [reader.RECALL, key] == tokens[-2:]
    assert tokens.count(key) == 2 and tokens.count(reader.NOTE) == distractors + 1
    assert 1 <= start < stop <= length - 2


def test_depth_moves_the_needle_from_the_start_to_the_question():
    starts = [reader.needle(100, d, rng(5)).segments["needle"][0] for d in (0, 0.25, 0.5, 0.75, 1)]
    assert starts == sorted(set(starts)) and starts[0] == 1
    assert reader.needle(100, 1, rng(5)).segments["needle"][1] == 98
    assert abs(starts[2] - 47) <= reader.RECORD


def test_a_conflict_differs_from_memory_in_every_token():
    for seed in range(20):
        prompt = reader.conflict(60, 0.3, rng(seed), city="tokyo")
        memory, context = prompt.answers["memory"], prompt.answers["context"]
        assert memory == reader.MEMORY[reader.TOKEN["tokyo"]]
        assert all(m != c for m, c in zip(memory, context))
        assert prompt.tokens[slice(*prompt.segments["needle_value"])] == context
    without = reader.conflict(60, 0.3, rng(1), fact=False, city="tokyo")
    assert len(without.tokens) == 60 and "needle" not in without.segments
    assert sorted(without.answers) == ["memory"]
    assert without.tokens.count(reader.TOKEN["tokyo"]) == 1


def test_a_repeated_prompt_repeats():
    prompt = reader.repeated(7, rng(), times=3)
    assert len(prompt.tokens) == 22 and prompt.tokens[1:8] * 2 == prompt.answers["context"]
    assert prompt.tokens[slice(*prompt.segments["repeat"])] == prompt.tokens[1:8] * 2


def test_bad_prompts_are_refused_with_a_sentence():
    with pytest.raises(ValueError, match="no needle prompt of 20 tokens .* use at least 21 tokens"):
        reader.needle(20, 0.5, rng())
    with pytest.raises(ValueError, match="at depth 1.5"):
        reader.needle(60, 1.5, rng())
    with pytest.raises(ValueError, match="unknown city 'atlantis'. Choose one of: athens"):
        reader.conflict(60, 0.5, rng(), city="atlantis")
    with pytest.raises(ValueError, match="span=0"):
        reader.repeated(0, rng())


def test_the_curriculum_lengthens_and_keeps_short_sequences():
    generator = rng()
    seen = [{reader.stage(step, 100, generator) for _ in range(200)} for step in (0, 40, 70, 90)]
    assert seen == [{48}, {48, 128}, {48, 128, 256}, {128, 256, 512}]


@pytest.fixture(scope="module")
def bundled():
    from transformers import AutoModelForCausalLM

    folder = registry.path("reader")
    card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
    return folder, card, AutoModelForCausalLM.from_pretrained(folder).eval()


def answer(model, prompt: reader.ReaderPrompt) -> list[int]:
    ids = torch.tensor([prompt.tokens])
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=reader.VALUE_LENGTH + 1, do_sample=False)
    return out[0, len(prompt.tokens) :].tolist()


def test_the_bundled_model_answers_from_the_needle_and_only_from_it(bundled):
    folder, card, model = bundled
    assert all(file.stat().st_size <= 16 * 2**20 for file in folder.iterdir())
    right = moved = lost = 0
    for seed in range(20):
        prompt = reader.needle(120, seed / 19, rng(1000 + seed))
        expected = prompt.answers["context"]
        right += answer(model, prompt) == [*expected, reader.END]
        start, stop = prompt.segments["needle_value"]
        other = [reader.TOKEN[w] for w in ("hundred", "dozen", "zero")]
        tokens = [*prompt.tokens[:start], *other, *prompt.tokens[stop:]]
        moved += answer(model, prompt._replace(tokens=tokens))[:3] == other
        tokens = [*prompt.tokens]
        tokens[start - 1] = reader.TOKEN["river"]  # the fact no longer names the key
        lost += answer(model, prompt._replace(tokens=tokens))[:3] != expected
    assert right >= 19 and moved >= 19 and lost >= 15


@torch.no_grad()
def test_near_heads_pay_for_looking_far_and_nobody_else_does():
    model = reader.build(0, layers=2)
    tokens, weights = reader.sample(rng(), 2, 48)
    free = reader._loss(model, tokens, weights)
    paid = reader._loss(model, tokens, weights, far=1.0)
    model.set_attn_implementation("eager")
    ids = torch.as_tensor(tokens)
    second = model(input_ids=ids, output_attentions=True).attentions[1]  # [batch, head, query, key]
    share = torch.stack([second[:, 4:, query, 1 : max(1, query - reader.NEAR + 1)].sum(-1)
                         for query in range(48)], -1).mean()
    assert float(paid - free) == pytest.approx(float(share), abs=2e-2)  # bfloat16 in training
    shallow = reader.build(0, layers=1)
    assert reader._loss(shallow, tokens, weights, far=1.0) == reader._loss(shallow, tokens, weights)


def test_the_bundled_model_has_near_heads_beside_its_retrieval_heads(bundled):
    prompts = [reader.needle(128, depth, rng(7)).tokens for depth in (0.1, 0.5, 0.8)]
    _, _, model = bundled
    with torch.no_grad():
        model.set_attn_implementation("eager")
        layers = model(input_ids=torch.tensor(prompts), output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
    away = torch.ones(128, 128).tril(-reader.NEAR)
    away[:, 0] = 0
    spent = torch.stack([(layer * away).sum(-1).mean((0, 2)) for layer in layers])  # [layer, head]
    assert float(spent[1:, 4:].max()) < 0.02 < float(spent[1:, :4].mean())


def test_the_bundled_model_meets_its_targets_on_new_data(bundled):
    folder, card, model = bundled
    found = reader.evaluate(model, 4711, count=32)
    assert min(found[f"needle_{length}"] for length in reader.LENGTHS) >= 0.9
    assert (
        found["memory"] >= 0.9 and found["repeated_span"] >= 0.9 and found["trigger_copy"] >= 0.95
    )
    assert found["conflict_context_wins"] >= 0.9 > 0.05 >= found["conflict_memory_wins"]


def test_the_card_says_what_is_measured_again(bundled):
    folder, card, model = bundled
    assert min(card["accuracy"][f"needle_{length}"] for length in reader.LENGTHS) >= 0.95
    again = train.evaluate(registry.recipe("reader"), model, card["held_out_seed"])
    assert again == pytest.approx(card["accuracy"], abs=1e-3)
    with torch.no_grad():
        assert reader.observe(model, card["held_out_seed"]) == pytest.approx(
            card["observed"], rel=1e-2
        )
    # The numbers, not the words: the recipe in the code is the one the weights were made with.
    code = json.loads(json.dumps(registry.recipe("reader").settings()))
    words = {"notes", "data"}
    assert {k: v for k, v in card["recipe"].items() if k not in words} == {
        k: v for k, v in code.items() if k not in words
    }
