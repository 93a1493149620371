"""Which flags let `medium` train on a card: its memory, counted on a pretended device, against what the card has.

    python -m bench.rehearse.cards            # all cards, each in a process of its own; keeps rehearsal-cards.json
    python -m bench.rehearse.cards rtx4090    # one

One process trains alone, as `python train_gpt.py` does. The sequence is halved until the peak of warm-up, step and
validation leaves ROOM of the card's memory free for fragmentation and the library's workspaces. Kernels are not
assembled for this; that they are, and fit, is asked of one block for each card.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from bench.common import REPO, RESULTS, write_json
from trainer.options import command

ROOM = 0.08
CARDS = {"rtx3090": 32768, "rtx4090": 32768, "a100": 65536, "l40s": 65536, "h100": 65536}  # name -> length tried first
SHORTEST = 4096


def peak_gib(length: int, validation: int, device: str) -> float:
    """Peak of a run of `medium` with sequences of those lengths on one such card."""
    import train_gpt
    from bench.rehearse.counts import memory_alone

    flags = [f"--train_seq_len={length}", f"--val_seq_len={validation}", f"--tokens_per_step={length}"]
    return memory_alone(train_gpt.parse_config(["--preset=medium", *flags]), device)


def what_fits(device: str) -> dict:
    """The longest sequence that fits on the card, its flags and its peak."""
    from bench.rehearse.device import DEVICES

    told = DEVICES[device]
    length = CARDS[device]
    while length >= SHORTEST:
        peak = peak_gib(length, min(262144, 4 * length), device)
        if peak <= (1 - ROOM) * told["memory"]:
            break
        length //= 2
    else:
        raise RuntimeError(f"{device}: not even {SHORTEST} tokens fit")
    flags = "" if length == 65536 else f"--train_seq_len={length} --val_seq_len={4 * length}"
    row = {"card": told["name"], "memory_gib": told["memory"], "flags": flags, "peak_gib": peak}
    return row | {"compiles": fits(device)}


def fits(device: str) -> bool:
    """Whether every kernel of a block is assembled for the card and fits its shared memory."""
    command = [sys.executable, "-m", "bench.rehearse", "--one-block", "--world=1", "--device", device]
    done = subprocess.run([*command, "--tokens_per_step=65536"], cwd=REPO, capture_output=True, text=True)
    if done.returncode:
        print(f"{device}: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    return done.returncode == 0


def table_of(rows: Sequence[dict]) -> str:
    """The README's table."""
    lines = ["| card | memory, GiB | flags | peak, GiB, counted | kernels |", "|-|-|-|-|-|"]
    for row in rows:
        flags = f"`{row['flags']}`" if row["flags"] else "none"
        kernels = "compile and fit" if row["compiles"] else "**do not compile**"
        lines.append(f"| {row['card']} | {row['memory_gib']} | {flags} | {row['peak_gib']:.1f} | {kernels} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Options:
    """One word at most: a card, which counts itself and prints JSON; without it all are counted and kept."""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    words, _ = command(__doc__, argv, Options, (0, 1))
    card = words[0] if words else ""
    if card and card not in CARDS:
        print(f"error: there is no card {card!r}; there are {', '.join(CARDS)}", file=sys.stderr)
        return 2
    if card:
        print(json.dumps(what_fits(card)))
        return 0
    rows = []
    for card in CARDS:
        counting = [sys.executable, "-m", "bench.rehearse.cards", card]
        done = subprocess.run(counting, cwd=REPO, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(table_of(rows[-1:]).splitlines()[-1], flush=True)
        write_json(RESULTS / "rehearsal-cards.json", {"schema": 1, "name": "rehearsal-cards", "result": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
