"""``bench breakdown``: every op's own time goes to the right part, and the parts add up to the forward."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import beit3_fast.bench.breakdown as breakdown
import beit3_fast.bench.command as command
import beit3_fast.bench.model as model
import pytest
import torch
import torch.nn.functional as F
from beit3_fast.bench.cases import ModelCase
from torch.autograd import DeviceType
from torch.autograd.profiler import profile, record_function

from beit3_fast.models import EncoderConfig

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOY = EncoderConfig(
    encoder_embed_dim=64,
    encoder_attention_heads=4,
    encoder_ffn_embed_dim=128,
    encoder_layers=2,
    vocab_size=100,
    img_size=32,
)
CASE = ModelCase("toy-joint", "base", 3, 32, 10, (4, 10, 7))
FUSED = "matrix products with bias, GELU, residual"
BLOCK = "feed-forward block (products, GELU, LayerNorm, residual)"
OURS = "beit3_fast, optimized"


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(model, "_config", lambda case: TOY)


@dataclass
class Event:
    """What the profiler gives, as far as it is looked at: microseconds of its own."""

    name: str
    cpu_parent: Event | None = None
    self_cpu_time_total: float = 0.0
    self_device_time_total: float = 0.0
    device_type: DeviceType = DeviceType.CPU


def nested(*names):
    """The innermost of events that call each other."""
    event = None
    for name in names:
        event = Event(name, event)
    return event


# ---- which part ----


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["aten::linear", "aten::addmm"], "matrix products"),
        (["aten::linear", "aten::t", "aten::transpose"], "matrix products"),
        (["aten::linear", "aten::add_"], "residual and other elementwise"),
        (["aten::linear", "aten::matmul", "aten::reshape", "aten::clone", "aten::copy_"], "copies"),
        (["aten::bmm"], "attention"),
        (["aten::softmax", "aten::_softmax"], "attention"),
        (["aten::masked_fill", "aten::clone", "aten::empty_like"], "copies"),
        (["aten::layer_norm", "aten::native_layer_norm", "aten::empty"], "LayerNorm"),
        (["aten::gelu"], "GELU"),
        (["aten::embedding", "aten::index_select"], "embedding"),
        (["aten::conv2d", "aten::convolution", "aten::mkldnn_convolution", "aten::copy_"], "embedding"),
        (["aten::index_select"], "copies"),
        (["beit3_fast::multiway_ffn", "beit3_fast::multiway_linear_cpu", "aten::empty"], FUSED),
        (["beit3_fast::multiway_ffn", "beit3_fast::layer_norm"], "LayerNorm"),
        (["beit3_fast::multiway_ffn", "aten::add"], "residual and other elementwise"),
        (["beit3_fast::attention", "beit3_fast::attention_cpu", "aten::empty"], "attention"),
        (["beit3_fast::packed_ffn", "aten::empty"], BLOCK),
        (["aten::something"], "other"),
    ],
)
@pytest.mark.parametrize("around", [[], [breakdown.FORWARD]], ids=["alone", "in a forward"])
def test_an_ops_own_time_has_its_part(names, part, around):
    assert breakdown.part_of(nested(*around, *names)) == part


def test_the_forwards_own_time_is_pythons():
    assert breakdown.part_of(nested(breakdown.FORWARD)) == "Python between ops"


def test_every_op_of_ours_that_a_forward_runs_has_a_part():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("beit3_fast::")}
    assert "beit3_fast::multiway_ffn" in names
    forward = {name for name in names if not name.endswith(("_backward", "_build_info"))}
    assert {name for name in forward if breakdown.part_of(Event(name)) == "other"} == set()


def test_no_op_stands_in_two_parts():
    ops = [op for ops in breakdown.PARTS.values() for op in ops]
    assert len(ops) == len(set(ops))
    assert set(breakdown.WHOLE) <= set(breakdown.PARTS)


def test_times_of_the_same_part_are_added():
    forward = Event(breakdown.FORWARD, None, 100.0, 0.0)
    linear = Event("aten::linear", forward, 20.0, 0.0)
    events = [
        forward,
        linear,
        Event("aten::addmm", linear, 3000.0, 900.0),
        Event("aten::t", linear, 10.0, 0.0),
        Event("aten::gelu", forward, 70.0, 40.0),
        # a kernel is an event of its own beside the op that launched it
        Event("gemm_kernel", None, 0.0, 900.0, DeviceType.CUDA),
    ]
    expected = {"Python between ops": 0.1, "matrix products": 3.03, "GELU": 0.07}
    assert breakdown.parts_of(events, CPU) == pytest.approx(expected)
    assert breakdown.parts_of(events, CUDA) == pytest.approx({"matrix products": 0.9, "GELU": 0.04})


# ---- real forwards ----


def parts_and_total(run):
    """The parts of one call in milliseconds, and how long the profiler says that it took."""
    run()
    with torch.inference_mode():
        events = list(breakdown._events(run, CPU))
    (forward,) = (event for event in events if event.name == breakdown.FORWARD)
    return breakdown.parts_of(events, CPU), forward.cpu_time_total / 1e3


@pytest.mark.parametrize(
    ("work", "part"),
    [
        (lambda x: F.linear(x, x, x[0]), "matrix products"),
        (lambda x: torch.bmm(x.view(4, 256, 1024), x.view(4, 1024, 256)), "attention"),
        (lambda x: F.softmax(x, -1), "attention"),
        (lambda x: F.layer_norm(x, (1024,)), "LayerNorm"),
        (F.gelu, "GELU"),
        (lambda x: x + x, "residual and other elementwise"),
        (lambda x: torch.cat([x, x]), "copies"),
        (lambda x: F.conv2d(x.view(1, 4, 512, 512), x[:, :64].reshape(256, 4, 8, 8)[:64], stride=8), "embedding"),
        (lambda x: F.embedding(torch.arange(1024).repeat(4), x), "embedding"),
    ],
    ids=["linear", "bmm", "softmax", "layer_norm", "gelu", "add", "cat", "conv2d", "embedding"],
)
def test_work_is_seen_where_it_is_done(work, part):
    x = torch.randn(1024, 1024)

    def run():
        for _ in range(10):
            work(x)

    parts, total = parts_and_total(run)
    assert sum(parts.values()) == pytest.approx(total, rel=0.01)
    assert parts[part] > 0.6 * total


@pytest.mark.parametrize("provider", breakdown.providers(), ids=lambda provider: provider.name)
def test_the_parts_of_a_forward_add_up_and_nothing_is_lost(provider):
    missing = provider.missing(CASE, CPU)
    if missing:
        pytest.skip(missing)
    run = provider.build(model.Setup(CASE, CPU))
    parts, total = parts_and_total(run)
    assert sum(parts.values()) == pytest.approx(total, rel=0.01)
    everybody = {"attention", "LayerNorm", "residual and other elementwise", "embedding", "copies"}
    assert everybody <= set(parts)
    assert (FUSED in parts) == (provider.name == OURS)
    assert ("matrix products" in parts) == (provider.name != OURS)
    assert ("GELU" in parts) == (provider.name != OURS)


def test_medians_over_the_forwards(monkeypatch):
    gelu, softmax, once = iter([5000.0, 1000.0, 3000.0]), iter([0.0, 9000.0, 8000.0]), iter([7000.0, 0.0, 0.0])

    def events(run, device):
        run()
        times = {"aten::gelu": next(gelu), "aten::softmax": next(softmax), "aten::cat": next(once)}
        return [Event(name, None, microseconds) for name, microseconds in times.items()]

    monkeypatch.setattr(breakdown, "_events", events)
    calls = []
    found = breakdown.measure(lambda: calls.append(1), CPU, 3)
    assert list(found.items()) == [("attention", 8.0), ("GELU", 3.0)]  # the largest first
    assert len(calls) == 3


def test_a_gpu_is_waited_for_and_seen_through_its_kernels(monkeypatch):
    seen = []

    class Profile:
        function_events = (Event("aten::mm", None, 5.0, 2000.0),)

        def __init__(self, **options):
            seen.append(options)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            seen.append("left")

    monkeypatch.setattr(breakdown, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("waited"))
    assert breakdown.measure(lambda: seen.append("ran"), CUDA, 1) == {"matrix products": 2.0}
    assert seen == [{"use_device": "cuda"}, "ran", "waited", "left"]


def test_the_profiler_has_what_is_read():
    with profile() as watched, record_function(breakdown.FORWARD):
        torch.ones(3).add(1)
    names = {event.name: event for event in watched.function_events}
    assert names["aten::add"].cpu_parent is names[breakdown.FORWARD]
    assert names["aten::add"].self_cpu_time_total > 0
    assert names["aten::add"].self_device_time_total == 0


def test_the_profiler_writes_nothing_between_the_tables():
    code = (
        "import torch; from beit3_fast.bench import breakdown as b;"
        "print(b.measure(lambda: torch.ones(3).add(1), torch.device('cpu'), 2))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "residual and other elementwise" in done.stdout
    assert done.stderr == ""


# ---- parity first, and the command ----


def wrong(setup):
    run = model.OPTIMIZED.build(setup)
    return lambda: torch.zeros_like(run())


def test_a_wrong_result_gets_no_parts():
    spoilt = replace(model.OPTIMIZED, build=wrong)
    found = breakdown.run_case(CASE, [model.REFERENCE, spoilt], device=CPU, forwards=1)
    assert set(found.parts) == {"reference"}
    assert not found.result.ok
    (result,) = breakdown.document([found], {}, {}, complete=True)["results"]
    assert result["ok"] is False
    assert [provider["name"] for provider in result["providers"]] == ["reference"]
    (left_out,) = result["left_out"]
    assert left_out["name"] == OURS
    assert left_out["reason"].startswith("FAILED: maximum error")


def test_command_prints_and_keeps_everything(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(breakdown, "select", lambda names, *, quick: [CASE])
    absent = replace(model.AUTOCAST, name="public", missing=lambda case, device: "not here", peer=True)
    monkeypatch.setattr(breakdown, "providers", lambda: [model.REFERENCE, absent, model.OPTIMIZED])
    target = tmp_path / "out.json"
    assert command.run(command.breakdown, quick=True, device="cpu", json_file=target)
    printed = capsys.readouterr().out
    assert "toy-joint: base, batch 3, image 32, 10 text tokens (7 valid on average), float32" in printed
    assert FUSED in printed
    assert "public: not run: not here" in printed
    kept = json.loads(target.read_text())
    assert (kept["schema"], kept["kind"], kept["complete"]) == (1, "breakdown", True)
    assert kept["settings"] == {"device": "cpu", "rounds": 6, "forwards": 3}
    (result,) = kept["results"]
    assert result["case"]["name"] == "toy-joint"
    assert result["case"]["text_lengths"] == [4, 10, 7]
    assert result["left_out"] == [{"name": "public", "reason": "not run: not here"}]
    assert [provider["name"] for provider in result["providers"]] == ["reference", OURS]
    for provider in result["providers"]:
        assert set(provider) == {"name", "time_ms", "total_ms", "parts"}
        assert set(provider["time_ms"]) == {"median", "low", "high", "rounds"}
        times = [part["ms"] for part in provider["parts"]]
        assert times == sorted(times, reverse=True)
        assert sum(times) == pytest.approx(provider["total_ms"])
    part, *_ = result["providers"][0]["parts"]
    assert f"{100 * part['ms'] / result['providers'][0]['total_ms']:.0f}%" in printed


def test_an_interrupted_run_keeps_what_it_had(tmp_path, monkeypatch):
    second = replace(CASE, name="second")
    monkeypatch.setattr(breakdown, "select", lambda names, *, quick: [CASE, second])
    run_case = breakdown.run_case

    def interrupted(case, *arguments, **options):
        if case is second:
            raise KeyboardInterrupt
        return run_case(case, *arguments, **options)

    monkeypatch.setattr(breakdown, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run(command.breakdown, quick=True, device="cpu", json_file=tmp_path / "out.json")
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["complete"] is False
    assert [result["case"]["name"] for result in kept["results"]] == ["toy-joint"]


def test_selection():
    assert [case.name for case in breakdown.select()] == list(breakdown.DEFAULT_CASES)
    assert [(case.name, case.batch) for case in breakdown.select(quick=True)] == [("base-joint", 2)]
    assert [case.name for case in breakdown.select(["base-text"])] == ["base-text"]
    with pytest.raises(ValueError, match="case 'base-txt' is unknown; did you mean base-text"):
        breakdown.select(["base-txt"])
    with pytest.raises(ValueError, match="must be a forward of the backbone, got 'base-training', whose task is train"):
        breakdown.select(["base-training"])
    assert [provider.name for provider in breakdown.providers()] == ["reference", "public", OURS]


def test_a_case_in_which_nobody_passed():
    outcome = model.Outcome("reference", failure="it broke")
    result = model.CaseResult(CASE, [outcome], None)
    found = breakdown.Breakdown(result, {})
    assert breakdown.table(found).caption.plain == "reference: did not run: it broke"
    assert breakdown._result(found)["providers"] == []


def test_a_case_that_does_not_fit_in_memory(monkeypatch):
    monkeypatch.setattr(model, "free_memory", lambda device: 1)
    found = breakdown.run_case(CASE, breakdown.providers(), device=CPU, forwards=1)
    result = breakdown._result(found)
    assert result["providers"] == []
    assert [entry["name"] for entry in result["left_out"]] == ["reference", "public", OURS]
    assert result["left_out"][0]["reason"].endswith("GiB, 0.0 GiB are free")
    assert "GiB are free" in breakdown.table(found).caption.plain
