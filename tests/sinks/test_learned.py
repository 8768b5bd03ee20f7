"""External mass: one minus the row sum, with tolerances that rounding cannot trip."""

import numpy as np
import pytest
import torch

from interp.core.errors import NumericalError
from interp.sinks import learned


def scores(seed: int, *shape: int) -> torch.Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    future = torch.ones(shape[-2:], dtype=torch.bool).triu(1)
    return drawn.masked_fill(future, -torch.inf)


def with_sink_logit(raw: torch.Tensor, logit: torch.Tensor) -> torch.Tensor:
    """Softmax with one extra key per head (axis -3), whose column is dropped."""
    extra = logit[:, None, None].expand(*raw.shape[:-1], 1)
    return torch.cat([raw, extra], -1).softmax(-1)[..., :-1]


def test_mass_equals_the_probability_of_the_planted_sink_logit():
    raw, logit = scores(0, 2, 3, 7, 7), torch.tensor([4.0, 0.0, -9.0])
    mass = learned.external_mass(with_sink_logit(raw, logit))
    closed = learned.external_mass_from_logits(raw.logsumexp(-1), logit)
    assert torch.allclose(mass, closed, atol=1e-6)
    assert float(mass[:, 0].mean()) > 0.8 > 0.4 > float(mass[:, 2].mean())


def test_a_plain_softmax_is_no_external_sink_in_any_precision():
    raw = scores(1, 2, 3, 64, 64) * 4
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        plain = raw.softmax(-1).to(dtype)
        assert not learned.has_external_sink(plain)
        # Cast up again, the values still carry the coarse rounding.
        assert not learned.has_external_sink(plain.float(), dtype=dtype)
        assert learned.has_external_sink(with_sink_logit(raw, torch.ones(3)).to(dtype))


def test_rate_counts_the_heads_with_the_planted_logit():
    raw = scores(2, 4, 2, 3, 9, 9)
    attention = with_sink_logit(raw, torch.tensor([6.0, -20.0, -20.0]))
    mass = learned.external_mass(attention.numpy())
    assert learned.external_sink_rate(mass, 0.5) == pytest.approx(100 / 3)
    assert learned.external_sink_rate(learned.external_mass(raw.softmax(-1)), 0.01) == 0


def test_padded_queries_are_unknown_and_left_out():
    attention = scores(3, 2, 6, 6).softmax(-1)
    attention[:, :2] = 0
    valid = torch.tensor([False, False, True, True, True, True])
    mass = learned.external_mass(attention, valid)
    assert mass[:, :2].isnan().all() and not mass[:, 2:].isnan().any()
    assert learned.has_external_sink(attention)
    assert not learned.has_external_sink(attention, valid=valid)
    assert learned.external_sink_rate(mass, 0.3) == 0


def test_bad_input_is_named():
    with pytest.raises(NumericalError, match="sums to 1.5"):
        learned.external_mass(np.full((1, 2, 3), 0.5, dtype=np.float32))
    with pytest.raises(NumericalError, match="NaN"):
        learned.external_mass(torch.full((1, 2, 3), float("nan")))
    with pytest.raises(ValueError, match="epsilon"):
        learned.external_sink_rate(torch.ones(2, 3), -0.1)
