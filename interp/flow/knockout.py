"""Attention knockout: when, and from where, information reaches the position that predicts.

Paper     arXiv:2304.14767
Question  In which layers does the prediction read from these positions?
Measure   change of the answer's probability when the edges from some queries to some keys are cut in
          a window of layers, by true layer and set of keys
Cause     the measure is an intervention; random sets of equally many keys are its control
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import OutOfRange, Prompt, PromptError, Result
from interp.core.prompt import Where
from interp.figures import layer_curve
from interp.figures.style import color, style
from interp.models.last_row import replay_last
from interp.models.model import Model
from interp.models.resume import Resumable


def window(center: SupportsIndex, width: SupportsIndex, n_layers: SupportsIndex) -> range:
    """The layers of a window, cut off at both ends, as in the paper's released code.

    Example:
        >>> window(5, 9, 12), window(5, 10, 12), window(0, 3, 12)
        (range(1, 10), range(0, 10), range(0, 2))

    An even width reaches one layer further down than up.
    """
    center, width, n_layers = int(center), int(width), int(n_layers)
    if width < 1 or not 0 <= center < n_layers:
        raise OutOfRange(
            f"no window of {width} layers around layer {center} in a model of {n_layers}: the width "
            "must be at least 1 and the layer exist."
        )
    return range(max(0, center - width // 2), min(n_layers, center + -(-width // 2)))


def measure(
    model: Model,
    prompts: Union[Prompt, Sequence[Prompt]],
    keys: Union[Where, Mapping[str, Where]],
    *,
    queries: Where = "last",
    answers: Optional[Sequence[SupportsIndex]] = None,
    width: SupportsIndex = 9,
    layers: Optional[Iterable[SupportsIndex]] = None,
    renormalize: bool = True,
    min_probability: SupportsFloat = 0.05,
) -> Result:
    """Cut the edges from `queries` to every set of `keys`, window by window.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 12), {"first": (0, 1), "rest": (1, 8)})
        >>> found = measure(model, prompt, {"first": "first", "rest": "rest"}, width=1,
        ...                 min_probability=0)
        >>> found["relative"].dims
        ('prompt', 'segment', 'layer')

    Args:
        keys: positions that may not be read, or several sets by name. A query never loses itself
            unless it is the only one left out: cutting "last" from "last" is allowed.
        queries: positions that may not read them.
        answers: the token whose probability is followed in each prompt; the model's own for None.
        width: layers per window: 9 for GPT-2-XL in the paper, 10 in its single-example figure, 5
            for GPT-J (both second-hand). layers: the centers; all for None.
        renormalize: cut before the softmax, so that rows sum to one; else the weights become zero.
        min_probability: prompts with a smaller one are NaN in `relative`, because a relative change
            means nothing there; they are counted in the manifest.

    Returns:
        [prompt, segment, layer]: `relative` (percent of the base probability), `log_ratio` (nats),
        `p`; [layer]: `effective_width`; [prompt]: `base`, `answer`. `prefills` is the mean cost per
        prompt in plain passes.

    Source: arXiv:2304.14767; where only the last position's attention is cut, only that row is run
    again, and otherwise the rows from the first query on.
    """
    given = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    if not given:
        raise PromptError("no prompts to run: give at least one.")
    if answers is not None and len(answers) != len(given):
        raise PromptError(f"{len(answers)} answers for {len(given)} prompts: give one for each.")
    sets = dict(keys) if isinstance(keys, Mapping) else {
        keys if isinstance(keys, str) else "keys": keys}
    centers = list(range(model.n_layers)) if layers is None else sorted(int(x) for x in layers)
    spans = [window(center, width, model.n_layers) for center in centers]
    shape = (len(given), len(sets), len(centers))
    p, base, chosen, cost = np.zeros(shape), np.zeros(len(given)), [], []
    for number, prompt in enumerate(given):
        resumable = model.resumable(prompt)
        full = resumable.logits[-1].float().log_softmax(-1)
        answer = int(full.argmax()) if answers is None else int(answers[number])
        base[number] = float(full[answer].exp())
        places = [prompt.positions(where) for where in sets.values()]
        rows = prompt.positions(queries)
        for column, logits in enumerate(_windows(resumable, rows, places, spans, renormalize)):
            p[number, :, column] = logits.log_softmax(-1)[:, answer].exp().double().cpu().numpy()
        chosen.append(answer)
        cost.append(resumable.spent / resumable.prefill + 1)
    known = base >= float(min_probability)
    relative = np.where(known[:, None, None], 100 * (p - base[:, None, None]) / np.maximum(
        base, 1e-30)[:, None, None], np.nan)
    data = xr.Dataset(
        {"relative": (("prompt", "segment", "layer"), relative, {"units": "percent"}),
         "p": (("prompt", "segment", "layer"), p),
         "log_ratio": (("prompt", "segment", "layer"),
                       np.log(np.maximum(p, 1e-30)) - np.log(np.maximum(base, 1e-30))[:, None, None]),
         "base": ("prompt", base), "answer": ("prompt", chosen),
         "effective_width": ("layer", [len(span) for span in spans]),
         "prefills": float(np.mean(cost))},
        {"segment": list(sets), "layer": centers},
    )
    return Result(data, {
        **model.manifest(), "measure": "knockout", "width": int(width),
        "queries": str(queries), "renormalize": bool(renormalize), "decode": "not measured",
        "too_improbable": int((~known).sum()), "naive_prefills": len(sets) * len(centers),
        "prompts": [prompt.digest() for prompt in given],
    })


def _windows(
    resumable: Resumable, queries: tuple[int, ...], places: Sequence[tuple[int, ...]],
    spans: Sequence[range], renormalize: bool,
) -> Iterable[torch.Tensor]:
    """The last row for every set of keys, window by window.

    Where only the last position is a query, that one token goes through the blocks, for all windows
    and sets in one batch: a window joins at its first block.
    """
    length, last = resumable.length, resumable.length - 1
    if set(queries) != {last} or resumable.earliest(last) != last:
        for span in spans:
            yield _cut(resumable, length, queries, places, span, renormalize)
        return
    cut = torch.zeros((len(places), 1, length), dtype=torch.bool)
    for number, keys in enumerate(places):
        cut[number, 0, list(keys)] = True

    def edges(layer: int, variants: list[int]) -> Optional[torch.Tensor]:
        inside = torch.tensor([layer in spans[one // len(places)] for one in variants])
        here = cut[[one % len(places) for one in variants]]
        return here & inside[:, None, None] if bool(inside.any()) else None

    starts = [span.start for span in spans for _ in places]
    change: dict[str, Any] = {"blocked" if renormalize else "zeroed": edges}
    found = replay_last(resumable, starts, **change)
    yield from found.float().split(len(places))


def _cut(
    resumable: Resumable, length: int, queries: tuple[int, ...], places: Sequence[tuple[int, ...]],
    span: range, renormalize: bool,
) -> torch.Tensor:
    """The last row with the edges of one window cut, for every set of keys."""
    first = resumable.earliest(min(queries))
    rows = torch.arange(first, length).expand(len(places), -1)
    from_, cut = torch.zeros(length, dtype=torch.bool), torch.zeros(
        (len(places), 1, length - first, length), dtype=torch.bool)
    from_[list(queries)] = True
    for number, keys in enumerate(places):
        cut[number, 0, :, list(keys)] = from_[first:, None]
    change: dict[str, Any] = {
        "blocked" if renormalize else "zeroed": lambda layer: cut if layer in span else None}
    return resumable.replay(span.start, rows, context=torch.arange(first), **change).float()


def single_layer(
    weights: Float[Tensor, "head key"], values: Float[Tensor, "head key d_head"],
    keys: Sequence[SupportsIndex],
) -> tuple[Float[Tensor, "head d_head"], Float[Tensor, "head d_head"]]:
    """What heads put out when a row loses some keys: renormalized, and with the weights at zero.

    Example:
        >>> weights = torch.tensor([[0.5, 0.25, 0.25]])
        >>> values = torch.tensor([[[1.0], [2.0], [4.0]]])
        >>> single_layer(weights, values, [0])
        (tensor([[3.]]), tensor([[1.5000]]))

    With mass m and output o_B on the keys B, the row's output o becomes o - o_B with the weights at
    zero and (o - o_B) / (1 - m) when the rest is renormalized: both follow from one pass, exactly, for
    one layer (the first of a window), also where a learned sink logit takes a part of the row. A head
    with all of its mass on the keys has no renormalized output: NaN.

    Args:
        values: of the keys, for query heads (grouped ones repeated).

    Source: algebra of the softmax (flow.md, E7).
    """
    chosen = [int(key) for key in keys]
    lost = torch.einsum("hk,hkd->hd", weights[:, chosen], values[:, chosen])
    zeroed = torch.einsum("hk,hkd->hd", weights, values) - lost
    left = 1 - weights[:, chosen].sum(1, keepdim=True)
    return torch.where(left > 1e-6, zeroed / left, torch.nan), zeroed


def random_keys(
    prompt: Prompt, like: Where, *, seed: SupportsIndex, among: Where = "all",
    exclude: Sequence[Where] = ("last",),
) -> tuple[int, ...]:
    """As many random positions as `like` has, none of them in it or in `exclude`: the control.

    Example:
        >>> prompt = Prompt.from_tokens(range(8), {"subject": (1, 3)})
        >>> len(set(random_keys(prompt, "subject", seed=0)) & {1, 2, 7})
        0
    """
    chosen = set(prompt.positions(like))
    out = chosen.union(*(prompt.positions(where) for where in exclude))
    free = [p for p in prompt.positions(among) if p not in out]
    if len(free) < len(chosen):
        raise OutOfRange(
            f"{len(chosen)} random positions are needed, but only {len(free)} are left; exclude "
            "fewer, or draw from more."
        )
    drawn = np.random.default_rng(int(seed)).choice(len(free), len(chosen), replace=False)
    return tuple(sorted(free[i] for i in drawn))


@style()
def draw(found: Result, ax: Axes) -> Axes:
    """Mean relative change and its band by the window's center, one line per set of keys."""
    values = found["relative"].dropna("prompt", how="all")
    curves = {str(name): values.sel(segment=name, drop=True) for name in values["segment"].values}
    layer_curve.draw(
        ax, curves, label="change of probability (%)", legend=False,
        x=f"center of the window of {found.manifest['width']} layers",
        roles={name: name for name in ("image", "question") if name in curves})
    ax.axhline(0, color=color("control"), linewidth=0.8)
    ax.legend()
    return ax
