"""The compiled CPU attention: its kernels at every instruction set, and the op that the library registers."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from ops.parity import assert_parity
from torch import Tensor

import beit3_fast
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import attention_reference

from .probes import DTYPES, name, pointer

PROBE = "attention_probe.cpp"
MASKS = ("full", "captioning", "causal")
Lengths = Sequence[tuple[int, int]]  # (vision, text) of every sample

# 1, 2, 15, 16, 17, 63, 64, 65 tokens; either part absent, and both
UNEVEN: Lengths = ((1, 0), (0, 2), (10, 5), (16, 0), (9, 8), (0, 63), (33, 31), (0, 0), (64, 1))

LIBRARY = beit3_fast._extension.status()["cpu"]
needs_library = pytest.mark.skipif(not LIBRARY.loaded, reason=f"the CPU library is not loaded: {LIBRARY.reason}")


def layout_of(lengths: Lengths) -> TokenLayout:
    return TokenLayout.from_lengths([v for v, _ in lengths], [t for _, t in lengths])


def random_qkv(lengths: Lengths, heads: int, head_dim: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(layout_of(lengths).num_rows, 3, heads, head_dim).to(dtype)


def random_mask(size: int) -> Tensor:
    return (torch.rand(size, size) < 0.4).logical_and(~torch.eye(size, dtype=torch.bool))


class Kernels:
    """``attention`` and ``attention_backward`` with the op's arguments, at one instruction set."""

    def __init__(self, probe: ctypes.CDLL, isa: int) -> None:
        self.probe, self.isa = probe, isa

    def attention(self, qkv: Tensor, layout: TokenLayout, mask: str | Tensor, scale: float) -> tuple[Tensor, Tensor]:
        rows, _, heads, head_dim = qkv.shape
        out = qkv.new_full((rows, heads * head_dim), float("nan"))
        lse = torch.full((heads, rows), float("nan"))
        self._run(qkv, layout, mask, scale, out, lse, None, None)
        return out, lse

    def attention_backward(
        self, dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, layout: TokenLayout, mask: str | Tensor, scale: float
    ) -> Tensor:
        dqkv = torch.full_like(qkv, float("nan"))
        self._run(qkv, layout, mask, scale, out, lse, dout, dqkv)
        return dqkv

    def _run(
        self,
        qkv: Tensor,
        layout: TokenLayout,
        mask: str | Tensor,
        scale: float,
        out: Tensor,
        lse: Tensor,
        dout: Tensor | None,
        dqkv: Tensor | None,
    ) -> None:
        forbidden = mask if isinstance(mask, Tensor) else None
        pointers = [pointer(tensor) for tensor in (forbidden, qkv, out, lse, dout, dqkv)]
        rows, _, heads, head_dim = qkv.shape
        intact = self.probe.attention(
            self.isa,
            DTYPES.index(qkv.dtype),
            pointer(layout.segments),
            ctypes.c_int64(layout.batch_size),
            ctypes.c_int64(rows),
            ctypes.c_int64(heads),
            ctypes.c_int64(head_dim),
            0 if forbidden is not None else MASKS.index(mask),
            pointers[0],
            ctypes.c_int64(0 if forbidden is None else forbidden.shape[0]),
            ctypes.c_float(scale),
            *pointers[1:],
        )
        assert intact, "the kernel wrote past its memory"


@pytest.fixture
def kernels(probe: ctypes.CDLL, isa: int) -> Kernels:
    return Kernels(probe, isa)


def plain(
    qkv: Tensor, dout: Tensor, layout: TokenLayout, mask: str | Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output and gradient in plain PyTorch."""
    qkv = qkv.clone().requires_grad_()
    out = attention_reference(qkv, layout, qkv.shape[2], mask=mask, scale=scale)
    return out.detach(), torch.autograd.grad(out, qkv, dout)[0]


@dataclass(frozen=True)
class Case:
    """Inputs, with the output and gradient in float64 and in plain PyTorch."""

    qkv: Tensor
    dout: Tensor
    lengths: Lengths
    mask: str | Tensor
    scale: float
    truth: tuple[Tensor, Tensor]
    plain: tuple[Tensor, Tensor]


@functools.cache  # every instruction set meets the same
def case(
    lengths: Lengths, heads: int, head_dim: int, dtype: torch.dtype, mask: str, scale: float | None = None
) -> Case:
    qkv = random_qkv(lengths, heads, head_dim, dtype)
    layout = layout_of(lengths)
    hidden = random_mask(layout.width) if mask == "tensor" else mask
    scale = head_dim**-0.5 if scale is None else scale
    dout = torch.randn(qkv[:, 0].flatten(1).shape).to(dtype)
    truth = plain(qkv.double(), dout.double(), layout, hidden, scale)
    return Case(qkv, dout, lengths, hidden, scale, truth, plain(qkv, dout, layout, hidden, scale))


def check(kernels: Kernels, case: Case) -> None:
    """Output, log-sum-exp and gradients against float64 and plain PyTorch."""
    qkv, dout, mask, scale, dtype = case.qkv, case.dout, case.mask, case.scale, case.qkv.dtype
    (true_out, true_dqkv), (plain_out, plain_dqkv) = case.truth, case.plain
    layout = layout_of(case.lengths)
    out, lse = kernels.attention(qkv, layout, mask, scale)
    dqkv = kernels.attention_backward(dout, qkv, out, lse, layout, mask, scale)

    q, k, v = qkv.double().unbind(1)
    eps, fp32 = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    # scores, sums of head_dim products in fp32, and their exponentials are known to so much
    of_scores = fp32 * (2 + abs(scale) * (q.norm(dim=-1).max() * k.norm(dim=-1).max()).item())
    floor = eps * true_out.abs().max().item() + of_scores * v.abs().max().item()
    assert_parity(out, plain_out, true_out, dtype, "output", floor)
    assert lse.isfinite().all()
    exact_lse = torch.cat([_lse(q, k, layout, s, mask, scale) for s in range(layout.batch_size)], dim=1)
    rows = torch.cat([_rows(layout, s) for s in range(layout.batch_size)])
    assert (lse[:, rows] - exact_lse).abs().max() <= of_scores + fp32 * exact_lse.abs().max()

    # a score's gradient is a difference of sums of head_dim products
    of_dscores = fp32 * (dout.double().view_as(v).norm(dim=-1).max() * v.norm(dim=-1).max()).item() * abs(scale)
    for part, other in enumerate((k, q, None)):
        floor = eps * true_dqkv[:, part].abs().max().item()
        if other is not None:
            floor += of_dscores * other.abs().max().item()
        assert_parity(
            dqkv[:, part], plain_dqkv[:, part], true_dqkv[:, part], dtype, f"gradient of {'qkv'[part]}", floor
        )


def _rows(layout: TokenLayout, sample: int) -> Tensor:
    vision_start, vision_len, text_start, text_len = layout.segments[sample].tolist()
    return torch.cat([vision_start + torch.arange(vision_len), text_start + torch.arange(text_len)])


def _lse(q: Tensor, k: Tensor, layout: TokenLayout, sample: int, mask: str | Tensor, scale: float) -> Tensor:
    """(H, S) log-sum-exp of a sample's scores in float64."""
    rows, vision = _rows(layout, sample), int(layout.segments[sample, 1])
    scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) * scale
    position = torch.arange(len(rows))
    hidden = position.unsqueeze(0) > position.unsqueeze(1)
    if isinstance(mask, Tensor):
        hidden = mask[: len(rows), : len(rows)]
    elif mask == "full":
        hidden = torch.zeros_like(hidden)
    elif mask == "captioning":
        hidden = hidden & (position >= vision)
    return scores.masked_fill(hidden, float("-inf")).logsumexp(-1)


# --- the kernels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(
    ("head_dim", "mask"),
    [
        *((64, mask) for mask in (*MASKS, "tensor")),
        (1, "causal"),
        (7, "captioning"),
        (8, "full"),
        (40, "tensor"),
        (88, "causal"),
        (128, "captioning"),
    ],
)
def test_uneven_lengths(head_dim: int, mask: str, dtype: torch.dtype, kernels: Kernels) -> None:
    check(kernels, case(UNEVEN, 2, head_dim, dtype, mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize(
    ("lengths", "mask"), [(((197, 64),), "full"), (((600, 100),), "captioning"), (((0, 261),), "causal")]
)
def test_long(lengths: Lengths, mask: str, dtype: torch.dtype, kernels: Kernels) -> None:
    check(kernels, case(lengths, 1, 64, dtype, mask))


def test_blocks_of_fewer_queries(kernels: Kernels) -> None:
    """So long that the scores of the usual block would leave the cache."""
    check(kernels, case(((2050, 100),), 1, 8, torch.float32, "captioning"))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(scale: float, kernels: Kernels) -> None:
    check(kernels, case(((30, 20), (3, 40)), 2, 16, torch.float32, "captioning", scale))


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_logits_of_ten_thousand(kernels: Kernels, dtype: torch.dtype) -> None:
    """+1e4 with its own key and -1e4 with the others: the output is that key's value, the gradient its cotangent."""
    lengths, head_dim = [(40, 24)], 64
    layout = layout_of(lengths)
    size = (1e4 * head_dim**0.5) ** 0.5
    qkv = torch.zeros(64, 3, 1, head_dim)
    qkv[:, 0, 0] = size * torch.eye(64)
    qkv[:, 1, 0] = size * (2 * torch.eye(64) - 1)
    qkv[:, 2] = torch.randn(64, 1, head_dim)
    qkv = qkv.to(dtype)
    out, lse = kernels.attention(qkv, layout, "full", head_dim**-0.5)
    assert torch.equal(out, qkv[:, 2].flatten(1))
    dout = torch.randn(64, head_dim).to(dtype)
    dqkv = kernels.attention_backward(dout, qkv, out, lse, layout, "full", head_dim**-0.5)
    assert torch.equal(dqkv[:, 2].flatten(1), dout)
    assert dqkv[:, :2].abs().max() <= torch.finfo(dtype).eps * size * head_dim


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_random_large_logits(kernels: Kernels, dtype: torch.dtype) -> None:
    lengths = [(40, 30)]
    qkv = random_qkv(lengths, 2, 24, torch.float32)
    scores = torch.einsum("ihd,jhd->hij", qkv[:, 0], qkv[:, 1]) * 24**-0.5
    qkv[:, :2] *= (1e4 / scores.abs().max()).sqrt()
    qkv = qkv.to(dtype)
    layout = layout_of(lengths)
    out, lse = kernels.attention(qkv, layout, "causal", 24**-0.5)
    dqkv = kernels.attention_backward(out, qkv, out, lse, layout, "causal", 24**-0.5)
    for what in (out, lse, dqkv):
        assert what.isfinite().all()
    truth = attention_reference(qkv.double(), layout, 2, mask="causal")
    assert (out - truth).abs().max() <= 1e-2 * truth.abs().max()  # a logit of 1e4 is known to 1e-3 in fp32


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_equal_logits_give_the_mean(kernels: Kernels, dtype: torch.dtype) -> None:
    lengths = [(200, 61)]
    qkv = random_qkv(lengths, 1, 64, dtype)
    qkv[:, 0] = 0
    out, lse = kernels.attention(qkv, layout_of(lengths), "full", 0.125)
    torch.testing.assert_close(
        out.double(), qkv[:, 2].double().mean(0).expand(261, 64), rtol=torch.finfo(dtype).eps, atol=1e-5
    )
    torch.testing.assert_close(lse, torch.full_like(lse, 261.0).log())


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_no_key(kernels: Kernels, dtype: torch.dtype) -> None:
    lengths = [(12, 8), (3, 30)]
    layout = layout_of(lengths)
    mask = random_mask(42)
    blind = torch.tensor([0, 7, 19])
    mask[blind] = True
    rows = torch.cat([_rows(layout, 0)[blind], _rows(layout, 1)[blind]])
    qkv = random_qkv(lengths, 2, 40, dtype)
    dout = torch.randn(layout.num_rows, 80).to(dtype)
    out, lse = kernels.attention(qkv, layout, mask, 0.2)
    dqkv = kernels.attention_backward(dout, qkv, out, lse, layout, mask, 0.2)
    assert not out[rows].count_nonzero()
    assert not dqkv[rows, 0].count_nonzero()
    assert (lse[:, rows] == float("-inf")).all()
    true_out, true_dqkv = plain(qkv.double(), dout.double(), layout, mask, 0.2)
    plain_out, plain_dqkv = plain(qkv, dout, layout, mask, 0.2)
    assert_parity(out, plain_out, true_out, dtype, "output")
    for part in range(3):
        got, expected, exact = (gradient[:, part] for gradient in (dqkv, plain_dqkv, true_dqkv))
        floor = 4 * torch.finfo(dtype).eps * exact.abs().max().item()
        assert_parity(got, expected, exact, dtype, f"gradient of {'qkv'[part]}", floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity(kernels: Kernels, dtype: torch.dtype, special: float) -> None:
    """NaN and infinity reach what they reach in plain PyTorch; other samples and heads nothing."""
    lengths = [(20, 10), (9, 4)]
    layout = layout_of(lengths)
    for part in range(3):
        qkv = random_qkv(lengths, 2, 24, dtype)
        qkv[5, part, 1, 3] = special
        out, _ = kernels.attention(qkv, layout, "full", 0.2)
        expected = attention_reference(qkv, layout, 2, scale=0.2)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())


# --- the op -----------------------------------------------------------------------------------------------------------


def forward(qkv: Tensor, segments: Tensor, *, forbidden: Tensor | None = None, mask: str = "full") -> list[Tensor]:
    """out, lse"""
    return torch.ops.beit3_fast.attention_cpu(qkv, segments, forbidden, mask, 0.25, 0, True)


def backward(dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, segments: Tensor, mask: str = "full") -> Tensor:
    return torch.ops.beit3_fast.attention_cpu_backward(dout, qkv, out, lse, segments, None, mask, 0.25, 0)


def both(qkv: Tensor, segments: Tensor, mask: str = "full") -> list[Tensor]:
    """out, lse, dqkv, with the values for a cotangent."""
    out, lse = forward(qkv, segments, mask=mask)
    return [out, lse, backward(qkv[:, 2].flatten(1), qkv, out, lse, segments, mask)]


@needs_library
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_threads_do_not_change_a_bit(dtype: torch.dtype, mask: str) -> None:
    lengths = [(197, 13), (0, 64), (1, 1), (197, 64), (50, 0)]
    qkv, segments = random_qkv(lengths, 3, 64, dtype), layout_of(lengths).segments
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(both(qkv, segments, mask))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@needs_library
def test_calls_at_the_same_time() -> None:
    qkv, segments = random_qkv(UNEVEN, 2, 64, torch.float32), layout_of(UNEVEN).segments
    expected = both(qkv, segments)
    with ThreadPoolExecutor(4) as pool:
        for results in pool.map(lambda _: both(qkv, segments), range(40)):
            assert all(map(torch.equal, results, expected))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_rows_of_no_sample(dtype: torch.dtype) -> None:
    """Before, between and after the samples; NaN in them is not seen, and they give zeros."""
    segments = torch.tensor([[2, 5, 20, 3], [0, 0, 25, 4], [9, 6, 0, 0], [0, 0, 0, 0]], dtype=torch.int32)
    used = torch.tensor([*range(2, 7), *range(9, 15), *range(20, 23), *range(25, 29)])
    dense = torch.tensor([[0, 5, 11, 3], [0, 0, 14, 4], [5, 6, 0, 0]], dtype=torch.int32)
    values = torch.randn(18, 3, 2, 24).to(dtype)
    qkv = torch.full((33, 3, 2, 24), float("nan"), dtype=dtype)
    qkv[used] = values
    others = torch.ones(33, dtype=torch.bool)
    others[used] = False
    out, lse, dqkv = both(qkv, segments, "captioning")
    expected_out, expected_lse, expected_dqkv = both(values, dense, "captioning")
    assert torch.equal(out[used], expected_out)
    assert torch.equal(lse[:, used], expected_lse)
    assert torch.equal(dqkv[used], expected_dqkv)
    assert not out[others].count_nonzero()
    assert not lse[:, others].count_nonzero()
    assert not dqkv[others].count_nonzero()


@needs_library
def test_nothing_to_do() -> None:
    for rows, samples in ((0, 1), (3, 0), (3, 1)):
        results = both(torch.randn(rows, 3, 2, 8), torch.zeros(samples, 4, dtype=torch.int32))
        assert [result.shape for result in results] == [(rows, 16), (2, rows), (rows, 3, 2, 8)]
        assert not any(result.count_nonzero() for result in results)


@needs_library
def test_memory_layouts() -> None:
    lengths = [(9, 5), (4, 7)]
    qkv, segments = random_qkv(lengths, 2, 24, torch.float32), layout_of(lengths).segments
    forbidden = random_mask(16)
    out, lse, dqkv = both(qkv, segments)
    masked, _ = forward(qkv, segments, forbidden=forbidden)

    def apart(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    assert torch.equal(forward(apart(qkv), apart(segments))[0], out)
    assert torch.equal(forward(qkv, segments, forbidden=apart(forbidden))[0], masked)
    dout = apart(qkv[:, 2].flatten(1))
    assert torch.equal(backward(dout, apart(qkv), apart(out), apart(lse), apart(segments)), dqkv)


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(8, 24)}, "qkv must have shape"),
        ({"qkv": torch.zeros(8, 3, 2, 4, dtype=torch.float64)}, "qkv must be float32, bfloat16 or float16, got Double"),
        ({"segments": torch.zeros(1, 4)}, "segments must be int32"),
        ({"segments": torch.zeros(1, 3, dtype=torch.int32)}, r"segments must be int32 of shape \(samples, 4\)"),
        ({"segments": torch.tensor([[0, 5, 5, 4]], dtype=torch.int32)}, "in the 8 rows of qkv, got 4 from 5 on"),
        ({"segments": torch.tensor([[-1, 5, 5, 1]], dtype=torch.int32)}, "in the 8 rows of qkv, got 5 from -1 on"),
        ({"segments": torch.tensor([[0, -5, 5, 1]], dtype=torch.int32)}, "in the 8 rows of qkv, got -5 from 0 on"),
        ({"forbidden": torch.zeros(8, 8)}, "forbidden must be bool"),
        ({"forbidden": torch.zeros(7, 7, dtype=torch.bool)}, "S at least 8"),
        ({"mask": "diagonal"}, "mask must be full, captioning or causal, got diagonal"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], message: str) -> None:
    good = {
        "qkv": torch.zeros(8, 3, 2, 4),
        "segments": torch.tensor([[0, 5, 5, 3]], dtype=torch.int32),
        "forbidden": torch.zeros(8, 8, dtype=torch.bool),
        "mask": "full",
    }
    forward(**good)
    with pytest.raises(RuntimeError, match=message):
        forward(**{**good, **change})


@needs_library
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dout": torch.zeros(8, 8, dtype=torch.float16)}, "dout must have one element"),
        ({"dout": torch.zeros(8, 7)}, "dout must have one element"),
        ({"out": torch.zeros(7, 8)}, "out must have one element"),
        ({"lse": torch.zeros(0)}, "lse must be float32"),
    ],
)
def test_bad_input_of_the_backward_is_named(change: dict[str, Tensor], message: str) -> None:
    good = {
        "dout": torch.zeros(8, 8),
        "qkv": torch.zeros(8, 3, 2, 4),
        "out": torch.zeros(8, 8),
        "lse": torch.zeros(2, 8),
        "segments": torch.tensor([[0, 5, 5, 3]], dtype=torch.int32),
    }
    backward(**good)
    with pytest.raises(RuntimeError, match=message):
        backward(**{**good, **change})
