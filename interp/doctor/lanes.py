"""Which lanes open the model, which sites they prove in which layers, and whether they agree."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from interp.core.errors import SiteRefused, UndertowError
from interp.core.intervention import Intervention, each
from interp.core.prompt import Prompt
from interp.core.site import NAMES, PAIRS
from interp.doctor.report import Lane, Parity, Report, SiteRow
from interp.models import model as models
from interp.models.lane_hf import no_earlier_picture, probe_ids
from interp.models.model import Model
from interp.models.prove import Proof, prove

TOLERANCE = {
    torch.float64: (1e-6, 1e-7), torch.float32: (1e-3, 1e-4),
    torch.float16: (0.1, 0.02), torch.bfloat16: (0.5, 0.05),
}
"""Per dtype: the largest difference of logits, and their root mean square, in units of the spread.

Two exact ways through a network in half precision differ by roundings that add up over layers: the
largest of many thousand differences says little there, the root mean square more.
"""

PARITY_TOKENS = 48


def open_lanes(model: Model, report: Report, wanted: Optional[Sequence[str]] = None) -> list[Model]:
    """The model in every lane that opens; the others are noted with their reason.

    A closed lane is a limit where it was wanted by name, or where none opens.
    """
    opened, closed = [], []
    for name in wanted or models.LANES:
        try:
            opened.append(model.using(name))
            report.lanes.append(Lane(name, True))
        except Exception as error:  # a lane that breaks must not end the examination
            report.lanes.append(Lane(name, False, sentence(error)))
            closed.append((f"lane {name}", f"lane {name!r} is closed: {sentence(error)}"))
    for about, said in closed:
        (report.limit if wanted or not opened else report.note)(about, said)
    return opened


def prove_sites(model: Model, report: Report, quick: bool = False) -> None:
    """Prove every site in the first, the middle and the last layer (quick: in the middle).

    Traces of nnsight take long, so there only what opening the lane has proven is told.
    """
    proofs = {model.n_layers // 2: model.proofs()}
    if not quick and model.lane in ("hf", "bridge"):
        for layer in sorted({0, model.n_layers - 1} - set(proofs)):
            proofs[layer] = _proofs(model, layer)
    for name in NAMES:
        tried = {layer: found[name] for layer, found in proofs.items() if name in found}
        if not tried:
            continue
        bad = {layer: p for layer, p in sorted(tried.items()) if not (p.readable and p.writable)}
        reason = next((p.reason for p in bad.values()), "")
        exists = "nothing lies between" not in reason
        readable, writable = (all(getattr(p, verb) for p in tried.values())
                              for verb in ("readable", "writable"))
        report.sites.append(SiteRow(
            model.lane, name, readable, writable, reason, tuple(sorted(tried)), tuple(bad), exists,
            min(p.moved for p in tried.values()),
        ))


def weigh_sites(report: Report, wanted: Optional[Sequence[str]] = None) -> None:
    """Note what could not be proven: a limit where no lane can, or where the lane was wanted."""
    for row in report.sites:
        if not row.failed or not row.exists:
            continue
        others = [one.lane for one in report.sites
                  if one.site == row.site and one.lane != row.lane and not one.failed]
        verb = "written" if row.readable else "read or written"
        where = "" if row.failed == row.layers else " in layer " + ", ".join(map(str, row.failed))
        said = f"{row.site!r} cannot be {verb}{where} in lane {row.lane!r}: {row.reason.rstrip('.')}"
        if others and not wanted:
            report.note(f"site {row.site}", f"{said}. Use lane {' or '.join(map(repr, others))}.")
        else:
            report.limit(f"site {row.site}", said + ".")


def _proofs(model: Model, layer: int) -> dict[str, Proof]:
    """As `Model.proofs`, for another layer than the one proven when the model was opened."""

    def outcomes(
        prompt: Prompt, writes: Sequence[tuple[Intervention, ...]], read: tuple[str, ...]
    ) -> tuple[list[Tensor], dict[str, Any]]:
        last = f"resid_post.{model.n_layers - 1}"
        run = model.run([prompt] * len(writes), read=tuple({*read, last}), write=each(writes),
                        batch_size=len(writes))
        rows = run.logits or [torch.tensor(x) for x in run.reads[last].values[:, 0]]
        return rows, {name: array.values[0, 0] for name, array in run.reads.items()}

    known = model.proofs()
    reasons = {name: None if proof.readable else proof.reason for name, proof in known.items()}
    readable = [name for name, reason in reasons.items() if reason is None and name != "embed"]
    probe = _probe(model, 6)
    try:
        model.run(probe, read=[f"{name}.{layer}" for name in readable], logits="none")
    except SiteRefused:
        for name in readable:
            try:
                model.run(probe, read=f"{name}.{layer}", logits="none")
            except SiteRefused as error:
                reasons[name] = sentence(error)
    found = prove(outcomes, list(probe.ids), layer, lambda name: reasons.get(name),
                  model._tolerance(), model.kind == "decoder")
    # A write that was refused when the model was opened is not tried again: the reason is that one.
    return {name: replace(proof, reason=known[name].reason)
            if proof.readable and not proof.writable and not known[name].writable else proof
            for name, proof in found.items()}


def compare(
    lane: Model, report: Report, picture: Optional[Prompt] = None, quick: bool = False,
    window: Optional[int] = None,
) -> None:
    """Hold a lane against the plain transformers forward: prompt, decoding, picture, sites."""
    length = PARITY_TOKENS
    if window is not None and window <= 512:
        length = max(length, window + 16)  # Long enough that a window matters.
    prompt = _probe(lane, min(length, lane.max_positions or length))
    checks: list[tuple[str, Callable[[], Optional[Parity]]]] = [
        ("logits", lambda: _logits(lane, prompt, "logits")),
    ]
    if not quick:
        checks.append(("decoding", lambda: _decoding(lane, prompt)))
    if picture is not None:
        checks.append(("picture", lambda: _logits(lane, picture, "logits with a picture")))
    if lane.lane != "hf" and not quick:
        checks.append(("sites", lambda: _sites(lane, prompt)))
    for about, check in checks:
        try:
            found = check()
        except Exception as error:
            report.fault(f"parity {lane.lane}",
                         f"the {about} of lane {lane.lane!r} could not be compared: {sentence(error)}")
            continue
        if found is None:
            continue
        report.parity.append(found)
        if not found.alike:
            worst = f" (most at {found.worst})" if found.worst else ""
            report.fault(
                f"parity {lane.lane}",
                f"{found.what} of lane {lane.lane!r} differ from {found.against} by "
                f"{found.difference:.2g} of their spread, more than {found.tolerance:g}{worst}; do "
                "not use this lane with this model.")


def plain_forward(model: Model, prompt: Prompt) -> Any:
    """What transformers alone gives, by its own attention, outside of any lane."""
    inputs: dict[str, Any] = {}
    for name, value in prompt.inputs.items():
        given = torch.as_tensor(np.asarray(value)).to(model.device)
        inputs[name] = given.to(model.dtype) if given.is_floating_point() else given
    ids = torch.tensor([prompt.ids], device=model.device)
    with torch.no_grad(), no_earlier_picture(model.hf):
        return model.hf(input_ids=ids, output_hidden_states=True, **inputs)


def _logits(lane: Model, prompt: Prompt, what: str) -> Parity:
    plain = plain_forward(lane, prompt)
    if getattr(plain, "logits", None) is not None:
        return _parity(lane, "plain transformers", what, lane.run(prompt).logits[0],
                       plain.logits[0].float().cpu())
    # Without a vocabulary the streams that enter the blocks are compared.
    expected = torch.stack([h[0] for h in plain.hidden_states[: lane.n_layers]]).float().cpu()
    found = torch.tensor(lane.run(prompt, read="resid_pre").reads["resid_pre"].values[0])
    return _parity(lane, "plain transformers", what.replace("logits", "residual streams"),
                   found, expected)


def _decoding(lane: Model, prompt: Prompt) -> Optional[Parity]:
    """The last tokens fed one by one through the cache, against one pass over all of them."""
    plain = plain_forward(lane, prompt)
    if lane.kind != "decoder" or getattr(plain, "logits", None) is None or len(prompt) < 8:
        return None
    start = Prompt.from_tokens(prompt.ids[:-3])
    found = lane.run(start, new_tokens=[list(prompt.ids[-3:])]).logits[0]
    return _parity(lane, "plain transformers", "logits while decoding", found[-4:],
                   plain.logits[0, -4:].float().cpu())


def _sites(lane: Model, prompt: Prompt) -> Optional[Parity]:
    """Every site that this lane and lane "hf" both read, in all layers."""
    try:
        other = lane.using("hf")
    except UndertowError:
        return None
    names = [n for n in lane.sites() if n in other.sites()]
    mine, theirs = (m.run(prompt, read=names, logits="none").reads for m in (lane, other))
    worst: Optional[Parity] = None
    for name in names:
        a, b = (torch.tensor(reads[name].values).float() for reads in (mine, theirs))
        if name in PAIRS:
            a, b = (x.nan_to_num(0.0, 0.0, 0.0) for x in (a, b))
        found = _parity(lane, "lane 'hf'", "values of sites", a, b, worst=name)
        if worst is None or found.difference / found.tolerance > worst.difference / worst.tolerance:
            worst = found
    return worst


def _parity(
    lane: Model, against: str, what: str, found: Tensor, expected: Tensor, worst: str = ""
) -> Parity:
    most, typical = TOLERANCE.get(lane.dtype, TOLERANCE[torch.bfloat16])
    if found.shape != expected.shape:
        return Parity(lane.lane, against, f"{what} (of another shape)", 0, float("inf"),
                      float("inf"), most, False)
    gap = (found.double() - expected.double()).abs()
    spread = float(expected.double().std()) or 1.0
    largest, rms = float(gap.max()) / spread, float(gap.square().mean().sqrt()) / spread
    same = None
    if what.startswith("logits"):
        same = float((found.argmax(-1) == expected.argmax(-1)).double().mean())
    # Written so that NaN is no agreement.
    alike = bool(largest <= most and rms <= typical)
    return Parity(lane.lane, against, what, int(found.shape[-2]), largest, rms, most, alike, same,
                  worst)


def _probe(model: Model, length: int) -> Prompt:
    ids = probe_ids(model.hf, length)[0].tolist()
    while len(ids) < length:  # a vocabulary smaller than the prompt
        ids += ids[: length - len(ids)]
    return Prompt.from_tokens(ids)


def sentence(error: BaseException) -> str:
    """The first sentence of an error, with its kind where it is not one of ours."""
    text = " ".join(str(error).split())
    if isinstance(error, UndertowError):
        return text
    text = text.split(". ")[0].rstrip(".")[:200]
    return f"{type(error).__name__}: {text}." if text else f"{type(error).__name__}."
