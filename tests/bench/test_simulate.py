"""Counts of the compiled kernels at base-size widths, held to what the design promises."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner
from rich.console import Console

from beit3_fast.cli import main
from beit3_fast.ops._triton import triton_version

pytest.importorskip("triton", reason="Triton is not installed")
from beit3_fast.bench import chips, simulate

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="looks at compiled kernels")


class Layouts(NamedTuple):
    """What a Triton's choice of layouts costs: least use of a sector, most wavefronts for what one would do."""

    sectors: float
    banks: float
    norm_gradient_banks: float


# Triton 3.6 puts the transposed operands of backward kernels into shared memory with bank conflicts (3.8: none).
OF_THIS_TRITON = Layouts(0.92, 1.6, 4.7) if (triton_version() or ()) < (3, 8) else Layouts(0.95, 1.05, 1.05)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "target", "operations", "loop", "with_gelu"),
    [(2, 80, 1.10, 4.0, 6.0), (8, 90, 1.07, 16.5, 50.0)],
)
def test_counts(batch: int, target: int, operations: float, loop: float, with_gelu: float) -> None:
    """Little padding, 4 instructions a product before the epilogue, whole sectors, no bank conflicts, few launches."""
    pytest.importorskip("ptxsim", reason="the PTX simulator is not installed")
    counted = simulate.run(batch, target)
    calls = [item.call for item in counted]
    assert [calls.count(name) for name in ("linear", "linear backward")] == [1, 2]
    assert [calls.count(f"feed-forward{part}") for part in ("", ", training", " backward")] == [3, 3, 6]
    for item in counted:
        what = f"{item.call}: {item.kernel}"
        assert item.sectors >= OF_THIS_TRITON.sectors, what
        banks = OF_THIS_TRITON.norm_gradient_banks if item.kernel == "norm_gradient" else OF_THIS_TRITON.banks
        assert item.banks <= banks, what
        if item.call.startswith("attention"):
            assert item.operations is None or 1.0 <= round(item.operations, 2) <= 1.3, what
        elif item.kernel == "decode":  # 6 queries in tiles of 16: what counts is that keys are read once
            assert item.traffic <= 1.3, what
        elif item.operations is not None and item.kernel != "weight_gradient":
            assert 1.0 <= item.operations <= operations, what
        # what bounds follow from: nothing that the kernel does not do, and the algorithm's own work at least
        assert item.work.bytes > 0, what
        chip = next(chip for chip in chips.CHIPS.values() if chip.arch == target)
        assert all(microseconds >= 0 for microseconds in chips.bounds(item.work, chip).values()), what
        if item.call == "linear":
            rows, wide = batch * (simulate.VISION + simulate.TEXT), simulate.HIDDEN * simulate.WIDTH
            assert item.work.flops >= 2 * rows * wide, what
            assert item.work.bytes >= 2 * (rows * (simulate.WIDTH + simulate.HIDDEN) + 2 * wide), what
            # every product needs its instruction: 4096 FLOP of an mma, 4 x 64 x 256 x 16 x 2 / 4 of a warp's wgmma
            assert item.work.flops / (131072 if target == 90 else 4096) <= item.work.issued, what
            assert item.instructions * item.work.flops / 4096 >= item.work.issued or target == 90, what
    assert simulate.main_loop(batch, target) <= loop
    assert next(item for item in counted if item.call == "linear + GELU").instructions <= with_gelu


# ---- lower bounds ----

STATS: dict[str, Any] = {
    "unique_read": 3_000_000,
    "unique_written": 350_000,
    "mma_flops": 4096 * 1000,
    "mma": {"mma.sync": {"count": 1000, "flops": 4096}},
    "warp_instructions": 9000,
    "global_load": {"bytes": 3_000_000, "sectors": 93_750},
    "global_store": {"bytes": 350_000, "sectors": 10_938},
    "shared": {"ld": {"wavefronts": 700, "ideal": 350}, "ldmatrix": {"wavefronts": 300, "ideal": 300}},
    "opcodes": {
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": 1000,
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16": 500,
        "cp.async.cg.shared.global": 200,
        "fma.rn.f32": 100,
        "ex2.approx.ftz.f32": 50,
        "bar.sync": 10,
        # what the assembler may drop, merge or do without
        "mov.b32": 5000,
        "add.s32": 1000,
        "cvt.rn.bf16x2.f32": 400,
        "mul.f32": 300,
        "cp.async.commit_group": 200,
        "ld.param.b64": 100,
        "wgmma.fence.sync.aligned": 70,
        "neg.f32": 70,
    },
}
CHIP = chips.Chip("toy", 80, 10, 1e9, 1e12, 1e11)


def test_what_bounds_follow_from() -> None:
    assert chips.work(STATS) == chips.Work(bytes=3_350_000, flops=4_096_000, issued=1860, wavefronts=1000)


def test_bounds_by_hand() -> None:
    assert chips.bounds(chips.work(STATS), CHIP) == pytest.approx(
        {"DRAM": 33.5, "tensor cores": 4.096, "issue slots": 1860 / 4 / 1e10 * 1e6, "shared memory": 1000 / 1e10 * 1e6}
    )


def test_chips_agree_with_themselves() -> None:
    """The data sheets' rates are those of the tensor cores' width at the clock."""
    for name, width in (("a100", 2048), ("h100", 4096)):
        chip = chips.CHIPS[name]
        assert chip.multiprocessors * width * chip.clock == pytest.approx(chip.tensor, rel=0.01)
        assert chip.arch in simulate.TARGETS


def test_the_largest_bound_is_named_and_none_is_called_a_time() -> None:
    counted = simulate._count("linear", "_linear_kernel", STATS, 4_096_000)
    console = Console(width=160)
    with console.capture() as capture:
        console.print(simulate.bounds_table(2, CHIP, [counted]))
    shown = " ".join(capture.get().split())
    assert "lower bounds on toy, 2 x (197 + 13) tokens: microseconds, no times" in shown
    assert "33.50 │ 4.10 │ 0.05 │ 0.10 │ 33.50 us │ DRAM" in shown
    (launch,) = simulate.document([(2, 80, [counted], 4.0)], CHIP)["results"][0]["launches"]
    assert launch["binds"] == "DRAM"
    assert launch["lower_bounds_us"]["DRAM"] == pytest.approx(33.5)
    assert launch["work"]["issued"] == 1860
    without = simulate.document([(2, 80, [counted], 4.0)])
    assert without["chip"] is None
    assert without["results"][0]["launches"][0]["lower_bounds_us"] is None
    assert json.loads(json.dumps(without)) == without


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("vision", [197, 577, 901])
@pytest.mark.parametrize("text", [10, 64])
def test_tile_waste(batch: int, vision: int, text: int) -> None:
    block_m, share = simulate.tile_waste(vision, text, batch)
    assert block_m in (16, 32, 64, 128)
    assert 1.0 <= share <= 1.11
    rows = batch * (vision + text)
    assert (share - 1) * rows <= 2 * (block_m - 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch must be at least 1"),
        (["--arch", "75"], "--arch must be one of 80, 90"),
        (["--chip", "h10"], "chip 'h10' is unknown; did you mean h100"),
        (["--chip", "h100", "--arch", "80"], "--chip h100 runs code for --arch 90, got --arch 80"),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    pytest.importorskip("ptxsim", reason="the PTX simulator is not installed")
    result = CliRunner().invoke(main, ["bench", "simulate", *arguments])
    assert result.exit_code == 2
    assert message in result.output or "TRITON_INTERPRET" in result.output
