"""Initial weights by a word, for every rung that has weights: to see what they do before any training.

uniform:0:1     every weight drawn evenly between two numbers        normal:1     normal, of a standard deviation
constant:0.1    all weights equal: hidden units then stay copies of each other, see `different_units`
"""

import math

import torch
from torch import nn

from lab import LabError
from lab.models.base import LanguageModel

_NUMBERS = {"uniform": 2, "normal": 1, "constant": 1}


def parse_initial(text: str) -> tuple[str, list[float]]:
    """(kind, numbers) of `uniform:LOW:HIGH`, `normal:STD` or `constant:VALUE`; LabError otherwise."""
    kind, *parts = text.split(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    sane = all(map(math.isfinite, numbers)) and len(numbers) == _NUMBERS.get(kind, -1)
    if not sane or (kind == "uniform" and numbers[0] >= numbers[1]) or (kind == "normal" and numbers[0] < 0):
        raise LabError(f"--initial={text}: write uniform:LOW:HIGH (LOW below HIGH), normal:STD or constant:VALUE")
    return kind, numbers


@torch.no_grad()
def initialise_(model: LanguageModel, text: str) -> None:
    """Draw every matrix of `model` anew, in place, from torch's global generator; '' leaves it as it is. Vectors
    (biases, gains) stay. LabError for a model without matrices."""
    if not text:
        return
    kind, numbers = parse_initial(text)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    if not matrices:
        raise LabError(f"--initial={text}: this model has no weights to draw; it is counted")
    draw = {"uniform": nn.init.uniform_, "normal": lambda p, std: nn.init.normal_(p, std=std)}
    for p in matrices:
        draw.get(kind, nn.init.constant_)(p, *numbers)


@torch.no_grad()
def different_units(model: LanguageModel) -> dict[str, tuple[int, int]]:
    """{layer: (different hidden units, hidden units)}: two units are one if all their incoming weights are equal,
    for then they compute the same and learn the same."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "output":
            found[name] = (len(torch.unique(module.weight, dim=0)), module.out_features)
    return found
