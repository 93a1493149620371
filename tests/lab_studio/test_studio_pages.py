"""What the pages' buttons and fields do, without a browser: the functions behind them, called as the page calls them.

How a page looks, its keyboard and its downloads need a browser: test_studio_browser.py."""

import inspect
import re
from types import SimpleNamespace

import pytest
from lab_studio.studio_tools import series, trained

from lab.studio import recipes
from lab.studio.places import Places

gr = pytest.importorskip("gradio", reason="gradio is not installed (requirements-lab.txt)")

MINE = SimpleNamespace(session_hash="mine", query_params={})


class Pages:
    """The studio's functions by page and name."""

    def __init__(self, home):
        from lab.studio import app

        self.places = Places(home, (home,))
        for folder in (self.places.trainings, self.places.reports, self.places.pictures, self.places.uploads):
            folder.mkdir(parents=True, exist_ok=True)
        self.blocks = app.build(self.places)

    def __getitem__(self, name):
        """The function `page.name`; of a generator, what stands on the page at its end. LookupError: there is none."""
        page, _, wanted = name.partition(".")
        for found in self.blocks.fns.values():
            if found.fn and found.fn.__module__ == f"lab.studio.pages.{page}" and found.fn.__name__ == wanted:
                return lambda *given: self._last(found.fn, given)
        raise LookupError(name)

    @staticmethod
    def _last(function, given):
        answer = function(*given)
        if not inspect.isgenerator(answer):
            return answer
        stands: tuple = ()
        for sent in answer:
            parts = sent if isinstance(sent, tuple) else (sent,)
            stands = tuple(old if new == gr.skip() else new for old, new in zip(stands or parts, parts))
        return stands if isinstance(sent, tuple) else stands[0]


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    return Pages(tmp_path_factory.mktemp("empty"))


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Two recipes of two runs each, and a series of the trainer's logs."""
    home = tmp_path_factory.mktemp("full")
    trained(home, "slow", learning_rate=0.001)
    trained(home, "fast", learning_rate=0.3)
    series(home / "a-series", [2.9, 2.95, 2.91])
    return Pages(home)


def words(answer) -> str:
    """Everything that a page would show of an answer."""
    return " ".join(str(a) for a in (answer if isinstance(answer, (list, tuple)) else [answer]))


def test_a_first_visit_says_what_to_do_next_on_every_page(empty):
    table, choice, said = empty["models.refresh"]()
    assert "href='train'" in said and table["visible"] is choice["visible"] is False
    choice, story = empty["write.open_page"](MINE)
    assert "href='train'" in story and choice["value"] is None
    assert "href='train'" in words(empty["duel.open_page"]())
    assert "href='train'" in words(empty["series.open_page"]())
    assert all(update["value"] is None for update in empty["blind.open_page"]())
    assert "Nothing has been trained here yet" in words(empty["train.open_page"](MINE))
    assert "choose two recipes first" in words(empty["duel.compare"](None, None))
    assert "choose a model first" in words(empty["models.analyse"](None, "samples", "", ""))
    with pytest.raises(gr.Error, match="choose a model first"):
        empty["write.compose"](None, "Once", 0.8, 0, 1, 0, 5)
    with pytest.raises(gr.Error, match="choose two different models first"):
        empty["blind.start"](None, None, "", 3)
    skipped = empty["models.opened"]("")
    assert all(one == gr.skip() for one in skipped), "a field that was left without a choice changes nothing"


def test_a_model_is_opened_with_its_facts_its_drawing_and_what_fits_it(full):
    _, choice, _ = full["models.refresh"]()
    label, path = next((label, path) for label, path in choice["choices"] if "fast" in label)
    listed, details, facts, drawing, answer, kinds, kept = full["models.opened"](path)
    assert details["visible"] and "bigram" in facts and "<td>Embedding</td>" in drawing and answer == kept == ""
    assert listed["choices"][0][0] == "best by validation" and listed["value"] == path
    assert kinds["value"] == "samples" and "attention" not in [name for _, name in kinds["choices"]]
    assert "class='sample'" in full["models.analyse"](path, "samples", "", "")
    assert "no analysis" in full["models.analyse"](path, "nothing", "", "")
    assert label.startswith("bigram")


def test_the_row_that_is_clicked_is_opened_wherever_it_stands_by_now(full):
    """By its number another model was opened when a training had ended since the table was drawn."""
    table, *_ = full["models.refresh"]()
    rows = table["value"]
    for row in rows:
        event = SimpleNamespace(index=[(rows.index(row) + 1) % len(rows), 0], row_value=row)
        listed, *_ = full["models.open_row"](event)
        folder, _, run = row[-1].rpartition(" · ")
        assert folder in listed["value"] and f"/{run}.checkpoints/" in listed["value"]
    with pytest.raises(gr.Error, match="refresh the list"):
        full["models.open_row"](SimpleNamespace(index=[0, 0], row_value=["gone"]))


def test_text_is_written_and_asked_about_at_any_place(full):
    choice, _ = full["write.open_page"](MINE)
    path = choice["value"]
    story, tokens, written, _ = full["write.compose"](path, "Ba", 0.8, 0, 1, 3, 8)
    assert story.startswith("<p><span class='given'>Ba</span>") and "data-place='1'" in tokens
    about = full["write.explain"](written, SimpleNamespace(place=1))
    assert "<b>a</b> had probability" in about and "entropy" in about and "What drove it" in about
    for outside in (-1, 99, None, "1"):
        assert "Choose a token" in full["write.explain"](written, SimpleNamespace(place=outside))
    asked = SimpleNamespace(session_hash="x", query_params={"checkpoint": "elsewhere.safetensors"})
    assert full["write.open_page"](asked)[0]["value"] == "elsewhere.safetensors"


def test_a_duel_shows_verdict_curves_samples_and_the_text_read_by_both(full):
    first, second, said = full["duel.open_page"]()
    assert "Choose two" in said and first["value"] != second["value"]
    verdict, plot, *texts, coloured = full["duel.compare"](first["value"], second["value"])
    assert "python -m stats compare" in verdict and plot["visible"] and set(plot["value"]["line"]) == {"A", "B"}
    assert all("class='sample'" in text for text in texts)
    assert "class=coloured" in coloured and "blue where B reads it better" in coloured
    assert "same recipe" in words(full["duel.compare"](first["value"], first["value"]))


def test_a_duels_chart_is_sent_once(full):
    """One that was sent again while it appeared stayed empty now and then."""
    first, second, _ = full["duel.open_page"]()
    compare = next(
        f.fn for f in full.blocks.fns.values() if f.fn and f.fn.__qualname__.endswith("build.<locals>.compare")
    )
    sent = [plot for _, plot, *_ in compare(first["value"], second["value"])]
    assert sum("value" in plot for plot in sent) == 1 and sent[-1] == gr.skip()


def test_stories_are_graded_blind_to_the_end(full):
    one, two = (update["value"] for update in full["blind.open_page"]())
    shown, grade, _, made = full["blind.start"](one, two, "", 3)
    assert "Story 1 of 6" in shown and grade["visible"] and "slow" not in shown and "fast" not in shown
    with pytest.raises(gr.Error, match="choose a grade"):
        full["blind.graded"](None, made)
    for number in range(6):
        shown, grade, _, after = full["blind.graded"](1 + 3 * made.stories[number][0], made)
    assert "<h2>Result</h2>" in shown and not grade["visible"] and after is None
    assert shown.count("<span>1 · one</span>") == shown.count("<span>4 · two</span>") == 3
    assert len(list((full.places.home / "grades").glob("*.json"))) == 1


def test_a_series_is_judged_once_and_its_report_is_of_the_series_shown(full):
    folder, *_ = full["series.open_page"]()
    made = next(value for _, value in folder["choices"] if "a-series" in value)
    assert "Choose a series" in full["series.look"](None, "", 0.05, ())[0], "not that there is none"
    verdict, _, pictures, table, seen = full["series.look"](made, "", 0.05, ())
    assert "t-test" in verdict and pictures.count("<svg") == 2 and len(table) == 3
    assert full["series.look"](made, "", 0.05, seen) == [gr.skip()] * 5, "nothing is new"
    for other in (("3.5", 0.05), ("", 0.2)):
        assert full["series.look"](made, *other, seen)[0] != gr.skip()
    for wrong in (("nine", 0.05), ("", 0), ("inf", 0.05), ("", None)):
        assert "No verdict: " in full["series.look"](made, *wrong, ())[0]
    link = full["series.make"](made, "", 0.05)
    report = full.places.home / re.search(r"file=(\S+?)\?", link)[1]
    assert report.name == "a-series.html" and "seed-002" in report.read_text()
    with pytest.raises(gr.Error, match="alpha"):
        full["series.make"](made, "", 7)


def test_the_form_suggests_keeps_and_forgets(empty):
    choose, restore = empty["train._choose_model"], empty["train._restore"]
    names = list(recipes.Request.__dataclass_fields__)
    shown = dict(zip(names, choose("mlp")))
    assert shown["steps"]["value"] == 2000 and shown["learning_rate"]["visible"] and not shown["layers"]["visible"]
    kept = dict(zip(names, restore({"model": "mlp", "corpus": "names", "steps": 77, "seed": 3})))
    assert (kept["steps"]["value"], kept["seed"]["value"], kept["model"]["value"]) == (77, 3, "mlp")
    for nothing in (None, {}, {"model": "gone"}, {"model": "mlp", "corpus": "all"}):
        assert all(one == gr.skip() for one in restore(nothing))


def test_several_runs_are_queued_with_a_seed_each_and_all_checked_first(empty, monkeypatch):
    monkeypatch.setattr("lab.studio.jobs.Queue.work", lambda queue: None)  # nothing is trained here
    asked = recipes.Request("bigram", "names", steps=2, seed=5)
    given = [getattr(asked, name) for name in recipes.Request.__dataclass_fields__]
    values = empty["train.begin"](MINE, 2, *given)
    assert "queued" in values[1] and "seed 5" in values[1]
    queue = empty["train.open_page"](MINE)[0]["choices"]
    assert [re.search(r"seed (\d)", label)[1] for label, _ in queue] == ["6", "5"]
    for seeds in (0, 11, None, "2"):
        with pytest.raises(gr.Error, match="runs: from 1 to 10"):
            empty["train.begin"](MINE, seeds, *given)
    asked = recipes.Request("bigram", "names", steps=0)
    with pytest.raises(gr.Error, match="steps is 0"):
        empty["train.begin"](MINE, 2, *[getattr(asked, name) for name in recipes.Request.__dataclass_fields__])
    assert len(empty["train.open_page"](MINE)[0]["choices"]) == 2
    id = values[0]["value"]
    *_, removed, back = empty["train.remove"](id, MINE)
    assert removed == id and back["visible"]
    *_, back = empty["train.put_back"](id, MINE)
    assert not back["visible"] and len(empty["train.open_page"](MINE)[0]["choices"]) == 2
