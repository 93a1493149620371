"""Hostile inputs through the whole of train_gpt.py: each case is a command line that `main` takes to its end.

    python -m bench.fuzz_program --cases 10000 --seed 1    # all kinds in turn; bench/results/fuzz-program-<device>.json
    python -m bench.fuzz_program --kind shards --cases 300

A case ends in one sentence and the exit code 2, 3, 4 or 5, or in the right answer: a run's JSON has the hashes of the
tokens that its files hold, worked out here by other means, and the loss of a model that knows nothing at its start;
damage that changes no content gives what the undamaged gives. Models that would be too much work for a case are only
built, without memory. Cases come in batches, each kept as soon as it is done, so a run that was stopped goes on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from bench.common import read_result, table, write_result
from bench.fuzz import (
    DAMAGE,
    FORGERY,
    JSONL,
    MEMORY_BYTES,
    PACKED,
    WORD,
    Kind,
    Wrong,
    _packed,
    _parquet,
    damage,
    damaged_copy,
    forge,
    fuzz,
)
from trainer.options import command, setting

BATCH = 250
SMALL = """--preset=nano --num_iterations=2 --tokens_per_step=64 --train_seq_len=32 --val_seq_len=32 --val_tokens=64
--val_loss_every=1 --warmup_steps=0 --num_layers=2 --model_dim=16 --num_heads=1 --unet_skips=0>1 --value_embeddings=0
--long_window_layers=0 --block_tokens=16 --window_max_tokens=64 --device=cpu --run_name=run --output_dir=.""".split()
VALIDATION = ("val_seq_len", "val_tokens")
MOST_TOKENS, MOST_WEIGHTS, MOST_WORK = 20_000, 2_000_000, 2e9  # of a case that is trained: tokens, weights, FLOPs


# ------------------------------------------------------------------------------------------------------------
# The program


class Ran(NamedTuple):
    """What a command line came to."""

    code: int
    out: str
    err: str
    folder: Path


def field_of(word: str) -> str:
    """The field that a word of a command line is for."""
    return word.removeprefix("--").partition("=")[0].replace("-", "_")


def small(words: Iterable[str], without: Sequence[str] = ()) -> list[str]:
    """The words of a small run, over them `words`; of a field in both, theirs."""
    words = list(words)
    theirs = {field_of(word) for word in words} | set(without)
    return [word for word in SMALL if field_of(word) not in theirs] + words


class Program:
    """train_gpt.main in this process, each time in an empty folder, and the good files that cases are made of."""

    def __init__(self, folder: Path):
        import train_gpt
        from data.shards import write_shard
        from trainer.program import program_files

        self.main, self.folder, self.data = train_gpt.main, folder, folder / "data"
        train_gpt.program_files = functools.cache(program_files)  # the same for every case, and a quarter of a second
        self.data.mkdir(parents=True)
        self.tokens = {"train": self._drawn(2000, 0), "val": self._drawn(200, 1)}
        for part, tokens in self.tokens.items():
            write_shard(self.data / f"{part}_0.bin", tokens)
        self.words = [f"--{part}_files={self.data}/{part}_*.bin" for part in self.tokens]
        done = self(small([*self.words, f"--output_dir={folder}/done", "--checkpoint_every=1"]))
        if done.code:
            raise Wrong(f"the undamaged run ended with {done.code}: {done.err}")
        self.run = folder / "done"
        self.checkpoint = self.run / "run.checkpoints" / "step-000002.safetensors"

    @staticmethod
    def _drawn(count: int, seed: int) -> np.ndarray:
        tokens = np.random.default_rng(seed).integers(1, 256, size=count).astype(np.uint16)
        tokens[::50] = 0
        return tokens

    def __call__(self, words: Sequence[str], stdin: bytes = b"") -> Ran:
        work = self.folder / "work" / "here"
        shutil.rmtree(work.parent, ignore_errors=True)
        work.mkdir(parents=True)
        before = {number: signal.getsignal(number) for number in _heard()}
        out, err, back = io.StringIO(), io.StringIO(), os.getcwd()
        given, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(stdin))
        os.chdir(work)
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = self.main(list(words))
        finally:
            os.chdir(back)
            sys.stdin = given
            for number, handler in before.items():
                signal.signal(number, handler)
        return Ran(code, out.getvalue(), err.getvalue(), work)

    def settled(self, words: Sequence[str], stdin: bytes = b"") -> Ran | None:
        """The program's answer; None if it refused the input, in a sentence and with one of its exit codes."""
        ran = self(words, stdin)
        if any(told["status"] == "running" for told in summaries(ran.folder)):
            raise Wrong("the program has ended, and its JSON says that it is running")
        if ran.code == 0:
            return ran
        said = [line for line in ran.err.splitlines() if line.startswith("train_gpt.py: ")]
        if ran.code not in (2, 3, 4, 5) or len(said) != 1 or len(said[0]) < 25 or "Traceback" in ran.err:
            raise Wrong(f"exit code {ran.code}: {ran.err}")
        return None


def _heard() -> list[int]:
    return [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1]


def summaries(folder: Path) -> list[dict]:
    """The JSON of every run below a folder."""
    found = []
    for path in folder.rglob("*.json"):
        with contextlib.suppress(ValueError):
            told = json.loads(path.read_text())
            if isinstance(told, dict) and {"status", "config", "validation"} <= told.keys():
                found.append(told)
    return found


# ------------------------------------------------------------------------------------------------------------
# What is right


def chain(tokens: np.ndarray, length: int, sequences: int) -> str:
    """The hash of so many sequences of a stream that begins anew after its end; trainer/evidence.py says how."""
    total = hashlib.blake2b(b"", digest_size=16).digest()
    for number in range(sequences):
        window = np.take(tokens, np.arange(number * length, (number + 1) * length + 1), mode="wrap")
        digest = hashlib.blake2b(window.astype("<u2").tobytes(), digest_size=16).digest()
        total = hashlib.blake2b(total + digest, digest_size=16).digest()
    return total.hex()


def check_run(ran: Ran, train: np.ndarray | None = None, val: np.ndarray | None = None) -> None:
    """Raise Wrong unless the run in the folder ended where it should, on these tokens, and began knowing nothing."""
    runs = summaries(ran.folder)
    if len(runs) != 1:
        raise Wrong(f"{len(runs)} runs: {ran.out}")
    told, c = runs[0], runs[0]["config"]
    end = min(c["stop_after"] or c["num_iterations"], c["num_iterations"])
    wanted = "finished" if end == c["num_iterations"] else "stopped"
    last = told["validation"][-1]
    if told["status"] != wanted or last["step"] != end or not math.isfinite(last["loss"]):
        raise Wrong(f"{told['status']} at {last}, {end} steps were asked for")
    first = told["validation"][0]
    classes = -(-c["vocab_size"] // 128) * 128
    if first["step"] == 0 and not c["init_from"] and abs(first["loss"] - math.log(classes)) > 0.01:
        raise Wrong(f"{first['loss']} before the first step; the head begins at zero, log({classes}) is right")
    if val is not None:
        found, length = told["val_data_hash"], c["val_seq_len"]
        if found != chain(val, length, c["val_tokens"] // length):
            raise Wrong("validated on other tokens than the file holds")
    whole = not c["drop_shard_tail"] and not c["align_documents"]
    if train is not None and whole and last["train_tokens"] == end * c["tokens_per_step"]:
        length = c["train_seq_len"]
        if last["data_hash"] != chain(train, length, last["train_tokens"] // length):
            raise Wrong("trained on other tokens than the file holds")


def affordable(words: Sequence[str]) -> bool:
    """Whether a case is small enough to be trained; one that is not has been built, on the device without memory."""
    import torch

    import train_gpt
    from trainer.checkpoints import WithoutValues

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            c = train_gpt.parse_config(list(words))
    except tuple(train_gpt.EXIT_CODES):
        return True  # `main` will say so
    if c.compile == "on" or c.watch or ("embedded" in (c.train_files, c.val_files) and c.data_dir):
        return False  # what these need takes seconds or writes elsewhere
    if c.num_layers > 64:
        return False
    try:
        with WithoutValues(), torch.device("meta"):
            weights = sum(p.numel() for p in train_gpt.GPT(c).parameters())
    except (RuntimeError, OverflowError):  # more than a tensor can have
        return False
    steps = min(c.stop_after or c.num_iterations, c.num_iterations) + 2 * c.warmup_steps
    validations = 2 + (steps // c.val_loss_every if c.val_loss_every else 0)
    tokens = steps * c.tokens_per_step + validations * c.val_tokens
    reach = min(c.window_max_tokens + c.block_tokens, max(c.train_seq_len, c.val_seq_len))
    work = tokens * (6 * weights + 12 * c.num_layers * c.model_dim * reach)
    return tokens <= MOST_TOKENS and weights <= MOST_WEIGHTS and work <= MOST_WORK


# ------------------------------------------------------------------------------------------------------------
# Kinds


def command_line_check(folder: Path):
    """Fields with all sorts of values, and words of other kinds."""
    program = Program(folder)

    def check(words) -> str:
        words = small(words, without=()) if any(w.startswith("--help") for w in words) else small([*words])
        named = {field_of(word) for word in words}
        words += [word for word in program.words if field_of(word) not in named and "data" not in named]
        if not affordable(words):
            return "built"
        ran = program.settled(words)
        if ran is None:
            return "error"
        if not summaries(ran.folder):
            if "Fields (--field=value)" not in ran.out:
                raise Wrong(f"no run and no help: {ran.out}")
            return "answer"
        given = named & {"train_files", "val_files", "data"}
        check_run(ran, *(() if given else (program.tokens["train"], program.tokens["val"])))
        return "answer"

    return check


def command_lines() -> st.SearchStrategy:
    """Words for train_gpt.py: mostly a field and a value, of its own, of another field, or hostile."""
    import dataclasses

    import train_gpt

    fields = dataclasses.fields(train_gpt.Config)
    values = [str(field.default) for field in fields] + ["nano", "small", "9>2", "0,1,99", "2", "0.5", "32", "64", "16"]
    value = st.one_of(_WORD, st.sampled_from(values))
    names = st.sampled_from([field.name for field in fields])
    pair = st.tuples(names, value).map(lambda p: f"--{p[0]}={p[1]}")
    own = st.sampled_from([f"--{f.name}={f.default}" for f in fields])
    bare = st.one_of(names.map("--{}".format), st.sampled_from(["--help", "-h", "sample", "evaluate", "export"]))
    few, many = st.lists(st.one_of(own, own, own, pair), max_size=2), st.one_of(pair, pair, pair, own, _WORD, bare)
    return st.one_of(few, st.lists(many, max_size=4))


_WORD = WORD.filter(lambda word: "/" not in word)  # nothing is written outside of the case's folder


def shards_check(folder: Path):
    """Damaged shards."""
    program = Program(folder)
    good = {part: (program.data / f"{part}_0.bin").read_bytes() for part in program.tokens}

    def check(case) -> str:
        part, operations, words = case
        data = {**good, part: damage(good[part], operations)}
        for name, content in data.items():
            (program.data / f"{name}_0.bin").write_bytes(content)
        ran = program.settled(small([*program.words, *words]))
        if ran is None:
            return "error"
        check_run(ran, *(np.frombuffer(data[name][1024:], "<u2") for name in ("train", "val")))
        return "answer"

    return check


SHARDS = st.tuples(
    st.sampled_from(["train", "val"]),
    DAMAGE,
    st.sampled_from([[], ["--drop_shard_tail"], ["--tokens_per_step=96", "--train_seq_len=48", "--block_tokens=24"]]),
)

USES = ("sample", "evaluate", "export", "weights", "resume", "init_from")


def use(program: Program, how: str, path: Path) -> Ran | None:
    """A checkpoint used in one of the ways there are."""
    words = {
        "sample": ["sample", str(path), "--prompt=a", "--max_new_tokens=2", "--temperature=0"],
        "evaluate": ["evaluate", str(path), "--json", program.words[1]],
        "export": ["export", str(path), "model"],
        "weights": ["export", str(path), "model.safetensors"],
        "resume": small([*program.words, f"--resume={path}", "--output_dir=out"]),
        "init_from": small([*program.words, f"--init_from={path}", "--num_iterations=1"]),
    }[how]
    return program.settled(words)


def outcome(ran: Ran, how: str) -> Any:
    """What such a use gives that has to be the same each time."""
    from trainer.checkpoints import digest, read_tensors

    if how in ("sample", "evaluate"):
        return ran.out
    if how in ("export", "weights"):
        (path,) = ran.folder.rglob("model.safetensors")
        texts, tensors = read_tensors(path)
        return texts.get("digest") or digest(tensors, texts)
    return [(p["step"], p["loss"]) for told in summaries(ran.folder) for p in told["validation"]]


def checkpoints_check(folder: Path):
    """Checkpoints that are damaged, or made anew with a digest that fits and content that does not."""
    from trainer.checkpoints import load_tensors, save_tensors

    program = Program(folder)
    path = program.run / "run.checkpoints" / "step-000001.safetensors"
    good, wanted = path.read_bytes(), {}
    texts, tensors = load_tensors(path, "train_gpt-1")
    for how in USES:
        ran = use(program, how, path)
        if ran is None:
            raise Wrong(f"a good checkpoint was refused by {how}")
        wanted[how] = outcome(ran, how)

    def check(case) -> str:
        how, forged, changes = case
        if not forged:
            path.write_bytes(damage(good, changes))
        else:
            told, values = forge(texts, tensors, changes)
            if not values:
                return "answer"
            save_tensors(path, values, told)
        ran = use(program, how, path)
        if ran is None:
            return "error"
        if not forged and outcome(ran, how) != wanted[how]:
            raise Wrong(f"{how}: a damaged checkpoint was accepted and gave {outcome(ran, how)}, not {wanted[how]}")
        return "answer"

    return check


CHECKPOINTS = st.one_of(
    st.tuples(st.sampled_from(USES), st.just(False), DAMAGE), st.tuples(st.sampled_from(USES), st.just(True), FORGERY)
)


def texts_check(folder: Path):
    """Texts, tables and archives that `--data` tokenises."""
    program = Program(folder)
    os.environ["SPEEDRUN_CACHE"] = str(folder / "cache")

    def check(case) -> str:
        name, content = case
        path = folder / name
        path.write_bytes(content)
        shutil.rmtree(folder / "cache", ignore_errors=True)
        words = small([f"--data={path}"], without=VALIDATION)
        if not affordable(words):
            return "built"
        ran = program.settled(words)
        path.unlink()
        if ran is None:
            return "error"
        (told,) = summaries(ran.folder)
        parts = {part: shard_tokens(told["config"][f"{part}_files"]) for part in ("train", "val")}
        check_run(ran, parts["train"], parts["val"])
        text = content.removeprefix(b"\xef\xbb\xbf")
        if name == "a.txt" and b"<|endoftext|>" not in text:
            both = b"".join(bytes(tokens.astype(np.uint8)).removeprefix(b"\0") for tokens in parts.values())
            if both != text:
                raise Wrong(f"{text!r} came back as {both!r}")
        return "answer"

    return check


def shard_tokens(pattern: str) -> np.ndarray:
    """The tokens of the shards that a glob names, in order."""
    from data.shards import open_shard

    folder = Path(pattern).parent
    return np.concatenate([open_shard(path) for path in sorted(folder.glob(Path(pattern).name))])


_LINE = st.sampled_from(["<|endoftext|>\n", "ab cd\n", "one day\n", "\r\n"])
_PLAIN = st.one_of(
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass") * 20),
    st.text("ab \n", min_size=40, max_size=300).map(lambda text: text.encode() * 3),
    st.lists(_LINE).map(lambda lines: "".join(lines).encode() * 9),
    st.binary(max_size=100).map(lambda data: data * 4),
)
TEXTS = st.one_of(
    st.tuples(st.just("a.txt"), _PLAIN),
    st.tuples(st.just("a.jsonl"), DAMAGE.map(lambda operations: damage(JSONL * 30, operations))),
    st.tuples(st.just("a.parquet"), DAMAGE.map(lambda operations: damage(_parquet(), operations))),
    st.tuples(st.sampled_from(PACKED), DAMAGE).map(lambda case: (case[0], damage(_packed(case[0]), case[1]))),
    st.tuples(st.sampled_from(["a.csv", "a.arrow", "a.jsonl", "a.npy", *PACKED]), _PLAIN),
)


def folders_check(folder: Path):
    """Folders of shards with a note beside them, for `--data`."""
    program = Program(folder)
    good = {path.name: path.read_bytes() for path in program.data.iterdir()}
    good["tokenize.json"] = b'{"schema": 1, "encoding": "bytes", "vocab_size": 256, "end_of_text": 0}'

    def check(case) -> str:
        changes, words = case
        made = program.folder / "made"
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
        files = dict(good)
        for number, operations in changes:
            name = sorted(good)[number % len(good)]
            if operations is None:
                files.pop(name, None)
            elif name in files:
                files[name] = damage(files[name], operations)
        for name, content in files.items():
            (made / name).write_bytes(content)
        words = small([f"--data={made}", *words], without=VALIDATION)
        if not affordable(words):
            return "built"
        ran = program.settled(words)
        if ran is None:
            return "error"
        (told,) = summaries(ran.folder)
        check_run(ran, *(np.frombuffer(files[f"{part}_0.bin"][1024:], "<u2") for part in ("train", "val")))
        if "tokenize.json" in files:
            note, c = json.loads(files["tokenize.json"]), told["config"]
            if (int(note["vocab_size"]), int(note["end_of_text"])) != (c["vocab_size"], c["eos_id"]):
                raise Wrong(f"the note says {note}, the run took {c['vocab_size']} and {c['eos_id']}")
        return "answer"

    return check


FOLDERS = st.tuples(
    st.lists(st.tuples(st.integers(0, 2), st.one_of(st.none(), DAMAGE)), max_size=3),
    st.lists(st.sampled_from(["--vocab_size=256", "--vocab_size=50257", "--eos_id=1", "--val_tokens=64"]), max_size=1),
)


def fields_check(folder: Path):
    """Files of fields for `--config`: TOML, and the JSON of a run."""
    program = Program(folder)
    told = json.loads((program.run / "run.json").read_text())
    json_text = json.dumps({"config": told["config"], "status": "finished"}, indent=1).encode()
    lines = [f"{field_of(word)} = {_toml(word.partition('=')[2])}" for word in [*SMALL, *program.words]]
    good = {"run.json": json_text, "run.toml": "\n".join(lines).encode()}

    def check(case) -> str:
        name, operations = case
        path = program.folder / name
        path.write_bytes(damage(good[name], operations))
        words = [f"--config={path}", "--run_name=run", "--output_dir=."]
        if not affordable(words):
            return "built"
        ran = program.settled(words)
        if ran is None:
            return "error"
        (told,) = summaries(ran.folder)
        named = [f"--{part}_files={told['config'][part + '_files']}" for part in program.tokens]
        check_run(ran, *(program.tokens.values() if named == program.words else ()))
        return "answer"

    return check


def _toml(text: str) -> str:
    return text if text.replace(".", "").isdigit() else json.dumps(text)


FIELDS = st.tuples(st.sampled_from(["run.json", "run.toml"]), DAMAGE)


def going_on_check(folder: Path):
    """The folder of a run that was stopped, damaged, and `--resume=auto`."""
    program = Program(folder)
    wanted = json.loads((program.run / "run.json").read_text())["validation"]
    stopped = folder / "stopped"
    done = program(small([*program.words, f"--output_dir={stopped}", "--checkpoint_every=1", "--stop_after=1"]))
    if done.code:
        raise Wrong(done.err)
    files = sorted(path.relative_to(stopped) for path in stopped.rglob("*") if path.is_file())

    def check(changes) -> str:
        again = damaged_copy(stopped, folder / "again", files, changes)
        ran = program.settled(small([*program.words, f"--output_dir={again}", "--resume=auto"]))
        if ran is None:
            return "error"
        told = json.loads((again / "run.json").read_text())
        found = [(p["step"], p["loss"], p["data_hash"]) for p in told["validation"]]
        if told["status"] != "finished" or found != [(p["step"], p["loss"], p["data_hash"]) for p in wanted]:
            raise Wrong(f"{told['status']}: {found}")
        return "answer"

    return check


GOING_ON = st.lists(st.tuples(st.integers(0, 9), st.one_of(st.none(), DAMAGE)), min_size=1, max_size=2)


def other_commands_check(folder: Path):
    """Words for sample, evaluate and export."""
    program = Program(folder)
    names = {"CHECKPOINT": str(program.checkpoint), "RUN": str(program.run / "run"), "FOLDER": str(program.run)}
    names |= {"DATA": str(program.data), "VAL": f"{program.data}/val_*.bin"}

    def check(case) -> str:
        command, words, stdin = case
        if command == "export":  # not over what other cases need
            words = [word for number, word in enumerate(words) if not number or word not in names]
        for name, text in names.items():
            words = [word.replace(name, text) for word in words]
        ran = program.settled([command, *words], stdin)
        if ran is None:
            return "error"
        if "usage: " in ran.out:
            return "answer"
        if command == "evaluate" and not any("--json" in word for word in words):
            loss = float(ran.out.splitlines()[-1].split()[1]) if ran.out.startswith(("loss", "document")) else math.nan
            if not 0 < loss < 20:
                raise Wrong(ran.out)
        if command == "export" and not list(ran.folder.rglob("*.safetensors")):
            raise Wrong(f"nothing was exported: {ran.out}")
        return "answer"

    return check


_OTHER = st.one_of(
    st.sampled_from(
        "CHECKPOINT CHECKPOINT RUN FOLDER DATA model m.safetensors --prompt=ab --prompt --prompts=- --temperature=0 "
        "--temperature=1e-30 --temperature=1e30 --temperature=nan --top_k=1 --top_k=99999 --top_p=1e-9 --top_p=0 "
        "--seed=-1 --num_samples=2 --num_samples=0 --device=cuda --device=cpu --vocab=x --by_document --json --json=x "
        "--val_files=VAL --data=DATA --val_tokens=64 --val_tokens=1 --val_tokens=999999 --val_seq_len=16 "
        "--val_seq_len=7 --overwrite --help -h --max_new_tokens=0".split()
    ),
    _WORD.map("--prompt={}".format),
    _WORD,
)
OTHER_COMMANDS = st.tuples(
    st.sampled_from(["sample", "evaluate", "export"]),
    st.lists(_OTHER, max_size=4).map(lambda words: ["CHECKPOINT", *words][: 1 + len(words)]),
    st.one_of(st.just(b"ab\ncd"), st.binary(max_size=10)),
)

KINDS: dict[str, Kind] = {
    "command lines": Kind(st.deferred(command_lines), command_line_check),
    "shards": Kind(SHARDS, shards_check),
    "checkpoints": Kind(CHECKPOINTS, checkpoints_check),
    "texts": Kind(TEXTS, texts_check),
    "folders": Kind(FOLDERS, folders_check),
    "files of fields": Kind(FIELDS, fields_check),
    "runs that go on": Kind(GOING_ON, going_on_check),
    "sample, evaluate, export": Kind(OTHER_COMMANDS, other_commands_check),
}


# ------------------------------------------------------------------------------------------------------------
# Running


def batches(cases: int, seed: int, kinds: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    """(kind, number of the batch, its cases) of as many cases altogether, the kinds in turn."""
    number, left = 0, cases
    while left > 0:
        for kind in kinds:
            size = min(BATCH, left)
            if size > 0:
                yield kind, number, size
            left -= size
        number += 1


def keep(rows: dict[str, dict]) -> Path:
    """Put rows into the kept result; returns its path."""
    rows = {name: rows[name] for name in KINDS if name in rows}
    total = sum(row["cases"] for row in rows.values())
    return write_result("fuzz-program", {"cases": total, "kinds": list(rows.values())})


def add(rows: dict[str, dict], name: str, seed: int, counts: Counter, failures: int, seconds: float) -> None:
    """Add a batch to its kind's row."""
    new = dict(input=name, cases=0, answers=0, built=0, failures=0, seconds=0.0, seed=seed, batches=0)
    row = rows.setdefault(name, {**new, "errors of ours": 0})
    row["cases"] += sum(counts.values())
    for key, column in (("answer", "answers"), ("error", "errors of ours"), ("built", "built")):
        row[column] += counts[key]
    row["failures"] += failures
    row["seconds"] = round(row["seconds"] + seconds, 1)
    row["batches"] += 1


@dataclass(frozen=True)
class Options:
    """How much is tried."""

    cases: int = setting(10_000, "cases", "of all kinds together", at_least=1)
    seed: int = setting(1, "seed", "of the cases", at_least=0)
    kind: tuple = setting((), "kind", "only this one", choices=KINDS)
    anew: bool = setting(False, "flag", "do not go on with the kept result")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if nothing was found."""
    _, options = command(__doc__, arguments, Options)
    import torch

    torch.set_num_threads(1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_BYTES, resource.RLIM_INFINITY))
    kept = None if options.anew else read_result("fuzz-program")
    rows = {row["input"]: row for row in (kept["result"]["kinds"] if kept else []) if row["seed"] == options.seed}
    done, failed = {name: row["batches"] for name, row in rows.items()}, False
    for name, number, size in batches(options.cases, options.seed, options.kind or list(KINDS)):
        if number < done.get(name, 0):
            continue
        begin, counts, failures = time.monotonic(), Counter(), 0
        try:
            counts = fuzz(name, size, 1000 * options.seed + number, KINDS)
        except Exception:
            traceback.print_exc()
            failures, failed = 1, True
        add(rows, name, options.seed, counts, failures, time.monotonic() - begin)
        took = f"{time.monotonic() - begin:.0f} s"
        print(f"{name}, batch {number}: {dict(counts)}, failures {failures}, {took}", flush=True)
        path = keep(rows)
    print(f"kept in {path}")
    print(table([row for row in rows.values()]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
