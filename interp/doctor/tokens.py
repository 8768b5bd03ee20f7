"""How the model's tokenizer begins a text, and whether its chat template begins it twice."""

import warnings
from typing import Any, Optional

from interp.core.errors import UndertowError
from interp.core.prompt import Prompt
from interp.doctor.lanes import sentence
from interp.doctor.report import Report, Tokens
from interp.models.lane_hf import probe_ids
from interp.models.model import Model
from interp.models.plain_text import around, closed_by

TEXT = (
    "The river was higher than anyone in the village could remember. By the evening the lower "
    "road had gone, and people carried what they could to the church on the hill, where the "
    "children counted the lights of the houses that were still dry."
)
"""A short ordinary text, written for this purpose."""


def examine_tokens(model: Model, report: Report) -> None:
    """Note tokenizer, BOS and chat template of a model in the report."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        report.tokens = Tokens(None, model.d_vocab, False, None, False, False)
        report.limit("tokenizer", "no tokenizer was found beside the weights: only token ids can "
                                  "be run (interp.Prompt.from_tokens); save the tokenizer there "
                                  "with tokenizer.save_pretrained(folder).")
        return
    remarks, bos = [], tokenizer.bos_token_id
    size = len(tokenizer)
    if size > model.d_vocab:
        report.fault("tokenizer", f"the tokenizer has {size} tokens, but the model knows "
                                  f"{model.d_vocab}: they do not belong together.")
    template = bool(getattr(tokenizer, "chat_template", None)
                    or getattr(model.processor, "chat_template", None))
    first = model.first_token_is_bos
    closed = closed_by(tokenizer, model.name) if model.kind == "decoder" else ""
    if closed:
        report.limit("tokenizer", closed)
    if not first:
        remarks.append("plain texts start without a BOS token, so the first word takes its place")
    double = False
    if template:
        try:
            messages = [{"role": "user", "content": "Hello"}]
            owner = tokenizer if getattr(tokenizer, "chat_template", None) else model.processor
            text = owner.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = list(tokenizer(text, add_special_tokens=True)["input_ids"])
            double = _leading(ids, bos) > 1
            built = _leading(list(_quietly(model, messages).ids), bos)
            if built > 1:
                report.fault("chat template", "model.prompt(chat) begins with two BOS tokens.")
            if double:
                remarks.append(
                    "the chat template writes BOS itself: tokenizing its text with special tokens "
                    f"gives a double BOS (model.prompt(..., chat=True) gives {built})")
        except (UndertowError, ValueError, TypeError, KeyError) as error:
            report.limit("chat template", f"the chat template cannot be used: {sentence(error)}")
        except Exception as error:  # templates are programs: they may raise anything
            report.limit("chat template", f"the chat template fails: {sentence(error)}")
    else:
        remarks.append("there is no chat template: prompts are plain texts")
    opening = around(tokenizer)[0] if first else None
    name = tokenizer.bos_token if opening is None else tokenizer.convert_ids_to_tokens(opening)
    report.tokens = Tokens(
        type(tokenizer).__name__, size, first, name, template, double, tuple(remarks),
    )


def _quietly(model: Model, given: Any) -> Prompt:
    """A prompt without its warnings: what they say is in the report."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return model.prompt(given)


def _leading(ids: list[int], bos: Optional[int]) -> int:
    """How many BOS tokens a prompt begins with."""
    count = 0
    while bos is not None and count < len(ids) and ids[count] == bos:
        count += 1
    return count


def short_text(model: Model, most: int = 64) -> tuple[Prompt, str]:
    """An ordinary text where the tokenizer knows its words, else ordinary token ids."""
    most = min(most, model.max_positions or most)
    if model.tokenizer is not None:
        try:
            prompt = _quietly(model, TEXT)
            unknown = getattr(model.tokenizer, "unk_token_id", None)
            share = sum(token == unknown for token in prompt.ids) / len(prompt)
            if share < 0.2 and len(prompt) >= 16:
                cut: Any = prompt.ids[:most]
                return Prompt.from_tokens(cut, tokens=prompt.tokens[:most]), "an English text"
        except (UndertowError, ValueError, IndexError):
            pass
    ids = probe_ids(model.hf, most)[0].tolist()
    bos = getattr(model.tokenizer, "bos_token_id", None)
    if bos is not None and model.first_token_is_bos:
        ids = [bos, *(token for token in ids if token != bos)][:most]
    return Prompt.from_tokens(ids), "random tokens"
