"""Rows of tables and the tables' gradients against float64, torch's own embedding, and what a kernel must not do."""

import pytest
import torch
import torch.nn.functional as F

from kernels import embedding
from kernels.embedding import in_order, packed_rows, put_rows_, rows_of_tables
from kernels.runtime import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
V, D = 13, 24


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn_rows(*shape, dtype=torch.int64):
    """Some rows often, one very often, the first, the last and most others never."""
    rows = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1)) * 3
    rows.view(-1)[::3] = V - 1
    return rows.to(dtype)


def gradients(impl, rows, tables, dtype, uses, upstream_dtype, seed=5):
    leaves = [table.to(dtype).requires_grad_() for table in tables]
    found = rows_of_tables(leaves, rows, uses=uses, impl=impl)
    flat = [y for ys in found for y in ys]
    upstream = [draw(*y.shape, seed=seed + n).to(upstream_dtype).to(dtype) for n, y in enumerate(flat)]
    return [y.detach() for y in flat], torch.autograd.grad(flat, leaves, upstream)


@interpreted
@pytest.mark.parametrize("uses", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_rows_and_gradients_against_float64(uses, dtype, kind):
    rows, tables = drawn_rows(2, 33, dtype=kind), [draw(V, D, seed=n) for n in range(3)]
    truth = gradients("reference", rows.long(), tables, torch.float64, uses, dtype)
    ys, grads = gradients("triton", rows, tables, dtype, uses, dtype)
    picked = [F.embedding(rows, table.to(dtype)) for table in tables for _ in range(uses)]
    assert all(torch.equal(y, right) for y, right in zip(ys, picked))
    for mine, true in zip(grads, truth[1]):
        rounding = 2**-7 if dtype == torch.bfloat16 else 1e-5  # once, at the end; the interpreter cuts off
        torch.testing.assert_close(mine.double(), true, rtol=rounding, atol=1e-5)
        assert (mine[[1, 2, 4]] == 0).all(), "rows that nobody picks have no gradient"


def test_tokens_are_in_the_order_of_their_rows():
    rows = torch.tensor([3, 0, 3, 1, 0, 3], dtype=torch.int32)
    order, starts = in_order(rows, 5)
    assert order.tolist() == [1, 4, 3, 0, 2, 5]
    assert starts.tolist() == [0, 2, 3, 3, 6, 6]
    assert order.dtype == starts.dtype == torch.int32
    order, starts = in_order(rows[:0], 3)
    assert order.tolist() == [] and starts.tolist() == [0] * 4


@pytest.mark.parametrize("impl", [pytest.param("triton", marks=interpreted), "reference"])
def test_rows_travel_packed_and_come_back_to_their_place(impl):
    tables, rows = [draw(V, D, seed=n) for n in range(3)], torch.tensor([7, 0, V - 1, 4])
    before, others = [t.clone() for t in tables], [n for n in range(V) if n not in rows]
    packed = packed_rows([*tables[:2], tables[2].t().contiguous().t()], rows, impl=impl)
    assert torch.equal(packed, torch.stack([t[rows] for t in tables]))
    put_rows_(tables, rows, 2 * packed, impl=impl)
    for table, was in zip(tables, before):
        assert torch.equal(table[rows], 2 * was[rows]) and torch.equal(table[others], was[others])
    assert packed_rows(tables, rows[:0], impl=impl).shape == (3, 0, D)


@interpreted
def test_a_gradient_that_is_not_finite_stays_with_its_row():
    rows, table = drawn_rows(40), draw(V, D).requires_grad_()
    ((y,),) = rows_of_tables([table], rows, impl="triton")
    upstream = draw(40, D)
    token = int((rows == 6).nonzero()[0])
    upstream[token, 3] = torch.nan
    (found,) = torch.autograd.grad(y, table, upstream)
    assert found.isnan().nonzero().tolist() == [[6, 3]]


@interpreted
def test_the_operator_keeps_its_contract_and_is_one_graph():
    order, starts = in_order(drawn_rows(20), V)
    torch.library.opcheck(embedding._gradients, ([draw(20, D, seed=n) for n in range(4)], order, starts, 2))
    torch._dynamo.reset()

    def run(rows, *tables):
        (a, b), (c, d) = rows_of_tables(tables, rows, uses=2, impl="triton")
        return (a * b.sin() + c * d.cos()).sum()

    fused, rows = torch.compile(run, fullgraph=True, backend="aot_eager"), drawn_rows(2, 10)
    for function in (run, fused):
        tables = [draw(V, D, seed=n).requires_grad_() for n in range(2)]
        loss = function(rows, *tables)
        loss.backward()
        if function is run:
            right = [loss.detach(), *(t.grad for t in tables)]
    for mine, wanted in zip([loss.detach(), *(t.grad for t in tables)], right):
        torch.testing.assert_close(mine, wanted)


def test_wrong_arguments_are_named():
    rows, table = drawn_rows(4), draw(V, D)
    for call, error, word in (
        (lambda: rows_of_tables([table, table[1:]], rows), ValueError, "tables"),
        (lambda: rows_of_tables([table, table.half()], rows), TypeError, "tables"),
        (lambda: rows_of_tables([table], rows.float()), TypeError, "rows"),
    ):
        with pytest.raises(error, match=word):
            call()
    order, starts = in_order(rows, V)
    with pytest.raises(ValueError, match="int32"):
        embedding.launch_gradients([draw(4, D)], order.long(), starts, 1)
    with pytest.raises(ValueError, match="must be dense"):
        embedding.launch_move([table.t()], torch.zeros(2, dtype=torch.int64), draw(1, 2, V), False)
    with pytest.raises(ValueError, match="packed"):
        embedding.launch_move([table], torch.zeros(2, dtype=torch.int64), draw(1, 3, D), True)
    with pytest.raises(ValueError, match="2 tables"):
        embedding.launch_gradients([draw(4, D)] * 3, order, starts, 2)


@interpreted
def test_a_second_derivative_is_refused():
    table = draw(V, D).requires_grad_()
    ((y,),) = rows_of_tables([table], drawn_rows(5), impl="triton")
    (grad,) = torch.autograd.grad(y.square().sum(), table, create_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        grad.sum().backward()


@pytest.mark.parametrize("impl", ["reference", pytest.param("triton", marks=interpreted)])
def test_rows_with_a_state_of_one_number_follow_their_formula(impl):
    """Row by row in float64, twice: one has no gradient but zeros, and rows that are not named stay as they are."""
    random = torch.Generator().manual_seed(0)
    weight, second, count = torch.randn(9, 12, generator=random), torch.zeros(9), torch.zeros(9)
    true, states = weight.double(), {}
    for rows, places in (([1, 4, 6], [0, 1, 1, 0, 2]), ([4, 8], [1, 0, 1])):
        grads = torch.randn(len(places), 12, generator=random)
        grads[torch.tensor(places) == 2] = 0.0
        given = weight, second, count, torch.tensor(rows), grads, torch.tensor(places)
        means = embedding.update_rows_(*given, rate=0.3, beta=0.95, eps=1e-8, impl=impl)
        for place, row in enumerate(rows):
            g = sum(grad.double() for grad, p in zip(grads, places) if p == place)
            v, n = states.get(row, (0.0, 0))
            if g.square().mean() > 0:
                states[row] = v, n = 0.95 * v + 0.05 * g.square().mean(), n + 1
                true[row] -= 0.3 * g / ((v / (1 - 0.95**n)).sqrt() + 1e-8)
            assert means[place].item() == pytest.approx(float(g.square().mean()), rel=1e-5)
    torch.testing.assert_close(weight.double(), true, rtol=1e-5, atol=1e-5)
    assert count.tolist() == [0, 1, 0, 0, 2, 0, 0, 0, 1] and second[8] == states[8][0].float()


@interpreted
def test_rows_that_cannot_change_are_refused():
    weight, state = torch.zeros(9, 12), torch.zeros(9)
    given = dict(weight=weight, second=state, count=state, rows=torch.arange(3), grads=weight, places=torch.arange(9))
    for name, wrong, message in (
        ("weight", weight.double(), "weight"),
        ("weight", torch.zeros(12, 9).t(), "dense"),
        ("second", state[1:], "second moments"),
        ("count", state.double(), "counts"),
        ("grads", weight[:, 1:], "gradients"),
        ("places", torch.arange(8), "places"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            embedding.update_rows_(*(given | {name: wrong}).values(), rate=1.0, beta=0.9, eps=0.0, impl="triton")
