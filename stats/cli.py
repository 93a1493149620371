"""The command line: `python -m stats VERB`. Only argparse is imported here; a verb loads what it needs when it runs.

Exit codes: 0 pass, 1 not significant, 2 usage, 3 invalid data, 4 continue (of a sequential test).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from stats.errors import Exit, StatsError
from stats.verbs import judging, planning, showing, sources
from stats.verbs.options import Verb

_EPILOG = "exit codes: 0 pass, 1 not significant, 2 usage, 3 invalid data, 4 continue"
# In the order in which somebody meets them.
_ORDER = "ttest compare plan monitor validate curve times leaderboard report import head schema".split()
_NAMED = {verb.name: verb for verb in (*judging.VERBS, *planning.VERBS, *showing.VERBS, *sources.VERBS)}
VERBS: tuple[Verb, ...] = tuple(_NAMED[name] for name in _ORDER)


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
    except OSError as error:  # a name that is too long, a folder that may not be read, a full disk behind the output
        place = "standard output" if error.filename is None else ascii(error.filename)
        print(f"error: {place}: {error.strerror or error}", file=sys.stderr)
        return int(Exit.INVALID_DATA)


def build_parser(program: str = "python -m stats") -> argparse.ArgumentParser:
    """All verbs and their options; of `python -m stats.ttest`, that verb by itself."""
    if program.endswith("stats.ttest"):
        parser = argparse.ArgumentParser(prog=program, **_told(judging.TTEST_HELP))
        # main() passes the verb's name first, for one way through the code.
        parser.add_argument("verb", choices=["ttest"], help=argparse.SUPPRESS)
        judging.ttest_options(parser)
        return parser
    parser = argparse.ArgumentParser(prog=program, description="From training logs to verdicts.", epilog=_EPILOG)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb in VERBS:
        verb.add_options(verbs.add_parser(verb.name, help=verb.help.split("\n")[0], **_told(verb.help)))
    return parser


def _told(text: str) -> dict:
    """Description and epilogue of a parser."""
    return {"description": text, "epilog": _EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
