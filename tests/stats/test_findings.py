"""Every finding of `validate` that takes a grade has a case: one edit of an honest series, and what must be said of it.

`test_every_finding_has_a_case` holds the places that the cases reach against all that the source has.
"""

import contextlib
import hashlib
import io
import json
import re
import shutil
import subprocess

import pytest
from places import Places, without_a_case

from stats.chain import link
from stats.cli import main
from stats.planfile import write_plan
from stats.plans import make_plan


def run_of(folder, seed, ending="txt"):
    return folder / "runs" / f"seed-{seed:03d}.{ending}"


def edit(seed, old, new, count=-1, ending="txt"):
    """A case's edit of one run's log or JSON."""

    def change(folder):
        path = run_of(folder, seed, ending)
        text = path.read_text()
        assert re.search(old, text), old
        path.write_text(re.sub(old, new, text, count=max(count, 0)))

    return change


def beside(seed, **more):
    """Fields of a run's JSON."""

    def change(folder):
        path = run_of(folder, seed, "json")
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    return change


def record(**more):
    def change(folder):
        path = folder / "record.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | more))

    return change


def ledger(change):
    """The ledger's events changed, and every line linked anew."""

    def write(folder):
        path, data = folder / "ledger.jsonl", b""
        events = [json.loads(line) for line in path.read_text().splitlines()]
        for event in change(events) or events:
            told = {key: value for key, value in event.items() if key != "before"}
            data += json.dumps(told | {"before": link(data)}).encode() + b"\n"
        path.write_bytes(data)

    return write


def end_of(run, **more):
    def change(events):
        next(e for e in events if e["event"] == "end" and e["run"] == run).update(more)

    return ledger(change)


def after(event):
    return ledger(lambda events: [*events, event])


def timed(events):
    for index, event in enumerate(events):
        event["time"] = f"2025-01-01T{(23 - index):02d}:00:00Z"


def launched_at(events):
    next(e for e in events if e["event"] == "launch" and e["run"] == "seed-003")["time"] = "2025-01-01T12:00:00Z"


def text_of(name, text):
    return lambda folder: (folder / name).write_text(text)


def readme(folder):
    """Of all losses one is left out."""
    path = folder / "README.md"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if not line.startswith("| 3 |")))


def plan_of(**more):
    return lambda folder: write_plan(make_plan(**more), folder / "plan.json", overwrite=True)


def aside(folder):
    (folder / "attempts").mkdir()
    shutil.copy(run_of(folder, 3), folder / "attempts" / "seed-003.1.txt")


def copied(folder):
    run_of(folder, 3).write_text(run_of(folder, 5).read_text())


def nearly_copied(folder):
    """Training losses of another run, with a digit more or less, under this run's own validations."""
    lines = iter(re.findall(r"train_loss:(\S+)", run_of(folder, 5).read_text().split("=" * 100)[2]))
    head, rule, body = run_of(folder, 3).read_text().rpartition("=" * 100)
    body = re.sub(r"train_loss:\S+", lambda _: f"train_loss:{float(next(lines)) + 2e-6:.6f}", body)
    run_of(folder, 3).write_text(head + rule + body)


def rank(folder):
    text = run_of(folder, 3).read_text()
    (folder / "runs" / "seed-003.rank1.txt").write_text(re.sub(r"val_loss:2", "val_loss:3", text))


def committed(folder, later):
    """The folder as a commit holds it, and what was done to it later."""
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "then"]):
        subprocess.run(["git", "-c", "user.name=x", "-c", "user.email=x@x", *words], cwd=folder, check=True)
    later(folder)


def clock(seed, first, last, share):
    """The time from step `first` to `last` is a share of what it was, on every line; what comes later moves with it."""

    def change(folder):
        path = run_of(folder, seed)
        head, rule, body = path.read_text().rpartition("=" * 100)
        times = {int(step): int(ms) for step, ms in re.findall(r"step:(\d+)/60 .*train_time:(\d+)ms", body)}

        def told(match):
            step = int(match[1])
            inside = times[min(max(step, first), last)] - times[first]
            new = times[step] - round(inside * (1 - share))
            return f"step:{step}/60 {match[2]}train_time:{new}ms step_avg:{new / max(step, 1):.2f}ms"

        body = re.sub(r"step:(\d+)/60 (.*)train_time:\d+ms step_avg:\S+ms", told, body)
        path.write_text(head + rule + body)

    return change


def tokens(folder):
    for seed in (3, 4):
        edit(seed, r"(step:60/60 val_loss:.*)", rf"\1 train_tokens:{seed}")(folder)


def source(folder):
    (folder / "source").mkdir()
    digest = hashlib.sha256(b"x").hexdigest()
    told = re.search(r"code_hash:([0-9a-f]{16})", run_of(folder, 0).read_text())[1]
    (folder / "source" / f"{told}.py").write_text(digest)


def one_hash(folder):
    """Two logs whose configuration has the hash that it names, and one whose has not."""
    for seed in range(8):
        config = json.loads(re.search(r"config:(\{.*\})", run_of(folder, seed).read_text())[1])
        told = {key: value for key, value in config.items() if key != "seed"}
        digest = "b" * 64 if seed == 3 else hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        edit(seed, "config_hash:c{64}", f"config_hash:{digest}")(folder)


def no_source(folder):
    """Neither in the log nor in its JSON."""
    path = run_of(folder, 3)
    text = path.read_text()
    path.write_text(re.sub("code_hash:.*\n", "", text[text.index("=" * 100) :]))
    beside(3, code_hash=None)(folder)


def unlinked(folder):
    path = folder / "ledger.jsonl"
    path.write_text(re.sub(r', "before": "[0-9a-f]*"', "", path.read_text()))


def by_hand(folder):
    path = folder / "ledger.jsonl"
    path.write_text(path.read_text().replace('"seed": 3', '"seed": 4'))


NOTHING = lambda folder: None  # noqa: E731
# {name: (edit, what is said, more words of the command)}
CASES = {
    "cut": (edit(3, r"step:60/60 val_loss.*\n", ""), "no verdict can be computed from these logs", ()),
    "older": (unlinked, "an older ledger, without links", ()),
    "by hand": (by_hand, "ledger.jsonl:9: the lines above are not those", ()),
    "no name": (after({"event": "end"}), 'event "end" does not name its "run"', ()),
    "no ledger": (lambda f: (f / "ledger.jsonl").unlink(), "no ledger: nobody can tell how many runs were started", ()),
    "no source": (no_source, "logs without their source: nobody can tell which program ran", ("--allow-mixed",)),
    "few": (
        lambda f: (f / "plan.json").unlink(),
        "4 runs: normality has to be taken on trust",
        tuple(word for seed in range(4) for word in ("--drop", f"seed-{seed:03d}=a reason")),
    ),
    "copied": (copied, "seed-005 and seed-003 are the same run: every loss", ()),
    "nearly copied": (nearly_copied, "seed-003 and seed-005 (lie|run parallel).*training losses: by accident", ()),
    "other head": (NOTHING, "no beginning of this ledger has the head aaaa", ("--against", "a" * 32)),
    "ledger after a commit": (
        lambda f: committed(f, ledger(lambda events: events[1:])),
        "does not begin as it stood in HEAD",
        ("--against", "HEAD"),
    ),
    "log after a commit": (
        lambda f: committed(f, edit(3, "3.9.0", "3.8.0")),
        "logs that were changed since HEAD: seed-003",
        ("--against", "HEAD"),
    ),
    "first line gone": (
        ledger(lambda events: events[1:]),
        "the ledger's first line, which fixes threshold and plan, is gone",
        (),
    ),
    "first line moved": (ledger(lambda events: events[1:2] + events[:1] + events[2:]), "is not the ledger's first", ()),
    "threshold": (record(threshold=2.93), "changed since: threshold 2.92, now 2.93", ()),
    "targets": (record(threshold=2.93), "record.json is about 2.93, the runs were configured for 2.92", ()),
    "again": (after({"event": "launch", "run": "seed-003"}), "seed-003 was started again after it had finished", ()),
    "backwards": (ledger(timed), "the ledger's time runs backwards", ()),
    "aside": (aside, "attempts/seed-003.1.txt is a complete run that was set aside", ()),
    "hole": (
        lambda f: (record(identity={"a": 1})(f), ledger(lambda ev: [e for e in ev if e.get("run") != "seed-003"])(f)),
        "no launch of seed 3 in the ledger",
        (),
    ),
    "log against its end": (edit(3, "3.9.0", "3.8.0"), "seed-003: its log is not the one that its end sealed", ()),
    "loss against its end": (
        end_of("seed-003", final_loss=2.5),
        r"seed-003: loss 2.\d+ in the log, 2.5 in the ledger",
        (),
    ),
    "no seal": (end_of("seed-003", sealed=None), "1 runs ended without a seal", ()),
    "lived": (end_of("seed-003", seconds=1), "seed-003 trained for .* s in a process that lived for 1 s", ()),
    "between": (
        beside(3, start_time="2025-01-01T12:00:00Z", end_time="2025-01-01T12:00:00Z"),
        "seed-003 trained for .* between",
        (),
    ),
    "before": (
        lambda f: (ledger(launched_at)(f), beside(3, start_time="2025-01-01T11:00:00Z")(f)),
        "its JSON says that it began 3600 s before the ledger launched it",
        (),
    ),
    "quick": (clock(3, 40, 60, 0.3), "seed-003: .* s from step 40 to 60, the next took", ("--allow-mixed",)),
    "no time": (clock(3, 20, 40, 0), "seed-003: no time between steps 20 and 40", ()),
    "average": (
        edit(3, r"(step:60/60 val_loss:.*step_avg:)\S+ms", r"\g<1>99.00ms"),
        "but an average of 99 ms at line",
        (),
    ),
    "planned": (
        edit(3, '"preset": "nano"', '"preset": "nano", "num_iterations": 50'),
        "seed-003 has 60 steps, its configuration 50",
        ("--allow-mixed",),
    ),
    "seeds": (edit(3, '"seed": 3', '"seed": 33'), "seed-003: seed 33 in its log, 3 in the ledger", ()),
    "tokens": (tokens, "seed-004: 4 tokens at step 60, 3 in seed-003", ()),
    "config": (
        edit(3, '"preset": "nano"', '"preset": "micro"'),
        "preset 'micro' in the log, 'nano' in the JSON",
        ("--allow-mixed",),
    ),
    "config hash": (one_hash, "seed-003: another configuration than the hash that it names", ("--allow-mixed",)),
    "mixed": (edit(3, '"preset": "nano"', '"preset": "micro"'), "allowed to be mixed: ", ("--allow-mixed",)),
    "looks": (
        lambda f: ((f / "plan.json").unlink(), record(ledger={"looks": 3})(f)),
        "the test was looked at 3 times",
        (),
    ),
    "source": (source, "is not what its name and the logs say", ()),
    "program": (
        lambda f: (
            record(identity={"code": {"a": "b"}})(f),
            edit(3, "config_hash", "program_hash:" + "e" * 64 + "\nconfig_hash")(f),
        ),
        "the files of the program in some logs are not those",
        ("--allow-mixed",),
    ),
    "README": (text_of("README.md", "2.5000"), "README.md does not say the mean loss of the logs", ()),
    "README gone": (lambda f: (f / "README.md").unlink(), "no README.md", ()),
    "README short": (readme, "README.md leaves out 1 of 8 losses", ()),
    "README wrong": (
        text_of("README.md", '{"n": 9, "sample_mean": 2.5}'),
        "README.md disagrees with the logs: n 9",
        (),
    ),
    "other plan": (plan_of(margin=5e-4, sigma=6e-4), "8 logs carry the hash of another plan", ()),
    "no hash": (edit(3, "plan_hash:.*\n", ""), "1 logs do not carry the plan's hash", ()),
    "fixed": (plan_of(margin=6e-4, sigma=63e-5, cap=30, method="fixed"), "8 runs count, 30 were planned", ()),
    "plan's threshold": (
        plan_of(threshold=2.95, margin=6e-4, sigma=63e-5),
        "the plan is about 2.95, record.json about 2.92",
        (),
    ),
    "plan broken": (text_of("plan.json", "{"), "plan.json:1: not JSON", ()),
    "plan gone": (lambda f: (f / "plan.json").unlink(), "no plan.json: the number of runs may have been chosen", ()),
    "futile": (NOTHING, "F  claim: ", ("--alpha", "0.001")),
    "one seed": (edit(3, '"seed": 3', '"seed": 5'), "have the same seed, 5", ()),
    "unknown log": (
        ledger(lambda ev: [e for e in ev if e.get("run") != "seed-007"]),
        "logs that no launch accounts for: seed-007",
        (),
    ),
    "dropped": (after({"event": "drop", "run": "seed-003", "reason": "hot"}), "seed-003 was dropped: hot", ()),
    "crashed": (end_of("seed-003", status="crashed", exit_code=1), "seed-003 crashed and is not in the sample", ()),
    "running": (
        after({"event": "launch", "run": "seed-099", "seed": 99}),
        "seed-099 is running: the series is not complete",
        (),
    ),
    "machine": (edit(3, "Example CPU", "Other CPU"), "different hardware: Example CPU, Other CPU", ()),
    "rank": (rank, "seed-003.rank1 tells other losses than seed-003", ()),
    "json": (beside(3, status="crashed"), "seed-003.json disagrees with the log: status 'crashed'", ()),
}
OUT_OF_REACH = {
    "copies.py: text": "of several series: tests/stats/test_copies.py",
    "validate.py: rounding leaves p": "tests/stats/test_notes.py",
    "validate.py: str(error)": "what the sequential test refuses: tests/stats/test_refusals.py",
}


@pytest.fixture(scope="module")
def outcomes(honest, tmp_path_factory):
    """({case: what is said}, places that were reached)."""
    told = {}
    with Places() as places:
        for name, (change, _, more) in CASES.items():
            folder = shutil.copytree(honest, tmp_path_factory.mktemp("case") / "s")
            change(folder)
            out = io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                main(["validate", str(folder), *more])
            told[name] = out.getvalue()
    return told, places.seen


@pytest.mark.parametrize("name", CASES)
def test_an_edit_is_found_for_what_it_is(name, outcomes):
    assert re.search(CASES[name][1], outcomes[0][name]), outcomes[0][name]


def test_every_finding_has_a_case(outcomes):
    """A new finding in stats fails here until the table above has a case for it."""
    missing = without_a_case(outcomes[1], ("Finding",))
    missing = [place for place in missing if not any(f"/{known}" in f"/{place}" for known in OUT_OF_REACH)]
    assert not missing, "\n".join(missing)
