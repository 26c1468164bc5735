"""What ``beit3-fast bench static`` and ``bench simulate`` run: the compiled kernels, looked at without a GPU."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from .cases import check_known
from .chips import CHIPS
from .files import check_writable, write_json
from .report import console, count


def static(
    *,
    architectures: Sequence[int] = (),
    everything: bool = False,
    json_file: Path | None = None,
    update: bool = False,
) -> bool:
    """``bench static``: True if every kernel compiled for every architecture and kept its budget, those of the compiled
    CUDA library among them if it is built.

    Raises:
        ModuleNotFoundError: Triton is not installed.
        ValueError: an unknown architecture, options that exclude each other, TRITON_INTERPRET=1, a file that cannot be
            written.
        FileNotFoundError: the folder of ``json_file`` does not exist.
    """
    if find_spec("triton") is None:
        raise ModuleNotFoundError("bench static compiles Triton kernels, and triton is not installed")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("bench static compiles Triton kernels; unset TRITON_INTERPRET, which interprets them")
    from . import static as static_bench
    from . import static_cuda

    for arch in architectures:
        if arch not in static_bench.ARCHITECTURES:
            known = ", ".join(map(str, static_bench.ARCHITECTURES))
            raise ValueError(f"--arch must be one of {known}, got {arch}")
    if update and everything:
        raise ValueError("--update takes the budget from the default configs: leave out --all")
    target = None if json_file is None else check_writable(json_file, "--json")

    chosen = list(dict.fromkeys(architectures)) or list(static_bench.ARCHITECTURES)
    taken_with, budget = static_bench.read_budget(static_bench.BUDGET_FILE)
    shown = console()
    with shown.status("starting") as status:
        wanted = static_bench.plan(chosen, everything)
        results = static_bench.run(wanted, min(8, static_bench.cores()), progress=status.update)
    if update:
        budget = static_bench.new_budget(results, budget)
        static_bench.write_budget(static_bench.BUDGET_FILE, budget)
        taken_with = static_bench.TRITON
    shown.print(f"triton {static_bench.TRITON}, {count(len(results), 'build')}; budget of triton {taken_with}")
    rows = static_bench.rows(results, budget)
    for arch in chosen:
        shown.print(static_bench.table(arch, [row for row in rows if row.arch == arch]))
    for line in static_bench.broken(rows):
        shown.print(line, soft_wrap=True)
    unfit = static_bench.unfit(results) if everything else []
    for line in unfit:
        shown.print(line, soft_wrap=True)
    cuda_rows: list[static_cuda.Row] = []
    if static_cuda.LIBRARY.is_file():
        with shown.status("reading the CUDA library"):
            compiler, cuda_rows = static_cuda.run(architectures, update)
        shown.print(compiler)
        shown.print(static_cuda.table(cuda_rows))
        for line in static_cuda.broken(cuda_rows):
            shown.print(line, soft_wrap=True)
    else:
        shown.print("CUDA C++ kernels are not looked at: their library is not built here")
    if target is not None:
        write_json(target, static_bench.document(results, budget) | {"cuda": static_cuda.document(cuda_rows)})
    return not unfit and not any(row.problems for row in rows) and not any(row.problems for row in cuda_rows)


def simulate(
    *,
    batches: Sequence[int] = (),
    architectures: Sequence[int] = (),
    chip: str | None = None,
    json_file: Path | None = None,
) -> bool:
    """``bench simulate``: counts of the compiled kernels, and lower bounds on a ``chip`` where one is named.

    Raises:
        ModuleNotFoundError: Triton or the simulator is not installed.
        ValueError: a batch size below 1, an unknown architecture or chip, an architecture that is not the chip's,
            TRITON_INTERPRET=1, a file that cannot be written.
        FileNotFoundError: the folder of ``json_file`` does not exist.
    """
    for package in ("triton", "ptxsim"):
        if find_spec(package) is None:
            raise ModuleNotFoundError(f"bench simulate runs compiled Triton kernels, and {package} cannot be imported")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("bench simulate runs compiled Triton kernels; unset TRITON_INTERPRET, which interprets them")
    from . import simulate as simulate_bench

    for batch in batches:
        if batch < 1:
            raise ValueError(f"--batch must be at least 1, got {batch}")
    for arch in architectures:
        if arch not in simulate_bench.TARGETS:
            raise ValueError(f"--arch must be one of {', '.join(map(str, simulate_bench.TARGETS))}, got {arch}")
    named = None
    if chip is not None:
        check_known("chip", chip, CHIPS)
        named = CHIPS[chip]
        if any(arch != named.arch for arch in architectures):
            raise ValueError(f"--chip {chip} runs code for --arch {named.arch}, got --arch {architectures[0]}")
        architectures = [named.arch]
    target = None if json_file is None else check_writable(json_file, "--json")
    shown = console()
    results = []
    with shown.status("starting") as status:
        for arch in architectures or simulate_bench.TARGETS:
            for batch in batches or (2, 8):
                counted = simulate_bench.run(batch, arch, progress=status.update)
                results.append((batch, arch, counted, simulate_bench.main_loop(batch, arch)))
                shown.print(simulate_bench.table(*results[-1]))
                if named is not None:
                    shown.print(simulate_bench.bounds_table(batch, named, counted))
    shown.print(simulate_bench.waste_table())
    if target is not None:
        write_json(target, simulate_bench.document(results, named))
    return True
