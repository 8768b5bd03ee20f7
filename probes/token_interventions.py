"""What classes of visual tokens do: remove them, skip their updates, let them enter late.

Paper     arXiv:2603.00510
Question  Which visual tokens does an answer need, through which blocks, and from which layer on?
Measure   the answer's first token, right or not, and its probability
Cause     tokens dropped at the input (position ids kept), against as many random others; attention or
          MLP updates of some tokens zeroed in chosen blocks; the visual tokens entering at a later
          block, against those of another picture
"""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from interp.causal.removal import Removal, removable_tokens
from interp.core import OutOfRange, Prompt, PromptError, Result, each, edit
from interp.core.intervention import EditSite
from interp.models.model import Model

Sets = Mapping[str, Sequence[Sequence[int]]]
"""Name -> positions in every prompt."""


def matched_sets(
    labels: Sequence[Mapping[int, str]], kind: str, *, against: str = "alive",
    seeds: SupportsIndex = 5, seed: SupportsIndex = 0,
) -> dict[str, list[list[int]]]:
    """Tokens of a class and as many of another one, drawn at random `seeds` times.

    Example:
        >>> found = matched_sets([{2: "dead", 3: "alive", 4: "alive"}], "dead", seeds=2)
        >>> sorted(found), found["all of dead"], found["dead 0"], len(found["alive 1"][0])
        (['alive 0', 'alive 1', 'all of dead', 'dead 0', 'dead 1', 'only dead'], [[2]], [[2]], 1)

    Where there are more of the class than others, as many of it are drawn as there are others. "all
    of" is the whole class, "only" everything else (removing that keeps the class alone; empty without
    one). A prompt without tokens of one of the two has empty draws: nothing is compared there.
    """
    rng, made = np.random.default_rng(int(seed)), {}
    own = [sorted(p for p, k in one.items() if k == kind) for one in labels]
    other = [sorted(p for p, k in one.items() if k == against) for one in labels]
    size = [min(len(a), len(b)) for a, b in zip(own, other)]
    for draw in range(int(seeds)):
        for name, pools in ((kind, own), (against, other)):
            made[f"{name} {draw}"] = [sorted(int(p) for p in rng.choice(pool, n, replace=False))
                                      for pool, n in zip(pools, size)]
    made[f"all of {kind}"] = own
    made[f"only {kind}"] = [sorted(set(one) - set(mine)) if mine else []
                            for one, mine in zip(labels, own)]
    return made


def prune(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[SupportsIndex], sets: Sets, *,
    layer: SupportsIndex = 0, image: str = "image", how: str = "drop_keep_ids",
) -> Result:
    """Answers without some visual tokens, from a block on.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 12), {"image": (1, 7)})
        >>> found = prune(model, [prompt], [5], {"some": [[2, 3]]})
        >>> found["probability"].dims, found["condition"].values.tolist()
        (('prompt', 'condition'), ['whole', 'some'])

    Args:
        answers: first token of every answer. sets: name -> positions to remove in every prompt.
        layer: the first block without them. how: a meaning of `interp.causal.removal`.

    Returns:
        `correct`, `probability`, `removed` (number of tokens) [prompt, condition], "whole" being
        nothing removed. NaN where a set is empty for a prompt.

    Raises:
        PromptError: sets, answers and prompts of different number. OutOfRange: a position that is no
            image token. ModelRefused: models that cannot be resumed.

    Source: arXiv:2603.00510 (`token_pruning`); any number of sets shares the passes of a prompt.
    """
    given = _check(prompts, answers, sets)
    names = ["whole", *sets]
    table = {name: np.full((len(given), len(names)), np.nan) for name in _NUMBERS}
    for number, prompt in enumerate(given):
        removal = Removal(model, prompt, image, how)
        some = [set(), *(set(map(int, sets[name][number])) for name in sets)]
        strange = sorted(set().union(*some) - set(removal.places))
        if strange:
            raise OutOfRange(f"position {strange[0]} of prompt {number} is no image token.")
        used = [i for i, gone in enumerate(some) if gone or not i]
        rows = removal.logits(int(layer), [sorted(set(removal.places) - some[i]) for i in used])
        for i, row in zip(used, rows):
            _write(table, (number, i), row, int(answers[number]), len(some[i]))
    return _result(model, given, table, names, {"measure": "prune", "layer": int(layer), "removal": how})


def attention_without(
    model: Model, prompts: Sequence[Prompt], sets: Sets, *, image: str = "image",
) -> Result:
    """Where the text behind an image looks when some visual tokens are gone.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 12), {"image": (1, 7)})
        >>> found = attention_without(model, [prompt], {"some": [[2, 3]]})
        >>> found["mass"].dims, found["target"].values.tolist()
        (('prompt', 'condition', 'target'), ['first', 'text', 'image', 'set'])

    Returns:
        `mass`, mean over layers from 2 on (all, if there are fewer than three), heads and queries
        behind the image, of the attention on the first token, the other text, the visual tokens that
        are in none of the sets, and those of the sets that are left. NaN where a set is empty.
    """
    given = _check(prompts, None, sets)
    names, targets = ["whole", *sets], ["first", "text", "image", "set"]
    mass = np.full((len(given), len(names), len(targets)), np.nan)
    start = 2 if model.n_layers > 2 else 0
    for number, prompt in enumerate(given):
        places = set(removable_tokens(prompt, image))
        some = [set(), *(set(map(int, sets[name][number])) for name in sets)]
        marked = set().union(*some)
        base, behind = model.resumable(prompt), max(places)
        for i, gone in enumerate(some):
            if i and not gone:
                continue
            rows = [p for p in range(len(prompt)) if p not in gone]
            group = torch.tensor([0 if not p else 3 if p in marked else 2 if p in places else 1
                                  for p in rows])
            asking = torch.tensor([p > behind for p in rows])
            if not asking.any():
                raise PromptError(f"no text follows the image of prompt {number}: nothing looks at it.")
            total = torch.zeros(len(targets), dtype=torch.float64)

            def watch(
                layer: int, p: Tensor, asking: Tensor = asking, group: Tensor = group,
                total: Tensor = total,
            ) -> None:
                if layer >= start:
                    mean = p[0][:, asking.to(p.device)].mean((0, 1)).double().cpu()
                    total.index_add_(0, group, mean)

            base.replay(0, torch.tensor([rows]), watch=watch)
            mass[number, i] = (total / (model.n_layers - start)).numpy()
    data = xr.Dataset({"mass": (("prompt", "condition", "target"), mass)},
                      {"condition": names, "target": targets})
    return Result(data, {**model.manifest(), "measure": "attention_without", "from_layer": start,
                         "prompts": [p.digest() for p in given]})


def skipping(
    positions: Sequence[SupportsIndex], sublayers: Sequence[Union[int, float]]
) -> tuple[EditSite, ...]:
    """Interventions that zero what attention (n) or the MLP (n + 0.5) of block n adds at positions.

    Example:
        >>> [str(one.site) for one in skipping([3, 4], [1.5, 0])]
        ['mlp_out.1', 'attn_out.0']

    Others still see the keys and values of these tokens. The released code does this only where a
    prompt has more than 611 positions, and rewires attention as well if block 0 is among them: here it
    is the update alone, everywhere.

    Source: arXiv:2603.00510 (`skip`).
    """
    made, where = [], sorted(int(p) for p in positions)
    for number in sublayers:
        block, half = divmod(float(number), 1)
        if half not in (0.0, 0.5) or block < 0:
            raise ValueError(
                f"sub-layers are n (attention of block n) or n + 0.5 (its MLP), not {number}."
            )
        made.append(edit(f"{'mlp_out' if half else 'attn_out'}.{int(block)}", "multiply", 0.0, where))
    return tuple(made) if where else ()


def skip(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[SupportsIndex], sets: Sets,
    sublayers: Sequence[Union[int, float]], *, batch_size: int = 8,
) -> Result:
    """Answers where the updates of some tokens are left out in some sub-layers.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 12), {"image": (1, 7)})
        >>> skip(model, [prompt], [5], {"all": [[1, 2]]}, [0, 0.5])["correct"].shape
        (1, 2)

    Returns:
        `correct`, `probability`, `removed` (tokens) [prompt, condition], as `prune`.

    Raises `SiteRefused` where a block's sub-layers cannot be told apart.

    Source: arXiv:2603.00510 (`skip`).
    """
    given = _check(prompts, answers, sets)
    for number in sublayers:
        if not 0 <= int(number) < model.n_layers:
            raise OutOfRange(
                f"sub-layer {number} does not exist: {model.name} has {model.n_layers} blocks."
            )
    names = ["whole", *sets]
    table = {name: np.full((len(given), len(names)), np.nan) for name in _NUMBERS}
    for i, name in enumerate(names):
        some = [n for n in range(len(given)) if not i or len(sets[name][n])]
        if not some:
            continue
        writes = each([skipping(sets[name][n], sublayers) if i else () for n in some])
        run = model.run([given[n] for n in some], write=writes, logits="last", batch_size=batch_size)
        for n, rows in zip(some, run.logits):
            _write(table, (n, i), rows[-1], int(answers[n]), len(sets[name][n]) if i else 0)
    return _result(model, given, table, names, {
        "measure": "skip", "sublayers": [float(x) for x in sublayers]})


def enter_late(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[SupportsIndex], *,
    layers: Optional[Sequence[SupportsIndex]] = None, image: str = "image",
    other: Optional[Sequence[Any]] = None,
) -> Result:
    """Answers where the visual tokens are not there before some block, and then as they came.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 12), {"image": (1, 7)})
        >>> found = enter_late(model, [prompt], [5])
        >>> found["correct"].dims, found["layer"].values.tolist()
        (('prompt', 'condition', 'layer'), [0, 1, 2])

    Args:
        layers: blocks to enter at; all for None. Block 0 is the plain model.
        other: for every prompt the tokens `[token, d_model]` of another picture, as many: the control.

    Returns:
        `correct`, `probability` [prompt, condition, layer]: the tokens enter "as they came", "resized"
        to the mean norm that they would have there, and, if given, those of the "other" picture.
        Position ids are those of the whole prompt (the released code numbers the text anew before the
        picture enters).

    Source: arXiv:2603.00510 (`vision_entry_layer`, which no released script uses).
    """
    given = _check(prompts, answers, {})
    if other is not None and len(other) != len(given):
        raise PromptError(f"tokens of {len(other)} other pictures for {len(given)} prompts.")
    numbers = [int(x) for x in (range(model.n_layers) if layers is None else layers)]
    names = ["as they came", "resized", *(["other"] if other is not None else [])]
    table = {name: np.full((len(given), len(names), len(numbers)), np.nan) for name in _NUMBERS}
    for number, prompt in enumerate(given):
        base, places = model.resumable(prompt), list(removable_tokens(prompt, image))
        raw = base.hidden[0][places]
        entering = [raw, raw]
        if other is not None:
            entering.append(torch.as_tensor(other[number]).to(raw))
            if entering[-1].shape != raw.shape:
                raise PromptError(
                    f"prompt {number} has {len(places)} image tokens, but {len(other[number])} of "
                    "another picture are to enter."
                )
        text = [p for p in range(len(prompt)) if p not in set(places)]
        for i, layer in enumerate(numbers):
            there = base.hidden[0][text]
            if layer:
                there = base.replay(0, torch.tensor([text]), until=layer)[0]
            entering[1] = raw * (base.hidden[layer][places].norm(dim=-1).mean()
                                 / raw.norm(dim=-1).mean())
            hidden = base.hidden[layer].new_empty(len(names), *base.hidden[layer].shape)
            hidden[:, text], hidden[:, places] = there.to(hidden), torch.stack(entering).to(hidden)
            rows = torch.arange(len(prompt)).expand(len(names), -1)
            for j, row in enumerate(base.replay(layer, rows, hidden=hidden)):
                _write(table, (number, j, i), row, int(answers[number]), 0)
    table.pop("removed")
    data = xr.Dataset({name: (("prompt", "condition", "layer"), v) for name, v in table.items()},
                      {"layer": numbers, "condition": names})
    return Result(data, {**model.manifest(), "measure": "enter_late", "position_ids": "kept",
                         "prompts": [p.digest() for p in given]})


_NUMBERS = ("correct", "probability", "removed")


def _check(prompts: Sequence[Prompt], answers: Any, sets: Sets) -> list[Prompt]:
    given = list(prompts)
    if not given:
        raise PromptError("no prompts: give at least one.")
    for name, some in {**sets, **({} if answers is None else {"answers": answers})}.items():
        if len(some) != len(given):
            raise PromptError(f"{name!r} is for {len(some)} prompts, but there are {len(given)}.")
    return given


def _write(
    table: dict[str, np.ndarray], at: tuple[int, ...], row: Tensor, answer: int, size: int
) -> None:
    scores = row.float().cpu()
    table["correct"][at] = float(int(scores.argmax()) == answer)
    table["probability"][at] = float(scores.softmax(-1)[answer])
    table["removed"][at] = size


def _result(
    model: Model, prompts: Sequence[Prompt], table: dict[str, np.ndarray], names: list[str],
    more: dict[str, Any],
) -> Result:
    data = xr.Dataset({name: (("prompt", "condition"), values) for name, values in table.items()},
                      {"condition": names})
    return Result(data, {**model.manifest(), **more, "answers": "first token",
                         "prompts": [p.digest() for p in prompts]})
