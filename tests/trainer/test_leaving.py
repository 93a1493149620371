"""Gradients are told of in the backward pass, when they are made: eager and compiled."""

import pytest
import torch
from torch import nn

from trainer.leaving import leaving, listen
from trainer.warm_up import compiler_options

NAMES = (("head",), ("blocks.2.w", "blocks.1.w"), ("blocks.0.w", "elsewhere"))


class Listener:
    def __init__(self):
        self.heard = []

    def leave(self, group, gradients):
        self.heard.append((group, [gradient.clone() for gradient in gradients]))


class Model(nn.Module):
    """Three layers and a head; a layer's weights go in as the first layer of their group begins."""

    def __init__(self, early):
        super().__init__()
        torch.manual_seed(0)
        self.weights = nn.ParameterDict({name.replace(".", "_"): torch.randn(8, 8) for name in self.NAMES})
        self.early = early

    NAMES = "blocks.0.w", "blocks.1.w", "blocks.2.w", "head"

    def forward(self, x):
        given = {name: self.weights[name.replace(".", "_")] for name in self.NAMES}
        x = torch.tanh(x @ leaving({"blocks.0.w": given["blocks.0.w"]}, self.early)["blocks.0.w"])
        later = leaving({name: given[name] for name in NAMES[1]}, self.early)
        for name in ("blocks.1.w", "blocks.2.w"):
            x = x + torch.tanh(x @ later[name])
        return (x @ leaving({"head": given["head"]}, self.early)["head"]).square().mean()


def run(backend, early_of):
    listener = Listener()
    model = Model(early_of(listener))
    options = compiler_options(False) if backend == "inductor" else None
    forward = model if backend is None else torch.compile(model, backend=backend, fullgraph=True, options=options)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    forward(x).backward()
    return model, listener, forward, x


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_a_group_is_told_of_whole_from_the_last_to_the_first(backend):
    torch._dynamo.reset()
    model, listener, forward, x = run(backend, lambda listener: listen(listener, NAMES))
    assert [group for group, _ in listener.heard] == [0, 1], "the last group is not all in the model"
    for group, gradients in listener.heard:
        for name, gradient in zip(NAMES[group], gradients, strict=True):
            torch.testing.assert_close(gradient, model.weights[name.replace(".", "_")].grad, rtol=0, atol=0)
    plain, silent, _, _ = run(None, lambda _: None)
    assert silent.heard == []
    for name, p in plain.weights.items():
        torch.testing.assert_close(model.weights[name].grad, p.grad)
    with torch.no_grad():
        forward(x)
    assert len(listener.heard) == 2


def test_who_is_gone_hears_nothing():
    _, listener, forward, x = run(None, lambda listener: listen(listener, NAMES))
    heard = listener.heard
    del listener
    forward(x).backward()
    assert len(heard) == 2


def test_second_derivatives_are_refused():
    model = Model(listen(Listener(), NAMES))
    with pytest.raises(RuntimeError, match="leaving"):
        (gradient,) = torch.autograd.grad(model(torch.ones(2, 8)), model.weights["head"], create_graph=True)
        gradient.sum().backward()
