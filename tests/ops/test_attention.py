"""ops.attention against torchscale's MultiheadAttention and F.scaled_dot_product_attention, sample by sample."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracles import public
from torch import Tensor, nn
from torch.library import opcheck
from torchscale.component.multihead_attention import MultiheadAttention

from beit3_fast.backend import use_backend
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import attention, attention_reference
from ops.parity import (
    LOW_PRECISION,
    RecordedOps,
    assert_evaluations_exact,
    assert_exact,
    assert_parity,
    assert_refuses,
    by_name,
    evaluate,
    in_double,
    meta,
    normal,
    saved_elements,
)

MASKS = ("full", "captioning", "causal")
Lengths = Sequence[tuple[int, int]]  # (vision, text) of every sample

LENGTHS: dict[str, Lengths] = {
    "uneven": [(5, 3), (2, 7), (4, 1)],
    "one sample": [(4, 3)],
    "no text": [(5, 0), (3, 0)],
    "no vision": [(0, 4), (0, 1)],
    "a sample of one modality": [(4, 0), (0, 5), (3, 2)],
    "a sample without tokens": [(3, 2), (0, 0), (2, 4)],
    "no tokens at all": [(0, 0), (0, 0)],
    "single tokens": [(1, 0), (0, 1), (1, 1)],
}
lengths_strategy = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)


def layout_of(lengths: Lengths, padding: int = 0) -> TokenLayout:
    """The layout of those lengths, with `padding` unused rows at the end as when only the device knows the lengths."""
    layout = TokenLayout.from_lengths([v for v, _ in lengths], [t for _, t in lengths])
    return dataclasses.replace(layout, num_rows=layout.num_rows + padding, text_lengths=None) if padding else layout


def rows_of(lengths: Lengths) -> list[list[int]]:
    """Every sample's row numbers, vision first: counted one by one."""
    vision, text = 0, sum(v for v, _ in lengths)
    rows = []
    for v, t in lengths:
        rows.append([*range(vision, vision + v), *range(text, text + t)])
        vision, text = vision + v, text + t
    return rows


def allowed(mask: str | Tensor, vision: int, length: int) -> Tensor:
    """(length, length) bool, True where the query (row) sees the key (column): the rule, one pair at a time."""

    def sees(query: int, key: int) -> bool:
        if isinstance(mask, Tensor):
            return not mask[query, key]
        if mask == "full":
            return True
        if mask == "causal":
            return key <= query
        if key < vision:  # image keys are open to image and text
            return True
        return query >= vision and key <= query  # text is seen by text, itself and later

    return torch.tensor([[sees(q, k) for k in range(length)] for q in range(length)]).view(length, length)


def _by_sample(core: Any, lengths: Lengths, mask: str | Tensor) -> Any:
    """(N, 3, H, d) -> (N, H * d) through ``core(q, k, v, allowed)`` on (1, H, S, d) of one sample after the other."""

    def call(qkv: Tensor) -> Tensor:
        out = 0 * qkv[:, 0]
        for (vision, _), rows in zip(lengths, rows_of(lengths), strict=True):
            if rows:
                q, k, v = qkv[rows].permute(1, 2, 0, 3).unsqueeze(1)
                y = core(q, k, v, allowed(mask, vision, len(rows)))  # [1, H, S, d]
                out = out.index_copy(0, torch.tensor(rows), y[0].transpose(0, 1))
        return out.flatten(1)

    return call


def by_sdpa(lengths: Lengths, mask: str | Tensor, scale: float | None = None) -> Any:
    def core(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)

    return _by_sample(core, lengths, mask)


def by_torchscale(lengths: Lengths, mask: str | Tensor, scale: float | None = None) -> Any:
    """The public module with its projections taken out: what is left is the attention product, softmax in fp32."""

    def core(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        heads, head_dim = q.shape[1], q.shape[3]
        args = SimpleNamespace(multiway=False, xpos_rel_pos=False, layernorm_eps=1e-5)
        module = MultiheadAttention(args, heads * head_dim, heads, self_attention=True)
        module.q_proj = module.k_proj = module.v_proj = module.out_proj = nn.Identity()
        if scale is not None:
            module.scaling = scale
        forbidden = torch.zeros(visible.shape).masked_fill(~visible, -1e8).to(q.dtype)  # as the public encoder does
        # cloned, because the public code scales the query in place
        merged = [t.transpose(1, 2).flatten(2).clone() for t in (q, k, v)]
        out, _ = module(*merged, attn_mask=forbidden)
        return out.unflatten(2, (heads, head_dim)).transpose(1, 2)

    return _by_sample(core, lengths, mask)


def op(lengths: Lengths, mask: str | Tensor = "full", scale: float | None = None, padding: int = 0) -> Any:
    layout = layout_of(lengths, padding)
    return lambda qkv: attention(qkv, layout, qkv.shape[2], mask=mask, scale=scale)


def reference(lengths: Lengths, mask: str | Tensor = "full", scale: float | None = None) -> Any:
    layout = layout_of(lengths)
    return lambda qkv: attention_reference(qkv, layout, qkv.shape[2], mask=mask, scale=scale)


def random_qkv(
    lengths: Lengths, heads: int, head_dim: int, dtype: torch.dtype = torch.float64, padding: int = 0
) -> Tensor:
    return normal(sum(v + t for v, t in lengths) + padding, 3, heads, head_dim, dtype=dtype)


def random_mask(size: int) -> Tensor:
    """A bool mask of no pattern in which every query sees at least itself."""
    return (torch.rand(size, size) < 0.4).logical_and(~torch.eye(size, dtype=torch.bool))


def longest(lengths: Lengths) -> int:
    return max(v for v, _ in lengths) + max(t for _, t in lengths)


masks = st.sampled_from([*MASKS, "tensor"])


def mask_for(name: str, lengths: Lengths) -> str | Tensor:
    return random_mask(longest(lengths)) if name == "tensor" else name


# --- the reference against code that is not ours ----------------------------------------------------------------------


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("name", [*MASKS, "tensor"])
def test_reference_is_torchscale(lengths: Lengths, name: str) -> None:
    mask = mask_for(name, lengths)
    inputs = {"qkv": random_qkv(lengths, 2, 5)}
    actual = evaluate(reference(lengths, mask), inputs)
    expected = evaluate(by_torchscale(lengths, mask), inputs, actual.cotangents)
    # the public code takes the softmax through fp32 whatever the dtype
    assert_evaluations_exact(actual, expected, tolerance=2e-6)


@pytest.mark.parametrize(("vision", "text"), [(5, 4), (2, 1), (1, 3)])
def test_captioning_mask_is_the_public_one(vision: int, text: int) -> None:
    """The mask that the public BEiT3ForCaptioning.forward hands to its encoder, caught there."""
    seen = {}

    def encoder(*, attn_mask: Tensor, **_: Any) -> dict[str, Tensor]:
        seen["mask"] = attn_mask
        return {"encoder_out": torch.zeros(1, vision + text, 1)}

    encoder.vision_embed = SimpleNamespace(num_position_embeddings=lambda: vision)
    model = SimpleNamespace(beit3=encoder, mlm_head=nn.Identity())
    public.modeling.BEiT3ForCaptioning.forward(model, torch.zeros(1), torch.zeros(1, text), None, None)
    assert torch.equal(allowed("captioning", vision, vision + text), seen["mask"] == 0)
    lengths = [(vision, text)]
    inputs = {"qkv": random_qkv(lengths, 2, 4)}
    for function in (op, reference):
        by_name = evaluate(function(lengths, "captioning"), inputs)
        by_mask = evaluate(function(lengths, seen["mask"]), inputs, by_name.cotangents)  # int64, 1 = forbidden
        assert_evaluations_exact(by_name, by_mask)


@given(
    lengths=lengths_strategy,
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    name=masks,
    scale=st.sampled_from([None, 0.3, 1.0]),
)
def test_reference_is_sdpa_in_float64(
    lengths: Lengths, heads: int, head_dim: int, name: str, scale: float | None
) -> None:
    torch.manual_seed(0)
    mask = mask_for(name, lengths)
    inputs = {"qkv": random_qkv(lengths, heads, head_dim)}
    actual = evaluate(reference(lengths, mask, scale), inputs)
    assert_evaluations_exact(actual, evaluate(by_sdpa(lengths, mask, scale), inputs, actual.cotangents))


# --- the dispatched op ------------------------------------------------------------------------------------------------


@given(
    lengths=lengths_strategy,
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 9),
    name=masks,
    scale=st.sampled_from([None, 0.3]),
    form=st.sampled_from(["contiguous", "heads first", "last dimension apart"]),
    cotangent_form=st.sampled_from(["contiguous", "transposed"]),
)
def test_op_is_sdpa_in_float64(
    lengths: Lengths,
    heads: int,
    head_dim: int,
    name: str,
    scale: float | None,
    form: str,
    cotangent_form: str,
) -> None:
    torch.manual_seed(0)
    mask = mask_for(name, lengths)
    qkv = random_qkv(lengths, heads, head_dim)
    if form != "contiguous":
        order = (2, 1, 0, 3) if form == "heads first" else (0, 1, 3, 2)
        inverse = order  # both swaps undo themselves
        qkv = qkv.permute(order).contiguous().permute(inverse)
    expected = evaluate(by_sdpa(lengths, mask, scale), {"qkv": qkv})
    cotangent = expected.cotangents[0]
    if cotangent_form == "transposed":
        cotangent = cotangent.t().contiguous().t()
    actual = evaluate(op(lengths, mask, scale), {"qkv": qkv}, [cotangent])
    assert_evaluations_exact(actual, expected)
    with torch.no_grad():  # nothing is saved for a backward: another way through
        assert_exact(op(lengths, mask, scale)(qkv), expected["output 0"])


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("name", [*MASKS, "tensor"])
@pytest.mark.parametrize("head_dim", [4, 24, 64, 88])
def test_op_is_as_accurate_as_plain_pytorch(dtype: torch.dtype, name: str, head_dim: int) -> None:
    lengths = [(17, 9), (1, 30), (0, 12), (20, 0), (1, 0)]
    mask = mask_for(name, lengths)
    inputs = {"qkv": random_qkv(lengths, 2, head_dim, dtype)}
    actual = evaluate(op(lengths, mask), inputs)
    yardstick = evaluate(by_torchscale(lengths, mask), inputs, actual.cotangents)
    truth = evaluate(by_sdpa(lengths, mask), in_double(inputs), actual.cotangents)
    # a mean of values whose weights, exponentials in fp32, are known to an ulp or two
    largest = truth["output 0"].abs().max(), inputs["qkv"][:, 2].double().abs().max()
    floor = (torch.finfo(dtype).eps * largest[0] + 2 * torch.finfo(torch.float32).eps * largest[1]).item()
    assert_parity(actual["output 0"], yardstick["output 0"], truth["output 0"], dtype, "output", floor)
    for part, what in enumerate("qkv"):
        got, plain, exact = (e["gradient of qkv"][:, part] for e in (actual, yardstick, truth))
        assert_parity(got, plain, exact, dtype, f"gradient of {what}")
    with torch.no_grad():
        got = op(lengths, mask)(**inputs)
        assert_parity(got, yardstick["output 0"], truth["output 0"], dtype, "output without gradients", floor)


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("name", [*MASKS, "tensor"])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_lengths(lengths: Lengths, name: str, dtype: torch.dtype) -> None:
    mask = mask_for(name, lengths)
    inputs = {"qkv": random_qkv(lengths, 2, 24, dtype)}
    actual = evaluate(op(lengths, mask), inputs)
    assert actual["output 0"].dtype == actual["gradient of qkv"].dtype == dtype
    truth = evaluate(by_sdpa(lengths, mask), in_double(inputs), actual.cotangents)
    tolerance = 16 * torch.finfo(dtype).eps
    for what, (value, exact) in by_name(actual, truth):
        assert_exact(value.double(), exact, what, tolerance)


@pytest.mark.parametrize("name", [*MASKS, "tensor"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_padding_rows_never_matter(name: str, backend: str) -> None:
    lengths, padding = [(3, 2), (2, 4)], 3
    mask = mask_for(name, lengths)
    used = sum(map(sum, lengths))
    clean = random_qkv(lengths, 2, 4)
    expected = evaluate(by_sdpa(lengths, mask), {"qkv": clean})
    dirty = torch.cat([clean, clean.new_full((padding, 3, 2, 4), float("nan"))])
    cotangent = torch.cat([expected.cotangents[0], clean.new_full((padding, 8), float("nan"))])
    with use_backend(backend):
        actual = evaluate(op(lengths, mask, padding=padding), {"qkv": dirty}, [cotangent])
    assert_exact(actual["output 0"][:used], expected["output 0"])
    assert_exact(actual["gradient of qkv"][:used], expected["gradient of qkv"])
    assert not actual["gradient of qkv"][used:].count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_queries_that_may_see_nothing_give_zeros(dtype: torch.dtype, backend: str) -> None:
    lengths = [(3, 2), (2, 3)]
    mask = random_mask(6)
    blind = [0, 3]
    mask[blind] = True
    visible = mask.clone()
    visible[blind] = False
    keep = torch.ones(10, 1, dtype=torch.float64)
    keep[[rows[position] for rows in rows_of(lengths) for position in blind]] = 0
    inputs = {"qkv": random_qkv(lengths, 2, 8, dtype)}
    expected = evaluate(lambda qkv: by_sdpa(lengths, visible)(qkv) * keep, in_double(inputs))
    with use_backend(backend):
        actual = evaluate(op(lengths, mask), inputs, expected.cotangents)
        with torch.no_grad():
            alone = op(lengths, mask)(**inputs)
    for out in (actual["output 0"], alone):
        assert not out[keep.flatten() == 0].count_nonzero()
    assert not actual["gradient of qkv"][keep.flatten() == 0, 0].count_nonzero()
    tolerance = max(1e-12, 16 * torch.finfo(dtype).eps)
    for name, (value, exact) in by_name(actual, expected):
        assert_exact(value.double(), exact, name, tolerance)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_nothing_may_be_seen_at_all(backend: str) -> None:
    lengths = [(3, 2), (0, 0), (0, 1)]
    with use_backend(backend):
        actual = evaluate(op(lengths, torch.ones(5, 5, dtype=torch.uint8)), {"qkv": random_qkv(lengths, 2, 4)})
    assert not actual["output 0"].count_nonzero()
    assert not actual["gradient of qkv"].count_nonzero()


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_zero_rows_have_zero_gradients(backend: str) -> None:
    qkv = random_qkv([(0, 0)], 2, 4).requires_grad_()
    with use_backend(backend):
        out = op([(0, 0)])(qkv)
    assert out.shape == (0, 8)
    assert out.requires_grad
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("dtype", [torch.float64, *LOW_PRECISION], ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_logits_of_ten_thousand(dtype: torch.dtype, backend: str, grad: bool) -> None:
    """Every query scores +1e4 with its own key and -1e4 with the others: the output is that key's value, exactly."""
    lengths, head_dim = [(5, 3), (2, 6)], 64
    rows = sum(map(sum, lengths))
    size = (1e4 * head_dim**0.5) ** 0.5
    qkv = torch.zeros(rows, 3, 1, head_dim, dtype=torch.float64)
    for sample in rows_of(lengths):
        for position, row in enumerate(sample):
            qkv[row, 0, 0, position] = size
            qkv[row, 1, 0] = -size
            qkv[row, 1, 0, position] = size
    qkv[:, 2] = torch.randn(rows, 1, head_dim)
    qkv = qkv.to(dtype)
    with use_backend(backend):
        if not grad:
            assert torch.equal(op(lengths)(qkv), qkv[:, 2].flatten(1))
            return
        actual = evaluate(op(lengths), {"qkv": qkv})
    assert torch.equal(actual["output 0"], qkv[:, 2].flatten(1))
    gradient = actual["gradient of qkv"]
    assert torch.equal(gradient[:, 2].flatten(1), actual.cotangents[0])
    # softmax is flat here; what is left of p * (dp - sum(p dp)) is rounding, times the keys
    rounding = torch.finfo(dtype).eps * size * head_dim
    assert gradient.isfinite().all()
    assert gradient[:, :2].abs().max() <= rounding


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("name", [*MASKS, "tensor"])
def test_random_large_logits_are_finite(dtype: torch.dtype, name: str) -> None:
    lengths = [(5, 3), (2, 6)]
    mask = mask_for(name, lengths)
    qkv = random_qkv(lengths, 2, 24, torch.float64)
    scores = torch.einsum("ihd,jhd->hij", qkv[:, 0], qkv[:, 1]) * 24**-0.5
    qkv[:, :2] *= (1e4 / scores.abs().max()).sqrt()
    actual = evaluate(op(lengths, mask), {"qkv": qkv.to(dtype)})
    for what, value in actual.items():
        assert value.isfinite().all(), what
    with torch.no_grad():
        assert op(lengths, mask)(qkv.to(dtype)).isfinite().all()
    exact = evaluate(op(lengths, mask), {"qkv": qkv})
    expected = evaluate(by_sdpa(lengths, mask), {"qkv": qkv}, exact.cotangents)
    assert_evaluations_exact(exact, expected, tolerance=1e-9)  # scores of 1e4 are known to 1e-12


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_three_tensors(backend: str) -> None:
    lengths = [(3, 2), (2, 4)]
    layout = layout_of(lengths)
    fused = random_qkv(lengths, 2, 4)
    expected = evaluate(by_sdpa(lengths, "captioning"), {"qkv": fused})
    q, k, v = (part.contiguous() for part in fused.unbind(1))
    with use_backend(backend):
        actual = evaluate(
            lambda q, k, v: attention((q, k, v), layout, 2, mask="captioning"),
            {"q": q, "k": k, "v": v},
            expected.cotangents,
        )
    assert_exact(attention_reference((q, k, v), layout, 2, mask="captioning"), expected["output 0"])
    assert_exact(actual["output 0"], expected["output 0"])
    for part, name in enumerate("qkv"):
        assert_exact(actual[f"gradient of {name}"], expected["gradient of qkv"][:, part], name)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("extra", [0, 3])
def test_mask_tensors(dtype: torch.dtype, extra: int) -> None:
    """1 = forbidden, as the public code has it; a mask may be larger than the longest sample."""
    lengths = [(3, 2), (2, 4)]
    mask = random_mask(longest(lengths) + extra)
    inputs = {"qkv": random_qkv(lengths, 2, 4)}
    expected = evaluate(by_sdpa(lengths, mask), inputs)
    assert_evaluations_exact(evaluate(op(lengths, mask.to(dtype)), inputs, expected.cotangents), expected)
    assert_evaluations_exact(evaluate(reference(lengths, mask.to(dtype)), inputs, expected.cotangents), expected)


def test_saved_memory() -> None:
    """The backward needs the input, the output and one number a row and head; without gradients nothing is kept."""
    lengths, heads, head_dim = [(30, 20), (10, 40)], 2, 8
    rows = 100

    def kept(requires_grad: bool) -> tuple[list[int], int]:
        qkv = random_qkv(lengths, heads, head_dim, torch.float32).requires_grad_(requires_grad)
        with RecordedOps() as recorded:
            sizes = saved_elements(lambda: op(lengths, "captioning")(qkv), [qkv])
        ((_, (_, lse)),) = recorded.calls
        return sizes, lse.numel()

    assert kept(True) == ([rows * heads, rows * heads * head_dim], rows * heads)
    assert kept(False) == ([], 0)
    with torch.no_grad():
        assert kept(True) == ([], 0)


# --- with the rest of PyTorch -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*MASKS, "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [LENGTHS["a sample without tokens"], LENGTHS["no tokens at all"]])
def test_opcheck(name: str, dtype: torch.dtype, lengths: Lengths) -> None:
    layout = layout_of(lengths)
    forbidden = random_mask(layout.width) if name == "tensor" else None
    mask = "full" if name == "tensor" else name
    qkv = random_qkv(lengths, 2, 4, dtype).requires_grad_()
    ops = torch.ops.beit3_fast
    opcheck(ops.attention, (qkv, layout.segments, forbidden, mask, 0.5, layout.width, True))
    opcheck(ops.attention, (qkv.detach(), layout.segments, forbidden, mask, 0.5, layout.width, False))
    with torch.no_grad():
        out, lse = ops.attention(qkv, layout.segments, forbidden, mask, 0.5, layout.width, True)
    args = (torch.randn_like(out), qkv.detach(), out, lse, layout.segments, forbidden, mask, 0.5, layout.width)
    opcheck(ops.attention_backward, args)


@pytest.mark.parametrize("name", ["full", "captioning", "tensor"])
def test_compiles_without_graph_breaks(name: str) -> None:
    torch._dynamo.reset()
    lengths = [(3, 2), (2, 4)]
    mask = mask_for(name, lengths)
    layout = layout_of(lengths)

    def call(qkv: Tensor, layout: TokenLayout) -> Tensor:
        return attention(qkv, layout, 2, mask=mask)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    inputs = {"qkv": random_qkv(lengths, 2, 4, torch.float32)}
    expected = evaluate(lambda qkv: call(qkv, layout), inputs)
    actual = evaluate(lambda qkv: compiled(qkv, layout), inputs, expected.cotangents)
    for what, values in by_name(actual, expected):
        torch.testing.assert_close(*values, msg=lambda text, what=what: f"{what}: {text}")


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["full", "captioning"])
def test_autocast(backend: str, name: str) -> None:
    lengths = [(3, 2), (2, 4)]
    inputs = {"qkv": random_qkv(lengths, 2, 8, torch.float32)}
    expected = evaluate(by_sdpa(lengths, name), in_double(inputs))
    with use_backend(backend), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = evaluate(op(lengths, name), inputs, expected.cotangents)
    assert actual["output 0"].dtype == torch.bfloat16
    assert actual["gradient of qkv"].dtype == torch.float32
    for _, (value, exact) in by_name(actual, expected):
        torch.testing.assert_close(value.double(), exact, rtol=3e-2, atol=3e-2)


def test_inference_mode() -> None:
    lengths = [(3, 2), (2, 4)]
    qkv = random_qkv(lengths, 2, 4)
    expected = by_sdpa(lengths, "captioning")(qkv)
    with torch.inference_mode(), RecordedOps() as recorded:
        actual = op(lengths, "captioning")(qkv)
    ((name, (_, lse)),) = recorded.calls
    assert name == "attention"
    assert lse.shape == (0,)
    assert actual.is_inference()
    assert not actual.requires_grad
    assert_exact(actual, expected)


# --- bad input --------------------------------------------------------------------------------------------------------

_Q = torch.zeros(11, 2, 4)
BAD: list[tuple[dict[str, Any], type, str]] = [
    ({"qkv": None}, TypeError, "qkv"),
    ({"qkv": 3}, TypeError, "qkv"),
    ({"qkv": [1, 2, 3]}, TypeError, "qkv"),
    ({"qkv": (_Q, _Q)}, ValueError, "qkv"),
    ({"qkv": (_Q, _Q, _Q[:10])}, ValueError, "qkv"),
    ({"qkv": (_Q, _Q, _Q.double())}, ValueError, "qkv"),
    ({"qkv": (_Q, _Q, _Q.to("meta"))}, ValueError, "qkv"),
    ({"qkv": torch.zeros(11, 24)}, ValueError, "qkv"),
    ({"qkv": torch.zeros(10, 3, 2, 4)}, ValueError, "qkv"),
    ({"qkv": torch.zeros(11, 2, 2, 4)}, ValueError, "qkv"),
    ({"qkv": torch.zeros(11, 3, 2, 0)}, ValueError, "qkv"),
    ({"qkv": torch.zeros(11, 3, 2, 4, dtype=torch.int64)}, ValueError, "qkv"),
    ({"qkv": meta(11, 3, 2, 4)}, ValueError, "qkv"),
    ({"layout": None}, TypeError, "layout"),
    ({"layout": torch.tensor([0, 5, 11])}, TypeError, "layout"),
    ({"layout": layout_of([(3, 2)])}, ValueError, "layout"),
    ({"layout": TokenLayout.from_lengths([3, 2], [2, 4], device="meta")}, ValueError, "layout"),
    ({"num_heads": 4}, ValueError, "num_heads"),
    ({"num_heads": 0}, ValueError, "num_heads"),
    ({"mask": "bidirectional"}, ValueError, "mask"),
    ({"mask": None}, ValueError, "mask"),
    ({"mask": torch.zeros(7, 7)}, ValueError, "mask"),
    ({"mask": torch.zeros(7, 7, dtype=torch.complex64)}, ValueError, "mask"),
    ({"mask": torch.zeros(6, 6, dtype=torch.bool)}, ValueError, "mask"),
    ({"mask": torch.zeros(7, 8, dtype=torch.bool)}, ValueError, "mask"),
    ({"mask": torch.zeros(2, 7, 7, dtype=torch.bool)}, ValueError, "mask"),
    ({"mask": meta(7, 7, dtype=torch.bool)}, ValueError, "mask"),
    ({"scale": "big"}, TypeError, "scale"),
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("bad", "error", "name"), BAD)
def test_bad_input(bad: dict[str, Any], error: type, name: str, backend: str) -> None:
    good = {"qkv": torch.zeros(11, 3, 2, 4), "layout": layout_of([(3, 2), (2, 4)]), "num_heads": 2}
    with use_backend(backend):
        assert_refuses(attention, good, bad, error, name)
