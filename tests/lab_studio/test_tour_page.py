"""The tour's page: every rung is told, and every link leads somewhere; its training is not run here."""

import re
from pathlib import Path
from urllib.parse import unquote

from PIL import Image

from lab.analyses import Finding
from lab.tour import LADDER, write_page


def tour_page(folder: Path) -> Path:
    """The page of a tour whose numbers are made up."""
    (folder / "runs").mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (1900, 300), "gray").save(folder / f"{name}.png")
        (folder / f"{name}.json").write_text("{}")
    names = [*LADDER, "text", "sums"]
    pages = {name: folder / "runs" / f"{name}.html" for name in names}
    for path in pages.values():
        path.write_text("a run")
    table = [
        {"rung": rung, "parameters": 10_000 + n, "mean": 2.0 + n, "half_width_95": 0.01 if n else None, "losses": [1.0]}
        for n, rung in enumerate(LADDER)
    ]
    found = [Finding(n, f"{n} said", {"table": table}, folder / f"{n}.json", folder / f"{n}.png") for n in "ab"]
    pictures = [("A picture", folder / "a.png")]
    return write_page(folder, found[0], found[1:], pictures, pages, ["Ann", "x" * 80], "python -m stats compare " * 3)


def test_every_rung_is_told_with_its_source_and_the_page_of_its_run(tmp_path):
    page = tour_page(tmp_path / "a tour")
    text = page.read_text()
    for number, (rung, told) in enumerate(LADDER.items()):
        part = text.partition(f'id="rung-{rung}"')[2].partition("</div>")[0]
        assert told.idea.replace("'", "&#x27;") in part and told.look in part and f"{2.0 + number:.4f}" in part
        source, run = (page.parent / unquote(link) for link in re.findall('href="([^"]+)"', part))
        assert source.stem == {"counts": "bigram"}.get(rung, rung) and "(LanguageModel)" in source.read_text()
        assert run.read_text() == "a run" and run.stem == rung
    links = [unquote(link) for link in re.findall('(?:href|src)="([^"#]+)"', text)]
    assert links and all((page.parent / link).exists() for link in links) and "http" not in text
    assert all(f'id="{name}"' in text or f"id={name}" in text for name in re.findall('href="?#([^">]+)', text))
