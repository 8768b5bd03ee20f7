"""Logistic probes of many layers and many targets: one batched solver against a loop of fits.

Eight layers of 2,000 states of width 256; one target, and thirty-two. What is compared are the
probabilities of held-out states and their mean log loss: both solvers minimize the same loss.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._race import Contender, Race, Target, measure
from probes.linear import fit_targets, logistic

NAME = "probes"
OURS, LOOP = "undertow, fit_targets", "scikit-learn, a loop"
LAYERS, SAMPLES, WIDTH, TARGET_COUNTS = 8, 2000, 256, (1, 32)
C = 0.01


def _name(n: int) -> str:
    return f"{n} target{'s' if n > 1 else ''} per layer"


def _agreement(races: Mapping[str, Race]) -> float:
    found = [race.lines[OURS].difference for race in races.values()]
    if not found or any(value is None for value in found):
        raise LookupError("the two were not compared")
    return max(value for value in found if value is not None)


TARGETS = (
    Target("one target per layer: batched solver to scikit-learn's loop", at_most=1.3,
           race=_name(1), of=OURS, to=LOOP),
    Target("32 targets per layer: scikit-learn's loop to the batched solver", at_least=4.0,
           race=_name(32), of=LOOP, to=OURS),
    Target("largest difference of a held-out probability or mean log loss", at_most=2e-5,
           value=_agreement),
)


def race(quick: bool = False, device: str = "cpu") -> list[Race]:
    """The same states and labels for both; probabilities of the last fifth of the states."""
    layers, samples, width = (2, 200, 16) if quick else (LAYERS, SAMPLES, WIDTH)
    found = []
    for n in (1, 3) if quick else TARGET_COUNTS:
        states, labels = planted(layers, samples, width, n)
        contenders = [Contender(LOOP, _loop(states, labels)),
                      Contender(OURS, _batched(states, labels, device))]
        found.append(measure(
            _name(n), contenders, LOOP, rounds=3, seconds=240, tolerance=2e-5, device=device,
            sizes={"layers": layers, "samples": samples, "d_model": width, "targets": n}))
    return found


def planted(
    layers: int, samples: int, width: int, targets: int, seed: int = 0
) -> tuple[NDArray[Any], NDArray[Any]]:
    """States [layer, sample, d_model] and labels [target, sample] with a noisy linear rule."""
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((layers, samples, width))
    rule = rng.standard_normal((targets, width)) / np.sqrt(width)
    noise = rng.standard_normal((targets, samples))
    return states, (rule @ states[0].T + 0.5 * noise > 0).astype(int)


def _split(states: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[Any], ...]:
    kept = states.shape[1] * 4 // 5
    return states[:, :kept], labels[:, :kept], states[:, kept:], labels[:, kept:]


def _scores(fitted: list[list[Any]], states: NDArray[Any], labels: NDArray[Any]) -> dict[str, Any]:
    """Of probes [target][layer]: held-out probabilities and log losses."""
    probability = np.array([[probe.predict_proba(x)[:, 1] for probe, x in zip(row, states)]
                            for row in fitted])
    # Of the accuracy the mean log loss is compared: a count jumps by one where a probability lies
    # at one half.
    right = np.where(labels[:, None] == 1, probability, 1 - probability)
    return {"probability": probability, "log_loss": -np.log(right).mean(-1)}


def _loop(states: NDArray[Any], labels: NDArray[Any]) -> Callable[[], dict[str, Any]]:
    X, y, rest, truth = _split(states, labels)

    def run() -> dict[str, Any]:
        # At these tolerances the probabilities of both agree with the optimum to about 2e-6.
        return _scores([[logistic(C, tol=1e-7).fit(x, one) for x in X] for one in y], rest, truth)

    return run


def _batched(
    states: NDArray[Any], labels: NDArray[Any], device: str
) -> Callable[[], dict[str, Any]]:
    X, y, rest, truth = _split(states, labels)

    def run() -> dict[str, Any]:
        return _scores(fit_targets(X, y, C, tolerance=1e-7, device=device), rest, truth)

    return run
