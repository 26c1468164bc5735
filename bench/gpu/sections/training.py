"""A training step in bfloat16 with its peak memory, and forward and backward alone in a CUDA graph."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..clock import captured_milliseconds, eager_milliseconds
from ..models import STEPS, Setups, Training
from ..record import Recorder
from ..setting import Setting


def run(record: Recorder, setting: Setting) -> None:
    setups = Setups(setting)
    for samples in reversed(setting.sizes.batches[1:]):
        for texts in ("padded", "dense"):
            for provider in STEPS:
                about = {"model": setting.base.name, "batch": samples, "texts": texts, "by": provider}
                record.measure("step", _step(setups, setting, samples, texts, provider), **about)
                if texts == "padded" and provider != "reference":
                    record.measure("gradients", _gradients(setups, setting, samples, texts, provider), **about)


def _step(setups: Setups, setting: Setting, samples: int, texts: str, provider: str) -> Callable[[], Mapping[str, Any]]:
    def measured() -> Mapping[str, Any]:
        training = _trained(setups, setting, samples, texts, provider)
        training.step()  # gradients and moments are there from now on
        memory = {}
        if not setting.dry:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            training.step()
            memory = {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}
        return {"ms": eager_milliseconds(training.step, setting), **memory}

    return measured


def _gradients(
    setups: Setups, setting: Setting, samples: int, texts: str, provider: str
) -> Callable[[], Mapping[str, Any]]:
    return lambda: {"ms": captured_milliseconds(_trained(setups, setting, samples, texts, provider).gradients, setting)}


def _trained(setups: Setups, setting: Setting, samples: int, texts: str, provider: str) -> Training:
    return Training(setups.get(setting.base, samples, texts, "training"), STEPS[provider])  # type: ignore[arg-type]
