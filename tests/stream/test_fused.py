"""Fused kernels: used where they fit and agree, left aside with one warning where they do not.

That their statistics are the dense ones is a law in test_laws.py.
"""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from interp.stream import fused
from interp.stream.masks import Mask, bidirectional, causal, padding, sliding_window
from interp.stream.plan import Plan
from interp.stream.reducers import Entropy, Received, TopKeys
from interp.stream.tiles import stream

TRITON = pytest.mark.skipif(not fused._installed(), reason="Triton is not installed")
LAW = "test_statistics_of_whole_rows_from_kernels_are_the_dense_ones"
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def vectors(n: int = 40, width: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, n, width, generator=generator, dtype=dtype)
                 for heads in (4, 2))


@pytest.fixture
def forgetful() -> Any:
    fused._proven.cache_clear()
    yield
    fused._proven.cache_clear()


def test_the_band_of_a_mask_is_what_it_shows():
    t = torch.arange(12)
    for mask in (causal(), sliding_window(3), sliding_window(4, bidirectional=True),
                 bidirectional(), causal() & sliding_window(5, bidirectional=True)):
        behind, ahead = mask.band
        apart = t - t[:, None]
        assert mask(t, t).expand(12, 12).equal((apart >= -behind) & (apart <= ahead))
    assert (causal() & padding(torch.ones(1, 12, dtype=torch.bool))).band is None
    assert (causal() | sliding_window(2)).band is None


@pytest.mark.parametrize("why", ["device", "mask", "bias", "order", "double", "width", "small"])
def test_tiles_do_what_kernels_are_not_for(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_installed", lambda: True)
    monkeypatch.setattr(fused, "_interpreted", lambda: why not in ("device", "small"))
    kind = torch.float64 if why == "double" else torch.float32
    query, key = vectors(40, 257 if why == "width" else 8, kind)
    positions = list(range(40))[::-1] if why == "order" else None
    mask = causal()
    if why == "mask":
        mask = mask & Mask(lambda q, k: k % 2 == 0)
    if why == "bias":
        mask = Mask(mask.visible, bias=lambda q, k: k * 1.0, band=mask.band)
    plan = Plan(query, key, None, None, positions, 0, None, 1 << 20)
    if why == "small":  # on a GPU, but a decoding step
        plan.device = torch.device("cuda")
    assert not fused._fits(plan, mask)


def test_a_kernel_that_fails_or_errs_is_left_aside_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, forgetful: Any
) -> None:
    query, key = vectors()
    want = Entropy()
    stream(query, key, reducers=[want])
    monkeypatch.setattr(fused, "_fits", lambda plan, mask: True)
    for trial, said in ((lambda *_: 0.3, "3.0e-01 off in a trial"),
                        (lambda *_: 1 / 0, "ZeroDivisionError")):
        fused._proven.cache_clear()
        monkeypatch.setattr(fused, "_trial", trial)
        with pytest.warns(RuntimeWarning, match=said) as caught:
            for _ in range(3):
                found = Entropy()
                stream(query, key, reducers=[found])
        assert len(caught) == 1
        torch.testing.assert_close(torch.tensor(found.finish().values),
                                   torch.tensor(want.finish().values))


def test_a_trial_tells_right_kernels_from_wrong_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial is what stands between a miscompiled kernel and a result."""

    class Wrong(fused._Work):
        off = ""

        def rows(self) -> tuple[torch.Tensor, ...]:
            q, k = self.query[0], self.key[0].repeat_interleave(2, 0)
            x = (q @ k.mT * self.scaling).masked_fill(
                torch.ones(150, 150, dtype=torch.bool).triu(1), -torch.inf)
            top, index = x.max(-1)
            self.x = x
            x = x - top[..., None]
            w = x.exp()
            apart = (torch.arange(150)[:, None] - torch.arange(150)).abs()
            made = {"top": top, "total": w.sum(-1), "spread": (w * x.clamp_min(-99)).sum(-1),
                    "far": (w * apart).sum(-1), "key": index.int()}
            if self.off in made:
                made[self.off] = made["key"].roll(1, -1) if self.off == "key" \
                    else made[self.off] * 1.001
            return tuple(each[None] for each in made.values())

        def received(self, log_sum: torch.Tensor, others: bool) -> torch.Tensor:
            made = (self.x - log_sum[0, ..., None]).exp().sum(-2)[None]
            return made * 1.001 if self.off == "received" else made

    monkeypatch.setattr(fused, "_Work", Wrong)
    asked = (torch.device("cpu"), 24, torch.float32, False)
    assert fused._trial(*asked) < 1e-5
    for off in ("top", "total", "spread", "far", "key", "received"):
        monkeypatch.setattr(Wrong, "off", off)
        assert fused._trial(*asked) > fused.AGREES, off


@TRITON
def test_interpreted_kernels_obey_the_law_of_tiles() -> None:
    """Triton decides when it is first imported whether to interpret: a process of its own."""
    law = f"{Path(__file__).with_name('test_laws.py')}::{LAW}[triton]"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-vv", "-p", "no:cacheprovider", law], text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True)
    assert done.returncode == 0 and "PASSED" in done.stdout, done.stdout


@TRITON
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_to_machine_code_with_tensor_cores(capability: int) -> None:
    """For GPUs that need not be there; in a process of its own, that Triton may be imported anew."""
    script = Path(__file__).with_name("_compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, str(capability)], text=True, env=environment,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 8
    for line in lines:
        assert line["bytes"] and line["tensor cores"], line
        assert line["shared memory"] < (163_000 if capability == 80 else 227_000), line


@GPU
@TRITON
def test_on_a_gpu_kernels_agree_with_tiles(forgetful: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = fused._fits
    for dtype in (torch.bfloat16, torch.float32):
        query, key = (x.cuda() for x in vectors(700, 64, dtype))
        for given in ({}, {"softcap": 20.0}, {"sink_logits": torch.arange(4.0).cuda()}):
            for mask in (causal(), sliding_window(70), bidirectional()):
                found, want = ([Received(), Entropy(), TopKeys()] for _ in range(2))
                monkeypatch.setattr(fused, "_fits", fits)
                with warnings.catch_warnings():
                    warnings.simplefilter("error")
                    stream(query, key, reducers=found, mask=mask, **given)
                monkeypatch.setattr(fused, "_fits", lambda plan, mask: False)
                stream(query, key, reducers=want, mask=mask, **given)
                for one, two in zip(found, want):
                    one, two = (torch.tensor(each.finish().values) for each in (one, two))
                    if one.shape[-1] == 2:  # equal weights may have either key
                        one, two = one[..., 0], two[..., 0]
                    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
