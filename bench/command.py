"""What ``beit3-fast bench`` runs: options checked, cases run, results shown as they come and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from . import model as model_bench
from .cases import select
from .files import check_writable, write_json
from .machine import default_device, machine, use_threads
from .report import console, document, header, table
from .timing import MIN_ROUNDS, check_rounds

DEFAULT_ROUNDS = 12


def model(
    *,
    cases: Sequence[str] = (),
    quick: bool = False,
    batch: int | None = None,
    rounds: int | None = None,
    threads: int | None = None,
    compiled: bool = False,
    device: str | None = None,
    json_file: Path | None = None,
) -> bool:
    """``bench model``: True if every provider of every case ran and passed parity.

    Raises:
        ValueError: an unknown case, a count out of range, a device that is not there, a file that cannot be written.
        FileNotFoundError: the folder of ``json_file`` does not exist.
    """
    chosen = select(cases, quick=quick, batch=batch)
    rounds = (MIN_ROUNDS if quick else DEFAULT_ROUNDS) if rounds is None else rounds
    check_rounds(rounds)
    place = _device(device)
    target = None if json_file is None else check_writable(json_file, "--json")

    shown = console()
    with use_threads(threads):
        about = machine(place)
        settings = {"device": place.type, "rounds": rounds}
        shown.print(header(about, settings))
        results: list[model_bench.CaseResult] = []

        with shown.status("starting") as status:
            for case in chosen:
                result = model_bench.run_case(
                    case,
                    model_bench.providers(compiled=compiled),
                    device=place,
                    rounds=rounds,
                    progress=status.update,
                )
                results.append(result)
                shown.print(table(result))
                if target is not None:  # after every case: an interrupted run keeps what it had
                    write_json(target, document(results, about, settings))
    return all(result.ok for result in results)


def _device(name: str | None) -> torch.device:
    if name is None:
        return default_device()
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available: PyTorch sees no CUDA GPU")
    return torch.device(name)
