"""Names of the places in a transformer that can be read or written."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Optional, Union

from interp.core.errors import OutOfRange, SiteRefused, did_you_mean

RESIDUAL = ("embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_in", "mlp_out")
HEADED = ("q", "k", "v", "z")
PAIRS = ("scores", "pattern")
NAMES = RESIDUAL + HEADED + PAIRS

MEANING = {
    "embed": "what enters block 0, after positions and image features are merged",
    "resid_pre": "residual stream entering a block",
    "resid_mid": "residual stream between attention and MLP (sequential blocks only)",
    "resid_post": "residual stream leaving a block, never the final-normed state",
    "attn_out": "what attention adds to the residual stream",
    "mlp_in": "what the MLP reads, after its norm",
    "mlp_out": "what the MLP adds to the residual stream",
    "q": "queries after position encoding, per query head",
    "k": "keys after position encoding, per key-value head",
    "v": "values, per key-value head",
    "z": "weighted values, per query head, before the output projection",
    "scores": "attention logits after masking, before the softmax",
    "pattern": "attention weights after the softmax",
}


@dataclass(frozen=True, order=True)
class Site:
    """A place and, where given, the blocks it is meant in (all blocks otherwise).

    Example:
        >>> Site.parse("resid_post"), str(Site.parse("mlp_out.3"))
        (Site(name='resid_post', layers=None), 'mlp_out.3')
        >>> Site("z", (1, 2)).of(4)
        (1, 2)
    """

    name: str
    layers: Optional[tuple[int, ...]] = None

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise SiteRefused(
                f"there is no site {self.name!r}; the sites are: {', '.join(NAMES)}."
                f"{did_you_mean(self.name, NAMES)}"
            )

    @classmethod
    def parse(cls, given: Union["Site", str]) -> "Site":
        """Read "name", "name.3" or "name.3,5"; a `Site` passes through."""
        if isinstance(given, Site):
            return given
        if not isinstance(given, str):
            raise SiteRefused(
                f"{given!r} is not a site; write the layer behind the name, like 'resid_post.3'."
            )
        ours = _of_hook(given)
        if ours:
            raise SiteRefused(f"{given!r} is the name of a TransformerLens hook; the site is {ours!r}.")
        name, _, layers = given.partition(".")
        if not layers:
            return cls(name)
        try:
            return cls(name, tuple(int(number) for number in layers.split(",")))
        except ValueError as error:
            if isinstance(error, SiteRefused):
                raise
            raise SiteRefused(
                f"cannot read the layers of site {given!r}; write 'resid_post.3' or 'z.3,5'."
            ) from None

    def of(self, n_layers: int) -> tuple[int, ...]:
        """The blocks meant in a model with `n_layers`. Raises `OutOfRange`."""
        if self.name == "embed":
            return (0,)
        chosen = range(n_layers) if self.layers is None else self.layers
        return check_layers(chosen, n_layers)

    def __str__(self) -> str:
        if self.layers is None:
            return self.name
        return f"{self.name}.{','.join(map(str, self.layers))}"


def _of_hook(given: str) -> str:
    """The site of a TransformerLens hook, "" for anything else."""
    found = re.fullmatch(r"(?:blocks\.(\d+)\.)?(?:attn\.)?hook_(\w+)", given)
    if found is None:
        return ""
    name = "scores" if found[2] == "attn_scores" else found[2]
    layer = "" if found[1] is None else f".{found[1]}"
    return f"{name}{layer}" if name in NAMES else ""


def check_layers(layers: Union[int, Iterable[int], None], n_layers: int) -> tuple[int, ...]:
    """Sorted block numbers, all of them for None. Raises `OutOfRange` for one that is missing.

    Example:
        >>> check_layers(None, 3), check_layers(1, 3)
        ((0, 1, 2), (1,))
    """
    if layers is None:
        return tuple(range(n_layers))
    chosen = [layers] if isinstance(layers, int) else list(layers)
    for layer in chosen:
        if not 0 <= int(layer) < n_layers:
            raise OutOfRange(
                f"layer {layer} does not exist: the model has layers 0 to {n_layers - 1}."
            )
    return tuple(sorted({int(layer) for layer in chosen}))
