"""Stories, from a raw corpus to a judged model.

    python -m lab.stories clean RAW.txt --out=clean.txt                  # what was repaired and dropped, and why
    python -m lab.stories clean RAW.csv --out=clean.txt --common_words=1500 --replaced_share=0.05
    python -m lab.stories train --model=gpt --path=clean.txt             # about a million parameters; or recurrent
    python -m lab.stories sweep --path=clean.txt --layers=1,2,4 --widths=64,128   # layers against width, a map
    python -m lab.stories judge gpt=RUN recurrent=RUN --path=clean.txt   # perplexity, novelty, a sample of each

A story ends with the end mark (the document mark of every lab vocabulary), which the models learn to write:
they end their stories by themselves. The stories of Eldan and Li (2023), "TinyStories", are the pattern.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.paths import write_text
from lab import LabError, cli, train, vary
from lab.analyses.curves import run_json, told_by
from lab.analyses.quality import MEASURES, assess
from lab.analyses.scoring import score
from lab.checkpoints import best_checkpoint, load_checkpoint
from lab.cleaning import STORY_END, clean_stories, kept_by_share, raw_stories
from lab.cli import setting
from lab.runlog import write_json
from lab.sample import generate
from lab.texts import texts_of

# About a million parameters each at 2000 words.
STORY_MODELS = {
    "gpt": {
        "num_layers": 2,
        "model_dim": 128,
        "num_heads": 4,
        "second_input_embedding": "false",
        "steps": 1000,
        "batch_tokens": 4096,
        "row_tokens": 512,
    },
    "recurrent": {
        "cell": "gru",
        "embedding_dim": 128,
        "hidden_dim": 256,
        "steps": 1500,
        "batch_tokens": 4096,
        "row_tokens": 128,
        "dropout": 0.1,
    },
}


SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)  # of rarer words, for the table of what each choice keeps


@dataclass(frozen=True)
class Cleaning:
    """Clean a raw corpus."""

    out: str = setting("", "file", "for the clean stories; '': only count")
    common_words: int = setting(0, "words", "keep to the so many commonest; 0: all", at_least=0)
    replaced_share: float = setting(
        0.0, "fraction", "of a story's words that may be rarer, and are then replaced by <unk>", at_least=0, at_most=1
    )


@dataclass(frozen=True)
class Training:
    """Train a story model; the fields of lab.train may stand beside its name."""

    model: str = setting("gpt", "name", "of the model", choices=STORY_MODELS)


@dataclass(frozen=True)
class Sweeping:
    """Train story transformers of several depths and widths; the fields of lab.train may stand beside these."""

    layers: str = setting("1,2,4", "numbers", "of layers, with commas")
    widths: str = setting("64,128", "numbers", "of the residual stream, with commas")


@dataclass(frozen=True)
class Judging:
    """Judge models by what they write."""

    path: str = setting("", "file", "where the models' stories lie now; '': where they lay when they were trained")
    out: str = setting("lab/out/stories.json", "file", "for the numbers")
    count: int = setting(12, "stories", "that each model writes", at_least=1, at_most=1000)
    temperature: float = setting(0.8, "factor", "of the draws", at_least=0, at_most=100)


def judge(runs: Mapping[str, Path], asked: Judging) -> dict[str, Any]:
    """What each run's kept checkpoint is worth: losses, and measures of the stories it writes (see
    lab/analyses/quality.py), beside the same measures of held-out stories. Perplexity is of a word, and cheap where
    many words are the unknown one: `unknown_share` and `bits_per_byte` (`Score`) make it comparable."""
    told: dict[str, Any] = {}
    for name, run in runs.items():
        checkpoint = load_checkpoint(best_checkpoint(run))
        split = texts_of(checkpoint, asked.path).documents
        log = told_by(run_json(run))  # of the very run whose checkpoint is read
        print(f"{name}: reading {checkpoint.reading()}", flush=True)
        drawn = generate(
            checkpoint,
            "Once upon a time",
            count=asked.count,
            max_tokens=400,
            temperature=asked.temperature,
            top_p=0.95,
            seed=1,
        )
        texts = {"written": [s.text for s in drawn], "held out": split["val"][: asked.count]}
        rows = {kind: assess(stories, split["train"], checkpoint) for kind, stories in texts.items()}
        means = {k: {m: sum(r[m] for r in rs) / len(rs) for m in MEASURES} for k, rs in rows.items()}
        whole = score(checkpoint, split["val"])
        told[name] = {
            "parameters": log["num_parameters"],
            "steps": log["config"]["steps"],
            "best": log["best"],
            "perplexity": math.exp(log["best"]["loss"]),
            "unknown_share": whole.unknown_share,
            "bits_per_byte": whole.bits_per_byte,
            "test_loss": log["test_loss"],
            "train_time_s": log["train_time_s"],
            "ended": sum(s.ended for s in drawn),
            "stories": asked.count,
            "temperature": asked.temperature,
            "means": means,
            "sample": next((s.text for s in drawn if s.ended), drawn[0].text),
        }
    return told


def judge_command(words: list[str]) -> int:
    """`judge name=RUN ...`."""
    places, asked = cli.command(__doc__, words, Judging, (1, None))
    if unnamed := [word for word in places if "=" not in word]:
        raise LabError(f"write name=RUN, not {unnamed[0]!r}")
    told = judge({name: Path(run) for name, _, run in (word.partition("=") for word in places)}, asked)
    write_json(Path(asked.out), told)
    for name, r in told.items():
        m = r["means"]["written"]
        print(
            f"{name}: perplexity {r['perplexity']:.1f} a word, {r['unknown_share']:.1%} of the words unknown, "
            f"{r['bits_per_byte']:.3f} bits a byte; {r['ended']} of {r['stories']} stories end by themselves; "
            f"nearest training story at {m['novelty_distance']:.2f}, longest shared run "
            f"{m['longest_shared_run']:.0f} characters, grammaticality {m['grammaticality']:.2f}, repetition "
            f"{m['repetition']:.2f}\n  {r['sample']}"
        )
    print(f"numbers in {asked.out}")
    return 0


def clean_command(words: list[str]) -> int:
    """`clean RAW`."""
    (raw,), asked = cli.command(__doc__, words, Cleaning, (1, 1))
    stories, lines = raw_stories(raw)
    limits = {"common_words": asked.common_words, "replaced_share": asked.replaced_share}
    cleaned = clean_stories(stories, **limits)
    print(f"{cleaned.report()}; lines that were not UTF-8: {lines}")
    if asked.common_words:
        kept = kept_by_share(clean_stories(stories).stories, asked.common_words, SHARES)
        told = ", ".join(f"{share:g}: {count}" for share, count in kept.items())
        print(f"stories kept of each --replaced_share at {asked.common_words} words: {told}")
    if asked.out and not cleaned.stories:
        raise LabError(f"{raw}: no story is left, so {asked.out} was not written; see the counts above for why")
    if asked.out:
        write_text(Path(asked.out), f"\n{STORY_END}\n".join([*cleaned.stories, ""]))
    return 0


def train_command(words: list[str]) -> int:
    """`train --model=gpt`: lab.train with a story model's settings, which the command line may change."""
    others: dict[str, str] = {}
    places, given = cli.read(words, Training, others=others)
    model = cli.filled(Training, given).model
    return train.main([*places, *cli.flags({"model": model} | others)], _start(model))


def _start(model: str) -> dict[str, str]:
    """The settings of a story model, as texts."""
    start = {"model": model, "data": "stories", "tokens": "word", **STORY_MODELS[model]}
    return {name: str(value) for name, value in start.items()}


def sweep_command(words: list[str]) -> int:
    """`sweep`: lab.vary over layers and width of the transformer. Value embeddings, which one layer alone cannot
    have, are off, so that only depth and width differ."""
    others: dict[str, str] = {}
    places, given = cli.read(words, Sweeping, others=others)
    asked = cli.filled(Sweeping, given)
    start = _start("gpt") | {"value_embeddings": "0"}
    for name in ("num_layers", "model_dim"):  # what the sweep itself gives
        start.pop(name)
    grid = {"field": "num_layers,model_dim", "values": f"{asked.layers}/{asked.widths}"}
    return vary.main([*places, *cli.flags(start | others | grid)])


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    verbs = {"clean": clean_command, "train": train_command, "sweep": sweep_command, "judge": judge_command}
    if not words or cli.wants_help(words):
        print(__doc__, cli.describe(Cleaning, Training, Sweeping, Judging))
        return 0 if words else 2
    if words[0] not in verbs:
        raise LabError(f"lab.stories has no {words[0]!r}; there are {', '.join(verbs)}")
    return verbs[words[0]](words[1:])


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
