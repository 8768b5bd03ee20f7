"""A model of the same architecture that has learned nothing: the null of whatever was trained."""

import copy
from typing import Any, SupportsIndex

import torch
from torch import nn

from interp.core.errors import ModelRefused
from interp.models.model import Model


def reinitialized(model: Model, seed: SupportsIndex = 0) -> Model:
    """The same architecture and config with weights as they are before training.

    Example:
        >>> import interp
        >>> trained = interp.open_model("backcopy-1l")
        >>> null = reinitialized(trained, seed=1)
        >>> null.n_layers == trained.n_layers, null.name
        (True, 'backcopy-1l, reinitialized (seed 1)')

    Every weight is drawn again by the architecture's own initialization, a vision encoder's too;
    tokenizer and processor are shared, so prompts of the one are prompts of the other. The model
    that is given stays as it was; this is a second one in memory, of the same dtype and device.
    The same seed gives the same weights, and the global random state is left alone.

    Raises:
        ModelRefused: the class cannot be made from its config alone.
    """
    made = _placed(redrawn(model.hf, seed), model)
    source = {**model.source, "reinitialized": True, "seed": int(seed)}
    name = f"{model.name}, reinitialized (seed {int(seed)})"
    return Model(made, name, model.tokenizer, model.processor, model.lane, source)


def redrawn(hf: nn.Module, seed: SupportsIndex = 0) -> nn.Module:
    """The module itself with fresh weights, on the CPU; what `reinitialized` opens.

    Raises:
        ModelRefused: the class cannot be made from its config alone, or not all of its parameters.
    """
    config: Any = copy.deepcopy(hf.config)
    if hasattr(config, "quantization_config"):
        # What is drawn at random has no quantized form; the null is computed in full.
        del config.quantization_config
    given = next(hf.parameters()).dtype
    dtype = given if given.is_floating_point else torch.get_default_dtype()
    # Drawn on the CPU, so that a seed means the same weights on every machine.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed))
        made = _from_config(type(hf), config, dtype).to(dtype)
    _check_drawn(made, hf)
    return made.eval()


def _from_config(cls: type, config: Any, dtype: torch.dtype) -> nn.Module:
    try:
        if hasattr(cls, "_from_config"):
            return cls._from_config(config, dtype=dtype)
        return cls(config)
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        first = " ".join(str(error).split()).split(". ")[0].rstrip(".")[:200]
        raise ModelRefused(
            f"{cls.__name__} cannot be made from its config alone ({first}), so it has no randomly "
            "initialized twin."
        ) from error


def _check_drawn(made: nn.Module, hf: nn.Module) -> None:
    """The same parameters, all of them numbers: a class may leave some as memory happened to be."""
    own = {name: weight.shape for name, weight in made.named_parameters()}
    given = {name: weight.shape for name, weight in hf.named_parameters()}
    other = sorted(name for name in {*own, *given} if own.get(name) != given.get(name))
    if other and not hasattr(hf.config, "quantization_config"):
        raise ModelRefused(
            f"the parameter {other[0]!r} is not the same in this model and in a fresh "
            f"{type(made).__name__}, so there is no randomly initialized twin."
        )
    bad = [name for name, weight in made.named_parameters() if not torch.isfinite(weight).all()]
    if bad:
        raise ModelRefused(
            f"{type(made).__name__} leaves {bad[0]!r} uninitialized, so there is no randomly "
            "initialized twin."
        )


def _placed(made: nn.Module, model: Model) -> nn.Module:
    spread = getattr(model.hf, "hf_device_map", None)
    if spread is None or len(set(spread.values())) < 2:
        return made.to(model.device)
    from accelerate import dispatch_model

    return dispatch_model(made, device_map=dict(spread))
