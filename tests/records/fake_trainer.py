"""A trainer that trains nothing in no time, with the real one's command line, files and exit codes.

Its faults are fields: `--crash_seeds=1:3` with `--crash_code=4`, `--hang_seeds=2`, `--die_seeds=1` (kill -9 of
itself), `--steps_s=0.01` a step, `--checkpoint_every=N`. Faults of a seed are skipped once it is resumed, and with
`--crash_once=FOLDER` on every attempt but the first.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

SOURCE = Path(__file__).read_text()
FIELDS = {
    "preset": "nano",
    "seed": "0",
    "output_dir": ".",
    "run_name": "run",
    "resume": "",
    "plan_hash": "",
    "save_final": "true",
    "num_iterations": "10",
    "step_s": "0",
    "target_loss": "0.75",
    "loss": "0.7",
    "noise": "0.004",
    "jitter": "0",
    "crash_seeds": "",
    "crash_code": "4",
    "hang_seeds": "",
    "die_seeds": "",
    "crash_once": "",
    "checkpoint_every": "0",
    "silent_exit_seeds": "",
    "delays": "",
    "other_validation_seeds": "",
}


def sha256(text):
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def main():
    given = dict(word[2:].partition("=")[::2] for word in sys.argv[1:])
    unknown = given.keys() - FIELDS.keys()
    if unknown:
        print(f"fake_trainer.py: unknown argument {unknown}", file=sys.stderr)
        return 2
    config = FIELDS | given
    seed, total = int(config["seed"]), int(config["num_iterations"])
    folder, name = Path(config["output_dir"]), config["run_name"]
    folder.mkdir(parents=True, exist_ok=True)
    log_path, json_path = folder / f"{name}.txt", folder / f"{name}.json"
    checkpoint = folder / f"{name}.checkpoints" / "step.safetensors"
    start = 0
    if config["resume"] == "auto" and checkpoint.exists():
        start = int(checkpoint.read_text())
        log = open(log_path, "a")
        log.write(f"resumed from the checkpoint of step {start}; lines of later steps taken out: 0\n")
    else:
        if log_path.exists():
            print(f"{log_path} exists", file=sys.stderr)
            return 2
        log = open(log_path, "w")
        shown = {k: v for k, v in config.items()}
        log.write(SOURCE.rstrip("\n") + "\n" + "=" * 100 + "\nRunning Python 3\n")
        log.write("config:" + json.dumps(shown) + "\n" + "=" * 100 + "\n")
    log.flush()
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda n, frame: stop.append(n))
    noise = random.Random(seed).gauss(0, float(config["noise"]))  # the seed's own, shared by a pair
    noise += random.Random(f"{seed} {config['loss']}").gauss(0, float(config["jitter"]))
    curve = lambda step: float(config["loss"]) + noise + 5 * (1 - step / total)  # noqa: E731
    points = [{"step": 0, "loss": curve(0), "train_time_s": 0.0, "step_avg_ms": 0.0}]

    def summary(status, error=""):
        own = {k: v for k, v in config.items() if k not in ("seed", "run_name", "resume", "output_dir")}
        comparable = {k: v for k, v in own.items() if k not in ("save_final", "plan_hash")}
        own["target_loss"] = float(own["target_loss"])
        last = points[-1]
        told = {
            "schema": 1,
            "status": status,
            "run_name": name,
            "seed": seed,
            "config": own,
            "config_hash": sha256(json.dumps(comparable)),
            "code_hash": sha256(SOURCE),
            "data_hash": "0" * 64,
            "val_data_hash": ("1" if str(seed) in config["other_validation_seeds"].split(":") else "0") * 32,
            "kernels_hash": "0" * 64,
            "plan_hash": config["plan_hash"],
            "validation": points,
            "environment": {"hardware": "none", "compute": "none", "world_size": 1, "python": "3"},
            "final_loss": last["loss"] if status == "finished" else None,
            "train_time_s": last["train_time_s"],
            "peak_memory_mib": 1,
            "start_time": "2026-01-01T00:00:00+00:00",
            "end_time": "2026-01-01T00:00:01+00:00",
            "error": error,
        }
        temporary = json_path.with_suffix(".part")
        temporary.write_text(json.dumps(told))
        os.replace(temporary, json_path)

    summary("running")
    listed = lambda key: str(seed) in config[key].split(":")  # noqa: E731
    first_time = True
    if config["crash_once"]:
        mark = Path(config["crash_once"]) / f"crashed-{seed}"
        first_time = not mark.exists()
        mark.touch()
    if config["delays"]:
        time.sleep(float(config["delays"].split(":")[seed]))
    for step in range(start + 1, total + 1):
        time.sleep(float(config["step_s"]))
        if config["checkpoint_every"] != "0" and step % int(config["checkpoint_every"]) == 0:
            checkpoint.parent.mkdir(exist_ok=True)
            checkpoint.write_text(str(step))
        if stop:
            checkpoint.parent.mkdir(exist_ok=True)
            checkpoint.write_text(str(step))
            summary("interrupted")
            return 128 + stop[0]
        log.write(f"step:{step}/{total} train_time:{step}ms step_avg:1.00ms\n")
        log.flush()
        if step == total // 2 and not start and first_time:
            if listed("crash_seeds"):
                summary("failed", error=f"the loss of seed {seed} is not finite")
                print("fake_trainer.py: the last words", file=sys.stderr)
                return int(config["crash_code"])
            if listed("die_seeds"):
                os.kill(os.getpid(), signal.SIGKILL)
            if listed("silent_exit_seeds"):
                return 0
            while listed("hang_seeds"):
                time.sleep(0.05)
                if stop:
                    checkpoint.parent.mkdir(exist_ok=True)
                    checkpoint.write_text(str(step))
                    summary("interrupted")
                    return 128 + stop[0]
    loss = round(curve(total), 6)
    points.append({"step": total, "loss": loss, "train_time_s": total / 1000 + seed / 1e4, "step_avg_ms": 1.0})
    log.write(f"step:{total}/{total} val_loss:{loss:.6f} train_time:{total + seed / 10:.1f}ms step_avg:1.00ms\n")
    if config["save_final"] == "true":
        checkpoint.parent.mkdir(exist_ok=True)
        checkpoint.write_text(str(total))
    summary("finished")
    return 0


if __name__ == "__main__":
    sys.exit(main())
