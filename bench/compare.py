"""``beit3-fast bench compare``: what changed between two runs, from their documents.

Times of different runs do not compare: the machine has another clock, other neighbours, another temperature. So what
is compared is how much faster ours is than the reference of the same run, ``reference / ours``, which a slower machine
leaves alone as long as it slows both by the same factor. The change is the new ratio over the old one; above 1 ours
became faster.

Its interval comes from the two runs' own, order-statistic intervals of the ratios within the rounds: the change lies
between (new low / old high) and (new high / old low) whenever both of these cover what they should. With n cases there
are 2 n intervals, and each is taken at the confidence at which all of them hold at once with 95 %: for any verdict
among the n to be chance has at most 5 %, however rounds scatter and cases depend on each other. That takes rounds (12
are enough for 51 cases; curves take 6 unless told otherwise); with fewer the verdict says so.

Rounds show what happens within a run. What is the same throughout a run and another in the next one (a neighbour on
the cores, a clock, where memory lies) they do not show, and it need not slow ours and the reference alike. The
reference witnesses it: its code did not change, so where its own time changed by more than the least that the interval
claims of ours, nothing is claimed. ``--base`` has no such trouble: there old and new take turns.

A verdict needs the whole interval beyond the tolerance; an interval that is wide, or that touches the tolerance, says
"no difference", which means that none was shown.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from .model import OUR_NAMES
from .report import interval
from .speedups import over_reference, round_ratios, time_of
from .timing import Estimate, confidence_of_each, median_interval, rounds_needed

SCHEMA = 1
DEFAULT_TOLERANCE = 3.0
"""Percent."""

TIMED = ("model", "ops", "scaling")
"""Kinds whose documents have times of ours and of a reference, with intervals."""

MACHINE = ("cpu", "gpu", "cores", "threads", "isa", "system", "torch")
"""What changes figures when it differs; the library's own version and revision are what is compared."""

_COUNTS = ("flops", "bytes")
"""Follow from the other fields of a case."""


@dataclass(frozen=True)
class Entry:
    """Ours in one case of one run.

    Attributes:
        kind, case, provider: what it is found by in the other run.
        fields: of the case; two runs compare only where they agree.
        passed: ran and passed parity.
        reason: why it did not.
        ratio: the reference's time over its own; None without both.
        rounds: that of every round; None in a document of an older version.
        reference: the reference's time in milliseconds.
    """

    kind: str
    case: str
    provider: str
    fields: Mapping[str, Any]
    passed: bool
    reason: str
    ratio: Estimate | None
    rounds: Sequence[float] | None
    reference: float | None

    @property
    def name(self) -> str:
        return f"{self.kind} {self.case}, {self.provider}"


@dataclass(frozen=True)
class Change:
    """Of one entry: ``ratio`` is None where no time can be compared, and ``verdict`` says why not."""

    old: Entry
    new: Entry
    ratio: Estimate | None
    verdict: str
    regression: bool


@dataclass(frozen=True)
class Comparison:
    """What two documents say beside each other; ``warnings`` are lines about where they were measured."""

    changes: list[Change] = field(default_factory=list)
    only_old: list[str] = field(default_factory=list)
    only_new: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Nothing became slower beyond the tolerance, and nothing that passed parity fails."""
        return not any(change.regression for change in self.changes)


def verdict(change: Estimate, tolerance: float) -> str:
    """ "faster" or "slower" where the whole interval of ``change`` (a speed over an earlier one) lies more than
    ``tolerance`` percent beyond 1, "no difference" otherwise."""
    bound = 1 + tolerance / 100
    if change.low > bound:
        return "faster"
    return "slower" if change.high < 1 / bound else "no difference"


def too_few(rounds: int, needed: int) -> str:
    """The verdict where an interval would need more rounds than there are."""
    return f"too few rounds to tell: {rounds}, and among so many cases {needed} are needed"


def ratio_of(new: Estimate, old: Estimate) -> Estimate:
    """``new / old`` of two independent figures, from the least that their intervals allow to the most."""
    return Estimate(new.median / old.median, new.low / old.high, new.high / old.low)


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A document that ``--json`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no document of the bench, or one of another schema or without times.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {str(path)!r}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{str(path)!r} is no JSON: {error}") from error
    if not isinstance(document, dict) or "kind" not in document or "schema" not in document:
        raise ValueError(f"{str(path)!r} is no document of beit3-fast bench: it has no schema and kind")
    if document["schema"] != SCHEMA:
        raise ValueError(f"{str(path)!r} has schema {document['schema']!r}, this version reads {SCHEMA}")
    if document["kind"] not in (*TIMED, "all"):
        raise ValueError(f"{str(path)!r} is of kind {document['kind']!r}; only {', '.join(TIMED)} and all have times")
    return document


def entries(document: Mapping[str, Any]) -> Iterator[Entry]:
    """Ours in every case of a document."""
    if document["kind"] == "all":
        for run in document["runs"]:
            yield from entries(run)
    elif document["kind"] == "scaling":
        for curve in document["curves"]:
            for point in curve["points"]:
                fields = {"dtype": curve["dtype"], **{name: point[name] for name in ("tokens", "flops")}}
                name = f"{curve['name']}={point['x']} {curve['dtype']}"
                yield from _entries("scaling", name, fields, point["providers"], "reference")
    elif document["kind"] in TIMED:
        for result in document["results"]:
            case, reference = result["case"], result.get("baseline", "reference")
            yield from _entries(document["kind"], case["name"], case, result["providers"], reference)


def _entries(
    kind: str, case: str, fields: Mapping[str, Any], providers: Sequence[Mapping[str, Any]], reference: str
) -> Iterator[Entry]:
    for provider in providers:
        if provider["name"] not in OUR_NAMES or provider["missing"] is not None:
            continue
        passed = provider["failure"] is None and provider["parity"] == "passed"
        reason = "" if passed else provider["failure"] or provider["reason"] or "parity failed"
        ratio = over_reference(provider, providers, reference)
        rounds = round_ratios(provider, providers, reference)
        time = time_of(reference, providers)
        median = None if time is None else time["median"]
        yield Entry(kind, case, provider["name"], fields, passed, reason, ratio, rounds, median)


def compare(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float = DEFAULT_TOLERANCE) -> Comparison:
    """Ours in ``new`` against ours in ``old``; the module's docstring says how.

    Args:
        old, new: documents of kind model, ops, scaling or all.
        tolerance: percent; at least 0.

    Raises:
        ValueError: a tolerance below 0 or not finite.
    """
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance must be a percentage of at least 0, got {tolerance}")
    before = {entry.name: entry for entry in entries(old)}
    after = {entry.name: entry for entry in entries(new)}
    found = Comparison(
        only_old=[name for name in before if name not in after],
        only_new=[name for name in after if name not in before],
        warnings=_warnings(old, new),
    )
    pairs = []
    for name in before:
        if name not in after:
            continue
        differing = _differing(before[name].fields, after[name].fields)
        if differing:
            found.differing.append(f"{name}: {differing}")
        else:
            pairs.append((before[name], after[name]))
    timed = [pair for pair in pairs if all(entry.passed and entry.ratio for entry in pair)]
    confidence = confidence_of_each(2 * len(timed))
    found.changes.extend(_change(*pair, tolerance, confidence) for pair in pairs)
    unsure = sum(any(entry.rounds is None for entry in pair) for pair in timed)
    if unsure:
        found.warnings.append(
            f"{unsure} of {len(timed)} cases have no time of every round, as documents of older versions: their "
            "intervals are of 95 % each, so among many cases a few verdicts are chance"
        )
    return found


def _change(old: Entry, new: Entry, tolerance: float, confidence: float) -> Change:
    if not new.passed:
        return Change(old, new, None, f"{'now fails' if old.passed else 'failed and fails'}: {new.reason}", old.passed)
    if not old.passed:
        return Change(old, new, None, f"passes now; failed: {old.reason}", False)
    if old.ratio is None or new.ratio is None:
        return Change(old, new, None, "no time of the reference to compare with", False)
    if old.rounds is None or new.rounds is None:
        ratio = ratio_of(new.ratio, old.ratio)
    else:
        few, needed = min(len(old.rounds), len(new.rounds)), rounds_needed(confidence)
        if few < needed:
            return Change(old, new, None, too_few(few, needed), False)
        ratio = ratio_of(median_interval(new.rounds, confidence), median_interval(old.rounds, confidence))
    words = verdict(ratio, tolerance)
    assert old.reference is not None
    assert new.reference is not None
    moved = new.reference / old.reference
    claimed = min(abs(math.log(ratio.low)), abs(math.log(ratio.high)))
    if words != "no difference" and abs(math.log(moved)) >= claimed:
        return Change(old, new, ratio, f"cannot be told: the reference took {moved:.2f}x as long", False)
    return Change(old, new, ratio, words, words == "slower")


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """The fields in which two cases of one name differ, as words; fields that one run does not know are left out."""
    names = [name for name in old if name in new and name not in _COUNTS and old[name] != new[name]]
    return ", ".join(f"{name} {old[name]!r} in the old run, {new[name]!r} in the new one" for name in names)


def _warnings(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What of the machine and the settings differs, one line each, and which run was not completed."""
    lines = [
        f"{name} differs: {before[name]} in the old run, {after[name]} in the new one"
        for before, after, names in (
            (old.get("machine", {}), new.get("machine", {}), MACHINE),
            (old.get("settings", {}), new.get("settings", {}), ("device",)),
        )
        for name in names
        if name in before and name in after and before[name] != after[name]
    ]
    for which, document in (("old", old), ("new", new)):
        if document.get("complete") is False:
            lines.append(f"the {which} run was interrupted: cases are missing")
    return lines


def table(comparison: Comparison, tolerance: float) -> Table:
    """The comparison's changes."""
    shown = Table(
        title=f"ours, new over old; tolerance {tolerance:g} %",
        title_justify="left",
        title_style="bold",
        caption="speed-ups over the reference of each run, and their ratio; above 1 ours became faster\n"
        "intervals so wide that the chance of any false verdict in this table is at most 5 %",
        caption_justify="left",
    )
    for column in ("kind", "case", "provider"):
        shown.add_column(column, overflow="fold")  # two names that are cut off may look the same
    for column in ("old", "new", "change"):
        shown.add_column(column, justify="right")
    shown.add_column("verdict")
    for change in comparison.changes:
        ratios = [entry.ratio if entry.passed else None for entry in (change.old, change.new)]
        shown.add_row(
            change.new.kind,
            change.new.case,
            change.new.provider,
            *("" if ratio is None else f"{ratio.median:.2f}x" for ratio in ratios),
            "" if change.ratio is None else interval(change.ratio),
            styled(change.verdict, change.regression),
        )
    return shown


def styled(words: str, regression: bool) -> Text:
    """A verdict in its colour."""
    return Text(words, style="bold red" if regression else "green" if words == "faster" else "")


def listed(comparison: Comparison) -> list[str]:
    """What stands beside the table: what was not compared, one line each."""
    return [
        *(f"only in the old run: {name}" for name in comparison.only_old),
        *(f"only in the new run: {name}" for name in comparison.only_new),
        *(f"not compared, another case of the same name: {line}" for line in comparison.differing),
    ]
