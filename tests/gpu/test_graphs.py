"""CUDA graphs: what was captured computes from what its inputs hold when it is replayed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from beit3_fast.models import BEiT3ForVisualQuestionAnswering

from .cases import CALLS, Case
from .machine import BASE, BF16, FP32, ROWS, Captured, Precision, served
from .models import batch_of, model_of, outputs


@pytest.mark.parametrize("what", [what for what in CALLS if what != "linear"])
def test_an_op_forward_and_backward(what: str) -> None:
    case = Case(what, BASE, BF16, ROWS[2])
    inputs = case.inputs()
    cotangents = case.cotangents(inputs)
    function = case.function()
    leaves = [value.requires_grad_() for value in inputs.values()]

    def step() -> tuple[Tensor, ...]:
        with torch.enable_grad(), served(case.simulated):
            result = function(**inputs)
            outputs = result if isinstance(result, tuple) else (result,)
            gradients = torch.autograd.grad(outputs, leaves, cotangents)
        return (*(output.detach() for output in outputs), *gradients)

    captured = Captured(step)
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(leaf.flip(0))
        captured.replay()
        for actual, expected in zip(captured.outputs, step(), strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("precision", [BF16, FP32], ids=str)
def test_a_model_with_other_lengths(precision: Precision) -> None:
    """One graph serves all lengths: where the rows are is computed on the device, from the padding mask."""
    model = model_of(BEiT3ForVisualQuestionAnswering, num_classes=7).to(precision.dtype)
    batch = batch_of(precision.dtype)
    image, tokens, padding = batch.image, batch.tokens, batch.padding

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (model(image, tokens, padding),)

    captured = Captured(step)
    for seed in (1, 2):
        other = batch_of(precision.dtype, seed=seed)
        for held, given in ((image, other.image), (tokens, other.tokens), (padding, other.padding)):
            held.copy_(given)
        captured.replay()
        torch.testing.assert_close(captured.outputs[0], step()[0])


def test_a_model_with_a_ready_layout() -> None:
    """The lengths are known on the host: the layout is made before the capture, of which it is no part."""
    model = model_of(BEiT3ForVisualQuestionAnswering, num_classes=7)
    batch = batch_of(torch.float32)
    layout = model.beit3.layout(batch.image, batch.tokens, None, batch.lengths)

    def step() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (model(batch.image, batch.tokens, None, layout=layout),)

    captured = Captured(step)
    batch.image.copy_(batch.image.flip(0))
    captured.replay()
    torch.testing.assert_close(captured.outputs[0], step()[0])
    with torch.no_grad():
        host = model(batch.image, batch.tokens, None, text_lengths=batch.lengths)
    torch.testing.assert_close(captured.outputs[0], host)


def test_a_training_step() -> None:
    """Forward, backward and optimizer in one graph, beside the same steps without one."""
    eager, graphed = Training(), Training()
    captured = Captured(graphed.step)
    graphed.restart()  # capturing takes steps too
    for _ in range(3):
        (expected,) = eager.step()
        captured.replay()
        torch.testing.assert_close(captured.outputs[0], expected)
    for actual, wanted in zip(graphed.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


class Training:
    """A model, a batch, and SGD, which has no state and steps by as much as gradients say."""

    def __init__(self) -> None:
        self.model = model_of(BEiT3ForVisualQuestionAnswering, num_classes=7).train()
        self.batch = batch_of(torch.float32)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)
        self._start = [parameter.detach().clone() for parameter in self.model.parameters()]

    def step(self) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            self.optimizer.zero_grad(set_to_none=True)
            loss = outputs(self.model, self.batch)["loss"]
            loss.backward()
            self.optimizer.step()
        return (loss.detach(),)

    def restart(self) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), self._start, strict=True):
                parameter.copy_(value)
