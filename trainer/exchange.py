"""How gradients and weights travel between processes, while other work runs.

`--communication=plain` sums every gradient over all processes, after the backward pass, and every process updates
everything. Here instead (the sharding is ZeRO's: Rajbhandari et al. 2020, arXiv:1910.02054; whole matrices as shards
are the speedrun's, so that orthogonalisation needs no communication of its own) a step sends one message a kind:

- the head is summed by one reduce-scatter over its rows; each process updates its rows, and one all-gather brings them
  together.
- a block's matrix has one owner, and owners are balanced by the work of orthogonalisation. Matrices whose gradients
  come one after the other, a third of all at a time, are laid out owner by owner and summed by one reduce-scatter. The
  owner alone orthogonalises, updates, and holds momentum and mantissas; then one all-gather brings the new weights to
  everyone, while the other parameters are updated and the next batch is fetched. It is awaited when the next step or
  validation begins.
- an embedding table's gradient is zero but for the rows of the batch. Only the rows that the batch touched on any
  process are packed, side by side for all tables whose rows are picked alike (by the token, or by a hash of several),
  summed and put back, so the result is exactly that of the whole tables. Which rows these are is worked out on the
  host, from the tokens, before the backward pass: the GPU never waits for it. Untouched rows fill them up to a
  multiple, so that sizes repeat from step to step. Every process updates the whole table: Adam moves the untouched
  rows too, and sending all of them would cost more than computing them.
- the few scalars are summed by everyone.

Sums are taken in the gradient's own dtype, as in the plain way. The backward pass of a step's last sequence makes the
head's gradient first and the first layer's late. A compiled one hands over all at its end, but an operator within it
(trainer/leaving.py) tells of the head's and of each third of the matrices' when they are there, and their messages run
beside the rest of it. Where several sequences add up, where nothing tells, and for all else, hooks on the parameters
send what has not left, in this order. What a step still waits for: docs/rehearsal.md.

Only float types and bytes are sent: the collectives of NCCL and gloo know no 16-bit integers.

Bytes a step and process (`bytes_per_step`), for G bytes of gradients: plain, a ring all-reduce, sends 2 G (W-1)/W.
Here matrices and head send G (W-1)/W each way, the same in all, half of it behind the optimizer; the tables send
touched/V of what they did.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.embedding import packed_rows, put_rows_
from trainer.leaving import listen

ROWS_MULTIPLE = 1024  # packed rows of tables: about 30 sizes in all for 32,000 touched rows


THIRDS = 3  # groups of matrices that leave together


def _layer(name: str) -> int:
    """Of a parameter of a block; -1 of others."""
    words = name.split(".")
    return int(words[1]) if words[0] == "blocks" else -1


def in_groups(matrices: Iterable[str], world_size: int) -> list[list[str]]:
    """The names in the order in which a backward pass makes their gradients, last layer first, cut into at most
    `THIRDS` groups of a multiple of the processes each, but for the last."""
    names = sorted(matrices, key=lambda name: (-_layer(name), name))
    size = max(1, -(-len(names) // THIRDS // world_size)) * world_size
    return [names[start : start + size] for start in range(0, len(names), size)]


def owners(matrices: Mapping[str, Tensor], world_size: int) -> dict[str, int]:
    """The rank that updates each parameter of (..., M, N) matrices: group by group (`in_groups`), so that every rank
    has as many of each, and greedily, the costliest first, to the rank with the least work so far. The work of a
    Newton-Schulz step is about 2 m^2 n + m^3 a matrix, m its shorter side."""

    def work(p: Tensor) -> float:
        m, n = sorted(p.shape[-2:])
        return p[..., 0, 0].numel() * (4 * m * m * n + 2 * m**3)

    load, owner = [0.0] * world_size, {}
    for names in in_groups(matrices, world_size):
        most, has = -(-len(names) // world_size), [0] * world_size
        for name in sorted(names, key=lambda name: (-work(matrices[name]), name)):
            rank = min((r for r in range(world_size) if has[r] < most), key=lambda r: (load[r], r))
            owner[name] = rank
            load[rank] += work(matrices[name])
            has[rank] += 1
    return {name: owner[name] for name in matrices}


def touched_rows(picked: Iterable[Tensor], rows: int, multiple: int = 1) -> Tensor:
    """int64 (U,) on the host: the rows of a table of `rows` that are picked on any process, and as many others as make
    U a multiple of `multiple` (or all of them). Collective, over host memory; the same on every process."""
    seen = torch.zeros(rows, dtype=torch.uint8)
    for part in picked:
        seen[part.to("cpu", torch.int64)] = 1
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(seen, dist.ReduceOp.MAX)
    touched, others = seen.nonzero().flatten(), (seen == 0).nonzero().flatten()
    return torch.cat([touched, others[: -len(touched) % multiple]])


def as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a contiguous tensor as uint8 (N,), which every backend can send."""
    return tensor.detach().view(-1).view(torch.uint8)


def send_whole(tensor: Tensor | None, like: Tensor, source: int, target: int) -> Tensor | None:
    """Move a tensor between two ranks through host memory: on `target`, what `tensor` is on `source`; None elsewhere.

    like: a tensor (of the meta device, say) that tells shape and dtype. Only the two ranks take part."""
    rank = dist.get_rank()
    if rank == source and tensor is not None:
        host = tensor.detach().to("cpu").contiguous()
        if source == target:
            return host
        dist.send(as_bytes(host), target)
    elif rank == target:
        host = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        dist.recv(as_bytes(host), source)
        return host
    return None


class _Shards:
    """Where matrices lie in one flat tensor: owner by owner, `size` elements each, the longest owner's share."""

    def __init__(self, matrices: Mapping[str, Tensor], owner: Mapping[str, int], world_size: int):
        self.places: dict[str, tuple[int, torch.Size]] = {}
        self.filled = [0] * world_size
        self.owner = owner
        for name, p in matrices.items():
            self.places[name] = (self.filled[owner[name]], p.shape)
            self.filled[owner[name]] += -(-p.numel() // 8) * 8  # starts on 16 bytes whatever the dtype
        self.size = max(self.filled)

    def views(self, flat: Tensor, names: Iterable[str], one_owner: bool = False) -> list[Tensor]:
        """The matrices of those names in `flat`: all shards, or only the one of their owner."""
        found = []
        for name in names:
            start, shape = self.places[name]
            start += 0 if one_owner else self.owner[name] * self.size
            found.append(flat[start : start + shape.numel()].view(shape))
        return found


RowPicker = Callable[[Tensor], Tensor]  # tokens (T,) on the host -> the rows of a table that they pick, (T,)
_Sent = list[tuple[Any, Tensor | None]]  # messages under way, and what they bring
_Group = tuple[RowPicker, torch.Size, bool]  # what tables that travel together have in common; whether they may wait


def _the_token(tokens: Tensor) -> Tensor:
    return tokens


class PlainExchange:
    """The plain way behind the methods of `GradientExchange`: all gradients are summed over all processes after the
    backward pass, and everyone updates everything. One process sends nothing."""

    def __init__(
        self,
        matrices: Mapping[str, nn.Parameter],
        tables: Mapping[str, nn.Parameter],
        head: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        picks: Mapping[str, RowPicker] | None = None,
        slow: Collection[str] = (),
    ):
        self.my_matrices = dict(matrices)
        self.my_others = {**tables, **head, **others}
        self.sends_others, self.sends_slow, self.slow = True, True, slow
        self.early: dict[str, Any] = {}
        self.cut: Mapping[str, int] = {}
        self.pending: list[Any] = []

    def begin(self, tokens: list[Tensor], others: bool = True, slow: bool = True) -> None:
        """No gradient leaves early, no weight is somewhere else; the flags as in `GradientExchange.begin`."""
        self.sends_others, self.sends_slow = others, slow

    def arm(self) -> None:
        """Nothing to do."""

    def wait_matrices(self) -> None:
        """After the last backward pass: gradients of matrices are sums, and the others are on their way."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            matrices = [dist.all_reduce(p.grad, async_op=True) for p in self.my_matrices.values()]
            others = self.my_others.items() if self.sends_others else ()
            sent = [p for name, p in others if self.sends_slow or name not in self.slow]
            self.pending = [dist.all_reduce(p.grad, async_op=True) for p in sent]
            for work in matrices:
                work.wait()

    def wait_others(self) -> None:
        """All gradients are sums."""
        for work in self.pending:
            work.wait()
        self.pending = []

    publish_matrices = publish_head = wait_weights = arm

    def owner_of(self, parameter: str) -> int | None:
        """The rank that alone holds the optimizer's state of a parameter; None: everyone does."""
        return None

    def rows_of(self, parameter: str) -> int | None:
        """Rows of a parameter's state that each rank holds, rank by rank; None: all of them."""
        return None

    def whole(self, parameter: str, held: Tensor) -> Tensor:
        """All rows of something of which each rank holds its rows of a parameter. Collective."""
        return held


class GradientExchange:
    """The way of a model's gradients and weights between processes. All ranks call its methods in the same order.

    Args:
        matrices: parameters that one rank each updates, all of one dtype, by name.
        tables: embedding weights of one dtype, by name.
        head: at most one parameter, sharded by rows where the world size divides them, by name.
        others: small parameters that everyone updates, by name.
        picks: how tokens pick a table's rows, by its name; tables with equal pickers and shapes travel together. A
            table without one has a row a token.
        slow: tables that may wait while others are sent.

    `early`: what the model's choices are to have beside them, so that it tells of gradients that are made
    (trainer/leaving.py).
    `my_matrices` and `my_others` are what this rank updates, by name, with gradients where those have been awaited.
    One step: `begin(tokens)`, all backward passes but the last, `arm()`, the last one; `wait_matrices()`, their update,
    `publish_matrices()`; `wait_others()`, their update, `publish_head()`; and before weights are read,
    `wait_weights()`. A step that began with `others=False` ends with `publish_matrices()`: the gradients of all else
    stay where they are, and leave with those of the next steps, to which they have been added.
    """

    def __init__(
        self,
        matrices: Mapping[str, nn.Parameter],
        tables: Mapping[str, nn.Parameter],
        head: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        picks: Mapping[str, RowPicker] | None = None,
        slow: Collection[str] = (),
    ):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        divides = all(p.size(0) % self.world_size == 0 for p in head.values())
        self.matrices, self.tables = dict(matrices), dict(tables)
        self.head = dict(head) if divides else {}
        self.others = dict(others) if divides else {**others, **head}
        self.owner = owners(matrices, self.world_size)
        self.shards = _Shards(matrices, self.owner, self.world_size)
        self.my_matrices = {n: p for n, p in matrices.items() if self.owner[n] == self.rank}
        parts = {n: nn.Parameter(p.detach()[self._rows(p)]) for n, p in self.head.items()}  # views, not copies
        self.my_others = {**self.tables, **parts, **self.others}
        self.groups: dict[_Group, list[nn.Parameter]] = {}  # of tables, in the order of names
        for name, p in self.tables.items():
            self.groups.setdefault(((picks or {}).get(name, _the_token), p.shape, name in slow), []).append(p)
        self.tokens: dict[_Group, list[Tensor]] = {group: [] for group in self.groups}  # since it was last sent
        self.going: list[tuple[list[nn.Parameter], Tensor]] = []  # tables, and the rows that those tokens touched
        self.sends_others = True
        self.cut: Mapping[str, int] = {}
        # Messages in the order in which they leave, if nothing lets them leave sooner: who sends them, and of what.
        thirds = [{n: matrices[n] for n in names} for names in in_groups(matrices, self.world_size)]
        self.thirds = [(third, _Shards(third, self.owner, self.world_size)) for third in thirds]
        self.kinds: list[tuple[str, Callable[[int, list[Tensor]], _Sent], dict[str, nn.Parameter]]] = [
            ("head", self._scatter_head, self.head),
            *(("matrices", self._reduce_matrices, third) for third in thirds),
            ("tables", self._sum_tables, self.tables),
            ("others", self._sum_others, self.others),
        ]
        names = tuple(tuple(parameters) for _, _, parameters in self.kinds[: 1 + len(thirds)])
        self.early: dict[str, Any] = dict(early=listen(self, names))
        self.missing: dict[int, int] = {}  # of a message, the parameters still without gradient
        self.pending: dict[int, _Sent] = {}
        self.publishing: _Sent = []
        for number, (_, _, parameters) in enumerate(self.kinds):
            for p in parameters.values():
                p.register_post_accumulate_grad_hook(lambda p, number=number: self._ready(number))

    def _rows(self, p: Tensor) -> slice:
        share = p.size(0) // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def begin(self, tokens: list[Tensor], others: bool = True, slow: bool = True) -> None:
        """At the start of a step, with all of this process's input tokens of it. `others`: whether anything but
        matrices is sent and updated in this step; `slow`: whether slow tables are among it."""
        self.sends_others, self.going = others, []
        for group, tables in self.groups.items():
            self.tokens[group] += tokens
            pick, shape, waits = group
            if not others or (waits and not slow):
                continue
            rows = touched_rows([pick(part) for part in self.tokens[group]], shape[0], ROWS_MULTIPLE)
            self.tokens[group] = []
            if tables[0].is_cuda:
                rows = rows.pin_memory()  # torch keeps it until the copy has been made
            self.going.append((tables, rows.to(tables[0].device, non_blocking=True)))

    def arm(self) -> None:
        """Before the last backward pass of the step: from here gradients leave as soon as their message is complete."""
        kinds = [n for n, (kind, _, _) in enumerate(self.kinds) if self.sends_others or kind == "matrices"]
        self.missing = {number: len(self.kinds[number][2]) for number in kinds}
        self.pending = {}

    def leave(self, group: int, gradients: list[Tensor]) -> None:
        """Called by the backward pass as soon as it has made a message's gradients (trainer/leaving.py)."""
        _, send, parameters = self.kinds[group]
        alone = all(p.grad is None for p in parameters.values())  # nothing that these are yet to be added to
        if group in self.missing and alone:
            self.pending[group] = send(group, gradients)

    def _ready(self, number: int) -> None:
        """Called by autograd when a gradient is complete for this backward pass."""
        if number not in self.missing:
            return
        self.missing[number] -= 1
        for complete, left in self.missing.items():  # a message that is complete waits for those before it
            if left:
                return
            if complete not in self.pending:
                _, send, parameters = self.kinds[complete]
                self.pending[complete] = send(complete, [p.grad for p in parameters.values()])

    def _reduce_matrices(self, group: int, gradients: list[Tensor]) -> _Sent:
        third, shards = self.thirds[group - 1]
        flat = gradients[0].new_empty(self.world_size * shards.size)  # what lies between the matrices is not read
        _copy(shards.views(flat, third), gradients)
        mine = torch.empty_like(flat[: shards.size])
        return [(_reduce_scatter(mine, flat), mine)]

    def _scatter_head(self, _: int, gradients: list[Tensor]) -> _Sent:
        found: _Sent = []
        for gradient in gradients:
            mine = torch.empty_like(gradient[self._rows(gradient)])
            found.append((_reduce_scatter(mine, gradient), mine))
        return found

    def _sum_tables(self, *_: Any) -> _Sent:
        found: _Sent = []
        for tables, rows in self.going:
            packed = packed_rows([p.grad for p in tables], rows)
            found.append((dist.all_reduce(packed, async_op=True), packed))
        return found

    def _sum_others(self, _: int, gradients: list[Tensor]) -> _Sent:
        return [(dist.all_reduce(gradient, async_op=True), None) for gradient in gradients]

    def _arrived(self, number: int) -> list[Any]:
        """What came with a message, once it is there: a tensor, several, or None where gradients came in place. One
        without parameters has none."""
        found = []
        for work, tensor in self.pending.pop(number, []):
            work.wait()
            found.append(tensor)
        return found

    def wait_matrices(self) -> None:
        """After the last backward pass: gradients of this rank's matrices are sums."""
        if any(self.missing.values()):
            left = {self.kinds[number][0]: left for number, left in self.missing.items() if left}
            raise RuntimeError(f"the backward pass left parameters without gradient, by kind: {left}")
        self.missing = {}
        for number, (third, shards) in enumerate(self.thirds, 1):
            mine = [name for name in third if name in self.my_matrices]
            for shard in self._arrived(number):
                for name, gradient in zip(mine, shards.views(shard, mine, one_owner=True)):
                    self.my_matrices[name].grad = gradient

    def wait_others(self) -> None:
        """Gradients of tables, of this rank's rows of the head and of the others are sums."""
        head, *_, of_tables, others = range(len(self.kinds))
        for (name, _), shard in zip(self.head.items(), self._arrived(head)):
            self.my_others[name].grad = shard
        for packed, (tables, rows) in zip(self._arrived(of_tables), self.going):
            put_rows_([p.grad for p in tables], rows, packed)
        self._arrived(others)

    def publish_matrices(self) -> None:
        """After the owners' updates: the new matrices set out for everyone."""
        if self.matrices:
            weights = [p.detach() for p in self.my_matrices.values()]
            mine = next(iter(self.matrices.values())).detach().new_empty(self.shards.size)
            _copy(self.shards.views(mine, self.my_matrices, one_owner=True), weights)
            flat = mine.new_empty(self.world_size * self.shards.size)
            self.publishing.append((dist.all_gather_into_tensor(flat, mine, async_op=True), flat))

    def publish_head(self) -> None:
        """After the update of the head's rows: they set out for everyone."""
        for p in self.head.values():
            rows = p.detach()[self._rows(p)].clone()
            self.publishing.append((dist.all_gather_into_tensor(p.detach(), rows, async_op=True), None))

    def wait_weights(self) -> None:
        """Before weights are read: all of them are the new ones."""
        for work, flat in self.publishing:
            work.wait()
            if flat is not None:
                theirs = [n for n in self.matrices if n not in self.my_matrices]
                _copy([self.matrices[n].detach() for n in theirs], self.shards.views(flat, theirs))
        self.publishing.clear()

    def owner_of(self, parameter: str) -> int | None:
        """The rank that alone holds the optimizer's state of a parameter; None: everyone does."""
        return self.owner.get(parameter)

    def rows_of(self, parameter: str) -> int | None:
        """Rows of a parameter's state that each rank holds, rank by rank; None: all of them."""
        return self.head[parameter].size(0) // self.world_size if parameter in self.head else None

    def whole(self, parameter: str, held: Tensor) -> Tensor:
        """All rows of something of which each rank holds its rows of a parameter. Collective."""
        if parameter not in self.head:
            return held
        found = held.new_empty(self.head[parameter].shape)
        dist.all_gather_into_tensor(found, held)
        return found


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Many copies in few launches; a rank may own nothing."""
    if targets:
        torch._foreach_copy_(targets, sources)


def gather_state(
    exchange: PlainExchange | GradientExchange, state: Mapping[str, Tensor], layout: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """On rank 0 the whole of a state of which every rank holds its share; elsewhere nothing. Collective.

    state: this rank's tensors; layout: all of them, as tensors without memory. Keys are `model.<parameter>` or
    `<optimizer>.<what>.<parameter>`. Shares travel through host memory, so that no GPU must hold them all."""
    whole: dict[str, Tensor] = {}
    for key, like in layout.items():
        owner, rows = _holders(exchange, key, like)
        if owner is not None:
            found = send_whole(state.get(key), like, owner, 0)
        elif rows is not None:
            parts = [send_whole(state[key], like[:rows], source, 0) for source in range(like.size(0) // rows)]
            found = torch.cat(parts) if parts[0] is not None else None
        else:
            found = state[key] if _rank() == 0 else None
        if found is not None and _rank() == 0:
            whole[key] = found
    return whole


def spread_state(
    exchange: PlainExchange | GradientExchange,
    state: Mapping[str, Tensor],
    layout: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
) -> None:
    """Put rank 0's `whole` (of `gather_state`) in place in the `state` of every rank. Collective."""
    for key, like in layout.items():
        given = whole[key] if _rank() == 0 else None
        owner, rows = _holders(exchange, key, like)
        if owner is not None:
            found = send_whole(given, like, 0, owner)
        elif rows is not None:
            targets = range(like.size(0) // rows)
            cut = [None if given is None else given[rows * n : rows * (n + 1)] for n in targets]
            found = [send_whole(part, like[:rows], 0, n) for n, part in zip(targets, cut)][_rank()]
        else:
            found = given
        if found is not None:
            state[key].copy_(found)
        if owner is None and rows is None and dist.is_initialized():
            dist.broadcast(as_bytes(state[key]), 0)


def _holders(exchange: PlainExchange | GradientExchange, key: str, like: Tensor) -> tuple[int | None, int | None]:
    """(the one rank that holds the state of that name, the rows that each rank holds of it); None, None: everyone.

    `exchange.cut`: {parameter: rows that each rank holds}, of parameters of which no rank has all."""
    parameter = key.removeprefix("model.") if key.startswith("model.") else key.split(".", 2)[-1]
    if parameter in exchange.cut:
        return None, exchange.cut[parameter]
    if key.startswith("model.") or like.dim() == 0:
        return None, None
    return exchange.owner_of(parameter), exchange.rows_of(parameter)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _reduce_scatter(output: Tensor, whole: Tensor) -> Any:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # torch 2.13 renamed it
    return scatter(output, whole, async_op=True)


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
