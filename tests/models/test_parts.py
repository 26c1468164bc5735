"""In inference on a CPU a large batch goes through the layers some samples at a time: nothing else changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ops.parity import assert_exact
from torch import Tensor

import beit3_fast.models as fast
from beit3_fast.models import encoder

BATCH, TEXT = 5, 9
LENGTHS = [4, 9, 0, 2, 7]


SIZE = {
    "img_size": 16, "patch_size": 4, "vocab_size": 60, "encoder_embed_dim": 32, "encoder_attention_heads": 2,
    "encoder_ffn_embed_dim": 48, "encoder_layers": 3, "normalize_output": True,
}  # fmt: skip


@pytest.fixture(params=[{}, {"shared_attention": True, "vl_ffn_layers": 1}], ids=["released", "paper"])
def model(request: pytest.FixtureRequest) -> fast.BEiT3:
    torch.manual_seed(0)
    return fast.BEiT3(fast.EncoderConfig(**SIZE, **request.param)).eval().double()


def calls(model: fast.BEiT3) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    size = model.config.img_size
    image = torch.randn(BATCH, 3, size, size, dtype=torch.float64)
    text = torch.randint(4, model.config.vocab_size, (BATCH, TEXT))
    padding = torch.arange(TEXT) >= torch.tensor(LENGTHS).unsqueeze(1)
    holes = padding | (torch.arange(TEXT) == 1)
    columns = model.vision_embed.num_position_embeddings() + TEXT
    mask = torch.ones(columns, columns, dtype=torch.bool).triu(1)
    return {
        "joint": lambda: model.encode(image, text)[:1],
        "lengths": lambda: model.encode(image, text, text_lengths=LENGTHS)[:1],
        "holes": lambda: (model(text, image, holes)["encoder_out"],),
        "image": lambda: model.encode(image, None)[:1],
        "text": lambda: model.encode(None, text, padding)[:1],
        "causal": lambda: model.encode(image, text, mask="captioning")[:1],
        "mask": lambda: (model(text, image, attn_mask=mask)["encoder_out"],),
        "first tokens": lambda: model.encode_first(("vision", "text"), image, text, padding),
    }


@pytest.mark.parametrize("rows", [1, 30])
def test_parts_change_nothing(model: fast.BEiT3, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = encoder.EncoderLayer.forward

    def counting(self: encoder.EncoderLayer, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(encoder.EncoderLayer, "forward", counting)
    for name, call in calls(model).items():
        with torch.no_grad():
            whole = call()
            seen.clear()
            with monkeypatch.context() as patch:
                patch.setattr(encoder, "BYTES_AT_ONCE", rows * model.config.encoder_embed_dim * 8)
                parts = call()
        assert len(seen) > model.encoder.num_layers or (name, rows) == ("text", 30), name
        for part, expected in zip(parts, whole, strict=True):
            assert_exact(part, expected, name, 1e-12)


def test_gradients_are_of_the_whole_batch(model: fast.BEiT3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_in_parts", None)
    for call in calls(model).values():
        sum(out.sum() for out in call()).backward()
