"""Work goes to the current stream and the tensors' own device, and the host never waits for it."""

from __future__ import annotations

import contextlib

import pytest
import torch
from ops.parity import by_name

from .cases import CALLS, Case
from .machine import BASE, BF16, DEVICE, REAL, ROWS, never_waiting

OPS = [what for what in CALLS if what != "linear"]


def case_of(what: str) -> Case:
    return Case(what, BASE, BF16, ROWS[-1])


@pytest.mark.parametrize("what", OPS)
def test_the_current_stream_is_used(what: str) -> None:
    """Inputs that another stream changes late are read there, after that."""
    case = case_of(what)
    inputs = case.inputs()
    cotangents = case.cotangents(inputs)
    expected = case.run({name: value * 2 for name, value in inputs.items()}, cotangents)
    if REAL:
        torch.cuda.synchronize()
    stream = torch.cuda.Stream() if REAL else None
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        if REAL:
            torch.cuda._sleep(10**8)  # cycles
        for value in inputs.values():
            value.mul_(2)
        actual = case.run(inputs, cotangents)
    if stream:
        stream.synchronize()
    for name, (ours, theirs) in by_name(actual, expected):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("what", OPS)
def test_nothing_waits(what: str) -> None:
    case = case_of(what)
    inputs = case.inputs()
    cotangents = case.cotangents(inputs)
    case.run(inputs, cotangents)  # compiles
    function = case.function()
    leaves = [value.requires_grad_() for value in inputs.values()]
    with never_waiting():
        result = function(**inputs)
        outputs = result if isinstance(result, tuple) else (result,)
        torch.autograd.grad(outputs, leaves, cotangents)


@pytest.mark.parametrize("what", OPS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_a_device_that_is_not_the_current_one(what: str) -> None:
    case = case_of(what)
    inputs = case.inputs()
    expected = case.function()(**inputs)
    assert DEVICE.type == "cuda"
    with torch.cuda.device(1):
        actual = case.function()(**inputs)
        assert torch.cuda.current_device() == 1
    for ours, theirs in zip(*(r if isinstance(r, tuple) else (r,) for r in (actual, expected)), strict=True):
        assert torch.equal(ours, theirs)
