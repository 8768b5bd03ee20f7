"""Text dominance: how much more generated tokens attend to a text token than to a visual one.

Paper     arXiv:2508.10552
Question  Is attention balanced between text and image, and do more visual tokens tip the balance?
Measure   attention of decoding rows per text token over that per other token (MDI), and share of the
          mass over share of the tokens (AEI), with sinks and start token in and out
Cause     keep the best of the visual tokens, as many random ones, or give the image several times
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import OutOfRange, Prompt, PromptError, Result, block, each
from interp.core.prompt import Where
from interp.figures.style import color, style
from interp.models.model import Model
from interp.stream.chosen_rows import RowMass
from interp.stream.per_layer import PerLayer

Number = Union[SupportsFloat, np.ndarray]
Criterion = Callable[[Model, Prompt], Any]
"""Model and prompt -> one score per image token; those with the highest stay."""

KEYS = ("all", "no_bos", "no_sinks", "question", "generated")
"""What counts as text: every other token of the prompt; the same without the first; without sinks,
on both sides; the question only; the prompt and what was generated so far."""

ROWS = ("own", "predicting")


# -- the two numbers -----------------------------------------------------------------------------


def mdi(text: Number, other: Number, n_text: Number, n_other: Number) -> Any:
    """Modality dominance: attention per text token over attention per other token.

    Example:
        >>> float(mdi(0.5, 0.5, 10, 40))
        4.0

    Args:
        text, other: attention mass on either kind of key. n_text, n_other: how many keys there are.

    Above 1 text dominates; infinite where nothing falls on the others, NaN where nothing falls on
    either.

    Source: arXiv:2508.10552, formulas second-hand.
    """
    a, b, n, m = (np.asarray(x, dtype=float) for x in (text, other, n_text, n_other))
    if (a < 0).any() or (b < 0).any() or (n <= 0).any() or (m <= 0).any():
        raise ValueError("attention mass cannot be negative, and there must be keys on both sides.")
    with np.errstate(divide="ignore", invalid="ignore"):
        return (a / n) / (b / m)


def aei(text: Number, other: Number, n_text: Number, n_other: Number) -> Any:
    """Attention efficiency of text: its share of the mass over its share of the tokens.

    Example:
        >>> float(aei(0.5, 0.5, 10, 40))
        2.5

    At most 1 + n_other / n_text. It says nothing that `mdi` and the counts do not (`aei_of_mdi`).

    Source: arXiv:2508.10552, formulas second-hand.
    """
    a, b, n, m = (np.asarray(x, dtype=float) for x in (text, other, n_text, n_other))
    if (a < 0).any() or (b < 0).any() or (n <= 0).any() or (m <= 0).any():
        raise ValueError("attention mass cannot be negative, and there must be keys on both sides.")
    with np.errstate(divide="ignore", invalid="ignore"):
        return (a / (a + b)) / (n / (n + m))


def aei_of_mdi(value: Number, ratio: Number) -> Any:
    """AEI from MDI and the ratio of text to other tokens: MDI (1 + ratio) / (1 + ratio MDI).

    Example:
        >>> float(aei_of_mdi(4.0, 10 / 40))
        2.5
    """
    value, ratio = (np.asarray(x, dtype=float) for x in (value, ratio))
    return value * (1 + ratio) / (1 + ratio * value)


def implied_ratio(dominance: Number, efficiency: Number) -> Any:
    """The ratio of text to other tokens that an MDI and an AEI of one measurement imply.

    Example:
        >>> [round(float(implied_ratio(m, a)), 2) for m, a in ((10.23, 3.51), (1.58, 1.04))]
        [0.26, 8.54]

    Of one model on one kind of prompt all pairs must give the same number, unless ratios were
    averaged; those printed for LLaVA-1.5-7B (second-hand) do not.
    """
    m, a = (np.asarray(x, dtype=float) for x in (dominance, efficiency))
    return (m - a) / (m * (a - 1))


# -- attention of decoding rows ------------------------------------------------------------------


def measure(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    new_tokens: SupportsIndex = 8,
    image: Where = "image",
    row: str = "own",
    sinks: Optional[Sequence[Mapping[int, Sequence[int]]]] = None,
    keep: Optional[Sequence[Sequence[int]]] = None,
    batch_size: int = 16,
) -> Result:
    """Attention of every decoding row on text and image, by layer, for all ways to count text.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 15), {"image": (2, 8)})
        >>> found = measure(model, [prompt], new_tokens=2)
        >>> found["text"].dims, float(found["n_other"].max())
        (('prompt', 'layer', 'step', 'segment'), 6.0)

    Args:
        new_tokens: greedy tokens to generate; rows from an end token on are left out.
        row: "own": the queries are the generated tokens; "predicting": the rows that predict them,
            the last of the prompt first.
        sinks: per prompt {layer: sink positions}, of text and image; without them "no_sinks" is NaN.
        keep: the image tokens that stay in every prompt, all for None. The others are hidden from
            everything in all layers (the same as dropped, with position ids kept) and not counted.

    Returns:
        [prompt, layer, step, segment], `segment` being `KEYS`: `text` and `other`, the attention
        mass, mean over heads; `n_text`, `n_other`, the numbers of keys. NaN where a set is empty or
        lies outside of a sliding window, and after the end of the output.

    Source: arXiv:2508.10552; whether generated tokens count as text is left open there.
    """
    if row not in ROWS:
        raise ValueError(f"row must be one of {', '.join(map(repr, ROWS))}, not {row!r}.")
    given, steps = list(prompts), int(new_tokens)
    if not given or steps < 1:
        raise PromptError("give at least one prompt, and generate at least one token.")
    images = [prompt.positions(image) for prompt in given]
    kept = [tuple(sorted(int(p) for p in some)) for some in keep] if keep is not None else images
    for number, (some, whole) in enumerate(zip(kept, images, strict=True)):
        if not some or not set(some) <= set(whole):
            raise OutOfRange(f"prompt {number}: keep at least one of its image tokens, and no others.")
    shape = (len(given), model.n_layers, steps, len(KEYS))
    names = ("text", "other", "n_text", "n_other")
    table = {name: np.full(shape, np.nan) for name in names}
    said = []
    for start in range(0, len(given), batch_size):
        some = range(start, min(start + batch_size, len(given)))

        def sets(number: int, layer: int) -> dict[str, tuple[list[int], list[int]]]:
            own = None if sinks is None else sinks[number].get(layer, ())
            return _sets(given[number], images[number], kept[number], own)

        def rows(number: int, layer: int) -> RowMass:
            length = len(given[number])
            segments: dict[str, Any] = {
                f"{side} {name}": where for name, pair in sets(number, layer).items()
                for side, where in zip(("text", "other"), pair) if where}
            first = length - (row == "predicting")
            segments.update({f"generated {step}": range(length, first + step + 1)
                             for step in range(steps) if first + step >= length})
            return RowMass(segments, range(first, first + steps))

        dropped = [sorted(set(images[n]) - set(kept[n])) for n in some]
        run = model.run(
            [given[n] for n in some], new_tokens=steps, batch_size=batch_size, logits="none",
            write=each(block("all", gone) if gone else () for gone in dropped),
            stats=PerLayer("segments", lambda n, layer, base=start: rows(base + n, layer)))
        for number in some:
            made = run.new_tokens[number - start]
            ends = [i for i, token in enumerate(made) if token in model.end_tokens]
            # The row that predicts the end is still read, the end's own row is not.
            last = (ends[0] + (row == "predicting")) if ends else steps
            said.append(made[: ends[0]] if ends else made)
            mass = run.stats["segments"].isel(prompt=number - start).mean("head", skipna=False)
            _fill({k: v[number] for k, v in table.items()}, mass, min(last, steps),
                  int(row == "own"), lambda layer, n=number: sets(n, layer))
    dims = ("prompt", "layer", "step", "segment")
    data = xr.Dataset({name: (dims, values) for name, values in table.items()}, {
        "segment": list(KEYS), "layer": np.arange(model.n_layers), "step": np.arange(steps)})
    return Result(data, {
        **model.manifest(), "measure": "dominance", "row": row, "output": said,
        "kept": [len(some) for some in kept], "removal": "mask_keys(all)" if keep is not None else
        "none", "positions": "kept", "prompts": [prompt.digest() for prompt in given]})


def per_token(
    found: Result, keys: str = "all", layers: Optional[Sequence[SupportsIndex]] = None
) -> tuple[Float[np.ndarray, "prompt"], Float[np.ndarray, "prompt"]]:
    """Attention per text token and per other token of every prompt, mean over layers and rows.

    Divide the means over prompts for the ratio of means (the paper's order of averaging, as far as
    it is known), or each pair for the mean of ratios: the two differ.
    """
    data = found.data.sel(segment=keys)
    if layers is not None:
        data = data.sel(layer=[int(x) for x in layers])
    with np.errstate(divide="ignore", invalid="ignore"):
        return tuple((data[side] / data[f"n_{side}"]).mean(("layer", "step"), skipna=True).values
                     for side in ("text", "other"))  # type: ignore[return-value]


def keep_best(
    scores: Float[Tensor | np.ndarray, "patch"], positions: Sequence[SupportsIndex],
    reduction: SupportsFloat,
) -> tuple[int, ...]:
    """The image tokens that are left when a share of them, those of low score, is removed.

    Example:
        >>> keep_best(np.array([0.1, 0.4, 0.3, 0.2]), [5, 6, 7, 8], 0.5)
        (6, 7)

    At least one stays. Source: arXiv:2508.10552 keeps those with the highest attention of the
    vision encoder's class token, at reductions of 75, 90 and 95 %.
    """
    values = torch.as_tensor(scores)
    if len(values) != len(positions) or not 0 <= float(reduction) < 1:
        raise ValueError(f"{len(values)} scores for {len(positions)} image tokens, reduction "
                         f"{float(reduction):g}: give one score each and a share below 1.")
    count = max(1, round(len(values) * (1 - float(reduction))))
    best = values.argsort(descending=True, stable=True)[:count]
    return tuple(sorted(int(positions[int(i)]) for i in best))


# -- drawing -------------------------------------------------------------------------------------


@style()
def draw(found: Result, ax: Axes, keys: Sequence[str] = ("all", "no_bos", "question")) -> Axes:
    """MDI by layer (ratio of means over prompts), one line per way to count text; balance at 1."""
    for number, name in enumerate(keys):
        values = []
        for layer in found["layer"].values:
            text, other = per_token(found, name, [int(layer)])
            known = np.isfinite(text) & np.isfinite(other)
            values.append(text[known].mean() / other[known].mean() if known.any() else np.nan)
        ax.plot(found["layer"].values, values, ("-o", "--s", ":^", "-.d", "-x")[number % 5],
                markersize=3, color=color("text"), alpha=1 - 0.2 * number,
                label=name.replace("_", " "))
    ax.axhline(1, color=color("control"), linewidth=0.8)
    ax.set_yscale("log")
    ax.set_xlabel("layer")
    ax.set_ylabel("MDI (attention per text token /\nper visual token)")
    ax.legend()
    return ax


def _sets(
    prompt: Prompt, image: Sequence[int], kept: Sequence[int], sinks: Optional[Sequence[int]]
) -> dict[str, tuple[list[int], list[int]]]:
    """For each way to count: text keys and other keys."""
    text, other = [p for p in range(len(prompt)) if p not in set(image)], list(kept)
    asked = sorted({p for segment in prompt.of_kind("question") for p in segment.positions}
                   - set(image))
    found = {"all": (text, other), "no_bos": ([p for p in text if p], other),
             "question": (asked, other), "generated": (text, other)}
    if sinks is not None:
        out = set(sinks)
        found["no_sinks"] = ([p for p in text if p not in out], [p for p in other if p not in out])
    return found


def _fill(table: Mapping[str, np.ndarray], mass: xr.DataArray, last: int, before: int,
          sets: Callable[[int], dict[str, tuple[list[int], list[int]]]]) -> None:
    """Put the masses of one prompt, `[layer, query, segment]`, where they belong.

    `before` tokens of the output are keys of the first row (its own token among them).
    """
    mass = mass.transpose("layer", "query", "segment")
    names = [str(name) for name in mass["segment"].values]
    for place, layer in enumerate(mass["layer"].values):
        for name, pair in sets(int(layer)).items():
            column = KEYS.index(name)
            for side, where in zip(("text", "other"), pair):
                if not where:
                    continue
                values = mass.values[place, :last, names.index(f"{side} {name}")].astype(float)
                count = np.full(last, float(len(where)))
                if name == "generated" and side == "text":
                    for step in range(1 - before, last):
                        own = names.index(f"generated {step}")
                        values[step] += mass.values[place, step, own]
                        count[step] += before + step
                table[side][int(layer), :last, column] = values
                table[f"n_{side}"][int(layer), :last, column] = count
