"""How fast a provider is beside the reference of its own run, read from a document."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .timing import Estimate, median_interval


def over_reference(provider: Mapping[str, Any], beside: Sequence[Mapping[str, Any]], reference: str) -> Estimate | None:
    """Time of the provider named ``reference`` over that of ``provider``, both of one case and run; above 1
    ``provider`` is the faster. None where either has no time.

    Where the document has every round's time, the median of the ratios within each round with its order-statistic
    interval: a machine that slows down in the middle of a run changes both times of a round. Where it has not, the
    quotient of the medians, from the least that the two intervals allow to the most.
    """
    time, theirs = provider["time_ms"], time_of(reference, beside)
    if time is None or theirs is None:
        return None
    ratios = round_ratios(provider, beside, reference)
    if ratios is not None:
        return median_interval(ratios)
    return Estimate(theirs["median"] / time["median"], theirs["low"] / time["high"], theirs["high"] / time["low"])


def round_ratios(
    provider: Mapping[str, Any], beside: Sequence[Mapping[str, Any]], reference: str
) -> list[float] | None:
    """The same time over time in every round; None where a document has no rounds, as those of older versions."""
    time, theirs = provider["time_ms"], time_of(reference, beside)
    if time is None or theirs is None or "rounds" not in time or "rounds" not in theirs:
        return None
    return [slow / fast for slow, fast in zip(theirs["rounds"], time["rounds"], strict=True)]


def time_of(name: str, among: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The ``time_ms`` of the provider of this name; None where it did not run or has none."""
    return next((entry["time_ms"] for entry in among if entry["name"] == name), None)
