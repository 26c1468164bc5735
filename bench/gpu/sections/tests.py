"""The tests that need a GPU, ``tests/gpu``: a line a test as soon as it has ended, and ``pytest.xml``.

``python -m beit3_fast.bench.gpu.sections.tests`` is pytest with the plugin below, which writes the lines.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import record as records
from ..record import Missing, Recorder
from ..setting import ROOT, Setting

FOLDER = ROOT / "tests" / "gpu"
FIRST = ("test_served", "test_ops", "test_repeats", "test_layer_norm", "test_models", "test_graphs", "test_streams")
LAST = ("test_compile", "test_tuning")
"""Which take longest a test."""


def run(record: Recorder, setting: Setting) -> None:
    record.measure("all", lambda: _run(record, setting))


def _run(record: Recorder, setting: Setting) -> Mapping[str, Any]:
    if not FOLDER.is_dir():
        raise Missing(f"{FOLDER} is not there: this is no checkout")
    lines = setting.out / "results.jsonl"
    command = [sys.executable, "-m", __spec__.name, str(lines), record.section]
    code = subprocess.run([*command, "--junitxml", str(setting.out / "pytest.xml")]).returncode
    found = [line for line in records.read(lines) if (line["section"], line["figure"]) == (record.section, "test")]
    counted = Counter(line["values"]["outcome"] if "values" in line else "failed" for line in found)
    if code not in (0, 1):
        raise RuntimeError(f"pytest ended with exit code {code}")
    return {outcome: counted[outcome] for outcome in ("passed", "failed", "skipped")}


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
    return int(pytest.main([*arguments, *options, *map(str, files())], plugins=[plugin]))


if __name__ == "__main__":
    sys.exit(main())
