"""Parity before speed: how far an output is from the truth, and whether that is near enough to be timed.

The rule: the error may be at most twice the error that reference PyTorch makes in the same dtype, plus a rounding
floor, both in the maximum and in the root mean square; and it may never pass an absolute cap, so that a reference that
is itself far off hides nothing. All figures are relative to the truth's own size.

The floor is for a reference that happens to round once less. In the root mean square that is exact arithmetic:
rounding to p bits moves a value in [1, 2) by an error that is uniform within eps / 2 of it either way, eps / sqrt(12)
in the root mean square and relative to the value at most that. Everybody rounds the result, about 0.2 eps, so whoever
exceeds 0.4 eps plus the floor does worse than rounding: sums of some 30 terms kept in the low precision do, their error
is about 0.2 sqrt(terms / 2) eps. The maximum is one element, and over few elements chance alone makes it twice
another's: its floor is wider, two units in the last place of the largest magnitude.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

REFERENCE_FACTOR = 2.0
MAXIMUM_FLOOR = 2.0
"""In eps of the dtype."""

RMS_FLOOR = 12**-0.5
"""In eps of the dtype: what rounding once adds, at the most."""

CAP = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2, torch.int8: 1e-1}
"""Largest maximum error per dtype, in units of the largest magnitude of the truth. No reference computes in int8."""


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
    bounds = [("maximum", measured.maximum, CAP[dtype], "the cap")]
    if baseline is not None:
        eps = torch.finfo(dtype).eps
        bounds += [
            (
                "maximum",
                measured.maximum,
                REFERENCE_FACTOR * baseline.maximum + MAXIMUM_FLOOR * eps,
                "2x the reference's",
            ),
            ("rms", measured.rms, REFERENCE_FACTOR * baseline.rms + RMS_FLOOR * eps, "2x the reference's"),
        ]
    for what, value, bound, name in bounds:
        if not value <= bound:  # NaN must fail
            return Verdict(False, f"{what} error {value:.1e} > {bound:.1e} ({name})")
    return Verdict(True)
