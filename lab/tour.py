"""The whole journey on the embedded corpus: train every rung, look inside, write one page.

    python -m lab.tour                      # under 15 minutes on two cores; page in lab/out/tour/index.html
    python -m lab.tour --scale=0.2 --seeds=0-1 --out=DIR

The ladder is trained on the corpus's names, over several seeds; a small GPT also on its stories and sums, for the
analyses. The corpus comes from a grammar, so the entropy floor is known: the loss of the grammar itself on the very
text that the models are validated on, which a model can only beat by luck.
"""

import html
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

from lab import analyses, cli, plots
from lab.analyses.finding import page, section
from lab.checkpoints import load_checkpoint
from lab.cli import setting
from lab.datasets import Corpus, load_corpus
from lab.models import fields_class
from lab.runlog import write_json, write_text
from lab.sweep import draw as draw_sweep
from lab.sweep import sweep
from lab.train import Result, TrainConfig, complete, parse_seeds, train_model
from trainer.files import checkpoints_of

# Rung -> (training settings, model fields). Steps are for --scale=1.
LADDER: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "counts": ({}, {}),
    "bigram": ({"steps": 300}, {}),
    "mlp": ({"steps": 900}, {}),
    "batchnorm": ({"steps": 900}, {}),
    "wavenet": ({"steps": 500}, {"hidden_dim": 96}),
    "recurrent": ({"steps": 300, "batch_tokens": 2048}, {"hidden_dim": 96}),
    "gpt": (
        {"steps": 200, "batch_tokens": 2048, "row_tokens": 512},
        {"second_input_embedding": False, "value_embeddings": 0},
    ),
}
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
    for rung, (settings, fields) in LADDER.items():
        # Counting draws nothing at random: one run says it all.
        for seed in seeds[:1] if rung == "counts" else seeds:
            base = TrainConfig(model=rung, data="names", seed=seed, checkpoints=5, diagnostics=seed == seeds[0])
            config = complete(TrainConfig(**{**vars(base), **scaled(settings, scale)}))
            folder = out / "series" / f"names-{rung}"
            made = fields_class(rung)(**fields)
            results.setdefault(rung, []).append(train_model(config, made, folder=folder, corpus=corpus, overwrite=True))
        told = ", ".join(f"{r.best_loss:.4f}" for r in results[rung])
        print(f"  {rung}: {told} nats a character", flush=True)
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


def write_page(
    out: Path,
    chart: analyses.Finding,
    findings: list[analyses.Finding],
    pictures: list[tuple[str, Path]],
    words: Sequence[str],
    facts: str,
) -> Path:
    """<out>/index.html from everything that was found."""
    rows = "".join(
        f"<tr><td>{html.escape(r['rung'])}<td>{r['parameters']:,}<td>{r['mean']:.4f}"
        f"<td>{'' if r['half_width_95'] is None else format(r['half_width_95'], '.4f')}<td>{len(r['losses'])}</tr>"
        for r in chart.data["table"]
    )
    head = "<tr><th>rung<th>parameters<th>validation loss<th>± (95 %)<th>runs</tr>"
    samples = html.escape(", ".join(w for w in words if w))
    parts = [
        f"<p>{html.escape(facts)}</p>",
        "<nav>" + "".join(f'<a href="#{f.name}">{f.name.replace("_", " ")}</a>' for f in [chart, *findings]) + "</nav>",
        section(chart, out),
        f"<table>{head}{rows}</table>",
        f"<p>Names that the GPT invents: {samples}.</p>",
    ]
    for title, path in pictures:
        link = path.relative_to(out).as_posix()
        parts.append(f'<h2>{html.escape(title)}</h2><img src="{link}" alt="{html.escape(title)}" loading=lazy>')
    parts += [section(f, out) for f in findings]
    path = out / "index.html"
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
    minutes = (time.monotonic() - began) / 60
    facts = (
        f"Trained on the embedded corpus with {len(seeds)} seeds a rung in {minutes:.1f} minutes. Each rung is a "
        "series of runs: python -m stats compare series/names-mlp series/names-batchnorm tells whether batch norm "
        "helped."
    )
    write_json(out / "tour.json", {"minutes": minutes, "seeds": list(seeds), "scale": scale, **chart.data})
    for finding in [chart, *findings]:
        print(f"  {finding.name}: {finding.summary}")
    return write_page(out, chart, findings, pictures, words, facts)


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    _, asked = cli.command(__doc__, words, Journey, (0, 0))
    print(f"page: {tour(Path(asked.out), parse_seeds(asked.seeds), asked.scale)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
