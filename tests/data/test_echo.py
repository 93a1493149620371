"""Output that nobody can read: a reader that has gone, a full disk behind standard output."""

import os
import subprocess
import sys

import numpy as np
import pytest

from data import shards

GONE, FULL = "a reader that has gone", "a full disk"


def ended(out: str, *words: str) -> tuple[int, str]:
    """(exit code, standard error) of a Python whose standard output is of no use."""
    if out == FULL:
        to = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, to = os.pipe()
        os.close(reader)
    try:
        done = subprocess.run([sys.executable, *words], stdout=to, stderr=subprocess.PIPE, text=True, timeout=60)
    finally:
        os.close(to)
    return done.returncode, done.stderr


@pytest.mark.parametrize("out", [GONE, FULL])
def test_work_goes_on_when_nobody_reads_of_it(out, tmp_path):
    code = (
        "import sys; from data.echo import tell; [tell(f'line {i}') for i in range(9)]; print('done', file=sys.stderr)"
    )
    assert ended(out, "-c", code) == (0, "done\n")


@pytest.mark.parametrize("out", [GONE, FULL])
def test_what_is_there_to_be_read_ends_with_a_code_and_no_traceback(out, tmp_path):
    shards.write_shard(tmp_path / "a.bin", np.zeros(9, dtype=np.uint8))
    for module, *words in (("data.look", str(tmp_path / "a.bin"), "--documents=0"), ("records.series", "--help")):
        said = f"{module}: No space left on device\n" if out == FULL else ""
        assert ended(out, "-m", module, *words) == (5, said)
