"""What bench static reads out of the CUDA library: cuobjdump's text, and the library itself if it is built."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
from beit3_fast.bench import static, static_cuda
from beit3_fast.bench.static_cuda import Budget, Kernel
from click.testing import CliRunner

from beit3_fast.cli import main

SCOPE = "_ZN10beit3_fast4cuda55_GLOBAL__N__d58e26b6_22_layer_norm_backward_cu_7d753e1c"
REDUCE = SCOPE + "6reduceIfEEvNS0_15ReduceArgumentsE"
LOOP = SCOPE + "13backward_loopI13__nv_bfloat16Li8EEEvNS0_17BackwardArgumentsE"
USAGE = f"""
Fatbin elf code:
================
arch = sm_80
host = linux

Resource usage:
 Common:
  GLOBAL:0
 Function {REDUCE}:
  REG:32 STACK:0 SHARED:8192 LOCAL:0 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90

 Function {REDUCE}:
  REG:38 STACK:0 SHARED:9216 LOCAL:0 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function {LOOP}:
  REG:64 STACK:16 SHARED:1536 LOCAL:8 CONSTANT[0]:408 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
INFO = """
.nv.info.{name}
\t<0x1>
\tAttribute:	EIATTR_CUDA_API_VERSION
\tFormat:	EIFMT_SVAL
\tValue:	0x82
\t<0x2>
\tAttribute:	EIATTR_MAX_THREADS
\tFormat:	EIFMT_SVAL
\tValue:	0x20 0x10 0x1
"""
ELF = f"arch = sm_80\n{INFO.format(name=REDUCE)}\narch = sm_90\n{INFO.format(name=REDUCE)}{INFO.format(name=LOOP)}"
GOOD = Kernel(80, "reduce", 512, 32, 0, 8192)
KEY = (80, "reduce", 512)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: no compiler")


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A library that is what USAGE and ELF say, and a budget file of its own."""
    library, texts = tmp_path / "libbeit3_fast_cuda.so", {"-res-usage": USAGE, "-elf": ELF}
    library.touch()
    (tmp_path / "build.json").write_text('{"cuda": {"built": true, "reason": "built by nvcc 13.0.88 against torch"}}')
    monkeypatch.setattr(static_cuda, "LIBRARY", library)
    monkeypatch.setattr(static_cuda, "BUDGET_FILE", tmp_path / "budget_cuda.json")
    monkeypatch.setattr(static_cuda, "_cuobjdump", lambda option, path: iter(texts[option].splitlines()))
    return library


def test_what_cuobjdump_says(fake):
    """From sm_90 on, 1 KB of the static memory is the system's."""
    assert static_cuda.inspect(fake) == [
        GOOD,
        Kernel(90, "reduce", 512, 38, 0, 8192),
        Kernel(90, "backward_loop", 512, 64, 24, 512),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"registers": 41}, "registers 41 above 40"),
        ({"shared": 8193}, "shared 8193 above 8192"),
        ({"spills": 8}, "spills 8 bytes"),
    ],
)
def test_each_figure_is_held_to_the_budget(change, message):
    (row,) = static_cuda.rows([GOOD, replace(GOOD, **change)], {KEY: Budget(2, 40, 8192)})
    assert row.problems == (() if message is None else (message,))
    assert [line.plain for line in static_cuda.broken([row])] == (
        [] if message is None else [f"sm_80 reduce of 512 threads: {message}"]
    )


def test_more_instantiations_than_the_budget_has():
    (row,) = static_cuda.rows([GOOD, GOOD], {KEY: Budget(1, 40, 8192)})
    assert row.problems == ("kernels 2 above 1",)


def test_blocks_of_a_multiprocessor():
    """None where its limits are not known here, which is no failure; no room at all is one."""
    allowed = Budget(1, 255, 1 << 20)
    (row,) = static_cuda.rows([GOOD], {KEY: allowed})
    assert (row.blocks, row.occupancy) == (4, 1.0)
    (unknown,) = static_cuda.rows([replace(GOOD, arch=88)], {(88, "reduce", 512): allowed})
    assert (unknown.blocks, unknown.occupancy, unknown.problems) == (None, None, ())
    (row,) = static_cuda.rows([replace(GOOD, registers=129)], {KEY: allowed})
    assert row.problems == ("does not fit on a multiprocessor",)


def test_a_new_budget_replaces_an_architecture_and_passes(tmp_path):
    kernels = [GOOD, replace(GOOD, registers=33)]
    old = {(80, "gone", 128): Budget(1, 8, 0), (90, "kept", 128): Budget(1, 8, 0)}
    budget = static_cuda.new_budget(static_cuda.rows(kernels, {}), old)
    assert budget == {KEY: Budget(2, 40, 8192), (90, "kept", 128): Budget(1, 8, 0)}
    assert [row.problems for row in static_cuda.rows(kernels, budget)] == [()]
    static_cuda.write_budget(tmp_path / "budget.json", "nvcc 1.2", budget)
    assert static_cuda.read_budget(tmp_path / "budget.json") == ("nvcc 1.2", budget)
    lines = (tmp_path / "budget.json").read_text().splitlines()
    assert '    "reduce 512": {"kernels": 2, "registers": 40, "shared": 8192}' in lines


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_triton_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(static, "plan", lambda *arguments: {})


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", "static", *map(str, arguments)])


def test_update_then_pass_then_break(fake, no_triton_kernels, monkeypatch, tmp_path):
    monkeypatch.setattr(static, "BUDGET_FILE", tmp_path / "budget.json")
    static.write_budget(static.BUDGET_FILE, {})
    missing = invoke("--arch", 80)
    assert missing.exit_code == 1
    assert "sm_80 reduce of 512 threads: no budget; --update writes one" in missing.output
    assert "sm_90" not in missing.output
    updated = invoke("--arch", 80, "--update")
    assert updated.exit_code == 0, updated.output
    passed = invoke("--arch", 80, "--json", tmp_path / "out.json")
    assert passed.exit_code == 0, passed.output
    assert "nvcc 13.0.88, 1 kernels; budget of nvcc 13.0.88" in passed.output
    (entry,) = json.loads((tmp_path / "out.json").read_text())["cuda"]
    assert (entry["arch"], entry["name"], entry["registers"], entry["problems"]) == ("sm_80", "reduce", 32, [])
    spilling = invoke("--arch", 90, "--update")
    assert spilling.exit_code == 1
    assert "sm_90 backward_loop of 512 threads: spills 24 bytes" in spilling.output


def test_a_library_that_is_not_built_is_one_line(no_triton_kernels, monkeypatch, tmp_path):
    monkeypatch.setattr(static_cuda, "LIBRARY", tmp_path / "none.so")
    result = invoke("--arch", 80, "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "CUDA C++ kernels are not looked at: their library is not built here" in result.output
    assert json.loads((tmp_path / "out.json").read_text())["cuda"] == []


# ---- the library -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built():
    if not static_cuda.LIBRARY.is_file():
        pytest.skip("the CUDA library is not built")
    return static_cuda.inspect(static_cuda.LIBRARY)


def test_the_library_is_small(built):
    assert static_cuda.LIBRARY.stat().st_size < 20_000_000


def test_no_kernel_spills(built):
    assert [kernel for kernel in built if kernel.spills] == []


def test_the_budget_is_whole_and_holds(built):
    taken_with, budget = static_cuda.read_budget(static_cuda.BUDGET_FILE)
    architectures = {kernel.arch for kernel in built}
    shown = static_cuda.rows(built, budget)
    assert {(row.arch, row.name, row.threads) for row in shown} == {key for key in budget if key[0] in architectures}
    compiler = static_cuda.built_by(static_cuda.LIBRARY)
    if compiler != taken_with:
        pytest.skip(f"the budget was taken with {taken_with}, this is {compiler}; nothing spills")
    assert [problem for row in shown for problem in row.problems] == []
