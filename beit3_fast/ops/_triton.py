"""When the Triton kernels serve an op, and what they are told."""

from __future__ import annotations

import contextlib
import re
import warnings
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import Tensor

from ..backend import current_backend

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64)

FENCED = (3, 7, 1)
"""The first Triton that orders a tensor core's reads of shared memory after the writes before them.

The products of compute capability 9.0 to 11.0 (wgmma, tcgen05) read shared memory through the asynchronous proxy. What
cp.async wrote there is only sure to be seen after a fence.proxy.async, which Triton up to 3.7.0 leaves out of pipelined
loops (triton-lang/triton#9610; in 3.7.1 by #10537 after pytorch/pytorch#181248, wrong results on a B200).
"""


@lru_cache(maxsize=1)
def missing() -> str | None:
    """Why there is no Triton, None if there is."""
    return None if find_spec("triton") is not None else "triton is not installed"


@lru_cache(maxsize=64)
def unsupported(device_index: int) -> str | None:
    """Why the kernels do not run on a GPU, None if they do. A GPU that is only pretended (fake tensors) is taken."""
    if missing() is not None or not torch.cuda.is_available() or torch.version.hip is not None:
        return missing()
    capability = torch.cuda.get_device_capability(device_index)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def triton_version() -> tuple[int, ...] | None:
    """The installed Triton's, None if it is not known."""
    try:
        return tuple(int(number) for number in re.findall(r"\d+", metadata.version("triton"))[:3])
    except metadata.PackageNotFoundError:  # none, or one under another name, as nightly builds have
        return None


def unfenced() -> str | None:
    """Why this Triton's code for compute capability 9.0 to 11.0 is not formally safe, None if it is."""
    version = triton_version()
    if version is None or version >= FENCED:
        return None
    found, safe = (".".join(map(str, numbers)) for numbers in (version, FENCED))
    return (
        f"Triton {found} leaves out a fence between copies into shared memory and the tensor cores that read them "
        f"(triton-lang/triton#9610): Triton >= {safe} is safe on GPUs of compute capability 9.0 to 11.0"
    )


@lru_cache(maxsize=64)
def _taken(device_index: int) -> bool:
    """Whether the kernels run on that GPU. Where they are not formally safe, that is said once."""
    if unsupported(device_index) is not None:
        return False
    if torch.cuda.is_available() and (9, 0) <= torch.cuda.get_device_capability(device_index) < (12, 0):
        _warn_once()
    return True


@lru_cache(maxsize=1)
def _warn_once() -> None:
    reason = unfenced()
    if reason is not None:
        warnings.warn(reason, RuntimeWarning, stacklevel=2)


def serves(x: Tensor) -> bool:
    """Whether the Triton kernels take a call whose first tensor is `x`; also decides what a forward saves.

    Raises:
        ValueError: ``use_backend("triton")`` with a dtype that the kernels do not have.
    """
    if current_backend() == "triton":
        if x.dtype not in _DTYPES:
            raise ValueError(f"x must be fp32, bf16 or fp16 under use_backend('triton'), got {x.dtype}")
        return True
    return x.device.type == "cuda" and x.dtype in _DTYPES and _taken(x.device.index or 0)


def precision(dtype: torch.dtype) -> str:
    """How products of `dtype` are taken, fp32 ones by PyTorch's own setting: ``torch.set_float32_matmul_precision``, or
    ``torch.backends.cuda.matmul.fp32_precision`` and its elders, which the former refuses to speak for once they were
    set."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # The newer setting can be read whichever of the two was used; it has been there since torch 2.9.
    return "tf32" if matmul.fp32_precision == "tf32" else "ieee"


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to x's GPU, whichever is current."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def unit_stride(rows: Tensor) -> Tensor:
    """A gradient as kernels read it: autograd may hand over a transposed or expanded one."""
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()
