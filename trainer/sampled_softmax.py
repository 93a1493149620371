"""`sampled_softmax`: in training the softmax is over some of the classes (#360; Jean et al. 2015, arXiv:1412.2007).

    loss of a token = log sum_{c in S} exp(cap(x . w_c)) - cap(x . w_target)

S has P classes for each packed sequence: all that are targets in it, and others up to P. The others are the next ones
of a walk in strides of 20011 over all classes, V of them with the padding: class 20011 k mod V for k = s, s + 1, ...,
the targets left out, with s = P times the number of the sequence in the run. So each class is one of the others about
equally often, the classes follow from (step, sequence) alone, and neither resuming nor the number of processes changes
them. The stride is a prime, so the walk meets every class before it comes back.

The head's three products shrink by P / V. The loss is lower than that over all classes, and its gradient is biased: the
others stand for all that are left out without being weighted for it. Hence the last steps (`full_softmax_frac`) are
over all classes, as every validation is. A sequence with more than P different targets is also trained over all of
them: choose P so that this is rare, as the shape of that step is not warm and costs a compilation.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from trainer.options import UsageError
from trainer.schedule import listed_classes, sampled_classes_at, sequences

STRIDE = 20011
MULTIPLE = 16  # of classes: the least that products in 8 bits take


def padded_classes(config: Any) -> int:
    """Rows of the head: the vocabulary filled up to a multiple of 128."""
    return -(-config.vocab_size // 128) * 128


def check(config: Any) -> None:
    """Raise UsageError for numbers of classes that cannot be, naming the field."""
    c, classes = config, padded_classes(config)
    for count in listed_classes(c):
        if count % MULTIPLE or count >= classes:
            wrong = f"{count} is no multiple of {MULTIPLE} below the head's {classes} classes"
            raise UsageError(f"--sampled_softmax={c.sampled_softmax}: {wrong}")
    if c.sampled_softmax and c.prefix_loss:
        raise UsageError("--sampled_softmax with --prefix_loss: a prefix need not be one of the sampled classes")
    if c.sampled_softmax and classes % STRIDE == 0:
        raise UsageError(f"--vocab_size={c.vocab_size}: --sampled_softmax walks it in strides of {STRIDE}, a divisor")


def mean_share(config: Any) -> float:
    """Classes of a training loss over all classes, in the mean over the run's steps."""
    steps, classes = range(config.num_iterations), padded_classes(config)
    if not config.sampled_softmax:
        return 1.0
    return sum(sampled_classes_at(step, config) or classes for step in steps) / (len(steps) * classes)


def chosen(targets: Tensor, walk: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """(targets (T,) as places among the chosen classes, these: int64 (count,), ascending), or None if there are more
    different targets than that. walk: every class once, in the order in which the others are taken."""
    inside = torch.zeros(len(walk), dtype=torch.bool)
    inside[targets] = True
    others = count - int(inside.sum())
    if others < 0:
        return None
    inside[walk[~inside[walk]][:others]] = True
    return (inside.cumsum(0) - 1)[targets], inside.nonzero().flatten()


class SampledClasses:
    """Chooses the classes of each sequence, on the host, where its targets are: no device is waited for."""

    def __init__(self, config: Any, device: torch.device):
        self.config, self.device = config, device
        self.classes = padded_classes(config)
        self.walk = torch.arange(2 * self.classes) * STRIDE % self.classes if config.sampled_softmax else None
        self.told = False

    def __call__(self, step: int, sequence: int, batch: Any) -> tuple[Any, dict[str, Tensor | None]]:
        """(the batch, its targets (T,) as places among the sampled classes; what `train_gpt.GPT.forward` is told of
        these: their numbers, int64 (P,), ascending, on the device, or None for all). `sequence`: its number in the
        step, whichever process has it."""
        count = sampled_classes_at(step, self.config)
        if not count or self.walk is None:
            return batch, {}
        inputs, targets = batch
        begin = (step * sequences(self.config) + sequence) * count % self.classes
        walk = self.walk[begin : begin + self.classes]
        found = chosen(torch.as_tensor(targets).long(), walk, count)
        if found is None:
            self._tell(step, sequence, len(set(torch.as_tensor(targets).tolist())), count)
            return batch, {"classes": None}
        places, numbers = found
        if self.device.type == "cuda":
            places, numbers = places.pin_memory(), numbers.pin_memory()
        return (inputs, places), {"classes": numbers.to(self.device, non_blocking=True)}

    def _tell(self, step: int, sequence: int, targets: int, count: int) -> None:
        """Say once that a sequence is over all classes: it costs time, and a compilation, that nobody counted on."""
        if not self.told:
            print(
                f"--sampled_softmax: sequence {sequence} of step {step} has {targets:,} different targets, more than "
                f"{count:,} classes: it is trained over all of them, as others may be; this is said once",
                file=sys.stderr,
            )
        self.told = True
