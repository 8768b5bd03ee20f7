"""Positions of objects in pictures: boxes and mutual positions, beyond what the objects' kinds tell.

Paper     arXiv:2305.10046
Question  Is the position of an object in its states, and does the model use it?
Measure   boxes by regression; for pairs of objects, which one is further left or higher up, from both
          states, against the same from the kinds of the two objects alone; captions that differ in
          the position word only
Cause     none: "present but unused" is the first two without the third
"""

from collections.abc import Sequence
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.preprocessing import OneHotEncoder

from interp.core import Result, statistics
from probes import linear
from probes.quick import hat
from probes.sweep import sweep

Boxes = Float[np.ndarray, "object 4"]
COORDINATES = ("x", "y", "width", "height")
RELATIONS = ("left", "above")
Relation = Literal["left", "above"]
OPPOSITE = {"left": "right", "above": "below", "top": "bottom", "upper": "lower", "over": "under",
            "nearer": "farther"}


def coordinates(boxes: Boxes, sizes: Any) -> Float[np.ndarray, "object 4"]:
    """Center x and y, width and height, as shares of the picture.

    Example:
        >>> coordinates(np.array([[0.0, 0.0, 20.0, 10.0]]), (40, 20)).tolist()
        [[0.25, 0.25, 0.5, 0.5]]

    Args:
        boxes: (left, top, right, bottom) in pixels. sizes: (width, height) of the picture, or of each.
    """
    b = np.asarray(boxes, dtype=float)
    size = np.broadcast_to(np.asarray(sizes, dtype=float), (len(b), 2))
    return np.concatenate([(b[:, :2] + b[:, 2:]) / 2 / size, (b[:, 2:] - b[:, :2]) / size], 1)


def regress_boxes(
    states: Any, places: Float[np.ndarray, "object 4"], images: Any, *,
    names: Sequence[str] = ("x", "y"), permutations: SupportsIndex = 50, folds: SupportsIndex = 5,
    seed: SupportsIndex = 0,
) -> dict[str, Result]:
    """Each coordinate read from the objects' states, per layer; shuffled boxes are the null.

    Args:
        states: `[layer, object, d_model]`. places: as `coordinates` gives them. images: the picture of
            every object, which is not split; boxes are shuffled among the objects of a picture.
        names: of `COORDINATES`.

    Returns sweeps by name, see `probes.sweep.sweep`: `score` is R^2 on pictures not seen.
    """
    return {name: sweep(states, places[:, COORDINATES.index(name)], groups=images, task="regression",
                        permutations=permutations, folds=folds, seed=seed) for name in names}


def pairs(
    places: Float[np.ndarray, "object 4"], images: Any, relation: Relation = "left",
    *, margin: SupportsFloat = 0.0, seed: SupportsIndex = 0,
) -> tuple[Int[np.ndarray, "pair 2"], Bool[np.ndarray, "pair"]]:
    """All pairs of objects of one picture, in random order, and whether the first has the relation.

    Example:
        >>> at = np.array([[0.1, 0.5, 0.1, 0.1], [0.9, 0.5, 0.1, 0.1]])
        >>> couples, left = pairs(at, [0, 0])
        >>> bool(left[0] == (couples[0, 0] == 0)), len(pairs(at, [0, 0], "above")[0])
        (True, 0)

    Args:
        margin: centers must be further apart than this share of the picture, or the pair is left out.
    """
    if relation not in RELATIONS:
        raise ValueError(f"a relation is one of {', '.join(RELATIONS)}, not {relation!r}.")
    group, along = np.asarray(images), np.asarray(places)[:, RELATIONS.index(relation)]
    rng = np.random.default_rng(int(seed))
    found, holds = [], []
    for image in dict.fromkeys(group.tolist()):
        members = np.flatnonzero(group == image)
        for at, a in enumerate(members):
            for b in members[at + 1:]:
                if abs(along[a] - along[b]) <= float(margin):
                    continue
                first, second = (a, b) if rng.random() < 0.5 else (b, a)
                found.append((first, second))
                holds.append(along[first] < along[second])
    return np.array(found, dtype=int).reshape(-1, 2), np.array(holds, dtype=bool)


def mutual(
    states: Any, couples: Int[np.ndarray, "pair 2"], holds: Bool[np.ndarray, "pair"], *,
    images: Any, kinds: Any, folds: SupportsIndex = 5, inner: SupportsIndex = 2,
    seed: SupportsIndex = 0,
) -> Result:
    """Mutual position read from both states, and from the kinds of the two objects alone.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> at = rng.random((60, 4))
        >>> states = np.concatenate([at, rng.standard_normal((60, 2))], 1)[None]
        >>> images = np.repeat(np.arange(20), 3)
        >>> found = mutual(states, *pairs(at, images), images=images, kinds=np.tile([0, 1], 30))
        >>> float(found["right"].mean()) > 0.8, float(found["by_kind"].mean()) < 0.7
        (True, True)

    Args:
        states: `[layer, object, d_model]`. couples, holds: from `pairs`. images: of every object.
        kinds: of every object (its category or name): sky is above grass whatever the states say.
        folds, inner: of the scores, and of the choice of the layer within training pictures.

    Returns:
        `[layer, pair]` `right`: whether the probe of this layer is right on a pair whose picture it has
        not seen; `[pair]`: `nested` (in the layer that is best within the training pictures), `by_kind`
        (the probe of the kinds), `majority`, and `of_image`; `chosen` `[fold]`.

    Raises:
        ValueError: fewer pictures than folds, one answer only, or values that are not numbers.

    Source: arXiv:2305.10046; the baseline of kinds is the toolkit's.
    """
    layers = states["layer"].values if isinstance(states, xr.DataArray) else None
    X, couples, y = np.asarray(states), np.asarray(couples), np.asarray(holds)
    if not np.isfinite(X).all():
        raise ValueError("states hold values that are not numbers; recompute them in float32.")
    if len(couples) != len(y) or not len(y):
        raise ValueError(f"{len(couples)} pairs with {len(y)} answers: give one for each of some.")
    if y.all() or not y.any():
        raise ValueError("all pairs have the same answer: there is one class only.")
    image = np.unique(np.asarray(images), return_inverse=True)[1][couples[:, 0]]
    if len(np.unique(image)) < int(folds):
        raise ValueError(f"pairs of {len(np.unique(image))} picture(s) cannot be split into "
                         f"{int(folds)} folds.")
    names = np.asarray(kinds).astype(str)[couples]
    both = [np.concatenate([x[couples[:, 0]], x[couples[:, 1]]], 1) for x in X]
    right = np.zeros((len(X), len(y)), bool)
    nested, by_kind, majority = (np.zeros(len(y), bool) for _ in range(3))
    chosen = []
    outer = StratifiedGroupKFold(int(folds), shuffle=True, random_state=int(seed))
    for train, test in outer.split(both[0], y, image):
        within = np.zeros(len(X))
        for layer, x in enumerate(both):
            right[layer, test] = _ridge(x, y, train, test) == y[test]
            within[layer] = _within(x[train], y[train], image[train], int(inner))
        chosen.append(int(within.argmax()))
        nested[test] = right[chosen[-1], test]
        # Each kind in each place: also what a table of pairs of kinds could add up to.
        coded = OneHotEncoder(handle_unknown="ignore", sparse_output=False).fit(
            _with_pairs(names[train]))
        probe = linear.logistic(0.1).fit(coded.transform(_with_pairs(names[train])), y[train])
        by_kind[test] = probe.predict(coded.transform(_with_pairs(names[test]))) == y[test]
        majority[test] = (y[train].mean() >= 0.5) == y[test]
    data = xr.Dataset({"right": (("layer", "pair"), right), "nested": ("pair", nested),
                       "by_kind": ("pair", by_kind), "majority": ("pair", majority),
                       "of_image": ("pair", image), "chosen": ("fold", chosen)},
                      {"layer": np.arange(len(X)) if layers is None else layers})
    data["chosen"] = ("fold", data["layer"].values[chosen])
    return Result(data, {"measure": "mutual position", "folds": int(folds), "inner": int(inner),
                         "seed": int(seed), "n_pairs": len(y),
                         "n_pictures": len(np.unique(image)), "probe": "ridge on both states"})


def _within(x: np.ndarray, y: np.ndarray, group: np.ndarray, folds: int) -> float:
    """Accuracy on pictures left out of the training part."""
    count = min(folds, len(np.unique(group)))
    if count < 2:
        return 0.0
    hits = []
    for train, test in GroupKFold(count).split(x, y, group):
        if len(np.unique(y[train])) < 2:
            continue
        hits.append((_ridge(x, y, train, test) == y[test]).mean())
    return float(np.mean(hits)) if hits else 0.0


def _ridge(x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """What `linear.ridge`, with the number of features as penalty, says of the test samples."""
    sign = np.where(y[train], 1.0, -1.0)
    return hat(x, train, test, float(x.shape[1])) @ (sign - sign.mean()) + sign.mean() > 0


def _with_pairs(names: np.ndarray) -> np.ndarray:
    """The kinds of both objects, and the two together."""
    together = np.array([f"{a} | {b}" for a, b in names])
    return np.column_stack([names, together])


def gain(found: Result, **more: Any) -> statistics.Estimate:
    """Accuracy of the states in the layer chosen by nesting minus that of the kinds, over pictures."""
    return statistics.difference(found["nested"].values.astype(float),
                                 found["by_kind"].values.astype(float),
                                 groups=found["of_image"].values, **more)


# -- captions that differ in the position word ----------------------------------------------------


def opposite(text: str, words: Optional[Sequence[str]] = None) -> str:
    """The same text with each position word turned into its opposite.

    Example:
        >>> opposite("the ring is left of the cross"), opposite("at the top left", ["top"])
        ('the ring is right of the cross', 'at the bottom left')

    Args:
        words: which ones to turn (either of a pair stands for both); all for None.

    Raises:
        ValueError: a text without such a word.
    """
    table = {**OPPOSITE, **{b: a for a, b in OPPOSITE.items()}}
    if words is not None:
        kept = {word for one in words for word in (one, table[one])}
        table = {a: b for a, b in table.items() if a in kept}
    made = [_like(piece, table[piece.lower()]) if piece.lower() in table else piece
            for piece in text.split(" ")]
    if made == text.split(" "):
        raise ValueError(f"{text!r} has no position word to turn around.")
    return " ".join(made)


def _like(piece: str, word: str) -> str:
    return word.capitalize() if piece[:1].isupper() else word


def contrast(
    true: Float[np.ndarray, "pair"], turned: Float[np.ndarray, "pair"]
) -> statistics.Estimate:
    """Share of pairs in which the true caption scores higher, with an exact binomial interval.

    Example:
        >>> contrast(np.array([1.0, 2.0, 3.0]), np.array([0.0, 3.0, 1.0])).value
        0.6666666666666666

    A tie is no success; 0.5 is what a model scores that does not heed the word.

    Source: arXiv:2305.10046.
    """
    a, b = np.asarray(true, dtype=float), np.asarray(turned, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not np.isfinite([a, b]).all():
        raise ValueError("give one finite score of the true and of the turned caption per pair.")
    return statistics.rate(int((a > b).sum()), len(a), method="exact")
