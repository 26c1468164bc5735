"""What the compiler makes of every Triton kernel, for every GPU architecture and without a GPU, held to a budget.

Kernels are called on meta tensors inside ``kernels.launch.record``; every distinct launch is compiled as Triton's own
launcher would compile it, and what is in the binary is read back:

    registers   of a thread (gfx942: vector and accumulation registers)
    spills      bytes of stack a thread, or local loads and stores if there is no stack; must be 0
    shared      bytes of a block, static and dynamic, against the architecture's limit
    tensor      the matrix instructions it contains: HMMA, HGMMA (sm_90), UTCHMMA (sm_100), MFMA (gfx942), or none
    wide        the share of global traffic in 128-bit accesses: every global load, store, atomic and asynchronous copy
                of the assembly counts once, with the bytes a thread moves by it. Offsets, biases and statistics are
                narrow and few: they keep the share of a GEMM a little below 1
    blocks      that registers, shared memory and warps leave room for on a multiprocessor, and the share of its warps
                (occupancy) that makes
    hazards     writes to registers that a wgmma may still read (:mod:`.sass_hazards`); there must be none

``budget.json`` holds, per architecture, kernel and kind of number, the most registers and shared memory, the matrix
instructions, and the least share of wide accesses.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from rich.table import Table
from rich.text import Text
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..kernels import attention, decode_attention, multiway_ffn, multiway_linear, routing
from ..kernels.config import SHARED_MEMORY, Config, shared_memory
from ..kernels.launch import Launch, record
from .files import replacing
from .sass_hazards import hazards

SCHEMA = 1
TRITON = version("triton")
BUDGET_FILE = Path(__file__).with_name("budget.json")
ARCHITECTURES = tuple(SHARED_MEMORY)
"""Compute capabilities, 80 for 8.0; 942 is AMD's gfx942."""

Found = TypeVar("Found")

NUMBERS = {
    "bfloat16": (torch.bfloat16, "ieee"),
    "float16": (torch.float16, "ieee"),
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "int64": (torch.int64, "ieee"),
}
"""Kinds of numbers: the dtype of the rows and the precision of fp32 products."""

ROOM = {80: (64, 32), 86: (48, 16), 89: (48, 24), 90: (64, 32), 100: (64, 32), 120: (48, 24)}
"""Warps and blocks a multiprocessor holds (CUDA C++ Programming Guide, technical specifications)."""
EMPTY_ATTRIBUTES = tuple(map(int, TRITON.split(".")[:2])) >= (3, 7)
RESERVED_SHARED = 1024  # of each block, by the system; from sm_90 on the binary counts it as static shared memory


# ---- what is compiled ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A call of an op, forward or (training) forward and backward; two experts.

    Attributes:
        widths: (in, out) of multiway_linear, (width, hidden width) of multiway_ffn, (heads, head width) of the
            attentions.
    """

    op: str
    widths: tuple[int, int] = (768, 3072)
    rows: int = 8 * 210
    gelu: bool = False
    residual: bool = False
    row_index: bool = False
    training: bool = False

    def __str__(self) -> str:
        extras = [name for name in ("gelu", "residual", "row_index", "training") if getattr(self, name)]
        return ", ".join([f"{self.op} {self.widths[0]} -> {self.widths[1]}", f"{self.rows} rows", *extras])


ROUTING = Case("routing")
LINEAR = Case("multiway_linear", gelu=True, residual=True, training=True)
FFN = Case("multiway_ffn", residual=True, training=True)
ATTENTION = Case("attention", (12, 64), training=True)
DECODING = Case("decode_attention", (12, 64), rows=2 * 3 * 2)
CASES = (
    LINEAR,
    FFN,
    ATTENTION,
    DECODING,
    Case("multiway_linear", (768, 2304)),
    Case("multiway_linear", (768, 768), residual=True),
    Case("multiway_linear", row_index=True, training=True),
    Case("multiway_ffn", residual=True),
)
"""BEiT-3 base, 8 samples of 197 + 13 tokens. The first four have every kernel; the rest, fewer or other arguments."""
NUMBERS_RUN = dict.fromkeys(ARCHITECTURES, ("bfloat16",)) | {80: ("bfloat16", "float32"), 90: ("bfloat16", "tf32")}
"""Without --all: fp16 becomes the same code as bf16, and fp32 differs little between architectures."""
CASES_RUN = dict.fromkeys(ARCHITECTURES, CASES[:4]) | dict.fromkeys((80, 90, 100), CASES) | {942: CASES[:2]}
"""Without --all: 86, 89 and 120 run the code of 80 in less shared memory. Attention spills 28 to 284 bytes on
gfx942, at 160 of 512 registers and with any number of warps and stages; there it is not used."""


def calls(arch: int, everything: bool) -> Iterator[tuple[Case, str, dict[str, Config], bool]]:
    """(case, numbers, configs other than the default ones, whether there is a budget) of every call for `arch`.

    Args:
        everything: add all numbers, row counts and valid configs, which have no budget.
    """
    yield ROUTING, "int64", {}, True
    for numbers in NUMBERS_RUN[arch]:
        yield from ((case, numbers, {}, True) for case in CASES_RUN[arch])
    if not everything:
        return
    for numbers in ("bfloat16", "float16", "float32", "tf32"):
        for case in (*CASES, replace(FFN, row_index=True)):
            for call in (case, replace(case, training=True), replace(case, rows=2 * 210, training=True)):
                yield call, numbers, {}, False
        for case in (LINEAR, FFN):
            valid = _OPS[case.op][0].valid_configs(arch, NUMBERS[numbers][0], *case.widths)
            for role, configs in valid.items():
                yield from ((case, numbers, {role: config}, False) for config in configs)


def launches(case: Case, numbers: str, arch: int, configs: Mapping[str, Config] | None = None) -> list[Launch]:
    """The launches of a call, with `configs` in place of the default ones for `arch`."""
    dtype, precision = NUMBERS[numbers]
    kernels, call = _OPS[case.op]
    options: dict[str, Any] = {}
    if case.op in ("attention", "decode_attention"):
        options = {"precision": precision}
    elif case.op != "routing":
        defaults = kernels.default_configs(arch, dtype, case.rows, 2, *case.widths)
        options = {"precision": precision, "configs": defaults | dict(configs or {})}
    with record() as launched:
        call(case, dtype, options)
    return launched


def _meta(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _linear(case: Case, dtype: torch.dtype, options: dict[str, Any]) -> None:
    rows, (in_width, out_width) = case.rows, case.widths
    x, y = _meta(rows, in_width, dtype=dtype), _meta(rows, out_width, dtype=dtype)
    weight, bias = _meta(2, out_width, in_width, dtype=dtype), _meta(2, out_width, dtype=dtype)
    index, residual = _meta(rows) if case.row_index else None, y if case.residual else None
    _, pre = multiway_linear.forward(x, weight, bias, _meta(3), case.gelu, residual, index, case.training, **options)
    if case.training:
        multiway_linear.backward(y, x, weight, _meta(3), pre if case.gelu else None, index, **options)


def _ffn(case: Case, dtype: torch.dtype, options: dict[str, Any]) -> None:
    rows, (width, hidden) = case.rows, case.widths
    x = _meta(rows, width, dtype=dtype)
    fc1_weight, fc2_weight = _meta(2, hidden, width, dtype=dtype), _meta(2, width, hidden, dtype=dtype)
    wide, narrow = _meta(2, hidden, dtype=dtype), _meta(2, width, dtype=dtype)
    index, residual = _meta(rows) if case.row_index else None, x if case.residual else None
    _, *saved = multiway_ffn.forward(
        x, fc1_weight, wide, wide, wide, fc2_weight, narrow, _meta(3), residual, index, save=case.training, **options
    )
    if case.training:
        multiway_ffn.backward(x, x, fc1_weight, wide, wide, fc2_weight, _meta(3), index, *saved, **options)


def _attention(case: Case, dtype: torch.dtype, options: dict[str, Any]) -> None:
    heads, head_width = case.widths
    qkv, segments = _meta(case.rows, 3, heads, head_width, dtype=dtype), _meta(8, 4)
    arguments = segments, "captioning", head_width**-0.5, 210
    out, lse = attention.forward(qkv, *arguments, case.training, **options)
    if case.training:
        attention.backward(out, qkv, out, lse, *arguments, **options)


def _decode_attention(case: Case, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Two images of 901 tokens, three beams of two tokens each."""
    qkv = _meta(case.rows, 3, *case.widths, dtype=dtype)
    prefix, words = _meta(2 * 901, 2, *case.widths, dtype=dtype), _meta(20, 6, 2, *case.widths, dtype=dtype)
    decode_attention.forward(qkv, prefix, _meta(2, 4), words, _meta(20, 6), 10, 0.125, 901, **options)


def _routing(case: Case, dtype: torch.dtype, options: dict[str, Any]) -> None:
    routing.forward(_meta(case.rows, dtype=dtype), 2)


_OPS: dict[str, tuple[Any, Callable[[Case, torch.dtype, dict[str, Any]], None]]] = {
    "multiway_linear": (multiway_linear, _linear),
    "multiway_ffn": (multiway_ffn, _ffn),
    "attention": (attention, _attention),
    "decode_attention": (decode_attention, _decode_attention),
    "routing": (routing, _routing),
}


# ---- compiling -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """Everything the binary of a launch depends on; the same for launches that share one.

    Attributes:
        kernel: module and name.
        signature: Triton's type of each parameter, by name.
        constants: the value of each "constexpr" parameter.
        divisible: positions of the pointers and integers that are known to be divisible by 16.
        options: num_warps and the like.
    """

    kernel: tuple[str, str]
    numbers: str
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel[1].strip("_").removesuffix("_kernel")

    @property
    def config(self) -> str:
        """Tile, warps and stages, as :class:`Config` writes them."""
        sizes = [str(value) for name, value in self.constants if re.fullmatch(r"BLOCK(_[MNK])?", name)]
        letters = {"num_warps": "w", "num_stages": "s"}
        return " ".join(["x".join(sizes), *(letters[name] + str(n) for name, n in self.options if name in letters)])


_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def build_of(launch: Launch, numbers: str, arch: int) -> Build:
    """Specialises a launch as Triton's launcher does; allocations are taken to begin at multiples of 16 bytes."""
    params = launch.kernel.params
    given = dict(zip((param.name for param in params), launch.args, strict=False))
    options = dict(launch.options)
    signature, constants, divisible = {}, {}, []
    for position, param in enumerate(params):
        value = given[param.name] if param.name in given else options.pop(param.name)
        if param.is_constexpr or value is None or (_is_number(value) and value == 1 and not param.do_not_specialize):
            signature[param.name], constants[param.name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[param.name] = "*" + _TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif _is_number(value):
            signature[param.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            aligned = value % 16 == 0
        elif isinstance(value, float):
            signature[param.name], aligned = "fp32", False
        else:
            raise TypeError(
                f"{launch.kernel.__name__} got {type(value).__name__} for {param.name}; unknown to this bench"
            )
        if aligned and not param.do_not_specialize:
            divisible.append(position)
    return Build(
        (launch.kernel.fn.__module__, launch.kernel.__name__),
        numbers,
        arch,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple(options.items()),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def compiled(build: Build) -> Any:
    """Triton's compiled kernel; from its disk cache if it is there, where the launcher finds it too."""
    target = GPUTarget("hip", "gfx942", 64) if build.arch == 942 else GPUTarget("cuda", build.arch, 32)
    return triton.compile(source(build), target=target, options=dict(build.options))


def source(build: Build) -> ASTSource:
    """What Triton's launcher would compile, to the letter: the cache goes by the text of all this."""
    kernel = getattr(importlib.import_module(build.kernel[0]), build.kernel[1])
    constants = dict(build.constants)
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for position, (param, (name, kind)) in enumerate(zip(kernel.params, build.signature, strict=True)):
        if kind == "constexpr":  # has no attributes: an empty list, which Triton 3.6 left out unless it is a text
            described = EMPTY_ATTRIBUTES or isinstance(constants[name], str)
        else:
            described = kind != "fp32" and not param.do_not_specialize
        if described:
            attributes[(position,)] = [["tt.divisibility", 16]] * (position in build.divisible)
            if build.arch == 942 and kind.startswith("*"):  # buffers below 2 GB: 32-bit offsets reach all of them
                attributes[(position,)].append(["tt.pointer_range", 32])
    return ASTSource(kernel, dict(build.signature), constants, attributes)


# ---- what is in the binary -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """Described above; `blocks` and `occupancy` are None where the limits are not known, `failure` may be a reason.
    `hazards` are in words."""

    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor: str | None = None
    wide: float = 1.0
    blocks: int | None = None
    occupancy: float | None = None
    failure: str | None = None
    hazards: tuple[str, ...] = ()


def measure(build: Build) -> Measured:
    """Compiles and inspects; a compiler's error is an outcome here, not an exception."""
    try:
        kernel = compiled(build)
    except Exception as error:  # Triton and LLVM raise many kinds
        return Measured(failure=_first_line(error))
    return inspect_amd(kernel) if build.arch == 942 else inspect_nvidia(kernel, build.arch)


def why_not(build: Build) -> str | None:
    """Compiles, into Triton's disk cache. Why the build must not run: a compiler's error, a hazard; None if it may."""
    try:
        kernel = compiled(build)
    except Exception as error:  # Triton and LLVM raise many kinds
        return _first_line(error)
    if build.arch != 90:  # no other has wgmma
        return None
    found = _hazards(_cuobjdump("-sass", kernel.asm["cubin"]))
    return f"hazard: {found[0]}" if found else None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def inspect_nvidia(kernel: Any, arch: int) -> Measured:
    """Reads a cubin with the cuobjdump that comes with Triton."""
    usage, assembly = (_cuobjdump(option, kernel.asm["cubin"]) for option in ("-res-usage", "-sass"))
    found = [dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)) for line in usage.splitlines() if "REG:" in line]
    registers, stack, static, local = (
        max(int(line[name]) for line in found) for name in ("REG", "STACK", "SHARED", "LOCAL")
    )
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", assembly, re.M)
    names = [opcode.partition(".")[0] for opcode in opcodes]
    spill_accesses = sum(name in ("LDL", "STL") for name in names)
    shared = kernel.metadata.shared + max(0, static - (RESERVED_SHARED if arch >= 90 else 0))
    blocks = blocks_per_multiprocessor(arch, registers, shared, kernel.metadata.num_warps)
    return Measured(
        registers,
        max(stack, local) or spill_accesses,
        shared,
        _kinds(name for name in names if re.fullmatch(r"[HQIDO]G?MMA|UTC\w*MMA", name)),
        _wide(_sass_bytes(opcode) for opcode in opcodes if re.match(r"(LDG|STG|LDGSTS|LD|ST|ATOMG?|REDG?)\b", opcode)),
        blocks,
        blocks * kernel.metadata.num_warps / ROOM[arch][0],
        hazards=_hazards(assembly),
    )


def _hazards(assembly: str) -> tuple[str, ...]:
    """In words. Code that cannot be followed is one: nobody has seen that it is safe."""
    try:
        return tuple(map(str, hazards(assembly)))
    except ValueError as error:
        return (str(error),)


def inspect_amd(kernel: Any) -> Measured:
    """Reads the assembly text and the resource table in it."""
    assembly = kernel.asm["amdgcn"]
    table = {name: int(count) for name, count in re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", assembly, re.M)}
    opcodes = re.findall(r"^\s+((?:global|buffer|flat)_(?:load|store|atomic)\w+|v_s?mfmac?_\w+)", assembly, re.M)
    return Measured(
        table["vgpr_count"] + table["agpr_count"],
        max(table["private_segment_fixed_size"], 4 * (table["vgpr_spill_count"] + table["sgpr_spill_count"])),
        kernel.metadata.shared,
        _kinds("MFMA" for opcode in opcodes if "mfma" in opcode),
        _wide(_amd_bytes(opcode) for opcode in opcodes if "mfma" not in opcode),
    )


def blocks_per_multiprocessor(arch: int, registers: int, shared: int, warps: int) -> int:
    """How many blocks run at a time; registers are given out in eights to each of the warps, warps in fours."""
    most_warps, most_blocks = ROOM[arch]
    rounded = -(-warps // 4) * 4
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * rounded)
    by_shared = (shared_memory(arch) + RESERVED_SHARED) // (shared + RESERVED_SHARED)
    return min(most_blocks, most_warps // rounded, by_registers, by_shared)


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _kinds(names: Iterable[str]) -> str | None:
    return "+".join(sorted(set(names))) or None


def _sass_bytes(opcode: str) -> int:
    """Bytes a thread moves: "LDG.E.128" 16, "STG.E.U16" 2, "LDG.E" 4. (In "LTC128B" 128 is not the width.)"""
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
    return next((widths[part] for part in opcode.split(".") if part in widths), 4)


def _amd_bytes(opcode: str) -> int:
    match = re.search(r"_dwordx(\d)", opcode)
    if match:
        return 4 * int(match.group(1))
    return 4 if "dword" in opcode else 2 if "short" in opcode else 1 if "byte" in opcode else 4


def _wide(widths: Iterable[int]) -> float:
    sizes = list(widths)
    return sum(size for size in sizes if size >= 16) / sum(sizes) if sizes else 1.0


# ---- a run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """A build, the call it was first met in, whether that has a budget, and what became of it."""

    build: Build
    call: str
    budgeted: bool
    measured: Measured


def plan(architectures: Sequence[int], everything: bool = False) -> dict[Build, tuple[str, bool]]:
    """Every distinct build, with the first call that needs it and whether that call has a budget."""
    wanted: dict[Build, tuple[str, bool]] = {}
    for arch in architectures:
        for case, numbers, configs, budgeted in calls(arch, everything):
            for launch in launches(case, numbers, arch, configs):
                wanted.setdefault(build_of(launch, numbers, arch), (str(case), budgeted))
    return wanted


def run(
    wanted: Mapping[Build, tuple[str, bool]], workers: int, progress: Callable[[str], object] = lambda message: None
) -> list[Result]:
    """Compiles and inspects what :func:`plan` planned, in the plan's order.

    Args:
        workers: processes; 1 for this one.
        progress: told how far it is.
    """
    measured: dict[Build, Measured] = {}

    def note(build: Build, outcome: Measured) -> None:
        measured[build] = outcome
        progress(
            f"{len(measured)} of {len(wanted)} compiled, last {build.name} {build.config} for {arch_name(build.arch)}"
        )

    with each_in_processes(measure, workers) as measured_each:
        for build, outcome in measured_each(wanted):
            note(build, outcome)
    return [Result(build, call, budgeted, measured[build]) for build, (call, budgeted) in wanted.items()]


@contextlib.contextmanager
def each_in_processes(
    function: Callable[[Build], Found], workers: int
) -> Iterator[Callable[[Iterable[Build]], Iterator[tuple[Build, Found]]]]:
    """Gives a function that calls `function` for every build and yields (build, result) as they come.

    Args:
        workers: processes, which live as long as the block; 1 for this one.
    """
    if workers == 1:
        yield lambda builds: ((build, function(build)) for build in builds)
        return
    # "spawn": a fork of a process in which PyTorch has started threads may hang
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:

        def each(builds: Iterable[Build]) -> Iterator[tuple[Build, Found]]:
            futures = {pool.submit(function, build): build for build in builds}
            for future in as_completed(futures):
                yield futures[future], future.result()

        yield each


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- the budget ------------------------------------------------------------------------------------------------------


Key = tuple[int, str, str]
"""Architecture, kernel, kind of numbers."""


@dataclass(frozen=True)
class Budget:
    """Of one kernel's builds for one kind of number and one architecture; `wide` is the least, the rest the most."""

    registers: int
    shared: int
    tensor: str | None
    wide: float


@dataclass(frozen=True)
class Row:
    """The worst of the builds that share a budget, and every reason why they break it."""

    arch: int
    name: str
    numbers: str
    results: tuple[Result, ...]
    budget: Budget | None
    problems: tuple[str, ...]

    def worst(self) -> Measured:
        """Each figure at its worst."""
        outcomes = [result.measured for result in self.results]
        blocks = [outcome.blocks for outcome in outcomes if outcome.blocks is not None]
        occupancy = [outcome.occupancy for outcome in outcomes if outcome.occupancy is not None]
        return Measured(
            max(outcome.registers for outcome in outcomes),
            max(outcome.spills for outcome in outcomes),
            max(outcome.shared for outcome in outcomes),
            _kinds(outcome.tensor for outcome in outcomes if outcome.tensor),
            min(outcome.wide for outcome in outcomes),
            min(blocks, default=None),
            min(occupancy, default=None),
            hazards=tuple(hazard for outcome in outcomes for hazard in outcome.hazards),
        )


def _key(result: Result) -> Key:
    return result.build.arch, result.build.name, result.build.numbers


def rows(results: Iterable[Result], budget: Mapping[Key, Budget]) -> list[Row]:
    """The results that have a budget, grouped as it is and held to it."""
    groups: dict[Key, list[Result]] = {}
    for result in results:
        if result.budgeted:
            groups.setdefault(_key(result), []).append(result)
    made = []
    for key, group in groups.items():
        allowed = budget.get(key)
        found = [] if allowed else ["no budget; --update writes one"]
        found += [problem for result in group for problem in problems(result, allowed)]
        made.append(Row(*key, tuple(group), allowed, tuple(dict.fromkeys(found))))
    return made


def problems(result: Result, allowed: Budget | None = None) -> list[str]:
    """Why a build must not be: what no build may do and, with a budget, what that forbids."""
    build, got = result.build, result.measured
    where = f"{build.config} in {result.call}"
    if got.failure is not None:
        return [f"does not compile: {got.failure} ({where})"]
    found = [f"spills {got.spills} bytes ({where})"] if got.spills else []
    if got.hazards:
        more = f" and {len(got.hazards) - 1} more" if len(got.hazards) > 1 else ""
        found.append(f"hazard: {got.hazards[0]}{more} ({where})")
    limit = shared_memory(build.arch)
    if got.shared > limit:
        found.append(f"shared memory {got.shared} above the architecture's {limit} ({where})")
    if allowed is None:
        return found
    if got.registers > allowed.registers:
        found.append(f"registers {got.registers} above {allowed.registers} ({where})")
    if got.shared > allowed.shared:
        found.append(f"shared memory {got.shared} above {allowed.shared} ({where})")
    if got.tensor != allowed.tensor:
        found.append(f"tensor-core instructions {got.tensor}, not {allowed.tensor} ({where})")
    if got.wide < allowed.wide:
        found.append(f"128-bit share {got.wide:.3f} below {allowed.wide} ({where})")
    return found


def read_budget(path: Path) -> tuple[str, dict[Key, Budget]]:
    """The Triton version it was taken with, and the budgets by (architecture, kernel, numbers)."""
    content = json.loads(path.read_text(encoding="utf-8"))
    budget = {}
    for arch in ARCHITECTURES:
        for key, entry in content.get(arch_name(arch), {}).items():
            name, numbers = key.split()
            budget[arch, name, numbers] = Budget(**entry)
    return content["triton"], budget


def new_budget(results: Iterable[Result], old: Mapping[Key, Budget]) -> dict[Key, Budget]:
    """What the results need, in place of all of `old` for their architectures.

    Registers are rounded up to what the hardware gives out, shares down to hundredths: another compiler's last register
    breaks nothing.
    """
    fresh = rows(results, {})
    architectures = {row.arch for row in fresh}
    budget = {key: entry for key, entry in old.items() if key[0] not in architectures}
    for row in fresh:
        worst = row.worst()
        registers = min(-(-worst.registers // 8) * 8, 512 if row.arch == 942 else 255)
        wide = int(worst.wide * 100) / 100
        budget[row.arch, row.name, row.numbers] = Budget(registers, worst.shared, worst.tensor, wide)
    return budget


def write_budget(path: Path, budget: Mapping[Key, Budget]) -> None:
    """Writes one line a budget, so that a change can be read."""
    parts = [f'  "triton": {json.dumps(TRITON)}']
    for arch in ARCHITECTURES:
        lines = [
            f"    {json.dumps(f'{name} {numbers}')}: {json.dumps(asdict(entry))}"
            for (of, name, numbers), entry in sorted(budget.items())
            if of == arch
        ]
        if lines:
            parts.append(f'  "{arch_name(arch)}": {{\n' + ",\n".join(lines) + "\n  }")
    with replacing(path) as temporary:
        temporary.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


# ---- how it is shown -------------------------------------------------------------------------------------------------


def arch_name(arch: int) -> str:
    """``sm_80``, ``gfx942``"""
    return f"gfx{arch}" if arch == 942 else f"sm_{arch}"


def table(arch: int, shown: Iterable[Row]) -> Table:
    """One architecture's rows."""
    limit = shared_memory(arch)
    result = Table(title=f"{arch_name(arch)}, {limit // 1024} KB of shared memory a block", title_justify="left")
    result.title_style = "bold"
    result.add_column("kernel")
    result.add_column("numbers")
    for heading in ("builds", "registers", "spills", "shared KB"):
        result.add_column(heading, justify="right")
    result.add_column("tensor cores")
    for heading in ("128-bit", "blocks", "occupancy"):
        result.add_column(heading, justify="right")
    for row in shown:
        worst, budget = row.worst(), row.budget
        cells = [
            row.name,
            row.numbers,
            str(len(row.results)),
            f"{worst.registers}" + (f" / {budget.registers}" if budget else ""),
            str(worst.spills),
            f"{worst.shared / 1024:.1f}" + (f" / {budget.shared / 1024:.1f}" if budget else ""),
            worst.tensor or "none",
            f"{worst.wide:.0%}" + (f" / {budget.wide:.0%}" if budget else ""),
            "" if worst.blocks is None else str(worst.blocks),
            "" if worst.occupancy is None else f"{worst.occupancy:.0%}",
        ]
        result.add_row(*cells, style="bold red" if row.problems else None)
    return result


def broken(shown: Iterable[Row]) -> list[Text]:
    """A line for each reason why a budget is broken."""
    return [
        Text(f"{arch_name(row.arch)} {row.name} {row.numbers}: {problem}", style="red")
        for row in shown
        for problem in row.problems
    ]


def unfit(results: Iterable[Result]) -> list[Text]:
    """For each kernel a line of the configs that spill, do not fit, do not compile or have hazards, wherever they were
    met."""
    found: dict[Key, dict[str, str]] = {}
    for result in results:
        build, got = result.build, result.measured
        if problems(result):
            found.setdefault(_key(result), {})[build.config] = _why_unfit(got)
    return [
        Text(
            f"{arch_name(arch)} {name} {numbers}: {len(configs)} unfit: "
            + ", ".join(f"{config} ({why})" for config, why in sorted(configs.items()))
        )
        for (arch, name, numbers), configs in found.items()
    ]


def _why_unfit(got: Measured) -> str:
    if got.failure:
        return "fails"
    if got.hazards:
        return f"{len(got.hazards)} hazards"
    return f"{got.spills} B" if got.spills else f"{got.shared} B of shared memory"


def document(results: Iterable[Result], budget: Mapping[Key, Budget]) -> dict[str, Any]:
    """The JSON of a run: schema, kind "static", the Triton version, and one object a build."""
    return {
        "schema": SCHEMA,
        "kind": "static",
        "triton": TRITON,
        "results": [
            {
                "arch": arch_name(result.build.arch),
                "kernel": result.build.name,
                "numbers": result.build.numbers,
                "config": result.build.config,
                "call": result.call,
                "budgeted": result.budgeted,
                **asdict(result.measured),
                "problems": problems(result, budget.get(_key(result)) if result.budgeted else None),
            }
            for result in results
        ],
    }
