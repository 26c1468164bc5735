"""Attention beside PyTorch's fused kernels, and LayerNorm beside PyTorch's own and the compiler's.

The others get what suits them best: queries, keys and values of equally long samples beside each other, so that no
gather is in their time, and one LayerNorm for all rows. "step" is a forward and a backward; the difference is the
backward's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from beit3_fast import ops

from ..clock import microseconds
from ..record import Recorder
from ..setting import Setting

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
DIRECTIONS = ("forward", "step")


def run(record: Recorder, setting: Setting) -> None:
    for samples in reversed(setting.sizes.batches[1:]):
        for vision in (setting.sizes.vision, setting.sizes.long_vision):
            for direction in DIRECTIONS:
                for provider in ("ours", *BACKENDS):
                    record.measure(
                        "attention",
                        _attention(setting, samples, vision, direction, provider),
                        **{"samples": samples, "tokens": vision + setting.sizes.text},
                        **{"direction": direction, "by": provider},
                    )
    base = setting.base
    for samples in reversed(setting.sizes.batches):
        for width in (base.width, base.hidden):
            for direction in DIRECTIONS:
                for provider in ("ours", "PyTorch", "Inductor"):
                    record.measure(
                        "layer_norm",
                        _layer_norm(setting, samples, width, direction, provider),
                        **{"rows": setting.rows(samples), "width": width, "direction": direction, "by": provider},
                    )


def _drawn(setting: Setting, *shape: int, gradient: bool) -> Tensor:
    return torch.randn(*shape, device=setting.device, dtype=torch.bfloat16).requires_grad_(gradient)


def _call(function: Callable[[], Tensor], leaves: list[Tensor], dout: Tensor | None) -> Callable[[], object]:
    """The forward, or with the output's gradient the forward and the backward."""
    if dout is None:

        def forward() -> Tensor:
            with torch.no_grad():
                return function()

        return forward
    return lambda: torch.autograd.grad(function(), leaves, dout)


def _attention(
    setting: Setting, samples: int, vision: int, direction: str, provider: str
) -> Callable[[], Mapping[str, Any]]:
    heads, dim = setting.base.heads, setting.base.width // setting.base.heads
    tokens = vision + setting.sizes.text
    step = direction == "step"

    def make(index: int) -> Callable[[], object]:
        if provider == "ours":
            layout = setting.batch(samples, vision).layout(setting.device)
            qkv = _drawn(setting, samples * tokens, 3, heads, dim, gradient=step)
            dout = _drawn(setting, samples * tokens, heads * dim, gradient=False) if step else None
            return _call(lambda: ops.attention(qkv, layout, heads), [qkv], dout)
        q, k, v = (_drawn(setting, samples, heads, tokens, dim, gradient=step) for _ in range(3))
        dout = _drawn(setting, samples, heads, tokens, dim, gradient=False) if step else None

        def function() -> Tensor:
            with contextlib.nullcontext() if setting.dry else sdpa_kernel(BACKENDS[provider]):
                return F.scaled_dot_product_attention(q, k, v)

        return _call(function, [q, k, v], dout)

    def measured() -> Mapping[str, Any]:
        elements = samples * tokens * heads * dim * (8 if step else 4)
        taken = microseconds(make, 2 * elements, setting)
        flops = 4 * samples * tokens**2 * heads * dim * (3.5 if step else 1)
        return {"us": taken, "tflop_s": flops / taken / 1e6}

    return measured


def _layer_norm(
    setting: Setting, samples: int, width: int, direction: str, provider: str
) -> Callable[[], Mapping[str, Any]]:
    rows, step = setting.rows(samples), direction == "step"

    def make(index: int) -> Callable[[], object]:
        experts = (2,) if provider == "ours" else ()
        x = _drawn(setting, rows, width, gradient=step)
        weight, bias = (_drawn(setting, *experts, width, gradient=step) for _ in range(2))
        dout = _drawn(setting, rows, width, gradient=False) if step else None
        if provider == "ours":
            offsets = setting.layout(samples).expert_offsets
            return _call(lambda: ops.layer_norm(x, weight, bias, offsets), [x, weight, bias], dout)  # type: ignore[arg-type,return-value]
        norm = compiled if provider == "Inductor" else F.layer_norm
        return _call(lambda: norm(x, (width,), weight, bias, 1e-5), [x, weight, bias], dout)

    compiled = F.layer_norm

    def measured() -> Mapping[str, Any]:
        nonlocal compiled
        if provider == "Inductor":
            setting.needs_gpu("what Inductor makes of it")
            torch.compiler.reset()
            compiled = torch.compile(F.layer_norm, dynamic=False)
        taken = microseconds(make, 2 * rows * width * (5 if step else 2), setting)
        return {"us": taken, "gb_s": 2 * rows * width * (5 if step else 2) / taken / 1e3}

    return measured
