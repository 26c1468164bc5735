"""Interleaved A/B timing in one process, and intervals that can be believed.

A machine drifts: clocks ramp, neighbours come and go. Timing A a hundred times and then B a hundred times measures the
drift as well. Here every round runs each provider once, close together, in an order that changes from round to round;
what is reported is the median over rounds of the *ratio within a round*, with an order-statistic interval: exact for
any distribution, no resampling, no normality.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Stopwatch = Callable[[Callable[[], object]], float]
"""Runs a function once and returns the nanoseconds it took."""

CONFIDENCE = 0.95
MIN_ROUNDS = 6
"""With fewer rounds not even the interval from the smallest to the largest value covers the median with 95 %."""


@dataclass(frozen=True)
class Estimate:
    """A median and the ends of its confidence interval, of 95 % where nothing else is said."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """Nanoseconds per provider and round; entry ``i`` of every list was measured in round ``i``."""

    rounds: dict[str, list[float]]

    def time(self, provider: str) -> Estimate:
        """The provider's time in nanoseconds."""
        return median_interval(self.rounds[provider])

    def speedup(self, provider: str, over: str, confidence: float = CONFIDENCE) -> Estimate:
        """How many times faster ``provider`` is than ``over``: the median of the per-round ratios."""
        pairs = zip(self.rounds[over], self.rounds[provider], strict=True)
        return median_interval([slow / fast for slow, fast in pairs], confidence)

    def document(self, provider: str) -> dict[str, Any]:
        """For a report's JSON: median, low, high and every round's time in order, in milliseconds."""
        estimate = {name: nanoseconds / 1e6 for name, nanoseconds in asdict(self.time(provider)).items()}
        return estimate | {"rounds": [nanoseconds / 1e6 for nanoseconds in self.rounds[provider]]}


def wall_clock(clock: Callable[[], int] = time.perf_counter_ns) -> Stopwatch:
    """A stopwatch for work that is done when the call returns."""

    def measure(run: Callable[[], object]) -> float:
        start = clock()
        run()
        return float(clock() - start)

    return measure


def cuda_events() -> Stopwatch:
    """A stopwatch on the current CUDA stream: the time between an event before the work and one after it."""

    def measure(run: Callable[[], object]) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()  # what is still queued belongs to somebody else
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e6  # from milliseconds

    return measure


def stopwatch_for(device: torch.device) -> Stopwatch:
    """CUDA events on a GPU, the host's monotonic clock elsewhere."""
    return cuda_events() if device.type == "cuda" else wall_clock()


def interleave(
    providers: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 1,
    stopwatch: Stopwatch | None = None,
    after_round: Callable[[int], None] = lambda done: None,
) -> Timing:
    """Times providers against each other.

    Args:
        providers: name to function; calling it does the work once.
        rounds: how often each is timed; at least ``MIN_ROUNDS``.
        warmup: untimed calls of each before the first round.
        stopwatch: how one call is timed; the host's clock by default.
        after_round: called with the number of finished rounds, to show progress.

    Raises:
        ValueError: no providers, too few rounds or a negative warm-up.
    """
    check_rounds(rounds)
    if not providers:
        raise ValueError("providers must name at least one function, got none")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    stopwatch = stopwatch or wall_clock()
    for run in providers.values():
        for _ in range(warmup):
            run()
    times: dict[str, list[float]] = {name: [] for name in providers}
    for done in range(rounds):
        for name in _order(list(providers), done):
            times[name].append(stopwatch(providers[name]))
        after_round(done + 1)
    return Timing(times)


def rounds_needed(confidence: float) -> int:
    """The fewest rounds that give an interval of ``confidence``: from the smallest to the largest of n values it covers
    the median with 1 - 2^(1-n)."""
    return math.ceil(1 - math.log2(1 - confidence))


def confidence_of_each(intervals: int) -> float:
    """What each of so many intervals needs for all of them to cover what they should with 95 % at once, however they
    depend on each other (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(intervals, 1)


def check_rounds(rounds: int) -> None:
    """Raises :class:`ValueError` if so few rounds cannot give a 95 % interval."""
    if rounds < MIN_ROUNDS:
        raise ValueError(f"rounds must be at least {MIN_ROUNDS} for a 95 % interval, got {rounds}")


def _order(names: list[str], round_index: int) -> list[str]:
    """Forth and back, and one place further every two rounds: nobody always runs first or behind the same neighbour."""
    shift = (round_index // 2) % len(names)
    order = names[shift:] + names[:shift]
    return order[::-1] if round_index % 2 else order


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Estimate:
    """The median of ``values`` and the narrowest symmetric pair of order statistics that covers it with ``confidence``.

    The true median lies below the k-th smallest of n independent values with probability P(Binomial(n, 1/2) < k), so
    counting in from both ends while twice that probability stays under what may miss gives the interval (Conover,
    Practical Nonparametric Statistics, 3.2).

    Raises:
        ValueError: fewer values than :func:`rounds_needed`.
    """
    n, needed = len(values), rounds_needed(confidence)
    if n < needed:
        raise ValueError(f"an interval of {100 * confidence:.4g} % needs at least {needed} rounds, got {n}")
    ordered = sorted(values)
    rank, tail = 0, 2.0**-n
    while 2 * (tail + math.comb(n, rank + 1) * 2.0**-n) <= 1 - confidence:
        rank += 1
        tail += math.comb(n, rank) * 2.0**-n
    return Estimate(statistics.median(ordered), ordered[rank], ordered[n - 1 - rank])
