"""Curves against depth: means, bands and numbers are those of the data."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_rgba

from interp.figures import layer_curve
from interp.figures.style import canvas, color


@pytest.fixture
def ax():
    return canvas()[1]


def draw(ax, curves, **more):
    return layer_curve.draw(ax, curves, label="norm", resamples=400, **more)


def test_a_curve_is_the_mean_at_the_true_layers(ax):
    values = xr.DataArray(np.random.default_rng(0).random((7, 3)), {"layer": [2, 5, 30]},
                          ("prompt", "layer"))
    draw(ax, {"norm": values})
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [2, 5, 30])
    np.testing.assert_allclose(ax.lines[0].get_ydata(), values.mean("prompt"))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["2", "5", "30"]
    np.testing.assert_array_equal(ax.get_xticks(), [2, 5, 30])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", "norm")


def test_axes_are_found_by_name_and_not_by_order():
    values = xr.DataArray(np.random.rand(7, 3), dims=("prompt", "layer"))
    one, other = draw(canvas()[1], {"a": values}), draw(canvas()[1], {"a": values.T})
    np.testing.assert_array_equal(one.lines[0].get_ydata(), other.lines[0].get_ydata())
    assert len(one.lines[0].get_xdata()) == 3


def test_the_band_covers_the_true_mean_and_narrows_with_more_prompts():
    rng = np.random.default_rng(1)
    few, many = rng.exponential(size=(20, 200)), rng.exponential(size=(500, 200))
    (low, high), (near, far) = (layer_curve.band(x, resamples=400) for x in (few, many))
    assert 0.85 < np.mean((low <= 1) & (1 <= high)) < 0.99
    assert np.mean((low <= 2) & (2 <= high)) < 0.1
    assert np.mean(high - low) > 3 * np.mean(far - near)


def test_the_band_leaves_missing_layers_out(ax):
    values = np.random.default_rng(2).random((9, 4))
    values[:, 2] = np.nan
    values[0, 1] = np.nan
    draw(ax, {"a": values})
    low, high = layer_curve.band(values, resamples=400)
    assert np.isnan([low[2], high[2]]).all() and np.isfinite(np.delete(low, 2)).all()
    mean = ax.lines[0].get_ydata()
    assert np.isnan(mean[2]) and mean[1] == pytest.approx(values[1:, 1].mean())


def test_bands_are_drawn_for_samples_only_and_say_how_many(ax):
    draw(ax, {"one": np.arange(4.0), "many": np.random.rand(6, 4)})
    assert len(ax.lines) == 2 and len(ax.collections) == 1
    (note,) = [t.get_text() for t in ax.texts]
    assert note == "mean, 95 % bootstrap band, n = 6"
    bare = draw(canvas()[1], {"one": np.arange(4.0)})
    assert not bare.texts and bare.get_legend() is None


def test_controls_are_gray_and_behind_and_roles_keep_their_color(ax):
    curves = {"sink": np.arange(4.0), "control": np.zeros(4), "other sink": np.ones(4)}
    draw(ax, curves, roles={"sink": "primary", "control": "control", "other sink": "primary"})
    sink, control, other = ax.lines
    assert to_rgba(control.get_color()) == to_rgba(color("control"))
    assert control.get_zorder() < sink.get_zorder()
    assert sink.get_color() == other.get_color() == color("primary")
    assert sink.get_linestyle() != other.get_linestyle()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(curves)


def test_other_axes_keep_their_own_numbers(ax):
    values = xr.DataArray([1.0, 2.0], {"epsilon": [0.1, 0.3]}, ("epsilon",))
    draw(ax, {"a": values}, along="epsilon", x="threshold")
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), [0.1, 0.3])
    assert ax.get_xlabel() == "threshold"
    again = draw(canvas()[1], {"a": np.ones(2)}, along="step", at=[10, 1000], log=True)
    np.testing.assert_array_equal(again.lines[0].get_xdata(), [10, 1000])
    assert again.get_yscale() == "log"


@pytest.mark.parametrize("curves, more, sentence", [
    ({}, {}, "no curves"),
    ({"a": np.ones(3)}, {"roles": {"b": "control"}}, "no curve 'b' to color; the curves are: a"),
    ({"a": np.ones(3)}, {"roles": {"a": "purple"}}, "no color is set for 'purple'"),
    ({"a": np.ones(3)}, {"at": [1, 2]}, "3 values along 'layer', but 2 numbers"),
    ({"a": np.ones((2, 3, 4))}, {}, r"has the shape \(2, 3, 4\)"),
    ({"a": np.ones((0, 4))}, {}, r"has the shape \(0, 4\)"),
    ({"a": xr.DataArray(np.ones((2, 3, 4)), dims=("prompt", "head", "layer"))}, {},
     "average the others first"),
    ({"a": xr.DataArray(np.ones(3), dims=("step",))}, {}, "it needs 'layer'"),
])
def test_what_cannot_be_drawn_is_refused(ax, curves, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw(ax, curves, **more)
