"""Nearest tokens (EmbedLens): visual tokens read through the word embeddings next to them.

Paper     arXiv:2603.00510
Question  Which visual tokens are the same in every image (sinks, dead tokens), and which are alive?
Measure   cosine to the input embeddings, the three nearest words; words whose tokens are constant
          over images are landmarks, found here from images alone; a token belongs to a landmark if any
          of its three nearest words is that
Cause     `probes.token_interventions`: remove a class, skip its updates, let it enter late
"""

from collections.abc import Mapping, Sequence
from typing import Any, Optional, SupportsIndex

import numpy as np
import pandas as pd
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from sklearn.base import BaseEstimator
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from interp.core import Prompt, Result, Segment
from interp.figures.style import color, style
from interp.models.model import Model
from probes.neighbors import cosine_neighbors
from probes.visual_tokens import between_images, nearest_words, visual_tokens, word_embeddings

CLASSES = ("sink", "dead", "alive")
"""In order of precedence: a token with landmarks of two kinds is of the first."""

LLAVA_1_5 = {"sink": (1141, 26673), "dead": (30296,)}
"""Landmarks of LLaVA-1.5-7B in the released code ("ViT sink", "LLM sink", "dead"); of no other model."""

NO_GROUPS = "NO DISCRETE GROUPS"
ROLES = {"sink": "primary", "dead": "secondary", "alive": "image"}


class TokenClasses(BaseEstimator):
    """Sink, dead and alive visual tokens, by landmarks that are found in the images themselves.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> words, x = rng.standard_normal((300, 32)), rng.standard_normal((40, 32))
        >>> x[::2] = 5 * words[3] + 0.01 * x[::2]
        >>> found = TokenClasses().fit(x, embeddings=words, images=np.arange(40) // 4)
        >>> int(found.landmarks_.index[0]), found.predict(x[:3]).tolist()
        (3, ['dead', 'alive', 'dead'])

    Args:
        k: nearest words of a token.
        min_share, min_images: a landmark is the nearest word of so many tokens, and among the nearest
            words of some token in so many images (shares).
        min_cosine: dead are the tokens of a landmark whose cosine between images is so high.
        constant: "anywhere", or "same place": cosines of tokens at the same place of the image, for
            models that tell every visual token where it is.
        sink_ratio: sinks are the tokens of a landmark that receive on average so many times the median
            attention; or of which half are in `sinks`.
        groups: "words"; "clusters" of the tokens (spherical k-means of 2 to 8) instead; "auto":
            clusters where no word is a landmark.
        min_silhouette: clusters that are less apart are none.
        landmarks: released ones (`LLAVA_1_5`): nothing is searched then.
        seed: of the clusters.

    Attributes:
        landmarks_: a table of the candidates by word id (or cluster): `kind` ("" for those that are
            alive), `share`, `images`, `entropy` (over images, 1 is even), `cosine`,
            `cosine_same_place`, `received` (times the median), `uniform` (share of the tokens of
            uniform images), `origin` ("V-sink" where norms are outliers before the language model,
            else "L-sink").
        groups_: "words", "clusters", "released" or `NO_GROUPS`. silhouette_: of the clusters.

    Source: arXiv:2603.00510 (any of the three nearest words); automatic landmarks are this toolkit's.
    """

    def __init__(
        self, k: Any = 3, min_share: Any = 0.02, min_images: Any = 0.8, min_cosine: Any = 0.9,
        constant: Any = "anywhere", sink_ratio: Any = 10.0, groups: Any = "auto",
        min_silhouette: Any = 0.15, landmarks: Any = None, seed: Any = 0,
    ) -> None:
        self.k = k
        self.min_share = min_share
        self.min_images = min_images
        self.min_cosine = min_cosine
        self.constant = constant
        self.sink_ratio = sink_ratio
        self.groups = groups
        self.min_silhouette = min_silhouette
        self.landmarks = landmarks
        self.seed = seed

    def fit(
        self, X: Any, y: Any = None, *, embeddings: Any, images: Any, places: Any = None,
        received: Any = None, sinks: Any = None, uniform: Any = None,
    ) -> "TokenClasses":
        """Find landmarks.

        Args:
            X: visual tokens `[sample, d_model]`. embeddings: the vocabulary `[vocab, d_model]`.
            images: the image of every token. places: its place there.
            received: attention that each token receives. sinks: tokens known to be sinks (by their
                massive coordinates, say).
            uniform: which tokens are of images without content (black, noise, one color). Landmarks
                are found in the others; dead ones must be at least as frequent in these.

        Raises:
            ValueError: fewer than two images, lengths that differ, settings that are not known.
        """
        x = _matrix(X)
        image = _column(images, len(x), "images")
        if self.constant not in ("anywhere", "same place") or self.groups not in (
                "auto", "words", "clusters"):
            raise ValueError(
                "constant is 'anywhere' or 'same place', and groups 'auto', 'words' or 'clusters', not "
                f"{self.constant!r} and {self.groups!r}."
            )
        if self.constant == "same place" and places is None:
            raise ValueError("constant='same place' needs places= for every token.")
        self.embeddings_, self.silhouette_ = torch.as_tensor(embeddings).detach(), float("nan")
        self.centers_: Optional[np.ndarray] = None
        more = {n: None if v is None else _column(v, len(x), n) for n, v in (
            ("places", places), ("received", received), ("sinks", sinks))}
        plain = np.zeros(len(x), bool) if uniform is None else _column(
            uniform, len(x), "uniform").astype(bool)
        empty, real = x[plain], ~plain
        x, image = x[real], image[real]
        kept = {n: None if v is None else v[real] for n, v in more.items()}
        if self.landmarks is None and len(np.unique(image)) < 2:
            raise ValueError("landmarks are constant over images: give tokens of two or more.")
        ids = nearest_words(x, self.embeddings_, self.k)[1]
        if self.landmarks is not None:
            released = {int(i): kind for kind in ("dead", "sink") for i in self.landmarks.get(kind, ())}
            members = {i: (ids == i).any(1) for i in released}
            self.groups_ = "released"
        else:
            released, members = {}, self._words(ids, image) if self.groups != "clusters" else {}
            self.groups_ = "words"
            if not members and self.groups != "words":
                members = self._clusters(x)
                self.groups_ = "clusters" if members else NO_GROUPS
        share = {i: float((self._nearest(empty) == i).any(1).mean()) if len(empty) else float("nan")
                 for i in members}
        rows = {i: self._row(mine, x, image, share[i], **kept) for i, mine in members.items()}
        table = pd.DataFrame.from_dict(rows, orient="index", columns=[
            "kind", "share", "images", "entropy", "cosine", "cosine_same_place", "received", "uniform",
            "origin"])
        if released:
            table["kind"] = [released[i] for i in table.index]
        self.landmarks_ = table.sort_values("share", ascending=False)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The class of every token: a `sink` before `dead` before `alive`."""
        check_is_fitted(self, "landmarks_")
        own = self._nearest(_matrix(X))
        found = np.full(len(own), "alive", dtype="<U5")
        for kind in ("dead", "sink"):
            rows = zip(self.landmarks_.index.tolist(), self.landmarks_["kind"].tolist())
            marked = [int(i) for i, of in rows if of == kind]
            found[np.isin(own, marked).any(1)] = kind
        return found

    def _nearest(self, x: np.ndarray) -> np.ndarray:
        """The words (or the cluster) next to every token."""
        if self.centers_ is not None:
            return cosine_neighbors(x, self.centers_, 1)[1].numpy()
        return nearest_words(x, self.embeddings_, self.k)[1]

    def _words(self, ids: np.ndarray, image: np.ndarray) -> dict[int, np.ndarray]:
        found, enough = {}, self.min_images * len(np.unique(image))
        for word in np.unique(ids[:, 0]):
            mine = (ids == word).any(1)
            often = (ids[:, 0] == word).mean() >= self.min_share
            if often and len(np.unique(image[mine])) >= enough:
                found[int(word)] = mine
        return found

    def _clusters(self, x: np.ndarray, most: int = 2000) -> dict[int, np.ndarray]:
        u = x / np.linalg.norm(x, axis=1, keepdims=True)
        best: Any = None
        for count in range(2, min(9, len(x))):
            made: Any = KMeans(count, n_init=3, random_state=int(self.seed))  # type: ignore[arg-type]
            made.fit(u)
            if len(np.unique(made.labels_)) < count:
                break
            score = silhouette_score(u, made.labels_, metric="cosine", sample_size=min(most, len(u)),
                                     random_state=int(self.seed))
            if best is None or score > best[0]:
                best = float(score), made
        if best is None:
            return {}
        self.silhouette_ = best[0]
        if best[0] < self.min_silhouette:
            return {}
        self.centers_ = best[1].cluster_centers_
        own = cosine_neighbors(u, self.centers_, 1)[1].numpy()[:, 0]
        return {int(c): own == c for c in np.unique(own)}

    def _row(
        self, mine: np.ndarray, x: np.ndarray, image: np.ndarray, plain: float, places: Any,
        received: Any, sinks: Any,
    ) -> list[Any]:
        nothing = float("nan")
        if not mine.any():
            return ["", 0.0, 0.0, nothing, nothing, nothing, nothing, nothing, ""]
        count = np.unique(image[mine], return_counts=True)[1]
        total, p = len(np.unique(image)), count / count.sum()
        cosine = between_images(x[mine], image[mine])
        same = nothing if places is None else between_images(x[mine], image[mine], places[mine])
        times = nothing
        if received is not None and np.isfinite(received).any() and np.nanmedian(received) > 0:
            times = float(np.nanmean(received[mine]) / np.nanmedian(received))
        norm = np.linalg.norm(x, axis=1)
        outlier = norm[mine].mean() > norm.mean() + 2 * norm.std()
        is_sink = times >= self.sink_ratio or sinks is not None and sinks[mine].mean() >= 0.5
        steady = (cosine if self.constant == "anywhere" else same) >= self.min_cosine
        content = np.isfinite(plain) and plain < mine.mean()
        kind = "sink" if is_sink else "dead" if steady and not content else ""
        entropy = float(-(p * np.log(p)).sum() / np.log(total)) if total > 1 else nothing
        return [kind, float(mine.mean()), len(count) / total, entropy, cosine, same, times, plain,
                ("V-sink" if outlier else "L-sink") if is_sink else ""]


def measure(
    model: Model, prompts: Sequence[Prompt], classes: Optional[TokenClasses] = None,
    *, image: str = "image", sinks: Optional[Sequence[Sequence[SupportsIndex]]] = None,
    uniform: Sequence[SupportsIndex] = (), tokens: Optional[xr.Dataset] = None,
) -> Result:
    """Nearest words and class of every visual token, with landmarks found in the prompts' images.

    Example:
        >>> import interp
        >>> model = interp.open_model("backcopy-3l")
        >>> prompts = [Prompt.from_tokens(range(i, i + 9), {"image": (1, 7)}) for i in (3, 12)]
        >>> found = measure(model, prompts)
        >>> found["word"].dims, set(found["kind"].values) <= set(CLASSES)
        (('sample', 'neighbor'), True)

    Args:
        classes: settings, or a fitted `TokenClasses`, which is then taken as it is.
        sinks: positions of known sinks in every prompt.
        uniform: numbers of the prompts whose images have no content.
        tokens: what `visual_tokens` found for these prompts, where it has been run before.

    Returns:
        What `visual_tokens` returns without the states; `word`, `cosine` [sample, neighbor], `kind`
        [sample]; the table of landmarks in the manifest.

    Source: arXiv:2603.00510.
    """
    tokens = visual_tokens(model, prompts, image) if tokens is None else tokens
    table, x = word_embeddings(model), tokens["state"].values
    made = TokenClasses() if classes is None else classes
    if not hasattr(made, "landmarks_"):
        known = None
        if sinks is not None:
            known = np.array([p in set(map(int, sinks[n])) for n, p in zip(
                tokens["prompt"].values, tokens["position"].values)])
        plain = np.isin(tokens["prompt"].values, [int(i) for i in uniform])
        made.fit(x, embeddings=table, images=tokens["prompt"].values, places=tokens["place"].values,
                 received=tokens["received"].values, sinks=known, uniform=plain)
    cosine, word = nearest_words(x, table, made.k)
    data = tokens.drop_vars("state").assign(
        word=(("sample", "neighbor"), word), cosine=(("sample", "neighbor"), cosine),
        kind=("sample", made.predict(x)))
    return Result(data, {
        **model.manifest(), "measure": "nearest_token", "classes": str(made), "groups": made.groups_,
        "silhouette": made.silhouette_,
        "landmarks": made.landmarks_.reset_index(names="id").to_dict("records"),
        "prompts": [prompt.digest() for prompt in prompts]})


def labels(found: Result) -> list[dict[int, str]]:
    """Position -> class, prompt by prompt."""
    rows = zip(found["prompt"].values, found["position"].values, found["kind"].values)
    made: list[dict[int, str]] = [{} for _ in range(int(found["prompt"].max()) + 1)]
    for number, position, kind in rows:
        made[int(number)][int(position)] = str(kind)
    return made


@style()
def draw(ax: Axes, picture: Any, segment: Segment, of: Mapping[int, str]) -> Axes:
    """The classes of an image's tokens on the pixels they look at, gray so that color means the class.

    Example:
        >>> from interp.figures.style import canvas
        >>> segment = Segment("image", (1, 2), "image", (1, 2), ((0.0, 0, 8, 8), (8.0, 0, 16, 8)))
        >>> figure, ax = canvas()
        >>> len(draw(ax, np.zeros((8, 16, 3)), segment, {1: "dead", 2: "alive"}).patches)
        2
    """
    if not segment.boxes:
        raise ValueError(f"segment {segment.name!r} has no pixel boxes; it is not an image.")
    pixels = np.asarray(picture)[..., :3].astype(float).mean(-1)
    pixels = 0.2 + 0.8 * pixels / (255.0 if pixels.max(initial=0) > 1 else 1.0)
    ax.imshow(pixels, cmap="gray", vmin=0, vmax=1, extent=(0, pixels.shape[1], pixels.shape[0], 0),
              interpolation="nearest")
    for position, box in zip(segment.positions, segment.boxes):
        if box is not None and position in of:
            ax.add_patch(Rectangle((box[0], box[1]), box[2] - box[0], box[3] - box[1], alpha=0.45,
                                   facecolor=color(ROLES[of[position]]), edgecolor="white",
                                   linewidth=0.4))
    ax.set(xticks=[], yticks=[])
    ax.legend(handles=[Patch(color=color(ROLES[kind]), alpha=0.6, label=kind) for kind in CLASSES],
              loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3)
    return ax


def _matrix(X: Any) -> np.ndarray:
    x = np.asarray(X.detach().cpu().float() if isinstance(X, Tensor) else X, dtype=float)
    if x.ndim != 2 or not len(x):
        raise ValueError(f"tokens must be [sample, d_model], not {x.shape}.")
    if not np.isfinite(x).all() or not (x != 0).any(1).all():
        raise ValueError("some tokens are not numbers, or zero everywhere; leave them out.")
    return x


def _column(values: Any, size: int, name: str) -> np.ndarray:
    made = np.asarray(values)
    if made.shape != (size,):
        raise ValueError(f"{name} has the shape {made.shape}, but there are {size} tokens.")
    return made
