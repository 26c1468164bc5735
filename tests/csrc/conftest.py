"""The probe of a test's module, and every instruction set that this processor runs it at."""

from __future__ import annotations

import ctypes
import fcntl
import os

import pytest

from .probes import ISAS, build


@pytest.fixture(scope="module")
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The probe that the module names as ``PROBE``, compiled once in a run."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # its parent is that of all workers
        folder = folder.parent
    library = folder / f"{request.module.PROBE}.so"
    with library.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            build(library, [request.module.PROBE], ["-O2", "-fPIC"], ["-shared"])
    return ctypes.CDLL(str(library))


@pytest.fixture(params=range(len(ISAS)), ids=ISAS)
def isa(request: pytest.FixtureRequest, probe: ctypes.CDLL) -> int:
    """An index of ``ISAS``."""
    if request.param > probe.native_isa():
        pytest.skip(f"this processor does not run {ISAS[request.param]}")
    return request.param
