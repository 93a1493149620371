"""The whole journey on the embedded corpus: train every rung, look inside, write one page.

    python -m lab.tour                      # under 15 minutes on two cores; page in lab/out/tour/index.html
    python -m lab.tour --scale=0.2 --seeds=0-1 --out=DIR

The ladder is trained on the corpus's names, over several seeds; a small GPT also on its stories and sums, for the
analyses. The corpus comes from a grammar, so the entropy floor is known: the loss of the grammar itself on the very
text that the models are validated on, which a model can only beat by luck.
"""

import html
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from urllib.parse import quote

import torch

from lab import analyses, cli, models, plots
from lab.analyses.finding import page, section
from lab.checkpoints import load_checkpoint
from lab.cli import setting
from lab.datasets import Corpus, load_corpus
from lab.models import fields_class
from lab.page import Keeping
from lab.page import write_page as run_page
from lab.runlog import write_json, write_text
from lab.sweep import draw as draw_sweep
from lab.sweep import sweep
from lab.train import Result, TrainConfig, complete, parse_seeds, train_model
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


def climb(out: Path, seeds: Sequence[int], scale: float, corpus: Corpus) -> dict[str, list[Result]]:
    """Train every rung with every seed."""
    results: dict[str, list[Result]] = {}
    for rung, told in LADDER.items():
        # Counting draws nothing at random: one run says it all.
        for seed in seeds[:1] if rung == "counts" else seeds:
            base = TrainConfig(model=rung, data="names", seed=seed, checkpoints=5, diagnostics=seed == seeds[0])
            config = complete(TrainConfig(**{**vars(base), **scaled(told.settings, scale)}))
            folder = out / "series" / f"names-{rung}"
            made = fields_class(rung)(**told.fields)
            results.setdefault(rung, []).append(train_model(config, made, folder=folder, corpus=corpus, overwrite=True))
        losses = ", ".join(f"{r.best_loss:.4f}" for r in results[rung])
        print(f"  {rung}: {losses} nats a character", flush=True)
    return results


def ladder_chart(results: dict[str, list[Result]], floor: float, out: Path) -> analyses.Finding:
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
                "parameters": runs[0].model.num_parameters(),
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
    ax.legend(loc="upper right")
    best = min(table, key=lambda r: r["mean"])
    summary = (
        f"Best rung: {best['rung']} at {best['mean']:.4f} nats a character; the floor is {floor:.4f}, the "
        "loss of the grammar that wrote these names. Losses are those of the checkpoint that validation chose."
    )
    return analyses.write_finding(out, "ladder", summary, {"table": table, "entropy_floor": floor}, fig)


def read_domains(out: Path, scale: float) -> tuple[dict[str, Result], dict[str, Corpus]]:
    """A GPT for each domain of the corpus: stories, sums, names."""
    settings, fields = DOMAIN_GPT
    results, corpora = {}, {}
    for kind in ("text", "sums", "names"):
        corpora[kind] = load_corpus(kind)
        config = complete(TrainConfig(**{"data": kind, **scaled(settings, scale)}))
        folder = out / "series" / f"{kind}-gpt-domain"
        made = fields_class("gpt")(**fields)
        results[kind] = train_model(config, made, folder=folder, corpus=corpora[kind], overwrite=True)
        floor = corpora[kind].floor
        print(f"  GPT on {kind}: {results[kind].best_loss:.4f} nats a character (floor {floor:.4f})", flush=True)
    return results, corpora


def look_inside(out: Path, results: dict[str, Result], corpora: dict[str, Corpus]) -> list[analyses.Finding]:
    """Every analysis, mostly of the story model."""
    folder = results["text"].checkpoints
    along = [load_checkpoint(p) for p in reversed(checkpoints_of(folder))]
    final = load_checkpoint(folder / "best.safetensors")
    split = corpora["text"].documents
    prompt = "Once upon a time"
    models = {k: load_checkpoint(r.checkpoints / "best.safetensors") for k, r in results.items()}
    held_out = {k: c.documents["val"] for k, c in corpora.items()}
    sums = corpora["sums"].documents
    few = {"corpus": "sums", "chars": 10_000, "prompt": "", "steps": 100, "every": 25}
    return [
        analyses.frequency(split["train"], final.tokenizer, out),
        analyses.architecture(final, out),
        analyses.samples_along(along, prompt, out, max_tokens=100),
        analyses.variability(final, prompt, out, count=6, max_tokens=80),
        analyses.losses(along, split, out, chars=20_000),
        analyses.domains(models, held_out, out, chars=20_000),
        analyses.fewshot([final], sums["train"], sums["val"], out, **few),
        analyses.fewshot(along[1::3], sums["train"], sums["val"], out, **few),
        analyses.next_token(along, prompt, out),
        analyses.attribution(final, prompt + ", in a land far", out),
        analyses.quality(final, split["train"], split["val"], out, count=5, prompt=prompt, max_tokens=120),
    ]


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
) -> Path:
    """<out>/index.html from everything that was found. `pages`: those of the runs, by rung and then by domain."""
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
        parts.append(f'<h2>{html.escape(title)}</h2><img src="{link}" alt="{html.escape(title)}" loading=lazy>')
    parts.append(f"<h2>Models of three domains</h2><p>Each run on a page of its own: {domains}.</p>")
    parts += [section(f, out) for f in findings]
    write_text(path, page("From counting letters to a GPT", parts))
    return path


def tour(out: Path, seeds: Sequence[int], scale: float) -> Path:
    """The journey; returns the page's path."""
    began = time.monotonic()
    torch.set_num_threads(min(2, torch.get_num_threads()))
    names = load_corpus("names")
    print("the ladder, on names:", flush=True)
    results = climb(out, seeds, scale, names)
    chart = ladder_chart(results, names.floor, out)
    print("learning-rate sweep:", flush=True)
    config = complete(TrainConfig(model="mlp", steps=max(5, round(60 * scale))))
    found = sweep(config, fields_class("mlp")(), names, -4.0, 0.0, 7)
    pictures = [
        ("Learning-rate sweep of the MLP", draw_sweep(found, out / "sweep.png", "MLP, a short run at each rate"))
    ]
    for rung in ("mlp", "batchnorm"):
        path = out / "series" / f"names-{rung}" / "diagnostics" / f"seed-{seeds[0]:03d}.png"
        pictures.append((f"Inside the {rung} rung", path))
    print("three domains:", flush=True)
    by_domain, corpora = read_domains(out, scale)
    print("looking inside:", flush=True)
    findings = look_inside(out, by_domain, corpora)
    from lab.sample import generate

    gpt = load_checkpoint(results["gpt"][0].checkpoints / "best.safetensors")
    words = [s.text for s in generate(gpt, count=12, max_tokens=15)]
    print("a page of each run:", flush=True)
    runs = {rung: made[0].folder for rung, made in results.items()} | {k: r.folder for k, r in by_domain.items()}
    pages = {name: keep_page(name, run, out / "runs" / f"{name}.html") for name, run in runs.items()}
    minutes = (time.monotonic() - began) / 60
    facts = (
        f"Trained on the embedded corpus with {len(seeds)} seeds a rung in {minutes:.1f} minutes. Each rung is a "
        "series of runs: python -m stats compare series/names-mlp series/names-batchnorm tells whether batch norm "
        "helped."
    )
    write_json(out / "tour.json", {"minutes": minutes, "seeds": list(seeds), "scale": scale, **chart.data})
    for finding in [chart, *findings]:
        print(f"  {finding.name}: {finding.summary}")
    return write_page(out, chart, findings, pictures, pages, words, facts)


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    _, asked = cli.command(__doc__, words, Journey, (0, 0))
    print(f"page: {tour(Path(asked.out), parse_seeds(asked.seeds), asked.scale)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
