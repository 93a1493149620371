"""Proof cases of the gradients of tables that rows are picked of (kernels/embedding.py)."""

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric, meta
from kernels.proof.operators import same_layout


def _inputs(N, V, D, tables, uses):
    def make(random):
        """Some rows are picked by many tokens, the last by every third, half of them by none."""
        rows = torch.randint(0, V // 2, (N,), generator=random) * 2
        rows[::3] = V - 1
        dys = [torch.randn(N, D, generator=random) for _ in range(tables * uses)]
        return {"dys": dys, "rows": rows, "size": V, "tables": tables}

    return make


def _gradients(name):
    def run(module, given):
        order, starts = module.in_order(given["rows"], given["size"])
        found = getattr(module, name)(given["dys"], order, starts, given["tables"])
        return {f"table {n}": x for n, x in enumerate(found)}

    return run


_kernel, _reference = _gradients("launch_gradients"), _gradients("gradients_reference")


def _numeric(name, *sizes, **options):
    return Numeric(name, _inputs(*sizes), _kernel, _reference, **options)


def _rows_to_move(random):
    tables = [torch.randn(9, 21, generator=random) for _ in range(2)]
    return {"tables": tables, "rows": torch.tensor([8, 0, 5]), "new": torch.randn(2, 3, 21, generator=random)}


def _moved(by):
    def run(module, given):
        tables = [same_layout(table) for table in given["tables"]]
        return by(module, tables, given["rows"], given["new"])

    return run


def _move(module, tables, rows, new):
    packed = torch.empty_like(new)
    module.launch_move(tables, rows, packed, True)
    module.launch_move(tables, rows, new, False)
    return {"packed": packed, "first": tables[0], "second": tables[1]}


def _move_reference(module, tables, rows, new):
    packed = torch.stack([table[rows] for table in tables])
    for table, rows_UD in zip(tables, new):
        table[rows] = rows_UD
    return {"packed": packed, "first": tables[0], "second": tables[1]}


def _rows_to_update(M, V, D, at_zero=False):
    """Every third row is picked, the last one by no gradient but zeros; some rows have a state already."""

    def make(random):
        rows = torch.arange(0, V, 3)
        places = torch.randint(0, len(rows), (M,), generator=random)
        grads = torch.randn(M, D, generator=random)
        grads[places == len(rows) - 1] = 0.0
        second = torch.rand(V, generator=random) * (torch.arange(V) % 2)
        given = {"weight": torch.randn(V, D, generator=random), "second": second, "count": 5.0 * (second > 0)}
        return given | {"rows": rows, "grads": grads, "places": places}

    return make


def _updated(name):
    def run(module, given):
        state = [same_layout(given[kind]) for kind in ("weight", "second", "count")]
        mean = getattr(module, name)(*state, given["rows"], given["grads"], given["places"], 0.3, 0.95, 1e-8)
        return dict(zip(("weight", "second", "count", "mean"), (*state, mean)))

    return run


def _update(name, *sizes, **options):
    run = _updated("launch_update_"), _updated("update_reference_")
    return Numeric(name, _rows_to_update(*sizes), *run, keep_float32=("second", "count"), **options)


def _layouts(module, device):
    """Order and starts that are strided, the rows and places of an update, and the rows that are moved."""
    given = _inputs(24, 6, 8, 1, 1)(torch.Generator().manual_seed(0))
    order, starts = module.in_order(given["rows"], 6)
    dys = [dy.to(device) for dy in given["dys"]]
    right = module.launch_gradients(dys, order.to(device), starts.to(device), 1)
    strided = [torch.stack([x, x], 1)[:, 0].to(device) for x in (order, starts)]
    assert torch.equal(module.launch_gradients(dys, *strided, 1)[0], right[0])
    given = _rows_to_move(torch.Generator().manual_seed(0))
    given = {name: [x.to(device) for x in xs] if name == "tables" else xs.to(device) for name, xs in given.items()}
    apart = given | {"rows": torch.stack([given["rows"], given["rows"] * 0], 1)[:, 0]}
    for x, y in zip(*(_moved(_move)(module, which).values() for which in (apart, given))):
        assert torch.equal(x, y), "rows to move that are not dense"
    update = _updated("launch_update_")
    given = {name: x.to(device) for name, x in _rows_to_update(24, 9, 8)(torch.Generator().manual_seed(0)).items()}
    apart = {name: torch.stack([given[name], given[name] * 0 + 1], 1)[:, 0] for name in ("rows", "places")}
    for name, x in update(module, given | apart).items():
        assert torch.equal(x, update(module, given)[name]), f"{name} of rows and places that are not dense"


def _launch(dtype, N=65536, V=50257, D=1024, tables=1, uses=1):
    def run():
        import kernels.embedding as module

        dys = [meta(N, D, dtype=dtype) for _ in range(tables * uses)]
        module.launch_gradients(dys, *(meta(size, dtype=torch.int32) for size in (N, V + 1)), tables)

    return run


def _launch_update(dtype, M=131072, V=2097152, D=1024):
    def run():
        import kernels.embedding as module

        state = meta(V, D, dtype=dtype), meta(V, dtype=torch.float32), meta(V, dtype=torch.float32)
        rows, order = (meta(M, dtype=torch.int64) for _ in range(2))
        module.launch_update_(*state, rows, meta(M, D, dtype=dtype), order, 0.3, 0.95, 1e-8)

    return run


def _launch_move(*tables, V=50257, D=1024, dtype=torch.bfloat16):
    """So many tables at once, of each number of them."""

    def run():
        import kernels.embedding as module

        for several in tables:
            together = [meta(V, D, dtype=dtype) for _ in range(several)]
            rows = meta(30 * 1024, dtype=torch.int64)
            for pack in (True, False):
                packed = meta(several, len(rows), D, dtype=dtype)
                module.launch_move(together, rows, packed, pack)

    return run


FAMILY = Family(
    name="embedding",
    module="kernels.embedding",
    kernels=("_gradients_of_tables", "_move_rows", "_update_rows"),
    numeric=(
        _numeric("two tables of two uses", 70, 13, 40, 2, 2),
        _numeric("one table", 50, 8, 16, 1, 1),
        _numeric("three tables", 20, 40, 64, 3, 1, quick=False),
        _update("rows that change with their state", 70, 40, 21),
        _update("rows as wide as a program", 30, 20, 64, quick=False),
        Numeric("rows there and back", _rows_to_move, _moved(_move), _moved(_move_reference)),
        _numeric("tiny", 5, 4, 3, 1, 2, quick=False, hostile=True),
    ),
    launches=(
        Launch("bf16, an input embedding", _launch(torch.bfloat16), quick=True),
        Launch("bf16, five tables for two layers each", _launch(torch.bfloat16, tables=5, uses=2), quick=True),
        Launch("bf16, an embedding tied to the head", _launch(torch.bfloat16, V=50304)),
        Launch("bf16, five tables tied to it for two layers each", _launch(torch.bfloat16, V=50304, tables=5, uses=2)),
        Launch("bf16, ten tables of a layer each", _launch(torch.bfloat16, V=50304, tables=10)),
        Launch("bf16, three tables of 768 for two layers each", _launch(torch.bfloat16, D=768, tables=3, uses=2)),
        Launch("bf16, an input embedding of 768", _launch(torch.bfloat16, D=768)),
        Launch("float32", _launch(torch.float32, 1024, 257, 64)),
        Launch("bf16, rows of frontier's n-grams", _launch_update(torch.bfloat16), quick=True),
        Launch("float32, rows with a state", _launch_update(torch.float32, 1024, 257, 64)),
        Launch("rows of medium's 7 tables", _launch_move(7), quick=True),
        Launch("rows of 1, 2 and 12 tables", _launch_move(1, 2, 12)),
        Launch("rows of 2 and 5 tables of 768", _launch_move(2, 5, D=768)),
    ),
    demands={
        "_gradients_of_tables": Demand(wide=("p_dy", "p_out")),
        "_move_rows": Demand(wide=("p_tables", "p_packed")),
        "_update_rows": Demand(wide=("p_grads", "p_weight", "p_second", "p_count")),
    },
    checks=(("strided order", _layouts),),
    faults=(
        Fault("rows are moved to the first table", "tl.store(p_tables[t] + o", "tl.store(p_tables[0] + o"),
        Fault("rows are taken of the first table", "tl.load(p_tables[t] + o", "tl.load(p_tables[0] + o"),
        Fault("packed rows lie as if of one table", "(t * picked + tl", "(0 * picked + tl"),
        Fault("moved columns go past the end", "    m = o_d < D\n", "    m = o_d < D + 1\n"),
        Fault("rows are moved in their own order", "tl.load(p_rows + tl.program_id(0))", "tl.program_id(0)"),
        Fault("the last token of a row is left out", "range(begin, end, TOKENS)", "range(begin, end - 1, TOKENS)"),
        Fault("the next row's tokens are summed", "m = (o_t < end)[:, None]", "m = (o_t < end + 1)[:, None]"),
        Fault("columns past the end are read", "& (o_d < D)[None, :]", "& (o_d < D + 1)[None, :]"),
        Fault(
            "columns past the end are written",
            "b_sum.to(p_out[t].dtype.element_ty), mask=o_d < D)",
            "b_sum.to(p_out[t].dtype.element_ty), mask=o_d < D + 1)",
        ),
        Fault(
            "updated columns go past the end",
            "p_weight.dtype.element_ty), mask=o_d < D)",
            "p_weight.dtype.element_ty))",
        ),
        Fault("a row of zeros counts as hit", "hit = mean > 0", "hit = mean >= 0"),
        Fault("the old moment counts in full", "beta * second + (1", "second + (1"),
        Fault("counts stay", "count + 1, count)", "count, count)"),
        Fault("nothing is corrected by the count", "tl.maximum(corrected, 1e-30)", "1.0"),
        Fault("the first rows change", "row = tl.load(p_rows + u).to(tl.int64)", "row = u.to(tl.int64)"),
        Fault("the sum of squares passes for their mean", "tl.sum(b_g * b_g, 0) / D", "tl.sum(b_g * b_g, 0)"),
        Fault("the rate is 1", "- rate * b_g", "- b_g"),
        Fault("only the first tokens count", "b_sum += tl.sum(b_dy, 0)", "b_sum = tl.sum(b_dy, 0)"),
        Fault("only the last use counts", "b_dy += tl.load(p_dy[FIRST + use]", "b_dy = tl.load(p_dy[FIRST + use]"),
        Fault("every table has the first one's gradients", "p_dy[FIRST + use]", "p_dy[use]"),
        Fault("uses are tables", "t * USES, USES", "t, USES"),
        Fault(
            "tokens are taken in their own order", "b_token[:, None].to(tl.int64) * D", "o_t[:, None].to(tl.int64) * D"
        ),
        Fault(
            "a row begins where the one before it does",
            "tl.load(p_starts + row), tl",
            "tl.load(p_starts + row - 1 * (row > 0)), tl",
        ),
        Fault("sums are in half precision", "b_sum += tl.sum(b_dy, 0)", "b_sum += tl.sum(b_dy, 0).to(tl.float16)"),
        Fault("the last table is left out", "(V * tables,), *given", "(V * max(tables - 1, 1),), *given"),
        Fault("gradients are taken for dense", "tuple(dense(dy) for dy in dys)", "tuple(dys)", by="transposed"),
        Fault("the order is taken for dense", "dense(order_N), dense(starts)", "order_N, starts", by="strided order"),
    ),
)
