"""``beit3-fast bench ops``: every op, forward and backward, ours against reference PyTorch and the peers; parity first.

Parity: every provider gets the same values, and its output (forward) or gradients (backward) are compared with
reference PyTorch in float64. One that breaks the parity rule gets no time.

Time: rounds in which every provider runs once, close together. In a model an op finds its weights in memory and not in
a cache, so before every call, untimed, a buffer twice the size of the last cache is overwritten; and calls rotate over
``SETS`` inputs, so that nothing remembered from one call serves the next. What is timed in the backward is the backward
alone: the forward that it needs runs before it, untimed.

On a GPU what is timed is a CUDA graph of calls over inputs that together exceed twice the cache (:mod:`.timing`): it
shows the device's time, where a call's launch takes longer than the call. A provider that cannot be captured, because
it waits for the device or launches what no graph can hold, is timed call by call like on a CPU, and it is said that its
time has the host's in it.

Peers are tried in a process of their own first (:mod:`.op_trial`): one that dies there is reported and does not run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from beit3_fast.layout import TokenLayout

from . import op_trial, parity
from .op_cases import OpCase
from .op_providers import OURS, REFERENCE, Compute, OpProvider
from .outcome import Outcome, ProviderError, blaming, judge, time_those_that_passed
from .roofs import cache_bytes, free_memory
from .timing import Captured, CaptureError, Stopwatch, Timing, cuda_events, rotations, side_stream, wall_clock

SETS = 3
WARMUP = 2

Inputs = dict[str, Tensor | tuple[Tensor, ...]]


class Problem:
    """One set of values for a case: the op's tensors and the gradient of its output, as rows and stacked parameters."""

    def __init__(self, case: OpCase, layout: TokenLayout, seed: int) -> None:
        generator = torch.Generator(layout.device).manual_seed(seed)  # millions of values: a GPU draws its own
        self.case = case
        self.layout = layout
        self.tensors = {name: _draw(name, shape, generator).to(case.dtype) for name, shape in case.inputs().items()}
        self.dout = torch.randn(case.output(), generator=generator, device=layout.device).to(case.dtype)

    def inputs(self, provider: OpProvider) -> Inputs:
        """The tensors in the provider's form, memory of its own; they take gradients where the case is a backward."""
        differentiated = self.case.differentiated() if self.case.backward else []

        def own(name: str, tensor: Tensor) -> Tensor:
            return tensor.detach().clone().requires_grad_(name in differentiated)

        inputs: Inputs = {}
        for name, tensor in self.tensors.items():
            if name in ("x", "qkv", "residual"):
                inputs[name] = own(name, self.layout.unpack(tensor) if provider.padded else tensor)
            elif provider.separate:
                inputs[name] = tuple(own(name, expert) for expert in tensor)
            else:
                inputs[name] = own(name, tensor)
        return inputs

    def gradient(self, provider: OpProvider) -> Tensor:
        """Of the output, in the provider's form."""
        return self.layout.unpack(self.dout) if provider.padded else self.dout

    def rows(self, provider: OpProvider, columns: Tensor) -> Tensor:
        """What the provider returned for the tokens, as rows."""
        return self.layout.pack(columns) if provider.padded else columns

    def truth(self) -> dict[str, Tensor]:
        """The case's results by reference PyTorch in float64."""
        compute = REFERENCE.builds[self.case.op](self.case, self.layout)
        differentiated = self.case.differentiated() if self.case.backward else []
        tensors = {name: t.double().requires_grad_(name in differentiated) for name, t in self.tensors.items()}
        with torch.set_grad_enabled(self.case.backward):
            out = compute(**tensors)
        if not self.case.backward:
            return {"out": out}
        leaves = [tensors[name] for name in differentiated]
        return dict(zip(differentiated, torch.autograd.grad(out, leaves, self.dout.double()), strict=True))


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random values under which mistakes show: no affine at its default, matrices that keep the size of what they
    multiply, and every seventh token with a mean far from zero."""
    values = torch.randn(shape, generator=generator, device=generator.device)
    if name.endswith("bias"):
        return 0.1 * values
    if name.endswith("weight"):
        return 1 + 0.2 * values if len(shape) == 2 else values * shape[-1] ** -0.5
    if name == "x":
        values[::7] += 3
    return values


class Call:
    """One provider's work on a case, again and again over all sets of inputs.

    ``ready()`` does what comes before the part that is timed; calling the object does the timed part. Several may be
    made ready before the first is called.
    """

    def __init__(self, provider: OpProvider, compute: Compute, problems: Sequence[Problem]) -> None:
        self.provider = provider
        self._compute = compute
        self._problems = problems
        self._inputs = [problem.inputs(provider) for problem in problems]
        self._gradients = [problem.gradient(provider) for problem in problems]
        self._next = 0
        self._pending: deque[tuple[int, Tensor | None]] = deque()

    def ready(self) -> None:
        """The next set of inputs; for a backward, the forward.

        Raises:
            ProviderError: whatever the provider raised, with its name.
        """
        index, self._next = self._next, (self._next + 1) % len(self._problems)
        out = None
        if self._problems[index].case.backward:
            with blaming(self.provider.name), torch.enable_grad():
                out = self._compute(**self._inputs[index])
        self._pending.append((index, out))

    def __call__(self) -> tuple[Tensor, ...]:
        """The output, or the gradients of all inputs that take one.

        Raises:
            ProviderError: whatever the provider raised, with its name.
        """
        if not self._pending:
            self.ready()
        index, out = self._pending.popleft()
        with blaming(self.provider.name):
            if out is not None:
                return torch.autograd.grad(out, self._leaves(index), self._gradients[index])
            with torch.no_grad():
                return (self._compute(**self._inputs[index]),)

    def prepared(self, device: torch.device) -> Callable[[], object]:
        """What a :func:`cold` stopwatch is to time: the call itself, on a GPU a graph of calls on all sets in turn.

        Raises:
            CaptureError: the provider waits for the GPU or cannot be captured for another reason.
            ProviderError: whatever the provider raised, with its name.
        """
        if device.type != "cuda":
            return self
        self._pending.clear()
        return Captured([self] * len(self._problems), device, self.ready)

    def _leaves(self, index: int) -> list[Tensor]:
        values = [value if isinstance(value, tuple) else (value,) for value in self._inputs[index].values()]
        return [tensor for tensors in values for tensor in tensors if tensor.requires_grad]

    def results(self) -> dict[str, Tensor]:
        """Runs on the first set; the output or the gradients as rows and stacked parameters, by name."""
        self._next = 0
        self._pending.clear()
        computed = list(self())
        problem, inputs = self._problems[0], self._inputs[0]
        if not problem.case.backward:
            return {"out": problem.rows(self.provider, computed[0])}
        results = {}
        for name in problem.case.differentiated():
            if isinstance(inputs[name], tuple):
                results[name] = torch.stack([computed.pop(0) for _ in inputs[name]])
            elif name in ("x", "qkv"):
                results[name] = problem.rows(self.provider, computed.pop(0))
            else:
                results[name] = computed.pop(0)
        return results


@dataclass(frozen=True)
class OpResult:
    """All providers' outcomes, and the times of those that passed; ``skipped`` is why the case was not run at all."""

    case: OpCase
    outcomes: list[Outcome]
    timing: Timing | None
    skipped: str | None = None

    @property
    def ok(self) -> bool:
        """Ours ran and was right. Peers may fail."""
        return self.skipped is not None or any(o.ok for o in self.outcomes if o.provider == OURS.name)


def run_case(
    case: OpCase,
    taking_part: Sequence[OpProvider],
    *,
    device: torch.device,
    rounds: int,
    stopwatch: Stopwatch | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> OpResult:
    """Parity of every provider of the case's op, then interleaved times of those that passed.

    Args:
        taking_part: the reference first, since the others are judged by it.
        stopwatch: how a :class:`Call` is timed, ``ready()`` included; by default :func:`cold`, of prepared calls.
    """
    with side_stream(device):  # a backward can be captured on the stream that its forward ran on
        return _run_case(case, taking_part, device, rounds, stopwatch, progress)


def _run_case(
    case: OpCase,
    taking_part: Sequence[OpProvider],
    device: torch.device,
    rounds: int,
    stopwatch: Stopwatch | None,
    progress: Callable[[str], None],
) -> OpResult:
    def say(message: str) -> None:
        progress(f"{case.name}: {message}")

    those_of_the_op = [provider for provider in taking_part if case.op in provider.builds]
    sets = max(SETS, rotations(case.bytes(), device)) if device.type == "cuda" else SETS
    needed, free = case.needed_memory(sets * len(those_of_the_op)), free_memory(device)
    if free is not None and needed > free:
        return OpResult(case, [], None, f"it may need {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")

    say("inputs")
    layout = case.batch.layout(device)
    problems = [Problem(case, layout, seed) for seed in range(sets)]
    say("the truth in float64")
    truth = problems[0].truth()

    missing = {provider.name: provider.missing(case, device) for provider in those_of_the_op}
    say("whether a peer ends the process")
    ends = op_trial.crashes(case, [p for p in those_of_the_op if missing[p.name] is None], device)
    outcomes: dict[str, Outcome] = {}
    calls: dict[str, Call] = {}
    for provider in those_of_the_op:
        about = Outcome(provider.name, missing=missing[provider.name], failure=ends.get(provider.name))
        outcomes[provider.name] = about
        if about.missing is not None or about.failure is not None:
            continue
        say(f"parity of {provider.name}")
        try:
            call = Call(provider, provider.builds[case.op](case, layout), problems)
            errors = {name: parity.error(result, truth[name]) for name, result in call.results().items()}
        except Exception as error:  # one provider that cannot run must not take the others with it
            failure = error if isinstance(error, ProviderError) else ProviderError(provider.name, error)
            outcomes[provider.name] = replace(about, failure=str(failure))
            continue
        # the reference itself is held to the cap alone
        by = None if provider.name == REFERENCE.name else REFERENCE.name
        verdict = judge(errors, case.dtype, by, outcomes)
        outcomes[provider.name] = replace(about, errors=errors, verdict=verdict)
        if verdict.ok:
            calls[provider.name] = call
    del truth

    timed: dict[str, Callable[[], object]] = dict(calls)
    for name, call in calls.items() if stopwatch is None else ():
        try:
            timed[name] = call.prepared(device)
        except CaptureError as error:
            outcomes[name] = replace(outcomes[name], host_time=str(error))
        except ProviderError as error:
            outcomes[name] = replace(outcomes[name], failure=str(error))
            del timed[name]
    timing = time_those_that_passed(
        timed, outcomes, rounds=rounds, warmup=WARMUP, stopwatch=stopwatch or cold(device), say=say
    )
    return OpResult(case, list(outcomes.values()), timing)


def cold(device: torch.device) -> Stopwatch:
    """A stopwatch for a :class:`Call` whose data is in memory and in no cache when the time starts."""
    buffer = torch.zeros(2 * cache_bytes(device) // 4, device=device)

    def evict() -> None:
        buffer.add_(1)  # reads and writes: plain stores of such a size may bypass the caches

    return cold_cuda_events(evict) if device.type == "cuda" else cold_wall_clock(evict)


def cold_wall_clock(evict: Callable[[], None]) -> Stopwatch:
    """For work that is done when the call returns."""
    clock = wall_clock()

    def measure(call: Any) -> float:
        call.ready()
        evict()
        return clock(call)

    return measure


def cold_cuda_events(evict: Callable[[], None]) -> Stopwatch:
    """For work on the current CUDA stream. What is :class:`Captured` evicts its own operands. Before a call the host
    does not wait between evicting and the call: it has launched a short one by the time the device is through with the
    buffer."""
    clock = cuda_events(evict)

    def measure(call: Any) -> float:
        if not isinstance(call, Captured):
            call.ready()
        return clock(call)

    return measure
