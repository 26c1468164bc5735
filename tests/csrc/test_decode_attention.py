"""The compiled CPU decoding attention at every instruction set; the op is tested in tests/ops."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from ops.parity import assert_parity
from ops.test_decode_attention import CASES, by_sdpa, random_step
from torch import Tensor

HERE = Path(__file__).resolve().parent
HEADERS = HERE.parents[1] / "csrc" / "cpu"
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    command = shlex.split(os.environ.get("CXX", "")) or [c for c in ("c++", "g++", "clang++") if shutil.which(c)][:1]
    if not command or shutil.which(command[0]) is None:
        pytest.skip("there is no C++ compiler")
    library = tmp_path_factory.mktemp("decode") / "probe.so"
    flags = ["-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{HERE}", f"-I{HEADERS}"]
    subprocess.run([*command, *flags, str(HERE / "decode_attention_probe.cpp"), "-o", str(library)], check=True)
    probe = ctypes.CDLL(str(library))
    probe.decode_attention.restype = ctypes.c_bool
    return probe


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("head_dim", [12, 64])
@pytest.mark.parametrize("case", [*CASES.values(), ([(70, 0), (3, 30)], 9, 6, 5)], ids=[*CASES, "two blocks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", range(len(ISAS)), ids=ISAS)
def test_parity(probe: ctypes.CDLL, isa: int, dtype: torch.dtype, case: Any, head_dim: int) -> None:
    if isa > probe.native_isa():
        pytest.skip(f"this processor does not run {ISAS[isa]}")
    lengths, beams, tokens, words = case
    step = random_step(lengths, beams, tokens, words, 2, head_dim).to(dtype)
    out = step.qkv.new_full((step.qkv.shape[0], 2 * head_dim), float("nan"))
    sizes = [ctypes.c_int64(size) for size in (len(lengths), 2, head_dim, beams, tokens, words)]
    tensors = [pointer(tensor) for tensor in (step.qkv, step.prefix, step.words, step.history, out)]
    assert probe.decode_attention(isa, DTYPES.index(dtype), pointer(step.layout.segments), *sizes, *tensors)
    truth = by_sdpa(step.to(torch.double), lengths)
    largest = max(part.double().nan_to_num().abs().max().item() for part in (step.qkv, step.words))
    floor = torch.finfo(dtype).eps * truth.abs().max().item() + 8 * torch.finfo(torch.float32).eps * largest
    assert_parity(out, by_sdpa(step, lengths), truth, dtype, floor=floor)
