"""Which Triton orders what cp.async wrote before what the tensor cores of sm_90 read: the facts behind a warning."""

from __future__ import annotations

import pytest
import torch
import triton
from triton import language as tl

from beit3_fast.ops._triton import unfenced

pytestmark = pytest.mark.simulated_only


@triton.jit
def _product_kernel(a, b, out, K, BLOCK: tl.constexpr):
    """One 64 x 64 tile of a product, by a pipelined loop as every GEMM here has."""
    rows, columns, depth = tl.arange(0, 64), tl.arange(0, 64), tl.arange(0, BLOCK)
    total = tl.zeros((64, 64), tl.float32)
    for k in range(0, K, BLOCK):
        left = tl.load(a + rows[:, None] * K + k + depth)
        right = tl.load(b + columns[None, :] * K + k + depth[:, None])
        total = tl.dot(left, right, total)
    tl.store(out + rows[:, None] * 64 + columns, total)


def test_the_fence_is_missing_where_we_say_so_and_nowhere_else() -> None:
    """A Triton below `FENCED` that is safe would be warned of for nothing, and `races_of` overlook what it need not."""
    simulate = pytest.importorskip("ptxsim.simulate", reason="the PTX simulator is not installed")
    a, b, out = torch.randn(64, 256).half(), torch.randn(64, 256).half(), torch.empty(64, 64)
    with simulate.simulated(check_races=True, target=90) as log:
        _product_kernel[(1,)](a, b, out, 256, BLOCK=64, num_warps=4, num_stages=3)
    torch.testing.assert_close(out, a.float() @ b.float().T, atol=1e-3, rtol=1e-3)
    ((_, stats),) = log
    assert any("wgmma" in form for form in stats.mma)
    assert bool(stats.races) == (unfenced() is not None)
    assert all("race (proxy:" in race for race in stats.races)
