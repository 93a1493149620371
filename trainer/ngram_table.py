"""`ngram_rows`: a table so large that no process holds it all, whose rows pairs and triples of tokens pick (#360).

    n[t] = s[t] * (B[pair] + C[triple]),    s[t] = signs[(x[t-1] xor x[t]) mod 8192] of +-1

B is the first half of the table, C the second; rows are picked by `trainer.ngrams.NGramRows`, so that documents do not
see each other, and n is mixed into every layer as rows of the bigram table are (`bigram_rows`), together with them if
both are there. The signs (#299) keep two n-grams that share a row by accident from pulling it the same way.

No row is part of the autograd graph of the model: a sequence's rows are fetched before its forward pass, each once
however often it occurs, and their gradients go back to the process that holds them after its backward pass, where they
wait for the next update of Adam's. Only touched rows are sent, moved or even read. In place of Adam's two moments of a
row's width, one number a row:

    s <- mean of squares of the row's gradient,  v <- b2 v + (1 - b2) s,  p <- p - l g / (sqrt(v / (1 - b2^n)) + eps)

n counts the row's own updates: those whose gradient is not all zero. (Row-wise second moments: Gupta et al. 2014,
arXiv:1409.4690, for sums; Shazeer and Stern 2018, arXiv:1804.04235, for means.) Shapes: T time, D width, U different
rows of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.embedding import update_rows_
from trainer.adam import by_kind
from trainer.exchange import as_bytes
from trainer.ngrams import NGramRows
from trainer.options import UsageError
from trainer.processes import rank, world_size
from trainer.schedule import learning_rate_factor

SIGNS = 8192
NAME = "techniques.ngrams.weight"


class NGramTable(nn.Module):
    """This process's share of the table, and which rows tokens pick. Raises UsageError where they cannot be shared.

    Alone (a trained model that writes, say) it is the whole table, and a call looks rows up."""

    def __init__(self, config: Any, dtype: torch.dtype):
        super().__init__()
        c = config
        if c.ngram_rows % (2 * world_size()):
            raise UsageError(f"--ngram_rows={c.ngram_rows}: a multiple of twice the {world_size()} processes")
        half, given = c.ngram_rows // 2, (c.vocab_size, c.eos_id)
        self.pickers = NGramRows(2, half, *given), NGramRows(3, half, *given)
        self.share = c.ngram_rows // world_size()
        shape = self.share, c.model_dim
        self.weight = nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)
        self.signs: Tensor | None = None

    def picks(self, tokens: Tensor) -> Tensor:
        """Rows of the whole table, int64 (..., T, 2). tokens: (..., T)."""
        pairs, triples = (pick(tokens) for pick in self.pickers)
        return torch.stack([pairs, triples + self.pickers[0].rows], -1)

    def joined(self, tokens: Tensor, rows: Tensor) -> Tensor:
        """n of the docstring, (..., T, D), from both rows of each token, (..., T, 2, D)."""
        if self.signs is None or self.signs.device != rows.device:
            drawn = torch.randint(2, (SIGNS, rows.size(-1)), generator=torch.Generator().manual_seed(0))
            self.signs = (2 * drawn - 1).to(rows.device, torch.int8)
        before = F.pad(tokens[..., :-1], (1, 0))
        return rows.sum(-2) * self.signs[((before ^ tokens) % SIGNS).long()].to(rows.dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """n of tokens, from a table that is whole. Raises RuntimeError where it is not."""
        if self.share < sum(len(picker) for picker in self.pickers):
            raise RuntimeError("this process has a share of the n-gram table: RowExchange.fetch looks rows up")
        return self.joined(tokens, F.embedding(self.picks(tokens), self.weight))


def different(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(the different ones in order, int64 (U,), the place of each among them). On the host: a GPU never waits for how
    many there are."""
    return torch.unique(rows, return_inverse=True)


class NoRows:
    """In place of a `RowExchange` where there is no table."""

    cut: Mapping[str, int] = {}

    def fetch(self, tokens: Tensor) -> dict[str, Tensor]:
        return {}

    def collect(self) -> None: ...

    def forget(self) -> None: ...

    def step(self, step: int, norm: Any = None) -> None: ...

    def state(self) -> dict[str, Tensor]:
        return {}

    layout = state


class RowExchange(NoRows):
    """The way of a table's rows to the processes that need them and of their gradients back, and its optimizer.

    All processes call `fetch` and `collect` equally often. cut: {parameter: rows that each process has of it}, of what
    no process has whole."""

    def __init__(self, table: NGramTable, config: Any, device: torch.device):
        self.table, self.config, self.device = table, config, device
        kept = lambda: torch.zeros(table.share, dtype=torch.float32, device=device)  # noqa: E731
        self.second, self.count = kept(), kept()
        self.cut = {NAME: table.share} if world_size() > 1 else {}
        self.beta2 = by_kind(config.adam_betas, 2).get("ngrams", (0.0, config.adam_beta2))[1]
        self.lent: list[tuple[Tensor, Tensor, list[int], list[int]]] = []  # rows, and what `ask` said of them
        self.waiting: list[tuple[Tensor, Tensor]] = []  # this process's rows (on the host), gradients (U, D)

    def fetch(self, tokens: Tensor) -> dict[str, Tensor]:
        """What the model is told of a sequence's n-grams: {"ngrams": (1, T, D)}. tokens: (T,), on the host. Where
        gradients are taken, `collect` must follow."""
        tokens = torch.as_tensor(tokens).long()
        asked_U, places = different(self.table.picks(tokens))
        mine, going, coming = self.ask(asked_U)
        rows_UD = self._send(self.table.weight.detach()[self._there(mine)], going, coming)
        if torch.is_grad_enabled():
            rows_UD.requires_grad_()
            self.lent.append((rows_UD, mine, going, coming))
        rows = F.embedding(self._there(places), rows_UD)
        return {"ngrams": self.table.joined(self._there(tokens), rows)[None]}

    def ask(self, asked_U: Tensor) -> tuple[Tensor, list[int], list[int]]:
        """(places in this share of the rows that all processes ask of it, how many go to each process, how many come
        from each). Over host memory."""
        if world_size() == 1:
            return asked_U, [len(asked_U)], [len(asked_U)]
        coming = torch.bincount(asked_U // self.table.share, minlength=world_size())
        going = torch.empty_like(coming)
        dist.all_to_all_single(going, coming)
        theirs = torch.empty(int(going.sum()), dtype=torch.int64)
        dist.all_to_all_single(theirs, asked_U, going.tolist(), coming.tolist())
        return theirs - rank() * self.table.share, going.tolist(), coming.tolist()

    def _there(self, x: Tensor) -> Tensor:
        """On the device; torch keeps the page-locked copy until it has been read."""
        return (x.pin_memory() if self.device.type == "cuda" else x).to(self.device, non_blocking=True)

    def _send(self, rows_UD: Tensor, going: list[int], coming: list[int]) -> Tensor:
        """Rows to and from each process, as many as told, in the order of processes; as bytes."""
        if world_size() == 1:
            return rows_UD
        found = rows_UD.new_empty(sum(coming), rows_UD.size(1))
        as_rows = lambda x: as_bytes(x.contiguous()).view(len(x), -1) if len(x) else x.view(torch.uint8)  # noqa: E731
        dist.all_to_all_single(as_rows(found), as_rows(rows_UD), coming, going)
        return found

    def collect(self) -> None:
        """After a backward pass: the gradients of the rows that were fetched for it go to those who hold them."""
        for rows_UD, mine, going, coming in self.lent:
            self.waiting.append((mine, self._send(rows_UD.grad, coming, going)))
        self.lent = []

    def forget(self) -> None:
        """No gradient waits any longer."""
        self.lent, self.waiting = [], []

    @torch.no_grad()
    def step(self, step: int, norm: Any = None) -> None:
        """One update from all gradients that wait. norm: trainer.watch.GradientNorm, which hears of them."""
        if not self.waiting:
            return
        rows, places = (self._there(x) for x in different(torch.cat([mine for mine, _ in self.waiting])))
        grads = [grad for _, grad in self.waiting]
        self.forget()
        rate = self.config.ngram_lr * learning_rate_factor(step, self.config)
        state = self.table.weight.detach(), self.second, self.count
        how = dict(rate=rate, beta=self.beta2, eps=self.config.adam_eps)
        mean_U = update_rows_(*state, rows, torch.cat(grads) if len(grads) > 1 else grads[0], places, **how)
        if norm is not None:
            norm.own.append(mean_U.sum() * self.config.model_dim)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for checkpoints; live, not copies."""
        return {f"rows.second.{NAME}": self.second, f"rows.count.{NAME}": self.count}

    def layout(self) -> dict[str, Tensor]:
        """Shapes and types of all processes' shares together, as tensors without memory; the weights among them."""
        rows = self.config.ngram_rows
        named = self.state() | {f"model.{NAME}": self.table.weight.detach()}
        return {n: torch.empty(rows, *t.shape[1:], dtype=t.dtype, device="meta") for n, t in named.items()}
