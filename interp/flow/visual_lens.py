"""Visual lens: the words that image tokens stand for, by layer and place.

Paper     arXiv:2410.07149
Question  Do image tokens come to stand for the words of what they show, and only there?
Measure   probability of an object's words in every image token's early logits; how well it tells the
          object's cells from the others (AUROC); the same for words of objects that are not there
"""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from scipy import stats
from torch import Tensor

from interp.core import OutOfRange, Prompt, PromptError, Result
from interp.core.prompt import Where
from interp.figures.style import color, style
from interp.models.logit_lens import early_logits
from interp.models.model import Model


def auroc(
    values: Float[Tensor | np.ndarray, "layer patch"], inside: Bool[Tensor | np.ndarray, "patch"]
) -> Float[np.ndarray, "layer"]:
    """How often a cell on the object has a higher value than one beside it, in every layer.

    Example:
        >>> auroc(np.array([[3.0, 1.0, 2.0, 0.0]]), np.array([True, False, False, False]))
        array([1.])

    Ties count half. NaN where all cells are inside, or none.
    """
    x, flags = torch.as_tensor(values).double().numpy(), torch.as_tensor(inside).bool().numpy()
    n, m = int(flags.sum()), int((~flags).sum())
    if not n or not m:
        return np.full(len(x), np.nan)
    ranks = stats.rankdata(x, axis=-1)[:, flags].sum(-1)
    return (ranks - n * (n + 1) / 2) / (n * m)


def probabilities(
    model: Model, prompt: Prompt, words: Sequence[int], image: Where = "image"
) -> Float[np.ndarray, "layer patch"]:
    """The largest probability of any of these words in every image token, layer by layer.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> probabilities(model, Prompt.from_tokens(range(3, 12), {"image": (1, 7)}), [5]).shape
        (4, 6)

    Layer l is what enters block l, the last what leaves the last block.
    """
    chosen = [int(word) for word in words]
    if not chosen:
        raise PromptError("give at least one word (token id) to look for.")
    return np.stack([logits.softmax(-1)[:, chosen].max(-1).values.numpy()
                     for _, logits in early_logits(model, prompt, image)])


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    words: Sequence[Sequence[int]],
    inside: Sequence[Sequence[int]],
    absent: Sequence[Sequence[int]],
    *,
    image: Where = "image",
) -> Result:
    """How probable an object's words are in its cells and elsewhere, and how well they locate it.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 12), {"image": (1, 7)})
        >>> found = measure(model, [prompt], [[5]], [[2, 3]], [[9]])
        >>> found["auroc"].dims, found.data.sizes["layer"]
        (('prompt', 'condition', 'layer'), 4)

    Args:
        words: token ids that name each prompt's object. inside: its image tokens.
        absent: as many words of things that are not in the picture: the control.

    Returns:
        [prompt, condition, layer], the conditions "word" and "absent": `inside` and `outside`, the
        mean over cells of the largest probability of any word; `auroc`.

    Source: arXiv:2410.07149.
    """
    given = list(prompts)
    shape = (len(given), 2, model.n_layers + 1)
    table = {name: np.full(shape, np.nan) for name in ("inside", "outside", "auroc")}
    for number, prompt in enumerate(given):
        places = prompt.positions(image)
        outside = sorted({int(p) for p in inside[number]} - set(places))
        if outside:
            raise OutOfRange(f"position {outside[0]} of prompt {number} is no image token.")
        flags = np.isin(places, list(inside[number]))
        both = [[int(w) for w in some[number]] for some in (words, absent)]
        if not all(both):
            raise PromptError(f"prompt {number} has no words to look for.")
        for layer, logits in early_logits(model, prompt, image):
            p = logits.softmax(-1)
            for column, some in enumerate(both):
                value = p[:, some].max(-1).values.double().numpy()
                if flags.any():
                    table["inside"][number, column, layer] = value[flags].mean()
                if not flags.all():
                    table["outside"][number, column, layer] = value[~flags].mean()
                table["auroc"][number, column, layer] = auroc(value[None], flags)[0]
    data = xr.Dataset(
        {name: (("prompt", "condition", "layer"), values) for name, values in table.items()},
        {"condition": ["word", "absent"], "layer": np.arange(model.n_layers + 1)})
    return Result(data, {**model.manifest(), "measure": "visual_lens",
                         "layers": "what enters a block; the last, what leaves the last block",
                         "prompts": [prompt.digest() for prompt in given]})


@style()
def draw(found: Result, ax: Axes, what: str = "auroc") -> Axes:
    """Mean by layer: AUROC of the object's words and of absent ones, or their probability."""
    layers = found["layer"].values
    for condition, role in (("word", "image"), ("absent", "control")):
        one = found.data.sel(condition=condition).mean("prompt")
        if what == "auroc":
            ax.plot(layers, one["auroc"], "-o", markersize=3, color=color(role),
                    label="words of the object" if condition == "word" else "absent words")
        else:
            for place, line in (("inside", "-o"), ("outside", "--")):
                ax.plot(layers, one[place], line, markersize=3, color=color(role),
                        label=f"{condition}, {place}")
    if what == "auroc":
        ax.axhline(0.5, color=color("control"), linewidth=0.8, linestyle=":")
        ax.set_ylabel("AUROC of the object's cells")
    else:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.set_ylabel("probability")
    ax.set_xlabel("layer (what enters it)")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    return ax
