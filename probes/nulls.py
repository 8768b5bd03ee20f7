"""What a probe finds where nothing was learned: untrained weights, embeddings, tokens, class sizes.

A score of a trained model's layer says little by itself. Beside it belong the same score on a model
of the same architecture with random weights, on what enters the first block, on the tokens alone, and
of a guess that looks at nothing; shuffled labels come with every `probes.sweep.sweep`, and control
tasks from `probes.controls`.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Optional, SupportsIndex, Union

import numpy as np
import xarray as xr
from jaxtyping import Float
from sklearn.dummy import DummyClassifier, DummyRegressor
from tqdm.auto import tqdm

from interp.core import Prompt, PromptError, Result
from interp.core.prompt import Where
from interp.models.reinitialize import reinitialized
from probes.folds import targets
from probes.sweep import sweep

__all__ = ["EMBEDDING", "bag_of_tokens", "dummy", "layer_states", "places_of", "reinitialized"]

EMBEDDING = -1
"""The number of the embedding among layers: what enters block 0."""

Places = Union[Where, Callable[[Prompt], Sequence[int]], Sequence[Sequence[int]]]


def layer_states(
    model: Any,
    prompts: Sequence[Prompt],
    positions: Places = "last",
    *,
    embedding: bool = True,
    layers: Optional[Sequence[SupportsIndex]] = None,
    batch_size: int = 8,
    progress: bool = False,
) -> xr.DataArray:
    """The residual stream after every block at chosen positions, with the embedding as layer -1.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompts = [Prompt.from_tokens(range(i, i + 5)) for i in range(3, 7)]
        >>> states = layer_states(model, prompts)
        >>> states.dims, states.layer.values.tolist(), states.position.values.tolist()
        (('layer', 'sample', 'd_model'), [-1, 0], [4, 4, 4, 4])

    Layer l is what block l, counted from 0, leaves, before any final norm. Layer -1 is what enters
    block 0: token embeddings, learned positions where a model adds them, and at an image token what
    its vision encoder gives. A probe of it says what was there before any block had run.

    Args:
        positions: a segment, "last", "all", position numbers; a function from a prompt to these; or
            one list of positions per prompt.
        embedding: whether layer -1 is there. layers: which blocks; all for None.
        batch_size: prompts at a time, of which only the chosen positions are kept.

    Returns:
        `[layer, sample, d_model]` with `prompt` (number) and `position` of every sample.

    Raises:
        PromptError: no prompts, or positions for another number of prompts.
        ValueError: states that are not numbers.
    """
    given = list(prompts)
    places = places_of(given, positions)
    blocks = [int(x) for x in (range(model.n_layers) if layers is None else layers)]
    asked = (["resid_pre.0"] if embedding else []) + [f"resid_post.{layer}" for layer in blocks]
    found: list[Any] = [None] * len(given)
    # Prompts of one length share a pass.
    order = sorted(range(len(given)), key=lambda i: len(given[i]))
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for part in tqdm(parts, disable=not progress, desc="reading states"):
        reads = model.run([given[i] for i in part], read=asked, logits="none",
                          batch_size=batch_size).reads
        for at, i in enumerate(part):
            found[i] = np.stack([reads[site].values[at, 0][list(places[i])] for site in asked])
    states = np.concatenate(found, 1)
    if not np.isfinite(states).all():
        bad = np.argwhere(~np.isfinite(states).all((0, 2)))[0, 0]
        raise ValueError(
            f"the states of sample {bad} are not numbers; open {model.name} with dtype='float32', or "
            "leave the prompt out."
        )
    number = np.repeat(np.arange(len(given)), [len(p) for p in places])
    return xr.DataArray(
        states, dims=("layer", "sample", "d_model"),
        coords={"layer": ([EMBEDDING] if embedding else []) + blocks, "prompt": ("sample", number),
                "position": ("sample", np.concatenate([np.asarray(p, dtype=int) for p in places]))},
        attrs={"embedding": "what enters block 0" if embedding else "left out",
               "site": "resid_post", "model": model.name})


def places_of(prompts: Sequence[Prompt], positions: Places) -> list[tuple[int, ...]]:
    """The positions meant, for every prompt; a list per prompt keeps its order and repetitions.

    Example:
        >>> places_of([Prompt.from_tokens([5, 6, 7])], [[-1, 0, 0]])
        [(2, 0, 0)]
    """
    if not prompts:
        raise PromptError("no prompts to read states of: give at least one.")
    if callable(positions):
        return [prompt.positions(positions(prompt)) for prompt in prompts]
    listed: Any = positions
    if isinstance(listed, str) or not isinstance(listed, (Sequence, np.ndarray)) or not len(
            listed) or isinstance(listed[0], (int, np.integer)):
        return [prompt.positions(listed) for prompt in prompts]
    if len(listed) != len(prompts):
        raise PromptError(
            f"positions of {len(listed)} prompts for {len(prompts)} prompts: give one list each."
        )
    return [tuple(prompt.positions(int(p))[0] for p in places)
            for prompt, places in zip(prompts, listed)]


def bag_of_tokens(
    prompts: Sequence[Prompt], positions: Places = "all"
) -> Float[np.ndarray, "prompt token"]:
    """How often each token occurs at some positions: what the words alone say, in no order.

    Example:
        >>> bag_of_tokens([Prompt.from_tokens([5, 6, 5]), Prompt.from_tokens([6, 7, 7])]).tolist()
        [[2.0, 1.0, 0.0], [0.0, 1.0, 2.0]]

    With one position per prompt it is that token's identity, one-hot. Columns are the tokens that
    occur, by rising id.
    """
    rows = [[prompt.ids[p] for p in places]
            for prompt, places in zip(prompts, places_of(list(prompts), positions))]
    kinds = np.unique(np.concatenate(rows))
    counts = np.zeros((len(rows), len(kinds)))
    for count, row in zip(counts, rows):
        np.add.at(count, np.searchsorted(kinds, row), 1)
    return counts


def dummy(
    labels: Any, *, groups: Optional[Any],
    task: Literal["auto", "classification", "regression"] = "auto",
    folds: SupportsIndex = 5, seed: SupportsIndex = 0,
) -> Result:
    """The sweep of a guess that looks at nothing: class frequencies, or the mean, of training folds.

    Example:
        >>> float(dummy(["a", "b", "b"] * 10, groups=None)["score"][0])
        0.5

    The folds are those that `probes.sweep.sweep` makes of the same labels, groups and seed.
    """
    _, kind, _ = targets(labels, len(labels), task)
    guess = DummyRegressor() if kind == "r2" else DummyClassifier(strategy="prior")
    return sweep(np.zeros((1, len(labels), 1)), labels, groups=groups, task=task, estimator=guess,
                 folds=folds, permutations=1, seed=seed)
