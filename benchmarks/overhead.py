"""What using a library costs before anything is measured: a forward, opening a model, importing.

A forward without edits is held against the transformers model itself. Opening is held against
transformers' own loading of weights and configuration; what ours adds are proofs: five passes of six
tokens, and one batch of 25 such rows with all edits, that show what can be read and written
(`interp.models.prove`). On a processor, loading maps the file and reads no weight, which the first
pass then does: therefore loading and one pass are timed as well.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks._models import bridge, llama, opened, prompts, tokens
from benchmarks._race import Contender, Race, Target, measure

NAME = "overhead"
HF, OURS = "transformers", "undertow"
FORWARD, OPENING, IMPORT = "a forward", "opening a model", "importing"
PEERS = (OURS, "TransformerLens", "nnsight", "pyvene")
SMALL = {"hidden_size": 256}
LARGE = {"hidden_size": 1024, "intermediate_size": 2752, "head_dim": 128}
"""About a hundred million parameters: weights, not fixed costs, are what takes time to load."""


def _imported(races: Mapping[str, Race]) -> float:
    race = races.get(IMPORT)
    seconds = None if race is None else race.lines["import interp"].median
    if seconds is None:
        raise LookupError("the import was not timed")
    return seconds


def _copies(races: Mapping[str, Race]) -> float:
    """Bytes of parameters that opening adds to those of the transformers model, in copies."""
    race = races.get(FORWARD)
    if race is None:
        raise LookupError("no model was opened")
    return race.sizes["bytes of new parameters"] / race.sizes["bytes of parameters"]


TARGETS = (
    Target("`import interp`, seconds of processor time", at_most=1.5, value=_imported),
    Target("opening a model of 100 million parameters, to transformers' own loading",
           at_most=1.1, race=f"{OPENING}, large", of=OURS, to=HF),
    Target("copies of the weights that opening makes", at_most=0.0, value=_copies),
    Target("a forward without edits, to transformers", at_most=1.1, race=FORWARD, of=OURS, to=HF),
)


def race(quick: bool = False, device: str = "cpu") -> list[Race]:
    """Imports in fresh processes, then opening from a folder, then forwards of 8 x 128 tokens."""
    found = [_imports(1 if quick else 5)]
    for name, shape in (("small", SMALL), ("large", LARGE)):
        if not (quick and name == "large"):
            found.append(_opening(f"{OPENING}, {name}", shape, 1 if quick else 5, device))
    return [*found, _forwards(2 if quick else 15, device)]


def _imports(rounds: int) -> Race:
    """Processor time of an import, as the process that does it counts it."""
    modules = ("interp", "torch", "transformers", "transformer_lens", "nnsight", "pyvene")
    now = [0.0]

    def importing(module: str) -> Callable[[], None]:
        code = f"import time; t = time.process_time(); import {module}; " \
               "print(time.process_time() - t)"

        def run() -> None:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                                  cwd=Path(__file__).parents[1])
            if done.returncode:
                raise ImportError(done.stderr.strip().splitlines()[-1])
            now[0] += float(done.stdout.split()[-1])

        return run

    return measure(IMPORT, [Contender(f"import {name}", importing(name)) for name in modules],
                   "import torch", rounds=rounds, clock=lambda: now[0])


def _opening(name: str, shape: dict[str, Any], rounds: int, device: str) -> Race:
    with tempfile.TemporaryDirectory() as folder:
        hf = llama(device, **shape)
        hf.save_pretrained(folder)
        size = sum(x.numel() for x in hf.parameters())
        del hf

        @torch.inference_mode()
        def plain(then: bool = False) -> None:
            hf = transformers.AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, local_files_only=True, dtype=None).to(device)
            if then:
                hf(tokens(1, 6, device=device), use_cache=False)

        def ours() -> None:
            import interp

            interp.open_model(folder, device=device)

        contenders = [Contender(HF, plain), Contender(f"{HF}, and one forward",
                                                      partial(plain, then=True)), Contender(OURS, ours)]
        return measure(name, contenders, HF, rounds=rounds, seconds=120, device=device,
                       sizes={"parameters": size})


def _forwards(rounds: int, device: str) -> Race:
    hf, ids = llama(device), tokens(8, 128, device=device)
    before = {x.data_ptr() for x in hf.parameters()}
    model, given = opened(hf), prompts(ids)
    new = {x.data_ptr(): x.numel() * x.element_size() for x in model.hf.parameters()
           if x.data_ptr() not in before}

    @torch.inference_mode()
    def plain() -> Tensor:
        return hf(ids, use_cache=False).logits

    contenders = [
        Contender(HF, plain),
        Contender(OURS, lambda: torch.stack(model.run(given).logits)),
        Contender(f"{OURS}, every resid_post read",
                  lambda: torch.stack(model.run(given, read="resid_post").logits)),
        Contender("TransformerLens", make=lambda: _bridge(hf, ids, False)),
        Contender("TransformerLens, everything cached", make=lambda: _bridge(hf, ids, True)),
        Contender("nnsight", make=lambda: _nnsight(hf, ids)),
        Contender("pyvene", make=lambda: _pyvene(hf, ids)),
    ]
    return measure(
        FORWARD, contenders, HF, rounds=rounds, device=device, tolerance=1e-4,
        sizes={"prompts": 8, "tokens": 128, "bytes of new parameters": sum(new.values()),
               "bytes of parameters": sum(x.numel() * x.element_size() for x in hf.parameters())})


def _bridge(hf: Any, ids: Tensor, cached: bool) -> Callable[[], Tensor]:
    found = bridge(hf)

    @torch.inference_mode()
    def run() -> Tensor:
        return found.run_with_cache(ids)[0] if cached else found(ids)

    return run


def _nnsight(hf: Any, ids: Tensor) -> Callable[[], Tensor]:
    import nnsight

    wrapped = nnsight.NNsight(hf)

    @torch.inference_mode()
    def run() -> Tensor:
        with wrapped.trace(ids, use_cache=False):
            logits = wrapped.output.logits.save()
        return logits

    return run


def _pyvene(hf: Any, ids: Tensor) -> Callable[[], Tensor]:
    import pyvene

    # It needs something to collect or to change: here the output of the first block, unchanged.
    config = pyvene.IntervenableConfig(
        [{"layer": 0, "component": "block_output",
          "intervention": lambda base, source=None, *_, **__: base}])
    wrapped = pyvene.IntervenableModel(config, model=hf)
    unit = {"base": list(range(ids.shape[1]))}

    @torch.inference_mode()
    def run() -> Tensor:
        out = wrapped({"input_ids": ids}, unit_locations=unit)
        return (out[1] if out[1] is not None else out[0]).logits

    return run

