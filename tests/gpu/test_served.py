"""What serves a user's calls on a GPU: the compiled library and Triton, not plain PyTorch."""

from __future__ import annotations

import pytest

from beit3_fast import _extension, _info

from .machine import needs_gpu


@needs_gpu
def test_the_cuda_library_is_loaded() -> None:
    """No reason to skip: without it half of what is to be tested is not there."""
    status = _extension.status()["cuda"]
    assert status.loaded, status.reason


@needs_gpu
@pytest.mark.parametrize("op", _info._OPS)
def test_what_serves_an_op(op: str) -> None:
    assert _info._served_by(op, "cuda") == ("compiled" if op == "layer_norm" else "Triton")
