"""Shared fixtures. Without a GPU, Triton kernels run in Triton's interpreter, which must be chosen before the
first import of triton: so it is chosen here, once, for the whole test process."""

import os
from pathlib import Path

import pytest


def _has_gpu() -> bool:
    """True if a GPU driver answers; asked without importing torch, which would import triton."""
    return os.path.exists("/dev/nvidiactl") or os.path.exists("/dev/kfd")


if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")

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
