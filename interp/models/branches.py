"""One prompt, many continuations: the prompt is run once, and every continuation starts from its cache.

Samples of an answer, and candidates that are scored and read, would each cost a run of the whole
prompt; here they cost their own tokens only. Nothing is edited, so the model's own attention is used.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import ModelRefused, NumericalError, OutOfRange, PromptError
from interp.core.prompt import Prompt
from interp.core.site import RESIDUAL, Site
from interp.models.edits import Edits, Pass
from interp.models.lane_hf import no_earlier_picture
from interp.models.model import Model
from interp.models.run import Reads


@dataclass(frozen=True, eq=False)
class Followed:
    """A continuation as the model reads it.

    Attributes:
        tokens: the continuation. log_probs: of each token given all before it, natural logarithm.
        within: the same among the tokens that were allowed (all, where none were named).
        top: the largest probability at each of these places. entropy: in nats.
        states: site -> `[layer, token, d_model]`, read while the token itself is the input.
    """

    tokens: tuple[int, ...]
    log_probs: Float[np.ndarray, "token"]
    within: Float[np.ndarray, "token"]
    top: Float[np.ndarray, "token"]
    entropy: Float[np.ndarray, "token"]
    states: dict[str, Float[np.ndarray, "layer token d_model"]]


class Branches:
    """A prompt that was run once and can be continued many ways.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = interp.Prompt.from_tokens(range(3, 12))
        >>> made = Branches(model, prompt, read="resid_post")
        >>> one, two = made.follow([[5, 6], [7]])
        >>> one.states["resid_post"].shape == (model.n_layers, 2, model.d_model)
        True
        >>> len(made.sample(4, new_tokens=3, temperature=1.0, seed=0))
        4

    Args:
        read: residual sites (`embed`, `resid_post`, `attn_out`, ...) to read in continuations, and
            in the prompt at the positions `keep`.
        keep: positions of the prompt, negative ones from its end.
        batch_size: continuations per pass.

    Attributes:
        states: site -> `[layer, kept position, d_model]` of the prompt. logits: `[vocab]`, what
            follows the prompt.

    Raises:
        ModelRefused: an encoder, or a model without a cache. PromptError: too long. SiteRefused: a
        site that cannot be read. NumericalError: logits that are not numbers.
    """

    def __init__(
        self, model: Model, prompt: Prompt, *, read: Union[str, Sequence[str]] = (),
        keep: Sequence[int] = (-1,), batch_size: SupportsIndex = 16,
    ) -> None:
        if model.kind != "decoder":
            raise ModelRefused(f"{model.name} is an encoder: it continues nothing.")
        if model.max_positions and len(prompt) > model.max_positions:
            raise PromptError(f"{model.name} has {model.max_positions} positions, and the prompt "
                              f"has {len(prompt)} tokens.")
        self.model, self.prompt, self.batch_size = model, prompt, int(batch_size)
        self.sites = [Site.parse(s) for s in ([read] if isinstance(read, str) else read)]
        for site in self.sites:
            if site.name not in RESIDUAL and site.name != "embed":
                raise ValueError(f"a continuation is read at residual sites, not at {site.name!r}.")
            site.of(model.n_layers)
            model._check_site(site.name, "read")
        self._lane = model._engine("hf")
        kept = [p % len(prompt) if -len(prompt) <= p < len(prompt) else -1 for p in keep]
        if -1 in kept:
            raise OutOfRange(f"the prompt has no position {list(keep)[kept.index(-1)]}: it has "
                             f"{len(prompt)} tokens.")
        ids = torch.tensor([prompt.ids], device=self._lane.device)
        self._remembering: list[Any] = [m for m in model.hf.modules() if "rope_deltas" in vars(m)]
        with no_earlier_picture(model.hf):
            rows, self._cache, self.states = self._pass(
                ids, self._lane._inputs([prompt]), Pass(0, len(prompt)), None, kept)
            self._offsets = {m: m.rope_deltas for m in self._remembering}
        if self._cache is None:
            raise ModelRefused(f"{model.architecture} keeps no cache; it cannot be continued.")
        self.logits = rows[0, -1]

    def follow(
        self, continuations: Sequence[Sequence[SupportsIndex]],
        allowed: Optional[Sequence[SupportsIndex]] = None,
    ) -> list[Followed]:
        """Each continuation, as the model reads it token by token.

        `allowed` are the tokens that an answer may be made of; `Followed.within` is the probability
        among these (and the token itself).

        Raises `PromptError` for an empty one, or one that does not fit.
        """
        given = [tuple(int(t) for t in one) for one in continuations]
        for number, one in enumerate(given):
            if not one:
                raise PromptError(f"continuation {number} is empty: give its token ids.")
            if not all(0 <= t < self.model.d_vocab for t in one):
                raise OutOfRange(f"continuation {number} has a token that is not in the vocabulary.")
        self._check_room(max((len(one) for one in given), default=0))
        found: dict[tuple[int, ...], Followed] = {}
        for some in _equal(dict.fromkeys(given), self.batch_size):
            ids = torch.tensor(some, device=self._lane.device)
            with self._continuing(len(some)) as cache:
                rows, _, states = self._pass(
                    ids, {}, Pass(len(self.prompt), ids.shape[1], decoding=True), cache, None)
            rows = torch.cat([self.logits.expand(len(some), 1, -1), rows[:, :-1]], 1)
            logs = rows.log_softmax(-1)
            own = logs.gather(-1, ids.cpu()[..., None])[..., 0]
            entropy = -(logs.exp() * logs.clamp_min(-1e4)).sum(-1)
            within = own
            if allowed is not None:
                among = logs[..., [int(t) for t in allowed]].logsumexp(-1)
                known = torch.isin(ids.cpu(), torch.tensor([int(t) for t in allowed]))
                within = own - torch.where(known, among, torch.logaddexp(among, own))
            for i, one in enumerate(some):
                found[one] = Followed(
                    one, own[i].numpy(), within[i].numpy(), logs[i].max(-1).values.exp().numpy(),
                    entropy[i].numpy(),
                    {name: value[i] for name, value in states.items()})
        return [found[one] for one in given]

    def sample(
        self, count: SupportsIndex, *, new_tokens: SupportsIndex, temperature: SupportsFloat = 1.0,
        seed: SupportsIndex = 0, with_end: bool = False, greedy_first: bool = False,
        allowed: Optional[Sequence[SupportsIndex]] = None,
    ) -> list[list[int]]:
        """Random continuations (greedy ones for temperature 0), each ending before the end token.

        The whole distribution is sampled: no top-k, no nucleus. `with_end` keeps the end token of
        those that come to it; with `greedy_first` the first one is the greedy continuation.
        `allowed` are the only tokens that may be chosen (the words of a closed set of answers).
        """
        left, made = int(count), []
        self._check_room(int(new_tokens))
        generator = torch.Generator().manual_seed(int(seed))
        closed = None
        if allowed is not None:
            closed = torch.full((self.model.d_vocab,), float("-inf"))
            closed[[int(t) for t in allowed]] = 0.0
        while left > 0:
            n = min(left, self.batch_size)
            made += self._draw(n, int(new_tokens), float(temperature), generator, with_end,
                               greedy_first and not made, closed)
            left -= n
        return made

    def _draw(
        self, n: int, new_tokens: int, temperature: float, generator: torch.Generator,
        with_end: bool, greedy_first: bool, closed: Optional[Tensor],
    ) -> list[list[int]]:
        rows, columns = self.logits.expand(n, -1), []
        ends = torch.tensor(sorted(self.model.end_tokens), dtype=torch.long)
        over = torch.zeros(n, dtype=torch.bool)
        with self._continuing(n) as cache:
            for step in range(new_tokens):
                rows = rows if closed is None else rows + closed
                if temperature > 0:
                    chosen = torch.multinomial((rows / temperature).softmax(-1), 1,
                                               generator=generator)
                else:
                    chosen = rows.argmax(-1, keepdim=True)
                if greedy_first:
                    chosen[0] = rows[0].argmax()
                columns.append(chosen)
                over |= torch.isin(chosen[:, 0], ends)
                if step + 1 == new_tokens or bool(over.all()):
                    break
                fed = self._pass(chosen.to(self._lane.device), {}, Pass(
                    len(self.prompt) + step, 1, decoding=True), cache, [])
                rows, cache = fed[0][:, -1], fed[1]
        tokens = torch.cat(columns, 1).tolist() if columns else [[] for _ in range(n)]
        last = self.model.end_tokens
        return [row[: next((i + with_end for i, t in enumerate(row) if t in last), len(row))]
                for row in tokens]

    # -- passes ----------------------------------------------------------------------------------

    def _check_room(self, more: int) -> None:
        most = self.model.max_positions
        if most and len(self.prompt) + more > most:
            raise PromptError(f"{self.model.name} has {most} positions: {more} tokens do not fit "
                              f"after a prompt of {len(self.prompt)}.")

    @contextmanager
    def _continuing(self, n: int) -> Iterator[Any]:
        """A copy of the prompt's cache for `n` continuations, with what the model remembers."""
        cache = copy.deepcopy(self._cache)
        if n > 1:
            cache.batch_repeat_interleave(n)
        before = {m: m.rope_deltas for m in self._remembering}
        try:
            for module in before:
                offset = self._offsets.get(module)
                module.rope_deltas = (offset.repeat_interleave(n, 0) if isinstance(
                    offset, Tensor) and offset.ndim and offset.shape[0] == 1 else offset)
            yield cache
        finally:
            for module, offset in before.items():
                module.rope_deltas = offset

    def _pass(
        self, ids: Tensor, inputs: dict, now: Pass, cache: Any, keep: Any
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """Logits `[row, position, vocab]`, the cache, and states at the positions `keep`, all of
        them for None (`[row, layer, position, d_model]`, of the one row of a prompt without `row`)."""
        n = ids.shape[0]
        reads = _At(self.sites if keep != [] else [], self.model.n_layers, n, keep)
        nothing = [Edits(self.prompt, (), self.model.shape)] * n
        more: dict[str, Any] = {"use_cache": True}
        if cache is not None:
            more["past_key_values"] = cache
        else:
            more["logits_to_keep"] = 1
        with self._lane._hooks(now, nothing, reads, lambda *_: [], range(n)), torch.no_grad():
            out = self._lane._call(ids, inputs, more)
        if getattr(out, "logits", None) is None:
            raise ModelRefused(f"{self.model.architecture} has no vocabulary head.")
        rows = out.logits.detach().float().cpu()
        if torch.isnan(rows).any():
            raise NumericalError("NaN in the logits; open the model with dtype='float32'.")
        states = {name: array.values for name, array in reads.finish().items()} if reads.sites else {}
        # The embedding has no axis of layers.
        states = {k: v if v.ndim == 4 else v[:, None] for k, v in states.items()}
        return rows, getattr(out, "past_key_values", None), {
            k: v[0] for k, v in states.items()} if cache is None else states


class _At(Reads):
    """Keeps some positions only: whole prompts of a large model would not fit."""

    def __init__(self, sites: Sequence[Site], n_layers: int, n: int, keep: Any) -> None:
        super().__init__(sites, n_layers, n)
        self._keep = keep

    def add(self, prompt: int, layer: int, name: str, value: Tensor) -> None:
        super().add(prompt, layer, name, value if self._keep is None else value[self._keep])


def _equal(given: Any, size: int) -> Iterator[list[tuple[int, ...]]]:
    """Continuations of equal length, `size` at a time."""
    lengths: dict[int, list[tuple[int, ...]]] = {}
    for one in given:
        lengths.setdefault(len(one), []).append(one)
    for some in lengths.values():
        for start in range(0, len(some), size):
            yield some[start : start + size]
