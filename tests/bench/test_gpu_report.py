"""The GPU report's driver, on sections that hang, crash and print garbage; its files, its summary, and a dry run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from beit3_fast.bench.gpu import command, driver, library, record, summary
from beit3_fast.bench.gpu.driver import Report
from beit3_fast.bench.gpu.plan import SECTIONS, Section
from beit3_fast.bench.gpu.preparation import Task
from beit3_fast.bench.gpu.record import Missing, Recorder
from beit3_fast.bench.gpu.sections import roles, tests, tools
from beit3_fast.bench.gpu.setting import REAL, TINY, Setting

MODULES = {
    "good": """
        def run(record, setting):
            for number in range(3):
                record.measure("count", lambda: {"number": number, "nan": float("nan")}, of=number)
            record.measure("raises", lambda: 1 / 0)
            record.measure("after", lambda: {"fine": True})
    """,
    "hangs": """
        import time
        def run(record, setting):
            record.measure("before", lambda: {"fine": True})
            record.measure("hangs", lambda: time.sleep(1000))
            record.measure("after", lambda: {"fine": True})
    """,
    "sleeps": """
        import subprocess, time
        def run(record, setting):
            child = subprocess.Popen(["sleep", "1000"])
            record.measure("before", lambda: {"child": child.pid})
            time.sleep(1000)
    """,
    "crashes": """
        import os, signal
        def run(record, setting):
            record.measure("before", lambda: {"fine": True})
            record.measure("crash", lambda: os.kill(os.getpid(), signal.SIGSEGV), kind="bad")
            record.measure("after", lambda: {"fine": True})
    """,
    "garbage": """
        import sys
        def run(record, setting):
            sys.stdout.buffer.write(bytes(range(256)) * 20000)
            with open(setting.out / "results.jsonl", "ab") as file:
                file.write(b'nonsense\\n[1]\\n{"section": "garbage"}\\n')
            record.measure("before", lambda: {"fine": True})
            with open(setting.out / "results.jsonl", "ab") as file:
                file.write(b'{"section": "garbage", "figure": "half')
            sys.exit(3)
    """,
    "missing": "import no_such_module",
}


@pytest.fixture
def sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes sections of the modules above."""
    folder = tmp_path / "modules"
    folder.mkdir()
    for name, source in MODULES.items():
        (folder / f"fake_{name}.py").write_text(textwrap.dedent(source))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))

    def make(*names: str, **options: float) -> list[Section]:
        return [Section(name, name, **{"seconds": 60, **options}, module=f"fake_{name}") for name in names]

    return make


def run(out: Path, sections: list[Section], budget: float = 120, tasks: list[Task] | None = None):
    return Report(out, budget, dry=True, sections=sections, prepare=lambda dry: tasks or []).run()


def figures(lines, section):
    """{figure: its kind and what stands there}"""
    return {
        line["figure"]: next((kind, line[kind]) for kind in record.KINDS if kind in line)
        for line in lines
        if line["section"] == section
    }


def test_whatever_a_section_does_the_others_run(tmp_path, sections, capsys):
    out = tmp_path / "out"
    lines = run(out, sections("crashes", "garbage", "missing", "good"))
    written = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    assert written == lines  # every line is whole and is a figure

    crashed = figures(lines, "crashes")
    assert crashed["before"] == crashed["after"] == ("values", {"fine": True})
    assert crashed["crash"] == ("failed", "died with SIGSEGV")
    assert [line["case"] for line in lines if line["figure"] == "crash"] == [{"kind": "bad"}]
    assert crashed["section"][0] == "values"  # the second process went on behind it, to the end

    garbage = figures(lines, "garbage")
    assert list(garbage) == ["before", "section"]
    assert garbage["section"][1].startswith("ended with exit code 3 after ")
    assert figures(lines, "missing")["section"][0] == "failed"

    good = figures(lines, "good")
    assert [line["values"] for line in lines if line["figure"] == "count"] == [
        {"number": number, "nan": None} for number in range(3)
    ]
    assert good["raises"] == ("failed", "ZeroDivisionError: division by zero")
    assert good["after"] == ("values", {"fine": True})

    assert sorted(file.name for file in out.iterdir()) == ["log.txt", "results.jsonl", "summary.txt"]
    assert (out / "log.txt").stat().st_size < 4 * (driver.LOGGED + 1000)
    assert b"No module named 'no_such_module'" in (out / "log.txt").read_bytes()
    printed = capsys.readouterr().out
    assert (out / "summary.txt").read_text() in printed
    assert "GARBAGE: ended with exit code 3" in printed


def test_a_figure_that_hangs_is_given_up_and_the_next_is_made(tmp_path, sections):
    (section,) = sections("hangs", stall=2)
    hung = figures(run(tmp_path, [section]), "hangs")
    assert hung["hangs"] == ("failed", "stopped: no figure for 2 s")
    assert hung["before"] == hung["after"] == ("values", {"fine": True})


def test_a_section_ends_at_its_deadline_with_whatever_it_started(tmp_path, sections):
    start = time.monotonic()
    lines = run(tmp_path, sections("sleeps", seconds=15))
    assert time.monotonic() - start < 25
    slept = figures(lines, "sleeps")
    assert slept["section"][1].startswith("stopped at its deadline after 15")
    child = slept["before"][1]["child"]
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


def test_the_budget_holds_for_all_sections_together(tmp_path, sections):
    start = time.monotonic()
    background = [Task("warm", [sys.executable, "-c", "import time; time.sleep(1000)"], 5)]
    (waiting,) = sections("sleeps")
    waiting = Section(waiting.name, "", 60, waits=("warm",), module=waiting.module)
    lines = run(tmp_path, [waiting, *sections("good")], budget=18, tasks=background)
    assert time.monotonic() - start < 26
    assert figures(lines, "report")["warm"][1].startswith("stopped at its deadline after 5.")
    assert figures(lines, "sleeps")["section"][1].startswith("stopped at its deadline")
    assert figures(lines, "good") == {"section": ("missing", "the report's time is spent")}


def test_no_file_of_an_earlier_report_stays(tmp_path, sections):
    for name in driver.FILES:
        (tmp_path / name).write_text("old")
    (tmp_path / "mine.txt").write_text("kept")
    run(tmp_path, [])
    assert len(driver.FILES) <= 8
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == [
        *("mine.txt", "results.jsonl", "summary.txt")
    ]
    assert "old" not in (tmp_path / "results.jsonl").read_text()


def test_a_terminated_report_keeps_what_it_has(tmp_path, sections):
    sections()  # for the path
    script = f"""
        from pathlib import Path
        from beit3_fast.bench.gpu.driver import Report
        from beit3_fast.bench.gpu.plan import Section
        sections = [Section("sleeps", "", 90, module="fake_sleeps")]
        Report(Path({str(tmp_path / "out")!r}), 100, dry=True, sections=sections, prepare=lambda dry: []).run()
    """
    process = subprocess.Popen([sys.executable, "-P", "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True)
    results = tmp_path / "out" / "results.jsonl"
    until = time.monotonic() + 60
    while not (results.exists() and results.read_text()) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=20)
    assert "== GPU report" in printed
    lines = record.read(results)
    assert figures(lines, "report")["end"] == ("failed", "interrupted")
    assert "before" in figures(lines, "sleeps")


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_figure_is_made_once(tmp_path):
    file = tmp_path / "results.jsonl"
    Recorder(file, "one").measure("a", lambda: {"x": 1}, case=1)
    calls = []
    again = Recorder(file, "one")
    assert again.measure("a", lambda: calls.append(1) or {}, case=1) == {"x": 1}
    assert again.measure("a", lambda: {"x": 2}, case=2) == {"x": 2}
    assert Recorder(file, "two").measure("a", lambda: {"x": 3}, case=1) == {"x": 3}
    assert calls == []
    assert [line["values"]["x"] for line in record.read(file)] == [1, 2, 3]


def test_what_is_missing_is_no_failure(tmp_path):
    def compute():
        raise Missing("ncu is not installed")

    file = tmp_path / "results.jsonl"
    Recorder(file, "tools").measure("ncu", compute)
    assert record.read(file) == [{"section": "tools", "figure": "ncu", "case": {}, "missing": "ncu is not installed"}]
    assert command.right(record.read(file))


def test_the_figure_on_its_way_is_named_until_it_is_there(tmp_path):
    current = tmp_path / "current.json"
    seen = []
    recorder = Recorder(tmp_path / "results.jsonl", "s", current)
    recorder.measure("a", lambda: seen.append(json.loads(current.read_text())) or {}, by="ours")
    assert seen == [{"figure": "a", "case": {"by": "ours"}}]
    assert not current.exists()


@pytest.mark.parametrize(
    ("line", "is_right"),
    [
        ({"values": {"us": 1.0}}, True),
        ({"values": {"ok": True}}, True),
        ({"values": {"ok": False}}, False),
        ({"failed": "OutOfMemoryError"}, False),
    ],
)
def test_what_makes_a_report_wrong(line, is_right):
    assert command.right([{"section": "s", "figure": "f", "case": {}, **line}]) is is_right


def test_the_name_under_which_results_are_kept():
    import datetime

    day = datetime.date(2026, 3, 1)
    gpu = {"section": "environment", "figure": "gpu", "case": {}, "values": {"name": "NVIDIA H100 80GB HBM3"}}
    assert command.kept_name([gpu], day) == "nvidia-h100-80gb-hbm3-2026-03-01.jsonl"
    assert command.kept_name([], day) == "unknown-2026-03-01.jsonl"


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(ValueError, match="section 'pairty' is unknown; did you mean parity"):
        command.report(tmp_path, 100, sections=["pairty"], dry=True)
    with pytest.raises(ValueError, match="budget must be at least 5 seconds, got 1"):
        command.report(tmp_path, 1, dry=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="out must be a folder"):
        command.report(tmp_path / "file", 100, dry=True)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="sees no CUDA GPU; --dry-run"):
            command.report(tmp_path, 100)


# --- the summary ------------------------------------------------------------------------------------------------------


def many_lines():
    """As many figures as a full run has and more, with long names and many failures."""
    lines = [{"section": "environment", "figure": "gpu", "case": {}, "values": {"name": "NVIDIA H100 80GB HBM3"}}]
    for model in ("base", "large"):
        for gemm in ("qkv", "out", "fc1", "fc2"):
            for role in ("forward", "dx", "dw"):
                for rows in (210, 1680, 13440):
                    case = {"model": model, "gemm": gemm, "role": role, "rows": rows}
                    times = {"us": 123.456, "tflop_s": 456.7}
                    lines.append({"section": "cublas", "figure": "cublas", "case": case, "values": times})
                    for name, us in (("default", 100.0), ("before", 200.0), ("128x256x64 w8 s3", 90.0)):
                        tried = {**case, "config": "128x256x64 w8 s3", "as": name}
                        values = {"us": us, "tflop_s": 1.0}
                        lines.append({"section": "roles", "figure": "role", "case": tried, "values": values})
    for number in range(300):
        case = {"name": f"test_of_something[{number}-{'x' * 100}]"}
        lines.append({"section": "tests", "figure": "test", "case": case, "failed": "AssertionError: " + "y" * 300})
        case = {"op": "ffn", "direction": "backward", "model": "base", "rows": number, "kind": "bf16"}
        lines.append({"section": "parity", "figure": "parity", "case": case, "failed": "z" * 300})
        lines.append({"section": "inference", "figure": "forward", "case": {"number": number}, "failed": "w" * 300})
    return lines


def test_the_summary_is_short_and_cut_off_at_its_end():
    text = summary.summary(many_lines(), SECTIONS)
    assert len(text) < 12_000
    assert text.startswith("== GPU report: NVIDIA H100 80GB HBM3 ==")
    assert "300 failed" in text
    assert "and 288 more" in text
    assert text.index("-- tests") < text.index("-- parity") < text.index("-- matrix products")
    assert "cut off here" in text


def test_the_best_config_stands_beside_cublas():
    text = summary.summary([line for line in many_lines() if "failed" not in line], SECTIONS)
    row = next(line for line in text.splitlines() if line.split()[:4] == ["base", "qkv", "forward", "210"])
    assert row.split()[4:] == ["123", "200", "100", "90", "128x256x64", "w8", "s3", "0.73"]


# --- sections ---------------------------------------------------------------------------------------------------------


def test_every_section_has_its_module():
    import importlib

    for section in SECTIONS:
        assert callable(importlib.import_module(section.path).run)


def test_a_line_a_test(tmp_path):
    source = """
        import pytest
        def test_passes(): pass
        def test_fails(): assert 1 == 2
        @pytest.fixture
        def broken(): raise OSError("no disk")
        def test_not_begun(broken): pass
        def test_skipped(): pytest.skip("there is one GPU")
    """
    (tmp_path / "test_fake.py").write_text(textwrap.dedent(source))
    (tmp_path / "test_unreadable.py").write_text("import no_such_module")
    code = """
        import pytest
        from pathlib import Path
        from beit3_fast.bench.gpu.record import Recorder
        from beit3_fast.bench.gpu.sections.tests import Lines
        pytest.main(["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "."],
                    plugins=[Lines(Recorder(Path("lines.jsonl"), "tests"))])
    """
    subprocess.run([sys.executable, "-P", "-c", textwrap.dedent(code)], check=True, cwd=tmp_path)
    outcomes = {
        line["case"]["name"].rpartition("::")[2]: line["values"]["outcome"] if "values" in line else line["failed"]
        for line in record.read(tmp_path / "lines.jsonl")
    }
    assert outcomes == {
        "test_passes": "passed",
        "test_fails": "assert 1 == 2",
        "test_not_begun": "OSError: no disk",
        "test_skipped": "skipped",
        "test_unreadable.py": "E   ModuleNotFoundError: No module named 'no_such_module'",
    }


def test_reports_of_several_processes_become_one(tmp_path):
    for name in ("one", "two"):
        text = f'<testsuites><testsuite name="pytest"><testcase name="{name}"/></testsuite></testsuites>'
        (tmp_path / f"{name}.xml").write_text(text)
    (tmp_path / "half.xml").write_text("<testsuites><testsuite")
    parts = [tmp_path / f"{name}.xml" for name in ("one", "half", "absent", "two")]
    tests.merge(parts, tmp_path / "all.xml")
    root = ElementTree.parse(tmp_path / "all.xml").getroot()
    assert [case.get("name") for case in root.iter("testcase")] == ["one", "two"]


def test_what_matters_most_is_tested_first():
    names = [file.stem for file in tests.files()]
    assert names[: len(tests.FIRST)] == list(tests.FIRST)
    assert names[-len(tests.LAST) :] == list(tests.LAST)
    assert sorted(names) == sorted(file.stem for file in tests.FOLDER.glob("test_*.py"))


def test_the_defaults_of_version_0_1():
    setting = Setting(Path(), True, REAL)
    found = {
        (p.model.name, p.gemm.name, p.role, setting.rows(p.samples)): str(roles.before(p, setting.rows(p.samples)))
        for p in roles.products(setting)
    }
    assert len(found) == 2 * 4 * 3 * 3
    assert found["base", "qkv", "forward", 210] == "16x128x128 w4 s2"
    assert found["base", "fc1", "forward", 210] == found["large", "fc2", "dx", 210] == "16x256x64 w4 s3"
    assert found["base", "fc2", "forward", 210] == found["large", "qkv", "dx", 210] == "16x64x128 w4 s2"
    assert found["base", "out", "forward", 1680] == "128x64x128 w8 s2"
    assert found["base", "fc2", "forward", 13440] == found["base", "fc1", "dw", 210] == "128x128x128 w8 s2"
    assert (found["base", "out", "dw", 210], found["base", "qkv", "dw", 210]) == ("64x64x128 w4 s2", "64x128x128 w4 s2")
    assert found["large", "qkv", "dw", 210] == "128x128x128 w8 s2"


@pytest.mark.parametrize("product", list(roles.products(Setting(Path(), True, TINY))), ids=str)
def test_the_launch_of_every_product_is_found(product):
    setting = Setting(Path(), True, TINY)
    for config in list(roles.configs(setting, product).values())[:2]:
        assert roles.launch_of(setting, product, config)() is not None


class Simulated(Setting):
    """Where kernels can be launched, in the simulator, though there is no GPU."""

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")


@pytest.mark.parametrize("role", roles.ROLES)
def test_the_launch_that_is_timed_computes_the_product(role, monkeypatch):
    simulate = pytest.importorskip("ptxsim.simulate", reason="the PTX simulator is not installed")
    setting = Simulated(Path(), False, TINY)
    product = next(p for p in roles.products(setting) if (p.gemm.name, p.role) == ("qkv", role))
    seen = []
    monkeypatch.setattr(roles, "Operands", lambda *given, kind=roles.Operands: seen.append(kind(*given)) or seen[-1])
    with simulate.simulated(stats=False):
        run = roles.launch_of(setting, product, roles.Config(64, 64, 64, 4, 2))
        results = run()
        written = results[1 if role == "dw" else 0]
        written.zero_()  # what comes now is what is timed
        assert run() is results
    (operands,) = seen
    x, dy, weight = operands.x.double(), operands.dy.double(), operands.weight.double()
    parts = list(enumerate(setting.ranges(product.samples)))
    written = written.double()
    if role == "forward":
        expected = torch.cat([x[rows] @ weight[expert].t() for expert, rows in parts])
        for _, rows in parts:  # the bias is the same for all rows of an expert
            written[rows] -= (written[rows] - expected[rows]).mean(0)
    elif role == "dx":
        expected = torch.cat([dy[rows] @ weight[expert] for expert, rows in parts])
    else:
        expected = torch.stack([dy[rows].t() @ x[rows] for _, rows in parts])
    torch.testing.assert_close(written, expected, rtol=0.02, atol=0.05)


def test_what_ncu_prints_is_read():
    printed = """
      _fc1_kernel (1272, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
        Section: GPU Speed Of Light Throughput
        ----------------------- ----------- ------------
        Metric Name             Metric Unit Metric Value
        ----------------------- ----------- ------------
        DRAM Frequency                  Ghz         2.61
        Memory Throughput                 %        61.52
        DRAM Throughput                   %        20.11
        Duration                         us       115.23
        L2 Cache Throughput               %        61.52
        Compute (SM) Throughput           %        71.40
        Registers Per Thread             register/thread             237
        Achieved Occupancy                        %        12.44
    """
    assert tools.read_metrics(printed) == {
        "us": 115.23,
        "sm_percent": 71.4,
        "memory_percent": 61.52,
        "l2_percent": 61.52,
        "dram_percent": 20.11,
        "registers": 237,
        "occupancy": 12.44,
    }
    assert tools.read_metrics(printed.replace(" us       115.23", "ms         1.50"))["us"] == 1500
    assert tools.read_metrics("==ERROR== ERR_NVGPUCTRPERM") == {}


NCU = """
  _fc1_kernel (1272, 1, 1)x(256, 1, 1), Context 1, Stream 7, Device 0, CC 9.0
    Duration                         us       115.23
    Compute (SM) Throughput           %        71.40
"""


@pytest.mark.parametrize(
    ("printed", "code", "expected"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, ("values", {"ok": True, "errors": 0})),
        ("========= ERROR SUMMARY: 3 errors", 9, ("values", {"ok": False, "errors": 3})),
        ("no device", 1, ("failed", "RuntimeError: compute-sanitizer ended with exit code 1:")),
        (None, 0, ("missing", "compute-sanitizer is not installed")),
    ],
)
def test_compute_sanitizer(printed, code, expected, tmp_path, monkeypatch):
    lines = with_tool("compute-sanitizer", printed, code, tmp_path, monkeypatch)
    assert lines["memcheck"] == expected
    if printed is not None:
        assert "--tool memcheck" in (tmp_path / "ncu.txt").read_text()
        assert printed in (tmp_path / "ncu.txt").read_text()


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        (NCU, ("values", {"us": 115.23, "sm_percent": 71.4})),
        ("==ERROR== ERR_NVGPUCTRPERM", ("missing", "ncu may not read the GPU's counters here (ERR_NVGPUCTRPERM)")),
        ("nothing", ("failed", "RuntimeError: ncu ended with exit code 0 and printed no metric")),
        (None, ("missing", "ncu is not installed")),
    ],
)
def test_ncu(printed, expected, tmp_path, monkeypatch):
    assert with_tool("ncu", printed, 0, tmp_path, monkeypatch)["ncu"] == expected


def with_tool(name, printed, code, folder, monkeypatch):
    """The tools' figures where one of them is on PATH and prints this."""
    (folder / "bin").mkdir()
    if printed is not None:
        tool = folder / "bin" / name
        tool.write_text(f"#!/bin/sh\ncat <<'EOF'\n{printed}\nEOF\nexit {code}\n")
        tool.chmod(0o755)
    found = shutil.which
    monkeypatch.setattr(
        tools.shutil, "which", lambda name, path=None: None if path else found(name, path=str(folder / "bin"))
    )
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    recorder = Recorder(folder / "results.jsonl", "tools")
    tools.run(recorder, Simulated(folder, False, TINY))
    return figures(record.read(folder / "results.jsonl"), "tools")


def test_the_library_is_built_for_one_gpu():
    configure, build = library.commands(Path("/source"), Path("/work"), "/usr/bin/nvcc", (9, 0))
    assert "-DCMAKE_CUDA_ARCHITECTURES=90-real" in configure
    assert "-DCMAKE_CUDA_COMPILER=/usr/bin/nvcc" in configure
    assert build[-2:] == ["--target", "beit3_fast_cuda"]


# --- all of it --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_dry_run(tmp_path):
    """From the Makefile's door, with nothing on the path but what it puts there."""
    root = tests.ROOT
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        ["make", "gpu-report", f"OUT={tmp_path}", "BUDGET=400", "DRY=1", f"PYTHON={sys.executable}"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = record.read(tmp_path / "results.jsonl")
    assert command.right(lines)
    for section in SECTIONS:
        assert figures(lines, section.name)["section"][0] == "values"
        assert len(figures(lines, section.name)) > 1
    assert {file.name for file in tmp_path.iterdir()} == {*driver.FILES} - {"ncu.txt"}
    text = (tmp_path / "summary.txt").read_text()
    assert len(text) < 12_000
    assert text in done.stdout
    parity = [line for line in lines if line["figure"] == "parity" and line["section"] == "parity"]
    assert len(parity) == 4 * 2 * 2 * 11
    assert "GPU report: no GPU" in text
