"""Rung 3: the MLP with batch normalisation (Ioffe and Szegedy 2015), and a choice of initialisations to see
why it helps. BatchNorm1d is written out here and equals torch's in both modes (tests/lab/test_lab_models.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lab import LabError
from lab.models.base import LanguageModel, windows
from trainer.options import setting

INITS = ("normal", "uniform", "kaiming")


class BatchNorm1d(nn.Module):
    """Normalise every feature over all leading axes: (x - mean) / sqrt(var + eps) * gain + bias.

    In training the batch's own mean and (biased) variance are used and their running averages kept, the
    variance unbiased as in torch; in evaluation the running averages are used, so that one example suffices.
    Input (..., H), features last. `counted`: bool over the first axes of the input; places where it is false (padding)
    are normalised like the others, but are no part of mean and variance.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.eps, self.momentum = eps, momentum
        self.gain = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor, counted: Tensor | None = None) -> Tensor:
        if self.training:
            share_R = _shares(x, counted)
            # Sums over rows as products with a row vector: several times as fast as torch.var_mean down a column, and
            # without the copy of the counted rows, whose gradient would be a scatter.
            mean = share_R @ x.reshape(-1, x.shape[-1])
            centred = x - mean
            var = share_R @ centred.square().reshape(-1, x.shape[-1])
            with torch.no_grad():
                rows = (share_R > 0).sum()
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_((var * (rows / (rows - 1))).to(self.running_var.dtype), self.momentum)
        else:
            centred, var = x - self.running_mean, self.running_var
        return torch.addcmul(self.bias, centred, torch.rsqrt(var + self.eps) * self.gain)


def _shares(x: Tensor, counted: Tensor | None) -> Tensor:
    """What each row of `x` weighs in a mean over the counted ones, (R,): 1 over their number, or 0. LabError for a
    single one."""
    places = x[..., 0]
    if counted is None:
        counts_R = torch.ones_like(places).flatten()
    else:
        counts_R = counted.view(*counted.shape, *[1] * (places.ndim - counted.ndim)).expand_as(places).flatten()
    rows = int(counts_R.sum())
    if rows < 2:
        raise LabError("batch norm in training needs at least two rows: one has no variance")
    return counts_R.to(x.dtype) / rows


def init_linear_(weight_OI: Tensor, init: str, gain: float = 5 / 3) -> None:
    """Initialise a weight in place: `normal` standard normal (saturates tanh), `uniform` torch's own U(-1/sqrt(in),
    1/sqrt(in)), `kaiming` normal with std gain/sqrt(in), gain 5/3 for tanh (He et al. 2015)."""
    fan_in = weight_OI.shape[1]
    if init == "normal":
        nn.init.normal_(weight_OI)
    elif init == "uniform":
        nn.init.uniform_(weight_OI, -(fan_in**-0.5), fan_in**-0.5)
    elif init == "kaiming":
        nn.init.normal_(weight_OI, std=gain * fan_in**-0.5)
    else:
        raise LabError(f"no initialisation named {init!r}; choose one of {', '.join(INITS)}")


def through(layers: nn.Sequential, x: Tensor, counted_BT: Tensor | None) -> Tensor:
    """`layers(x)`, its norms told which places count."""
    for layer in layers:
        x = layer(x, counted_BT) if isinstance(layer, BatchNorm1d) else layer(x)
    return x


@dataclass(frozen=True)
class BatchNormFields:
    """Settings of the MLP with batch norm."""

    context: int = setting(4, "tokens", "read at every place", at_least=1, at_most=1024)
    embedding_dim: int = setting(16, "width", "of a token's vector", at_least=1, at_most=8192)
    hidden_dim: int = setting(256, "units", "tanh units a layer", at_least=1, at_most=65536)
    num_layers: int = setting(1, "layers", "hidden ones", at_least=1, at_most=100)
    init: str = setting("kaiming", "name", "how the weights are drawn", choices=INITS)
    batch_norm: bool = setting(True, "flag", "off: the same network without it, to compare")


class BatchNormMLP(LanguageModel):
    """Embeddings, then layers of linear (no bias: the norm would remove it), batch norm, tanh; then logits."""

    def __init__(self, vocab_size: int, fields: BatchNormFields):
        super().__init__()
        self.vocab_size, self.context = vocab_size, fields.context
        self.embedding = nn.Embedding(vocab_size, fields.embedding_dim)
        layers: list[nn.Module] = []
        width = fields.context * fields.embedding_dim
        for _ in range(fields.num_layers):
            linear = nn.Linear(width, fields.hidden_dim, bias=not fields.batch_norm)
            init_linear_(linear.weight, fields.init)
            norm = [BatchNorm1d(fields.hidden_dim)] if fields.batch_norm else []
            layers += [linear, *norm, nn.Tanh()]
            width = fields.hidden_dim
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(width, vocab_size)
        init_linear_(self.output.weight, fields.init, gain=1.0)
        nn.init.zeros_(self.output.bias)
        if fields.init == "kaiming":
            with torch.no_grad():
                self.output.weight *= 0.1  # less confident at first, so that the loss starts near ln V

    def logits(self, idx_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        e_BTNE = self.embedding(windows(idx_BT, self.context))
        return self.output(through(self.layers, e_BTNE.flatten(2), counted_BT))

    def token_embeddings(self) -> list[nn.Module]:
        return [self.embedding]

    def activations(self) -> list[tuple[str, nn.Module]]:
        tanhs = [m for m in self.layers if isinstance(m, nn.Tanh)]
        return [(f"tanh {i + 1}", m) for i, m in enumerate(tanhs)]

    def readout(self, x_BTE: Tensor) -> Tensor | None:
        return self.output(x_BTE)
