"""What a model goes on to say after many places of one text, and the states it says it from.

One plain run of the text lends its keys and values; all continuations of all places are then rows
of one pass that see the text up to their place and themselves, at their own positions. A greedy
continuation of every place costs as many passes as it has tokens, not a run per place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.core import Prompt
from interp.core.errors import ModelRefused, OutOfRange, PromptError, SiteRefused
from interp.core.prompt import Where
from interp.models.block_calls import passing
from interp.models.lane_hf import no_earlier_picture
from interp.models.model import Model
from interp.models.resume import Resumable
from interp.models.sites import first_tensor, hidden_input


@dataclass(frozen=True)
class Futures:
    """Greedy continuations of many places, float32 on the CPU.

    Attributes:
        states: what enters block 0 (index 0) and what every block puts out at the place itself.
        tokens: the model's own next tokens.
        ahead: the last block's output from which each of them is read (before the final norm):
            at the place, then at every token of the continuation but the last.
    """

    states: Float[Tensor, "layer place d_model"]
    tokens: Int[Tensor, "place step"]
    ahead: Float[Tensor, "place step d_model"]


def greedy_futures(
    model: Model, prompt: Prompt, where: Where, steps: SupportsIndex = 4
) -> Futures:
    """The next `steps` greedy tokens after every chosen place of a text, from one run of it.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> found = greedy_futures(model, Prompt.from_tokens(range(3, 12)), [2, 4, 8], steps=3)
        >>> found.tokens.shape, found.states.shape[0] == 1 + model.n_layers
        (torch.Size([3, 3]), True)

    The same as running each beginning of the text by itself with `new_tokens`.

    Raises:
        PromptError: no room behind the text for the continuation of its last place.
        OutOfRange: a place that does not exist, or fewer than one step.
        ModelRefused: an encoder, or a model that cannot be resumed in the middle.
    """
    places, count, n = list(prompt.positions(where)), int(steps), len(prompt)
    if count < 1 or not places:
        raise OutOfRange(f"{count} token(s) after {len(places)} place(s): give at least one of each.")
    # Continuations stand at positions of the text: it is made long enough, which no place sees.
    filled = Prompt((*prompt.ids, *[prompt.ids[-1]] * max(0, places[-1] + count - n)),
                    inputs=prompt.inputs) if places[-1] + count > n else prompt
    base: Resumable = model.resumable(filled)
    if base.earliest(places[-1] + 1) != places[-1] + 1:
        raise PromptError("the text at these places sees what follows it, so nothing is ahead of it.")
    every = torch.arange(base.length, device=base.lane.device)[None]
    kept: dict[str, list[Tensor]] = {"resid_post": []}
    last = base.n_layers - 1
    logits = base.replay(last, every, logits="all", into=kept)[0]
    states = torch.stack([*(x[places] for x in base.hidden), kept["resid_post"][0][0, places]])
    tokens = torch.zeros(len(places), count, dtype=torch.long, device=logits.device)
    ahead = states.new_zeros(len(places), count, states.shape[-1])
    tokens[:, 0], ahead[:, 0] = logits[places].argmax(-1), states[-1]
    for some in _apart(places, count - 1):
        _continue(base, filled, [places[i] for i in some], some, tokens, ahead)
    return Futures(states.float().cpu(), tokens.cpu(), ahead.float().cpu())


def _apart(places: Sequence[int], gap: int) -> list[list[int]]:
    """Numbers of places, in sets whose members are at least `gap` positions from each other."""
    sets: list[list[int]] = []
    for number, place in enumerate(places):
        for one in sets:
            if place - places[one[-1]] >= gap:
                one.append(number)
                break
        else:
            sets.append([number])
    return sets


def _continue(
    base: Resumable, prompt: Prompt, places: list[int], numbers: list[int], tokens: Tensor,
    ahead: Tensor,
) -> None:
    """Fill in tokens and states of these places after the first."""
    device = tokens.device
    context = torch.arange(max(places) + 1, device=device)
    at = torch.tensor(places, device=device)
    ids = torch.tensor(prompt.ids, device=device)
    for step in range(1, tokens.shape[1]):
        rows = (at[:, None] + torch.arange(1, step + 1, device=device)).reshape(-1)
        ids[rows] = tokens[numbers, :step].reshape(-1)
        owner = torch.arange(len(places), device=device).repeat_interleave(step)
        cut = torch.cat([context[None] > at[owner][:, None], owner[:, None] != owner[None]], 1)
        into: dict[str, list[Tensor]] = {"resid_post": []}
        logits = base.replay(
            0, rows[None], context=context, hidden=_entering(base, ids, prompt)[rows][None],
            blocked=lambda layer, cut=cut: cut[None, None], logits="all", into=into)
        ends = torch.arange(step - 1, len(rows), step, device=device)
        tokens[numbers, step] = logits[0, ends].argmax(-1)
        ahead[numbers, step] = into["resid_post"][-1][0, ends].to(ahead)


class _Reached(Exception):
    """Block 0 was reached, and nothing more is needed."""


def _entering(base: Resumable, ids: Int[Tensor, "position"], prompt: Prompt) -> Tensor:
    """What enters block 0 for these tokens: embeddings, with whatever is done to them before."""
    return embedded(base.lane, ids[None], base.lane._inputs([prompt]))[0]


def embedded(lane: Any, ids: Int[Tensor, "batch position"], inputs: dict) -> Tensor:
    """What enters block 0, without running a block, `[batch, position, d_model]`."""
    found: list[Tensor] = []

    def stop(module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = hidden_input(args, kwargs)
        assert given is not None
        found.append(given.detach())
        raise _Reached

    handle = lane.blocks[0].module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad(), no_earlier_picture(lane.hf):
            lane._call(ids.to(lane.device), inputs, {"use_cache": False})
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


class Readout:
    """States as the last block puts them out, to logits: the model's own norm, head, cap and scale.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> run = model.run(Prompt.from_tokens(range(3, 9)), read="resid_post.0")
        >>> state = torch.tensor(run.reads["resid_post.0"].values[0, 0])
        >>> bool(torch.allclose(Readout(model)(state), run.logits[0], atol=1e-4))
        True

    Differentiable in the states, with the weights frozen. Any leading axes; float32 on the states'
    device. `batch_size` rows go through the head at a time.

    Raises:
        ModelRefused: a model without a vocabulary head. SiteRefused: another lane than "hf".
    """

    def __init__(self, model: Model, batch_size: SupportsIndex = 256) -> None:
        if model.lane != "hf":
            raise SiteRefused(f"this needs lane 'hf', not {model.lane!r}: use model.using('hf').")
        self.lane, self.batch_size = model._engine("hf"), int(batch_size)
        self.d_vocab, self._tuples = model.d_vocab, []
        handles = [block.module.register_forward_hook(
            lambda m, args, out: self._tuples.append(isinstance(out, tuple)))
            for block in self.lane.blocks]
        try:
            with torch.no_grad(), no_earlier_picture(self.lane.hf):
                ids = torch.tensor([model._probe()], device=self.lane.device)
                out = self.lane._call(ids, {}, {"use_cache": False})
        finally:
            for handle in handles:
                handle.remove()
        if getattr(out, "logits", None) is None:
            raise ModelRefused(f"{model.name} has no vocabulary head to read states with.")

    def __call__(self, states: Float[Tensor, "*row d_model"]) -> Float[Tensor, "*row vocab"]:
        flat = states.reshape(-1, states.shape[-1])
        parts = [self._read(part) for part in flat.split(self.batch_size)]
        made = torch.cat(parts) if parts else flat.new_zeros(0, self.d_vocab)
        return made.reshape(*states.shape[:-1], made.shape[-1])

    def _read(self, rows: Tensor) -> Tensor:
        weight = next(self.lane.hf.parameters())
        # One position each: many rows are no long text, of which a model may read only so much.
        x = rows.to(weight)[:, None]
        ids = torch.zeros(x.shape[:2], dtype=torch.long, device=weight.device)
        with (no_earlier_picture(self.lane.hf), passing(self.lane.blocks, self._tuples, x),
              frozen_weights(self.lane.hf)):
            return self.lane._call(ids, {}, {"use_cache": False}).logits[:, 0].float().to(rows.device)


@contextmanager
def frozen_weights(hf: nn.Module) -> Iterator[None]:
    """Weights that ask for no gradients, so that none are computed or kept."""
    asked = [p for p in hf.parameters() if p.requires_grad]
    try:
        for p in asked:
            p.requires_grad_(False)
        yield
    finally:
        for p in asked:
            p.requires_grad_(True)


def carried_logits(
    model: Model,
    prefix: Float[Tensor, "prefix d_model"],
    states: Optional[Float[Tensor, "batch d_model"]],
    layer: SupportsIndex,
    tokens: Int[Tensor, "batch step"],
) -> Float[Tensor, "batch read vocab"]:
    """Logits after a soft prompt whose last position carries a foreign state from `layer` on.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prefix = torch.randn(4, model.d_model, requires_grad=True)
        >>> tokens = torch.tensor([[5, 6], [7, 8]])
        >>> logits = carried_logits(model, prefix, torch.randn(2, model.d_model), 1, tokens)
        >>> logits.shape[:2], torch.autograd.grad(logits.sum(), prefix)[0].shape == prefix.shape
        (torch.Size([2, 3]), True)

    Args:
        prefix: what enters block 0 at the first positions, the same for the batch.
        states: what the last of these positions holds after block `layer` (after the embedding for
            -1) in place of its own; None leaves its own.
        tokens: what follows, as ordinary tokens; may be none.

    Returns the rows from the last prefix position on: one more than tokens. Differentiable in
    `prefix` and `states`; the weights are frozen.

    Raises:
        OutOfRange: a layer that does not exist. SiteRefused: another lane than "hf".
    """
    number, length = int(layer), len(prefix)
    if not -1 <= number < model.n_layers:
        raise OutOfRange(f"layer {number} does not exist: there are -1 (embedding) to "
                         f"{model.n_layers - 1}.")
    if model.lane != "hf":
        raise SiteRefused(f"this needs lane 'hf', not {model.lane!r}: use model.using('hf').")
    lane = model._engine("hf")
    ids = torch.cat([tokens.new_full((len(tokens), length), model._probe()[0]), tokens], 1)

    def put(x: Tensor, at: slice, values: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(len(ids), ids.shape[1], shape[-1]).clone()
        x[:, at] = values.to(x)
        return x.reshape(shape)

    carrying = slice(length - 1, length)

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> Any:
        given = hidden_input(args, kwargs)
        assert given is not None
        new = put(given, slice(0, length), prefix)
        if states is not None and number == -1:
            new = put(new, carrying, states[:, None])
        if args and args[0] is given:
            return (new, *args[1:]), kwargs
        return args, {k: new if v is given else v for k, v in kwargs.items()}

    def leave(module: nn.Module, args: tuple, output: Any) -> Any:
        x = first_tensor(output)
        assert x is not None and states is not None
        new = put(x, carrying, states[:, None])
        return new if isinstance(output, Tensor) else (new, *output[1:])

    handles = [lane.blocks[0].module.register_forward_pre_hook(enter, with_kwargs=True)]
    if states is not None and number >= 0:
        handles.append(lane.blocks[number].module.register_forward_hook(leave))
    try:
        with frozen_weights(lane.hf), no_earlier_picture(lane.hf):
            out = lane._call(ids.to(lane.device), {}, {
                "use_cache": False, "logits_to_keep": tokens.shape[1] + 1})
    finally:
        for handle in handles:
            handle.remove()
    return out.logits[:, -tokens.shape[1] - 1:].float()
