"""Shared fixtures. Triton kernels run in Triton's interpreter, which must be chosen before the first import of
triton: so it is chosen here, once, for the whole test process, unless that is for the tests that need a GPU."""

import os
import signal
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Only `-m gpu` sees a GPU. All other tests are the same on a machine with one: there too the kernels run in the
    interpreter, on the CPU."""
    expression = str(config.option.markexpr)
    if "gpu" not in expression or "not gpu" in expression:
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    # A shell has its background jobs ignore SIGINT and SIGQUIT, and nohup SIGHUP; a child ignores what its parent does:
    # tests of signals would wait for ever there. A handler of Python's, though it does nothing, is no child's.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real inputs (never in the repository): `TEST_DATA_DIR`, or ../shared/data beside the checkout."""
    folder = Path(os.environ.get("TEST_DATA_DIR", REPO.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real inputs at {folder}; name their folder in TEST_DATA_DIR")
    return folder
