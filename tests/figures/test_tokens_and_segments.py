"""Token strips, segment maps and image overlays: every score where its token is."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.colors import to_hex

from interp.core import Prompt, Segment
from interp.figures import image_overlay, segment_map, token_strip
from interp.figures.style import COLORS, PAGE, canvas, color

WORDS = ["<s>", "▁The", "▁cat", "Ċ", "Ġ$", "5", "$", "."]


@pytest.fixture
def ax():
    return canvas(width=PAGE)[1]


def gid(ax, start):
    return {p.get_gid(): p for p in ax.patches if (p.get_gid() or "").startswith(start)}


# ---- tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("token, text", [
    ("Ġsink", "·sink"), ("▁sink", "·sink"), (" sink", "·sink"), ("Ċ", "⏎"), ("\n\n", "⏎⏎"),
    ("ĉ", "⇥"), ("", "∅"), ("<|im_end|>", "<|im_end|>"), ("é", "é"), ("水", "u6c34"),
    ("a" * 40, "a" * 9 + "…" + "a" * 9),
])
def test_tokens_are_readable(token, text):
    assert token_strip.readable(token) == text


def test_every_token_stands_in_its_box_in_reading_order(ax):
    scores = np.linspace(0, 1, len(WORDS))
    token_strip.draw(ax, WORDS, scores, label="attention")
    assert [t.get_text() for t in ax.texts] == ["<s>", "·The", "·cat", "⏎", "·$", "5", "$", "."]
    boxes = list(gid(ax, "token").values())
    assert len(boxes) == len(WORDS)
    for box, text in zip(boxes, ax.texts):
        x, y = text.get_position()
        assert box.get_x() < x < box.get_x() + box.get_width()
        assert box.get_y() < y < box.get_y() + box.get_height()
    edges = [(round(b.get_y(), 6), b.get_x()) for b in boxes]
    assert edges == sorted(edges)
    for left, right in zip(boxes, boxes[1:]):
        assert left.get_y() < right.get_y() or left.get_x() + left.get_width() <= right.get_x()


def test_a_box_has_the_color_of_its_score_and_text_that_contrasts(ax):
    token_strip.draw(ax, ["low", "high", "none"], [0.0, 1.0, np.nan], label="attention")
    low, high, none = (to_hex(box.get_facecolor()) for box in gid(ax, "token").values())
    assert low != high and none == "#ffffff"
    assert [t.get_color() for t in ax.texts] == ["black", "white", "black"]


def test_dollars_are_text_and_special_tokens_are_bold(ax):
    token_strip.draw(ax, WORDS, np.zeros(len(WORDS)), label="attention")
    assert not any(t.get_parse_math() for t in ax.texts)
    assert [t.get_weight() for t in ax.texts] == ["bold"] + ["normal"] * 7
    ax.figure.canvas.draw_idle()
    ax.figure.draw_without_rendering()


def test_marks_are_outlined_in_the_color_of_their_role_with_true_positions(ax):
    token_strip.draw(ax, WORDS, np.zeros(len(WORDS)), label="attention", first=100,
                     mark={100: "primary", 105: "secondary"})
    boxes = gid(ax, "token")
    marked = {name: to_hex(b.get_edgecolor()) for name, b in boxes.items() if b.get_lw() > 1}
    assert marked == {"token 100": color("primary").lower(),
                      "token 105": color("secondary").lower()}
    assert [t.get_text() for t in ax.texts if t.get_text() in ("100", "105")] == ["100", "105"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["primary", "secondary"]


def test_image_placeholders_become_one_box_with_the_largest_score():
    tokens = ["a"] + ["<image>"] * 50 + ["b"]
    scores = np.zeros(52)
    scores[20] = 1.0
    wide, alone = canvas(width=PAGE)[1], canvas(width=PAGE)[1]
    token_strip.draw(wide, tokens, scores, label="attention", mark={20: "visual"})
    token_strip.draw(alone, ["x", "y"], [0.0, 1.0], label="attention")
    assert [t.get_text() for t in wide.texts] == ["a", "<image> × 50", "20", "b"]
    box = gid(wide, "token")["token 1"]
    assert box.get_facecolor() == gid(alone, "token")["token 1"].get_facecolor()
    assert to_hex(box.get_edgecolor()) == color("visual").lower()


def test_long_texts_break_into_lines_that_fit():
    boxes = token_strip.layout(["token"] + ["Ġword"] * 7 + ["Ġother"] * 7, 40)
    assert {box.line for box in boxes} == {0, 1, 2}
    assert all(box.column + box.width <= 40 for box in boxes)
    assert [box.start for box in boxes] == list(range(15))
    tokens = [f"w{i}" for i in range(300)]
    assert token_strip.height(tokens, 7.2) > token_strip.height(tokens[:100], 7.2)
    assert token_strip.height(tokens, 3.5) > token_strip.height(tokens, 7.2)


@pytest.mark.parametrize("tokens, scores, mark, sentence", [
    ([], [], {}, "at least one token"),
    (["a", "b"], [0.1], {}, "one score for every token"),
    (["a", "b"], [0.1, 0.2], {2: "primary"}, "position 2 cannot be marked: the strip shows 0 to 1"),
    (["a", "b"], [0.1, 0.2], {1: "purple"}, "no color is set for 'purple'"),
])
def test_a_strip_that_does_not_fit_is_refused(ax, tokens, scores, mark, sentence):
    with pytest.raises(ValueError, match=sentence):
        token_strip.draw(ax, tokens, np.array(scores), label="attention", mark=mark)


# ---- segments ---------------------------------------------------------------------------------


def shares(scale=1.0):
    values = np.random.default_rng(0).dirichlet(np.ones(3), 4) * scale
    return xr.DataArray(values, {"layer": [0, 1, 7, 9], "segment": ["bos", "image 1", "note"]},
                        ("layer", "segment"))


def test_a_segment_map_names_segments_and_true_layers(ax):
    segment_map.draw(ax, shares().T)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["bos", "image 1", "note"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0", "1", "7", "9"]
    assert ax.images[0].get_clim() == (0.0, 1.0) and len(ax.texts) == 12


def test_stacked_shares_are_the_shares_and_fill_the_row(ax):
    mass = shares()
    segment_map.stack(ax, mass.T)
    assert len(ax.containers) == 3
    for container, name in zip(ax.containers, mass["segment"].values):
        np.testing.assert_allclose([bar.get_height() for bar in container],
                                   mass.sel(segment=name))
    tops = [bar.get_y() + bar.get_height() for bar in ax.containers[-1]]
    np.testing.assert_allclose(tops, 1.0)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "7", "9"]
    colors = [to_hex(c[0].get_facecolor()).upper() for c in ax.containers]
    assert colors[:2] == [COLORS["bos"], COLORS["image"]]


def test_what_a_learned_sink_takes_is_hatched(ax):
    segment_map.stack(ax, shares(0.7))
    missing = ax.containers[-1]
    np.testing.assert_allclose([bar.get_height() for bar in missing], 0.3)
    assert all(bar.get_hatch() for bar in missing) and missing.get_label() == "outside the sequence"


@pytest.mark.parametrize("mass, sentence", [
    (shares(1.5), "sum to at most 1"), (-shares(), "between 0 and 1"),
    (shares().rename(layer="query"), r"\[layer, segment\]"),
])
def test_what_are_no_shares_is_refused(ax, mass, sentence):
    with pytest.raises(ValueError, match=sentence):
        segment_map.stack(ax, mass)


def test_a_prompt_is_drawn_by_its_positions(ax):
    prompt = Prompt.from_tokens(range(12), {"bos": (0, 1), "image": [3, 4, 5, 8], "tail": (9, 12)})
    segment_map.spans(ax, prompt)
    found = [(p.get_gid(), p.get_x() + 0.5, p.get_width()) for p in ax.patches if p.get_gid()]
    assert found == [("bos", 0, 1), ("image", 3, 3), ("image", 8, 1), ("tail", 9, 3)]
    assert ax.get_xlim() == (-0.5, 11.5)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "bos (1)", "image (4)", "tail (3)"]


# ---- images -----------------------------------------------------------------------------------

BOXES = tuple((c * 8.0, r * 6.0, c * 8.0 + 8, r * 6.0 + 6) for r in range(2) for c in range(3))
IMAGE = Segment("image", (10, 11, 12, 13, 14, 15, 16), "image", (2, 3), (*BOXES[:3], None,
                                                                       *BOXES[3:]))
PIXELS = np.random.default_rng(0).integers(0, 255, (12, 24, 3)).astype(np.uint8)


def test_every_patch_is_colored_on_its_own_pixels(ax):
    scores = np.array([0.1, 0.2, 0.3, 9.0, 0.4, 0.5, 0.6])
    image_overlay.draw(ax, PIXELS, IMAGE, scores, label="attention")
    patches = ax.collections[0]
    found = [(*p.vertices.min(0), *p.vertices.max(0)) for p in patches.get_paths()]
    assert found == list(BOXES)
    np.testing.assert_array_equal(patches.get_array(), np.delete(scores, 3))
    assert ax.get_xlim() == (0, 24) and ax.get_ylim() == (12, 0)
    assert ax.images[0].get_extent() == [0, 24, 12, 0]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x (pixels)", "y (pixels)")
    bars = [a.get_ylabel() for a in ax.child_axes]
    assert bars == ["attention"]


def test_scores_may_be_given_by_position_and_nan_leaves_pixels_bare(ax):
    image_overlay.draw(ax, PIXELS, IMAGE, {16: 0.6, 10: 0.1, 11: np.nan}, label="attention")
    patches = ax.collections[0]
    assert [tuple(p.vertices.min(0)) for p in patches.get_paths()] == [(0, 0), (16, 6)]
    np.testing.assert_array_equal(patches.get_array(), [0.1, 0.6])


def test_marks_outline_their_patch_and_carry_its_position(ax):
    image_overlay.draw(ax, PIXELS, IMAGE, np.zeros(7), label="attention",
                       mark={15: "visual", 13: "noise"})
    (name, outline), = gid(ax, "token").items()
    assert name == "token 15" and outline.get_bbox().extents.tolist() == list(BOXES[4])
    assert [t.get_text() for t in ax.texts] == ["15"]
    assert to_hex(outline.get_edgecolor()) == color("visual").lower()


@pytest.mark.parametrize("pixels", [PIXELS, PIXELS / 255.0, PIXELS[..., 0],
                                    np.dstack([PIXELS, PIXELS[..., :1]])])
def test_pictures_of_every_kind_show_their_shape_in_gray(ax, pixels):
    image_overlay.draw(ax, pixels, IMAGE, np.zeros(7), label="attention")
    shown = ax.images[0].get_array()
    assert shown.shape == (12, 24) and 0 <= shown.min() and shown.max() <= 1
    gray = pixels.reshape(12, 24, -1)[..., :3].mean(-1)
    assert np.corrcoef(shown.ravel(), gray.ravel())[0, 1] > 0.999


@pytest.mark.parametrize("segment, scores, mark, sentence", [
    (Segment.span("text", 0, 3), np.zeros(3), {}, "has no pixel boxes"),
    (IMAGE, np.zeros(6), {}, r"has 7 positions, but the scores have the shape \(6,\)"),
    (IMAGE, {3: 0.5}, {}, "position 3 has a score but is not in 'image'"),
    (IMAGE, np.zeros(7), {3: "visual"}, "position 3 cannot be marked"),
])
def test_an_overlay_that_does_not_fit_is_refused(ax, segment, scores, mark, sentence):
    with pytest.raises(ValueError, match=sentence):
        image_overlay.draw(ax, PIXELS, segment, scores, label="attention", mark=mark)
