"""Other precisions: our error against float64 is held to the public model's error in the same precision."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from oracles import public
from oracles.pairs import assert_close, fast_copy, pair
from torch import nn

import beit3_fast.models as fast

LOW = [torch.bfloat16, torch.float16]
BATCH = 32  # enough outputs of the smallest head for a largest error to be a statistic


def cast(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    floating = {key for key, value in batch.items() if torch.is_tensor(value) and value.is_floating_point()}
    return {key: value.to(dtype) if key in floating else value for key, value in batch.items()}


def outputs(model: nn.Module, head: str, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The head's outputs and the backbone's; not the contrastive loss, a single number that can be right by luck."""
    data = public.outputs(model, head, batch)
    data.pop("loss", None)
    data["encoder_out"] = backbone(model, head, batch)
    return data


def backbone(model: nn.Module, head: str, batch: dict[str, Any]) -> torch.Tensor:
    if head == "imageclassification":
        return model.beit3(visual_tokens=batch["image"])["encoder_out"]
    out = model.beit3(batch["language_tokens"], batch["image"], batch["padding_mask"])["encoder_out"]
    valid = torch.ones(out.shape[:2], dtype=torch.bool)
    valid[:, -batch["padding_mask"].shape[1] :] = batch["padding_mask"] == 0
    return out[valid]


def weigh(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """A scalar with a different derivative for every output."""
    total = 0.0
    for value in values.values():
        weights = torch.linspace(-1, 1, value.numel(), dtype=torch.float64).cos().view(value.shape)
        total = total + (value.double() * weights).sum() / value.numel() ** 0.5
    return total


def largest(values: torch.Tensor) -> float:
    return values.abs().max().item()


def rms(values: torch.Tensor) -> float:
    return values.square().mean().sqrt().item()


def assert_as_accurate(
    actual: torch.Tensor,
    reference: torch.Tensor,
    truth: torch.Tensor,
    eps: float,
    what: str,
    *,
    scale: float = 0.0,
    roundings: int = 1,
) -> None:
    """Error at most twice the reference's plus a rounding floor, and under a cap that needs no reference.

    The floor is one rounding of the tensor's RMS for the RMS error, and `roundings` of its largest value for the
    largest error. `scale` is the least size that a tensor counts for.
    """
    ours, theirs = actual.double() - truth, reference.double() - truth
    for name, measure, floor in (("max", largest, roundings), ("rms", rms, 1)):
        size = max(measure(truth), scale)
        error, allowed = measure(ours), 2 * measure(theirs) + floor * eps * size
        assert error <= allowed, f"{what}: {name} error {error:.2e}, public {measure(theirs):.2e}, size {size:.2e}"
        assert error <= 16 * eps * size, f"{what}: {name} error {error:.2e} is {error / size / eps:.1f} roundings"


def truth_of(weights: nn.Module, head: str, batch: dict[str, Any]) -> nn.Module:
    """Our model in float64, itself checked against the public model in fp32."""
    reference = copy.deepcopy(weights).float()
    exact = fast_copy(reference, head).double()
    with torch.no_grad():
        expected = outputs(reference, head, cast(batch, torch.float32))
        actual = outputs(exact, head, cast(batch, torch.float64))
    for name, value in expected.items():
        assert_close(actual[name].float(), value, f"float64 {name}")
    return exact


@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
@pytest.mark.parametrize("head", public.HEADS)
def test_module(head: str, dtype: torch.dtype) -> None:
    """The whole module in one dtype; the truth is computed from the rounded weights and inputs."""
    reference = public.public_model(head).to(dtype)
    ours = fast_copy(public.public_model(head), head).to(dtype)
    batch = cast(public.training_batch(head, batch=BATCH), dtype)
    exact = truth_of(reference, head, batch)
    with torch.no_grad():
        expected, actual = outputs(reference, head, batch), outputs(ours, head, batch)
        truth = outputs(exact, head, cast(batch, torch.float64))
    for name in expected:
        assert actual[name].dtype == expected[name].dtype == dtype
        assert_as_accurate(actual[name], expected[name], truth[name], torch.finfo(dtype).eps, name)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("head", public.HEADS)
def test_autocast(head: str, dtype: torch.dtype) -> None:
    reference, ours = pair(head)
    batch = public.training_batch(head, batch=BATCH)
    exact = truth_of(reference, head, batch)
    with torch.no_grad():
        truth = outputs(exact, head, cast(batch, torch.float64))
        with torch.autocast("cpu", dtype):
            expected, actual = outputs(reference, head, batch), outputs(ours, head, batch)
    for name in expected:
        if name != "encoder_out":
            assert actual[name].dtype == expected[name].dtype, name
        assert_as_accurate(actual[name], expected[name], truth[name], torch.finfo(dtype).eps, name)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [("module", torch.float32), *((mode, dtype) for mode in ("module", "autocast") for dtype in LOW)],
    ids=str,
)
@pytest.mark.parametrize("head", ["vqav2", "captioning", "retrieval"])
def test_gradients(head: str, mode: str, dtype: torch.dtype) -> None:
    reference, ours = pair(head)
    batch = public.training_batch(head, batch=BATCH)
    if mode == "module":
        reference, ours, batch = reference.to(dtype), ours.to(dtype), cast(batch, dtype)
    exact = truth_of(reference, head, batch)
    for model, data in ((reference, batch), (ours, batch), (exact, cast(batch, torch.float64))):
        with torch.autocast("cpu", dtype) if mode == "autocast" and model is not exact else contextlib.nullcontext():
            values = outputs(model, head, data)
        weigh(values).backward()
    truth = fast.released_gradients(exact)
    expected, actual = public.gradients(reference), fast.released_gradients(ours)
    parameters = dict(reference.named_parameters())
    scale = 1e-2 * max(largest(grad) for grad in truth.values() if grad is not None)
    for key, grad in truth.items():
        if grad is None or expected[key] is None:
            assert actual[key] is None or not actual[key].count_nonzero()
            continue
        assert actual[key].dtype == parameters[key].dtype
        # The largest of some 150 tensors' largest errors is an extreme value, and each a sum over all rows.
        eps = torch.finfo(dtype).eps
        assert_as_accurate(actual[key], expected[key], grad, eps, key, scale=scale, roundings=4)


def test_gradients_of_the_position_tables_do_not_degrade_with_the_batch() -> None:
    """They sum over the batch: added up one sample at a time in bfloat16, the sum would stop growing."""
    dtype = torch.bfloat16
    reference = public.public_model("vqav2", encoder_layers=1).to(dtype)
    ours = fast_copy(public.public_model("vqav2", encoder_layers=1), "vqav2").to(dtype)
    batch = cast(public.training_batch("vqav2", batch=512, padding="unpadded"), dtype)
    exact = fast_copy(copy.deepcopy(reference).float(), "vqav2").double()
    for model, data in ((reference, batch), (ours, batch), (exact, cast(batch, torch.float64))):
        public.handler("vqav2").train_batch(model, **data)["loss"].backward()
    truth, actual, expected = fast.released_gradients(exact), fast.released_gradients(ours), public.gradients(reference)
    for table in "AB":
        key = f"beit3.encoder.embed_positions.{table}.weight"
        error, theirs = (rms(grads[key].double() - truth[key]) / rms(truth[key]) for grads in (actual, expected))
        assert error <= 2 * theirs, f"{key}: rms error {error:.4f} of the gradient's, public {theirs:.4f}"


# ---------------------------------------------------------------------------------------------------------- float64


@pytest.mark.parametrize("head", public.HEADS)
def test_float64_agrees_with_public_float64(head: str) -> None:
    """To 1e-6 only: the public model computes GELU and softmax in fp32 even then."""
    reference, ours = pair(head)
    batch = cast(public.training_batch(head), torch.float64)
    with torch.no_grad():
        expected = outputs(reference.double(), head, batch)
        for name, value in outputs(ours.double(), head, batch).items():
            assert_close(value, expected[name], name, tolerance=1e-6)


@pytest.mark.parametrize("head", public.HEADS)
def test_float64_gradients_are_derivatives(head: str) -> None:
    """Against central differences along random directions: an oracle that knows no autograd."""
    _, ours = pair(head)
    ours.double()
    batch = cast(public.training_batch(head), torch.float64)
    weigh(public.outputs(ours, head, batch)).backward()
    generator = torch.Generator().manual_seed(0)
    parameters = [parameter for parameter in ours.parameters() if parameter.grad is not None]
    for _ in range(2):
        directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        slope = sum((p.grad * direction).sum() for p, direction in zip(parameters, directions, strict=True))
        values = []
        with torch.no_grad():
            for step in (1e-6, -1e-6):
                for p, direction in zip(parameters, directions, strict=True):
                    p.add_(direction, alpha=step)
                values.append(weigh(public.outputs(ours, head, batch)))
                for p, direction in zip(parameters, directions, strict=True):
                    p.sub_(direction, alpha=step)
        assert slope.item() == pytest.approx(((values[0] - values[1]) / 2e-6).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
def test_generate_in_other_dtypes(dtype: torch.dtype) -> None:
    """float64 gives the fp32 caption; the low precisions give some caption."""
    _, ours = pair("captioning")
    with torch.no_grad():
        ours.mlm_head.weight.mul_(3.0)
    image = public.inputs(batch=2)["image"]
    settings: dict[str, Any] = {"num_beams": 3, "max_length": 8, "mask_token_id": 199}
    expected = ours.generate(image, **settings).tokens
    result = ours.to(dtype).generate(image.to(dtype), **settings)
    if dtype == torch.float64:
        assert result.tokens == expected
    assert len(result.tokens) == 2
    assert all(0 <= token < 200 for row in result.tokens for token in row)
    assert all(torch.isfinite(torch.tensor(list(result.scores))))
