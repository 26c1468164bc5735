"""The files that a run of the bench leaves behind: JSON, CSV and a page, each checked before the work starts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import table_csv
from .files import check_writable, write_json

Document = Mapping[str, Any]


@dataclass(frozen=True)
class Outputs:
    """Where documents go.

    Attributes:
        json, csv, html: what was asked for with ``--json``, ``--csv`` and ``--html``; None was not.
        wrap: makes the document that is written from the one that is handed over: a run that is a part of a larger one
            writes all that the larger one has.
    """

    json: Path | None = None
    csv: Path | None = None
    html: Path | None = None
    wrap: Callable[[Document], Document] = lambda document: document

    @classmethod
    def checked(
        cls,
        json_file: str | os.PathLike[str] | None = None,
        csv_file: str | os.PathLike[str] | None = None,
        html_file: str | os.PathLike[str] | None = None,
    ) -> Outputs:
        """The files, after proving that they can be written.

        Raises:
            FileNotFoundError: the folder of one does not exist.
            ValueError: one cannot be written.
        """

        def checked(file: str | os.PathLike[str] | None, option: str) -> Path | None:
            return None if file is None else check_writable(file, option)

        return cls(checked(json_file, "--json"), checked(csv_file, "--csv"), checked(html_file, "--html"))

    def keep(self, document: Document) -> None:
        """Writes JSON and CSV, each replaced in one step, so that a run that dies leaves what it had."""
        document = self.wrap(document)
        if self.json is not None:
            write_json(self.json, document)
        if self.csv is not None:
            table_csv.write(self.csv, document)

    def finish(self, document: Document) -> None:
        """Writes the page as well: it takes longer, so it comes once, at the end of a run or where it was stopped."""
        self.keep(document)
        if self.html is not None:
            from .page import write

            write(self.html, [self.wrap(document)])

    def __str__(self) -> str:
        """The files' names, empty when there are none."""
        return ", ".join(str(file) for file in (self.json, self.csv, self.html) if file is not None)
