"""A series is copied whole, once, and repaired after an interruption: local, in memory, and on an object store."""

import json
from pathlib import Path

import fsspec
import pytest

from records import remote, series
from records.ledger import Ledger
from records.remote import CopyError, copy_series, files_of

FAKE = Path(__file__).with_name("fake_trainer.py")


@pytest.fixture
def folder(tmp_path):
    """A series of two finished runs with a checkpoint."""
    words = ["--root", str(tmp_path / "records"), "--trainer", str(FAKE), "--preset=nano", "--name=s", "--no-judge"]
    assert series.main([*words, "--repeats=2"]) == 0
    return tmp_path / "records" / "s"


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield system
    system.store.clear()


def check(folder, system, target):
    """The copy holds every file of the series with the same bytes, and nothing else but its manifest."""
    names = files_of(folder)
    assert {"ledger.jsonl", "record.json", "runs/seed-000.txt"} <= names.keys()
    for name, path in names.items():
        assert system.cat_file(f"{target}/{name}") == path.read_bytes(), name
    there = [name for name in system.find(target) if not name.endswith("manifest.json")]
    assert len(there) == len(names), "no checkpoints, no locks"


def test_what_changed_is_sent_once(folder, memory):
    assert sorted(copy_series(folder, "memory://place")) == sorted(files_of(folder))
    check(folder, memory, "/place/s")
    assert copy_series(folder, "memory://place") == []
    Ledger(folder).append("judge", n=2, decision="x", p_value=0.5)
    assert copy_series(folder, "memory://place") == ["ledger.jsonl"]
    check(folder, memory, "/place/s")


def test_a_copy_that_was_cut_off_is_repaired(folder, memory, monkeypatch):
    whole, sent = memory.pipe_file, []

    def breaks(path, data, **more):
        if len(sent) == 3:
            raise ConnectionError("the line went dead")
        sent.append(path)
        whole(path, data, **more)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "pipe_file", lambda self, *a, **k: breaks(*a, **k))
        with pytest.raises(CopyError, match="memory://place: cannot copy s: ConnectionError: the line went dead"):
            copy_series(folder, "memory://place")
    assert not memory.exists("/place/s/manifest.json")
    copy_series(folder, "memory://place")
    check(folder, memory, "/place/s")
    memory.pipe_file("/place/s/manifest.json", b"{broken")
    assert len(copy_series(folder, "memory://place")) == len(files_of(folder)), "a broken manifest vouches for nothing"


def test_a_folder_is_a_place_too(folder, tmp_path, capsys):
    assert remote.main([str(folder), str(tmp_path / "share")]) == 0
    assert "files sent to" in capsys.readouterr().out
    check(folder, fsspec.filesystem("file"), str(tmp_path / "share" / "s"))
    assert remote.main([str(tmp_path), str(tmp_path / "share")]) == 5
    assert "no record.json" in capsys.readouterr().err
    assert remote.main([str(folder), "nosuchscheme://x"]) == 5
    assert "nosuchscheme" in capsys.readouterr().err


def test_the_series_copies_itself_and_survives_a_dead_store(tmp_path, memory, capsys):
    words = ["--root", str(tmp_path), "--trainer", str(FAKE), "--preset=nano", "--name=s", "--no-judge"]
    assert series.main([*words, "--repeats=1", "--copy-to=memory://m"]) == 0
    check(tmp_path / "s", memory, "/m/s")
    (tmp_path / "file").write_text("not a folder")
    code = series.main([*words, "--repeats=2", f"--copy-to={tmp_path}/file"])
    assert code == 5 and "not copied" in capsys.readouterr().err
    assert Ledger(tmp_path / "s").runs()["seed-001"].status == "finished", "training goes on without the store"


def test_an_object_store_on_loopback(folder, monkeypatch):
    server = pytest.importorskip("moto.server", reason="moto's server is not installed")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    try:
        host, port = running.get_host_and_port()
        for name, value in (
            ("AWS_ENDPOINT_URL", f"http://{host}:{port}"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "test"),
            ("AWS_DEFAULT_REGION", "us-east-1"),
        ):
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="set")
        copy_series(folder, "s3://set/records")
        listed = [entry["Key"] for entry in client.list_objects_v2(Bucket="set")["Contents"]]
        assert sorted(listed) == sorted(f"records/s/{name}" for name in (*files_of(folder), "manifest.json"))
        body = client.get_object(Bucket="set", Key="records/s/record.json")["Body"].read()
        assert json.loads(body) == json.loads((folder / "record.json").read_text())
        assert copy_series(folder, "s3://set/records") == []
        with pytest.raises(CopyError, match="s3://none"):
            copy_series(folder, "s3://none/records")
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
        running.stop()
