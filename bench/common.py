"""Measuring: time functions, compare them fairly, describe the machine, and keep results as JSON.

    from bench.common import measure, compare, write_result
    stats = measure(lambda: kernel(x), repeats=50)            # {"median_ms": ..., "min_ms": ..., ...}
    both = compare({"eager": f, "triton": g}, repeats=50)      # interleaved; ratios against the first name
    write_result("attention", {"shapes": ..., "times": both})  # bench/results/attention-<device>.json

On a CUDA or ROCm device the clock is the device's own (events around each call, the L2 cache overwritten
before it); elsewhere it is the wall clock. Nothing here names the host or its paths.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from data.paths import write_text
from trainer.program import cpu_name, now

REPO = Path(__file__).resolve().parent.parent
RESULTS = Path(os.environ.get("BENCH_RESULTS") or REPO / "bench" / "results")  # bench.gpu sends its stages elsewhere
SCHEMA = 1


# ------------------------------------------------------------------------------------------------------------
# The machine


def _first_match(path: str, pattern: str) -> str | None:
    """First group of `pattern` in the text file `path`, or None if there is no such file or no match."""
    try:
        found = re.search(pattern, Path(path).read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return found.group(1).strip() if found else None


def _answer(*command: str) -> str | None:
    """What a small system command prints, or None if it is absent, fails or takes more than 10 s."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def usable_cores() -> int:
    """Number of logical cores that this process may run on (its affinity and its cgroup's quota count)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _first_match("/sys/fs/cgroup/cpu.max", r"^(\d+) \d+$")
    period = _first_match("/sys/fs/cgroup/cpu.max", r"^\d+ (\d+)$")
    if quota and period:
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def _memory_gib() -> float | None:
    """Physical memory in GiB."""
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpu_list() -> list[dict]:
    """Name, memory and capability of every visible GPU, through torch if it is installed."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "memory_mib": properties.total_memory // 2**20,
                "capability": f"{properties.major}.{properties.minor}",
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return gpus


def _version(package: str) -> str | None:
    """Installed version of a distribution without importing it, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def environment() -> dict:
    """What a timing depends on: processor, memory, GPUs, driver, versions. No host name, no path."""
    gpus = _gpu_list()
    driver = None
    cuda = None
    threads = None
    if gpus:
        driver = _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = driver.splitlines()[0] if driver else None
    if _version("torch"):
        import torch

        cuda = torch.version.cuda or getattr(torch.version, "hip", None)
        threads = torch.get_num_threads()
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "torch_threads": threads,
        "memory_gib": _memory_gib(),
        "gpus": gpus,
        "driver": driver,
        "cuda": cuda,
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": _version("torch"),
        "triton": _version("triton"),
        "numpy": _version("numpy"),
    }


def device_name(env: Mapping | None = None) -> str:
    """The machine's device for file names: 'cpu', or the GPU's name as a slug ('nvidia-h100-80gb-hbm3')."""
    gpus = (env or environment())["gpus"]
    if not gpus:
        return "cpu"
    slug = re.sub(r"[^a-z0-9]+", "-", gpus[0]["name"].lower()).strip("-")
    return slug if len(gpus) == 1 else f"{len(gpus)}x-{slug}"


# ------------------------------------------------------------------------------------------------------------
# The clock


def summary(times_ms: Sequence[float]) -> dict:
    """Order statistics of times in ms: median_ms, min_ms, max_ms, iqr_ms (width of the middle half), n."""
    if not times_ms:
        raise ValueError("no times to summarise: measure with repeats >= 1")
    if len(times_ms) > 1:
        quartiles = statistics.quantiles(times_ms, n=4, method="inclusive")
        iqr = quartiles[2] - quartiles[0]
    else:
        iqr = 0.0
    return {
        "median_ms": statistics.median(times_ms),
        "min_ms": min(times_ms),
        "max_ms": max(times_ms),
        "iqr_ms": iqr,
        "n": len(times_ms),
    }


class _WallClock:
    """Wall time of one call, with `sync` called before the clock starts and before it stops."""

    def __init__(self, sync: Callable[[], object] | None):
        self.sync = sync or (lambda: None)

    def time(self, fn: Callable[[], object]) -> Callable[[], float]:
        """Run `fn` once; the returned function gives the time in ms."""
        self.sync()
        start = time.perf_counter()
        fn()
        self.sync()
        elapsed_ms = (time.perf_counter() - start) * 1e3
        return lambda: elapsed_ms


class _EventClock:
    """Device time of one call between two events; the L2 cache is overwritten first, none is warm."""

    def __init__(self, flush: bool):
        import torch

        self.torch = torch
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        size_bytes = 2 * getattr(properties, "L2_cache_size", 2**26) or 2**27
        self.scratch = torch.empty(size_bytes, dtype=torch.int8, device="cuda") if flush else None

    def time(self, fn: Callable[[], object]) -> Callable[[], float]:
        """Queue `fn` once; the returned function waits for it and gives the time in ms."""
        if self.scratch is not None:
            self.scratch.zero_()
        start = self.torch.cuda.Event(enable_timing=True)
        end = self.torch.cuda.Event(enable_timing=True)
        start.record()
        fn()
        end.record()

        def read() -> float:
            end.synchronize()
            return start.elapsed_time(end)

        return read


def _clock(sync: Callable[[], object] | bool | None, flush: bool) -> _WallClock | _EventClock:
    """The clock for `sync`: None picks device events where a GPU is visible, anything else the wall clock."""
    if sync is None and "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            return _EventClock(flush)
    if sync is True:
        raise ValueError("sync: give a function that waits for the device, None (automatic) or False (none)")
    return _WallClock(sync if callable(sync) else None)


def measure(
    fn: Callable[[], object],
    *,
    repeats: int = 20,
    warmup: int = 3,
    sync: Callable[[], object] | bool | None = None,
    flush: bool = True,
    keep_raw: bool = False,
) -> dict:
    """Time `fn()` `repeats` times after `warmup` untimed calls.

    Returns median_ms, min_ms, max_ms, iqr_ms and n (with `keep_raw` also raw_ms, the times in order).
    sync: None = device events on a GPU, wall clock elsewhere; a callable = wall clock, called at both ends;
    False = wall clock alone.
    flush: overwrite the L2 cache before each call (device clock only).
    """
    return compare({"fn": fn}, repeats, warmup=warmup, sync=sync, flush=flush, keep_raw=keep_raw)["fn"]


def compare(
    fns: Mapping[str, Callable[[], object]],
    repeats: int = 20,
    *,
    warmup: int = 3,
    sync: Callable[[], object] | bool | None = None,
    flush: bool = True,
    keep_raw: bool = False,
) -> dict:
    """Time several functions in turn, so that a slow spell of the machine hits all of them alike.

    Each round calls every function once, starting one further along each time. Returns {name: measure's
    result plus "ratio" and "ratio_quartiles"}: time of this function over the time of the first one, the
    median and middle half over rounds (1.0 for the first; below 1 is faster).
    """
    if not fns:
        raise ValueError("compare needs at least one function")
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be >= 1 and warmup >= 0, not {repeats} and {warmup}")
    clock = _clock(sync, flush)
    names = list(fns)
    for _ in range(warmup):
        for name in names:
            clock.time(fns[name])()
    reads: dict[str, list[Callable[[], float]]] = {name: [] for name in names}
    for turn in range(repeats):
        offset = turn % len(names)
        for name in names[offset:] + names[:offset]:
            reads[name].append(clock.time(fns[name]))
    times = {name: [read() for read in reads[name]] for name in names}
    results = {}
    for name in names:
        results[name] = summary(times[name])
        if keep_raw:
            results[name]["raw_ms"] = times[name]
        if len(names) > 1:
            results[name].update(_ratios(times[name], times[names[0]]))
    return results


def _ratios(times_ms: Sequence[float], baseline_ms: Sequence[float]) -> dict:
    """Median and quartiles over rounds of time / baseline time of the same round."""
    ratios = [t / b if b > 0 else float("nan") for t, b in zip(times_ms, baseline_ms)]
    if len(ratios) == 1:
        return {"ratio": ratios[0], "ratio_quartiles": [ratios[0], ratios[0]]}
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": quartiles[1], "ratio_quartiles": [quartiles[0], quartiles[2]]}


def peak_memory_mib(fn: Callable[[], object]) -> float | None:
    """Peak device memory that `fn()` allocates above what is held before it, in MiB; None without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def matmul_ceiling(dtype=None, *, size: int | None = None, repeats: int = 10) -> dict:
    """Measured TFLOP/s of a large square matrix product: the ceiling that utilisation is stated against.

    dtype: bfloat16 on a GPU, float32 elsewhere unless given. size: 8192 on a GPU, 1024 elsewhere.
    Returns {"tflops", "size", "dtype", "time": measure's result}; tflops uses the median time.
    """
    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    dtype = dtype or (torch.bfloat16 if on_gpu else torch.float32)
    size = size or (8192 if on_gpu else 1024)
    # Random values, not zeros: zeros draw less power, so a GPU clocks higher on them than on real data.
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    out = torch.empty(size, size, device=device, dtype=dtype)
    time_ms = measure(lambda: torch.mm(a, b, out=out), repeats=repeats, warmup=3)
    flops = 2 * size**3
    return {
        "tflops": flops / time_ms["median_ms"] / 1e9,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        "time": time_ms,
    }


def copy_ceiling(*, size_bytes: int | None = None, repeats: int = 10) -> dict:
    """Measured GB/s of a device copy (bytes read plus bytes written): the ceiling of memory-bound parts."""
    import torch

    on_gpu = torch.cuda.is_available()
    size_bytes = size_bytes or (2**31 if on_gpu else 2**27)
    source = torch.ones(size_bytes, dtype=torch.uint8, device="cuda" if on_gpu else "cpu")
    target = torch.empty_like(source)
    time_ms = measure(lambda: target.copy_(source), repeats=repeats, warmup=2)
    gb_per_s = 2 * size_bytes / time_ms["median_ms"] / 1e6
    return {"gb_per_s": gb_per_s, "size_bytes": size_bytes, "time": time_ms}


# ------------------------------------------------------------------------------------------------------------
# Results


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as a reader would type it; absolute paths, which name the machine, keep their last part."""
    argv = list(sys.argv if argv is None else argv)
    program = Path(argv[0]) if argv else Path("")
    try:
        module = program.resolve().relative_to(REPO).with_suffix("")
        words = ["python", "-m", ".".join(module.parts).removesuffix(".__main__")]
    except ValueError:
        words = [program.name]
    return " ".join(words + [_without_folders(word) for word in argv[1:]])


def _without_folders(word: str) -> str:
    """`--x=/a/b/c` -> `--x=c`; words without an absolute path stay as they are."""
    flag, separator, value = word.rpartition("=") if word.startswith("-") else ("", "", word)
    return flag + separator + Path(value).name if value.startswith(("/", "~")) else word


def write_json(path: Path, value: object) -> Path:
    """Write `value` as JSON so that a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(value, indent=1, default=float) + "\n")
    return path


def write_result(name: str, result: object, *, folder: Path | None = None) -> Path:
    """Keep a result, with date, command and environment, in bench/results/<name>-<device>.json; returns it.

    The newest result of a device replaces the one before (git keeps the history), so that prose can be
    generated from a fixed path, and a run on a laptop never replaces one taken on a GPU.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", name):
        raise ValueError(f"result name {name!r}: use lower-case letters, digits, '-', '_' and '.'")
    env = environment()
    record = {
        "schema": SCHEMA,
        "name": name,
        "date": now(),
        "command": command_line(),
        "environment": env,
        "result": result,
    }
    return write_json((folder or RESULTS) / f"{name}-{device_name(env)}.json", record)


def read_result(name: str, device: str = "cpu", *, folder: Path | None = None) -> dict | None:
    """The record that `write_result` kept for `name` on `device`, or None if there is none."""
    path = (folder or RESULTS) / f"{name}-{device}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """Rows as an aligned Markdown table; floats with four significant digits, None as 'not measured'."""
    columns = list(columns or (rows[0] if rows else ()))

    def cell(value: object) -> str:
        if value is None:
            return "not measured"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    body = [[cell(row.get(column)) for column in columns] for row in rows]
    widths = [max([len(column), *(len(line[i]) for line in body)]) for i, column in enumerate(columns)]
    lines = [columns, ["-" * width for width in widths], *body]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in lines)


# ------------------------------------------------------------------------------------------------------------
# Pages that are made from results


def with_part(text: str, begin: str, end: str, part: str) -> str:
    """`text` with what stands between the marks `begin` and `end` made anew."""
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{part}\n\n{end}{rest.partition(end)[2]}"


def up_to_date(file: Path, text: str, module: str) -> int:
    """Print whether a file holds that text, or is to be made anew by `python -m <module>`; 0 or 1, as exit codes go."""
    current = file.is_file() and file.read_text(encoding="utf-8") == text
    shown = file.relative_to(REPO) if file.is_relative_to(REPO) else file.name
    print(f"{shown} is " + ("up to date" if current else f"out of date: python -m {module}"))
    return int(not current)
