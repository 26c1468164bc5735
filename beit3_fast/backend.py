"""The one switch: which implementation the ops run, for comparison and proof."""

from __future__ import annotations

from importlib.util import find_spec
from types import TracebackType

BACKENDS = ("auto", "reference", "triton")
_current = "auto"


def current_backend() -> str:
    """The backend in force: "auto", "reference" or "triton"."""
    return _current


class use_backend:
    """Choose what serves the ops; a plain call or a context manager that restores the previous choice.

    * ``"auto"``: PyTorch's dispatcher picks by device (the default); ``beit3_fast.info()`` prints what that is.
    * ``"reference"``: every op runs its ``<op>_reference`` in plain PyTorch, differentiated by autograd.
    * ``"triton"``: ops that have Triton kernels launch them whatever the device. For CPU tensors that means Triton's
      interpreter (``TRITON_INTERPRET=1``) or a simulator; Triton itself refuses them otherwise.

    The choice holds for the whole process, every thread.

    Raises:
        ValueError: an unknown name; "triton" where triton is not installed.
    """

    def __init__(self, name: str) -> None:
        if name not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
        if name == "triton" and find_spec("triton") is None:
            raise ValueError("backend 'triton' is not available: triton is not installed")
        global _current
        self._previous, _current = _current, name

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = self._previous
