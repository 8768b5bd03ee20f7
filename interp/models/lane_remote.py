"""Models that are not here: nnsight traces sent to NDIF, their values edited and counted here.

What is sent is data (token ids, paths, tensors to put in a place) and the plain functions of
`interp.models.nnsight_shipped`. An edit needs the value it changes, so a run stops at each edited
place, the value comes here, the same code as in every lane edits it, and the next job takes it from
there: one job more per edited place. Statistics are computed here from q, k and v.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Optional

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from interp.core.errors import RemoteRefused, UndertowError
from interp.core.site import HEADED, PAIRS
from interp.models import attention as attend
from interp.models.edits import Edits, Pass
from interp.models.lane_hf import probe_ids
from interp.models.lane_nnsight import LaneNNsight, accepted
from interp.models.nnsight_shipped import play
from interp.models.nnsight_sites import Given, attended, given, load, spelled, with_masks
from interp.models.run import Reads
from interp.models.visit import Visit


@dataclass
class Told:
    """What a remote run has fed so far; it stands in for a cache, which stays on the server."""

    ids: Optional[Tensor] = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    passes: tuple[Pass, ...] = ()


def skeleton(
    where: str, revision: Optional[str], trust_remote_code: bool, tokenizer: Any, processor: Any
) -> Any:
    """nnsight's view of a hub model, on the meta device: no weights are read."""
    load()
    from nnsight.modeling.transformers import TransformersModel

    more: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        more["tokenizer"] = tokenizer
    if isinstance(processor, ProcessorMixin):
        more["processor"] = processor
    return TransformersModel(where, revision=revision, **more)


class LaneRemote(LaneNNsight):
    """Runs prompts on NDIF, or on another nnsight server, through traces.

    Args:
        root: nnsight's `TransformersModel`, not dispatched: its weights stay on the meta device.
        name: the model's name, for messages.
        host: the server's address; None takes nnsight's own setting.

    Every pass is computed anew from the first token, so `new_tokens` costs a prefill per token.
    """

    def __init__(self, root: Any, name: str, host: Optional[str] = None) -> None:
        self.model_name, self.host = name, host
        self.jobs = 0
        self.refused: Optional[str] = None
        self.plain = root._module
        self.device = torch.device("cpu")
        self.configs: list[Any] = []
        self._check_key()
        with self._answered("open"):
            self._open(root)

    def _check_key(self) -> None:
        from nnsight.schema.config import CONFIG, ApiConfig

        asked = self.host or CONFIG.API.HOST
        if asked == ApiConfig().HOST and not CONFIG.API.APIKEY:
            raise RemoteRefused(
                f"NDIF runs {self.model_name} only with an API key: set the environment variable "
                "NDIF_API_KEY before Python starts, or call nnsight.login()."
            )

    def _backend(self) -> Any:
        self.jobs += 1
        return self.root._remote_backend(self.host or True, True, None, False)

    def _open(self, root: Any) -> None:
        super()._open(root)
        self.names = {
            (block.index, name): (spelled(root, self.envoys[id(port[0])].path), port[1])
            for block, order in zip(self.blocks, self.orders)
            for name in order if name != "attention" and (port := block.port(name)) is not None
        }
        for block, call in zip(self.blocks, self.calls):
            path = spelled(root, self.envoys[id(block.attention)].path)
            self.names[block.index, "attention"] = (path, call.name)

    def _probing(self) -> Any:
        return self.root.trace(
            input_ids=probe_ids(self.hf, 6), use_cache=False, backend=self._backend()
        )

    def _scanning(self) -> Any:
        return self.root.scan(input_ids=probe_ids(self.hf, 6), use_cache=False)

    def _unchecked(self, error: Exception) -> bool:
        """Keep the sites of the residual stream where the server lets nobody into attention."""
        if isinstance(error, _server_errors()):
            self.refused = f"the server refused to open its attention ({_sentence(error)})"
        return self.refused is not None

    def unavailable(self, name: str) -> Optional[str]:
        if name in HEADED + PAIRS and self.refused is not None:
            return self.refused
        return super().unavailable(name)

    # -- running -----------------------------------------------------------------------------

    def _forward(
        self, ids: Tensor, inputs: dict, now: Pass, edits: Sequence[Edits], reads: Reads,
        reducers: Callable, residual_reducers: Callable, numbers: Sequence[int], cache: Any,
        use_cache: bool, logits: str, gradients: bool = False,
    ) -> Any:
        before: Told = cache or Told(inputs=inputs)
        fed = ids if before.ids is None else torch.cat([before.ids, ids], 1)
        nothing = Reads([], len(self.blocks), 0)
        visits = [
            Visit(one, edits, nothing, lambda *_: [], lambda *_: [], numbers)
            for one in before.passes
        ]
        visits.append(Visit(now, edits, reads, reducers, residual_reducers, numbers))
        more: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in accepted(self.hf):
            more["logits_to_keep"] = now.length if logits == "all" else 1
        made = self._played(fed, before.inputs, more, visits)
        if made is not None and logits == "all":
            made = made[:, -now.length :]
        told = Told(fed, before.inputs, (*before.passes, now))
        return SimpleNamespace(logits=made, past_key_values=told)

    def _played(
        self, ids: Tensor, inputs: dict, more: dict, visits: list[Visit]
    ) -> Optional[Tensor]:
        """As many jobs as it takes; the logits of the last one."""
        last = visits[-1]
        steps = self.steps(last)
        stored: list[dict[int, Tensor]] = [{} for _ in visits]
        edited = [i for i, step in enumerate(steps) if self._changes(*step, last)]
        new: dict[int, Any] = {}
        done, logits = 0, None
        for end in [*(i + 1 for i in edited), None]:
            upto = len(steps) if end is None else end
            sent = [
                (i, *self.names[steps[i]], i >= done, new.get(i)) for i in range(upto)
                if i >= done or i in new
            ]
            kept, masks, logits = self._job(ids, _stretched(inputs, ids), more, sent, end is None)
            for i in range(done, upto):
                value = self._here(steps[i], kept[i], masks, visits, stored)
                if i in edited:
                    new[i] = value
            done = upto
        return logits

    def _changes(self, layer: int, name: str, visit: Visit) -> bool:
        if name == "attention":
            return visit.edits_attention(layer)
        through = name == "attn_out" and self.through_attention(layer, visit)
        return visit.writes(layer, name) or through

    def _job(
        self, ids: Tensor, inputs: dict, more: dict, steps: list[tuple], whole: bool
    ) -> tuple[dict[int, Any], list[Tensor], Optional[Tensor]]:
        """One trace on the server. Its block may name nothing but data and what is shipped."""
        root, save = self.root, load().save
        with self._answered("run"):
            with root.trace(input_ids=ids, **inputs, **more, backend=self._backend()) as tracer:
                masks = save([])
                kept = save(play(root, steps, masks))
                out = save([])
                if whole:
                    made = root.output
                    if "logits" in made:
                        out.append(made["logits"].detach().cpu())
                else:
                    tracer.stop()
        return kept, masks, out[0] if out else None

    def _here(
        self, step: tuple[int, str], value: Any, masks: list[Tensor], visits: list[Visit],
        stored: list[dict[int, Tensor]],
    ) -> Any:
        """Do here what is to be done at a place, pass by pass, with the value it had there."""
        layer, name = step
        if name == "attention":
            block, call = self.blocks[layer], self.calls[layer]
            found = given(*with_masks(value, masks))
            assert found is not None
            parts = []
            for visit in visits:
                with attend.session(self.attentions, visit.session()):
                    parts.append(
                        attended(block.attention, _part(found, visit.now), visit.now)
                    )
            z = torch.cat(parts, 1)
            return (z if call.head_last else z.transpose(1, 2), call.wrapped)
        rows = value.reshape(len(visits[0].edits), -1, value.shape[-1])
        parts = [
            self.value(layer, name, rows[:, v.now.start : v.now.start + v.now.length], v, held)
            for v, held in zip(visits, stored)
        ]
        return torch.cat(parts, 1).reshape(value.shape)

    @contextlib.contextmanager
    def _answered(self, verb: str) -> Iterator[None]:
        """Whatever a server or the way to it answers, as one sentence."""
        try:
            yield
        except UndertowError:
            raise
        except Exception as error:
            if not isinstance(error, (*_server_errors(), OSError, *_network_errors())):
                raise
            raise RemoteRefused(self._told(verb, error)) from error

    def _told(self, verb: str, error: Exception) -> str:
        from nnsight.schema.config import CONFIG

        host = self.host or CONFIG.API.HOST
        text = _sentence(error)
        low = text.lower()
        if not isinstance(error, _server_errors()):
            return (
                f"cannot reach {host} to {verb} {self.model_name} ({text}); check the network and "
                "NDIF_HOST, or open the model without remote=True."
            )
        advice = "open the model without remote=True if its weights fit here"
        if any(word in low for word in ("deploy", "not running", "not available", "unknown model")):
            advice = "nnsight.status() lists the models it serves"
        elif any(word in low for word in ("api key", "unauthorized", "401", "forbidden", "403")):
            advice = "check NDIF_API_KEY and what it gives access to"
        elif any(word in low for word in ("memory", "oom")):
            advice = "run fewer or shorter prompts at a time (batch_size=1)"
        elif any(word in low for word in ("allow", "permit", "whitelist", "import", "restricted")):
            advice = "it does not let this code into the model: use sites of the residual stream"
        return f"{host} did not {verb} {self.model_name}: {text}; {advice}."


def _part(found: Given, now: Pass) -> Given:
    """The queries of one pass, and the keys there were by then."""
    rows, end = slice(now.start, now.start + now.length), now.start + now.length
    mask = found.mask
    return replace(
        found, query=found.query[:, :, rows], key=found.key[:, :, :end],
        value=found.value[:, :, :end], mask=None if mask is None else mask[:, :, rows, :end],
    )


def _stretched(inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """Inputs with one entry per token, continued over generated tokens."""
    length = ids.shape[1]
    return {
        name: nn.functional.pad(x, (0, length - x.shape[1]))
        if x.ndim == 2 and name.endswith("token_type_ids") and x.shape[1] < length else x
        for name, x in inputs.items()
    }


def _server_errors() -> tuple[type[Exception], ...]:
    from nnsight.intervention.backends.remote import RemoteError

    return (RemoteError,)


def _network_errors() -> tuple[type[Exception], ...]:
    import httpx
    import websocket

    return (httpx.HTTPError, websocket.WebSocketException)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")[:200]

