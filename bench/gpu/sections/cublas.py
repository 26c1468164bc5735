"""Every matrix product of a layer by PyTorch, that is cuBLAS: one call on each expert's rows, forward, dX and dW.

This is what a user would write instead of our kernels, without the passes for GELU, LayerNorm and residual that ours
have in their epilogues.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..clock import microseconds
from ..record import Recorder
from ..setting import Gemm, Setting, Size, models_and_batches

ROLES = ("forward", "dx", "dw")


def run(record: Recorder, setting: Setting) -> None:
    for model, samples in models_and_batches(setting.sizes):
        for gemm in model.gemms:
            for role in ROLES:
                record.measure(
                    "cublas",
                    _measured(setting, gemm, samples, role),
                    model=model.name,
                    gemm=gemm.name,
                    role=role,
                    rows=setting.rows(samples),
                )
        record.measure(
            "passes", partial(_passes, setting, model, samples), model=model.name, rows=setting.rows(samples)
        )


def _measured(setting: Setting, gemm: Gemm, samples: int, role: str) -> Callable[[], dict[str, float]]:
    def measured() -> dict[str, float]:
        rows = setting.rows(samples)
        elements = rows * (gemm.fan_in + gemm.fan_out) + 2 * gemm.fan_in * gemm.fan_out
        taken = microseconds(lambda index: two_calls(setting, gemm, samples, role), 2 * elements, setting)
        return {"us": taken, "tflop_s": gemm.flops(rows) / taken / 1e6}

    return measured


def _passes(setting: Setting, model: Size, samples: int) -> dict[str, float]:
    """GELU and LayerNorm between fc1 and fc2, which no cuBLAS has in its epilogue: two passes an expert."""

    def make(index: int) -> Callable[[], object]:
        hidden = torch.randn(setting.rows(samples), model.hidden, device=setting.device, dtype=torch.bfloat16)
        weight, bias = (torch.randn(2, model.hidden, device=setting.device, dtype=torch.bfloat16) for _ in range(2))

        def passes() -> list[Tensor]:
            return [
                F.layer_norm(F.gelu(hidden[where]), (model.hidden,), weight[expert], bias[expert])
                for expert, where in enumerate(setting.ranges(samples))
            ]

        return passes

    elements = 4 * setting.rows(samples) * model.hidden
    return {"us": microseconds(make, 2 * elements, setting)}


def two_calls(setting: Setting, gemm: Gemm, samples: int, role: str) -> Callable[[], None]:
    """The product on operands of its own."""
    ranges, rows = setting.ranges(samples), setting.rows(samples)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, device=setting.device, dtype=torch.bfloat16)

    x, weight = drawn(rows, gemm.fan_in), drawn(2, gemm.fan_out, gemm.fan_in) * gemm.fan_in**-0.5
    y, bias = drawn(rows, gemm.fan_out), drawn(2, gemm.fan_out)

    def forward() -> None:
        for expert, where in enumerate(ranges):
            torch.addmm(bias[expert], x[where], weight[expert].t(), out=y[where])

    def dx() -> None:
        for expert, where in enumerate(ranges):
            torch.mm(y[where], weight[expert], out=x[where])

    def dw() -> None:
        for expert, where in enumerate(ranges):
            torch.mm(y[where].t(), x[where], out=weight[expert])

    return {"forward": forward, "dx": dx, "dw": dw}[role]
