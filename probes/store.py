"""Activations extracted once, kept in shards, larger than memory, ready for probes.

A store is a folder: `manifest.json` says which model, sites, positions and prompts it is of; every
shard holds some prompts' states (`NNNNN.safetensors`, one tensor `[sample, layer, ...]` per site)
and what each sample is (`NNNNN.parquet`). A shard appears whole or not at all, so that an extraction
that was killed goes on where it stopped, and a store of another model or of other prompts is refused.
"""

import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Optional, SupportsIndex, Union

import numpy as np
import pandas as pd
import xarray as xr
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm.auto import tqdm

from interp.causal.sweep import fingerprint
from interp.core import OutOfRange, Prompt, PromptError, ResultCorrupted
from interp.core.errors import did_you_mean
from interp.core.prompt import Where
from interp.core.result import write_atomically
from interp.models.run import READ_DIMS

MANIFEST = "manifest.json"
RESERVED = ("prompt", "position", "token", "sample")
Positions = Union[Where, Callable[[Prompt], Sequence[int]]]


class Store:
    """States of chosen positions of many prompts on disk; made by `extract`, or opened again.

    Example:
        >>> import tempfile, interp
        >>> model = interp.open_model("backcopy-1l")
        >>> prompts = [Prompt.from_tokens(range(i, i + 5)) for i in range(3, 7)]
        >>> folder = tempfile.mkdtemp()
        >>> store = extract(model, prompts, folder, "resid_post", positions="last", progress=False)
        >>> store.states("resid_post", layer=0).dims, len(store.rows)
        (('sample', 'd_model'), 4)
        >>> len(Store(folder))
        4

    Attributes:
        manifest: what the store is of. rows: a table with `prompt`, `position`, `token` and the
            labels that were given, one row per sample, in the order of the states.

    Raises:
        ResultCorrupted: no store in the folder, an unfinished one, or a damaged shard.
    """

    def __init__(self, folder: Union[str, Path]) -> None:
        self.folder = Path(folder)
        self.manifest = _manifest(self.folder)
        self._shards = [s for s in range(self.manifest["n_shards"])]
        missing = [s for s in self._shards if not _complete(self.folder, s)]
        if missing:
            raise ResultCorrupted(
                f"the store {self.folder.name!r} is not finished: {len(missing)} of "
                f"{len(self._shards)} shards are missing; call extract again with the same model and "
                "prompts to go on."
            )
        self.rows = pd.concat([_table(self.folder, s) for s in self._shards], ignore_index=True)

    def __repr__(self) -> str:
        layers = ", ".join(map(str, self.layers))
        return (f"Store({self.folder.name!r}: {len(self)} samples of {self.manifest.get('model')!r}; "
                f"sites {', '.join(self.sites)}; layers {layers})")

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.rows)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that are kept."""
        return tuple(self.manifest["sites"])

    @property
    def layers(self) -> tuple[int, ...]:
        """The true numbers of the layers that are kept."""
        return tuple(self.manifest["layers"])

    def states(
        self, site: str, *, layer: Optional[SupportsIndex] = None,
        samples: Optional[Any] = None,
    ) -> xr.DataArray:
        """States as `[sample, layer, d_model]` (heads and their width for head sites), in memory.

        Args:
            layer: one layer only, `[sample, ...]`: no other is read from disk.
            samples: which rows (numbers, or a boolean mask over `rows`); all for None.

        Raises:
            OutOfRange: a site or layer that is not kept.
        """
        parts = [part for _, part in self.shards(site, layer=layer)]
        whole = xr.concat(parts, "sample") if len(parts) > 1 else parts[0]
        if samples is not None:
            whole = whole.isel(sample=np.flatnonzero(samples) if np.asarray(
                samples).dtype == bool else np.asarray(samples))
        return whole

    def shards(
        self, site: str, *, layer: Optional[SupportsIndex] = None
    ) -> Iterator[tuple[pd.DataFrame, xr.DataArray]]:
        """Rows and states shard by shard, for what does not fit into memory (`partial_fit`, say)."""
        if site not in self.sites:
            raise OutOfRange(f"the store has no site {site!r}; it has: {', '.join(self.sites)}."
                             f"{did_you_mean(site, self.sites)}")
        if layer is not None and int(layer) not in self.layers:
            raise OutOfRange(f"the store has no layer {int(layer)}; it has: {list(self.layers)}.")
        inner = [d for d in READ_DIMS.get(site, ("position", "d_model")) if d != "position"]
        for shard in self._shards:
            with _opened(self.folder, shard) as file:
                part = file.get_slice(site)
                if layer is None:
                    values, dims = part[:], ("sample", "layer", *inner)
                else:
                    values, dims = part[:, self.layers.index(int(layer))], ("sample", *inner)
            coords = {} if layer is not None else {"layer": list(self.layers)}
            yield _table(self.folder, shard), xr.DataArray(
                np.asarray(values, dtype=np.float32), dims=dims, coords=coords)


def extract(
    model: Any,
    prompts: Sequence[Prompt],
    folder: Union[str, Path],
    sites: Union[str, Sequence[str]] = "resid_post",
    *,
    positions: Positions = "last",
    layers: Optional[Iterable[SupportsIndex]] = None,
    labels: Optional[Mapping[str, Sequence[Any]]] = None,
    dtype: str = "float32",
    shard: SupportsIndex = 256,
    batch_size: int = 8,
    progress: bool = True,
) -> Store:
    """Run prompts once and keep the states of some positions; goes on where it was stopped.

    Args:
        sites: names of sites, without layers ("resid_post", "z", "mlp_out", ...).
        positions: a segment, "last", "all", position numbers, or a function from a prompt to these.
        layers: their numbers; all for None. For position-probes across depth "resid_pre" of layer 0
            is the embedding.
        labels: columns for `rows`, one value per prompt.
        dtype: "float32" or "float16" on disk.
        shard: prompts per shard: what a kill can lose.

    Raises:
        PromptError: no prompts, labels of another number, a column with a reserved name.
        OutOfRange: a layer that does not exist.
        ResultCorrupted: the folder holds a store of another model, of other prompts or settings.
        ValueError: states that are not numbers.
    """
    chosen = [sites] if isinstance(sites, str) else list(sites)
    given = list(prompts)
    numbers = list(range(model.n_layers)) if layers is None else sorted(int(x) for x in layers)
    columns = {} if labels is None else {str(k): list(v) for k, v in labels.items()}
    _check(given, chosen, columns, numbers, model.n_layers, dtype)
    size = int(shard)
    n_shards = -(-len(given) // size)
    places = [_places(prompt, positions) for prompt in given]
    about = {"kind": "undertow activation store", "version": 1, "sites": chosen, "layers": numbers,
             "dtype": dtype, "shard": size, "n_prompts": len(given), "n_shards": n_shards,
             "weights": fingerprint(model), "prompts": _digest(given, places, columns)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / MANIFEST).exists():
        _same(folder, about)
    else:
        if any(folder.iterdir()):
            raise ResultCorrupted(
                f"the folder {folder.name!r} is not empty and holds no store; choose another one."
            )
        write_atomically(folder / MANIFEST, json.dumps({**model.manifest(), **about}, indent=1))
    todo = [s for s in range(n_shards) if not _complete(folder, s)]
    with tqdm(total=n_shards, initial=n_shards - len(todo), unit="shard", disable=not progress,
              desc="extracting") as bar:
        for number in todo:
            part = range(number * size, min(len(given), (number + 1) * size))
            _write(folder, number, model, part, given, places, chosen, numbers, columns, dtype,
                   batch_size)
            bar.update()
    return Store(folder)


def _write(
    folder: Path, number: int, model: Any, part: range, prompts: Sequence[Prompt],
    places: Sequence[tuple[int, ...]], sites: Sequence[str], layers: Sequence[int],
    columns: Mapping[str, list], dtype: str, batch_size: int,
) -> None:
    kept: dict[str, list[np.ndarray]] = {site: [] for site in sites}
    rows: list[dict[str, Any]] = []
    asked = [f"{site}.{layer}" for site in sites for layer in layers]
    for start in range(part.start, part.stop, batch_size):
        some = range(start, min(part.stop, start + batch_size))
        reads = model.run([prompts[i] for i in some], read=asked, logits="none",
                          batch_size=batch_size).reads
        for at, i in enumerate(some):
            where = list(places[i])
            for site in sites:
                states = np.stack([reads[f"{site}.{layer}"].values[at, 0][where] for layer in layers], 1)
                if not np.isfinite(states).all():
                    raise ValueError(
                        f"the states at {site!r} of prompt {i} hold values that are not numbers; leave "
                        "the prompt out, or run the model in float32."
                    )
                kept[site].append(states.astype(dtype))
            rows += [{"prompt": i, "position": p, "token": prompts[i].ids[p],
                      **{name: column[i] for name, column in columns.items()}} for p in where]
    table = io.BytesIO()
    pd.DataFrame(rows).to_parquet(table, index=False)
    write_atomically(folder / f"{number:05d}.parquet", table.getvalue())
    tensors = {site: np.concatenate(values) for site, values in kept.items()}
    # Last: a shard is there once its states are.
    write_atomically(folder / f"{number:05d}.safetensors", save(tensors, {
        "rows": str(len(rows)), "table": xxhash.xxh3_128_hexdigest(table.getvalue())}))


def _check(
    prompts: list[Prompt], sites: list[str], columns: Mapping[str, list], layers: list[int],
    n_layers: int, dtype: str,
) -> None:
    if not prompts:
        raise PromptError("no prompts to extract from: give at least one.")
    for site in sites:
        if "." in site or {"query", "key"} <= set(READ_DIMS.get(site, ())):
            raise PromptError(
                f"cannot keep {site!r}: name sites without a layer, and none of size query x key."
            )
    for name, column in columns.items():
        if name in RESERVED:
            raise PromptError(f"a label cannot be named {name!r}: choose another name.")
        if len(column) != len(prompts):
            raise PromptError(
                f"{len(column)} labels {name!r} for {len(prompts)} prompts: give one for each."
            )
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise OutOfRange(f"layer {layer} does not exist: there are 0 to {n_layers - 1}.")
    if dtype not in ("float32", "float16"):
        raise PromptError(f"states cannot be kept as {dtype!r}: choose float32 or float16.")


def _places(prompt: Prompt, positions: Positions) -> tuple[int, ...]:
    where = positions(prompt) if callable(positions) else positions
    return prompt.positions(where)


def _digest(prompts: Sequence[Prompt], places: Sequence[tuple[int, ...]], columns: Mapping) -> str:
    key = xxhash.xxh3_128()
    for prompt, where in zip(prompts, places):
        key.update(f"{prompt.digest()}|{where}".encode())
    key.update(json.dumps(columns, default=str, sort_keys=True).encode())
    return key.hexdigest()


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / MANIFEST).read_text())
        if found["kind"] != "undertow activation store":
            raise KeyError(found["kind"])
        return found
    except FileNotFoundError:
        raise ResultCorrupted(f"there is no store in {folder.name!r}: it has no {MANIFEST}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ResultCorrupted(
            f"{MANIFEST} of {folder.name!r} cannot be read as that of a store ({error}); delete the "
            "folder and extract again."
        ) from None


def _same(folder: Path, about: Mapping[str, Any]) -> None:
    found = _manifest(folder)
    names = {"weights": f"another model (or other weights), {found.get('model')!r}",
             "prompts": "other prompts, positions or labels"}
    # What explains the rest comes first: another model has other layers, too.
    order = sorted(about, key=lambda name: (name != "weights", name.startswith("n_")))
    for name, value in ((name, about[name]) for name in order):
        if found.get(name) != value:
            what = names.get(name, f"{name} {found.get(name)!r}, not {value!r}")
            raise ResultCorrupted(
                f"the store {folder.name!r} was made of {what}; choose another folder, or delete it."
            )


def _complete(folder: Path, shard: int) -> bool:
    """Whether a shard is whole: its states can be opened, and belong to its table."""
    try:
        with safe_open(folder / f"{shard:05d}.safetensors", "numpy") as file:
            said = file.metadata() or {}
        table = (folder / f"{shard:05d}.parquet").read_bytes()
        return said.get("table") == xxhash.xxh3_128_hexdigest(table)
    except (OSError, SafetensorError):
        return False


def _table(folder: Path, shard: int) -> pd.DataFrame:
    return pd.read_parquet(folder / f"{shard:05d}.parquet")


def _opened(folder: Path, shard: int) -> Any:
    try:
        return safe_open(folder / f"{shard:05d}.safetensors", "numpy")
    except (OSError, SafetensorError) as error:
        raise ResultCorrupted(
            f"shard {shard} of the store {folder.name!r} cannot be read ({error}); delete it and call "
            "extract again."
        ) from None
