"""The CPU kernels under the address and undefined-behaviour sanitizers, and for another processor.

``probe_main.cpp`` drives them, at every instruction set: odd widths, no row, one row, misaligned tensors that end where
their memory ends.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .probes import build, compiler

SOURCES = ("attention_probe.cpp", "linear_probe.cpp", "isa_probe.cpp", "probe_main.cpp")
# Without optimisation, which can remove what is wrong before the sanitizers see it, and is slow to compile.
SANITIZE = ["-O0", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    # Nothing here frees what the process ends with, and looking for leaks needs the right to trace.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_kernels_are_clean(tmp_path: Path) -> None:
    (tmp_path / "empty.cpp").write_text("int main() {}\n")
    command = [*compiler(), *SANITIZE, str(tmp_path / "empty.cpp"), "-o", str(tmp_path / "empty")]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("the C++ compiler has no runtime of the sanitizers")
    build(tmp_path / "probes", SOURCES, SANITIZE)
    result = run(tmp_path / "probes")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("baseline: done")

    wrong = run(tmp_path / "probes", "--past-the-end")  # the sanitizer is at work
    assert wrong.returncode != 0
    assert "heap-buffer-overflow" in wrong.stderr


@pytest.mark.slow
def test_aarch64(tmp_path: Path) -> None:
    """Another compiler's code for another processor, emulated."""
    cross, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if cross is None or emulator is None:
        pytest.skip("there is no aarch64-linux-gnu-g++ or no qemu-aarch64")
    build(tmp_path / "probes", SOURCES, ["-O2"], ["-static"], [cross])
    result = run(emulator, tmp_path / "probes")
    assert result.returncode == 0, result.stdout + result.stderr
