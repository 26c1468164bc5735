"""The same bits every time: a race between a copy and the tensor cores that read it shows as bits that come and go."""

from __future__ import annotations

import pytest

from .cases import CALLS, Case
from .machine import BASE, BF16, FP16, LARGE, LARGE_ROWS, REAL, TF32, Precision, Size

REPEATS = 100 if REAL else 3


@pytest.mark.parametrize("rows", LARGE_ROWS)
@pytest.mark.parametrize(("size", "precision"), [(BASE, BF16), (BASE, FP16), (BASE, TF32), (LARGE, BF16)], ids=str)
@pytest.mark.parametrize("what", [what for what in CALLS if what != "linear"])
def test_every_output_and_gradient(what: str, size: Size, precision: Precision, rows: int) -> None:
    case = Case(what, size, precision, rows)
    with precision.set():
        inputs = case.inputs()
        cotangents = case.cotangents(inputs)
        first = dict(case.run(inputs, cotangents).items())
        equal = dict.fromkeys(first, True)
        for _ in range(REPEATS - 1):
            for name, value in case.run(inputs, cotangents).items():
                equal[name] = first[name].eq(value).all() & equal[name]
    assert [name for name, same in equal.items() if not bool(same)] == []
