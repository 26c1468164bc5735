"""A linear layer with one weight per expert, with fused bias, GELU and residual, over rows in expert order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..tuning import choose
from . import _library
from ._library import (
    by_reference,
    check_bounds,
    check_offsets,
    check_parameter,
    check_residual,
    check_row_index,
    check_rows,
    check_same_dtype,
    empty,
    rows_in_use,
    segments,
    wide,
)
from ._triton import precision, unit_stride


def multiway_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_offsets: Tensor,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    row_index: Tensor | None = None,
    bounds: Sequence[int] | None = None,
) -> Tensor:
    """``residual + activation(x @ weight[e].T + bias[e])``, e the expert of the row.

    Args:
        x: (N, I) rows; fp32, bf16, fp16 or fp64.
        weight: (E, O, I) in x's dtype (or under autocast).
        bias: (E, O) or None.
        expert_offsets: int32 (E + 1,); position r belongs to expert e iff ``offsets[e] <= r < offsets[e + 1]``.
            Positions at or past the last offset are padding: their output is unspecified.
        activation: None or "gelu", the exact erf GELU computed in fp32 as in the public code
            (torchscale ``feedforward_network.py``).
        residual: (N, O), any floating dtype; the sum is in the promoted dtype.
        row_index: int32/int64 (N,), a permutation: position r stands for row ``row_index[r]`` of x, of residual and of
            the output, so that tokens in any order reach their expert without being moved. None = rows are in expert
            order.
        bounds: E + 1 ints, what the host knows of expert_offsets (:class:`beit3_fast.layout.ExpertRows`). Where plain
            PyTorch serves the call on a GPU, it reads the offsets without them, which waits for the device.

    Returns:
        (N, O) rows, in the same order as x.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, named in the message.
    """
    check_rows(x)
    check_parameter("weight", weight, (None, None, x.shape[1]), x)
    check_same_dtype(x, weight=weight)
    check_linear(x, weight.shape[:2], bias, expert_offsets, activation, residual)
    check_row_index(row_index, x)
    check_bounds(bounds, weight.shape[0], x)
    if by_reference():
        return multiway_linear_reference(
            x, weight, bias, expert_offsets, activation=activation, residual=residual, row_index=row_index
        )
    save = (
        activation is not None
        and torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in (x, weight, bias))
    )
    gelu = activation == "gelu"
    out, _ = _multiway_linear(x, weight, bias, expert_offsets, gelu, residual, row_index, save, bounds)
    return out


def check_linear(
    x: Tensor,
    weight_shape: tuple[int, ...],
    bias: Tensor | None,
    expert_offsets: Tensor,
    activation: str | None,
    residual: Tensor | None,
) -> None:
    """What comes with a weight (E, O, I), however that is stored; `weight_shape` is (E, O)."""
    num_experts, width = weight_shape
    if bias is not None:
        check_parameter("bias", bias, (num_experts, width), x)
    check_same_dtype(x, bias=bias)
    check_offsets(expert_offsets, num_experts, x)
    check_residual(residual, (x.shape[0], width), x)
    if activation not in (None, "gelu"):
        raise ValueError(f"activation must be None or 'gelu', got {activation!r}")


def multiway_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_offsets: Tensor,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    row_index: Tensor | None = None,
) -> Tensor:
    """:func:`multiway_linear` in plain PyTorch: one ``F.linear`` per expert, padding rows are zeros."""
    rows = x if row_index is None else x[row_index.long()]
    # experts without rows too: their pieces are empty and tie the result to the graph
    pieces = [
        F.linear(rows[where], weight[expert], None if bias is None else bias[expert])
        for expert, where in segments(expert_offsets, x.shape[0], all_experts=True)
    ]
    used = sum(piece.shape[0] for piece in pieces)
    out = torch.cat([*pieces, pieces[0].new_zeros(x.shape[0] - used, weight.shape[1])])
    if activation == "gelu":
        out = gelu(out)
    if row_index is not None:
        out = torch.zeros_like(out).index_copy(0, row_index.long(), out)
    return out if residual is None else residual + out


def gelu(x: Tensor) -> Tensor:
    """Exact erf GELU, computed in fp32 (fp64 for fp64 input), in x's dtype."""
    return F.gelu(x.to(wide(x.dtype))).to(x.dtype)


def gelu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of :func:`gelu` at x, in x's dtype."""
    return torch.ops.aten.gelu_backward(dy.to(wide(x.dtype)), x.to(wide(x.dtype))).to(x.dtype)


def linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, expert_offsets: Tensor, bounds: Sequence[int] | None
) -> Tensor:
    """(N, O) ``x @ weight[e].T + bias[e]``; not differentiable: for op implementations."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    end = 0
    for expert, rows in segments(expert_offsets, x.shape[0], bounds=bounds):
        # written in place: concatenating the experts' outputs would be one more pass over memory
        if bias is None:
            torch.mm(x[rows], weight[expert].t(), out=out[rows])
        else:
            torch.addmm(bias[expert], x[rows], weight[expert].t(), out=out[rows])
        end = rows.stop
    out[end:].zero_()
    return out


def linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    needs_x: bool,
    needs_parameters: bool,
    bounds: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dx, dweight, dbias) of :func:`linear_forward`; a (0,) tensor for what is not needed.
    A missing expert's gradients are zeros."""
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if needs_x else empty(x)
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format) if needs_parameters else empty(weight)
    dbias = weight.new_zeros(weight.shape[:2]) if needs_parameters else empty(weight)
    for expert, rows in segments(expert_offsets, x.shape[0], bounds=bounds):
        last = bounds is not None and rows.stop == bounds[-1]  # only behind its rows may padding follow
        dy_rows, x_rows = (rows_in_use(t, rows, expert_offsets) if last else t[rows] for t in (dy, x))
        if needs_x:
            torch.mm(dy_rows, weight[expert], out=dx[rows])
        if needs_parameters:
            torch.mm(dy_rows.t(), x_rows, out=dweight[expert])
            torch.sum(dy_rows, 0, out=dbias[expert])
    return dx, dweight, dbias


def _plain_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_offsets: Tensor,
    use_gelu: bool,
    residual: Tensor | None,
    row_index: Tensor | None,
    save: bool,
    bounds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    rows = x if row_index is None else x.index_select(0, row_index)
    pre = linear_forward(rows, weight, bias, expert_offsets, bounds)
    out = gelu(pre) if use_gelu else pre
    if row_index is not None:
        out = torch.empty_like(out).index_copy_(0, row_index.long(), out)
    if residual is not None:
        out = residual + out
    return out, pre if save and use_gelu else empty(x)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_offsets: Tensor,
    use_gelu: bool,
    residual: Tensor | None,
    row_index: Tensor | None,
    save: bool,
    bounds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[1])
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty(shape, dtype=dtype), x.new_empty(shape) if save and use_gelu else x.new_empty(0)


def _plain_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    pre: Tensor | None,
    row_index: Tensor | None,
    needs_x: bool,
    needs_parameters: bool,
    bounds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if row_index is not None:
        dy, x = dy.index_select(0, row_index), x.index_select(0, row_index)
    dpre = dy if pre is None else gelu_backward(dy, pre)
    dx, dweight, dbias = linear_backward(dpre, x, weight, expert_offsets, needs_x, needs_parameters, bounds)
    if row_index is not None and needs_x:
        dx = torch.empty_like(dx).index_copy_(0, row_index.long(), dx)
    return dx, dweight, dbias


def _backward_fake(dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_x, needs_parameters = args[3:5]
    dx = x.new_empty(x.shape if needs_x else 0)
    dweight = weight.new_empty(weight.shape if needs_parameters else 0)
    return dx, dweight, weight.new_empty(weight.shape[:2] if needs_parameters else 0)


def _compiled_forward(*args: Any) -> tuple[Tensor, Tensor]:
    return compiled_forward(*args[:-1], bounds=args[-1])


def _compiled_backward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return compiled_backward(*args[:-1], bounds=args[-1])


def _triton_forward(x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    from ..kernels import multiway_linear as kernels

    num_experts, out_width, in_width = weight.shape
    choice = choose("multiway_linear", x.device, x.dtype, x.shape[0], num_experts, (in_width, out_width))
    if not choice.use_triton:
        return _compiled_forward(x, weight, *args)
    return kernels.forward(x, weight, *args[:-1], precision=precision(x.dtype), configs=choice.configs)


def _triton_backward(dy: Tensor, x: Tensor, weight: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    from ..kernels import multiway_linear as kernels

    num_experts, out_width, in_width = weight.shape
    choice = choose("multiway_linear_backward", x.device, x.dtype, x.shape[0], num_experts, (in_width, out_width))
    if not choice.use_triton:
        return _compiled_backward(dy, x, weight, *args)
    configs = {"precision": precision(x.dtype), "configs": choice.configs}
    return kernels.backward(unit_stride(dy), x, weight, *args[:-1], **configs)


_FORWARD = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor expert_offsets, bool gelu, Tensor? residual, Tensor? row_index,"
    " bool save{bounds}) -> (Tensor out, Tensor pre_activation)"
)
_BACKWARD = (
    "(Tensor dy, Tensor x, Tensor weight, Tensor expert_offsets, Tensor? pre_activation, Tensor? row_index,"
    " bool needs_x, bool needs_parameters{bounds}) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)
_BOUNDS = ", SymInt[]? bounds"
compiled_forward = _library.define_compiled("multiway_linear_cpu" + _FORWARD.format(bounds=""), _plain_forward, _fake)
compiled_backward = _library.define_compiled(
    "multiway_linear_cpu_backward" + _BACKWARD.format(bounds=""), _plain_backward, _backward_fake
)
_multiway_linear = _library.define(
    "multiway_linear" + _FORWARD.format(bounds=_BOUNDS), _compiled_forward, _fake, _triton_forward
)
_multiway_linear_backward = _library.define(
    "multiway_linear_backward" + _BACKWARD.format(bounds=_BOUNDS), _compiled_backward, _backward_fake, _triton_backward
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, expert_offsets, use_gelu, residual, row_index, _, ctx.bounds = inputs
    ctx.save_for_backward(x, weight, bias, expert_offsets, output[1] if use_gelu else None, row_index)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 9
    x, weight, bias, expert_offsets, pre, row_index = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    dx = dweight = dbias = None
    if torch.is_grad_enabled():
        activation = None if pre is None else "gelu"
        dx, dweight, dbias = _library.gradients_to_differentiate(
            lambda x, weight, bias: multiway_linear_reference(
                x, weight, bias, expert_offsets, activation=activation, row_index=row_index
            ),
            (x, weight, bias),
            ctx.needs_input_grad[:3],
            dy.to(x.dtype),
        )
    elif needs_x or needs_weight or needs_bias:
        dx, dweight, dbias = _multiway_linear_backward(
            dy.to(x.dtype), x, weight, expert_offsets, pre, row_index, needs_x, needs_weight or needs_bias, ctx.bounds
        )
    dresidual = None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)
    return (
        dx if needs_x else None,
        dweight if needs_weight else None,
        dbias if needs_bias else None,
        None,
        None,
        dresidual,
        None,
        None,
        None,
    )


_library.differentiate(_multiway_linear, _setup, _backward)
_library.autocast(_multiway_linear, ("x", "weight", "bias"))
