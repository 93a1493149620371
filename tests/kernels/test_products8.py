"""Products in 8 bits: how far from float64, safe scales, what NaN and infinities become."""

import pytest
import torch

from kernels import cross_entropy
from kernels.products8 import E4M3, E5M2, ROOM, SAMPLED_ROWS, both_ways, in_8_bits, product, sampled_scale, scale_for
from kernels.runtime import INTERPRETED

WAYS = [pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")), "reference"]


def draw(*shape, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16()


@pytest.mark.parametrize("dtype, bits", [(E4M3, 3), (E5M2, 2)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_conversion_is_as_near_as_the_format_allows(dtype, bits, size):
    x = draw(48, 64, scale=size)
    eight = in_8_bits(x, dtype)
    back = eight.values.float() * eight.scale
    assert torch.log2(eight.scale) % 1 == 0
    assert eight.values.float().abs().max() > torch.finfo(dtype).max / 4, "half of the range, or more, is used"
    large = x.abs() > x.abs().max() / 64
    assert ((back - x.float()).abs() <= x.float().abs() * 2.0 ** -(bits + 1))[large].all()


def test_a_product_against_float64_beside_one_in_16_bits():
    """Rounding to 3 bits costs each factor a relative error of about 2^-4 / sqrt(3): 4 % of the product's spread in
    all; in 2 bits and 3 it is 6 %."""
    a, b = draw(64, 256), draw(96, 256, seed=1)
    truth = a.double() @ b.double().t()
    plain = ((a @ b.t()).double() - truth).norm() / truth.norm()
    for dtype, most in ((E4M3, 0.045), (E5M2, 0.07)):
        error = (product(in_8_bits(a, dtype), in_8_bits(b), torch.bfloat16).double() - truth).norm() / truth.norm()
        assert 3 * plain < error <= most, (dtype, error, plain)


def test_scales_look_at_finite_numbers_only():
    x = draw(32, 32)
    spoiled = x.clone()
    spoiled[3], spoiled[5, 7], spoiled[6, 1] = torch.nan, torch.inf, -torch.inf
    spoiled[31, 31] = x[31, 31] = 30.0
    assert torch.equal(scale_for(spoiled), scale_for(x))
    z = product(in_8_bits(spoiled), in_8_bits(torch.eye(32).bfloat16()), torch.float32)
    assert z[[3, 5, 6]].isnan().all(), "what was not finite is seen in its row"
    others = [i for i in range(32) if i not in (3, 5, 6)]
    torch.testing.assert_close(z[others], product(in_8_bits(x), in_8_bits(torch.eye(32)), torch.float32)[others])


@pytest.mark.parametrize("impl", WAYS)
def test_a_sampled_scale_holds_for_rows_that_are_far_larger_and_costs_no_precision(impl):
    """All numbers down to 2^-17 of the largest keep the format's two bits, and rows up to 4,096 times as large as those
    that were looked at do not saturate; what is not finite is left out, and few rows are looked at all."""
    rows = 3 * SAMPLED_ROWS
    x = draw(rows, 16)
    x[0, 0] = 4.0
    x[1], x[2, :8], x[4, 3] = 4.0 * 2**ROOM, 2.0**-15, torch.nan
    scale = sampled_scale(x, impl)
    assert torch.log2(scale) % 1 == 0 and scale == scale_for(x[::3]) * 448 / 57344 * 2**ROOM
    back = both_ways(x, E5M2, scale=scale, impl=impl)[0].plain()
    finite = torch.arange(rows) != 4
    assert ((back - x.float()).abs() <= x.float().abs() / 8)[finite & (x.abs().amin(1) >= 2.0**-15)].all()
    assert (back[2, :8] == 2.0**-15).all() and back[4].isnan().sum() == 1
    few = draw(20, 16)
    few[7, 3] = 1e3
    assert sampled_scale(few, impl) == scale_for(few, E5M2) * 2**ROOM


@pytest.mark.parametrize("impl", WAYS)
def test_where_a_sampled_scale_sees_zeros_only_it_looks_at_all_rows(impl):
    """A document of ignored targets every few rows, say; nothing saturates, whatever the other rows hold."""
    x = draw(3 * SAMPLED_ROWS, 16).mul_(1e4)
    x[::3] = 0
    x[6] = torch.nan
    scale = sampled_scale(x, impl)
    assert scale == scale_for(x, E5M2) * 2**ROOM
    back, rows = both_ways(x, E5M2, scale=scale, impl=impl)[0].plain(), x.isfinite().all(1)
    assert ((back - x.float()).abs() <= x.float().abs() / 8)[rows & (x.abs().amin(1) > 1)].all()
    x[:] = 0
    assert not both_ways(x, E5M2, scale=sampled_scale(x, impl), impl=impl)[0].plain().any()


def test_conversion_saturates_and_zeros_have_a_scale():
    x = torch.tensor([[1.0, -1e9, 3e38]]).expand(16, 3)
    for dtype, most in ((E4M3, 448.0), (E5M2, 57344.0)):
        eight = in_8_bits(x, dtype, most)
        assert eight.values[0, :3].float().tolist() == [1.0, -most, most]
    zero = in_8_bits(torch.zeros(16, 16))
    assert zero.scale > 0 and (product(zero, zero, torch.float32) == 0).all()
    huge, small = torch.zeros(16, 16), torch.eye(16) * 1e-30
    huge[0, 0] = 1e30
    assert product(in_8_bits(huge), in_8_bits(small), torch.float32)[0, 0].item() == pytest.approx(1.0, rel=0.1)


@pytest.mark.parametrize("convert", [in_8_bits, both_ways])
def test_what_cannot_be_converted_is_refused_by_name(convert):
    """On every path alike: the plain one took integers, and a format of 32 bits for one of 8."""
    x = torch.ones(16, 16)
    for wrong in (x.int(), x.double()):
        with pytest.raises(TypeError, match="x has dtype"):
            convert(wrong)
    with pytest.raises(TypeError, match="one of 8 bits"):
        convert(x, torch.float32)
    for wrong in (x[0], x[None]):
        with pytest.raises(ValueError, match=r"x must be \(M, K\)"):
            convert(wrong)
    for largest in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="largest number must be finite"):
            convert(x, E4M3, largest)


def test_both_axes_are_filled_up_with_zeros():
    a, b = draw(5, 19), draw(3, 19, seed=1)
    z = product(in_8_bits(a), in_8_bits(b), torch.float32)
    assert z.shape == (16, 16) and (z[5:] == 0).all() and (z[:, 3:] == 0).all()
    turned = in_8_bits(a).turned()
    assert turned.values.shape == (32, 16) and turned.values.is_contiguous()


def test_the_head_converts_its_weights_once_and_a_gradient_by_a_known_scale(monkeypatch):
    """However many chunks there are; and what a chunk's gradient is, another chunk does not change."""
    seen = []

    def noted(x, dtype, largest):
        seen.append((tuple(x.shape), largest))
        return both_ways(x, dtype, largest)

    monkeypatch.setattr(cross_entropy, "both_ways", noted)
    x, w = draw(64, 32), draw(96, 32, seed=1).float()
    products = cross_entropy._products_for(x, w, True, (0.0, 0.0, 0.0))
    dx, dw = torch.empty_like(x), torch.empty_like(w)
    for start in (0, 32):
        rows = slice(start, start + 32)
        assert products.logits(rows).shape == (32, 96)
        products.gradients_(draw(32, 96, seed=start).tanh(), rows, dx[rows], dw)
    assert seen == [((64, 32), 0.0), ((96, 32), 0.0), ((32, 96), 1.0), ((32, 96), 1.0)]
    gradients = torch.cat([draw(32, 96, seed=start).tanh() for start in (0, 32)]).double()
    for found, right in ((dx, gradients @ w.double()), (dw, gradients.t() @ x.double())):
        assert 0 < (found.double() - right).norm() <= 0.07 * right.norm()


def test_a_gradients_scale_follows_from_the_targets_weights_and_given_ones_go_first():
    x, w = draw(16, 16), draw(16, 16, seed=1).float()
    weights = torch.tensor([1.0, 0.5, 0.25])
    assert cross_entropy._products_for(x, w, True, (0.0, 0.0, 0.0), weights).of_g == 1.75
    assert cross_entropy._products_for(x, w, True, (32.0, 2.25, 1.5), weights).of_g == 1.5
    assert cross_entropy._products_for(x, w, True, (0.0, 0.0, 0.0), weights.expand(16, 3)).of_g == 0
    assert scale_for(x, E4M3, 32.0).item() == pytest.approx(32 / 448, rel=1e-7)
    assert scale_for(x, E5M2, torch.tensor(1.75)).item() == 2.0**-15


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_the_head_in_chunks_of_any_size_is_the_head_at_once(reduction):
    """Chunks of 5 tokens ended in an error of shapes; a NaN in a token stays with it, whatever chunk comes next."""
    x, w = draw(40, 32), draw(96, 32, seed=1).float()
    x[17] = torch.nan
    targets = torch.arange(40)

    def outcome(chunk_tokens):
        leaves = x.clone().requires_grad_(), w.clone().requires_grad_()
        how = dict(impl="reference", fp8=True, reduction=reduction, chunk_tokens=chunk_tokens)
        loss = cross_entropy.linear_cross_entropy(*leaves, targets, **how)
        return [loss.detach(), *torch.autograd.grad(loss.nansum(), leaves)]

    at_once = outcome(40)
    assert at_once[1].isnan().any(1).tolist() == [n == 17 for n in range(40)] or reduction == "sum"
    for chunk_tokens in (5, 16, 33):
        for found, right in zip(outcome(chunk_tokens), at_once):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6, equal_nan=True)
