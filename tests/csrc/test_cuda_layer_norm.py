"""The CUDA LayerNorm kernels as nvcc compiles them for sm_80, run in a PTX simulator: values, races, bounds, traffic.

No GPU is needed. ``tests/ops/test_layer_norm.py`` runs the registered op where there is one.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.parity import affine, assert_exact, assert_parity, normal
from torch import Tensor

from .cuda_layer_norm import TYPES, Arithmetic, Kernels, compile_ptx

EPS = 1e-5
LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
ULP = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    simulator = pytest.importorskip("ptxsim", reason="the PTX simulator is not installed")
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None or shutil.which("nvcc") is None or shutil.which("c++filt") is None:
        pytest.skip("nvcc, a C++ compiler or c++filt is missing")
    folder = tmp_path_factory.mktemp("cuda_layer_norm")
    modules = {part: simulator.Module(ptx) for part, ptx in compile_ptx(folder).items()}
    return Kernels(modules, simulator.Struct, Arithmetic(folder, compiler))


@pytest.fixture
def kernels(compiled: Kernels) -> Kernels:
    compiled.counts.clear()
    return compiled


def offsets_of(*offsets: int) -> Tensor:
    return torch.tensor(offsets, dtype=torch.int32)


def rows_of(count: int, width: int, dtype: torch.dtype, mean: float = 0.0) -> Tensor:
    return (torch.randn(count, width, dtype=torch.float64) + mean).to(dtype)


def plain(
    total: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, offsets: Sequence[int], dtype: torch.dtype
) -> dict[str, Tensor]:
    """LayerNorm of each expert's rows, computed in `dtype` by PyTorch, and its gradients."""
    leaves = [value.to(dtype).requires_grad_() for value in (total, weight, bias)]
    pieces = [
        F.layer_norm(leaves[0][start:stop], total.shape[1:], leaves[1][expert], leaves[2][expert], EPS)
        for expert, (start, stop) in enumerate(itertools.pairwise(offsets))
    ]
    y = torch.cat([*pieces, leaves[0].new_zeros(len(total) - offsets[-1], total.shape[1])])
    gradients = torch.autograd.grad(y, leaves, dy.to(dtype), allow_unused=True, materialize_grads=True)
    return dict(zip(("y", "dtotal", "dweight", "dbias"), (y.detach(), *gradients), strict=True))


def check(
    kernels: Kernels,
    rows: int,
    width: int,
    offsets: Sequence[int],
    dtype: torch.dtype,
    *,
    residual: torch.dtype | None = None,
    parameters: torch.dtype | None = None,
    mean: float = 0.0,
) -> list[str]:
    """Forward and backward of one shape against float64, by the parity rule; the kernels that ran."""
    torch.manual_seed(0)
    parameters = parameters or dtype
    experts = len(offsets) - 1
    x = rows_of(rows, width, dtype, mean)
    added = None if residual is None else rows_of(rows, width, residual)
    weight, bias = affine(experts, width, dtype=parameters), normal(experts, width, dtype=parameters)
    expected_total = x if added is None else x + added
    total_dtype = expected_total.dtype
    dy = rows_of(rows, width, total_dtype)
    dresidual = None if added is None else rows_of(rows, width, total_dtype)

    y, total, mean_out, rstd_out = kernels.forward(x, added, weight, bias, offsets_of(*offsets), EPS)
    if total is not None:
        assert torch.equal(total, expected_total)
    gradients = kernels.backward(
        dy, expected_total, weight, offsets_of(*offsets), mean_out, rstd_out, dresidual, bias.dtype
    )
    actual = dict(zip(("y", "dtotal", "dweight", "dbias"), (y, *gradients), strict=True))

    truth = plain(expected_total, dy, weight, bias, offsets, torch.float64)
    yardstick = plain(expected_total, dy, weight, bias, offsets, torch.promote_types(total_dtype, torch.float32))
    if dresidual is not None:
        for table in (truth, yardstick):
            table["dtotal"] = table["dtotal"] + dresidual
    used = slice(0, offsets[-1])
    exact = expected_total.double()
    magnitude, spread = exact.abs().amax(1), (exact.var(1, correction=0) + EPS).rsqrt()
    normed_error = ULP * (1 + spread * magnitude)[used]
    scale, cotangent = weight.double().abs().max(), dy.double().abs().amax(1)[used]
    floors = {
        "y": normed_error.max() * scale if len(normed_error) else torch.tensor(0.0),
        "dtotal": (ULP * spread[used] * cotangent * scale * (4 + spread * magnitude)[used]).max(),
        "dweight": (normed_error * cotangent).sum(),
        "dbias": ULP * cotangent.sum(),
    }
    for name, value in actual.items():
        stored = parameters if name in ("dweight", "dbias") else total_dtype
        assert value.dtype == stored
        if dtype == torch.float64:
            assert_exact(value, truth[name], name)
            continue
        floor = floors[name].item() + torch.finfo(stored).eps * truth[name].abs().max().item()
        assert_parity(value, yardstick[name].to(stored), truth[name], total_dtype, name, floor)
    past = offsets[-1]
    for output in (y, mean_out, rstd_out):
        assert not output[past:].count_nonzero(), "rows past the last offset"
    assert torch.equal(gradients[0][past:], torch.zeros_like(dy[past:]) if dresidual is None else dresidual[past:])
    assert (mean_out[used].double() - exact.mean(1)[used]).abs().le(ULP * magnitude[used]).all()
    assert (rstd_out[used].double() / spread[used] - 1).abs().le(16 * ULP).all()
    return [name for name, _ in kernels.counts]


WIDTHS = (1, 7, 768, 1000, 1001, 1408, 3072, 6144, 8000, 20000)
SPANS = dict(zip(WIDTHS, (*["warp"] * 4, *["block"] * 4, "loop", "loop"), strict=True))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_widths(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    forward, backward, *_ = check(kernels, 13, width, [0, 5, 11], dtype)
    assert SPANS[width] in forward
    assert SPANS[width] in backward


@pytest.mark.parametrize(
    ("rows", "offsets"),
    [
        (1, [0, 1]),
        (1, [0, 0, 1]),
        (3, [0, 1, 2]),
        (3, [0, 0, 0]),
        (70, [0, 70]),
        (70, [0, 0, 70]),
        (70, [0, 41, 70]),
        (70, [0, 33, 33, 64]),
        (70, [0, 1, 2, 3, 60]),
    ],
)
@pytest.mark.parametrize("width", [40, 1040, 8008])
def test_rows_and_experts(kernels: Kernels, width: int, rows: int, offsets: list[int]) -> None:
    if offsets[-1] == 0:
        y, _, mean, rstd = kernels.forward(
            rows_of(rows, width, torch.float32), None, affine(2, width).float(), normal(2, width).float(),
            offsets_of(*offsets), EPS,
        )  # fmt: skip
        for output in (y, mean, rstd):
            assert not output.count_nonzero()
        return
    check(kernels, rows, width, offsets, torch.bfloat16, residual=torch.bfloat16)


@pytest.mark.parametrize("width", [768, 3072])
def test_many_rows(kernels: Kernels, width: int) -> None:
    kernels.processors = 4
    check(kernels, 1000, width, [0, 790, 990], torch.bfloat16)


@pytest.mark.parametrize("parameters", LOW_PRECISION)
@pytest.mark.parametrize(("dtype", "residual"), list(itertools.product(LOW_PRECISION, (None, *LOW_PRECISION))))
def test_mixtures(kernels: Kernels, dtype: torch.dtype, residual: torch.dtype | None, parameters: torch.dtype) -> None:
    """What the host gives to a kernel without converting it first."""
    if residual is not None and residual not in (dtype, torch.float32):
        pytest.skip("converted by the host")
    for width in (83, 136, 1032, 8008):
        check(kernels, 6, width, [0, 2, 5], dtype, residual=residual, parameters=parameters)


@pytest.mark.parametrize("residual", [None, torch.float64])
def test_float64(kernels: Kernels, residual: torch.dtype | None) -> None:
    check(kernels, 9, 83, [0, 4, 7], torch.float64, residual=residual)


@pytest.mark.parametrize("width", [1024, 1408, 8008])
@pytest.mark.parametrize("mean", [1e3, -1e3])
def test_a_mean_far_from_zero(kernels: Kernels, width: int, mean: float) -> None:
    check(kernels, 12, width, [0, 5, 12], torch.float32, mean=mean)
    check(kernels, 12, width, [0, 5, 12], torch.float32, mean=mean, residual=torch.float32)


def test_strided_rows_are_read_where_they_lie(kernels: Kernels) -> None:
    """Around them is NaN; a stride that breaks the alignment of vectors takes the kernel that needs none."""
    for width, gap, fit in ((768, 8, "exact"), (776, 8, "vector"), (768, 3, "scalar"), (1030, 2, "scalar")):
        x = rows_of(5, width, torch.bfloat16)
        weight, bias = affine(2, width).float(), normal(2, width).float()
        buffer = torch.full((10, width + gap), float("nan"), dtype=torch.bfloat16)
        framed = buffer[::2, :width].copy_(x)
        expected = kernels.forward(x, x, weight, bias, offsets_of(0, 2, 5))
        actual = kernels.forward(framed, framed, weight, bias, offsets_of(0, 2, 5))
        assert fit in kernels.counts[-1][0]
        for got, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-2 if got.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
        dy, (_, total, mean, rstd) = rows_of(5, width, torch.bfloat16), expected
        framed_dy = torch.full_like(buffer, float("nan"))[::2, :width].copy_(dy)
        expected = kernels.backward(dy, total, weight, offsets_of(0, 2, 5), mean, rstd, dy)
        actual = kernels.backward(framed_dy, total, weight, offsets_of(0, 2, 5), mean, rstd, framed_dy)
        assert fit in kernels.counts[-2][0]
        for got, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-2 if got.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [96, 1032, 8008])
def test_rows_that_nobody_owns_are_never_looked_at(kernels: Kernels, width: int) -> None:
    x, dy = rows_of(9, width, torch.float32), rows_of(9, width, torch.float32)
    weight, bias = affine(2, width).float(), normal(2, width).float()
    clean = kernels.forward(x, None, weight, bias, offsets_of(0, 4, 6))
    clean_gradients = kernels.backward(dy, x, weight, offsets_of(0, 4, 6), clean[2], clean[3])
    x[6:] = dy[6:] = float("nan")
    dirty = kernels.forward(x, None, weight, bias, offsets_of(0, 4, 6))
    dirty_gradients = kernels.backward(dy, x, weight, offsets_of(0, 4, 6), dirty[2], dirty[3])
    for got, wanted in zip((*dirty, *dirty_gradients), (*clean, *clean_gradients), strict=True):
        assert wanted is None or torch.equal(got, wanted)


@pytest.mark.parametrize("width", [768, 3072, 8008])
def test_the_same_bits_whatever_runs_first(kernels: Kernels, width: int) -> None:
    x, dy = rows_of(50, width, torch.bfloat16), rows_of(50, width, torch.bfloat16)
    weight, bias = affine(2, width).float(), normal(2, width).float()
    results = []
    for seed in (None, 1, 2):
        options = {"check_races": False} if seed is None else {"check_races": False, "schedule_seed": seed}
        kernels.options, before = options, kernels.options
        y, _, mean, rstd = kernels.forward(x, None, weight, bias, offsets_of(0, 19, 45))
        results.append((y, mean, rstd, *kernels.backward(dy, x, weight, offsets_of(0, 19, 45), mean, rstd)))
        kernels.options = before
    for other in results[1:]:
        assert all(torch.equal(got, wanted) for got, wanted in zip(other, results[0], strict=True))


# --- counts -----------------------------------------------------------------------------------------------------------


def moved(stats: Any) -> int:
    return stats.global_load["bytes"] + stats.global_store["bytes"]


@pytest.mark.parametrize("width", [768, 1000, 1024, 1408, 3072])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("dtype", "parameters"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32),
                                                   (torch.bfloat16, torch.bfloat16)])  # fmt: skip
def test_every_byte_once(
    kernels: Kernels, dtype: torch.dtype, parameters: torch.dtype, residual: bool, width: int
) -> None:
    """Requested bytes are exactly: each row once, each statistic once, an expert's parameters once for a block."""
    rows, offsets = 64, [0, 30, 64]
    kernels.processors = 3
    x, dy = rows_of(rows, width, dtype), rows_of(rows, width, dtype)
    weight, bias = affine(2, width, dtype=parameters), normal(2, width, dtype=parameters)
    added = rows_of(rows, width, dtype) if residual else None
    _, total, mean, rstd = kernels.forward(x, added, weight, bias, offsets_of(*offsets))
    kernels.backward(dy, x if total is None else total, weight, offsets_of(*offsets), mean, rstd, added)
    (_, forward), (_, backward), (_, reduce) = kernels.counts
    matrix, statistics = x.numel() * x.element_size(), 2 * 4 * rows

    for stats, is_backward, parameter_rows in ((forward, False, 2), (backward, True, 1)):
        launch = kernels.arithmetic.launch(
            width, rows, dtype.itemsize, processors=kernels.processors, backward=is_backward
        )
        meetings = meetings_of(launch.rows_per_block, rows, offsets)
        assert meetings <= launch.blocks + 1
        parameter_bytes = meetings * parameter_rows * width * parameters.itemsize
        offset_bytes = launch.blocks * launch.threads * 3 * 4  # every thread reads them
        matrices = 4 if residual else 2
        partial_bytes = 0
        if is_backward:
            partial_bytes = meetings * 2 * width * 4
            matrices = 3 + residual
            assert stats.global_load["bytes"] == statistics + parameter_bytes + offset_bytes + matrix * (matrices - 1)
        assert moved(stats) == matrix * matrices + statistics + parameter_bytes + offset_bytes + partial_bytes

    meetings = meetings_of(launch.rows_per_block, rows, offsets)
    offset_bytes = reduce.global_load["bytes"] - meetings * 2 * width * 4
    assert 0 < offset_bytes <= 2 * 4 * 512 * 2 * -(-width // 32)
    assert reduce.global_store["bytes"] == 2 * 2 * width * parameters.itemsize


def meetings_of(rows_per_block: int, rows: int, offsets: Sequence[int]) -> int:
    """Pairs of a block and an expert that has rows in it."""
    blocks = [(first, min(rows, first + rows_per_block)) for first in range(0, rows, rows_per_block)]
    return sum(
        max(first, start) < min(last, stop) for first, last in blocks for start, stop in itertools.pairwise(offsets)
    )


@pytest.mark.parametrize("width", [768, 1024, 1408, 3072, 6144])
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_whole_sectors_and_no_bank_conflicts(
    kernels: Kernels, dtype: torch.dtype, parameters: torch.dtype, width: int
) -> None:
    rows = 32
    weight, bias = affine(1, width, dtype=parameters), normal(1, width, dtype=parameters)
    x = rows_of(rows, width, dtype)
    kernels.options, before = {"check_races": False}, kernels.options
    _, _, mean, rstd = kernels.forward(x, None, weight, bias, offsets_of(0, rows))
    kernels.backward(x, x, weight, offsets_of(0, rows), mean, rstd)
    kernels.options = before
    for name, stats in kernels.counts:
        for kind, count in stats.shared.items():
            assert count["conflicts"] == 0, f"{name}: {kind}"
        if name.startswith("reduce"):
            continue
        launch = kernels.arithmetic.launch(width, rows, dtype.itemsize, backward=name.startswith("backward"))
        # Offsets and the statistics of a block's few rows are less than a sector.
        small = launch.blocks * (2 * launch.threads // 32 + 2)
        for accesses in (stats.global_load, stats.global_store):
            assert accesses["sectors"] - accesses["bytes"] / 32 <= small, name


@pytest.mark.parametrize(
    ("width", "forward", "backward"), [(768, 13, 18), (1024, 14, 18), (1408, 19, 20), (3072, 16, 20)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instructions_per_element(
    kernels: Kernels, dtype: torch.dtype, width: int, forward: int, backward: int
) -> None:
    """Lane instructions of a forward and a backward kernel whose blocks have rows enough, at most."""
    rows = 1024
    x, weight, bias = rows_of(rows, width, dtype), affine(1, width, dtype=dtype), normal(1, width, dtype=dtype)
    kernels.options, before = {"check_races": False}, kernels.options
    _, _, mean, rstd = kernels.forward(x, None, weight, bias, offsets_of(0, rows))
    kernels.backward(x, x, weight, offsets_of(0, rows), mean, rstd)
    kernels.options = before
    for (name, stats), most in zip(kernels.counts, (forward, backward), strict=False):
        assert sum(stats.by_class.values()) <= most * rows * width, name


def test_16_byte_accesses(kernels: Kernels) -> None:
    """No row is read or written by less, on a width that allows it."""
    x = rows_of(32, 768, torch.bfloat16)
    kernels.forward(x, None, affine(1, 768).bfloat16(), normal(1, 768).bfloat16(), offsets_of(0, 32))
    stats = kernels.counts[0][1]
    launch = kernels.arithmetic.launch(768, 32, 2)
    vectors = x.numel() // 8 // 32  # requests of a warp
    assert stats.global_store["requests"] <= vectors + 2 * launch.blocks
    parameters = launch.blocks * 2 * 768 // 4 // 32
    assert stats.global_load["requests"] <= vectors + parameters + 2 * launch.blocks * launch.threads // 32


def test_every_kernel_can_be_reached(kernels: Kernels) -> None:
    """Names the tests launch by are those that nvcc compiled: no instantiation is there for nothing."""
    pairs = [*((t, t) for t in ("float", "__nv_bfloat16", "__half")), ("__nv_bfloat16", "float"), ("__half", "float")]
    shapes = list(itertools.product(("warp", "block"), ("exact", "vector", "scalar")))
    vector = {"float": 4, "__nv_bfloat16": 8, "__half": 8}
    expected = {f"forward<{x}, {t}, {span}, {fit}>" for x, t in pairs for span, fit in shapes}
    expected |= {f"forward_loop<{x}, {t}, {v}>" for x, t in pairs for v in (1, vector[t])}
    expected |= {f"backward<{t}, {span}, {fit}>" for t in vector for span, fit in shapes}
    expected |= {f"backward_loop<{t}, {v}>" for t in vector for v in (1, vector[t])}
    expected |= {f"parameters_loop<{t}>" for t in TYPES.values()}
    expected |= {"forward_loop<double, double, 1>", "backward_loop<double, 1>", "reduce<float>", "reduce<double>"}
    assert set(kernels.names) == expected
