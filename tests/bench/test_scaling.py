"""``bench scaling`` on a backbone of toy width: parity at every point, and growth that is known."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace

import beit3_fast.bench.command as command
import beit3_fast.bench.model as model
import beit3_fast.bench.scaling as scaling
import pytest
import torch
from beit3_fast.bench.cases import ModelCase
from beit3_fast.bench.roofs import Roofs
from beit3_fast.bench.timing import Timing
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from beit3_fast.models import EncoderConfig

CPU = torch.device("cpu")
ROOFS = Roofs(1e9, {torch.float32: 2e12, torch.bfloat16: 4e12})
TOY = {
    "encoder_embed_dim": 64,
    "encoder_attention_heads": 4,
    "encoder_ffn_embed_dim": 128,
    "encoder_layers": 2,
    "vocab_size": 100,
}
IMAGE = scaling.Curve(
    "image",
    "toy, one image alone",
    "image size (pixels a side)",
    (32, 64, 96),
    (32, 48),
    lambda size: ModelCase(f"image {size}", "base", 1, size, None),
)
BATCH = scaling.Curve(
    "batch",
    "toy, images with captions",
    "batch (samples)",
    (1, 3, 5),
    (1, 2),
    lambda batch: ModelCase(f"batch {batch}", "base", batch, 32, 10, (4, 10, 7)),
)
TEXT = scaling.Curve(
    "text",
    "toy, texts alone",
    "text length (tokens)",
    (4, 8),
    (4, 8),
    lambda tokens: ModelCase(f"text {tokens}", "base", 2, None, tokens),
)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(model, "_config", lambda case: EncoderConfig(**TOY, img_size=case.image_size or 32))
    monkeypatch.setattr(command, "measure_roofs", lambda device, dtypes: ROOFS)
    monkeypatch.setattr(scaling, "CURVES", (IMAGE, BATCH, TEXT))


def point_at(curve, x, taking_part=None, earlier=(), setups=None, dtype=torch.float32):
    taking_part = taking_part or scaling.select_providers()
    setups = setups or scaling.Setups()
    return scaling.run_point(curve, x, taking_part, earlier, setups, dtype=dtype, device=CPU, rounds=6)


def timed(x, flops, **nanoseconds):
    times = {name: [value] * 6 for name, value in nanoseconds.items()}
    return scaling.Point(x, flops, x, [model.Outcome(name) for name in nanoseconds], Timing(times))


def spoilt(change):
    """Ours, with what it computes changed."""

    def build(setup):
        run = model.OURS.build(setup)
        return lambda: change(run())

    return replace(scaling.OURS, build=build)


# ---- growth ----


@pytest.mark.parametrize("power", [0.0, 1.0, 1.37])
def test_the_exponent_is_that_of_the_times(power):
    points = [timed(n, 10**9 * n, fast=5e6 * n**power, slow=7e6 * n**2) for n in (1, 2, 4, 64)]
    assert scaling.exponent(points, "fast") == pytest.approx(power)
    assert scaling.exponent(points, "slow") == pytest.approx(2)


def test_the_exponent_is_fitted_to_all_points_that_have_a_time():
    points = [timed(1, 10, a=10.0), timed(2, 20, b=1.0), timed(4, 40, a=80.0), timed(8, 80, a=80.0)]
    # logarithms to base 2 beside the first point: (0, 0), (2, 3), (3, 3) lie nearest to a line of slope 15/14
    assert scaling.exponent(points, "a") == pytest.approx(15 / 14)
    assert scaling.exponent(points, "b") is None


@pytest.mark.parametrize("curve", [IMAGE, TEXT], ids=["image", "text"])
def test_flops_and_times_belong_to_the_same_model(curve, monkeypatch):
    """A stopwatch that counts the products the reference really makes, one a nanosecond: none is padding here."""

    def count(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return float(counter.get_total_flops() + 1)  # what ours does in its own ops is not counted

    monkeypatch.setattr(model, "stopwatch_for", lambda device: count)
    setups, points = scaling.Setups(), []
    for x in curve.values:
        points.append(point_at(curve, x, earlier=points, setups=setups))
    assert [point.timing.time("reference").median for point in points] == [point.flops + 1 for point in points]
    assert scaling.exponent(points, "reference") == pytest.approx(1, abs=1e-4)


def test_tokens_are_counted_without_padding():
    assert point_at(BATCH, 5).tokens == 5 * 5 + 4 + 10 + 7 + 4 + 10
    assert point_at(IMAGE, 64).tokens == 17
    assert point_at(TEXT, 8).tokens == 16


# ---- parity ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_point_of_every_curve_passes(dtype):
    setups = scaling.Setups()
    for curve in (IMAGE, BATCH, TEXT):
        for x in curve.values:
            point = point_at(curve, x, setups=setups, dtype=dtype)
            assert point.ok
            assert [outcome.provider for outcome in point.outcomes] == ["reference", "beit3_fast, optimized"]
            assert set(point.timing.rounds) == {"reference", "beit3_fast, optimized"}


def test_three_samples_are_judged_as_bench_model_does():
    case = BATCH.case(3)
    whole, few = model.Setup(case, CPU), scaling.Setups()(case, CPU)
    with torch.inference_mode():
        out = whole.inputs.call(whole.reference(torch.float32))
        expected, found = whole.errors(out, whole.truth())["out"], few.errors(out, few.truth())["out"]
    assert found.maximum == pytest.approx(expected.maximum, rel=1e-3)
    assert found.rms == pytest.approx(expected.rms, rel=1e-3)


@pytest.mark.parametrize("sample", [0, 2, 4], ids=["first", "amid", "last"])
def test_a_wrong_sample_gets_no_time(sample):
    def change(out):
        out = out.clone()
        out[sample, 2, 3] += 1e-3 * out.abs().max()
        return out

    point = point_at(BATCH, 5, [model.REFERENCE, spoilt(change)])
    assert not point.ok
    assert set(point.timing.rounds) == {"reference"}
    assert "maximum error" in point.outcomes[1].verdict.reason


def test_what_stands_at_padding_is_not_judged():
    def change(out):
        out = out.clone()
        out[0, -6:] = 1e9  # the first text has 4 of its 10 tokens
        return out

    assert point_at(BATCH, 5, [model.REFERENCE, spoilt(change)]).ok


def test_points_share_weights_and_models_and_a_new_image_size_has_its_table():
    setups = scaling.Setups()
    first = setups(BATCH.case(1), CPU)
    reference, ours = first.reference(torch.float32), first.optimized()
    second = setups(BATCH.case(5), CPU)
    assert second.reference(torch.float32) is reference
    assert second.optimized() is ours
    assert second.inputs.visual_tokens.shape == (5, 3, 32, 32)
    third = setups(IMAGE.case(96), CPU)
    assert third.config.img_size == 96
    table = third.weights.pop("encoder.embed_positions.A.weight")
    assert table.shape == (6 * 6 + 1 + 2, 64)
    assert all(weight is first.weights[name] for name, weight in third.weights.items())
    assert third._references == {}
    assert third._optimized is None


# ---- what is left out ----


def test_a_slow_reference_is_checked_and_not_timed():
    calls = []

    def build(setup):
        run = model.REFERENCE.build(setup)
        return lambda: calls.append(1) or run()

    reference = replace(model.REFERENCE, build=build)
    second = scaling.LONGEST * 1e9
    earlier = [timed(1, 10**6, reference=1.0), timed(2, 10**7, **{"reference": second, scaling.OURS.name: 9 * second})]
    point = point_at(BATCH, 5, [reference, scaling.OURS], earlier)
    assert point.flops > 10**7
    assert set(point.timing.rounds) == {scaling.OURS.name}
    assert len(calls) == 1
    assert point.ok
    assert point.outcomes[0].verdict.ok
    assert point.untimed == {"reference": f"a forward would take about {3 * point.flops / 1e7:.0f} s"}
    # as fast as before, it is timed
    quick = [replace(earlier[1], timing=Timing({"reference": [1e3] * 6}))]
    assert "reference" in point_at(BATCH, 5, [reference, scaling.OURS], quick).timing.rounds


def test_a_point_that_does_not_fit_is_skipped_with_the_figure(monkeypatch):
    monkeypatch.setattr(model, "free_memory", lambda device: 2**30)
    monkeypatch.setattr(scaling.Setup, "truth", lambda setup: pytest.fail("work was done"))
    big = replace(IMAGE, case=lambda size: ModelCase("big", "base", 10**4, size, None))
    point = point_at(big, 96)
    assert re.fullmatch(r".* \d+\.\d GiB, 1\.0 GiB are free", point.skipped)
    assert point.ok
    kept = scaling.document([(big, [point])], torch.float32, ROOFS, {}, {}, complete=True)
    (row,) = kept["curves"][0]["points"]
    assert (row["providers"], row["skipped"]) == ([], point.skipped)
    shown = io.StringIO()
    Console(width=200, file=shown).print(scaling.table(big, [point], torch.float32, ROOFS))
    assert f"skipped: {point.skipped}" in shown.getvalue()


# ---- the command ----


def test_command_prints_and_keeps_everything(tmp_path, capsys):
    target = tmp_path / "out.json"
    assert command.run(command.scaling, quick=True, rounds=6, device="cpu", json_file=target)
    printed = capsys.readouterr().out
    assert "batch: toy, images with captions, float32" in printed
    assert "time grows as FLOPs to the power of: reference " in printed
    kept = json.loads(target.read_text())
    assert (kept["schema"], kept["kind"], kept["complete"]) == (1, "scaling", True)
    assert kept["settings"] == {"device": "cpu", "rounds": 6}
    assert kept["roofs"]["matrix_gflop_s"] == {"float32": 2000, "bfloat16": 4000}
    assert [curve["name"] for curve in kept["curves"]] == ["image", "batch", "text"]
    for curve in kept["curves"]:
        assert set(curve) == {"name", "title", "axis", "dtype", "exponents", "points"}
        assert curve["dtype"] == "float32"
        assert set(curve["exponents"]) == {"reference", "beit3_fast, optimized"}
        for point in curve["points"]:
            assert set(point) == {"x", "flops", "tokens", "skipped", "providers"}
            for provider in point["providers"]:
                assert set(provider) == {
                    "name", "missing", "failure", "parity", "reason", "time_ms", "gflop_s", "roof"
                }  # fmt: skip
                time = provider["time_ms"]
                assert 0 < time["low"] <= time["median"] <= time["high"]
                assert provider["gflop_s"] == pytest.approx(point["flops"] / time["median"] / 1e6)
                assert provider["roof"] == pytest.approx(provider["gflop_s"] / 2000)
    assert [point["x"] for point in kept["curves"][0]["points"]] == [32, 48]


def test_command_takes_curve_provider_and_dtype(tmp_path, capsys):
    target = tmp_path / "out.json"
    options = {"curves": ["text"], "providers": ["beit3_fast"], "dtype": "bfloat16"}
    assert command.run(command.scaling, **options, rounds=6, device="cpu", json_file=target)
    (curve,) = json.loads(target.read_text())["curves"]
    assert (curve["name"], curve["dtype"]) == ("text", "bfloat16")
    names = [provider["name"] for provider in curve["points"][0]["providers"]]
    assert names == ["reference", "beit3_fast", "beit3_fast, optimized"]
    assert curve["points"][0]["providers"][0]["roof"] == pytest.approx(
        curve["points"][0]["providers"][0]["gflop_s"] / 4000
    )


def test_command_fails_for_a_wrong_result(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scaling, "OURS", spoilt(torch.zeros_like))
    target = tmp_path / "out.json"
    assert not command.run(command.scaling, curves=["text"], quick=True, rounds=6, device="cpu", json_file=target)
    assert "FAILED: maximum error" in capsys.readouterr().out
    (curve,) = json.loads(target.read_text())["curves"]
    broken = curve["points"][0]["providers"][1]
    assert (broken["parity"], broken["time_ms"], broken["gflop_s"]) == ("failed", None, None)
    assert "maximum error" in broken["reason"]
    assert curve["exponents"]["beit3_fast, optimized"] is None


def test_an_interrupted_run_keeps_what_it_had(tmp_path, monkeypatch):
    run_point = scaling.run_point

    def interrupted(curve, x, *arguments, **options):
        if curve is BATCH and x == 3:
            raise KeyboardInterrupt
        return run_point(curve, x, *arguments, **options)

    monkeypatch.setattr(scaling, "run_point", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command.run(command.scaling, curves=["batch"], rounds=6, device="cpu", json_file=tmp_path / "out.json")
    kept = json.loads((tmp_path / "out.json").read_text())
    assert kept["complete"] is False
    assert [point["x"] for point in kept["curves"][0]["points"]] == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curves": ["bacth"]}, "curve 'bacth' is unknown; did you mean batch"),
        ({"providers": ["openvin"]}, "provider 'openvin' is unknown; did you mean openvino"),
        ({"dtype": "float16"}, "dtype must be float32 or bfloat16, got 'float16'"),
        ({"rounds": 5}, "rounds must be at least 6"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_options_stop_before_any_work(options, message, monkeypatch):
    monkeypatch.setattr(model, "run_case", lambda *arguments, **options: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=message):
        command.run(command.scaling, **{"device": "cpu", **options})


class TestCurves:
    @pytest.fixture
    def curves(self, monkeypatch):
        monkeypatch.undo()
        return {curve.name: curve for curve in scaling.CURVES}

    def test_they_span_what_they_should(self, curves):
        ends = {name: (curve.values[0], curve.values[-1]) for name, curve in curves.items()}
        assert ends == {"image": (224, 768), "batch": (1, 64), "text": (8, 512)}
        for curve in curves.values():
            assert curve.values == tuple(sorted(set(curve.values)))
            assert len(curve.quick) >= 2
            assert max(curve.quick) <= curve.values[-1]

    def test_every_case_has_its_tables(self, curves):
        for curve in curves.values():
            for x in (*curve.values, *curve.quick):
                case = curve.case(x)
                config = model._config(case)
                assert case.task == "forward"
                assert config.img_size == (case.image_size or 224)
                assert (case.text_tokens or 0) + 2 <= config.max_source_positions
