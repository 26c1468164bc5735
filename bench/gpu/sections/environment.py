"""What the figures are measured on: the GPU, the software, and whether the compiled libraries load."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from ...machine import cpu_name, git_revision
from ..preparation import cores
from ..record import Missing, Recorder
from ..setting import Setting

PACKAGES = ("numpy", "triton", "timm", "transformers", "torchvision", "flash-attn", "xformers", "liger-kernel")
QUERIED = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem", "temperature.gpu", "clocks.sm")


def run(record: Recorder, setting: Setting) -> None:
    record.measure("gpu", lambda: _gpu(setting))
    record.measure("software", _software)
    record.measure("cpu", lambda: {"name": cpu_name(), "cores": cores()})
    record.measure("library", _library)
    _details(setting.out / "env.txt")


def _gpu(setting: Setting) -> dict[str, Any]:
    setting.needs_gpu("a GPU's name")
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_gb": round(found.total_memory / 1e9, 1),
        "l2_mb": round(found.L2_cache_size / 2**20, 1),
        **_queried(),
    }


def _queried() -> dict[str, str]:
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader", "-i", "0"]
    printed = _printed(command).splitlines()
    return dict(zip(QUERIED, (part.strip() for part in printed[0].split(",")), strict=False)) if printed else {}


def _software() -> dict[str, Any]:
    import beit3_fast

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "beit3_fast": beit3_fast.__version__,
        "revision": git_revision(),
        **{package: _version(package) for package in PACKAGES},
        **_assemblers(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _assemblers() -> dict[str, str]:
    """Versions of every ptxas that may assemble a kernel: Triton's own ones, and the CUDA toolkit's."""
    files = {"ptxas": shutil.which("ptxas"), "nvcc": shutil.which("nvcc")}
    try:
        import triton

        folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        files |= {f"Triton's {file.name}": str(file) for file in sorted(folder.glob("ptxas*"))}
    except ImportError:
        pass
    versions = {}
    for name, file in files.items():
        found = re.search(r"V([\d.]+)", _printed([file, "--version"])) if file else None
        if found:
            versions[name] = found[1]
    return versions


def _library() -> dict[str, Any]:
    from beit3_fast import _extension

    status = _extension.status()
    if not any(part.loaded for part in status.values()):
        raise Missing("; ".join(f"{name}: {part.reason}" for name, part in status.items()))
    return {f"{name} {what}": value for name, part in status.items() for what, value in vars(part).items()}


def _details(file: Path) -> None:
    commands = (["nvidia-smi"], ["nvidia-smi", "-q", "-d", "CLOCK,POWER,PERFORMANCE"], ["nvcc", "--version"], ["lscpu"])
    file.write_text("\n\n".join(f"$ {' '.join(command)}\n{_printed(command)}" for command in commands))


def _printed(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
