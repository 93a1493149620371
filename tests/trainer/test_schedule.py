"""The schedules of trainer/schedule.py against the published description of each run, read literally."""

import dataclasses
import math

import pytest

import train_gpt
from train_gpt import Config, UsageError, parse_config
from trainer import schedule

RECORD18, F2, F3 = (parse_config([f"--preset={name}"]) for name in ("record18", "f2", "f3"))


def literal_factor(step, steps):
    """Record 18's learning-rate factor, as published; `steps` scheduled ones."""
    if step >= steps:
        return 0.1
    x, most = step / steps, 1.0
    for edge, value in ((1 / 12, 1.52), (2 / 12, 1.73), (3 / 12, 2.0)):
        if x > edge:
            most = value
    if x < 0.3:
        return most
    w = (1 - x) / 0.7
    return w * most + (1 - w) * 0.1


def literal_targets(step, steps):
    x = 4 * step / steps
    if x < 1 / 3:
        return 1, 0.5, 0.25 * (1 - 3 * x)
    return (1, 0.5 * (2 - 3 * x)) if x < 2 / 3 else (1,)


def literal_momentum(step):
    if step < 300:
        return 0.85 + 0.1 * step / 300
    return 0.95 - 0.1 * (step - 4690) / 50 if step > 4690 else 0.95


@pytest.mark.parametrize("config, steps", [(RECORD18, 4700), (F2, 4580), (F3, 4125)], ids=["record18", "f2", "f3"])
def test_rates_windows_and_targets_are_the_published_ones(config, steps):
    windows, batches = [3, 7, 11, 13, 15, 17, 19, 21, 23, 23, 23, 23], [131072, 262144, 393216] + [524288] * 9
    assert schedule.scheduled(config) == steps
    for step in range(config.num_iterations):
        twelfth = min(math.floor(12 * step / steps), 11)
        assert schedule.learning_rate_factor(step, config) == pytest.approx(literal_factor(step, steps), abs=1e-12)
        assert schedule.target_weights(step, config) == pytest.approx(literal_targets(step, steps), abs=1e-12)
        window = schedule.window_blocks_at(step, config)
        assert window == windows[twelfth] == schedule.validation_window_at(step, config)
        assert schedule.short_window(window, config) == min(11, windows[twelfth] // 2)
        assert schedule.batch_tokens_at(step, config) == batches[twelfth]
        assert schedule.sequence_tokens_at(step, config) * 8 == batches[twelfth]
    assert schedule.window_blocks_at(config.num_iterations, config) == 23
    last = schedule.validation_window_at(config.num_iterations, config)
    assert (last, schedule.short_window(last, config)) == (27, 11)


@pytest.mark.parametrize(
    "config, split, three, two, tokens",
    [(RECORD18, 785, 391, 783, 2.18e9), (F2, 765, 381, 763, 2.12e9), (F3, 689, 343, 687, 1.91e9)],
    ids=["record18", "f2", "f3"],
)
def test_derived_numbers_of_the_published_runs(config, split, three, two, tokens):
    """Splitting step, last steps with three and with two targets, tokens by the sum over the steps."""
    assert schedule.split_step(config) == split
    counts = [len(schedule.target_weights(step, config)) for step in range(config.num_iterations)]
    assert (counts.count(3), counts.count(3) + counts.count(2)) == (three + 1, two + 1)
    assert counts == sorted(counts, reverse=True)
    summed = sum(schedule.batch_tokens_at(step, config) for step in range(config.num_iterations))
    assert summed == schedule.tokens_until(config.num_iterations, config) == pytest.approx(tokens, rel=0.005)
    so_far = 0
    for step in range(0, config.num_iterations):
        assert step % 97 or schedule.tokens_until(step, config) == so_far
        so_far += schedule.batch_tokens_at(step, config)


def test_momentum_rises_and_falls_as_published():
    for step in range(4740):
        assert schedule.muon_momentum_at(step, RECORD18) == pytest.approx(literal_momentum(step), abs=1e-12)


def test_adam_steps_on_odd_steps_and_the_tables_part_on_one():
    assert [step for step in range(8) if schedule.adam_steps(step, RECORD18)] == [1, 3, 5, 7]
    assert all(schedule.adam_steps(step, Config()) for step in range(8))
    assert schedule.split_step(Config()) == -1
    for steps in range(30, 60):
        config = dataclasses.replace(RECORD18, num_iterations=steps + 40)
        assert schedule.split_step(config) == math.ceil(steps / 6) | 1


def literal_yarn(frequencies, windows):
    scale = 0.1
    for old, new in windows:
        for i, f in enumerate(frequencies):
            u = min(max((128 * old * f / (2 * math.pi) - 1) / 31, 0), 1)
            frequencies[i] = f * (old / new + u * (1 - old / new))
        scale *= 1 + 0.2 * math.log(new / old)
    return frequencies, scale


def test_yarn_follows_the_window():
    base = [(1 / 1024) ** (i / 31) for i in range(32)] + [0.0] * 32
    wanted = {0: [], 391: [], 392: [(3, 7)], 784: [(3, 7), (7, 11)], 1175: [(3, 7), (7, 11), (11, 13)]}
    wanted[1566] = wanted[4740] = wanted[1175]
    for step, changes in wanted.items():
        frequencies, factor = schedule.yarn_at(step, RECORD18, base)
        literal, scale = literal_yarn(list(base), changes)
        assert frequencies == pytest.approx(literal, rel=1e-12)
        assert 0.1 * factor == pytest.approx(scale, rel=1e-12)
    scales = [round(0.1 * schedule.yarn_at(step, RECORD18, base)[1], 4) for step in (0, 392, 784, 1175, 4740)]
    assert scales == [0.1, 0.1169, 0.1275, 0.1318, 0.1318]
    always = dataclasses.replace(RECORD18, yarn_until=0)
    assert round(0.1 * schedule.yarn_at(4740, always, base)[1], 4) == 0.1475
    assert schedule.yarn_at(5690, Config(), base) == (base, 1.0)
    assert max(base) == 1.0 and schedule.yarn_at(4740, always, base)[0][0] == pytest.approx(1.0)  # it turns often


def test_documents_may_be_cut_shorter_in_the_first_third():
    assert schedule.document_tokens(RECORD18) == [(0, 4096)]
    early = dataclasses.replace(RECORD18, early_document_tokens=896)
    assert schedule.document_tokens(early) == [(0, 896), (1567, 4096)]  # the first step of the fifth twelfth
    assert (schedule.part(1566, early), schedule.part(1567, early)) == (3, 4)
    assert schedule.document_tokens(dataclasses.replace(early, max_document_tokens=0))[1][1] > 10**9


def test_medium_has_one_shape_and_record_18_four():
    assert schedule.shapes(Config()) == {(65536, 1, 0): 0}
    assert schedule.shapes(RECORD18) == {(16384, 3, 0): 0, (32768, 2, 0): 392, (49152, 1, 0): 784, (65536, 1, 0): 1175}
    assert schedule.sequence_lengths(Config()) == [(0, 65536)]
    assert schedule.sequence_lengths(RECORD18) == [(0, 16384), (392, 32768), (784, 49152), (1175, 65536)]


@pytest.mark.parametrize("steps", [1, 2, 5, 11, 12, 13, 30])
def test_runs_shorter_than_their_lists_have_every_shape_that_occurs(steps):
    config = dataclasses.replace(RECORD18, num_iterations=steps, extension_steps=0)
    seen: dict[tuple[int, int, int], int] = {}
    for step in range(steps):
        shape = schedule.sequence_tokens_at(step, config), len(schedule.target_weights(step, config)), 0
        seen.setdefault(shape, step)
    assert schedule.shapes(config) == seen
    lengths = schedule.sequence_lengths(config)
    by_step = [next(n for first, n in reversed(lengths) if first <= step) for step in range(steps)]
    assert by_step == [schedule.sequence_tokens_at(step, config) for step in range(steps)]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--batch_schedule=1024,x"], "one a twelfth"),
        (["--batch_schedule=1001"], "do not divide into 8"),
        (["--batch_schedule=1048576"], "more than --tokens_per_step=524288"),
        (["--lr_schedule="], "1 is a constant rate"),
        (["--lr_schedule=1,-2"], "one a twelfth"),
        (["--lr_schedule=1,nan"], "one a twelfth"),
        (["--window_schedule=3,7.5"], "one a twelfth"),
        (["--window_schedule=1,2,3,4,5,6,7,8,9,10,11,12,13"], "at most 12"),
        (["--extension_steps=5690"], "fewer than --num_iterations=5690"),
        (["--mtp=4"], "at most 3"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        parse_config(words)


def test_the_presets_differ_in_schedules_as_published():
    assert {name: train_gpt.PRESETS[name]["num_iterations"] for name in ("record18", "f2", "f3")} == dict(
        record18=4740, f2=4620, f3=4150
    )
    assert (RECORD18.extension_steps, F2.extension_steps, F3.extension_steps) == (40, 40, 25)


def test_windows_of_a_run_of_any_length():
    """The steps at which the window changes are those that a walk over all steps finds; a long run costs no walk."""
    for steps, windows in ((4740, "3,7,11,13"), (7, "1,1,2"), (13, "5"), (100, "1,2,1,2,2")):
        config = dataclasses.replace(RECORD18, num_iterations=steps, window_schedule=windows, extension_steps=0)
        walked = [schedule.window_blocks_at(step, config) for step in range(steps)]
        changes = tuple((s, w) for s, w in enumerate(walked) if s == 0 or walked[s - 1] != w)
        assert schedule.window_changes(config) == changes
    endless = dataclasses.replace(RECORD18, num_iterations=2**31 - 1)
    assert len(schedule.window_changes(endless)) == 9
    with pytest.raises(UsageError, match="--yarn_until=0 follows the windows of a --window_schedule"):
        parse_config(["--yarn_until=0"])
