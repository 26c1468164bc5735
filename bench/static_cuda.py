"""What nvcc made of the CUDA C++ kernels, for every GPU architecture and without a GPU, held to a budget.

They are in the compiled library, so nothing is compiled here: cuobjdump reads them back. The instantiations of a kernel
template for one size of block count as one, by their worst:

    registers   of a thread
    spills      bytes of stack and local memory a thread; must be 0
    shared      bytes of static shared memory a block; what a launch adds, csrc/cuda/launch.h says and its tests check
    blocks      that registers, static shared memory and warps leave room for on a multiprocessor, and the share of its
                warps (occupancy) that makes

``budget_cuda.json`` holds, per architecture and template, the most instantiations, registers and shared memory.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from rich.table import Table
from rich.text import Text

from .._extension import LIBRARY_FOLDER
from .files import replacing
from .static import RESERVED_SHARED, ROOM, arch_name, blocks_per_multiprocessor

LIBRARY = LIBRARY_FOLDER / "libbeit3_fast_cuda.so"
BUDGET_FILE = Path(__file__).with_name("budget_cuda.json")


@dataclass(frozen=True)
class Kernel:
    """An instantiation for one architecture; `threads` is the size of its largest block."""

    arch: int
    name: str
    threads: int
    registers: int
    spills: int
    shared: int


Key = tuple[int, str, int]
"""Architecture, template, threads of the largest block."""


@dataclass(frozen=True)
class Budget:
    """The most that the instantiations of a template may be and use."""

    kernels: int
    registers: int
    shared: int


@dataclass(frozen=True)
class Row:
    """The worst of a template's instantiations, and every reason why they break the budget."""

    arch: int
    name: str
    threads: int
    kernels: int
    registers: int
    spills: int
    shared: int
    blocks: int | None  # None where an architecture's limits are not known here
    occupancy: float | None
    budget: Budget | None
    problems: tuple[str, ...]


def built_by(library: Path) -> str:
    """The compiler's name and version as the build recorded them beside the library, or "an unknown compiler"."""
    try:
        record = json.loads(library.with_name("build.json").read_text(encoding="utf-8"))["cuda"]["reason"]
    except (OSError, ValueError, KeyError):
        return "an unknown compiler"
    match = re.search(r"nvcc [\d.]+", str(record))
    return match.group() if match else "an unknown compiler"


def inspect(library: Path) -> list[Kernel]:
    """Every kernel in `library`, for every architecture that it has machine code for."""
    threads = _threads(_cuobjdump("-elf", library))
    return [
        Kernel(arch, _template(mangled), threads.get((arch, mangled), 1024), *figures)
        for arch, mangled, figures in _usage(_cuobjdump("-res-usage", library))
    ]


def _cuobjdump(option: str, library: Path) -> Iterator[str]:
    """The lines it prints: with -elf tens of megabytes."""
    command = [triton.knobs.nvidia.cuobjdump.path, option, str(library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)


def _usage(lines: Iterable[str]) -> Iterator[tuple[int, str, tuple[int, int, int]]]:
    """(architecture, mangled name, (registers, spills, static shared memory)) from ``cuobjdump -res-usage``."""
    arch, name = 0, ""
    for line in lines:
        if match := re.match(r"arch = sm_(\d+)", line):
            arch = int(match.group(1))
        elif match := re.match(r"\s*Function (\w+):", line):
            name = match.group(1)
        elif match := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, match.groups())
            yield arch, name, (registers, stack + local, max(0, shared - (RESERVED_SHARED if arch >= 90 else 0)))


def _threads(lines: Iterable[str]) -> dict[tuple[int, str], int]:
    """The threads of the largest block, by architecture and mangled name, from ``cuobjdump -elf``."""
    found: dict[tuple[int, str], int] = {}
    arch, name, wanted = 0, "", False
    for line in lines:
        if line.startswith("arch = sm_"):
            arch = int(line.removeprefix("arch = sm_"))
        elif line.startswith(".nv.info."):
            name = line.removeprefix(".nv.info.").strip()
        elif "EIATTR_" in line:
            wanted = "EIATTR_MAX_THREADS" in line
        elif wanted and "Value:" in line:
            found[arch, name] = math.prod(int(size, 16) for size in line.split()[1:])
            wanted = False
    return found


def _template(mangled: str) -> str:
    """ "reduce" from ``_ZN10beit3_fast4cuda...6reduceIfEEvNS0_15ReduceArgumentsE``: the last of its nested names."""
    rest, name = mangled.removeprefix("_ZN"), mangled
    while match := re.match(r"\d+", rest):
        start, stop = match.end(), match.end() + int(match.group())
        name, rest = rest[start:stop], rest[stop:]
    return name


def run(architectures: Collection[int], update: bool) -> tuple[str, list[Row]]:
    """Who compiled the library and took the budget, in words, and the rows of `architectures` (of all, if empty).

    Args:
        update: take the budget of these architectures from the library.
    """
    taken_with, budget = read_budget(BUDGET_FILE)
    kernels = [kernel for kernel in inspect(LIBRARY) if not architectures or kernel.arch in architectures]
    if update:
        budget, taken_with = new_budget(rows(kernels, {}), budget), built_by(LIBRARY)
        write_budget(BUDGET_FILE, taken_with, budget)
    return f"{built_by(LIBRARY)}, {len(kernels)} kernels; budget of {taken_with}", rows(kernels, budget)


# ---- the budget ------------------------------------------------------------------------------------------------------


def rows(kernels: Iterable[Kernel], budget: Mapping[Key, Budget]) -> list[Row]:
    """The kernels grouped as the budget is and held to it, in the order of architectures and names."""
    groups: dict[Key, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.arch, kernel.name, kernel.threads), []).append(kernel)
    made = []
    for key, group in sorted(groups.items()):
        arch, _, threads = key
        got = Budget(len(group), max(one.registers for one in group), max(one.shared for one in group))
        spills = max(one.spills for one in group)
        blocks = occupancy = None
        if arch in ROOM:
            warps = -(-threads // 32)
            blocks = blocks_per_multiprocessor(arch, got.registers, got.shared, warps)
            occupancy = blocks * warps / ROOM[arch][0]
        allowed = budget.get(key)
        found = [f"spills {spills} bytes"] if spills else []
        if blocks == 0:
            found.append("does not fit on a multiprocessor")
        if allowed is None:
            found.append("no budget; --update writes one")
        else:
            for what, is_, most in zip(asdict(got), asdict(got).values(), asdict(allowed).values(), strict=True):
                if is_ > most:
                    found.append(f"{what} {is_} above {most}")
        row = (got.kernels, got.registers, spills, got.shared, blocks, occupancy, allowed, tuple(found))
        made.append(Row(*key, *row))
    return made


def new_budget(shown: Iterable[Row], old: Mapping[Key, Budget]) -> dict[Key, Budget]:
    """What `shown` needs, in place of all of `old` for its architectures; registers rounded up to eights."""
    fresh = {
        (row.arch, row.name, row.threads): Budget(row.kernels, min(-(-row.registers // 8) * 8, 255), row.shared)
        for row in shown
    }
    architectures = {arch for arch, _, _ in fresh}
    return {key: entry for key, entry in old.items() if key[0] not in architectures} | fresh


def read_budget(path: Path) -> tuple[str, dict[Key, Budget]]:
    """The compiler it was taken with, and the budgets; "nothing" and none if there is no such file."""
    if not path.exists():
        return "nothing", {}
    content = json.loads(path.read_text(encoding="utf-8"))
    compiler = content.pop("nvcc")
    budget = {}
    for arch, entries in content.items():
        for key, entry in entries.items():
            name, threads = key.split()
            budget[int(arch.removeprefix("sm_")), name, int(threads)] = Budget(**entry)
    return compiler, budget


def write_budget(path: Path, compiler: str, budget: Mapping[Key, Budget]) -> None:
    """Writes one line a budget, so that a change can be read."""
    parts = [f'  "nvcc": {json.dumps(compiler)}']
    for arch in sorted({key[0] for key in budget}):
        lines = [
            f"    {json.dumps(f'{name} {threads}')}: {json.dumps(asdict(entry))}"
            for (of, name, threads), entry in sorted(budget.items())
            if of == arch
        ]
        parts.append(f'  "{arch_name(arch)}": {{\n' + ",\n".join(lines) + "\n  }")
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


# ---- how it is shown -------------------------------------------------------------------------------------------------


def table(shown: Iterable[Row]) -> Table:
    """A line a template, size of block and figures, with the architectures that share them; blocks at their fewest."""
    lines: dict[tuple[str, ...], list[Row]] = {}
    for row in sorted(shown, key=lambda row: (row.name, row.threads, row.arch)):
        budget = row.budget
        cells = (
            row.name,
            str(row.threads),
            f"{row.kernels}" + (f" / {budget.kernels}" if budget else ""),
            f"{row.registers}" + (f" / {budget.registers}" if budget else ""),
            str(row.spills),
            f"{row.shared}" + (f" / {budget.shared}" if budget else ""),
        )
        lines.setdefault(cells, []).append(row)
    result = Table(title="CUDA C++", title_justify="left", title_style="bold")
    result.add_column("kernel")
    for heading in ("threads", "kernels", "registers", "spills", "static shared B"):
        result.add_column(heading, justify="right")
    result.add_column("sm_")
    for heading in ("blocks", "occupancy"):
        result.add_column(heading, justify="right")
    for cells, rows_alike in lines.items():
        blocks = [row.blocks for row in rows_alike if row.blocks is not None]
        occupancy = [row.occupancy for row in rows_alike if row.occupancy is not None]
        result.add_row(
            *cells,
            " ".join(str(row.arch) for row in rows_alike),
            str(min(blocks)) if blocks else "",
            f"{min(occupancy):.0%}" if occupancy else "",
            style="bold red" if any(row.problems for row in rows_alike) else None,
        )
    return result


def broken(shown: Iterable[Row]) -> list[Text]:
    """A line for each reason why a budget is broken."""
    return [
        Text(f"{arch_name(row.arch)} {row.name} of {row.threads} threads: {problem}", style="red")
        for row in shown
        for problem in row.problems
    ]


def document(shown: Iterable[Row]) -> list[dict[str, Any]]:
    """The JSON of a run: an object a template and architecture."""
    return [asdict(row) | {"arch": arch_name(row.arch)} for row in shown]
