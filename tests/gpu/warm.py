"""Compiles what the tests of this folder launch, in as many processes as there are cores.

One process takes a second a kernel, five minutes in all. Triton keeps on disk what it compiled, for the tests to find.

    PYTHONPATH=tests python -m gpu.warm                # in all cores
    PYTHONPATH=tests python -m gpu.warm INDEX COUNT    # the share of one process of several
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import partial

import torch

from .cases import CASES, Case
from .machine import BF16, FP16, FP32, REAL, TF32
from .models import Way, batch_of, model_of, values_and_gradients

SECONDS = {"ffn": 24, "qkv": 9, "out": 9, "linear": 9, "attention": 4, "layer_norm": 0}
MODEL_SECONDS = 20
WAYS = (Way(FP32), Way(BF16, autocast=True), Way(BF16), Way(FP16), Way(TF32))


def main(index: int, count: int) -> None:
    """Does the share `index` of `count`. What fails, and be it for want of memory, the tests will tell."""
    torch.set_num_threads(1)
    for work in shares(count)[index]:
        try:
            work()
        except Exception:
            traceback.print_exc(limit=-3)


def shares(count: int) -> list[list[Callable[[], None]]]:
    """The calls, dealt to `count` processes so that all take about as long."""
    together: dict[tuple[str, str, str], list[Case]] = {}
    for case in CASES:
        together.setdefault((case.what, case.size.name, case.precision.name), []).append(case)
    calls = [(SECONDS[what], partial(_launch, cases)) for (what, _, _), cases in together.items()]
    calls += [(MODEL_SECONDS, partial(_train, way)) for way in WAYS]
    load = [0.0] * count
    dealt: list[list[Callable[[], None]]] = [[] for _ in range(count)]
    for seconds, call in sorted(calls, key=lambda each: -each[0]):
        least = load.index(min(load))
        load[least] += seconds
        dealt[least].append(call)
    return dealt


def everything() -> None:
    """All shares, each in a process of its own."""
    processes = len(os.sched_getaffinity(0))
    for process in [start(index, processes) for index in range(processes)]:
        process.wait()


def start(index: int, count: int) -> subprocess.Popen[bytes]:
    """A process for one share. It finds modules where this one does, and none in the folder that it is started in."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-m", "gpu.warm", str(index), str(count)]
    return subprocess.Popen(command, env=environment, cwd=tempfile.gettempdir())


def _launch(cases: list[Case]) -> None:
    for case in cases:
        with case.precision.set():
            inputs = case.inputs()
            case.run(inputs, case.cotangents(inputs))
        _give_back()


def _train(way: Way) -> None:
    from beit3_fast.models import BEiT3ForVisualQuestionAnswering

    model = model_of(BEiT3ForVisualQuestionAnswering, num_classes=7).to(way.model_dtype)
    with way.running():
        values_and_gradients(model, batch_of(way.model_dtype))
    _give_back()


def _give_back() -> None:
    """All processes share the GPU's memory."""
    if REAL:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    if sys.argv[1:]:
        main(*map(int, sys.argv[1:]))
    else:
        everything()
