"""The download of FineWeb, against a hub of our own on loopback that speaks the protocol of the real one."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pytest

from data import fineweb, shards

pytest.importorskip("huggingface_hub")
REPOSITORY = "kjj0/fineweb10B-gpt2"


class Hub(http.server.ThreadingHTTPServer):
    """Files of one data set. `sent`: requests for content, as (name, range); `cut`: names -> bytes after which the
    next connection breaks; `damage`: names whose content arrives wrong."""

    daemon_threads = True

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.sent, self.cut, self.damage = files, [], {}, set()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, data, status=200, length=None, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not re.match(rf"/api/datasets/{REPOSITORY}/paths-info/main", self.path):
            return self.reply(b"{}", 404, X_Error_Code="RepoNotFound")
        try:
            names = json.loads(body)["paths"]
        except ValueError:
            names = parse_qs(body.decode())["paths"]
        facts = [
            {
                "type": "file",
                "path": name,
                "size": len(data),
                "oid": "0" * 40,
                "lfs": {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 100},
            }
            for name, data in self.server.files.items()
            if name in names
        ]
        self.reply(json.dumps(facts).encode(), Content_Type="application/json")

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        name = self.path.rsplit("/", 1)[1].split("?")[0]
        data = self.server.files[name]
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X_Repo_Commit": "1" * 40, "Accept_Ranges": "bytes"}
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start, total = int(asked[1]) if asked else 0, len(data)
        if self.command == "GET":
            self.server.sent.append((name, start))
            if name in self.server.damage:
                data = bytes(len(data))
            if name in self.server.cut:
                self.reply(data[start : self.server.cut.pop(name)], length=total - start, **headers)
                self.close_connection = True
                return None
        if asked:
            headers["Content_Range"] = f"bytes {start}-{total - 1}/{total}"
        return self.reply(data[start:], 206 if asked else 200, **headers)


@pytest.fixture
def hub():
    rng = np.random.default_rng(0)
    files = {}
    for name in fineweb.file_names(3):
        tokens = rng.integers(0, 50257, 30_000).astype("<u2")
        files[name] = shards.make_header(len(tokens)) + tokens.tobytes()
    server = Hub(files)
    yield server
    server.shutdown()
    server.server_close()


def download(folder, address, count, *more, **environment):
    """Run the command; returns its exit code, output and errors."""
    env = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder.parent / "home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, "-m", "data.fineweb", "--shards", str(count), "--out", str(folder), *more],
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
    )
    return done.returncode, done.stdout, done.stderr


def test_download_keep_and_extend(tmp_path, hub):
    folder = tmp_path / "set"
    code, out, err = download(folder, hub.address, 1)
    assert (code, err) == (0, "") and "2 shards in" in out
    assert sorted(p.name for p in folder.glob("*.bin")) == ["fineweb_train_000001.bin", "fineweb_val_000000.bin"]
    for path in folder.glob("*.bin"):
        assert path.read_bytes() == hub.files[path.name]
    # Two more: what is there stays; a file that was damaged meanwhile, though of the right size, is found by --verify.
    hub.sent.clear()
    damaged = folder / "fineweb_train_000001.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    code, out, _ = download(folder, hub.address, 3, "--verify")
    assert code == 0 and "3 downloaded" in out
    assert {name for name, _ in hub.sent} == set(fineweb.file_names(3)[1:])
    assert damaged.read_bytes() == hub.files[damaged.name]
    # All there: no network is needed.
    assert download(folder, "http://127.0.0.1:9", 3, HF_HUB_OFFLINE="1")[0] == 0
    stream = shards.TokenStream(
        str(folder / "fineweb_train_*.bin"), sequence_tokens=64, sequences_per_step=8, vocab_size=50257
    )
    assert stream.num_tokens == 90_000


def test_a_broken_connection_is_taken_up_again(tmp_path, hub):
    name = "fineweb_val_000000.bin"
    hub.files[name] = shard_bytes(7, count=15_000_000)  # the client writes to disk every 10 MB
    hub.cut[name] = 25_000_000
    code, _, err = download(tmp_path / "set", hub.address, 0)
    if code:  # this version of huggingface_hub gives up: the same command goes on
        assert code == 3 and "goes on from there" in err
        assert download(tmp_path / "set", hub.address, 0)[0] == 0
    assert (tmp_path / "set" / name).read_bytes() == hub.files[name]
    first, second = (start for _, start in hub.sent)
    assert first == 0 and 0 < second <= 25_000_000


def test_damaged_downloads_are_refused(tmp_path, hub):
    hub.damage.add("fineweb_train_000001.bin")
    code, _, err = download(tmp_path / "set", hub.address, 1)
    assert code == 3 and "fineweb_train_000001.bin: what arrived twice is not a shard" in err
    assert sorted(p.name for p in (tmp_path / "set").glob("*.bin")) == ["fineweb_val_000000.bin"]


def test_errors_without_a_network(tmp_path, hub):
    for address, more, environment, message in (
        ("http://127.0.0.1:9", [], {}, "2 of the shards are not in .*the hub did not answer"),
        (hub.address, [], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids"),
        (hub.address, ["--repository", "no/body"], {}, "there is no data set no/body"),
    ):
        code, _, err = download(tmp_path / "set", address, 1, *more, **environment)
        assert code == 3 and re.search(message, err) and "Traceback" not in err


# Without the command


class FakeHub:
    """Stands for `_ask_hub` and `_download`."""

    def __init__(self, monkeypatch, files, reachable=True):
        self.files, self.reachable, self.downloaded = files, reachable, []
        monkeypatch.setattr(fineweb, "_ask_hub", self.ask)
        monkeypatch.setattr(fineweb, "_download", self.download)

    def ask(self, names, folder, repository, revision):
        if not self.reachable:
            raise fineweb.DownloadError("no network")
        return {n: fineweb.HubFile(len(self.files[n]), hashlib.sha256(self.files[n]).hexdigest()) for n in names}

    def download(self, name, fact, folder, repository, revision):
        self.downloaded.append(name)
        (folder / name).write_bytes(self.files[name])


def shard_bytes(value, count=10):
    return shards.make_header(count) + np.full(count, value, dtype="<u2").tobytes()


def test_files_put_there_by_other_means(tmp_path, monkeypatch):
    files = {name: shard_bytes(i) for i, name in enumerate(fineweb.file_names(2))}
    for name in fineweb.file_names(1):
        (tmp_path / name).write_bytes(files[name])
    hub = FakeHub(monkeypatch, files, reachable=False)
    said = []
    found = fineweb.fetch_shards(1, tmp_path, say=said.append)
    assert [Path(info.path).name for info in found] == fineweb.file_names(1) and "only headers were checked" in said[0]
    with pytest.raises(fineweb.DownloadError):
        fineweb.fetch_shards(2, tmp_path)
    hub.reachable = True
    (tmp_path / "fineweb_train_000001.bin").write_bytes(shard_bytes(9))  # a shard, but not this one
    fineweb.fetch_shards(2, tmp_path)
    assert hub.downloaded == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    (tmp_path / "fineweb.json").write_text("[]")  # notes lost: files are hashed, not downloaded again
    fineweb.fetch_shards(2, tmp_path)
    assert len(hub.downloaded) == 2


def test_too_little_space(tmp_path, monkeypatch):
    FakeHub(monkeypatch, {name: shard_bytes(0) for name in fineweb.file_names(1)})
    monkeypatch.setattr(fineweb.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(fineweb.DownloadError, match="ask for fewer"):
        fineweb.fetch_shards(1, tmp_path)


def test_command_line(tmp_path, capsys, monkeypatch):
    for wrong in (["--shards", "104"], ["--shards", "-1"], ["--shards", "x"]):
        with pytest.raises(SystemExit) as exit:
            fineweb.main(wrong)
        assert exit.value.code == 2
    (tmp_path / "file").touch()
    assert fineweb.main(["--shards", "0", "--out", str(tmp_path / "file")]) == 3
    assert "file" in capsys.readouterr().err
