"""A small GPT that was trained on a file of its own: most tests of the microscope look at it."""

import pytest

from lab import cli, train

GREEK = "μῆνιν ἄειδε θεὰ\nοὐλομένην ἣ μυρί᾽\nπολλὰς δ᾽ ἰφθίμους\nἡρώων αὐτοὺς δὲ\nοἰωνοῖσί τε πᾶσι\n"


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """(folder of the run, its text): bytes, two layers with a skip, three checkpoints."""
    folder = tmp_path_factory.mktemp("own")
    path = folder / "greek.txt"
    path.write_text(GREEK * 3, encoding="utf-8")
    flags = "--model=gpt --data=names --tokens=byte --model_dim=16 --steps=6 --row_tokens=32 --batch_tokens=128"
    more = f"--unet_skips=0>1 --checkpoints=3 --path={path} --output_dir={folder / 'run'}"
    assert cli.run(train.main, f"{flags} {more}".split()) == 0
    return folder / "run", path
