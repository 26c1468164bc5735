"""The CUDA LayerNorm kernels as nvcc compiles them for sm_80, launched in a PTX simulator on CPU tensors.

The host's part is done here once more: outputs are allocated (full of NaN, between guard bands), the launch comes from
``csrc/cuda/launch.h`` itself, and the kernel is the instantiation that the launchers in ``csrc/cuda/*.cu`` choose.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
SPANS, FITS = ("warp", "block", "loop"), ("exact", "vector", "scalar")
TYPES = {torch.float32: "float", torch.bfloat16: "__nv_bfloat16", torch.float16: "__half", torch.float64: "double"}
TAGS = {dtype: tag for tag, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64))}
BAND = 64  # elements around an output, and its alignment

LAUNCH_PROGRAM = """
#include <iterator>

#include "launch.h"
using namespace beit3_fast::cuda;
extern "C" void launch(int width, int64_t rows, int size, bool aligned, int processors, bool backward, int64_t* to) {
  const Launch l = launch_rows(width, rows, size, aligned, processors, backward);
  const int64_t all[] = {int64_t(l.span), int64_t(l.fit), l.vector, l.threads, l.rows_per_block, l.blocks, l.shared};
  std::copy(std::begin(all), std::end(all), to);
}
extern "C" void columns(int width, int64_t rows, int64_t* to) {
  const ColumnLaunch l = launch_columns(width, rows);
  to[0] = l.rows_per_block, to[1] = l.column_blocks, to[2] = l.row_blocks;
}
extern "C" int64_t plane(int width, int vector) { return plane_size(width, vector); }
extern "C" int64_t where(int column, int width, int vector) { return place(column, width, vector); }
"""


@dataclass(frozen=True)
class Launch:
    span: str
    fit: str
    vector: int
    threads: int
    rows_per_block: int
    blocks: int
    shared: int


class Arithmetic:
    """``csrc/cuda/launch.h``, compiled by the C++ compiler alone."""

    def __init__(self, folder: Path, compiler: str) -> None:
        source, library = folder / "launch.cpp", folder / "launch.so"
        source.write_text(LAUNCH_PROGRAM)
        command = [compiler, "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", f"-I{CUDA}"]
        subprocess.run([*command, str(source), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.plane.restype = self._library.where.restype = ctypes.c_int64

    def launch(
        self, width: int, rows: int, size: int, *, aligned: bool = True, processors: int = 8, backward: bool = False
    ) -> Launch:
        to = (ctypes.c_int64 * 7)()
        self._library.launch(width, ctypes.c_int64(rows), size, aligned, processors, backward, to)
        return Launch(SPANS[to[0]], FITS[to[1]], *to[2:])

    def columns(self, width: int, rows: int) -> tuple[int, int, int]:
        """(rows of a block, blocks along columns, blocks along rows)"""
        to = (ctypes.c_int64 * 3)()
        self._library.columns(width, ctypes.c_int64(rows), to)
        return to[0], to[1], to[2]

    def plane(self, width: int, vector: int) -> int:
        return int(self._library.plane(width, vector))

    def place(self, column: int, width: int, vector: int) -> int:
        return int(self._library.where(column, width, vector))


def compile_ptx(folder: Path) -> dict[str, str]:
    """What nvcc makes of each kernel file, compiled side by side."""
    running = {}
    for part in ("forward", "backward"):
        command = ["nvcc", "-std=c++20", "-arch=sm_80", "-lineinfo", "-ptx", str(CUDA / f"layer_norm_{part}.cu")]
        running[part] = subprocess.Popen([*command, "-o", str(folder / f"{part}.ptx")])
    for part, process in running.items():
        if process.wait() != 0:
            raise RuntimeError(f"nvcc does not compile layer_norm_{part}.cu; its messages are above")
    return {part: (folder / f"{part}.ptx").read_text() for part in running}


@dataclass
class Kernels:
    """Launches kernels as the host does; `counts` gets what every launch counted.

    Attributes:
        processors: multiprocessors the launches are arranged for.
        options: passed to the simulator.
    """

    modules: dict[str, Any]
    struct: Any
    arithmetic: Arithmetic
    processors: int = 8
    options: dict[str, Any] = field(default_factory=lambda: {"check_races": True, "check_uninitialised": True})
    counts: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        mangled = {part: list(module.kernels) for part, module in self.modules.items()}
        names = [name for part in mangled.values() for name in part]
        plain = subprocess.run(
            [shutil.which("cu++filt") or "c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
        ).stdout.splitlines()
        self._names = {self._short(long): name for long, name in zip(plain, names, strict=True)}
        self._module = {name: self.modules[part] for part, some in mangled.items() for name in some}

    @staticmethod
    def _short(name: str) -> str:
        """ "forward<float, float, warp, exact>" from the demangled name"""
        for noise in ("void ", "beit3_fast::cuda::", "(anonymous namespace)::", "<unnamed>::"):
            name = name.replace(noise, "")
        for enum, values in (("Span", SPANS), ("Fit", FITS)):
            for tag, value in enumerate(values):
                name = name.replace(f"({enum}){tag}", value)
        return name.replace("(int)", "").rsplit("(", 1)[0]

    @property
    def names(self) -> list[str]:
        return sorted(self._names)

    def _launch(self, name: str, grid: tuple[int, ...], block: tuple[int, ...], shared: int, *fields: Any) -> None:
        mangled = self._names[name]
        arguments = [self.struct(*fields)]
        stats = self._module[mangled].launch(mangled, grid, block, arguments, dynamic_shared=shared, **self.options)
        assert not stats.races, f"{name}: {stats.races[:2]}"
        self.counts.append((name, stats))

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        offsets: Tensor,
        eps: float = 1e-5,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """normed, total, mean, rstd"""
        rows, width = x.shape
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        outputs = Outputs()
        normed = outputs.new(rows, width, dtype=dtype)
        total = None if residual is None else outputs.new(rows, width, dtype=dtype)
        mean, rstd = (outputs.new(rows, dtype=torch.promote_types(dtype, torch.float32)) for _ in range(2))
        launch = self._rows(dtype, False, x, residual, weight, bias, normed, total)
        if launch.span == "loop":
            name = f"forward_loop<{TYPES[x.dtype]}, {TYPES[dtype]}, {launch.vector}>"
        else:
            name = f"forward<{TYPES[x.dtype]}, {TYPES[dtype]}, {launch.span}, {launch.fit}>"
        strides = _int64(x.stride(0)), _int64(0 if residual is None else residual.stride(0))
        pointers = x, residual, weight, bias, offsets, normed, total, mean, rstd
        sizes = width, weight.shape[0], launch.rows_per_block, TAGS[weight.dtype], TAGS[bias.dtype]
        fields = (*pointers, _int64(rows), *strides, numpy.float64(eps), *sizes)
        self._launch(name, (launch.blocks,), (launch.threads,), launch.shared, *fields)
        outputs.check()
        return normed, total, mean, rstd

    def backward(
        self,
        dy: Tensor,
        total: Tensor,
        weight: Tensor,
        offsets: Tensor,
        mean: Tensor,
        rstd: Tensor,
        dresidual: Tensor | None = None,
        bias_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dtotal, dweight, dbias"""
        rows, width = total.shape
        experts, dtype, sums_dtype = weight.shape[0], total.dtype, mean.dtype
        bias_dtype = bias_dtype or weight.dtype
        outputs = Outputs()
        dtotal = outputs.new(rows, width, dtype=dtype)
        launch = self._rows(dtype, True, dy, total, weight, dresidual, dtotal)
        loops = launch.span == "loop"
        rows_per_block, column_blocks, row_blocks = self.arithmetic.columns(width, rows)
        if not loops:
            rows_per_block, row_blocks = launch.rows_per_block, launch.blocks
        vector = 1 if loops else launch.vector
        slots = row_blocks + experts - 1
        partials = outputs.new(slots, 2, self.arithmetic.plane(width, vector), dtype=sums_dtype)
        dweight = outputs.new(experts, width, dtype=weight.dtype)
        dbias = outputs.new(experts, width, dtype=bias_dtype)

        pointers = dy, total, dresidual, weight, offsets, mean, rstd, dtotal, partials
        strides = [_int64(0 if rows is None else rows.stride(0)) for rows in (dy, total, dresidual)]
        head = (*pointers, _int64(rows), *strides, width, experts)
        element = TYPES[dtype]
        name = (
            f"backward_loop<{element}, {launch.vector}>"
            if loops
            else f"backward<{element}, {launch.span}, {launch.fit}>"
        )
        tail = launch.rows_per_block, TAGS[weight.dtype]
        self._launch(name, (launch.blocks,), (launch.threads,), launch.shared, *head, *tail)
        if loops:
            grid = column_blocks, row_blocks
            self._launch(f"parameters_loop<{element}>", grid, (32, 16), 0, *head, rows_per_block, TAGS[weight.dtype])
        fields = partials, offsets, dweight, dbias, _int64(rows), width, vector, rows_per_block
        tags = TAGS[weight.dtype], TAGS[bias_dtype]
        name = "reduce<double>" if sums_dtype == torch.float64 else "reduce<float>"
        self._launch(name, ((width + 31) // 32, experts), (32, 16), 0, *fields, *tags)
        outputs.check()
        return dtotal, dweight, dbias

    def _rows(self, dtype: torch.dtype, backward: bool, *operands: Tensor | None) -> Launch:
        rows, width = next(operand.shape for operand in operands if operand is not None)
        vector = 16 // dtype.itemsize
        aligned = all(_aligned(operand, vector) for operand in operands if operand is not None)
        return self.arithmetic.launch(
            width, rows, dtype.itemsize, aligned=aligned, processors=self.processors, backward=backward
        )


def _aligned(operand: Tensor, vector: int) -> bool:
    """Whether `vector` elements at a multiple of `vector` columns are one aligned access (16 bytes at most)."""
    size = min(16, vector * operand.element_size())
    start = operand.storage_offset() * operand.element_size()
    return start % size == 0 and (operand.shape[0] <= 1 or operand.stride(0) * operand.element_size() % size == 0)


def _int64(value: int) -> Any:
    return numpy.int64(value)


class Outputs:
    """Tensors full of NaN between guard bands."""

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int]] = []

    def new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel()
        buffer = torch.full((size + 2 * BAND,), float("nan"), dtype=dtype)
        buffer[:BAND] = buffer[BAND + size :] = 7.0
        self._buffers.append((buffer, size))
        return buffer[BAND : BAND + size].view(shape)

    def check(self) -> None:
        for buffer, size in self._buffers:
            assert (buffer[:BAND] == 7).all(), "written before an output"
            assert (buffer[BAND + size :] == 7).all(), "written past an output"
