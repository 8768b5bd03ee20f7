"""What a criterion for pruning may look at, for one prompt: computed when asked for, once.

Everything belongs to the image tokens that are still there, in the order of the prompt: after an
earlier pruning, states, keys and attention are those of the pruned run. Attention is made for the
rows that are asked for only, from the keys of the plain run.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Optional, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.causal.removal import removable_tokens, several_position_axes
from interp.core import ModelRefused, OutOfRange, Prompt, PromptError
from interp.core.prompt import Where
from interp.flow import pruning_by_encoder as encoder
from interp.flow.pruning_by_attention import transition
from interp.models import tower
from interp.models.model import Model

POSITIONS = ("drop_keep_ids", "drop_compact_ids")
SLAB = 256
"""Rows of the image whose attention is held at once."""
MOST = 4096
"""Image tokens up to which attention without positions is made: it needs all pairs."""


def _once(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def remembered(self: "Evidence", *given: Any) -> Any:
        key = (method.__name__, *(int(x) for x in given))
        if key not in self._known:
            self._known[key] = method(self, *given)
        return self._known[key]

    return remembered


def check_positions(model: Model, how: str) -> None:
    """Raises `PromptError` for a policy that does not exist or that a model does not allow."""
    if how not in POSITIONS:
        raise PromptError(f"positions after pruning are {' or '.join(POSITIONS)}, not {how!r}.")
    if how == "drop_compact_ids" and several_position_axes(model):
        raise PromptError(
            f"{model.name} numbers positions along several axes, so they cannot be compacted; "
            "use 'drop_keep_ids'."
        )


class Evidence:
    """One prompt, run once, with the image tokens that are left of it.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> evidence = Evidence(model, Prompt.from_tokens(range(3, 15), {"image": (2, 8)}))
        >>> evidence.states(1).shape[0], evidence.asking(1).shape[2], len(evidence.text)
        (6, 6, 4)

    Attributes:
        tokens: positions of the image tokens that are left. text: the positions after the image.
        base: the prompt as it was run once (`Model.resumable`).

    Raises:
        SegmentNotFound: no image in the prompt.
        PromptError: nothing after the image, compact ids in a model with several position axes.
        ModelRefused: models that cannot be resumed in the middle.
    """

    def __init__(
        self, model: Model, prompt: Prompt, image: Where = "image", how: str = "drop_keep_ids"
    ) -> None:
        self.model, self.prompt, self.image, self.how = model, prompt, image, how
        self.tokens = self.all_tokens = removable_tokens(prompt, image)
        self.text = tuple(range(max(self.tokens) + 1, len(prompt)))
        if not self.text:
            raise PromptError("nothing follows the image in this prompt: no row asks for it.")
        check_positions(model, how)
        self.base = model.resumable(prompt)
        self.first = self.base.earliest(min(self.tokens))
        self.others = tuple(
            p for p in range(self.first, len(prompt)) if p not in set(self.tokens))
        self._from: Optional[tuple[int, Tensor, Optional[Tensor]]] = None
        self._known: dict[Any, Any] = {}
        self._tower: list[tower.TowerReads] = []

    # -- the run -------------------------------------------------------------------------------

    @property
    def prefills(self) -> float:
        """What it cost so far in plain passes over the prompt, the first one included."""
        return self.base.spent / self.base.prefill + 1

    @property
    def start(self) -> int:
        """The block before which tokens were pruned last; 0 if none were."""
        return 0 if self._from is None else self._from[0]

    @property
    def rows(self) -> Int[Tensor, "row"]:
        """Every position from the image on that is left."""
        return torch.tensor(sorted((*self.others, *self.tokens)))

    def positions(
        self, rows: Int[Tensor, "batch row"], how: str
    ) -> Optional[Int[Tensor, "batch row"]]:
        """Position ids of rows under a policy; None for their own."""
        check_positions(self.model, how)
        if how == "drop_keep_ids":
            return None
        return self.first + torch.arange(rows.shape[1]).expand(rows.shape)

    def forget(self) -> None:
        """Let go of attention rows and states that were asked for (they are made again if needed)."""
        self._known = {key: value for key, value in self._known.items()
                       if key[0] in ("transitions", "cls_attention")}

    def pruned(
        self, layer: SupportsIndex, kept: Sequence[SupportsIndex],
        merged: Optional[Float[Tensor, "kept d_model"]] = None,
    ) -> "Evidence":
        """The same prompt with only `kept` image tokens from block `layer` on.

        `merged` are states that enter the block in place of theirs.
        """
        at, chosen = int(layer), tuple(sorted(int(p) for p in kept))
        missing = [p for p in chosen if p not in self.tokens]
        if missing:
            raise OutOfRange(f"position {missing[0]} is to be kept, but is no image token any more.")
        after = object.__new__(Evidence)
        after.__dict__.update(self.__dict__, tokens=chosen, _known={})
        inside = self._entering(at)
        before = self.rows.tolist()
        rows = after.rows
        hidden = inside[[before.index(int(p)) for p in rows]].clone()
        if merged is not None:
            where = [rows.tolist().index(p) for p in chosen]
            hidden[where] = merged.to(hidden)
        after._from = (at, hidden[None], after.positions(rows[None], self.how))
        return after

    def logits(
        self, layer: SupportsIndex, kept: Sequence[Sequence[SupportsIndex]], *,
        merged: Optional[Callable[[tuple[int, ...]], Float[Tensor, "kept d_model"]]] = None,
        how: str = "", batch_size: SupportsIndex = 64,
    ) -> Float[Tensor, "variant vocab"]:
        """The last row with only `kept` image tokens from block `layer` on, per variant.

        Args:
            merged: kept positions -> states that enter the block in place of theirs.
            how: another policy for position ids than this evidence's.
            batch_size: variants per pass; those that keep equally many tokens share one.
        """
        at = int(layer)
        inside = self._entering(at)
        index = {p: i for i, p in enumerate(self.rows.tolist())}
        variants = [tuple(sorted(int(p) for p in one)) for one in kept]
        for one in variants:
            for p in set(one) - set(self.tokens):
                raise OutOfRange(f"position {p} is to be kept, but is no image token any more.")
        found: list[Any] = [None] * len(variants)
        for size in sorted({len(one) for one in variants}):
            same = [i for i, one in enumerate(variants) if len(one) == size]
            for start in range(0, len(same), max(1, int(batch_size))):
                part = same[start : start + max(1, int(batch_size))]
                rows = torch.tensor([sorted((*self.others, *variants[i])) for i in part])
                hidden = torch.stack([inside[[index[p] for p in row]] for row in rows.tolist()])
                if merged is not None:
                    for x, row, i in zip(hidden, rows.tolist(), part):
                        x[[row.index(p) for p in variants[i]]] = merged(variants[i]).to(x)
                out = self.base.replay(at, rows, context=torch.arange(self.first), hidden=hidden,
                                       positions=self.positions(rows, how or self.how))
                for i, row in zip(part, out.float().cpu()):
                    found[i] = row
        return torch.stack(found)

    @_once
    def _entering(self, layer: int) -> Float[Tensor, "row d_model"]:
        """What enters a block at every row that is left."""
        if self._from is None:
            return self.base.hidden[layer][self.rows.to(self.base.hidden[layer].device)]
        start, hidden, positions = self._from
        if layer < start:
            raise OutOfRange(f"tokens were pruned before block {start}: block {layer} is past.")
        if layer == start:
            return hidden[0]
        return self.base.replay(start, self.rows[None], context=torch.arange(self.first),
                                hidden=hidden, positions=positions, until=layer)[0]

    def _at(self, found: Tensor, places: Sequence[int]) -> Tensor:
        """Entries of a table over `rows` at some positions, on the CPU in float32."""
        index = {p: i for i, p in enumerate(self.rows.tolist())}
        return found[[index[p] for p in places]].float().cpu()

    def _block(self, layer: int, into: dict[str, list[Tensor]]) -> None:
        """Run every row that is left through one block, and read sites of it."""
        hidden = self._entering(layer)[None]
        positions = None if self._from is None else self._from[2]
        self.base.replay(layer, self.rows[None], context=torch.arange(self.first), hidden=hidden,
                         positions=positions, until=layer + 1, into=into)

    def _attention(
        self, layer: int, queries: Sequence[int], keys: Sequence[int]
    ) -> Float[Tensor, "head query key"]:
        """Attention rows of one block, for the keys asked for."""
        held: list[Tensor] = []

        def watch(_: int, weights: Tensor) -> None:
            held.append(weights[0].float().cpu())

        if self._from is None:
            # Every other position lends the keys and values of the plain run.
            other = torch.tensor([p for p in range(len(self.prompt)) if p not in set(queries)])
            self.base.replay(layer, torch.tensor([list(queries)]), context=other, until=layer + 1,
                             watch=watch)
            order = [*other.tolist(), *queries]
            picked = list(range(len(queries)))
        else:
            self.base.replay(layer, self.rows[None], context=torch.arange(self.first),
                             hidden=self._entering(layer)[None], positions=self._from[2],
                             until=layer + 1, watch=watch)
            order = [*range(self.first), *self.rows.tolist()]
            picked = [order.index(p) - self.first for p in queries]
        where = {p: i for i, p in enumerate(order)}
        return held[0][:, picked][:, :, [where[p] for p in keys]]

    # -- in the language model -----------------------------------------------------------------

    @_once
    def states(self, layer: SupportsIndex) -> Float[Tensor, "token d_model"]:
        """What enters a block at the image tokens; at block 0, what the projector gave."""
        return self._at(self._entering(int(layer)), self.tokens)

    def projected(self) -> Float[Tensor, "token d_model"]:
        """What stood in the prompt for all tokens of the image, those that are gone too."""
        return self.base.hidden[0][list(self.all_tokens)].float().cpu()

    @_once
    def text_states(self, layer: SupportsIndex) -> Float[Tensor, "query d_model"]:
        """What enters a block at the positions after the image."""
        return self._at(self._entering(int(layer)), self.text)

    @_once
    def asking(self, layer: SupportsIndex) -> Float[Tensor, "head query token"]:
        """Attention of the positions after the image to the image tokens, in a block."""
        return self._text_rows(int(layer))[:, :, : len(self.tokens)]

    @_once
    def among_text(self, layer: SupportsIndex) -> Float[Tensor, "head query query"]:
        """Attention of the positions after the image to each other, in a block."""
        return self._text_rows(int(layer))[:, :, len(self.tokens) :]

    @_once
    def _text_rows(self, layer: int) -> Float[Tensor, "head query key"]:
        return self._attention(layer, self.text, (*self.tokens, *self.text))

    def last(self, layer: SupportsIndex) -> Float[Tensor, "head token"]:
        """Attention of the last position to the image tokens, in a block."""
        return self.asking(layer)[:, -1]

    @_once
    def among_image(self, layer: SupportsIndex) -> Float[Tensor, "token"]:
        """Mean attention, over heads and image tokens, that image tokens get from each other."""
        if self._from is not None:
            return self._attention(int(layer), self.tokens, self.tokens).mean((0, 1))
        total = torch.zeros(len(self.tokens))
        for start in range(0, len(self.tokens), SLAB):
            some = self.tokens[start : start + SLAB]
            total += self._attention(int(layer), some, self.tokens).mean(0).sum(0)
        return total / len(self.tokens)

    @_once
    def position_free(self, layer: SupportsIndex) -> Float[Tensor, "head token"]:
        """Attention of the last position to the image tokens with every position id the same, which
        is attention without the rotary embedding; over the positions from the image on."""
        if len(self.tokens) > MOST:
            raise PromptError(f"attention without positions needs all pairs; {len(self.tokens)} "
                              f"image tokens are more than {MOST}.")
        held: list[Tensor] = []
        rows = self.rows[None]
        self.base.replay(
            int(layer), rows, hidden=self._entering(int(layer))[None], until=int(layer) + 1,
            positions=torch.full_like(rows, self.first),
            watch=lambda _, weights: held.append(weights[0, :, -1].float().cpu()))
        index = {p: i for i, p in enumerate(self.rows.tolist())}
        return held[0][:, [index[p] for p in self.tokens]]

    @_once
    def keys(self, layer: SupportsIndex) -> Float[Tensor, "kv_head token d_head"]:
        """Keys of the image tokens in a block, after RoPE."""
        return self._keys(int(layer), self.tokens)

    @_once
    def text_keys(self, layer: SupportsIndex) -> Float[Tensor, "kv_head query d_head"]:
        """Keys of the positions after the image in a block, after RoPE."""
        return self._keys(int(layer), self.text)

    def _keys(self, layer: int, places: Sequence[int]) -> Tensor:
        if self._from is None:
            return self.base.keys[layer][:, list(places)].float().cpu()
        return self._at(self._read(layer)["k"], places).transpose(0, 1)

    @_once
    def _read(self, layer: int) -> dict[str, Tensor]:
        into: dict[str, list[Tensor]] = {
            name: [] for name in ("k", "resid_pre", "attn_out", "mlp_in", "mlp_out")}
        self._block(layer, into)
        return {name: held[0][0] for name, held in into.items()}

    @_once
    def transitions(self, layer: SupportsIndex) -> Float[Tensor, "module token"]:
        """TransPrune's `transition` of attention and MLP in a block, at the image tokens.

        Attention is compared with the state before it, brought to unit root mean square: the gain
        of the norm in front of it is left out. The softmax runs over the positions from the image
        on.
        """
        read = self._read(int(layer))
        x = read["resid_pre"].float()
        x = x / x.pow(2).mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        made = [transition(x, read["attn_out"].float()),
                transition(read["mlp_in"].float(), read["mlp_out"].float())]
        return torch.stack([self._at(one, self.tokens) for one in made])

    def mlp(self, layer: SupportsIndex) -> tuple[Tensor, Tensor]:
        """What the MLP of a block is given and what it gives, `[token, d_model]` each."""
        read = self._read(int(layer))
        return self._at(read["mlp_in"], self.tokens), self._at(read["mlp_out"], self.tokens)

    # -- in the picture and its tower ----------------------------------------------------------

    @property
    def cells(self) -> list[int]:
        """Numbers of the tokens that are left among all tokens of the image."""
        number = {p: i for i, p in enumerate(self.all_tokens)}
        return [number[p] for p in self.tokens]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the image's tokens.

        Raises:
            PromptError: the picture is cut into tiles, or its tokens are not one grid.
        """
        for segment in self.prompt.of_kind("image"):
            if tuple(sorted(segment.positions)) == self.all_tokens:
                if segment.grid and segment.grid[0] * segment.grid[1] == len(self.all_tokens):
                    return segment.grid
        raise PromptError(
            "the image's tokens are not one grid of cells (several pictures, tiles, newline tokens "
            "or an unknown layout), so rows and columns mean nothing here."
        )

    @property
    def tower(self) -> tower.TowerReads:
        """What the vision tower computed, for all tokens of the image (see `cells`).

        Raises:
            ModelRefused: a text model, tiled pictures. PromptError: not one picture.
        """
        if not self._tower:
            found = tower.read(self.model, self.prompt)
            if tuple(found.positions) != self.all_tokens:
                raise PromptError("criteria of the vision tower need a prompt with one picture, and "
                                  "all of its tokens removable.")
            self._tower.append(found)
        return self._tower[0]

    @property
    def late(self) -> int:
        """The tower's block whose output is projected (23 of 24 entries: block 22)."""
        select = self.tower.select
        return self.tower.n_layers - 1 if not select else select - 1

    @_once
    def cls_attention(self) -> Float[Tensor, "layer head token"]:
        """The class token's attention to the tokens that are left, in every block of the tower.

        Raises:
            ModelRefused: the tower has no class token.
        """
        found = self.tower.cls_attention
        if found is None:
            raise ModelRefused(
                f"the vision tower of {self.model.name} has no class token, so nothing can be kept "
                "by its attention; choose a criterion that needs none."
            )
        return found[:, :, self.cells].float().cpu()

    def class_values(self, layer: SupportsIndex) -> Float[Tensor, "head d_head"]:
        """The class token's values in a block of the tower."""
        self.cls_attention()  # says so where there is none
        value = self.tower.class_value(layer)
        assert value is not None
        return value.float().cpu()

    @_once
    def features(self) -> Float[Tensor, "token d_vision"]:
        """What the tower gives to the projector."""
        hidden = self.tower.hidden
        return hidden[self.late + 1][self.cells].float().cpu()

    @_once
    def sensitivity(self) -> Float[Tensor, "token"]:
        """The exact zeroth-order score of the projector (`pruning_by_encoder.zeroth_order`)."""
        if self.tower.select is None:
            raise ModelRefused(
                f"the projector of {self.model.name} does not read one state per token, so the "
                "exact form of zeroth-order pruning does not hold for it."
            )
        inside = self.tower.hidden[self.tower.select][self.cells]
        return encoder.zeroth_order(
            inside, *encoder.projector_layers(self.tower.projector, inside)).float().cpu()

    @_once
    def entropy(self) -> Float[Tensor, "token"]:
        """Grey-level entropy of each token's patch of the picture, in bits."""
        boxes = self.prompt.of_kind("image")[0].boxes
        if len(self.prompt.images) != 1 or not boxes:
            raise PromptError("grey levels of patches need one picture in the prompt, and boxes.")
        found = torch.from_numpy(encoder.patch_entropy(self.prompt.images[0], boxes))
        return found.float()[self.cells]
