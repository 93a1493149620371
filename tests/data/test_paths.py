"""Paths: globs, URLs, the local cache, and streams from memory and from an object store."""

import os
import threading

import fsspec
import numpy as np
import pytest

from data import paths, shards
from data.paths import PathError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def memory():
    """fsspec's memory file system, emptied afterwards."""
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def put_shards(put, count=3, tokens=100):
    """Shards of 0, 1, 2, ... handed to `put(name, bytes)`; returns all tokens."""
    values = np.arange(count * tokens, dtype="<u2")
    for number in range(count):
        part = values[number * tokens : (number + 1) * tokens]
        put(f"train_{number:06d}.bin", shards.make_header(tokens) + part.tobytes())
    return values


def check_stream(url, tokens):
    """A stream from `url` gives the tokens, across shards and epochs."""
    found = shards.TokenStream(url, sequence_tokens=32, sequences_per_step=2, vocab_size=65536)
    endless = np.tile(tokens, 3)
    for step in (0, 1, 4, 5, 7):
        window = np.concatenate([found.batch(step, s)[0] for s in range(2)])
        assert np.array_equal(window, endless[64 * step : 64 * step + 64])
    return found


@pytest.mark.parametrize(
    "path, remote",
    [
        ("a/b.bin", False),
        ("/a/b.bin", False),
        (r"C:\a.bin", False),
        ("file:///a.bin", False),
        ("s3://bucket/a.bin", True),
        ("gs://bucket/*.bin", True),
        ("memory://a", True),
        ("simplecache::s3://a", True),
    ],
)
def test_what_is_remote(path, remote):
    assert paths.is_remote(path) == remote


def test_expand_sorts_and_refuses(tmp_path, monkeypatch):
    for name in ("b.bin", "a.bin", "c,d.bin"):
        (tmp_path / name).touch()
    (tmp_path / "folder.bin").mkdir()
    monkeypatch.chdir(tmp_path)
    assert paths.expand("*.bin") == ["a.bin", "b.bin", "c,d.bin"]
    assert paths.expand("b.bin,a.bin") == ["b.bin", "a.bin"]
    assert paths.expand("c,d.bin") == ["c,d.bin"]
    assert paths.expand(f"file://{tmp_path}/a.bin") == [f"{tmp_path}/a.bin"]
    for bad in ("none.bin", "*.txt", "", [], "a.bin,*.bin"):
        with pytest.raises(PathError):
            paths.expand(bad)


def test_stream_from_memory_equals_local(memory, cache):
    tokens = put_shards(lambda name, data: memory.pipe(f"/set/{name}", data))
    found = check_stream("memory://set/train_*.bin", tokens)
    assert [info.path for info in found.shards] == [f"memory:///set/train_00000{i}.bin" for i in range(3)]
    copies = sorted(p.name for p in cache.rglob("*.bin"))
    assert copies == ["train_000000.bin", "train_000001.bin", "train_000002.bin"]
    local = cache.parent / "local"
    put_shards(lambda name, data: (local.mkdir(exist_ok=True), (local / name).write_bytes(data)))
    assert check_stream(str(local / "*.bin"), tokens).data_hash() == found.data_hash()


def test_only_headers_are_read_at_first(memory, cache):
    put_shards(lambda name, data: memory.pipe(f"/set/{name}", data))
    shards.TokenStream("memory://set/*.bin", sequence_tokens=8, sequences_per_step=1, vocab_size=65536)
    assert not cache.exists()


def test_a_changed_object_is_fetched_anew(memory):
    memory.pipe("/x/a.bin", b"one")
    first = paths.fetch("memory://x/a.bin")
    assert first == paths.fetch("memory://x/a.bin")
    memory.pipe("/x/a.bin", b"two")
    assert paths.fetch("memory://x/a.bin").read_bytes() == b"two"
    assert first.read_bytes() == b"one"


def test_many_threads_fetch_once(memory, monkeypatch):
    memory.pipe("/x/a.bin", bytes(100))
    opened = []
    plain = type(memory).open
    monkeypatch.setattr(type(memory), "open", lambda self, *a, **k: opened.append(1) or plain(self, *a, **k))
    threads = [threading.Thread(target=paths.fetch, args=("memory://x/a.bin",)) for _ in range(6)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert len(opened) == 1


def test_a_download_that_ends_early_leaves_no_copy(memory, monkeypatch, cache):
    memory.pipe("/x/a.bin", bytes(100))
    plain = type(memory).info
    monkeypatch.setattr(type(memory), "info", lambda self, p, **k: {**plain(self, p, **k), "size": 200})
    with pytest.raises(PathError, match="100 bytes arrived of 200"):
        paths.fetch("memory://x/a.bin")
    assert [p.name for p in cache.rglob("*") if p.is_file()] == ["lock"]


@pytest.mark.parametrize("url, message", [("memory://none/a.bin", "no such file"), ("nosuch://x/a.bin", "nosuch")])
def test_errors_name_the_url(url, message):
    for call in (paths.fetch, paths.file_size, lambda u: paths.read_range(u, 0, 10)):
        with pytest.raises(PathError, match=message) as error:
            call(url)
        assert url in str(error.value)
    with pytest.raises(shards.ShardError, match=r"a\.bin"):
        shards.read_header(url)


def test_ranges(tmp_path, memory):
    (tmp_path / "a").write_bytes(b"0123456789")
    memory.pipe("/x/a", b"0123456789")
    for path in (str(tmp_path / "a"), f"file://{tmp_path}/a", "memory://x/a"):
        assert paths.read_range(path, 2, 5) == b"234"
        assert paths.read_range(path, 8, 50) == b"89"
        assert paths.read_range(path, 20, 50) == b""
        assert paths.file_size(path) == 10


def test_atomic_file_modes_and_failures(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    with paths.atomic_file(target, "w") as file:
        file.write("é\n")
    assert target.read_bytes() == "é\n".encode()
    assert target.stat().st_mode & 0o777 == 0o666 & ~paths._umask()
    with pytest.raises(ZeroDivisionError), paths.atomic_file(target) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert target.read_text(encoding="utf-8") == "é\n"
    assert os.listdir(target.parent) == ["a.txt"]


def test_stream_from_an_object_store(monkeypatch):
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto's server is not installed")
    import boto3

    store = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    store.start()
    try:
        host, port = store.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            monkeypatch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="set")
        tokens = put_shards(lambda name, data: client.put_object(Bucket="set", Key=f"deep/{name}", Body=data))
        found = check_stream("s3://set/deep/train_*.bin", tokens)
        found.close()
        client.put_object(Bucket="set", Key="deep/train_000001.bin", Body=b"no shard")
        fsspec.filesystem("s3").invalidate_cache()
        with pytest.raises(shards.ShardError, match=r"s3://set/deep/train_000001\.bin: 8 bytes, too short"):
            shards.TokenStream("s3://set/deep/*.bin", sequence_tokens=8, sequences_per_step=1, vocab_size=65536)
        with pytest.raises(shards.ShardError, match="s3://none"):
            shards.TokenStream("s3://none/*.bin", sequence_tokens=8, sequences_per_step=1, vocab_size=65536)
    finally:
        store.stop()
        fsspec.filesystem("s3").clear_instance_cache()
