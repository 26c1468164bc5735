"""NVIDIA's tools on our kernels: compute-sanitizer for accesses outside of memory, ncu for what a kernel waits for.

Either may be missing, or not allowed to look at the GPU, as ncu in many containers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from ..calls import DRY, NAMES
from ..record import Missing, Recorder
from ..setting import Setting

SANITIZER_SECONDS = 60
NCU_SECONDS = 50
KERNELS = {
    "fc1": ("_fc1_kernel", "ffn"),
    "fc2": ("_fc2_kernel", "ffn"),
    "dweight": ("_weight_gradient_kernel", "ffn-backward"),
    "attention": ("_attention_kernel", "attention"),
    "attention backward": ("_(query|key)_gradient_kernel", "attention-backward"),
}
"""The kernel's name, and the call that launches it."""
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis")
STALLS = ("SchedulerStats", "WarpStateStats")
METRICS = {
    "us": r"Duration\s+(us|usecond|ns|nsecond|ms)\s+([\d.,]+)",
    "sm_percent": r"Compute \(SM\) Throughput\s+(%)\s+([\d.,]+)",
    "memory_percent": r"Memory Throughput\s+(%)\s+([\d.,]+)",
    "l2_percent": r"L2 Cache Throughput\s+(%)\s+([\d.,]+)",
    "dram_percent": r"DRAM Throughput\s+(%)\s+([\d.,]+)",
    "registers": r"Registers Per Thread\s+(register/thread)\s+([\d.,]+)",
    "occupancy": r"Achieved Occupancy\s+(%)\s+([\d.,]+)",
}
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "ms": 1e3}


def run(record: Recorder, setting: Setting) -> None:
    largest = setting.sizes.batches[-1]
    if setting.dry:
        record.measure("calls", lambda: _calls(setting))
    record.measure("memcheck", lambda: _memcheck(setting))
    for name, (kernel, call) in KERNELS.items():
        record.measure("ncu", partial(_ncu, setting, name, kernel, call, largest), kernel=name)


def _command(samples: int, *names: str, dry: bool = False) -> list[str]:
    module = __package__.rpartition(".")[0] + ".calls"
    return [sys.executable, "-m", module, str(samples), *names, *([DRY] if dry else [])]


def _calls(setting: Setting) -> Mapping[str, Any]:
    """That what the tools are given runs."""
    subprocess.run(_command(1, *NAMES, dry=True), check=True, timeout=SANITIZER_SECONDS)
    return {"calls": len(NAMES)}


def _tool(setting: Setting, name: str) -> str:
    setting.needs_gpu(name)
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if found is None:
        raise Missing(f"{name} is not installed")
    return found


def _memcheck(setting: Setting) -> Mapping[str, Any]:
    tool = _tool(setting, "compute-sanitizer")
    # without PyTorch's cache every tensor has bounds of its own
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *_command(1, *NAMES)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=SANITIZER_SECONDS)
    except subprocess.TimeoutExpired:
        raise Missing(f"compute-sanitizer did not finish in {SANITIZER_SECONDS} s") from None
    _keep(setting, command, done.stdout[-20000:] + done.stderr[-5000:])
    found = re.search(r"ERROR SUMMARY: (\d+) error", done.stdout)
    if found is None:
        raise RuntimeError(f"compute-sanitizer ended with exit code {done.returncode}: {done.stderr.strip()[-200:]}")
    return {"ok": done.returncode == 0, "errors": int(found[1])}


def _ncu(setting: Setting, name: str, kernel: str, call: str, samples: int) -> Mapping[str, Any]:
    tool = _tool(setting, "ncu")
    options = ["--kernel-name-base", "function", "--kernel-name", f"regex:^{kernel}", "--launch-count", "2"]
    sections = [word for section in (*SECTIONS, *STALLS) for word in ("--section", section)]
    command = [tool, *options, *sections, "--target-processes", "all", *_command(samples, call)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NCU_SECONDS)
    except subprocess.TimeoutExpired:
        raise Missing(f"ncu did not finish in {NCU_SECONDS} s") from None
    _keep(setting, command, done.stdout[-30000:] + done.stderr[-2000:])
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        raise Missing("ncu may not read the GPU's counters here (ERR_NVGPUCTRPERM)")
    values = read_metrics(done.stdout)
    if not values:
        raise RuntimeError(f"ncu ended with exit code {done.returncode} and printed no metric")
    return values


def read_metrics(printed: str) -> dict[str, float]:
    """What ncu printed of the first kernel."""
    values = {}
    for name, pattern in METRICS.items():
        found = re.search(pattern, printed)
        if found:
            value = float(found[2].replace(",", ""))
            values[name] = value * MICROSECONDS.get(found[1], 1) if name == "us" else value
    return values


def _keep(setting: Setting, command: list[str], printed: str) -> None:
    with open(setting.out / "ncu.txt", "a", encoding="utf-8") as file:
        file.write(f"\n$ {' '.join(command)}\n{printed}\n")
