"""What this machine can do at most, measured: the rate of matrix products and of passes over memory.

The best of a few runs each, since a roof is what nothing exceeds. Every op is then placed under the roof that binds it.

Two figures stand beside each other for products. The *roof* is the best matrix product that PyTorch reaches: what
"share of the roof" is a share of, everywhere. The *peak* is the ceiling above it, multiply-adds that never leave the
registers, measured by the C++ probe (:mod:`.probe`) on a CPU; no product reaches it. For memory the roof is the fastest
pass that anybody makes: PyTorch's copy, or the probe's reading, copy or triad. Without the probe, PyTorch's figures
stand alone and ``probe`` says why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import probe
from .cases import dtype_name
from .probe import Peak
from .timing import Stopwatch, stopwatch_for

REPETITIONS = 5
HALF_SIZE = 512
"""Rows and columns of float16 matrices on a CPU, where their product may take seconds."""


@dataclass(frozen=True)
class Roofs:
    """A machine's limits.

    Attributes:
        bandwidth: bytes a second, read and written ones together, of the fastest of ``memory``.
        matrix: FLOP a second of the best matrix product in each dtype.
        peak: of multiply-adds in registers, by dtype; empty without the probe. A dtype whose products are faster than
            the probe's, as on a processor with matrix units, which the probe knows nothing of, is left out.
        memory: bytes a second by kind of pass.
        probe: what measured the peaks, or why there are none.
    """

    bandwidth: float
    matrix: dict[torch.dtype, float]
    peak: Mapping[torch.dtype, Peak] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    probe: str | None = None

    def share(self, flops: float, bytes_: float, dtype: torch.dtype, nanoseconds: float) -> tuple[float, str]:
        """How much of what the machine can do was done: the least time that ``flops`` products and ``bytes_`` of
        traffic can take, over the time they took; and which of the two binds, "matrix" or "memory"."""
        least = {"matrix": flops / self.matrix[dtype], "memory": bytes_ / self.bandwidth}
        binding = max(least, key=lambda name: least[name])
        return least[binding] / (nanoseconds * 1e-9), binding

    def document(self) -> dict[str, Any]:
        """For a report's JSON: ``bandwidth_gb_s``; ``matrix_gflop_s`` by dtype; ``peak_gflop_s`` by dtype, ``core``
        (one thread alone) and ``all``; ``memory_gb_s`` by kind of pass; ``probe``: null, what measured the peaks, or
        why nothing did."""
        return {
            "bandwidth_gb_s": self.bandwidth / 1e9,
            "matrix_gflop_s": {dtype_name(dtype): rate / 1e9 for dtype, rate in self.matrix.items()},
            "peak_gflop_s": {
                dtype_name(dtype): {"core": peak.core / 1e9, "all": peak.all / 1e9} for dtype, peak in self.peak.items()
            },
            "memory_gb_s": {kind: rate / 1e9 for kind, rate in self.memory.items()},
            "probe": self.probe,
        }

    def line(self) -> str:
        """The machine's roofs in a line."""
        rates = []
        for dtype, rate in self.matrix.items():
            above = f" (peak {_rate(self.peak[dtype].all)})" if dtype in self.peak else ""
            rates.append(f"{_rate(rate)} in {dtype_name(dtype)}{above}")
        found = f"; {self.probe}" if self.probe else ""
        return f"measured roofs: memory {self.bandwidth / 1e9:.3g} GB/s; matrix products {', '.join(rates)}{found}"


def _rate(flop_per_second: float) -> str:
    return (
        f"{flop_per_second / 1e12:.3g} TFLOP/s" if flop_per_second >= 1e12 else f"{flop_per_second / 1e9:.3g} GFLOP/s"
    )


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before memory; 64 MiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", file.read_text().strip())
        if found:
            sizes.append(int(found[1]) * {"K": 2**10, "M": 2**20}[found[2]])
    return max(sizes, default=64 * 2**20)


def free_memory(device: torch.device) -> int | None:
    """Bytes that a run may still take; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def measure(
    device: torch.device,
    dtypes: Iterable[torch.dtype],
    *,
    size: int | None = None,
    stopwatch: Stopwatch | None = None,
) -> Roofs:
    """Measures the roofs for products in ``dtypes``.

    Args:
        size: rows and columns of the matrices; by default large enough to fill the device.
        stopwatch: the device's own by default.
    """
    stopwatch = stopwatch or stopwatch_for(device)
    size = size or (8192 if device.type == "cuda" else 2048)
    matrix: dict[torch.dtype, float] = {}
    for dtype in dict.fromkeys(dtypes):
        if device.type == "cpu" and dtype == torch.float16:
            # few processors multiply it: the others do it in float32, or a hundred times more slowly
            half = _product_rate(min(size, HALF_SIZE), dtype, device, stopwatch)
            matrix[dtype] = max(
                half, matrix.get(torch.float32) or _product_rate(size, torch.float32, device, stopwatch)
            )
        else:
            matrix[dtype] = _product_rate(size, dtype, device, stopwatch)
    array_bytes = max(8 * cache_bytes(device), 2**28)
    memory = {"PyTorch's copy": _copy_rate(array_bytes, device, stopwatch)}
    peak: dict[torch.dtype, Peak] = {}
    by = None
    if device.type == "cpu":
        try:
            found = probe.measure(torch.get_num_threads(), array_bytes)
        except probe.Unavailable as reason:
            by = f"by PyTorch alone, without the C++ probe: {reason}"
        else:
            peak = {dtype: found.peaks[dtype] for dtype in matrix if _is_peak(found.peaks.get(dtype), matrix[dtype])}
            memory |= found.memory
            by = f"peaks by the C++ probe, {', '.join(dict.fromkeys(found.isas.values()))}"
    return Roofs(max(memory.values()), matrix, peak, memory, by)


def _is_peak(peak: Peak | None, product: float) -> bool:
    return peak is not None and peak.all >= product


def _product_rate(size: int, dtype: torch.dtype, device: torch.device, stopwatch: Stopwatch) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(_best(product, stopwatch) for product in _products(a, b))


def _copy_rate(array_bytes: int, device: torch.device, stopwatch: Stopwatch) -> float:
    source = torch.ones(array_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), stopwatch)


def _products(a: Tensor, b: Tensor) -> list[Callable[[], Tensor]]:
    """The ways in which PyTorch multiplies; on a CPU its fp32 default, MKL, is not the fastest on every chip."""
    ways: list[Callable[[], Tensor]] = [lambda: torch.mm(a, b.t())]
    if a.device.type == "cpu" and a.dtype != torch.float16 and torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return ways


def _best(run: Callable[[], object], stopwatch: Stopwatch) -> float:
    """Seconds of the fastest repetition, after one that does not count."""
    run()
    return min(stopwatch(run) for _ in range(REPETITIONS)) * 1e-9
