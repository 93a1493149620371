"""What README.md and the pages beside it promise: links lead somewhere, generated parts say what the files say."""

import re
import subprocess

import pytest

from bench import readme
from bench.readme import REPO


def pages():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=REPO, capture_output=True, text=True)
    return sorted(listed.stdout.split()) or [str(p.relative_to(REPO)) for p in REPO.glob("*.md")]


@pytest.mark.parametrize("page", pages())
def test_links_lead_to_files_of_this_repository(page):
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", (REPO / page).read_text(encoding="utf-8"))
    local = [link for link in links if not re.match(r"[a-z]+:", link)]
    missing = [link for link in local if not ((REPO / page).parent / link).exists()]
    assert not missing, f"{page} links to {missing}, which are not there"


def test_the_generated_parts_say_what_the_files_say():
    text = (REPO / "README.md").read_text(encoding="utf-8")
    assert readme.filled(text) == text, "run python -m bench.readme"


def test_a_users_own_race_changes_nothing(tmp_path, monkeypatch):
    """In a clone: a race of one's own replaces a result and adds another; the README stays right. Staged, it counts."""
    clone = tmp_path / "clone"
    results = clone / "bench" / "results"
    results.mkdir(parents=True)
    git = lambda *words: subprocess.run(["git", *words], cwd=clone, check=True, capture_output=True)  # noqa: E731
    committed = (REPO / "bench" / "results" / "race-cpu.json").read_text()
    (results / "race-cpu.json").write_text(committed)
    git("init", "-q")
    git("add", ".")
    monkeypatch.setattr(readme, "REPO", clone)
    monkeypatch.setattr(readme, "RESULTS", results)
    before = readme.race(), readme.measured()
    own = re.sub(r'"seconds_to_target": [0-9.]+', '"seconds_to_target": 1.0', committed)
    assert own != committed
    (results / "race-cpu.json").write_text(own)
    (results / "race-zz.json").write_text(own)
    assert (readme.race(), readme.measured()) == before
    git("add", ".")
    assert readme.race() != before[0]


def test_an_edited_number_is_noticed(tmp_path, monkeypatch, capsys):
    text = (REPO / "README.md").read_text(encoding="utf-8")
    changed = text.replace("| nano", "| nan0", 1)
    assert changed != text
    (tmp_path / "README.md").write_text(changed, encoding="utf-8")
    monkeypatch.setattr(readme, "REPO_README", tmp_path / "README.md")
    assert readme.main(["--check"]) == 1 and "out of date" in capsys.readouterr().out
    assert readme.main([]) == 0 and readme.main(["--check"]) == 0


def test_a_part_that_is_missing_is_named():
    with pytest.raises(ValueError, match="leaderboard"):
        readme.filled("no parts at all")


def test_the_page_of_the_rehearsal_says_what_the_files_say(tmp_path, monkeypatch, capsys):
    from bench.rehearse import page

    assert page.PAGE.read_text(encoding="utf-8") == page.page(), "run python -m bench.rehearse.page"
    edited = tmp_path / "rehearsal.md"
    edited.write_text(page.page().replace("| peak of a step", "| peek of a step", 1), encoding="utf-8")
    monkeypatch.setattr(page, "PAGE", edited)
    assert page.main(["--check"]) == 1 and "out of date" in capsys.readouterr().out
    assert page.main([]) == 0 and page.main(["--check"]) == 0
