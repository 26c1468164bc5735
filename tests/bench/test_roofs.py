"""The machine's limits: what is measured, what is taken for a roof, and what a report says of it."""

from __future__ import annotations

import beit3_fast.bench.probe as probe
import beit3_fast.bench.roofs as roofs
import pytest
import torch
from beit3_fast.bench.probe import Limits, Peak

CPU = torch.device("cpu")
ROOFS = roofs.Roofs(1e10, {torch.float32: 1e11, torch.bfloat16: 2e11})


@pytest.fixture
def toy(monkeypatch):
    """Small arrays, one way to multiply, and a stopwatch of 2 ms at best."""
    monkeypatch.setattr(roofs, "cache_bytes", lambda device: 1000)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    times = iter([4e6, 2e6, 8e6, 4e6, 4e6] * 4)

    def stopwatch(run):
        run()
        return next(times)

    return stopwatch


def unavailable(threads, array_bytes):
    raise probe.Unavailable("no C++ compiler was found")


def test_share_of_the_roof_that_binds():
    assert ROOFS.share(1e9, 1e6, torch.float32, 2e7) == (pytest.approx(0.5), "matrix")  # 10 of 20 ms
    assert ROOFS.share(1e9, 1e6, torch.bfloat16, 2e7) == (pytest.approx(0.25), "matrix")
    assert ROOFS.share(1e9, 1.5e8, torch.float32, 2e7) == (pytest.approx(0.75), "memory")
    assert ROOFS.share(0, 1e8, torch.float32, 4e7) == (pytest.approx(0.25), "memory")


def test_a_share_is_of_the_best_product_and_not_of_the_peak():
    above = roofs.Roofs(1e10, {torch.float32: 1e11}, {torch.float32: Peak(1e11, 4e11)})
    assert above.share(1e9, 0, torch.float32, 2e7) == (pytest.approx(0.5), "matrix")


def test_roofs_are_the_best_of_what_was_measured(toy, monkeypatch):
    """By PyTorch alone where there is no probe, and the report says so."""
    monkeypatch.setattr(probe, "measure", unavailable)
    found = roofs.measure(CPU, [torch.float32, torch.bfloat16, torch.float32], size=32, stopwatch=toy)
    assert found.matrix == {torch.float32: 2 * 32**3 / 2e-3, torch.bfloat16: 2 * 32**3 / 2e-3}
    assert found.bandwidth == 2 * 2**28 / 2e-3
    assert found.peak == {}
    assert found.document()["probe"] == "by PyTorch alone, without the C++ probe: no C++ compiler was found"
    assert found.line().endswith(
        "GFLOP/s in bfloat16; by PyTorch alone, without the C++ probe: no C++ compiler was found"
    )


def test_the_probe_adds_peaks_and_the_faster_pass_is_the_roof(toy, monkeypatch):
    asked = []

    def measure(threads, array_bytes):
        asked.append((threads, array_bytes))
        peaks = {torch.float32: Peak(2e9, 4e9), torch.bfloat16: Peak(1e6, 2e6)}
        return Limits(peaks, {"read": 3e12, "copy": 1.0}, {torch.float32: "avx2", torch.bfloat16: "avx2"})

    monkeypatch.setattr(probe, "measure", measure)
    found = roofs.measure(CPU, [torch.float32, torch.bfloat16], size=32, stopwatch=toy)
    assert asked == [(torch.get_num_threads(), 2**28)]
    assert found.bandwidth == 3e12
    assert found.memory == {"PyTorch's copy": 2 * 2**28 / 2e-3, "read": 3e12, "copy": 1.0}
    # what a product exceeds is no peak
    assert found.peak == {torch.float32: Peak(2e9, 4e9)}
    assert found.document() == {
        "bandwidth_gb_s": 3000,
        "matrix_gflop_s": {"float32": pytest.approx(0.032768), "bfloat16": pytest.approx(0.032768)},
        "peak_gflop_s": {"float32": {"core": 2, "all": 4}},
        "memory_gb_s": {"PyTorch's copy": pytest.approx(268.435456), "read": 3000, "copy": pytest.approx(1e-9)},
        "probe": "peaks by the C++ probe, avx2",
    }
    assert found.line() == (
        "measured roofs: memory 3e+03 GB/s; matrix products 0.0328 GFLOP/s in float32 (peak 4 GFLOP/s), "
        "0.0328 GFLOP/s in bfloat16; peaks by the C++ probe, avx2"
    )


def test_where_float16_products_are_slow_those_of_float32_are_the_roof(toy, monkeypatch):
    monkeypatch.setattr(probe, "measure", unavailable)
    monkeypatch.setattr(roofs, "HALF_SIZE", 16)
    found = roofs.measure(CPU, [torch.float16], size=32, stopwatch=toy)
    assert found.matrix == {torch.float16: 2 * 32**3 / 2e-3}


def test_caches_have_a_size():
    assert 2**18 <= roofs.cache_bytes(CPU) <= 2**33
    free = roofs.free_memory(CPU)
    assert free is None or free > 2**20
