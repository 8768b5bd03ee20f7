"""CAT score: does attention between the tokens of code go where the syntax tree is near?

Paper     arXiv:2210.04633
Question  Do leaves that attend to each other lie close in the tree of the code?
Measure   share of the cells with high attention or a short path that have both
Cause     none; two nulls instead: leaves permuted, and attention permuted among the cells of equal
          token distance, which keeps whatever only looks at near tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import shortest_path
from torch import Tensor

from interp.core import OutOfRange, Prompt, PromptError, Result
from interp.figures import layer_curve
from interp.models.offsets import Span, char_spans, tokens_in
from probes.syntax_tree import CodeTree, parse

Cells = Float[np.ndarray, "leaf leaf"]
LARGEST = 2**28
"""Bytes of attention that are read at a time."""


def distances(tree: CodeTree, *, adjacent: bool = True, data_flow: bool = True) -> Cells:
    """Shortest paths between leaves in the tree with further edges (U-AST), in edges.

    Example:
        >>> distances(parse("a = a"))
        array([[0., 1., 1.],
               [1., 0., 1.],
               [1., 1., 0.]])

    Args:
        adjacent: edges between leaves that follow each other.
        data_flow: edges between successive occurrences of a variable.
    """
    edges = [*tree.edges, *(tree.adjacent if adjacent else ()), *(tree.flow if data_flow else ())]
    size, n = tree.n_nodes, len(tree.leaves)
    if not edges:
        return np.zeros((n, n))
    rows, columns = np.array(edges).T
    graph = coo_matrix((np.ones(len(edges)), (rows, columns)), (size, size)).tocsr()
    # Edges that are there twice count once.
    graph.data[:] = 1.0
    return shortest_path(graph, directed=False, unweighted=True, indices=np.arange(n))[:, :n]


def token_distances(n: SupportsIndex) -> Cells:
    """|i - j|: what attention that only looks at near tokens agrees with."""
    return np.abs(np.subtract.outer(np.arange(float(int(n))), np.arange(float(int(n)))))


def masks(
    attention: Cells, distance: Cells, high: SupportsFloat = 0.75, low: SupportsFloat = 0.25,
    *, diagonal: bool = True,
) -> tuple[Bool[np.ndarray, "leaf leaf"], Bool[np.ndarray, "leaf leaf"]]:
    """Cells above the quantile `high` of attention, and below the quantile `low` of distance.

    Both are strict, as in the released code: distances are small whole numbers with many ties, so
    that far fewer than a share `low` of the cells can lie below. The `diagonal`, where every distance
    is zero, belongs to them in the released code; without it, quantiles are those of the other cells.
    """
    a, d = np.asarray(attention, dtype=float), np.asarray(distance, dtype=float)
    if a.shape != d.shape or a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"attention {a.shape} and distances {d.shape}: give one square of both.")
    if not np.isfinite(a).all():
        raise ValueError("attention holds values that are not numbers; recompute it in float32.")
    cells = np.ones_like(a, bool) if diagonal or len(a) < 2 else ~np.eye(len(a), dtype=bool)
    over, under = a > np.quantile(a[cells], float(high)), d < np.quantile(d[cells], float(low))
    return over & cells, under & cells


def score(
    attention: Cells, distance: Cells, high: SupportsFloat = 0.75, low: SupportsFloat = 0.25,
    *, diagonal: bool = True,
) -> float:
    """CAT score of one sample: |both| / |either|; NaN where no cell is in either mask.

    Example:
        >>> near = token_distances(9)
        >>> score(-near, near), round(score(near, near), 2)
        (1.0, 0.0)

    Two masks of a quarter each that have nothing to do with each other score about 1/7.

    Source: arXiv:2210.04633, released code.
    """
    one, other = masks(attention, distance, high, low, diagonal=diagonal)
    either = int((one | other).sum())
    return float((one & other).sum() / either) if either else float("nan")


def permuted(attention: Cells, rng: np.random.Generator) -> Cells:
    """The same attention between leaves in another order: nothing of the tree is left."""
    order = rng.permutation(len(attention))
    return np.asarray(attention)[np.ix_(order, order)]


def along_diagonals(attention: Cells, rng: np.random.Generator) -> Cells:
    """Attention permuted among the cells of equal offset: what depends on the offset alone stays.

    Example:
        >>> near = token_distances(5)
        >>> bool((along_diagonals(near, np.random.default_rng(0)) == near).all())
        True
    """
    given = np.asarray(attention)
    made, n = np.empty_like(given), len(given)
    for offset in range(-n + 1, n):
        values = rng.permutation(np.diagonal(given, offset))
        rows = np.arange(max(0, -offset), max(0, -offset) + len(values))
        made[rows, rows + offset] = values
    return made


@dataclass(frozen=True)
class Compared:
    """A CAT score with what it must beat.

    `permuted` are scores with leaves permuted, `diagonal` with attention permuted among cells of
    equal token distance, `local` is the score of attention that only falls with the token distance,
    and `token_distance` that of this attention with |i - j| in the place of the tree.
    """

    score: float
    permuted: Float[np.ndarray, "permutation"] = field(repr=False)
    diagonal: Float[np.ndarray, "permutation"] = field(repr=False)
    local: float = float("nan")
    token_distance: float = float("nan")

    @property
    def z(self) -> float:
        """Standard deviations above permuted leaves; NaN where these do not vary."""
        return _z(self.score, self.permuted)

    @property
    def z_beyond_distance(self) -> float:
        """Standard deviations above equal token distances; 0 where nothing but these matters."""
        return _z(self.score, self.diagonal)

    @property
    def beyond_distance(self) -> float:
        """The score less its mean at equal token distances."""
        return self.score - float(np.mean(self.diagonal))


def _z(value: float, null: np.ndarray) -> float:
    spread = float(np.std(null, ddof=1)) if len(null) > 1 else 0.0
    gap = value - float(np.mean(null))
    if spread <= 1e-12:
        return 0.0 if abs(gap) <= 1e-12 else float("nan")
    return gap / spread


def compare(
    attention: Cells, distance: Cells, *, permutations: SupportsIndex = 100,
    seed: SupportsIndex = 0, high: SupportsFloat = 0.75, low: SupportsFloat = 0.25,
    diagonal: bool = True, places: Optional[Int[np.ndarray, "leaf"]] = None,
) -> Compared:
    """The CAT score of one sample beside its two nulls and its two controls.

    Example:
        >>> near = token_distances(25)
        >>> found = compare(-near, near)
        >>> found.z > 5, found.z_beyond_distance
        (True, 0.0)

    Args:
        places: where each leaf stands among all leaves, where some have been left out.

    Source: arXiv:2210.04633 for the score; nulls and controls are the toolkit's.
    """
    rng = np.random.default_rng(int(seed))

    def scored(a: Cells, d: Cells) -> float:
        return score(a, d, high, low, diagonal=diagonal)

    at = np.arange(len(attention)) if places is None else np.asarray(places)
    near = np.abs(np.subtract.outer(at, at)).astype(float)
    times = range(int(permutations))
    free = [scored(permuted(attention, rng), distance) for _ in times]
    tied = [scored(along_diagonals(attention, rng), distance) for _ in times]
    return Compared(scored(attention, distance), np.array(free), np.array(tied),
                    scored(-near, distance), scored(attention, near))


# -- leaves and tokens ----------------------------------------------------------------------------


def leaf_attention(
    attention: Union[Float[Tensor, "*head query key"], Float[np.ndarray, "*head query key"]],
    tokens: Sequence[Sequence[SupportsIndex]],
) -> Float[np.ndarray, "*head leaf leaf"]:
    """Attention between leaves: the mean over all pairs of their tokens.

    Example:
        >>> leaf_attention(np.arange(9.0).reshape(3, 3), [[0], [1, 2]]).tolist()
        [[0.0, 1.5], [4.5, 6.0]]

    Args:
        tokens: positions of the tokens of each leaf, as `leaf_tokens` gives them.

    Raises:
        OutOfRange: a leaf without a token, or a position that the map does not have.
    """
    maps = np.asarray(attention, dtype=float)
    n = maps.shape[-1]
    pool = np.zeros((len(tokens), n))
    for leaf, own in enumerate(tokens):
        places = [int(p) for p in own]
        if not places or min(places) < 0 or max(places) >= n:
            raise OutOfRange(f"leaf {leaf} has the tokens {places}, of {n}: leave it out.")
        pool[leaf, places] = 1 / len(places)
    return pool @ maps @ pool.T


def leaf_tokens(tree: CodeTree, spans: Sequence[Span]) -> list[tuple[int, ...]]:
    """The tokens that share a character with each leaf, by offsets; empty for one cut off."""
    return [tokens_in(spans, leaf.start, leaf.stop) for leaf in tree.leaves]


def frequent_types(
    attentions: Sequence[Cells], trees: Sequence[CodeTree], top: SupportsIndex = 8,
    high: SupportsFloat = 0.75,
) -> tuple[str, ...]:
    """Types of leaves that most often lie in cells of high attention, best first.

    Only types that occur more than once per sample on average count. Choose them on other samples
    than those that are scored.

    Source: arXiv:2210.04633, released code.
    """
    hits: dict[str, float] = {}
    count: dict[str, int] = {}
    for attention, tree in zip(attentions, trees, strict=True):
        a = np.asarray(attention)
        over = a > np.quantile(a, float(high))
        share = 0.5 * (over.mean(0) + over.mean(1))
        for leaf, value in zip(tree.leaves, share, strict=True):
            hits[leaf.type] = hits.get(leaf.type, 0.0) + float(value)
            count[leaf.type] = count.get(leaf.type, 0) + 1
    often = [kind for kind in count if count[kind] > len(trees)]
    return tuple(sorted(often, key=lambda kind: (-hits[kind] / count[kind], kind))[: int(top)])


# -- in a model -----------------------------------------------------------------------------------


def measure(
    model: Any,
    sources: Sequence[str],
    *,
    language: str = "python",
    layers: Optional[Sequence[SupportsIndex]] = None,
    types: Optional[Sequence[str]] = None,
    diagonal: bool = True,
    permutations: SupportsIndex = 100,
    seed: SupportsIndex = 0,
) -> Result:
    """CAT score of every layer's mean attention on pieces of code, with nulls and controls.

    Example:
        >>> import interp
        >>> found = measure(interp.open_model("all-minilm-l6-v2"), ["a = b + a * b"], layers=[0],
        ...                 permutations=5)
        >>> found["score"].dims
        ('layer', 'sample')

    Args:
        sources: pieces of code that parse, short enough for the model.
        layers: block numbers from 0; all for None.
        types: leaves to keep, such as `frequent_types` of other samples; all for None.
        diagonal: whether a leaf's attention to itself counts, as in the released code; see `masks`.

    Returns:
        `[layer, sample]`: `score`, `z` (permuted leaves), `z_beyond_distance` and `beyond_distance`
        (cells of equal token distance permuted), `local`, `token_distance`; see `Compared`. The
        manifest says how many leaves were left out for having no token of their own. In a causal
        model, which attends backwards only, attention is that of both directions together.

    Raises:
        PromptError: no tokenizer, or code whose characters cannot be told from its tokens.
        ValueError: code that does not parse.
    """
    if model.tokenizer is None:
        raise PromptError(f"{model.name} has no tokenizer, so it cannot be given code.")
    if not len(sources):
        raise PromptError("no code to measure: give at least one piece.")
    blocks = [int(x) for x in (range(model.n_layers) if layers is None else layers)]
    names = ("score", "z", "z_beyond_distance", "beyond_distance", "local", "token_distance")
    table = np.full((len(names), len(blocks), len(sources)), np.nan)
    left_out = 0
    for sample, source in enumerate(sources):
        tree = parse(source, language)
        prompt = model.prompt(source)
        spans = char_spans(model.tokenizer, source, prompt.ids)
        if spans is None:
            raise PromptError(f"the tokenizer of {model.name} does not give back sample {sample}.")
        tokens = leaf_tokens(tree, spans)
        kept = [i for i, own in enumerate(tokens)
                if own and (types is None or tree.leaves[i].type in types)]
        left_out += sum(not own for own in tokens)
        if len(kept) < 3:
            continue
        distance = distances(tree)[np.ix_(kept, kept)]
        for row, attention in enumerate(_mean_attention(model, prompt, blocks)):
            a = leaf_attention(attention, [tokens[i] for i in kept])
            if model.kind == "decoder":
                a = a + a.T
            one = compare(a, distance, permutations=permutations, seed=int(seed) + sample,
                          diagonal=diagonal, places=np.array(kept))
            table[:, row, sample] = [getattr(one, name) for name in names]
    data = xr.Dataset({name: (("layer", "sample"), values) for name, values in zip(names, table)},
                      {"layer": blocks})
    return Result(data, {**model.manifest(), "measure": "CAT score", "language": language,
                         "types": None if types is None else list(types), "leaves left out": left_out,
                         "diagonal": diagonal, "permutations": int(permutations), "seed": int(seed),
                         "n_samples": len(sources), "layer_convention": "blocks from 0"})


def _mean_attention(model: Any, prompt: Prompt, blocks: Sequence[int]) -> list[np.ndarray]:
    """Attention of every block, mean over heads; no more at a time than fits."""
    each = max(1, LARGEST // (4 * model.n_heads * len(prompt) ** 2))
    found = []
    for first in range(0, len(blocks), each):
        asked = [f"pattern.{layer}" for layer in blocks[first : first + each]]
        reads = model.run(prompt, read=asked, logits="none").reads
        found += [reads[site].values[0, 0].mean(0) for site in asked]
    return found


def draw(found: Result, ax: Axes) -> Axes:
    """CAT score by layer; in gray what attention to near tokens alone would score."""
    curves = {"attention": found["score"], "near tokens only": found["local"],
              "equal distances permuted": found["score"] - found["beyond_distance"]}
    curves = {name: values.transpose("sample", "layer") for name, values in curves.items()}
    return layer_curve.draw(ax, curves, label="CAT score", roles={
        "near tokens only": "control", "equal distances permuted": "control"})
