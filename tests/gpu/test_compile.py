"""``torch.compile`` of a model, with and without CUDA graphs: what the eager model gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from beit3_fast.models import BEiT3ForVisualQuestionAnswering

from .machine import BF16, DEVICE, FP32, REAL, Precision
from .models import batch_of, model_of


def compiled(model: nn.Module, mode: str) -> Any:
    """By Inductor; in a rehearsal only traced, as C++ takes a minute to compile."""
    torch._dynamo.reset()
    return torch.compile(model, mode=mode) if REAL else torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize(
    ("precision", "mode"), [(BF16, "default"), (BF16, "reduce-overhead"), (FP32, "reduce-overhead")], ids=str
)
def test_inference(precision: Precision, mode: str) -> None:
    """Several calls: CUDA graphs are captured at the second one and replayed from then on."""
    model = model_of(BEiT3ForVisualQuestionAnswering, num_classes=7, encoder_layers=1).to(precision.dtype)
    fast = compiled(model, mode)
    with precision.set(), torch.no_grad():
        for seed in range(4):
            batch = batch_of(precision.dtype, seed=seed)
            arguments = batch.image, batch.tokens, batch.padding
            torch.compiler.cudagraph_mark_step_begin()
            actual, expected = fast(*arguments).clone(), model(*arguments)
            size = expected.double().abs().max().item()
            assert (actual.double() - expected.double()).abs().max().item() <= precision.tolerance * size


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_training_under_autocast(mode: str) -> None:
    model = model_of(BEiT3ForVisualQuestionAnswering, num_classes=7, encoder_layers=1).train()
    batch = batch_of(torch.float32)
    results = []
    for each in (model, compiled(model, mode)):
        for _ in range(1 if each is model else 3):
            model.zero_grad(set_to_none=True)
            torch.compiler.cudagraph_mark_step_begin()
            with torch.autocast(DEVICE.type, torch.bfloat16):
                loss = outputs_of(each, batch)
            loss.backward()
        gradients = {
            name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
        }
        results.append((loss.detach().clone(), gradients))
    (expected_loss, expected), (loss, actual) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-2, atol=1e-3)
    largest = max(value.abs().max().item() for value in expected.values())
    for name, value in expected.items():
        error = (actual[name] - value).abs().max().item()
        assert error <= 0.05 * max(value.abs().max().item(), 1e-2 * largest), name


def outputs_of(model: Any, batch: Any) -> torch.Tensor:
    logits = model(batch.image, batch.tokens, batch.padding)
    return torch.nn.functional.cross_entropy(logits, batch.labels)
