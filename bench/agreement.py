"""A few steps as they run by default here, compiled and with our kernels, against the same steps eager and plain.

    python -m bench.agreement                       # nano in bfloat16; fields of train_gpt.py may follow

Both start from one seed and train on the same tokens. On a GPU this is the first look at numbers of the whole path;
without one it compares torch.compile and eager references. Losses may differ by ALLOWED of a type: rounding, which the
first steps of a training carry on, but do not yet magnify.

Exit code: 0 they agree, 1 they do not, 2 usage.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch

from bench.common import table
from bench.options import helped
from bench.step import make_batches

STEPS = 5
ALLOWED = {"bfloat16": 0.03, "float32": 2e-3}  # nats, of losses that start at 5.5


def losses(config, device: torch.device) -> list[float]:
    """Loss of each of STEPS training steps."""
    import train_gpt

    trainer = train_gpt.Trainer(config, device)
    batches = make_batches(config, config.tokens_per_step // config.train_seq_len, device, None)
    return [trainer.step(step, batches).item() for step in range(STEPS)]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code of the module's docstring."""
    import train_gpt

    if helped(sys.argv[1:] if argv is None else argv, __doc__):
        return 0
    fields = list(sys.argv[1:] if argv is None else argv)
    try:
        config = train_gpt.parse_config(["--preset=nano", "--dtype=bfloat16", "--compile=on", *fields])
    except train_gpt.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = train_gpt.set_up(config)
    ours = losses(config, device)
    plain = losses(dataclasses.replace(config, compile="off", kernels="reference"), device)
    rows = [
        {"step": i, "as it runs": a, "eager reference": b, "difference": a - b}
        for i, (a, b) in enumerate(zip(ours, plain))
    ]
    print(table(rows))
    worst = max(abs(row["difference"]) for row in rows)
    good = worst <= ALLOWED[config.dtype] and ours[-1] < ours[0]
    print(f"largest difference {worst:.2g} nats, {ALLOWED[config.dtype]} allowed; falling: {ours[-1] < ours[0]}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
