"""Verbs for a series before and while it runs: plan, monitor."""

from __future__ import annotations

import argparse

from stats.errors import Exit, UsageError
from stats.verbs.options import Verb, common, drops, find, find_one, losses_on_command_line, show

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
    common(parser, _run_plan)


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split(","))


def _run_plan(options: argparse.Namespace) -> int:
    from stats.design import design, pilot_facts, render
    from stats.planfile import write_plan
    from stats.plans import POOLED_SIGMA_SOURCE, make_plan
    from stats.samples import sample_of
    from stats.ttest import POOLED_SIGMA

    facts = {}
    if options.sigma_from:
        # A pilot is judged as it lies there: the --stop-step of the plan is not its own.
        facts = pilot_facts(sample_of(find_one(options.sigma_from, options)))
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
    show(options, result, render)
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
    common(parser, _run_monitor)


def _run_monitor(options: argparse.Namespace) -> int:
    from stats.monitor import monitor, monitor_losses, render
    from stats.planfile import read_plan

    plan = read_plan(options.plan) if options.plan else None
    losses, _ = losses_on_command_line(options.paths)
    if losses:
        if plan is None:
            raise UsageError("losses on the command line need a --plan")
        result = monitor_losses(losses, plan)
    else:
        series = find(options, options.paths)
        if len(series) > 1:
            raise UsageError(f"{len(series)} series in {' '.join(options.paths)}: name one")
        result = monitor(series[0], plan, drops(options, series))
    show(options, result, render)
    return {"ACCEPT": Exit.PASS, "FUTILE": Exit.NOT_SIGNIFICANT}.get(result.decision.verdict, Exit.CONTINUE)


VERBS = (Verb("plan", _PLAN_HELP, _plan_options), Verb("monitor", _MONITOR_HELP, _monitor_options))
