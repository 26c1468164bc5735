"""Where a section runs and on what sizes: all of it on a GPU, or tiny on a CPU to see that everything works."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from beit3_fast.layout import TokenLayout
from beit3_fast.models import EncoderConfig

from ..op_cases import Batch
from .record import Missing

ROOT = Path(__file__).resolve().parents[2]
"""The checkout, where there is one."""


@dataclass(frozen=True)
class Gemm:
    """A matrix product of a layer: rows (N, fan_in) by two experts' weights (fan_out, fan_in)."""

    name: str
    fan_in: int
    fan_out: int

    def flops(self, rows: int) -> int:
        return 2 * rows * self.fan_in * self.fan_out


@dataclass(frozen=True)
class Size:
    """A model's: ``name`` is "base" or "large" on a CPU too, where the numbers are tiny."""

    name: str
    width: int
    hidden: int
    heads: int
    layers: int
    image_size: int = 224
    vocabulary: int = 64010

    @property
    def gemms(self) -> tuple[Gemm, ...]:
        return (
            Gemm("qkv", self.width, 3 * self.width),
            Gemm("out", self.width, self.width),
            Gemm("fc1", self.width, self.hidden),
            Gemm("fc2", self.hidden, self.width),
        )

    def config(self) -> EncoderConfig:
        return EncoderConfig(
            encoder_embed_dim=self.width,
            encoder_attention_heads=self.heads,
            encoder_ffn_embed_dim=self.hidden,
            encoder_layers=self.layers,
            img_size=self.image_size,
            vocab_size=self.vocabulary,
            normalize_output=True,
        )


@dataclass(frozen=True)
class Sizes:
    """What is run.

    Attributes:
        models: base and large.
        batches: samples; a model has ``vision`` image and ``text`` text tokens a sample.
        long_vision: image tokens of a larger picture, for attention.
        padded_text: columns that a text is padded to.
        text_lengths: of the texts in them.
        repeats: calls whose bits must be equal.
        square: rows and columns of the large matrix product.
        copied: bytes of the large copy.
    """

    models: tuple[Size, ...]
    batches: tuple[int, ...]
    vision: int
    text: int
    long_vision: int
    padded_text: int
    text_lengths: tuple[int, ...]
    repeats: int
    square: int
    copied: int


REAL = Sizes(
    models=(Size("base", 768, 3072, 12, 12), Size("large", 1024, 4096, 16, 24)),
    batches=(1, 8, 64),
    vision=197,
    text=13,
    long_vision=577,
    padded_text=64,
    text_lengths=(13, 9, 17, 11, 15, 12, 16, 11),
    repeats=100,
    square=8192,
    copied=2**30,
)
TINY = Sizes(
    models=(Size("base", 32, 64, 2, 2, 32, 100), Size("large", 64, 128, 2, 2, 32, 100)),
    batches=(1, 2),
    vision=5,
    text=3,
    long_vision=11,
    padded_text=6,
    text_lengths=(3, 2),
    repeats=3,
    square=64,
    copied=2**20,
)


@dataclass(frozen=True)
class Setting:
    """What a section gets.

    Attributes:
        out: the report's folder.
        dry: on a CPU, tiny; what needs a GPU is left out with the reason.
        sizes: what is run.
    """

    out: Path
    dry: bool
    sizes: Sizes = field(default=REAL)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self.dry else torch.device("cuda", 0)

    @property
    def base(self) -> Size:
        return self.sizes.models[0]

    def batch(self, samples: int, vision: int | None = None) -> Batch:
        """Samples without padding."""
        vision, text = vision or self.sizes.vision, self.sizes.text
        return Batch(f"{samples} x {vision + text}", samples, vision, (text,), text)

    def rows(self, samples: int) -> int:
        return samples * (self.sizes.vision + self.sizes.text)

    def ranges(self, samples: int) -> tuple[slice, slice]:
        """The experts' rows: every image token first."""
        split = samples * self.sizes.vision
        return slice(0, split), slice(split, self.rows(samples))

    def layout(self, samples: int) -> TokenLayout:
        return self.batch(samples).layout(self.device)

    def needs_gpu(self, what: str) -> None:
        """Raises :class:`Missing` in a dry run."""
        if self.dry:
            raise Missing(f"{what} needs a GPU")


def models_and_batches(sizes: Sizes) -> Iterator[tuple[Size, int]]:
    """Every model with every batch, what matters most first: the base model, the largest batch."""
    for model in sizes.models:
        for batch in reversed(sizes.batches):
            yield model, batch
