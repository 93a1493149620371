"""What is used of Gluon, Triton's language below its own, under one name in triton 3.6 to 3.9.

In Gluon a kernel says itself which warps do what, how a tile lies in registers and in shared memory, and what waits for
what. Triton's interpreter cannot run that; kernels/proof/gluon_model.py is a model of the same names that can.
"""

from __future__ import annotations

import torch

try:
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    #: A tile from device memory into shared memory, by the copy engine; its bytes are counted at a barrier.
    load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # 3.8 renamed it
    #: A tile from shared memory added to what is in device memory, by the copy engine; None: this Triton has no such.
    add_tile = getattr(tma, "async_atomic_add", None)
    #: Waits until the copy engine has read all but so many of the tiles that this warp has given it.
    tiles_read = tma.store_wait
    HAVE_GLUON = True
except ImportError:
    from types import SimpleNamespace

    gluon = SimpleNamespace(jit=lambda function: function)
    gl = SimpleNamespace(constexpr=lambda value: value)
    fence_async_shared = mbarrier = warpgroup_mma = warpgroup_mma_wait = load_tile = add_tile = tiles_read = None
    TensorDescriptor = None
    HAVE_GLUON = False


def descriptor(x: torch.Tensor, block: list[int]):
    """The tensor descriptor of x, whose last axis is dense, for tiles of the shape `block` as products want them."""
    dtype = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[x.dtype]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), block, layout)
