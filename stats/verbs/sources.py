"""Verbs about what lies there: import, head, schema."""

from __future__ import annotations

import argparse

from stats.errors import Exit, UsageError
from stats.verbs.options import Verb, common, show

_IMPORT_HELP = """What is understood of a source: reader, columns, runs, states, and what was passed over.

SOURCE is a folder or a file: logs of the track, of llm.c, nanoGPT or nanochat; offline files of Weights & Biases, or a
table that it exports (of runs, a chart, or one run's history); TensorBoard event files; Hugging Face's
trainer_state.json; CSV, TSV, JSON, JSONL.
Every verb takes these sources directly."""


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="SOURCE", help="folders or files")
    parser.add_argument("--stop-step", type=int, metavar="N", help="judge every run at its validation at step N")
    common(parser, _run_import)


def _run_import(options: argparse.Namespace) -> int:
    from stats.importing import look, render
    from stats.series import find_series

    result = look(find_series(options.paths), options.stop_step)
    show(options, result, render)
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


VERBS = (
    Verb("import", _IMPORT_HELP, _import_options),
    Verb("head", _HEAD_HELP, _head_options),
    Verb("schema", _SCHEMA_HELP, _schema_options),
)
