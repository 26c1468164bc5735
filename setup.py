"""Packages and the compiled libraries; everything declarative is in pyproject.toml.

csrc/ is compiled by CMake and ninja into beit3_fast/lib/, one library a device:

    libbeit3_fast_cpu.so     where there is a C++ compiler
    libbeit3_fast_cuda.so    where there is nvcc as well; no GPU is needed or asked for

Neither is a Python module: beit3_fast/_extension.py loads them, and torch's stable ABI makes them fit every
torch >= 2.10 and every Python. beit3_fast/lib/build.json records why a part was left out.

Environment:

    BEIT3_FAST_CPP         auto (default): compile if there is a C++ compiler; 1: fail without one; 0: pure Python
    BEIT3_FAST_CUDA        auto (default): compile if there is nvcc; 1: fail without it; 0: leave it out
    TORCH_CUDA_ARCH_LIST   GPU architectures, as for PyTorch ("8.0 9.0a 12.0+PTX"); default: all from 7.5 to 12.0 that
                           nvcc knows, and PTX of the last for newer ones
    CXX, CUDA_HOME         the compilers, if not c++, g++ or clang++ and nvcc on PATH
    CMAKE_BUILD_TYPE       Release (default), or Debug
    MAX_JOBS               compile jobs at a time; default: one a core, as far as memory allows
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
import warnings
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent

# Top-level folders that are installed inside the package: as top-level packages they would shadow others'.
INSIDE = ("kernels", "bench")

MIN_TORCH = (2, 10)
MEMORY_PER_JOB = 3 * 2**30  # nvcc at its largest


def switch(name: str) -> str:
    value = os.environ.get(name, "auto").strip().lower()
    if value not in ("auto", "0", "1"):
        raise SetupError(f"{name} must be auto, 0 or 1, got {os.environ[name]!r}")
    return value


@functools.cache
def skipped() -> dict[str, str | None]:
    """For each library why it is left out, or None if it is to be compiled."""
    cpp, cuda = switch("BEIT3_FAST_CPP"), switch("BEIT3_FAST_CUDA")
    if cpp == "0":
        if cuda == "1":
            raise SetupError("BEIT3_FAST_CUDA=1 needs a C++ compiler, which BEIT3_FAST_CPP=0 rules out")
        return dict.fromkeys(("cpu", "cuda"), "BEIT3_FAST_CPP=0 at build time")
    if find_compiler() is None:
        problem = "no C++ compiler was found at build time"
        for name, value in (("BEIT3_FAST_CPP", cpp), ("BEIT3_FAST_CUDA", cuda)):
            if value == "1":
                raise SetupError(f"{problem}, and {name}=1 asks for one")
        return dict.fromkeys(("cpu", "cuda"), problem)
    if cuda == "0":
        return {"cpu": None, "cuda": "BEIT3_FAST_CUDA=0 at build time"}
    if find_nvcc() is None:
        problem = "nvcc was found neither in CUDA_HOME nor on PATH at build time"
        if cuda == "1":
            raise SetupError(f"{problem}, and BEIT3_FAST_CUDA=1 asks for it")
        return {"cpu": None, "cuda": problem}
    return {"cpu": None, "cuda": None}


def find_compiler() -> list[str] | None:
    """The C++ compiler's command, or None."""
    if os.environ.get("CXX", "").strip():
        command = shlex.split(os.environ["CXX"])
        return command if shutil.which(command[0]) else None
    return next(([path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=os.path.join(home, "bin")) if home else None) or shutil.which("nvcc")


def find_tool(name: str) -> str:
    """A build tool from this Python's environment, which need not be on PATH, or from PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which(name, path=path)
    if found is None:
        raise SetupError(f"{name} is needed to compile csrc/: pip install {name}, or set BEIT3_FAST_CPP=0")
    return found


def find_torch() -> tuple[Path, str]:
    """The folder of the installed torch and its version; torch is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError("torch is needed to compile csrc/: pip install torch first, or set BEIT3_FAST_CPP=0")
    version = importlib.metadata.version("torch")
    if tuple(int(number) for number in re.findall(r"\d+", version)[:2]) < MIN_TORCH:
        raise SetupError(f"csrc/ needs torch >= {'.'.join(map(str, MIN_TORCH))} to compile, found {version}")
    return Path(next(iter(spec.submodule_search_locations))), version


def cuda_architectures(nvcc: str) -> list[str]:
    """Architectures in CMake's notation: "80-real" is code for sm_80, "80-virtual" is PTX."""
    listed = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout.split()
    known = [name.removeprefix("sm_") for name in listed]
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").replace(",", " ").split()
    if not requested:
        numbers = sorted(int(name) for name in known if name.isdigit() and 75 <= int(name) <= 120)
        return [f"{number}-real" for number in numbers] + [f"{numbers[-1]}-virtual"]
    architectures = []
    for entry in requested:
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SetupError(f'TORCH_CUDA_ARCH_LIST must list entries such as 8.0, 9.0a or 12.0+PTX, got "{entry}"')
        major, minor, suffix, ptx = match.groups()
        if major + minor not in known:
            raise SetupError(f"TORCH_CUDA_ARCH_LIST names {entry}, but {nvcc} knows only {', '.join(listed)}")
        architectures.append(f"{major}{minor}{suffix}-real")
        if ptx:
            architectures.append(f"{major}{minor}{suffix}-virtual")
    return architectures


def first_line(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0]


def nvcc_release(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    return f"nvcc {match.group(1)}" if match else "nvcc"


def build_type() -> str:
    requested = os.environ.get("CMAKE_BUILD_TYPE", "Release")
    if requested not in ("Release", "Debug"):
        raise SetupError(f"CMAKE_BUILD_TYPE must be Release or Debug, got {requested!r}")
    return requested


def max_jobs() -> int:
    requested = os.environ.get("MAX_JOBS")
    if requested is not None:
        if not requested.isdigit() or int(requested) < 1:
            raise SetupError(f"MAX_JOBS must be a positive integer, got {requested!r}")
        return int(requested)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores, memory // MEMORY_PER_JOB))


def native_sources() -> list[Path]:
    return [ROOT / "CMakeLists.txt", *sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]


def fingerprint() -> str:
    """Of everything that the libraries follow from but torch: they fit every one that is new enough."""
    nvcc = find_nvcc() if skipped()["cuda"] is None else None
    settings = [skipped(), find_compiler(), nvcc, nvcc and cuda_architectures(nvcc), build_type()]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for path in native_sources():
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class BuildNative(Command):
    """Compile csrc/ into beit3_fast/lib/, and write down what was built."""

    description = "compile the C++ and CUDA libraries"
    user_options: ClassVar = [("build-lib=", None, "where to put them, if not in the source tree")]
    editable_mode = False

    def initialize_options(self) -> None:
        self.build_lib: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_lib", "build_lib"))

    @property
    def folder(self) -> Path:
        return (ROOT if self.editable_mode else Path(str(self.build_lib)).resolve()) / "beit3_fast" / "lib"

    def run(self) -> None:
        for part, reason in skipped().items():
            if reason is not None:
                print(f"beit3_fast: the {part} library is skipped: {reason}", flush=True)
        if self.is_current():
            print("beit3_fast: nothing has changed since the libraries were compiled: they are kept", flush=True)
            return
        work = ROOT / "build" / "cmake"
        record = {part: {"built": reason is None, "reason": reason} for part, reason in skipped().items()}
        if skipped()["cpu"] is None:
            compiled_with = self.compile(work)
            for part, how in compiled_with.items():
                record[part]["reason"] = how
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if skipped()["cpu"] is None:
            self.spawn([find_tool("cmake"), "--install", str(work), "--prefix", str(self.folder), "--strip"])
        temporary = self.folder / "build.json.tmp"
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.folder / "build.json")
        if self.editable_mode:
            self.stamp.write_text(fingerprint(), encoding="utf-8")

    @property
    def stamp(self) -> Path:
        return self.folder / "fingerprint"

    def is_current(self) -> bool:
        """Whether a checkout holds what would be compiled: another environment that uses it, with another torch, need
        not compile it again."""
        built = [part for part, reason in skipped().items() if reason is None]
        return (
            self.editable_mode
            and self.stamp.is_file()
            and all((self.folder / f"libbeit3_fast_{part}.so").is_file() for part in built)
            and self.stamp.read_text(encoding="utf-8") == fingerprint()
        )

    def compile(self, work: Path) -> dict[str, str]:
        """Compile in the folder `work`; returns for each library what it was built with."""
        torch_folder, torch_version = find_torch()
        compiler, nvcc = find_compiler(), find_nvcc()
        assert compiler is not None, "without a compiler the part is skipped"
        options = [f"-DTORCH_FOLDER={torch_folder}"]
        if "CXX" not in os.environ:  # CMake reads CXX itself, arguments included
            options.append(f"-DCMAKE_CXX_COMPILER={compiler[0]}")
        how = {"cpu": f"built by {first_line(*compiler, '--version')} against torch {torch_version}"}
        if skipped()["cuda"] is None:
            assert nvcc is not None, "without nvcc the part is skipped"
            architectures = ";".join(cuda_architectures(nvcc))
            options += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]
            how["cuda"] = f"built by {nvcc_release(nvcc)} against torch {torch_version}"

        jobs = max_jobs()
        cmake, ninja = find_tool("cmake"), find_tool("ninja")
        options += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_BUILD_TYPE={build_type()}"]
        # A cache made with other tools, say those of a build environment that is gone, cannot be continued.
        tools = work / "tools.json"
        described = json.dumps([cmake, *options, os.environ.get("CXX")])
        if not tools.is_file() or tools.read_text(encoding="utf-8") != described:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            tools.write_text(described, encoding="utf-8")
        try:
            subprocess.run([cmake, "-S", str(ROOT), "-B", str(work), *options], check=True)
            subprocess.run([cmake, "--build", str(work), "--parallel", str(jobs)], check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(
                "csrc/ did not compile; the compiler's message is above. BEIT3_FAST_CPP=0 installs without it"
            ) from error
        return how

    # What setuptools asks of a step of `build`, to know what belongs to an editable install.

    def get_outputs(self) -> list[str]:
        return [str(path) for path in self.folder.glob("*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in native_sources()]


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_native", None)]

    def run(self) -> None:
        # What an earlier build left here would go into the wheel: files since deleted, a library since switched off.
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class Wheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        """A library of our own, no Python module: it depends on the platform, but on no version of Python."""
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class WithLibraries(Distribution):
    def has_ext_modules(self) -> bool:
        """Whether the wheel is for one platform."""
        return None in skipped().values()


def packages() -> list[str]:
    found = find_packages(str(ROOT), include=["beit3_fast", "beit3_fast.*"])
    for folder in INSIDE:
        if (ROOT / folder / "__init__.py").is_file():
            found += [f"beit3_fast.{folder}", *(f"beit3_fast.{folder}.{name}" for name in find_packages(folder))]
    return found


# A checkout is where an editable install is meant to be used: the warning about its folders is for others.
warnings.filterwarnings("ignore", message="Editable installation")

setup(
    packages=packages(),
    package_dir={f"beit3_fast.{folder}": folder for folder in INSIDE},
    package_data={
        "beit3_fast": ["data/**", "py.typed"],
        **{f"beit3_fast.{folder}": ["**/*.json", "**/*.cpp", "**/*.html"] for folder in INSIDE},
    },
    distclass=WithLibraries,
    cmdclass={"build": Build, "build_native": BuildNative, "bdist_wheel": Wheel},
)
