"""MLP formation: a hand-made gated MLP with a known sink writer, and controls without one."""

import numpy as np
import pytest
import torch

from interp.core.errors import NumericalError, OutOfRange
from interp.sinks import mlp_formation as formation

WIDTH, HIDDEN = 24, 10


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sink_writer(read: torch.Tensor, write: torch.Tensor, noise: float = 0.0):
    """Weights (gate, up, down) of an MLP that answers the direction `read` with `write`."""
    gate, up = noise * normal(1, HIDDEN, WIDTH), noise * normal(2, HIDDEN, WIDTH)
    down = noise * normal(3, WIDTH, HIDDEN)
    gate[0], up[0], down[:, 0] = read, read, write
    return gate, up, down


READ = torch.nn.functional.normalize(normal(10, WIDTH), dim=0)
WRITE = 30 * torch.nn.functional.normalize(normal(11, WIDTH), dim=0)
WEIGHTS = sink_writer(READ, WRITE)


def mlp(rows: torch.Tensor) -> torch.Tensor:
    return formation.gated_chain(rows, *WEIGHTS)["output"]


def found(inputs_along: float = 6.0, writer=mlp) -> formation.MlpDirections:
    others = normal(12, 40, WIDTH)
    others -= (others @ READ)[:, None] * READ
    sinks = normal(13, 40, WIDTH)
    sinks += (inputs_along - sinks @ READ)[:, None] * READ
    return formation.directions(sinks, others, writer, WRITE)


def test_sinks_with_unlike_inputs_leave_in_one_direction():
    inputs = normal(14, 7, WIDTH)
    inputs -= (inputs @ READ)[:, None] * READ
    inputs[[0, 3, 5]] += 1.5 * READ
    chain = formation.gated_chain(inputs, *WEIGHTS)
    table = formation.stage_cosines(chain, [3, 5])
    assert (table["output"] > 0.999).all() and (table["input"].abs() < 0.8).all()
    # Another reference position that the writer ignores gives no common output.
    assert (formation.stage_cosines(chain, [3, 5], reference=1)["output"].abs() < 1e-6).all()


def test_the_chain_is_the_gated_mlp_of_transformers_llama():
    inputs, (gate, up, down) = normal(15, 5, WIDTH), sink_writer(READ, WRITE, noise=0.3)
    chain = formation.gated_chain(inputs, gate, up, down)
    hidden = inputs @ gate.T
    expected = ((hidden / (1 + (-hidden).exp())) * (inputs @ up.T)) @ down.T
    assert torch.allclose(chain["output"], expected)


def test_update_share_is_one_for_the_only_writer_and_zero_for_a_bystander():
    before, written = normal(16, 6, WIDTH), normal(17, 6, WIDTH)
    other = normal(18, 6, WIDTH)
    other -= ((other * written).sum(-1) / written.square().sum(-1))[:, None] * written
    assert torch.allclose(formation.update_share(written, before, before + written),
                          torch.ones(6, dtype=torch.float64))
    assert formation.update_share(other, before, before + written).abs().max() < 1e-9
    whole = before + written + other
    total = sum(formation.update_share(part, before, whole) for part in (written, other))
    assert torch.allclose(total, torch.ones(6, dtype=torch.float64))


def test_pca_finds_exactly_the_planted_direction():
    directions = found()
    assert directions.selected() != () and directions.selected()[0] == 0
    assert abs(float(directions.components[0] @ READ)) > 0.98
    assert directions.toward() == directions.selected()
    # The sinks lie on the positive side, the controls do not, whatever sign the input has.
    for directions in (found(), found(-6.0)):
        assert float(directions.sink_projection[:, 0].min()) > float(
            directions.other_projection[:, 0].max())
    assert found(-6.0).active_sign(0) == -1


def test_the_response_is_quadratic_on_one_side_only():
    directions = found()
    assert directions.active_sign(0) == 1
    assert 1.8 < directions.slope(0) < 2.3 and directions.asymmetry(0) > 10
    assert directions.top_over_median() > 20


def test_components_are_orthonormal_and_hold_all_the_variance():
    directions = found()
    gram = directions.components @ directions.components.T
    assert torch.allclose(gram, torch.eye(len(gram), dtype=torch.float64), atol=1e-9)
    projected = torch.cat([directions.sink_projection, directions.other_projection])
    assert projected.mean(0).abs().max() < 1e-9
    assert (projected.square().sum(0).diff() < 1e-6).all()


def test_an_mlp_without_the_writer_has_no_selected_direction():
    def ordinary(rows):
        return formation.gated_chain(
            rows, normal(1, HIDDEN, WIDTH), normal(2, HIDDEN, WIDTH), normal(3, WIDTH, HIDDEN)
        )["output"]

    control = found(writer=ordinary)
    assert control.selected() == () and control.top_over_median() < 20


def test_norm_relation_sees_order_and_says_why_it_cannot_be_tested():
    norm = np.linspace(1, 2, 14)
    assert formation.norm_relation(norm, -np.exp(norm)).rho == pytest.approx(-1)
    shuffled = np.random.default_rng(0).permutation(14)
    control = formation.norm_relation(norm, shuffled)
    assert abs(control.rho) < 0.6 and control.p > 0.05 and control.n == 14
    assert formation.norm_relation(norm[:9], norm[:9]).reason == "9 sinks, at least 10 are needed"
    assert formation.norm_relation(norm, np.full(14, 18)).reason == "all outcomes are equal"


def test_bad_input_is_named():
    with pytest.raises(OutOfRange, match="position 9 is outside the 7 positions of stage 'input'"):
        formation.stage_cosines({"input": normal(0, 7, 3)}, [9])
    with pytest.raises(ValueError, match="both signs"):
        formation.directions(normal(0, 3, 4), normal(1, 3, 4), torch.abs, normal(2, 4), [1, 2])
    with pytest.raises(NumericalError, match="NaN"):
        formation.directions(normal(0, 3, 4) * torch.nan, normal(1, 3, 4), torch.abs, normal(2, 4))
    with pytest.raises(ValueError, match="all MLP inputs are equal"):
        formation.directions(torch.ones(3, 4), torch.ones(2, 4), torch.abs, torch.ones(4))
    with pytest.raises(ValueError, match="2 norms but 3 outcomes"):
        formation.norm_relation([1, 2], [1, 2, 3])
