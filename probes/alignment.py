"""Implicit multimodal alignment: how close image and text tokens are inside a language model.

Paper     arXiv:2405.16700
Question  Do image and text tokens live in cones of their own, do they use the same weights, and is an
          image closer to its own text than to others?
Measure   cosine within and across modalities by layer, of mean-pooled examples or of tokens; the same
          centered; matched against mismatched pairs; norms; how slowly tokens change; divergence and
          entropy of their vocabulary distributions; overlap of the weights that matter (Wanda)
Cause     none: states are compared
"""

from collections.abc import Sequence
from typing import Any, Literal, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from torch import Tensor, nn

from interp.core import ModelRefused, Prompt, PromptError, Result
from interp.core.prompt import Where
from interp.core.site import check_layers
from interp.figures.style import color, style
from interp.models.logit_lens import early_logits
from interp.models.model import Model
from probes.nulls import EMBEDDING, layer_states

MODALITIES = ("image", "text")
Pool = Literal["mean", "tokens"]


def cross_cosine(
    a: Float[np.ndarray, "sample d_model"], b: Float[np.ndarray, "target d_model"]
) -> Float[np.ndarray, "sample target"]:
    """Cosine of every pair; 0 for a vector of zeros.

    Example:
        >>> cross_cosine(np.array([[1.0, 0]]), np.array([[2.0, 0], [0, 3], [0, 0]])).tolist()
        [[1.0, 0.0, 0.0]]
    """
    return _unit(a) @ _unit(b).T


def similarities(
    image: Float[np.ndarray, "prompt d_model"], text: Float[np.ndarray, "prompt d_model"],
    centered: bool = False,
) -> dict[str, Float[np.ndarray, "prompt"]]:
    """Of pooled examples: cosine to the other images, texts, the own text and the other texts.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((9, 4))
        >>> found = similarities(x, x)
        >>> bool(np.allclose(found["matched"], 1)), bool(np.allclose(found["image"], found["text"]))
        (True, True)

    With `centered`, the mean of each modality is taken out first: what is left says whether the two
    spaces are arranged alike, whatever cones they lie in.

    The average of the released code over all pairs is nearly that of "mismatched": it says nothing on
    pairs.
    """
    if len(image) != len(text) or len(image) < 2:
        raise ValueError(f"{len(image)} images and {len(text)} texts: give two pairs or more.")
    if centered:
        image, text = image - image.mean(0), text - text.mean(0)
    both = cross_cosine(image, text)
    own = np.diag(both)
    n = len(image)

    def others(c: np.ndarray) -> np.ndarray:
        return (c.sum(1) - np.diag(c)) / (n - 1)

    return {"image": others(cross_cosine(image, image)), "text": others(cross_cosine(text, text)),
            "matched": own, "mismatched": ((both.sum(1) + both.sum(0)) / 2 - own) / (n - 1)}


def pair_p(
    image: Float[np.ndarray, "layer prompt d_model"], text: Float[np.ndarray, "layer prompt d_model"],
    *, permutations: SupportsIndex = 1000, centered: bool = True, seed: SupportsIndex = 0,
) -> tuple[Float[np.ndarray, "layer"], Float[np.ndarray, "layer"]]:
    """Mean cosine of matched minus mismatched pairs, by layer, and its p over other pairings.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((2, 9, 4))
        >>> gap, p = pair_p(x, x, permutations=99)
        >>> bool((gap > 0.5).all()), p.tolist()
        (True, [0.01, 0.01])

    p is corrected for the choice of the layer: the maximum over layers of the standardized gap of a
    random pairing.
    """
    rng, n = np.random.default_rng(int(seed)), image.shape[1]
    orders = np.stack([np.arange(n), *(rng.permutation(n) for _ in range(int(permutations)))])
    made = []
    for a, b in zip(image, text):
        if centered:
            a, b = a - a.mean(0), b - b.mean(0)
        both = cross_cosine(a, b)
        own = both[np.arange(n), orders].mean(1)
        made.append(own - (both.sum() / n - own) / (n - 1))
    gap = np.array(made)
    spread = gap[:, 1:].std(1, keepdims=True)
    z = (gap - gap[:, 1:].mean(1, keepdims=True)) / np.where(spread > 0, spread, np.inf)
    highest = z[:, 1:].max(0)
    return gap[:, 0], (1 + (highest[None] >= z[:, :1]).sum(1)) / (1 + int(permutations))


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    texts: Optional[Sequence[Prompt]] = None,
    *,
    image: Where = "image",
    text: Optional[Where] = None,
    pool: Pool = "mean",
    image_layer: Optional[SupportsIndex] = None,
    vocabulary: SupportsIndex = 0,
    permutations: SupportsIndex = 1000,
    seed: SupportsIndex = 0,
    batch_size: SupportsIndex = 4,
) -> Result:
    """Alignment of the image and text tokens of pairs, by layer.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompts = [Prompt.from_tokens(range(i, i + 9), {"image": (1, 5)}) for i in (3, 12, 20)]
        >>> found = measure(model, prompts)
        >>> found["matched"].dims, found["layer"].values.tolist()
        (('prompt', 'layer'), [-1, 0, 1, 2])

    Args:
        texts: the text of every pair as a prompt of its own, which has not seen the image; None takes
            the text behind the image in the same prompt, which has.
        image: image tokens of `prompts`. text: text tokens; all behind the image for None, or all but
            the first of `texts`.
        pool: "mean" of an example's tokens, or cosine of all pairs of "tokens", averaged.
        image_layer: take image tokens always from this layer (-1 is what enters block 0): the
            alignment score of the paper.
        vocabulary: for so many pairs also the vocabulary distributions (logit lens).
        permutations, seed: of the pairing. batch_size: pairs whose states are held at a time.

    Returns:
        Layer l is what block l leaves (the last before the final norm), -1 what enters block 0.
        Cosines [prompt, layer]: `image`, `text` (within), `matched`, `mismatched` (across), and
        `centered_` versions; `pair_gap`, `pair_p` [layer], centered, of pooled examples; `norm`
        [prompt, layer, modality]; `step` [prompt, block, modality], the mean cosine of tokens before
        and after a block; with `vocabulary`, [prompt, layer]: `kl` (image to text, nats), `entropy`
        [prompt, layer, modality].

    Raises:
        PromptError: fewer than two pairs, or texts of another number.

    Source: arXiv:2405.16700, released code (all cross pairs, mean pooling, image at layer 0);
    centering and pairs are this toolkit's.
    """
    given = list(prompts)
    other = given if texts is None else list(texts)
    if len(given) < 2 or len(given) != len(other):
        raise PromptError(f"{len(given)} images and {len(other)} texts: give two pairs or more.")
    if pool not in ("mean", "tokens"):
        raise ValueError(f"pool by 'mean' or 'tokens', not {pool!r}.")
    where = {"image": [p.positions(image) for p in given],
             "text": [_text(p, None if texts is not None else image, text) for p in other]}
    pooled, unit, norm, step = ({} for _ in range(4))
    layers = np.arange(EMBEDDING, model.n_layers)
    for name, some in zip(MODALITIES, (given, other)):
        rows = [row for start in range(0, len(some), int(batch_size)) for row in _reduced(
            model, some[start : start + int(batch_size)],
            where[name][start : start + int(batch_size)])]
        pooled[name], unit[name] = (np.stack([row[i] for row in rows], 1) for i in (0, 1))
        norm[name], step[name] = (np.stack([row[i] for row in rows]) for i in (2, 3))
    if image_layer is not None:
        fixed = layers.tolist().index(int(image_layer))
        pooled["image"] = np.repeat(pooled["image"][fixed:fixed + 1], len(layers), 0)
        unit["image"] = np.repeat(unit["image"][fixed:fixed + 1], len(layers), 0)
    table: dict[str, Any] = {}
    for prefix, centered in (("", False), ("centered_", True)):
        made = [
            _of_means(unit["image"][at], unit["text"][at]) if pool == "tokens" and not centered
            else similarities(pooled["image"][at], pooled["text"][at], centered)
            for at in range(len(layers))]
        for name in made[0]:
            table[prefix + name] = ("prompt", "layer"), np.stack([one[name] for one in made], 1)
    gap, p = pair_p(pooled["image"], pooled["text"], permutations=permutations, seed=seed)
    table |= {"pair_gap": ("layer", gap), "pair_p": ("layer", p)}
    table["norm"] = ("prompt", "layer", "modality"), np.stack([norm[m] for m in MODALITIES], 2)
    table["step"] = ("prompt", "block", "modality"), np.stack([step[m] for m in MODALITIES], 2)
    if int(vocabulary):
        n = min(int(vocabulary), len(given))
        kl, entropy = np.full((len(given), len(layers)), np.nan), np.full(
            (len(given), len(layers), 2), np.nan)
        for i in range(n):
            kl[i], entropy[i] = _vocabulary(model, given[i], other[i], where["image"][i],
                                            where["text"][i])
        table |= {"kl": (("prompt", "layer"), kl), "entropy": (("prompt", "layer", "modality"), entropy)}
    data = xr.Dataset(table, {"layer": layers, "block": np.arange(model.n_layers),
                              "modality": list(MODALITIES)})
    return Result(data, {
        **model.manifest(), "measure": "alignment", "pool": pool, "together": texts is None,
        "image_layer": "each" if image_layer is None else int(image_layer),
        "layers": f"{EMBEDDING}: what enters block 0; l: what block l leaves, before any final norm",
        "prompts": [p.digest() for p in given]})


def important(
    weight: Float[Tensor, "row feature"], norms: Float[Tensor, "feature"], sparsity: SupportsFloat = 0.5
) -> Bool[Tensor, "row feature"]:
    """The weights that Wanda keeps: the largest |W| times the norm of their input, row by row.

    Example:
        >>> important(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), torch.tensor([9.0, 1, 1, 1])).tolist()
        [[True, True, False, False]]

    Source: arXiv:2306.11695.
    """
    kept = weight.shape[1] - round(float(sparsity) * weight.shape[1])
    mask = torch.zeros_like(weight, dtype=torch.bool)
    top = (weight.abs().float() * norms.to(weight.device).float()).topk(kept, 1).indices
    return mask.scatter_(1, top, True)


def mask_overlap(
    model: Model,
    prompts: Sequence[Prompt],
    texts: Optional[Sequence[Prompt]] = None,
    *,
    image: Where = "image",
    text: Optional[Where] = None,
    layers: Optional[Sequence[SupportsIndex]] = None,
    sparsity: SupportsFloat = 0.5,
    seed: SupportsIndex = 0,
) -> Result:
    """Overlap (IoU) of the weights that matter for image tokens and for text tokens.

    Example:
        >>> import interp
        >>> model = interp.open_model("looker")
        >>> prompts = [Prompt.from_tokens(range(8, 20), {"image": (1, 5)}) for _ in range(2)]
        >>> found = mask_overlap(model, prompts)
        >>> found["iou"].dims, round(float(found["random"]), 3)
        (('layer', 'weight'), 0.333)

    Args:
        layers: blocks to look at; all for None.
        sparsity: share of each row's weights that is left out (0.3 or 0.5 in the paper).

    Returns:
        `iou` [layer, weight] of every linear map of a block; `shuffled`, of the same weights with the
        input norms of text tokens in random order: masks share |W| whatever goes in, so that random
        masks of equal sparsity (`random`, (1 - s) / (1 + s)) are far too low a bar. NaN for experts,
        which are given some of the tokens only.

    Raises:
        ModelRefused: a model whose blocks have no linear maps of their own (fused experts, say).

    Source: arXiv:2405.16700 (IoU of Wanda masks); the shuffled control is this toolkit's.
    """
    given = list(prompts)
    other = given if texts is None else list(texts)
    where = {"image": [p.positions(image) for p in given],
             "text": [_text(p, None if texts is not None else image, text) for p in other]}
    numbers = list(check_layers(None if layers is None else [int(x) for x in layers], model.n_layers))
    blocks = [model._engine("hf").blocks[number] for number in numbers]
    maps = [{name: part for name, part in block.module.named_modules() if isinstance(part, nn.Linear)}
            for block in blocks]
    if not all(maps):
        raise ModelRefused(f"the blocks of {model.name} hold no linear maps to be read one by one.")
    squares: dict[str, dict[nn.Module, Tensor]] = {name: {} for name in MODALITIES}
    place: list[Any] = [None, None, 0]

    def before(module: nn.Module, args: tuple) -> None:
        x = args[0].detach()
        x = x.reshape(-1, x.shape[-1])
        if len(x) != place[2]:  # an expert, which is given some of the tokens only
            return
        x = x[place[1]].double().square().sum(0)
        into = squares[place[0]]
        into[module] = into[module] + x if module in into else x

    handles = [part.register_forward_pre_hook(before) for one in maps for part in one.values()]
    try:
        for name, some in zip(MODALITIES, (given, other)):
            for prompt, positions in zip(some, where[name]):
                place[:] = [name, list(positions), len(prompt)]
                model.run(prompt, logits="none")
    finally:
        for handle in handles:
            handle.remove()
    names = sorted(set.intersection(*(set(one) for one in maps)))
    rng = torch.Generator().manual_seed(int(seed))
    table = {key: np.full((len(maps), len(names)), np.nan) for key in ("iou", "shuffled")}
    for layer, one in enumerate(maps):
        for at, name in enumerate(names):
            part = one[name]
            if part not in squares["image"]:
                continue
            a, b = (squares[m][part].sqrt().float() for m in MODALITIES)
            weight = part.weight.detach()
            mine = important(weight, a, sparsity)
            order = torch.randperm(len(b), generator=rng).to(b.device)
            for key, norms in (("iou", b), ("shuffled", b[order])):
                theirs = important(weight, norms, sparsity)
                table[key][layer, at] = float((mine & theirs).sum() / (mine | theirs).sum())
    s = float(sparsity)
    data = xr.Dataset({key: (("layer", "weight"), values) for key, values in table.items()},
                      {"layer": numbers, "weight": names})
    data["random"] = (1 - s) / (1 + s)
    return Result(data, {**model.manifest(), "measure": "mask_overlap", "sparsity": s,
                         "prompts": [p.digest() for p in given]})


@style()
def draw(found: Result, ax: Axes, centered: bool = False) -> Axes:
    """Mean cosine by layer: within images, within texts, of own pairs, and of other pairs in gray.

    Centered, only pairs are drawn: within a modality the mean is -1 / (n - 1), whatever the states.
    """
    prefix = "centered_" if centered else ""
    for name, role, line in (("image", "image", "-o"), ("text", "text", "-o"),
                             ("matched", "question", "-s"), ("mismatched", "control", "--")):
        if centered and name in MODALITIES:
            continue
        label = {"image": "image with other images", "text": "text with other texts",
                 "matched": "image with its text", "mismatched": "image with other texts"}[name]
        ax.plot(found["layer"], found[prefix + name].mean("prompt"), line, color=color(role),
                label=label)
    ax.axhline(0, color=color("control"), linewidth=0.6)
    ax.set_xlabel("layer (-1: what enters block 0)")
    ax.set_ylabel("cosine, centered by modality" if centered else "cosine")
    return ax


def _unit(x: np.ndarray) -> np.ndarray:
    size = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(size > 0, size, 1.0)


def _reduced(
    model: Model, prompts: Sequence[Prompt], where: Sequence[tuple[int, ...]]
) -> list[tuple[np.ndarray, ...]]:
    """Of some prompts' tokens: mean state, mean unit vector, mean norm and mean step, by layer."""
    states = layer_states(model, prompts, where, batch_size=len(prompts)).values
    starts = np.cumsum([0, *map(len, where)])
    made = []
    for a, b in zip(starts, starts[1:]):
        part = states[:, a:b].astype(np.float64)
        unit = _unit(part)
        made.append((part.mean(1), unit.mean(1), np.linalg.norm(part, axis=2).mean(1),
                     (unit[1:] * unit[:-1]).sum(2).mean(1)))
    return made


def _of_means(image: np.ndarray, text: np.ndarray) -> dict[str, np.ndarray]:
    """Mean cosines of all pairs of tokens are products of the mean unit vectors."""
    n, both = len(image), image @ text.T
    own = np.diag(both)
    within = {name: ((x @ x.T).sum(1) - (x * x).sum(1)) / (n - 1)
              for name, x in (("image", image), ("text", text))}
    return {**within, "matched": own,
            "mismatched": ((both.sum(1) + both.sum(0)) / 2 - own) / (n - 1)}


def _text(prompt: Prompt, image: Optional[Where], text: Optional[Where]) -> tuple[int, ...]:
    if text is not None:
        found = prompt.positions(text)
    else:
        start = 1 if image is None else max(prompt.positions(image)) + 1
        found = tuple(range(start, len(prompt)))
    if not found:
        raise PromptError("a pair has no text token: put text behind the image, or name it with text=.")
    return found


def _vocabulary(
    model: Model, prompt: Prompt, other: Prompt, image: Sequence[int], text: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Divergence of the mean distributions and mean entropies, layer by layer."""
    kl, entropy = [], []
    for (_, a), (_, b) in zip(early_logits(model, prompt, list(image)),
                              early_logits(model, other, list(text))):
        logs = [x.double().log_softmax(-1) for x in (a, b)]
        mean = [x.exp().mean(0).clamp(min=1e-30) for x in logs]
        kl.append(float((mean[0] * (mean[0].log() - mean[1].log())).sum()))
        entropy.append([float(-(x.exp() * x).sum(-1).mean()) for x in logs])
    return np.array(kl), np.array(entropy)
