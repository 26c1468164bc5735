"""How a figure of the report is timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from ..timing import median_time, rotations, stopwatch_for
from .setting import Setting

EAGER_CALLS = 9


def microseconds(make: Callable[[int], Callable[[], object]], bytes_per_call: int, setting: Setting) -> float:
    """Of one call on the device, in a CUDA graph over operands that take turns and so have left the cache.

    Args:
        make: the call on the operands of this number.
        bytes_per_call: of all that a call reads and writes; decides how many sets of operands there are.
    """
    count = 1 if setting.dry else rotations(bytes_per_call, setting.device)
    return median_time([make(index) for index in range(count)], setting.device) / 1e3


def eager_milliseconds(call: Callable[[], object], setting: Setting, calls: int = EAGER_CALLS) -> float:
    """Of one call as it is made in plain PyTorch, the host's time included where the device waits for the host."""
    stopwatch = stopwatch_for(setting.device)
    for _ in range(1 if setting.dry else 3):
        call()
    return statistics.median(stopwatch(call) for _ in range(1 if setting.dry else calls)) / 1e6


def captured_milliseconds(call: Callable[[], object], setting: Setting) -> float:
    """Of one replay of the call's CUDA graph."""
    return median_time([call], setting.device) / 1e6
