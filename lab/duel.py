"""Two series against each other: their curves, what they write, and the verdict of stats over seeds.

    python -m lab.duel lab/out/names-mlp lab/out/names-batchnorm --out=lab/out/duel

The verdict is that of `python -m stats compare`: Welch's test on the final losses, with its interval. One seed each
gives curves and samples, but no verdict, and says so.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import LabError, cli, plots
from lab.analyses.colours import coloured
from lab.analyses.curves import told_by
from lab.analyses.finding import Finding, write_finding, write_summary
from lab.analyses.menu import COLOURED_CHARS
from lab.analyses.scoring import limit_documents
from lab.checkpoints import Checkpoint, best_checkpoint, load_checkpoint
from lab.cli import setting
from lab.comparable import NOT_COMPARABLE, validated_on
from lab.sample import generate
from lab.texts import starting_prompt, texts_of
from lab.words import unread_words


@dataclass(frozen=True)
class Side:
    """A series in a duel: its runs' JSON, and the checkpoint that its first run kept."""

    name: str
    folder: Path
    runs: list[dict[str, Any]]
    checkpoint: Checkpoint

    @property
    def losses(self) -> list[float]:
        """Final validation losses, one a finished run."""
        return [r["final_loss"] for r in self.runs if r["status"] == "finished" and r["final_loss"] is not None]


def side(folder: str | Path, vocab: str | None = None) -> Side:
    """The series in `folder`; LabError if it has no run."""
    folder = Path(folder)
    runs = [told_by(path) for path in sorted((folder / "runs").glob("*.json"))]
    if not runs:
        raise LabError(f"no run's JSON in {folder / 'runs'}; give the folder of a series")
    return Side(folder.name, folder, runs, load_checkpoint(best_checkpoint(folder), vocab))


def comparable(sides: tuple[Side, Side]) -> bool:
    """Whether all finished runs of both sides were validated on the same tokens of the same text."""
    return len({validated_on(run) for one in sides for run in one.runs if run["status"] == "finished"}) <= 1


def verdict(sides: tuple[Side, Side], alpha: float = 0.05) -> dict[str, Any]:
    """What `stats compare` says of two series' final losses: `text` for people; `estimate` (second minus first),
    `low`, `high` and `p_value`, None where there are too few runs to say, or losses that do not compare."""
    from stats.compare import compare, render
    from stats.errors import StatsError
    from stats.samples import sample_of
    from stats.series import load_series

    none = {"estimate": None, "low": None, "high": None, "p_value": None}
    if not comparable(sides):
        return {"text": f"No verdict: {NOT_COMPARABLE}", **none}
    try:
        baseline, candidate = (sample_of(load_series(one.folder)) for one in sides)
        found = compare(baseline, [candidate], alpha=alpha)
    except StatsError as error:
        return {"text": f"No verdict: {error}", **none}
    losses = found.comparisons[0].loss
    told = {key: getattr(losses, key, None) for key in ("estimate", "low", "high", "p_value")}
    return {"text": render(found), "alpha": alpha, **told}


def curves(sides: tuple[Side, Side], told: dict[str, Any], out: Path) -> Finding:
    """Validation losses of all runs of both sides over their steps, and the verdict."""
    fig, ax = plots.figure(size=(9, 4.4))
    for i, one in enumerate(sides):
        for k, run in enumerate(one.runs):
            points = [(v["step"], v["loss"]) for v in run["validation"] if v["loss"] is not None]
            if points:
                ax.plot(*zip(*points), color=plots.color(i), alpha=0.8, label=None if k else one.name)
    floors = [run["floor"] for one in sides for run in one.runs if run.get("floor") is not None]
    if floors:
        ax.axhline(min(floors), color="0.4", linestyle="--", label=f"the grammar itself, {min(floors):.3f}")
    values = sorted(v["loss"] for one in sides for r in one.runs for v in r["validation"] if v["loss"] is not None)
    if values:
        low, high = values[0], values[int(0.9 * (len(values) - 1))]
        ax.set_ylim(min([low, *floors]) - 0.05 * (high - low + 0.01), high + 0.05 * (high - low + 0.01))
    ax.set_xlabel("step")
    ax.set_ylabel("validation loss, nats a token")
    ax.legend()
    a, b = sides
    if told["estimate"] is None:
        summary = f"{a.name} against {b.name}: {told['text'].splitlines()[0]}"
    else:
        better = b.name if told["estimate"] < 0 else a.name
        sure = "no evidence of a difference" if told["low"] <= 0 <= told["high"] else f"{better} is better"
        summary = (
            f"{b.name} minus {a.name}: {told['estimate']:+.4f} nats ({1 - told['alpha']:.0%} interval "
            f"{told['low']:+.4f} to {told['high']:+.4f}, p {told['p_value']:.2g}; {len(a.losses)} and "
            f"{len(b.losses)} runs): {sure}."
        )
    data = {"sides": [{"name": s.name, "losses": s.losses} for s in sides], "verdict": told}
    return write_finding(out, "duel", summary, data, fig)


def samples(sides: tuple[Side, Side], prompt: str, count: int = 5, max_tokens: int = 120) -> dict[str, list[str]]:
    """What the kept checkpoint of each side writes after the same prompt with the same seed."""
    how = {"count": count, "max_tokens": max_tokens, "temperature": 0.8, "seed": 1}
    return {one.name: [s.text for s in generate(one.checkpoint, prompt, **how)] for one in sides}


@dataclass(frozen=True)
class Duelling:
    """What the duel is fought with."""

    out: str = setting("lab/out/duel", "folder", "for pictures, numbers and page")
    prompt: str = setting("", "text", "that both continue; '': from the text that both read")
    path: str = setting("", "file", "where the first side's text lies now")
    alpha: float = setting(0.05, "probability", "of a false verdict", above=0, below=1)
    vocab: str = setting("", "folder", "GPT-2's encoder.json and vocab.bpe, where there is no network")


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    (first, second), asked = cli.command(__doc__, words, Duelling, (2, 2))
    sides = side(first, asked.vocab or None), side(second, asked.vocab or None)
    for one in sides:
        print(f"reading {one.checkpoint.reading()}")
        if unknown := unread_words(one.checkpoint.tokenizer, asked.prompt):
            print(f"{one.name}: {unknown}")
    told = verdict(sides, asked.alpha)
    findings = [curves(sides, told, Path(asked.out))]
    documents = texts_of(sides[0].checkpoint, asked.path).documents
    # Where the texts differ, one side may not even know the letters of the other's.
    prompt = asked.prompt or (starting_prompt(sides[0].checkpoint, documents) if comparable(sides) else "")
    written = samples(sides, prompt)
    for name, texts in written.items():
        print(f"{name}:", *texts, sep="\n  ")
    if comparable(sides):
        text = limit_documents(documents["val"], COLOURED_CHARS)
        findings.append(coloured([one.checkpoint for one in sides], text, Path(asked.out)))
    print(told["text"])
    print(findings[0].summary)
    print(f"page: {write_summary(Path(asked.out), findings, f'{sides[0].name} against {sides[1].name}')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
