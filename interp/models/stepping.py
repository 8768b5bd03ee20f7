"""Decoding one token at a time, with the next token chosen from outside: several streams at once.

Every stream is a prompt with its own interventions and its own cache: the model's view of a
picture, and a second view of it to decode against, say. Streams of equal shape share a pass.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional, SupportsIndex, Union

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.core.errors import ModelRefused, NumericalError, OutOfRange, PromptError, SiteRefused
from interp.core.prompt import Prompt
from interp.core.site import Site, check_layers
from interp.models import attention as attend
from interp.models.edits import Edits, Pass
from interp.models.model import Model, _batches
from interp.models.run import Reads


class Stepping:
    """Streams that are decoded side by side; made by `Model.stepping`.

    Attributes:
        logits: `[stream, vocab]`, float32: what every stream says about its next token.
        fed: the tokens fed so far, per stream.
    """

    def __init__(
        self, hf: nn.Module, lane: Any, prompts: Sequence[Prompt], edits: Sequence[Edits],
        groups: Sequence[Sequence[int]], read: Sequence[Site], max_positions: Optional[int],
        d_vocab: int, gradients: Sequence[int] = (), tail: int = 0,
    ) -> None:
        self.hf, self.lane, self.prompts, self.edits = hf, lane, list(prompts), list(edits)
        self.max_positions, self.d_vocab = max_positions, d_vocab
        self.gradients = tuple(gradients)
        # What is differentiated is a pass of one row.
        self.tail = max(tail, 1) if self.gradients else tail
        self._read = {(_held(site), layer) for site in read for layer in site.of(len(lane.blocks))}
        self.fed: list[list[int]] = [[] for _ in prompts]
        self.logits = torch.zeros(len(self.prompts), d_vocab)
        self._groups = [_Group(list(numbers)) for numbers in groups]
        for group in self._groups:
            self._prefill(group)

    def __len__(self) -> int:
        return len(self.prompts)

    def read(self, stream: SupportsIndex, site: str) -> Tensor:
        """What a site held in the latest pass of a stream: `[position, ...]`, `[head, query, key]`.

        The latest pass has the rows of the prompt at first, and one row after every `feed`.
        """
        place = Site.parse(site)
        (layer,) = place.of(len(self.lane.blocks))
        for group in self._groups:
            if int(stream) in group.numbers:
                found = group.held.get((int(stream), _held(place), layer))
                if found is not None:
                    return found
        raise SiteRefused(f"site {site!r} of stream {stream} is not read; name it when you start.")

    def feed(self, tokens: Iterable[SupportsIndex]) -> Float[Tensor, "stream vocab"]:
        """Give every stream its next token; returns the new `logits`.

        Raises `OutOfRange` for a token that does not exist, `PromptError` past the last position.
        """
        chosen = [int(token) for token in tokens]
        if len(chosen) != len(self.prompts):
            raise ValueError(f"{len(chosen)} tokens for {len(self.prompts)} streams: give each one.")
        for token in chosen:
            if not 0 <= token < self.d_vocab:
                raise OutOfRange(f"the token {token} is not in the vocabulary, 0 to "
                                 f"{self.d_vocab - 1}.")
        for number, (prompt, fed) in enumerate(zip(self.prompts, self.fed)):
            if self.max_positions and len(prompt) + len(fed) >= self.max_positions:
                raise PromptError(f"stream {number} is at the model's last position, "
                                  f"{self.max_positions - 1}: no token can be fed.")
        for group in self._groups:
            ids = torch.tensor([[chosen[n]] for n in group.numbers], device=self.lane.device)
            now = Pass(group.now.start + group.now.length, 1, decoding=True)
            self._pass(group, ids, {}, now)
        for fed, token in zip(self.fed, chosen):
            fed.append(token)
        return self.logits

    def gradient_by_attention(
        self, tokens: Sequence[SupportsIndex]
    ) -> list[dict[int, tuple[Float[Tensor, "head key"], Float[Tensor, "head key"]]]]:
        """Attention of the row that predicts, and the gradient of -log p(token) by it.

        Per stream and layer of `gradients`. Only that row is differentiated: no other position
        reads it, so the gradient by its attention passes through no other (flow.md, E6).
        """
        chosen = [int(token) for token in tokens]
        found: list[dict[int, tuple[Tensor, Tensor]]] = [{} for _ in chosen]
        for group in self._groups:
            if not group.leaves or group.scores is None:
                raise SiteRefused("start with gradients=[layers] to ask for gradients.")
            here = group.scores.new_tensor([chosen[n] for n in group.numbers], dtype=torch.long)
            loss = torch.nn.functional.cross_entropy(group.scores.float(), here, reduction="sum")
            leaves = [leaf for row in group.leaves for leaf in row.values()]
            by_z = iter(torch.autograd.grad(loss, leaves, retain_graph=True))
            for number, row in zip(group.numbers, group.leaves):
                for layer in row:
                    z = next(by_z)[-1].float().cpu()
                    v = group.values[number, layer]
                    group_size = z.shape[0] // v.shape[1]
                    gradient = torch.einsum("hd,khd->hk", z, v.repeat_interleave(group_size, 1))
                    pattern = group.held[number, "pattern", layer][:, -1]
                    found[number][layer] = (pattern, gradient)
        return found

    # -- passes ----------------------------------------------------------------------------------

    def _prefill(self, group: "_Group") -> None:
        some = [self.prompts[n] for n in group.numbers]
        ids = torch.tensor([prompt.ids for prompt in some], device=self.lane.device)
        inputs = self.lane._inputs(some)
        if not self.tail:
            self._pass(group, ids, inputs, Pass(0, ids.shape[1]))
            return
        first = ids.shape[1] - self.tail
        inputs = {k: v[:, :first] if v.shape == ids.shape else v for k, v in inputs.items()}
        self._pass(group, ids[:, :first], inputs, Pass(0, first), before=True)
        self._pass(group, ids[:, first:], {}, Pass(first, self.tail, decoding=True))

    def _pass(
        self, group: "_Group", ids: Tensor, inputs: dict, now: Pass, before: bool = False
    ) -> None:
        group.now, group.held, group.leaves = now, {}, []
        edits: list[Any] = [self.edits[n] for n in group.numbers]
        differentiated = bool(self.gradients) and not before
        if differentiated:
            edits = [_Leaves(one, self.gradients) for one in edits]
        also = ("pattern", "v") if differentiated else ("v",)
        wanted = {(name, layer) for layer in self.gradients for name in also}
        wanted |= set() if before else self._read
        reads = _Latest(wanted, group.held)
        with (attend.implementation(self.lane.configs), _own_offsets(self.hf, group.offsets),
              frozen(self.hf)):
            out = self.lane._forward(
                ids, inputs, now, edits, reads, lambda *_: [], lambda *_: [], group.numbers,
                group.cache, True, "last", gradients=differentiated)
        group.cache, group.scores = out.past_key_values, out.logits[:, -1]
        if differentiated:
            group.leaves = [one.leaves for one in edits]
            _detach(group.cache)
            for number in group.numbers:
                for layer in self.gradients:
                    new = group.held[number, "v", layer]
                    old = group.values.get((number, layer), new[:0])
                    group.values[number, layer] = torch.cat([old, new])
        elif self.gradients:
            for number in group.numbers:
                for layer in self.gradients:
                    group.values[number, layer] = group.held[number, "v", layer]
        scores = out.logits[:, -1].detach().float().cpu()
        if torch.isnan(scores).any():
            raise NumericalError(
                "NaN in the logits while decoding; check the values you write, or open the model "
                "with dtype='float32'.")
        self.logits[group.numbers] = scores


@dataclass
class _Group:
    """Streams that share their passes, and what is kept between these."""

    numbers: list[int]
    now: Pass = Pass(0, 0)
    cache: Any = None
    scores: Optional[Tensor] = None
    held: dict[tuple[int, str, int], Tensor] = field(default_factory=dict)
    values: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    leaves: list[dict[int, Tensor]] = field(default_factory=list)
    offsets: dict[nn.Module, Any] = field(default_factory=dict)


class _Latest(Reads):
    """Keeps what sites held in the latest pass only."""

    def __init__(self, wanted: set[tuple[str, int]], held: dict) -> None:
        super().__init__([], 0, 0)
        self.wanted, self.held = wanted, held

    def want(self, layer: int, name: str) -> bool:
        return (name, layer) in self.wanted

    def add(self, number: int, layer: int, name: str, value: Tensor) -> None:
        self.held[number, name, layer] = value.detach().float().cpu()


class _Leaves(Edits):
    """Interventions as they are, with each chosen layer's head outputs marked as variables."""

    def __init__(self, inner: Edits, layers: Sequence[int]) -> None:
        vars(self).update(vars(inner))
        self.layers = layers
        self.leaves: dict[int, Tensor] = {}

    def writes(self, layer: int, name: str) -> bool:
        return name == "z" and layer in self.layers or super().writes(layer, name)

    def apply(self, layer: int, name: str, x: Tensor, now: Pass) -> Tensor:
        x = super().apply(layer, name, x, now)
        if name != "z" or layer not in self.layers:
            return x
        self.leaves[layer] = torch.zeros_like(x, requires_grad=True)
        return x + self.leaves[layer]


def _held(site: Site) -> str:
    return "resid_pre" if site.name == "embed" else site.name


def _detach(cache: Any) -> None:
    """Cut the kept keys and values off from the graph of the pass that made them."""
    for layer in cache.layers:
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                setattr(layer, name, value.detach())


@contextmanager
def frozen(hf: nn.Module) -> Iterator[None]:
    """Weights that ask for no gradients, so that none are computed or kept."""
    before = [(p, p.requires_grad) for p in hf.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)
        yield
    finally:
        for p, old in before:
            p.requires_grad_(old)


@contextmanager
def _own_offsets(hf: nn.Module, own: dict[nn.Module, Any]) -> Iterator[None]:
    """The position offset that Qwen-VL models remember from a picture, kept stream by stream."""
    remembering: list[Any] = [module for module in hf.modules() if "rope_deltas" in vars(module)]
    before = [module.rope_deltas for module in remembering]
    try:
        for module in remembering:
            module.rope_deltas = own.get(module)
        yield
        for module in remembering:
            own[module] = module.rope_deltas
    finally:
        for module, offset in zip(remembering, before):
            module.rope_deltas = offset


def start(
    model: Model, prompts: Any, write: Any, read: Union[str, Sequence[str]],
    gradients: Sequence[int], batch_size: int, tail: int,
) -> Stepping:
    """Check what is asked for and run the prompts; see `Model.stepping`."""
    if model.lane != "hf":
        raise SiteRefused(f"stepping needs lane 'hf', not {model.lane!r}: use model.using('hf').")
    given = model._prompts(prompts, 0)
    if model.kind != "decoder":
        raise ModelRefused(f"{model.name} is an encoder: it has no next token to choose.")
    edits = [Edits(prompt, one, model.shape)
             for prompt, one in zip(given, model._writes(write, len(given)))]
    for name in sorted({name for one in edits for name in one.sites()}):
        model._check_site(name, "write")
    sites = [Site.parse(site) for site in ([read] if isinstance(read, str) else read)]
    for site in sites:
        site.of(model.n_layers)
        model._check_site(site.name, "read")
    if tail < 0 or min(map(len, given)) <= max(tail, int(bool(gradients))):
        raise PromptError(f"a tail of {max(tail, 1)} tokens needs longer prompts.")
    for prompt in given:
        seen = [p for segment in prompt.of_kind("image") for p in segment.positions]
        if seen and max(tail, int(bool(gradients))) >= len(prompt) - max(seen):
            raise PromptError("the tail of a prompt must come after its picture; make it shorter.")
    return Stepping(
        model.hf, model._engine("hf"), given, edits, list(_batches(given, batch_size)), sites,
        model.max_positions, model.d_vocab,
        check_layers(list(gradients), model.n_layers) if gradients else (), tail)


def unembed(
    model: Model, states: Float[Tensor, "*row d_model"], tokens: Optional[Sequence[int]] = None
) -> Float[Tensor, "*row vocab"]:
    """The vocabulary head on states as they are: no final norm before it, no cap after it.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> unembed(model, torch.zeros(2, model.d_model), tokens=[5, 6, 7]).shape
        torch.Size([2, 3])

    With `tokens`, their columns only. Raises `ModelRefused` where there is no such head.
    """
    head = model.hf.get_output_embeddings()
    if head is None:
        raise ModelRefused(f"{model.name} has no vocabulary head.")
    weight, bias = head.weight, getattr(head, "bias", None)
    if tokens is not None:
        weight, bias = weight[list(tokens)], None if bias is None else bias[list(tokens)]
    with torch.no_grad():
        made = nn.functional.linear(states.to(weight), weight, bias)
    return made.float().cpu()
