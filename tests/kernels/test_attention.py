"""The Triton attention, forward and backward, against float64 and plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from beit3_fast.kernels import attention as kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from ops.parity import RecordedOps, assert_parity, evaluate, in_double
from ops.test_attention import MASKS, Lengths, by_sdpa, by_torchscale, layout_of, op, random_qkv, rows_of
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from beit3_fast.ops import attention

from .conftest import DTYPES, EXAMPLES
from .guards import GuardedAllocations

# around the tiles of 32 and 64; one modality; a sample without tokens; a single token
LENGTHS: list[Lengths] = [
    [(70, 13), (5, 30), (0, 40), (33, 0)],
    [(63, 1), (64, 0), (64, 1), (65, 31), (31, 1), (0, 32), (0, 0), (1, 0)],
]


def check(launches: Any, lengths: Lengths, mask: str, qkv: torch.Tensor, **options: Any) -> None:
    """Output and the gradients of q, k and v are as near to float64 as the public code's."""
    inputs, dtype = {"qkv": qkv}, qkv.dtype
    with launches(**options) as log, RecordedOps() as recorded:
        actual = evaluate(op(lengths, mask), inputs)
    assert {name for name, _ in recorded.calls} == {"attention", "attention_backward"}
    names = [name for name, _ in log]
    assert not names or names == [
        "_attention_kernel",
        "_delta_kernel",
        "_key_gradient_kernel",
        "_query_gradient_kernel",
    ]
    yardstick = evaluate(by_torchscale(lengths, mask), inputs, actual.cotangents)
    truth = evaluate(by_sdpa(lengths, mask), in_double(inputs), actual.cotangents)
    # a mean of values whose weights, exponentials in fp32, are known to an ulp or two
    largest = truth["output 0"].abs().max(), qkv[:, 2].double().abs().max()
    floor = (torch.finfo(dtype).eps * largest[0] + 4 * torch.finfo(torch.float32).eps * largest[1]).item()
    assert_parity(actual["output 0"], yardstick["output 0"], truth["output 0"], dtype, "output", floor)
    for part, what in enumerate("qkv"):
        got, plain, exact = (e["gradient of qkv"][:, part] for e in (actual, yardstick, truth))
        floor = 4 * torch.finfo(dtype).eps * exact.abs().max().item()
        assert_parity(got, plain, exact, dtype, f"gradient of {what}", floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=["uneven", "tile edges"])
def test_parity(launches: Any, lengths: Lengths, mask: str, dtype: torch.dtype) -> None:
    check(launches, lengths, mask, random_qkv(lengths, 2, 64, dtype))


@pytest.mark.parametrize("head_dim", [8, 16, 24, 88, 128])
def test_head_dims(launches: Any, head_dim: int) -> None:
    lengths = [(40, 9), (0, 12)]
    check(launches, lengths, "captioning", random_qkv(lengths, 2, head_dim, DTYPES[-1]))


@settings(max_examples=EXAMPLES)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 80), st.integers(0, 40)), min_size=1, max_size=3).filter(
        lambda samples: any(v + t for v, t in samples)
    ),
    mask=st.sampled_from(MASKS),
    dtype=st.sampled_from(DTYPES),
)
def test_parity_over_lengths(launches: Any, lengths: Lengths, mask: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(launches, lengths, mask, random_qkv(lengths, 2, 32, dtype))


@pytest.mark.simulated_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_as_sm_90_code(launches: Any, dtype: torch.dtype) -> None:
    lengths = [(70, 13), (5, 30)]
    check(launches, lengths, "captioning", random_qkv(lengths, 2, 64, dtype), target=90)


@pytest.mark.simulated_only
def test_tf32(launches: Any) -> None:
    lengths = [(70, 13), (5, 30)]
    qkv = random_qkv(lengths, 2, 64, torch.float32)
    truth = evaluate(by_sdpa(lengths, "full"), in_double({"qkv": qkv}))
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with launches():
            actual = evaluate(op(lengths), {"qkv": qkv}, truth.cotangents)
    finally:
        torch.set_float32_matmul_precision(before)
    for name, value in actual.items():
        assert (value.double() - truth[name]).abs().max() <= 5e-3 * truth[name].abs().max(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand(launches: Any, dtype: torch.dtype) -> None:
    """Every query scores +1e4 with its own key and -1e4 with the others: the output is that key's value.

    Backward takes the probability from a log-sum-exp of 1e4, which fp32 knows to 1e-3.
    """
    lengths, head_dim = [(40, 3), (2, 6)], 64
    size = (1e4 * head_dim**0.5) ** 0.5
    qkv = torch.zeros(sum(map(sum, lengths)), 3, 1, head_dim, dtype=torch.float64)
    for sample in rows_of(lengths):
        for position, row in enumerate(sample):
            qkv[row, 0, 0, position] = size
            qkv[row, 1, 0] = -size
            qkv[row, 1, 0, position] = size
    qkv[:, 2] = torch.randn(qkv.shape[0], 1, head_dim)
    qkv = qkv.to(dtype)
    with launches():
        actual = evaluate(op(lengths), {"qkv": qkv})
    torch.testing.assert_close(actual["output 0"], qkv[:, 2].flatten(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(actual["gradient of qkv"][:, 2].flatten(1), actual.cotangents[0], rtol=2e-3, atol=0)
    assert actual["gradient of qkv"].isfinite().all()


def test_equal_keys_give_the_mean(launches: Any) -> None:
    lengths = [(50, 20)]
    qkv = random_qkv(lengths, 1, 16, torch.float32)
    qkv[:, 1] = qkv[:1, 1]
    with launches():
        out = op(lengths)(qkv)
    torch.testing.assert_close(out, qkv[:, 2].flatten(1).mean(0).expand_as(out), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", [5, 100])  # the programs of a head clear 48 rows in one turn
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_element_is_written_and_no_other(launches: Any, dtype: torch.dtype, padding: int) -> None:
    """All buffers start as NaN between guard bands; rows of no sample come as NaN and leave as zeros."""
    lengths = [(40, 9), (0, 12), (7, 0)]
    layout = layout_of(lengths, padding)
    qkv = random_qkv(lengths, 2, 24, dtype, padding)
    qkv[-padding:] = float("nan")
    dout = torch.randn(qkv.shape[0], 48).to(dtype)
    dout[-padding:] = float("nan")
    arguments = layout.segments, "captioning", 24**-0.5, layout.width
    with launches(), GuardedAllocations() as allocations:
        out, lse = kernels.forward(qkv, *arguments, True)
        dqkv = kernels.backward(dout, qkv, out, lse, *arguments)
    allocations.check()
    for tensor in (out, lse[:, :-padding], dqkv):  # nobody reads the others of lse
        assert tensor.isfinite().all()
    assert not out[-padding:].count_nonzero()
    assert not dqkv[-padding:].count_nonzero()


def test_gradients_are_bitwise_reproducible(launches: Any) -> None:
    lengths = [(70, 13), (5, 30)]
    qkv = random_qkv(lengths, 2, 32, torch.float32)
    cotangents = [torch.randn(qkv.shape[0], 64)]
    results = []
    for seed in (1, 2):
        with launches(check_races=False, schedule_seed=seed):
            results.append(evaluate(op(lengths), {"qkv": qkv}, cotangents)["gradient of qkv"])
    assert torch.equal(*results)


def test_a_mask_tensor_and_wide_heads_take_plain_pytorch(launches: Any) -> None:
    lengths = [(5, 3)]
    layout = layout_of(lengths)
    forbidden = torch.ones(8, 8).triu(1).bool()
    narrow, wide = random_qkv(lengths, 1, 16, torch.float32), random_qkv(lengths, 1, 136, torch.float32)
    with launches() as log:
        masked = attention(narrow, layout, 1, mask=forbidden)
        attention(wide, layout, 1)
    assert not log
    torch.testing.assert_close(masked, attention(narrow, layout, 1, mask="causal"))


@pytest.mark.simulated_only
def test_autocast(launches: Any) -> None:
    lengths = [(40, 9)]
    qkv = random_qkv(lengths, 2, 32, torch.float32).requires_grad_()
    cotangent = torch.randn(qkv.shape[0], 64).bfloat16()
    with launches():
        with torch.autocast("cpu", torch.bfloat16):
            out = op(lengths)(qkv)
        (gradient,) = torch.autograd.grad(out, qkv, cotangent)
        narrow = qkv.detach().bfloat16().requires_grad_()
        (expected,) = torch.autograd.grad(op(lengths)(narrow), narrow, cotangent)
    assert (out.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(gradient, expected.float())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(launches: Any, reentrant: bool) -> None:
    """The forward pass runs again in backward and the gradient is bitwise the same."""
    lengths = [(40, 9)]
    qkv = random_qkv(lengths, 2, 32, torch.float32).requires_grad_()
    with launches() as log:
        (expected,) = torch.autograd.grad(op(lengths)(qkv).square().sum(), qkv)
        once = len(log)
        checkpoint(op(lengths), qkv, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(qkv.grad, expected)
    assert len(log) in (0, 2 * once + 1)


def test_opcheck(launches: Any) -> None:
    lengths = [(9, 4), (3, 2)]
    layout = layout_of(lengths)
    qkv = random_qkv(lengths, 2, 16, torch.float32).requires_grad_()
    with launches(check_races=False):
        opcheck(torch.ops.beit3_fast.attention, (qkv, layout.segments, None, "captioning", 0.25, layout.width, True))


def test_compiles_without_graph_breaks(launches: Any) -> None:
    lengths = [(9, 4), (3, 2)]
    layout = layout_of(lengths)
    qkv = random_qkv(lengths, 2, 16, torch.float32).requires_grad_()

    def loss(qkv: torch.Tensor) -> torch.Tensor:
        return attention(qkv, layout, 2).square().sum()

    with launches(check_races=False):
        expected = torch.autograd.grad(loss(qkv), qkv)
        actual = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(qkv), qkv)
    torch.testing.assert_close(actual, expected)
