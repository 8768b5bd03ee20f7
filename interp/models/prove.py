"""A model proves its sites when it is opened: what can be read, and what moves when it is written.

A write that changes nothing is the worst bug of the field, so no lane may accept one: writing back
what was read must leave the outcome as it is, and writing something else must move it, and only
where it may.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional, Union

import numpy as np
import torch
from torch import Tensor

from interp.core.errors import NumericalError, SiteRefused
from interp.core.intervention import Intervention, block, edit, patch
from interp.core.prompt import Prompt
from interp.core.site import NAMES

Outcomes = Callable[
    [Prompt, Sequence[tuple[Intervention, ...]], tuple[str, ...]], tuple[list[Tensor], dict]]
"""(prompt, edits of every run, sites to read) -> (outcome `[position, width]` of every run, all from
one batch; site -> values of that layer in the first run)."""


@dataclass(frozen=True)
class Proof:
    """What was shown for one site in one lane.

    Attributes:
        readable, writable: whether reads and writes were proven.
        reason: why not, as the end of a sentence; empty if both hold.
        moved: largest change of the outcome when the site was changed, relative to its spread.
    """

    site: str
    readable: bool
    writable: bool
    reason: str = ""
    moved: float = 0.0


def prove(
    outcomes: Outcomes,
    ids: list[int],
    layer: int,
    unavailable: Callable[[str], Optional[str]],
    tolerance: float,
    causal: bool,
) -> dict[str, Proof]:
    """Prove every site of `layer` with two short forward passes: one reads, one tries all edits.

    Args:
        outcomes: runs a prompt under many edits at once in the lane; every run of it must feel its
            own edit.
        ids: a short prompt of ordinary tokens, at least four.
        layer: the block that is written, usually the middle one.
        unavailable: site -> why the architecture does not have it, None if it has.
        tolerance: what counts as unchanged, relative to the spread of the outcome.
        causal: whether earlier positions must not feel a change of a later one.

    Raises:
        NumericalError: the untouched model already gives NaN.
    """
    prompt = Prompt.from_tokens(ids)
    missing = {name: reason for name in NAMES if (reason := unavailable(name)) is not None}
    names = [name for name in NAMES if name not in missing and name != "embed"]
    spelled = {name: f"{name}.{layer}" for name in names}
    proofs = {
        name: Proof(name, False, False, reason) for name, reason in missing.items()
    }
    (base,), reads = outcomes(prompt, [()], tuple(spelled.values()))
    if not torch.isfinite(base).all():
        raise NumericalError(
            "the model gives NaN or infinity on a prompt of ordinary tokens; its weights are "
            "damaged, or its dtype is too narrow (try dtype='float32')."
        )
    spread = float(base.std()) or 1.0
    position = len(ids) // 2

    trials: dict[str, tuple[Intervention, Intervention]] = {}
    for name in names:
        values = np.asarray(reads[spelled[name]])
        fault = _fault(name, values, causal)
        if fault:
            proofs[name] = Proof(name, False, False, fault)
            continue
        trials[name] = (patch(spelled[name], _writable(name, values)),
                        _disturb(name, spelled[name], values, position, causal))
    found = _tried(outcomes, prompt, trials)
    for name in trials:
        made = found[name]
        if isinstance(made, SiteRefused):
            proofs[name] = Proof(name, True, False, str(made))
            continue
        same, moved = ((x - made[0]).abs().amax(-1) / spread for x in made[1:])
        proofs[name] = _judged(name, same, moved, position, tolerance, causal)
    if "resid_pre" in proofs:
        proofs["embed"] = Proof("embed", **{
            k: getattr(proofs["resid_pre"], k) for k in ("readable", "writable", "reason", "moved")
        })
    return proofs


def _tried(
    outcomes: Outcomes, prompt: Prompt,
    trials: Mapping[str, tuple[Intervention, Intervention]],
) -> dict[str, Union[list[Tensor], SiteRefused]]:
    """Of every site the outcome without an edit and those of its two edits, or why there is none.

    All edits go into one batch; where it is refused, into two halves, until it is clear by whom.
    """
    if not trials:
        return {}
    try:
        made, _ = outcomes(prompt, [(), *((edit,) for pair in trials.values() for edit in pair)], ())
    except SiteRefused as error:
        names = list(trials)
        if len(names) == 1:
            return {names[0]: error}
        parts = (names[: len(names) // 2], names[len(names) // 2 :])
        return {name: found for part in parts
                for name, found in _tried(outcomes, prompt, {n: trials[n] for n in part}).items()}
    return {name: [made[0], *made[2 * i + 1 : 2 * i + 3]] for i, name in enumerate(trials)}


def _judged(
    name: str, same: Tensor, moved: Tensor, position: int, tolerance: float, causal: bool
) -> Proof:
    """What the changes of the outcome, position by position, say about a site."""
    reason, largest = "", float(moved[position:].max())
    if float(same.max()) > tolerance:
        reason = "writing back what was read changed the outcome"
    elif largest <= max(3 * float(same.max()), 1e-6):
        reason = "replacing it left the outcome unchanged"
    elif causal and float(moved[:position].max()) > max(tolerance, 1e-6):
        reason = "a change at one position moved earlier positions"
    return Proof(name, True, not reason, reason, largest)


def _fault(name: str, values: np.ndarray, causal: bool) -> str:
    """What is wrong with a read, empty if nothing is."""
    finite = np.where(np.isneginf(values), 0.0, values) if name == "scores" else values
    if not np.isfinite(finite).all():
        return "it reads as NaN"
    if name == "pattern":
        sums = values.sum(-1)
        if values.min() < -1e-6 or sums.max() > 1 + 2e-2:
            return f"its rows sum to {sums.max():.3f} instead of at most 1"
        if causal and np.triu(values, 1).max() > 0:
            return "a query attends to a later key"
    return ""


def _writable(name: str, values: np.ndarray) -> np.ndarray:
    # Minus infinity survives being written back, but not being compared: keep it as it is.
    return values if name != "scores" else np.where(np.isneginf(values), -1e30, values)


def _disturb(
    name: str, spelled: str, values: np.ndarray, position: int, causal: bool
) -> Intervention:
    """An edit at one position that a working site cannot ignore."""
    if name == "scores":
        return block([position], [0], layers=[int(spelled.split(".")[1])])
    if name == "pattern":
        head = values.copy()
        row = np.zeros_like(head[:, position])
        row[:, 0] = 1.0
        # All weight on the first key, or on the last visible one where it is there already.
        crowded = head[:, position, 0] > 0.5
        row[crowded, 0], row[crowded, position] = 0.0, 1.0
        head[:, position] = row
        return patch(spelled, head)
    noise = np.random.default_rng(0).standard_normal(values.shape[1:]).astype(np.float32)
    size = float(np.abs(values).mean()) or 1.0
    return edit(spelled, "add", 10.0 * size * noise, positions=[position])


def refuse(
    proofs: Mapping[str, Proof], name: str, verb: str, model: str, lane: str, others: list[str],
    untried: list[str],
) -> None:
    """Raise `SiteRefused` if this lane has not proven it can do `verb` ("read" or "write").

    `others` are lanes that have proven it, `untried` those that nobody has asked yet.
    """
    proof = proofs.get("resid_pre" if name == "embed" else name)
    if proof is None or getattr(proof, "readable" if verb == "read" else "writable"):
        return
    if others:
        advice = f"Use lane {' or '.join(repr(o) for o in others)}, where the same was proven."
    elif untried:
        advice = f"Try lane {untried[0]!r}: model.using({untried[0]!r})."
    else:
        advice = "No lane of this model has proven it."
    raise SiteRefused(
        f"cannot {verb} {name!r} on {model} in lane {lane!r}: {proof.reason}.\n  {advice}"
    )


def is_causal(outcome: Callable[[list[int]], Any], ids: list[int]) -> bool:
    """Whether a change of the last token leaves every earlier position as it was."""
    first = outcome(ids)
    second = outcome([*ids[:-1], ids[0]])
    scale = float(first.std()) or 1.0
    return bool((first[:-1] - second[:-1]).abs().max() <= 1e-4 * scale)


def sites_with(proofs: Mapping[str, Proof], verb: str) -> list[str]:
    """The sites that can be read, or written."""
    kind = "readable" if verb == "read" else "writable"
    return [name for name in (*NAMES,) if name in proofs and getattr(proofs[name], kind)]

