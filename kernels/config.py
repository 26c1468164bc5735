"""What a launch may choose: tile shapes, warps and pipeline stages; which of them fit a chip; the default."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, 942: 64}
"""KB of shared memory a block may use, by compute capability (CUDA C++ Programming Guide, technical specifications); 942
is AMD's gfx942."""


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
    """Whether a GEMM tile of `config` fits shared memory and registers, and is not far wider than the data.

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


_ROW_TILES = [
    Config(block_m, block_n, block_k, warps, stages)
    for block_m in (16, 32, 64, 128)
    for block_n in (64, 128, 256)
    for block_k in (32, 64)
    for warps in (4, 8)
    for stages in (2, 3, 4)
]
_WASTE = {128: 0.04, 64: 0.05, 32: 0.08, 16: 1.0}
"""The share of row-tile padding up to which a row tile is taken: an expert's last tile is half empty on average."""
_ENOUGH_PROGRAMS = 128  # about one for each multiprocessor of an A100 or H100


def valid_row_configs(arch: int, dtype: torch.dtype, depth: int, width: int) -> list[Config]:
    """Configs that a row kernel (the linear layer, fc1, fc2, the gradients of their inputs) may run with.

    Args:
        arch: compute capability, 80 for 8.0.
        dtype: of the rows.
        depth, width: length of the sum and output columns.
    """
    return [
        config for config in _ROW_TILES if _worth_compiling(config, dtype) and fits(config, arch, dtype, width, depth)
    ]


def _worth_compiling(config: Config, dtype: torch.dtype) -> bool:
    if dtype == torch.float32:
        return config.block_k == 32 and config.accumulators <= 64
    # with 8 warps on few rows each warp reads its own copy of the row tile from shared memory
    return config.warps == 4 or config.block_m >= 64


def default_row_config(
    arch: int, dtype: torch.dtype, num_rows: int, num_experts: int, depth: int, width: int
) -> Config:
    """The config without tuning: little padding first, then two blocks a multiprocessor, enough programs, wide tiles.

    Two blocks of four warps share a multiprocessor so that one's epilogue runs under the other's main loop.
    """
    configs = valid_row_configs(arch, dtype, depth, width)
    # 64x256 needs fewer instructions a product than 128x128 with mma.sync; wgmma reads its operands from shared memory
    largest = 128 if arch == 90 else 64
    allowed = [m for m, share in _WASTE.items() if m <= largest and num_experts * m <= 2 * share * num_rows]
    block_m = max(allowed, default=min(_WASTE))
    stages = 3 if arch == 90 else 2

    def merit(config: Config) -> tuple[float, ...]:
        programs = -(-num_rows // config.block_m) * -(-width // config.block_n)
        return (
            -abs(config.block_m - block_m),
            config.warps == 4,
            config.blocks_per_multiprocessor(arch, dtype) >= 2,
            programs >= _ENOUGH_PROGRAMS,
            config.block_n if programs >= _ENOUGH_PROGRAMS else -config.block_n,
            config.block_k,
            -abs(config.stages - stages),
        )

    return max(configs, key=merit)


def valid_weight_gradient_configs(arch: int, dtype: torch.dtype, out_width: int, in_width: int) -> list[Config]:
    """Configs that a weight gradient may run with: block_m outputs x block_n inputs, block_k rows deep."""
    configs = [
        Config(block_m, block_n, block_k, warps, stages)
        for block_m in (64, 128)
        for block_n in (64, 128)
        for block_k in (32, 64)
        for warps in (4, 8)
        for stages in (2, 3, 4)
    ]
    return [
        config
        for config in configs
        if _worth_compiling(config, dtype)
        and fits(config, arch, dtype, in_width, 1 << 30)
        and config.block_m < 2 * max(out_width, 64)
    ]


def default_weight_gradient_config(arch: int, dtype: torch.dtype, out_width: int, in_width: int) -> Config:
    """The largest tile that still gives every multiprocessor one of the larger expert's tiles."""

    def merit(config: Config) -> tuple[float, ...]:
        programs = -(-out_width // config.block_m) * -(-in_width // config.block_n)
        size = config.block_m * config.block_n
        return (
            config.warps == 4,
            config.blocks_per_multiprocessor(arch, dtype) >= 2,
            programs >= _ENOUGH_PROGRAMS,
            size if programs >= _ENOUGH_PROGRAMS else -size,
            config.block_n,
            config.block_k,
            -abs(config.stages - 2),
        )

    return max(valid_weight_gradient_configs(arch, dtype, out_width, in_width), key=merit)
