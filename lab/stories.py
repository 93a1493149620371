"""Stories, from a raw corpus to a judged model.

    python -m lab.stories clean RAW.txt --out=clean.txt                  # what was repaired and dropped, and why
    python -m lab.stories train --model=gpt --path=clean.txt             # about a million parameters; or recurrent
    python -m lab.stories judge gpt=RUN recurrent=RUN --path=clean.txt   # perplexity, novelty, a sample of each

A story ends with the end mark (the document mark of every lab vocabulary), which the models learn to write:
they end their stories by themselves. The stories of Eldan and Li (2023), "TinyStories", are the pattern.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lab import LabError, cli, train
from lab.analyses.quality import MEASURES, assess
from lab.checkpoints import best_checkpoint, load_checkpoint
from lab.cleaning import STORY_END, clean_stories, decode_bytes
from lab.datasets import load_documents, split_documents
from lab.runlog import write_json, write_text
from lab.sample import generate


def judge(runs: Mapping[str, Path], path: str, *, count: int = 12, temperature: float = 0.8) -> dict[str, Any]:
    """What each run's best checkpoint is worth: losses, and measures of `count` stories it writes (see
    lab/analyses/quality.py), beside the same measures of held-out stories."""
    split = split_documents(load_documents("stories", path))
    told: dict[str, Any] = {}
    for name, run in runs.items():
        checkpoint = load_checkpoint(best_checkpoint(run))
        log = json.loads(next((run / "runs").glob("*.json")).read_text(encoding="utf-8"))
        drawn = generate(
            checkpoint, "Once upon a time", count=count, max_tokens=400, temperature=temperature, top_p=0.95, seed=1
        )
        texts = {"written": [s.text for s in drawn], "held out": split["val"][:count]}
        rows = {kind: assess(stories, split["train"], checkpoint) for kind, stories in texts.items()}
        means = {k: {m: sum(r[m] for r in rs) / len(rs) for m in MEASURES} for k, rs in rows.items()}
        told[name] = {
            "parameters": log["num_parameters"],
            "steps": log["config"]["steps"],
            "best": log["best"],
            "perplexity": math.exp(log["best"]["loss"]),
            "test_loss": log["test_loss"],
            "train_time_s": log["train_time_s"],
            "ended": sum(s.ended for s in drawn),
            "stories": count,
            "temperature": temperature,
            "means": means,
            "sample": next((s.text for s in drawn if s.ended), drawn[0].text),
        }
    return told


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    positional, given = cli.split_arguments(words)
    if positional[:1] == ["judge"] and len(positional) > 1:
        runs = {name: Path(run) for name, _, run in (word.partition("=") for word in positional[1:])}
        out = Path(given.get("out", Path(__file__).with_name("results") / "stories.json"))
        told = judge(runs, given.get("path", ""))
        write_json(out, told)
        for name, r in told.items():
            m = r["means"]["written"]
            print(
                f"{name}: perplexity {r['perplexity']:.1f}; {r['ended']} of {r['stories']} stories end by themselves; "
                f"nearest training story at {m['novelty_distance']:.2f}, longest shared run "
                f"{m['longest_shared_run']:.0f} characters, grammaticality {m['grammaticality']:.2f}, repetition "
                f"{m['repetition']:.2f}\n  {r['sample']}"
            )
        return 0
    if positional[:1] == ["clean"] and len(positional) == 2:
        text, lines = decode_bytes(Path(positional[1]).read_bytes())
        common = cli.typed("common_words", int, given.pop("common_words", "0"))
        out = given.pop("out", "")
        if given:
            raise LabError(f"unknown argument --{next(iter(given))}; there are --out and --common_words")
        cleaned = clean_stories(text, common_words=common)
        print(f"{cleaned.report()}; lines that were not UTF-8: {lines}")
        if out:
            write_text(Path(out), f"\n{STORY_END}\n".join([*cleaned.stories, ""]))
        return 0
    if positional == ["train"]:
        model = given.pop("model", "gpt")
        if model not in STORY_MODELS:
            raise LabError(f"--model={model}: stories are for {' and '.join(STORY_MODELS)}")
        settings = {"model": model, "data": "stories", "tokens": "word", **STORY_MODELS[model], **given}
        return train.main([f"--{name}={value}" for name, value in settings.items()])
    print(__doc__)
    return 0 if {"-h", "--help"} & set(words) else 2


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


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
