"""LayerNorm with an affine per expert, optionally fused with the residual addition before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _library
from ._library import (
    by_reference,
    check_eps,
    check_offsets,
    check_parameter,
    check_residual,
    check_rows,
    check_tensors,
    empty,
    segments,
    wide,
)


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_offsets: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor]:
    """``(x - mean) / sqrt(var + eps) * weight[e] + bias[e]`` over the last dimension, e the expert of the row.

    Statistics are taken in fp32 (fp64 for fp64 input). The public code runs one ``nn.LayerNorm`` per modality
    (torchscale ``MultiwayNetwork``); this is both in one pass.

    Args:
        x: (N, D) rows in expert order; fp32, bf16, fp16 or fp64.
        weight, bias: (E, D), any floating dtype.
        expert_offsets: int32 (E + 1,); row r belongs to expert e iff ``offsets[e] <= r < offsets[e + 1]``.
            Rows at or past the last offset are padding: their output is unspecified.
        residual: (N, D) added to x first, in the promoted dtype of the two.
        eps: added to the variance.

    Returns:
        The normalised rows in x's dtype; with a residual ``(normed, x + residual)``, both in the promoted dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, named in the message.
    """
    check_rows(x)
    check_tensors(weight=weight)
    check_eps(eps)
    num_experts = weight.shape[0] if weight.ndim == 2 else 0
    check_parameter("weight", weight, (None, x.shape[1]), x)
    check_parameter("bias", bias, (num_experts, x.shape[1]), x)
    check_offsets(expert_offsets, num_experts, x)
    check_residual(residual, tuple(x.shape), x)
    if by_reference():
        return layer_norm_reference(x, weight, bias, expert_offsets, residual=residual, eps=eps)
    normed, total, _, _ = _layer_norm(x, residual, weight, bias, expert_offsets, eps)
    return normed if residual is None else (normed, total)


def layer_norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    expert_offsets: Tensor,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`layer_norm` in plain PyTorch: one ``F.layer_norm`` per expert, padding rows are zeros."""
    total = x if residual is None else x + residual
    compute = torch.promote_types(total.dtype, weight.dtype)
    # experts without rows too: their pieces are empty and tie the result to the graph
    pieces = [
        F.layer_norm(
            total[rows].to(compute), total.shape[1:], weight[expert].to(compute), bias[expert].to(compute), eps
        ).to(total.dtype)
        for expert, rows in segments(expert_offsets, total.shape[0], all_experts=True)
    ]
    used = sum(piece.shape[0] for piece in pieces)
    normed = torch.cat([*pieces, total.new_zeros(total.shape[0] - used, total.shape[1])])
    return normed if residual is None else (normed, total)


def _expert_of_rows(expert_offsets: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The expert of each row, int64 (N,), and whether it has one, bool (N, 1). Nothing is read on the host."""
    position = torch.arange(num_rows, dtype=expert_offsets.dtype, device=expert_offsets.device)
    expert = torch.searchsorted(expert_offsets[1:], position, right=True)  # empty experts are passed over
    num_experts = expert_offsets.shape[0] - 1
    return expert.clamp(max=num_experts - 1), (expert < num_experts).unsqueeze(1)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, expert_offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x if residual is None else x + residual
    expert, exists = _expert_of_rows(expert_offsets, total.shape[0])
    statistics = wide(total.dtype)
    normed, mean, rstd = torch.native_layer_norm(total.to(statistics), total.shape[1:], None, None, eps)
    normed = normed * weight.to(statistics)[expert] + bias.to(statistics)[expert]
    normed = torch.where(exists, normed, 0).to(total.dtype)
    return normed, empty(x) if residual is None else total, mean.flatten(), rstd.flatten()


def _fake(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, expert_offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    stats = x.new_empty(x.shape[0], dtype=wide(dtype))
    total = x.new_empty(0, dtype=dtype) if residual is None else x.new_empty(x.shape, dtype=dtype)
    return x.new_empty(x.shape, dtype=dtype), total, stats, torch.empty_like(stats)


def _backward_forward(
    dy: Tensor,
    total: Tensor,
    weight: Tensor,
    expert_offsets: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dresidual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics, num_experts = mean.dtype, weight.shape[0]
    expert, exists = _expert_of_rows(expert_offsets, total.shape[0])
    mean, rstd, wide_total, dy = mean.unsqueeze(1), rstd.unsqueeze(1), total.to(statistics), dy.to(statistics)
    through_affine = dy * weight.to(statistics)[expert]
    dx, _, _ = torch.ops.aten.native_layer_norm_backward(
        through_affine, wide_total, total.shape[1:], mean, rstd, None, None, [True, False, False]
    )
    dx = torch.where(exists, dx, 0).to(total.dtype)
    if dresidual is not None:
        dx += dresidual
    with_normed = dy * (wide_total - mean) * rstd
    owners = [(expert == e).unsqueeze(1) & exists for e in range(num_experts)]
    dweight, dbias = (
        torch.stack([torch.where(owner, rows, 0).sum(0) for owner in owners]).to(weight.dtype)
        for rows in (with_normed, dy)
    )
    return dx, dweight, dbias


def _backward_fake(dy: Tensor, total: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


_layer_norm = _library.define(
    "layer_norm(Tensor x, Tensor? residual, Tensor weight, Tensor bias, Tensor expert_offsets, float eps)"
    " -> (Tensor normed, Tensor total, Tensor mean, Tensor rstd)",
    _forward,
    _fake,
)
_layer_norm_backward = _library.define(
    "layer_norm_backward(Tensor dy, Tensor total, Tensor weight, Tensor expert_offsets, Tensor mean, Tensor rstd,"
    " Tensor? dresidual=None) -> (Tensor dtotal, Tensor dweight, Tensor dbias)",
    _backward_forward,
    _backward_fake,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, expert_offsets, ctx.eps = inputs
    _, total, mean, rstd = output
    ctx.save_for_backward(x if residual is None else total, weight, expert_offsets, mean, rstd)
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype, bias.dtype


def _backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    total, weight, expert_offsets, mean, rstd = ctx.saved_tensors
    x_dtype, residual_dtype, bias_dtype = ctx.dtypes
    dweight = dbias = None
    if dy is not None and torch.is_grad_enabled():
        bias = torch.zeros_like(weight, dtype=bias_dtype).requires_grad_()  # its value changes no gradient
        through_norm, dweight, dbias = _library.gradients_to_differentiate(
            lambda total, weight, bias: _forward(total, None, weight, bias, expert_offsets, ctx.eps)[0],
            (total, weight, bias),
            (total.requires_grad, weight.requires_grad, True),
            dy,
        )
        dtotal = through_norm if dtotal is None or through_norm is None else dtotal + through_norm
    elif dy is not None:
        # the gradient of total itself is added where that through the norm is made
        dresidual = None if residual_dtype is None else dtotal
        dtotal, dweight, dbias = _layer_norm_backward(dy, total, weight, expert_offsets, mean, rstd, dresidual)
        dbias = dbias.to(bias_dtype)
    dx = None if dtotal is None else dtotal.to(x_dtype)
    dresidual = None if dtotal is None or residual_dtype is None else dtotal.to(residual_dtype)
    return dx, dresidual, dweight, dbias, None, None


_library.differentiate(_layer_norm, _setup, _backward)
