"""Which rows and columns a program computes: row tiles that never span two experts, in an order that L2 likes."""

from __future__ import annotations

import triton
import triton.language as tl


def row_tile_capacity(num_rows: int, num_experts: int, block_m: int) -> int:
    """The most row tiles that any offsets can need; the host does not read them.

    Every expert, and the padding behind the last one, may end in a partial tile.
    """
    return (num_rows + (num_experts + 1) * (block_m - 1)) // block_m


@triton.jit
def locate_tile(
    expert_offsets, num_rows, NUM_EXPERTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """(expert, first row, end of the expert's rows, column tile) of this program.

    Row tiles of expert 0 come first. Rows behind the last offset belong to "expert" NUM_EXPERTS, the padding; a program
    past all tiles gets first >= end. Programs that run together share GROUP_M row tiles, so that their row tiles and
    their weight tiles stay in L2. With TRITON_DEBUG=1 the offsets are checked.
    """
    column_tiles: tl.constexpr = (COLUMNS + BLOCK_N - 1) // BLOCK_N
    row_tiles = tl.num_programs(0) // column_tiles
    group = tl.program_id(0) // (GROUP_M * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP_M, GROUP_M)
    within = tl.program_id(0) % (GROUP_M * column_tiles)
    tile = group * GROUP_M + within % group_rows
    column_tile = within // group_rows

    expert = NUM_EXPERTS
    first = num_rows
    end = num_rows
    start = 0
    before = 0
    for e in range(NUM_EXPERTS + 1):
        stop = num_rows
        if e < NUM_EXPERTS:
            stop = tl.load(expert_offsets + e + 1)
            tl.device_assert((start <= stop) & (stop <= num_rows), "expert_offsets decrease or exceed the rows")
        tiles = (stop - start + BLOCK_M - 1) // BLOCK_M
        mine = (tile >= before) & (tile < before + tiles)
        expert = tl.where(mine, e, expert)
        first = tl.where(mine, start + (tile - before) * BLOCK_M, first)
        end = tl.where(mine, stop, end)
        before += tiles
        start = stop
    return expert, first, end, column_tile


@triton.jit
def halves(tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of a tile's columns, each [BM, BN / 2]."""
    return tl.split(tl.permute(tl.reshape(tile, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
