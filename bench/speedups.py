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
    other = next((entry for entry in beside if entry["name"] == reference), None)
    time = provider["time_ms"]
    if other is None or time is None or other["time_ms"] is None:
        return None
    theirs = other["time_ms"]
    if "rounds" in time and "rounds" in theirs:
        return median_interval([slow / fast for slow, fast in zip(theirs["rounds"], time["rounds"], strict=True)])
    return Estimate(theirs["median"] / time["median"], theirs["low"] / time["high"], theirs["high"] / time["low"])
