"""What the causal mask alone does to attention: nearer keys score higher, with no parameters.

Paper     arXiv:2509.21042
Question  How much of a score depends on where a key stands, beyond its distance to the query?
Measure   scores of parameter-free attention (a recursion of the Gram matrix, exact for wide states);
          in a model the mean score matrix less the mean of every diagonal, and how much of what is
          left goes with the key's position
Cause     the same without the mask; the same model untrained, with and without position encodings
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import NumericalError, OutOfRange, Prompt, PromptError, Result
from interp.core.statistics import Estimate, bootstrap
from interp.figures.style import DIVERGING, PALE, SEQUENTIAL, note, style
from interp.models.model import Model

LONGEST = 1024
"""Positions of the diagnostic at most: it keeps whole score matrices, averaged over heads."""

GROUPS = 16
"""Parts into which prompts are averaged: what the bootstrap resamples."""

HELD = 1 << 25
"""Scores of one prompt held at once, over heads and layers."""

Norm = Literal["unit", "layer_norm_d", "layer_norm_sqrt_d"]


def recursion(
    n: SupportsIndex,
    alpha: SupportsFloat = 0.0,
    n_layers: SupportsIndex = 4,
    *,
    causal: bool = True,
    gain: SupportsFloat = 1.0,
) -> Float[Tensor, "layer query key"]:
    """Scores of parameter-free causal attention in every layer, in the limit of wide states.

    Example:
        >>> recursion(3, n_layers=2)[1, 2]
        tensor([0.1321, 0.1508, 1.0000], dtype=torch.float64)

    Only the inner products of the states matter: `G = alpha J + (1 - alpha) I` for inputs with mean
    cosine alpha, `S = D^-1/2 G D^-1/2` with the diagonal D of G, `A` its softmax over the keys up to
    the query, and `G` of the next layer `M G M'` with `M = gain A D^-1/2 + I`.

    Args:
        n: positions. n_layers: layer 0 scores the inputs.
        causal: False lets every query see every key, the control.
        gain: the norm of normalized states: 1 for unit vectors, sqrt(d_model) for LayerNorm with
            scores divided by d_model.

    Raises:
        ValueError: fewer than two positions, no layer, or alpha outside [0, 1).

    Source: derived from arXiv:2509.21042, where unit vectors take the place of queries and keys.
    """
    n, layers, alpha = int(n), int(n_layers), float(alpha)
    _check(n, layers, alpha)
    gram = torch.full((n, n), alpha, dtype=torch.float64)
    gram.fill_diagonal_(1.0)
    eye = torch.eye(n, dtype=torch.float64)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1) & causal
    found = []
    for _ in range(layers):
        size = gram.diagonal().rsqrt()
        found.append(gram * size[:, None] * size)
        attention = found[-1].masked_fill(hidden, float("-inf")).softmax(-1)
        step = float(gain) * attention * size + eye
        gram = step @ gram @ step.T
    return torch.stack(found)


def second_layer(n: SupportsIndex) -> Float[Tensor, "query key"]:
    """The second layer's scores of uncorrelated inputs in closed form, for keys up to the query.

    Example:
        >>> second_layer(3)[1:, 0]
        tensor([0.1535, 0.1321], dtype=torch.float64)

    `S_ij = 2 a_i / (n_i n_j)` for j < i, with `a_i = 1 / (e + i - 1)` and
    `n_i^2 = (1 + e a_i)^2 + (i - 1) a_i^2`, counting from 1; it grows with j because n_j falls.
    Zero above the diagonal.
    """
    n = int(n)
    _check(n, 1, 0.0)
    place = torch.arange(1, n + 1, dtype=torch.float64)
    a = 1 / (torch.e + place - 1)
    size = ((1 + torch.e * a) ** 2 + (place - 1) * a**2).sqrt()
    below = (2 * a[:, None] / (size[:, None] * size)).tril(-1)
    return below + torch.eye(n, dtype=torch.float64)


def simulate(
    n: SupportsIndex,
    alpha: SupportsFloat = 0.0,
    n_layers: SupportsIndex = 4,
    *,
    d_model: SupportsIndex = 64,
    samples: SupportsIndex = 1000,
    norm: Norm = "unit",
    causal: bool = True,
    seed: SupportsIndex = 0,
    batch_size: SupportsIndex = 250,
) -> tuple[Float[Tensor, "layer query key"], Float[Tensor, "layer query key"]]:
    """Mean scores of parameter-free attention over random inputs, and their standard errors.

    Example:
        >>> mean, error = simulate(5, n_layers=2, samples=200)
        >>> mean.shape, bool(error.max() < 0.02)
        (torch.Size([2, 5, 5]), True)

    Inputs are unit vectors with a common component of which every sample has its own, so that the
    mean cosine is alpha (the paper: 100,000 samples, 50 positions, 64 dimensions).

    Args:
        norm: "unit" vectors and plain inner products; "layer_norm_d" and "layer_norm_sqrt_d" take
            LayerNorm without parameters and divide scores by d_model or by its root.

    Source: arXiv:2509.21042.
    """
    n, layers, alpha = int(n), int(n_layers), float(alpha)
    width, count = int(d_model), int(samples)
    _check(n, layers, alpha)
    if norm not in ("unit", "layer_norm_d", "layer_norm_sqrt_d"):
        raise ValueError(f"norm {norm!r} is none of: unit, layer_norm_d, layer_norm_sqrt_d.")
    if count < 2:
        raise ValueError("a standard error needs at least two samples.")
    rng = torch.Generator().manual_seed(int(seed))
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1) & causal
    scale = {"unit": 1.0, "layer_norm_d": 1 / width, "layer_norm_sqrt_d": width**-0.5}[norm]
    total = torch.zeros(2, layers, n, n, dtype=torch.float64)
    for start in range(0, count, int(batch_size)):
        size = min(int(batch_size), count - start)
        x = torch.randn(size, n, width, generator=rng)
        common = torch.randn(size, 1, width, generator=rng)
        x = torch.nn.functional.normalize(x + (alpha / (1 - alpha)) ** 0.5 * common, dim=-1)
        for layer in range(layers):
            h = torch.nn.functional.normalize(x, dim=-1) if norm == "unit" else \
                torch.nn.functional.layer_norm(x, (width,), eps=0.0)
            scores = h @ h.transpose(1, 2) * scale
            total[0, layer] += scores.double().sum(0)
            total[1, layer] += scores.double().square().sum(0)
            x = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ h + x
    mean = total[0] / count
    spread = (total[1] / count - mean.square()).clamp_min(0)
    return mean, (spread / (count - 1)).sqrt()


def monotone_rows(
    scores: Float[Tensor | np.ndarray, "query key"], tolerance: SupportsFloat = 1e-9
) -> float:
    """Share of rows whose scores never fall from one key to the next, of rows with two or more.

    Example:
        >>> monotone_rows(second_layer(20))
        1.0

    Only keys before the query count; a fall of up to `tolerance` is none.
    """
    matrix = torch.as_tensor(scores).double()
    rows = [bool((matrix[i, 1:i] - matrix[i, : i - 1] >= -float(tolerance)).all())
            for i in range(2, len(matrix))]
    if not rows:
        raise ValueError("no row has two keys before its query: give at least three positions.")
    return float(np.mean(rows))


# -- a model's scores -----------------------------------------------------------------------------


def residual(
    scores: Float[Tensor | np.ndarray, "query key"], *, exclude_first: bool = True,
    causal: bool = True,
) -> tuple[Float[np.ndarray, "query key"], Bool[np.ndarray, "query key"]]:
    """Scores less the mean of their diagonal, and the entries that count.

    Example:
        >>> left, used = residual(np.subtract.outer(np.arange(5.0), np.arange(5.0)))
        >>> bool((left[used] == 0).all()), int(used.sum())
        (True, 9)

    What depends on the distance alone is gone. Entries that count: finite ones at or below the
    diagonal (everywhere if not `causal`), without the first key, which is a sink in most models;
    diagonals with one entry say nothing and do not count. The rest of the matrix is 0.
    """
    matrix = np.asarray(torch.as_tensor(scores).double())
    n = len(matrix)
    used = np.isfinite(matrix)
    if causal:
        used &= np.tri(n, dtype=bool)
    if exclude_first:
        used[:, 0] = False
    offset = (np.arange(n)[:, None] - np.arange(n) + n - 1)
    count = np.bincount(offset[used], minlength=2 * n - 1)
    used &= count[offset] > 1
    if not used.any():
        raise NumericalError("no diagonal has two scores: the prompts are too short.")
    return _centered(np.where(used, matrix, 0.0), used), used


def _centered(values: np.ndarray, used: np.ndarray) -> np.ndarray:
    """Values less the mean of their diagonal over the entries that count; 0 elsewhere."""
    n = len(used)
    offset = (np.arange(n)[:, None] - np.arange(n) + n - 1)
    count = np.maximum(np.bincount(offset[used], minlength=2 * n - 1), 1)
    mean = np.bincount(offset[used], values[used], minlength=2 * n - 1) / count
    return np.where(used, values - mean[offset], 0.0)


def non_relative(
    scores: Float[Tensor | np.ndarray, "query key"], *, exclude_first: bool = True,
    causal: bool = True,
) -> float:
    """NR: the part of the residual scores' variance that goes with the key's position, 0 to 1.

    Example:
        >>> key = np.broadcast_to(np.arange(9.0), (9, 9))
        >>> round(non_relative(key - key.T * 3), 9)
        1.0

    R^2 of the residual matrix (`residual`) on the key's position, within diagonals. 0 where the
    scores depend on the distance alone.

    Source: arXiv:2509.21042 for the residual; the R^2 is this toolkit's.
    """
    matrix = np.asarray(torch.as_tensor(scores).double())
    left, used = residual(matrix, exclude_first=exclude_first, causal=causal)
    x = _centered(np.where(used, np.arange(len(used), dtype=float), 0.0), used)
    size = float((left**2).sum() * (x**2).sum())
    # Rounding is no residual.
    if size <= 0 or np.abs(left).max() <= 1e-12 * max(1.0, np.abs(matrix[used]).max()):
        return 0.0
    return float((left * x).sum() ** 2 / size)


def measure(
    model: Model,
    prompts: Union[Prompt, Sequence[Prompt]],
    layers: Optional[Iterable[SupportsIndex]] = None,
    *,
    exclude_first: bool = True,
    permutations: SupportsIndex = 100,
    seed: SupportsIndex = 0,
) -> Result:
    """The mean score matrix of the first layers, and how much of it is neither distance nor chance.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> found = measure(model, [Prompt.from_tokens([0, *range(i, i + 9)]) for i in (3, 9)])
        >>> found["scores"].dims, found["non_relative"].dims
        (('layer', 'query', 'key'), ('layer',))

    Args:
        prompts: of one length, of at most `LONGEST` tokens: whole matrices are kept (averaged over
            heads and prompts).
        layers: the first four for None, as in the paper.
        exclude_first: leave out the first key; `with_first` has the other value.
        permutations: of the key positions, all diagonals alike, for the null: entries of one column
            share a token, so permuting single entries would call its chance a finding.

    Returns:
        [layer, query, key]: `scores`, `residual`; [layer]: `non_relative` (NR), `with_first`,
        `slope` (score per position), `share` (of the variance of the scores that is not relative),
        `repeated` (share of the residual's square that other prompts repeat: 0 where only the tokens
        make it, whatever its form; NaN for one group);
        [layer, sample]: `null`; [layer, group] `projection` and [layer, group, other_group] `product`
        of the residuals, from which `interval` resamples.

    Raises:
        PromptError: prompts of different length, too long, or too short.

    Source: arXiv:2509.21042; the mean of products cannot be had from mean queries and keys.
    """
    given = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    n = _length(given)
    chosen = list(range(min(4, model.n_layers))) if layers is None else sorted(map(int, layers))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < model.n_layers:
        raise OutOfRange(f"layers run from 0 to {model.n_layers - 1} in {model.name}.")
    groups, causal = min(GROUPS, len(given)), model.kind == "decoder"
    totals = np.zeros((len(chosen), groups, n, n))
    # As many layers at once as stay small.
    step = max(1, HELD // (model.n_heads * n * n))
    for number, prompt in enumerate(given):
        for first in range(0, len(chosen), step):
            part = chosen[first : first + step]
            reads = model.run(prompt, read=[f"scores.{x}" for x in part], logits="none").reads
            for at, layer in enumerate(part, first):
                totals[at, number % groups] += reads[f"scores.{layer}"].values[0, 0].mean(0)
    sizes = np.bincount(np.arange(len(given)) % groups)
    rng = np.random.default_rng(int(seed))
    rows = []
    for total in totals:
        mean = total.sum(0) / len(given)
        left, used = residual(mean, exclude_first=exclude_first, causal=causal)
        x = _centered(np.where(used, np.arange(n, dtype=float), 0.0), used)
        each = np.stack([_centered(np.where(used, part / size, 0.0), used)
                         for part, size in zip(total, sizes)])
        null = []
        for _ in range(int(permutations)):
            label = np.where(used, rng.permutation(n).astype(float), 0.0)
            null.append(_squared(left, _centered(label, used)))
        seen = mean[used]
        rows.append({
            "scores": np.where(np.isfinite(mean), mean, np.nan),
            "residual": np.where(used, left, np.nan),
            "non_relative": non_relative(mean, exclude_first=exclude_first, causal=causal),
            "with_first": non_relative(mean, exclude_first=not exclude_first, causal=causal),
            "repeated": 0.0,
            "slope": float((left * x).sum() / (x**2).sum()),
            "share": float((left**2).sum() / max(((seen - seen.mean()) ** 2).sum(), 1e-30)),
            "null": np.array(null), "projection": (each * x).sum((1, 2)) / np.sqrt((x**2).sum()),
            "product": np.einsum("gqk,hqk->gh", each, each),
        })
        rows[-1]["repeated"] = _repeated(rows[-1]["product"], np.arange(groups))
    dims = {"scores": ("query", "key"), "residual": ("query", "key"), "null": ("sample",),
            "projection": ("group",), "product": ("group", "other_group")}
    data = xr.Dataset({name: (("layer", *dims.get(name, ())), np.stack([row[name] for row in rows]))
                       for name in rows[0]}, {"layer": chosen})
    return Result(data, {
        **model.manifest(), "measure": "non-relative scores", "exclude_first": exclude_first,
        "causal": causal, "prompts": [prompt.digest() for prompt in given],
    })


def interval(
    found: Result, layer: SupportsIndex, what: Literal["non_relative", "repeated"] = "non_relative",
    resamples: int = 1000,
) -> Estimate:
    """NR of a layer, or the repeated share, with its bootstrap interval over groups of prompts."""
    one = found.data.sel(layer=int(layer))
    projection, product = one["projection"].values, one["product"].values

    def share(drawn: np.ndarray) -> float:
        rows = drawn.astype(int)
        if what == "repeated":
            return _repeated(product, rows)
        size = product[np.ix_(rows, rows)].sum()
        return float(projection[rows].sum() ** 2 / size) if size > 0 else float("nan")

    name = {"non_relative": "R2 of the residual scores on the key's position",
            "repeated": "share of the residual scores that repeats in other prompts"}[what]
    return bootstrap(share, np.arange(len(projection)), resamples=resamples, name=name)


def _repeated(product: np.ndarray, rows: np.ndarray) -> float:
    """Mean product of the residuals of two different groups, by the mean square of their mean."""
    chosen = product[np.ix_(rows, rows)]
    other = rows[:, None] != rows
    if not other.any():
        return float("nan")
    # A group drawn twice is no second sample: the mean's square is put together from its parts.
    common, own = chosen[other].mean(), chosen.diagonal().mean()
    total = common + (own - common) / len(product)
    return float(common / total) if total > 0 else float("nan")


@style()
def draw_matrix(
    matrix: Float[np.ndarray, "query key"], ax: Axes, *, label: str = "", signed: bool = False
) -> Axes:
    """A score matrix, gray where it has no value (NaN).

    Of a signed one a few extreme cells do not set the colors: those end at the 99.5 % quantile.
    """
    # Half of it is hidden by the mask: thousands of hatched cells would say no more than gray does.
    shown = np.ma.masked_invalid(matrix)
    sizes = np.append(np.abs(shown.compressed()), 0.0)
    reach = float(np.quantile(sizes, 0.995) or sizes.max()) or 1.0
    beyond = signed and float(sizes.max()) > reach
    limits: dict[str, Any] = {"vmin": -reach, "vmax": reach, "cmap": DIVERGING} if signed else {
        "cmap": SEQUENTIAL}
    image = ax.imshow(shown, interpolation="nearest", aspect="auto", **limits)
    ax.set_facecolor(PALE)
    marks = sorted({0, len(matrix) // 2, len(matrix) - 1})
    ax.set_xticks(marks, [str(mark) for mark in marks])
    ax.set_yticks(marks, [str(mark) for mark in marks])
    ax.set_xlabel("key")
    ax.set_ylabel("query")
    ax.figure.colorbar(image, ax=ax, label=label, pad=0.02, extend="both" if beyond else "neither")
    return ax


def draw(found: Result, ax: Axes, layer: SupportsIndex) -> Axes:
    """The scores of one layer less the mean of every diagonal; gray where they do not count."""
    one = found.data.sel(layer=int(layer))
    draw_matrix(one["residual"].values, ax, label="score less diagonal mean", signed=True)
    note(ax, f"R² on the key's position: {float(one['non_relative']):.2f}")
    return ax


def _squared(a: np.ndarray, b: np.ndarray) -> float:
    size = float((a**2).sum() * (b**2).sum())
    return float((a * b).sum() ** 2 / size) if size > 0 else 0.0


def _check(n: int, layers: int, alpha: float) -> None:
    if n < 2 or layers < 1 or not 0 <= alpha < 1:
        raise ValueError(f"{n} positions, {layers} layers and a mean cosine of {alpha} are not "
                         "possible: give at least 2 positions, 1 layer, and alpha in [0, 1).")


def _length(given: Sequence[Prompt]) -> int:
    if not given:
        raise PromptError("no prompts to run: give at least one.")
    sizes = sorted({len(prompt) for prompt in given})
    if len(sizes) > 1:
        raise PromptError(f"prompts of {sizes[0]} to {sizes[-1]} tokens: mean scores need one length.")
    if not 4 <= sizes[0] <= LONGEST:
        raise PromptError(
            f"prompts of {sizes[0]} tokens: mean score matrices need 4 to {LONGEST} tokens."
        )
    return sizes[0]
