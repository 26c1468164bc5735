"""ops.route_tokens against sorting in Python, and together with the ops that take its result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from beit3_fast.backend import use_backend
from beit3_fast.ops import layer_norm, multiway_ffn, multiway_linear, route_tokens, route_tokens_reference
from ops.parity import RecordedOps, affine, assert_exact, assert_refuses, meta, normal

experts_and_ids = st.integers(1, 5).flatmap(
    lambda experts: st.tuples(st.just(experts), st.lists(st.integers(0, experts - 1), max_size=40))
)


def by_hand(ids: list[int], num_experts: int) -> tuple[list[int], list[int]]:
    order = sorted(range(len(ids)), key=ids.__getitem__)  # Python's sort is stable
    return order, [sum(i < expert for i in ids) for expert in range(num_experts + 1)]


@given(case=experts_and_ids, dtype=st.sampled_from([torch.int32, torch.int64]), strided=st.booleans())
def test_is_a_stable_sort(case: tuple[int, list[int]], dtype: torch.dtype, strided: bool) -> None:
    torch.manual_seed(0)
    num_experts, ids = case
    expert_ids = torch.tensor(ids, dtype=dtype)
    if strided:
        expert_ids = torch.stack([expert_ids, 1 - expert_ids], dim=1)[:, 0]
    order, offsets = by_hand(ids, num_experts)
    with use_backend("reference"):
        switched = route_tokens(expert_ids, num_experts)
    for result in (
        route_tokens(expert_ids, num_experts),
        route_tokens_reference(expert_ids, num_experts),
        switched,
    ):
        row_index, expert_offsets = result
        assert row_index.dtype == expert_offsets.dtype == torch.int32
        assert row_index.tolist() == order
        assert expert_offsets.tolist() == offsets


@given(case=experts_and_ids)
def test_routed_tokens_reach_their_expert(case: tuple[int, list[int]]) -> None:
    """Tokens in any order through a linear layer, a feed-forward block and a LayerNorm: as if each were alone."""
    torch.manual_seed(0)
    experts, ids = case
    tokens, width, hidden = len(ids), 3, 5
    x = normal(tokens, width)
    w1, b1, w2, b2 = (
        normal(experts, hidden, width),
        normal(experts, hidden),
        normal(experts, width, hidden),
        normal(experts, width),
    )
    scale, shift = affine(experts, hidden), normal(experts, hidden)
    row_index, offsets = route_tokens(torch.tensor(ids, dtype=torch.int64), experts)
    linear = multiway_linear(x, w1, b1, offsets, row_index=row_index)
    ffn = multiway_ffn(x, w1, b1, scale, shift, w2, b2, offsets, row_index=row_index)
    normed = layer_norm(linear[row_index.long()], scale, shift, offsets)
    for token, e in enumerate(ids):
        up = F.linear(x[token], w1[e], b1[e])
        assert_exact(linear[token], up)
        activated = F.layer_norm(F.gelu(up), (hidden,), scale[e], shift[e])
        assert_exact(ffn[token], F.linear(activated, w2[e], b2[e]))
    for position, token in enumerate(row_index.tolist()):
        e = ids[token]
        assert_exact(normed[position], F.layer_norm(linear[token], (hidden,), scale[e], shift[e]))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("ids", [[1, 0, 1, 1, 0], [2], []], ids=str)
def test_opcheck(dtype: torch.dtype, ids: list[int]) -> None:
    opcheck(torch.ops.beit3_fast.route_tokens, (torch.tensor(ids, dtype=dtype), 3))


def test_compiles_without_graph_breaks() -> None:
    torch._dynamo.reset()
    weight, bias = normal(3, 5, 4), normal(3, 5)

    def call(x: Tensor, ids: Tensor) -> Tensor:
        row_index, offsets = route_tokens(ids, 3)
        return multiway_linear(x, weight, bias, offsets, row_index=row_index)

    x, ids = normal(9, 4), torch.randint(0, 3, (9,))
    expected = torch.stack([F.linear(row, weight[e], bias[e]) for row, e in zip(x, ids, strict=True)])
    assert_exact(torch.compile(call, fullgraph=True, backend="aot_eager")(x, ids), expected)


def test_inference_mode() -> None:
    ids = torch.tensor([1, 0, 1])
    with torch.inference_mode(), RecordedOps() as recorded:
        row_index, offsets = route_tokens(ids, 2)
    assert [name for name, _ in recorded.calls] == ["route_tokens"]
    assert row_index.tolist() == [1, 0, 2]
    assert offsets.tolist() == [0, 1, 3]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_waits_for_no_device(backend: str) -> None:
    """On the meta device there are no values to wait for: asking for one is an error."""
    with use_backend(backend):
        row_index, offsets = route_tokens(meta(9, dtype=torch.int64), 3)
    assert (row_index.shape, row_index.dtype, row_index.device.type) == ((9,), torch.int32, "meta")
    assert (offsets.shape, offsets.dtype, offsets.device.type) == ((4,), torch.int32, "meta")


BAD: list[tuple[dict[str, Any], type, str]] = [
    ({"expert_ids": [0, 1]}, TypeError, "expert_ids"),
    ({"expert_ids": None}, TypeError, "expert_ids"),
    ({"expert_ids": torch.zeros(3)}, ValueError, "expert_ids"),
    ({"expert_ids": torch.zeros(3, dtype=torch.bool)}, ValueError, "expert_ids"),
    ({"expert_ids": torch.zeros(1, 3, dtype=torch.int64)}, ValueError, "expert_ids"),
    ({"expert_ids": torch.tensor([0, 2])}, ValueError, "expert_ids"),
    ({"expert_ids": torch.tensor([0, -1])}, ValueError, "expert_ids"),
    ({"num_experts": 0}, ValueError, "num_experts"),
    ({"num_experts": -1}, ValueError, "num_experts"),
    ({"num_experts": 2.0}, ValueError, "num_experts"),
    ({"num_experts": None}, ValueError, "num_experts"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("bad", "error", "name"), BAD)
def test_bad_input(bad: dict[str, Any], error: type, name: str, backend: str) -> None:
    with use_backend(backend):
        assert_refuses(route_tokens, {"expert_ids": torch.tensor([0, 1]), "num_experts": 2}, bad, error, name)
