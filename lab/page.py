"""One page to keep: a run from outside and from inside, as one HTML file that needs nothing else, no network either.

    python -m lab.page RUN                          # lab/out/page.html: curve, samples, coloured text, maps, numbers
    python -m lab.page RUN --out=keep.html --prompt="Once upon a time"
    python -m lab.page RUN OTHER_RUN                # text coloured by where RUN is better than OTHER_RUN

RUN is a folder that lab.train or train_gpt.py wrote, or a checkpoint. A run's own text is found where it lay when it
was trained (or give --path); what cannot be shown is named with its reason.
"""

import base64
import html
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.paths import write_text
from lab import LabError, cli
from lab.analyses.curves import run_json, told_by
from lab.analyses.finding import Finding, drawn, page
from lab.analyses.menu import MENU, Look, fitting, look_at
from lab.checkpoints import best_checkpoint, find_checkpoints, load_checkpoint
from lab.cli import setting

# What the page shows, in this order, as far as it fits the model.
SHOWN = (
    "curve",
    "samples",
    "coloured",
    "attention",
    "logit_lens",
    "scalars",
    "inside",
    "losses",
    "entropy",
    "spelling",
    "next_token",
    "positions",
    "attribution",
    "attribution_layers",
    "embeddings",
    "pairs",
    "architecture",
)
MOST_JSON_BYTES = 300_000  # of the numbers of one analysis, kept in the page; more are left out
MOST_CHECKPOINTS = 8  # along training; more would only make the page slower


@dataclass(frozen=True)
class Keeping:
    """What the page is made of."""

    out: str = setting("lab/out/page.html", "file", "for the page")
    only: str = setting("", "names", "of analyses, with commas; '': all that fit")
    path: str = setting("", "file", "where the run's own text lies now")
    other: str = setting("", "file", "another text to look at, on purpose; the page says so")
    prompt: str = setting("", "text", "to continue, to colour, to map; '': from the run's validation text")
    text: str = setting("", "text", "to colour; '': the prompt")
    limit: int = setting(20_000, "characters", "scored of each split; 0: all", at_least=0)
    vocab: str = setting("", "folder", "GPT-2's encoder.json and vocab.bpe, where there is no network")


def thinned(paths: Sequence[Path], count: int = MOST_CHECKPOINTS) -> list[Path]:
    """At most `count` of them, first and last included."""
    if len(paths) <= count:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (count - 1))] for i in range(count)]


def look_of(places: Sequence[str], asked: Keeping, out: Path) -> Look:
    """The run at the first of `places` under the microscope, beside the kept checkpoint of the second."""
    vocab = asked.vocab or None
    along = [load_checkpoint(p, vocab) for p in thinned(find_checkpoints(places[0]))]
    final = load_checkpoint(best_checkpoint(places[0]), vocab)
    second = load_checkpoint(best_checkpoint(places[1]), vocab) if len(places) > 1 else None
    how: dict[str, Any] = {"path": asked.path, "other": asked.other, "chars": asked.limit, "second": second}
    return Look(along, final, out, asked_prompt=asked.prompt, asked_text=asked.text, pictures=False, **how)


def gather(places: Sequence[str], asked: Keeping, out: Path, say: Callable[[str], None]) -> tuple[list[str], Look]:
    """(sections of the page, the look); pictures and numbers lie in `out` meanwhile."""
    look = look_of(places, asked, out)
    wanted = [name.strip() for name in asked.only.split(",") if name.strip()]
    if unknown := sorted(set(wanted) - set(MENU)):
        raise LabError(f"--only={unknown[0]}: there are {', '.join(MENU)}")
    sections, left = [], []
    for name in dict.fromkeys(["curve", *(wanted or [n for n in SHOWN if n in fitting(look)])]):
        try:
            finding = look_at(look, name)
        except LabError as error:
            say(f"{name}: left out, {error}")
            left.append(f"<li>{html.escape(name.replace('_', ' '))}: {html.escape(str(error))}</li>")
            continue
        say(f"{name}: {finding.summary}")
        sections.append(section(finding, MENU[name].shows))
    if left:
        sections.append(f"<h2>What could not be shown</h2><ul>{''.join(left)}</ul>")
    return sections, look


def section(finding: Finding, shows: str) -> str:
    """A finding with everything in it: picture, coloured text or samples as text, and its numbers."""
    name = html.escape(finding.name.replace("_", " "))
    parts = [f'<h2 id="{finding.name}">{name}: {html.escape(shows)}</h2><p>{html.escape(finding.summary)}</p>']
    if finding.html:
        parts.append(finding.html)
    else:
        picture = base64.b64encode(finding.png_path.read_bytes()).decode()
        parts.append(drawn(f"data:image/png;base64,{picture}", finding.summary))
    numbers = finding.json_path.read_bytes()
    if len(numbers) <= MOST_JSON_BYTES:
        link = base64.b64encode(numbers).decode()
        href = f"data:application/json;base64,{link}"
        parts.append(f'<p><a download="{finding.name}.json" href="{href}">numbers</a></p>')
    return "\n".join(parts)


def facts(look: Look, place: str) -> str:
    """What the run was, as a table."""
    settings = ""
    rows = {"checkpoint": look.final.reading(), "parameters": f"{look.final.model.num_parameters():,}"}
    try:
        told = told_by(run_json(place))
        best, config = told.get("best"), told["config"]
        rows["steps"] = f"{told['validation'][-1]['step']:,}" if told["validation"] else ""
        if best and best.get("loss") is not None:
            rows["validation loss of the kept checkpoint"] = f"{best['loss']:.4f} at step {best['step']:,}"
        elif told.get("final_loss") is not None:
            rows["validation loss at the end"] = f"{told['final_loss']:.4f}"
        if told.get("test_loss") is not None:
            rows["test loss"] = f"{told['test_loss']:.4f}"
        if (floor := told.get("floor_whole", told.get("floor"))) is not None:  # the kept one is scored on all of it
            rows["loss of the grammar itself on that text"] = f"{floor:.4f}"
        if told.get("overlap"):
            rows["validation documents that stand in training too"] = f"{told['overlap']['val']:.1%}"
        settings = html.escape(json.dumps(config, sort_keys=True, indent=1))
    except LabError:
        pass  # a checkpoint alone
    cells = "".join(f"<tr><th scope=row>{html.escape(k)}<td>{html.escape(v)}</tr>" for k, v in rows.items() if v)
    told = f"<details><summary>all settings</summary><pre>{settings}</pre></details>" if settings else ""
    return f"<table class=facts>{cells}</table>{told}"


OWN_STYLE = """<style>.facts td{text-align:left;white-space:pre-wrap;overflow-wrap:anywhere}
.facts th{text-align:left;font-weight:600}</style>"""


def write_page(places: Sequence[str], asked: Keeping, say: Callable[[str], None] = lambda line: None) -> Path:
    """The page of a run; returns its path. Raises LabError, OSError."""
    with tempfile.TemporaryDirectory() as folder:
        sections, look = gather(places, asked, Path(folder), say)
        title = f"{look.final.name}: {look.final.label}"
        said = f"<p>{html.escape(look.texts.said)}</p>" if "texts" in vars(look) and look.texts.said else ""
        head = f"{OWN_STYLE}{facts(look, places[0])}{said}"
        path = Path(asked.out)
        write_text(path, page(title, [head, *sections]))
    return path


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    places, asked = cli.command(__doc__, words, Keeping, (1, 2))
    path = write_page(places, asked, lambda line: print(line, flush=True))
    print(f"page: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
