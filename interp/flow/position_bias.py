"""Position bias: the same documents in another order, and another answer.

Paper     arXiv:2407.01100
Question  How much does the answer's probability depend on the order of interchangeable documents?
Measure   variance of p(answer) over orders of the documents
Cause     reading them so that their order cannot matter: none sees another, all begin at the same
          position. A simplification: PINE lets documents see each other, and sorts them by
          importance for every query document, head and layer
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import ModelRefused, Prompt, PromptError, Result, Segment
from interp.figures.style import color, note, style
from interp.models.model import Model
from interp.prompts.documents import Documents


def orders(
    count: SupportsIndex, most: SupportsIndex = 24, seed: SupportsIndex = 0
) -> tuple[tuple[int, ...], ...]:
    """All orders of `count` documents, or the cyclic ones where there are more than `most`.

    Example:
        >>> orders(2), len(orders(4)), orders(5)[1]
        (((0, 1), (1, 0)), 24, (1, 2, 3, 4, 0))

    More cyclic ones than `most` are drawn from; the first is always the given order.
    """
    n, limit = int(count), int(most)
    every = 1
    for k in range(2, n + 1):
        every *= k
    if every <= limit:
        return tuple(itertools.permutations(range(n)))
    turns = [tuple((i + shift) % n for i in range(n)) for shift in range(n)]
    if n <= limit:
        return tuple(turns)
    drawn = np.random.default_rng(int(seed)).choice(np.arange(1, n), limit - 1, replace=False)
    return tuple(turns[i] for i in (0, *sorted(int(x) for x in drawn)))


def reorder(asked: Documents, order: Sequence[SupportsIndex]) -> Prompt:
    """The same prompt with its documents in another order; `order[slot]` is a document's number.

    Example:
        >>> from interp.organisms import reader
        >>> from interp.prompts.documents import synthetic
        >>> made = synthetic(reader, np.random.default_rng(0), (0,), count=3, words=9)[0]
        >>> turned = reorder(made, (2, 0, 1))
        >>> turned.positions("document_0") == made.document(0), turned.positions("gold")[0]
        (True, 10)

    Tokens are moved as they are (a document's own number goes with it); what stands between the
    documents stays. "document_i" names the slot i of the new order, all other segments follow their
    tokens.

    Raises:
        PromptError: not an order of the documents, a document in pieces, or a prompt with pictures.
    """
    prompt, new = asked.prompt, [int(i) for i in order]
    if sorted(new) != list(range(asked.count)):
        raise PromptError(f"{new} is no order of {asked.count} documents.")
    if prompt.inputs:
        raise PromptError("a prompt with further inputs (a picture) cannot be put in another order.")
    spans = [asked.document(i) for i in range(asked.count)]
    for number, span in enumerate(spans):
        if span != tuple(range(span[0], span[-1] + 1)):
            raise PromptError(f"document {number} is not one piece, so it cannot be moved.")
    places: list[int] = list(range(spans[0][0]))
    for slot, number in enumerate(new):
        places += spans[number]
        end = spans[slot + 1][0] if slot + 1 < asked.count else len(prompt)
        places += range(spans[slot][-1] + 1, end)
    where = {old: now for now, old in enumerate(places)}
    slots = {f"document_{number}": f"document_{slot}" for slot, number in enumerate(new)}
    segments = tuple(
        Segment(slots.get(s.name, s.name), tuple(sorted(where[p] for p in s.positions)), s.kind)
        for s in prompt.segments)
    tokens = tuple(prompt.tokens[p] for p in places) if prompt.tokens else ()
    return replace(prompt, ids=tuple(prompt.ids[p] for p in places), segments=segments, text="",
                   tokens=tokens)


def order_free_logits(
    model: Model, prompt: Prompt, count: SupportsIndex
) -> Float[Tensor, "vocab"]:
    """The last row when documents are read side by side: their order cannot matter.

    No document sees another, all begin at the same position, what follows sees all of them from
    behind the longest one. What stands between documents is seen by nobody.

    Raises:
        ModelRefused: models that cannot be resumed, or that add positions to their embeddings.
    """
    _check_positions(model, prompt)
    return _side_by_side(model, prompt, int(count))


def _check_positions(model: Model, prompt: Prompt) -> None:
    token = model.resumable(Prompt.from_tokens([prompt.ids[0]] * 3)).hidden[0]
    if not torch.allclose(token[1], token[2], atol=1e-6):
        raise ModelRefused(
            f"{model.name} adds positions to its embeddings, so documents cannot be read side by "
            "side at the same positions."
        )


def _side_by_side(model: Model, prompt: Prompt, count: int) -> Tensor:
    base = model.resumable(prompt)
    spans = [prompt.segment(f"document_{i}").positions for i in range(count)]
    begin, end = spans[0][0], spans[-1][-1] + 1
    longest = max(map(len, spans))
    n = len(prompt)
    member = torch.full((n,), -1)
    member[begin:end] = len(spans)  # what stands between documents
    ids = torch.arange(n)
    ids[begin:end] = begin
    for number, span in enumerate(spans):
        member[list(span)] = number
        ids[list(span)] = begin + torch.arange(len(span))
    ids[end:] = begin + longest + torch.arange(n - end)
    key, query = member[None, :], member[:, None]
    cut = (key >= 0) & (query >= 0) & (key != query)
    cut |= (key == len(spans)) & ~torch.eye(n, dtype=torch.bool)
    rows = torch.arange(n)[None]
    return base.replay(0, rows, positions=ids[None], blocked=lambda _: cut[None, None])[0].float()


def measure(
    model: Model, asked: Sequence[Documents], most: SupportsIndex = 24, *, order_free: bool = False,
    batch_size: SupportsIndex = 8,
) -> Result:
    """Probability of the answer's first token in every order of the documents.

    Example:
        >>> import interp
        >>> from interp.organisms import reader
        >>> from interp.prompts.documents import synthetic
        >>> made = synthetic(reader, np.random.default_rng(0), (0, 1), count=2, words=9)
        >>> measure(interp.open_model("reader"), made)["p"].shape
        (2, 2)

    Args:
        most: orders per prompt; see `orders`.
        order_free: read documents side by side (`order_free_logits`), the order being given.

    Returns:
        [prompt, order]: `p`, `log_p`, `right` (the answer's token is the likeliest), `slot` (of the
        gold document); [prompt]: `variance` of p over orders.

    Source: arXiv:2407.01100.
    """
    given = list(asked)
    if not given or len({one.count for one in given}) > 1:
        raise PromptError("orders need prompts with equally many documents, at least one.")
    chosen = orders(given[0].count, most)
    shape = (len(given), len(chosen))
    log_p, right, slot = np.zeros(shape), np.zeros(shape), np.zeros(shape, dtype=int)
    for number, one in enumerate(given):
        turned = [reorder(one, order) for order in chosen]
        if order_free:
            if not number:
                _check_positions(model, one.prompt)
            last = [_side_by_side(model, prompt, one.count) for prompt in turned]
        else:
            run = model.run(turned, logits="last", batch_size=int(batch_size))
            last = [rows[-1].float() for rows in run.logits]
        for at, (row, order) in enumerate(zip(last, chosen)):
            log_p[number, at] = float(row.double().log_softmax(-1)[one.answer[0]])
            right[number, at] = float(int(row.argmax()) == one.answer[0])
            slot[number, at] = order.index(one.place)
    dims = ("prompt", "order")
    data = xr.Dataset({"p": (dims, np.exp(log_p)), "log_p": (dims, log_p), "right": (dims, right),
                       "slot": (dims, slot), "variance": ("prompt", np.exp(log_p).var(1))})
    return Result(data, {**model.manifest(), "measure": "order of documents",
                         "order_free": order_free, "orders": [list(order) for order in chosen],
                         "prompts": [one.prompt.digest() for one in given]})


@style()
def draw(found: Result, free: Result, ax: Axes) -> Axes:
    """p(answer) of every prompt over the orders of its documents; in gray where order cannot matter."""
    number = np.argsort(found["p"].mean("order").values)
    for result, hue, label, aside in ((free, color("control"), "order-free reading", 0.12),
                                      (found, color("primary"), "as it is", -0.12)):
        p = result["p"].values[number]
        x = np.repeat(np.arange(len(p)) + aside, p.shape[1])
        ax.plot(x, p.ravel(), ".", color=hue, markersize=4, alpha=0.6, label=label)
    ax.set_xlabel("prompt, by mean p")
    ax.set_ylabel("p(answer)")
    ax.set_ylim(-0.03, 1.03)
    ax.legend()
    note(ax, f"{found.data.sizes['order']} orders each")
    return ax
