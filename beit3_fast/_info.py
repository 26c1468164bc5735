"""What this machine has, and what serves each op on it."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch

from . import _extension
from ._version import __version__
from .ops._triton import unfenced, unsupported
from .tuning import cache_file

_OPS = ("layer_norm", "multiway_linear", "multiway_ffn", "attention", "decode_attention", "route_tokens")
_TRITON = ("multiway_linear", "multiway_ffn", "attention", "decode_attention", "route_tokens")


_COMPILED = {
    "multiway_linear": "multiway_linear_cpu",
    "multiway_ffn": "multiway_linear_cpu",
    "attention": "attention_cpu",
    "decode_attention": "decode_attention_cpu",
}
"""What an op calls on the CPU that the library may have compiled; the others are registered under their own name."""


def _served_by(op: str, device: str) -> str:
    name = _COMPILED.get(op, op) if device == "cpu" else op
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"beit3_fast::{name}", device.upper()):
        return "compiled"
    if device == "cuda" and op in _TRITON and unsupported(0) is None:
        return "Triton"
    return "plain PyTorch"


def _triton() -> str:
    reason = unsupported(0)
    if reason is not None:
        return f"not used: {reason}"
    configs = f"tuned choices from {cache_file()}" if cache_file().is_file() else "default configs"
    return "; ".join(part for part in (f"used on a GPU, {configs}", unfenced()) if part)


def _package(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def _gpu() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return "none: this PyTorch is a CPU build"
    if not torch.cuda.is_available():
        return "none found"
    return ", ".join(torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count()))


def info() -> None:
    """Print versions, devices, and per op and device what serves it; for what is unavailable, why."""
    print(f"beit3_fast {__version__} from {os.path.dirname(__file__)}")
    print(f"  python {platform.python_version()}, torch {torch.__version__}, triton {_package('triton')}")
    print(f"  CPU {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads")
    print(f"  GPU {_gpu()}")
    for part, record in _extension.status().items():
        print(f"  compiled {part} library: {'loaded' if record.loaded else 'not loaded'}: {record.reason}")
    print(f"  Triton kernels {_triton()}")
    print(f"  {'op':<17} {'on CPU':<15} on GPU")
    for op in _OPS:
        print(f"  {op:<17} {_served_by(op, 'cpu'):<15} {_served_by(op, 'cuda')}")
