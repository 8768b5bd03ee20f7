"""Ranked sweeps: guess the effect of every cell from one gradient, then verify the largest exactly.

Most sweeps ask for the few cells that matter. A forward and a backward give every cell a first-order
score; what a cell does in the last row alone is computed exactly on top of it (one token per cell,
`interp.models.last_row`), so only the way through other positions is linearized. The cells that score
highest are measured exactly. Saturated attention or two effects that cancel can hide a cell from its
gradient: a random sample of the other cells is measured too, and the result says what recall of the
exact top it implies, with an interval. Where recall is low, it says so.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex, Union, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from interp.causal.ablate import mean_output
from interp.causal.metrics import AnswerLogProb, LogitDifference, Metric, check_count
from interp.causal.passes import Passes
from interp.causal.removal import Removal
from interp.core import Head, Prompt, PromptError, Result, ablate
from interp.core.errors import ModelRefused
from interp.core.prompt import Where
from interp.models.head_gradients import head_gradients
from interp.models.last_row import replay_last
from interp.models.model import Model
from interp.models.resume import Resumable
from interp.models.variants import Variants

What = Literal["heads", "positions"]
ENOUGH = 0.95
"""Recall from which on the ranking counts as good."""

ROOM = 1 << 25
"""Largest number of attention weights held at once while scoring positions."""

BACKWARD = 2.0
"""What a backward costs, in plain passes."""


def ranked_sweep(
    model: Model,
    prompts: Union[Prompt, Sequence[Prompt]],
    metric: Metric,
    what: str = "heads",
    *,
    share: SupportsFloat = 0.1,
    factor: SupportsFloat = 1.5,
    audit: Optional[SupportsIndex] = 16,
    where: Where = "all",
    by: str = "zero",
    seed: SupportsIndex = 0,
) -> Result:
    """The cells with the largest effects, for a fraction of the passes of a whole sweep.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompts = [Prompt.from_tokens(range(3, 12))]
        >>> found = ranked_sweep(model, prompts, LogitDifference([5], [6]), "positions", audit=4)
        >>> found["exact"].dims, int(found["measured"].isin(["verified"]).sum())
        (('layer', 'position'), 3)

    Args:
        metric: `LogitDifference`, or `AnswerLogProb` of answers of one token.
        what: "heads", ablated one at a time (`by` "zero" or "mean"), or "positions": a token
            dropped from a block on, the others keeping their numbers (`interp.causal.removal`).
        share: of all cells, how many are asked for, those with the largest mean effect over prompts
            in absolute value.
        factor: so many times as many are verified, by their score.
        audit: how many of the others are drawn at random and measured; all of them for None, which
            is the exact sweep.
        where: for "positions", the places to drop; equally many in every prompt. The last position
            of a prompt, which predicts, is not one.

    Returns:
        [layer, head or position]: `score` (the guess), `exact` (NaN where not measured), `measured`
        ("verified", "audit" or ""), `top` (the first `share` among the verified cells). Scalars:
        `recall` of the exact top and its 95 % interval `recall_low`, `recall_high`;
        `rank_correlation` of |score| and |exact| over the audited cells; `prefills`, the cost per
        prompt in plain passes with a backward counted as two, of which `prefills_audit` for the
        audit; `naive_prefills`, that of one whole pass per cell. The manifest has `audit`, a
        sentence, and `recall_is` "low", "high" or "unsure".

    Raises:
        PromptError: another metric, another `what`, prompts with different numbers of places.
        ModelRefused: models that cannot be resumed in the middle.

    Source: attribution patching, arXiv:2310.10348; the audit and the exact last row are this
    toolkit's.
    """
    given = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    if not given:
        raise PromptError("no prompts to run: give at least one.")
    if what not in get_args(What):
        raise PromptError(f"cannot rank {what!r}; choose one of: {', '.join(get_args(What))}.")
    if what == "heads" and by not in ("zero", "mean"):
        raise PromptError(f"heads are ranked for ablation by 'zero' or 'mean', not {by!r}.")
    if not 0 < float(share) <= 1 or float(factor) < 1:
        raise ValueError(f"share must lie in (0, 1] and factor be at least 1, not {float(share):g} "
                         f"and {float(factor):g}.")
    cells: _Heads | _Positions = _Heads(model, given, metric, by) if what == "heads" else \
        _Positions(model, given, metric, where)
    score = np.mean([cells.scores(number) for number in range(len(given))], 0)
    total = score.size
    wanted = max(1, round(float(share) * total))
    order = np.argsort(-np.abs(score).ravel(), kind="stable")
    verified = np.sort(order[: min(total, int(np.ceil(float(factor) * wanted)))])
    rest = np.setdiff1d(np.arange(total), verified)
    drawn = rest if audit is None else np.random.default_rng(int(seed)).choice(
        rest, min(len(rest), int(audit)), replace=False)
    exact = np.full(total, np.nan)
    exact[verified] = cells.exact(verified)
    before_audit = cells.spent
    exact[drawn] = cells.exact(np.sort(drawn))[np.argsort(np.argsort(drawn))]
    measured = np.full(total, "", dtype="<U8")
    measured[verified], measured[drawn] = "verified", "audit"
    top = np.zeros(total, dtype=bool)
    top[verified[np.argsort(-np.abs(exact[verified]), kind="stable")[:wanted]]] = True
    found = recall(np.abs(exact[verified]), np.abs(exact[drawn]), len(rest), wanted)
    rho = float("nan")
    if len(drawn) > 2 and np.ptp(exact[drawn]) > 0 and np.ptp(score.ravel()[drawn]) > 0:
        ranks: Any = stats.spearmanr(np.abs(score.ravel()[drawn]), np.abs(exact[drawn]))
        rho = float(ranks.statistic)
    dims = ("layer", "head" if what == "heads" else "position")
    data = xr.Dataset({
        "score": (dims, score), "exact": (dims, exact.reshape(score.shape)),
        "measured": (dims, measured.reshape(score.shape)), "top": (dims, top.reshape(score.shape)),
        "recall": found.value, "recall_low": found.low, "recall_high": found.high,
        "rank_correlation": rho, "prefills": cells.spent / len(given),
        "prefills_audit": (cells.spent - before_audit) / len(given), "naive_prefills": total + 1.0,
    }, {"layer": np.arange(score.shape[0])})
    for name in ("score", "exact"):
        data[name].attrs["units"] = metric.unit
    return Result(data, {
        **model.manifest(), "measure": "ranked_sweep", "what": what, "metric": metric.name,
        **cells.about, "share": float(share), "factor": float(factor), "wanted": wanted,
        "verified": len(verified), "audited": len(drawn), "seed": int(seed),
        "recall_is": found.verdict, "audit": found.sentence(wanted, len(drawn), len(rest)),
        "n_prompts": len(given), "prompts": [prompt.digest() for prompt in given],
    })


# -- what the audit says -------------------------------------------------------------------------


@dataclass(frozen=True)
class Recall:
    """The share of the exact top that was verified, and what the sample leaves open."""

    value: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """"low" or "high" where that is known or likely, "unsure" where the sample is too small."""
        if self.value < ENOUGH:
            return "low"
        return "high" if self.low >= ENOUGH else "unsure"

    def sentence(self, wanted: int, drawn: int, rest: int) -> str:
        """For the manifest."""
        said = (f"recall of the exact top {wanted} is {self.value:.2f} ({self.low:.2f} to "
                f"{self.high:.2f}), from {drawn} of {rest} other cells")
        if self.verdict == "low":
            return f"{said}: LOW, the scores miss cells that matter; verify more, or sweep exactly."
        return f"{said}: " + ("high." if self.verdict == "high" else
                              "nothing was missed in the sample, but it is too small to be sure.")


def recall(
    verified: Float[np.ndarray, "verified"], drawn: Float[np.ndarray, "audit"], rest: SupportsIndex,
    wanted: SupportsIndex,
) -> Recall:
    """Recall of the exact top, from all verified cells and a random sample of the others.

    Example:
        >>> recall(np.array([9.0, 8.0, 1.0]), np.array([0.1, 0.2]), 2, 2)
        Recall(value=1.0, low=1.0, high=1.0)
        >>> round(recall(np.array([9.0, 8.0]), np.array([10.0, 0.2]), 2, 2).value, 2)
        0.5

    Args:
        verified, drawn: absolute effects. rest: how many cells `drawn` was drawn from.
        wanted: size of the top.

    Every drawn cell stands for rest / drawn of them. The interval follows from how many of the rest
    can exceed the smallest effect of the verified top, given how many of the sample do (sampling
    without replacement, exact, 95 %): each of these may take the place of a verified cell.
    """
    number, size, others = len(drawn), int(wanted), int(rest)
    if not others:
        return Recall(1.0, 1.0, 1.0)
    if not number:
        return Recall(float("nan"), 0.0, 1.0)
    ranked = np.sort(verified)[::-1]
    limit = ranked[min(size, len(ranked)) - 1]
    above = int((drawn > limit).sum())
    possible = np.arange(above, others - (number - above) + 1)
    likely = possible[(stats.hypergeom.sf(above - 1, others, possible, number) >= 0.025)
                      & (stats.hypergeom.cdf(above, others, possible, number) >= 0.025)]
    fewest, most = int(likely.min()), int(likely.max())
    values = np.concatenate([verified, drawn])
    weights = np.concatenate([np.ones(len(verified)), np.full(number, others / number)])
    order = np.argsort(-values, kind="stable")
    room = np.minimum(weights[order], np.maximum(
        0.0, size - np.concatenate([[0.0], np.cumsum(weights[order])[:-1]])))
    value = float(room[order < len(verified)].sum() / size)
    low = max(0.0, 1 - most / size)
    high = 1.0 if not fewest else 1 - 1 / size
    return Recall(value, min(low, value), max(high, value))


# -- what is ranked ------------------------------------------------------------------------------


class _Cells:
    """A grid of cells, their first-order scores and their exact effects, means over prompts."""

    shape: tuple[int, int]

    def __init__(self, model: Model, prompts: list[Prompt], metric: Any) -> None:
        self.model, self.prompts, self.metric = model, prompts, metric
        self.objective = _objective(metric)
        check_count(metric.answers if isinstance(metric, AnswerLogProb) else metric.a, prompts)
        self.spent = 0.0
        self.about: dict[str, Any] = {}

    def scores(self, number: int) -> Float[np.ndarray, "layer cell"]:
        """Exact through the last row, to first order through the others."""
        prompt = self.prompts[number]
        slope = head_gradients(
            self.model, prompt, lambda logits: self.objective(logits[-1], number)).z
        variants = self.variants(number)
        base = variants.base
        self.spent += 1 + BACKWARD
        z = torch.stack([one.float().cpu() for one in base.z])
        spent = base.spent
        rows = self.last_row(base, z).float().cpu()
        plain = self.objective(variants.plain.float().cpu(), number)
        last = (self.objective(rows, number) - plain).reshape(self.shape)
        found = last + self.first_order(base, slope, z, number)
        self.spent += (base.spent - spent) / base.prefill
        return found.double().numpy()

    def variants(self, number: int) -> Variants:
        """The prompt, run once."""
        found = Variants(self.model, self.prompts[number])
        self.spent += found.spent / found.base.prefill
        return found

    def last_row(self, base: Resumable, z: Tensor) -> Tensor:
        raise NotImplementedError

    def first_order(self, base: Resumable, slope: Tensor, z: Tensor, number: int) -> Tensor:
        raise NotImplementedError

    def exact(self, chosen: np.ndarray) -> np.ndarray:
        raise NotImplementedError


class _Heads(_Cells):
    """Ablation of one head at a time."""

    def __init__(self, model: Model, prompts: list[Prompt], metric: Any, by: str) -> None:
        super().__init__(model, prompts, metric)
        self.shape, self.by = (model.n_layers, model.n_heads), by
        self.value = mean_output(model, prompts) if by == "mean" else None
        self.passes = Passes(model, prompts, metric)
        self.about = {"by": by}
        if self.value is not None:
            self.spent += len(prompts)

    def variants(self, number: int) -> Variants:
        before, found = self.passes.spent, self.passes.variants(number)
        if found is None:
            raise ModelRefused(str(self.passes.reason))
        self.spent += (self.passes.spent - before) / found.base.prefill
        return found

    def _instead(self, z: Tensor) -> Tensor:
        """What replaces the outputs of heads, `[layer, head, d_head]`."""
        return torch.zeros_like(z[:, 0]) if self.value is None else torch.as_tensor(self.value)

    def last_row(self, base: Resumable, z: Tensor) -> Tensor:
        instead, heads = self._instead(z), self.shape[1]

        def outputs(layer: int, variants: list[int], made: Tensor) -> Tensor:
            here = [(at, v % heads) for at, v in enumerate(variants) if v // heads == layer]
            if here:
                at, head = (list(column) for column in zip(*here))
                made = made.clone()
                made[at, head] = instead[layer][head].to(made)
            return made

        return replay_last(base, [layer for layer in range(self.shape[0]) for _ in range(heads)],
                           outputs=outputs)

    def first_order(self, base: Resumable, slope: Tensor, z: Tensor, number: int) -> Tensor:
        change = self._instead(z)[:, None] - z[:, :-1]
        return (slope[:, :-1] * change).sum((1, 3))

    def exact(self, chosen: np.ndarray) -> np.ndarray:
        writes = [ablate(Head(*divmod(int(cell), self.shape[1])), self.by, value=self.value)
                  for cell in chosen]
        before, found = self.passes.spent, []
        for number in range(len(self.prompts)):
            values = self.passes.values(number, [(), *writes])
            found.append(values[1:] - values[0])
        length = np.mean([len(prompt) for prompt in self.prompts]) * self.model.n_layers
        self.spent += (self.passes.spent - before) / float(length)
        return np.mean(found, 0) if len(chosen) else np.zeros(0)


class _Positions(_Cells):
    """One token dropped from a block on."""

    def __init__(self, model: Model, prompts: list[Prompt], metric: Any, where: Where) -> None:
        super().__init__(model, prompts, metric)
        self.places = [[p for p in prompt.positions(where) if p < len(prompt) - 1]
                       for prompt in prompts]
        counts = {len(places) for places in self.places}
        if len(counts) > 1 or not min(counts):
            raise PromptError(
                f"positions are averaged over prompts, but these have {sorted(counts)} of them to "
                "drop; name a segment of one size, or rank one prompt at a time."
            )
        self.shape = (model.n_layers, counts.pop())
        self.about = {"places": self.places, "removal": "drop_keep_ids"}
        self.number = 0
        self.removals: dict[int, Removal] = {}

    def last_row(self, base: Resumable, z: Tensor) -> Tensor:
        (layers, count), places = self.shape, self.places[self.number]
        cut = torch.eye(base.length, dtype=torch.bool)[places][:, None]
        return replay_last(base, [layer for layer in range(layers) for _ in range(count)],
                           blocked=lambda _, variants: cut[[v % count for v in variants]])

    def scores(self, number: int) -> Float[np.ndarray, "layer cell"]:
        self.number = number
        return super().scores(number)

    def first_order(self, base: Resumable, slope: Tensor, z: Tensor, number: int) -> Tensor:
        """What the other rows lose: in each, exactly as its heads' outputs change (flow.md, E7)."""
        length, lost = base.length, torch.zeros(base.n_layers, base.length)
        causal = not any(bool(base.visible(n).triu(1).any()) for n in range(base.n_layers))
        step = max(1, ROOM // (z.shape[2] * length)) if causal else length
        for layer in range(base.n_layers):
            v = base.values[layer].float().cpu()
            v = v.repeat_interleave(z.shape[2] // len(v), 0)
            for begin in range(0, length, step):
                rows = torch.arange(begin, min(begin + step, length))
                g, own = (x[layer, rows].transpose(0, 1) for x in (slope, z))

                def add(_: int, weights: Tensor, layer: int = layer, rows: Tensor = rows,
                        g: Tensor = g, own: Tensor = own, v: Tensor = v) -> None:
                    p = weights[0].float().cpu()
                    keys = torch.arange(p.shape[-1])
                    moved = g @ v[:, keys].transpose(1, 2) - (g * own).sum(-1, keepdim=True)
                    other = (rows[:, None] != keys) & (rows[:, None] < length - 1)
                    lost[layer, keys] -= (p / (1 - p).clamp_min(1e-2) * moved * other).sum((0, 1))

                base.replay(layer, rows[None], context=torch.arange(begin), until=layer + 1,
                            watch=add)
        return lost.flip(0).cumsum(0).flip(0)[:, self.places[number]]

    def exact(self, chosen: np.ndarray) -> np.ndarray:
        count, found = self.shape[1], []
        for number, places in enumerate(self.places):
            if number not in self.removals:
                # One prompt's states at a time, unless there is but one prompt.
                self.removals = {number: Removal(self.model, self.prompts[number], places)}
                self.spent += 1
            removal = self.removals[number]
            before, values = removal.base.spent, np.zeros(len(chosen))
            plain = self.objective(removal.base.logits[-1].float().cpu(), number)
            for layer in sorted({int(cell) // count for cell in chosen}):
                here = [at for at, cell in enumerate(chosen) if int(cell) // count == layer]
                kept = [tuple(p for p in places if p != places[int(chosen[at]) % count])
                        for at in here]
                rows = self.objective(removal.logits(layer, kept), number) - plain
                values[here] = rows.double().numpy()
            self.spent += (removal.base.spent - before) / removal.base.prefill
            found.append(values)
        return np.mean(found, 0) if len(chosen) else np.zeros(0)


def _objective(metric: Any) -> Callable[[Tensor, int], Tensor]:
    """The metric as a function of last rows `[..., vocab]` of a prompt, to be differentiated."""
    if isinstance(metric, LogitDifference):
        return lambda rows, number: rows[..., metric.a[number]] - rows[..., metric.b[number]]
    if isinstance(metric, AnswerLogProb) and all(len(answer) == 1 for answer in metric.answers):
        return lambda rows, number: rows.log_softmax(-1)[..., metric.answers[number][0]]
    raise PromptError(
        f"a ranked sweep needs a metric of the last row that has a gradient: LogitDifference, or "
        f"AnswerLogProb of answers of one token, not {metric!r}."
    )
