"""The multiway linear layer: one grouped GEMM over rows in expert order, forward and backward.

    out[row(r)] = residual[row(r)] + act(x[row(r)] @ weight[e].T + bias[e]),   offsets[e] <= r < offsets[e + 1]

row(r) is r, or row_index[r]. One program computes one tile of one expert. The grid holds the most tiles any offsets
can need; programs past the last tile leave at once, so that the host never waits for the offsets.
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
from .gelu import gelu as gelu_
from .gelu import gelu_and_derivative
from .launch import check_contiguous, check_layout, launch
from .tiles import halves, locate_tile, row_tile_capacity

GROUP_M = 8  # row tiles that share a weight tile in L2


@triton.jit
def product(
    x_tile,
    w_tile,
    column_mask,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The GEMM main loop: fp32 sums of x_tile [BM, BK] @ w_tile [BK, BN], both stepping along DEPTH."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, DEPTH, BLOCK_K):
        if DEPTH % BLOCK_K == 0:
            a = tl.load(x_tile)  # [BM, BK]
        else:
            a = tl.load(x_tile, mask=k[None, :] < DEPTH - start, other=0.0)
        if DEPTH % BLOCK_K == 0 and WIDTH % BLOCK_N == 0:
            b = tl.load(w_tile)  # [BK, BN]
        else:
            b = tl.load(w_tile, mask=(k[:, None] < DEPTH - start) & column_mask[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        x_tile += BLOCK_K
        w_tile += BLOCK_K * STRIDE_WK
    return acc


@triton.jit
def tile_rows(first, end, row_index, num_rows, BLOCK_M: tl.constexpr):
    """(positions, rows, mask) of a row tile, in int64. Positions past `end` repeat the last one: loads need no mask."""
    positions = first + tl.arange(0, BLOCK_M)
    inside = positions < end
    positions = tl.minimum(positions, end - 1)
    rows = positions
    if row_index is not None:
        rows = tl.load(row_index + positions)
        tl.device_assert((rows >= 0) & (rows < num_rows), "row_index out of range")
    return positions.to(tl.int64), rows.to(tl.int64), inside


@triton.jit
def finish_tile(
    acc, out, residual, row_index, first, end, num_rows, column_tile, WIDTH: tl.constexpr,
    STRIDE_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """out[row(r)] = acc + residual[row(r)]. Addresses are made here: none of them lives through the main loop.

    In two PARTS, a half of the columns after the other, there is room for them beside 128 accumulators a thread.
    """
    if PARTS == 1:
        _finish(
            acc, out, residual, row_index, first, end, num_rows, column_tile, WIDTH, STRIDE_RESIDUAL, BLOCK_M, BLOCK_N
        )
    else:
        both = halves(acc, BLOCK_M, BLOCK_N)
        for side in tl.static_range(2):
            _finish(
                both[side], out, residual, row_index, first, end, num_rows, 2 * column_tile + side, WIDTH,
                STRIDE_RESIDUAL, BLOCK_M, BLOCK_N // 2,
            )  # fmt: skip


@triton.jit
def _finish(
    acc, out, residual, row_index, first, end, num_rows, column_tile, WIDTH: tl.constexpr,
    STRIDE_RESIDUAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    _, rows, row_mask = tile_rows(first, end, row_index, num_rows, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row_mask[:, None] & (columns < WIDTH)[None, :]
    if residual is not None:
        acc += tl.load(residual + rows[:, None] * STRIDE_RESIDUAL + columns[None, :], mask=mask).to(tl.float32)
    tl.store(out + rows[:, None] * WIDTH + columns[None, :], acc.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x,
    weight,
    bias,
    expert_offsets,
    residual,
    x_index,
    out_index,
    out,
    pre,
    num_rows,
    NUM_EXPERTS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    STRIDE_X: tl.constexpr,
    STRIDE_WE: tl.constexpr,
    STRIDE_WN: tl.constexpr,
    STRIDE_WK: tl.constexpr,
    STRIDE_RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
):
    expert, first, end, column_tile = locate_tile(expert_offsets, num_rows, NUM_EXPERTS, WIDTH, BLOCK_M, BLOCK_N, GROUP)
    if first >= end:
        return
    if expert == NUM_EXPERTS:  # padding rows become zeros: nobody may meet what was never written
        zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        finish_tile(
            zeros, out, residual, out_index, first, end, num_rows, column_tile, WIDTH, STRIDE_RESIDUAL, BLOCK_M,
            BLOCK_N, PARTS,
        )  # fmt: skip
        return

    _, x_rows, _ = tile_rows(first, end, x_index, num_rows, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < WIDTH
    k = tl.arange(0, BLOCK_K)
    expert = expert.to(tl.int64)
    x_tile = x + x_rows[:, None] * STRIDE_X + k[None, :]  # [BM, BK]
    w_tile = weight + expert * STRIDE_WE + columns[None, :] * STRIDE_WN + k[:, None] * STRIDE_WK  # [BK, BN]
    acc = product(x_tile, w_tile, column_mask, DEPTH, WIDTH, STRIDE_WK, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION)
    if bias is not None:
        acc += tl.load(bias + expert * WIDTH + columns, mask=column_mask).to(tl.float32)[None, :]
    if pre is not None:
        finish_tile(acc, pre, None, None, first, end, num_rows, column_tile, WIDTH, 0, BLOCK_M, BLOCK_N, PARTS)
    if GELU:
        acc = gelu_(acc)
    finish_tile(
        acc, out, residual, out_index, first, end, num_rows, column_tile, WIDTH, STRIDE_RESIDUAL, BLOCK_M, BLOCK_N,
        PARTS,
    )  # fmt: skip


@triton.jit
def _weight_gradient_kernel(
    dy,
    x,
    expert_offsets,
    row_index,
    dweight,
    dbias,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    STRIDE_DY: tl.constexpr,
    STRIDE_X: tl.constexpr,
    GATHER_DY: tl.constexpr,
    GATHER_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dweight[e] = dy.T @ x and dbias[e] = column sums of dy over the rows of expert e; zeros if it has none.

    GATHER_DY, GATHER_X: position r of that operand is its row row_index[r].

    The grid is (programs, experts). One program sums all rows of its tile, in order: bitwise reproducible. The first
    programs take the column sums alone. (In the loop of the products they would need the tile of dy in
    registers as well as in shared memory, where wgmma reads it.)
    """
    in_tiles: tl.constexpr = (IN + BLOCK_N - 1) // BLOCK_N
    out_tiles: tl.constexpr = (OUT + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    expert = tl.program_id(1)
    start = tl.load(expert_offsets + expert)
    stop = tl.load(expert_offsets + expert + 1)

    if program < out_tiles:
        outs = program * BLOCK_M + tl.arange(0, BLOCK_M)
        out_mask = outs < OUT
        column_sum = tl.zeros((BLOCK_M,), tl.float32)
        for first in range(start, stop, 2 * BLOCK_K):
            positions = first + tl.arange(0, 2 * BLOCK_K)
            inside = positions < stop
            rows = positions
            if GATHER_DY:
                rows = tl.load(row_index + positions, mask=inside, other=0)
            tile = dy + rows.to(tl.int64)[:, None] * STRIDE_DY + outs[None, :]  # [2 BK, BM]
            values = tl.load(tile, mask=inside[:, None] & out_mask[None, :], other=0.0)
            column_sum += tl.sum(values.to(tl.float32), axis=0)
        tl.store(dbias + expert * OUT + outs, column_sum.to(dbias.dtype.element_ty), mask=out_mask)
        return

    outs = ((program - out_tiles) // in_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    ins = ((program - out_tiles) % in_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    out_mask = outs < OUT
    in_mask = ins < IN
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(start, stop, BLOCK_K):
        positions = first + tl.arange(0, BLOCK_K)
        inside = positions < stop
        rows = positions
        if GATHER_DY or GATHER_X:
            rows = tl.load(row_index + positions, mask=inside, other=0)
        dy_rows = rows if GATHER_DY else positions
        x_rows = rows if GATHER_X else positions
        dy_tile = dy + dy_rows.to(tl.int64)[:, None] * STRIDE_DY + outs[None, :]  # [BK, BM]
        x_tile = x + x_rows.to(tl.int64)[:, None] * STRIDE_X + ins[None, :]  # [BK, BN]
        # rows of the next expert must not enter; both are masked, since a NaN times zero is a NaN
        a = tl.load(dy_tile, mask=inside[:, None] & out_mask[None, :], other=0.0)
        b = tl.load(x_tile, mask=inside[:, None] & in_mask[None, :], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
    tile = dweight + expert.to(tl.int64) * OUT * IN + outs.to(tl.int64)[:, None] * IN + ins[None, :]
    tl.store(tile, acc.to(dweight.dtype.element_ty), mask=out_mask[:, None] & in_mask[None, :])


@triton.jit
def _gelu_backward_kernel(dy, pre, row_index, dpre, WIDTH: tl.constexpr, STRIDE_DY: tl.constexpr, BLOCK: tl.constexpr):
    """dpre[r] = dy[row(r)] * gelu'(pre[r]); one program a row."""
    position = tl.program_id(0).to(tl.int64)
    row = position
    if row_index is not None:
        row = tl.load(row_index + position).to(tl.int64)
    for start in range(0, WIDTH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < WIDTH
        _, slope = gelu_and_derivative(tl.load(pre + position * WIDTH + columns, mask=inside, other=0.0).to(tl.float32))
        upstream = tl.load(dy + row * STRIDE_DY + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(dpre + position * WIDTH + columns, (upstream * slope).to(dpre.dtype.element_ty), mask=inside)


# ---- which configs are allowed, and the default ----------------------------------------------------------------------


def valid_configs(arch: int, dtype: torch.dtype, in_width: int, out_width: int) -> dict[str, list[Config]]:
    """What each launch may run with: "forward", "dx" (the gradient of x) and "dweight"."""
    return {
        "forward": valid_row_configs(arch, dtype, out_width),
        "dx": valid_row_configs(arch, dtype, in_width),
        "dweight": valid_weight_gradient_configs(arch, dtype, in_width),
    }


def default_configs(
    arch: int, dtype: torch.dtype, num_rows: int, num_experts: int, in_width: int, out_width: int
) -> dict[str, Config]:
    """The choice without tuning, one of :func:`valid_configs` for each launch."""
    return {
        "forward": default_row_config(arch, dtype, num_rows, num_experts, out_width, in_width),
        "dx": default_row_config(arch, dtype, num_rows, num_experts, in_width, out_width),
        "dweight": default_weight_gradient_config(arch, dtype, num_rows, out_width, in_width),
    }


# ---- launches --------------------------------------------------------------------------------------------------------


def launch_rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_offsets: Tensor,
    out: Tensor,
    *,
    transposed: bool = False,
    gelu: bool = False,
    residual: Tensor | None = None,
    x_index: Tensor | None = None,
    out_index: Tensor | None = None,
    pre: Tensor | None = None,
    precision: str,
    config: Config,
) -> None:
    """Fills `out` (N, width) with ``residual + act(x @ weight[e].T + bias[e])``, or ``x @ weight[e]`` if transposed."""
    num_experts, width, depth = weight.shape if not transposed else (weight.shape[0], weight.shape[2], weight.shape[1])
    num_rows = out.shape[0]
    if out.numel() == 0:
        return
    grid = (row_tile_capacity(num_rows, num_experts, config.block_m) * triton.cdiv(width, config.block_n),)
    stride_n, stride_k = weight.stride()[1:] if not transposed else weight.stride()[:0:-1]
    launch(
        _linear_kernel,
        grid,
        x,
        weight,
        bias,
        expert_offsets,
        residual,
        x_index,
        out_index,
        out,
        pre,
        num_rows,
        NUM_EXPERTS=num_experts,
        DEPTH=depth,
        WIDTH=width,
        STRIDE_X=x.stride(0),
        STRIDE_WE=weight.stride(0),
        STRIDE_WN=stride_n,
        STRIDE_WK=stride_k,
        STRIDE_RESIDUAL=0 if residual is None else residual.stride(0),
        GELU=gelu,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=GROUP_M,
        PARTS=config.parts,
        **config.options(),
    )


def launch_weight_gradient(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    *,
    row_index: Tensor | None = None,
    gather_dy: bool = True,
    gather_x: bool = True,
    precision: str,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """(dweight, dbias) of a linear layer, in weight's dtype; zeros for an expert without rows.

    `row_index` holds for those of dy and x that are to be gathered; the other is in expert order.
    """
    num_experts, out_width, in_width = weight.shape
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = weight.new_empty(num_experts, out_width)
    grid = (triton.cdiv(out_width, config.block_m) * (1 + triton.cdiv(in_width, config.block_n)), num_experts)
    launch(
        _weight_gradient_kernel,
        grid,
        dy,
        x,
        expert_offsets,
        row_index,
        dweight,
        dbias,
        OUT=out_width,
        IN=in_width,
        STRIDE_DY=dy.stride(0),
        STRIDE_X=x.stride(0),
        GATHER_DY=gather_dy and row_index is not None,
        GATHER_X=gather_x and row_index is not None,
        PRECISION=precision,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        **config.options(),
    )
    return dweight, dbias


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_offsets: Tensor,
    gelu: bool = False,
    residual: Tensor | None = None,
    row_index: Tensor | None = None,
    save: bool = False,
    *,
    precision: str = "ieee",
    configs: dict[str, Config] | None = None,
) -> tuple[Tensor, Tensor]:
    """``ops.multiway_linear``: one launch.

    Args:
        x: (N, I) fp32, bf16 or fp16, last dimension contiguous.
        weight: (E, O, I) and bias (E, O) in x's dtype.
        expert_offsets: int32 (E + 1,), read on the device.
        residual: (N, O), any floating dtype.
        row_index: int32 or int64 (N,).
        save: keep the pre-activation for `backward`.
        precision: of fp32 products: "ieee" or "tf32".
        configs: see :func:`valid_configs`; None for the defaults of compute capability 8.0.

    Returns:
        out (N, O) in the promoted dtype of x and residual, rows past the last offset zeros (plus the residual); and
        with `save` and `gelu` the pre-activation (N, O) in expert order, otherwise an empty tensor.

    Raises:
        ValueError: rows whose last dimension is not contiguous, a bias that is not contiguous.
    """
    check_layout(x=x, weight=weight, residual=residual)
    check_contiguous(bias=bias, row_index=row_index)
    num_experts, out_width, in_width = weight.shape
    configs = configs or default_configs(80, x.dtype, x.shape[0], num_experts, in_width, out_width)
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = x.new_empty(x.shape[0], weight.shape[1], dtype=dtype)
    pre = x.new_empty(out.shape if save and gelu else 0)
    launch_rows(
        x,
        weight,
        bias,
        expert_offsets,
        out,
        gelu=gelu,
        residual=residual,
        x_index=row_index,
        out_index=row_index,
        pre=pre if save and gelu else None,
        precision=precision,
        config=configs["forward"],
    )
    return out, pre


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    pre: Tensor | None = None,
    row_index: Tensor | None = None,
    needs_x: bool = True,
    needs_parameters: bool = True,
    *,
    precision: str = "ieee",
    configs: dict[str, Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias) of :func:`forward`: two launches, three with an activation.

    Args:
        dy: (N, O) in x's dtype, last dimension contiguous.
        pre: what `forward` saved, None without activation.

    Returns:
        Empty tensors for what is not needed; zeros for an expert without rows and for rows past the last offset.

    Raises:
        ValueError: rows whose last dimension is not contiguous.
    """
    check_layout(dy=dy, x=x, weight=weight)
    check_contiguous(pre=pre, row_index=row_index)
    num_experts, out_width, in_width = weight.shape
    configs = configs or default_configs(80, x.dtype, x.shape[0], num_experts, in_width, out_width)
    dpre, dpre_index = dy, row_index
    if pre is not None:
        dpre, dpre_index = torch.empty_like(pre), None
        if dpre.numel():
            launch(
                _gelu_backward_kernel,
                (dpre.shape[0],),
                dy,
                pre,
                row_index,
                dpre,
                WIDTH=pre.shape[1],
                STRIDE_DY=dy.stride(0),
                BLOCK=1024,
                num_warps=4,
            )
    dx = x.new_empty(x.shape if needs_x else 0)
    launch_rows(
        dpre,
        weight,
        None,
        expert_offsets,
        dx,
        transposed=True,
        x_index=dpre_index,
        out_index=row_index,
        precision=precision,
        config=configs["dx"],
    )
    if not needs_parameters:
        return dx, weight.new_empty(0), weight.new_empty(0)
    dweight, dbias = launch_weight_gradient(
        dpre,
        x,
        weight,
        expert_offsets,
        row_index=row_index,
        gather_dy=pre is None,
        precision=precision,
        config=configs["dweight"],
    )
    return dx, dweight, dbias
