"""Parity before speed: how far an output is from the truth, and whether that is near enough to be timed.

The rule: the error may be at most twice the error that reference PyTorch makes in the same dtype, plus a rounding
floor, both in the maximum and in the root mean square; and it may never pass an absolute cap, so that a reference that
is itself far off hides nothing. All figures are relative to the truth's own size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REFERENCE_FACTOR = 2.0
FLOOR_IN_EPS = 2.0

CAP = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}
"""Largest maximum error per dtype, in units of the largest magnitude of the truth."""


@dataclass(frozen=True)
class Error:
    """An output's distance from the truth: ``maximum`` over the truth's largest magnitude, ``rms`` over its RMS."""

    maximum: float
    rms: float
    absolute: float


@dataclass(frozen=True)
class Verdict:
    """``reason`` says in a few words what was broken; it is empty when ``ok``."""

    ok: bool
    reason: str = ""


def error(output: Tensor, truth: Tensor) -> Error:
    """Measures ``output`` against ``truth``, both of one shape, in float64.

    Raises:
        ValueError: the shapes differ, or there is nothing to compare.
    """
    if output.shape != truth.shape:
        raise ValueError(f"output must have the truth's shape {tuple(truth.shape)}, got {tuple(output.shape)}")
    if truth.numel() == 0:
        raise ValueError("truth must have at least one element, got none")
    truth = truth.double()
    difference = (output.to(truth.device).double() - truth).abs()
    absolute = difference.max().item()
    tiny = torch.finfo(torch.float64).tiny
    return Error(
        maximum=absolute / max(truth.abs().max().item(), tiny),
        rms=difference.square().mean().sqrt().item() / max(truth.square().mean().sqrt().item(), tiny),
        absolute=absolute,
    )


def judge(measured: Error, dtype: torch.dtype, baseline: Error | None = None) -> Verdict:
    """Applies the rule. ``baseline`` is reference PyTorch's error in ``dtype``; without one the cap alone decides."""
    floor = FLOOR_IN_EPS * torch.finfo(dtype).eps
    bounds = [("maximum", measured.maximum, CAP[dtype], "the cap")]
    if baseline is not None:
        bounds += [
            ("maximum", measured.maximum, REFERENCE_FACTOR * baseline.maximum + floor, "2x the reference's"),
            ("rms", measured.rms, REFERENCE_FACTOR * baseline.rms + floor, "2x the reference's"),
        ]
    for what, value, bound, name in bounds:
        if not value <= bound:  # NaN must fail
            return Verdict(False, f"{what} error {value:.1e} > {bound:.1e} ({name})")
    return Verdict(True)
