from __future__ import annotations

import math

import pytest
import torch
from beit3_fast.bench.parity import CAP, Error, error, judge


def test_error_is_relative_to_the_truths_size():
    truth = torch.tensor([[3.0, -4.0], [0.0, 0.0]], dtype=torch.float64)
    output = torch.tensor([[3.0, -4.0], [0.02, 0.0]], dtype=torch.float32)
    measured = error(output, truth)
    assert measured.absolute == pytest.approx(0.02)
    assert measured.maximum == pytest.approx(0.02 / 4)
    assert measured.rms == pytest.approx(0.02 / 5)


def test_an_error_below_float32_is_not_lost():
    truth = torch.ones(3, dtype=torch.float64)
    assert error(truth + 1e-12, truth).maximum == pytest.approx(1e-12, rel=1e-3)


def test_a_truth_of_zeros():
    assert error(torch.zeros(2), torch.zeros(2)).maximum == 0
    assert not judge(error(torch.full((2,), 1e-9), torch.zeros(2)), torch.float32).ok


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_fails(bad):
    output = torch.zeros(10)
    output[3] = bad
    measured = error(output, torch.ones(10))
    assert not judge(measured, torch.float32).ok
    assert not judge(measured, torch.float32, Error(1e-6, 1e-6, 1e-6)).ok


def test_shapes():
    with pytest.raises(ValueError, match=r"truth's shape \(2, 3\), got \(3, 2\)"):
        error(torch.zeros(3, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="at least one element"):
        error(torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_rule(dtype):
    cap, eps = CAP[dtype], torch.finfo(dtype).eps
    reference = Error(cap / 8, cap / 16, 1.0)
    assert judge(reference, dtype, reference).ok
    assert judge(Error(cap / 4.1, cap / 8.1, 1.0), dtype, reference).ok
    far = judge(Error(cap / 4 + 2.1 * eps, cap / 16, 1.0), dtype, reference)
    assert not far.ok
    assert far.reason.startswith("maximum error")
    wide = judge(Error(cap / 8, cap / 8 + 0.3 * eps, 1.0), dtype, reference)
    assert not wide.ok
    assert wide.reason.startswith("rms error")
    poor = Error(cap * 10, cap * 10, 1.0)
    capped = judge(Error(cap * 1.01, cap, 1.0), dtype, poor)
    assert not capped.ok, "a poor reference hides nothing"
    assert "the cap" in capped.reason
    exact = Error(0.0, 0.0, 0.0)
    assert judge(Error(1.9 * eps, 0.28 * eps, 1.0), dtype, exact).ok, (
        "rounding is allowed even beside an exact reference"
    )
    assert not judge(Error(2.1 * eps, 0.0, 1.0), dtype, exact).ok
    assert not judge(Error(0.0, 0.3 * eps, 1.0), dtype, exact).ok


def rounded(values, dtype):
    return values.to(dtype).double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_floor_is_one_rounding(dtype):
    """Wherever values lie within their binade, a second rounding passes beside an exact reference; the low bits of the
    sums of a dot product's terms do not pass, from some 30 terms on."""
    generator = torch.Generator().manual_seed(0)
    exact = Error(0.0, 0.0, 0.0)
    for low in (1.0, 1.2, 1.5, 1.9):
        truth = low + (2 - low) * torch.rand(20_000, generator=generator, dtype=torch.float64)
        once = error(rounded(truth, dtype), truth)
        assert judge(once, dtype, exact).ok, low
        assert 0.1 < once.rms / torch.finfo(dtype).eps < 0.29
    for terms in (32, 64, 768):
        a, b = (rounded(torch.randn(500, terms, generator=generator), dtype) for _ in range(2))
        truth = (a * b).sum(1)
        total = torch.zeros(500, dtype=torch.float64)
        for k in range(terms):
            total = rounded(total + a[:, k] * b[:, k], dtype)
        reference = error(rounded(truth, dtype), truth)
        verdict = judge(error(total, truth), dtype, reference)
        assert not verdict.ok, terms
        assert verdict.reason.startswith("rms" if terms == 32 else ("rms", "maximum")), verdict.reason
