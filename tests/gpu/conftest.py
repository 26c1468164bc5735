"""On a GPU the kernels are compiled before the first test, by all cores."""

from __future__ import annotations

import os

import pytest

from .machine import REAL
from .warm import everything


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """Left out by GPU_TESTS_WARM=0, for a run of few tests, and by all but one of several workers."""
    if REAL and os.environ.get("GPU_TESTS_WARM") != "0" and os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        everything()
