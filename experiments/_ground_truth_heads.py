"""Planted heads: they look where codes match, and write codes that the unembedding reads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from experiments._ground_truth_beds import Bed, batched, end_token, first_token, ordinary
from experiments._ground_truth_table import Look
from interp.core import ModelRefused, Prompt
from interp.heads import image_centric, memory_context, retrieval
from interp.models.model import Model
from interp.organisms.plant_head import CodeBook, PlantedHead, circle
from interp.organisms.surgery import parts
from interp.organisms.truth import image_features
from interp.prompts.conflict import Conflict
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import SegmentMass

LOOKS = 8.0
"""Logits at which a head looks whose looking is not what is turned down."""

NEEDLE = 4
"""Tokens of a needle."""


def two_heads(hf: Any, rng: np.random.Generator) -> list[tuple[int, int]]:
    """A head to plant and one for the decoy, in different layers (so in different groups)."""
    text = hf.config.get_text_config(decoder=True)
    if text.num_hidden_layers < 2:
        raise ModelRefused("one layer is too few for a planted head and a decoy.")
    layers = rng.choice(np.arange(text.num_hidden_layers), 2, replace=False)
    return [(int(layer), int(rng.integers(text.num_attention_heads))) for layer in layers]


def cell(model: Model, *heads: PlantedHead) -> np.ndarray:
    """Where heads are, `[head, layer]`."""
    found = np.zeros((model.n_heads, model.n_layers), dtype=bool)
    for planted in heads:
        found[planted.head, planted.layer] = True
    return found


def written(model: Model, prompts: list[Prompt], last: int) -> tuple[np.ndarray, np.ndarray]:
    """What every head adds to the residual at the last positions, `[prompt, layer, position, head,
    d_model]`, and the unembedding `[vocabulary, d_model]`, its mean left out."""
    read = model.run(prompts, read="z", logits="none").reads["z"]
    z = torch.from_numpy(read.values[:, :, -last:])
    adds = torch.stack([torch.einsum("pthd,hdm->pthm", z[:, layer],
                                     model.w_o(layer).detach().float().cpu())
                        for layer in range(model.n_layers)], 1)
    table: Any = model.hf.get_output_embeddings()
    words = table.weight.detach().float().cpu()
    return adds.numpy(), (words - words.mean(0)).numpy()


# ------------------------------------------------------------------------------- retrieval


@dataclass(eq=False)
class RetrievalPlace:
    """A head that finds the needle token to be said next; the decoy finds the one just said."""

    model: Model
    head: PlantedHead
    decoy: PlantedHead
    prompts: list[Prompt]
    needle: tuple[int, ...]

    def look(self, strength: float, decoy: bool) -> Look:
        self.head.look.set(self.model.hf, strength)
        self.decoy.look.set(self.model.hf, LOOKS * decoy)
        # As many steps as the answer and its end take; more would only be cut off again.
        found = retrieval.measure(self.model, self.prompts, new_tokens=len(self.needle) + 1)
        spoken = [Prompt.from_tokens([*p.ids, *self.needle[:-1]]) for p in self.prompts]
        # The rows before each needle token.
        adds, words = written(self.model, spoken, len(self.needle))
        said = np.einsum("plthm,tm->lh", adds, words[list(self.needle)])
        return Look(cell(self.model, self.head), {
            "retrieval.measure": _scores(found["score"]),
            "attention on the needle": _scores(found["on_needle"].mean("sample")),
            "unembedding of the answer": said.T / len(self.prompts) / len(self.needle),
        })


def _scores(grid: Any) -> np.ndarray:
    return grid.transpose("head", "layer").values.astype(float)


def retrieval_places(
    bed: Bed, rng: np.random.Generator, count: int, n_layers: int = 3, prompts: int = 6,
    length: int = 96,
) -> Iterator[RetrievalPlace]:
    """Models that know the needle anyway, so that what they say does not depend on the head."""
    for _ in range(count):
        book = CodeBook(bed.text(rng, n_layers, spread=1.5), axes=6)
        hf = book.model
        words = ordinary(hf)
        chosen = [int(t) for t in rng.choice(words, NEEDLE + 1, replace=False)]
        cue, needle = chosen[0], chosen[1:]
        end = end_token(hf)
        angles = circle([*needle, end])
        asks = book.code(dict(zip([cue, *needle], angles.values())))
        has = book.code({t: angles[t] for t in needle})
        says = book.axes(2)
        # Known by heart: the unembedding reads what the last token asks for.
        book.read_out(asks, angles, _loud(book, rng, asks, cue, needle))
        book.read_out(says, {t: angles[t] for t in needle}, 1.0)
        made, rest = [], np.setdiff1d(words, chosen)
        for _ in range(prompts):
            ids = rng.choice(rest, length)
            start = first_token(hf)
            if start is not None:
                ids[0] = start
            at = int(rng.integers(2, length - NEEDLE - 2))
            ids[at : at + NEEDLE], ids[-1] = needle, cue
            made.append(Prompt.from_tokens(ids.tolist(), {
                "needle_value": (at, at + NEEDLE)}))
        ids = torch.tensor([[*p.ids, *needle[:-1]] for p in made])
        asked, carried = (torch.full(ids.shape, -1) for _ in range(2))
        for place, token in enumerate(needle):
            carried[ids == token] = place
            asked[ids == [cue, *needle][place]] = place
        seen = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
        (layer, head), (aside, other) = two_heads(hf, rng)
        agree = (asked[:, :, None] == carried[:, None]) & (asked[:, :, None] >= 0) & seen
        planted = book.head(layer, head, {"input_ids": ids}, asks, has, agree, value=has, out=says)
        same = (carried[:, :, None] == carried[:, None]) & (carried[:, None] >= 0) & seen
        decoy = book.head(aside, other, {"input_ids": ids}, has, has, same)
        model = bed.open(hf)
        assert planted.write is not None
        planted.write.set(model.hf, 1.0)
        yield RetrievalPlace(model, planted, decoy, made, tuple(needle))


def _loud(
    book: CodeBook, rng: np.random.Generator, asks: tuple[int, ...], cue: int, needle: list[int]
) -> float:
    """A weight of the unembedding at which the code of the last token beats all else."""
    hf = book.model
    ids = torch.from_numpy(rng.choice(ordinary(hf), (4, 16)))
    ids[:, -1] = torch.tensor([cue, *needle[:3]])
    with torch.no_grad():
        out = hf(ids, use_cache=False, output_hidden_states=True)
    # The last hidden state is what the unembedding reads.
    code = float(out.hidden_states[-1][:, -1, list(asks)].norm(dim=-1).min())
    spread = float((out.logits[:, -1].max(-1).values - out.logits[:, -1].median(-1).values).max())
    # Neighbors on the circle of five are at cosine 0.31.
    return 3 * spread / (1 - np.cos(2 * np.pi / (NEEDLE + 1))) / code


# --------------------------------------------------------------------------- image-centric


@dataclass(eq=False)
class ImagePlace:
    """A head that looks at an image's content; the decoy looks at its sinks."""

    model: Model
    head: PlantedHead
    decoy: PlantedHead
    prompts: list[Prompt]
    sinks: list[dict[int, tuple[int, ...]]]

    def look(self, strength: float, decoy: bool) -> Look:
        self.head.look.set(self.model.hf, strength)
        self.decoy.look.set(self.model.hf, LOOKS * decoy)
        found = image_centric.measure(self.model, self.prompts, self.sinks, chance=False)
        after = len(self.prompts[0]) - 1 - max(self.prompts[0].segment("image").positions)
        adds, _ = written(self.model, self.prompts, after)
        size = np.linalg.norm(adds, axis=-1).mean((0, 2))
        return Look(cell(self.model, self.head), {
            "image_centric.measure": _scores(found["rate"]),
            "attention on the image": _scores(found["image_mass"].mean(("prompt", "query"))),
            "norm of what it writes": size.T,
        })


def image_places(
    bed: Bed, rng: np.random.Generator, count: int, n_layers: int = 3, prompts: int = 3,
) -> Iterator[ImagePlace]:
    """Models in which the image is a small part of the context, and some of it is known as sinks."""
    for _ in range(count):
        book = CodeBook(bed.picture(rng, n_layers, width=48, side=2, spread=0.4), axes=4)
        hf = book.model
        side = hf.config.vision_config.image_size // hf.config.vision_config.patch_size
        pictures = bed.pictures(hf, rng, prompts, before=9 * side**2, after=6)
        inputs = batched(pictures)
        features = image_features(hf, inputs)
        one = book.flag(image=True)
        content = book.flag([], image=True)
        sink, marked = book.flag_features(
            features.reshape(-1, features.shape[-1]),
            torch.from_numpy(rng.standard_normal(features.shape[-1])).float(), 0.25, content)
        places = torch.tensor(pictures[0].segment("image").positions)
        number, n = len(pictures), inputs["input_ids"].shape[1]
        on, off = (torch.zeros(number, n, n, dtype=torch.bool) for _ in range(2))
        flat = marked.reshape(number, -1)
        after = int(places.max()) + 1
        for i in range(number):
            on[i, after:, places[~flat[i]]] = True
            off[i, after:, places[flat[i]]] = True
        (layer, head), (aside, other) = two_heads(hf, rng)
        planted = book.head(layer, head, inputs, one, content, on)
        decoy = book.head(aside, other, inputs, one, sink, off)
        sinks = [{i: tuple(int(p) for p in places[row]) for i in range(len(parts(hf)))}
                 for row in flat]
        yield ImagePlace(bed.open(hf), planted, decoy, pictures, sinks)


# ------------------------------------------------------------------------- memory, context


@dataclass(eq=False)
class ConflictPlace:
    """A head that writes what was learned and one that writes what is stated; the decoy looks at
    the statement and writes as much, but nothing that the unembedding reads."""

    model: Model
    memory: PlantedHead
    context: PlantedHead
    decoy: PlantedHead
    cases: list[Conflict]
    unit: float

    def look(self, strength: float, decoy: bool) -> Look:
        for planted, on, size in ((self.memory, not decoy, strength), (self.context, not decoy,
                                  strength), (self.decoy, decoy, OBVIOUS_WRITE)):
            planted.look.set(self.model.hf, LOOKS * on * (strength > 0 or decoy))
            assert planted.write is not None
            planted.write.set(self.model.hf, on * size / self.unit)
        found = memory_context.measure(self.model, self.cases)
        level = memory_context.chance(found)
        score = _scores(found["score"])
        clean = [case.clean for case in self.cases]
        adds, words = written(self.model, clean, 1)
        lean = np.stack([words[a] - words[b] for a, b in (case.tokens for case in self.cases)])
        # Toward the stated answer minus the memorized one; a memory head scores below zero.
        direct = np.einsum("plhm,pm->hl", adds[:, :, -1], lean) / len(clean)
        mass = self._mass(clean)
        truth = np.concatenate([cell(self.model, self.memory), cell(self.model, self.context)])
        return Look(truth, {
            "memory_context.measure": np.concatenate([score, -score]) / max(level, 1e-12),
            "attention on the source": mass,
            "unembedding of the answers": np.concatenate([-direct, direct]),
        })

    def _mass(self, prompts: list[Prompt]) -> np.ndarray:
        """Attention of the last row on the subject (memory) and on the statement (context)."""
        def segments(number: int, layer: int) -> SegmentMass:
            return SegmentMass({s: prompts[number].segment(s).positions for s in (
                "subject", "stated")})

        run = self.model.run(prompts, stats=[PerLayer("segments", segments)], logits="none")
        mass = run.stats["segments"].isel(query=-1).mean("prompt")
        return np.concatenate([_scores(mass.sel(segment=s, drop=True)) for s in (
            "subject", "stated")])


OBVIOUS_WRITE = 4.0
"""Logits that the decoy would move if anything read it."""

SUBJECTS = 6


def conflict_places(
    bed: Bed, rng: np.random.Generator, count: int, n_layers: int = 2, cases: int = 8
) -> Iterator[ConflictPlace]:
    """Random models, in which both heads and the decoy sit in layers of their own where possible."""
    for _ in range(count):
        book = CodeBook(bed.text(rng, n_layers, width=48, spread=1.0), axes=4 * SUBJECTS + 4)
        hf = book.model
        words = [int(t) for t in rng.choice(ordinary(hf), 3 * SUBJECTS, replace=False)]
        subjects, learned, stated = (words[i * SUBJECTS : (i + 1) * SUBJECTS] for i in range(3))
        one, who_flag, what_flag = book.flag(), book.flag(subjects), book.flag(stated)
        # A coordinate for every answer: what speaks for one says nothing about the others.
        who, what = (sum((book.flag([token]) for token in some), ()) for some in (subjects, stated))
        recalled, copied, junk = book.axes(SUBJECTS), book.axes(SUBJECTS), book.axes(1)
        for axes, answers in ((recalled, learned), (copied, stated)):
            for axis, token in zip(axes, answers):
                book.read_out((axis,), {token: 0.0}, 1.0)
        made = list(_conflicts(hf, rng, cases, subjects, learned, stated, words))
        ids = torch.tensor([c.clean.ids for c in made])
        n = ids.shape[1]
        subject, statement = (torch.zeros(len(made), n, n, dtype=torch.bool) for _ in range(2))
        for i, case in enumerate(made):
            subject[i, -1, list(case.clean.segment("subject").positions)] = True
            statement[i, -1, list(case.clean.segment("stated").positions)] = True
        text = hf.config.get_text_config(decoder=True)
        (layer, head), (aside, other) = two_heads(hf, rng)
        groups = text.num_attention_heads // text.num_key_value_heads
        free = [(a, b) for a in range(text.num_hidden_layers) for b in range(text.num_attention_heads)
                if (a, b // groups) not in ((layer, head // groups), (aside, other // groups))]
        third = free[int(rng.integers(len(free)))]
        inputs = {"input_ids": ids}
        memory = book.head(layer, head, inputs, one, who_flag, subject, who, recalled)
        context = book.head(aside, other, inputs, one, what_flag, statement, what, copied)
        decoy = book.head(*third, inputs, one, what_flag, statement, what_flag, junk)
        model = bed.open(hf)
        place = ConflictPlace(model, memory, context, decoy, made, 1.0)
        place.unit = _unit(place)
        yield place


def _unit(place: ConflictPlace) -> float:
    """Logits per write of 1: how much a small write of both heads moves the answers on average."""
    hf: Any = place.model.hf
    clean = [case.clean for case in place.cases]
    at = torch.tensor([case.tokens for case in place.cases])
    values, small = [], 0.05
    for size in (0.0, small):
        for planted in (place.memory, place.context):
            planted.look.set(hf, LOOKS)
            assert planted.write is not None
            planted.write.set(hf, size)
        rows = torch.stack([r[-1] for r in place.model.run(clean, logits="last").logits])
        values.append(rows.float().cpu().gather(1, at))
    return float((values[1] - values[0]).mean()) / small


def _conflicts(
    hf: Any, rng: np.random.Generator, count: int, subjects: list[int], learned: list[int],
    stated: list[int], special: list[int]
) -> Iterator[Conflict]:
    rest = np.setdiff1d(ordinary(hf), special)
    start = first_token(hf)
    for _ in range(count):
        (who, other), (what, instead) = (rng.choice(SUBJECTS, 2, replace=False) for _ in range(2))
        ids = rng.choice(rest, 12)
        if start is not None:
            ids[0] = start
        where = int(rng.integers(2, 9))
        prompts = []
        for a, b in ((who, what), (other, instead)):
            ids[where], ids[-1] = stated[b], subjects[a]
            prompts.append(Prompt.from_tokens(ids.tolist(), {
                "stated": [where], "subject": [len(ids) - 1]}))
        alone = [] if start is None else [start]
        yield Conflict(*prompts, Prompt.from_tokens([*alone, subjects[who]]), (learned[who],),
                       (stated[what],), "planted", "substitution", str(who))
