"""The chooser of heads: plain calls, sliders where there are any, a sentence where there are none."""

import sys

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from interp.core import Head, HeadScores, Result
from interp.figures import choose_heads
from interp.figures.choose_heads import COLORS, HeadChooser
from interp.figures.style import canvas


def result(untouched, chosen, random, **manifest):
    rows = np.array([untouched, chosen, random], dtype=float)
    names = ["untouched", "chosen", "random"]
    return Result(xr.Dataset({"accuracy": (("condition", "prompt"), rows),
                              "log_prob": (("condition", "prompt"), rows - 1)},
                             {"condition": names}), manifest)


class Effect:
    """Remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, heads, factor):
        self.asked.append((heads, factor))
        return result([1] * 6, [factor] * 6, [0.5] * 6,
                      texts={"untouched": "seven ten", "chosen": "nine\nten", "random": "seven"})


def bars(ax):
    return {label.get_text(): patch for label, patch in zip(ax.get_xticklabels(), ax.patches)}


def test_bars_are_means_with_intervals_and_the_control_is_gray():
    _, ax = canvas()
    choose_heads.draw(ax, result([1, 1, 1, 1, 0, 1], [0, 0, 1, 0, 0, 0], [1] * 6))
    drawn = bars(ax)
    assert drawn["untouched"].get_height() == pytest.approx(5 / 6)
    assert drawn["chosen"].get_height() == pytest.approx(1 / 6)
    from matplotlib.colors import to_hex

    assert to_hex(drawn["random"].get_facecolor()) == COLORS["random"].lower()
    low, high = ax.lines[1].get_ydata()
    assert low <= 1 / 6 <= high and high > low
    assert "n = 6 prompts" in " ".join(text.get_text() for text in ax.texts)


def test_few_prompts_have_no_interval_and_a_missing_control_no_bar():
    _, ax = canvas()
    choose_heads.draw(ax, result([1, 1, 0], [0, 1, 0], [np.nan] * 3))
    assert len(ax.patches) == 2 and len(ax.lines) == 1          # the zero line alone
    assert any("no control" in text.get_text() for text in ax.texts)


def test_a_plain_call_asks_for_these_heads_and_shows_what_was_said():
    effect = Effect()
    chooser = HeadChooser(effect, ["L2H5", "L0H3", "L1H0"], most=9)
    figure = chooser(["L1H0", (0, 3), "L1H0"], 0.5)
    assert effect.asked == [((Head(0, 3), Head(1, 0)), 0.5)] and isinstance(figure, Figure)
    assert "L0H3, L1H0" in figure.get_suptitle() and "0.5" in figure.get_suptitle()
    said = figure.get_supxlabel()
    assert "seven ten" in said and "nine⏎ten" in said and chooser.most == 3
    chooser()
    assert effect.asked[-1] == ((Head(2, 5),), 0.0)              # the first of the ranking
    assert len(chooser(()).axes) == 2 and effect.asked[-1] == ((), 0.0)


def test_the_ranking_may_be_scores_and_must_not_be_empty():
    scores = HeadScores.of(np.array([[0.1, 0.9], [0.8, 0.2]]))
    assert HeadChooser(Effect(), scores).top(2) == (Head(0, 1), Head(1, 0))
    with pytest.raises(ValueError, match="no heads to choose from"):
        HeadChooser(Effect(), [])


def test_sliders_make_the_plain_call():
    pytest.importorskip("ipywidgets", reason="the extra 'notebooks' is not installed")
    effect = Effect()
    controls, _ = HeadChooser(effect, ["L2H5", "L0H3", "L1H0"], most=2).sliders().children
    count, factor, more = controls.children
    assert (count.max, factor.value) == (2, 0.0) and not effect.asked
    count.value = 2
    more.value = ("L1H0", "L2H5")
    factor.value = 0.5
    assert effect.asked == [((Head(0, 3), Head(2, 5)), 0.0),
                            ((Head(0, 3), Head(1, 0), Head(2, 5)), 0.0),
                            ((Head(0, 3), Head(1, 0), Head(2, 5)), 0.5)]


def test_without_ipywidgets_a_sentence_names_the_extra_and_the_figure_is_there(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    monkeypatch.setattr(choose_heads, "_in_notebook", lambda: True)
    chooser = HeadChooser(Effect(), ["L0H3"])
    with pytest.raises(ModuleNotFoundError, match=r"undertow\[notebooks\]"):
        chooser.sliders()
    assert isinstance(chooser.show(), Figure)
    assert "sliders need ipywidgets" in capsys.readouterr().out


def test_outside_a_notebook_there_is_the_figure_alone(capsys):
    assert isinstance(HeadChooser(Effect(), ["L0H3"]).show(["L0H3"], 1.0), Figure)
    assert capsys.readouterr().out == ""
