"""A forward of the model in bfloat16: as PyTorch runs it, and in a CUDA graph; ours, reference PyTorch and timm.

Parity first: a provider that is wrong gets no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ... import parity
from ...model import Setup
from ..clock import captured_milliseconds, eager_milliseconds
from ..models import FORWARDS, IMAGE_FORWARDS, Call, Setups, layout_of
from ..record import Missing, Recorder
from ..setting import Setting, Size


def run(record: Recorder, setting: Setting) -> None:
    setups = Setups(setting)
    for size, samples, texts in which(setting):
        about = {"model": size.name, "batch": samples, "texts": texts}
        setup = setups.get(size, samples, texts)
        truth: list[Tensor] = []
        for provider, build in (IMAGE_FORWARDS if texts == "none" else FORWARDS).items():
            call: list[Call] = []
            record.measure("parity", _parity(setup, build, provider, truth, call), **about, by=provider)
            for mode, clock in (("captured", captured_milliseconds), ("eager", eager_milliseconds)):
                record.measure("forward", _time(call, clock, setting), **about, by=provider, mode=mode)


def which(setting: Setting) -> Iterator[tuple[Size, int, str]]:
    """Model, batch and texts, what matters most first."""
    base, large = setting.sizes.models
    smallest, *larger = setting.sizes.batches
    for samples in (larger[-1], smallest, *larger[:-1]):
        yield base, samples, "padded"
    for samples in (larger[-1], smallest):
        yield base, samples, "none"
    yield base, larger[-1], "dense"
    yield large, larger[0], "padded"


def _parity(
    setup: Setup, build: Callable[[Setup], Call], provider: str, truth: list[Tensor], kept: list[Call]
) -> Callable[[], Mapping[str, Any]]:
    """The error against reference PyTorch in float32; the forward is kept if it is small enough."""

    def measured() -> Mapping[str, Any]:
        with torch.inference_mode():
            if not truth:
                truth.append(setup.truth())
            with torch.no_grad():
                call = build(setup)
            out = call()
            if provider in ("ours", "optimized"):
                out = layout_of(setup).unpack(out)
            found = parity.error(setup.valid(out), truth[0])
        verdict = parity.judge(found, torch.bfloat16)
        if verdict.ok:
            kept.append(call)
        return {"ok": verdict.ok, "error": found.maximum, "rms": found.rms}

    return measured


def _time(
    kept: list[Call], clock: Callable[[Call, Setting], float], setting: Setting
) -> Callable[[], Mapping[str, Any]]:
    def measured() -> Mapping[str, Any]:
        if not kept:
            raise Missing("no time without parity")
        with torch.inference_mode():
            return {"ms": clock(kept[0], setting)}

    return measured
