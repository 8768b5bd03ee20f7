"""Heat maps and head grids: true numbers, hatching where there is no value, marks in place."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from interp.core import Head, HeadScores, OutOfRange
from interp.figures import head_grid, heat
from interp.figures.style import VERMILION, canvas


@pytest.fixture
def ax():
    return canvas()[1]


def hatched(ax):
    """Cells (row, column) under hatching."""
    found = [c for c in ax.collections if c.get_gid() == heat.HATCH]
    corners = [path.vertices.min(0) for c in found for path in c.get_paths()]
    return {(round(y + 0.5), round(x + 0.5)) for x, y in corners}


def labels(axis):
    return dict(zip(axis.get_ticklocs(), (t.get_text() for t in axis.get_ticklabels())))


def test_ticks_carry_the_numbers_of_the_data_and_not_their_index(ax):
    values = xr.DataArray(np.random.rand(3, 5), {"layer": [4, 8, 31], "head": range(10, 15)},
                          ("layer", "head"))
    head_grid.draw(ax, values)
    assert labels(ax.yaxis) == {0: "4", 1: "8", 2: "31"}
    assert labels(ax.xaxis) == {i: str(10 + i) for i in range(5)}
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("head", "layer")


def test_large_maps_have_few_ticks_at_their_true_places(ax):
    head_grid.draw(ax, np.random.rand(80, 64))
    ticks = labels(ax.yaxis)
    assert len(ticks) <= 12 and all(str(round(place)) == text for place, text in ticks.items())


def test_rows_run_upward_unless_told_otherwise():
    up, down = canvas()[1], canvas()[1]
    heat.draw(up, np.eye(3))
    heat.draw(down, np.eye(3), upward=False)
    assert up.get_ylim() == (-0.5, 2.5) and down.get_ylim() == (2.5, -0.5)


def test_exactly_the_heads_without_a_value_are_hatched_and_the_reader_is_told(ax):
    eligible = np.ones((3, 5), bool)
    eligible[1, :] = eligible[2, 4] = False
    values = np.arange(15.0).reshape(3, 5)
    values[0, 0] = np.nan
    head_grid.draw(ax, HeadScores.of(values, eligible=eligible), label="score")
    assert hatched(ax) == {(0, 0), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 4)}
    assert ["▨ not eligible"] == [t.get_text() for t in ax.texts if t.get_gid() == "note"]
    assert ax.images[0].get_clim() == (1.0, 13.0)


def test_a_map_with_every_value_has_no_hatching(ax):
    head_grid.draw(ax, np.random.rand(3, 5))
    assert hatched(ax) == set() and not ax.texts


def test_a_map_without_any_value_is_all_hatching(ax):
    head_grid.draw(ax, np.full((3, 5), np.nan))
    assert len(hatched(ax)) == 15


def test_marked_heads_are_outlined_where_they_are(ax):
    values = xr.DataArray(np.random.rand(3, 5), {"layer": [4, 8, 31], "head": range(10, 15)},
                          ("layer", "head"))
    head_grid.draw(ax, values, mark=["L8H14", Head(31, 10)])
    found = {p.get_gid(): p.get_xy() for p in ax.patches if isinstance(p, Rectangle)}
    assert found == {"L8H14": (3.5, 0.5), "L31H10": (-0.5, 1.5)}
    assert {p.get_edgecolor() for p in ax.patches} == {to_rgba(VERMILION)}


def test_a_mark_outside_the_map_is_refused(ax):
    with pytest.raises(OutOfRange, match="L3H0 cannot be marked"):
        head_grid.draw(ax, np.random.rand(3, 5), mark="L3H0")


def test_axes_are_found_by_name_and_not_by_order():
    values = xr.DataArray(np.arange(15.0).reshape(3, 5), dims=("layer", "head"))
    one, other = canvas()[1], canvas()[1]
    head_grid.draw(one, values)
    head_grid.draw(other, values.T)
    np.testing.assert_array_equal(one.images[0].get_array(), other.images[0].get_array())
    assert one.images[0].get_array().shape == (3, 5)


@pytest.mark.parametrize("values, clim, diverging", [
    (np.array([[0.2, 0.8], [0.4, 0.6]]), (0.2, 0.8), False),
    (np.array([[-0.2, 0.8], [0.4, 0.6]]), (-0.8, 0.8), True),
    (np.array([[-0.2, -0.8], [-0.4, -0.6]]), (-0.8, -0.2), False),
    (np.array([[3.0, 3.0], [3.0, 3.0]]), (3.0, 6.0), False),
])
def test_zero_is_in_the_middle_where_signs_matter(ax, values, clim, diverging):
    heat.draw(ax, values)
    assert ax.images[0].get_clim() == clim
    assert (ax.images[0].get_cmap().name == "RdBu_r") is diverging


def test_hidden_values_do_not_stretch_the_colors(ax):
    values = np.array([[0.1, 0.9], [50.0, 0.3]])
    heat.draw(ax, values, eligible=np.array([[True, True], [False, True]]))
    assert ax.images[0].get_clim() == (0.1, 0.9)


def test_the_unit_is_on_the_color_bar_and_values_in_the_cells(ax):
    heat.draw(ax, np.array([[0.25, np.nan], [0.5, 0.75]]), label="attention (share)",
              annotate=".2f", x="key", y="query")
    bars = [a for a in ax.figure.axes if a is not ax]
    assert [bar.get_ylabel() for bar in bars] == ["attention (share)"]
    written = {t.get_position(): t.get_text() for t in ax.texts if t.get_gid() != "note"}
    assert written == {(0, 0): "0.25", (0, 1): "0.50", (1, 1): "0.75"}


def test_text_on_a_cell_contrasts_with_it(ax):
    heat.draw(ax, np.array([[0.0, 1.0]]), annotate=".1f")
    assert [t.get_color() for t in ax.texts] == ["white", "black"]


@pytest.mark.parametrize("values, more, sentence", [
    (np.zeros((2, 3, 4)), {}, "needs two axes, not 3"),
    (np.zeros((0, 3)), {}, "nothing to draw"),
    (np.zeros((2, 3)), {"eligible": np.ones((3, 2), bool)}, r"eligible has the shape \(3, 2\)"),
])
def test_what_cannot_be_drawn_is_refused(ax, values, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        heat.draw(ax, xr.DataArray(values), **more)


def test_scores_with_other_axes_are_refused(ax):
    with pytest.raises(ValueError, match="must be \\[layer, head\\], not \\['layer', 'key'\\]"):
        head_grid.draw(ax, xr.DataArray(np.zeros((2, 3)), dims=("layer", "key")))
