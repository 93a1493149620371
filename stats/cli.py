"""The command line of every verb. Only argparse is imported here; a verb loads what it needs when it runs.

Exit codes: 0 pass, 1 not significant, 2 usage, 3 invalid data, 4 continue (of a sequential test).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from stats.errors import Exit, StatsError, UsageError

Result = TypeVar("Result")


def main(arguments: Sequence[str] | None = None, program: str = "python -m stats") -> int:
    """Runs one verb; returns the exit code."""
    parser = build_parser(program)
    try:
        options = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return int(options.handler(options))
    except StatsError as error:
        # a file's name may hold bytes that are no text
        print(f"error: {error}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has left, as `| head` does
        return int(Exit.PASS)
    except OSError as error:  # a name that is too long, a folder that may not be read
        print(f"error: {error.filename!a}: {error.strerror or error}", file=sys.stderr)
        return int(Exit.INVALID_DATA)


def build_parser(program: str = "python -m stats") -> argparse.ArgumentParser:
    """All verbs and their options."""
    if program.endswith("stats.ttest"):  # one verb by itself: no verb to name
        parser = argparse.ArgumentParser(
            prog=program, description=_TTEST_HELP, epilog=_EPILOG, formatter_class=_Formatter
        )
        # main() passes the verb's name first, for one way through the code.
        parser.add_argument("verb", choices=["ttest"], help=argparse.SUPPRESS)
        _ttest_options(parser)
        return parser
    parser = argparse.ArgumentParser(prog=program, description="From training logs to verdicts.", epilog=_EPILOG)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, text, add_options in _VERBS:
        verb = verbs.add_parser(
            name, help=text.split("\n")[0], description=text, epilog=_EPILOG, formatter_class=_Formatter
        )
        add_options(verb)
    return parser


_Formatter = argparse.RawDescriptionHelpFormatter
_EPILOG = "exit codes: 0 pass, 1 not significant, 2 usage, 3 invalid data, 4 continue"

# ----------------------------------------------------------------------------------------------------
# Options that several verbs share


def _common(parser: argparse.ArgumentParser, handler: Callable) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(handler=handler)


def _selection(parser: argparse.ArgumentParser) -> None:
    """Which runs count."""
    parser.add_argument("--stop-step", type=int, metavar="N", help="judge every run at its validation at step N")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="RUN=REASON", help="leave a run out; the reason is printed"
    )
    parser.add_argument("--allow-mixed", action="store_true", help="runs of different configurations as one sample")


def _question(parser: argparse.ArgumentParser) -> None:
    """Which runs count and against what, for verbs that judge."""
    parser.add_argument("--threshold", type=float, help="default: each series' own, else 2.92")
    _selection(parser)
    _grouping(parser)


def _grouping(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group-by", choices=["code", "config", "hardware", "steps"], help="take apart a folder that mixes these"
    )


def _asked(options: argparse.Namespace) -> dict:
    """The selection as keyword arguments of validate_each and leaderboard."""
    names = ("threshold", "stop_step", "allow_mixed")
    return {name: getattr(options, name) for name in names} | {"drop": _drops(options)}


def _find(options: argparse.Namespace, paths: Sequence[str]) -> list:
    """The series at `paths`, taken apart where --group-by says so; what was passed over is told."""
    from stats.series import find_series

    series = find_series(paths)
    _note_reading(options, series)
    if by := getattr(options, "group_by", None):
        from stats.samples import split

        series = [part for one in series for part in split(one, by)]
    return series


def _note_reading(options: argparse.Namespace, series: list) -> None:
    """What this command has read goes into its JSON, or onto standard error where something was passed over."""
    from stats.series import reading_of

    options.sources = [*getattr(options, "sources", ()), *series]
    options.reading = reading_of(options.sources)
    if not options.json:
        _tell_reading(reading_of(series))


def _tell_reading(reading: Any) -> None:
    """One line on standard error, where something was passed over."""
    passed = reading.passed_over
    if passed:
        first = f"{passed[0].path} ({passed[0].reason})"
        more = f" and {len(passed) - 1} more (all of them with --json)" if len(passed) > 1 else ""
        print(f"read {reading.runs} runs in {reading.series} series; passed over {first}{more}", file=sys.stderr)


def _drops(options: argparse.Namespace) -> dict[str, str]:
    drops = {}
    for text in options.drop:
        run, _, reason = text.partition("=")
        if not run or not reason.strip():
            raise UsageError(f"--drop {text}: write RUN=REASON; a run is not dropped without a reason")
        drops[run] = reason.strip()
    return drops


def _show(options: argparse.Namespace, result: Result, render: Callable[[Result], str]) -> None:
    if options.json:
        _print_json(result, getattr(options, "reading", None))
    else:
        print(render(result))


def _print_json(value: object, reading: object = None) -> None:
    """The result, with `reading`: what was read and what was passed over."""
    from stats.jsonio import dumps, to_jsonable

    told = to_jsonable(value)
    print(dumps(told if reading is None else told | {"reading": reading}))


# ----------------------------------------------------------------------------------------------------
# ttest

_TTEST_HELP = """Is the mean validation loss below the threshold? One-sided one-sample t-test.

PATH is a folder of logs (or of series, each judged by itself), a log, a CSV, JSON or JSONL table, `-` for
standard input, or simply losses: `ttest 2.9195 2.9198 2.9206`."""


def _ttest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folders, files, -, or losses")
    parser.add_argument("--threshold", type=float, help="default: what record.json says, else 2.92")
    parser.add_argument("--alpha", type=float, default=0.05, help="level of the test and its bound (default 0.05)")
    parser.add_argument(
        "--pooled-sigma",
        type=float,
        nargs="?",
        const=-1.0,
        metavar="SIGMA",
        help="add the z-test with a standard deviation from elsewhere (no value: the medium track's, 0.0008)",
    )
    parser.add_argument("--no-sensitivity", action="store_true", help="leave out the bootstrap and the sign flips")
    parser.add_argument("--plot", metavar="FILE", help="draw the first series: every loss, mean, bound, threshold")
    _selection(parser)
    _grouping(parser)
    _common(parser, _run_ttest)


def _run_ttest(options: argparse.Namespace) -> int:
    from stats.judge import judge, judge_each
    from stats.ttest import POOLED_SIGMA, POOLED_SIGMA_DF, check_alpha, render, ttest

    check_alpha(options.alpha)
    settings = {"alpha": options.alpha, "sensitivity": not options.no_sensitivity}
    settings["pooled_sigma"] = options.pooled_sigma
    if options.pooled_sigma == -1.0:
        settings |= {"pooled_sigma": POOLED_SIGMA, "pooled_sigma_df": POOLED_SIGMA_DF}
    losses, decimals = _losses_on_command_line(options.paths)
    errors: tuple[str, ...] = ()
    if losses:
        threshold = {} if options.threshold is None else {"threshold": options.threshold}
        results = [ttest(losses, decimals=decimals, **threshold, **settings)]
    else:
        selection = (options.stop_step, _drops(options), options.allow_mixed)
        series = _find(options, options.paths)
        if len(series) == 1:
            results = [judge(series[0], options.threshold, *selection, **settings)]
        else:
            every = judge_each(series, options.threshold, *selection, **settings)
            results, errors = list(every.results), every.errors
    if options.json:
        _print_json(results[0] if len(results) == 1 and not errors else every, getattr(options, "reading", None))
    else:
        print("\n\n".join(map(render, results)))
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if options.plot and results:
        _plot(results, losses, options)
    if errors:
        return Exit.INVALID_DATA
    return Exit.PASS if all(result.significant for result in results) else Exit.NOT_SIGNIFICANT


def _losses_on_command_line(words: Sequence[str]) -> tuple[list[float], int | None]:
    """(losses, digits after the point) if every word is a number, else ([], None)."""
    try:
        losses = [float(word) for word in words]
    except ValueError:
        numbers = [word for word in words if word.replace(".", "", 1).isdigit()]
        if numbers and len(numbers) < len(words):
            odd = next(word for word in words if word not in numbers)
            raise UsageError(f"losses and paths together: {odd!r} is not a number") from None
        return [], None
    plain = all("e" not in word.lower() for word in words)
    return losses, max(len(word.partition(".")[2]) for word in words) if plain else None


# ----------------------------------------------------------------------------------------------------
# compare

_COMPARE_HELP = """Do the losses and times of two recipes differ? The first PATH is the baseline.

Welch's t-test, paired tests by seed or host where runs pair up, Holm's correction over several candidates, and, with
a margin, equivalence. Exit code 0: at least one loss or time differs at alpha, or was shown to be equivalent; 1: no
evidence of a difference."""


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("baseline", metavar="BASELINE", help="folder or file of the baseline's runs")
    parser.add_argument("candidates", nargs="+", metavar="CANDIDATE", help="folders or files, each one candidate")
    parser.add_argument("--alpha", type=float, default=0.05, help="level of tests and intervals (default 0.05)")
    parser.add_argument("--loss-margin", type=float, metavar="NATS", help="test equivalence of the losses within this")
    parser.add_argument("--time-margin", type=float, metavar="SECONDS", help="the same for the times")
    parser.add_argument("--threshold", type=float, default=2.92, help="of the table's last column (default 2.92)")
    parser.add_argument("--correction", choices=["holm", "dunnett"], default="holm", help="over several candidates")
    parser.add_argument(
        "--sequential",
        type=float,
        nargs=2,
        metavar=("MARGIN", "SIGMA"),
        help="stop when decided: ask after every pair whether the losses differ by MARGIN, runs scattering by SIGMA",
    )
    _selection(parser)
    _common(parser, _run_compare)


def _run_compare(options: argparse.Namespace) -> int:
    from stats.compare import compare, render

    samples = [_sample(path, options) for path in (options.baseline, *options.candidates)]
    if options.sequential:
        return _run_compare_sequentially(samples, options)
    result = compare(
        samples[0],
        samples[1:],
        options.alpha,
        loss_margin=options.loss_margin,
        time_margin_s=options.time_margin,
        threshold=options.threshold,
        correction=options.correction,
    )
    _show(options, result, render)
    return Exit.PASS if result.found_something else Exit.NOT_SIGNIFICANT


def _run_compare_sequentially(samples: list, options: argparse.Namespace) -> int:
    from stats.compare import compare_sequentially

    if len(samples) != 2:
        raise UsageError("--sequential compares one candidate with the baseline")
    baseline, candidate = samples
    margin, sigma = options.sequential
    result = compare_sequentially(baseline, candidate, margin, sigma, options.alpha)
    _show(options, result, lambda one: one.words)
    return {"CONTINUE": Exit.CONTINUE, "FUTILE": Exit.NOT_SIGNIFICANT}.get(result.verdict, Exit.PASS)


def _sample(path: str, options: argparse.Namespace, of_a_pilot: bool = False) -> Any:
    """The sample of the one series at `path`; drops apply where a run of that name is. The --stop-step of a plan is not
    its pilot's."""
    from stats.errors import DataError
    from stats.samples import sample_of
    from stats.series import find_series

    series = find_series([path])
    _note_reading(options, series)
    if len(series) > 1:
        names = ", ".join(one.name for one in series[:4])
        raise DataError(f"{len(series)} series here ({names}, ...): name one of them", path)
    known = {run.name for run in series[0].runs}
    drops = {run: reason for run, reason in _drops(options).items() if run in known}
    return sample_of(series[0], None if of_a_pilot else options.stop_step, drops, options.allow_mixed)


# ----------------------------------------------------------------------------------------------------
# plan

_PLAN_HELP = """How many runs? Power, run numbers and the least margin worth claiming; --write fixes the design.

sequential-t looks after every run, group-sequential a few times, fixed once. The plan's hash belongs into the log of
every run of the series: `./run.sh` and the trainer's --plan_hash put it there."""


def _plan_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--threshold", type=float, default=2.92, help="the series shall show a mean loss below it (default 2.92)")
    add("--margin", type=float, default=0.0006, help="true distance below it worth finding, nats (default 0.0006)")
    add("--sigma", type=float, help="std of the final loss between runs (default: the track's pooled 0.0008)")
    add("--sigma-source", default="", help="where that number comes from")
    add("--sigma-from", metavar="PATH", help="take sigma, seconds and slope from the runs of a pilot series")
    add("--alpha", type=float, default=0.01, help="risk of claiming what is not so (default 0.01)")
    add("--beta", type=float, default=0.11, help="risk of missing a true margin (default 0.11)")
    add("--method", choices=["sequential-t", "group-sequential", "fixed"], default="sequential-t")
    add("--bounds", choices=["strict", "wald"], default="strict", help="of sequential-t (default strict)")
    add("--cap", type=int, help="most runs (default: from the power)")
    add("--first-look", type=int, default=4, help="sequential-t decides from this many runs on (default 4)")
    add("--looks", type=_integers, default=(), metavar="N,N,...", help="group-sequential: runs at which it looks")
    add("--stop-step", type=int, metavar="N", help="judge runs by their validation at step N")
    add("--steps-per-run", type=int, metavar="N", help="training steps of a run, for the margin in seconds")
    add("--seconds-per-run", type=float, help="for the cost in seconds and node-minutes")
    add("--loss-per-step", type=float, help="slope at the end, for the margin in steps")
    add("--nodes", type=int, default=1, help="machines that one run takes (default 1)")
    add("--note", default="", help="a sentence that is kept in the plan")
    add("--write", metavar="FILE", help="write the plan, most often <series>/plan.json")
    add("--overwrite", action="store_true", help="replace a plan that exists")
    _common(parser, _run_plan)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _run_plan(options: argparse.Namespace) -> int:
    from stats.design import design, pilot_facts, render
    from stats.planfile import write_plan
    from stats.plans import POOLED_SIGMA_SOURCE, make_plan
    from stats.ttest import POOLED_SIGMA

    facts = {}
    if options.sigma_from:
        options.drop, options.allow_mixed = [], False  # a pilot is judged as it lies there, to its planned end
        facts = pilot_facts(_sample(options.sigma_from, options, of_a_pilot=True))
    if options.sigma is not None:
        facts |= {"sigma": options.sigma, "sigma_source": options.sigma_source or "given on the command line"}
    facts = {"sigma": POOLED_SIGMA, "sigma_source": POOLED_SIGMA_SOURCE} | facts
    for name in ("steps_per_run", "seconds_per_run", "loss_per_step"):
        if getattr(options, name) is not None:
            facts[name] = getattr(options, name)
    names = "threshold margin alpha beta method bounds cap first_look looks stop_step nodes note".split()
    plan = make_plan(**{name: getattr(options, name) for name in names}, **facts)
    result = design(plan)
    if options.write:
        write_plan(plan, options.write, options.overwrite)
    _show(options, result, render)
    return Exit.PASS


# ----------------------------------------------------------------------------------------------------
# monitor

_MONITOR_HELP = """The sequential test on a running series: CONTINUE (exit code 4), ACCEPT (0) or FUTILE (1).

Runs count in the order of their launch. FUTILE means below the planned margin; it does not show that the mean is
above the threshold. PATH may also be losses, in the order of launch, with --plan."""


def _monitor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a series' folder, or losses")
    parser.add_argument("--plan", metavar="FILE", help="default: plan.json of the series")
    parser.add_argument("--drop", action="append", default=[], metavar="RUN=REASON", help="leave a run out")
    _common(parser, _run_monitor)


def _run_monitor(options: argparse.Namespace) -> int:
    from stats.monitor import monitor, monitor_losses, render
    from stats.planfile import read_plan

    plan = read_plan(options.plan) if options.plan else None
    losses, _ = _losses_on_command_line(options.paths)
    if losses:
        if plan is None:
            raise UsageError("losses on the command line need a --plan")
        result = monitor_losses(losses, plan)
    else:
        series = _find(options, options.paths)
        if len(series) > 1:
            raise UsageError(f"{len(series)} series in {' '.join(options.paths)}: name one")
        result = monitor(series[0], plan, _drops(options))
    _show(options, result, render)
    return {"ACCEPT": Exit.PASS, "FUTILE": Exit.NOT_SIGNIFICANT}.get(result.decision.verdict, Exit.CONTINUE)


# ----------------------------------------------------------------------------------------------------
# validate

_VALIDATE_HELP = """Does a record's evidence support its claim? A grade from A to F for each series, with reasons.

Exit code 0: every series has at least the grade --at-least (default C); 1: some have not; 3: nothing to grade."""


def _validate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="series' folders, or folders of them")
    parser.add_argument("--alpha", type=float, default=0.01, help="level of the claim (default 0.01)")
    parser.add_argument("--at-least", choices=list("ABCDF"), default="C", help="grade for exit code 0 (default C)")
    parser.add_argument("--against", metavar="HASH", help="a head of the ledger, or a commit, published before")
    _question(parser)
    _common(parser, _run_validate)


def _run_validate(options: argparse.Namespace) -> int:
    from stats.errors import check_alpha
    from stats.validate import GRADES, render, validate_each

    check_alpha(options.alpha)
    series = _find(options, options.paths)
    result = validate_each(series, options.alpha, against=options.against, **_asked(options))
    _show(options, result, lambda all_: "\n\n".join(map(render, all_.assessments)))
    enough = all(GRADES.index(one.grade) <= GRADES.index(options.at_least) for one in result.assessments)
    return Exit.PASS if enough else Exit.NOT_SIGNIFICANT


# ----------------------------------------------------------------------------------------------------
# curve, times, leaderboard, report

_CURVE_HELP = """Steps and seconds to a target loss, one common step for all runs, and slopes.

Exit code 0: the mean curve reaches the target; 1: it does not."""


def _curve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folders or files, as one series")
    parser.add_argument("--target", type=float, help="loss in nats (default: the series' threshold, else 2.92)")
    parser.add_argument("--alpha", type=float, default=0.01, help="level of the test at each step (default 0.01)")
    _common(parser, _run_curve)


def _run_curve(options: argparse.Namespace) -> int:
    from stats.curve import curve, render
    from stats.ttest import TRACK_THRESHOLD, check_alpha

    check_alpha(options.alpha)
    series = _find(options, options.paths)
    runs = [run for one in series for run in one.runs]
    target = options.target if options.target is not None else series[0].threshold
    name = series[0].name if len(series) == 1 else f"{len(series)} series"
    result = curve(runs, TRACK_THRESHOLD if target is None else target, options.alpha, name)
    _show(options, result, render)
    reached = result.mean_crossing is not None and result.mean_crossing.steps is not None
    return Exit.PASS if reached else Exit.NOT_SIGNIFICANT


_TIMES_HELP = "Training times by host, with outliers labelled (never dropped) and drift."


def _times_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a series' folder, or a file")
    _selection(parser)
    _common(parser, _run_times)


def _run_times(options: argparse.Namespace) -> int:
    from stats.times import render, times

    _show(options, times(_sample(options.path, options)), render)
    return Exit.PASS


_LEADERBOARD_HELP = "All series of a folder: claim, evidence grade, and whether neighbours differ. Markdown."


def _leaderboard_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folders of series")
    parser.add_argument("--alpha", type=float, default=0.01, help="level of the claims (default 0.01)")
    _question(parser)
    _common(parser, _run_leaderboard)


def _run_leaderboard(options: argparse.Namespace) -> int:
    from stats.errors import check_alpha
    from stats.leaderboard import leaderboard

    check_alpha(options.alpha)
    series = _find(options, options.paths)
    _show(options, leaderboard(series, options.alpha, **_asked(options)), lambda board: board.markdown)
    return Exit.PASS


_REPORT_HELP = """A report on one or more series: Markdown for a pull request, and one HTML file with its pictures.

Without --html and --markdown the Markdown is printed. Exit code 0: every series passes at alpha; 1: some do not."""


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="series' folders, or folders of them, or files")
    parser.add_argument("--alpha", type=float, default=0.01, help="level of the verdicts (default 0.01)")
    _question(parser)
    parser.add_argument("--plan", metavar="FILE", help="plan for the sequential path (default: plan.json)")
    parser.add_argument("--html", metavar="FILE", help="write the self-contained HTML page")
    parser.add_argument("--markdown", metavar="FILE", help="write the Markdown")
    _common(parser, _run_report)


def _run_report(options: argparse.Namespace) -> int:
    from stats.errors import check_alpha
    from stats.planfile import read_plan
    from stats.report import make_report, to_html, to_markdown

    check_alpha(options.alpha)
    plan = read_plan(options.plan) if options.plan else None
    report = make_report(_find(options, options.paths), options.alpha, plan=plan, **_asked(options))
    markdown = to_markdown(report)
    for path, make in ((options.html, lambda: to_html(report)), (options.markdown, lambda: markdown)):
        if path:
            _write_text(path, make())
    if options.json:
        _print_json(report, options.reading)
    elif not (options.html or options.markdown):
        print(markdown)
    return report.exit_code


def _write_text(path: str, text: str) -> None:
    from stats.errors import DataError

    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror}", path) from None


_IMPORT_HELP = """What is understood of a source: reader, columns, runs, states, and what was passed over.

SOURCE is a folder or a file: logs of the track, of llm.c, nanoGPT or nanochat; a table that Weights & Biases exports
(of runs, a chart, or one run's history); TensorBoard event files; Hugging Face's trainer_state.json; CSV, JSON, JSONL.
Every verb takes these sources directly."""


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="SOURCE", help="folders or files")
    parser.add_argument("--stop-step", type=int, metavar="N", help="judge every run at its validation at step N")
    _common(parser, _run_import)


def _run_import(options: argparse.Namespace) -> int:
    from stats.importing import look, render
    from stats.series import find_series

    result = look(find_series(options.paths), options.stop_step)
    _show(options, result, render)
    return Exit.PASS if any(run.final_loss is not None for run in result.runs) else Exit.INVALID_DATA


_HEAD_HELP = """The hash of all that a series' ledger says so far: one line to publish before the series goes on.

Later `validate --against HASH` proves that nothing above it was changed since."""


def _head_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="SERIES", help="a series' folder")
    parser.set_defaults(handler=_run_head)


def _run_head(options: argparse.Namespace) -> int:
    from stats.chain import link
    from stats.evidence import ledger_bytes
    from stats.series import load_series

    data = ledger_bytes(load_series(options.path))
    if data is None:
        raise UsageError(f"{options.path} has no ledger.jsonl, so it has no head")
    print(link(data))
    return Exit.PASS


def _plot(results: Sequence, losses: Sequence[float], options: argparse.Namespace) -> None:
    """--plot: the first result as a picture."""
    from stats.figures import draw_test

    if not losses:
        from stats.samples import sample_of
        from stats.series import find_series

        series = next(one for one in find_series(options.paths) if results[0].series in (None, one.name))
        losses = sample_of(series, options.stop_step, _drops(options), options.allow_mixed).losses
    draw_test(results[0], losses, options.plot)


_SCHEMA_HELP = "The JSON Schema of what a verb prints with --json."


def _schema_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("of", metavar="VERB", choices=SCHEMA_CLASSES, help=", ".join(SCHEMA_CLASSES))
    parser.set_defaults(handler=_run_schema)


def _run_schema(options: argparse.Namespace) -> int:
    import json

    print(json.dumps(verb_schema(options.of), indent=2))
    return Exit.PASS


# {verb: the class of what --json prints}
SCHEMA_CLASSES = {
    "ttest": "stats.ttest:TTest",
    "ttest-many": "stats.judge:TTests",
    "compare": "stats.compare:Comparisons",
    "plan": "stats.design:Design",
    "monitor": "stats.monitor:Monitoring",
    "validate": "stats.validate:Assessments",
    "curve": "stats.curve:Curve",
    "times": "stats.times:Times",
    "leaderboard": "stats.leaderboard:Leaderboard",
    "report": "stats.report:Report",
    "import": "stats.importing:Import",
}


def verb_schema(verb: str) -> dict:
    """JSON Schema of a verb's result (`ttest-many`: of `ttest` on several series)."""
    import importlib

    from stats.jsonio import schema

    module, _, name = SCHEMA_CLASSES[verb].partition(":")
    found = schema(getattr(importlib.import_module(module), name))
    root = found["$defs"][name]
    reading = schema(importlib.import_module("stats.series").Reading)
    found["$defs"] |= reading["$defs"]
    root["properties"]["reading"] = {"$ref": "#/$defs/Reading"}  # of sources, not of losses on the command line
    return found


_VERBS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    ("ttest", _TTEST_HELP, _ttest_options),
    ("compare", _COMPARE_HELP, _compare_options),
    ("plan", _PLAN_HELP, _plan_options),
    ("monitor", _MONITOR_HELP, _monitor_options),
    ("validate", _VALIDATE_HELP, _validate_options),
    ("curve", _CURVE_HELP, _curve_options),
    ("times", _TIMES_HELP, _times_options),
    ("leaderboard", _LEADERBOARD_HELP, _leaderboard_options),
    ("report", _REPORT_HELP, _report_options),
    ("import", _IMPORT_HELP, _import_options),
    ("head", _HEAD_HELP, _head_options),
    ("schema", _SCHEMA_HELP, _schema_options),
)
