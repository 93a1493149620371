"""The CPU's fast paths against the plain references in float64, with every gradient."""

import pytest
import torch

from kernels import attention_banded
from kernels.attention import attention, attention_inputs, attention_plan, attention_reference
from kernels.attention_banded import CHUNK_TOKENS, band_mask, banded_attention
from kernels.attention_inputs import attention_inputs_reference


def gradients(function, tensors, dy):
    tensors = [t.detach().clone().requires_grad_() for t in tensors]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, dy.to(out.dtype))]


@pytest.mark.parametrize("B,T", [(1, 1), (1, CHUNK_TOKENS), (1, 701), (2, 130), (3, 65)])
@pytest.mark.parametrize("window", [0, 1, 3, 27])
@pytest.mark.parametrize("documents", [True, False])
def test_both_banded_paths_equal_float64(B, T, window, documents):
    generator = torch.Generator().manual_seed(T + window)
    tokens = torch.randint(1, 60, (B, T), generator=generator)
    plan = attention_plan(tokens, eos_id=3 if documents else 0, window_blocks=window)
    q, k, v, do = (torch.randn(B, T, 2, 16, generator=generator) for _ in range(4))
    assert plan.band_mask is not None
    wide = [t.double() for t in (q, k, v)]
    truth = gradients(lambda *t: attention_reference(*t, plan, scale=0.3), wide, do)
    batch = gradients(lambda *t: attention(*t, plan, scale=0.3), [q, k, v], do)
    loop = gradients(lambda *t: banded_attention(*t, plan.first_key_BT, 0.3), [q, k, v], do)
    for name, exact, *others in zip(("o", "dq", "dk", "dv"), truth, batch, loop):
        for ours in others:
            assert (ours - exact).abs().max() <= 3e-6 * max(exact.abs().max(), 1), name


def test_a_large_mask_is_not_kept():
    plan = attention_plan(length=64 * 300)
    assert plan.band_mask is None and band_mask(torch.zeros(1, 640, dtype=torch.int64)) is not None
    windowed = attention_plan(length=64 * 300, window_tokens=64)
    assert windowed.band_mask.shape == (300, 1, 64, 128)


@pytest.mark.parametrize("with_ve", [True, False])
def test_written_prologue_equals_float64(with_ve):
    generator = torch.Generator().manual_seed(1)
    B, T, H, Dh = 2, 37, 3, 8
    q, k, v, ve = (torch.randn(B, T, H, Dh, generator=generator) for _ in range(4))
    s = torch.tensor([0.7, -0.4])
    angle = torch.randn(T, Dh // 2, generator=generator)
    tables = angle.cos(), angle.sin()
    given = [q, k, v, *([ve] if with_ve else []), s]

    def stacked(prologue, *tensors):
        *heads, scalars = tensors
        q, k, v, *rest = heads
        tables_of = [t.to(q.dtype) for t in tables]
        return torch.stack(prologue(q, k, v, rest[0] if rest else None, scalars, *tables_of))

    dy = torch.randn(3, B, T, H, Dh, generator=generator)
    # torch's own epsilon follows the dtype; at these sizes it is far below the tolerance
    truth = gradients(lambda *t: stacked(attention_inputs_reference, *t), [t.double() for t in given], dy)
    ours = gradients(lambda *t: stacked(attention_inputs, *t), given, dy)
    for exact, got in zip(truth, ours):
        assert (got - exact).abs().max() <= 1e-5 * max(exact.abs().max(), 1)


def test_the_operators_keep_their_contracts():
    """torch.library.opcheck, on more than one chunk of queries and with fewer key heads than heads of queries."""
    T, random = CHUNK_TOKENS + 8, torch.Generator().manual_seed(0)
    q, k, v, do = (torch.randn(1, T, heads, 8, generator=random) for heads in (2, 1, 1, 2))
    first_key = attention_plan(length=T, window_tokens=70).first_key_BT
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(attention_banded._banded_attention, (*leaves, first_key, 0.3))
    with torch.no_grad():
        o, lse = attention_banded._banded_attention(q, k, v, first_key, 0.3)
        given = do, *(x.detach() for x in (q, k, v)), o, lse, first_key, 0.3
        torch.library.opcheck(attention_banded._banded_attention_backward, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T, K", [(70, 2), (300, 1)])
def test_a_row_whose_logits_are_all_minus_infinity_is_nan_as_in_the_definition(T, K, dtype):
    """It was the mean of keys that it must not see, later ones among them; chunks in one batch, and the loop."""
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, T, h, 16, generator=random).to(dtype) for h in (2, K, K))
    q, k[:, :5], k[:, 40] = q.abs(), -torch.inf, -torch.inf
    tokens = torch.ones(T, dtype=torch.int32)
    tokens[40] = 0
    plan = attention_plan(tokens, eos_id=0)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    found = attention(*leaves, plan, scale=0.3)
    right = attention_reference(q.double(), k.double(), v.double(), plan, scale=0.3)
    rows = [0, 1, 2, 3, 4, 40]
    assert right.isnan().flatten(2).all(2)[0].nonzero().flatten().tolist() == rows
    torch.testing.assert_close(found.double(), right, rtol=2e-2, atol=2e-2, equal_nan=True)
    (dq,) = torch.autograd.grad(found.sum(), leaves[:1])
    assert dq[0, rows].isnan().any(-1).all()
