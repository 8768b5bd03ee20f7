"""The figures of the microscope."""

from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from experiments._word_classes import is_function, kinds
from interp.core import ModelRefused
from interp.figures import heat
from interp.figures.style import CYCLE, GRAY, PAGE, canvas, color
from interp.figures.token_strip import readable
from interp.models.logit_lens import early_logits
from interp.models.prompting import printable

SHOWN = 48
"""Tokens of the text in the map."""
WRITTEN = 12
"""Tokens in the table, few enough to be read."""


def draw(one: Any) -> None:
    """All but the removal's, which is measured later."""
    for name, make in (("linearity", _linearity), ("tokens", _tokens),
                       ("contextualization", _contextualization), ("scatter", _scatter),
                       ("lens", _lens), ("clouds", _clouds)):
        if one.wants(name):
            make(one)


def _linearity(one: Any) -> None:
    figure, ax = canvas(1, 1)
    layers = np.arange(one.model.n_layers)
    whole, step = (np.array([1 - float(o["left"].sum() / o[name].sum()) for o in one.lines])
                   for name in ("spread", "step_spread"))
    ax.plot(layers, one.inside, ":", color=GRAY, label="state, in sample")
    ax.plot(layers, one.random, "--", color=GRAY, linewidth=1, label="state, random weights")
    ax.plot(layers, whole, "-o", color=color("image"), markersize=3, label="state")
    ax.plot(layers, step, "--s", color=color("question"), markersize=3, label="what the block adds")
    ax.set_xlabel("block")
    ax.set_ylabel("linearity (held-out share of variance)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(one.model.name)
    ax.legend(loc="lower left", bbox_to_anchor=(-0.1, 1.0), ncols=2, fontsize=6)
    one.figure("linearity", figure)


def _words(one: Any, places: Any) -> list[str]:
    prompt = one.prompts[0]
    made = printable(one.model.tokenizer, prompt.ids) if one.model.tokenizer is not None else \
        [str(i) for i in prompt.ids]
    return [readable(made[int(p)], 12) for p in places]


def _tokens(one: Any) -> None:
    here = np.flatnonzero(one.document == 0)[:SHOWN]
    values = np.stack([o["error"].values[here] for o in one.lines])
    figure, ax = canvas(1, 1, width=PAGE, height=2.9)
    heat.draw(ax, values, x="token", y="block",
              label="length left by the map\n(1: root mean square of the states)")
    words = _words(one, one.position[here])
    function = is_function(kinds(one.model, one.prompts[0].ids)[one.position[here]])
    ax.set_xticks(range(len(here)), [w + " ×" * bool(f) for w, f in zip(words, function)],
                  rotation=90, fontsize=5.5)
    ax.set_title(one.model.name)
    one.figure("tokens", figure)


def _contextualization(one: Any) -> None:
    known = np.isfinite(one.cost) & np.isfinite(one.entering)
    names = [n for n in ("function", "punctuation", "content") if (known & (one.names == n)).sum() > 4]
    if not names:
        one.no_figure("contextualization", "the classes of tokens are not known in these texts")
        return
    figure, ax = canvas(1, 1)
    for at, name in enumerate(names):
        for values, shift, hue in ((one.entering, 0.22, GRAY), (one.cost, -0.22, CYCLE[at])):
            parts = ax.violinplot(values[known & (one.names == name)], [at + shift], widths=0.4,
                                  showmedians=True, showextrema=False)
            for body in parts["bodies"]:
                body.set_facecolor(hue)
                body.set_alpha(0.6)
            parts["cmedians"].set_color(hue)
    prior = float(one.prior[known].mean())
    ax.hlines(prior, -0.65, len(names) - 0.45, color=GRAY, linestyle=":", linewidth=0.8)
    ax.text(len(names) - 0.42, prior, "token\nfrequencies\nalone", color=GRAY, fontsize=6, va="center")
    ax.set_xlim(-0.65, len(names) + 0.25)
    ax.set_xticks(range(len(names)), names)
    ax.set_ylabel("cost of the tokens before (nats, proxy)")
    ax.set_title(one.model.name)
    one.figure("contextualization", figure)


def _scatter(one: Any) -> None:
    known = np.flatnonzero(np.isfinite(one.cost))
    some = known[:: max(1, len(known) // 2500)]
    figure, ax = canvas(1, 1)
    for name, hue in (("content", CYCLE[2]), ("function", CYCLE[0]), ("punctuation", CYCLE[1]),
                      ("", GRAY)):
        rows = some[one.names[some] == name]
        if len(rows):
            ax.plot(one.error[rows], one.cost[rows], "o", color=hue, markersize=1.8, alpha=0.4,
                    markeredgewidth=0, label=name or "other", rasterized=True)
    ax.set_xlabel("left by the linear maps (mean over blocks)")
    ax.set_ylabel("cost of the tokens before (nats, proxy)")
    ax.set_title(one.model.name)
    ax.legend(markerscale=2)
    one.figure("scatter", figure)


def _lens(one: Any) -> None:
    prompt = one.prompts[0]
    places = list(one.places[0][:WRITTEN])
    try:
        rows = [(logits.softmax(1).max(1)) for _, logits in early_logits(one.model, prompt, places)]
    except ModelRefused as error:
        one.no_figure("lens", str(error))
        return
    values = np.stack([row.values.numpy() for row in rows])
    ids = [row.indices.tolist() for row in rows]
    figure, ax = canvas(1, 1, width=PAGE, height=max(2.2, 0.24 * len(rows) + 1.2))
    heat.draw(ax, values, x="token", y="blocks passed", label="probability", limits=(0.0, 1.0))
    flat = [i for row in ids for i in row]
    text = printable(one.model.tokenizer, flat) if one.model.tokenizer is not None else \
        [str(i) for i in flat]
    if len(rows) <= 40:
        for at, word in enumerate(text):
            row, column = divmod(at, len(places))
            ax.text(column, row, readable(word, 9), fontsize=5.5, ha="center", va="center",
                    color="white" if values[row, column] < 0.6 else "black")
    ax.set_xticks(range(len(places)), _words(one, places), rotation=90, fontsize=6)
    ax.set_title(one.model.name)
    one.figure("lens", figure)


def _clouds(one: Any) -> None:
    figure, axes = canvas(1, 2, width=PAGE, height=2.5)
    layers = np.arange(-1, one.model.n_layers)
    for ax, values, label in ((axes[0], one.dimension, "intrinsic dimension"),
                              (axes[1], one.spread, "anisotropy (share of variance)")):
        ax.plot(layers, values, "-o", color=CYCLE[0], markersize=3)
        ax.set_xlabel("layer (-1: what enters block 0)")
        ax.set_ylabel(label)
        ax.set_ylim(0, None)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.set_title(one.model.name)
    one.figure("clouds", figure)


def removal(one: Any) -> None:
    """Losses of every item under the three contexts."""
    if not one.wants("removal"):
        return
    figure, ax = canvas(1, 1)
    names = ("whole", "function", "content")
    labels = ("whole context", "function words\nremoved", "content tokens\nremoved (control)")
    rows = np.stack([one.removed[name].values for name in names], 1)
    jitter = np.random.default_rng(0).uniform(-0.12, 0.12, len(rows))
    for at, hue in enumerate((CYCLE[2], CYCLE[0], GRAY)):
        ax.plot(at + jitter, rows[:, at], "o", color=hue, markersize=2.5, alpha=0.6)
        ax.plot([at - 0.25, at + 0.25], [rows[:, at].mean()] * 2, color=hue, linewidth=2)
    ax.set_xticks(range(3), labels)
    ax.set_ylabel("loss of the target (nats per token)")
    ax.set_title(one.model.name)
    one.figure("removal", figure)
