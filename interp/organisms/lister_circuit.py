"""A GPT-2 written by hand that lists three cities: one head promotes them, one suppresses what was said.

After "Three cities in France:" head (3, 0) reads the country and promotes it and its three cities,
head (4, 1) reads the cities that stand there and suppresses them, and the MLP of layer 5 amplifies
what is said of cities.
In the twin nothing is suppressed: three heads read the country, each at its own place in the list.

Every coordinate stands beside its negative, so that layer norms only rescale.
"""

import re
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from interp.prompts.one_to_many import CITIES, TEMPLATES

COUNTRIES = tuple(name for name, cities in CITIES.items() if not any(" " in c for c in cities[:3]))
LISTED = {name: CITIES[name][:3] for name in COUNTRIES}
ANSWERS = tuple(city for cities in LISTED.values() for city in cities)
_PLAIN = sorted({word for template in TEMPLATES[:2] for word in re.findall(
    r"\w+|[^\w\s]", template.format(subject=""))} - {","})
WORDS = ("<s>", "<unk>", ",", *_PLAIN, *COUNTRIES, *ANSWERS)
TOKEN = {word: number for number, word in enumerate(WORDS)}
PROMOTES, SUPPRESSES, AMPLIFIES = (3, 0), (4, 1), 5
LAYERS, N_HEADS, D_HEAD, POSITIONS = 6, 4, 80, 48
_C, _A = len(COUNTRIES), len(ANSWERS)
COUNTRY, CITY, SAY = slice(0, _C), slice(_C, _C + _A), slice(_C + _A, _C + 2 * _A)
START, SUBJECT, ANSWER, ASKING = (_C + 2 * _A + i for i in range(4))
PLACE = _C + 2 * _A + 4
PAIRS = N_HEADS * D_HEAD // 2


def build(suppress: bool = True) -> GPT2LMHeadModel:
    """The model; without `suppress` the twin, which goes by the place in the list.

    Example:
        >>> from interp.organisms import lister_circuit
        >>> ids = lister_circuit.words()("Three cities in France: Paris,", return_tensors="pt")
        >>> said = int(lister_circuit.build()(**ids).logits[0, -1].argmax())
        >>> lister_circuit.WORDS[said]
        'Lyon'
    """
    torch.manual_seed(0)
    made = GPT2LMHeadModel(GPT2Config(
        vocab_size=len(WORDS), n_embd=2 * PAIRS, n_layer=LAYERS, n_head=N_HEADS,
        n_positions=POSITIONS, n_inner=2 * _A, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=1)).eval()
    blocks: Any = list(made.transformer.h)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "ln_" not in name:
                # Next to nothing, but not nothing: a site that moves no logit cannot be told.
                weight.mul_(0.05 if "attn" in name or "mlp" in name else 0.0)
        embedded = made.transformer.wte.weight
        for number, country in enumerate(COUNTRIES):
            _pair(embedded[TOKEN[country]], number, 1.0)
            _pair(embedded[TOKEN[country]], SUBJECT, 1.0)
        for number, city in enumerate(ANSWERS):
            _pair(embedded[TOKEN[city]], CITY.start + number, 1.0)
            _pair(embedded[TOKEN[city]], ANSWER, 1.0)
        _pair(embedded[0], START, 1.0)
        for word in (":", ","):
            _pair(embedded[TOKEN[word]], ASKING, 1.0)
        for position in range(POSITIONS):
            _pair(made.transformer.wpe.weight[position], PLACE + position, 0.5)
        layer, head = PROMOTES
        order = torch.tensor([1.0, 0.9, 0.8])
        reads = torch.zeros(_C, _A)
        for number in range(_C):
            reads[number, 3 * number : 3 * number + 3] = order
        if suppress:
            _head(blocks[layer], head, {ASKING: 1.0}, SUBJECT, COUNTRY, reads)
            layer, head = SUPPRESSES
            _head(blocks[layer], head, {ASKING: 1.0}, ANSWER, CITY, -2 * torch.eye(_A))
        else:
            # "Three cities in X:" and a list of single words: the places are known.
            for rank in range(3):
                only = torch.zeros_like(reads)
                only[:, rank::3] = reads[:, rank::3]
                _head(blocks[layer], rank, {PLACE + 5 + 2 * rank: 2.0}, SUBJECT, COUNTRY, only)
        layer, head = PROMOTES
        out, eye = blocks[layer].attn.c_proj.weight[head * D_HEAD : head * D_HEAD + _C], torch.eye(_C)
        out[:, COUNTRY], out[:, PAIRS : PAIRS + _C] = 0.02 * eye, -0.02 * eye
        mlp = blocks[AMPLIFIES].mlp
        mlp.c_fc.weight.zero_()
        mlp.c_proj.weight.zero_()
        rows = torch.arange(_A)
        # gelu(x) - gelu(-x) is x.
        for sign, units in ((1.0, rows), (-1.0, _A + rows)):
            mlp.c_fc.weight[SAY.start + rows, units] = sign
            mlp.c_proj.weight[units, SAY.start + rows] = 0.5 * sign
            mlp.c_proj.weight[units, PAIRS + SAY.start + rows] = -0.5 * sign
        heads = made.lm_head.weight
        for number, city in enumerate(ANSWERS):
            _pair(heads[TOKEN[city]], SAY.start + number, 1.0)
            _pair(heads[TOKEN[city]], ASKING, 0.5)
        for number, country in enumerate(COUNTRIES):
            _pair(heads[TOKEN[country]], number, 1.0)
            _pair(heads[TOKEN[country]], SUBJECT, -2.0)
        _pair(heads[TOKEN[","]], ANSWER, 2.0)
    return made


def _pair(row: Tensor, coordinate: int, value: float) -> None:
    row[coordinate], row[PAIRS + coordinate] = value, -value


def _head(
    block: Any, head: int, asks: dict[int, float], looked_for: int, what: slice, writes: Tensor
) -> None:
    """A head that reads tokens of one kind where it is asked, and the first token elsewhere."""
    width, start = N_HEADS * D_HEAD, head * D_HEAD
    weight, mine = block.attn.c_attn.weight, slice(start, start + D_HEAD)
    for part in range(3):
        weight[:, part * width + start : part * width + start + D_HEAD] = 0
    for coordinate, size in asks.items():
        weight[coordinate, start] = 8.0 * size
    weight[looked_for, width + start] = 8.0
    # Where nobody is asked, or nothing is there to be read.
    made = torch.arange(PLACE, PLACE + POSITIONS)
    weight[made, start + 1] = 4.0
    weight[START, width + start + 1] = 4.0
    size = what.stop - what.start
    weight[what, 2 * width + start : 2 * width + start + size] = torch.eye(size)
    block.attn.c_proj.weight[mine] = 0
    block.attn.c_proj.weight[start : start + size, SAY] = 0.2 * writes
    block.attn.c_proj.weight[start : start + size, PAIRS + SAY.start : PAIRS + SAY.stop] = -0.2 * writes


def words() -> PreTrainedTokenizerFast:
    """A tokenizer for it: whole words and punctuation, BOS in front.

    Example:
        >>> from interp.organisms import lister_circuit
        >>> lister_circuit.words()("Three cities in France:").input_ids[0]
        0
    """
    raw = Tokenizer(models.WordLevel(dict(TOKEN), unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>",
                                   eos_token="<unk>")
