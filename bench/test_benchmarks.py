"""The cases of ``bench ops`` under pytest-benchmark, for those who keep and compare their figures with it::

    pytest bench/ --benchmark-autosave
    pytest bench/ --benchmark-compare --benchmark-compare-fail=median:5%
    pytest bench/ --all-cases -k "attention and beit3_fast"

The quick cases run unless ``--all-cases`` is given. Parity comes first as in ``bench ops``: who breaks the rule gets no
time; ours or the reference fails the test, a peer is skipped with the reason. Before each call, untimed, the caches are
emptied and the forward of a backward is run. Unlike ``bench ops`` this times one provider after the other, so what
the machine did meanwhile is in a comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beit3_fast.bench.machine import default_device
from beit3_fast.bench.op_cases import OP_CASES, QUICK_OP_CASES, OpCase
from beit3_fast.bench.op_providers import OURS, PROVIDERS, REFERENCE, select_providers
from beit3_fast.bench.ops import WARMUP, Call, OpResult, run_case
from beit3_fast.bench.roofs import cache_bytes
from beit3_fast.bench.timing import MIN_ROUNDS

ROUNDS = 12


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = OP_CASES if metafunc.config.getoption("--all-cases") else QUICK_OP_CASES
    entries = [(case, provider.name) for case in cases for provider in PROVIDERS if case.op in provider.builds]
    names = [f"{case.name}-{provider}" for case, provider in entries]
    metafunc.parametrize(("case", "provider"), entries, ids=names)


@functools.lru_cache(maxsize=1)  # tests of a case follow each other; more would hold the memory of all cases
def judged(case: OpCase, device: torch.device, quick: bool) -> tuple[OpResult, dict[str, Call]]:
    """The case's parity, and the calls of those that passed."""
    calls: dict[str, Call] = {}

    def keep(call: Any) -> float:
        """A stopwatch that keeps the calls for pytest-benchmark and stops nothing."""
        calls[call.provider.name] = call
        return 1.0

    return run_case(case, select_providers(quick=quick), device=device, rounds=MIN_ROUNDS, stopwatch=keep), calls


@functools.cache
def evicting(device: torch.device) -> Callable[[], object]:
    """Empties the caches: twice the last one is read and written."""
    buffer = torch.zeros(2 * cache_bytes(device) // 4, device=device)
    return lambda: buffer.add_(1)


def test_op(case: OpCase, provider: str, request: pytest.FixtureRequest) -> None:
    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.skip("pytest-benchmark is not installed, or switched off: pip install 'beit3_fast[bench]'")
    benchmark = request.getfixturevalue("benchmark")
    device = torch.device(request.config.getoption("--op-device") or default_device())
    result, calls = judged(case, device, not request.config.getoption("--all-cases"))
    if result.skipped is not None:
        pytest.skip(result.skipped)
    outcome = next(outcome for outcome in result.outcomes if outcome.provider == provider)
    if outcome.missing is not None:
        pytest.skip(outcome.missing)
    if provider not in calls:
        reason = outcome.failure or (outcome.verdict.reason if outcome.verdict else "")
        (pytest.fail if provider in (OURS.name, REFERENCE.name) else pytest.skip)(f"{provider}: {reason}")
    call, evict = calls[provider], evicting(device)

    def before() -> None:
        call.ready()
        evict()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def timed() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = case.name
    benchmark.extra_info.update(provider=provider, flops=case.flops(), bytes=case.bytes(), device=device.type)
    benchmark.pedantic(timed, setup=before, rounds=ROUNDS, warmup_rounds=WARMUP)
