"""`looker`: a small LLaVA (CLIP vision tower, projector, Llama with grouped keys) that answers
questions about scenes.

It sees pictures of colored shapes and real handwritten numbers (`interp.prompts.scenes`): one
visual token per grid cell. In training many question-answer pairs share one picture; the attention
mask hides the pairs from each other and every pair starts at the position that follows the picture,
so each is trained exactly as it is asked later: one question directly after the image. A part of
the batches is an ordinary conversation instead, so follow-ups work."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AttentionInterface,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from interp.organisms.train import Recipe
from interp.prompts.scenes import (
    CELL,
    COLORS,
    GRID,
    SHAPES,
    SIDE,
    TASKS,
    Question,
    Scene,
    questions,
    scenes,
    words,
)

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>", "USER:", "ASSISTANT:")
PAD, BOS, END, UNKNOWN, IMAGE, USER, ASSISTANT = range(len(SPECIAL))
VOCABULARY = (*SPECIAL, *words())
TOKEN = {word: index for index, word in enumerate(VOCABULARY)}
CELLS = GRID * GRID
PREFIX = (BOS, USER, *(IMAGE,) * CELLS)
# the usual LLaVA template: the tokenizer adds <s>, line breaks are not tokens
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_ATTENTION = "looker_float32_attention"
MEAN, STD = (0.3, 0.3, 0.3), (0.25, 0.25, 0.25)


def config() -> LlavaConfig:
    """The architecture: 36 visual tokens, 8 decoder layers of 8 query heads on 4 key heads, about
    3.4 M parameters.
    """
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=CELL,
            projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=512,
            bos_token_id=BOS,
            eos_token_id=END,
            pad_token_id=PAD,
            tie_word_embeddings=False,
            initializer_range=0.05,
        ),
        image_token_index=IMAGE,
        image_seq_length=CELLS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def build(seed: int) -> LlavaForConditionalGeneration:
    """The untrained model."""
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config())


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, lower case, digits and punctuation apart; `<s>` is added in front.

    Example:
        >>> tokenizer().tokenize("What is the NUMBER? 47")
        ['what', 'is', 'the', 'number', '?', '4', '7']
    """
    raw = Tokenizer(models.WordLevel(TOKEN, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[^\w]"), "isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    raw.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    raw.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def processor() -> LlavaProcessor:
    """Pictures of 84 x 84 pixels pass unchanged; any other is resized to a shortest edge of 84 and
    cropped in the middle.
    """
    pictures = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(
        image_processor=pictures,
        tokenizer=tokenizer(),
        patch_size=CELL,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def export(model: torch.nn.Module, folder: Path) -> None:
    """Write the processor and tokenizer beside the weights."""
    processor().save_pretrained(folder)


def encode(text: str) -> list[int]:
    """Token ids of a text whose words stand apart (the tokenizer gives the same, slower)."""
    return [TOKEN[word] for word in text.split()]


def prompt(question: Question) -> list[int]:
    """Token ids of an image question as the processor writes it: `<s> USER: <image> x 36 question
    ASSISTANT:`.
    """
    return [*PREFIX, *encode(question.text), ASSISTANT]


def normalize(
    pixels: UInt8[np.ndarray, "batch height width 3"], like: Tensor
) -> Float[Tensor, "batch 3 height width"]:
    """What the image processor does to pictures of the right size, for a whole batch."""
    mean, std = (torch.tensor(v, device=like.device)[:, None, None] for v in (MEAN, STD))
    return (torch.from_numpy(pixels).to(like.device).permute(0, 3, 1, 2) / 255 - mean) / std


# ---------------------------------------------------------------------- training


_CLASSES = (1 + len(COLORS), 1 + len(SHAPES), 11, GRID, GRID)


class Stage(NamedTuple):
    """Up to step `until`: how many shapes and numbers the scenes of training have.

    Each scene is asked `existence` times whether a thing is there (a yes and a no).
    """

    until: int
    shapes: tuple[int, int]
    numbers: tuple[int, int]
    existence: int = 1


# attention to the image is found where one thing is there to be seen, and then carries over
CURRICULUM = (
    Stage(850, (1, 1), (0, 1)),
    Stage(1200, (1, 3), (0, 1)),
    Stage(3200, (1, 6), (0, 2)),
    Stage(5000, (1, 6), (0, 2), existence=3),
)


def pack(
    pictures: list[Scene],
    rng: np.random.Generator,
    length: int,
    conversation: bool,
    describing: float = 0.3,
    existence: int = 1,
) -> dict[str, np.ndarray]:
    """Question-answer pairs of every picture in one row of `length` tokens after the image.

    Returns int64 arrays [batch, position]: `ids`, `targets` (next token on answer tokens, else
    -100), `positions`, `pair` (0 in the image part, -1 in the padding, else the number of the
    pair)."""
    width = len(PREFIX) + length
    shape = (len(pictures), width)
    ids, targets = np.full(shape, PAD), np.full(shape, -100)
    positions, pair = np.zeros(shape, np.int64), np.full(shape, -1)
    ids[:, : len(PREFIX)] = PREFIX
    positions[:, : len(PREFIX)] = np.arange(len(PREFIX))
    pair[:, : len(PREFIX)] = 0
    for row, picture in enumerate(pictures):
        pool = questions(picture, rng, tasks=TASKS[:-1], every=True)
        for _ in range(existence - 1):
            pool += questions(picture, rng, tasks=("existence",))
        pool = [pool[i] for i in rng.permutation(len(pool))]
        # the rare and hard ones first, they would fall off the end otherwise
        pool.sort(key=lambda question: question.task != "read")
        if rng.random() < describing:
            pool = questions(picture, rng, tasks=("describe",)) + pool
        cursor, chosen = len(PREFIX), []
        for question in pool:
            asked = [*encode(question.text), ASSISTANT]
            answer = [*encode(question.answer), END]
            size = len(asked) + len(answer) + (1 if conversation and chosen else 0)
            if cursor + size <= width:
                chosen.append((asked, answer))
                cursor += size
        if conversation:
            chosen = [chosen[i] for i in rng.permutation(len(chosen))]
        cursor = len(PREFIX)
        for number, (asked, answer) in enumerate(chosen, 1):
            tokens = [USER, *asked, *answer] if conversation and number > 1 else [*asked, *answer]
            end = cursor + len(tokens)
            ids[row, cursor:end] = tokens
            targets[row, end - len(answer) - 1 : end - 1] = answer
            first = cursor if conversation else len(PREFIX)
            positions[row, cursor:end] = np.arange(first, first + len(tokens))
            pair[row, cursor:end] = number
            cursor = end
    return {"ids": ids, "targets": targets, "positions": positions, "pair": pair}


def _float32_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    **kwargs: Any,
):
    """Scaled dot-product attention outside autocast: its bfloat16 backward pass is ten times slower
    on processors.
    """
    with torch.autocast(query.device.type, enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **kwargs)


@contextmanager
def _mixed_precision(model: Any, enabled: bool) -> Iterator[None]:
    """Products in bfloat16, attention in float32; the attention function of the model is put back
    afterwards.
    """
    if not enabled:
        yield
        return
    AttentionInterface.register(_ATTENTION, _float32_attention)
    AttentionMaskInterface.register(_ATTENTION, sdpa_mask)
    parts = (model.model.vision_tower.config, model.model.language_model.config)
    before = [part._attn_implementation for part in parts]
    try:
        for part in parts:
            part._attn_implementation = _ATTENTION
        with torch.autocast(model.lm_head.weight.device.type, torch.bfloat16):
            yield
    finally:
        for part, name in zip(parts, before, strict=True):
            part._attn_implementation = name


def visible(pair: Tensor) -> Tensor:
    """Which keys a query sees, [batch, 1, query, key]: causal, the image part, and its own pair."""
    same = pair[:, :, None] == pair[:, None, :]
    prefix = (pair == 0)[:, None, :]
    causal = torch.ones(pair.shape[1], pair.shape[1], dtype=torch.bool, device=pair.device).tril()
    return ((same | prefix) & causal)[:, None]


def cell_labels(pictures: list[Scene]) -> Int[np.ndarray, "batch patch 5"]:
    """What each visual token shows: color, shape and digit (0 for none), its row and its column.

    Example:
        >>> from interp.prompts.scenes import scene
        >>> cell_labels([scene(np.random.default_rng(0), shapes=0, numbers=0)])[0, 7].tolist()
        [0, 0, 0, 1, 1]
    """
    labels = np.zeros((len(pictures), CELLS, len(_CLASSES)), np.int64)
    labels[..., 3], labels[..., 4] = np.divmod(np.arange(CELLS), GRID)
    for picture, table in zip(pictures, labels, strict=True):
        for thing in picture.objects:
            for place, (row, column) in enumerate(thing.cells):
                cell = table[row * GRID + column]
                if thing.kind == "shape":
                    cell[:2] = 1 + list(COLORS).index(thing.color), 1 + SHAPES.index(thing.shape)
                else:
                    cell[2] = 1 + thing.digits[place]
    return labels


def cell_loss(model: Any, pictures: list[Scene]) -> Tensor:
    """First stage, tower and projector alone: the projected visual tokens must tell what their
    cells show.

    Read out along fixed random directions, so the model gets no extra parameters.
    """
    weight = model.lm_head.weight
    pixels = normalize(np.stack([picture.pixels for picture in pictures]), weight)
    tokens = torch.stack(
        list(model.model.get_image_features(pixels, return_dict=True).pooler_output)
    ).float()
    codes = torch.randn(tokens.shape[-1], sum(_CLASSES), generator=torch.Generator().manual_seed(0))
    # the factor keeps the tokens near the scale of word embeddings
    scores = (4 * tokens @ torch.nn.functional.normalize(codes, dim=0).to(weight.device)).split(
        _CLASSES, -1
    )
    labels = torch.from_numpy(cell_labels(pictures)).to(weight.device)
    losses = [
        torch.nn.functional.cross_entropy(score.flatten(0, 1), labels[..., kind].flatten())
        for kind, score in enumerate(scores)
    ]
    return torch.stack(losses).sum()


def forward_loss(
    model: Any, packed: dict[str, np.ndarray], pixels: np.ndarray, conversation: bool
) -> Tensor:
    """Mean cross entropy of the answer tokens of a packed batch; in a conversation later pairs see
    the earlier ones.
    """
    device = model.lm_head.weight.device
    batch = {key: torch.from_numpy(value).to(device) for key, value in packed.items()}
    with torch.no_grad():
        seen = model.model.get_image_features(
            normalize(pixels, model.lm_head.weight), return_dict=True
        ).pooler_output
    words = model.model.get_input_embeddings()(batch["ids"])
    image = (batch["ids"] == IMAGE)[..., None]
    hidden = model.model.language_model(
        inputs_embeds=words.masked_scatter(image, torch.cat(list(seen)).to(words.dtype)),
        position_ids=batch["positions"],
        attention_mask=visible(batch["pair"].clamp(max=0) if conversation else batch["pair"]),
        use_cache=False,
    ).last_hidden_state
    answered = batch["targets"] >= 0
    logits = model.lm_head(hidden[answered]).float()
    return torch.nn.functional.cross_entropy(logits, batch["targets"][answered])


def recipe(
    *,
    steps: int = 5000,
    batch: int = 16,
    length: int = 84,
    sighted: int = 500,
    lr: float = 1.5e-3,
    weight_decay: float = 0.1,
    conversations: float = 0.15,
    half_precision: bool = True,
    compiled: bool = False,
    examples: int = 300,
) -> Recipe:
    """The recipe of `looker`.

    Example:
        >>> recipe(steps=3).name
        'looker'

    The first `sighted` steps train the vision tower and the projector alone (`cell_loss`), as the
    tower of a real LLaVA is trained beforehand; then the language model learns to answer, about
    scenes that get more objects stage by stage (`CURRICULUM`). `length` is the number of tokens
    after the image that questions and answers share; `conversations` is the share of batches whose
    pairs see each other; with `half_precision` the products run in bfloat16 (autocast; weights and
    updates stay float32); `compiled` fuses each layer with torch.compile (needs a C++ compiler; a
    third less time, the same numbers up to rounding); `examples` questions per task are evaluated.
    """

    def loss(model: Any, rng: np.random.Generator, step: int) -> Tensor:
        if step >= sighted and compiled:
            layers = model.model.language_model.layers
            if layers[0]._compiled_call_impl is None:
                for layer in layers:
                    layer.compile(dynamic=False)
        if step < sighted:
            pictures = scenes(rng, 4 * batch, shapes=(4, 12), numbers=(1, 3), held_out=False)
            with _mixed_precision(model, half_precision):
                return cell_loss(model, pictures)
        stage = next((stage for stage in CURRICULUM if step < stage.until), CURRICULUM[-1])
        pictures = scenes(rng, batch, shapes=stage.shapes, numbers=stage.numbers, held_out=False)
        conversation = bool(rng.random() < conversations)
        packed = pack(pictures, rng, length, conversation, existence=stage.existence)
        pixels = np.stack([picture.pixels for picture in pictures])
        with _mixed_precision(model, half_precision):
            return forward_loss(model, packed, pixels, conversation)

    return Recipe(
        name="looker",
        build=build,
        loss=loss,
        evaluate=lambda model, seed: evaluate(model, seed, examples=examples),
        export=export,
        observe=observe,
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        betas=(0.9, 0.95),
        warmup=200,
        schedule="cosine",
        final_lr=0.02,
        clip=1.0,
        evaluate_every=1400,
        checkpoint_every=200,
        notes=NOTES,
        data=DATA,
    )


NOTES = (
    "A LLaVA small enough to train on one processor core: one visual token per cell of a 6 x 6 "
    'grid. Ask it "what color is the circle?", "what shape is the red thing?", "is there a red '
    'circle?", "how many circles are there?", "where is the red circle?", "what is the number?" '
    'or "describe the picture."; words outside its vocabulary are unknown to it. The first 500 '
    "steps train tower and projector alone to tell what each cell shows (the tower of a real LLaVA "
    "is trained beforehand, too), then both stay fixed and the language model learns to answer, at "
    "first about scenes of one shape and at most one number. Tried without success: everything "
    "from scratch together (answers at chance after 1200 steps), and letting the answers train "
    "the tower (it forgot forms and digits within 1000 steps). The bundled weights were trained in "
    "four parts of one run, between which the learning rate was laid out anew: "
    "train(recipe(steps=2800), folder, steps=1400), train(recipe(steps=5200), folder, steps=3200), "
    "train(recipe(steps=7000), folder, steps=3800), train(recipe(), folder); products in bfloat16, "
    "compiled=True. The seed measured below was also watched during training; a seed first used "
    "afterwards (4242) gave color 1.00, shape 0.99, existence 0.993, position 1.00, digit 0.973, "
    "whole number 0.947, count 0.54, describe 0.90. It counts all shapes but hardly ever those of "
    "one kind, and never saw a scene without shapes: do not study counting in it."
)
DATA = (
    "Scenes drawn fresh at every step: up to six shapes (six forms, eight colors, three sizes, "
    "shifted, color varied) and up to two numbers of one to three handwritten digits "
    "(scikit-learn's `load_digits`, 1400 images with twelve warped copies each; 397 other images "
    "for the measurements below, from the same writers) on a noisy background of random dark "
    "color. Many questions about a scene and, in three of ten, its description are trained "
    "together, hidden from each other; in 15 % of the batches they form a conversation instead."
)


# ---------------------------------------------------------------------- measuring


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def answer(
    model: Any,
    asked: Iterable[tuple[Scene, Question]],
    *,
    limit: int = 64,
    rows: int = 128,
) -> list[str]:
    """Greedy answers of the model to single questions directly after the image.

    Example:
        >>> from interp.prompts.scenes import scene
        >>> a = scene(np.random.default_rng(0))
        >>> len(answer(build(0).eval(), [(a, questions(a, np.random.default_rng(0))[0])], limit=2))
        1
    """
    asked = list(asked)
    device = model.lm_head.weight.device
    groups: dict[int, list[int]] = {}
    for index, (_, question) in enumerate(asked):
        groups.setdefault(len(prompt(question)), []).append(index)
    given = [""] * len(asked)
    for group in groups.values():
        for start in range(0, len(group), rows):
            part = group[start : start + rows]
            ids = torch.tensor([prompt(asked[i][1]) for i in part], device=device)
            pixels = normalize(np.stack([asked[i][0].pixels for i in part]), model.lm_head.weight)
            most = min(limit, 1 + max(len(asked[i][1].answer.split()) for i in part))
            written = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values=pixels,
                do_sample=False,
                max_new_tokens=most,
            )[:, ids.shape[1] :]
            for i, row in zip(part, written.tolist(), strict=True):
                row = row[: row.index(END)] if END in row else row
                given[i] = " ".join(VOCABULARY[token] for token in row)
    return given


def evaluate(
    model: torch.nn.Module, seed: int, *, examples: int = 300, described: int = 64
) -> dict[str, float]:
    """Accuracy per task on fresh scenes with held-out handwriting, one question per scene and task.

    `digit`: share of the digits of a number that stand at their place in the answer; `read`: whole
    numbers; `describe`: share of the objects that stand at their place in the description;
    `existence_hard`: hard noes only."""
    rng = np.random.default_rng([seed, 73])
    asked: list[tuple[Scene, Question]] = []
    for task in TASKS:
        wanted = described if task == "describe" else examples
        found = 0
        while found < wanted:
            picture = scenes(rng, 1, shapes=(2, 6), numbers=(1, 2))[0]
            choices = questions(picture, rng, tasks=(task,))
            if choices:
                asked.append((picture, choices[rng.integers(len(choices))]))
                found += 1
    hits: dict[str, list[float]] = {}
    for (_, question), given in zip(asked, answer(model, asked), strict=True):
        right = float(given == question.answer)
        if question.task == "describe":
            wanted, got = question.answer.rstrip(" .").split(" , "), given.rstrip(" .").split(" , ")
            hits.setdefault("describe", []).extend(
                float(a == b) for a, b in zip(wanted, got + [""] * len(wanted))
            )
            continue
        hits.setdefault(question.task, []).append(right)
        if question.hard:
            hits.setdefault("existence_hard", []).append(right)
        if question.task == "read":
            wanted, got = question.answer.split(), given.split()
            hits.setdefault("digit", []).extend(
                float(a == b) for a, b in zip(wanted, got + [""] * len(wanted))
            )
    return {task: float(np.mean(values)) for task, values in hits.items()}


@contextmanager
def _image_hidden_from(model: Any, layer: int, width: int) -> Iterator[None]:
    """Decoder layers from `layer` on: nothing after the image sees the image."""
    mask = torch.ones(width, width, dtype=torch.bool, device=model.lm_head.weight.device).tril()
    mask[len(PREFIX) :, len(PREFIX) - CELLS : len(PREFIX)] = False

    def edit(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return args, kwargs | {"attention_mask": mask[None, None]}

    handles = [
        block.register_forward_pre_hook(edit, with_kwargs=True)
        for block in model.model.language_model.layers[layer:]
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.compiler.set_stance("force_eager")
@torch.no_grad()
def observe(model: Any, seed: int, *, examples: int = 150) -> dict[str, float]:
    """Accuracy of color and digit reading when no later token sees the image from a layer on, and
    attention to `<s>`.
    """
    rng = np.random.default_rng([seed, 79])
    device = model.lm_head.weight.device
    layers = model.config.text_config.num_hidden_layers
    seen: dict[str, float] = {}
    for task in ("color", "read"):
        asked: list[tuple[Scene, Question]] = []
        while len(asked) < examples:
            picture = scenes(rng, 1)[0]
            choices = questions(picture, rng, tasks=(task,))
            if choices and (task != "read" or len(choices[0].answer.split()) == 2):
                asked.append((picture, choices[0]))
        rows = [[*prompt(q), *encode(q.answer)] for _, q in asked]
        width = max(map(len, rows))
        ids = torch.tensor([row + [PAD] * (width - len(row)) for row in rows], device=device)
        pixels = normalize(np.stack([picture.pixels for picture, _ in asked]), model.lm_head.weight)
        for cut in range(layers + 1):
            with _image_hidden_from(model, cut, width):
                guess = (
                    model(input_ids=ids, pixel_values=pixels, use_cache=False).logits.argmax(-1).cpu()
                )
            right = [
                guess[i, len(prompt(q)) - 1 + k].item() == token
                for i, (_, q) in enumerate(asked)
                for k, token in enumerate(encode(q.answer))
            ]
            seen[f"{'digit' if task == 'read' else task}, image hidden from layer {cut}"] = float(
                np.mean(right)
            )
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model(
            input_ids=ids[:32], pixel_values=pixels[:32], use_cache=False, output_attentions=True
        )
    finally:
        model.set_attn_implementation(before)
    first = torch.stack(out.attentions)[..., 0].mean(-1)  # [layer, prompt, head]
    seen["percent of heads whose mean attention to <s> exceeds 0.3"] = 100 * float(
        (first > 0.3).float().mean()
    )
    seen["strongest mean attention to <s>"] = float(first.mean(1).max())
    return seen
