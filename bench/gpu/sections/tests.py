"""The tests that need a GPU, ``tests/gpu``: a line a test as soon as it has ended, and ``pytest.xml``.

A few files run side by side: most of a test's time is the host's, which compares with float64. ``python -m
beit3_fast.bench.gpu.sections.tests`` is pytest with the plugin below, which writes the lines.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .. import record as records
from ..preparation import cores
from ..record import Missing, Recorder
from ..setting import ROOT, Setting

FOLDER = ROOT / "tests" / "gpu"
FIRST = ("test_served", "test_ops", "test_repeats", "test_layer_norm", "test_models", "test_graphs", "test_streams")
LAST = ("test_compile", "test_tuning")
"""Which take longest a test."""
AT_A_TIME = 4


def run(record: Recorder, setting: Setting) -> None:
    if not FOLDER.is_dir():
        record.missing("all", f"{FOLDER} is not there: this is no checkout")
        return
    record.measure("compilation", lambda: _compile(setting))
    record.measure("all", lambda: _run(record, setting))


def _compile(setting: Setting) -> Mapping[str, Any]:
    """What the tests launch, by all cores, before the first of them."""
    if setting.dry:
        raise Missing("nothing is compiled on a CPU")
    path = os.pathsep.join(filter(None, [str(ROOT / "tests"), os.environ.get("PYTHONPATH")]))
    subprocess.run([sys.executable, "-m", "gpu.warm"], env=os.environ | {"PYTHONPATH": path}, check=True)
    return {}


def _run(record: Recorder, setting: Setting) -> Mapping[str, Any]:
    lines, reports = setting.out / "results.jsonl", setting.out / "pytest.xml"
    groups = [files()] if setting.dry else [[file] for file in files()]
    parts: list[Path] = []
    with ThreadPoolExecutor(min(AT_A_TIME, cores(), len(groups))) as pool:
        ends = pool.map(lambda group: _pytest(group, lines, record.section), groups)
        for group, (code, part) in zip(groups, ends, strict=True):
            if code not in (0, 1):
                record.failed("test", f"pytest ended with exit code {code}", name=group[0].name)
            parts.append(part)
            merge(parts, reports)
    found = [line for line in records.read(lines) if (line["section"], line["figure"]) == (record.section, "test")]
    counted = Counter(line["values"]["outcome"] if "values" in line else "failed" for line in found)
    return {outcome: counted[outcome] for outcome in ("passed", "failed", "skipped")}


def _pytest(group: Sequence[Path], lines: Path, section: str) -> tuple[int, Path]:
    """Runs the files in a process of their own; its exit code, and its JUnit report."""
    part = Path.cwd() / f"{group[0].stem}.xml"
    command = [sys.executable, "-m", __spec__.name, str(lines), section, f"--junitxml={part}", *map(str, group)]
    return subprocess.run(command, env=os.environ | {"GPU_TESTS_WARM": "0"}).returncode, part


def merge(parts: Iterable[Path], whole: Path) -> None:
    """Puts JUnit reports into one; a part that was not written, or not to its end, is left out."""
    suites = ElementTree.Element("testsuites")
    for part in parts:
        try:
            suites.extend(ElementTree.parse(part).getroot().iter("testsuite"))
        except (OSError, ElementTree.ParseError):
            continue
    ElementTree.ElementTree(suites).write(whole, encoding="utf-8", xml_declaration=True)


def files(folder: Path = FOLDER) -> list[Path]:
    """The tests, what matters most first."""

    def place(file: Path) -> tuple[int, str]:
        if file.stem in FIRST:
            return FIRST.index(file.stem), file.stem
        return len(FIRST) + (file.stem in LAST), file.stem

    return sorted(folder.glob("test_*.py"), key=place)


class Lines:
    """Writes how each test ended."""

    def __init__(self, record: Recorder) -> None:
        self._record = record

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for the set-up, the call and the end of every test."""
        name = report.nodeid.removeprefix("tests/gpu/")
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._record.values("test", {"outcome": "skipped", "reason": reason[:200]}, name=name)
        elif report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self._record.failed("test", crash.message if crash else str(report.longrepr)[-300:], name=name)
        elif report.when == "call":
            self._record.values("test", {"outcome": "passed", "seconds": round(report.duration, 2)}, name=name)

    def pytest_collectreport(self, report: Any) -> None:
        """Called by pytest for every file that it has read."""
        if report.failed:
            self._record.failed("test", str(report.longrepr).strip().splitlines()[-1], name=report.nodeid)


def main() -> int:
    import pytest

    lines, section, *options = sys.argv[1:]
    arguments = ["-q", "-rs", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib", f"--rootdir={ROOT}"]
    plugin = Lines(Recorder(Path(lines), section))
    return int(pytest.main([*arguments, *options], plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main())
