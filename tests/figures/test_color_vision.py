"""Colors that mean something can be told apart by readers with every common kind of color vision."""

from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from interp.figures.style import COLORS, CYCLE, GRAY

# Machado, Oliveira and Fernandes (2009), full severity, for linear RGB.
SEEN = {
    "all colors": np.eye(3),
    "no green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                       [-0.011820, 0.042940, 0.968881]],
    "no red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                     [-0.003882, -0.048116, 1.051998]],
    "no blue cones": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                      [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(given, seen):
    """CIELAB of a color as somebody sees it."""
    c = np.array(to_rgb(given))
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = TO_XYZ @ np.clip(np.array(seen) @ linear, 0, 1) / TO_XYZ.sum(1)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def nearest(colors, seen):
    found = {c: lab(c, seen) for c in colors}
    return min((float(np.linalg.norm(found[a] - found[b])), a, b) for a, b in combinations(found, 2))


@pytest.mark.parametrize("kind", SEEN)
def test_no_two_colors_fall_together(kind):
    assert nearest(dict.fromkeys(COLORS.values()), SEEN[kind])[0] > 12
    assert nearest(CYCLE, SEEN[kind])[0] > 15


def test_the_measure_finds_colors_that_do_fall_together():
    assert nearest(["#00FF00", "#FFB300"], SEEN["all colors"])[0] > 60
    assert nearest(["#CC79A7", "#8A8A8A"], SEEN["no green cones"])[0] < 10


def test_gray_can_be_read_as_text():
    light = [np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
             for c in np.array(to_rgb(GRAY))]
    assert 1.05 / (np.dot([0.2126, 0.7152, 0.0722], light) + 0.05) >= 4.5
