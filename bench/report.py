"""How results are shown (a table) and kept (JSON).

The JSON is an object::

    schema     1; raised when a field changes its meaning or goes away
    kind       "model"
    machine    cpu, cores, threads, isa, gpu, system, python, torch, beit3_fast, git_revision (null outside a checkout)
    settings   device, rounds
    results    one object a case:
      case       name, size, batch, image_size, text_tokens, text_lengths (valid tokens per sample), dtype, truth
      ok         every provider ran and passed
      providers  one object each:
        name
        failure    null, or why it did not run
        error      null, or maximum and rms (relative to the truth's largest magnitude and RMS), absolute
        parity     "passed", "failed", or null when it did not run
        reason     null, or the bound that was broken
        time_ms    null, or median, low, high, rounds (every round's time, in order)
        speedup    null, or median, low, high of the per-round ratio reference / provider

``low`` and ``high`` are the ends of a 95 % confidence interval of the median. Numbers are finite: where an output was
not, its error is null and its parity "failed".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .cases import ModelCase
from .model import BASELINE, CaseResult, Outcome
from .timing import Estimate, Timing

SCHEMA = 1


def header(machine: Mapping[str, Any], settings: Mapping[str, Any]) -> RenderableType:
    """The machine and the settings, as shown above the tables."""
    revision = f" ({machine['git_revision']})" if machine["git_revision"] else ""
    cores = f"{count(machine['cores'], 'core')}, {count(machine['threads'], 'thread')}"
    lines = [f"[bold]{machine['gpu']}[/]"] if machine["gpu"] else []
    lines += [
        f"[bold]{machine['cpu']}[/], {cores}, {machine['isa']}",
        (
            f"beit3_fast {machine['beit3_fast']}{revision}, torch {machine['torch']}, Python {machine['python']}, "
            f"{machine['system']}"
        ),
        f"{settings['rounds']} interleaved rounds on {settings['device']}; medians, 95 % intervals",
    ]
    return Panel("\n".join(lines), expand=False)


def table(result: CaseResult) -> Table:
    """One case's outcomes."""
    case = result.case
    title = f"{case.name}: {describe(case)}"
    shown = Table(title=title, title_justify="left", title_style="bold", caption_justify="left")
    shown.caption = f"errors against reference PyTorch in {_dtype(case.truth)}, relative to its size"
    shown.add_column("provider")
    shown.add_column("max error", justify="right")
    shown.add_column("rms error", justify="right")
    shown.add_column("parity")
    shown.add_column("time", justify="right")
    shown.add_column("speed-up", justify="right")
    for outcome in result.outcomes:
        shown.add_row(*_row(outcome, result.timing))
    return shown


def describe(case: ModelCase) -> str:
    """The case in a few words."""
    parts = [case.size, f"batch {case.batch}"]
    if case.image_size is not None:
        parts.append(f"image {case.image_size}")
    if case.text_tokens is not None:
        valid = sum(case.lengths()) / case.batch
        padded = f" ({valid:.3g} valid on average)" if case.text_lengths else ", none padded"
        parts.append(f"{case.text_tokens} text tokens{padded}")
    return ", ".join([*parts, _dtype(case.dtype)])


def _row(outcome: Outcome, timing: Timing | None) -> list[RenderableType]:
    if outcome.error is None or outcome.verdict is None:
        return [outcome.provider, "", "", Text(f"did not run: {outcome.failure}", style="red"), "", ""]
    errors = [f"{outcome.error.maximum:.1e}", f"{outcome.error.rms:.1e}"]
    if not outcome.ok or timing is None:
        return [outcome.provider, *errors, Text(f"FAILED: {outcome.verdict.reason}", style="bold red"), "none", "none"]
    speedup = _speedup(outcome.provider, timing)
    return [
        outcome.provider,
        *errors,
        Text("passed", style="green"),
        f"{milliseconds(timing.time(outcome.provider).median)} ms",
        "" if speedup is None else interval(speedup),
    ]


def interval(estimate: Estimate) -> str:
    """``1.52x [1.48, 1.57]``"""
    return f"{estimate.median:.2f}x [{estimate.low:.2f}, {estimate.high:.2f}]"


def milliseconds(nanoseconds: float) -> str:
    """Three digits that matter, and no more."""
    value = nanoseconds / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def document(results: Sequence[CaseResult], machine: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of a run; the module's docstring describes it."""
    return {
        "schema": SCHEMA,
        "kind": "model",
        "machine": dict(machine),
        "settings": dict(settings),
        "results": [_result(result) for result in results],
    }


def _result(result: CaseResult) -> dict[str, Any]:
    case = {
        **asdict(result.case),
        "text_lengths": result.case.lengths() if result.case.text_tokens is not None else None,
        "dtype": _dtype(result.case.dtype),
        "truth": _dtype(result.case.truth),
    }
    return {
        "case": case,
        "ok": result.ok,
        "providers": [_provider(outcome, result.timing) for outcome in result.outcomes],
    }


def _provider(outcome: Outcome, timing: Timing | None) -> dict[str, Any]:
    error = None
    if outcome.error is not None and all(map(math.isfinite, asdict(outcome.error).values())):
        error = asdict(outcome.error)
    parity = None if outcome.verdict is None else ("passed" if outcome.ok else "failed")
    time_ms = speedup = None
    if outcome.ok and timing is not None:
        rounds = [nanoseconds / 1e6 for nanoseconds in timing.rounds[outcome.provider]]
        estimate = timing.time(outcome.provider)
        time_ms = {name: nanoseconds / 1e6 for name, nanoseconds in asdict(estimate).items()} | {"rounds": rounds}
        ratio = _speedup(outcome.provider, timing)
        speedup = None if ratio is None else asdict(ratio)
    return {
        "name": outcome.provider,
        "failure": outcome.failure,
        "error": error,
        "parity": parity,
        "reason": (outcome.verdict.reason or None) if outcome.verdict else None,
        "time_ms": time_ms,
        "speedup": speedup,
    }


def _speedup(provider: str, timing: Timing | None) -> Estimate | None:
    if timing is None or provider == BASELINE or BASELINE not in timing.rounds:
        return None
    return timing.speedup(provider, over=BASELINE)


def count(number: Any, what: str) -> str:
    """``1 core``, ``2 cores``"""
    return f"{number} {what}" + ("" if number == 1 else "s")


def _dtype(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def console() -> Console:
    """Where tables go. A file or a pipe gets them unwrapped: 80 columns would break every row."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=140)
