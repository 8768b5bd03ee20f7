"""Focus directions: offsets of queries and keys that turn heads toward the relevant document.

Paper     arXiv:2503.23306
Question  Can a fixed offset per head make the model look at what matters, whatever the prompt?
Measure   attention from the answer's rows to the gold document, with the offset added
Cause     add it in the top heads while the model answers, and in as many random heads

Only the answer's rows of one layer are ever differentiated: with A the rows as the model has them,
an offset d multiplies A[t, s] by exp(scale * d . k_s) and renormalizes, whatever mask, bias or
learned sink made A. A direction for all keys changes nothing (it shifts whole rows of logits),
except where a learned sink logit or a soft cap breaks the symmetry.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from interp.core import Result, edit
from interp.core.errors import PromptError, SiteRefused
from interp.core.head import HeadLike, check_heads
from interp.core.head import heads as as_heads
from interp.core.intervention import EditSite, Phase
from interp.models.model import Model
from interp.prompts.documents import Documents
from interp.stream.chosen_rows import RowWeights
from interp.stream.per_layer import PerLayer

Which = Literal["query", "key", "both"]
INITIAL = 0.01
"""Standard deviation of the directions before learning."""


@dataclass(frozen=True)
class LayerRows:
    """The answer's rows of one prompt in one layer, and what an offset acts on.

    `weights` [head, query, key] are the model's own; `query` [head, query, d_head] and `key` [head,
    key, d_head] what they came from, after position encoding, keys repeated for grouped heads.
    """

    weights: Float[Tensor, "head query key"]
    query: Float[Tensor, "head query d_head"]
    key: Float[Tensor, "head key d_head"]
    gold: tuple[int, ...]
    scale: float
    softcap: Optional[float] = None

    def moved(
        self,
        query: Optional[Float[Tensor, "head d_head"]] = None,
        key: Optional[Float[Tensor, "head d_head"]] = None,
    ) -> Float[Tensor, "head query key"]:
        """The rows with offsets added to all queries and all keys; differentiable in both."""
        change = torch.zeros((), dtype=self.query.dtype)
        if query is not None:
            change = change + torch.einsum("hd,hkd->hk", query, self.key)[:, None]
        if key is not None:
            own = self.query if query is None else self.query + query[:, None]
            change = change + torch.einsum("hqd,hd->hq", own, key)[..., None]
        change = self.scale * change
        if self.softcap is not None:
            old = self.scale * torch.einsum("hqd,hkd->hqk", self.query, self.key)
            change = self._capped(old + change) - self._capped(old)
        # Logits up to a constant per row; what a learned sink holds is one more of them.
        logits = self.weights.clamp_min(1e-38).log() + change
        logits = logits.masked_fill(self.weights <= 0, float("-inf"))
        outside = (1 - self.weights.sum(-1, keepdim=True)).clamp_min(0)
        sink = outside.clamp_min(1e-38).log().masked_fill(outside < 1e-4, float("-inf"))
        return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]

    def _capped(self, logits: Tensor) -> Tensor:
        assert self.softcap is not None
        return self.softcap * torch.tanh(logits / self.softcap)

    def gold_mass(self, weights: Float[Tensor, "head query key"]) -> Float[Tensor, "head"]:
        """Attention on the gold document, averaged over the rows."""
        return weights[..., list(self.gold)].sum(-1).mean(-1)


def scale_of(
    weights: Float[Tensor, "head query key"],
    query: Float[Tensor, "head query d_head"],
    key: Float[Tensor, "head key d_head"],
    softcap: Optional[SupportsFloat] = None,
) -> float:
    """The factor between q.k and the logits, found from rows of attention instead of assumed.

    Example:
        >>> query, key = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
        >>> weights = (0.7 * torch.einsum("hqd,hkd->hqk", query, key)).softmax(-1)
        >>> round(scale_of(weights, query, key), 4)
        0.7

    Raises:
        SiteRefused: no factor explains the rows (something is added to the logits, as ALiBi does).
    """
    seen = weights > 1e-6
    count = seen.sum(-1, keepdim=True).clamp_min(1)

    def centered(x: Tensor) -> Tensor:
        x = torch.where(seen, x, torch.zeros_like(x))
        return torch.where(seen, x - x.sum(-1, keepdim=True) / count, torch.zeros_like(x))

    wanted = centered(weights.clamp_min(1e-38).log()).double()
    product = torch.einsum("hqd,hkd->hqk", query, key).double()
    size = float(wanted.square().sum())
    if size < 1e-6:
        return key.shape[-1] ** -0.5  # rows are flat: any factor explains them
    if softcap is None:
        flat = centered(product).double()
        scale = float((wanted * flat).sum() / flat.square().sum())
        left = float((wanted - scale * flat).square().sum())
    else:
        cap = float(softcap)

        def rest(exponent: float) -> float:
            made = cap * torch.tanh(np.exp(exponent) * product / cap)
            return float((wanted - centered(made)).square().sum())

        from scipy.optimize import minimize_scalar

        start = float(np.log(key.shape[-1] ** -0.5))
        grid = np.linspace(start - 4, start + 4, 33)
        best = float(grid[int(np.argmin([rest(x) for x in grid]))])
        found = minimize_scalar(rest, bounds=(best - 0.25, best + 0.25), method="bounded")
        scale, left = float(np.exp(found.x)), float(found.fun)
    if not left <= 1e-3 * size:
        raise SiteRefused(
            f"the logits of this layer are not a multiple of q.k ({left / size:.1%} of their "
            "spread is left); something is added to them, and directions cannot be learned here."
        )
    return scale


def rows_of(
    model: Model,
    asked: Sequence[Documents],
    layers: Sequence[SupportsIndex],
    answers: Optional[Sequence[Sequence[SupportsIndex]]] = None,
    batch_size: int = 4,
) -> dict[int, list[LayerRows]]:
    """The rows that decide the answers, for every prompt, in the given layers.

    `answers`: token ids per prompt; the gold answers for None.

    Raises `SiteRefused` where "q" or "k" cannot be read.
    """
    chosen = [int(layer) for layer in layers]
    cap = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    said = [list(one.answer) for one in asked] if answers is None else \
        [[int(token) for token in answer] for answer in answers]
    found: dict[int, list[LayerRows]] = {layer: [] for layer in chosen}
    sites = [f"{name}.{layer}" for layer in chosen for name in "qk"]
    group = model.n_heads // model.n_kv_heads
    for first in range(0, len(asked), batch_size):
        part = range(first, min(first + batch_size, len(asked)))
        longer, places = [], []
        for number in part:
            prompt, answer = asked[number].prompt, said[number]
            if not answer:
                raise PromptError(f"the answer to prompt {number} is empty: give its token ids.")
            segments = prompt.segments
            longer.append(type(prompt)(prompt.ids + tuple(answer), segments,
                                       inputs=prompt.inputs))
            places.append(list(range(len(prompt) - 1, len(prompt) - 1 + len(answer))))
        run = model.run(longer, read=sites, logits="none", batch_size=batch_size, stats=[
            PerLayer("segments", lambda i, layer, places=places: RowWeights(places[i]))])
        for i, number in enumerate(part):
            n, rows = len(longer[i]), places[i]
            for layer in chosen:
                weights = run.stats["segments"].isel(prompt=i).sel(layer=layer)
                query = run.reads[f"q.{layer}"].isel(prompt=i, layer=0, position=rows)
                key = run.reads[f"k.{layer}"].isel(prompt=i, layer=0, position=slice(0, n))
                a = torch.tensor(weights.values[:, : len(rows), :n])
                q = torch.tensor(query.values).movedim(0, 1)
                k = torch.tensor(key.values).movedim(0, 1).repeat_interleave(group, 0)
                scale = found[layer][0].scale if found[layer] else scale_of(a, q, k, cap)
                gold = asked[number].prompt.positions("gold")
                found[layer].append(LayerRows(a, q, k, gold, scale, cap))
    return found


def learn(
    model: Model,
    asked: Sequence[Documents],
    *,
    which: Which = "query",
    layers: Optional[Iterable[SupportsIndex]] = None,
    answers: Optional[Sequence[Sequence[SupportsIndex]]] = None,
    epochs: SupportsIndex = 10,
    learning_rate: SupportsFloat = 1e-3,
    seed: SupportsIndex = 0,
    memory: SupportsFloat = 2e9,
) -> Result:
    """Learn one direction per head that raises the attention on the gold document.

    Example:
        >>> import interp
        >>> from interp.organisms import reader
        >>> from interp.prompts import documents
        >>> model = interp.open_model("reader")
        >>> asked = documents.synthetic(reader, np.random.default_rng(0), (0, 1, 2), count=3)
        >>> found = learn(model, asked, layers=[1], learning_rate=0.01)
        >>> found["query"].dims, bool((found["after"] > found["before"]).all())
        (('layer', 'head', 'd_head'), True)

    Args:
        which: the offset to learn; the paper learns "both".
        layers: all for None; every layer is learned by itself, from the model as it is.
        answers: what is put behind the prompts; the gold answers for None. The paper takes the
            model's own answers to the prompts with the gold document only.
        epochs, learning_rate: of AdamW, one prompt per step.
        memory: bytes for keys and rows kept at once; layers are worked off in groups that fit.

    Returns:
        `query` and `key` [layer, head, d_head], zero where not learned; `before` and `after`
        [layer, head], mean attention on the gold document over `asked`; `loss` [layer, step].

    Raises:
        SiteRefused: see `scale_of`, or a model whose q and k cannot be read.

    Source: arXiv:2503.23306, released code `train_attn_only.py`: loss = - mean attention from the
    answer to the gold document over all heads of a layer; directions start at N(0, 0.01).
    """
    if which not in ("query", "key", "both"):
        raise ValueError(f"which must be 'query', 'key' or 'both', not {which!r}.")
    if not asked:
        raise PromptError("no documents to learn from: give at least one prompt.")
    wanted = list(range(model.n_layers)) if layers is None else sorted({int(x) for x in layers})
    longest = max(len(one.prompt) for one in asked)
    # Keys, repeated for grouped heads, are the largest part of what a layer keeps.
    bytes_each = 4 * longest * model.n_heads * (model.d_head + 4) * len(asked)
    step = max(1, int(float(memory) // bytes_each))
    parts = {name: np.zeros((len(wanted), model.n_heads, model.d_head), np.float32)
             for name in ("query", "key")}
    before, after = (np.zeros((len(wanted), model.n_heads)) for _ in range(2))
    loss = np.zeros((len(wanted), int(epochs)))
    for first in range(0, len(wanted), step):
        group = wanted[first : first + step]
        found = rows_of(model, asked, group, answers)
        for layer in group:
            slot, rows = wanted.index(layer), found.pop(layer)
            made, loss[slot] = _fit(rows, which, int(epochs), float(learning_rate),
                                    [int(seed), layer])
            for name, value in made.items():
                parts[name][slot] = value.numpy()
            with torch.no_grad():
                before[slot] = torch.stack([r.gold_mass(r.weights) for r in rows]).mean(0)
                after[slot] = torch.stack(
                    [r.gold_mass(r.moved(made.get("query"), made.get("key"))) for r in rows]
                ).mean(0)
    grid = ("layer", "head")
    data = xr.Dataset(
        {**{name: ((*grid, "d_head"), value) for name, value in parts.items()},
         "before": (grid, before), "after": (grid, after), "loss": (("layer", "step"), loss)},
        {"layer": wanted, "head": np.arange(model.n_heads)},
    )
    return Result(data, {
        **model.manifest(), "measure": "focus_directions", "which": which, "epochs": int(epochs),
        "learning_rate": float(learning_rate), "seed": int(seed), "n_prompts": len(asked),
    })


def _fit(
    rows: Sequence[LayerRows], which: str, epochs: int, learning_rate: float, seed: list[int]
) -> tuple[dict[str, Tensor], np.ndarray]:
    """The directions of one layer, and the mean loss of every epoch."""
    rng = np.random.default_rng(seed)
    shape = rows[0].query.shape[0], rows[0].query.shape[-1]
    names = ("query", "key") if which == "both" else (which,)
    made = {
        name: torch.tensor(rng.normal(0, INITIAL, shape), dtype=torch.float32, requires_grad=True)
        for name in names
    }
    optimizer = torch.optim.AdamW(made.values(), lr=learning_rate)
    history = []
    with torch.enable_grad():
        for _ in range(epochs):
            total = 0.0
            for number in rng.permutation(len(rows)):
                one = rows[int(number)]
                value = -one.gold_mass(one.moved(made.get("query"), made.get("key"))).mean()
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                total += float(value.detach())
            history.append(total / len(rows))
    return {name: value.detach() for name, value in made.items()}, np.array(history)


def focus(
    found: Result,
    heads: Union[HeadLike, Iterable[HeadLike]],
    strength: SupportsFloat = 0.2,
    phase: Phase = "all",
) -> tuple[EditSite, ...]:
    """Interventions that add `strength` times the query direction in these heads, at every token.

    Example:
        >>> data = xr.Dataset({"query": (("layer", "head", "d_head"), np.ones((2, 3, 4)))},
        ...                   {"layer": [0, 1]})
        >>> [str(one.site) for one in focus(Result(data), ["L0H2", "L1H0"], 0.3)]
        ['q.0', 'q.1']

    For `write=` of `model.run` and `model.generate`, together with any others. Key directions are
    not applied: they change nothing (see the head of this file).

    Args:
        strength: 0.2 and 0.3 in the released scripts; negative ones turn heads away.

    Raises:
        OutOfRange: a head that the model does not have.
        ValueError: a layer for which no direction was learned.
    """
    chosen = as_heads(heads)
    directions = found["query"]
    layers = [int(layer) for layer in directions["layer"].values]
    check_heads(chosen, max(layers) + 1, directions.sizes["head"])
    made = []
    for layer in sorted({head.layer for head in chosen}):
        if layer not in layers:
            raise ValueError(f"no direction was learned in layer {layer}; learned: {layers}.")
        value = np.zeros((1, *directions.shape[1:]), np.float32)
        for head in chosen:
            if head.layer == layer:
                value[0, head.head] = float(strength) * directions.sel(layer=layer)[head.head]
        made.append(edit(f"q.{layer}", "add", value, phase=phase))
    return tuple(made)
