"""Opening the processor of a vision-language model: what turns pictures and text into tokens."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional, Union

from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.auto import processing_auto

UNREADABLE = (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError)
PROCESSORS: dict[str, str] = processing_auto.PROCESSOR_MAPPING_NAMES  # pyright: ignore
PARTS = {"image_processor", "tokenizer", "video_processor"}


def load_processor(path_or_name: Union[str, Path], **hub: Any) -> Optional[Any]:
    """The processor of a vision-language model in a folder or on the hub, None for a text model.

    Example:
        >>> load_processor("no/such/folder/here") is None
        True

    `hub` is passed on (`revision`, `token`, `local_files_only`, `trust_remote_code`, ...). See
    `load_processor_for`.
    """
    try:
        config = AutoConfig.from_pretrained(path_or_name, **hub)
    except (OSError, ValueError):
        return None
    return load_processor_for(config, path_or_name, None, hub)


def load_processor_for(
    config: Any, where: Union[str, Path], tokenizer: Any, given: Mapping[str, Any]
) -> Optional[Any]:
    """The processor that belongs to a configuration, or None for a text model.

    Example:
        >>> from transformers import GPT2Config
        >>> load_processor_for(GPT2Config(), ".", None, {}) is None
        True

    `given` holds hub options as for `from_pretrained`; `tokenizer`, where it is already open,
    saves opening it again.

    Nothing is installed. Processors of the Qwen2-VL kind also hold a video processor, which needs
    torchvision; where that is missing, the same processor class is assembled from its image
    processor (the PIL variant) and tokenizer, with None for the video part: images and text work
    as ever, videos do not, nor does `save_pretrained`. A vision-language model whose processor
    cannot be opened gives None and a warning with the reason: text prompts still work, and images
    raise `ProcessorMissing`.
    """
    sees = getattr(config, "vision_config", None) is not None
    if not sees and config.model_type not in PROCESSORS:
        return None
    found, reason = None, "its folder holds a tokenizer, but no image processor"
    try:
        found = AutoProcessor.from_pretrained(where, **given)
    except UNREADABLE as error:
        reason = str(error)
        if isinstance(error, ImportError):
            found = _without_video(config, where, tokenizer, given)
    if getattr(found, "image_processor", None) is not None:
        return found
    if sees:
        warnings.warn(
            f"the image processor of {where} cannot be opened ({' '.join(reason.split())[:200]}); "
            "text prompts work, images do not.",
            stacklevel=2,
        )
    return None


def _without_video(
    config: Any, where: Union[str, Path], tokenizer: Any, given: Mapping[str, Any]
) -> Any:
    name = PROCESSORS.get(config.model_type)
    try:
        of_model: Any = processing_auto.processor_class_from_name(name) if name else None
        if of_model is None or set(of_model.get_attributes()) != PARTS:
            return None

        def check(self: Any, part: str, part_given: Any) -> Any:
            if part == "video_processor" and part_given is None:
                return None
            return super(without_video, self).check_argument_for_proper_class(part, part_given)

        without_video: Any = type(
            of_model.__name__, (of_model,),
            {"check_argument_for_proper_class": check, "__module__": of_model.__module__},
        )
        settings, more = of_model.get_processor_dict(where, **given)
        parts = {
            "image_processor": AutoImageProcessor.from_pretrained(where, **given),
            "tokenizer": tokenizer or AutoTokenizer.from_pretrained(where, **given),
            "video_processor": None,
        }
        given_parts = [parts[part] for part in of_model.get_attributes()]
        return without_video.from_args_and_dict(given_parts, settings, **more)
    except UNREADABLE:
        return None
