from __future__ import annotations

import pytest
import torch
from beit3_fast.kernels.config import Config, valid_row_configs, valid_weight_gradient_configs

from beit3_fast._candidates import MOST, PER_TILE, Product, _cost, promising

BF16, FP32 = torch.bfloat16, torch.float32
H100 = 132


def rows(num_rows, columns):
    return Product(((num_rows * 3 // 4, 1), (num_rows - num_rows * 3 // 4, 1)), columns)


def tile(block_m, block_n, warps=8):
    return Config(block_m, block_n, 64, warps, 3)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("num_rows", [224, 1792, 14336])
def test_a_dozen_of_several_tiles(arch, dtype, num_rows):
    valid = valid_row_configs(arch, dtype, 3072)
    found = promising(valid, rows(num_rows, 3072), arch, dtype, H100)
    assert len(found) == len(set(found)) == MOST
    assert set(found) <= set(valid)
    tiles = [(config.block_m, config.block_n, config.warps) for config in found]
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


def test_deep_pipelines_first():
    """Of a tile's configs the one with most on the way while it multiplies, unless a second block fits with less;
    what does not fit at all comes last."""
    configs = [Config(128, 128, k, 8, s) for k in (64, 128) for s in (2, 3, 4)] + [tile(16, 64, 4)] * 8
    found = promising(configs, rows(14336, 3072), 90, BF16, H100)
    assert found[:2] == [Config(128, 128, 128, 8, 3), Config(128, 128, 64, 8, 4)]
    narrow = [Config(64, 128, k, 4, s) for k in (64, 128) for s in (2, 3, 4)] + [tile(16, 64, 4)] * 8
    assert promising(narrow, rows(14336, 3072), 90, BF16, H100)[0] == Config(64, 128, 64, 4, 4)
