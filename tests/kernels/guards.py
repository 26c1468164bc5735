"""Allocations full of NaN between guard bands: what a kernel leaves out or writes beside shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_BAND = 64  # elements on each side
_ALLOCATIONS = {
    torch.ops.aten.new_empty.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty.memory_format,
}


class GuardedAllocations(TorchDispatchMode):
    """Inside, every new floating-point tensor is filled with NaN and has guard bands; `check` looks at those."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func not in _ALLOCATIONS or not result.is_floating_point():
            return result
        size = result.numel()
        buffer = torch.full((size + 2 * _BAND,), float("nan"), dtype=result.dtype)
        buffer[:_BAND] = buffer[_BAND + size :] = 7.0
        self.buffers.append((buffer, size))
        return buffer[_BAND : _BAND + size].view(result.shape)

    def check(self) -> None:
        assert self.buffers
        for buffer, size in self.buffers:
            band = torch.cat([buffer[:_BAND], buffer[_BAND + size :]])
            assert (band == 7.0).all(), f"written outside a buffer of {size} elements"
