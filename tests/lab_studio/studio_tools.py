"""A studio in a process of its own, and a small series of runs, for the tests of this folder."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from lab.studio.places import REPO
from lab.studio.server import PASSWORD_VARIABLE

RULER = "=" * 100


def series(folder: Path, losses: list[float], threshold: float = 3.0) -> Path:
    """A folder of runs of four steps each."""
    (folder / "runs").mkdir(parents=True)
    (folder / "record.json").write_text(json.dumps({"threshold": threshold}))
    for seed, loss in enumerate(losses):
        lines = [f"step:{s}/4 val_loss:{loss + 4 - s:.6f} train_time:{s * 10}ms step_avg:10ms" for s in (0, 2, 4)]
        head = f"print('hello')\n{RULER}\nseed:{seed}\n{RULER}\n"
        (folder / "runs" / f"seed-{seed:03d}.txt").write_text(head + "\n".join(lines) + "\n")
    return folder


def trained(home: Path, name: str, model: str = "bigram", seeds: Sequence[int] = (0, 1), **settings) -> None:
    """A short real series of the lab on names, where the queue would have put it."""
    from lab.models import fields_class
    from lab.train import TrainConfig, train_model

    for seed in seeds:
        how = dict(steps=3, batch_tokens=64, row_tokens=64, limit_chars=3000, checkpoints=2, val_tokens=500)
        config = TrainConfig(model, "names", seed=seed, **how, **settings)
        train_model(config, fields_class(model)(), folder=home / "trainings" / name)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """A studio in a process of its own."""

    def __init__(self, folder: Path, *flags: str, **environment: str):
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}/"
        words = [sys.executable, "-m", "lab.studio", f"--port={self.port}", f"--folder={folder}", *flags]
        clean = {k: v for k, v in os.environ.items() if k != PASSWORD_VARIABLE and not k.startswith("GRADIO")}
        began = time.monotonic()
        self.process = subprocess.Popen(words, cwd=REPO, env=clean | environment, stdout=subprocess.PIPE, text=True)
        while True:
            try:
                self.get("")
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                assert self.process.poll() is None and time.monotonic() - began < 120, "the studio did not start"
                time.sleep(0.05)
        self.seconds = time.monotonic() - began
        ticks = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        self.cpu_seconds = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")

    def get(self, path: str, data: bytes | None = None, **headers: str):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return urllib.request.urlopen(urllib.request.Request(self.address + path, data, named), timeout=30)

    def status(self, path: str, data: bytes | None = None, **headers: str) -> int:
        try:
            return self.get(path, data, **headers).status
        except urllib.error.HTTPError as error:
            return error.code

    def upload(self, content: bytes, **headers: str) -> int:
        head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\n'
        body = head + content + b"\r\n--b--\r\n"
        return self.status("gradio_api/upload", body, Content_Type="multipart/form-data; boundary=b", **headers)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(20)
