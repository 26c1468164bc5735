"""Results as CSV: one row a case and provider, the same columns for every kind of run, empty where a kind has no such
figure.

=================  ====================================================================================================
column             meaning
=================  ====================================================================================================
kind               "model", "ops", "scaling", "breakdown" or "memory"
case               the case's name; of a scaling curve its name, "=" and where on the axis, e.g. "batch=8"
part               breakdown: the kind of work, "total" in the row of the sum; memory: "attention" or "layer"
dtype              of the case
provider           who computed; in a row of a case that was skipped empty
parity             "passed", "failed", or empty when it did not run
note               why there is no time: what it raised, what is missing, the bound that was broken, why it was skipped
time_ms            median
time_ms_low        lower end of the median's 95 % interval, and time_ms_high the upper one
rounds             how many times the figures are made of
speedup            time of the run's reference over the provider's, median of the ratios within each round
speedup_low        lower end of its interval, and speedup_high the upper one
roof               share of what the machine can do, 1 = reached
kept_bytes         alive between forward and backward
peak_bytes         the most alive at once
device             "cpu" or "cuda"; here and below the same in every row of a run
chip               the GPU's name, or the CPU's
threads            of the CPU
torch              version
git_revision       of this library's checkout, "+" behind it if files were changed
=================  ====================================================================================================
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import replacing
from .speedups import over_reference

COLUMNS = (
    "kind",
    "case",
    "part",
    "dtype",
    "provider",
    "parity",
    "note",
    "time_ms",
    "time_ms_low",
    "time_ms_high",
    "rounds",
    "speedup",
    "speedup_low",
    "speedup_high",
    "roof",
    "kept_bytes",
    "peak_bytes",
    "device",
    "chip",
    "threads",
    "torch",
    "git_revision",
)

Row = dict[str, Any]


def write(path: Path, document: Mapping[str, Any]) -> None:
    """Writes the document's rows, replacing the file in one step.

    Raises:
        ValueError: a document of an unknown kind.
    """
    found = list(rows(document))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, restval="")
        table.writeheader()
        table.writerows(found)


def rows(document: Mapping[str, Any]) -> Iterator[Row]:
    """The document's rows, each with those of ``COLUMNS`` that it has.

    Raises:
        ValueError: a document of an unknown kind.
    """
    kind = document["kind"]
    if kind == "all":
        for run in document["runs"]:
            yield from rows(run)
        return
    if kind not in _ROWS:
        raise ValueError(f"documents of kind {kind!r} have no rows; known: all, {', '.join(_ROWS)}")
    machine, settings = document.get("machine", {}), document.get("settings", {})
    about = {
        "device": settings.get("device"),
        "chip": machine.get("gpu") or machine.get("cpu"),
        **{name: machine.get(name) for name in ("threads", "torch", "git_revision")},
    }
    for row in _ROWS[kind](document):
        yield {"kind": kind} | row | about


def _timed(document: Mapping[str, Any]) -> Iterator[Row]:
    """Of model and ops."""
    for result in document["results"]:
        case = {"case": result["case"]["name"], "dtype": result["case"]["dtype"]}
        if result["skipped"] is not None:
            yield case | {"note": f"skipped: {result['skipped']}"}
        for provider in result["providers"]:
            yield case | _provider(provider, result["providers"], result.get("baseline", "reference"))


def _scaling(document: Mapping[str, Any]) -> Iterator[Row]:
    for curve in document["curves"]:
        for point in curve["points"]:
            case = {"case": f"{curve['name']}={point['x']}", "dtype": curve["dtype"]}
            if point["skipped"] is not None:
                yield case | {"note": f"skipped: {point['skipped']}"}
            for provider in point["providers"]:
                yield case | _provider(provider, point["providers"], "reference")


def _provider(provider: Mapping[str, Any], beside: list[Mapping[str, Any]], reference: str) -> Row:
    row = {
        "provider": provider["name"],
        "parity": provider["parity"],
        "note": provider["missing"] or provider["failure"] or provider["reason"],
    }
    time, roof = provider["time_ms"], provider.get("roof")
    if time is not None:
        row |= {"time_ms": time["median"], "time_ms_low": time["low"], "time_ms_high": time["high"]}
        row["rounds"] = len(time["rounds"]) if "rounds" in time else None
    ratio = over_reference(provider, beside, reference)
    if ratio is not None:
        row |= {"speedup": ratio.median, "speedup_low": ratio.low, "speedup_high": ratio.high}
    row["roof"] = roof["share"] if isinstance(roof, Mapping) else roof
    return row


def _breakdown(document: Mapping[str, Any]) -> Iterator[Row]:
    for result in document["results"]:
        case = {"case": result["case"]["name"], "dtype": result["case"]["dtype"]}
        for provider in result["providers"]:
            row = case | {"provider": provider["name"], "parity": "passed"}
            yield row | {"part": "total", "time_ms": provider["total_ms"]}
            for part in provider["parts"]:
                yield row | {"part": part["name"], "time_ms": part["ms"]}
        for provider in result["left_out"]:
            yield case | {"provider": provider["name"], "note": provider["reason"]}


def _memory(document: Mapping[str, Any]) -> Iterator[Row]:
    for result in document["results"]:
        case = {"case": result["case"]["name"], "dtype": result["case"]["dtype"], "part": result["part"]}
        for field, provider in (("ours", "beit3_fast"), ("public", "public")):
            bytes_ = result[field]
            yield case | {"provider": provider, "kept_bytes": bytes_["kept"], "peak_bytes": bytes_["peak"]}


_ROWS = {"model": _timed, "ops": _timed, "scaling": _scaling, "breakdown": _breakdown, "memory": _memory}
