"""Every op on a real GPU: its values, forward and backward, and how it is launched. Skipped where there is none.

Everywhere else the same kernels run in a simulator or an interpreter, which reach neither the driver nor the host code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.parity import Evaluation, affine, assert_exact, assert_parity, by_name, evaluate, in_double, normal, refuses
from torch import Tensor

from beit3_fast import ops
from beit3_fast.layout import TokenLayout

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DEVICE = "cuda"
CPU = "cpu"

VISION, TEXT = [40, 33, 17], [5, 0, 12]
ROWS = sum(VISION) + sum(TEXT)
WIDTH, HIDDEN, HEADS = 128, 256, 2


def layout(device: str) -> TokenLayout:
    return TokenLayout.from_lengths(VISION, TEXT, device=device)


def layer_norm(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    return lambda x, weight, bias, residual: op(x, weight, bias, layout(device).expert_offsets, residual=residual)


def multiway_linear(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    offsets = layout(device).expert_offsets
    return lambda x, weight, bias, residual: op(x, weight, bias, offsets, activation="gelu", residual=residual)


def multiway_ffn(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    return lambda residual, **inputs: op(*inputs.values(), layout(device).expert_offsets, residual=residual)


def attention(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    return lambda qkv: op(qkv, layout(device), HEADS, mask="captioning")


def inputs_of(name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    rows, narrow = normal(ROWS, WIDTH, dtype=dtype), normal(2, WIDTH, dtype=dtype)
    if name == "layer_norm":
        return {"x": rows, "weight": affine(2, WIDTH, dtype=dtype), "bias": narrow, "residual": rows.flip(0)}
    if name == "multiway_linear":
        weight = normal(2, WIDTH, WIDTH, dtype=dtype, scale=WIDTH**-0.5)
        return {"x": rows, "weight": weight, "bias": narrow, "residual": rows.flip(0)}
    if name == "attention":
        return {"qkv": normal(ROWS, 3, HEADS, WIDTH // HEADS, dtype=dtype)}
    return {
        "x": rows,
        "fc1_weight": normal(2, HIDDEN, WIDTH, dtype=dtype, scale=WIDTH**-0.5),
        "fc1_bias": normal(2, HIDDEN, dtype=dtype),
        "norm_weight": affine(2, HIDDEN, dtype=dtype),
        "norm_bias": normal(2, HIDDEN, dtype=dtype),
        "fc2_weight": normal(2, WIDTH, HIDDEN, dtype=dtype, scale=HIDDEN**-0.5),
        "fc2_bias": narrow,
        "residual": rows.flip(0),
    }


def on(device: str, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    return {name: value.to(device) for name, value in inputs.items()}


def back(evaluation: Evaluation) -> Evaluation:
    """What was computed, on the CPU."""
    return Evaluation(
        tuple(output.cpu() for output in evaluation.outputs),
        {name: None if value is None else value.cpu() for name, value in evaluation.gradients.items()},
        tuple(cotangent.cpu() for cotangent in evaluation.cotangents),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("call", [layer_norm, multiway_linear, multiway_ffn, attention])
def test_forward_and_backward(call: Callable[..., Any], dtype: torch.dtype) -> None:
    name = call.__name__
    op, reference = getattr(ops, name), getattr(ops, f"{name}_reference")
    inputs = inputs_of(name, dtype)
    truth = evaluate(call(reference, CPU), in_double(inputs))
    cotangents = [cotangent.to(DEVICE) for cotangent in truth.cotangents]
    actual, plain = (back(evaluate(call(each, DEVICE), on(DEVICE, inputs), cotangents)) for each in (op, reference))
    for what, (ours, theirs, exact) in by_name(actual, plain, truth):
        if dtype == torch.float64:
            assert_exact(ours, exact, what)
        else:
            assert_parity(ours, theirs, exact, dtype, what)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decode_attention(dtype: torch.dtype) -> None:
    beams, columns, length, head = 3 * 2, 8, 5, WIDTH // HEADS
    qkv, prefix = normal(beams * 2, 3, HEADS, head, dtype=dtype), normal(ROWS, 2, HEADS, head, dtype=dtype)
    words = normal(columns, beams, 2, HEADS, head, dtype=dtype)
    history = torch.randint(beams, (columns, beams), dtype=torch.int32)

    def call(op: Callable[..., Tensor], device: str, dtype: torch.dtype) -> Tensor:
        places = words.to(device, dtype), history.to(device)
        return op(qkv.to(device, dtype), prefix.to(device, dtype), layout(device), *places, length).cpu()

    truth = call(ops.decode_attention_reference, CPU, torch.float64)
    plain = call(ops.decode_attention_reference, DEVICE, dtype)
    assert_parity(call(ops.decode_attention, DEVICE, dtype), plain, truth, dtype)


def test_route_tokens() -> None:
    ids = torch.randint(4, (5000,), dtype=torch.int32)
    for actual, expected in zip(ops.route_tokens(ids.to(DEVICE), 4), ops.route_tokens_reference(ids, 4), strict=True):
        assert torch.equal(actual.cpu(), expected)


# --- the compiled layer norm's host code ------------------------------------------------------------------------------


@pytest.fixture
def compiled() -> None:
    served = [line for line in torch._C._dispatch_dump("beit3_fast::layer_norm").splitlines() if "CUDA:" in line]
    if not any("csrc/register_cuda.cpp" in line for line in served):
        pytest.skip("the CUDA library is not loaded")


def norm_arguments(
    rows: int, width: int, dtype: torch.dtype = torch.bfloat16, device: str = DEVICE
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias, expert_offsets"""
    offsets = torch.tensor([0, rows // 3, rows], dtype=torch.int32, device=device)
    parameters = affine(2, width, dtype=torch.float32), normal(2, width, dtype=torch.float32)
    return (torch.randn(rows, width, device=device, dtype=dtype), *(p.to(device) for p in parameters), offsets)


def norm(op: Callable[..., Any], offsets: Tensor) -> Callable[..., Any]:
    return lambda x, weight, bias: op(x, weight, bias, offsets)


@pytest.mark.parametrize("rows", [0, 1, 1000])
@pytest.mark.parametrize("width", [1, 7, 768, 1000, 1024, 1408, 3072, 6144, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("compiled")
def test_layer_norm_of_every_width(dtype: torch.dtype, width: int, rows: int) -> None:
    x, weight, bias, offsets = norm_arguments(rows, width, dtype)
    inputs = {"x": x, "weight": weight, "bias": bias}
    truth = evaluate(norm(ops.layer_norm_reference, offsets.cpu()), in_double(on(CPU, inputs)))
    cotangents = [cotangent.to(DEVICE) for cotangent in truth.cotangents]
    actual, plain = (
        back(evaluate(norm(op, offsets), inputs, cotangents)) for op in (ops.layer_norm, ops.layer_norm_reference)
    )
    for what, (ours, theirs, exact) in by_name(actual, plain, truth):
        if width > 1 or what not in ("gradient of x", "gradient of weight"):  # which are zero
            assert_parity(ours, theirs, exact, dtype, what)


@pytest.mark.usefixtures("compiled")
def test_the_same_bits_every_time() -> None:
    x, weight, bias, offsets = norm_arguments(5000, 768)
    inputs = {"x": x, "weight": weight, "bias": bias}
    runs = [evaluate(norm(ops.layer_norm, offsets), inputs, [x.flip(0)]) for _ in range(3)]
    for _, (first, *others) in by_name(*runs):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.usefixtures("compiled")
def test_cuda_graph() -> None:
    """Nothing is allocated outside the pool or waited for; a replay reads what the inputs hold then."""
    x, weight, bias, offsets = norm_arguments(700, 1024)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def step() -> tuple[Tensor, ...]:
        y = ops.layer_norm(x, weight, bias, offsets)
        return y, *torch.autograd.grad(y, leaves, torch.ones_like(y))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
        offsets.copy_(torch.tensor([0, 600, 650], dtype=torch.int32))
    graph.replay()
    for got, wanted in zip(captured, step(), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("compiled")
def test_the_current_stream_is_used() -> None:
    x, weight, bias, offsets = norm_arguments(4000, 768)
    expected = ops.layer_norm(x * 2, weight, bias, offsets)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # cycles
        x.mul_(2)
        actual = ops.layer_norm(x, weight, bias, offsets)
    stream.synchronize()
    assert torch.equal(actual, expected)


@pytest.mark.usefixtures("compiled")
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
def test_a_device_that_is_not_the_current_one() -> None:
    here = norm_arguments(50, 768)
    there = [tensor.to("cuda:1") for tensor in here]
    with torch.cuda.device(0):
        actual = ops.layer_norm(*there)
        assert torch.cuda.current_device() == 0
    assert actual.device == torch.device("cuda:1")
    assert torch.equal(actual.cpu(), ops.layer_norm(*here).cpu())
    with refuses(RuntimeError, "weight"):
        torch.ops.beit3_fast.layer_norm(here[0], None, there[1], here[2], here[3], 1e-5)


@pytest.mark.usefixtures("compiled")
def test_more_than_2_to_the_31_elements() -> None:
    rows, width = 2**21 + 3, 1024
    if torch.cuda.mem_get_info()[0] < 5 * 2 * rows * width:
        pytest.skip("the GPU has too little memory")
    x, weight, bias, _ = norm_arguments(1, width)
    x = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16)
    offsets = torch.tensor([0, rows - 2, rows], dtype=torch.int32, device=DEVICE)
    tail = offsets.new_tensor([0, 8, 10])
    assert torch.equal(ops.layer_norm(x, weight, bias, offsets)[-10:], ops.layer_norm(x[-10:], weight, bias, tail))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    ("position", "name", "bad"),
    [
        (2, "weight", lambda good: good.cpu()),
        (3, "bias", lambda good: good.cpu()),
        (4, "expert_offsets", lambda good: good.cpu()),
        (4, "expert_offsets", lambda good: good.long()),
        (4, "expert_offsets", lambda good: good[:-1]),
        (2, "weight", lambda good: good[:, :-1]),
        (3, "bias", lambda good: good[:1]),
        (1, "residual", lambda good: torch.zeros(9, 40)),
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
    torch.cuda.synchronize()


@pytest.mark.parametrize("name", ["weight", "bias", "expert_offsets"])
def test_an_argument_on_the_cpu_is_named(name: str) -> None:
    arguments = dict(zip(("x", "weight", "bias", "expert_offsets"), norm_arguments(9, 40), strict=True))
    with refuses(ValueError, name):
        ops.layer_norm(**(arguments | {name: arguments[name].cpu()}))
