"""Every op at the sizes of the released models, forward and backward, against float64."""

from __future__ import annotations

import pytest
import torch
from ops.parity import assert_exact, assert_parity, by_name, evaluate, in_double
from torch import Tensor

from beit3_fast import ops

from .cases import CASES, Case
from .machine import BASE, BF16, DEVICE, FP16, FP32, LENGTHS, REAL, ROWS, Precision, layout, normal, served


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_backward(case: Case) -> None:
    """As near to float64 as plain PyTorch on the same device."""
    with case.precision.set():
        inputs = case.inputs()
        cotangents = case.cotangents(inputs)
        truth = evaluate(case.function(reference=True), in_double(inputs), cotangents)
        plain = evaluate(case.function(reference=True), inputs, cotangents)
        actual = case.run(inputs, cotangents)
    for what, (ours, theirs, exact) in by_name(actual, plain, truth):
        floor = case.precision.eps * exact.abs().max().item()
        assert_parity(ours, theirs, exact, case.dtype, what, floor)


@pytest.mark.parametrize("what", ["out", "ffn", "attention", "layer_norm"])
def test_float64(what: str) -> None:
    """No kernel has it: plain PyTorch serves it."""
    case = Case(what, BASE, Precision("fp64", torch.float64), ROWS[1])
    inputs = case.inputs()
    cotangents = case.cotangents(inputs)
    actual = case.run(inputs, cotangents)
    for name, (ours, exact) in by_name(actual, evaluate(case.function(reference=True), inputs, cotangents)):
        assert_exact(ours, exact, name)


@pytest.mark.parametrize("mask", ["causal", "captioning"])
@pytest.mark.parametrize("precision", [BF16, FP32], ids=str)
def test_masked_attention(precision: Precision, mask: str) -> None:
    rows, head = ROWS[2], BASE.width // BASE.heads
    where = layout(rows)
    inputs = {"qkv": normal(rows, 3, BASE.heads, head, dtype=precision.dtype)}
    cotangents = [normal(rows, BASE.width, dtype=precision.dtype)]
    plain = evaluate(lambda qkv: ops.attention_reference(qkv, where, BASE.heads, mask=mask), inputs, cotangents)
    truth = evaluate(
        lambda qkv: ops.attention_reference(qkv, where, BASE.heads, mask=mask), in_double(inputs), cotangents
    )
    with served(simulated=precision == BF16):
        actual = evaluate(lambda qkv: ops.attention(qkv, where, BASE.heads, mask=mask), inputs, cotangents)
    for what, (ours, theirs, exact) in by_name(actual, plain, truth):
        assert_parity(ours, theirs, exact, precision.dtype, what)


@pytest.mark.parametrize("precision", [BF16, FP16, FP32], ids=str)
def test_decode_attention(precision: Precision) -> None:
    rows, head, heads = ROWS[2], BASE.width // BASE.heads, BASE.heads
    images, beams, columns, length = len(LENGTHS[rows][0]), 3, 8, 5
    where = layout(rows)
    qkv = normal(images * beams * 2, 3, heads, head, dtype=precision.dtype)
    prefix = normal(rows, 2, heads, head, dtype=precision.dtype)
    words = normal(columns, images * beams, 2, heads, head, dtype=precision.dtype)
    history = torch.randint(beams, (columns, images * beams), dtype=torch.int32, device=DEVICE)
    truth = ops.decode_attention_reference(qkv.double(), prefix.double(), where, words.double(), history, length)
    plain = ops.decode_attention_reference(qkv, prefix, where, words, history, length)
    with served(simulated=precision == BF16):
        actual = ops.decode_attention(qkv, prefix, where, words, history, length)
    assert_parity(actual, plain, truth, precision.dtype)


@pytest.mark.parametrize("experts", [2, 64])
def test_route_tokens(experts: int) -> None:
    ids = torch.randint(experts, (50_000 if REAL else 500,), dtype=torch.int32, device=DEVICE)
    expected = ops.route_tokens_reference(ids.cpu(), experts)
    with served(simulated=True):
        actual: tuple[Tensor, ...] = ops.route_tokens(ids, experts)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)
