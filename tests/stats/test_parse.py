"""The log parser: public dialects line by line, our own, several runs in a file, and what it refuses."""

import hashlib
import io

import pytest

from stats.errors import DataError
from stats.runs import EmptyLog, parse_log
from stats.series import read_runs
from stats.values import final_validation, is_finished


def _one(text: str):
    (run,) = parse_log(io.BytesIO(text.encode()), "a.txt")
    return run


# (file, runs, step lines, validations of the first run, planned steps, last step,
#  (final step, loss, seconds, decimals))
PUBLIC = [
    ("medium_second_input_embedding.txt", 1, 5690, 47, 5690, 5690, (5690, 2.919956, 1407.511, 6)),
    ("train_loss_nanms.txt", 1, 5100, 42, 5100, 5100, (5100, 3.2755, 721.882, 4)),
    ("truncated.txt", 1, 1555, 7, 1555, 1555, (1500, 3.295, 91.701, 4)),
    ("seconds_extra_keys.txt", 1, 0, 24, 2900, 2860, (2860, 3.28025, 2150.483, 5)),
    ("many_runs_one_file.txt", 11, 0, 39, 3350, 3350, (3350, 3.27874, 496.855, 5)),
    ("llmc_350m.log", 1, 0, 120, None, 29750, (29750, 3.0409, None, 4)),
]


@pytest.mark.parametrize(
    "name, count, step_lines, validations, planned, last, final", PUBLIC, ids=[p[0] for p in PUBLIC]
)
def test_public_logs(shared_data, name, count, step_lines, validations, planned, last, final):
    runs = read_runs(shared_data / "logs" / name)
    run = runs[0]
    assert len(runs) == count
    assert (run.step_lines, len(run.validations)) == (step_lines, validations)
    assert (run.planned_steps, run.last_step) == (planned, last)
    point = run.validations[-1]
    assert (point.step, point.loss, point.time_s, point.decimals) == final
    assert all(run.problems == () for run in runs)


def test_every_result_line_of_the_public_logs_is_read(shared_data):
    for path in sorted((shared_data / "logs").iterdir()):
        lines = path.read_text().splitlines()
        runs = read_runs(path)
        assert sum(run.step_lines + len(run.validations) for run in runs) == sum(
            line.startswith(("step:", "s:")) for line in lines
        )
        for run in runs:
            for point in run.validations:
                told = lines[point.line - 1]
                assert told.startswith((f"step:{point.step}/", f"s:{point.step} "))
                assert f"{point.loss:.{point.decimals}f}" in told


def test_the_reference_run_point_by_point(shared_data):
    (run,) = read_runs(shared_data / "logs" / "medium_second_input_embedding.txt")
    published = {
        0: 10.82584,
        125: 4.290908,
        250: 3.87262,
        500: 3.577053,
        1000: 3.356537,
        1500: 3.258505,
        2000: 3.192431,
        3000: 3.09572,
        4000: 3.018777,
        5000: 2.951173,
        5500: 2.924833,
        5690: 2.919956,
    }
    assert {step: run.losses_by_step[step] for step in published} == published
    final = final_validation(run)
    assert (final.step_avg_ms, run.peak_memory_mib) == (247.37, 53988)
    assert (run.python, run.torch) == ("3.10.12", "2.10.0.dev20250911+cu126")


def test_facts_of_the_other_public_logs(shared_data):
    facts = {}
    for path in (shared_data / "logs").iterdir():
        run = read_runs(path)[0]
        facts[path.name] = (run.torch, run.triton, run.hardware, run.world_size)
    assert facts["seconds_extra_keys.txt"] == ("2.11.0+cu129", None, "NVIDIA L40S", 8)
    assert facts["many_runs_one_file.txt"] == ("2.11.0+cu128", None, "NVIDIA H100 80GB HBM3", 8)
    assert facts["truncated.txt"] == ("2.10.0.dev20251210+cu126", "3.6.0", None, None)
    assert facts["train_loss_nanms.txt"] == ("2.5.0+cu124", None, None, None)


def test_eleven_runs_of_one_file(shared_data):
    runs = read_runs(shared_data / "logs" / "many_runs_one_file.txt")
    finals = [3.27874, 3.2764, 3.27764, 3.27999, 3.27765, 3.27879, 3.27861, 3.27889, 3.27842, 3.27874]
    assert [final_validation(run).loss for run in runs[:10]] == finals
    assert [run.first_line for run in runs[:3]] == [4, 43, 82]
    with pytest.raises(DataError, match=r"many_runs_one_file.txt:400: .*step 750 of 3350"):
        final_validation(runs[10])


def test_a_truncated_run_is_not_finished(shared_data):
    (run,) = read_runs(shared_data / "logs" / "truncated.txt")
    with pytest.raises(DataError, match="step 1500 of 1555 planned, though it trained to step 1555"):
        final_validation(run)
    (run,) = read_runs(shared_data / "logs" / "seconds_extra_keys.txt")
    assert not is_finished(run)
    assert final_validation(run, stop_step=2860).loss == 3.28025
    assert dict(run.validations[-1].extra) == {"ema_beta": "0", "ref_gamma": "-0.075", "ref_step": "2375"}
    with pytest.raises(DataError, match="none at --stop-step 2870"):
        final_validation(run, stop_step=2870)
    (run,) = read_runs(shared_data / "logs" / "llmc_350m.log")
    with pytest.raises(DataError, match="does not say how many steps were planned"):
        final_validation(run)
    assert final_validation(run, stop_step=29750).loss == 3.0409


def test_own_log_with_its_source(make_log):
    run = _one(make_log(2.9, seed=7))
    source = make_log(2.9).split("=" * 100)[0].rstrip("\n") + "\n"
    assert run.code_hash == hashlib.sha256(source.encode()).hexdigest()
    assert (run.seed, run.python, run.torch, run.triton) == (7, "3.11.9", "2.13.0", "3.9.0")
    assert (run.hardware, run.world_size, run.peak_memory_mib) == ("Example CPU", 1, 12)
    assert (run.config_hash, run.data_hash, run.plan_hash) == ("c" * 64, "d" * 64, None)
    assert run.preset == "nano"
    assert final_validation(run).loss == 2.9
    assert run.step_lines == 60 and len(run.validations) == 4  # none of the source's look-alikes


def test_trimmed_log_names_its_source(make_log):
    _, rest = make_log(2.9).split("=" * 100, 1)
    digest = "ab" * 32
    run = _one(f"source sha256:{digest} kept in source/{digest[:16]}.py\n" + "=" * 100 + rest)
    assert run.code_hash == digest
    assert final_validation(run).loss == 2.9


def test_newlines_at_the_end_of_the_source_do_not_count():
    body = "=" * 60 + "\nstep:0/1 val_loss:3.0 train_time:0ms step_avg:nanms\n"
    hashes = {_one("x = 1\n" + "\n" * extra + body).code_hash for extra in range(4)}
    assert hashes == {hashlib.sha256(b"x = 1\n").hexdigest()}
    assert _one("x = 1\n\ny = 2\n" + body).code_hash == hashlib.sha256(b"x = 1\n\ny = 2\n").hexdigest()
    assert _one(body).code_hash is None


def test_sixty_equal_signs_end_the_source_and_fewer_do_not():
    lookalike = "step:9/9 val_loss:1.0 train_time:0ms step_avg:nanms\n"
    run = _one(
        lookalike
        + "=" * 59
        + "\n"
        + lookalike
        + "=" * 60
        + "\n"
        + "step:0/1 val_loss:3.0 train_time:0ms step_avg:nanms\n"
    )
    assert [point.loss for point in run.validations] == [3.0]


def test_seconds_milliseconds_and_nothing():
    text = (
        "step:0/4 val_loss:5.00 train_time:0.5s step_avg:nanms\nstep:4/4 val_loss:4.25 train_time:1500ms step_avg:375ms"
    )
    points = _one(text).validations
    assert [(p.time_s, p.step_avg_ms, p.decimals) for p in points] == [(0.5, None, 2), (1.5, 375.0, 2)]


def test_windows_line_ends(make_log):
    text = make_log(2.9)
    plain, crlf = _one(text), _one(text.replace("\n", "\r\n"))
    assert crlf.validations == plain.validations
    assert crlf.problems == ()


def test_resumed_run_is_one_run(make_log):
    head, body = make_log(2.9).rsplit("=" * 100 + "\n", 1)
    lines = body.splitlines()
    cut = lines.index(next(line for line in lines if line.startswith("step:41/")))
    back = lines.index(next(line for line in lines if line.startswith("step:31/")))
    note = "resumed from the checkpoint of step 30; lines of later steps taken out: 0"
    text = head + "=" * 100 + "\n" + "\n".join([*lines[:cut], note, *lines[back:]]) + "\n"
    run = _one(text)
    assert run.problems == ()
    assert run.losses_by_step == _one(make_log(2.9)).losses_by_step
    without_note = parse_log(io.BytesIO(text.replace(note + "\n", "").encode()), "a.txt")
    assert not any(is_finished(run) for run in without_note)


def test_a_diverged_run_keeps_its_nan():
    run = _one(
        "step:0/2 val_loss:5.0 train_time:0ms step_avg:nanms\nstep:2/2 val_loss:nan train_time:9ms step_avg:4ms\n"
    )
    assert run.problems == ()
    assert final_validation(run).loss != final_validation(run).loss


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda lines: lines[:40] + lines[41:], "step lines jump from"),
        (lambda lines: [*lines[:40], lines[39], *lines[40:]], "a second step line for step"),
        (lambda lines: [line for line in lines if not line.startswith("step:40/60 val")], "validation is missing"),
        (lambda lines: [line.replace("step:33/60", "stfp:33/60") for line in lines], "broken result line"),
        (lambda lines: [line.replace("step:20/60 val_loss:", "step:20/60 val_loss:x") for line in lines], "number"),
        (lambda lines: [line.replace("step:20/60 val_loss:", "step:20/60 val_loss:1e9999 ") for line in lines], "line"),
        (lambda lines: [line.replace("step:33/60", "step:33/61") for line in lines], "61 planned steps, but 60"),
        (lambda lines: lines[30:], "missing before step"),
        (
            lambda lines: [line.replace("60 val_loss", "60 val_loss:2.0 val_loss", 1) for line in lines],
            "not a validation line",
        ),
        (
            lambda lines: [line.replace("step:7/60 train_loss", "step:7/60 brain_loss") for line in lines],
            "not a step line",
        ),
    ],
)
def test_damage_is_named_and_the_run_refused(make_log, damage, words):
    head, body = make_log(2.9, every=10).rsplit("=" * 100 + "\n", 1)
    runs = parse_log(io.BytesIO((head + "=" * 100 + "\n" + "\n".join(damage(body.splitlines()))).encode()), "a.txt")
    assert any(words in problem.text for run in runs for problem in run.problems), [run.problems for run in runs]
    for run in runs:
        with pytest.raises(DataError, match=r"a\.txt:\d+: "):
            final_validation(run)


def test_files_without_a_run(tmp_path):
    for content in (b"", b"\n\n", b"hello\nworld\n", bytes(range(256)) * 40, b"=" * 100 + b"\n"):
        path = tmp_path / "x.txt"
        path.write_bytes(content)
        with pytest.raises(EmptyLog, match=r"x\.txt"):
            read_runs(path)
    path.write_bytes(b"z" * 5_000_000)
    with pytest.raises(DataError, match="more than a megabyte"):
        read_runs(path)


def test_memory_does_not_grow_with_the_log(tmp_path):
    import tracemalloc

    path = tmp_path / "long.txt"
    with open(path, "w") as file:
        file.write("source\n" * 200_000 + "=" * 100 + "\n")
        for step in range(1, 150_001):
            file.write(f"step:{step}/150000 train_time:{step}ms step_avg:1.00ms\n")
        file.write("step:150000/150000 val_loss:3.1 train_time:150000ms step_avg:1.00ms\n")
    assert path.stat().st_size > 8_000_000
    tracemalloc.start()
    (run,) = read_runs(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert run.step_lines == 150_000
    assert peak < 6_000_000


def test_a_last_line_that_is_being_written_does_not_damage_the_run(make_log):
    whole = make_log(2.912345)
    end = whole.index("peak memory")
    finals = set()
    for cut in range(1, 400):
        (run,) = parse_log(io.BytesIO(whole[: end - cut].encode()), "a.txt")
        assert run.problems == (), (cut, run.problems)
        finals.add(final_validation(run).loss if is_finished(run) else None)
    assert finals == {None, 2.912345}  # never a loss with fewer digits
    without_newline = _one(whole[: end - 1])
    assert final_validation(without_newline).loss == 2.912345


def test_the_last_line_of_llmc_is_taken_only_whole():
    text = "".join(f"s:{step} tel:{5 - step / 100:.4f}\n" for step in range(0, 50, 10))
    losses = {_one(text[:-cut]).validations[-1].loss for cut in range(1, 7)}
    assert losses == {4.6, 4.7}


def test_chatter_about_losses_is_no_damage(make_log):
    head, body = make_log(2.9).rsplit("=" * 100 + "\n", 1)
    lines = body.splitlines()
    chatter = [
        "best val_loss so far",
        "val_loss improved, saving",
        "Step time is fine",
        "{'val_loss_every': 20}",
        "peak",
    ]
    run = _one(head + "=" * 100 + "\n" + "\n".join([*chatter, *lines[:30], *chatter, *lines[30:], *chatter]) + "\n")
    assert run.problems == ()
    assert final_validation(run).loss == 2.9
