"""Inference on a CPU with weights stored as the products read them, in their own dtype or as int8.

A linear layer and the feed-forward block; the same mathematics as :mod:`.multiway_linear` and :mod:`.multiway_ffn`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..backend import current_backend
from . import _library
from ._library import by_reference, check_parameter, check_rows, check_tensors
from .layer_norm import _layer_norm
from .multiway_ffn import check_ffn
from .multiway_linear import check_linear, compiled_forward

PANEL = 64
"""Outputs that are stored together: ``widest_panel`` of csrc/cpu/linear.h."""

_IN_WORD = {torch.float32: 1, torch.float16: 1, torch.bfloat16: 2, torch.int8: 4}
"""Neighbouring inputs that a product takes at a time."""


def can_pack(weight: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether :func:`pack_weight` takes ``weight`` (E, O, I), or :func:`quantize_weight` if ``dtype`` is torch.int8,
    and the CPU library that reads it is there."""
    compiled = torch._C._dispatch_has_kernel_for_dispatch_key("beit3_fast::packed_linear", "CPU")
    return compiled and _fits(weight, dtype or weight.dtype)


def _fits(weight: Tensor, dtype: torch.dtype) -> bool:
    known = weight.ndim == 3 and weight.device.type == "cpu" and dtype in _IN_WORD
    return known and weight.shape[1] % PANEL == 0 and weight.shape[2] % _IN_WORD[dtype] == 0 and weight.shape[2] > 0


def is_packed(weight: Tensor) -> bool:
    """Whether ``weight`` lies as the products of its device and dtype read it."""
    together = _IN_WORD.get(weight.dtype, 0)
    return weight.device.type == "cpu" and together > 0 and weight.ndim == (4 if together == 1 else 5)


def pack_weight(weight: Tensor) -> Tensor:
    """The same numbers in the order in which a product meets them.

    Of every ``PANEL`` outputs all weights of the first input come first, then all of the second, and so on; of
    bfloat16, whose products take two neighbours at a time, all of the first two. It saves a product the transposition
    of its weights, which at batch 1 is a tenth of its time and at batch 8 a fiftieth.

    Args:
        weight: (E, O, I) on the CPU; fp32, fp16, bf16 (or int8); O a multiple of 64, I of 2 in bf16 (of 4 in int8).

    Returns:
        (E, O / 64, I, 64), in bf16 (E, O / 64, I / 2, 64, 2), in int8 (E, O / 64, I / 4, 64, 4).

    Raises:
        ValueError: a weight that cannot be packed.
    """
    check_tensors(weight=weight)
    if not _fits(weight, weight.dtype):
        raise ValueError(
            f"weight must be (E, O, I) on the CPU in fp32, fp16, bf16 or int8, O a multiple of {PANEL} and I of 2 in "
            f"bf16, of 4 in int8; got {tuple(weight.shape)} {weight.dtype} on {weight.device}"
        )
    experts, width, depth = weight.shape
    together = _IN_WORD[weight.dtype]
    inputs = (depth,) if together == 1 else (depth // together, together)
    return weight.reshape(experts, width // PANEL, PANEL, *inputs).transpose(2, 3).contiguous()


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A packed weight of int8, 127 steps to the largest magnitude of each output.

    Args:
        weight: (E, O, I) on the CPU, floating-point; O a multiple of 64, I of 4.

    Returns:
        int8 (E, O / 64, I / 4, 64, 4), and fp32 (E, 2, O): what a step is worth, and the sum of each output's steps.

    Raises:
        ValueError: a weight of another shape or with values that are not finite.
    """
    check_tensors(weight=weight)
    if not weight.is_floating_point() or not bool(weight.isfinite().all()):
        raise ValueError("weight must be floating-point and finite to be quantized")
    scale = weight.float().abs().amax(2) / 127
    steps = (weight.float() / torch.where(scale > 0, scale, 1.0).unsqueeze(2)).round().to(torch.int8)
    return pack_weight(steps), torch.stack((scale, steps.sum(2, dtype=torch.float32)), 1)


def unpack_weight(weight: Tensor, scales: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """(E, O, I) of what :func:`pack_weight` or :func:`quantize_weight` returned; another weight is returned as it is.

    Args:
        weight, scales: what was returned.
        dtype: of an int8 weight's values, fp32 by default.
    """
    if weight.ndim < 4:
        return weight
    experts, panels, _, width = weight.shape[:4]
    unpacked = weight.transpose(2, 3).reshape(experts, panels * width, -1)
    if scales is None:
        return unpacked
    return (unpacked * scales[:, 0].to(weight.device).unsqueeze(2)).to(dtype or torch.float32)


def serves_packed(x: Tensor, weight: Tensor) -> bool:
    """Whether :func:`packed_linear` is what to run: ``weight`` is packed, no derivative is needed, and the backend in
    force leaves the choice."""
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return weight.ndim > 3 and not trained and current_backend() == "auto" and not by_reference()


def packed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_offsets: Tensor,
    *,
    scales: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`.multiway_linear` with a weight from :func:`pack_weight` or :func:`quantize_weight`; not differentiable.

    With int8 weights each row of x is quantized as well, 127 steps to its largest magnitude; sums are exact.

    Args:
        x: (N, I) rows on the CPU; fp32, fp16 or bf16; of the weight's dtype unless that is int8. Under autocast it is
            cast to that of the weight, which stays.
        weight, scales: what ``pack_weight`` (no scales) or ``quantize_weight`` returned for (E, O, I).
        bias: (E, O) or None.
        expert_offsets, activation, residual: as in ``multiway_linear``.

    Returns:
        (N, O) rows, in the same order as x.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, named in the message.
    """
    x = _rows_for(x, weight, scales)
    shape = _check_packed("weight", weight, scales, x, x.shape[1])
    check_linear(x, shape, bias, expert_offsets, activation, residual)
    return _packed_linear(x, weight, scales, bias, expert_offsets, activation == "gelu", residual)


def packed_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    expert_offsets: Tensor,
    *,
    fc1_scales: Tensor | None = None,
    fc2_scales: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """:func:`.multiway_ffn` with weights from :func:`pack_weight` or :func:`quantize_weight`; not differentiable.

    Args:
        x: (N, D) rows as in :func:`packed_linear`.
        fc1_weight, fc1_scales: packed (E, F, D). fc2_weight, fc2_scales: packed (E, D, F).
        fc1_bias, norm_weight, norm_bias, fc2_bias, expert_offsets, residual, eps: as in ``multiway_ffn``.

    Returns:
        (N, D) rows, in the same order as x.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, named in the message.
    """
    x = _rows_for(x, fc1_weight, fc1_scales)
    width = x.shape[1]
    num_experts, hidden = _check_packed("fc1_weight", fc1_weight, fc1_scales, x, width)
    found = _check_packed("fc2_weight", fc2_weight, fc2_scales, x, hidden)
    if found != (num_experts, width):
        raise ValueError(f"fc2_weight must be packed for {num_experts} experts of {width} outputs, got {found}")
    check_ffn(x, (num_experts, hidden), fc1_bias, norm_weight, norm_bias, fc2_bias, expert_offsets, residual, eps)
    fc1, norm, fc2 = (fc1_weight, fc1_scales, fc1_bias), (norm_weight, norm_bias), (fc2_weight, fc2_scales, fc2_bias)
    return _packed_ffn(x, *fc1, *norm, *fc2, expert_offsets, residual, eps)


def _rows_for(x: Tensor, weight: Tensor, scales: Tensor | None) -> Tensor:
    check_rows(x)
    check_tensors(weight=weight)
    return x.to(weight.dtype) if scales is None and torch.is_autocast_enabled("cpu") else x


def _check_packed(name: str, weight: Tensor, scales: Tensor | None, x: Tensor, depth: int) -> tuple[int, int]:
    """The experts and outputs of a packed weight that fits x."""
    check_tensors(**{name: weight})
    dtype = x.dtype if scales is None else torch.int8
    together = _IN_WORD.get(dtype, 0)
    inputs = (depth // max(together, 1), PANEL, together)[: 2 if together == 1 else 3]
    if not together or weight.dtype != dtype or weight.shape[2:] != inputs or weight.device != x.device:
        raise ValueError(
            f"{name} must be packed for {depth} inputs in {dtype}, with scales if and only if that is int8, on "
            f"{x.device}; got {tuple(weight.shape)} {weight.dtype} on {weight.device}"
        )
    experts, width = weight.shape[0], weight.shape[1] * PANEL
    if scales is not None:
        check_parameter(f"the scales of {name}", scales, (experts, 2, width), x)
    return experts, width


def _plain_linear(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    expert_offsets: Tensor,
    gelu: bool,
    residual: Tensor | None,
) -> Tensor:
    unpacked = unpack_weight(weight, scales, x.dtype)
    return compiled_forward(x, unpacked, bias, expert_offsets, gelu, residual, None, False)[0]


def _fake_linear(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    *_, residual = args
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return x.new_empty((x.shape[0], weight.shape[1] * weight.shape[3]), dtype=dtype)


def _plain_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_scales: Tensor | None,
    fc1_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_scales: Tensor | None,
    fc2_bias: Tensor,
    expert_offsets: Tensor,
    residual: Tensor | None,
    eps: float,
) -> Tensor:
    hidden = _plain_linear(x, fc1_weight, fc1_scales, fc1_bias, expert_offsets, True, None)
    if norm_weight is not None and norm_bias is not None:
        hidden = _layer_norm(hidden, None, norm_weight, norm_bias, expert_offsets, eps)[0]
    return _plain_linear(hidden, fc2_weight, fc2_scales, fc2_bias, expert_offsets, False, residual)


def _fake_ffn(x: Tensor, *args: Any) -> Tensor:
    return _fake_linear(x, *args[5:-1])  # from fc2_weight to residual


_packed_linear = _library.define(
    "packed_linear(Tensor x, Tensor weight, Tensor? scales, Tensor? bias, Tensor expert_offsets, bool gelu,"
    " Tensor? residual) -> Tensor",
    _plain_linear,
    _fake_linear,
)
_packed_ffn = _library.define(
    "packed_ffn(Tensor x, Tensor fc1_weight, Tensor? fc1_scales, Tensor fc1_bias, Tensor? norm_weight,"
    " Tensor? norm_bias, Tensor fc2_weight, Tensor? fc2_scales, Tensor fc2_bias, Tensor expert_offsets,"
    " Tensor? residual, float eps) -> Tensor",
    _plain_ffn,
    _fake_ffn,
)
