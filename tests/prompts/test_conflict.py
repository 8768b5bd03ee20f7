"""Conflicts and counterfactual pairs: aligned token by token, answers that can be told apart."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from interp.core import Prompt, PromptError
from interp.models.prompting import build
from interp.prompts.conflict import (
    FORMATS,
    RELATIONS,
    Conflict,
    Relation,
    closed_book,
    conflicts,
    split,
)
from interp.prompts.counterfactual import Pair, check_aligned, corrupted, fill, misaligned


class Parts:
    """What `build` needs of a model."""

    processor, config, name, max_positions, has_images = None, None, "toy", None, False

    def __init__(self, letters=False):
        text = " ".join([w for r in RELATIONS.values() for w in (
            r.question, r.statement, r.coherent, *r.facts, *r.facts.values())])
        if letters:
            # Every letter a token, with the blank before it: words differ in length.
            pairs = {a + b for a in ("", " ") for b in set(text)}
            vocabulary = {c: i for i, c in enumerate(["[U]", *sorted(pairs)])}
            raw = Tokenizer(models.WordLevel(vocabulary, "[U]"))
            raw.pre_tokenizer = pre_tokenizers.Split(Regex(" ?."), "isolated")
        else:
            words = sorted({w for part in text.split() for w in (part, *part.split("."))} - {""})
            vocabulary = {w: i for i, w in enumerate(["[U]", ".", ":", *words])}
            raw = Tokenizer(models.WordLevel(vocabulary, "[U]"))
            raw.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[U]")

    def prompt(self, text, segments=None):
        return build(self, text, segments=segments)


@pytest.fixture(scope="module", params=[False, True], ids=["words", "letters"])
def parts(request):
    return Parts(request.param)


def test_conflicts_are_aligned_whatever_a_token_is(parts):
    made = conflicts(parts.prompt, np.random.default_rng(1), ("capital", "language"), per_relation=5)
    assert len(made) == 5 * 2 * len(FORMATS)

    def bare(ids):
        return parts.tokenizer.decode(ids).replace(" ", "")

    for case in made:
        check_aligned([case.clean], [case.corrupt])
        differing = Pair(case.clean, case.corrupt).differing
        named = {p for s in case.clean.segments if s.name.split("_")[0] in ("subject", "object")
                 for p in s.positions}
        # Nothing but subject and stated answer may differ (a word may share letters with another).
        assert differing and set(differing) <= named
        assert case.memory[0] != case.context[0]
        facts = RELATIONS[case.relation].facts
        assert bare(case.memory) == facts[case.subject].replace(" ", "")
        assert bare(case.context) in {w.replace(" ", "") for w in facts.values()} - {bare(case.memory)}
        stated = [bare([case.clean.ids[p] for p in s.positions]) for s in case.clean.segments
                  if s.name.startswith("object")]
        wanted = {"none": 0, "substitution": 1}.get(case.format)
        assert set(stated) <= {bare(case.context)} and len(stated) == (wanted if wanted is not None
                                                                       else len(stated))
        assert len(stated) >= (case.format == "coherent")
        # The twin points to neither answer.
        twin = bare(case.corrupt.ids)
        assert bare(case.context) not in twin and bare(case.memory) not in twin
        assert bare(case.clean.ids).endswith(bare(case.closed_book.ids))
        assert case.format != "none" or case.clean.ids == case.closed_book.ids


def test_the_same_fact_in_every_format(parts):
    made = conflicts(parts.prompt, np.random.default_rng(2), ("currency",), per_relation=4)
    for start in range(0, len(made), 3):
        three = made[start : start + 3]
        assert [c.format for c in three] == list(FORMATS)
        assert len({(c.subject, c.memory, c.context) for c in three}) == 1
    assert conflicts(parts.prompt, np.random.default_rng(2), ("currency",), per_relation=4)[0] \
        .clean.ids == made[0].clean.ids


def test_answers_that_begin_alike_are_never_paired(parts):
    relation = Relation("The capital of {subject} is", "The capital of {subject} is {object}.", "x",
                        {"France": "North America", "Egypt": "North America"})
    with pytest.raises(PromptError, match="no fact of relation 'a'"):
        conflicts(parts.prompt, np.random.default_rng(0), {"a": relation}, ("none",))
    with pytest.raises(PromptError, match="cannot tell them apart"):
        one = Prompt.from_tokens([1, 2])
        Conflict(one, one, one, (3, 4), (3, 5))
    with pytest.raises(PromptError, match="there is no relation 'moon'"):
        conflicts(parts.prompt, np.random.default_rng(0), ("moon",))
    with pytest.raises(PromptError, match="there is no format 'rude'"):
        conflicts(parts.prompt, np.random.default_rng(0), formats=("rude",))


def test_parts_share_no_subject(parts):
    made = conflicts(parts.prompt, np.random.default_rng(1), ("capital", "language"), per_relation=6)
    dev, test = split(made, np.random.default_rng(0))
    assert len(dev) == len(test) == len(made) / 2
    keys = [{(c.relation, c.subject) for c in part} for part in (dev, test)]
    assert not keys[0] & keys[1] and {r for r, _ in keys[0]} == {"capital", "language"}


def test_closed_book_asks_without_the_context():
    class Parrot:
        asked = []

        def generate(self, prompts, new_tokens):
            self.asked += [p.ids for p in prompts]
            return [[7] * new_tokens for _ in prompts]

    one, long = Prompt.from_tokens([1, 5, 8, 2, 5]), Prompt.from_tokens([1, 6, 9, 2, 6])
    cases = [Conflict(one, long, Prompt.from_tokens([2, 5]), memory, (8,), format=kind)
             for memory in ((7,), (7, 7), (7, 9)) for kind in FORMATS]
    model = Parrot()
    assert closed_book(model, cases) == [True] * 6 + [False] * 3
    # Each question is asked once, though it comes in three formats.
    assert model.asked == [(2, 5)] * 3


# -- pairs ----------------------------------------------------------------------------------------


def test_misaligned_segments_are_seen():
    a = Prompt.from_tokens([1, 2, 3, 4], {"subject": (1, 2), "only here": (0, 1)})
    assert misaligned(a, Prompt.from_tokens([1, 7, 3, 4], {"subject": (1, 2)})) is None
    assert "'subject'" in misaligned(a, Prompt.from_tokens([1, 7, 8, 4], {"subject": (1, 3)}))
    with pytest.raises(PromptError, match="prompt 1 and its corrupted twin"):
        check_aligned([a, a], [a, Prompt.from_tokens([1])])


def test_places_are_found_even_where_the_word_stands_elsewhere(parts):
    # "is" is a word of the template, too: the segment is the filled place.
    made = fill(parts.prompt, "the capital is {object} . {object} is", {"object": "is"})
    words = [s for s in made.segments if s.name.startswith("object")]
    starts = [made.tokens[s.start] for s in words]
    assert [s.name for s in words] == ["object", "object_1"] and len(set(starts)) == 1
    text = "the capital is is . is is"
    if len(made) == len(text.split()):
        assert [s.positions for s in words] == [(3,), (5,)]
    with pytest.raises(PromptError, match="'subject'"):
        fill(parts.prompt, "of {subject}", {})


def test_the_first_aligned_candidate_is_taken_and_no_more_are_made():
    clean, made = Prompt.from_tokens([1, 2, 3]), []

    def candidate(ids):
        def make():
            made.append(ids)
            return Prompt.from_tokens(ids)
        return make

    rows = [[1, 2], [1, 2, 3], [1, 5, 3], [1, 6, 3]]
    assert corrupted(clean, map(candidate, rows)).ids == (1, 5, 3)
    assert made == rows[:3]
    assert corrupted(clean, map(candidate, rows[:2])) is None
