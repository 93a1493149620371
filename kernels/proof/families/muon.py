"""Proof cases of Muon's kernels: symmetric products, momentum, the update of split weights (kernels/muon.py)."""

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric, meta
from kernels.proof.operators import same_layout

ALPHA, BETA, MOMENTUM, LR, DECAY = 0.7, -1.3, 0.9, 0.3, 0.1


def _matrices(B, M, K):
    def make(random):
        e = torch.randn(B, M, M, generator=random)
        return {"x": torch.randn(B, M, K, generator=random), "e": e + e.mT}

    return make


def _symmetric_kernel(module, given, tile=None):
    plain = module.launch_symmetric(given["x"], tile=tile)
    added = module.launch_symmetric(given["x"], given["e"], alpha=ALPHA, beta=BETA, tile=tile)
    return {"plain": plain, "added": added}


def _by_descriptors(module, given):
    return _symmetric_kernel(module, given, module.Tile(32, 32, 4, 1, depth=16, descriptors=True))


def _symmetric_reference(module, given):
    product = given["x"] @ given["x"].mT
    return {"plain": product, "added": torch.baddbmm(given["e"], given["x"], given["x"].mT, beta=BETA, alpha=ALPHA)}


def _vectors(size):
    def make(random):
        drawn = {name: torch.randn(size, generator=random) for name in ("weight", "buffer", "grad", "update")}
        drawn["update"].view(-1)[::5] = 0  # where a cautious decay must decide
        return drawn

    return make


def _vector_kernel(module, given):
    weight, buffer = same_layout(given["weight"]), same_layout(given["buffer"])
    high, low = module.split_master(given["weight"])
    high, low = high.clone(), low.view(torch.int16).clone()
    step = module.launch_momentum(buffer, given["grad"], MOMENTUM)
    module.launch_update(weight, None, given["update"], LR, DECAY)
    module.launch_update(high, low, given["update"], LR, DECAY)
    careful = same_layout(given["weight"])
    module.launch_update(careful, None, given["update"], LR, DECAY, cautious=True)
    found = {"buffer": buffer, "step": step, "weight": weight, "careful": careful}
    return {**found, "master": module.join_master(high, low)}


def _vector_reference(module, given):
    buffer = MOMENTUM * given["buffer"] + (1 - MOMENTUM) * given["grad"]
    weight = given["weight"] * (1 - DECAY) - LR * given["update"]
    step = MOMENTUM * buffer + (1 - MOMENTUM) * given["grad"]
    towards_zero = given["weight"].sign() * given["update"].sign() >= 0
    careful = given["weight"] * (1 - DECAY * towards_zero) - LR * given["update"]
    return {"buffer": buffer, "step": step, "weight": weight, "careful": careful, "master": weight}


def _launch(dtype, B=60, M=1024, K=1024):
    def run():
        import kernels.muon as module

        x = meta(B, M, K, dtype=dtype)
        product = module.launch_symmetric(x)
        module.launch_symmetric(product, product, alpha=ALPHA, beta=BETA)
        wide = meta(M, K, dtype=torch.float32)
        module.launch_momentum(wide, meta(M, K, dtype=dtype), MOMENTUM)
        if dtype == torch.bfloat16:
            low = meta(M, K, dtype=torch.int16)
            module.launch_update(x[0], low, meta(M, K, dtype=dtype), LR, DECAY)
            module.launch_update(x[0], low, wide, LR, DECAY, cautious=True)
        else:
            module.launch_update(wide, None, wide, LR, DECAY)

    return run


def _launch_step():
    """The update as the trainer's step launches it: a bfloat16 weight with its mantissa, the update in float32."""
    import kernels.muon as module

    weight, low, update = (meta(1024, 1024, dtype=dtype) for dtype in (torch.bfloat16, torch.int16, torch.float32))
    module.launch_update(weight, low, update, LR, DECAY)


def _launch_wide():
    """Momentum and update of a float32 weight with a float32 gradient, which decays cautiously."""
    import kernels.muon as module

    weight, gradient, buffer = (meta(1024, 1024, dtype=torch.float32) for _ in range(3))
    module.launch_momentum(buffer, gradient, MOMENTUM)
    module.launch_update(weight, None, gradient, LR, DECAY, cautious=True)


FAMILY = Family(
    name="muon",
    module="kernels.muon",
    kernels=("_symmetric", "_momentum", "_update"),
    numeric=(
        Numeric("ragged matrices", _matrices(2, 70, 37), _symmetric_kernel, _symmetric_reference),
        Numeric("ragged matrices, by descriptors", _matrices(2, 70, 40), _by_descriptors, _symmetric_reference),
        Numeric("whole tiles", _matrices(1, 64, 64), _symmetric_kernel, _symmetric_reference, quick=False),
        Numeric("one row", _matrices(3, 1, 5), _symmetric_kernel, _symmetric_reference, quick=False),
        Numeric("ragged vectors", _vectors(5000), _vector_kernel, _vector_reference, dtypes=(torch.float32,)),
        Numeric(
            "short vectors",
            _vectors((3, 4)),
            _vector_kernel,
            _vector_reference,
            dtypes=(torch.float32,),
            quick=False,
            hostile=True,
            changed=("weight", "buffer"),
        ),
        Numeric("tiny", _matrices(2, 5, 7), _symmetric_kernel, _symmetric_reference, quick=False, hostile=True),
    ),
    launches=(
        Launch("bf16, attention's matrices", _launch(torch.bfloat16), quick=True),
        Launch("bf16 weight, float32 update", _launch_step, quick=True, demanding=False),
        Launch("float32 weight, cautious", _launch_wide, spills=False, demanding=False),
        Launch("bf16, the MLP's matrices", _launch(torch.bfloat16, B=32, K=4096)),
        # sides that 16 does not divide: masked loads of single numbers
        Launch("bf16, a gate a head", _launch(torch.bfloat16, B=30, M=8, K=16), demanding=False, spills=False),
        Launch("bf16, ragged", _launch(torch.bfloat16, B=1, M=100, K=50), demanding=False, spills=False),
        Launch("float32, ragged", _launch(torch.float32, B=1, M=100, K=50), demanding=False),
    ),
    demands={
        "_symmetric": Demand(instructions=("HGMMA", "UTMALDG"), wide=("p_x", "p_e", "p_out")),
        "_momentum": Demand(wide=("p_buffer", "p_grad", "p_update")),
        "_update": Demand(wide=("p_weight", "p_mantissa", "p_update")),
    },
    faults=(
        Fault("the factor is taken for dense", "x_BMK = dense(x_BMK)", "x_BMK = x_BMK", by="transposed"),
        Fault("the added matrix is taken for dense", "e_BMM = dense(e_BMM)", "e_BMM = e_BMM", by="transposed"),
        Fault("the gradient is taken for dense", "dense(grad)", "grad", by="transposed"),
        Fault("the update is taken for dense", "dense(update)", "update", by="transposed"),
        Fault(
            "the buffer is taken for dense",
            'with in_place("buffer", buffer) as walked:\n        programs',
            "with nullcontext(buffer) as walked:\n        programs",
            by="transposed",
        ),
        Fault(
            "the weight is taken for dense",
            'with in_place("weight", weight) as high, in_place("mantissa", mantissa) if split',
            'with nullcontext(weight) as high, in_place("mantissa", mantissa) if split',
            by="transposed",
        ),
        Fault("the mirrored tile is not turned", "tl.trans(b_out), mask", "b_out, mask"),
        Fault("tiles above the diagonal are lost", "if i > j:", "if i > j + 1000:"),
        Fault("the diagonal is skipped", "if j > i:", "if j >= i:"),
        Fault(
            "rows past the end are read",
            "mask=(o_i < M)[:, None] & (o_k < K)[None, :], other",
            "mask=(o_k < K + 0 * o_k)[None, :] & (o_i < M + 1)[:, None], other",
        ),
        Fault(
            "columns past the end are read",
            "(o_j < M)[:, None] & (o_k < K)[None, :]",
            "(o_j < M)[:, None] & (o_k < K + 1)[None, :]",
        ),
        Fault(
            "rows past the end are written",
            "m_out = (o_i < M)[:, None] & (o_j < M)[None, :]",
            "m_out = (o_i < M + 1)[:, None] & (o_j < M)[None, :]",
        ),
        Fault(
            "every batch is the first",
            "batch = tl.program_id(1).to(tl.int64)",
            "batch = tl.program_id(1).to(tl.int64) * 0",
        ),
        Fault("a descriptor's matrix is the first", "p_x.load([batch.to(tl.int32), j", "p_x.load([0, j"),
        Fault("a descriptor's rows are its columns", "i * BM, k]).reshape", "j * BM, k]).reshape"),
        Fault("beta is left out", "b_out += beta * tl.load", "b_out += tl.load"),
        Fault("Nesterov's step is the plain buffer", "b_grad + (b_buffer - b_grad) * momentum", "b_buffer"),
        Fault("the mantissa's sign is spread", ".to(tl.int32) & 0xFFFF", ".to(tl.int32)"),
        Fault("the mantissa is not kept", "tl.store(p_mantissa + o, b_bits.to(tl.int16), mask=m)", "pass"),
        Fault("everything decays, whichever way it moves", "tl.where(b_update * b_master >= 0, keep, 1.0)", "keep"),
        Fault("what moves away from zero decays", "b_update * b_master >= 0", "b_update * b_master < 0"),
        Fault("vectors are written past the end", "m = o < N", "m = o < N + 1"),
    ),
)
