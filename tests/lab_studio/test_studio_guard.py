"""Who is answered, what may be uploaded, and how often a password may be guessed: without a server."""

import os

import pytest

from lab.studio.guard import (
    MOST_WAITING_BYTES,
    UPLOAD_AGE_S,
    Doorkeeper,
    clean_uploads,
    is_loopback,
    origin_refusal,
    upload_refusal,
)
from lab.studio.places import MAX_UPLOAD_BYTES

OURS = {"host": "127.0.0.1:7860"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"origin": "http://127.0.0.1:7860", "sec-fetch-site": "same-origin"},
        {"sec-fetch-site": "none", "sec-fetch-mode": "navigate"},
        {"host": "localhost:9", "origin": "http://LOCALHOST:9"},
    ],
)
def test_the_studios_own_pages_and_programs_are_answered(more):
    assert origin_refusal("POST", OURS | more, True) == ""


@pytest.mark.parametrize(
    "more",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://127.0.0.1:8000"},  # another program's page on this machine
        {"origin": "http://127.0.0.1:7860.evil.example"},
        {"origin": "http://localhost:7860"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},  # a form sent from elsewhere
        {"host": "studio.example:7860"},
    ],
)
def test_pages_of_others_are_refused(more):
    assert origin_refusal("POST", OURS | more, True)


def test_a_link_from_elsewhere_may_be_followed():
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert origin_refusal("GET", OURS | link, True) == ""
    assert origin_refusal("GET", OURS | link | {"sec-fetch-mode": "no-cors"}, True)


def test_other_names_are_answered_where_a_password_guards():
    there = {"host": "studio.example:7860"}
    assert origin_refusal("POST", there | {"origin": "http://studio.example:7860"}, False) == ""
    assert origin_refusal("POST", there | {"origin": "http://other.example"}, False)


def upload(folder, name: str, size: int, age_s: float = 0.0):
    path = folder / name / "a.txt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    os.truncate(path, size)  # a hole: no disk is filled
    then = path.stat().st_mtime - age_s
    os.utime(path, (then, then))
    return path


def test_uploads_say_their_size_and_are_limited_one_by_one_and_together(tmp_path):
    assert upload_refusal({"content-length": "1000"}, tmp_path) == (0, "")
    assert upload_refusal({}, tmp_path)[0] == 411
    assert upload_refusal({"content-length": "-5"}, tmp_path)[0] == 411
    assert upload_refusal({"content-length": str(2 * MAX_UPLOAD_BYTES)}, tmp_path)[0] == 413
    upload(tmp_path, "one", MOST_WAITING_BYTES - 500)
    assert upload_refusal({"content-length": "400"}, tmp_path)[0] == 0
    status, why = upload_refusal({"content-length": "1000"}, tmp_path)
    assert status == 507 and "full" in why


def test_old_uploads_are_deleted_and_make_room(tmp_path):
    old, new = upload(tmp_path, "old", MOST_WAITING_BYTES, 2 * UPLOAD_AGE_S), upload(tmp_path, "new", 70)
    loose = tmp_path / "loose"
    loose.write_bytes(b"x")
    os.utime(loose, (0, 0))
    assert clean_uploads(tmp_path) == 70
    assert not old.parent.exists() and not loose.exists() and new.exists()
    assert clean_uploads(tmp_path / "absent") == 0


def test_wrong_passwords_wait_longer_and_longer():
    now = [0.0]
    door = Doorkeeper(clock=lambda: now[0])
    waits = []
    for _ in range(8):
        assert door.wait_s("a") == 0.0
        waits.append(door.wait_s("a"))  # at once again
        now[0] += waits[-1]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]
    assert door.wait_s("b") == 0.0  # another client is not held up
    door.right("b")
    assert door.wait_s("b") == 0.0


def test_which_hosts_are_this_machine_only():
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.8.8.8", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "", "10.0.0.1", "localhost.example", "127.0.0.1.example")))
