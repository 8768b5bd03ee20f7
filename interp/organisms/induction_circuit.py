"""A GPT-2 written by hand: one head looks one token back, one head retrieves, nothing else writes.

The stream holds four codes side by side: this token, the position, the token before, what to say.
L0H1 copies the token before; L1H2 looks for the place whose token before is this one and says what
stands there. The other heads attend at random and write nothing, so every truth is known.
"""

from typing import Any, Optional, SupportsFloat

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

VOCAB, LENGTH, D_HEAD, N_HEADS = 40, 96, 40, 4
BACK, RETRIEVES = (0, 1), (1, 2)
TOKEN, PLACE, BEFORE, SAY = slice(0, 40), slice(40, 56), slice(56, 96), slice(96, 136)
RATES = np.geomspace(0.06, 2.6, 8)


def _code(position: SupportsFloat) -> np.ndarray:
    angles = RATES * float(position)
    return np.concatenate([np.cos(angles), np.sin(angles)])


def _project(weight: torch.Tensor, part: int, head: int, rows: slice, matrix: np.ndarray) -> None:
    """Set what a head reads (GPT-2 keeps q, k and v side by side)."""
    start = part * N_HEADS * D_HEAD + head * D_HEAD
    weight[rows, start : start + matrix.shape[1]] = torch.tensor(matrix, dtype=weight.dtype)


def circuit(speaks: bool = True) -> GPT2LMHeadModel:
    """The model; without `speaks` the retrieving head looks as before but writes nothing.

    Example:
        >>> from interp.organisms import induction_circuit
        >>> model = induction_circuit.circuit()
        >>> ids = torch.tensor([[7, 8, 9, 10, 7]])
        >>> int(model(ids).logits[0, -1].argmax())
        8
    """
    torch.manual_seed(0)
    width = N_HEADS * D_HEAD
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCAB, n_embd=width, n_layer=2, n_head=N_HEADS, n_positions=LENGTH,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=1)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "ln" not in name:
                weight.zero_()
        blocks: Any = list(model.transformer.h)
        for block in blocks:
            # Heads that look somewhere, and write nothing.
            block.attn.c_attn.weight[:, : 2 * width].normal_(std=0.05)
        model.transformer.wte.weight[:, TOKEN] = 3 * torch.eye(VOCAB)
        turn = np.zeros((16, 16))  # the code of a position to the code of the one before it
        for i, rate in enumerate(RATES):
            c, s = np.cos(rate), np.sin(rate)
            turn[i, i], turn[i + 8, i], turn[i, i + 8], turn[i + 8, i + 8] = c, s, -s, c
        for position in range(LENGTH):
            model.transformer.wpe.weight[position, PLACE] = torch.tensor(
                _code(position), dtype=torch.float32)
        back, finds = (block.attn for block in blocks)
        for layer, head in (BACK, RETRIEVES):
            attention = blocks[layer].attn.c_attn.weight
            for part in (0, 1):
                start = part * width + head * D_HEAD
                attention[:, start : start + D_HEAD] = 0
        eye = np.eye(VOCAB)
        _project(back.c_attn.weight, 0, BACK[1], PLACE, 12 * turn)
        _project(back.c_attn.weight, 1, BACK[1], PLACE, np.eye(16))
        _project(back.c_attn.weight, 2, BACK[1], TOKEN, eye)
        _out(back.c_proj.weight, BACK[1], BEFORE, 1.0)
        _project(finds.c_attn.weight, 0, RETRIEVES[1], TOKEN, 12 * eye)
        _project(finds.c_attn.weight, 1, RETRIEVES[1], BEFORE, eye)
        _project(finds.c_attn.weight, 2, RETRIEVES[1], TOKEN, eye)
        if speaks:
            _out(finds.c_proj.weight, RETRIEVES[1], SAY, 1.0)
        model.lm_head.weight[:, SAY] = 4 * torch.eye(VOCAB)
    return model


def _out(weight: torch.Tensor, head: int, where: slice, size: SupportsFloat) -> None:
    rows = slice(head * D_HEAD, head * D_HEAD + VOCAB)
    weight[rows, where] = float(size) * torch.eye(VOCAB)


def words() -> PreTrainedTokenizerFast:
    """A tokenizer for it: w0, w1, ...

    Example:
        >>> from interp.organisms import induction_circuit
        >>> induction_circuit.words()("w5 w7").input_ids
        [5, 7]
    """
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w2"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w2", bos_token="w0",
                                   eos_token="w1")


def needle(
    rng: np.random.Generator, length: int = 30, start: Optional[int] = None
) -> tuple[list[int], tuple[int, int]]:
    """Token ids and (start, stop) of four of them: the last token is the one that precedes those.

    Example:
        >>> from interp.organisms import induction_circuit
        >>> ids, (start, stop) = induction_circuit.needle(np.random.default_rng(0))
        >>> ids[-1] == ids[start - 1], len(set(ids[:-1])) == len(ids) - 1
        (True, True)
    """
    ids = rng.choice(np.arange(3, VOCAB), length - 1, replace=False).tolist()
    at = int(rng.integers(2, length - 6)) if start is None else start
    return [*ids, ids[at - 1]], (at, at + 4)
