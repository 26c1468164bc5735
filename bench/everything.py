"""``beit3-fast bench all``: several kinds of run, one after the other, in one document.

The JSON is an object::

    schema     1; raised when a field changes its meaning or goes away
    kind       "all"
    complete   false until the last kind is through
    machine    as in bench model
    settings   device, quick
    runs       the documents of the kinds that ran, in order, each as its own command writes it
    not_run    one object for each kind that did not get through: kind, reason, failed (true when it raised, false when
               something that it needs is not installed)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from .outputs import Document, Outputs

SCHEMA = 1


def run(
    kinds: Mapping[str, Callable[[Outputs], bool]],
    outputs: Outputs,
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    shown: Console,
) -> bool:
    """Runs every kind; True if each of them did or lacks what it needs.

    A kind that raises fails the run and leaves the others alone. An interrupted run keeps what was done.

    Args:
        kinds: by name; each writes its documents to the outputs that it is given and says whether all was right.
    """
    documents: list[Document] = []
    not_run: list[dict[str, Any]] = []
    ends: list[str] = []

    def whole(runs: list[Document], *, complete: bool = False) -> dict[str, Any]:
        about = {"machine": dict(machine), "settings": dict(settings)}
        return {"schema": SCHEMA, "kind": "all", "complete": complete, **about, "runs": runs, "not_run": not_run}

    right = True
    try:
        for name, measure in kinds.items():
            latest: list[Document] = []

            def beside_the_others(document: Document, latest: list[Document] = latest) -> Document:
                latest[:] = [document]
                return whole([*documents, document])

            shown.rule(f"bench {name}")
            try:
                passed = measure(Outputs(outputs.json, outputs.csv, wrap=beside_the_others))
                ends.append("passed" if passed else "FAILED: see its tables")
                right = right and passed
            except ModuleNotFoundError as error:
                ends.append(f"not run: {error}")
                not_run.append({"kind": name, "reason": str(error), "failed": False})
            except Exception as error:  # one kind that cannot run must not take the others with it
                ends.append(f"raised {type(error).__name__}: {error}")
                not_run.append({"kind": name, "reason": f"{type(error).__name__}: {error}", "failed": True})
                right = False
            finally:
                documents.extend(latest)  # what a kind had before it raised or was interrupted counts too
    finally:
        outputs.finish(whole(documents, complete=len(ends) == len(kinds)))
        shown.rule("bench all")
        for name, end in zip(kinds, [*ends, *["not finished"] * (len(kinds) - len(ends))], strict=True):
            shown.print(f"{name}: {end}", soft_wrap=True, markup=False, highlight=False)
    return right
