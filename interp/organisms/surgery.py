"""Exact surgery on a transformer: its parts by name, its streams by hook, and room in it.

`make_room` widens a model by residual coordinates and MLP units that are zero everywhere. The
function of the model stays the same: RMSNorm over more coordinates is undone by its gain and
epsilon. Models with LayerNorm get the MLP units only, since a wider mean would be another function.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from interp.core.errors import ModelRefused

Inputs = Mapping[str, Tensor]
"""What the model's forward takes: `input_ids` [prompt, position], for images `pixel_values`."""

GATED_UNITS, PLAIN_UNITS = 8, 2
"""Hidden units that one switch takes, with and without a gate."""

_READERS = (("gate_proj", "up_proj"), ("c_fc",), ("dense_h_to_4h",), ("fc1",))
_WRITERS = ("down_proj", "c_proj", "dense_4h_to_h", "fc2")
_ACTS = ("act_fn", "act", "activation_fn")
_ATTENTIONS = ("self_attn", "attn", "attention")
_ATTENTION_WRITERS = ("o_proj", "c_proj", "dense", "out_proj")


@dataclass(frozen=True)
class Part:
    """One block, its attention, and the matrices of its MLP: one reader, or gate and up."""

    # modules whose attributes differ by architecture: Any, since a Module's attributes are unknown
    block: Any
    attention: Any
    readers: tuple[Any, ...]
    writer: Any
    act: Callable[[Tensor], Tensor]

    @property
    def gated(self) -> bool:
        return len(self.readers) == 2

    @property
    def units(self) -> int:
        """Hidden units that one switch takes here."""
        return GATED_UNITS if self.gated else PLAIN_UNITS


def _first(module: Any, names: Sequence[str]) -> Any:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def parts(model: PreTrainedModel) -> list[Part]:
    """The decoder's blocks in order. Raises `ModelRefused` where an MLP is not of a known form.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2))
        >>> [part.gated for part in parts(model)]
        [False, False]
    """
    decoder: Any = model.get_decoder()
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    blocks: Any = next(
        (m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == count), ()
    )
    found = []
    for block in blocks:
        mlp = block.mlp if hasattr(block, "mlp") else block
        names = next((names for names in _READERS if all(hasattr(mlp, n) for n in names)), ())
        attention, writer = _first(block, _ATTENTIONS), _first(mlp, _WRITERS)
        act = _first(mlp, _ACTS)
        if not names or attention is None or writer is None or not callable(act):
            break
        readers = tuple(getattr(mlp, name) for name in names)
        if len(readers) == 1 and readers[0].bias is None:
            break
        found.append(Part(block, attention, readers, writer, cast(Any, act)))
    if len(found) != count:
        raise ModelRefused(
            f"cannot plant in {type(model).__name__}: the MLP of block {len(found)} is neither "
            "gate_proj/up_proj/down_proj nor two layers with biases. Plant in a model of the "
            "Llama, Mistral, Qwen2, Qwen3, GPT-2, GPT-NeoX or OPT kind."
        )
    return found


def matrix(module: Any) -> Tensor:
    """The weight as a view [out, in]; GPT-2's Conv1D stores its transpose."""
    return module.weight.T if type(module).__name__ == "Conv1D" else module.weight


def embedding(model: PreTrainedModel) -> Tensor:
    """The input embedding [vocabulary, d_model]."""
    table: Any = model.get_input_embeddings()
    return table.weight


def projector_of(model: PreTrainedModel) -> Any:
    """The projector from vision to text of a LLaVA-like model; None for others."""
    return getattr(model.base_model, "multi_modal_projector", None)


def writers(model: PreTrainedModel) -> list[Tensor]:
    """Views [..., d_model] of every weight and bias that adds to the residual stream."""
    found = [embedding(model)]
    positions = position_table(model)
    if positions is not None:
        found.append(positions[0])
    ends = []
    for part in parts(model):
        ends += [_first(part.attention, _ATTENTION_WRITERS), part.writer]
    projector = projector_of(model)
    if projector is not None:
        ends.append(projector.linear_2)
    for end in ends:
        if end is None:
            raise ModelRefused(f"cannot tell what attention writes in {type(model).__name__}.")
        found.append(matrix(end).T)
        if end.bias is not None:
            found.append(end.bias)
    return [view.detach() for view in found]


def position_table(model: PreTrainedModel) -> Optional[tuple[Tensor, int]]:
    """The learned position embeddings and the row of position 0; None where there are none."""
    decoder: Any = model.get_decoder()
    table = _first(decoder, ("wpe", "embed_positions"))
    if not isinstance(table, nn.Embedding):
        return None
    return table.weight, int(getattr(table, "offset", 0))


# ---------------------------------------------------------------------------------- running


@dataclass
class Record:
    """What one forward pass showed; every tensor is [prompt, position, ...], by block."""

    embed: Tensor
    post: list[Tensor]
    mlp_in: list[Tensor]
    hidden: list[Tensor]
    logits: Tensor
    norms: list[Optional[nn.Module]] = field(default_factory=list)
    closed: list[float] = field(default_factory=list)


def _tensor(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


# Hooks are partials of these: a function defined anew for every block would be checked anew
# by beartype for every block, which takes longer than the forward pass.
def _keep(
    seen: dict, key: tuple, entering: bool, _: nn.Module, args: tuple, kwargs: dict, output: Any
) -> None:
    if entering:
        value = args[0] if args else kwargs["hidden_states"]
    else:
        value = _tensor(output)
    seen[key] = value.detach()


def keep_norm(norms: dict, index: int, module: nn.Module, _: tuple, output: Any) -> None:
    """Forward hook that notes a norm and what it made under the block's index."""
    norms.setdefault(index, []).append((module, _tensor(output).detach()))


def record(model: PreTrainedModel, inputs: Inputs, anatomy: bool = False) -> Record:
    """Run the model and keep each block's output, MLP input and MLP hidden units.

    With `anatomy` it also finds the norm in front of each MLP (the one whose output the MLP
    reads), and by how much block input + attention + MLP misses the block's output.
    """
    found = parts(model)
    seen: dict[tuple[int, str], Any] = {}
    norms: dict[int, list[tuple[nn.Module, Tensor]]] = {}
    handles = []

    try:
        for i, part in enumerate(found):
            for module, name, side in (
                (part.block, "pre", "input"), (part.block, "post", "output"),
                (part.readers[0], "in", "input"), (part.writer, "hidden", "input"),
                (part.writer, "mlp", "output"), (part.attention, "attention", "output"),
            ):  # fmt: skip
                keep = functools.partial(_keep, seen, (i, name), side == "input")
                handles.append(module.register_forward_hook(keep, with_kwargs=True))
            if anatomy:
                for module in part.block.children():
                    if "Norm" in type(module).__name__:
                        keep = functools.partial(keep_norm, norms, i)
                        handles.append(module.register_forward_hook(keep))
        with torch.no_grad():
            output: Any = model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    shape = seen[0, "post"].shape[:2]

    post, entering, hidden = (
        [seen[i, name].reshape(*shape, -1) for i in range(len(found))]
        for name in ("post", "in", "hidden")
    )
    result = Record(seen[0, "pre"], post, entering, hidden, output.logits.detach())
    if anatomy:
        for i in range(len(found)):
            whole = seen[i, "pre"] + seen[i, "attention"] + seen[i, "mlp"].reshape(*shape, -1)
            gap = (whole - seen[i, "post"]).norm() / seen[i, "post"].norm()
            result.closed.append(float(gap))
            result.norms.append(next(
                (m for m, made in norms.get(i, ())
                 if torch.equal(made.reshape(*shape, -1), result.mlp_in[i])), None,
            ))  # fmt: skip
    return result


def residuals(
    model: PreTrainedModel, inputs: Inputs, entering: bool = False
) -> Float[Tensor, "prompt layer position d_model"]:
    """The output of every block, before the final norm; with `entering` the input of every block.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=4))
        >>> residuals(model, {"input_ids": torch.tensor([[1, 2, 3]])}).shape
        torch.Size([1, 2, 3, 8])
    """
    seen = record(model, inputs)
    layers = [seen.embed, *seen.post[:-1]] if entering else seen.post
    return torch.stack(layers, 1)


@dataclass(frozen=True)
class Norm:
    """The affine part of the norm in front of an MLP, and whether it removes the mean."""

    gain: Tensor
    shift: Tensor
    centers: bool


def read_norm(module: nn.Module, width: int) -> Norm:
    """Measure gain and shift of a norm by feeding it vectors of known normal form."""
    probe = torch.ones(width, dtype=torch.float64)
    probe[1::2] = -1.0  # mean 0, mean square 1
    weight = next(module.parameters())
    probe = probe.to(weight)
    big = 1e3  # beats any epsilon
    with torch.no_grad():
        up, down = module(big * probe), module(-big * probe)
        flat = module(big * torch.ones_like(probe))
    gain, shift = (up - down) / 2 * probe, (up + down) / 2
    return Norm(gain, shift, bool((flat - shift).norm() < 1e-3 * gain.norm()))


# -------------------------------------------------------------------------------------- room


def spare_units(part: Part) -> Tensor:
    """Hidden units of an MLP whose weights are all zero."""
    used = matrix(part.writer).detach().abs().sum(0)
    for reader in part.readers:
        used = used + matrix(reader).detach().abs().sum(1)
        if reader.bias is not None:
            used = used + reader.bias.detach().abs()
    return (used == 0).nonzero().flatten()


def free_axes(model: PreTrainedModel) -> list[int]:
    """Coordinates of the residual stream that nothing in the model ever writes."""
    used = sum(view.abs().reshape(-1, view.shape[-1]).sum(0) for view in writers(model))
    return (used == 0).nonzero().flatten().tolist()  # type: ignore[union-attr]


def make_room(
    model: PreTrainedModel, directions: int = 1, units: Optional[int] = None
) -> PreTrainedModel:
    """A copy with at least so many free residual axes and spare MLP units; same function.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=24))
        >>> wider, ids = make_room(model), torch.tensor([[1, 2, 3]])
        >>> len(free_axes(model)), len(free_axes(wider)), wider.config.hidden_size
        (0, 2, 18)
        >>> torch.allclose(model(ids).logits, wider(ids).logits, atol=1e-5)
        True

    The width grows by a multiple of the number of heads (configurations demand it). Input and
    output embeddings are untied, since a tag goes into the input alone. With LayerNorm only the
    MLP grows: a wider mean would be another function.

    Raises `ModelRefused` for half precision, unknown MLPs, norms after the MLP, or if the wider
    model does not compute the same.
    """
    if model.dtype not in (torch.float32, torch.float64):
        raise ModelRefused(
            f"cannot plant exactly in {model.dtype}: open the model in float32 (convert it "
            "afterwards if you must; the planted margins hold for float32)."
        )
    found = parts(model)
    probe = {"input_ids": torch.arange(5)[None] % len(embedding(model))}
    _avoid_images(model, probe)
    with _evaluating(model):
        before = record(model, {k: v.to(model.device) for k, v in probe.items()}, anatomy=True)
    if None in before.norms or max(before.closed) > 1e-4:
        raise ModelRefused(
            f"cannot plant in {type(model).__name__}: what its MLPs write is normed or scaled "
            "before it is added, so no fixed vector can be written."
        )
    width = before.embed.shape[-1]
    centers = read_norm(before.norms[0], width).centers  # type: ignore[arg-type]
    heads = model.config.get_text_config(decoder=True).num_attention_heads
    need = found[0].units * 2 if units is None else units
    extra_units = max(0, need - min(len(spare_units(part)) for part in found))
    extra, step = 0, math.lcm(heads, 2)
    if not centers:
        extra = step * math.ceil(max(0, directions - len(free_axes(model))) / step)
    # a configuration that ties the width of a head to the model's cannot grow; units still can
    for more in dict.fromkeys((extra, 0)):
        try:
            wider = _padded(model, more, extra_units)
            after = record(wider, {k: v.to(model.device) for k, v in probe.items()})
        except (ValueError, RuntimeError):
            continue
        if float((after.logits - before.logits).norm() / before.logits.norm()) < 1e-4:
            return wider
    raise ModelRefused(
        f"cannot make room in {type(model).__name__}: a wider copy does not compute the same."
    )


def _avoid_images(model: PreTrainedModel, inputs: dict[str, Tensor]) -> None:
    """Keep image placeholders out of a text-only prompt."""
    image = image_token(model)
    if image is not None:
        spare = 0 if image != 0 else 1
        ids = inputs["input_ids"]
        inputs["input_ids"] = torch.where(ids == image, torch.full_like(ids, spare), ids)


def image_token(model: PreTrainedModel) -> Optional[int]:
    """The id that stands for an image token in `input_ids`; None for a text model."""
    for name in ("image_token_id", "image_token_index"):
        value = getattr(model.config, name, None)
        if value is not None:
            return int(value)
    return None


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _padded(model: PreTrainedModel, extra: int, units: int) -> PreTrainedModel:
    """The model with the old weights in the leading block of wider ones, zeros elsewhere."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config(decoder=True)
    width = text.hidden_size
    gain = math.sqrt(width / (width + extra))
    config.tie_word_embeddings = text.tie_word_embeddings = False
    if units:
        name = next(n for n in ("intermediate_size", "n_inner", "ffn_dim") if hasattr(text, n))
        setattr(text, name, matrix(parts(model)[0].readers[0]).shape[0] + units)
    if extra:
        text.head_dim = int(parts(model)[0].attention.head_dim)  # type: ignore[arg-type]
        text.hidden_size = width + extra
        text.rms_norm_eps = text.rms_norm_eps * width / (width + extra)
    new: Any = type(model)(config)
    wider = new.to(dtype=model.dtype, device=model.device).eval()
    norms = {name for name, module in wider.named_modules() if "Norm" in type(module).__name__}
    old = dict(model.state_dict())
    with torch.no_grad():
        for name, weight in wider.state_dict(keep_vars=True).items():
            value = old[name]
            if weight.shape == value.shape:
                weight.data.copy_(value)
                continue
            weight.data.zero_()
            weight.data[tuple(slice(0, size) for size in value.shape)] = value
            owner, _, kind = name.rpartition(".")
            if owner in norms and kind == "weight":
                # RMS over more coordinates, all zero: larger by sqrt(new/old) after the division
                weight.data.mul_(gain)
                weight.data[value.shape[0]:] = gain
    return wider
