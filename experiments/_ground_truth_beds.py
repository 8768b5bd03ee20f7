"""What is planted in: random models of a few shapes, or copies of a given one."""

import copy
from typing import Any, Optional, SupportsFloat, SupportsIndex

import numpy as np
import torch
from torch import nn

from interp.core import ModelRefused, Prompt
from interp.models.model import Model
from interp.organisms.plant_horizon import as_inputs, picture_prompt, tiny_llava
from interp.organisms.random_llama import random_llama
from interp.organisms.surgery import embedding, image_token, projector_of

RANDOM = "random-weights"
VOCABULARY, BOS = 97, 1


class Bed:
    """Models to plant in: small random ones for None, else copies of the model that is given.

    A model is opened once for every shape; later ones only lend it their weights, since opening
    proves every site, which takes longer than all else.
    """

    def __init__(self, base: Optional[Model] = None) -> None:
        self.base = base
        self.name = RANDOM if base is None else base.name
        self._opened: dict[Any, Model] = {}

    def manifest(self) -> dict[str, Any]:
        """What was planted in."""
        return {"name": RANDOM, "model": RANDOM} if self.base is None else self.base.manifest()

    def text(
        self, rng: np.random.Generator, n_layers: SupportsIndex, width: SupportsIndex = 64,
        spread: SupportsFloat = 0.5,
    ) -> nn.Module:
        """A model that reads text; `spread` sizes random weights, so that the residual's norm stays
        near the embedding's (0.5) or attention becomes far from even (1.5)."""
        if self.base is not None:
            return self._decoder()
        return random_llama(rng, n_layers, width, spread, vocabulary=VOCABULARY, bos=BOS)

    def picture(
        self, rng: np.random.Generator, n_layers: SupportsIndex, *, width: SupportsIndex = 32,
        side: SupportsIndex = 4, spread: SupportsFloat = 1.0,
    ) -> nn.Module:
        """A LLaVA-like model. Raises `ModelRefused` where the given one is none."""
        if self.base is not None:
            hf: Any = self._decoder()
            if projector_of(hf) is None or image_token(hf) is None or not hasattr(
                    projector_of(hf), "linear_2") or type(hf).__name__ != (
                        "LlavaForConditionalGeneration"):
                raise ModelRefused(
                    f"{self.name} ({type(hf).__name__}) is no LLaVA with a projector of two layers, "
                    "and only in these can image tokens be marked exactly.")
            try:
                with torch.no_grad():
                    hf(**as_inputs(picture_prompt(hf, rng)), use_cache=False)
            except (ValueError, RuntimeError, AttributeError) as error:
                raise ModelRefused(
                    f"{self.name} does not read a picture as one token per patch, which the planted "
                    f"pictures are ({str(error).splitlines()[0].rstrip('.')}).") from None
            return hf
        made = tiny_llava(rng, n_layers=n_layers, heads=4, kv_heads=2, d_head=int(width) // 4,
                          side=side, bias=False)
        with torch.no_grad():
            for name, weight in made.get_decoder().named_parameters():
                if "norm" not in name and "embed" not in name:
                    weight.mul_(float(spread))
        return made

    def _decoder(self) -> Any:
        assert self.base is not None
        if self.base.kind != "decoder":
            raise ModelRefused(f"{self.name} is an encoder; plants need a decoder.")
        if getattr(self.base.hf, "config", None) is None:
            raise ModelRefused(f"{self.name} is no transformers model.")
        return self.base.hf

    def open(self, hf: nn.Module) -> Model:
        """The model opened, with the weights of `hf` until the next one is."""
        shapes = tuple((n, tuple(p.shape)) for n, p in hf.named_parameters())
        if self.base is not None or shapes not in self._opened:
            if self.base is not None:
                self._opened.clear()  # one copy of a large model at a time
            given = () if self.base is None else (self.base.tokenizer, self.base.processor)
            mine = hf if self.base is not None else copy.deepcopy(hf)
            self._opened[shapes] = Model(mine, f"{self.name}, planted", *given)
        opened: Any = self._opened[shapes]
        if opened.hf is not hf:
            opened.hf.load_state_dict(hf.state_dict())
        return opened

    def pictures(
        self, hf: nn.Module, rng: np.random.Generator, count: SupportsIndex,
        before: SupportsIndex = 3, after: SupportsIndex = 7,
    ) -> list[Prompt]:
        """Prompts of one length with smooth random pictures, whose neighboring patches look alike."""
        made = []
        for _ in range(int(count)):
            prompt = picture_prompt(hf, rng, before, after)
            pixels = prompt.inputs["pixel_values"]
            size = pixels.shape[-1]
            coarse = torch.from_numpy(rng.standard_normal((1, 3, 4, 4))).float()
            smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear").numpy()
            first = first_token(hf)
            ids = prompt.ids if first is None else (first, *prompt.ids[1:])
            made.append(Prompt(ids, prompt.segments, inputs={
                "pixel_values": smooth + 0.1 * np.asarray(pixels, dtype=np.float32)}))
        return made


def first_token(hf: nn.Module) -> Optional[int]:
    """What prompts begin with."""
    found = hf.config.get_text_config(decoder=True).bos_token_id
    return None if found is None else int(found)


def end_token(hf: nn.Module) -> int:
    """What ends a text. Raises `ModelRefused` where the model names nothing."""
    for owner in (getattr(hf, "generation_config", None), hf.config.get_text_config(decoder=True)):
        found = getattr(owner, "eos_token_id", None)
        if found is not None:
            return int(found[0] if isinstance(found, (list, tuple)) else found)
    raise ModelRefused("the model names no token that ends a text, so it cannot stop.")


def ordinary(hf: nn.Module, limit: SupportsIndex = 50_000) -> np.ndarray:
    """Tokens that mean nothing special."""
    text = hf.config.get_text_config(decoder=True)
    special = {image_token(hf)}
    for owner in (text, getattr(hf, "generation_config", None)):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            found = getattr(owner, name, None)
            special |= set(found) if isinstance(found, (list, tuple)) else {found}
    size = min(int(text.vocab_size), embedding(hf).shape[0], int(limit))
    return np.array([t for t in range(5, size) if t not in special])


def batched(prompts: list[Prompt]) -> dict[str, torch.Tensor]:
    """What a model's forward takes, for prompts of one length."""
    made = {"input_ids": torch.tensor([prompt.ids for prompt in prompts])}
    for name in prompts[0].inputs:
        made[name] = torch.cat([torch.as_tensor(prompt.inputs[name]) for prompt in prompts])
    return made
