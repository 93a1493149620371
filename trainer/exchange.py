"""How gradients and weights travel between processes, while other work runs.

`--communication=plain` sums every gradient over all processes, after the backward pass, and every process updates
everything. Here instead (the sharding is ZeRO's: Rajbhandari et al. 2020, arXiv:1910.02054; whole matrices as shards
are the speedrun's, so that orthogonalisation needs no communication of its own):

- a block's matrix has one owner. When the backward pass of a step's last sequence has produced its gradient, that is
  summed to the owner (`reduce`, asynchronously); over all matrices this is a reduce-scatter whose shards are matrices.
  The owner alone orthogonalises and updates; then the new weights go to everyone (`broadcast`, asynchronously), while
  the other parameters are updated and the next batch is fetched. They are awaited when the next step or validation
  begins. Owners are balanced by the work of orthogonalisation.
- an embedding table's gradient is zero but for the tokens of the batch. Only the rows that the batch touched on any
  process are packed, summed and put back, so the result is exactly that of the whole table. Which rows these are is
  worked out on the host, from the tokens, before the backward pass: the GPU never waits for it. Every process updates
  the whole table: Adam moves the untouched rows too, and sending all of them would cost more than computing them.
- the head is summed by reduce-scatter over its rows, each process updates its rows, and all-gather brings them
  together; the few scalars are summed by everyone.

Sums are taken in the gradient's own dtype, as in the plain way. A compiled backward pass hands over all gradients at
its end, so under torch.compile the exchange overlaps with the optimizer, not with the backward pass itself.

Bytes a step and process (`bytes_per_step`), for G bytes of gradients: plain, a ring all-reduce, sends 2 G (W-1)/W.
Here matrices and head send G (W-1)/W each way, the same in all, half of it behind the optimizer; the tables send
touched/V of what they did.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn


def owners(matrices: Mapping[str, Tensor], world_size: int) -> dict[str, int]:
    """The rank that updates each parameter of (..., M, N) matrices: greedily, the costliest first, to the rank with the
    least work so far. The work of a Newton-Schulz step is about 2 m^2 n + m^3 a matrix, m its shorter side."""

    def work(p: Tensor) -> float:
        m, n = sorted(p.shape[-2:])
        return p[..., 0, 0].numel() * (4 * m * m * n + 2 * m**3)

    load, owner = [0.0] * world_size, {}
    for name in sorted(matrices, key=lambda name: (-work(matrices[name]), name)):
        rank = min(range(world_size), key=lambda r: (load[r], r))
        owner[name] = rank
        load[rank] += work(matrices[name])
    return {name: owner[name] for name in matrices}


def touched_rows(tokens: list[Tensor], vocab_size: int) -> Tensor:
    """int64 (U,) on the host: the token ids that occur on any process, ascending. Collective, over host memory."""
    seen = torch.zeros(vocab_size, dtype=torch.uint8)
    for part in tokens:
        seen[part.to("cpu", torch.int64)] = 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(seen, dist.ReduceOp.MAX)
    return seen.nonzero().flatten()


class PlainExchange:
    """The plain way behind the methods of `GradientExchange`: all gradients are summed over all processes after the
    backward pass, and everyone updates everything. One process sends nothing."""

    head_rows = slice(None)

    def __init__(
        self,
        matrices: Mapping[str, nn.Parameter],
        tables: Mapping[str, nn.Parameter],
        head: nn.Parameter | None,
        others: list[nn.Parameter],
    ):
        self.mine = list(matrices)
        self.parameters = [p for p in (*matrices.values(), *tables.values(), head, *others) if p is not None]

    def wait_gradients(self) -> None:
        """After the last backward pass: all gradients are sums."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            for work in [dist.all_reduce(p.grad, async_op=True) for p in self.parameters]:
                work.wait()

    def begin(self, tokens: list[Tensor]) -> None:
        """Nothing to do: no gradient leaves early, no weight is somewhere else."""

    arm = publish_matrices = publish_head = wait_weights = lambda self: None

    def gather_state(self, state: Mapping[str, list[Tensor]], head_state: list[Tensor]) -> None:
        """Nothing to do: everyone has all of the optimizer's state."""


class GradientExchange:
    """The way of a model's gradients and weights between processes. All ranks call its methods in the same order.

    Args:
        matrices: parameters that one rank each updates, by name.
        tables: embedding weights, by name.
        head: a parameter that is sharded by rows where the world size divides them, or None.
        others: small parameters that everyone updates.

    One step: `begin(tokens)`, all backward passes but the last, `arm()`, the last one, `wait_gradients()`; then the
    owners update what `owner` and `head_rows` give them, `publish_matrices()` and `publish_head()`, and before weights
    are read, `wait_weights()`.
    """

    def __init__(
        self,
        matrices: Mapping[str, nn.Parameter],
        tables: Mapping[str, nn.Parameter],
        head: nn.Parameter | None,
        others: list[nn.Parameter],
    ):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.matrices, self.tables, self.others = dict(matrices), dict(tables), list(others)
        self.owner = owners(matrices, self.world_size)
        self.head = head if head is not None and head.size(0) % self.world_size == 0 else None
        if head is not None and self.head is None:
            self.others.append(head)
        self.rows: Tensor | None = None
        self.packed: dict[str, Tensor] = {}
        self.head_shard: Tensor | None = None
        self.armed = False
        self.pending: list = []
        self.publishing: list = []
        starts = {id(p): partial(self._reduce, name) for name, p in self.matrices.items()}
        starts |= {id(p): partial(self._pack, name) for name, p in self.tables.items()}
        starts |= {id(p): self._sum for p in self.others}
        if self.head is not None:
            starts[id(self.head)] = self._scatter
        self._starts = starts
        for p in (*self.matrices.values(), *self.tables.values(), *self.others, self.head):
            if p is not None:
                p.register_post_accumulate_grad_hook(self._ready)

    def _ready(self, p: nn.Parameter) -> None:
        """Called by autograd when the gradient of `p` is complete for this backward pass."""
        if self.armed:
            self._starts[id(p)](p)

    @property
    def mine(self) -> list[str]:
        """Names of the matrices that this rank updates."""
        return [name for name, owner in self.owner.items() if owner == self.rank]

    @property
    def head_rows(self) -> slice:
        """The rows of the head that this rank updates: all of them if the head is not sharded."""
        if self.head is None:
            return slice(None)
        share = self.head.size(0) // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def begin(self, tokens: list[Tensor]) -> None:
        """At the start of a step, with all of this process's input tokens of it."""
        if self.tables:
            table = next(iter(self.tables.values()))
            self.rows = touched_rows(tokens, table.size(0)).to(table.device, non_blocking=True)

    def arm(self) -> None:
        """Before the last backward pass of the step: from here gradients leave as they come."""
        self.armed = True

    def _reduce(self, name: str, p: nn.Parameter) -> None:
        self.pending.append(dist.reduce(p.grad, self.owner[name], async_op=True))

    def _pack(self, name: str, p: nn.Parameter) -> None:
        self.packed[name] = p.grad.index_select(0, self.rows)
        self.pending.append(dist.all_reduce(self.packed[name], async_op=True))

    def _sum(self, p: nn.Parameter) -> None:
        self.pending.append(dist.all_reduce(p.grad, async_op=True))

    def _scatter(self, p: nn.Parameter) -> None:
        self.head_shard = torch.empty_like(p[self.head_rows])
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # torch 2.13 renamed it
        self.pending.append(scatter(self.head_shard, p.grad, async_op=True))

    def wait_gradients(self) -> None:
        """After the last backward pass: gradients of owned matrices, tables, own head rows and others are sums."""
        self.armed = False
        for work in self.pending:
            work.wait()
        self.pending.clear()
        for name, part in self.packed.items():
            self.tables[name].grad.index_copy_(0, self.rows, part)
        self.packed.clear()
        if self.head is not None:
            self.head.grad[self.head_rows] = self.head_shard
            self.head_shard = None

    def publish_matrices(self) -> None:
        """After the owners' updates: the new matrices set out for everyone."""
        for name, p in self.matrices.items():
            self.publishing.append(dist.broadcast(p.detach(), self.owner[name], async_op=True))

    def publish_head(self) -> None:
        """After the update of the head's rows: they set out for everyone."""
        if self.head is not None:
            rows = self.head.detach()[self.head_rows].clone()
            self.publishing.append(dist.all_gather_into_tensor(self.head.detach(), rows, async_op=True))

    def wait_weights(self) -> None:
        """Before weights are read: all of them are the new ones."""
        for work in self.publishing:
            work.wait()
        self.publishing.clear()

    def gather_state(self, state: Mapping[str, list[Tensor]], head_state: list[Tensor]) -> None:
        """Before a checkpoint: every rank's copy of the optimizer's state becomes the owner's, in place.

        state: name of a matrix -> its tensors. head_state: tensors of the head's shape."""
        for name, tensors in state.items():
            for tensor in tensors:
                dist.broadcast(tensor, self.owner[name])
        for tensor in head_state if self.head is not None else []:
            rows = tensor[self.head_rows].clone()
            dist.all_gather_into_tensor(tensor, rows)


def bytes_per_step(
    matrices: Mapping[str, Tensor], tables: Mapping[str, Tensor], head: Tensor, world_size: int, rows: int
) -> dict[str, dict[str, float]]:
    """Bytes that one process sends a step, by part: {"plain": {...}, "overlap": {...}}. `rows` tables' rows are
    touched. Rings are assumed: an all-reduce sends twice what a reduce-scatter or an all-gather does."""

    def size(tensors: Mapping[str, Tensor]) -> int:
        return sum(t.numel() * t.element_size() for t in tensors.values())

    once = (world_size - 1) / world_size
    share = rows / max(next(iter(tables.values())).size(0), 1) if tables else 0.0
    plain = dict(matrices=2 * once * size(matrices), tables=2 * once * size(tables), head=2 * once * size({"": head}))
    return dict(plain=plain, overlap=plain | dict(tables=plain["tables"] * share))
