"""Image tokens and pixels: what a box says is what the model sees, tested by painting the box.

Occlusion is the definition: painting the pixels of one token's box must change the model's input
in that token's patch and nowhere else. Nearest-neighbor resizing at whole-number scales makes that
exact; the smooth resizing of real processors may touch neighbors, and is tested to change the
token's own patch most.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from interp.core import Segment
from interp.models.frame import Frame, box_of_patch, model_frame
from interp.models.processor import load_processor, load_processor_for
from interp.models.prompting import build
from interp.models.vision import image_segments, image_token_ids, layout, tile_spans

SPECIALS = ["<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>",
            "<video>", "<boi>", "<soft>", "<eoi>"]
PLAIN = {"do_rescale": False, "do_normalize": False}
NEAREST = 0


def words(**more) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "what": 1, "color": 2, "?": 3}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIALS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", **more)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(1, 120, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def painted(image: Image.Image, box) -> Image.Image:
    """The picture with every pixel whose center is in the box turned white."""
    pixels = np.array(image)
    xs, ys = (np.arange(n) + 0.5 for n in image.size)
    inside = ((ys >= box[1]) & (ys < box[3]))[:, None] & ((xs >= box[0]) & (xs < box[2]))[None]
    assert inside.any(), "the box holds no pixel"
    pixels[inside] = 255
    return Image.fromarray(pixels)


def change(before: np.ndarray, after: np.ndarray, patch: int) -> np.ndarray:
    """How much every patch changed, [row, column]; pixels are [channel, height, width]."""
    moved = np.abs(np.asarray(before, float) - np.asarray(after, float)).sum(0)
    rows, columns = moved.shape[0] // patch, moved.shape[1] // patch
    moved = moved[: rows * patch, : columns * patch].reshape(rows, patch, columns, patch)
    return moved.sum((1, 3))


def area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(a, b) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def parts(processor, config):
    return SimpleNamespace(tokenizer=processor.tokenizer, processor=processor, config=config,
                           name="toy", max_positions=None, has_images=True)


# -- frames ----------------------------------------------------------------------------------------

sides = st.integers(3, 90)


@settings(max_examples=150, deadline=None)
@given(sides, sides, st.integers(1, 5), st.integers(1, 6), st.data())
def test_cells_tile_the_visible_picture(width, height, rows, columns, data):
    frame = Frame.of((width, height))
    for _ in range(data.draw(st.integers(0, 3))):
        step = data.draw(st.sampled_from(["resized", "center_cropped", "padded_to_square"]))
        size = () if step == "padded_to_square" else (data.draw(sides), data.draw(sides))
        frame = getattr(frame, step)(*size)
    boxes = frame.cells(rows, columns)
    seen_x = min(width, frame.left + frame.width * frame.step_x) - max(0.0, frame.left)
    seen_y = min(height, frame.top + frame.height * frame.step_y) - max(0.0, frame.top)
    assert sum(map(area, boxes)) == pytest.approx(max(seen_x, 0) * max(seen_y, 0), abs=1e-6)
    for i, a in enumerate(boxes):
        assert 0 <= a[0] <= a[2] <= width and 0 <= a[1] <= a[3] <= height
        assert all(overlap(a, b) == 0 for b in boxes[i + 1 :])
        assert box_of_patch(frame, (rows, columns), *divmod(i, columns)) == a


def test_a_patch_of_padding_has_no_area_and_a_cell_outside_is_refused():
    frame = Frame.of((10, 30)).padded_to_square()
    boxes = frame.cells(1, 3)
    assert boxes == ((0.0, 0.0, 0.0, 30.0), (0.0, 0.0, 10.0, 30.0), (10.0, 0.0, 10.0, 30.0))
    with pytest.raises(ValueError, match=r"cell \(1, 0\) is outside the 1 x 3 grid"):
        box_of_patch(frame, (1, 3), 1, 0)


PROCESSORS = {
    # (image processor, picture): every resize is by a whole number, so that painting is exact
    "crop the sides": (CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), (140, 84)),
    "crop top and bottom": (CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), (56, 112)),
    "crop to a rectangle": (CLIPImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 42, "width": 28}), (112, 140)),
    "crop larger than the picture": (CLIPImageProcessorPil(
        size={"shortest_edge": 21}, crop_size={"height": 42, "width": 42}), (63, 42)),
    "no resize": (CLIPImageProcessorPil(
        do_resize=False, crop_size={"height": 28, "width": 42}), (60, 51)),
    "pad to a square, wide": (LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}), (84, 60)),
    "pad to a square, tall": (LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}), (33, 56)),
    "squash": (SiglipImageProcessorPil(size={"height": 28, "width": 42}), (84, 112)),
    "patches that do not fill": (SiglipImageProcessorPil(size={"height": 32, "width": 45}),
                                 (90, 64)),
}


@pytest.mark.parametrize("case", PROCESSORS)
def test_painting_a_box_changes_that_patch_and_no_other(case):
    processor, size = PROCESSORS[case]
    image, patch = picture(*size), 14
    options = {**PLAIN, "resample": NEAREST}

    def pixels(given):
        return processor(given, **options)["pixel_values"][0]

    before = pixels(image)
    rows, columns = before.shape[1] // patch, before.shape[2] // patch
    frame = model_frame(processor, size)
    assert (frame.height, frame.width) == before.shape[1:]
    boxes = frame.cut(0, 0, columns * patch, rows * patch).cells(rows, columns)
    for cell, box in enumerate(boxes):
        if area(box) == 0:
            continue
        moved = change(before, pixels(painted(image, box)), patch)
        assert [tuple(at) for at in np.argwhere(moved)] == [divmod(cell, columns)]
    # Control: what no box covers is not seen at all.
    everything = np.full((size[1], size[0], 3), 255, np.uint8)
    for left, top, right, bottom in boxes:
        everything[round(top):round(bottom), round(left):round(right)] = np.asarray(image)[
            round(top):round(bottom), round(left):round(right)]
    if any(map(area, boxes)):
        assert change(before, pixels(Image.fromarray(everything)), patch).sum() == 0


def test_smooth_resizing_changes_the_painted_patch_most_and_far_patches_not_at_all():
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 70}, crop_size={"height": 70, "width": 70})
    image = picture(331, 257)
    frame, before = model_frame(processor, image.size), processor(image)["pixel_values"][0]
    for cell, box in enumerate(frame.cells(5, 5)):
        moved = change(before, processor(painted(image, box))["pixel_values"][0], 14)
        row, column = divmod(cell, 5)
        assert np.unravel_index(moved.argmax(), moved.shape) == (row, column)
        near = np.zeros((5, 5), bool)
        near[max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = True
        assert moved[~near].sum() == 0


@pytest.mark.parametrize("processor", [
    CLIPImageProcessorPil(do_pad=True),  # padding that is not part of this processor's path
    Qwen2VLImageProcessorPil(),
    SiglipImageProcessorPil(size={"longest_edge": 30, "shortest_edge": 20}),
])
def test_a_path_that_is_not_known_gives_no_frame(processor):
    assert model_frame(processor, (60, 40)) is None


# -- one token per patch ---------------------------------------------------------------------------


def llava(tmp_path, strategy="default", vision="clip_vision_model", extra=1, image_processor=None):
    """A LLaVA processor, saved and opened again as a user's would be, and its configuration."""
    image_processor = image_processor or CLIPImageProcessorPil(
        size={"shortest_edge": 42}, crop_size={"height": 42, "width": 42}, resample=NEAREST)
    LlavaProcessor(
        image_processor, words(), patch_size=14, vision_feature_select_strategy=strategy,
        num_additional_image_tokens=extra,
    ).save_pretrained(tmp_path)
    config = LlavaConfig(
        vision_config={"model_type": vision, "patch_size": 14, "image_size": 42},
        image_token_id=words().convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=strategy,
    )
    config.save_pretrained(tmp_path)
    return parts(load_processor(tmp_path), config)


def test_a_llava_processor_from_disk_gives_every_token_its_pixels(tmp_path):
    model = llava(tmp_path)
    image = picture(168, 84)
    prompt = build(model, "<image> what color ?", image)
    segment = prompt.segment("image")
    assert segment.grid == (3, 3) and len(segment.boxes) == 9
    for cell, box in enumerate(segment.boxes):
        moved = change(prompt.inputs["pixel_values"][0], build(
            model, "<image> what color ?", painted(image, box)).inputs["pixel_values"][0], 14)
        assert [tuple(at) for at in np.argwhere(moved)] == [divmod(cell, 3)]


@pytest.mark.parametrize("strategy, vision, extra, none, count", [
    ("default", "clip_vision_model", 1, [], 9),
    ("full", "clip_vision_model", 1, [0], 10),
    ("full", "siglip_vision_model", 0, [], 9),
])
def test_the_class_token_is_dropped_or_has_no_box(tmp_path, strategy, vision, extra, none, count):
    model = llava(tmp_path, strategy, vision, extra)
    (segment,) = build(model, "<image> what", picture(42, 42)).of_kind("image")
    assert len(segment) == count and segment.grid == (3, 3)
    assert [i for i, box in enumerate(segment.boxes) if box is None] == none
    assert [box for box in segment.boxes if box][4] == (14.0, 14.0, 28.0, 28.0)


def test_dropping_the_first_patch_of_a_tower_without_class_token_is_seen(tmp_path):
    # What transformers does with strategy "default" on SigLIP: the first patch is lost.
    model = llava(tmp_path, "default", "siglip_vision_model", 0)
    (segment,) = build(model, "<image> what", picture(42, 42)).of_kind("image")
    assert len(segment) == 8 and segment.grid is None
    assert segment.boxes[0] == (14.0, 0.0, 28.0, 14.0)


def test_several_pictures_of_different_size(tmp_path):
    model = llava(tmp_path)
    prompt = build(model, "<image> what <image><image> ?",
                   [picture(42, 42), picture(84, 168), picture(84, 42)])
    first, second, third = prompt.of_kind("image")
    assert first.boxes[0] == (0.0, 0.0, 14.0, 14.0)
    assert second.boxes[0] == (0.0, 42.0, 28.0, 70.0)
    assert third.boxes[0] == (21.0, 0.0, 35.0, 14.0)
    assert third.start == second.stop  # side by side, told apart by their numbers
    assert [s.name for s in (first, second, third)] == ["image_0", "image_1", "image_2"]


def test_a_number_of_tokens_that_does_not_fit_gives_no_boxes(tmp_path):
    model = llava(tmp_path)
    token = model.config.image_token_id
    inputs = {"pixel_values": np.zeros((1, 3, 42, 42))}
    def boxes(count):
        (segment,) = image_segments(
            [1] + [token] * count, inputs, [(42, 42)], model.config, model.processor)
        return segment.positions, segment.boxes, segment.grid

    assert boxes(8) == (tuple(range(1, 9)), (), None)
    assert len(boxes(9)[1]) == 9


@pytest.mark.parametrize("ids, names", [
    ([5, 5, 1, 5, 5, 5], ["image_0", "image_1"]), ([5, 5, 5, 5, 5], ["image"]),
    ([5, 1, 5, 1, 5], ["image"]),
])
def test_pictures_of_unknown_geometry_are_told_apart_only_by_gaps(ids, names):
    config = SimpleNamespace(image_token_id=5, model_type="unheard_of")
    found = image_segments(ids, {"pixel_values": np.zeros((2, 3, 8, 8))}, [(8, 8), (8, 8)],
                           config, SimpleNamespace(image_processor=None))
    assert [s.name for s in found] == names and not any(s.boxes for s in found)
    assert sorted(p for s in found for p in s) == [i for i, t in enumerate(ids) if t == 5]


def test_no_picture_no_segment():
    config = SimpleNamespace(image_token_id=5, model_type="llava")
    assert image_segments([1, 5, 2], {}, [], config, None) == ()
    assert image_segments([1, 2], {}, [(8, 8)], config, None) == ()
    assert image_token_ids(GPT2Config()) == ()


# -- Qwen2-VL --------------------------------------------------------------------------------------


def qwen(tmp_path, **settings_of_processor):
    tokenizer = words()
    tokenizer.save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil(**settings_of_processor).save_pretrained(tmp_path)
    config = Qwen2_5_VLConfig(image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"))
    config.save_pretrained(tmp_path)
    return parts(load_processor(tmp_path), config)


@pytest.mark.parametrize("size", [(112, 84), (84, 168), (56, 56)])
def test_painting_a_qwen_box_changes_the_four_patches_merged_into_its_token(tmp_path, size):
    model = qwen(tmp_path, min_pixels=28 * 28, max_pixels=84 * 84, resample=NEAREST)
    text = "<|vision_start|><|image_pad|><|vision_end|> what color ?"
    image = picture(*size)
    prompt = build(model, text, image)
    segment = prompt.segment("image")
    _, rows, columns = prompt.inputs["image_grid_thw"][0] // np.array([1, 2, 2])
    assert segment.grid == (rows, columns) and len(segment) == rows * columns
    assert sum(map(area, segment.boxes)) == pytest.approx(size[0] * size[1])
    exact = all(n % (28 * m) == 0 for n, m in zip(size, (columns, rows)))
    for token, box in enumerate(segment.boxes):
        after = build(model, text, painted(image, box)).inputs["pixel_values"]
        moved = np.abs(after - prompt.inputs["pixel_values"]).sum(1).reshape(-1, 4).sum(1)
        assert moved.argmax() == token
        if exact:
            assert np.flatnonzero(moved).tolist() == [token]
    assert "mm_token_type_ids" in prompt.inputs


def test_several_qwen_pictures_have_grids_of_their_own(tmp_path):
    model = qwen(tmp_path, min_pixels=28 * 28, max_pixels=28 * 28 * 12)
    prompt = build(model, "<|image_pad|> what <|image_pad|> ?", [picture(112, 56), picture(56, 84)])
    first, second = prompt.of_kind("image")
    assert first.grid == (2, 4) and second.grid == (3, 2)
    assert first.boxes[-1] == (84.0, 28.0, 112.0, 56.0)
    assert second.boxes[-1] == (28.0, 56.0, 56.0, 84.0)


def test_an_unknown_processor_with_a_grid_is_marked_as_assumed():
    named = type("OtherImageProcessor", (), {"merge_size": 2, "patch_size": 4, "do_resize": True})
    config = SimpleNamespace(image_token_id=5, model_type="other_vl")
    inputs = {"image_grid_thw": np.array([[1, 2, 4]])}
    processor = SimpleNamespace(image_processor=named())
    found = image_segments([5, 5], inputs, [(9, 6)], config, processor)
    assert [(s.name, s.kind) for s in found] == [
        ("image", "image"), ("image_assumed_grid", "assumed")]
    known = type("Qwen2VLImageProcessor", (named,), {})
    processor = SimpleNamespace(image_processor=known())
    (only,) = image_segments([5, 5], inputs, [(9, 6)], config, processor)
    assert only.boxes == found[0].boxes == ((0, 0, 4.5, 6), (4.5, 0, 9, 6))
    video = {"image_grid_thw": np.array([[2, 2, 4]])}
    assert layout(video, [(9, 6)], config, processor) is None


# -- tiles -----------------------------------------------------------------------------------------

PINPOINTS = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]


def llava_next(tmp_path):
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, resample=NEAREST,
        image_grid_pinpoints=PINPOINTS, **PLAIN,
    )
    LlavaNextProcessor(
        image_processor, words(), patch_size=7, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(tmp_path)
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", "patch_size": 7, "image_size": 28},
        image_token_id=words().convert_tokens_to_ids("<image>"), image_grid_pinpoints=PINPOINTS,
    )
    config.save_pretrained(tmp_path)
    return parts(load_processor(tmp_path), config), LlavaNextModel, 7


def onevision(tmp_path, tile=32, most=9):
    # 32 pixels hold four patches of 7, and 4 pixels that no patch sees, as 384 = 27 x 14 + 6 does.
    pinpoints = [[tile * a, tile * b] for a in range(1, 5) for b in range(1, 5)]
    LlavaOnevisionImageProcessorPil(
        size={"height": tile, "width": tile}, resample=NEAREST, image_grid_pinpoints=pinpoints,
        **PLAIN,
    ).save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({
        "processor_class": "LlavaOnevisionProcessor", "num_image_tokens": (tile // 7) ** 2,
        "vision_feature_select_strategy": "full", "vision_aspect_ratio": f"anyres_max_{most}",
    }))
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "patch_size": 7, "image_size": tile},
        image_token_id=words().convert_tokens_to_ids("<image>"), image_grid_pinpoints=pinpoints,
        vision_aspect_ratio=f"anyres_max_{most}", vision_feature_select_strategy="full",
    )
    config.save_pretrained(tmp_path)
    return parts(load_processor(tmp_path), config), LlavaOnevisionModel, 7


def packed(model_class, config, prompt, tiles_changed):
    """Per-patch numbers [tile, row, column], put in token order by the model's own code."""
    features = torch.tensor(np.stack([c.reshape(-1) for c in tiles_changed]))[:, :, None].float()
    tiles = int(np.prod(np.array(best_grid(config, prompt))))
    options = {"image_newline": torch.full((1,), -1.0)}
    if model_class is LlavaNextModel:
        options["vision_feature_select_strategy"] = "default"
    else:
        options["vision_aspect_ratio"] = config.vision_aspect_ratio
    (out,), _ = model_class.pack_image_features(
        SimpleNamespace(config=config), [features[: tiles + 1]],
        torch.tensor(prompt.inputs["image_sizes"]), **options,
    )
    return out[:, 0].numpy()


def best_grid(config, prompt):
    from transformers.image_processing_utils import select_best_resolution

    tile = config.vision_config.image_size
    best = select_best_resolution(prompt.inputs["image_sizes"][0].tolist(),
                                  config.image_grid_pinpoints)
    return best[0] // tile, best[1] // tile


@pytest.mark.parametrize("make, size", [
    (llava_next, (112, 56)), (llava_next, (56, 112)), (llava_next, (112, 112)),
    (llava_next, (112, 70)), (llava_next, (42, 168)), (llava_next, (97, 61)),
    (onevision, (64, 64)), (onevision, (96, 64)), (onevision, (64, 80)), (onevision, (61, 97)),
])
def test_tiles_are_stitched_as_the_model_does(tmp_path, make, size):
    model, model_class, patch = make(tmp_path)
    image = picture(*size)
    prompt = build(model, "<image> what color ?", image)
    whole, thumbnail, tiles = (prompt.segment(f"image{s}") for s in ("", "_thumbnail", "_tiles"))
    before = prompt.inputs["pixel_values"][0]
    # Newline tokens: where the model's code puts them, and nowhere else.
    nothing = packed(model_class, model.config, prompt, [np.zeros((4, 4))] * len(before))
    assert len(nothing) == len(whole)
    newlines = [p for p, value in zip(whole.positions, nothing) if value == -1]
    assert newlines == [p for p, box in zip(whole.positions, whole.boxes) if box is None]
    assert sorted([*newlines, *thumbnail, *tiles]) == list(whole.positions)
    assert len(tiles) == tiles.grid[0] * tiles.grid[1] and thumbnail.grid == (4, 4)
    for segment in (thumbnail, tiles):
        for position, box in zip(segment.positions, segment.boxes):
            if area(box) == 0:
                continue
            after = build(model, "<image> what color ?", painted(image, box)).inputs["pixel_values"]
            moved = packed(model_class, model.config, prompt,
                           [change(b, a, patch) for b, a in zip(before, after[0])])
            moved = dict(zip(whole.positions, moved))
            own = {p: moved[p] for p in segment.positions}
            assert max(own, key=own.get) == position
            # Neighbors may share the pixels of an edge, no more.
            for other, its in zip(segment.positions, segment.boxes):
                apart = max(its[0] - box[2], box[0] - its[2], its[1] - box[3], box[1] - its[3])
                if apart > 1:
                    assert own[other] == 0


@pytest.mark.parametrize("size", [(56, 25), (25, 56), (53, 28)])
def test_the_smaller_half_of_the_padding_comes_first(tmp_path, size):
    # At scale one, with an odd number of padded pixels, painting is exact in the tiles.
    model, model_class, patch = llava_next(tmp_path)
    image = picture(*size)
    prompt = build(model, "<image> what", image)
    whole, tiles = prompt.segment("image"), prompt.segment("image_tiles")
    before = prompt.inputs["pixel_values"][0]
    for position, box in zip(tiles.positions, tiles.boxes):
        after = build(model, "<image> what", painted(image, box)).inputs["pixel_values"][0]
        moved = packed(model_class, model.config, prompt,
                       [change(b, a, patch) for b, a in zip(before, after)])
        assert [p for p, value in zip(whole.positions, moved)
                if value > 0 and p in tiles.positions] == [position]


def test_a_large_stitched_grid_is_interpolated_down(tmp_path):
    model, model_class, patch = onevision(tmp_path, most=1)
    image = picture(128, 96)
    prompt = build(model, "<image> what color ?", image)
    whole, tiles = prompt.segment("image"), prompt.segment("image_tiles")
    assert tiles.grid == (3, 4)  # of 12 x 16 patches, at most 16
    before = prompt.inputs["pixel_values"][0]
    newlines = packed(model_class, model.config, prompt, [np.zeros((4, 4))] * len(before)) == -1
    assert len(newlines) == len(whole)
    assert [box is None for box in whole.boxes] == newlines.tolist()
    for position, box in zip(tiles.positions, tiles.boxes):
        after = build(model, "<image> what color ?", painted(image, box)).inputs["pixel_values"]
        moved = packed(model_class, model.config, prompt,
                       [change(b, a, patch) for b, a in zip(before, after[0])])
        moved = {p: v for p, v in zip(whole.positions, moved) if p in tiles.positions}
        assert max(moved, key=moved.get) == position


def test_several_pictures_of_one_onevision_prompt_are_padded_squares_with_one_newline(tmp_path):
    model, _, patch = onevision(tmp_path)
    pictures = [picture(64, 40), picture(32, 64)]
    prompt = build(model, "<image> what <image> ?", pictures)
    for number, segment in enumerate(prompt.of_kind("image")):
        assert segment.grid == (4, 4) and segment.boxes[-1] is None and len(segment) == 17
        for cell, box in enumerate(segment.boxes[:-1]):
            if area(box) < 1:
                continue
            changed = list(pictures)
            changed[number] = painted(pictures[number], box)
            after = build(model, "<image> what <image> ?", changed).inputs["pixel_values"]
            moved = [change(b[0], a[0], patch)
                     for b, a in zip(prompt.inputs["pixel_values"], after)]
            assert moved[number].argmax() == cell and moved[1 - number].sum() == 0


def test_tiles_that_are_resized_again_are_refused(tmp_path):
    model, _, _ = llava_next(tmp_path)
    model.processor.image_processor.crop_size = {"height": 21, "width": 21}
    inputs = {"pixel_values": np.zeros((1, 3, 3, 28, 28)), "image_sizes": np.array([[56, 112]])}
    assert layout(inputs, [(112, 56)], model.config, model.processor) is None
    model.processor.image_processor.crop_size = {"height": 28, "width": 28}
    assert layout(inputs, [(112, 56)], model.config, model.processor) is not None


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 9), st.integers(0, 6), st.data())
def test_tile_spans_are_patches_in_order_without_overlap(n_tiles, side, patch, rest, data):
    tile, total = side * patch + rest, n_tiles * side
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    spans = tile_spans(start, stop, tile, side, patch, stop - start)
    expected = [(i // side * tile + i % side * patch,) * 2 for i in range(start, stop)]
    assert spans == [(a, b + patch) for a, b in expected]
    pooled = tile_spans(start, stop, tile, side, patch, data.draw(st.integers(1, stop - start)))
    assert pooled[0][0] == spans[0][0] and pooled[-1][1] == spans[-1][1]
    assert all(a < b for a, b in pooled)
    assert all(a[1] <= b[0] + 1e-9 for a, b in zip(pooled, pooled[1:]))


# -- Gemma 3 and the rest --------------------------------------------------------------------------


def gemma(**settings_of_processor):
    tokenizer = words(extra_special_tokens={
        "boi_token": "<boi>", "image_token": "<soft>", "eoi_token": "<eoi>"})
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 24, "width": 24}, resample=NEAREST, **PLAIN),
        tokenizer, image_seq_length=9,
    )
    processor.images_kwargs = {**processor.images_kwargs, **settings_of_processor}
    config = SimpleNamespace(
        model_type="gemma3", image_token_id=tokenizer.convert_tokens_to_ids("<soft>"),
        mm_tokens_per_image=9, vision_config=SimpleNamespace(image_size=24, patch_size=4),
    )
    return parts(processor, config)


def test_gemma_pools_squares_of_patches():
    model, image = gemma(), picture(72, 48)
    prompt = build(model, "what <boi> ?", image)
    segment = prompt.segment("image")
    assert segment.grid == (3, 3)
    for cell, box in enumerate(segment.boxes):
        after = build(model, "what <boi> ?", painted(image, box)).inputs["pixel_values"][0]
        moved = change(prompt.inputs["pixel_values"][0], after, 8)
        assert [tuple(at) for at in np.argwhere(moved)] == [divmod(cell, 3)]


@pytest.mark.parametrize("size", [(144, 48), (48, 96)])
def test_gemma_crops_have_boxes_in_the_whole_picture(size):
    model = gemma(do_pan_and_scan=True, pan_and_scan_min_crop_size=10)
    image = picture(*size)
    prompt = build(model, "what <boi> ?", image)
    segment, before = prompt.segment("image"), prompt.inputs["pixel_values"]
    crops = max(size) // min(size)
    assert len(segment) == 9 * (1 + crops) and segment.grid is None
    assert [s.name for s in prompt.of_kind("image_part")] == [
        "image_whole", *(f"image_crop_{i}" for i in range(crops))]
    assert sum(map(area, segment.boxes)) == pytest.approx(2 * size[0] * size[1])
    for number, box in enumerate(segment.boxes):
        after = build(model, "what <boi> ?", painted(image, box)).inputs["pixel_values"]
        moved = np.stack([change(b, a, 8) for b, a in zip(before, after)])
        view, cell = divmod(number, 9)
        assert moved[view].argmax() == cell
        assert [tuple(at) for at in np.argwhere(moved[1:].sum(0) * (view > 0))] in (
            [], [divmod(cell, 3)])
    # Several pictures, of which only one is long enough to be cropped.
    both = build(model, "<boi> what <boi> ?", [picture(48, 48), image])
    assert [len(s) for s in both.of_kind("image")] == [9, 9 * (1 + crops)]


def other(**more):
    """An architecture that is not known, with a fixed number of image tokens."""
    settings_of_processor = {
        "size": {"height": 28, "width": 28}, "do_center_crop": False, "do_pad": False, **more}
    image_processor = type("OtherImageProcessor", (), settings_of_processor)()
    return SimpleNamespace(image_processor=image_processor, image_seq_length=4)


@pytest.mark.parametrize("processor, config_extra, boxes", [
    (other(), {}, 4),
    (other(do_center_crop=True), {}, 0),
    (other(do_pad=True), {}, 0),
    (other(crop_to_patches=True), {}, 0),
    (other(size={"shortest_edge": 28}), {}, 0),
    (other(), {"qformer_config": object()}, 0),
    (SimpleNamespace(image_processor=other().image_processor, image_seq_length=5), {}, 0),
])
def test_other_architectures_get_an_assumed_square_or_nothing(processor, config_extra, boxes):
    config = SimpleNamespace(image_token_id=5, model_type="unheard_of", **config_extra)
    found = image_segments([1, 5, 5, 5, 5, 2], {"pixel_values": np.zeros((1, 3, 28, 28))},
                           [(40, 20)], config, processor)
    assert len(found[0].boxes) == boxes and found[0].positions == (1, 2, 3, 4)
    assert [s.name for s in found] == ["image", "image_assumed_grid"][: 1 + bool(boxes)]
    if boxes:
        assert found[0].boxes[3] == (20.0, 10.0, 40.0, 20.0) and found[1].kind == "assumed"


def test_a_pixtral_tower_in_a_llava_is_not_taken_for_clip(tmp_path):
    model = llava(tmp_path)
    model.config.vision_config = PixtralVisionConfig(patch_size=14)
    (segment,) = image_segments(
        [model.config.image_token_id] * 9, {"pixel_values": np.zeros((1, 3, 42, 42))}, [(42, 42)],
        model.config, model.processor)
    assert segment == Segment("image", tuple(range(9)), "image")


# -- opening processors ----------------------------------------------------------------------------


def test_processors_that_also_take_videos_open_without_torchvision(tmp_path):
    # With torchvision the same call opens the full processor; images must work either way.
    model = qwen(tmp_path)
    assert type(model.processor).__name__ == "Qwen2_5_VLProcessor"
    prompt = build(model, "<|image_pad|> what", picture(60, 60))
    assert len(prompt.of_kind("image")) == 1
    assert model.processor(text=["what color"])["input_ids"] == [[1, 2]]


def test_text_models_have_no_processor_and_nothing_is_asked_of_the_hub(tmp_path, monkeypatch):
    import socket

    def refuse(*_args, **_options):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    GPT2Config().save_pretrained(tmp_path)
    words().save_pretrained(tmp_path)
    assert load_processor(tmp_path) is None
    assert load_processor(tmp_path / "nowhere") is None
    qwen(tmp_path / "qwen")


def test_a_vision_model_without_processor_files_gives_none_and_says_so(tmp_path):
    config = LlavaConfig()
    words().save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="text prompts work, images do not"):
        assert load_processor_for(config, tmp_path, words(), {"local_files_only": True}) is None


def test_a_broken_processor_file_gives_none_and_says_so(tmp_path):
    model = llava(tmp_path)
    (tmp_path / "processor_config.json").write_text("{ broken")
    with pytest.warns(UserWarning, match="cannot be opened"):
        assert load_processor_for(model.config, tmp_path, None, {}) is None


# -- the models themselves -------------------------------------------------------------------------

TEXT = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
VISION = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
          "num_attention_heads": 2, "projection_dim": 8}


def tiny(model, architecture, image_token_id):
    """A random model of the architecture that fits the processor of `model`."""
    given = model.config.to_dict()
    if architecture is Qwen2_5_VLForConditionalGeneration:
        config = Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": {
                "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}},
            vision_config={"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 12,
                           "out_hidden_size": 16, "fullatt_block_indexes": [0]},
            image_token_id=image_token_id,
        )
    else:
        given["text_config"] = {"model_type": "llama", **TEXT}
        given["vision_config"] = {**given["vision_config"], **VISION}
        config = type(model.config).from_dict(given)
    torch.manual_seed(0)
    return architecture(config).eval()


@pytest.mark.parametrize("make, architecture, placeholder", [
    (llava, LlavaForConditionalGeneration, "<image>"),
    (lambda path: llava_next(path)[0], LlavaNextForConditionalGeneration, "<image>"),
    (lambda path: onevision(path)[0], LlavaOnevisionForConditionalGeneration, "<image>"),
    (lambda path: qwen(path, min_pixels=28 * 28, max_pixels=84 * 84),
     Qwen2_5_VLForConditionalGeneration, "<|image_pad|>"),
], ids=["llava", "llava_next", "onevision", "qwen2_5_vl"])
def test_a_model_takes_the_prompt_and_its_pictures_reach_exactly_the_image_tokens(
    tmp_path, make, architecture, placeholder
):
    parts_of_model = make(tmp_path)
    token = parts_of_model.tokenizer.convert_tokens_to_ids(placeholder)
    hf = tiny(parts_of_model, architecture, token)
    parts_of_model.config = hf.config
    text = f"what {placeholder} color ?"

    def embedded(image):
        """What enters the first decoder block, [position, d_model]."""
        prompt = build(parts_of_model, text, image)
        seen = []
        block = hf.model.language_model.layers[0]
        handle = block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with torch.no_grad():
                hf(input_ids=torch.tensor([prompt.ids]),
                   **{k: torch.from_numpy(v) for k, v in prompt.inputs.items()})
        finally:
            handle.remove()
        return prompt, seen[0][0]

    prompt, first = embedded(picture(96, 64))
    _, second = embedded(picture(96, 64, seed=1))
    moved = (first - second).abs().amax(-1) > 0
    boxed = prompt.segment("image")
    expected = [p for p, box in zip(boxed.positions, boxed.boxes) if box is not None]
    # Newline tokens do not depend on the picture; every other image token does; no text does.
    assert torch.nonzero(moved)[:, 0].tolist() == expected
