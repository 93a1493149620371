"""The exchange of gradients and weights on real process groups (gloo) of 1, 2, 4 and 8 processes, against sums."""

import json
import os
import subprocess
import sys

import pytest
import torch

from trainer.exchange import bytes_per_step, owners

STEPS, VOCAB, WIDTH = 3, 48, 8

# One process: trains the same little model twice, with the exchange and with plain sums, and prints the differences.
PROGRAM = """
import json, os, sys
import torch, torch.distributed as dist
from torch import nn
from trainer.exchange import GradientExchange, PlainExchange, touched_rows

rank, world, file, steps, vocab, width = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], *map(int, sys.argv[4:])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=world)

class Little(nn.Module):
    def __init__(self):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        def p(*shape):
            return nn.Parameter(torch.randn(*shape, generator=random) * 0.3)
        self.e1, self.e2, self.a = p(vocab, width), p(vocab, width), p(2, width, width)
        self.b, self.c = p(width, width), p(width, width)
        self.head, self.scale = p(vocab, width), p(3)
    def forward(self, tokens):
        x = self.e1[tokens] * self.scale[0] + self.e2[tokens] * self.scale[1]
        for w in (self.a[0], self.a[1], self.b, self.c):
            x = x + torch.tanh(x @ w.t()) * self.scale[2]
        return torch.nn.functional.cross_entropy(x @ self.head.t(), tokens.roll(-1))

def batches(step):
    random = torch.Generator().manual_seed(1000 * step + rank)
    # each process draws from a range of its own: rows touched here only, by several, and by nobody
    return [torch.randint(rank, min(rank + 20, vocab - 4), (12,), generator=random) for _ in range(2)]

mine, plain = Little(), Little()
matrices = dict(a=mine.a, b=mine.b, c=mine.c)
x = GradientExchange(matrices, dict(e1=mine.e1, e2=mine.e2), mine.head, [mine.scale])
sums = PlainExchange(dict(a=plain.a, b=plain.b, c=plain.c), dict(e1=plain.e1, e2=plain.e2), plain.head, [plain.scale])
assert sums.mine == ["a", "b", "c"] and sums.head_rows == slice(None)
worst, untouched, state = 0.0, True, torch.zeros(vocab, width)
for step in range(steps):
    tokens = batches(step)
    x.wait_weights(); x.begin(tokens)
    for number, part in enumerate(tokens, 1):
        if number == len(tokens):
            x.arm()
        mine(part).backward()
    x.wait_gradients()
    for part in tokens:
        plain(part).backward()
    own = plain.b.grad.clone()
    sums.wait_gradients()
    everyones = [torch.empty_like(own) for _ in range(world)]
    dist.all_gather(everyones, own)
    assert torch.allclose(plain.b.grad, sum(everyones), atol=1e-6)
    rows = touched_rows(tokens, vocab)
    other = torch.ones(vocab, dtype=torch.bool); other[rows] = False
    untouched &= bool(other.any()) and bool((mine.e1.grad[other] == 0).all()) and bool((mine.e2.grad[other] == 0).all())
    pairs = [(getattr(mine, n).grad, getattr(plain, n).grad) for n in ("e1", "e2", "scale", *x.mine)]
    pairs.append((mine.head.grad[x.head_rows], plain.head.grad[x.head_rows]))
    worst = max([worst] + [float((g - h).abs().max() / h.abs().max()) for g, h in pairs])
    with torch.no_grad():
        for name in x.mine:
            matrices[name] -= 0.05 * matrices[name].grad
        x.publish_matrices()
        mine.head[x.head_rows] -= 0.05 * mine.head.grad[x.head_rows]
        state[x.head_rows] += mine.head.grad[x.head_rows]
        x.publish_head()
        for p in (mine.e1, mine.e2, mine.scale):
            p -= 0.05 * p.grad
        for p in plain.parameters():
            p -= 0.05 * p.grad
    mine.zero_grad(); plain.zero_grad()
x.wait_weights()
x.gather_state({}, [state])
weights = max(float((p - q).abs().max()) for p, q in zip(mine.parameters(), plain.parameters()))
everyone = [None] * world
dist.all_gather_object(everyone, sum(float(p.double().sum()) for p in mine.parameters()))
whole = bool((state.abs().sum(1) > 0).all())
print(json.dumps(dict(gradients=worst, weights=weights, untouched=untouched, same=len(set(everyone)) == 1, whole=whole,
                      sharded=x.head is not None, mine=x.mine)))
dist.destroy_process_group()
"""


def run_world(world: int, folder, repo, vocab: int = VOCAB) -> list[dict]:
    """What each of `world` processes printed."""
    arguments = [str(n) for n in (world, folder / f"meet-{world}-{vocab}", STEPS, vocab, WIDTH)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(rank), *arguments],
            cwd=repo,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        ends = [p.communicate(timeout=240) for p in processes]
    finally:
        for p in processes:
            p.kill()
    for p, (_, error) in zip(processes, ends):
        assert p.returncode == 0, error[-2000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in ends]


@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_gradients_and_weights_equal_those_of_plain_sums(world, tmp_path, repo):
    """Gradients within 1e-5 of their largest value, weights within 1e-5, after three steps of two sequences: only the
    order of float32 sums differs. All processes end with the same bits."""
    found = run_world(world, tmp_path, repo)
    for one in found:
        assert one["gradients"] <= 1e-5 and one["weights"] <= 1e-5, one
        assert one["untouched"] and one["same"] and one["whole"] and one["sharded"], one
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


def test_counted_bytes():
    matrices, head = {"a": torch.empty(4, 8, 8)}, torch.empty(48, 8)
    tables = {"e": torch.empty(48, 8, dtype=torch.bfloat16)}
    found = bytes_per_step(matrices, tables, head, 4, rows=12)
    once = 3 / 4
    assert found["plain"] == dict(matrices=2 * once * 1024, tables=2 * once * 768, head=2 * once * 1536)
    assert found["overlap"] == found["plain"] | dict(tables=2 * once * 768 / 4)
    assert sum(bytes_per_step(matrices, tables, head, 1, 12)["overlap"].values()) == 0
