"""What setup.py makes of the source tree: the wheel, its tag, the switches and their errors.

Builds run in a copy of the tree, without build isolation, with the tools of this environment.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import beit3_fast

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = ("BEIT3_FAST_CPP", "BEIT3_FAST_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "MAX_JOBS", "CXX")
COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
NVCC = shutil.which("nvcc")

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
needs_nvcc = pytest.mark.skipif(COMPILER is None or NVCC is None, reason="there is no nvcc")


def copy_tree(destination: Path) -> Path:
    """What a fresh checkout holds, as far as a build reads it."""
    destination.mkdir()
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        shutil.copy2(ROOT / name, destination / name)
    for name in ("beit3_fast", "kernels", "bench", "csrc", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "lib") if name == "beit3_fast" else None
        shutil.copytree(ROOT / name, destination / name, ignore=ignored)
    return destination


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_tree(tmp_path_factory.mktemp("source") / "tree")


def run(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """python `command` in `tree`, with none of the build's variables set but `environment`."""
    clean = {name: value for name, value in os.environ.items() if name not in SWITCHES}
    return subprocess.run(
        [sys.executable, *command], cwd=tree, env=clean | environment, capture_output=True, text=True, check=False
    )


def build_wheel(tree: Path, destination: Path, **environment: str) -> Path:
    arguments = [".", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(destination)]
    result = run(tree, "-m", "pip", "wheel", *arguments, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = destination.glob("*.whl")
    return wheel


def native_error(tree: Path, **environment: str) -> str:
    """What the build of the libraries says when it fails."""
    result = run(tree, "setup.py", "-q", "build_native", **environment)
    assert result.returncode != 0, "the build did not fail"
    return result.stderr


def build_record(wheel: Path) -> dict[str, dict[str, object]]:
    with zipfile.ZipFile(wheel) as archive:
        return json.loads(archive.read("beit3_fast/lib/build.json"))


def assert_holds_the_package_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    information = f"beit3_fast-{beit3_fast.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"beit3_fast", information}
    for package, folder in (
        ("beit3_fast", "beit3_fast"),
        ("beit3_fast/kernels", "kernels"),
        ("beit3_fast/bench", "bench"),
    ):
        expected = {f"{package}/{path.relative_to(ROOT / folder)}" for path in (ROOT / folder).rglob("*.py")}
        assert expected <= names
    data = {str(path.relative_to(ROOT)) for path in (ROOT / "beit3_fast" / "data").rglob("*") if path.is_file()}
    assert data <= names
    assert f"{information}/licenses/LICENSE" in names


USE_OUTSIDE_THE_SOURCE_TREE = """
import torch, beit3_fast
from beit3_fast import _extension
assert str(_extension.LIBRARY_FOLDER) == EXPECTED, _extension.LIBRARY_FOLDER
status = _extension.status()
assert status["cpu"].loaded, status
if CUDA:
    assert status["cuda"].loaded, status
    assert torch.ops.beit3_fast.cuda_build_info().endswith("for sm_80 compute_80")
x, weight, bias = torch.randn(5, 40), torch.randn(2, 40), torch.randn(2, 40)
y, total, mean, rstd = torch.ops.beit3_fast.layer_norm(x, None, weight, bias, torch.tensor([0, 2, 5]).int(), 1e-5)
for expert, rows in enumerate((slice(0, 2), slice(2, 5))):
    expected = torch.nn.functional.layer_norm(x[rows], (40,), weight[expert], bias[expert], 1e-5)
    torch.testing.assert_close(y[rows], expected, atol=1e-5, rtol=1e-5)
beit3_fast.info()
"""


@pytest.mark.slow
@needs_compiler
def test_wheel(tree: Path, tmp_path: Path) -> None:
    """All that can be compiled here, quickly and for one GPU architecture: what the wheel holds, and that it works."""
    wheel = build_wheel(tree, tmp_path / "wheel", TORCH_CUDA_ARCH_LIST="8.0+PTX", CMAKE_BUILD_TYPE="Debug")
    assert re.fullmatch(rf"beit3_fast-{re.escape(beit3_fast.__version__)}-py3-none-(?!any)\w+\.whl", wheel.name)
    assert_holds_the_package_alone(wheel)
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    libraries = {path.name for path in installed.rglob("*.so")}
    assert libraries == {"libbeit3_fast_cpu.so"} | ({"libbeit3_fast_cuda.so"} if NVCC else set())

    cuda = NVCC is not None and torch.version.cuda is not None
    header = f"EXPECTED, CUDA = {str(installed / 'beit3_fast' / 'lib')!r}, {cuda}"
    result = run(tmp_path, "-c", header + USE_OUTSIDE_THE_SOURCE_TREE, PYTHONPATH=str(installed))
    assert result.returncode == 0, result.stderr
    assert re.search(r"layer_norm\s+compiled", result.stdout)


@pytest.mark.slow
def test_pure_wheel(tree: Path, tmp_path: Path) -> None:
    wheel = build_wheel(tree, tmp_path / "wheel", BEIT3_FAST_CPP="0")
    assert wheel.name == f"beit3_fast-{beit3_fast.__version__}-py3-none-any.whl"
    assert_holds_the_package_alone(wheel)
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert not list(installed.rglob("*.so"))
    for part in ("cpu", "cuda"):
        assert build_record(wheel)[part] == {"built": False, "reason": "BEIT3_FAST_CPP=0 at build time"}

    program = "import beit3_fast; print(beit3_fast._extension.status()['cpu'])"
    result = run(tmp_path, "-c", program, PYTHONPATH=str(installed))
    assert "loaded=False, reason='not built: BEIT3_FAST_CPP=0 at build time'" in result.stdout, result.stderr


@pytest.mark.slow
def test_without_a_compiler_the_package_is_pure(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    wheel = build_wheel(tree, tmp_path / "wheel", PATH=str(tmp_path / "empty"))
    assert wheel.name.endswith("-py3-none-any.whl")
    assert build_record(wheel)["cpu"] == {"built": False, "reason": "no C++ compiler was found at build time"}


def test_without_nvcc_one_line_says_that_cuda_is_skipped(tree: Path, tmp_path: Path) -> None:
    """Stopped before it compiles: the line comes first."""
    path = folder_with_compiler(tmp_path)
    result = run(tree, "setup.py", "-q", "build_native", PATH=path, MAX_JOBS="0")
    lines = [line for line in result.stdout.splitlines() if "skipped" in line]
    assert lines == [
        "beit3_fast: the cuda library is skipped: nvcc was found neither in CUDA_HOME nor on PATH at build time"
    ]


def folder_with_compiler(tmp_path: Path) -> str:
    """A PATH that leads to a C++ compiler and nothing else."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "c++").symlink_to(COMPILER)
    return str(tmp_path / "bin")


def test_asking_for_cuda_without_nvcc_is_an_error(tree: Path, tmp_path: Path) -> None:
    message = native_error(tree, BEIT3_FAST_CUDA="1", PATH=folder_with_compiler(tmp_path))
    assert "nvcc was found neither in CUDA_HOME nor on PATH" in message
    assert "BEIT3_FAST_CUDA=1 asks for it" in message


@pytest.mark.parametrize("name", ["BEIT3_FAST_CPP", "BEIT3_FAST_CUDA"])
def test_asking_for_compiled_code_without_a_compiler_is_an_error(tree: Path, tmp_path: Path, name: str) -> None:
    message = native_error(tree, **{name: "1"}, PATH=str(tmp_path))
    assert f"no C++ compiler was found at build time, and {name}=1 asks for one" in message


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"BEIT3_FAST_CUDA": "yes"}, "BEIT3_FAST_CUDA must be auto, 0 or 1, got 'yes'"),
        ({"BEIT3_FAST_CPP": "2"}, "BEIT3_FAST_CPP must be auto, 0 or 1, got '2'"),
        ({"BEIT3_FAST_CPP": "0", "BEIT3_FAST_CUDA": "1"}, "BEIT3_FAST_CUDA=1 needs a C++ compiler"),
        pytest.param(
            {"CMAKE_BUILD_TYPE": "fast"}, "CMAKE_BUILD_TYPE must be Release or Debug, got 'fast'", marks=needs_compiler
        ),
        pytest.param({"MAX_JOBS": "0"}, "MAX_JOBS must be a positive integer, got '0'", marks=needs_compiler),
        pytest.param(
            {"TORCH_CUDA_ARCH_LIST": "Ampere"},
            'TORCH_CUDA_ARCH_LIST must list entries such as 8.0, 9.0a or 12.0+PTX, got "Ampere"',
            marks=needs_nvcc,
        ),
        pytest.param({"TORCH_CUDA_ARCH_LIST": "8.0 9.9"}, "TORCH_CUDA_ARCH_LIST names 9.9, but", marks=needs_nvcc),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_an_error(tree: Path, environment: dict[str, str], message: str) -> None:
    assert message in native_error(tree, **environment)


@pytest.mark.slow
def test_an_editable_install_keeps_libraries_that_are_current(tmp_path: Path) -> None:
    """Every other build begins with an empty folder."""
    tree = copy_tree(tmp_path / "tree")
    mark = tree / "beit3_fast" / "lib" / "mark"

    def is_kept(**environment: str) -> bool:
        settings = {"BEIT3_FAST_CPP": "0"} | environment
        result = run(tree, "setup.py", "-q", "editable_wheel", "--dist-dir", str(tmp_path / "dist"), **settings)
        assert result.returncode == 0, result.stderr
        kept = mark.exists()
        mark.touch()
        return kept

    assert not is_kept()
    assert is_kept()
    assert not is_kept(CMAKE_BUILD_TYPE="Debug")
    assert is_kept(CMAKE_BUILD_TYPE="Debug")
    with open(tree / "csrc" / "tensors.h", "a") as header:
        header.write("// another line\n")
    assert not is_kept(CMAKE_BUILD_TYPE="Debug")
    build_wheel(tree, tmp_path / "wheel", BEIT3_FAST_CPP="0", CMAKE_BUILD_TYPE="Debug")
    with zipfile.ZipFile(next((tmp_path / "wheel").glob("*.whl"))) as archive:
        assert not [name for name in archive.namelist() if name.endswith(("mark", "fingerprint"))]


@pytest.mark.slow
@needs_compiler
def test_code_that_does_not_compile_fails_the_build(tmp_path: Path) -> None:
    """Only a missing compiler falls back to the pure package."""
    broken = copy_tree(tmp_path / "tree")
    for source in (broken / "csrc" / "cpu").glob("*.cpp"):  # they need not be waited for
        source.unlink()
    (broken / "csrc" / "register_cpu.cpp").write_text("this is not C++\n")
    message = native_error(broken, BEIT3_FAST_CUDA="0")
    assert "csrc/ did not compile" in message


def test_compiled_layer_norm_serves_the_cpu() -> None:
    library = beit3_fast._extension.status()["cpu"]
    if not library.loaded:
        pytest.skip(f"the CPU library is not loaded: {library.reason}")
    kernels = torch._C._dispatch_dump("beit3_fast::layer_norm").splitlines()
    (cpu,) = [line for line in kernels if line.startswith("CPU:")]
    assert "csrc/register_cpu.cpp" in cpu


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
@pytest.mark.parametrize("part", ["cpu", "cuda"])
def test_nothing_outside_the_stable_abi_is_asked_of_torch_or_python(part: str) -> None:
    library = beit3_fast._extension.LIBRARY_FOLDER / f"libbeit3_fast_{part}.so"
    if not library.is_file():
        pytest.skip(f"the {part} library is not built")
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols), "this looks for the wrong names"
    unstable = re.compile(r"_?Py[A-Z]|_ZN?K?(2at|3c10|5torch|5caffe2)|_ZTI?N(2at|3c10|5torch)")
    assert [symbol for symbol in symbols if unstable.match(symbol)] == []
