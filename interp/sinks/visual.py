"""Visual sinks: image tokens that collect attention because the language model's massive
coordinates fire on them.

Paper     arXiv:2503.03321
Question  Which image tokens are sinks, from which layer on, and in which residual coordinates?
Measure   phi, the largest |x_d| / RMS(x) over the sink dimensions, of the residual that enters a
          layer; a token is a sink where phi reaches tau
Cause     block the text queries from the visual sinks: the answer must not change, while it does
          for as many other image tokens
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Optional, SupportsFloat, SupportsIndex

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, Result, block
from interp.core.errors import NumericalError, OutOfRange, PromptError
from interp.core.site import Site
from interp.figures import layer_curve
from interp.models.model import Model
from interp.sinks.validation_gate import Gate, PermutationNull, gate, permutation_null
from interp.stream.reducers import Received, ValueWeighted

Dims = Sequence[SupportsIndex] | np.ndarray | Tensor
Comparison = Literal[">=", ">"]

EPSILON = 1e-6
"""Added to the mean square under the root, as in the released code."""


def sink_value(
    residual: Float[Tensor | np.ndarray, "*batch position d_model"], sink_dims: Dims
) -> Float[Tensor, "*batch position"]:
    """phi: the largest magnitude over the sink dimensions, in units of the vector's RMS.

    Example:
        >>> residual = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, -8.0]])
        >>> sink_value(residual, [2, 3]).round(decimals=3)
        tensor([1., 2.])

    Args:
        residual: what enters layer l (transformers' `hidden_states[l]`), before the norm and
            without its gain.
        sink_dims: the model's sink dimensions (`candidate_dims`).

    Returns:
        phi in float32 (float64 is kept), between 0 and sqrt(d_model).

    Raises:
        NumericalError: NaN or infinity in the residual.
        OutOfRange: a dimension that the residual does not have.

    Source: arXiv:2503.03321; RMS with 1e-6 under the root as in the released code.
    """
    values = _checked(residual)
    dims = _dims(sink_dims, values.shape[-1])
    root = (values.square().mean(-1) + EPSILON).sqrt()
    return values[..., dims.to(values.device)].abs().amax(-1) / root


def portable_tau(d_model: SupportsFloat) -> float:
    """tau(D) = 0.3125 sqrt(D): the threshold that means the same share of energy at every width.

    Example:
        >>> portable_tau(4096), round(portable_tau(3584), 1)
        (20.0, 18.7)

    tau = 20 asks one coordinate to hold 400/D of the squared norm (9.8 % at 4096) and can never be
    reached below D = 400; tau(D) asks for 9.8 % at any D. Derived from the definition of phi.
    """
    return 0.3125 * math.sqrt(float(d_model))


def sink_mask(
    residual: Float[Tensor | np.ndarray, "*batch position d_model"],
    sink_dims: Dims,
    tau: Optional[SupportsFloat] = 20.0,
    comparison: Comparison = ">=",
) -> Bool[Tensor, "*batch position"]:
    """True where a position is a sink; see `sink_positions`.

    Example:
        >>> residual = torch.ones(2, 900)
        >>> residual[1, 3] = 100.0
        >>> sink_mask(residual, [3])
        tensor([False,  True])
    """
    phi = sink_value(residual, sink_dims)
    limit = portable_tau(residual.shape[-1]) if tau is None else float(tau)
    return phi >= limit if comparison == ">=" else phi > limit


def sink_positions(
    residual: Float[Tensor | np.ndarray, "position d_model"],
    sink_dims: Dims,
    tau: Optional[SupportsFloat] = 20.0,
    comparison: Comparison = ">=",
) -> Int[Tensor, "sink"]:
    """Positions whose phi reaches tau, in order: text and image sinks alike.

    Example:
        >>> residual = torch.ones(4, 900)
        >>> residual[2, 3] = 100.0
        >>> sink_positions(residual, [3, 7])
        tensor([2])

    Args:
        tau: threshold on phi; None for `portable_tau` of the model's width. Report both, and say
            so if the two sets differ.
        comparison: ">=" in the paper, ">" in the released code.

    Visual sinks are these positions inside the image. Layers 0 and 1 have none yet.

    Source: arXiv:2503.03321 (I^l); released code `DimProspector`.
    """
    return sink_mask(residual, sink_dims, tau, comparison).nonzero().flatten()


def band(n_layers: int) -> range:
    """Layers in which massive values exist: from a tenth to four fifths of the depth.

    Example:
        >>> band(32), band(6)
        (range(4, 26), range(1, 5))
    """
    return range(math.ceil(0.1 * n_layers), math.floor(0.8 * n_layers) + 1)


@dataclass(frozen=True)
class SinkDims:
    """Discovered sink dimensions, strongest first, each with sign, energy, recurrence and birth.

    `energy` is the mean share of the anchor's squared norm, `recurrence` the share of
    (prompt, layer) pairs in which the dimension was a candidate, `birth_layer` the first layer
    in which its mean share passes 5 % (None if it never does).
    """

    dims: tuple[int, ...]
    sign: tuple[int, ...] = ()
    energy: tuple[float, ...] = ()
    recurrence: tuple[float, ...] = ()
    birth_layer: tuple[Optional[int], ...] = ()


def candidate_dims(
    anchors: Float[Tensor | np.ndarray, "prompt layer d_model"],
    min_ratio: SupportsFloat = 1000.0,
    min_recurrence: SupportsFloat = 0.8,
    min_root_share: SupportsFloat = 0.15,
    cap: int = 8,
    layers: Optional[Sequence[SupportsIndex]] = None,
) -> SinkDims:
    """Dimensions that are massive in the anchor (the first sink token) again and again.

    Example:
        >>> anchors = 0.01 * torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(0))
        >>> anchors[:, 1:, 5] = -40.0
        >>> found = candidate_dims(anchors)
        >>> found.dims, found.sign, found.birth_layer
        ((5,), (-1,), (1,))

    Args:
        anchors: residual entering every layer, at the anchor position (BOS, or the first position
            that collects attention).
        min_ratio: |x_d| over the median |x| of the same vector; 100 for models under about 1e9
            parameters, and say so.
        min_recurrence: share of (prompt, layer) pairs of the band in which it must be a candidate.
        min_root_share: |x_d| / RMS must reach this times sqrt(d_model).
        layers: the band to look in; `band` of the depth if None.

    Returns:
        At most `cap` dimensions by mean energy; none if nothing recurs.

    Source: toolkit procedure (methods of massive activations, arXiv:2402.17762, on anchor
    vectors); known sets it must find: LLaMA-2-7B {1415, 2533}, LLaMA-2-13B {2100, 4743}.
    """
    values = _checked(anchors)
    _, n_layers, width = values.shape
    chosen = [int(layer) for layer in (band(n_layers) if layers is None else layers)]
    if not chosen or min(chosen) < 0 or max(chosen) >= n_layers:
        raise OutOfRange(f"layers {chosen} are not among the {n_layers} layers of the anchors.")
    size = values.abs()
    mean_square = values.square().mean(-1, keepdim=True)
    energy = values.square() / (width * mean_square).clamp(min=torch.finfo(values.dtype).tiny)
    large = size / (mean_square + EPSILON).sqrt() >= float(min_root_share) * math.sqrt(width)
    massive = size >= float(min_ratio) * size.median(-1, keepdim=True).values
    recurrence = (large & massive)[:, chosen].double().mean((0, 1))
    strength = energy[:, chosen].double().mean((0, 1))
    kept = (recurrence >= float(min_recurrence)).nonzero().flatten().tolist()
    kept = sorted(kept, key=lambda d: (-float(strength[d]), d))[:cap]
    by_layer = energy.mean(0)
    births = []
    for d in kept:
        passed = (by_layer[:, d] > 0.05).nonzero().flatten()
        births.append(int(passed[0]) if len(passed) else None)
    return SinkDims(
        tuple(kept),
        tuple(1 if float(values[:, chosen, d].mean()) > 0 else -1 for d in kept),
        tuple(float(strength[d]) for d in kept),
        tuple(float(recurrence[d]) for d in kept),
        tuple(births),
    )


@dataclass(frozen=True, eq=False)
class Origin:
    """Where each visual token's outlier comes from: the vision tower, the language model, or both.

    `v_sink`: norm outlier already in the projector's output. `l_sink`: phi reaches tau only
    inside the language model, in layer 2 or later. `birth_layer`: first layer with phi at tau, -1
    if none.
    """

    v_sink: Bool[Tensor, "patch"]
    l_sink: Bool[Tensor, "patch"]
    birth_layer: Int[Tensor, "patch"]

    def labels(self) -> list[str]:
        """One of "V-sink", "L-sink", "V+L", "none" for every visual token."""
        names = {(True, False): "V-sink", (False, True): "L-sink", (True, True): "V+L",
                 (False, False): "none"}
        return [names[pair] for pair in zip(self.v_sink.tolist(), self.l_sink.tolist())]

    def crosstab(self) -> pd.DataFrame:
        """Counts of tokens, V-sink (rows) against L-sink (columns)."""
        both = [False, True]
        counts = [[int(((self.v_sink == row) & (self.l_sink == column)).sum()) for column in both]
                  for row in both]
        return pd.DataFrame(counts, index=pd.Index(both, name="V-sink"),
                            columns=pd.Index(both, name="L-sink"))


def origin(
    projected: Float[Tensor | np.ndarray, "patch d_model"],
    phi: Float[Tensor | np.ndarray, "layer patch"],
    tau: SupportsFloat,
    min_birth: int = 2,
) -> Origin:
    """Label where visual sinks come from: V-sink the vision side, L-sink the language model.

    Example:
        >>> projected = torch.ones(9, 4)
        >>> projected[3] *= 40
        >>> phi = torch.zeros(5, 9)
        >>> phi[2:, 6] = 30.0
        >>> [name for name in origin(projected, phi, 20.0).labels() if name != "none"]
        ['V-sink', 'L-sink']

    Args:
        projected: visual embeddings as they enter the language model; outliers have a norm above
            the image's mean plus two standard deviations.
        phi: `sink_value` of the same tokens in the residual entering every layer.
        min_birth: first layer that counts as inside the language model.

    Source: V-sinks, arXiv:2603.00510; L-sinks, arXiv:2503.03321; the two sets differ
    (arXiv:2604.03316). Labels are the toolkit's.
    """
    norm = _checked(projected).norm(dim=-1)
    values = _checked(phi)
    if values.shape[-1] != len(norm):
        raise ValueError(
            f"{len(norm)} projected tokens but phi of {values.shape[-1]}; give the same visual "
            "tokens in the same order."
        )
    v_sink = norm > norm.mean() + 2 * norm.std(correction=0)
    alive = values >= float(tau)
    birth = torch.where(alive.any(0), alive.int().argmax(0), torch.full_like(alive[0].int(), -1))
    return Origin(v_sink, birth >= min_birth, birth)


@dataclass(frozen=True)
class Discovery:
    """Sink dimensions of a model with the evidence that they mark sinks.

    Attributes:
        found: the dimensions, strongest first.
        anchor: position whose states they were read from; `anchor_is_top` says whether it really
            receives the most attention (mean over layers from 2 on).
        gate: the four checks, None without images or without dimensions.
        null: the same AUROC for random dimension sets, None likewise.
        tau: portable threshold; relaxed_ratio: the ratio to the median that was asked for.
    """

    found: SinkDims
    anchor: int
    anchor_is_top: bool
    gate: Optional[Gate]
    null: Optional[PermutationNull]
    tau: float
    min_ratio: float

    @property
    def passed(self) -> bool:
        """Dimensions were found and both the gate and the permutation null agree."""
        return bool(self.found.dims and self.gate and self.gate.passed
                    and self.null and self.null.passed)

    def __str__(self) -> str:
        lines = [f"{'PASS' if self.passed else 'FAIL'}  sink dimensions {list(self.found.dims)} "
                 f"from position {self.anchor}"]
        if self.gate is not None:
            lines += [f"  {check}" for check in self.gate.checks]
        if self.null is not None:
            verdict = "PASS" if self.null.passed else "FAIL"
            lines.append(f"  {verdict}  random dimensions: AUROC {self.null.observed:.3g} "
                         f"(99th percentile of random sets {self.null.percentile_99:.3g})")
        return "\n".join(lines)


def find_sink_dims(
    model: Model,
    text_prompts: Sequence[Prompt],
    image_prompts: Sequence[Prompt] = (),
    *,
    min_ratio: Optional[SupportsFloat] = None,
    anchor: int = 0,
    seed: int = 0,
    n_null: int = 1000,
) -> Discovery:
    """Discover the sink dimensions of an unknown model, and check that they mark sinks.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> found = find_sink_dims(model, [Prompt.from_tokens(range(12))] * 2)
        >>> found.anchor, found.passed
        (0, False)

    Args:
        text_prompts: at least 32 in earnest; the anchors are read from these and from the image
            prompts.
        image_prompts: prompts with a segment of kind "image"; without them nothing is validated.
        min_ratio: |x_d| over the median |x|; None asks for 1000, or 100 for models narrower than
            2048 (which are under a billion parameters).
        anchor: the position that should be the primary sink (BOS, or the first token).

    Source: toolkit procedure for arXiv:2503.03321; see `candidate_dims`, `gate`,
    `permutation_null`.
    """
    prompts = [*text_prompts, *image_prompts]
    if not prompts:
        raise PromptError("no prompts to find sink dimensions with: give at least one.")
    ratio = float(min_ratio) if min_ratio is not None else (1000.0 if model.d_model >= 2048 else 100.0)
    anchors, tops = [], []
    for prompt in prompts:
        run = model.run(prompt, read="resid_pre", stats="received", logits="none")
        anchors.append(run.reads["resid_pre"].values[0, :, anchor])
        deep = run.stats["received"].isel(prompt=0, layer=slice(min(2, model.n_layers - 1), None))
        # Layers with a sliding window do not say what early keys receive: the mean skips them.
        received = deep.mean(("layer", "head")).fillna(-1.0).values
        tops.append(int(received[: max(1, len(prompt) // 2)].argmax()) == anchor)
    # A model of one block has no band; its only layer is what there is to look in.
    layers = list(band(model.n_layers)) or [model.n_layers - 1]
    found = candidate_dims(np.stack(anchors), min_ratio=ratio, layers=layers)
    tau = portable_tau(model.d_model)
    checks = null = None
    if found.dims and image_prompts:
        checks, null = _validate(model, text_prompts, image_prompts, found, anchor, tau, n_null,
                                 seed)
    return Discovery(found, anchor, float(np.mean(tops)) > 0.5, checks, null, tau, ratio)


def _validate(
    model: Model, text_prompts: Sequence[Prompt], image_prompts: Sequence[Prompt],
    found: SinkDims, anchor: int, tau: float, n_null: int, seed: int,
) -> tuple[Gate, Optional[PermutationNull]]:
    layers = list(band(model.n_layers)) or [model.n_layers - 1]
    births = [b for b in found.birth_layer if b is not None]
    layers = [layer for layer in layers if layer >= max(births, default=0)] or layers[-1:]
    anchor_phi, text_phi, visual_phi, attended, states = [], [], [], [], []
    for prompt in [*text_prompts, *image_prompts]:
        images = _image_positions(prompt)
        read = model.run(prompt, read=Site("resid_pre", tuple(layers)), stats=[Received("later")],
                         logits="none")
        residual = read.reads[str(Site("resid_pre", tuple(layers)))].values[0]
        phi = sink_value(residual, found.dims).numpy()
        anchor_phi.append(phi[:, anchor])
        words = np.setdiff1d(np.arange(len(prompt)), [anchor, *images])
        text_phi.append(phi[:, words].ravel())
        if images:
            received = read.stats["received"].values[0][layers].mean(1)
            for row, mass, state in zip(phi, received, residual):
                visual_phi.append(row[images])
                attended.append(np.nan_to_num(mass[images]))
                states.append(state[images])
    checks = gate(np.concatenate(anchor_phi), np.concatenate(text_phi), visual_phi, attended, tau)
    null = None
    if len({len(s) for s in states}) == 1 and n_null:
        null = permutation_null(np.stack(states), np.stack(attended), found.dims, n_null, seed)
    return checks, null


def _image_positions(prompt: Prompt) -> list[int]:
    return sorted({p for segment in prompt.of_kind("image") for p in segment.positions})


def after_image(prompt: Prompt) -> tuple[int, ...]:
    """Positions after the last image token: the queries that read the image for the answer.

    Example:
        >>> after_image(Prompt.from_tokens([1, 2, 3, 4, 5], {"image": (1, 3)}))
        (3, 4)

    Raises PromptError for a prompt without an image, or without text behind it.
    """
    images = _image_positions(prompt)
    if not images:
        raise PromptError("the prompt has no image: make it with model.prompt(..., images=[...]).")
    later = tuple(range(max(images) + 1, len(prompt)))
    if not later:
        raise PromptError("no token follows the image, so nothing reads it; ask a question.")
    return later


def measure(
    model: Model, prompts: Sequence[Prompt], sink_dims: Dims, tau: Optional[SupportsFloat] = None
) -> Result:
    """phi of every position in every layer, the sinks among the image tokens, and their origin.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = Prompt.from_tokens(range(9), {"image": (2, 6)})
        >>> measure(model, [prompt], [3])["phi"].dims
        ('prompt', 'layer', 'position')

    Args:
        prompts: each with a segment of kind "image" and text behind it.
        sink_dims: from `find_sink_dims`, or known ones.
        tau: threshold on phi; None for the portable one of the model's width.

    Returns:
        `phi` of what enters each layer, `is_sink`, `kind` ("text", "image") [prompt, position],
        `received` [prompt, layer, position]: mean over heads of the attention from the queries
        after the image, `origin` [prompt, position] ("", "V-sink", "L-sink", "V+L", "none"),
        `contribution` [prompt, layer, position]: the same attention weighted by the norm of the
        value it fetches.

    Raises:
        PromptError: a prompt without an image.
    """
    limit = portable_tau(model.d_model) if tau is None else float(tau)
    rows: list[xr.Dataset] = []
    for prompt in prompts:
        later = after_image(prompt)
        stats = [Received("later", subset=later), ValueWeighted(queries="later", subset=later)]
        run = model.run(prompt, read="resid_pre", stats=stats, logits="none")
        residual = run.reads["resid_pre"].values[0]
        phi = sink_value(residual, sink_dims).numpy()
        images = _image_positions(prompt)
        kind = np.array(["text"] * len(prompt), dtype="<U5")
        kind[images] = "image"
        origins = np.array([""] * len(prompt), dtype="<U6")
        origins[images] = origin(residual[0][images], phi[:, images], limit).labels()
        rows.append(xr.Dataset({
            "phi": (("layer", "position"), phi),
            "is_sink": (("layer", "position"), phi >= limit),
            "received": (("layer", "position"),
                         run.stats["received"].values[0].mean(1)),
            "contribution": (("layer", "position"),
                             run.stats["value_weighted"].values[0].mean(1)),
            "kind": ("position", kind), "origin": ("position", origins),
        }, {"layer": np.arange(model.n_layers), "position": np.arange(len(prompt))}))
    data = xr.concat(rows, "prompt", join="outer", fill_value={
        "is_sink": False, "kind": "", "origin": "", "phi": np.nan, "received": np.nan,
        "contribution": np.nan})
    return Result(data, {
        **model.manifest(), "measure": "visual_sinks", "tau": limit,
        "sink_dims": [int(d) for d in np.asarray(sink_dims).reshape(-1)],
    })


def sinks_by_layer(
    found: Result, prompt: int = 0, first_layer: int = 2, image_only: bool = False
) -> dict[int, tuple[int, ...]]:
    """Sink positions of one prompt per layer, for `interp.redistribute` and `interp.block`.

    Example:
        >>> data = xr.Dataset({"is_sink": (("prompt", "layer", "position"), [[[1, 0], [1, 1]]]),
        ...                    "kind": (("prompt", "position"), [["text", "image"]])})
        >>> sinks_by_layer(Result(data), first_layer=0)
        {0: (0,), 1: (0, 1)}

    Layers before `first_layer` are left out: there are no sinks yet (arXiv:2503.03321).
    """
    data = found.data.isel(prompt=prompt)
    flags = data["is_sink"].values.astype(bool)
    if image_only:
        flags = flags & (data["kind"].values == "image")
    return {
        layer: tuple(int(p) for p in np.flatnonzero(row))
        for layer, row in enumerate(flags) if layer >= first_layer and row.any()
    }


def intervene(
    model: Model,
    prompts: Sequence[Prompt],
    found: Result,
    answers: Sequence[int],
    *,
    control_seeds: int = 5,
    seed: int = 0,
    first_layer: int = 2,
) -> Result:
    """Hide the visual sinks from the text: does the answer suffer less than for other tokens?

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = Prompt.from_tokens(range(9), {"image": (2, 6)})
        >>> found = measure(model, [prompt], [3], tau=0.5)
        >>> intervene(model, [prompt], found, [5], first_layer=0)["log_probability"].dims
        ('prompt', 'condition')

    Queries after the image are blocked from the visual sinks in every layer from `first_layer` on.
    Controls hide as many image tokens that are no sinks: drawn at random (`control_seeds` times),
    and those that receive the most attention (matched on attention, the strongest comparator).

    Args:
        answers: the right next token of each prompt.

    Returns:
        `log_probability` and `correct` [prompt, condition] with the conditions "untouched",
        "sinks", "random", "attention-matched"; `hidden` [prompt]: tokens hidden (0 where a prompt
        has no visual sink; its conditions are then all untouched).

    Source: arXiv:2503.03321, Fig. 3b; matched controls are this toolkit's.
    """
    conditions = ["untouched", "sinks", "random", "attention-matched"]
    rng = np.random.default_rng(seed)
    scores = np.zeros((len(prompts), 4, 2))
    hidden = np.zeros(len(prompts), dtype=int)
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        later = after_image(prompt)
        by_layer = sinks_by_layer(found, number, first_layer, image_only=True)
        sinks = sorted({p for places in by_layer.values() for p in places})
        others = [p for p in _image_positions(prompt) if p not in sinks]
        count = min(len(sinks), len(others))
        hidden[number] = count

        def score(
            keys: Sequence[SupportsIndex] | np.ndarray, prompt: Prompt = prompt, answer: int = answer,
            later: tuple[int, ...] = later,
        ) -> tuple[float, float]:
            write = [block(later, list(keys), layers=range(first_layer, model.n_layers))] \
                if len(keys) else []
            row = model.run(prompt, write=write, logits="last").logits[0][-1].log_softmax(-1)
            return float(row[answer]), float(int(row.argmax()) == answer)

        scores[number, 0] = base = score([])
        if not count:
            scores[number, 1:] = base
            continue
        deep = found["received"].isel(prompt=number, layer=slice(first_layer, None))
        received = deep.mean("layer").fillna(-1.0).values
        loudest = sorted(others, key=lambda p: -received[p])[:count]
        scores[number, 1] = score(sinks[:count])
        scores[number, 2] = np.mean(
            [score(rng.choice(others, count, replace=False)) for _ in range(control_seeds)], 0)
        scores[number, 3] = score(loudest)
    dims = ("prompt", "condition")
    data = xr.Dataset({"log_probability": (dims, scores[..., 0]), "correct": (dims, scores[..., 1]),
                       "hidden": ("prompt", hidden)}, {"condition": conditions})
    return Result(data, {**model.manifest(), "operation": "block", "first_layer": first_layer,
                         "control": "random and attention-matched image tokens",
                         "control_seeds": control_seeds, "seed": seed})


def draw(found: Result, ax: Axes) -> Axes:
    """Mean phi per layer of the first token, visual sinks, other image tokens and other text."""
    data, tau = found.data, found.manifest["tau"]
    image = data["kind"] == "image"
    ever = data["is_sink"].isel(layer=slice(2, None)).any("layer")
    groups = {
        "first token": (data["position"] == 0) & (data["kind"] != ""),
        "visual sinks": image & ever, "other image tokens": image & ~ever,
        "other text": (data["kind"] == "text") & (data["position"] > 0),
    }
    curves = {name: data["phi"].where(chosen).mean("position")
              for name, chosen in groups.items() if bool(chosen.any())}
    roles = {"first token": "primary", "visual sinks": "visual", "other image tokens": "image",
             "other text": "control"}
    layer_curve.draw(ax, curves, label="phi (size in the sink dimensions)",
                     roles={n: roles[n] for n in curves})
    ax.axhline(tau, color="black", linewidth=0.8, linestyle=":", label=f"threshold, {tau:.3g}")
    ax.legend()
    return ax


def _checked(values: Tensor | np.ndarray) -> Tensor:
    tensor = torch.as_tensor(values)
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    finite = torch.isfinite(tensor)
    if not finite.all():
        place = tuple((~finite).nonzero()[0].tolist())
        raise NumericalError(
            f"values are NaN or infinite at index {place} of shape {tuple(tensor.shape)}; run the "
            "model in bfloat16 or float32."
        )
    return tensor


def _dims(sink_dims: Dims, width: int) -> Tensor:
    dims = torch.as_tensor(np.asarray(sink_dims, dtype=np.int64).reshape(-1))
    if not len(dims):
        raise ValueError("no sink dimensions: discover them first (`find_sink_dims`).")
    if int(dims.min()) < 0 or int(dims.max()) >= width:
        raise OutOfRange(
            f"sink dimensions {dims.tolist()} do not fit a residual of width {width}; they belong "
            "to another model."
        )
    return dims
