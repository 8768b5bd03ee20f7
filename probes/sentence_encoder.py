"""Sentence embeddings of any model, pooled as its own sentence-transformers files say.

Sources   arXiv:1908.10084 (mean pooling), the `modules.json` and `1_Pooling/config.json` of a model
"""

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import numpy as np
import torch
from huggingface_hub import try_to_load_from_cache
from jaxtyping import Float
from torch import Tensor

from interp.core.errors import PromptError

Pooling = Literal["mean", "cls", "last", "max"]
Precision = Literal["model", "bfloat16"]
FILES = ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")


class SentenceEncoder:
    """A model as a function from sentences to vectors.

    Example:
        >>> import interp
        >>> encoder = SentenceEncoder(interp.open_model("all-minilm-l6-v2"))
        >>> encoder.pooling, encoder.normalize, encoder.max_tokens
        ('mean', True, 256)
        >>> near, far = encoder.encode(["A dog.", "A puppy.", "The tax law."]) @ encoder.encode(
        ...     ["A dog."])[0] > 0.5, None
        >>> near.tolist()
        [True, True, False]

    Attributes:
        pooling: "mean" over all positions, the first ("cls"), the "last", or the "max"; from the
            model's files, else "mean" for an encoder and "last" for a decoder.
        normalize: whether vectors have unit length. max_tokens: longer texts are cut there.
        configured: whether the model's own files decided.

    Args:
        precision: "bfloat16" computes with a copy of the weights in that type (for screening).
        budget: positions per batch. Only texts of equal length share one, so nothing is padded.

    Raises:
        PromptError: a model without a tokenizer.
    """

    def __init__(
        self, model: Any, *, pooling: Optional[Pooling] = None, normalize: Optional[bool] = None,
        max_tokens: Optional[int] = None, precision: Precision = "model", budget: int = 4096,
    ) -> None:
        if model.tokenizer is None:
            raise PromptError(f"{model.name!r} has no tokenizer, so it cannot read sentences.")
        self.model, self.tokenizer, self.budget = model, model.tokenizer, int(budget)
        modules, pool, limits = (_file(model, name) for name in FILES)
        self.configured = pool is not None
        named = [str(module.get("type", "")) for module in modules or []]
        self.pooling: Pooling = pooling or _pooling(pool, model.kind)
        self.normalize = normalize if normalize is not None else (
            any("Normalize" in name for name in named) if modules else True)
        self.lower = bool((limits or {}).get("do_lower_case", False))
        known = [(limits or {}).get("max_seq_length"), model.max_positions,
                 getattr(self.tokenizer, "model_max_length", None)]
        self.max_tokens = max_tokens or next((int(n) for n in known if n and n < 10**6), None)
        self.precision: Precision = precision
        base = getattr(model.hf, "base_model", model.hf)
        if precision == "bfloat16" and model.dtype == torch.float32:
            base = copy.deepcopy(base).to(torch.bfloat16)
        self._base = base

    def settings(self) -> dict[str, Any]:
        """What the vectors depend on, apart from the weights."""
        return {"pooling": self.pooling, "normalize": self.normalize, "lower": self.lower,
                "max_tokens": self.max_tokens, "precision": self.precision,
                "dtype": str(self.model.dtype)}

    def ids(self, texts: Iterable[str]) -> list[list[int]]:
        """The tokens of every text, with the special ones, cut at `max_tokens`."""
        clean = [text.strip() for text in texts]
        if self.lower:
            clean = [text.lower() for text in clean]
        cut: dict[str, Any] = {} if self.max_tokens is None else {
            "truncation": True, "max_length": self.max_tokens}
        return self.tokenizer(clean, **cut)["input_ids"] if clean else []

    def encode(self, texts: Iterable[str]) -> Float[np.ndarray, "sentence d_model"]:
        """Vectors of texts, float32."""
        return self.embed(self.ids(texts))

    @torch.inference_mode()
    def embed(self, ids: Sequence[Sequence[int]]) -> Float[np.ndarray, "sentence d_model"]:
        """Vectors of token sequences; equal sequences are computed once.

        Raises `PromptError` where a text has no tokens.
        """
        rows: dict[tuple[int, ...], int] = {}
        where = [rows.setdefault(tuple(one), len(rows)) for one in ids]
        lengths: dict[int, list[tuple[int, ...]]] = {}
        for one in rows:
            lengths.setdefault(len(one), []).append(one)
        if 0 in lengths:
            raise PromptError("a text has no tokens, so it has no embedding; leave it out.")
        made: Optional[np.ndarray] = None
        for length, group in sorted(lengths.items()):
            size = max(1, self.budget // length)
            for start in range(0, len(group), size):
                part = group[start : start + size]
                tokens = torch.tensor(part, device=self.model.device)
                vectors = self._pooled(self._base(input_ids=tokens).last_hidden_state)
                if made is None:
                    made = np.empty((len(rows), vectors.shape[-1]), dtype=np.float32)
                made[[rows[one] for one in part]] = vectors.cpu().numpy()
        if made is None:
            return np.zeros((0, self.model.d_model), dtype=np.float32)
        return made[where]

    def _pooled(self, states: Tensor) -> Tensor:
        states = states.float()
        if self.pooling == "mean":
            states = states.mean(1)
        elif self.pooling == "max":
            states = states.amax(1)
        else:
            states = states[:, 0 if self.pooling == "cls" else -1]
        return torch.nn.functional.normalize(states, dim=-1) if self.normalize else states


def _pooling(config: Optional[dict[str, Any]], kind: str) -> Pooling:
    if config is None:
        return "mean" if kind == "encoder" else "last"
    names: dict[str, Pooling] = {
        "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last",
        "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean"}
    chosen: list[Pooling] = [kind for name, kind in names.items() if config.get(name)]
    if len(chosen) != 1:
        said = [name for name, value in config.items() if name.startswith("pooling_mode") and value]
        raise PromptError(
            f"the model pools by {', '.join(said) or 'nothing'}, which is not one of mean, cls, last "
            "or max; choose one with pooling=."
        )
    return chosen[0]


def _file(model: Any, name: str) -> Any:
    """One of the files beside the weights, as JSON; None where there is none."""
    said = str(getattr(model.config, "_name_or_path", "") or "")
    path = Path(said) / name
    if not path.is_file():
        if not said or said.count("/") != 1 or said.startswith((".", "/")):
            return None
        found = try_to_load_from_cache(said, name, revision=model.source.get("revision"))
        if not isinstance(found, str):
            return None
        path = Path(found)
    return json.loads(path.read_text())
