"""From text, messages and pictures to a `Prompt`: ids, named segments, and what the model takes.

No span is a fixed offset. Text is found through the tokenizer's character offsets in exactly the
string that was tokenized, the template's own words by rendering it with markers, image tokens by
their ids and the processor's geometry.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Optional

import numpy as np
from PIL import Image

from interp.core import ProcessorMissing, Prompt, PromptError
from interp.core.prompt import check_named
from interp.models import chat_template
from interp.models.naming import Encoded, Source, named_segments, with_marked
from interp.models.offsets import Span, char_spans
from interp.models.pictures import as_list, in_order, open_picture
from interp.models.vision import image_segments, image_token_ids

NOT_INPUTS = {
    "input_ids", "attention_mask", "offset_mapping", "special_tokens_mask", "labels",
    "text_replacement_offsets", "length", "overflowing_tokens",
}


def build(
    parts: Any,
    text_or_messages: Any,
    images: Any = (),
    *,
    chat: bool = False,
    segments: Optional[Mapping[str, Any]] = None,
) -> Prompt:
    """A prompt for a model, with its segments named and its pictures placed.

    Example:
        >>> from types import SimpleNamespace
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import PreTrainedTokenizerFast
        >>> vocabulary = {"[U]": 0, "a": 1, "code": 2, "is": 3, "7": 4}
        >>> words = Tokenizer(models.WordLevel(vocabulary, "[U]"))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> parts = SimpleNamespace(
        ...     tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[U]"),
        ...     processor=None, config=None, name="toy", max_positions=8, has_images=False)
        >>> prompt = build(parts, "a code is 7", segments={"needle": "code is"})
        >>> prompt.ids, prompt.positions("needle")
        ((1, 2, 3, 4), (1, 2))

    Args:
        parts: has tokenizer, processor (or None), config, name, max_positions (or None),
            has_images; a `Model` does.
        text_or_messages: plain text, or with `chat` a string (one user message) or messages
            {"role", "content"}; a list of messages is always chat. Content is a string or a list
            of {"type": "text", "text": ...} and {"type": "image"}.
        images: pictures as PIL images, arrays [height, width, 3] (uint8, or floats from 0 to 1) or
            paths, in the order of their placeholders; one picture needs no list. If neither text
            nor messages say where they go, they are put before the text (chat: before the first
            user message's text), with what the model's chat template writes around a picture.
        segments: name -> text to mark (it must occur once), (text, which occurrence from 0),
            (start, stop) token positions, a list of positions, or a `Segment`. In a chat, text is
            looked for in the messages first, then in the template's own words.

    Segments that are always there, where they exist; kinds equal names:
        "bos" if a beginning-of-sequence (or class) token stands at position 0;
        "image", or "image_0", "image_1", ...: see `interp.models.vision.image_segments`;
        "text": what was typed (plain text); "system", "user", "assistant": what was typed in the
        messages of that role ("system" also the template's default); "role": the assistant's
        header, or what closes the last message; "template": every token nobody typed.
        These do not overlap and cover the prompt. "question" lies inside "user" or "text": what
        the last user message says after the last picture (all it says if nothing follows), in
        plain text what follows the last picture.

    Special tokens are added as the tokenizer does by default, but never a second
    beginning-of-sequence token where the text or template already starts with it.

    Raises `PromptError`, `ProcessorMissing`, `SegmentNotFound`.
    """
    if parts.tokenizer is None:
        raise PromptError(
            f"{parts.name} has no tokenizer; give token ids with interp.Prompt.from_tokens."
        )
    check_named(segments)
    is_chat = chat or not isinstance(text_or_messages, str)
    if is_chat:
        if isinstance(text_or_messages, str) and not text_or_messages.strip():
            raise PromptError("the prompt is empty: give at least one word.")
        messages, own = chat_template.as_messages(text_or_messages)
        pictures = _pictures(parts, in_order(own, images))
        source = _render(parts, messages, len(pictures), bool(own))
    else:
        pictures = _pictures(parts, images)
        if not text_or_messages and not pictures:
            raise PromptError("the prompt is empty: give at least one word.")
        source = _plain(parts, text_or_messages, len(pictures))
    _check_placeholders(parts, source.text, len(pictures))
    encoded = _encode(parts, source.text, pictures)
    if parts.max_positions is not None and len(encoded.ids) > parts.max_positions:
        raise PromptError(
            f"the prompt has {len(encoded.ids)} tokens, but {parts.name} reads at most "
            f"{parts.max_positions}; shorten it."
        )
    found = image_segments(
        encoded.ids, encoded.inputs, [picture.size for picture in pictures],
        parts.config, parts.processor,
    ) if pictures else ()
    named = named_segments(parts.tokenizer, source, encoded, found)
    prompt = Prompt(
        encoded.ids, (*named, *found), source.text,
        printable(parts.tokenizer, encoded.ids), encoded.inputs, tuple(pictures),
    )
    return with_marked(prompt, source, encoded, segments or {}, parts.name)


def _pictures(parts: Any, images: Any) -> list[Image.Image]:
    images = as_list(images)
    if not images:
        return []
    if parts.processor is None:
        if not parts.has_images:
            raise PromptError(
                f"{parts.name} is a text model, but {len(images)} image(s) were given; leave them "
                "out or open a vision-language model."
            )
        raise ProcessorMissing(
            f"{parts.name} takes images, but no processor was found beside its weights; save one "
            "there with processor.save_pretrained(folder)."
        )
    # A processor that turns pictures to RGB itself decides how (transparency on white, ...).
    converts = getattr(parts.processor.image_processor, "do_convert_rgb", False)
    opened = [open_picture(image) for image in images]
    return [p if converts or p.mode == "RGB" else p.convert("RGB") for p in opened]


def _placeholder(parts: Any) -> Optional[str]:
    """The string that stands for one picture in text."""
    found = getattr(parts.processor, "image_token", None)
    if found is None and parts.processor is not None:
        ids = image_token_ids(parts.config, parts.processor)
        found = parts.tokenizer.convert_ids_to_tokens(ids[0]) if ids else None
    return None if found is None else str(found)


def _image_block(parts: Any) -> str:
    """What belongs before a text for one picture: what the chat template writes for it, else the
    placeholder between the vision start and end tokens that the configuration names, if any."""
    placeholder = _placeholder(parts) or ""
    template = _template(parts)
    if template is not None:
        def before_text(content: list[dict[str, str]]) -> str:
            content = [*content, {"type": "text", "text": "\ue000"}]
            return template([{"role": "user", "content": content}], True).partition("\ue000")[0]

        try:
            without, block = before_text([]), before_text([{"type": "image"}])
        except Exception:  # a template may fail in any way it likes; the fallback is below
            without, block = "", ""
        if block.startswith(without) and block[len(without):].count(placeholder) == 1:
            return block[len(without):]
    around = [getattr(parts.config, f"vision_{edge}_token_id", None) for edge in ("start", "end")]
    if None in around:
        return placeholder
    start, end = parts.tokenizer.convert_ids_to_tokens(around)
    return f"{start}{placeholder}{end}"


def _check_placeholders(parts: Any, text: str, given: int) -> None:
    placeholder = _placeholder(parts)
    if placeholder is None:
        return
    count = text.count(placeholder)
    if count != given:
        raise PromptError(
            f"the text has {count} image placeholder(s) {placeholder!r}, but {given} image(s) "
            "were given; make the numbers equal."
        )


def _template(parts: Any) -> Optional[chat_template.Render]:
    owner = parts.tokenizer
    if parts.processor is not None and getattr(parts.processor, "chat_template", None):
        owner = parts.processor
    if not getattr(owner, "chat_template", None):
        return None
    return lambda messages, header: owner.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=header
    )


def _render(parts: Any, messages: list[dict[str, Any]], n_images: int, placed: bool) -> Source:
    template = _template(parts)
    if template is None:
        raise PromptError(
            f"the tokenizer of {parts.name} has no chat template; pass plain text without chat."
        )
    placeholder = _placeholder(parts) or ""
    written = placeholder and any(
        placeholder in part.get("text", "") for m in messages for part in m["content"]
    )
    if n_images and not placed and not written:
        messages = chat_template.with_pictures(messages, n_images)
    block = f"{placeholder}\n" if n_images else ""
    done = chat_template.render(messages, template, block, parts.name)
    return Source(done.text, done.typed, done.header, done.system, True, placeholder)


def _plain(parts: Any, text: str, n_images: int) -> Source:
    placeholder = _placeholder(parts) or ""
    block = ""
    if n_images and placeholder and placeholder not in text:
        block = _image_block(parts) * n_images
    typed = (chat_template.Typed(len(block), len(block) + len(text), "text", 0),)
    return Source(block + text, typed, placeholder=placeholder)


def _encode(parts: Any, text: str, pictures: list[Image.Image]) -> Encoded:
    def made(special: bool) -> tuple[list[int], dict[str, Any]]:
        if pictures:
            out = _process(parts, text, pictures, special)
        else:
            out = dict(parts.tokenizer([text], add_special_tokens=special))
        return [int(i) for i in np.asarray(out["input_ids"]).reshape(-1)], out

    ids, out = made(special=True)
    bos = getattr(parts.tokenizer, "bos_token_id", None)
    if bos is not None and ids[:2] == [bos, bos]:  # the text or template already starts with it
        ids, out = made(special=False)
    inputs = {name: np.asarray(value) for name, value in out.items() if name not in NOT_INPUTS}
    if pictures:
        spans, pieces = _spans_with_images(parts, text, ids, out.get("text_replacement_offsets"))
    else:
        spans, pieces = char_spans(parts.tokenizer, text, ids), ((0, len(text), 0),)
    return Encoded(tuple(ids), _worth_keeping(inputs), spans, pieces)


def _process(parts: Any, text: str, pictures: list[Image.Image], special: bool) -> dict[str, Any]:
    names = getattr(parts.processor.image_processor, "model_input_names", ())
    # Pictures as the list of one sample, where the processor treats several of one sample apart.
    images = [pictures] if "batch_num_images" in names else pictures
    options = {"add_special_tokens": special, "return_tensors": "pt"}
    try:
        return dict(parts.processor(
            images=images, text=[text], return_text_replacement_offsets=True, **options
        ))
    except TypeError:  # a processor that knows no such option
        return dict(parts.processor(images=images, text=[text], **options))
    except (ValueError, IndexError) as error:
        raise PromptError(
            f"the processor of {parts.name} refused the images: {error}"
        ) from error


def _worth_keeping(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without token types that are zero everywhere, every model's default."""
    return {name: value for name, value in inputs.items()
            if not (name.endswith("token_type_ids") and not value.any())}


def _spans_with_images(
    parts: Any, text: str, ids: list[int], replaced: Any
) -> tuple[Optional[list[Span]], tuple[tuple[int, int, int], ...]]:
    """Character spans in the text with its placeholders expanded, and where the source went.

    The expanded text is put together from what the processor says it inserted; if that does not
    tokenize to the same ids (a processor may change the text further), the ids are decoded, and
    the source's pieces are looked for in that. Every attempt must give exactly the ids.
    """
    placeholder = _placeholder(parts) or ""
    outside = text.split(placeholder) if placeholder else [text]
    starts, at = [], 0
    for piece in outside:
        starts.append(at)
        at += len(piece) + len(placeholder)
    if replaced and len(replaced[0]) == len(outside) - 1:
        inserted = [entry["replacement"] for entry in replaced[0]] + [""]
        expanded, pieces = "", []
        for start, piece, more in zip(starts, outside, inserted):
            pieces.append((start, start + len(piece), len(expanded)))
            expanded += piece + more
        spans = char_spans(parts.tokenizer, expanded, ids)
        if spans is not None:
            return spans, tuple(pieces)
    decoded = parts.tokenizer.decode(
        ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    pieces, at = [], 0
    for start, piece in zip(starts, outside):
        found = decoded.find(piece, at)
        if found < 0:
            return None, ()
        pieces.append((start, start + len(piece), found))
        at = found + len(piece)
    spans = char_spans(parts.tokenizer, decoded, ids)
    return (None, ()) if spans is None else (spans, tuple(pieces))


def printable(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """A readable string for every token: its text, with line ends shown as \\n.

    A token that is only part of a character shows as the tokenizer writes it.
    """
    raw = tokenizer.convert_ids_to_tokens(list(ids))
    shown = []
    for number, own in zip(ids, raw):
        if own is None:
            shown.append(f"<{number}>")
            continue
        text = tokenizer.decode([number], skip_special_tokens=False)
        text = str(own) if not text or "\ufffd" in text else text
        shown.append(text.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t"))
    return tuple(shown)


