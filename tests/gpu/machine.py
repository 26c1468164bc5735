"""Where the tests of this folder run: on a GPU at the sizes that users have, elsewhere as a rehearsal at tiny ones.

A GPU is at hand for minutes. So what runs there is what every other machine runs as well, on the CPU, where the ops are
served by the compiled library, or by the Triton kernels in a simulator where :func:`served` is told to; no line is
executed for the first time on the GPU, but for what there is no counterpart of: streams, graphs, waits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from beit3_fast.backend import use_backend
from beit3_fast.layout import TokenLayout

REAL = torch.cuda.is_available()
DEVICE = torch.device("cuda" if REAL else "cpu")

needs_gpu = pytest.mark.skipif(not REAL, reason="there is no GPU")


@dataclass(frozen=True)
class Size:
    """Widths of a model."""

    name: str
    width: int
    hidden: int
    heads: int

    def __str__(self) -> str:
        return self.name


BASE = Size("base", 768, 3072, 12) if REAL else Size("base", 32, 64, 2)
LARGE = Size("large", 1024, 4096, 16) if REAL else Size("large", 48, 96, 3)


@dataclass(frozen=True)
class Precision:
    """A dtype and how its products are taken (``torch.set_float32_matmul_precision``)."""

    name: str
    dtype: torch.dtype
    products: str = "highest"

    def __str__(self) -> str:
        return self.name

    @property
    def eps(self) -> float:
        """Of the products: TF32 keeps 10 bits of the operands."""
        return 2.0**-10 if self.products == "high" else torch.finfo(self.dtype).eps

    @property
    def tolerance(self) -> float:
        """Between two ways to compute a model's output, of its largest magnitude."""
        return max(8 * self.eps, 2e-5)

    @contextlib.contextmanager
    def set(self) -> Iterator[None]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.products)
        try:
            # cuDNN's convolutions take TF32 unless they are told not to
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=self.products == "high"):
                yield
        finally:
            torch.set_float32_matmul_precision(before)


BF16, FP16 = Precision("bf16", torch.bfloat16), Precision("fp16", torch.float16)
FP32, TF32 = Precision("fp32", torch.float32), Precision("fp32 high", torch.float32, "high")
PRECISIONS = (BF16, FP16, FP32, TF32)

# (vision, text) tokens of each sample, by rows in all. On sm_90 GEMMs take tiles of 64 and 128 rows (wgmma) from a few
# hundred rows on: 210 is one image with its text, 1680 are 8 and 13440 are 64 of them; 700 and 2600 end inside a tile.
LENGTHS: dict[int, tuple[list[int], list[int]]] = (
    {
        1: ([1], [0]),
        210: ([197], [13]),
        700: ([197] * 3, [64, 40, 5]),
        1680: ([197] * 8, [13] * 8),
        2600: ([577] * 4, [64, 100, 0, 128]),
        13440: ([197] * 64, [13] * 64),
    }
    if REAL
    else {1: ([1], [0]), 9: ([5], [4]), 31: ([10, 7], [5, 9])}
)
ROWS = tuple(LENGTHS)
LARGE_ROWS = (1680, 13440) if REAL else (31,)  # where wgmma runs


def layout(rows: int) -> TokenLayout:
    return TokenLayout.from_lengths(*LENGTHS[rows], device=DEVICE)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Normal values, drawn where they are used."""
    return (torch.randn(shape, device=DEVICE) * scale).to(dtype)


@contextlib.contextmanager
def served(simulated: bool = False) -> Iterator[None]:
    """As a user's calls are served; in a rehearsal by the Triton kernels if `simulated`, where there is a simulator."""
    if REAL or not simulated or None in (find_spec("ptxsim"), find_spec("triton")):
        yield
        return
    from ptxsim import simulate

    with use_backend("triton"), simulate.simulated(stats=False):
        yield


@contextlib.contextmanager
def never_waiting() -> Iterator[None]:
    """On a GPU, whatever makes the host wait for it raises."""
    if not REAL:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Captured:
    """`step` in a CUDA graph: `outputs` are what it returned, and :meth:`replay` fills them again from what its inputs
    hold then. A rehearsal calls `step` again."""

    def __init__(self, step: Callable[[], tuple[Tensor, ...]]) -> None:
        self._step = step
        if not REAL:
            self.outputs = step()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles the kernels, and leaves nothing to be set up
            step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.outputs = step()

    def replay(self) -> None:
        if REAL:
            self._graph.replay()
            return
        with torch.no_grad():
            for output, value in zip(self.outputs, self._step(), strict=True):
                output.copy_(value)
