"""Splits that keep groups together, permutations that keep what groups explain, and kinds of labels."""

import warnings
from typing import Any, Literal, Optional, SupportsIndex

import numpy as np
from sklearn.model_selection import GroupKFold, KFold, StratifiedGroupKFold, StratifiedKFold

Kind = Literal["auc", "balanced_accuracy", "r2"]
"""How labels are scored: two classes, more classes, numbers."""


def targets(labels: Any, n: int, task: str) -> tuple[np.ndarray, Kind, np.ndarray]:
    """Labels as class numbers or as numbers, how they are scored, and the classes.

    Example:
        >>> targets(["b", "a"], 2, "auto")
        (array([1, 0]), 'auc', array(['a', 'b'], dtype='<U1'))
    """
    given = np.asarray(labels)
    if given.shape != (n,):
        raise ValueError(f"{given.shape} labels for {n} samples: give one per sample.")
    numbers = given.dtype.kind == "f" and not np.array_equal(given, np.round(given))
    if task == "regression" or task == "auto" and numbers:
        return given.astype(float), "r2", np.zeros(0)
    classes, y = np.unique(given, return_inverse=True)
    return y, "auc" if len(classes) == 2 else "balanced_accuracy", classes


def folds_of(
    y: np.ndarray, kind: str, groups: Optional[Any], folds: SupportsIndex = 5,
    seed: SupportsIndex = 0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Training and test samples of every fold: stratified for classes, whole groups where given.

    Example:
        >>> [len(test) for _, test in folds_of(np.arange(9) % 2, "auc", None, 3)]
        [3, 3, 3]
    """
    folds, seed = int(folds), int(seed)
    blocks = None if groups is None else blocks_of(groups, len(y))
    units = len(y) if blocks is None else int(blocks.max()) + 1
    if units < folds:
        raise ValueError(
            f"{units} {'samples' if blocks is None else 'groups'} cannot be split into {folds} folds: "
            "use fewer folds, or more groups."
        )
    more: dict[str, Any] = dict(shuffle=True, random_state=seed)
    if kind == "r2":
        made: Any = KFold(folds, **more) if blocks is None else GroupKFold(folds, **more)
    else:
        made = StratifiedKFold(folds, **more) if blocks is None else StratifiedGroupKFold(folds, **more)
        fewest = int(np.bincount(y).min())
        if blocks is None and fewest < folds:
            raise ValueError(
                f"the rarest class has {fewest} sample(s), fewer than the {folds} folds: use fewer "
                "folds, or leave the class out."
            )
        if blocks is not None and int(np.bincount(y).max()) < folds:
            raise ValueError(
                f"no class has as many samples as there are folds ({folds}): use fewer folds, or more "
                "samples of each class."
            )
    with warnings.catch_warnings():
        # With whole groups a rare class may be missing in a fold, which is left out of the score.
        warnings.filterwarnings("ignore", "The least populated class")
        return list(made.split(np.zeros(len(y)), y, blocks))


def shuffled(y: np.ndarray, groups: Optional[Any], rng: np.random.Generator) -> np.ndarray:
    """An order of the samples under which labels are exchangeable if nothing is encoded.

    Example:
        >>> order = shuffled(np.array([0, 0, 1, 1]), [5, 5, 8, 8], np.random.default_rng(0))
        >>> bool(order[0] == order[1]), bool(order[2] == order[3])
        (True, True)

    Labels that are constant in their groups move with whole groups; others move within theirs.
    """
    if groups is None:
        return rng.permutation(len(y))
    blocks = blocks_of(groups, len(y))
    members = [np.flatnonzero(blocks == b) for b in range(int(blocks.max()) + 1)]
    order = np.arange(len(y))
    if all(len(np.unique(y[m])) == 1 for m in members):
        # Each group takes the label of another one: any sample of that one stands for it.
        for to, source in zip(members, rng.permutation(len(members))):
            order[to] = members[source][0]
        return order
    for m in members:
        order[m] = rng.permutation(m)
    return order


def blocks_of(groups: Any, n: int) -> np.ndarray:
    """Groups as numbers from 0 on; ValueError unless there is one per sample.

    Example:
        >>> blocks_of(["b", "a", "b"], 3)
        array([1, 0, 1])
    """
    given = np.asarray(groups)
    if given.shape != (n,):
        raise ValueError(f"{given.shape} groups for {n} samples: give one per sample.")
    return np.unique(given, return_inverse=True)[1]
