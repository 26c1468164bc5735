"""TokenLayout against rows counted one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ops.parity import assert_refuses, refuses
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from beit3_fast.layout import TokenLayout, _device_layout

Slot = tuple[int, int]  # (sample, column of the padded (B, S) form)


def slots_of(
    valid_vision: Sequence[Sequence[int]], valid_text: Sequence[Sequence[int]], vision_width: int
) -> list[Slot]:
    """For every row in expert order the (sample, column) it holds: all vision, then all text, sample after sample."""
    vision = [(sample, column) for sample, columns in enumerate(valid_vision) for column in columns]
    text = [(sample, vision_width + column) for sample, columns in enumerate(valid_text) for column in columns]
    return vision + text


def check(
    layout: TokenLayout,
    valid_vision: Sequence[Sequence[int]],
    valid_text: Sequence[Sequence[int]],
    vision_width: int,
    text_width: int,
) -> None:
    """Every public fact of `layout` equals what counting gives; rows past the used ones are ignored."""
    batch = len(valid_vision)
    slots = slots_of(valid_vision, valid_text, vision_width)
    num_vision, used = sum(map(len, valid_vision)), len(slots)

    # sizes and offsets
    assert (layout.batch_size, layout.vision_width, layout.text_width) == (batch, vision_width, text_width)
    assert layout.width == vision_width + text_width
    assert layout.num_vision_rows == num_vision
    assert layout.num_text_rows == layout.num_rows - num_vision
    assert layout.expert_offsets.dtype == torch.int32
    assert layout.expert_offsets.tolist() == [0, num_vision, used]
    assert layout.vision_lengths == tuple(map(len, valid_vision))
    if layout.text_lengths is None:
        assert layout.num_rows == num_vision + batch * text_width
    else:
        assert layout.num_rows == used
        assert layout.text_lengths == tuple(map(len, valid_text))
    assert layout.shared_offsets.dtype == layout.fused_offsets.dtype == torch.int32
    assert layout.shared_offsets.tolist() == [0, used]
    both = vision_width > 0 and text_width > 0
    assert layout.fused_offsets.tolist() == ([0, 0, 0, used] if both else [0, num_vision, used, used])

    # the row map of attention
    assert layout.segments.dtype == torch.int32
    assert layout.segments.shape == (batch, 4)
    for sample in range(batch):
        vision_start, vision_len, text_start, text_len = layout.segments[sample].tolist()
        mine = [row for row, (owner, _) in enumerate(slots) if owner == sample]
        assert [*range(vision_start, vision_start + vision_len), *range(text_start, text_start + text_len)] == mine
        assert (vision_len, text_len) == (len(valid_vision[sample]), len(valid_text[sample]))
    columns = (layout.vision_start, layout.vision_len, layout.text_start, layout.text_len)
    assert torch.equal(torch.stack(columns, dim=1), layout.segments)

    # sample and column of each row
    assert layout.row_sample.dtype == layout.text_column.dtype == torch.int64
    assert layout.row_sample.shape == (layout.num_rows,)
    assert layout.text_column.shape == (layout.num_text_rows,)
    assert layout.row_sample[:used].tolist() == [sample for sample, _ in slots]
    assert layout.text_column[: used - num_vision].tolist() == [c - vision_width for _, c in slots[num_vision:]]

    # pack and unpack, exactly
    dense = torch.randn(batch, layout.width, 2)
    rows = layout.pack(dense)
    assert rows.shape == (layout.num_rows, 2)
    for row, slot in enumerate(slots):
        assert torch.equal(rows[row], dense[slot])
    kept = torch.zeros(batch, layout.width, 1, dtype=torch.bool)
    for slot in slots:
        kept[slot] = True
    rows = rows.clone()
    rows[used:] = float("nan")  # what an unused row holds is nobody's business
    back = layout.unpack(rows)
    assert torch.equal(back, torch.where(kept, dense, 0))
    ids = torch.arange(batch * layout.width).view(batch, layout.width)  # no trailing dimension, integers
    assert layout.pack(ids)[:used].tolist() == [int(ids[slot]) for slot in slots]
    text_ids = ids[:, vision_width:]
    assert layout.pack_text(text_ids)[: used - num_vision].tolist() == [int(ids[slot]) for slot in slots[num_vision:]]


# --- from_lengths -----------------------------------------------------------------------------------------------------

lengths_strategy = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=5)


@given(
    lengths=lengths_strategy,
    extra_vision=st.sampled_from([None, 0, 2]),
    extra_text=st.sampled_from([None, 0, 3]),
    as_tensor=st.booleans(),
)
def test_from_lengths(
    lengths: list[tuple[int, int]], extra_vision: int | None, extra_text: int | None, as_tensor: bool
) -> None:
    torch.manual_seed(0)
    vision, text = [v for v, _ in lengths], [t for _, t in lengths]
    vision_width = None if extra_vision is None else max(vision) + extra_vision
    text_width = None if extra_text is None else max(text) + extra_text
    layout = TokenLayout.from_lengths(
        torch.tensor(vision) if as_tensor else vision,
        torch.tensor(text) if as_tensor else tuple(text),
        vision_width=vision_width,
        text_width=text_width,
    )
    check(
        layout,
        [range(v) for v in vision],
        [range(t) for t in text],
        max(vision) if vision_width is None else vision_width,
        max(text) if text_width is None else text_width,
    )


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ([3, 3], [4, 4]),
        ([3, 3], [0, 0]),
        ([0, 0], [4, 4]),
        ([0, 0], [2, 5]),
        ([5, 1, 0], [0, 3, 0]),
        ([0], [0]),
        ([1], [1]),
    ],
)
def test_from_lengths_corners(vision: list[int], text: list[int]) -> None:
    layout = TokenLayout.from_lengths(vision, text)
    check(layout, [range(v) for v in vision], [range(t) for t in text], max(vision), max(text))


def test_unpadded_samples_are_only_viewed() -> None:
    layout = TokenLayout.from_lengths([3, 3], [4, 4])
    assert layout.vision_source is None
    assert layout.text_source is None
    tokens = torch.arange(8).view(2, 4)
    assert layout.pack_text(tokens).data_ptr() == tokens.data_ptr()


# --- parts ------------------------------------------------------------------------------------------------------------


@given(lengths=lengths_strategy, rows=st.integers(1, 40), extra=st.integers(0, 2))
def test_parts_of_lengths(lengths: list[tuple[int, int]], rows: int, extra: int) -> None:
    vision, text = [v for v, _ in lengths], [t for _, t in lengths]
    vision_width, text_width = max(vision) + extra, max(text) + extra
    whole = TokenLayout.from_lengths(vision, text, vision_width=vision_width, text_width=text_width)
    first, parts = 0, whole.parts(rows)
    assert len(parts) == max(1, min(round(whole.num_rows / rows), len(lengths)))
    for part in parts:
        samples = slice(first, first + part.batch_size)
        check(part, [range(v) for v in vision[samples]], [range(t) for t in text[samples]], vision_width, text_width)
        first += part.batch_size
    assert first == len(lengths)


def test_parts_of_padding() -> None:
    padding = [[0, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]]
    for part, its in zip(
        TokenLayout.from_padding(torch.tensor(padding), vision_tokens=2).parts(8), (0, 2), strict=True
    ):
        check(part, [range(2)] * 2, valid_columns(padding[its : its + 2]), 2, 3)


def test_parts_where_only_the_device_knows_the_lengths() -> None:
    layout = _device_layout(torch.ones(4, 3, dtype=torch.bool), 2)
    assert layout.parts(1) == [layout]


def test_parts_refuse() -> None:
    with refuses(ValueError, "rows"):
        TokenLayout.from_lengths([1], [1]).parts(0)


# --- from_padding, on the host ----------------------------------------------------------------------------------------

paddings = st.tuples(st.integers(1, 4), st.integers(0, 6), st.integers(0, 4)).flatmap(
    lambda size: st.tuples(
        st.lists(
            st.lists(st.sampled_from([0, 0, 1]), min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0]
        ),
        st.just(size[2]),
    )
)


def valid_columns(padding: list[list[int]]) -> list[list[int]]:
    return [[column for column, padded in enumerate(row) if not padded] for row in padding]


@given(case=paddings, dtype=st.sampled_from([torch.bool, torch.uint8, torch.int64]))
def test_from_padding(case: tuple[list[list[int]], int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    padding, vision = case
    width = len(padding[0])
    mask = torch.tensor(padding, dtype=dtype).view(len(padding), width)
    layout = TokenLayout.from_padding(mask, vision_tokens=vision)
    check(layout, [range(vision)] * len(padding), valid_columns(padding), vision, width)


@pytest.mark.parametrize(
    "padding",
    [
        [[0, 0, 0], [0, 0, 0]],  # none
        [[0, 0, 1], [0, 1, 1]],  # on the right
        [[1, 0, 0], [1, 1, 0]],  # on the left
        [[0, 1, 0], [1, 0, 1]],  # holes
        [[1, 1, 1], [0, 0, 0]],  # a sample without text
        [[1, 1, 1], [1, 1, 1]],  # nobody has text
    ],
)
@pytest.mark.parametrize("vision", [0, 4])
def test_from_padding_corners(padding: list[list[int]], vision: int) -> None:
    layout = TokenLayout.from_padding(torch.tensor(padding), vision_tokens=vision)
    check(layout, [range(vision)] * 2, valid_columns(padding), vision, 3)


def test_from_padding_is_from_lengths_where_padding_is_on_the_right() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]], dtype=torch.bool)
    one = TokenLayout.from_padding(mask, vision_tokens=3)
    two = TokenLayout.from_lengths([3, 3], [2, 3], text_width=4)
    for field in dataclasses.fields(TokenLayout):
        a, b = getattr(one, field.name), getattr(two, field.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, field.name


# --- from_padding, on a device ----------------------------------------------------------------------------------------
#
# The branch for a mask that only a device can read is recorded on the meta device, where reading a value is an error,
# and what was recorded is then run on CPU values: the very operations a GPU would be given, with results to look at.


def on_a_device(mask: Tensor, vision_tokens: int) -> TokenLayout:
    """The layout that from_padding makes of a mask on a device, its tensors moved to the CPU."""
    made = []

    def record(padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        layout = TokenLayout.from_padding(padding, vision_tokens=vision_tokens)
        made.append(layout)
        return layout.expert_offsets, layout.segments, layout.text_source

    graph = make_fx(record)(mask.to("meta"))
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
    graph.recompile()
    expert_offsets, segments, text_source = graph(mask)
    return dataclasses.replace(made[0], expert_offsets=expert_offsets, segments=segments, text_source=text_source)


@given(case=paddings)
def test_from_padding_on_a_device(case: tuple[list[list[int]], int]) -> None:
    torch.manual_seed(0)
    padding, vision = case
    width = len(padding[0])
    mask = torch.tensor(padding, dtype=torch.bool).view(len(padding), width)
    layout = on_a_device(mask, vision)
    assert layout.text_lengths is None
    assert layout.vision_source is None
    assert sorted(layout.text_source.tolist()) == list(range(mask.numel()))  # a permutation: nothing is lost
    check(layout, [range(vision)] * len(padding), valid_columns(padding), vision, width)


def test_unused_rows_get_no_gradient() -> None:
    layout = on_a_device(torch.tensor([[0, 1, 1], [0, 0, 1]], dtype=torch.bool), 2)
    rows = torch.randn(layout.num_rows, 3, requires_grad=True)
    used = int(layout.expert_offsets[-1])
    layout.unpack(rows).sum().backward()
    assert used == 7
    assert layout.num_rows == 10
    assert rows.grad[:used].all()
    assert not rows.grad[used:].count_nonzero()


# --- nothing waits for the device -------------------------------------------------------------------------------------

READS_A_VALUE = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::equal",
    "aten::nonzero",
    "aten::nonzero_numpy",
    "aten::masked_select",
    "aten::unique_consecutive",
    "aten::_unique2",
    "aten::repeat_interleave.Tensor",
}


class _NoWait(TorchDispatchMode):
    """Refuses what makes the host wait: reading values of, and copying from, tensors on `device`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        there = any(isinstance(leaf, Tensor) and leaf.device.type == self.device for leaf in leaves)
        name = func.name()
        if there and (name in READS_A_VALUE or name.removesuffix(".default") in READS_A_VALUE):
            raise AssertionError(f"{name} waits for the device")
        result = func(*args, **kwargs)
        if there and isinstance(result, Tensor) and result.device.type != self.device:
            raise AssertionError(f"{name} copies from the device to the host")
        return result


@pytest.mark.parametrize("read", [lambda t: t.item(), lambda t: t.nonzero(), lambda t: bool(t), int])
def test_the_guard_notices(read: Callable[[Tensor], Any]) -> None:
    with _NoWait("cpu"), pytest.raises(AssertionError, match="waits for the device"):
        read(torch.ones(()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("vision", "text"), [([3, 3], [4, 4]), ([3, 2], [4, 0]), ([0, 0], [2, 3]), ([2, 2], [0, 0])], ids=str
)
def test_host_lengths_wait_for_nothing(device: str, vision: list[int], text: list[int]) -> None:
    """Host lengths: building reads host tensors at most, and nothing afterwards reads the device.

    "meta" stands for a device: it holds no values, so reading one fails whatever the guard thinks of it.
    """
    with _NoWait("meta"):
        layout = TokenLayout.from_lengths(vision, text, device=device)
    assert layout.device.type == device
    dense = torch.ones(2, layout.width, 3, device=device)
    with _NoWait(device):
        rows = layout.pack(dense)
        assert layout.unpack(rows).shape == dense.shape
        layout.pack_text(dense[:, layout.vision_width :])
        for name in ("row_sample", "text_column", "shared_offsets", "fused_offsets", "text_len", "vision_start"):
            assert getattr(layout, name).device.type == device


@pytest.mark.parametrize("vision", [0, 4])
def test_device_padding_waits_for_nothing(vision: int) -> None:
    mask = torch.zeros(2, 3, dtype=torch.bool, device="meta")
    with _NoWait("meta"):
        layout = TokenLayout.from_padding(mask, vision_tokens=vision)
        dense = torch.ones(2, layout.width, 3, device="meta")
        rows = layout.pack(dense)
        assert rows.shape == (layout.num_rows, 3) == (2 * vision + 6, 3)
        assert layout.unpack(rows).shape == dense.shape
        for name in ("row_sample", "text_column", "shared_offsets", "fused_offsets"):
            assert getattr(layout, name).device.type == "meta"


def test_host_padding_goes_to_the_device() -> None:
    mask = torch.tensor([[0, 1], [0, 0]], dtype=torch.bool)
    layout = TokenLayout.from_padding(mask, vision_tokens=2, device="meta")
    assert layout.device.type == "meta"
    assert layout.text_lengths == (1, 2)
    assert layout.num_rows == 7


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"vision_lengths": [], "text_lengths": []}, ValueError, "vision_lengths"),
        ({"vision_lengths": [2, -1]}, ValueError, "vision_lengths"),
        ({"vision_lengths": [2, 2.5]}, TypeError, "vision_lengths"),
        ({"vision_lengths": ["2", "3"]}, TypeError, "vision_lengths"),
        ({"vision_lengths": 2}, TypeError, "vision_lengths"),
        ({"vision_lengths": None}, TypeError, "vision_lengths"),
        ({"vision_lengths": torch.tensor([2.0, 3.0])}, TypeError, "vision_lengths"),
        ({"vision_lengths": torch.tensor([[2], [3]])}, ValueError, "vision_lengths"),
        ({"vision_lengths": torch.ones(2, dtype=torch.int64, device="meta")}, ValueError, "vision_lengths"),
        ({"text_lengths": [1]}, ValueError, "text_lengths"),
        ({"text_lengths": [1, -2]}, ValueError, "text_lengths"),
        ({"text_lengths": [1, 2.5]}, TypeError, "text_lengths"),
        ({"text_lengths": None}, TypeError, "text_lengths"),
        ({"text_lengths": torch.ones(2, dtype=torch.int64, device="meta")}, ValueError, "text_lengths"),
        ({"vision_width": 2}, ValueError, "vision_width"),
        ({"vision_width": -1}, ValueError, "vision_width"),
        ({"vision_width": 3.5}, TypeError, "vision_width"),
        ({"text_width": 3}, ValueError, "text_width"),
        ({"text_width": "4"}, TypeError, "text_width"),
    ],
)
def test_from_lengths_refuses(arguments: dict[str, Any], error: type, name: str) -> None:
    good: dict[str, Any] = {"vision_lengths": [2, 3], "text_lengths": [1, 4]}
    assert_refuses(TokenLayout.from_lengths, good, arguments, error, name)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"text_padding": None}, TypeError, "text_padding"),
        ({"text_padding": [[0, 1]]}, TypeError, "text_padding"),
        ({"text_padding": torch.zeros(2, 3)}, TypeError, "text_padding"),
        ({"text_padding": torch.zeros(2, 3, dtype=torch.complex64)}, TypeError, "text_padding"),
        ({"text_padding": torch.zeros(3, dtype=torch.bool)}, ValueError, "text_padding"),
        ({"text_padding": torch.zeros(2, 3, 1, dtype=torch.bool)}, ValueError, "text_padding"),
        ({"text_padding": torch.zeros(0, 3, dtype=torch.bool)}, ValueError, "text_padding"),
        ({"vision_tokens": -1}, ValueError, "vision_tokens"),
        ({"vision_tokens": 1.5}, TypeError, "vision_tokens"),
        ({"vision_tokens": None}, TypeError, "vision_tokens"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_from_padding_refuses(arguments: dict[str, Any], error: type, name: str, device: str) -> None:
    good: dict[str, Any] = {"text_padding": torch.zeros(2, 3, dtype=torch.bool), "vision_tokens": 2}
    arguments = {**good, **arguments}
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in arguments.items()}
    assert_refuses(TokenLayout.from_padding, good, moved, error, name)


@pytest.mark.parametrize(
    ("method", "argument", "name"),
    [
        ("pack", torch.zeros(2, 5, 3), "dense"),
        ("pack", torch.zeros(3, 7, 3), "dense"),
        ("pack", torch.zeros(2), "dense"),
        ("pack_text", torch.zeros(2, 3), "columns"),
        ("pack_text", torch.zeros(3, 4), "columns"),
        ("pack_text", torch.zeros(4), "columns"),
        ("unpack", torch.zeros(6, 3), "rows"),
        ("unpack", torch.zeros(2, 7, 3), "rows"),
        ("unpack", torch.tensor(0.0), "rows"),
    ],
)
@pytest.mark.parametrize("text_lengths", [[1, 4], [4, 4]], ids=["padded", "dense"])
def test_pack_and_unpack_refuse(method: str, argument: Tensor, name: str, text_lengths: list[int]) -> None:
    layout = TokenLayout.from_lengths([2, 3], text_lengths)  # width 7; 10 or 13 rows
    with refuses(ValueError, name):
        getattr(layout, method)(argument)


def test_is_frozen() -> None:
    layout = TokenLayout.from_lengths([2], [1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.num_rows = 3
