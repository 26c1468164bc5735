"""ops.packed_linear and ops.packed_ffn, weights as the CPU's products read them, in their own dtype and as int8."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from beit3_fast.ops import (
    multiway_ffn_reference,
    multiway_linear,
    multiway_linear_reference,
    pack_weight,
    packed_ffn,
    packed_linear,
    quantize_weight,
    unpack_weight,
)
from beit3_fast.ops.packed import _plain_ffn, _plain_linear
from ops.parity import (
    LOW_PRECISION,
    MEMORY_FORMS,
    Partition,
    affine,
    assert_parity,
    assert_refuses,
    in_memory,
    normal,
    partitions,
    refuses,
)

PARTITION = Partition((13, 0, 58), padding=2)  # more rows and fewer than csrc/cpu/linear.h's few_rows


def parameters(partition: Partition, width: int, depth: int, dtype: torch.dtype) -> dict[str, Any]:
    experts = partition.num_experts
    return {
        "x": normal(partition.num_rows, depth, dtype=dtype),
        "weight": normal(experts, width, depth, dtype=dtype, scale=depth**-0.5),
        "bias": normal(experts, width, dtype=dtype),
        "residual": normal(partition.num_rows, width, dtype=dtype),
    }


def quantized_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole steps of each row and what a step is worth, (N, I) and (N, 1), in float64."""
    scale = x.double().abs().amax(1, keepdim=True) / 127
    return (x.double() / torch.where(scale > 0, scale, 1.0)).round(), scale


@given(
    partitions(),
    st.sampled_from([64, 128, 192]),
    st.integers(1, 35).map(lambda half: 2 * half),
    st.sampled_from(LOW_PRECISION),
    st.booleans(),
)
def test_a_linear_layer(partition: Partition, width: int, depth: int, dtype: torch.dtype, plain: bool) -> None:
    """Any partition, few rows and none; the compiled op and the plain one."""
    p = parameters(partition, width, depth, dtype)
    packed = pack_weight(p["weight"])
    assert torch.equal(unpack_weight(packed), p["weight"])
    if plain:
        arguments = (p["x"], packed, None, p["bias"], partition.offsets, True, p["residual"])
        actual = _plain_linear(*arguments)
    else:
        actual = packed_linear(p["x"], packed, p["bias"], partition.offsets, activation="gelu", residual=p["residual"])
    wide = {name: value.double() for name, value in p.items()}
    truth, baseline = (
        multiway_linear_reference(
            v["x"], v["weight"], v["bias"], partition.offsets, activation="gelu", residual=v["residual"]
        )[: partition.used]
        for v in (wide, p)
    )
    assert_parity(actual[: partition.used], baseline, truth, dtype, "out")


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("depth", [66, 1030, 2306])
def test_the_order_of_weights_changes_nothing(dtype: torch.dtype, depth: int) -> None:
    """Where both bring rows into order the same way, packed and plain weights give the same bits; a depth of several
    blocks too."""
    partition = Partition((300, 70))
    p = parameters(partition, 192, depth, dtype)
    plain = multiway_linear(p["x"], p["weight"], p["bias"], partition.offsets, residual=p["residual"])
    actual = packed_linear(p["x"], pack_weight(p["weight"]), p["bias"], partition.offsets, residual=p["residual"])
    assert torch.equal(actual, plain)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("depth", [4, 68, 5000])
@pytest.mark.parametrize("plain", [False, True], ids=["compiled", "plain"])
def test_int8(dtype: torch.dtype, depth: int, plain: bool) -> None:
    """Against the same whole steps multiplied in float64, and within what rounding to steps can do at most."""
    p = parameters(PARTITION, 128, depth, dtype)
    p["x"][3] = 0
    weight, scales = quantize_weight(p["weight"])
    assert weight.dtype == torch.int8
    assert torch.equal(scales[:, 1], unpack_weight(weight).double().sum(2).float())
    run = _plain_linear if plain else torch.ops.beit3_fast.packed_linear
    arguments = (p["x"], weight, scales, p["bias"], PARTITION.offsets, False, p["residual"])
    actual = run(*arguments)[: PARTITION.used].double()

    steps, step = quantized_rows(p["x"])
    ids = PARTITION.expert_of_row()[: PARTITION.used]
    x, w, rest = p["x"].double(), p["weight"].double(), p["bias"].double()[ids] + p["residual"].double()[: len(ids)]
    exact = torch.einsum("ri,roi->ro", x[: len(ids)], w[ids]) + rest
    # of each factor at most half a step is lost
    row, column = step[: len(ids)] / 2, scales[:, 0].double()[ids] / 2
    lost = column * x[: len(ids)].abs().sum(1, keepdim=True) + row * w.abs().sum(2)[ids] + depth * row * column
    rounding = 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert ((actual - exact).abs() <= lost + rounding).all()
    if not plain:  # the plain op rounds the weights to steps, but not the rows
        in_steps = torch.einsum("ri,roi->ro", steps[: len(ids)], unpack_weight(weight).double()[ids])
        truth = in_steps * step[: len(ids)] * scales[:, 0].double()[ids] + rest
        # a quotient at a half may round either way
        one_step = step[: len(ids)] * scales[:, 0].double()[ids] * 127
        assert ((actual - truth).abs() <= 2 * one_step + rounding).all()
        assert ((actual - truth).abs().median() <= rounding).all()


def test_int8_of_rows_that_are_not_finite() -> None:
    """They become NaN, the others stay as they are."""
    p = parameters(PARTITION, 64, 20, torch.float32)
    weight, scales = quantize_weight(p["weight"])
    clean = packed_linear(p["x"], weight, None, PARTITION.offsets, scales=scales)
    p["x"][1, 3], p["x"][20, 19] = float("nan"), float("-inf")
    actual = packed_linear(p["x"], weight, None, PARTITION.offsets, scales=scales)
    bad = torch.zeros(PARTITION.num_rows, dtype=torch.bool)
    bad[[1, 20]] = True
    assert actual[bad].isnan().all()
    assert torch.equal(actual[~bad], clean[~bad])


@pytest.mark.parametrize("int8", [False, True], ids=["own dtype", "int8"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("normalize", [False, True], ids=["no LayerNorm", "LayerNorm"])
def test_a_feed_forward_block(dtype: torch.dtype, int8: bool, normalize: bool) -> None:
    """More rows than one block takes with any number of threads here, experts ending within blocks."""
    partition = Partition((701, 0, 440), padding=3)
    width, hidden, experts = 64, 128, partition.num_experts
    x, residual = (normal(partition.num_rows, width, dtype=dtype) for _ in range(2))
    fc1, fc2 = normal(experts, hidden, width, dtype=dtype, scale=0.2), normal(experts, width, hidden, dtype=dtype)
    bias1, bias2 = normal(experts, hidden, dtype=dtype), normal(experts, width, dtype=dtype)
    norm = (affine(experts, hidden, dtype=dtype), normal(experts, hidden, dtype=dtype)) if normalize else (None, None)
    offsets = partition.offsets

    def reference(kind: torch.dtype) -> Tensor:
        tensors = [x, fc1, bias1, *norm, fc2, bias2]
        cast = [None if t is None else t.to(kind) for t in tensors]
        return multiway_ffn_reference(*cast, offsets, residual=residual.to(kind))[: partition.used]

    if not int8:
        actual = packed_ffn(x, pack_weight(fc1), bias1, *norm, pack_weight(fc2), bias2, offsets, residual=residual)
        assert_parity(actual[: partition.used], reference(dtype), reference(torch.float64), dtype, "out")
        return
    (weight1, scales1), (weight2, scales2) = quantize_weight(fc1), quantize_weight(fc2)
    actual = packed_ffn(
        x, weight1, bias1, *norm, weight2, bias2, offsets, fc1_scales=scales1, fc2_scales=scales2, residual=residual
    )[: partition.used].double()
    truth = reference(torch.float64)
    assert ((actual - truth).square().mean() / truth.square().mean()).sqrt() < 0.02
    plain = _plain_ffn(x, weight1, scales1, bias1, *norm, weight2, scales2, bias2, offsets, residual, 1e-5)
    assert ((actual - plain[: partition.used]).square().mean() / truth.square().mean()).sqrt() < 0.02


@pytest.mark.parametrize("form", MEMORY_FORMS)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_rows_in_any_memory(form: str, dtype: torch.dtype) -> None:
    p = parameters(PARTITION, 64, 18, dtype)
    packed = pack_weight(p["weight"])
    expected = packed_linear(p["x"], packed, p["bias"], PARTITION.offsets, residual=p["residual"])
    x, residual = in_memory(p["x"], form), in_memory(p["residual"], form)
    assert torch.equal(packed_linear(x, packed, p["bias"], PARTITION.offsets, residual=residual), expected)


def test_padding_rows_are_the_residual() -> None:
    p = parameters(PARTITION, 64, 18, torch.float32)
    p["x"][PARTITION.used :] = float("nan")
    packed = pack_weight(p["weight"])
    assert (packed_linear(p["x"], packed, None, PARTITION.offsets)[PARTITION.used :] == 0).all()
    summed = packed_linear(p["x"], packed, p["bias"], PARTITION.offsets, residual=p["residual"])
    assert torch.equal(summed[PARTITION.used :], p["residual"][PARTITION.used :])


def test_a_residual_in_fp32_keeps_the_sum_there() -> None:
    p = parameters(PARTITION, 64, 18, torch.bfloat16)
    residual = p["residual"].float()
    actual = packed_linear(p["x"], pack_weight(p["weight"]), p["bias"], PARTITION.offsets, residual=residual)
    expected = multiway_linear(p["x"], p["weight"], p["bias"], PARTITION.offsets, residual=residual)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("int8", [False, True], ids=["own dtype", "int8"])
def test_registration_and_compilation(int8: bool) -> None:
    p = parameters(PARTITION, 64, 16, torch.float32)
    weight, scales = quantize_weight(p["weight"]) if int8 else (pack_weight(p["weight"]), None)
    back = normal(PARTITION.num_experts, 64, 64, dtype=torch.float32)
    weight2, scales2 = quantize_weight(back) if int8 else (pack_weight(back), None)
    norm = (affine(PARTITION.num_experts, 64, dtype=torch.float32), p["bias"])
    linear = (p["x"], weight, scales, p["bias"], PARTITION.offsets, True, p["residual"])
    block = (p["x"], weight, scales, p["bias"], *norm, weight2, scales2, p["bias"], PARTITION.offsets, None, 1e-5)
    checks = ("test_schema", "test_faketensor")
    opcheck(torch.ops.beit3_fast.packed_linear.default, linear, test_utils=checks)
    opcheck(torch.ops.beit3_fast.packed_ffn.default, block, test_utils=checks)

    def call(x: Tensor) -> Tensor:
        return packed_linear(x, weight, p["bias"], PARTITION.offsets, scales=scales, activation="gelu")

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(p["x"]), call(p["x"]))


def test_the_number_of_threads_changes_nothing() -> None:
    p = parameters(Partition((500, 130)), 192, 68, torch.float32)
    offsets = Partition((500, 130)).offsets
    weight, scales = quantize_weight(p["weight"])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            plain = packed_linear(p["x"], pack_weight(p["weight"]), p["bias"], offsets)
            results.append((plain, packed_linear(p["x"], weight, p["bias"], offsets, scales=scales)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(first, again) for first, again in zip(results[0], other, strict=True))


def test_gelu_is_the_exact_one() -> None:
    x = torch.linspace(-9, 9, 640).view(10, 64)
    identity = pack_weight(torch.eye(64)[None])
    offsets = torch.tensor([0, 10], dtype=torch.int32)
    actual = packed_linear(x, identity, None, offsets, activation="gelu")
    torch.testing.assert_close(actual, F.gelu(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"x": torch.zeros(4, 18, 1)}, "x"),
        ({"x": torch.zeros(4, 18).bfloat16()}, "weight"),
        ({"x": torch.zeros(4, 20)}, "weight"),
        ({"x": torch.zeros(4, 18).double()}, "weight"),
        ({"weight": torch.zeros(2, 64, 18)}, "weight"),
        ({"bias": torch.zeros(2, 63)}, "bias"),
        ({"expert_offsets": torch.tensor([0, 4], dtype=torch.int32)}, "expert_offsets"),
        ({"residual": torch.zeros(4, 63)}, "residual"),
        ({"activation": "relu"}, "activation"),
        ({"scales": torch.zeros(2, 2, 64)}, "weight"),
    ],
)
def test_bad_arguments(bad: dict[str, Any], name: str) -> None:
    good = {
        "x": torch.zeros(4, 18),
        "weight": pack_weight(torch.zeros(2, 64, 18)),
        "bias": torch.zeros(2, 64),
        "expert_offsets": torch.tensor([0, 2, 4], dtype=torch.int32),
    }
    assert_refuses(packed_linear, good, bad, ValueError, name)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(2, 63, 18),
        torch.zeros(64, 18),
        torch.zeros(2, 64, 18).double(),
        torch.zeros(2, 64, 17).bfloat16(),
        torch.zeros(2, 64, 0),
        torch.zeros(2, 64, 18, device="meta"),
    ],
    ids=["width", "dimensions", "dtype", "odd pairs", "no inputs", "device"],
)
def test_weights_that_cannot_be_packed(weight: Tensor) -> None:
    with refuses(ValueError, "weight"):
        pack_weight(weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_cannot_be_quantized(value: float) -> None:
    weight = torch.zeros(1, 64, 8)
    weight[0, 5, 3] = value
    with refuses(ValueError, "weight"):
        quantize_weight(weight)
