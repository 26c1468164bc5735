"""How the CUDA LayerNorm is launched: ``csrc/cuda/launch.h`` by itself, which needs a C++ compiler and no CUDA."""

from __future__ import annotations

import itertools
import shutil

import pytest

from .cuda_layer_norm import Arithmetic

WIDTHS = (1, 2, 7, 8, 64, 255, 256, 767, 768, 776, 1000, 1024, 1408, 3072, 4096, 6144, 7168, 8448, 20000, 2**24)
ROWS = (1, 2, 3, 5, 255, 1000, 1680, 26880, 10**6, 2**33)
SIZES = (2, 4, 8)
PROCESSORS = (0, 1, 46, 108, 132, 148)


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> Arithmetic:
    compiler = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    return Arithmetic(tmp_path_factory.mktemp("launch"), compiler)


@pytest.mark.parametrize("backward", [False, True])
def test_every_launch_covers_every_row_and_column_once(arithmetic: Arithmetic, backward: bool) -> None:
    for width, rows, size, processors, aligned in itertools.product(WIDTHS, ROWS, SIZES, PROCESSORS, (False, True)):
        launch = arithmetic.launch(width, rows, size, aligned=aligned, processors=processors, backward=backward)
        case = f"{width} x {rows}, {size} bytes, {processors} processors: {launch}"
        assert 0 <= rows - (launch.blocks - 1) * launch.rows_per_block - 1 < launch.rows_per_block, case
        assert launch.blocks < 2**31, case
        assert launch.threads % 32 == 0, case
        assert 32 <= launch.threads <= 512, case
        assert launch.shared <= 63 * 1024, case  # sm_75 grants 64 KiB, static memory included
        assert launch.vector == (16 // size if aligned and size < 8 and width % (16 // size) == 0 else 1), case
        assert (launch.fit == "scalar") == (launch.vector == 1), case
        lane = 8 if launch.fit == "scalar" else 32 if (launch.span, launch.fit) == ("warp", "vector") else 24
        held = {"warp": 32 * lane, "block": launch.threads * lane, "loop": None}[launch.span]
        if held is not None:
            assert held >= width, case
            assert launch.span == "warp" or held - 32 * lane < width, f"an idle warp: {case}"
            assert (launch.fit == "exact") == (width % 768 == 0 and launch.fit != "scalar"), case
            assert launch.fit != "exact" or held == width, case
            assert launch.rows_per_block <= 256, case  # their statistics have this much room
            planes = (3 if launch.span == "warp" else 1) if backward else 2
            assert launch.shared == planes * 4 * arithmetic.plane(width, launch.vector) + 256 * 8, case
        if launch.span == "warp":
            assert launch.threads == 128, case
            assert launch.rows_per_block % 4 == 0, case


@pytest.mark.parametrize(
    ("width", "size", "expected"),
    [
        (1, 4, ("warp", "scalar", 128)),
        (7, 2, ("warp", "scalar", 128)),
        (40, 2, ("warp", "vector", 128)),
        (768, 2, ("warp", "exact", 128)),
        (768, 4, ("warp", "exact", 128)),
        (1000, 2, ("warp", "vector", 128)),
        (1001, 2, ("block", "scalar", 128)),
        (1024, 2, ("warp", "vector", 128)),
        (1032, 4, ("block", "vector", 64)),
        (1408, 4, ("block", "vector", 64)),
        (3072, 2, ("block", "exact", 128)),
        (4096, 2, ("block", "vector", 192)),
        (6144, 4, ("block", "exact", 256)),
        (20000, 4, ("loop", "vector", 512)),
        (20001, 2, ("loop", "scalar", 512)),
        (768, 8, ("loop", "scalar", 512)),
    ],
)
def test_the_kernel_for_a_width(arithmetic: Arithmetic, width: int, size: int, expected: tuple[str, str, int]) -> None:
    launch = arithmetic.launch(width, 1680, size, processors=108)
    assert (launch.span, launch.fit, launch.threads) == expected


def test_few_rows_fill_the_device_and_many_share_what_is_read_once(arithmetic: Arithmetic) -> None:
    for width, backward in itertools.product((768, 3072), (False, True)):
        few = arithmetic.launch(width, 210, 2, processors=108, backward=backward)
        assert few.rows_per_block <= 8
        many = arithmetic.launch(width, 10**6, 2, processors=108, backward=backward)
        assert many.rows_per_block == 256


def test_a_million_rows_of_partial_sums_stay_few(arithmetic: Arithmetic) -> None:
    for width, rows in itertools.product((20000, 2**20), ROWS):
        rows_per_block, column_blocks, row_blocks = arithmetic.columns(width, rows)
        assert 0 <= rows - (row_blocks - 1) * rows_per_block - 1 < rows_per_block
        assert row_blocks <= 256
        assert 0 <= column_blocks * 32 - width < 32


@pytest.mark.parametrize("vector", [1, 4, 8])
def test_the_layout_of_planes(arithmetic: Arithmetic, vector: int) -> None:
    """Every column has a place of its own; a vector's quads are whole, and in its lane's order."""
    for width in (vector, 3 * vector, 8 * vector, 768, 1000, 1408):
        places = [arithmetic.place(column, width, vector) for column in range(width)]
        assert len(set(places)) == width
        assert max(places) < arithmetic.plane(width, vector)
        if vector == 1:
            continue
        for column in range(0, width, 4):
            assert places[column] % 4 == 0
            assert places[column : column + 4] == [places[column] + i for i in range(4)]
        for column in range(vector, width):
            assert places[column] - places[column - vector] == 4
        if vector == 8:
            assert (places[4] - places[0]) % 32 == 16, "halves 16 banks apart"
