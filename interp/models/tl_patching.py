"""Activation patching by TransformerLens' own tool, `transformer_lens.patching`.

Its `generic_activation_patch` takes tokens only and patches one hook by name. What that cannot do
(pictures, hooks that hold something else or move nothing) is refused with the reason.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Optional

import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import Prompt
from interp.core.errors import ModelRefused, SiteRefused
from interp.models.model import Model

NAMES = ("resid_pre", "resid_post", "attn_out", "mlp_out", "z", "v")
"""Sites that TransformerLens calls by the same name and means the same thing by.

Not "resid_mid": a patch of its hook reaches the MLP's norm, but not the sum after it.
"""

EVERY = -1
"""In a cell: every position, or every head."""

Cell = tuple[int, int, int]
"""Layer, position and head to patch; `EVERY` for all of them (and for sites without heads)."""


def reason_against(model: Model, site: str, prompts: Sequence[Prompt]) -> Optional[str]:
    """Why TransformerLens cannot patch this site in these prompts, None if it can.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-1l")
        >>> reason_against(model, "q", [])
        "TransformerLens means another place by 'q'"
    """
    if site not in NAMES:
        return f"TransformerLens means another place by {site!r}"
    if any(prompt.inputs for prompt in prompts):
        return "TransformerLens' patching takes tokens only, and a prompt brings further inputs"
    try:
        bridged = model.using("bridge")
    except ModelRefused as error:
        return str(error)
    if site not in bridged.sites("write"):
        return f"no hook of TransformerLens moves {site!r} in {model.architecture}"
    lane, known = bridged._engine("bridge"), bridged.bridge.hook_dict
    for layer in range(model.n_layers):
        ours, theirs = lane.hook(layer, site), _name(site, layer)
        if ours is None or known.get(theirs) is None or known[theirs] is not known[ours]:
            return f"TransformerLens' {theirs} is not the place that {site!r} names here"
    return None


def last_rows(
    model: Model,
    site: str,
    clean: Sequence[Prompt],
    corrupt: Sequence[Prompt],
    cells: Sequence[Cell],
    *,
    frozen: bool = False,
    batch_size: int = 8,
) -> Iterator[Float[Tensor, "prompt d_vocab"]]:
    """The last row of logits for every cell: `clean` with that activation of `corrupt`.

    Args:
        frozen: keep the outputs of all heads ("z") at their values in `clean`, the patched ones
            aside, so that only the direct path through the residual stream and the MLPs is left.

    Raises `SiteRefused` where `reason_against` gives a reason.
    """
    reason = reason_against(model, site, [*clean, *corrupt])
    if reason is None and frozen:
        reason = reason_against(model, "z", clean)
    if reason is not None:
        raise SiteRefused(f"cannot patch through TransformerLens: {reason}; use engine='own'.")
    bridge, layers = model.bridge, range(model.n_layers)
    names = {_name(site, layer) for layer in layers}
    fixed = {_name("z", layer) for layer in layers} if frozen else set()
    batches = []
    for numbers in _batches(clean, batch_size):
        ids, other = (torch.tensor([p[i].ids for i in numbers], device=model.device)
                      for p in (clean, corrupt))
        with torch.no_grad():
            _, given = bridge.run_with_cache(other, names_filter=lambda name: name in names)
            own = bridge.run_with_cache(ids, names_filter=lambda name: name in fixed)[1] \
                if frozen else {}
        batches.append((numbers, ids, given, own))
    for cell in cells:
        rows: list[Optional[Tensor]] = [None] * len(clean)
        for numbers, ids, given, own in batches:
            with ExitStack() as stack:
                stack.enter_context(_quiet())
                stack.enter_context(torch.no_grad())
                if frozen:
                    # Attached first, so the patch of the cell itself comes after and wins.
                    stack.enter_context(bridge.hooks(
                        fwd_hooks=[(name, partial(_hold, held=own[name])) for name in fixed]))
                made = _patch(bridge, site, ids, given, cell)
            for number, row in zip(numbers, made):
                rows[number] = row
        yield torch.stack([row for row in rows if row is not None])


def _name(site: str, layer: int) -> str:
    from transformer_lens.utilities import get_act_name  # pyright: ignore[reportPrivateImportUsage]

    return get_act_name(site, layer)


def _hold(x: Tensor, hook: Any, held: Tensor) -> Tensor:
    return held.to(x)


def _patch(bridge: Any, site: str, ids: Tensor, given: Any, cell: Cell) -> Tensor:
    """One cell through `generic_activation_patch`."""
    import pandas as pd
    from transformer_lens.patching import generic_activation_patch

    kept: list[Tensor] = []

    def keep(logits: Tensor) -> Tensor:
        kept.append(logits[:, -1].detach().float().cpu())
        return torch.zeros(len(logits), device=logits.device)

    generic_activation_patch(
        bridge, ids, given, keep, _set, site, reduce="none",
        index_df=pd.DataFrame([cell], columns=["layer", "position", "head"]),
    )
    return kept[-1]


def _set(x: Tensor, index: Sequence[int], cache: Any, site: str = "") -> Tensor:
    """A patch setter for any site: `x` [batch, position, (head,) ...] after the patch."""
    _, position, head = index
    x = x.clone()
    where = (slice(None), slice(None) if position == EVERY else position)
    where += () if head == EVERY else (head,)
    x[where] = cache[where].to(x)
    return x


def _batches(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Numbers of prompts of equal length, at most `size` together."""
    groups: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        groups.setdefault(len(prompt), []).append(number)
    return [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a progress bar for every single cell."""
    from transformer_lens import patching

    before, patching.tqdm = patching.tqdm, lambda items, **_: items  # type: ignore[assignment]
    try:
        yield
    finally:
        patching.tqdm = before  # pyright: ignore[reportPrivateImportUsage]
