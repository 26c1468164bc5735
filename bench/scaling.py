"""``beit3-fast bench scaling``: what a forward of the backbone costs as batch, image and text grow.

The cost must grow as the operations do: every point shows its time beside its FLOPs, and every curve the exponent k of
time ~ FLOPs^k, by least squares over its points. Adding a curve is adding an entry to ``CURVES``.

Parity comes first at every point, by the rule of ``bench model``. The float64 truth is that of a few samples, the last
among them: they do not depend on each other, and a whole batch of 64 would take minutes. A provider other than ours
whose forward would take longer than ``LONGEST`` seconds, judged by its last point, is checked there and not timed.

The JSON is an object::

    schema     1; raised when a field changes its meaning or goes away
    kind       "scaling"
    complete   false when the run was interrupted: later points are missing
    machine    as in bench model
    settings   device, rounds
    roofs      as in bench ops
    curves     one object a curve:
      name       "image", "batch" or "text"
      title      what is the same at all points
      axis       what x is, with its unit
      dtype      of weights and images
      exponents  an object with one number a provider, null with fewer than two times
      points     one object each:
        x
        flops      of the matrix products on tokens that are no padding
        tokens     of all samples, without padding
        skipped    null, or why the point was not run; providers is then empty
        providers  one object each:
          name
          missing   null, or why it cannot take part
          failure   null, or what it raised
          parity    "passed", "failed", or null when it did not run
          reason    null, the bound that was broken, or why there is no time all the same
          time_ms   null, or median, low, high, rounds (every round's time, in order)
          gflop_s   null, or flops over the median time
          roof      null, or the share of the machine's rate of matrix products in the provider's dtype, 1 = reached
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from beit3_fast import optimize
from beit3_fast.models import BEiT3, EncoderConfig

from . import cases, model, model_tasks, parity, reference
from .cases import CAPTION_LENGTHS, PADDED_TEXT, ModelCase, check_known, dtype_name
from .model import BASELINE, OPTIMIZED, OUR_NAMES, Inputs, Outcome, Provider, Run
from .report import milliseconds, parity_cells, provider_cell
from .roofs import Roofs
from .timing import Timing

SCHEMA = 1
LONGEST = 3.0
"""Seconds a forward of a provider that is not ours, at most, for it to be timed."""


@dataclass(frozen=True)
class Curve:
    """One quantity that grows.

    Attributes:
        name: what ``--curve`` takes.
        title: what is the same at all points.
        axis: the quantity, with its unit.
        values: it takes, rising.
        quick: the values of a quick run.
        case: the case at a value, in float32.
    """

    name: str
    title: str
    axis: str
    values: tuple[int, ...]
    quick: tuple[int, ...]
    case: Callable[[int], ModelCase]

    def points(self, quick: bool) -> tuple[int, ...]:
        """The values of a run."""
        return self.quick if quick else self.values


CURVES = (
    Curve(
        "image",
        "base, one image alone",
        "image size (pixels a side)",
        (224, 320, 384, 480, 768),
        (112, 224),
        lambda size: ModelCase(f"image {size}", "base", 1, size, None),
    ),
    Curve(
        "batch",
        "base, images of 224 pixels with captions",
        "batch (samples)",
        (1, 2, 4, 8, 16, 64),
        (1, 2),
        lambda batch: ModelCase(f"batch {batch}", "base", batch, 224, PADDED_TEXT, CAPTION_LENGTHS),
    ),
    # Alone: beside the 197 tokens of an image a short text costs next to nothing, and the curve would be flat.
    Curve(
        "text",
        "base, 4 texts alone, none padded",
        "text length (tokens)",
        (8, 16, 32, 64, 128, 256, 512),
        (8, 32),
        lambda tokens: ModelCase(f"text {tokens}", "base", 4, None, tokens),
    ),
)


def select_curves(names: Iterable[str]) -> list[Curve]:
    """The curves of these names in the order given, all without names.

    Raises:
        ValueError: an unknown name (the nearest known ones are offered).
    """
    known = {curve.name: curve for curve in CURVES}
    names = list(dict.fromkeys(names))
    for name in names:
        check_known("curve", name, known)
    return [known[name] for name in names or known]


def select_providers(names: Iterable[str] = ()) -> list[Provider]:
    """The reference, our optimized model, and those of these names; the reference first.

    Raises:
        ValueError: an unknown name (the nearest known ones are offered).
    """
    task = model_tasks.tasks()["forward"]
    known = {provider.name: provider for provider in (*task.own, *task.peers)}
    chosen = {BASELINE, OPTIMIZED.name, *names}
    for name in chosen:
        check_known("provider", name, known)
    return [OURS if name == OURS.name else provider for name, provider in known.items() if name in chosen]


# ---- one point ----


class Setup(model.Setup):
    """A point made ready. The truth is that of the samples that ``judged`` names, and models are built once for all
    points of an image size."""

    def __init__(self, case: ModelCase, device: torch.device) -> None:
        super().__init__(case, device)
        self._optimized: nn.Module | None = None

    def optimized(self) -> nn.Module:
        """Ours."""
        if self._optimized is None:
            self._optimized = optimize(self.build(BEiT3))
        return self._optimized

    def at(self, case: ModelCase) -> Setup:
        """Another point of the same size and dtype, with the same weights but for the table of image positions."""
        moved = copy.copy(self)
        moved.case = case
        moved.config = model._config(case)
        if moved.config != self.config:
            vision_tokens = (moved.config.img_size // moved.config.patch_size) ** 2 + 1
            rows = vision_tokens + reference.FIRST_POSITION
            table = torch.randn(rows, moved.config.encoder_embed_dim, generator=torch.Generator().manual_seed(2))
            table = (0.5 * table).to(case.dtype).to(self.device)
            moved.weights = {**self.weights, "encoder.embed_positions.A.weight": table}
            moved._references, moved._optimized = {}, None
        moved.inputs = model._inputs(case, moved.config, self.device)
        return moved

    @property
    def judged(self) -> list[int]:
        """The first sample, one amid the batch, and the last."""
        return sorted({0, self.case.batch // 2, self.case.batch - 1})

    def truth(self) -> Tensor:
        """The rows (N, D) of the judged samples that mean something."""
        inputs = self.inputs.to(self.case.truth)
        few = Inputs(*(None if tensor is None else tensor[self.judged] for tensor in vars(inputs).values()))
        with self.running():
            out = few.call(self.reference(self.case.truth))
            return out[self.meaningful(out)[self.judged]]

    def errors(self, output: Tensor, truth: Tensor) -> dict[str, parity.Error]:
        out = output[self.judged]
        return {"out": parity.error(out[self.meaningful(output)[self.judged]], truth)}


def _ours(setup: Setup) -> Run:
    ours = setup.optimized()
    return lambda: setup.inputs.call(ours)


OURS = replace(OPTIMIZED, build=_ours)
"""The same, built less often."""


class Setups:
    """Makes the setup of one point after another, all from the weights of the first."""

    def __init__(self) -> None:
        self._last: Setup | None = None

    def __call__(self, case: ModelCase, device: torch.device) -> Setup:
        self._last = Setup(case, device) if self._last is None else self._last.at(case)
        return self._last


@dataclass(frozen=True)
class Point:
    """One value of a curve.

    Attributes:
        tokens: of all samples, without padding.
        outcomes: of all providers; empty where the point was skipped.
        timing: of those that passed parity and were timed.
        untimed: why somebody who passed was not timed, by provider.
        skipped: why the point was not run.
    """

    x: int
    flops: int
    tokens: int
    outcomes: list[Outcome] = field(default_factory=list)
    timing: Timing = field(default_factory=lambda: Timing({}))
    untimed: Mapping[str, str] = field(default_factory=dict)
    skipped: str | None = None

    @property
    def ok(self) -> bool:
        """Everybody who is no peer ran and was right, as far as they could take part."""
        return all(outcome.harmless for outcome in self.outcomes)


def run_point(
    curve: Curve,
    x: int,
    taking_part: Sequence[Provider],
    earlier: Sequence[Point],
    setups: Setups,
    *,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    progress: Callable[[str], None] = lambda message: None,
) -> Point:
    """Parity and times at ``x``; ``earlier`` are the points of the curve before it."""
    case = replace(curve.case(x), dtype=dtype)
    config = model._config(case)
    flops = cases.flops(case, config)
    assert flops is not None  # of a forward they are always counted
    point = Point(x, flops, _tokens(case, config))

    untimed = {}
    for provider in taking_part:
        seconds = expected_seconds(provider.name, flops, earlier)
        if provider.name not in OUR_NAMES and seconds is not None and seconds > LONGEST:
            untimed[provider.name] = f"a forward would take about {seconds:.0f} s"
    result = model.run_case(
        case,
        [_once(provider) if provider.name in untimed else provider for provider in taking_part],
        device=device,
        rounds=rounds,
        make_setup=setups,
        progress=progress,
    )
    times = {} if result.timing is None else result.timing.rounds
    timing = Timing({name: rounds for name, rounds in times.items() if name not in untimed})
    return replace(point, outcomes=result.outcomes, timing=timing, untimed=untimed, skipped=result.skipped)


def expected_seconds(provider: str, flops: int, earlier: Sequence[Point]) -> float | None:
    """A forward's time at the rate of the provider's last timed point; None without one."""
    timed = [point for point in earlier if provider in point.timing.rounds]
    if not timed:
        return None
    return timed[-1].timing.time(provider).median * 1e-9 * flops / timed[-1].flops


def _once(provider: Provider) -> Provider:
    """The provider for parity alone: it computes in its first call, and later ones, which are timed, cost nothing."""

    def build(setup: Any) -> Run:
        run = provider.build(setup)
        outputs: list[Any] = []

        def call() -> Any:
            if not outputs:
                outputs.append(run())
            return outputs[0]

        return call

    return replace(provider, build=build)


def _tokens(case: ModelCase, config: EncoderConfig) -> int:
    vision = 0 if case.image_size is None else (case.image_size // config.patch_size) ** 2 + 1
    return case.batch * vision + sum(case.lengths())


# ---- a curve ----


def exponent(points: Iterable[Point], provider: str) -> float | None:
    """k of time ~ FLOPs^k, by least squares in logarithms; None with fewer than two times."""
    timed = [point for point in points if provider in point.timing.rounds]
    if len(timed) < 2:
        return None
    operations = [math.log(point.flops) for point in timed]
    times = [math.log(point.timing.time(provider).median) for point in timed]
    return statistics.linear_regression(operations, times).slope


def table(curve: Curve, points: Sequence[Point], dtype: torch.dtype, roofs: Roofs) -> Table:
    """A curve's points, and in the caption its exponents."""
    title = f"{curve.name}: {curve.title}, {dtype_name(dtype)}"
    shown = Table(title=title, title_justify="left", title_style="bold", caption_justify="left", min_width=len(title))
    shown.add_column(curve.axis, justify="right")
    shown.add_column("GFLOP", justify="right")
    shown.add_column("provider")
    shown.add_column("parity")
    shown.add_column("time", justify="right")
    shown.add_column("GFLOP/s", justify="right")
    shown.add_column("of roof", justify="right")
    for point in points:
        first = [str(point.x), f"{point.flops / 1e9:,.4g}"]
        if point.skipped is not None:
            shown.add_row(*first, Text(f"skipped: {point.skipped}", style="yellow"))
        for outcome in sorted(point.outcomes, key=lambda outcome: outcome.missing is not None):
            shown.add_row(*first, *_cells(outcome, point, roofs))
            first = ["", ""]
        shown.add_section()
    fits = [f"{name} {slope:.2f}" for name, slope in _exponents(points).items() if slope is not None]
    if fits:
        shown.caption = f"time grows as FLOPs to the power of: {', '.join(fits)}"
    return shown


def _cells(outcome: Outcome, point: Point, roofs: Roofs) -> list[Any]:
    name, cells = outcome.provider, [provider_cell(outcome), *parity_cells(outcome)]
    if not outcome.ok:
        return cells
    if name not in point.timing.rounds:
        return [*cells, Text(f"not timed: {point.untimed.get(name, '')}", style="dim")]
    time, (rate, share) = point.timing.time(name), _rate(outcome, point, roofs)
    spread = f"{milliseconds(time.median)} [{milliseconds(time.low)}, {milliseconds(time.high)}] ms"
    return [*cells, spread, f"{rate / 1e9:,.3g}", "" if share is None else f"{100 * share:.0f}%"]


def document(
    measured: Sequence[tuple[Curve, Sequence[Point]]],
    dtype: torch.dtype,
    roofs: Roofs,
    machine: Mapping[str, Any],
    settings: Mapping[str, Any],
    *,
    complete: bool,
) -> dict[str, Any]:
    """The JSON of a run; the module's docstring describes it."""
    return {
        "schema": SCHEMA,
        "kind": "scaling",
        "complete": complete,
        "machine": dict(machine),
        "settings": dict(settings),
        "roofs": roofs.document(),
        "curves": [
            {
                "name": curve.name,
                "title": curve.title,
                "axis": curve.axis,
                "dtype": dtype_name(dtype),
                "exponents": _exponents(points),
                "points": [
                    {
                        "x": point.x,
                        "flops": point.flops,
                        "tokens": point.tokens,
                        "skipped": point.skipped,
                        "providers": [_provider(outcome, point, roofs) for outcome in point.outcomes],
                    }
                    for point in points
                ],
            }
            for curve, points in measured
        ],
    }


def _provider(outcome: Outcome, point: Point, roofs: Roofs) -> dict[str, Any]:
    timed, found = outcome.provider in point.timing.rounds, outcome.document()
    rate, share = _rate(outcome, point, roofs) if timed else (None, None)
    return found | {
        "reason": found["reason"] or point.untimed.get(outcome.provider),
        "time_ms": point.timing.document(outcome.provider) if timed else None,
        "gflop_s": None if rate is None else rate / 1e9,
        "roof": share,
    }


def _rate(outcome: Outcome, point: Point, roofs: Roofs) -> tuple[float, float | None]:
    """FLOP a second of a provider that was timed, and their share of the roof in its dtype."""
    rate = point.flops / (point.timing.time(outcome.provider).median * 1e-9)
    roof = None if outcome.dtype is None else roofs.matrix.get(outcome.dtype)
    return rate, None if roof is None else rate / roof


def _exponents(points: Sequence[Point]) -> dict[str, float | None]:
    names = dict.fromkeys(outcome.provider for point in points for outcome in point.outcomes)
    return {name: exponent(points, name) for name in names}
