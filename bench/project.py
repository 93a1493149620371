"""Seconds of a whole run on 8 H100, projected from counts: no measurement, and for no table of results.

    python -m bench.project --preset frontier     # beside the published runs; writes the JSON and docs/projection.md
    python -m bench.project --check               # exit 1 if the page does not say what the file says

What is counted: the parameters of a preset by kind (from its own model, on the meta device), its steps with their
tokens and windows (trainer/schedule.py), the allowed pairs of attention at each of them over drawn documents, the bytes
that a process exchanges. What is taken over: the milliseconds of the parts of a step, from the preset's own rehearsal
where one is kept (bench/results/rehearsal-PRESET.json), else from `medium`'s, at the ceilings and efficiencies of
bench/rehearse/project.py. A part of a preset that was not rehearsed costs in proportion of its weights, tokens and
layers, and the passes over the stream that its techniques add follow from what their lines read and write (STREAMS).

The reference run's published seconds calibrate: one factor, its measured over its projected time. The other published
runs were not used for it, so their errors tell what the projection is worth.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.common import REPO, RESULTS, table, up_to_date, write_json
from bench.rehearse.page import kept
from bench.rehearse.project import ATTENTION_TFLOPS, CEILINGS, EFFICIENCY, HIDDEN
from trainer import schedule
from trainer.options import command, setting
from trainer.techniques import numbers

WORLD = 8
GOAL_S = 600
FILE, PAGE = RESULTS / "projection-8xh100.json", REPO / "docs" / "projection.md"

#: Seconds of published runs, and ms of steps of 131,072, 262,144, 393,216 and 524,288 tokens, where logs tell them.
PUBLISHED: dict[str, dict[str, Any]] = {
    "medium": {"source": "#124", "seconds": 1412.4, "ms": (None, None, None, 247.4)},
    "record18": {"source": "#188", "seconds": 1041.3, "ms": (72.0, 129.0, 189.0, 248.5)},
    "f2": {"source": "#252", "seconds": 950.3, "ms": (67.0, None, None, 234.7)},
    "f3": {"source": "#261", "seconds": 860.5, "ms": (67.0, 121.0, 180.0, 234.5)},
}
SIZES = (131072, 262144, 393216, 524288)


class Passes(NamedTuple):
    """Streams (of tokens x D in 16 bits) that a technique's lines read and write once in the forward pass, if they are
    one kernel and what they share with the lines beside them is counted there. `per`: for each attention layer
    ("layer"), layer that the field names ("named"), value embedding ("table") or step ("step")."""

    per: str
    reads: float
    writes: float
    linear: bool = False

    @property
    def count(self) -> float:
        """Forward and backward together. Backward reads the gradients of what was written and, unless the lines are
        linear, once more what was read; and writes the gradients of that."""
        return (2 if self.linear else 3) * self.reads + 2 * self.writes


#: Field -> what it reads and writes, by the function in trainer/techniques.py or trainer/gating.py that
#: tests/bench/test_project.py counts it in. Logits of `head_mixing`: 8 heads x 224 keys a query are 1.75 streams.
STREAMS = {
    "norm_before_attention": Passes("layer", 1, 1),  # the norm
    "output_gates": Passes("layer", 1, 1),  # what attention found, times a number a head
    "bigram_rows": Passes("layer", 1, 0),  # one more summand of `mixed`
    "xsa": Passes("layer", 1, 0),  # `exclusive` reads v beside what the output gate reads
    "key_offset": Passes("named", 1, 1, linear=True),  # `offset_keys`
    "paired_heads": Passes("named", 1, 1, linear=True),  # `interleaved` v; of q, k and o others' kernels do it
    "smear": Passes("step", 1, 1),  # `smeared`
    "dynamic_skips": Passes("step", 10, 3),  # `before_last` 3 to 2, `before_head` 6 to 1, x0 once more in `added`
    "untied_values": Passes("table", 1, 0),  # a row of its own where another layer's row would be read
    "ngram_rows": Passes("step", 5, 3, linear=True),  # both rows looked up, `joined` 2 to 1, the bigram row beside them
    "head_mixing": Passes("step", 7.75, 2.97),  # `mixed_heads`: q, k and v twice, o to o; logits, their mixture
}
#: What `frontier` has and f3 has not: (field, least and most share of the steps saved, how it was published). Where one
#: number was published, it is both; "mn" is 0.001 nats, and on this track 1 mn is 18 to 28 of some 4,600 steps.
EFFECTS = (
    ("xsa", 0.020, 0.020, "-30 of 1480 steps, -4.5 mn (n 10/10, #264)"),
    ("paired_heads", 0.035, 0.035, "-65 of about 1840 steps (n 5, #191)"),
    ("untied_values", 0.016, 0.016, "-25 of 1600 steps (n 10/10, #209)"),
    ("muon_head_pairs", 0.005, 0.007, "-10 of 1490 steps, -1.2 mn (n 8/8, #253)"),
    ("two_rate_from", 0.012, 0.012, "-40 of 3250 steps, -1.9 mn (n 10/8, #340), on the optimizer track"),
    (
        "dynamic_gates, head_mixing",
        0.036,
        0.072,
        "-50 to -100 of 1385 steps, -7.6 mn (n 11/9, #315), with other changes",
    ),
    ("ngram_rows", 0.050, 0.113, "guessed 5 to 10 %; -145 of 1285 steps (n 12/12, #366) for 80 M rows in host memory"),
)
TOUCHED = {"embed": 0.611, "bigram": 0.2}  # rows of a table a step exchanges: rehearsed; published (#252)


@dataclass(frozen=True)
class Weights:
    """Parameters by the part of a step that they belong to."""

    mlp: int
    projections: int
    head: int
    tables: int
    bigram: int


def weights_of(config: Any) -> Weights:
    """Counted in the preset's own model, without memory."""
    import train_gpt

    with torch.device("meta"):
        model = train_gpt.GPT(config)
    counts = dict.fromkeys(("mlp", "projections", "head", "tables", "bigram"), 0)
    for name, p in model.named_parameters():
        if "bigram_embed" in name:
            counts["bigram"] += p.numel()
        elif "embed" in name:
            counts["tables"] += p.numel()
        elif "mlp" in name:
            counts["mlp"] += p.numel()
        elif name.endswith((".qkvo_w", ".qk_w", ".vo_w")) or ("dynamic" in name and name.endswith(("in_w", "out_w"))):
            counts["projections"] += p.numel()
        elif name == "head_w":
            counts["head"] += p.numel()
    return Weights(**counts)


class Projection:
    """Milliseconds of one preset's steps, from the rehearsed parts of a step of the configuration `rehearsed`: the same
    one's, or `medium`'s."""

    def __init__(self, config: Any, rehearsed: Any, parts: dict[str, float], rehearsed_tokens: int):
        self.config, self.parts, self.tokens = config, parts, rehearsed_tokens
        self.counted = config == rehearsed  # whatever its techniques add is in the parts
        self.own, self.ref = weights_of(config), weights_of(rehearsed)
        self.layers = [c.num_layers - len(numbers(c.attention_free_layers)) for c in (config, rehearsed)]
        self.deep = config.num_layers / rehearsed.num_layers
        self.h100 = CEILINGS["h100"]
        self.faster = self.h100.tflops_16 / self.h100.tflops_8
        self._attention: dict[tuple[int, int], float] = {}

    def attention_ms(self, step: int) -> float:
        """Over the allowed pairs of a step's sequence of drawn documents, at its windows."""
        from bench.step import attention_flops, draw_documents

        c, length = self.config, schedule.sequence_tokens_at(step, self.config)
        key = length, schedule.window_blocks_at(step, c)
        if key not in self._attention:
            drawn = draw_documents(length, c.vocab_size, c.eos_id)
            self._attention[key] = attention_flops(c, [drawn], step) / ATTENTION_TFLOPS / 1e9
        return self._attention[key]

    def eight(self, least: str) -> float:
        """Time of a product that is in 8 bits from `--products={least}` on, over what was rehearsed of it."""
        from trainer.products import NAMES

        if self.counted:
            return 1.0
        return self.faster if NAMES.index(self.config.products) >= NAMES.index(least) else 1.0

    def head_ms(self) -> float:
        """Products at 16 or 8 bits, and what the loss moves, of the rehearsed number of tokens."""
        products = 6.0 * self.ref.head * self.tokens / self.h100.tflops_16 / EFFICIENCY["product", True] / 1e9
        rest = self.parts["head and loss"] - products
        return products * self.eight("fp8_head") + rest

    def classes(self, step: int) -> float:
        """Share of the classes that a step's softmax is over: `sampled_softmax`."""
        rows = self.own.head / self.config.model_dim
        return (schedule.sampled_classes_at(step, self.config) or rows) / rows

    def streams_ms(self) -> float:
        """Norms, mixes and embeddings of the rehearsed number of tokens, with what techniques add."""
        c, passes = self.config, 0.0
        if self.counted:
            return self.parts["norms, mixes, embeddings"]
        times = {"layer": self.layers[0], "table": c.value_embeddings, "step": 1}
        for field, passed in STREAMS.items():
            value = getattr(c, field)
            often = len(numbers(value)) if passed.per == "named" else times[passed.per]
            passes += passed.count * often if value not in (False, 0, "") else 0
        moved = passes * self.tokens * c.model_dim * 2
        own = moved / self.h100.tb_per_s / EFFICIENCY["inductor", False] / 1e9
        return self.parts["norms, mixes, embeddings"] * self.deep + own

    def ngram_bytes(self, step: int) -> float:
        """Of rows of `ngram_rows` that a process fetches and whose gradients it sends back, if no two n-grams of its
        sequence share a row: the most that it can be."""
        here = schedule.batch_tokens_at(step, self.config) / WORLD
        return 2 * 2 * here * self.config.model_dim * 2 * (WORLD - 1) / WORLD if self.config.ngram_rows else 0.0

    def sent_bytes(self) -> float:
        """That a process sends a step: matrices there and back, head and touched rows as often as Adam steps."""
        c, w = self.config, self.own
        matrix = 4 if (c.matrix_dtype or c.dtype) == "float32" else 2
        head = 2 if c.tie_embeddings_frac else 4
        tables = 2 * (TOUCHED["embed"] * w.tables + TOUCHED["bigram"] * w.bigram)
        return 2 * matrix * (w.mlp + w.projections) + (2 * head * w.head + tables) / c.adam_every

    def step_ms(self, step: int) -> dict[str, float]:
        """Milliseconds of a step by part."""
        own, ref, p = self.own, self.ref, self.parts
        projections = own.projections / ref.projections
        share = schedule.batch_tokens_at(step, self.config) / WORLD / self.tokens
        matrices = (own.mlp + own.projections) / (ref.mlp + ref.projections)
        others = (own.head + own.tables + own.bigram) / (ref.head + ref.tables + ref.bigram) / self.config.adam_every
        link = self.h100.link_gb_per_s * 1e6
        return {
            "MLP": p["MLP"] * share * own.mlp / ref.mlp * self.eight("fp8_mlp"),
            "attention projections": p["attention projections"] * share * projections * self.eight("fp8"),
            "head and loss": self.head_ms() * share * self.classes(step),
            "attention": self.attention_ms(step),
            "attention inputs": p.get("attention inputs", 0.0) * share * self.layers[0] / self.layers[1],
            "norms, mixes, embeddings": self.streams_ms() * share,
            "Muon": p["Muon"] * matrices,
            "AdamW": p["AdamW"] * others,
            "messages not hidden": ((1 - HIDDEN) * self.sent_bytes() + self.ngram_bytes(step)) / link,
            "gaps between launches": p["gaps between launches"] * self.deep,
        }

    def run(self) -> dict[str, Any]:
        """The whole run: seconds, mean ms by size of the batch, ms by part of the last step."""
        c = self.config
        window, classes = schedule.window_blocks_at, schedule.sampled_classes_at
        kind = lambda step: (schedule.batch_tokens_at(step, c), window(step, c), classes(step, c))  # noqa: E731
        total_ms, by_size = 0.0, {size: [0, 0.0] for size in SIZES}
        for (size, *_), group in itertools.groupby(range(c.num_iterations), kind):
            steps = list(group)
            ms = sum(self.step_ms(steps[0]).values())
            total_ms += ms * len(steps)
            kept_of = by_size.setdefault(size, [0, 0.0])
            kept_of[0], kept_of[1] = kept_of[0] + len(steps), kept_of[1] + ms * len(steps)
        means = {size: ms / count for size, (count, ms) in by_size.items() if count}
        last = self.step_ms(c.num_iterations - 1)
        return {"steps": c.num_iterations, "seconds": total_ms / 1e3, "ms": means, "parts_of_last_step": last}


def project(presets: Sequence[str]) -> dict[str, Any]:
    """The projection of `presets` and of the published runs, calibrated by the reference run."""
    import train_gpt

    rehearsed = kept("medium")
    if rehearsed is None:
        raise FileNotFoundError("no rehearsal is kept: python -m bench.rehearse --preset medium --keep medium")
    medium = train_gpt.parse_config(["--preset=medium"])
    runs: dict[str, Any] = {}
    for name in dict.fromkeys((*PUBLISHED, *presets)):
        config = train_gpt.parse_config([f"--preset={name}"])
        own = kept(name)
        told, reference = (own, config) if own else (rehearsed, medium)
        runs[name] = Projection(config, reference, told["projection"]["parts"], told["tokens"]).run()
        runs[name]["rehearsed"] = own is not None
    factor = PUBLISHED["medium"]["seconds"] / runs["medium"]["seconds"]
    for name, told in runs.items():
        told["calibrated_seconds"] = told["seconds"] * factor
        if name in PUBLISHED:
            told["published_seconds"] = PUBLISHED[name]["seconds"]
            told["error"] = told["calibrated_seconds"] / told["published_seconds"] - 1
        else:
            told["steps_within_goal"] = int(GOAL_S / told["calibrated_seconds"] * told["steps"])
    return {"schema": 1, "name": "projection", "calibration": factor, "goal_s": GOAL_S, "runs": runs}


def argued(run: dict[str, Any]) -> list[dict[str, Any]]:
    """Steps and seconds of `frontier` if its techniques' published effects add up, wholly or by half."""
    least, most = (sum(effect[i] for effect in EFFECTS) for i in (1, 2))
    cases = {
        "nothing is saved": 0.0,
        "half of the least": least / 2,
        "half of the most": most / 2,
        "all of the most": most,
    }
    rows = []
    for words, saved in cases.items():
        steps = round(run["steps"] * (1 - saved))
        seconds = run["calibrated_seconds"] * steps / run["steps"]
        rows.append({"of the published effects": words, "steps": steps, "calibrated s": round(seconds)})
    return rows


def page(told: dict[str, Any]) -> str:
    """docs/projection.md from the file."""
    runs = told["runs"]
    rows = [
        {
            "preset": name,
            "steps": run["steps"],
            "projected s": round(run["seconds"], 1),
            "calibrated s": round(run["calibrated_seconds"], 1),
            "published s": run.get("published_seconds", "none"),
            "error": f"{run['error']:+.1%}" if "error" in run else "",
        }
        for name, run in runs.items()
    ]
    sizes = []
    for name, run in runs.items():
        means = [run["ms"].get(str(size), run["ms"].get(size)) for size in SIZES]
        published = PUBLISHED.get(name, {}).get("ms", [None] * 4)
        cells = [_pair(m and m * told["calibration"], p) for m, p in zip(means, published)]
        sizes.append({"preset": name} | {f"{size:,}": cell for size, cell in zip(SIZES, cells)})
    names = list(runs)
    parts = [
        {"part": part, **{name: runs[name]["parts_of_last_step"][part] for name in names}}
        for part in runs[names[0]]["parts_of_last_step"]
    ]
    goals = [
        f"`{name}`: {run['steps_within_goal']} of its {run['steps']} steps fit into {told['goal_s']} s."
        for name, run in runs.items()
        if "steps_within_goal" in run
    ]
    errors = [abs(run["error"]) for name, run in runs.items() if "error" in run and name != "medium"]
    return TEXT.format(
        effects=table(
            [{"field": f, "least": f"{a:.1%}", "most": f"{b:.1%}", "published": how} for f, a, b, how in EFFECTS]
        ),
        argued=table(argued(runs["frontier"])) if "frontier" in runs else "Not projected.",
        rehearsed=", ".join(f"`{name}`" for name, run in runs.items() if run["rehearsed"]),
        runs=table(rows),
        sizes=table(sizes),
        parts=table(parts),
        goals="\n".join(goals),
        factor=told["calibration"],
        worst=max(errors),
        what=__doc__.split("\n\n")[2],
    )


def _pair(projected: float | None, published: float | None) -> str:
    if projected is None:
        return ""
    return f"{projected:.0f}" + (f" ({published:g})" if published is not None else "")


TEXT = """# Seconds of a run on 8 H100: a projection

Generated by `python -m bench.project`. **Nothing here is measured by us**, no figure of it belongs into a table of
results, and whether a preset reaches 2.92 in its steps is not a question that it answers: steps are the presets' own.

{what}

One factor, {factor:.3f}, makes the reference run's projected time its published one. The other published runs are then
projected without having been looked at: the largest error among them is {worst:.1%}.

{runs}

{goals}

## Milliseconds a step, by tokens of the step: calibrated (published)

{sizes}

Published ones are differences of cumulative times, where the logs tell them. The head is in 8 bits where a preset has
it so (`products`).

## Parts of the last step, ms, not calibrated

{parts}

## How many steps `frontier` may need: an argument, not a projection

f3 reaches 2.917 in 4150 steps (n 6, #261). `frontier` keeps that number until a run has shown another. What it adds was
published elsewhere, each time on a weaker baseline than this one, so that effects overlap: shares of the steps saved.

{effects}

If they added up:

{argued}

## Not in it

Kernels of each preset's own step (rehearsed whole: {rehearsed}), what `adam_period` saves, NorMuon's second pass over
its matrices, memory limits, data loading, and everything a GPU must still confirm (docs/rehearsal.md).
"""


@dataclass(frozen=True)
class Options:
    """What is projected."""

    preset: tuple = setting((), "name", "of train_gpt.py, beside the published ones (frontier)")
    check: bool = setting(False, "flag", "write nothing; exit 1 if the page is out of date")
    page: Path = setting(PAGE, "file", "the page")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    _, options = command(__doc__, argv, Options)
    if options.check:
        return up_to_date(options.page, page(json.loads(FILE.read_text())), "bench.project")
    write_json(FILE, project(options.preset or ["frontier"]))
    text = page(json.loads(FILE.read_text()))
    options.page.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
