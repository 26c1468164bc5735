"""Which of the valid configs of a launch are worth compiling and timing: fifteen of a hundred, by a model.

The model knows how many programs a multiprocessor gets, and what a program costs: its products, and what it reads of
both operands. It is far too coarse to choose one config, and good enough to leave out the tiles that cannot win: those
that read the weights four times as often, or leave most of the chip without work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .kernels.config import Config

MOST = 15
"""Configs of a role."""
PER_TILE = 3
"""Of one output tile, which differ in warps and in the depth of the pipeline. The model does not know these: the best
of each number of warps come first, by what hides latency."""

ENOUGH_ACCUMULATORS = 32
"""Of a thread. A tile that has configs with so many is not timed with more warps and fewer."""

_READING = {torch.float32: 4}
_READING_ON_TENSOR_CORES = 64
"""Multiply-adds in the time that a multiprocessor takes to read an element from the L2 cache: about 1000 TFLOP/s and
14 TB/s on an H100, 312 and 5 on an A100; fp32 products without tensor cores are a sixteenth as fast."""


@dataclass(frozen=True)
class Product:
    """What one launch computes.

    Attributes:
        parts: (length along block_m, depth) of every expert's output: (rows, 1) where all have one depth, and (output
            width, rows) of a weight gradient.
        columns: length along block_n.
    """

    parts: tuple[tuple[int, int], ...]
    columns: int


def promising(
    configs: Sequence[Config], product: Product, arch: int, dtype: torch.dtype, processors: int, most: int = MOST
) -> list[Config]:
    """The `most` configs that the model finds fastest, at most :data:`PER_TILE` of a tile; all if there are no more.

    Args:
        configs: valid ones.
        arch: compute capability, 80 for 8.0.
        dtype: of the operands.
        processors: multiprocessors of the GPU.
    """
    if len(configs) <= most:
        return list(configs)
    tiles: dict[tuple[int, int], list[Config]] = {}
    for config in configs:
        tiles.setdefault((config.block_m, config.block_n), []).append(config)
    by_cost = sorted(tiles.values(), key=lambda tile: _cost(tile[0], product, dtype, processors))
    return [config for tile in by_cost for config in _of_tile(tile, arch, dtype)][:most]


def _of_tile(tile: list[Config], arch: int, dtype: torch.dtype) -> list[Config]:
    """The :data:`PER_TILE` configs of one tile that are timed."""

    def hidden_latency(config: Config) -> tuple[int, ...]:
        """Blocks that fill each other's gaps, then the columns that are on the way while others are multiplied."""
        return config.blocks_per_multiprocessor(arch, dtype), (config.stages - 1) * config.block_k, config.block_k

    # a warp with a small part of the tile reads more of the operands than it multiplies
    busy = [config for config in tile if config.accumulators >= ENOUGH_ACCUMULATORS] or tile
    ranked = sorted(busy, key=hidden_latency, reverse=True)
    first = list({config.warps: config for config in reversed(ranked)}.values())
    return sorted(ranked, key=lambda config: config not in first)[:PER_TILE]


def _cost(config: Config, product: Product, dtype: torch.dtype, processors: int) -> float:
    """In the time that a multiprocessor takes for a multiply-add."""
    across = -(-product.columns // config.block_n)
    programs = [(across * -(-length // config.block_m), depth) for length, depth in product.parts]
    uniform = len({depth for _, depth in programs}) == 1
    if uniform:
        programs = [(sum(count for count, _ in programs), programs[0][1])]
    spread = sum(count * depth for count, depth in programs) / processors
    longest = max(-(-count // processors) * depth for count, depth in programs)
    reading = _READING.get(dtype, _READING_ON_TENSOR_CORES) * (config.block_m + config.block_n)
    return max(spread, longest) * (config.block_m * config.block_n + reading)
