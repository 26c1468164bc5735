"""Models of every head, forward and backward, against float64; autocast, padding, captions, optimized copies."""

from __future__ import annotations

import copy

import pytest
import torch
from beit3_fast.bench import reference
from torch import Tensor, nn

import beit3_fast
from beit3_fast.backend import use_backend
from beit3_fast.models import (
    BEiT3ForCaptioning,
    BEiT3ForImageClassification,
    BEiT3ForPretraining,
    BEiT3ForRetrieval,
    BEiT3ForVisualQuestionAnswering,
    BEiT3ForVisualReasoning,
)

from .machine import BF16, DEVICE, FP16, FP32, TF32, Precision, never_waiting, served
from .models import Batch, Way, batch_of, config, model_of, outputs, values_and_gradients

HEADS: dict[type[nn.Module], dict[str, int]] = {
    BEiT3ForImageClassification: {"num_classes": 7},
    BEiT3ForVisualReasoning: {"num_classes": 7},
    BEiT3ForVisualQuestionAnswering: {"num_classes": 7},
    BEiT3ForCaptioning: {},
    BEiT3ForRetrieval: {},
    BEiT3ForPretraining: {},
}


CASES = [
    *((kind, Way(FP32)) for kind in HEADS),
    *((kind, Way(BF16, autocast=True)) for kind in HEADS),
    *((BEiT3ForVisualQuestionAnswering, Way(precision)) for precision in (BF16, FP16, TF32)),
    (BEiT3ForRetrieval, Way(FP16, autocast=True)),
]


def errors(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """The root mean square error of each, of its own size, but of a thousandth of the largest gradient's at least.

    The gradient of a key's bias cancels to next to nothing: its error is one of its weight's size.
    """
    assert actual.keys() == truth.keys()
    size = {name: value.double().square().mean().sqrt().item() for name, value in truth.items()}
    largest = max(value for name, value in size.items() if "." in name)
    relative = {}
    for name, exact in truth.items():
        assert actual[name].isfinite().all(), name
        scale = size[name]
        if "." in name:
            scale = max(scale, 1e-3 * largest)
        if name.endswith("k_proj.bias") or ".k_proj." in name:
            scale = max(scale, size[name.removesuffix("bias") + "weight"] if name.endswith("bias") else scale)
        relative[name] = (actual[name].double() - exact).square().mean().sqrt().item() / scale
    return relative


def assert_as_good(ours: dict[str, float], plain: dict[str, float], eps: float) -> None:
    """At most twice plain PyTorch's error, on average and at the worst, and a little for rounding."""
    worst = max(ours, key=ours.__getitem__)
    assert ours[worst] <= 2 * max(plain.values()) + 4 * eps, f"{worst}: {ours[worst]:.2e}, plain {plain[worst]:.2e}"
    mean, allowed = (sum(values.values()) / len(values) for values in (ours, plain))
    assert mean <= 2 * allowed + eps, f"mean error {mean:.2e}, plain {allowed:.2e}"
    assert max(ours.values()) < 0.3, f"{worst}: {ours[worst]:.2e} of its own size"


@pytest.mark.parametrize(
    ("kind", "way"), CASES, ids=lambda value: value.__name__ if isinstance(value, type) else str(value)
)
def test_forward_and_backward(kind: type[nn.Module], way: Way) -> None:
    """Against the same model in float64 by plain PyTorch, which elsewhere is compared with the public code."""
    model, batch = model_of(kind, **HEADS[kind]).to(way.model_dtype), batch_of(way.model_dtype)
    with way.running():
        with served(simulated=way == Way(BF16)):
            actual = values_and_gradients(model, batch)
        with use_backend("reference"):
            plain = values_and_gradients(model, batch)
    double = copy.deepcopy(model).double()
    with use_backend("reference"):
        wide = batch_of(way.model_dtype)
        truth = values_and_gradients(double, in_double(wide))
    assert_as_good(errors(actual, truth), errors(plain, truth), way.precision.eps)


def in_double(batch: Batch) -> Batch:
    values = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in vars(batch).items()
    }
    return Batch(**values)


def test_retrieval_against_reference_pytorch() -> None:
    """The public code's own operations, in float64: experts, positions and padding by another hand."""
    model, batch = model_of(BEiT3ForRetrieval), batch_of(torch.float32)
    with FP32.set():
        actual = values_and_gradients(model, batch)
    state = {name: value.double() for name, value in model.state_dict().items()}
    theirs = reference.with_weights(
        lambda: reference.BEiT3ForRetrieval(config()), state, device=DEVICE, dtype=torch.float64
    )
    loss, vision, language = theirs(batch.image.double(), batch.tokens, batch.padding)
    (1024 * loss).backward()
    truth = {"loss": loss.detach(), "vision": vision.detach(), "language": language.detach()}
    truth |= {name: value.grad for name, value in theirs.named_parameters() if value.grad is not None}
    found = errors({name: actual[name] for name in truth}, truth)
    worst = max(found, key=found.__getitem__)
    assert found[worst] < 1e-4, f"{worst}: {found[worst]:.2e}"


@pytest.mark.parametrize("precision", [FP32, BF16], ids=str)
def test_padding_that_only_the_device_knows(precision: Precision) -> None:
    """A mask on the device gives what lengths on the host give, and neither is waited for."""
    model, batch = model_of(BEiT3ForVisualQuestionAnswering, num_classes=7), batch_of(precision.dtype)
    model.to(precision.dtype)

    def both() -> tuple[Tensor, Tensor]:
        return (
            model(batch.image, batch.tokens, batch.padding),
            model(batch.image, batch.tokens, None, text_lengths=batch.lengths),
        )

    with torch.no_grad():
        both()  # compiles
        with never_waiting():
            on_device, on_host = both()
    size = on_host.double().abs().max().item()
    assert (on_device.double() - on_host.double()).abs().max().item() <= precision.tolerance * size


def test_a_training_step_waits_for_nothing() -> None:
    model, batch = model_of(BEiT3ForVisualQuestionAnswering, num_classes=7).train(), batch_of(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = outputs(model, batch)["loss"]
        loss.backward()
        optimizer.step()

    step()
    with never_waiting():
        step()


@pytest.mark.parametrize("num_beams", [1, 3])
def test_captions(num_beams: int) -> None:
    """The words and scores that plain PyTorch finds with the same weights."""
    model = model_of(BEiT3ForCaptioning)
    with torch.no_grad():
        model.mlm_head.weight.mul_(3.0)  # no ties
    image = batch_of(torch.float32).image
    options = {"num_beams": num_beams, "max_length": 8, "mask_token_id": 199}
    with use_backend("reference"):
        expected = model.generate(image, **options)
    actual = model.generate(image, **options)
    assert [list(words) for words in actual.tokens] == [list(words) for words in expected.tokens]
    assert list(actual.scores) == pytest.approx(list(expected.scores), rel=1e-3)


@pytest.mark.parametrize("precision", [FP32, BF16], ids=str)
def test_an_optimized_copy(precision: Precision) -> None:
    model, batch = model_of(BEiT3ForVisualQuestionAnswering, num_classes=7), batch_of(precision.dtype)
    model.to(precision.dtype)
    optimized = beit3_fast.optimize(model)
    with torch.no_grad():
        expected = model(batch.image, batch.tokens, batch.padding)
        actual = optimized(batch.image, batch.tokens, batch.padding)
    size = expected.double().abs().max().item()
    assert (actual.double() - expected.double()).abs().max().item() <= precision.tolerance * size
