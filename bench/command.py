"""What ``beit3-fast bench`` runs: options checked, cases run, results shown as they come and kept."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import base as base_bench
from . import breakdown as breakdown_bench
from . import compare as comparing
from . import everything as all_kinds
from . import model_tasks
from . import ops as op_bench
from . import scaling as scaling_bench
from .cases import ModelCase, check_known, select
from .chips import CHIPS
from .compare import DEFAULT_TOLERANCE
from .files import check_writable, write_json
from .machine import default_device, machine, use_threads
from .model import CaseResult
from .model_tasks import check_providers
from .op_cases import OpCase, select_op_cases
from .op_providers import select_providers
from .op_report import op_document, op_table, roofs_line
from .outputs import Document, Outputs
from .report import console, count, document, header, table
from .roofs import measure as measure_roofs
from .timing import MIN_ROUNDS, check_rounds

DEFAULT_ROUNDS = 14
"""Enough for ``bench compare`` to judge 200 cases at once."""
QUICK_OP_ROUNDS = 24
"""Of calls that take milliseconds: an interval that a few disturbed rounds do not widen."""
QUICK_MODEL_CASES = ("base-joint",)
"""Of a quick run of all kinds."""


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
    base: str | None = None,
    json_file: Path | None = None,
    csv_file: Path | None = None,
    html_file: Path | None = None,
) -> bool:
    """``bench model``: True if reference PyTorch and ours ran and passed parity in every case; a peer may fail.

    An interrupted run keeps the cases that were done. With ``base``, a git revision, ours runs against ours of that
    revision and nobody else takes part: True if this tree is nowhere slower, and right wherever the other is.

    Raises:
        ValueError: an unknown case, provider or revision, a count out of range, a device that is not there, a file that
            cannot be written, an option that does not go with ``base``.
        FileNotFoundError: the folder of a file does not exist.
    """
    if base is not None:
        _alone_with_base(providers, peers, compiled, json_file, csv_file, html_file)
        return _against(base, select(cases, quick=quick, batch=batch), rounds, threads, device)
    return _model(
        Outputs.checked(json_file, csv_file, html_file),
        cases=cases,
        providers=providers,
        peers=peers,
        quick=quick,
        batch=batch,
        rounds=rounds,
        threads=threads,
        compiled=compiled,
        device=device,
    )


def _model(
    outputs: Outputs,
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
) -> bool:
    chosen = select(cases, quick=quick, batch=batch)
    check_providers(providers)
    rounds = DEFAULT_ROUNDS if rounds is None else rounds
    check_rounds(rounds)
    place = _device(device)

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

            def so_far() -> Document:
                return document(results, roofs, about, settings, complete=len(results) == len(chosen))

            with _kept(outputs, shown, so_far, results, len(chosen)) as keep:
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
                    keep()
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
    base: str | None = None,
    json_file: Path | None = None,
    csv_file: Path | None = None,
    html_file: Path | None = None,
) -> bool:
    """``bench ops``: True if ours ran and passed parity in every case; a peer may fail.

    An interrupted run keeps the cases that were done. ``base`` is as in :func:`model`.

    Raises:
        ValueError: an unknown case, op, provider or revision, a count out of range, a device that is not there, a file
            that cannot be written, an option that does not go with ``base``.
        FileNotFoundError: the folder of a file does not exist.
    """
    if base is not None:
        _alone_with_base(providers, json_file, csv_file, html_file)
        return _against(base, select_op_cases(cases, ops, quick=quick), rounds, threads, device)
    return _ops(
        Outputs.checked(json_file, csv_file, html_file),
        cases=cases,
        ops=ops,
        providers=providers,
        quick=quick,
        rounds=rounds,
        threads=threads,
        device=device,
    )


def _ops(
    outputs: Outputs,
    *,
    cases: Sequence[str] = (),
    ops: Sequence[str] = (),
    providers: Sequence[str] = (),
    quick: bool = False,
    rounds: int | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> bool:
    chosen = select_op_cases(cases, ops, quick=quick)
    taking_part = select_providers(providers, quick=quick)
    rounds = (QUICK_OP_ROUNDS if quick else DEFAULT_ROUNDS) if rounds is None else rounds
    check_rounds(rounds)
    place = _device(device)

    shown = console()
    with use_threads(threads):
        about = machine(place)
        settings = {"device": place.type, "rounds": rounds}
        shown.print(header(about, settings))
        results: list[op_bench.OpResult] = []
        with shown.status("the machine's roofs") as status:
            roofs = measure_roofs(place, [case.dtype for case in chosen])
            shown.print(roofs_line(roofs), soft_wrap=True)

            def so_far() -> Document:
                return op_document(results, roofs, about, settings, complete=len(results) == len(chosen))

            with _kept(outputs, shown, so_far, results, len(chosen)) as keep:
                for case in chosen:
                    result = op_bench.run_case(case, taking_part, device=place, rounds=rounds, progress=status.update)
                    results.append(result)
                    shown.print(op_table(result, roofs))
                    keep()
    return all(result.ok for result in results)


def scaling(
    *,
    curves: Sequence[str] = (),
    providers: Sequence[str] = (),
    quick: bool = False,
    dtype: str = "float32",
    rounds: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    json_file: Path | None = None,
    csv_file: Path | None = None,
    html_file: Path | None = None,
) -> bool:
    """``bench scaling``: True if reference PyTorch and ours ran and passed parity at every point that fits in memory.

    An interrupted run keeps the points that were done.

    Raises:
        ValueError: an unknown curve, provider or dtype, a count out of range, a device that is not there, a file that
            cannot be written.
        FileNotFoundError: the folder of a file does not exist.
    """
    return _scaling(
        Outputs.checked(json_file, csv_file, html_file),
        curves=curves,
        providers=providers,
        quick=quick,
        dtype=dtype,
        rounds=rounds,
        threads=threads,
        device=device,
    )


def _scaling(
    outputs: Outputs,
    *,
    curves: Sequence[str] = (),
    providers: Sequence[str] = (),
    quick: bool = False,
    dtype: str = "float32",
    rounds: int | None = None,
    threads: int | None = None,
    device: str | None = None,
) -> bool:
    chosen = scaling_bench.select_curves(curves)
    taking_part = scaling_bench.select_providers(providers)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    rounds = DEFAULT_ROUNDS if rounds is None else rounds
    check_rounds(rounds)
    place, of = _device(device), getattr(torch, dtype)

    shown = console()
    with use_threads(threads):
        about = machine(place)
        settings = {"device": place.type, "rounds": rounds}
        shown.print(header(about, settings))
        measured: list[tuple[scaling_bench.Curve, list[scaling_bench.Point]]] = []
        done: list[scaling_bench.Point] = []
        total = sum(len(curve.points(quick)) for curve in chosen)
        setups = scaling_bench.Setups()
        with shown.status("the machine's roofs") as status:
            roofs = measure_roofs(place, [torch.float32, torch.bfloat16])
            shown.print(roofs_line(roofs), soft_wrap=True)

            def so_far() -> Document:
                complete = len(done) == total
                return scaling_bench.document(measured, of, roofs, about, settings, complete=complete)

            with _kept(outputs, shown, so_far, done, total) as keep:
                for curve in chosen:
                    points: list[scaling_bench.Point] = []
                    measured.append((curve, points))
                    for x in curve.points(quick):
                        point = scaling_bench.run_point(
                            curve,
                            x,
                            taking_part,
                            points,
                            setups,
                            dtype=of,
                            device=place,
                            rounds=rounds,
                            progress=status.update,
                        )
                        points.append(point)
                        done.append(point)
                        keep()
                    shown.print(scaling_bench.table(curve, points, of, roofs))
    return all(point.ok for point in done)


def breakdown(
    *,
    cases: Sequence[str] = (),
    quick: bool = False,
    threads: int | None = None,
    device: str | None = None,
    json_file: Path | None = None,
    csv_file: Path | None = None,
    html_file: Path | None = None,
) -> bool:
    """``bench breakdown``: True if reference PyTorch and ours ran and passed parity in every case; a peer may fail.

    An interrupted run keeps the cases that were done.

    Raises:
        ValueError: an unknown case or one that is not a forward, a thread count out of range, a device that is not
            there, a file that cannot be written.
        FileNotFoundError: the folder of a file does not exist.
    """
    outputs = Outputs.checked(json_file, csv_file, html_file)
    return _breakdown(outputs, cases=cases, quick=quick, threads=threads, device=device)


def _breakdown(
    outputs: Outputs,
    *,
    cases: Sequence[str] = (),
    quick: bool = False,
    threads: int | None = None,
    device: str | None = None,
) -> bool:
    chosen = breakdown_bench.select(cases, quick=quick)
    forwards = breakdown_bench.QUICK_FORWARDS if quick else breakdown_bench.DEFAULT_FORWARDS
    place = _device(device)

    shown = console()
    with use_threads(threads):
        about = machine(place)
        settings = {"device": place.type, "rounds": MIN_ROUNDS, "forwards": forwards}
        shown.print(header(about, settings))
        results: list[breakdown_bench.Breakdown] = []

        def so_far() -> Document:
            return breakdown_bench.document(results, about, settings, complete=len(results) == len(chosen))

        with shown.status("starting") as status, _kept(outputs, shown, so_far, results, len(chosen)) as keep:
            for case in chosen:
                found = breakdown_bench.run_case(
                    case, breakdown_bench.providers(), device=place, forwards=forwards, progress=status.update
                )
                results.append(found)
                shown.print(breakdown_bench.table(found))
                keep()
    return all(found.result.ok for found in results)


def _alone_with_base(*options: object) -> None:
    if any(options):
        raise ValueError("--base runs ours against ours and prints it: leave out peers, providers and output files")


def _against(
    revision: str,
    chosen: Sequence[ModelCase | OpCase],
    rounds: int | None,
    threads: int | None,
    device: str | None,
) -> bool:
    """``--base``: this tree against another revision of it."""
    rounds = DEFAULT_ROUNDS if rounds is None else rounds
    check_rounds(rounds)
    if device not in (None, "cpu"):
        raise ValueError(f"--base runs on the CPU alone, got --device {device}")
    base_bench.commit_of(revision)
    shown = console()
    results: list[base_bench.Result] = []
    with use_threads(threads):
        shown.print(header(machine(torch.device("cpu")), {"device": "cpu", "rounds": rounds}))
        with (
            shown.status("starting") as status,
            base_bench.servers(revision, torch.get_num_threads(), status.update) as running,
        ):
            try:
                for case in chosen:
                    results += base_bench.run_case(case, running, rounds=rounds, progress=status.update)
            finally:
                shown.print(base_bench.table(results, revision, DEFAULT_TOLERANCE))
    return base_bench.ok(results, DEFAULT_TOLERANCE)


def everything(
    *,
    quick: bool = False,
    threads: int | None = None,
    device: str | None = None,
    json_file: Path | None = None,
    csv_file: Path | None = None,
    html_file: Path | None = None,
) -> bool:
    """``bench all``: every kind of run that looks at this machine; True if none of them failed.

    A kind that lacks what it needs is listed with the reason. An interrupted run keeps what was done.

    Raises:
        ValueError: a thread count out of range, a device that is not there, a file that cannot be written.
        FileNotFoundError: the folder of a file does not exist.
    """
    outputs = Outputs.checked(json_file, csv_file, html_file)
    place = _device(device)
    options: dict[str, Any] = {"quick": quick, "threads": threads, "device": device}
    kinds: dict[str, Callable[[Outputs], bool]] = {
        "model": lambda files: _model(files, cases=QUICK_MODEL_CASES if quick else (), **options),
        "ops": lambda files: _ops(files, **options),
        "scaling": lambda files: _scaling(files, **options),
        "breakdown": lambda files: _breakdown(files, **options),
        "memory": _memory,
    }
    with use_threads(threads):
        about = machine(place)
    return all_kinds.run(kinds, outputs, about, {"device": place.type, "quick": quick}, console())


def compare(old: Path, new: Path, *, tolerance: float = DEFAULT_TOLERANCE) -> bool:
    """``bench compare``: True if nothing in ``new`` is slower than in ``old`` by more than ``tolerance`` percent, and
    nothing that passed parity fails.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is no document with times, or a tolerance below 0.
    """
    found = comparing.compare(comparing.read(old), comparing.read(new), tolerance)
    shown = console()
    for warning in found.warnings:
        shown.print(f"warning: {warning}", style="yellow", soft_wrap=True, markup=False, highlight=False)
    shown.print(comparing.table(found, tolerance))
    for line in comparing.listed(found):
        shown.print(line, soft_wrap=True, markup=False, highlight=False)
    return found.ok


def memory(*, json_file: Path | None = None, csv_file: Path | None = None, html_file: Path | None = None) -> bool:
    """``bench memory``: bytes of a layer's training step.

    Raises:
        ModuleNotFoundError: Triton is not installed, whose kernels' memory is counted.
        ValueError: a file that cannot be written.
        FileNotFoundError: the folder of a file does not exist.
    """
    return _memory(Outputs.checked(json_file, csv_file, html_file))


def _memory(outputs: Outputs) -> bool:
    if find_spec("triton") is None:
        raise ModuleNotFoundError("bench memory counts what the Triton kernels allocate, and triton is not installed")
    from . import memory as memory_bench

    results = memory_bench.run()
    console().print(memory_bench.table(results))
    outputs.finish(memory_bench.document(results))
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


@contextlib.contextmanager
def _kept(
    outputs: Outputs, shown: Console, so_far: Callable[[], Document], results: Sequence[object], total: int
) -> Iterator[Callable[[], None]]:
    """Gives what is to be called after every case. Where the block is left, in whatever way, all is written that was
    done by then, the page too."""
    try:
        yield lambda: outputs.keep(so_far())
    except KeyboardInterrupt:  # the last case may have been on its way to the files
        kept = f"; they are in {outputs}" if str(outputs) else ""
        shown.print(f"interrupted: {len(results)} of {count(total, 'case')} done{kept}", soft_wrap=True)
        raise
    finally:
        outputs.finish(so_far())


def _device(name: str | None) -> torch.device:
    if name is None:
        return default_device()
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available: PyTorch sees no CUDA GPU")
    return torch.device(name)
