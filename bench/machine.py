"""What a figure was measured on: a time without its machine means nothing."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch


def machine(device: torch.device, threads: int | None = None) -> dict[str, object]:
    """Describes the machine, for a report's header and its JSON.

    ``threads`` is what PyTorch uses for the run, its current setting by default. ``git_revision`` is None outside a
    checkout.
    """
    import beit3_fast

    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads() if threads is None else threads,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "beit3_fast": beit3_fast.__version__,
        "git_revision": git_revision(),
    }


def default_device() -> torch.device:
    """The GPU when PyTorch sees one, the CPU otherwise."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def use_threads(threads: int | None) -> Iterator[None]:
    """Sets PyTorch's CPU threads for a block; None leaves them alone.

    Raises:
        ValueError: fewer than one.
    """
    if threads is None:
        yield
        return
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, its architecture otherwise."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def git_revision() -> str | None:
    """The short revision of the checkout this package runs from, with ``+`` if tracked files were changed."""
    here = Path(__file__).resolve().parent
    top = _git(here, "rev-parse", "--show-toplevel")
    # An environment inside somebody else's repository must not borrow that repository's revision.
    if not top or here != Path(top).resolve() / "bench":
        return None
    revision = _git(here, "rev-parse", "--short", "HEAD")
    if not revision:
        return None
    return revision + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(directory), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
