"""Tasks from outside: HellaSwag (Zellers et al. 2019), LAMBADA (Paperno et al. 2016), and grammar as pairs (BLiMP,
Warstadt et al. 2020; CoLA, Warstadt et al. 2019). One reader each; it names the file and the line at fault.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab import LabError, plots
from lab.analyses.finding import Finding, write_finding
from lab.analyses.scoring import letters_nats, token_logits, token_losses
from lab.checkpoints import Checkpoint
from lab.tables import json_lines, read_utf8, text_of

_LAST_WORD = re.compile(r"(.*\S)(\s+)(\S+)\Z", re.DOTALL)


@dataclass(frozen=True)
class Choice:
    """A context, its possible endings, and which one is right."""

    context: str
    endings: tuple[str, ...]
    label: int


def read_hellaswag(path: str | Path, limit: int = 0) -> list[Choice]:
    """The first `limit` tasks (0: all). LabError for a line without context, endings or a label that counts from 0."""
    tasks = []
    for where, row in json_lines(path):
        endings, label = row.get("endings"), row.get("label")
        if not isinstance(endings, list) or len(endings) < 2 or not all(isinstance(e, str) and e for e in endings):
            raise LabError(f"{where}: 'endings' must be a list of at least two texts")
        if isinstance(label, bool) or not re.fullmatch(r"-?\d+", str(label)):
            raise LabError(f"{where}: no whole number under 'label'; unlabelled tasks cannot be scored")
        if not 0 <= int(label) < len(endings):
            raise LabError(f"{where}: label {label} of {len(endings)} endings; labels count from 0")
        tasks.append(Choice(text_of(where, row, "ctx"), tuple(endings), int(label)))
    if len(tasks) >= 20 and all(task.label for task in tasks):
        raise LabError(f"{path}: not one of {len(tasks)} labels is 0; labels count from 0, these seem to count from 1")
    return tasks[:limit] if limit else tasks


def read_lambada(path: str | Path, limit: int = 0) -> list[tuple[str, str]]:
    """(text before, last word with the white space before it) of the first `limit` tasks (0: all). LabError for a
    line without text or of one word."""
    tasks = []
    for where, row in json_lines(path):
        match = _LAST_WORD.match(text_of(where, row, "text").strip())
        if not match:
            raise LabError(f"{where}: at least two words are needed, the last one to be guessed")
        tasks.append((match[1], match[2] + match[3]))
    return tasks[:limit] if limit else tasks


def read_pairs(path: str | Path) -> list[tuple[str, str]]:
    """(good, bad) sentences of a file in BLiMP's form: JSON lines with sentence_good and sentence_bad."""
    return [
        (text_of(where, row, "sentence_good"), text_of(where, row, "sentence_bad")) for where, row in json_lines(path)
    ]


def read_cola(path: str | Path) -> list[tuple[str, bool]]:
    """(sentence, acceptable) of a file in CoLA's form: tabs between source, label 0 or 1, mark and sentence."""
    rows = []
    for number, line in enumerate(read_utf8(path).replace("\r\n", "\n").split("\n"), 1):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != 4 or cells[1] not in ("0", "1") or not cells[3].strip():
            raise LabError(f"{path}, line {number}: source, 0 or 1, mark and sentence are needed, with tabs between")
        rows.append((cells[3], cells[1] == "1"))
    return rows


def hellaswag(
    checkpoint: Checkpoint, path: str | Path, limit: int = 0, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Share of tasks whose right ending has the least loss: summed, and per byte of the ending (the usual 'norm').
    Endings that tie share the point, or the first one would be right by its place; unknown words cost their letters."""
    right = right_norm = chance = 0.0
    tasks = read_hellaswag(path, limit)
    for number, task in enumerate(tasks, 1):
        context = checkpoint.tokenizer.encode(task.context).tolist()
        sums, norms = [], []
        for ending in task.endings:
            ids = checkpoint.tokenizer.encode(" " + ending.lstrip()).tolist()
            nats = float(token_losses(checkpoint, context + ids)[len(context) :].sum())
            nats += letters_nats(checkpoint, ending)
            sums.append(nats)
            norms.append(nats / max(1, len(ending.encode())))
        right += point(sums, task.label)
        right_norm += point(norms, task.label)
        chance += 1 / len(task.endings) / len(tasks)
        _tell(progress, "HellaSwag", number, len(tasks), right_norm)
    return {
        "tasks": len(tasks),
        "accuracy": right / len(tasks),
        "accuracy_norm": right_norm / len(tasks),
        "chance": chance,
    }


def lambada(
    checkpoint: Checkpoint, path: str | Path, limit: int = 0, progress: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Share of texts whose last word the model would have written (every token of it the likeliest), and its
    perplexity per word. A last word that the vocabulary lacks was not written, whatever the model guessed: it counts
    as wrong, its share is `unknown_share`, and the perplexity leaves it out."""
    right, nats, unknown = 0, 0.0, 0
    tasks = read_lambada(path, limit)
    missing = getattr(checkpoint.tokenizer, "unknown_id", None)
    for number, (before, word) in enumerate(tasks, 1):
        context, ids = (checkpoint.tokenizer.encode(text).tolist() for text in (before, word))
        if not ids or missing in ids:
            unknown += 1
        else:
            logits = token_logits(checkpoint, context + ids)[len(context) :]
            nats -= float(logits.log_softmax(-1)[range(len(ids)), ids].sum())
            right += logits.argmax(-1).tolist() == ids
        _tell(progress, "LAMBADA", number, len(tasks), right)
    known = len(tasks) - unknown
    return {
        "tasks": len(tasks),
        "accuracy": right / len(tasks),
        "unknown_share": unknown / len(tasks),
        "word_perplexity": math.exp(min(700, nats / known)) if known else None,
    }


def point(losses: Sequence[float], label: int) -> float:
    """1 if the right one has the least loss, its share where several have it, else 0."""
    return (losses[label] == min(losses)) / losses.count(min(losses))


def _tell(progress: Callable[[str], None] | None, name: str, number: int, total: int, right: float) -> None:
    if progress and (number % max(1, total // 10) == 0):
        progress(f"{name}: {number} of {total} tasks, {right:g} right so far")


def benchmarks(
    checkpoint: Checkpoint,
    out: Path,
    *,
    hellaswag_path: str = "",
    lambada_path: str = "",
    limit: int = 200,
    progress: Callable[[str], None] | None = None,
) -> Finding:
    """HellaSwag and LAMBADA of a model over GPT-2's tokens (or any that can write the texts)."""
    data: dict[str, Any] = {}
    if hellaswag_path:
        data["hellaswag"] = hellaswag(checkpoint, hellaswag_path, limit, progress)
    if lambada_path:
        data["lambada"] = lambada(checkpoint, lambada_path, limit, progress)
    if not data:
        raise LabError("give --hellaswag=FILE or --lambada=FILE (JSON lines)")
    names = list(data)
    shares = [data[n].get("accuracy_norm", data[n]["accuracy"]) for n in names]
    fig, ax = plots.figure(size=(5, 3.5))
    ax.bar(names, [100 * s for s in shares], color=plots.color(0), width=0.5)
    if "hellaswag" in data:
        ax.axhline(100 * data["hellaswag"]["chance"], color="0.5", linestyle="--", label="guessing at HellaSwag")
        ax.legend()
    ax.set_ylabel("% right")
    ax.set_title(f"{checkpoint.label}, step {checkpoint.step:,}")
    parts = [f"{n} {share:.1%} of {data[n]['tasks']}" for n, share in zip(names, shares)]
    if data.get("lambada", {}).get("unknown_share"):
        parts.append(f"{data['lambada']['unknown_share']:.1%} of LAMBADA's last words are unknown to the vocabulary")
    return write_finding(out, "benchmarks", "; ".join(parts) + ".", data, fig)


# ---- grammar -----------------------------------------------------------------------------------------------


def wilson(right: int, count: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share, which stays within 0 and 1 and does not collapse at its ends."""
    from scipy.stats import norm

    z = float(norm.ppf((1 + level) / 2))
    share, spread = right / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return centre - half, centre + half


def sentence_nats(checkpoint: Checkpoint, sentence: str) -> tuple[float, int]:
    """(nats of a whole sentence and its end, number of tokens); unknown words cost their letters."""
    ids = checkpoint.tokenizer.encode(sentence).tolist()
    nats = float(token_losses(checkpoint, [*ids, checkpoint.tokenizer.mark]).sum())
    return nats + letters_nats(checkpoint, sentence), len(ids) + 1


def pair_share(checkpoint: Checkpoint, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Share of pairs whose good sentence is the likelier one (a tie is half), with Wilson's 95 % interval."""
    right = 0.0
    for good, bad in pairs:
        a, b = (sentence_nats(checkpoint, s)[0] for s in (good, bad))
        right += 1.0 if a < b else 0.5 if a == b else 0.0
    low, high = wilson(right, len(pairs))
    return {"pairs": len(pairs), "share": right / len(pairs), "low": low, "high": high}


def ranked_share(checkpoint: Checkpoint, rows: Sequence[tuple[str, bool]], draws: int = 1000) -> dict[str, Any]:
    """Of all pairs of an acceptable and an unacceptable sentence, the share in which the acceptable one has less loss
    a token (the area under the ROC curve; a tie is half), with a 95 % bootstrap interval over sentences."""
    loss = [nats / tokens for nats, tokens in (sentence_nats(checkpoint, s) for s, _ in rows)]
    good = np.array([x for x, (_, fine) in zip(loss, rows) if fine])
    bad = np.array([x for x, (_, fine) in zip(loss, rows) if not fine])
    if not len(good) or not len(bad):
        raise LabError("acceptable and unacceptable sentences are needed, at least one of each")
    wins = (good[:, None] < bad) + 0.5 * (good[:, None] == bad)
    rng = np.random.default_rng(0)
    drawn = [
        wins[np.ix_(rng.integers(len(good), size=len(good)), rng.integers(len(bad), size=len(bad)))].mean()
        for _ in range(draws)
    ]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return {"good": len(good), "bad": len(bad), "share": float(wins.mean()), "low": float(low), "high": float(high)}


def grammar(checkpoints: Sequence[Checkpoint], path: str | Path, out: Path) -> Finding:
    """How often each checkpoint prefers the good sentence: pairs in BLiMP's form (.jsonl), or CoLA's (.tsv)."""
    cola = str(path).lower().endswith((".tsv", ".txt"))
    judged = ranked_share if cola else pair_share
    rows = read_cola(path) if cola else read_pairs(path)
    table = [{"step": c.step, "model": c.label, **judged(c, rows)} for c in checkpoints]
    fig, ax = plots.figure(size=(7, 3.8))
    steps = plots.places_of([r["step"] for r in table])
    share = [r["share"] for r in table]
    spread = [[s - r["low"] for s, r in zip(share, table)], [r["high"] - s for s, r in zip(share, table)]]
    ax.errorbar(steps, share, yerr=spread, fmt="o-", capsize=4, color=plots.color(0))
    ax.axhline(0.5, color="0.5", linestyle="--", label="guessing")
    plots.step_axis(ax)
    ax.set_ylim(0, 1.02)
    ax.set_ylabel("share of pairs preferred rightly")
    ax.set_title(f"Grammar, {Path(path).name}: 95 % intervals")
    ax.legend()
    last = table[-1]
    summary = (
        f"{Path(path).name}: the good sentence is preferred in {last['share']:.1%} "
        f"(95 % interval {last['low']:.1%} to {last['high']:.1%}) at step {last['step']:,}; guessing has 50 %."
    )
    return write_finding(out, "grammar", summary, {"form": "CoLA" if cola else "BLiMP", "table": table}, fig)
