"""Calls of the ops as a model makes them, at every number of rows, and how each is evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ops.parity import Evaluation, evaluate
from torch import Tensor

from beit3_fast import ops

from .machine import (
    BASE,
    BF16,
    DEVICE,
    LARGE,
    LARGE_ROWS,
    PRECISIONS,
    ROWS,
    TF32,
    Precision,
    Size,
    layout,
    normal,
    served,
)

Op = Callable[..., Any]


@dataclass(frozen=True)
class Case:
    """A call: what is called (a key of `CALLS`), widths, precision, rows."""

    what: str
    size: Size
    precision: Precision
    rows: int

    def __str__(self) -> str:
        return f"{self.what}-{self.size}-{self.precision}-{self.rows}"

    @property
    def dtype(self) -> torch.dtype:
        return self.precision.dtype

    @property
    def simulated(self) -> bool:
        """Whether a rehearsal takes the Triton kernels: for one of them all, compilation takes a second a kernel."""
        return (self.size, self.precision, self.rows) == (BASE, BF16, LARGE_ROWS[-1])

    def inputs(self) -> dict[str, Tensor]:
        """Random ones, on the device."""
        return CALLS[self.what].inputs(self)

    def function(self, reference: bool = False) -> Callable[..., Any]:
        """The op, or plain PyTorch, of the inputs; row numbers and offsets are made here, once for all of its calls."""
        call = CALLS[self.what]
        return call.bind(getattr(ops, call.op + ("_reference" if reference else "")), self)

    def cotangents(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        with torch.no_grad():
            result = self.function(reference=True)(**inputs)
        return [torch.randn_like(output) for output in (result if isinstance(result, tuple) else (result,))]

    def run(self, inputs: dict[str, Tensor], cotangents: list[Tensor]) -> Evaluation:
        """The op as users are served, forward and backward."""
        with served(self.simulated):
            return evaluate(self.function(), inputs, cotangents)


@dataclass(frozen=True)
class Call:
    """An op's inputs, and how it is called with them."""

    op: str
    inputs: Callable[[Case], dict[str, Tensor]]
    bind: Callable[[Op, Case], Callable[..., Any]]


def _affine(width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "weight": (1 + 0.5 * torch.randn(2, width, device=DEVICE)).to(dtype),
        "bias": normal(2, width, dtype=dtype),
    }


def _linear(case: Case, out: int, residual: bool) -> dict[str, Tensor]:
    width, dtype = case.size.width, case.dtype
    inputs = {
        "x": normal(case.rows, width, dtype=dtype),
        "weight": normal(2, out, width, dtype=dtype, scale=width**-0.5),
        "bias": normal(2, out, dtype=dtype),
    }
    return inputs | ({"residual": normal(case.rows, out, dtype=dtype)} if residual else {})


def _ffn(case: Case) -> dict[str, Tensor]:
    width, hidden, dtype = case.size.width, case.size.hidden, case.dtype
    return {
        "x": normal(case.rows, width, dtype=dtype),
        "fc1_weight": normal(2, hidden, width, dtype=dtype, scale=width**-0.5),
        "fc1_bias": normal(2, hidden, dtype=dtype),
        **{f"norm_{name}": value for name, value in _affine(hidden, dtype).items()},
        "fc2_weight": normal(2, width, hidden, dtype=dtype, scale=hidden**-0.5),
        "fc2_bias": normal(2, width, dtype=dtype),
        "residual": normal(case.rows, width, dtype=dtype),
    }


def _bind_linear(op: Op, case: Case) -> Callable[..., Any]:
    offsets = layout(case.rows).expert_offsets
    return lambda x, weight, bias, residual=None: op(x, weight, bias, offsets, residual=residual)


def _bind_everything(op: Op, case: Case) -> Callable[..., Any]:
    offsets = layout(case.rows).expert_offsets
    # the same for every function of a case
    index = torch.randperm(case.rows, generator=torch.Generator().manual_seed(case.rows)).int().to(DEVICE)
    return lambda x, weight, bias, residual: op(
        x, weight, bias, offsets, activation="gelu", residual=residual, row_index=index
    )


def _bind_ffn(op: Op, case: Case) -> Callable[..., Any]:
    offsets = layout(case.rows).expert_offsets
    return lambda residual, **inputs: op(*inputs.values(), offsets, residual=residual)


def _bind_attention(op: Op, case: Case) -> Callable[..., Any]:
    where = layout(case.rows)
    return lambda qkv: op(qkv, where, case.size.heads)


def _bind_norm(op: Op, case: Case) -> Callable[..., Any]:
    offsets = layout(case.rows).expert_offsets
    return lambda x, weight, bias, residual: op(x, weight, bias, offsets, residual=residual)


CALLS = {
    "qkv": Call("multiway_linear", lambda case: _linear(case, 3 * case.size.width, False), _bind_linear),
    "out": Call("multiway_linear", lambda case: _linear(case, case.size.width, True), _bind_linear),
    "linear": Call("multiway_linear", lambda case: _linear(case, case.size.width, True), _bind_everything),
    "ffn": Call("multiway_ffn", _ffn, _bind_ffn),
    "attention": Call(
        "attention",
        lambda case: {
            "qkv": normal(case.rows, 3, case.size.heads, case.size.width // case.size.heads, dtype=case.dtype)
        },
        _bind_attention,
    ),
    "layer_norm": Call(
        "layer_norm",
        lambda case: {
            "x": normal(case.rows, case.size.width, dtype=case.dtype),
            **_affine(case.size.width, case.dtype),
            "residual": normal(case.rows, case.size.width, dtype=case.dtype),
        },
        _bind_norm,
    ),
}

# Each precision at each size costs some 40 kernels; fp16 is compiled as bf16 is, "ieee" products are no tensor core's.
# GELU, a residual and a row index in one are asked for by no released model, and compiled for that call alone.
FEW = (BF16, TF32)
CASES = [
    Case(what, size, precision, rows)
    for what in CALLS
    for size, precisions in ((BASE, FEW if what == "linear" else PRECISIONS), (LARGE, () if what == "linear" else FEW))
    for precision in precisions
    for rows in ROWS
]
