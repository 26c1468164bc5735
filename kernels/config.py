"""What a launch may choose: tile shapes, warps and pipeline stages; which of them fit a chip; the default."""

from __future__ import annotations

import math
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

    @property
    def parts(self) -> int:
        """In how many pieces the output tile is written: a thread has room for the addresses of 64 elements."""
        return 2 if self.accumulators > 64 else 1

    @property
    def registers(self) -> int:
        """About what a thread takes, addresses and the epilogue included; no more than the 255 that it may."""
        return min(255, self.accumulators + 100)

    def pipeline_bytes(self, arch: int, dtype: torch.dtype) -> int:
        """Shared memory of the operand tiles in flight; the epilogue reuses it."""
        buffers = self.stages if arch in ASYNCHRONOUS else self.stages - 1  # mma.sync works from registers
        return buffers * (self.block_m + self.block_n) * self.block_k * dtype.itemsize

    def blocks_per_multiprocessor(self, arch: int, dtype: torch.dtype) -> int:
        """How many blocks fit, by shared memory and registers; at least one."""
        by_memory = (shared_memory(arch) + 1024) // (self.pipeline_bytes(arch, dtype) + 1024)
        registers = self.registers if arch == 90 else 255
        return max(1, min(by_memory, 65536 // (32 * self.warps * registers)))

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
_ENOUGH_PROGRAMS = 128  # about one for each multiprocessor of an A100


def _fits(config: Config, arch: int, dtype: torch.dtype, width: int, accumulators: int) -> bool:
    """Whether a tile fits registers and shared memory and is not far wider than the output."""
    # products in fp32 on the ordinary cores hold their operands in registers as well
    most = 32 if dtype == torch.float32 else accumulators
    depths = (32,) if dtype == torch.float32 else (64, 128) if arch in ASYNCHRONOUS else (64,)
    # wgmma takes 64 rows; with fewer a product falls back to mma.sync, and weights are read up to 14 times at batch 1
    rows = 64 if arch == 90 and dtype != torch.float32 else 16
    return (
        8 <= config.accumulators <= most
        and config.block_m >= rows
        and config.block_k in depths
        and config.pipeline_bytes(arch, dtype) <= shared_memory(arch)
        and config.block_n < 2 * max(width, 64)
        # with 8 warps on few rows each warp reads its own copy of the row tile from shared memory; in fp32 they spill
        and (config.warps == 4 or (config.block_m >= 64 and dtype != torch.float32))
    )


def most_accumulators(arch: int, dtype: torch.dtype) -> int:
    """How many a thread of a kernel with a light epilogue may have. Twice as many as here spill in every kernel (up to
    450 bytes a thread, Triton 3.8), but wgmma's operands pass the registers by, and leave room on sm_90."""
    return 128 if arch == 90 and dtype != torch.float32 else 64


# ---- the default on sm_80 and its like ------------------------------------------------------------------------------


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


# ---- the default on sm_90 --------------------------------------------------------------------------------------------
# There the tensor cores are so fast that tiles, waves and the epilogue decide, and no order of merits has them all.

_MULTIPROCESSORS = 132
_TENSOR = 800e12 / _MULTIPROCESSORS  # FLOP a second of one, dense bf16, as large products of cuBLAS reach them
_L2 = 7.8e12  # bytes a second that tiles may request of L2: what published Triton products of an H100 come to
_INTO_MULTIPROCESSOR = 110e9  # bytes a second into one
_LATENCY = 0.8e-6  # from a request to its arrival
_EPILOGUE = 0.6 * 128 * 1.7e9  # instructions a second of one, four schedulers of 32 lanes at 60 %
_LIGHT = 5  # instructions for an element of the output: bias, cast and store
ALIKE = 1.03
"""Estimates closer than this tell nothing apart."""


def _estimate(config: Config, dtype: torch.dtype, row_tiles: int, width: int, depth: int, epilogue: int) -> float:
    """Seconds that a launch may take on an H100: it ranks tiles, it predicts no time.

    Blocks come in waves. In one, a multiprocessor's blocks take turns at the tensor cores, at L2 and at the way from
    there, and the slowest of these counts, or the latency where too little is on its way; the epilogue is half hidden
    behind another block's main loop, if there is one.
    """
    tiles = row_tiles * -(-width // config.block_n)
    resident = config.blocks_per_multiprocessor(90, dtype)
    waves = -(-tiles // (_MULTIPROCESSORS * resident))
    together, active = min(resident, -(-tiles // _MULTIPROCESSORS)), min(_MULTIPROCESSORS, tiles)
    size = config.block_m * config.block_n
    operands = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
    step = max(
        2 * size * config.block_k * together / _TENSOR,
        operands * together * active / _L2,
        operands * together / _INTO_MULTIPROCESSOR,
        _LATENCY / (config.stages - 1),
    )
    exposed = size * epilogue / _EPILOGUE * (1.0 if together == 1 else 0.5)
    return waves * (-(-depth // config.block_k) * step + size * dtype.itemsize * together * active / _L2 + exposed)


def _fastest(configs: list[Config], dtype: torch.dtype, estimates: list[float]) -> Config:
    """Of the configs that are estimated alike the one with most blocks to hide latency, then with most loads on their
    way in small steps."""
    least = min(estimates)
    alike = [config for config, time in zip(configs, estimates, strict=True) if time <= ALIKE * least]
    return max(alike, key=lambda c: (c.blocks_per_multiprocessor(90, dtype), -c.block_k, c.stages, c.warps == 4))


# ---- which configs are allowed, and the default ----------------------------------------------------------------------


def valid_row_configs(arch: int, dtype: torch.dtype, width: int, *, accumulators: int | None = None) -> list[Config]:
    """Configs that a row kernel (the linear layer, fc1, fc2, the gradients of their inputs) may run with.

    Args:
        arch: compute capability, 80 for 8.0; 942 for AMD's gfx942.
        dtype: of the rows.
        width: output columns.
        accumulators: the most a thread may have, :func:`most_accumulators` by default.
    """
    accumulators = accumulators or most_accumulators(arch, dtype)
    return [config for config in _TILES if _fits(config, arch, dtype, width, accumulators)]


def default_row_config(
    arch: int,
    dtype: torch.dtype,
    num_rows: int,
    num_experts: int,
    width: int,
    depth: int,
    *,
    accumulators: int | None = None,
    epilogue: int = _LIGHT,
) -> Config:
    """The config without tuning.

    Args:
        arch, dtype, width, accumulators: as in :func:`valid_row_configs`.
        num_rows: N. num_experts: E.
        depth: input columns.
        epilogue: instructions that an element of the output takes after the main loop.
    """
    configs = valid_row_configs(arch, dtype, width, accumulators=accumulators)
    if arch == 90 and dtype != torch.float32:
        # an expert's last tile is half empty on average
        row_tiles = [math.ceil(num_rows / config.block_m + (num_experts - 1) / 2) for config in configs]
        return _fastest(
            configs,
            dtype,
            [_estimate(c, dtype, tiles, width, depth, epilogue) for c, tiles in zip(configs, row_tiles, strict=True)],
        )
    block_m = _row_tile(arch, num_rows, num_experts)

    def merit(config: Config) -> tuple[float, ...]:
        programs = -(-num_rows // config.block_m) * -(-width // config.block_n)
        return (-abs(config.block_m - block_m), *_merit(config, arch, dtype, programs))

    return max(configs, key=merit)


def valid_weight_gradient_configs(arch: int, dtype: torch.dtype, in_width: int) -> list[Config]:
    """Configs that a weight gradient may run with: block_m outputs x block_n inputs, block_k rows deep."""
    return [config for config in valid_row_configs(arch, dtype, in_width) if config.block_m >= 64]


def default_weight_gradient_config(
    arch: int, dtype: torch.dtype, num_rows: int, out_width: int, in_width: int
) -> Config:
    """On sm_90 what is estimated to be fastest; elsewhere the largest tile that still gives every multiprocessor one of
    the larger expert's."""
    configs = valid_weight_gradient_configs(arch, dtype, in_width)
    if arch == 90 and dtype != torch.float32:
        times = [_estimate(c, dtype, -(-out_width // c.block_m), in_width, max(num_rows, 1), _LIGHT) for c in configs]
        return _fastest(configs, dtype, times)

    def merit(config: Config) -> tuple[float, ...]:
        return _merit(config, arch, dtype, -(-out_width // config.block_m) * -(-in_width // config.block_n))

    return max(configs, key=merit)
