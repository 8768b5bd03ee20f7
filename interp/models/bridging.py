"""Building a TransformerBridge around a model's own weights, without installing anything.

Bridging rewires the modules in place, so it is done on a copy of them; parameters and buffers are
not copied. Where TransformerLens cuts a fused projection into copies, the pieces are made to read
the live weight instead, so that an edited weight is edited in both views.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from interp.core.errors import ModelRefused


def build(hf: nn.Module, tokenizer: Any, name: str) -> Any:
    """A `TransformerBridge` around a copy of the modules that shares every parameter and buffer.

    Raises `ModelRefused` where TransformerLens cannot bridge the model on the weights in place.
    """
    architecture = type(hf).__name__
    if any(weight.is_meta for weight in hf.parameters()):
        raise ModelRefused(
            f"weights of {name} are offloaded, and TransformerLens needs them all. Use lane='hf'."
        )
    with nothing_installed(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformer_lens.model_bridge.sources import build_bridge_from_module
        from transformer_lens.utilities.attn_implementation import force_eager_attention

        try:
            copied = shared_copy(hf)
            force_eager_attention(copied)
            if not isinstance(tokenizer, PreTrainedTokenizerBase):
                tokenizer = None
            bridge = build_bridge_from_module(
                copied, architecture, hf_config=copy.deepcopy(copied.config),
                tokenizer=copy.deepcopy(tokenizer), model_name=name,
            )
        except Exception as error:
            raise ModelRefused(
                f"TransformerLens cannot bridge {name} ({architecture}): {_sentence(error)}. "
                "Use lane='hf'."
            ) from error
    blocks = list(getattr(bridge, "blocks", ()))
    lacking = [i for i, b in enumerate(blocks) if "attn" not in b._modules]
    if not blocks or lacking:
        where = f"layer {lacking[0]} has no attention" if lacking else "it has no list of blocks"
        raise ModelRefused(
            f"TransformerLens bridges {name} ({architecture}), but {where}, so its layers cannot "
            "be numbered as here. Use lane='hf'."
        )
    _share_slices(bridge, hf, name)
    return bridge


def shared_copy(hf: nn.Module) -> nn.Module:
    """The modules and the config copied, every parameter and buffer the same object."""
    return copy.deepcopy(hf, {id(x): x for x in (*hf.parameters(), *hf.buffers())})


@contextmanager
def nothing_installed() -> Iterator[None]:
    """Keep TransformerLens from running pip and from loading the tokenizer once more.

    Its adapters of vision models ask for torchvision only to load an image processor, which
    `interp.open_model` has loaded itself.
    """
    from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
    from transformer_lens.model_bridge.sources import _hf_format
    from transformer_lens.model_bridge.sources.transformers import helpers

    check = ArchitectureAdapter._check_required_libraries

    def without_torchvision(adapter: Any) -> None:
        asked = adapter.required_libraries
        adapter.required_libraries = [name for name in asked if name != "torchvision"]
        check(adapter)

    replaced = (
        (helpers, "_ensure_torchvision", lambda: False),
        (_hf_format, "get_tokenizer_with_bos", lambda tokenizer: tokenizer),
        (ArchitectureAdapter, "_check_required_libraries", without_torchvision),
    )
    before = [getattr(owner, name) for owner, name, _ in replaced]
    try:
        for owner, name, new in replaced:
            setattr(owner, name, new)
        yield
    finally:
        for (owner, name, _), old in zip(replaced, before):
            setattr(owner, name, old)


class _Slice(nn.Module):
    """The rows of a fused projection that make q, k or v, cut from the live weight at each use."""

    def __init__(self, fused: nn.Module, rows: Tensor, transposed: bool) -> None:
        super().__init__()
        self._fused: Any = (fused,)  # In a tuple: not a child, so no parameter is listed twice.
        self.rows: Tensor
        self.transposed = transposed
        self.register_buffer("rows", rows, persistent=False)

    @property
    def weight(self) -> Tensor:
        weight = self._fused[0].weight
        return (weight.T if self.transposed else weight)[self.rows]

    @property
    def bias(self) -> Optional[Tensor]:
        bias = getattr(self._fused[0], "bias", None)
        return None if bias is None else bias[self.rows]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def _share_slices(bridge: Any, hf: nn.Module, name: str) -> None:
    """Replace the copies that TransformerLens makes of q, k and v in fused projections."""
    shared = {x.untyped_storage().data_ptr() for x in (*hf.parameters(), *hf.buffers())}

    def copies(module: nn.Module) -> list[str]:
        return [n for n, p in nn.Module.named_parameters(module)
                if p.untyped_storage().data_ptr() not in shared]

    for block in bridge.blocks:
        if copies(block.attn) and hasattr(block.attn, "split_qkv_matrix"):
            fused = block.attn.qkv.original_component
            transposed = type(fused).__name__ == "Conv1D"
            for part, rows in zip("qkv", _rows(block.attn, fused, transposed)):
                piece = getattr(block.attn, part)
                live = _Slice(fused, rows, transposed)
                if torch.equal(live.weight, piece.original_component.weight):
                    piece.set_original_component(live)
    left = copies(bridge)
    if left:
        raise ModelRefused(
            f"TransformerLens makes its own copy of weights of {name} ({left[0]}), which would no "
            "longer follow the model's. Use lane='hf'."
        )


def _rows(attention: Any, fused: Any, transposed: bool) -> list[Tensor]:
    """Which outputs of a fused projection are q, k and v: split numbers instead of weights."""
    kept = dict(fused._parameters)
    size = fused.weight.shape[-1 if transposed else 0]
    marks = torch.arange(size, dtype=torch.float64, device=fused.weight.device)
    numbered = marks.expand(fused.weight.shape) if transposed else marks[:, None].expand(
        fused.weight.shape
    )
    try:
        fused._parameters["weight"] = nn.Parameter(numbered, requires_grad=False)
        if kept.get("bias") is not None:
            fused._parameters["bias"] = nn.Parameter(marks, requires_grad=False)
        parts = attention.split_qkv_matrix(attention.original_component)
    finally:
        fused._parameters.update(kept)
    return [part.weight.detach()[:, 0].long() for part in parts]


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200]
