"""Models of two layers, a batch for them, and what a head's loss is."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3_fast.models import EncoderConfig, released_gradients

from .machine import BASE, DEVICE, REAL, Precision

LAYERS = 2
IMAGE, PATCH = (224, 16) if REAL else (32, 8)
BATCH, TEXT, VOCABULARY = 4, 20, 200


def config(**overrides: Any) -> EncoderConfig:
    sizes: dict[str, Any] = {
        "encoder_embed_dim": BASE.width,
        "encoder_ffn_embed_dim": BASE.hidden,
        "encoder_attention_heads": BASE.heads,
        "encoder_layers": LAYERS,
        "img_size": IMAGE,
        "patch_size": PATCH,
        "vocab_size": VOCABULARY,
    }
    return EncoderConfig(**{**sizes, **overrides})


@torch.no_grad()
def model_of(kind: type[nn.Module], *, num_classes: int | None = None, **overrides: Any) -> nn.Module:
    """A model in eval mode on the device, the same at every call. No parameter is at its default, where biases are zero
    and LayerNorms alike: a swap of experts would not show."""
    with torch.device("meta"):
        model = kind(config(**overrides), **({} if num_classes is None else {"num_classes": num_classes}))
    model.to_empty(device=DEVICE)
    norms = {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if "LayerNorm" in type(module).__name__
        for name, _ in module.named_parameters()
    }
    for name, parameter in model.named_parameters():
        generator = torch.Generator(DEVICE).manual_seed(zlib.crc32(name.encode()))
        values = torch.randn(parameter.shape, generator=generator, device=DEVICE)
        fan_in = parameter[0].numel() if parameter.ndim > 3 else parameter.shape[-1] if parameter.ndim else 1
        if name == "logit_scale":
            parameter.fill_(2.3)
        elif name in norms or name.endswith("bias"):
            parameter.copy_((name in norms and name.endswith("weight")) + 0.2 * values)
        elif "embed" in name and parameter.ndim < 4:  # tables and tokens
            parameter.copy_(0.6 * values)
        else:
            parameter.copy_(values * fan_in**-0.5)
    return model.eval()


@dataclass(frozen=True)
class Batch:
    """Images with texts of several lengths; `padding` is 1 where a text has ended."""

    image: Tensor
    other_image: Tensor
    tokens: Tensor
    padding: Tensor
    lengths: list[int]
    masked: Tensor
    labels: Tensor


def batch_of(dtype: torch.dtype, *, seed: int = 0, batch: int = BATCH) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths = [2 + (TEXT - 2 - 5 * (row + seed)) % (TEXT - 1) for row in range(batch)]
    columns = torch.arange(TEXT)
    padding = columns >= torch.tensor(lengths).unsqueeze(1)
    image, other = torch.randn(2, batch, 3, IMAGE, IMAGE, generator=generator).to(dtype)
    return Batch(
        image.to(DEVICE),
        other.to(DEVICE),
        torch.randint(4, VOCABULARY, (batch, TEXT), generator=generator).to(DEVICE),
        padding.long().to(DEVICE),
        lengths,
        ((columns % 3 == 1) & ~padding).long().to(DEVICE),
        torch.randint(7, (batch,), generator=generator).to(DEVICE),
    )


def outputs(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What a head returns, and the loss of training it."""
    name = type(model).__name__
    if name == "BEiT3ForImageClassification":
        logits = model(batch.image)
        return {"logits": logits, "loss": F.cross_entropy(logits, batch.labels)}
    if name == "BEiT3ForVisualReasoning":
        logits = model(batch.image, batch.other_image, batch.tokens, batch.padding)
        return {"logits": logits, "loss": F.cross_entropy(logits, batch.labels)}
    if name == "BEiT3ForVisualQuestionAnswering":
        logits = model(batch.image, batch.tokens, batch.padding)
        return {"logits": logits, "loss": F.cross_entropy(logits, batch.labels)}
    if name == "BEiT3ForCaptioning":
        logits, _ = model(batch.image, batch.tokens, batch.padding, batch.masked)
        return {"logits": logits, "loss": F.cross_entropy(logits, batch.tokens[batch.masked.bool()])}
    if name == "BEiT3ForPretraining":
        patches, words = model(batch.image, batch.tokens, batch.padding, None, batch.masked)
        loss = patches.logsumexp(-1).mean() + F.cross_entropy(words, batch.tokens[batch.masked.bool()])
        return {"patches": patches, "words": words, "loss": loss}
    loss, vision, language = model(batch.image, batch.tokens, batch.padding)
    return {"vision": vision, "language": language, "loss": loss}


def values_and_gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What the head returns, its loss, and the gradients by released name of 1024 times that: fp16 loses small ones."""
    model.zero_grad(set_to_none=True)
    result = outputs(model, batch)
    (1024 * result["loss"]).backward()
    gradients = {name: value.detach() for name, value in released_gradients(model).items() if value is not None}
    return {name: value.detach() for name, value in result.items()} | gradients


@dataclass(frozen=True)
class Way:
    """How a model runs: in a precision of its own, or in fp32 under autocast."""

    precision: Precision
    autocast: bool = False

    def __str__(self) -> str:
        return f"autocast to {self.precision}" if self.autocast else str(self.precision)

    @property
    def model_dtype(self) -> torch.dtype:
        return torch.float32 if self.autocast else self.precision.dtype

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        with self.precision.set(), torch.autocast(DEVICE.type, self.precision.dtype, enabled=self.autocast):
            yield
