"""Attention between the words of annotated sentences: what probes of syntax look at.

Source    arXiv:1906.04341 (sum over the pieces attended to, mean over those that attend)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional, SupportsIndex, Union

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import NumericalError, OutOfRange, PromptError
from interp.models.offsets import char_spans, tokens_in

ROOT = -1
"""The head of a word that has none."""

Maps = Union[Float[Tensor, "*channel query key"], Float[np.ndarray, "*channel query key"]]


@dataclass(frozen=True, eq=False)
class Sentence:
    """What a probe may look at in one sentence of n words.

    Attributes:
        attention: `[channel, n, n]`, from word to word, one channel per head.
        to_special, from_special: `[channel, n, special]`, attention of every word to special tokens
            ([CLS], [SEP], a start token) and back; the root is scored from these.
        vectors: `[n, size]` word vectors, where the probe looks at words.
    """

    attention: Float[np.ndarray, "channel word word"]
    to_special: Float[np.ndarray, "channel word special"]
    from_special: Float[np.ndarray, "channel word special"]
    vectors: Optional[Float[np.ndarray, "word size"]] = None

    def __len__(self) -> int:
        return self.attention.shape[1]


def word_attention(
    attention: Maps, words: Sequence[Sequence[SupportsIndex]]
) -> Float[np.ndarray, "*channel word word"]:
    """Attention between words: summed over the tokens attended to, mean over those attending.

    Example:
        >>> word_attention(np.array([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.0, 0.5, 0.5]]),
        ...                [[0], [1, 2]]).round(2).tolist()
        [[0.5, 0.5], [0.1, 0.9]]

    Args:
        words: the positions of the tokens of each word.

    Rows that sum to one still do where every token belongs to a word.

    Source: arXiv:1906.04341 (the released function takes the first token's row by default, against
    the paper and its own comment).
    """
    maps = np.asarray(torch.as_tensor(attention).double())
    if not np.isfinite(maps).all():
        raise NumericalError("attention contains NaN or infinity; recompute it in float32.")
    n = maps.shape[-1]
    total = np.zeros((len(words), n))
    for word, tokens in enumerate(words):
        places = [int(t) for t in tokens]
        if not places or min(places) < 0 or max(places) >= n:
            raise OutOfRange(f"word {word} has the tokens {places}, of {n}: every word needs some.")
        total[word, places] = 1.0
    return (total / total.sum(1, keepdims=True)) @ maps @ total.T


def sentence(
    attention: Float[np.ndarray, "channel query key"],
    words: Sequence[Sequence[SupportsIndex]],
    special: Sequence[SupportsIndex] = (),
    vectors: Optional[Float[np.ndarray, "word size"]] = None,
) -> Sentence:
    """A sentence from attention between tokens, the tokens of its words, and its special tokens."""
    units = [*words, *([position] for position in special)]
    both = word_attention(attention, units)
    n = len(words)
    return Sentence(both[:, :n, :n], both[:, :n, n:], both[:, n:, :n].transpose(0, 2, 1), vectors)


@dataclass(frozen=True)
class Parsed:
    """An annotated sentence: its words, the head of each (-1 for the root), and its relation to it.

    Example:
        >>> Parsed(("dogs", "bark"), (1, -1), ("nsubj", "root")).text
        'dogs bark'
    """

    words: tuple[str, ...]
    heads: tuple[int, ...]
    relations: tuple[str, ...]

    def __post_init__(self) -> None:
        if not len(self.words) == len(self.heads) == len(self.relations):
            raise ValueError(f"{len(self.words)} words, {len(self.heads)} heads and "
                             f"{len(self.relations)} relations: give one of each per word.")

    @property
    def text(self) -> str:
        """The words with spaces between them."""
        return " ".join(self.words)


def read(model: Any, parsed: Sequence[Parsed], *, vectors: bool = True) -> list[Sentence]:
    """Attention between the words of annotated sentences, all heads of all blocks as channels.

    Example:
        >>> import interp
        >>> model = interp.open_model("all-minilm-l6-v2")
        >>> (one,) = read(model, [Parsed(("dogs", "bark"), (1, -1), ("nsubj", "root"))])
        >>> one.attention.shape == (model.n_layers * model.n_heads, 2, 2), one.to_special.shape[2]
        (True, 2)

    Channels run over the heads of block 0, then of block 1, and so on. Special tokens are those the
    tokenizer puts before and behind the text.

    Args:
        vectors: whether to give each word the mean of its tokens' input embeddings; project these
            before they go into a probe if the model is wide.

    Raises:
        PromptError: no tokenizer, or words that cannot be told from the tokens.
    """
    if model.tokenizer is None:
        raise PromptError(f"{model.name} has no tokenizer, so it cannot be given sentences.")
    table = model.hf.get_input_embeddings().weight if vectors else None
    found = []
    for number, one in enumerate(parsed):
        prompt = model.prompt(one.text)
        spans = char_spans(model.tokenizer, one.text, prompt.ids)
        ends = np.cumsum([len(word) + 1 for word in one.words])
        words = [] if spans is None else [
            tokens_in(spans, int(end) - len(word) - 1, int(end) - 1)
            for word, end in zip(one.words, ends)]
        if spans is None or not all(words):
            raise PromptError(f"the words of sentence {number} cannot be told from the tokens of "
                              f"{model.name}: {one.text[:40]!r}.")
        inside = {token for tokens in words for token in tokens}
        special = [i for i in range(len(prompt)) if i not in inside
                   and (i < min(inside) or i > max(inside))]
        maps = model.run(prompt, read="pattern", logits="none").reads["pattern"].values[0]
        own = None
        if table is not None:
            ids = torch.tensor(prompt.ids, device=table.device)
            rows = table.detach()[ids].float().cpu().numpy()
            own = np.stack([rows[list(tokens)].mean(0) for tokens in words])
        found.append(sentence(maps.reshape(-1, *maps.shape[2:]), words, special, own))
    return found
