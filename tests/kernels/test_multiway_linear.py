"""The Triton multiway linear layer, forward and backward, against float64 and plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beit3_fast.kernels import multiway_linear as kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.parity import (
    Partition,
    RecordedOps,
    assert_parity,
    by_name,
    evaluate,
    in_double,
    in_memory,
    partitions,
    permutation,
    refuses,
)
from ops.test_multiway_linear import make_inputs, op, plain
from torch.library import opcheck

from beit3_fast.ops import multiway_linear

from .conftest import DTYPES, EXAMPLES
from .guards import GuardedAllocations

# rows that end inside, at and beyond a row tile; experts without rows; padding; widths off and on every vector size
SHAPES = [
    (Partition((70, 33)), 64, 128),
    (Partition((5, 0, 130), padding=9), 40, 72),
    (Partition((0, 17)), 33, 50),
    (Partition((1,)), 1, 40),
]


def check(
    launches: Any,
    partition: Partition,
    inputs: dict[str, Any],
    activation: Any,
    row_index: Any,
    units: int | None = None,
) -> None:
    """The op under the Triton backend is as near to float64 as plain PyTorch, outputs and gradients.

    `units` in the last place of the largest magnitude are allowed besides, one by default.
    """
    with launches() as log, RecordedOps() as recorded:
        actual = evaluate(op(partition, activation, row_index), inputs)
    assert {name for name, _ in recorded.calls} == {"multiway_linear", "multiway_linear_backward"}
    assert not log or {"_linear_kernel", "_weight_gradient_kernel"} <= {name for name, _ in log}
    yardstick = evaluate(plain(partition, activation, row_index), inputs, actual.cotangents)
    truth = evaluate(plain(partition, activation, row_index), in_double(inputs), actual.cotangents)
    for name, (value, expected, exact) in by_name(actual, yardstick, truth):
        floor = units and units * torch.finfo(inputs["x"].dtype).eps * exact.abs().max().item()
        assert_parity(value, expected, exact, inputs["x"].dtype, name, floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("partition", "width", "out_width"), SHAPES, ids=str)
@pytest.mark.parametrize("everything", [False, True])
def test_parity(
    launches: Any, partition: Partition, width: int, out_width: int, dtype: torch.dtype, everything: bool
) -> None:
    inputs = make_inputs(
        partition, width, out_width, dtype, bias=everything, residual_dtype=torch.float32 if everything else None
    )
    row_index = permutation(partition, torch.int32 if everything else None)
    check(launches, partition, inputs, "gelu" if everything else None, row_index)


@settings(max_examples=EXAMPLES)
@given(
    partition=partitions(max_count=70).filter(lambda p: p.used > 0),
    width=st.integers(8, 90),
    out_width=st.integers(8, 150),
    dtype=st.sampled_from(DTYPES),
    residual_dtype=st.sampled_from([None, *DTYPES]),
    activation=st.sampled_from([None, "gelu"]),
    index_dtype=st.sampled_from([None, torch.int32, torch.int64]),
    form=st.sampled_from(["contiguous", "every second row", "columns of a wider buffer", "offset"]),
)
def test_parity_over_shapes(
    launches: Any,
    partition: Partition,
    width: int,
    out_width: int,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    activation: str | None,
    index_dtype: torch.dtype | None,
    form: str,
) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(partition, width, out_width, dtype, residual_dtype=residual_dtype)
    inputs["x"] = in_memory(inputs["x"], form)
    # a bias of eight elements: which of two ways has the larger error is luck
    check(launches, partition, inputs, activation, permutation(partition, index_dtype), units=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written_and_no_other(launches: Any, dtype: torch.dtype) -> None:
    """All outputs start as NaN between guard bands; padding rows are NaN on the way in and zeros on the way out."""
    partition = Partition((37, 0, 21), padding=5)
    inputs = make_inputs(partition, 24, 40, dtype)
    inputs["x"][partition.used :] = float("nan")
    dy = torch.randn(partition.num_rows, 40).to(dtype)
    dy[partition.used :] = float("nan")
    with launches(), GuardedAllocations() as allocations:
        out, pre = kernels.forward(
            inputs["x"], inputs["weight"], inputs["bias"], partition.offsets, gelu=True, save=True
        )
        grads = kernels.backward(dy, inputs["x"], inputs["weight"], partition.offsets, pre)
    allocations.check()
    for tensor in (out, pre[: partition.used], *grads):
        assert tensor.isfinite().all()
    assert not out[partition.used :].count_nonzero()
    assert not grads[0][partition.used :].count_nonzero()
    assert not grads[1][1].count_nonzero()
    assert not grads[2][1].count_nonzero()


def test_gradients_are_bitwise_reproducible(launches: Any) -> None:
    partition = Partition((60, 50))
    inputs = make_inputs(partition, 48, 40, torch.float32)
    cotangents = [torch.randn(110, 40)]
    results = []
    for seed in (1, 2):
        with launches(check_races=False, schedule_seed=seed):
            results.append(evaluate(op(partition, "gelu"), inputs, cotangents))
    for name, (first, second) in by_name(*results):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("target", [80, pytest.param(90, marks=pytest.mark.simulated_only)])
def test_tf32(launches: Any, target: int) -> None:
    """fp32 products follow torch.set_float32_matmul_precision; tf32 keeps 10 bits of the operands."""
    partition = Partition((70, 40))
    inputs = make_inputs(partition, 96, 64, torch.float32)
    truth = evaluate(plain(partition, "gelu"), in_double(inputs))
    before = torch.get_float32_matmul_precision()
    try:
        errors = {}
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            with launches(target=target):
                actual = evaluate(op(partition, "gelu"), inputs, truth.cotangents)
            errors[precision] = [
                ((value.double() - exact).abs().max() / exact.abs().max()).item()
                for _, (value, exact) in by_name(actual, truth)
            ]
    finally:
        torch.set_float32_matmul_precision(before)
    assert max(errors["highest"]) < 2e-6
    assert max(errors["high"]) < 4e-3


@pytest.mark.simulated_only
@pytest.mark.parametrize("rows", [None, 13440], ids=["its own tiles", "tiles of batch 64"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_sm_90_code(launches: Any, dtype: torch.dtype, rows: int | None) -> None:
    """With the tiles that suit this size, and with those of batch 64, whose outputs are written in two halves."""
    partition = Partition((150, 66), padding=3)
    inputs = make_inputs(partition, 64, 128, dtype, residual_dtype=torch.float32)
    sizes = (partition.num_rows, 2, 64, 128) if rows is None else (rows, 2, 768, 2304)
    arch = kernels.default_configs(90, dtype, *sizes)
    assert rows is None or arch["forward"].parts == arch["dx"].parts == 2
    row_index = permutation(partition, torch.int32)
    truth = evaluate(plain(partition, "gelu", row_index), in_double(inputs))
    yardstick = evaluate(plain(partition, "gelu", row_index), inputs, truth.cotangents)
    values = {name: value.detach() for name, value in inputs.items()}
    with launches(target=90) as log:
        out, pre = kernels.forward(
            values["x"], values["weight"], values["bias"], partition.offsets, True, values["residual"], row_index,
            True, configs=arch,
        )  # fmt: skip
        grads = kernels.backward(
            truth.cotangents[0].to(dtype), values["x"], values["weight"], partition.offsets, pre, row_index,
            configs=arch,
        )  # fmt: skip
    assert any("wgmma" in form for _, stats in log for form in stats.mma)
    results = dict(
        zip(("output 0", "gradient of x", "gradient of weight", "gradient of bias"), (out, *grads), strict=True)
    )
    for name, value in results.items():
        assert_parity(value, yardstick[name].to(value.dtype), truth[name], dtype, name)


def test_zero_rows(launches: Any) -> None:
    partition = Partition((0, 0))
    with launches():
        actual = evaluate(op(partition, "gelu"), make_inputs(partition, 6, 11, torch.float32))
    assert actual["output 0"].shape == (0, 11)
    for name in ("weight", "bias"):
        assert not actual[f"gradient of {name}"].count_nonzero()


@pytest.mark.parametrize("name", ["x", "weight", "bias", "residual"])
def test_refuses_what_it_cannot_read(launches: Any, name: str) -> None:
    partition = Partition((4, 3))
    inputs = make_inputs(partition, 6, 11, torch.float32, residual_dtype=torch.float32)
    value = inputs[name]
    inputs[name] = value.transpose(-1, -2).contiguous().transpose(-1, -2)
    with launches() as log, refuses(ValueError, name):
        multiway_linear(inputs["x"], inputs["weight"], inputs["bias"], partition.offsets, residual=inputs["residual"])
    assert not log


def test_any_gradient_is_taken(launches: Any) -> None:
    """Autograd hands over expanded and transposed gradients."""
    partition = Partition((40, 30))
    inputs = make_inputs(partition, 24, 40, torch.float32)
    for cotangent in (torch.ones(1, 1).expand(70, 40), torch.randn(40, 70).t()):
        truth = evaluate(plain(partition), in_double(inputs), [cotangent])
        yardstick = evaluate(plain(partition), inputs, [cotangent])
        with launches():
            actual = evaluate(op(partition), inputs, [cotangent])
        for name, (value, expected, exact) in by_name(actual, yardstick, truth):
            assert_parity(value, expected, exact, torch.float32, name)


@pytest.mark.parametrize("config_index", range(6))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_configs(launches: Any, dtype: torch.dtype, config_index: int) -> None:
    """A spread over the valid configs, tiles wider and narrower than the data."""
    partition = Partition((75, 40))
    width, out_width = 72, 264
    inputs = make_inputs(partition, width, out_width, dtype)
    valid = kernels.valid_configs(80, dtype, width, out_width)
    configs = {role: options[config_index * (len(options) - 1) // 5] for role, options in valid.items()}
    truth = evaluate(plain(partition), in_double(inputs))
    yardstick = evaluate(plain(partition), inputs, truth.cotangents)
    with launches():
        out, _ = kernels.forward(inputs["x"], inputs["weight"], inputs["bias"], partition.offsets, configs=configs)
        grads = kernels.backward(
            truth.cotangents[0].to(dtype), inputs["x"], inputs["weight"], partition.offsets, configs=configs
        )
    for name, value in zip(
        ("output 0", *(f"gradient of {n}" for n in ("x", "weight", "bias"))), (out, *grads), strict=True
    ):
        assert_parity(value, yardstick[name], truth[name], dtype, f"{name} {configs}")


def test_opcheck(launches: Any) -> None:
    partition = Partition((9, 4))
    inputs = make_inputs(partition, 16, 24, torch.float32, residual_dtype=torch.float32)
    for value in inputs.values():
        value.requires_grad_()
    x, weight, bias, residual = inputs.values()
    with launches(check_races=False):
        opcheck(
            torch.ops.beit3_fast.multiway_linear,
            (x, weight, bias, partition.offsets, True, residual, permutation(partition, torch.int32), True, None),
        )


def test_compiles_without_graph_breaks(launches: Any) -> None:
    partition = Partition((20, 9))
    inputs = make_inputs(partition, 16, 24, torch.float32)

    def loss(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return multiway_linear(x, weight, bias, partition.offsets, activation="gelu").square().sum()

    leaves = [inputs[name].requires_grad_() for name in ("x", "weight", "bias")]
    with launches(check_races=False):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(compiled(*leaves), leaves)
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted)


@pytest.mark.simulated_only
@pytest.mark.parametrize(
    ("offsets", "index", "message"),
    [([0, 15, 10], 0, "expert_offsets"), ([0, 10, 25], 0, "expert_offsets"), ([0, 10, 20], 77, "row_index")],
)
def test_debug_mode_checks_on_the_device(launches: Any, offsets: list[int], index: int, message: str) -> None:
    """TRITON_DEBUG=1 compiles checks in; without it the device's offsets and indices are trusted."""
    import triton

    x, weight = torch.randn(20, 32), torch.randn(2, 32, 32)
    row_index = torch.full((20,), index, dtype=torch.int32)
    with triton.knobs.runtime.scope(), launches(check_races=False):
        triton.knobs.runtime.debug = True
        with pytest.raises(Exception, match=f"device assertion failed: {message}"):  # the simulator's own type
            kernels.forward(x, weight, None, torch.tensor(offsets, dtype=torch.int32), row_index=row_index)
