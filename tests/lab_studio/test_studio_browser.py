"""The pages in headless Chromium, driven as a user would: train, reload, stop, resume, write, judge. What can be held
without a browser is in test_studio_pages.py; here is how it looks, the keyboard, downloads, and all of it together.

It takes some minutes: -m slow.
STUDIO_SCREENSHOTS names a folder for pictures of every page, wide and narrow.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lab_studio.studio_tools import Server, series, trained
from lab_studio.test_tour_page import tour_page

from lab.studio.places import REPO

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
MISSING = [name for name in ("gradio", "selenium") if importlib.util.find_spec(name) is None]
MISSING += [name for name, found in (("chromium", CHROMIUM), ("chromedriver", DRIVER)) if not found]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --disable-extensions"
)


ACCESS = Path(__file__).with_name("access.js").read_text()


class Browser:
    """One page at a time, with waits instead of sleeps."""

    def __init__(self, address: str, profile: Path):
        from selenium import webdriver
        from selenium.webdriver.chrome.options import Options
        from selenium.webdriver.chrome.service import Service

        options = Options()
        options.binary_location = CHROMIUM
        for flag in [*FLAGS.split(), f"--user-data-dir={profile}", "--window-size=1400,1000"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.server = None
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        self.address = address
        self.urls: set[str] = set()
        self.errors: list[str] = []

    def open(self, page: str) -> None:
        self.driver.get(self.address + page)

    def find(self, css: str):
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, css)

    def all(self, css: str) -> list:
        from selenium.webdriver.common.by import By

        return self.driver.find_elements(By.CSS_SELECTOR, css)

    def until(self, condition, what: str, seconds: float = 90.0):
        """The first true value of `condition`; parts of the page that are not there yet count as false."""
        from selenium.common.exceptions import WebDriverException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except WebDriverException:
                pass
            time.sleep(0.1)
        shown = self.find("body").text[-1500:]
        raise AssertionError(f"{what}: not within {seconds} s; the page says:\n{shown}")

    def text(self, css: str) -> str:
        return self.find(css).text

    def value(self, css: str) -> str:
        return self.find(css).get_attribute("value")

    def type(self, css: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        box = self.until(lambda: self.find(css), css)
        box.send_keys(Keys.CONTROL, "a")
        box.send_keys(text)

    def click(self, css: str) -> None:
        """Click as soon as nothing is in the way (Gradio greys out what is being computed)."""
        self.until(lambda: self.find(css).is_enabled() and (self.find(css).click() or True), f"click {css}")

    def choose(self, css: str, label: str) -> None:
        """An entry of a dropdown, whose list may be made anew, and closed, while it is looked at."""
        self.click(f"{css} input")

        def chosen() -> bool:
            entries = self.all("ul[role=listbox] li")
            if not entries:
                self.find(f"{css} input").click()
            wanted = [entry for entry in entries if label in entry.text]
            return bool(wanted) and (wanted[0].click() or True)

        self.until(chosen, f"{label} in the list of {css}")

    def keys(self, *names: str) -> None:
        """Press keys where the focus is."""
        from selenium.webdriver.common.keys import Keys

        for name in names:
            self.driver.switch_to.active_element.send_keys(getattr(Keys, name))

    def wrong(self) -> list[str]:
        """What a reader with weak eyes, a keyboard or a screen reader would stumble on: see ACCESS."""
        self.keys("TAB", "TAB")  # a new window shows no focus before its first key, and the first may leave the page
        return self.driver.execute_script(ACCESS)

    def listen(self) -> None:
        """Collect what was requested and what went wrong since the last call."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                self.urls.add(message["params"]["request"]["url"])
        found = [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]
        # A request was under way when the page was left; Gradio's chart looks at its size again when it is taken away.
        left = ("AbortError", "errored out", "reading 'offsetWidth'")
        self.errors += [message for message in found if not any(word in message for word in left)]

    def picture(self, name: str) -> None:
        """Screenshots of the page, wide and narrow, in the light and then in the dark, if wanted."""
        if folder := os.environ.get("STUDIO_SCREENSHOTS"):
            for width, dark in ((400, False), (1400, False), (400, True), (1400, True)):
                self.driver.set_window_size(width, 1000)
                self.driver.execute_script("document.body.classList.toggle('dark', arguments[0])", dark)
                tall = self.driver.execute_script("return document.documentElement.scrollHeight")
                self.driver.set_window_size(width, min(3000, tall + 150))
                time.sleep(1)
                self.driver.save_screenshot(str(Path(folder) / f"{name}-{width}{'-dark' if dark else ''}.png"))
            self.driver.execute_script("document.body.classList.remove('dark')")

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.driver.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("studio")


@pytest.fixture(scope="module")
def browser(folder):
    server = Server(folder / "home", OMP_NUM_THREADS="1")
    found = Browser(server.address, folder / "profile")
    found.server = server
    yield found
    found.driver.quit()
    server.end()


def nothing_from_outside(browser: Browser) -> None:
    browser.listen()
    outside = {u for u in browser.urls if not u.startswith((browser.address, "data:", "blob:", "chrome", "file:"))}
    assert outside == set() and browser.errors == []


def printed_verdict(series: Path) -> str:
    command = [sys.executable, "-m", "stats.ttest", str(series)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPO).stdout.rstrip("\n")


def test_every_page_opens_and_a_series_is_judged_as_on_the_command_line(browser, folder):
    made = series(folder / "home" / "runs-of-a-test", [2.9, 2.95, 2.91, 2.93, 2.92])
    for page, part in (("", "#checkpoints"), ("train", "#start"), ("write", "#prompt")):
        browser.open(page)
        browser.until(lambda: browser.find(part).is_displayed(), f"{part} on page {page!r}")  # noqa: B023
    browser.open("series")
    browser.choose("#series", "runs-of-a-test")
    expected = printed_verdict(made)
    assert "REJECT" in expected
    browser.until(lambda: browser.text("#verdict pre") == expected.strip(), "the verdict of stats.ttest")
    browser.until(lambda: "seed-004" in browser.text("#runs"), "the table of runs")
    assert len(browser.all("#pictures svg")) == 2
    nothing_from_outside(browser)


@pytest.mark.parametrize(
    "right, planted, found",
    [
        ("<p>text", "<p style='color: #aaa'>text", "contrast 2.32"),
        ("<h1>", "<h2>", "0 level-one headings"),
        ("<h2>", "<h3>", "h3 after h1"),
        ("<div role='group'", "<div", "a name that is not read"),
        ("<pre tabindex='0' role='region'", "<pre role='region'", "moved by a mouse alone"),
        ("<th>run", "<th>", "nothing heads a column"),
        ("<main>", "<div>", "not one main part"),
        ("<title>Studio</title>", "", "no title"),
        ("<html lang='en'>", "<html>", "no language"),
        ("<label>name", "<label></label>", "no name"),
        ("alt='a dot'", "", "no words for"),
        ("button {", "button { outline: none !important;", "focus unseen"),
    ],
)
def test_the_check_of_the_pages_finds_what_is_planted(browser, tmp_path, right, planted, found):
    whole = (
        "<!doctype html><html lang='en'><title>Studio</title><style>button { color: black; }"
        "pre { width: 50px; overflow: auto; }</style><body><main>"
        "<h1>Train</h1><h2>Samples</h2><p>text</p><div role='group' aria-label='tokens'><button>a</button></div>"
        "<pre tabindex='0' role='region' aria-label='verdict'>step:4/4 val_loss:2.9</pre><table><tr><th>run</table>"
        "<label>name <input></label>"
        "<img width='9' height='9' alt='a dot' src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>"
    )
    assert right in whole
    for text in (whole, whole.replace(right, planted, 1)):
        (tmp_path / "page.html").write_text(text)
        browser.driver.get((tmp_path / "page.html").as_uri())
        wrong = browser.wrong()
        assert [found in one for one in wrong] == ([] if text is whole else [True])


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("page", ["", "train", "write", "series", "duel", "blind"])
def test_every_page_fits_and_can_be_read_and_reached(browser, page, theme):
    for width in (400, 1400):
        browser.driver.set_window_size(width, 1000)
        browser.open(f"{page}?__theme={theme}")
        browser.until(lambda: browser.find("h1").is_displayed(), f"the heading of {page!r}")
        time.sleep(2.0)  # what comes with the first answers of the server
        assert browser.overflow() <= 0 and browser.wrong() == []


@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_of_the_tour_fits_and_can_be_read(browser, tmp_path, width):
    browser.driver.set_window_size(width, 1000)
    browser.driver.get(tour_page(tmp_path / "tour").as_uri())
    browser.until(lambda: browser.find(".drawn img").rect["width"] >= 800, "a picture that can be read, moved sideways")
    assert browser.overflow() <= 0 and browser.wrong() == []
    browser.picture("tour")


def test_a_first_visit_says_what_to_do_and_nothing_becomes_a_word(browser):
    for page in ("", "write"):
        browser.open(page)
        browser.until(lambda: "rain one" in browser.text("body"), f"what to do next on {page!r}")
        for _ in range(12):
            browser.keys("TAB")
        assert "None" not in browser.text("body")
        browser.picture(f"first-visit-{page or 'models'}")
    browser.click("#write")
    browser.until(lambda: "choose a model first" in browser.text("body"), "that a model is needed")


def test_the_form_is_kept_over_a_reload(browser):
    browser.open("train")
    browser.choose("#model", "MLP")
    browser.until(lambda: browser.value("#steps input") == "2000", "the suggested steps of the model")
    browser.type("#steps input", "77\t")
    time.sleep(1.0)
    browser.open("train")
    browser.until(lambda: browser.value("#steps input") == "77" and browser.value("#model input") == "MLP", "as it was")


def test_the_report_comes_at_the_first_click_and_is_of_the_series_shown(browser, folder):
    browser.driver.execute_cdp_cmd("Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(folder)})
    for name in ("first-series", "second-series"):
        series(folder / "home" / name, [2.9, 2.95, 2.91])
        browser.open("series")
        browser.choose("#series", name)
        browser.until(lambda: name in browser.text("#verdict pre"), "its verdict")  # noqa: B023
        browser.click("#report")
        report = folder / f"{name}.html"
        browser.until(report.exists, f"the report of {name}")
        assert f"{name}" in report.read_text()


def resident_mib(queue, server) -> float:
    """Memory of the studio, its runner and the trainer, pages that they share counted once."""
    pids = {server.process.pid}
    for entry in queue.entries():
        for attempt in entry.run.attempts if entry.run else ():
            pids |= {event["pid"] for event in (attempt.launch, attempt.start) if event}
    total = 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup")
        if rollup.exists():
            total += int(next(line.split()[1] for line in rollup.read_text().splitlines() if line.startswith("Pss:")))
    return total / 1024


def status(browser: Browser) -> str:
    return browser.text("#status").lower()


def steps_done(browser: Browser) -> int:
    """Of the training that is shown: '12 of 240' stands under 'step'."""
    return int(status(browser).split("step")[1].split()[0])


def test_the_whole_drive(browser, folder):
    """Train a stories model with a stop, a reload and a resumption; a second one waits; then write and look."""
    from lab.studio.jobs import Queue

    queue = Queue(folder / "home" / "trainings")
    browser.open("train")
    browser.choose("#model", "Stories: transformer")
    browser.until(lambda: browser.value("#steps input") == "1000", "the suggested steps of the model")
    browser.type("#steps input", "240\t")
    browser.click("#more button")
    for field, value in (("#batch_tokens", "1024"), ("#width", "32"), ("#layers", "2")):
        browser.type(f"{field} input[type=number]", f"{value}\t")
    browser.click("#start")
    browser.until(lambda: "running" in status(browser), "running")
    browser.until(lambda: "validation loss" in status(browser) and steps_done(browser) > 0, "progress")
    browser.until(lambda: browser.find("#curves svg, #curves canvas").is_displayed(), "the loss curves")

    browser.choose("#model", "Bigram, counted")  # a second training waits for the first
    browser.until(lambda: browser.value("#steps input") == "1", "its suggested steps")
    browser.click("#start")
    browser.until(lambda: "1 before it" in status(browser), "the second one in the queue")
    assert [entry.state for entry in queue.entries()] == ["running", "queued"]

    browser.open("train")  # as after closing the page: the running one is shown
    browser.until(lambda: "running" in status(browser) and "stories: transformer" in status(browser), "after a reload")
    memory = resident_mib(queue, browser.server)
    assert memory < 1500
    browser.until(lambda: "step" in browser.text("#samples"), "samples as it learns", 120)
    browser.picture("train")
    browser.click("#stop")
    browser.until(lambda: "stopped" in status(browser), "stopped")
    stopped = queue.entries()[0]
    assert 0 < steps_done(browser) < 240 and list(stopped.checkpoints.glob("resume*"))
    browser.click("#resume")
    browser.until(lambda: "finished" in status(browser) and "240 of 240" in status(browser), "finished", 300)
    assert sorted(entry.state for entry in queue.entries()) == ["finished", "finished"]
    assert "resumed from the checkpoint" in queue.entry(stopped.id).log.read_text()

    browser.open("")
    browser.until(lambda: "240" in browser.text("#checkpoints"), "the checkpoint in the list")
    cells = lambda: browser.all("#checkpoints [role=gridcell]")  # noqa: E731
    next(cell for cell in cells() if cell.is_displayed() and cell.text.strip() == "gpt").click()
    browser.until(lambda: "word" in browser.text("#facts"), "what the checkpoint says of itself")
    browser.until(lambda: browser.find("#diagram table").is_displayed(), "the architecture")
    browser.click("#analyse")
    browser.until(lambda: browser.all("#analysis_answer .sample"), "the first analysis: samples, as text")
    browser.choose("#analysis", "Attention")
    browser.click("#analyse")
    browser.until(
        lambda: browser.find("#analysis_answer img").get_attribute("alt").startswith("attention"), "a picture"
    )
    browser.picture("models")
    browser.click("#facts a")

    browser.until(lambda: browser.value("#checkpoint input"), "the model chosen on the Write page")
    browser.type("#prompt textarea", "There once was")
    browser.click("#write")
    browser.until(lambda: "The end." in browser.text("#story"), "a finished story", 120)
    assert browser.text("#story").startswith("There once was") and len(browser.text("#story")) > 60
    browser.until(lambda: len(browser.all("#tokens button")) > 10, "the tokens")
    browser.all("#tokens button")[8].click()
    browser.until(lambda: "entropy" in browser.text("#about"), "what the model expected there")
    assert "%" in browser.text("#about .bars") and browser.find("#drove").is_displayed()
    before = browser.text("#about")
    browser.keys("ARROW_RIGHT", "ENTER")  # the next token, without a mouse
    browser.until(
        lambda: browser.text("#about") != before and "entropy" in browser.text("#about"), "the token after it"
    )
    assert browser.all("#tokens button")[9].get_attribute("aria-pressed") == "true"
    assert browser.wrong() == [], "with a story, its tokens and an explanation"
    browser.picture("write")

    browser.open("series")
    browser.until(lambda: browser.text("#verdict pre"), "a verdict")
    record = next(iter(sorted((REPO / "records").glob("*/runs/*.txt"))), None)
    if record:
        made = record.parent.parent
        browser.choose("#series", f"records/{made.name}")
        browser.until(
            lambda: browser.text("#verdict pre") == printed_verdict(made).strip(), "the verdict on the record"
        )
    browser.picture("series")
    browser.open("blind")
    browser.until(lambda: browser.value("#blind_one input"), "a choice of two models")
    browser.click("#blind_begin")
    browser.until(lambda: browser.all("#blind_grade input"), "the first story", 120)
    browser.picture("blind")
    nothing_from_outside(browser)
    print(f"studio, runner and trainer together: {memory:.0f} MiB")


def test_two_recipes_are_compared_and_their_chart_follows_the_theme(browser, folder):
    for name, rate in (("slow", 0.001), ("fast", 0.3)):
        trained(folder / "home", name, learning_rate=rate)
    browser.open("duel")
    for side, rate in (("a", 0.3), ("b", 0.001)):
        browser.choose(f"#side_{side}", f"learning rate {rate}")
    browser.click("#compare")
    browser.until(lambda: browser.all("#duel_text .coloured span"), "the text under both", 120)
    assert browser.text("#duel_verdict pre") and len(browser.all("#duel_a .sample, #duel_b .sample")) == 2
    browser.picture("duel")
    inks = """const of = (css, ink) => getComputedStyle(document.querySelector(css))[ink];
        return [of('#duel_curves .mark-text text', 'fill'), of('#duel_curves .mark-rule line', 'stroke')]"""
    theme = "document.body.classList.toggle('dark', arguments[0]);" + inks
    light, dark, again = (browser.driver.execute_script(theme, night) for night in (False, True, False))
    assert browser.wrong() == [], "with a verdict, a chart and coloured text"
    assert light == again and light[0] != dark[0] and light[1] != dark[1], "switched while it is shown"
    nothing_from_outside(browser)
