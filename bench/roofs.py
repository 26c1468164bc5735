"""What this machine can do at most, measured: the rate of matrix products and of copies in memory.

The best of a few runs each, since a roof is what nothing exceeds. Every op is then placed under the roof that binds it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .timing import Stopwatch, stopwatch_for

REPETITIONS = 5


@dataclass(frozen=True)
class Roofs:
    """``bandwidth`` in bytes a second, read and written ones together; ``matrix`` in FLOP a second for each dtype."""

    bandwidth: float
    matrix: dict[torch.dtype, float]

    def share(self, flops: float, bytes_: float, dtype: torch.dtype, nanoseconds: float) -> tuple[float, str]:
        """How much of what the machine can do was done: the least time that ``flops`` products and ``bytes_`` of
        traffic can take, over the time they took; and which of the two binds, "matrix" or "memory"."""
        least = {"matrix": flops / self.matrix[dtype], "memory": bytes_ / self.bandwidth}
        binding = max(least, key=lambda name: least[name])
        return least[binding] / (nanoseconds * 1e-9), binding


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
    matrix = {}
    for dtype in dict.fromkeys(dtypes):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        matrix[dtype] = 2 * size**3 / min(_best(product, stopwatch) for product in _products(a, b))
    return Roofs(_bandwidth(device, stopwatch), matrix)


def _bandwidth(device: torch.device, stopwatch: Stopwatch) -> float:
    source = torch.ones(max(8 * cache_bytes(device), 2**28) // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _best(lambda: target.copy_(source), stopwatch)


def _products(a: Tensor, b: Tensor) -> list[Callable[[], Tensor]]:
    """The ways in which PyTorch multiplies; on a CPU its fp32 default, MKL, is not the fastest on every chip."""
    ways: list[Callable[[], Tensor]] = [lambda: torch.mm(a, b.t())]
    if a.device.type == "cpu" and torch.backends.mkldnn.is_available():
        ways.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))
    return ways


def _best(run: Callable[[], object], stopwatch: Stopwatch) -> float:
    """Seconds of the fastest repetition, after one that does not count."""
    run()
    return min(stopwatch(run) for _ in range(REPETITIONS)) * 1e-9
