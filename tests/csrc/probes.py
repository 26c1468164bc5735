"""Compiles the probes: C++ that runs the kernels of csrc/cpu at a chosen instruction set; see probe.h."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
HEADERS = HERE.parents[1] / "csrc" / "cpu"
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    assert tensor is None or tensor.is_contiguous()
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def compiler() -> list[str]:
    """The C++ compiler's command; without one the test is skipped."""
    command = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if not command or shutil.which(command[0]) is None:
        pytest.skip("there is no C++ compiler")
    return command


def build(
    target: Path, sources: Sequence[str], flags: Sequence[str], link: Sequence[str] = (), command: Sequence[str] = ()
) -> None:
    """Compile `sources` of this folder with `flags`, two at a time, and link them with `flags` and `link`.

    Args:
        command: the compiler; by default that of :func:`compiler`.
    """
    command = command or compiler()
    common = ["-std=c++20", "-Wall", "-Wextra", "-Werror", f"-I{HERE}", f"-I{HEADERS}", *flags]

    def compile_one(source: str) -> str:
        compiled = f"{target}.{source}.o"
        subprocess.run([*command, *common, "-c", str(HERE / source), "-o", compiled], check=True)
        return compiled

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    subprocess.run([*command, *flags, *link, *objects, "-o", str(target)], check=True)
