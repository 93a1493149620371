"""What stands between an attention layer's projections and its attention, in one pass over memory.

    q, k <- rotary(norm(q)), rotary(norm(k));   v <- s[0] * norm(v) + s[1] * ve

norm(x) = x / sqrt(mean(x^2) + eps) over a head, without a gain, eps torch's default (float32's machine epsilon);
rotary is half split: (x1, x2) -> (x1 cos + x2 sin, x2 cos - x1 sin).

Shapes: q (B, T, H, Dh); k, v, ve (B, T, K, Dh); cos, sin float32 (T, R) with R = Dh / 2; s float32 (2,).
Bytes: each tensor once: q, k, v, ve in and q, k, v out; backward also three gradients in and four out.
FLOPs are negligible. kernels/attention.py offers `attention_inputs` together with what follows it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.guards import dense, differentiable_once, expect, expect_floats, launch, refuse_tangents, without_autocast
from kernels.norm import norm_gradient, normed, summed_product
from kernels.runtime import implementation_of, tl, triton

#: The names of `attention`; all of the plain-torch ones mean the reference here.
IMPLEMENTATIONS = ("triton", "banded", "flex", "reference")


def attention_inputs_reference(q, k, v, ve, s, cos_TR, sin_TR):
    """The prologue of `attention_inputs`, in plain torch."""

    def rotate(x):
        c, d = cos_TR[:, None], sin_TR[:, None]
        x1, x2 = F.rms_norm(x, x.shape[-1:]).chunk(2, dim=-1)
        return torch.cat((x1 * c + x2 * d, x2 * c - x1 * d), dim=-1).to(x.dtype)

    mixed = s[0].to(v.dtype) * F.rms_norm(v, v.shape[-1:])
    if ve is not None:
        mixed = mixed + s[1].to(v.dtype) * ve
    return rotate(q), rotate(k), mixed


class _Written(torch.autograd.Function):
    """The reference with its derivative written out, for eager training on a CPU: a third of the passes.

    With y = x r the normed head (kernels/norm.py), rotary is y * [cos, cos] + swap(y) * [sin, -sin], where swap
    exchanges the halves of a head."""

    @staticmethod
    def forward(ctx, q, k, v, ve, s, cos_TR, sin_TR):
        cos = torch.cat((cos_TR, cos_TR), dim=-1)[:, None]
        sin = torch.cat((sin_TR, -sin_TR), dim=-1)[:, None]
        (q_y, q_r), (k_y, k_r), (v_y, v_r) = (normed(x) for x in (q, k, v))
        mixed = v_y * s[0] if ve is None else torch.mul(v_y, s[0]).addcmul_(ve, s[1])
        ctx.save_for_backward(q_y, q_r, k_y, k_r, v_y, v_r, ve, s, cos, sin)
        q, k = (torch.addcmul(y * cos, _swap(y), sin) for y in (q_y, k_y))
        return q, k, mixed

    @staticmethod
    @differentiable_once("attention_inputs")
    def backward(ctx, dq, dk, dmixed):
        q_y, q_r, k_y, k_r, v_y, v_r, ve, s, cos, sin = ctx.saved_tensors
        dq, dk = ((d * cos).add_(_swap(d * sin)) for d in (dq, dk))
        ds_ve = dmixed.new_zeros(()) if ve is None else summed_product(dmixed, ve)
        ds = torch.stack([summed_product(dmixed, v_y), ds_ve])
        dve = None if ve is None else dmixed * s[1]
        grads = (norm_gradient(dq, q_y, q_r), norm_gradient(dk, k_y, k_r), norm_gradient(dmixed * s[0], v_y, v_r))
        return (*grads, dve, ds.to(s.dtype), None, None)


def _swap(x: torch.Tensor) -> torch.Tensor:
    """The halves of the last axis exchanged."""
    return x.roll(x.size(-1) // 2, dims=-1)


# ---- Triton: the layer's inputs ----------------------------------------------------------------------------
# Prefixes: p_ pointer, o_ offset, b_ block of values, m_ mask. One program takes ROWS tokens through all
# heads, so that a token's angles are read once. A head is handled as its two halves, which is what rotary
# pairs up. Everything is float32 in registers and rounded once, on the way out.


@triton.jit
def _load_halves(p_x, o_token, stride, m_token, R: tl.constexpr):
    """Both halves of the head that starts at p_x, for each token, in float32; zeros where masked out."""
    p = p_x + o_token[:, None].to(tl.int64) * stride + tl.arange(0, R)[None, :]
    b_1 = tl.load(p, mask=m_token[:, None], other=0.0)
    b_2 = tl.load(p + R, mask=m_token[:, None], other=0.0)
    return b_1.to(tl.float32), b_2.to(tl.float32)


@triton.jit
def _store_halves(p_x, b_1, b_2, o_token, stride, m_token, R: tl.constexpr):
    """Write what `_load_halves` reads."""
    p = p_x + o_token[:, None].to(tl.int64) * stride + tl.arange(0, R)[None, :]
    tl.store(p, b_1.to(p_x.dtype.element_ty), mask=m_token[:, None])
    tl.store(p + R, b_2.to(p_x.dtype.element_ty), mask=m_token[:, None])


@triton.jit
def _inverse_rms(b_1, b_2, eps, R: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of each row."""
    return tl.rsqrt((tl.sum(b_1 * b_1, 1) + tl.sum(b_2 * b_2, 1)) / (2 * R) + eps)[:, None]


@triton.jit
def _norm_gradient(b_g1, b_g2, b_x1, b_x2, eps, R: tl.constexpr):
    """Gradient at x of y = x / rms(x), from the gradient g at y: (g - y * mean(y * g)) / rms(x)."""
    b_r = _inverse_rms(b_x1, b_x2, eps, R)
    b_y1, b_y2 = b_x1 * b_r, b_x2 * b_r
    b_mean = ((tl.sum(b_y1 * b_g1, 1) + tl.sum(b_y2 * b_g2, 1)) / (2 * R))[:, None]
    return (b_g1 - b_y1 * b_mean) * b_r, (b_g2 - b_y2 * b_mean) * b_r


@triton.jit
def _inputs_forward(
    p_q,
    p_k,
    p_v,
    p_ve,
    p_s,
    p_cos,
    p_sin,
    p_qo,
    p_ko,
    p_vo,
    tokens,
    T,
    stride_q,
    stride_k,
    stride_v,
    stride_ve,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_VE: tl.constexpr,
):
    """Normalise and rotate q and k, normalise and mix v, for ROWS of the B * T tokens."""
    o_token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_token = o_token < tokens
    o_angle = (o_token % T)[:, None] * R + tl.arange(0, R)[None, :]
    b_cos = tl.load(p_cos + o_angle, mask=m_token[:, None], other=0.0)
    b_sin = tl.load(p_sin + o_angle, mask=m_token[:, None], other=0.0)
    for h in range(0, HEADS):
        b_1, b_2 = _load_halves(p_q + h * 2 * R, o_token, stride_q, m_token, R)
        b_r = _inverse_rms(b_1, b_2, eps, R)
        b_1, b_2 = b_1 * b_r, b_2 * b_r
        _store_halves(
            p_qo + h * 2 * R, b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin, o_token, HEADS * 2 * R, m_token, R
        )
    s_0 = tl.load(p_s)
    s_1 = tl.load(p_s + 1)
    for h in range(0, KV_HEADS):
        b_1, b_2 = _load_halves(p_k + h * 2 * R, o_token, stride_k, m_token, R)
        b_r = _inverse_rms(b_1, b_2, eps, R)
        b_1, b_2 = b_1 * b_r, b_2 * b_r
        _store_halves(
            p_ko + h * 2 * R,
            b_1 * b_cos + b_2 * b_sin,
            b_2 * b_cos - b_1 * b_sin,
            o_token,
            KV_HEADS * 2 * R,
            m_token,
            R,
        )
        b_1, b_2 = _load_halves(p_v + h * 2 * R, o_token, stride_v, m_token, R)
        b_r = _inverse_rms(b_1, b_2, eps, R) * s_0
        b_1, b_2 = b_1 * b_r, b_2 * b_r
        if HAS_VE:
            b_e1, b_e2 = _load_halves(p_ve + h * 2 * R, o_token, stride_ve, m_token, R)
            b_1, b_2 = b_1 + s_1 * b_e1, b_2 + s_1 * b_e2
        _store_halves(p_vo + h * 2 * R, b_1, b_2, o_token, KV_HEADS * 2 * R, m_token, R)


@triton.jit
def _inputs_backward(
    p_gq,
    p_gk,
    p_gv,
    p_q,
    p_k,
    p_v,
    p_ve,
    p_s,
    p_cos,
    p_sin,
    p_dq,
    p_dk,
    p_dv,
    p_dve,
    p_ds,
    tokens,
    T,
    stride_q,
    stride_k,
    stride_v,
    stride_ve,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_VE: tl.constexpr,
):
    """Gradients at q, k, v and ve, and this program's share of both scalars' gradients, (programs, 2)."""
    o_token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_token = o_token < tokens
    o_angle = (o_token % T)[:, None] * R + tl.arange(0, R)[None, :]
    b_cos = tl.load(p_cos + o_angle, mask=m_token[:, None], other=0.0)
    b_sin = tl.load(p_sin + o_angle, mask=m_token[:, None], other=0.0)
    for h in range(0, HEADS):
        b_g1, b_g2 = _load_halves(p_gq + h * 2 * R, o_token, HEADS * 2 * R, m_token, R)
        b_1, b_2 = _load_halves(p_q + h * 2 * R, o_token, stride_q, m_token, R)
        b_1, b_2 = _norm_gradient(b_g1 * b_cos - b_g2 * b_sin, b_g1 * b_sin + b_g2 * b_cos, b_1, b_2, eps, R)
        _store_halves(p_dq + h * 2 * R, b_1, b_2, o_token, HEADS * 2 * R, m_token, R)
    s_0 = tl.load(p_s)
    s_1 = tl.load(p_s + 1)
    b_ds0 = tl.zeros([ROWS], tl.float32)
    b_ds1 = tl.zeros([ROWS], tl.float32)
    for h in range(0, KV_HEADS):
        b_g1, b_g2 = _load_halves(p_gk + h * 2 * R, o_token, KV_HEADS * 2 * R, m_token, R)
        b_1, b_2 = _load_halves(p_k + h * 2 * R, o_token, stride_k, m_token, R)
        b_1, b_2 = _norm_gradient(b_g1 * b_cos - b_g2 * b_sin, b_g1 * b_sin + b_g2 * b_cos, b_1, b_2, eps, R)
        _store_halves(p_dk + h * 2 * R, b_1, b_2, o_token, KV_HEADS * 2 * R, m_token, R)
        b_g1, b_g2 = _load_halves(p_gv + h * 2 * R, o_token, KV_HEADS * 2 * R, m_token, R)
        b_1, b_2 = _load_halves(p_v + h * 2 * R, o_token, stride_v, m_token, R)
        b_r = _inverse_rms(b_1, b_2, eps, R)
        b_ds0 += tl.sum(b_g1 * b_1 * b_r, 1) + tl.sum(b_g2 * b_2 * b_r, 1)
        b_1, b_2 = _norm_gradient(b_g1 * s_0, b_g2 * s_0, b_1, b_2, eps, R)
        _store_halves(p_dv + h * 2 * R, b_1, b_2, o_token, KV_HEADS * 2 * R, m_token, R)
        if HAS_VE:
            b_1, b_2 = _load_halves(p_ve + h * 2 * R, o_token, stride_ve, m_token, R)
            b_ds1 += tl.sum(b_g1 * b_1, 1) + tl.sum(b_g2 * b_2, 1)
            _store_halves(p_dve + h * 2 * R, b_g1 * s_1, b_g2 * s_1, o_token, KV_HEADS * 2 * R, m_token, R)
    tl.store(p_ds + tl.program_id(0) * 2, tl.sum(b_ds0, 0))
    tl.store(p_ds + tl.program_id(0) * 2 + 1, tl.sum(b_ds1, 0))


# ---- launchers ---------------------------------------------------------------------------------------------

#: Tokens a program and warps of the inputs' kernels.
_INPUTS_ROWS, _INPUTS_WARPS = 16, 4


def _tokens_apart(x: torch.Tensor) -> torch.Tensor:
    """x (B, T, heads, Dh) itself if its heads are adjacent and its tokens evenly apart (a slice of a merged
    projection is), else a copy."""
    x = x.resolve_neg()
    B, T, _, width = x.shape
    adjacent = x.stride(3) == 1 and x.stride(2) == width
    even = B == 1 or x.stride(0) == T * x.stride(1)
    return x if adjacent and even else x.contiguous()


def _inputs_arguments(q, k, v, ve):
    """(inputs that the kernels can walk, the scalar arguments, the compile-time ones)."""
    walked = [None if x is None else _tokens_apart(x) for x in (q, k, v, ve)]
    B, T, H, width = q.shape
    apart = [0 if x is None else x.stride(1) for x in walked]
    constants = {
        "HEADS": H,
        "KV_HEADS": k.shape[2],
        "R": width // 2,
        "ROWS": _INPUTS_ROWS,
        "HAS_VE": ve is not None,
        "num_warps": _INPUTS_WARPS,
        "enable_fp_fusion": True,
    }
    return walked, (B * T, T, *apart, torch.finfo(torch.float32).eps), constants


def _small_arguments(q, s, cos_TR, sin_TR):
    """The two scalars and the rotary tables as the kernels walk them: dense float32."""
    T, R = q.shape[1], q.shape[3] // 2
    for name, x, shape in (("s", s, (2,)), ("cos_TR", cos_TR, (T, R)), ("sin_TR", sin_TR, (T, R))):
        expect(name, x, shape, q)
    return [dense(x.float()) for x in (s, cos_TR, sin_TR)]


def launch_inputs_forward(q, k, v, ve, s, cos_TR, sin_TR):
    """Run the prologue's forward kernel on (B, T, heads, Dh) tensors; returns q, k and v, contiguous."""
    out = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    walked, scalars, constants = _inputs_arguments(q, k, v, ve)
    shared = _small_arguments(q, s, cos_TR, sin_TR)
    programs = triton.cdiv(scalars[0], _INPUTS_ROWS)
    launch(_inputs_forward, (programs,), *walked, *shared, *out, *scalars, **constants)
    return out


def launch_inputs_backward(grads, q, k, v, ve, s, cos_TR, sin_TR):
    """Run the prologue's backward kernel; grads at the three outputs. Returns dq, dk, dv, dve, ds.

    The scalars' gradients are summed from one float32 pair a program, in a fixed order."""
    out = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v, ve)]
    walked, scalars, constants = _inputs_arguments(q, k, v, ve)
    shared = _small_arguments(q, s, cos_TR, sin_TR)
    for name, gradient, x in zip(("gq", "gk", "gv"), grads, (q, k, v)):
        expect(name, gradient, x.shape, q)
    programs = triton.cdiv(scalars[0], _INPUTS_ROWS)
    ds = torch.empty(programs, 2, dtype=torch.float32, device=q.device)
    grads = [dense(g) for g in grads]
    launch(_inputs_backward, (programs,), *grads, *walked, *shared, *out, ds, *scalars, **constants)
    return *out, ds.sum(0)


# ---- torch operators ---------------------------------------------------------------------------------------


@torch.library.custom_op("speedrun::attention_inputs", mutates_args=())
def _attention_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ve: torch.Tensor | None,
    s: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
) -> list[torch.Tensor]:
    return launch_inputs_forward(q, k, v, ve, s, cos_TR, sin_TR)


@torch.library.custom_op("speedrun::attention_inputs_backward", mutates_args=())
def _attention_inputs_backward(
    gq: torch.Tensor,
    gk: torch.Tensor,
    gv: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ve: torch.Tensor | None,
    s: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
) -> list[torch.Tensor]:
    grads = launch_inputs_backward((gq, gk, gv), q, k, v, ve, s, cos_TR, sin_TR)
    return [g for g in grads if g is not None]


@_attention_inputs.register_fake
def _(q, k, v, ve, s, cos_TR, sin_TR):
    return [q.new_empty(x.shape) for x in (q, k, v)]


@_attention_inputs_backward.register_fake
def _(gq, gk, gv, q, k, v, ve, s, cos_TR, sin_TR):
    return [x.new_empty(x.shape) for x in (q, k, v, ve, s) if x is not None]


def _inputs_setup(ctx, inputs, output):
    ctx.has_ve = inputs[3] is not None
    ctx.save_for_backward(*(x for x in inputs if x is not None))


@differentiable_once("attention_inputs")
def _inputs_grad(ctx, grads):
    saved = list(ctx.saved_tensors)
    if not ctx.has_ve:
        saved.insert(3, None)
    grads = _attention_inputs_backward(*grads, *saved)
    if not ctx.has_ve:
        grads.insert(3, None)
    return *grads, None, None


_attention_inputs.register_autograd(_inputs_grad, setup_context=_inputs_setup)


# ---- public function ---------------------------------------------------------------------------------------


def with_batch(name: str, x: torch.Tensor) -> torch.Tensor:
    """x as (B, T, heads, Dh)."""
    if not isinstance(x, torch.Tensor) or x.ndim not in (3, 4):
        raise ValueError(
            f"{name} must be a (T, heads, Dh) or (B, T, heads, Dh) tensor, got "
            f"{tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__}"
        )
    return x[None] if x.ndim == 3 else x


def check_width(q: torch.Tensor) -> None:
    """The kernels' tiles span a head, and Triton's tiles are powers of two."""
    width = q.shape[-1]
    if q.dtype == torch.float64 or width not in (16, 32, 64, 128):
        raise ValueError(
            f"q has head width {width} and dtype {q.dtype}; impl='triton' supports widths 16, "
            "32, 64 and 128 in float32, float16, bfloat16. Choose impl='reference' for others"
        )


@without_autocast
def attention_inputs(q, k, v, ve, s, cos_TR, sin_TR, *, impl: str = "auto"):
    """What stands between the projections and attention, differentiable in q, k, v, ve and s.

        q, k <- rotary(norm(q)), rotary(norm(k));   v <- s[0] * norm(v) + s[1] * ve

    norm is the RMS norm over a head without a gain; rotary is half split: (x1 cos + x2 sin, x2 cos - x1 sin).

    Args:
        q: (B, T, H, Dh) or (T, H, Dh). k, v, ve: the same with K heads; ve None means v <- s[0] * norm(v).
        s: float32 (2,). cos_TR, sin_TR: float32 (T, Dh / 2).
        impl: as in `attention`; every plain-torch name means the reference.

    Returns: (q, k, v) in the inputs' shapes and dtype.
    Raises: ValueError or TypeError naming the argument.
    """
    chosen = implementation_of(impl, q, cpu="banded", choices=IMPLEMENTATIONS)
    _check_inputs(q, k, v, ve, s, cos_TR, sin_TR)
    if chosen == "banded" and q.dtype == s.dtype == torch.float32 and not torch.compiler.is_compiling():
        return _Written.apply(q, k, v, ve, s, cos_TR, sin_TR)
    if chosen != "triton":
        return attention_inputs_reference(q, k, v, ve, s, cos_TR, sin_TR)
    check_width(q)
    refuse_tangents("attention_inputs", q, k, v, ve, s)
    batched = [None if x is None else with_batch("x", x) for x in (q, k, v, ve)]
    out = _attention_inputs(*batched, dense(s.float()), dense(cos_TR.float()), dense(sin_TR.float()))
    return tuple(y.reshape(x.shape) for y, x in zip(out, (q, k, v)))


def _check_inputs(q, k, v, ve, s, cos_TR, sin_TR) -> None:
    """Raise an error that names the first argument that does not fit."""
    expect_floats("q", q)
    for name, x in (("q", q), ("k", k), ("v", v), ("ve", ve)):
        if x is None and name == "ve":
            continue
        with_batch(name, x)
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}")
        wanted = (*q.shape[:-2], q.shape[-2] if name == "q" else k.shape[-2], q.shape[-1])
        if tuple(x.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {wanted}")
    if q.shape[-1] % 2:
        raise ValueError(f"q has head width {q.shape[-1]}; rotary needs an even one")
    for name, x in (("cos_TR", cos_TR), ("sin_TR", sin_TR)):
        expect(name, x, (q.shape[-3], q.shape[-1] // 2), q)
        expect_floats(name, x)
    expect("s", s, (2,), q)
    expect_floats("s", s)
