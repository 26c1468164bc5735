"""Tokens in any order to expert order: a stable counting sort of row numbers, two launches, no wait for the device."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

MAX_EXPERTS = 64
_BLOCK = 512  # tokens a program counts; its one-hot table of 64 experts is 64 numbers a thread at 16 warps


@triton.jit
def _one_hot(expert_ids, num_tokens, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """(token numbers [BLOCK], mask, one-hot int32 [BLOCK, EXPERTS]) of this program's tokens."""
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < num_tokens
    ids = tl.load(expert_ids + tokens, mask=inside, other=0).to(tl.int32)
    tl.device_assert((ids >= 0) & (ids < NUM_EXPERTS), "expert_ids out of range")
    hot = ((ids[:, None] == tl.arange(0, EXPERTS)[None, :]) & inside[:, None]).to(tl.int32)
    return tokens, inside, hot


@triton.jit(do_not_specialize=["num_tokens"])
def _count_kernel(
    expert_ids, counts, num_tokens, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr
):
    """counts[program, e] = this program's tokens of expert e."""
    _, _, hot = _one_hot(expert_ids, num_tokens, NUM_EXPERTS, EXPERTS, BLOCK)
    tl.store(counts + tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS), tl.sum(hot, axis=0))


@triton.jit(do_not_specialize=["num_tokens"])
def _place_kernel(
    expert_ids, counts, row_index, expert_offsets, num_tokens, NUM_EXPERTS: tl.constexpr, EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """row_index[start of expert + its tokens in earlier programs + rank in this one] = token."""
    experts = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    earlier = tl.zeros((EXPERTS,), tl.int32)
    for first in range(0, tl.num_programs(0), BLOCK_P):
        program = first + tl.arange(0, BLOCK_P)
        there = (program < tl.num_programs(0))[:, None]
        table = tl.load(counts + program[:, None] * EXPERTS + experts[None, :], mask=there, other=0)  # [BP, EXPERTS]
        total += tl.sum(table, axis=0)
        earlier += tl.sum(tl.where((program < tl.program_id(0))[:, None], table, 0), axis=0)
    ends = tl.cumsum(total, axis=0)
    if tl.program_id(0) == 0:
        tl.store(expert_offsets + 1 + experts, ends, mask=experts < NUM_EXPERTS)
        tl.store(expert_offsets, 0)
    tokens, inside, hot = _one_hot(expert_ids, num_tokens, NUM_EXPERTS, EXPERTS, BLOCK)
    place = (ends - total + earlier)[None, :] + tl.cumsum(hot, axis=0) - 1  # [BLOCK, EXPERTS]
    tl.store(row_index + tl.sum(hot * place, axis=1), tokens, mask=inside)


def forward(expert_ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """``ops.route_tokens``.

    Args:
        expert_ids: int32 or int64 (N,), contiguous, in [0, num_experts).
        num_experts: E, at most 64.

    Returns:
        row_index int32 (N,) and expert_offsets int32 (E + 1,).

    Raises:
        ValueError: too many experts, ids that are not contiguous.
    """
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"num_experts must be at most {MAX_EXPERTS}, got {num_experts}")
    if not expert_ids.is_contiguous():
        raise ValueError(f"expert_ids must be contiguous, got strides {tuple(expert_ids.stride())}")
    num_tokens = expert_ids.shape[0]
    row_index = torch.empty_like(expert_ids, dtype=torch.int32)
    expert_offsets = row_index.new_empty(num_experts + 1)
    programs = max(1, triton.cdiv(num_tokens, _BLOCK))  # one even without tokens: it writes the offsets
    experts = triton.next_power_of_2(num_experts)
    counts = row_index.new_empty(programs, experts)
    shape = {"NUM_EXPERTS": num_experts, "EXPERTS": experts, "BLOCK": _BLOCK}
    warps = 4 if experts <= 16 else 16
    launch(_count_kernel, (programs,), expert_ids, counts, num_tokens, **shape, num_warps=warps)
    launch(
        _place_kernel,
        (programs,),
        expert_ids,
        counts,
        row_index,
        expert_offsets,
        num_tokens,
        **shape,
        BLOCK_P=64,
        num_warps=warps,
    )
    return row_index, expert_offsets
