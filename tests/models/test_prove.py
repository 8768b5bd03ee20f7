"""Proofs of sites: edits of one batch, each of which must be felt by its own run and no other."""

import pytest
import torch

from interp.core.errors import SiteRefused
from interp.core.site import NAMES
from interp.models.model import Model
from interp.models.prove import prove

IDS = [7, 8, 9, 10, 11, 12]


@pytest.fixture(scope="module")
def model(tiny):
    return Model(tiny("llama"), "tiny-llama")


def found(model, outcomes=None, reads=None):
    """The proofs of block 1, with runs or reads that may have a fault."""
    def plain(prompt, writes):
        return model._outcomes("hf", prompt, writes)[0]

    def runs(prompt, writes, read):
        if read:
            rows, values = model._outcomes("hf", prompt, writes, read)
            return rows, values if reads is None else reads(values)
        return (plain(prompt, writes) if outcomes is None else outcomes(plain, prompt, writes)), {}

    return prove(runs, IDS, 1, model._engine("hf").unavailable, 1e-3, True)


def sites(writes):
    return {edit.site.name for one in writes for edit in one if hasattr(edit, "site")}


def test_all_sites_of_a_sound_lane_are_proven_in_one_batch(model):
    calls = []

    def counted(plain, prompt, writes):
        calls.append(len(writes))
        return plain(prompt, writes)

    proofs = found(model, counted)
    assert set(proofs) == set(NAMES) and all(p.readable and p.writable for p in proofs.values())
    assert calls == [1 + 2 * (len(NAMES) - 1)], "embed is proven by what enters the first block"
    assert min(p.moved for p in proofs.values()) > 0.01


def test_a_write_that_does_nothing_is_found(model):
    def deaf(plain, prompt, writes):
        return plain(prompt, [() if "mlp_out" in sites([one]) else one for one in writes])

    proofs = found(model, deaf)
    assert not proofs["mlp_out"].writable and proofs["mlp_out"].readable
    assert proofs["mlp_out"].reason == "replacing it left the outcome unchanged"
    assert all(proof.writable for name, proof in proofs.items() if name != "mlp_out")


def test_a_write_that_lands_in_another_run_is_found(model):
    def next_row(plain, prompt, writes):
        made = plain(prompt, writes)
        return [made[0], made[-1], *made[1:-1]]

    proofs = found(model, next_row)
    assert not any(proof.writable for proof in proofs.values())
    assert "writing back what was read changed the outcome" in proofs["q"].reason

    def everywhere(plain, prompt, writes):
        """Every run feels the edits of all: the untouched one, too."""
        alike = plain(prompt, [tuple(edit for one in writes for edit in one)])[0]
        return [alike] * len(writes)

    assert not any(proof.writable for proof in found(model, everywhere).values())


def test_a_write_that_reaches_earlier_positions_is_found(model):
    def leaking(plain, prompt, writes):
        made = plain(prompt, writes)
        return [row + (row - made[0]).abs().max() * torch.linspace(1, 0, len(row))[:, None]
                for row in made]

    proofs = found(model, leaking)
    assert proofs["z"].reason == "a change at one position moved earlier positions"
    assert not any(proof.writable for proof in proofs.values())


def test_refused_writes_are_told_apart_from_the_others(model):
    calls = []

    def refusing(plain, prompt, writes):
        calls.append(len(writes))
        for name in ("scores", "v"):
            if name in sites(writes):
                raise SiteRefused(f"no {name} here")
        return plain(prompt, writes)

    proofs = found(model, refusing)
    assert proofs["v"].reason == "no v here" and proofs["scores"].reason == "no scores here"
    assert {n for n, p in proofs.items() if not p.writable} == {"v", "scores"}
    assert len(calls) < 2 * len(NAMES), "halved, not one by one"


def test_reads_that_are_no_numbers_are_not_proven(model):
    def broken(values):
        return {**values, "q.1": values["q.1"] * torch.nan, "pattern.1": values["pattern.1"] * 1.5}

    proofs = found(model, reads=broken)
    assert not proofs["q"].readable and proofs["q"].reason == "it reads as NaN"
    assert "rows sum to 1.500" in proofs["pattern"].reason and not proofs["pattern"].writable
    assert proofs["k"].writable
