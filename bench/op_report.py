"""How results of ``bench ops`` are shown (a table) and kept (JSON).

The JSON is an object::

    schema     1; raised when a field changes its meaning or goes away
    kind       "ops"
    complete   false when the run was interrupted: later cases are missing
    machine    as in bench model
    settings   device, rounds
    roofs      bandwidth_gb_s; matrix_gflop_s, an object with one number a dtype: the roofs that shares are of;
               peak_gflop_s, an object with core (one thread) and all a dtype, of multiply-adds in registers;
               memory_gb_s, an object with one number a kind of pass; probe, null, or what measured the peaks, or why
               nothing did
    results    one object a case:
      case       name, op, batch, rows (tokens), vision_tokens, text_lengths (valid tokens per sample), text_width,
                 width, out, heads, residual, mask ("full" or "captioning", null where there is no attention), dtype,
                 direction ("forward" or "backward"), flops, bytes
      ok         ours ran and passed, or the case was skipped
      skipped    null, or why the case was not run
      providers  one object each:
        name
        missing   null, or why it cannot take part
        failure   null, or what it raised, or how it ended the process in which it was tried
        errors    null, or for each result ("out", or the input whose gradient it is) null or maximum, rms, absolute as
                  in bench model
        parity    "passed", "failed", or null when it did not run
        reason    null, or the bound that was broken, and by which result where there are several
        host_time null, or why the host's time is in time_ms: on a GPU others' is the device's alone
        time_ms   null, or median, low, high, rounds (every round's time, in order)
        roof      null, or share (of the roof that binds, 1 = reached) and bound ("matrix" or "memory")
        speedup   null, or median, low, high of the per-round ratio provider / ours: above 1 ours is the faster

``low`` and ``high`` are the ends of a 95 % confidence interval of the median. Numbers are finite: where a result was
not, its error is null and its parity "failed".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from .cases import dtype_name
from .op_cases import OpCase
from .op_providers import OURS
from .ops import OpResult
from .outcome import Outcome, error_document
from .report import interval, milliseconds, parity_cells, provider_cell
from .roofs import Roofs
from .timing import Estimate, Timing

SCHEMA = 1


def op_table(result: OpResult, roofs: Roofs) -> Table:
    """One case's outcomes; who cannot take part comes last."""
    case = result.case
    title = f"{case.name}: {describe(case)}"
    shown = Table(title=title, title_justify="left", title_style="bold", min_width=len(title))  # a title in one line
    shown.add_column("provider")
    shown.add_column("max error", justify="right")
    shown.add_column("parity")
    shown.add_column("time", justify="right")
    shown.add_column("of roof", justify="right")
    shown.add_column("ours is faster by", justify="right")
    if result.skipped is not None:
        shown.add_row(Text(f"skipped: {result.skipped}", style="yellow"))
    for outcome in sorted(result.outcomes, key=lambda outcome: outcome.missing is not None):
        shown.add_row(*_row(outcome, result, roofs))
    return shown


def describe(case: OpCase) -> str:
    """The case in a few words."""
    batch, shape = case.batch, case.shape
    text = sum(batch.text_lengths()) / batch.samples
    parts = [f"{batch.samples} x ({batch.vision} + {text:.3g}) tokens"]
    if case.op == "attention":
        parts.append(f"{shape.heads} heads of {shape.width // shape.heads}")
        if shape.mask != "full":
            parts.append(f"{shape.mask} mask")
    else:
        parts.append(f"width {shape.width}" + (f" to {shape.out}" if shape.out else ""))
    if shape.residual:
        parts.append("residual")
    if case.flops():
        parts.append(f"{case.flops() / 1e9:.3g} GFLOP")
    return ", ".join([*parts, f"{case.bytes() / 1e6:.3g} MB"])


def _row(outcome: Outcome, result: OpResult, roofs: Roofs) -> list[Any]:
    error = outcome.error
    cells = [provider_cell(outcome), "" if error is None else f"{error.maximum:.1e}", *parity_cells(outcome)]
    if not outcome.ok or result.timing is None:
        return cells
    time = result.timing.time(outcome.provider)
    share, bound = _share(result.case, time, roofs)
    speedup = _speedup(outcome.provider, result.timing)
    return [
        *cells,
        f"{milliseconds(time.median)} ms" + (" with the host's" if outcome.host_time else ""),
        f"{100 * share:.2g}% {bound}",
        "" if speedup is None else interval(speedup),
    ]


def op_document(
    results: Sequence[OpResult],
    roofs: Roofs,
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    complete: bool,
) -> dict[str, Any]:
    """The JSON of a run; the module's docstring describes it."""
    return {
        "schema": SCHEMA,
        "kind": "ops",
        "complete": complete,
        "machine": dict(machine),
        "settings": dict(settings),
        "roofs": roofs.document(),
        "results": [
            {
                "case": _case(result.case),
                "ok": result.ok,
                "skipped": result.skipped,
                "providers": [_provider(outcome, result, roofs) for outcome in result.outcomes],
            }
            for result in results
        ],
    }


def _case(case: OpCase) -> dict[str, Any]:
    shape, batch = case.shape, case.batch
    return {
        "name": case.name,
        "op": case.op,
        "batch": batch.samples,
        "rows": batch.rows,
        "vision_tokens": batch.vision,
        "text_lengths": batch.text_lengths(),
        "text_width": batch.text_width,
        "width": shape.width,
        "out": shape.out,
        "heads": shape.heads,
        "residual": shape.residual,
        "mask": shape.mask if case.op == "attention" else None,
        "dtype": dtype_name(case.dtype),
        "direction": "backward" if case.backward else "forward",
        "flops": case.flops(),
        "bytes": case.bytes(),
    }


def _provider(outcome: Outcome, result: OpResult, roofs: Roofs) -> dict[str, Any]:
    time_ms = roof = speedup = None
    if outcome.ok and result.timing is not None:
        time_ms = result.timing.document(outcome.provider)
        share, bound = _share(result.case, result.timing.time(outcome.provider), roofs)
        roof = {"share": share, "bound": bound}
        ratio = _speedup(outcome.provider, result.timing)
        speedup = None if ratio is None else asdict(ratio)
    errors = None if outcome.errors is None else {name: error_document(e) for name, e in outcome.errors.items()}
    return outcome.document() | {
        "errors": errors,
        "host_time": outcome.host_time,
        "time_ms": time_ms,
        "roof": roof,
        "speedup": speedup,
    }


def _share(case: OpCase, time: Estimate, roofs: Roofs) -> tuple[float, str]:
    return roofs.share(case.flops(), case.bytes(), case.dtype, time.median)


def _speedup(provider: str, timing: Timing) -> Estimate | None:
    if provider == OURS.name or OURS.name not in timing.rounds:
        return None
    return timing.speedup(OURS.name, over=provider)
