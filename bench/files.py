"""Output files: refused before the work if they cannot be written, whole or absent after it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


def check_writable(path: str | os.PathLike[str], argument: str) -> Path:
    """Returns ``path`` after proving that a file can be created beside it.

    Raises:
        FileNotFoundError: its folder does not exist.
        ValueError: it is a folder, or nothing can be written into its folder. ``argument`` names the option at fault.
    """
    target = Path(path)
    folder = target.parent
    if not folder.exists():
        raise FileNotFoundError(f"{argument}: the folder {str(folder)!r} does not exist")
    if not folder.is_dir():
        raise ValueError(f"{argument}: {str(folder)!r} is not a folder")
    if target.is_dir():
        raise ValueError(f"{argument}: {str(target)!r} is a folder, a file name is needed")
    probe = _beside(target)
    try:
        probe.touch(exist_ok=True)
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"{argument}: nothing can be written into the folder {str(folder)!r}: {error.strerror}"
        ) from error
    return target


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path``; what was written there takes its place if the block succeeds."""
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Writes ``content`` as indented JSON, replacing the file in one step."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _beside(path: Path) -> Path:
    # The suffix stays: writers of pictures choose the format by it.
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
