"""README's GPU table and its plots, made from a result that was kept: ``beit3-fast bench gpu-table``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import replacing
from .command import KEPT
from .record import read
from .setting import ROOT
from .summary import Figures

BEGIN, END = "<!-- made by beit3-fast bench gpu-table -->", "<!-- end of the GPU table -->"
TEXTS = {"padded": "image + text, 64 columns, 13 valid", "dense": "image + text, 64 tokens", "none": "image"}
OTHERS = {
    ("SDPA", "eager"): "PyTorch with SDPA",
    ("SDPA", "default"): "the same, torch.compile",
    ("SDPA", "reduce-overhead"): "the same, reduce-overhead",
    ("SDPA", "captured"): "the same in a CUDA graph",
    ("timm", "captured"): "timm in a CUDA graph",
}
PLOTS = {"forward": "gpu-forward.png", "products": "gpu-products.png"}
Key = tuple[str, int, str]


def update(results: Path | None = None, root: Path = ROOT) -> bool:
    """Writes table and plots from ``results``, by default the newest of ``bench/results``; False if there is none.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file holds no figures of a GPU, or there is no README with the two markers.
    """
    if results is None:
        kept = sorted((root / KEPT).glob("*.jsonl"), key=lambda file: (file.stem[-10:], file.name))  # by date
        if not kept:
            print(f"there is no result in {KEPT}, so there is no table")
            return False
        results = kept[-1]
    found = Figures(read(results))
    readme = root / "README.md"
    text = insert(readme.read_text(encoding="utf-8"), markdown(found, results.name))
    draw(found, root / "docs")
    with replacing(readme) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"README.md and {', '.join(f'docs/{name}' for name in PLOTS.values())} are those of {results.name}")
    return True


def insert(text: str, table: str) -> str:
    """The text with the table between the markers, in place of what was there.

    Raises:
        ValueError: a marker is not there once, or they are in the wrong order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README.md must hold {BEGIN!r} and then {END!r}, once each")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def card(found: Figures) -> str:
    """The GPU's name.

    Raises:
        ValueError: there is none.
    """
    name = found.one("environment", "gpu").get("name")
    if name is None:
        raise ValueError("the results hold no GPU's name: they are of a dry run, or the run was cut off at its start")
    return str(name)


def markdown(found: Figures, source: str) -> str:
    """What was measured on which card, and the tables."""
    software = found.one("environment", "software")
    roofs = {case["kind"]: values["tflop_s"] for case, values in found.of("roofs", "product")}
    copy = found.one("roofs", "copy").get("gb_s")
    told = [f"**{card(found)}**", f"torch {software.get('torch')}", f"Triton {software.get('triton')}"]
    if "bf16" in roofs and copy:
        told.append(f"measured roofs {roofs['bf16']:.0f} TFLOP/s in bf16, {copy:.0f} GB/s")
    parts = [f"Measured on one {', '.join(told)} (`{KEPT / source}`). All in bfloat16.", _correct(found)]
    parts += [_forwards(found), _steps(found), *(f"![{name} on the GPU](docs/{file})" for name, file in PLOTS.items())]
    return "\n\n".join(part for part in parts if part)


def _correct(found: Figures) -> str:
    words = []
    for figure, told in (("parity", "within the parity rule"), ("repeats", "the same bits 100 times")):
        judged = [line.get("values", {}).get("ok", False) for line in found.lines("parity", figure)]
        if judged:
            words.append(f"{sum(judged)} of {len(judged)} kernel cases {told}")
    outcomes = [line.get("values", {}).get("outcome", "failed") for line in found.lines("tests", "test")]
    if outcomes:
        words.append(f"{outcomes.count('passed')} GPU tests passed, {outcomes.count('failed')} failed")
    return "; ".join(words) + "." if words else ""


def forwards(found: Figures) -> dict[Key, dict[tuple[str, str], float]]:
    """Milliseconds by (model, batch, texts), and then by (provider, mode)."""
    times: dict[Key, dict[tuple[str, str], float]] = {}
    for section in ("inference", "compiled"):
        for case, values in found.of(section, "forward"):
            key = case.get("model", "base"), case["batch"], case.get("texts", "padded")
            times.setdefault(key, {})[case["by"], case["mode"]] = values["ms"]
    return dict(sorted(times.items(), key=lambda entry: (entry[0][0], list(TEXTS).index(entry[0][2]), entry[0][1])))


def _forwards(found: Figures) -> str:
    rows = []
    for (model, batch, texts), by in forwards(found).items():
        ours = min((by[name, "captured"] for name in ("ours", "optimized") if (name, "captured") in by), default=None)
        others = {name: by[key] for key, name in OTHERS.items() if key in by}
        if ours is None or not others:
            continue
        best = min(others, key=lambda name: others[name])
        eager = by.get(("ours", "eager"))
        rows.append(
            [
                f"{model}, batch {batch}, {TEXTS[texts]}",
                *(_number(ours), _number(eager), _number(by.get(("SDPA", "eager")))),
                f"{_number(others[best])} ({best})",
                f"{others[best] / ours:.2f}x",
            ]
        )
    header = ["forward, ms", "ours, CUDA graph", "ours, eager", "PyTorch with SDPA, eager", "best other", "ours is"]
    return _table(header, rows)


def _steps(found: Figures) -> str:
    steps: dict[tuple[int, str], dict[str, Mapping[str, Any]]] = {}
    for case, values in found.of("training", "step"):
        steps.setdefault((case["batch"], case["texts"]), {})[case["by"]] = values
    for case, values in found.of("compiled", "step"):
        steps.setdefault((case["batch"], "padded"), {})["compiled"] = values
    rows = []
    for (batch, texts), by in sorted(steps.items()):
        others = [by[name]["ms"] for name in ("SDPA", "compiled") if name in by]
        if "ours" not in by or not others:
            continue
        ours = by["ours"]["ms"]
        memory = [f"{by[name]['peak_gb']:.1f}" if "peak_gb" in by.get(name, {}) else "-" for name in ("ours", "SDPA")]
        cells = [_number(by[name]["ms"] if name in by else None) for name in ("ours", "SDPA", "compiled")]
        rows.append([f"base, batch {batch}, {TEXTS[texts]}", *cells, f"{min(others) / ours:.2f}x", ", ".join(memory)])
    header = [
        "training step, ms",
        "ours",
        "PyTorch with SDPA",
        "the same, torch.compile",
        "ours is",
        "peak GB: ours, SDPA",
    ]
    return _table(header, rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


# ---- plots ----

SERIES = {
    ("optimized", "captured"): ("beit3_fast, CUDA graph", "#0f766e"),
    ("ours", "eager"): ("beit3_fast, eager", "#5eb5ad"),
    ("SDPA", "captured"): ("PyTorch with SDPA, CUDA graph", "#b45309"),
    ("SDPA", "reduce-overhead"): ("PyTorch with SDPA, reduce-overhead", "#f59e0b"),
    ("SDPA", "eager"): ("PyTorch with SDPA, eager", "#fcd34d"),
}
PRODUCTS = {"cuBLAS": "#b45309", "before": "#a3aebd", "default": "#5eb5ad", "best": "#0f766e"}


def draw(found: Figures, folder: Path) -> None:
    """Both plots, with the card's name."""
    from matplotlib.figure import Figure

    times = forwards(found)
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    groups = {f"{model}, {batch}\n{texts}": by for (model, batch, texts), by in times.items()}
    _bars(axes, groups, {label: (key, colour) for key, (label, colour) in SERIES.items()})
    axes.set_yscale("log")
    axes.set_ylabel("milliseconds (log), lower is better")
    axes.set_title(f"A forward in bfloat16 on one {card(found)}")
    _save(figure, folder / PLOTS["forward"])

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.subplots()
    rates = products(found)
    _bars(axes, rates, {name: (name, colour) for name, colour in PRODUCTS.items()})
    axes.set_ylabel("TFLOP/s, higher is better")
    axes.set_title(f"A base layer's matrix products at the largest batch on one {card(found)}")
    _save(figure, folder / PLOTS["products"])


def products(found: Figures) -> dict[str, dict[str, float]]:
    """TFLOP/s of the base model's products with the most rows, by product and role, and then by who computes."""
    every = [*found.of("cublas", "cublas"), *found.of("roles", "role")]
    rows = max((case["rows"] for case, _ in every if case["model"] == "base"), default=0)
    rates: dict[str, dict[str, float]] = {}
    for case, values in every:
        if (case["model"], case["rows"]) != ("base", rows):
            continue
        by, rate = rates.setdefault(f"{case['gemm']}\n{case['role']}", {}), values["tflop_s"]
        if "as" not in case:
            by["cuBLAS"] = rate
            continue
        by |= {name: rate for name in case["as"].split(", ") if name in PRODUCTS}
        by["best"] = max(by.get("best", 0), rate)
    return rates


def _bars(axes: Any, groups: Mapping[str, Mapping[Any, float]], series: Mapping[str, tuple[Any, str]]) -> None:
    width = 0.8 / len(series)
    for index, (label, (key, colour)) in enumerate(series.items()):
        places = [place for place, by in enumerate(groups.values()) if key in by]
        heights = [by[key] for by in groups.values() if key in by]
        axes.bar([place - 0.4 + width * (index + 0.5) for place in places], heights, width, label=label, color=colour)
    axes.set_xticks(range(len(groups)), list(groups), fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)


def _save(figure: Any, file: Path) -> None:
    with replacing(file) as temporary:
        figure.savefig(temporary, dpi=120)
