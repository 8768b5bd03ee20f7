"""Saliency-guided rejection: words that lean on nothing said before are drawn again.

Paper     arXiv:2601.20279 (LVLMs-Saliency, SGRS)
Question  Does a hallucinated word feel the words before it less than a grounded one does?
Measure   |attention x gradient of -log p(word) by it| of the row that predicts the word, on the words
          said so far
Cause     candidates of low saliency are rejected; the released code reads one row too late, where the
          gradient is exactly zero, and so accepts every candidate
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.causal import decoding
from interp.causal.decoding import Method
from interp.core import Prompt, PromptError
from interp.models.head_gradients import head_gradients
from interp.models.model import Model
from interp.models.stepping import Stepping
from interp.stream.chosen_rows import RowWeights
from interp.stream.per_layer import PerLayer

Row = Union[Float[Tensor, "head key"], Float[np.ndarray, "head key"]]
LAYERS = (6, 7, 8)
"""Of 32, as in the paper."""


def row_saliency(attention: Row, gradient: Row) -> Float[Tensor, "key"]:
    """Mean over heads of |attention x gradient|, scaled to the length one; zeros stay zeros.

    Example:
        >>> row_saliency(torch.tensor([[0.5, 0.5]]), torch.tensor([[-6.0, 8.0]]))
        tensor([0.6000, 0.8000])

    Source: arXiv:2601.20279.
    """
    found = (torch.as_tensor(attention).float() * torch.as_tensor(gradient).float()).abs().mean(0)
    size = found.norm()
    return found / size if size > 0 else found


def score(
    rows: Mapping[int, tuple[Row, Row]], history: Sequence[SupportsIndex], normalize: bool = True
) -> float:
    """Mean over layers of the mean saliency on the positions of `history`; NaN for none.

    Example:
        >>> rows = {1: (torch.tensor([[0.5, 0.5]]), torch.tensor([[-6.0, 8.0]]))}
        >>> round(score(rows, [0]), 6)
        0.6
    """
    places = [int(p) for p in history]
    if not places:
        return float("nan")
    found = []
    for attention, gradient in rows.values():
        if normalize:
            found.append(float(row_saliency(attention, gradient)[places].mean()))
        else:
            product = torch.as_tensor(attention).float() * torch.as_tensor(gradient).float()
            found.append(float(product.abs().mean(0)[places].mean()))
    return float(np.mean(found))


def measure(
    model: Model, prompts: Sequence[Prompt], said: Sequence[Sequence[SupportsIndex]],
    *, layers: Optional[Sequence[SupportsIndex]] = None, batch_size: int = 32,
) -> list[dict[str, Float[np.ndarray, "step"]]]:
    """Every said word's saliency and attention on the words before it, and its -log p.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 12))
        >>> found = measure(model, [prompt], [[5, 6, 7]], layers=[1])[0]
        >>> [len(found[name]) for name in ("saliency", "attention", "loss")]
        [3, 3, 3]

    The first word has none before it: NaN.

    Args:
        layers: block numbers; 6, 7 and 8 of 32 for None, at the same depth.

    Source: arXiv:2601.20279, with the predicting row.
    """
    given = list(prompts)
    chosen = _layers(model, layers)
    words = [[int(t) for t in one] for one in said]
    if len(words) != len(given) or not all(words):
        raise PromptError("give the words that were said after every prompt, at least one.")
    if len(given) > batch_size:
        return [one for i in range(0, len(given), batch_size) for one in measure(
            model, given[i : i + batch_size], words[i : i + batch_size], layers=layers,
            batch_size=batch_size)]
    steps = model.stepping(given, gradients=chosen, batch_size=batch_size)
    found: list[dict[str, list[float]]] = [
        {"saliency": [], "attention": [], "loss": []} for _ in given]
    for step in range(max(map(len, words))):
        tokens = [one[step] if step < len(one) else one[-1] for one in words]
        rows = steps.gradient_by_attention(tokens)
        losses = -steps.logits.log_softmax(-1)[range(len(given)), tokens]
        steps.feed(tokens)
        for number, one in enumerate(words):
            if step >= len(one):
                continue
            start = len(given[number])
            history = range(start, start + step)
            kept = found[number]
            kept["loss"].append(float(losses[number]))
            used = rows[number]
            kept["saliency"].append(score(used, history))
            kept["attention"].append(float(np.mean([
                used[layer][0].mean(0)[list(history)].mean() for layer in used])) if step
                else float("nan"))
    return [{name: np.array(values) for name, values in one.items()} for one in found]


def released_row(
    model: Model, prompt: Prompt, said: Sequence[SupportsIndex],
    *, layers: Optional[Sequence[SupportsIndex]] = None,
) -> dict[int, tuple[Float[Tensor, "head key"], Float[Tensor, "head key"]]]:
    """What the released code reads for the last word said: attention and gradient of its own row.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> rows = released_row(model, Prompt.from_tokens(range(3, 12)), [5, 6, 7])
        >>> [bool((gradient == 0).all()) for _, gradient in rows.values()]
        [True]

    The word is appended, its loss taken one row before, and the gradient read in the word's row: no
    later row acts on the loss of an earlier one, so it is zero, and every word gets the score 0.

    Source: arXiv:2601.20279, `do_reject_sample.py`; a whole backward pass.
    """
    words = [int(token) for token in said]
    if not words:
        raise PromptError("give the words that were said, at least one.")
    inputs = {name: np.pad(np.asarray(value), ((0, 0), (0, len(words))))
              if np.shape(value) == (1, len(prompt)) else value
              for name, value in prompt.inputs.items()}
    whole = Prompt((*prompt.ids, *words), inputs=inputs)
    found = head_gradients(model, whole, lambda logits: -logits[-2].log_softmax(-1)[words[-1]])
    chosen, last = _layers(model, layers), len(whole) - 1
    weights = model.run(whole, logits="none", stats=[PerLayer(
        "segments", lambda number, layer: RowWeights([last]))]).stats["segments"]
    return {layer: (torch.tensor(weights.sel(layer=layer).values[0, :, 0]),
                    found.by_attention(layer)[:, -1]) for layer in chosen}


def _layers(model: Model, layers: Optional[Sequence[SupportsIndex]]) -> tuple[int, ...]:
    return (decoding.at_depth(LAYERS, model.n_layers) if layers is None
            else tuple(int(layer) for layer in layers))


@dataclass(frozen=True, eq=False)
class SGRS(Method):
    """Sample among the best words, reject those of low saliency on what was said.

    From the `top` most probable words one is drawn; it is accepted if its saliency is at least
    alpha times the mean of the last `window` accepted ones; after `tries` rejections the candidate
    of the highest saliency is taken. Until there is a history everything is accepted, with score 1.
    `row="released"` accepts everything (see the module): plain sampling, the control.

    Source: arXiv:2601.20279; its defaults.
    """

    top: SupportsIndex = 5
    alpha: SupportsFloat = 0.6
    window: SupportsIndex = 5
    tries: SupportsIndex = 3
    layers: Optional[Sequence[SupportsIndex]] = None
    row: str = "predicting"
    seed: int = 0
    name = "SGRS"

    def gradients(self, model: Model) -> tuple[int, ...]:
        return _layers(model, self.layers) if self.row == "predicting" else ()

    def choose(
        self, steps: Stepping, scores: Float[Tensor, "prompt vocab"], memory: dict
    ) -> list[int]:
        count = len(scores)
        rngs = memory.setdefault("rngs", [
            np.random.default_rng([self.seed, number]) for number in range(count)])
        accepted = memory.setdefault("accepted", [[] for _ in range(count)])
        best = [_candidates(row, int(self.top), rng) for row, rng in zip(scores, rngs)]
        if self.row == "released":
            return [words[0] for words in best]
        chosen: list[Optional[int]] = [None] * count
        tried: list[list[tuple[float, int]]] = [[] for _ in range(count)]
        for attempt in range(min(int(self.tries), int(self.top))):
            tokens = [words[attempt] if attempt < len(words) else words[-1] for words in best]
            rows = steps.gradient_by_attention(tokens + [0] * (len(steps) - count))
            for number in range(count):
                if chosen[number] is not None:
                    continue
                start, said = len(steps.prompts[number]), len(steps.fed[number])
                value = score(rows[number], range(start, start + said)) if said else 1.0
                recent = accepted[number][-int(self.window):]
                limit = float(self.alpha) * float(np.mean(recent)) if recent else 0.0
                tried[number].append((value, tokens[number]))
                if value >= limit:
                    chosen[number] = tokens[number]
                    if said:
                        accepted[number].append(value)
            if all(token is not None for token in chosen):
                break
        for number in range(count):
            if chosen[number] is None:
                value, token = max(tried[number])
                chosen[number] = token
                accepted[number].append(value)
        return [int(token) for token in chosen if token is not None]


def _candidates(
    logits: Float[Tensor, "vocab"], top: int, rng: np.random.Generator
) -> list[int]:
    """The most probable words in the order in which they are drawn, by their probabilities."""
    best = logits.topk(min(top, len(logits)))
    p = best.values.double().softmax(-1).numpy()
    known = int((p > 0).sum())
    order = rng.choice(len(p), known, replace=False, p=p)
    return [int(best.indices[i]) for i in order]
