"""The multiway feed-forward block: fc1, GELU, LayerNorm over the hidden width, fc2, forward and backward.

The LayerNorm has no pass of its own. With h = gelu(x @ W1.T + b1), gain g and shift s of the row's expert,

    fc2(LN(h)) = rstd * ((h * g) @ W2.T - mean * c) + d,    c = W2 @ g,    d = W2 @ s + b2

so fc1 writes h * g together with the mean and the squared deviations of each tile's part of a row, and fc2 merges those
and finishes in its epilogue: two launches once c and d are known (`fold`, a third small launch that reads W2 once).
The gain goes to the rows, not into a folded copy of W2: rounding h * g costs what rounding h costs the plain
computation, and training need not write E x D x 4D new weights every step.

Subtracting ``mean * c`` amplifies the rounding of the sum by |mean| / std. In 16 bits that is far below the rounding of
h, since the sum is fp32; in fp32 it would show, so there fc1 writes h and fc2 takes (h - mean) * g as it loads it.

Backward needs of the LayerNorm only two dot products a row, and both come from rows of width D. With
z = rstd * ((h - mean) * g) @ W2.T, which fc2 keeps, n = (h - mean) * rstd and dn = (dy @ W2) * g,

    sum_k dn_k = dy . c,    sum_k dn_k n_k = dy . z

so the epilogue of dy @ W2 goes on to the gradient of the pre-activation, the one saved tensor of size N x 4D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import (
    Config,
    default_row_config,
    default_weight_gradient_config,
    valid_row_configs,
    valid_weight_gradient_configs,
)
from .gelu import gelu, gelu_and_derivative
from .launch import check_contiguous, check_layout, launch
from .multiway_linear import (
    GROUP_M,
    finish_tile,
    launch_rows,
    launch_weight_gradient,
    product,
    tile_rows,
)
from .tiles import halves, locate_tile, row_tile_capacity


@triton.jit
def _fold_kernel(
    norm_weight, norm_bias, fc2_weight, fc2_bias, folded, STRIDE_E: tl.constexpr, STRIDE_D: tl.constexpr,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """folded[0, e] = W2[e] @ gain[e] and folded[1, e] = W2[e] @ shift[e] + b2[e]; BLOCK_M outputs a program."""
    outs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    expert = tl.program_id(1)
    out_mask = outs < WIDTH
    gains = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    shifts = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, HIDDEN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        k_mask = k < HIDDEN
        w_tile = fc2_weight + expert.to(tl.int64) * STRIDE_E + outs[:, None] * STRIDE_D + k[None, :]  # [BM, BK]
        w = tl.load(w_tile, mask=out_mask[:, None] & k_mask[None, :], other=0.0).to(tl.float32)
        gains += w * tl.load(norm_weight + expert * HIDDEN + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
        shifts += w * tl.load(norm_bias + expert * HIDDEN + k, mask=k_mask, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(fc2_bias + expert * WIDTH + outs, mask=out_mask, other=0.0).to(tl.float32)
    place = folded + expert * WIDTH + outs
    tl.store(place, tl.sum(gains, axis=1), mask=out_mask)
    tl.store(place + tl.num_programs(1) * WIDTH, tl.sum(shifts, axis=1) + bias, mask=out_mask)


@triton.jit(do_not_specialize=["num_rows"])
def _fc1_kernel(
    x, weight, bias, norm_weight, expert_offsets, row_index, out, pre, partials, num_rows,
    NUM_EXPERTS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, STRIDE_X: tl.constexpr,
    STRIDE_WE: tl.constexpr, STRIDE_WN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out = h or, with norm_weight, h * gain, where h = gelu(x @ weight.T + bias).

    partials[:, tile, r] = the mean of h over the tile's part of row r, and its squared deviations from that.
    """
    expert, first, end, column_tile = locate_tile(expert_offsets, num_rows, NUM_EXPERTS, WIDTH, BLOCK_M, BLOCK_N, GROUP)
    if (first >= end) | (expert == NUM_EXPERTS):
        return
    positions, x_rows, row_mask = tile_rows(first, end, row_index, num_rows, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < WIDTH
    k = tl.arange(0, BLOCK_K)
    expert = expert.to(tl.int64)
    x_tile = x + x_rows[:, None] * STRIDE_X + k[None, :]  # [BM, BK]
    w_tile = weight + expert * STRIDE_WE + columns[None, :] * STRIDE_WN + k[:, None]  # [BK, BN]
    acc = product(x_tile, w_tile, column_mask, DEPTH, WIDTH, 1, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    acc += tl.load(bias + expert * WIDTH + columns, mask=column_mask).to(tl.float32)[None, :]
    if pre is not None:
        finish_tile(acc, pre, None, None, first, end, num_rows, column_tile, WIDTH, 0, BLOCK_M, BLOCK_N, PARTS)
    h = gelu(acc)
    hidden = h
    if norm_weight is not None:
        hidden *= tl.load(norm_weight + expert * WIDTH + columns, mask=column_mask).to(tl.float32)[None, :]
    finish_tile(hidden, out, None, None, first, end, num_rows, column_tile, WIDTH, 0, BLOCK_M, BLOCK_N, PARTS)

    # Deviations from the tile's own mean: a sum of squares would lose the variance of a row whose mean is large. Their
    # sum, which is not quite zero, takes the rounding out of that mean.
    count = tl.minimum(WIDTH - column_tile * BLOCK_N, BLOCK_N)
    if WIDTH % BLOCK_N != 0:
        h = tl.where(column_mask[None, :], h, 0.0)
    mean = tl.sum(h, axis=1) / count  # [BM]
    deviation = h - mean[:, None]
    if WIDTH % BLOCK_N != 0:
        deviation = tl.where(column_mask[None, :], deviation, 0.0)
    squares = tl.sum(deviation * deviation, axis=1)
    column_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    partial = partials + column_tile.to(tl.int64) * num_rows + positions
    tl.store(partial, mean + tl.sum(deviation, axis=1) / count, mask=row_mask)
    tl.store(partial + column_tiles * num_rows.to(tl.int64), squares, mask=row_mask)


@triton.jit
def _row_statistics(
    partials, positions, num_rows, HIDDEN: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
    PADDED_TILES: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """(mean, rstd) [BM] of rows, from the tiles' means and squared deviations (Chan, Golub, LeVeque 1979)."""
    tile = tl.arange(0, PADDED_TILES)
    place = partials + tile[:, None].to(tl.int64) * num_rows + positions[None, :]  # [tiles, BM]
    there = (tile < TILES)[:, None]
    means = tl.load(place, mask=there, other=0.0)
    squares = tl.load(place + TILES * num_rows.to(tl.int64), mask=there, other=0.0)
    counts = tl.minimum(tl.maximum(HIDDEN - tile * TILE, 0), TILE).to(tl.float32)[:, None]
    near = tl.load(partials + positions)  # summing differences from it keeps the digits of a large mean
    mean = near + tl.sum((means - near[None, :]) * counts, axis=0) / HIDDEN
    deviations = means - mean[None, :]
    variance = tl.sum(squares + counts * deviations * deviations, axis=0) / HIDDEN
    return mean, 1.0 / tl.sqrt(variance + EPS)


@triton.jit(do_not_specialize=["num_rows"])
def _fc2_kernel(
    hidden, weight, norm_weight, folded, partials, expert_offsets, residual, row_index, out, branch, mean_out, rstd_out,
    num_rows, NUM_EXPERTS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, STRIDE_WE: tl.constexpr,
    STRIDE_WN: tl.constexpr, STRIDE_RESIDUAL: tl.constexpr, STATISTICS_TILE: tl.constexpr,
    STATISTICS_TILES: tl.constexpr, PADDED_TILES: tl.constexpr, EPS: tl.constexpr, CENTER: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """out[row(r)] = residual[row(r)] + branch[r] + d,  branch[r] = rstd * (hidden[r] @ weight.T - mean * c).

    hidden is h * gain; with CENTER it is h, and becomes (h - mean) * gain as it is loaded.
    """
    expert, first, end, column_tile = locate_tile(expert_offsets, num_rows, NUM_EXPERTS, WIDTH, BLOCK_M, BLOCK_N, GROUP)
    if first >= end:
        return
    if expert == NUM_EXPERTS:  # padding rows become zeros: nobody may meet what was never written
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        finish_tile(
            zeros, out, residual, row_index, first, end, num_rows, column_tile, WIDTH, STRIDE_RESIDUAL, BLOCK_M,
            BLOCK_N, PARTS,
        )  # fmt: skip
        return

    positions, _, row_mask = tile_rows(first, end, None, num_rows, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < WIDTH
    expert = expert.to(tl.int64)
    mean, rstd = _row_statistics(
        partials, positions, num_rows, DEPTH, STATISTICS_TILE, STATISTICS_TILES, PADDED_TILES, EPS
    )
    if mean_out is not None:
        if column_tile == 0:
            tl.store(mean_out + positions, mean, mask=row_mask)
            tl.store(rstd_out + positions, rstd, mask=row_mask)
    k = tl.arange(0, BLOCK_K)
    h_tile = hidden + positions[:, None] * DEPTH + k[None, :]  # [BM, BK]
    w_tile = weight + expert * STRIDE_WE + columns[None, :] * STRIDE_WN + k[:, None]  # [BK, BN]
    if CENTER:
        # On tensor cores the rows are the right operand, which goes through shared memory. As the left one they would
        # stay in registers, and wgmma reads those while the next iteration overwrites them (triton-lang/triton#9433).
        acc = tl.zeros((BLOCK_M, BLOCK_N) if PRECISION == "ieee" else (BLOCK_N, BLOCK_M), tl.float32)
        for start in range(0, DEPTH, BLOCK_K):
            k_mask = k < DEPTH - start
            gain = tl.load(norm_weight + expert * DEPTH + start + k, mask=k_mask, other=0.0).to(tl.float32)
            a = (tl.load(h_tile, mask=k_mask[None, :], other=0.0) - mean[:, None]) * gain[None, :]
            b = tl.load(w_tile, mask=k_mask[:, None] & column_mask[None, :], other=0.0)
            if PRECISION == "ieee":
                acc = tl.dot(a, b, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(tl.trans(b), tl.trans(a), acc, input_precision=PRECISION)  # [BN, BM]
            h_tile += BLOCK_K
            w_tile += BLOCK_K
        if PRECISION != "ieee":
            acc = tl.trans(acc)
    else:
        acc = product(h_tile, w_tile, column_mask, DEPTH, WIDTH, 1, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
        acc -= mean[:, None] * tl.load(folded + expert * WIDTH + columns, mask=column_mask)[None, :]
    acc *= rstd[:, None]
    if branch is not None:
        finish_tile(acc, branch, None, None, first, end, num_rows, column_tile, WIDTH, 0, BLOCK_M, BLOCK_N, PARTS)
    acc += tl.load(folded + (NUM_EXPERTS + expert) * WIDTH + columns, mask=column_mask)[None, :]
    finish_tile(
        acc, out, residual, row_index, first, end, num_rows, column_tile, WIDTH, STRIDE_RESIDUAL, BLOCK_M, BLOCK_N,
        PARTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _row_dots_kernel(
    dy, branch, folded, expert_offsets, row_index, dots, num_rows, NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr,
    STRIDE_DY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dots[0, r] = dy[row(r)] . c of the row's expert and dots[1, r] = dy[row(r)] . branch[r]."""
    expert, first, end, _ = locate_tile(expert_offsets, num_rows, NUM_EXPERTS, 1, BLOCK_M, 1, 1)
    if (first >= end) | (expert == NUM_EXPERTS):
        return
    positions, rows, row_mask = tile_rows(first, end, row_index, num_rows, BLOCK_M)
    with_gain = tl.zeros((BLOCK_M,), tl.float32)
    with_branch = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, WIDTH, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < WIDTH
        upstream = tl.load(dy + rows[:, None] * STRIDE_DY + columns[None, :], mask=inside[None, :], other=0.0)
        upstream = upstream.to(tl.float32)  # [BM, BN]
        z = tl.load(branch + positions[:, None] * WIDTH + columns[None, :], mask=inside[None, :], other=0.0)
        c = tl.load(folded + expert * WIDTH + columns, mask=inside, other=0.0)
        with_gain += tl.sum(upstream * c[None, :], axis=1)
        with_branch += tl.sum(upstream * z.to(tl.float32), axis=1)
    tl.store(dots + positions, with_gain, mask=row_mask)
    tl.store(dots + num_rows + positions, with_branch, mask=row_mask)


@triton.jit
def _through_norm_and_gelu(
    gradient, first_column, positions, row_mask, expert, row_tile, norm_weight, norm_bias, pre, mean_in, rstd_in, dots,
    num_rows, dpre, hidden, partials, WIDTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the gradient of the hidden rows [BM, COLUMNS] to dpre, the hidden rows themselves and their column sums."""
    columns = first_column + tl.arange(0, COLUMNS)
    column_mask = columns < WIDTH
    mask = row_mask[:, None] & column_mask[None, :]
    place = positions[:, None] * WIDTH + columns[None, :]  # [BM, COLUMNS]
    activated, slope = gelu_and_derivative(tl.load(pre + place, mask=mask, other=0.0).to(tl.float32))
    if norm_weight is not None:
        mean = tl.load(mean_in + positions)
        rstd = tl.load(rstd_in + positions)
        gain = tl.load(norm_weight + expert * WIDTH + columns, mask=column_mask).to(tl.float32)
        shift = tl.load(norm_bias + expert * WIDTH + columns, mask=column_mask).to(tl.float32)
        with_gain = tl.load(dots + positions) / WIDTH
        with_branch = tl.load(dots + num_rows + positions) / WIDTH
        n = (activated - mean[:, None]) * rstd[:, None]
        tl.store(hidden + place, (n * gain[None, :] + shift[None, :]).to(hidden.dtype.element_ty), mask=mask)
        partial = partials + row_tile.to(tl.int64) * (2 * WIDTH) + columns
        # Masked after the product: fused into the sum's first addition, it would round differently in two lanes that
        # write the same sum.
        tl.store(partial, tl.sum(tl.where(row_mask[:, None], gradient * n, 0.0), axis=0), mask=column_mask)
        tl.store(partial + WIDTH, tl.sum(tl.where(row_mask[:, None], gradient, 0.0), axis=0), mask=column_mask)
        gradient = (gradient * gain[None, :] - with_gain[:, None] - n * with_branch[:, None]) * rstd[:, None]
    else:
        tl.store(hidden + place, activated.to(hidden.dtype.element_ty), mask=mask)
    tl.store(dpre + place, (gradient * slope).to(dpre.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _hidden_gradient_kernel(
    dy, weight, norm_weight, norm_bias, pre, mean_in, rstd_in, dots, expert_offsets, row_index, dpre, hidden, partials,
    num_rows, NUM_EXPERTS: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, STRIDE_DY: tl.constexpr,
    STRIDE_WE: tl.constexpr, STRIDE_WK: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dy @ W2, then through LayerNorm and GELU: dpre, the hidden rows again for dW2, and this tile's column sums.

    partials[:, row tile] = sums over the tile's rows of dhidden * n and dhidden: the gradients of gain and shift.
    Without a LayerNorm (norm_weight None) the hidden rows are the activations.
    """
    expert, first, end, column_tile = locate_tile(expert_offsets, num_rows, NUM_EXPERTS, WIDTH, BLOCK_M, BLOCK_N, GROUP)
    if (first >= end) | (expert == NUM_EXPERTS):
        return
    positions, dy_rows, row_mask = tile_rows(first, end, row_index, num_rows, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < WIDTH
    k = tl.arange(0, BLOCK_K)
    expert64 = expert.to(tl.int64)
    dy_tile = dy + dy_rows[:, None] * STRIDE_DY + k[None, :]  # [BM, BK]
    w_tile = weight + expert64 * STRIDE_WE + columns[None, :] + k[:, None] * STRIDE_WK  # [BK, BN]
    gradient = product(dy_tile, w_tile, column_mask, DEPTH, WIDTH, STRIDE_WK, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)

    row_tile = first // BLOCK_M + expert  # experts' row tiles follow each other, each expert's from its first row on
    first_column = column_tile * BLOCK_N
    if BLOCK_M * BLOCK_N <= 2048:
        _through_norm_and_gelu(
            gradient, first_column, positions, row_mask, expert64, row_tile, norm_weight, norm_bias, pre, mean_in,
            rstd_in, dots, num_rows, dpre, hidden, partials, WIDTH, BLOCK_N,
        )  # fmt: skip
    else:
        # What follows needs five tiles at a time: a quarter of the columns after the other, they stay in registers.
        left, right = halves(gradient, BLOCK_M, BLOCK_N)
        for half in tl.static_range(2):
            quarters = halves(left if half == 0 else right, BLOCK_M, BLOCK_N // 2)
            for side in tl.static_range(2):
                _through_norm_and_gelu(
                    quarters[side], first_column + (2 * half + side) * (BLOCK_N // 4), positions, row_mask, expert64,
                    row_tile, norm_weight, norm_bias, pre, mean_in, rstd_in, dots, num_rows, dpre, hidden, partials,
                    WIDTH, BLOCK_N // 4,
                )  # fmt: skip


@triton.jit
def _norm_gradient_kernel(
    partials, expert_offsets, dgain, dshift, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """Sums partials [row tile, 2, WIDTH] over the row tiles of each expert, in order; BLOCK_M is their writer's."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < WIDTH
    expert = tl.program_id(1)
    start = tl.load(expert_offsets + expert)
    stop = tl.load(expert_offsets + expert + 1)
    first_tile = start // BLOCK_M + expert
    end_tile = first_tile + (stop - start + BLOCK_M - 1) // BLOCK_M
    gain = tl.zeros((BLOCK_N,), tl.float32)
    shift = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(first_tile, end_tile, TILES):
        tile = first + tl.arange(0, TILES)
        place = partials + tile[:, None].to(tl.int64) * (2 * WIDTH) + columns[None, :]  # [tiles, BN]
        there = (tile < end_tile)[:, None] & column_mask[None, :]
        gain += tl.sum(tl.load(place, mask=there, other=0.0), axis=0)
        shift += tl.sum(tl.load(place + WIDTH, mask=there, other=0.0), axis=0)
    tl.store(dgain + expert * WIDTH + columns, gain.to(dgain.dtype.element_ty), mask=column_mask)
    tl.store(dshift + expert * WIDTH + columns, shift.to(dshift.dtype.element_ty), mask=column_mask)


# ---- which configs are allowed, and the default ----------------------------------------------------------------------


_FC1, _FC2, _DHIDDEN = 25, 8, 40
"""Instructions that an element takes in the epilogues of fc1 (GELU, gain, statistics), of fc2 (LayerNorm, residual) and
of the hidden rows' gradient."""


def _dhidden_accumulators(arch: int) -> int:
    """Its epilogue holds several tiles: on sm_100, 64 accumulators a thread would spill 8 to 32 bytes."""
    return 32 if arch == 100 else 64


def valid_configs(arch: int, dtype: torch.dtype, width: int, hidden: int) -> dict[str, list[Config]]:
    """What each launch may run with: "fc1", "fc2", "dhidden" (through the activation), "dx", "dfc1" and "dfc2"."""
    return {
        "fc1": valid_row_configs(arch, dtype, hidden),
        "fc2": valid_row_configs(arch, dtype, width),
        "dhidden": valid_row_configs(arch, dtype, hidden, accumulators=_dhidden_accumulators(arch)),
        "dx": valid_row_configs(arch, dtype, width),
        "dfc1": valid_weight_gradient_configs(arch, dtype, width),
        "dfc2": valid_weight_gradient_configs(arch, dtype, hidden),
    }


def default_configs(
    arch: int, dtype: torch.dtype, num_rows: int, num_experts: int, width: int, hidden: int
) -> dict[str, Config]:
    """The choice without tuning, one of :func:`valid_configs` for each launch."""
    rows = (arch, dtype, num_rows, num_experts)
    accumulators = _dhidden_accumulators(arch)
    return {
        "fc1": default_row_config(*rows, hidden, width, epilogue=_FC1),
        "fc2": default_row_config(*rows, width, hidden, epilogue=_FC2),
        "dhidden": default_row_config(*rows, hidden, width, accumulators=accumulators, epilogue=_DHIDDEN),
        "dx": default_row_config(*rows, width, hidden),
        "dfc1": default_weight_gradient_config(arch, dtype, num_rows, hidden, width),
        "dfc2": default_weight_gradient_config(arch, dtype, num_rows, width, hidden),
    }


# ---- launches --------------------------------------------------------------------------------------------------------


def fold(norm_weight: Tensor, norm_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """(2, E, D) fp32: ``fc2_weight[e] @ norm_weight[e]`` and ``fc2_weight[e] @ norm_bias[e] + fc2_bias[e]``.

    Args:
        norm_weight, norm_bias: (E, F). fc2_weight: (E, D, F). fc2_bias: (E, D). Any floating dtype up to fp32.

    Raises:
        ValueError: a tensor that is not contiguous.
    """
    check_layout(fc2_weight=fc2_weight)
    check_contiguous(norm_weight=norm_weight, norm_bias=norm_bias, fc2_bias=fc2_bias)
    num_experts, width, hidden = fc2_weight.shape
    folded = fc2_weight.new_empty(2, num_experts, width, dtype=torch.float32)
    block_m = 8
    launch(
        _fold_kernel,
        (triton.cdiv(width, block_m), num_experts),
        norm_weight,
        norm_bias,
        fc2_weight,
        fc2_bias,
        folded,
        STRIDE_E=fc2_weight.stride(0),
        STRIDE_D=fc2_weight.stride(1),
        WIDTH=width,
        HIDDEN=hidden,
        BLOCK_M=block_m,
        BLOCK_K=256,
        num_warps=4,
    )
    return folded


def forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    expert_offsets: Tensor,
    residual: Tensor | None = None,
    row_index: Tensor | None = None,
    eps: float = 1e-5,
    folded: Tensor | None = None,
    save: bool = False,
    *,
    precision: str = "ieee",
    configs: dict[str, Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``ops.multiway_ffn``: two launches, three if `folded` must be computed.

    Args:
        x: (N, D) fp32, bf16 or fp16, last dimension contiguous.
        fc1_weight (E, F, D), fc1_bias (E, F), fc2_weight (E, D, F), fc2_bias (E, D): in x's dtype.
        norm_weight, norm_bias: (E, F), any floating dtype, or None for no LayerNorm.
        expert_offsets: int32 (E + 1,), read on the device.
        residual: (N, D), any floating dtype.
        row_index: int32 or int64 (N,).
        folded: :func:`fold` of the last four parameters, None to compute it here.
        save: keep what `backward` needs.
        precision: of fp32 products: "ieee" or "tf32".
        configs: see :func:`valid_configs`; None for the defaults of compute capability 8.0.

    Returns:
        out (N, D) in the promoted dtype of x and residual, rows past the last offset zeros (plus the residual); then
        for `backward`, empty without `save`: pre-activation (N, F) and, with a LayerNorm, mean (N,), rstd (N,) in fp32,
        branch (N, D) (``rstd * (h * gain - mean * gain) @ W2.T``) and folded (2, E, D); all in expert order.

    Raises:
        ValueError: rows whose last dimension is not contiguous, a parameter that is not contiguous.
    """
    check_layout(x=x, fc1_weight=fc1_weight, fc2_weight=fc2_weight, residual=residual)
    check_contiguous(
        fc1_bias=fc1_bias, norm_weight=norm_weight, norm_bias=norm_bias, fc2_bias=fc2_bias, row_index=row_index
    )
    num_experts, hidden_width, width = fc1_weight.shape
    num_rows = x.shape[0]
    out = x.new_empty(x.shape, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    pre = x.new_empty((num_rows, hidden_width) if save else 0)
    hidden = x.new_empty(num_rows, hidden_width)
    keeps_norm = save and norm_weight is not None
    mean, rstd = (x.new_empty(num_rows if keeps_norm else 0, dtype=torch.float32) for _ in range(2))
    branch = x.new_empty(x.shape if keeps_norm else 0)
    configs = configs or default_configs(80, x.dtype, num_rows, num_experts, width, hidden_width)
    fc1_config, fc2_config = configs["fc1"], configs["fc2"]

    if norm_weight is None or norm_bias is None:
        launch_rows(
            x, fc1_weight, fc1_bias, expert_offsets, hidden, gelu=True, x_index=row_index,
            pre=pre if save else None, config=fc1_config, precision=precision,
        )  # fmt: skip
        launch_rows(
            hidden, fc2_weight, fc2_bias, expert_offsets, out, residual=residual, out_index=row_index,
            config=fc2_config, precision=precision,
        )  # fmt: skip
        return out, pre, mean, rstd, branch, mean.new_empty(0)

    if folded is None:
        folded = fold(norm_weight, norm_bias, fc2_weight, fc2_bias)
    if out.numel() == 0:
        return out, pre, mean, rstd, branch, folded if save else mean.new_empty(0)
    center = x.dtype == torch.float32
    column_tiles = triton.cdiv(hidden_width, fc1_config.block_n)
    partials = mean.new_empty(2, column_tiles, num_rows)
    row_tiles = row_tile_capacity(num_rows, num_experts, fc1_config.block_m)
    launch(
        _fc1_kernel,
        (row_tiles * column_tiles,),
        x,
        fc1_weight,
        fc1_bias,
        None if center else norm_weight,
        expert_offsets,
        row_index,
        hidden,
        pre if save else None,
        partials,
        num_rows,
        NUM_EXPERTS=num_experts,
        DEPTH=width,
        WIDTH=hidden_width,
        STRIDE_X=x.stride(0),
        STRIDE_WE=fc1_weight.stride(0),
        STRIDE_WN=fc1_weight.stride(1),
        PRECISION=precision,
        BLOCK_M=fc1_config.block_m,
        BLOCK_N=fc1_config.block_n,
        BLOCK_K=fc1_config.block_k,
        GROUP=GROUP_M,
        PARTS=fc1_config.parts,
        **fc1_config.options(),
    )
    row_tiles = row_tile_capacity(num_rows, num_experts, fc2_config.block_m)
    launch(
        _fc2_kernel,
        (row_tiles * triton.cdiv(width, fc2_config.block_n),),
        hidden,
        fc2_weight,
        norm_weight,
        folded,
        partials,
        expert_offsets,
        residual,
        row_index,
        out,
        branch if save else None,
        mean if save else None,
        rstd if save else None,
        num_rows,
        NUM_EXPERTS=num_experts,
        DEPTH=hidden_width,
        WIDTH=width,
        STRIDE_WE=fc2_weight.stride(0),
        STRIDE_WN=fc2_weight.stride(1),
        STRIDE_RESIDUAL=0 if residual is None else residual.stride(0),
        STATISTICS_TILE=fc1_config.block_n,
        STATISTICS_TILES=column_tiles,
        PADDED_TILES=triton.next_power_of_2(column_tiles),
        EPS=eps,
        CENTER=center,
        PRECISION=precision,
        BLOCK_M=fc2_config.block_m,
        BLOCK_N=fc2_config.block_n,
        BLOCK_K=fc2_config.block_k,
        GROUP=GROUP_M,
        PARTS=fc2_config.parts,
        **fc2_config.options(),
    )
    return out, pre, mean, rstd, branch, folded if save else mean.new_empty(0)


def backward(
    dy: Tensor,
    x: Tensor,
    fc1_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc2_weight: Tensor,
    expert_offsets: Tensor,
    row_index: Tensor | None,
    pre: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch: Tensor,
    folded: Tensor,
    needs_x: bool = True,
    needs_parameters: bool = True,
    *,
    precision: str = "ieee",
    configs: dict[str, Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dfc1_weight, dfc1_bias, dnorm_weight, dnorm_bias, dfc2_weight, dfc2_bias): six launches.

    Args:
        dy: (N, D) in x's dtype, last dimension contiguous.
        pre, mean, rstd, branch, folded: what :func:`forward` saved.

    Returns:
        Empty tensors for what is not needed; zeros for an expert without rows and for rows past the last offset.

    Raises:
        ValueError: rows whose last dimension is not contiguous, a parameter that is not contiguous.
    """
    check_layout(dy=dy, x=x, fc1_weight=fc1_weight, fc2_weight=fc2_weight)
    check_contiguous(norm_weight=norm_weight, norm_bias=norm_bias, row_index=row_index, pre=pre, branch=branch)
    num_experts, hidden_width, width = fc1_weight.shape
    num_rows = x.shape[0]
    configs = configs or default_configs(80, x.dtype, num_rows, num_experts, width, hidden_width)
    hidden_config = configs["dhidden"]
    dpre, hidden = torch.empty_like(pre), torch.empty_like(pre)
    has_norm = norm_weight is not None and norm_bias is not None
    dots = partials = None
    if has_norm:
        dots = mean.new_empty(2, num_rows)
        partials = mean.new_empty(num_rows // hidden_config.block_m + num_experts, 2, hidden_width)
    if num_rows:
        if has_norm:
            rows_per_program = 4
            launch(
                _row_dots_kernel,
                (row_tile_capacity(num_rows, num_experts, rows_per_program),),
                dy,
                branch,
                folded,
                expert_offsets,
                row_index,
                dots,
                num_rows,
                NUM_EXPERTS=num_experts,
                WIDTH=width,
                STRIDE_DY=dy.stride(0),
                BLOCK_M=rows_per_program,
                BLOCK_N=256,
                num_warps=4,
            )
        row_tiles = row_tile_capacity(num_rows, num_experts, hidden_config.block_m)
        launch(
            _hidden_gradient_kernel,
            (row_tiles * triton.cdiv(hidden_width, hidden_config.block_n),),
            dy,
            fc2_weight,
            norm_weight,
            norm_bias,
            pre,
            mean if has_norm else None,
            rstd if has_norm else None,
            dots,
            expert_offsets,
            row_index,
            dpre,
            hidden,
            partials,
            num_rows,
            NUM_EXPERTS=num_experts,
            DEPTH=width,
            WIDTH=hidden_width,
            STRIDE_DY=dy.stride(0),
            STRIDE_WE=fc2_weight.stride(0),
            STRIDE_WK=fc2_weight.stride(1),
            PRECISION=precision,
            BLOCK_M=hidden_config.block_m,
            BLOCK_N=hidden_config.block_n,
            BLOCK_K=hidden_config.block_k,
            GROUP=GROUP_M,
            **hidden_config.options(),
        )
    dx = x.new_empty(x.shape if needs_x else 0)
    launch_rows(
        dpre, fc1_weight, None, expert_offsets, dx, transposed=True, out_index=row_index, config=configs["dx"],
        precision=precision,
    )  # fmt: skip
    empty = x.new_empty(0)
    if not needs_parameters:
        return dx, empty, empty, empty, empty, empty, empty
    dfc2 = launch_weight_gradient(
        dy,
        hidden,
        fc2_weight,
        expert_offsets,
        row_index=row_index,
        gather_x=False,
        config=configs["dfc2"],
        precision=precision,
    )
    dfc1 = launch_weight_gradient(
        dpre,
        x,
        fc1_weight,
        expert_offsets,
        row_index=row_index,
        gather_dy=False,
        config=configs["dfc1"],
        precision=precision,
    )
    dnorm_weight = dnorm_bias = empty
    if has_norm:
        dnorm_weight, dnorm_bias = torch.empty_like(norm_weight), torch.empty_like(norm_bias)
        launch(
            _norm_gradient_kernel,
            (triton.cdiv(hidden_width, 64), num_experts),
            partials,
            expert_offsets,
            dnorm_weight,
            dnorm_bias,
            WIDTH=hidden_width,
            BLOCK_M=hidden_config.block_m,
            BLOCK_N=64,
            TILES=16,
            num_warps=4,
        )
    return dx, *dfc1, dnorm_weight, dnorm_bias, *dfc2
