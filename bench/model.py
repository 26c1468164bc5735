"""``beit3-fast bench model``: the backbone's forward, ours against reference PyTorch and the peers; parity first.

Every provider gets the same weights and inputs. Its output is compared with a run of reference PyTorch in float64 (or
in float32 where a case says so); one that breaks the parity rule gets no time. The other tasks, training and
captioning, bring a setup of their own and run through the same :func:`run_case`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast import optimize
from beit3_fast.models import BEiT3, EncoderConfig

from . import parity, reference
from .cases import ModelCase, dtype_name, flops
from .outcome import Outcome, ProviderError, blaming, judge, time_those_that_passed
from .roofs import free_memory
from .timing import Timing, stopwatch_for

BASELINE = "reference"
WARMUP = 1
LONGEST = 600.0
"""Seconds that all rounds of a peer may take, at most, for it to be timed: one that is hopelessly slow must not keep
the others from their figures."""


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

    baseline = BASELINE
    """The provider over which speed-ups are given."""

    def __init__(
        self,
        case: ModelCase,
        device: torch.device,
        config: EncoderConfig | None = None,
        weights: dict[str, Tensor] | None = None,
    ) -> None:
        self.case = case
        self.device = device
        self.config = config or _config(case)
        self.weights = draw_weights(self.config, case.dtype, device) if weights is None else weights
        self.inputs = _inputs(case, self.config, device)
        self._references: dict[torch.dtype, nn.Module] = {}

    def reference(self, dtype: torch.dtype) -> nn.Module:
        """Reference PyTorch in ``dtype``, shared by all providers that ask for it."""
        if dtype not in self._references:
            self._references[dtype] = self.build_reference(dtype)
        return self._references[dtype]

    def build_reference(self, dtype: torch.dtype) -> nn.Module:
        """A fresh one, freed as soon as the caller drops it."""
        return self.build(reference.BEiT3, dtype)

    def build(self, make: Callable[[EncoderConfig], nn.Module], dtype: torch.dtype | None = None) -> nn.Module:
        """A backbone with the case's weights, in the case's dtype by default."""
        dtype = dtype or self.case.dtype
        return reference.with_weights(lambda: make(self.config), self.weights, device=self.device, dtype=dtype)

    def running(self) -> contextlib.AbstractContextManager[Any]:
        """In what a provider's calls run."""
        return torch.inference_mode()

    def truth(self) -> Any:
        """What :meth:`errors` compares with."""
        with self.running():
            return self.valid(self.inputs.to(self.case.truth).call(self.build_reference(self.case.truth)))

    def errors(self, output: Any, truth: Any) -> dict[str, parity.Error]:
        """How far each part of a run's output is from the truth."""
        return {"out": parity.error(self.valid(output), truth)}

    def valid(self, out: Tensor) -> Tensor:
        """The rows (N, D) of ``out`` (B, S, D) that mean something: padded positions are left out."""
        return out[self.meaningful(out)]

    def meaningful(self, out: Tensor) -> Tensor:
        """(B, S) bool, False at padded positions of ``out`` (B, S, D)."""
        lengths = torch.tensor(self.case.lengths(), device=out.device)
        text_tokens = self.case.text_tokens or 0
        vision_tokens = out.shape[1] - text_tokens
        positions = torch.arange(out.shape[1], device=out.device) - vision_tokens
        return positions < lengths[:, None]


Run = Callable[[], Any]


def _everywhere(case: ModelCase, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """Something that computes the case.

    ``build(setup)`` returns a function that runs it once. Its error is held against that of the provider named
    ``judged_by`` in the same dtype; a provider that names itself is held to the cap alone. ``computes_in`` gives the
    dtype of its matrix products, which decides the rounding floor and the cap. ``missing`` says why it cannot take
    part, None if it can. A ``peer`` may fail without failing the run.
    """

    name: str
    build: Callable[[Any], Run]
    judged_by: str = BASELINE
    computes_in: Callable[[ModelCase], torch.dtype] = lambda case: case.dtype
    missing: Callable[[ModelCase, torch.device], str | None] = _everywhere
    peer: bool = False

    @property
    def judge(self) -> str | None:
        """Whose error its own is held against; None where the cap alone decides."""
        return None if self.judged_by == self.name else self.judged_by


def _ours(setup: Setup) -> Run:
    model = setup.build(BEiT3)
    return lambda: setup.inputs.call(model)


def _optimized(setup: Setup) -> Run:
    model = optimize(setup.build(BEiT3))
    return lambda: setup.inputs.call(model)


def _int8(setup: Setup) -> Run:
    model = optimize(setup.build(BEiT3), int8=True)
    return lambda: setup.inputs.call(model)


def _reference(setup: Setup) -> Run:
    model = setup.reference(setup.case.dtype)
    return lambda: setup.inputs.call(model)


def with_sdpa(config: EncoderConfig) -> nn.Module:
    """Reference PyTorch with the fused attention."""
    return reference.BEiT3(config, attention="sdpa")


def _sdpa(setup: Setup) -> Run:
    model = setup.build(with_sdpa)
    return lambda: setup.inputs.call(model)


def _compiled(setup: Setup) -> Run:
    torch.compiler.reset()  # graphs of earlier cases count towards the limit on recompilations
    model = torch.compile(setup.build(with_sdpa))
    return lambda: setup.inputs.call(model)


def under_autocast(model: nn.Module, setup: Setup) -> Run:
    """The forward of a float32 model under bfloat16 autocast."""
    inputs = setup.inputs.to(torch.float32)

    def run() -> Tensor:
        with torch.autocast(setup.device.type, dtype=torch.bfloat16):
            return inputs.call(model)

    return run


def in_bfloat16(case: ModelCase) -> torch.dtype:
    """For providers that compute in bfloat16 whatever the case's weights are in."""
    return torch.bfloat16


OURS = Provider("beit3_fast", _ours)
OPTIMIZED = Provider("beit3_fast, optimized", _optimized)
REFERENCE = Provider(BASELINE, _reference, judged_by=BASELINE)
SDPA = Provider("reference, SDPA", _sdpa)
COMPILED = Provider("reference, SDPA, compiled", _compiled)
"""``torch.compile`` with the fused attention, the fair opponent: it does not find that kernel in the public code."""

INT8 = Provider(
    "beit3_fast, int8",
    _int8,
    judged_by="beit3_fast, int8",
    computes_in=lambda case: torch.int8,
    missing=lambda case, device: None if device.type == "cpu" else "is for a CPU alone",
    peer=True,
)
"""An explicit choice, no drop-in: its error is shown, and held to a cap alone."""

AUTOCAST = Provider(
    "reference, autocast",
    lambda setup: under_autocast(setup.reference(torch.float32), setup),
    judged_by="reference, autocast",
    computes_in=in_bfloat16,
)


def providers(*, compiled: bool = False) -> list[Provider]:
    """Who takes part without peers; the reference first, since the others are judged by it."""
    return [REFERENCE, AUTOCAST, *([COMPILED] if compiled else []), OURS, OPTIMIZED]


@dataclass(frozen=True)
class CaseResult:
    """All providers' outcomes, and the times of those that passed.

    Attributes:
        baseline: the provider over which speed-ups are given.
        flops: useful operations of a run, None where they are not counted.
        skipped: why the case was not run at all.
        memory: of a training step, by provider; empty for other tasks.
    """

    case: ModelCase
    outcomes: list[Outcome]
    timing: Timing | None
    baseline: str = BASELINE
    flops: int | None = None
    skipped: str | None = None
    memory: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Everybody who is no peer ran and was right, as far as they could take part."""
        return all(outcome.harmless for outcome in self.outcomes)

    @property
    def ours(self) -> str | None:
        """Our fastest entry that passed."""
        return self._fastest(lambda outcome: outcome.provider in OUR_NAMES)

    @property
    def best_other(self) -> str | None:
        """The fastest of the others that computes in the case's dtype and passed."""
        return self._fastest(
            lambda outcome: outcome.provider not in OUR_NAMES and outcome.dtype in (None, self.case.dtype)
        )

    def _fastest(self, among: Callable[[Outcome], bool]) -> str | None:
        timing = self.timing
        names = [o.provider for o in self.outcomes if o.ok and among(o)]
        if timing is None or not names:
            return None
        return min(names, key=lambda name: timing.time(name).median)


FUSED_ADAMW = f"{OURS.name}, fused AdamW"  # a training step, see training.py
OUR_NAMES = (OURS.name, OPTIMIZED.name, FUSED_ADAMW)


def run_case(
    case: ModelCase,
    taking_part: Sequence[Provider],
    *,
    device: torch.device,
    rounds: int,
    make_setup: Callable[[ModelCase, torch.device], Any] = Setup,
    progress: Callable[[str], None] = lambda message: None,
) -> CaseResult:
    """Parity of every provider, then interleaved times of those that passed.

    Args:
        taking_part: in this order; whoever others are judged by comes before them.
        make_setup: of the case's task.
    """

    def say(message: str) -> None:
        progress(f"{case.name}: {message}")

    say("who can take part")
    missing: dict[str, str | None] = {}
    skipped = _too_large(case, 1, device)  # before anybody is tried on it
    if skipped is None:
        missing = {provider.name: provider.missing(case, device) for provider in taking_part}
        skipped = _too_large(case, sum(reason is None for reason in missing.values()), device)
    if skipped is not None:
        return CaseResult(case, [], None, getattr(make_setup, "baseline", BASELINE), skipped=skipped)

    say("weights and inputs")
    setup = make_setup(case, device)
    say(f"the truth in {dtype_name(case.truth)}")
    truth = setup.truth()

    outcomes: dict[str, Outcome] = {}
    runs: dict[str, Run] = {}
    for provider in taking_part:
        dtype = provider.computes_in(case)
        about = Outcome(provider.name, provider.peer, dtype)
        if missing[provider.name] is not None:
            outcomes[provider.name] = replace(about, missing=missing[provider.name])
            continue
        say(f"parity of {provider.name}")
        try:
            with torch.no_grad():
                run = provider.build(setup)
            with setup.running():
                start = time.perf_counter()
                output = run()
                slow = _too_slow(provider, time.perf_counter() - start, rounds)
                errors = setup.errors(output, truth)
                del output
                if slow is not None:  # or it has compiled something
                    slow = _too_slow(provider, stopwatch_for(device)(run) * 1e-9, rounds)
        except Exception as error:  # one provider that cannot run must not take the others with it
            outcomes[provider.name] = replace(about, failure=str(ProviderError(provider.name, error)))
            continue
        verdict = judge(errors, dtype, provider.judge, outcomes)
        outcomes[provider.name] = replace(about, failure=slow, errors=errors, verdict=verdict)
        if outcomes[provider.name].ok:
            runs[provider.name] = blaming(provider.name)(run)
        del run  # a wrong one's weights must not stay
    del truth

    with setup.running():
        timing = time_those_that_passed(
            runs, outcomes, rounds=rounds, warmup=WARMUP, stopwatch=stopwatch_for(device), say=say
        )
    return CaseResult(case, list(outcomes.values()), timing, setup.baseline, flops(case, setup.config))


def _too_slow(provider: Provider, seconds: float, rounds: int) -> str | None:
    """Why a provider whose run takes so long is not timed; None for ours and the reference, and for the others unless
    all rounds would take more than ``LONGEST``."""
    if not provider.peer or seconds * rounds <= LONGEST:
        return None
    return f"too slow: a run takes {seconds:.3g} s, and {rounds} rounds would take more than {LONGEST:.3g} s"


def _too_large(case: ModelCase, providers: int, device: torch.device) -> str | None:
    """Why a case with so many providers does not fit in memory; None if it does, or if nobody knows."""
    needed, free = needed_memory(case, _config(case), providers), free_memory(device)
    if free is None or needed <= free:
        return None
    return f"it may need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def needed_memory(case: ModelCase, config: EncoderConfig, providers: int) -> int:
    """Bytes that a run of the case may need, roughly: the weights that all start from, and then what is more, the truth
    with what it computes on the way, or every provider's own weights with what one of them computes.

    A layer in plain PyTorch makes some 16 tensors of the model's width, 4 of the hidden width and 3 of scores; a
    training step keeps those of all layers, and gradients and two moments with the weights.
    """
    with torch.device("meta"):
        weights = sum(p.numel() for p in reference.BEiT3(config).parameters())
    width, hidden, heads = config.encoder_embed_dim, config.encoder_ffn_embed_dim, config.encoder_attention_heads
    vision = ((case.image_size or 0) // config.patch_size) ** 2 + 1 if case.image_size else 0
    tokens = vision + (case.text_tokens or 0)
    layer = case.batch * (tokens * (16 * width + 4 * hidden) + 3 * heads * tokens**2)
    training = case.task == "training"
    kept = layer * (config.encoder_layers if training else 1)
    truth = case.truth.itemsize * (weights * (2 if training else 1) + kept)
    measured = case.dtype.itemsize * (providers * weights * (4 if training else 1) + kept)
    return case.dtype.itemsize * weights + max(truth, measured)


def _config(case: ModelCase) -> EncoderConfig:
    make = {"base": EncoderConfig.base, "large": EncoderConfig.large}[case.size]
    return make(img_size=case.image_size or 224, normalize_output=True)


def draw_weights(config: EncoderConfig, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Random weights under which mistakes show.

    Nothing is left at its default, since equal LayerNorms and zero biases hide a swap of experts. Matrices keep the
    size of what they multiply, so scores spread and GELU sees both signs. They are rounded to ``dtype`` here, so that
    every provider and the truth start from equal values and errors are those of the arithmetic alone.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in reference.BEiT3(config).state_dict().items()}
    generator = torch.Generator(device).manual_seed(0)  # hundreds of millions of values: a GPU draws its own

    def draw(name: str, shape: torch.Size) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        if name.endswith(".bias"):
            values *= 0.1
        elif len(shape) == 1:  # a LayerNorm's weight
            values = 1 + 0.2 * values
        elif "embed_positions" in name or "text_embed" in name or "token" in name:
            values *= 0.5
        else:
            values *= shape[1:].numel() ** -0.5
        return values.to(dtype)

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
