"""Pruning image tokens: schedules, true budgets, and every criterion against random tokens.

Paper     arXiv:2512.07580, and the criteria of `interp.flow.pruning_criteria`
Question  From which depth on is no criterion better than random tokens?
Measure   probability of the answer, KL from the full output, whether the answer is right, with
          equally many tokens kept by each criterion and by several random draws
Cause     tokens are removed; random draws of the same number in the same block are the control
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from scipy import stats
from torch import Tensor

from interp.core import (
    ModelRefused,
    NumericalError,
    OutOfRange,
    Prompt,
    PromptError,
    Result,
    SiteRefused,
)
from interp.core.prompt import Where
from interp.figures import layer_curve
from interp.flow import pruning_by_diversity as diversity
from interp.flow.pruning_criteria import CRITERIA, Criterion, criterion, selecting
from interp.flow.pruning_evidence import Evidence
from interp.models.model import Model

REFUSED = (PromptError, ModelRefused, SiteRefused, NumericalError)
"""What a criterion says when a model or prompt lacks what it reads."""


# -- budgets and schedules -----------------------------------------------------------------------


def average_tokens(
    stages: Sequence[tuple[SupportsIndex, SupportsIndex]], n_layers: SupportsIndex,
    total: SupportsIndex,
) -> float:
    """Image tokens per block, averaged over all blocks; `stages` are (block, tokens kept).

    Example:
        >>> average_tokens([(0, 284), (20, 38)], n_layers=32, total=576)
        191.75

    Raises:
        OutOfRange: stages out of order, outside of the model, or that keep more than there are.
    """
    depth, left, done, sum_ = int(n_layers), int(total), 0, 0
    for layer, keep in stages:
        at, kept = int(layer), int(keep)
        if not done <= at <= depth:
            raise OutOfRange(f"stage at block {at}: stages ascend within 0 to {depth}.")
        if not 0 <= kept <= left:
            raise OutOfRange(f"cannot keep {kept} of {left} image tokens from block {at} on.")
        sum_ += (at - done) * left
        done, left = at, kept
    return (sum_ + (depth - done) * left) / depth


def with_random(
    keep: SupportsIndex, first: SupportsIndex, second: SupportsIndex, n_layers: SupportsIndex,
    total: SupportsIndex, last: SupportsFloat = 0.2,
) -> tuple[int, int]:
    """Tokens of a two-stage recipe with the budget of one stage that keeps `keep` from `first` on.

    Example:
        >>> with_random(9, first=0, second=4, n_layers=6, total=36)
        (13, 1)

    Of the pairs whose budget is nearest, the one whose second number is nearest to `last` * keep
    (38 of 192 in the paper); none keeps more than there are.
    """
    one, early, late, depth = int(keep), int(first), int(second), int(n_layers)
    average_tokens([(early, one), (late, 0)], depth, total)  # checks them
    if early == late:
        raise OutOfRange(f"both stages are at block {early}: the second must come later.")
    tried = []
    for b in range(one + 1):
        exact = one + (one - b) * (depth - late) / (late - early)
        for a in (int(exact), int(exact) + 1):
            kept = min(a, int(total))
            tried.append((round(abs(kept - exact), 9), abs(b - float(last) * one), kept, b))
    _, _, a, b = min(tried)
    return a, b


def apply(
    evidence: Evidence, stages: Sequence[tuple[SupportsIndex, Any, SupportsIndex]],
    rng: Optional[np.random.Generator] = None, merge: bool = False,
) -> Evidence:
    """Prune in stages; every stage sees the run that the earlier ones have left.

    Example:
        >>> import interp
        >>> evidence = Evidence(interp.open_model("backcopy-3l"),
        ...                     Prompt.from_tokens(range(3, 15), {"image": (2, 8)}))
        >>> len(apply(evidence, [(1, "DivPrune", 4), (2, "random", 2)]).tokens)
        2

    Args:
        stages: (block, criterion or positions, how many to keep), in the order of the blocks.
        merge: dropped tokens are averaged into the kept ones that they resemble most.

    Raises:
        OutOfRange, PromptError, ModelRefused: as `Criterion.keep`.
    """
    for layer, what, keep in stages:
        if isinstance(what, str):
            kept = criterion(what).keep(evidence, layer, keep, rng)
        else:
            kept = tuple(int(p) for p in what)
            if len(kept) != int(keep):
                raise OutOfRange(f"{len(kept)} positions are given, but {int(keep)} are to be kept.")
        merged = merging(evidence, int(layer), kept) if merge else None
        evidence = evidence.pruned(layer, kept, merged)
    return evidence


def merging(
    evidence: Evidence, layer: SupportsIndex, kept: Sequence[SupportsIndex]
) -> Float[Tensor, "kept d_model"]:
    """States of kept tokens with the others averaged into the nearest (`merge_into_nearest`)."""
    number = {p: i for i, p in enumerate(evidence.tokens)}
    return diversity.merge_into_nearest(evidence.states(layer), [number[int(p)] for p in kept])


# -- every criterion against random --------------------------------------------------------------


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    answers: Sequence[SupportsIndex],
    *,
    criteria: Optional[Sequence[str]] = None,
    layers: Optional[Iterable[SupportsIndex]] = None,
    share: SupportsFloat = 0.25,
    draws: SupportsIndex = 10,
    how: str = "drop_keep_ids",
    merge: bool = False,
    image: Where = "image",
    seed: SupportsIndex = 0,
    batch_size: SupportsIndex = 64,
) -> Result:
    """Prune each prompt in one block to the same number of tokens, by each criterion and by chance.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompts = [Prompt.from_tokens(range(s, s + 12), {"image": (2, 8)}) for s in (3, 9)]
        >>> found = measure(model, prompts, [5, 6], criteria=["DivPrune", "FastV"], draws=3)
        >>> found["p"].sizes["arm"], found["random_p"].sizes["draw"]
        (2, 3)

    Args:
        answers: the token that each prompt should be answered with first.
        criteria: names of the table; all that keep a number of tokens for None.
        layers: blocks before which tokens go; all for None.
        share: of the image tokens that stay, at least one.
        how, merge: positions and merging, as in `apply`.

    Returns:
        [prompt, arm, layer]: `p`, `kl` (nats, of the pruned output from the full one), `correct`
        (NaN where a criterion cannot be applied), `row` (mean row of the kept tokens, 0 top, 1
        bottom), `rank` (effective rank of their projected features), `late` (rank correlation of
        the score with the number of the token); [prompt, arm, layer, token] `kept`; the same
        `random_p`, `random_kl`, `random_correct` [prompt, draw, layer]; [prompt, layer] `none_p`,
        `none_kl`, `none_correct` with all tokens gone; [prompt] `full_p`, `full_correct`, `number`.
        The manifest says in "untestable" why a criterion cannot be applied to this model.
    """
    names = list(selecting() if criteria is None else criteria)
    chosen = [criterion(name) for name in names]
    wanted = sorted({int(x) for x in (range(model.n_layers) if layers is None else layers)})
    if len(prompts) != len(answers) or not prompts:
        raise PromptError(f"{len(prompts)} prompts need as many answers, not {len(answers)}.")
    tokens = max(len(prompt.positions(image)) for prompt in prompts)
    shape = (len(prompts), len(names), len(wanted))
    one = {key: np.full(shape, np.nan) for key in ("p", "kl", "correct", "row", "rank", "late")}
    kept = np.zeros((*shape, tokens), dtype=bool)
    chance = {key: np.full((len(prompts), int(draws), len(wanted)), np.nan)
              for key in ("p", "kl", "correct")}
    none = {key: np.full((len(prompts), len(wanted)), np.nan) for key in ("p", "kl", "correct")}
    full = {key: np.zeros(len(prompts)) for key in ("p", "correct")}
    number, cost, refused = np.zeros(len(prompts), dtype=int), 0.0, {}
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        evidence = Evidence(model, prompt, image, how)
        keep = max(1, round(float(share) * len(evidence.tokens)))
        number[i] = keep
        whole = evidence.base.logits[-1].float().cpu().log_softmax(-1)
        for key, value in outcome(whole[None], whole, int(answer)).items():
            if key in full:
                full[key][i] = value[0]
        once: dict[str, tuple[int, ...]] = {}
        for at, layer in enumerate(wanted):
            rng = np.random.default_rng([int(seed), i, layer])
            sets: list[tuple[int, ...]] = [()]
            arms: list[int] = []
            for arm, method in enumerate(chosen):
                found = _kept(method, evidence, layer, keep, rng, once, refused)
                if found is not None:
                    arms.append(arm)
                    sets.append(found)
                    _audit(one, kept, (i, arm, at), method, evidence, layer, found)
            sets += [CRITERIA["random"].keep(evidence, layer, keep, rng) for _ in range(int(draws))]
            merged = partial(merging, evidence, layer) if merge else None
            logits = evidence.logits(layer, sets, merged=merged, batch_size=batch_size)
            for key, value in outcome(logits.log_softmax(-1), whole, int(answer)).items():
                none[key][i, at] = value[0]
                one[key][i, arms, at] = value[1 : 1 + len(arms)]
                chance[key][i, :, at] = value[1 + len(arms) :]
            evidence.forget()
        cost += evidence.prefills
    dims = ("prompt", "arm", "layer")
    data = xr.Dataset(
        {**{key: (dims, value) for key, value in one.items()}, "kept": ((*dims, "token"), kept),
         **{f"random_{k}": (("prompt", "draw", "layer"), v) for k, v in chance.items()},
         **{f"none_{k}": (("prompt", "layer"), v) for k, v in none.items()},
         **{f"full_{k}": ("prompt", v) for k, v in full.items()},
         "number": ("prompt", number)},
        {"arm": names, "layer": wanted},
    )
    return Result(data, {
        **model.manifest(), "measure": "pruning", "removal": how, "merged": merge,
        "share": float(share), "seed": int(seed), "untestable": refused, "prefills": cost,
        "decode": "not measured", "answers": [int(a) for a in answers],
        "prompts": [prompt.digest() for prompt in prompts],
    })


def outcome(
    log_p: Float[Tensor, "variant vocab"], full: Float[Tensor, "vocab"], answer: SupportsIndex
) -> dict[str, Float[np.ndarray, "variant"]]:
    """p of the answer, KL of each output from the full one (nats), and whether the answer is right."""
    log_p, whole = log_p.double(), full.double()
    kl = (log_p.exp() * (log_p - whole)).nan_to_num(0.0).sum(-1).clamp_min(0)
    token = int(answer)
    return {"p": log_p[:, token].exp().numpy(), "kl": kl.numpy(),
            "correct": (log_p.argmax(-1) == token).double().numpy()}


def advantage(
    found: Result, key: str = "correct"
) -> Float[np.ndarray, "prompt arm layer"]:
    """Each criterion minus the mean of the random draws; positive is better (the sign of KL is
    turned)."""
    sign = -1.0 if key == "kl" else 1.0
    random = found[f"random_{key}"].mean("draw")
    return sign * (found[key] - random).transpose("prompt", "arm", "layer").values


def overlap(found: Result) -> Float[np.ndarray, "arm other layer"]:
    """Mean Jaccard overlap of what criteria keep, over prompts; NaN where one keeps nothing."""
    kept = found["kept"].transpose("prompt", "arm", "layer", "token").values.astype(float)
    both = np.einsum("palt,pblt->pabl", kept, kept)
    size = kept.sum(-1)
    either = size[:, :, None] + size[:, None] - both
    used = (size[:, :, None] > 0) & (size[:, None] > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        each = np.where(used, both / either, np.nan)
        return np.nansum(each, 0) / used.sum(0)


def no_better_from(
    gain: Float[np.ndarray, "prompt arm layer"], layers: Sequence[SupportsIndex],
    confidence: SupportsFloat = 0.95,
) -> Optional[int]:
    """The first layer from which on no criterion is better than random; None if the last has one.

    A criterion is better where the lower end of its normal interval of the mean over prompts is
    above zero, at a confidence that holds for all criteria together (Bonferroni). Criteria that
    cannot be applied (NaN) do not count.
    """
    better = better_than_random(gain, confidence).any(0)
    above = np.flatnonzero(better)
    first = 0 if not len(above) else int(above[-1]) + 1
    return int(layers[first]) if first < len(layers) else None


def better_than_random(
    gain: Float[np.ndarray, "prompt arm layer"], confidence: SupportsFloat = 0.95
) -> np.ndarray:
    """`[arm, layer]`: whether the mean over prompts is above zero, see `no_better_from`."""
    n, arms = len(gain), max(1, int(np.isfinite(gain).all((0, 2)).sum()))
    z = stats.norm.ppf(1 - (1 - float(confidence)) / 2 / arms)
    mean, spread = gain.mean(0), gain.std(0, ddof=1) if n > 1 else np.full(gain.shape[1:], np.inf)
    with np.errstate(invalid="ignore"):
        return mean - z * spread / np.sqrt(n) > 1e-12


def draw(
    found: Result, ax: Axes, key: str = "p", arms: Optional[Mapping[str, Sequence[str]]] = None
) -> Axes:
    """Mean of `p` or `correct` by layer: groups of arms, random tokens, none at all."""
    groups = {"criteria": [str(a) for a in found["arm"].values]} if arms is None else arms
    curves: dict[str, Any] = {}
    for name, members in groups.items():
        there = [m for m in members if m in found["arm"].values
                 and np.isfinite(found[key].sel(arm=m)).any()]
        if there:
            curves[name] = found[key].sel(arm=there).mean("arm")
    curves["random"] = found[f"random_{key}"].mean("draw")
    curves["no image token"] = found[f"none_{key}"]
    label = {"p": "probability of the answer", "correct": "accuracy", "kl": "KL (nats)"}[key]
    return layer_curve.draw(ax, curves, label=label,
                            roles={"random": "control", "no image token": "other"})


def _kept(
    method: Criterion, evidence: Evidence, layer: int, keep: int, rng: np.random.Generator,
    once: dict[str, tuple[int, ...]], refused: dict[str, str],
) -> Optional[tuple[int, ...]]:
    """What a criterion keeps; None where it does not apply, with the reason in `refused`."""
    if layer < method.first or method.name in refused:
        return None
    if method.name in once:
        return once[method.name]
    try:
        found = method.keep(evidence, layer, keep, rng)
    except REFUSED as error:
        refused[method.name] = str(error)
        return None
    if method.family == "encoder":  # the same before every block
        once[method.name] = found
    return found


def _audit(
    one: dict[str, np.ndarray], kept: np.ndarray, where: tuple[int, int, int], method: Criterion,
    evidence: Evidence, layer: int, found: tuple[int, ...],
) -> None:
    """Where the kept tokens lie, how much they span, and whether the score rises with position."""
    number = {p: i for i, p in enumerate(evidence.all_tokens)}
    cells = np.array([number[p] for p in found], dtype=int)
    kept[where][cells] = True
    one["rank"][where] = diversity.effective_rank(evidence.projected()[cells])
    try:
        rows, columns = evidence.grid
        one["row"][where] = (cells // columns).mean() / max(rows - 1, 1)
    except PromptError:
        pass
    if method.score is not None and method.family != "encoder":
        score = method.score(evidence, layer).numpy()
        if np.ptp(score) > 0:
            one["late"][where] = np.corrcoef(stats.rankdata(score), np.arange(len(score)))[0, 1]


def per_head(
    evidence: Evidence, kept: Any
) -> Float[Tensor, "vocab"]:
    """The last row when it alone reads a cache that was pruned per head, as in decoding (PLPHP).

    `kept` is `[layer, head, token]`, True for image tokens that stay. Only the last position is run
    again: nobody else reads it. What the method prunes is read by decoded tokens; the last row of
    the prompt stands for the first of them here.
    """
    stay = torch.as_tensor(kept)
    expected = (evidence.base.n_layers, evidence.model.n_heads, len(evidence.tokens))
    if tuple(stay.shape) != expected:
        raise PromptError(f"kept tokens per head need the shape {expected}, not {tuple(stay.shape)}.")
    length = len(evidence.prompt)

    def blocked(layer: int) -> Tensor:
        cut = torch.zeros(1, expected[1], 1, length, dtype=torch.bool)
        cut[0, :, 0, list(evidence.tokens)] = ~stay[layer]
        return cut

    return evidence.base.replay(0, torch.tensor([[length - 1]]), context=torch.arange(length - 1),
                                blocked=blocked)[0].float().cpu()
