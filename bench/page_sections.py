"""The sections of the HTML report, one a kind of document: its charts, and the tables with their numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from . import charts
from .charts import Bar, Guide, Part, Point, Series
from .page_parts import (
    REFERENCE,
    Block,
    Cell,
    Entry,
    Figure,
    Table,
    describe,
    describe_op,
    entries_of,
    error_cells,
    flop_rate,
    in_ms,
    is_ours,
    our_best,
    parity_cell,
    parity_first,
    percent,
    ratio_cell,
    ratio_of,
    results_of,
    role,
    size_of,
    time_cell,
    timed_of,
)
from .report import interval
from .timing import Estimate

Run = Mapping[str, Any]
"""A benchmark document."""

PEER_COLOURS = 7
PARTS = (
    "matrix products",
    "matrix products with bias, GELU, residual",
    "attention",
    "LayerNorm",
    "GELU",
    "residual and other elementwise",
    "embedding",
    "copies",
    "Python between ops",
    "other",
)
"""Each has a colour of its own, in this order; parts of other names share them."""
OP_MARKS = {"multiway_linear": "circle", "multiway_ffn": "square", "attention": "triangle"}


# ---- models ----


def models(runs: Sequence[Run]) -> list[Block]:
    """``bench model``: a block a case."""
    return [_model_block(result) for result in results_of(runs)]


def _model_block(result: Mapping[str, Any]) -> Block:
    case, entries, baseline = result["case"], entries_of(result), result.get("baseline") or REFERENCE
    if result.get("skipped") is not None:
        return Block(case["name"], describe(case), skipped=result["skipped"])
    rows = []
    for entry, _ in timed_of(entries):
        ratio = ratio_of(entry, "speedup")
        if ratio is not None:
            rows.append(Bar(entry.name, ratio.median, interval(ratio), entry.colour, ratio.low, ratio.high))
        elif entry.name == baseline:
            rows.append(Bar(entry.name, 1.0, entry.milliseconds, entry.colour))
    figures = []
    if any(row.low is not None for row in rows):
        title = f"Speed-up over {baseline}"
        figures.append(Figure(title, "longer is faster; the line is 1x", charts.bars(rows, title, mark=1.0)))
    elif rows := [_time_bar(*pair) for pair in timed_of(entries)]:
        figures.append(Figure("Time", "shorter is better", charts.bars(rows, "Time in milliseconds")))
    return Block(case["name"], describe(case), figures, [_model_table(result, entries)], notes=_model_notes(result))


def _time_bar(entry: Entry, time: Estimate) -> Bar:
    return Bar(entry.name, time.median, entry.milliseconds, entry.colour, time.low, time.high)


def _model_table(result: Mapping[str, Any], entries: Sequence[Entry]) -> Table:
    with_roof = any(e.raw.get("roof") is not None for e in entries)
    with_memory = any(e.raw.get("memory") for e in entries)
    head = ["provider", "parity", "max error", "rms error", "time", *["of roof"] * with_roof]
    head += [*["peak memory"] * with_memory, "speed-up", "ours is faster by"]
    rows = []
    for entry in sorted(entries, key=parity_first):
        row = [Cell(entry.name, entry.colour, heads=True)]
        if entry.problem is None and entry.parity is None:
            rows.append([*row, Cell(entry.left_out, "missing", columns=len(head) - 1)])
            continue
        row += [parity_cell(entry), *error_cells(entry.raw.get("error"), ("maximum", "rms"))]
        if entry.time is None:
            rows.append([*row, Cell("none", "missing" if entry.problem is None else "failed", columns=len(head) - 4)])
            continue
        row.append(time_cell(entry.time))
        if with_roof:
            row.append(Cell(percent(entry.raw.get("roof")), "number"))
        if with_memory:
            memory = entry.raw.get("memory")
            row.append(Cell(size_of(memory["peak"]) if memory else "", "number"))
        rows.append([*row, *(ratio_cell(ratio_of(entry, name)) for name in ("speedup", "ours_faster"))])
    return Table(f"{result['case']['name']}: parity first, then time", head, rows)


def _model_notes(result: Mapping[str, Any]) -> list[str]:
    truth = result["case"].get("truth")
    notes = [f"Errors against reference PyTorch in {truth}, relative to its size."] if truth else []
    if result.get("flops"):
        work = f"{result['flops'] / 1e9:,.4g} GFLOP of useful products"
        notes.append(f"Of roof: {work} over the machine's own rate in the provider's dtype.")
    return notes


# ---- ops ----


def ops(runs: Sequence[Run]) -> list[Block]:
    """``bench ops``: the rooflines, then a block an op."""
    rooflines = [figure for run in runs for figure in _rooflines(run)]
    blocks = []
    if rooflines:
        about = (
            "Achieved rate against arithmetic intensity: matrix-product FLOPs over compulsory bytes. The lines are the "
            "machine's own roofs, measured. Cases that fit in a cache may rise above the memory roof. Normalization "
            "multiplies no matrices and is left out here; its share of the memory roof is in its table."
        )
        blocks.append(Block("Roofline", about, rooflines))
    by_op: dict[str, list[Mapping[str, Any]]] = {}
    for result in results_of(runs):
        by_op.setdefault(result["case"]["op"], []).append(result)
    for op, results in by_op.items():
        about = "Speed, ours = 1: longer is faster, with the 95 % interval of the ratio to ours; beside it the time."
        figures, tables = [_op_figure(result) for result in results], [_op_table(op, results)]
        blocks.append(Block(op, about, figures, tables, folded=f"Parity, errors, times and roofs of {op}"))
    return blocks


def _op_figure(result: Mapping[str, Any]) -> Figure:
    case, entries = result["case"], entries_of(result)
    title, remarks = f"Speed of {case['name']}", []
    if result.get("skipped") is not None:
        remarks.append(("missing", f"skipped: {result['skipped']}"))
    remarks += [("failed", f"{e.name}: {e.problem}") for e in entries if e.problem is not None]
    missing = [e.name for e in entries if e.problem is None and e.missing is not None]
    if missing:
        remarks.append(("missing", f"not run: {', '.join(missing)}"))
    rows, relative = [], our_best(entries) is not None
    for entry, time in timed_of(entries):
        ratio = ratio_of(entry, "speedup")
        if is_ours(entry.name):
            rows.append(Bar(entry.name, 1.0, entry.milliseconds, entry.colour))
        elif ratio is not None:
            speed, low, high = 1 / ratio.median, 1 / ratio.high, 1 / ratio.low
            digits = ".2f" if speed >= 0.1 else ".1g"
            text = f"{speed:{digits}}x, {entry.milliseconds}"
            rows.append(Bar(entry.name, speed, text, entry.colour, low, high))
        elif not relative:
            rows.append(_time_bar(entry, time))
    if not relative:
        title = f"Time of {case['name']}, shorter is better"
    chart = charts.bars(rows, title, mark=1.0 if relative else None) if rows else Markup()
    return Figure(case["name"], describe_op(case), chart, remarks=remarks)


def _op_table(op: str, results: Sequence[Mapping[str, Any]]) -> Table:
    head = ("case", "provider", "parity", "max error", "time", "of roof", "ours is faster by")
    rows: list[list[Cell]] = []
    for result in results:
        entries = sorted(entries_of(result), key=parity_first)
        first = [Cell(result["case"]["name"], "", describe_op(result["case"]), rows=max(1, len(entries)), heads=True)]
        if not entries:
            rows.append([*first, Cell(f"skipped: {result.get('skipped')}", "missing", columns=len(head) - 1)])
        for entry in entries:
            rows.append([*first, *_op_cells(entry, len(head))])
            first = []
    return Table(f"{op}: parity first, then time", head, rows)


def _op_cells(entry: Entry, columns: int) -> list[Cell]:
    row = [Cell(entry.name, entry.colour, heads=True)]
    if entry.problem is None and entry.parity is None:
        return [*row, Cell(entry.left_out, "missing", columns=columns - 2)]
    errors = [error["maximum"] for error in (entry.raw.get("errors") or {}).values() if error is not None]
    row += [parity_cell(entry), Cell(f"{max(errors):.1e}" if errors else "", "number")]
    if entry.time is None:
        return [*row, Cell("none", "missing" if entry.problem is None else "failed", columns=columns - 4)]
    roof = entry.raw.get("roof") or {}
    share = Cell(percent(roof.get("share")), "number", roof.get("bound", ""))
    return [*row, time_cell(entry.time), share, ratio_cell(ratio_of(entry, "speedup"))]


def _rooflines(run: Mapping[str, Any]) -> Iterator[Figure]:
    roofs = run.get("roofs") or {}
    bandwidth, matrix = roofs.get("bandwidth_gb_s"), roofs.get("matrix_gflop_s") or {}
    timed = [
        (result["case"], entry, time)
        for result in run.get("results", ())
        if result["case"]["flops"]
        for entry, time in timed_of(entries_of(result))
    ]
    colours = _colours(entry.name for _, entry, _ in timed)
    for dtype, roof in matrix.items():
        series: dict[tuple[str, str, bool], list[Point]] = {}
        for case, entry, time in timed:
            if case["dtype"] != dtype:
                continue
            rate = case["flops"] / time.median / 1e6
            intensity = case["flops"] / case["bytes"]
            text = f"{case['name']}, {entry.name}: {flop_rate(rate)}, {entry.milliseconds}"
            key = (entry.name, case["op"], case["direction"] == "backward")
            series.setdefault(key, []).append(Point(intensity, rate, text))
        if not series or bandwidth is None:
            continue
        points = [point for found in series.values() for point in found]
        # ours last, so that its marks lie on top
        shown = [
            Series(name, found, colours[name], OP_MARKS.get(op, "diamond"), hollow, joined=False)
            for (name, op, hollow), found in sorted(series.items(), key=lambda item: is_ours(item[0][0]))
        ]
        ridge = roof / bandwidth
        left = min([ridge / 4, *(point.x for point in points)]) / 1.5
        right = max([ridge * 4, *(point.x for point in points)]) * 1.5
        floor = min(point.y for point in points) / 1.5
        left = min(max(left, floor / bandwidth), ridge)
        guides = [
            Guide([(left, left * bandwidth), (ridge, roof)], f"{bandwidth:,.3g} GB/s"),
            Guide([(ridge, roof), (right, roof)], flop_rate(roof), at_end=True),
        ]
        best = max((p.y for key, found in series.items() for p in found if is_ours(key[0])), default=None)
        reached = "" if best is None else f"; the best of ours is {flop_rate(best)}"
        names = ", ".join(dict.fromkeys(key[0] for key in series))
        label = (
            f"Roofline in {dtype}: {len(points)} marks of {names} under roofs of {bandwidth:,.3g} GB/s and "
            f"{flop_rate(roof)}{reached}. The tables of the ops have every number."
        )
        legend = [
            (charts.swatch(colour), name) for name, colour in colours.items() if any(k[0] == name for k in series)
        ]
        legend += [
            (charts.swatch("plain", mark), op.removeprefix("multiway_"))
            for op, mark in OP_MARKS.items()
            if any(key[1] == op for key in series)
        ]
        if any(key[2] for key in series):
            legend.append((charts.swatch("plain", "circle", hollow=True), "hollow: backward"))
        yield Figure(dtype, "", charts.log_log(shown, guides, label=label), legend, "GFLOP/s", "FLOP/byte")


def _colours(names: Iterable[str]) -> dict[str, str]:
    """A class for each provider of a chart in which colour tells them apart."""
    colours: dict[str, str] = {}
    peers = 0
    for name in dict.fromkeys(names):
        if is_ours(name):
            colours[name] = "ours" if "ours" not in colours.values() else "ours-too"
        elif name == REFERENCE:
            colours[name] = "reference"
        else:
            colours[name] = f"peer-{peers % PEER_COLOURS + 1}"
            peers += 1
    return colours


# ---- scaling ----


def scaling(runs: Sequence[Run]) -> list[Block]:
    """``bench scaling``: a block a dtype, a chart a curve."""
    curves = [curve for run in runs for curve in run.get("curves", ())]
    colours = _colours(name for curve in curves for name in _names(curve))
    by_dtype: dict[str, list[Mapping[str, Any]]] = {}
    for curve in curves:
        by_dtype.setdefault(curve["dtype"], []).append(curve)
    about = (
        "Time on logarithmic axes, with 95 % intervals. The thin line starts where ours does and grows as the FLOPs "
        "do; k is the exponent of time ~ FLOPs^k."
    )
    blocks = []
    for dtype, alike in by_dtype.items():
        figures = [figure for curve in alike if (figure := _curve(curve, colours)) is not None]
        folded = "Parity and times" if figures else ""
        blocks.append(Block(dtype, about, figures, [_curve_table(curve) for curve in alike], folded))
    return blocks


def _names(curve: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(raw["name"] for point in curve["points"] for raw in point["providers"]))


def _title(curve: Mapping[str, Any]) -> str:
    """What grows, without its unit."""
    return curve["axis"].partition(" (")[0].capitalize()


def _curve(curve: Mapping[str, Any], colours: Mapping[str, str]) -> Figure | None:
    points = sorted((point for point in curve["points"] if point["x"] > 0), key=lambda point: point["x"])
    lines: dict[str, list[Point | None]] = {name: [] for name in _names(curve)}
    for point in points:
        times = {entry.name: time for entry, time in timed_of(entries_of(point))}
        for name, line in lines.items():
            time = times.get(name)
            if time is None:
                line.append(None)
            else:
                text = f"{name}, {curve['axis']} {point['x']:g}: {in_ms(time.median)}"
                line.append(Point(point["x"], time.median, text, time.low, time.high))
    lines = {name: line for name, line in lines.items() if any(line)}
    if not lines:
        return None
    marks = list(charts.MARKS)
    series = [
        Series(name, line, colours[name], marks[place % len(marks)]) for place, (name, line) in enumerate(lines.items())
    ]
    spoken = []
    for one in series:
        drawn = [point for point in one.points if point is not None]
        ends = [f"{in_ms(point.y)} at {point.x:g}" for point in (drawn[0], drawn[-1])]
        spoken.append(f"{one.name} from {ends[0]} to {ends[1]}")
    exponents = curve.get("exponents") or {}
    fitted = {name: f", k = {k:.2f}" for name, k in exponents.items() if k is not None}
    legend = [(charts.swatch(one.colour, one.mark), one.name + fitted.get(one.name, "")) for one in series]
    guide = _growth(points, next((one for one in series if is_ours(one.name)), series[0]))
    if guide is not None:
        legend.append((Markup('<span class="rule" aria-hidden="true"></span>'), "as the FLOPs grow"))
    chart = charts.log_log(
        sorted(series, key=lambda one: is_ours(one.name)),  # ours on top
        [guide] if guide else [],
        label=f"{curve['title']}, {curve['dtype']}: time over {curve['axis']}. {'; '.join(spoken)}.",
        x_ticks=[point["x"] for point in points],
    )
    return Figure(_title(curve), curve["title"], chart, legend, "ms", curve["axis"])


def _growth(points: Sequence[Mapping[str, Any]], anchor: Series) -> Guide | None:
    """The anchor's first time, grown as the FLOPs grow."""
    start = next(point for point in anchor.points if point is not None)
    flops: dict[float, float] = {point["x"]: point.get("flops") or 0 for point in points if point["x"] >= start.x}
    if len(flops) < 2 or not all(flops.values()):
        return None
    return Guide([(x, start.y * work / flops[start.x]) for x, work in flops.items()])


def _curve_table(curve: Mapping[str, Any]) -> Table:
    names, rows = _names(curve), []
    for point in curve["points"]:
        found = {entry.name: entry for entry in entries_of(point)}
        work = point.get("flops")
        row = [Cell(f"{point['x']:g}", heads=True), Cell("" if work is None else f"{work / 1e9:,.3g}", "number")]
        if point.get("skipped") is not None:
            rows.append([*row, Cell(f"skipped: {point['skipped']}", "missing", columns=max(1, len(names)))])
            continue
        for name in names:
            entry = found.get(name)
            if entry is None:
                row.append(Cell())
            elif entry.time is not None:
                row.append(time_cell(entry.time))
            elif entry.problem is not None:
                row.append(Cell("none", "failed", entry.problem))
            else:
                row.append(Cell("none", "missing", entry.left_out))
        rows.append(row)
    caption = f"{_title(curve)}: {curve['title']}, {curve['dtype']}; time of a forward"
    return Table(caption, (curve["axis"], "GFLOP", *names), rows, "")


# ---- time by operation ----


def breakdown(runs: Sequence[Run]) -> list[Block]:
    """``bench breakdown``: a block a case."""
    results = list(results_of(runs))
    seen = [name for result in results for entry in entries_of(result) for name in _parts(entry)]
    names = [name for name in PARTS if name in seen]
    names += [name for name in dict.fromkeys(seen) if name not in PARTS]
    places = {name: PARTS.index(name) if name in PARTS else place for place, name in enumerate(names)}
    colours = {name: f"part-{place % len(PARTS) + 1}" for name, place in places.items()}
    return [_breakdown_block(result, colours) for result in results]


def _parts(entry: Entry) -> dict[str, float]:
    """Milliseconds by part; none without passed parity."""
    if entry.problem is not None:
        return {}
    return {part["name"]: part["ms"] for part in entry.raw.get("parts") or () if part["ms"] > 0}


def _breakdown_block(result: Mapping[str, Any], colours: Mapping[str, str]) -> Block:
    title, entries = f"Time by operation of {result['case']['name']}", entries_of(result)
    columns = [(entry, parts, sum(parts.values())) for entry in entries if (parts := _parts(entry))]
    bars = [
        (
            entry.name,
            in_ms(total),
            [Part(name, parts[name], in_ms(parts[name]), colours[name]) for name in colours if name in parts],
        )
        for entry, parts, total in columns
    ]
    rows = []
    for name in colours:
        cells = [
            Cell(in_ms(parts[name]), "number", percent(parts[name] / total)) if name in parts else Cell()
            for _, parts, total in columns
        ]
        if any(cell.text for cell in cells):
            rows.append([Cell(name, heads=True), *cells])
    if columns:
        rows.append([Cell("sum", heads=True), *(Cell(in_ms(total), "number") for *_, total in columns)])
    for entry in entries:
        if not _parts(entry):
            style = "missing" if entry.problem is None else "failed"
            why = Cell(entry.problem or entry.left_out, style, columns=max(1, len(columns)))
            rows.append([Cell(entry.name, heads=True), why])
    legend = [(charts.swatch(colour), name) for name, colour in colours.items()]
    figures = []
    if bars:
        figures.append(Figure("Where the time goes", "all bars on one scale", charts.stacked(bars, title), legend))
    tables = [Table(title, ("part", *(entry.name for entry, *_ in columns)), rows)] if rows else []
    skipped = result.get("skipped") or ""
    return Block(result["case"]["name"], describe(result["case"]), figures, tables, skipped=skipped)


# ---- memory ----


def memory(runs: Sequence[Run], training: Sequence[Run]) -> list[Block]:
    """``bench memory``, after the training steps' peaks in the documents of ``bench model``."""
    blocks = []
    for result in results_of(training):
        sizes = {raw["name"]: raw["memory"] for raw in result.get("providers", ()) if raw.get("memory")}
        if not sizes:
            continue
        rows = [Bar(name, memory["peak"], size_of(memory["peak"]), role(name)) for name, memory in sizes.items()]
        held = min(memory["held"] for memory in sizes.values())
        about = f"shorter is better; {size_of(held)} of it are weights, gradients and Adam's moments"
        figure = Figure("Peak memory of a training step", about, charts.bars(rows, "Peak memory of a training step"))
        blocks.append(Block(result["case"]["name"], describe(result["case"]), [figure]))
    results = list(results_of(runs))
    if results:
        about = (
            "What one layer allocates in a training step for its activations, computed from shapes; weights and their "
            "gradients are left out. Shorter is better."
        )
        figures = [_memory_figure(result) for result in results]
        blocks.append(Block("One layer's training step", about, figures, [_memory_table(results)]))
    return blocks


def _memory_figure(result: Mapping[str, Any]) -> Figure:
    case = result["case"]
    rows = [
        Bar(f"{what}, {name}", size, size_of(size), "ours" if name == "ours" else "reference")
        for key, what in (("kept", "kept for backward"), ("peak", "peak"))
        for name in ("public", "ours")
        for size in [result[name][key]]
    ]
    tokens = f"{case['vision_tokens']} + {case['text_tokens']} tokens, {case['dtype']}"
    title = f"{case['name']}, {result['part']}"
    return Figure(title, tokens, charts.bars(rows, f"Memory of {title}"))


def _memory_table(results: Sequence[Mapping[str, Any]]) -> Table:
    head = ("case", "part", "kept: public", "kept: ours", "less by", "peak: public", "peak: ours", "less by")
    rows = []
    for result in results:
        row = [Cell(result["case"]["name"], heads=True), Cell(result["part"])]
        for key in ("kept", "peak"):
            public, ours = result["public"][key], result["ours"][key]
            ratio = f"{public / ours:.1f}x" if ours else ""
            row += [Cell(text, "number") for text in (size_of(public), size_of(ours), ratio)]
        rows.append(row)
    return Table("Memory of one layer's training step", head, rows)
