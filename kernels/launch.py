"""The one door every launch goes through, so that launches can be collected instead of made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

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
