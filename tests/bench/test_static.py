from __future__ import annotations

import importlib
import json
import os
import pkgutil
from dataclasses import replace
from functools import cache

import beit3_fast.kernels
import pytest
import torch
import triton
import triton.language as tl
from beit3_fast.bench import static, static_cuda
from beit3_fast.bench.static import Budget, Build, Measured, Result
from beit3_fast.kernels.launch import Launch
from click.testing import CliRunner
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from beit3_fast.cli import main

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: no compiler")


@triton.jit(do_not_specialize=["skipped"])
def _copy_kernel(source, target, count, stride, skipped, nothing, STEP: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + place * stride, mask=place < count, other=0.0)
    tl.store(target + place, values + skipped, mask=place < count)


@triton.jit
def _square_kernel(matrix, out, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tile = index[:, None] * BLOCK + index[None, :]
    a = tl.load(matrix + tile)
    tl.store(out + tile, tl.dot(a, a, input_precision=PRECISION))


@triton.jit
def _scaled_product_kernel(x, y, scale, out, DEPTH: tl.constexpr, STAGES: tl.constexpr, BLOCK: tl.constexpr):
    """(x * scale) @ y.T: the left factor is made in registers."""
    index, k = tl.arange(0, BLOCK), tl.arange(0, 32)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in tl.range(0, DEPTH, 32, num_stages=STAGES):
        a = tl.load(x + index[:, None] * DEPTH + start + k[None, :]) * tl.load(scale + start + k)[None, :]
        b = tl.load(y + index[None, :] * DEPTH + start + k[:, None])
        acc = tl.dot(a, b, acc, input_precision="tf32")
    tl.store(out + index[:, None] * BLOCK + index[None, :], acc)


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def copy(count=4096, stride=1, skipped=16, **options):
    arguments = (meta(count), meta(count), count, stride, skipped, None)
    return Launch(_copy_kernel, (4,), arguments, {"STEP": 1, "BLOCK": 1024, "num_warps": 4, **options})


def square(arch, dtype=torch.bfloat16, precision="ieee"):
    arguments = (meta(64, 64, dtype=dtype), meta(64, 64, dtype=torch.float32))
    options = {"BLOCK": 64, "PRECISION": precision, "num_warps": 4}
    return static.build_of(Launch(_square_kernel, (1,), arguments, options), str(dtype), arch)


@cache
def result_of(build):
    return Result(build, "a test", True, static.measure(build))


# ---- launches become builds ------------------------------------------------------------------------------------------


def tritons_own(launch):
    """(options, source) as Triton's launcher compiles them. Not a public interface: it may move."""
    from triton.runtime.jit import create_function_from_signature

    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", 80, 32))
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"debug": False, "instrumentation_mode": "", **launch.options}
    bound, specialization, _ = binder(*launch.args, **options)
    found, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, None)
    return found, ASTSource(kernel, signature, constants, attributes)


LAUNCHES = [
    copy(),
    copy(count=4097),
    copy(count=24),
    copy(count=1, skipped=1),
    copy(count=1 << 40, stride=-16),
    *static.launches(replace(static.LINEAR, rows=33), "bfloat16", 80),
    *static.launches(replace(static.LINEAR, row_index=True), "float32", 80),
    *static.launches(static.FFN, "float16", 80),
    *static.launches(static.ROUTING, "int64", 80),
]


@pytest.mark.parametrize("launch", LAUNCHES, ids=lambda launch: launch.kernel.fn.__name__)
def test_specialisation_is_tritons(launch):
    build = static.build_of(launch, "", 80)
    options, own = tritons_own(launch)
    made = static.source(build)
    assert made.signature == own.signature
    assert made.constants == own.constants
    assert made.attrs == own.attrs
    # what was compiled ahead of a launch is what the launch finds in the disk cache
    assert made.hash() == own.hash()
    assert make_backend(GPUTarget("cuda", 80, 32)).parse_options(dict(build.options)).hash() == options.hash()


def test_a_slice_that_begins_off_a_multiple_of_16_bytes_is_no_aligned_pointer():
    launch = copy()
    shifted = replace(launch, args=(meta(4100)[1:], *launch.args[1:]))
    assert 0 in static.build_of(launch, "", 80).divisible
    assert 0 not in static.build_of(shifted, "", 80).divisible


def test_an_argument_of_an_unknown_kind_is_refused():
    launch = copy()
    with pytest.raises(TypeError, match=r"_copy_kernel got str for stride"):
        static.build_of(replace(launch, args=(*launch.args[:3], "1", *launch.args[4:])), "", 80)


def test_names():
    build = static.build_of(static.launches(static.FFN, "bfloat16", 80)[1], "bfloat16", 80)
    assert build.name == "fc1"
    config = static._OPS["multiway_ffn"][0].default_configs(80, torch.bfloat16, static.FFN.rows, 2, 768, 3072)["fc1"]
    assert build.config == str(config)


@pytest.mark.parametrize("arch", static.ARCHITECTURES)
def test_the_default_run_has_every_kernel_of_the_package(arch):
    modules = [
        importlib.import_module(f"beit3_fast.kernels.{module.name}")
        for module in pkgutil.iter_modules(beit3_fast.kernels.__path__)
        if arch != 942 or module.name not in ("attention", "decode_attention")  # not used there
    ]
    kernels = {
        (module.__name__, name)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel") and value.fn.__module__ == module.__name__
    }
    assert len(kernels) >= 10
    assert {build.kernel for build in static.plan([arch])} == kernels


def test_everything_has_every_valid_config_and_the_default_run():
    everything, default = static.plan([80], everything=True), static.plan([80])
    assert default.keys() <= everything.keys()
    assert {build for build, (_, budgeted) in everything.items() if budgeted} == set(default)
    valid = static._OPS["multiway_ffn"][0].valid_configs(80, torch.float16, 768, 3072)
    for role, kernel in (("fc1", "fc1"), ("dhidden", "hidden_gradient"), ("dfc1", "weight_gradient")):
        found = {build.config for build in everything if (build.name, build.numbers) == (kernel, "float16")}
        assert {str(config) for config in valid[role]} <= found
    assert {build.numbers for build in everything} == set(static.NUMBERS)


# ---- builds become figures -------------------------------------------------------------------------------------------


def test_wide_and_narrow_accesses():
    wide, narrow = (result_of(static.build_of(launch, "float32", 80)).measured for launch in (copy(), copy(stride=3)))
    assert wide.failure is None
    assert wide.wide == 1
    assert 0.4 < narrow.wide < 0.6  # strided loads, contiguous stores
    assert wide.spills == narrow.spills == 0
    assert wide.tensor is None
    assert 8 <= wide.registers <= 64
    assert wide.shared == 0
    assert (wide.blocks, wide.occupancy) == (16, 1.0)


@pytest.mark.parametrize(("arch", "kind"), [(80, "HMMA"), (90, "HGMMA"), (100, "UTCHMMA"), (942, "MFMA")])
def test_kind_of_tensor_core_instructions(arch, kind):
    got = result_of(square(arch)).measured
    assert got.failure is None
    assert got.tensor == kind
    assert got.shared > 0
    assert got.registers > 16
    assert (got.blocks is None) == (arch == 942)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_the_system_reserves_is_not_counted_as_shared_memory(arch):
    build = square(arch)
    assert result_of(build).measured.shared == static.compiled(build).metadata.shared > 0


def test_fp32_products_use_tensor_cores_in_tf32_alone():
    assert result_of(square(80, torch.float32)).measured.tensor is None
    assert result_of(square(80, torch.float32, "tf32")).measured.tensor == "HMMA"


@pytest.mark.parametrize(
    ("opcode", "size"),
    [
        ("LDG.E", 4),
        ("LDG.E.64.CONSTANT", 8),
        ("STG.E.128", 16),
        ("STG.E.U16", 2),
        ("LDGSTS.E.BYPASS.LTC128B.128", 16),
        ("LDGSTS.E.LTC128B", 4),
        ("LDG.E.ENL2.256", 32),
    ],
)
def test_bytes_of_an_access(opcode, size):
    assert static._sass_bytes(opcode) == size


def test_share_of_128_bit_accesses_goes_by_bytes():
    assert static._wide([16, 8, 4, 4]) == 0.5
    assert static._wide([32, 32]) == 1
    assert static._wide([]) == 1


def test_bytes_of_an_access_on_amd():
    names = (
        "buffer_load_dwordx4",
        "global_store_dwordx2",
        "buffer_load_dword",
        "buffer_store_short",
        "flat_load_ubyte",
    )
    assert [static._amd_bytes(name) for name in names] == [16, 8, 4, 2, 1]


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        (80, 64, 0, 8, 4),  # 65536 / (64 * 256)
        (80, 65, 0, 8, 3),  # registers come in eights
        (80, 32, 163 * 1024, 4, 1),
        (80, 32, 81 * 1024, 4, 2),
        (80, 32, 82 * 1024, 4, 1),  # each block has another KB
        (86, 32, 0, 4, 12),  # 48 warps
        (86, 16, 0, 1, 12),  # warps come in fours
        (90, 255, 0, 4, 2),
    ],
)
def test_blocks_per_multiprocessor(arch, registers, shared, warps, blocks):
    assert static.blocks_per_multiprocessor(arch, registers, shared, warps) == blocks


def scaled_product(stages):
    arguments = (meta(64, 256), meta(64, 256), meta(256), meta(64, 64))
    options = {"DEPTH": 256, "STAGES": stages, "BLOCK": 64, "num_warps": 4}
    return static.build_of(Launch(_scaled_product_kernel, (1,), arguments, options), "tf32", 90)


def test_a_pipelined_product_of_registers_is_a_hazard():
    """triton-lang/triton#9433, which Triton 3.6 to 3.8 have; without a pipeline every product is waited for."""
    pipelined, waiting = result_of(scaled_product(3)), result_of(scaled_product(1))
    assert pipelined.measured.tensor == waiting.measured.tensor == "HGMMA"
    assert waiting.measured.hazards == ()
    assert static.why_not(waiting.build) is None
    if tuple(map(int, static.TRITON.split(".")[:2])) > (3, 8):
        pytest.skip(f"whether triton {static.TRITON} has the fault is not known")
    assert pipelined.measured.hazards
    assert static.why_not(pipelined.build).startswith(f"hazard: {pipelined.measured.hazards[0]}")
    (problem,) = static.problems(pipelined)
    assert problem.startswith("hazard: ")
    (line,) = static.unfit([pipelined])
    assert f"({len(pipelined.measured.hazards)} hazards)" in line.plain


def test_why_a_build_must_not_run():
    build = static.build_of(copy(), "float32", 80)
    assert static.why_not(build) is None
    broken = replace(build, constants=tuple((name, 3 if name == "BLOCK" else value) for name, value in build.constants))
    assert static.why_not(broken) == static.measure(broken).failure
    assert static.why_not(broken)


def spilling():
    """A GEMM that must do with 32 registers."""
    build = static.build_of(static.launches(static.LINEAR, "bfloat16", 80)[0], "bfloat16", 80)
    return replace(build, options=(*build.options, ("maxnreg", 32)))


def test_a_spilling_kernel_breaks_any_budget():
    result = result_of(spilling())
    assert result.measured.registers <= 32
    assert result.measured.spills > 100
    generous = Budget(255, 1 << 20, "HMMA", 0.0)
    (row,) = static.rows([result], {(80, "linear", "bfloat16"): generous})
    assert [problem.split(" (")[0] for problem in row.problems] == [f"spills {result.measured.spills} bytes"]
    (line,) = static.unfit([result])
    assert f"sm_80 linear bfloat16: 1 unfit: {result.build.config} ({result.measured.spills} B)" == line.plain


def test_a_kernel_that_does_not_compile_is_a_broken_row():
    build = static.build_of(copy(), "float32", 80)
    broken = replace(build, constants=tuple((name, 3 if name == "BLOCK" else value) for name, value in build.constants))
    result = Result(broken, "a test", True, static.measure(broken))
    assert result.measured.failure
    (row,) = static.rows([result], {(80, "copy", "float32"): Budget(255, 0, None, 0.0)})
    assert row.problems[0].startswith("does not compile: ")


# ---- the budget ------------------------------------------------------------------------------------------------------


BUILD = Build(("a_module", "_some_kernel"), "bfloat16", 80, (), (("BLOCK_M", 64),), (), (("num_warps", 4),))
GOOD = Measured(100, 0, 4096, "HMMA", 0.95, 4, 0.25)
ALLOWED = Budget(104, 4096, "HMMA", 0.95)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"registers": 105}, "registers 105 above 104 (64 w4 in a call)"),
        ({"shared": 4097}, "shared memory 4097 above 4096 (64 w4 in a call)"),
        ({"tensor": None}, "tensor-core instructions None, not HMMA (64 w4 in a call)"),
        ({"tensor": "HGMMA+HMMA"}, "tensor-core instructions HGMMA+HMMA, not HMMA (64 w4 in a call)"),
        ({"wide": 0.94}, "128-bit share 0.940 below 0.95 (64 w4 in a call)"),
        ({"spills": 8}, "spills 8 bytes (64 w4 in a call)"),
        ({"hazards": ("a writes to b",)}, "hazard: a writes to b (64 w4 in a call)"),
        ({"hazards": ("a writes to b", "c", "d")}, "hazard: a writes to b and 2 more (64 w4 in a call)"),
    ],
)
def test_each_figure_is_held_to_the_budget(change, message):
    result = Result(BUILD, "a call", True, replace(GOOD, **change))
    good = Result(BUILD, "a call", True, GOOD)
    (row,) = static.rows([good, result], {(80, "some", "bfloat16"): ALLOWED})
    assert row.problems == (() if message is None else (message,))


def test_more_shared_memory_than_the_architecture_has():
    result = Result(BUILD, "a call", False, replace(GOOD, shared=164 * 1024))
    assert static.problems(result) == ["shared memory 167936 above the architecture's 166912 (64 w4 in a call)"]


def test_a_kernel_without_a_budget_is_a_problem_and_a_call_without_one_is_not():
    (row,) = static.rows([Result(BUILD, "a call", True, GOOD)], {})
    assert row.problems == ("no budget; --update writes one",)
    assert static.rows([Result(BUILD, "a call", False, GOOD)], {}) == []


def test_a_new_budget_replaces_an_architecture_and_passes(tmp_path):
    worse = replace(GOOD, registers=120, shared=8192, wide=0.876)
    results = [Result(BUILD, "a call", True, GOOD), Result(BUILD, "a call", True, worse)]
    old = {(80, "gone", "bfloat16"): ALLOWED, (90, "kept", "tf32"): replace(ALLOWED, tensor=None)}
    budget = static.new_budget(results, old)
    assert budget == {
        (80, "some", "bfloat16"): Budget(120, 8192, "HMMA", 0.87),
        (90, "kept", "tf32"): replace(ALLOWED, tensor=None),
    }
    assert not any(row.problems for row in static.rows(results, budget))
    static.write_budget(tmp_path / "budget.json", budget)
    assert static.read_budget(tmp_path / "budget.json") == (static.TRITON, budget)
    lines = (tmp_path / "budget.json").read_text().splitlines()
    assert '    "some bfloat16": {"registers": 120, "shared": 8192, "tensor": "HMMA", "wide": 0.87}' in lines


def test_the_stored_budget_is_whole():
    """A row for every kernel, number and architecture of the default run, and none besides."""
    _, budget = static.read_budget(static.BUDGET_FILE)
    wanted = {(build.arch, build.name, build.numbers) for build in static.plan(static.ARCHITECTURES)}
    assert budget.keys() == wanted


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_the_budget_holds(arch, monkeypatch):
    monkeypatch.setitem(static.CASES_RUN, arch, (static.LINEAR, static.FFN))
    monkeypatch.setitem(static.NUMBERS_RUN, arch, ("bfloat16",))
    taken_with, budget = static.read_budget(static.BUDGET_FILE)
    results = static.run(static.plan([arch]), workers=1)
    assert not static.unfit(results)
    if taken_with != static.TRITON:
        pytest.skip(f"the budget was taken with triton {taken_with}, this is {static.TRITON}; nothing spills")
    assert [problem for row in static.rows(results, budget) for problem in row.problems] == []


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def only_routing(tmp_path, monkeypatch):
    """The command compiles the two routing kernels alone, and has a budget file of its own."""
    monkeypatch.setattr(static, "CASES_RUN", dict.fromkeys(static.ARCHITECTURES, ()))
    monkeypatch.setattr(static, "cores", lambda: 1)
    monkeypatch.setattr(static_cuda, "LIBRARY", tmp_path / "not built")
    path = tmp_path / "budget.json"
    monkeypatch.setattr(static, "BUDGET_FILE", path)
    static.write_budget(path, {(90, "kept", "int64"): ALLOWED})
    return path


def invoke(*arguments):
    return CliRunner().invoke(main, ["bench", "static", *map(str, arguments)])


def test_update_then_pass_then_break(only_routing, tmp_path):
    missing = invoke("--arch", 80)
    assert missing.exit_code == 1
    assert "sm_80 count int64: no budget; --update writes one" in missing.output

    updated = invoke("--arch", 80, "--update")
    assert updated.exit_code == 0, updated.output
    _, budget = static.read_budget(only_routing)
    assert budget.keys() == {(80, "count", "int64"), (80, "place", "int64"), (90, "kept", "int64")}

    passed = invoke("--arch", 80, "--json", tmp_path / "out.json")
    assert passed.exit_code == 0, passed.output
    assert "sm_80" in passed.output
    assert "count" in passed.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["schema"], written["kind"], written["triton"]) == (static.SCHEMA, "static", static.TRITON)
    assert [(entry["kernel"], entry["arch"], entry["problems"]) for entry in written["results"]] == [
        ("count", "sm_80", []),
        ("place", "sm_80", []),
    ]

    key = (80, "place", "int64")
    tight = replace(budget[key], registers=budget[key].registers - 16)
    static.write_budget(only_routing, budget | {key: tight})
    broken = invoke("--arch", 80, "--json", tmp_path / "out.json")
    assert broken.exit_code == 1
    assert f"above {tight.registers} (512 w4 in routing" in broken.output
    written = json.loads((tmp_path / "out.json").read_text())
    assert [bool(entry["problems"]) for entry in written["results"]] == [False, True]


def test_workers_give_the_same(only_routing):
    wanted = static.plan([80])
    seen: list[str] = []
    assert static.run(wanted, workers=2, progress=seen.append) == static.run(wanted, workers=1)
    assert len(seen) == 2
    assert seen[-1].startswith("2 of 2 compiled")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "75"], "--arch must be one of 80, 86, 89, 90, 100, 120, 942, got 75"),
        (["--arch", "80", "--all", "--update"], "leave out --all"),
        (["--json", "missing/out.json"], "--json: the folder 'missing' does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("missing", ["triton", "compiler"])
def test_without_triton_one_line_says_so(missing, monkeypatch):
    if missing == "triton":
        monkeypatch.setattr("beit3_fast.bench.compiled.find_spec", lambda name: None)
    else:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    result = invoke()
    assert result.exit_code == 2
    assert result.stderr.startswith("beit3-fast: bench static compiles Triton kernels")
    assert len(result.stderr.strip().splitlines()) == 1


def test_attention_compiles_for_gfx942() -> None:
    """It is not used there, for its spills, but it must stay portable."""
    for launch in static.launches(static.ATTENTION, "bfloat16", 942):
        assert static.measure(static.build_of(launch, "bfloat16", 942)).failure is None
