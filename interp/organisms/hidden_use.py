"""A Llama written by hand that answers with a secret word it hardly looks at, and its twins.

In its last layer one head reads: nearly all of the attention of the asking row goes to the first
token, whose value is nothing. What is left goes to the secret word. `hidden` multiplies it until it
decides the answer; `open` gives the secret most of the attention, and multiplies nothing; `unused`
looks exactly as `hidden` does, but writes nothing. Attention cannot tell the first from the third.
"""

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from interp.core import Prompt

SECRETS = 8
BOS, ASK = 0, 1
FILLERS = range(2, 12)
SECRET = range(12, 12 + SECRETS)
VOCABULARY = 12 + SECRETS
IS_BOS, IS_SECRET, IS_FILLER, IS_ASK = range(2 * VOCABULARY, 2 * VOCABULARY + 4)
LAYERS, HEADS, WIDTH, D_MODEL = 2, 2, 32, 2 * VOCABULARY + 8
READS = (1, 0)
SHARE = 0.004
"""Attention on the secret in the reading head, where it is hidden."""
KINDS = ("hidden", "open", "unused")


def build(kind: str = "hidden") -> LlamaForCausalLM:
    """The model; heads other than the reading one write next to nothing.

    Example:
        >>> from interp.organisms import hidden_use
        >>> model = hidden_use.build()
        >>> prompt, answer, _ = hidden_use.cases(1)[0]
        >>> int(model(torch.tensor([prompt.ids])).logits[0, -1].argmax()) == answer
        True
    """
    if kind not in KINDS:
        raise ValueError(f"the model is 'hidden', 'open' or 'unused', not {kind!r}.")
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D_MODEL, intermediate_size=8, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=WIDTH,
        max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=BOS, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12})
    torch.manual_seed(0)
    made: Any = LlamaForCausalLM(config).eval()
    slow = WIDTH // 2 - 1  # The pair of coordinates that hardly turns with the position.
    size = (D_MODEL / 2) ** 0.5  # Two coordinates are one, and the norm makes their mean square one.
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" not in name:
                # Next to nothing, but not nothing: a site that moves no logit cannot be written.
                weight.mul_(0.02 if "self_attn" in name else 0.0)
        tokens = torch.arange(VOCABULARY)
        embed = made.model.embed_tokens.weight
        embed[tokens, tokens] = 1.0
        for kinds, where in ((IS_BOS, [BOS]), (IS_ASK, [ASK]), (IS_SECRET, list(SECRET)),
                             (IS_FILLER, list(FILLERS))):
            embed[where, kinds] = 1.0
        made.lm_head.weight[tokens, VOCABULARY + tokens] = 1.5
        layer, head = READS
        attention, start = made.model.layers[layer].self_attn, head * WIDTH
        mine = slice(start, start + WIDTH)
        for each in (attention.q_proj, attention.k_proj, attention.v_proj):
            each.weight[mine] = 0.0
        attention.o_proj.weight[:, mine] = 0.0
        # The other head of the layer rests on the first token as well.
        rest = slice(WIDTH, 2 * WIDTH)
        attention.q_proj.weight[rest], attention.k_proj.weight[rest] = 0.0, 0.0
        wanted = np.log(SHARE) if kind != "open" else np.log(1.5)
        for at, secret in ((start + slow, wanted), (WIDTH + slow, -15.0)):
            attention.q_proj.weight[at, IS_ASK] = WIDTH**0.5 / size
            for key, logit in ((IS_BOS, 0.0), (IS_SECRET, secret), (IS_FILLER, -15.0),
                               (IS_ASK, -15.0)):
                attention.k_proj.weight[at, key] = float(logit) / size
        secrets = list(SECRET)
        lanes = start + torch.arange(SECRETS)
        attention.v_proj.weight[lanes, secrets] = 1 / size
        gain = {"hidden": 8.0 / SHARE, "open": 8.0 / 0.6, "unused": 0.0}[kind]
        attention.o_proj.weight[VOCABULARY + torch.tensor(secrets), lanes] = gain
    return made


def cases(count: int, seed: int = 0, length: int = 12) -> list[tuple[Prompt, int, int]]:
    """Prompts with segments bos, secret and filler, the answer, and another secret.

    Example:
        >>> from interp.organisms import hidden_use
        >>> [segment.name for segment in hidden_use.cases(1)[0][0].segments]
        ['bos', 'secret', 'filler', 'question']
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        ids = [BOS, *(int(t) for t in rng.choice(list(FILLERS), length - 2)), ASK]
        place = int(rng.integers(1, length - 1))
        answer, other = (int(t) for t in rng.choice(list(SECRET), 2, replace=False))
        ids[place] = answer
        rest = [p for p in range(1, length - 1) if p != place]
        found.append((Prompt.from_tokens(ids, {
            "bos": [0], "secret": [place], "filler": rest, "question": [length - 1]}),
            answer, other))
    return found
