"""Token Lens: what the last position receives from chosen tokens, and what MLPs make of it.

Paper     arXiv:2502.20475
Question  Does attention to these tokens promote or suppress a word, in which layer and head?
Measure   logits of chosen tokens, decoded from the part of attention's output that comes from a span
          (with the final norm held at the run's own statistics), by layer, span and token
Cause     the same for the MLPs' outputs: with the attention of the last position to the span, minus
          without it in all layers and heads (MLP knockout difference)
"""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, SupportsIndex, Union

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from torch import Tensor

from interp.core import Prompt, PromptError, Result
from interp.core.prompt import Where
from interp.figures.style import CYCLE, color, style
from interp.models.early_decoding import EarlyDecoder, FrozenNorm
from interp.models.model import Model

KNOCKOUTS = ("zeroed", "renormalized")
Targets = Mapping[str, SupportsIndex]


def contributions(
    weights: Float[Tensor, "head key"] | Float[np.ndarray, "head key"],
    values: Float[Tensor, "kv_head key d_head"] | Float[np.ndarray, "kv_head key d_head"],
    w_o: Float[Tensor, "head d_head d_model"] | Float[np.ndarray, "head d_head d_model"],
    directions: Float[Tensor, "d_model target"] | Float[np.ndarray, "d_model target"],
) -> Float[Tensor, "head key target"]:
    """What every head brings from every key in some directions: A[h, j] v[j] W_O[h] D.

    Example:
        >>> found = contributions(torch.ones(2, 3), torch.ones(1, 3, 4), torch.ones(2, 4, 5),
        ...                       torch.ones(5, 1))
        >>> found.shape, float(found[0, 0, 0])
        (torch.Size([2, 3, 1]), 20.0)

    Query heads share the values of their group. Spans are sums over keys, attention's whole output
    the sum over heads and keys; biases belong to no key.

    Source: arXiv:2502.20475, Token Lens; projected before it is summed, so that every position costs
    no more than one.
    """
    a, v = torch.as_tensor(weights), torch.as_tensor(values)
    projected = torch.einsum("hdm,mt->hdt", torch.as_tensor(w_o), torch.as_tensor(directions))
    v = v.repeat_interleave(len(a) // len(v), 0)
    return torch.einsum("hj,hjd,hdt->hjt", a, v, projected)


def by_position(
    model: Model, prompt: Prompt, targets: Targets, decoder: Optional[EarlyDecoder] = None
) -> xr.DataArray:
    """Token Lens of every position, `[layer, head, position, target]`.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> found = by_position(model, Prompt.from_tokens(range(3, 12)), {"a": 5, "b": 7})
        >>> found.sizes["position"], found["target"].values.tolist()
        (9, ['a', 'b'])

    In logits, before a softcap or scale that may follow the vocabulary head.
    """
    run = _LastRow(decoder or EarlyDecoder(model), prompt, targets, [])
    return xr.DataArray(
        torch.stack([run.received(layer) for layer in range(model.n_layers)]).numpy(),
        {"layer": range(model.n_layers), "target": list(targets)},
        ("layer", "head", "position", "target"))


def measure(
    model: Model,
    prompts: Union[Prompt, Sequence[Prompt]],
    targets: Union[Targets, Sequence[Targets]],
    spans: Mapping[str, Where],
    *,
    decoder: Optional[EarlyDecoder] = None,
) -> Result:
    """Token Lens and MLP knockout difference of every span, for named target tokens.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompt = Prompt.from_tokens(range(3, 12), {"subject": (1, 3)})
        >>> found = measure(model, prompt, {"x": 5, "y": 7}, {"subject": "subject", "last": "last"})
        >>> found["lens"].dims
        ('prompt', 'layer', 'segment', 'target')

    Args:
        targets: name -> token id, for all prompts or one per prompt (with the same names).
        spans: name -> positions, looked up in each prompt.
        decoder: to be shared between calls.

    Returns:
        In logits, [prompt, layer, segment, target]: `lens`; with `head`: `heads`; [prompt, layer,
        target]: `attention` (the whole of what attention adds), `mlp`, `bias` (the part of
        `attention` that belongs to no position); [prompt, knockout, layer, segment, target]:
        `mlp_difference`, each run decoded with its own final norm: positive where reading the span
        made the MLP promote the token; [prompt, knockout, segment, target]: `logit_difference`, of
        the output; [prompt, layer, head, segment]: `mass`, the attention itself; [prompt, target]:
        `logit`, `rest` (what entered block 0 and the final norm's bias).

    The knockouts cut what the last position reads in all layers and heads: "zeroed" after the
    softmax, as in the paper, "renormalized" before it, which keeps the size of the rows (NaN where a
    span is all that the row sees).

    Raises:
        PromptError: two targets of a prompt are the same token.
        SegmentNotFound: a span that a prompt does not have.
        ModelRefused, SiteRefused: models without a linear way from heads to logits.

    Source: arXiv:2502.20475; one plain pass per prompt, and one row per span and knockout.
    """
    given = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    named = [targets] * len(given) if isinstance(targets, Mapping) else list(targets)
    if not given or len(named) != len(given):
        raise PromptError(f"{len(given)} prompts and {len(named)} sets of targets: give one for each.")
    names = list(named[0])
    for number, one in enumerate(named):
        ids = [int(token) for token in one.values()]
        if list(one) != names or len(set(ids)) < len(ids):
            raise PromptError(
                f"the targets of prompt {number} need the names {names} and different tokens, not "
                f"{dict(one)}."
            )
    decoder = decoder or EarlyDecoder(model)
    found = [_one(decoder, prompt, one, spans) for prompt, one in zip(given, named)]
    data = xr.concat(found, "prompt").assign_coords(
        layer=range(model.n_layers), segment=list(spans), target=names, knockout=list(KNOCKOUTS))
    return Result(data, {
        **model.manifest(), "measure": "token_lens", "prompts": [p.digest() for p in given],
        "decoded": "logits before a softcap or scale after the vocabulary head",
        "final_norm": type(decoder.norm).__name__, "queries": "last", "decode": "not measured",
    })


def _one(decoder: EarlyDecoder, prompt: Prompt, targets: Targets, spans: Mapping[str, Where]) -> Any:
    run = _LastRow(decoder, prompt, targets, [prompt.positions(where) for where in spans.values()])
    layers = range(run.base.n_layers)
    places = torch.zeros(len(prompt), len(spans))
    for column, positions in enumerate(run.places):
        places[list(positions), column] = 1.0
    received = torch.stack([run.received(layer) for layer in layers])
    heads = torch.einsum("lhjt,js->lhst", received, places)
    mass = torch.einsum("lhj,js->lhs", torch.stack(run.weights), places)
    # Variants: as it is, then every span zeroed, then every span cut before the softmax.
    mlp = torch.stack([run.decoded(variant, "mlp_out") for variant in range(run.count)])
    after = torch.stack([run.logits(variant) for variant in range(run.count)])
    by_knockout = (len(KNOCKOUTS), len(spans))
    difference = (mlp[0] - mlp[1:]).unflatten(0, by_knockout).transpose(1, 2)
    changed = (after[0] - after[1:]).unflatten(0, by_knockout)
    for column in run.whole:
        difference[1, :, column], changed[1, column] = torch.nan, torch.nan
    of_bias = torch.stack([run.bias(layer) for layer in layers])
    attention = run.decoded(0, "attn_out")
    return xr.Dataset({
        "lens": (("layer", "segment", "target"), heads.sum(1).numpy()),
        "heads": (("layer", "head", "segment", "target"), heads.numpy()),
        "mass": (("layer", "head", "segment"), mass.numpy()),
        "attention": (("layer", "target"), attention.numpy()),
        "mlp": (("layer", "target"), mlp[0].numpy()),
        "bias": (("layer", "target"), of_bias.numpy()),
        "mlp_difference": (("knockout", "layer", "segment", "target"), difference.numpy()),
        "logit_difference": (("knockout", "segment", "target"), changed.numpy()),
        "logit": ("target", after[0].numpy()), "rest": ("target", run.rest().numpy()),
    }, attrs={"units": "logits"})


class _LastRow:
    """The last position of a prompt, run with all of its attention and without that to each span."""

    def __init__(
        self, decoder: EarlyDecoder, prompt: Prompt, targets: Targets,
        places: Sequence[tuple[int, ...]],
    ) -> None:
        self.decoder, self.places, n = decoder, places, len(prompt)
        self.base = base = decoder.model.resumable(prompt)
        # A row that sees nothing else cannot be renormalized.
        self.whole = [i for i, span in enumerate(places) if set(span) >= {
            int(j) for layer in range(base.n_layers) for j in base.visible(layer)[-1].nonzero()}]
        self.count = 1 + len(KNOCKOUTS) * len(places)
        cuts = torch.zeros(2, self.count, 1, 1, n, dtype=torch.bool)
        for i, span in enumerate(places):
            cuts[0, 1 + i, ..., list(span)] = True
            if i not in self.whole:
                cuts[1, 1 + len(places) + i, ..., list(span)] = True
        self.sites: dict[str, list[Tensor]] = {
            name: [] for name in ("attn_out", "mlp_out", "resid_post", "z")}
        self.weights: list[Tensor] = []
        base.replay(
            0, torch.full((self.count, 1), n - 1), context=torch.arange(n - 1),
            zeroed=lambda _: cuts[0], blocked=lambda _: cuts[1], into=self.sites,
            watch=lambda _, p: self.weights.append(p[0, :, 0].float().cpu()))
        self.ids = [int(token) for token in targets.values()]
        self.directions = decoder.directions(self.ids)
        self.final = [decoder.final(state) for state in self._of("resid_post", -1)]
        self.plain = self.final[0].pull(self.directions)

    def _of(self, site: str, layer: int) -> Float[Tensor, "variant width"]:
        return self.sites[site][layer][:, 0].float().cpu()

    def decoded(self, variant: int, site: str) -> Float[Tensor, "layer target"]:
        """A site of the last row, early decoded with the variant's own final norm."""
        directions = self.final[variant].pull(self.directions)
        return torch.stack([self._of(site, layer)[variant] @ directions
                            for layer in range(self.base.n_layers)])

    def logits(self, variant: int) -> Float[Tensor, "target"]:
        """Of the output, as the vocabulary head gives them."""
        norm = self.final[variant]
        return (norm(self._of("resid_post", -1)[variant]) + norm.bias) @ self.directions + self.head()

    def head(self) -> Float[Tensor, "target"]:
        """The vocabulary head's own bias."""
        bias = getattr(self.decoder.head, "bias", None)
        return torch.zeros(len(self.ids)) if bias is None else bias.detach().float().cpu()[self.ids]

    def rest(self) -> Float[Tensor, "target"]:
        """What neither attention nor an MLP wrote: the embedding, and biases after the last block."""
        embedded = self.base.hidden[0][-1].float().cpu()
        return embedded @ self.plain + self.final[0].bias @ self.directions + self.head()

    def _post(self, layer: int) -> Optional[FrozenNorm]:
        z = self.sites["z"][layer][0, 0]
        return self.decoder.before_post(layer, self._of("attn_out", layer)[0], z)

    def received(self, layer: int) -> Float[Tensor, "head key target"]:
        """Token Lens of every key and head."""
        post = self._post(layer)
        directions = self.plain if post is None else post.pull(self.plain)
        return contributions(
            self.weights[layer], self.base.values[layer].float().cpu(),
            self.decoder.w_o[layer].float().cpu(), directions)

    def bias(self, layer: int) -> Float[Tensor, "target"]:
        """The part of what attention adds that comes from no position."""
        post, bias = self._post(layer), self.decoder.bias[layer]
        return (bias if post is None else post(bias) + post.bias) @ self.plain


@style()
def draw(found: Result, ax: Axes, segment: str, value: str = "lens") -> Axes:
    """One span's `lens` or `mlp_difference` by layer, one line per target; controls in gray."""
    array = found[value].sel(segment=segment).mean("prompt")
    if "knockout" in array.dims:
        array = array.sel(knockout=KNOCKOUTS[0])
    names = list(map(str, array["target"].values))
    for number, name in enumerate(names):
        hue = color("control") if name.startswith("random") else CYCLE[number % len(CYCLE)]
        ax.plot(array["layer"], array.sel(target=name), "-o", color=hue, label=name,
                zorder=1 if name.startswith("random") else 2)
    ax.axhline(0, color=color("control"), linewidth=0.8)
    ax.set_xlabel("layer")
    ax.set_ylabel("logit" if value == "lens" else "difference of logits")
    ax.legend()
    return ax
