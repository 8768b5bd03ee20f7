"""Prompts: ids as the tokenizer gives them, segments where the text is, never one token beside it.

Tokenizers are made here: words with and without a beginning-of-sequence token, byte-level BPE, a
SentencePiece-like one, and one without offsets. Chat templates are in the style of Llama 3, Qwen
(ChatML, with a default system prompt) and Mistral.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.paligemma.processing_paligemma import PaliGemmaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from interp.core import OutOfRange, ProcessorMissing, Prompt, PromptError, SegmentNotFound
from interp.models.offsets import char_spans, covers, spans_by_decoding, tokens_in
from interp.models.pictures import open_picture
from interp.models.prompting import build

TEXT = "The code of amber is 7. The code of topaz is 12, and the café is open."
SPECIALS = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "<image>",
    "<boi>", "<soft>", "<eoi>",
]
LLAMA3 = (
    "{{ '<|begin_of_text|>' }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
LLAVA = (
    "{% for m in messages %}{{ m['role'] | upper + ': ' }}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}"
    "{% endfor %}"
    "{% for c in m['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def wrapped(tokenizer: Tokenizer, bos: str | None, template: str | None, **more):
    """A transformers tokenizer that puts `bos` first, if given."""
    tokenizer.add_special_tokens(SPECIALS)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="</s>", unk_token="<unk>", **more
    )
    made.chat_template = template
    return made


def words(bos: str | None = None, template: str | None = None, **more):
    known = sorted(set((TEXT + " What color is this ? Be brief . : USER SYSTEM ASSISTANT").split()))
    vocabulary = {word: i for i, word in enumerate(["<unk>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return wrapped(tokenizer, bos, template, **more)


def byte_level(bos: str | None = None, template: str | None = None, prefix: bool = False):
    """GPT-2, Llama 3, Qwen: byte-level BPE; words carry their leading space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([TEXT, "What color is this? Be brief.", "user system"], trainer)
    return wrapped(tokenizer, bos, template)


def metaspace(bos: str | None = "<s>", template: str | None = None):
    """Llama 2, Mistral, Gemma: words carry a leading underline character."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>"], show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?:é\n"),
    )
    tokenizer.train_from_iterator([TEXT, "What color is this? Be brief.", "user system"], trainer)
    return wrapped(tokenizer, bos, template)


class NoOffsets:
    """The same tokenizer without offsets, as slow tokenizers are."""

    is_fast = False

    def __init__(self, fast):
        self._fast = fast

    def __getattr__(self, name):
        return getattr(self._fast, name)

    def __call__(self, text, **options):
        assert not options.get("return_offsets_mapping"), "a slow tokenizer has no offsets"
        return self._fast(text, **options)


def parts(tokenizer, processor=None, config=None, max_positions=256, has_images=None):
    has_images = processor is not None if has_images is None else has_images
    return SimpleNamespace(
        tokenizer=tokenizer, processor=processor, config=config, name="toy-model",
        max_positions=max_positions, has_images=has_images,
    )


def said(prompt: Prompt, tokenizer, name: str) -> str:
    """The text of a segment's tokens."""
    return tokenizer.decode([prompt.ids[p] for p in prompt.positions(name)]).strip()


def always(prompt: Prompt):
    """The segments that are promised not to overlap."""
    kinds = ("bos", "image", "text", "system", "user", "assistant", "role", "template")
    return [s for s in prompt.segments if s.kind in kinds and not s.name.startswith("my ")]


def assert_partition(prompt: Prompt) -> None:
    positions = [p for segment in always(prompt) for p in segment.positions]
    assert sorted(positions) == list(range(len(prompt)))


TOKENIZERS = {
    "words": words, "words with bos": lambda: words("<s>"), "byte-level": byte_level,
    "byte-level with bos": lambda: byte_level("<|begin_of_text|>"), "metaspace": metaspace,
    "no offsets, words": lambda: NoOffsets(words("<s>")),
    "no offsets, byte-level": lambda: NoOffsets(byte_level()),
    "no offsets, metaspace": lambda: NoOffsets(metaspace()),
}
NO_BOS = ("words", "byte-level", "no offsets, byte-level")


# -- plain text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_plain_text_has_the_tokenizers_own_ids_and_its_segments_cover_it(kind):
    tokenizer = TOKENIZERS[kind]()
    prompt = build(parts(tokenizer), TEXT)
    assert prompt.ids == tuple(tokenizer(TEXT)["input_ids"])
    assert_partition(prompt)
    assert len(prompt.tokens) == len(prompt.ids)
    starts_with_bos = tokenizer.bos_token_id is not None and prompt.ids[0] == tokenizer.bos_token_id
    assert starts_with_bos == (kind not in NO_BOS)
    assert bool(prompt.of_kind("bos")) == starts_with_bos
    assert prompt.positions("text") == tuple(range(int(starts_with_bos), len(prompt)))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("needle", ["code of amber", "topaz is 12,", "café", "7. The"])
def test_a_marked_text_gets_exactly_the_tokens_that_hold_it(kind, needle):
    tokenizer = TOKENIZERS[kind]()
    prompt = build(parts(tokenizer), TEXT, segments={"needle": needle})
    positions = prompt.positions("needle")
    assert positions == tuple(range(positions[0], positions[-1] + 1))

    def text_of(chosen) -> str:
        return tokenizer.decode([prompt.ids[p] for p in chosen], skip_special_tokens=True)

    bare = needle.replace(" ", "")
    assert bare in text_of(positions).replace(" ", "")
    # Neither end can be left out.
    assert bare not in text_of(positions[1:]).replace(" ", "")
    assert bare not in text_of(positions[:-1]).replace(" ", "")
    assert prompt.segment("needle").kind == "needle"


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "words"])
def test_decoding_finds_the_spans_that_offsets_give(kind):
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer(TEXT)["input_ids"]
    exact = char_spans(tokenizer, TEXT, ids)
    decoded = spans_by_decoding(tokenizer, TEXT, ids)
    for start in range(len(TEXT)):
        for stop in range(start + 1, min(start + 9, len(TEXT) + 1)):
            if not TEXT[start].isspace() and not TEXT[stop - 1].isspace():
                assert tokens_in(decoded, start, stop) == tokens_in(exact, start, stop)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab é日本語🙂\n .,7", min_size=1, max_size=24))
def test_byte_level_spans_cover_any_text(text):
    tokenizer = _BYTES
    ids = tokenizer(text)["input_ids"]
    for spans in (char_spans(tokenizer, text, ids), spans_by_decoding(tokenizer, text, ids)):
        assert spans is not None and len(spans) == len(ids) and covers(spans, text)
        for position, character in enumerate(text):
            if not character.isspace():
                held = tokenizer.decode([ids[i] for i in tokens_in(spans, position, position + 1)])
                assert character in held


_BYTES = byte_level()


def test_offsets_that_leave_text_out_are_not_trusted():
    class Broken(NoOffsets):
        """Reports empty spans, as some tokenizers did."""

        is_fast = True

        def __call__(self, text, **options):
            made = self._fast(text, **options)
            if "offset_mapping" in made:
                made["offset_mapping"] = [(a, a) for a, _ in made["offset_mapping"]]
            return made

    good, broken = byte_level("<s>"), Broken(byte_level("<s>"))
    marks = {"needle": "amber is 7"}
    found = build(parts(broken), TEXT, segments=marks).positions("needle")
    assert found == build(parts(good), TEXT, segments=marks).positions("needle")


def test_text_that_decoding_does_not_return_can_only_be_marked_by_positions():
    slow = NoOffsets(words())  # "zebra" is unknown, so decoding gives "<unk>"
    prompt = build(parts(slow), "The zebra is open.", segments={"needle": (1, 2)})
    assert prompt.positions("needle") == (1,) and not prompt.of_kind("text")
    with pytest.raises(PromptError, match=r"segment 'needle' cannot be marked by text.*toy-model"):
        build(parts(slow), "The zebra is open.", segments={"needle": "zebra"})
    control = build(parts(words()), "The zebra is open.", segments={"needle": "zebra"})
    assert control.positions("needle") == (1,)


def test_bos_is_never_doubled_and_never_invented():
    with_bos, without = byte_level("<s>"), byte_level()
    assert build(parts(with_bos), "<s>" + TEXT).ids == build(parts(with_bos), TEXT).ids
    assert build(parts(with_bos), TEXT).ids.count(with_bos.bos_token_id) == 1
    typed = build(parts(with_bos), "<s>" + TEXT)
    assert typed.positions("bos") == (0,) and 0 not in typed.positions("text")
    assert_partition(typed)
    # Typed twice, it is there twice; a space before it (which these words drop) hides nothing.
    assert build(parts(with_bos), "<s><s>" + TEXT).ids.count(with_bos.bos_token_id) == 2
    spaced, plain = (build(parts(words("<s>")), text) for text in (" <s> The code", "The code"))
    assert spaced.ids == plain.ids
    # A bos token that the tokenizer knows but does not add is not named.
    without.bos_token = "</s>"
    assert not build(parts(without), TEXT).of_kind("bos")
    assert not build(parts(without), TEXT).of_kind("template")


def test_what_the_tokenizer_appends_is_template_and_a_class_token_counts_as_bos():
    tokenizer = words(cls_token="<s>", sep_token="</s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")],
    )
    prompt = build(parts(tokenizer), "The code is open.")
    assert prompt.positions("bos") == (0,) and prompt.positions("template") == (len(prompt) - 1,)
    assert prompt.positions("text") == tuple(range(1, len(prompt) - 1))


def test_token_types_are_kept_only_where_they_say_something():
    tokenizer = words(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    assert "token_type_ids" in tokenizer("The code")
    assert build(parts(tokenizer), "The code").inputs == {}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A:1", special_tokens=[])
    types = build(parts(tokenizer), "The code is").inputs["token_type_ids"]
    assert types.tolist() == [[1, 1, 1]]


def test_segments_by_occurrence_positions_and_spans():
    tokenizer = words()
    prompt = build(parts(tokenizer), TEXT, segments={
        "first": ("The code", 0), "second": ("The code", 1), "last": ("The code", -1),
        "span": (2, 5), "list": [3, 1],
    })
    assert prompt.positions("first") == (0, 1) and prompt.positions("second") == (6, 7)
    assert prompt.positions("last") == (6, 7)
    assert prompt.positions("span") == (2, 3, 4) and prompt.positions("list") == (1, 3)


def test_printable_tokens():
    prompt = build(parts(byte_level()), "is open\nis")
    assert "".join(prompt.tokens) == "is open\\nis"
    pieces = build(parts(byte_level()), "🙂").tokens
    assert len(pieces) > 1 and all(piece and "\ufffd" not in piece for piece in pieces)


# -- chat ------------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The code of amber is 7."},
    {"role": "assistant", "content": "open."},
    {"role": "user", "content": "  What color is this?"},
]
STYLES = {
    "llama3": (LLAMA3, "<|begin_of_text|>"), "chatml": (CHATML, None), "mistral": (MISTRAL, "<s>"),
}


@pytest.mark.parametrize("make, slow", [(byte_level, False), (byte_level, True), (words, False)])
@pytest.mark.parametrize("style", STYLES)
def test_chat_segments_hold_what_was_said(style, make, slow):
    template, bos = STYLES[style]
    tokenizer = make(bos, template)
    tokenizer = NoOffsets(tokenizer) if slow else tokenizer
    talk = TALK[1:] if style == "mistral" else TALK
    prompt = build(parts(tokenizer), talk)
    rendered = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert prompt.text == rendered
    assert prompt.ids == tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])
    assert_partition(prompt)
    assert bool(prompt.of_kind("bos")) == (bos is not None)
    if bos:
        assert prompt.ids.count(tokenizer.bos_token_id) == 1

    def same(name, text):
        # Without spaces, because a template may trim them between messages.
        expected = tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"])
        return said(prompt, tokenizer, name).replace(" ", "") == expected.replace(" ", "")

    assert same("question", "What color is this?")
    assert same("user", "The code of amber is 7. What color is this?")
    assert same("assistant", "open.")
    if style != "mistral":
        assert same("system", "Be brief.")
        assert "assistant" in prompt.text[prompt.text.rindex("this?"):]
    assert set(prompt.positions("question")) < set(prompt.positions("user"))
    role = prompt.positions("role")
    assert role == tuple(range(role[0], len(prompt)))
    header = {"llama3": "<|start_header_id|>", "chatml": "<|im_start|>", "mistral": "[/INST]"}
    assert prompt.ids[role[0]] == tokenizer.convert_tokens_to_ids(header[style])


def test_a_string_is_one_user_message():
    tokenizer = byte_level(None, CHATML)
    prompt = build(parts(tokenizer), "What color is this?", chat=True)
    talk = [{"role": "user", "content": "What color is this?"}]
    assert prompt.ids == build(parts(tokenizer), talk).ids
    assert prompt.ids != build(parts(tokenizer), "What color is this?").ids
    listed = [{"role": "user", "content": [{"type": "text", "text": "What color is this?"}]}]
    assert prompt.ids == build(parts(tokenizer), listed).ids


def test_the_templates_own_system_prompt_is_system():
    tokenizer = byte_level(None, CHATML)
    prompt = build(parts(tokenizer), "What color is this?", chat=True)
    assert said(prompt, tokenizer, "system") == "You are a helpful assistant."
    # Control: a template without one has no such segment.
    llama = byte_level("<|begin_of_text|>", LLAMA3)
    assert not build(parts(llama), "What color is this?", chat=True).of_kind("system")


@pytest.mark.parametrize("word", ["user", "system", "assistant", "<|im_end|>"])
@pytest.mark.parametrize("style, header, end", [
    ("chatml", "<|im_start|>user\n", "<|im_end|>"),
    ("llama3", "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),  # trims the text
])
def test_words_of_the_template_in_a_message_do_not_move_its_span(word, style, header, end):
    template, bos = STYLES[style]
    tokenizer = byte_level(bos, template)
    prompt = build(parts(tokenizer), [
        {"role": "system", "content": "user"},
        {"role": "user", "content": f" {word}" if style == "llama3" else word},
    ])
    start = prompt.text.index(header) + len(header)
    assert prompt.text.startswith(word + end, start)
    spans = char_spans(tokenizer, prompt.text, prompt.ids)
    assert prompt.positions("question") == tokens_in(spans, start, start + len(word))
    assert said(prompt, tokenizer, "system") == "user"


def test_a_bos_that_the_template_leaves_out_is_added_as_for_text():
    bare = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    prompt = build(parts(byte_level("<s>", bare)), "What color is this?", chat=True)
    assert prompt.positions("bos") == (0,)
    assert not build(parts(byte_level(None, bare)), "color", chat=True).of_kind("bos")


def test_a_template_that_treats_texts_by_content_is_searched_instead():
    thinking = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'].split('</think>')[-1] if m['role'] == 'assistant' else m['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = byte_level(None, thinking)
    prompt = build(parts(tokenizer), [
        {"role": "user", "content": "The code"},
        {"role": "assistant", "content": "amber</think>topaz"},
        {"role": "user", "content": "What color is this?"},
    ])
    assert said(prompt, tokenizer, "question") == "What color is this?"
    assert "amber" not in prompt.text and not prompt.of_kind("assistant")
    assert_partition(prompt)


def test_needles_in_a_chat_are_looked_for_in_the_messages_first():
    tokenizer = byte_level(None, CHATML)
    talk = [{"role": "user", "content": "The user is open."}]
    marks = {"needle": "user", "header": "<|im_start|>user"}
    prompt = build(parts(tokenizer), talk, segments=marks)
    assert said(prompt, tokenizer, "needle") == "user"
    assert set(prompt.positions("needle")) < set(prompt.positions("question"))
    assert set(prompt.positions("header")) <= set(prompt.positions("template"))


# -- images ----------------------------------------------------------------------------------------


def llava(template: str | None = LLAVA, bos: str | None = "<s>", make=words):
    tokenizer = make(bos)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer, patch_size=14, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=template,
    )
    config = SimpleNamespace(
        model_type="llava", image_token_id=processor.image_token_id,
        vision_feature_select_strategy="default",
        vision_config=SimpleNamespace(model_type="clip_vision_model", patch_size=14),
    )
    return parts(tokenizer, processor, config)


def picture(width=60, height=40, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("make", [words, byte_level, metaspace])
def test_an_image_prompt_is_what_the_processor_makes_with_its_parts_named(make):
    model = llava(make=make)
    text = "USER: <image>\nWhat color is this? ASSISTANT:"
    prompt = build(model, text, picture(), segments={"needle": "color is"})
    direct = model.processor(images=[picture()], text=[text], return_tensors="np")
    assert prompt.ids == tuple(direct["input_ids"][0].tolist())
    assert np.array_equal(prompt.inputs["pixel_values"], direct["pixel_values"])
    assert set(prompt.inputs) == {"pixel_values"}
    assert_partition(prompt)
    image = prompt.segment("image")
    assert image.grid == (2, 2) and len(image) == 4 and image.kind == "image"
    assert [prompt.ids[p] for p in image] == [model.config.image_token_id] * 4
    assert image.boxes[0] == (10.0, 0.0, 30.0, 20.0) and image.boxes[3] == (30.0, 20.0, 50.0, 40.0)
    assert prompt.positions("bos") == (0,)
    question = prompt.positions("question")
    assert question[0] > image.stop - 1 and question[-1] == len(prompt) - 1
    spans = char_spans(model.tokenizer, text, model.tokenizer(text)["input_ids"])
    shift = len(image) - 1  # the placeholder became as many tokens as the picture has
    start = text.index("color is")
    assert prompt.positions("needle") == tuple(
        p + shift for p in tokens_in(spans, start, start + len("color is"))
    )


def test_a_chat_with_an_image():
    model = llava()
    prompt = build(model, "What color is this?", picture(), chat=True)
    assert prompt.text == "USER: <image>\nWhat color is this? ASSISTANT:"
    assert said(prompt, model.tokenizer, "question") == "What color is <unk>"
    assert said(prompt, model.tokenizer, "role") == "<unk>"  # "ASSISTANT:" is one unknown word
    assert_partition(prompt)
    parted = [{"role": "user", "content": [
        {"type": "image", "image": picture()}, {"type": "text", "text": "What color is this?"}]}]
    assert build(model, parted).ids == prompt.ids
    written = [{"role": "user", "content": "<image>\nWhat color is this?"}]
    assert build(model, written, picture()).text == prompt.text


def test_a_template_for_strings_gets_the_picture_in_the_string():
    # Given parts, it would print them as Python: [{'type': 'image'}, ...].
    printing = "{% for m in messages %}USER {{ m['content'] }} {% endfor %}ASSISTANT"
    prompt = build(llava(template=printing), "What color", picture(), chat=True)
    assert prompt.text == "USER <image>\nWhat color ASSISTANT"
    assert len(prompt.segment("image")) == 4


def test_bos_is_not_doubled_before_an_image():
    model = llava()
    typed, added = (build(model, text, picture()) for text in ("<s> <image> What", "<image> What"))
    assert typed.ids == added.ids and typed.ids.count(model.tokenizer.bos_token_id) == 1


def test_a_text_without_placeholder_gets_what_the_template_writes_for_a_picture():
    prompt = build(llava(), "What color is this?", picture())
    assert prompt.text == "<image>\nWhat color is this?"
    bare = build(llava(template=None), "What color is this?", picture())
    assert bare.text == "<image>What color is this?"
    assert len(prompt.of_kind("image")) == len(bare.of_kind("image")) == 1
    # Where the configuration names tokens around a picture, they are put there.
    around = llava(template=None)
    around.config.vision_start_token_id, around.config.vision_end_token_id = (
        around.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>")
    )
    assert build(around, "What", picture()).text == "<|im_start|><image><|im_end|>What"


@pytest.mark.parametrize("text", [
    "<image> What color is this? <image> The code", "<image><image> What color",
])
def test_several_images_keep_their_order_even_side_by_side(text):
    model = llava()
    prompt = build(model, text, [picture(60, 40), picture(28, 56, seed=1)])
    first, second = prompt.of_kind("image")
    assert (first.name, second.name) == ("image_0", "image_1")
    assert first.boxes[0] == (10.0, 0.0, 30.0, 20.0) and second.boxes[0] == (0.0, 14.0, 14.0, 28.0)
    assert max(first) < min(second) and len(first) == len(second) == 4
    assert prompt.positions("image") == tuple(sorted([*first, *second]))
    assert len(prompt.images) == 2
    after = prompt.positions("question")
    assert min(after) > max(second)


def test_a_picture_after_the_question_leaves_the_question_in_place():
    model = llava(template=(
        "{% for m in messages %}{% for c in m['content'] %}"
        "{{ '<image>' if c['type'] == 'image' else c['text'] + ' ' }}{% endfor %}{% endfor %}"
    ))
    prompt = build(model, [{"role": "user", "content": [
        {"type": "text", "text": "What color"}, {"type": "image"}]}], picture())
    assert said(prompt, model.tokenizer, "question") == "What color"
    assert prompt.positions("question")[-1] < prompt.positions("image")[0]


def test_gemma_images_take_a_begin_token_soft_tokens_and_token_types():
    tokenizer = words("<s>", extra_special_tokens={
        "boi_token": "<boi>", "image_token": "<soft>", "eoi_token": "<eoi>"})
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 32, "width": 32}), tokenizer, image_seq_length=4)
    config = SimpleNamespace(
        model_type="gemma3", image_token_id=tokenizer.convert_tokens_to_ids("<soft>"),
        mm_tokens_per_image=4, vision_config=SimpleNamespace(image_size=32, patch_size=4),
    )
    prompt = build(parts(tokenizer, processor, config), "What color <boi> is open.", picture(),
                   segments={"needle": "color", "my end": "open."})
    image = prompt.segment("image")
    assert image.grid == (2, 2) and image.boxes[3] == (30.0, 20.0, 60.0, 40.0)
    types = prompt.inputs["token_type_ids"][0]
    assert tuple(np.flatnonzero(types)) == image.positions
    assert prompt.tokens[prompt.positions("needle")[0]] == "color"
    assert prompt.positions("my end") == (len(prompt) - 1,)
    assert_partition(prompt)


def test_a_processor_that_rewrites_the_text_is_followed_by_decoding():
    # PaliGemma puts a beginning-of-sequence token after the image and a line end after the text.
    tokenizer = byte_level("<s>")
    image_processor = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    image_processor.image_seq_length = 4
    processor = PaliGemmaProcessor(image_processor, tokenizer)
    config = SimpleNamespace(
        model_type="paligemma", image_token_id=processor.image_token_id,
        vision_config=SimpleNamespace(model_type="siglip_vision_model", patch_size=14),
    )
    prompt = build(parts(tokenizer, processor, config), "<image>What color is this?", picture(),
                   segments={"needle": "color"})
    assert said(prompt, tokenizer, "needle") == "color"
    assert said(prompt, tokenizer, "question") == "What color is this?"
    assert prompt.segment("image").grid == (2, 2)


# -- bad input -------------------------------------------------------------------------------------

BAD = {
    "empty": ("", {}, PromptError, "the prompt is empty: give at least one word."),
    "empty chat": ([], {}, PromptError, "the conversation is empty"),
    "no template": ("hi", {"chat": True}, PromptError,
                    "the tokenizer of toy-model has no chat template"),
    "not a message": ([7], {}, PromptError, "message 0 is 7"),
    "text model": ("hi", {"images": [picture()]}, PromptError,
                   "toy-model is a text model, but 1 image.s. were given"),
    "missing text": (TEXT, {"segments": {"needle": "ruby"}}, SegmentNotFound,
                     "segment 'needle': the text 'ruby' does not occur in the prompt"),
    "twice": (TEXT, {"segments": {"needle": "The code"}}, SegmentNotFound,
              "the text 'The code' occurs 2 times; say which"),
    "third": (TEXT, {"segments": {"needle": ("The code", 2)}}, SegmentNotFound,
              "occurs 2 time.s., so there is no occurrence 2"),
    "blank": (TEXT, {"segments": {"needle": " "}}, SegmentNotFound, "an empty text"),
    "outside": (TEXT, {"segments": {"needle": (3, 99)}}, OutOfRange, "reaches position 98"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_text_gets_one_clear_sentence(case):
    text, options, error, sentence = BAD[case]
    with pytest.raises(error, match=sentence) as caught:
        build(parts(words()), text, **options)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_too_long_names_both_numbers():
    tokenizer = words()
    assert len(build(parts(tokenizer, max_positions=3), "The code is")) == 3
    with pytest.raises(PromptError, match="the prompt has 4 tokens, but toy-model reads at most 3"):
        build(parts(tokenizer, max_positions=3), "The code is open.")
    assert len(build(parts(tokenizer, max_positions=None), "The " * 500)) == 500


def test_a_vision_model_without_processor_still_takes_text():
    model = parts(words(), processor=None, has_images=True)
    assert len(build(model, "The code")) == 2
    with pytest.raises(ProcessorMissing, match="toy-model takes images, but no processor"):
        build(model, "The code", picture())


def test_a_model_without_tokenizer_points_to_token_ids():
    with pytest.raises(PromptError, match="toy-model has no tokenizer; .*from_tokens"):
        build(parts(None), "hi")


@pytest.mark.parametrize("text, given, sentence", [
    ("<image> <image> What", 1, "the text has 2 image placeholder.s. '<image>', but 1 image"),
    ("<image> What", 2, "the text has 1 image placeholder.s. '<image>', but 2 image"),
    ("<image> What", 0, "the text has 1 image placeholder.s. '<image>', but 0 image"),
    ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What"}]}], 0,
     "the messages have 1 image part.s. without a picture, but 0 image"),
    ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What"}]}], 2,
     "the messages have 1 image part.s. without a picture, but 2 image"),
])
def test_placeholders_and_pictures_must_be_as_many(text, given, sentence):
    with pytest.raises(PromptError, match=sentence):
        build(llava(), text, [picture() for _ in range(given)])


def test_a_template_that_refuses_says_so():
    tokenizer = byte_level("<s>", MISTRAL)
    with pytest.raises(PromptError, match="toy-model refused the messages: Only user"):
        build(parts(tokenizer), TALK)
    dropping = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(PromptError, match="changed or dropped the last message"):
        build(parts(byte_level(None, dropping)), "What color", chat=True)


@pytest.mark.parametrize("bad, sentence", [
    ("nowhere.png", "there is no image file 'nowhere.png'"),
    ("https://example.org/a.png", "is an address; download it first"),
    (7, "an image is a int"),
    (np.zeros((3, 8, 9), np.uint8), r"an image array has shape \(3, 8, 9\)"),
    (np.full((4, 4, 3), 2.0), "floats goes from 2 to 2"),
    (np.full((4, 4, 3), np.nan), "NaN"),
    (np.zeros((4, 4, 3), np.int64), "an image array is int64"),
])
def test_things_that_are_no_pictures(bad, sentence):
    with pytest.raises(PromptError, match=sentence):
        build(llava(), "<image> What", [bad])


def test_pictures_from_paths_and_arrays_are_the_same_picture(tmp_path):
    own = picture()
    own.save(tmp_path / "a.png")
    for given_as in (tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(own),
                     np.asarray(own) / 255.0):
        assert np.array_equal(np.asarray(open_picture(given_as)), np.asarray(own))
    (tmp_path / "b.png").write_bytes(b"no picture")
    with pytest.raises(PromptError, match="is not a readable image"):
        open_picture(tmp_path / "b.png")
    gray = build(llava(), "<image> What", np.zeros((40, 60), np.uint8))
    assert gray.inputs["pixel_values"].shape == (1, 3, 28, 28)


def test_a_file_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    picture(60, 40).save(tmp_path / "side.jpg", exif=exif)
    assert open_picture(tmp_path / "side.jpg").size == (40, 60)
