"""The GELU that the kernels use, over its whole range, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from beit3_fast.kernels.gelu import gelu, gelu_and_derivative


@triton.jit
def _gelu_kernel(x, value, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(value + place, gelu(tl.load(x + place)))


@triton.jit
def _derivative_kernel(x, value, slope, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v, s = gelu_and_derivative(tl.load(x + place))
    tl.store(value + place, v)
    tl.store(slope + place, s)


@triton.jit
def _copy_kernel(x, value, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(value + place, tl.load(x + place))


def samples() -> torch.Tensor:
    near = torch.linspace(-12, 12, 2**16, dtype=torch.float64)
    far = torch.logspace(-40, 38, 2**15, dtype=torch.float64)
    return torch.cat([near, far, -far]).float()


def exact(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.double()
    below = 0.5 * torch.special.erfc(-x * 0.5**0.5)
    density = torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    return x * below, below + torch.where(density == 0, 0.0, x * density)


def test_gelu_and_derivative(launches: Any) -> None:
    x = samples()
    value, again, slope = torch.empty_like(x), torch.empty_like(x), torch.empty_like(x)
    with launches():
        _gelu_kernel[(x.numel() // 1024,)](x, value, BLOCK=1024)
        _derivative_kernel[(x.numel() // 1024,)](x, again, slope, BLOCK=1024)
    true_value, true_slope = exact(x)
    assert torch.equal(value, again)
    assert ((value - true_value).abs() / x.double().abs().clamp(min=1)).max() <= 1e-7
    assert (slope - true_slope).abs().max() <= 1.5e-7


@pytest.mark.simulated_only
def test_instructions(launches: Any) -> None:
    """13 instructions an element beyond its load and store, 21 with the slope, and no branches."""
    x = torch.randn(1024)
    out = [torch.empty_like(x) for _ in range(2)]
    with launches() as log:
        _copy_kernel[(1,)](x, out[0], BLOCK=1024)
        _gelu_kernel[(1,)](x, out[0], BLOCK=1024)
        _derivative_kernel[(1,)](x, *out, BLOCK=1024)
    copy, value, slope = (stats.to_dict() for _, stats in log)
    arithmetic = [
        sum(s["by_class"].get(kind, 0) for kind in ("fp32", "sfu", "pred", "int", "cvt")) / 1024
        for s in (copy, value, slope)
    ]
    assert arithmetic[1] - arithmetic[0] <= 13
    assert arithmetic[2] - arithmetic[0] <= 21.5
    assert value["by_class"].get("branch", 0) == copy["by_class"].get("branch", 0)
