"""What a launch may choose: tile shapes, warps and pipeline stages; which of them fit a chip; the default."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KB of shared memory a block may use, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

ARCHITECTURES = tuple(SHARED_MEMORY)


@dataclass(frozen=True, order=True)
class Config:
    """One way to compile a GEMM-like kernel: an output tile of block_m x block_n, block_k deep a step."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    @property
    def accumulators(self) -> int:
        """fp32 registers a thread needs for the output tile."""
        return self.block_m * self.block_n // (32 * self.warps)

    def pipeline_bytes(self, dtype: torch.dtype) -> int:
        """Shared memory of the operand tiles in flight; the epilogue reuses it."""
        return self.stages * (self.block_m + self.block_n) * self.block_k * dtype.itemsize

    def blocks_per_multiprocessor(self, arch: int, dtype: torch.dtype) -> int:
        """How many blocks shared memory and registers (at most 255 a thread) leave room for."""
        by_memory = (shared_memory(arch) + 1024) // (self.pipeline_bytes(dtype) + 1024)
        return min(by_memory, 65536 // (32 * self.warps * min(255, self.accumulators + 96)))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages}"


def shared_memory(arch: int) -> int:
    """Bytes of shared memory a block may use on `arch` (80, 90, ...); an unknown one counts as the smallest."""
    return SHARED_MEMORY.get(arch, min(SHARED_MEMORY.values())) * 1024


def fits(config: Config, arch: int, dtype: torch.dtype, width: int, depth: int) -> bool:
    """Whether a GEMM tile of `config` is worth compiling: within shared memory and registers, not far wider than the data.

    Args:
        arch: compute capability, 80 for 8.0.
        dtype: of the operands.
        width: output columns, depth: length of the sum.
    """
    return (
        config.pipeline_bytes(dtype) <= shared_memory(arch)
        and 4 <= config.accumulators <= 128
        and config.block_n < 2 * max(width, 64)
        and config.block_k < 2 * max(depth, 32)
    )
