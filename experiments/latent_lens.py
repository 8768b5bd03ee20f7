"""Visual tokens read through contextual states of text (arXiv:2602.00462), and how close the two
modalities are inside a language model (arXiv:2405.16700). On `looker`, or any model of pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import _latent_figures as figures
from experiments import _patch_words
from experiments import _picture_questions as questions
from experiments import _visual_flow as flow
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._subject import Subject, run_each
from interp.core import ModelRefused, Prompt, PromptError, statistics
from interp.models.logit_lens import early_logits
from interp.models.model import Model
from interp.prompts import scenes
from probes import alignment, contextual_lens, neighbors
from probes.contextual_lens import ContextualBank, agreement
from probes.nulls import layer_states, reinitialized
from probes.visual_tokens import nearest_words, word_embeddings

PAPER = Paper(
    "latent_lens",
    "LatentLens: Revealing Highly Interpretable Visual Tokens in LLMs; Implicit Multimodal Alignment",
    ("2602.00462", "2405.16700"),
    "Do visual tokens have the states of the words for what they show, and do the two modalities share "
    "one space?",
    figures={
        "neighbors": "The nearest contextual states of some tokens: word, layer of the bank, cosine.",
        "readers": "Share of visual tokens on objects with a word for what they show among the top "
        "five, by reader and layer; gray: words for things in other pictures.",
        "leap": "Layer of the nearest contextual state against the layer of the visual token.",
        "hubs": "How often contextual states are neighbors, with and without a correction for hubs; "
        "gray: neighbors drawn at random.",
        "cones": "Cosine within and across modalities by layer, plain and centered.",
        "overlap": "Overlap of the weights that matter for image and for text tokens; gray line: "
        "random masks.",
    },
    models=("looker",),
)
SOURCE, IMA = PAPER.sources
TASKS = ("color", "shape", "existence", "position")
K, LARGE, ALL_LAYERS = 5, 1_000_000_000, 8
"""Words read; parameters from which no second model is made; layers up to which all are in the bank."""

CLAIMS: dict[str, tuple[str, str]] = {
    "reads": ("The contextual neighbors of visual tokens name what they show.", SOURCE),
    "logit": ("Contextual neighbors name what is shown more often than the logit lens does.", SOURCE),
    "embedding": ("Contextual neighbors name what is shown more often than the nearest word embeddings "
                  "do.", SOURCE),
    "leap": ("Visual tokens at the input match states of deeper layers than word embeddings do.",
             SOURCE),
    "hubs": ("A correction for hubs makes neighbors name what is shown more often.",
             f"measured by this toolkit, after {SOURCE}"),
    "cones": ("Image and text tokens live in different narrow cones.", IMA),
    "weights": ("Image and text tokens activate similar weights: their masks overlap more than random "
                "ones.", IMA),
    "inputs": ("Their masks overlap more than those of the same weights with other inputs.",
               f"measured by this toolkit, after {IMA}"),
    "slow": ("Image tokens change more slowly from block to block than text tokens.", IMA),
    "pairs": ("Pictures are closer to their own descriptions than to others.",
              f"measured by this toolkit, after {IMA}"),
    "score": ("Alignment rises with the task score and falls with hallucination.", IMA),
}
NUMBERS: dict[str, tuple[str, str]] = {
    "logit": ("72 % against 23 % (v1)", "secondary"),
    "embedding": ("72 % against 30 % (v1)", "secondary"),
    "leap": ("layers 8 to 16", "secondary"),
}


def run(settings: Settings, out: Output) -> None:
    run_each(_One, settings, out)


@dataclass
class Read:
    """What a model's visual tokens are next to, `[layer, sample, k]`: tokens, and bank vectors."""

    bank: ContextualBank
    states: np.ndarray
    layers: list[int]
    words: np.ndarray
    index: np.ndarray
    distance: np.ndarray


class _One(Subject):
    paper, claims, numbers = PAPER, CLAIMS, NUMBERS

    def run(self) -> None:
        model, settings = self.model, self.settings
        self.few = {"resamples": settings.pick(2000, tiny=300)}
        self.skip("it compares at least six models or checkpoints, and one is looked at here", "score")
        self.all = _patch_words.shown(model, settings.pick(24, tiny=8), settings.rng(1), TASKS)
        self.prompts = [one.prompt for one in self.all]
        self.patches = [p for one in self.all for p in one.patches if p.words]
        self.picture = np.array([p.picture for p in self.patches])
        self.out.record(model, self.prompts, f"pictures-{model.name}")
        rows = model.run(self.prompts, logits="last").logits
        right = np.mean([int(r[-1].argmax()) == one.asked.answer[0] for r, one in zip(rows, self.all)])
        reason = flow.cannot(model, [one.asked for one in self.all], float(right))
        if reason:
            self.give_up(reason)
            return
        self.random = None
        if sum(p.numel() for p in model.hf.parameters()) <= LARGE:
            self.random = reinitialized(model, settings.seed)
        texts = _texts(model, settings.pick(220, tiny=40), settings.rng(2))
        self.out.record(model, texts, f"bank-{model.name}")
        self._lens(texts)
        self._alignment()

    # -- contextual neighbors -----------------------------------------------------------------------

    def _lens(self, texts: Sequence[Prompt]) -> None:
        if len(set(self.picture)) < statistics.FEWEST:
            reason = "too few pictures have tokens on objects whose names are words of the model"
            self.skip(reason, "reads", "logit", "embedding", "leap", "hubs")
            for name in ("neighbors", "readers", "leap", "hubs"):
                self.no_figure(name, reason)
            return
        read = self._read(self.model, texts)
        tokens = {"latent": read.words, "embedding": np.stack([
            nearest_words(x, word_embeddings(self.model), K)[1] for x in read.states])}
        try:
            tokens["logit"] = self._logits()
        except ModelRefused as error:
            self.skip(str(error), "logit")
        hits = {name: self._agree(found) for name, found in tokens.items()}
        lift = {name: (own - other).mean(0) for name, (own, other) in hits.items()}
        groups = {"groups": self.picture, **self.few}
        at = {name: {int(x): [float(own[i].mean()), float(other[i].mean())] for i, x in enumerate(
            read.layers)} for name, (own, other) in hits.items()}
        control: dict[str, Any] = {}
        if self.random is not None:
            own, other = self._agree(self._read(self.random, texts).words)
            control["with random weights"] = float((own - other).mean())
        reads = statistics.mean(lift["latent"], **groups)
        unit = "share of visual tokens, above words of other pictures, mean over layers"
        self.claim("reads", reads, null=0.0, unit=unit, figure="readers",
                   control="words for things in other pictures", details={
                       "own and other, by layer": at["latent"], "tokens": len(self.patches),
                       "bank": len(read.bank.rows_), **control})
        for name in [n for n in ("logit", "embedding") if n in lift]:
            self.claim(name, statistics.difference(lift["latent"], lift[name], **groups), null=0.0,
                       unit=unit, figure="readers", control="words for things in other pictures",
                       details={n: float(x.mean()) for n, x in lift.items()} | {
                           "own and other, by layer": at[name]})
        mended = self._mended(read)
        if self.wants("readers"):
            self.figure("readers", figures.readers(self.model.name, read.layers, hits, self.picture))
        if self.wants("neighbors"):
            self.figure("neighbors", figures.table(self.model, self.all, self.patches, read))
        reason = "" if reads.interval[0] > 0 else \
            "its neighbors name what is shown no more often than what is not, so where they are from " \
            "and how often says nothing"
        self._leap(read, reason)
        if reason:
            self.skip(f"{self.model.name}: {reason}", "hubs")
        else:
            own, other = self._agree(mended["csls"][0])
            self.claim("hubs", statistics.difference((own - other).mean(0), lift["latent"], **groups),
                       null=0.0, unit=unit, figure="hubs", control="plain cosine", details={
                           name: {"skew of neighbor counts": skew, "by chance": chance}
                           for name, (_, skew, chance) in mended.items()})
        if self.wants("hubs"):
            self.figure("hubs", figures.hubs(self.model.name, {
                name: neighbors.occurrences(index, len(read.bank.rows_)) for name, index in (
                    ("cosine", read.index.reshape(-1, K)), ("CSLS", self.csls.reshape(-1, K)))},
                len(self.patches) * len(read.layers) * K, self.settings.seed))

    def _read(self, model: Model, texts: Sequence[Prompt]) -> Read:
        n = model.n_layers
        kept = range(n) if n <= ALL_LAYERS else contextual_lens.bank_layers(n)
        bank = contextual_lens.build(model, texts, layers=list(kept), n_neighbors=K,
                                     seed=self.settings.seed, batch_size=16)
        x = self._states(model)
        distance, index = bank.kneighbors(x.reshape(-1, x.shape[-1]))
        token = bank.rows_["token"].to_numpy()
        shape = (*x.shape[:2], K)
        return Read(bank, x, [-1, *_asked(n)], token[index].reshape(shape), index.reshape(shape),
                    distance.reshape(shape))

    def _states(self, model: Model) -> np.ndarray:
        """The visual tokens on objects, `[layer, sample, d_model]`, from the input on."""
        where = [sorted({p.position for p in self.patches if p.picture == i})
                 for i in range(len(self.all))]
        used = [i for i, some in enumerate(where) if some]
        states = layer_states(model, [self.prompts[i] for i in used], [where[i] for i in used],
                              layers=_asked(model.n_layers))
        at = {(used[int(i)], int(p)): row for row, (i, p) in enumerate(zip(
            states["prompt"].values, states["position"].values))}
        return states.values[:, [at[p.picture, p.position] for p in self.patches]]

    def _logits(self) -> np.ndarray:
        """The top words of the logit lens, `[layer, sample, k]`; layer l leaves block l."""
        found: list[Any] = [None] * len(self.patches)
        wanted = [layer + 1 for layer in (-1, *_asked(self.model.n_layers))]
        for i, prompt in enumerate(self.prompts):
            mine = [n for n, p in enumerate(self.patches) if p.picture == i]
            if not mine:
                continue
            places = sorted({self.patches[n].position for n in mine})
            top = np.stack([logits.topk(K, -1).indices.numpy()
                            for _, logits in early_logits(self.model, prompt, places, wanted)])
            for n in mine:
                found[n] = top[:, places.index(self.patches[n].position)]
        return np.stack(found, 1)

    def _agree(self, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Own and other words among the top, `[layer, sample]`."""
        names = [p.words for p in self.patches]
        both = [agreement(layer, names, self.picture.tolist()) for layer in words]
        return np.stack([a for a, _ in both]), np.stack([b for _, b in both])

    def _mended(self, read: Read) -> dict[str, tuple[np.ndarray, float, float]]:
        """With and without a correction: tokens, skew of neighbor counts, and what is chance."""
        size = len(read.bank.rows_)
        x = read.states.reshape(-1, read.states.shape[-1])
        better = ContextualBank(K, correction="csls").fit(read.bank.bank_, rows=read.bank.rows_)
        self.csls = better.kneighbors(x, return_distance=False)
        chance = float(neighbors.hub_skew_by_chance(len(x), K, size).mean())
        token = read.bank.rows_["token"].to_numpy()
        return {name: (token[index].reshape(read.words.shape), neighbors.hub_skew(index, size), chance)
                for name, index in (("cosine", read.index.reshape(-1, K)), ("csls", self.csls))}

    def _leap(self, read: Read, reason: str) -> None:
        layer = read.bank.rows_["layer"].to_numpy()
        nearest = layer[read.index[:, :, 0]]
        if self.wants("leap"):
            self.figure("leap", figures.leap(self.model.name, read.layers, nearest, np.unique(layer)))
        if reason:
            self.skip(f"{self.model.name}: {reason}", "leap")
            return
        held = _texts(self.model, self.settings.pick(40, tiny=8), self.settings.rng(7))
        where = contextual_lens.contexts(held, per_token=20)
        pairs = [(p, w) for p, w in zip(held, where) if w]
        words = layer_states(self.model, [p for p, _ in pairs], [w for _, w in pairs], layers=[])
        theirs = layer[read.bank.kneighbors(words.values[0], 1, return_distance=False)[:, 0]]
        text = statistics.mean(theirs.astype(float), groups=words["prompt"].values, **self.few)
        self.claim("leap", statistics.mean(nearest[0].astype(float), groups=self.picture, **self.few),
                   null=text.interval[1], unit="layer of the nearest contextual state", figure="leap",
                   control="word embeddings of other texts (upper end of the interval)", details={
                       "word embeddings": str(text), "layers of the bank": np.unique(layer).tolist(),
                       "mean of the bank": float(layer.mean()), "visual tokens, by layer": {
                           int(x): float(row.mean()) for x, row in zip(read.layers, nearest)}})

    # -- alignment ----------------------------------------------------------------------------------

    def _alignment(self) -> None:
        model = self.model
        described = [_plain(model, scenes.describe(one.scene)) for one in self.all]
        found = alignment.measure(model, self.prompts, described, seed=self.settings.seed,
                                  permutations=self.settings.pick(1000, tiny=200))
        self.out.save(f"alignment-{model.name}", found)
        within = (found["image"] + found["text"]).mean("layer").values / 2
        across = found["mismatched"].mean("layer").values
        details: dict[str, Any] = {name: float(found[name].mean()) for name in (
            "image", "text", "matched", "mismatched")}
        control = "pairs across modalities"
        if self.random is not None:
            bare = alignment.measure(self.random, self.prompts, described, permutations=1)
            gap = float(((bare["image"] + bare["text"]) / 2 - bare["mismatched"]).mean())
            details["the same gap with random weights"] = gap
            control += f"; the same model with random weights has a gap of {gap:.2f} too"
        self.claim("cones", statistics.difference(within, across, **self.few), null=0.0, figure="cones",
                   unit="cosine, within minus across modalities", control=control,
                   details=details)
        step = found["step"].mean("block")
        self.claim("slow", statistics.difference(*(step.sel(modality=m).values for m in (
            "image", "text")), **self.few), null=0.0, figure="cones",
            unit="cosine between neighboring layers, image minus text", control="text tokens", details={
                str(m): float(step.sel(modality=m).mean()) for m in step["modality"].values} | {
                "norm": {str(m): float(found["norm"].sel(modality=m).mean())
                         for m in step["modality"].values}})
        gap = (found["centered_matched"] - found["centered_mismatched"]).mean("layer").values
        self.claim("pairs", statistics.mean(gap, **self.few), null=0.0, figure="cones",
                   unit="centered cosine, own minus other descriptions", control="other descriptions",
                   details={"p over pairings, by layer": {int(x): float(p) for x, p in zip(
                       found["layer"].values, found["pair_p"].values)}})
        if self.wants("cones"):
            self.figure("cones", figures.cones(model.name, found))
        self._weights(described)

    def _weights(self, described: Sequence[Prompt]) -> None:
        model, parts = self.model, self.settings.pick(6, tiny=statistics.FEWEST)
        few = min(model.n_layers, self.settings.pick(6, tiny=2))
        layers = sorted({round(x) for x in np.linspace(0, model.n_layers - 1, few)})
        groups = [list(range(i, len(self.all), parts)) for i in range(parts)]
        try:
            found = [alignment.mask_overlap(
                model, [self.prompts[i] for i in some], [described[i] for i in some], layers=layers,
                seed=number) for number, some in enumerate(groups)]
        except ModelRefused as error:
            self.skip(str(error), "weights", "inputs")
            self.no_figure("overlap", str(error))
            return
        iou, shuffled = (np.array([np.nanmean(one[name]) for one in found])
                         for name in ("iou", "shuffled"))
        random = float(found[0]["random"])
        details = {"overlap": float(iou.mean()), "with inputs in random order": float(shuffled.mean()),
                   "random masks": random, "sparsity": 0.5}
        self.claim("weights", statistics.mean(iou, **self.few), null=random, figure="overlap",
                   unit="overlap (IoU) of masks", control="random masks of the same sparsity",
                   details=details)
        self.claim("inputs", statistics.difference(iou, shuffled, **self.few), null=0.0,
                   figure="overlap", unit="overlap (IoU) of masks", details=details,
                   control="the same weights with the inputs' norms in random order")
        if self.wants("overlap"):
            self.figure("overlap", figures.overlap(model.name, found))


def _asked(n_layers: int) -> list[int]:
    """The layers of visual tokens that are read, beside the input."""
    return sorted({round(x) for x in np.linspace(0, n_layers - 1, min(n_layers, ALL_LAYERS))})


def _plain(model: Model, text: str) -> Prompt:
    """A text alone, as the model's tokenizer starts it."""
    if not questions.is_looker(model):
        text = text.replace(" ,", ",").replace(" .", ".").replace(" ?", "?").capitalize()
    return model.prompt(text)


def _texts(model: Model, count: int, rng: np.random.Generator) -> list[Prompt]:
    """Descriptions, and questions with their answers, about scenes that are not shown.

    Raises `PromptError` where a text is too short for a bank.
    """
    made: list[Prompt] = []
    for scene in scenes.scenes(rng, -(-count // 2)):
        made.append(_plain(model, scenes.describe(scene)))
        options = scenes.questions(scene, rng, tasks=("color", "shape", "position", "read"))
        if options:
            question = options[int(rng.integers(len(options)))]
            made.append(_plain(model, f"{question.text} {question.answer} ."))
    if not any(len(prompt) > contextual_lens.SKIP for prompt in made):
        raise PromptError(f"the tokenizer of {model.name} makes no text of more than two tokens")
    return made[:count]
