"""The report as text: tables of what was found, worth most first, in fewer characters than a terminal keeps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .plan import Section
from .record import Line

LONGEST = 11_600
"""Characters: what keeps the last 12,000 of what a command prints keeps all of it, and a few lines behind it."""
LISTED = 12
"""Failures of a kind that are listed; the others are counted."""

Row = Sequence[object]


def summary(lines: Sequence[Line], sections: Sequence[Section]) -> str:
    """All tables, and as far as there is room: what does not fit is cut off at the end, where it is worth least."""
    found = Figures(lines)
    parts = [_header(found), _ends(found, sections)]
    parts += [part(found) for part in PARTS]
    text = "\n".join(part for part in parts if part)
    if len(text) >= LONGEST:
        kept = text[: LONGEST - 60]
        text = kept[: kept.rfind("\n")] + "\n... cut off here; everything is in results.jsonl\n"
    return text


class Figures:
    """Lines by section and figure."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._lines = list(lines)

    def lines(self, section: str, figure: str) -> list[Line]:
        return [line for line in self._lines if (line["section"], line["figure"]) == (section, figure)]

    def of(self, section: str, figure: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(case, values) of those that have values."""
        return [(line["case"], line["values"]) for line in self.lines(section, figure) if "values" in line]

    def one(self, section: str, figure: str) -> dict[str, Any]:
        """The values of the only one; empty if there is none."""
        return next((values for _, values in self.of(section, figure)), {})

    def without(self, kind: str) -> list[Line]:
        """Those that are "missing" or "failed"."""
        return [line for line in self._lines if kind in line]


def _header(found: Figures) -> str:
    gpu, software = found.one("environment", "gpu"), found.one("environment", "software")
    card = gpu.get("name", "no GPU: a dry run on tiny shapes, whose figures mean nothing")
    details = [f"driver {gpu['driver_version']}"] if gpu.get("driver_version") else []
    details += [f"{name} {software[name]}" for name in ("torch", "triton", "cuda", "ptxas") if software.get(name)]
    details += [f"Triton's ptxas {software[name]}" for name in ("Triton's ptxas",) if software.get(name)]
    if software.get("revision"):
        details.append(f"revision {software['revision']}")
    library = found.one("environment", "library")
    if library:
        loaded = library.get("cuda loaded")
        details.append("CUDA library loaded" if loaded else f"CUDA library not loaded: {library.get('cuda reason')}")
    return f"== GPU report: {card} ==\n{', '.join(details)}\n"


def _ends(found: Figures, sections: Sequence[Section]) -> str:
    """How each section and background task ended, in a line or two."""
    words = []
    for section in sections:
        for line in found.lines(section.name, "section"):
            if "values" in line:
                words.append(f"{section.name} {line['values']['seconds']:.0f} s")
            else:
                words.append(f"{section.name.upper()}: {line.get('failed') or 'not run, ' + line['missing']}")
    for name in ("library", "warm", "compile", "end"):
        for line in found.lines("report", name):
            said = f"{line['values']['seconds']:.0f} s" if "values" in line else line.get("failed")
            words.append(f"({'all' if name == 'end' else name}: {said})")
    return "sections: " + ", ".join(words) + "\n"


# ---- tables ----


def _tests(found: Figures) -> str:
    lines = found.lines("tests", "test")
    if not lines:
        return ""
    counted = Counter(line["values"]["outcome"] if "values" in line else "failed" for line in lines)
    rows = [f"  {line['case']['name']}: {line['failed'][:140]}" for line in lines if "failed" in line]
    skipped = Counter(
        line["values"].get("reason", "")[:100] for line in lines if line.get("values", {}).get("outcome") == "skipped"
    )
    rows = _first(rows) + [f"  skipped {count}: {reason}" for reason, count in skipped.most_common(4)]
    title = ", ".join(f"{counted[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    return "\n".join([f"-- tests: {title}", *rows, ""])


def _parity(found: Figures) -> str:
    parts = []
    for figure, words in (("parity", "within the rule"), ("repeats", "the same bits every time")):
        lines = found.lines("parity", figure)
        if not lines:
            continue
        good = [line for line in lines if line.get("values", {}).get("ok")]
        rows = []
        for line in lines:
            if line in good:
                continue
            said = line.get("failed") or line.get("missing") or line["values"].get("reason") or str(line["values"])
            rows.append(f"  {_words(line['case'])}: {said[:150]}")
        worst = max((line["values"].get("error", 0) or 0 for line in good), default=0)
        tail = f", largest error {worst:.1e}" if figure == "parity" else ""
        parts += [f"-- {figure}: {len(good)} of {len(lines)} {words}{tail}", *_first(rows)]
    return "\n".join([*parts, ""]) if parts else ""


def _roofs(found: Figures) -> str:
    copy = found.one("roofs", "copy")
    products = {case["kind"]: values["tflop_s"] for case, values in found.of("roofs", "product")}
    words = [f"copy {copy['gb_s']:.0f} GB/s"] if copy else []
    words += [f"{kind} {rate:.4g} TFLOP/s" for kind, rate in products.items()]
    return f"-- roofs: {', '.join(words)}\n" if words else ""


def _inference(found: Figures) -> str:
    wrong = [
        f"  parity of {_words(case)}: error {values['error']}"
        for case, values in found.of("inference", "parity")
        if not values["ok"]
    ]
    providers = ["ours", "optimized", "SDPA", "reference", "timm"]
    times: dict[tuple[Any, ...], dict[tuple[str, str], float]] = {}
    for case, values in found.of("inference", "forward"):
        key = case["model"], case["batch"], case["texts"]
        times.setdefault(key, {})[case["by"], case["mode"]] = values["ms"]
    compiled = {
        (case["batch"], case["by"], case["mode"]): values["ms"] for case, values in found.of("compiled", "forward")
    }
    for batch in dict.fromkeys(batch for batch, _, _ in compiled):
        times.setdefault(("base", batch, "padded"), {})
    rows = []
    for (model, batch, texts), by in times.items():
        row = [model, batch, texts]
        row += [f"{_number(by.get((p, 'captured')))} / {_number(by.get((p, 'eager')))}" for p in providers]
        for provider in ("SDPA", "ours"):
            known = (model, texts) == ("base", "padded")
            modes = (
                compiled.get((batch, provider, mode)) if known else None for mode in ("default", "reduce-overhead")
            )
            row.append(" / ".join(map(_number, modes)))
        rows.append(row)
    header = ["model", "batch", "texts", *providers, "compiled SDPA", "compiled ours"]
    title = "forward, bf16, ms: captured / eager; torch.compile: default / reduce-overhead"
    return _table(title, header, rows, wrong)


def _training(found: Figures) -> str:
    providers = ("ours", "SDPA", "reference")
    steps = {(case["batch"], case["texts"], case["by"]): values for case, values in found.of("training", "step")}
    gradients = {
        (case["batch"], case["texts"], case["by"]): values["ms"] for case, values in found.of("training", "gradients")
    }
    compiled = {case["batch"]: values["ms"] for case, values in found.of("compiled", "step")}
    rows = []
    both = [*((batch, texts) for batch, texts, _ in steps), *((batch, "padded") for batch in compiled)]
    for batch, texts in dict.fromkeys(both):
        row: list[object] = [batch, texts]
        for provider in providers:
            values = steps.get((batch, texts, provider), {})
            memory = f" ({values['peak_gb']:.1f} GB)" if "peak_gb" in values else ""
            row.append(_number(values.get("ms")) + memory)
        row.append(_number(compiled.get(batch)) if texts == "padded" else "")
        row += [_number(gradients.get((batch, texts, provider))) for provider in providers[:2]]
        rows.append(row)
    header = ["batch", "texts", *providers, "compiled SDPA", "captured ours", "captured SDPA"]
    return _table("training step, base, bf16, ms (captured: forward and backward alone)", header, rows)


def _attention(found: Figures) -> str:
    return _beside(
        found.of("attention_norm", "attention"),
        ("samples", "tokens", "direction"),
        ("ours", "flash", "cudnn", "efficient"),
        "attention, base heads, bf16, us",
    )


def _norm(found: Figures) -> str:
    return _beside(
        found.of("attention_norm", "layer_norm"),
        ("rows", "width", "direction"),
        ("ours", "PyTorch", "Inductor"),
        "LayerNorm, bf16, us",
    )


def _beside(
    figures: list[tuple[dict[str, Any], dict[str, Any]]], keys: tuple[str, ...], by: tuple[str, ...], title: str
) -> str:
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for case, values in figures:
        times.setdefault(tuple(case[key] for key in keys), {})[case["by"]] = values["us"]
    rows = [[*key, *(_number(found.get(name)) for name in by)] for key, found in times.items()]
    return _table(title, [*keys, *by], rows)


def _gemms(found: Figures) -> str:
    cublas = {_gemm(case): values["us"] for case, values in found.of("cublas", "cublas")}
    ours: dict[tuple[Any, ...], list[tuple[dict[str, Any], float]]] = {}
    for case, values in found.of("roles", "role"):
        ours.setdefault(_gemm(case), []).append((case, values["us"]))
    rows = []
    for key in dict.fromkeys([*cublas, *ours]):
        tried = ours.get(key, [])
        named = {name: us for case, us in tried for name in case["as"].split(", ")}
        case, best = min(tried, key=lambda entry: entry[1], default=({"config": ""}, None))
        theirs = cublas.get(key)
        ratio = f"{best / theirs:.2f}" if best is not None and theirs is not None else ""
        times = (_number(theirs), _number(named.get("before")), _number(named.get("default")), _number(best))
        rows.append([*key, *times, case["config"], ratio])
    header = ["model", "gemm", "role", "rows", "cuBLAS", "before", "default", "best", "config", "best/cuBLAS"]
    passes = [f"{case['model']} {case['rows']}: {_number(v['us'])}" for case, v in found.of("cublas", "passes")]
    above = [f"GELU and LayerNorm passes, us, that fc1 of cuBLAS needs besides: {', '.join(passes)}"] if passes else []
    title = "matrix products, bf16, us (ours with their epilogues, cuBLAS without)"
    return _table(title, header, rows, above)


def _gemm(case: Mapping[str, Any]) -> tuple[Any, ...]:
    return case["model"], case["gemm"], case["role"], case["rows"]


def _host(found: Figures) -> str:
    launches = {(case["of"], case["by"]): values for case, values in found.of("host", "launches")}
    rows = []
    for what in ("inference", "training"):
        for case, values in found.of("host", what):
            values = {**values, **launches.get((what, case["by"]), {})}
            columns = ("us_a_layer", "forward_us_a_layer", "gpu_us_a_layer", "launches_a_layer")
            rows.append([what, case["by"], *(_number(values.get(column)) for column in columns)])
    header = ["a layer, batch 1", "by", "host us", "of it forward", "GPU us", "launches"]
    return _table("host", header, rows)


def _tools(found: Figures) -> str:
    memcheck = found.lines("tools", "memcheck")
    words = [f"memcheck: {line.get('values') or line.get('missing') or line.get('failed')}" for line in memcheck]
    lines = found.lines("tools", "ncu")
    rows = [
        [line["case"]["kernel"], *(_number(value) for value in line["values"].values())]
        for line in lines
        if "values" in line
    ]
    names = next((list(line["values"]) for line in lines if "values" in line), [])
    reasons = {line.get("missing") or line.get("failed") for line in lines if "values" not in line}
    words += [f"ncu: {reason}" for reason in sorted(map(str, reasons))]
    return _table("tools", ["kernel", *names], rows, words) or "\n".join(["-- tools", *words, ""] if words else [])


def _failures(found: Figures) -> str:
    """What failed beside tests and parity, which have lists of their own."""
    lines = [line for line in found.without("failed") if line["section"] not in ("tests", "parity")]
    lines = [line for line in lines if line["figure"] != "section" and line["section"] != "report"]
    rows = [f"  {line['section']} {line['figure']} {_words(line['case'])}: {line['failed'][:160]}" for line in lines]
    return "\n".join([f"-- {len(rows)} figures failed", *_first(rows), ""]) if rows else ""


def _missing(found: Figures) -> str:
    lines = [line for line in found.without("missing") if line["figure"] != "section"]
    counted = Counter(f"{line['section']} {line['figure']}: {line['missing'][:120]}" for line in lines)
    rows = [f"  {reason} ({count})" for reason, count in counted.items()]
    return "\n".join([f"-- not here: {len(lines)} figures", *_first(rows, 20), ""]) if rows else ""


PARTS: tuple[Callable[[Figures], str], ...] = (
    *(_tests, _parity, _roofs, _inference, _training, _failures, _host, _attention, _norm, _tools, _gemms, _missing),
)
"""Worth most first."""


def _table(title: str, header: Row, rows: Sequence[Row], above: Sequence[str] = ()) -> str:
    """Empty without rows."""
    if not rows:
        return ""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join([f"-- {title}", *above, *lines, ""])


def _first(rows: list[str], count: int = LISTED) -> list[str]:
    return rows if len(rows) <= count else [*rows[:count], f"  and {len(rows) - count} more"]


def _words(case: Mapping[str, Any]) -> str:
    return " ".join(str(value) for value in case.values())


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
