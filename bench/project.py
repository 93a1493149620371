"""Seconds of a whole run on 8 H100, projected from counts: no measurement, and for no table of results.

    python -m bench.project --preset frontier     # beside the published runs; writes the JSON and docs/projection.md
    python -m bench.project --check               # exit 1 if the page does not say what the file says

What is counted: a preset's steps with their tokens and windows (trainer/schedule.py), the allowed pairs of attention at
each of them over drawn documents, the bytes that a process exchanges; and the parts of a whole step, by the preset's
own rehearsal (bench/results/rehearsal-PRESET.json), at the ceilings and efficiencies of bench/rehearse/project.py. A
preset without one has that of the preset it came from: its parts cost in proportion of weights, tokens and layers, 8
bits as counted on `medium`, and passes over the stream that it adds as its lines read and write them (STREAMS).

Two implementations are told apart. *Published* is how the published runs compute: FlexAttention or FlashAttention and
plain torch, fused by Inductor. That is what `--kernels=reference` does, and the same rehearsal counts it, preset by
preset (bench/results/rehearsal-reference*.json); only its loss is exchanged for one with all logits at once, as theirs
(bench/rehearse/loss.py), and from f2 on for a fused one in 8 bits, which is the count of ours. *Ours* is this trainer
with its kernels.

One factor calibrates both: the reference run's published seconds over its projection as published. The other published
runs were not used for it, so their errors tell what the projection is worth.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import effects
from bench.common import REPO, RESULTS, table, up_to_date, write_json
from bench.rehearse.loss import FILE as LOSS
from bench.rehearse.page import kept
from bench.rehearse.project import ATTENTION_TFLOPS, CEILINGS, EFFICIENCY, FLEX_TFLOPS, ROWS, over_plain
from bench.rehearse.project import AVERAGE as THE_AVERAGE
from kernels.proof import slots
from records.agreement import MN_RANGE
from trainer import schedule
from trainer.options import command, setting
from trainer.techniques import narrow_rows, numbers

WORLD = 8
GOAL_S = 600
FILE, PAGE = RESULTS / "projection-8xh100.json", REPO / "docs" / "projection.md"

#: FlashAttention 3, forward and backward together, in TFLOP/s of the allowed pairs (assumed): its paper has 467 to 625
#: forward at 512 to 2,048 tokens without a mask (arXiv:2407.08608, heads of 128); backward is slower, and of documents
#: of 690 tokens many tiles lie half behind the diagonal or past an end.
FLASH_TFLOPS = 350.0
#: Seconds of published runs, and ms of steps of 131,072, 262,144, 393,216 and 524,288 tokens, where logs tell them.
#: attention_tflops: of their attention, see the page.
PUBLISHED: dict[str, dict[str, Any]] = {
    "medium": {"source": "#124", "seconds": 1412.4, "attention_tflops": FLEX_TFLOPS, "ms": (None, None, None, 247.4)},
    "record18": {
        "source": "#188",
        "seconds": 1041.3,
        "attention_tflops": FLASH_TFLOPS,
        "ms": (72.0, 129.0, 189.0, 248.5),
    },
    "f2": {"source": "#252", "seconds": 950.3, "attention_tflops": FLASH_TFLOPS, "ms": (67.0, None, None, 234.7)},
    "f3": {"source": "#261", "seconds": 860.5, "attention_tflops": FLASH_TFLOPS, "ms": (67.0, 121.0, 180.0, 234.5)},
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
    "bigram_rows": Passes("layer", 1, 0),  # one more summand of each mix
    "xsa": Passes("layer", 1, 0),  # `exclusive` reads v beside what the output gate reads
    "key_offset": Passes("named", 1, 1, linear=True),  # `offset_keys`
    "paired_heads": Passes("named", 1, 1, linear=True),  # `interleaved` v; of q, k and o others' kernels do it
    "smear": Passes("step", 1, 1),  # `smeared`
    "dynamic_skips": Passes("step", 10, 3),  # `before_last` 3 to 2, `before_head` 6 to 1, x0 once more in `added`
    "untied_values": Passes("table", 1, 0),  # a row of its own where another layer's row would be read
    "ngram_rows": Passes("step", 5, 3, linear=True),  # both rows looked up, `joined` 2 to 1, the bigram row beside them
    "head_mixing": Passes("step", 7.75, 2.97),  # `mixed_heads`: q, k and v twice, o to o; logits, their mixture
}
TOUCHED = {"embed": 0.611, "bigram": 0.2}  # rows of a table a step exchanges: rehearsed; published (#252)


#: A part of a step of 8-bit products whose count does not tell MLP and projections apart, and one of own kernels.
BOTH_8, CONVERSIONS = "MLP and attention projections, 8-bit products", "conversions to 8 bits"


@dataclass(frozen=True)
class Weights:
    """Parameters by the part of a step that they belong to. values: the value embeddings, which are among `tables`."""

    mlp: int
    projections: int
    head: int
    tables: int
    values: int
    bigram: int


def weights_of(config: Any) -> Weights:
    """Counted in the preset's own model, without memory."""
    import train_gpt

    with torch.device("meta"):
        model = train_gpt.GPT(config)
    counts = dict.fromkeys(("mlp", "projections", "head", "tables", "values", "bigram"), 0)
    for name, p in model.named_parameters():
        if "bigram_embed" in name:
            counts["bigram"] += p.numel()
        elif "embed" in name:
            counts["tables"] += p.numel()
            counts["values"] += p.numel() * name.startswith("value_embeds")
        elif "mlp" in name:
            counts["mlp"] += p.numel()
        elif name.endswith((".qkvo_w", ".qk_w", ".vo_w")) or ("dynamic" in name and name.endswith(("in_w", "out_w"))):
            counts["projections"] += p.numel()
        elif name == "head_w":
            counts["head"] += p.numel()
    return Weights(**counts)


@dataclass(frozen=True)
class Step:
    """A whole step that was rehearsed: of which configuration, its milliseconds by part, its tokens a process."""

    config: Any
    parts: dict[str, float]
    tokens: int


class Projection:
    """Milliseconds of one preset's steps, from a rehearsed step: its own, or another preset's. attention_tflops: of the
    allowed pairs' FLOPs, the rate."""

    def __init__(self, config: Any, step: Step, attention_tflops: float = ATTENTION_TFLOPS):
        self.config, self.parts, self.tokens, self.rehearsed = config, step.parts, step.tokens, step.config
        self.own, self.ref = weights_of(config), weights_of(step.config)
        self.deep = config.num_layers / step.config.num_layers
        self.h100, self.attention_tflops = CEILINGS["h100"], attention_tflops
        self._attention: dict[tuple[int, int], float] = {}

    def attention_ms(self, step: int) -> float:
        """Over the allowed pairs of a step's sequence of drawn documents, at its windows."""
        from bench.step import attention_flops, draw_documents

        c, length = self.config, schedule.sequence_tokens_at(step, self.config)
        key = length, schedule.window_blocks_at(step, c)
        if key not in self._attention:
            drawn = draw_documents(length, c.vocab_size, c.eos_id)
            self._attention[key] = attention_flops(c, [drawn], step) / self.attention_tflops / 1e9
        return self._attention[key]

    def head_ms(self, step: int) -> float:
        """Of all tokens that were rehearsed, over the classes of `step` (`sampled_softmax`), whose rows of the weight
        are taken out and whose gradients are put back."""
        rows = self.own.head / self.config.model_dim
        classes = schedule.sampled_classes_at(step, self.config) or rows
        whole = self.parts["head and loss"] * self.own.head / self.ref.head
        taken = (4 * classes + 2 * rows) * self.config.model_dim * 2 if classes < rows else 0.0
        return whole * classes / rows + taken / self.h100.tb_per_s / EFFICIENCY["torch", False] / 1e9

    def inputs_share(self) -> float:
        """Streams of q, k and v that attention's inputs pass over, of those that were rehearsed: `narrow_qk`."""

        def streams(config: Any) -> float:
            layers = [i for i in range(config.num_layers) if i not in numbers(config.attention_free_layers)]
            return sum(1 + 2 * (narrow_rows(config, i) or config.model_dim) / config.model_dim for i in layers)

        return streams(self.config) / streams(self.rehearsed)

    def streams_ms(self) -> float:
        """Norms, mixes and embeddings of the rehearsed number of tokens, with what techniques add that the rehearsed
        configuration has not."""
        c, passes = self.config, 0.0
        layers = c.num_layers - len(numbers(c.attention_free_layers))
        times = {"layer": layers, "table": c.value_embeddings, "step": 1}
        for field, passed in STREAMS.items():
            value = getattr(c, field)
            often = len(numbers(value)) if passed.per == "named" else times[passed.per]
            new = value not in (False, 0, "") and getattr(self.rehearsed, field) in (False, 0, "")
            passes += passed.count * often if new else 0
        moved = passes * self.tokens * c.model_dim * 2
        own = moved / self.h100.tb_per_s / EFFICIENCY["inductor", False] / 1e9
        return self.parts["norms, mixes, embeddings"] * self.deep + own

    def ngram_bytes(self, step: int) -> float:
        """Of rows of `ngram_rows` that a process fetches and whose gradients it sends back, if no two n-grams of its
        sequence share a row: the most that it can be."""
        here = schedule.batch_tokens_at(step, self.config) / WORLD
        return 2 * 2 * here * self.config.model_dim * 2 * (WORLD - 1) / WORLD if self.config.ngram_rows else 0.0

    def rows_ms(self, step: int) -> float:
        """Rows of `ngram_rows` as they are fetched and updated: three operators that read and write them."""
        moved = 3 * 2 * 2 * schedule.batch_tokens_at(step, self.config) / WORLD * self.config.model_dim * 2
        moved *= self.config.ngram_rows > 0
        return moved / self.h100.tb_per_s / EFFICIENCY["torch", False] / 1e9

    def averages(self, step: int) -> bool:
        """Whether the weights enter their average after a step: `tail_ema`."""
        return self.config.tail_ema > 0 and step >= self.config.num_iterations - self.config.tail_ema_steps

    def updates(self, step: int) -> tuple[float, float]:
        """Of Adam a step: of the tables that `adam_period` is for, once it holds, and of all else."""
        c = self.config
        period = c.adam_period if schedule.stretched(step, c) else c.adam_every
        return 1 / period, 1 / c.adam_every

    def sent_bytes(self, step: int) -> float:
        """That a process sends a step: matrices there and back, head and touched rows as often as they update; rows of
        n-grams, if there are any."""
        c, w = self.config, self.own
        slow, fast = self.updates(step)
        matrix = 4 if (c.matrix_dtype or c.dtype) == "float32" else 2
        head = 2 if c.tie_embeddings_frac else 4
        tables = fast * (w.tables - w.values) + slow * w.values
        tables = 2 * (TOUCHED["embed"] * tables + TOUCHED["bigram"] * slow * w.bigram)
        matrices = 2 * matrix * (w.mlp + w.projections)
        return matrices + 2 * head * w.head * fast + tables + self.ngram_bytes(step)

    @functools.cached_property
    def sent_when_rehearsed(self) -> float:
        """`sent_bytes` of the rehearsed step, which was its configuration's last."""
        rehearsed = Projection(self.rehearsed, Step(self.rehearsed, self.parts, self.tokens))
        return rehearsed.sent_bytes(self.rehearsed.num_iterations - 1)

    def step_ms(self, step: int) -> dict[str, float]:
        """Milliseconds of a step by part; those of the rehearsed step, each in its own proportion."""
        own, ref = self.own, self.ref
        share = schedule.batch_tokens_at(step, self.config) / WORLD / self.tokens
        matrices = (own.mlp + own.projections) / (ref.mlp + ref.projections)
        slow, fast = self.updates(step)
        updated = slow * (own.values + own.bigram) + fast * (own.head + own.tables - own.values)
        times = {
            "MLP": share * own.mlp / ref.mlp,
            "attention projections": share * own.projections / ref.projections,
            BOTH_8: share * matrices,
            CONVERSIONS: share * matrices,
            "attention inputs": share * self.inputs_share(),
            "Muon": matrices,
            "AdamW": updated / (ref.head + ref.tables + ref.bigram),
            "messages not hidden": self.sent_bytes(step) / self.sent_when_rehearsed,
            "gaps between launches": self.deep,
            THE_AVERAGE: float(self.averages(step)),
        }
        counted = {
            "head and loss": self.head_ms(step) * share,
            "attention": self.attention_ms(step),
            ROWS: self.rows_ms(step),
            "norms, mixes, embeddings": self.streams_ms() * share,
        }
        return {part: counted[part] if part in counted else ms * times[part] for part, ms in self.parts.items()}

    def run(self) -> dict[str, Any]:
        """The whole run: seconds, mean ms by size of the batch, ms by part in the mean step and in the last."""
        c = self.config
        of_schedule = (
            schedule.batch_tokens_at,
            schedule.window_blocks_at,
            schedule.sampled_classes_at,
            schedule.stretched,
        )
        kind = lambda step: (*(of(step, c) for of in of_schedule), self.averages(step))  # noqa: E731
        parts, by_size = dict.fromkeys(self.parts, 0.0), {size: [0, 0.0] for size in SIZES}
        for (size, *_), group in itertools.groupby(range(c.num_iterations), kind):
            steps = list(group)
            told = self.step_ms(steps[0])
            kept_of = by_size.setdefault(size, [0, 0.0])
            kept_of[0], kept_of[1] = kept_of[0] + len(steps), kept_of[1] + sum(told.values()) * len(steps)
            parts = {part: parts[part] + ms * len(steps) for part, ms in told.items()}
        means = {size: ms / count for size, (count, ms) in by_size.items() if count}
        last, mean = self.step_ms(c.num_iterations - 1), {part: ms / c.num_iterations for part, ms in parts.items()}
        told = {"steps": c.num_iterations, "seconds": sum(parts.values()) / 1e3, "ms": means}
        return told | {"parts_of_mean_step": mean, "parts_of_last_step": last}


# ---- which step is taken ------------------------------------------------------------------------------------------


def config_of(preset: str) -> Any:
    """A preset's configuration."""
    import train_gpt

    return train_gpt.parse_config([f"--preset={preset}"])


def counted(name: str) -> dict[str, Any]:
    """The rehearsal that is kept by that name. Raises FileNotFoundError with the command that makes it."""
    told = kept(name)
    if told is None:
        raise FileNotFoundError(f"bench/results/rehearsal-{name}.json is missing: see bench/rehearse/page.py")
    return told


def nearest(preset: str, file: Callable[[str], str] = str) -> tuple[str, dict[str, Any]]:
    """(the preset, its rehearsal): of `preset`, else of the one that it comes from by the table of trainer/presets.py,
    and so on: the first of which one is kept. file: a preset's name -> its rehearsal's."""
    from trainer.presets import OWN

    while kept(file(preset)) is None and preset != "medium":
        preset = OWN[preset][0] if preset in OWN else "medium"
    return preset, counted(file(preset))


def published_step(preset: str) -> tuple[Step, str]:
    """(a step of a published run as its own implementation takes it, the preset that was counted): from the count of
    `--kernels=reference`.

    Compiled code does not tell whose a product is: they are shared out by weights, 6 FLOPs a weight and token each.
    Messages are waited for as long as in our count of the same preset."""
    name, told = nearest(preset, lambda name: "reference" if name == "medium" else f"reference-{name}")
    config, parts, loss = config_of(name), dict(told["projection"]["parts"]), json.loads(LOSS.read_text())["result"]
    w, products = weights_of(config), parts.pop("attention projections")
    each = products / (w.mlp + w.projections + w.head)
    cap = "rsqrt" if name == "medium" else "sigmoid"
    ms = {how: loss[cap][how]["gb"] / CEILINGS["h100"].tb_per_s / EFFICIENCY["inductor", False] for how in loss[cap]}
    head = each * w.head + ms["whole"]
    if config_of(preset).products != "bf16":
        head = our_step(preset)[0].parts["head and loss"]
    parts |= {"MLP": each * w.mlp, "attention projections": each * w.projections, "head and loss": head}
    parts["norms, mixes, embeddings"] -= ms["chunked"]
    parts["messages not hidden"] = our_step(name)[0].parts["messages not hidden"]
    return Step(config, parts, told["tokens"]), name


def our_step(preset: str) -> tuple[Step, str]:
    """(a step of ours for a preset, the preset that was rehearsed), with the products in 8 bits that `preset` has."""
    name, told = nearest(preset)
    config, rehearsed, parts = config_of(preset), config_of(name), dict(told["projection"]["parts"])
    if told["products"] != rehearsed.products:
        found = f"--products={told['products']}, and the preset now has {rehearsed.products}"
        raise ValueError(f"bench/results/rehearsal-{name}.json was counted with {found}: rehearse it again")
    if config.products != rehearsed.products:
        parts = in_8_bits(parts, rehearsed, config.products)
    return Step(rehearsed, parts, told["tokens"]), name


def in_8_bits(parts: dict[str, float], rehearsed: Any, products: str) -> dict[str, float]:
    """`parts` of a step of the configuration `rehearsed`, with what `products` in 8 bits change in them as it was
    counted on `medium`: between its rehearsals in bfloat16 and in 8 bits throughout. Of the MLP's and the projections'
    change, `fp8_mlp` has as much as the MLP has of their weights."""
    from trainer.products import NAMES

    whole, plain = counted("medium-fp8")["projection"]["parts"], counted("medium")["projection"]["parts"]
    w = weights_of(config_of("medium"))
    of_mlp = w.mlp / (w.mlp + w.projections)

    def share(name: str, part: str) -> float:
        """Of the whole change of a part, what `--products={name}` has."""
        if part == "head and loss":
            return float(name != "bf16")
        return {"bf16": 0.0, "fp8_head": 0.0, "fp8_mlp": of_mlp, "fp8": 1.0}[name]

    if products not in NAMES:
        raise ValueError(f"products={products} is none of {', '.join(NAMES)}")
    changed = {}
    for part in [*parts, *(part for part in whole if part not in parts)]:
        more = share(products, part) - share(rehearsed.products, part)
        changed[part] = parts.get(part, 0.0) + more * (whole.get(part, 0.0) - plain.get(part, 0.0))
    return changed


def project(presets: Sequence[str]) -> dict[str, Any]:
    """The published runs by their implementation, then they and `presets` by ours; one factor, the reference run's."""
    published: dict[str, Any] = {}
    for name, told in PUBLISHED.items():
        step, counted_of = published_step(name)
        run = Projection(config_of(name), step, told["attention_tflops"]).run()
        published[name] = run | {"published_seconds": told["seconds"], "rehearsed": counted_of}
    factor = PUBLISHED["medium"]["seconds"] / published["medium"]["seconds"]
    for name, run in published.items():
        run["calibrated_seconds"] = run["seconds"] * factor
        run["error"] = run["calibrated_seconds"] / run["published_seconds"] - 1
        slower = (
            PUBLISHED[name]["attention_tflops"] / FLEX_TFLOPS - 1
        )  # what its attention takes at FlexAttention's rate
        more = run["parts_of_mean_step"]["attention"] * run["steps"] / 1e3 * slower * factor
        run["error_at_flex"] = (run["calibrated_seconds"] + more) / run["published_seconds"] - 1
    ours: dict[str, Any] = {}
    for name in dict.fromkeys((*PUBLISHED, *presets)):
        step, rehearsed = our_step(name)
        ours[name] = Projection(config_of(name), step).run() | {"rehearsed": rehearsed}
        seconds = ours[name]["seconds"] * factor
        ours[name] |= {"calibrated_seconds": seconds, "steps_within_goal": int(GOAL_S / seconds * ours[name]["steps"])}
    told = {"schema": 2, "name": "projection", "calibration": factor, "goal_s": GOAL_S}
    told |= {"published": published, "ours": ours, "proxies": effects.proxies()}
    if "frontier" in ours:
        told["levers"] = levers(config_of("frontier"), ours["frontier"], factor)
    return told


# ---- the page -------------------------------------------------------------------------------------------------------


def by_part(runs: dict[str, Any], key: str) -> str:
    """Milliseconds by part, a column a run."""
    parts = dict.fromkeys(part for run in runs.values() for part in run[key])
    rows: list[dict[str, Any]] = [
        {"part": part} | {name: run[key].get(part, 0.0) for name, run in runs.items()} for part in parts
    ]
    rows.append({"part": "a step"} | {name: sum(run[key].values()) for name, run in runs.items()})
    return table(rows)


def by_size(runs: dict[str, Any], factor: float, measured: bool) -> str:
    """Calibrated milliseconds by tokens of the step, a row a run; with the published ones behind, if `measured`."""
    rows = []
    for name, run in runs.items():
        means = [run["ms"].get(str(size), run["ms"].get(size)) for size in SIZES]
        published = PUBLISHED[name]["ms"] if measured else [None] * 4
        cells = [_pair(m and m * factor, p) for m, p in zip(means, published)]
        rows.append({"preset": name} | {f"{size:,}": cell for size, cell in zip(SIZES, cells)})
    return table(rows)


def gluon_ms(config: Any, plain_ms: float) -> tuple[float, float]:
    """(the mean step's attention by the kernels of `--kernels=gluon`, what they do in TFLOP/s): the plain kernels' time
    by their ratio of counted cycles and slots. No GPU has run them."""
    names = [kernel for (_, name), kernels in slots.PASSES.items() if name == "gluon" for kernel in kernels]
    ratio = over_plain(config, 1, names)
    return plain_ms * ratio, ATTENTION_TFLOPS / ratio


def levers(config: Any, run: dict[str, Any], factor: float) -> dict[str, float]:
    """What a run of ours would lose of its calibrated seconds with kernels that are not written or that no GPU has run:
    which, in words, and the seconds."""
    mean, seconds = run["parts_of_mean_step"], run["steps"] / 1e3 * factor
    memory = "norms, mixes, embeddings", "attention inputs"
    least = Projection(config, our_step("medium")[0]).run()["parts_of_mean_step"]
    attention, tflops = gluon_ms(config, mean["attention"])
    found = {
        f"attention by `--kernels=gluon`, {tflops:.0f} TFLOP/s by its counted cycles": mean["attention"] - attention,
        "norms, mixes and attention's inputs in as few kernels as `medium` has, and one for each technique": sum(
            mean.get(part, 0.0) - least[part] for part in memory
        ),
    }
    return {words: max(ms, 0.0) * seconds for words, ms in found.items()}


def argument(told: dict[str, Any]) -> str:
    """What must hold for the goal, in words, of `frontier`."""
    run, goal = told["ours"]["frontier"], told["goal_s"]

    def needed(seconds: float) -> str:
        share = goal / seconds
        if share >= 1:
            return f"{seconds:.0f} s at f3's steps: within {goal} s whatever its fields save."
        said = f"{seconds:.0f} s at f3's steps, of which {1 - share:.1%} must be saved."
        for of in ("least", "most"):
            scale = effects.scale_needed(share, of)
            held = "not even twice all of them are enough" if scale is None else f"{scale:.0%} of them must hold"
            said += f" Of the {of} gains, with costs at their worse end: {held}."
        return said

    rows, saved = [f"As counted today: {needed(run['calibrated_seconds'])}"], 0.0
    for words, seconds in told["levers"].items():
        saved += seconds
        also = "With" if saved == seconds else "And with"
        rows.append(f"{also} {words}: {needed(run['calibrated_seconds'] - saved)}")
    return "\n".join(textwrap.fill(f"- {row}", 120, subsequent_indent="  ") for row in rows)


def page(told: dict[str, Any]) -> str:
    """docs/projection.md from the file."""
    factor, published, ours = told["calibration"], told["published"], told["ours"]
    rows = [
        {
            "run": name,
            "source": PUBLISHED[name]["source"],
            "steps": run["steps"],
            "projected s": f"{run['seconds']:.0f}",
            "calibrated s": f"{run['calibrated_seconds']:.0f}",
            "published s": f"{run['published_seconds']:.1f}",
            "counted": _whose(run, name),
            "error": f"{run['error']:+.1%}",
            "at FlexAttention's rate": f"{run['error_at_flex']:+.1%}",
        }
        for name, run in published.items()
    ]
    own = [
        {
            "preset": name,
            "steps": run["steps"],
            "projected s": f"{run['seconds']:.0f}",
            "calibrated s": f"{run['calibrated_seconds']:.0f}",
            f"steps in {told['goal_s']} s": run["steps_within_goal"],
            "counted": _whose(run, name),
        }
        for name, run in ours.items()
    ]
    errors = [run["error"] for name, run in published.items() if name != "medium"]
    frontier = ours.get("frontier")
    argued = table(effects.argued(frontier["steps"], frontier["calibrated_seconds"])) if frontier else "Not projected."
    shown = [
        {
            "field": one.fields,
            "least": _share(one.least, frontier),
            "most": _share(one.most, frontier),
            "published": one.published,
            "proxies": "; ".join(map(effects.nats, told["proxies"].get(one.fields, []))) or "none",
        }
        for one in effects.EFFECTS
    ]
    return TEXT.format(
        what="\n\n".join(__doc__.split("\n\n")[2:4]),
        calibration=__doc__.split("\n\n")[4].strip(),
        factor=factor,
        published=table(rows),
        errors=f"{min(errors):+.1%} to {max(errors):+.1%}",
        flex=FLEX_TFLOPS,
        flash=FLASH_TFLOPS,
        ours=table(own),
        our_rate=ATTENTION_TFLOPS,
        published_sizes=by_size(published, factor, True),
        our_sizes=by_size(ours, factor, False),
        published_parts=by_part(published, "parts_of_last_step"),
        our_parts=by_part(ours, "parts_of_last_step"),
        mean_parts=by_part(ours, "parts_of_mean_step"),
        effects=table(shown),
        argued=argued,
        needed=argument(told) if frontier else "Not projected.",
        low=MN_RANGE[0],
        high=MN_RANGE[1],
        goal=told["goal_s"],
    )


def _whose(run: dict[str, Any], name: str) -> str:
    return "itself" if run["rehearsed"] == name else f"`{run['rehearsed']}`"


def _share(share: float, run: dict[str, Any] | None) -> str:
    """A share of the steps, and what it is of a run's calibrated seconds."""
    return f"{share:+.1%}" + (f" ({share * run['calibrated_seconds']:+.0f} s)" if run else "")


def _pair(projected: float | None, published: float | None) -> str:
    if projected is None:
        return ""
    return f"{projected:.0f}" + (f" ({published:g})" if published is not None else "")


TEXT = """# Seconds of a run on 8 H100: a projection

Generated by `python -m bench.project`. **Nothing here is measured by us**, no figure of it belongs into a table of
results, and whether a preset reaches 2.92 in its steps is not a question that it answers: steps are the presets' own.

{what}

{calibration}

## The published runs, by their own implementation: predicted against published

The factor is {factor:.3f}, from the first line alone. Errors of the others: {errors}.

{published}

Milliseconds a step by its tokens, calibrated, and in brackets what the logs tell (differences of cumulative times):

{published_sizes}

Parts of the last step, ms, not calibrated:

{published_parts}

Assumed, beside the ceilings and efficiencies of bench/rehearse/project.py:

- Attention: {flex:.0f} TFLOP/s of the allowed pairs for `medium`, FlexAttention's, derived from the reference run's
  step; from record 18 on {flash:.0f}, FlashAttention 3 (#118, #188), whose rate on documents this short nobody has
  published: it is assumed from its paper's, and the last column has the error if it were no faster than FlexAttention.
- Products are 6 FLOPs a weight and token at the rate of the library's: the counted sum, which is that of all three
  parts, is shared out by weights. Their Muon and Adam are those that our trainer has with plain torch, and
  they wait for messages as long as it does.
- The loss: all logits at once in 16 bits (`medium`, `record18`); f2 and f3 have their head in 8 bits and a fused loss,
  which are taken from our count of the same preset. Not counted on their side: kernels of their own beyond these.
- What changes from run to run: `record18` has its techniques, a layer of attention more, and float32 matrices on the
  wire; `f2` the bigram table, 16-bit matrices and the 8-bit head; `f3` the dynamic skips. Bytes of generated kernels
  are upper bounds where they read a slice of a tensor or rows of a table, on both sides.

## Ours, by the same factor

{ours}

"Counted" names the preset whose whole step was rehearsed. Attention at {our_rate:.0f} TFLOP/s of the allowed pairs.
Milliseconds a step by its tokens, calibrated:

{our_sizes}

Parts of the mean step of the run, ms, not calibrated:

{mean_parts}

Parts of the last step, likewise:

{our_parts}

## How many steps `frontier` may need: an argument, not a projection

f3 reaches 2.917 in 4150 steps (n 6, #261). `frontier` keeps that number until a run has shown another. What it adds was
published elsewhere, each time on a weaker baseline than this one: shares of the steps saved (and of the seconds above),
below zero where a field costs loss for the sake of time. A loss becomes steps at {low} to {high} mn (0.001 nats) for
1 % of them. The proxies are small models on a CPU (docs/evidence.md): nats at equal steps, below zero helps; their
intervals hold for all treatments of a study together. What they do not decide, they do not refute: a run of theirs
differs from seed to seed by more than most of the published effects.

{effects}

Gains were each found on another baseline and overlap, so all of them at once is the most that they can be; half of them
is a guess of what remains. Costs are never halved. Shares multiply.

{argued}

What {goal} s need, at the calibrated seconds above, and then with kernels that no GPU has run or that are not written:

{needed}

## Not in it

NorMuon's second pass over its matrices; the average's pass over the last 300 steps; sequences with more different
targets than sampled classes; memory limits, data loading, and everything a GPU must still confirm (docs/rehearsal.md).
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
