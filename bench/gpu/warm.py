"""Compiles what later sections launch, in as many processes as there are cores: ``python -m beit3_fast.bench.gpu.warm``.

Triton compiles a kernel where it is first launched, about a second each, one after the other: minutes, in the time of
whoever comes first. So every launch is made once here; what is compiled stays in Triton's cache, which all share.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .kernel_cases import DecodeStep, cases
from .preparation import cores
from .setting import REAL, TINY, Setting, models_and_batches

MEMORY_A_PROCESS = 3 * 10**9
"""Of the GPU: a context, and the largest case."""


def work(setting: Setting) -> Iterator[Callable[[], object]]:
    """A call for everything that is compiled, what is needed first in front."""
    from .sections import parity, roles

    for kind in parity.KINDS:
        for model, samples in models_and_batches(setting.sizes):
            for case in cases(model, setting.batch(samples), kind.dtype):
                yield lambda case=case, kind=kind: _op(parity, case, kind, setting)  # type: ignore[misc]
            yield lambda model=model, samples=samples, kind=kind: (  # type: ignore[misc]
                DecodeStep(model, samples, kind.dtype, setting)()
            )
    seen = set()
    for model, samples in models_and_batches(setting.sizes):
        for role in ("forward", "dx", "dw"):
            for gemm in model.gemms:
                for config in roles.configs(setting, model, gemm, role, samples).values():
                    if (model.name, gemm.name, role, config) not in seen:
                        seen.add((model.name, gemm.name, role, config))
                        given = model, gemm, role, samples, config
                        yield lambda given=given: roles._launch(setting, *given)  # type: ignore[misc]


def _op(parity, case, kind, setting) -> None:  # type: ignore[no-untyped-def]
    with parity._precision(kind.precision):
        parity._Op(case, setting).ours()


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
    return 0


def _everybody(setting: Setting, options: list[str]) -> int:
    """Starts the processes, each with its share; 1 if one of them died."""
    count = 1 if setting.dry else min(cores(), max(1, torch.cuda.mem_get_info()[0] // MEMORY_A_PROCESS))
    command = [sys.executable, "-m", __spec__.name, *options]
    processes = [subprocess.Popen([*command, "--share", str(index), str(count)]) for index in range(count)]
    ends = [process.wait() for process in processes]
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    return int(any(ends))


if __name__ == "__main__":
    sys.exit(main())
