"""Logit lens: the vocabulary as every block's input would have it, by the model's own head."""

from collections.abc import Iterable, Iterator
from typing import Optional, SupportsIndex

from jaxtyping import Float
from torch import Tensor

from interp.core import Prompt
from interp.core.prompt import Where
from interp.core.site import check_layers
from interp.models.model import Model


def early_logits(
    model: Model, prompt: Prompt, where: Where = "all",
    layers: Optional[Iterable[SupportsIndex]] = None,
) -> Iterator[tuple[int, Float[Tensor, "position vocab"]]]:
    """Layer by layer, what the final norm and head make of what enters it at some positions.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> found = dict(early_logits(model, Prompt.from_tokens(range(3, 9)), [2, 5]))
        >>> list(found), found[0].shape == (2, model.d_vocab)
        ([0, 1, 2, 3], True)

    Layer 0 is the embeddings, picture included; the number of layers is what leaves the last block,
    and gives the model's logits (its state is normed once, not twice). One layer is held at a time.
    Everything that follows the last block is applied: norm, head, softcap and scale.

    Args:
        layers: those wanted, 0 to the number of layers; all for None.

    Raises:
        ModelRefused: a model that cannot be resumed in the middle.
    """
    base, places = model.resumable(prompt), list(prompt.positions(where))
    wanted = None if layers is None else [int(layer) for layer in layers]
    for layer in check_layers(wanted, model.n_layers + 1):
        if layer == model.n_layers:
            yield layer, base.logits[places].float().cpu()
        else:
            yield layer, base._tail(base.hidden[layer][None, places])[0].detach().float().cpu()
