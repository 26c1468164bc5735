"""Derivatives that the kernels do not have, of gradients and in forward mode: right, through plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles.pairs import pair
from torch import Tensor

from beit3_fast import ops, use_backend
from beit3_fast.layout import TokenLayout
from ops.parity import Partition, affine, normal, permutation

PARTITION = Partition((3, 2), padding=1)
USED = PARTITION.used


def linear(activation: str | None) -> tuple[Callable[..., Tensor], list[Tensor]]:
    index = permutation(PARTITION, torch.int64)
    options = {"activation": activation, "row_index": index, "bounds": (0, 3, 6)}

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return ops.multiway_linear(x, weight, bias, PARTITION.offsets, residual=residual, **options)[index[:USED]]

    return call, [normal(6, 4), normal(2, 3, 4), normal(2, 3), normal(6, 3)]


def ffn(norm: bool) -> tuple[Callable[..., Tensor], list[Tensor]]:
    def call(x: Tensor, residual: Tensor, fc1: Tensor, b1: Tensor, fc2: Tensor, b2: Tensor, *affines: Tensor) -> Tensor:
        gain, shift = affines if norm else (None, None)
        return ops.multiway_ffn(x, fc1, b1, gain, shift, fc2, b2, PARTITION.offsets, residual=residual)[:USED]

    parameters = [normal(2, 5, 3), normal(2, 5), normal(2, 3, 5), normal(2, 3)]
    return call, [normal(6, 3), normal(6, 3), *parameters, *([affine(2, 5), normal(2, 5)] if norm else [])]


def layer_norm(residual: bool) -> tuple[Callable[..., Any], list[Tensor]]:
    def call(x: Tensor, weight: Tensor, bias: Tensor, *stream: Tensor) -> Any:
        returned = ops.layer_norm(x, weight, bias, PARTITION.offsets, residual=stream[0] if residual else None)
        return tuple(value[:USED] for value in returned) if residual else returned[:USED]

    return call, [normal(6, 4), affine(2, 4), normal(2, 4), *([normal(6, 4)] if residual else [])]


def attention(mask: str) -> tuple[Callable[..., Tensor], list[Tensor]]:
    layout = TokenLayout.from_lengths([2, 0, 3], [1, 2, 0])
    forbidden = torch.rand(5, 5) < 0.3
    chosen = forbidden.fill_diagonal_(False) if mask == "tensor" else mask
    return lambda qkv: ops.attention(qkv, layout, 2, mask=chosen), [normal(8, 3, 2, 3)]


CALLS = {
    "linear": lambda: linear(None),
    "linear with GELU": lambda: linear("gelu"),
    "feed-forward": lambda: ffn(True),
    "feed-forward without LayerNorm": lambda: ffn(False),
    "LayerNorm": lambda: layer_norm(False),
    "LayerNorm of a sum": lambda: layer_norm(True),
    "attention": lambda: attention("captioning"),
    "attention with a mask tensor": lambda: attention("tensor"),
}


@pytest.mark.parametrize("call", CALLS)
def test_second_derivatives(call: str) -> None:
    function, inputs = CALLS[call]()
    torch.autograd.gradgradcheck(function, [value.requires_grad_() for value in inputs])


@pytest.mark.parametrize("call", CALLS)
def test_forward_mode(call: str) -> None:
    function, inputs = CALLS[call]()
    leaves = [value.requires_grad_() for value in inputs]
    torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_backward_ad=False)


@pytest.mark.parametrize("place", [0, 1, 2, 3], ids=["x", "weight", "bias", "residual"])
def test_second_derivatives_by_one_input_alone(place: int) -> None:
    """The others are frozen; of the residual alone nothing is to be differentiated but a sum."""
    function, inputs = linear("gelu")
    torch.autograd.gradgradcheck(function, [v.requires_grad_(i == place) for i, v in enumerate(inputs)])


def test_second_derivatives_by_the_residual_of_a_frozen_block() -> None:
    function, inputs = ffn(True)
    torch.autograd.gradgradcheck(function, [v.requires_grad_(i == 1) for i, v in enumerate(inputs)])


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_of_a_model(frozen: bool) -> None:
    """A Hessian-vector product and a directional derivative in fp32, where the compiled library serves gradients."""
    model = pair("imageclassification", encoder_layers=2)[1].requires_grad_(not frozen)
    image, direction = torch.randn(2, 2, 3, 32, 32).unbind()

    def loss(pixels: Tensor) -> Tensor:
        return model(pixels).square().sum()

    def derivatives() -> tuple[Tensor, Tensor]:
        leaf = image.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (product,) = torch.autograd.grad((gradient * direction).sum(), leaf)
        return product, torch.func.jvp(loss, (image,), (direction,))[1].detach()

    actual = derivatives()
    with use_backend("reference"):
        expected = derivatives()
    for ours, plain in zip(actual, expected, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())
