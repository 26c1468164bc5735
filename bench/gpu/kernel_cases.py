"""The calls of the ops that a layer makes, as cases of ``bench ops`` at the report's sizes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from beit3_fast import ops
from beit3_fast.layout import TokenLayout

from ..op_cases import Batch, OpCase, Shape
from .setting import Setting, Size

BEAMS, COLUMNS, WRITTEN = 3, 20, 10
"""Of a captioning step."""


def shapes(model: Size) -> tuple[Shape, ...]:
    width = model.width
    return (
        Shape("norm", "layer_norm", width=width),
        Shape("qkv", "multiway_linear", width=width, out=3 * width),
        Shape("out", "multiway_linear", width=width, out=width, residual=True),
        Shape("ffn", "multiway_ffn", width=width, out=model.hidden, residual=True),
        Shape("attention", "attention", width=width, heads=model.heads),
    )


def cases(model: Size, batch: Batch, dtype: torch.dtype) -> list[OpCase]:
    """Every op, forward and backward."""
    return [OpCase(shape, batch, dtype, backward) for shape in shapes(model) for backward in (False, True)]


class DecodeStep:
    """A captioning step's attention: ``BEAMS`` beams a sample, ``WRITTEN`` words each; forward alone."""

    def __init__(self, model: Size, samples: int, dtype: torch.dtype, setting: Setting) -> None:
        generator = torch.Generator().manual_seed(0)
        heads, dim, beams = model.heads, model.width // model.heads, samples * BEAMS

        def drawn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype).to(setting.device)

        vision = [setting.sizes.vision] * samples
        self.layout = TokenLayout.from_lengths(vision, [0] * samples, device=setting.device)
        self.qkv = drawn(beams, 3, heads, dim)
        self.prefix = drawn(sum(vision), 2, heads, dim)
        self.words = drawn(COLUMNS, beams, 2, heads, dim)
        history = torch.arange(beams, dtype=torch.int32).expand(COLUMNS, beams)
        self.history = history.contiguous().to(setting.device)

    @classmethod
    def once(cls, model: Size, samples: int, dtype: torch.dtype, setting: Setting) -> Callable[[], Tensor]:
        """A function that makes the step and runs it."""
        return lambda: cls(model, samples, dtype, setting)()

    def __call__(self, op: Callable[..., Tensor] = ops.decode_attention, dtype: torch.dtype | None = None) -> Tensor:
        """(beams, width), in another dtype if one is given."""
        qkv, prefix, words = (t if dtype is None else t.to(dtype) for t in (self.qkv, self.prefix, self.words))
        return op(qkv, prefix, self.layout, words, self.history, WRITTEN)
