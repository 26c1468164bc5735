from __future__ import annotations

import random
import statistics

import pytest
import torch
from beit3_fast.bench.timing import (
    MIN_ROUNDS,
    Timing,
    confidence_of_each,
    cuda_events,
    interleave,
    median_interval,
    rounds_needed,
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


def test_cuda_events_enclose_the_work(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("wait for event")

        def elapsed_time(self, end):
            assert isinstance(end, Event)
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("drain"))
    assert cuda_events()(lambda: log.append("work")) == 2.5e6
    assert log == ["drain", "record", "work", "record", "wait for event"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_cuda_events_on_a_gpu():
    x = torch.randn(2048, 2048, device="cuda")
    nanoseconds = stopwatch_for(torch.device("cuda"))(lambda: x @ x)
    assert 1e4 < nanoseconds < 1e9
