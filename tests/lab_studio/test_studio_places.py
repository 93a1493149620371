"""Every refusal of paths and uploads, with the message that the page shows."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.studio import places as studio_places
from lab.studio.places import REPO, Places, Refused


@pytest.fixture
def places(tmp_path: Path) -> Places:
    found = Places.of(tmp_path / "home")
    found.uploads.mkdir(parents=True)
    return found


def upload(places: Places, name: str, content: bytes) -> Path:
    path = places.uploads / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../x", "records/../../x", "train_gpt.py", "data", "", " ", "records/a\0b", "~/x", ".git/config"],
)
def test_paths_outside_of_the_folders_are_refused(places, path):
    with pytest.raises(Refused):
        places.inside(path)


def test_paths_inside_are_resolved(places):
    assert places.inside("records/nano") == REPO / "records" / "nano"
    assert places.inside("lab/out/x/../y") == REPO / "lab" / "out" / "y"
    assert places.inside(places.trainings) == places.trainings.resolve()


def test_a_link_out_of_the_folders_is_refused(places):
    link = places.home / "link"
    link.symlink_to("/etc")
    with pytest.raises(Refused, match="outside"):
        places.inside(link / "passwd")


def test_a_folder_whose_name_only_starts_alike_is_refused(places):
    with pytest.raises(Refused):
        places.inside(REPO / "records-of-others" / "x")


@given(st.text(max_size=40))
def test_whatever_is_accepted_lies_inside(text):
    places = Places.of("/nonexistent/home")
    try:
        found = places.inside(text)
    except Refused:
        return
    assert any(os.path.commonpath([found, root]) == str(root) for root in places.roots)


@pytest.mark.parametrize("name", ["model.pt", "model.pkl", "model.bin", "model"])
def test_checkpoints_of_kinds_that_can_run_code_are_refused(places, name):
    (places.home / name).write_bytes(b"x")
    with pytest.raises(Refused, match="can run code"):
        places.checkpoint(places.home / name)


def test_a_missing_checkpoint_is_refused(places):
    with pytest.raises(Refused, match="no checkpoint"):
        places.checkpoint(places.home / "gone.safetensors")


def test_a_text_is_kept_under_a_harmless_name(places):
    kept = places.keep_text(upload(places, "My Stories (1).txt", b"Once upon a time.\n"))
    assert kept.parent == places.texts and kept.read_text() == "Once upon a time.\n"
    assert kept.name.startswith("My-Stories-1-") and kept.suffix == ".txt"
    again = places.keep_text(upload(places, "My Stories (1).txt", b"Once upon a time.\n"))
    assert again == kept


def test_what_is_refused_is_deleted_and_kept_texts_are_limited_together(places, monkeypatch):
    bad = upload(places, "bad.txt", b"\xff")
    with pytest.raises(Refused, match="not UTF-8"):
        places.keep_text(bad)
    assert not bad.exists()
    monkeypatch.setattr(studio_places, "MOST_TEXT_BYTES", 1000)
    first = upload(places, "first.txt", b"a" * 600)
    assert places.keep_text(first).exists() and not first.exists()
    with pytest.raises(Refused, match="is full"):
        places.keep_text(upload(places, "second.txt", b"b" * 600))


def test_a_text_that_is_too_large_is_refused(places, monkeypatch):
    monkeypatch.setattr(studio_places, "MAX_UPLOAD_BYTES", 1000)
    assert places.keep_text(upload(places, "fits.txt", b"a" * 1000)).exists()
    with pytest.raises(Refused, match="at most"):
        places.keep_text(upload(places, "large.txt", b"a" * 1001))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"caf\xe9", "byte 3"), (b"GIF89a\0\0", "zero byte at character 6"), (b"", "empty"), (b" \n", "empty")],
)
def test_what_is_not_text_is_refused(places, content, message):
    with pytest.raises(Refused, match=message):
        places.keep_text(upload(places, "x.txt", content))
    assert not places.texts.exists()


def test_a_file_that_was_not_uploaded_is_refused(places, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("text")
    with pytest.raises(Refused, match="uploaded"):
        places.keep_text(other)
    (places.uploads / "link.txt").symlink_to(other)
    with pytest.raises(Refused, match="uploaded"):
        places.keep_text(places.uploads / "link.txt")
    assert other.exists()
