"""What was planted, as data: the edited model, its twin, and where the phenomenon is."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Optional, SupportsIndex, Union

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from interp.core.result import write_atomically
from interp.organisms.surgery import Inputs, image_token, parts, projector_of

Kind = Literal["primary", "secondary", "massive", "visual"]
Rule = Literal["token", "first", "features"]


@dataclass(frozen=True, eq=False)
class Planted:
    """A model with a known phenomenon, the same model without it, and the truth.

    `layer` is the first block whose output shows it, `until` the first whose output no longer does
    (None: it lasts to the end); `norm` the residual's norm there. `direction` is a unit vector,
    sign included; `dims` and `values` are the coordinates and sizes of a planted coordinate set.
    `rule` says where it fires: at every occurrence of `tokens`, at the first position, or at image
    tokens whose vision features f have `f @ feature_direction > threshold`. `measured` holds
    what the check found; `moved` how far ordinary tokens moved, relative to the twin.
    """

    model: PreTrainedModel
    twin: PreTrainedModel
    kind: Kind
    layer: int
    until: Optional[int]
    norm: float
    direction: Float[Tensor, "d_model"]
    rule: Rule
    tokens: tuple[int, ...] = ()
    sign: int = 1
    dims: tuple[int, ...] = ()
    values: tuple[float, ...] = ()
    feature_direction: Optional[Float[Tensor, "d_vision"]] = None
    threshold: float = 0.0
    attract: float = 0.0
    measured: Mapping[str, float] = field(default_factory=dict)
    moved: Mapping[str, float] = field(default_factory=dict)
    before: Optional["Planted"] = None
    tag: Optional[Float[Tensor, "d_model"]] = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Blocks whose output shows the phenomenon."""
        n_layers = len(parts(self.model))
        return tuple(range(self.layer, n_layers if self.until is None else self.until))

    def truth_positions(
        self,
        prompt: Union[Sequence[SupportsIndex], np.ndarray, Tensor],
        features: Optional[Float[Tensor, "patch d_vision"]] = None,
    ) -> tuple[int, ...]:
        """Positions of a prompt (token ids) at which the phenomenon is planted.

        A secondary sink is a later token by definition: position 0 is never one. For image tokens
        give the vision features of the prompt's images, in order (see `image_features`).
        """
        ids = [int(token) for token in prompt]
        if self.rule == "first":
            return (0,)
        if self.rule == "token":
            start = 1 if self.kind == "secondary" else 0
            return tuple(i for i, t in enumerate(ids) if i >= start and t in self.tokens)
        places = [i for i, token in enumerate(ids) if token == image_token(self.model)]
        if features is None or len(features) != len(places):
            raise ValueError(
                f"the prompt has {len(places)} image tokens; give the vision features of each, "
                f"not {'none' if features is None else len(features)} (see image_features)."
            )
        assert self.feature_direction is not None
        fires = (features.to(self.feature_direction) @ self.feature_direction) > self.threshold
        return tuple(place for place, on in zip(places, fires.tolist()) if on)

    def describe(self) -> dict[str, Any]:
        """The truth as plain data; `before` lists what was planted earlier in the same model."""
        return {
            "kind": self.kind, "rule": self.rule, "tokens": list(self.tokens),
            "layer": self.layer, "until": self.until, "layers": list(self.layers),
            "norm": self.norm, "sign": self.sign, "direction": self.direction.tolist(),
            "dims": list(self.dims), "values": list(self.values), "attract": self.attract,
            "feature_direction": None if self.feature_direction is None
            else self.feature_direction.tolist(),
            "threshold": self.threshold, "measured": dict(self.measured),
            "moved": dict(self.moved),
            "before": [] if self.before is None
            else [*self.before.describe()["before"],
                  {k: v for k, v in self.before.describe().items() if k != "before"}],
        }  # fmt: skip

    def save(self, folder: Union[str, Path], processor: Any = None) -> Path:
        """Write the model so that it opens like any local model, and the truth as `planted.json`.

        `processor`: a tokenizer or processor to save beside the weights. The folder must not
        exist or must be an earlier save; it is replaced as a whole.
        """
        folder = Path(folder)
        if folder.exists() and any(folder.iterdir()) and not (folder / "planted.json").exists():
            raise FileExistsError(f"{folder} holds something else; choose an empty folder.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
        try:
            self.model.save_pretrained(new)
            if processor is not None:
                processor.save_pretrained(new)
            write_atomically(new / "planted.json", json.dumps(self.describe()) + "\n")
            new.chmod(0o755)
            old = new.with_name(new.name + ".old")
            if folder.exists():
                os.replace(folder, old)
            os.replace(new, folder)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        return folder


Base = Union[PreTrainedModel, Planted]
"""What a plant starts from: a model, or what an earlier plant returned."""


def chain(planted: Optional[Planted]) -> list[Planted]:
    """This plant and those before it in the same model, latest first."""
    found = []
    while planted is not None:
        found.append(planted)
        planted = planted.before
    return found


def image_features(model: PreTrainedModel, inputs: Inputs) -> Float[Tensor, "image patch d_vision"]:
    """What enters the projector: one feature vector per image token, image by image.

    Example:
        >>> from interp.organisms.families import visual_family
        >>> case = next(visual_family(np.random.default_rng(0), d_model=64))
        >>> image_features(case.planted.model, case.images).shape
        torch.Size([4, 36, 24])
    """
    seen: list[Tensor] = []
    projector = projector_of(model)
    handle = projector.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    try:
        with torch.no_grad():
            model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return seen[0]
