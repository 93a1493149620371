"""Rung 6: the GPT of train_gpt.py itself, at small sizes. Nothing of the model is written here: this file
names its settings, and gives it the ladder's interface and train_gpt.py's own optimizers.
"""

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

import train_gpt
from lab import LabError
from lab.models.base import MARK, LanguageModel


@dataclass(frozen=True)
class GPTFields:
    """Settings of the GPT: train_gpt.py's fields of the same names, with defaults for a page of text."""

    num_layers: int = 2  # blocks of attention and MLP
    model_dim: int = 64  # width of the residual stream
    num_heads: int = 2  # attention heads
    mlp_ratio: int = 4  # hidden width of the MLP over model_dim
    second_input_embedding: bool = True  # a second embedding table mixed into every layer
    value_embeddings: int = 1  # tables added to the values of the first and last so many layers
    unet_skips: str = ""  # "1>3": the output of layer 1 is added on entering layer 3
    window_max_tokens: int = 1024  # tokens that a layer with the long window sees
    growing_window: bool = False  # let the window grow during training
    soft_cap: str = "rsqrt"  # rsqrt, sigmoid or none
    dropout: float = 0.0  # share of an embedding and of what a block adds to the stream, silenced in training
    muon_lr: float = 0.025  # of the blocks' matrices
    muon_weight_decay: float = 0.01  # times the learning rate
    head_lr: float = 0.01  # of the output head
    embed_lr: float = 0.1  # of the embeddings
    scalar_lr: float = 0.015  # of the learned scalars


def gpt_config(vocab_size: int, fields: GPTFields, num_iterations: int = 1) -> train_gpt.Config:
    """train_gpt.py's configuration of a lab GPT: float32, every layer with the long window."""
    values = dataclasses.asdict(fields)
    values.pop("dropout")  # train_gpt.py has none: a run that sees each token once does not overfit
    values |= {
        "preset": "nano",
        "vocab_size": vocab_size,
        "eos_id": MARK,
        "num_iterations": num_iterations,
        "long_window_layers": ",".join(map(str, range(fields.num_layers))),
        "attention_free_layers": "",
        "dtype": "float32",
        "device": "cpu",
        "muon_momentum_warmup": min(300, num_iterations // 6),
        "train_seq_len": 1,
        "tokens_per_step": 1,
        "val_seq_len": 1,
        "val_tokens": 1,
    }
    try:
        return train_gpt.check_config(train_gpt.Config(**values))
    except train_gpt.UsageError as error:
        raise LabError(str(error)) from error


class GPTOptimizer:
    """train_gpt.py's Muon for the blocks' matrices and AdamW for the rest, on its own schedule."""

    def __init__(self, gpt: train_gpt.GPT, config: train_gpt.Config):
        named = dict(gpt.named_parameters())
        blocks = {n: p for n, p in named.items() if n.startswith("blocks.")}
        self.muon = train_gpt.Muon(blocks, config, gpt.impls["muon"])
        self.adam = train_gpt.AdamW({n: p for n, p in named.items() if n not in blocks}, config)

    def step(self, step: int) -> None:
        """One update from the gradients; `step` sets the learning rate."""
        self.adam.step(step)
        self.muon.step(step)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, live."""
        return self.muon.state() | self.adam.state()


class GPTRung(LanguageModel):
    """`train_gpt.GPT` behind the ladder's interface. `GPTRung.of(gpt)` wraps a model that exists already."""

    def __init__(self, vocab_size: int, fields: GPTFields):
        super().__init__()
        if not 0 <= fields.dropout < 1:
            raise LabError(f"dropout is {fields.dropout}; it is a share from 0 to below 1")
        self._adopt(train_gpt.GPT(gpt_config(vocab_size, fields)), fields)
        if fields.dropout:
            self._drop(fields.dropout)

    def _adopt(self, gpt: train_gpt.GPT, fields: GPTFields | None) -> None:
        self.gpt, self.fields = gpt, fields
        self.vocab_size, self.context = gpt.config.vocab_size, None

    def _drop(self, share: float) -> None:
        """Dropout (Srivastava et al. 2014) around modules that have none, by hooks on their outputs."""

        def of_embedding(table: nn.Module, _inputs: tuple, e_BTD: Tensor) -> Tensor | None:
            return nn.functional.dropout(e_BTD, share) if table.training else None  # None: as it is

        def of_update(block: nn.Module, inputs: tuple, x_BTD: Tensor) -> Tensor | None:
            return inputs[0] + nn.functional.dropout(x_BTD - inputs[0], share) if block.training else None

        for table in self.token_embeddings():
            table.register_forward_hook(of_embedding)
        for block in self.gpt.blocks:
            block.register_forward_hook(of_update)

    @classmethod
    def of(cls, gpt: train_gpt.GPT) -> "GPTRung":
        """The rung around a model of train_gpt.py, whatever its preset."""
        rung = cls.__new__(cls)
        nn.Module.__init__(rung)
        rung._adopt(gpt, None)
        return rung

    def logits(self, idx_BT: Tensor) -> Tensor:
        return self.gpt(idx_BT)

    def make_optimizer(self, num_iterations: int) -> GPTOptimizer:
        """train_gpt.py's optimizers for a run of `num_iterations` steps."""
        fields = self.fields or GPTFields()
        return GPTOptimizer(self.gpt, gpt_config(self.vocab_size, fields, num_iterations))

    def token_embeddings(self) -> list[nn.Module]:
        tables = (self.gpt.embed1, self.gpt.embed2, *self.gpt.value_embeds)
        return [table for table in tables if table is not None]

    def activations(self) -> list[tuple[str, nn.Module]]:
        return [(f"block {i}", block) for i, block in enumerate(self.gpt.blocks)]
