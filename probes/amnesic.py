"""The causal arm of probing: take a decodable concept out of the residual stream and see what breaks.

What a probe can read need not be used. So the concept is erased from the states that leave one block
at chosen positions, the rest of the model runs on, and the change of the answer is compared with that
of erasures that know nothing of the concept. Steering adds a probe's direction instead, against
random directions of equal norm.

Sources   arXiv:2006.00995 (amnesic probing), arXiv:2306.03819 (LEACE)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

import interp
from interp.core import Claim, ModelRefused, OutOfRange, Prompt, PromptError, Result, statistics
from interp.core.statistics import Estimate
from probes.erasure import RandomProjection, TurnedAtRandom
from probes.folds import blocks_of, shuffled
from probes.linear import fitted_copy
from probes.nulls import EMBEDDING, Places, places_of

METRICS = ("log_prob", "accuracy", "logit_difference")
CONTROLS = 20
KINDS = ("projection", "rotation", "permuted")
Variants = Callable[[int, Float[np.ndarray, "position d_model"]],
                    Float[np.ndarray, "variant position d_model"]]


def amnesic(
    model: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[SupportsIndex],
    eraser: Any,
    *,
    layer: SupportsIndex,
    positions: Places = "last",
    others: Optional[Sequence[SupportsIndex]] = None,
    metric: Literal["log_prob", "accuracy", "logit_difference"] = "log_prob",
    controls: SupportsIndex = CONTROLS,
    kinds: Sequence[str] = KINDS[:2],
    decoys: Sequence[Any] = (),
    seed: SupportsIndex = 0,
    batch_size: int = 32,
    bases: Optional[Sequence[Any]] = None,
) -> Result:
    """The answer with a concept erased from the output of one block, and with random erasures.

    Args:
        answers: the first token of each prompt's right answer; others: that of a wrong one, for
            "logit_difference".
        eraser: fitted on states of that block (`Leace`, `Inlp`, `KnownDirections`), of other prompts
            than these, best on the same kind of positions.
        layer: whose output is changed; -1 is what enters block 0.
        positions: what is changed, as in `probes.nulls.layer_states`; nothing for a prompt with an
            empty list.
        metric: of the last row: log probability of the answer (nats), whether it is the likeliest
            token, or its logit minus the other's.
        controls: how many erasures of each of the `kinds`. "projection" takes out as many random
            directions; "rotation" makes a change of exactly the same size at every position, in
            directions turned at random; "permuted" are the `decoys`.
        decoys: erasers fitted alike to permuted labels (`decoys`), as many as controls. The hardest
            control: random directions hardly touch what varies among states, these do.
        batch_size: variants at a time.
        bases: `resumables` of these prompts, where several layers are tried.

    Returns:
        [prompt]: `clean`, `erased`; [kind, control, prompt]: `random`; [prompt] `change`, the norm of
        what erasing changed relative to that of the states, NaN where nothing is.

    Raises:
        PromptError: answers, positions and prompts of different number.
        OutOfRange: a layer that does not exist.
        NotFittedError: an eraser that is not fitted. ValueError: no controls, an unknown metric.

    Source: arXiv:2006.00995.
    """
    check_is_fitted(eraser)
    given, number = list(prompts), int(controls)
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds of controls are {', '.join(KINDS)}, not {tuple(kinds)}.")
    if number < 1:
        raise ValueError("an erasure without a control shows nothing: controls must be at least 1.")
    measure = _metric(metric, given, answers, others)
    places = places_of(given, positions)
    rank = eraser.rank_
    seeds = [int(seed) * 100_003 + i for i in range(number)]
    others_of = {
        "projection": lambda: [RandomProjection(rank=rank, seed=x).fit(eraser.mean_[None])
                               for x in seeds],
        "rotation": lambda: [TurnedAtRandom(eraser, x).fit() for x in seeds],
        "permuted": lambda: list(decoys)}
    drawn = [one for kind in kinds for one in others_of[kind]()]
    if len(drawn) != len(kinds) * number:
        raise ValueError(f"{len(decoys)} decoys for {number} controls: give one for each.")
    # A random projection is about this eraser's mean as well, so it moves states no further away.
    changes = np.full(len(given), np.nan)

    def variants(i: int, states: np.ndarray) -> np.ndarray:
        if not len(states):
            return np.repeat(states[None], 2 + len(drawn), 0)
        made = [one.transform(states) for one in (eraser, *drawn)]
        changes[i] = np.linalg.norm(made[0] - states) / np.linalg.norm(states)
        return np.stack([states, *made])

    values = np.stack([measure(i, logits) for i, logits in enumerate(
        replaced(model, given, variants, layer=layer, places=places, batch_size=batch_size,
                 bases=bases))], 1)
    data = xr.Dataset(
        {"clean": ("prompt", values[0]), "erased": ("prompt", values[1]),
         "random": (("kind", "control", "prompt"), values[2:].reshape(len(kinds), number, -1)),
         "change": ("prompt", changes)}, {"kind": list(kinds)})
    return Result(data, {**model.manifest(), "measure": "amnesic", "metric": metric,
                         "layer": int(layer), "rank": int(rank), "eraser": type(eraser).__name__,
                         "controls": number, "seed": int(seed)})


def decoys(
    eraser: Any, states: Any, labels: Any, *, groups: Optional[Any],
    number: SupportsIndex = CONTROLS, seed: SupportsIndex = 0,
) -> list[Any]:
    """The same eraser fitted to permuted labels: it takes out as much of what varies, but not the
    concept.

    Example:
        >>> from probes.erasure import Leace
        >>> X = np.random.default_rng(0).standard_normal((40, 6))
        >>> [one.rank_ for one in decoys(Leace(), X, np.arange(40) % 3, groups=None, number=2)]
        [2, 2]

    Labels are permuted as in `probes.sweep.sweep`: over groups where they are constant in groups,
    else within; where that leaves them as they are (one sample per group), over samples.
    """
    y = np.unique(np.asarray(labels), return_inverse=True)[1]
    blocks = None if groups is None else blocks_of(groups, len(y))
    if blocks is not None and len(np.unique(blocks)) == len(y):
        blocks = None
    rng = np.random.default_rng(int(seed))
    return [fitted_copy(eraser, states, y[shuffled(y, blocks, rng)]) for _ in range(int(number))]


def steered(
    model: Any,
    prompts: Sequence[Prompt],
    answers: Sequence[SupportsIndex],
    direction: Float[np.ndarray, "d_model"],
    strengths: Sequence[SupportsFloat],
    *,
    layer: SupportsIndex,
    positions: Places = "last",
    others: Optional[Sequence[SupportsIndex]] = None,
    metric: Literal["log_prob", "accuracy", "logit_difference"] = "logit_difference",
    controls: SupportsIndex = CONTROLS,
    seed: SupportsIndex = 0,
    batch_size: int = 32,
) -> Result:
    """The answer with a direction added to the output of one block, and random ones as long.

    Args:
        direction: `[d_model]`, of any length (a probe's, from `probes.linear.direction`, or one that
            `probes.erasure.steering` has scaled); strengths: its multiples.
        others: as in `amnesic`: the logit of `answers` minus that of these is what steering moves.

    Returns:
        [prompt]: `clean`; [strength, prompt]: `steered`; [control, strength, prompt]: `random`.

    Raises:
        ValueError: a direction of no length or of another width, no strengths, no controls.
    """
    way, steps = np.asarray(direction, dtype=float), [float(s) for s in strengths]
    if way.shape != (model.d_model,) or not np.linalg.norm(way) > 0:
        raise ValueError(f"the direction must be [{model.d_model}] and not zero, not {way.shape}.")
    if not steps or int(controls) < 1:
        raise ValueError("give at least one strength and one control.")
    given, number = list(prompts), int(controls)
    measure = _metric(metric, given, answers, others)
    turned = np.random.default_rng(int(seed)).standard_normal((number, len(way)))
    turned *= np.linalg.norm(way) / np.linalg.norm(turned, axis=1, keepdims=True)
    added = np.concatenate([np.zeros((1, len(way))), *(
        np.outer(steps, one) for one in (way, *turned))])

    def variants(i: int, states: np.ndarray) -> np.ndarray:
        return states[None] + added[:, None]

    values = np.stack([measure(i, logits) for i, logits in enumerate(
        replaced(model, given, variants, layer=layer, places=places_of(given, positions),
                 batch_size=batch_size))], 1)
    moved = values[1:].reshape(1 + number, len(steps), -1)
    data = xr.Dataset(
        {"clean": ("prompt", values[0]), "steered": (("strength", "prompt"), moved[0]),
         "random": (("control", "strength", "prompt"), moved[1:])}, {"strength": steps})
    return Result(data, {**model.manifest(), "measure": "steering", "metric": metric,
                         "layer": int(layer), "controls": number, "seed": int(seed),
                         "norm": float(np.linalg.norm(way))})


def effect(
    found: Result, kind: str = "projection", *, groups: Any = None, **more: Any
) -> Estimate:
    """The change by erasing minus the mean change by random erasures, bootstrap over prompts.

    Below zero where erasing harms the answer more than chance.
    """
    return statistics.difference(found["erased"].values, found["random"].sel(
        kind=kind).mean("control").values, groups=groups, **more)


def beyond(
    found: Result, kind: str = "projection", *, groups: Any = None, **more: Any
) -> Estimate:
    """The change by erasing minus that by the most harmful of the random erasures.

    The most harmful one is found again in every resample of prompts, so the interval pays for the
    choice: below zero, erasing harms more than all controls do. Of n controls that are no different
    from the erasure, all do less with probability 1 / (n + 1).
    """
    def gap(erased: np.ndarray, random: np.ndarray) -> float:
        return float(erased.mean() - random.mean(0).min())

    drawn = found["random"].sel(kind=kind).transpose("prompt", "control").values
    return statistics.bootstrap(gap, found["erased"].values, drawn, groups=groups, **{
        "name": f"erased minus the most harmful of {drawn.shape[1]} random erasures", **more})


def used_claim(
    found: Result, sentence: str, source: str, *, kind: str = "projection", groups: Any = None,
    resamples: int = statistics.RESAMPLES, **more: Any,
) -> Claim:
    """The claim that the answer needs what was erased: more harm than by every random erasure."""
    estimate = beyond(found, kind, groups=groups, resamples=resamples)
    drawn = found["random"].sel(kind=kind).mean("prompt").values
    return Claim(sentence, source, null=0.0, direction="below", causal=True, **{
        **estimate.for_claim(), "unit": found.manifest["metric"].replace("_", " "),
        "control": f"{found['random'].sizes['control']} random erasures ({kind}), rank "
                   f"{found.manifest['rank']}",
        "details": {
            "clean": float(found["clean"].mean()), "erased": float(found["erased"].mean()),
            "random": float(drawn.mean()), "layer": found.manifest["layer"],
            "erased minus mean of random": str(effect(
                found, kind, groups=groups, resamples=resamples)),
            "p against controls": statistics.control_p(
                float(found["erased"].mean()), drawn, alternative="less"),
            "relative size of the change": float(np.nanmean(found["change"]))}, **more})


def replaced(
    model: Any, prompts: Sequence[Prompt], variants: Variants, *, layer: SupportsIndex,
    places: Sequence[Sequence[int]], batch_size: int = 32, resume: bool = True,
    bases: Optional[Sequence[Any]] = None,
) -> Iterator[Float[np.ndarray, "variant vocab"]]:
    """Last-row logits of every prompt with other states at some positions of one block's output.

    `variants(i, states)` is given prompt i's own states `[position, d_model]` there and returns what
    takes their place, `[variant, position, d_model]`. Positions before the first changed one are not
    run again where the model can be resumed in the middle (`resume`); else whole passes are run.
    """
    at = int(layer)
    if not EMBEDDING <= at < model.n_layers:
        raise OutOfRange(f"layer {at} does not exist: there are -1 (embedding) to "
                         f"{model.n_layers - 1}.")
    site = "resid_pre.0" if at == EMBEDDING else f"resid_post.{at}"
    for i, (prompt, where) in enumerate(zip(prompts, places)):
        base = None
        if resume and at + 1 < model.n_layers:
            base = _resumable(model, prompt) if bases is None else bases[i]
        if base is not None and len(where):
            own = base.hidden[at + 1].float().cpu().numpy().astype(np.float64)
            made = torch.as_tensor(variants(i, own[list(where)]))
            yield _resumed(base, at + 1, where, made, batch_size)
            continue
        read = model.run(prompt, read=site, logits="none").reads[site].values[0, 0]
        made = torch.as_tensor(variants(i, read[list(where)].astype(np.float64)))
        writes = [[interp.patch(site, one.float(), list(where))] if len(where) else []
                  for one in made]
        run = model.run([prompt] * len(writes), write=interp.each(writes), logits="last",
                        batch_size=batch_size)
        yield np.stack([rows[-1].float().cpu().numpy() for rows in run.logits])


def resumables(model: Any, prompts: Sequence[Prompt]) -> list[Any]:
    """Every prompt run once, to be resumed at several blocks; None where a model cannot be."""
    return [_resumable(model, prompt) for prompt in prompts]


# -- the parts ------------------------------------------------------------------------------------


def _resumable(model: Any, prompt: Prompt) -> Any:
    try:
        return model.resumable(prompt)
    except ModelRefused:
        return None


def _resumed(
    base: Any, block: int, where: Sequence[int], made: Float[Tensor, "variant position d_model"],
    batch_size: int,
) -> Float[np.ndarray, "variant vocab"]:
    first, last = base.earliest(min(where)), base.length - 1
    # Of the last block's output only the last row counts.
    kept = [last] if min(where) == last else list(range(first, base.length))
    rows = torch.tensor(kept)
    own = base.hidden[block][rows.to(base.hidden[block].device)]
    index = torch.tensor([kept.index(p) for p in where])
    found = []
    for part in made.split(batch_size):
        hidden = own.expand(len(part), -1, -1).clone()
        hidden[:, index.to(hidden.device)] = part.to(hidden)
        logits = base.replay(block, rows.expand(len(part), -1),
                             context=torch.arange(kept[0]), hidden=hidden)
        found.append(logits.float().cpu().numpy())
    return np.concatenate(found)


def _metric(
    name: str, prompts: Sequence[Prompt], answers: Sequence[SupportsIndex],
    others: Optional[Sequence[SupportsIndex]],
) -> Callable[[int, np.ndarray], np.ndarray]:
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; choose one of: {', '.join(METRICS)}.")
    right = [int(a) for a in answers]
    wrong = None if others is None else [int(o) for o in others]
    if len(right) != len(prompts) or wrong is not None and len(wrong) != len(prompts):
        raise PromptError(f"{len(right)} answers for {len(prompts)} prompts: give one for each.")
    if name == "logit_difference" and wrong is None:
        raise ValueError("a logit difference needs `others`, a wrong answer for every prompt.")

    def measure(i: int, logits: np.ndarray) -> np.ndarray:
        if name == "accuracy":
            return (logits.argmax(-1) == right[i]).astype(float)
        if name == "logit_difference":
            return logits[:, right[i]] - logits[:, wrong[i]]  # type: ignore[index]
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return shifted[:, right[i]] - np.log(np.exp(shifted).sum(-1))

    return measure
