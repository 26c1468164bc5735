"""Which calls of the ops are benchmarked, as data.

A case is one op at one shape, batch, dtype and direction. Adding a case is adding an entry to ``OP_CASES``, or a shape
to ``SHAPES`` for every batch, dtype and direction at once. Cases in float16 are small: PyTorch's products of them take
seconds on most CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

import torch

from beit3_fast.layout import TokenLayout

from .cases import CAPTION_LENGTHS, PADDED_TEXT, check_known, dtype_name

EXPERTS = 2


@dataclass(frozen=True)
class Batch:
    """Samples of ``vision`` tokens and as many valid text tokens as ``text`` says, repeated over the samples; texts
    come padded to ``text_width``."""

    name: str
    samples: int
    vision: int
    text: tuple[int, ...]
    text_width: int

    def text_lengths(self) -> list[int]:
        return [self.text[i % len(self.text)] for i in range(self.samples)]

    @property
    def rows(self) -> int:
        """Tokens of all samples, padding left out."""
        return self.samples * self.vision + sum(self.text_lengths())

    def layout(self, device: torch.device) -> TokenLayout:
        return TokenLayout.from_lengths(
            [self.vision] * self.samples, self.text_lengths(), text_width=self.text_width, device=device
        )


@dataclass(frozen=True)
class Shape:
    """An op's sizes: ``width`` in, ``out`` the linear layer's output or the block's hidden width, ``heads`` and
    ``mask`` of attention; ``residual`` where the encoder fuses the addition."""

    name: str
    op: str
    width: int = 768
    out: int = 0
    heads: int = 0
    residual: bool = False
    mask: str = "full"


@dataclass(frozen=True)
class OpCase:
    """One op, forward or backward, at one shape."""

    shape: Shape
    batch: Batch
    dtype: torch.dtype = torch.float32
    backward: bool = False

    @property
    def name(self) -> str:
        """What ``--case`` takes."""
        dtype = dtype_name(self.dtype)
        return f"{self.shape.name}-{self.batch.name}-{dtype}-{'backward' if self.backward else 'forward'}"

    @property
    def op(self) -> str:
        return self.shape.op

    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the op's tensors, under the names of its arguments."""
        return OPS[self.op].inputs(self)

    def output(self) -> tuple[int, int]:
        """Shape of what the op returns: one row a token."""
        return self.batch.rows, self.shape.out if self.op == "multiway_linear" else self.shape.width

    def differentiated(self) -> list[str]:
        """The inputs whose gradients the backward computes; a residual's is the output's own."""
        return [name for name in self.inputs() if name != "residual"]

    def flops(self) -> int:
        """Of the matrix products that no implementation can do without.

        The backward has twice those of the forward: a gradient for each factor. Products that an implementation repeats
        rather than store are its own affair and not counted.
        """
        return OPS[self.op].flops(self) * (2 if self.backward else 1)

    def bytes(self) -> int:
        """Compulsory: every input read once, every result written once.

        What a forward keeps for the backward differs between implementations and is not counted.
        """
        shapes = self.inputs()
        if self.backward:
            elements = 2 * sum(math.prod(shapes[name]) for name in self.differentiated())  # read, and a gradient each
        else:
            elements = sum(map(math.prod, shapes.values()))
        return (elements + math.prod(self.output())) * self.dtype.itemsize

    def needed_memory(self, copies: int) -> int:
        """Bytes that a run of the case may need, roughly: ``copies`` of its tensors, and the truth in float64 with what
        plain PyTorch keeps on the way."""
        in_float64 = self.bytes() // self.dtype.itemsize * 8
        return copies * self.bytes() + 2 * in_float64 + 4 * 8 * OPS[self.op].scratch(self)


@dataclass(frozen=True)
class Op:
    """What the numbers of a case follow from: ``scratch`` is the elements of its largest intermediate."""

    inputs: Callable[[OpCase], dict[str, tuple[int, ...]]]
    flops: Callable[[OpCase], int]
    scratch: Callable[[OpCase], int] = lambda case: 0


def _norm_inputs(case: OpCase) -> dict[str, tuple[int, ...]]:
    width = case.shape.width
    return {"x": (case.batch.rows, width), "weight": (EXPERTS, width), "bias": (EXPERTS, width)}


def _linear_inputs(case: OpCase) -> dict[str, tuple[int, ...]]:
    rows, width, out = case.batch.rows, case.shape.width, case.shape.out
    inputs: dict[str, tuple[int, ...]] = {
        "x": (rows, width),
        "weight": (EXPERTS, out, width),
        "bias": (EXPERTS, out),
    }
    return inputs | ({"residual": (rows, out)} if case.shape.residual else {})


def _ffn_inputs(case: OpCase) -> dict[str, tuple[int, ...]]:
    rows, width, hidden = case.batch.rows, case.shape.width, case.shape.out
    inputs: dict[str, tuple[int, ...]] = {
        "x": (rows, width),
        "fc1_weight": (EXPERTS, hidden, width),
        "fc1_bias": (EXPERTS, hidden),
        "norm_weight": (EXPERTS, hidden),
        "norm_bias": (EXPERTS, hidden),
        "fc2_weight": (EXPERTS, width, hidden),
        "fc2_bias": (EXPERTS, width),
    }
    return inputs | ({"residual": (rows, width)} if case.shape.residual else {})


def _attention_inputs(case: OpCase) -> dict[str, tuple[int, ...]]:
    return {"qkv": (case.batch.rows, 3, case.shape.heads, case.shape.width // case.shape.heads)}


def _pairs(case: OpCase) -> int:
    """Query-key pairs of all samples, as far as the mask allows them."""
    vision, lengths = case.batch.vision, case.batch.text_lengths()
    if case.shape.mask == "captioning":
        return sum(vision**2 + text * vision + text * (text + 1) // 2 for text in lengths)
    return sum((vision + text) ** 2 for text in lengths)


OPS = {
    "layer_norm": Op(_norm_inputs, lambda case: 0),
    "multiway_linear": Op(_linear_inputs, lambda case: 2 * case.batch.rows * case.shape.width * case.shape.out),
    "multiway_ffn": Op(
        _ffn_inputs,
        lambda case: 4 * case.batch.rows * case.shape.width * case.shape.out,
        lambda case: case.batch.rows * case.shape.out,
    ),
    "attention": Op(
        _attention_inputs,
        lambda case: 4 * _pairs(case) * case.shape.width,
        lambda case: sum((case.batch.vision + text) ** 2 for text in case.batch.text_lengths()) * case.shape.heads,
    ),
}

RAGGED = Batch("ragged", 8, 197, CAPTION_LENGTHS, PADDED_TEXT)
DENSE = Batch("dense", 8, 197, (PADDED_TEXT,), PADDED_TEXT)
SMALL = Batch("small", 2, 17, (13, 9), 16)
PIXELS_480 = Batch("480px", 2, 901, CAPTION_LENGTHS, PADDED_TEXT)

NORM = Shape("norm", "layer_norm")
QKV = Shape("qkv", "multiway_linear", out=2304)
FFN = Shape("ffn", "multiway_ffn", out=3072, residual=True)
ATTENTION = Shape("attention", "attention", heads=12)
CAPTIONING = Shape("attention-captioning", "attention", heads=12, mask="captioning")
SHAPES = (
    NORM,
    Shape("norm-hidden", "layer_norm", width=3072),
    QKV,
    Shape("out", "multiway_linear", out=768, residual=True),
    FFN,
    ATTENTION,
)
DTYPES = (torch.float32, torch.bfloat16)

DIRECTIONS = (False, True)
ONE_EACH = (NORM, QKV, FFN, ATTENTION)

OP_CASES = tuple(
    OpCase(*entry)
    for entries in (
        product(SHAPES, (RAGGED, DENSE), DTYPES, DIRECTIONS),
        product((CAPTIONING,), (RAGGED,), DTYPES, DIRECTIONS),
        product((ATTENTION,), (PIXELS_480,), DTYPES, DIRECTIONS),
        product(ONE_EACH, (SMALL,), (torch.float16,), DIRECTIONS),
    )
    for entry in entries
)
QUICK_OP_CASES = tuple(
    OpCase(*entry)
    for entries in (
        product(ONE_EACH, (SMALL,), DTYPES, DIRECTIONS),
        product((CAPTIONING,), (SMALL,), (torch.float32,), DIRECTIONS),
    )
    for entry in entries
)


def select_op_cases(names: Iterable[str] = (), ops: Iterable[str] = (), *, quick: bool = False) -> list[OpCase]:
    """The cases of these names in the order given, with no names all of them or the quick ones; of these ops alone, if
    any are named.

    Raises:
        ValueError: an unknown case or op (the nearest known ones are offered), or no case is left.
    """
    known = {case.name: case for case in (*OP_CASES, *QUICK_OP_CASES)}
    names, ops = list(names), list(ops)
    for name in names:
        check_known("case", name, known)
    for op in ops:
        check_known("op", op, OPS)
    chosen = [known[name] for name in names] or list(QUICK_OP_CASES if quick else OP_CASES)
    chosen = [case for case in chosen if not ops or case.op in ops]
    if not chosen:
        raise ValueError(f"no case is left: none of {', '.join(names)} is of {' or '.join(ops)}")
    return chosen
