"""Rungs against torch's own layers, against each other, and against the documents they must not mix."""

import math

import pytest
import torch

from lab import LabError
from lab.models import IGNORE, LADDER, build_model
from lab.models.base import windows
from lab.models.batchnorm import BatchNorm1d
from lab.models.recurrent import RecurrentLayer

SMALL = {"recurrent": {"hidden_dim": 16}, "gpt": {"model_dim": 16, "num_heads": 2}, "wavenet": {"hidden_dim": 16}}


def small(name, vocab=12):
    torch.manual_seed(0)
    return build_model(name, vocab, SMALL.get(name))


def test_windows_stop_at_the_newest_mark():
    got = windows(torch.tensor([[0, 5, 3, 0, 7]]), 3)[0].tolist()
    assert got == [[0, 0, 0], [0, 0, 5], [0, 5, 3], [0, 0, 0], [0, 0, 7]]


@pytest.mark.parametrize("name", LADDER)
def test_every_rung_has_the_interface(name):
    model = small(name)
    idx = torch.randint(1, 12, (2, 10))
    logits, loss = model(idx)
    assert logits.shape == (2, 10, 12) and loss is None
    targets = idx.clone()
    targets[:, :5] = IGNORE
    logits, loss = model.eval()(idx, targets)
    by_hand = -logits.log_softmax(-1).gather(-1, idx[..., None])[:, 5:].mean()
    assert math.isclose(float(loss), float(by_hand), rel_tol=1e-5)


@pytest.mark.parametrize("name", LADDER)
def test_the_future_and_other_documents_change_nothing(name):
    model = small(name).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        idx = torch.tensor([[0, 4, 5, 6, 0, 7, 8, 9]])
        later, other = idx.clone(), idx.clone()
        later[0, 6:] = 3
        other[0, 1:4] = 10
        torch.testing.assert_close(model.logits(idx)[:, :6], model.logits(later)[:, :6])
        torch.testing.assert_close(model.logits(idx)[:, 4:], model.logits(other)[:, 4:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(7, 5), (4, 3, 5)])
def test_batch_norm_matches_torch_in_both_modes(shape):
    torch.manual_seed(1)
    ours, theirs = BatchNorm1d(5).double(), torch.nn.BatchNorm1d(5).double()
    with torch.no_grad():
        ours.gain.uniform_(0.5, 2)
        ours.bias.normal_()
        theirs.weight.copy_(ours.gain)
        theirs.bias.copy_(ours.bias)
    for _ in range(3):
        x = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        a, b = ours(x), theirs(y.reshape(-1, 5)).view(shape)
        torch.testing.assert_close(a, b)
        a.pow(3).sum().backward()
        b.pow(3).sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x), theirs(x.reshape(-1, 5)).view(shape))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_recurrent_cells_match_torch(cell):
    torch.manual_seed(2)
    theirs = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell](6, 9, batch_first=True).double()
    ours = RecurrentLayer(cell, 6, 9).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 11, 6, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    a, b = ours(x), theirs(y)[0]
    torch.testing.assert_close(a, b)
    a.pow(2).sum().backward()
    b.pow(2).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, getattr(theirs, name).grad)


def test_reset_state_equals_separate_documents():
    layer = RecurrentLayer("lstm", 4, 5)
    x = torch.randn(1, 6, 4)
    opens = torch.tensor([[True, False, False, True, False, False]])
    together = layer(x, opens)
    torch.testing.assert_close(together[:, 3:], layer(x[:, 3:]))


def test_counted_probabilities_are_the_counts():
    model = build_model("counts", 3, {"smoothing": 1.0})
    model.observe(torch.tensor([[0, 1, 1]]), torch.tensor([[1, 2, IGNORE]]))
    expected = torch.tensor([[1, 2, 1], [1, 1, 2], [1, 1, 1]], dtype=torch.float64)
    torch.testing.assert_close(model.probabilities(), expected / expected.sum(1, keepdim=True))


@pytest.mark.parametrize(
    "name, fields, words",
    [
        ("wavenet", {"context": 6}, "power of two"),
        ("recurrent", {"cell": "elman"}, "gru, lstm"),
        ("batchnorm", {"init": "zeros"}, "kaiming"),
        ("mlp", {"contxt": 3}, "contxt"),
        ("transformer", None, "the ladder has"),
    ],
)
def test_wrong_settings_are_named(name, fields, words):
    with pytest.raises(LabError, match=words):
        build_model(name, 12, fields)


def test_dropout_of_the_gpt_acts_in_training_alone_and_keeps_the_mean():
    idx = torch.randint(1, 20, (2, 16), generator=torch.Generator().manual_seed(0))
    models = []
    for dropout in (0.0, 0.3):
        torch.manual_seed(0)
        models.append(build_model("gpt", 20, {"num_layers": 2, "model_dim": 32, "dropout": dropout}))
    plain, dropped = models
    with torch.no_grad():
        for model in models:  # what writes to the residual stream and the head start at zero
            for p in model.parameters():
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.1)
    assert torch.equal(plain.eval().logits(idx), dropped.eval().logits(idx))
    dropped.train()
    draws = torch.stack([dropped.gpt.embed1(idx) for _ in range(400)])
    kept = (draws != 0).float().mean()
    assert abs(float(kept) - 0.7) < 0.01
    assert torch.allclose(draws.mean(0), plain.gpt.embed1(idx), atol=0.08), "what is kept is scaled up"
    assert not torch.equal(dropped.logits(idx), dropped.logits(idx))
    with pytest.raises(LabError, match=r"--dropout=1\.0: at least 0 and below 1"):
        build_model("gpt", 20, {"dropout": 1.0})
