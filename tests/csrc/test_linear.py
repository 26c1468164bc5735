"""The compiled CPU linear layers: their products at every instruction set, and the ops that the library registers."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.parity import assert_parity
from torch import Tensor

import beit3_fast

from .probes import DTYPES, ISAS, name, pointer

PROBE = "linear_probe.cpp"
GUARD = 3  # columns past each row of an output that must stay as they are

LIBRARY = beit3_fast._extension.status()["cpu"]
needs_library = pytest.mark.skipif(not LIBRARY.loaded, reason=f"the CPU library is not loaded: {LIBRARY.reason}")


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def guarded(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.full((rows, columns + GUARD), 7.0, dtype=dtype)


# rows, columns, depth: around tiles of 6 rows, panels of 8, 16 and 64 columns, pairs of a depth, blocks of 1024 words
SHAPES = [
    (1, 1, 1), (5, 16, 7), (6, 63, 64), (49, 65, 33), (101, 130, 48), (97, 8, 1), (13, 200, 101), (50, 64, 0),
    (50, 20, 1025), (7, 64, 2053),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_forward(probe: ctypes.CDLL, isa: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Bias, GELU, residual in fp32; rows gathered and scattered; the narrow output kept."""
    rows, columns, depth = shape
    a, b = normal(rows + 4, depth, dtype=dtype), normal(columns, depth, dtype=dtype, scale=max(depth, 1) ** -0.5)
    bias, residual = normal(columns, dtype=dtype), normal(rows, columns, dtype=torch.float32)
    source, target = torch.randperm(rows + 4)[:rows], torch.randperm(rows)
    out, pre = guarded(rows, columns, torch.float32), guarded(rows, columns, dtype)
    padded = guarded(rows, columns, torch.float32)
    padded[:, :columns] = residual
    sizes = [ctypes.c_int64(size) for size in shape]
    stayed = probe.product(
        isa, DTYPES.index(dtype), True, *sizes,
        pointer(a), ctypes.c_int64(depth), pointer(source), False, False,
        pointer(b), ctypes.c_int64(depth), False, pointer(bias), True, pointer(pre), pointer(padded),
        pointer(out), ctypes.c_int64(columns + GUARD), pointer(target),
    )  # fmt: skip
    assert stayed
    assert (out[:, columns:] == 7).all()
    assert (pre[:, columns:] == 7).all()
    place = target.argsort()
    truth_pre = F.linear(a.double()[source], b.double(), bias.double())[place]
    plain_pre = F.linear(a[source], b, bias)[place]
    assert_parity(pre[:, :columns], plain_pre, truth_pre, dtype, "pre-activation")
    truth = F.gelu(truth_pre) + residual.double()
    plain = F.gelu(plain_pre.float()) + residual
    floor = torch.finfo(dtype).eps * max(truth_pre.abs().max().item(), truth.abs().max().item())
    assert_parity(out[:, :columns], plain, truth, dtype, "output", floor)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("across", [(False, False), (False, True), (True, True)], ids=["x w^T", "dy w", "dy^T x"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_products(
    probe: ctypes.CDLL, isa: int, dtype: torch.dtype, across: tuple[bool, bool], shape: tuple[int, int, int]
) -> None:
    rows, columns, depth = shape
    a_across, b_across = across
    left, right = normal(rows, depth, dtype=dtype), normal(depth, columns, dtype=dtype)
    a = left.t().contiguous() if a_across else left
    b = right if b_across else right.t().contiguous()
    pairs = dtype == torch.bfloat16 and ISAS[isa] == "avx512_bf16" and depth % 2 == 0
    in_place = not a_across and rows > 48 and (dtype == torch.float32 or pairs)
    out = guarded(rows, columns, dtype)
    sizes = [ctypes.c_int64(size) for size in shape]
    stayed = probe.product(
        isa, DTYPES.index(dtype), False, *sizes,
        pointer(a), ctypes.c_int64(a.shape[1]), None, a_across, in_place,
        pointer(b), ctypes.c_int64(b.shape[1]), b_across, None, False, None, None,
        pointer(out), ctypes.c_int64(columns + GUARD), None,
    )  # fmt: skip
    assert stayed
    assert (out[:, columns:] == 7).all()
    truth = left.double() @ right.double()
    terms = (left.double().abs() @ right.double().abs()).max().item() if depth else 0.0
    floor = torch.finfo(dtype).eps * truth.abs().max().item() + torch.finfo(torch.float32).eps * terms
    assert_parity(out[:, :columns], left @ right, truth, dtype, "product", floor)


@pytest.mark.parametrize("shape", [(1, 64, 2), (49, 128, 34), (13, 192, 2050), (7, 64, 4100)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_packed_weights(probe: ctypes.CDLL, isa: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    rows, columns, depth = shape
    a, b = normal(rows, depth, dtype=dtype), normal(columns, depth, dtype=dtype, scale=depth**-0.5)
    out = guarded(rows, columns, torch.float32)
    sizes = [ctypes.c_int64(size) for size in shape]
    panels = beit3_fast.ops.pack_weight(b[None])
    assert probe.packed_product(
        isa, DTYPES.index(dtype), *sizes, pointer(a), pointer(panels), None, pointer(out),
        ctypes.c_int64(columns + GUARD),
    )  # fmt: skip
    assert (out[:, columns:] == 7).all()
    truth = a.double() @ b.double().t()
    # products of two narrow numbers are exact in fp32: what rounds are the sums
    assert_parity(out[:, :columns], a.float() @ b.float().t(), truth, torch.float32, "product")


@pytest.mark.parametrize("shape", [(1, 64, 4), (49, 128, 36), (13, 192, 2052), (7, 64, 4104)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_int8(probe: ctypes.CDLL, isa: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """Whole steps, of which every row and output has 127: nothing is lost, and the largest sums there are."""
    rows, columns, depth = shape
    steps, weight = (torch.randint(-127, 128, size).double() for size in ((rows, depth), (columns, depth)))
    steps[:, 0], weight[:, 1] = 127, -127
    if rows > 1:
        steps[0], weight[0] = -127, 127
    worth = 2.0 ** torch.randint(-4, 5, (columns,)).double()
    panels, scales = beit3_fast.ops.quantize_weight((weight * worth[:, None])[None].float())
    out = guarded(rows, columns, torch.float32)
    sizes = [ctypes.c_int64(size) for size in shape]
    x = steps.to(dtype)
    assert probe.packed_product(
        isa, DTYPES.index(dtype), *sizes, pointer(x), pointer(panels), pointer(scales), pointer(out),
        ctypes.c_int64(columns + GUARD),
    )  # fmt: skip
    assert (out[:, columns:] == 7).all()
    truth = (steps @ weight.t()) * worth
    # sums of 128 words are exact; beyond that they round as floats of their size do, 128 added to each factor
    largest = 255 * 127 * depth * worth
    rounding = torch.finfo(torch.float32).eps * (truth.abs() + (largest if depth > 512 else 0))
    assert ((out[:, :columns].double() - truth).abs() <= 2 * rounding).all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 17), (9, 64), (130, 33)])
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_gradients(probe: ctypes.CDLL, isa: int, dtype: torch.dtype, rows: int, columns: int) -> None:
    dy, pre = normal(rows, columns, dtype=dtype), normal(rows, columns, dtype=dtype, scale=3.0)
    out, sums = torch.empty_like(dy), torch.empty(columns, dtype=dtype)
    tensors = [pointer(tensor) for tensor in (dy, pre, out)]
    probe.gradients(isa, DTYPES.index(dtype), *tensors, ctypes.c_int64(rows), ctypes.c_int64(columns), pointer(sums))
    x = pre.double().requires_grad_()
    (truth,) = torch.autograd.grad(F.gelu(x), x, dy.double())
    plain = torch.ops.aten.gelu_backward(dy.float(), pre.float()).to(dtype)
    floor = torch.finfo(dtype).eps * dy.double().abs().max().item()
    assert_parity(out, plain, truth, dtype, "gradient through GELU", floor)
    assert_parity(sums, dy.float().sum(0).to(dtype), dy.double().sum(0), dtype, "sums", 2 * floor * rows**0.5)


def test_gelu_far_out(probe: ctypes.CDLL, isa: int) -> None:
    """Against float64 over the whole range of fp32: 1e-7 times the larger of 1 and |x|."""
    x = torch.cat([torch.linspace(-14, 14, 20011), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4, 3e38, -3e38])])
    out = torch.empty_like(x)
    count, one = ctypes.c_int64(x.numel()), torch.ones(1, 1)
    probe.product(
        isa, 0, True, count, ctypes.c_int64(1), ctypes.c_int64(1), pointer(x), ctypes.c_int64(1), None, False, True,
        pointer(one), ctypes.c_int64(1), False, None, True, None, None, pointer(out), ctypes.c_int64(1), None,
    )  # fmt: skip
    error = (out.double() - F.gelu(x.double())).abs()
    assert (error <= 1.2e-7 * x.double().abs().clamp(min=1)).all()


# ----------------------------------------------------------------------------------------------- as the library has it


def linear(*arguments: Any) -> tuple[Tensor, ...]:
    return torch.ops.beit3_fast.multiway_linear_cpu(*arguments)


@needs_library
def test_the_number_of_threads_changes_nothing() -> None:
    x, weight = torch.randn(300, 70), torch.randn(2, 150, 70)
    offsets, dy = torch.tensor([0, 211, 290], dtype=torch.int32), torch.randn(300, 150)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            out, pre = linear(x, weight, weight[:, :, 0].contiguous(), offsets, True, None, None, True)
            gradients = torch.ops.beit3_fast.multiway_linear_cpu_backward(dy, x, weight, offsets, pre, None, True, True)
            results.append((out, pre, *gradients))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for first, again in zip(results[0], other, strict=True):
            assert torch.equal(first, again)


@needs_library
def test_changed_weights_are_seen_however_they_change() -> None:
    x, weight, offsets = torch.randn(200, 64), torch.randn(1, 64, 64), torch.tensor([0, 200], dtype=torch.int32)
    first, _ = linear(x, weight, None, offsets, False, None, None, False)
    weight.data.mul_(2)
    weight.detach().numpy()[:] += 0  # a write that no version counter sees
    second, _ = linear(x, weight, None, offsets, False, None, None, False)
    assert torch.equal(second, 2 * first)


@needs_library
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.zeros(4, 3)}, "weight must have shape"),
        ({"x": torch.zeros(4, 5, dtype=torch.float64)}, "x must be float32, bfloat16 or float16"),
        ({"weight": torch.zeros(2, 6, 5).half()}, "weight must have the dtype of x"),
        ({"bias": torch.zeros(2, 5)}, "bias must have shape"),
        ({"expert_offsets": torch.tensor([0, 5, 4], dtype=torch.int32)}, "expert_offsets must not decrease"),
        ({"residual": torch.zeros(4, 5)}, "residual must have shape"),
        ({"row_index": torch.tensor([0, 1, 2, 4])}, "row_index must lie in"),
    ],
)
def test_bad_arguments(changed: dict[str, Tensor], message: str) -> None:
    arguments = {
        "x": torch.zeros(4, 5),
        "weight": torch.zeros(2, 6, 5),
        "bias": torch.zeros(2, 6),
        "expert_offsets": torch.tensor([0, 2, 4], dtype=torch.int32),
        "gelu": False,
        "residual": None,
        "row_index": None,
        "save": False,
    }
    linear(*arguments.values())
    with pytest.raises(RuntimeError, match=message):
        linear(*{**arguments, **changed}.values())
