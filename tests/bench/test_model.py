"""``bench model`` on a backbone of toy width: real runs, and runs that are wrong on purpose."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace

import beit3_fast.bench.command as command
import beit3_fast.bench.model as model
import pytest
import torch
from beit3_fast.bench.cases import GPU_CASES, MODEL_CASES, QUICK_CASES, ModelCase, select
from beit3_fast.bench.report import describe
from beit3_fast.bench.roofs import Roofs
from oracles import public as oracle

from beit3_fast.models import BEiT3, EncoderConfig

CPU = torch.device("cpu")
PADDED = ModelCase("toy-joint", "base", 3, 32, 10, (4, 10, 7))
CASES = {
    "joint": PADDED,
    "joint dense": replace(PADDED, text_lengths=None),
    "image": replace(PADDED, text_tokens=None, text_lengths=None),
    "text": replace(PADDED, image_size=None),
    "bfloat16": replace(PADDED, dtype=torch.bfloat16),
    "bfloat16 against float32": replace(PADDED, dtype=torch.bfloat16, truth=torch.float32),
}
ROOFS = Roofs(1e9, {torch.float32: 2e12, torch.bfloat16: 4e12})
TOY = {
    "encoder_embed_dim": 64,
    "encoder_attention_heads": 4,
    "encoder_ffn_embed_dim": 128,
    "encoder_layers": 2,
    "vocab_size": 100,
}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(model, "_config", lambda case: EncoderConfig(**TOY, img_size=case.image_size or 32))
    monkeypatch.setattr(command, "select", lambda names, **options: [PADDED])
    monkeypatch.setattr(command, "measure_roofs", lambda device, dtypes: ROOFS)


def wrong(name, change):
    """A provider that spoils what ours computes."""

    def build(setup):
        run = model.OURS.build(setup)
        return lambda: change(run())

    return model.Provider(name, build)


@pytest.mark.parametrize("name", CASES)
def test_a_case_runs_and_everyone_passes(name):
    case = CASES[name]
    result = model.run_case(case, model.providers(), device=CPU, rounds=6)
    names = ["reference", "reference, autocast", "beit3_fast", "beit3_fast, optimized"]
    assert [outcome.provider for outcome in result.outcomes] == names
    assert [outcome.verdict.reason for outcome in result.outcomes] == ["", "", "", ""]
    assert result.ok
    assert {name: len(times) for name, times in result.timing.rounds.items()} == dict.fromkeys(names, 6)
    errors = {outcome.provider: outcome.error.maximum for outcome in result.outcomes}
    low, high = (1e-8, 2e-6) if case.dtype == torch.float32 else (1e-4, 4e-2)
    assert low < errors["beit3_fast"] < high
    assert low < errors["beit3_fast, optimized"] < high
    assert 1e-4 < errors["reference, autocast"] < 4e-2


@pytest.mark.parametrize("name", ["joint", "joint dense", "image", "text"])
def test_errors_are_those_against_the_public_code(name):
    """The truth, the masks and the choice of rows, once more with torchscale in the reference's place."""
    case = CASES[name]
    result = model.run_case(case, [model.REFERENCE], device=CPU, rounds=6)
    setup = model.Setup(case, CPU)
    public = oracle.BEiT3(oracle.EncoderConfig(**TOY, img_size=32, multiway=True, no_output_layer=True)).eval()
    public.load_state_dict(setup.weights, strict=True)
    with torch.inference_mode():
        single = setup.inputs.call(public)
        # torchscale rounds GELU and softmax to float32 in a float64 model: good to some 1e-7
        double = setup.inputs.to(torch.float64).call(public.double())
    keep = torch.ones(single.shape[:2], dtype=torch.bool)
    for row, length in enumerate(case.lengths()):
        keep[row, single.shape[1] - (case.text_tokens or 0) + length :] = False
    expected = (single - double)[keep].abs().max() / double[keep].abs().max()
    assert result.outcomes[0].error.maximum == pytest.approx(expected.item(), abs=3e-7)
    assert torch.equal(setup.valid(single), single[keep])
    if name in ("joint", "text"):
        assert not keep.all()


def swap_experts(out):
    return out.flip(1)


def off_by_one_row(out):
    return out.roll(1, dims=1)


def one_bad_value(out):
    out = out.clone()
    out[-1, -8, 5] += 1e-3 * out.abs().max()
    return out


def low_precision(out):
    return out.bfloat16().float()


@pytest.mark.parametrize(
    "change",
    [swap_experts, off_by_one_row, one_bad_value, low_precision, torch.zeros_like, lambda out: out * float("nan")],
    ids=["experts swapped", "off by one row", "one bad value", "rounded to bfloat16", "zeros", "nan"],
)
def test_a_wrong_result_gets_no_time(change):
    result = model.run_case(PADDED, [model.REFERENCE, wrong("wrong", change)], device=CPU, rounds=6)
    reference, broken = result.outcomes
    assert reference.ok
    assert not broken.ok
    assert not result.ok
    assert broken.verdict.reason
    assert set(result.timing.rounds) == {"reference"}


def test_what_nobody_reads_may_hold_anything():
    """Rows of padding, and only they, are left out of the comparison."""

    def change(out):
        out = out.clone()
        out[0, -6:] = 1e9  # the first text has 4 of its 10 tokens
        return out

    assert model.run_case(PADDED, [model.REFERENCE, wrong("odd", change)], device=CPU, rounds=6).ok


def test_experts_swapped_in_the_weights_are_seen():
    def build(setup):
        swapped = {
            name.replace(".A.", ".?.").replace(".B.", ".A.").replace(".?.", ".B."): tensor
            for name, tensor in setup.weights.items()
            if "embed_positions" not in name
        }
        swapped |= {name: tensor for name, tensor in setup.weights.items() if "embed_positions" in name}
        backbone = BEiT3(setup.config).eval()
        backbone.load_state_dict(swapped)
        return lambda: setup.inputs.call(backbone)

    result = model.run_case(PADDED, [model.REFERENCE, model.Provider("swapped", build)], device=CPU, rounds=6)
    assert not result.ok
    assert result.outcomes[1].error.maximum > 0.05


def test_no_weight_is_at_its_default_and_no_two_are_equal():
    weights = model.Setup(PADDED, CPU).weights
    for name, tensor in weights.items():
        assert tensor.std() > 0.01, name
        other = weights.get(name.replace(".A.", ".B."))
        assert other is tensor or other.shape != tensor.shape or not torch.equal(other, tensor), name


def test_one_provider_that_crashes_does_not_take_the_others_with_it():
    def crash(setup):
        raise RuntimeError("no compiler\nsecond line")

    taking_part = [model.REFERENCE, model.Provider("crashing", crash), model.OURS]
    result = model.run_case(PADDED, taking_part, device=CPU, rounds=6)
    assert [outcome.ok for outcome in result.outcomes] == [True, False, True]
    assert result.outcomes[1].failure == "RuntimeError: no compiler"
    assert not result.ok
    assert set(result.timing.rounds) == {"reference", "beit3_fast"}


@pytest.mark.parametrize("peer", [True, False])
def test_a_hopelessly_slow_peer_is_not_timed(peer, monkeypatch):
    """By its second run: the first may compile. Ours are timed however slow they are."""
    monkeypatch.setattr(model, "LONGEST", 3.0)
    calls = {"always": 0, "first": 0}

    def sleepy(name):
        def build(setup):
            run = model.REFERENCE.build(setup)

            def call():
                calls[name] += 1
                if name == "always" or calls[name] == 1:
                    time.sleep(0.6)
                return run()

            return call

        return model.Provider(name, build, peer=peer)

    result = model.run_case(PADDED, [model.REFERENCE, sleepy("always"), sleepy("first")], device=CPU, rounds=6)
    assert result.ok
    always = result.outcomes[1]
    if peer:
        assert re.fullmatch(r"too slow: a run takes 0\.\d+ s, and 6 rounds would take more than 3 s", always.failure)
        assert always.verdict.ok, "its parity is told all the same"
        assert set(result.timing.rounds) == {"reference", "first"}
        assert calls["always"] == 2
    else:
        assert set(result.timing.rounds) == {"reference", "always", "first"}


def test_without_its_reference_nobody_is_judged():
    def crash(setup):
        raise RuntimeError("gone")

    result = model.run_case(
        PADDED, [model.Provider("reference", crash, judged_by="reference"), model.OURS], device=CPU, rounds=6
    )
    assert not result.ok
    assert result.timing is None
    assert "nothing to judge it by" in result.outcomes[1].verdict.reason


class TestMemory:
    def test_a_case_that_does_not_fit_is_skipped_with_the_figure(self, monkeypatch, tmp_path, capsys):
        monkeypatch.setattr(model, "free_memory", lambda device: 2**20)
        monkeypatch.setattr(model, "draw_weights", lambda *arguments: pytest.fail("weights were made"))
        assert command.run(command.model, rounds=6, device="cpu", json_file=tmp_path / "out.json")
        assert "skipped: it may need 0.0 GiB, 0.0 GiB are free" in capsys.readouterr().out
        (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
        assert result["skipped"].startswith("it may need")
        assert (result["ok"], result["providers"]) == (True, [])

    def test_who_cannot_take_part_needs_none(self, monkeypatch):
        needed = []
        monkeypatch.setattr(model, "needed_memory", lambda case, config, providers: needed.append(providers) or 0)
        absent = replace(model.AUTOCAST, name="absent", missing=lambda case, device: "not here", peer=True)
        model.run_case(PADDED, [model.REFERENCE, absent, absent], device=CPU, rounds=6)
        assert needed == [1, 1], "before anybody is tried, and then"

    def test_where_the_system_does_not_tell_it_runs(self, monkeypatch):
        monkeypatch.setattr(model, "free_memory", lambda device: None)
        assert model.run_case(PADDED, [model.REFERENCE], device=CPU, rounds=6).skipped is None

    def test_the_figure_by_hand(self):
        config = EncoderConfig(**TOY, img_size=32)
        weights = sum(tensor.numel() for tensor in model.Setup(PADDED, CPU).weights.values())
        layer = 3 * (15 * (16 * 64 + 4 * 128) + 3 * 4 * 15**2)
        # the set that all are copied from, and five providers' or the truth's
        assert model.needed_memory(PADDED, config, 5) == 4 * weights * 6 + 4 * layer
        assert model.needed_memory(PADDED, config, 1) == 4 * weights + 8 * (weights + layer)
        step = replace(PADDED, task="training")
        assert model.needed_memory(step, config, 2) == 4 * weights * 9 + 4 * 2 * layer
        assert model.needed_memory(step, config, 0) == 4 * weights + 8 * (2 * weights + 2 * layer)

    def test_it_grows_with_what_takes_memory(self):
        def needed(case, providers=3):
            return model.needed_memory(case, EncoderConfig.base(img_size=case.image_size or 224), providers)

        joint = next(case for case in MODEL_CASES if case.name == "base-joint")
        gib = 2**30
        assert 2 * gib < needed(joint) < 6 * gib
        assert needed(joint, 6) - needed(joint) == pytest.approx(3 * 4 * 222e6, rel=0.05)
        assert needed(replace(joint, dtype=torch.bfloat16, truth=torch.float32)) < 0.6 * needed(joint)
        assert needed(replace(joint, batch=10_000)) > 500 * gib
        assert needed(replace(joint, image_size=1600)) > 5 * needed(joint)


def test_command_prints_and_keeps_everything(tmp_path, capsys):
    target = tmp_path / "out.json"
    assert command.run(command.model, rounds=6, device="cpu", json_file=target)
    printed = capsys.readouterr().out
    assert "toy-joint: base, batch 3, image 32, 10 text tokens (7 valid on average), float32" in printed
    assert "beit3_fast" in printed
    assert "passed" in printed
    assert "ms" in printed
    assert "x [" in printed
    kept = json.loads(target.read_text())
    assert (kept["schema"], kept["kind"]) == (1, "model")
    assert kept["complete"] is True
    assert kept["settings"] == {"device": "cpu", "rounds": 6}
    assert kept["machine"]["torch"] == torch.__version__
    assert kept["roofs"]["matrix_gflop_s"] == {"float32": 2000, "bfloat16": 4000}
    (result,) = kept["results"]
    assert (result["ok"], result["skipped"], result["baseline"]) == (True, None, "reference")
    assert result["case"] == {
        "name": "toy-joint",
        "size": "base",
        "batch": 3,
        "image_size": 32,
        "text_tokens": 10,
        "text_lengths": [4, 10, 7],
        "dtype": "float32",
        "truth": "float64",
        "task": "forward",
    }
    by_name = {provider["name"]: provider for provider in result["providers"]}
    reference = by_name["reference"]
    ours = by_name[result["ours"]]
    assert set(ours) == {
        "name",
        "peer",
        "missing",
        "failure",
        "error",
        "parity",
        "reason",
        "time_ms",
        "roof",
        "speedup",
        "ours_faster",
        "memory",
    }
    assert reference["speedup"] is None
    assert ours["ours_faster"] is None
    assert reference["ours_faster"] == ours["speedup"]
    assert reference["parity"] == "passed"
    assert ours["roof"] == pytest.approx(result["flops"] / (ours["time_ms"]["median"] * 1e-3) / 2e12)
    autocast = by_name["reference, autocast"]
    assert autocast["roof"] == pytest.approx(result["flops"] / (autocast["time_ms"]["median"] * 1e-3) / 4e12)
    pairs = zip(reference["time_ms"]["rounds"], ours["time_ms"]["rounds"], strict=True)
    ratios = sorted(slow / fast for slow, fast in pairs)
    assert ours["speedup"]["median"] == pytest.approx((ratios[2] + ratios[3]) / 2)
    assert (ours["speedup"]["low"], ours["speedup"]["high"]) == pytest.approx((ratios[0], ratios[-1]))
    assert ours["time_ms"]["low"] <= ours["time_ms"]["median"] <= ours["time_ms"]["high"]
    # an autocast's speed is no answer to a float32 case
    assert result["best_other"] == "reference"
    assert "best of the others in float32: reference" in printed


@pytest.mark.parametrize("change", [torch.zeros_like, lambda out: out / 0])
def test_command_refuses_a_speed_for_a_wrong_result(change, tmp_path, capsys, monkeypatch):
    spoilt = wrong("beit3_fast", change)
    monkeypatch.setattr(model, "providers", lambda: [model.REFERENCE, spoilt])
    assert not command.run(command.model, rounds=6, device="cpu", json_file=tmp_path / "out.json")
    assert "FAILED: maximum error" in capsys.readouterr().out
    _, broken = json.loads((tmp_path / "out.json").read_text())["results"][0]["providers"]
    assert broken["parity"] == "failed"
    assert broken["time_ms"] is None
    assert broken["speedup"] is None
    assert "maximum error" in broken["reason"]


def test_an_interrupted_run_keeps_what_it_had(tmp_path, monkeypatch):
    second = replace(PADDED, name="second")
    monkeypatch.setattr(command, "select", lambda names, **options: [PADDED, second])
    run_case = model.run_case

    def interrupted(case, *arguments, **options):
        if case is second:
            raise KeyboardInterrupt
        return run_case(case, *arguments, **options)

    monkeypatch.setattr(model, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run(command.model, rounds=6, device="cpu", json_file=tmp_path / "out.json")
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["complete"] is False
    assert [result["case"]["name"] for result in kept["results"]] == ["toy-joint"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 5}, "rounds must be at least 6"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_options_stop_before_any_work(options, message, monkeypatch):
    monkeypatch.setattr(model, "run_case", lambda *arguments, **options: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        command.run(command.model, **{"device": "cpu", **options})


def test_cuda_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device cuda is not available"):
        command.run(command.model, device="cuda")


class TestCases:
    def test_names_are_unique(self):
        assert len({case.name for case in (*MODEL_CASES, *GPU_CASES)}) == len(MODEL_CASES) + len(GPU_CASES)

    def test_the_padded_cases_have_13_valid_tokens_on_average(self):
        for case in (*MODEL_CASES, *GPU_CASES):
            if case.text_lengths is not None:
                assert sum(replace(case, batch=8).lengths()) == 8 * 13
                assert max(case.lengths()) <= case.text_tokens

    def test_selection(self):
        assert select([]) == list(MODEL_CASES)
        assert [case.name for case in select(["base-text", "base-image"])] == ["base-text", "base-image"]
        assert {case.batch for case in select([], quick=True)} == {2}
        assert {case.batch for case in select([], quick=True, batch=5)} == {5}
        assert select(["base-joint"], batch=11)[0].lengths()[8:] == list(select(["base-joint"])[0].lengths()[:3])

    def test_what_is_sized_for_a_gpu_runs_on_a_cpu_only_if_it_is_named(self):
        assert select([], gpu=True) == [*MODEL_CASES, *GPU_CASES]
        assert [case.name for case in select([], quick=True, gpu=True)] == [*QUICK_CASES]
        assert {(case.name, case.task, case.batch, case.dtype) for case in GPU_CASES} == {
            ("base-joint-64-bfloat16", "forward", 64, torch.bfloat16),
            ("base-joint-dense-64-bfloat16", "forward", 64, torch.bfloat16),
            ("base-training-8-bfloat16", "training", 8, torch.bfloat16),
            ("base-training-64-bfloat16", "training", 64, torch.bfloat16),
        }
        assert [case.name for case in select(["base-training-8-bfloat16"])] == ["base-training-8-bfloat16"]

    def test_bad_selection(self):
        with pytest.raises(ValueError, match=r"case 'base-jiont' is unknown; did you mean base-joint"):
            select(["base-jiont"])
        with pytest.raises(ValueError, match=r"case 'q' is unknown; known: base-joint, "):
            select(["q"])
        with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
            select([], batch=0)

    def test_descriptions(self):
        words = {case.name: describe(case) for case in MODEL_CASES}
        assert words["base-joint"] == "base, batch 8, image 224, 64 text tokens (13 valid on average), float32"
        assert words["base-joint-dense"] == "base, batch 8, image 224, 64 text tokens, none padded, float32"
        assert words["base-image-bfloat16"] == "base, batch 8, image 224, bfloat16"
        assert words["base-text"] == "base, batch 8, 64 text tokens (13 valid on average), float32"
