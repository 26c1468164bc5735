"""The ops together, as the layer they make: dispatched against the references, compiled, and under autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from beit3_fast.backend import use_backend
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import attention, layer_norm, multiway_ffn, multiway_linear
from ops.parity import affine, assert_evaluations_exact, by_name, evaluate, in_double, normal, token_rows

WIDTH, HEADS, HIDDEN = 24, 3, 40
LAYOUT = TokenLayout.from_lengths([5, 0, 3], [3, 4, 0])


def make_inputs() -> dict[str, Tensor | None]:
    inputs: dict[str, Tensor | None] = {"x": token_rows(LAYOUT.num_rows, WIDTH, torch.float32)}
    for name, width in {"before_attention": WIDTH, "inner": WIDTH, "before_ffn": WIDTH, "ffn": HIDDEN}.items():
        inputs[f"{name}_w"] = affine(2, width, dtype=torch.float32)
        inputs[f"{name}_b"] = normal(2, width, dtype=torch.float32)
    linears = {"qkv": (3 * WIDTH, WIDTH), "out": (WIDTH, WIDTH), "fc1": (HIDDEN, WIDTH), "fc2": (WIDTH, HIDDEN)}
    for name, (out, width) in linears.items():
        inputs[f"{name}_w"] = normal(2, out, width, dtype=torch.float32, scale=width**-0.5)
        inputs[f"{name}_b"] = normal(2, out, dtype=torch.float32)
    return inputs


def layer(x: Tensor, **p: Tensor) -> Tensor:
    offsets = LAYOUT.expert_offsets
    normed = layer_norm(x, p["before_attention_w"], p["before_attention_b"], offsets)
    qkv = multiway_linear(normed, p["qkv_w"], p["qkv_b"], offsets).view(x.shape[0], 3, HEADS, WIDTH // HEADS)
    mixed = layer_norm(attention(qkv, LAYOUT, HEADS, mask="captioning"), p["inner_w"], p["inner_b"], offsets)
    branch = multiway_linear(mixed, p["out_w"], p["out_b"], offsets)
    normed, x = layer_norm(branch, p["before_ffn_w"], p["before_ffn_b"], offsets, residual=x)
    ffn = (p[name] for name in ("fc1_w", "fc1_b", "ffn_w", "ffn_b", "fc2_w", "fc2_b"))
    return multiway_ffn(normed, *ffn, offsets, residual=x)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """Every output and gradient, to `tolerance` of its own largest magnitude."""
    for name, (value, wanted) in by_name(actual, expected):
        error = (value.double() - wanted.double()).abs().max().item()
        allowed = tolerance * wanted.abs().max().item()
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def test_dispatched_is_reference() -> None:
    inputs = in_double(make_inputs())
    with use_backend("reference"):
        expected = evaluate(layer, inputs)
    assert_evaluations_exact(evaluate(layer, inputs, expected.cotangents), expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_autocast_keeps_the_residual_stream_in_fp32(backend: str) -> None:
    inputs = make_inputs()
    expected = evaluate(layer, in_double(inputs))
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = evaluate(layer, inputs, expected.cotangents)
    assert actual["output 0"].dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in actual.gradients.values())
    assert_close(actual, expected, tolerance=5e-2)


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    inputs = make_inputs()
    expected = evaluate(layer, inputs)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert_close(evaluate(compiled, inputs, expected.cotangents), expected, tolerance=1e-6)


def test_compiles_as_one_graph_under_autocast() -> None:
    torch._dynamo.reset()
    inputs = make_inputs()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = evaluate(layer, inputs)
        actual = evaluate(compiled, inputs, expected.cotangents)
    assert actual["output 0"].dtype == torch.float32
    assert_close(actual, expected, tolerance=1e-2)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    """The first half of the layer: all ops but one, and the C++ compiler is what takes the time."""
    torch._dynamo.reset()
    inputs = {name: value for name, value in make_inputs().items() if not name.startswith(("before_ffn", "f"))}

    def attention_branch(x: Tensor, **p: Tensor) -> Tensor:
        offsets = LAYOUT.expert_offsets
        normed = layer_norm(x, p["before_attention_w"], p["before_attention_b"], offsets)
        qkv = multiway_linear(normed, p["qkv_w"], p["qkv_b"], offsets).view(x.shape[0], 3, HEADS, WIDTH // HEADS)
        mixed = layer_norm(attention(qkv, LAYOUT, HEADS), p["inner_w"], p["inner_b"], offsets)
        return multiway_linear(mixed, p["out_w"], p["out_b"], offsets, residual=x)

    expected = evaluate(attention_branch, inputs)
    actual = evaluate(torch.compile(attention_branch, fullgraph=True), inputs, expected.cotangents)
    assert_close(actual, expected, tolerance=1e-5)
