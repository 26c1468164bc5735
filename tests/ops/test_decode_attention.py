"""ops.decode_attention against F.scaled_dot_product_attention over each beam's sequence, put together by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from beit3_fast.backend import use_backend
from beit3_fast.layout import TokenLayout
from beit3_fast.ops import attention, decode_attention
from ops.parity import LOW_PRECISION, assert_exact, assert_parity, assert_refuses, meta, normal
from ops.test_attention import Lengths, layout_of, rows_of


@dataclass(frozen=True)
class Step:
    """The arguments of one call. What must not be read is NaN."""

    qkv: Tensor
    prefix: Tensor
    layout: TokenLayout
    words: Tensor
    history: Tensor
    length: int

    def arguments(self) -> dict[str, Any]:
        return dict(vars(self))

    def to(self, dtype: torch.dtype) -> Step:
        return replace(self, **{name: getattr(self, name).to(dtype) for name in ("qkv", "prefix", "words")})


def random_step(
    lengths: Lengths, beams: int, tokens: int, words: int, num_heads: int = 2, head_dim: int = 12, *, seed: int = 0
) -> Step:
    """A step of `beams` beams a sample whose words lie in random slots of the same sample, in float64."""
    torch.manual_seed(seed)
    layout = layout_of(lengths)
    samples, columns = len(lengths), words + 2
    slots = samples * beams
    own = torch.randint(0, beams, (columns, samples, beams)) + beams * torch.arange(samples)[:, None]
    history = own.view(columns, slots)
    kept = normal(columns, slots, 2, num_heads, head_dim)
    read = torch.zeros(columns, slots, dtype=torch.bool)
    for place in range(words):
        read[place, history[place]] = True
    kept[~read] = float("nan")
    history[words:] = 2**30
    qkv, prefix = (
        normal(rows, parts, num_heads, head_dim) for rows, parts in ((slots * tokens, 3), (layout.num_rows, 2))
    )
    return Step(qkv, prefix, layout, kept, history.int(), words)


def by_sdpa(step: Step, lengths: Lengths) -> Tensor:
    """Beam after beam, token after token, in the dtype of `step`."""
    slots = step.words.shape[1]
    beams, tokens = slots // len(lengths), step.qkv.shape[0] // slots
    prefixes = rows_of(lengths)
    out = []
    for slot in range(slots):
        new = step.qkv[slot * tokens : (slot + 1) * tokens]
        said = [step.words[place, step.history[place, slot]][None] for place in range(step.length)]
        for token in range(tokens):
            kv = torch.cat([step.prefix[prefixes[slot // beams]], *said, new[: token + 1, 1:]])  # [S, 2, H, d]
            k, v = kv.permute(1, 2, 0, 3).unsqueeze(1)  # [1, H, S, d]
            q = new[token, 0][None, :, None]  # [1, H, 1, d]
            out.append(F.scaled_dot_product_attention(q, k, v).flatten())
    return torch.stack(out)


CASES: dict[str, tuple[Lengths, int, int, int]] = {  # prefixes, beams, new tokens, words
    "captioning": ([(7, 0), (7, 0)], 3, 2, 4),
    "first step": ([(7, 0)], 3, 2, 0),
    "no beams": ([(5, 0)], 1, 1, 3),
    "prefix with text": ([(5, 3), (2, 6), (0, 4)], 2, 2, 3),
    "no prefix": ([(0, 0), (3, 0)], 2, 2, 2),
    "nothing before": ([(0, 0)], 2, 3, 0),
    "more queries than a tile": ([(5, 0), (9, 1)], 7, 3, 2),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_attention_over_the_whole_sequence(case: Any) -> None:
    step = random_step(*case)
    expected = by_sdpa(step, case[0])
    assert_exact(decode_attention(**step.arguments()), expected)
    with use_backend("reference"):
        assert_exact(decode_attention(**step.arguments()), expected)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_parity(dtype: torch.dtype, case: Any) -> None:
    step = random_step(*case).to(dtype)
    actual = decode_attention(**step.arguments())
    truth = by_sdpa(step.to(torch.double), case[0])
    floor = torch.finfo(dtype).eps * truth.abs().max().item() + 16 * torch.finfo(torch.float32).eps
    assert_parity(actual, by_sdpa(step, case[0]), truth, dtype, floor=floor)


@given(
    lengths=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=3),
    beams=st.integers(1, 4),
    tokens=st.integers(1, 3),
    words=st.integers(0, 4),
)
def test_any_shape(lengths: Lengths, beams: int, tokens: int, words: int) -> None:
    step = random_step(lengths, beams, tokens, words)
    assert_exact(decode_attention(**step.arguments()), by_sdpa(step, lengths))


def test_the_rows_of_captioning_attention() -> None:
    """A word fed at a time gives what all of them at once give."""
    image, text, heads = 6, 4, 2
    layout = TokenLayout.from_lengths([image], [text])
    qkv = normal(image + text, 3, heads, 8)
    whole = attention(qkv, layout, heads, mask="captioning")
    prefix = TokenLayout.from_lengths([image], [0])
    words = torch.zeros(text, 1, 2, heads, 8, dtype=torch.float64)
    history = torch.zeros(text, 1, dtype=torch.int32)
    for place in range(text):
        row = qkv[image + place : image + place + 1]
        out = decode_attention(row, qkv[:image, 1:], prefix, words, history, place)
        assert_exact(out, whole[image + place : image + place + 1])
        words[place, 0] = row[0, 1:]


def test_scale() -> None:
    step = random_step(*CASES["captioning"])
    scaled = replace(step, qkv=step.qkv * torch.tensor([2.0, 1.0, 1.0]).view(1, 3, 1, 1))
    assert_exact(decode_attention(**step.arguments(), scale=2 * 12**-0.5), decode_attention(**scaled.arguments()))


def test_opcheck_and_compile() -> None:
    step = random_step(*CASES["captioning"]).to(torch.float32)
    segments = step.layout.segments
    arguments = (step.qkv, step.prefix, segments, step.words, step.history, step.length, 0.3, step.layout.width)
    opcheck(torch.ops.beit3_fast.decode_attention, arguments)
    given = step.arguments()  # outside of what is compiled: torch 2.11 cannot trace a dataclass's vars()
    compiled = torch.compile(lambda qkv: decode_attention(**{**given, "qkv": qkv}), fullgraph=True)
    torch.testing.assert_close(compiled(step.qkv), decode_attention(**given))


def test_autocast_gives_its_dtype() -> None:
    step = random_step(*CASES["captioning"]).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = decode_attention(**step.arguments())
    torch.testing.assert_close(out, decode_attention(**step.to(torch.bfloat16).arguments()))


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "qkv": ({"qkv": torch.zeros(12, 2, 2, 12)}, ValueError, "qkv"),
    "prefix": ({"prefix": torch.zeros(3, 2, 2, 12)}, ValueError, "prefix"),
    "words": ({"words": torch.zeros(6, 6, 2, 2, 8)}, ValueError, "words"),
    "slots": ({"words": torch.zeros(6, 5, 2, 2, 12)}, ValueError, "words"),
    "history": ({"history": torch.zeros(6, 6)}, ValueError, "history"),
    "length": ({"length": 7}, ValueError, "length"),
    "length type": ({"length": 1.0}, TypeError, "length"),
    "layout": ({"layout": None}, TypeError, "layout"),
    "dtype": ({"words": torch.zeros(6, 6, 2, 2, 12).half()}, ValueError, "words"),
    "device": ({"history": meta(6, 6).int()}, ValueError, "history"),
    "gradient": ({"qkv": torch.zeros(12, 3, 2, 12, requires_grad=True)}, ValueError, "qkv"),
    "scale": ({"scale": "1"}, TypeError, "scale"),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_refuses(case: Any) -> None:
    changed, error, name = case
    step = random_step(*CASES["captioning"]).to(torch.float32)
    assert_refuses(decode_attention, step.arguments(), changed, error, name)
