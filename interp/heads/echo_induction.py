"""Echo and induction heads: on repeated random tokens, who looks at copies, who at what follows?

Paper     arXiv:2407.15891 (RazorAttention): these heads must keep their whole cache
Question  Which heads find earlier copies of a token (echo), or the token after them (induction)?
Measure   attention at the offsets K, 2K, ... and K - 1, 2K - 1, ... of K tokens said several times,
          summed over copies, averaged over the queries that have a copy
Cause     cut far keys from the chosen heads, or from as many others (`interp.heads.compensation`)

"Echo" is TransformerLens' duplicate_token_head, "induction" its induction_head.
"""

import math
from collections.abc import Sequence
from typing import Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Head, HeadScores, Prompt, Result
from interp.core.errors import NumericalError, PromptError
from interp.figures.style import GRAY, color
from interp.models.model import Model
from interp.prompts.repeated import ORDINALS, repeated
from interp.stream.copies import Copies

KINDS = ("echo", "induction", "previous")
PROBE = 2500
"""Tokens per copy, of four copies, where the context has room (released code of the paper)."""


def offsets(length: SupportsIndex, copies: SupportsIndex, start: SupportsIndex) -> dict[int, int]:
    """Every offset that is measured, and the first query for which it means something.

    Example:
        >>> offsets(5, 3, 1)
        {-5: 6, -10: 11, -4: 6, -9: 11, -1: 2}

    `start` is the position of the first copy. The first queries with a copy are those of the
    second one; the offset -1 is the token before.
    """
    k, n, s = int(length), int(copies), int(start)
    found = {-j * k: s + j * k for j in range(1, n)}
    for j in range(1, n):
        # With one or two tokens per copy the bands would fall together.
        found.setdefault(1 - j * k, s + j * k)
    found.setdefault(-1, s + 1)
    return found


def score(
    attention: Float[Tensor | np.ndarray, "*batch head query key"],
    length: SupportsIndex,
    copies: SupportsIndex,
    start: SupportsIndex = 0,
) -> dict[str, Float[Tensor, "*batch head"]]:
    """Echo, induction and previous-token scores from whole attention maps.

    Example:
        >>> rows = torch.zeros(1, 6, 6)  # a b c a b c: the head looks at what follows the copy
        >>> rows[0, range(6), [0, 0, 0, 1, 2, 3]] = 1.0
        >>> {name: round(float(value), 3) for name, value in score(rows, 3, 2).items()}
        {'echo': 0.0, 'induction': 1.0, 'previous': 0.2}

    Args:
        length: tokens per copy, at least 3, all different.
        copies: how many there are.
        start: position of the first copy (1 after a BOS token).

    The sum over all earlier copies, averaged over the queries from the second copy on;
    "previous" over all queries after the first.

    Raises:
        ValueError: fewer than 3 tokens or 2 copies, or a map of another size.
        NumericalError: NaN in the attention.
    """
    rows = torch.as_tensor(attention)
    k, n, s = int(length), int(copies), int(start)
    _check(k, n)
    if rows.shape[-1] != s + k * n or rows.shape[-2] != rows.shape[-1]:
        raise ValueError(
            f"attention has the shape {tuple(rows.shape)}; {n} copies of {k} tokens from position "
            f"{s} need {s + k * n} queries and keys."
        )
    if not torch.isfinite(rows).all():
        raise NumericalError("attention contains NaN or infinity; recompute it in float32.")
    sums = {offset: rows.diagonal(offset, -2, -1)[..., first + offset :].sum(-1)
            for offset, first in offsets(k, n, s).items()}
    return {name: sum(sums[o] for o in bands) / count  # type: ignore[misc]
            for name, (bands, count) in _bands(k, n).items()}


def probe(
    model: Model,
    rng: np.random.Generator,
    length: Optional[SupportsIndex] = None,
    copies: SupportsIndex = 4,
) -> Prompt:
    """Random different tokens said `copies` times, after the token that opens every text.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> len(probe(model, np.random.default_rng(0), 20, 3))
        61

    Args:
        length: tokens per copy; 2500 if None, less where context or vocabulary are smaller.

    Special tokens are never drawn.
    """
    bos, special = None, set()
    if model.tokenizer is not None:
        special = set(getattr(model.tokenizer, "all_special_ids", []) or [])
        if model.first_token_is_bos:
            bos = int(model.tokenizer("a")["input_ids"][0])
    # A vocabulary may be padded beyond the tokenizer's words.
    d_vocab = model.d_vocab if model.tokenizer is None else min(model.d_vocab, len(model.tokenizer))
    if length is None:
        room = (model.max_positions or 4 * PROBE + 1) - 1
        length = min(PROBE, room // int(copies), d_vocab - len((special | {bos}) - {None}))
    return repeated(rng, d_vocab, int(length), int(copies), bos, special)


def shuffled(prompt: Prompt, rng: np.random.Generator) -> Prompt:
    """The matched control: every later copy holds the same tokens in an order of its own.

    Example:
        >>> from interp.prompts.repeated import repeated
        >>> one = repeated(np.random.default_rng(0), d_vocab=50, length=6)
        >>> other = shuffled(one, np.random.default_rng(1))
        >>> sorted(other.ids) == sorted(one.ids), other.ids == one.ids
        (True, False)
    """
    ids = list(prompt.ids)
    for segment in prompt.segments:
        if segment.name in ORDINALS[1:]:
            for place, token in zip(segment, rng.permutation([ids[p] for p in segment])):
                ids[place] = int(token)
    return Prompt(tuple(ids), prompt.segments)


def measure(
    model: Model, prompts: Sequence[Prompt], *, seed: SupportsIndex = 0,
    batch_size: SupportsIndex = 4,
) -> Result:
    """Echo, induction and previous-token scores of every head, and of a matched control.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> found = measure(model, [probe(model, np.random.default_rng(0), 20)])
        >>> found["induction"].dims, found["echo_samples"].dims
        (('layer', 'head'), ('sample', 'layer', 'head'))

    Args:
        prompts: of `probe` (or `interp.prompts.repeated.repeated`), all of one shape.
        seed: of the control, in which every copy has its own order.

    Returns:
        For each of "echo", "induction", "previous": NAME, NAME_frequency (share of samples above
        the control's mean), NAME_standard_error, NAME_null (the control) [layer, head],
        NAME_samples [sample, layer, head]; NAME_nearest, where only the nearest copy counts;
        `eligible` [layer, head]: the head sees the nearest copy of every query.

    Banded and streamed: no attention map is made.

    Source: arXiv:2407.15891 (2500 random tokens, four times).
    """
    length, copies, start = _shape(prompts)
    rng = np.random.default_rng(int(seed))
    both = [*prompts, *(shuffled(prompt, rng) for prompt in prompts)]
    run = model.run(both, stats=[Copies(offsets(length, copies, start))], logits="none",
                    batch_size=int(batch_size))
    found = run.stats["offsets"].transpose("prompt", "layer", "head", "offset", "quantity")
    mass = found.sel(quantity="mass").values
    index = {int(o): i for i, o in enumerate(found["offset"].values)}
    n = len(prompts)
    data = xr.Dataset(coords={"sample": np.arange(n), "layer": found["layer"].values,
                              "head": found["head"].values})
    for name, (bands, count) in _bands(length, copies).items():
        values = np.stack([mass[..., index[o]] for o in bands]).sum(0) / count
        own, control = values[:n], values[n:]
        each = ("layer", "head")
        data[f"{name}_samples"] = ("sample", *each), own
        data[name] = each, own.mean(0)
        data[f"{name}_null"] = each, control.mean(0)
        data[f"{name}_frequency"] = each, (own > control.mean(0)).mean(0)
        data[f"{name}_standard_error"] = each, (
            own.std(0, ddof=1) / np.sqrt(n) if n > 1 else np.full(own.shape[1:], np.nan))
        data[f"{name}_nearest"] = each, mass[:n, ..., index[bands[0]]].mean(0) / count
    seen = found.sel(quantity="count").values[:n, ..., index[-length]]
    data["eligible"] = ("layer", "head"), (seen >= (copies - 1) * length).all(0)
    return Result(data, {**model.manifest(), "measure": "echo_induction", "length": length,
                         "copies": copies, "n_prompts": n, "seed": int(seed),
                         "control": "the same tokens, every copy in an order of its own"})


def scores_of(found: Result, kind: str = "induction") -> HeadScores:
    """One of the three scores as `HeadScores`.

    Raises ValueError for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"there is no score {kind!r}; choose one of: {', '.join(KINDS)}.")
    return HeadScores(found[kind], found[f"{kind}_frequency"], found[f"{kind}_standard_error"],
                      found["eligible"])


def select(
    found: Result,
    echo: SupportsFloat = 0.01,
    induction: SupportsFloat = 0.14,
    n_kv_heads: Optional[SupportsIndex] = None,
) -> tuple[Head, ...]:
    """The top heads by echo together with the top heads by induction, over all layers.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> made = measure(model, [probe(model, np.random.default_rng(0), 20)])
        >>> len(select(made, echo=0, induction=0.125)), len(select(made, 0, 1 / 32, n_kv_heads=4))
        (4, 2)

    Args:
        echo, induction: shares of all heads, rounded up.
        n_kv_heads: where query heads share keys and values, a whole group is chosen if one of its
            members is (a cache can only be kept whole).

    Source: arXiv:2407.15891: 1 % by echo and 14 % by induction.
    """
    total = found["echo"].size
    chosen: set[Head] = set()
    for kind, share in (("echo", float(echo)), ("induction", float(induction))):
        if not 0 <= share <= 1:
            raise ValueError(f"a share of {share} heads by {kind}: give a number from 0 to 1.")
        chosen |= set(scores_of(found, kind).top(math.ceil(share * total - 1e-9)))
    if n_kv_heads is not None:
        group = found.data.sizes["head"] // int(n_kv_heads)
        chosen |= {Head(h.layer, h.head // group * group + i) for h in chosen
                   for i in range(group)}
    return tuple(sorted(chosen))


def alibi_scope(
    w_q: Float[Tensor | np.ndarray, "d_model d_head"],
    w_k: Float[Tensor | np.ndarray, "d_model d_head"],
    slope: SupportsFloat,
    gamma: Float[Tensor | np.ndarray, "d_model"],
    beta: Optional[Float[Tensor | np.ndarray, "d_model"]] = None,
    epsilon: SupportsFloat = 1e-3,
) -> float:
    """Distance beyond which an ALiBi head's weights stay below epsilon: no data needed.

    Example:
        >>> eye = torch.eye(4)
        >>> near, far = (alibi_scope(eye, eye, slope, torch.ones(4)) for slope in (0.5, 0.125))
        >>> far / near
        4.0

    L = (2 |W_Q W_K^T| (|gamma|^2 + |beta|^2) - log epsilon) / slope, with the spectral norm, and
    the affine parameters of the norm before attention (beta None for RMS norms).

    Source: arXiv:2407.15891 (second-hand).
    """
    product = torch.as_tensor(w_q).double() @ torch.as_tensor(w_k).double().T
    size = float(torch.as_tensor(gamma).double().square().sum())
    if beta is not None:
        size += float(torch.as_tensor(beta).double().square().sum())
    norm = float(torch.linalg.matrix_norm(product, 2))
    return (2 * norm * size - math.log(float(epsilon))) / float(slope)


def draw(found: Result, ax: Axes, chosen: Sequence[Head] = ()) -> Axes:
    """Echo against induction, one dot per head; chosen heads in color, the strongest named."""
    picked = {(h.layer, h.head) for h in chosen}
    echo, induction = found["echo"].values, found["induction"].values
    for layer, head in np.ndindex(echo.shape):
        mine = (layer, head) in picked
        ax.plot(echo[layer, head], induction[layer, head], "o", markersize=4, markeredgewidth=0,
                color=color("needle" if mine else "other"), alpha=0.9 if mine else 0.5,
                zorder=3 if mine else 2)
    reach = max(0.1, 1.08 * float(np.nanmax([echo, induction])))
    named = sorted((induction[p], echo[p], p) for p in picked
                    if max(induction[p], echo[p]) > 0.1 * reach)
    below = -1.0
    for y, x, (layer, head) in named[-8:]:
        # Names of heads with nearly equal scores are set one above the other.
        below = max(y, below + 0.06 * reach)
        ax.annotate(f"L{layer}H{head}", (x, y), (x + 0.12 * reach, below), fontsize=6, va="center",
                    arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": GRAY, "shrinkB": 0})
    ax.set_xlabel("echo: attention on earlier copies")
    ax.set_ylabel("induction: on the token after them")
    ax.set_xlim(-0.03 * reach, reach)
    ax.set_ylim(-0.03 * reach, reach)
    return ax


def _bands(k: int, n: int) -> dict[str, tuple[list[int], int]]:
    """Score -> its offsets, nearest first, and the number of queries it is averaged over."""
    later = (n - 1) * k
    return {"echo": ([-j * k for j in range(1, n)], later),
            "induction": ([1 - j * k for j in range(1, n)], later),
            "previous": ([-1], n * k - 1)}


def _check(length: int, copies: int) -> None:
    if length < 3 or copies < 2:
        raise ValueError(
            f"{copies} copies of {length} tokens cannot tell the scores apart; give at least 2 "
            "copies of 3 tokens."
        )


def _shape(prompts: Sequence[Prompt]) -> tuple[int, int, int]:
    """Tokens per copy, copies, and where the first one starts: the same in all prompts."""
    found = set()
    for number, prompt in enumerate(prompts):
        copies = [s for s in prompt.segments if s.name in ORDINALS]
        if len(copies) < 2 or len({len(s) for s in copies}) != 1:
            raise PromptError(
                f"prompt {number} has no copies of one length; make it with `probe`."
            )
        found.add((len(copies[0]), len(copies), copies[0].start))
    if len(found) != 1:
        raise PromptError(
            "prompts of one shape are needed" + (f", not {sorted(found)}" if found else
                                                 ": give at least one") + "."
        )
    (only,) = found
    _check(only[0], only[1])
    return only
