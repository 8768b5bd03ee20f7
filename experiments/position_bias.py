"""Position bias over interchangeable documents (arXiv:2508.05128, arXiv:2406.02536, arXiv:2407.01100).

Several documents, the gold one in every slot: where does attention go, does the answer follow it,
which coordinates carry position, does scaling one of them help, and how much hangs on the order?
"""

from collections.abc import Mapping
from typing import Any, Optional

import numpy as np
from scipy import stats

import interp
from experiments import _document_tasks as tasks
from experiments import _texts as texts
from experiments._output import Output
from experiments._paper import Paper, Settings
from interp.causal.metrics import AnswerAccuracy, AnswerLogProb
from interp.core import Claim, ModelRefused, Prompt, PromptError, Result, statistics
from interp.figures import layer_curve
from interp.figures.style import PAGE, canvas, color, note
from interp.flow import attention_basin, position_bias, positional_channel
from interp.models.model import Model
from interp.organisms.twins import positions_off
from interp.prompts.documents import Documents

PAPER = Paper(
    "position_bias",
    "Attention Basin; Mitigate Position Bias in Large Language Models via Scaling a Single "
    "Dimension; Eliminating Position Bias of Language Models (PINE)",
    ("2508.05128", "2406.02536", "2407.01100"),
    "Where among several documents does a model look, and what hangs on their order?",
    figures={
        "basin": "Attention of the question's rows per token of the document in each slot, by layer "
        "(left), and the answer's log probability by the slot of the gold document (right).",
        "ranking": "Log probability of the answer with the documents in the order of AttnRank, of a "
        "retriever, its reverse, and at random.",
        "channels": "Mean of the most position-like channels on texts, by position (left), and the "
        "monotonicity of all channels on texts, shuffled tokens, and without position encodings "
        "(right).",
        "scaling": "Change of the answer's log probability when a channel is scaled where the last "
        "token attends, on the calibration half: the chosen channels and random ones (gray).",
        "orders": "Probability of the answer over orders of the documents, as they are read and when "
        "they are read side by side.",
    },
    models=("reader",),
)
BASIN, CHANNEL, ORDER = PAPER.sources
FACTORS = (-1.0, 0.0, 0.5, 2.0)
RANDOM_CHANNELS = 5

SENTENCES = {
    "basin": "Documents at both ends get more attention than those between them.",
    "follows": "The answer is likelier where the gold document stands in a slot that gets more "
    "attention.",
    "ranking": "The most relevant documents in the most attended slots cause a likelier answer than "
    "documents in random order.",
    "retriever": "They cause a likelier answer than documents in the retriever's order.",
    "channel": "Some channels of the residual stream rise or fall with the position.",
    "shuffled": "They do so on shuffled tokens, too.",
    "frozen": "They do so without position encodings, too: the causal mask makes them.",
    "scaling": "Scaling one positional channel where the last token attends causes likelier answers "
    "on other prompts.",
    "orders": "The order of the documents changes the probability of the answer.",
    "order_free": "Documents that are read side by side, none seeing another, give one answer in every "
    "order.",
    "pine": "PINE makes the answer independent of the order while documents see each other.",
}
OF = {**dict.fromkeys(("basin", "follows", "ranking", "retriever"), BASIN),
      **dict.fromkeys(("channel", "shuffled", "frozen", "scaling"), CHANNEL),
      **dict.fromkeys(("orders", "order_free", "pine"), ORDER)}
NUMBERS = {"scaling": {"paper_number": "up to +15.2 %", "paper_tag": "secondary"}}


def run(settings: Settings, out: Output) -> None:
    for name in settings.models(PAPER):
        model = interp.open_model(name, **settings.opening())
        count = settings.pick(20, tiny=4)
        try:
            asked = tasks.questions(model, settings.rng(1), count=count, n_places=count,
                                    each=settings.pick(2, tiny=2))
        except PromptError as error:
            out.record(model)
            for key in SENTENCES:
                _claim(out, model, key, reason=str(error))
            for figure in PAPER.figures:
                out.no_figure(figure, str(error), of=model.name)
            continue
        out.record(model, tasks.prompts_of(asked), f"documents-{model.name}")
        _One(model, settings, out, asked).run()


def _claim(
    out: Output, model: Model, key: str, estimate: Optional[Any] = None, *, reason: str = "",
    **more: Any,
) -> None:
    if reason:
        found = Claim.untestable(SENTENCES[key], OF[key], reason, **NUMBERS.get(key, {}))
    else:
        assert estimate is not None
        found = Claim(SENTENCES[key], OF[key], **{
            **estimate.for_claim(), **NUMBERS.get(key, {}), **more})
    out.claim(found, model.name)


class _One:
    """Everything about one model."""

    def __init__(
        self, model: Model, settings: Settings, out: Output, asked: list[Documents]
    ) -> None:
        self.model, self.settings, self.out, self.asked = model, settings, out, asked
        self.right = AnswerAccuracy(tasks.answers_of(asked))(model, tasks.prompts_of(asked))
        self.log_p = AnswerLogProb(tasks.answers_of(asked))(model, tasks.prompts_of(asked))
        # A model that answers nothing has no answers to lose.
        self.mute = "" if self.right.any() else (
            f"{model.name} answers none of {len(asked)} questions, so none can depend on the order")

    def claim(self, key: str, estimate: Optional[Any] = None, **more: Any) -> None:
        _claim(self.out, self.model, key, estimate, **more)

    def run(self) -> None:
        self._basin()
        self._channels()
        self._orders()

    # -- the attention basin ------------------------------------------------------------------

    def _basin(self) -> None:
        model, asked, out = self.model, self.asked, self.out
        found = attention_basin.measure(model, asked)
        out.save(f"basin-{model.name}", found)
        values = found["per_token"].values
        known = [x for x in range(model.n_layers) if np.isfinite(values[:, x]).all()]
        first, p = attention_basin.shallowest(found, permutations=self.settings.pick(300, tiny=60))
        if not known:
            reason = f"no layer of {model.name} sees all documents from the question"
            for key in ("basin", "follows", "ranking", "retriever"):
                self.claim(key, reason=reason)
            out.no_figure("ranking", reason, of=model.name)
            out.no_figure("basin", reason, of=model.name)
            return
        mean = values[:, known].mean(1)
        null = attention_basin.permuted(mean, seed=self.settings.seed)
        bare = np.nanmean(attention_basin.without_gold(found).values[:, known], axis=(0, 1))
        self.claim("basin", statistics.bootstrap(
            lambda rows: float(attention_basin.basin_index(mean[rows.astype(int)].mean(0))),
            np.arange(len(mean)), resamples=1000, name="basin index of the mean over layers"),
            null=float(np.quantile(null, 0.95)), unit="attention per token", figure="basin",
            control="slots permuted within prompts (95 %)", details={
                "profile": mean.mean(0).tolist(), "without the gold document": bare.tolist(),
                "first layer with a basin": "none" if first is None else first,
                "p by layer": p.tolist(),
                "accuracy by slot": [float(self.right[[o.place == s for o in asked]].mean())
                                     for s in range(asked[0].count)]})
        self._follows(mean)
        self._ranking(bare)
        figure, axes = canvas(1, 2, width=PAGE, height=2.6)
        attention_basin.draw(found, axes[0], known if len(known) <= 6 else
                             known[:: -(-len(known) // 6)])
        by_slot = np.array([self.log_p[[o.place == s for o in asked]] for s in
                            range(asked[0].count)]).T
        few = len(by_slot) < statistics.FEWEST  # too few for a band: show them
        layer_curve.draw(axes[1], {"gold document": by_slot.mean(0) if few else by_slot},
                         along="slot", label="log p(answer) (nats per token)")
        if few:
            axes[1].plot(by_slot.T, ".", color=color("control"))
            note(axes[1], f"line: mean of {len(by_slot)} prompts per slot (dots)")
        for ax in axes:
            ax.xaxis.get_major_locator().set_params(integer=True)
        figure.suptitle(model.name)
        out.figure("basin", figure, of=model.name)

    def _follows(self, mean: np.ndarray) -> None:
        if self.mute:
            self.claim("follows", reason=self.mute)
            return
        place, log_p = np.array([one.place for one in self.asked]), self.log_p

        def follows(rows: np.ndarray) -> float:
            drawn = rows.astype(int)
            slots = [s for s in range(mean.shape[1]) if (place[drawn] == s).any()]
            known = [log_p[drawn][place[drawn] == s].mean() for s in slots]
            profile = mean[drawn].mean(0)[slots]
            if len(slots) < 3 or np.ptp(known) == 0:
                return float("nan")
            return float(stats.spearmanr(profile, known).statistic)

        self.claim("follows", statistics.bootstrap(
            follows, np.arange(len(place)), resamples=1000,
            name="Spearman over slots of attention and log p(answer)"), null=0.0, figure="basin",
            control="the same questions with the gold document elsewhere")

    def _ranking(self, profile: np.ndarray) -> None:
        model, out, count = self.model, self.out, self.asked[0].count
        if self.mute or not np.isfinite(profile).all():
            reason = self.mute or "some slot is never seen"
            for key in ("ranking", "retriever"):
                self.claim(key, reason=reason)
            out.no_figure("ranking", reason, of=model.name)
            return
        rng, falling = self.settings.rng(2), -np.arange(float(count))
        relevance = [attention_basin.overlap(one) + 1e-6 * rng.random(count) for one in self.asked]
        arranged = {
            "AttnRank": [attention_basin.arrange(r, profile) for r in relevance],
            "retriever": [attention_basin.arrange(r, falling) for r in relevance],
            "reverse": [attention_basin.arrange(r, -falling) for r in relevance],
            "random": [tuple(int(i) for i in rng.permutation(count)) for _ in relevance],
        }
        metric = AnswerLogProb(tasks.answers_of(self.asked))
        try:
            log_p = {name: metric(model, [position_bias.reorder(one, order) for one, order in
                                          zip(self.asked, some)])
                     for name, some in arranged.items()}
        except PromptError as error:
            for key in ("ranking", "retriever"):
                self.claim(key, reason=str(error))
            out.no_figure("ranking", str(error), of=model.name)
            return
        details = {name: float(value.mean()) for name, value in log_p.items()}
        for key, other, control in (("ranking", "random", "random order"),
                                    ("retriever", "retriever", "the retriever's order")):
            self.claim(key, statistics.difference(log_p["AttnRank"], log_p[other]), null=0.0,
                       unit="nats per answer token", causal=True, control=control,
                       figure="ranking", details=details)
        figure, ax = canvas(1, 1, width=PAGE * 0.55, height=2.3)
        for at, (name, value) in enumerate(log_p.items()):
            low, high = statistics.mean(value, resamples=1000).interval
            hue = color("control") if name == "random" else color("primary")
            ax.plot([at, at], [low, high], color=hue)
            ax.plot([at], [value.mean()], "o", color=hue)
        ax.set_xticks(range(len(log_p)), list(log_p))
        ax.set_ylabel("log p(answer) (nats per token)")
        ax.set_xlim(-0.5, len(log_p) - 0.5)
        ax.set_title(model.name)
        note(ax, f"mean, 95 % bootstrap interval, n = {len(next(iter(log_p.values())))} prompts")
        out.figure("ranking", figure, of=model.name)

    # -- channels -----------------------------------------------------------------------------

    def _channels(self) -> None:
        model, out, settings = self.model, self.out, self.settings
        length = settings.pick(96, tiny=32)
        length = min(length, model.max_positions or length)
        count, rng = settings.pick(24, tiny=6), settings.rng(3)
        read = texts.natural(model, 2 * count, length, rng)
        start = max(1, len(texts.first_ids(model)))
        mixed = [Prompt.from_tokens([*p.ids[:start], *rng.permutation(p.ids[start:]).tolist()])
                 for p in read[count:]]
        kinds: dict[str, Result] = {
            "texts": positional_channel.measure(model, read[:count], skip=start),
            "other texts": positional_channel.measure(model, read[count:], skip=start),
            "shuffled tokens": positional_channel.measure(model, mixed, skip=start)}
        reason = ""
        try:
            with positions_off(model.hf):  # type: ignore[arg-type]
                kinds["no position encodings"] = positional_channel.measure(
                    model, mixed, skip=start)
        except ModelRefused as error:
            reason = str(error)
        chosen, score = positional_channel.choose(kinds["texts"], top=2)
        layers = slice(1, None) if model.n_layers > 1 else slice(None)
        reached = {name: one["monotonicity"].values[layers][:, chosen[0]]
                   for name, one in kinds.items()}
        # What the most monotone of as many channels of noise would reach.
        noise = max(float(positional_channel.monotonicity(np.random.default_rng(seed).normal(
            size=(1, length - start, model.d_model))).max()) for seed in range(3))
        details = {"channel": chosen[0], "by layer": {k: v.tolist() for k, v in reached.items()},
                   "channels above 0.9": int((score > 0.9).sum())}
        for key, name, control in (
            ("channel", "other texts", "the most monotone of as many channels of noise"),
            ("shuffled", "shuffled tokens", "the tokens in random order"),
            ("frozen", "no position encodings", "the same weights without position encodings"),
        ):
            if name not in kinds:
                self.claim(key, reason=reason)
                continue
            value = float(np.mean(reached[name]))
            self.claim(key, self._over_halves(model, name, read[count:], mixed, start, chosen[0],
                                              value),
                       null=noise, unit="rank correlation with the position", figure="channels",
                       control=control, details=details)
        last = model.n_layers - 1
        figure, axes = canvas(1, 2, width=PAGE, height=2.5)
        positional_channel.draw(kinds["texts"], axes[0], chosen, last)
        low, high = axes[0].get_ylim()
        axes[0].set_ylim(low, high + 0.25 * (high - low))  # room for the legend
        axes[0].legend(loc="upper right", ncols=2)
        for at, one in enumerate(kinds.values()):
            axes[1].plot(np.sort(one["monotonicity"].values[layers].mean(0))[::-1],
                         label=list(kinds)[at])
        axes[1].axhline(noise, color=color("control"), linestyle=":", label="most monotone of noise")
        axes[1].set_xlabel("channel, by rank")
        axes[1].set_ylabel("monotonicity (mean over layers)")
        axes[1].set_ylim(0, 1.02)
        axes[1].legend()
        figure.suptitle(model.name)
        out.figure("channels", figure, of=model.name)
        self._scaling(chosen)

    def _over_halves(
        self, model: Model, name: str, read: list[Prompt], mixed: list[Prompt], start: int,
        channel: int, value: float,
    ) -> statistics.Estimate:
        """Monotonicity of one channel, with a bootstrap over texts."""
        given = read if name == "other texts" else mixed
        sites = [f"resid_pre.{x}" for x in range(min(1, model.n_layers - 1), model.n_layers)]

        def states() -> np.ndarray:
            rows = []
            for prompt in given:
                reads = model.run(prompt, read=sites, logits="none").reads
                rows.append([reads[s].values[0, 0, start:, channel] for s in sites])
            return np.array(rows, dtype=float)

        if name == "no position encodings":
            with positions_off(model.hf):  # type: ignore[arg-type]
                each = states()
        else:
            each = states()

        def reached(rows: np.ndarray) -> float:
            mean = each[rows.astype(int)].mean(0)
            return float(positional_channel.monotonicity(mean[:, :, None]).mean())

        return statistics.bootstrap(reached, np.arange(len(each)), resamples=200,
                                    name="mean monotonicity over layers")

    def _scaling(self, chosen: tuple[int, ...]) -> None:
        model, out = self.model, self.out
        if self.mute:
            self.claim("scaling", reason=self.mute)
            out.no_figure("scaling", self.mute, of=model.name)
            return
        half = min(self.settings.pick(8, tiny=5), len(self.asked) // 2)
        order = self.settings.rng(4).permutation(len(self.asked))
        parts = [[self.asked[i] for i in order[:half]], [self.asked[i] for i in order[half:2 * half]]]
        free = [c for c in range(model.d_model) if c not in chosen]
        random = [int(c) for c in self.settings.rng(5).choice(free, RANDOM_CHANNELS, replace=False)]
        factors = self.settings.pick(FACTORS, tiny=FACTORS[:2])

        def scaled(part: list[Documents], channels: Any, sizes: Any) -> Result:
            return positional_channel.scaling(
                model, tasks.prompts_of(part), [one.answer[0] for one in part], channels, sizes)

        try:
            found = scaled(parts[0], chosen, factors)
            best = found["log_p"].mean("prompt")
            at = np.unravel_index(int(best.values.argmax()), best.shape)
            channel, factor = chosen[at[0]], factors[at[1]]
            held = scaled(parts[1], [channel, *random], [factor])
        except ModelRefused as error:
            self.claim("scaling", reason=str(error))
            out.no_figure("scaling", str(error), of=model.name)
            return
        out.save(f"scaling-{model.name}", held)
        gain = held["log_p"].isel(factor=0) - held["base"]
        other = gain.sel(channel=random).mean("channel").values
        mine = gain.sel(channel=channel).values
        self.claim("scaling", statistics.difference(mine, other), null=0.0, causal=True,
                   unit="nats", figure="scaling",
                   control=f"{RANDOM_CHANNELS} random channels, the same factor", details={
                       "channel": channel, "factor": factor, "gain": float(mine.mean()),
                       "gain of random channels": float(other.mean()),
                       "accuracy": float(held["right"].sel(channel=channel).mean()),
                       "accuracy before": float(held["base_right"].mean()),
                       "where": held.manifest["where"]})
        figure, ax = canvas(1, 1, width=PAGE * 0.6, height=2.4)
        start = found["base"].mean()
        for number, one in enumerate(chosen):
            change = {**dict(zip(factors, (best.isel(channel=number) - start).values)), 1.0: 0.0}
            ax.plot(*zip(*sorted(change.items())), "-o", label=f"channel {one}")
        ax.axvline(1.0, color=color("control"), linewidth=0.6)
        ax.axhline(0.0, color=color("control"), linewidth=0.6)
        ax.plot([factor] * len(random), gain.sel(channel=random).mean("prompt").values, ".",
                color=color("control"), label="random channels (held out)")
        ax.set_xlabel("factor")
        ax.set_ylabel("change of log p(answer) (nats)")
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
        ax.legend(loc="upper right", ncols=2)
        ax.set_title(model.name)
        note(ax, f"means of {half} prompts; a factor of 1 changes nothing")
        out.figure("scaling", figure, of=model.name)

    # -- orders -------------------------------------------------------------------------------

    def _orders(self) -> None:
        model, out = self.model, self.out
        some = self.asked[: self.settings.pick(6, tiny=5)]
        most = self.settings.pick(5, tiny=3)
        self.claim("pine", reason="sorting documents anew for every query document, head and layer is "
                   "not built; documents that do not see each other stand in for it")
        try:
            found = position_bias.measure(model, some, most)
            free = position_bias.measure(model, some, most, order_free=True)
        except (PromptError, ModelRefused) as error:
            for key in ("orders", "order_free"):
                self.claim(key, reason=str(error))
            out.no_figure("orders", str(error), of=model.name)
            return
        out.save(f"orders-{model.name}", found)
        out.save(f"order-free-{model.name}", free)
        kind = {"unit": "standard deviation of p(answer)", "figure": "orders"}
        details: Mapping[str, Any] = {
            "accuracy as it is": float(found["right"].mean()),
            "accuracy side by side": float(free["right"].mean()),
            "orders": len(found.manifest["orders"])}
        if self.mute:
            self.claim("orders", reason=self.mute)
        else:
            self.claim("orders", statistics.mean(np.sqrt(found["variance"])), null=0.01,
                       control="documents read side by side", details=details, **kind)
        # What is left is rounding: numbers of the model's own precision.
        self.claim("order_free", statistics.mean(np.sqrt(free["variance"])), null=1e-3,
                   direction="below", control="the same prompts as they are",
                   details={**details, "as it is": float(np.sqrt(found["variance"]).mean())},
                   **kind)
        figure, ax = canvas(1, 1, width=PAGE * 0.6, height=2.5)
        position_bias.draw(found, free, ax)
        ax.set_title(model.name)
        out.figure("orders", figure, of=model.name)
