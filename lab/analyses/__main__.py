"""Look into checkpoints.

    python -m lab.analyses CHECKPOINT_OR_RUN --out=lab/out/look                # everything that fits, one page
    python -m lab.analyses RUN --only=coloured,attention --prompt="Once upon a time"
    python -m lab.analyses RUN OTHER_RUN --only=coloured                       # coloured by where RUN is better
    python -m lab.analyses domains math=RUN1 wikipedia=RUN2:wiki.txt           # every model on every corpus
    python -m lab.analyses forgetting names=RUN1 sums=RUN2 text=RUN3           # what the second corpus costs the first

A run's own text is found where it lay when it was trained (or give --path, or name=RUN:FILE); another text is
refused, unless it is asked for with --other. `python -m lab.analyses list` tells what there is.
"""

import difflib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lab import LabError, analyses, cli
from lab.analyses.menu import MENU, Look, fitting, look_at
from lab.checkpoints import Checkpoint, best_checkpoint, find_checkpoints, load_checkpoint
from lab.cli import setting
from lab.datasets import KINDS, load_documents, split_documents
from lab.texts import texts_of


@dataclass(frozen=True)
class Looking:
    """Where and how to look."""

    out: str = setting("lab/out/analyses", "folder", "for pictures, numbers and page")
    only: str = setting("", "names", "of analyses, with commas; '': all that fit")
    path: str = setting("", "file", "where the run's own text lies now")
    other: str = setting("", "file", "another text to look at, on purpose; findings say so")
    data: str = setting("", "name", "how --other is read; '': like the run's own", choices=("", *KINDS))
    prompt: str = setting("", "text", "to continue, to colour, to map; '': from the run's validation text")
    text: str = setting("", "text", "to colour; '': the prompt")
    target: str = setting("", "token", "to attribute; '': the likeliest")
    limit: int = setting(50_000, "characters", "scored of each split; 0: all", at_least=0)
    steps: int = setting(200, "steps", "of fine-tuning, for fewshot and forgetting", at_least=1)
    vocab: str = setting("", "folder", "GPT-2's encoder.json and vocab.bpe, where there is no network")
    fewshot_path: str = setting("", "file", "a text that the model is fine-tuned on")
    hellaswag: str = setting("", "file", "JSON lines with ctx, endings and label")
    lambada: str = setting("", "file", "JSON lines with text")
    grammar: str = setting("", "file", "pairs: BLiMP's JSON lines, or CoLA's .tsv")
    tasks: int = setting(200, "tasks", "of HellaSwag and LAMBADA; 0: all", at_least=0)


def _named(words: list[str], asked: Looking) -> tuple[dict[str, Checkpoint], dict[str, dict[str, list[str]]]]:
    """Models and the documents of each, of words name=RUN or name=RUN:FILE."""
    models, corpora = {}, {}
    for word in words:
        name, equals, place = word.partition("=")
        run, _, path = place.rpartition(":") if not Path(place).exists() else (place, "", "")
        if not equals or not name:
            raise LabError(f"write name=RUN or name=RUN:FILE, not {word!r}")
        models[name] = load_checkpoint(best_checkpoint(run or place), asked.vocab or None)
        print(f"{name}: reading {models[name].reading()}")
        corpora[name] = texts_of(models[name], path if run else "").documents
    return models, corpora


def _domains(words: list[str], asked: Looking) -> analyses.Finding:
    models, corpora = _named(words, asked)
    return analyses.domains(models, {n: c["val"] for n, c in corpora.items()}, Path(asked.out), chars=asked.limit)


def _forgetting(words: list[str], asked: Looking) -> analyses.Finding:
    models, corpora = _named(words, asked)
    how = {"steps": asked.steps, "every": max(1, asked.steps // 4), "progress": lambda line: print(line, flush=True)}
    return analyses.forgetting(models, corpora, Path(asked.out), chars=asked.limit, **how)


_VERBS = {  # verb: what it does, and the options that it reads
    "domains": (_domains, ("out", "limit", "vocab")),
    "forgetting": (_forgetting, ("out", "limit", "vocab", "steps")),
}


def _refuse_unread(places: list[str], asked: Looking) -> None:
    """LabError for the first option that was given, but that nothing here would read: it would change nothing."""
    given = {field.name for field in fields(asked) if getattr(asked, field.name) != field.default}
    if places[0] in _VERBS:
        read = _VERBS[places[0]][1]
        if unread := sorted(given.difference(read)):
            raise LabError(f"--{unread[0]} has no part in {places[0]}, which reads --{', --'.join(read)}")
        return
    if asked.path and asked.other:
        raise LabError("--path says where the run's own text lies, --other names another text: give one of them")
    if asked.data and not (asked.other or asked.fewshot_path):
        raise LabError("--data says how --other or --fewshot_path is read; give one of them, or leave --data out")
    only = {name.strip() for name in asked.only.split(",") if name.strip()}
    readers = {"target": {"attribution"}, "grammar": {"grammar"}, "fewshot_path": {"fewshot", "fewshot_early"}}
    readers |= {"hellaswag": {"benchmarks"}, "lambada": {"benchmarks"}, "text": {"coloured"}}
    for name in sorted(given & set(readers)):
        if only and not only & readers[name]:
            reader = " and ".join(sorted(readers[name]))
            raise LabError(f"--{name} is read by {reader}, which --only={asked.only} leaves out")
    if len(places) == 2 and only and "coloured" not in only:
        raise LabError(f"a second run is read by coloured alone, which --only={asked.only} leaves out")


def _look(words: list[str], asked: Looking) -> Look:
    along = [load_checkpoint(p, asked.vocab or None) for p in find_checkpoints(words[0])]
    final = load_checkpoint(best_checkpoint(words[0]), asked.vocab or None)
    second = load_checkpoint(best_checkpoint(words[1]), asked.vocab or None) if len(words) > 1 else None
    print(f"reading {final.reading()}")
    return Look(
        along,
        final,
        Path(asked.out),
        asked.path,
        asked.other,
        asked.data,
        asked.prompt,
        asked.text,
        asked.target,
        asked.limit,
        second,
    )


def _outside(look: Look, asked: Looking) -> dict[str, Any]:
    """Analyses that read a file of their own, by name: those whose file was given."""
    calls: dict[str, Any] = {}
    out, say = look.out, lambda line: print(line, flush=True)
    if asked.fewshot_path:
        other = split_documents(load_documents(asked.data or "text", asked.fewshot_path))
        how = {"corpus": Path(asked.fewshot_path).stem, "prompt": look.prompt, "steps": asked.steps, "progress": say}
        how |= {"every": max(1, asked.steps // 4), "chars": asked.limit}
        early = look.along[:: max(1, len(look.along) // 4)]
        calls["fewshot"] = lambda: analyses.fewshot([look.final], other["train"], other["val"], out, **how)
        calls["fewshot_early"] = lambda: analyses.fewshot(early, other["train"], other["val"], out, **how)
    if asked.hellaswag or asked.lambada:
        paths = {"hellaswag_path": asked.hellaswag, "lambada_path": asked.lambada}
        calls["benchmarks"] = lambda: analyses.benchmarks(look.final, out, limit=asked.tasks, progress=say, **paths)
    if asked.grammar:
        calls["grammar"] = lambda: analyses.grammar(look.along, asked.grammar, out)
    return calls


#: Analyses of a file from outside, and the flag that names it.
NEEDS = {
    "fewshot": "--fewshot_path",
    "fewshot_early": "--fewshot_path",
    "benchmarks": "--hellaswag or --lambada",
    "grammar": "--grammar",
}


def _chosen(look: Look, asked: Looking) -> list[analyses.Finding]:
    outside = _outside(look, asked)
    there = {name: (lambda n=name: look_at(look, n)) for name in fitting(look)} | outside
    wanted = [name.strip() for name in asked.only.split(",") if name.strip()] or list(there)
    for name in wanted:
        if name not in there:
            why = "does not fit this model" if name in MENU else "is not one of the analyses"
            why = f"needs {NEEDS[name]}" if name in NEEDS else why
            raise LabError(f"--only={name}: {why}; there are {', '.join(there)}")
    findings = []
    for name in there:
        if name not in wanted:
            continue
        try:
            findings.append(there[name]())
            print(f"{findings[-1].name}: {findings[-1].summary}", flush=True)
        except LabError as error:
            if asked.only:
                raise
            print(f"{name}: left out, {error}", flush=True)
    return findings


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    places, asked = cli.command(__doc__, words, Looking, (1, None))
    if places == ["list"]:
        print("\n".join(f"{name:20} {item.shows}" for name, item in MENU.items()))
        return 0
    _refuse_unread(places, asked)
    close = difflib.get_close_matches(places[0], [*_VERBS, "list"], 1)
    if close and places[0] not in _VERBS and not Path(places[0]).exists():
        raise LabError(f"no checkpoint at {places[0]}; did you mean the command {close[0]}?")
    if places[0] in _VERBS:
        findings = [_VERBS[places[0]][0](places[1:], asked)]
        print(f"{findings[0].name}: {findings[0].summary}")
    elif len(places) > 2:
        raise LabError(f"one run is looked at, or two are compared, not {len(places)}")
    else:
        findings = _chosen(_look(places, asked), asked)
    print(f"page: {analyses.write_summary(Path(asked.out), findings)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
