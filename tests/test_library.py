"""The code in docs/library.md runs as it stands, and the names that the page mentions exist."""

import importlib
import re
from pathlib import Path

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "library.md").read_text()


def test_the_code_of_the_page_runs(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in code.splitlines() if line]) <= 12
    exec(compile(code, "docs/library.md", "exec"), {})
    told = capsys.readouterr().out
    first, held_out = map(
        float, re.search(r"after 20 steps: (\S+) nats a byte, on held-out text (\S+)$", told, re.M).groups()
    )
    assert 1 < first < 5 and 1 < held_out < 5 and "\nOnce " in told


def test_the_names_of_the_page_exist():
    for name in re.findall(r"`((?:train_gpt|trainer|data)\.[A-Za-z_.]+)", PAGE):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name
