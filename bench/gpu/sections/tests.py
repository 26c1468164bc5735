"""The tests that need a GPU, ``tests/test_gpu.py``: a line a test as soon as it has ended, and ``pytest.xml``.

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
from ..record import Missing, Recorder, described
from ..setting import ROOT, Setting

FILE = ROOT / "tests" / "test_gpu.py"
NOT_LOADED = "the CUDA library is not loaded"
"""A skip for this reason is a failure here: the library was to be built."""


def run(record: Recorder, setting: Setting) -> None:
    record.measure("all", lambda: _run(record, setting))


def _run(record: Recorder, setting: Setting) -> Mapping[str, Any]:
    if not FILE.is_file():
        raise Missing(f"{FILE} is not there: this is no checkout")
    lines = setting.out / "results.jsonl"
    command = [sys.executable, "-m", __spec__.name, str(lines), record.section, "dry" if setting.dry else "gpu"]
    code = subprocess.run([*command, "--junitxml", str(setting.out / "pytest.xml")]).returncode
    found = [line for line in records.read(lines) if (line["section"], line["figure"]) == (record.section, "test")]
    counted = Counter(line["values"]["outcome"] if "values" in line else "failed" for line in found)
    if code not in (0, 1, 5):
        raise RuntimeError(f"pytest ended with exit code {code}")
    return {outcome: counted[outcome] for outcome in ("passed", "failed", "skipped")}


class Lines:
    """Writes how each test ended.

    Args:
        record: where to.
        dry: there is no GPU, so that no skip is a failure.
    """

    def __init__(self, record: Recorder, dry: bool) -> None:
        self._record = record
        self._dry = dry

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for the set-up, the call and the end of every test."""
        name = report.nodeid.partition("::")[2]
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            if NOT_LOADED in reason and not self._dry:
                self._record.failed("test", reason, name=name)
            else:
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

    lines, section, place, *options = sys.argv[1:]
    plugin = Lines(Recorder(Path(lines), section), place == "dry")
    arguments = [str(FILE), "-q", "-rs", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    try:
        return int(pytest.main([*arguments, f"--rootdir={ROOT}", *options], plugins=[plugin]))
    except Exception as error:
        print(described(error))
        return 3


if __name__ == "__main__":
    sys.exit(main())
