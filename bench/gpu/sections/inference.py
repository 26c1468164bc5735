"""A forward of the model in bfloat16: as PyTorch runs it, and in a CUDA graph; ours, reference PyTorch and timm.

Parity first: a provider that is wrong gets no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import parity
from ...model import Setup
from ..clock import captured_milliseconds, eager_milliseconds
from ..models import FORWARDS, IMAGE_FORWARDS, Call, Setups
from ..record import Recorder
from ..setting import Setting, Size

CLOCKS = {"captured": captured_milliseconds, "eager": eager_milliseconds}


def run(record: Recorder, setting: Setting) -> None:
    setups = Setups(setting)
    for size, samples, texts in which(setting):
        about = {"model": size.name, "batch": samples, "texts": texts}
        setup = setups.get(size, samples, texts)
        truth: list[Tensor] = []
        for name, build in (IMAGE_FORWARDS if texts == "none" else FORWARDS).items():
            provider = _Provider(setup, build, truth)
            judged = record.measure("parity", provider.parity, **about, by=name)
            for mode in CLOCKS if judged is not None and judged["ok"] else ():
                record.measure("forward", partial(provider.time, mode, setting), **about, by=name, mode=mode)


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


class _Provider:
    """Someone who computes the case; ``truth`` holds the right output once somebody has asked for it."""

    def __init__(self, setup: Setup, build: Callable[[Setup], Call], truth: list[Tensor]) -> None:
        self._setup = setup
        self._build = build
        self._truth = truth
        self._call: Call | None = None

    @property
    def call(self) -> Call:
        if self._call is None:
            with torch.no_grad():
                self._call = self._build(self._setup)
        return self._call

    def parity(self) -> Mapping[str, Any]:
        """The error against reference PyTorch in float64, held to the cap alone."""
        if not self._truth:
            self._truth.append(self._setup.truth())
        call = self.call
        with torch.inference_mode():
            found = parity.error(self._setup.valid(call()), self._truth[0])
        return {"ok": parity.judge(found, torch.bfloat16).ok, "error": found.maximum, "rms": found.rms}

    def time(self, mode: str, setting: Setting) -> Mapping[str, Any]:
        call = self.call
        with torch.inference_mode():
            return {"ms": CLOCKS[mode](call, setting)}
