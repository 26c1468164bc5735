"""What becomes of a provider in a case, in whatever kind of run: it cannot take part, it raises, it is wrong, or it is
right and gets a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from . import parity
from .timing import Stopwatch, Timing, interleave


class ProviderError(Exception):
    """A provider raised ``cause`` while it ran."""

    def __init__(self, provider: str, cause: Exception) -> None:
        self.provider = provider
        message = next(iter(str(cause).splitlines()), "")
        super().__init__(f"{type(cause).__name__}: {message}")


@contextlib.contextmanager
def blaming(provider: str) -> Iterator[None]:
    """What the block raises becomes the provider's :class:`ProviderError`."""
    try:
        yield
    except Exception as error:
        raise ProviderError(provider, error) from error


@dataclass(frozen=True)
class Outcome:
    """One provider's result.

    Attributes:
        provider: its name.
        peer: it may fail without failing the run.
        dtype: of its matrix products.
        missing: why it cannot take part.
        failure: what it raised, or how it ended the process that tried it.
        errors: how far each of its results is from the truth.
        verdict: whether that was near enough to be timed.
        host_time: why the host's time is in its time, where others' are the device's alone.
    """

    provider: str
    peer: bool = False
    dtype: torch.dtype | None = None
    missing: str | None = None
    failure: str | None = None
    errors: Mapping[str, parity.Error] | None = None
    verdict: parity.Verdict | None = None
    host_time: str | None = None

    @property
    def ok(self) -> bool:
        """It ran and was right."""
        return self.failure is None and self.verdict is not None and self.verdict.ok

    @property
    def harmless(self) -> bool:
        """It ran and was right, or could not take part, or is a peer."""
        return self.ok or self.peer or self.missing is not None

    @property
    def error(self) -> parity.Error | None:
        """The largest of each kind over all results."""
        if not self.errors:
            return None
        kinds = zip(*(asdict(error).values() for error in self.errors.values()), strict=True)
        return parity.Error(*(math.nan if any(map(math.isnan, values)) else max(values) for values in kinds))

    @property
    def words(self) -> str:
        """ "passed", or why there is no time."""
        if self.missing is not None:
            return f"not run: {self.missing}"
        if self.failure is not None or self.verdict is None:
            return f"did not run: {self.failure}"
        return "passed" if self.ok else f"FAILED: {self.verdict.reason}"

    def document(self) -> dict[str, Any]:
        """What every kind's JSON says of a provider."""
        return {
            "name": self.provider,
            "missing": self.missing,
            "failure": self.failure,
            "parity": None if self.verdict is None else ("passed" if self.verdict.ok else "failed"),
            "reason": (self.verdict.reason or None) if self.verdict else None,
        }


def error_document(error: parity.Error | None) -> dict[str, float] | None:
    """For the JSON, which has no numbers that are not finite."""
    return None if error is None or not all(map(math.isfinite, asdict(error).values())) else asdict(error)


def judge(
    errors: Mapping[str, parity.Error], dtype: torch.dtype, by: str | None, outcomes: Mapping[str, Outcome]
) -> parity.Verdict:
    """Parity of all results in ``dtype``; the first that breaks the rule decides.

    Args:
        by: the provider whose errors these are held against; without one the cap alone decides.
        outcomes: of those before it, by name.
    """
    baseline: Mapping[str, parity.Error] = {}
    if by is not None:
        judged_by = outcomes.get(by)
        if judged_by is None or not judged_by.ok or not judged_by.errors:
            return parity.Verdict(False, f"nothing to judge it by: {by} did not pass")
        baseline = judged_by.errors
    for name, error in errors.items():
        verdict = parity.judge(error, dtype, baseline.get(name))
        if not verdict.ok:
            return verdict if len(errors) == 1 else parity.Verdict(False, f"{name}: {verdict.reason}")
    return parity.Verdict(True)


def time_those_that_passed(
    calls: dict[str, Callable[[], object]],
    outcomes: dict[str, Outcome],
    *,
    rounds: int,
    warmup: int,
    stopwatch: Stopwatch,
    say: Callable[[str], None],
) -> Timing | None:
    """Interleaved times of ``calls``, by provider. One that raises :class:`ProviderError` on the way has that as its
    outcome, and the others start again without it; None if nobody is left."""
    while calls:
        try:
            return interleave(
                calls,
                rounds=rounds,
                warmup=warmup,
                stopwatch=stopwatch,
                after_round=lambda done: say(f"round {done} of {rounds}"),
            )
        except ProviderError as error:
            outcomes[error.provider] = replace(outcomes[error.provider], failure=str(error))
            del calls[error.provider]
    return None
