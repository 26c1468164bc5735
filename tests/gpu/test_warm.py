"""Every call that is compiled beforehand belongs to one process, and a process does its share."""

from __future__ import annotations

import pytest

from . import warm
from .machine import REAL


def test_shares_are_complete_and_even() -> None:
    whole = sum(len(calls) for calls in warm.shares(1))
    for count in (1, 2, 16):
        dealt = warm.shares(count)
        assert len(dealt) == count
        assert sum(len(calls) for calls in dealt) == whole
        assert all(dealt)


@pytest.mark.skipif(REAL, reason="a rehearsal: on a GPU all of it has run before the first test")
def test_a_process_does_its_share() -> None:
    """The last of a hundred shares: nothing, so what fails is how the process is started."""
    assert warm.start(99, 100).wait() == 0


@pytest.mark.skipif(REAL, reason="a rehearsal: on a GPU all of it has run before the first test")
def test_what_the_processes_call() -> None:
    """Here, one of each kind."""
    first = {call.func: call for calls in warm.shares(1) for call in calls}
    for call in first.values():
        call()
