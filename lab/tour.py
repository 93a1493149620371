"""The whole journey on the embedded corpus: train every rung, look inside, write one page.

    python -m lab.tour                      # some minutes on two cores; page in lab/out/tour/index.html
    python -m lab.tour --scale=0.2 --seeds=0-1 --out=DIR

The ladder is trained on the corpus's names, over several seeds; a small GPT also on its stories and sums, for the
analyses. The corpus comes from a grammar, so the entropy floor is known: the loss of the grammar itself on the very
text that the models are validated on, which a model can only beat by luck.

Trainings and analyses run side by side, a process a core and a thread a process; how many there are changes no number.
tour.json and the page tell the seconds of every part.
"""

import functools
import html
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from urllib.parse import quote

from data.paths import write_text
from lab import analyses, cli, models, plots
from lab.analyses.finding import drawn, page, section
from lab.checkpoints import Checkpoint, load_checkpoint
from lab.cli import setting
from lab.datasets import load_corpus
from lab.models import fields_class
from lab.page import Keeping
from lab.page import write_page as run_page
from lab.parts import Parts, Spent
from lab.runlog import write_json
from lab.sample import generate
from lab.sweep import draw as draw_sweep
from lab.sweep import sweep
from lab.train import TrainConfig, complete, parse_seeds, train_model
from trainer.files import checkpoints_of


@dataclass(frozen=True)
class Rung:
    """A rung of the tour: what it is, what to look at, the analyses that show that, and how it is trained (steps are
    for --scale=1)."""

    idea: str
    look: str
    shows: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


LADDER: dict[str, Rung] = {
    "counts": Rung(
        "Counts which letter follows which (Shannon 1948). Nothing is learned: one pass over the names.",
        "the map of pairs. It is all that the model knows: it has forgotten every letter but the last.",
        ("pairs",),
    ),
    "bigram": Rung(
        "The same table as weights, trained by gradient descent.",
        "how near its loss comes to that of the counts: there is no better table than they are.",
        settings={"steps": 300},
    ),
    "mlp": Rung(
        "Three letters instead of one, each as a vector, through one hidden layer (Bengio et al. 2003).",
        "the letters in the plane: before training they lie anywhere, do vowels lie together after it?",
        ("embeddings",),
        {"steps": 900},
    ),
    "batchnorm": Rung(
        "The MLP with normalised hidden units (Ioffe and Szegedy 2015).",
        "its activations along training: are they squashed flat, at the start or at the end?",
        ("inside",),
        {"steps": 900},
    ),
    "wavenet": Rung(
        "Neighbours fused two by two, so that eight letters are read (van den Oord et al. 2016).",
        "the step in loss from three letters to eight.",
        settings={"steps": 500},
        fields={"hidden_dim": 96},
    ),
    "recurrent": Rung(
        "A state carried from letter to letter, with no end to how far it looks back (Cho et al. 2014).",
        "the coloured names: what is still a surprise after the first letters?",
        settings={"steps": 300, "batch_tokens": 2048},
        fields={"hidden_dim": 96},
    ),
    "gpt": Rung(
        "Attention: every letter chooses which earlier ones it reads (Vaswani et al. 2017), as in train_gpt.py.",
        "the attention maps: which head reads the letter just before, which one the beginning?",
        ("attention", "logit_lens"),
        {"steps": 200, "batch_tokens": 2048, "row_tokens": 512},
        {"second_input_embedding": False, "value_embeddings": 0},
    ),
}
SOURCES = {"counts": "bigram"}  # the file in lab/models, where it has another name than its rung
DOMAIN_GPT = (
    {"model": "gpt", "steps": 250, "batch_tokens": 2048, "row_tokens": 512, "checkpoints": 7},
    {"num_heads": 4, "second_input_embedding": False, "value_embeddings": 0, "window_max_tokens": 512},
)


@dataclass(frozen=True)
class Journey:
    """How far the tour goes."""

    out: str = setting("lab/out/tour", "folder", "for page, pictures and series")
    seeds: str = setting("0-2", "numbers", "0-4 or 0,3,7: a run of every rung each")
    scale: float = setting(1.0, "factor", "on the number of steps of every training", above=0, at_most=100)
    processes: int = setting(0, "processes", "side by side; 0: one a core, at most 8", at_least=0, at_most=1024)


@dataclass(frozen=True)
class Trained:
    """A run of the tour. Losses in nats a character on the whole validation split; `floor`: the grammar's own there."""

    folder: Path
    checkpoints: Path
    best_loss: float
    parameters: int
    floor: float

    def best(self) -> Checkpoint:
        """The checkpoint that validation chose."""
        return load_checkpoint(self.checkpoints / "best.safetensors")

    def along(self) -> list[Checkpoint]:
        """Its checkpoints, earliest first."""
        return [load_checkpoint(path) for path in reversed(checkpoints_of(self.checkpoints))]


def confidence_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """(mean, half width) of Student's t interval; the width of one value is unknown (nan)."""
    from scipy import stats

    if len(values) < 2:
        return mean(values), math.nan
    return mean(values), float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * stdev(values) / len(values) ** 0.5


def scaled(settings: dict[str, Any], scale: float) -> dict[str, Any]:
    """Settings with the number of steps times `scale`."""
    steps = {"steps": max(2, round(settings["steps"] * scale))} if "steps" in settings else {}
    return settings | steps


corpus_of = functools.cache(load_corpus)  # once a process


def train(told: Mapping[str, Any], fields: Mapping[str, Any], scale: float, folder: Path) -> Trained:
    """Train one run into the series `folder`: `told` are settings of lab.train, `fields` the model's own."""
    config = complete(TrainConfig(**scaled(dict(told), scale)))
    corpus, made = corpus_of(config.data), fields_class(config.model)(**fields)
    result = train_model(config, made, folder=folder, corpus=corpus, overwrite=True)
    parameters = result.summary["num_parameters"]
    return Trained(folder, result.checkpoints, result.best_loss, parameters, corpus.floor)


def start_climb(parts: Parts, out: Path, seeds: Sequence[int], scale: float) -> dict[str, list[Future]]:
    """Begin to train every rung with every seed."""
    begun: dict[str, list[Future]] = {}
    for rung, told in LADDER.items():
        # Counting draws nothing at random: one run says it all.
        for seed in seeds[:1] if rung == "counts" else seeds:
            own = {"model": rung, "data": "names", "seed": seed, "checkpoints": 5, "diagnostics": seed == seeds[0]}
            work = (train, own | told.settings, told.fields, scale, out / "series" / f"names-{rung}")
            begun.setdefault(rung, []).append(parts.start(f"train {rung}", *work))
    return begun


def start_domains(parts: Parts, out: Path, scale: float) -> dict[str, Future]:
    """Begin to train a GPT for each domain of the corpus: stories, sums, names."""
    settings, fields = DOMAIN_GPT
    return {
        kind: parts.start(
            f"train GPT on {kind}",
            train,
            settings | {"data": kind},
            fields,
            scale,
            out / "series" / f"{kind}-gpt-domain",
        )
        for kind in ("text", "sums", "names")
    }


def ladder_chart(results: dict[str, list[Trained]], floor: float, out: Path) -> analyses.Finding:
    """Validation losses of the rungs with 95 % intervals over seeds, above the entropy floor."""
    fig, ax = plots.figure(size=(9, 4.5))
    table = []
    for i, (rung, runs) in enumerate(results.items()):
        losses = [r.best_loss for r in runs]
        centre, half = confidence_interval(losses)
        known = math.isfinite(half)
        table.append(
            {
                "rung": rung,
                "parameters": runs[0].parameters,
                "losses": losses,
                "mean": centre,
                "half_width_95": half if known else None,
            }
        )
        ax.errorbar([i], [centre], yerr=[[half], [half]] if known else None, fmt="o", capsize=6, color=plots.color(0))
        ax.plot([i + 0.12] * len(losses), losses, ".", color="0.6")
        ax.annotate(f"{centre:.3f}", (i, centre), (8, 8), textcoords="offset points", fontsize=9)
    ax.axhline(floor, color=plots.color(1), linestyle="--", label=f"the grammar itself, {floor:.3f}")
    names = [f"{r['rung']}\n{r['parameters']:,}" for r in table]
    ax.set_xticks(range(len(table)), names)
    ax.set_xlim(-0.5, len(table) - 0.2)
    ax.set_ylabel("validation loss, nats a character")
    ax.set_title("The ladder: each rung on names, mean and 95 % interval over seeds (below: parameters)")
    ax.legend()  # where no rung lies
    best = min(table, key=lambda r: r["mean"])
    summary = (
        f"Best rung: {best['rung']} at {best['mean']:.4f} nats a character; the floor is {floor:.4f}, the "
        "loss of the grammar that wrote these names. Losses are those of the checkpoint that validation chose."
    )
    return analyses.write_finding(out, "ladder", summary, {"table": table, "entropy_floor": floor}, fig)


@dataclass(frozen=True)
class Inside:
    """The models of the three domains, to be looked into; most analyses look at that of the stories."""

    runs: dict[str, Trained]
    out: Path

    prompt = "Once upon a time"

    def documents(self, kind: str = "text") -> dict[str, list[str]]:
        """The documents of a domain, by split."""
        return corpus_of(kind).documents

    def fewshot(self, models: list[Checkpoint]) -> analyses.Finding:
        """How soon the story models learn sums."""
        sums = self.documents("sums")
        few = {"corpus": "sums", "chars": 10_000, "prompt": "", "steps": 100, "every": 25}
        return analyses.fewshot(models, sums["train"], sums["val"], self.out, **few)

    def quality(self) -> analyses.Finding:
        """The stories that the model writes, against those that it read."""
        final, split, how = self.runs["text"].best(), self.documents(), {"prompt": self.prompt, "max_tokens": 120}
        return analyses.quality(final, split["train"], split["val"], self.out, count=5, **how)

    def domains(self) -> analyses.Finding:
        """Every model on every domain."""
        models = {kind: run.best() for kind, run in self.runs.items()}
        held_out = {kind: self.documents(kind)["val"] for kind in self.runs}
        return analyses.domains(models, held_out, self.out, chars=20_000)


# What is looked at, in the order of the page.
LOOKS: dict[str, Callable[[Inside, Trained], analyses.Finding]] = {
    "frequency": lambda i, run: analyses.frequency(i.documents()["train"], run.best().tokenizer, i.out),
    "architecture": lambda i, run: analyses.architecture(run.best(), i.out),
    "samples along": lambda i, run: analyses.samples_along(run.along(), i.prompt, i.out, max_tokens=100),
    "variability": lambda i, run: analyses.variability(run.best(), i.prompt, i.out, count=6, max_tokens=80),
    "losses": lambda i, run: analyses.losses(run.along(), i.documents(), i.out, chars=20_000),
    "domains": lambda i, run: i.domains(),
    "few-shot": lambda i, run: i.fewshot([run.best()]),
    "few-shot along": lambda i, run: i.fewshot(run.along()[1::3]),
    "next token": lambda i, run: analyses.next_token(run.along(), i.prompt, i.out),
    "attribution": lambda i, run: analyses.attribution(run.best(), f"{i.prompt}, in a land far", i.out),
    "quality": lambda i, run: i.quality(),
}


def look_inside(name: str, inside: Inside) -> analyses.Finding:
    """One of LOOKS, mostly of the story model."""
    return LOOKS[name](inside, inside.runs["text"])


def sweep_rates(scale: float, path: Path) -> Path:
    """The picture of a learning-rate sweep of the MLP."""
    config = complete(TrainConfig(model="mlp", steps=max(5, round(60 * scale))))
    found = sweep(config, fields_class("mlp")(), corpus_of("names"), -4.0, 0.0, 7)
    return draw_sweep(found, path, "MLP, a short run at each rate")


def invented(run: Trained) -> list[str]:
    """A dozen names of the model's own."""
    return [sample.text for sample in generate(run.best(), count=12, max_tokens=15)]


def keep_page(name: str, run: Path, path: Path) -> Path:
    """The page of `lab.page` of one run: its curve, what it wrote, what it found hard, and what its rung shows."""
    shows = LADDER[name].shows if name in LADDER else ()
    return run_page([str(run)], Keeping(str(path), ",".join(("samples", "coloured", *shows)), limit=5000))


def _link(words: str, path: Path, page: Path) -> str:
    """A link from `page` to a file, relative, so that the folder can be moved with what it links to."""
    target = os.path.relpath(path.resolve(), page.parent.resolve())
    return f'<a href="{html.escape(quote(Path(target).as_posix()))}">{html.escape(words)}</a>'


def rungs_html(chart: analyses.Finding, pages: Mapping[str, Path], page: Path) -> str:
    """Every rung in a few words: what it is, its loss, what to look at; its source and the page of its run."""
    parts = []
    for row in chart.data["table"]:
        rung, told = row["rung"], LADDER[row["rung"]]
        half = "" if row["half_width_95"] is None else f" ± {row['half_width_95']:.4f}"
        source = Path(models.__file__).with_name(f"{SOURCES.get(rung, rung)}.py")
        links = " · ".join((_link("source", source, page), _link("the run, looked into", pages[rung], page)))
        runs = f"{len(row['losses'])} run{'' if len(row['losses']) == 1 else 's'}"
        loss = f"{row['mean']:.4f}{half} nats a character, {row['parameters']:,} parameters, {runs}"
        parts.append(
            f'<div class=rung id="rung-{rung}"><h3>{rung}</h3><p>{html.escape(told.idea)}</p><p>{loss}</p>'
            f"<p><b>Look at</b> {html.escape(told.look)}</p><p>{links}</p></div>"
        )
    return f"<h2 id=rungs>The rungs</h2>{''.join(parts)}"


def write_page(
    out: Path,
    chart: analyses.Finding,
    findings: list[analyses.Finding],
    pictures: list[tuple[str, Path]],
    pages: Mapping[str, Path],
    words: Sequence[str],
    facts: str,
    spent: str = "",
) -> Path:
    """<out>/index.html from everything that was found. `pages`: those of the runs, by rung and then by domain; `spent`:
    of `spent_html`."""
    path = out / "index.html"
    samples = html.escape(", ".join(w for w in words if w))
    domains = ", ".join(_link(name, page, path) for name, page in pages.items() if name not in LADDER)
    parts = [
        f"<p>{html.escape(facts)}</p>",
        "<nav><a href=#rungs>the rungs</a> "
        + " ".join(f'<a href="#{f.name}">{f.name.replace("_", " ")}</a>' for f in [chart, *findings])
        + "</nav>",
        section(chart, out),
        rungs_html(chart, pages, path),
        f"<p>Names that the GPT invents: {samples}.</p>",
    ]
    for title, picture in pictures:
        link = picture.relative_to(out).as_posix()
        parts.append(f"<h2>{html.escape(title)}</h2>{drawn(link, title)}")
    parts.append(f"<h2>Models of three domains</h2><p>Each run on a page of its own: {domains}.</p>")
    parts += [*(section(f, out) for f in findings), spent]
    write_text(path, page("From counting letters to a GPT", parts))
    return path


def spent_html(spent: Iterable[Spent], processes: int) -> str:
    """Where the seconds went, parts of one name together."""
    rows = "".join(
        f"<tr><th scope=row>{html.escape(part)}<td>{runs}<td>{wall:.1f}<td>{cpu:.1f}</tr>"
        for part, runs, wall, cpu in by_name(spent)
    )
    told = f"Parts run side by side in {processes} process{'' if processes == 1 else 'es'}, one thread each."
    head = "<tr><th>part<th>runs<th>seconds<th>of the CPU</tr>"
    return f"<h2 id=seconds>Seconds</h2><p>{told}</p><table>{head}{rows}</table>"


def by_name(spent: Iterable[Spent]) -> list[tuple[str, int, float, float]]:
    """(part, how often, seconds, seconds of the CPU), parts of one name together, the longest first."""
    kinds: dict[str, list[Spent]] = {}
    for one in spent:
        kinds.setdefault(one.part, []).append(one)
    rows = [(k, len(v), sum(p.wall_s for p in v), sum(p.cpu_s for p in v)) for k, v in kinds.items()]
    return sorted(rows, key=lambda row: -row[2])


def journey(parts: Parts, out: Path, seeds: Sequence[int], scale: float) -> Callable[[str], Path]:
    """Everything that the page shows; returns what writes it, given a sentence on the whole."""
    domains = start_domains(parts, out, scale)  # what most others wait for begins first
    rungs = start_climb(parts, out, seeds, scale)
    rates = parts.start("learning-rate sweep", sweep_rates, scale, out / "sweep.png")
    by_domain = {kind: parts.wait(run) for kind, run in domains.items()}
    for kind, run in by_domain.items():
        print(f"GPT on {kind}: {run.best_loss:.4f} nats a character (floor {run.floor:.4f})", flush=True)
    looks = [parts.start(f"look: {name}", look_inside, name, Inside(by_domain, out)) for name in LOOKS]
    print("the ladder, on names:", flush=True)
    results: dict[str, list[Trained]] = {}
    for rung, begun in rungs.items():
        results[rung] = [parts.wait(run) for run in begun]
        print(f"  {rung}: {', '.join(f'{run.best_loss:.4f}' for run in results[rung])} nats a character", flush=True)
    runs = {rung: made[0] for rung, made in results.items()} | by_domain
    paths = {name: out / "runs" / f"{name}.html" for name in runs}
    begun_pages = [parts.start("pages of runs", keep_page, name, run.folder, paths[name]) for name, run in runs.items()]
    names = parts.start("invented names", invented, results["gpt"][0])
    chart = ladder_chart(results, by_domain["names"].floor, out)
    pictures = [("Learning-rate sweep of the MLP", parts.wait(rates))]
    for rung in ("mlp", "batchnorm"):
        path = out / "series" / f"names-{rung}" / "diagnostics" / f"seed-{seeds[0]:03d}.png"
        pictures.append((f"Inside the {rung} rung", path))
    findings, words = [parts.wait(look) for look in looks], parts.wait(names)
    pages = dict(zip(runs, [parts.wait(page) for page in begun_pages]))
    for finding in [chart, *findings]:
        print(f"  {finding.name}: {finding.summary}")
    told = {"seeds": list(seeds), "scale": scale, "spent": [vars(part) for part in parts.spent], **chart.data}
    write_json(out / "tour.json", told | {"processes": parts.processes})
    spent = spent_html(parts.spent, parts.processes)
    return lambda facts: write_page(out, chart, findings, pictures, pages, words, facts, spent)


def tour(out: Path, seeds: Sequence[int], scale: float, processes: int = 0) -> Path:
    """The journey; returns the page's path."""
    began = time.monotonic()
    with Parts(processes) as parts:
        write = journey(parts, out, seeds, scale)
    minutes = (time.monotonic() - began) / 60
    return write(
        f"Trained on the embedded corpus with {len(seeds)} seeds a rung in {minutes:.1f} minutes. Each rung is a "
        "series of runs: python -m stats compare series/names-mlp series/names-batchnorm tells whether batch norm "
        "helped."
    )


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    _, asked = cli.command(__doc__, words, Journey, (0, 0))
    print(f"page: {tour(Path(asked.out), parse_seeds(asked.seeds), asked.scale, asked.processes)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
