"""A GPT-2 written by hand that adds three numbers: when the last token reads them is known.

"a + b + c =" holds its numbers at positions 1, 3 and 5. One head per number copies it to the last
token, in the layers of `transfer` (in turn); before and after them tokens only exchange noise. The
twin `relay` hands the numbers to the third one first, and the last token reads that.

Every coordinate stands beside its negative, so that the mean of a state is zero; all states have
nearly the same norm, so that layer norms only rescale them by a known number.
"""

from collections.abc import Sequence
from typing import Any, SupportsFloat, SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

DIGITS, SUMS = 10, 28
PLUS, EQUALS, BOS = SUMS, SUMS + 1, SUMS + 2
VOCABULARY = SUMS + 3
SLOTS, LENGTH = (1, 3, 5), 7
VALUE, CONSTANT, BALANCE, TOTAL, NOISE = 0, 1, 2, 3, slice(4, 20)
PLACE = 20
N_HEADS, D_HEAD, PAIRS = 4, 14, 28
D_MODEL = 2 * PAIRS
STRENGTH = 0.05
"""Of what a head writes, small beside the norm of a state; the vocabulary head makes up for it."""


def build(
    layers: SupportsIndex = 6, transfer: Sequence[SupportsIndex] = (3, 4), relay: bool = False,
    noise: SupportsFloat = 0.03,
) -> GPT2LMHeadModel:
    """The model. With `relay` the numbers meet at the third one, a layer before they are read.

    Example:
        >>> from interp.organisms import adder_circuit
        >>> ids = torch.tensor(adder_circuit.prompts(np.array([[3, 4, 9]])))
        >>> int(adder_circuit.build()(ids).logits[0, -1].argmax())
        16

    Args:
        transfer: the layers in which the last token reads the numbers, first to third in turn.
            With `relay`: two layers, the first to gather them and the second to read.
        noise: size of what all tokens tell each other beside the point, in every layer.

    Raises:
        ValueError: layers that do not exist, or no two for a relay.
    """
    n_layers, when = int(layers), [int(layer) for layer in transfer]
    if not when or not all(0 <= layer < n_layers for layer in when) or relay and len(when) != 2:
        raise ValueError(
            f"no adder of {n_layers} layers that reads in {when}: name layers that exist, and exactly "
            "two for a relay."
        )
    torch.manual_seed(0)
    made = GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_embd=D_MODEL, n_layer=n_layers, n_head=N_HEADS, n_positions=16,
        n_inner=32, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=BOS)).eval()
    steps = list(zip(SLOTS, (when * 3)[:3])) if not relay else [(1, when[0]), (3, when[0])]
    with torch.no_grad():
        blocks: Any = list(made.transformer.h)
        for name, weight in made.named_parameters():
            if "ln_" not in name:
                weight.zero_()
        for block in blocks:
            _murmur(block, float(noise))
        _embed(made)
        scale = (D_MODEL / 6) ** 0.5
        for head, (slot, layer) in enumerate(steps):
            reader = SLOTS[2] if relay else LENGTH - 1
            _copy(blocks[layer], head, reader, slot, VALUE, STRENGTH / scale)
        if relay:
            # What was gathered, and the third number itself, which is worth as much as one copy.
            _copy(blocks[when[1]], 0, LENGTH - 1, SLOTS[2], TOTAL, 1 / scale)
            _copy(blocks[when[1]], 1, LENGTH - 1, SLOTS[2], VALUE, STRENGTH / scale)
        sums = torch.arange(SUMS).float()
        # 2 s x - s^2 is largest for the whole number s nearest to x.
        _pair(made.lm_head.weight[:SUMS], TOTAL, 2 * sums * (DIGITS - 1) / STRENGTH)
        _pair(made.lm_head.weight[:SUMS], CONSTANT, -(sums**2))
        made.lm_head.weight[SUMS:, :] = 0
        _pair(made.lm_head.weight[SUMS:], CONSTANT, torch.full((VOCABULARY - SUMS,), -1e3))
    return made


def _pair(weight: Tensor, coordinate: int, values: Tensor) -> None:
    weight[..., coordinate] = values
    weight[..., PAIRS + coordinate] = -values


def _embed(made: GPT2LMHeadModel) -> None:
    """Numbers as a coordinate, balanced by another one; positions one by one; noise per token."""
    value = torch.zeros(VOCABULARY)
    value[:DIGITS] = torch.arange(DIGITS) / (DIGITS - 1)
    _pair(made.transformer.wte.weight, VALUE, value)
    _pair(made.transformer.wte.weight, BALANCE, (1 - value**2).sqrt())
    _pair(made.transformer.wte.weight, CONSTANT, torch.ones(VOCABULARY))
    code = 0.03 * torch.randn(VOCABULARY, 16)
    made.transformer.wte.weight[:, NOISE] = code
    made.transformer.wte.weight[:, PAIRS + NOISE.start : PAIRS + NOISE.stop] = -code
    for position in range(LENGTH):
        made.transformer.wpe.weight[position, PLACE + position] = 1.0
        made.transformer.wpe.weight[position, PAIRS + PLACE + position] = -1.0


def _murmur(block: Any, size: float) -> None:
    """Heads that look anywhere and write only noise, of what was noise before; and so the MLP."""
    width = N_HEADS * D_HEAD
    attention, mlp = block.attn, block.mlp
    attention.c_attn.weight[:, : 2 * width].normal_(std=0.3)
    attention.c_attn.weight[NOISE, 2 * width :].normal_(std=0.2)
    mlp.c_fc.weight[NOISE].normal_(std=0.2)
    for out in (attention.c_proj.weight, mlp.c_proj.weight):
        out[:, NOISE].normal_(std=size)
        out[:, PAIRS + NOISE.start : PAIRS + NOISE.stop] = -out[:, NOISE]


def _copy(block: Any, head: int, reader: int, slot: int, what: int, strength: float) -> None:
    """One head by which position `reader` reads a coordinate of `slot`; all others read BOS."""
    width, start = N_HEADS * D_HEAD, head * D_HEAD
    weight = block.attn.c_attn.weight
    for part in range(3):
        weight[:, part * width + start : part * width + start + D_HEAD] = 0
    block.attn.c_proj.weight[start : start + D_HEAD] = 0
    weight[PLACE + reader, start] = 16.0
    weight[PLACE + slot, width + start] = 16.0
    weight[CONSTANT, start + 1] = 8.0
    weight[PLACE, width + start + 1] = 8.0
    weight[what, 2 * width + start] = 1.0
    block.attn.c_proj.weight[start, TOTAL] = strength
    block.attn.c_proj.weight[start, PAIRS + TOTAL] = -strength


def prompts(numbers: Int[np.ndarray, "prompt 3"]) -> Int[np.ndarray, "prompt position"]:
    """Token ids of "a + b + c =" after BOS.

    Example:
        >>> from interp.organisms import adder_circuit
        >>> adder_circuit.prompts(np.array([[3, 4, 9]])).shape
        (1, 7)
    """
    ids = np.tile([BOS, 0, PLUS, 0, PLUS, 0, EQUALS], (len(numbers), 1))
    ids[:, list(SLOTS)] = numbers
    return ids


def words() -> PreTrainedTokenizerFast:
    """A tokenizer for it: whole numbers up to the largest sum, "+" and "=", BOS in front.

    Example:
        >>> from interp.organisms import adder_circuit
        >>> adder_circuit.words()("3 + 4 + 9 =").input_ids[1:3]
        [3, 28]
    """
    known = {**{str(n): n for n in range(SUMS)}, "+": PLUS, "=": EQUALS, "<s>": BOS}
    raw = Tokenizer(models.WordLevel(known, unk_token="<s>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<s>", bos_token="<s>",
                                   eos_token="<s>")
