"""How fast attention is: `python -m bench.attention --tokens SHARD`.

On a GPU: the Triton kernels, forward and backward, on T = 65,536 tokens with real document lengths, 8 heads of 128
in bfloat16, at windows of 128, 896, 1664 and 3456 tokens, in one run with FlexAttention compiled, with
FlashAttention where it is installed (its window is token-exact, so its pairs are counted apart), and with
scaled_dot_product_attention at a T where its dense mask fits. TFLOP/s count exactly the allowed pairs: 4 Dh FLOPs a
pair and head forward, 10 Dh backward. The machine code that ran is noted in kernels/proof/measured.json.
`--tune` times kernels.attention.CANDIDATES instead, one kernel at a time.

On a CPU: the banded path's time against T x window, as JSON and as a picture, and a line that says what was
not measured.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import RESULTS, compare, device_name, measure, summary, table, write_result
from data.shards import open_shard
from kernels import attention as module
from kernels.attention import AttentionPlan, attention, attention_plan
from kernels.runtime import device_kind
from trainer.options import command, setting

EOS = 50256
BLOCK = 128
WINDOWS_TOKENS = (128, 896, 1664, 3456)
TUNE_WINDOWS_TOKENS = (3456, 896)
SCALE = 0.12


def allowed_pair_count(plan: AttentionPlan) -> int:
    """Number of (query, key) pairs that the plan allows, in all sequences."""
    position = torch.arange(plan.first_key_BT.shape[1], device=plan.first_key_BT.device)
    return int((position - plan.first_key_BT + 1).sum())


def pass_flops(pairs: int, heads: int, width: int) -> dict[str, int]:
    """FLOPs of the products that the definition needs: two a pair forward, five backward (logits once more)."""
    return {"forward": 4 * pairs * heads * width, "backward": 10 * pairs * heads * width}


def read_tokens(path: str | None, length: int) -> torch.Tensor:
    """The first `length` tokens of a shard; without one, documents of random length (median 400, mean 690)."""
    if path:
        shard = open_shard(path)
        if len(shard) < length:
            raise SystemExit(f"--tokens {Path(path).name} has {len(shard)} tokens, {length} are needed")
        return torch.from_numpy(shard[:length].astype("int32"))
    random = torch.Generator().manual_seed(0)
    tokens = torch.zeros(length, dtype=torch.int32)
    lengths = torch.exp(torch.randn(length // 100, generator=random) * 1.04 + 6.0).long().clamp(min=2)
    starts = lengths.cumsum(0) - lengths[0]
    tokens[starts[starts < length]] = EOS
    return tokens


def draw(length: int, heads: int, width: int, dtype: torch.dtype, device: torch.device | str) -> list[torch.Tensor]:
    """q, k, v and the gradient at o, (1, T, H, Dh), standard normal."""
    random = torch.Generator(device=device).manual_seed(0)
    return [torch.randn(1, length, heads, width, generator=random, device=device).to(dtype) for _ in range(4)]


def passes(run: Callable[..., torch.Tensor], q, k, v, do) -> dict[str, Callable[[], object]]:
    """Functions that do one forward and one backward pass of o = run(q, k, v)."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = run(*leaves)
    do = do.reshape(o.shape)
    return {"forward": lambda: run(*leaves), "backward": lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)}


# ---- on a GPU ----------------------------------------------------------------------------------------------


def contestants(plan: AttentionPlan) -> dict[str, Callable]:
    """The implementations of exactly this plan's mask, which is made beforehand, as layers share it."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled, mask = torch.compile(flex_attention), module.flex_mask(plan)

    def flex(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, scale=SCALE).transpose(1, 2)

    own = module.FORWARDS if device_kind() == "sm_90" else ("triton",)
    return {n: functools.partial(attention, plan=plan, scale=SCALE, impl=n) for n in own} | {"flex": flex}


def flash_contestant(tokens: torch.Tensor, window_tokens: int) -> tuple[Callable, AttentionPlan] | None:
    """FlashAttention over packed documents with a token-exact window, and that window's plan; None if missing."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    plan = attention_plan(tokens, eos_id=EOS, window_tokens=window_tokens)
    starts = torch.cat([tokens.new_zeros(1), (tokens == EOS).nonzero().flatten().to(tokens.dtype)]).unique()
    edges = torch.cat([starts, starts.new_tensor([len(tokens)])]).int()
    longest = int(edges.diff().max())

    def run(q, k, v):
        return flash_attn_varlen_func(
            q[0],
            k[0],
            v[0],
            edges,
            edges,
            longest,
            longest,
            softmax_scale=SCALE,
            causal=True,
            window_size=(window_tokens - 1, 0),
        )

    return run, plan


def sdpa_contestant(plan: AttentionPlan) -> Callable:
    """scaled_dot_product_attention with the plan's dense mask."""
    mask = module.allowed_pairs(plan)[:, None]

    def run(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        o = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=SCALE)
        return o.transpose(1, 2)

    return run


def timed_rows(name_to_run: dict[str, Callable], inputs, flops: dict[str, int], repeats: int, **about) -> list[dict]:
    """One row an implementation and pass, all implementations timed in turn."""
    both = {name: passes(run, *inputs) for name, run in name_to_run.items()}
    rows = []
    for step in ("forward", "backward"):
        times = compare({name: both[name][step] for name in both}, repeats)
        for name, stats in times.items():
            tflops = flops[step] / stats["median_ms"] / 1e9
            rows.append({**about, "impl": name, "pass": step, "tflops": tflops, **stats})
    return rows


def on_gpu(tokens: torch.Tensor, heads: int, width: int, repeats: int, sdpa_length: int) -> list[dict]:
    """The comparison at every window, and the dense one at `sdpa_length` tokens."""
    from kernels.proof import machine_code, pretend, slots

    inputs = draw(len(tokens), heads, width, torch.bfloat16, tokens.device)
    rows, ran = [], {}
    for window in WINDOWS_TOKENS:
        about = {"T": len(tokens), "window": window}
        plan = attention_plan(tokens, eos_id=EOS, window_blocks=window // BLOCK)
        flops = pass_flops(allowed_pair_count(plan), heads, width)
        with pretend.recorded(device_kind()) as launched:
            new = timed_rows(contestants(plan), inputs, flops, repeats, **about)
        rows += new
        for code in {c.kernel: c for c in launched if c.kernel.startswith("_attention")}.values():
            passes = (name for (_, name), group in slots.PASSES.items() if code.kernel in group)
            impl = next(passes, "gluon_one_pass")  # two kernels around that one are in no list
            figures = {f"{r['pass']}_ms_at_window_{window}": round(r["median_ms"], 4) for r in new if r["impl"] == impl}
            if "cubin" in code.asm:
                entry = ran.setdefault(
                    machine_code.text_hash(code.asm["cubin"]), {"kernel": code.kernel, "device": device_name()}
                )
                entry.update(figures)
        if flash := flash_contestant(tokens, window):
            flops = pass_flops(allowed_pair_count(flash[1]), heads, width)
            rows += timed_rows({"flash (token window)": flash[0]}, inputs, flops, repeats, **about)
    for window in WINDOWS_TOKENS:
        plan = attention_plan(tokens[:sdpa_length], eos_id=EOS, window_blocks=window // BLOCK)
        flops = pass_flops(allowed_pair_count(plan), heads, width)
        runs = {"triton": contestants(plan)["triton"], "sdpa": sdpa_contestant(plan)}
        rows += timed_rows(runs, [x[:, :sdpa_length] for x in inputs], flops, repeats, T=sdpa_length, window=window)
    machine_code.record_measured(ran)
    return rows


def tune(tokens: torch.Tensor, heads: int, width: int, repeats: int) -> list[dict]:
    """Time every candidate tile of every kernel, with and without descriptors, at a wide and a short window."""
    q, k, v, do = draw(len(tokens), heads, width, torch.bfloat16, tokens.device)
    rows = []
    for window in TUNE_WINDOWS_TOKENS:
        plan = attention_plan(tokens, eos_id=EOS, window_blocks=window // BLOCK)
        flops = pass_flops(allowed_pair_count(plan), heads, width)
        o, lse = module.launch_forward(q, k, v, plan, SCALE)
        for kernel, shapes in module.CANDIDATES.items():
            for shape in shapes:
                for descriptors in (True, False):
                    tile = module.Tile(*shape, descriptors=descriptors)
                    if kernel == "forward":
                        run = functools.partial(module.launch_forward, q, k, v, plan, SCALE, tile)
                    else:  # both backward kernels run; the other one keeps its tile, so differences are this one's
                        run = functools.partial(
                            module.launch_backward, do, q, k, v, o, lse, plan, SCALE, **{f"tile_{kernel}": tile}
                        )
                    row = {"window": window, "kernel": kernel, "tile": str(tuple(tile))}
                    try:
                        stats = measure(run, repeats=repeats)
                    except Exception as error:  # a tile that does not fit is a finding, not a failure
                        rows.append({**row, "median_ms": None, "error": type(error).__name__})
                        continue
                    step = "forward" if kernel == "forward" else "backward"
                    rows.append(
                        {
                            **row,
                            "median_ms": stats["median_ms"],
                            "iqr_ms": stats["iqr_ms"],
                            "tflops": flops[step] / stats["median_ms"] / 1e9,
                        }
                    )
    return sorted(rows, key=lambda r: (-r["window"], r["kernel"], r["median_ms"] or float("inf")))


# ---- on a CPU ----------------------------------------------------------------------------------------------


def processor_times(run: Callable[[], object], repeats: int) -> dict:
    """Processor time of `run()` on one thread, after one untimed call: waiting for a busy core does not count."""
    run()
    times_ms = []
    for _ in range(repeats):
        started = time.thread_time()
        run()
        times_ms.append((time.thread_time() - started) * 1e3)
    return summary(times_ms)


def on_cpu(heads: int, width: int, repeats: int, lengths: tuple[int, ...], blocks: tuple[int, ...]) -> list[dict]:
    """Forward and backward time of the banded path over T and window, one document; the quadratic reference too."""
    rows = []
    for length in lengths:
        inputs = draw(length, heads, width, torch.float32, "cpu")
        runs = {("banded", w): attention_plan(length=length, window_blocks=w) for w in blocks}
        if length <= 4096:
            runs["reference", blocks[0]] = attention_plan(length=length, window_blocks=blocks[0])
        for (impl, window), plan in runs.items():
            leaves = [x.detach().requires_grad_() for x in inputs[:3]]

            def step(plan=plan, impl=impl, leaves=leaves, do=inputs[3]):
                # in one thread: autograd runs a CPU's backward pass on the caller's
                torch.autograd.grad(attention(*leaves, plan, scale=SCALE, impl=impl), leaves, do)

            stats = processor_times(step, repeats)
            rows.append(
                {
                    "impl": impl,
                    "T": length,
                    "window_blocks": window,
                    "pairs": allowed_pair_count(plan),
                    "T_x_window": length * window * BLOCK,
                    **stats,
                }
            )
    return rows


def fit(rows: list[dict]) -> dict:
    """Least squares, relative errors: time = fixed + slope * (T x window / 1e6), over the banded rows.

    Times are medians of processor time."""
    banded = [r for r in rows if r["impl"] == "banded"]
    x = torch.tensor([[1.0, r["T_x_window"] / 1e6] for r in banded], dtype=torch.float64)
    y = torch.tensor([r["median_ms"] for r in banded], dtype=torch.float64)
    solution = torch.linalg.lstsq(x / y[:, None], torch.ones(len(y), 1, dtype=torch.float64)).solution.flatten()
    relative = (x @ solution / y - 1).abs()
    logs = torch.stack([x[:, 1].log(), y.log()])
    return {
        "fixed_ms": solution[0].item(),
        "ms_per_million_T_x_window": solution[1].item(),
        "median_relative_error": relative.median().item(),
        "correlation_of_logs": logs.corrcoef()[0, 1].item(),
    }


def picture(rows: list[dict], path: Path) -> None:
    """Time against T x window, one line a T; proportional cost is a slope of one on these axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), constrained_layout=True)
    for length in sorted({r["T"] for r in rows}):
        banded = [r for r in rows if r["T"] == length and r["impl"] == "banded"]
        line = sorted((r["T_x_window"], r["median_ms"]) for r in banded)
        axes.plot(*zip(*line), marker="o", label=f"banded, T = {length:,}")
    dense = sorted((r["T_x_window"], r["median_ms"], r["T"]) for r in rows if r["impl"] == "reference")
    axes.plot(
        [x for x, _, _ in dense],
        [y for _, y, _ in dense],
        "k--",
        marker="x",
        label="quadratic reference, window of one block",
    )
    xs = sorted(r["T_x_window"] for r in rows if r["impl"] == "banded")
    middle = fit(rows)["ms_per_million_T_x_window"] / 1e6
    axes.plot(xs, [middle * x for x in xs], color="0.7", zorder=0, label="in proportion to T x window")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="T x window (pairs before the diagonal is cut)",
        ylabel="forward + backward, processor time (ms)",
        title="Attention on one core: T x window, not T x T",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


@dataclass(frozen=True)
class Options:
    """What is timed."""

    tokens: str | None = setting(None, "file", "token shard whose document lengths to use (on a GPU)")
    length: int = setting(65536, "tokens", "T on a GPU", at_least=1)
    sdpa_length: int = setting(8192, "tokens", "T of the dense comparison on a GPU", at_least=1)
    heads: int | None = setting(None, "heads", "of queries and keys (8 on a GPU, 4 on a CPU)", at_least=1)
    width: int | None = setting(None, "channels", "of a head (128 on a GPU, 32 on a CPU)", at_least=1)
    repeats: int | None = setting(None, "calls", "timed of each (30 on a GPU, 7 on a CPU)", at_least=1)
    cpu_lengths: str = setting("1024,2048,4096,8192,16384", "tokens", "lengths on a CPU, with commas")
    cpu_windows: str = setting("1,2,4,8,16", "blocks of 128 tokens", "windows on a CPU, with commas")
    tune: bool = setting(False, "flag", "time the candidate tiles (on a GPU)")
    out: Path = setting(RESULTS, "folder", "of the results")


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, measure what this machine can, print and keep it."""
    _, options = command(__doc__, argv, Options)
    if torch.cuda.is_available():
        tokens = read_tokens(options.tokens, options.length).cuda()
        shape = (options.heads or 8, options.width or 128, options.repeats or 30)
        rows = tune(tokens, *shape) if options.tune else on_gpu(tokens, *shape, options.sdpa_length)
        print(
            table(
                rows,
                ("window", "kernel", "tile", "median_ms", "iqr_ms", "tflops")
                if options.tune
                else ("T", "window", "pass", "impl", "median_ms", "iqr_ms", "tflops", "ratio"),
            )
        )
        written = write_result(
            "attention-tiles" if options.tune else "attention",
            {"tokens": Path(options.tokens).name if options.tokens else "random lengths", "rows": rows},
            folder=options.out,
        )
        print(f"written: {written.name}")
        return 0
    print(
        "not measured: no GPU (Triton kernels, FlexAttention, FlashAttention and SDPA at T = "
        f"{options.length:,}, windows {', '.join(map(str, WINDOWS_TOKENS))})"
    )
    if options.tune:
        print("not measured: no GPU (candidate tiles)")
        return 0
    lengths, windows = (tuple(map(int, text.split(","))) for text in (options.cpu_lengths, options.cpu_windows))
    torch.set_num_threads(1)
    rows = on_cpu(options.heads or 4, options.width or 32, options.repeats or 7, lengths, windows)
    line = fit(rows)
    print(table(rows, ("impl", "T", "window_blocks", "T_x_window", "median_ms", "iqr_ms")))
    slope = line["ms_per_million_T_x_window"]
    print(
        f"time = {line['fixed_ms']:.2f} ms + {slope:.2f} ms a million of T x window; "
        f"correlation of the logarithms {line['correlation_of_logs']:.4f}"
    )
    result = {"gpu": "not measured: no GPU", "fit": line, "rows": rows}
    written = write_result("attention", result, folder=options.out)
    drawn = options.out / f"attention-{device_name()}.png"
    picture(rows, drawn)
    print(f"written: {written.name}, {drawn.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
