"""Rung 5: recurrent models. The GRU (Cho et al. 2014) and the LSTM (Hochreiter and Schmidhuber 1997) are written out
here, in torch's layout and gate order, and equal torch's own given the same weights (tests/lab/test_lab_models.py).

GRU:  r, z = sigm(W x + U h), n = tanh(W_n x + b + r * (U_n h + c)), h <- (1 - z) n + z h

LSTM: i, f, o = sigm(W x + U h), g = tanh(W_g x + U_g h), c <- f c + i g, h <- o tanh(c)

The state is reset where a document opens, so that packed documents do not see each other.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from lab import LabError
from lab.models.base import MARK, LanguageModel
from trainer.options import setting

CELLS = {"gru": 3, "lstm": 4}  # gates a cell, each of H rows


class RecurrentLayer(nn.Module):
    """One GRU or LSTM layer over (B, T, E) -> (B, T, H), written out.

    Parameters are named and laid out as in torch.nn.GRU/LSTM (weight_ih_l0, ...), so its state dict loads here.
    """

    def __init__(self, cell: str, input_dim: int, hidden_dim: int):
        super().__init__()
        if cell not in CELLS:
            raise LabError(f"no recurrent cell named {cell!r}; choose one of {', '.join(CELLS)}")
        self.cell, self.hidden_dim = cell, hidden_dim
        rows, bound = CELLS[cell] * hidden_dim, hidden_dim**-0.5
        for name, shape in [
            ("weight_ih_l0", (rows, input_dim)),
            ("weight_hh_l0", (rows, hidden_dim)),
            ("bias_ih_l0", (rows,)),
            ("bias_hh_l0", (rows,)),
        ]:
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))

    def _gru(self, x_gates: Tensor, h: Tensor) -> Tensor:
        h_gates = nn.functional.linear(h, self.weight_hh_l0, self.bias_hh_l0)
        x_rz, x_n = x_gates.split([2 * self.hidden_dim, self.hidden_dim], -1)
        h_rz, h_n = h_gates.split([2 * self.hidden_dim, self.hidden_dim], -1)
        r, z = torch.sigmoid(x_rz + h_rz).chunk(2, -1)
        n = torch.tanh(x_n + r * h_n)
        return torch.lerp(n, h, z)

    def _lstm(self, x_gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, o = (x_gates + nn.functional.linear(h, self.weight_hh_l0, self.bias_hh_l0)).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c

    def forward(self, x_BTE: Tensor, opens_BT: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, H). Where `opens_BT` is true the state is zero before the token is read."""
        x_gates = nn.functional.linear(x_BTE, self.weight_ih_l0, self.bias_ih_l0).unbind(1)
        keep = None if opens_BT is None else (~opens_BT).to(x_BTE.dtype)[..., None].unbind(1)
        h = c = x_BTE.new_zeros(x_BTE.shape[0], self.hidden_dim)
        states = []
        for t, x_t in enumerate(x_gates):
            if keep is not None:
                h = h * keep[t]
                c = c * keep[t] if self.cell == "lstm" else c
            if self.cell == "gru":
                h = self._gru(x_t, h)
            else:
                h, c = self._lstm(x_t, h, c)
            states.append(h)
        return torch.stack(states, 1)


@dataclass(frozen=True)
class RecurrentFields:
    """Settings of the recurrent model."""

    cell: str = setting("gru", "name", "of the recurrent cell", choices=tuple(CELLS))
    embedding_dim: int = setting(32, "width", "of a token's vector", at_least=1, at_most=8192)
    hidden_dim: int = setting(128, "width", "of the state", at_least=1, at_most=65536)
    num_layers: int = setting(1, "layers", "on top of each other", at_least=1, at_most=100)
    dropout: float = setting(0.0, "fraction", "of states silenced in training, after every layer", at_least=0, below=1)


class Recurrent(LanguageModel):
    """Embedding, recurrent layers whose state restarts at every document, logits."""

    def __init__(self, vocab_size: int, fields: RecurrentFields):
        super().__init__()
        self.vocab_size, self.context = vocab_size, None
        self.embedding = nn.Embedding(vocab_size, fields.embedding_dim)
        widths = [fields.embedding_dim] + [fields.hidden_dim] * fields.num_layers
        self.layers = nn.ModuleList(RecurrentLayer(fields.cell, a, b) for a, b in pairwise(widths))
        self.dropout = nn.Dropout(fields.dropout)
        self.output = nn.Linear(fields.hidden_dim, vocab_size)
        with torch.no_grad():
            self.output.weight *= 0.1
            self.output.bias.zero_()

    def logits(self, idx_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        x, opens = self.embedding(idx_BT), idx_BT == MARK
        for layer in self.layers:
            x = self.dropout(layer(x, opens))
        return self.output(x)

    def token_embeddings(self) -> list[nn.Module]:
        return [self.embedding]

    def activations(self) -> list[tuple[str, nn.Module]]:
        return [(f"state {i + 1}", m) for i, m in enumerate(self.layers)]

    def readout(self, x_BTE: Tensor) -> Tensor | None:
        return self.output(x_BTE)
