"""Attention's kernel in Gluon, in the model of kernels/proof/gluon_model.py; its cases stand in kernels/proof/families.

Here: what the counted issue slots rest on, and that the model notices what it is there for.
"""

import pytest
import torch

import kernels.attention
import kernels.attention_gluon as module
import kernels.attention_gluon_backward as backward
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
    counted = slots.walk("_attention_forward_gluon", plan)
    whole, half = module.TILE, module.HALF
    products = {
        (half, whole, 64): counted.full,
        (half, 64, whole): counted.full,
        (half, half, half): 2 * counted.masked,
    }
    assert dict(gluon_model.multiplied) == {size: n for size, n in products.items() if n}
    assert counted.pairs >= allowed_pairs(plan).sum()


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    "T, starts, window", [(500, (), {}), (500, (300, 433), {"window_blocks": 2}), (70, range(70), {})]
)
def test_the_counted_tiles_backward_are_those_that_the_kernel_multiplies(T, starts, window, width):
    """So are the cycles of a tile, which at width 64 are not those of the loop: there the groups take turns."""
    plan = plan_of(T, starts, **window)
    x = torch.zeros(1, T, 1, width)
    whole = -(-T // module.TILE) * module.TILE
    gluon_model.multiplied.clear()
    gluon_model.added.clear()
    given = (
        x,
        x,
        x,
        x,
        torch.zeros(2, 1, 1, whole),
        torch.zeros(1, 1, T, width),
        torch.zeros_like(x),
        torch.zeros_like(x),
    )
    gluon_model.modelled(backward).launch_backward(*given, plan.end_query_BT, plan.key_order_N, 1.0, 1)
    counted = slots.walk("_attention_backward_gluon", plan)
    tiles = counted.full + counted.masked
    assert counted.pairs >= allowed_pairs(plan).sum()
    half = module.HALF
    of_dq = tiles * (2 if width == 128 else 1)
    products = {(half, half, width): 2 * tiles, (half, width, half): 2 * tiles, (half, half, half): of_dq}
    if width == half:
        products = {(half, half, half): 4 * tiles + of_dq}
    assert dict(gluon_model.multiplied) == products
    assert counted == slots.walk("_attention_dkdv_gluon", plan)
    done = sum(2 * a * b * c * n for (a, b, c), n in products.items()) / slots.FLOPS_A_CYCLE
    (_, cycles), masked = slots.tile_loops("_attention_backward_gluon", width, [(500, 1)])
    assert tiles * cycles == done and masked == (500, cycles)
    assert slots.added_bytes(plan, width) == sum(gluon_model.added.values())


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    "T, starts, window", [(500, (), {}), (500, (300, 433), {"window_blocks": 2}), (70, range(70), {})]
)
def test_the_counted_tiles_of_both_passes_are_those_that_they_multiply(T, starts, window, width):
    plan, half = plan_of(T, starts, **window), module.HALF
    x, lse, modelled = torch.zeros(1, T, 1, width), torch.zeros(1, 1, T), gluon_model.modelled(backward)
    gluon_model.multiplied.clear()
    of_queries = plan.first_key_BT, plan.query_order_N
    rows = modelled.launch_dq(x, x, x, x, x, lse, torch.zeros_like(x), *of_queries, 1.0, 1)
    found = {"_attention_dq_gluon": dict(gluon_model.multiplied)}
    gluon_model.multiplied.clear()
    grads = torch.zeros_like(x), torch.zeros_like(x)
    modelled.launch_backward(x, x, x, x, rows, None, *grads, plan.end_query_BT, plan.key_order_N, 1.0, 1)
    found["_attention_dkdv_gluon"] = dict(gluon_model.multiplied)
    for kernel, behind in (("_attention_dq_gluon", 1), ("_attention_dkdv_gluon", 2)):
        counted = slots.walk(kernel, plan)
        tiles = counted.full + counted.masked
        assert counted.pairs >= allowed_pairs(plan).sum()
        products = {(half, half, width): 2 * tiles, (half, width, half): behind * tiles}
        assert found[kernel] == (products if width > half else {(half, half, half): (2 + behind) * tiles})


KERNELS = [kernel for group in slots.PASSES.values() for kernel in group]


@pytest.mark.parametrize("kernel", KERNELS)
def test_visited_tiles_hold_all_allowed_pairs(kernel):
    """Full tiles hold allowed pairs only: with no document's border, only the diagonal is masked."""
    for plan in (plan_of(1024, ()), plan_of(1024, (), window_blocks=3), plan_of(1024, (500,))):
        assert slots.walk(kernel, plan).pairs >= allowed_pairs(plan).sum()
    one, pairs = slots.walk(kernel, plan_of(1024, ())), 128**2
    # 8 tiles of queries, or of keys; of the 36 pairs of 128 x 128, 28 lie before the diagonal. Groups that look at
    # their own 64 keys have a quarter of those on it in full, and leave a quarter out
    by_halves = ("_attention_backward_gluon", "_attention_dkdv_gluon", "_attention_dq_gluon")
    full = {"_attention_forward_specialised": 0, **dict.fromkeys(by_halves, 30)}.get(kernel, 28)
    masked = {"_attention_forward_specialised": 36, "_attention_forward_gluon": 6, **dict.fromkeys(by_halves, 4)}
    assert one.full * one.full_keys * 64 == full * pairs
    assert one.masked * one.masked_keys * 64 == masked.get(kernel, 8) * pairs


def test_what_a_pass_asks_for():
    """By hand: one document of 128 tokens, whose tiles are masked, at loops of round numbers."""
    plan, loops = plan_of(128, ()), {kernel: [(100, 64), (200, 64)] for kernel in KERNELS}
    two = slots.asked("backward", "triton", plan, 128, loops)  # dq and dkdv visit four tiles of 64 x 64 each
    least = 10 * (128 * 129 // 2) * 128 / 4096
    assert two == (2 * 4 * 200, 2 * 4 * 64, least, 128**2, 128**2)
    one = slots.asked("backward", "gluon_one_pass", plan, 128, loops)  # of four one is full, one is left out
    assert one == (100 + 2 * 200, 3 * 64, least, 3 * 64**2, 2 * 64**2)
    both = slots.asked("backward", "gluon", plan, 128, loops)  # likewise, twice
    assert both == (2 * one.slots, 2 * one.busy, *one[2:])
    a_cycle = 3e12 * 4096 / 798e12
    assert slots.memory_cycles("_attention_dq_gluon", plan, 64) == pytest.approx(128 * 64 * 12 / a_cycle)
    assert slots.allowed(plan) == 128 * 129 // 2
    assert slots.around_bytes(plan, 128) == 128 * 128 * 16


def test_committed_loops_and_page_are_of_one_count():
    """docs/slots.md tells what slots.json holds."""
    plan = attention_plan(slots.documents(), eos_id=0, window_blocks=slots.WINDOWS[-1] // 128)
    told = [[cell.strip() for cell in line.split("|")[1:-1]] for line in slots.PAGE.read_text().splitlines()]
    for width in slots.WIDTHS:
        for direction, name in slots.PASSES:
            (row,) = (r for r in told if r[:3] == [str(width), direction, name] and r[5] == str(slots.WINDOWS[-1]))
            found = slots.asked(direction, name, plan, width)
            assert row[-2] == f"{found.slots / found.least:.2f}"
            assert row[-4] == f"{found.busy / found.least:.2f}"


TWO_PASSES = {"_attention_dq_gluon": 1, "_attention_dkdv_gluon": 1}


@pytest.mark.parametrize(
    "impl, in_order, passes",
    [
        ("gluon", False, TWO_PASSES),
        ("gluon_one_pass", False, {"_attention_backward_gluon": 1}),
        ("gluon_one_pass", True, TWO_PASSES),
    ],
)
def test_attention_takes_it_by_name(monkeypatch, impl, in_order, passes):
    """From the public function through the operators, with inputs and a plan that are not dense; as on a device, where
    nothing but the name chooses it. Backward in one pass, but not where the run asks for results that repeat."""
    monkeypatch.setattr(kernels.attention, "attention_gluon", gluon_model.modelled(module))
    monkeypatch.setattr(kernels.attention, "attention_gluon_backward", gluon_model.modelled(backward))
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: in_order)
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
    found = outcome(lambda *given: kernels.attention.attention(*given, scale=0.2, impl=impl), hostile)
    assert gluon_model.launched == {"_attention_forward_gluon": 1} | passes
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


def test_a_layer_goes_back_by_the_same_name(monkeypatch):
    """The layer as one operator hands the name on to its backward pass."""
    from kernels import attention_layer

    taken = []

    def noted(*given, **options):
        taken.append(options.pop("backward"))
        return kernels.attention.launch_backward(*given, **options)

    monkeypatch.setattr(attention_layer, "launch_backward", noted)
    monkeypatch.setattr(attention_layer, "attention_implementation", lambda impl, _tensor: impl)
    monkeypatch.setattr(kernels.attention, "attention_gluon", gluon_model.modelled(module))
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    w, s = torch.ones(3 * 64, 8, requires_grad=True), torch.ones(2, requires_grad=True)
    rotary = torch.ones(5, 32), torch.zeros(5, 32)
    for impl in ("gluon", "triton"):
        how = dict(heads=1, width=64, scale=0.1, impl=impl, inputs_impl="triton")
        o, _ = attention_layer.attention_layer(x, w, None, s, rotary, plan_of(5, (2,)), **how)
        o.sum().backward()
    assert taken == ["gluon", "triton"]


def test_the_model_notices_what_is_stored_without_a_fence_and_a_tile_that_changes_while_it_is_added():
    machine = gluon_model._Now.machine = gluon_model._Machine(0, gluon_model.random.Random(0))
    machine.haste = 0.0
    buffer, total = gluon_model.Shared(torch.zeros(2, 4)), torch.ones(3, 4)
    target = gluon_model.descriptor(total, [2, 4])
    buffer.store(torch.ones(2, 4))
    with pytest.raises(KernelFault, match="no fence"):
        gluon_model.add_tile(target, [0, 0], buffer)
    with pytest.raises(KernelFault, match="no fence"):
        gluon_model.warpgroup_mma(torch.ones(2, 2), buffer.slice(1, 1), torch.zeros(2, 4))
    gluon_model.fence_async_shared()
    gluon_model.add_tile(target, [2, 0], buffer)
    gluon_model.tiles_read(0)
    assert total.tolist() == [[1] * 4, [1] * 4, [2] * 4]  # the row past the end is left out
    gluon_model.add_tile(target, [0, 0], buffer)
    buffer.store(torch.zeros(2, 4))
    with pytest.raises(KernelFault, match="overwritten"):
        gluon_model.tiles_read(0)


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
