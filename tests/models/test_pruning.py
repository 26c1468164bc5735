"""The last layer computes only the rows that a head reads: which rows those are, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ops.parity import RecordedOps, assert_exact, refuses
from oracles import public
from oracles.pairs import pair, relative_error
from torch import Tensor, nn

import beit3_fast.models as fast
from beit3_fast.layout import TokenLayout, _device_layout

HEADS = ("nlvr2", "retrieval", "vqav2")  # they read a token or two of each sample
BATCH, LAYERS, VISION_TOKENS = 3, 2, 17
LENGTHS = [4, 9, 2]


def every_row(
    self: fast.BEiT3, parts: tuple[str, ...], image: Tensor | None, text: Tensor | None, *args: Any, **kwargs: Any
) -> tuple[Tensor, ...]:
    """``BEiT3.encode_first`` without pruning."""
    rows, layout = self.encode(image, text, *args, **kwargs)
    tokens = layout.unpack(rows if layout.num_rows else rows.detach())  # without rows no parameter gets a gradient
    vision, text = tokens.split([layout.vision_width, layout.text_width], 1)
    first = {"vision": F.pad(vision, (0, 0, 0, 1))[:, 0], "text": F.pad(text, (0, 0, 0, 1))[:, 0]}  # zeros where none
    return tuple(first[part] for part in parts)


def device_layout(padding: Tensor, *, vision_tokens: int = 0, device: Any = None) -> TokenLayout:
    """What a mask on a GPU gives: sizes that do not depend on it, unused rows at the end."""
    return _device_layout(padding == 0, vision_tokens)


@dataclass
class Outcome:
    """What one call gives: outputs, gradients by parameter, and where it left the random generator."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor | None]
    generator: Tensor


def outcome(model: nn.Module, call: Callable[[], dict[str, Tensor]]) -> Outcome:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(11)
    outputs = call()
    generator = torch.get_rng_state()
    sum((value * torch.randn_like(value)).sum() for value in outputs.values()).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Outcome({name: value.detach() for name, value in outputs.items()}, gradients, generator)


def assert_pruning_changes_nothing(
    model: nn.Module, call: Callable[[], dict[str, Tensor]], tolerance: float = 1e-11
) -> None:
    """Outputs, every gradient and the random numbers drawn, with pruning and without."""
    pruned = outcome(model, call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast.BEiT3, "encode_first", every_row)
        whole = outcome(model, call)
    assert torch.equal(pruned.generator, whole.generator)
    for name, value in whole.outputs.items():
        assert_exact(pruned.outputs[name], value, name, tolerance)
    # a gradient that is rounding noise is measured on the scale of the others
    largest = max(grad.abs().max().item() for grad in whole.gradients.values() if grad is not None)
    for name, grad in whole.gradients.items():
        assert (pruned.gradients[name] is None) == (grad is None), name
        if grad is not None:
            actual = pruned.gradients[name]
            assert actual is not None
            assert relative_error(actual, grad, max(grad.abs().max().item(), 1e-3 * largest)) <= tolerance, name


def in_double(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in batch.items()}


def make(head: str, **overrides: Any) -> nn.Module:
    model = pair(head, encoder_layers=LAYERS, **overrides)[1].double()
    assert model.beit3.vision_embed.num_position_embeddings() == VISION_TOKENS
    return model


def calling(model: nn.Module, head: str, **kwargs: Any) -> Callable[[], dict[str, Tensor]]:
    batch = in_double(public.training_batch(head, batch=BATCH, **kwargs))
    return lambda: public.outputs(model, head, batch)


# ------------------------------------------------------------------------------------------------- nothing else changes

TEXTS: dict[str, dict[str, Any]] = {
    "padded": {"lengths": LENGTHS},
    "unpadded": {"padding": "unpadded"},
    "no mask": {"padding": "none"},
    "one token each": {"lengths": [1, 1, 1]},
    "first text empty": {"lengths": [0, 4, 2]},
    "last text empty": {"lengths": [4, 2, 0]},
    "all texts empty": {"lengths": [0, 0, 0]},
}


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("on_device", [False, True], ids=["host lengths", "device lengths"])
def test_outputs_and_gradients(head: str, texts: str, on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_device:
        monkeypatch.setattr(TokenLayout, "from_padding", device_layout)
    model = make(head)
    assert_pruning_changes_nothing(model, calling(model, head, **TEXTS[texts]))


@pytest.mark.parametrize("head", HEADS)
def test_padding_between_tokens(head: str) -> None:
    model = make(head)
    batch = in_double(public.training_batch(head, batch=BATCH, padding="unpadded"))
    batch["padding_mask"][0, 3:5] = 1
    batch["padding_mask"][2, [1, 8]] = 1
    assert_pruning_changes_nothing(model, lambda: public.outputs(model, head, batch))


@pytest.mark.parametrize("head", HEADS)
def test_in_single_precision(head: str) -> None:
    """Through the kernels of the CPU library, which choose their blocks by the number of rows."""
    model = pair(head, encoder_layers=LAYERS)[1]
    batch = public.training_batch(head, batch=BATCH, lengths=LENGTHS)
    assert_pruning_changes_nothing(model, lambda: public.outputs(model, head, batch), tolerance=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_training_drops_the_same_paths(head: str, checkpointing: bool) -> None:
    model = make(head, drop_path_rate=0.5, checkpoint_activations=checkpointing).train()
    before = torch.get_rng_state()
    call = calling(model, head, lengths=LENGTHS)
    call()
    assert not torch.equal(torch.get_rng_state(), before)
    assert_pruning_changes_nothing(model, call)


PAPER = {"shared_attention": True, "vl_ffn_layers": 1}


@pytest.mark.parametrize("overrides", [{}, PAPER, {"normalize_output": False}], ids=["released", "paper", "no norm"])
@pytest.mark.parametrize("given", ["image", "text", "both"])
@pytest.mark.parametrize("parts", [("vision",), ("text",), ("vision", "text")], ids="+".join)
def test_backbone(parts: tuple[str, ...], given: str, overrides: dict[str, Any]) -> None:
    """Any part of any input; of an absent modality zeros. The paper's third expert takes all rows of both together."""
    config = {
        "encoder_embed_dim": 24,
        "encoder_attention_heads": 3,
        "encoder_ffn_embed_dim": 40,
        "encoder_layers": LAYERS,
    }
    model = fast.BEiT3(fast.EncoderConfig(**{**config, "vocab_size": 50, "img_size": 32, **overrides})).double()
    for parameter in model.parameters():  # biases too, so that no two experts agree
        nn.init.normal_(parameter, std=0.3)
    data = in_double(public.inputs(BATCH, vocab_size=50, lengths=LENGTHS))
    image = data["image"] if given != "text" else None
    text, mask = (data["tokens"], data["mask"]) if given != "image" else (None, None)

    def call() -> dict[str, Tensor]:
        return dict(zip(parts, model.encode_first(parts, image, text, mask), strict=True))

    first = call()
    for part, absent in (("vision", "text"), ("text", "image")):
        if part in parts:
            assert first[part].shape == (BATCH, 24)
            assert (first[part].count_nonzero() == 0) == (given == absent)
    if any(value.count_nonzero() for value in first.values()):
        assert_pruning_changes_nothing(model, call)


@pytest.mark.parametrize("parts", [(), ("text", "vision"), ["vision"], "text", None], ids=str)
def test_refuses_other_parts(parts: Any) -> None:
    model = make("vqav2").beit3
    with refuses(ValueError, "parts"):
        model.encode_first(parts, torch.zeros(1, 3, 32, 32, dtype=torch.float64), None)


# --------------------------------------------------------------------------------------------- the rows are left out

TEXT_ROWS = sum(LENGTHS)
READ = {  # rows that enter the encoder, rows that the last layer's feed-forward block gets
    "nlvr2": [(2 * (BATCH * VISION_TOKENS + TEXT_ROWS), 4 * BATCH)],
    "vqav2": [(BATCH * VISION_TOKENS + TEXT_ROWS, BATCH)],
    "retrieval": [(BATCH * VISION_TOKENS, BATCH), (TEXT_ROWS, BATCH)],
    # these read most rows, and get all
    "imageclassification": [(BATCH * VISION_TOKENS, BATCH * VISION_TOKENS)],
    "captioning": [(BATCH * VISION_TOKENS + TEXT_ROWS,) * 2],
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("head", READ)
def test_rows_that_reach_the_last_feed_forward_block(head: str, training: bool) -> None:
    model = make(head).train(training)
    with RecordedOps() as log:
        calling(model, head, lengths=LENGTHS)()
    expected = [rows for every, last in READ[head] for rows in [every] * (LAYERS - 1) + [last]]
    assert [outputs[0].shape[0] for name, outputs in log.calls if name == "multiway_ffn"] == expected
    # a layer's two projections: every row has keys and values, the output is for those that are read
    expected = [rows for every, last in READ[head] for rows in [every, every] * (LAYERS - 1) + [every, last]]
    assert [outputs[0].shape[0] for name, outputs in log.calls if name == "multiway_linear"] == expected


def test_the_backbone_s_public_call_computes_every_row() -> None:
    model = make("vqav2").beit3
    data = in_double(public.inputs(BATCH, lengths=LENGTHS))
    with RecordedOps() as log:
        out = model(data["tokens"], data["image"], data["mask"])["encoder_out"]
    every = BATCH * VISION_TOKENS + TEXT_ROWS
    assert [outputs[0].shape[0] for name, outputs in log.calls if name == "multiway_ffn"] == [every] * LAYERS
    assert out[:, :VISION_TOKENS].abs().sum(-1).count_nonzero() == BATCH * VISION_TOKENS


# ------------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("head", HEADS)
def test_compiles_as_one_graph(head: str) -> None:
    torch._dynamo.reset()
    model = make(head)
    call = calling(model, head, lengths=LENGTHS)
    expected = outcome(model, call)
    actual = outcome(model, torch.compile(call, fullgraph=True, backend="aot_eager"))
    for name, value in expected.outputs.items():
        assert_exact(actual.outputs[name], value, name)
    for name, grad in expected.gradients.items():
        if grad is not None and grad.count_nonzero():
            assert relative_error(actual.gradients[name], grad, max(grad.abs().max().item(), 1e-3)) <= 1e-10, name
