"""All lanes over one tiny model, and the plain transformers model as an independent reference."""

import copy
import functools

import numpy as np
import pytest
import torch

import interp
from interp.models.model import LANES, Model

IMAGE, START, END = 96, 94, 93
"""Token ids of the tiny models' image placeholder and of Qwen's marks around it."""


@pytest.fixture(scope="session")
def lanes(tiny):
    """architecture -> {"hf": model, "bridge": model, "nnsight": model}, opened once."""

    @functools.cache
    def opened(architecture: str) -> dict[str, Model]:
        model = Model(tiny(architecture), f"tiny-{architecture}")
        return {lane: model if lane == "hf" else model.using(lane) for lane in LANES}

    return opened


class Reference:
    """Plain transformers with eager attention; `cut` hides edges in one layer through its mask."""

    def __init__(self, hf: torch.nn.Module) -> None:
        self.hf = copy.deepcopy(hf)
        self.hf.set_attn_implementation("eager")
        text = [
            module for name, module in self.hf.named_modules()
            if isinstance(module, torch.nn.ModuleList) and "vis" not in name and len(module) == 3
        ]
        (self.blocks,) = text
        self.cut: dict[int, list[tuple[list[int], list[int], list[int]]]] = {}
        for layer, block in enumerate(self.blocks):
            for name, module in block.named_modules():
                if name.split(".")[-1] in ("attn", "self_attn", "attention", "self"):
                    module.register_forward_pre_hook(self._hide(layer), with_kwargs=True)

    def _hide(self, layer):
        def hide(x):
            if not (isinstance(x, torch.Tensor) and x.ndim == 4):
                return x
            x = x.expand(x.shape[0], 6, -1, -1).clone()
            for heads, queries, keys in self.cut.get(layer, ()):
                x[:, torch.tensor(heads)[:, None, None], torch.tensor(queries)[:, None],
                  torch.tensor(keys)] = float("-inf")
            return x

        def before(_, args, kwargs):
            if layer in self.cut:
                return tuple(map(hide, args)), {k: hide(v) for k, v in kwargs.items()}
            return None

        return before

    def run(self, prompt: interp.Prompt) -> dict[str, np.ndarray]:
        """Logits, residual streams around every block, and attention, for one prompt."""
        last = []
        handle = self.blocks[-1].register_forward_hook(
            lambda _, args, out: last.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        inputs = {k: torch.as_tensor(v) for k, v in prompt.inputs.items()}
        if self.cut and "Bert" in type(self.hf).__name__:
            # Encoders make no mask of their own where everything is visible.
            inputs["attention_mask"] = torch.zeros(1, 1, len(prompt), len(prompt))
        try:
            with torch.no_grad():
                out = self.hf(input_ids=torch.tensor([prompt.ids]), output_hidden_states=True,
                              output_attentions=True, use_cache=False, **inputs)
        finally:
            handle.remove()
        before = [h[0].numpy() for h in out.hidden_states[:3]]
        return {
            "logits": out.logits[0].numpy(),
            "resid_pre": np.stack(before),
            "resid_post": np.stack([*before[1:], last[0][0].numpy()]),
            "pattern": np.stack([a[0].numpy() for a in out.attentions]),
        }


@pytest.fixture(scope="session")
def plain(tiny):
    """architecture -> `Reference`, made once; a test that sets `cut` empties it again."""
    return functools.cache(lambda architecture: Reference(tiny(architecture)))


def tokens(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 90, length).tolist()


@pytest.fixture(scope="session")
def text_prompt():
    """(seed, length) -> a prompt of ordinary tokens."""
    return lambda seed, length: interp.Prompt.from_tokens(tokens(seed, length))


@pytest.fixture(scope="session")
def image_prompt():
    """(architecture, seed) -> a prompt with one picture, made by hand."""

    def made(architecture: str, seed: int = 0) -> interp.Prompt:
        rng = np.random.default_rng(seed)
        if architecture == "llava":
            # 24 x 24 pixels in patches of 8: 9 tokens, the class token left out.
            ids = [*tokens(seed, 3), *[IMAGE] * 9, *tokens(seed + 1, 5)]
            inputs = {"pixel_values": rng.standard_normal((1, 3, 24, 24)).astype(np.float32)}
            segments = {"image": (3, 12)}
        else:
            # 4 x 6 patches of 4 x 4 pixels (twice, in time), merged two by two: 6 tokens.
            ids = [*tokens(seed, 3), START, *[IMAGE] * 6, END, *tokens(seed + 1, 5)]
            inputs = {
                "pixel_values": rng.standard_normal((24, 3 * 2 * 4 * 4)).astype(np.float32),
                "image_grid_thw": np.array([[1, 4, 6]]),
                "mm_token_type_ids": np.array([[int(i == IMAGE) for i in ids]]),
            }
            segments = {"image": (4, 10)}
        prompt = interp.Prompt.from_tokens(ids, segments=segments)
        return interp.Prompt(prompt.ids, prompt.segments, inputs=inputs)

    return made
