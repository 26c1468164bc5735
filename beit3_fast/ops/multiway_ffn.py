"""The feed-forward block with one expert per modality: fc1, GELU, sub-LayerNorm, fc2, residual."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tuning import choose
from . import _library
from ._library import (
    by_reference,
    check_bounds,
    check_eps,
    check_offsets,
    check_parameter,
    check_residual,
    check_row_index,
    check_rows,
    check_same_dtype,
    empty,
    segments,
    wide,
)
from ._triton import precision, serves, unit_stride
from .layer_norm import _layer_norm, _layer_norm_backward, layer_norm_reference
from .multiway_linear import compiled_backward, compiled_forward, gelu, multiway_linear_reference


def multiway_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    expert_offsets: Tensor,
    *,
    residual: Tensor | None = None,
    row_index: Tensor | None = None,
    eps: float = 1e-5,
    folded: Tensor | None = None,
    bounds: Sequence[int] | None = None,
) -> Tensor:
    """``residual + fc2(LayerNorm(gelu(fc1(x))))`` with the parameters of the row's expert.

    The LayerNorm over the hidden width is the sub-LN of Magneto (arXiv 2210.06423), torchscale
    ``feedforward_network.py``.

    Args:
        x: (N, D) rows; fp32, bf16, fp16 or fp64.
        fc1_weight, fc1_bias: (E, F, D) and (E, F) in x's dtype (or under autocast).
        norm_weight, norm_bias: (E, F), any floating dtype; both None = no sub-LN.
        fc2_weight, fc2_bias: (E, D, F) and (E, D) in x's dtype (or under autocast).
        expert_offsets: int32 (E + 1,); position r belongs to expert e iff ``offsets[e] <= r < offsets[e + 1]``.
            Positions at or past the last offset are padding: their output is unspecified.
        residual: (N, D), any floating dtype; the sum is in the promoted dtype.
        row_index: int32/int64 (N,), a permutation: position r stands for row ``row_index[r]`` of x, of residual and of
            the output.
        eps: of the LayerNorm.
        folded: (2, E, D) fp32, :func:`fold_norm` of the last four parameters as they are now, so that a GPU need not
            compute it again. Only read where no gradient is needed.
        bounds: E + 1 ints, what the host knows of expert_offsets; as in :func:`.multiway_linear`.

    Returns:
        (N, D) rows, in the same order as x.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, named in the message.
    """
    check_rows(x)
    width = x.shape[1]
    check_parameter("fc1_weight", fc1_weight, (None, None, width), x)
    num_experts, hidden = fc1_weight.shape[:2]
    check_parameter("fc2_weight", fc2_weight, (num_experts, width, hidden), x)
    check_same_dtype(x, fc1_weight=fc1_weight, fc2_weight=fc2_weight)
    check_ffn(x, (num_experts, hidden), fc1_bias, norm_weight, norm_bias, fc2_bias, expert_offsets, residual, eps)
    check_row_index(row_index, x)
    check_bounds(bounds, num_experts, x)
    if folded is not None:
        check_parameter("folded", folded, (2, num_experts, width), x)
        if folded.dtype != torch.float32:
            raise ValueError(f"folded must be fp32, got {folded.dtype}")
    parameters = (fc1_weight, fc1_bias, norm_weight, norm_bias, fc2_weight, fc2_bias)
    if by_reference():
        return multiway_ffn_reference(x, *parameters, expert_offsets, residual=residual, row_index=row_index, eps=eps)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))
    folded = None if save else folded
    return _multiway_ffn(x, *parameters, expert_offsets, residual, row_index, eps, folded, save, bounds)[0]


def check_ffn(
    x: Tensor,
    fc1_shape: tuple[int, int],
    fc1_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc2_bias: Tensor,
    expert_offsets: Tensor,
    residual: Tensor | None,
    eps: float,
) -> None:
    """What comes with weights (E, F, D) and (E, D, F), however they are stored; `fc1_shape` is (E, F)."""
    num_experts, width = fc1_shape[0], x.shape[1]
    check_eps(eps)
    check_parameter("fc1_bias", fc1_bias, fc1_shape, x)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight and norm_bias must both be given or both be None")
    if norm_weight is not None and norm_bias is not None:
        check_parameter("norm_weight", norm_weight, fc1_shape, x)
        check_parameter("norm_bias", norm_bias, fc1_shape, x)
    check_parameter("fc2_bias", fc2_bias, (num_experts, width), x)
    check_same_dtype(x, fc1_bias=fc1_bias, fc2_bias=fc2_bias)
    check_offsets(expert_offsets, num_experts, x)
    check_residual(residual, (x.shape[0], width), x)


def fold_norm(norm_weight: Tensor, norm_bias: Tensor, fc2_weight: Tensor, fc2_bias: Tensor) -> Tensor:
    """What the LayerNorm's affine adds up to behind fc2, for ``multiway_ffn(..., folded=...)`` in inference.

    Args:
        norm_weight, norm_bias: (E, F). fc2_weight: (E, D, F). fc2_bias: (E, D).

    Returns:
        (2, E, D) fp32: ``fc2_weight[e] @ norm_weight[e]`` and ``fc2_weight[e] @ norm_bias[e] + fc2_bias[e]``.
    """
    weight = fc2_weight.float()
    gains = torch.bmm(weight, norm_weight.float().unsqueeze(2)).squeeze(2)
    shifts = torch.baddbmm(fc2_bias.float().unsqueeze(2), weight, norm_bias.float().unsqueeze(2)).squeeze(2)
    return torch.stack((gains, shifts))


def multiway_ffn_reference(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    expert_offsets: Tensor,
    *,
    residual: Tensor | None = None,
    row_index: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`multiway_ffn` in plain PyTorch; padding rows are zeros (plus the residual)."""
    rows = x if row_index is None else x[row_index.long()]
    hidden = multiway_linear_reference(rows, fc1_weight, fc1_bias, expert_offsets, activation="gelu")
    if norm_weight is not None and norm_bias is not None:
        normed = layer_norm_reference(hidden, norm_weight, norm_bias, expert_offsets, eps=eps)
        assert isinstance(normed, Tensor)
        hidden = normed
    out = multiway_linear_reference(hidden, fc2_weight, fc2_bias, expert_offsets)
    if row_index is not None:
        out = torch.zeros_like(out).index_copy(0, row_index.long(), out)
    return out if residual is None else residual + out


def _forward(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    expert_offsets: Tensor,
    residual: Tensor | None,
    row_index: Tensor | None,
    eps: float,
    folded: Tensor | None,
    save: bool,
    bounds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = x if row_index is None else x.index_select(0, row_index)
    hidden, pre = compiled_forward(rows, fc1_weight, fc1_bias, expert_offsets, True, None, None, save, bounds=bounds)
    mean, rstd = _no_statistics(x), _no_statistics(x)
    if norm_weight is not None and norm_bias is not None:
        hidden, _, mean, rstd = _layer_norm(hidden, None, norm_weight, norm_bias, expert_offsets, eps)
    branch, sums = empty(x), _no_statistics(x)
    for_kernels = save and norm_weight is not None and serves(x)
    fused = residual if row_index is None and not for_kernels else None  # the sum in the product's own pass
    out, _ = compiled_forward(hidden, fc2_weight, fc2_bias, expert_offsets, False, fused, None, False, bounds=bounds)
    if for_kernels and norm_weight is not None and norm_bias is not None:
        # plain PyTorch was chosen where the kernels may run the backward: what they would have kept
        sums = fold_norm(norm_weight, norm_bias, fc2_weight, fc2_bias)
        branch = out.clone()
        for expert, where in segments(expert_offsets, x.shape[0], bounds=bounds):
            branch[where] -= sums[1, expert].to(x.dtype)
    if row_index is not None:
        out = torch.empty_like(out).index_copy_(0, row_index.long(), out)
    if residual is not None and fused is None:
        out = residual + out
    if not save:
        return out, empty(x), _no_statistics(x), _no_statistics(x), branch, sums
    return out, pre, mean, rstd, branch, sums


def _no_statistics(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=wide(x.dtype))


def _fake(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    expert_offsets: Tensor,
    residual: Tensor | None,
    row_index: Tensor | None,
    eps: float,
    folded: Tensor | None,
    save: bool,
    bounds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    pre = x.new_empty((x.shape[0], fc1_weight.shape[1]) if save else 0)
    keeps_norm = save and norm_weight is not None
    stats = x.new_empty(x.shape[0] if keeps_norm else 0, dtype=wide(x.dtype))
    for_kernels = keeps_norm and serves(x)
    branch = x.new_empty(x.shape if for_kernels else 0)
    sums = _no_statistics(x).new_empty((2, *fc2_bias.shape) if for_kernels else 0)
    return x.new_empty(x.shape, dtype=dtype), pre, stats, torch.empty_like(stats), branch, sums


def _backward_forward(
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
    sums: Tensor,
    eps: float,
    needs_x: bool,
    needs_parameters: bool,
    bounds: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if row_index is not None:
        dy, x = dy.index_select(0, row_index), x.index_select(0, row_index)
    # Only the pre-activation was saved: the hidden rows are elementwise work to recompute, twice the memory to keep.
    activated = gelu(pre)
    hidden = activated
    dnorm_weight, dnorm_bias = empty(x), empty(x)
    if norm_weight is not None and norm_bias is not None:
        hidden = _layer_norm(activated, None, norm_weight, norm_bias, expert_offsets, eps)[0]
    dhidden, dfc2_weight, dfc2_bias = compiled_backward(
        dy, hidden, fc2_weight, expert_offsets, None, None, True, needs_parameters, bounds=bounds
    )
    if norm_weight is not None:
        dhidden, dnorm_weight, dnorm_bias = _layer_norm_backward(
            dhidden, activated, norm_weight, expert_offsets, mean, rstd
        )
    dx, dfc1_weight, dfc1_bias = compiled_backward(
        dhidden, x, fc1_weight, expert_offsets, pre, None, needs_x, needs_parameters, bounds=bounds
    )
    if row_index is not None and needs_x:
        dx = torch.empty_like(dx).index_copy_(0, row_index.long(), dx)
    if not needs_parameters:
        dnorm_weight, dnorm_bias = empty(dnorm_weight), empty(dnorm_bias)
    return dx, dfc1_weight, dfc1_bias, dnorm_weight, dnorm_bias, dfc2_weight, dfc2_bias


def _backward_fake(
    dy: Tensor, x: Tensor, fc1_weight: Tensor, norm_weight: Tensor | None, _: Any, fc2_weight: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    needs_x, needs_parameters, _ = args[-3:]

    def parameter(shape: torch.Size) -> Tensor:
        return x.new_empty(shape if needs_parameters else 0)

    def norm_parameter() -> Tensor:
        if norm_weight is None:
            return x.new_empty(0)
        return norm_weight.new_empty(norm_weight.shape if needs_parameters else 0)

    return (
        x.new_empty(x.shape if needs_x else 0),
        parameter(fc1_weight.shape),
        parameter(fc1_weight.shape[:2]),
        norm_parameter(),
        norm_parameter(),
        parameter(fc2_weight.shape),
        parameter(fc2_weight.shape[:2]),
    )


def _triton_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import multiway_ffn as kernels

    x, fc1_weight = args[:2]
    num_experts, hidden, width = fc1_weight.shape
    choice = choose("multiway_ffn", x.device, x.dtype, x.shape[0], num_experts, (width, hidden))
    if not choice.use_triton:
        return _forward(*args)
    return kernels.forward(*args[:-1], precision=precision(x.dtype), configs=choice.configs)


def _triton_backward(dy: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from ..kernels import multiway_ffn as kernels

    x, fc1_weight, norm_weight = args[:3]
    *tensors, _, needs_x, needs_parameters, _ = args
    sums = tensors[-1]
    num_experts, hidden, width = fc1_weight.shape
    choice = choose("multiway_ffn_backward", x.device, x.dtype, x.shape[0], num_experts, (width, hidden))
    if not choice.use_triton or (norm_weight is not None and not sums.numel()):
        return _backward_forward(dy, *args)
    configs = {"precision": precision(x.dtype), "configs": choice.configs}
    return kernels.backward(unit_stride(dy), *tensors, needs_x, needs_parameters, **configs)


_multiway_ffn = _library.define(
    "multiway_ffn(Tensor x, Tensor fc1_weight, Tensor fc1_bias, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor fc2_weight, Tensor fc2_bias, Tensor expert_offsets, Tensor? residual, Tensor? row_index, float eps,"
    " Tensor? folded, bool save, SymInt[]? bounds)"
    " -> (Tensor out, Tensor pre_activation, Tensor mean, Tensor rstd, Tensor branch, Tensor sums)",
    _forward,
    _fake,
    _triton_forward,
)
_multiway_ffn_backward = _library.define(
    "multiway_ffn_backward(Tensor dy, Tensor x, Tensor fc1_weight, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor fc2_weight, Tensor expert_offsets, Tensor? row_index, Tensor pre_activation, Tensor mean, Tensor rstd,"
    " Tensor branch, Tensor sums, float eps, bool needs_x, bool needs_parameters, SymInt[]? bounds)"
    " -> (Tensor dx, Tensor dfc1_weight, Tensor dfc1_bias, Tensor dnorm_weight, Tensor dnorm_bias,"
    " Tensor dfc2_weight, Tensor dfc2_bias)",
    _backward_forward,
    _backward_fake,
    _triton_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *differentiated, expert_offsets, residual, row_index, eps, _, _, _ = inputs
    ctx.save_for_backward(*differentiated, expert_offsets, row_index, *output[1:])
    ctx.eps, ctx.residual_dtype, ctx.bounds = eps, None if residual is None else residual.dtype, inputs[-1]


def _backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 14
    saved = ctx.saved_tensors  # asked for once: a checkpoint computes them anew each time
    inputs, (expert_offsets, row_index, *computed_forward) = saved[:7], saved[7:]
    x, fc1_weight, _, norm_weight, norm_bias, fc2_weight, _ = inputs
    needs_x, needs_parameters = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:7])
    grads: Sequence[Tensor | None] = (None,) * 7
    if torch.is_grad_enabled():
        grads = _library.gradients_to_differentiate(
            lambda x, fc1, bias1, gain, shift, fc2, bias2: multiway_ffn_reference(
                x, fc1, bias1, gain, shift, fc2, bias2, expert_offsets, row_index=row_index, eps=ctx.eps
            ),
            inputs,
            ctx.needs_input_grad[:7],
            dy.to(x.dtype),
        )
    elif needs_x or needs_parameters:
        tensors = (x, fc1_weight, norm_weight, norm_bias, fc2_weight, expert_offsets, row_index, *computed_forward)
        options = (ctx.eps, needs_x, needs_parameters, ctx.bounds)
        computed = _multiway_ffn_backward(dy.to(x.dtype), *tensors, *options)
        grads = tuple(grad if need else None for grad, need in zip(computed, ctx.needs_input_grad[:7], strict=True))
    dresidual = None if ctx.residual_dtype is None else dy.to(ctx.residual_dtype)
    return (*grads, None, dresidual, *(None,) * 5)


_library.differentiate(_multiway_ffn, _setup, _backward)
_library.autocast(_multiway_ffn, ("x", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"))
