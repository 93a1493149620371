"""Every refusal has a case that enters by the command and asks for its reason; one without a case fails here.

A case is files, the words of a command, its exit code, and what it must say. While the cases run, the place of every
error and of every problem of a log is noted; `test_every_refusal_has_a_case` holds these against all places in the
source that make one.
"""

import contextlib
import io
import json
import re
import sys
from dataclasses import dataclass, field

import pytest
from places import Places, without_a_case

from stats.chain import link
from stats.cli import main
from stats.errors import StatsError
from stats.samples import sample_of
from stats.series import find_series

RULER = "=" * 100


def line(step, loss, planned=60, ms=None):
    """A validation."""
    ms = step * 50 if ms is None else ms
    return f"step:{step}/{planned} val_loss:{loss} train_time:{ms}ms step_avg:{ms / max(step, 1):.2f}ms\n"


def log(final=2.91, steps=(20, 40, 60), planned=60):
    """A whole log without lines between its validations."""
    return "".join(line(step, f"{final + (60 - step) / 50:.4f}", planned) for step in steps)


def step_lines(*steps, planned=60):
    return "".join(f"step:{step}/{planned} train_time:{step * 50}ms step_avg:50.00ms\n" for step in steps)


CHAT = {
    f"n/{n}.log": f"Step 00000 | Validation bpb: 1.{n}\n"
    f"step 00000/00001 | dt: 1.0ms\nStep 00001 | Validation bpb: 0.98{n}\n"
    for n in "123"
}  # nanochat, in bits a byte
SMALL = (("stats.series", "LARGEST_TABLE_BYTES", 99),)
TWO = {"x.csv": "run,loss\na,1\nb,2\n"}
WHOLE = {"a.txt": log(2.9101), "b.txt": log(2.9123), "c.txt": log(2.9132)}
PLAN = ("plan", "--write", "{}/plan.json")


def events(*told):
    """A ledger's text, linked."""
    data = b""
    for event in told:
        data += json.dumps(event | {"before": link(data)}).encode() + b"\n"
    return data


def ended(run, **more):
    return {"event": "end", "run": run, "status": "finished", "exit_code": 0} | more


def launched(run, seed=0):
    return {"event": "launch", "run": run, "seed": seed}


@dataclass(frozen=True)
class Case:
    """What lies in a folder, the command, and what it says. Words with {} name the folder; several commands run in
    their order, the last one is judged."""

    files: dict = field(hash=False)
    words: tuple
    code: int
    says: str
    patch: tuple = ()  # (module, name, value) while it runs


def one(name, text, says, *words, code=3, **more):
    """A case of one file that is named itself."""
    return Case({name: text}, words or ("ttest", f"{{}}/{name}"), code, says, **more)


def of_log(text, says):
    """A case of one damaged log beside two whole ones."""
    return Case({**WHOLE, "c.txt": text}, ("ttest", "{}"), 3, rf"c\.txt(:\d+)?: .*{says}")


def table(text, says, *words, name="t.csv", code=3):
    return one(name, text, says, *words, code=code)


def usage(says, *words, files=None, code=2, **more):
    return Case(files or {}, words, code, says, **more)


LOGS = {
    "broken line": of_log(log().replace("step:40", "stp:40"), "a broken result line: 'stp:40/60"),
    "twice": of_log(log(steps=(20, 40, 40, 60)), "a second validation for step 40"),
    "planned": of_log(log().replace("60/60", "60/61"), r"61 planned steps, but 60 in the lines before"),
    "not a step line": of_log(step_lines(20) + "step:40/60 trainx_time:1ms\n" + log(steps=(60,)), "not a step line"),
    "not a validation": of_log(log().replace("40/60 val_loss:", "40/60 x val_loss:"), "not a validation line"),
    "no number": of_log(log().replace("train_time:2000ms", "train_time:2oms"), "a number in this validation line"),
    "digits": of_log(log().replace("val_loss:3.3100", "val_loss:3.310"), "a loss with 3 decimals, 4 in the lines"),
    "no time": of_log(
        log().replace("train_time:2000ms step_avg:50.00ms\n", "step_avg:50.00ms\n"), "no train_time, unlike"
    ),
    "clock": of_log(
        log().replace("train_time:2000ms", "train_time:900ms"), "train_time runs backwards, from 1 s to 0.9 s"
    ),
    "step twice": of_log(step_lines(10, 10) + log(), "a second step line for step 10"),
    "jump": of_log(
        step_lines(1, 2, 3, 7, 8, 9) + log(steps=(60,)), "the step lines jump from 3 to 7, after a distance of 1"
    ),
    "steps gone": of_log(step_lines(1, 2, 3) + log(steps=(60,)), "step lines between 3 and 60 are missing"),
    "too far": of_log(log().replace("step:60/60", "step:80/60"), "step 80 of 60 planned"),
    "begins late": of_log(step_lines(*range(7, 61)) + log(steps=(60,)), "the step lines begin at 7: what came before"),
    "first gone": of_log(log(steps=(30, 40, 50, 60)), "a validation is missing before step 30"),
    "second gone": of_log(log(steps=(0, 20, 30, 40, 50, 60)), "a validation is missing between steps 0 and 20"),
    "hole": of_log(log(steps=(10, 20, 40, 50, 60)), "a validation is missing between steps 20 and 40, unless enough"),
    "nan": of_log(log().replace("2.9100", "nan"), "the final validation loss is nan: a run that diverged"),
    "cut": of_log(log(steps=(20, 40)), "truncated or unfinished run: its last validation is at step 40 of 60 planned"),
    "no validation": of_log(step_lines(*range(1, 61)), r"no validation in this run \(60 step lines\)"),
    "copy": Case(
        {
            "a.txt": log(2.9101, range(5, 61, 5)),
            "b.txt": log(2.9123, range(5, 61, 5)),
            "c.txt": log(2.9101, range(20, 61, 5)),
        },
        ("ttest", "{}"),
        3,
        "9 of the 12 validations of a, once more: a copy",
    ),
    "llm.c number": one("m.log", "s:0 tel:4.1\ns:0 trl:x\ns:1 tel:4\n", "damaged log: not a number: 'x'"),
    "llm.c end": one("m.log", "s:0 tel:4.1\ns:250 tel:4.0\n", "this dialect does not say how many steps were planned"),
    "two programs": one(
        "two.txt",
        f"import a\n{RULER}\nhead\n{RULER}\n{log()}\nimport b\ndef f():\n{RULER}\n{log()}",
        "a second program stands above this line, after a run",
    ),
    "long line": one("x.txt", "x" * (3 << 20), "a line of more than a megabyte: not a log"),
    "no run": one("x.txt", f"import a\n{RULER}\nhello\n", "no training run in it: none of its lines"),
    "ledger of a copy": Case(
        {**WHOLE, "ledger.jsonl": events(launched("a"), ended("a")), "d.txt": "nothing\n"},
        ("validate", "{}"),
        1,
        "logs that no launch accounts for",
    ),
    "nanogpt loss": one(
        "x.log", "step 0: train loss 4.1, val loss 4.x\nstep 9: train loss 4, val loss 4.0\n", "not a loss: '4.x'"
    ),
    "nanogpt order": one(
        "x.log",
        "".join(f"step {s}: train loss 4.1, val loss 4.1\n" for s in (9, 5)),
        "damaged log: step 5 after step 9",
    ),
}

TABLES = {
    "two losses": table(
        "val_loss,validation_loss\n1,2\n", "two columns for the loss, 'val_loss' and 'validation_loss'"
    ),
    "two steps": table("loss,step,global_step\n1,2,2\n", "two columns for step, 'step' and 'global_step'"),
    "blank": table(",,\n", "an empty table"),
    "empty": table("", "an empty file"),
    "csv": table('loss\n"' + "a" * 200_000 + '"\n', "not a table: field larger than field limit"),
    "ragged": table("run,loss\na,1,2\n", "2: 3 cells under a header of 2"),
    "json": table("{", "not JSON: ", name="t.json"),
    "times": table('{"losses": [1, 2], "times_s": [3]}', "2 losses, but not as many times_s", name="t.json"),
    "comma or list": table("2,3 2,4\n", "commas between digits, and no point", name="t.txt"),
    "no runs": table("[]", "no runs in it", name="t.json"),
    "no loss": table("step,loss\n1,\n2,\n", "no row of it has a loss"),
    "a row without": table("run,loss\na,1\nb,\n", r"3: row 2 has no loss \(a column named"),
    "a run twice": table("run,loss\na,1\na,2\n", "3: run 'a' a second time, and no column `step`"),
    "metrics": table("Step,a - x,a - y\n0,1,2\n", "several metrics, x, y: export a chart of one"),
    "a step twice": table("run,step,loss\na,1,2\na,1,3\n", "run 'a' has two rows for one step"),
    "null": table(
        '{"log_history": [{"eval_loss": null, "step": 1}], "max_steps": 1}', "has a row without a loss", name="t.json"
    ),
    "own points": table('{"validation": [1]}', "`validation` is not a list of objects", name="t.json"),
    "own end": table('{"validation": [{"step": 1, "loss": 2}]}', "`config` does not say num_iterations", name="t.json"),
    "own empty": table('{"validation": [], "config": {}}', "no validation in this run", name="t.json"),
    "eval_loss": table(
        '{"log_history": [{"loss": 1, "step": 1}]}', "no eval_loss in its log_history: loss", name="t.json"
    ),
    "eval_losses": table(
        '{"log_history": [{"eval_loss": 1, "eval_a_loss": 2, "step": 1}]}',
        "several evaluation losses, eval_a_loss, eval_loss: keep one",
        name="t.json",
    ),
    "a word": table("run,loss\na,x\nb,2\n", "2: loss 'x' is not a number"),
    "range": table("run,loss,time_s\na,1,1e300\n", "2: time_s 1e300 is out of range"),
    "thousands of a time": table(
        'run,loss,time_s\na,2.91,"1,234"\n', "2: time_s 1,234: does the comma divide thousands"
    ),
    "thousands of a step": table('run,loss,step\na;b,2.91,"1,250"\n', "2: step 1,250: does the comma divide thousands"),
    "thousands of a loss": table('run,loss\na,"2,919"\n', "2: loss 2,919: does the comma divide thousands"),
    "bytes": table(b"run,loss\na,1\nb\xff,2\n", "3: not UTF-8 text: invalid start byte"),
    "large": Case({"t.csv": "loss\n" + "1\n" * 99}, ("ttest", "{}/t.csv"), 3, "a table of more than 0 MiB", SMALL),
    "utf-16 without a mark": table(log().encode("utf-16-le"), "zero bytes between its letters", name="t.txt"),
    "half utf-16": table(
        b"\xff\xfe" + log().encode("utf-16-le") + b"\x00\xd8", "begins as UTF-16 text and goes on", name="t.txt"
    ),
    "large utf-16": Case(
        {"t.txt": log().encode("utf-16")}, ("ttest", "{}/t.txt"), 3, "UTF-16 text of more than 0 MiB", SMALL
    ),
    "crashed": table("name,state,loss\na,crashed,1\n", "crashed", "import", "{}/t.csv"),
    "two columns of one name": table("run,val_loss,val_loss\na,1,2\n", "1: 2 columns named 'val_loss'"),
    "two runs of one name in a chart": table('Step,"a - l","a - l"\n1,1,2\n', "1: 2 columns named 'a - l'"),
    "split": table('{"columns": ["loss"], "data": [[1], [1, 2]]}', "row 2 of `data` has not the 1 ", name="t.json"),
    "wandb": table(b"\0", "not an offline file of Weights & Biases", name="run-1.wandb"),
    "no wandb": Case(
        {"run-1.wandb": b":W&B"},
        ("ttest", "{}/run-1.wandb"),
        3,
        "reading it needs `pip install wandb`, or `wandb sync` it",
        (("wandb.proto", "", None),),
    ),
    "no memory": Case(
        {"t.csv": "loss\n1\n"},
        ("ttest", "{}/t.csv"),
        3,
        "too large to be read as a table",
        (("stats.series", "parse_csv", "MemoryError"),),
    ),
}

FOLDERS = {
    "nothing": Case(
        {"x.png": b"\x89"}, ("ttest", "{}"), 3, r"no logs in this folder: looked for \*.txt.*x.png: no log"
    ),
    "no file": usage("cannot be read: No such file", "ttest", "{}/none.txt", code=3),
    "no name": usage("no name that a file can have", "ttest", "\udcff\ud800", code=3),
    "mixed": Case(
        {**WHOLE, "c.txt": log(planned=60, steps=(30, 60))},
        ("ttest", "{}"),
        3,
        r"different configurations: 2 different sets of validation steps.*Name the runs that belong",
    ),
    "two series": Case(
        {f"{s}/{n}": t for s in "xy" for n, t in WHOLE.items()},
        ("times", "{}"),
        3,
        r"2 series here \(x, y\): name one of them",
    ),
    "two series watched": Case(
        {f"{s}/{n}": t for s in "xy" for n, t in WHOLE.items()}, ("monitor", "{}"), 2, "2 series in .*: name one"
    ),
    "drop without a reason": Case(WHOLE, ("ttest", "{}", "--drop", "a="), 2, "--drop a=: write RUN=REASON"),
    "drop of nothing": Case(
        WHOLE, ("ttest", "{}", "--drop", "z=late"), 3, "no run named 'z' to drop; there are a, b, c"
    ),
    "one run": Case({"a.txt": log()}, ("ttest", "{}"), 3, "a t-test needs at least 2 losses; found 1"),
    "all alike": Case(
        {"a.txt": log(), "b.txt": log()}, ("ttest", "{}"), 3, "no variance: all 2 losses are 2.91; are these"
    ),
    "no times": Case(
        {"t.csv": "run,loss\na,1\nb,2\n"}, ("times", "{}/t.csv"), 3, "none of the logs tells a training time"
    ),
    "no curve": Case({"x.log": step_lines(1, 2)}, ("curve", "{}"), 3, "no validations, so no curve"),
    "damaged curve": Case(
        {"x.log": log().replace("40/60", "20/60")}, ("curve", "{}"), 3, "damaged log: a second validation"
    ),
    "record": Case({**WHOLE, "record.json": "[1]"}, ("ttest", "{}"), 3, "record.json: a JSON object is needed"),
    "record json": Case({**WHOLE, "record.json": "{"}, ("ttest", "{}"), 3, "record.json:1: not JSON"),
    "record bytes": Case({**WHOLE, "record.json": b"\xff"}, ("ttest", "{}"), 3, "record.json: not UTF-8 text"),
    "record folder": Case({**WHOLE, "record.json/x": ""}, ("ttest", "{}"), 3, "record.json: cannot be read"),
    "large record": Case(
        {**WHOLE, "record.json": json.dumps({"x": "y" * 99})}, ("ttest", "{}"), 3, "more than 0 MiB", SMALL
    ),
    "no head": Case(WHOLE, ("head", "{}"), 2, "has no ledger.jsonl, so it has no head"),
    "no ledger to hold against": Case(
        WHOLE, ("validate", "{}", "--against", "a" * 32), 2, "has no ledger, so it has no head"
    ),
    "bits a byte": Case(CHAT, ("ttest", "{}"), 2, "its losses are in bits per byte, for which no threshold is known"),
    "left out": Case(
        {"t.csv": "name,state,loss\na,crashed,1\nb,finished,2\n"},
        ("ttest", "{}/t.csv"),
        3,
        r"needs at least 2 losses; found 1: \[2.0\]; left out: a \(crashed, says t.csv\)",
    ),
    "drop by hand": Case(WHOLE, ("library",), 3, "no run named 'z' to drop"),
    "no file at all": usage("no file or folder was named", "library", code=3),
}

LEDGERS = {
    "log gone": Case(
        {**WHOLE, "ledger.jsonl": events(launched("z"), ended("z"))},
        ("ttest", "{}"),
        3,
        "run z finished by the ledger, but its log is not there",
    ),
    "log gone, watched": Case(
        {**WHOLE, "ledger.jsonl": events(launched("z"), ended("z"))},
        (PLAN, ("monitor", "{}")),
        3,
        "run z finished by the ledger, but its log is not there",
    ),
    "diverged": Case(
        {**WHOLE, "ledger.jsonl": events(launched("a"), ended("a", status="crashed", exit_code=4))},
        ("ttest", "{}"),
        3,
        "its loss was no longer finite, says the ledger",
    ),
    "dropped": Case(
        {**WHOLE, "ledger.jsonl": events(launched("a"), {"event": "drop", "run": "a"})},
        ("ttest", "{}"),
        3,
        r"ledger.jsonl:1: run a was dropped without a reason",
    ),
    "no event": Case({**WHOLE, "ledger.jsonl": "[1]\n"}, ("validate", "{}"), 1, "not an event of a ledger: '.1.'"),
    "no run": Case(
        {**WHOLE, "ledger.jsonl": '{"event": "end"}\n'}, ("validate", "{}"), 1, 'event "end" does not name its "run"'
    ),
    "never launched": Case(
        {**WHOLE, "ledger.jsonl": events(ended("a"))},
        ("validate", "{}"),
        1,
        "event \"end\" of run 'a', which was never launched",
    ),
    "status": Case(
        {**WHOLE, "ledger.jsonl": events(launched("a"), ended("a", status="fine"))},
        ("validate", "{}"),
        1,
        "run 'a' ended as 'fine': one of finished, crashed, interrupted",
    ),
    "chain broken": Case(
        {**WHOLE, "ledger.jsonl": events(launched("a"), ended("a")).replace(b'"seed": 0', b'"seed": 1')},
        ("validate", "{}"),
        1,
        "the lines above are not those that stood there",
    ),
    "line put in": Case(
        {**WHOLE, "ledger.jsonl": events(launched("a")) + b'{"event": "launch", "run": "b"}\n'},
        ("validate", "{}"),
        1,
        "this line carries no link to the lines above it",
    ),
    "no commit": Case(
        {**WHOLE, "ledger.jsonl": events(launched("a"), ended("a"))},
        ("validate", "{}", "--against", "no-such-commit"),
        2,
        "is neither a head nor a commit that holds",
    ),
}


def plan(**fields):
    """plan.json's text."""
    told = {"threshold": 2.92, "margin": 6e-4, "sigma": 8e-4, "sigma_source": "x", "alpha": 0.01, "beta": 0.1, "cap": 9}
    return json.dumps({key: value for key, value in (told | fields).items() if value is not ...})


def of_plan(says, **fields):
    return Case({**WHOLE, "plan.json": plan(**fields)}, ("monitor", "{}"), 3, rf"plan.json: {says}")


PLANS = {
    "no plan": Case(WHOLE, ("monitor", "{}"), 2, "has no plan.json; make one with `plan`"),
    "twice": Case({}, (PLAN, PLAN), 2, "plan.json exists; a plan is made once"),
    "not there": usage("cannot be written: ", "plan", "--write", "/dev/null/plan.json", code=3),
    "no field": of_plan("a plan has no field 'x'", x=1),
    "no plan at all": of_plan("not a plan: cap is 'nine'", cap="nine"),
    "no sense": of_plan("a plan that makes no sense: method 'luck': one of", method="luck"),
    "bounds": of_plan("a plan that makes no sense: bounds 'wide': strict or wald", bounds="wide"),
    "schema": of_plan("a plan that makes no sense: schema 2: this program knows 1", schema=2),
    "changed": of_plan("changed after it was written: its hash does not fit", hash="0" * 64),
    "mixed": Case(
        {**WHOLE, "c.txt": log(steps=(30, 60)), "plan.json": plan()},
        ("monitor", "{}"),
        3,
        "runs of different configurations: 2 different sets",
    ),
    "threshold": usage("the threshold must be finite, not nan", "plan", "--threshold", "nan"),
    "beta": usage("beta must lie between 0 and 1 - alpha, not 1", "plan", "--beta", "1"),
    "effect": usage("margin / sigma is 1.25e.05: beyond what runs can tell", "plan", "--margin", "1e-8"),
    "margin": usage("margin must be positive, not 0", "plan", "--margin", "0"),
    "cap": usage(r"the cap must lie between 2 and \d+ runs, not 1", "plan", "--cap", "1"),
    "first look": usage("the first look needs at least 2 runs, not 1", "plan", "--first-look", "1"),
    "first look late": usage(
        "the first look, at 9 runs, is beyond the cap of 5", "plan", "--first-look", "9", "--cap", "5"
    ),
    "nodes": usage("nodes: at least 1, not 0", "plan", "--nodes", "0"),
    "looks": usage(
        r"looks must grow, from 2 at least to the cap of 9: \(5, 3\)",
        "plan",
        "--method",
        "group-sequential",
        "--looks",
        "5,3",
        "--cap",
        "9",
    ),
    "too many": usage(
        r"a margin of .* at sigma .* takes more than \d+ runs", "plan", "--margin", "1e-5", "--sigma", "9e-4"
    ),
    "bare": usage("losses on the command line need a --plan", "monitor", "2.9", "2.91"),
    "bare nan": usage(
        r"a sequential test needs finite losses; found \[nan\]",
        PLAN,
        ("monitor", "2.9", "nan", "--plan", "{}/plan.json"),
        code=3,
    ),
    "bare alike": Case(
        {"plan.json": plan(cap=4, first_look=4)},
        ("monitor", *["2.9"] * 4, "--plan", "{}/plan.json"),
        3,
        "no variance: all 4 planned losses are 2.9; copies",
    ),
}

QUESTIONS = {
    "alpha": usage("alpha must be above 0 and at most 0.5, not 2", "ttest", "2.9", "2.91", "--alpha", "2"),
    "threshold": usage("the threshold must be finite, not inf", "ttest", "2.9", "2.91", "--threshold", "inf"),
    "sigma": usage("the pooled sigma must be positive, not -1", "ttest", "2.9", "2.91", "--pooled-sigma=-1"),
    "nan": usage("loss 1 of 2 is nan: only finite losses", "ttest", "nan", "2.9", code=3),
    "losses and paths": usage("losses and paths together: 'x.txt' is not a number", "ttest", "2.9", "x.txt"),
    "target": Case(WHOLE, ("curve", "{}", "--target", "inf"), 2, "the target must be finite, not inf"),
    "margin": Case(
        WHOLE, ("compare", "{}/a.txt", "{}/b.txt", "--loss-margin", "-1"), 2, "a margin must be positive, not -1"
    ),
    "one run a side": Case(WHOLE, ("compare", "{}/a.txt", "{}/b.txt"), 3, r"a.txt: a t-test needs at least 2 losses"),
    "units": Case(
        {"t.csv": "run,loss\na,1\nb,2\n", **CHAT}, ("compare", "{}/t.csv", "{}/n"), 3, "losses in different units"
    ),
    "dunnett": Case(
        TWO,
        ("compare", "{}/x.csv", "{}/x.csv", "--correction", "dunnett", "--loss-margin", "1"),
        2,
        "Dunnett's test knows no equivalence",
    ),
    "sequential": Case(
        TWO, ("compare", *["{}/x.csv"] * 3, "--sequential", "1", "1"), 2, "--sequential compares one candidate"
    ),
    "sequential times": Case(
        TWO,
        ("compare", *["{}/x.csv"] * 2, "--sequential", "1", "1", "--by", "time"),
        2,
        "--sequential asks about the losses",
    ),
    "html": Case(WHOLE, ("report", "{}", "--html", "/dev/null/x.html"), 3, "/dev/null/x.html: cannot be written"),
    "no jinja2": Case(
        WHOLE,
        ("report", "{}", "--html", "{}/x.html"),
        2,
        "--html needs jinja2: pip install jinja2",
        (("jinja2", "", None),),
    ),
    "no matplotlib": usage(
        "a picture needs matplotlib.*: pip install matplotlib, or name an .svg",
        "ttest",
        "2.9",
        "2.91",
        "--plot",
        "{}/x.png",
        patch=(("matplotlib", "", None), ("matplotlib.figure", "", None)),
    ),
    "no such picture": usage("--plot .*/none/x.svg: ", "ttest", "2.9", "2.91", "--plot", "{}/none/x.svg"),
    "no tensorboard": Case(
        {"events.out.tfevents.1": b"x"},
        ("ttest", "{}/events.out.tfevents.1"),
        3,
        "reading it needs `pip install tensorboard`",
        (("tensorboard.backend.event_processing.event_accumulator", "", None),),
    ),
}

GROUPS = dict(log=LOGS, table=TABLES, folder=FOLDERS, ledger=LEDGERS, plan=PLANS, question=QUESTIONS)
CASES = {
    f"{group}: {name}": case
    for group, cases in dict(
        log=LOGS, table=TABLES, folder=FOLDERS, ledger=LEDGERS, plan=PLANS, question=QUESTIONS
    ).items()
    for name, case in cases.items()
}
KINDS = ("DataError", "UsageError", "EmptyLog", "NoReader", "StatsError", "Problem", "problem")
# {place: why no command gets there}
OUT_OF_REACH = {
    "paired.py": "studies of the records' room ask it: tests/stats/test_paired.py",
    "compare.py: correction": "the command line knows the two words",
    "compare.py: nothing to compare with": "the command line asks for a candidate",
    "power.py: power must lie": "the design asks for fixed powers",
    "power.py: at least 2 runs and a power": "a sample of fewer is refused before",
    "runs.py: text": "what every problem of a log goes through",
    "runs.py: no training run in it": "a text that is no log is given to the consoles, whose refusal is told",
    "sources.py: TensorBoard": "tests/stats/test_libraries.py, with the library's own writer",
    "sources.py: {tag!r} has two values": "tests/stats/test_libraries.py, with the library's own writer",
    "sources.py: {told}": "tests/stats/test_libraries.py, with the library's own writer",
    "offline.py: ": "tests/stats/test_libraries.py, with the library's own writer",
}


# ----------------------------------------------------------------------------------------------------
# Running them, and noting where each refusal was made


@contextlib.contextmanager
def patched(patches):
    """Names of modules with other values; a module that cannot be imported."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in patches:
            if not name:
                patch.setitem(sys.modules, module, value)
            elif value == "MemoryError":

                def full(*_):
                    raise MemoryError

                patch.setattr(sys.modules[module], name, full)
            else:
                patch.setattr(sys.modules[module], name, value)
        yield


def run(case, folder):
    """(exit code, all that was said)."""
    for name, data in case.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    commands = case.words if isinstance(case.words[0], tuple) else (case.words,)
    commands = [one if isinstance(one, tuple) else commands for one in commands]
    out = io.StringIO()
    code = None
    for words in commands:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), patched(case.patch):
            code = (
                by_hand(folder) if words == ("library",) else main([word.replace("{}", str(folder)) for word in words])
            )
    return code, out.getvalue()


def by_hand(folder):
    """What only somebody gets who uses this as a library."""
    try:
        sample_of(find_series([folder] if list(folder.iterdir()) else [])[0], drop={"z": "late"})
    except StatsError as error:
        print(error)
        return int(error.exit_code)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """({case: (exit code, text)}, places that were reached)."""
    told = {}
    with Places() as places:
        for name, case in CASES.items():
            told[name] = run(case, tmp_path_factory.mktemp("case"))
    return told, places.seen


@pytest.mark.parametrize("name", CASES)
def test_a_refusal_has_its_own_reason(name, outcomes):
    code, text = outcomes[0][name]
    case = CASES[name]
    assert (code, bool(re.search(case.says, text))) == (case.code, True), text[:2000]


def test_every_refusal_has_a_case(outcomes):
    """A new `raise` in stats fails here until the table above has a case for it."""
    missing = without_a_case(outcomes[1], KINDS)
    missing = [place for place in missing if not any(f"/{known}" in f"/{place}" for known in OUT_OF_REACH)]
    assert not missing, "\n".join(missing)
