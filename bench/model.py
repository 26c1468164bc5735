"""``beit3-fast bench model``: the backbone's forward, ours against reference PyTorch; parity first.

Every provider gets the same weights and inputs. Its output is compared with a run of reference PyTorch in float64 (or
in float32 where a case says so); one that breaks the parity rule gets no time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast.models import BEiT3, EncoderConfig

from . import parity, reference
from .cases import ModelCase
from .timing import Timing, interleave, stopwatch_for

BASELINE = "reference"
WARMUP = 1


@dataclass(frozen=True)
class Inputs:
    """What one forward takes, on its device: ids (B, T), image (B, 3, S, S), padding (B, T) with 1 at padding."""

    textual_tokens: Tensor | None
    visual_tokens: Tensor | None
    text_padding_position: Tensor | None

    def call(self, model: Callable[..., Any]) -> Tensor:
        out = model(
            textual_tokens=self.textual_tokens,
            visual_tokens=self.visual_tokens,
            text_padding_position=self.text_padding_position,
        )
        return out["encoder_out"]

    def to(self, dtype: torch.dtype) -> Inputs:
        image = None if self.visual_tokens is None else self.visual_tokens.to(dtype)
        return Inputs(self.textual_tokens, image, self.text_padding_position)


class Setup:
    """A case made ready: weights, inputs, and the models built from them, each once."""

    def __init__(self, case: ModelCase, device: torch.device) -> None:
        self.case = case
        self.device = device
        self.config = _config(case)
        self.weights = _weights(self.config, case.dtype, device)
        self.inputs = _inputs(case, self.config, device)
        self._references: dict[torch.dtype, nn.Module] = {}

    def reference(self, dtype: torch.dtype) -> nn.Module:
        """Reference PyTorch in ``dtype``, shared by all providers that ask for it."""
        if dtype not in self._references:
            self._references[dtype] = self.build_reference(dtype)
        return self._references[dtype]

    def build_reference(self, dtype: torch.dtype) -> nn.Module:
        """A fresh one, freed as soon as the caller drops it."""
        return reference.with_weights(
            lambda: reference.BEiT3(self.config), self.weights, device=self.device, dtype=dtype
        )

    def valid(self, out: Tensor) -> Tensor:
        """The rows (N, D) of ``out`` (B, S, D) that mean something: padded positions are left out."""
        lengths = torch.tensor(self.case.lengths(), device=out.device)
        text_tokens = self.case.text_tokens or 0
        vision_tokens = out.shape[1] - text_tokens
        positions = torch.arange(out.shape[1], device=out.device) - vision_tokens
        return out[positions < lengths[:, None]]


Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Provider:
    """Something that computes the case.

    ``build(setup)`` returns a function that runs one forward. Its error is held against that of the provider named
    ``judged_by`` in the same dtype; a provider that names itself is held to the cap alone. ``computes_in`` gives the
    dtype of its matrix products, which decides the rounding floor and the cap.
    """

    name: str
    build: Callable[[Setup], Run]
    judged_by: str = BASELINE
    computes_in: Callable[[ModelCase], torch.dtype] = lambda case: case.dtype


def _ours(setup: Setup) -> Run:
    model = reference.with_weights(
        lambda: BEiT3(setup.config), setup.weights, device=setup.device, dtype=setup.case.dtype
    )
    return lambda: setup.inputs.call(model)


def _reference(setup: Setup) -> Run:
    model = setup.reference(setup.case.dtype)
    return lambda: setup.inputs.call(model)


def _compiled(setup: Setup) -> Run:
    model = torch.compile(setup.reference(setup.case.dtype))
    return lambda: setup.inputs.call(model)


def _autocast(setup: Setup) -> Run:
    model = setup.reference(torch.float32)
    inputs = setup.inputs.to(torch.float32)

    def run() -> Tensor:
        with torch.autocast(setup.device.type, dtype=torch.bfloat16):
            return inputs.call(model)

    return run


OURS = Provider("beit3_fast", _ours)
REFERENCE = Provider(BASELINE, _reference, judged_by=BASELINE)
COMPILED = Provider("reference, compiled", _compiled)
AUTOCAST = Provider(
    "reference, autocast", _autocast, judged_by="reference, autocast", computes_in=lambda case: torch.bfloat16
)


def providers(*, compiled: bool = False) -> list[Provider]:
    """Who takes part; the reference first, since the others are judged by it."""
    return [REFERENCE, AUTOCAST, *([COMPILED] if compiled else []), OURS]


@dataclass(frozen=True)
class Outcome:
    """One provider's result: ``failure`` is why it did not run, ``verdict`` whether it was near enough to be timed."""

    provider: str
    error: parity.Error | None = None
    verdict: parity.Verdict | None = None
    failure: str | None = None

    @property
    def ok(self) -> bool:
        return self.verdict is not None and self.verdict.ok


@dataclass(frozen=True)
class CaseResult:
    """All providers' outcomes, and the times of those that passed."""

    case: ModelCase
    outcomes: list[Outcome]
    timing: Timing | None

    @property
    def ok(self) -> bool:
        return all(outcome.ok for outcome in self.outcomes)


def run_case(
    case: ModelCase,
    taking_part: Sequence[Provider],
    *,
    device: torch.device,
    rounds: int,
    progress: Callable[[str], None] = lambda message: None,
) -> CaseResult:
    """Parity of every provider, then interleaved times of those that passed."""

    def say(message: str) -> None:
        progress(f"{case.name}: {message}")

    with torch.inference_mode():
        say("weights and inputs")
        setup = Setup(case, device)
        say(f"the truth in {_name(case.truth)}")
        truth = setup.valid(setup.inputs.to(case.truth).call(setup.build_reference(case.truth)))

        outcomes: dict[str, Outcome] = {}
        runs: dict[str, Run] = {}
        for provider in taking_part:
            say(f"parity of {provider.name}")
            try:
                run = provider.build(setup)
                error = parity.error(setup.valid(run()), truth)
            except Exception as failure:  # one provider that cannot run must not take the others with it
                message = next(iter(str(failure).splitlines()), "")
                outcomes[provider.name] = Outcome(provider.name, failure=f"{type(failure).__name__}: {message}")
                continue
            outcomes[provider.name] = Outcome(provider.name, error, _judge(provider, error, outcomes, case))
            if outcomes[provider.name].ok:
                runs[provider.name] = run
        del truth

        timing = None
        if runs:
            timing = interleave(
                runs,
                rounds=rounds,
                warmup=WARMUP,
                stopwatch=stopwatch_for(device),
                after_round=lambda done: say(f"round {done} of {rounds}"),
            )
    return CaseResult(case, list(outcomes.values()), timing)


def _judge(provider: Provider, error: parity.Error, outcomes: dict[str, Outcome], case: ModelCase) -> parity.Verdict:
    dtype = provider.computes_in(case)
    if provider.judged_by == provider.name:
        return parity.judge(error, dtype)
    baseline = outcomes.get(provider.judged_by)
    if baseline is None or baseline.error is None or not baseline.ok:
        return parity.Verdict(False, f"nothing to judge it by: {provider.judged_by} did not pass")
    return parity.judge(error, dtype, baseline.error)


def _config(case: ModelCase) -> EncoderConfig:
    make = {"base": EncoderConfig.base, "large": EncoderConfig.large}[case.size]
    return make(img_size=case.image_size or 224, normalize_output=True)


def _weights(config: EncoderConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random weights under which mistakes show.

    Nothing is left at its default, since equal LayerNorms and zero biases hide a swap of experts. Matrices keep the
    size of what they multiply, so scores spread and GELU sees both signs. They are rounded to ``dtype`` here, so that
    every provider and the truth start from equal values and errors are those of the arithmetic alone.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in reference.BEiT3(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)

    def draw(name: str, shape: torch.Size) -> Tensor:
        values = torch.randn(shape, generator=generator)
        if name.endswith(".bias"):
            values *= 0.1
        elif len(shape) == 1:  # a LayerNorm's weight
            values = 1 + 0.2 * values
        elif "embed_positions" in name or "text_embed" in name or "token" in name:
            values *= 0.5
        else:
            values *= shape[1:].numel() ** -0.5
        return values.to(dtype).to(device)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def _inputs(case: ModelCase, config: EncoderConfig, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    image = ids = padding = None
    if case.image_size is not None:
        image = torch.randn(case.batch, 3, case.image_size, case.image_size, generator=generator)
        image = image.to(case.dtype).to(device)
    if case.text_tokens is not None:
        ids = torch.randint(4, config.vocab_size, (case.batch, case.text_tokens), generator=generator).to(device)
        if case.text_lengths is not None:
            lengths = torch.tensor(case.lengths())
            padding = (torch.arange(case.text_tokens) >= lengths[:, None]).long().to(device)
    return Inputs(ids, image, padding)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
