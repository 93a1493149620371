"""Rung 6: the GPT of train_gpt.py itself, at small sizes. Nothing of the model is written here: this file
names its settings, and gives it the ladder's interface and train_gpt.py's own optimizers.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

import train_gpt
from lab import LabError
from lab.models.base import MARK, LanguageModel
from trainer.options import setting


@dataclass(frozen=True)
class GPTFields:
    """Settings of the GPT: train_gpt.py's fields of the same names, with defaults for a page of text."""

    num_layers: int = setting(2, "layers", "blocks of attention and MLP", at_least=1, at_most=100)
    model_dim: int = setting(64, "width", "of the residual stream", at_least=4, at_most=8192)
    num_heads: int = setting(2, "heads", "of attention", at_least=1, at_most=256)
    mlp_ratio: int = setting(4, "ratio", "hidden width of the MLP over model_dim", at_least=1, at_most=64)
    second_input_embedding: bool = setting(True, "flag", "a second embedding table mixed into every layer")
    value_embeddings: int = setting(
        1, "tables", "added to the values of the first and last so many layers", at_least=0, at_most=50
    )
    unet_skips: str = setting("", "layers", "1>3: the output of layer 1 is added on entering layer 3")
    window_max_tokens: int = setting(1024, "tokens", "that a layer with the long window sees", at_least=1)
    growing_window: bool = setting(False, "flag", "let the window grow during training")
    soft_cap: str = setting("rsqrt", "name", "on the head's logits", choices=("rsqrt", "sigmoid", "none"))
    dropout: float = setting(
        0.0, "fraction", "of an embedding and of a block's update silenced in training", at_least=0, below=1
    )
    muon_lr: float = setting(0.025, "rate", "of the blocks' matrices", at_least=0)
    muon_weight_decay: float = setting(0.01, "rate", "times the learning rate", at_least=0)
    head_lr: float = setting(0.01, "rate", "of the output head", at_least=0)
    embed_lr: float = setting(0.1, "rate", "of the embeddings", at_least=0)
    scalar_lr: float = setting(0.015, "rate", "of the learned scalars", at_least=0)


def gpt_config(vocab_size: int, fields: GPTFields, num_iterations: int = 1) -> train_gpt.Config:
    """train_gpt.py's configuration of a lab GPT: float32, every layer with the long window."""
    values = dataclasses.asdict(fields)
    values.pop("dropout")  # train_gpt.py has none: a run that sees each token once does not overfit
    values |= {
        "preset": "nano-plain",
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

    residual = True

    def __init__(self, vocab_size: int, fields: GPTFields):
        super().__init__()
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

    def logits(self, idx_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        return self.gpt(idx_BT)

    def make_optimizer(self, num_iterations: int) -> GPTOptimizer:
        """train_gpt.py's optimizers for a run of `num_iterations` steps."""
        fields = self.fields or GPTFields()
        return GPTOptimizer(self.gpt, gpt_config(self.vocab_size, fields, num_iterations))

    def token_embeddings(self) -> list[nn.Module]:
        techniques = self.gpt.techniques
        bigram = None if techniques is None else techniques.bigram_embed
        tables = (self.gpt.embed1, self.gpt.embed2, *self.gpt.value_embeds, bigram)
        return [table for table in tables if table is not None]

    def rows_of_several_tokens(self) -> dict[str, int]:
        c, gpt = self.gpt.config, self.gpt
        found = {
            "second embedding": c.second_embedding_context if gpt.embed2 is not None else 1,
            "value embeddings": c.value_embedding_context if len(gpt.value_embeds) else 1,
            "bigram table": 2 if c.bigram_rows else 1,
            "n-gram table": 3 if c.ngram_rows else 1,
        }
        return {table: count for table, count in found.items() if count > 1}

    def activations(self) -> list[tuple[str, nn.Module]]:
        if self.gpt.techniques is not None:  # a pass of its own, in which no block is called as a module
            return []
        return [(f"block {i}", block) for i, block in enumerate(self.gpt.blocks)]

    def readout(self, x_BTE: Tensor) -> Tensor | None:
        cap = None if self.gpt.config.soft_cap == "none" else self.gpt.config.soft_cap
        logits = train_gpt.softcapped_logits(train_gpt.norm(x_BTE).flatten(0, 1), self.gpt.head_w, softcap=cap)
        return logits[:, : self.vocab_size].view(*x_BTE.shape[:2], -1)

    def scalars(self) -> dict[str, dict[int, float]]:
        """The learned scalars by kind, {layer: number} of the layers in which they take part: how much of the stream
        and of each embedding enters a layer, of the value and of its embedding, and the weight of a skip that ends
        there; of models with techniques those of trainer/techniques.py too."""
        gpt, c = self.gpt, self.gpt.config
        own = {kind: numbers.detach().float() for kind, numbers in gpt.scalars_by_kind().items()}
        layers, tables = range(c.num_layers), c.value_embeddings
        attending = [i for i in layers if gpt.blocks[i].has_attention]
        tabled = [i for i in attending if i < tables or i >= c.num_layers - tables]
        mixes = gpt.techniques.mixes if c.mix_lr else own["mixes"][:, 1:]
        kinds = {"stream": _of(layers, own["mixes"][:, 0]), "first embedding": _of(layers, mixes[:, 0])}
        if c.second_input_embedding:
            kinds["second embedding"] = _of(layers, mixes[:, 1])
        first, second = own["values"].T
        if c.output_scalar:
            kinds |= {"attention's input": _of(attending, first), "attention's output": _of(attending, second)}
        elif tables:
            kinds["value"] = _of(attending, first)
            if not c.value_gates:
                kinds["value embedding"] = _of(tabled, second)
        if gpt.skips and c.skip_gates:
            kinds["skip, before its gate"] = dict(zip(gpt.skips, (2 * own["skips"].sigmoid()).tolist()))
        elif gpt.skips:
            kinds["skip"] = _of(sorted(gpt.skips), own["skips"])
        if c.bigram_rows or c.ngram_rows:
            kinds["bigram table"] = _of(layers, gpt.techniques.bigram_mixes)
        if c.backout_layer >= 0:
            kinds["backout"] = {c.backout_layer: float(own["backout"])}
        return kinds | ({"smear": {0: float(own["smear"])}} if c.smear else {})


def _of(layers: Iterable[int], numbers_L: Tensor) -> dict[int, float]:
    numbers = numbers_L.tolist()
    return {layer: numbers[layer] for layer in layers}
