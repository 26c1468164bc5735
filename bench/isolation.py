"""Who would end the process that runs it, found out in processes of their own: a crash there costs the run nothing.

Some engines die on some processors: an illegal instruction, a division by zero, an abort, memory run out. Nothing in
Python catches that, so whoever is neither ours nor reference PyTorch is tried once before it may run in the benchmark.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence

SECONDS = 600


def first_crashes(module: str, names: Iterable[str], given: bytes = b"") -> dict[str, str]:
    """How those of ``names`` end that end the process, by name.

    ``python -m module NAMES`` tries one after the other and calls :func:`survived` after each, whether it works or
    raises. If the process dies, the first that has not survived is to blame, and another process tries the rest: as
    many processes as there are crashes, and one.

    Args:
        given: what the process finds on its standard input.
    """
    crashes = {}
    left = list(names)
    while left:
        end, output = run(module, left, given)
        done = output.splitlines()
        left = [name for name in left if _survival(name) not in done]
        if left:
            crashes[left.pop(0)] = end or "ended the process"
    return crashes


def survived(name: str) -> None:
    """Says in the process of :func:`first_crashes` that ``name`` is through."""
    print(f"\n{_survival(name)}", flush=True)


def _survival(name: str) -> str:
    return f"survived: {name}"


def run(module: str, arguments: Sequence[str], given: bytes = b"") -> tuple[str | None, str]:
    """Runs ``python -m module`` in a process of its own: how it ended, None if well, and what it printed."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=SECONDS)
    except subprocess.TimeoutExpired as error:
        return f"did not finish in {SECONDS} s", (error.stdout or b"").decode(errors="replace")
    output = done.stdout.decode(errors="replace")
    if done.returncode < 0:
        return f"died with {signal_name(-done.returncode)}", output
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"ended with exit code {done.returncode}", output
    return None, output


def signal_name(number: int) -> str:
    """What a process died of, for a reader."""
    try:
        name = signal.Signals(number).name
    except ValueError:  # one of the real-time signals
        return f"signal {number}"
    return f"{name} (memory may have run out)" if name == "SIGKILL" else name
