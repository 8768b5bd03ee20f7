"""Short prompts whose outcome is one number, and which of their tokens that number depends on.

The bundled `reader` is asked for facts and for copies after trigger words; models that read English
for the number of a verb; encoders of sentences how close two halves of a passage are; all others
how sure they are of their first guess.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from experiments import _passages, _texts
from experiments._paper import Settings
from interp.core import Prompt, statistics
from interp.flow import knockout, max_flow, rollout, saliency
from interp.flow.mixing import value_weighted
from interp.flow.saliency import Contrast
from interp.models.model import Model
from interp.organisms import reader

TARGETS = {"blank": "blanked token", "knockout": "knocked-out token", "gradient": "gradient",
           "gradient_input": "gradient × input"}
KINDS = ("raw", "rollout", "flow", "norms", "values", "transformed")
NAMES = {"raw": "raw attention", "rollout": "rollout", "flow": "flow", "uniform": "uniform attention",
         "norms": "rollout, measured residual", "values": "rollout, value-weighted",
         "transformed": "rollout, transformed tokens"}
NOUNS = (("key", "keys"), ("picture", "pictures"), ("letter", "letters"), ("boat", "boats"),
         ("lamp", "lamps"), ("story", "stories"), ("garden", "gardens"), ("window", "windows"))
FRAMES = ("The {s} near the {o}", "We saw that the {s} behind the {o}", "Today the {s} of the {o}")
MOST_LAYERS = 6
"""Layers of which flow, and saliency of what enters them, are computed."""
SURE = 0.1
"""With a smaller probability of the first guess nothing is predicted."""


@dataclass
class Task:
    """Prompts of one kind; `neutral` tokens are put in the place of others; `unfit` says why the
    model cannot do it (then nothing is claimed)."""

    name: str
    what: str
    items: list[Contrast]
    neutral: list[int]
    mask: int | None = None
    unfit: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)


def tasks(model: Model, settings: Settings) -> list[Task]:
    """What a model is asked. At most 32 tokens per prompt, since flow is one problem per input."""
    count, rng = settings.pick(16, tiny=5), settings.rng(1)
    headless = not model.run(Prompt(tuple(model._probe())), logits="last").logits
    if _texts.knows(model, reader):
        made = [_needles(count, rng), _copies(count, rng)][: settings.pick(2, tiny=1)]
    elif headless:
        made = [_similar(model, min(count, 6), rng)]
    elif _passages.readable(model):
        made = [_agreement(model, count, rng)]
    else:
        made = []
    made = [one for one in made if one is not None] or [_guesses(model, count, rng)]
    special = {*(getattr(model.tokenizer, "all_special_ids", None) or ())}
    for one in made:
        words = sorted({t for item in one.items for t in item.prompt.ids[1:]} - special)
        if _texts.knows(model, reader):
            # Words of prose: another key would make a second answer.
            words = [reader.TOKEN[word] for word in reader.PROSE]
        draws = 2 if headless else settings.pick(4, tiny=2)
        one.neutral = [int(t) for t in rng.choice(words, draws, replace=len(words) < draws)]
        one.mask = getattr(model.tokenizer, "mask_token_id", None) if model.kind == "encoder" else None
        one.unfit = one.unfit or _unfit(model, one)
    return made


def _needles(count: int, rng: np.random.Generator) -> Task:
    items = []
    for _ in range(count):
        made = reader.needle(32, float(rng.random()), rng)
        answer = made.answers["context"][0]
        start, stop = made.segments["needle"]
        notes = [p for p, t in enumerate(made.tokens) if t == reader.NOTE and not start <= p < stop]
        others = [made.tokens[p + 2] for p in notes if made.tokens[p + 2] != answer]
        prompt = Prompt.from_tokens(made.tokens, made.segments,
                                    [reader.WORDS[t] for t in made.tokens])
        items.append(Contrast(prompt, (answer, others[0] if others else reader.END)))
    return Task("needle", "facts in 32 tokens: the stated value against that of another fact", items,
                [])


def _copies(count: int, rng: np.random.Generator) -> Task:
    triggers = {reader.TOKEN[word] for word in reader.TRIGGERS}
    items: list[Contrast] = []
    while len(items) < count:
        row = [reader.BOS, *(int(t) for t in reader.prose(rng, 1, 24)[0])]
        ends = [p for p in range(12, 24) if row[p] in triggers and row[p - 1] not in triggers]
        if not ends:
            continue
        ids, answer = row[: ends[-1] + 1], row[ends[-1] - 1]
        other = next(t for t in reversed(ids[:-2]) if t not in triggers and t != answer)
        items.append(Contrast(
            Prompt.from_tokens(ids, tokens=[reader.WORDS[t] for t in ids]), (answer, other)))
    return Task("copy", "prose that ends in a trigger word: the word before it against another", items,
                [])


def _agreement(model: Model, count: int, rng: np.random.Generator) -> Task | None:
    """The number of a verb, with a noun in between; None where a verb is not one token apart."""
    mask = getattr(model.tokenizer, "mask_token", None)
    masked = model.kind == "encoder" and mask is not None
    items = []
    for _ in range(count):
        subject, other = rng.choice(len(NOUNS), 2, replace=False)
        many = int(rng.integers(2))
        text = str(rng.choice(FRAMES)).format(s=NOUNS[subject][many], o=NOUNS[other][1 - many])
        ids = [int(t) for t in model.tokenizer(f"{text} {mask} old." if masked else text)["input_ids"]]
        verbs = []
        for verb in ("is", "are"):
            whole = [int(t) for t in model.tokenizer(f"{text} {verb} old.")["input_ids"]]
            same = next((i for i, (a, b) in enumerate(zip(ids, whole)) if a != b),
                        min(len(ids), len(whole)))
            verbs.append(whole[same] if same < len(whole) else -1)
        if verbs[0] == verbs[1] or -1 in verbs:
            return None
        if masked:
            query = ids.index(model.tokenizer.mask_token_id)
        else:
            # A decoder predicts after the text itself, without what closes it.
            whole = [int(t) for t in model.tokenizer(f"{text} is old.")["input_ids"]]
            ids = whole[: whole.index(verbs[0])] if verbs[0] in whole else ids
            query = len(ids) - 1
        items.append(Contrast(_named(model, ids), (verbs[many], verbs[1 - many]), query))
    return Task("agreement", "the number of a verb after a noun of the other number", items, [])


def _similar(model: Model, count: int, rng: np.random.Generator) -> Task:
    """Closeness to the other half of a passage, as vectors of sentences are compared."""
    if _passages.readable(model):
        _, firsts, seconds = _passages.pairs(model, count, 12)
        what = "cosine with the other half of the passage, both cut to 12 tokens"
    else:
        texts, _ = _passages.other_texts(model, 2 * count, 12, rng)
        firsts, seconds = texts[:count], texts[count:]
        what = "cosine with another text of 12 random tokens"
    last = f"resid_post.{model.n_layers - 1}"
    read = model.run(seconds, read=last, logits="none").reads[last].values[:, 0]
    partners = [torch.tensor(x[: len(p)].mean(0)) for x, p in zip(read, seconds)]
    items = []
    for prompt, partner in zip(firsts, partners):
        named = prompt if model.tokenizer is None else replace(
            prompt, tokens=_named(model, list(prompt.ids)).tokens)
        items.append(Contrast(named, partner=partner, query=None))
    return Task("similarity", what, items, [], notes={"partners": partners})


def _guesses(model: Model, count: int, rng: np.random.Generator) -> Task:
    """The first guess against the second, in the last row of texts that need not make sense."""
    length = min(20, model.max_positions or 20)
    if _passages.readable(model):
        texts, what = _texts.natural(model, count, length, rng), "English"
    else:
        texts, what = _passages.other_texts(model, count, length, rng)
    items = []
    for prompt, rows in zip(texts, model.run(texts, logits="last").logits):
        first, second = (int(t) for t in rows[-1].topk(2).indices)
        items.append(Contrast(prompt, (first, second)))
    return Task("guess", f"{what}, cut to {length} tokens: the first guess against the second", items,
                [])


def _named(model: Model, ids: Sequence[int]) -> Prompt:
    words = [str(w) for w in model.tokenizer.convert_ids_to_tokens([int(i) for i in ids])]
    return Prompt.from_tokens(ids, tokens=words)


def _unfit(model: Model, task: Task) -> str:
    """Why it means nothing to ask which tokens an answer depends on, "" if it does."""
    if task.name == "similarity":
        own = [saliency.outcomes(model, [replace(item, partner=p) for p in task.notes["partners"]])
               for item in task.items]
        right = sum(int(np.argmax(row)) == i for i, row in enumerate(own))
        found = statistics.rate(right, len(task))
        return "" if found.interval[0] > 1 / len(task) else (
            f"{model.name} finds the other half of {right} of {len(task)} texts")
    found = saliency.outcomes(model, task.items)
    if task.name == "guess":
        # p(first) - p(second) is no larger than p(first).
        rows = model.run([item.prompt for item in task.items], logits="last").logits
        sure = float(np.mean([float(row[-1].softmax(-1).max()) for row in rows]))
        if sure < SURE:
            return (f"{model.name} knows no task here, and its first guess has a probability of "
                    f"{sure:.3f}")
        # The same last token after another text: a guess that stays depends on nothing else.
        swapped = []
        for item, next_ in zip(task.items, [*task.items[1:], task.items[0]]):
            ids = (*next_.prompt.ids[: len(item.prompt) - 1], item.prompt.ids[-1])
            swapped.append(replace(item, prompt=replace(item.prompt, ids=ids)))
        moved = float(np.abs(saliency.outcomes(model, swapped) - found).mean())
        return "" if moved >= SURE else (
            f"{model.name} knows no task here, and another text before its last token changes its "
            f"first guess by {moved:.3f}")
    right = int((found > 0).sum())
    return "" if statistics.rate(right, len(task)).interval[0] > 0.5 else (
        f"{model.name} prefers the right answer in {right} of {len(task)} prompts")


# -- measured ---------------------------------------------------------------------------------------


def some_layers(n_layers: int) -> list[int]:
    """At most six layers, evenly over the depth, the last one among them."""
    return sorted({int(x) for x in np.linspace(0, n_layers - 1, min(n_layers, MOST_LAYERS))})


@dataclass
class Relevance:
    """Rows of relevance `[prompt, layer, key]` by kind (NaN in layers not computed), importance
    `[prompt][key]` by target, and which keys are compared."""

    task: Task
    rows: dict[str, np.ndarray]
    importance: dict[str, list[np.ndarray]]
    halves: list[tuple[np.ndarray, np.ndarray]]
    keep: list[np.ndarray]
    reads: Any
    refused: dict[str, str]

    def rho(self, kind: str, target: str) -> np.ndarray:
        """Rank correlation `[prompt, layer]`; NaN where importance is the same for all keys."""
        values = self.rows[kind]
        return np.stack([
            saliency.correlations(values[i][:, : len(keep)], self.importance[target][i], keep)
            for i, keep in enumerate(self.keep)])


def relevance(model: Model, task: Task) -> Relevance:
    """Everything that is compared, for one task; rows only where the model cannot do it."""
    prompts = [item.prompt for item in task.items]
    # Flow from every row of a text would be one problem per row, input and layer.
    rows = [list(item.rows)[:: max(1, len(item.rows) // 4)] for item in task.items]
    every = [list(item.rows) for item in task.items]
    found = rollout.measure(model, prompts, queries=every)
    flowed = max_flow.measure(model, prompts, queries=rows, layers=some_layers(model.n_layers))
    made = {str(v): found["relevance"].sel(variant=v).values for v in found["variant"].values}
    made["flow"] = flowed["flow"].reindex(layer=np.arange(model.n_layers)).values
    made["uniform"] = found["uniform"].values
    targets: dict[str, list[np.ndarray]] = {name: [] for name in TARGETS}
    halves, keep = [], []
    special = {*(getattr(model.tokenizer, "all_special_ids", None) or ())}
    for item in task.items:
        kept = np.array([t not in special for t in item.prompt.ids])
        if model.kind == "decoder":
            kept[0] = False
        if item.query is not None:
            kept[item.query] = False
        keep.append(kept)
    for item in () if task.unfit else task.items:
        blank = saliency.blank_out(model, item, task.neutral, batch_size=64)
        middle = len(blank) // 2
        halves.append((blank[:middle].mean(0), blank[middle:].mean(0)))
        targets["blank"].append(blank.mean(0) if task.mask is None else saliency.blank_out(
            model, item, [task.mask], batch_size=64)[0])
        targets["knockout"].append(saliency.knockout(model, item, batch_size=64))
        for kind in ("gradient", "gradient_input"):
            targets[kind].append(saliency.gradients(model, item, kind))
    reads = None if task.unfit else saliency.measure(model, task.items)
    return Relevance(task, made, targets, halves, keep, reads, dict(found.manifest["refused"]))


def entropy(rows: np.ndarray, keep: Sequence[np.ndarray]) -> np.ndarray:
    """Entropy in nats of the last layer's rows, over the keys that are compared, `[prompt]`."""
    found = []
    for row, kept in zip(rows[:, -1], keep):
        p = np.asarray(rollout.without(row[: len(kept)], np.nonzero(~kept)[0].tolist()))
        found.append(float(-(p[p > 0] * np.log(p[p > 0])).sum()))
    return np.array(found)


def top_third(values: np.ndarray) -> np.ndarray:
    """Mean over the upper third of the layers, `[prompt]`, layers without a value left out."""
    first = values.shape[1] - max(1, round(values.shape[1] / 3))
    known = np.isfinite(values[:, first:])
    total = np.where(known, values[:, first:], 0.0).sum(1)
    return np.where(known.any(1), total / np.maximum(known.sum(1), 1), np.nan)


def flag_points(model: Model, task: Task, one: Relevance) -> dict[str, np.ndarray]:
    """Attention and effects per prompt, layer and token; NaN for rows' own tokens and padding.

    `mass`, `most` (the head that looks most), `share` (of the norms of what is moved) and `effect`
    (of cutting the predicting row's edge in that layer) are `[prompt, layer, key]`; `mean` and
    `whole` (no row can see the token in any layer) `[prompt, key]`. Effects are relative changes of
    the answer's probability, where that is 5 % or more.
    """
    attention = one.reads["attention"].values
    mass, most = attention.mean(2), attention.max(2)
    share, effect = np.full(mass.shape, np.nan), np.full(mass.shape, np.nan)
    whole = np.full(mass[:, 0].shape, np.nan)
    outputs = [] if "values" in one.refused else [
        model.w_o(layer).float().cpu() for layer in range(model.n_layers)]
    for i, item in enumerate(task.items):
        assert item.answers is not None
        n = len(item.prompt)
        cut = knockout.measure(model, item.prompt, {str(p): [p] for p in range(n - 1)},
                               answers=[item.answers[0]], width=1)
        effect[i, :, : n - 1] = np.abs(cut["relative"].values[0].T) / 100
        if np.isfinite(effect[i]).any():
            # Against nothing, the number of a contrast is the probability itself.
            alone = replace(item, answers=(item.answers[0], _least(model, item)))
            whole[i, :n] = saliency.knockout(model, alone) / float(cut["base"].values[0])
        if not outputs:
            continue
        v = model.run(item.prompt, read="v", logits="none").reads["v"].values[0]
        for layer in range(model.n_layers):
            moved = value_weighted(attention[i, layer][:, None, :n], v[layer], outputs[layer])[0]
            share[i, layer, :n] = (moved / moved.sum().clamp_min(1e-300)).numpy()
    mean = np.where(np.isfinite(whole), mass.mean(1), np.nan)
    return {"mass": mass, "most": most, "share": share, "effect": effect, "mean": mean,
            "whole": whole}


def _least(model: Model, item: Any) -> int:
    return int(model.run(item.prompt, logits="last").logits[0][-1].argmin())
