"""The lessons' commands run as they stand, at tiny size; the README shows the same commands."""

from lab import lessons
from lab.record import PAGE


def test_every_lesson_runs_and_leaves_its_picture(tmp_path):
    made = lessons.teach(tmp_path, tmp_path / "pictures", scale=0.01, chars=4000, say=lambda line: None)
    assert len(made) == 8 and all(path.read_bytes().startswith(b"\x89PNG") for path in made)
    assert [path.name for path in made] == [lessons.picture_name(n, one) for n, one in enumerate(lessons.LESSONS, 1)]


def test_the_readme_has_the_lessons_as_they_are_run():
    text = PAGE.read_text(encoding="utf-8")
    assert lessons.as_markdown().strip() in text, "run python -m lab.lessons --only_text"
    assert all(lessons.MARKS[i] in text for i in (0, 1))
