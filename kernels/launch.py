"""The one door every launch goes through, so that launches can be collected instead of made; what is refused before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded launches", default=None)


@dataclass(frozen=True)
class Launch:
    """A launch as its kernel would get it: positional arguments, then constants and compile options by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``, or nothing but a note of it inside :func:`record`."""
    collected = _recorded.get()
    if collected is None:
        kernel[grid](*args, **options)
    else:
        collected.append(Launch(kernel, grid, args, options))


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect the launches made inside the block instead of running them; tensors may be on the meta device."""
    token = _recorded.set([])
    try:
        collected = _recorded.get()
        assert collected is not None
        yield collected
    finally:
        _recorded.reset(token)


def check_layout(**tensors: Tensor | None) -> None:
    """Raises ValueError unless the last dimension of each tensor is contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tuple(tensor.stride())}")


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raises ValueError unless each tensor is contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(tensor.stride())}")
