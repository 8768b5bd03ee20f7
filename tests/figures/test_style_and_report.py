"""The style is one and stays inside its block; numbers on the page say what they mean."""

import ast
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.colors import to_rgb

import interp.figures
from interp.core import Claim
from interp.figures import heat, layer_curve, report
from interp.figures.style import CYCLE, VERDICTS, canvas, color, note, some_ticks, style

SOURCE = "arXiv:2410.10781"


def luminance(given):
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(given)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_the_style_is_restored_even_after_an_error():
    before = dict(mpl.rcParams)
    with pytest.raises(RuntimeError):
        with style():
            assert mpl.rcParams["axes.spines.top"] is False
            raise RuntimeError
    heat.draw(canvas()[1], np.eye(3))
    assert dict(mpl.rcParams) == before


def test_drawing_looks_the_same_inside_and_outside_of_the_style():
    figures = []
    for inside in (True, False):
        figure, ax = canvas()
        if inside:
            with style():
                layer_curve.draw(ax, {"a": np.arange(3.0), "b": np.ones(3)}, label="norm")
        else:
            layer_curve.draw(ax, {"a": np.arange(3.0), "b": np.ones(3)}, label="norm")
        figures.append((ax.lines[0].get_linewidth(), ax.get_legend().get_texts()[0].get_fontsize(),
                        ax.get_xticklabels()[0].get_fontsize()))
    assert figures[0] == figures[1]


def test_an_unknown_role_is_answered_with_those_there_are():
    with pytest.raises(ValueError, match="no color is set for 'sink'; the roles are: primary, sec"):
        color("sink")


def test_kinds_of_sinks_and_curves_can_be_told_apart():
    kinds = [color(role) for role in ("primary", "secondary", "visual", "noise", "control")]
    assert len(set(kinds)) == 5 and len(set(CYCLE)) == len(CYCLE)
    # In gray print, too, where they meet most often.
    assert abs(luminance(color("primary")) - luminance(color("secondary"))) > 0.03


@pytest.mark.parametrize("word", VERDICTS)
def test_verdicts_are_readable_on_their_background(word):
    ink, paper, sign = VERDICTS[word]
    light, dark = luminance(paper), luminance(ink)
    assert (light + 0.05) / (dark + 0.05) >= 4.5 and sign


def test_ticks_are_few_regular_and_start_at_the_first():
    for n in (1, 2, 11, 12, 13, 48, 80, 1000, 123456):
        ticks = some_ticks(range(n))
        assert 1 <= len(ticks) <= 12 and ticks[0] == 0 and ticks[-1] < n


def test_a_note_stays_below_the_label_however_long_the_tick_labels_are():
    figure, ax = canvas()
    ax.set_xticks([0, 1], ["a very long label", "another very long label"], rotation=60)
    ax.set_xlabel("segment")
    note(ax, "n = 3")
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    below = ax.texts[0].get_window_extent(renderer)
    label = ax.xaxis.label.get_window_extent(renderer)
    assert below.y1 <= label.y0 and below.y0 >= 0


def test_no_figure_module_opens_windows_or_knows_a_model():
    for path in Path(interp.figures.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {
            (node.module if isinstance(node, ast.ImportFrom) else alias.name)
            for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not any("pyplot" in name or "models" in name or "torch" in name
                       for name in imported), path.name


@pytest.mark.parametrize("value, text", [
    (0.0, "0"), (-0.0, "0"), (0.5, "0.5"), (0.123456, "0.123"), (12.0, "12"), (1234.6, "1,235"),
    (-1234.6, "-1,235"), (5e7, "5e+07"), (1e-9, "1e-09"), (None, "–"), (float("nan"), "undefined"),
    (float("inf"), "∞"), (float("-inf"), "−∞"), (300, "300"), (99.99, "100"),
])
def test_numbers_have_the_digits_that_matter(value, text):
    assert report.number(value) == text


@pytest.mark.parametrize("changes, expected", [
    ({}, "above 0.1"), (dict(direction="below"), "below 0.1"),
    (dict(direction="equal", tolerance=0.02), "within 0.02 of 0.1"),
])
def test_a_reader_sees_what_the_verdict_was_compared_with(changes, expected):
    claim = Claim("s", SOURCE, 0.5, 0.1, (0.4, 0.6), **changes)
    assert report.expected(claim) == expected


def test_second_hand_numbers_say_so():
    claim = Claim.untestable("s", SOURCE, "r", paper_number="3.2", paper_tag="secondary")
    assert report.published(claim) == "3.2 (second-hand: as others quote it)"
    assert "3.2 (second-hand: as others quote it)" in report.page([
        report.Section("a", "A", "Q?", (), claims=(claim,))])


def test_every_printable_tag_has_its_words():
    from interp.core.claim import PRINTABLE

    assert set(report.TAGS) == {*PRINTABLE, "secondary"}


def test_an_undefined_interval_is_not_shown_as_numbers():
    nan = float("nan")
    claim = Claim("s", SOURCE, 0.5, 0.1, (nan, nan))
    assert report.interval(claim) == "none" and claim.verdict == "inconclusive"


def test_a_markdown_cell_cannot_break_its_table():
    claim = Claim.untestable("a | b\nc", SOURCE, "r")
    rows = report.markdown([claim]).splitlines()
    assert len(rows) == 3 and "a \\| b c" in rows[2]


def test_the_page_escapes_what_a_manifest_or_a_problem_brings():
    evil = '</pre><script>alert(1)</script>"'
    page = report.page(
        [report.Section("a", evil, evil, ("2410.10781",), (evil,), (report.Picture("p", evil),),
                        (), {"x": evil}, evil)],
        [report.Problem(evil, evil)],
    )
    assert "<script" not in page and page.count("</pre>") == 1
