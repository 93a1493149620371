"""Rung 2: the neural language model of Bengio, Ducharme, Vincent and Jauvin (2003), "A neural probabilistic
language model", JMLR 3. The last n tokens are looked up in one embedding table, concatenated, passed through
a tanh layer and mapped to logits: logits = W2 tanh(W1 [e(t-n+1) .. e(t)] + b1) + b2.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from lab.models.base import LanguageModel, windows
from trainer.options import setting


@dataclass(frozen=True)
class MLPFields:
    """Settings of the MLP."""

    context: int = setting(3, "tokens", "read at every place", at_least=1, at_most=1024)
    embedding_dim: int = setting(16, "width", "of a token's vector", at_least=1, at_most=8192)
    hidden_dim: int = setting(256, "units", "of the tanh layer", at_least=1, at_most=65536)
    output_scale: float = setting(
        0.1, "factor", "on the last layer's initial weights, so that training starts near ln V", at_least=0
    )


class MLP(LanguageModel):
    """Embeddings of a fixed context, one tanh layer, logits."""

    def __init__(self, vocab_size: int, fields: MLPFields):
        super().__init__()
        self.vocab_size, self.context = vocab_size, fields.context
        self.embedding = nn.Embedding(vocab_size, fields.embedding_dim)
        self.hidden = nn.Linear(fields.context * fields.embedding_dim, fields.hidden_dim)
        self.tanh = nn.Tanh()
        self.output = nn.Linear(fields.hidden_dim, vocab_size)
        fan_in = fields.context * fields.embedding_dim
        nn.init.normal_(self.hidden.weight, std=nn.init.calculate_gain("tanh") * fan_in**-0.5)
        nn.init.zeros_(self.hidden.bias)
        nn.init.normal_(self.output.weight, std=fields.output_scale * fields.hidden_dim**-0.5)
        nn.init.zeros_(self.output.bias)

    def logits(self, idx_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        e_BTNE = self.embedding(windows(idx_BT, self.context))
        return self.output(self.tanh(self.hidden(e_BTNE.flatten(2))))

    def token_embeddings(self) -> list[nn.Module]:
        return [self.embedding]

    def activations(self) -> list[tuple[str, nn.Module]]:
        return [("tanh", self.tanh)]

    def readout(self, x_BTE: Tensor) -> Tensor | None:
        return self.output(x_BTE)
