"""Muon's arithmetic: singular values against float64, the split master bit by bit, momentum, the kernels."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.muon import (
    COEFFICIENTS,
    apply_update_,
    join_master,
    momentum_,
    normalize_rows_,
    orthogonalize,
    orthogonalize_reference,
    split_master,
)
from kernels.runtime import INTERPRETED

WAYS = [pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")), "reference"]


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scalar_steps(s, coefficients):
    """What the iteration does to a singular value."""
    for a, b, c in COEFFICIENTS[coefficients]:
        s = a * s + b * s**3 + c * s**5
    return s


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("coefficients", sorted(COEFFICIENTS))
@pytest.mark.parametrize("shape", [(3, 40, 24), (3, 24, 40), (1, 33, 33)])
def test_singular_values_move_as_the_polynomials_say_and_vectors_stay(impl, coefficients, shape):
    g = draw(*shape)
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    norm = torch.linalg.vector_norm(g.double(), dim=(-2, -1), keepdim=True)[..., 0]
    divisor = 1.02 * norm + 1e-6 if coefficients == "record18" else norm + 1e-7
    truth = (u * scalar_steps(s / divisor, coefficients)[..., None, :]) @ vh
    ours = orthogonalize(g, coefficients=coefficients, dtype=torch.float32, impl=impl)
    assert ours.shape == g.shape and ours.dtype == g.dtype
    # the steps multiply what is small, rounding too, by up to a thousand (the product of the first coefficients)
    assert (ours - truth).abs().max() <= 1e-4
    once, again = (orthogonalize(g, coefficients=coefficients, dtype=torch.float32, impl=impl) for _ in range(2))
    assert torch.equal(once, again)


@pytest.mark.parametrize(
    "coefficients, least, most", [("spec", 0.95, 1.05), ("polar_express", 0.85, 1.15), ("record18", 0.85, 1.15)]
)
def test_singular_values_come_near_one(coefficients, least, most):
    """Those of at least 1/50 of the norm; smaller ones are still on their way."""
    s = torch.linspace(0.02, 1.0, 2000, dtype=torch.float64)
    ends = scalar_steps(s, coefficients)
    assert least <= ends.min() and ends.max() <= most
    g = draw(2, 64, 96)
    values = torch.linalg.svdvals(orthogonalize(g, coefficients=coefficients).double())
    assert least - 0.05 <= values.min() and values.max() <= most + 0.05


def test_the_start_of_record_18_leaves_room_above_one():
    """A matrix of rank one starts at 1 / (margin + eps / norm), by the polynomials of that record."""
    g = 1e-5 * torch.nn.functional.normalize(draw(6, 1).double(), dim=0) @ torch.ones(1, 4, dtype=torch.float64) / 2
    x = orthogonalize(g, coefficients="record18", dtype=torch.float64, impl="reference")
    start = torch.tensor(1e-5 / (1.02e-5 + 1e-6), dtype=torch.float64)
    torch.testing.assert_close(torch.linalg.matrix_norm(x, 2), scalar_steps(start, "record18"), rtol=1e-9, atol=0)


def test_polar_express_is_the_best_odd_quintic_on_its_first_interval():
    """Minimax: on [0.024, 1], up to its scale, the error of step 1 reaches its greatest size four times, with
    changing sign. The margin stretches the interval."""
    a, b, c = COEFFICIENTS["polar_express"][0]
    s = torch.linspace(0.02407 * 1.01, 1.01, 400001, dtype=torch.float64)
    values = a * s + b * s**3 + c * s**5
    error = values - (values.max() + values.min()) / 2
    near = error[error.abs() > 0.995 * error.abs().max()].sign()
    assert int((near[1:] != near[:-1]).sum()) == 3


@pytest.mark.parametrize("coefficients", sorted(COEFFICIENTS))
def test_a_matrix_of_rank_one_stays_in_bounds_in_bfloat16(coefficients):
    """Its singular value is the norm, so rounding puts it beyond one, where the polynomials are steep."""
    for seed in range(5):
        g = draw(30, 1, seed=seed) @ draw(1, 50, seed=seed + 9)
        assert 0.5 <= torch.linalg.matrix_norm(orthogonalize(g, coefficients=coefficients), 2) <= 1.5


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e15])
@pytest.mark.parametrize("impl", WAYS)
def test_any_scale_stays_finite(impl, scale):
    x = orthogonalize(draw(2, 20, 12) * scale, dtype=torch.float32, impl=impl)
    assert torch.isfinite(x).all()
    if scale > 1:
        torch.testing.assert_close(
            x, orthogonalize(draw(2, 20, 12), dtype=torch.float32, impl=impl), rtol=1e-3, atol=1e-4
        )


def test_a_batch_is_its_matrices():
    g = draw(2, 3, 20, 30)
    batch = orthogonalize(g, dtype=torch.float32)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(batch[i, j], orthogonalize(g[i, j], dtype=torch.float32), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="coefficients"):
        orthogonalize(g, coefficients="best")
    with pytest.raises(ValueError, match="matrices"):
        orthogonalize(g[0, 0, 0])
    torch.testing.assert_close(orthogonalize_reference(g, dtype=torch.float32), batch)


@pytest.mark.parametrize("impl", WAYS)
def test_momentum_is_nesterovs(impl):
    buffer, grad, m = draw(5, 7), draw(5, 7, seed=1), 0.9
    expected = m * buffer.double() + (1 - m) * grad.double()
    step = momentum_(buffer, grad, m, impl=impl)
    torch.testing.assert_close(buffer.double(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(step.double(), m * expected + (1 - m) * grad.double(), rtol=0, atol=1e-6)
    assert momentum_(buffer, grad.bfloat16(), m, impl="reference").dtype == torch.float32


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=40))
def test_a_master_is_its_two_halves_bit_by_bit(values):
    master = torch.tensor(values, dtype=torch.float32)
    weight, mantissa = split_master(master)
    assert weight.dtype == torch.bfloat16 and mantissa.dtype == torch.uint16
    assert torch.equal(join_master(weight, mantissa).view(torch.int32), master.view(torch.int32))
    finite = master.isfinite()
    assert (weight.float().abs() <= master.abs())[finite].all()  # cut off, not rounded


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("mantissa_dtype", [torch.uint16, torch.int16])
def test_updates_of_a_split_master_are_those_of_the_whole(impl, mantissa_dtype):
    """Twenty small steps, each far below a bfloat16's resolution, do add up, as in float32 and float64."""
    whole = draw(30, 11)
    exact, start = whole.double(), whole.clone()
    weight, mantissa = split_master(whole)
    mantissa = mantissa.view(mantissa_dtype).clone()
    for step in range(20):
        update = draw(30, 11, seed=1) + 0.1 * draw(30, 11, seed=step + 2)
        apply_update_(weight, mantissa, update, lr=1e-4, weight_decay=1e-5, impl=impl)
        apply_update_(whole, None, update, lr=1e-4, weight_decay=1e-5, impl=impl)
        exact = exact * (1 - 1e-5) - 1e-4 * update.double()
    assert torch.equal(join_master(weight, mantissa), whole)
    torch.testing.assert_close(whole.double(), exact, rtol=1e-6, atol=2e-6)
    assert (whole - start).abs().mean() > 1e-3


@pytest.mark.parametrize("impl", WAYS)
def test_cautious_decay_with_a_split_master_is_that_of_the_whole(impl):
    """Zeros decay (to zero), and signs are those of the master, not of its upper half."""
    whole = torch.cat([draw(200), torch.tensor([0.0, -0.0, 1.0, -1.0])])
    update = torch.cat([draw(200, seed=1), torch.tensor([0.0, 1.0, 0.0, 0.0])])
    exact, start = whole.double(), whole.clone()
    weight, mantissa = split_master(whole)
    how = dict(lr=1e-3, weight_decay=0.05, cautious=True, impl=impl)
    for _ in range(3):
        apply_update_(weight, mantissa, update, **how)
        apply_update_(whole, None, update, **how)
        exact = exact * torch.where(update * exact >= 0, 0.95, 1.0) - 1e-3 * update.double()
    assert torch.equal(join_master(weight, mantissa), whole)
    torch.testing.assert_close(whole.double(), exact, rtol=1e-6, atol=1e-7)
    against = (update * start < 0) & (start.abs() > 0.1)
    assert against.sum() > 50 and (whole.abs() > start.abs())[against].all(), "what grows does not decay"


def test_rows_of_one_size_over_steps_in_float64():
    """Three steps against NorMuon written out row by row; the matrix keeps its size, the state its place."""
    v, truth = torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.float64)
    for step in range(3):
        x = draw(2, 5, 7, seed=step) * torch.tensor([1.0, 10, 0.1, 1, 0])[:, None]
        found = normalize_rows_(x.bfloat16(), v)
        assert found.dtype == torch.float32
        for b in range(2):
            wide = x.bfloat16()[b].double()
            for row in range(5):
                truth[b, row] += 0.05 * (wide[row].square().mean() - truth[b, row])
            scaled = torch.stack([wide[row] * max(truth[b, row].item(), 1e-10) ** -0.5 for row in range(5)])
            scaled *= wide.norm() / scaled.norm()
            torch.testing.assert_close(found[b].double(), scaled, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(v.double(), truth, rtol=1e-5, atol=1e-9)
    assert (normalize_rows_(torch.zeros(2, 3, 4), torch.zeros(2, 3)) == 0).all()


def test_a_mantissa_beside_a_float32_weight_is_refused():
    with pytest.raises(ValueError, match="mantissa"):
        apply_update_(draw(3), torch.zeros(3, dtype=torch.int16), draw(3), lr=1.0, weight_decay=0.0)
