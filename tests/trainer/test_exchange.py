"""The exchange of gradients and weights on real process groups (gloo) of 1, 2, 4 and 8 processes, against sums."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.exchange import bytes_per_step, in_groups, owners

STEPS, VOCAB, WIDTH = 3, 48, 8

# One process: trains the same little model twice, with the exchange and with plain sums, and tells the differences.
# Forked before torch has started any thread: one import for all processes.
PROGRAM = """
import json, os, sys
import torch, torch.distributed as dist
from torch import nn
from trainer.exchange import GradientExchange, PlainExchange, gather_state, spread_state, touched_rows
from trainer.leaving import leaving
from trainer.ngrams import NGramRows

world, file, steps, vocab, width = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
children = []
for rank in range(world):
    children.append(os.fork())
    if not children[-1]:
        break
else:
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=world)

pairs_rows = 2 * vocab  # of a table whose rows two tokens pick
pairs = NGramRows(2, pairs_rows, vocab, 0)

class Little(nn.Module):
    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        def p(*shape):
            return nn.Parameter(torch.randn(*shape, generator=random) * 0.3)
        self.e1, self.e2, self.a = p(vocab, width), p(pairs_rows, width), p(2, width, width)
        self.b, self.c = p(width, width), p(width, width)
        self.head, self.scale = p(vocab, width), p(3)
        self.early = None
    def forward(self, tokens):
        w = leaving(dict(a=self.a, b=self.b, c=self.c, head=self.head), self.early)
        x = self.e1[tokens] * self.scale[0] + self.e2[pairs(tokens)] * self.scale[1]
        for m in (w["a"][0], w["a"][1], w["b"], w["c"]):
            x = x + torch.tanh(x @ m.t()) * self.scale[2]
        return torch.nn.functional.cross_entropy(x @ w["head"].t(), tokens.roll(-1))

def batches(step):
    random = torch.Generator().manual_seed(1000 * step + rank)
    # each process draws from a range of its own: rows touched here only, by several, and by nobody
    # two at first, whose gradients add up before they leave; then one, whose gradients leave in the backward pass
    count = 2 if step < 2 else 1
    return [torch.randint(rank, min(rank + 20, vocab - 4), (12,), generator=random) for _ in range(count)]

mine, plain = Little(), Little()
matrices = dict(a=mine.a, b=mine.b, c=mine.c)
x = GradientExchange(matrices, dict(e1=mine.e1, e2=mine.e2), dict(head=mine.head), dict(scale=mine.scale),
                     dict(e2=pairs))
mine.early, leave, sooner = x.early["early"], x.leave, []
def noted(group, gradients):
    before = len(x.pending)
    leave(group, gradients)
    sooner.append(len(x.pending) - before)
x.leave = noted
sums = PlainExchange(dict(a=plain.a, b=plain.b, c=plain.c), dict(e1=plain.e1, e2=plain.e2), dict(head=plain.head),
                     dict(scale=plain.scale))
assert list(sums.my_matrices) == ["a", "b", "c"] and sums.my_others["head"] is plain.head
rows = x.rows_of("head") or vocab
mine_rows = slice(rank * rows, (rank + 1) * rows) if x.rows_of("head") else slice(None)
worst, untouched, state = 0.0, True, torch.zeros(rows, width)
for step in range(steps):
    tokens = batches(step)
    x.wait_weights(); x.begin(tokens)
    for number, part in enumerate(tokens, 1):
        if number == len(tokens):
            x.arm()
        mine(part).backward()
    x.wait_matrices()
    x.wait_others()
    for part in tokens:
        plain(part).backward()
    own = plain.b.grad.clone()
    sums.wait_matrices()
    sums.wait_others()
    everyones = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(everyones, own)
    assert torch.allclose(plain.b.grad, sum(everyones), atol=1e-6)
    touched = touched_rows(tokens, vocab)
    assert touched_rows(tokens, vocab, 40)[: len(touched)].equal(touched)
    assert len(touched_rows(tokens, vocab, 40)) == min(vocab, -(-len(touched) // 40) * 40)
    other = torch.ones(vocab, dtype=torch.bool); other[touched] = False
    others = torch.ones(pairs_rows, dtype=torch.bool); others[touched_rows(map(pairs, tokens), pairs_rows)] = False
    untouched &= bool(other.any()) and bool((mine.e1.grad[other] == 0).all())
    untouched &= bool(others.any()) and bool((mine.e2.grad[others] == 0).all())
    compared = [(getattr(mine, n).grad, getattr(plain, n).grad) for n in ("e1", "e2", "scale", *x.my_matrices)]
    compared.append((x.my_others["head"].grad, plain.head.grad[mine_rows]))
    worst = max([worst] + [float((g - h).abs().max() / h.abs().max()) for g, h in compared])
    with torch.no_grad():
        for p in x.my_matrices.values():
            p -= 0.05 * p.grad
        x.publish_matrices()
        x.my_others["head"] -= 0.05 * x.my_others["head"].grad
        state += x.my_others["head"].grad
        x.publish_head()
        for p in (mine.e1, mine.e2, mine.scale):
            p -= 0.05 * p.grad
        for p in plain.parameters():
            p -= 0.05 * p.grad
    mine.zero_grad(); plain.zero_grad()
x.wait_weights()
# a state of every kind: of an owner alone (in 16-bit integers too), of each rank's rows, of everyone
held = {f"o.low.{n}": torch.full_like(p, 7 + rank, dtype=torch.int16) for n, p in x.my_matrices.items()}
held |= {"o.sum.head": state, "o.step.head": torch.tensor(3.0), "model.a": mine.a.detach()}
layout = {f"o.low.{n}": torch.empty_like(p, dtype=torch.int16, device="meta") for n, p in matrices.items()}
layout |= {"o.sum.head": torch.empty(vocab, width, device="meta"), "o.step.head": torch.empty((), device="meta"),
           "model.a": mine.a.detach().to("meta")}
gathered = gather_state(x, held, layout)
assert set(gathered) == (set(layout) if rank == 0 else set())
for n in matrices if rank == 0 else []:
    assert (gathered[f"o.low.{n}"] == 7 + x.owner_of(n)).all() and gathered[f"o.low.{n}"].shape == matrices[n].shape
whole = {key: t.clone() for key, t in gathered.items()}  # what is held alone may be the live tensor itself
before = {key: t.clone() for key, t in held.items()}
for t in held.values():
    t.zero_()
spread_state(x, held, layout, whole)
assert all(t.equal(before[key]) for key, t in held.items())
weights = max(float((p - q).abs().max()) for p, q in zip(mine.parameters(), plain.parameters()))
everyone = [None] * world
dist.all_gather_object(everyone, sum(float(p.double().sum()) for p in mine.parameters()))
whole = rank > 0 or bool((whole["o.sum.head"].abs().sum(1) > 0).all())
told = dict(gradients=worst, weights=weights, untouched=untouched, same=len(set(everyone)) == 1, whole=whole,
            sharded=bool(x.head), mine=list(x.my_matrices), groups=len(x.thirds) + bool(x.head), sooner=sooner)
open(f"{file}.{rank}", "w").write(json.dumps(told))
dist.destroy_process_group()
"""


def run_world(world: int, folder, repo, vocab: int = VOCAB) -> list[dict]:
    """What each of `world` processes told."""
    meet = folder / f"meet-{world}-{vocab}"
    arguments = [str(n) for n in (world, meet, STEPS, vocab, WIDTH)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments]
    done = subprocess.run(command, cwd=repo, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(Path(f"{meet}.{rank}").read_text()) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_gradients_and_weights_equal_those_of_plain_sums(world, tmp_path, repo):
    """Gradients within 1e-5 of their largest value, weights within 1e-5, after three steps of two sequences: only the
    order of float32 sums differs. All processes end with the same bits."""
    found = run_world(world, tmp_path, repo)
    for one in found:
        assert one["gradients"] <= 1e-5 and one["weights"] <= 1e-5, one
        assert one["untouched"] and one["same"] and one["whole"] and one["sharded"], one
        # each group was told of in each of 2 + 2 + 1 backward passes, and left there in the last one only
        assert one["sooner"] == [0] * 4 * one["groups"] + [1] * one["groups"], one
    assert sorted(name for one in found for name in one["mine"]) == ["a", "b", "c"]


def test_a_head_that_does_not_divide_is_summed_by_everyone(tmp_path, repo):
    for one in run_world(2, tmp_path, repo, vocab=49):
        assert one["gradients"] <= 1e-5 and one["weights"] <= 1e-5 and one["same"] and not one["sharded"], one


def test_owners_share_the_work_evenly():
    matrices = {f"attention{i}": torch.empty(4, 64, 64, device="meta") for i in range(16)}
    matrices |= {f"mlp{i}": torch.empty(256, 64, device="meta") for i in range(32)}
    for world in (1, 2, 4, 8):
        owner = owners(matrices, world)
        assert owner == owners(dict(reversed(matrices.items())), world) and list(owner) == list(matrices)
        load = [0] * world
        for name, rank in owner.items():
            m, n = sorted(matrices[name].shape[-2:])
            load[rank] += matrices[name][..., 0, 0].numel() * (4 * m * m * n + 2 * m**3)
        assert max(load) <= 1.1 * sum(load) / world


def test_every_rank_has_as_many_matrices_of_every_third():
    names = [f"blocks.{n}.{kind}" for n in range(16) for kind in ("qkvo_w", "mlp_in_w", "mlp_out_w")]
    matrices = {n: torch.empty((4, 64, 64) if "qkvo" in n else (256, 64), device="meta") for n in names}
    del matrices["blocks.7.qkvo_w"]
    matrices["techniques.gates"] = torch.empty(16, 8, 16, device="meta")
    for world in (1, 2, 4, 8):
        groups, owner = in_groups(matrices, world), owners(matrices, world)
        assert sorted(name for names in groups for name in names) == sorted(matrices) and len(groups) <= 3
        assert groups[0][0].startswith("blocks.15.") and groups[-1][-1] == "techniques.gates"
        for names in groups[:-1]:
            assert {sum(owner[name] == rank for name in names) for rank in range(world)} == {len(names) // world}


def test_counted_bytes():
    matrices, head = {"a": torch.empty(4, 8, 8)}, torch.empty(48, 8)
    tables = {"e": torch.empty(48, 8, dtype=torch.bfloat16)}
    found = bytes_per_step(matrices, tables, head, 4, rows=12)
    once = 3 / 4
    assert found["plain"] == dict(matrices=2 * once * 1024, tables=2 * once * 768, head=2 * once * 1536)
    assert found["overlap"] == found["plain"] | dict(tables=2 * once * 768 / 4)
    assert sum(bytes_per_step(matrices, tables, head, 1, 12)["overlap"].values()) == 0
