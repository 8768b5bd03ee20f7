"""Back-patching: a later state put back into an earlier block, where what it holds is still of use.

Paper     arXiv:2406.12775
Question  Does a second hop fail because the first one is resolved too late?
Measure   whether the answer comes when the output of block g at a position is replaced by what block
          s > g put out there in the same prompt; what a state says in a prompt that describes it
Cause     the measure is an intervention; states of another prompt, and patches forward (s < g), are
          its controls, because the best of many pairs succeeds by chance
"""

from collections.abc import Sequence
from typing import Any, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import OutOfRange, Prompt, PromptError, Result, each, patch
from interp.core.prompt import Where
from interp.figures import heat
from interp.figures.style import note
from interp.models.model import Model
from interp.models.resume import Resumable


def block_outputs(base: Resumable, position: SupportsIndex) -> Float[Tensor, "layer d_model"]:
    """What every block put out at a position of a prompt that was run once.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> base = model.resumable(Prompt.from_tokens(range(3, 12)))
        >>> block_outputs(base, 8).shape[0] == model.n_layers
        True
    """
    at, last = int(position), base.n_layers - 1
    if not 0 <= at < base.length:
        raise OutOfRange(f"position {at} does not exist: there are 0 to {base.length - 1}.")
    row = torch.tensor([[at]])
    end = base.replay(last, row, context=torch.arange(at), until=last + 1)[0, 0]
    return torch.stack([*(base.hidden[layer + 1][at] for layer in range(last)), end])


def patched_logits(
    base: Resumable, position: SupportsIndex, states: Float[Tensor, "source d_model"],
    target: SupportsIndex, batch_size: SupportsIndex = 64,
) -> Float[Tensor, "source vocab"]:
    """The last row when the output of block `target` at a position is each of these states.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> base = model.resumable(Prompt.from_tokens(range(3, 12)))
        >>> own = block_outputs(base, 8)
        >>> bool(torch.allclose(patched_logits(base, 8, own[1:2], 1)[0], base.logits[-1], atol=1e-3))
        True

    Positions before it stay as they are, in every block; those from it on are run again from block
    `target` + 1 on. The patched block keeps its own keys and values.

    Raises:
        OutOfRange: no such position, or a target that is no block with another one behind it.
    """
    at, g = int(position), int(target)
    if not 0 <= at < base.length or not 0 <= g < base.n_layers - 1:
        raise OutOfRange(
            f"the output of block {g} at position {at} cannot be replaced: there are positions 0 to "
            f"{base.length - 1}, and blocks 0 to {base.n_layers - 2} have another one behind them."
        )
    rows, context = torch.arange(at, base.length), torch.arange(at)
    found = []
    for first in range(0, len(states), int(batch_size)):
        part = states[first : first + int(batch_size)]
        hidden = base.hidden[g + 1][rows.to(base.hidden[g + 1].device)]
        hidden = hidden[None].repeat(len(part), 1, 1)
        hidden[:, 0] = part.to(hidden)
        found.append(base.replay(
            g + 1, rows.expand(len(part), -1), context=context, hidden=hidden).float())
    return torch.cat(found)


def grid(
    base: Resumable, position: SupportsIndex, token: SupportsIndex,
    states: Optional[Float[Tensor, "layer d_model"]] = None,
) -> tuple[Float[np.ndarray, "layer layer"], Bool[np.ndarray, "layer layer"]]:
    """Log probability of a token, and whether it is the likeliest, for every (source, target).

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> base = model.resumable(Prompt.from_tokens(range(3, 12)))
        >>> log_p, hit = grid(base, 8, 5)
        >>> log_p.shape, bool(np.isnan(log_p[:, -1]).all())
        ((3, 3), True)

    Args:
        states: block outputs of another prompt instead of the own ones, one per source.

    Returns:
        [source, target]; sources above their target are back-patches, those below it forward ones.
        The last block is no target (NaN, False): nothing reads its output again.
    """
    own = block_outputs(base, position) if states is None else states
    size, answer = base.n_layers, int(token)
    log_p, hit = np.full((size, size), np.nan), np.zeros((size, size), dtype=bool)
    for target in range(size - 1):
        rows = patched_logits(base, position, own, target)
        log_p[:, target] = rows.log_softmax(-1)[:, answer].double().cpu().numpy()
        hit[:, target] = (rows.argmax(-1) == answer).cpu().numpy()
    return log_p, hit


def backward(n_layers: SupportsIndex) -> Bool[np.ndarray, "layer layer"]:
    """Which (source, target) are back-patches: the source is the later block.

    Example:
        >>> backward(3).astype(int).tolist()
        [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    """
    return np.tri(int(n_layers), k=-1, dtype=bool)


def measure(
    model: Model, prompts: Sequence[Prompt], answers: Sequence[SupportsIndex], *,
    positions: Sequence[Where] = ("entity", "last"), donors: SupportsIndex = 3,
    seed: SupportsIndex = 0,
) -> Result:
    """Back-patch every pair of blocks at the given positions of every prompt.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> given = [Prompt.from_tokens(range(i, i + 9)) for i in (3, 4, 5)]
        >>> found = measure(model, given, [5, 6, 7], positions=("last",), donors=1)
        >>> found["hit"].dims
        ('prompt', 'position', 'source', 'target')

    Args:
        answers: the first token of each answer; decode what a pair makes the model say with `say`.
        positions: names of one position each, or numbers; of several the last one.
        donors: other prompts whose states take the place of the own ones, drawn at random.

    Returns:
        [prompt, position, source, target]: `log_p` (nats), `hit`; [.., donor, ..]: `donor_hit`;
        [prompt]: `base_log_p`, `right`. `prefills` is the mean cost per prompt in plain passes.

    Source: arXiv:2406.12775, with success of the first token in place of ten decoded ones.
    """
    if not prompts or len(prompts) != len(answers):
        raise PromptError(f"{len(answers)} answers for {len(prompts)} prompts: give one for each.")
    count, size = len(prompts), model.n_layers
    others = min(int(donors), count - 1)
    rng = np.random.default_rng(int(seed))
    places = [[prompt.positions(where)[-1] for where in positions] for prompt in prompts]
    states, bases, cost = [], [], []
    for prompt, at in zip(prompts, places):
        base = model.resumable(prompt)
        bases.append(base.logits[-1].float().log_softmax(-1).cpu())
        states.append([block_outputs(base, p) for p in at])
    shape = (count, len(positions))
    log_p, hit = np.full((*shape, size, size), np.nan), np.zeros((*shape, size, size), dtype=bool)
    donor_hit = np.zeros((*shape, others, size, size), dtype=bool)
    for i, (prompt, token) in enumerate(zip(prompts, answers)):
        base = model.resumable(prompt)
        drawn = rng.choice([k for k in range(count) if k != i], others, replace=False)
        for j, at in enumerate(places[i]):
            log_p[i, j], hit[i, j] = grid(base, at, token, states[i][j])
            for k, other in enumerate(drawn):
                donor_hit[i, j, k] = grid(base, at, token, states[int(other)][j])[1]
        cost.append(base.spent / base.prefill + 1)
    dims = ("prompt", "position", "source", "target")
    data = xr.Dataset({
        "log_p": (dims, log_p), "hit": (dims, hit),
        "donor_hit": (("prompt", "position", "donor", "source", "target"), donor_hit),
        "base_log_p": ("prompt", [float(b[int(t)]) for b, t in zip(bases, answers)]),
        "right": ("prompt", [int(b.argmax()) == int(t) for b, t in zip(bases, answers)]),
        "prefills": float(np.mean(cost)),
    }, {"position": [str(where) for where in positions], "source": range(size),
        "target": range(size)})
    return Result(data, {
        **model.manifest(), "measure": "back-patching", "success": "first token, greedy",
        "phase": "prefill", "donors": others, "naive_prefills": (1 + others) * len(positions)
        * size * (size - 1), "prompts": [prompt.digest() for prompt in prompts],
    })


def repaired(
    hit: Bool[np.ndarray, "*batch source target"], which: str = "backward"
) -> Bool[np.ndarray, "*batch"]:
    """Whether some pair of blocks makes the answer come, "backward" or "forward".

    Example:
        >>> hit = np.zeros((3, 3), dtype=bool)
        >>> hit[2, 0] = True
        >>> bool(repaired(hit)), bool(repaired(hit, "forward"))
        (True, False)
    """
    if which not in ("backward", "forward"):
        raise ValueError(f"{which!r} is neither 'backward' nor 'forward'.")
    pairs = backward(hit.shape[-1])
    pairs = pairs if which == "backward" else pairs.T
    return np.asarray((np.asarray(hit) & pairs).any((-2, -1)))


def say(
    model: Model, prompt: Prompt, position: Where, state: Float[Tensor, "d_model"],
    target: SupportsIndex, new_tokens: int = 10,
) -> list[int]:
    """What the model goes on to say with a state as the output of block `target`: whole runs."""
    write = patch(f"resid_post.{int(target)}", state[None], positions=position, phase="prefill")
    return model.run(prompt, write=write, new_tokens=new_tokens).new_tokens[0]


def project(
    model: Model, states: Float[Tensor, "row d_model"], like: Prompt, batch_size: int = 32
) -> Float[Tensor, "row vocab"]:
    """Any vectors of the stream through the final norm and the vocabulary head.

    They take the place of the last block's output in a piece of the prompt `like`.
    """
    short = Prompt.from_tokens(like.ids[:2])
    at = f"resid_post.{model.n_layers - 1}"
    run = model.run([short] * len(states), logits="last", batch_size=batch_size, write=each(
        [patch(at, one[None], positions="last") for one in states]))
    return torch.stack([rows[-1].float() for rows in run.logits])


def describe(
    target: Resumable, place: SupportsIndex, states: Float[Tensor, "layer d_model"],
    tokens: Sequence[SupportsIndex],
) -> Bool[np.ndarray, "source target token"]:
    """Which of these tokens a state makes a describing prompt say, for every (source, target).

    Args:
        target: a prompt that describes whatever stands at `place` (a few examples, then a
            placeholder), run once for a whole data set.
        states: outputs of every block at the position in question, of another prompt.

    Returns:
        Whether the token is the likeliest one; never for the last block, which nothing follows.

    Source: Patchscopes as in arXiv:2406.12775, greedy and first token in place of sampled text.
    """
    wanted = torch.tensor([int(token) for token in tokens])
    found = np.zeros((len(states), target.n_layers, len(wanted)), dtype=bool)
    for g in range(target.n_layers - 1):
        said = patched_logits(target, place, states, g).argmax(-1).cpu()
        found[:, g] = (said[:, None] == wanted).numpy()
    return found


def earliest(
    described: Bool[np.ndarray, "source target token"]
) -> Float[np.ndarray, "token"]:
    """The first source block whose state is described by each token, NaN for none.

    Example:
        >>> earliest(np.array([[[False]], [[True]], [[True]]]))
        array([1.])
    """
    some = np.asarray(described).any(1)
    return np.where(some.any(0), some.argmax(0).astype(float), np.nan)


def mass_center(
    hit: Bool[np.ndarray, "*batch source target"]
) -> tuple[SupportsFloat, SupportsFloat]:
    """Mean source and mean target block of the successful back-patches, NaN where there is none."""
    pairs = np.asarray(hit) & backward(hit.shape[-1])
    where = np.argwhere(pairs)
    if not len(where):
        return float("nan"), float("nan")
    return float(where[:, -2].mean()), float(where[:, -1].mean())


def draw(found: Result, ax: Axes, position: str, chosen: Union[np.ndarray, Any]) -> Axes:
    """Share of the chosen prompts that a pair of blocks repairs."""
    hit = found["hit"].sel(position=position, drop=True).values[np.asarray(chosen)]
    size = hit.shape[-1]
    share = xr.DataArray(hit.mean(0)[:, : size - 1], {"source": range(size),
                                                      "target": range(size - 1)},
                         ("source", "target"))
    heat.draw(ax, share, x="target block", y="source block", label="share answered", limits=(0, 1),
              eligible=~np.eye(size, dtype=bool)[:, : size - 1], hatched="unchanged")
    note(ax, f"n = {len(hit)} prompts")
    return ax
