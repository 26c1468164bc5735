"""Where the Triton kernels run in these tests: under Triton's interpreter, or compiled for sm_80 in a PTX simulator.

``TRITON_INTERPRET=1 pytest tests/kernels`` takes the interpreter; without it the launches need `ptxsim`, which runs the
compiled PTX on the CPU and checks bounds and races. Both run the same tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from beit3_fast.backend import use_backend
from beit3_fast.ops._triton import unfenced

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

# The interpreter's bf16 products are wrong and its casts to bf16 truncate (Triton 3.8).
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.bfloat16, torch.float16)

# Compiling takes a second or two for every shape and dtype; the interpreter can try many shapes instead.
EXAMPLES = 8 if INTERPRETED else 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "simulated_only" in item.keywords and INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="looks at compiled code; TRITON_INTERPRET=1 is set"))


def races_of(stats: Any) -> list[str]:
    """The races of a launch. Those that an old Triton's missing fence alone explains are its own, and known.

    `test_proxy_fences.py` holds on to that: a Triton that is said to leave the fences out is seen to do so.
    """
    known = unfenced() is not None
    return [race for race in stats.races if not (known and "race (proxy:" in race)]


@pytest.fixture
def launches() -> Callable[..., AbstractContextManager[list[Any]]]:
    """``with launches() as log:`` runs what is launched inside; `log` gets (kernel name, counts) when simulated."""

    @contextmanager
    def run(backend: str | None = "triton", **options: Any) -> Iterator[list[Any]]:
        with use_backend(backend) if backend else use_backend("auto"):
            if INTERPRETED:
                yield []
                return
            simulate = pytest.importorskip("ptxsim.simulate", reason="the PTX simulator is not installed")
            with simulate.simulated(**{"check_races": True, **options}) as log:
                yield log
            for name, stats in log:
                races = races_of(stats)
                assert not races, f"{name}: {races[:2]}"

    return run
