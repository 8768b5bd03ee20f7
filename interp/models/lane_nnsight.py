"""nnsight traces over the same weights: reads, writes and statistics as in lane "hf".

The modules are wrapped in a copy that shares every parameter, because nnsight replaces their
forward functions for good. Where something is asked of attention, the trace takes q, k and v from
the operation that attends, computes with our own attention, and hands its output on instead.
"""

from collections.abc import Callable, Sequence
from typing import Any, Optional

import torch
from torch import Tensor, nn

from interp.core.errors import ModelRefused, SiteRefused
from interp.core.site import HEADED, PAIRS
from interp.models import attention as attend
from interp.models.bridging import shared_copy
from interp.models.edits import Edits, Pass
from interp.models.lane_hf import LaneHF, call_options, probe_ids, shape_of, sink_kind
from interp.models.nnsight_sites import Call, Explorer, attended, given, wrap
from interp.models.run import Reads
from interp.models.sites import first_tensor, hidden_input
from interp.models.visit import Visit


class LaneNNsight(LaneHF):
    """Runs prompts through nnsight traces on this machine.

    Raises `ModelRefused` for a model whose attention no operation holds, or whose weights are not
    all in memory.
    """

    name = "nnsight"

    def __init__(self, hf: nn.Module, name: str) -> None:
        if any(weight.is_meta for weight in hf.parameters()):
            raise ModelRefused(
                f"weights of {name} are offloaded, which nnsight cannot follow; use lane 'hf', or "
                "open the model with remote=True to run it on NDIF."
            )
        self.plain = hf
        self.device = next(hf.parameters()).device
        self.configs: list[Any] = []
        self._open(wrap(shared_copy(hf)))

    def _open(self, root: Any) -> None:
        """Find everything in the model that `root` is nnsight's view of."""
        self.root: Any = root
        self.hf = root._module
        config = self.hf.config.get_text_config()
        explorer = Explorer(
            root, self._probing, self._scanning, config.num_hidden_layers, self._unchecked
        )
        with torch.no_grad():
            self.blocks, self.calls, self.orders = explorer.find()
        self.envoys = explorer.envoys
        self.attentions = {block.attention: block.index for block in self.blocks}
        self.shape = shape_of(self.blocks, self.hf)
        self.sink_kind = sink_kind(self.blocks)

    def _probing(self) -> Any:
        return self.root.trace(input_ids=probe_ids(self.hf, 6), use_cache=False)

    def _scanning(self) -> Any:
        return self._probing()

    def _unchecked(self, error: Exception) -> bool:
        """Whether to do without the sites inside attention after this error."""
        return False

    def site(self, layer: int, name: str) -> Optional[str]:
        """Where a site is, as a path of nnsight's, None if it is nowhere."""
        if name in HEADED + PAIRS:
            block = self.blocks[layer]
            return f"{self.envoys[id(block.attention)].path}.source.{self.calls[layer].name}"
        port = self.blocks[layer].port(name)
        return None if port is None else f"{self.envoys[id(port[0])].path}.{port[1]}"

    def _forward(
        self, ids: Tensor, inputs: dict, now: Pass, edits: Sequence[Edits], reads: Reads,
        reducers: Callable, residual_reducers: Callable, numbers: Sequence[int], cache: Any,
        use_cache: bool, logits: str, gradients: bool = False,
    ) -> Any:
        more = call_options(cache, use_cache, logits)
        visit = Visit(now, edits, reads, reducers, residual_reducers, numbers)
        steps = self.steps(visit)
        with attend.session(self.attentions, visit.session()):
            with torch.set_grad_enabled(gradients):
                return self._traced(ids, inputs, more, steps, visit)

    def _traced(
        self, ids: Tensor, inputs: dict, more: dict, steps: list[tuple[int, str]], visit: Visit
    ) -> Any:
        """One trace that does what is to be done at every step."""
        held: dict[str, Any] = {}
        more = {name: value for name, value in more.items() if name in accepted(self.hf)}
        with self.root.trace(input_ids=ids, **inputs, **more):
            stored: dict[int, Tensor] = {}
            for layer, name in steps:
                self._step(layer, name, visit, stored)
            held["out"] = self.root.output
        return held["out"]

    def steps(self, visit: Visit) -> list[tuple[int, str]]:
        """Every place where something is to be done, in the order the model reaches them."""
        found: list[tuple[int, str]] = []
        for block, order in zip(self.blocks, self.orders):
            layer = block.index
            wanted = {name for name in order if name != "attention" and visit.needed(layer, name)}
            if visit.attends(layer):
                if (reason := self.unavailable("z")) is not None:
                    raise SiteRefused(f"cannot reach the attention of layer {layer}: {reason}.")
                wanted.add("attention")
            # The stream between the halves of a block is read twice, by the norm and by the second
            # sum: it is written through what attention adds, which enters both.
            if self.through_attention(layer, visit):
                wanted = (wanted - {"resid_mid"}) | {"resid_pre", "attn_out"}
            for name in ("resid_pre", "attn_out", "resid_mid", "mlp_in", "mlp_out", "resid_post"):
                if name not in order and visit.needed(layer, name):
                    raise SiteRefused(
                        f"cannot reach {name!r} in layer {layer}: {self.unavailable(name)}."
                    )
            found += [(layer, name) for name in order if name in wanted]
        return found

    def through_attention(self, layer: int, visit: Visit) -> bool:
        """Whether `resid_mid` of this layer is written through what attention adds."""
        return visit.writes(layer, "resid_mid") and self.blocks[layer].kind == "sequential"

    def value(self, layer: int, name: str, x: Tensor, visit: Visit, stored: dict) -> Tensor:
        """The residual stream at a site, after everything that is to be done there."""
        new = visit.at(layer, name, x)
        if self.through_attention(layer, visit):
            if name == "resid_pre":
                stored[layer] = new
            if name == "attn_out":
                before = stored.pop(layer).reshape(new.shape)
                new = visit.at(layer, "resid_mid", before + new) - before
        return new

    def _step(self, layer: int, name: str, visit: Visit, stored: dict) -> None:
        """Inside a trace: wait for a site, do what is to be done, and put back what changed."""
        block = self.blocks[layer]
        if name == "attention":
            call: Call = self.calls[layer]
            operation = getattr(self.envoys[id(block.attention)].source, call.name)
            args, kwargs = operation.inputs
            found = given(args, kwargs)
            if found is None:
                raise SiteRefused(
                    f"{call.name} in layer {layer} was not given q, k and v this time; "
                    "use lane 'hf'."
                )
            operation.skip(call.output(attended(block.attention, found, visit.now)))
            return
        port = block.port(name)
        assert port is not None
        envoy = self.envoys[id(port[0])]
        if port[1] == "output":
            output = envoy.output
            x = first_tensor(output)
            new = self.value(layer, name, x, visit, stored)
            envoy.output = new if isinstance(output, Tensor) else (new, *output[1:])
            return
        args, kwargs = envoy.inputs
        x = hidden_input(args, kwargs)
        new = self.value(layer, name, x, visit, stored)
        if args and args[0] is x:
            envoy.inputs = (new, *args[1:]), kwargs
        else:
            envoy.inputs = args, {k: new if v is x else v for k, v in kwargs.items()}


def accepted(hf: nn.Module) -> set[str]:
    """Which of the settings of a pass the model takes; encoders know neither of the last two."""
    import inspect

    names = inspect.signature(type(hf).forward).parameters
    settings = {"use_cache", "past_key_values", "logits_to_keep"}
    if any(each.kind is each.VAR_KEYWORD for each in names.values()):
        return settings
    return settings & set(names)
