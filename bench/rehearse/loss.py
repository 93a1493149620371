"""The head's loss alone, compiled and counted two ways: what a run with plain torch moves over its logits.

    python -m bench.rehearse.loss     # writes bench/results/rehearsal-loss.json; no GPU, a minute on two cores

`--kernels=reference` takes the loss in chunks, so that its logits fit any memory; the published runs have all logits at
once and leave the fusion to Inductor. Whoever projects *their* step from the counts of our reference exchanges the one
for the other, and both are counted here by the same recorder: bytes of what is no product, forward and backward.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench.common import RESULTS, table, write_json
from trainer.options import command, setting

FILE = RESULTS / "rehearsal-loss.json"
TOKENS, WIDTH, CLASSES = 65536, 1024, 50304
SOFTCAPS = ("rsqrt", "sigmoid")  # of the reference run, and of record 18 and after


def counted(softcap: str, whole: bool, tokens: int = TOKENS, classes: int = CLASSES) -> dict[str, float]:
    """{"gb": moved by what is no product, "tflop": of the products} of one loss and its gradients.

    whole: all logits at once; else in chunks, as `--kernels=reference`.
    Raises: device.CannotRehearse."""
    from bench.rehearse import device as pretended
    from bench.rehearse.recorder import Recorder
    from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

    def loss(x_ND, w_VD, targets):
        if whole:
            return linear_cross_entropy_reference(x_ND, w_VD, targets, softcap, "sum")
        return linear_cross_entropy(x_ND, w_VD, targets, softcap=softcap, reduction="sum", impl="reference")

    pretended.install("h100")
    torch._dynamo.reset()
    recorder = Recorder()
    with pretended.tensors(), recorder:
        compiled = torch.compile(loss, dynamic=False)
        x, w = (
            torch.zeros(n, WIDTH, dtype=torch.bfloat16, device="cuda", requires_grad=True) for n in (tokens, classes)
        )
        targets = torch.zeros(tokens, dtype=torch.int64, device="cuda")
        compiled(x, w, targets).backward()  # compiles
        x.grad = w.grad = None
        with recorder.recording():
            compiled(x, w, targets).backward()
    products = [launch for launch in recorder.launches if launch.kind == "product"]
    others = [launch for launch in recorder.launches if launch.kind != "product"]
    return {"gb": sum(one.bytes for one in others) / 1e9, "tflop": sum(one.flops for one in products) / 1e12}


@dataclass(frozen=True)
class Options:
    """What is counted."""

    keep: bool = setting(True, "flag", "write the file; false: print alone")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; 0 counted, 3 this machine cannot rehearse (the reason is printed)."""
    from bench.rehearse.device import CannotRehearse

    _, options = command(__doc__, argv, Options)
    try:
        result = {cap: {how: counted(cap, how == "whole") for how in ("chunked", "whole")} for cap in SOFTCAPS}
    except CannotRehearse as error:
        print(f"bench.rehearse.loss: skipped: {error}", file=sys.stderr)
        return 3
    print(table([{"soft cap": cap, "logits": how, **found} for cap in result for how, found in result[cap].items()]))
    if options.keep:
        write_json(FILE, {"schema": 1, "name": "rehearsal", "tokens": TOKENS, "classes": CLASSES, "result": result})
    return 0


if __name__ == "__main__":
    sys.exit(main())
