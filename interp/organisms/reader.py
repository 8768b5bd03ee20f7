"""`reader`: a small Llama with grouped keys that reads a synthetic language of readable words.

Five things are to be learned in it: prose (a sparse Markov grammar whose trigger words follow the
Bigram-Backcopy rule of arXiv 2410.13835, known to grow an attention sink), facts stated in the
context ("note amber seven ten two ;") and asked for later ("recall amber"), facts that stand
nowhere but in the weights (a fixed table of cities), contexts that contradict that table (the
context is to win), and repeated random spans (induction).

From the second layer on, half of the heads are near heads: in training they pay for attention to
places far back. Without that price nearly every head of the second layer learns to retrieve, and
no head of that layer is left to compare the retrieval heads with.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from interp.organisms.train import Recipe

TRIGGERS = "the of and to in a with as for on by at".split()
PROSE = """
river stone bird cloud garden lamp road winter song table letter window horse market
bridge forest silver evening mother ship valley glass paper doctor morning island music
castle apple village farmer summer mirror shadow candle ocean teacher meadow train
basket friend story mountain kitchen pocket flower hunter carpet orchard thunder tower
wagon blanket hammer planet sister rain tunnel kettle ribbon captain desert engine
feather ladder magnet needle oven pencil quilt rabbit saddle temple umbrella violin
whistle yard anchor button cabin dragon elbow fountain guitar harbor insect jacket king
lemon monkey nest owl parade queen
""".split()
KEYS = """
amber agate basil beryl birch cedar clover cobalt coral cumin daisy ebony elm fern fig
flint garnet ginger granite hazel heather holly indigo iris ivory ivy jade jasmine
jasper juniper laurel lilac lily linden lotus magnolia mango maple marble mint moss
myrtle nutmeg oak olive onyx opal orchid pearl pepper pine poppy quartz rose ruby
saffron sage sapphire thyme topaz tulip violet walnut willow
""".split()
CITIES = """
athens berlin bergen cairo dublin florence geneva havana istanbul jakarta kyoto lisbon
london lima madrid milan munich nairobi naples oslo paris porto prague quito rome seoul
sofia tokyo tunis turin vienna zurich
""".split()
VALUES = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen
fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy
eighty ninety hundred thousand million dozen
""".split()
WORDS = [
    *("<bos>", "<pad>", "<unk>", "note", "recall", ";"),
    *(*TRIGGERS, *PROSE, *KEYS, *CITIES, *VALUES),
]
TOKEN = {word: index for index, word in enumerate(WORDS)}
BOS, NOTE, RECALL, END = (TOKEN[word] for word in ("<bos>", "note", "recall", ";"))
VALUE_LENGTH = 3
RECORD = VALUE_LENGTH + 3  # note/recall, key, value, ;
LENGTHS = (48, 128, 256, 512)
NEAR = 8  # near heads pay for looking this many tokens back, or more
_LANGUAGE_SEED = 2410_13835

_trigger = np.array([TOKEN[w] for w in TRIGGERS])
_prose = np.array([TOKEN[w] for w in PROSE])
_keys = np.array([TOKEN[w] for w in KEYS])
_cities = np.array([TOKEN[w] for w in CITIES])
_values = np.array([TOKEN[w] for w in VALUES])
_any = np.concatenate([_trigger, _prose, _keys, _cities, _values])


def _grammar() -> tuple[np.ndarray, np.ndarray]:
    """Cumulative next-token table of the prose words, and of the first word."""
    rng = np.random.default_rng(_LANGUAGE_SEED)
    size = len(TRIGGERS) + len(PROSE)
    table = np.zeros((size, size))
    for word in range(len(TRIGGERS), size):
        others = np.delete(np.arange(len(TRIGGERS), size), word - len(TRIGGERS))
        followers = rng.choice(others, 5, replace=False)
        table[word, followers] = 0.67 * rng.dirichlet(np.ones(5))
        table[word, rng.choice(len(TRIGGERS), 4, replace=False)] = 0.33 * rng.dirichlet(np.ones(4))
    first = np.zeros(size)
    first[len(TRIGGERS) :] = 1 / len(PROSE)
    return np.cumsum(table, 1), np.cumsum(first)


_CUMULATIVE, _FIRST = _grammar()
MEMORY = {
    int(city): [int(v) for v in values]
    for city, values in zip(
        _cities,
        np.random.default_rng(_LANGUAGE_SEED + 1).choice(_values, (len(CITIES), VALUE_LENGTH)),
    )
}


class ReaderPrompt(NamedTuple):
    """Token ids, named half-open segments, and the right answers by source."""

    tokens: list[int]
    segments: dict[str, tuple[int, int]]
    answers: dict[str, list[int]]


def words(tokens: list[int]) -> str:
    """The text of token ids.

    Example:
        >>> from interp.organisms import reader
        >>> reader.words([0, 3, reader.TOKEN["amber"]])
        '<bos> note amber'
    """
    return " ".join(WORDS[token] for token in tokens)


def prose(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Prose: after a trigger the word before it comes again, otherwise a Markov chain goes on.

    Example:
        >>> import numpy as np
        >>> from interp.organisms import reader
        >>> reader.prose(np.random.default_rng(0), 2, 10).shape
        (2, 10)
    """
    out = np.zeros((batch, length), dtype=np.int64)
    draws = rng.random((batch, length))
    for step in range(length):
        if step == 0:
            out[:, 0] = np.searchsorted(_FIRST, draws[:, 0], side="right")
            continue
        before = out[:, step - 1]
        chosen = (_CUMULATIVE[before] <= draws[:, step, None] * _CUMULATIVE[before, -1:]).sum(1)
        copied = out[:, max(0, step - 2)]
        out[:, step] = np.where(before < len(TRIGGERS), copied, chosen)
    return out + _trigger[0]  # trigger and prose words are neighbours in the vocabulary, in this order


def _value(rng: np.random.Generator) -> list[int]:
    return [int(v) for v in rng.choice(_values, VALUE_LENGTH)]


def _records(rng: np.random.Generator, count: int) -> list[tuple[int, int, list[int]]]:
    """`count` records (NOTE or RECALL, key, value); most recalls have a note to look up."""
    out: list[tuple[int, int, list[int]]] = []
    free = list(rng.permutation(_keys))
    cities = list(rng.permutation(_cities))
    fresh: list[tuple[int, list[int]]] = []
    asked: list[tuple[int, list[int]]] = []
    for index in range(count):
        left = count - index
        ask = bool(fresh) and (len(fresh) >= left or rng.random() < 0.45)
        if ask or not free or not cities:
            pool = fresh or asked
            key, value = pool.pop(int(rng.integers(len(pool))))
            asked.append((key, value))
            out.append((RECALL, key, value))
        elif left == 1 or rng.random() < 0.2:  # nothing in the context: only the weights know
            city = int(cities.pop())
            out.append((RECALL, city, MEMORY[city]))
        else:
            key = int(cities.pop()) if rng.random() < 0.25 else int(free.pop())
            fresh.append((key, _value(rng)))
            out.append((NOTE, key, fresh[-1][1]))
    return out


def _document(
    rng: np.random.Generator, stream: np.ndarray, density: float, chance: float
) -> tuple[np.ndarray, np.ndarray]:
    """A document of records and prose, len(stream) + 1 tokens, and the loss weight of each."""
    room = len(stream)
    count = max(1, int(density * room) // RECORD)
    records = _records(rng, count)
    spare = room - count * RECORD
    cuts = np.sort(rng.integers(0, spare + 1, count))
    gaps = np.diff(np.concatenate([[0], cuts, [spare]]))
    tokens, weights = (
        np.zeros(room + 1, dtype=np.int64),
        np.full(room + 1, chance, dtype=np.float32),
    )
    tokens[0] = BOS
    position, used = 1, 0
    for index, gap in enumerate(gaps):
        if gap:
            # A piece may not begin with a trigger: what it copies would be missing.
            if stream[used] <= _trigger[-1] and used + gap < room:
                used += 1
            piece = stream[used : used + gap]
            tokens[position : position + gap] = piece
            after = np.flatnonzero(piece[:-1] <= _trigger[-1]) + 1
            weights[position + after[after >= 2]] = 1.0
            position, used = position + gap, used + gap
        if index < count:
            kind, key, value = records[index]
            tokens[position : position + RECORD] = [kind, key, *value, END]
            weights[position + 2 : position + RECORD - 1] = 1.0 if kind == RECALL else chance
            position += RECORD
    return tokens, weights


def sample(
    rng: np.random.Generator, batch: int, length: int, *, repeated: float = 0.2, chance: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """A training batch: token ids and the loss weight of each token, both `[batch, length]`.

    Example:
        >>> import numpy as np
        >>> from interp.organisms import reader
        >>> tokens, weights = reader.sample(np.random.default_rng(0), 4, 48)
        >>> tokens.shape, bool((tokens[:, 0] == reader.BOS).all())
        ((4, 48), True)

    A share `repeated` of the sequences is one random span over and over; the others are documents
    of records and prose. What can be known (recalls, copies, repetitions) weighs 1, what is drawn
    at random `chance`: near 0 retrieval is learned sooner; near 1 a head that has nothing to find
    must learn to write nothing, and the attention sink grows.
    """
    tokens = np.empty((batch, length), dtype=np.int64)
    weights = np.empty((batch, length), dtype=np.float32)
    streams = prose(rng, batch, length - 1)
    spans = rng.random(batch) < repeated
    for row in range(batch):
        if spans[row]:
            span = int(rng.integers(6, max(8, length // 2)))
            drawn = rng.choice(_any, span)
            tokens[row] = np.concatenate([[BOS], np.resize(drawn, length - 1)])
            weights[row] = 1.0
            weights[row, : span + 2] = chance
        else:
            few = rng.random() < 0.2
            density = RECORD * rng.integers(2, 6) / length if few else rng.uniform(0.2, 0.9)
            tokens[row], weights[row] = _document(rng, streams[row], float(density), chance)
    return tokens, weights


def needle(
    length: int, depth: float | int, rng: np.random.Generator, *, distractors: int = 2
) -> ReaderPrompt:
    """A fact at a relative depth in prose, with other facts around it, and the question at the end.

    Example:
        >>> import numpy as np
        >>> from interp.organisms import reader
        >>> prompt = reader.needle(48, 0.5, np.random.default_rng(0))
        >>> len(prompt.tokens), sorted(prompt.segments)
        (48, ['bos', 'haystack', 'needle', 'needle_key', 'needle_value', 'question'])

    `length` counts every token of the prompt; `answers["context"]` are the tokens that should
    follow. Depth 0 puts the needle right after BOS, 1 right before the question. ValueError where
    it does not fit.
    """
    return _asked(length, depth, rng, distractors, int(rng.choice(_keys)), _value(rng))


def conflict(
    length: int,
    depth: float | int,
    rng: np.random.Generator,
    *,
    fact: bool = True,
    distractors: int = 2,
    city: str | None = None,
) -> ReaderPrompt:
    """A question on a memorized city, with a contradicting fact or (`fact=False`) without it.

    Example:
        >>> import numpy as np
        >>> from interp.organisms import reader
        >>> prompt = reader.conflict(48, 0.5, np.random.default_rng(0), city="paris")
        >>> sorted(prompt.answers), prompt.answers["memory"] == reader.MEMORY[reader.TOKEN["paris"]]
        (['context', 'memory'], True)

    `answers["memory"]` is the table's value, `answers["context"]` the stated one, different in
    every token. Without the fact there is no segment `needle` and no answer `context`; the prompt
    is as long.
    """
    if city is not None and city not in CITIES:
        raise ValueError(f"unknown city {city!r}. Choose one of: {', '.join(CITIES)}.")
    key = int(rng.choice(_cities)) if city is None else TOKEN[city]
    memory = MEMORY[key]
    value = [int(rng.choice(_values[_values != known])) for known in memory]
    prompt = _asked(length, depth, rng, distractors, key, value if fact else None)
    return prompt._replace(answers={**prompt.answers, "memory": list(memory)})


def repeated(span: int, rng: np.random.Generator, *, times: int = 2) -> ReaderPrompt:
    """BOS and a span of random words, `times` times over.

    Example:
        >>> import numpy as np
        >>> from interp.organisms import reader
        >>> prompt = reader.repeated(5, np.random.default_rng(0))
        >>> prompt.segments
        {'bos': (0, 1), 'first': (1, 6), 'repeat': (6, 11)}
    """
    if span < 1 or times < 2:
        raise ValueError(
            f"a repeated span needs span >= 1 and times >= 2, not span={span}, times={times}."
        )
    drawn = [int(token) for token in rng.choice(_any, span)]
    segments = {"bos": (0, 1), "first": (1, span + 1), "repeat": (span + 1, span * times + 1)}
    return ReaderPrompt([BOS, *drawn * times], segments, {"context": drawn * (times - 1)})


def _asked(
    length: int,
    depth: float | int,
    rng: np.random.Generator,
    distractors: int,
    key: int,
    value: list[int] | None,
) -> ReaderPrompt:
    room = length - 3 - (distractors + (value is not None)) * RECORD
    if room < 0 or not 0 <= depth <= 1 or distractors < 0:
        shortest = 3 + (distractors + (value is not None)) * RECORD
        raise ValueError(
            f"no needle prompt of {length} tokens at depth {depth} with {distractors} other facts: "
            f"use at least {shortest} tokens and a depth from 0 to 1."
        )
    others = rng.choice(_keys[_keys != key], distractors, replace=False)
    # Blocks that stay whole: prose is cut into single words, records are not.
    blocks: list[list[int]] = [[int(token)] for token in prose(rng, 1, room)[0]]
    for other in others:
        blocks.insert(int(rng.integers(len(blocks) + 1)), [NOTE, int(other), *_value(rng), END])
    starts = np.concatenate([[0], np.cumsum([len(block) for block in blocks])])
    segments = {"bos": (0, 1), "haystack": (1, length - 2), "question": (length - 2, length)}
    answers: dict[str, list[int]] = {}
    if value is not None:
        place = int(np.argmin(np.abs(starts - depth * starts[-1])))
        blocks.insert(place, [NOTE, key, *value, END])
        start = 1 + int(starts[place])
        segments.update(
            needle=(start, start + RECORD),
            needle_key=(start + 1, start + 2),
            needle_value=(start + 2, start + 2 + VALUE_LENGTH),
        )
        answers["context"] = list(value)
    return ReaderPrompt(
        [BOS, *(token for block in blocks for token in block), RECALL, key], segments, answers
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """The word-level tokenizer: words separated by blanks, BOS put in front.

    Example:
        >>> from interp.organisms import reader
        >>> reader.tokenizer()("note amber seven ten two ;").input_ids[0]
        0
    """
    raw = Tokenizer(models.WordLevel(TOKEN, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token=";",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=1024,
        padding_side="left",
    )


def build(
    seed: int, *, d_model: int = 128, layers: int = 4, heads: int = 8, kv_heads: int = 4
) -> LlamaForCausalLM:
    """The untrained model.

    Example:
        >>> from interp.organisms import reader
        >>> type(reader.build(0, layers=1)).__name__
        'LlamaForCausalLM'
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=d_model // 4,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=TOKEN["<pad>"],
    )
    return LlamaForCausalLM(config)


def stage(step: int, steps: int, rng: np.random.Generator) -> int:
    """The length of a step's sequences: 48, then 128, 256 and 512, with shorter ones kept in.

    Example:
        >>> import numpy as np
        >>> from interp.organisms import reader
        >>> reader.stage(0, 100, np.random.default_rng(0))
        48
    """
    done = step / steps
    reached = 0 if done < 0.2 else 1 if done < 0.5 else 2 if done < 0.75 else 3
    back = int(rng.choice(3, p=(0.7, 0.2, 0.1)))
    return LENGTHS[max(0, reached - back)]


def _loss(
    model: Any, tokens: np.ndarray, weights: np.ndarray, far: float = 0.0
) -> Tensor:
    """Weighted next-token loss, plus `far` for the attention that near heads spend far away."""
    ids = torch.as_tensor(tokens).to(model.device)
    weight = torch.as_tensor(weights).to(model.device)[:, 1:].reshape(-1)
    if far:
        model.set_attn_implementation("eager")  # the others give no weights
    with torch.autocast(model.device.type, torch.bfloat16):  # a third faster, on one core too
        result = model(input_ids=ids, use_cache=False, output_attentions=far > 0)
        logits = result.logits[:, :-1].flatten(0, 1)
    each = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:].reshape(-1), reduction="none")
    loss = (each * weight).sum() / weight.sum()
    if not far or len(result.attentions) < 2:
        return loss
    heads, length = model.config.num_attention_heads, ids.shape[1]
    away = torch.ones(length, length, device=ids.device).tril(-NEAR)
    away[:, 0] = 0  # a head with nothing to do may rest on BOS
    spent = [(layer[:, heads // 2 :].float() * away).sum(-1).mean() for layer in result.attentions[1:]]
    return loss + far * torch.stack(spent).mean()


def _right(model: Any, prompts: list[ReaderPrompt], source: str) -> float:
    """Share of prompts whose whole answer would be given greedily, token by token."""
    hits = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        answers = torch.tensor([p.answers[source] for p in part], device=model.device)
        ids = torch.cat([torch.tensor([p.tokens for p in part], device=model.device), answers], 1)
        logits = model(input_ids=ids, use_cache=False).logits[:, -1 - answers.shape[1] : -1]
        hits.append((logits.argmax(-1) == answers).all(1).float())
    return float(torch.cat(hits).mean())


@torch.no_grad()
def evaluate(model: Any, seed: int, *, count: int = 128) -> dict[str, float]:
    """Accuracy per task on held-out prompts: whole answers for facts, tokens for copies and spans.

    Example:
        >>> from interp.organisms import reader
        >>> found = reader.evaluate(reader.build(0, layers=1), 0, count=2)
        >>> [task for task in found if task.startswith("needle")]
        ['needle_48', 'needle_128', 'needle_256', 'needle_512']
    """
    rng = np.random.default_rng([seed, 1])
    out = {}
    for length in LENGTHS:
        out[f"needle_{length}"] = _right(
            model, [needle(length, rng.random(), rng) for _ in range(count)], "context"
        )
    known = [conflict(64, rng.random(), rng, fact=False) for _ in range(count)]
    out["memory"] = _right(model, known, "memory")
    against = [conflict(64, rng.random(), rng) for _ in range(count)]
    out["conflict_context_wins"] = _right(model, against, "context")
    out["conflict_memory_wins"] = _right(model, against, "memory")
    spans = torch.tensor([repeated(30, rng).tokens for _ in range(count)], device=model.device)
    predicted = model(input_ids=spans, use_cache=False).logits.argmax(-1)
    out["repeated_span"] = float((predicted[:, 32:-1] == spans[:, 33:]).float().mean())
    text = torch.tensor(prose(rng, count, 63), device=model.device)
    text = torch.cat([torch.full_like(text[:, :1], BOS), text], 1)
    predicted = model(input_ids=text, use_cache=False).logits.argmax(-1)
    trigger = text[:, 2:-1] <= int(_trigger[-1])
    out["trigger_copy"] = float((predicted[:, 2:-1] == text[:, 3:])[trigger].float().mean())
    return out


@torch.no_grad()
def observe(model: Any, seed: int, *, count: int = 100) -> dict[str, float]:
    """The first-token sink on held-out sequences of 64 tokens: documents, prose, random words.

    Example:
        >>> from interp.organisms import reader
        >>> reader.observe(reader.build(0, layers=2), 0, count=2)["sink_1_percent_documents"]
        0.0

    Sink_1 at 0.3: percent of (sample, layer, head) whose mean attention to BOS is above 0.3
    (arXiv 2410.10781). Also the mean of the strongest head, and on documents the largest ratio of
    residual norms after a block, BOS to others.
    """
    rng = np.random.default_rng([seed, 2])
    bos = np.full((count, 1), BOS)
    texts = {
        "documents": sample(rng, count, 64, repeated=0.0)[0],
        "prose": np.concatenate([bos, prose(rng, count, 63)], 1),
        "random": np.concatenate([bos, rng.choice(_any, (count, 63))], 1),
    }
    found, before = {}, model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        for name, tokens in texts.items():
            ids = torch.as_tensor(tokens).to(model.device)
            result = model(
                input_ids=ids, use_cache=False, output_attentions=True, output_hidden_states=True
            )
            received = torch.stack([a[..., 0].mean(-1) for a in result.attentions])
            found[f"sink_1_percent_{name}"] = float((received > 0.3).float().mean()) * 100
            found[f"strongest_head_mass_{name}"] = float(received.mean(1).max())
            if name == "documents":
                norms = [hidden.norm(dim=-1) for hidden in result.hidden_states[1:-1]]
                found["residual_norm_ratio"] = float(
                    max(norm[:, 0].mean() / norm[:, 1:].mean() for norm in norms)
                )
    finally:
        model.set_attn_implementation(before)
    return found


def _measure(model: torch.nn.Module, seed: int) -> dict[str, float]:
    return evaluate(model, seed)


def _export(model: torch.nn.Module, folder: Path) -> None:
    tokenizer().save_pretrained(folder)


def recipe(
    *, steps: int = 4_500, lr: float = 2e-3, weight_decay: float = 0.1, tokens: int = 2304,
    far: float = 0.3,
) -> Recipe:
    """The recipe of `reader`; `tokens` is the size of a batch in tokens, whatever its length.

    `far` is what the near heads (the second half of the heads of every layer but the first) pay for
    the share of their attention that goes `NEAR` tokens back or further, BOS excepted.

    Example:
        >>> from interp.organisms import reader
        >>> reader.recipe(steps=5).name
        'reader'
    """

    def loss(model: torch.nn.Module, rng: np.random.Generator, step: int) -> Tensor:
        length, early = stage(step, steps, rng), step < 0.1 * steps
        repeated, chance = (0.4, 0.1) if early else (0.2, 0.5)
        batch = sample(rng, tokens // length, length, repeated=repeated, chance=chance)
        return _loss(model, *batch, far)

    notes, data = (part.strip().replace("\n", " ") for part in str(__doc__).split("\n\n")[:2])
    return Recipe(
        name="reader",
        build=build,
        loss=loss,
        evaluate=_measure,
        observe=observe,
        export=_export,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        decay="all",
        evaluate_every=1000,
        checkpoint_every=250,
        notes=notes,
        data=data
        + f" Every step draws fresh sequences of one length, {tokens} tokens in all: 48 in the first"
        " fifth of the steps, then up to 128, from one half on up to 256, from three quarters on up to"
        f" 512; BOS always comes first. The loss adds {far} times the mean share of attention that the"
        f" second half of the heads, in every layer but the first, spends {NEAR} or more tokens back"
        " (BOS excepted), so that every such layer has heads that do not look far. Matrix products run"
        " in bfloat16.",
    )
