"""The numbers of rows reach the code that users run: tiles of 64 rows and more are wgmma on sm_90, smaller ones not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the kernels' configs need triton")

from beit3_fast.kernels import multiway_ffn, multiway_linear

from .machine import USERS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wgmma_is_met(dtype: torch.dtype) -> None:
    for kernels, widths in ((multiway_linear, (768, 2304)), (multiway_ffn, (1024, 4096))):
        for rows in (1680, 13440):
            assert rows in USERS
            configs = kernels.default_configs(90, dtype, rows, 2, *widths)
            assert all(config.block_m >= 64 for config in configs.values()), configs


def test_lengths_have_so_many_rows() -> None:
    for rows, lengths in USERS.items():
        assert sum(map(sum, lengths)) == rows
