"""The compiled CPU decoding attention at every instruction set; the op is tested in tests/ops."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from ops.parity import assert_parity
from ops.test_decode_attention import CASES, by_sdpa, random_step

from .probes import DTYPES, pointer

PROBE = "attention_probe.cpp"


@pytest.mark.parametrize("head_dim", [12, 64])
@pytest.mark.parametrize("case", [*CASES.values(), ([(70, 0), (3, 30)], 9, 6, 5)], ids=[*CASES, "two blocks"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(probe: ctypes.CDLL, isa: int, dtype: torch.dtype, case: Any, head_dim: int) -> None:
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
