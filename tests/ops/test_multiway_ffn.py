"""ops.multiway_ffn against torchscale's MultiwayNetwork(FeedForwardNetwork), float64 and plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.library import opcheck
from torchscale.component.feedforward_network import FeedForwardNetwork
from torchscale.component.multiway_network import MultiwayNetwork, set_split_position

from beit3_fast.backend import use_backend
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import multiway_ffn, multiway_ffn_reference
from ops.parity import (
    LOW_PRECISION,
    MEMORY_FORMS,
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
    permutation,
    saved_elements,
    token_rows,
)

PARAMETERS = ("fc1_weight", "fc1_bias", "norm_weight", "norm_bias", "fc2_weight", "fc2_bias")
EPS = 1e-5


def plain_multiway_ffn(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor,
    residual: Tensor | None = None,
    *,
    ids: Tensor,
    eps: float = EPS,
) -> Tensor:
    """Every expert's feed-forward block for every row, then a choice by the row's expert; padding (id -1) is zeros."""
    out = torch.zeros_like(x)
    for expert in range(fc1_weight.shape[0]):
        hidden = F.linear(x, fc1_weight[expert], fc1_bias[expert])
        # as the public code has it: exact, in fp32
        hidden = F.gelu(hidden if hidden.dtype == torch.float64 else hidden.float()).type_as(hidden)
        if norm_weight is not None:
            wide = torch.promote_types(hidden.dtype, norm_weight.dtype)
            weight, bias = norm_weight[expert].to(wide), norm_bias[expert].to(wide)
            hidden = F.layer_norm(hidden.to(wide), weight.shape, weight, bias, eps).type_as(hidden)
        y = F.linear(hidden, fc2_weight[expert], fc2_bias[expert])
        out = torch.where((ids == expert).unsqueeze(1), y, out)
    return out if residual is None else residual + out


def make_inputs(
    partition: Partition,
    width: int,
    hidden: int,
    dtype: torch.dtype = torch.float64,
    *,
    norm_dtype: torch.dtype | None = torch.float64,
    residual_dtype: torch.dtype | None = None,
    far: Tensor | None = None,
) -> dict[str, Tensor | None]:
    experts = partition.num_experts
    return {
        "x": token_rows(partition.num_rows, width, dtype, far=far),
        "fc1_weight": normal(experts, hidden, width, dtype=dtype, scale=width**-0.5),
        "fc1_bias": normal(experts, hidden, dtype=dtype),
        "norm_weight": None if norm_dtype is None else affine(experts, hidden, dtype=norm_dtype),
        "norm_bias": None if norm_dtype is None else normal(experts, hidden, dtype=norm_dtype),
        "fc2_weight": normal(experts, width, hidden, dtype=dtype, scale=hidden**-0.5),
        "fc2_bias": normal(experts, width, dtype=dtype),
        "residual": None if residual_dtype is None else token_rows(partition.num_rows, width, residual_dtype),
    }


def _call(function: Any, partition: Partition, row_index: Tensor | None, eps: float) -> Any:
    def call(x: Tensor, *, residual: Tensor | None = None, **parameters: Tensor | None) -> Tensor:
        arguments = [parameters[name] for name in PARAMETERS]
        return function(x, *arguments, partition.offsets, residual=residual, row_index=row_index, eps=eps)

    return call


def op(partition: Partition, row_index: Tensor | None = None, eps: float = EPS) -> Any:
    return _call(multiway_ffn, partition, row_index, eps)


def reference(partition: Partition, row_index: Tensor | None = None, eps: float = EPS) -> Any:
    return _call(multiway_ffn_reference, partition, row_index, eps)


def plain(partition: Partition, row_index: Tensor | None = None, eps: float = EPS) -> Any:
    ids = partition.expert_of_row(row_index)
    return lambda **inputs: plain_multiway_ffn(**inputs, ids=ids, eps=eps)


index_dtypes = st.sampled_from([None, torch.int32, torch.int64])


# --- the reference against code that is not ours ----------------------------------------------------------------------


@pytest.mark.parametrize(("vision", "text"), [(5, 3), (4, 0), (0, 6)], ids=["both", "vision only", "text only"])
@pytest.mark.parametrize("subln", [False, True], ids=["no sub-LN", "sub-LN"])
def test_reference_is_torchscale_multiway(vision: int, text: int, subln: bool) -> None:
    batch, width, hidden = 3, 6, 11
    # the public block takes GELU through fp32 whatever the dtype, so fp32 is where the two can be compared
    public = MultiwayNetwork(FeedForwardNetwork(width, hidden, "gelu", 0.0, 0.0, EPS, subln=subln), dim=1)
    for parameter in public.parameters():
        nn.init.normal_(parameter)
    public.apply(set_split_position(vision if vision and text else (-1 if vision else 0)))
    dense = token_rows(batch * (vision + text), width, torch.float32).view(batch, vision + text, width)
    cotangent = torch.randn_like(dense)
    expected = evaluate(lambda dense: public(dense), {"dense": dense}, [cotangent])
    names = [name for name in PARAMETERS if subln or not name.startswith("norm")]
    branches = [
        [
            b.fc1.weight,
            b.fc1.bias,
            *([b.ffn_layernorm.weight, b.ffn_layernorm.bias] if subln else []),
            b.fc2.weight,
            b.fc2.bias,
        ]
        for b in (public.A, public.B)
    ]
    gradients = [
        torch.autograd.grad(public(dense), branch, cotangent, allow_unused=True, materialize_grads=True)
        for branch in branches
    ]
    layout = TokenLayout.from_lengths([vision] * batch, [text] * batch)

    def ours(dense: Tensor, **parameters: Tensor) -> Tensor:
        stacked = [parameters.get(name) for name in PARAMETERS]
        rows = multiway_ffn_reference(layout.pack(dense), *stacked, layout.expert_offsets, eps=EPS)
        return layout.unpack(rows)

    stacked = {name: torch.stack(pair).detach() for name, pair in zip(names, zip(*branches, strict=True), strict=True)}
    actual = evaluate(ours, {"dense": dense, **stacked}, [cotangent])
    torch.testing.assert_close(actual["output 0"], expected["output 0"], rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(actual["gradient of dense"], expected["gradient of dense"], rtol=2e-5, atol=5e-5)
    for name, pair in zip(names, zip(*gradients, strict=True), strict=True):
        torch.testing.assert_close(
            actual[f"gradient of {name}"], torch.stack(pair), rtol=2e-5, atol=1e-4, msg=lambda t, n=name: f"{n}: {t}"
        )


@given(
    partition=partitions(),
    width=st.integers(1, 9),
    hidden=st.integers(2, 13),
    subln=st.booleans(),
    with_residual=st.booleans(),
    index_dtype=index_dtypes,
    eps=st.sampled_from([1e-5, 1e-2]),
)
def test_reference_is_plain_pytorch_in_float64(
    partition: Partition,
    width: int,
    hidden: int,
    subln: bool,
    with_residual: bool,
    index_dtype: torch.dtype | None,
    eps: float,
) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(
        partition,
        width,
        hidden,
        norm_dtype=torch.float64 if subln else None,
        residual_dtype=torch.float64 if with_residual else None,
    )
    row_index = permutation(partition, index_dtype)
    actual = evaluate(reference(partition, row_index, eps), inputs)
    assert_evaluations_exact(actual, evaluate(plain(partition, row_index, eps), inputs, actual.cotangents))


# --- the dispatched op ------------------------------------------------------------------------------------------------


@given(
    partition=partitions(),
    width=st.integers(1, 13),
    hidden=st.integers(1, 19),
    subln=st.booleans(),
    residual=st.sampled_from([None, "contiguous", "transposed"]),
    index_dtype=index_dtypes,
    form=st.sampled_from(MEMORY_FORMS),
    weight_form=st.sampled_from(MEMORY_FORMS),
    cotangent_form=st.sampled_from(MEMORY_FORMS),
    eps=st.sampled_from([1e-5, 1e-2]),
)
def test_op_is_reference_in_float64(
    partition: Partition,
    width: int,
    hidden: int,
    subln: bool,
    residual: str | None,
    index_dtype: torch.dtype | None,
    form: str,
    weight_form: str,
    cotangent_form: str,
    eps: float,
) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(
        partition,
        width,
        hidden,
        norm_dtype=torch.float64 if subln else None,
        residual_dtype=torch.float64 if residual else None,
        far=torch.arange(partition.num_rows) % 3 == 0 if hidden > 4 else None,
    )
    inputs["x"] = in_memory(inputs["x"], form)
    for name in ("fc1_weight", "fc2_weight"):
        weight = inputs[name]
        inputs[name] = in_memory(weight.flatten(0, 1), weight_form).view(weight.shape)
    if residual:
        inputs["residual"] = in_memory(inputs["residual"], residual)
    row_index = permutation(partition, index_dtype)
    expected = evaluate(reference(partition, row_index, eps), inputs)
    cotangents = [in_memory(c, cotangent_form) for c in expected.cotangents]
    assert_evaluations_exact(evaluate(op(partition, row_index, eps), inputs, cotangents), expected)


def assert_ffn_parity(
    function: Any, plain_function: Any, inputs: dict[str, Tensor | None], groups: list[Tensor]
) -> None:
    """The parity rule for every group of rows, so that large rows hide no errors of small ones, and the parameters."""
    actual = evaluate(function, inputs)
    yardsticks = in_other_orders(plain_function, inputs, actual.cotangents)
    truth = evaluate(plain_function, in_double(inputs), actual.cotangents)
    for name, value in actual.items():
        for rows in [slice(None)] if name.removeprefix("gradient of ") in PARAMETERS else groups:
            exact = truth[name][rows]
            candidates = [yardstick[name][rows] for yardstick in yardsticks]
            plain = max(
                candidates, key=lambda plain: (plain.double() - exact).abs().max().item() if plain.numel() else 0
            )
            assert_parity(value[rows], plain, exact, inputs["x"].dtype, name)


def in_other_orders(plain_function: Any, inputs: dict[str, Tensor | None], cotangents: Any) -> list[dict[str, Tensor]]:
    """Plain PyTorch with its sums over the width in several orders: with a handful of terms the error of one order is
    chance, and small differences of a pre-activation of 1e3 reach the gradients of x."""
    results = []
    for seed in range(8):
        width = inputs["x"].shape[1]
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed)) if seed else torch.arange(width)
        shuffled = {**inputs, "x": inputs["x"][:, order], "fc1_weight": inputs["fc1_weight"][:, :, order]}
        result = dict(evaluate(plain_function, shuffled, cotangents).items())
        for name in ("gradient of x", "gradient of fc1_weight"):
            if name in result:
                result[name] = result[name][..., order.argsort()]
        results.append(result)
    return results


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("norm_dtype", [None, "as x", torch.float32], ids=str)
@pytest.mark.parametrize("residual_dtype", [None, torch.float32, "as x"], ids=str)
@pytest.mark.parametrize(("width", "hidden"), [(3, 33), (5, 67), (33, 130), (64, 256)])
def test_op_is_as_accurate_as_plain_pytorch(
    dtype: torch.dtype, norm_dtype: Any, residual_dtype: Any, width: int, hidden: int
) -> None:
    partition = Partition((37, 0, 26))
    far = torch.arange(partition.num_rows) % 5 == 2
    inputs = make_inputs(
        partition,
        width,
        hidden,
        dtype,
        norm_dtype=dtype if norm_dtype == "as x" else norm_dtype,
        residual_dtype=dtype if residual_dtype == "as x" else residual_dtype,
        far=far,
    )
    assert_ffn_parity(op(partition), plain(partition), inputs, [~far, far])


@given(
    partition=partitions(min_experts=2, max_count=9),
    width=st.integers(8, 40),
    hidden=st.integers(16, 70),
    dtype=st.sampled_from(LOW_PRECISION),
    residual_dtype=st.sampled_from([None, *LOW_PRECISION]),
    subln=st.booleans(),
    index_dtype=index_dtypes,
    form=st.sampled_from(MEMORY_FORMS),
)
def test_op_parity_over_shapes(
    partition: Partition,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
    subln: bool,
    index_dtype: torch.dtype | None,
    form: str,
) -> None:
    torch.manual_seed(0)
    inputs = make_inputs(
        partition, width, hidden, dtype, norm_dtype=dtype if subln else None, residual_dtype=residual_dtype
    )
    inputs["x"] = in_memory(inputs["x"], form)
    row_index = permutation(partition, index_dtype)
    used = partition.expert_of_row(row_index) >= 0
    assert_ffn_parity(op(partition, row_index), plain(partition, row_index), inputs, [used])


@pytest.mark.parametrize("subln", [False, True], ids=["no sub-LN", "sub-LN"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("index_dtype", [None, torch.int32], ids=str)
def test_padding_rows_never_matter(subln: bool, with_residual: bool, index_dtype: torch.dtype | None) -> None:
    partition = Partition((4, 3), padding=3)
    row_index = permutation(partition, index_dtype)
    used = partition.expert_of_row(row_index) >= 0
    clean = make_inputs(
        partition,
        6,
        11,
        norm_dtype=torch.float64 if subln else None,
        residual_dtype=torch.float64 if with_residual else None,
    )
    expected = evaluate(plain(partition, row_index), clean)
    dirty = dict(clean)
    dirty["x"] = clean["x"].masked_fill(~used.unsqueeze(1), float("nan"))
    cotangents = [c.masked_fill(~used.unsqueeze(1), float("nan")) for c in expected.cotangents]
    for backend in ("auto", "reference"):
        with use_backend(backend):
            actual = evaluate(op(partition, row_index), dirty, cotangents)
            finite = evaluate(op(partition, row_index), clean)
        for name, (value, exact) in by_name(actual, expected):
            select = slice(None) if name.removeprefix("gradient of ") in PARAMETERS else used
            assert_exact(value[select], exact[select], name)
        for name, value in finite.items():
            assert value.isfinite().all(), name
        assert not finite["gradient of x"][~used].count_nonzero()


@pytest.mark.parametrize("function", [multiway_ffn, multiway_ffn_reference])
def test_default_eps_is_the_public_one(function: Any) -> None:
    partition = Partition((4, 3))
    inputs = make_inputs(partition, 6, 11)
    for name in ("x", "fc1_bias"):
        inputs[name] /= 100  # a variance of 1e-4, where eps shows
    actual = function(inputs["x"], *(inputs[name] for name in PARAMETERS), partition.offsets)
    assert_exact(actual, plain(partition, eps=nn.LayerNorm(11).eps)(**inputs))


@pytest.mark.parametrize(
    "wanted",
    [["x"], ["residual"], ["x", "residual"], list(PARAMETERS), *([name] for name in PARAMETERS)],
    ids=lambda wanted: "all parameters" if len(wanted) > 2 else " and ".join(wanted),
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradients_of_some_inputs(wanted: list[str], backend: str) -> None:
    partition = Partition((4, 3))
    inputs = make_inputs(partition, 6, 11, residual_dtype=torch.float64)
    frozen = [name for name in inputs if name not in wanted]
    expected = evaluate(plain(partition), inputs, frozen=frozen)
    with use_backend(backend):
        actual = evaluate(op(partition), inputs, expected.cotangents, frozen=frozen)
    assert_evaluations_exact(actual, expected)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_zero_rows_have_zero_gradients(backend: str) -> None:
    partition = Partition((0, 0))
    with use_backend(backend):
        actual = evaluate(op(partition), make_inputs(partition, 6, 11))
    assert actual["output 0"].shape == (0, 6)
    for name in PARAMETERS:
        gradient = actual.gradients[name]
        assert gradient is not None, name
        assert not gradient.count_nonzero(), name


@pytest.mark.parametrize("subln", [False, True], ids=["no sub-LN", "sub-LN"])
def test_saved_memory(subln: bool) -> None:
    """Of the hidden width only the pre-activation is kept, and only where something but the residual has a gradient."""
    partition, hidden = Partition((40, 30)), 11
    inputs = make_inputs(
        partition, 6, hidden, torch.float32, norm_dtype=torch.float32 if subln else None, residual_dtype=torch.float32
    )
    rows = partition.num_rows
    everything = sorted([rows * hidden, *([rows, rows] if subln else [])])

    def kept(wanted: Any) -> tuple[list[int], list[int]]:
        leaves = {
            name: None if value is None else value.detach().requires_grad_(name in wanted)
            for name, value in inputs.items()
        }
        with RecordedOps() as recorded:
            sizes = saved_elements(lambda: op(partition)(**leaves), [v for v in leaves.values() if v is not None])
        outputs = dict(recorded.calls)["multiway_ffn"]
        return [size for size in sizes if size], sorted(o.numel() for o in outputs[1:] if o.numel())

    assert kept(inputs.keys()) == (everything, everything)
    assert kept(["fc2_bias"]) == (everything, everything)
    assert kept(["residual"]) == ([], [])
    assert kept([]) == ([], [])
    with torch.no_grad():
        assert kept(inputs.keys()) == ([], [])


# --- with the rest of PyTorch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm_dtype", "residual_dtype", "index_dtype", "partition"),
    [
        (None, None, None, Partition((4, 0, 3))),
        (torch.float32, None, torch.int64, Partition((4, 3), padding=2)),
        (torch.float32, torch.float32, None, Partition((4, 3))),
        (None, torch.float64, torch.int32, Partition((7,))),
        (torch.float32, torch.float32, None, Partition((0, 0))),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(
    norm_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    index_dtype: torch.dtype | None,
    partition: Partition,
    dtype: torch.dtype,
) -> None:
    inputs = make_inputs(partition, 6, 11, dtype, norm_dtype=norm_dtype, residual_dtype=residual_dtype)
    for value in inputs.values():
        if value is not None:
            value.requires_grad_()
    x, *parameters, residual = inputs.values()
    offsets, row_index = partition.offsets, permutation(partition, index_dtype)
    ops = torch.ops.beit3_fast
    opcheck(ops.multiway_ffn, (x, *parameters, offsets, residual, row_index, EPS, None, True, None))
    with torch.no_grad():
        _, *saved = ops.multiway_ffn(x, *parameters, offsets, residual, row_index, EPS, None, True, None)
    x, fc1_weight, _, norm_weight, norm_bias, fc2_weight, _ = (
        None if value is None else value.detach() for value in (x, *parameters)
    )
    dy = normal(partition.num_rows, 6, dtype=dtype)
    for needs_x, needs_parameters in ((True, True), (True, False), (False, True)):
        args = (dy, x, fc1_weight, norm_weight, norm_bias, fc2_weight, offsets, row_index, *saved, EPS)
        args += (needs_x, needs_parameters, None)
        opcheck(ops.multiway_ffn_backward, args, test_utils=("test_schema", "test_faketensor"))
    opcheck(ops.multiway_ffn_backward, args)


def test_opcheck_saves_nothing_when_told() -> None:
    partition = Partition((4, 3))
    x, *parameters, _ = make_inputs(partition, 6, 11, torch.float32, norm_dtype=torch.float32).values()
    args = (x, *parameters, partition.offsets, None, None, EPS, None, False, None)
    opcheck(torch.ops.beit3_fast.multiway_ffn, args)
    assert [output.shape for output in torch.ops.beit3_fast.multiway_ffn(*args)[1:]] == [(0,)] * 5


@pytest.mark.parametrize("everything", [False, True])
def test_compiles_without_graph_breaks(everything: bool) -> None:
    torch._dynamo.reset()
    partition = Partition((4, 3))
    dtype = torch.float32 if everything else None
    inputs = make_inputs(partition, 6, 11, torch.float32, norm_dtype=dtype, residual_dtype=dtype)
    offsets, row_index = partition.offsets, permutation(partition, torch.int32 if everything else None)

    def call(x: Tensor, residual: Tensor | None, **p: Tensor | None) -> Tensor:
        return multiway_ffn(x, *p.values(), offsets, residual=residual, row_index=row_index)

    expected = evaluate(call, inputs)
    actual = evaluate(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs, expected.cotangents)
    for name, values in by_name(actual, expected):
        torch.testing.assert_close(*values, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("subln", [False, True], ids=["no sub-LN", "sub-LN"])
def test_autocast(backend: str, subln: bool) -> None:
    partition = Partition((4, 3))
    inputs = make_inputs(
        partition, 8, 33, torch.float32, norm_dtype=torch.float32 if subln else None, residual_dtype=torch.float32
    )
    low = {
        name: value if value is None or name.startswith("norm") else value.bfloat16() for name, value in inputs.items()
    }
    expected = evaluate(plain(partition), {**low, "residual": None})
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        branch = evaluate(op(partition), {**inputs, "residual": None}, expected.cotangents)
        stream = evaluate(op(partition), inputs)
    assert branch["output 0"].dtype == torch.bfloat16
    assert stream["output 0"].dtype == torch.float32
    for name, value in stream.gradients.items():
        assert (None if value is None else value.dtype) == (None if inputs[name] is None else torch.float32)
    for _, (value, exact) in by_name(branch, expected):
        torch.testing.assert_close(value.float(), exact.float(), rtol=3e-2, atol=6e-2)


def test_inference_mode() -> None:
    partition = Partition((4, 3))
    inputs = make_inputs(partition, 6, 11, residual_dtype=torch.float64)
    row_index = permutation(partition, torch.int32)
    expected = plain(partition, row_index)(**inputs)
    with torch.inference_mode(), RecordedOps() as recorded:
        actual = op(partition, row_index)(**inputs)
    assert [output.shape for output in dict(recorded.calls)["multiway_ffn"][1:]] == [(0,)] * 5
    assert actual.is_inference()
    assert not actual.requires_grad
    assert_exact(actual, expected)


# --- bad input --------------------------------------------------------------------------------------------------------


GOOD: dict[str, Any] = {
    "x": torch.zeros(7, 6),
    "fc1_weight": torch.zeros(2, 11, 6),
    "fc1_bias": torch.zeros(2, 11),
    "norm_weight": torch.ones(2, 11),
    "norm_bias": torch.zeros(2, 11),
    "fc2_weight": torch.zeros(2, 6, 11),
    "fc2_bias": torch.zeros(2, 6),
    "expert_offsets": Partition((4, 3)).offsets,
    "residual": torch.zeros(7, 6),
    "row_index": torch.arange(7),
}
BAD: list[tuple[dict[str, Any], type, str]] = [
    ({"x": None}, TypeError, "x"),
    ({"x": torch.zeros(6)}, ValueError, "x"),
    ({"x": torch.zeros(7, 6, dtype=torch.int64)}, ValueError, "x"),
    *[({name: 0.0}, TypeError, name) for name in PARAMETERS],
    *[({name: GOOD[name][0]}, ValueError, name) for name in PARAMETERS],
    *[({name: GOOD[name][:, :-1]}, ValueError, name) for name in PARAMETERS[1:]],
    *[({name: GOOD[name][:1]}, ValueError, name) for name in PARAMETERS[1:]],
    *[({name: GOOD[name].to("meta")}, ValueError, name) for name in PARAMETERS],
    *[({name: GOOD[name].double()}, ValueError, name) for name in PARAMETERS if not name.startswith("norm")],
    *[({name: GOOD[name].long()}, ValueError, name) for name in PARAMETERS],
    ({"fc1_weight": torch.zeros(2, 11, 5)}, ValueError, "fc1_weight"),
    ({"fc2_weight": torch.zeros(2, 6, 10)}, ValueError, "fc2_weight"),
    ({"norm_weight": None}, ValueError, "norm_weight"),
    ({"norm_bias": None}, ValueError, "norm_bias"),
    ({"expert_offsets": [0, 4, 7]}, TypeError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([0, 4, 7])}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([0, 7], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([1, 4, 7], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([0, 5, 4], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": torch.tensor([0, 4, 8], dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"expert_offsets": meta(3, dtype=torch.int32)}, ValueError, "expert_offsets"),
    ({"residual": 0.0}, TypeError, "residual"),
    ({"residual": torch.zeros(7, 11)}, ValueError, "residual"),
    ({"residual": torch.zeros(7, 6, dtype=torch.int64)}, ValueError, "residual"),
    ({"residual": meta(7, 6)}, ValueError, "residual"),
    ({"row_index": list(range(7))}, TypeError, "row_index"),
    ({"row_index": torch.arange(6)}, ValueError, "row_index"),
    ({"row_index": torch.arange(7.0)}, ValueError, "row_index"),
    ({"row_index": torch.arange(7) + 1}, ValueError, "row_index"),
    ({"row_index": meta(7, dtype=torch.int64)}, ValueError, "row_index"),
    ({"eps": "small"}, TypeError, "eps"),
    ({"eps": -1.0}, ValueError, "eps"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("bad", "error", "name"), BAD)
def test_bad_input(bad: dict[str, Any], error: type, name: str, backend: str) -> None:
    with use_backend(backend):
        assert_refuses(multiway_ffn, GOOD, bad, error, name)
