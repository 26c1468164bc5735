"""What ``beit3-fast bench`` runs on this machine: cases chosen, run, shown as they come and kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from . import base as base_bench
from . import breakdown as breakdown_bench
from . import compare as comparing
from . import everything as all_kinds
from . import model_tasks
from . import ops as op_bench
from . import scaling as scaling_bench
from .cases import ModelCase, select
from .compare import DEFAULT_TOLERANCE
from .machine import machine, use_threads
from .model import CaseResult
from .model_tasks import check_providers
from .op_cases import OpCase, select_op_cases
from .op_providers import select_providers
from .op_report import op_document, op_table
from .outputs import Outputs
from .report import console, document, table
from .roofs import Roofs
from .roofs import measure as measure_roofs
from .running import Options, Running
from .timing import MIN_ROUNDS

DEFAULT_ROUNDS = 14
"""Enough for ``bench compare`` to judge 200 cases at once."""
QUICK_ROUNDS = 12
"""Enough for 51 cases: a quick run of all kinds has fewer."""
QUICK_OP_ROUNDS = 16
"""Of calls that take milliseconds: an interval that a few disturbed rounds do not widen."""
QUICK_MODEL_CASES = ("base-joint",)
"""Of a quick run of all kinds."""
MODEL_DTYPES = (torch.float32, torch.bfloat16)
"""In which there are roofs for models: float32 cases have providers that compute in bfloat16."""

SHARED = ("quick", "rounds", "threads", "device", "json_file", "csv_file", "html_file")


def run(kind: Callable[..., bool], **options: Any) -> bool:
    """Runs a kind with its options from the command line; True if all was right.

    Args:
        kind: a function below.
        options: those that all kinds share (:meth:`Options.checked`) and the kind's own.

    Raises:
        ValueError: a mistake in any of them.
        FileNotFoundError: the folder of a file does not exist.
    """
    shared = {name: value for name, value in options.items() if name in SHARED}
    own = {name: value for name, value in options.items() if name not in SHARED}
    return kind(Options.checked(**shared), **own)


def model(
    options: Options,
    *,
    cases: Sequence[str] = (),
    providers: Sequence[str] = (),
    peers: bool = False,
    batch: int | None = None,
    compiled: bool = False,
    base: str | None = None,
) -> bool:
    """``bench model``: True if reference PyTorch and ours ran and passed parity in every case; a peer may fail.

    An interrupted run keeps the cases that were done. With ``base``, a git revision, ours runs against ours of that
    revision and nobody else takes part: True if this tree is nowhere slower, and right wherever the other is.

    Raises:
        ValueError: an unknown case, provider or revision, a batch below 1, an option that does not go with ``base``.
    """
    chosen = select(cases, quick=options.quick, batch=batch, gpu=options.place.type == "cuda" and base is None)
    if base is not None:
        return _against(base, chosen, options, alone=not (providers or peers or compiled))
    check_providers(providers)
    rounds = options.rounds or (QUICK_ROUNDS if options.quick else DEFAULT_ROUNDS)
    results: list[CaseResult] = []
    with options.started(rounds=rounds) as running:
        roofs = _roofs(running, options, MODEL_DTYPES)
        about = running.machine, running.settings
        with running.kept(lambda done: document(results, roofs, *about, complete=done), results, len(chosen)) as keep:
            for case in chosen:
                result = model_tasks.run(
                    case,
                    providers,
                    peers=peers,
                    compiled=compiled,
                    device=options.place,
                    rounds=rounds,
                    progress=running.progress,
                )
                results.append(result)
                running.shown.print(table(result, roofs))
                keep()
    return all(result.ok for result in results)


def ops(
    options: Options,
    *,
    cases: Sequence[str] = (),
    ops: Sequence[str] = (),
    providers: Sequence[str] = (),
    base: str | None = None,
) -> bool:
    """``bench ops``: True if ours ran and passed parity in every case; a peer may fail.

    An interrupted run keeps the cases that were done. ``base`` is as in :func:`model`.

    Raises:
        ValueError: an unknown case, op, provider or revision, an option that does not go with ``base``.
    """
    chosen = select_op_cases(cases, ops, quick=options.quick)
    if base is not None:
        return _against(base, chosen, options, alone=not providers)
    taking_part = select_providers(providers, quick=options.quick)
    rounds = options.rounds or (QUICK_OP_ROUNDS if options.quick else DEFAULT_ROUNDS)
    results: list[op_bench.OpResult] = []
    with options.started(rounds=rounds) as running:
        roofs = _roofs(running, options, [case.dtype for case in chosen])
        about = running.machine, running.settings
        with running.kept(
            lambda done: op_document(results, roofs, *about, complete=done), results, len(chosen)
        ) as keep:
            for case in chosen:
                result = op_bench.run_case(
                    case, taking_part, device=options.place, rounds=rounds, progress=running.progress
                )
                results.append(result)
                running.shown.print(op_table(result, roofs))
                keep()
    return all(result.ok for result in results)


def scaling(
    options: Options, *, curves: Sequence[str] = (), providers: Sequence[str] = (), dtype: str = "float32"
) -> bool:
    """``bench scaling``: True if reference PyTorch and ours ran and passed parity at every point that fits in memory.

    An interrupted run keeps the points that were done.

    Raises:
        ValueError: an unknown curve, provider or dtype.
    """
    chosen = scaling_bench.select_curves(curves)
    taking_part = scaling_bench.select_providers(providers)
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be float32 or bfloat16, got {dtype!r}")
    # a curve's exponent needs no more; for bench compare to judge its points, --rounds is given
    rounds, of = options.rounds or MIN_ROUNDS, getattr(torch, dtype)
    measured: list[tuple[scaling_bench.Curve, list[scaling_bench.Point]]] = []
    done: list[scaling_bench.Point] = []
    total = sum(len(curve.points(options.quick)) for curve in chosen)
    setups = scaling_bench.Setups()
    with options.started(rounds=rounds) as running:
        roofs = _roofs(running, options, MODEL_DTYPES)
        about = of, roofs, running.machine, running.settings
        with running.kept(
            lambda complete: scaling_bench.document(measured, *about, complete=complete), done, total
        ) as keep:
            for curve in chosen:
                points: list[scaling_bench.Point] = []
                measured.append((curve, points))
                for x in curve.points(options.quick):
                    point = scaling_bench.run_point(
                        curve,
                        x,
                        taking_part,
                        points,
                        setups,
                        dtype=of,
                        device=options.place,
                        rounds=rounds,
                        progress=running.progress,
                    )
                    points.append(point)
                    done.append(point)
                    keep()
                running.shown.print(scaling_bench.table(curve, points, of, roofs))
    return all(point.ok for point in done)


def breakdown(options: Options, *, cases: Sequence[str] = ()) -> bool:
    """``bench breakdown``: True if reference PyTorch and ours ran and passed parity in every case; a peer may fail.

    An interrupted run keeps the cases that were done.

    Raises:
        ValueError: an unknown case or one that is not a forward.
    """
    chosen = breakdown_bench.select(cases, quick=options.quick)
    forwards = breakdown_bench.QUICK_FORWARDS if options.quick else breakdown_bench.DEFAULT_FORWARDS
    results: list[breakdown_bench.Breakdown] = []
    with options.started(rounds=MIN_ROUNDS, forwards=forwards) as running:
        about = running.machine, running.settings
        with running.kept(
            lambda done: breakdown_bench.document(results, *about, complete=done), results, len(chosen)
        ) as keep:
            for case in chosen:
                found = breakdown_bench.run_case(
                    case,
                    breakdown_bench.providers(),
                    device=options.place,
                    forwards=forwards,
                    progress=running.progress,
                )
                results.append(found)
                running.shown.print(breakdown_bench.table(found))
                keep()
    return all(found.result.ok for found in results)


def memory(options: Options) -> bool:
    """``bench memory``: bytes of a layer's training step.

    Raises:
        ModuleNotFoundError: Triton is not installed, whose kernels' memory is counted.
    """
    if find_spec("triton") is None:
        raise ModuleNotFoundError("bench memory counts what the Triton kernels allocate, and triton is not installed")
    from . import memory as memory_bench

    results = memory_bench.run()
    console().print(memory_bench.table(results))
    options.outputs.finish(memory_bench.document(results))
    return True


def everything(options: Options) -> bool:
    """``bench all``: every kind of run that looks at this machine; True if none of them failed.

    A kind that lacks what it needs is listed with the reason. An interrupted run keeps what was done.
    """

    def writing(files: Outputs) -> Options:
        return replace(options, outputs=files)

    kinds: dict[str, Callable[[Outputs], bool]] = {
        "model": lambda files: model(writing(files), cases=QUICK_MODEL_CASES if options.quick else ()),
        "ops": lambda files: ops(writing(files)),
        "scaling": lambda files: scaling(writing(files)),
        "breakdown": lambda files: breakdown(writing(files)),
        "memory": lambda files: memory(writing(files)),
    }
    with use_threads(options.threads):
        about = machine(options.place)
    settings = {"device": options.place.type, "quick": options.quick}
    return all_kinds.run(kinds, options.outputs, about, settings, console())


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


def _roofs(running: Running, options: Options, dtypes: Iterable[torch.dtype]) -> Roofs:
    running.progress("the machine's roofs")
    roofs = measure_roofs(options.place, dtypes)
    running.shown.print(roofs.line(), soft_wrap=True)
    return roofs


def _against(revision: str, chosen: Sequence[ModelCase | OpCase], options: Options, *, alone: bool) -> bool:
    """``--base``: this tree against another revision of it; ``alone`` says that nobody else was asked for."""
    if not alone or str(options.outputs):
        raise ValueError("--base runs ours against ours and prints it: leave out peers, providers and output files")
    if options.device == "cuda":
        raise ValueError("--base runs on the CPU alone, got --device cuda")
    base_bench.commit_of(revision)
    rounds = options.rounds or DEFAULT_ROUNDS
    results: list[base_bench.Result] = []
    with (
        replace(options, device="cpu").started(rounds=rounds) as running,
        base_bench.servers(revision, torch.get_num_threads(), running.progress) as servers,
    ):
        try:
            for case in chosen:
                results += base_bench.run_case(case, servers, rounds=rounds, progress=running.progress)
        finally:
            running.shown.print(base_bench.table(results, revision, DEFAULT_TOLERANCE))
    return base_bench.ok(results, DEFAULT_TOLERANCE)
