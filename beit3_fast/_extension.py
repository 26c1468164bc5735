"""Loads the compiled libraries, which register their kernels with PyTorch's dispatcher.

A library that is missing or does not load takes nothing but speed away: the ops then run in plain PyTorch. Importing
this module therefore never raises; :func:`status` tells what happened to each library.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

LIBRARY_FOLDER = Path(__file__).resolve().parent / "lib"


@dataclass(frozen=True)
class Extension:
    """What became of one compiled library.

    Attributes:
        loaded: whether its kernels are registered.
        reason: one line: how it was built, or why it is not there.
    """

    loaded: bool
    reason: str


def _build_records() -> dict[str, dict[str, object]]:
    """What the build wrote down: for each part whether it was built, and how or why not; {} if there was no build."""
    try:
        return json.loads((LIBRARY_FOLDER / "build.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _load(part: str) -> Extension:
    library = LIBRARY_FOLDER / f"libbeit3_fast_{part}.so"
    record = _build_records().get(part)
    if part == "cuda" and torch.version.cuda is None:
        return Extension(False, f"PyTorch {torch.__version__} is built without CUDA")
    if record is not None and not record["built"]:
        return Extension(False, f"not built: {record['reason']}")
    if not library.is_file():
        return Extension(False, "file is missing: running from a source tree that was not built")
    try:
        torch.ops.load_library(str(library))
    except Exception as error:  # whatever the dynamic loader finds wrong: the ops still run in plain PyTorch
        return Extension(False, f"failed to load: {error}")
    how = str(record["reason"]) if record is not None else ""
    return Extension(True, f"{how}, {torch.ops.beit3_fast.cuda_build_info()}" if part == "cuda" else how)


_EXTENSIONS = {part: _load(part) for part in ("cpu", "cuda")}


def status() -> dict[str, Extension]:
    """What became of each compiled library, by part: "cpu" and "cuda"."""
    return dict(_EXTENSIONS)
