"""Interleaved A/B timing in one process, and intervals that can be believed.

A machine drifts: clocks ramp, neighbours come and go. Timing A a hundred times and then B a hundred times measures the
drift as well. Here every round runs each provider once, close together, in an order that changes from round to round;
what is reported is the median over rounds of the *ratio within a round*, with an order-statistic interval: exact for
any distribution, no resampling, no normality.

On a GPU a small call takes less time than the host needs to launch it, and events around it measure the host. There
calls are captured in a CUDA graph, which the device replays without the host (:class:`Captured`), on operands that take
turns and together exceed the cache (:func:`rotations`): in a model, too, an op finds its weights in memory.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Stopwatch = Callable[[Callable[[], object]], float]
"""Runs a function once and returns the nanoseconds it took."""

CONFIDENCE = 0.95
MIN_ROUNDS = 6
"""With fewer rounds not even the interval from the smallest to the largest value covers the median with 95 %."""

GRAPH_NANOSECONDS = 3e5
"""What one replay should take: the gap between two launches of a graph is about a hundredth of it."""
MOST_CAPTURED = 1000
"""Calls in one graph, so that a call that takes no time at all makes no graph without end."""
MOST_ROTATIONS = 64
"""Sets of operands. Each has to be filled with values and, in a graph, called at least once."""
SAMPLES = 11
"""Times of which :func:`median_time` gives the median."""


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


def cuda_events(cover: Callable[[], object] | None = None) -> Stopwatch:
    """A stopwatch on the current CUDA stream: the time between an event before the work and one after it.

    Work that is :class:`Captured` counts per call, and is replayed once more, untimed, in front of the first event: the
    host launches what is timed while the device is busy with that.

    Args:
        cover: untimed work in front of whatever else is timed, to the same end. Without it the device waits for the
            host, and work that is launched more slowly than it runs shows the host's time.
    """

    def measure(run: Callable[[], object]) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        before = run if isinstance(run, Captured) else cover
        torch.cuda.synchronize()  # what is still queued belongs to somebody else
        if before is not None:
            before()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e6 / (run.calls if isinstance(run, Captured) else 1)  # from milliseconds

    return measure


def stopwatch_for(device: torch.device) -> Stopwatch:
    """CUDA events on a GPU, the host's monotonic clock elsewhere."""
    return cuda_events() if device.type == "cuda" else wall_clock()


class CaptureError(RuntimeError):
    """Work that cannot be captured in a CUDA graph."""


class Captured:
    """Calls in a CUDA graph: the device's time for them and nothing of the host's. Calling it replays the graph once.

    The calls are made in turn, all of them once and then again until a replay takes :data:`GRAPH_NANOSECONDS`. As many
    results as there are calls are alive at a time, so that results as well as operands are in other memory each time.

    Attributes:
        calls: how many calls a replay makes.
    """

    def __init__(
        self,
        calls: Sequence[Callable[[], object]],
        device: torch.device,
        ready: Callable[[], object] | None = None,
    ) -> None:
        """Warms up and captures, on a side stream.

        Args:
            calls: functions that do the same work, each on operands of its own. They may run the backward of an
                autograd graph whose forward ran in the same :func:`side_stream`.
            device: a CUDA device.
            ready: called once for every call that is made, before the first of them: what a call needs and what is not
                to be timed, such as the forward before a backward that frees its graph.

        Raises:
            CaptureError: the calls wait for the device, or do something else that no graph can hold. Waits are looked
                for in a warm-up in which PyTorch refuses them, since a capture that fails half way may leave the
                allocator and the random number generator in a state that fails everybody after it.
            ValueError: no calls.
        """
        if not calls:
            raise ValueError("calls must hold at least one function, got none")
        self._calls = calls
        self._ready = ready
        with torch.cuda.device(device), side_stream(device):
            for waits in (contextlib.nullcontext, contextlib.nullcontext, _waits_refused):  # the first calls may wait
                self._get_ready(len(calls))
                with waits():
                    self._run(len(calls))
            self._capture(len(calls))
            wanted = GRAPH_NANOSECONDS / max(cuda_events()(self), 1.0)
            repeats = min(math.ceil(wanted / len(calls)), MOST_CAPTURED // len(calls))
            if repeats > 1:
                self._capture(repeats * len(calls))

    def __call__(self) -> None:
        self._graph.replay()

    def _run(self, count: int) -> None:
        alive: deque[object] = deque(maxlen=len(self._calls))
        for call in itertools.islice(itertools.cycle(self._calls), count):
            alive.append(call())

    def _get_ready(self, count: int) -> None:
        if self._ready is not None:
            for _ in range(count):
                self._ready()

    def _capture(self, count: int) -> None:
        self._get_ready(count)
        graph = torch.cuda.CUDAGraph()
        # twice: the end of a capture that broke off raises as well, and says less
        with _blamed_on_capture(), torch.cuda.graph(graph, stream=torch.cuda.current_stream()), _blamed_on_capture():
            self._run(count)
        self._graph, self.calls = graph, count


@contextlib.contextmanager
def _blamed_on_capture() -> Iterator[None]:
    """What the block raises becomes a :class:`CaptureError`."""
    try:
        yield
    except Exception as error:
        for known in (error, error.__context__):
            if isinstance(known, CaptureError):
                raise known from known.__cause__
        message = next(iter(str(error).splitlines()), "")
        raise CaptureError(f"cannot be captured in a CUDA graph: {type(error).__name__}: {message}") from error


@contextlib.contextmanager
def _waits_refused() -> Iterator[None]:
    """Operations of PyTorch that would wait for the device raise :class:`CaptureError`."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")  # that it does not detect all
        torch.cuda.set_sync_debug_mode("error")
    try:
        with _blamed_on_capture():
            yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextlib.contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """On a GPU, work in the block goes to a stream of its own, unless the current one is no default stream already.

    Nothing can be captured on a default stream, and a backward runs on the stream that its forward ran on: a forward
    whose backward is to be captured belongs into such a block, and the capture into the same. On a CPU it does nothing.
    """
    if device.type != "cuda" or torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        yield
        return
    outer, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    side.wait_stream(outer)
    try:
        with torch.cuda.stream(side):
            yield
    finally:
        outer.wait_stream(side)


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A function that makes the next of the calls each time, for ever."""
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def prepared(calls: Sequence[Callable[[], object]], device: torch.device) -> Callable[[], object]:
    """What a :func:`stopwatch_for` the device times: :class:`Captured` calls on a CUDA device; elsewhere a function
    that makes the next of them each time, after all have been made once.

    A call that cannot be captured raises rather than being timed in another way: its figure would have the host's time
    in it and stand beside others that have not. Who wants that figure nevertheless catches the error and says so beside
    it: ``median_of(in_turn(calls), device)``.

    Args:
        calls: functions that do the same work, each on operands of its own; :func:`rotations` says how many keep the
            operands out of the cache.

    Raises:
        CaptureError: on a CUDA device, calls that wait for it or that no graph can hold for another reason.
        ValueError: no calls.
    """
    if device.type == "cuda":
        return Captured(calls, device)
    if not calls:
        raise ValueError("calls must hold at least one function, got none")
    for call in calls:
        call()
    return in_turn(calls)


def median_of(run: Callable[[], object], device: torch.device) -> float:
    """Nanoseconds of a :func:`prepared` call, the median of :data:`SAMPLES` times."""
    stopwatch = stopwatch_for(device)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        return statistics.median(stopwatch(run) for _ in range(SAMPLES))


def median_time(calls: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Nanoseconds of one call, the median of :data:`SAMPLES` times of the :func:`prepared` calls.

    Raises:
        CaptureError: on a CUDA device, calls that wait for it or that no graph can hold for another reason.
        ValueError: no calls.
    """
    return median_of(prepared(calls, device), device)


def rotations(bytes_per_call: int, device: torch.device) -> int:
    """How many sets of operands together exceed twice the last cache, so that each has left it when its turn comes.

    At least 1, at most :data:`MOST_ROTATIONS`: with calls of less than a thirty-second of the cache, part of the
    operands stays in it. Together they take no more than twice the cache and one set.

    Args:
        bytes_per_call: of all tensors that a call reads or writes.

    Raises:
        ValueError: a call without bytes.
    """
    from .roofs import cache_bytes  # which imports the stopwatches of this module

    if bytes_per_call < 1:
        raise ValueError(f"bytes_per_call must be positive, got {bytes_per_call}")
    return min(2 * cache_bytes(device) // bytes_per_call + 1, MOST_ROTATIONS)


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
