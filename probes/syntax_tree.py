"""Syntax trees of code with tree-sitter: leaves, edges, and which occurrences are one variable."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

Edge = tuple[int, int]

SCOPES = {"function_definition", "lambda", "list_comprehension", "set_comprehension",
          "dictionary_comprehension", "generator_expression"}
"""Nodes of Python inside which names can be bound of their own. (A class body is left out: its
names are not seen from its methods.)"""


@dataclass(frozen=True)
class Leaf:
    """A token of the language: its text, its type in the grammar, its characters [start, stop)."""

    text: str
    type: str
    start: int
    stop: int


@dataclass(frozen=True)
class CodeTree:
    """A parsed piece of code.

    Nodes are numbered, leaves first and in order; `edges` are those of the tree, `adjacent` join
    neighboring leaves, `flow` joins successive occurrences of a variable.
    """

    leaves: tuple[Leaf, ...]
    n_nodes: int
    edges: tuple[Edge, ...]
    flow: tuple[Edge, ...]

    @property
    def adjacent(self) -> tuple[Edge, ...]:
        """Leaves that follow each other."""
        return tuple(pairwise(range(len(self.leaves))))


def parse(source: str, language: str = "python") -> CodeTree:
    """The syntax tree of a piece of code, comments left out.

    Example:
        >>> tree = parse("total = total + x.total  # sum")
        >>> [leaf.text for leaf in tree.leaves], tree.flow
        (['total', '=', 'total', '+', 'x', '.', 'total'], ((0, 2),))

    An attribute or the name of a keyword argument is no variable. A function's parameters and what is
    assigned in it are its own variables.

    Raises:
        ModuleNotFoundError: without the extra `probes`.
        ValueError: code that does not parse, code without leaves, or another language than Python.
    """
    parser, text = _parser(language), source.encode()
    root = parser.parse(text).root_node
    if root.has_error:
        raise ValueError(f"the code does not parse as {language}, from line "
                         f"{_first_error(root)} on: {source[:40]!r}.")
    # Offsets of tree-sitter are bytes; those of tokenizers are characters.
    place = _characters(source, len(text))
    nodes = [node for node in _walk(root) if node.type != "comment"]
    found = [node for node in nodes if not node.children and node.end_byte > node.start_byte]
    if not found:
        raise ValueError(f"the code has no tokens: {source[:40]!r}.")
    number = {node.id: i for i, node in enumerate(found)}
    for node in nodes:
        if node.id not in number and node.children:
            number[node.id] = len(number)
    edges = tuple((number[node.id], number[node.parent.id]) for node in nodes
                  if node.id in number and node.parent is not None)
    leaves = tuple(Leaf(text[n.start_byte : n.end_byte].decode(), n.type, place[n.start_byte],
                        place[n.end_byte]) for n in found)
    return CodeTree(leaves, len(number), edges, _flow(found))


@cache
def _parser(language: str) -> Any:
    if language != "python":
        raise ValueError(f"there is a grammar for 'python' only, not for {language!r}.")
    try:
        import tree_sitter
        import tree_sitter_python
    except ImportError:
        raise ModuleNotFoundError(
            "syntax trees need tree-sitter: install the extra, pip install 'undertow[probes]'."
        ) from None
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_python.language()))


def _walk(node: Any) -> Iterator[Any]:
    """All nodes in the order of the text, without recursion: code can be nested deeply."""
    waiting = [node]
    while waiting:
        one = waiting.pop()
        yield one
        waiting.extend(reversed(one.children))


def _first_error(root: Any) -> int:
    rows = [n.start_point[0] for n in _walk(root) if n.type == "ERROR" or n.is_missing]
    return min(rows, default=0) + 1


def _characters(source: str, n_bytes: int) -> list[int]:
    """The character in which each byte lies, and one past the end."""
    place = [i for i, character in enumerate(source) for _ in character.encode()]
    return [*place, len(source)] if len(place) == n_bytes else list(range(n_bytes + 1))


def _flow(leaves: list[Any]) -> tuple[Edge, ...]:
    bound: dict[int, set[str]] = {}
    for leaf in leaves:
        scope = _binding_scope(leaf)
        if scope is not None:
            bound.setdefault(scope, set()).add(leaf.text.decode())
    last: dict[tuple[int, str], int] = {}
    edges = []
    for i, leaf in enumerate(leaves):
        if not _is_variable(leaf):
            continue
        name = leaf.text.decode()
        owner = next((scope for scope in _scopes(leaf) if name in bound.get(scope, ())), 0)
        if (owner, name) in last:
            edges.append((last[owner, name], i))
        last[owner, name] = i
    return tuple(edges)


def _is_variable(leaf: Any) -> bool:
    if leaf.type != "identifier":
        return False
    above = leaf.parent
    if above.type == "attribute":
        return above.child_by_field_name("attribute").id != leaf.id
    if above.type == "keyword_argument":
        return above.child_by_field_name("name").id != leaf.id
    return True


def _scopes(leaf: Any) -> list[int]:
    """Ids of the scopes around a leaf, innermost first; a function's name is outside of it."""
    found, below, node = [], leaf, leaf.parent
    while node is not None:
        own_name = node.child_by_field_name("name")
        if node.type in SCOPES and (own_name is None or own_name.id != below.id):
            found.append(node.id)
        below, node = node, node.parent
    return found


def _binding_scope(leaf: Any) -> Any:
    """The scope in which a leaf binds its name, None where it only uses it or binds it outside."""
    if not _is_variable(leaf):
        return None
    scopes, below, node = _scopes(leaf), leaf, leaf.parent
    while node is not None and scopes:
        if node.type in ("parameters", "lambda_parameters"):
            return scopes[0]
        # A default value or an annotation of a parameter is no binding.
        if node.type in ("default_parameter", "typed_default_parameter", "typed_parameter"):
            name = node.child_by_field_name("name") or node.children[0]
            if name.id != below.id:
                return None
        if node.type in ("assignment", "augmented_assignment", "for_statement", "for_in_clause"):
            target = node.child_by_field_name("left")
            return scopes[0] if target is not None and target.id == below.id else None
        if node.type in ("subscript", "attribute", "call", "block"):
            return None
        below, node = node, node.parent
    return None
