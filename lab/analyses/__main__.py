"""Look into checkpoints.

    python -m lab.analyses CHECKPOINT_OR_RUN --data=names --out=lab/out/look         # everything that fits, one page
    python -m lab.analyses RUN --only=next_token,attribution --prompt="Once upon"
    python -m lab.analyses domains math=RUN1 wikipedia=RUN2 --path.math=math.txt --path.wikipedia=wiki.txt

--data and --path name the corpus as in lab.train. Also: --prompt, --target, --limit (characters scored),
--vocab=FOLDER (GPT-2's vocabulary without network), --hellaswag=FILE, --lambada=FILE, --fewshot_path=FILE.
"""

from collections.abc import Callable
from pathlib import Path

from lab import LabError, analyses, cli
from lab.checkpoints import best_checkpoint, find_checkpoints, load_checkpoint
from lab.datasets import load_documents, split_documents


def _domains(words: list[str], given: dict[str, str], out: Path) -> analyses.Finding:
    models, corpora = {}, {}
    for word in words:
        name, equals, place = word.partition("=")
        if not equals:
            raise LabError(f"write domains as name=RUN, not {word!r}")
        models[name] = load_checkpoint(best_checkpoint(place), given.get("vocab"))
        told = models[name].told
        path = given.get(f"path.{name}", "")
        limit = cli.typed("limit_chars", int, given.get(f"limit_chars.{name}", str(told.get("limit_chars", 0))))
        documents = load_documents(given.get(f"data.{name}", told.get("data", "text")), path or None, limit)
        corpora[name] = split_documents(documents, int(told.get("split_seed", 0)))["val"]
    return analyses.domains(models, corpora, out, chars=int(given.get("limit", 100_000)))


def _steps(words: list[str], given: dict[str, str], out: Path) -> list[tuple[str, Callable[[], analyses.Finding]]]:
    """Every analysis of a run as (name, call)."""
    along = [load_checkpoint(p, given.get("vocab")) for p in find_checkpoints(words[0])]
    final = load_checkpoint(best_checkpoint(words[0]), given.get("vocab"))
    told = final.told
    limit = int(told.get("limit_chars", 0))  # the same documents, or the split would mix train and validation
    documents = load_documents(given.get("data", told.get("data", "text")), given.get("path") or None, limit)
    split = split_documents(documents, int(told.get("split_seed", 0)))
    prompt = given.get("prompt", split["val"][0][: 2 if told.get("data") == "names" else 20])
    chars = cli.typed("limit", int, given.get("limit", "50000"))
    steps: list[tuple[str, Callable[[], analyses.Finding]]] = [
        ("frequency", lambda: analyses.frequency(documents, final.tokenizer, out)),
        ("architecture", lambda: analyses.architecture(final, out)),
        ("samples", lambda: analyses.samples_along(along, prompt, out)),
        ("variability", lambda: analyses.variability(final, prompt, out)),
        ("losses", lambda: analyses.losses(along, split, out, chars=chars)),
        ("next_token", lambda: analyses.next_token(along, prompt, out)),
        ("quality", lambda: analyses.quality(final, split["train"], split["val"], out, prompt=prompt)),
    ]
    if final.model.token_embeddings():
        steps.append(("attribution", lambda: analyses.attribution(final, prompt, out, target=given.get("target"))))
    if "fewshot_path" in given:
        other = split_documents(load_documents("text", given["fewshot_path"]))
        name = Path(given["fewshot_path"]).stem

        def few(which):
            return analyses.fewshot(which, other["train"], other["val"], out, corpus=name, prompt=prompt)

        steps += [("fewshot", lambda: few([final])), ("fewshot_early", lambda: few(along[:: max(1, len(along) // 4)]))]
    if "hellaswag" in given or "lambada" in given:
        paths = {f"{n}_path": given.get(n, "") for n in ("hellaswag", "lambada")}
        steps.append(("benchmarks", lambda: analyses.benchmarks(final, out, **paths)))
    return steps


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    positional, given = cli.split_arguments(words)
    if not positional or "help" in given:
        print(__doc__)
        return 0 if "help" in given else 2
    out = Path(given.get("out", "lab/out/analyses"))
    if positional[0] == "domains":
        findings = [_domains(positional[1:], given, out)]
    else:
        steps = _steps(positional, given, out)
        wanted = given["only"].split(",") if "only" in given else [name for name, _ in steps]
        if missing := sorted(set(wanted) - {name for name, _ in steps}):
            raise LabError(f"no analysis {missing[0]!r} for this model; there are {', '.join(n for n, _ in steps)}")
        findings = [call() for name, call in steps if name in wanted]
    for finding in findings:
        print(f"{finding.name}: {finding.summary}")
    print(f"page: {analyses.write_summary(out, findings)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
