"""What a launch may choose: tile shapes, warps and pipeline stages; which of them fit a chip; the default."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, 942: 64}
"""KB of shared memory a block may use, by compute capability (CUDA C++ Programming Guide, technical specifications).
942 is AMD's gfx942."""


ASYNCHRONOUS = (90, 100)
"""Architectures whose tensor cores read shared memory while the next instruction issues (wgmma, tcgen05)."""


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

    def pipeline_bytes(self, arch: int, dtype: torch.dtype) -> int:
        """Shared memory of the operand tiles in flight; the epilogue reuses it."""
        buffers = self.stages if arch in ASYNCHRONOUS else self.stages - 1  # mma.sync works from registers
        return buffers * (self.block_m + self.block_n) * self.block_k * dtype.itemsize

    def blocks_per_multiprocessor(self, arch: int, dtype: torch.dtype) -> int:
        """How many blocks fit, if a thread takes as many registers as it may (255)."""
        by_memory = (shared_memory(arch) + 1024) // (self.pipeline_bytes(arch, dtype) + 1024)
        return min(by_memory, 65536 // (32 * self.warps * 255))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.block_m}x{self.block_n}x{self.block_k} w{self.warps} s{self.stages}"


def shared_memory(arch: int) -> int:
    """Bytes of shared memory a block may use on `arch`; of an unknown one as little as NVIDIA's smallest has."""
    return SHARED_MEMORY.get(arch, SHARED_MEMORY[86]) * 1024


_TILES = [
    Config(block_m, block_n, block_k, warps, stages)
    for block_m in (16, 32, 64, 128)
    for block_n in (64, 128, 256)
    for block_k in (32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3, 4)
]
_ENOUGH_PROGRAMS = 128  # about one for each multiprocessor of an A100 or H100


def _fits(config: Config, arch: int, dtype: torch.dtype, width: int) -> bool:
    """Whether a tile fits registers and shared memory and is not far wider than the output."""
    # twice as many accumulators spill in every kernel (up to 450 bytes a thread, Triton 3.8); fp32 products on the
    # ordinary cores hold their operands in registers as well
    most = 32 if dtype == torch.float32 else 64
    depths = (32,) if dtype == torch.float32 else (64, 128) if arch in ASYNCHRONOUS else (64,)
    return (
        8 <= config.accumulators <= most
        and config.block_k in depths
        and config.pipeline_bytes(arch, dtype) <= shared_memory(arch)
        and config.block_n < 2 * max(width, 64)
        # with 8 warps on few rows each warp reads its own copy of the row tile from shared memory; in fp32 they spill
        and (config.warps == 4 or (config.block_m >= 64 and dtype != torch.float32))
    )


def _merit(config: Config, arch: int, dtype: torch.dtype, programs: int) -> tuple[float, ...]:
    """What a default should have, most important first."""
    enough = programs >= _ENOUGH_PROGRAMS
    size = config.block_m * config.block_n
    return (
        config.warps == (8 if config.block_m == 128 else 4),
        config.stages > 2 or config.block_k == 128,  # loads in flight while a tile is multiplied
        # two blocks of four warps a multiprocessor: one's epilogue runs under the other's main loop
        config.warps == 8 or config.blocks_per_multiprocessor(arch, dtype) >= 2,
        enough,
        size if enough else -size,
        config.block_n,
        config.block_k,
        -config.stages,
    )


def _row_tile(arch: int, num_rows: int, num_experts: int) -> int:
    """The largest row tile that wastes little: an expert's last tile is half empty on average.

    A larger tile reads the weights from L2 less often, which matters most where the tensor cores are fastest: 64x128
    tiles of bf16 read 1 byte for 43 operations, 128x128 for 64.
    """
    waste = {128: 0.08 if arch in ASYNCHRONOUS else 0.04, 64: 0.08 if arch in ASYNCHRONOUS else 0.05, 32: 0.08}
    return max((m for m, share in waste.items() if num_experts * m <= 2 * share * num_rows), default=16)


def valid_row_configs(arch: int, dtype: torch.dtype, width: int, *, accumulators: int = 64) -> list[Config]:
    """Configs that a row kernel (the linear layer, fc1, fc2, the gradients of their inputs) may run with.

    Args:
        arch: compute capability, 80 for 8.0; 942 for AMD's gfx942.
        dtype: of the rows.
        width: output columns.
        accumulators: the most a thread may have.
    """
    return [config for config in _TILES if config.accumulators <= accumulators and _fits(config, arch, dtype, width)]


def default_row_config(
    arch: int, dtype: torch.dtype, num_rows: int, num_experts: int, width: int, *, accumulators: int = 64
) -> Config:
    """The config without tuning: a row tile that wastes little, then :func:`_merit`."""
    configs = valid_row_configs(arch, dtype, width, accumulators=accumulators)
    block_m = _row_tile(arch, num_rows, num_experts)

    def merit(config: Config) -> tuple[float, ...]:
        programs = -(-num_rows // config.block_m) * -(-width // config.block_n)
        return (-abs(config.block_m - block_m), *_merit(config, arch, dtype, programs))

    return max(configs, key=merit)


def valid_weight_gradient_configs(arch: int, dtype: torch.dtype, in_width: int) -> list[Config]:
    """Configs that a weight gradient may run with: block_m outputs x block_n inputs, block_k rows deep."""
    return [config for config in _TILES if config.block_m >= 64 and _fits(config, arch, dtype, in_width)]


def default_weight_gradient_config(arch: int, dtype: torch.dtype, out_width: int, in_width: int) -> Config:
    """The largest tile that still gives every multiprocessor one of the larger expert's."""

    def merit(config: Config) -> tuple[float, ...]:
        return _merit(config, arch, dtype, -(-out_width // config.block_m) * -(-in_width // config.block_n))

    return max(valid_weight_gradient_configs(arch, dtype, in_width), key=merit)
