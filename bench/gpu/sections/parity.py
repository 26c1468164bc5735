"""Every kernel against float64 under the rule of :mod:`bench.parity`, and whether it gives the same bits every time.

Large numbers of rows are the point: only they reach the tiles and pipelines that users run. The kernels add up in a
fixed order, so that two runs differ only if something raced.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from beit3_fast import ops

from ... import parity
from ...op_cases import OpCase
from ...op_providers import OURS, REFERENCE
from ...ops import Call, Problem
from ..kernel_cases import DecodeStep, cases
from ..record import Recorder
from ..setting import Setting, Size, models_and_batches

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Kind:
    """Numbers to compute in: ``judged_as`` is the dtype whose rounding they have."""

    name: str
    dtype: torch.dtype
    judged_as: torch.dtype
    precision: str = "highest"


KINDS = (
    Kind("bf16", torch.bfloat16, torch.bfloat16),
    Kind("fp16", torch.float16, torch.float16),
    Kind("high", torch.float32, torch.float16, "high"),  # tf32 products: the mantissa of fp16
    Kind("fp32", torch.float32, torch.float32),
)


def run(record: Recorder, setting: Setting) -> None:
    for kind in KINDS:
        for model, samples in models_and_batches(setting.sizes):
            for case in cases(model, setting.batch(samples), kind.dtype):
                about = {
                    **{"op": case.shape.name, "direction": "backward" if case.backward else "forward"},
                    **{"model": model.name, "rows": case.batch.rows, "kind": kind.name},
                }
                _both(record, setting, kind, partial(OpResults, case, setting), about)
            about = {
                **{"op": "decode", "direction": "forward"},
                **{"model": model.name, "rows": setting.rows(samples), "kind": kind.name},
            }
            _both(record, setting, kind, partial(DecodeResults, model, samples, kind, setting), about)


def _both(
    record: Recorder,
    setting: Setting,
    kind: Kind,
    make: Callable[[], OpResults | DecodeResults],
    about: Mapping[str, Any],
) -> None:
    with matmul_precision(kind.precision):
        record.measure("parity", lambda: _parity(make(), kind), **about)
        if kind.name == "bf16":
            record.measure("repeats", lambda: _repeats(make(), setting.sizes.repeats), **about)


class OpResults:
    """An op of the layer: our results, reference PyTorch's, and the truth, each by name."""

    def __init__(self, case: OpCase, setting: Setting) -> None:
        self.case = case
        self.layout = case.batch.layout(setting.device)
        self.problem = Problem(case, self.layout, seed=0)
        self._ours = self._call(OURS)

    def _call(self, provider: Any) -> Call:
        return Call(provider, provider.builds[self.case.op](self.case, self.layout), [self.problem])

    def ours(self) -> Results:
        return self._ours.results()

    def reference(self) -> Results:
        return self._call(REFERENCE).results()

    def truth(self) -> Results:
        return self.problem.truth()


class DecodeResults:
    """The same of a captioning step's attention."""

    def __init__(self, model: Size, samples: int, kind: Kind, setting: Setting) -> None:
        self.step = DecodeStep(model, samples, kind.dtype, setting)

    def ours(self) -> Results:
        return {"out": self.step()}

    def reference(self) -> Results:
        return {"out": self.step(ops.decode_attention_reference)}

    def truth(self) -> Results:
        return {"out": self.step(ops.decode_attention_reference, torch.float64)}


def _parity(of: OpResults | DecodeResults, kind: Kind) -> dict[str, Any]:
    """The worst of all results: the largest error over what is allowed decides."""
    truth = of.truth()
    theirs = {name: parity.error(result, truth[name]) for name, result in of.reference().items()}
    ours = {name: parity.error(result, truth[name]) for name, result in of.ours().items()}
    reasons = []
    for name, error in ours.items():
        verdict = parity.judge(error, kind.judged_as, theirs[name])
        if not verdict.ok:
            reasons.append(f"{name}: {verdict.reason}")
    return {
        "ok": not reasons,
        "error": max(error.maximum for error in ours.values()),
        "rms": max(error.rms for error in ours.values()),
        "reference_error": max(error.maximum for error in theirs.values()),
        "reference_rms": max(error.rms for error in theirs.values()),
        **({"reason": "; ".join(reasons)[:300]} if reasons else {}),
    }


def _repeats(of: OpResults | DecodeResults, repeats: int) -> dict[str, Any]:
    """How many of so many further runs differ from the first, and in how many elements at most."""
    first = of.ours()
    differing = [torch.stack([_different(first[name], again) for name, again in of.ours().items()]).sum()]
    for _ in range(repeats - 1):
        differing.append(torch.stack([_different(first[name], again) for name, again in of.ours().items()]).sum())
    counts = torch.stack(differing)  # one wait for all of them
    return {
        "ok": not counts.any().item(),
        "runs": repeats,
        "differing": int((counts > 0).sum()),
        "elements": int(counts.max()),
    }


def _different(one: Tensor, other: Tensor) -> Tensor:
    """How many elements have other bits."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return (one.contiguous().view(bits) != other.contiguous().view(bits)).sum()


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
