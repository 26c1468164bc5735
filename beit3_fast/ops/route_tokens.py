"""Stable routing of tokens in any order to expert order."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import current_backend
from . import _library


def route_tokens(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Row numbers that bring tokens into expert order, keeping the order within each expert; no wait for the device.

    Args:
        expert_ids: int32/int64 (N,), the expert of each token, in [0, num_experts).
        num_experts: E > 0.

    Returns:
        ``row_index`` int32 (N,): position r in expert order holds token ``row_index[r]``;
        ``expert_offsets`` int32 (E + 1,). Both as the ops' ``row_index`` and ``expert_offsets`` take them.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or dtype; an id out of range (checked for CPU
            tensors, where looking costs no wait).
    """
    if not isinstance(expert_ids, Tensor):
        raise TypeError(f"expert_ids must be a tensor, got {type(expert_ids).__name__}")
    if expert_ids.dtype not in (torch.int32, torch.int64) or expert_ids.ndim != 1:
        raise ValueError(
            f"expert_ids must be int32 or int64 of shape (N,), got {expert_ids.dtype} {tuple(expert_ids.shape)}"
        )
    if not isinstance(num_experts, int) or num_experts < 1:
        raise ValueError(f"num_experts must be a positive int, got {num_experts!r}")
    if expert_ids.device.type == "cpu" and expert_ids.numel() and not torch.compiler.is_compiling():
        low, high = expert_ids.aminmax()
        if low < 0 or high >= num_experts:
            raise ValueError(f"expert_ids must lie in [0, {num_experts}), got values from {int(low)} to {int(high)}")
    if current_backend() == "reference":
        return route_tokens_reference(expert_ids, num_experts)
    return _route_tokens(expert_ids, num_experts)


def route_tokens_reference(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """:func:`route_tokens` in plain PyTorch: a stable sort and a histogram."""
    row_index = torch.sort(expert_ids, stable=True).indices.int()
    counts = expert_ids.new_zeros(num_experts + 1, dtype=torch.int64)
    counts.scatter_add_(0, expert_ids.long() + 1, torch.ones_like(expert_ids, dtype=torch.int64))
    return row_index, counts.cumsum(0).int()


def _fake(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    return (
        expert_ids.new_empty(expert_ids.shape[0], dtype=torch.int32),
        expert_ids.new_empty(num_experts + 1, dtype=torch.int32),
    )


def _triton(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    from ..kernels import routing

    if num_experts > routing.MAX_EXPERTS:
        return route_tokens_reference(expert_ids, num_experts)
    return routing.forward(expert_ids.contiguous(), num_experts)


_route_tokens = _library.define(
    "route_tokens(Tensor expert_ids, int num_experts) -> (Tensor row_index, Tensor expert_offsets)",
    route_tokens_reference,
    _fake,
    _triton,
)
