"""The lessons' commands run as they stand, at tiny size; the README shows the same commands."""

import pytest

from lab import LabError, lessons
from lab.record import PAGE


def test_lessons_are_chosen_by_their_numbers():
    assert lessons.chosen("") == list(range(1, 9)) and lessons.chosen("3, 1") == [3, 1]
    for wrong in ("0", "9", "one"):
        with pytest.raises(LabError, match="numbered from 1 to 8"):
            lessons.chosen(f"1,{wrong}")


def test_every_lesson_runs_and_leaves_its_picture(tmp_path):
    made = lessons.teach(
        tmp_path, tmp_path / "pictures", scale=0.01, chars=4000, say=lambda line: None, numbers=lessons.chosen("")
    )
    assert len(made) == 8 and all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    assert all(path.stat().st_size < 250_000 for path in made), "they lie in the repository, at the size drawn here"
    assert [path.name for path in made] == [lessons.picture_name(n, one) for n, one in enumerate(lessons.LESSONS, 1)]


def test_the_readme_has_the_lessons_as_they_are_run():
    text = PAGE.read_text(encoding="utf-8")
    assert lessons.as_markdown().strip() in text, "run python -m lab.lessons --only_text"
    assert all(lessons.MARKS[i] in text for i in (0, 1))
