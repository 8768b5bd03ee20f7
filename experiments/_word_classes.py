"""Function words and content words: of the reader's language, and of English by a closed list."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import _passages, _texts
from interp.organisms import reader

ENGLISH = frozenset("""
a an the this that these those my your his her its our their some any no every each either neither
and or but nor so yet if because although though while when where whereas than as until unless since
of in on at by for with from to into onto over under above below between among through during before
after about against without within across behind beside beyond near off out up down
i you he she it we they me him us them who whom whose which what myself itself himself herself
themselves is am are was were be been being do does did have has had having will would shall should
can could may might must not there here then also too very just only even still again once
""".split())
"""Words of closed classes: determiners, conjunctions, prepositions, pronouns, auxiliaries, particles."""

STARTS = ("Ġ", "▁", " ")


def kinds(model: Any, ids: Sequence[int]) -> np.ndarray:
    """The class of every token: "function", "punctuation" or "content"; "" for special tokens, and for
    all of them where a model reads neither the reader's language nor English.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> kinds(model, model.tokenizer("the river ; note amber").input_ids).tolist()
        ['', 'function', 'content', 'punctuation', 'punctuation', 'content']
    """
    made = np.full(len(ids), "", dtype="<U12")
    if _texts.knows(model, reader):
        words = [reader.WORDS[int(i)] for i in ids]
        made[:] = ["function" if word in reader.TRIGGERS else "punctuation" if word in DELIMITERS
                   else "" if word.startswith("<") else "content" for word in words]
        return made
    if not english(model):
        return made
    pieces = [str(piece) for piece in model.tokenizer.convert_ids_to_tokens([int(i) for i in ids])]
    special = set(model.tokenizer.all_special_ids)
    marked = any(piece.startswith(STARTS) for piece in pieces)
    for at, (token, piece) in enumerate(zip(ids, pieces)):
        text = piece.lstrip("".join(STARTS)).rstrip("Ċ\n")
        if int(token) in special:
            continue
        if not any(letter.isalnum() for letter in text):
            made[at] = "punctuation"
            continue
        after = pieces[at + 1] if at + 1 < len(pieces) else "."
        ends = not after.startswith("##") and (
            not marked or after.startswith(STARTS) or not after[:1].isalnum())
        starts = not piece.startswith("##") and (
            not marked or piece.startswith(STARTS) or at <= 1)
        made[at] = "function" if starts and ends and text.lower() in ENGLISH else "content"
    return made


def english(model: Any) -> bool:
    """Whether a model's tokens are words or pieces of words of English, not single letters."""
    if not _passages.readable(model) or _texts.knows(model, reader):
        return False
    pieces = model.tokenizer.convert_ids_to_tokens(model.tokenizer("the history of a lighthouse")[
        "input_ids"])
    return any(len(str(piece)) > 1 and str(piece).lstrip("".join(STARTS)) in ("the", "history", "of")
               for piece in pieces)


DELIMITERS = ("note", "recall", ";")
"""What begins and ends the reader's records."""


def is_function(names: np.ndarray) -> np.ndarray:
    """Whether tokens are function words or punctuation."""
    return np.isin(names, ("function", "punctuation"))
