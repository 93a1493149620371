"""What an analysis leaves: JSON, a picture, and one line for the summary page."""

import html
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.paths import write_text
from lab import plots
from lab.runlog import write_json


@dataclass(frozen=True)
class Finding:
    """`name` of the analysis, its one-line `summary`, its `data`, and where JSON and PNG lie. `html`: what a page shows
    instead of the picture, where text says it better; the picture may then be missing (None), if none was wanted."""

    name: str
    summary: str
    data: dict[str, Any]
    json_path: Path
    png_path: Path | None
    html: str = ""

    def noted(self, said: str) -> "Finding":
        """The same, with a remark in summary and JSON: of a text that is not the model's own, for example."""
        summary = f"{self.summary} ({said[0].upper()}{said[1:]}.)"
        write_json(self.json_path, {"analysis": self.name, "summary": summary, "text": said, **self.data})
        return replace(self, summary=summary)


def write_finding(out: Path, name: str, summary: str, data: dict[str, Any], figure: Any, shown_as: str = "") -> Finding:
    """Write <out>/<name>.json and .png (no picture for a `figure` of None); `shown_as` is HTML for pages.
    Raises OSError."""
    json_path = out / f"{name}.json"
    write_json(json_path, {"analysis": name, "summary": summary, **data})
    png_path = None if figure is None else plots.save(figure, out / f"{name}.png")
    return Finding(name, summary, data, json_path, png_path, shown_as)


PAGE_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222;
background:#fff;overflow-wrap:anywhere}
h1{font-size:1.7em} h2{font-size:1.15em;margin:1.6em 0 .2em} h3{font-size:1em;margin:1em 0 .1em} p{margin:.3em 0}
.drawn{overflow-x:auto} .drawn img{max-width:max(100%,900px);height:auto}
.rung{border-left:3px solid #0072b2;padding-left:.8em;margin:.8em 0}
table{border-collapse:collapse} td,th{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd;
overflow-wrap:break-word}
td:first-child,th:first-child{text-align:left} pre{background:#f6f6f6;padding:.7em;white-space:pre-wrap}
nav a{margin-right:.9em;white-space:nowrap} .samples td:last-child,.samples th,.parts td{text-align:left}
.samples td:last-child{white-space:pre-wrap;
overflow-wrap:anywhere} .legend{color:#555} .scrolls{overflow-x:auto}
@media(max-width:600px){body{margin:1em auto} td,th{padding:.2em .4em}}"""


def page(title: str, sections: list[str]) -> str:
    """One HTML page of ready sections."""
    meta = '<meta charset=utf-8><meta name=viewport content="width=device-width">'
    head = f"<!doctype html><html lang=en>{meta}<title>{html.escape(title)}</title>"
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *sections])
    return f"{head}<style>{PAGE_STYLE}</style><main>{body}</main></html>\n"


def drawn(source: str, words: str) -> str:
    """A picture for a page, with `words` for those who cannot see it. Where the page is narrow it is not made so small
    that nobody could read it, but can be moved sideways, with the keyboard too."""
    words = html.escape(words)
    picture = f'<img src="{html.escape(source)}" alt="{words}" loading=lazy>'
    return f'<div class=drawn tabindex=0 role=region aria-label="{words}">{picture}</div>'


def section(finding: Finding, folder: Path) -> str:
    """A finding as HTML: heading, its line, its text or picture, a link to the numbers."""
    picture = finding.png_path.relative_to(folder).as_posix() if finding.png_path else ""
    numbers = finding.json_path.relative_to(folder).as_posix()
    name = html.escape(finding.name.replace("_", " "))
    shown = finding.html or drawn(picture, finding.name.replace("_", " "))
    links = f'<a href="{numbers}">numbers</a>' + (
        f' <a href="{picture}">picture</a>' if finding.html and picture else ""
    )
    line = f"<p>{html.escape(finding.summary)} {links}</p>"
    return f'<h2 id="{finding.name}">{name}</h2>{line}{shown}'


def write_summary(out: Path, findings: list[Finding], title: str = "What the checkpoints show") -> Path:
    """<out>/index.html: one line and one picture a finding."""
    path = out / "index.html"
    write_text(path, page(title, [section(f, out) for f in findings]))
    return path
