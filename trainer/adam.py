"""Adam as the speedrun's record 18 has it: every other step, cautious decay, rates and betas by the kind of parameter.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   u = l (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    p <- p - u - l^2 decay p where u p > 0,   l = lr f

g is the sum of the gradients since the last update (`adam_every` steps), t counts updates. Decay is quadratic in the
rate (#172). A tied input table (`tie_embeddings_frac`, #175, #178) is a copy of the head that follows it: its
gradient is added to the head's, and after an update it is overwritten; when they part, its Adam state is a copy of
the head's, too.

With `adam_period` (#349) the value embeddings and the bigram table update less often from some step on: on the sum of
all gradients since their last update, with both betas to the power of the periods' ratio k and k times the decay. As
t goes on to count everybody's updates, b^t remains what is left of the moments' beginning.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernels.muon import apply_update_
from trainer import schedule
from trainer.schedule import learning_rate_factor, split_step, stretched

#: Kinds of parameters, and the field with their rate.
# fmt: off
RATES = dict(
    head="head_lr", tables="embed_lr", bigram="embed_lr", mixes="mix_lr", bigram_mixes="bigram_mix_lr",
    inputs="input_gate_lr", gates="gate_lr", dynamic="dynamic_lr", dynamic_bias="dynamic_lr", scalars="scalar_lr",
)
# fmt: on
# fmt: off
_PARTS = {  # of a parameter's name, the first that fits, and its kind
    "head_w": "head", "bigram_embed": "bigram", "embed": "tables", "bigram_mixes": "bigram_mixes", "mixes": "mixes",
    "dynamic_gates.scale": "scalars", "dynamic_gates.bias": "dynamic_bias", "head_mixing.bias": "dynamic_bias",
    "dynamic_gates": "dynamic", "head_mixing": "dynamic",
    "smear_w": "inputs", "skip_w": "inputs", "gates": "gates", "dynamic.bias": "dynamic_bias", "dynamic": "dynamic",
    "scalars": "scalars", "xsa_w": "scalars",
}
# fmt: on


def kind_of(name: str, tied: bool) -> str:
    """The kind of a parameter by its name. Once tied, the input table keeps to the head's rates."""
    if tied and name == "embed1.weight":
        return "head"
    return next(kind for part, kind in _PARTS.items() if part in name)


def is_slow(name: str) -> bool:
    """Whether `adam_period` is for a parameter of that name."""
    return name.startswith("value_embeds") or "bigram_embed" in name


def waiting_at(step: int, names: Iterable[str], config: Any) -> set[str]:
    """Which of these parameters do not update in a step in which Adam does: their gradients stay."""
    return set() if schedule.tables_step(step, config) else {name for name in names if is_slow(name)}


def by_kind(text: str, count: int) -> dict[str, list[float]]:
    """{kind: numbers} from 'head=150,tables=5' or, with count 2, 'scalars=0.9:0.99'. Raises ValueError."""
    found = {}
    for word in filter(str.strip, text.split(",")):
        kind, _, values = word.partition("=")
        found[kind.strip()] = [float(value) for value in values.split(":")]
        if len(found[kind.strip()]) != count or kind.strip() not in RATES:
            raise ValueError(f"{word.strip()!r}: KIND={':'.join(['NUMBER'] * count)}, KIND of {', '.join(RATES)}")
    return found


def adam_(p: Tensor, grad: Tensor, m: Tensor, v: Tensor, numbers: Tensor) -> None:
    """One update in place, the docstring's formula; sums in float32, rounded once.

    numbers: float32 (7,): b1, b2, 1 - b1^t, 1 - b2^t, l, l^2 decay, eps: a tensor, so that one graph serves a run."""
    b1, b2, unbias1, unbias2, rate, decay, eps = numbers.unbind()
    wide = torch.promote_types(p.dtype, torch.float32)
    g, old = grad.to(wide), p.to(wide)
    new_m = torch.lerp(g, m.to(wide), b1.to(wide))
    new_v = torch.lerp(g.square(), v.to(wide), b2.to(wide))
    u = rate * (new_m / unbias1) / ((new_v / unbias2).sqrt() + eps)
    m.copy_(new_m)
    v.copy_(new_v)
    p.copy_(old - u - decay * old * (u * old > 0))


def _compiled() -> Any:
    """`adam_` by torch.compile, one graph for all lengths; but one for each combination of types and views."""
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(adam_, dynamic=True, fullgraph=True)


class Adam:
    """The optimizer of everything but the blocks' matrices where `adam_every` or a field of its kind asks for it; the
    interface of train_gpt.AdamW.

    named: parameters, of a head that is sharded this process's rows of it. exchange: of trainer.exchange, which tells
    those rows. compiled: the update by torch.compile, one pass over memory in place of ten."""

    def __init__(self, named: Mapping[str, nn.Parameter], config: Any, exchange: Any = None, compiled: bool = False):
        c = config
        self.config, self.named, self.exchange = c, dict(named), exchange
        self.split = split_step(c)
        kinds = {n: kind_of(n, c.tie_embeddings_frac > 0) for n in named}
        betas, decay = by_kind(c.adam_betas, 2), by_kind(c.adam_decay, 1)
        both, none = (c.adam_beta1, c.adam_beta2), [0.0]
        self.constants = {  # rate, b1, b2, decay
            n: (getattr(c, RATES[k]), *betas.get(k, both), c.adam_weight_decay * decay.get(k, none)[0])
            for n, k in kinds.items()
        }
        device = next(iter(named.values())).device
        self.table_P4 = torch.tensor(list(self.constants.values()), dtype=torch.float32, device=device)
        slow = [float(is_slow(name)) for name in named]
        self.slow_P = torch.tensor(slow, dtype=torch.float32, device=device)
        self.count = torch.zeros((), dtype=torch.float32, device=device)
        self.factor = torch.zeros((), dtype=torch.float32, device=device)
        kept = lambda p: torch.float32 if c.adam_moments == "float32" else p.dtype  # noqa: E731
        zeros = lambda p: torch.zeros(p.shape, dtype=kept(p), device=p.device)  # noqa: E731
        self.exp_avg, self.exp_avg_sq = ({n: zeros(p) for n, p in named.items()} for _ in range(2))
        self.update = _compiled() if compiled else adam_

    def tied(self, step: int) -> bool:
        """Whether the input table still is the head, when step `step` updates."""
        return step <= self.split

    def numbers(self, step: int) -> Tensor:
        """What `adam_` takes for each parameter, (P, 7), made on the device: the host does not wait for it."""
        c = self.config
        self.factor.fill_(learning_rate_factor(step, c))
        rate, b1, b2, decay = self.table_P4.unbind(1)
        rate = rate * self.factor
        unbias = [1 - b**self.count for b in (b1, b2)]
        if stretched(step, c):
            times = 1 + (c.adam_period // c.adam_every - 1) * self.slow_P
            b1, b2, decay = b1**times, b2**times, decay * times
        return torch.stack([b1, b2, *unbias, rate, rate * rate * decay, torch.full_like(b1, c.adam_eps)], 1)

    @torch.no_grad()
    def step(self, step: int) -> None:
        """One update from the `.grad` of every parameter that does not wait, which it clears; `step` sets the rate."""
        self.count += 1
        waiting = waiting_at(step, self.named, self.config)
        if self.tied(step):
            head, table = self.named["head_w"], self.named["embed1.weight"]
            head.grad += table.grad[self._my_rows(head)].to(head.grad.dtype)
        for (name, p), numbers in zip(self.named.items(), self.numbers(step)):
            if name in waiting:
                continue
            if not (name == "embed1.weight" and self.tied(step)):
                tensors = p.detach(), p.grad.contiguous(), self.exp_avg[name], self.exp_avg_sq[name]
                weights, grad, m, v = (t.view(-1) for t in tensors)
                self.update(weights, grad, m, v, numbers)
            p.grad = None

    def _my_rows(self, head: Tensor) -> slice:
        rows = self.exchange.rows_of("head_w") if self.exchange is not None else None
        begin = 0 if rows is None else rows * self.exchange.rank
        return slice(begin, begin + head.size(0))

    @torch.no_grad()
    def follow(self, step: int, head_w: Tensor, table: Tensor) -> None:
        """After an update, with the whole new head: the tied table is the head again; after the last one that they
        share, so is its state. Collective."""
        if self.tied(step):
            table.copy_(head_w)
        if step == self.split:
            for moments in (self.exp_avg, self.exp_avg_sq):
                moments["embed1.weight"].copy_(self.exchange.whole("head_w", moments["head_w"]))

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for checkpoints; live, not copies."""
        kinds = dict(exp_avg=self.exp_avg, exp_avg_sq=self.exp_avg_sq)
        found = {f"adam.{kind}.{name}": t for kind, tensors in kinds.items() for name, t in tensors.items()}
        return found | {"adam.count": self.count}


class MatrixAdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101) for the matrices of the blocks, in Muon's place: what Muon
    is worth is measured against it (`matrix_optimizer`). The interface of train_gpt.Muon.

    Rate and decay are Muon's fields, betas and eps Adam's. Moments are float32; a bfloat16 weight keeps the lower 16
    bits of its float32 master beside it, as with Muon."""

    def __init__(self, named: Mapping[str, nn.Parameter], config: Any, impl: str):
        self.config, self.impl, self.named = config, impl, dict(named)
        zeros = lambda p, dtype: torch.zeros(p.shape, dtype=dtype, device=p.device)  # noqa: E731
        self.exp_avg, self.exp_avg_sq = ({n: zeros(p, torch.float32) for n, p in named.items()} for _ in range(2))
        self.mantissa = {n: zeros(p, torch.int16) for n, p in named.items() if p.dtype == torch.bfloat16}

    @torch.no_grad()
    def step(self, step: int) -> None:
        """One update from the `.grad` of every parameter; `step`, from 0 on, sets the rate and counts the updates."""
        c = self.config
        lr = c.muon_lr * learning_rate_factor(step, c)
        unbias1, unbias2 = (1 - beta ** (step + 1) for beta in (c.adam_beta1, c.adam_beta2))
        for name, p in self.named.items():
            m, v, grad = self.exp_avg[name], self.exp_avg_sq[name], p.grad.float()
            m.lerp_(grad, 1 - c.adam_beta1)
            v.lerp_(grad.square(), 1 - c.adam_beta2)
            update = (m / unbias1) / ((v / unbias2).sqrt() + c.adam_eps)
            how = dict(lr=lr, weight_decay=lr * c.muon_weight_decay, impl=self.impl)
            apply_update_(p, self.mantissa.get(name), update, **how)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for checkpoints; live, not copies."""
        kinds = dict(exp_avg=self.exp_avg, exp_avg_sq=self.exp_avg_sq, mantissa=self.mantissa)
        return {f"muon.{kind}.{name}": t for kind, tensors in kinds.items() for name, t in tensors.items()}
