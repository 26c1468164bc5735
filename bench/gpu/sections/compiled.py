"""``torch.compile`` of reference PyTorch with SDPA, the fair opponent, and of ours.

``python -m beit3_fast.bench.gpu.sections.compiled`` compiles all of it in as many processes, while other sections run:
what the compiler makes is then in its cache, and here it is found there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from beit3_fast.models import BEiT3

from ...model import with_sdpa
from ..clock import eager_milliseconds
from ..models import Call, Encode, Setups, Training, plain_inputs
from ..record import Recorder
from ..setting import REAL, TINY, Setting

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {"dynamic": False},
    "reduce-overhead": {"dynamic": False, "mode": "reduce-overhead"},
}

AT_A_TIME = 6
"""Processes: a training step of a large batch takes 10 GB of the GPU, and the tests run beside them."""


@dataclass(frozen=True)
class Figure:
    """``what`` is "forward" or "step"; ``mode`` one of :data:`OPTIONS`."""

    what: str
    by: str
    batch: int
    mode: str

    def about(self) -> dict[str, Any]:
        return {"by": self.by, "batch": self.batch, "mode": self.mode}


def figures(setting: Setting) -> list[Figure]:
    """What matters most first."""
    smallest, *middle, largest = setting.sizes.batches
    wanted = [
        Figure("forward", "SDPA", smallest, "reduce-overhead"),
        Figure("forward", "SDPA", largest, "default"),
        Figure("step", "SDPA", largest, "default"),
        Figure("forward", "ours", smallest, "reduce-overhead"),
        *(Figure("forward", "SDPA", samples, "reduce-overhead") for samples in middle),
        *(Figure("step", "SDPA", samples, "default") for samples in middle),
        Figure("forward", "ours", largest, "default"),
        Figure("forward", "SDPA", largest, "reduce-overhead"),
        *(Figure("forward", "ours", samples, "reduce-overhead") for samples in middle),
    ]
    return wanted[:4] if setting.dry else wanted


def run(record: Recorder, setting: Setting) -> None:
    setups = Setups(setting)
    for figure in figures(setting):
        record.measure(figure.what, partial(_measured, figure, setups, setting), **figure.about())


def _measured(figure: Figure, setups: Setups, setting: Setting) -> Mapping[str, Any]:
    call = compiled(figure, setups, setting)
    with torch.inference_mode(figure.what == "forward"):
        start = time.perf_counter()
        call()
        if not setting.dry:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        return {"ms": eager_milliseconds(call, setting), "compiled_in_s": round(seconds, 1)}


def compiled(figure: Figure, setups: Setups, setting: Setting) -> Call:
    """What is timed; the first call compiles."""
    torch.compiler.reset()  # graphs of earlier figures count towards the limit on recompilations
    options = OPTIONS[figure.mode] if not setting.dry else {"dynamic": False, "backend": "aot_eager"}
    if figure.what == "step":
        setup = setups.get(setting.base, figure.batch, "padded", "training")
        return Training(setup, with_sdpa, options).step  # type: ignore[arg-type]
    setup = setups.get(setting.base, figure.batch, "padded")
    if figure.by == "ours":
        ours = torch.compile(setup.build(BEiT3), **options)
        return lambda: setup.inputs.call(ours)
    encode, inputs = torch.compile(Encode(setup.build(with_sdpa)), **options), plain_inputs(setup)

    def forward() -> object:
        torch.compiler.cudagraph_mark_step_begin()  # the last result may be overwritten
        return encode(*inputs)

    return forward


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--figure", type=int)
    options = parser.parse_args()
    setting = Setting(Path.cwd(), options.dry_run, TINY if options.dry_run else REAL)
    wanted = figures(setting)[:1] if setting.dry else figures(setting)
    if options.figure is None:
        return _everybody(len(wanted))
    try:
        _first_call(compiled(wanted[options.figure], Setups(setting), setting), wanted[options.figure])
    except Exception:  # the section will say so
        traceback.print_exc(limit=-3)
    return 0


def _first_call(call: Callable[[], object], figure: Figure) -> None:
    with torch.inference_mode(figure.what == "forward"):
        call()


def _everybody(count: int) -> int:
    command = [sys.executable, "-m", __spec__.name, *sys.argv[1:]]
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}  # there are processes enough

    def one(index: int) -> int:
        return subprocess.run([*command, "--figure", str(index)], env=environment).returncode

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        return int(any(list(pool.map(one, range(count)))))


if __name__ == "__main__":
    sys.exit(main())
