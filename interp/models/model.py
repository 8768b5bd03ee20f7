"""One model, one verb: `Model.run` reads, writes and measures in whichever lane fits."""

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Optional, Union

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.core.errors import (
    ModelRefused,
    NumericalError,
    OutOfRange,
    PromptError,
    did_you_mean,
)
from interp.core.intervention import Each, Intervention
from interp.core.prompt import Prompt
from interp.core.site import Site, check_layers
from interp.models import plain_text, prompting
from interp.models.edits import Edits, Shape
from interp.models.prove import Proof, is_causal, prove, refuse, sites_with
from interp.models.run import Reads, Run, first_bad_layer
from interp.models.run_statistics import Statistics

Prompts = Union[Prompt, str, Iterable[Union[Prompt, str]]]
LANES = ("hf", "bridge", "nnsight")


class Model:
    """An opened model; made by `interp.open_model`.

    Attributes:
        name: what it was opened by. architecture: the transformers class.
        n_layers, n_heads, n_kv_heads, d_model, d_head, d_vocab, max_positions: its sizes.
        kind: "decoder" if no position feels a later one, else "encoder"; measured, not assumed.
        sink_kind: "none", "learned" (a sink logit per head) or "gated" (a gate on head outputs).
        hf: the transformers model; tokenizer and processor: what turns text and images to tokens.
    """

    def __init__(
        self,
        hf: nn.Module,
        name: str,
        tokenizer: Any = None,
        processor: Any = None,
        lane: str = "auto",
        source: Optional[Mapping[str, Any]] = None,
        remote: Optional[Callable[[], Any]] = None,
    ) -> None:
        self.hf: Any = hf.eval()
        self.name = name
        # Makes the lane of a model that runs elsewhere; `hf` then has no weights.
        self.remote = remote
        self.tokenizer, self.processor = tokenizer, processor
        self.config: Any = hf.config
        self.source = dict(source or {})
        self._lanes: dict[str, Any] = {}
        self._proofs: dict[str, dict[str, Proof]] = {}
        self._told: set[str] = set()
        text = self.config.get_text_config()
        self.architecture = type(hf).__name__
        self.has_images = any(
            getattr(hf.config, key, None) is not None for key in ("vision_config", "vision_tower")
        )
        self.max_positions = int(getattr(text, "max_position_embeddings", 0) or 0) or None
        if lane not in ("auto", *LANES):
            raise ModelRefused(
                f"there is no lane {lane!r}; choose 'auto', {', '.join(map(repr, LANES))}."
                f"{did_you_mean(lane, LANES)}"
            )
        first = ("nnsight" if remote else "hf") if lane == "auto" else lane
        engine = self._engine(first)
        self.lane = first
        self.shape: Shape = engine.shape
        self.n_layers, self.n_heads = self.shape.n_layers, self.shape.n_heads
        self.n_kv_heads = self.shape.n_kv_heads
        self.d_model, self.d_head = self.shape.d_model, self.shape.d_head
        self.d_vocab = int(text.vocab_size)
        self.sink_kind = engine.sink_kind
        self.kind = "decoder" if self._causal() else "encoder"
        self._prove(first)

    def __repr__(self) -> str:
        heads = f"{self.n_heads} heads"
        if self.n_kv_heads != self.n_heads:
            heads += f" over {self.n_kv_heads} key-value heads"
        return (
            f"Model({self.name!r}: {self.architecture}, {self.n_layers} layers x {heads}, "
            f"d_model {self.d_model}, lane {self.lane!r})"
        )

    # -- lanes -------------------------------------------------------------------------------

    def _engine(self, lane: str) -> Any:
        if lane not in self._lanes:
            if self.remote is not None:
                if lane != "nnsight":
                    raise ModelRefused(
                        f"{self.name} was opened with remote=True, so its weights are not on this "
                        f"machine: lane {lane!r}, and whatever needs the weights themselves, "
                        "works only without it."
                    )
                self._lanes[lane] = self.remote()
            elif lane == "hf":
                from interp.models.lane_hf import LaneHF

                self._lanes[lane] = LaneHF(self.hf)
            elif lane == "nnsight":
                from interp.models.lane_nnsight import LaneNNsight

                self._lanes[lane] = LaneNNsight(self.hf, self.name)
            else:
                from interp.models.lane_bridge import LaneBridge

                self._lanes[lane] = LaneBridge(self.hf, self.tokenizer, self.name)
        return self._lanes[lane]

    def using(self, lane: str) -> "Model":
        """The same weights through another lane ("hf", "bridge", "nnsight"), proven there first."""
        if lane not in LANES:
            raise ModelRefused(f"there is no lane {lane!r}; choose {', '.join(map(repr, LANES))}."
                               f"{did_you_mean(lane, LANES)}")
        other = copy.copy(self)
        other.lane = lane
        other._engine(lane)
        other._prove(lane)
        return other

    @property
    def bridge(self) -> Any:
        """TransformerLens' `TransformerBridge` over the same weights, for all its tools."""
        return self._engine("bridge").bridge

    @property
    def device(self) -> torch.device:
        from interp.models.lane_hf import input_device

        return input_device(self.hf)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.hf.parameters()).dtype

    def _tolerance(self) -> float:
        return {torch.float32: 1e-3, torch.float64: 1e-4}.get(self.dtype, 5e-2)

    def _outcomes(
        self, lane: str, prompt: Prompt, writes: Sequence[tuple[Intervention, ...]],
        read: tuple[str, ...] = (),
    ) -> tuple[list[Tensor], dict[str, Any]]:
        """One batch with other edits in every row: the logits of each row, or the last residual
        stream of a model without a vocabulary, and what the first row read."""
        last = f"resid_post.{self.shape.n_layers - 1}"
        reads = Reads([Site.parse(s) for s in {*read, last}], self.shape.n_layers, len(writes))
        logits, _ = self._engine(lane).run(
            [prompt] * len(writes), [Edits(prompt, one, self.shape) for one in writes], reads,
            lambda *_: [], lambda *_: [], range(len(writes)),
        )
        found = {s: a.values for s, a in reads.finish().items()}
        rows = [torch.tensor(found[last][i, 0]) if row is None else row
                for i, row in enumerate(logits)]
        return rows, {s: values[0, 0] for s, values in found.items()}

    def _probe(self) -> list[int]:
        from interp.models.lane_hf import probe_ids

        return probe_ids(self.hf, 6)[0].tolist()

    def _causal(self) -> bool:
        return is_causal(
            lambda ids: self._outcomes(self.lane, Prompt.from_tokens(ids), [()])[0][0], self._probe()
        )

    def _prove(self, lane: str) -> None:
        if lane in self._proofs:
            return
        self._proofs[lane] = prove(
            lambda *given: self._outcomes(lane, *given), self._probe(), self.shape.n_layers // 2,
            self._engine(lane).unavailable, self._tolerance(), self.kind == "decoder",
        )

    def sites(self, verb: str = "read") -> list[str]:
        """Sites proven readable (or, with "write", writable) in this lane."""
        return sites_with(self._proofs[self.lane], verb)

    def proofs(self) -> dict[str, Proof]:
        """What was proven for every site of this lane when the model was opened."""
        return dict(self._proofs[self.lane])

    def _check_site(self, name: str, verb: str) -> None:
        others = []
        for lane, proofs in self._proofs.items():
            proof = proofs.get(name)
            if lane != self.lane and proof and getattr(
                proof, "readable" if verb == "read" else "writable"
            ):
                others.append(lane)
        untried = [lane for lane in LANES if lane not in self._proofs and self.remote is None]
        refuse(self._proofs[self.lane], name, verb, self.name, self.lane, others, untried)

    # -- prompts and weights -------------------------------------------------------------------

    def prompt(
        self,
        text_or_messages: Any,
        images: Sequence[Any] = (),
        chat: bool = False,
        segments: Optional[Mapping[str, Any]] = None,
    ) -> Prompt:
        """Tokens with named segments, from text or chat messages and pictures.

        Example:
            >>> import interp
            >>> model = interp.open_model("backcopy-1l")
            >>> len(model.prompt(model.tokenizer.decode([5, 6, 7]))) >= 3
            True

        Raises:
            PromptError, ProcessorMissing, SegmentNotFound: see `interp.models.prompting.build`.

        Warns of a text whose words the tokenizer mostly does not know, and once per decoder of a
        tokenizer that closes texts with a token.
        """
        made = prompting.build(self, text_or_messages, images, chat=chat, segments=segments)
        for said in plain_text.remarks(self, made):
            if said not in self._told:
                warnings.warn(said, stacklevel=2)
                self._told.add(said)
        return made

    @property
    def first_token_is_bos(self) -> bool:
        """Whether the tokenizer puts a special token at position 0 of a plain text."""
        if self.tokenizer is None:
            return False
        ids = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        first = {self.tokenizer.bos_token_id, self.tokenizer.cls_token_id} - {None}
        return bool(ids) and ids[0] in first

    def mlp(self, layer: int) -> Callable[[Tensor], Tensor]:
        """The MLP of a block as a function from `mlp_in` to `mlp_out`, `[..., d_model]` both.

        Raises `SiteRefused` where the block's MLP is not one function of `mlp_in`.
        """
        check_layers(layer, self.n_layers)
        return self._engine("hf").mlp(layer)

    def mlp_stages(self, layer: int) -> Callable[[Tensor], dict[str, Tensor]]:
        """The stages of a block's gated MLP as a function of `mlp_in` `[..., d_model]`: input, up,
        gate, activated, product, output (before a norm that may follow).

        Raises `SiteRefused` where the MLP is not of this kind (no gate, experts, fused weights).
        """
        check_layers(layer, self.n_layers)
        return self._engine("hf").mlp_stages(layer)

    def w_o(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """The output projection of a block, per query head: `z[head] @ w_o[head]` is what a head
        adds to the residual stream (a bias, and norms after it, aside).

        Raises `SiteRefused` where something lies between the two, such as a gate.
        """
        check_layers(layer, self.n_layers)
        return self._engine("hf").w_o(layer)

    def manifest(self) -> dict[str, Any]:
        """What a result must say about the model it came from."""
        return {
            "model": self.name, "architecture": self.architecture, "lane": self.lane,
            "remote": self.remote is not None,
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": "remote" if self.remote is not None else self.device.type,
            "tokenizer": type(self.tokenizer).__name__ if self.tokenizer is not None else None,
            "n_layers": self.n_layers, "n_heads": self.n_heads, "n_kv_heads": self.n_kv_heads,
            "d_model": self.d_model, "kind": self.kind, "sink_kind": self.sink_kind,
            "first_token_is_bos": self.first_token_is_bos, **self.source,
        }

    # -- the verb --------------------------------------------------------------------------------

    def run(
        self,
        prompts: Prompts,
        read: Union[str, Site, Sequence[Union[str, Site]]] = (),
        write: Union[Intervention, Sequence[Intervention], Each] = (),
        stats: Union[str, Any, Sequence[Any]] = (),
        new_tokens: Union[int, Sequence[Sequence[int]]] = 0,
        *,
        batch_size: int = 8,
        logits: str = "all",
        decode_last: bool = False,
        progress: bool = False,
    ) -> Run:
        """Run prompts, changing what `write` says, and return what `read` and `stats` ask for.

        Example:
            >>> import interp
            >>> model = interp.open_model("backcopy-1l")
            >>> prompt = interp.Prompt.from_tokens(range(3, 12))
            >>> run = model.run(prompt, read="pattern", stats="received")
            >>> run.reads["pattern"].dims, run.stats["received"].dims
            (('prompt', 'layer', 'head', 'query', 'key'), ('prompt', 'layer', 'head', 'key'))

        Args:
            prompts: one or many, `Prompt` or text. They are batched only with prompts of equal
                length and never padded.
            read: sites, like "resid_post", "mlp_out.3" or `Site`; read after all writes.
            write: interventions: `interp.ablate`, `block`, `scale`, `edit`, `patch`, ...; or
                `interp.each([...])`, other ones for every prompt.
            stats: names ("received", "entropy", ...) or configured reducers; never N x N.
            new_tokens: how many greedy tokens to generate after each prompt; or the tokens of every
                prompt, fed one by one as if they had been generated (equally many each).
            logits: "all" rows, only the "last" row, or "none".
            decode_last: whether the last token of the prompt is fed alone, as the first decoding
                step: edits with phase="decode" then also act where the first new token is decided.

        Raises:
            PromptError, OutOfRange, SegmentNotFound, SiteRefused, NumericalError: before anything
            is run wherever possible, naming the value and what to do.
        """
        forced = None if isinstance(new_tokens, int) else _forced(new_tokens, self.d_vocab)
        steps = new_tokens if isinstance(new_tokens, int) else len(forced[0]) if forced else 0
        prompts = self._prompts(prompts, steps)
        if forced is not None and len(forced) != len(prompts):
            raise ValueError(f"new tokens for {len(forced)} prompts, but {len(prompts)} are run.")
        sites = [Site.parse(s) for s in ([read] if isinstance(read, (str, Site)) else read)]
        writes = self._writes(write, len(prompts))
        asked = [stats] if isinstance(stats, str) or not isinstance(stats, Iterable) else stats
        if logits not in ("all", "last", "none"):
            raise ValueError(f"logits must be 'all', 'last' or 'none', not {logits!r}.")
        if steps < 0 or batch_size < 1:
            raise ValueError("new_tokens must be at least 0 and batch_size at least 1.")
        for site in sites:
            site.of(self.n_layers)
            self._check_site(site.name, "read")
        if decode_last and (self.kind != "decoder" or min(map(len, prompts)) < 2):
            raise ValueError("decode_last=True needs a decoder and prompts of at least two tokens.")
        edits = [Edits(prompt, one, self.shape) for prompt, one in zip(prompts, writes)]
        for name in sorted({name for one in edits for name in one.sites()}):
            self._check_site(name, "write")

        statistics = Statistics(asked, prompts, self.n_layers, self.n_heads, steps)
        reads = Reads(sites, self.n_layers, len(prompts))
        rows: list[Optional[Tensor]] = [None] * len(prompts)
        made: list[list[int]] = [[] for _ in prompts]
        batches = list(_batches(prompts, batch_size))
        for numbers in tqdm(batches, disable=not progress, desc=f"running {self.name}"):
            out, new = self._engine(self.lane).run(
                [prompts[i] for i in numbers], [edits[i] for i in numbers], reads,
                statistics.attention, statistics.residual, numbers, steps, logits, decode_last,
                None if forced is None else [forced[i] for i in numbers],
            )
            for i, row, tokens in zip(numbers, out, new):
                self._check_finite(row, prompts[i], writes[i])
                rows[i], made[i] = row, tokens
        kept = [row for row in rows if row is not None]
        return Run(tuple(prompts), kept, reads.finish(), statistics.finish(), made)

    def generate(
        self,
        prompts: Prompts,
        new_tokens: int = 20,
        write: Union[Intervention, Sequence[Intervention], Each] = (),
        *,
        batch_size: int = 8,
        decode_last: bool = False,
    ) -> list[list[int]]:
        """Greedy continuations, with interventions; each ends before the end-of-text token.

        Example:
            >>> import interp
            >>> model = interp.open_model("backcopy-1l")
            >>> prompt = interp.Prompt.from_tokens(range(3, 12))
            >>> len(model.generate(prompt, 4, write=interp.ablate("L0H0"))[0]) <= 4
            True

        `model.tokenizer.decode(...)` makes text of them. The arguments are those of `run`.
        """
        run = self.run(prompts, write=write, new_tokens=new_tokens, logits="last",
                       batch_size=batch_size, decode_last=decode_last)
        ends = self.end_tokens
        cut = [next((i for i, token in enumerate(made) if token in ends), len(made))
               for made in run.new_tokens]
        return [made[:end] for made, end in zip(run.new_tokens, cut)]

    def resumable(self, prompt: Union[Prompt, str]) -> Any:
        """A prompt that is run once and can then be resumed at any block, many variants at a time.

        Example:
            >>> import interp, torch
            >>> model = interp.open_model("backcopy-3l")
            >>> base = model.resumable(interp.Prompt.from_tokens(range(3, 12)))
            >>> rows = torch.tensor([[0, 2, 3, 8], [0, 5, 6, 8]])     # two sets of kept positions
            >>> base.replay(1, rows).shape[0]
            2

        See `interp.models.resume.Resumable`. Raises `ModelRefused` where the model cannot be resumed
        in the middle, and says why.
        """
        from interp.models.resume import Resumable

        (given,) = self._prompts(prompt, 0)
        if self.kind != "decoder":
            raise ModelRefused(f"{self.name} is an encoder: it has no last row to resume towards.")
        return Resumable(self.hf, self._engine("hf"), given, self._tolerance())

    def stepping(
        self,
        prompts: Prompts,
        write: Union[Intervention, Sequence[Intervention], Each] = (),
        *,
        read: Union[str, Sequence[str]] = (),
        gradients: Sequence[int] = (),
        batch_size: int = 64,
        tail: int = 0,
    ) -> Any:
        """Prompts to be continued by tokens that are chosen outside, side by side.

        Example:
            >>> import interp
            >>> model = interp.open_model("backcopy-1l")
            >>> prompt = interp.Prompt.from_tokens(range(3, 12))
            >>> steps = model.stepping([prompt, prompt], write=interp.each([[], interp.ablate("L0H0")]))
            >>> steps.feed(steps.logits[0].argmax().repeat(2)).shape[0]
            2

        `write` acts in the prompts and in every later step, as in `run`; `read` names sites of
        single layers ("resid_post.3"), or all layers, for `Stepping.read`; `gradients` names
        layers for `Stepping.gradient_by_attention`; the last `tail` tokens of the prompts are a
        pass of their own, the first decoding step, so that only their rows are read.
        """
        from interp.models.stepping import start

        return start(self, prompts, write, read, gradients, batch_size, tail)

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end a text, from the generation settings, the config or the tokenizer."""
        for owner in (getattr(self.hf, "generation_config", None), self.config.get_text_config(),
                      self.tokenizer):
            found = getattr(owner, "eos_token_id", None)
            if found is not None:
                return frozenset([found] if isinstance(found, int) else found)
        return frozenset()

    def _writes(self, write: Any, count: int) -> list[tuple[Intervention, ...]]:
        """The interventions of every prompt."""
        if not isinstance(write, Each):
            same = (write,) if isinstance(write, Intervention) else tuple(write)
            return [same] * count
        if len(write.writes) != count:
            raise ValueError(
                f"each() holds interventions for {len(write.writes)} prompts, but {count} are run."
            )
        return list(write.writes)

    def _prompts(self, prompts: Prompts, new_tokens: int) -> list[Prompt]:
        given = [prompts] if isinstance(prompts, (str, Prompt)) else list(prompts)
        if not given:
            raise PromptError("no prompts to run: give at least one.")
        found = [self.prompt(p) if isinstance(p, str) else p for p in given]
        for number, prompt in enumerate(found):
            if not isinstance(prompt, Prompt):
                raise PromptError(
                    f"prompt {number} is a {type(prompt).__name__}; make it with model.prompt(...) "
                    "or interp.Prompt.from_tokens(...)."
                )
            worst = max(prompt.ids) if min(prompt.ids) >= 0 else min(prompt.ids)
            if not 0 <= worst < self.d_vocab:
                raise OutOfRange(
                    f"prompt {number} has the token id {worst}, but {self.name} knows ids 0 to "
                    f"{self.d_vocab - 1}."
                )
            length = len(prompt) + new_tokens
            if self.max_positions and length > self.max_positions:
                raise PromptError(
                    f"prompt {number} needs {length} positions, but {self.name} has "
                    f"{self.max_positions}; shorten it by {length - self.max_positions} tokens."
                )
            if not self.has_images and "pixel_values" in prompt.inputs:
                raise PromptError(
                    f"prompt {number} carries an image, but {self.name} is a text model."
                )
        return found

    def _check_finite(
        self, logits: Optional[Tensor], prompt: Prompt, write: Sequence[Intervention]
    ) -> None:
        if logits is None or not torch.isnan(logits).any():
            return
        sites = [Site.parse("resid_post")]
        reads = Reads(sites, self.n_layers, 1)
        self._engine(self.lane).run(
            [prompt], [Edits(prompt, write, self.shape)], reads, lambda *_: [], lambda *_: [], [0]
        )
        layer = first_bad_layer(reads.finish()["resid_post"])
        where = f"layer {layer}" if layer is not None else "the unembedding"
        cause = "a written value" if write else f"the weights, or dtype {self.dtype}"
        raise NumericalError(
            f"NaN in the activations of {self.name}, first after {where}; the cause is {cause}. "
            "Check the values you write, or open the model with dtype='float32'."
        )


def _forced(tokens: Sequence[Sequence[int]], d_vocab: int) -> list[list[int]]:
    """Tokens to be fed after each prompt, checked."""
    found = [[int(token) for token in row] for row in tokens]
    if len({len(row) for row in found}) != 1:
        raise ValueError(
            "new_tokens must hold equally many tokens for every prompt; run prompts with answers of "
            "other lengths by themselves."
        )
    for row in found:
        for token in row:
            if not 0 <= token < d_vocab:
                raise OutOfRange(f"the new token {token} is not in the vocabulary, 0 to {d_vocab - 1}.")
    return found


def _batches(prompts: Sequence[Prompt], size: int) -> Iterable[list[int]]:
    """Numbers of prompts that can share a pass: equal length, equal shapes of further inputs."""
    groups: dict[Any, list[int]] = {}
    for number, prompt in enumerate(prompts):
        shapes = tuple(sorted((k, getattr(v, "shape", None)) for k, v in prompt.inputs.items()))
        groups.setdefault((len(prompt), shapes), []).append(number)
    for numbers in groups.values():
        for first in range(0, len(numbers), size):
            yield numbers[first : first + size]


