"""Geometry: the tokens of one text as a cloud of points, layer by layer.

Paper     arXiv:2501.10573; estimators TwoNN (Facco et al. 2017) and Gride (Denti et al. 2022)
Question  How many dimensions does the cloud fill, and do its neighborhoods survive a block?
Measure   intrinsic dimension, overlap of nearest neighbors between layers, mean cosine, anisotropy
Cause     the same text with its blocks of tokens in random order
"""

import importlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.axes import Axes

from interp.core import Prompt, PromptError, Result, UndertowError
from interp.figures import layer_curve
from interp.figures.style import style
from probes.block_shuffle import reordered, shuffled_blocks
from probes.token_loss import content_places, losses_of

SAME = 1e-6
"""Points nearer than this share of the cloud's size are copies of one point: one of them is kept."""


@dataclass(frozen=True)
class Dimension:
    """An estimate of the intrinsic dimension: `value` is NaN where `reason` says why.

    `kept` is the share of the points that are no copies of another one, `n` how many these are.
    """

    value: float
    kept: float
    n: int
    reason: str = ""


def two_nn(
    X: Float[np.ndarray, "sample feature"], *, method: Literal["mle", "linear"] = "mle",
    discard: SupportsFloat = 0.0,
) -> Dimension:
    """Intrinsic dimension from the ratio of the two nearest distances of every point.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> plane = rng.standard_normal((400, 2)) @ rng.standard_normal((2, 10))
        >>> round(two_nn(plane).value)
        2

    Args:
        method: "mle" is (N - 1) / sum log(r2 / r1); "linear" fits the distribution of the ratios.
        discard: share of the largest ratios to leave out. arXiv:2502.15007 uses
            `method="linear", discard=0.8`, which spreads more.

    Copies of a point (equal tokens in the embeddings) have no ratio: one of them is kept. The
    estimate depends on the number of points and falls short in high dimensions: compare clouds of
    equal size only.

    Source: Facco et al. (2017), through scikit-dimension.
    """
    X, kept = _distinct(_checked(X))
    if len(X) < 3:
        return Dimension(np.nan, kept, len(X), f"{len(X)} different points: at least three needed")
    return _from_nearest(neighbors(X, 2)[0], kept, method, float(discard))


def gride(
    X: Float[np.ndarray, "sample feature"], n1: SupportsIndex = 1, n2: Optional[SupportsIndex] = None
) -> Dimension:
    """Intrinsic dimension from the distances to neighbors number n1 and n2 (2 n1 for None).

    Example:
        >>> line = np.sort(np.random.default_rng(0).random(200))[:, None] * np.ones((1, 6))
        >>> round(gride(line, 4).value)
        1

    A larger n1 looks at a larger scale; (1, 2) is `two_nn`. Source: Denti et al. (2022), through
    scikit-dimension.
    """
    X, kept = _distinct(_checked(X))
    near, far = int(n1), 2 * int(n1) if n2 is None else int(n2)
    if not 1 <= near < far:
        raise ValueError(f"neighbors number {near} and {far}: the second must be the farther one.")
    if len(X) < far + 1:
        return Dimension(np.nan, kept, len(X),
                         f"{len(X)} different points for neighbor number {far}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ties are few, and no reason for a line per cloud
        try:
            found = _skdim().GRIDE(n1=near, n2=far).fit(X)
        except (ValueError, IndexError):
            return Dimension(np.nan, kept, len(X), "the neighbors are all equally far")
    return Dimension(float(found.dimension_), kept, len(X))


def gride_scales(
    X: Float[np.ndarray, "sample feature"], scales: Sequence[SupportsIndex]
) -> Float[np.ndarray, "scale"]:
    """`gride` at several n1, from one search for neighbors where these are powers of two.

    Example:
        >>> cloud = np.random.default_rng(0).standard_normal((100, 3))
        >>> bool(np.allclose(gride_scales(cloud, [1, 8]), [gride(cloud, n).value for n in (1, 8)]))
        True

    NaN for scales with too few points.
    """
    asked = [int(n1) for n1 in scales]
    unique, _ = _distinct(_checked(X))
    made = np.full(len(asked), np.nan)
    fitting = [n1 for n1 in asked if 2 * n1 < len(unique)]
    if not fitting or any(n1 < 1 or n1 & (n1 - 1) for n1 in asked):
        return np.array([gride(unique, n1).value for n1 in asked])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = _skdim().GRIDE(multiscale=True, range_max=max(2, 2 * max(fitting))).fit(unique)
        except (ValueError, IndexError):
            return np.array([gride(unique, n1).value for n1 in asked])
    for n1, value in zip(found.scales_, found.dimension_scales_):
        if int(n1) in asked:
            made[asked.index(int(n1))] = value
    return made


def neighbors(
    X: Float[np.ndarray, "sample feature"], k: SupportsIndex, device: Optional[str] = None
) -> tuple[Float[np.ndarray, "sample neighbor"], Int[np.ndarray, "sample neighbor"]]:
    """Distances to and numbers of the k nearest other points, nearest first.

    Example:
        >>> neighbors(np.array([[0.0], [1.0], [3.0]]), 1)[1].ravel().tolist()
        [1, 0, 1]
    """
    x = torch.as_tensor(np.asarray(X, dtype=np.float64), device=device)
    if not 1 <= int(k) < len(x):
        raise ValueError(f"{int(k)} neighbors among {len(x)} points: at most {len(x) - 1}.")
    x = x - x.mean(0)
    square = (x * x).sum(1)
    far = (square[:, None] + square[None] - 2 * x @ x.T).clamp_min_(0)
    far.fill_diagonal_(float("inf"))
    nearest = far.topk(int(k), largest=False)
    return nearest.values.sqrt().cpu().numpy(), nearest.indices.cpu().numpy()


def overlap(
    A: Float[np.ndarray, "sample feature"], B: Float[np.ndarray, "sample other"],
    k: SupportsIndex = 30,
) -> float:
    """Neighborhood overlap: the share of a point's k nearest others that two clouds agree on.

    Example:
        >>> A = np.random.default_rng(0).standard_normal((50, 4))
        >>> overlap(A, 3 * A[:, ::-1], k=5)
        1.0

    Independent clouds share k / (n - 1). Copies of a point are equally near, and which of them count
    is then chance. `k` is DADApy's default; the paper's is not known here.

    Source: arXiv:2501.10573.
    """
    if len(A) != len(B):
        raise ValueError(f"clouds of {len(A)} and {len(B)} points: give the same points of both.")
    return _shared(neighbors(A, k)[1], neighbors(B, k)[1])


def mean_cosine(X: Float[np.ndarray, "sample feature"], *, centered: bool = False) -> float:
    """The mean cosine of all pairs of points; after the cloud's mean is taken away if `centered`.

    Example:
        >>> round(mean_cosine(np.eye(3) + 1), 3), round(mean_cosine(np.eye(3) + 1, centered=True), 3)
        (0.833, -0.5)

    NaN with fewer than two points that are not zero. Centered, unrelated points give -1 / (n - 1).
    """
    x = np.asarray(X, dtype=np.float64)
    x = x - x.mean(0) if centered else x
    length = np.linalg.norm(x, axis=1)
    unit = x[length > 0] / length[length > 0, None]
    n = len(unit)
    return float(((unit.sum(0) ** 2).sum() - n) / (n * (n - 1))) if n > 1 else float("nan")


def anisotropy(X: Float[np.ndarray, "sample feature"]) -> float:
    """The share of the cloud's variance along its longest axis: 1 on a line, 1/d in a ball.

    Example:
        >>> anisotropy(np.array([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]))
        1.0

    Source: arXiv:2502.15007, released code (not the mean cosine).
    """
    x = np.asarray(X, dtype=np.float64)
    x = x - x.mean(0)
    # The smaller of the two Gram matrices has the same eigenvalues.
    gram = x @ x.T if len(x) < x.shape[1] else x.T @ x
    total = float(np.trace(gram))
    return float(min(1.0, np.linalg.eigvalsh(gram)[-1] / total)) if total > 0 else float("nan")


def measure(
    model: Any,
    prompts: Sequence[Prompt],
    *,
    levels: Sequence[SupportsIndex] = (0,),
    k: SupportsIndex = 30,
    scales: Sequence[SupportsIndex] = (),
    batch_size: SupportsIndex = 4,
    seed: SupportsIndex = 0,
    device: Optional[str] = None,
) -> Result:
    """Geometry of every text in every layer, as it is and with its blocks of tokens shuffled.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompts = [Prompt.from_tokens(range(i, i + 20)) for i in range(3, 5)]
        >>> found = measure(model, prompts, levels=(0, 2), k=4)
        >>> found["dimension"].dims, found["layer"].values.tolist()
        (('prompt', 'level', 'layer'), [-1, 0])

    The first position and the model's special tokens are left out, and stay where they are when
    blocks are shuffled: states of massive norm there would decide cosine and neighbors.

    Args:
        levels: shuffle levels, see `shuffled_blocks`.
        k: neighbors of the overlap, at most half of the shortest text.
        scales: n1 of `gride`, for the texts as they are.

    Returns:
        [prompt, level, layer]: `dimension` (TwoNN), `kept`, `overlap` (with the next layer), `cosine`,
        `cosine_centered`, `cosine_with_first`; `scale_dimension` [prompt, layer, scale];
        `loss` [prompt, level] in nats per token (NaN without a causal vocabulary head); `distinct`,
        `type_token_ratio` and `log_frequency` [prompt]. Layer -1 is what enters block 0.

    Raises:
        PromptError: texts with fewer than four tokens besides, or with pictures.

    Source: arXiv:2501.10573.
    """
    texts, places = list(prompts), [content_places(model, p) for p in prompts]
    if min(map(len, places), default=0) < 4 or any(p.images for p in texts):
        raise PromptError("the geometry needs texts without pictures, of at least four tokens beside "
                          "the special ones.")
    k = min(int(k), min(map(len, places)) // 2)
    rng, levels = np.random.default_rng(int(seed)), [int(level) for level in levels]
    names = ("dimension", "kept", "overlap", "cosine", "cosine_centered", "cosine_with_first")
    shape = (len(texts), len(levels), model.n_layers + 1)
    made = {name: np.full(shape, np.nan) for name in names}
    loss = np.full(shape[:2], np.nan)
    scaled = np.full((len(texts), shape[2], len(scales)), np.nan)
    reasons: dict[str, int] = {}
    for j, level in enumerate(levels):
        variants = [reordered(p, at, shuffled_blocks(len(at), level, rng))
                    for p, at in zip(texts, places)]
        for start in range(0, len(texts), int(batch_size)):
            part = range(start, min(start + int(batch_size), len(texts)))
            some = [variants[i] for i in part]
            run = model.run(some, read=("resid_pre.0", "resid_post"), batch_size=int(batch_size))
            for number, i in enumerate(part):
                n, at = len(texts[i]), list(places[i])
                if model.kind == "decoder" and run.logits:
                    loss[i, j] = losses_of(run.logits[number], some[number])[at].mean()
                whole = np.concatenate([run.reads[site].values[number, :, :n]
                                        for site in ("resid_pre.0", "resid_post")]).astype(np.float64)
                row, why = _cloud(whole, at, k, device)
                for name, values in row.items():
                    made[name][i, j] = values
                for reason in why:
                    reasons[reason] = reasons.get(reason, 0) + 1
                if level == 0 and len(scales):
                    scaled[i] = [gride_scales(x[at], scales) for x in whole]
    dims = ("prompt", "level", "layer")
    data = xr.Dataset({**{name: (dims, made[name]) for name in names}, "loss": (dims[:2], loss),
                       **_words(texts, places)},
                      {"level": levels, "layer": np.arange(-1, model.n_layers)})
    if len(scales):
        data["scale_dimension"] = ("prompt", "layer", "scale"), scaled
        data = data.assign_coords(scale=[int(n1) for n1 in scales])
    return Result(data, {
        "measure": "geometry of tokens", "neighbors": k, "seed": int(seed), "reasons": reasons,
        "layer_convention": "-1: what enters block 0; l: what block l leaves, before any final norm",
        "left out": "the first position and special tokens", **model.manifest()})


@style()
def draw(found: Result, ax: Axes, of: str = "dimension") -> Axes:
    """One quantity by layer, a curve with its band for every shuffle level; gray for other models."""
    values = found[of]
    last = of == "overlap"
    curves = {f"S = {int(level)}": values.sel(level=level, drop=True).isel(
        layer=slice(None, -1) if last else slice(None)) for level in values["level"].values}
    layer_curve.draw(ax, curves, label=LABELS.get(of, of.replace("_", " ")),
                     x="layer" + " (-1: what enters block 0)" * bool((values["layer"] < 0).any()))
    return ax


LABELS = {"dimension": "intrinsic dimension (TwoNN)", "cosine": "mean cosine",
          "cosine_centered": "mean cosine, centered", "overlap": "overlap with the next layer",
          "anisotropy": "anisotropy (share of variance)", "kept": "share of different points"}


# -- the parts ------------------------------------------------------------------------------------


def _skdim() -> Any:
    # Imported when needed: it compiles with numba, which takes seconds.
    try:
        return importlib.import_module("skdim.id")
    except ImportError:
        raise UndertowError("intrinsic dimensions need scikit-dimension, which is not installed; "
                            'install it with: pip install "undertow[probes]".') from None


def _checked(X: Any) -> np.ndarray:
    x = np.asarray(X, dtype=np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"a cloud is [sample, feature] with at least two points, not {x.shape}.")
    if not np.isfinite(x).all():
        raise ValueError("the cloud holds values that are not numbers; leave those points out.")
    return x


def _distinct(
    x: np.ndarray, nearest: Optional[np.ndarray] = None
) -> tuple[np.ndarray, float]:
    """The cloud with one copy of every point, and the share that this is."""
    near = neighbors(x, 1)[0][:, 0] if nearest is None else nearest
    size = np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean())
    if (near > SAME * size).all():
        return x, 1.0
    unique = np.unique(x, axis=0)
    if len(unique) > 1:
        near, who = (found[:, 0] for found in neighbors(unique, 1))
        # Of two that differ by rounding alone, the later one goes.
        unique = unique[(near > SAME * size) | (who > np.arange(len(unique)))]
    return unique, len(unique) / len(x)


def _from_nearest(nearest: np.ndarray, kept: float, method: str, discard: float) -> Dimension:
    n = len(nearest)
    if np.allclose(nearest[:, 0], nearest[:, 1], rtol=1e-9, atol=0):
        return Dimension(np.nan, kept, n, "every point is as far from its second neighbor as from its "
                                          "first")
    estimator = _skdim().TwoNN(discard_fraction=discard, dist=True, method=method)
    with np.errstate(divide="ignore"):  # of the empirical distribution at its end
        return Dimension(float(estimator.fit(nearest).dimension_), kept, n)


def _shared(a: np.ndarray, b: np.ndarray) -> float:
    return float((a[:, :, None] == b[:, None, :]).any(2).mean())


def _cloud(
    states: np.ndarray, places: list[int], k: int, device: Optional[str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """All quantities of one text, `[layer]` each, and why a dimension is missing."""
    clouds = [_checked(x) for x in states[:, places]]
    found, near = [], []
    for x in clouds:
        far, who = neighbors(x, max(k, 2), device)
        unique, kept = _distinct(x, far[:, 0])
        near.append(who[:, :k])
        found.append(two_nn(x) if len(unique) < len(x) else _from_nearest(far[:, :2], kept, "mle", 0.0))
    first = sorted({0, *places})
    return {
        "dimension": np.array([d.value for d in found]), "kept": np.array([d.kept for d in found]),
        "overlap": np.array([*(_shared(a, b) for a, b in zip(near, near[1:])), np.nan]),
        "cosine": np.array([mean_cosine(x) for x in clouds]),
        "cosine_centered": np.array([mean_cosine(x, centered=True) for x in clouds]),
        "cosine_with_first": np.array([mean_cosine(x) for x in states[:, first]]),
    }, [d.reason for d in found if d.reason]


def _words(texts: Sequence[Prompt], places: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What the tokens alone say about a text: how many different ones, and how common they are."""
    rows = [[p.ids[i] for i in at] for p, at in zip(texts, places)]
    kinds, flat = np.unique(np.concatenate(rows), return_inverse=True)
    share = np.log(np.bincount(flat, minlength=len(kinds)) / len(flat))
    distinct = np.array([len(set(row)) for row in rows])
    mean = [share[np.searchsorted(kinds, row)].mean() for row in rows]
    return {"distinct": ("prompt", distinct), "log_frequency": ("prompt", np.array(mean)),
            "type_token_ratio": ("prompt", distinct / np.array([len(row) for row in rows]))}
