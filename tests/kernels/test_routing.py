"""The Triton counting sort against a stable sort."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from beit3_fast.ops import route_tokens, route_tokens_reference

from .conftest import EXAMPLES


def check(launches: Any, ids: torch.Tensor, num_experts: int) -> None:
    with launches():
        row_index, offsets = route_tokens(ids, num_experts)
    expected_index, expected_offsets = route_tokens_reference(ids, num_experts)
    assert (row_index.dtype, offsets.dtype) == (torch.int32, torch.int32)
    assert torch.equal(row_index, expected_index)
    assert torch.equal(offsets, expected_offsets)


@settings(max_examples=2 * EXAMPLES)
@given(
    tokens=st.integers(0, 1700),
    num_experts=st.integers(1, 64),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    skewed=st.booleans(),
)
def test_is_a_stable_sort(launches: Any, tokens: int, num_experts: int, dtype: torch.dtype, skewed: bool) -> None:
    ids = torch.randint(0, 1 + (num_experts - 1) // (4 if skewed else 1), (tokens,), dtype=dtype)
    check(launches, ids, num_experts)


@pytest.mark.parametrize("tokens", [0, 1, 511, 512, 513])
def test_block_edges(launches: Any, tokens: int) -> None:
    check(launches, torch.randint(0, 2, (tokens,)), 2)


def test_every_other_token(launches: Any) -> None:
    check(launches, torch.randint(0, 3, (200,))[::2], 3)


def test_more_experts_than_the_kernel_takes(launches: Any) -> None:
    check(launches, torch.randint(0, 100, (300,)), 100)
