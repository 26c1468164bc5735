"""What ``beit3-fast bench gpu`` and ``make gpu-report`` run."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from ..cases import check_known
from .driver import FILES, RESULTS, Report
from .plan import SECTIONS
from .record import Line

SHORTEST = 5.0
KEPT = Path("bench") / "results"
"""Where a person puts results that are to stay."""


def report(out: Path, budget: float, *, sections: Sequence[str] = (), dry: bool = False) -> bool:
    """Runs the report and prints its summary; True if no figure failed, every parity held and every bit was equal.

    Raises:
        ValueError: an unknown section, a budget that is too short, no GPU and no dry run, a folder with other files.
        OSError: the folder cannot be written.
    """
    known = {section.name: section for section in SECTIONS}
    for name in sections:
        check_known("section", name, known)
    if budget < SHORTEST:
        raise ValueError(f"budget must be at least {SHORTEST:g} seconds, got {budget:g}")
    if not dry and not torch.cuda.is_available():
        raise ValueError(
            "PyTorch sees no CUDA GPU; --dry-run (make gpu-report DRY=1) does it on a CPU with tiny shapes"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {str(out)!r}")
    chosen = [section for section in SECTIONS if not sections or section.name in sections]
    lines = Report(out, budget, dry=dry, sections=chosen).run()
    print(f"in {out}: {', '.join(name for name in FILES if (out / name).exists())}")
    if not dry:
        print(f"to keep the results: cp {out / RESULTS} {KEPT / kept_name(lines)}")
    return right(lines)


def right(lines: Sequence[Line]) -> bool:
    """Whether nothing failed and nothing is wrong."""
    return not any("failed" in line or line.get("values", {}).get("ok") is False for line in lines)


def kept_name(lines: Sequence[Line], today: datetime.date | None = None) -> str:
    """``nvidia-h100-80gb-hbm3-2026-01-31.jsonl``"""
    names = (line["values"].get("name") for line in lines if line["figure"] == "gpu" and "values" in line)
    card = re.sub(r"[^a-z0-9]+", "-", next(names, "unknown").lower()).strip("-")
    return f"{card}-{(today or datetime.date.today()).isoformat()}.jsonl"
