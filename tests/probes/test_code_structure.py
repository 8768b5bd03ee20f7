"""CAT score on hand-made trees, planted attention, and attention that only looks at near tokens."""

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import interp
from interp.models.model import Model
from interp.models.offsets import char_spans
from probes import code_structure as code
from probes.syntax_tree import parse

SOURCE = '''def area(width, height=scale):
    # a comment with width in it
    total = width * height
    rows = [total + cell for cell in width.cells if cell > 2]
    return max(rows, total=total)

def other(width):
    total = width
    return total
'''


def test_leaves_are_the_tokens_of_the_language_at_their_characters():
    tree = parse(SOURCE)
    assert all(SOURCE[leaf.start : leaf.stop] == leaf.text for leaf in tree.leaves)
    texts = [leaf.text for leaf in tree.leaves]
    assert "".join(texts) == "".join(
        line.split("#")[0] for line in SOURCE.splitlines()).replace(" ", "")
    assert texts[:5] == ["def", "area", "(", "width", ","]
    # Characters, not bytes.
    accents = "naïve = 'é𝄞' + b"
    assert [accents[x.start : x.stop] for x in parse(accents).leaves][-1] == "b"


def test_variables_are_linked_within_their_function_and_attributes_are_none():
    tree = parse(SOURCE)
    linked = [(tree.leaves[a], tree.leaves[b]) for a, b in tree.flow]
    assert all(a.text == b.text and a.start < b.start for a, b in linked)
    second = SOURCE.index("def other")
    for a, b in linked:
        assert (a.start < second) == (b.start < second), a
    count = {name: sum(a.text == name for a, _ in linked) for name in
             ("width", "total", "cell", "cells", "rows", "height", "scale")}
    # total: = * (use in the list, argument; the keyword's name is none) and twice in the other.
    assert count == {"width": 2 + 1, "total": 2 + 1, "cell": 2, "cells": 0, "rows": 1, "height": 1,
                     "scale": 0}


def test_attributes_and_names_of_arguments_are_no_variables():
    assert parse("a.b + c.b").flow == () and parse("f(b=1, c=g(b=2))").flow == ()
    assert len(parse("b.a + b.c").flow) == 1


def test_the_same_name_in_an_inner_scope_is_another_variable():
    tree = parse("x = 1\ny = [x for x in z]\nw = x")
    flow = {tuple(tree.leaves[i].start for i in edge) for edge in tree.flow}
    first, inside, bound, last = (i for i in range(30) if "x = 1\ny = [x for x in z]\nw = x"[i:i + 1]
                                  == "x")
    assert flow == {(first, last), (inside, bound)}


def test_distances_are_shortest_paths_by_hand():
    tree = parse("f(a, b)")
    # Leaves: f ( a , b ); a call holds f and an argument list that holds the other five.
    plain = code.distances(tree, adjacent=False, data_flow=False)
    expected = np.full((6, 6), 2.0) - 2 * np.eye(6)
    expected[0, 1:] = expected[1:, 0] = 3
    assert np.array_equal(plain, expected)
    near = code.distances(tree, data_flow=False)
    assert (np.diagonal(near, 1) == 1).all() and near[0, 5] == 3 and near[1, 5] == 2
    again = parse("a = b\nc = d\ne = b")
    without = code.distances(again, data_flow=False)
    joined = code.distances(again)
    (edge,) = again.flow
    assert joined[edge] == 1 < without[edge] and (joined <= without).all()


def naive_score(a, d):
    high, low, both, either = np.quantile(a, 0.75), np.quantile(d, 0.25), 0, 0
    for x, y in zip(a.ravel(), d.ravel()):
        both += x > high and y < low
        either += x > high or y < low
    return both / either


def test_the_score_is_the_quotient_of_strict_masks():
    rng = np.random.default_rng(0)
    a, d = rng.random((11, 11)), rng.integers(0, 6, (11, 11)).astype(float)
    assert code.score(a, d) == pytest.approx(naive_score(a, d))
    assert np.isnan(code.score(np.ones((4, 4)), np.ones((4, 4))))  # nothing lies beyond a quantile
    big = rng.random((2, 400, 400))
    assert code.score(*big) == pytest.approx(1 / 7, abs=0.01)


def test_without_the_diagonal_only_pairs_of_leaves_count():
    near = code.token_distances(9)
    # With it, nothing but the diagonal lies strictly below a quarter, so that any map that peaks
    # there scores 1, and no permutation can tell.
    assert code.masks(-near, near)[1].sum() == 9 and code.compare(-near, near).z == 0
    over, under = code.masks(np.random.default_rng(0).random((9, 9)), near, 0.75, 0.5, diagonal=False)
    assert not np.diagonal(over).any() and not np.diagonal(under).any()
    assert over.sum() == 18 and under.sum() == 2 * (8 + 7)


@pytest.fixture(scope="module")
def tree():
    return parse(SOURCE)


def test_planted_attention_to_the_tree_beats_every_control(tree):
    d, rng = code.distances(tree), np.random.default_rng(1)
    planted = np.exp(-d) * rng.uniform(0.5, 1.5, d.shape)
    found = code.compare(planted, d)
    assert found.z > 8 and found.z_beyond_distance > 8 and found.beyond_distance > 0.1
    assert found.score > found.local + 0.1


def test_attention_to_near_tokens_beats_permuted_leaves_but_not_its_own_control(tree):
    d = code.distances(tree)
    near = code.token_distances(len(d))
    found = code.compare(np.exp(-near), d)
    assert found.z > 8  # what the paper has no control for
    assert found.z_beyond_distance == 0 and found.beyond_distance == pytest.approx(0)
    assert found.score == pytest.approx(found.local)
    noisy = code.compare(np.exp(-near) * np.random.default_rng(2).uniform(0.8, 1.25, d.shape), d)
    assert noisy.z > 8 and abs(noisy.z_beyond_distance) < 3
    nothing = code.compare(np.random.default_rng(3).random(d.shape), d)
    assert abs(nothing.z) < 3 and abs(nothing.z_beyond_distance) < 3


def test_permutations_keep_what_they_say():
    rng = np.random.default_rng(0)
    a = rng.random((7, 7))
    moved = code.along_diagonals(a, rng)
    for offset in range(-6, 7):
        assert sorted(np.diagonal(moved, offset)) == sorted(np.diagonal(a, offset))
    assert not np.array_equal(moved, a)
    other = code.permuted(a, rng)
    assert sorted(np.diagonal(other)) == sorted(np.diagonal(a)) and not np.array_equal(other, a)


def test_leaf_attention_is_a_mean_over_pairs_of_tokens():
    a = torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0))
    tokens = [[0], [2, 3], [5, 1]]
    made = code.leaf_attention(a, tokens)
    for head in range(2):
        for i, rows in enumerate(tokens):
            for j, columns in enumerate(tokens):
                assert made[head, i, j] == pytest.approx(
                    np.mean([float(a[head, r, c]) for r in rows for c in columns]))
    with pytest.raises(interp.core.OutOfRange, match="leaf 1"):
        code.leaf_attention(a, [[0], []])


def test_types_of_leaves_are_ranked_by_how_often_they_get_high_attention(tree):
    kinds = np.array([leaf.type for leaf in tree.leaves])
    a = np.random.default_rng(0).random((len(kinds),) * 2) * 0.1
    a[kinds == ":", :] += 1
    assert code.frequent_types([a], [tree])[0] == ":"
    # A type that occurs once per sample does not count.
    assert "integer" not in code.frequent_types([a], [tree], top=99)


@pytest.fixture(scope="module")
def minilm():
    return interp.open_model("all-minilm-l6-v2")


def test_tokens_are_found_by_offsets_and_a_model_is_measured(minilm):
    model = minilm
    source = "def in_int(int_in):\n    return int_in + in_int(int_in)\n"
    prompt, tree = model.prompt(source), parse(source)
    spans = char_spans(model.tokenizer, source, prompt.ids)
    for leaf, own in zip(tree.leaves, code.leaf_tokens(tree, spans), strict=True):
        assert "".join(source[slice(*spans[t])] for t in own) == leaf.text
    found = code.measure(model, [source, SOURCE], layers=[5, 0], permutations=20)
    assert found["score"].dims == ("layer", "sample") and found["layer"].values.tolist() == [5, 0]
    pattern = model.run(prompt, read="pattern.0", logits="none").reads["pattern.0"].values[0, 0]
    expected = code.score(code.leaf_attention(pattern.mean(0), code.leaf_tokens(tree, spans)),
                          code.distances(tree))
    assert float(found["score"].sel(layer=0)[0]) == pytest.approx(expected)
    assert np.isfinite(found["z_beyond_distance"].values).all()


def letters():
    raw = Tokenizer(models.WordLevel({x: i for i, x in enumerate("?^ab=+*()")}, "?"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    raw.post_processor = processors.TemplateProcessing(single="^ $A", special_tokens=[("^", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="?", bos_token="^")


def test_a_causal_model_is_read_in_both_directions_and_large_maps_in_parts(tiny, monkeypatch):
    model = Model(tiny("llama"), "llama", tokenizer=letters())
    whole = code.measure(model, ["a=b+(a*b)"], permutations=3)
    monkeypatch.setattr(code, "LARGEST", 1)
    assert code.measure(model, ["a=b+(a*b)"], permutations=3).data.equals(whole.data)
    rows = model.run(model.prompt("a=b+(a*b)"), read="pattern.1").reads["pattern.1"].values[0, 0]
    a = rows.mean(0)[1:, 1:]
    tree = parse("a=b+(a*b)")
    assert len(a) == len(tree.leaves)
    expected = code.score((a + a.T).astype(float), code.distances(tree))
    assert float(whole["score"].sel(layer=1)[0]) == pytest.approx(expected)


@pytest.mark.parametrize("bad, words", [("def f(:\n", "does not parse as python, from line 1"),
                                        ("# only a comment", "no tokens")])
def test_bad_code_is_one_sentence(bad, words):
    with pytest.raises(ValueError, match=words):
        parse(bad)


def test_bad_input_is_one_sentence(monkeypatch, minilm):
    with pytest.raises(ValueError, match="'python' only, not for 'cobol'"):
        parse("a", "cobol")
    with pytest.raises((ValueError, TypeError)):
        code.score(np.ones((3, 3)), np.ones((4, 4)))
    with pytest.raises(ValueError, match="not numbers"):
        code.score(np.full((3, 3), np.nan), np.ones((3, 3)))
    with pytest.raises(interp.core.PromptError, match="no code"):
        code.measure(minilm, [])
    import sys

    from probes import syntax_tree

    monkeypatch.setitem(sys.modules, "tree_sitter", None)
    syntax_tree._parser.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"undertow\[probes\]"):
        parse("a")
    syntax_tree._parser.cache_clear()
