"""``beit3-fast bench breakdown``: where the time of a forward goes, for the reference, the public code and ours.

After parity PyTorch's profiler watches several forwards of each. An op's own time, without that of the ops it calls, is
given to one of ``PARTS``: by its own name or, where that says nothing (views, allocations), by that of the nearest op
that called it. What ``WHOLE`` names keeps what it calls. So the parts add up to the forward, and what stands in none is
seen as "other". Adding an op is adding its name to a part.

On a CPU the time is the calling thread's, Python between the ops included. On a GPU it is the time of the kernels that
each op launched, and gaps between kernels are in no part.

Ours fuses: bias, GELU and residual are done inside its matrix products, a whole feed-forward block may be one op, and
its attention has scaling, mask and softmax inside. In the reference the same work is elementwise ops of its own.

The JSON is an object::

    schema     1; raised when a field changes its meaning or goes away
    kind       "breakdown"
    complete   false when the run was interrupted: later cases are missing
    machine    as in bench model
    settings   device, rounds (of the time without the profiler), forwards (under it)
    results    one object a case:
      case       as in bench model
      ok         everybody who is no peer ran and passed
      providers  one object for each that passed parity:
        name
        time_ms    median, low, high and rounds (every round's time, in order) without the profiler
        total_ms   the sum of the parts
        parts      name and ms (the median over the forwards) of each that occurs, the largest first
      left_out   one object for each of the others: name, reason
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch.autograd import DeviceType
from torch.autograd.profiler import profile, record_function

from . import cases, model, model_tasks
from .cases import ModelCase
from .model import BASELINE, OPTIMIZED, CaseResult, Provider, Run
from .report import case_document, describe, milliseconds
from .timing import MIN_ROUNDS

DEFAULT_CASES = ("base-joint-dense", "base-joint", "base-joint-dense-bfloat16")
QUICK_CASES = ("base-joint",)
DEFAULT_FORWARDS = 5
QUICK_FORWARDS = 3
PROVIDERS = (BASELINE, "public", OPTIMIZED.name)
"""The reference first: the others are judged by it."""

SCHEMA = 1

FORWARD = "beit3_fast.bench: a forward"
"""The region that is profiled: its own time is that of Python."""
PYTHON, OTHER = "Python between ops", "other"

PARTS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::matmul", "aten::linear"),
    "matrix products with bias, GELU, residual": (
        "beit3_fast::multiway_linear",
        "beit3_fast::multiway_linear_cpu",
        "beit3_fast::packed_linear",
    ),
    "feed-forward block (products, GELU, LayerNorm, residual)": (
        "beit3_fast::multiway_ffn",
        "beit3_fast::packed_ffn",
    ),
    "attention": (
        "aten::bmm",
        "aten::masked_fill",
        "aten::masked_fill_",
        "aten::softmax",
        "aten::_softmax",
        "aten::scaled_dot_product_attention",
        "beit3_fast::attention",
        "beit3_fast::attention_cpu",
        "beit3_fast::decode_attention",
        "beit3_fast::decode_attention_cpu",
    ),
    "LayerNorm": ("aten::layer_norm", "aten::native_layer_norm", "beit3_fast::layer_norm"),
    "GELU": ("aten::gelu",),
    "residual and other elementwise": (
        "aten::add",
        "aten::add_",
        "aten::sub",
        "aten::rsub",
        "aten::mul",
        "aten::mul_",
    ),
    "embedding": ("aten::embedding", "aten::conv2d"),
    "copies": (
        "aten::copy_",
        "aten::cat",
        "aten::clone",
        "aten::contiguous",
        "aten::index_copy",
        "aten::index_copy_",
        "aten::index_select",
        "aten::reshape",
        "aten::to",
        "beit3_fast::route_tokens",
    ),
}
WHOLE = ("embedding",)
"""Parts to which the ops that theirs call belong as well: a lookup and a convolution are copies and products inside."""

_PART_OF = {op: part for part, ops in PARTS.items() for op in ops}


def part_of(event: Any) -> str:
    """The part that an event's own time belongs to; an event has ``name`` and ``cpu_parent``, an event or None."""
    if event.name == FORWARD:
        return PYTHON
    found = []
    while event is not None:
        if event.name in _PART_OF:
            found.append(_PART_OF[event.name])
        event = event.cpu_parent
    return next((part for part in found if part in WHOLE), found[0] if found else OTHER)


def parts_of(events: Iterable[Any], device: torch.device) -> dict[str, float]:
    """Milliseconds of each part that occurs: the profiler's events of one forward, the host's times on a CPU, those of
    the launched kernels on a GPU."""
    own = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    parts: dict[str, float] = {}
    for event in events:
        if event.device_type != DeviceType.CPU:  # a kernel, whose time its op has
            continue
        microseconds = getattr(event, own)
        if microseconds > 0:
            part = part_of(event)
            parts[part] = parts.get(part, 0.0) + microseconds / 1e3
    return parts


def measure(run: Run, device: torch.device, forwards: int) -> dict[str, float]:
    """The median milliseconds of each part over ``forwards`` calls, the largest part first; what most calls lack is
    left out."""
    found = [parts_of(_events(run, device), device) for _ in range(forwards)]
    names = dict.fromkeys(name for parts in found for name in parts)
    medians = {name: statistics.median(parts.get(name, 0.0) for parts in found) for name in names}
    return dict(sorted(((name, ms) for name, ms in medians.items() if ms > 0), key=lambda item: -item[1]))


def _events(run: Run, device: torch.device) -> Iterable[Any]:
    os.environ.setdefault(
        "KINETO_LOG_LEVEL", "99"
    )  # the profiler would write to standard error at every start and stop
    if device.type == "cuda":
        with profile(use_device="cuda") as watched:
            run()
            torch.cuda.synchronize()
    else:
        with profile() as watched, record_function(FORWARD):
            run()
    return watched.function_events


@dataclass(frozen=True)
class Breakdown:
    """A case's parity and times, and the parts of everybody who passed: milliseconds by provider and part."""

    result: CaseResult
    parts: Mapping[str, Mapping[str, float]]


def run_case(
    case: ModelCase,
    taking_part: Sequence[Provider],
    *,
    device: torch.device,
    forwards: int,
    progress: Callable[[str], None] = lambda message: None,
) -> Breakdown:
    """Parity and a time without the profiler (as in ``bench model``), then the parts."""
    runs: dict[str, Run] = {}

    def keeping(provider: Provider) -> Provider:
        def build(setup: Any) -> Run:
            runs[provider.name] = provider.build(setup)
            return runs[provider.name]

        return replace(provider, build=build)

    taking_part = [keeping(provider) for provider in taking_part]
    result = model.run_case(case, taking_part, device=device, rounds=MIN_ROUNDS, progress=progress)
    parts = {}
    for outcome in result.outcomes:
        if outcome.ok:
            progress(f"{case.name}: the parts of {outcome.provider}")
            with torch.inference_mode():
                parts[outcome.provider] = measure(runs[outcome.provider], device, forwards)
    return Breakdown(result, parts)


def select(names: Sequence[str] = (), *, quick: bool = False) -> list[ModelCase]:
    """The cases of these names, ``DEFAULT_CASES`` without; ``quick`` as in :func:`beit3_fast.bench.cases.select`.

    Raises:
        ValueError: an unknown name (the nearest known ones are offered), or a case that is not one forward.
    """
    chosen = cases.select(list(names) or (QUICK_CASES if quick else DEFAULT_CASES), quick=quick)
    for case in chosen:
        if case.task != "forward":
            raise ValueError(f"case must be a forward of the backbone, got {case.name!r}, whose task is {case.task}")
    return chosen


def providers() -> list[Provider]:
    """Who takes part."""
    task = model_tasks.tasks()["forward"]
    known = {provider.name: provider for provider in (*task.own, *task.peers)}
    return [known[name] for name in PROVIDERS]


def table(breakdown: Breakdown) -> Table:
    """Milliseconds and shares, a row a part and a column a provider."""
    result = breakdown.result
    title = f"{result.case.name}: {describe(result.case)}"
    shown = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", min_width=len(title))
    shown.add_column("part")
    names = list(breakdown.parts)
    totals = {name: sum(parts.values()) for name, parts in breakdown.parts.items()}
    for name in names:
        shown.add_column(name, justify="right")
    occurring = dict.fromkeys(part for parts in breakdown.parts.values() for part in parts)
    for part in (*PARTS, PYTHON, OTHER):
        if part in occurring:
            shown.add_row(part, *(_cell(breakdown.parts[name].get(part), totals[name]) for name in names))
    shown.add_section()
    shown.add_row("sum", *(f"{milliseconds(totals[name] * 1e6)} ms     " for name in names))
    if result.timing is not None:
        times = [result.timing.time(name).median for name in names]
        shown.add_row("a forward without the profiler", *(f"{milliseconds(time)} ms     " for time in times))
    shown.caption = Text("\n".join(f"{name}: {reason}" for name, reason in _left_out(result).items()), "red")
    return shown


def _cell(ms: float | None, total: float) -> str:
    return "" if ms is None else f"{milliseconds(ms * 1e6)} ms {100 * ms / total:3.0f}%"


def _left_out(result: CaseResult) -> dict[str, str]:
    """Who has no parts, and why."""
    if result.skipped is not None:
        return dict.fromkeys(PROVIDERS, f"not run: {result.skipped}")
    return {outcome.provider: outcome.words for outcome in result.outcomes if not outcome.ok}


def document(
    breakdowns: Sequence[Breakdown], machine: Mapping[str, Any], settings: Mapping[str, Any], *, complete: bool
) -> dict[str, Any]:
    """The JSON of a run; the module's docstring describes it."""
    return {
        "schema": SCHEMA,
        "kind": "breakdown",
        "complete": complete,
        "machine": dict(machine),
        "settings": dict(settings),
        "results": [_result(breakdown) for breakdown in breakdowns],
    }


def _result(breakdown: Breakdown) -> dict[str, Any]:
    result = breakdown.result
    providers = []
    for name, parts in breakdown.parts.items():
        assert result.timing is not None  # there is one as soon as somebody passed
        providers.append(
            {
                "name": name,
                "time_ms": result.timing.document(name),
                "total_ms": sum(parts.values()),
                "parts": [{"name": part, "ms": ms} for part, ms in parts.items()],
            }
        )
    return {
        "case": case_document(result.case),
        "ok": result.ok,
        "providers": providers,
        "left_out": [{"name": name, "reason": reason} for name, reason in _left_out(result).items()],
    }
