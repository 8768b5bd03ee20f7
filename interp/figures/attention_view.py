"""A page to look at attention: choose a head, point at a token, see the keys it attends to.

One HTML file that needs nothing else: no other file, no network. It is made from the streamed
statistic "top_keys", so that no map of queries by keys is ever held, and long prompts fit.
"""

import base64
import html
import io
import json
import re
import unicodedata
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Optional, SupportsFloat, SupportsIndex, Union

import numpy as np
import xarray as xr
from jaxtyping import Float
from PIL import Image

from interp.core.prompt import Prompt
from interp.core.result import write_atomically
from interp.core.segment import Segment
from interp.figures.token_strip import VISIBLE

FINE = 1 << 22
"""Up to so many (layer, head, query, rank) entries a page is small: weights have 16 bits there, in
larger ones 8, and weights below `FAINT` are left out of these unless asked for."""
FAINT = 0.01
PACK = 1 << 18
"""Data of more bytes than this are compressed (zlib; every browser since 2023 unpacks it)."""
COLLAPSE = 8
"""Runs of at least so many equal tokens (an image's placeholders) are one box until opened."""

# [rank, head, query] with dims in this order, and the quantities apart.
Weights = Float[np.ndarray, "layer rank head query"]


@dataclass(frozen=True)
class AttentionView:
    """A finished page: shown by Jupyter as it is, or saved.

    Example:
        >>> import tempfile
        >>> view = AttentionView("<p>page</p>", (1, 2, 3, 4))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = view.save(Path(folder) / "view.html")
        ...     path.read_text() == view.page, view
        (True, AttentionView(1 layers x 2 heads x 3 queries, 4 keys each; 0.0 MB))

    Attributes:
        page: the whole HTML.
        shape: layers, heads, queries, keys per query.
        height: pixels it takes in a notebook.
    """

    page: str
    shape: tuple[int, int, int, int]
    height: int = 760

    @property
    def size(self) -> int:
        """Bytes of the page."""
        return len(self.page.encode())

    def save(self, path: Union[str, Path]) -> Path:
        """Write the page, whole or not at all."""
        write_atomically(path, self.page)
        return Path(path)

    def _repr_html_(self) -> str:
        # In a frame of its own, so that neither the notebook's style nor the page's leaks.
        return (f'<iframe srcdoc="{html.escape(self.page, quote=True)}" sandbox="allow-scripts" '
                f'style="width:100%;height:{self.height}px;border:0"></iframe>')

    def __repr__(self) -> str:
        layers, heads, queries, keys = self.shape
        return (f"AttentionView({layers} layers x {heads} heads x {queries:,} queries, {keys} keys "
                f"each; {self.size / 1e6:.1f} MB)")


def attention_view(
    top_keys: Any,
    tokens: Union[Prompt, Sequence[str]],
    image: Any = None,
    segment: Optional[Segment] = None,
    *,
    prompt: SupportsIndex = 0,
    title: str = "Attention",
    scores: Optional[Mapping[str, Any]] = None,
    least: Optional[SupportsFloat] = None,
    height: int = 760,
) -> AttentionView:
    """A page with the top keys of every query in every head.

    Example:
        >>> import interp
        >>> from interp.stream.reducers import TopKeys
        >>> model = interp.open_model("backcopy-1l")
        >>> prompt = interp.Prompt.from_tokens(range(3, 12))
        >>> run = model.run(prompt, stats=TopKeys(8), logits="none")   # measure: streamed
        >>> view = attention_view(run, prompt)                         # draw: no model needed
        >>> view.shape
        (1, 1, 9, 8)

    Args:
        top_keys: what `stats=TopKeys(k)` gives: a run, a `Result` with "top_keys", or the array
            with the dims layer, head, query, rank, quantity (and prompt).
        tokens: the prompt, or one printable token per position; with generated tokens, all of them.
        image, segment: a picture and the image segment with its pixel boxes; taken from a `Prompt`
            where it has them.
        prompt: which prompt of the array, counted from 0.
        scores: name -> further numbers [layer, head] to color the map of heads by.
        least: weights below it are left out, which makes large pages smaller. None: nothing, or
            0.01 in a large page.
        height: pixels in a notebook.

    Weights keep 16 bits, of large pages (over four million entries) 8: they are then right to
    0.002; the page says so. 2,000 tokens in 32 x 32 heads with 8 keys each are about 30 MB. Rows
    that sum to less than one (learned sinks) show the rest under "everything else".

    Raises:
        ValueError: not the statistic "top_keys", tokens that do not fit it, or a picture without a
            segment of pixel boxes.
    """
    array = _array(top_keys, int(prompt.__index__()))
    given = tokens if isinstance(tokens, Prompt) else None
    words = list(given.tokens or map(str, given.ids)) if given is not None else \
        [str(token) for token in tokens]  # type: ignore[union-attr]
    queries = np.asarray(array["query"].values if "query" in array.coords
                         else np.arange(array.sizes["query"])).astype(int)
    values, keys = (array.sel(quantity=name).values for name in ("value", "key"))
    if given is not None:  # queries beyond a shorter prompt of the same run are padding
        known = np.isfinite(values).any((0, 1, 2))
        kept = known | (queries < len(words))
        values, keys, queries = values[..., kept], keys[..., kept], queries[kept]
    last = int(max(queries.max(initial=-1), np.nanmax(keys, initial=-1)))
    if not len(queries) or last >= len(words):
        raise ValueError(
            f"the statistic reaches position {last}, but {len(words)} tokens were given; give every "
            "token of the prompt, and after it the generated ones.")
    bits = 16 if values.size <= FINE else 8
    floor = (0.0 if bits == 16 else FAINT) if least is None else float(least)
    values = np.where(values < floor, np.nan, values)
    pictures = _pictures(given, image, segment)
    colors = _summaries(values, keys, queries, pictures, scores or {}, array)
    layers, heads = (array[name].values.tolist() if name in array.coords
                     else list(range(array.sizes[name])) for name in ("layer", "head"))
    wide = len(words) >= 0xFFFF
    blobs = [_encode(v, k, bits, wide) for v, k in zip(values, keys)]
    packed = sum(map(len, blobs)) > PACK
    if packed:
        blobs = [zlib.compress(blob, 9) for blob in blobs]
    sharp = np.array([[-1.0 if v is None else v for v in row] for row in colors[0]["values"]])
    layer, head = np.unravel_index(int(sharp.argmax()), sharp.shape)
    floor = max(floor, 0.002) if bits == 8 else floor
    note = f"Weights below {floor:g} are left out. " if floor > 0 else ""
    note += "Weights are rounded to 1/255. " if bits == 8 else ""
    note += (f"At most {array.sizes['rank']} keys per query are known; \"everything else\" is the rest "
             "of a row to one: other keys, and learned sinks.")
    about = {
        "tokens": [readable(word) for word in words], "kinds": _kinds(given), "runs": _runs(words),
        "layers": layers, "heads": heads, "queries": queries.tolist(),
        "ranks": array.sizes["rank"], "bits": bits, "wide": wide, "packed": packed,
        "causal": not bool((keys > queries).any()), "summaries": colors, "pictures": pictures,
        "start": [int(layer), int(head), int(queries[-1])], "note": note,
    }
    page = _fill({
        "TITLE": html.escape(title), "ABOUT": _script_json(about),
        "LAYERS": "\n".join(
            f'<script type="text/plain" id="layer-{i}">{base64.b64encode(blob).decode()}</script>'
            for i, blob in enumerate(blobs)),
    })
    return AttentionView(
        page, (len(layers), len(heads), len(queries), int(array.sizes["rank"])), height)


def readable(token: str, most: int = 60) -> str:
    """A token as a page can show it: spaces, line ends and control characters visible.

    Example:
        >>> readable("Ġsink"), readable("\\n"), readable(""), readable("a\\u202eb")
        ('·sink', '⏎', '∅', 'a[U+202E]b')
    """
    text = "".join(
        VISIBLE[c] if c in VISIBLE else
        f"[U+{ord(c):04X}]" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c
        for c in token)
    return (text[:most] + "…" if len(text) > most else text) or "∅"


def _array(given: Any, prompt: int) -> xr.DataArray:
    """The statistic of one prompt, with dims layer, rank, head, query, quantity."""
    found = getattr(given, "stats", given)
    if not isinstance(found, xr.DataArray):
        try:
            found = found["top_keys"]
        except (KeyError, TypeError, IndexError):
            raise ValueError(
                "there is no statistic 'top_keys' here; measure it with "
                "model.run(prompt, stats=TopKeys(8)).") from None
    if "prompt" in found.dims:
        if not 0 <= prompt < found.sizes["prompt"]:
            raise ValueError(f"prompt {prompt} does not exist: the statistic has "
                             f"{found.sizes['prompt']}, counted from 0.")
        found = found.isel(prompt=prompt)
    wanted = ("layer", "rank", "head", "query", "quantity")
    if set(found.dims) != set(wanted) or not {"value", "key"} <= set(found["quantity"].values):
        raise ValueError(f"an array with the dims {tuple(map(str, found.dims))} is not the statistic "
                         "'top_keys'; measure it with model.run(prompt, stats=TopKeys(8)).")
    return found.transpose(*wanted)


def _encode(
    values: Float[np.ndarray, "rank head query"], keys: Float[np.ndarray, "rank head query"],
    bits: int, wide: bool,
) -> bytes:
    whole = 65535 if bits == 16 else 255
    level = np.rint(np.nan_to_num(np.clip(values, 0.0, 1.0)) * whole)
    absent = ~np.isfinite(values) | (level == 0 if bits == 8 else False)
    where = np.where(absent, 0xFFFFFFFF if wide else 0xFFFF, np.nan_to_num(keys))
    return (where.astype("<u4" if wide else "<u2").tobytes()
            + np.where(absent, 0, level).astype("<u2" if bits == 16 else "u1").tobytes())


def _summaries(
    values: Weights, keys: Weights, queries: np.ndarray, pictures: list[dict[str, Any]],
    scores: Mapping[str, Any], array: xr.DataArray,
) -> list[dict[str, Any]]:
    """Numbers per head that color the map."""
    def mean(weights: np.ndarray, asked: np.ndarray) -> np.ndarray:
        return np.nan_to_num(weights[..., asked]).sum(1).mean(-1)

    later = queries > 0
    later = later if later.any() else np.ones_like(later)
    found: dict[str, np.ndarray] = {}
    patches = [position for one in pictures for position, *_ in one["boxes"]]
    if patches and (queries > max(patches)).any():
        found["weight on the picture, queries after it (top keys)"] = mean(
            np.where(np.isin(keys, patches), values, 0.0), queries > max(patches))
    found["weight of the top key, mean of queries"] = mean(values[:, :1], later)
    found["weight on the first token, mean of later queries (top keys)"] = mean(
        np.where(keys == 0, values, 0.0), later)
    found["weight on the token before, mean of later queries (top keys)"] = mean(
        np.where(keys == queries - 1, values, 0.0), later)
    shape = (array.sizes["layer"], array.sizes["head"])
    for name, given in scores.items():
        one = given.transpose("layer", "head").values if isinstance(given, xr.DataArray) else given
        found[name] = np.asarray(one, float)
        if found[name].shape != shape:
            raise ValueError(f"the scores {name!r} have the shape {found[name].shape}; the map of "
                             f"heads is {shape} [layer, head].")
    return [{"name": name, "values": [[round(float(v), 4) if np.isfinite(v) else None for v in row]
                                      for row in one]} for name, one in found.items()]


def _pictures(
    prompt: Optional[Prompt], image: Any, segment: Optional[Segment]
) -> list[dict[str, Any]]:
    """Pictures as data, with [position, left, top, right, bottom] of every patch."""
    images = [image] if image is not None else list(prompt.images) if prompt is not None else []
    segments = [segment] if segment is not None else \
        list(prompt.of_kind("image")) if prompt is not None else []
    if image is not None and (len(segments) != 1 or not segments[0].boxes):
        raise ValueError("a picture needs the image segment with the pixel boxes of its tokens: "
                         "segment=prompt.segment('image').")
    found = []
    for picture, own in zip(images, segments):
        if not own.boxes:
            continue
        pixels = picture if isinstance(picture, Image.Image) else _to_image(np.asarray(picture))
        boxes = [[p, *(round(float(edge), 2) for edge in box)]
                 for p, box in zip(own.positions, own.boxes)
                 if box is not None and box[2] > box[0] and box[3] > box[1]]
        found.append({"name": own.name, "source": _data_uri(pixels), "width": pixels.width,
                      "height": pixels.height, "boxes": boxes})
    return found


def _to_image(pixels: np.ndarray) -> Image.Image:
    if np.issubdtype(pixels.dtype, np.floating):
        pixels = np.rint(np.clip(pixels, 0, 1) * 255)
    return Image.fromarray(pixels.astype(np.uint8).squeeze())


def _data_uri(picture: Image.Image) -> str:
    shown = picture.convert("RGB")
    shown.thumbnail((800, 800))
    made = io.BytesIO()
    shown.save(made, "PNG", optimize=True)
    kind = "png"
    if made.tell() > 300_000:
        made, kind = io.BytesIO(), "jpeg"
        shown.save(made, "JPEG", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(made.getvalue()).decode()}"


def _kinds(prompt: Optional[Prompt]) -> dict[int, str]:
    found: dict[int, str] = {}
    for segment in prompt.segments if prompt is not None else ():
        for position in segment.positions:
            found.setdefault(position, segment.name)
    return found


def _runs(words: Sequence[str]) -> list[list[int]]:
    runs, start = [], 0
    for stop in range(1, len(words) + 1):
        if stop == len(words) or words[stop] != words[start]:
            runs += [[start, stop]] * (stop - start >= COLLAPSE)
            start = stop
    return runs


def _script_json(value: Any) -> str:
    """JSON that no content can end the script element of."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


@cache
def _template() -> str:
    return resources.files("interp.figures").joinpath("attention_view.html").read_text("utf-8")


def _fill(parts: Mapping[str, str]) -> str:
    """The template with its places filled, in one go: what is filled in is not looked at again."""
    return re.sub("@(" + "|".join(parts) + ")@", lambda place: parts[place[1]], _template())
