"""ops.layer_norm against torchscale's MultiwayNetwork(nn.LayerNorm), float64 and plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck
from torchscale.component.multiway_network import MultiwayNetwork, set_split_position

from beit3_fast.backend import use_backend
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import layer_norm, layer_norm_reference
from ops.parity import (
    LOW_PRECISION,
    MEMORY_FORMS,
    Evaluation,
    Partition,
    RecordedOps,
    affine,
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
    saved_elements,
    token_rows,
)

EPS = 1e-5


def plain_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None, *, ids: Tensor, eps: float = EPS
) -> Tensor | tuple[Tensor, Tensor]:
    """Every expert's F.layer_norm of every row, then a choice by the row's expert; padding (id -1) is zeros."""
    total = x if residual is None else x + residual
    compute = torch.promote_types(total.dtype, weight.dtype)
    out = torch.zeros_like(total)
    for expert in range(weight.shape[0]):
        normed = F.layer_norm(
            total.to(compute), total.shape[1:], weight[expert].to(compute), bias[expert].to(compute), eps
        )
        out = torch.where((ids == expert).unsqueeze(1), normed.to(total.dtype), out)
    return out if residual is None else (out, total)


def make_inputs(
    partition: Partition,
    width: int,
    dtype: torch.dtype = torch.float64,
    parameter_dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    far: Tensor | None = None,
) -> dict[str, Tensor | None]:
    experts = partition.num_experts
    return {
        "x": token_rows(partition.num_rows, width, dtype, far=far),
        "weight": affine(experts, width, dtype=parameter_dtype or dtype),
        "bias": normal(experts, width, dtype=parameter_dtype or dtype),
        "residual": None if residual_dtype is None else token_rows(partition.num_rows, width, residual_dtype),
    }


def op(partition: Partition, eps: float = EPS) -> Any:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Any:
        return layer_norm(x, weight, bias, partition.offsets, residual=residual, eps=eps)

    return call


def reference(partition: Partition, eps: float = EPS) -> Any:
    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Any:
        return layer_norm_reference(x, weight, bias, partition.offsets, residual=residual, eps=eps)

    return call


def plain(partition: Partition, eps: float = EPS) -> Any:
    ids = partition.expert_of_row()
    return lambda **inputs: plain_layer_norm(**inputs, ids=ids, eps=eps)


# --- the reference against code that is not ours ----------------------------------------------------------------------


@pytest.mark.parametrize(("vision", "text"), [(5, 3), (4, 0), (0, 6)], ids=["both", "vision only", "text only"])
@pytest.mark.parametrize("width", [1, 7, 24])
def test_reference_is_torchscale_multiway(vision: int, text: int, width: int) -> None:
    batch = 3
    public = MultiwayNetwork(nn.LayerNorm(width, eps=EPS), dim=1).double()
    for parameter in public.parameters():
        nn.init.normal_(parameter)
    public.apply(set_split_position(vision if vision and text else (-1 if vision else 0)))
    dense = token_rows(batch * (vision + text), width, far=torch.arange(batch * (vision + text)) % 4 == 0)
    dense = dense.view(batch, vision + text, width)
    cotangent = torch.randn_like(dense)
    expected = evaluate(lambda dense: public(dense), {"dense": dense}, [cotangent])
    parameters = torch.autograd.grad(
        public(dense), tuple(public.parameters()), cotangent, allow_unused=True, materialize_grads=True
    )
    layout = TokenLayout.from_lengths([vision] * batch, [text] * batch)

    def ours(dense: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return layout.unpack(layer_norm_reference(layout.pack(dense), weight, bias, layout.expert_offsets, eps=EPS))

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


@given(partition=partitions(), width=st.integers(1, 19), with_residual=st.booleans(), eps=st.sampled_from([1e-5, 1e-2]))
def test_reference_is_plain_pytorch_in_float64(
    partition: Partition, width: int, with_residual: bool, eps: float
) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(partition, width, residual_dtype=torch.float64 if with_residual else None)
    actual = evaluate(reference(partition, eps), inputs)
    assert_evaluations_exact(actual, evaluate(plain(partition, eps), inputs, actual.cotangents))


# --- the dispatched op ------------------------------------------------------------------------------------------------


@given(
    partition=partitions(),
    width=st.integers(1, 19),
    residual=st.sampled_from([None, "contiguous", "transposed"]),
    form=st.sampled_from(MEMORY_FORMS),
    cotangent_form=st.sampled_from(MEMORY_FORMS),
    eps=st.sampled_from([1e-5, 1e-2]),
)
def test_op_is_reference_in_float64(
    partition: Partition, width: int, residual: str | None, form: str, cotangent_form: str, eps: float
) -> None:
    torch.manual_seed(0)
    far = torch.arange(partition.num_rows) % 3 == 0 if width > 2 else None
    inputs = make_inputs(partition, width, residual_dtype=torch.float64 if residual else None, far=far)
    inputs["x"] = in_memory(inputs["x"], form)
    if residual:
        inputs["residual"] = in_memory(inputs["residual"], residual)
    expected = evaluate(reference(partition, eps), inputs)
    cotangents = [in_memory(c, cotangent_form) for c in expected.cotangents]
    assert_evaluations_exact(evaluate(op(partition, eps), inputs, cotangents), expected)


def assert_layer_norm_parity(
    actual: Evaluation,
    yardstick: Evaluation,
    truth: Evaluation,
    inputs: dict[str, Tensor | None],
    groups: list[Tensor],
) -> None:
    """The parity rule for every group of rows, so that large rows do not hide errors of small ones, and the parameters.

    Rounding floors are those of statistics in fp32: the mean of a row is known to an ulp of its largest element, and
    everything downstream of it is multiplied by 1 / standard deviation.
    """
    dtype = actual.outputs[0].dtype
    if not actual.outputs[0].numel():
        return
    doubled = in_double(inputs)
    total = doubled["x"] if doubled["residual"] is None else doubled["x"] + doubled["residual"]
    weight = doubled["weight"].abs().max()
    cotangent = actual.cotangents[0].double().abs().amax(1)
    magnitude, spread = total.abs().amax(1), (total.var(1, correction=0) + EPS).rsqrt()
    fp32 = torch.finfo(torch.float32).eps
    normed_error = fp32 * spread * magnitude  # [rows]
    row_errors = {"output 0": normed_error * weight, "output 1": torch.zeros_like(magnitude)}
    row_errors["gradient of x"] = fp32 * spread * cotangent * weight * (4 + spread * magnitude)
    row_errors["gradient of residual"] = row_errors["gradient of x"]
    errors = {"gradient of weight": (normed_error * cotangent).sum(), "gradient of bias": fp32 * cotangent.sum()}
    for name, (value, plain, exact) in by_name(actual, yardstick, truth):
        for rows in groups if name in row_errors else [slice(None)]:
            expected = exact[rows]
            if expected.numel():
                error = row_errors[name][rows].max() if name in row_errors else errors[name]
                floor = error.item() + torch.finfo(value.dtype).eps * expected.abs().max().item()
                assert_parity(value[rows], plain[rows], expected, dtype, name, floor)


def _accuracy_cases() -> Iterator[Any]:
    for dtype, fp32_parameters, residual, width, far in itertools.product(
        LOW_PRECISION, (False, True), (None, "as x", "fp32"), (1, 3, 8, 33, 64, 130, 768), (False, True)
    ):
        rounded_sum = residual == "as x" and dtype != torch.float32
        if dtype == torch.float32 and (fp32_parameters or residual == "fp32"):
            continue  # the same as without
        if far and (width < 8 or rounded_sum):
            continue  # a mean of 1e3 leaves no digits: there is no spread, or the sum is rounded to 16 bits
        residual_dtype = {None: None, "as x": dtype, "fp32": torch.float32}[residual]
        name = f"{dtype}-width {width}-residual {residual}{'-fp32 parameters' * fp32_parameters}{'-far' * far}"
        yield pytest.param(dtype, torch.float32 if fp32_parameters else dtype, residual_dtype, width, far, id=name)


@pytest.mark.parametrize(("dtype", "parameter_dtype", "residual_dtype", "width", "far"), list(_accuracy_cases()))
def test_op_is_as_accurate_as_plain_pytorch(
    dtype: torch.dtype, parameter_dtype: torch.dtype, residual_dtype: torch.dtype | None, width: int, far: bool
) -> None:
    partition = Partition((37, 0, 26))
    far_rows = torch.arange(partition.num_rows) % 5 == 2
    inputs = make_inputs(partition, width, dtype, parameter_dtype, residual_dtype, far=far_rows if far else None)
    actual = evaluate(op(partition), inputs)
    yardstick = evaluate(plain(partition), inputs, actual.cotangents)
    truth = evaluate(plain(partition), in_double(inputs), actual.cotangents)
    assert_layer_norm_parity(actual, yardstick, truth, inputs, [~far_rows, far_rows])


@given(
    partition=partitions(),
    width=st.integers(1, 40),
    dtype=st.sampled_from(LOW_PRECISION),
    residual_dtype=st.sampled_from([None, *LOW_PRECISION]),
    form=st.sampled_from(MEMORY_FORMS),
)
def test_op_parity_over_shapes(
    partition: Partition, width: int, dtype: torch.dtype, residual_dtype: torch.dtype | None, form: str
) -> None:
    # a sum rounded to 16 bits may leave a short row without spread; test_op_is_as_accurate_... has enough rows for that
    assume(residual_dtype != dtype or dtype == torch.float32)
    torch.manual_seed(0)
    inputs = make_inputs(partition, width, dtype, None, residual_dtype)
    inputs["x"] = in_memory(inputs["x"], form)
    actual = evaluate(op(partition), inputs)
    yardstick = evaluate(plain(partition), inputs, actual.cotangents)
    truth = evaluate(plain(partition), in_double(inputs), actual.cotangents)
    used = torch.arange(partition.num_rows) < partition.used
    assert_layer_norm_parity(actual, yardstick, truth, inputs, [used])


@pytest.mark.parametrize("with_residual", [False, True])
def test_padding_rows_never_matter(with_residual: bool) -> None:
    partition, width = Partition((4, 3), padding=3), 6
    clean = make_inputs(partition, width, residual_dtype=torch.float64 if with_residual else None)
    expected = evaluate(plain(partition), clean)
    dirty = dict(clean)
    dirty["x"] = clean["x"].clone()
    dirty["x"][partition.used :] = float("nan")
    cotangents = [c.clone() for c in expected.cotangents]
    for cotangent in cotangents:
        cotangent[partition.used :] = float("nan")
    for backend in ("auto", "reference"):
        with use_backend(backend):
            actual = evaluate(op(partition), dirty, cotangents)
            finite = evaluate(op(partition), clean)
        for name, (value, exact) in by_name(actual, expected):
            select = slice(None) if name.endswith(("weight", "bias")) else slice(partition.used)
            assert_exact(value[select], exact[select], name)
        for name, value in finite.items():
            assert value.isfinite().all(), name
        if not with_residual:
            assert not finite["gradient of x"][partition.used :].count_nonzero()


@pytest.mark.parametrize("function", [layer_norm, layer_norm_reference])
def test_default_eps_is_the_public_one(function: Any) -> None:
    partition = Partition((4, 3))
    x, weight, bias, _ = make_inputs(partition, 6).values()
    actual = function(x / 100, weight, bias, partition.offsets)  # a variance of 1e-4, where eps shows
    expected = plain(partition, nn.LayerNorm(6).eps)(x=x / 100, weight=weight, bias=bias)
    assert_exact(actual, expected)


def test_statistics_are_those_of_the_promoted_dtype() -> None:
    """A float64 residual under fp32 rows: the sum is float64, and so is what is made of it."""
    partition = Partition((5, 4))
    inputs = make_inputs(partition, 16, torch.float32, torch.float64, torch.float64)
    expected = evaluate(plain(partition), inputs)
    actual = evaluate(op(partition), inputs, expected.cotangents)
    assert_exact(actual["output 0"], expected["output 0"], "output")
    assert_exact(actual["gradient of residual"], expected["gradient of residual"], "gradient of residual")


@pytest.mark.parametrize("used", ["normed", "total"])
def test_gradient_when_one_output_is_used(used: str) -> None:
    partition = Partition((4, 3))
    inputs = make_inputs(partition, 6, residual_dtype=torch.float64)
    pick = ["normed", "total"].index(used)
    expected = evaluate(lambda **i: plain(partition)(**i)[pick], inputs)
    actual = evaluate(lambda **i: op(partition)(**i)[pick], inputs, expected.cotangents)
    assert_evaluations_exact(actual, expected)


@pytest.mark.parametrize("wanted", [["x"], ["weight"], ["bias"], ["residual"], ["x", "residual"], ["weight", "bias"]])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_of_some_inputs(wanted: list[str], backend: str) -> None:
    partition = Partition((4, 3))
    inputs = make_inputs(partition, 6, residual_dtype=torch.float64)
    frozen = [name for name in inputs if name not in wanted]
    expected = evaluate(plain(partition), inputs, frozen=frozen)
    with use_backend(backend):
        actual = evaluate(op(partition), inputs, expected.cotangents, frozen=frozen)
    assert_evaluations_exact(actual, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_zero_rows_have_zero_gradients(backend: str) -> None:
    partition = Partition((0, 0))
    with use_backend(backend):
        actual = evaluate(op(partition), make_inputs(partition, 6))
    assert actual["output 0"].shape == (0, 6)
    for name in ("weight", "bias"):
        gradient = actual.gradients[name]
        assert gradient is not None, name
        assert not gradient.count_nonzero(), name


def test_saved_memory() -> None:
    """The backward needs the rows and two statistics each; nothing is kept where no gradient is asked for."""
    partition, width = Partition((40, 30)), 16
    inputs = make_inputs(partition, width, torch.float32, residual_dtype=torch.float32)
    given = [value for value in inputs.values() if value is not None]
    for value in given:
        value.requires_grad_()
    call = op(partition)
    assert saved_elements(lambda: call(**{**inputs, "residual": None}), given) == [70, 70]
    assert saved_elements(lambda: call(**inputs), given) == [70, 70, 70 * width]
    with torch.no_grad():
        assert saved_elements(lambda: call(**inputs)) == []


# --- with the rest of PyTorch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("partition", [Partition((4, 0, 3)), Partition((2, 2), padding=2), Partition((0, 0))], ids=str)
def test_opcheck(dtype: torch.dtype, residual_dtype: torch.dtype | None, partition: Partition) -> None:
    inputs = make_inputs(partition, 6, dtype, torch.float32, residual_dtype)
    for value in inputs.values():
        if value is not None:
            value.requires_grad_()
    x, weight, bias, residual = inputs.values()
    ops = torch.ops.beit3_fast
    opcheck(ops.layer_norm, (x, residual, weight, bias, partition.offsets, EPS))
    with torch.no_grad():
        normed, total, mean, rstd = ops.layer_norm(x, residual, weight, bias, partition.offsets, EPS)
        rows = x if residual is None else total
        args = (torch.randn_like(normed), rows.detach(), weight.detach(), partition.offsets, mean, rstd)
    opcheck(ops.layer_norm_backward, args)


@pytest.mark.parametrize("with_residual", [False, True])
def test_compiles_without_graph_breaks(with_residual: bool) -> None:
    torch._dynamo.reset()
    partition = Partition((4, 3))
    inputs = make_inputs(partition, 6, torch.float32, residual_dtype=torch.float32 if with_residual else None)
    offsets = partition.offsets

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Any:
        return layer_norm(x, weight, bias, offsets, residual=residual)

    expected = evaluate(call, inputs)
    actual = evaluate(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs, expected.cotangents)
    for name, values in by_name(actual, expected):
        torch.testing.assert_close(*values, msg=lambda text, name=name: f"{name}: {text}")


def test_autocast_keeps_the_residual_stream_wide() -> None:
    partition = Partition((4, 3))
    inputs = make_inputs(partition, 6, torch.bfloat16, torch.float32, torch.float32)
    for backend in ("auto", "reference"):
        with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
            actual = evaluate(op(partition), inputs)
            alone = evaluate(op(partition), {**inputs, "x": inputs["residual"], "residual": None})
        assert [output.dtype for output in actual.outputs] == [torch.float32] * 2
        assert alone["output 0"].dtype == torch.float32
        assert actual["gradient of x"].dtype == torch.bfloat16
        assert actual["gradient of residual"].dtype == torch.float32


def test_inference_mode() -> None:
    partition = Partition((4, 3))
    inputs = make_inputs(partition, 6, residual_dtype=torch.float64)
    expected = plain(partition)(**inputs)
    with torch.inference_mode(), RecordedOps() as recorded:
        actual = op(partition)(**inputs)
    assert [name for name, _ in recorded.calls] == ["layer_norm"]
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.is_inference()
        assert not ours.requires_grad
        assert_exact(ours, theirs)


# --- bad input --------------------------------------------------------------------------------------------------------


BAD: list[tuple[dict[str, Any], type, str]] = [
    ({"x": None}, TypeError, "x"),
    ({"x": [[1.0]]}, TypeError, "x"),
    ({"x": torch.zeros(7)}, ValueError, "x"),
    ({"x": torch.zeros(1, 7, 6)}, ValueError, "x"),
    ({"x": torch.zeros(7, 6, dtype=torch.int64)}, ValueError, "x"),
    ({"weight": None}, TypeError, "weight"),
    ({"weight": torch.zeros(6)}, ValueError, "weight"),
    ({"weight": torch.zeros(2, 5)}, ValueError, "weight"),
    ({"weight": torch.zeros(2, 6, dtype=torch.int64)}, ValueError, "weight"),
    ({"weight": meta(2, 6)}, ValueError, "weight"),
    ({"bias": None}, TypeError, "bias"),
    ({"bias": torch.zeros(6)}, ValueError, "bias"),
    ({"bias": torch.zeros(3, 6)}, ValueError, "bias"),
    ({"bias": torch.zeros(2, 6, dtype=torch.int64)}, ValueError, "bias"),
    ({"bias": meta(2, 6)}, ValueError, "bias"),
    ({"expert_offsets": [0, 4, 7]}, TypeError, "expert_offsets"),
    ({"expert_offsets": None}, TypeError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([0, 4, 7])}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([0, 7], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([[0, 4, 7]], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([1, 4, 7], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([0, 5, 4], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([0, 4, 8], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": meta(3, dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"residual": [0.0]}, TypeError, "residual"),
    ({"residual": torch.zeros(6, 6)}, ValueError, "residual"),
    ({"residual": torch.zeros(7, 5)}, ValueError, "residual"),
    ({"residual": torch.zeros(7, 6, dtype=torch.int64)}, ValueError, "residual"),
    ({"residual": meta(7, 6)}, ValueError, "residual"),
    ({"eps": "small"}, TypeError, "eps"),
    ({"eps": -1.0}, ValueError, "eps"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("bad", "error", "name"), BAD)
def test_bad_input(bad: dict[str, Any], error: type, name: str, backend: str) -> None:
    good = {
        "x": torch.zeros(7, 6),
        "weight": torch.ones(2, 6),
        "bias": torch.zeros(2, 6),
        "expert_offsets": Partition((4, 3)).offsets,
    }
    with use_backend(backend):
        assert_refuses(layer_norm, good, bad, error, name)
