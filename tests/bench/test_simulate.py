"""Counts of the compiled kernels at base-size widths, held to what the design promises."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner

from beit3_fast.cli import main

pytest.importorskip("triton", reason="Triton is not installed")
from beit3_fast.bench import simulate

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="looks at compiled kernels")


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "target", "operations", "loop", "with_gelu"),
    [(2, 80, 1.10, 4.0, 6.0), (8, 80, 1.05, 4.0, 5.5), (8, 90, 1.07, 16.5, 50.0)],
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
        assert item.sectors >= 0.95, what
        assert item.banks <= 1.05, what
        if item.call.startswith("attention"):
            assert item.operations is None or 1.0 <= round(item.operations, 2) <= 1.3, what
        elif item.kernel == "decode":  # 6 queries in tiles of 16: what counts is that keys are read once
            assert item.traffic <= 1.3, what
        elif item.operations is not None and item.kernel != "weight_gradient":
            assert 1.0 <= item.operations <= operations, what
    assert simulate.main_loop(batch, target) <= loop
    assert next(item for item in counted if item.call == "linear + GELU").instructions <= with_gelu


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
    [(["--batch", "0"], "--batch must be at least 1"), (["--arch", "75"], "--arch must be one of 80, 90")],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    pytest.importorskip("ptxsim", reason="the PTX simulator is not installed")
    result = CliRunner().invoke(main, ["bench", "simulate", *arguments])
    assert result.exit_code == 2
    assert message in result.output or "TRITON_INTERPRET" in result.output
