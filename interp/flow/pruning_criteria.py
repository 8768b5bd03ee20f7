"""Criteria by which papers prune image tokens, in one table.

Paper     one per row of the table; compared with random tokens in arXiv:2512.07580
Question  Which image tokens may go?
Measure   every criterion gives the tokens that it keeps, from `Evidence` of one prompt
Cause     `interp.flow.pruning` removes the others and looks at the answer

Numbers of blocks that papers fix for one architecture are kept as shares of the depth.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Optional, SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core import OutOfRange, PromptError
from interp.flow import pruning_by_attention as attention
from interp.flow import pruning_by_diversity as diversity
from interp.flow import pruning_by_encoder as encoder
from interp.flow.pruning_by_attention import top
from interp.flow.pruning_evidence import Evidence

Where = Literal["before the language model", "entering a block", "cache of a head", "once, all"]
Family = Literal["random", "attention", "encoder", "diversity", "states"]
Score = Callable[[Evidence, int], Float[Tensor, "token"]]
Choice = Callable[[Evidence, int, int, np.random.Generator], tuple[int, ...]]


@dataclass(frozen=True)
class Criterion:
    """One row of the table.

    Attributes:
        needs: what it reads, in words. first: the earliest block that it can be applied before.
        positions: what the public code does with position ids ("keep", "compact", "as host", or ""
            where no code is known). provenance: "code", "paper" or "secondary", of the formula.
        score: `[token]` for a block, None where it is a procedure; choice: kept tokens, as numbers
            among those that are left.
    """

    name: str
    family: Family
    needs: str
    where: Where
    positions: str
    provenance: str
    source: str
    score: Optional[Score] = None
    choice: Optional[Choice] = None
    first: int = 0

    def keep(
        self, evidence: Evidence, layer: SupportsIndex, number: SupportsIndex,
        rng: Optional[np.random.Generator] = None,
    ) -> tuple[int, ...]:
        """Positions of the `number` image tokens that it keeps when others go before block `layer`.

        Raises:
            OutOfRange: more than there are, or a block too early for it.
            PromptError, ModelRefused: the prompt or the model lacks what it reads, in one sentence.
        """
        at, count = int(layer), int(number)
        if not 0 <= count <= len(evidence.tokens):
            raise OutOfRange(f"cannot keep {count} of {len(evidence.tokens)} image tokens.")
        if at < self.first:
            raise OutOfRange(f"{self.name} reads the block before, so it cannot prune before block "
                             f"{at}; begin with block {self.first}.")
        if not 0 <= at < evidence.base.n_layers:
            raise OutOfRange(
                f"layer {at} does not exist: there are 0 to {evidence.base.n_layers - 1}.")
        if self.choice is not None:
            drawn = np.random.default_rng(0) if rng is None else rng
            chosen = self.choice(evidence, at, count, drawn)
        elif self.score is not None:
            chosen = top(self.score(evidence, at), count)
        else:
            raise PromptError(f"{self.name} keeps no number of tokens: {self.where}; see {self.needs}.")
        return tuple(evidence.tokens[i] for i in chosen)


def _share(layers: int, number: int, of: int) -> int:
    """A paper's block `number` of `of`, at the same relative depth."""
    return min(layers - 1, round(number / of * layers))


def _transprune(e: Evidence, layer: int) -> Tensor:
    # Blocks 7 to 12 of 32, counted from 1, and never those before an earlier pruning.
    first = max(e.start, min(layer - 1, _share(e.base.n_layers, 6, 32)))
    changes = [one for block in range(first, layer) for one in e.transitions(block)]
    return attention.transprune(changes, e.asking(layer))


def _sparsevlm(e: Evidence, layer: int) -> Tensor:
    # Raters are chosen once, from the embeddings of the whole prompt.
    text, image = (e.base.hidden[0][list(p)].float().cpu() for p in (e.text, e.all_tokens))
    return attention.sparsevlm(e.asking(layer), attention.text_raters(text, image))


def _hiprune(e: Evidence, _: int, keep: int, __: np.random.Generator) -> tuple[int, ...]:
    middle = e.tower.received(_share(e.tower.n_layers, 9, 24)).mean(0)[e.cells].cpu()
    late = e.tower.received(e.late).mean(0)[e.cells].cpu()
    return encoder.hiprune(middle, late, keep, e.grid[1])


def _flowcut(e: Evidence, _: int, keep: int, __: np.random.Generator) -> tuple[int, ...]:
    blocks = range(e.late + 1)
    values = torch.stack([e.tower.values(b)[:, e.cells].float().cpu() for b in blocks])
    return encoder.flowcut(e.cls_attention()[: e.late + 1], values,
                           torch.stack([e.class_values(b) for b in blocks]), keep)


def _feather(e: Evidence, layer: int, keep: int, _: np.random.Generator) -> tuple[int, ...]:
    """Half of the tokens by attention without positions, half a uniform grid; shallow blocks only."""
    score = e.position_free(layer).mean(0)
    if layer > e.base.n_layers // 3:
        return top(score, keep)
    even = np.linspace(0, len(score) - 1, keep // 2).round().astype(int) if keep > 1 else []
    kept = set(int(i) for i in even)
    rest = score.clone()
    rest[list(kept)] = float("-inf")
    return tuple(sorted(kept | set(top(rest, keep - len(kept)))))


def _debiased(e: Evidence, layer: int) -> Tensor:
    """FastV without its trend over positions, of this prompt: `attention.debiased` takes the trend
    of a data set, which is the method."""
    score = attention.row_attention(e.last(layer - 1))
    return attention.debiased(score, attention.position_trend(score))


def _dart(e: Evidence, layer: int, keep: int, _: np.random.Generator) -> tuple[int, ...]:
    return diversity.dart(e.states(layer), e.keys(layer - 1), e.text_states(layer),
                          e.text_keys(layer - 1), keep)


def _rows() -> list[Criterion]:
    before, entering = "before the language model", "entering a block"
    kept, compact = "keep", "compact"
    row = Criterion
    return [
        row("random", "random", "nothing", entering, kept, "code", "the control of arXiv:2512.07580",
            choice=lambda e, _, n, rng: tuple(
                sorted(int(i) for i in rng.choice(len(e.tokens), n, replace=False)))),
        row("FastV", "attention", "the last row's attention, block before", entering, kept, "code",
            "FastV", lambda e, k: attention.row_attention(e.last(k - 1)), first=1),
        row("PyramidDrop", "attention", "the last row's attention, same block", entering, compact,
            "code", "PyramidDrop", lambda e, k: attention.row_attention(e.last(k))),
        row("TransPrune", "attention", "attention and MLP outputs, rows after the image", entering,
            compact, "code", "TransPrune", _transprune, first=1),
        row("SparseVLM", "attention", "rows of text that the image calls for", entering, compact,
            "code", "SparseVLM v1; v2 keeps ids", _sparsevlm),
        row("VisionDrop", "attention", "image rows, same block", entering, compact, "code",
            "VisionDrop", lambda e, k: e.among_image(k)),
        row("AdaptInfer", "attention", "rows after the image, same block", entering, "", "paper",
            "AdaptInfer", lambda e, k: attention.adaptinfer(e.asking(k), e.among_text(k))),
        row("debiased FastV", "attention", "the last row's attention, block before", entering,
            "as host", "secondary", "attention debiasing", _debiased, first=1),
        row("FEATHER", "attention", "attention without positions, same block", entering, kept,
            "secondary", "FEATHER, a reference point", choice=_feather),
        row("[CLS] attention", "encoder", "the class token's attention, one block", before, compact,
            "code", "FasterVLM",
            lambda e, _: attention.row_attention(e.cls_attention()[e.late])),
        row("VTC-CLS", "encoder", "the class token's attention, upper half", before, compact, "code",
            "VTC-CLS", lambda e, _: encoder.summed_cls_attention(
                e.cls_attention(), e.late // 2, e.late)),
        row("HiPrune", "encoder", "attention received in two blocks of the tower", before,
            "compact, Qwen2.5-VL keep", "code", "HiPrune", choice=_hiprune),
        row("FlowCut", "encoder", "class attention and values of the tower", before, compact, "code",
            "FlowCut", choice=_flowcut),
        row("HoloV", "encoder", "the class token's attention and features", before, compact, "code",
            "HoloV", choice=lambda e, _, n, __: encoder.holov(
                attention.row_attention(e.cls_attention()[e.late]), e.features(), n)),
        row("VFlowOpt", "encoder", "attention of the tower, grey levels", before, "", "code",
            "VFlowOpt", lambda e, _: encoder.vflowopt(
                e.tower.attention(e.late)[:, e.cells][:, :, e.cells].float().cpu(), e.entropy())),
        row("AgilePruner", "encoder", "the class token's attention and features", before, "",
            "secondary", "AgilePruner", choice=lambda e, _, n, __: diversity.agile(
                attention.row_attention(e.cls_attention()[e.late]), e.features(), n)),
        row("zeroth-order", "encoder", "a projector of two linear maps and an activation", before,
            compact, "paper", "ZOO-Prune, exact form", lambda e, _: e.sensitivity()),
        row("zeroth-order, diverse", "encoder", "the same, and projected features", before, compact,
            "paper", "ZOO-Prune", choice=lambda e, _, n, __: diversity.sensitive_and_diverse(
                e.sensitivity(), e.projected()[e.cells], n)),
        row("DivPrune", "diversity", "states", before, compact, "code", "DivPrune",
            choice=lambda e, k, n, _: diversity.divprune(e.states(k), n)),
        row("ToDRE", "diversity", "states", before, "", "paper", "ToDRE v2, stage 1",
            choice=lambda e, k, n, _: diversity.max_sum(e.states(k), n)),
        row("DART", "diversity", "states, keys of the block before", entering, compact, "code",
            "DART as shipped with arXiv:2512.07580", choice=_dart, first=1),
        row("ApET", "diversity", "states", entering, compact, "secondary", "ApET",
            choice=lambda e, k, n, rng: diversity.apet(
                e.states(k), n, first=int(rng.integers(len(e.tokens))))),
        row("Representation Shift", "states", "input and output of the MLP, block before", entering,
            "", "secondary", "Representation Shift",
            lambda e, k: diversity.representation_shift(*e.mlp(k - 1)), first=1),
        row("HiRED", "encoder", "pruning_by_encoder.hired, for tiled pictures", before, compact,
            "code", "HiRED"),
        row("PLPHP", "attention", "pruning_by_attention.plphp_kept", "cache of a head", kept,
            "paper", "PLPHP; its thresholds are not confirmed"),
        row("withdrawal", "states", "pruning_by_attention.withdrawal_layer", "once, all", kept,
            "code", "visual token withdrawal"),
        row("DyVTE", "states", "pruning_by_attention.exit_layer", "once, all", kept, "code",
            "arXiv:2411.19628"),
        row("GAP", "random", "any criterion with removal 'drop_keep_ids'", entering, kept, "paper",
            "grounding-aware position ids"),
    ]


CRITERIA: dict[str, Criterion] = {one.name: one for one in _rows()}
"""Every criterion by name. Those without score and choice are procedures of another kind: `needs`
names the function."""


def criterion(name: str) -> Criterion:
    """A row of the table. Raises `PromptError`, which lists the names.

    Example:
        >>> criterion("DivPrune").positions, criterion("FastV").first
        ('compact', 1)
    """
    if name not in CRITERIA:
        raise PromptError(f"there is no criterion {name!r}; there are: {', '.join(CRITERIA)}.")
    return CRITERIA[name]


def selecting() -> tuple[str, ...]:
    """The criteria that keep a given number of tokens, without "random"."""
    return tuple(name for name, one in CRITERIA.items()
                 if name != "random" and (one.score or one.choice))
