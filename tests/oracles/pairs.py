"""A public model and ours with the same weights, and what it means for them to agree."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import beit3_fast.models as fast
from oracles import public

TOLERANCE = 2e-5  # of the compared tensor's own largest magnitude, fp32


def fast_class(head: str | None) -> type[nn.Module]:
    """Our class of the same name as the public one for `head` (None: the bare backbone)."""
    return getattr(fast, public.CLASSES[head].__name__ if head else "BEiT3")


def build(head: str | None, args: Any) -> nn.Module:
    """Our model of `head`, built by the public constructor call."""
    if head in public.NUM_CLASSES:
        return fast_class(head)(args, num_classes=public.NUM_CLASSES[head])
    return fast_class(head)(args)


def fast_copy(reference: nn.Module, head: str | None) -> nn.Module:
    """Our model with the weights and the mode of the public model `reference`."""
    with torch.device("meta"):
        model = build(head, reference.args)
    model.to_empty(device="cpu")
    model.load_state_dict(reference.state_dict(), strict=True)
    return model.train(reference.training)


def pair(head: str | None, size: str = "tiny", *, seed: int = 0, **overrides: Any) -> tuple[nn.Module, nn.Module]:
    """(public, ours) with equal random weights, in eval mode; `overrides` are EncoderConfig fields."""
    reference = public.public_model(head, size, seed=seed, **overrides)
    return reference, fast_copy(reference, head)


def relative_error(actual: torch.Tensor, expected: torch.Tensor, scale: float | None = None) -> float:
    """Largest absolute difference over the largest magnitude of `expected` (or over `scale`)."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    assert actual.isfinite().all(), "not finite"
    difference = (actual.double() - expected.double()).abs().max().item()
    if scale is None:
        scale = expected.double().abs().max().item()
    return difference / scale if scale else (0.0 if difference == 0 else float("inf"))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Max error at most `tolerance` of the scale of `expected`; same shape and dtype; finite."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: error {error:.2e} of the scale, allowed {tolerance:.0e}"


def assert_outputs_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(actual[name], value, f"{what} {name}")


def assert_gradients_close(model: nn.Module, reference: nn.Module, tolerance: float = TOLERANCE) -> None:
    """Every released parameter's gradient, each on its own scale, but at least 1e-3 of the largest gradient.

    The bias of a key projection shifts all of a query's scores alike: its gradient is a sum that cancels, to exactly
    zero where all keys share the expert. Its rounding error is measured on the scale of its weight's gradient.
    """
    expected = public.gradients(reference)
    actual = fast.released_gradients(model)
    assert actual.keys() == expected.keys()
    magnitude = {key: 0.0 if grad is None else grad.abs().max().item() for key, grad in expected.items()}
    largest = max(magnitude.values())
    assert largest > 0
    wrong = []
    for key, grad in expected.items():
        ours = actual[key]
        if magnitude[key] == 0.0:
            if ours is not None and ours.count_nonzero():
                wrong.append(f"{key}: a gradient where the public model has none")
            continue
        if ours is None:
            wrong.append(f"{key}: no gradient")
            continue
        scale = max(magnitude[key], 1e-3 * largest)
        if ".k_proj." in key and key.endswith(".bias"):
            scale = max(scale, magnitude[key.removesuffix("bias") + "weight"])
        error = relative_error(ours, grad, scale)
        if error > tolerance:
            wrong.append(f"{key}: error {error:.2e} of the scale, allowed {tolerance:.0e}")
    assert not wrong, f"{len(wrong)} of {len(expected)} gradients differ:\n" + "\n".join(wrong[:20])


def shared_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """A detached copy of the model's state dict."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}
