"""What is made ready in the background while the first sections run: the CUDA library, and whatever compiles
kernels when it first runs."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    """A command that runs beside the first sections.

    Attributes:
        seconds: the most it may take.
        serves: the sections that it is made for; empty for all.
    """

    name: str
    command: list[str]
    seconds: float
    serves: tuple[str, ...] = ()


def tasks(dry: bool) -> list[Task]:
    """Building the library where it does not load; compiling the Triton kernels, and what ``torch.compile`` makes."""
    from beit3_fast import _extension

    nice = [found, "-n", "10"] if (found := shutil.which("nice")) else []  # a section goes first
    module = [*nice, sys.executable, "-m"]
    tiny = ["--dry-run"] if dry else []
    wanted = [
        Task("warm", [*module, f"{__package__}.warm", *tiny], 100, ("parity", "roles")),
        Task("compile", [*module, f"{__package__}.sections.compiled", *tiny], 110, ("compiled",)),
    ]
    if not dry and not _extension.status()["cuda"].loaded:
        wanted.insert(0, Task("library", [sys.executable, "-m", f"{__package__}.library"], 120))
    return wanted


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
