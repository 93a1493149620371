"""Hostile inputs, generated: for each case a right answer or an error of ours; never a library's exception or a hang.

    python -m bench.fuzz --cases 10000 --seed 1          # all kinds; bench/results/fuzz-<device>.json
    python -m bench.fuzz --kind logs --cases 300

Most inputs are damaged good ones: parts are cut, repeated, moved, overwritten, single bits flipped, numbers replaced
by extreme ones. Checkpoints are also made anew with a digest that fits, as somebody would who means harm. Hypothesis
generates, and on a failure finds the smallest case that shows it. bench/fuzz_program.py sends such inputs through the
whole of train_gpt.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import hypothesis
import numpy as np
from hypothesis import strategies as st

from bench.common import REPO, read_result, table, write_result
from trainer.options import command, setting

SLOW_CASE_S = 20.0  # processor time; a case that takes longer counts as a hang
MEMORY_BYTES = 6 << 30  # address space beyond what the process has at the start
EXTREMES = (
    b"0",
    b"-1",
    b"1e999",
    b"-1e999",
    b"nan",
    b"inf",
    b"null",
    b"true",
    b"{}",
    b"[]",
    b'""',
    b"9" * 30,
    b"-" + b"9" * 30,
    b"1e-320",
    b"\xff\xfe",
    b"\x00",
    b"\n",
    b"\r\n",
    b" ",
    b"[" * 3000,
    b"=" * 70 + b"\n",
    b'"\\ud800"',
    b"2147483648",
)


class Wrong(AssertionError):
    """An input that should have been refused was accepted, or the answer is not right."""


# ------------------------------------------------------------------------------------------------------------
# Damage


FRACTION = st.floats(0, 1, exclude_max=True)
OPERATION = st.one_of(
    st.tuples(st.just("flip"), FRACTION, st.integers(0, 7)),
    st.tuples(st.just("cut"), FRACTION),
    st.tuples(st.just("remove"), FRACTION, st.integers(1, 200)),
    st.tuples(st.just("insert"), FRACTION, st.binary(max_size=20)),
    st.tuples(st.just("overwrite"), FRACTION, st.sampled_from(EXTREMES)),
    st.tuples(st.just("repeat"), FRACTION, st.integers(1, 200), FRACTION),
    st.tuples(st.just("number"), FRACTION, st.sampled_from(EXTREMES)),
    st.tuples(st.just("line"), FRACTION, FRACTION),
)
DAMAGE = st.lists(OPERATION, max_size=5)


def damage(data: bytes, operations: list[tuple]) -> bytes:
    """`data` after all operations."""
    for name, where, *more in operations:
        place = int(where * (len(data) + 1))
        if name == "flip" and place < len(data):
            data = data[:place] + bytes([data[place] ^ 1 << more[0]]) + data[place + 1 :]
        elif name == "cut":
            data = data[:place]
        elif name == "remove":
            data = data[:place] + data[place + more[0] :]
        elif name == "insert":
            data = data[:place] + more[0] + data[place:]
        elif name == "overwrite":
            data = data[:place] + more[0] + data[place + len(more[0]) :]
        elif name == "repeat":
            to = int(more[1] * (len(data) + 1))
            data = data[:to] + data[place : place + more[0]] + data[to:]
        elif name == "number":
            data = _replace_number(data, where, more[0])
        elif name == "line":
            lines = data.splitlines(keepends=True)
            if lines:
                line = lines.pop(int(where * len(lines)))
                lines.insert(int(more[0] * (len(lines) + 1)), line)
                data = b"".join(lines)
    return data


def damaged_copy(good: Path, target: Path, files: list[Path], changes: list[tuple]) -> Path:
    """`target`, made anew: the folder `good` with its `files` (relative to it) changed. changes: (number of a file, its
    `damage`; None: the file is gone)."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(good, target)
    for number, operations in changes:
        path = target / files[number % len(files)]
        if operations is None:
            path.unlink(missing_ok=True)
        elif path.exists():
            path.write_bytes(damage(path.read_bytes(), operations))
    return target


def _replace_number(data: bytes, where: float, by: bytes) -> bytes:
    """The number that `where` falls on, or the next one, replaced."""
    digits = b"0123456789.+-"
    start = int(where * len(data))
    while start < len(data) and data[start] not in digits:
        start += 1
    end = start
    while end < len(data) and data[end] in digits:
        end += 1
    while start > 0 and data[start - 1] in digits:
        start -= 1
    return data[:start] + by + data[end:]


# ------------------------------------------------------------------------------------------------------------
# Kinds: each a strategy and a check. A check returns "answer" or "error" (one of ours), or raises.


@dataclass(frozen=True)
class Kind:
    """One sort of input. `make(folder)` prepares what all cases share and returns the check of one case."""

    cases: st.SearchStrategy
    make: Callable[[Path], Callable[[object], str]]


def shards_check(folder: Path):
    """Damaged token shards: refused, or every token as the bytes of the file say."""
    from data.shards import HEADER_BYTES, ShardError, TokenStream, make_header, open_shard

    good = make_header(600) + np.random.default_rng(0).integers(0, 256, 600).astype("<u2").tobytes()
    path = folder / "train.bin"

    def check(operations) -> str:
        data = damage(good, operations)
        path.write_bytes(data)
        try:
            stream = TokenStream(path, sequence_tokens=16, sequences_per_step=4, vocab_size=256)
            inputs, targets = stream.batch(3, 1)
            tokens = open_shard(path, vocab_size=256)
        except ShardError:
            return "error"
        body = np.frombuffer(data[HEADER_BYTES:], dtype="<u2")
        position = (3 * 4 + 1) * 16
        wanted = np.take(body, np.arange(position, position + 17), mode="wrap")
        if not np.array_equal(tokens, body) or not np.array_equal(inputs, wanted[:-1]):
            raise Wrong("other tokens than the file holds")
        if not np.array_equal(targets, wanted[1:]):
            raise Wrong("other targets than the file holds")
        stream.close()
        return "answer"

    return check


def _tiny_checkpoint(folder: Path):
    """(path, texts, tensors) of a small good checkpoint of the trainer."""
    import torch

    import train_gpt
    from trainer.checkpoints import load_tensors, save_tensors

    config = train_gpt.parse_config(
        [
            "--preset=nano",
            "--num_layers=2",
            "--model_dim=16",
            "--num_heads=1",
            "--unet_skips=0>1",
            "--vocab_size=128",
            "--long_window_layers=0",
            "--device=cpu",
            "--tokens_per_step=64",
            "--train_seq_len=32",
        ]
    )
    trainer = train_gpt.Trainer(config, torch.device("cpu"))
    texts = dict(
        format=train_gpt.CHECKPOINT_FORMAT,
        config=json.dumps(asdict(config)),
        step="3",
        run_name="run",
        train_time_s="1.5",
        validation="[]",
        train_loss="[]",
        code_hash="x",
        data_hash="x",
        val_data_hash="x",
    )
    path = folder / "step-000003.safetensors"
    save_tensors(path, trainer.state(), texts)
    return path, *load_tensors(path, train_gpt.CHECKPOINT_FORMAT)


def checkpoints_check(folder: Path):
    """Damaged checkpoint files: refused, unless not one byte of the content differs."""
    import torch

    import train_gpt
    from trainer.checkpoints import CheckpointError, load_tensors

    path, texts, tensors = _tiny_checkpoint(folder)
    good = path.read_bytes()

    def check(operations) -> str:
        path.write_bytes(damage(good, operations))
        try:
            found, values = load_tensors(path, train_gpt.CHECKPOINT_FORMAT)
        except CheckpointError:
            return "error"
        if found != texts or values.keys() != tensors.keys():
            raise Wrong("a damaged checkpoint was accepted")
        if not all(torch.equal(values[name], tensor) for name, tensor in tensors.items()):
            raise Wrong("damaged tensors were accepted")
        return "answer"

    return check


HOSTILE_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 70),
    st.sampled_from([10**9, 2**31, 2**63, 10**30, -(2**63)]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.integers(), max_size=3),
    st.just({"a": {}}),
)
FORGERY = st.lists(
    st.one_of(
        st.tuples(st.just("config"), st.integers(0, 60), HOSTILE_VALUES),
        st.tuples(st.just("text"), st.integers(0, 9), st.text(max_size=12)),
        st.tuples(st.just("drop text"), st.integers(0, 9)),
        st.tuples(st.just("drop tensor"), st.integers(0, 60)),
        st.tuples(st.just("reshape"), st.integers(0, 60), st.sampled_from([(1,), (0,), (2, 2), (1, 1, 1)])),
        st.tuples(st.just("type"), st.integers(0, 60), st.sampled_from(["int64", "bool", "float16", "uint8"])),
        st.tuples(st.just("rename"), st.integers(0, 60), st.text("ab.é", max_size=4)),
    ),
    max_size=3,
)


def forge(texts: dict, tensors: dict, forgery: list[tuple]) -> tuple[dict, dict]:
    """(texts, tensors) of a checkpoint after a FORGERY."""
    import torch

    told, values, fields = dict(texts), dict(tensors), json.loads(texts["config"])
    for what, number, *more in forgery:
        names = sorted(told if "text" in what else fields if what == "config" else values)
        if not names:
            continue
        name = names[number % len(names)]
        if what == "config":
            fields[name] = more[0]
            told["config"] = json.dumps(fields)
        elif what == "text":
            told[name] = more[0]
        elif what == "drop text":
            del told[name]
        elif what == "drop tensor":
            del values[name]
        elif what == "reshape":
            values[name] = torch.zeros(more[0])
        elif what == "type":
            values[name] = values[name].to(getattr(torch, more[0]))
        elif what == "rename":
            values[more[0]] = values.pop(name)
    return told, values


def forged_checkpoints_check(folder: Path):
    """Checkpoints with a digest that fits and content that does not: no model, or one that writes text."""
    import torch

    import train_gpt
    from trainer.checkpoints import CheckpointError, save_tensors

    path, texts, tensors = _tiny_checkpoint(folder)
    trainer = train_gpt.Trainer(train_gpt.checkpoint_config(path, texts), torch.device("cpu"))

    def check(forgery) -> str:
        told, values = forge(texts, tensors, forgery)
        if not values:
            return "answer"
        save_tensors(path, values, told)
        kinds = []
        for use in (_write_text, functools.partial(_go_on, trainer)):
            try:
                use(path)
                kinds.append("answer")
            except CheckpointError:
                kinds.append("error")
        return "answer" if kinds == ["answer", "answer"] else "error"

    return check


def _write_text(path: Path) -> None:
    """Load a model and sample from it, as `train_gpt.py sample` does."""
    import train_gpt
    from trainer.sample import generate

    model, _ = train_gpt.load_model(path)
    list(generate(model, [5, 6], 2, temperature=0))


def _go_on(trainer, path: Path) -> None:
    """Resume from the checkpoint, as `--resume=PATH` does."""

    import train_gpt
    from trainer.checkpoints import find_run, read_run

    c = trainer.config = dataclasses.replace(trainer.config, resume=str(path))
    found = find_run(c.resume, path.parent, train_gpt.CHECKPOINT_FORMAT)

    def config_of(path, texts) -> dict:
        return dataclasses.asdict(train_gpt.checkpoint_config(path, texts)) | {"resume": c.resume}

    done, _ = read_run(found, dataclasses.asdict(c), config_of, trainer.layout(), {})
    step, seconds, validation, losses = done
    if not (0 <= step <= trainer.config.num_iterations and seconds >= 0):
        raise Wrong(f"resumed at step {step} after {seconds} s")
    json.dumps([validation, losses], allow_nan=False)


def good_log(steps: int = 20, every: int = 5, seed: int = 0) -> bytes:
    """A small log in the speedrun's dialect."""
    lines = ['print("step:3/20 val_loss:1.5")', "=" * 100, "Running Python 3.11", "seed:1", "=" * 100]
    noise = np.random.default_rng(seed)
    for step in range(steps + 1):
        if step:
            lines.append(f"step:{step}/{steps} train_time:{100 * step}ms step_avg:100.00ms")
        if step % every == 0:
            loss = 3 - step / 20 + noise.normal() / 1000
            lines.append(f"step:{step}/{steps} val_loss:{loss:.6f} train_time:{100 * step}ms step_avg:100.00ms")
    return ("\n".join([*lines, "peak memory allocated: 100 MiB reserved: 120 MiB"]) + "\n").encode()


def logs_check(folder: Path):
    """Damaged logs: a run's result is only what stands in the log at its planned step."""
    from stats.errors import StatsError
    from stats.series import read_runs
    from stats.values import final_validation

    path = folder / "run.txt"

    def check(operations) -> str:
        data = damage(good_log(), operations)
        path.write_bytes(data)
        try:
            point, run = None, None
            for run in read_runs(path):
                point = final_validation(run)
        except StatsError:
            return "error"
        if point is not None and run.dialect == "steps":
            start = f"step:{run.planned_steps}/{run.planned_steps} ".encode()
            lines = [line for line in data.splitlines() if line.startswith(start) and b"val_loss:" in line]
            values = [line.split(b"val_loss:")[1].split()[0].decode() for line in lines]
            if not any(float(value) == point.loss or value == "nan" for value in values):
                raise Wrong(f"result {point.loss}, but the log says {values}")
        return "answer"

    return check


def plans_check(folder: Path):
    """Damaged plan files: refused, unless the plan is the one whose hash the file carries."""
    from stats.errors import StatsError
    from stats.planfile import read_plan, write_plan
    from stats.plans import make_plan

    path = folder / "plan.json"
    plan = make_plan()
    write_plan(plan, path)
    good = path.read_bytes()

    def check(operations) -> str:
        path.write_bytes(damage(good, operations))
        try:
            found = read_plan(path)
        except StatsError:
            return "error"
        if found != plan and b'"hash"' in path.read_bytes() and json.loads(path.read_bytes()).get("hash") is not None:
            raise Wrong("a changed plan was accepted with its old hash")
        return "answer"

    return check


def plan_values_check(folder: Path):
    """Plans without a hash, their fields replaced: refused, or such that the sequential test can use them."""
    from stats.errors import StatsError
    from stats.planfile import read_plan
    from stats.plans import make_plan
    from stats.sequential import decide

    path = folder / "plan.json"
    fields = asdict(make_plan())

    def check(changes) -> str:
        names = sorted(fields)
        changed = fields | {names[number % len(names)]: value for number, value in changes}
        path.write_text(json.dumps(changed))
        try:
            decide([2.9194, 2.9197, 2.9193, 2.9195], read_plan(path))
        except StatsError:
            return "error"
        return "answer"

    return check


WORD = st.one_of(
    st.sampled_from(["0", "1", "-1", "2.92", "nan", "inf", "1e999", "9" * 400, "", "true", "=", "--", "-", "\udcff"]),
    st.text(st.characters(exclude_characters="\0"), max_size=6),  # no program can be given a zero byte
)


def other_arguments_check(folder: Path):
    """Command lines of the statistics and of the series runner: their exit codes, nothing else."""
    from records.flags import SeriesFlags, read_flags
    from records.folder import SeriesError
    from records.series import series_from
    from stats.cli import main as stats_main

    (folder / "runs").mkdir(exist_ok=True)
    for seed in range(4):
        (folder / "runs" / f"seed-{seed:03d}.txt").write_bytes(good_log(seed=seed))

    def check(case) -> str:
        program, words = case
        words = [str(folder) if word == "FOLDER" else word for word in words]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            if program == "series":
                overrides: dict[str, str] = {}
                try:
                    _, flags = read_flags(SeriesFlags, words, 0, overrides)
                    series_from(dataclasses.replace(flags, root=str(folder)), overrides)
                except SeriesError:
                    return "error"
                return "answer"
            code = stats_main([program, *words])
        if code not in (0, 1, 2, 3, 4):
            raise Wrong(f"exit code {code}")
        return "error" if code in (2, 3) else "answer"

    return check


STATS_WORDS = st.one_of(
    st.sampled_from(
        "FOLDER FOLDER 2.9191 2.9195 2.92 --alpha=0.01 --alpha=2 --alpha=nan --threshold=2.9 --threshold=inf --json "
        "--stop-step=20 --stop-step=7 --drop=seed-001=power --drop=x --allow-mixed --pooled-sigma --pooled-sigma=-1 "
        "--no-sensitivity --target=1 --target=99 nowhere --plan=nowhere --loss-margin=0 --repeats=3 --nproc=0 "
        "--name=.. --preset=nano --name=x --seed=1 --sequental".split()
    ),
    WORD.filter(lambda word: word not in ("-", ".", "..") and "/" not in word),  # no standard input, no search of /
)
OTHER_ARGUMENTS = st.tuples(
    st.sampled_from(["ttest", "monitor", "compare", "times", "curve", "validate", "series"]),
    st.lists(STATS_WORDS, max_size=4),
)


def tokenizer_check(folder: Path):
    """Input files of the tokenizer: refused, or shards from which every document's bytes come back."""
    from data.shards import open_shard
    from data.tokenize import Settings, TokenizeError, tokenize

    def check(case) -> str:
        name, data, documents = case
        source, out = folder / name, folder / "out"
        source.write_bytes(data)
        shutil.rmtree(out, ignore_errors=True)
        try:
            tokenize([str(source)], Settings(str(out), encoding="bytes", documents=documents))
        except TokenizeError:
            if out.exists() and any(out.iterdir()):
                raise Wrong("an error left files behind") from None
            return "error"
        finally:
            source.unlink()
        tokens = np.concatenate([open_shard(path) for path in sorted(out.glob("train_*.bin"))])
        texts = bytes(tokens.astype(np.uint8)).split(b"\0")[1:]
        if name == "a.txt" and documents == "file" and texts != [data.removeprefix(b"\xef\xbb\xbf")]:
            raise Wrong(f"{data!r} came back as {texts!r}")
        if name == "a.jsonl":
            lines = [line for line in data.decode("utf-8-sig").split("\n") if line.strip()]
            wanted = [text for line in lines if (text := json.loads(line)["text"].encode())]
            if texts != wanted:
                raise Wrong(f"{wanted!r} came back as {texts!r}")
        return "answer"

    return check


JSONL = b'{"text": "One day", "n": 1}\n{"text": "a \\u00e9 b"}\n{"text": ""}\n{"text": "x y"}\n'
PACKED = ("a.txt.gz", "a.txt.bz2", "a.txt.xz", "a.txt.zst", "a.zip")
TOKENIZER_INPUT = st.tuples(
    st.sampled_from(["a.txt", "a.jsonl", "a.parquet", *PACKED]),
    st.one_of(
        st.binary(max_size=100),
        st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
        DAMAGE.map(lambda operations: damage(JSONL, operations)),
        DAMAGE.map(lambda operations: damage(_parquet(), operations)),
        st.tuples(st.sampled_from(PACKED), DAMAGE).map(lambda case: damage(_packed(case[0]), case[1])),
    ),
    st.sampled_from(["file", "line", "blank", "marker"]),
)


@functools.cache
def _parquet() -> bytes:
    import pyarrow
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one", "two", None], "n": [1, 2, 3]}), sink)
    return sink.getvalue()


@functools.cache
def _packed(name: str) -> bytes:
    """A text in two members, streams or frames."""
    import bz2
    import gzip
    import lzma
    import zipfile

    import zstandard

    if name == "a.zip":
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.txt", b"some text " * 20)
            archive.writestr("b.jsonl", JSONL)
        return sink.getvalue()
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstandard.ZstdCompressor().compress}
    return b"".join(pack[name.rpartition(".")[2]](part) for part in (b"some text " * 20, b"more of it " * 20))


def series_check(folder: Path):
    """Damaged series folders: every reader of them says what is wrong, or judges."""
    from records.account import read_account
    from records.folder import SeriesError, read_record
    from records.ledger import Ledger, LedgerError, ledger_summary
    from stats.errors import StatsError
    from stats.judge import judge
    from stats.monitor import monitor
    from stats.planfile import write_plan
    from stats.plans import make_plan
    from stats.series import load_series
    from stats.validate import validate

    good = folder / "good"
    (good / "runs").mkdir(parents=True)
    write_plan(make_plan(threshold=2.0, margin=0.001, sigma=0.001, first_look=9), good / "plan.json")
    (good / "record.json").write_text(json.dumps(dict(threshold=2.01, identity={"name": "good"}, schema=1)))
    for seed in range(4):
        run = f"seed-{seed:03d}"
        (good / "runs" / f"{run}.txt").write_bytes(good_log(seed=seed))
        told = dict(status="finished", run_name=run, seed=seed, final_loss=2.0, config={"target_loss": 2.01})
        (good / "runs" / f"{run}.json").write_text(json.dumps(told))
        Ledger(good).append("launch", run=run, seed=seed, attempt=1, pid=1, host="x")
        Ledger(good).append("end", run=run, attempt=1, status="finished", exit_code=0)
    files = sorted(path.relative_to(good) for path in good.rglob("*") if path.is_file())
    ours = (StatsError, SeriesError, LedgerError)

    def check(changes) -> str:
        bad = damaged_copy(good, folder / "bad", files, changes)
        readers = (
            lambda: judge(load_series(bad), sensitivity=False),
            lambda: monitor(load_series(bad)),
            lambda: validate(load_series(bad)),
            lambda: ledger_summary(Ledger(bad).events()),
            lambda: read_record(bad),
            lambda: read_account(bad),
        )
        errors = 0
        for reader in readers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a skipped ledger line is warned of
                try:
                    reader()
                except ours:
                    errors += 1
        return "error" if errors else "answer"

    return check


KINDS: dict[str, Kind] = {
    "shards": Kind(DAMAGE, shards_check),
    "checkpoints, damaged": Kind(DAMAGE, checkpoints_check),
    "checkpoints, forged": Kind(FORGERY, forged_checkpoints_check),
    "logs": Kind(DAMAGE, logs_check),
    "plan files, damaged": Kind(DAMAGE, plans_check),
    "plan files, hostile values": Kind(
        st.lists(st.tuples(st.integers(0, 60), HOSTILE_VALUES), max_size=3), plan_values_check
    ),
    "command lines of statistics and series": Kind(OTHER_ARGUMENTS, other_arguments_check),
    "tokenizer input": Kind(TOKENIZER_INPUT, tokenizer_check),
    "series folders": Kind(
        st.lists(st.tuples(st.integers(0, 60), st.one_of(st.none(), DAMAGE)), min_size=1, max_size=3), series_check
    ),
}


# ------------------------------------------------------------------------------------------------------------
# Running


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    """Interrupt a case that hangs. By processor time: a busy machine is no hang, and pytest has the other alarm."""

    def ring(number, frame):
        raise Wrong(f"still not done after {SLOW_CASE_S:.0f} s")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SLOW_CASE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def fuzz(name: str, cases: int, seed: int, kinds: dict[str, Kind] = KINDS) -> Counter:
    """Try `cases` cases of a kind; {"answer": n, "error": n}. Raises what the smallest failing case raises."""
    kind, counts = kinds[name], Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        check = kind.make(Path(folder))

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=cases,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            print_blob=False,
        )
        @hypothesis.given(kind.cases)
        def one(case) -> None:
            with _time_limit():
                counts[check(case)] += 1

        one()
    return counts


def keep(rows: list[dict]) -> Path:
    """Put rows into the kept result, each in place of an earlier one of its kind; returns the result's path."""
    before = read_result("fuzz")
    known = {row["input"]: row for row in (before["result"]["kinds"] if before else [])}
    known |= {row["input"]: row | {"date": datetime.date.today().isoformat()} for row in rows}
    return write_result("fuzz", {"kinds": [known[name] for name in KINDS if name in known]})


@dataclass(frozen=True)
class Options:
    """How much is tried."""

    cases: int = setting(10_000, "cases", "of a kind", at_least=1)
    seed: int = setting(1, "seed", "of the cases", at_least=0)
    kind: tuple = setting((), "kind", "only this one", choices=KINDS)


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if nothing was found."""
    _, options = command(__doc__, arguments, Options)
    os.environ["OMP_NUM_THREADS"] = "1"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    rows, failed = [], False
    for name in options.kind or KINDS:
        begin, failures = time.monotonic(), 0
        counts: Counter = Counter()
        try:
            counts = fuzz(name, options.cases, options.seed)
        except Exception:
            import traceback

            traceback.print_exc()
            failures, failed = 1, True
        rows.append(
            {
                "input": name,
                "cases": sum(counts.values()),
                "answers": counts["answer"],
                "errors of ours": counts["error"],
                "failures": failures,
                "seconds": round(time.monotonic() - begin, 1),
                "seed": options.seed,
            }
        )
        print(rows[-1], flush=True)
    print(f"kept in {keep(rows).relative_to(REPO)}")
    print(table(rows))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
