"""Every call that is compiled beforehand belongs to one process, and a process does its share."""

from __future__ import annotations

import os
import subprocess
import sys

from . import warm
from .machine import REAL


def test_shares_are_complete_and_even() -> None:
    whole = sum(len(calls) for calls in warm.shares(1))
    for count in (1, 2, 16):
        dealt = warm.shares(count)
        assert len(dealt) == count
        assert sum(len(calls) for calls in dealt) == whole
        assert all(dealt)


def test_a_process_does_its_share() -> None:
    """The lightest of a hundred shares: nothing here, so what fails is how the process is started."""
    last = 0 if REAL else len(warm.shares(100)) - 1
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-m", "gpu.warm", str(last), "100"], env=environment, check=True)


def test_what_the_processes_call() -> None:
    """Here, one of each kind."""
    first = {call.func: call for calls in warm.shares(1) for call in calls}
    for call in first.values():
        call()
