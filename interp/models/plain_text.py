"""What a tokenizer puts around a plain text, and which of its words it does not know."""

from collections.abc import Sequence
from typing import Any, Optional

from interp.core.prompt import Prompt

MOST_UNKNOWN = 0.5
"""A share of unknown tokens above this is warned of."""


def remarks(model: Any, prompt: Prompt) -> list[str]:
    """What must be said of a prompt that `Model.prompt` made, a sentence each.

    Example:
        >>> import interp
        >>> model = interp.open_model("reader")
        >>> remarks(model, model.prompt("needle"))
        []
    """
    found = [unknown_words(model.tokenizer, prompt, model.name)]
    # Tokens are looked at first: most prompts end in no special token.
    if model.kind == "decoder" and prompt.ids[-1] in model.tokenizer.all_special_ids:
        if prompt.ids[-1] == around(model.tokenizer)[1]:
            found.append(closed_by(model.tokenizer, model.name))
    return [said for said in found if said]


def around(tokenizer: Any) -> tuple[Optional[int], Optional[int]]:
    """The special tokens that open and close a plain text; None where there is none.

    Example:
        >>> import interp
        >>> tokenizer = interp.open_model("backcopy-1l").tokenizer
        >>> around(tokenizer)[1] is None
        True
    """
    if tokenizer is None:
        return None, None
    plain = [int(i) for i in tokenizer("a", add_special_tokens=False)["input_ids"]]
    ids = [int(i) for i in tokenizer("a", add_special_tokens=True)["input_ids"]]
    if len(ids) <= len(plain):
        return None, None
    special = set(tokenizer.all_special_ids)
    first = ids[0] if ids[0] in special and ids[:1] != plain[:1] else None
    last = ids[-1] if ids[-1] in special and ids[-1:] != plain[-1:] else None
    return first, last


def closed_by(tokenizer: Any, name: str) -> str:
    """One sentence about a tokenizer that closes texts with a token, for decoders; else "".

    A decoder continues after its last token, and few were trained to continue after a closed text.
    """
    last = around(tokenizer)[1]
    if last is None:
        return ""
    switch = ("set model.tokenizer.add_eos_token = False, or "
              if getattr(tokenizer, "add_eos_token", False) else "")
    return (
        f"the tokenizer of {name} closes every text with {tokenizer.convert_ids_to_tokens(last)!r}, so "
        f"that the last row of logits, \"last\" and generation come after it: {switch}run "
        "interp.Prompt.from_tokens(prompt.ids[:-1]) to continue the text itself."
    )


def unknown_words(tokenizer: Any, prompt: Prompt, name: str) -> str:
    """One sentence about a prompt whose words the tokenizer mostly does not know, else "".

    Image tokens and special tokens do not count.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown not in prompt.ids:
        return ""
    others = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
    if unknown in {getattr(tokenizer, one, None) for one in others}:
        return ""  # one token for several things (GPT-2): what it stands for cannot be told
    images = {p for segment in prompt.of_kind("image") for p in segment.positions}
    special = set(tokenizer.all_special_ids) - {unknown}
    words: Sequence[int] = [token for position, token in enumerate(prompt.ids)
                            if position not in images and token not in special]
    count = sum(token == unknown for token in words)
    if count <= MOST_UNKNOWN * len(words):
        return ""
    return (
        f"{count} of {len(words)} tokens of the prompt {prompt.text!r:.60} are unknown to the "
        f"tokenizer of {name} ({tokenizer.convert_ids_to_tokens(unknown)}), so {name} cannot tell these "
        "words apart; use words of model.tokenizer.get_vocab()."
    )
