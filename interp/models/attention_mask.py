"""Which keys a query may see: the mask function registered with the attention function.

transformers asks for a mask before it calls the attention; what it gets here is a rule that is asked
for a few queries and keys at a time, so no mask of query x key is made.
"""

from collections.abc import Callable
from typing import Any, Optional

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

from interp.core.errors import SiteRefused
from interp.stream.masks import Mask, bidirectional, causal, sliding_window


class LazyMask:
    """Which keys a query may see, computed for the queries and keys asked for."""

    def __init__(
        self,
        rule: Optional[Callable[..., Any]],
        q_length: int,
        kv_length: int,
        q_offset: int,
        kv_offset: int,
        padding: Optional[Bool[Tensor, "batch key"]],
        by_element: bool,
        plain: Optional[str],
        window: Optional[int] = None,
    ) -> None:
        self.rule, self.padding, self.by_element = rule, padding, by_element
        self.q_length, self.kv_length = q_length, kv_length
        self.q_offset, self.kv_offset = int(q_offset), int(kv_offset)
        self.plain = plain if padding is None else None
        self.window = window

    def named(self) -> Optional[Mask]:
        """The same rule with its known structure, where it is one of the usual ones."""
        if self.plain == "full":
            return bidirectional()
        if self.plain == "causal":
            return causal()
        if self.plain == "window" and self.window is not None:
            return sliding_window(self.window)
        return None

    def __call__(
        self, row: int, queries: Int[Tensor, "query"], keys: Int[Tensor, "key"]
    ) -> Bool[Tensor, "1 query key"]:
        """Visibility at absolute positions in row `row` of the batch."""
        named = self.named()
        if named is not None:
            return named(queries, keys)[None]
        batch, head = queries.new_tensor([row]), queries.new_tensor([0])
        rule = self.rule
        assert rule is not None  # only masks with a name, or made by the model, have none
        if self.by_element:
            for dims in ((None,) * 3 + (0,), (None, None, 0, None),
                         (None, 0, None, None), (0, None, None, None)):
                rule = torch.vmap(rule, in_dims=dims, out_dims=0)
            with TransformGetItemToIndex():
                seen = rule(batch, head, queries, keys)
        else:
            seen = rule(
                batch[:, None, None, None], head[None, :, None, None],
                queries[None, None, :, None], keys[None, None, None, :],
            )
        seen = seen.expand(1, 1, len(queries), len(keys))[0]
        if self.padding is not None:
            seen = seen & self.padding[row, keys - self.kv_offset][None, None]
        return seen


def _slides(rule: Callable[..., Any], size: int) -> bool:
    """Whether the mask is a sliding window: past the first `size` keys, the one before is seen."""
    zero, query, key = (torch.tensor(number) for number in (0, size, size - 1))
    return bool(rule(zero, zero, query, key))


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: Optional[Tensor] = None,
    local_size: Optional[int] = None,
    allow_is_causal_skip: bool = False,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    **_: Any,
) -> LazyMask:
    """What transformers calls with the arguments of its mask functions."""
    padding = None
    if attention_mask is not None and not bool(attention_mask.all()):
        padding = attention_mask[:, -kv_length:].bool()
    plain = None
    if local_size is None and allow_is_bidirectional_skip:
        plain = "full"
    elif allow_is_causal_skip:
        plain = "causal" if local_size is None else "window"
        if local_size is not None and not _slides(mask_function, int(local_size)):
            plain = None  # chunks, as in Llama 4: their size comes under the same name
    return LazyMask(mask_function, q_length, kv_length, q_offset, kv_offset, padding,
                    use_vmap, plain, local_size)


class DenseMask(LazyMask):
    """A dense mask that a model made itself, boolean or additive."""

    def __init__(self, dense: Tensor, start: int) -> None:
        super().__init__(None, dense.shape[-2], dense.shape[-1], start, 0, None, False, None)
        self.dense = dense if dense.dtype == torch.bool else dense >= 0
        if dense.dtype != torch.bool and bool(((dense < 0) & (dense > -1e4)).any()):
            raise SiteRefused(
                "this model adds a bias to its attention logits through the mask (as ALiBi does); "
                "lane 'hf' cannot see into that, use lane 'bridge'."
            )

    def __call__(self, row: int, queries: Tensor, keys: Tensor) -> Tensor:
        dense = self.dense[row % self.dense.shape[0]]
        return dense[:, queries - self.q_offset][:, :, keys]
