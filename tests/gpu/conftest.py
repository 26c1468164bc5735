"""On a GPU the kernels are compiled before the first test, by all cores."""

from __future__ import annotations

import os

import pytest

from .machine import REAL
from .warm import everything


@pytest.fixture(scope="session", autouse=True)
def _compiled() -> None:
    """Skipped by GPU_TESTS_WARM=0, for a run of few tests."""
    if REAL and os.environ.get("GPU_TESTS_WARM") != "0":
        everything(len(os.sched_getaffinity(0)))
