"""What ``beit3-fast bench`` runs: options checked, cases run, results shown as they come and kept."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from . import model_tasks
from . import ops as op_bench
from .cases import select
from .files import check_writable, write_json
from .machine import default_device, machine, use_threads
from .model import CaseResult
from .model_tasks import check_providers
from .op_cases import select_op_cases
from .op_providers import select_providers
from .op_report import op_document, op_table, roofs_line
from .report import console, count, document, header, table
from .roofs import measure as measure_roofs
from .timing import MIN_ROUNDS, check_rounds

DEFAULT_ROUNDS = 12


def model(
    *,
    cases: Sequence[str] = (),
    providers: Sequence[str] = (),
    peers: bool = False,
    quick: bool = False,
    batch: int | None = None,
    rounds: int | None = None,
    threads: int | None = None,
    compiled: bool = False,
    device: str | None = None,
    json_file: Path | None = None,
) -> bool:
    """``bench model``: True if reference PyTorch and ours ran and passed parity in every case; a peer may fail.

    Raises:
        ValueError: an unknown case or provider, a count out of range, a device that is not there, a file that cannot be
            written.
        FileNotFoundError: the folder of ``json_file`` does not exist.
    """
    chosen = select(cases, quick=quick, batch=batch)
    check_providers(providers)
    rounds = (MIN_ROUNDS if quick else DEFAULT_ROUNDS) if rounds is None else rounds
    check_rounds(rounds)
    place = _device(device)
    target = None if json_file is None else check_writable(json_file, "--json")

    shown = console()
    with use_threads(threads):
        about = machine(place)
        settings = {"device": place.type, "rounds": rounds}
        shown.print(header(about, settings))
        results: list[CaseResult] = []

        with shown.status("the machine's roofs") as status:
            # float32 cases have providers that compute in bfloat16
            roofs = measure_roofs(place, [torch.float32, torch.bfloat16])
            shown.print(roofs_line(roofs), soft_wrap=True)
            for case in chosen:
                result = model_tasks.run(
                    case,
                    providers,
                    peers=peers,
                    compiled=compiled,
                    device=place,
                    rounds=rounds,
                    progress=status.update,
                )
                results.append(result)
                shown.print(table(result, roofs))
                if target is not None:  # after every case: an interrupted run keeps what it had
                    write_json(target, document(results, roofs, about, settings))
    return all(result.ok for result in results)


def ops(
    *,
    cases: Sequence[str] = (),
    ops: Sequence[str] = (),
    providers: Sequence[str] = (),
    quick: bool = False,
    rounds: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    json_file: Path | None = None,
) -> bool:
    """``bench ops``: True if ours ran and passed parity in every case; a peer may fail.

    An interrupted run keeps the cases that were done.

    Raises:
        ValueError: an unknown case, op or provider, a count out of range, a device that is not there, a file that
            cannot be written.
        FileNotFoundError: the folder of ``json_file`` does not exist.
    """
    chosen = select_op_cases(cases, ops, quick=quick)
    taking_part = select_providers(providers, quick=quick)
    rounds = (MIN_ROUNDS if quick else DEFAULT_ROUNDS) if rounds is None else rounds
    check_rounds(rounds)
    place = _device(device)
    target = None if json_file is None else check_writable(json_file, "--json")

    shown = console()
    with use_threads(threads):
        about = machine(place)
        settings = {"device": place.type, "rounds": rounds}
        shown.print(header(about, settings))
        results: list[op_bench.OpResult] = []
        with shown.status("the machine's roofs") as status:
            roofs = measure_roofs(place, [case.dtype for case in chosen])
            shown.print(roofs_line(roofs), soft_wrap=True)

            def keep() -> None:
                if target is not None:
                    complete = len(results) == len(chosen)
                    write_json(target, op_document(results, roofs, about, settings, complete=complete))

            try:
                for case in chosen:
                    result = op_bench.run_case(case, taking_part, device=place, rounds=rounds, progress=status.update)
                    results.append(result)
                    shown.print(op_table(result, roofs))
                    keep()
            except KeyboardInterrupt:
                keep()  # the last case may have been on its way there
                kept = "" if target is None else f"; they are in {target}"
                shown.print(f"interrupted: {len(results)} of {count(len(chosen), 'case')} done{kept}", soft_wrap=True)
                raise
    return all(result.ok for result in results)


def memory(*, json_file: Path | None = None) -> bool:
    """``bench memory``: bytes of a layer's training step.

    Raises:
        ModuleNotFoundError: Triton is not installed, whose kernels' memory is counted.
        ValueError: a file that cannot be written.
        FileNotFoundError: the folder of ``json_file`` does not exist.
    """
    if find_spec("triton") is None:
        raise ModuleNotFoundError("bench memory counts what the Triton kernels allocate, and triton is not installed")
    from . import memory as memory_bench

    target = None if json_file is None else check_writable(json_file, "--json")
    results = memory_bench.run()
    console().print(memory_bench.table(results))
    if target is not None:
        write_json(target, memory_bench.document(results))
    return True


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
    cuda_rows = []
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
    return not unfit and not any(row.problems for row in (*rows, *cuda_rows))


def simulate(*, batches: Sequence[int] = (), architectures: Sequence[int] = (), json_file: Path | None = None) -> bool:
    """``bench simulate``: counts of the compiled kernels.

    Raises:
        ModuleNotFoundError: Triton or the simulator is not installed.
        ValueError: a batch size below 1, an unknown architecture, TRITON_INTERPRET=1, a file that cannot be written.
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
    target = None if json_file is None else check_writable(json_file, "--json")
    shown = console()
    results = []
    with shown.status("starting") as status:
        for arch in architectures or simulate_bench.TARGETS:
            for batch in batches or (2, 8):
                counted = simulate_bench.run(batch, arch, progress=status.update)
                results.append((batch, arch, counted, simulate_bench.main_loop(batch, arch)))
                shown.print(simulate_bench.table(*results[-1]))
    shown.print(simulate_bench.waste_table())
    if target is not None:
        write_json(target, simulate_bench.document(results))
    return True


def _device(name: str | None) -> torch.device:
    if name is None:
        return default_device()
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available: PyTorch sees no CUDA GPU")
    return torch.device(name)
