"""The report: self-contained, valid, and drawn by a real browser without a complaint."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from stats.cli import main
from stats.plans import make_plan
from stats.svg import Axis, Picture

PLAN = make_plan(margin=0.0006, sigma=0.00063, cap=30)
GOOD = [2.9180 + 0.0001 * ((3 * i) % 7) for i in range(12)]


@pytest.fixture
def records(make_series):
    make_series("planned", GOOD, plan=PLAN)
    make_series("quick", [loss + 0.0009 for loss in GOOD[:7]], step_ms=40.0)
    broken = make_series("broken <b>&", GOOD[:3])
    (broken / "runs" / "seed-000.txt").write_text("nothing")
    return broken.parent


class _Checker(HTMLParser):
    """Every tag closed, every id unique, every reference inside the page."""

    VOID = ("meta", "link", "br", "img", "hr")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.outside = [], [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                (self.references if value.startswith("#") else self.outside).append(value)
            self.references += re.findall(r"url\((#[^)]+)\)", value or "")
        assert tag not in ("script", "iframe", "object", "embed", "img")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_html_is_whole_and_needs_nothing_from_outside(records, tmp_path):
    page = tmp_path / "report.html"
    assert main(["report", str(records), "--html", str(page)]) == 1  # one series cannot be judged
    text = page.read_text()
    checker = _Checker()
    checker.feed(text)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids)) >= 8  # a clipping path a picture
    assert {reference[1:] for reference in checker.references} <= set(checker.ids)
    assert checker.outside == ["data:,"]
    assert not re.search(r"https?://(?!www\.w3\.org/)|@import|@font-face", text)
    assert "broken &lt;b&gt;&amp;" in text and "broken <b>" not in text
    assert text.count("<svg") == 1 + 4 + 3  # p-curve; curves, distribution, p, sequential path; without the last


def test_the_same_logs_give_the_same_page(records, tmp_path):
    pages = [tmp_path / name for name in ("a.html", "b.html")]
    for page in pages:
        main(["report", str(records / "planned"), "--html", str(page)])
    assert pages[0].read_bytes() == pages[1].read_bytes()


def test_markdown(records, tmp_path, capsys):
    assert main(["report", str(records / "planned")]) == 0
    told = capsys.readouterr().out
    assert told.startswith("# planned\n")
    assert f"Mean final loss **{sum(GOOD) / 12:.6f}** over 12 runs is below 2.92" in told
    assert "Evidence: grade **A**" in told
    assert "ACCEPT after" in told and "the verdict of its plan counts, not this p" in told
    assert len([line for line in told.splitlines() if line.startswith("| seed-")]) == 12
    assert main(["report", str(records / "quick"), "--markdown", str(tmp_path / "r.md")]) == 0
    assert "chosen after looking" in (tmp_path / "r.md").read_text()
    assert main(["report", str(records / "broken <b>&")]) == 3
    assert "No verdict: " in capsys.readouterr().out
    assert main(["report", str(records / "quick"), "--html", str(tmp_path / "no" / "x.html")]) == 3
    assert "cannot be written" in capsys.readouterr().err


def test_report_of_public_logs(shared_data, tmp_path):
    page = tmp_path / "public.html"
    path = shared_data / "logs" / "many_runs_one_file.txt"
    assert main(["report", str(path), "--html", str(page), "--threshold", "3.28"]) == 3  # the eleventh run is cut off
    assert "step 750 of 3350" in page.read_text()


def _browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if path := shutil.which(name):
            return path
    pytest.skip("no Chromium here to render the report with (Debian: apt-get install chromium)")


@pytest.mark.timeout(180)
def test_rendered_in_a_browser_without_a_complaint(records, tmp_path):
    browser = _browser()
    page, picture = tmp_path / "report.html", tmp_path / "report.png"
    main(["report", str(records), "--html", str(page)])
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--v=0",
        "--window-size=1200,3000",
        "--virtual-time-budget=3000",
    ]
    done = subprocess.run(
        [*command, f"--screenshot={picture}", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [line for line in done.stderr.splitlines() if "CONSOLE" in line], done.stderr
    from matplotlib.image import imread

    image = imread(picture)[..., :3]
    assert image.shape[:2] == (3000, 1200)
    # The curves' blue and the threshold's red are on the page, in more than a few specks.
    for colour in ((0x25, 0x63, 0xA8), (0xB3, 0x37, 0x2F)):
        near = abs(image - [channel / 255 for channel in colour]).max(axis=2) < 0.02
        assert near.sum() > 500, (colour, near.sum())
    dom = subprocess.run([*command, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    assert dom.stdout.count("<svg") == page.read_text().count("<svg")


@pytest.mark.timeout(180)
def test_a_broken_page_would_be_noticed(tmp_path):
    """The check of the console above is not blind."""
    page = tmp_path / "broken.html"
    page.write_text("<!doctype html><script>undefined_function()</script>")
    command = [
        _browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-dev-shm-usage",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr",
        "--v=0",
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert any("CONSOLE" in line for line in done.stderr.splitlines())


def test_names_in_a_legend_do_not_run_into_each_other():
    """As wide as matplotlib sets them in DejaVu Sans: the sign of the second stood on the first one's last letter."""
    textpath = pytest.importorskip("matplotlib.textpath")
    told = "mean 0.691873, upper 95% bound 0.69764"
    picture = Picture("a picture", Axis(0, 1, "x"), Axis(0, 1, "y"))
    for name in (told, "threshold 0.7"):
        picture.key("#000", name)
    first, second = map(float, re.findall(r'<rect x="([0-9.]+)" y="[0-9]+" width="12"', picture.svg("it")))
    wide = textpath.TextPath((0, 0), told, size=10).get_extents().width
    assert first + 16 + wide + 6 < second
