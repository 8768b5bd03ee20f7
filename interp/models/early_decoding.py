"""Early decoding: what anything written to the residual stream adds to the logits of chosen tokens.

The final norm is held at the statistics of the run (and so is a norm that follows attention, as in
Gemma-2), which makes the way from a head to the logits linear: contributions of layers, heads,
positions and biases add up to the logits exactly. Where the norms are, and that they are linear
with their statistics held, is measured on a short pass and not taken from a table of names.
"""

import copy
from dataclasses import dataclass
from typing import Any, Optional

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.core import Prompt
from interp.core.errors import ModelRefused
from interp.models.lane_hf import probe_ids
from interp.models.model import Model
from interp.models.sites import first_tensor, hidden_input

Seen = tuple[nn.Module, Tensor, Tensor]
"""A module, what it was given and what it made, in one pass."""


@dataclass(frozen=True)
class FrozenNorm:
    """A norm with its statistics held at one state: x -> weight * (x - mean(x) or x), then a bias.

    Example:
        >>> norm, x = nn.LayerNorm(6), torch.arange(6.0)
        >>> frozen = freeze(norm, x)
        >>> frozen.centered, torch.allclose(frozen(x) + frozen.bias, norm(x), atol=1e-5)
        (True, True)
        >>> torch.allclose(frozen(2 * x), 2 * frozen(x))
        True
    """

    weight: Float[Tensor, "d_model"]
    bias: Float[Tensor, "d_model"]
    centered: bool

    def __call__(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The linear part, without the bias."""
        x = x - x.mean(-1, keepdim=True) if self.centered else x
        return x * self.weight

    def pull(self, directions: Float[Tensor, "d_model target"]) -> Float[Tensor, "d_model target"]:
        """Directions after the norm as directions before it: the transpose of the linear part."""
        pulled = self.weight[:, None] * directions
        return pulled - pulled.mean(0) if self.centered else pulled


def freeze(norm: nn.Module, x: Float[Tensor, "d_model"]) -> FrozenNorm:
    """The norm as a linear map, with the mean and variance that it has at `x`.

    Raises `ModelRefused` for a module that is no such map (neither RMSNorm nor LayerNorm).
    """
    exact, x = copy.deepcopy(norm).float(), x.float()
    with torch.no_grad():
        probe = torch.ones_like(x)
        probe[1::2] = -1.0
        bias = exact(torch.zeros_like(x))
        gain = (exact(probe - probe.mean()) - bias) / (probe - probe.mean())
        y = exact(x) - bias
        # A constant added to every coordinate is invisible to a norm that takes the mean away.
        moved = exact(x + x.abs().mean() + 1.0) - bias
        centered = torch.allclose(moved, y, rtol=1e-3, atol=1e-3 * float(y.abs().max()))
        direction = gain * (x - x.mean() if centered else x)
        size = float((y @ direction) / (direction @ direction).clamp_min(1e-30))
    if not torch.allclose(size * direction, y, rtol=1e-3, atol=1e-4 * float(y.abs().max())):
        raise ModelRefused(
            f"{type(norm).__name__} is not linear with its statistics held (neither RMSNorm nor "
            "LayerNorm), so what enters it cannot be decoded part by part."
        )
    return FrozenNorm(size * gain, bias, centered)


class EarlyDecoder:
    """The way from the heads' outputs and the residual stream to logits, for one model.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> decoder = EarlyDecoder(model)
        >>> decoder.directions([5, 7]).shape == (model.d_model, 2)
        True

    Attributes:
        norm: the final norm. w_o: per layer `[head, d_head, d_model]`. bias: per layer what the
            output projection adds besides, `[d_model]`. post: per layer the norm that follows it
            before the residual stream, or None.

    Raises:
        ModelRefused: no final norm between the last block and the vocabulary head, or an attention
            block whose output is not the heads' projection (and at most one norm).
        SiteRefused: head outputs that are changed before they are projected (gates).
    """

    def __init__(self, model: Model) -> None:
        self.model, self.lane = model, model._engine("hf")
        if model.kind != "decoder":
            raise ModelRefused(f"{model.name} is an encoder: it has no next token to decode.")
        self.w_o = [model.w_o(layer) for layer in range(model.n_layers)]
        prompt = Prompt.from_tokens(probe_ids(model.hf, 6)[0].tolist())
        seen, reads = self._watch(prompt)
        self.norm, self.head = self._tail(seen)
        self.bias: list[Tensor] = []
        self.post: list[Optional[nn.Module]] = []
        for layer in range(model.n_layers):
            z, added = (torch.tensor(reads[name].values[0, layer]) for name in ("z", "attn_out"))
            self._attention(layer, z.flatten(1), added, seen)

    def _watch(self, prompt: Prompt) -> tuple[list[Seen], Any]:
        """What every module was given and made in one short pass, and the sites of the pass."""
        seen: list[Seen] = []

        def watch(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            given, made = hidden_input(args, kwargs), first_tensor(output)
            if given is not None and made is not None and given.ndim > 1:
                seen.append((module, given.detach().clone(), made.detach().clone()))

        handles = [module.register_forward_hook(watch, with_kwargs=True)
                   for module in self.model.hf.modules()]
        try:
            run = self.model.using("hf").run(prompt, read=("z", "attn_out"), logits="none")
        finally:
            for handle in handles:
                handle.remove()
        return seen, run.reads

    def _tail(self, seen: list[Seen]) -> tuple[nn.Module, Any]:
        """The final norm and the vocabulary head: last block -> norm -> head."""
        (last,) = [made for module, _, made in seen if module is self.lane.blocks[-1].module]
        for norm, given, normed in seen:
            if given.shape != last.shape or not torch.equal(given, last):
                continue
            for head, taken, _ in seen:
                weight = getattr(head, "weight", None)
                if weight is None or weight.ndim != 2 or len(weight) < self.model.d_vocab:
                    continue
                # Only the last row may have reached the head.
                if taken.shape[-1] == last.shape[-1] and torch.equal(
                    taken.reshape(-1, last.shape[-1])[-1], normed.reshape(-1, last.shape[-1])[-1]
                ) and norm is not head:
                    return norm, head
        raise ModelRefused(
            f"{self.model.architecture} has no single norm between its last block and its "
            "vocabulary head, so its residual stream cannot be decoded early."
        )

    def _attention(self, layer: int, z: Tensor, added: Tensor, seen: list[Seen]) -> None:
        """The bias of the output projection, and the norm after it if there is one."""
        inside = {id(module) for module in self.lane.blocks[layer].module.modules()}
        here = [(module, _rows(given), _rows(made)) for module, given, made in seen
                if id(module) in inside]
        port, width = self.lane.blocks[layer].attn_out, self.model.d_model
        for module, given, made in here:
            if given.shape != z.shape or not torch.equal(given, z) or made.shape[-1] != width:
                continue
            bias = getattr(module, "bias", None)
            bias = torch.zeros(width) if bias is None else bias.detach().float().cpu()
            if torch.equal(made, added):
                after: Optional[nn.Module] = None
            elif port is not None and any(
                norm is port[0] and torch.equal(taken, made) for norm, taken, _ in here
            ):
                after = port[0]
            else:
                continue
            self.bias.append(bias)
            self.post.append(after)
            return
        raise ModelRefused(
            f"in layer {layer} of {self.model.architecture} attention adds something else than its "
            "heads' projection, plainly or through one norm, so it cannot be decoded by position."
        )

    def directions(self, tokens: Any) -> Float[Tensor, "d_model target"]:
        """The rows of the vocabulary head for some token ids, as columns."""
        ids = torch.as_tensor(tokens, dtype=torch.long)
        return self.head.weight.detach()[ids.to(self.head.weight.device)].float().cpu().T

    def final(self, state: Float[Tensor, "d_model"]) -> FrozenNorm:
        """The final norm with its statistics held at a state that leaves the last block."""
        return freeze(copy.deepcopy(self.norm).cpu(), state.cpu())

    def before_post(self, layer: int, written: Float[Tensor, "d_model"],
                    z: Float[Tensor, "head d_head"]) -> Optional[FrozenNorm]:
        """The norm after attention, held at one position; None where there is none.

        `z` are the heads' outputs there, `written` what reached the residual stream: the two must
        agree, which guards the decoding of every layer.
        """
        o = torch.einsum("hd,hdm->m", z.float().cpu(), self.w_o[layer].float().cpu())
        o = o + self.bias[layer]
        post = self.post[layer]
        frozen = None if post is None else freeze(copy.deepcopy(post).cpu(), o)
        found = o if frozen is None else frozen(o) + frozen.bias
        gap = float((found - written.float().cpu()).abs().max())
        if gap > 2e-2 * float(written.abs().max()) + 1e-6:
            raise ModelRefused(
                f"layer {layer} of {self.model.architecture} writes {gap:.2g} that its heads do not "
                "account for, so it cannot be decoded by position."
            )
        return frozen


def _rows(x: Tensor) -> Float[Tensor, "row width"]:
    return x.reshape(-1, x.shape[-1]).float().cpu()
