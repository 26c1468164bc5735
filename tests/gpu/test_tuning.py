"""The tuner on one op, and that its choice is what a call then runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the kernels that are tuned need triton")

from beit3_fast.kernels import multiway_linear as kernels
from ops.parity import assert_parity

from beit3_fast import ops, tuning

from .machine import BF16, DEVICE, REAL, normal, served

WIDTHS = (256, 768) if REAL else (32, 96)
ROWS = 1680 if REAL else 40


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def test_a_linear_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not REAL:
        pytest.importorskip("ptxsim", reason="the PTX simulator is not installed")
    width, out = WIDTHS
    monkeypatch.setattr(tuning, "cache_file", lambda: tmp_path / "tuned.json")
    arch = tuning._architecture(DEVICE)
    default = kernels.default_configs(arch, BF16.dtype, ROWS, 2, width, out)["forward"]
    others = [config for config in kernels.valid_configs(arch, BF16.dtype, width, out)["forward"] if config != default]
    few = {"forward": [default, *others[:: max(len(others) // 2, 1)][:2]]}  # each takes a second to compile
    monkeypatch.setattr(kernels, "valid_configs", lambda *_: few)
    tuning.forget()
    try:
        with served(simulated=True):
            outcomes = tuning.tune(
                device=DEVICE,
                ops=["multiway_linear"],
                sizes=[(width, width)],
                rows=[ROWS],
                timer=None if REAL else seconds,
            )
            assert all(outcome.entry is not None for outcome in outcomes), [each.skipped for each in outcomes]
            assert all(outcome.entry.default_ms for outcome in outcomes), [each.skipped for each in outcomes]
            chosen = tuning.choose("multiway_linear", DEVICE, BF16.dtype, ROWS, 2, (width, out))
            if REAL:  # for a CPU nothing is looked up
                assert chosen == outcomes[0].entry.choice
            x, weight = (
                normal(ROWS, width, dtype=BF16.dtype),
                normal(2, out, width, dtype=BF16.dtype, scale=width**-0.5),
            )
            bias = normal(2, out, dtype=BF16.dtype)
            offsets = torch.tensor([0, ROWS // 4, ROWS], dtype=torch.int32, device=DEVICE)
            actual = ops.multiway_linear(x, weight, bias, offsets)
        plain = ops.multiway_linear_reference(x, weight, bias, offsets)
        truth = ops.multiway_linear_reference(x.double(), weight.double(), bias.double(), offsets)
        assert_parity(actual, plain, truth, BF16.dtype)
    finally:
        tuning.forget()
