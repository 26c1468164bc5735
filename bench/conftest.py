"""Options of ``pytest bench/``, the ops under pytest-benchmark."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("beit3_fast")
    group.addoption("--all-cases", action="store_true", help="every case of bench ops instead of the quick ones")
    group.addoption("--op-device", default=None, choices=["cpu", "cuda"], help="default: cuda when there is one")
