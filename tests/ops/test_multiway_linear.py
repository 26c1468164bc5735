"""ops.multiway_linear against torchscale's MultiwayNetwork(nn.Linear), float64 and plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck
from torchscale.component.multiway_network import MultiwayNetwork, set_split_position

from beit3_fast.backend import use_backend
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import multiway_linear, multiway_linear_reference
from ops.parity import (
    LOW_PRECISION,
    MEMORY_FORMS,
    Partition,
    RecordedOps,
    assert_evaluations_exact,
    assert_exact,
    assert_parity,
    assert_refuses,
    by_name,
    evaluate,
    in_double,
    in_memory,
    meta,
    normal,
    partitions,
    permutation,
    saved_elements,
    token_rows,
)


def plain_multiway_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    ids: Tensor,
    activation: str | None = None,
) -> Tensor:
    """Every expert's F.linear of every row, then a choice by the row's expert; padding (id -1) is zeros."""
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert in range(weight.shape[0]):
        y = F.linear(x, weight[expert], None if bias is None else bias[expert])
        if activation == "gelu":  # as the public code has it: exact, in fp32
            y = F.gelu(y if y.dtype == torch.float64 else y.float()).type_as(y)
        out = torch.where((ids == expert).unsqueeze(1), y, out)
    return out if residual is None else residual + out


def make_inputs(
    partition: Partition,
    width: int,
    out_width: int,
    dtype: torch.dtype = torch.float64,
    *,
    bias: bool = True,
    residual_dtype: torch.dtype | None = None,
    far: Tensor | None = None,
) -> dict[str, Tensor | None]:
    experts = partition.num_experts
    return {
        "x": token_rows(partition.num_rows, width, dtype, far=far),
        "weight": normal(experts, out_width, width, dtype=dtype, scale=width**-0.5),
        "bias": normal(experts, out_width, dtype=dtype) if bias else None,
        "residual": None if residual_dtype is None else token_rows(partition.num_rows, out_width, residual_dtype),
    }


def op(partition: Partition, activation: str | None = None, row_index: Tensor | None = None) -> Any:
    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return multiway_linear(
            x, weight, bias, partition.offsets, activation=activation, residual=residual, row_index=row_index
        )

    return call


def reference(partition: Partition, activation: str | None = None, row_index: Tensor | None = None) -> Any:
    def call(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
        return multiway_linear_reference(
            x, weight, bias, partition.offsets, activation=activation, residual=residual, row_index=row_index
        )

    return call


def plain(partition: Partition, activation: str | None = None, row_index: Tensor | None = None) -> Any:
    ids = partition.expert_of_row(row_index)
    return lambda **inputs: plain_multiway_linear(**inputs, ids=ids, activation=activation)


activations = st.sampled_from([None, "gelu"])
index_dtypes = st.sampled_from([None, torch.int32, torch.int64])


# --- the reference against code that is not ours ----------------------------------------------------------------------


@pytest.mark.parametrize(("vision", "text"), [(5, 3), (4, 0), (0, 6)], ids=["both", "vision only", "text only"])
def test_reference_is_torchscale_multiway(vision: int, text: int) -> None:
    batch, width, out_width = 3, 7, 5
    public = MultiwayNetwork(nn.Linear(width, out_width), dim=1).double()
    public.apply(set_split_position(vision if vision and text else (-1 if vision else 0)))
    dense = token_rows(batch * (vision + text), width).view(batch, vision + text, width)
    cotangent = normal(batch, vision + text, out_width)
    expected = evaluate(lambda dense: public(dense), {"dense": dense}, [cotangent])
    parameters = torch.autograd.grad(
        public(dense), tuple(public.parameters()), cotangent, allow_unused=True, materialize_grads=True
    )
    layout = TokenLayout.from_lengths([vision] * batch, [text] * batch)

    def ours(dense: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layout.unpack(multiway_linear_reference(layout.pack(dense), weight, bias, layout.expert_offsets))

    actual = evaluate(
        ours,
        {
            "dense": dense,
            "weight": torch.stack([public.A.weight, public.B.weight]),
            "bias": torch.stack([public.A.bias, public.B.bias]),
        },
        [cotangent],
    )
    assert_exact(actual["output 0"], expected["output 0"], "output")
    assert_exact(actual["gradient of dense"], expected["gradient of dense"], "gradient of x")
    assert_exact(actual["gradient of weight"], torch.stack([parameters[0], parameters[2]]), "gradient of weight")
    assert_exact(actual["gradient of bias"], torch.stack([parameters[1], parameters[3]]), "gradient of bias")


@given(
    partition=partitions(),
    width=st.integers(1, 9),
    out_width=st.integers(1, 9),
    activation=activations,
    bias=st.booleans(),
    with_residual=st.booleans(),
    index_dtype=index_dtypes,
)
def test_reference_is_plain_pytorch_in_float64(
    partition: Partition,
    width: int,
    out_width: int,
    activation: str | None,
    bias: bool,
    with_residual: bool,
    index_dtype: torch.dtype | None,
) -> None:
    torch.manual_seed(0)
    residual_dtype = torch.float64 if with_residual else None
    inputs = make_inputs(partition, width, out_width, bias=bias, residual_dtype=residual_dtype)
    row_index = permutation(partition, index_dtype)
    actual = evaluate(reference(partition, activation, row_index), inputs)
    assert_evaluations_exact(actual, evaluate(plain(partition, activation, row_index), inputs, actual.cotangents))


# --- the dispatched op ------------------------------------------------------------------------------------------------


@given(
    partition=partitions(),
    width=st.integers(1, 19),
    out_width=st.integers(1, 19),
    activation=activations,
    bias=st.booleans(),
    residual=st.sampled_from([None, "contiguous", "transposed"]),
    index_dtype=index_dtypes,
    form=st.sampled_from(MEMORY_FORMS),
    weight_form=st.sampled_from(MEMORY_FORMS),
    cotangent_form=st.sampled_from(MEMORY_FORMS),
)
def test_op_is_reference_in_float64(
    partition: Partition,
    width: int,
    out_width: int,
    activation: str | None,
    bias: bool,
    residual: str | None,
    index_dtype: torch.dtype | None,
    form: str,
    weight_form: str,
    cotangent_form: str,
) -> None:
    torch.manual_seed(0)
    far = torch.arange(partition.num_rows) % 3 == 0
    inputs = make_inputs(
        partition, width, out_width, bias=bias, residual_dtype=torch.float64 if residual else None, far=far
    )
    inputs["x"] = in_memory(inputs["x"], form)
    inputs["weight"] = in_memory(inputs["weight"].flatten(0, 1), weight_form).view(-1, out_width, width)
    if residual:
        inputs["residual"] = in_memory(inputs["residual"], residual)
    row_index = permutation(partition, index_dtype)
    expected = evaluate(reference(partition, activation, row_index), inputs)
    cotangents = [in_memory(c, cotangent_form) for c in expected.cotangents]
    assert_evaluations_exact(evaluate(op(partition, activation, row_index), inputs, cotangents), expected)


def assert_linear_parity(
    function: Any,
    plain_function: Any,
    inputs: dict[str, Tensor | None],
    groups: list[Tensor],
    cancels: bool = False,
) -> None:
    """The parity rule for every group of rows, so that large rows do not hide errors of small ones, and the parameters.

    A sum of products is known to a few ulps, in fp32, of the sum of the products' magnitudes: those come from running
    the same map on magnitudes, forwards and backwards. The result is known to an ulp of its dtype; where there may be
    as little as one number, which the residual or GELU may bring near to nothing (`cancels`), to one of what went in.
    """
    actual = evaluate(function, inputs)
    yardstick = evaluate(plain_function, inputs, actual.cotangents)
    truth = evaluate(plain_function, in_double(inputs), actual.cotangents)
    magnitudes = evaluate(
        plain_function,
        {name: None if value is None else value.abs() for name, value in in_double(inputs).items()},
        [c.abs() for c in actual.cotangents],
    )
    dtype = inputs["x"].dtype
    for name, (value, plain, exact, size) in by_name(actual, yardstick, truth, magnitudes):
        by_row = not name.endswith(("weight", "bias"))
        for rows in groups if by_row else [slice(None)]:
            expected, magnitude = exact[rows], size[rows]
            if expected.numel():
                rounded = magnitude if cancels else expected
                floor = (
                    2 * torch.finfo(torch.float32).eps * magnitude.abs().max()
                    + torch.finfo(dtype).eps * rounded.abs().max()
                )
                assert_parity(value[rows], plain[rows], expected, dtype, name, floor.item())


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, "as x"], ids=str)
@pytest.mark.parametrize(("width", "out_width"), [(1, 1), (5, 3), (33, 64), (130, 67), (768, 96)])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_op_is_as_accurate_as_plain_pytorch(
    dtype: torch.dtype, activation: str | None, residual_dtype: Any, width: int, out_width: int, bias: bool
) -> None:
    partition = Partition((37, 0, 26))
    far = torch.arange(partition.num_rows) % 5 == 2
    inputs = make_inputs(
        partition,
        width,
        out_width,
        dtype,
        bias=bias,
        residual_dtype=dtype if residual_dtype == "as x" else residual_dtype,
        far=far,
    )
    assert_linear_parity(op(partition, activation), plain(partition, activation), inputs, [~far, far])


@given(
    partition=partitions(),
    width=st.integers(1, 40),
    out_width=st.integers(1, 40),
    dtype=st.sampled_from(LOW_PRECISION),
    residual_dtype=st.sampled_from([None, *LOW_PRECISION]),
    activation=activations,
    index_dtype=index_dtypes,
    form=st.sampled_from(MEMORY_FORMS),
)
def test_op_parity_over_shapes(
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
    row_index = permutation(partition, index_dtype)
    used = partition.expert_of_row(row_index) >= 0
    functions = op(partition, activation, row_index), plain(partition, activation, row_index)
    assert_linear_parity(*functions, inputs, [used], cancels=True)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("index_dtype", [None, torch.int32], ids=str)
def test_padding_rows_never_matter(
    activation: str | None, with_residual: bool, index_dtype: torch.dtype | None
) -> None:
    partition = Partition((4, 3), padding=3)
    row_index = permutation(partition, index_dtype)
    used = partition.expert_of_row(row_index) >= 0
    clean = make_inputs(partition, 6, 5, residual_dtype=torch.float64 if with_residual else None)
    expected = evaluate(plain(partition, activation, row_index), clean)
    dirty = dict(clean)
    dirty["x"] = clean["x"].masked_fill(~used.unsqueeze(1), float("nan"))
    cotangents = [c.masked_fill(~used.unsqueeze(1), float("nan")) for c in expected.cotangents]
    for backend in ("auto", "reference"):
        with use_backend(backend):
            actual = evaluate(op(partition, activation, row_index), dirty, cotangents)
            finite = evaluate(op(partition, activation, row_index), clean)
        for name, (value, exact) in by_name(actual, expected):
            select = slice(None) if name.endswith(("weight", "bias")) else used
            assert_exact(value[select], exact[select], name)
        for name, value in finite.items():
            assert value.isfinite().all(), name
        assert not finite["gradient of x"][~used].count_nonzero()


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("wanted", [["x"], ["weight"], ["bias"], ["residual"], ["x", "residual"], ["weight", "bias"]])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_of_some_inputs(activation: str | None, wanted: list[str], backend: str) -> None:
    partition = Partition((4, 3))
    inputs = make_inputs(partition, 6, 5, residual_dtype=torch.float64)
    frozen = [name for name in inputs if name not in wanted]
    expected = evaluate(plain(partition, activation), inputs, frozen=frozen)
    with use_backend(backend):
        actual = evaluate(op(partition, activation), inputs, expected.cotangents, frozen=frozen)
    assert_evaluations_exact(actual, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_zero_rows_have_zero_gradients(backend: str, activation: str | None) -> None:
    partition = Partition((0, 0))
    with use_backend(backend):
        actual = evaluate(op(partition, activation), make_inputs(partition, 6, 5))
    assert actual["output 0"].shape == (0, 5)
    for name in ("weight", "bias"):
        gradient = actual.gradients[name]
        assert gradient is not None, name
        assert not gradient.count_nonzero(), name


@pytest.mark.parametrize("activation", [None, "gelu"])
def test_saved_memory(activation: str | None) -> None:
    """With an activation its input is kept for the backward, and only where something in front of it has a gradient."""
    partition, out_width = Partition((40, 30)), 5
    inputs = make_inputs(partition, 6, out_width, residual_dtype=torch.float32)
    inputs = {name: value.float() for name, value in inputs.items()}
    call = op(partition, activation)
    pre_activation = [partition.num_rows * out_width] if activation else []

    def kept(wanted: list[str]) -> tuple[list[int], int]:
        leaves = {name: value.detach().requires_grad_(name in wanted) for name, value in inputs.items()}
        with RecordedOps() as recorded:
            sizes = saved_elements(lambda: call(**leaves), list(leaves.values()))
        return [size for size in sizes if size], recorded.calls[0][1][1].numel()

    assert kept(["x", "weight", "bias", "residual"]) == (pre_activation, sum(pre_activation))
    assert kept(["weight"]) == (pre_activation, sum(pre_activation))
    assert kept(["residual"]) == ([], 0)
    assert kept([]) == ([], 0)
    with torch.no_grad():
        assert kept(["x", "weight"]) == ([], 0)


# --- with the rest of PyTorch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gelu", "bias", "residual_dtype", "index_dtype", "partition"),
    [
        (False, True, None, None, Partition((4, 0, 3))),
        (False, False, torch.float32, torch.int32, Partition((4, 3))),
        (True, True, None, torch.int64, Partition((4, 3), padding=2)),
        (True, False, torch.float32, None, Partition((2, 5))),
        (True, True, torch.float64, torch.int32, Partition((7,))),
        (True, True, torch.float32, None, Partition((0, 0))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(
    gelu: bool,
    bias: bool,
    residual_dtype: torch.dtype | None,
    index_dtype: torch.dtype | None,
    partition: Partition,
    dtype: torch.dtype,
) -> None:
    inputs = make_inputs(partition, 6, 5, dtype, bias=bias, residual_dtype=residual_dtype)
    for value in inputs.values():
        if value is not None:
            value.requires_grad_()
    x, weight, bias_, residual = inputs.values()
    row_index, offsets = permutation(partition, index_dtype), partition.offsets
    ops = torch.ops.beit3_fast
    opcheck(ops.multiway_linear, (x, weight, bias_, offsets, gelu, residual, row_index, True, None))
    with torch.no_grad():
        _, pre = ops.multiway_linear(x, weight, bias_, offsets, gelu, residual, row_index, True, None)
    x, weight = x.detach(), weight.detach()
    dy, pre = normal(partition.num_rows, 5, dtype=dtype), pre if gelu else None
    for needs_x, needs_parameters in ((True, True), (True, False), (False, True)):
        args = (dy, x, weight, offsets, pre, row_index, needs_x, needs_parameters, None)
        opcheck(ops.multiway_linear_backward, args, test_utils=("test_schema", "test_faketensor"))
    opcheck(ops.multiway_linear_backward, args)


def test_opcheck_saves_nothing_when_told() -> None:
    partition = Partition((4, 3))
    x, weight, bias, _ = make_inputs(partition, 6, 5, torch.float32).values()
    args = (x, weight, bias, partition.offsets, True, None, None, False, None)
    opcheck(torch.ops.beit3_fast.multiway_linear, args)
    assert torch.ops.beit3_fast.multiway_linear(*args)[1].shape == (0,)


@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("everything", [False, True])
def test_compiles_without_graph_breaks(activation: str | None, everything: bool) -> None:
    torch._dynamo.reset()
    partition = Partition((4, 3))
    inputs = make_inputs(
        partition, 6, 5, torch.float32, bias=everything, residual_dtype=torch.float32 if everything else None
    )
    offsets, row_index = partition.offsets, permutation(partition, torch.int32 if everything else None)

    def call(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        return multiway_linear(x, weight, bias, offsets, activation=activation, residual=residual, row_index=row_index)

    expected = evaluate(call, inputs)
    actual = evaluate(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs, expected.cotangents)
    for name, values in by_name(actual, expected):
        torch.testing.assert_close(*values, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("activation", [None, "gelu"])
@pytest.mark.parametrize("padding", [0, 2])
def test_autocast(backend: str, activation: str | None, padding: int) -> None:
    partition = Partition((4, 3), padding)
    inputs = make_inputs(partition, 6, 5, torch.float32, residual_dtype=torch.float32)
    low = {name: None if value is None else value.bfloat16() for name, value in inputs.items()}
    expected = evaluate(plain(partition, activation), {**low, "residual": None})
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        branch = evaluate(op(partition, activation), {**inputs, "residual": None}, expected.cotangents)
        stream = evaluate(op(partition, activation), inputs)
        double = op(partition, activation)(**in_double(inputs))
    assert branch["output 0"].dtype == torch.bfloat16
    assert stream["output 0"].dtype == torch.float32
    assert double.dtype == torch.float64
    for name, value in inputs.items():
        assert stream[f"gradient of {name}"].dtype == value.dtype  # as autograd accumulates it
    for _, (value, exact) in by_name(branch, expected):
        torch.testing.assert_close(value.float(), exact.float(), rtol=2e-2, atol=2e-2)


def test_inference_mode() -> None:
    partition = Partition((4, 3))
    inputs = make_inputs(partition, 6, 5, residual_dtype=torch.float64)
    row_index = permutation(partition, torch.int32)
    expected = plain(partition, "gelu", row_index)(**inputs)
    with torch.inference_mode(), RecordedOps() as recorded:
        actual = op(partition, "gelu", row_index)(**inputs)
    ((name, (_, pre)),) = recorded.calls
    assert name == "multiway_linear"
    assert pre.shape == (0,)
    assert actual.is_inference()
    assert not actual.requires_grad
    assert_exact(actual, expected)


# --- bad input --------------------------------------------------------------------------------------------------------


BAD: list[tuple[dict[str, Any], type, str]] = [
    ({"x": None}, TypeError, "x"),
    ({"x": torch.zeros(6)}, ValueError, "x"),
    ({"x": torch.zeros(7, 6, dtype=torch.int64)}, ValueError, "x"),
    ({"x": torch.zeros(7, 6, dtype=torch.complex64)}, ValueError, "x"),
    ({"weight": None}, TypeError, "weight"),
    ({"weight": torch.zeros(5, 6)}, ValueError, "weight"),
    ({"weight": torch.zeros(2, 6, 5)}, ValueError, "weight"),
    ({"weight": torch.zeros(2, 5, 6, dtype=torch.float64)}, ValueError, "weight"),
    ({"weight": meta(2, 5, 6)}, ValueError, "weight"),
    ({"bias": 0.0}, TypeError, "bias"),
    ({"bias": torch.zeros(5)}, ValueError, "bias"),
    ({"bias": torch.zeros(2, 6)}, ValueError, "bias"),
    ({"bias": torch.zeros(2, 5, dtype=torch.bfloat16)}, ValueError, "bias"),
    ({"bias": meta(2, 5)}, ValueError, "bias"),
    ({"expert_offsets": [0, 4, 7]}, TypeError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([0, 4, 7])}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([0, 2, 4, 7], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([1, 4, 7], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([0, 5, 4], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([0, 4, 8], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": meta(3, dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"activation": "relu"}, ValueError, "activation"),
    ({"activation": F.gelu}, ValueError, "activation"),
    ({"residual": 0.0}, TypeError, "residual"),
    ({"residual": torch.zeros(7, 6)}, ValueError, "residual"),
    ({"residual": torch.zeros(7, 5, dtype=torch.int64)}, ValueError, "residual"),
    ({"residual": meta(7, 5)}, ValueError, "residual"),
    ({"row_index": list(range(7))}, TypeError, "row_index"),
    ({"row_index": torch.arange(6)}, ValueError, "row_index"),
    ({"row_index": torch.arange(7).view(7, 1)}, ValueError, "row_index"),
    ({"row_index": torch.arange(7.0)}, ValueError, "row_index"),
    ({"row_index": torch.arange(7) + 1}, ValueError, "row_index"),
    ({"row_index": torch.arange(7) - 1}, ValueError, "row_index"),
    ({"row_index": meta(7, dtype=torch.int64)}, ValueError, "row_index"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("bad", "error", "name"), BAD)
def test_bad_input(bad: dict[str, Any], error: type, name: str, backend: str) -> None:
    good = {
        "x": torch.zeros(7, 6),
        "weight": torch.zeros(2, 5, 6),
        "bias": torch.zeros(2, 5),
        "expert_offsets": Partition((4, 3)).offsets,
        "residual": torch.zeros(7, 5),
        "row_index": torch.arange(7),
    }
    with use_backend(backend):
        assert_refuses(multiway_linear, good, bad, error, name)
