"""Rows that tokens pick of tables, and the tables' gradients.

    y_t[n] = table_t[row_n],     dtable_t[v] = sum over n with row_n = v, and over the uses of y_t, of dy[n]

The rows themselves are left to the compiler, which reads them where they are needed. Of the gradient it makes three
passes a table: zeros in float32, one addition into memory a number, in whatever order they come, and rounding; 8 V D +
4 V D + 6 V D bytes beside 2 N D for V rows, N tokens, D columns and 16 bits. Here the tokens are put in order by their
row, once for all tables that pick alike, and one kernel sums those of each row in registers, in that order: 2 N D a
use read and 2 V D written, and two runs give the same bits.

`packed_rows` and `put_rows_` are the way of those rows of several tables that travel between processes: one launch for
all tables, and no bytes but theirs.

`update_rows_` is a step of the optimizer of some rows of a table, whose state is one number a row (trainer/
ngram_table.py): gradients are summed as above, and a row is read and written once, with no gradient of it in memory.

    g <- sum of the row's gradients,   s <- mean of g^2,   v <- b2 v + (1 - b2) s,   n <- n + 1    (where s > 0)
    p <- p - l g / (sqrt(v / (1 - b2^n)) + eps)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from kernels.guards import (
    KERNEL_DTYPES,
    dense,
    differentiable_once,
    expect,
    expect_floats,
    launch,
    refuse_tangents,
    without_autocast,
)
from kernels.runtime import device_kind, implementation_of, tl, triton


def in_order(rows_N: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(order (N,) int32, starts (size + 1,) int32): the tokens by the row that they pick of a table of so many rows,
    those of one row in their own order; where those of each row begin in that."""
    by_row, order = torch.sort(rows_N, stable=True)
    bounds = torch.arange(size + 1, dtype=rows_N.dtype, device=rows_N.device)
    return order.to(torch.int32), torch.searchsorted(by_row, bounds, out_int32=True)


def gradients_reference(
    dys: Sequence[torch.Tensor], order_N: torch.Tensor, starts: torch.Tensor, tables: int
) -> list[torch.Tensor]:
    """What `launch_gradients` computes, in plain torch."""
    uses, V = len(dys) // tables, len(starts) - 1
    wide = torch.promote_types(dys[0].dtype, torch.float32)
    rows = torch.repeat_interleave(torch.arange(V, device=starts.device), starts.diff().long())
    found = []
    for t in range(tables):
        dy = sum(dy.to(wide) for dy in dys[t * uses : (t + 1) * uses])
        total = dy.new_zeros(V, dy.shape[1]).index_add_(0, rows, dy[order_N.long()])
        found.append(total.to(dys[0].dtype))
    return found


# ---- Triton -----------------------------------------------------------------------------------------------

#: Tokens of a row at once, and warps of a program, which has a whole row.
_TOKENS, _WARPS = 8, 4
#: Numbers of a row that a program has at most.
_WIDEST = 4096


@triton.jit
def _sum_of_tokens(
    p_dy, p_order, begin, end, D, FIRST: tl.constexpr, USES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr
):
    """The sum of the FIRST-th dy and the USES - 1 after it over the tokens order[begin:end], (WIDTH,) in float32."""
    o_d = tl.arange(0, WIDTH)
    b_sum = tl.zeros([WIDTH], tl.float32)
    for start in range(begin, end, TOKENS):
        o_t = start + tl.arange(0, TOKENS)
        b_token = tl.load(p_order + o_t, mask=o_t < end, other=0)
        o = b_token[:, None].to(tl.int64) * D + o_d[None, :]
        m = (o_t < end)[:, None] & (o_d < D)[None, :]
        b_dy = tl.zeros([TOKENS, WIDTH], tl.float32)
        for use in tl.static_range(USES):
            b_dy += tl.load(p_dy[FIRST + use] + o, mask=m, other=0.0).to(tl.float32)
        b_sum += tl.sum(b_dy, 0)
    return b_sum


@triton.jit
def _gradients_of_tables(
    p_dy,
    p_order,
    p_starts,
    p_out,
    V,
    D,
    TABLES: tl.constexpr,
    USES: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out (TABLES pointers, each (V, D)) from dy (TABLES * USES pointers, each (N, D)); a program has a row of one."""
    row, table = tl.program_id(0) % V, tl.program_id(0) // V
    begin, end = tl.load(p_starts + row), tl.load(p_starts + row + 1)
    o_d = tl.arange(0, WIDTH)
    for t in tl.static_range(TABLES):
        if table == t:
            b_sum = _sum_of_tokens(p_dy, p_order, begin, end, D, t * USES, USES, TOKENS, WIDTH)
            tl.store(p_out[t] + row.to(tl.int64) * D + o_d, b_sum.to(p_out[t].dtype.element_ty), mask=o_d < D)


def launch_gradients(
    dys: Sequence[torch.Tensor], order_N: torch.Tensor, starts: torch.Tensor, tables: int
) -> list[torch.Tensor]:
    """Gradients (V, D) of so many tables, from those of what was picked of them, (N, D) each: all uses of the first
    table, then of the next. order and starts: of `in_order`."""
    (N, D), V, uses = dys[0].shape, len(starts) - 1, len(dys) // tables
    for n, dy in enumerate(dys):
        expect(f"dy[{n}]", dy, (N, D), dys[0])
        expect_floats(f"dy[{n}]", dy, (dys[0].dtype,))
    expect_floats("dy[0]", dys[0], KERNEL_DTYPES)
    expect("the order", order_N, (N,), dys[0])
    expect("the starts", starts, (V + 1,), dys[0])
    if uses * tables != len(dys) or order_N.dtype != torch.int32 or starts.dtype != torch.int32:
        raise ValueError(
            f"{len(dys)} gradients of {tables} tables, order {order_N.dtype}, starts {starts.dtype}: as many for each "
            "table, and int32"
        )
    if D > _WIDEST:
        raise ValueError(f"rows of {D} numbers: a program has at most {_WIDEST}")
    out = tuple(torch.empty(V, D, dtype=dys[0].dtype, device=dys[0].device) for _ in range(tables))
    warps = 2 * _WARPS if device_kind() == "sm_100" else _WARPS  # with fewer a thread spills there
    how = dict(TABLES=tables, USES=uses, TOKENS=_TOKENS, WIDTH=triton.next_power_of_2(D), num_warps=warps)
    given = tuple(dense(dy) for dy in dys), dense(order_N), dense(starts), out
    launch(_gradients_of_tables, (V * tables,), *given, V, D, **how)
    return list(out)


@triton.jit
def _move_rows(p_tables, p_rows, p_packed, picked, D, TABLES: tl.constexpr, PACK: tl.constexpr, WIDTH: tl.constexpr):
    """packed (TABLES, picked, D) = rows of each of TABLES tables (V, D), or, not PACK, these rows = packed; a program
    has a row of all tables."""
    o_d = tl.arange(0, WIDTH)
    m = o_d < D
    o = tl.load(p_rows + tl.program_id(0)).to(tl.int64) * D + o_d
    for t in tl.static_range(TABLES):
        p = p_packed + (t * picked + tl.program_id(0)).to(tl.int64) * D + o_d
        if PACK:
            tl.store(p, tl.load(p_tables[t] + o, mask=m), mask=m)
        else:
            tl.store(p_tables[t] + o, tl.load(p, mask=m), mask=m)


def launch_move(tables: Sequence[torch.Tensor], rows_U: torch.Tensor, packed_TUD: torch.Tensor, pack: bool) -> None:
    """packed (T, U, D) becomes the rows of those numbers of T tables (V, D) alike, or, not `pack`, these rows become
    packed. rows: each once, below V; what is written is dense."""
    D = tables[0].shape[1]
    expect("packed", packed_TUD, (len(tables), len(rows_U), D), rows_U)
    for n, x in enumerate([packed_TUD, *tables]):
        name = f"tables[{n - 1}]" if n else "packed"
        expect_floats(name, x, (tables[0].dtype,))
        if n:
            expect(name, x, tables[0].shape, rows_U)
        if not x.is_contiguous():
            raise ValueError(f"{name} of strides {x.stride()} must be dense")
    if D > _WIDEST:
        raise ValueError(f"rows of {D} numbers: a program has at most {_WIDEST}")
    how = dict(TABLES=len(tables), PACK=pack, WIDTH=triton.next_power_of_2(D), num_warps=_WARPS)
    launch(_move_rows, (len(rows_U),), tuple(tables), dense(rows_U), packed_TUD, len(rows_U), D, **how)


@triton.jit
def _update_rows(
    p_grads,
    p_order,
    p_starts,
    p_rows,
    p_second,
    p_count,
    p_weight,
    p_mean,
    D,
    rate,
    beta,
    eps,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A step of one of the rows as the docstring above has it; grads (1 pointer, to (M, D)), mean (U,) of squares."""
    u = tl.program_id(0)
    b_g = _sum_of_tokens(p_grads, p_order, tl.load(p_starts + u), tl.load(p_starts + u + 1), D, 0, 1, TOKENS, WIDTH)
    row = tl.load(p_rows + u).to(tl.int64)
    mean = tl.sum(b_g * b_g, 0) / D
    second, count = tl.load(p_second + row), tl.load(p_count + row)
    hit = mean > 0
    second = tl.where(hit, beta * second + (1 - beta) * mean, second)
    count = tl.where(hit, count + 1, count)
    corrected = 1 - tl.exp2(count * tl.log2(beta))
    root = tl.sqrt_rn(second / tl.maximum(corrected, 1e-30)) + eps
    tl.store(p_mean + u, mean)
    tl.store(p_second + row, second)
    tl.store(p_count + row, count)
    o_d = tl.arange(0, WIDTH)
    p = p_weight + row * D + o_d
    b_w = tl.load(p, mask=o_d < D, other=0.0).to(tl.float32) - rate * b_g / root
    tl.store(p, b_w.to(p_weight.dtype.element_ty), mask=o_d < D)


def launch_update_(
    weight_VD: torch.Tensor,
    second_V: torch.Tensor,
    count_V: torch.Tensor,
    rows_U: torch.Tensor,
    grads_MD: torch.Tensor,
    places_M: torch.Tensor,
    rate: float,
    beta: float,
    eps: float,
) -> torch.Tensor:
    """`update_rows_` in one pass."""
    (V, D), (U,), (M, _) = weight_VD.shape, rows_U.shape, grads_MD.shape
    for name, x, shape, dtypes in (
        ("the weight", weight_VD, (V, D), KERNEL_DTYPES),
        ("the second moments", second_V, (V,), (torch.float32,)),
        ("the counts", count_V, (V,), (torch.float32,)),
        ("the gradients", grads_MD, (M, D), KERNEL_DTYPES),
    ):
        expect(name, x, shape, rows_U)
        expect_floats(name, x, dtypes)
        if name != "the gradients" and not x.is_contiguous():
            raise ValueError(f"{name} of strides {x.stride()} must be dense: rows change in place")
    expect("the places", places_M, (M,), rows_U)
    if D > _WIDEST:
        raise ValueError(f"rows of {D} numbers: a program has at most {_WIDEST}")
    order, starts = in_order(places_M, U)
    mean_U = torch.empty(U, dtype=torch.float32, device=rows_U.device)
    given = (dense(grads_MD),), order, starts, dense(rows_U), second_V, count_V, weight_VD, mean_U
    how = dict(TOKENS=_TOKENS, WIDTH=triton.next_power_of_2(D), num_warps=_WARPS)
    launch(_update_rows, (U,), *given, D, float(rate), float(beta), float(eps), **how)
    return mean_U


def update_reference_(weight_VD, second_V, count_V, rows_U, grads_MD, places_M, rate, beta, eps) -> torch.Tensor:
    """What `launch_update_` does, in plain torch."""
    grads = grads_MD.float()
    g_UD = grads.new_zeros(len(rows_U), grads.size(1)).index_add_(0, places_M, grads)
    mean_U = g_UD.square().mean(-1)
    hit_U = mean_U > 0
    second_U, count_U = second_V[rows_U], count_V[rows_U] + hit_U
    second_U = torch.where(hit_U, beta * second_U + (1 - beta) * mean_U, second_U)
    second_V[rows_U], count_V[rows_U] = second_U, count_U
    root_U = (second_U / (1 - beta**count_U).clamp(min=1e-30)).sqrt() + eps
    weight_VD[rows_U] = (weight_VD[rows_U].float() - rate * g_UD / root_U[:, None]).to(weight_VD.dtype)
    return mean_U


# ---- torch operators --------------------------------------------------------------------------------------


@torch.library.custom_op("speedrun::gradients_of_tables", mutates_args=())
def _gradients(dys: list[torch.Tensor], order_N: torch.Tensor, starts: torch.Tensor, tables: int) -> list[torch.Tensor]:
    return launch_gradients(dys, order_N, starts, tables)


@_gradients.register_fake
def _(dys, order_N, starts, tables):
    return [dys[0].new_empty(starts.shape[0] - 1, dys[0].shape[1]) for _ in range(tables)]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_N, uses, impl, *tables):
        ctx.save_for_backward(*in_order(rows_N, tables[0].shape[0]))
        ctx.tables, ctx.impl = len(tables), impl
        found = [F.embedding(rows_N, table) for table in tables]
        return tuple(y if use == 0 else y.view_as(y) for y in found for use in range(uses))

    @staticmethod
    @differentiable_once("rows_of_tables")
    def backward(ctx, *dys):
        order_N, starts = ctx.saved_tensors
        run = _gradients if ctx.impl == "triton" else gradients_reference
        return None, None, None, *run(list(dys), order_N, starts, ctx.tables)


def implementation(impl: str, tensor: torch.Tensor) -> str:
    """The name of what would run for that tensor: triton | reference, which is torch's own embedding."""
    return implementation_of(impl, tensor, cpu="reference", choices=("triton", "reference"))


@without_autocast
def rows_of_tables(
    tables: Sequence[torch.Tensor], rows: torch.Tensor, *, uses: int = 1, impl: str = "auto"
) -> list[list[torch.Tensor]]:
    """Of each table (V, D) the rows of those numbers, (..., D), as often as they will be used: each use has a gradient
    of its own, which saves their sum. tables: of one shape and dtype; rows: int32 or int64 (...), below V.

    impl: of the gradient; rows of more than 4096 numbers are left to torch. Errors: ValueError for tables that differ,
    TypeError for dtypes."""
    for n, table in enumerate(tables):
        expect(f"tables[{n}]", table, tables[0].shape, rows)
        expect_floats(f"tables[{n}]", table, (tables[0].dtype,))
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rows are numbers of rows, int32 or int64, and have dtype {rows.dtype}")
    learns = torch.is_grad_enabled() and any(table.requires_grad for table in tables)
    if implementation(impl, rows) == "reference" or not learns or tables[0].shape[1] > _WIDEST:
        found = [F.embedding(rows, table) for table in tables]
        return [[y] * uses for y in found]
    refuse_tangents("rows_of_tables", *tables)
    flat = _Rows.apply(rows.flatten(), uses, "triton", *tables)
    shaped = [y.view(*rows.shape, -1) for y in flat]
    return [shaped[n : n + uses] for n in range(0, len(shaped), uses)]


def picked(table_VD: torch.Tensor, rows: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """`rows_of_tables` of one table that is used once."""
    return rows_of_tables([table_VD], rows, impl=impl)[0][0]


def packed_rows(tables: Sequence[torch.Tensor], rows_U: torch.Tensor, *, impl: str = "auto") -> torch.Tensor:
    """(T, U, D): the rows of those numbers, each once, of T tables (V, D) of one shape and dtype; no autograd."""
    packed = tables[0].new_empty(len(tables), len(rows_U), *tables[0].shape[1:])
    if implementation(impl, rows_U) == "triton" and tables[0].shape[1] <= _WIDEST:
        launch_move([dense(table) for table in tables], rows_U, packed, True)
    else:
        for table, picked_UD in zip(tables, packed):
            torch.index_select(table, 0, rows_U, out=picked_UD)
    return packed


def put_rows_(
    tables: Sequence[torch.Tensor], rows_U: torch.Tensor, packed: torch.Tensor, *, impl: str = "auto"
) -> None:
    """What `packed_rows` has read, or what it has become, back to its place in the dense tables."""
    if implementation(impl, rows_U) == "triton" and tables[0].shape[1] <= _WIDEST:
        launch_move(tables, rows_U, dense(packed), False)
    else:
        for table, rows_UD in zip(tables, packed):
            table.index_copy_(0, rows_U, rows_UD)


@torch.no_grad()
def update_rows_(
    weight_VD: torch.Tensor,
    second_V: torch.Tensor,
    count_V: torch.Tensor,
    rows_U: torch.Tensor,
    grads_MD: torch.Tensor,
    places_M: torch.Tensor,
    *,
    rate: float,
    beta: float,
    eps: float,
    impl: str = "auto",
) -> torch.Tensor:
    """The mean of squares, float32 (U,), of the whole gradient of each of the rows, which change in place with their
    state (second and count, float32) by the formula of the module's docstring.

    rows: int64 (U,), each once. grads: (M, D), of M uses; places: (M,), which of the rows each is of. Errors:
    ValueError for what does not fit, TypeError for dtypes."""
    given = weight_VD, second_V, count_V, rows_U, grads_MD, places_M, rate, beta, eps
    if implementation(impl, rows_U) == "triton" and weight_VD.shape[1] <= _WIDEST:
        return launch_update_(*given)
    return update_reference_(*given)
