"""Copies of runs: by their steps' own numbers, by parallel curves, across series; and which programs are one."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from bench.corpus import accused, make_corpus
from stats.chance import ACCUSED_BELOW, near_across, nearest_pairs, noise_of
from stats.cli import main
from stats.program import _statements, essence
from stats.series import Series, find_series, load_series
from stats.validate import validate, validate_each

REPO = Path(__file__).resolve().parents[2]


def told(capsys, *words):
    """(exit code, what is printed as JSON)."""
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def findings(capsys, folder, *checks):
    """{series: texts of the findings of these checks}."""
    _, result = told(capsys, "validate", folder)
    return {
        one["series"]: [f["text"] for f in one["findings"] if f["check"] in checks] for one in result["assessments"]
    }


def log(rng, final, *, steps=200, every=200, train_loss=True, digits=4):
    """A log with a clock that is uneven, as real ones are."""
    clock, lines = 0.0, []
    for step in range(1, steps + 1):
        clock += rng.normal(227, 3)
        loss = f"train_loss:{4 - step / 100 + rng.normal(0, 0.05):.4f} " if train_loss else ""
        lines.append(f"step:{step}/{steps} {loss}train_time:{clock:.0f}ms step_avg:{clock / step:.2f}ms")
        if step % every == 0:
            value = final + 3 * (1 - step / steps) + rng.normal(0, 0.002 + 0.02 * (1 - step / steps))
            lines.append(re.sub(r"^(\S+) (train_loss:\S+ )?", rf"\1 val_loss:{value:.{digits}f} ", lines[-1]))
    return "\n".join(lines) + "\n"


def fill(folder, runs=6, seed=1, **settings):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for run in range(runs):
        (folder / f"r{run}.txt").write_text(log(rng, 2.91, **settings))
    return folder


# ----------------------------------------------------------------------------------------------------
# One validation is enough


def test_honest_runs_of_one_validation_are_not_accused(tmp_path, capsys):
    assert findings(capsys, fill(tmp_path / "s"), "duplicates", "copied") == {"s": []}


@pytest.mark.parametrize("kept", ["everything", "step times", "training losses"])
def test_a_copy_with_one_validation_is_found_by_its_steps(kept, tmp_path, capsys):
    """Its only validation is another one; its steps' times, their losses, or both are still those of the other run."""
    folder = fill(tmp_path / "s")
    text = (folder / "r2.txt").read_text()
    text = re.sub(r"val_loss:\S+", "val_loss:2.9051", text)
    if kept == "step times":
        text = re.sub(r"train_loss:\d\.(\d)\d+", r"train_loss:3.\g<1>777", text)
    elif kept == "training losses":  # a clock that runs half a percent quicker throughout
        text = re.sub(r"train_time:(\d+)", lambda m: f"train_time:{int(m[1]) * 199 // 200}", text)
        text = re.sub(r"step_avg:([\d.]+)", lambda m: f"step_avg:{float(m[1]) * 0.995:.2f}", text)
    (folder / "r4.txt").write_text(text)
    found = findings(capsys, folder, "duplicates")["s"]
    assert len(found) == 1 and found[0].startswith("r4 and r2 are the same run: every "), found
    assert ("step time" in found[0]) == (kept != "training losses")
    assert ("training loss" in found[0]) == (kept != "step times")


def test_clocks_that_a_rule_makes_accuse_nobody(tmp_path, capsys):
    """Times in equal strides (a simulator, a coarse clock) are no evidence of a copy."""
    folder = tmp_path / "s"
    folder.mkdir()
    for run in range(4):
        lines = [f"step:{s}/200 train_time:{s * 227}ms step_avg:227.00ms" for s in range(1, 201)]
        lines.append(f"step:200/200 val_loss:2.91{run}7 train_time:{200 * 227}ms step_avg:227.00ms")
        (folder / f"r{run}.txt").write_text("\n".join(lines) + "\n")
    assert findings(capsys, folder, "duplicates") == {"s": []}


def test_a_clock_that_is_steady_in_each_run_accuses_nobody(tmp_path, capsys):
    """Twelve runs of which two have one speed, to the digit: every time of theirs is equal, which is one accident,
    not sixteen."""
    folder = tmp_path / "s"
    folder.mkdir()
    rng = np.random.default_rng(4)
    for run in range(12):
        speed = 50 + (run % 11) / 100
        lines = []
        for step in range(20, 321, 20):
            loss = 2.91 + (320 - step) / 100 + rng.normal(0, 0.002)
            clock = f"train_time:{step * speed:.0f}ms step_avg:{speed:.2f}ms"
            lines.append(f"step:{step}/320 val_loss:{loss:.4f} {clock}\n")
        (folder / f"r{run}.txt").write_text("".join(lines))
    assert findings(capsys, folder, "duplicates") == {"s": []}


@pytest.mark.parametrize("jitter", [0.0002, 0.003, 0.01])
def test_training_losses_told_a_little_otherwise_are_found(jitter, tmp_path, capsys):
    """One validation, which is another one, a new clock, every training loss moved by up to a seventh of the noise."""
    folder = fill(tmp_path / "s", 8)
    rng = np.random.default_rng(6)
    text = re.sub(r"val_loss:\S+", "val_loss:2.9051", (folder / "r2.txt").read_text())
    text = re.sub(r"train_loss:(\S+)", lambda m: f"train_loss:{float(m[1]) + jitter * rng.standard_normal():.4f}", text)
    (folder / "r4.txt").write_text(re.sub(r"train_time:(\d+)", lambda m: f"train_time:{int(m[1]) * 199 // 200}", text))
    found = findings(capsys, folder, "duplicates")["s"]
    assert len(found) == 1 and re.match(
        r"r2 and r4 lie \S+ of the noise apart over \d+ training losses: by", found[0]
    ), found


@pytest.mark.parametrize("other, grade", [(True, "C"), (False, "F")])
def test_near_runs_of_one_seed_under_two_recipes_are_told_and_not_condemned(other, grade, tmp_path, capsys):
    """A change that hardly matters, seed by seed; the same with one program for both is a copy."""
    rng = np.random.default_rng(8)
    for name in "ab":
        (tmp_path / name).mkdir()
    for seed in range(6):
        text = log(rng, 2.91, every=10, train_loss=False)
        head = f"lr = {{}}\n{'=' * 100}\nseed:{seed}\n{'=' * 100}\n"
        (tmp_path / "a" / f"{seed}.txt").write_text(head.format(1) + text)
        text = re.sub(r"val_loss:(\S+)", lambda m: f"val_loss:{float(m[1]) + rng.normal(0, 1e-4):.4f}", text)
        text = re.sub(r"train_time:(\d+)", lambda m: f"train_time:{int(m[1]) * 199 // 200}", text)
        (tmp_path / "b" / f"{seed}.txt").write_text(head.format(2 if other else 1) + text)
    _, result = told(capsys, "validate", tmp_path)
    found = [
        (one["series"], f["grade"]) for one in result["assessments"] for f in one["findings"] if f["check"] == "copied"
    ]
    assert found == [("b", grade)], result


def test_a_series_told_again_with_other_validations_is_a_copy(tmp_path, capsys):
    """Under a new name, its validations lowered, its steps as they were."""
    shutil.copytree(fill(tmp_path / "a"), tmp_path / "b")
    fill(tmp_path / "c", seed=2)
    for number, path in enumerate(sorted((tmp_path / "b").iterdir())):
        path.write_text(re.sub(r"val_loss:(\S+)", f"val_loss:2.90{number}3", path.read_text()))
    found = findings(capsys, tmp_path, "copied")
    assert found["a"] == found["c"] == []
    assert len(found["b"]) == 1 and found["b"][0].startswith("6 runs (r0, r1, r2) are runs of"), found


def test_one_training_that_was_validated_in_two_ways_is_no_copy_but_is_told(tmp_path, capsys):
    """Two series of one seed each a run: their training losses agree, their clocks and validations do not."""
    fill(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in sorted((tmp_path / "b").iterdir()):
        text = re.sub(r"val_loss:(\S+)", lambda m: f"val_loss:{float(m[1]) - 0.004:.4f}", path.read_text())
        path.write_text(re.sub(r"train_time:(\d+)", lambda m: f"train_time:{int(m[1]) * 199 // 200}", text))
    _, result = told(capsys, "validate", tmp_path)
    found = [
        (one["series"], f["grade"], f["text"])
        for one in result["assessments"]
        for f in one["findings"]
        if f["check"] == "copied"
    ]
    assert [(name, grade) for name, grade, _ in found] == [("b", "C")], found
    assert "have every training loss of runs of" in found[0][2]


# ----------------------------------------------------------------------------------------------------
# Parallel curves


@pytest.mark.parametrize("shift", [-0.003, 0.0007, 0.05])
def test_a_curve_that_was_shifted_is_found(shift, tmp_path, capsys):
    """Every loss lowered or raised by one number, new times: the curve runs parallel to the other."""
    folder = fill(tmp_path / "s", 8, every=10, train_loss=False)
    rng = np.random.default_rng(3)
    text = re.sub(r"val_loss:(\S+)", lambda m: f"val_loss:{float(m[1]) + shift:.4f}", (folder / "r2.txt").read_text())
    ahead = np.cumsum(rng.integers(1, 9, 300))
    text = re.sub(
        r"step:(\d+)/(.*?)train_time:(\d+)",
        lambda m: f"step:{m[1]}/{m[2]}train_time:{int(m[3]) + ahead[int(m[1])]}",
        text,
    )
    (folder / "r5.txt").write_text(text)
    found = findings(capsys, folder, "duplicates")["s"]
    assert len(found) == 1 and found[0].startswith("r2 and r5 run parallel, "), found


def test_no_honest_series_is_accused_of_parallel_curves():
    """The four looks of `validate` at 400 series: noise of any memory, rounded as logs are."""
    rng, found = np.random.default_rng(17), 0
    for _ in range(400):
        shape, digits = (int(rng.integers(3, 41)), int(rng.integers(6, 61))), int(rng.choice([4, 6]))
        x = np.round(curves(rng, *shape, float(rng.choice([0, 0.5, 0.9, 0.99]))), digits)
        for part in (x, x[:, : shape[1] // 2]):
            found += any(nearest_pairs(look, 4, 10.0**-digits) for look in (part, np.diff(part)))
    assert found == 0


def test_the_search_across_series_loses_no_pair():
    """Against a plain loop over all pairs: series of unlike noise, of which some tell nothing at some steps."""
    rng, total = np.random.default_rng(5), 0
    for _ in range(30):
        series = []
        for _ in range(int(rng.integers(2, 6))):
            scale = rng.uniform(0.001, 0.02) * np.linspace(1, 0.2, 20)
            scale[rng.random(20) < 0.1] = 0
            series.append(3 + scale * rng.standard_normal((int(rng.integers(3, 8)), 20)))
        series[-1][0] = series[0][1] + 1e-5 * rng.standard_normal(20)
        noises = [noise_of(x, 1e-7) for x in series]
        runs = sum(len(x) for x, noise in zip(series, noises) if noise)
        expected = set()
        for i, x in enumerate(series):
            for j in range(i + 1, len(series)):
                if noises[i] is None or noises[j] is None:
                    continue
                scale = np.minimum(noises[i].scale, noises[j].scale)
                told_at, freedom = scale > 0, min(noises[i].freedom, noises[j].freedom)
                for a, one in enumerate(x):
                    for b, other in enumerate(series[j]):
                        square = float((((one - other)[told_at] / scale[told_at]) ** 2).mean())
                        chance = scipy.stats.chi2.cdf(freedom * square, freedom) * runs * (runs - 1) / 2
                        if told_at.sum() >= 4 and chance < ACCUSED_BELOW:
                            expected.add((i, j, a, b))
        assert {(i, j, near.first, near.second) for i, j, near in near_across(series, grid=1e-7)} == expected
        total += len(expected)
    assert total >= 20


def test_a_corpus_of_many_folders_holds_one_copy(tmp_path, capsys):
    """What `bench.corpus` measures, small: the copied folder is accused, no other."""
    make_corpus(tmp_path / "c", 40, 8)
    code, result = told(capsys, "validate", tmp_path / "c")
    assert code == 1 and len(result["assessments"]) == 8
    assert [name[:3] for name in accused(result)] == ["007"]
    refused = [f["text"] for one in result["assessments"] for f in one["findings"] if f["check"] == "logs"]
    assert all("complete logs of one configuration" in text for text in refused), refused


# ----------------------------------------------------------------------------------------------------
# Near and equal curves


def curves(rng, runs, points, memory):
    """Honest loss curves: noise that remembers, as the noise between runs does."""
    noise = rng.standard_normal((runs, points))
    for step in range(1, points):
        noise[:, step] = memory * noise[:, step - 1] + np.sqrt(1 - memory**2) * noise[:, step]
    scale = np.linspace(0.02, 0.0008, points)
    return 3 + np.linspace(2, 0, points) + noise * scale


def test_no_honest_series_is_accused():
    """1,000 series of 3 to 40 runs and 4 to 60 validations, noise of any memory, rounded as logs are."""
    rng = np.random.default_rng(7)
    accused = 0
    for _ in range(1000):
        shape = int(rng.integers(3, 41)), int(rng.integers(4, 61))
        x = np.round(curves(rng, *shape, float(rng.choice([0, 0.5, 0.9, 0.99]))), int(rng.choice([4, 6])))
        accused += any(near.chance < ACCUSED_BELOW for near in nearest_pairs(x))
    assert accused == 0


@pytest.mark.parametrize("jitter", [0.0, 1e-3, 1e-2])
def test_a_jittered_copy_stands_out(jitter):
    rng = np.random.default_rng(1)
    x = curves(rng, 12, 46, 0.5)
    x[7] = x[2] + jitter * np.linspace(0.02, 0.0008, 46) * rng.standard_normal(46)
    near = nearest_pairs(x)[0]
    assert {near.first, near.second} == {2, 7} and near.chance < ACCUSED_BELOW
    assert 0.5 * jitter <= near.ratio <= 1.6 * jitter + 1e-9


def test_a_copy_with_a_new_end_stands_out(tmp_path, make_log):
    """A run's curve under another seed, its last losses made anew."""
    for seed in range(8):
        text = make_log(2.9180 + seed * 1e-4, seed=seed, steps=320, every=20)
        (tmp_path / f"{seed}.txt").write_text(re.sub(r"train_loss:\S+ ", "", text))
    text = (tmp_path / "5.txt").read_text().replace('"seed": 5', '"seed": 3')

    def moved(match):
        return (
            f"{match[1]}{float(match[2]) + 0.003 * (int(match[3]) % 7 - 3):.6f} train_time:{int(match[3]) * 51 // 50}"
        )

    late = r"(step:(?:2[4-9]\d|3\d\d)/320 val_loss:)(\d\.\d+) train_time:(\d+)"
    (tmp_path / "3.txt").write_text(re.sub(late, moved, text))
    found = [f.text for f in validate(load_series(tmp_path)).findings if f.check == "duplicates"]
    assert len(found) == 1 and found[0].startswith("3 and 5 lie 0 of the noise apart over the first 8 validations"), (
        found
    )


def test_equal_losses_by_accident_accuse_nobody():
    """400 honest series of few validations and few digits, where equal curves are no rarity."""
    from stats.copies import within
    from stats.values import Run, Validation

    rng, equal = np.random.default_rng(5), 0
    for _ in range(400):
        n, points = int(rng.integers(5, 31)), int(rng.integers(1, 4))
        losses = np.round(2.92 + 0.001 * rng.standard_normal((n, points)), 4)
        equal += len({tuple(row) for row in losses.tolist()}) < n
        runs = tuple(
            Run(
                f"{i}.txt",
                str(i),
                "steps",
                1,
                60,
                60,
                0,
                tuple(Validation(20 * (j + 1), float(x), None, None, 4, j + 1) for j, x in enumerate(row)),
            )
            for i, row in enumerate(losses)
        )
        series = Series("s", "s", runs)
        assert not list(within(series, None))
    assert equal > 100, "accidents do happen here"


def renamed_with_other_digits(folder, jitter, rng):
    """Every loss and time of a folder's logs told a little otherwise."""
    for log in folder.glob("*.txt"):

        def told(match):
            loss = float(match[2]) + jitter * rng.standard_normal()
            return f"{match[1]}{loss:.6f} train_time:{int(match[3]) + int(rng.integers(1, 40))}ms"

        log.write_text(re.sub(r"(val_loss:)(\d\.\d{6}) train_time:(\d+)ms", told, log.read_text()))


def test_a_whole_series_copied_under_a_new_name_with_other_digits_is_found(tmp_path, make_log):
    rng = np.random.default_rng(9)
    for name, shift in (("a", 0), ("honest", 50)):
        (tmp_path / name).mkdir()
        for seed in range(6):
            text = make_log(2.918 + 1e-4 * seed, seed=seed + shift, steps=320, step_ms=50 + (seed + shift) / 7)
            (tmp_path / name / f"{seed}.txt").write_text(re.sub(r"train_loss:\S+ ", "", text))
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    renamed_with_other_digits(tmp_path / "copy", 1e-5, rng)
    grades = {one.series: one for one in validate_each(find_series([tmp_path])).assessments}
    copied = {name: [f.text for f in one.findings if f.check == "copied"] for name, one in grades.items()}
    assert copied["a"] == copied["honest"] == []
    assert len(copied["copy"]) == 1 and "of the noise of runs of" in copied["copy"][0], copied


# ----------------------------------------------------------------------------------------------------
# Programs

TRICKY = [
    'x = """\nimport os\ny = 1\n"""\nz = 2\n',
    "if a:\n    b()\nelse:\n    c()\nd = (\n1,\n)\n",
    "try:\n    a()\nexcept E:\n    b()\nfinally:\n    c()\n",
    "@decorated\n# a word\n@twice\ndef f():\n    pass\n",
    "a = 1 + \\\nb\nfor i in x:\n    pass\nelse:\n    y = 1\n",
    "async def f():\n    pass\n'a word'\nclass A:\n    '''told'''\n    seed = 3\n",
    "from __future__ import annotations\nmatch = 3\nmatch x:\n    case 1:\n        pass\n",
]


@pytest.mark.parametrize("text", TRICKY + [path.read_text() for path in sorted((REPO / "stats").glob("*.py"))])
def test_statements_one_by_one_are_the_program(text):
    whole = _statements(text)
    assert whole is not None
    assert list(filter(None, essence(text).split("\n"))) == list(filter(None, whole.split("\n")))


@pytest.mark.parametrize("text", ["x = (1,\ny = 2\n", "def f(:\n    pass\n", "a = 1\nelse:\n    b = 2\n", "x = 1\n\0"])
def test_what_is_no_program_has_no_essence(text):
    assert essence(text) is None


@pytest.mark.parametrize("start", ["", "=" * 100 + "\n", "\n\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_programs_are_compared_however_the_log_begins(start, encoding, newline, tmp_path, capsys):
    """Two logs whose sources differ in a run's name; a ruler, blank lines or a mark may stand above them."""
    for number in range(3):
        source = f'import torch\nrun_id = "{number}"\n   \nlr = 0.02\n\n'
        text = (
            start + source + "=" * 100 + f"\nstep:9/9 val_loss:2.91{number} train_time:9{number}ms step_avg:10.00ms\n"
        )
        (tmp_path / f"{number}.txt").write_bytes(text.replace("\n", newline).encode(encoding))
    assert main(["ttest", str(tmp_path)]) == 0, capsys.readouterr().err


def test_a_long_string_at_the_left_edge_is_one_statement():
    text = 'kernel = """\n' + "line\n" * 3000 + '"""\nlr = {}\n'
    assert essence(text.format(1)) == essence(text.format(1) + "# a word\n") != essence(text.format(2))


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_code_hashes_of_a_table_are_believed(ending, tmp_path, capsys):
    """A table is no program: that its text can be read as one does not make two code hashes one."""
    rows = [{"run": f"r{i}", "loss": 2.91 + i / 1e3, "code_hash": "ab"[i % 2] * 8} for i in range(4)]
    path = tmp_path / f"t{ending}"
    if ending == ".csv":
        path.write_text("run,loss,code_hash\n" + "".join(",".join(map(str, row.values())) + "\n" for row in rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)) if ending == ".jsonl" else json.dumps(rows))
    assert main(["ttest", str(path)]) == 3
    assert "2 different programs (code hash): aaaaaaaa in r0, r2, bbbbbbbb in r1, r3" in capsys.readouterr().err


def test_a_kept_source_that_is_not_the_one_of_its_name_makes_two_programs_no_one(tmp_path, capsys):
    """Two logs of two programs; whoever writes one text into both files under source/ has not made them alike."""
    for name in "ab":
        (tmp_path / "source").mkdir(exist_ok=True)
        (tmp_path / "runs").mkdir(exist_ok=True)
        digest = name * 64
        (tmp_path / "source" / f"{digest[:16]}.py").write_text("lr = 1\n")
        head = f"source sha256:{digest} kept in source/{digest[:16]}.py\n{'=' * 100}\n{'=' * 100}\n"
        line = f"step:9/9 val_loss:2.91{ord(name)} train_time:9{ord(name)}ms step_avg:10.00ms\n"
        (tmp_path / "runs" / f"{name}.txt").write_text(head + line)
    assert main(["ttest", str(tmp_path)]) == 3
    assert "2 different programs" in capsys.readouterr().err
