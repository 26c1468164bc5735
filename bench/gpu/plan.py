"""Which sections there are, in order of value: what is cut off at the end of the time is worth least."""

from __future__ import annotations

from dataclasses import dataclass

BUDGET = 430.0
"""Seconds of a report where nothing else is said."""

FOLDER = "beit3_fast.bench.gpu.sections"


@dataclass(frozen=True)
class Section:
    """A part of the report.

    Attributes:
        name: what ``--section`` takes.
        title: of its table.
        seconds: the most it may take of a report of :data:`BUDGET`; a longer one gives it more in proportion.
        stall: seconds without a figure after which the figure on its way is given up.
        waits: the background tasks that must have ended before it.
        module: with ``run(record, setting)``; by default the one of its name among the sections.
    """

    name: str
    title: str
    seconds: float
    stall: float = 30
    waits: tuple[str, ...] = ()
    module: str = ""

    @property
    def path(self) -> str:
        """The module's dotted name."""
        return self.module or f"{FOLDER}.{self.name}"


ALL = ("library", "warm", "compile")
"""What is prepared in the background: nothing is timed beside it."""

SECTIONS = (
    Section("environment", "what the figures were measured on", 30),
    Section("tests", "tests/gpu", 120, stall=90, waits=("library",)),
    Section("parity", "kernels against float64, and 100 times the same bits", 65, stall=40, waits=("library",)),
    Section("roofs", "what the chip can do", 15, waits=ALL),
    Section("cublas", "every matrix product of a layer by cuBLAS, one call an expert", 35, waits=ALL),
    Section("roles", "our matrix products by tile", 55, waits=ALL),
    Section("attention_norm", "attention and LayerNorm beside PyTorch's", 35, waits=ALL),
    Section("host", "host time and launches of a layer", 20, waits=ALL),
    Section("inference", "the model, eager and in a CUDA graph", 50, stall=40, waits=ALL),
    Section("training", "a training step", 35, stall=40, waits=ALL),
    Section("compiled", "torch.compile", 90, stall=90, waits=ALL),
    Section("tools", "compute-sanitizer and ncu", 120, stall=65, waits=ALL),
)
