"""One field at several values, or two fields against each other: overlaid curves, several seeds, a table.

    python -m lab.vary --model=batchnorm --data=names --field=init --values=normal,uniform,kaiming --seeds=0-2
    python -m lab.vary --model=mlp --field=initial --values=uniform:0:1,uniform:-2:2,constant:0.1 --steps=300
    python -m lab.vary --model=gpt --data=stories --tokens=word --field=num_layers,model_dim --values=1,2,4/64,128

Every field of lab.train may stand beside them, and be the one that varies. Values of two fields are divided by `/`.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lab import LabError, cli, plots
from lab.analyses.finding import Finding, write_finding
from lab.cli import setting
from lab.comparable import NOT_COMPARABLE, validated_on
from lab.datasets import Corpus
from lab.models.initial import different_units
from lab.train import Run, Where, corpus_of, parse, parse_seeds, read, use_threads


@dataclass(frozen=True)
class Varying:
    """What varies."""

    field: str = setting("learning_rate", "name", "of lab.train, or two of them with a comma")
    values: str = setting("0.001,0.003,0.01", "values", "with commas; of two fields with / between")


@dataclass(frozen=True)
class Varied:
    """One choice of values: its label, its runs' JSON, and how many hidden units differ at start and end."""

    values: tuple[str, ...]
    runs: list[dict[str, Any]]
    units_before: dict[str, tuple[int, int]]
    units_after: dict[str, tuple[int, int]]

    @property
    def losses(self) -> list[float]:
        """Validation loss of the kept checkpoint on the whole split, one a seed."""
        return [r["best"]["loss"] for r in self.runs]


def choices(varying: Varying) -> tuple[list[str], list[tuple[str, ...]]]:
    """(fields, every combination of their values); LabError if they do not match."""
    fields = [name.strip().replace("-", "_") for name in varying.field.split(",")]
    lists = [[v.strip() for v in part.split(",") if v.strip()] for part in varying.values.split("/")]
    if not 1 <= len(fields) <= 2 or len(lists) != len(fields) or not all(lists):
        raise LabError(f"--field={varying.field} --values={varying.values}: a field, or two, and values for each")
    if places := [name for name in fields if name in Where.__dataclass_fields__]:
        raise LabError(f"--field={places[0]}: says where and how runs go, and changes nothing that they learn")
    return fields, list(itertools.product(*lists))


def vary(words: Sequence[str], folder: Path, say: Callable[[str], None] = print) -> list[Varied]:
    """Train every combination with every seed, each series into its own folder below `folder`."""
    *_, where, varying = parse(words, None, Varying)
    fields, combinations = choices(varying)
    others = cli.flags({name: text for name, text in read(words, Varying)[1].items() if name not in fields})
    # All are read before the first is trained: a wrong value in the last place costs no training.
    settings = [parse([*others, *cli.flags(dict(zip(fields, values)))], None, Varying)[:2] for values in combinations]
    found, corpora = [], {}
    for values, (config, model) in zip(combinations, settings):
        key = (config.data, config.path, config.tokens, config.split, config.split_seed, config.limit_chars)
        corpus: Corpus = corpora.setdefault(key, None) or corpus_of(config)
        corpora[key] = corpus
        name = "-".join(f"{f}={v}" for f, v in zip(fields, values)).replace("/", "_")
        runs = []
        for seed in parse_seeds(where.seeds) if where.seeds else [config.seed]:
            run = Run(dataclasses.replace(config, seed=seed), model, corpus, folder / name, echo=False)
            before = different_units(run.model)
            runs.append(run.train(where.resume, where.overwrite).summary)
        found.append(Varied(values, runs, before, different_units(run.model)))
        say(f"{name}: " + ", ".join("infinite" if x is None else f"{x:.4f}" for x in found[-1].losses))
    return found


def tell(fields: Sequence[str], found: Sequence[Varied], out: Path) -> Finding:
    """One picture of all validation curves, one a value (all seeds), and the table; two fields make a map as well."""
    two = len(fields) == 2
    fig, axes = plots.figure(1, 2, size=(13, 4.4)) if two else plots.figure(size=(9, 4.4))
    ax = axes[0] if two else axes
    for i, one in enumerate(found):
        for k, run in enumerate(one.runs):
            points = [(v["step"], v["loss"]) for v in run["validation"] if v["loss"] is not None]
            label = None if k else ", ".join(one.values)
            ax.plot([s for s, _ in points], [loss for _, loss in points], **plots.line(i), label=label)
    late = [v["loss"] for one in found for r in one.runs for v in r["validation"][1:] if v["loss"] is not None]
    if late:
        low, high = min(late), sorted(late)[int(0.95 * (len(late) - 1))]
        ax.set_ylim(low - 0.05 * (high - low + 0.01), high + 0.1 * (high - low + 0.01))
    ax.set_xlabel("step")
    ax.set_ylabel("validation loss, nats a token")
    ax.set_title(f"by {' and '.join(fields)}")
    ax.legend(title=", ".join(fields))
    table = [_row(fields, one) for one in found]
    if two:
        _map(axes[1], fields, table)
    scored = [row for row in table if row["mean"] is not None]
    if not scored:
        raise LabError("no value led to a finite validation loss; see the runs' logs")
    best = min(scored, key=lambda row: row["mean"])
    if len({validated_on(run) for one in found for run in one.runs}) > 1:
        summary = f"{len(table)} choices, of which none is the best: {NOT_COMPARABLE}."
        return write_finding(out, "vary", summary, {"fields": list(fields), "table": table}, fig)
    seeds = len(found[0].runs)
    summary = f"Best of {len(table)}: {', '.join(f'{f}={best[f]}' for f in fields)} at {best['mean']:.4f} "
    spread = f"± {best['std']:.4f} over {seeds} seeds" if best["std"] is not None else "(one seed: no spread)"
    return write_finding(out, "vary", f"{summary}{spread}.", {"fields": list(fields), "table": table}, fig)


def _row(fields: Sequence[str], one: Varied) -> dict[str, Any]:
    losses = [loss for loss in one.losses if loss is not None]
    units = {name: f"{a} of {b}" for name, (a, b) in one.units_after.items()}
    return {
        **dict(zip(fields, one.values)),
        "losses": one.losses,
        "mean": mean(losses) if losses else None,
        "std": stdev(losses) if len(losses) > 1 else None,
        "first_loss": one.runs[0]["validation"][0]["loss"],
        "parameters": one.runs[0]["num_parameters"],
        "different_units": units,
    }


def _map(ax: Any, fields: Sequence[str], table: Sequence[dict[str, Any]]) -> None:
    """Mean loss over two fields."""
    ups, alongs = (list(dict.fromkeys(row[f] for row in table)) for f in fields)
    value = {(row[fields[0]], row[fields[1]]): row for row in table}
    grid = [[value[u, a]["mean"] or float("nan") for a in alongs] for u in ups]
    ax.imshow(grid, cmap=plots.masked_blues(), aspect="auto")
    for i, u in enumerate(ups):
        for j, a in enumerate(alongs):
            text = f"{grid[i][j]:.3f}\n{value[u, a]['parameters']:,}"
            ax.text(j, i, text, ha="center", va="center", fontsize=8, bbox={"facecolor": "white", "alpha": 0.7})
    ax.set_xticks(range(len(alongs)), alongs)
    ax.set_yticks(range(len(ups)), ups)
    ax.set_ylabel(fields[0])
    ax.set_xlabel(fields[1])
    ax.set_title("mean validation loss, and parameters")
    ax.grid(False)


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    if cli.wants_help(words):
        print(__doc__, cli.describe(Varying))
        return 0
    config, _, where, varying = parse(words, None, Varying)
    fields, _ = choices(varying)
    use_threads(where)
    folder = Path(where.output_dir or f"lab/out/vary-{config.data}-{config.model}-{'-'.join(fields)}")
    finding = tell(fields, vary(words, folder), folder)
    for row in finding.data["table"]:
        spread = "" if row["std"] is None else f" ± {row['std']:.4f}"
        loss = "infinite" if row["mean"] is None else f"{row['mean']:.4f}{spread}"
        units = "".join(f", {told} units of {name} differ" for name, told in row["different_units"].items())
        told = ", ".join(f"{f}={row[f]}" for f in fields)
        first = "infinite" if row["first_loss"] is None else f"{row['first_loss']:.3f}"
        print(f"{told}: {loss} (first loss {first}, {row['parameters']:,} parameters{units})")
    print(f"{finding.summary} Curves in {finding.png_path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
