"""What changes over a run, each as a pure function of (step, configuration): rates, windows, batch, targets.

Steps count from 0. A run of `num_iterations` steps follows its schedules for all but the last `extension_steps` of
them, which go on at their end. Schedules that are written as lists ("3,7,11") have one value for each twelfth of the
scheduled steps; the last value stays. So the same list serves a run of any length.

The stepped schedules are those of the speedrun's record 18 of the medium track (#188) and, before it, of the short
track: batch ramp (#163), windows with YaRN (#122), several targets a token (#178), an extension at the floor of the
learning rate (#131); https://github.com/KellerJordan/modded-nanogpt/pull/188. YaRN: Peng et al. 2023, arXiv 2309.00071.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from trainer.options import MOST, UsageError

PARTS = 12  # of the scheduled steps, each with one value of a list
Number = TypeVar("Number", int, float)


def scheduled(config: Any) -> int:
    """Steps that the schedules are stretched over; the extension follows."""
    return config.num_iterations - config.extension_steps


def part(step: int, config: Any) -> int:
    """The twelfth of the schedule that a step lies in, from 0; 12 and more in the extension."""
    return PARTS * step // scheduled(config)


@functools.lru_cache(maxsize=64)
def _numbers(text: str, field: str, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers of a text such as "3,7,11"; `field`: whose it is. Raises UsageError."""
    try:
        found = [kind(word) for word in text.split(",") if word.strip()]
    except ValueError:
        found = [kind("-1")]
    if any(not 0 < number < math.inf for number in found) or len(found) > PARTS:
        raise UsageError(f"--{field}={text}: at most {PARTS} positive numbers, one a twelfth of the run: 3,7,11")
    return found


def _listed(config: Any, field: str, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers of a field. Raises UsageError."""
    return _numbers(getattr(config, field), field, kind)


def _at(values: Sequence[Number], place: int) -> Number:
    return values[min(place, len(values) - 1)]


# ---- Learning rate, momentum, targets ------------------------------------------------------------------------


def learning_rate_factor(step: int, config: Any) -> float:
    """Of all learning rates: `lr_schedule` by twelfths until the cooldown starts, then linearly to `lr_floor`. A new
    value holds after its twelfth has begun, not yet at its first step (as #188)."""
    maximum = _at(_listed(config, "lr_schedule", float), max(PARTS * step - 1, 0) // scheduled(config))
    left = min(1.0, max(0.0, 1 - step / scheduled(config)) / config.cooldown_frac)
    return left * maximum + (1 - left) * config.lr_floor


def highest_rate_factor(config: Any) -> float:
    """The largest value of `lr_schedule`."""
    return max(_listed(config, "lr_schedule", float))


def muon_momentum_at(step: int, config: Any) -> float:
    """From 0.85 linearly to `muon_momentum` over the warm-up, and back over the last `muon_momentum_cooldown` steps."""
    fraction = min(step / max(config.muon_momentum_warmup, 1), 1.0)
    if config.muon_momentum_cooldown:
        fraction = min(fraction, (config.num_iterations - step) / config.muon_momentum_cooldown)
    return (1 - fraction) * 0.85 + fraction * config.muon_momentum


def target_weights(step: int, config: Any) -> tuple[float, ...]:
    """Weights of the next token, the one after it, ... in a step's loss: 1, 1/2, 1/4. `mtp` targets in the first
    twelfth, one fewer in each next; the weight of the one that goes next falls to 0 meanwhile."""
    targets = max(1, config.mtp - part(step, config))
    weights = [0.5**k for k in range(targets)]
    if targets > 1:
        weights[-1] *= 1 - PARTS * step % scheduled(config) / scheduled(config)
    return tuple(weights)


def listed_classes(config: Any) -> list[int]:
    """The numbers of `sampled_softmax`; none where it is off. Raises UsageError."""
    return _listed(config, "sampled_softmax", int)


def sampled_classes_at(step: int, config: Any) -> int:
    """Classes of a step's softmax: `sampled_softmax` by twelfths; 0, which is all, in the last `full_softmax_frac` of
    the scheduled steps and after them."""
    counts = listed_classes(config)
    full = math.ceil((1 - config.full_softmax_frac) * scheduled(config) - 1e-9)
    return _at(counts, part(step, config)) if counts and step < full else 0


def adam_steps(step: int, config: Any) -> bool:
    """Whether Adam updates after this step, on the sum of the gradients since its last update."""
    return (step + 1) % config.adam_every == 0


def tables_step(step: int, config: Any) -> bool:
    """Whether the value embeddings and the bigram table update after this step: when Adam does, and once
    `adam_period_from` of the scheduled steps is done (rounded up to a period) every `adam_period` steps."""
    return adam_steps(step, config) and (not stretched(step, config) or (step + 1) % config.adam_period == 0)


def stretched(step: int, config: Any) -> bool:
    """Whether those tables have their longer period."""
    period = config.adam_period
    if not period:
        return False
    return step >= period * math.ceil((config.adam_period_from * scheduled(config) - 1e-9) / period)


def last_step(config: Any) -> int:
    """Where a run ends: after all of its steps, or earlier by `stop_after`."""
    return min(config.stop_after or config.num_iterations, config.num_iterations)


def whole_steps(config: Any) -> int:
    """After a multiple of so many steps no gradient waits for a later update."""
    return max(config.adam_every, config.adam_period)


# ---- Batch ---------------------------------------------------------------------------------------------------


def sequences(config: Any) -> int:
    """Packed sequences of a step, the same in every step; they get longer where the batch grows."""
    return config.tokens_per_step // config.train_seq_len


def my_sequences(config: Any, rank: int, world_size: int) -> range:
    """The sequences of a step that a process works on; all processes together cover each once."""
    return range(rank, sequences(config), world_size)


def batch_tokens_at(step: int, config: Any) -> int:
    """Tokens of a step, over all processes: `batch_schedule` by twelfths, then `tokens_per_step`."""
    return _at([*_listed(config, "batch_schedule", int), config.tokens_per_step], part(step, config))


def sequence_tokens_at(step: int, config: Any) -> int:
    """Tokens of each of the step's sequences."""
    return batch_tokens_at(step, config) // sequences(config)


def sequence_lengths(config: Any) -> list[tuple[int, int]]:
    """[(first step, tokens of a sequence from it on), ...], as data.shards.TokenStream takes it."""
    firsts = [-(-twelfth * scheduled(config) // PARTS) for twelfth in range(PARTS)]
    found = [(first, sequence_tokens_at(first, config)) for first in sorted({*firsts, 0})]
    return [now for before, now in zip([(0, 0), *found], found) if now[1] != before[1]]


def document_tokens(config: Any) -> list[tuple[int, int]]:
    """[(first step, the most that is kept of an aligned document from it on), ...], as data.documents.DocumentStream
    takes it. Shorter ones in the first third: a curriculum of the short track (#224)."""
    later = config.max_document_tokens or MOST
    early = config.early_document_tokens or later
    return [(0, early), (-(-scheduled(config) // 3), later)] if early != later else [(0, later)]


def tokens_until(step: int, config: Any) -> int:
    """Tokens of the first `step` steps."""
    pieces = sequence_lengths(config)
    ends = [first for first, _ in pieces[1:]] + [step]
    counted = sum(max(0, min(end, step) - first) * length for (first, length), end in zip(pieces, ends))
    return counted * sequences(config)


def shapes(config: Any) -> dict[tuple[int, int, int], int]:
    """{(tokens of a sequence, targets of a token, classes of its softmax or 0): the first step that has it}: what a
    compiled step must be warm for, as each is a graph of its own."""
    edges = range(0, PARTS * scheduled(config), scheduled(config))  # in twelfths of a step
    steps = {-(-edge // PARTS) for edge in edges}
    if listed_classes(config):
        steps.add(next(step for step in range(config.num_iterations + 1) if not sampled_classes_at(step, config)))
    found: dict[tuple[int, int, int], int] = {}
    for step in [step for step in sorted(steps) if step < config.num_iterations]:
        shape = sequence_tokens_at(step, config), len(target_weights(step, config)), sampled_classes_at(step, config)
        found.setdefault(shape, step)
    return found


# ---- Windows and YaRN ----------------------------------------------------------------------------------------


def window_blocks_at(step: int, config: Any) -> int:
    """The long window of a step in blocks: `window_schedule` by twelfths; without one window_max_tokens along the
    cubic 4x^3 - 6x^2 + 3x, which is steep at both ends and flat in the middle of its growth, rounded up to whole
    blocks; at least one."""
    if config.window_schedule:
        return _at(_listed(config, "window_schedule", int), part(step, config))
    x = min(step / (config.window_growth_frac * scheduled(config)), 1.0)
    factor = 4 * x**3 - 6 * x**2 + 3 * x if config.growing_window else 1.0
    return max(1, math.ceil(factor * config.window_max_tokens / config.block_tokens))


def validation_window_at(step: int, config: Any) -> int:
    """The long window in blocks of a validation after `step` steps: the last one may have its own."""
    last = step >= config.num_iterations
    return (config.validation_window if last else 0) or window_blocks_at(step, config)


def short_window(window_blocks: Any, config: Any) -> Any:
    """The short window that goes with a long one, in blocks; numbers or integer tensors."""
    half, most = window_blocks // 2, config.short_window_max
    if not most:
        return half
    return min(half, most) if isinstance(half, int) else half.clamp(max=most)


@functools.lru_cache(maxsize=64)
def window_changes(config: Any) -> tuple[tuple[int, int], ...]:
    """((first step, long window in blocks from it on), ...) of a `window_schedule` over the run."""
    firsts = sorted({-(-twelfth * scheduled(config) // PARTS) for twelfth in range(PARTS)})
    windows = [(first, window_blocks_at(first, config)) for first in firsts if first < config.num_iterations]
    return tuple(now for before, now in zip([(0, 0), *windows], windows) if now[1] != before[1])


def yarn_at(step: int, config: Any, frequencies: Sequence[float]) -> tuple[list[float], float]:
    """Rotary frequencies (radians a token) and the factor on attention's scale at a step.

    When the window grows from W to W' blocks, frequencies that turn less than once in the old window are lowered by
    W / W', those that turn more than 32 times stay, others in between; and logits are scaled by 1 + 0.2 ln(W' / W).
    `yarn_until` blocks: the largest W' that this is done for; 0: all; -1: none."""
    changes = [blocks for first, blocks in window_changes(config) if first <= step]
    frequencies, scale = list(frequencies), 1.0
    for old, new in itertools.pairwise(changes):
        if config.yarn_until < 0 or 0 < config.yarn_until < new:
            continue
        for i, frequency in enumerate(frequencies):
            turns = config.block_tokens * old * frequency / (2 * math.pi)
            keep = min(max((turns - 1) / 31, 0.0), 1.0)
            frequencies[i] = frequency * (old / new + keep * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return frequencies, scale


# ---- The tied head -------------------------------------------------------------------------------------------


def split_step(config: Any) -> int:
    """The step after whose update the input embedding leaves the head and goes on alone: the first on which Adam
    updates, `tie_embeddings_frac` of the schedule done. -1: they are two from the start, as in a run that begins with
    the weights of another one."""
    if not config.tie_embeddings_frac or config.init_from:
        return -1
    first = math.ceil(config.tie_embeddings_frac * scheduled(config) - 1e-9)
    return next(step for step in range(first, first + config.adam_every) if adam_steps(step, config))


# ---- Checks --------------------------------------------------------------------------------------------------


def check(config: Any) -> None:
    """Raise UsageError for schedules that make no sense, naming the field."""
    c = config
    if c.extension_steps >= c.num_iterations:
        raise UsageError(f"--extension_steps={c.extension_steps}: fewer than --num_iterations={c.num_iterations}")
    if not _listed(c, "lr_schedule", float):
        raise UsageError("--lr_schedule is empty: 1 is a constant rate")
    if not _listed(c, "window_schedule", int) and c.yarn_until >= 0:
        raise UsageError(f"--yarn_until={c.yarn_until} follows the windows of a --window_schedule, and there is none")
    count = sequences(c)
    for tokens in _listed(c, "batch_schedule", int):
        if tokens % count or tokens > c.tokens_per_step:
            raise UsageError(
                f"--batch_schedule={c.batch_schedule}: {tokens} tokens are more than --tokens_per_step="
                f"{c.tokens_per_step}, or do not divide into {count} sequences"
            )


# ---- The whole run -------------------------------------------------------------------------------------------


def phases(config: Any) -> list[dict[str, str]]:
    """The run as rows of words: steps of one batch, window and number of targets, which cool down or do not."""
    c, numbers = config, range(config.num_iterations)
    cooling = lambda step: step / scheduled(c) > 1 - c.cooldown_frac  # noqa: E731
    stages = len(_listed(c, "lr_schedule", float)) - 1

    def kind(step: int) -> tuple:
        graph = len(target_weights(step, c)), sampled_classes_at(step, c)
        fixed = batch_tokens_at(step, c), window_blocks_at(step, c), *graph
        return (*fixed, cooling(step), step >= scheduled(c), min(part(step, c), stages))

    rows = []
    for _, group in itertools.groupby(numbers, kind):
        steps = list(group)
        first, last = steps[0], steps[-1]
        window = window_blocks_at(first, c)
        weights = zip(target_weights(first, c), target_weights(last, c))
        rows.append(
            {
                "steps": f"{first}..{last}",
                "batch": f"{batch_tokens_at(first, c):,}",
                "window": " / ".join(str(w * c.block_tokens) for w in (window, short_window(window, c))),
                "rate": _span(learning_rate_factor(min(first + 1, last), c), learning_rate_factor(last, c)),
                "momentum": _span(muon_momentum_at(first, c), muon_momentum_at(last, c)),
                "targets": " + ".join(_span(*pair) for pair in weights),
                "logits": f"{c.attention_scale * yarn_at(first, c, [])[1]:.4f}",
            }
            | ({"classes": str(sampled_classes_at(first, c) or "all")} if listed_classes(c) else {})
        )
    return rows


def _span(first: float, last: float) -> str:
    """Two numbers as 0.85-0.95, or one if they are the same."""
    begin, end = f"{first:.3g}", f"{last:.3g}"
    return begin if begin == end else f"{begin}-{end}"


def table(config: Any) -> str:
    """`phases` as text, and below it what happens at one step only."""
    rows = phases(config)
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    lines = [[name.rjust(width) for name, width in widths.items()]]
    lines += [[row[name].rjust(width) for name, width in widths.items()] for row in rows]
    last, c = validation_window_at(config.num_iterations, config), config
    windows = " / ".join(str(w * c.block_tokens) for w in (last, short_window(last, c)))
    notes = [
        f"{c.num_iterations} steps of {sequences(c)} sequences, {tokens_until(c.num_iterations, c):,} tokens; "
        f"the last {c.extension_steps} after the end of the schedules",
        f"window: long / short, in tokens; the last validation's {windows}. rate: of all learning rates. momentum: "
        "Muon's. targets: weights of the next tokens in the loss. logits: attention's scale",
    ]
    if c.adam_every > 1:
        notes.append(f"Adam updates after every {c.adam_every} steps, on the sum of their gradients")
    if c.adam_period:
        first = next((step for step in range(c.num_iterations) if stretched(step, c)), c.num_iterations)
        notes.append(f"value and bigram tables from step {first} on after every {c.adam_period}")
    if split_step(c) >= 0:
        notes.append(f"head and input embedding are one until step {split_step(c)}")
    return "\n".join(["  ".join(line).rstrip() for line in lines] + notes)
