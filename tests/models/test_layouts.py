"""A layout that is handed over, one that is made while a forward is traced, and traces for a GPU that is not there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ops.parity import refuses
from oracles import public
from oracles.pairs import build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from beit3_fast.layout import TokenLayout, _device_layout

BATCH, LENGTHS = 3, [4, 9, 2]
HEADS = (None, *public.HEADS)

# What each forward calls its inputs.
NAMES: dict[str | None, tuple[str, ...]] = {
    None: ("visual_tokens", "textual_tokens", "text_padding_position"),
    "imageclassification": ("image",),
    "nlvr2": ("image_a", "text_description", "padding_mask"),
    "vqav2": ("image", "question", "padding_mask"),
    "captioning": ("image", "text_ids", "padding_mask"),
    "retrieval": ("image", "text_description", "padding_mask"),
}


def model_of(head: str | None, device: str = "cpu") -> nn.Module:
    with torch.device(device):
        return build(head, public.config(head, encoder_layers=2)).eval()


def arguments(head: str | None, device: str = "cpu") -> dict[str, Any]:
    data = public.inputs(batch=BATCH, lengths=LENGTHS)
    values = [data[name].to(device) for name in ("image", "tokens", "mask")]
    given: dict[str, Any] = dict(zip(NAMES[head], values, strict=False))
    if head == "nlvr2":
        given["image_b"] = given["image_a"].flip(0)
    if head == "captioning":
        given["language_masked_pos"] = None
    if head == "retrieval":
        given["only_infer"] = True
    return given


def tensors(returned: Any) -> list[Tensor]:
    """Those that a forward computed, in order."""
    if isinstance(returned, dict):
        returned = (returned["encoder_out"], returned["encoder_embedding"])
    values = returned if isinstance(returned, tuple) else (returned,)
    return [value for value in values if isinstance(value, Tensor)]


def layout_of(head: str | None, model: nn.Module, given: dict[str, Any], padding: Tensor | None) -> TokenLayout:
    """What the head's forward makes itself; with `padding`, as if only the device knew its values."""
    image, text = (given.get(name) for name in (NAMES[head] + (None, None))[:2])
    if head == "retrieval":
        image = None
    if head == "nlvr2":
        image, text = torch.cat([image, image]), torch.cat([text, text])
        padding = None if padding is None else torch.cat([padding, padding])
    if padding is not None and text is not None:
        vision = 0 if image is None else (model if head is None else model.beit3).vision_embed.num_position_embeddings()
        return _device_layout(padding == 0, vision)
    lengths = None if text is None else LENGTHS * (2 if head == "nlvr2" else 1)
    return (model if head is None else model.beit3).layout(image, text, None, lengths)


@pytest.mark.parametrize("on_device", [False, True], ids=["host lengths", "device lengths"])
@pytest.mark.parametrize("head", HEADS)
def test_a_ready_layout_gives_the_same(head: str | None, on_device: bool) -> None:
    torch.manual_seed(1)
    model, given = model_of(head), arguments(head)
    padding = given[NAMES[head][2]] if len(NAMES[head]) > 2 else None
    layout = layout_of(head, model, given, padding if on_device else None)
    with torch.no_grad():
        expected = tensors(model(**given))
        for name in NAMES[head][2:]:  # the layout says what is padding
            given[name] = None
        for _ in range(2):
            for actual, wanted in zip(tensors(model(**given, layout=layout)), expected, strict=True):
                torch.testing.assert_close(actual, wanted, rtol=0, atol=2e-5)


BAD: dict[str, Callable[[TokenLayout], Any]] = {
    "type": lambda good: good.segments,
    "batch": lambda good: TokenLayout.from_lengths(good.vision_lengths[1:], LENGTHS[1:], text_width=9),
    "text width": lambda good: TokenLayout.from_lengths(good.vision_lengths, LENGTHS, text_width=10),
    "vision tokens": lambda good: TokenLayout.from_lengths([16] * BATCH, LENGTHS, text_width=9),
    "padded images": lambda good: TokenLayout.from_lengths([17, 16, 17], LENGTHS, text_width=9),
    "device": lambda good: TokenLayout.from_lengths(good.vision_lengths, LENGTHS, text_width=9, device="meta"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("head", [None, "vqav2", "captioning"])
def test_a_layout_of_something_else_is_refused(head: str | None, bad: str) -> None:
    model, given = model_of(head), arguments(head)
    good = layout_of(head, model, given, None)
    with refuses(TypeError if bad == "type" else ValueError, "layout"):
        model(**given, layout=BAD[bad](good))


def test_incremental_decoding_takes_no_layout() -> None:
    model, given = model_of(None), arguments(None)
    layout = layout_of(None, model, given, None)
    with refuses(ValueError, "layout"):
        model(**given, incremental_state={}, layout=layout)
    model, given = model_of("captioning"), arguments("captioning")
    with refuses(ValueError, "layout"):
        model(**given, incremental_state={}, layout=layout)


@pytest.mark.parametrize("text", [LENGTHS, [9, 9, 9], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("vision", [[17, 17, 17], [3, 0, 5]], ids=str)
def test_a_traced_layout_is_the_eager_one(vision: list[int], text: list[int]) -> None:
    def make(x: Tensor) -> tuple[Tensor | None, ...]:
        layout = TokenLayout.from_lengths(vision, text, text_width=9)
        return layout.expert_offsets, layout.segments, layout.vision_source, layout.text_source, x + layout.num_rows

    traced = torch.compile(make, fullgraph=True, backend="eager")
    for actual, expected in zip(traced(torch.zeros(1)), make(torch.zeros(1)), strict=True):
        assert (actual is None and expected is None) or torch.equal(actual, expected)


# --- for a GPU that is not there --------------------------------------------------------------------------------------


def devices_of(graph: torch.fx.GraphModule) -> set[str]:
    values = [node.meta.get("example_value", node.meta.get("val")) for node in graph.graph.nodes]
    return {value.device.type for value in values if isinstance(value, Tensor)}


@pytest.mark.parametrize("padding", ["on the device", "lengths on the host", "none"])
@pytest.mark.parametrize("head", HEADS)
def test_a_model_on_a_gpu_is_traced_as_one_graph(head: str | None, padding: str) -> None:
    """Nothing in it lies on the host, which would keep Inductor from using CUDA graphs."""
    seen: list[set[str]] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.append(devices_of(graph))
        return graph.forward

    torch._dynamo.reset()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, given = model_of(head, "cuda"), arguments(head, "cuda")
        if padding != "on the device":
            for name in NAMES[head][2:]:
                given[name] = None
            if padding == "lengths on the host" and len(NAMES[head]) > 2:
                given["text_lengths"] = LENGTHS
        returned = torch.compile(model, fullgraph=True, backend=backend)(**given)
        assert {value.device.type for value in tensors(returned)} == {"cuda"}
    assert seen == [{"cuda"}]


@pytest.mark.parametrize("head", HEADS)
def test_a_model_on_a_gpu_never_waits(head: str | None) -> None:
    """A fake tensor has no values: whatever asks for one, which would be a wait, raises."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, given = model_of(head, "cuda"), arguments(head, "cuda")
        assert {value.device.type for value in tensors(model(**given))} == {"cuda"}


@pytest.mark.parametrize("head", HEADS)
def test_the_default_device_changes_nothing(head: str | None) -> None:
    """``torch.set_default_device``: whatever a forward makes says where."""
    model, given = model_of(head), arguments(head)
    with torch.no_grad():
        expected = tensors(model(**given))
        torch.set_default_device("meta")
        try:
            actual = tensors(model(**given))
            given = {**given, **dict.fromkeys(NAMES[head][2:])}
            ready = layout_of(head, model, given, None)
            from_layout = tensors(model(**given, layout=ready))
        finally:
            torch.set_default_device(None)
    for found in (actual, from_layout):
        assert all(torch.equal(value, wanted) for value, wanted in zip(found, expected, strict=True))
