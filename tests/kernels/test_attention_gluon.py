"""Attention's kernel in Gluon, in the model of kernels/proof/gluon_model.py; its cases stand in kernels/proof/families.

Here: what the counted issue slots rest on, and that the model notices what it is there for.
"""

import pytest
import torch

import kernels.attention
import kernels.attention_gluon as module
from kernels.attention import allowed_pairs, attention_plan, attention_reference
from kernels.proof import gluon_model, machine_code, slots
from kernels.proof.interpreter import KernelFault
from kernels.runtime import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs triton and its interpreter")


def plan_of(T, starts, **window):
    tokens = torch.ones(T, dtype=torch.int32)
    tokens[list(starts)] = 0
    return attention_plan(tokens, eos_id=0, **window)


@pytest.mark.parametrize(
    "T, starts, window",
    [(1000, (), {}), (1000, (300, 777), {"window_blocks": 3}), (520, (50, 64, 400), {}), (70, range(70), {})],
)
def test_the_counted_tiles_are_those_that_the_kernel_multiplies(T, starts, window):
    plan = plan_of(T, starts, **window)
    x = torch.zeros(1, T, 1, 64)
    gluon_model.multiplied.clear()
    gluon_model.modelled(module).launch_forward(x, x, x, plan.first_key_BT, plan.query_order_N, 1.0)
    counted = slots.walk("gluon", plan)
    whole, half = module.TILE, module.HALF
    products = {
        (half, whole, 64): counted.full,
        (half, 64, whole): counted.full,
        (half, half, half): 2 * counted.masked,
    }
    assert dict(gluon_model.multiplied) == {size: n for size, n in products.items() if n}
    assert counted.pairs >= allowed_pairs(plan).sum()


@pytest.mark.parametrize("kernel", ["triton", "specialised", "gluon"])
def test_visited_tiles_hold_all_allowed_pairs(kernel):
    """Full tiles hold allowed pairs only: with no document's border, only the diagonal is masked."""
    for plan in (plan_of(1024, ()), plan_of(1024, (), window_blocks=3), plan_of(1024, (500,))):
        assert slots.walk(kernel, plan).pairs >= allowed_pairs(plan).sum()
    one = slots.walk(kernel, plan_of(1024, ()))
    if kernel != "specialised":  # 8 tiles of queries; of the 36 pairs of 128 x 128, 28 lie before the diagonal
        assert one.full * one.full_keys * 64 == 28 * 128**2
    assert one.masked * one.masked_keys * 64 == {"triton": 8, "specialised": 36, "gluon": 6}[kernel] * 128**2


def test_attention_takes_it_by_name_with_the_gradients_of_the_plain_kernel(monkeypatch):
    """From the public function through the operator, with inputs and a plan that are not dense; as on a device, where
    nothing but the name chooses it."""
    monkeypatch.setattr(kernels.attention, "attention_gluon", gluon_model.modelled(module))
    monkeypatch.setattr(kernels.attention, "implementation", lambda impl, _tensor: impl)
    random = torch.Generator().manual_seed(0)
    merged = torch.randn(1, 140, 3, 64, generator=random)
    plan = plan_of(140, (0, 50))
    hostile = plan._replace(query_order_N=torch.stack((plan.query_order_N, plan.query_order_N), 1)[:, 0])
    upstream = torch.randn(1, 140, 1, 64, generator=random)

    def outcome(run, plan):
        leaf = merged.clone().requires_grad_()
        o = run(*leaf.split(1, dim=2), plan)
        return o.detach(), torch.autograd.grad(o, leaf, upstream)[0]

    gluon_model.launched.clear()
    found = outcome(lambda *given: kernels.attention.attention(*given, scale=0.2, impl="gluon"), hostile)
    assert gluon_model.launched == {"_attention_forward_gluon": 1}
    right = outcome(lambda q, k, v, plan: attention_reference(q, k, v, plan, scale=0.2), plan)
    for x, true in zip(found, right):
        torch.testing.assert_close(x, true, rtol=1e-4, atol=1e-5)


def test_slots_and_cycles_of_a_loop(monkeypatch):
    """Four instructions; two products of 64 x 128 x 16 and one of 64 x 64 x 16 are 64 + 64 + 32 cycles."""
    products = [f"HGMMA.64x{n}x16.F32.BF16 R24, gdesc[UR4], R24" for n in (128, 128, 64)]
    lines = [f"        /*{i:04x}*/  {text} ;" for i, text in enumerate(["MOV R1, R2", *products])]
    listing = "\n".join([lines[0], ".L_x_1:", *lines[1:], "        /*0010*/  @P0 BRA `(.L_x_1) ;"])
    monkeypatch.setattr(machine_code, "_tool", lambda *_: listing)
    assert machine_code.tensor_loops(b"") == [(4, 160)]


def test_the_model_notices_a_hang_a_stray_address_and_a_buffer_overwritten():
    machine = gluon_model._Machine(0, gluon_model.random.Random(0))
    barrier = gluon_model.Barrier()
    gluon_model.mbarrier.init(barrier, 1)
    with pytest.raises(KernelFault, match="nobody can go on"):
        machine.run([(lambda: machine.step(lambda: barrier.phase > 0), ())] * 2)
    with pytest.raises(KernelFault, match=r"3 \.\. 3 of 3"):
        gluon_model.gl.load(gluon_model.Pointer(torch.zeros(3, dtype=torch.int32)) + 3)
    buffer = torch.ones(2, 2)
    product = gluon_model._Product(lambda: buffer @ buffer)
    buffer.zero_()
    with pytest.raises(KernelFault, match="overwritten"):
        product.end()
