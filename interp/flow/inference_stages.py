"""Stages of inference: when text reads the image, stops, and reads it again before it answers.

Paper     arXiv:2411.19628 (DyVTE)
Question  In which layers does text look at the image, and do text states tell when that is over?
Measure   attention mass within and between text and image by layer, and its change points; how well
          the states of the text predict the layer from which no image token is needed
Cause     cut text from image stage by stage (`interp.flow.knockout`); withdraw the image
          (`interp.flow.horizon`)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, SupportsIndex

import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes

from interp.core import Prompt, PromptError, Result
from interp.core.prompt import Where
from interp.figures.style import color, note, style
from interp.models.model import Model
from interp.stream.per_layer import PerLayer
from interp.stream.reducers import SegmentMass


@dataclass(frozen=True)
class Stages:
    """Layers in which text reads the image early, hardly, and again; `fusion` may be empty."""

    fusion: tuple[int, ...]
    modeling: tuple[int, ...]
    reasoning: tuple[int, ...]


def stage_masses(model: Model, prompts: Sequence[Prompt], image: Where = "image",
                 batch_size: int = 16) -> Result:
    """Attention mass within and between text and image, by layer: m_tt, m_tv, m_vt, m_vv.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 15), {"image": (2, 8)})
        >>> found = stage_masses(model, [prompt])
        >>> [str(name) for name in found["segment"].values]
        ['tt', 'tv', 'vt', 'vv']

    The first letter is the query, mean over queries and heads. Text queries are those behind the
    image: earlier ones cannot see it.

    Returns:
        `mass` [prompt, layer, segment].

    Source: arXiv:2411.19628 in this toolkit's operationalization.
    """
    given, pairs = list(prompts), ("tt", "tv", "vt", "vv")
    table = np.zeros((len(given), model.n_layers, len(pairs)))
    for start in range(0, len(given), batch_size):
        some = given[start : start + batch_size]
        places = [prompt.positions(image) for prompt in some]
        texts = [[p for p in range(len(prompt)) if p not in set(own)]
                 for prompt, own in zip(some, places)]
        run = model.run(some, logits="none", batch_size=batch_size, stats=PerLayer(
            "segments", lambda n, _, texts=texts, places=places: SegmentMass(
                {"t": texts[n], "v": list(places[n])})))
        for number, prompt in enumerate(some):
            later = range(max(places[number]) + 1, len(prompt))
            if not len(later):
                raise PromptError("no token follows the image, so no text reads it; ask a question.")
            mass = run.stats["segments"].isel(prompt=number).mean("head")
            queries = {"t": list(later), "v": list(places[number])}
            for column, (query, key) in enumerate(pairs):
                table[start + number, :, column] = mass.sel(segment=key).isel(
                    query=queries[query]).mean("query").transpose("layer").values
    data = xr.Dataset({"mass": (("prompt", "layer", "segment"), table)},
                      {"segment": list(pairs), "layer": np.arange(model.n_layers)})
    return Result(data, {**model.manifest(), "measure": "stage_masses",
                         "prompts": [prompt.digest() for prompt in given]})


def stages(text_to_image: Float[np.ndarray, "layer"]) -> Optional[Stages]:
    """The three stages, from how much text attends to the image in every layer; None without them.

    Example:
        >>> stages(np.array([0.5, 0.4, 0.1, 0.1, 0.3, 0.2]))
        Stages(fusion=(0, 1), modeling=(2, 3), reasoning=(4, 5))
        >>> stages(np.array([0.5, 0.4, 0.3, 0.2])) is None
        True

    Fusion: layers above the median before the first local minimum; reasoning begins where the mass
    rises after it.

    Source: stages of arXiv:2411.19628; the rule is this toolkit's.
    """
    v = np.asarray(text_to_image, dtype=float)
    falls = np.flatnonzero(np.diff(v) < 0)
    if not len(falls):
        return None
    rises = np.flatnonzero(np.diff(v) > 0)
    rises = rises[rises > falls[0]]
    if not len(rises):
        return None
    start, lowest = int(rises[0]) + 1, int(rises[0])
    while lowest > 0 and v[lowest - 1] == v[int(rises[0])]:
        lowest -= 1
    fusion = tuple(layer for layer in range(lowest) if v[layer] > np.median(v))
    begin = fusion[-1] + 1 if fusion else 0
    return Stages(fusion, tuple(range(begin, start)), tuple(range(start, len(v))))


# -- does the text tell when vision is done? -----------------------------------------------------


def text_states(
    model: Model, prompts: Sequence[Prompt], layer: SupportsIndex, image: Where = "image",
    batch_size: int = 16,
) -> Float[np.ndarray, "prompt feature"]:
    """What the exit gate of DyVTE sees: mean state of the text without its last token, and the last.

    Of what enters block `layer`; text is what follows the image. `[prompt, 2 d_model]`.

    Source: arXiv:2411.19628, released code.
    """
    site, found = f"resid_pre.{int(layer)}", []
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        read = model.run(some, read=site, logits="none", batch_size=batch_size).reads[site].values
        for prompt, states in zip(some, read.reshape(len(some), -1, model.d_model)):
            first = max(prompt.positions(image)) + 1
            if first >= len(prompt):
                raise PromptError("no token follows the image, so there is no text state to read.")
            text = states[first : len(prompt)]
            found.append(np.concatenate([text[:-1].mean(0) if len(text) > 1 else text[0], text[-1]]))
    return np.stack(found)


def predicted(
    features: Float[np.ndarray, "sample feature"], target: Float[np.ndarray, "sample"],
    groups: Any, folds: SupportsIndex = 5,
) -> Float[np.ndarray, "sample"]:
    """The target as a ridge regression predicts it for groups that it was not fitted to.

    Example:
        >>> x = np.random.default_rng(0).standard_normal((40, 3))
        >>> bool(np.corrcoef(predicted(x, x[:, 0], range(40)), x[:, 0])[0, 1] > 0.9)
        True
    """
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count = min(int(folds), len(set(groups)))
    if count < 2:
        raise ValueError("grouped cross-validation needs at least two groups.")
    fit = make_pipeline(StandardScaler(), RidgeCV(np.logspace(-1, 5, 13)))
    found = cross_val_predict(fit, features, target, groups=list(groups), cv=GroupKFold(count))
    return np.asarray(found, dtype=float)


def explained(
    target: Float[np.ndarray, "sample"], guess: Float[np.ndarray, "sample"]
) -> float:
    """R squared: one minus the squared error over that of the mean; NaN where the target is constant.

    Example:
        >>> explained(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]))
        1.0
    """
    spread = float(((target - target.mean()) ** 2).sum())
    return 1 - float(((target - guess) ** 2).sum()) / spread if spread > 0 else float("nan")


@style()
def draw(found: Result, ax: Axes) -> Axes:
    """Mass by layer for each pair of modalities, and where text stops and begins to read the image."""
    looks = {"tv": ("image", "-o"), "tt": ("text", "-s"), "vt": ("text", ":^"), "vv": ("image", ":d")}
    for name in map(str, found["segment"].values):
        role, mark = looks[name]
        mean = found["mass"].sel(segment=name).mean("prompt")
        who = {"t": "text", "v": "image"}
        ax.plot(mean["layer"], mean, mark, markersize=3, color=color(role),
                label=f"{who[name[0]]} to {who[name[1]]}")
    split = stages(found["mass"].sel(segment="tv").mean("prompt").values)
    if split is not None:
        for layers in (split.modeling, split.reasoning):
            if layers and layers[0]:
                ax.axvline(layers[0] - 0.5, color=color("control"), linestyle=":", linewidth=0.8)
    else:
        note(ax, "text to image does not fall and rise again: no change points")
    ax.set_ylim(0, 1)
    ax.set_xlabel("layer")
    ax.set_ylabel("attention (share of the row)")
    ax.legend()
    return ax
