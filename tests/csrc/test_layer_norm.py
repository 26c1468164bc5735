"""The compiled CPU LayerNorm itself, called below ``ops.layer_norm``: all that it returns, every mixture, threads."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from ops.parity import assert_exact, assert_parity
from torch import Tensor

import beit3_fast

LIBRARY = beit3_fast._extension.status()["cpu"]
pytestmark = pytest.mark.skipif(not LIBRARY.loaded, reason=f"the CPU library is not loaded: {LIBRARY.reason}")

EPS = 1e-5
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def kernel(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, offsets: list[int]) -> tuple[Tensor, ...]:
    offsets_tensor = torch.tensor(offsets, dtype=torch.int32)
    with torch.no_grad():
        return torch.ops.beit3_fast.layer_norm(x, residual, weight, bias, offsets_tensor, EPS)


def normal(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) + mean).to(dtype)


def check(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, offsets: list[int]) -> None:
    """All four outputs against float64 and plain PyTorch."""
    y, total, mean, rstd = kernel(x, residual, weight, bias, offsets)
    expected_total = x if residual is None else x + residual
    dtype = expected_total.dtype
    wide = torch.promote_types(dtype, torch.float32)
    used = offsets[-1]
    assert (y.dtype, y.shape, y.is_contiguous()) == (dtype, x.shape, True)
    assert mean.dtype == rstd.dtype == wide
    assert mean.shape == rstd.shape == x.shape[:1]
    assert total.dtype == dtype
    if residual is None:
        assert total.shape == (0,)
    else:
        assert torch.equal(total, expected_total)
    for output in (y, mean, rstd):
        assert not output[used:].count_nonzero()

    for expert, (start, stop) in enumerate(itertools.pairwise(offsets)):
        rows = expected_total[start:stop]
        w, b = weight[expert], bias[expert]
        truth = F.layer_norm(rows.double(), rows.shape[1:], w.double(), b.double(), EPS)
        if dtype == torch.float64:
            assert_exact(y[start:stop], truth, f"y of expert {expert}")
        else:
            plain = F.layer_norm(rows.float(), rows.shape[1:], w.float(), b.float(), EPS).to(dtype)
            assert_parity(y[start:stop], plain, truth, dtype, f"y of expert {expert}")
        if rows.numel() > 0:
            _, true_mean, true_rstd = torch.native_layer_norm(rows.double(), rows.shape[1:], None, None, EPS)
            ulp = torch.finfo(wide).eps
            assert (mean[start:stop] - true_mean.squeeze(1)).abs().max() <= ulp * rows.abs().max()
            assert (rstd[start:stop] / true_rstd.squeeze(1) - 1).abs().max() <= 16 * ulp


@pytest.mark.parametrize("residual_dtype", [None, *FLOATING])
@pytest.mark.parametrize("dtype", FLOATING)
def test_every_mixture(dtype: torch.dtype, residual_dtype: torch.dtype | None) -> None:
    x = normal(9, 83, dtype=dtype)
    residual = None if residual_dtype is None else normal(9, 83, dtype=residual_dtype)
    for weight_dtype, bias_dtype in itertools.product(FLOATING, FLOATING):
        weight, bias = normal(3, 83, dtype=weight_dtype), normal(3, 83, dtype=bias_dtype)
        check(x, residual, weight, bias, [0, 4, 4, 7])


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 1), (3, 2), (4, 15), (2, 16), (3, 255), (7, 768), (2, 4099)])
@pytest.mark.parametrize("dtype", FLOATING)
def test_shapes(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    rows, width = shape
    x, residual = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype)
    weight, bias = normal(2, width, dtype=dtype), normal(2, width, dtype=dtype)
    check(x, None, weight, bias, [0, rows // 2, rows])
    check(x, residual, weight, bias, [0, rows // 2, rows])


@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_a_mean_far_from_zero(mean: float) -> None:
    weight, bias = normal(1, 768), normal(1, 768)
    check(normal(16, 768, mean=mean), None, weight, bias, [0, 16])
    check(normal(16, 768, mean=mean), normal(16, 768), weight, bias, [0, 16])


def test_constant_rows() -> None:
    x = torch.tensor([0.0, 1.0, 1e3, -7.7]).unsqueeze(1).expand(4, 768)
    weight, bias = normal(1, 768), normal(1, 768)
    y, _, _, rstd = kernel(x, None, weight, bias, [0, 4])
    torch.testing.assert_close(y, bias.expand(4, 768), rtol=0, atol=1e-4)
    torch.testing.assert_close(rstd, torch.full((4,), EPS**-0.5))


@pytest.mark.parametrize("dtype", FLOATING)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_stay_in_their_row(dtype: torch.dtype, special: float) -> None:
    x = normal(3, 70, dtype=dtype)
    x[1, 69] = special
    weight, bias = normal(1, 70, dtype=dtype), normal(1, 70, dtype=dtype)
    y = kernel(x, None, weight, bias, [0, 3])[0]
    expected = F.layer_norm(x, (70,), weight[0], bias[0], EPS)
    assert torch.equal(y.isnan(), expected.isnan())
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()


def test_memory_layouts() -> None:
    """Strided rows are read where they lie; values around them are NaN and must not be touched."""
    values, residual = normal(6, 33), normal(6, 33)
    weight, bias = normal(2, 33), normal(2, 33)
    expected = kernel(values, residual, weight, bias, [0, 2, 6])

    def framed(matrix: Tensor) -> Tensor:
        buffer = torch.full((2 * matrix.shape[0], matrix.shape[1] + 5), float("nan"))[::2, 2:-3]
        return buffer.copy_(matrix)

    def transposed(matrix: Tensor) -> Tensor:
        return matrix.t().contiguous().t()

    for arrange in (framed, transposed):
        actual = kernel(arrange(values), arrange(residual), arrange(weight), arrange(bias), [0, 2, 6])
        for got, wanted in zip(actual, expected, strict=True):
            assert torch.equal(got, wanted)
    row = normal(1, 33)
    same = kernel(row.expand(6, 33), None, weight, bias, [0, 2, 6])[0]
    assert torch.equal(same, kernel(row.repeat(6, 1), None, weight, bias, [0, 2, 6])[0])


def test_threads_do_not_change_a_bit() -> None:
    x, residual = normal(700, 768, dtype=torch.bfloat16), normal(700, 768, dtype=torch.bfloat16)
    weight, bias = normal(2, 768), normal(2, 768)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(kernel(x, residual, weight, bias, [0, 301, 650]))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4)}, r"x must have shape \(rows, width\), got \(4\)"),
        ({"x": torch.zeros(4, 8, dtype=torch.int64)}, "x must be float32, .* got Long"),
        ({"residual": torch.zeros(4, 7)}, r"residual must have the shape of x, \(4, 8\), got \(4, 7\)"),
        ({"residual": torch.zeros(4, 8, dtype=torch.bool)}, "residual must be float32"),
        ({"weight": torch.zeros(8)}, r"weight must have shape \(experts, 8\), got \(8\)"),
        ({"weight": torch.zeros(2, 9)}, r"weight must have shape \(experts, 8\), got \(2, 9\)"),
        ({"bias": torch.zeros(1, 8)}, r"bias must have the shape of weight, \(2, 8\), got \(1, 8\)"),
        ({"expert_offsets": torch.tensor([0, 2, 4])}, "expert_offsets must be int32, got Long"),
        ({"expert_offsets": torch.tensor([0, 4], dtype=torch.int32)}, r"expert_offsets must have shape \(3,\)"),
        ({"expert_offsets": torch.tensor([1, 2, 4], dtype=torch.int32)}, "expert_offsets must begin with 0, got 1"),
        ({"expert_offsets": torch.tensor([0, 3, 2], dtype=torch.int32)}, "expert_offsets must not decrease"),
        ({"expert_offsets": torch.tensor([0, 2, 5], dtype=torch.int32)}, "expert_offsets must end at or before the 4"),
    ],
)
def test_bad_input_is_named(change: dict[str, Tensor], message: str) -> None:
    good = {
        "x": torch.zeros(4, 8),
        "residual": None,
        "weight": torch.zeros(2, 8),
        "bias": torch.zeros(2, 8),
        "expert_offsets": torch.tensor([0, 2, 4], dtype=torch.int32),
    }
    torch.ops.beit3_fast.layer_norm(*good.values(), EPS)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.beit3_fast.layer_norm(*(good | change).values(), EPS)
