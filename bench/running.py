"""How the kinds of run are run: the options that they share, checked in one place, and what surrounds their work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .machine import default_device, machine, use_threads
from .outputs import Document, Outputs
from .report import console, count, header
from .timing import check_rounds


@dataclass(frozen=True)
class Options:
    """What the kinds of run share.

    Attributes:
        quick: fewer and smaller cases.
        rounds: of timing; None for the kind's own number.
        threads: of the CPU; None for PyTorch's choice.
        device: "cpu" or "cuda"; None where nothing was said.
        outputs: the files to write.
    """

    quick: bool = False
    rounds: int | None = None
    threads: int | None = None
    device: str | None = None
    outputs: Outputs = field(default_factory=Outputs)

    @classmethod
    def checked(
        cls,
        *,
        quick: bool = False,
        rounds: int | None = None,
        threads: int | None = None,
        device: str | None = None,
        json_file: Path | None = None,
        csv_file: Path | None = None,
        html_file: Path | None = None,
    ) -> Options:
        """The options, as the command line has them.

        Raises:
            ValueError: a count out of range, a device that is not there, a file that cannot be written.
            FileNotFoundError: the folder of a file does not exist.
        """
        if rounds is not None:
            check_rounds(rounds)
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        if device not in (None, "cpu", "cuda"):
            raise ValueError(f"device must be cpu or cuda, got {device!r}")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda is not available: PyTorch sees no CUDA GPU")
        return cls(quick, rounds, threads, device, Outputs.checked(json_file, csv_file, html_file))

    @property
    def place(self) -> torch.device:
        """Where the work is done: a GPU where there is one and nothing else was said."""
        return default_device() if self.device is None else torch.device(self.device)

    @contextlib.contextmanager
    def started(self, **settings: Any) -> Iterator[Running]:
        """Sets the threads and prints what the run is made on; ``settings`` are the kind's own."""
        shown = console()
        with use_threads(self.threads):
            about, settings = machine(self.place), {"device": self.place.type, **settings}
            shown.print(header(about, settings))
            with shown.status("starting") as status:
                yield Running(shown, status.update, about, settings, self.outputs)


@dataclass(frozen=True)
class Running:
    """A run on its way.

    Attributes:
        shown: where tables go.
        progress: shows what is being done.
        machine, settings: for the document.
        outputs: the files to write.
    """

    shown: Console
    progress: Callable[[str], None]
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    outputs: Outputs

    @contextlib.contextmanager
    def kept(
        self, so_far: Callable[[bool], Document], results: Sequence[object], total: int
    ) -> Iterator[Callable[[], None]]:
        """Gives what is to be called after every case. Where the block is left, in whatever way, all is written that
        was done by then, the page too.

        Args:
            so_far: makes the document; it is told whether that is complete.
            results: those that are done.
            total: how many there are to be.
        """

        def document() -> Document:
            return so_far(len(results) == total)

        try:
            yield lambda: self.outputs.keep(document())
        except KeyboardInterrupt:  # the last case may have been on its way to the files
            kept = f"; they are in {self.outputs}" if str(self.outputs) else ""
            self.shown.print(f"interrupted: {len(results)} of {count(total, 'case')} done{kept}", soft_wrap=True)
            raise
        finally:
            self.outputs.finish(document())
