"""The C++ probe: what this processor and its memory can do at most, whatever any library makes of them.

``probe.cpp`` is compiled on first use, which takes some ten seconds, into ``$XDG_CACHE_HOME/beit3_fast`` (``~/.cache``
without the variable); the wheel's own libraries depend on no version of Python, this one does. It needs a C++ compiler
(``CXX``, or c++, g++ or clang++ on PATH), pybind11 and Python's headers. Without one of them there is no probe, and
:class:`Unavailable` says why.

The peak of multiply-adds is a ceiling: sums that stay in registers, in the widest form that the processor has, over
the threads' own processor time. No matrix product reaches it. Bandwidth is the best of reading, copying and the triad
``a + s * b``, over arrays that no cache holds.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from .files import replacing

SOURCE = Path(__file__).with_name("probe.cpp")
NAME = "beit3_fast_probe"
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden")
BUILD_SECONDS = 300
LOOP_SECONDS = 0.05
REPETITIONS = 5


class Unavailable(Exception):
    """Why there is no probe, in a few words."""


@dataclass(frozen=True)
class Peak:
    """FLOP a second of multiply-adds in registers: of one thread alone, and of all together."""

    core: float
    all: float


@dataclass(frozen=True)
class Limits:
    """What the probe found: ``peaks`` by dtype, ``memory`` in bytes a second by kind of pass, ``isas`` the instruction
    set that was the fastest for each dtype."""

    peaks: Mapping[torch.dtype, Peak]
    memory: Mapping[str, float]
    isas: Mapping[torch.dtype, str]


def measure(threads: int, array_bytes: int) -> Limits:
    """Measures the CPU with as many threads as asked for, at most one a core.

    Args:
        array_bytes: size of each of the three arrays in memory; far beyond the last cache.

    Raises:
        Unavailable: the probe cannot be built.
        ValueError: ``threads`` below 1.
    """
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    module, threads = load(), min(threads, _cores())
    peaks, isas = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        # The widest is not always the fastest: it may clock lower, or have fewer units.
        rates = {
            isa: Peak(*(module.multiply_adds(isa, dtype == torch.bfloat16, n, LOOP_SECONDS) for n in (1, threads)))
            for isa in module.isas()
        }
        isas[dtype] = max(rates, key=lambda isa: rates[isa].all)
        peaks[dtype] = rates[isas[dtype]]
    a, b, out = (np.empty(max(array_bytes // 4, 1), np.float32) for _ in range(3))
    for array in (a, b, out):
        module.fill(array, 1.0, threads)
    memory = {
        "read": module.read(a, threads, REPETITIONS),
        "copy": module.copy(a, out, threads, REPETITIONS),
        "triad": module.triad(a, b, out, 3.0, threads, REPETITIONS),
    }
    return Limits(peaks, memory, isas)


@functools.cache
def load() -> ModuleType:
    """The compiled probe: from the cache, or compiled now and kept there as far as that can be written.

    Raises:
        Unavailable: there is no compiler, no pybind11 or no header of Python, or the compiler fails.
    """
    command = _command()
    cached = cache_folder() / f"probe-{_key(command)}.so"
    try:
        return _import(cached)
    except (OSError, ImportError):  # not there, or damaged: made anew
        pass
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / cached.name
        _compile(command, built)
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            with replacing(cached) as temporary:
                shutil.copyfile(built, temporary)
        except OSError:
            pass  # compiled again next time
        try:
            return _import(built)  # stays mapped when the folder is gone
        except (OSError, ImportError) as error:
            raise Unavailable(f"the compiled probe cannot be loaded: {error}") from error


def cache_folder() -> Path:
    """Where the compiled probe is kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "beit3_fast"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _command() -> list[str]:
    if os.environ.get("CXX", "").strip():
        compiler = shlex.split(os.environ["CXX"])
    else:
        compiler = [found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))][:1]
    if not compiler or shutil.which(compiler[0]) is None:
        raise Unavailable(f"{compiler[0]} was not found" if compiler else "no C++ compiler was found")
    if find_spec("pybind11") is None:
        raise Unavailable("pybind11 is not installed (pip install 'beit3_fast[bench]')")
    import pybind11

    headers = sysconfig.get_path("include")
    if not (Path(headers) / "Python.h").is_file():
        raise Unavailable(f"Python's headers are not in {headers}")
    return [*compiler, *FLAGS, f"-I{pybind11.get_include()}", f"-I{headers}", str(SOURCE)]


def _key(command: list[str]) -> str:
    """Changes with whatever the compiled file depends on: source, compiler, pybind11 and Python."""
    import pybind11

    version = subprocess.run([*command[: -len(FLAGS) - 3], "--version"], capture_output=True).stdout
    parts = [SOURCE.read_bytes(), version, *(p.encode() for p in (*command, pybind11.__version__, sys.version))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _compile(command: list[str], target: Path) -> None:
    """Compiles into ``target``, whose last bytes are the digest of those before them."""
    try:
        done = subprocess.run(
            [*command, "-o", str(target)], capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"{command[0]} did not compile the probe: {error}") from error
    if done.returncode or not target.is_file():
        lines = done.stderr.strip().splitlines() or ["no message"]
        reason = next((line for line in lines if "error" in line), lines[0])
        raise Unavailable(f"{command[0]} did not compile the probe: {reason}")
    with target.open("r+b") as file:
        file.write(hashlib.sha256(file.read()).digest())


def _import(file: Path) -> ModuleType:
    """The module in ``file``; :class:`ImportError` if it is not whole: a loader may crash on half a file."""
    content = file.read_bytes()
    if hashlib.sha256(content[:-32]).digest() != content[-32:]:
        raise ImportError(f"{file} is damaged")
    spec = spec_from_file_location(NAME, file, loader=ExtensionFileLoader(NAME, str(file)))
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
