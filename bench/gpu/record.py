"""Figures as lines of JSON, each written in one piece as soon as it is known.

A line says ``section`` and ``figure``, the ``case`` it holds for, and one of three things: ``values``; ``missing``, why
it cannot be had here; ``failed``, what was raised or how the process ended.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]
KINDS = ("values", "missing", "failed")
LONGEST_MESSAGE = 400


class Missing(Exception):
    """A figure that cannot be had on this machine; the message says why."""


class Recorder:
    """Writes one section's figures.

    Args:
        file: of all sections; lines are appended to it.
        section: its name.
        current: says in this file which figure is on its way, so that the driver can blame it for the process's end.
    """

    def __init__(self, file: Path, section: str, current: Path | None = None) -> None:
        self._file = file
        self._current = current
        self.section = section
        # a section that is started again goes on behind what it had
        earlier = read(file) if file.exists() else []
        self._done = {_key(line): line for line in earlier if line["section"] == section}

    def values(self, figure: str, values: Mapping[str, Any], **case: Any) -> None:
        """A figure: numbers, words or truth values by name."""
        self._write(figure, case, "values", dict(values))

    def missing(self, figure: str, reason: str, **case: Any) -> None:
        """A figure that cannot be had here."""
        self._write(figure, case, "missing", reason)

    def failed(self, figure: str, reason: str, **case: Any) -> None:
        """A figure whose computation went wrong."""
        self._write(figure, case, "failed", reason[:LONGEST_MESSAGE])

    def measure(self, figure: str, compute: Callable[[], Mapping[str, Any]], **case: Any) -> Mapping[str, Any] | None:
        """Writes what ``compute`` returns, or that it raised; the values, None if there are none. A figure that has its
        line already is not computed again.

        Raises:
            SystemExit: the GPU does not answer any more. Another process may go on behind this figure.
        """
        done = self._done.get(_key({"section": self.section, "figure": figure, "case": case}))
        if done is not None:
            return done.get("values")
        if self._current is not None:
            self._current.write_text(json.dumps({"figure": figure, "case": case}), encoding="utf-8")
        values = None
        try:
            values = compute()
            self.values(figure, values, **case)
        except Missing as reason:
            self.missing(figure, str(reason), **case)
        except Exception as error:  # one figure that fails must not take the others with it
            self.failed(figure, described(error), **case)
            del error
            _free_memory()
            if not _gpu_answers():
                raise SystemExit("the GPU does not answer after an error") from None
        finally:
            if self._current is not None:
                self._current.unlink(missing_ok=True)
        return values

    def _write(self, figure: str, case: Mapping[str, Any], kind: str, what: Any) -> None:
        line = {"section": self.section, "figure": figure, "case": dict(case), kind: what}
        self._done[_key(line)] = line
        append(self._file, line)


def described(error: BaseException) -> str:
    """The kind of error and its first line that says anything."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"[:LONGEST_MESSAGE]


def append(file: Path, line: Line) -> None:
    """Adds a line in one piece: whoever is killed leaves whole lines behind."""
    text = json.dumps(_finite(line), allow_nan=False) + "\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


def read(file: Path) -> list[Line]:
    """The lines of a file of figures; what is no such line is left out.

    Raises:
        OSError: the file cannot be read.
    """
    return [line for text in file.read_bytes().splitlines() if (line := _parsed(text)) is not None]


def mend(file: Path) -> int:
    """Takes out of the file what is no figure, such as a line that its writer did not finish; how much that was."""
    if not file.exists():
        return 0
    written = file.read_bytes()
    texts = written.splitlines()
    good = [text for text in texts if _parsed(text) is not None]
    whole = b"".join(text + b"\n" for text in good)
    if whole != written:
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_bytes(whole)
        os.replace(temporary, file)
    return len(texts) - len(good)


def _parsed(text: bytes) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or not isinstance(line.get("case"), dict):
        return None
    named = all(isinstance(line.get(name), str) for name in ("section", "figure"))
    return line if named and sum(kind in line for kind in KINDS) == 1 else None


def _key(line: Mapping[str, Any]) -> str:
    return json.dumps([line["section"], line["figure"], line["case"]], sort_keys=True)


def _finite(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _free_memory() -> None:
    import torch

    gc.collect()
    with contextlib.suppress(Exception):
        torch.cuda.empty_cache()


def _gpu_answers() -> bool:
    """False after an error that the process cannot recover from, such as an access outside of memory."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device="cuda").item() == 1)
    except Exception:
        return False
