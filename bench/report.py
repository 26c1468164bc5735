"""How results are shown (a table) and kept (JSON).

The JSON is an object::

    schema     1; raised when a field changes its meaning or goes away
    kind       "model"
    complete   false when the run was interrupted: later cases are missing
    machine    cpu, cores, threads, isa, gpu, system, python, torch, beit3_fast, git_revision (null outside a checkout)
    settings   device, rounds
    roofs      as in bench ops, measured on this machine
    results    one object a case:
      case       name, size, batch, image_size, text_tokens, text_lengths (valid tokens per sample), dtype, truth,
                 task ("forward", "training" or "captioning")
      ok         everybody who is no peer ran and passed, or the case was skipped
      skipped    null, or why the case was not run
      flops      null, or the operations of the matrix products on tokens that are no padding
      baseline   the provider over which speedup is given
      ours       null, or our fastest entry that passed
      best_other null, or the fastest of the others that computes in the case's dtype and passed
      providers  one object each:
        name
        peer       true if it may fail
        missing    null, or why it cannot take part
        failure    null, or what it raised
        error      null, or maximum and rms (relative to the truth's largest magnitude and RMS), absolute
        parity     "passed", "failed", or null when it did not run
        reason     null, or the bound that was broken
        time_ms    null, or median, low, high, rounds (every round's time, in order)
        roof       null, or the share of the machine's rate of matrix products in the provider's dtype, 1 = reached
        speedup    null, or median, low, high of the per-round ratio baseline / provider
        ours_faster null, or median, low, high of the per-round ratio provider / ours
        memory     null, or peak and held (of it weights, gradients and Adam's moments), bytes, of a training step

``low`` and ``high`` are the ends of a 95 % confidence interval of the median. Numbers are finite: where an output was
not, its error is null and its parity "failed".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from .cases import CAPTION_BEAMS, CAPTION_TOKENS, ModelCase, dtype_name
from .model import CaseResult
from .outcome import Outcome, error_document
from .roofs import Roofs
from .timing import Estimate

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


def table(result: CaseResult, roofs: Roofs) -> Table:
    """One case's outcomes; who cannot take part comes last."""
    case = result.case
    title = f"{case.name}: {describe(case)}"
    shown = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", min_width=len(title))
    shown.caption = _caption(result)
    shown.add_column("provider")
    shown.add_column("max error", justify="right")
    shown.add_column("rms error", justify="right")
    shown.add_column("parity")
    shown.add_column("time", justify="right")
    if result.flops is not None:
        shown.add_column("of roof", justify="right")
    if result.memory:
        shown.add_column("peak memory", justify="right")
    shown.add_column("speed-up", justify="right")
    shown.add_column("ours is faster by", justify="right")
    if result.skipped is not None:
        shown.add_row(Text(f"skipped: {result.skipped}", style="yellow"))
    for outcome in sorted(result.outcomes, key=lambda outcome: outcome.missing is not None):
        shown.add_row(*_row(outcome, result, roofs))
    return shown


def _caption(result: CaseResult) -> str:
    lines = [
        f"errors against reference PyTorch in {dtype_name(result.case.truth)}, relative to its size; "
        f"speed-up over {result.baseline}"
    ]
    if result.flops is not None:
        lines.append(f"of roof: {result.flops / 1e9:,.4g} GFLOP of useful products over the machine's own rate")
    ratio = _ours_faster(result.best_other, result)
    if ratio is not None:
        best = f"best of the others in {dtype_name(result.case.dtype)}: {result.best_other}"
        lines.append(f"{best}; {result.ours} runs at {interval(ratio)} its speed")
    ours, other = result.memory.get(result.ours), result.memory.get(result.best_other)
    if ours is not None and other is not None:
        lines.append(
            f"{ours.held / 1e9:.3g} GB of the peak are weights, gradients and Adam's moments; beyond them "
            f"{result.ours} takes {(ours.peak - ours.held) / (other.peak - other.held):.2f}x of {result.best_other}'s"
        )
    return "\n".join(lines)


def describe(case: ModelCase) -> str:
    """The case in a few words."""
    parts = [case.size, f"batch {case.batch}"]
    if case.image_size is not None:
        parts.append(f"image {case.image_size}")
    if case.text_tokens is not None:
        valid = sum(case.lengths()) / case.batch
        padded = f" ({valid:.3g} valid on average)" if case.text_lengths else ", none padded"
        parts.append(f"{case.text_tokens} text tokens{padded}")
    if case.task == "training":
        parts.append("training step")
    if case.task == "captioning":
        parts.append(f"{CAPTION_BEAMS} beams to {CAPTION_TOKENS} tokens")
    return ", ".join([*parts, dtype_name(case.dtype)])


def _row(outcome: Outcome, result: CaseResult, roofs: Roofs) -> list[RenderableType]:
    error, timing = outcome.error, result.timing
    errors = ["", ""] if error is None else [f"{error.maximum:.1e}", f"{error.rms:.1e}"]
    cells = [provider_cell(outcome), *errors, *parity_cells(outcome)]
    if not outcome.ok or timing is None:
        return cells
    cells.append(f"{milliseconds(timing.time(outcome.provider).median)} ms")
    if result.flops is not None:
        share = _roof(outcome, result, roofs)
        cells.append("" if share is None else f"{100 * share:.0f}%")
    if result.memory:
        memory = result.memory.get(outcome.provider)
        cells.append("" if memory is None else f"{memory.peak / 1e9:.2f} GB")
    for ratio in (_speedup(outcome.provider, result), _ours_faster(outcome.provider, result)):
        cells.append("" if ratio is None else interval(ratio))
    return cells


def provider_cell(outcome: Outcome) -> RenderableType:
    """The provider's name."""
    return Text(outcome.provider, style="dim" if outcome.missing is not None else "")


def parity_cells(outcome: Outcome) -> list[RenderableType]:
    """Whether it passed or why not, and then what stands for its time."""
    if outcome.ok:
        return [Text(outcome.words, style="green")]
    return [Text(outcome.words, style="dim")] if outcome.missing else [Text(outcome.words, style="bold red"), "none"]


def interval(estimate: Estimate) -> str:
    """``1.52x [1.48, 1.57]``"""
    return f"{estimate.median:.2f}x [{estimate.low:.2f}, {estimate.high:.2f}]"


def milliseconds(nanoseconds: float) -> str:
    """Three digits that matter, and no more."""
    value = nanoseconds / 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def document(
    results: Sequence[CaseResult],
    roofs: Roofs,
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    complete: bool,
) -> dict[str, Any]:
    """The JSON of a run; the module's docstring describes it."""
    return {
        "schema": SCHEMA,
        "kind": "model",
        "complete": complete,
        "machine": dict(machine),
        "settings": dict(settings),
        "roofs": roofs.document(),
        "results": [_result(result, roofs) for result in results],
    }


def case_document(case: ModelCase) -> dict[str, Any]:
    """A case in the JSON."""
    return {
        **asdict(case),
        "text_lengths": case.lengths() if case.text_tokens is not None else None,
        "dtype": dtype_name(case.dtype),
        "truth": dtype_name(case.truth),
    }


def _result(result: CaseResult, roofs: Roofs) -> dict[str, Any]:
    return {
        "case": case_document(result.case),
        "ok": result.ok,
        "skipped": result.skipped,
        "flops": result.flops,
        "baseline": result.baseline,
        "ours": result.ours,
        "best_other": result.best_other,
        "providers": [_provider(outcome, result, roofs) for outcome in result.outcomes],
    }


def _provider(outcome: Outcome, result: CaseResult, roofs: Roofs) -> dict[str, Any]:
    time_ms = speedup = ours_faster = None
    if outcome.ok and result.timing is not None:
        time_ms = result.timing.document(outcome.provider)
        speedup, ours_faster = _speedup(outcome.provider, result), _ours_faster(outcome.provider, result)
    memory = result.memory.get(outcome.provider)
    return outcome.document() | {
        "peer": outcome.peer,
        "error": error_document(outcome.error),
        "time_ms": time_ms,
        "roof": _roof(outcome, result, roofs),
        "speedup": None if speedup is None else asdict(speedup),
        "ours_faster": None if ours_faster is None else asdict(ours_faster),
        "memory": None if memory is None else asdict(memory),
    }


def _roof(outcome: Outcome, result: CaseResult, roofs: Roofs) -> float | None:
    """Useful operations a second over the machine's rate; None where there is no time or no count."""
    rate = None if outcome.dtype is None else roofs.matrix.get(outcome.dtype)
    if not outcome.ok or result.timing is None or result.flops is None or rate is None:
        return None
    return result.flops / (result.timing.time(outcome.provider).median * 1e-9) / rate


def _speedup(provider: str, result: CaseResult) -> Estimate | None:
    timing = result.timing
    if timing is None or provider == result.baseline or result.baseline not in timing.rounds:
        return None
    return timing.speedup(provider, over=result.baseline)


def _ours_faster(provider: str | None, result: CaseResult) -> Estimate | None:
    if result.timing is None or provider is None or result.ours is None or provider == result.ours:
        return None
    return result.timing.speedup(result.ours, over=provider)


def count(number: Any, what: str) -> str:
    """``1 core``, ``2 cores``"""
    return f"{number} {what}" + ("" if number == 1 else "s")


def console() -> Console:
    """Where tables go. A file or a pipe gets them unwrapped: 80 columns would break every row."""
    shown = Console()
    return shown if shown.is_terminal else Console(width=140)
