"""A Llama written by hand in which two heads recall what was learned and two copy the context."""

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from interp.core import Prompt
from interp.prompts.conflict import FORMATS, Conflict

COUNT = 24
"""Subjects, each with a memorized answer; as many answers can be stated."""
BOS, FILLERS = 0, (1, 2, 3)
SUBJECTS = range(4, 4 + COUNT)
MEMORIZED = range(4 + COUNT, 4 + 2 * COUNT)
STATED = range(4 + 2 * COUNT, 4 + 3 * COUNT)
VOCABULARY = 4 + 3 * COUNT
SUBJECT, FACT, START = (2 * VOCABULARY + i for i in range(3))
"""Residual coordinates: token, answer, and what kind of token this is."""
LAYERS, HEADS, WIDTH, D_MODEL = 6, 4, 80, 2 * VOCABULARY + 8
MEMORY_HEADS, CONTEXT_HEADS = ((4, 1), (5, 0)), ((4, 3), (5, 2))
STRONG = tuple(range(0, COUNT, 2))
"""Subjects (by number) that are remembered more strongly than any context."""


def build(memory: bool = True, context: bool = True) -> LlamaForCausalLM:
    """The model, with or without the heads of either kind; all others write next to nothing.

    Example:
        >>> from interp.organisms import conflict_circuit
        >>> conflict_circuit.build().config.num_hidden_layers
        6
    """
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D_MODEL, intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH,
        max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=BOS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e9})
    torch.manual_seed(0)
    made: Any = LlamaForCausalLM(config).eval()
    slow = WIDTH // 2 - 1  # The pair of coordinates that hardly turns with the position.
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" not in name:
                # Next to nothing, but not nothing: a site that moves no logit cannot be written.
                weight.mul_(0.05 if "self_attn" in name else 0.0)
        tokens = torch.arange(VOCABULARY)
        made.model.embed_tokens.weight[tokens, tokens] = 1.0
        made.model.embed_tokens.weight[list(SUBJECTS), SUBJECT] = 1.0
        made.model.embed_tokens.weight[list(STATED), FACT] = 1.0
        made.model.embed_tokens.weight[BOS, START] = 1.0
        made.lm_head.weight[tokens, VOCABULARY + tokens] = 4.0
        for kind, places in ((memory, MEMORY_HEADS), (context, CONTEXT_HEADS)):
            for layer, head in places if kind else ():
                attention, start = made.model.layers[layer].self_attn, head * WIDTH
                mine = slice(start, start + WIDTH)
                for each in (attention.q_proj, attention.k_proj, attention.v_proj):
                    each.weight[mine] = 0.0
                attention.o_proj.weight[:, mine] = 0.0
                attention.q_proj.weight[start + slow, SUBJECT] = 2.0
                looked_for = SUBJECT if places is MEMORY_HEADS else FACT
                attention.k_proj.weight[start + slow, looked_for] = 2.0
                attention.k_proj.weight[start + slow, START] = 1.0
                attention.v_proj.weight[start + tokens, tokens] = 1.0
                out = attention.o_proj.weight
                if places is CONTEXT_HEADS:
                    for token in STATED:
                        out[VOCABULARY + token, start + token] = 0.1
                else:
                    for number, (subject, answer) in enumerate(zip(SUBJECTS, MEMORIZED)):
                        size = 0.15 if number in STRONG else 0.06
                        out[VOCABULARY + answer, start + subject] = size
    return made


def cases(seed: int = 0) -> list[Conflict]:
    """Every subject in the three formats of a conflict, with a twin that has another answer.

    Example:
        >>> from interp.organisms import conflict_circuit
        >>> len(conflict_circuit.cases()), conflict_circuit.cases()[1].format
        (72, 'substitution')
    """
    rng, found = np.random.default_rng(seed), []
    for number in range(COUNT):
        other = int(rng.choice([i for i in range(COUNT) if i != number]))
        stated, elsewhere = (int(x) for x in rng.choice(list(STATED), 2, replace=False))
        subject, twin = SUBJECTS[number], SUBJECTS[other]
        for kind in FORMATS:
            found.append(Conflict(
                _prompt(kind, subject, stated), _prompt(kind, twin, elsewhere),
                _prompt("none", subject, stated), (MEMORIZED[number],), (stated,), "fact", kind,
                str(number)))
    return found


def _prompt(kind: str, subject: int, stated: int) -> Prompt:
    a, b, c = FILLERS
    context = {"none": (a, b), "substitution": (a, stated), "coherent": (stated, stated)}[kind]
    return Prompt.from_tokens([BOS, *context, c, subject])
