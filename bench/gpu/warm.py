"""Compiles what later sections launch, a process a core: ``python -m beit3_fast.bench.gpu.warm``.

Triton compiles a kernel where it is first launched, about a second each, one after the other: minutes, in the time of
whoever comes first. So every launch is made once here; what is compiled stays in Triton's cache, which all share.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..op_cases import OpCase, Shape
from .kernel_cases import DecodeStep, shapes
from .preparation import cores
from .sections import parity, roles
from .setting import REAL, TINY, Setting

MEMORY_A_PROCESS = 4 * 10**9
"""Of the GPU: a context, and the largest case."""


def work(setting: Setting) -> Iterator[Callable[[], object]]:
    """A call for everything that is compiled. The ops come last: the tests compile most of them meanwhile."""
    smallest, seen = setting.sizes.batches[0], set()
    for product in roles.products(setting):
        for config in roles.configs(setting, product).values():
            alike = replace(
                product, samples=smallest
            )  # a config is chosen by the rows, a kernel does not depend on them
            if (alike, config) not in seen:
                seen.add((alike, config))
                yield partial(roles.launch_of, setting, alike, config)
    for kind in parity.KINDS:
        for model in setting.sizes.models:
            for shape in sorted(shapes(model), key=lambda shape: shape.op != "multiway_ffn"):  # the longest first
                yield partial(_op, shape, kind, setting)
            for samples in setting.sizes.batches:
                yield DecodeStep.once(model, samples, kind.dtype, setting)


def _op(shape: Shape, kind: parity.Kind, setting: Setting) -> None:
    """At every batch, in one process: most of what one compiles the next finds."""
    for samples in setting.sizes.batches:
        for backward in (False, True):
            case = OpCase(shape, setting.batch(samples), kind.dtype, backward)
            with parity.matmul_precision(kind.precision):
                parity.OpResults(case, setting).ours()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--share", nargs=2, type=int, metavar=("INDEX", "COUNT"))
    options = parser.parse_args()
    setting = Setting(Path.cwd(), options.dry_run, TINY if options.dry_run else REAL)
    if options.share is None:
        return _everybody(setting, sys.argv[1:])
    torch.set_num_threads(1)
    index, count = options.share
    for number, call in enumerate(work(setting)):
        if number % count == index:
            try:
                call()
            except Exception:  # the section that needs it will say so
                traceback.print_exc(limit=-3)
            if not setting.dry:
                torch.cuda.empty_cache()  # which the sections need
    return 0


def _everybody(setting: Setting, options: list[str]) -> int:
    """Starts the processes, each with its share; 1 if one of them died. Half of the cores, and of the memory: the tests
    and the compiler run beside them."""
    count = 1 if setting.dry else max(1, min(cores(), torch.cuda.mem_get_info()[0] // MEMORY_A_PROCESS) // 2)
    command = [sys.executable, "-m", __spec__.name, *options]
    processes = [subprocess.Popen([*command, "--share", str(index), str(count)]) for index in range(count)]
    ends = [process.wait() for process in processes]
    return int(any(ends))


if __name__ == "__main__":
    sys.exit(main())
