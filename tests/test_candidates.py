from __future__ import annotations

import pytest
import torch
from beit3_fast.kernels.config import Config, shared_memory, valid_row_configs, valid_weight_gradient_configs

from beit3_fast._candidates import MOST, PER_TILE, Product, _cost, _of_tile, promising

BF16, FP32 = torch.bfloat16, torch.float32
H100 = 132


def rows(num_rows, columns):
    return Product(((num_rows * 3 // 4, 1), (num_rows - num_rows * 3 // 4, 1)), columns)


def tile(block_m, block_n, warps=8):
    return Config(block_m, block_n, 64, warps, 3)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("num_rows", [224, 1792, 14336])
def test_the_best_of_several_tiles(arch, dtype, num_rows):
    valid = valid_row_configs(arch, dtype, 3072)
    found = promising(valid, rows(num_rows, 3072), arch, dtype, H100)
    assert len(found) == len(set(found)) == MOST
    assert set(found) <= set(valid)
    tiles = [(config.block_m, config.block_n) for config in found]
    assert max(map(tiles.count, tiles)) <= PER_TILE
    assert len(set(tiles)) >= MOST // PER_TILE


def test_few_are_all_kept_in_their_order():
    valid = valid_weight_gradient_configs(90, BF16, 768)[:MOST]
    assert promising(valid, rows(64, 64), 90, BF16, H100) == valid
    assert len(promising(valid, rows(64, 64), 90, BF16, H100, most=3)) == 3


@pytest.mark.parametrize(
    ("product", "fast", "slow"),
    [
        (rows(14336, 3072), tile(128, 256), tile(128, 128)),  # both fill the chip: the weights are read less often
        (
            rows(14336, 3072),
            tile(128, 128),
            tile(16, 128, 4),
        ),  # a row tile of 16 reads them 14 times as often as it can
        (rows(224, 768), tile(64, 64, 4), tile(128, 256)),  # nine programs for 132 multiprocessors
        (rows(224, 3072), tile(64, 128, 4), tile(16, 64, 4)),
        (Product(((768, 10752), (768, 3584)), 768), tile(64, 128, 4), tile(128, 256)),  # 18 programs each
    ],
)
def test_the_model(product, fast, slow):
    assert _cost(fast, product, BF16, H100) < _cost(slow, product, BF16, H100)


def test_the_larger_expert_of_a_weight_gradient_takes_longest():
    """With 60 programs each the chip has room for both experts at once, and waits for the deeper one."""
    config = tile(128, 128)
    even = Product(((640, 1000), (640, 1000)), 1536)
    uneven = Product(((640, 1900), (640, 100)), 1536)
    assert _cost(config, uneven, BF16, H100) == pytest.approx(1.9 * _cost(config, even, BF16, H100))
    full = [Product(((2816, depth), (2816, 2000 - depth)), 1536) for depth in (1000, 1900)]
    assert _cost(config, full[0], BF16, H100) == pytest.approx(_cost(config, full[1], BF16, H100)), "no room: the sum"


def tile_configs(block_m, block_n, warps=(4, 8)):
    """All that fit an H100."""
    configs = [Config(block_m, block_n, k, w, s) for w in warps for k in (64, 128) for s in (2, 3, 4)]
    return [config for config in configs if config.pipeline_bytes(90, BF16) <= shared_memory(90)]


@pytest.mark.parametrize(("block_m", "block_n"), [(128, 128), (64, 128), (64, 256)])
def test_the_best_of_each_number_of_warps(block_m, block_n):
    found = _of_tile(tile_configs(block_m, block_n), 90, BF16)
    assert len(found) == len(set(found)) == PER_TILE
    assert {config.warps for config in found[:2]} == {4, 8}
    for first in found[:2]:
        rivals = tile_configs(block_m, block_n, [first.warps])
        most = max(config.blocks_per_multiprocessor(90, BF16) for config in rivals)
        assert first.blocks_per_multiprocessor(90, BF16) == most, "blocks that fill each other's gaps"
        deepest = [c for c in rivals if c.blocks_per_multiprocessor(90, BF16) == most]
        assert (first.stages - 1) * first.block_k == max((c.stages - 1) * c.block_k for c in deepest)


def test_no_more_warps_than_a_tile_keeps_busy():
    assert {config.warps for config in _of_tile(tile_configs(64, 64), 90, BF16)} == {4}
    assert {config.warps for config in _of_tile(tile_configs(32, 64, [4]), 90, BF16)} == {4}, "there is nothing better"
