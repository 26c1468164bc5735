"""Builds the CUDA library for this machine's GPU alone: ``python -m beit3_fast.bench.gpu.library``.

An installation builds it for every architecture, which takes minutes, and with setuptools, which need not be here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import torch

from beit3_fast._extension import LIBRARY_FOLDER

from ..files import replacing, write_json
from .preparation import cores
from .setting import ROOT

LIBRARY = "libbeit3_fast_cuda.so"


def commands(source: Path, work: Path, nvcc: str, capability: tuple[int, int]) -> list[list[str]]:
    """Configure, compile."""
    cmake = _tool("cmake")
    architecture = f"{capability[0]}{capability[1]}-real"
    configure = [
        *(cmake, "-S", str(source), "-B", str(work), "-DCMAKE_BUILD_TYPE=Release"),
        f"-DTORCH_FOLDER={Path(torch.__file__).parent}",
        *(f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architecture}"),
    ]
    if ninja := shutil.which("ninja", path=_path()):
        configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    return [configure, [cmake, "--build", str(work), "--parallel", str(cores()), "--target", "beit3_fast_cuda"]]


def build() -> None:
    """Compiles the library and puts it where the package looks for it.

    Raises:
        FileNotFoundError: this is no checkout, or there is no nvcc or cmake.
        subprocess.CalledProcessError: a command failed; its message is above.
    """
    if not (ROOT / "CMakeLists.txt").is_file():
        raise FileNotFoundError(f"{ROOT} is no checkout: there is nothing to compile")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if nvcc is None:
        raise FileNotFoundError("nvcc is neither on PATH nor in CUDA_HOME")
    LIBRARY_FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for command in commands(ROOT, work, nvcc, torch.cuda.get_device_capability()):
            subprocess.run(command, check=True)
        _put(work / LIBRARY)
    torch.ops.load_library(str(LIBRARY_FOLDER / LIBRARY))
    print(torch.ops.beit3_fast.cuda_build_info())


def _put(built: Path) -> None:
    """Into the package's folder, whole or not at all for who loads it meanwhile; with a note of how it was built."""
    notes = LIBRARY_FOLDER / "build.json"
    record = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
    record["cuda"] = {"built": True, "reason": f"built for the GPU at hand against torch {torch.__version__}"}
    with replacing(LIBRARY_FOLDER / LIBRARY) as temporary:
        shutil.copyfile(built, temporary)
    write_json(notes, record)


def _path() -> str:
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def _tool(name: str) -> str:
    found = shutil.which(name, path=_path())
    if found is None:
        raise FileNotFoundError(f"{name} is not on PATH")
    return found


if __name__ == "__main__":
    try:
        build()
    except FileNotFoundError as error:
        sys.exit(str(error))
