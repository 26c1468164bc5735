"""Every instruction set that the CPU kernels are compiled for, as far as this machine can run it.

The library itself runs only the best one: here the kernel headers are compiled into one that lets the test choose.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
import torch.nn.functional as F
from ops.parity import assert_exact, assert_parity
from torch import Tensor

from .probes import name, pointer

PROBE = "isa_probe.cpp"
HALF_TYPES = (torch.bfloat16, torch.float16)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Equal bit by bit, except that one NaN is as good as another."""
    assert torch.equal(actual.isnan(), expected.isnan())
    integer = torch.int32 if actual.dtype == torch.float32 else torch.int16
    numbers = ~expected.isnan()
    assert torch.equal(actual.view(integer)[numbers], expected.view(integer)[numbers])


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=name)
def test_widening_is_exact_for_every_value(probe: ctypes.CDLL, isa: int, dtype: torch.dtype) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(values.shape)
    getattr(probe, f"widen_{name(dtype)}")(isa, pointer(values), pointer(out), ctypes.c_int64(values.numel()))
    assert_same_bits(out, values.float())


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=name)
def test_rounding_is_that_of_pytorch(probe: ctypes.CDLL, isa: int, dtype: torch.dtype) -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    every = every[every.isfinite()].sort().values
    midpoints = (every[1:].double() + every[:-1].double()).div(2).float()
    random_bits = torch.randint(-(2**31), 2**31, (200_000,)).to(torch.int32).view(torch.float32)
    edges = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 65519.996, 65520.0, 3.4e38, 1e-45])
    up, down = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    values = torch.cat([every, midpoints, midpoints.nextafter(up), midpoints.nextafter(down), random_bits, edges])
    out = torch.empty(values.shape, dtype=dtype)
    getattr(probe, f"round_{name(dtype)}")(isa, pointer(values), pointer(out), ctypes.c_int64(values.numel()))
    assert_same_bits(out, values.to(dtype))


@pytest.mark.parametrize("width", [1, 2, 7, 8, 15, 16, 17, 31, 64, 65, 127, 130, 768, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF_TYPES], ids=name)
def test_layer_norm(probe: ctypes.CDLL, isa: int, dtype: torch.dtype, width: int) -> None:
    x, residual = torch.randn(2, width, dtype=torch.float64).add(3).to(dtype)
    weight, bias = torch.randn(2, width, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    guard = 8  # elements past the row that must stay as they are
    y, total = torch.full((2, width + guard), 7, dtype=dtype)
    scratch, mean, rstd = torch.empty(width, dtype=wide), torch.empty(1, dtype=wide), torch.empty(1, dtype=wide)
    eps = (ctypes.c_double if dtype == torch.float64 else ctypes.c_float)(1e-5)
    rows = [pointer(row) for row in (x, residual, total, scratch, weight, bias, y)]
    getattr(probe, f"layer_norm_{name(dtype)}")(isa, *rows, ctypes.c_int64(width), eps, pointer(mean), pointer(rstd))

    assert (y[width:] == 7).all()
    assert (total[width:] == 7).all()
    expected_total = x + residual
    assert torch.equal(total[:width], expected_total)
    exact = expected_total.double()
    truth = F.layer_norm(exact, (width,), weight.double(), bias.double(), 1e-5)
    if dtype == torch.float64:
        assert_exact(y[:width], truth, "y")
    else:
        assert_parity(y[:width], F.layer_norm(expected_total, (width,), weight, bias, 1e-5), truth, dtype, "y")
    ulp = torch.finfo(wide).eps
    assert abs(mean.item() - exact.mean()) <= ulp * exact.abs().max()
    assert abs(rstd.item() * (exact.var(correction=0) + 1e-5).sqrt() - 1) <= 16 * ulp
