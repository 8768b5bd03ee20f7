"""Contextual lens (LatentLens): read a hidden state through the words whose states are nearest.

Paper     arXiv:2602.00462
Question  Which word, in which text and layer, has a state like this one?
Measure   the nearest of many contextual states of text tokens, from several layers, by cosine; how
          often a neighbor is a word for what the state is of, against words for something else
Cause     none: it is a reading
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional, SupportsIndex, Union

import numpy as np
import pandas as pd
import torch
import xxhash
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_array, check_is_fitted, validate_data
from torch import Tensor

from interp.core import Prompt, PromptError
from interp.core.site import check_layers
from interp.models.model import Model
from probes.neighbors import cosine_neighbors
from probes.nulls import EMBEDDING, layer_states
from probes.store import Store, extract

PER_TOKEN, SKIP = 50, 2
"""Contexts per token, and positions at the start of a text that are left out (released code)."""

HIDDEN = (1, 2, 4, 8, 16, 24)
"""Layers of the released bank, as hidden states are numbered (1 leaves block 0); and the last two
but one."""


class ContextualBank(BaseEstimator):
    """Nearest neighbors by cosine among contextual states; as scikit-learn's `NearestNeighbors`.

    Example:
        >>> bank = ContextualBank(n_neighbors=1).fit(np.eye(3), rows=["a", "b", "c"])
        >>> distance, index = bank.kneighbors([[0.1, 0.9, 0.0]])
        >>> bank.rows_["token"][index[0, 0]], round(float(distance[0, 0]), 3)
        ('b', 0.006)

    Args:
        n_neighbors: how many.
        correction: against hubs, "none", "csls" or "mutual"; see `probes.neighbors`. With these two
            the neighbors depend on which queries are asked together.
        reach: neighbors that the corrections look at.

    Attributes:
        rows_: a table of what each vector of the bank is: `token`, `layer`, `prompt`, `position`, ...
            in the order of their numbers.

    Source: arXiv:2602.00462.
    """

    def __init__(self, n_neighbors: Any = 5, correction: Any = "none", reach: Any = 10) -> None:
        self.n_neighbors = n_neighbors
        self.correction = correction
        self.reach = reach

    def fit(self, X: Any, y: Any = None, *, rows: Any = None) -> "ContextualBank":
        """Take the vectors of the bank.

        Args:
            X: `[sample, d_model]`; or a `probes.store.Store` of "resid_post", which stays on disk and
                is read shard by shard at every question, layer after layer.
            rows: what they are: a table, or one token per vector. A store brings its own.

        Raises:
            ValueError: rows for another number of vectors, a store without "resid_post".
        """
        if isinstance(X, Store):
            if "resid_post" not in X.sites:
                raise ValueError(
                    f"the store keeps {', '.join(X.sites)}, but a bank needs 'resid_post'."
                )
            self.bank_: Any = X
            self.rows_ = pd.concat([X.rows.assign(layer=layer) for layer in X.layers],
                                   ignore_index=True)
            self.n_features_in_ = int(X.states("resid_post", layer=X.layers[0], samples=[0]).shape[-1])
            return self
        self.bank_ = validate_data(self, X, dtype=[np.float64, np.float32])
        table = pd.DataFrame({"token": list(rows)} if rows is not None and not isinstance(
            rows, pd.DataFrame) else rows, index=None if rows is not None else range(len(self.bank_)))
        if len(table) != len(self.bank_):
            raise ValueError(f"{len(table)} rows for {len(self.bank_)} vectors: give one for each.")
        self.rows_ = table.reset_index(drop=True)
        return self

    def kneighbors(
        self, X: Any, n_neighbors: Optional[SupportsIndex] = None, return_distance: bool = True,
        *, layers: Optional[Sequence[SupportsIndex]] = None,
    ) -> Any:
        """Distances (one minus the similarity) and numbers of the nearest vectors, nearest first.

        Args:
            layers: only vectors of these layers of the bank.

        Returns:
            `[query, k]` twice, or the numbers alone; -1 and NaN where "mutual" leaves too few.
        """
        check_is_fitted(self, "bank_")
        if isinstance(self.bank_, Store):
            X = check_array(X, dtype=[np.float64, np.float32])  # type: ignore[arg-type]
        else:
            X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        kept = None
        if layers is not None:
            kept = np.flatnonzero(np.isin(self.rows_["layer"], [int(layer) for layer in layers]))
        similarity, index = cosine_neighbors(
            X, self._pieces(kept), self.n_neighbors if n_neighbors is None else n_neighbors,
            correction=self.correction, reach=self.reach)
        found = index.numpy()
        if kept is not None:
            found = np.where(found >= 0, kept[found], -1)
        return (1 - similarity.numpy(), found) if return_distance else found

    def _pieces(self, kept: Optional[np.ndarray]) -> Iterator[np.ndarray]:
        if not isinstance(self.bank_, Store):
            yield self.bank_ if kept is None else self.bank_[kept]
            return
        wanted = None if kept is None else set(self.rows_["layer"].iloc[kept])
        for layer in self.bank_.layers:
            if wanted is None or layer in wanted:
                for _, states in self.bank_.shards("resid_post", layer=layer):
                    yield states.values


def contexts(
    prompts: Sequence[Prompt],
    *,
    skip: SupportsIndex = SKIP,
    per_token: SupportsIndex = PER_TOKEN,
    causal: bool = True,
    seed: SupportsIndex = 0,
) -> list[tuple[int, ...]]:
    """The positions of every prompt whose states go into a bank.

    Example:
        >>> contexts([Prompt.from_tokens([1, 5, 6, 7]), Prompt.from_tokens([1, 5, 6, 8])])
        [(2, 3), (3,)]

    Text tokens from position `skip` on; of equal beginnings the first (in a causal model their
    states are equal; otherwise texts must be equal as a whole); of a token with more than `per_token`
    contexts a random choice.
    """
    rng = np.random.default_rng(int(seed))
    seen: set[str] = set()
    of: dict[int, list[tuple[int, int]]] = {}
    for number, prompt in enumerate(prompts):
        pictures = {p for segment in prompt.of_kind("image") for p in segment.positions}
        key = xxhash.xxh3_128((prompt.digest() if pictures or not causal else "").encode())
        for position, token in enumerate(prompt.ids):
            key.update(f"{token},".encode())
            name = key.hexdigest()
            if position >= int(skip) and position not in pictures and name not in seen:
                of.setdefault(token, []).append((number, position))
            seen.add(name)
    kept: list[list[int]] = [[] for _ in prompts]
    for places in of.values():
        drawn: Any = range(len(places))
        if len(places) > int(per_token):
            drawn = rng.choice(len(places), int(per_token), replace=False)
        for i in drawn:
            kept[places[i][0]].append(places[i][1])
    return [tuple(sorted(places)) for places in kept]


def bank_layers(n_layers: SupportsIndex) -> tuple[int, ...]:
    """The layers of the released bank, numbered as blocks from 0, as far as there are any.

    Example:
        >>> bank_layers(32), bank_layers(6)
        ((0, 1, 3, 7, 15, 23, 29, 30), (0, 1, 3, 4))

    Layer l is what block l leaves. The last block's output is not among them; where it is asked for,
    it is taken before the final norm.
    """
    n = int(n_layers)
    hidden = {h for h in HIDDEN if h < n} | {h for h in (n - 2, n - 1) if h > 0} or {n}
    return tuple(sorted(h - 1 for h in hidden))


def build(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    layers: Optional[Sequence[SupportsIndex]] = None,
    folder: Union[str, Path, None] = None,
    skip: SupportsIndex = SKIP,
    per_token: SupportsIndex = PER_TOKEN,
    seed: SupportsIndex = 0,
    batch_size: int = 8,
    progress: bool = False,
    **bank: Any,
) -> ContextualBank:
    """A bank of a model's own states of texts.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> bank = build(model, [Prompt.from_tokens(range(3, 9))], n_neighbors=1)
        >>> bank.rows_["token"].tolist(), bank.rows_["layer"].unique().tolist()
        ([5, 6, 7, 8], [0])

    Args:
        layers: of the bank: blocks from 0, -1 for the embedding (not in a folder). `bank_layers` for
            None.
        folder: where to keep states that do not fit into memory; resumable (`probes.store`).
        skip, per_token, seed: see `contexts`.
        bank: settings of `ContextualBank`.

    Raises:
        PromptError: no text token is left. OutOfRange: a layer that does not exist.
    """
    numbers = [int(x) for x in (bank_layers(model.n_layers) if layers is None else layers)]
    check_layers([x for x in numbers if x != EMBEDDING], model.n_layers)
    given = list(prompts)
    places = contexts(given, skip=skip, per_token=per_token, causal=model.kind == "decoder", seed=seed)
    pairs = [(prompt, where) for prompt, where in zip(given, places) if where]
    if not pairs:
        raise PromptError(
            f"no text token of {len(given)} prompts is left for a bank: give texts of more than "
            f"{int(skip)} tokens."
        )
    given, places = [prompt for prompt, _ in pairs], [where for _, where in pairs]
    empty = ContextualBank(**bank)
    if folder is not None:
        if EMBEDDING in numbers:
            raise PromptError("a bank in a folder holds what blocks leave; leave layer -1 out.")
        of = {id(prompt): where for prompt, where in pairs}
        return empty.fit(extract(model, given, folder, "resid_post", layers=numbers,
                                 positions=lambda prompt: of[id(prompt)], batch_size=batch_size,
                                 progress=progress))
    states = layer_states(model, given, places, layers=[x for x in numbers if x != EMBEDDING],
                          embedding=EMBEDDING in numbers, batch_size=batch_size, progress=progress)
    rows = pd.DataFrame({
        "prompt": states["prompt"].values, "position": states["position"].values,
        "token": [p.ids[i] for p, where in zip(given, places) for i in where]})
    table = pd.concat([rows.assign(layer=int(layer)) for layer in states.layer.values])
    return empty.fit(states.values.reshape(-1, states.sizes["d_model"]), rows=table)


def agreement(
    neighbors: Int[np.ndarray, "sample k"] | Int[Tensor, "sample k"],
    words: Sequence[Sequence[SupportsIndex]],
    groups: Sequence[Any],
) -> tuple[Float[np.ndarray, "sample"], Float[np.ndarray, "sample"]]:
    """Whether some of a sample's `k` tokens is a word for it, and for samples of other groups.

    Example:
        >>> own, other = agreement(np.array([[4, 7], [7, 5]]), [[7], [5]], ["a", "b"])
        >>> own.tolist(), other.tolist()
        ([1.0, 1.0], [0.0, 1.0])

    Args:
        neighbors: token ids; -1 is no token.
        words: the token ids that name what each sample is of.
        groups: the picture (or text) that each sample is from.

    Returns:
        `own` is 0 or 1; `other` is the share of the samples of other groups whose words are among
        the tokens (the words of other pictures: what a reader gets right that always says the same).
        NaN where there is no other group.

    Raises:
        ValueError: lengths that differ, or a sample without words.
    """
    found = torch.as_tensor(neighbors).cpu().numpy()
    names = [{int(w) for w in some} for some in words]
    if not len(found) == len(names) == len(groups):
        raise ValueError(
            f"{len(found)} rows of neighbors, {len(names)} of words and {len(groups)} groups: give one "
            "of each per sample."
        )
    if not all(names):
        raise ValueError("every sample needs a word that names it; leave the others out.")
    kinds = sorted({tuple(sorted(some)) for some in names})
    number = {kind: i for i, kind in enumerate(kinds)}
    kind = np.array([number[tuple(sorted(some))] for some in names])
    hits = np.stack([np.isin(found, one).any(1) for one in kinds], 1).astype(float)
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    count = np.zeros((group.max() + 1, len(kinds)))
    np.add.at(count, (group, kind), 1)
    rest = count.sum(0) - count[group]
    with np.errstate(invalid="ignore"):
        other = (hits * rest).sum(1) / rest.sum(1)
    return hits[np.arange(len(found)), kind], other
