"""Choose heads by hand and see at once what becomes of the answers: sliders, or plain calls.

The model is not seen here: what a choice does comes from a function that is handed over, as
`interp.causal.chosen_heads.measure` with its model and prompts filled in.
"""

import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from interp.core import Head, HeadScores, Result, statistics
from interp.core.head import HeadLike
from interp.core.head import heads as as_heads
from interp.figures.style import BLACK, PAGE, VERMILION, canvas, color, note, style

LABELS = {"accuracy": "accuracy (share of prompts)", "log_prob": "answer (nats per token)"}
COLORS = {"untouched": BLACK, "chosen": VERMILION, "random": color("control")}
NO_SLIDERS = ("sliders need ipywidgets: pip install 'undertow[notebooks]'; without them call the "
              "chooser with heads, like chooser(['L1H2'], 0.0).")
Effect = Callable[[tuple[Head, ...], float], Result]


@style()
def draw(ax: Axes, found: Result, quantity: str = "accuracy") -> Axes:
    """Bars of a quantity as the model is, with the chosen heads scaled, and with random ones.

    Example:
        >>> import xarray as xr
        >>> values = np.random.rand(3, 8)
        >>> found = Result(xr.Dataset({"accuracy": (("condition", "prompt"), values)},
        ...                           {"condition": ["untouched", "chosen", "random"]}))
        >>> figure, ax = canvas()
        >>> [text.get_text() for text in draw(ax, found).get_xticklabels()]
        ['untouched', 'chosen', 'random']

    Lines are 95 % bootstrap intervals over prompts (none with fewer than five prompts); a control
    that could not be drawn has no bar.
    """
    names = [str(name) for name in found["condition"].values]
    values = found[quantity].transpose("condition", "prompt").values
    for at, (name, row) in enumerate(zip(names, values)):
        if not np.isfinite(row).all():
            ax.text(at, 0.5, "no control\nleft", transform=ax.get_xaxis_transform(), ha="center",
                    va="center", color=color("control"))
            continue
        estimate = statistics.mean(row, resamples=1000)
        ax.bar(at, estimate.value, 0.62, color=COLORS.get(name, color("other")))
        if np.isfinite(estimate.interval).all():
            ax.plot([at, at], estimate.interval, color="#5A5A5A" if name == "untouched" else BLACK,
                    linewidth=1.2)
    ax.axhline(0, color=BLACK, linewidth=0.7)
    ax.set_xticks(range(len(names)), names)
    ax.set_xlim(-0.6, len(names) - 0.4)
    ax.set_ylabel(LABELS.get(quantity, quantity))
    if quantity == "accuracy":
        ax.set_ylim(0, 1)
    note(ax, f"n = {values.shape[1]} prompts, 95 % intervals")
    return ax


class HeadChooser:
    """Heads chosen by hand, and what becomes of accuracy, answers and text without them.

    Example:
        >>> import xarray as xr
        >>> def effect(heads, factor):
        ...     values = np.ones((3, 6)) * [[1.0], [1.0 if not heads else factor], [0.9]]
        ...     return Result(xr.Dataset({"accuracy": (("condition", "prompt"), values)},
        ...         {"condition": ["untouched", "chosen", "random"]}), {"texts": {"chosen": "ten"}})
        >>> chooser = HeadChooser(effect, ["L1H2", "L0H3", "L1H0"], most=2)
        >>> chooser.top(2)
        (L0H3, L1H2)
        >>> figure = chooser(["L1H2"], 0.5)
        >>> float(chooser.last["accuracy"].sel(condition="chosen").mean())
        0.5

    Args:
        effect: (heads, factor) -> what scaling them by the factor does, a `Result` with `accuracy`
            and perhaps `log_prob` [condition, prompt], and `texts` by condition in its manifest.
        ranking: scores, or heads, best first: the slider's order.
        most: how far the slider goes.

    Attributes: `last`, what the latest call found.
    """

    def __init__(
        self, effect: Effect, ranking: Union[HeadScores, Sequence[HeadLike]],
        most: SupportsIndex = 8,
    ) -> None:
        self.effect = effect
        if isinstance(ranking, HeadScores):
            self.ranking = ranking.top(ranking.scores.size)
        else:
            self.ranking = [as_heads([head])[0] for head in ranking]
        if not self.ranking:
            raise ValueError("there are no heads to choose from: give a ranking of at least one.")
        self.most = min(int(most), len(self.ranking))
        self.last: Optional[Result] = None

    def top(self, count: SupportsIndex) -> tuple[Head, ...]:
        """The first heads of the ranking, in the model's order."""
        return as_heads(self.ranking[: int(count)])

    def __call__(
        self, heads: Optional[Iterable[HeadLike]] = None, factor: SupportsFloat = 0.0
    ) -> Figure:
        """The figure of one choice: the plain call that sliders make. The first head for None."""
        chosen = self.top(1) if heads is None else as_heads(heads)
        self.last = self.effect(chosen, float(factor))
        return self._figure(self.last, chosen, float(factor))

    def show(self, heads: Optional[Iterable[HeadLike]] = None, factor: SupportsFloat = 0.0) -> Figure:
        """The figure of a first choice; under it, in a notebook with ipywidgets, the sliders.

        Without a front end there is the figure alone, without ipywidgets also a sentence that says
        which extra is missing.
        """
        figure = self(heads, factor)
        if _in_notebook():
            from IPython.display import display

            try:
                display(self.sliders())
            except ModuleNotFoundError as error:
                print(error)
        return figure

    def sliders(self) -> Any:
        """Sliders for how many of the ranking and how strongly, a list for single heads, a figure.

        Raises `ModuleNotFoundError` without ipywidgets; the sentence names the extra.
        """
        try:
            import ipywidgets
        except ModuleNotFoundError:
            raise ModuleNotFoundError(NO_SLIDERS) from None
        from IPython.display import display

        wide = {"description_width": "initial"}
        # Only when the mouse is let go: every change runs the model.
        count = ipywidgets.IntSlider(0, 0, self.most, description="top heads of the ranking",
                                     continuous_update=False, style=wide)
        factor = ipywidgets.FloatSlider(0.0, min=0.0, max=1.0, step=0.1, continuous_update=False,
                                        description="output times", style=wide)
        more = ipywidgets.SelectMultiple(options=[str(head) for head in self.ranking], rows=5,
                                         description="and these", style=wide)
        out = ipywidgets.Output()

        def redraw(_: Any) -> None:
            with out:
                out.clear_output(wait=True)
                display(self({*self.top(count.value), *as_heads(more.value)}, factor.value))

        for control in (count, factor, more):
            control.observe(redraw, "value")
        return ipywidgets.VBox([ipywidgets.HBox([count, factor, more]), out])

    def _figure(self, found: Result, heads: tuple[Head, ...], factor: float) -> Figure:
        shown = [name for name in LABELS if name in found.data]
        texts = found.manifest.get("texts", {})
        lines = [line for name, text in texts.items() for line in _lines(name, text)]
        figure, axes = canvas(1, len(shown), width=PAGE, height=2.3 + 0.17 * len(lines),
                              squeeze=False)
        for ax, name in zip(axes[0], shown):
            draw(ax, found, name)
        names = ", ".join(map(str, heads)) or "none"
        with style():
            figure.suptitle(textwrap.shorten(f"outputs times {factor:g}: {names}", 100),
                            x=0.01, ha="left")
            if lines:
                figure.supxlabel("\n".join(lines), x=0.01, ha="left", family="DejaVu Sans Mono",
                                 fontsize=7, parse_math=False)
        return figure


def _lines(name: str, text: str, width: int = 96) -> list[str]:
    """What the model says, under the name of the condition, on at most two lines."""
    flat = text.replace("\n", "⏎") or "(nothing)"
    return textwrap.wrap(f"{name:<10} {flat}", width, subsequent_indent=" " * 11, max_lines=2)


def _in_notebook() -> bool:
    """Whether this runs in a kernel, where widgets can be shown."""
    try:
        from IPython.core.getipython import get_ipython
    except ModuleNotFoundError:
        return False
    return getattr(get_ipython(), "kernel", None) is not None
