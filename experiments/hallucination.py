"""Decoding against hallucination: eight methods and their controls on one set of pictures.

Existence questions and descriptions of scenes whose contents are known, on pictures as `looker`
learned them and on noisy ones, where it names things that are not there.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import numpy as np
import pandas as pd
import torch
from scipy import stats

from experiments import _hallucination_figures as figures
from experiments import _named_objects as cases
from experiments import _picture_questions as questions
from experiments._named_objects import Described
from experiments._output import Output
from experiments._paper import Paper, Settings
from experiments._picture_questions import Asked
from interp.causal import decoding
from interp.causal.decoding import Decoded, Method, decode
from interp.core import Claim, ModelNotFound, Prompt, UndertowError, statistics
from interp.core.intervention import edit
from interp.flow import saliency_rejection
from interp.flow.contrastive_decoding import DAMRO, IAVA, AvisC, blind_tokens, outlier_tokens
from interp.flow.revisit import ReVisiT
from interp.flow.saliency_rejection import SGRS
from interp.flow.visual_steering import GIFT, PAINT, VISTA
from interp.models.model import Model
from interp.models.stepping import unembed
from interp.sinks.validation_gate import auroc

PAPER = Paper(
    "hallucination",
    "Contrastive and guided decoding against hallucination",
    ("2405.17820", "2503.18556", "2410.04514", "2406.12718", "2502.03628", "2510.22067",
     "2601.20279", "2506.09522", "2501.12206"),
    "Does a second opinion about the picture stop a model from naming what is not there?",
    figures={
        "table": "Existence questions and descriptions of noisy pictures: change against greedy "
        "decoding, with 95 % intervals; controls in gray.",
        "maps": "One picture, seen by the methods: what each of them picks out.",
        "shift": "Change of the log-odds of yes when the blind tokens, as many others, or all but "
        "the blind tokens lose their content.",
        "outliers": "Attention received from the vision tower's class token and from the last "
        "prompt token, by rank.",
        "ranks": "Rank in the vocabulary of words for what is there and said, there and not said, "
        "said and not there, and neither: by layer, and along the description.",
        "saliency": "Saliency of what was said before, for words of objects that are there and "
        "words of objects that are not.",
        "mass": "Attention of the row that predicts on the image tokens, before and with PAINT.",
    },
    models=("looker",),
)
AVISC, IAVA_, DAMRO_, AGLA_, VISTA_, GIFT_, SGRS_, REVISIT, PAINT_ = PAPER.sources
NOISE = 8.0
"""Of the hard pictures: enough for `looker` to err on some existence questions when decoding
greedily. Set before any method was compared."""

METHODS = {"AvisC": AVISC, "IAVA": IAVA_, "DAMRO": DAMRO_, "VISTA": VISTA_, "GIFT": GIFT_,
           "PAINT": PAINT_, "ReVisiT": REVISIT, "SGRS": SGRS_}
CONTROLS = {
    "AvisC": "as many random image tokens in place of the blind ones",
    "IAVA": "as many random image tokens in place of the irrelevant ones",
    "DAMRO": "as many random image tokens in place of the outliers",
    "VISTA": "random steering directions of the same norm",
    "GIFT": "the same map shuffled over the image tokens",
    "PAINT": "as many random image tokens in place of local and summary ones",
    "ReVisiT": "a random image token in every step",
    "SGRS": "the same sampling without rejection (which is what the released code does)",
}
SENTENCES: dict[str, tuple[str, str]] = {
    **{f"exist_{name}": (f"{name} causes more right answers to existence questions than its "
                         "control.", source) for name, source in METHODS.items()},
    **{f"name_{name}": (f"{name} causes fewer named objects that are not there than its control.",
                        source) for name, source in METHODS.items()},
    "blind": ("Replacing blind tokens moves yes and no less than replacing as many others.", AVISC),
    "even": ("Without all but the blind tokens, yes and no come closer to 50:50 than without as many "
             "random tokens.", AVISC),
    "delta": ("The change of attention from a generic to the specific instruction points at the "
              "object better than attention does.", IAVA_),
    "overlap": ("Outliers of the vision tower and of the language model's attention are the same "
                "tokens.", DAMRO_),
    "rank": ("Attention in the vision tower and in the language model rank image tokens alike.",
             DAMRO_),
    "masked": ("Adding the logits of a picture without irrelevant pixels improves answers.", AGLA_),
    "loss": ("Words for what is there fall in rank along the description.", VISTA_),
    "early": ("Words for what is there rank higher before the last layer than in it.", VISTA_),
    "hidden": ("Words for what is there but goes unsaid rank higher than words for what is not "
               "there.", VISTA_),
    "gaze": ("The gaze shift of content words points at the object better than attention does.",
             GIFT_),
    "saliency": ("Words of hallucinated objects have a lower saliency of what was said before.",
                 SGRS_),
    "above_attention": ("Saliency tells hallucinated words better than attention on what was said "
                        "does.", SGRS_),
    "above_loss": ("Saliency tells hallucinated words better than their probability does.", SGRS_),
    "released": ("In the row that the released code reads, the gradient is zero.", SGRS_),
    "cell": ("ReVisiT grounds words in the cells of their object more often than a random choice.",
             REVISIT),
    "cell_attention": ("ReVisiT grounds words in the cells of their object more often than the "
                       "most attended token.", REVISIT),
}
NUMBERS = {"name_VISTA": ("about 40 % fewer hallucinations", "paper"),
           "name_PAINT": ("up to 62.3 % fewer hallucinations", "paper")}
ERRORS = (UndertowError, ValueError)


def run(settings: Settings, out: Output) -> None:
    for name in settings.models(PAPER):
        try:
            model = questions.open_subject(name, settings)
        except ModelNotFound as error:
            if settings.model is not None:
                raise
            _give_up(name, str(error), out)
            continue
        out.record(model)
        reason = questions.unfit(model)
        if reason:
            _give_up(model.name, reason.split(", so it has no such heads")[0], out)
            continue
        _One(model, settings, out).run()


def _claim_words(key: str) -> dict[str, Any]:
    number, tag = NUMBERS.get(key, ("", "paper"))
    return {"paper_number": number, "paper_tag": tag} if number else {}


def _give_up(name: str, reason: str, out: Output) -> None:
    for figure in PAPER.figures:
        out.no_figure(figure, reason, of=name)
    for key, (sentence, source) in SENTENCES.items():
        out.claim(Claim.untestable(sentence, source, reason, **_claim_words(key)), name)


class _One:
    """Everything about one model."""

    def __init__(self, model: Model, settings: Settings, out: Output) -> None:
        self.model, self.settings, self.out = model, settings, out
        own = questions.is_looker(model)
        self.steps = settings.pick(32 if own else 64, tiny=12)
        n, few = settings.pick(64, tiny=8), settings.pick(14, tiny=3)
        self.asked = cases.existence(model, n, settings.rng(1), NOISE)
        self.plain = cases.existence(model, settings.pick(48, tiny=8), settings.rng(2), 1.0)
        self.scenes = cases.descriptions(model, few, settings.rng(3), NOISE)
        self.clear = cases.descriptions(model, few, settings.rng(4), 1.0)
        asking = [case.prompt for case in (*self.asked, *self.plain, *self.scenes, *self.clear)]
        out.record(prompts=asking, name=f"prompts-{model.name}")
        say = questions._spelling(model)
        self.yes, self.no = (questions._ids(model, say(word))[0] for word in ("yes", "no"))

    # -- claims -----------------------------------------------------------------------------------

    def claim(self, key: str, estimate: statistics.Estimate, **more: Any) -> None:
        sentence, source = SENTENCES[key]
        self.out.claim(Claim(sentence, source, **{**estimate.for_claim(), **_claim_words(key),
                                                  **more}), self.model.name)

    def skip(self, reason: str, *keys: str) -> None:
        for key in keys:
            sentence, source = SENTENCES[key]
            self.out.claim(Claim.untestable(sentence, source, reason, **_claim_words(key)),
                           self.model.name)

    # -- the run ----------------------------------------------------------------------------------

    def run(self) -> None:
        greedy = [decode(self.model, [d.prompt for d in some], None, self.steps, keep=False)
                  for some in (self.scenes, self.clear)]
        self._compare(greedy[0])
        self._maps()
        self._blind()
        self._words([*zip(self.scenes, greedy[0]), *zip(self.clear, greedy[1])])
        self._mass()

    def _texts(self, found: Sequence[Decoded]) -> list[str]:
        return [self.model.tokenizer.decode(one.tokens) for one in found]

    # -- the table --------------------------------------------------------------------------------

    def _methods(self, describing: bool, seed: Optional[int]) -> dict[str, Callable[[], Method]]:
        """Every method, or with a seed its control, with the settings for its task."""
        def generic(prompt: Prompt) -> list[Prompt]:
            own = questions.is_looker(self.model)
            text = (questions.GENERAL if describing else cases.DESCRIBE if own
                    else "Describe the picture.")
            return [self.model.prompt(text, images=list(prompt.images),
                                      chat=questions.has_chat(self.model))]

        plain = seed if seed is not None else 0
        return {
            "AvisC": lambda: AvisC(seed=seed), "IAVA": lambda: IAVA(generic, seed=seed),
            "DAMRO": lambda: DAMRO(alpha=1.5 if describing else 0.5, seed=seed),
            "VISTA": lambda: VISTA(strength=0.17 if describing else 0.01, seed=seed),
            "GIFT": lambda: GIFT(question=self._asking(describing), seed=seed),
            "PAINT": lambda: PAINT(seed=seed), "ReVisiT": lambda: ReVisiT(seed=seed),
            "SGRS": lambda: SGRS(seed=plain, row="predicting" if seed is None else "released"),
        }

    def _asking(self, describing: bool) -> str:
        """The segment that holds the question."""
        some = self.scenes if describing else self.asked
        return next((name for name in ("question", "user") if some[0].prompt.of_kind(name)), "last")

    def _compare(self, greedy: list[Decoded]) -> None:
        """Every method and its control on the hard pictures, against greedy decoding."""
        base = self._existence(None), self._counts(self._texts(greedy))
        rows = {("greedy", "method"): base}
        refused: dict[str, str] = {}
        for kind, seed in (("method", None), ("control", self.settings.seed)):
            asked, described = self._methods(False, seed), self._methods(True, seed)
            for name in METHODS:
                if name in refused:
                    continue
                try:
                    answers = None if name == "SGRS" else self._existence(asked[name]())
                    found = decode(self.model, [d.prompt for d in self.scenes], described[name](),
                                   self.steps, keep=False)
                except ERRORS as error:
                    refused[name] = str(error).rstrip(".")
                    continue
                rows[name, kind] = answers, self._counts(self._texts(found))
        table = pd.DataFrame([self._row(*key, *row, base) for key, row in rows.items()])
        self.out.table(f"methods-{self.model.name}".lower(), table)
        figures.table(self.out, table, self.model.name)
        errors, wrong = int((~base[0][0]).sum()), int(base[1][:, 1].sum())
        accuracy, said = float(base[0][0].mean()), int(base[1][:, 0].sum())
        for name in METHODS:
            if name in refused:
                self.skip(refused[name], f"exist_{name}", f"name_{name}")
                continue
            method, control = rows[name, "method"], rows[name, "control"]
            if method[0] is None or control[0] is None:
                self.skip("an answer of one word has no words before it, so nothing is ever "
                          "rejected", f"exist_{name}")
            elif accuracy < 0.55:
                self.skip(f"greedy decoding answers {accuracy:.0%} of {len(self.asked)} existence "
                          "questions right, and chance is 50 %", f"exist_{name}")
            elif errors < statistics.FEWEST:
                self.skip(f"greedy decoding errs on {errors} of {len(self.asked)} existence "
                          "questions, too few to see them vanish", f"exist_{name}")
            else:
                self.claim(f"exist_{name}", statistics.difference(
                    method[0][0], control[0][0], groups=np.arange(len(self.asked)) // 2),
                    null=0.0, causal=True, control=CONTROLS[name], unit="accuracy", figure="table",
                    details={"noise of the pictures": NOISE, "greedy": accuracy,
                             "method minus greedy": str(statistics.difference(
                                 method[0][0], base[0][0], groups=np.arange(len(self.asked)) // 2)),
                             "share of yes, greedy and method": [
                                 float(base[0][1].mean()), float(method[0][1].mean())]})
            if wrong < statistics.FEWEST:
                self.skip(f"greedy decoding names {said} objects in {len(self.scenes)} descriptions, "
                          f"{wrong} of them not there: too few to see them vanish", f"name_{name}")
                continue
            self.claim(f"name_{name}", _rates(method[1], control[1]), null=0.0, direction="below",
                       causal=True, control=CONTROLS[name], unit="share of named objects",
                       figure="table", details={
                           "noise of the pictures": NOISE, "greedy": _share(base[1]),
                           "method minus greedy": str(_rates(method[1], base[1])),
                           "missed objects, greedy and method": [
                               _share(base[1][:, 2:]), _share(method[1][:, 2:])]})
        self.skip("it needs a model that matches pictures with texts, and none comes with this "
                  "toolkit; `interp.flow.contrastive_decoding.AGLA` takes one as a function",
                  "masked")

    def _existence(self, method: Optional[Method]) -> tuple[np.ndarray, np.ndarray]:
        """Whether every question is answered right, and whether with yes."""
        found = decode(self.model, questions.prompts(self.asked), method, 1)
        said = np.array([one.tokens[0] if one.tokens else -1 for one in found])
        wanted = np.array([one.answer[0] for one in self.asked])
        return said == wanted, said == self.yes

    def _counts(self, texts: Sequence[str]) -> np.ndarray:
        """Per picture: objects named, of these not there, there, of these not named."""
        return np.array([cases.counted(d, text) for d, text in zip(self.scenes, texts)])

    def _row(
        self, name: str, kind: str, answers: Any, counts: np.ndarray, base: Any
    ) -> dict[str, Any]:
        row: dict[str, Any] = {
            "name": name, "kind": kind, "hallucinated": _share(counts),
            "missed": _share(counts[:, 2:]), "named": int(counts[:, 0].sum())}
        if answers is not None:
            row |= {"accuracy": float(answers[0].mean()), "yes": float(answers[1].mean())}
        if name != "greedy":
            gaps = {"hallucinated": _rates(counts, base[1])}
            if answers is not None:
                gaps["accuracy"] = statistics.difference(
                    answers[0], base[0][0], groups=np.arange(len(self.asked)) // 2)
            for what, gap in gaps.items():
                row |= {f"{what} change": gap.value, f"{what} low": gap.interval[0],
                        f"{what} high": gap.interval[1]}
        return row

    # -- what the methods look at -----------------------------------------------------------------

    def _maps(self) -> None:
        """Do their maps point at the object, and do tower and language model agree?"""
        model = self.model
        shown = [one for one in self.plain if one.region]
        if not shown:
            self.skip("the processor gives no pixel boxes for its tokens", "delta", "gaze")
            self.out.no_figure("maps", "the processor gives no pixel boxes", of=model.name)
            return
        prompts = questions.prompts(shown)
        truth = [np.isin(decoding.image_tokens(one.prompt), one.region) for one in shown]
        asked, columns = self._methods(False, None), {}
        plans = {}
        for name in ("AvisC", "IAVA", "GIFT", "PAINT"):
            try:
                plans[name] = asked[name]().plans(model, prompts, 1)
            except ERRORS as error:
                columns[name] = str(error).rstrip(".")
        raw = [m.mean((0, 1, 2)) for m in decoding.last_row_attention(model, prompts)]
        for key, name, other in (("delta", "IAVA", "raw"), ("gaze", "GIFT", "row")):
            if name not in plans:
                self.skip(columns[name], key)
                continue
            maps = [plan.found["map"] for plan in plans[name]]
            if other == "row":
                (layer,) = {plan.found["layer"] for plan in plans[name]}
                against = [m.mean((0, 1, 2)) for m in decoding.last_row_attention(
                    model, prompts, layers=[layer])]
            else:
                against = raw
            areas = [[auroc(m, t) for m, t in zip(some, truth)] for some in (maps, against)]
            details: dict[str, Any] = {
                "AUROC of the map": str(statistics.mean(areas[0])),
                "AUROC of attention of the last row": str(statistics.mean(areas[1]))}
            if name == "IAVA":
                details["AUROC by generic instruction"] = self._spread(shown, raw, truth)
            self.claim(key, statistics.difference(*areas), null=0.0, unit="AUROC", figure="maps",
                       details=details)
        towers = self._towers(prompts, raw)
        figures.maps(self.out, shown[0], raw[0], plans, towers, model.name)

    def _spread(
        self, shown: Sequence[Asked], raw: Sequence[torch.Tensor], truth: Sequence[np.ndarray]
    ) -> dict[str, float]:
        """The generic instruction is a free choice: what others give."""
        found = {}
        for text in (questions.GENERAL, "what is it ?", cases.DESCRIBE):
            others = decoding.last_row_attention(self.model, [self.model.prompt(
                text, images=list(one.prompt.images), chat=questions.has_chat(self.model))
                for one in shown])
            found[text] = float(np.mean([auroc(a - m.mean((0, 1, 2)), t)
                                         for a, m, t in zip(raw, others, truth)]))
        return found

    def _towers(
        self, prompts: Sequence[Prompt], raw: Sequence[torch.Tensor]
    ) -> Optional[list[torch.Tensor]]:
        """Attention in the tower against attention in the language model."""
        try:
            rows = [decoding.class_rows(self.model, prompt) for prompt in prompts]
        except ERRORS as error:
            self.skip(str(error).rstrip("."), "overlap", "rank")
            self.out.no_figure("outliers", str(error), of=self.model.name)
            return None
        tower = [r[max(-2, -len(r))].mean(0) for r in rows]
        count = max(1, min(10, len(tower[0]) // 4))
        both = [outlier_tokens(a[None], count)[1] & outlier_tokens(b[None], count)[1]
                for a, b in zip(tower, raw)]
        shared = [float(x.sum()) / count - count / len(x) for x in both]
        self.claim("overlap", statistics.mean(shared), null=0.0, figure="outliers",
                   unit="share, above chance", control=f"chance: {count} of {len(both[0])} tokens",
                   details={"outliers": count, "shared": float(np.mean(
                       [float(x.sum()) / count for x in both]))})
        self.claim("rank", statistics.mean([_spearman(a, b) for a, b in zip(tower, raw)]),
                   null=0.0, unit="Spearman correlation per picture", figure="outliers")
        figures.outliers(self.out, tower, raw, count, self.model.name)
        return tower

    def _blind(self) -> None:
        """What yes and no become when tokens lose their content."""
        model, prompts = self.model, questions.prompts(self.plain)
        variants: dict[str, list[tuple]] = {name: [] for name in (
            "none", "blind", "as many others", "all but blind", "as many at random")}
        sizes = []
        try:
            decoding.refuse_deep_stack(model)
        except ERRORS as error:
            self.skip(str(error).rstrip("."), "blind", "even")
            self.out.no_figure("shift", str(error), of=model.name)
            return
        for number, (prompt, rows) in enumerate(zip(
                prompts, decoding.last_row_attention(model, prompts))):
            image = np.array(decoding.image_tokens(prompt))
            blind = blind_tokens(rows[:, :, 0])[1].numpy()
            own, others = image[blind], image[~blind]
            size = min(len(own), len(others))
            gone = {"none": (), "blind": own[:size],
                    "as many others": decoding.random_tokens(others, size, 0, number),
                    "all but blind": others,
                    "as many at random": decoding.random_tokens(image, len(others), 1, number)}
            sizes.append(size)
            for name, places in gone.items():
                variants[name].append((edit("embed", "replace", 0.0, positions=[
                    int(p) for p in places]),) if len(places) else ())
        odds = {}
        for name, writes in variants.items():
            rows = torch.cat([
                model.stepping(prompts[i : i + 32], write=decoding.each(writes[i : i + 32])).logits
                for i in range(0, len(prompts), 32)]).double()
            odds[name] = (rows[:, self.yes] - rows[:, self.no]).numpy()
        moved = {name: np.abs(o - odds["none"]) for name, o in odds.items()}
        groups = np.arange(len(prompts)) // 2
        if min(sizes) == 0:
            self.skip(f"in {sizes.count(0)} of {len(sizes)} prompts no image token is blind",
                      "blind", "even")
        else:
            self.claim("blind", statistics.difference(
                moved["blind"], moved["as many others"], groups=groups), null=0.0,
                direction="below", causal=True, unit="log-odds", figure="shift",
                control="as many random tokens that are not blind", details={
                    "blind tokens": float(np.mean(sizes)),
                    **{f"change, {k}": float(v.mean()) for k, v in moved.items()}})
            sure = {k: np.abs(1 / (1 + np.exp(-o)) - 0.5) for k, o in odds.items()}
            self.claim("even", statistics.difference(
                sure["all but blind"], sure["as many at random"], groups=groups), null=0.0,
                direction="below", causal=True, unit="distance from 50:50", figure="shift",
                control="as many random image tokens", details={
                    k: float(v.mean()) for k, v in sure.items()})
        figures.shift(self.out, {k: odds[k] - odds["none"] for k in odds if k != "none"}, model.name)

    # -- words ------------------------------------------------------------------------------------

    def _words(self, told: Sequence[tuple[Described, Decoded]]) -> None:
        """Ranks, saliency and chosen cells of the words of greedy descriptions."""
        told = [(d, one) for d, one in told if len(one.tokens) > 1]
        kinds = [self._kinds(d, one.tokens) for d, one in told]
        if told:
            walked = [self._walk(d, one.tokens) for d, one in told]
            self._ranks([w[0] for w in walked], told)
            self._cells(told, [w[1] for w in walked])
            self._saliency(told, kinds)
            self._released(told)
            return
        reason = f"{self.model.name} says nothing when it is asked to describe pictures"
        self.skip(reason, "loss", "early", "hidden", "saliency", "above_attention", "above_loss",
                  "released", "cell", "cell_attention")
        for name in ("ranks", "saliency"):
            self.out.no_figure(name, reason, of=self.model.name)

    def _kinds(self, described: Described, tokens: Sequence[int]) -> dict[int, bool]:
        """Step -> whether the object named there is there."""
        found = {}
        for name, steps in cases.steps_of(self.model, tokens):
            found |= {step: name in described.names for step in steps}
        return found

    def _walk(
        self, described: Described, tokens: Sequence[int]
    ) -> tuple[np.ndarray, list[int]]:
        """Along a description: ranks of color and shape words in every layer
        `[layer, step, word]` (log10), and the image token most attended at every step."""
        model, ids = self.model, list(cases.word_ids(self.model).values())
        image = list(decoding.image_tokens(described.prompt))
        steps = model.stepping(described.prompt, read=["resid_post", "pattern"], tail=1)
        ranks, most = [], []
        for token in tokens:
            states = torch.stack([steps.read(0, f"resid_post.{layer}")[-1]
                                  for layer in range(model.n_layers - 1)])
            logits = torch.cat([unembed(model, states), steps.logits])
            above = [(logits > logits[:, i : i + 1]).sum(-1) for i in ids]
            ranks.append(torch.stack(above, -1).double().add(1).log10().numpy())
            attention = torch.stack([steps.read(0, f"pattern.{layer}")[:, -1]
                                     for layer in range(model.n_layers)]).mean((0, 1))
            most.append(image[int(attention[image].argmax())])
            steps.feed([token])
        return np.stack(ranks, 1), most

    def _ranks(self, walked: Sequence[np.ndarray], told: Sequence[tuple[Described, Decoded]]) -> None:
        words = list(cases.word_ids(self.model))
        names = ("there and said", "there, not said", "said, not there", "neither")
        by_layer = np.full((len(told), 4, self.model.n_layers), np.nan)
        along = np.full((len(told), 4, 3), np.nan)
        for number, (ranks, (described, one)) in enumerate(zip(walked, told)):
            there = {word for thing in described.scene.shapes for word in (thing.color, thing.shape)}
            text = self.model.tokenizer.decode(one.tokens).lower()
            said = {word for word in words if word in text}
            sets = (there & said, there - said, said - there, set(words) - there - said)
            for kind, some in enumerate(sets):
                chosen = [i for i, word in enumerate(words) if word in some]
                if not chosen:
                    continue
                part = ranks[:, :, chosen].mean(2)
                by_layer[number, kind] = part.mean(1)
                if part.shape[1] >= 3:
                    along[number, kind] = [x[-1].mean() for x in np.array_split(part, 3, axis=1)]
        figures.ranks(self.out, by_layer, along, names, self.model.name)
        early = list(decoding.at_depth(range(25, 31), self.model.n_layers))
        values = {
            "loss": (along[:, 0, 2] - along[:, 0, 0], along[:, 3, 2] - along[:, 3, 0]),
            "early": tuple(by_layer[:, k][:, early].mean(1) - by_layer[:, k, -1] for k in (0, 3)),
            "hidden": (by_layer[:, 1, -1], by_layer[:, 3, -1]),
        }
        for key, (treated, control) in values.items():
            known = np.isfinite(treated) & np.isfinite(control)
            if known.sum() < statistics.FEWEST:
                self.skip(f"only {int(known.sum())} of {len(told)} descriptions have words of every "
                          "kind that is compared", key)
                continue
            self.claim(key, statistics.difference(treated[known], control[known]), null=0.0,
                       direction="above" if key == "loss" else "below", unit="log10 of the rank",
                       control="color and shape words that are neither there nor said",
                       figure="ranks", details={
                           "words there": float(treated[known].mean()),
                           "other words": float(control[known].mean()), "layers": early})

    def _cells(
        self, told: Sequence[tuple[Described, Decoded]], most: Sequence[list[int]]
    ) -> None:
        """Does ReVisiT choose cells of the object whose words are being said?"""
        prompts = [d.prompt for d, _ in told]
        if not all(p.of_kind("image")[0].boxes for p in prompts):
            self.skip("the processor gives no pixel boxes for its tokens", "cell", "cell_attention")
            return
        forced = decode(self.model, prompts, ReVisiT(), forced=[one.tokens for _, one in told])
        scale = 1 if questions.is_looker(self.model) else questions.SCALE
        rows, owner = [], []
        for number, ((described, one), looked) in enumerate(zip(told, most)):
            image = described.prompt.of_kind("image")[0]
            objects = {t.name: t for t in described.scene.objects}
            unique = {n for n in objects if [t.name for t in described.scene.objects].count(n) == 1}
            for name, steps in cases.steps_of(self.model, one.tokens):
                if name not in unique:
                    continue
                boxes = [tuple(float(scale * x) for x in box) for box in objects[name].boxes]
                cells = {p for box in boxes for p in image.inside(box, 0.1)}
                for step in steps if cells else ():
                    chosen = forced[number].plan.found["chosen"][step]
                    rows.append((chosen in cells, len(cells) / len(image), looked[step] in cells))
                    owner.append(number)
        if len(set(owner)) < statistics.FEWEST:
            self.skip(f"{self.model.name} names things that are there in {len(set(owner))} of "
                      f"{len(told)} descriptions", "cell", "cell_attention")
            return
        hit, chance, attended = np.array(rows, float).T
        details = {"words": len(rows), "ReVisiT": float(hit.mean()), "random": float(chance.mean()),
                   "most attended token": float(attended.mean())}
        self.claim("cell", statistics.difference(hit, chance, groups=owner), null=0.0,
                   unit="share of words", figure="maps", control="a random image token",
                   details=details)
        self.claim("cell_attention", statistics.difference(hit, attended, groups=owner), null=0.0,
                   unit="share of words", figure="maps", details=details)

    def _saliency(
        self, told: Sequence[tuple[Described, Decoded]], kinds: Sequence[dict[int, bool]]
    ) -> None:
        """Saliency of what was said, for words of things that are and are not there."""
        measured = saliency_rejection.measure(
            self.model, [d.prompt for d, _ in told], [one.tokens for _, one in told])
        rows = [(number, there, step, *(values[k][step] for k in ("saliency", "attention", "loss")))
                for number, (values, kind) in enumerate(zip(measured, kinds))
                for step, there in kind.items() if step]
        wrong = sum(not row[1] for row in rows)
        keys = ("saliency", "above_attention", "above_loss")
        if min(wrong, len(rows) - wrong) < statistics.FEWEST:
            reason = (f"greedy descriptions hold {wrong} words of things that are not there and "
                      f"{len(rows) - wrong} of things that are: too few to tell them apart")
            self.skip(reason, *keys)
            self.out.no_figure("saliency", reason, of=self.model.name)
            return
        owner, there, step, saliency, attention, loss = np.array(rows, float).T
        figures.saliency(self.out, there.astype(bool), step, saliency, attention, self.model.name)
        away = 1 - there

        def area(score: np.ndarray, label: np.ndarray) -> float:
            return auroc(score, label > 0.5) if 0 < label.sum() < len(label) else float("nan")

        details = {"words of things not there": wrong, "of things there": len(rows) - wrong,
                   "AUROC of low saliency": area(-saliency, away),
                   "AUROC of low attention": area(-attention, away),
                   "AUROC of -log p": area(loss, away), "AUROC of the step": area(step, away)}
        more = dict(figure="saliency", unit="AUROC", details=details)
        self.claim("saliency", statistics.bootstrap(
            area, -saliency, away, groups=owner, resamples=1000, name="AUROC"), null=0.5, **more)
        for key, other in (("above_attention", -attention), ("above_loss", loss)):
            self.claim(key, statistics.bootstrap(
                lambda s, o, label: area(s, label) - area(o, label), -saliency, other, away,
                groups=owner, resamples=1000, name="difference of AUROC"), null=0.0, **more)

    def _released(self, told: Sequence[tuple[Described, Decoded]]) -> None:
        """The gradient in the row that the released code reads."""
        sizes, rows = [], told[: statistics.FEWEST + 1]
        for described, one in rows:
            found = saliency_rejection.released_row(self.model, described.prompt, one.tokens[:4])
            sizes.append(max(float(g.abs().max()) for _, g in found.values()))
        self.claim("released", statistics.mean(sizes), null=0.0, direction="equal",
                   figure="saliency", unit="largest gradient", paper_tag="derived",
                   details={"words": len(sizes)})

    def _mass(self) -> None:
        """Attention on the picture per layer, with PAINT and without."""
        prompts = questions.prompts(self.asked)[:8]
        try:
            plans = PAINT().plans(self.model, prompts, 1)
        except ERRORS as error:
            self.out.no_figure("mass", str(error), of=self.model.name)
            return
        found = {}
        for name, writes in (("greedy", [()] * len(prompts)), ("PAINT", [p.write for p in plans])):
            steps = self.model.stepping(prompts, write=decoding.each(writes), read="pattern", tail=1)
            found[name] = np.array([[float(steps.read(i, f"pattern.{layer}")[:, -1][
                :, list(decoding.image_tokens(prompt))].sum(-1).mean())
                for layer in range(self.model.n_layers)] for i, prompt in enumerate(prompts)])
        figures.mass(self.out, found, self.model.name)


def _rates(treated: np.ndarray, control: np.ndarray) -> statistics.Estimate:
    """Share of named objects that are not there, `treated` minus `control`, over pictures."""
    def gap(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> float:
        return float(b.sum() / a.sum() - d.sum() / c.sum()) if a.sum() and c.sum() else float("nan")

    return statistics.bootstrap(gap, treated[:, 0], treated[:, 1], control[:, 0], control[:, 1],
                                resamples=2000, name="difference of shares")


def _share(counts: np.ndarray) -> float:
    """The second column as a share of the first, over all pictures."""
    total = int(counts[:, 0].sum())
    return float(counts[:, 1].sum() / total) if total else float("nan")


def _spearman(a: torch.Tensor, b: torch.Tensor) -> float:
    """Rank correlation of two maps; 0 where one is constant."""
    ranks = [stats.rankdata(x.numpy()) for x in (a, b)]
    return 0.0 if np.ptp(ranks[0]) == 0 or np.ptp(ranks[1]) == 0 else float(
        np.corrcoef(*ranks)[0, 1])
