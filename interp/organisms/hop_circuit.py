"""A Llama written by hand that answers in two hops, or whose second hop looks up its table too early.

"the capital of the country of ida is": block `resolve` turns person and first relation into the
bridge at the person's position; heads in block 1, in block `move` and in the last one carry bridges
to the last position; block `table` looks up bridge and second relation there. A table in a block
before `move` finds no bridge, and the model says that it does not know, although both hops are in it:
the failure of arXiv:2406.12775. Which states, put back into which block, repair it is known.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from interp.core import Prompt

PEOPLE = "ida hugo lena otto rosa emil vera paul".split()
FIRST = ["country", "teacher"]
BRIDGES = ["aria", "brom", "cela", "dorn", "evra", "fenn"]
SECOND = ["capital", "color"]
ANSWERS = [f"{word}{number}" for word in ("city", "hue") for number in range(len(BRIDGES))]
WORDS = ["<bos>", "<unk>", "the", "of", "is", *PEOPLE, *FIRST, *BRIDGES, *SECOND, *ANSWERS]
TOKEN = {word: number for number, word in enumerate(WORDS)}
LAYERS, HEADS, WIDTH, STEADY, SHARP = 8, 4, 32, 24.0, 12.0
N, B = len(WORDS), len(BRIDGES)
BRIDGE, ENTITY = N, N + B
RELATION, SECOND_AT = N + 2 * B, N + 2 * B + len(FIRST)
SAY = SECOND_AT + len(SECOND)
PERSON, IS_FIRST, IS_SECOND, CARRIES, ASKS, START, CONSTANT = range(SAY + N, SAY + N + 7)
D_MODEL = 8 * -(-(SAY + N + 7) // 8)

_rng = np.random.default_rng(2406_12775)
FACTS = {(person, relation): str(_rng.choice(BRIDGES)) for relation in FIRST for person in PEOPLE}
"""(person, first relation) -> bridge."""
TABLE = {(bridge, relation): ANSWERS[SECOND.index(relation) * B + number]
         for relation in SECOND for number, bridge in enumerate(BRIDGES)}
"""(bridge, second relation) -> answer."""


@dataclass(frozen=True)
class Hops:
    """Where each step happens: the blocks whose MLPs resolve and look up, and the block that carries.

    Example:
        >>> Hops().answers, Hops(table=6).answers
        (False, True)
    """

    resolve: int = 2
    move: int = 5
    table: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.resolve < LAYERS - 1 or not 1 < self.move < LAYERS - 1 \
                or not 1 <= self.table < LAYERS - 1:
            raise ValueError(f"{self} does not fit into {LAYERS} blocks: the first moves bridges, the "
                             "last one speaks.")

    @property
    def carriers(self) -> tuple[int, ...]:
        """Blocks that carry bridges to the last position."""
        return tuple(sorted({1, self.move, LAYERS - 1}))

    @property
    def arrival(self) -> int:
        """The block after which the last position holds the bridge."""
        return min(block for block in self.carriers if block > self.resolve)

    @property
    def answers(self) -> bool:
        """Whether the model answers by itself."""
        return self.arrival <= self.table

    def repairs(self, position: str) -> frozenset[tuple[int, int]]:
        """The (source, target) blocks whose back-patch at "last" or "entity" makes it answer.

        Example:
            >>> sorted(Hops(resolve=4, move=6, table=2).repairs("entity"))
            [(4, 0), (5, 0), (6, 0), (7, 0)]
        """
        if position == "last":
            # The bridge is there after `arrival`; the table is still to come after the target.
            pairs = {(s, g) for s in range(self.arrival, LAYERS) for g in range(self.table)}
        else:
            in_time = [block for block in self.carriers if block <= self.table]
            pairs = {(s, g) for s in range(self.resolve, LAYERS) for g in range(max(in_time))}
        return frozenset((s, g) for s, g in pairs if s > g)


def build(hops: Hops = Hops()) -> LlamaForCausalLM:
    """The model; see the head of this file.

    Example:
        >>> from interp.organisms import hop_circuit
        >>> ids, answer = hop_circuit.two_hops("ida", "country", "capital")
        >>> late = hop_circuit.build(hop_circuit.Hops(table=6))
        >>> int(late(torch.tensor([ids.ids])).logits[0, -1].argmax()) == answer
        True
    """
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(
        vocab_size=N, hidden_size=D_MODEL, intermediate_size=max(len(FACTS), len(TABLE) + 1),
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        head_dim=WIDTH, max_position_embeddings=64, tie_word_embeddings=False, bos_token_id=0,
        eos_token_id=None, rms_norm_eps=1e-9,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12})).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" not in name:
                # Next to nothing, but not nothing: a site that moves no logit cannot be written.
                weight.mul_(0.01 if "self_attn" in name else 0.0)
        embed = made.model.embed_tokens.weight
        embed[:, CONSTANT] = STEADY
        embed[torch.arange(N), torch.arange(N)] = 1.0
        for words, kind in ((PEOPLE, PERSON), (FIRST, IS_FIRST), (SECOND, IS_SECOND),
                            ((*PEOPLE, *BRIDGES), CARRIES), (("is",), ASKS), (("<bos>",), START)):
            embed[[TOKEN[word] for word in words], kind] = 1.0
        for number, word in enumerate(BRIDGES):
            embed[TOKEN[word], BRIDGE + number] = 1.0
        _carry(made, 0, 0, PERSON, IS_FIRST, [TOKEN[w] for w in FIRST], RELATION)
        _carry(made, 0, 1, ASKS, IS_SECOND, [TOKEN[w] for w in SECOND], SECOND_AT)
        for block in hops.carriers:
            _carry(made, block, 2, ASKS, CARRIES, range(BRIDGE, BRIDGE + B), ENTITY)
        resolve = [({TOKEN[p]: 1, RELATION + FIRST.index(r): 1}, BRIDGE + BRIDGES.index(e), 1.5)
                   for (p, r), e in FACTS.items()]
        look_up = [({ENTITY + BRIDGES.index(e): 1, SECOND_AT + SECOND.index(r): 1},
                    SAY + TOKEN[a], 1.5) for (e, r), a in TABLE.items()]
        # With nothing more asked, the bridge itself is the answer.
        asked = {SECOND_AT + number: -4 for number in range(len(SECOND))}
        speak = [({ENTITY + number: 1, **asked}, SAY + TOKEN[word], 0.5)
                 for number, word in enumerate(BRIDGES)]
        for block, units in ((hops.resolve, resolve), (hops.table, look_up), (LAYERS - 1, speak)):
            _units(made, block, units)
        made.lm_head.weight[torch.arange(N), SAY + torch.arange(N)] = 40.0
        made.lm_head.weight[TOKEN["<unk>"], CONSTANT] = 0.2
    return made


def _unit() -> float:
    """What one in the stream is after the norm; the constant makes it nearly the same everywhere."""
    return D_MODEL**0.5 / (STEADY**2 + 3.0) ** 0.5


def _carry(
    made: Any, block: int, head: int, asks: int, has: int,
    coordinates: "list[int] | range", to: int,
) -> None:
    """A head by which positions of one kind copy coordinates from positions of another kind."""
    attention, start, one = made.model.layers[block].self_attn, head * WIDTH, _unit()
    mine = slice(start, start + WIDTH)
    for part in (attention.q_proj, attention.k_proj, attention.v_proj):
        part.weight[mine] = 0.0
    attention.o_proj.weight[:, mine] = 0.0
    # Two coordinates that hardly turn with the position: what is looked for, and the start.
    kind, rest = start + WIDTH // 2 - 1, start + WIDTH - 1
    attention.q_proj.weight[kind, asks] = 40 * WIDTH**0.5 / one
    attention.k_proj.weight[kind, has] = 1 / one
    attention.q_proj.weight[rest, CONSTANT] = 15 * WIDTH**0.5 / (one * STEADY)
    attention.k_proj.weight[rest, START] = 1 / one
    for number, coordinate in enumerate(coordinates):
        attention.v_proj.weight[start + number, coordinate] = 1 / one
        attention.o_proj.weight[to + number, start + number] = 1.0


def _units(
    made: Any, block: int, units: list[tuple[dict[int, int], int, float]]
) -> None:
    """Hidden units that are on where a weighted sum of coordinates is above a threshold."""
    mlp, one = made.model.layers[block].mlp, _unit()
    free = [i for i in range(mlp.gate_proj.weight.shape[0])
            if not bool(mlp.gate_proj.weight[i].any())]
    if len(free) < len(units):
        raise ValueError(f"block {block} has no room for {len(units)} more units.")
    for unit, (reads, writes, threshold) in zip(free, units):
        for coordinate, weight in reads.items():
            mlp.gate_proj.weight[unit, coordinate] = 2 * SHARP * weight / one
        mlp.gate_proj.weight[unit, CONSTANT] = -2 * SHARP * threshold / (one * STEADY)
        mlp.up_proj.weight[unit, CONSTANT] = 1 / (one * STEADY)
        mlp.down_proj.weight[writes, unit] = 1 / SHARP


def words() -> PreTrainedTokenizerFast:
    """Its tokenizer.

    Example:
        >>> from interp.organisms import hop_circuit
        >>> hop_circuit.words()("the capital").input_ids == [2, hop_circuit.TOKEN["capital"]]
        True
    """
    raw = Tokenizer(models.WordLevel(TOKEN, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<bos>")


def two_hops(person: str, first: str, second: str) -> tuple[Prompt, int]:
    """A question in two hops, with segments "entity" and "last", and the token of its answer.

    Example:
        >>> from interp.organisms import hop_circuit
        >>> prompt, answer = hop_circuit.two_hops("ida", "country", "capital")
        >>> [hop_circuit.WORDS[i] for i in prompt.ids], prompt.positions("entity")
        (['<bos>', 'the', 'capital', 'of', 'the', 'country', 'of', 'ida', 'is'], (7,))
    """
    text = ["<bos>", "the", second, "of", "the", first, "of", person, "is"]
    return _prompt(text, 7), TOKEN[TABLE[FACTS[person, first], second]]


def one_hop(subject: str, relation: str) -> tuple[Prompt, int]:
    """One of the hops alone: a person and a first relation, or a bridge and a second one."""
    answer = FACTS[subject, relation] if subject in PEOPLE else TABLE[subject, relation]
    return _prompt(["<bos>", "the", relation, "of", subject, "is"], 4), TOKEN[answer]


def _prompt(text: list[str], entity: int) -> Prompt:
    ids = [TOKEN[word] for word in text]
    return Prompt.from_tokens(ids, {"entity": [entity], "last": [len(ids) - 1]}, tokens=text)
