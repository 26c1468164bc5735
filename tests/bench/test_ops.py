"""``bench ops`` on shapes of toy width: real runs, and providers that are wrong on purpose."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import types
from dataclasses import replace
from io import StringIO

import beit3_fast.bench.command as command
import beit3_fast.bench.op_cases as op_cases
import beit3_fast.bench.op_providers as op_providers
import beit3_fast.bench.op_trial as op_trial
import beit3_fast.bench.ops as bench
import beit3_fast.bench.roofs as roofs
import pytest
import torch
import torch.nn.functional as F
from beit3_fast.bench.op_cases import Batch, OpCase, Shape
from beit3_fast.bench.op_providers import OURS, PROVIDERS, REFERENCE, OpProvider
from beit3_fast.bench.op_report import describe, op_document, op_table
from beit3_fast.bench.outcome import ProviderError
from beit3_fast.bench.timing import Captured, CaptureError
from click.testing import CliRunner
from rich.console import Console

from beit3_fast.cli import main

CPU = torch.device("cpu")
TINY = Batch("tiny", 3, 5, (4, 1), 6)
SHAPES = {
    "layer_norm": Shape("norm", "layer_norm", width=64),
    "multiway_linear": Shape("linear", "multiway_linear", width=64, out=48, residual=True),
    "multiway_ffn": Shape("ffn", "multiway_ffn", width=64, out=96, residual=True),
    "attention": Shape("attention", "attention", width=64, heads=2),
}
CAPTIONING = replace(SHAPES["attention"], name="captioning", mask="captioning")
CASES = [
    OpCase(shape, TINY, dtype, backward)
    for shape in (*SHAPES.values(), CAPTIONING)
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for backward in (False, True)
]
ROOFS = roofs.Roofs(1e10, {torch.float32: 1e11, torch.bfloat16: 2e11})
QUICK = op_providers.select_providers(quick=True)


@pytest.fixture(autouse=True)
def no_trial(monkeypatch):
    """Another process for every op would be most of these tests' time; test_isolation.py has some."""
    monkeypatch.setattr(op_trial, "crashes", lambda case, taking_part, device: {})


def warm(call):
    """A stopwatch that empties no caches: 64 MB a call would be most of these tests' time."""
    call.ready()
    return bench.wall_clock()(call)


def run_case(case, taking_part, **options):
    return bench.run_case(case, taking_part, device=CPU, rounds=6, stopwatch=warm, **options)


def case_of(op, dtype=torch.float32, backward=False):
    return OpCase(SHAPES[op], TINY, dtype, backward)


def outcomes_of(result):
    return {outcome.provider: outcome for outcome in result.outcomes}


def spoilt(change, provider=OURS, name="wrong"):
    """A provider that spoils what another computes: ``change(case, layout, compute)`` returns the spoilt function."""

    def build(op):
        return lambda case, layout: change(case, layout, provider.builds[op](case, layout))

    return replace(provider, name=name, builds={op: build(op) for op in provider.builds})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_everybody_who_can_run_passes(case):
    result = run_case(case, QUICK)
    outcomes = outcomes_of(result)
    assert result.ok
    assert set(outcomes) == {provider.name for provider in PROVIDERS if case.op in provider.builds}
    ran = {name for name, outcome in outcomes.items() if outcome.missing is None}
    assert {outcomes[name].failure for name in ran} == {None}
    assert {outcomes[name].verdict.reason for name in ran} == {""}
    assert {name: len(times) for name, times in result.timing.rounds.items()} == dict.fromkeys(ran, 6)
    assert ran >= {"reference", "beit3_fast", "two-stream"}
    for name in ran:
        assert list(outcomes[name].errors) == (case.differentiated() if case.backward else ["out"])
        low, high = {torch.float32: (1e-9, 2e-6), torch.bfloat16: (1e-4, 4e-2), torch.float16: (1e-5, 4e-3)}[case.dtype]
        assert low < outcomes[name].error.maximum < high
    if case.op == "attention":
        assert ran >= {"sdpa-padded", "sdpa-per-sample"}
    if case.op in ("multiway_linear", "multiway_ffn") and hasattr(F, "grouped_mm"):
        assert "grouped_mm" in ran


def test_who_cannot_run_is_listed_with_the_reason(monkeypatch):
    case = case_of("attention")
    listed = {name: outcome.missing for name, outcome in outcomes_of(run_case(case, QUICK)).items()}
    assert listed["two-stream-compiled"] == "left out of a quick run: slow to compile"
    assert listed["sdpa-padded"] is None
    monkeypatch.setattr(op_providers, "find_spec", lambda package: None)
    listed = {
        name: outcome.missing for name, outcome in outcomes_of(run_case(case, PROVIDERS[:1] + PROVIDERS[4:])).items()
    }
    assert listed["xformers"] == "xformers is not installed"
    assert listed["flash-attn"] == "flash_attn is not installed"
    monkeypatch.setattr(op_providers, "find_spec", lambda package: object())
    by_name = {provider.name: provider for provider in PROVIDERS}
    assert by_name["xformers"].missing(case, CPU) == "needs a GPU"
    assert by_name["xformers"].missing(case, torch.device("cuda")) is None
    assert by_name["flash-attn"].missing(case, torch.device("cuda")) == "does not take float32"
    assert by_name["flash-attn"].missing(case_of("attention", torch.bfloat16), torch.device("cuda")) is None
    masked = OpCase(CAPTIONING, TINY)
    assert by_name["xformers"].missing(masked, torch.device("cuda")).startswith("has no captioning mask")
    assert by_name["grouped_mm"].missing(case, torch.device("cuda")) == "takes bfloat16 alone on a GPU"
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    assert "does not have it" in by_name["grouped_mm"].missing(case, CPU)


# ---- wrong on purpose ----


def off_by_one_row(case, layout, compute):
    return lambda **tensors: compute(**tensors).roll(1, dims=0)


def one_row_of_the_other_expert(case, layout, compute):
    moved = replace(layout, expert_offsets=layout.expert_offsets + torch.tensor([0, 1, 0], dtype=torch.int32))
    return OURS.builds[case.op](case, moved)


def one_key_too_few(case, layout, compute):
    shorter = replace(layout, segments=layout.segments - torch.tensor([0, 0, 0, 1], dtype=torch.int32))
    return lambda qkv: OURS.builds["attention"](case, shorter)(qkv) + 0 * qkv.sum()


def low_precision(case, layout, compute):
    """Every product and sum in bfloat16."""

    def spoilt(**tensors):
        return compute(**{name: tensor.bfloat16() for name, tensor in tensors.items()}).to(case.dtype)

    return spoilt


def five_in_a_million(case, layout, compute):
    """Within the cap, and still far from what fp32 gives."""
    return lambda **tensors: compute(**tensors) * (1 + 5e-6)


def zeros(case, layout, compute):
    return lambda **tensors: 0 * compute(**tensors)


def nan(case, layout, compute):
    return lambda **tensors: compute(**tensors) * float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_mask_is_caught(dtype):
    """A text that sees the words to come, and one that does not see its own."""

    def every_key(case, layout, compute):
        return OURS.builds["attention"](replace(case, shape=SHAPES["attention"]), layout)

    def one_word_too_few(case, layout, compute):
        return lambda qkv: torch.cat([compute(qkv)[:-1], compute(qkv)[-2:-1]])

    for change in (every_key, one_word_too_few):
        result = run_case(OpCase(CAPTIONING, TINY, dtype), [REFERENCE, OURS, spoilt(change)])
        assert result.ok
        assert not outcomes_of(result)["wrong"].ok


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("layer_norm", one_row_of_the_other_expert),
        ("multiway_linear", one_row_of_the_other_expert),
        ("multiway_ffn", one_row_of_the_other_expert),
        ("attention", one_key_too_few),
        *[(op, change) for op in SHAPES for change in (off_by_one_row, low_precision, five_in_a_million, zeros, nan)],
    ],
)
def test_a_wrong_peer_gets_no_time(op, change, backward):
    result = run_case(case_of(op, backward=backward), [REFERENCE, OURS, spoilt(change)])
    wrong = outcomes_of(result)["wrong"]
    assert not wrong.ok
    named = wrong.verdict.reason.split(":")[0] in result.case.inputs()
    assert named == (len(wrong.errors) > 1), "which result, where there are several"
    assert set(result.timing.rounds) == {"reference", "beit3_fast"}
    assert result.ok  # by ours


@functools.cache
def narrow(width, out):
    """A linear layer whose sums are kept in bfloat16, as in a matrix unit with a 16-bit accumulator."""

    def build(case, layout):
        def compute(x, weight, bias):
            pieces = []
            for expert, part in enumerate(x.split([layout.num_vision_rows, layout.num_text_rows])):
                total = torch.zeros(part.shape[0], out, dtype=torch.bfloat16)
                for k in range(width):
                    total += part[:, k : k + 1] * weight[expert, :, k]
                pieces.append(total + bias[expert])
            return torch.cat(pieces).to(x.dtype)

        return compute

    return OpProvider("narrow", {"multiway_linear": build})


@pytest.mark.parametrize("width", [64, 768, 3072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_kept_in_bfloat16_are_caught(dtype, width):
    """Among bfloat16 peers as well, and in shallow products."""
    shape = Shape("deep", "multiway_linear", width=width, out=16)
    result = run_case(OpCase(shape, TINY, dtype), [REFERENCE, OURS, narrow(width, 16)])
    assert result.ok
    assert outcomes_of(result)["narrow"].verdict.reason.startswith(("maximum error", "rms error"))
    assert "narrow" not in result.timing.rounds


def test_one_wrong_gradient_is_enough():
    """The output is right, and all gradients but the last expert's bias."""

    def change(case, layout, compute):
        def spoilt(bias, **tensors):
            return compute(bias=torch.cat([bias[:1], bias[1:] * 0.9 + 0.1 * bias[1:].detach()]), **tensors)

        return lambda x, weight, bias, residual: spoilt(bias, x=x, weight=weight, residual=residual)

    def by_name(case, layout):
        return lambda **tensors: OURS.builds[case.op](case, layout)(**{name: tensors[name] for name in case.inputs()})

    provider = spoilt(change, replace(OURS, builds={"multiway_linear": by_name}))
    forward = run_case(case_of("multiway_linear"), [REFERENCE, OURS, provider])
    assert outcomes_of(forward)["wrong"].ok
    backward = run_case(case_of("multiway_linear", backward=True), [REFERENCE, OURS, provider])
    assert outcomes_of(backward)["wrong"].verdict.reason.startswith("bias: maximum error")


def test_ours_being_wrong_is_what_counts():
    result = run_case(case_of("layer_norm"), [REFERENCE, spoilt(zeros, name=OURS.name), PROVIDERS[2]])
    assert not result.ok
    assert set(result.timing.rounds) == {"reference", "two-stream"}


def test_without_its_reference_nobody_is_judged():
    result = run_case(case_of("layer_norm"), [spoilt(zeros, REFERENCE, REFERENCE.name), OURS])
    assert not result.ok
    assert result.timing is None
    assert "nothing to judge it by" in outcomes_of(result)[OURS.name].verdict.reason


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("when", ["build", "first call", "later"])
def test_a_provider_that_raises_is_isolated(when, backward):
    calls = 0

    def change(case, layout, compute):
        if when == "build":
            raise RuntimeError("no such kernel\nsecond line")

        def crash(**tensors):
            nonlocal calls
            calls += 1
            if when == "first call" or calls > 5:
                raise RuntimeError("no such kernel\nsecond line")
            return compute(**tensors)

        return crash

    result = run_case(case_of("multiway_linear", backward=backward), [REFERENCE, spoilt(change, name="bad"), OURS])
    assert result.ok
    bad = outcomes_of(result)["bad"]
    assert not bad.ok
    assert bad.failure == "RuntimeError: no such kernel"
    assert {name: len(times) for name, times in result.timing.rounds.items()} == {"reference": 6, "beit3_fast": 6}


def test_ours_raising_is_not_ok():
    def change(case, layout, compute):
        raise RuntimeError("gone")

    assert not run_case(case_of("layer_norm"), [REFERENCE, spoilt(change, name=OURS.name)]).ok


def test_a_case_that_does_not_fit_is_skipped_with_the_figure(monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda device: 2**20)
    huge = replace(case_of("attention"), batch=replace(TINY, samples=1000))
    result = run_case(huge, QUICK)
    assert result.ok
    assert result.outcomes == []
    assert result.skipped.startswith("it may need 0.")
    assert result.skipped.endswith("GiB, 0.0 GiB are free")
    monkeypatch.setattr(bench, "free_memory", lambda device: None)
    assert run_case(case_of("layer_norm"), [REFERENCE, OURS]).skipped is None


# ---- peers that this machine does not have, with their mathematics in their place ----


def by_blocks(q, k, v, ends):
    """Attention (N, H, d) within the blocks between ``ends``."""
    pieces = []
    for start, end in itertools.pairwise(ends):
        block = (part[start:end].transpose(0, 1) for part in (q, k, v))
        pieces.append(F.scaled_dot_product_attention(*block).transpose(0, 1))
    return torch.cat(pieces)


def install(monkeypatch, name, **members):
    """A module of this name and its packages."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


class FakeNorm(torch.autograd.Function):
    """Has Liger's call; its backward is PyTorch's."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        with torch.enable_grad():
            ctx.inputs = [t.detach().requires_grad_() for t in (x, weight, bias)]
            ctx.out = F.layer_norm(ctx.inputs[0], x.shape[-1:], *ctx.inputs[1:], eps)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx, dout):
        return (*torch.autograd.grad(ctx.out, ctx.inputs, dout), None)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["xformers", "flash-attn", "liger"])
def test_absent_peers_are_called_as_their_manuals_say(name, backward, monkeypatch):
    class BlockDiagonalMask:
        @staticmethod
        def from_seqlens(lengths):
            return torch.tensor([0, *lengths]).cumsum(0).tolist()

    def memory_efficient_attention(q, k, v, attn_bias):
        assert q.shape == (1, TINY.rows, 2, 32)
        return by_blocks(q[0], k[0], v[0], attn_bias).unsqueeze(0)

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert (cu_seqlens_q.dtype, max_seqlen_q, max_seqlen_k) == (torch.int32, 9, 9)
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        return by_blocks(q, k, v, cu_seqlens_q.tolist())

    install(monkeypatch, "xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
    install(monkeypatch, "flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    install(monkeypatch, "liger_kernel.ops.layer_norm", LigerLayerNormFunction=FakeNorm)
    sys.modules["xformers.ops"].memory_efficient_attention = memory_efficient_attention
    peer = next(provider for provider in PROVIDERS if provider.name == name)
    (op,) = peer.builds
    present = replace(peer, missing=lambda case, device: None)
    result = run_case(case_of(op, backward=backward), [REFERENCE, OURS, present])
    assert outcomes_of(result)[name].ok, outcomes_of(result)[name]


@pytest.mark.parametrize("case", [case for case in CASES if case.dtype == torch.float32], ids=lambda case: case.name)
def test_what_is_compiled_is_one_graph(case, monkeypatch):
    """``fullgraph`` raises otherwise. Code is not generated here: that takes a compiler and its time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    compiled = next(provider for provider in PROVIDERS if provider.slow_start)
    result = run_case(case, [REFERENCE, OURS, compiled])
    assert outcomes_of(result)["two-stream-compiled"].failure is None
    assert outcomes_of(result)["two-stream-compiled"].ok


# ---- inputs, calls and stopwatches ----


@pytest.mark.parametrize("backward", [False, True])
def test_inputs_come_in_the_providers_form(backward):
    case = case_of("multiway_linear", backward=backward)
    problem = bench.Problem(case, TINY.layout(CPU), seed=0)
    rows = problem.inputs(REFERENCE)
    assert {name: tuple(tensor.shape) for name, tensor in rows.items()} == case.inputs()
    assert [name for name, tensor in rows.items() if tensor.requires_grad] == (
        ["x", "weight", "bias"] if backward else []
    )
    own = problem.inputs(REFERENCE)
    assert all(torch.equal(own[name], rows[name]) for name in rows)
    assert not {own[name].data_ptr() for name in own} & {rows[name].data_ptr() for name in rows}

    padded = problem.inputs(PROVIDERS[2])
    assert padded["x"].shape == (3, 11, 64)
    assert torch.equal(padded["x"][1, :5], rows["x"][5:10])  # the second sample's vision tokens
    assert torch.equal(padded["x"][1, 5], rows["x"][15 + 4])  # its only text token, behind those of the first
    assert not padded["x"][1, 6:].any()
    assert torch.equal(padded["weight"][1], rows["weight"][1])
    assert padded["bias"][0].shape == (48,)
    assert torch.equal(problem.rows(PROVIDERS[2], padded["x"]), rows["x"])
    assert problem.gradient(PROVIDERS[2]).shape == (3, 11, 48)


def test_values_hide_nothing():
    problem = bench.Problem(case_of("multiway_ffn"), TINY.layout(CPU), seed=0)
    for name, tensor in problem.tensors.items():
        assert tensor.std() > 0.01, name
        if name.endswith(("weight", "bias")):
            assert not torch.equal(tensor[0], tensor[1]), name
    means = problem.tensors["x"].mean(1)
    assert (means[::7] > 2).all()
    assert means[1:7].abs().max() < 1
    assert not torch.equal(problem.tensors["x"], bench.Problem(problem.case, problem.layout, seed=1).tensors["x"])


def test_calls_rotate_over_the_inputs_and_results_are_those_of_the_first():
    case = case_of("layer_norm")
    problems = [bench.Problem(case, TINY.layout(CPU), seed) for seed in range(3)]
    call = bench.Call(REFERENCE, REFERENCE.builds["layer_norm"](case, problems[0].layout), problems)
    outs = []
    for _ in range(4):
        call.ready()
        outs.append(call()[0])
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[1], outs[2])
    assert torch.equal(outs[0], outs[3])
    assert torch.equal(call.results()["out"], outs[0])
    assert not outs[0].requires_grad


def test_the_forward_is_not_in_the_time_of_the_backward():
    case = case_of("layer_norm", backward=True)
    problems = [bench.Problem(case, TINY.layout(CPU), 0)]
    compute, forwards = REFERENCE.builds["layer_norm"](case, problems[0].layout), []
    call = bench.Call(REFERENCE, lambda **tensors: forwards.append(1) or compute(**tensors), problems)
    call.ready()
    assert len(forwards) == 1
    gradients = call()
    assert len(forwards) == 1
    assert [tuple(gradient.shape) for gradient in gradients] == list(case.inputs().values())
    call()  # a warm-up call makes itself ready
    assert len(forwards) == 2


def test_calls_that_are_made_ready_together_are_made_in_their_order():
    case = case_of("layer_norm", backward=True)
    problems = [bench.Problem(case, case.batch.layout(CPU), seed) for seed in range(3)]
    call = bench.Call(REFERENCE, REFERENCE.builds["layer_norm"](case, problems[0].layout), problems)
    single = [call() for _ in problems]
    for _ in problems:
        call.ready()
    for alone in single:
        assert all(torch.equal(a, b) for a, b in zip(alone, call(), strict=True))


class FakeCall:
    def __init__(self, log):
        self.log = log

    def ready(self):
        self.log.append("ready")

    def __call__(self):
        self.log.append("work")


def test_caches_are_emptied_before_the_time_starts(monkeypatch):
    log, times = [], iter([1000, 4500])
    monkeypatch.setattr(
        bench, "wall_clock", lambda: lambda run: -next(times) + (log.append("start"), run(), next(times))[2]
    )
    assert bench.cold_wall_clock(lambda: log.append("evict"))(FakeCall(log)) == 3500
    assert log == ["ready", "evict", "start", "work"]


def test_caches_are_emptied_on_a_gpu_and_events_stand_around_the_work_alone(monkeypatch):
    log = []

    class Event:
        made = 0

        def __init__(self, enable_timing):
            assert enable_timing
            Event.made += 1
            self.name = {1: "start", 2: "end"}[Event.made]

        def record(self):
            log.append(f"record {self.name}")

        def synchronize(self):
            log.append(f"wait for {self.name}")

        def elapsed_time(self, end):
            assert (self.name, end.name) == ("start", "end")
            return 2.5  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    watch = bench.cold_cuda_events(lambda: log.append("evict"))
    assert watch(FakeCall(log)) == 2.5e6
    assert log == ["ready", "wait", "evict", "record start", "work", "record end", "wait for end"]
    log.clear()
    Event.made = 0
    captured = object.__new__(Graph)
    captured.calls, captured.log = 5, log
    assert watch(captured) == 0.5e6
    assert log == ["wait", "replay", "record start", "replay", "record end", "wait for end"]


class Graph(Captured):
    """Captures nothing: calls once what it would capture."""

    def __init__(self, calls, device, ready):
        self.calls = len(calls)
        self.log = []
        for _ in calls:
            ready()
        self.results = [call() for call in calls]

    def __call__(self):
        self.log.append("replay")


def cuda_like(monkeypatch, case, taking_part, sets=5):
    """A run as on a GPU, as far as tensors on a CPU let it: (result, what was timed by provider)."""
    timed = {}
    prepared = bench.Call.prepared

    def watch(run):
        assert run in timed.values()
        return 1.0

    def prepare(self, device):
        timed[self.provider.name] = self
        timed[self.provider.name] = prepared(self, torch.device("cuda"))
        return timed[self.provider.name]

    monkeypatch.setattr(bench.Call, "prepared", prepare)
    monkeypatch.setattr(bench, "SETS", sets)
    monkeypatch.setattr(bench, "cold", lambda device: watch)
    return bench.run_case(case, taking_part, device=CPU, rounds=6), timed


@pytest.mark.parametrize("backward", [False, True])
def test_on_a_gpu_what_is_timed_is_a_graph_of_calls_on_every_set(backward, monkeypatch):
    monkeypatch.setattr(bench, "Captured", Graph)
    case = case_of("multiway_linear", backward=backward)
    result, timed = cuda_like(monkeypatch, case, [REFERENCE, OURS])
    assert result.ok
    assert result.timing.rounds == {REFERENCE.name: [1.0] * 6, OURS.name: [1.0] * 6}
    for graph in timed.values():
        assert graph.calls == 5
        assert len(graph.log) == bench.WARMUP
        assert all(not torch.equal(graph.results[0][0], other[0]) for other in graph.results[1:]), "operands take turns"


def test_who_cannot_be_captured_is_timed_with_the_host_and_it_says_so(monkeypatch):
    class Refusing(Graph):
        def __init__(self, calls, device, ready):
            if calls[0].provider is REFERENCE:
                raise CaptureError("cannot be captured in a CUDA graph: it waits")
            super().__init__(calls, device, ready)

    monkeypatch.setattr(bench, "Captured", Refusing)
    result, timed = cuda_like(monkeypatch, case_of("layer_norm"), [REFERENCE, OURS])
    outcomes = outcomes_of(result)
    assert outcomes[REFERENCE.name].host_time == "cannot be captured in a CUDA graph: it waits"
    assert outcomes[OURS.name].host_time is None
    assert isinstance(timed[REFERENCE.name], bench.Call)
    assert set(result.timing.rounds) == {REFERENCE.name, OURS.name}
    printed = StringIO()
    Console(file=printed, width=200).print(op_table(result, ROOFS))
    reference, ours = (next(x for x in printed.getvalue().splitlines() if n in x) for n in (REFERENCE.name, OURS.name))
    assert "ms with the host's" in reference
    assert "host" not in ours
    document = op_document([result], ROOFS, {}, {}, complete=True)["results"][0]["providers"]
    assert [entry["host_time"] for entry in document] == [outcomes[REFERENCE.name].host_time, None]


def test_who_raises_while_it_is_captured_did_not_run(monkeypatch):
    class Failing(Graph):
        def __init__(self, calls, device, ready):
            raise ProviderError(calls[0].provider.name, RuntimeError("no such kernel"))

    monkeypatch.setattr(bench, "Captured", Failing)
    result, _ = cuda_like(monkeypatch, case_of("layer_norm"), [REFERENCE, OURS])
    assert {outcome.failure for outcome in result.outcomes} == {"RuntimeError: no such kernel"}
    assert not result.ok
    assert result.timing is None


def test_on_a_cpu_the_call_itself_is_timed():
    case = case_of("layer_norm")
    problem = bench.Problem(case, case.batch.layout(CPU), 0)
    call = bench.Call(REFERENCE, REFERENCE.builds["layer_norm"](case, problem.layout), [problem])
    assert call.prepared(CPU) is call


def test_the_stopwatch_follows_the_device(monkeypatch):
    monkeypatch.setattr(bench, "cache_bytes", lambda device: 1024)
    made = []
    monkeypatch.setattr(bench, "cold_wall_clock", lambda evict: made.append(("cpu", evict)))
    monkeypatch.setattr(bench, "cold_cuda_events", lambda evict: made.append(("cuda", evict)))
    monkeypatch.setattr(torch, "zeros", functools.partial(lambda f, size, device: f(size), torch.zeros))
    bench.cold(CPU)
    bench.cold(torch.device("cuda"))
    assert [name for name, _ in made] == ["cpu", "cuda"]
    (buffer,) = [cell.cell_contents for cell in made[0][1].__closure__]
    assert buffer.nbytes == 2048
    made[0][1]()
    assert buffer.eq(1).all()


# ---- cases and the command ----


class TestCases:
    def test_names_are_unique(self):
        names = [case.name for case in (*op_cases.OP_CASES, *op_cases.QUICK_OP_CASES)]
        assert len(set(names)) == len(names)
        assert "attention-ragged-bfloat16-backward" in names

    def test_every_op_is_there_in_every_direction(self):
        for cases, dtypes in (
            (op_cases.OP_CASES, (torch.float32, torch.bfloat16, torch.float16)),
            (op_cases.QUICK_OP_CASES, (torch.float32, torch.bfloat16)),
        ):
            assert {(case.op, case.dtype, case.backward) for case in cases} == set(
                itertools.product(op_cases.OPS, dtypes, (False, True))
            )
            assert {case.shape.mask for case in cases} == {"full", "captioning"}
        assert len(op_cases.OP_CASES) <= 64
        assert op_cases.PIXELS_480.rows == 2 * 901 + 13 + 9

    def test_tokens(self):
        assert op_cases.RAGGED.rows == 8 * (197 + 13)
        assert op_cases.DENSE.rows == 8 * (197 + 64)
        layout = TINY.layout(CPU)
        assert (layout.num_rows, layout.num_vision_rows, layout.width) == (TINY.rows, 15, 11) == (24, 15, 11)

    def test_numbers_by_hand(self):
        norm = case_of("layer_norm")
        assert (norm.flops(), norm.bytes()) == (0, 4 * (2 * 24 * 64 + 2 * 2 * 64))
        backward = replace(norm, backward=True)
        assert (backward.flops(), backward.bytes()) == (0, 4 * (3 * 24 * 64 + 2 * 2 * 2 * 64))
        linear = case_of("multiway_linear", torch.bfloat16)
        weights = 2 * (48 * 64 + 48)
        assert linear.flops() == 2 * 24 * 64 * 48
        assert linear.bytes() == 2 * (24 * 64 + weights + 2 * 24 * 48)
        backward = replace(linear, backward=True)
        assert backward.flops() == 4 * 24 * 64 * 48
        assert backward.bytes() == 2 * (2 * 24 * 64 + 2 * weights + 24 * 48)
        assert case_of("multiway_ffn").flops() == 2 * (2 * 24 * 64 * 96)
        attention = case_of("attention")
        pairs = 9**2 + 6**2 + 9**2
        assert attention.flops() == 2 * 2 * pairs * 64
        assert attention.bytes() == 4 * (24 * 3 * 64 + 24 * 64)
        assert replace(attention, backward=True).bytes() == 4 * (2 * 24 * 3 * 64 + 24 * 64)
        seen = sum(5 * 5 + text * 5 + sum(range(1, text + 1)) for text in (4, 1, 4))
        captioning = OpCase(CAPTIONING, TINY)
        assert captioning.flops() == 2 * 2 * seen * 64
        assert captioning.bytes() == attention.bytes()

    def test_selection(self):
        select = op_cases.select_op_cases
        assert select() == list(op_cases.OP_CASES)
        assert select(quick=True) == list(op_cases.QUICK_OP_CASES)
        assert {case.op for case in select(ops=["attention", "layer_norm"])} == {"attention", "layer_norm"}
        names = ["out-dense-float32-forward", "qkv-small-float32-backward"]
        assert [case.name for case in select(names)] == names
        assert [case.name for case in select(["ffn-small-float32-forward", *names], ["multiway_linear"])] == names

    def test_bad_selection(self):
        with pytest.raises(
            ValueError, match="case 'ffn-raged-float32-forward' is unknown; did you mean ffn-ragged-float32"
        ):
            op_cases.select_op_cases(["ffn-raged-float32-forward"])
        with pytest.raises(ValueError, match=r"op 'atention' is unknown; did you mean attention\?"):
            op_cases.select_op_cases(ops=["atention"])
        with pytest.raises(ValueError, match="op 'q' is unknown; known: layer_norm, multiway_linear"):
            op_cases.select_op_cases(ops=["q"])
        with pytest.raises(ValueError, match="no case is left"):
            op_cases.select_op_cases(["ffn-ragged-float32-forward"], ["attention"])
        with pytest.raises(ValueError, match="provider 'flash-atn' is unknown; did you mean flash-attn"):
            op_providers.select_providers(["flash-atn"])

    def test_providers(self):
        select = op_providers.select_providers
        assert select() == list(PROVIDERS)
        assert [provider.name for provider in select(["sdpa-padded"])] == ["reference", "beit3_fast", "sdpa-padded"]
        assert select(["two-stream-compiled"], quick=True)[-1].missing(CASES[0], CPU) is None

    def test_descriptions(self):
        words = {case.name: describe(case) for case in op_cases.OP_CASES}
        assert words["attention-ragged-float32-forward"] == (
            "8 x (197 + 13) tokens, 12 heads of 64, 1.08 GFLOP, 20.6 MB"
        )
        assert words["attention-captioning-ragged-float32-forward"] == (
            "8 x (197 + 13) tokens, 12 heads of 64, captioning mask, 1.02 GFLOP, 20.6 MB"
        )
        assert words["attention-480px-float32-forward"] == (
            "2 x (901 + 11) tokens, 12 heads of 64, 5.11 GFLOP, 22.4 MB"
        )
        assert words["out-dense-bfloat16-forward"] == (
            "8 x (197 + 64) tokens, width 768 to 768, residual, 2.46 GFLOP, 12 MB"
        )
        assert words["norm-ragged-float32-forward"] == "8 x (197 + 13) tokens, width 768, 10.3 MB"


@pytest.fixture
def toy_command(monkeypatch):
    chosen = [case_of("layer_norm"), case_of("attention", backward=True)]
    monkeypatch.setattr(command, "select_op_cases", lambda names, ops, quick: chosen)
    monkeypatch.setattr(command, "measure_roofs", lambda device, dtypes: ROOFS)
    monkeypatch.setattr(bench, "cold", lambda device: warm)
    return chosen


def test_command_prints_and_keeps_everything(toy_command, tmp_path, capsys):
    target = tmp_path / "out.json"
    assert command.run(command.ops, quick=True, device="cpu", json_file=target)
    printed = capsys.readouterr().out
    for words in (
        "measured roofs: memory 10 GB/s; matrix products 100 GFLOP/s in float32, 200 GFLOP/s in bfloat16",
        "norm-tiny-float32-forward: 3 x (5 + 3) tokens, width 64, 0.0133 MB",
        "not run: left out of a quick run: slow to compile",
        "passed",
        "% memory",
        "x [",
    ):
        assert words in printed

    kept = json.loads(target.read_text())
    assert (kept["schema"], kept["kind"], kept["complete"]) == (1, "ops", True)
    assert kept["settings"] == {"device": "cpu", "rounds": command.QUICK_OP_ROUNDS}
    assert kept["machine"]["torch"] == torch.__version__
    assert kept["roofs"] == {
        "bandwidth_gb_s": 10,
        "matrix_gflop_s": {"float32": 100, "bfloat16": 200},
        "peak_gflop_s": {},
        "memory_gb_s": {},
        "probe": None,
    }
    norm, attention = kept["results"]
    assert norm["case"] == {
        "name": "norm-tiny-float32-forward",
        "op": "layer_norm",
        "batch": 3,
        "rows": 24,
        "vision_tokens": 5,
        "text_lengths": [4, 1, 4],
        "text_width": 6,
        "width": 64,
        "out": 0,
        "heads": 0,
        "residual": False,
        "mask": None,
        "dtype": "float32",
        "direction": "forward",
        "flops": 0,
        "bytes": 13312,
    }
    assert (norm["ok"], norm["skipped"], attention["case"]["direction"]) == (True, None, "backward")
    providers = {provider["name"]: provider for provider in norm["providers"]}
    assert list(providers) == ["reference", "beit3_fast", "two-stream", "two-stream-compiled", "liger"]
    assert {frozenset(provider) for provider in providers.values()} == {
        frozenset(
            {"name", "missing", "failure", "errors", "parity", "reason", "host_time", "time_ms", "roof", "speedup"}
        )
    }
    reference, ours, left_out = providers["reference"], providers["beit3_fast"], providers["two-stream-compiled"]
    assert left_out["missing"] == "left out of a quick run: slow to compile"
    assert {value for name, value in left_out.items() if name not in ("name", "missing")} == {None}
    assert ours["speedup"] is None
    assert ours["parity"] == "passed"
    assert set(ours["errors"]["out"]) == {"maximum", "rms", "absolute"}
    assert set(attention["providers"][0]["errors"]) == {"qkv"}
    pairs = zip(reference["time_ms"]["rounds"], ours["time_ms"]["rounds"], strict=True)
    ratios = sorted(theirs / our for theirs, our in pairs)
    assert len(ratios) == command.QUICK_OP_ROUNDS == 16
    assert reference["speedup"]["median"] == pytest.approx((ratios[7] + ratios[8]) / 2)
    # of 16 values, the 4th from either end
    assert (reference["speedup"]["low"], reference["speedup"]["high"]) == pytest.approx((ratios[3], ratios[-4]))
    assert ours["roof"] == {"share": pytest.approx(13312 / 1e10 / ours["time_ms"]["median"] * 1e3), "bound": "memory"}


@pytest.mark.parametrize("change", [zeros, nan])
def test_command_fails_by_ours_and_not_by_a_peer(change, toy_command, tmp_path, capsys, monkeypatch):
    target = tmp_path / "out.json"

    def run(*taking_part):
        monkeypatch.setattr(command, "select_providers", lambda names, quick: list(taking_part))
        right = command.run(command.ops, rounds=6, device="cpu", json_file=target)
        assert "FAILED: maximum error" in " ".join(capsys.readouterr().out.split())
        return right, {p["name"]: p for p in json.loads(target.read_text())["results"][0]["providers"]}

    right, providers = run(REFERENCE, OURS, spoilt(change, name="peer"))
    assert right
    assert providers["peer"]["parity"] == "failed"
    assert "maximum error" in providers["peer"]["reason"]
    assert providers["peer"]["time_ms"] is providers["peer"]["roof"] is providers["peer"]["speedup"] is None
    assert providers["reference"]["speedup"] is not None
    assert (providers["peer"]["errors"]["out"] is None) == (change is nan)

    right, providers = run(REFERENCE, spoilt(change, name=OURS.name))
    assert not right
    assert providers[OURS.name]["time_ms"] is None
    assert providers["reference"]["time_ms"] is not None
    assert providers["reference"]["speedup"] is None


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "a peer"])
@pytest.mark.parametrize(
    ("op", "change"),
    [
        *itertools.product(SHAPES, [off_by_one_row, low_precision]),
        *itertools.product(["layer_norm", "multiway_linear", "multiway_ffn"], [one_row_of_the_other_expert]),
    ],
)
def test_a_wrong_kernel_has_no_time_and_ours_ends_with_exit_code_1(
    op, change, ours, toy_command, tmp_path, monkeypatch
):
    """Through the command line: off by one row, a row of the other expert, bfloat16 sums in a float32 case."""
    target = tmp_path / "out.json"
    name = OURS.name if ours else "peer"
    monkeypatch.setattr(command, "select_op_cases", lambda names, ops, quick: [case_of(op), case_of(op, backward=True)])
    taking_part = [REFERENCE, *([] if ours else [OURS]), spoilt(change, name=name)]
    monkeypatch.setattr(command, "select_providers", lambda names, quick: taking_part)
    done = CliRunner().invoke(main, ["bench", "ops", "--rounds", "6", "--device", "cpu", "--json", str(target)])
    assert done.exit_code == (1 if ours else 0), done.output
    assert "FAILED: " in done.output
    for result in json.loads(target.read_text())["results"]:
        wrong = next(provider for provider in result["providers"] if provider["name"] == name)
        assert wrong["parity"] == "failed"
        assert wrong["time_ms"] is wrong["roof"] is wrong["speedup"] is None
        assert result["ok"] is not ours


def test_command_shows_what_raised_and_what_was_skipped(toy_command, tmp_path, capsys, monkeypatch):
    def change(case, layout, compute):
        raise RuntimeError("no such kernel")

    taking_part = [REFERENCE, OURS, spoilt(change, name="bad")]
    monkeypatch.setattr(command, "select_providers", lambda names, quick: taking_part)
    assert command.run(command.ops, rounds=6, device="cpu")
    assert "did not run: RuntimeError: no such kernel" in capsys.readouterr().out
    monkeypatch.setattr(bench, "free_memory", lambda device: 1)
    assert command.run(command.ops, rounds=6, device="cpu", json_file=tmp_path / "out.json")
    assert "skipped: it may need" in capsys.readouterr().out
    assert "it may need" in json.loads((tmp_path / "out.json").read_text())["results"][0]["skipped"]


@pytest.mark.parametrize("done", [0, 1])
def test_an_interrupted_run_keeps_what_it_had(done, toy_command, tmp_path, capsys, monkeypatch):
    target = tmp_path / "out.json"
    whole = bench.run_case

    def interrupted(case, *arguments, **options):
        if case is toy_command[done]:
            raise KeyboardInterrupt
        return whole(case, *arguments, **options)

    monkeypatch.setattr(bench, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run(command.ops, quick=True, device="cpu", json_file=target)
    printed = capsys.readouterr().out
    assert f"interrupted: {done} of 2 cases done; they are in {target}\n" in printed
    kept = json.loads(target.read_text())
    assert [result["case"]["op"] for result in kept["results"]] == ["layer_norm"][:done]
    assert kept["complete"] is False


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cases": ["nonsense"]}, "case 'nonsense' is unknown"),
        ({"ops": ["attentions"]}, "did you mean attention"),
        ({"providers": ["torch"]}, "provider 'torch' is unknown"),
        ({"rounds": 5}, "rounds must be at least 6"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_options_stop_before_any_work(options, message, monkeypatch):
    monkeypatch.setattr(command, "measure_roofs", lambda *arguments: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        command.run(command.ops, **{"device": "cpu", **options})
