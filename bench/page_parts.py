"""What the HTML report is made of: a provider's outcome as the documents have it, tables, figures, and words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .report import count, milliseconds
from .timing import Estimate

OURS, REFERENCE = "beit3_fast", "reference"


@dataclass(frozen=True)
class Entry:
    """One provider's outcome, of whatever kind of document."""

    name: str
    missing: str | None
    failure: str | None
    parity: str | None
    reason: str | None
    time: Estimate | None
    raw: Mapping[str, Any]

    @classmethod
    def read(cls, raw: Mapping[str, Any]) -> Entry:
        """From a document; without passed parity there is no time, whatever the document says."""
        parity = raw.get("parity")
        time = estimate(raw.get("time_ms")) if parity == "passed" and raw.get("failure") is None else None
        return cls(raw["name"], raw.get("missing"), raw.get("failure"), parity, raw.get("reason"), time, raw)

    @property
    def wrong(self) -> bool:
        return self.parity == "failed"

    @property
    def problem(self) -> str | None:
        """Why it has no time, in words; None for who is only missing."""
        if self.failure is not None:
            return f"did not run: {self.failure}"
        return f"FAILED: {self.reason}" if self.wrong else None

    @property
    def left_out(self) -> str:
        """Why it has no time where nothing went wrong, in words."""
        return f"not timed: {self.reason or 'no reason given'}" if self.parity else f"not run: {self.missing}"

    @property
    def milliseconds(self) -> str:
        return "none" if self.time is None else in_ms(self.time.median)

    @property
    def colour(self) -> str:
        return role(self.name)


@dataclass(frozen=True)
class Cell:
    """A table's cell; ``style`` is a class, ``note`` stands small below the text."""

    text: str | Markup = ""
    style: str = ""
    note: str = ""
    columns: int = 1
    rows: int = 1
    heads: bool = False
    drawn: str | Markup = ""


@dataclass(frozen=True)
class Table:
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    style: str = "quiet"  # its caption is for screen readers alone


@dataclass(frozen=True)
class Figure:
    title: str
    about: str
    chart: Markup
    legend: Sequence[tuple[Markup, str]] = ()
    y_label: str = ""
    x_label: str = ""
    remarks: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Block:
    title: str = ""
    about: str = ""
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    folded: str = ""  # the tables', behind these words
    skipped: str = ""
    notes: Sequence[str] = ()


# ---- reading documents ----


def entries_of(result: Mapping[str, Any]) -> list[Entry]:
    """The providers of a case or a curve's point."""
    return [Entry.read(raw) for raw in (*result.get("providers", ()), *map(_left_out, result.get("left_out", ())))]


def _left_out(raw: Mapping[str, Any]) -> dict[str, Any]:
    """``bench breakdown`` says in words who has no parts and why; here they become what other kinds have."""
    what, _, why = raw["reason"].partition(": ")
    if what == "FAILED":
        return {"name": raw["name"], "parity": "failed", "reason": why}
    return {"name": raw["name"], "missing" if what == "not run" else "failure": why or what}


def timed_of(entries: Iterable[Entry]) -> list[tuple[Entry, Estimate]]:
    """Those with a time, the fastest first."""
    return sorted(((e, e.time) for e in entries if e.time is not None), key=lambda pair: pair[1].median)


def our_best(entries: Sequence[Entry], named: str | None = None) -> str | None:
    """Our fastest entry that has a time, the document's own choice if it names one."""
    timed = [e.name for e, _ in timed_of(entries) if is_ours(e.name)]
    return named if named in timed else next(iter(timed), None)


def results_of(runs: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Every case's result, run after run."""
    for run in runs:
        yield from run.get("results", ())


def ratio_of(entry: Entry, name: str) -> Estimate | None:
    """A timed entry's ratio to somebody else, under its name in the document."""
    return None if entry.time is None else estimate(entry.raw.get(name))


def estimate(value: Mapping[str, Any] | None) -> Estimate | None:
    """The median and its interval out of a document."""
    return None if value is None else Estimate(value["median"], value["low"], value["high"])


def is_ours(name: str) -> bool:
    """Whether a provider is this library, in any of its variants."""
    return name == OURS or name.startswith(f"{OURS},")


def role(name: str) -> str:
    """The colour of a provider's bar: the style sheet's class."""
    return "ours" if is_ours(name) else "reference" if name == REFERENCE else "peer"


# ---- words ----


def describe(case: Mapping[str, Any]) -> str:
    """A model case in a few words."""
    parts = [case["size"], count(case["batch"], "sample")]
    if case.get("image_size") is not None:
        parts.append(f"image {case['image_size']}")
    width, lengths = case.get("text_tokens"), case.get("text_lengths")
    if width is not None:
        valid = sum(lengths) / len(lengths) if lengths else width
        padded = ", none padded" if valid == width else f" ({valid:.3g} valid on average)"
        parts.append(f"{width} text tokens{padded}")
    if case.get("task", "forward") != "forward":
        parts.append({"training": "training step"}.get(case["task"], case["task"]))
    return ", ".join([*parts, case["dtype"]])


def describe_op(case: Mapping[str, Any]) -> str:
    """An op case in a few words; its name has dtype and direction."""
    text = sum(case["text_lengths"]) / case["batch"]
    parts = [f"{case['batch']} x ({case['vision_tokens']} + {text:.3g}) tokens"]
    if case["op"] == "attention":
        parts.append(f"{case['heads']} heads of {case['width'] // case['heads']}")
    else:
        parts.append(f"width {case['width']}" + (f" to {case['out']}" if case["out"] else ""))
    return ", ".join(parts)


def in_ms(time: float) -> str:
    """A time in milliseconds."""
    return f"{milliseconds(1e6 * time)} ms"


def flop_rate(gflop_s: float) -> str:
    """A rate of products."""
    return f"{gflop_s / 1e3:,.3g} TFLOP/s" if gflop_s >= 1e3 else f"{gflop_s:.3g} GFLOP/s"


# ---- cells ----


def parity_first(entry: Entry) -> tuple[int, float]:
    """Wrong results first, then the fast ones; who did not run comes last."""
    if entry.problem is not None:
        return 0, 0.0
    return (1, entry.time.median) if entry.time is not None else (2, 0.0)


def parity_cell(entry: Entry) -> Cell:
    """How the comparison with the truth ended."""
    if entry.failure is not None:
        return Cell("did not run", "failed words", entry.failure)
    return Cell("FAILED", "failed words", entry.reason or "") if entry.wrong else Cell("passed", "passed")


def error_cells(error: Mapping[str, float] | None, names: Sequence[str]) -> list[Cell]:
    """The errors of these names, empty where there are none."""
    return [Cell("" if error is None else f"{error[name]:.1e}", "number") for name in names]


def time_cell(time: Estimate) -> Cell:
    """A time with its interval."""
    low, high = milliseconds(1e6 * time.low), milliseconds(1e6 * time.high)
    return Cell(in_ms(time.median), "number", f"[{low}, {high}]")


def ratio_cell(ratio: Estimate | None) -> Cell:
    """A ratio with its interval."""
    return Cell() if ratio is None else Cell(f"{ratio.median:.2f}x", "number", f"[{ratio.low:.2f}, {ratio.high:.2f}]")


def percent(share: float | None) -> str:
    """A share in two digits that matter, and no more."""
    return "" if share is None else f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"


def size_of(size: float) -> str:
    """Bytes in words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
