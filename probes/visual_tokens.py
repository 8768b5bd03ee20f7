"""Visual tokens as they enter a language model: their states, the attention they get, words near them.

Source    arXiv:2603.00510 (nearest input embeddings)
"""

from collections.abc import Sequence
from typing import Any, Optional, SupportsIndex

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from interp.core import Prompt, PromptError
from interp.models.model import Model
from interp.stream.reducers import Received
from probes.neighbors import cosine_neighbors


def nearest_words(
    tokens: Float[Tensor, "sample d_model"] | Float[np.ndarray, "sample d_model"],
    embeddings: Float[Tensor, "vocab d_model"] | Float[np.ndarray, "vocab d_model"],
    k: SupportsIndex = 3,
) -> tuple[Float[np.ndarray, "sample k"], Int[np.ndarray, "sample k"]]:
    """Cosine and id of the words whose embeddings are nearest; empty rows of the vocabulary aside.

    Example:
        >>> cosine, ids = nearest_words(np.array([[0.0, 2.0]]), np.array([[1.0, 1], [0, 1], [0, 0]]), 2)
        >>> ids.tolist(), cosine.round(2).tolist()
        ([[1, 0]], [[1.0, 0.71]])

    Source: arXiv:2603.00510.
    """
    table = torch.as_tensor(embeddings).detach()
    used = (table != 0).any(1).nonzero()[:, 0]
    similarity, index = cosine_neighbors(tokens, table[used].cpu(), k)
    return similarity.numpy(), used.cpu()[index].numpy()


def word_embeddings(model: Model) -> Float[Tensor, "vocab d_model"]:
    """The input embedding matrix; a scale that the model applies to it does not change cosines."""
    return model.hf.get_input_embeddings().weight.detach()  # type: ignore[operator]


def visual_tokens(
    model: Model, prompts: Sequence[Prompt], image: str = "image", *, received: bool = True,
    batch_size: int = 8,
) -> xr.Dataset:
    """What stands in the prompts for their pictures, and what attention it receives.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> found = visual_tokens(model, [Prompt.from_tokens(range(3, 12), {"image": (1, 7)})])
        >>> found["state"].dims, found["place"].values.tolist()
        (('sample', 'd_model'), [0, 1, 2, 3, 4, 5])

    Args:
        image: the segment, or kind of segment, of image tokens.
        received: whether to measure attention (from the positions after the image, the mean over
            heads and the layers from 2 on; NaN where nothing follows).

    Returns:
        `state` [sample, d_model], what enters block 0; per sample `prompt`, `position`, `place` (its
        number within the image), `norm`, `received`.
    """
    given = list(prompts)
    if not given:
        raise PromptError("no prompts to read image tokens of: give at least one.")
    places = [prompt.positions(image) for prompt in given]
    parts: list[Any] = [None] * len(given)
    alike: dict[Any, list[int]] = {}
    for number, prompt in enumerate(given):
        alike.setdefault((len(prompt), places[number]), []).append(number)
    for (length, where), numbers in alike.items():
        later = list(range(max(where) + 1, length))
        stats = [Received(subset=later)] if received and later else []
        for start in range(0, len(numbers), batch_size):
            some = numbers[start : start + batch_size]
            run = model.run([given[i] for i in some], read="embed", stats=stats, logits="none",
                            batch_size=batch_size)
            for at, i in enumerate(some):
                mass = np.full(len(where), np.nan)
                if stats:
                    layers = slice(2 if model.n_layers > 2 else 0, None)
                    rows = run.stats["received"].isel(prompt=at, layer=layers)
                    mass = rows.mean(("layer", "head")).values[list(where)]
                parts[i] = run.reads["embed"].values[at][list(where)], mass
    state = np.concatenate([part[0] for part in parts])
    return xr.Dataset({
        "state": (("sample", "d_model"), state),
        "received": ("sample", np.concatenate([part[1] for part in parts])),
        "norm": ("sample", np.linalg.norm(state, axis=1)),
        "prompt": ("sample", np.repeat(np.arange(len(given)), [len(w) for w in places])),
        "position": ("sample", np.concatenate([np.array(w) for w in places])),
        "place": ("sample", np.concatenate([np.arange(len(w)) for w in places]))})


def between_images(
    tokens: Float[np.ndarray, "sample d_model"], images: Int[np.ndarray, "sample"],
    places: Optional[Int[np.ndarray, "sample"]] = None,
) -> float:
    """Mean cosine of all pairs of tokens from different images; of the same place, if places are given.

    Example:
        >>> x = np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]])
        >>> images, places = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
        >>> between_images(x, images), between_images(x, images, places)
        (0.5, 1.0)

    NaN where there is no such pair.
    """
    u = tokens / np.linalg.norm(tokens, axis=1, keepdims=True)
    total, pairs = 0.0, 0
    for place in [None] if places is None else np.unique(places):
        mine = slice(None) if place is None else places == place
        _, number, count = np.unique(images[mine], return_inverse=True, return_counts=True)
        own = np.zeros((len(count), u.shape[1]))
        np.add.at(own, number, u[mine])
        total += float((own.sum(0) ** 2).sum() - (own**2).sum())
        pairs += int(count.sum() ** 2 - (count**2).sum())
    return total / pairs if pairs else float("nan")
