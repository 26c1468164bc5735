"""Runs the sections one after the other, within a time that is given, whatever becomes of each.

A section is a process in a group of its own. The group is killed at the section's deadline or the report's, whichever
comes first. A process that dies, or from which no figure has come for too long, is started again behind the figure that
it was at, which is noted as failed, as long as there is time. What a section prints goes to ``log.txt``, its figures
to ``results.jsonl``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from ..isolation import signal_name
from . import preparation, record
from .plan import BUDGET, SECTIONS, Section
from .preparation import Task
from .summary import summary

RESULTS, LOG, SUMMARY = "results.jsonl", "log.txt", "summary.txt"
FILES = (RESULTS, LOG, SUMMARY, "env.txt", "pytest.xml", "trace.json.gz", "ncu.txt")
"""All that a report leaves in its folder."""
FOR_THE_SUMMARY = 2.0
LEAST = 3.0
"""Seconds below which a section is not started: its process would not get as far as a figure."""
STARTS = 4
"""Of a section at most, where its process dies or hangs."""
POLL = 0.1
LOGGED = 64 * 1024
"""Bytes of what a process prints that are kept, the last ones."""

CACHES = Path(tempfile.gettempdir()) / f"beit3_fast_gpu_{os.getuid()}"
"""Of compiled kernels: a second report on the machine compiles nothing."""


class Report:
    """A run of the report.

    Args:
        out: the folder for its files.
        budget: seconds for all of it.
        dry: on a CPU, tiny.
        sections: in the order in which they run.
        prepare: what to start in the background before the first one.
    """

    def __init__(
        self,
        out: Path,
        budget: float,
        *,
        dry: bool = False,
        sections: Sequence[Section] = SECTIONS,
        prepare: Callable[[bool], list[Task]] = preparation.tasks,
    ) -> None:
        self.out = out.absolute()  # the sections work elsewhere
        self.dry = dry
        self._end = time.monotonic() + budget - FOR_THE_SUMMARY
        self._sections = sections
        self._prepare = prepare
        self._background: list[_Process] = []
        self._started = time.monotonic()
        self._budget = budget

    def run(self) -> list[record.Line]:
        """Runs everything; returns the figures, which are in the folder too, and prints the summary.

        An interrupted or terminated run keeps what it has and prints that.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        for name in FILES:  # of an earlier one
            (self.out / name).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory(prefix="beit3_fast_gpu_") as folder, _termination_interrupts():
            self._scratch = Path(folder)
            try:
                self._run()
            except KeyboardInterrupt:
                self._note("report", "end", failed="interrupted")
            finally:
                for process in self._background:
                    process.kill()
                    self._log(process)
        record.mend(self.results)
        lines = record.read(self.results) if self.results.exists() else []
        text = summary(lines, self._sections)
        (self.out / SUMMARY).write_text(text, encoding="utf-8")
        print(text, flush=True)
        return lines

    @property
    def results(self) -> Path:
        return self.out / RESULTS

    @property
    def _left(self) -> float:
        return self._end - time.monotonic()

    def _run(self) -> None:
        chosen = {section.name for section in self._sections}
        for task in self._prepare(self.dry):
            if task.serves and not chosen.intersection(task.serves):
                continue
            seconds = min(task.seconds, self._left)
            self._background.append(_Process(task.command, self._scratch, _environment(self.dry), task.name, seconds))
        for section in self._sections:
            self._await(section.waits)
            if self._left < LEAST:
                self._note(section.name, "section", missing="the report's time is spent")
                continue
            self._section(section)
        self._note("report", "end", values={"seconds": round(time.monotonic() - self._started, 1)})

    def _section(self, section: Section) -> None:
        start, longest = time.monotonic(), section.seconds * max(1.0, self._budget / BUDGET)
        deadline = start + min(longest, self._left)
        current = self._scratch / "current.json"
        ended = ""
        for _ in range(STARTS):
            current.unlink(missing_ok=True)
            process = _Process(
                [
                    *(sys.executable, "-m", f"{__package__}.process", section.name, section.path),
                    *("--out", str(self.out), "--results", str(self.results), "--current", str(current)),
                    *(["--dry-run"] if self.dry else []),
                ],
                self._scratch,
                _environment(self.dry),
                section.name,
                deadline - time.monotonic(),
            )
            try:
                ended = self._watch(process, section.stall, current)
            finally:
                process.kill()
                self._log(process)
                record.mend(self.results)
            at = _read_current(current)
            if not ended or process.overdue or at is None:  # dead without a figure on its way: it would die again
                break
            record.append(self.results, {"section": section.name, **at, "failed": ended})
            if deadline - time.monotonic() < LEAST:
                break
        seconds = round(time.monotonic() - start, 1)
        if ended:
            self._note(section.name, "section", failed=f"{ended} after {seconds} s")
        else:
            self._note(section.name, "section", values={"seconds": seconds})

    def _watch(self, process: _Process, stall: float, current: Path) -> str:
        """How the process ended, empty if well; it may still be running."""
        size, since = self._size(), math.inf  # what comes before the first figure, imports, is no stall
        while True:
            code = process.poll()
            if code is not None:
                return "" if code == 0 else _ending(code)
            if process.overdue:
                return "stopped at its deadline"
            if self._size() != size or (since == math.inf and current.exists()):
                size, since = self._size(), time.monotonic()
            if time.monotonic() - since > stall:
                return f"stopped: no figure for {stall:g} s"
            time.sleep(POLL)

    def _size(self) -> int:
        return self.results.stat().st_size if self.results.exists() else 0

    def _await(self, names: Sequence[str]) -> None:
        """Waits for the background tasks of these names, and notes how they ended."""
        for process in [process for process in self._background if process.name in names]:
            while process.poll() is None and not process.overdue:
                time.sleep(POLL)
            code = process.poll()
            process.kill()
            self._background.remove(process)
            self._log(process)
            seconds = round(time.monotonic() - process.started, 1)
            if code == 0:
                self._note("report", process.name, values={"seconds": seconds})
            else:
                ended = "stopped at its deadline" if code is None else _ending(code)
                self._note("report", process.name, failed=f"{ended} after {seconds} s")

    def _note(self, section: str, figure: str, **what: Any) -> None:
        record.append(self.results, {"section": section, "figure": figure, "case": {}, **what})

    def _log(self, process: _Process) -> None:
        with open(self.out / LOG, "ab") as log:
            log.write(f"\n==== {process.name} ====\n".encode() + process.printed())


class _Process:
    """A process in a group of its own, what it prints, and when it is overdue."""

    def __init__(
        self, command: Sequence[str], folder: Path, environment: dict[str, str], name: str, seconds: float
    ) -> None:
        self.name = name
        self.started = time.monotonic()
        self._deadline = self.started + seconds
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._tail: deque[bytes] = deque()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        kept = 0
        while chunk := self._process.stdout.read1(8192):  # type: ignore[attr-defined]
            self._tail.append(chunk)
            kept += len(chunk)
            while kept > LOGGED:
                kept -= len(self._tail.popleft())

    @property
    def overdue(self) -> bool:
        return time.monotonic() >= self._deadline

    def poll(self) -> int | None:
        return self._process.poll()

    def kill(self) -> None:
        """Ends the whole group, whoever else it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a driver call may not be interruptible
            self._process.wait(5)
        self._reader.join(1)

    def printed(self) -> bytes:
        return b"".join(list(self._tail))


def _environment(dry: bool) -> dict[str, str]:
    """Of a section: this package first on the path, caches that outlive the report."""
    import beit3_fast

    environment = dict(os.environ)
    package = Path(os.path.dirname(os.path.abspath(beit3_fast.__file__)))  # not resolved: it may be a folder of links
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package.parent), environment.get("PYTHONPATH")]))
    environment.setdefault("TRITON_CACHE_DIR", str(CACHES / "triton"))
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHES / "inductor"))
    if dry:
        environment["CUDA_VISIBLE_DEVICES"] = ""
        environment.setdefault("OMP_NUM_THREADS", "1")
    return environment


def _ending(code: int) -> str:
    return f"died with {signal_name(-code)}" if code < 0 else f"ended with exit code {code}"


def _read_current(file: Path) -> dict[str, Any] | None:
    """Which figure was on its way when the process ended."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """In the block, being told to end is like being interrupted."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
