"""What the chip can do at most: a copy in memory, and one large matrix product in each kind of number."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...timing import median_time
from ..record import Recorder
from ..setting import Setting


def run(record: Recorder, setting: Setting) -> None:
    record.measure("copy", lambda: _copy(setting))
    for kind, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("fp16", torch.float16, "highest"),
        ("tf32", torch.float32, "high"),
        ("fp32", torch.float32, "highest"),
    ):
        record.measure("product", _product(setting, dtype, precision), kind=kind)


def _copy(setting: Setting) -> dict[str, float]:
    source = torch.ones(setting.sizes.copied // 4, device=setting.device)
    target = torch.empty_like(source)
    nanoseconds = median_time([lambda: target.copy_(source)], setting.device)
    return {"gb_s": 2 * source.nbytes / nanoseconds}


def _product(setting: Setting, dtype: torch.dtype, precision: str) -> Callable[[], dict[str, float]]:
    def measured() -> dict[str, float]:
        size = setting.sizes.square
        a, b = (torch.randn(size, size, device=setting.device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        torch.set_float32_matmul_precision(precision)
        try:
            nanoseconds = median_time([lambda: torch.mm(a, b.t(), out=out)], setting.device)
        finally:
            torch.set_float32_matmul_precision("highest")
        return {"size": size, "tflop_s": 2 * size**3 / nanoseconds / 1e3}

    return measured
