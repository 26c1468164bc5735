from __future__ import annotations

import contextlib
import random
import statistics

import pytest
import torch
from beit3_fast.bench import roofs
from beit3_fast.bench.timing import (
    GRAPH_NANOSECONDS,
    MIN_ROUNDS,
    MOST_CAPTURED,
    MOST_ROTATIONS,
    Captured,
    CaptureError,
    Timing,
    confidence_of_each,
    cuda_events,
    in_turn,
    interleave,
    median_interval,
    median_time,
    rotations,
    rounds_needed,
    side_stream,
    stopwatch_for,
    wall_clock,
)


class Machine:
    """A clock that advances by what is "run" on it, with noise and drift of its own choosing."""

    def __init__(self, seed=0, noise=0.1, drift=0.0):
        self.now = 0
        self.calls = []
        self._random = random.Random(seed)
        self._noise = noise
        self._drift = drift

    def clock(self):
        return self.now

    def work(self, name, cost):
        def run():
            self.calls.append(name)
            slowdown = 1 + self._drift * len(self.calls)
            self.now += round(cost * slowdown * self._random.lognormvariate(0, self._noise))

        return run


def compare(machine, costs, rounds=20):
    providers = {name: machine.work(name, cost) for name, cost in costs.items()}
    return interleave(providers, rounds=rounds, stopwatch=wall_clock(machine.clock))


def test_the_same_work_twice_shows_no_difference():
    """The interval claims 95 %; of 200 comparisons of A with A about 10 may miss 1, and hardly ever 20."""
    missed = 0
    for seed in range(200):
        ratio = compare(Machine(seed), {"a": 10**6, "b": 10**6}).speedup("b", over="a")
        assert ratio.low <= ratio.median <= ratio.high
        missed += not ratio.low <= 1 <= ratio.high
    assert 1 <= missed <= 20


def test_a_real_difference_is_found():
    timing = compare(Machine(), {"slow": 1.5e6, "fast": 1e6}, rounds=40)
    ratio = timing.speedup("fast", over="slow")
    assert 1 < ratio.low <= 1.5 <= ratio.high < 2
    assert timing.time("fast").median == pytest.approx(1e6, rel=0.1)


def test_a_machine_that_slows_down_does_not_look_like_a_difference():
    """Twice as slow at the end as at the start: A first, B after would show B slower by half."""
    machine = Machine(noise=0.001, drift=1 / 80)
    ratio = compare(machine, {"a": 10**6, "b": 10**6}, rounds=40).speedup("b", over="a")
    assert ratio.low <= 1 <= ratio.high
    assert ratio.high - ratio.low < 0.05
    times = compare(Machine(noise=0.001, drift=1 / 80), {"a": 10**6}, rounds=80).rounds["a"]
    assert statistics.median(times[40:]) / statistics.median(times[:40]) > 1.2


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c", "d"]])
def test_order_of_the_rounds(names):
    machine = Machine()
    rounds = 2 * len(names) * 4
    compare(machine, dict.fromkeys(names, 100), rounds=rounds)
    assert machine.calls[: len(names)] == names, "each is warmed up once before any is timed"
    played = machine.calls[len(names) :]
    per_round = [played[i : i + len(names)] for i in range(0, len(played), len(names))]
    assert len(per_round) == rounds
    assert all(sorted(one) == names for one in per_round)
    for position in range(len(names)):
        assert {one[position] for one in per_round} == set(names), "everyone plays in every position"
    for there, back in zip(per_round[::2], per_round[1::2], strict=True):
        assert back == there[::-1], "what a neighbour leaves behind falls on both sides alike"
    places = {name: sum(one.index(name) for one in per_round) for name in names}
    assert len(set(places.values())) == 1, "and in none more often than the others"


def test_warm_up_is_not_timed():
    machine = Machine(noise=0)
    costs = iter([10**9, 10**9, *[100] * MIN_ROUNDS])

    def run():
        machine.now += next(costs)

    timing = interleave({"a": run}, rounds=MIN_ROUNDS, warmup=2, stopwatch=wall_clock(machine.clock))
    assert timing.rounds == {"a": [100.0] * MIN_ROUNDS}


def test_ratios_pair_the_runs_of_one_round():
    timing = Timing({"a": [1.0, 10.0, 100.0, 1.0, 10.0, 100.0], "b": [2.0, 20.0, 200.0, 2.0, 20.0, 200.0]})
    assert timing.speedup("a", over="b").median == 2.0
    assert timing.speedup("a", over="b").low == timing.speedup("a", over="b").high == 2.0


@pytest.mark.parametrize(
    ("n", "rank"), [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (30, 10), (50, 18), (100, 40)]
)
def test_interval_ranks_are_those_of_the_printed_tables(n, rank):
    """Ranks of the 95 % interval of a median (Conover, Practical Nonparametric Statistics; n >= 6), counted from 1."""
    values = list(range(1, n + 1))
    random.Random(n).shuffle(values)
    estimate = median_interval(values)
    assert (estimate.low, estimate.high) == (rank, n + 1 - rank)
    assert estimate.median == statistics.median(values)


@pytest.mark.parametrize(("n", "confidence", "rank"), [(8, 0.99, 1), (10, 0.99, 1), (20, 0.99, 4), (20, 0.999, 3)])
def test_a_higher_confidence_takes_wider_intervals(n, confidence, rank):
    estimate = median_interval(range(1, n + 1), confidence)
    assert (estimate.low, estimate.high) == (rank, n + 1 - rank)


def test_rounds_that_a_confidence_needs():
    """The widest interval, from the smallest value to the largest, misses when all lie on one side of the median."""
    assert rounds_needed(0.95) == MIN_ROUNDS
    for intervals in (1, 2, 10, 40, 100):
        needed, miss = rounds_needed(confidence_of_each(intervals)), 0.05 / intervals
        assert 2 * 0.5**needed <= miss < 2 * 0.5 ** (needed - 1)
    assert confidence_of_each(0) == confidence_of_each(1) == pytest.approx(0.95)


def test_a_document_has_milliseconds_and_every_round():
    times = [7e6, 2e6, 3e6, 4e6, 5e6, 6e6]
    assert Timing({"a": times}).document("a") == {
        "median": 4.5, "low": 2, "high": 7, "rounds": [7, 2, 3, 4, 5, 6]
    }  # fmt: skip


def test_progress_is_reported_per_round():
    seen = []
    interleave({"a": lambda: None}, rounds=7, after_round=seen.append)
    assert seen == list(range(1, 8))


def test_bad_input():
    with pytest.raises(ValueError, match="rounds must be at least 6 for a 95 % interval, got 5"):
        interleave({"a": lambda: None}, rounds=5)
    with pytest.raises(ValueError, match="providers must name at least one"):
        interleave({}, rounds=6)
    with pytest.raises(ValueError, match="warmup must be at least 0, got -1"):
        interleave({"a": lambda: None}, rounds=6, warmup=-1)
    with pytest.raises(ValueError, match="at least 6"):
        median_interval([1.0, 2.0])


def test_the_real_clock():
    timing = interleave({"a": lambda: sum(range(2000))}, rounds=6, stopwatch=stopwatch_for(torch.device("cpu")))
    assert all(1e3 < nanoseconds < 1e9 for nanoseconds in timing.rounds["a"])


# ---- on a GPU --------------------------------------------------------------------------------------------------------

GPU = torch.device("cuda")
LAUNCH = 10_000
"""Nanoseconds the host of the pretended GPU takes to launch a call or a graph."""


class Nanoseconds(int):
    """Of an event, which gives milliseconds: without the rounding."""

    def __mul__(self, factor):
        assert factor == 1e6
        return int(self)


class Stream:
    def __init__(self, device=None):
        self.done = 0  # when the device is through with what was put on it

    def wait_stream(self, other):
        self.done = max(self.done, other.done)


class PretendedGPU:
    """``torch.cuda`` with a host and a device whose clocks advance by what is run; ``log`` tells what happened."""

    def __init__(self, monkeypatch):
        self.host = 0
        self.launch = LAUNCH
        self.log = []
        self.default = self.current = Stream()
        self.graph = None  # what is being captured
        self.refuses_waits = "default"
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(gpu.host, gpu.current.done)
                gpu.log.append("record")

            def synchronize(self):
                gpu.host = max(gpu.host, self.at)
                gpu.log.append("wait for event")

            def elapsed_time(self, end):
                return Nanoseconds(end.at - self.at)

        class CUDAGraph:
            def __init__(self):
                self.costs = []

            def replay(self):
                gpu.log.append(f"replay {len(self.costs)}")
                gpu.put(sum(self.costs))

        @contextlib.contextmanager
        def graph(graph, stream):
            assert stream is gpu.current is not gpu.default, "what is on a default stream cannot be captured"
            gpu.graph = graph
            gpu.log.append("capture")
            try:
                yield
            except Exception:
                raise RuntimeError("operation failed due to a previous error during capture")  # noqa: B904
            finally:
                gpu.graph = None

        @contextlib.contextmanager
        def stream(stream):
            before, gpu.current = gpu.current, stream
            try:
                yield
            finally:
                gpu.current = before

        cuda = {
            "Event": Event,
            "CUDAGraph": CUDAGraph,
            "graph": graph,
            "stream": stream,
            "Stream": Stream,
            "device": lambda device: contextlib.nullcontext(),
            "current_stream": lambda device=None: gpu.current,
            "default_stream": lambda device=None: gpu.default,
            "synchronize": gpu.drain,
            "get_sync_debug_mode": lambda: gpu.refuses_waits,
            "set_sync_debug_mode": lambda mode: setattr(gpu, "refuses_waits", mode),
        }
        for name, value in cuda.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def put(self, cost):
        self.host += self.launch
        self.current.done = max(self.host, self.current.done) + cost

    def drain(self):
        self.host = max(self.host, self.current.done)
        self.log.append("drain")

    def call(self, name, cost, waits=False, captures=True):
        """A function that keeps the device busy for so many nanoseconds."""

        def run():
            self.log.append(name)
            if waits and self.refuses_waits == "error":
                raise RuntimeError("called a synchronizing CUDA operation\nand more")
            if self.graph is None:
                self.put(cost)
            elif captures:
                self.graph.costs.append(cost)
            else:
                raise RuntimeError("operation not permitted when stream is capturing")
            return name

        return run


@pytest.fixture
def gpu(monkeypatch):
    return PretendedGPU(monkeypatch)


def test_cuda_events_enclose_the_work(gpu):
    assert cuda_events()(gpu.call("work", 40_000)) == 40_000 + LAUNCH, "the device waited for the host"
    assert gpu.log == ["drain", "record", "work", "record", "wait for event"]


def test_covered_work_is_launched_in_time(gpu):
    watch = cuda_events(gpu.call("cover", 100_000))
    assert watch(gpu.call("work", 4_000)) == 4_000
    assert gpu.log == ["drain", "cover", "record", "work", "record", "wait for event"]


def test_calls_are_warmed_up_and_captured_in_turn(gpu):
    calls = [gpu.call(name, 2 * GRAPH_NANOSECONDS) for name in "ab"]
    captured = Captured(calls, GPU)
    assert captured.calls == 2
    assert gpu.log[:9] == [*"ababab", "capture", "a", "b"]
    assert gpu.log.count("capture") == 1, "it is long enough as it is"
    assert gpu.refuses_waits == "default"


def test_short_calls_are_repeated_until_the_graph_is_long_enough(gpu):
    """5 us of work behind 10 us of launching: the device's time is found, and no launch is in it."""
    calls = [gpu.call(name, 5_000) for name in "abc"]
    assert median_time(calls, GPU) == 5_000
    last = len(gpu.log) - gpu.log[::-1].index("capture")
    graph = gpu.log[last : gpu.log.index("drain", last)]
    assert "".join(graph) == "abc" * 20, "300 us"
    replays = [entry for entry in gpu.log[last:] if entry.startswith("replay")]
    assert len(replays) >= 10
    assert set(replays) == {"replay 60"}
    assert cuda_events()(calls[0]) == 5_000 + LAUNCH, "without the graph they would show the host"


def test_calls_of_no_length_make_no_graph_without_end(gpu):
    gpu.launch = 0
    assert Captured([gpu.call("a", 0)] * 3, GPU).calls == MOST_CAPTURED // 3 * 3


def test_results_stay_alive_until_all_others_have_been_made(gpu):
    """Otherwise each would be written to the memory of the one before, which is in the cache."""
    alive, most = [], []

    class Result:
        def __init__(self):
            alive.append(id(self))
            most.append(len(alive))

        def __del__(self):
            alive.remove(id(self))

    def call(name):
        run = gpu.call(name, 10_000)
        return lambda: (run(), Result())[1]

    Captured([call(name) for name in "abc"], GPU)
    assert max(most) == 4, "three, and the one just made"
    assert not alive


def test_what_comes_before_a_call_is_not_captured(gpu):
    pending = []

    def ready():
        assert gpu.graph is None
        pending.append(gpu.call("forward", 1_000)())

    def backward(name):
        call = gpu.call(name, 100_000)
        return lambda: (pending.pop(0), call())

    captured = Captured([backward("a"), backward("b")], GPU, ready)
    assert captured.calls == 4
    assert pending == []
    last = len(gpu.log) - gpu.log[::-1].index("capture")
    assert gpu.log[last - 5 : last] == [*["forward"] * 4, "capture"]
    assert cuda_events()(captured) == 100_000


@pytest.mark.parametrize(
    ("kind", "message"),
    [({"waits": True}, "called a synchronizing CUDA operation"), ({"captures": False}, "operation not permitted")],
)
def test_what_cannot_be_captured_is_said(gpu, kind, message):
    calls = [gpu.call("a", 1_000), gpu.call("b", 1_000, **kind)]
    with pytest.raises(CaptureError, match=f"^cannot be captured in a CUDA graph: RuntimeError: {message}"):
        median_time(calls, GPU)
    assert ("capture" in gpu.log) == ("captures" in kind), "who waits breaks no capture off"
    assert gpu.refuses_waits == "default"
    assert gpu.current is gpu.default


def test_a_mistake_is_not_taken_for_something_that_cannot_be_captured(gpu):
    def call():
        raise TypeError("a mistake")

    with pytest.raises(TypeError, match="a mistake"):
        median_time([call], GPU)


def test_captured_work_in_rounds(gpu):
    """Each is timed per call, though their graphs hold different numbers of calls."""
    providers = {
        "long": Captured([gpu.call("long", 400_000)], GPU),
        "short": Captured([gpu.call("short", 2_000)] * 2, GPU),
        "not captured": gpu.call("host", 4_000),
    }
    timing = interleave(providers, rounds=6, stopwatch=stopwatch_for(GPU))
    assert set(timing.rounds["long"]) == {400_000}
    assert set(timing.rounds["short"]) == {2_000}
    assert set(timing.rounds["not captured"]) == {4_000 + LAUNCH}


def test_a_side_stream_is_made_once(gpu):
    with side_stream(GPU):
        outer = gpu.current
        assert outer is not gpu.default
        gpu.put(50_000)
        with side_stream(GPU):
            assert gpu.current is outer
        assert gpu.current is outer
    assert gpu.current is gpu.default
    assert gpu.default.done == outer.done > 0, "what follows comes after it"


def test_elsewhere_the_wall_clock(monkeypatch):
    seen = []
    nanoseconds = median_time([lambda: seen.append("a"), lambda: seen.append("b")], torch.device("cpu"))
    assert 0 < nanoseconds < 1e8
    assert "".join(seen[:6]) == "ababab"
    with side_stream(torch.device("cpu")):
        pass


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_calls(gpu, device):
    with pytest.raises(ValueError, match="calls must hold at least one function, got none"):
        median_time([], torch.device(device))
    with pytest.raises(ValueError, match="calls must hold at least one function, got none"):
        Captured([], torch.device(device))


def test_in_turn():
    run = in_turn([lambda: "a", lambda: "b"])
    assert [run() for _ in range(3)] == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("bytes_per_call", "sets"),
    [(1, MOST_ROTATIONS), (2**20, 64), (3 * 2**20, 34), (2**25, 4), (2**26 - 1, 2), (100 * 2**20, 2), (2**30, 1)],
)
def test_operands_that_take_turns_exceed_twice_the_cache(bytes_per_call, sets, monkeypatch):
    monkeypatch.setattr(roofs, "cache_bytes", lambda device: 50 * 2**20)
    assert rotations(bytes_per_call, GPU) == sets
    assert sets == MOST_ROTATIONS or (sets - 1) * bytes_per_call <= 100 * 2**20 < sets * bytes_per_call


def test_a_call_without_bytes():
    with pytest.raises(ValueError, match="bytes_per_call must be positive, got 0"):
        rotations(0, torch.device("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cuda_events_on_a_gpu():
    x = torch.randn(2048, 2048, device="cuda")
    nanoseconds = stopwatch_for(torch.device("cuda"))(lambda: x @ x)
    assert 1e4 < nanoseconds < 1e9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
class TestGraphsOnAGPU:
    def test_a_small_call_takes_less_than_its_launch(self):
        x = torch.randn(64, 64, device="cuda")
        assert 500 < median_time([lambda: x + 1], GPU) < 5_000

    def test_a_backward_alone(self):
        with side_stream(GPU):
            x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
            out = x @ x
            nanoseconds = median_time(
                [lambda: torch.autograd.grad(out, x, torch.ones_like(out), retain_graph=True)], GPU
            )
        assert 1e4 < nanoseconds < 1e7

    def test_after_a_call_that_waits_everything_works(self):
        x = torch.randn(1024, device="cuda")
        with pytest.raises(CaptureError, match="synchronizing"):
            median_time([x.tolist], GPU)
        assert torch.randn(4, device="cuda").isfinite().all()
        assert median_time([lambda: x + 1], GPU) > 0
