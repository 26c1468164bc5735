"""The compiled layer norm's host code: every width, other offsets in a graph, sizes beyond 32 bits, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.parity import assert_parity, by_name, evaluate, in_double, refuses
from torch import Tensor

from beit3_fast import ops

from .machine import DEVICE, REAL, Captured, needs_gpu, normal


def norm_arguments(rows: int, width: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, expert_offsets"""
    offsets = torch.tensor([0, rows // 3, rows], dtype=torch.int32, device=DEVICE)
    weight, bias = 1 + normal(2, width, dtype=torch.float32, scale=0.5), normal(2, width, dtype=torch.float32)
    return normal(rows, width, dtype=dtype), weight, bias, offsets


def norm(op: Callable[..., Any], offsets: Tensor) -> Callable[..., Any]:
    return lambda x, weight, bias: op(x, weight, bias, offsets)


@pytest.mark.parametrize("rows", [0, 1, 1000 if REAL else 10])
@pytest.mark.parametrize("width", [1, 7, 768, 1000, 1024, 1408, 3072, 6144, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_width(dtype: torch.dtype, width: int, rows: int) -> None:
    x, weight, bias, offsets = norm_arguments(rows, width, dtype)
    inputs, cotangents = {"x": x, "weight": weight, "bias": bias}, [normal(rows, width, dtype=dtype)]
    truth = evaluate(norm(ops.layer_norm_reference, offsets), in_double(inputs), cotangents)
    actual, plain = (
        evaluate(norm(op, offsets), inputs, cotangents) for op in (ops.layer_norm, ops.layer_norm_reference)
    )
    for what, (ours, theirs, exact) in by_name(actual, plain, truth):
        if width > 1 or what not in ("gradient of x", "gradient of weight"):  # which are zero
            assert_parity(ours, theirs, exact, dtype, what)


def test_other_offsets_in_a_graph() -> None:
    """A replay reads where the experts' rows are; those behind the last of them are nobody's."""
    x, weight, bias, offsets = norm_arguments(700, 1024)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad():
            y = ops.layer_norm(x, weight, bias, offsets)
            return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    captured = Captured(step)
    with torch.no_grad():
        x.normal_()
        offsets.copy_(torch.tensor([0, 600, 650], dtype=torch.int32))
    captured.replay()
    for got, wanted in zip(captured.outputs, step(), strict=True):
        assert torch.equal(got, wanted)


@needs_gpu
def test_more_than_2_to_the_31_elements() -> None:
    rows, width = 2**21 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * width:
        pytest.skip("the GPU has too little memory")
    x, weight, bias, _ = norm_arguments(1, width)
    x = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)
    offsets = torch.tensor([0, rows - 2, rows], dtype=torch.int32, device=DEVICE)
    tail = offsets.new_tensor([0, 8, 10])
    assert torch.equal(ops.layer_norm(x, weight, bias, offsets)[-10:], ops.layer_norm(x[-10:], weight, bias, tail))


@pytest.mark.parametrize(
    ("position", "name", "bad"),
    [
        pytest.param(2, "weight", lambda good: good.cpu(), marks=needs_gpu),
        pytest.param(3, "bias", lambda good: good.cpu(), marks=needs_gpu),
        pytest.param(4, "expert_offsets", lambda good: good.cpu(), marks=needs_gpu),
        (4, "expert_offsets", lambda good: good.long()),
        (4, "expert_offsets", lambda good: good[:-1]),
        (2, "weight", lambda good: good[:, :-1]),
        (3, "bias", lambda good: good[:1]),
        pytest.param(1, "residual", lambda good: torch.zeros(9, 40), marks=needs_gpu),
        (1, "residual", lambda good: torch.zeros(8, 40, device=DEVICE)),
        (0, "x", lambda good: good.int()),
        (0, "x", lambda good: good[0]),
    ],
)
def test_what_the_compiled_op_refuses(position: int, name: str, bad: Callable[[Tensor], Tensor]) -> None:
    """Past the checks in Python: the message names the argument, and nothing is launched."""
    x, weight, bias, offsets = norm_arguments(9, 40)
    arguments: list[Any] = [x, None, weight, bias, offsets, 1e-5]
    arguments[position] = bad(arguments[position])
    with refuses(RuntimeError, name):
        torch.ops.beit3_fast.layer_norm(*arguments)
    if REAL:
        torch.cuda.synchronize()


@needs_gpu
@pytest.mark.parametrize("name", ["weight", "bias", "expert_offsets"])
def test_an_argument_on_the_cpu_is_named(name: str) -> None:
    arguments = dict(zip(("x", "weight", "bias", "expert_offsets"), norm_arguments(9, 40), strict=True))
    with refuses(ValueError, name):
        ops.layer_norm(**(arguments | {name: arguments[name].cpu()}))
