"""The Triton decoding attention against float64 and plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beit3_fast.kernels import decode_attention as kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.parity import assert_parity
from ops.test_attention import Lengths
from ops.test_decode_attention import by_sdpa, random_step

from beit3_fast.ops import decode_attention

from .conftest import DTYPES, EXAMPLES
from .guards import GuardedAllocations

# prefixes, beams, new tokens, words, heads, width of a head
SPLIT = ([(150, 0), (64, 0), (65, 3)], 3, 2, 5, 2, 64)
TILES = ([(5, 0), (9, 1)], 7, 3, 2, 2, 16)  # a beam of 21 queries begins in one tile of 16 and ends in the next
WHOLE = ([(33, 5), (0, 0), (0, 9)], 3, 2, 25, 2, 64)


def check(launches: Any, case: Any, dtype: torch.dtype, **options: Any) -> list[str]:
    """Names of the launches."""
    step = random_step(*case).to(dtype)
    with launches(**options) as log, GuardedAllocations() as allocations:
        arguments = (step.qkv, step.prefix, step.layout.segments, step.words, step.history, step.length)
        actual = kernels.forward(*arguments, case[-1] ** -0.5, step.layout.width)
    allocations.check()
    truth = by_sdpa(step.to(torch.double), case[0])
    largest = (
        torch.cat([part.double().flatten() for part in (step.prefix, step.words, step.qkv)])
        .nan_to_num()
        .abs()
        .max()
        .item()
    )
    floor = torch.finfo(dtype).eps * truth.abs().max().item() + 4 * torch.finfo(torch.float32).eps * largest
    assert_parity(actual, by_sdpa(step, case[0]), truth, dtype, floor=floor)
    return [name for name, _ in log]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "names"),
    [(SPLIT, ["_decode_kernel", "_merge_kernel"]), (WHOLE, ["_decode_kernel"]), (TILES, ["_decode_kernel"])],
    ids=["split", "whole", "tiles"],
)
def test_parity(launches: Any, case: Any, names: list[str], dtype: torch.dtype) -> None:
    assert check(launches, case, dtype) in (names, [])


@pytest.mark.parametrize("head_dim", [8, 88, 128])
def test_head_dims(launches: Any, head_dim: int) -> None:
    check(launches, ([(70, 0)], 3, 2, 3, 2, head_dim), DTYPES[-1])


@settings(max_examples=EXAMPLES)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 140), st.integers(0, 20)), min_size=1, max_size=3),
    beams=st.integers(1, 9),
    tokens=st.integers(1, 3),
    words=st.integers(0, 30),
    dtype=st.sampled_from(DTYPES),
)
def test_parity_over_shapes(
    launches: Any, lengths: Lengths, beams: int, tokens: int, words: int, dtype: torch.dtype
) -> None:
    check(launches, (lengths, beams, tokens, words, 2, 16), dtype)


@pytest.mark.simulated_only
def test_as_sm_90_code(launches: Any) -> None:
    check(launches, SPLIT, torch.bfloat16, target=90)


def test_the_op_launches(launches: Any) -> None:
    step = random_step(*WHOLE).to(torch.float32)
    with launches() as log:
        actual = decode_attention(**step.arguments())
    torch.testing.assert_close(actual, by_sdpa(step, WHOLE[0]))
    assert [name for name, _ in log] in (["_decode_kernel"], [])


@pytest.mark.simulated_only
def test_a_prefix_is_read_once_for_all_beams(launches: Any) -> None:
    step = random_step([(256, 0)], 8, 2, 0, 2, 64).to(torch.bfloat16)
    with launches() as log:
        decode_attention(**step.arguments())
    name, counts = log[0]
    assert name == "_decode_kernel"
    compulsory = 2 * (step.prefix.numel() + step.qkv.numel())
    assert counts.global_load["bytes"] <= 1.2 * compulsory


@pytest.mark.parametrize(
    ("programs", "key_tiles", "expected"),
    [(12, 14, 8), (12, 1, 1), (12, 0, 1), (384, 14, 1), (2000, 14, 1), (100, 36, 4)],
)
def test_splits(programs: int, key_tiles: int, expected: int) -> None:
    assert kernels.splits(programs, key_tiles) == expected
