"""From a series' logs to its record.json, README.md and losses.png. No number in them is typed by hand.

    python -m records.report records/nano        # write all three anew
    python -m records.report records             # of every series in the folder

Losses and times come from the logs through `stats`; hardware, versions and curves from the JSON beside
them. A log and its JSON that disagree are an error: one of them was changed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data.echo import program
from data.paths import write_text
from records.account import EXIT_NO_VERDICT, Account, Verdict, decide, read_account
from records.folder import SeriesError, write_record
from records.ledger import Ledger, ledger_summary
from stats.samples import RUN_FIELDS
from stats.ttest import summarize
from trainer.options import command, setting

TTEST_KEYS = (
    "n",
    "sample_mean",
    "sample_std",
    "t_stat",
    "p_value",
    "alpha",
    "decision",
    "upper_conf_bound_mean",
    "threshold",
)
ALPHA = 0.01  # the track's rule


def write_report(account: Account, verdict: Verdict) -> dict:
    """Write record.json, README.md and losses.png of a series anew; returns the record. Raises SeriesError."""
    folder, results = account.folder, account.results
    hashes = {result.get("config_hash") for result in results}
    if len(hashes) > 1:
        names = ", ".join(f"{r['run']} {str(r.get('config_hash'))[:8]}" for r in results)
        raise SeriesError(f"{folder}: runs of different configurations: {names}")
    record = account.record | facts_of(results)
    record["ledger"] = ledger_summary(account.events)
    record["results"] = results_of(results, verdict)
    if account.series.plan_path is not None:
        record["sequential"] = verdict.decision.words if verdict.decision else f"No verdict: {verdict.undecided}."
    write_record(folder, record)
    if results:
        draw_losses(folder, record, results)
    write_text(folder / "README.md", readme(folder.name, record, results))
    return record


def report(folder: str | Path, alpha: float = ALPHA) -> dict:
    """Read a series and write its report; nobody has looked at the test. Raises SeriesError."""
    account = read_account(folder)
    return write_report(account, decide(account, alpha))


def facts_of(results: Sequence[dict]) -> dict:
    """Configuration, hashes and machines of the runs; empty before the first has finished."""
    if not results:
        return {}
    first = results[0]
    config = {k: v for k, v in first["config"].items() if k not in RUN_FIELDS}
    machines: dict[str, list[str]] = {}
    for result in results:
        machines.setdefault(json.dumps(machine(result), sort_keys=True), []).append(result["run"])
    return {
        "config": config,
        "config_hash": first.get("config_hash"),
        "data_hash": first.get("data_hash"),
        "kernels_hash": first.get("kernels_hash"),
        "program_hash": first.get("program_hash"),
        "threshold": config.get("target_loss"),
        "loss_floor": loss_floor(results),
        "machines": [json.loads(text) | {"runs": runs} for text, runs in machines.items()],
        "first_start": min(r["start_time"] for r in results),
        "last_end": max(r["end_time"] for r in results),
    }


def machine(result: dict) -> dict:
    """What a run's times depend on."""
    told = result.get("environment", {})
    keys = ("hardware", "compute", "world_size", "torch", "triton", "python", "system", "implementations")
    return {key: told[key] for key in keys if key in told}


def results_of(results: Sequence[dict], verdict: Verdict) -> dict:
    """The part of record.json that a reader quotes: one row a run, summaries, the t-test's dictionary."""
    rows = [
        {
            "run": r["run"],
            "seed": r["seed"],
            "steps": r["validation"][-1]["step"],
            "loss": r["final_loss"],
            "train_time_s": r["train_time_s"],
            "step_avg_ms": r["validation"][-1]["step_avg_ms"],
            "peak_memory_mib": r.get("peak_memory_mib"),
            "launches": r["attempts"],
        }
        for r in results
    ]
    found: dict = {"runs": rows}
    if rows:
        found["loss"] = asdict(summarize([row["loss"] for row in rows]))
        found["train_time_s"] = asdict(summarize([row["train_time_s"] for row in rows]))
    if verdict.test is not None:
        found["ttest"] = {key: getattr(verdict.test, key) for key in TTEST_KEYS}
    else:
        found["no_verdict"] = verdict.why_none
    return found


# -----------------------------------------------------------------------------------------------------------
# The picture


def draw_losses(folder: Path, record: dict, results: Sequence[dict]) -> None:
    """losses.png: left the loss curves, right the final losses with mean, bound and threshold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    threshold = record.get("threshold")
    figure, (curves, finals) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(3, 1.4), layout="constrained")
    for result in results:
        # The untrained loss would flatten the rest of the curve; with few points it is all there is.
        points = [p for p in result["validation"] if p["step"] > 0 or len(result["validation"]) < 4]
        curves.plot(
            [p["step"] for p in points],
            [p["loss"] for p in points],
            color="tab:blue",
            alpha=max(0.15, 1 / len(results)),
            linewidth=1.2,
        )
    curves.set(
        xlabel="training steps",
        ylabel="validation loss (nats per token)",
        title=f"{len(results)} runs of {folder.name}",
    )
    losses = [r["final_loss"] for r in results]
    seeds = [r["seed"] for r in results]
    finals.plot(seeds, losses, "o", color="tab:blue", markersize=4, label="a run")
    mean = record["results"]["loss"]["mean"]
    finals.axhline(mean, color="tab:blue", linewidth=1, label=f"mean {mean:.4f}")
    ttest = record["results"].get("ttest")
    if ttest:
        bound, level = ttest["upper_conf_bound_mean"], 1 - ttest["alpha"]
        finals.axhline(bound, color="tab:blue", linewidth=1, linestyle=":", label=f"{level:.0%} bound of the mean")
    if threshold is not None:
        for axis in (curves, finals):
            axis.axhline(threshold, color="tab:red", linewidth=1, linestyle="--", label=f"threshold {threshold:g}")
    floor = record.get("loss_floor")
    if floor is not None:
        curves.axhline(floor, color="tab:gray", linewidth=1, linestyle=":", label=f"best possible {floor:.4f}")
    finals.set(xlabel="seed", title="final loss")
    finals.xaxis.get_major_locator().set_params(integer=True)
    curves.legend(fontsize="small", frameon=False)
    finals.legend(fontsize="x-small", frameon=False)
    for axis in (curves, finals):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    # No date and no software version in the file: the same logs give the same bytes.
    temporary = folder / ".losses.png"
    figure.savefig(temporary, dpi=120, format="png", metadata={"Software": None})
    plt.close(figure)
    temporary.replace(folder / "losses.png")


def loss_floor(results: Sequence[dict]) -> float | None:
    """The best possible loss on the validation tokens where the trainer knows it (embedded corpus), in nats."""
    floors = {result.get("loss_floor") for result in results}
    return floors.pop() if len(floors) == 1 else None


# -----------------------------------------------------------------------------------------------------------
# README


def readme(name: str, record: dict, results: Sequence[dict]) -> str:
    """The series' README.md."""
    identity = record["identity"]
    flags = "".join(f" --{key}={text}" for key, text in identity["overrides"].items())
    nproc = f" --nproc {identity['nproc']}" if identity["nproc"] > 1 else ""
    wanted = max((r["seed"] for r in results), default=0) + 1
    parts = [
        f"# {name}",
        "*Generated by `python -m records.report` from the logs in runs/ and the ledger; do not edit.*",
        f"```\n./run.sh --repeats {wanted} --preset {identity['preset']}{flags}{nproc} --name {name}\n```",
    ]
    if not results:
        parts += ["No run has finished yet.", ledger_words(record["ledger"])]
        return "\n\n".join(parts) + "\n"
    parts += [
        summary_words(record),
        "![Loss curves and final losses](losses.png)",
        summary_table(record["results"]),
        "## Verdict",
        verdict_words(record),
        "## Runs",
        runs_table(record["results"]["runs"]),
        "## Every launch",
        ledger_words(record["ledger"]),
        "## What ran, and where",
        machine_words(record),
    ]
    return "\n\n".join(parts) + "\n"


def summary_words(record: dict) -> str:
    """The result in a sentence or two."""
    results = record["results"]
    loss, times = results["loss"], results["train_time_s"]
    runs = f"{loss['n']} runs" if loss["n"] > 1 else "One run"
    words = f"{runs}: mean final validation loss **{loss['mean']:.6f}** nats per token"
    if loss["n"] > 1:
        words += f" (standard deviation {loss['sample_std']:.6f})"
    words += f", mean training time **{times['mean']:.1f} s**."
    floor = record.get("loss_floor")
    if floor is not None:
        words += (
            f" The best possible loss on these validation tokens is {floor:.6f} nats; "
            f"the mean is {loss['mean'] - floor:.6f} above it."
        )
    return words


def summary_table(results: dict) -> str:
    """Mean, median, std, min, max of losses and times."""
    rows = ["| | n | mean | median | std (population) | std (sample) | min | max |", "|-|-|-|-|-|-|-|-|"]
    for title, key, digits in (("final loss", "loss", 6), ("training time (s)", "train_time_s", 3)):
        s = results[key]
        cells = [
            f"{s[k]:.{digits}f}" if s[k] is not None else ""
            for k in ("mean", "median", "std", "sample_std", "min", "max")
        ]
        rows.append(f"| {title} | {s['n']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def verdict_words(record: dict) -> str:
    """The t-test's dictionary, or why there is none."""
    results = record["results"]
    if "ttest" not in results:
        return f"None: {results['no_verdict']}."
    test = results["ttest"]
    lines = [f"Is the mean loss below {test['threshold']:g}? One-sided t-test at alpha = {test['alpha']:g}:", ""]
    lines += ["```json", json.dumps(test, indent=1), "```"]
    looks = record["ledger"]["looks"]
    if looks > 1 and not record.get("plan_hash"):
        lines += [
            "",
            f"The test was looked at {looks} times while the series grew. Unless the number of "
            "runs was fixed beforehand, its p-value is too small.",
        ]
    if record.get("plan_hash"):
        lines += [
            "",
            f"The series followed plan.json (hash `{record['plan_hash'][:16]}`, in every log), "
            "which allows for looking after every run; its verdict counts, not this p.",
        ]
        if "sequential" in record:
            lines += ["", record["sequential"]]
    return "\n".join(lines)


def runs_table(rows: Sequence[dict]) -> str:
    """One line a finished run."""
    lines = ["| seed | steps | final loss | time (s) | ms a step | peak memory (MiB) | launches |", "|-|-|-|-|-|-|-|"]
    for row in rows:
        memory = "" if row["peak_memory_mib"] is None else f"{row['peak_memory_mib']:.0f}"
        lines.append(
            f"| {row['seed']} | {row['steps']} | {row['loss']:.6f} | {row['train_time_s']:.3f} "
            f"| {row['step_avg_ms']:.2f} | {memory} | {row['launches']} |"
        )
    return "\n".join(lines)


def ledger_words(ledger: dict) -> str:
    """What the ledger says of launches that did not simply finish."""
    by_status = ", ".join(f"{n} {status}" for status, n in ledger["runs_by_status"].items()) or "none"
    lines = [f"Of {ledger['runs']} runs in {ledger['launches']} launches: {by_status}."]
    if ledger["resumed_launches"]:
        lines.append(f"{ledger['resumed_launches']} launches resumed a run from its checkpoint.")
    lines += [f"- {run} crashed: {why}" for run, why in ledger["crashed"]]
    lines += [f"- {run} was left out: {reason}" for run, reason in ledger["dropped"].items()]
    if ledger["cancelled"]:
        reason = next(iter(ledger["cancelled"].values()))
        lines.append(f"- {len(ledger['cancelled'])} queued runs were cancelled: {reason}")
    return "\n".join(lines)


def machine_words(record: dict) -> str:
    """Code, data and hardware."""
    lines = [
        f"- Program: `source/{record['code_hash'][:16]}.py` (sha256 `{record['code_hash']}`)",
        f"- Configuration hash: `{record['config_hash']}`; data hash: `{record['data_hash']}`; "
        + (
            f"program hash: `{record['program_hash']}`"
            if record.get("program_hash")
            else f"kernels hash: `{record.get('kernels_hash')}`"
        ),
        f"- From {record['first_start']} to {record['last_end']}",
    ]
    for told in record["machines"]:
        what = ", ".join(f"{key} {told[key]}" for key in ("torch", "triton", "python") if key in told)
        which = f" ({len(told['runs'])} runs)" if len(record["machines"]) > 1 else ""
        lines.append(
            f"- {told.get('hardware')}, {told.get('compute')}, {told.get('world_size')} processes a run; "
            f"{what}; {told.get('system')}{which}"
        )
        ran = told.get("implementations", {})
        if ran:
            lines.append("- Implementations: " + ", ".join(f"{k} {v}" for k, v in sorted(ran.items())))
    return "\n".join(lines)


# -----------------------------------------------------------------------------------------------------------
# The verdict on the terminal


def judge(folder: Path, alpha: float = ALPHA) -> int:
    """Read the series, decide, note that the test was looked at, write the report, print the verdict; returns the
    verdict's exit code. Raises SeriesError."""
    account = read_account(folder)
    verdict = decide(account, alpha)
    account = _noted(account, verdict.look)
    write_report(account, verdict)
    ended = all(state.status in ("finished", "dropped") for state in account.states.values())
    if account.series.plan_path is None and len(account.results) == 1 and ended:
        (result,) = account.results
        target = result["config"].get("target_loss")
        print(f"one run: loss {result['final_loss']:.6f}, target {target}; a verdict needs at least two runs")
        return 0
    if verdict.exit_code == EXIT_NO_VERDICT:
        print(verdict.words, file=sys.stderr)
    else:
        print(f"\n{verdict.words}")
    return verdict.exit_code


def _noted(account: Account, look: dict | None) -> Account:
    """The account with a line more in its ledger, unless the same runs were looked at before."""
    looks = [event for event in account.events if event["event"] == "judge"]
    if look is None or (looks and looks[-1].get("n") == look["n"]):
        return account
    return replace(account, events=(*account.events, Ledger(account.folder).append("judge", **look)))


@dataclass(frozen=True)
class Options:
    """How the series are judged: beside the folder of one series, or of several."""

    alpha: float = setting(ALPHA, "probability", "of a wrong verdict", above=0, below=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Regenerate reports; returns the exit code."""
    (place,), options = command(__doc__, argv, Options, (1, 1))
    folder = Path(place)
    folders = [folder]
    if not (folder / "record.json").exists():
        folders = sorted(path.parent for path in folder.glob("*/record.json"))
    try:
        if not folders:
            raise SeriesError(f"{folder} holds no series: no record.json in it or just below")
        for folder in folders:
            report(folder, options.alpha)
            print(f"{folder}: record.json, README.md, losses.png")
    except SeriesError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(program("records.report", main))
