"""Series of made-up runs, written in the trainer's own dialect."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

SOURCE = '''"""A program whose text holds look-alikes."""
EXAMPLE = """
step:600/600 val_loss:1.000000 train_time:1ms step_avg:1.00ms
step:1/600 train_time:1ms step_avg:1.00ms
"""
print(f"step:{step}/{total} val_loss:{loss:.6f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")
'''
STEPS, EVERY = 60, 20


def log_text(final: float, *, steps=STEPS, every=EVERY, step_ms=50.0, source=SOURCE, facts=None, plan_hash="", seed=0):
    """A complete log that ends at loss `final`."""
    digest = hashlib.sha256(source.encode()).hexdigest()
    lines = [source, "=" * 100, "Running Python 3.11.9 (main)", "Running PyTorch 2.13.0 compiled for cpu"]
    lines += ["Running Triton version 3.9.0", "Running on device_name=Example CPU with world_size=1"]
    lines += [f"code_hash:{digest}", "config_hash:" + "c" * 64, "data_hash:sha256:" + "d" * 64]
    lines += [f"plan_hash:{plan_hash}"] if plan_hash else []
    lines += ["config:" + json.dumps({"seed": seed, "preset": "nano", "target_loss": 2.92} | (facts or {}))]
    lines.append("=" * 100)
    rng, training = np.random.default_rng(seed), np.random.default_rng([seed, round(final * 1e7)])
    for step in range(steps + 1):
        clock = step * step_ms
        average = clock / max(step, 1)
        if step:
            loss = 4 + training.random()
            lines.append(f"step:{step}/{steps} train_loss:{loss:.6f} train_time:{clock:.0f}ms step_avg:{average:.2f}ms")
        if step % every == 0 or step == steps:
            wobble = 0 if step == steps else rng.normal(0, 0.01)
            loss = final + (1 - step / steps) * 5 + wobble
            lines.append(f"step:{step}/{steps} val_loss:{loss:.6f} train_time:{clock:.0f}ms step_avg:{average:.2f}ms")
    lines.append("peak memory allocated: 12 MiB reserved: 16 MiB")
    return "\n".join(lines) + "\n"


def write_series(
    folder: Path, losses, *, ledger=True, record=None, plan=None, readme=True, hosts=None, step_ms=50.0, sealed=True
):
    """A series' folder as the trainer and its front door leave it; with `sealed` its ledger's lines hold together."""
    (folder / "runs").mkdir(parents=True)
    events = []
    for seed, loss in enumerate(losses):
        name = f"seed-{seed:03d}"
        speed = step_ms * (1 + 0.001 * ((seed * 7) % 23 - 11))
        text = log_text(loss, seed=seed, plan_hash=plan.hash if plan else "", step_ms=speed)
        (folder / "runs" / f"{name}.txt").write_text(text)
        beside = {
            "schema": 1,
            "status": "finished",
            "run_name": name,
            "seed": seed,
            "code_hash": code_hash(),
            "config": {"num_iterations": STEPS, "target_loss": 2.92, "preset": "nano"},
            "config_hash": "c" * 64,
            "data_hash": "sha256:" + "d" * 64,
            "environment": {"host_hash": hosts[seed % len(hosts)] if hosts else "abc"},
            "validation": [],
        }
        for step, value in re.findall(r"^step:(\d+)/\d+ val_loss:(\S+)", text.split("=" * 100)[2], re.MULTILINE):
            beside["validation"].append({"step": int(step), "loss": float(value)})
        (folder / "runs" / f"{name}.json").write_text(json.dumps(beside))
        events.append({"event": "launch", "run": name, "seed": seed, "attempt": 1})
        end = {"event": "end", "run": name, "attempt": 1, "status": "finished", "exit_code": 0}
        if sealed:
            end |= {"final_loss": beside["validation"][-1]["loss"], "sealed": seal_of(folder, name)}
        events.append(end)
    if ledger:
        begin = {"event": "begin", "threshold": 2.92, "plan": plan.hash if plan else None, "stop_step": None}
        write_ledger(folder, [begin, *events] if sealed else events, sealed)
    (folder / "record.json").write_text(json.dumps({"threshold": 2.92} | (record or {})))
    if readme:
        mean = float(np.mean(np.round(losses, 6)))
        told = "".join(f"| {seed} | {loss:.6f} |\n" for seed, loss in enumerate(losses))
        (folder / "README.md").write_text(f"mean final loss {mean:.6f}\n\n{told}")
    if plan:
        from stats.planfile import write_plan

        write_plan(plan, folder / "plan.json")
    return folder


def seal_of(folder: Path, name: str) -> dict:
    """What an end notes of the files that a run left."""
    files = {"log": folder / "runs" / f"{name}.txt", "json": folder / "runs" / f"{name}.json"}
    return {key: hashlib.sha256(path.read_bytes()).hexdigest() for key, path in files.items()}


def write_ledger(folder: Path, events, linked=True) -> None:
    """ledger.jsonl, each line linked to those above it."""
    data = b""
    for event in events:
        link = {"before": hashlib.sha256(data).hexdigest()[:32]} if linked else {}
        data += json.dumps(event | link).encode() + b"\n"
    (folder / "ledger.jsonl").write_bytes(data)


def code_hash() -> str:
    return hashlib.sha256(SOURCE.encode()).hexdigest()


@pytest.fixture
def make_series(tmp_path):
    """write_series below the test's own folder: make_series(name, losses, **settings) -> Path."""
    return lambda name, losses, **settings: write_series(tmp_path / name, losses, **settings)


@pytest.fixture(scope="session")
def honest(tmp_path_factory):
    """A series with a plan, sealed and linked, of which nothing was touched: not to be changed, only copied."""
    from stats.plans import make_plan

    losses = [2.9180 + 0.0001 * ((3 * i) % 7) for i in range(8)]
    plan = make_plan(margin=0.0006, sigma=0.00063, cap=30)
    return write_series(tmp_path_factory.mktemp("honest") / "s", losses, plan=plan)


@pytest.fixture
def make_log():
    """log_text."""
    return log_text


def pytest_collection_modifyitems(items):
    """Slow tests may take their time, also on a machine that is shared."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))
