"""Where the sites of a model are in nnsight's terms: found by traces, checked by recomputing.

nnsight names the operations inside a module's forward by position ("attention_interface_1" is the
call, "attention_interface_0" its lookup), so no name is taken on trust: the operation that attends
is the one that is given q, k and v and whose output our own attention gives as well. The other
sites are found by the same equations as in lane "hf" (docs/decisions/0011-nnsight-sites.md).
"""

import contextlib
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn

from interp.core.errors import ModelRefused, SiteRefused
from interp.models import attention as attend
from interp.models.attention_mask import DenseMask, LazyMask
from interp.models.edits import Pass
from interp.models.nnsight_shipped import arguments
from interp.models.sites import Block, first_tensor, hidden_input, solve

ORDER = ("resid_pre", "attention", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post")


@dataclass(frozen=True)
class Call:
    """The operation of an attention module that attends: its name, and what it gives back."""

    name: str
    wrapped: bool = True  # a tuple whose first entry is the output
    head_last: bool = True  # [batch, query, head, d_head], not [batch, head, query, d_head]

    def output(self, z: Tensor) -> Any:
        """`z` `[batch, query, head, d_value]` as the operation would give it."""
        z = z if self.head_last else z.transpose(1, 2)
        return (z, None) if self.wrapped else z


@dataclass(frozen=True)
class Given:
    """What the attending operation was given."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Optional[Tensor]
    more: Mapping[str, Any]


def load() -> Any:
    """nnsight, without the `.save` that importing it adds to every object of the process."""
    fresh = "nnsight" not in sys.modules
    found = importlib.import_module("nnsight")
    found.register("interp.models.nnsight_shipped")
    if fresh:
        from nnsight._c import unmount

        if unmount is not None:
            with contextlib.suppress(Exception):
                unmount("save")
    return found


def wrap(hf: nn.Module) -> Any:
    """nnsight's view of a model; its forward functions are replaced, so hand it a copy."""
    nnsight = load()
    with warnings.catch_warnings():
        # BERT's modules called "output" are reached under another name.
        warnings.filterwarnings("ignore", message="Module '.*' has a submodule named")
        return nnsight.NNsight(hf)


def given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Optional[Given]:
    """q, k, v and the mask among the arguments of an operation, None where they are not.

    They are its first three tensors with a head axis, and a fourth one over queries and keys.
    """
    four = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim == 4]
    if len(four) not in (3, 4):
        return None
    query, key, value = four[:3]
    if key.shape[:3] != value.shape[:3] or query.shape[::3] != key.shape[::3]:
        return None
    if query.shape[1] % key.shape[1]:
        return None
    mask = four[3] if len(four) == 4 else None
    after = max((i + 1 for i, x in enumerate(args) if x is value), default=len(args))
    masks = [*args[after : after + 1], kwargs.get("attention_mask")]
    if any(x is not None and x is not mask for x in masks):
        return None  # a mask of another kind (flex, flash), which cannot be looked into
    if mask is not None and (
        mask.shape[-2] != query.shape[2] or mask.shape[-1] < key.shape[2]
    ):
        return None
    more = {name: x for name, x in kwargs.items()
            if not any(x is one for one in four) and name != "attention_mask"}
    return Given(query, key, value, mask, more)


def with_masks(entry: tuple, masks: Sequence[Tensor]) -> tuple[list, dict[str, Any]]:
    """Arguments as `nnsight_shipped.arguments` packs them, shared masks in their places."""

    def back(x: Any) -> Any:
        return masks[x[1]] if isinstance(x, tuple) else x

    args, kwargs = entry
    return [back(x) for x in args], {name: back(x) for name, x in kwargs.items()}


def spelled(root: Any, path: str) -> str:
    """A path of nnsight's as attributes from the root; a module called "output" has another."""
    names, envoy = [], root
    for part in path.split(".")[1:]:
        child = envoy._child_map[part]
        names.append(part if envoy.__dict__.get(part) is child else envoy.OVERLOAD_PREFIX + part)
        envoy = child
    return ".".join(names)


class _OffsetMask(DenseMask):
    """A dense mask of which the first column may be a later key than 0."""

    def __init__(self, dense: Tensor, now: Pass, n_keys: int) -> None:
        super().__init__(dense[..., :n_keys], now.start)
        self.kv_offset = now.start + now.length - n_keys

    def __call__(self, row: int, queries: Tensor, keys: Tensor) -> Tensor:
        return super().__call__(row, queries, keys - self.kv_offset)


def mask_of(module: nn.Module, found: Given, now: Pass) -> LazyMask:
    """The mask that the model made itself, at absolute positions."""
    n_queries, n_keys = found.query.shape[2], found.key.shape[2]
    if found.mask is not None:
        return _OffsetMask(found.mask, now, n_keys)
    causal = found.more.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    window = found.more.get("sliding_window")
    plain = "full" if not causal else "window" if window else "causal"
    if plain == "causal" and n_queries == 1:
        plain = "full"
    end = now.start + now.length
    return LazyMask(None, n_queries, n_keys, now.start, end - n_keys, None, False, plain, window)


def attended(module: nn.Module, found: Given, now: Pass) -> Tensor:
    """`[batch, query, head, d_value]` by our own attention, with whatever session is open."""
    mask = mask_of(module, found, now)
    return attend._attend(module, found.query, found.key, found.value, mask, **found.more)[0]


class Explorer:
    """Finds blocks, ports and attention calls with a few traces of one short prompt.

    Args:
        root: nnsight's view of the model.
        open_trace: makes a trace of the prompt, to be used in a `with`; it may run elsewhere.
        open_scan: the same for shapes alone, without weights.
        n_layers: how many blocks the config announces.
        unchecked: whether to go on after an error of the trace that checks attention.
    """

    def __init__(
        self, root: Any, open_trace: Callable[[], Any], open_scan: Callable[[], Any],
        n_layers: int, unchecked: Callable[[Exception], bool] = lambda error: False,
    ) -> None:
        self.root, self.open_trace, self.open_scan = root, open_trace, open_scan
        self.unchecked = unchecked
        self.hf: nn.Module = root._module
        self.n_layers = n_layers
        self.envoys = {id(envoy._module): envoy for envoy in root.modules()}

    def find(self) -> tuple[list[Block], list[Call], list[tuple[str, ...]]]:
        """Blocks with their ports, the attention call of each, and the order of their sites.

        Raises `ModelRefused` where no operation of the model can be shown to attend.
        """
        kinds: dict[tuple, list[nn.Module]] = {}
        entries = self._entries()
        for entry in entries:
            kinds.setdefault(_signature(entry), []).append(entry)
        examples: dict[tuple, tuple[Block, list[str], tuple[str, ...]]] = {}
        for kind, members in kinds.items():
            found = self._attending(members[0])
            if found is not None:
                path, names = found
                block = Block(0, members[0], members[0].get_submodule(path))
                examples[kind] = (block, names, self._solved(block))
        blocks: list[Block] = []
        candidates: list[list[str]] = []
        orders: list[tuple[str, ...]] = []
        for entry in entries:
            # As in lane "hf", blocks without attention are not counted.
            if _signature(entry) in examples:
                example, names, order = examples[_signature(entry)]
                blocks.append(_transferred(example, entry, len(blocks)))
                candidates.append(names)
                orders.append(order)
        if not blocks:
            raise ModelRefused(
                f"no operation in the blocks of {type(self.hf).__name__} is given q, k and v "
                "(its modeling code has attention of its own); open it with lane='bridge'."
            )
        calls = [Call(names[0]) for names in candidates]
        try:
            calls = self._checked(blocks, candidates)
        except Exception as error:
            if not self.unchecked(error):
                raise
        return blocks, calls, orders

    def _recorded(self, modules: list[nn.Module]) -> tuple[dict[int, Any], dict[int, Any]]:
        """Inputs and outputs of modules in one pass: id of module -> value, in running order."""
        owner = {self.envoys[id(module)].path: id(module) for module in modules}
        watched = list(owner)
        with self.open_trace() as tracer:
            before = tracer.cache(modules=watched, include_inputs=True, include_output=False)
            after = tracer.cache(modules=watched)

        def first(view: Any, side: str) -> dict[int, Any]:
            found = {}
            for path in view.keys():
                value = getattr(view[path], side)
                found[owner[path]] = value[0] if len(view[path]) > 1 else value
            return found

        return first(before, "inputs"), first(after, "output")

    def _entries(self) -> list[nn.Module]:
        """The blocks: a list of as many modules as there are layers that runs on a text."""
        lists = [
            module for module in self.hf.modules()
            if isinstance(module, nn.ModuleList) and len(module) == self.n_layers
        ]
        _, made = self._recorded([each[0] for each in lists])
        for each in lists:
            if id(each[0]) in made:
                return list(each)
        raise ModelRefused(
            f"{type(self.hf).__name__} runs no list of {self.n_layers} blocks; "
            "open it with lane='hf'."
        )

    def _attending(self, entry: nn.Module) -> Optional[tuple[str, list[str]]]:
        """The module inside a block, by its path there, and the operations that may attend."""
        for path, module in entry.named_modules():
            envoy = self.envoys.get(id(module))
            if envoy is None or not path or next(module.children(), None) is None:
                continue
            try:
                names = list(envoy.source.names)
            except Exception:  # nnsight has no one class for "no source here"
                continue
            found = [name for name in names if self._takes_heads(envoy, name)]
            if found:
                return path, found
        return None

    def _takes_heads(self, envoy: Any, name: str) -> bool:
        seen: dict[str, Any] = {}
        with contextlib.suppress(Exception), warnings.catch_warnings():
            # An operation on a branch that is not taken ends in one of nnsight's errors.
            warnings.simplefilter("ignore")
            with self.open_scan() as tracer:
                seen["inputs"] = getattr(envoy.source, name).inputs
                seen["output"] = getattr(envoy.source, name).output
                tracer.stop()
        if "output" not in seen:
            return False
        found, made = given(*seen["inputs"]), first_tensor(seen["output"])
        if found is None or made is None or made.ndim != 4:
            return False
        batch, heads, length, _ = found.query.shape
        return sorted(made.shape) == sorted((batch, heads, length, found.value.shape[3]))

    def _solved(self, block: Block) -> tuple[str, ...]:
        """Fill in the ports of a block, and return its sites in the order they are reached."""
        modules = list(block.module.modules())
        before, after = self._recorded(modules)
        by_id = {id(module): module for module in modules}
        inputs = {i: hidden_input(*value) for i, value in before.items()}
        # In the order in which the modules return, as hooks would see them.
        solve(block, [(by_id[i], inputs.get(i), first_tensor(made)) for i, made in after.items()])
        position = _positions([self.envoys[i].path for i in before])
        at = {"attention": position[self.envoys[id(block.attention)].path, "input"] + 0.5}
        for name in ORDER:
            port = None if name == "attention" else block.port(name)
            if port is not None:
                at[name] = position[self.envoys[id(port[0])].path, port[1]]
        return tuple(sorted(at, key=lambda name: (at[name], ORDER.index(name))))

    def _checked(self, blocks: list[Block], candidates: list[list[str]]) -> list[Call]:
        """The operation of each block whose output our own attention gives as well."""
        root, save = self.root, load().save
        paths = [(spelled(root, self.envoys[id(block.attention)].path), names)
                 for block, names in zip(blocks, candidates)]
        with self.open_trace() as tracer:
            seen, masks = save([]), save([])
            for path, names in paths:
                for name in names:
                    operation = getattr(root.get(path).source, name)
                    args, kwargs = operation.inputs
                    entry = arguments(args, kwargs, masks)
                    output = operation.output
                    wrapped = isinstance(output, tuple)
                    seen.append((entry, wrapped, (output[0] if wrapped else output).detach().cpu()))
            tracer.stop()
        left = iter(seen)
        calls = []
        for block, names in zip(blocks, candidates):
            entries = [(name, *next(left)) for name in names]
            fits = [
                Call(name, wrapped, head_last) for name, entry, wrapped, made in entries
                if (head_last := _layout(block.attention, with_masks(entry, masks), made))
                is not None
            ]
            if not fits:
                raise ModelRefused(
                    f"no operation of {type(block.attention).__name__} (layer {block.index}) "
                    f"computes attention over the q, k and v it is given ({', '.join(names)}); "
                    "open the model with lane='hf' or 'bridge'."
                )
            calls.append(fits[0])
        return calls


def _layout(attention: nn.Module, entry: tuple, made: Tensor) -> Optional[bool]:
    """Whether heads come last but one in what was made, None if it is not attention at all."""
    found = given(*entry)
    if found is None:
        return None
    try:
        with torch.no_grad():
            z = attended(attention, found, Pass(0, found.query.shape[2]))
    except SiteRefused:
        return None
    exact = z.dtype in (torch.float32, torch.float64)
    size = (1e-4 if exact else 3e-2) * float(made.abs().max())
    for head_last in (True, False):
        same = z if head_last else z.transpose(1, 2)
        if same.shape == made.shape and float((same - made).abs().max()) <= size:
            return head_last
    return None


def _signature(entry: nn.Module) -> tuple:
    """What a block is made of; blocks of one signature have their sites in the same places."""
    return tuple((name, type(module)) for name, module in entry.named_modules())


def _transferred(example: Block, entry: nn.Module, index: int) -> Block:
    """The block of another entry of the same kind."""
    names = {id(module): name for name, module in example.module.named_modules()}

    def there(module: nn.Module) -> nn.Module:
        return entry.get_submodule(names[id(module)])

    ports: dict[str, Any] = {
        name: (there(port[0]), port[1])
        for name in ("attn_out", "resid_mid", "mlp_in", "mlp_out")
        if (port := getattr(example, name)) is not None
    }
    return Block(index, entry, there(example.attention), example.kind, **ports)


def _positions(called: Sequence[str]) -> dict[tuple[str, str], int]:
    """When each module was entered and left, from the order in which they were called.

    A module returns before any module is called that does not lie inside it.
    """
    events: list[tuple[str, str]] = []
    inside: list[str] = []
    for path in called:
        while inside and not path.startswith(inside[-1] + "."):
            events.append((inside.pop(), "output"))
        events.append((path, "input"))
        inside.append(path)
    events += [(path, "output") for path in reversed(inside)]
    return {event: number for number, event in enumerate(events)}
