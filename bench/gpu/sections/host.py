"""What the host takes to launch a layer, how many launches that is, and a profile of a forward and a step.

The host is timed while nobody waits for the device: at batch 1 the device is done before the host has launched the
next layer, so the time of a few forwards is the host's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from ...timing import stopwatch_for
from ..models import FORWARDS, STEPS, Call, Setups, Training
from ..record import Recorder
from ..setting import Setting

ROUNDS = 7
CALLS = 4
"""A round: fewer launches than a stream's queue holds, or the host would wait for room in it."""


def run(record: Recorder, setting: Setting) -> None:
    setups = Setups(setting)
    for provider in ("ours", "optimized", "SDPA"):
        record.measure("inference", partial(_inference, setups, setting, provider, _host), by=provider)
        record.measure(
            "launches", partial(_inference, setups, setting, provider, _launches), of="inference", by=provider
        )
    for provider in ("ours", "SDPA"):
        record.measure("training", partial(_training, setups, setting, provider, _host), by=provider)
        record.measure("launches", partial(_training, setups, setting, provider, _launches), of="training", by=provider)
    record.measure("trace", lambda: _trace(setups, setting))


Look = Callable[[Call, Setting], Mapping[str, float]]


def _inference(setups: Setups, setting: Setting, provider: str, look: Look) -> Mapping[str, float]:
    with torch.inference_mode():
        return look(FORWARDS[provider](setups.get(setting.base, 1, "padded")), setting)


def _training(setups: Setups, setting: Setting, provider: str, look: Look) -> Mapping[str, float]:
    training = Training(setups.get(setting.base, 1, "padded", "training"), STEPS[provider])  # type: ignore[arg-type]
    found = look(training.gradients, setting)
    if look is _host:
        found = {**found, "forward_us_a_layer": _host(training.forward, setting)["us_a_layer"]}
    return found


def _host(call: Call, setting: Setting) -> dict[str, float]:
    """Microseconds of the host a layer."""

    def wait() -> None:
        if not setting.dry:
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    taken = []
    for _ in range(ROUNDS):
        wait()
        start = time.perf_counter_ns()
        for _ in range(CALLS):
            call()
        taken.append((time.perf_counter_ns() - start) / CALLS)
    wait()
    return {"us_a_layer": statistics.median(taken) / 1e3 / setting.base.layers}


def _launches(call: Call, setting: Setting) -> dict[str, float]:
    """Of kernels, copies and fills, a layer; what is outside of the layers is in it too."""
    setting.needs_gpu("counting launches")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in on_device)
    return {"launches_a_layer": len(on_device) / setting.base.layers, "gpu_us_a_layer": busy / setting.base.layers}


def _trace(setups: Setups, setting: Setting) -> Mapping[str, Any]:
    """A forward and a step of ours in ``trace.json.gz``, for a trace viewer."""
    samples = setting.sizes.batches[1]
    forward = FORWARDS["ours"](setups.get(setting.base, samples, "padded"))
    training = Training(setups.get(setting.base, samples, "padded", "training"), STEPS["ours"])  # type: ignore[arg-type]
    calls: dict[str, Callable[[], object]] = {"forward": torch.inference_mode()(forward), "step": training.step}
    stopwatch = stopwatch_for(setting.device)
    for call in calls.values():
        stopwatch(call)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if not setting.dry:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        for name, call in calls.items():
            with torch.profiler.record_function(name):
                stopwatch(call)  # which waits for it
    file = setting.out / "trace.json.gz"
    profile.export_chrome_trace(str(file))
    return {"file": file.name, "bytes": file.stat().st_size}
