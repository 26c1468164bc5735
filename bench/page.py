"""The HTML report: one file that needs nothing else, made from benchmark documents.

It takes the JSON of ``bench model``, ``ops``, ``memory``, ``scaling`` and ``breakdown``, and of ``bench all``, which
holds several of them. page.html has the page's structure and style, page_sections.py the charts and tables of each
kind, and charts.py draws; here is what stands above them: what was measured on, what went wrong, and the summary.
A provider without passed parity gets no time, whatever its document says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import charts, page_sections
from .charts import LogAxis
from .files import replacing
from .page_parts import (
    REFERENCE,
    Block,
    Cell,
    Entry,
    Table,
    describe,
    describe_op,
    entries_of,
    flop_rate,
    is_ours,
    our_best,
    ratio_of,
    results_of,
    timed_of,
)
from .report import SCHEMA, count
from .timing import Estimate

KINDS = ("model", "ops", "scaling", "breakdown", "memory")
TITLES = {
    "model": "Models",
    "ops": "Operations",
    "scaling": "Scaling",
    "breakdown": "Time by operation",
    "memory": "Memory",
}


@dataclass(frozen=True)
class Section:
    """A part of the page, all that is known of one kind."""

    kind: str
    title: str
    blocks: Sequence[Block]


def render(documents: Sequence[Mapping[str, Any]]) -> str:
    """The report as HTML.

    Args:
        documents: of the kinds ``KINDS`` or "all", in any order; none at all gives a page that says so.

    Raises:
        ValueError: a document of another kind or schema.
    """
    runs = list(_runs(documents))
    of_kind = {kind: [run for run in runs if run["kind"] == kind] for kind in KINDS}
    blocks = {
        "model": page_sections.models(of_kind["model"]),
        "ops": page_sections.ops(of_kind["ops"]),
        "scaling": page_sections.scaling(of_kind["scaling"]),
        "breakdown": page_sections.breakdown(of_kind["breakdown"]),
        "memory": page_sections.memory(of_kind["memory"], of_kind["model"]),
    }
    sections = [Section(kind, TITLES[kind], blocks[kind]) for kind in KINDS if blocks[kind]]
    problems = _problems(runs)
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template("page.html")
    interrupted = [
        TITLES.get(document["kind"], "the whole run").lower()
        for document in (*documents, *runs)
        if not document.get("complete", True)
    ]
    return template.render(
        facts=_facts(runs),
        interrupted=list(dict.fromkeys(interrupted)),
        wrong=[row for row in problems if row[3]],
        failed=[row for row in problems if not row[3]],
        not_run=[
            (f"bench {kind['kind']}", kind["reason"]) for document in documents for kind in document.get("not_run", ())
        ],
        summary=_model_summary(of_kind["model"]),
        op_summary=_op_summary(of_kind["ops"]),
        op_line=_op_line(of_kind["ops"]),
        sections=sections,
        schema=SCHEMA,
    )


def write(path: Path, documents: Sequence[Mapping[str, Any]]) -> None:
    """Writes the report, replacing the file in one step.

    Raises:
        ValueError: as :func:`render`; the file is then left alone.
    """
    text = render(documents)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ---- what stands above the sections ----


def _runs(documents: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for document in documents:
        kind, schema = document.get("kind"), document.get("schema", SCHEMA)
        if schema != SCHEMA:
            raise ValueError(f"documents must be of schema {SCHEMA}, got schema {schema!r} of kind {kind!r}")
        if kind == "all":
            about = {name: document[name] for name in ("machine", "settings") if name in document}
            yield from _runs({**about, **run} for run in document.get("runs", ()))
        elif kind in KINDS:
            yield document
        else:
            raise ValueError(f"documents must be of kind all, {', '.join(KINDS)}, got kind {kind!r}")


def _facts(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """What the runs were made with; where they differ, every value with the kinds that it holds for."""
    lines: dict[str, dict[str, list[str]]] = {name: {} for name in ("Machine", "Software", "Method", "Measured roofs")}
    for run in runs:
        about = run.get("machine")
        said = {"Method": _method(run), "Measured roofs": _roofs(run.get("roofs") or {})}
        if about:
            cores = f"{count(about['cores'], 'core')}, {count(about['threads'], 'thread')}, {about['isa']}"
            said["Machine"] = ", ".join(filter(None, [about["gpu"], about["cpu"], cores]))
            revision = f" ({about['git_revision']})" if about["git_revision"] else ""
            said["Software"] = (
                f"beit3_fast {about['beit3_fast']}{revision}, torch {about['torch']}, Python {about['python']}, "
                f"{about['system']}"
            )
        for name, line in said.items():
            if line and run["kind"] not in lines[name].setdefault(line, []):
                lines[name][line].append(run["kind"])
    return [
        (name, [f"{', '.join(kinds)}: {line}" if len(found) > 1 else line for line, kinds in found.items()])
        for name, found in lines.items()
        if found
    ]


def _method(run: Mapping[str, Any]) -> str:
    settings = run.get("settings") or {}
    place = f" on {settings['device']}" if "device" in settings else ""
    if run["kind"] == "breakdown" and "forwards" in settings:
        return f"medians of {count(settings['forwards'], 'profiled forward')}{place}"
    if run["kind"] == "memory" or "rounds" not in settings:
        return ""
    return f"{count(settings['rounds'], 'interleaved round')}{place}; medians, 95 % intervals"


def _roofs(roofs: Mapping[str, Any]) -> str:
    parts = [f"memory {roofs['bandwidth_gb_s']:,.3g} GB/s"] if roofs.get("bandwidth_gb_s") else []
    peaks, rates = roofs.get("peak_gflop_s") or {}, []
    for dtype, rate in (roofs.get("matrix_gflop_s") or {}).items():
        above = f" (peak {flop_rate(peaks[dtype]['all'])})" if dtype in peaks else ""
        rates.append(f"{flop_rate(rate)} in {dtype}{above}")
    parts += [f"matrix products {', '.join(rates)}"] if rates else []
    return "; ".join([*parts, *([roofs["probe"]] if parts and roofs.get("probe") else [])])


def _problems(runs: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, bool]]:
    """Case, provider, what happened, and whether that is a wrong result."""
    found = []
    for run in runs:
        for where, entries in _outcomes(run):
            found += [(where, e.name, e.failure or e.reason or "", e.wrong) for e in entries if e.problem is not None]
    return found


def _outcomes(run: Mapping[str, Any]) -> Iterator[tuple[str, list[Entry]]]:
    if run["kind"] in ("model", "ops", "breakdown"):
        for result in run.get("results", ()):
            what = " (time by operation)" if run["kind"] == "breakdown" else ""
            yield result["case"]["name"] + what, entries_of(result)
    if run["kind"] == "scaling":
        for curve in run.get("curves", ()):
            for point in curve["points"]:
                yield f"{curve['axis']} {point['x']:g}, {curve['dtype']}", entries_of(point)


@dataclass(frozen=True)
class Line:
    """A row of a summary: ours against the reference and against the best of the others."""

    case: str
    about: str
    entries: Sequence[Entry]
    skipped: str | None
    ours: str | None
    against_reference: tuple[str, Estimate] | None
    against_best: tuple[str, Estimate] | None


def _model_summary(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    lines = []
    for result in results_of(runs):
        entries = entries_of(result)
        ratios = {e.name: ratio_of(e, "ours_faster") for e in entries}
        against = [
            (name, ratio) if name is not None and (ratio := ratios.get(name)) is not None else None
            for name in (result.get("baseline"), result.get("best_other"))
        ]
        case, ours = result["case"], our_best(entries, result.get("ours"))
        lines.append(Line(case["name"], describe(case), entries, result.get("skipped"), ours, *against))
    return _summary(lines)


def _op_summary(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    return _summary([_op_line_of(result) for result in results_of(runs)])


def _op_line_of(result: Mapping[str, Any]) -> Line:
    entries = entries_of(result)
    others = [e for e, _ in timed_of(entries) if not is_ours(e.name)]
    ratios = [(e.name, ratio) for e in others if (ratio := ratio_of(e, "speedup")) is not None]
    reference = next((pair for pair in ratios if pair[0] == REFERENCE), None)
    best = ratios[0] if ratios else None
    case = result["case"]
    return Line(case["name"], describe_op(case), entries, result.get("skipped"), our_best(entries), reference, best)


def _op_line(runs: Sequence[Mapping[str, Any]]) -> str:
    """The ops in a sentence."""
    lines = [line for line in map(_op_line_of, results_of(runs)) if line.skipped is None]
    if not lines:
        return ""
    right = sum(any(is_ours(e.name) and e.parity == "passed" for e in line.entries) for line in lines)
    compared = [line.against_best[1] for line in lines if line.against_best is not None]
    ahead, behind = sum(ratio.low > 1 for ratio in compared), sum(ratio.high < 1 for ratio in compared)
    return (
        f"Ours passes parity in {right} of {count(len(lines), 'op case')}. Against the fastest other in each, it is "
        f"faster in {ahead}, slower in {behind}, and within the interval of equal speed in "
        f"{len(compared) - ahead - behind}."
    )


def _summary(lines: Sequence[Line]) -> Table | None:
    if not lines:
        return None
    ratios = [pair[1] for line in lines for pair in (line.against_reference, line.against_best) if pair is not None]
    # medians decide the scale: one noisy interval is cut off
    axis = LogAxis([1.0, *(ratio.median for ratio in ratios)], 1.6)
    rows = []
    for line in lines:
        row = [Cell(line.case, note=line.about, heads=True)]
        if line.skipped is not None:
            rows.append([*row, Cell(f"skipped: {line.skipped}", "missing", columns=3)])
            continue
        wrong = [e.name for e in line.entries if e.wrong]
        crashed = [e.name for e in line.entries if e.failure is not None]
        ran = [e for e in line.entries if e.parity is not None]
        if wrong:
            row.append(Cell("FAILED", "failed", ", ".join(wrong)))
        elif crashed:
            row.append(Cell("did not run", "failed", ", ".join(crashed)))
        else:
            row.append(Cell(f"{len(ran)} passed" if ran else "none", "passed" if ran else "missing"))
        for pair in (line.against_reference, line.against_best):
            if line.ours is None:
                row.append(Cell("none", "failed"))
            elif pair is None:
                row.append(Cell("not measured", "missing"))
            else:
                name, ratio = pair
                style = "faster" if ratio.low > 1 else "slower" if ratio.high < 1 else ""
                track = charts.interval_track(axis, ratio.median, ratio.low, ratio.high)
                note = f"[{ratio.low:.2f}, {ratio.high:.2f}]\n{name}"
                row.append(Cell(f"{ratio.median:.2f}x", f"ratio {style}", note, drawn=track))
        rows.append(row)
    caption = (
        "How much faster ours is, with the 95 % interval of the ratio; the line marks 1x, equal speed. "
        "The best other is the fastest one that computes in the case's dtype."
    )
    return Table(caption, ("case", "parity", "against the reference", "against the best other"), rows, "summary")
