"""The HTML report: whole and well-formed, complete, escaped, silent about the speed of wrong results; its charts drawn
where their numbers say; no wider than a phone."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from beit3_fast.bench import charts, memory, op_report, page, report, training
from beit3_fast.bench.cases import MODEL_CASES, ModelCase
from beit3_fast.bench.model import CaseResult
from beit3_fast.bench.op_cases import OP_CASES, QUICK_OP_CASES
from beit3_fast.bench.op_providers import PROVIDERS
from beit3_fast.bench.ops import OpResult
from beit3_fast.bench.outcome import Outcome
from beit3_fast.bench.parity import Error, Verdict
from beit3_fast.bench.roofs import Roofs
from beit3_fast.bench.timing import Timing

MACHINE = {
    "cpu": "Some <CPU> & more",
    "cores": 2,
    "threads": 1,
    "isa": "AVX2",
    "gpu": None,
    "system": "Linux x86_64",
    "python": "3.12.1",
    "torch": "2.14.1",
    "beit3_fast": "0.1.0",
    "git_revision": "abc1234+",
}
SETTINGS = {"device": "cpu", "rounds": 6}
ROOFS = Roofs(2e10, {torch.float32: 1e11, torch.bfloat16: 2e11, torch.float16: 3e11})
EVIL = (
    "RuntimeError: </table><script>alert('no')</script><img src=\"https://example.org/x.png\" onerror=alert(1)> & more"
)
ERROR = Error(1.5e-7, 2.5e-7, 3.5e-7)


def rounds(milliseconds, step=1):
    """Six rounds around a time, in nanoseconds; with ``step`` -1 slow where others are fast."""
    return [1e6 * milliseconds * (1 + 0.01 * off) for off in (-2, -1, 0, 0, 1, 2)[::step]]


def model_document():
    """The schema's own writer, so that it cannot drift away from what the page reads."""
    outcomes = [
        Outcome("reference", dtype=torch.float32, errors={"out": ERROR}, verdict=Verdict(True)),
        Outcome("beit3_fast", dtype=torch.float32, errors={"out": ERROR}, verdict=Verdict(True)),
        Outcome("swift", True, torch.float32, errors={"out": ERROR}, verdict=Verdict(True)),
        Outcome("wrong", True, torch.float32, errors={"out": ERROR}, verdict=Verdict(False, "maximum error 1 > 0.1")),
        Outcome("evil", True, failure=EVIL),
        Outcome("absent", True, missing="<absent> is not installed"),
    ]
    timing = Timing({"reference": rounds(300), "beit3_fast": rounds(100, -1), "swift": rounds(125)})
    peaks = {"reference": training.Memory(4 * 10**9, 10**9), "beit3_fast": training.Memory(3 * 10**9, 10**9)}
    step = ModelCase("a-training-case", "base", 2, 224, 64, (13, 9), task="training")
    results = [
        CaseResult(MODEL_CASES[0], outcomes, timing, flops=10**9),
        CaseResult(step, outcomes[:2], timing, memory=peaks),
        CaseResult(MODEL_CASES[14], [], None, skipped="needs 80 GB & more"),
    ]
    return report.document(results, ROOFS, MACHINE, SETTINGS, complete=True)


def ops_document(cases=QUICK_OP_CASES):
    results = []
    for case in cases:
        names = [provider.name for provider in PROVIDERS if case.op in provider.builds]
        timing = Timing({name: rounds(1 + place, (-1) ** place) for place, name in enumerate(names)})
        done = [Outcome(name, errors={"out": ERROR}, verdict=Verdict(True)) for name in names]
        late = [Outcome("broken", failure=EVIL), Outcome("absent", missing="it is not installed")]
        results.append(OpResult(case, [*done, *late], timing))
    return op_report.op_document(results, ROOFS, MACHINE, SETTINGS, complete=False)


def memory_document():
    results = [
        memory.MemoryResult(case, part, memory.Memory(10**6, 2 * 10**6), memory.Memory(4 * 10**6, 9 * 10**8))
        for case in memory.MEMORY_CASES
        for part in memory.PARTS
    ]
    return memory.document(results)


def provider(name, milliseconds=None, **others):
    time = None if milliseconds is None else {"median": milliseconds, "low": milliseconds, "high": 1.1 * milliseconds}
    known = {"missing": None, "failure": None, "parity": "passed", "reason": None, "time_ms": time}
    return {"name": name, **known, **others}


def scaling_document():
    points = [
        {
            "x": x,
            "flops": x * x * 10**9,
            "tokens": 200 * x,
            "skipped": None,
            "providers": [
                provider("reference", 30.0 * x)
                if x != 2
                else provider("reference", None, reason="would take too long"),
                provider("beit3_fast, optimized", 10.0 * x * x),
                provider("absent", None, parity=None, missing="it is not there"),
                provider("wrong", 987.0, parity="failed", reason="rms error 1 > 0.1"),
            ],
        }
        for x in (1, 2, 4, 8)
    ]
    points.append({"x": 16, "flops": 16 * 10**9, "tokens": 3200, "skipped": "no memory", "providers": []})
    about = {"name": "batch", "title": "base, images", "axis": "batch (samples)", "dtype": "float32", "points": points}
    curve = about | {"exponents": {"reference": 0.91, "absent": None}}
    return {"schema": 1, "kind": "scaling", "machine": MACHINE, "settings": SETTINGS, "curves": [curve]}


def breakdown_document():
    def parts(**times):
        return {"total_ms": sum(times.values()), "parts": [{"name": name, "ms": ms} for name, ms in times.items()]}

    result = {
        "case": model_document()["results"][0]["case"],
        "providers": [
            {"name": "reference", **parts(attention=30.0, GELU=10.0, **{"matrix products": 60.0, "new <part>": 20.0})},
            {"name": "beit3_fast, optimized", **parts(attention=10.0, **{"matrix products": 50.0})},
        ],
        "left_out": [
            {"name": "public", "reason": "not run: torchscale is not installed"},
            {"name": "broken", "reason": "FAILED: rms error 2 > 1"},
        ],
    }
    about = {"machine": MACHINE, "settings": {"device": "cpu", "forwards": 5}}
    return {"schema": 1, "kind": "breakdown", "complete": True, **about, "results": [result]}


def everything():
    return [model_document(), ops_document(), scaling_document(), breakdown_document(), memory_document()]


class Page(HTMLParser):
    """The elements of a page: name, attributes and text of each, in order."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.open = [], []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {[name for name, *_ in self.open]}"

    def handle_starttag(self, tag, attributes):
        assert len(attributes) == len(dict(attributes)), f"an attribute twice: {attributes}"
        element = (tag, dict(attributes), [])
        self.elements.append((*element, [name for name, *_ in self.open]))
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open, f"{tag} closed, and nothing is open"
        assert self.open[-1][0] == tag, f"{tag} closed, and {self.open[-1][0]} is open"
        self.open.pop()

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def find(self, tag=None, style=None, **wanted):
        return [
            (attributes, "".join(text).strip())
            for name, attributes, text, _ in self.elements
            if (tag is None or name == tag)
            and (style is None or style in (attributes.get("class") or "").split())
            and all(attributes.get(key) == value for key, value in wanted.items())
        ]

    @property
    def text(self):
        return self.find("body")[0][1]

    def rows(self):
        """Every table row as the texts of its cells."""
        rows = []
        for name, _, text, parents in self.elements:
            if name == "tr":
                rows.append([])
            elif name in ("td", "th") and "tr" in parents:
                rows[-1].append(" ".join("".join(text).split()))
        return rows


def render(*documents):
    text = page.render(json.loads(json.dumps(documents)))
    return text, Page(text)


@pytest.fixture(scope="module")
def whole():
    return render(*everything())


class TestOneFile:
    def test_loads_nothing_and_runs_nothing(self, whole):
        text, parsed = whole
        assert {name for name, *_ in parsed.elements}.isdisjoint({"script", "link", "img", "iframe", "object", "base"})
        for name, attributes, *_ in parsed.elements:
            assert not any(key.startswith("on") for key in attributes), (name, attributes)
            assert not {"src", "srcset", "action", "data", "poster"} & set(attributes), (name, attributes)
            assert attributes.get("href", "#").startswith("#")
        style = text[: text.index("</style>")]
        assert not re.search(r"url\(|@import|https?:", style)
        policy = parsed.find("meta", **{"http-equiv": "Content-Security-Policy"})[0][0]["content"]
        assert policy.startswith("default-src 'none'")

    def test_links_lead_somewhere(self, whole):
        _, parsed = whole
        names = [attributes["id"] for _, attributes, *_ in parsed.elements if "id" in attributes]
        assert len(names) == len(set(names))
        targets = [attributes["href"][1:] for attributes, _ in parsed.find("a")]
        assert targets == ["model", "ops", "scaling", "breakdown", "memory"]
        assert set(targets) <= set(names)

    def test_the_whole_suite_stays_small(self):
        text, parsed = render(ops_document(OP_CASES))
        assert len(text.encode()) < 1_000_000
        assert len(parsed.find("div", "bars")) == len(OP_CASES)

    def test_is_written_in_one_step(self, tmp_path):
        target = tmp_path / "report.html"
        page.write(target, [model_document()])
        assert target.read_text(encoding="utf-8") == page.render([model_document()])
        with pytest.raises(ValueError, match="nonsense"):
            page.write(target, [{"schema": 1, "kind": "nonsense"}])
        assert target.read_text(encoding="utf-8") == page.render([model_document()])
        assert list(tmp_path.iterdir()) == [target]


class TestContent:
    def test_every_case_and_provider_is_there(self, whole):
        _, parsed = whole
        wanted = {"a-training-case", "base-joint", "large-joint", "base@480", "large@768", "beit3_fast", "absent"}
        wanted |= {case.name for case in QUICK_OP_CASES} | {"swift", "evil", "wrong", "broken", "public", "new <part>"}
        wanted |= {provider.name for provider in PROVIDERS} | {"beit3_fast, optimized", "reference"}
        assert [name for name in wanted if name not in parsed.text] == []

    def test_the_header_tells_what_was_measured_on(self, whole):
        _, parsed = whole
        header = parsed.find("header")[0][1]
        for fact in (
            "Some <CPU> & more",
            "2 cores, 1 thread",
            "abc1234+",
            "torch 2.14.1",
            "6 interleaved rounds on cpu",
        ):
            assert fact in header
        assert "memory 20 GB/s; matrix products 100 GFLOP/s in float32, 200 GFLOP/s in bfloat16, 300" in header
        assert "5 profiled forwards" in header

    def test_runs_on_other_machines_are_told_apart(self):
        other = model_document() | {"machine": MACHINE | {"cpu": "Another CPU", "gpu": "A GPU"}}
        _, parsed = render(other, ops_document())
        lines = parsed.find("dd")[0][1]
        assert "model: A GPU, Another CPU" in lines
        assert "ops: Some <CPU>" in lines

    def test_the_summary_compares_with_the_reference_and_the_best_other(self, whole):
        _, parsed = whole
        row = next(row for row in parsed.rows() if row[0].startswith("base-joint base, 8 samples"))
        assert row[1] == "FAILED wrong"
        assert re.match(r"3\.00x \[2\.88, 3\.12\] reference", row[2])
        assert re.match(r"1\.25x \[1\.20, 1\.30\] swift", row[3])
        skipped = next(row for row in parsed.rows() if row[0].startswith("large-joint"))
        assert skipped[1:] == ["skipped: needs 80 GB & more"]

    def test_the_ops_sum_up(self, whole):
        """Ours is the second in every case, behind the reference."""
        _, parsed = whole
        cases = len(QUICK_OP_CASES)
        assert f"Ours passes parity in {cases} of {cases} op cases." in parsed.text
        assert f"faster in 0, slower in {cases}, and within the interval of equal speed in 0." in parsed.text

    def test_who_is_missing_is_listed_with_the_reason(self, whole):
        _, parsed = whole
        rows = [row for row in parsed.rows() if row[0] == "absent"]
        assert ["absent", "not run: <absent> is not installed"] in rows
        assert ["public", "not run: torchscale is not installed"] in parsed.rows()
        points = next(row for row in parsed.rows() if row[:2] == ["2", "4"])
        assert points[2:] == [
            "none not timed: would take too long",
            "40 ms [40, 44]",
            "none not run: it is not there",
            "none FAILED: rms error 1 > 0.1",
        ]

    def test_failure_messages_are_escaped(self, whole):
        text, parsed = whole
        assert "<script" not in text
        assert "<img" not in text
        assert EVIL in parsed.text
        assert parsed.text.count("alert('no')") >= len(QUICK_OP_CASES)

    def test_an_interrupted_run_says_so(self, whole):
        _, parsed = whole
        assert "later cases are missing: operations." in parsed.text
        assert "later cases are missing" not in render(model_document())[1].text


class TestWrongResults:
    """The documents carry times for them here, as a broken bench might: the page must not believe it."""

    def documents(self):
        model, ops, scaling = model_document(), ops_document(QUICK_OP_CASES[:1]), scaling_document()
        wrong = {
            "parity": "failed",
            "reason": "off by one row",
            "time_ms": {"median": 987.0, "low": 987.0, "high": 987.0},
        }
        ratio = {"median": 65.4, "low": 65.4, "high": 65.4}
        for result in (model["results"][0], ops["results"][0]):
            ours = next(entry for entry in result["providers"] if entry["name"] == "beit3_fast")
            ours.update(wrong, speedup=ratio, ours_faster=ratio)
        return [model, ops, scaling]

    def test_have_no_time_and_stand_out_first(self):
        text, parsed = render(*self.documents())
        assert "987" not in text
        assert "65.4" not in text
        alarm = parsed.find("div", "alarm")[0][1]
        assert alarm.startswith("Parity failed: 7 wrong results, no time given")
        assert "beit3_fast in base-joint: off by one row" in alarm
        assert "wrong in batch (samples) 4, float32: rms error 1 > 0.1" in alarm
        assert parsed.text.index("Parity failed") < parsed.text.index("Summary")

    def test_are_in_no_chart(self):
        _, parsed = render(*self.documents())
        assert [label for name, label in bars_of(parsed, "Speed-up over reference")[0] if name == "beit3_fast"] == []
        rows = [row for row in parsed.rows() if row[0] == "beit3_fast"]
        assert ["beit3_fast", "FAILED off by one row", "1.5e-07", "2.5e-07", "none"] in rows
        first = [row[0] for row in parsed.rows() if len(row) > 4 and row[0] in ("beit3_fast", "wrong", "reference")]
        assert first[:3] == ["beit3_fast", "wrong", "reference"]  # wrong results above right ones
        summary = next(row for row in parsed.rows() if row[0].startswith("base-joint"))
        assert summary[1:] == ["FAILED beit3_fast, wrong", "none", "none"]

    def test_without_ours_the_ops_show_plain_times(self):
        _, parsed = render(*self.documents())
        chart = next(a for a, _ in parsed.find("div", "bars") if "norm-small-float32-forward" in a["aria-label"])
        assert chart["aria-label"].startswith("Time of norm-small-float32-forward, shorter is better.")

    def test_nothing_wrong_raises_no_alarm(self):
        _, parsed = render(memory_document(), ops_document(()))
        assert parsed.find("div", "alarm") == []


def bars_of(parsed, label):
    """(name, width in percent) of the bars of each chart with this label."""
    charts_found, inside = [], None
    for _, attributes, text, parents in parsed.elements:
        style = (attributes.get("class") or "").split()
        if "bars" in style:
            inside = attributes["aria-label"].startswith(label)
            if inside:
                charts_found.append([])
        elif inside and "name" in style and "figure" in parents:
            charts_found[-1].append(["".join(text), None])
        elif inside and "fill" in style:
            charts_found[-1][-1][1] = float(re.search(r"width:([\d.]+)%", attributes["style"])[1])
    return [[tuple(bar) for bar in found] for found in charts_found]


class TestCharts:
    def test_each_has_a_text_alternative(self, whole):
        """And whatever is drawn stands in one that has, or is decoration."""
        _, parsed = whole
        images = parsed.find(role="img")
        rooflines = len({case.dtype for case in QUICK_OP_CASES if case.flops()})
        assert len(images) == 2 + rooflines + len(QUICK_OP_CASES) + 1 + 1 + 1 + 4
        for attributes, _ in images:
            assert re.search(r"\d", attributes["aria-label"])
        for name, attributes, _, parents in parsed.elements:
            if name == "svg" and "svg" not in parents:
                assert attributes.get("role") == "img" or attributes.get("aria-hidden") == "true"

    def test_bars_say_their_numbers(self, whole):
        _, parsed = whole
        chart = next(a for a, _ in parsed.find("div", "bars") if a["aria-label"].startswith("Speed-up over reference"))
        assert "beit3_fast: 3.00x [2.88, 3.12]" in chart["aria-label"]
        assert "swift: 2.40x" in chart["aria-label"]

    def test_bars_are_as_long_as_their_values(self, whole):
        _, parsed = whole
        found = dict(bars_of(parsed, "Speed-up over reference")[0])
        assert list(found) == ["beit3_fast", "swift", "reference"]  # the fastest first
        assert found["beit3_fast"] / found["reference"] == pytest.approx(3, rel=0.01)
        assert found["swift"] / found["reference"] == pytest.approx(2.4, rel=0.01)

    def test_op_bars_are_speeds_relative_to_ours(self, whole):
        _, parsed = whole
        found = dict(bars_of(parsed, "Speed of norm-small-float32-forward")[0])
        assert found["reference"] / found["beit3_fast"] == pytest.approx(2, rel=0.01)  # 1 ms against 2 ms

    def test_a_wide_interval_does_not_flatten_the_bars(self):
        rows = [charts.Bar("a", 2.0, "", "ours", 1.5, 100.0), charts.Bar("b", 1.0, "", "peer", 0.9, 1.1)]
        parsed = Page(str(charts.bars(rows, "two", mark=1.0)))
        widths = [float(a["style"][6:-1]) for a, _ in parsed.find("span", "fill")]
        assert widths == pytest.approx([200 / 3, 100 / 3], abs=0.01)
        whiskers = [(a["class"], re.findall(r"[\d.]+", a["style"])) for a, _ in parsed.find("span", "whisker")]
        assert whiskers[0] == ("whisker open", ["50.00", "50.00"])
        assert whiskers[1] == ("whisker", ["30.00", "6.67"])
        assert parsed.find("div", "marked")[0][0]["style"] == "--mark:33.33%"

    def test_stacked_parts_share_one_scale(self, whole):
        _, parsed = whole
        widths = {}
        for attributes, _ in parsed.find("span", "part"):
            name, time = attributes["title"].split(": ")
            widths.setdefault(name, []).append((time, float(attributes["style"][6:-1])))
        assert widths["attention"] == [("30 ms", 25.0), ("10 ms", 8.33)]  # of 120 ms
        assert widths["matrix products"] == [("60 ms", 50.0), ("50 ms", 41.67)]
        rows = parsed.rows()
        at = rows.index(["part", "reference", "beit3_fast, optimized"])
        assert rows[at + 1 : at + 8] == [
            ["matrix products", "60 ms 50 %", "50 ms 83 %"],
            ["attention", "30 ms 25 %", "10 ms 17 %"],
            ["GELU", "10 ms 8.3 %", ""],
            ["new <part>", "20 ms 17 %", ""],
            ["sum", "120 ms", "60 ms"],
            ["public", "not run: torchscale is not installed"],
            ["broken", "FAILED: rms error 2 > 1"],
        ]

    def test_memory_is_drawn(self, whole):
        _, parsed = whole
        found = dict(bars_of(parsed, "Memory of base@480, attention")[0])
        assert found["kept for backward, public"] == pytest.approx(4 * found["kept for backward, ours"], rel=0.15)
        peaks = dict(bars_of(parsed, "Peak memory of a training step")[0])
        assert peaks["beit3_fast"] / peaks["reference"] == pytest.approx(0.75, rel=0.01)


def place(attributes, x="x", y="y"):
    return float(attributes[x].rstrip("%")), float(attributes[y].rstrip("%"))


class TestLogLog:
    def test_axis(self):
        axis = charts.LogAxis([1, 100], margin=1)
        assert [axis.at(value) for value in (1, 10, 100, 1000)] == [0, 50, 100, 100]
        assert axis.ticks() == [1, 2, 5, 10, 20, 50, 100]
        assert charts.LogAxis([1, 1e5], margin=1).ticks() == [10.0**power for power in range(6)]
        assert 0 < charts.LogAxis([3.0]).at(3) < 100  # a single value has a place, too

    def test_axis_of_nothing(self):
        with pytest.raises(ValueError, match="one above zero"):
            charts.LogAxis([0, -1, math.inf])

    def test_equal_ratios_are_equal_distances(self):
        points = [charts.Point(x, x**2, str(x)) for x in (1.0, 2.0, 4.0)]
        parsed = Page(str(charts.log_log([charts.Series("a", points, "ours")], label="some")))
        (x1, y1), (x2, y2), (x3, y3) = (place(a) for a, _ in parsed.find("svg", "mark"))
        assert x2 - x1 == pytest.approx(x3 - x2, abs=0.02)
        assert y1 - y2 == pytest.approx(y2 - y3, abs=0.02)
        assert x1 < x2
        assert y1 > y2  # up is less

    def test_a_gap_stays_a_gap(self):
        _, parsed = render(scaling_document())
        assert len(parsed.find("svg", "mark")) == 7 + 2  # three and four points, two signs of the legend
        assert len(parsed.find("line", "curve")) == 1 + 3

    def test_the_guide_grows_as_the_flops(self):
        """Ours is exactly proportional to them, so the guide ends on its last mark."""
        _, parsed = render(scaling_document())
        ours = [place(a) for a, _ in parsed.find("svg", "mark")][3:7]
        guides = [a for a, _ in parsed.find("line", "guide")]
        assert place(guides[0], "x1", "y1") == pytest.approx(ours[0])
        ends = [place(a, "x2", "y2") for a in guides]
        assert ends[2] == pytest.approx(ours[3], abs=0.02)
        assert "reference, k = 0.91" in parsed.text
        assert "absent, k" not in parsed.text

    def test_roofline(self):
        """One mark a case and provider; a rate at the bandwidth's own is on the rising line."""
        quick = [case for case in QUICK_OP_CASES if case.op == "multiway_linear" and case.dtype == torch.float32]
        document = ops_document(quick)
        case, entry = document["results"][0]["case"], document["results"][0]["providers"][0]
        case["flops"] = case["bytes"]  # one FLOP a byte: 20 GFLOP/s at 20 GB/s
        entry["time_ms"]["median"] = case["flops"] / 20e9 * 1e3
        _, parsed = render(document)
        names = [provider.name for provider in PROVIDERS if "multiway_linear" in provider.builds]
        labels = [attributes["aria-label"] for attributes, _ in parsed.find("svg", "plot")]
        assert len(labels) == 1
        assert labels[0].startswith(f"Roofline in float32: {len(quick) * len(names)} marks of ")
        titles = [text for _, text in parsed.find("title")]
        assert sum(title.startswith(case["name"] + ", ") for title in titles) == len(names)
        at = next(
            place(a) for a, text in parsed.find("svg", "mark") if text.startswith(f"{case['name']}, {entry['name']}:")
        )
        rising = parsed.find("line", "guide")[0][0]
        (x1, y1), (x2, y2) = place(rising, "x1", "y1"), place(rising, "x2", "y2")
        assert x1 < at[0] < x2
        assert y1 + (at[0] - x1) / (x2 - x1) * (y2 - y1) == pytest.approx(at[1], abs=0.1)

    def test_normalization_has_no_place_in_a_roofline(self):
        _, parsed = render(ops_document([case for case in QUICK_OP_CASES if case.op == "layer_norm"]))
        assert parsed.find("svg", "plot") == []
        assert "memory" in next(row for row in parsed.rows() if "beit3_fast" in row)[-2]


class TestPartialDocuments:
    def test_nothing_at_all(self):
        _, parsed = render()
        assert "There are no results in this report." in parsed.text

    @pytest.mark.parametrize("kind", page.KINDS)
    def test_no_results_yet(self, kind):
        _, parsed = render({"schema": 1, "kind": kind, "results": [], "curves": [], "complete": False})
        assert "There are no results in this report." in parsed.text
        assert "later cases are missing" in parsed.text

    def test_no_time_at_all(self):
        document = model_document()
        for entry in document["results"][0]["providers"]:
            entry.update(time_ms=None, speedup=None, ours_faster=None, roof=None)
        document["results"][0].update(ours=None, best_other=None)
        del document["results"][1:], document["machine"], document["roofs"]
        _, parsed = render(document)
        assert parsed.find(role="img") == []
        assert ["reference", "passed", "1.5e-07", "2.5e-07", "none"] in parsed.rows()

    def test_without_the_baseline_times_are_drawn(self):
        document = model_document()
        result = document["results"][0]
        result["providers"] = [entry for entry in result["providers"] if entry["name"] != "reference"]
        for entry in result["providers"]:
            entry["speedup"] = None
        del document["results"][1:]
        _, parsed = render(document)
        found = dict(bars_of(parsed, "Time in milliseconds")[0])
        assert found["swift"] / found["beit3_fast"] == pytest.approx(1.25, rel=0.01)

    def test_only_missing_points(self):
        document = scaling_document()
        for point in document["curves"][0]["points"]:
            point["providers"] = [entry for entry in point["providers"] if entry["name"] == "absent"]
        _, parsed = render(document)
        assert parsed.find("svg", "plot") == []
        assert "not run: it is not there" in parsed.text

    def test_a_curve_of_one_point(self):
        document = scaling_document()
        del document["curves"][0]["points"][1:]
        _, parsed = render(document)
        assert parsed.find("line", "guide") == []
        assert len(parsed.find("svg", "plot")) == 1


class TestKinds:
    def test_all_is_its_runs(self):
        runs = everything()
        bare = [{name: value for name, value in run.items() if name != "machine"} for run in runs]
        not_run = [{"kind": "scaling", "reason": "OSError: <disk>", "failed": True}]
        whole = {"schema": 1, "kind": "all", "complete": False, "machine": MACHINE, "settings": {"quick": True}}
        text, parsed = render(whole | {"runs": bare, "not_run": not_run})
        assert "bench scaling: OSError: <disk>" in parsed.text
        assert "later cases are missing: the whole run, operations." in parsed.text
        body = text[text.index("<main>") :]
        assert body == page.render(runs)[len(page.render(runs)) - len(body) :]
        assert "Some <CPU> & more, 2 cores" in parsed.text

    def test_documents_are_left_alone(self):
        documents = everything()
        before = copy.deepcopy(documents)
        page.render(documents)
        assert documents == before

    @pytest.mark.parametrize("wrap", [lambda one: one, lambda one: {"schema": 1, "kind": "all", "runs": [one]}])
    def test_unknown(self, wrap):
        with pytest.raises(ValueError, match="kind 'static'"):
            page.render([wrap({"schema": 1, "kind": "static"})])
        with pytest.raises(ValueError, match="kind None"):
            page.render([wrap({"schema": 1})])
        with pytest.raises(ValueError, match="got schema 2 of kind 'model'"):
            page.render([wrap({"schema": 2, "kind": "model"})])


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
PROBE = """<!doctype html><body>
{frames}
<pre id="found"></pre>
<script>
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument;
    page.querySelectorAll("details").forEach(one => one.open = true);
    const inside = page.querySelector(".plot text") || page.body;
    return [frame.clientWidth, page.documentElement.scrollWidth, page.documentElement.scrollHeight,
            page.querySelectorAll("figure").length, parseFloat(getComputedStyle(inside).fontSize)];
  }});
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome on PATH")
def test_in_a_browser_nothing_is_wider_than_the_window(tmp_path):
    documents = everything()
    for document in documents[:2]:
        for entry in document["results"][0]["providers"]:
            entry["failure"] = entry["failure"] and EVIL + "x" * 400
    text = page.render(documents)
    (tmp_path / "good.html").write_text(text, encoding="utf-8")
    too_wide = text.replace("<main>", '<main><div style="width:500px">wide</div>')
    (tmp_path / "wide.html").write_text(too_wide, encoding="utf-8")
    frames = "\n".join(
        f'<iframe src="{name}.html" style="width:{width}px;height:800px;border:0"></iframe>'
        for name, width in (("good", 1280), ("good", 390), ("good", 320), ("wide", 390))
    )
    (tmp_path / "probe.html").write_text(PROBE.format(frames=frames), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    # its own profile: a browser that is already open is left alone
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,900", "--dump-dom"]
    done = subprocess.run(
        [BROWSER, *options, (tmp_path / "probe.html").as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    desktop, phone, narrow, wide = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1])
    for width, scroll_width, height, figures, font in (desktop, phone, narrow):
        assert scroll_width <= width
        assert figures == len(Page(text).find("figure"))
        assert height > 2000
        assert font >= 12
    assert wide[1] > wide[0], "the check itself sees what is too wide"
    assert phone[2] > desktop[2]
