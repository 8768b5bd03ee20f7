"""All-for-One: how late, and in how few layers, a task's tokens have to meet.

Paper     arXiv:2509.09650
Question  Can every token wait for the first layers, knowing only itself, and the last token then read
          all others in a few layers and be left alone?
Measure   accuracy on what the model answers right (faithfulness), with context-aware mean states
          entering a block (waiting), and with attention cut to self and the first token except for
          the last position in a window of layers (peeking)
Cause     the measure is an intervention; other ways to replace states, other windows and the model
          without this attention are its controls
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from interp.causal.context_mean import REPLACEMENTS, ContextMeans
from interp.core import ModelRefused, OutOfRange, Prompt, PromptError, Result
from interp.figures.style import CYCLE, color, note, style
from interp.models.model import Model

THRESHOLD = 0.95
"""Faithfulness that counts as unharmed: this toolkit's choice."""
LABELS = {"cama": "CAMA (context-aware mean)", "cama_resample": "CAMA, resampled"}


@dataclass(frozen=True)
class SlotTask:
    """Prompts of one template, with an answer of one token each.

    `pool` are prompts of the same template whose slots were drawn independently of each other; they
    need no answer.
    """

    name: str
    prompts: Int[np.ndarray, "prompt position"]
    answers: Int[np.ndarray, "prompt"]
    pool: Int[np.ndarray, "context position"]
    what: str = ""


class Subgraph:
    """A task's prompts in a model whose tokens first wait and then only the last one reads.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> ids = np.random.default_rng(0).integers(3, 6, (30, 7))
        >>> ids[:, 0] = 0
        >>> task = SlotTask("copies", ids[:5], ids[:5, -1], ids)
        >>> graph = Subgraph(model, task)
        >>> right, logprob = graph.waiting(1)
        >>> right.shape, graph.peeking(1, graph.windows([(1, 2), (2, 1)]))[0].shape
        ((5,), (5, 2))

    Args:
        bos: "keep": every position may always attend to position 0; "cut": only to itself.

    Raises:
        PromptError: position 0 differs from prompt to prompt and is to be kept, or a token that the
            pool does not have.
        ModelRefused: models that cannot be resumed in the middle, or whose blocks are given more
            about a prompt than the residual stream.
    """

    def __init__(
        self, model: Model, task: SlotTask, *, means: Optional[ContextMeans] = None,
        bos: str = "keep", batch_size: SupportsIndex = 64,
    ) -> None:
        if bos not in ("keep", "cut"):
            raise PromptError(f"position 0 is to be 'keep' or 'cut', not {bos!r}.")
        if bos == "keep" and len(set(task.prompts[:, 0].tolist())) > 1:
            raise PromptError("the prompts begin with different tokens, so position 0 cannot be kept "
                              "for all of them; use bos='cut'.")
        self.model, self.task, self.bos, self.batch_size = model, task, bos, int(batch_size)
        self.means = means or ContextMeans(model, task.pool)
        self.n = task.prompts.shape[1]
        # Position 0 has no past, so where it is kept it is what it is in the plain run.
        self.first = int(bos == "keep")
        self.always = [0, self.n - 1] if self.first else [self.n - 1]
        self.cells = self.means.at(task.prompts)
        self.answers = torch.from_numpy(np.asarray(task.answers))
        self.base = model.resumable(Prompt.from_tokens(task.prompts[0]))
        self._met: dict[int, tuple[dict[int, int], list[Tensor], list[Tensor]]] = {}
        run = model.run([Prompt.from_tokens(row) for row in task.prompts], read="embed",
                        logits="last", batch_size=self.batch_size)
        self.embedded = torch.tensor(run.reads["embed"].values).reshape(
            len(task.prompts), self.n, -1)
        logits = torch.stack([row[-1] for row in run.logits])
        self.right = (logits.argmax(-1) == self.answers).numpy()
        found = self._all_rows(0, self.embedded, None)
        if float((found - logits).abs().max()) > model._tolerance() * float(logits.abs().max()):
            raise ModelRefused(
                f"the blocks of {model.architecture} are given more about a prompt than its residual "
                "stream, so states cannot be exchanged between prompts here."
            )

    # -- whole runs --------------------------------------------------------------------------------

    def _all_rows(
        self, layer: int, hidden: Float[Tensor, "prompt position d_model"],
        cut: Optional[Bool[Tensor, "layer query key"]],
    ) -> Float[Tensor, "prompt vocab"]:
        """All positions from a block on, on other states; `cut` edges by layer."""
        found = []
        for part in hidden.split(self.batch_size):
            rows = torch.arange(self.n).expand(len(part), -1)
            blocked = None if cut is None else (lambda number: cut[number][None, None])
            found.append(self.base.replay(layer, rows, hidden=part, blocked=blocked).float().cpu())
        return torch.cat(found)

    def _read_off(self, logits: Float[Tensor, "... vocab"]) -> tuple[np.ndarray, np.ndarray]:
        """Whether the answer is the first choice, and its log probability, per prompt."""
        answers = self.answers.reshape(-1, *[1] * (logits.ndim - 1))
        own = logits.log_softmax(-1).gather(-1, answers.expand(*logits.shape[:-1], 1))[..., 0]
        return (logits.argmax(-1) == answers[..., 0]).numpy(), own.numpy()

    def waiting(
        self, layer: SupportsIndex, by: str = "cama", seed: SupportsIndex = 0
    ) -> tuple[Bool[np.ndarray, "prompt"], Float[np.ndarray, "prompt"]]:
        """Right or not, and log probability, when other states enter a block; then all goes on."""
        rng = np.random.default_rng(int(seed))
        hidden = self.means.entering(layer, self.task.prompts, by, rng)
        right, own = self._read_off(self._all_rows(int(layer), hidden, None))
        return right, own

    def without_reading(
        self, layers: Sequence[SupportsIndex]
    ) -> tuple[Bool[np.ndarray, "prompt"], Float[np.ndarray, "prompt"]]:
        """The whole model, but in these layers the last position reads only itself and `bos`."""
        cut = torch.zeros(self.base.n_layers, self.n, self.n, dtype=torch.bool)
        cut[[int(layer) for layer in layers], -1] = True
        cut[:, -1, self.always] = False
        right, own = self._read_off(self._all_rows(0, self.embedded, cut))
        return right, own

    def masked_run(
        self, wait: SupportsIndex, window: tuple[int, int]
    ) -> Float[Tensor, "prompt vocab"]:
        """The subgraph as it is defined: all positions, with masks. `peeking` is its short form."""
        first = int(wait)
        cut = ~torch.eye(self.n, dtype=torch.bool).repeat(self.base.n_layers, 1, 1)
        if self.bos == "keep":
            cut[..., 0] = False
        cut[window[0] : sum(window), -1] = False
        return self._all_rows(first, self.means.entering(first, self.task.prompts), cut)

    # -- the short form ----------------------------------------------------------------------------

    def _meeting(self, wait: int) -> tuple[dict[int, int], list[Tensor], list[Tensor]]:
        """Keys and values of every (position, token) that waited, from block `wait` on.

        Such a token sees itself and position 0 alone, so it is the same in every prompt that has it.
        """
        if wait not in self._met:
            unique = sorted(set(self.cells[:, self.first : -1].flatten().tolist()))
            places = {cell: t for (t, _), cell in self.means.cells.items()}
            keys: list[list[Tensor]] = [[] for _ in range(wait, self.base.n_layers)]
            values: list[list[Tensor]] = [[] for _ in keys]
            for start in range(0, len(unique), self.batch_size):
                part = unique[start : start + self.batch_size]
                into: dict[str, list[Tensor]] = {"k": [], "v": []}
                self.base.replay(
                    wait, torch.tensor([[places[cell]] for cell in part]),
                    context=torch.arange(self.first), into=into, until=self.base.n_layers,
                    hidden=self.means.mean[wait][part][:, None])
                for number in range(len(keys)):
                    keys[number].append(into["k"][number][:, 0].cpu())
                    values[number].append(into["v"][number][:, 0].cpu())
            order = {cell: number for number, cell in enumerate(unique)}
            self._met[wait] = (order, [torch.cat(x) for x in keys], [torch.cat(x) for x in values])
        return self._met[wait]

    def windows(self, windows: Sequence[tuple[int, int]]) -> Bool[Tensor, "variant layer head"]:
        """Layers in which the last position peeks, for windows given as (first layer, length)."""
        peeks = torch.zeros(len(windows), self.base.n_layers, 1, dtype=torch.bool)
        for row, (start, length) in enumerate(windows):
            if not 0 <= start <= start + length <= self.base.n_layers:
                raise OutOfRange(f"no window of {length} layers from layer {start} on: there are "
                                 f"layers 0 to {self.base.n_layers - 1}.")
            peeks[row, start : start + length] = True
        return peeks

    def peeking(
        self, wait: SupportsIndex, peeks: Bool[Tensor, "variant layer #head"]
    ) -> tuple[Bool[np.ndarray, "prompt variant"], Float[np.ndarray, "prompt variant"]]:
        """Right or not, and log probability, when tokens wait until block `wait` and the last
        position peeks where `peeks` says (by head, or for all): one row per variant, exact."""
        logits = self.peeking_logits(int(wait), peeks, self._read_off_one)
        right, own = (np.stack(x) for x in zip(*logits))
        return right, own

    def _read_off_one(self, number: int, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
        answer = self.answers[number]
        return (logits.argmax(-1) == answer).numpy(), logits.log_softmax(-1)[:, answer].numpy()

    def peeking_logits(
        self, wait: int, peeks: Bool[Tensor, "variant layer #head"], then: Any = None
    ) -> list[Any]:
        """Per prompt the logits `[variant, vocab]`, or what `then(prompt, logits)` makes of them."""
        order, keys, values = self._meeting(wait)
        states = self.means.mean[wait][self.cells[:, -1]]
        other = torch.ones(self.n, dtype=torch.bool)
        other[self.always] = False
        context, found = torch.arange(self.n - 1), []
        for number, cells in enumerate(self.cells[:, self.first : -1].tolist()):
            own = [order[cell] for cell in cells]
            lent = copy.copy(self.base)
            lent.keys, lent.values, lent.spent = list(self.base.keys), list(self.base.values), 0
            for layer in range(wait, lent.n_layers):
                for name, cache in (("keys", keys), ("values", values)):
                    kept = getattr(lent, name)
                    new = cache[layer - wait][own].transpose(0, 1).to(kept[layer])
                    # The last position brings its own: what stands at its place is not read.
                    kept[layer] = torch.cat([kept[layer][:, : self.first], new, new[:, :1]], 1)
            parts = []
            for some in peeks.split(self.batch_size):
                cut = ~some[..., None, None] & other
                parts.append(lent.replay(
                    wait, torch.full((len(some), 1), self.n - 1), context=context,
                    hidden=states[number].expand(len(some), 1, -1),
                    blocked=lambda layer, cut=cut: cut[:, layer]).float().cpu())
            self.base.spent += lent.spent
            logits = torch.cat(parts)
            found.append(logits if then is None else then(number, logits))
        return found


def faithfulness(
    right: Bool[np.ndarray, "*any prompt"] | Float[np.ndarray, "*any prompt"],
    full: Bool[np.ndarray, "prompt"],
) -> Any:
    """The share of right answers among the prompts that the whole model gets right.

    Example:
        >>> float(faithfulness(np.array([True, False, True]), np.array([True, True, False])))
        0.5
    """
    if not full.any():
        raise PromptError("the model gets no prompt right, so there is nothing to be faithful to.")
    return np.asarray(right, dtype=float)[..., np.asarray(full)].mean(-1)


def longest_wait(curve: Float[np.ndarray, "layer"], threshold: SupportsFloat = THRESHOLD) -> int:
    """L_wait: the last block that can be entered so, with all before it, still faithfully.

    Example:
        >>> longest_wait(np.array([1.0, 0.97, 0.4, 0.96]))
        1

    It is also the number of blocks that were waited through; 0 where none was.
    """
    below = np.flatnonzero(np.asarray(curve) < float(threshold))
    return max(0, (int(below[0]) if len(below) else len(curve)) - 1)


def shortest_window(
    table: Float[np.ndarray, "start length"], threshold: SupportsFloat = THRESHOLD
) -> Optional[tuple[int, int]]:
    """(first layer, length) of the shortest window that is faithful, the best of its length.

    Example:
        >>> table = np.array([[0.1, 0.2, 0.3], [0.1, 0.5, 0.99], [0.1, 0.97, np.nan]])
        >>> shortest_window(table)
        (2, 1)

    Rows are first layers, columns lengths from 0 on; None if no window is faithful.
    """
    values = np.where(np.isnan(table), -1.0, table)
    for length in range(values.shape[1]):
        if values[:, length].max() >= float(threshold):
            return int(values[:, length].argmax()), length
    return None


def measure(
    model: Model, task: SlotTask, *, threshold: SupportsFloat = THRESHOLD, bos: str = "keep",
    by: Sequence[str] = REPLACEMENTS, graph: Optional[Subgraph] = None,
) -> Result:
    """The search: the longest wait, then the shortest window in which the last token must peek.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> ids = np.random.default_rng(0).integers(3, 6, (30, 7))
        >>> ids[:, 0] = 0
        >>> said = [int(row[-1].argmax()) for row in model.run(
        ...     [Prompt.from_tokens(row) for row in ids[:5]]).logits]
        >>> found = measure(model, SlotTask("anything", ids[:5], np.array(said), ids))
        >>> found["waiting"].dims, float(found["full"].mean())
        (('by', 'layer', 'prompt'), 1.0)

    Args:
        by: the ways to replace the states that enter a block; "cama" is always among them.
        graph: the task in the model, to be shared between calls.

    Returns:
        [prompt]: `full`; [by, layer, prompt]: `waiting` (right or not, states replaced when entering
        the layer); [start, length, prompt]: `transfer`, at the longest wait of "cama" (NaN where
        there is no such window; length 0 peeks nowhere); [layer]: `norm_ratio` of the means. The
        scalars `wait`, `first` and `layers` hold what was found on the prompts that the model gets
        right (-1: no window). `prefills` is the cost of the table of windows in plain passes,
        `naive_prefills` (manifest) what whole passes would take.

    Raises:
        PromptError: the model gets no prompt right, or see `Subgraph`.
    """
    graph = graph or Subgraph(model, task, bos=bos)
    names, full = list(dict.fromkeys(["cama", *by])), graph.right
    waiting = np.array([[graph.waiting(layer, one)[0] for layer in range(model.n_layers)]
                        for one in names], float)
    wait = longest_wait(faithfulness(waiting[0], full), threshold)
    graph.base.spent = 0
    table = transfer(graph, wait)
    found = shortest_window(faithfulness(table, full), threshold)
    first, layers = (-1, -1) if found is None else found
    data = xr.Dataset(
        {"full": ("prompt", full), "waiting": (("by", "layer", "prompt"), waiting),
         "transfer": (("start", "length", "prompt"), table),
         "norm_ratio": graph.means.norm_ratio(), "wait": wait, "first": first, "layers": layers,
         "prefills": graph.base.spent / graph.base.prefill},
        {"by": names, "layer": range(model.n_layers), "start": range(model.n_layers),
         "length": range(model.n_layers + 1)},
    )
    windows = (model.n_layers - wait) * (model.n_layers - wait + 1) // 2 + 1
    return Result(data, {
        **model.manifest(), "measure": "all_for_one", "task": task.name, "threshold": float(threshold),
        "bos": graph.bos, "contexts": len(task.pool), "naive_prefills": windows * len(full),
        "removal": "replace_cama", "decode": "not measured",
    })


def transfer(graph: Subgraph, wait: SupportsIndex) -> Float[np.ndarray, "start length prompt"]:
    """Right or not for every window after a wait; length 0 is no peeking at all, whatever start."""
    n, wait = graph.base.n_layers, int(wait)
    windows = [(wait, 0), *((start, length) for start in range(wait, n)
                            for length in range(1, n - start + 1))]
    table = np.full((n, n + 1, len(graph.right)), np.nan)
    right, _ = graph.peeking(wait, graph.windows(windows))
    for column, (start, length) in enumerate(windows):
        table[start, length] = right[:, column]
    table[wait:, 0] = table[wait, 0]
    return table


def ablate_peeking(graph: Subgraph, wait: SupportsIndex, window: tuple[int, int]) -> Result:
    """What the window is made of: each of its layers left out, then more and more of its heads.

    Returns:
        [layer, prompt]: `without`, right or not when the last token does not peek in this layer of
        the window; [removed, prompt]: `pruned`, with the least important heads of the window removed
        (from peeking, not altogether); [rank]: `pruned_layer`, `pruned_head`, least important first.
        A head's importance is the mean loss of the answer's log probability without it, over the
        even prompts; `judged` [prompt] are the odd ones.
    """
    start, length = window
    layers = list(range(start, start + length))
    n_heads = graph.model.n_heads
    every = graph.windows([window]).repeat(1, 1, n_heads)
    left_out = every.repeat(length, 1, 1)
    for row, layer in enumerate(layers):
        left_out[row, layer] = False
    without, _ = graph.peeking(wait, left_out)
    heads = [(layer, head) for layer in layers for head in range(n_heads)]
    single = every.repeat(len(heads) + 1, 1, 1)
    for row, (layer, head) in enumerate(heads):
        single[row, layer, head] = False
    _, own = graph.peeking(wait, single)
    even = np.arange(len(own)) % 2 == 0
    chosen = even & graph.right if (even & graph.right).any() else graph.right
    loss = (own[chosen, -1:] - own[chosen, :-1]).mean(0)
    order = [heads[i] for i in np.argsort(loss, kind="stable")]
    fewer = every.repeat(len(heads) + 1, 1, 1)
    for row, (layer, head) in enumerate(order):
        fewer[row + 1 :, layer, head] = False
    pruned, _ = graph.peeking(wait, fewer)
    data = xr.Dataset(
        {"without": (("layer", "prompt"), without.T.astype(float)),
         "pruned": (("removed", "prompt"), pruned.T.astype(float)),
         "pruned_layer": ("rank", [layer for layer, _ in order]),
         "pruned_head": ("rank", [head for _, head in order]),
         "judged": ("prompt", ~even), "full": ("prompt", graph.right)},
        {"layer": layers, "removed": range(len(heads) + 1)})
    return Result(data, {**graph.model.manifest(), "measure": "ablate_peeking", "wait": int(wait),
                         "window": list(window), "task": graph.task.name, "bos": graph.bos})


@style()
def draw(found: Result, ax: Axes) -> Axes:
    """Faithfulness by the layer that is waited for, one line per way to replace states."""
    full = found["full"].values.astype(bool)
    for number, name in enumerate(map(str, found["by"].values)):
        curve = faithfulness(found["waiting"].sel(by=name).values, full)
        ax.plot(found["layer"], curve, "-o" if name == "cama" else "--", label=LABELS.get(name, name),
                color=CYCLE[number % len(CYCLE)], zorder=3 if name == "cama" else 2)
    threshold = found.manifest["threshold"]
    ax.axhline(threshold, color=color("control"), linewidth=0.8, linestyle=":",
               label=f"threshold {threshold:g}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("layer entered")
    ax.set_ylabel("faithfulness (share)")
    ax.set_ylim(-0.03, 1.05)
    ax.legend()
    note(ax, f"n = {int(full.sum())} prompts")
    return ax
