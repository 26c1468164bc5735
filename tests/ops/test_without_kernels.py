"""Plain PyTorch in the place of a kernel, as it serves a GPU: right with sizes that only the host knows, and no wait.

On a CPU that has the compiled library it serves fp64 alone, so that is what values are compared in here.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from beit3_fast import ops
from beit3_fast.layout import TokenLayout
from ops.parity import (
    Evaluation,
    Partition,
    assert_evaluations_exact,
    assert_exact,
    assert_parity,
    assert_refuses,
    evaluate,
    normal,
    permutation,
)

# The package has functions of these names.
attention, decode_attention, layer_norm, multiway_ffn, multiway_linear = (
    import_module(f"beit3_fast.ops.{name}")
    for name in ("attention", "decode_attention", "layer_norm", "multiway_ffn", "multiway_linear")
)

WIDTH, HIDDEN = 6, 10
FAKE = FakeTensorMode(allow_non_fake_inputs=True)

# the rows of two experts, and those that nobody owns; a bound stands where the host knows no better
PARTITIONS = [
    (Partition((5, 4)), (0, 5, 9)),
    (Partition((5, 4), padding=3), (0, 5, 12)),
    (Partition((5, 0), padding=3), (0, 5, 8)),
    (Partition((0, 4), padding=1), (0, 0, 5)),
    (Partition((5, 4, 0), padding=2), (0, 5, 11, 11)),
    (Partition((0, 0), padding=2), (0, 0, 2)),
]


def linear(partition: Partition, bounds: tuple[int, ...] | None, index: Tensor | None, op: Callable[..., Any]) -> Any:
    known = {} if bounds is None else {"bounds": bounds}
    return lambda **inputs: op(**inputs, expert_offsets=partition.offsets, activation="gelu", row_index=index, **known)


def ffn(partition: Partition, bounds: tuple[int, ...] | None, index: Tensor | None, op: Callable[..., Any]) -> Any:
    known = {} if bounds is None else {"bounds": bounds}
    return lambda **inputs: op(**inputs, expert_offsets=partition.offsets, row_index=index, **known)


def inputs_of(call: Callable[..., Any], partition: Partition) -> dict[str, Tensor]:
    experts, rows = partition.num_experts, partition.num_rows
    if call is linear:
        return {
            "x": normal(rows, WIDTH),
            "weight": normal(experts, HIDDEN, WIDTH),
            "bias": normal(experts, HIDDEN),
            "residual": normal(rows, HIDDEN),
        }
    return {
        "x": normal(rows, WIDTH),
        "fc1_weight": normal(experts, HIDDEN, WIDTH),
        "fc1_bias": normal(experts, HIDDEN),
        "norm_weight": 1 + normal(experts, HIDDEN, scale=0.5),
        "norm_bias": normal(experts, HIDDEN),
        "fc2_weight": normal(experts, WIDTH, HIDDEN),
        "fc2_bias": normal(experts, WIDTH),
        "residual": normal(rows, WIDTH),
    }


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize(("partition", "bounds"), PARTITIONS, ids=str)
@pytest.mark.parametrize(("call", "name"), [(linear, "multiway_linear"), (ffn, "multiway_ffn")])
def test_bounds_change_nothing(
    call: Callable[..., Any], name: str, partition: Partition, bounds: tuple[int, ...], indexed: bool
) -> None:
    """Rows that nobody owns, NaN here, reach neither another row nor a sum over rows."""
    index = permutation(partition, torch.int64) if indexed else None
    position = torch.arange(partition.num_rows) if index is None else index
    owned, padding = position[: partition.used], position[partition.used :]
    inputs = inputs_of(call, partition)
    inputs["x"][padding] = inputs["residual"][padding] = float("nan")

    def owned_only(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda **leaves: op(**leaves)[owned]

    expected = evaluate(
        owned_only(call(partition, None, index, getattr(ops, f"{name}_reference"))),
        inputs | {key: inputs[key].nan_to_num() for key in ("x", "residual")},
    )
    actual = evaluate(owned_only(call(partition, bounds, index, getattr(ops, name))), inputs, expected.cotangents)
    assert_evaluations_exact(without(actual, padding), without(expected, padding))


def without(evaluation: Evaluation, rows: Tensor) -> Evaluation:
    """Gradients of x and residual at `rows`, which are unspecified, left out."""
    gradients = dict(evaluation.gradients)
    for name in ("x", "residual"):
        value = gradients[name]
        gradients[name] = None if value is None else value.clone().index_fill_(0, rows, 0)
    return Evaluation(evaluation.outputs, gradients, evaluation.cotangents)


@pytest.mark.parametrize("bounds", [(0, 5), (1, 5, 9), (0, 6, 5), (0, 5, 8), 3], ids=str)
def test_bounds_that_do_not_fit_are_refused(bounds: Any) -> None:
    good = {**inputs_of(linear, Partition((5, 4))), "expert_offsets": Partition((5, 4)).offsets}
    assert_refuses(ops.multiway_linear, good, {"bounds": bounds}, ValueError, "bounds")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mask", ["full", "captioning", "causal", "tensor"])
def test_attention_in_low_precision(mask: str, dtype: torch.dtype) -> None:
    layout = TokenLayout.from_lengths([5, 0, 3], [2, 4, 0])
    qkv, dout = normal(14, 3, 2, 8, dtype=dtype), normal(14, 16, dtype=dtype)
    forbidden = torch.rand(9, 9) < 0.3 if mask == "tensor" else None
    arguments = layout.segments, forbidden, "full" if mask == "tensor" else mask, 0.3, layout.width

    def gradients(rows: Tensor) -> tuple[Tensor, Tensor]:
        leaf = rows.clone().requires_grad_()
        out = ops.attention_reference(leaf, layout, 2, mask=mask if forbidden is None else forbidden, scale=0.3)
        return out.detach(), torch.autograd.grad(out, leaf, dout.to(rows.dtype))[0]

    plain, truth = gradients(qkv), gradients(qkv.double())
    out, lse = attention._plain_forward(qkv, *arguments, True)
    dqkv = attention._plain_backward(dout, qkv, out, lse, *arguments)
    for what, *values in zip(("output", "gradient"), (out, dqkv), plain, truth, strict=True):
        assert_parity(*values, dtype, what)
    assert_parity(attention._plain_forward(qkv, *arguments, False)[0], plain[0], truth[0], dtype)


def test_decoding_in_double_is_attention_over_the_whole_sequence() -> None:
    """Two beams that never part: each sees the prefix, its words and the new tokens up to themselves."""
    layout, heads = TokenLayout.from_lengths([4, 3], [0, 2]), (2, 5)
    prefix, words, new = normal(9, 2, *heads), normal(3, 4, 2, *heads), normal(4 * 2, 3, *heads)
    history = torch.arange(4, dtype=torch.int32).expand(3, 4).contiguous()
    actual = ops.decode_attention(new, prefix, layout, words, history, 2).view(4, 2, -1)
    rows = [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    for beam in range(4):
        q, *new_kv = new.view(4, 2, 3, *heads)[beam].unbind(1)
        kept = prefix[rows[beam // 2]]
        k, v = (torch.cat([kept[:, i], words[:2, beam, i], new_kv[i]]) for i in range(2))
        scores = torch.einsum("ihd,jhd->hij", q, k) * heads[1] ** -0.5
        scores[:, 0, -1] = float("-inf")
        assert_exact(actual[beam], torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).flatten(1))


# --- no wait ----------------------------------------------------------------------------------------------------------
# A fake CUDA tensor has no values: whatever asks for one, which on a GPU would be a wait, raises.


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cuda")


def offsets(count: int = 3) -> Tensor:
    return on_gpu(count, dtype=torch.int32)


def linear_arguments() -> tuple[Any, ...]:
    return on_gpu(9, WIDTH), on_gpu(2, HIDDEN, WIDTH), on_gpu(2, HIDDEN), offsets(), True, on_gpu(9, HIDDEN), None, True


def ffn_arguments() -> tuple[Any, ...]:
    parameters = [on_gpu(*shape) for shape in [(2, HIDDEN, WIDTH), *[(2, HIDDEN)] * 3, (2, WIDTH, HIDDEN), (2, WIDTH)]]
    return on_gpu(9, WIDTH), *parameters, offsets(), on_gpu(9, WIDTH), None, 1e-5, None, True


def linear_and_backward() -> None:
    x, weight, *_ = arguments = linear_arguments()
    out, pre = multiway_linear.compiled_forward(*arguments, bounds=(0, 5, 9))
    multiway_linear.compiled_backward(out, x, weight, offsets(), pre, None, True, True, bounds=(0, 5, 9))


def ffn_and_backward() -> None:
    x, fc1_weight, _, norm_weight, norm_bias, fc2_weight, *_ = arguments = ffn_arguments()
    out, *saved = multiway_ffn._forward(*arguments, (0, 5, 9))
    tensors = (out, x, fc1_weight, norm_weight, norm_bias, fc2_weight, offsets(), None, *saved)
    multiway_ffn._backward_forward(*tensors, 1e-5, True, True, (0, 5, 9))


def norm_and_backward() -> None:
    x, weight, bias = on_gpu(9, WIDTH), on_gpu(2, WIDTH), on_gpu(2, WIDTH)
    normed, total, mean, rstd = layer_norm._forward(x, x, weight, bias, offsets(), 1e-5)
    layer_norm._backward_forward(normed, total, weight, offsets(), mean, rstd, total)


def attention_and_backward(mask: str | None = None) -> None:
    qkv, segments = on_gpu(14, 3, 2, 8), on_gpu(3, 4, dtype=torch.int32)
    forbidden = on_gpu(7, 7, dtype=torch.bool) if mask is None else None
    arguments = segments, forbidden, mask or "full", 0.3, 7
    out, lse = attention._compiled(qkv, *arguments, True)
    attention._compiled(qkv, *arguments, False)
    attention._compiled_backward(out, qkv, out, lse, *arguments)


def decoding() -> None:
    cached = on_gpu(9, 2, 2, 5), on_gpu(2, 4, dtype=torch.int32), on_gpu(3, 4, 2, 2, 5)
    decode_attention._compiled(on_gpu(8, 3, 2, 5), *cached, on_gpu(3, 4, dtype=torch.int32), 2, 1.0, 5)


CALLS: list[Callable[[], None]] = [
    linear_and_backward,
    ffn_and_backward,
    norm_and_backward,
    attention_and_backward,
    lambda: attention_and_backward("captioning"),
    decoding,
]


@pytest.mark.parametrize("call", CALLS, ids=["linear", "ffn", "norm", "mask tensor", "named mask", "decoding"])
def test_nothing_waits_for_the_device(call: Callable[[], None]) -> None:
    with FAKE:
        call()


def test_a_wait_would_be_seen() -> None:
    with FAKE, pytest.raises(DataDependentOutputException):
        multiway_linear.compiled_forward(*linear_arguments())
