"""The Triton multiway FFN, forward and backward, against float64 and plain PyTorch."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from beit3_fast.kernels import multiway_ffn as kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.parity import (
    Partition,
    RecordedOps,
    assert_parity,
    by_name,
    evaluate,
    in_double,
    partitions,
    permutation,
    saved_elements,
)
from ops.test_multiway_ffn import EPS, PARAMETERS, make_inputs, op, plain
from torch import Tensor
from torch.library import opcheck

from beit3_fast.ops import fold_norm, multiway_ffn, multiway_ffn_reference
from beit3_fast.tuning import Choice

from .conftest import DTYPES, EXAMPLES
from .guards import GuardedAllocations

# rows that end inside and beyond a row tile; experts without rows; padding; widths off and on every vector size
SHAPES = [
    (Partition((70, 33)), 64, 256),
    (Partition((5, 0, 130), padding=9), 40, 72),
    (Partition((0, 17)), 33, 150),
]


def check(
    launches: Any,
    partition: Partition,
    inputs: dict[str, Any],
    row_index: Tensor | None = None,
    units: int | None = None,
    groups: list[Tensor] | None = None,
    **options: Any,
) -> list[Any]:
    """The op under the Triton backend is as near to float64 as plain PyTorch, outputs and gradients.

    `groups` of rows are judged one by one, so that large rows hide no errors of small ones. `units` in the last place
    of the largest magnitude are allowed, one by default. Returns the launches.
    """
    with launches(**options) as log, RecordedOps() as recorded:
        actual = evaluate(op(partition, row_index), inputs)
    assert {name for name, _ in recorded.calls} == {"multiway_ffn", "multiway_ffn_backward"}
    yardstick = evaluate(plain(partition, row_index), inputs, actual.cotangents)
    truth = evaluate(plain(partition, row_index), in_double(inputs), actual.cotangents)
    dtype = inputs["x"].dtype
    for name, (value, expected, exact) in by_name(actual, yardstick, truth):
        of_rows = groups is not None and name.removeprefix("gradient of ") not in PARAMETERS
        for rows in groups if of_rows and groups else [slice(None)]:
            floor = units and units * torch.finfo(dtype).eps * exact[rows].abs().max().item()
            assert_parity(value[rows], expected[rows], exact[rows], dtype, name, floor)
    return log


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("partition", "width", "hidden"), SHAPES, ids=str)
@pytest.mark.parametrize("everything", [False, True])
def test_parity(
    launches: Any, partition: Partition, width: int, hidden: int, dtype: torch.dtype, everything: bool
) -> None:
    inputs = make_inputs(
        partition,
        width,
        hidden,
        dtype,
        norm_dtype=torch.float32 if everything else None,
        residual_dtype=torch.float32 if everything else None,
    )
    check(launches, partition, inputs, permutation(partition, torch.int32 if everything else None))


@settings(max_examples=EXAMPLES)
@given(
    partition=partitions(max_count=70).filter(lambda p: p.used > 0),
    width=st.integers(8, 70),
    hidden=st.integers(16, 150),
    dtype=st.sampled_from(DTYPES),
    subln=st.booleans(),
    residual_dtype=st.sampled_from([None, *DTYPES]),
    index_dtype=st.sampled_from([None, torch.int32, torch.int64]),
)
def test_parity_over_shapes(
    launches: Any,
    partition: Partition,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    subln: bool,
    residual_dtype: torch.dtype | None,
    index_dtype: torch.dtype | None,
) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(
        partition, width, hidden, dtype, norm_dtype=dtype if subln else None, residual_dtype=residual_dtype
    )
    # a bias of eight elements: which of two ways has the larger error is luck
    check(launches, partition, inputs, permutation(partition, index_dtype), units=4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_rows_far_from_zero(launches: Any, dtype: torch.dtype) -> None:
    """Hidden rows with |mean| 30 to 1000 times their deviation: folding the LayerNorm into fc2 must not amplify that.

    Rounding such rows to 16 bits costs most of their digits whoever does it, so only plain PyTorch is the measure.
    """
    partition = Partition((61, 40))
    inputs = make_inputs(partition, 48, 136, dtype, norm_dtype=torch.float32)
    mean = {torch.float32: 1000, torch.float16: 30, torch.bfloat16: 100}[dtype]
    inputs["fc1_bias"] = (inputs["fc1_bias"].double() + mean).to(dtype)
    with launches():
        actual = evaluate(op(partition), inputs)
    yardstick = evaluate(plain(partition), inputs, actual.cotangents)
    truth = evaluate(plain(partition), in_double(inputs), actual.cotangents)
    for name, (value, expected, exact) in by_name(actual, yardstick, truth):
        error, plain_error = (value.double() - exact).abs(), (expected.double() - exact).abs()
        unit = torch.finfo(dtype).eps * exact.abs().max()
        assert error.max() <= 2 * plain_error.max() + unit, name
        assert error.square().mean().sqrt() <= 1.5 * plain_error.square().mean().sqrt() + unit / 2, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_rows_far_from_zero(launches: Any, dtype: torch.dtype) -> None:
    partition = Partition((37, 26))
    far = torch.arange(partition.num_rows) % 5 == 2
    inputs = make_inputs(partition, 64, 128, dtype, norm_dtype=dtype, far=None if dtype == torch.float16 else far)
    check(launches, partition, inputs, groups=[~far, far])


@pytest.mark.simulated_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_sm_90_code(launches: Any, dtype: torch.dtype) -> None:
    partition = Partition((150, 66), padding=3)
    inputs = make_inputs(partition, 64, 256, dtype, norm_dtype=torch.float32, residual_dtype=torch.float32)
    log = check(launches, partition, inputs, permutation(partition, torch.int32), target=90)
    assert any("wgmma" in form for _, stats in log for form in stats.mma)


@pytest.mark.simulated_only
def test_tiles_of_batch_64_on_sm_90(launches: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 accumulators a thread: what fc1 and fc2 compute is written in two halves."""
    configs = kernels.default_configs(90, torch.bfloat16, 13440, 2, 768, 3072)
    assert configs["fc1"].parts == configs["fc2"].parts == 2
    module = import_module("beit3_fast.ops.multiway_ffn")  # the package has a function of this name
    monkeypatch.setattr(module, "choose", lambda *_: Choice(configs, use_triton=True))
    partition = Partition((150, 66), padding=3)
    inputs = make_inputs(partition, 64, 256, torch.bfloat16, norm_dtype=torch.float32, residual_dtype=torch.float32)
    log = check(launches, partition, inputs, permutation(partition, torch.int32), target=90)
    assert any("wgmma" in form for _, stats in log for form in stats.mma)


@pytest.mark.parametrize("target", [80, pytest.param(90, marks=pytest.mark.simulated_only)])
def test_tf32(launches: Any, target: int) -> None:
    partition = Partition((70, 40))
    inputs = make_inputs(partition, 96, 128, torch.float32, norm_dtype=torch.float32)
    truth = evaluate(plain(partition), in_double(inputs))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with launches(target=target):
            actual = evaluate(op(partition), inputs, truth.cotangents)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, (value, exact) in by_name(actual, truth):
        assert ((value.double() - exact).abs().max() / exact.abs().max()) < 4e-3, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("subln", [False, True], ids=["no sub-LN", "sub-LN"])
def test_every_element_is_written_and_no_other(launches: Any, dtype: torch.dtype, subln: bool) -> None:
    """All buffers start as NaN between guard bands; padding rows are NaN on the way in and zeros on the way out."""
    partition = Partition((37, 0, 21), padding=5)
    inputs = make_inputs(partition, 24, 72, dtype, norm_dtype=dtype if subln else None)
    inputs["x"][partition.used :] = float("nan")
    dy = torch.randn(partition.num_rows, 24).to(dtype)
    dy[partition.used :] = float("nan")
    values = [inputs[name] for name in PARAMETERS]
    with launches(), GuardedAllocations() as allocations:
        out, *saved = kernels.forward(inputs["x"], *values, partition.offsets, save=True)
        w1, _, gain, shift, w2, _ = values
        grads = kernels.backward(dy, inputs["x"], w1, gain, shift, w2, partition.offsets, None, *saved)
    allocations.check()
    for tensor in (out, *grads, *(s[: partition.used] for s in saved[:4])):
        assert tensor.isfinite().all()
    assert not out[partition.used :].count_nonzero()
    assert not grads[0][partition.used :].count_nonzero()
    for gradient in grads[1:]:
        assert gradient.numel() == 0 or not gradient[1].count_nonzero()


def test_gradients_are_bitwise_reproducible(launches: Any) -> None:
    partition = Partition((60, 50))
    inputs = make_inputs(partition, 48, 136, torch.float32, norm_dtype=torch.float32)
    cotangents = [torch.randn(110, 48)]
    results = []
    for seed in (1, 2):
        with launches(check_races=False, schedule_seed=seed):
            results.append(evaluate(op(partition), inputs, cotangents))
    for name, (first, second) in by_name(*results):
        assert torch.equal(first, second), name


def test_training_computes_what_inference_does(launches: Any) -> None:
    """Saving for backward changes the output by rounding only, and two launches do once the affine is folded."""
    partition = Partition((40, 30))
    values = make_inputs(partition, 48, 136, torch.float32, norm_dtype=torch.float32)
    x, *parameters = (values[name] for name in ("x", *PARAMETERS))
    folded = fold_norm(*parameters[2:])
    with launches(check_races=False) as log:
        plain_call = multiway_ffn(x, *parameters, partition.offsets)
        before = len(log)
        with_folded = multiway_ffn(x, *parameters, partition.offsets, folded=folded)
        assert not log or (before, len(log) - before) == (3, 2)
        trained = multiway_ffn(x.requires_grad_(), *parameters, partition.offsets)
    torch.testing.assert_close(trained.detach(), plain_call, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(with_folded, plain_call, rtol=1e-6, atol=1e-6)


def test_launches_of_a_training_step(launches: Any) -> None:
    partition = Partition((40, 30))
    inputs = make_inputs(partition, 48, 136, torch.float32, norm_dtype=torch.float32)
    log = check(launches, partition, inputs)
    names = [name for name, _ in log]
    assert not names or names == [
        "_fold_kernel",
        "_fc1_kernel",
        "_fc2_kernel",
        "_row_dots_kernel",
        "_hidden_gradient_kernel",
        "_linear_kernel",
        "_weight_gradient_kernel",
        "_weight_gradient_kernel",
        "_norm_gradient_kernel",
    ]


def test_saved_memory(launches: Any) -> None:
    """Of the hidden width only the pre-activation is kept; of the model's width one row beside x."""
    partition, width, hidden = Partition((40, 30)), 24, 72
    inputs = make_inputs(partition, width, hidden, torch.float32, norm_dtype=torch.float32)
    leaves = {name: value if value is None else value.requires_grad_() for name, value in inputs.items()}
    with launches(check_races=False):
        sizes = saved_elements(lambda: op(partition)(**leaves), [v for v in leaves.values() if v is not None])
    rows = partition.num_rows
    assert sizes == sorted([rows * hidden, rows * width, rows, rows, 2 * 2 * width])


def test_zero_rows(launches: Any) -> None:
    partition = Partition((0, 0))
    with launches():
        actual = evaluate(op(partition), make_inputs(partition, 6, 11, torch.float32, norm_dtype=torch.float32))
    assert actual["output 0"].shape == (0, 6)
    for name in PARAMETERS:
        assert not actual[f"gradient of {name}"].count_nonzero(), name


@pytest.mark.parametrize("forward_backend", ["auto", "triton"])
def test_backward_takes_what_another_backend_saved(launches: Any, forward_backend: str) -> None:
    partition = Partition((20, 13))
    inputs = make_inputs(partition, 24, 40, torch.float32, norm_dtype=torch.float32)
    leaves = {name: value if value is None else value.requires_grad_() for name, value in inputs.items()}
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    dy = torch.randn(33, 24)
    expected = torch.autograd.grad(op(partition)(**leaves), wanted, dy)
    with launches(forward_backend, check_races=False):
        out = op(partition)(**leaves)
    with launches("triton" if forward_backend == "auto" else "auto", check_races=False):
        actual = torch.autograd.grad(out, wanted, dy)
    for value, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=2e-5, atol=2e-5)


def test_opcheck(launches: Any) -> None:
    partition = Partition((9, 4))
    inputs = make_inputs(partition, 16, 24, torch.float32, norm_dtype=torch.float32)
    for value in inputs.values():
        if value is not None:
            value.requires_grad_()
    x, *parameters, _ = inputs.values()
    with launches(check_races=False):
        for index in (None, permutation(partition, torch.int32)):
            opcheck(
                torch.ops.beit3_fast.multiway_ffn,
                (x, *parameters, partition.offsets, None, index, EPS, None, True, None),
            )


def test_compiles_without_graph_breaks(launches: Any) -> None:
    partition = Partition((20, 9))
    inputs = make_inputs(partition, 16, 24, torch.float32, norm_dtype=torch.float32)
    leaves = [inputs[name].requires_grad_() for name in ("x", *PARAMETERS)]

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        return multiway_ffn(x, *parameters, partition.offsets).square().sum()

    with launches(check_races=False):
        expected = torch.autograd.grad(loss(*leaves), leaves)
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        actual = torch.autograd.grad(compiled(*leaves), leaves)
    for value, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, wanted)


def test_training_follows_the_reference(launches: Any) -> None:
    """Ten steps of AdamW on two residual FFN blocks: the same losses as plain PyTorch."""
    partition, width, hidden, steps = Partition((24, 9)), 16, 40, 10
    target = torch.randn(33, width)
    x = torch.randn(33, width)

    def train(function: Any) -> list[float]:
        torch.manual_seed(1)
        blocks = [make_inputs(partition, width, hidden, torch.float32, norm_dtype=torch.float32) for _ in range(2)]
        parameters = [[block[name].requires_grad_() for name in PARAMETERS] for block in blocks]
        optimizer = torch.optim.AdamW([p for block in parameters for p in block], lr=1e-2)
        losses = []
        for _ in range(steps):
            rows = x
            for block in parameters:
                rows = function(rows, *block, partition.offsets, residual=rows)
            loss = F.mse_loss(rows, target)
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return losses

    expected = train(multiway_ffn_reference)
    with launches(check_races=False):
        actual = train(multiway_ffn)
    assert expected[-1] < 0.7 * expected[0]
    assert actual == pytest.approx(expected, rel=1e-4)
