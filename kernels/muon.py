"""Muon's arithmetic: momentum, orthogonalisation and the weight update.

    buffer <- m buffer + (1 - m) grad ;  u = m buffer + (1 - m) grad           (Nesterov)
    X = u / (|u| + 1e-7), transposed if tall; five times  X <- a X + (b A + c A A) X,  A = X X^T
    weight <- weight (1 - weight_decay) - lr X

With two options: the rows of X are brought to one size by their mean squares over the steps (`normalize_rows_`), and
a weight decays only where the update moves it towards zero (cautious decay).

A bfloat16 weight with a 16-bit mantissa beside it is a float32 master cut in two: the weight holds the upper
16 bits (so it is the master rounded towards zero), the mantissa the lower 16.
"""

from contextlib import nullcontext

import torch

from kernels.guards import KERNEL_DTYPES, dense, expect, expect_floats, in_place, launch, without_autocast
from kernels.runtime import Tile, Tiles, copies_in_bulk, descriptor, implementation_of, tile_of, tl, triton

# The optimal composition for singular values in [1e-3, 1]: Amsel, Persson, Musco, Gower, "The Polar Express", arXiv
# 2505.16932, 2025, first five steps. Each is the minimax odd quintic on what the step before leaves, cut off at 0.024
# of its upper end, and centred about one.
_POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
# The authors' margin: the polynomials are steep at the upper end, where bfloat16 rounds values beyond it.
_POLAR_MARGIN = 1.01

# The same as the speedrun's record 18 has it, with a margin of 1.02 that is taken from the norm, not from the steps.
_RECORD_18 = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

#: (a, b, c) of each step. "spec" is that of docs/spec.md 3.3.
COEFFICIENTS = {
    "spec": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    "polar_express": tuple(
        (a / _POLAR_MARGIN, b / _POLAR_MARGIN**3, c / _POLAR_MARGIN**5) for a, b, c in _POLAR_EXPRESS
    ),
    "record18": _RECORD_18,
}
#: (factor on the Frobenius norm, what is added to that) before the first step, where not (1, 1e-7).
DIVISORS = {"record18": (1.02, 1e-6)}
#: A row's mean square counts as at least this much.
_LEAST_MEAN_SQUARE = 1e-10


# ---- reference --------------------------------------------------------------------------------------------


def orthogonalize_reference(
    g_BMN: torch.Tensor, coefficients: str = "spec", dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """The definition, in plain torch, computed in `dtype`; g is (..., M, N), the result is like g."""
    x = g_BMN.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    rows = (x / _divisor(x, coefficients)).reshape(-1, *x.shape[-2:])
    for a, b, c in COEFFICIENTS[coefficients]:
        product = torch.bmm(rows, rows.mT)
        polynomial = torch.baddbmm(product, product, product, beta=b, alpha=c)
        rows = torch.baddbmm(rows, polynomial, rows, beta=a)
    x = rows.view(x.shape)
    return (x.mT if tall else x).to(g_BMN.dtype)


def orthogonalize_gram(
    g_BMN: torch.Tensor, coefficients: str = "spec", dtype: torch.dtype = torch.float16, *, anew_after: int = 2
) -> torch.Tensor:
    """The same through products of the shorter side's size: with A = X X^T, B = a + b A + c A A, a step is X <- B X,
    hence A <- B A B, and all Bs are gathered in Q, which meets X at the end and once after `anew_after` steps, when A
    is computed anew (Gram Newton-Schulz, Tri Dao et al. 2026; the speedrun's as #360 has it). For N = 4 M it takes 60 %
    of the products.

    dtype: float16 has three bits more than bfloat16, and A's entries stay within a few units. Plain torch throughout:
    three library products a step, on GPUs too."""
    x = g_BMN.to(_wide(g_BMN.dtype))
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    rows = (x / _divisor(x, coefficients)).reshape(-1, *x.shape[-2:]).to(dtype)
    gathered = None
    for number, (a, b, c) in enumerate(COEFFICIENTS[coefficients]):
        if number in (0, anew_after):
            rows = rows if gathered is None else gathered @ rows
            gram, gathered = rows @ rows.mT, None
        step = b * gram + c * (gram @ gram)
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        gathered = step if gathered is None else step @ gathered
        gram = step @ gram @ step
    x = (gathered @ rows).view(x.shape)
    return (x.mT if tall else x).to(g_BMN.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _divisor(x_BMN: torch.Tensor, coefficients: str) -> torch.Tensor:
    """What each matrix is divided by first, (..., 1, 1): a little more than its Frobenius norm, which is summed in at
    least float32."""
    factor, added = DIVISORS.get(coefficients, (1.0, 1e-7))
    norm = torch.linalg.vector_norm(x_BMN, dim=(-2, -1), keepdim=True, dtype=_wide(x_BMN.dtype))
    return ((norm if factor == 1 else factor * norm) + added).to(x_BMN.dtype)


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bfloat16 weight, uint16 mantissa) whose bits together are the float32 `master`."""
    halves = dense(master).view(torch.int32)
    weight = (halves >> 16).to(torch.int16).view(torch.bfloat16)
    return weight, halves.to(torch.int16).view(torch.uint16)


def join_master(weight: torch.Tensor, mantissa: torch.Tensor) -> torch.Tensor:
    """The float32 master of a bfloat16 weight and its uint16 (or int16) mantissa."""
    high = dense(weight).view(torch.int16).to(torch.int32) << 16
    low = dense(mantissa).view(torch.int16).to(torch.int32) & 0xFFFF
    return (high | low).view(torch.float32)


def put_master_(weight: torch.Tensor, mantissa: torch.Tensor, master: torch.Tensor) -> None:
    """Make the pair what `split_master` makes of the float32 `master`, in place."""
    with in_place("weight", weight) as high, in_place("mantissa", mantissa) as low:
        for half, new in zip((high, low), split_master(master)):
            half.view(torch.int16).copy_(new.view(torch.int16))


# ---- tiles ------------------------------------------------------------------------------------------------


#: Square tiles of the result. "default" is small enough for any device, and for matrices with a side that 16 does not
#: divide.
TILES: Tiles = {
    ("default", "symmetric", 2): Tile(64, 64, 4, 2, depth=32),
    ("default", "symmetric", 4): Tile(32, 32, 4, 2, depth=32),
    ("sm_80", "symmetric", 2): Tile(128, 128, 8, 3, depth=64),
    ("sm_90", "symmetric", 2): Tile(128, 128, 8, 4, depth=64, descriptors=True),
    ("sm_100", "symmetric", 2): Tile(128, 128, 8, 4, depth=64, descriptors=True),
    ("gfx942", "symmetric", 2): Tile(128, 128, 8, 2, depth=32),
}
_ELEMENTS = 4096  # a program of the elementwise kernels


# ---- Triton -----------------------------------------------------------------------------------------------
# Prefixes: p_ pointer, b_ block of values, o_ offset, m_ mask. Bytes and FLOPs, for B matrices (M, K): a symmetric
# product computes the tiles on and below the diagonal, about B M^2 K FLOPs in place of 2 B M^2 K, and writes each tile
# twice, once mirrored. The elementwise kernels touch every number once: 16 bytes a weight for momentum (buffer read and
# written, gradient read, update written) and 10 for the update (weight and mantissa read and written, update read).


@triton.jit
def _symmetric(
    p_x,
    p_e,
    p_out,
    M,
    K,
    alpha,
    beta,
    BM: tl.constexpr,
    BK: tl.constexpr,
    ADD: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = alpha X X^T (+ beta E, E symmetric): tiles below the diagonal are computed once and written twice.

    DESCRIPTOR: p_x is a tensor descriptor of all matrices."""
    tiles = tl.cdiv(M, BM)
    i, j = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    if j > i:
        return
    batch = tl.program_id(1).to(tl.int64)
    o_i = i * BM + tl.arange(0, BM)
    o_j = j * BM + tl.arange(0, BM)
    b_out = tl.zeros([BM, BM], tl.float32)
    for k in range(0, K, BK):
        if DESCRIPTOR:
            b_i = p_x.load([batch.to(tl.int32), i * BM, k]).reshape(BM, BK)
            b_j = p_x.load([batch.to(tl.int32), j * BM, k]).reshape(BM, BK)
        else:
            o_k = k + tl.arange(0, BK)
            p_k = p_x + batch * M * K + o_k[None, :]
            b_i = tl.load(p_k + o_i[:, None] * K, mask=(o_i < M)[:, None] & (o_k < K)[None, :], other=0.0)
            b_j = tl.load(p_k + o_j[:, None] * K, mask=(o_j < M)[:, None] & (o_k < K)[None, :], other=0.0)
        b_out = tl.dot(b_i, tl.trans(b_j), b_out, input_precision=PRECISION)
    b_out *= alpha
    m_out = (o_i < M)[:, None] & (o_j < M)[None, :]
    p_ij = batch * M * M + o_i[:, None] * M + o_j[None, :]
    if ADD:
        b_out += beta * tl.load(p_e + p_ij, mask=m_out, other=0.0).to(tl.float32)
    b_out = b_out.to(p_out.dtype.element_ty)
    tl.store(p_out + p_ij, b_out, mask=m_out)
    if i > j:
        p_ji = batch * M * M + o_j[:, None] * M + o_i[None, :]
        tl.store(p_out + p_ji, tl.trans(b_out), mask=(o_j < M)[:, None] & (o_i < M)[None, :])


@triton.jit
def _momentum(p_buffer, p_grad, p_update, N, momentum, BLOCK: tl.constexpr):
    """buffer <- m buffer + (1 - m) grad; update = m buffer + (1 - m) grad."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    b_grad = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)
    b_buffer = tl.load(p_buffer + o, mask=m, other=0.0)
    b_buffer += (b_grad - b_buffer) * (1 - momentum)
    tl.store(p_buffer + o, b_buffer, mask=m)
    tl.store(p_update + o, b_grad + (b_buffer - b_grad) * momentum, mask=m)


@triton.jit
def _kept(b_master, b_update, keep, CAUTIOUS: tl.constexpr):
    """master * keep; if CAUTIOUS, only where the update leads towards zero."""
    if CAUTIOUS:
        return b_master * tl.where(b_update * b_master >= 0, keep, 1.0)
    else:
        return b_master * keep


@triton.jit
def _update(
    p_weight, p_mantissa, p_update, N, lr, keep, SPLIT: tl.constexpr, CAUTIOUS: tl.constexpr, BLOCK: tl.constexpr
):
    """master <- master * keep - lr * update. If SPLIT, weight and mantissa are the int16 halves of the master."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < N
    b_update = tl.load(p_update + o, mask=m, other=0.0).to(tl.float32)
    if SPLIT:
        b_high = tl.load(p_weight + o, mask=m, other=0).to(tl.int32) << 16
        b_low = tl.load(p_mantissa + o, mask=m, other=0).to(tl.int32) & 0xFFFF
        b_master = (b_high | b_low).to(tl.float32, bitcast=True)
        b_master = _kept(b_master, b_update, keep, CAUTIOUS) - lr * b_update
        b_bits = b_master.to(tl.int32, bitcast=True)
        tl.store(p_weight + o, (b_bits >> 16).to(tl.int16), mask=m)
        tl.store(p_mantissa + o, b_bits.to(tl.int16), mask=m)
    else:
        b_master = tl.load(p_weight + o, mask=m, other=0.0)
        b_master = _kept(b_master, b_update, keep, CAUTIOUS) - lr * b_update
        tl.store(p_weight + o, b_master, mask=m)


# ---- launchers --------------------------------------------------------------------------------------------


def launch_symmetric(x_BMK, e_BMM=None, *, alpha: float = 1.0, beta: float = 0.0, tile: Tile | None = None):
    """alpha X X^T + beta E for each matrix of x (B, M, K); E (B, M, M) must be symmetric."""
    B, M, K = x_BMK.shape
    expect_floats("x", x_BMK, KERNEL_DTYPES)
    x_BMK = dense(x_BMK)
    if e_BMM is not None:
        expect("e", e_BMM, (B, M, M), x_BMK)
        expect_floats("e", e_BMM, (x_BMK.dtype,))
        e_BMM = dense(e_BMM)
    # Where 16 does not divide a side (a gate a head), a thread has an address for each number that it loads, adds or
    # stores: those of the large tiles do not fit into its registers.
    tile = tile or tile_of(TILES, "symmetric", x_BMK.dtype, "default" if M % 16 or K % 16 else None)
    descriptors = tile.descriptors and x_BMK.numel() > 0 and copies_in_bulk(x_BMK)
    p_x = descriptor(x_BMK, [1, tile.rows, tile.depth]) if descriptors else x_BMK
    out = torch.empty(B, M, M, dtype=x_BMK.dtype, device=x_BMK.device)
    tiles = triton.cdiv(M, tile.rows)
    launch(
        _symmetric,
        (tiles * tiles, B),
        p_x,
        out if e_BMM is None else e_BMM,
        out,
        M,
        K,
        alpha,
        beta,
        BM=tile.rows,
        BK=tile.depth,
        ADD=e_BMM is not None,
        DESCRIPTOR=descriptors,
        PRECISION="ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def launch_momentum(buffer, grad, momentum: float):
    """`momentum_` for a float32 buffer; the update is float32."""
    expect_floats("buffer", buffer, (torch.float32,))
    expect("grad", grad, buffer.shape, buffer)
    size = buffer.numel()
    update = torch.empty(buffer.shape, dtype=torch.float32, device=buffer.device)
    with in_place("buffer", buffer) as walked:
        programs = (triton.cdiv(size, _ELEMENTS),)
        launch(_momentum, programs, walked, dense(grad), update, size, momentum, BLOCK=_ELEMENTS, num_warps=8)
    return update


def launch_update(weight, mantissa, update, lr: float, weight_decay: float, cautious: bool = False) -> None:
    """`apply_update_`, in place."""
    split = mantissa is not None
    expect_floats("weight", weight, (torch.bfloat16 if split else torch.float32,))
    expect("update", update, weight.shape, weight)
    expect("mantissa", mantissa if split else weight, weight.shape, weight)
    numbers = weight.numel(), lr, 1 - weight_decay
    with in_place("weight", weight) as high, in_place("mantissa", mantissa) if split else nullcontext(high) as low:
        halves = (high.view(torch.int16), low.view(torch.int16)) if split else (high, low)
        programs, how = (triton.cdiv(weight.numel(), _ELEMENTS),), dict(SPLIT=split, CAUTIOUS=cautious)
        launch(_update, programs, *halves, dense(update), *numbers, **how, BLOCK=_ELEMENTS, num_warps=8)


def orthogonalize_triton(g_BMN, coefficients: str = "spec", dtype: torch.dtype = torch.bfloat16):
    """`orthogonalize_reference` with the symmetric products of the kernel; the third product is the library's."""
    x = g_BMN.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    rows = (x / _divisor(x, coefficients)).reshape(-1, *x.shape[-2:]).contiguous()
    for a, b, c in COEFFICIENTS[coefficients]:
        product = launch_symmetric(rows)
        polynomial = launch_symmetric(product, product, alpha=c, beta=b)  # A A = A A^T, as A is symmetric
        rows = torch.baddbmm(rows, polynomial, rows, beta=a)
    x = rows.view(x.shape)
    return (x.mT if tall else x).to(g_BMN.dtype)


# ---- public functions -------------------------------------------------------------------------------------


def implementation(impl: str, tensor: torch.Tensor) -> str:
    """The name of what would run for that tensor: triton | reference."""
    return implementation_of(impl, tensor, cpu="reference", choices=("triton", "reference"))


@without_autocast
def orthogonalize(
    g_BMN: torch.Tensor, *, coefficients: str = "spec", dtype: torch.dtype = torch.bfloat16, impl: str = "auto"
) -> torch.Tensor:
    """Nearly the orthogonal polar factor of each matrix of g (..., M, N): singular values pulled to
    about one.

    coefficients: a key of COEFFICIENTS. dtype: of the arithmetic; bfloat16 in docs/spec.md 3.3.
    Errors: ValueError for unknown coefficients or fewer than two axes.
    """
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"coefficients={coefficients!r} is unknown; choose one of {sorted(COEFFICIENTS)}")
    if g_BMN.dim() < 2:
        raise ValueError(f"orthogonalize needs matrices (..., M, N), got shape {tuple(g_BMN.shape)}")
    expect_floats("g", g_BMN)
    if g_BMN.numel() == 0:
        return torch.zeros_like(g_BMN)
    if implementation(impl, g_BMN) == "triton":
        return orthogonalize_triton(g_BMN, coefficients, dtype)
    return orthogonalize_reference(g_BMN, coefficients, dtype)


@without_autocast
def normalize_rows_(x_BMN: torch.Tensor, mean_squares_BM: torch.Tensor, *, beta2: float = 0.95) -> torch.Tensor:
    """x (..., M, N) in float32, its rows brought to one size, each matrix as large as before.

    v <- beta2 v + (1 - beta2) mean(x^2) of each row, in place in `mean_squares_BM` (..., M) float32; the rows are
    divided by sqrt(v), then each matrix is scaled to its Frobenius norm before. NorMuon: Li, Liu, Liang, Chen, Zhao
    2025, arXiv:2510.05491. For the columns' sizes hand in x.mT.

    Plain torch on every device, by count of bytes: both norms follow from the row's sums, so x is read once for these
    and once for the product, which is all that a kernel could do; for what Muon holds of medium's matrices on one of 8
    GPUs that is 0.2 GB.

    Errors: ValueError for mean squares of another shape or device, or expanded; TypeError for dtypes."""
    expect_floats("x", x_BMN)
    if x_BMN.dim() < 2:
        raise ValueError(f"normalize_rows_ needs matrices (..., M, N), got shape {tuple(x_BMN.shape)}")
    expect("mean_squares", mean_squares_BM, x_BMN.shape[:-1], x_BMN)
    wide = torch.promote_types(x_BMN.dtype, torch.float32)
    expect_floats("mean_squares", mean_squares_BM, (wide,))
    if x_BMN.numel() == 0:
        return x_BMN.to(wide)
    squares_BM = torch.linalg.vector_norm(x_BMN, dim=-1, dtype=wide).square() / x_BMN.shape[-1]
    with in_place("mean_squares", mean_squares_BM) as v_BM:
        v_BM.lerp_(squares_BM, 1 - beta2)
        scale_BM = v_BM.clamp(min=_LEAST_MEAN_SQUARE).rsqrt()
    before, after = squares_BM.sum(-1, keepdim=True), (squares_BM * scale_BM.square()).sum(-1, keepdim=True)
    scale_BM = scale_BM * (before / after.clamp(min=torch.finfo(wide).tiny)).sqrt()
    return x_BMN * scale_BM.unsqueeze(-1)


@without_autocast
def momentum_(buffer: torch.Tensor, grad: torch.Tensor, momentum: float, *, impl: str = "auto") -> torch.Tensor:
    """buffer <- m buffer + (1 - m) grad in place (float32); returns m buffer + (1 - m) grad, float32.

    Errors: ValueError for a gradient of another shape or device or an expanded buffer, TypeError for dtypes."""
    expect("grad", grad, buffer.shape, buffer)
    expect_floats("buffer", buffer, (torch.float32,))
    expect_floats("grad", grad)
    if implementation(impl, buffer) == "triton":
        return launch_momentum(buffer, grad, momentum)
    grad = grad.to(buffer.dtype)
    with in_place("buffer", buffer) as walked:
        walked.lerp_(grad, 1 - momentum)
        return grad.lerp(walked, momentum)


def _apply_plain_(master, update, lr: float, weight_decay: float, cautious: bool) -> None:
    """`apply_update_` of a float32 master, in plain torch."""
    if cautious:
        master.mul_(torch.where(update * master >= 0, 1 - weight_decay, 1.0))
    else:
        master.mul_(1 - weight_decay)
    master.add_(update, alpha=-lr)


@without_autocast
def apply_update_(
    weight: torch.Tensor,
    mantissa: torch.Tensor | None,
    update: torch.Tensor,
    *,
    lr: float,
    weight_decay: float,
    cautious: bool = False,
    impl: str = "auto",
) -> None:
    """master <- master (1 - weight_decay) - lr update, in place.

    cautious: the decay only where update * master >= 0, where both lead the same way (Chen, Li et al.
    2025, arXiv:2510.12402).

    weight_decay is the whole factor: lr x 0.01, x 2 for MLP matrices (docs/spec.md 3.4). lr is the effective
    one, with its sqrt(max(1, rows / columns)). With `mantissa` (uint16 or int16) the weight is the bfloat16
    upper half of the master; without, it is the float32 master itself.
    Errors: ValueError for a mantissa beside a weight that is not bfloat16, for shapes or devices that differ, or for
    an expanded weight or mantissa; TypeError for dtypes.
    """
    if mantissa is not None and weight.dtype != torch.bfloat16:
        raise ValueError(f"a mantissa goes with a bfloat16 weight, got {weight.dtype}; pass mantissa=None")
    expect("update", update, weight.shape, weight)
    expect_floats("update", update)
    if mantissa is None:
        expect_floats("weight", weight, (torch.float32,))
    else:
        expect("mantissa", mantissa, weight.shape, weight)
        if mantissa.dtype not in (torch.int16, torch.uint16):
            raise TypeError(f"mantissa has dtype {mantissa.dtype}; it is the lower 16 bits: int16 or uint16")
    if implementation(impl, weight) == "triton":
        launch_update(weight, mantissa, update, lr, weight_decay, cautious)
        return
    if mantissa is None:
        with in_place("weight", weight) as walked:
            _apply_plain_(walked, update, lr, weight_decay, cautious)
        return
    master = join_master(weight, mantissa)
    _apply_plain_(master, update, lr, weight_decay, cautious)
    put_master_(weight, mantissa, master)
