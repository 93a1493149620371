"""Fused kernels of the trainer, one family a file, its plain-torch reference beside it.

    attention.py       packed documents under a growing causal window, and the layer's input prologue
    attention_gluon.py the same for Hopper in Gluon, by name; attention_gluon_backward.py its gradients
    attention_layer.py projection, prologue and attention as one operator, for fewer bytes
    cross_entropy.py   the head's product, soft cap and loss in one pass
    embedding.py       gradients of tables that rows are picked of, and the rows that travel
    heads.py           what techniques put between attention and the products before and after it
    mlp.py             linear, relu squared, linear
    muon.py            orthogonalisation, momentum and the bfloat16 + mantissa update
    products8.py       products in 8 bits, with safe scales: conversion, linear layers
    mlp8.py            the MLP with all its products in 8 bits, and what stands around them
    residual.py        the learned mix of the stream with both input embeddings
    proof/             one command that proves them on a machine without a GPU: `python -m kernels.proof`

Each public function takes `impl="auto"`: Triton on a GPU (a missing kernel there is an error, never a silent
fallback), the fast plain-torch path on a CPU. Nothing here needs a GPU to be imported.
"""
