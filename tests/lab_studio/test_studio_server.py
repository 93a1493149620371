"""The server as it is started: how soon, for whom, and what it refuses."""

import json
import os
import re
import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from lab_studio.studio_tools import Server

from lab.studio.places import MAX_UPLOAD_BYTES, REPO, Refused
from lab.studio.server import PASSWORD_VARIABLE, addresses, main, password_for, quick_import

pytest.importorskip("gradio", reason="gradio is not installed (requirements-lab.txt)")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    found = Server(tmp_path_factory.mktemp("studio"))
    yield found
    found.end()


def test_the_first_page_is_there_within_five_seconds(server, tmp_path):
    """On cores that others use too only the processor time can be asserted: of the best of three starts, since shared
    cores, and files read for the first time, can only add to it."""
    starts = [server.cpu_seconds]
    while min(starts) >= 5 and len(starts) < 3:
        again = Server(tmp_path / str(len(starts)))
        again.end()
        starts.append(again.cpu_seconds)
    assert min(starts) < 5, starts
    if os.getloadavg()[0] < 0.5:
        assert server.seconds < 5


def test_all_four_pages_are_served_and_nothing_is_asked_from_outside(server):
    for page in ("", "train", "write", "series"):
        answer = server.get(page)
        assert "default-src 'self'" in answer.headers["content-security-policy"]
        text = answer.read().decode()
        loaded = re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(https?:[^\"]+)", text)
        assert loaded == [] and "gradio_config" in text


def test_it_listens_on_the_loopback_address_only(server):
    listening = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    found = [line.split()[1] for line in listening.splitlines() if f":{server.port:04X} " in line and " 0A " in line]
    assert found == [f"0100007F:{server.port:04X}"]


def test_names_from_elsewhere_are_not_answered(server):
    assert server.status("", Host=f"localhost:{server.port}") == 200
    assert server.status("", Host=f"studio.example:{server.port}") == 403
    assert server.status("train", Host="studio.example") == 403


def test_uploads_larger_than_the_limit_are_refused_by_the_server(server):
    assert server.upload(b"a" * 1000) == 200
    assert server.upload(b"a" * (MAX_UPLOAD_BYTES + 1)) == 413


def test_a_page_of_another_site_can_neither_upload_nor_ask(server, tmp_path):
    ours = f"http://127.0.0.1:{server.port}"
    assert server.upload(b"text", Origin=ours) == 200
    for elsewhere in ("https://evil.example", "http://127.0.0.1:1", "null"):
        assert server.upload(b"text", Origin=elsewhere) == 403
        joined = server.status("gradio_api/queue/join", b"{}", Content_Type="application/json", Origin=elsewhere)
        assert joined == 403
    assert server.status("config", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors") == 403


@pytest.mark.parametrize("path", ["/etc/passwd", str(REPO / "train_gpt.py"), str(REPO / "lab" / "studio" / "app.py")])
def test_files_are_not_served(server, path):
    assert server.status(f"gradio_api/file={path}") in (403, 404)


def test_a_handler_refuses_a_path_outside(server):
    """As a browser would call it, without the page: the Write page's handler with a file that it did not offer."""
    config = json.loads(server.get("config").read())
    (index,) = (d["id"] for d in config["dependencies"] if d["api_name"] == "compose")
    session = {"fn_index": index, "session_hash": "test"}
    data = ["/etc/passwd", "x", 0.8, 0, 1, 0, 5]
    joined = server.get(
        "gradio_api/queue/join", json.dumps({"data": data, **session}).encode(), Content_Type="application/json"
    )
    assert joined.status == 200
    with server.get("gradio_api/queue/data?session_hash=test") as stream:
        for line in stream:
            if b"process_completed" in line:
                break
    told = json.loads(line.removeprefix(b"data: "))
    assert told["success"] is False and "not in the list of choices" in told["output"]["error"]


def test_memory_stays_small_while_nothing_is_open(server):
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+)", status)[1]) < 400 << 10


def test_elsewhere_a_password_is_asked_for(tmp_path):
    server = Server(tmp_path, "--host=0.0.0.0", **{PASSWORD_VARIABLE: "correct horse"})
    try:
        assert server.status("config") == 401
        assert server.upload(b"text") == 401
        assert server.status("gradio_api/queue/join", b"{}", Content_Type="application/json") == 401
        form = dict(Content_Type="application/x-www-form-urlencoded")
        wrong = b"username=studio&password=wrong+horse"
        assert [server.status("login", wrong, **form) for _ in range(2)] == [400, 429]
        time.sleep(1.0)
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        answer = opener.open(server.address + "login", b"username=studio&password=correct+horse", timeout=30)
        assert answer.status == 200 and opener.open(server.address + "config", timeout=30).status == 200
    finally:
        server.end()


@pytest.mark.parametrize("password", ["", "short"])
def test_elsewhere_it_does_not_start_without_a_good_password(monkeypatch, capsys, password):
    monkeypatch.setenv(PASSWORD_VARIABLE, password)
    monkeypatch.setattr(sys, "stdin", None)
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(Refused, match=PASSWORD_VARIABLE):
            password_for(host)
    assert main(["--host=0.0.0.0"]) == 2
    assert "needs a password" in capsys.readouterr().err


def test_here_no_password_is_needed_but_one_is_kept(monkeypatch):
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    assert password_for("127.0.0.1") is None
    monkeypatch.setenv(PASSWORD_VARIABLE, "correct horse")
    assert password_for("localhost") == "correct horse"


def test_a_short_password_on_this_machine_is_told_as_such(monkeypatch):
    monkeypatch.setenv(PASSWORD_VARIABLE, "short")
    with pytest.raises(Refused, match="has 5 characters; a password needs 8, or unset it") as refused:
        password_for("127.0.0.1")
    assert "other machines" not in str(refused.value)


@pytest.mark.parametrize("port", ["0", "-1", "65536", "70000", "x", "80.5"])
def test_a_port_out_of_range_is_one_clear_line(capsys, port):
    assert main([f"--port={port}"]) == 2
    assert re.match(rf"error: --port={port}: (at least 1 and at most 65535|expected int)", capsys.readouterr().err)


def test_the_printed_address_can_be_opened():
    assert addresses("127.0.0.1", 7) == "http://127.0.0.1:7/" and addresses("::1", 7) == "http://[::1]:7/"
    for everywhere in ("0.0.0.0", "::"):
        assert addresses(everywhere, 7).startswith("http://127.0.0.1:7/ on this machine and at http://")
        assert "0.0.0.0" not in addresses(everywhere, 7)


def test_a_taken_port_is_said(tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main([f"--port={port}", f"--folder={tmp_path}"]) == 5
    assert f"port {port}" in capsys.readouterr().err


def test_the_quicker_import_leaves_everything_as_it_was():
    import inspect

    before = inspect.getfile
    with pytest.raises(ZeroDivisionError), quick_import():
        assert inspect.getfile(Server) == before(Server)
        with pytest.raises(OSError):
            inspect.getfile(type("Component", (), {"EVENTS": []}))
        raise ZeroDivisionError
    assert inspect.getfile is before
