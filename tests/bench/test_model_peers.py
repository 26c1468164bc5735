"""Peers of ``bench model``: who takes part, who is missing and why, and that a peer's mistake is no number."""

from __future__ import annotations

import json
import pickle
import subprocess
import types

import beit3_fast.bench.command as command
import beit3_fast.bench.model as model
import beit3_fast.bench.model_peers as model_peers
import beit3_fast.bench.model_tasks as model_tasks
import pytest
import torch
from beit3_fast.bench.cases import MODEL_CASES, ModelCase, flops, select
from beit3_fast.bench.model import Provider
from beit3_fast.bench.roofs import Roofs

from beit3_fast.models import EncoderConfig

CPU = torch.device("cpu")
CASE = ModelCase("toy", "base", 3, 32, 10, (4, 10, 7))
BFLOAT16 = ModelCase("toy-bfloat16", "base", 3, 32, 10, (4, 10, 7), torch.bfloat16)
IMAGES = ModelCase("toy-images", "base", 3, 32, None)
CONFIG = EncoderConfig(
    encoder_embed_dim=64,
    encoder_attention_heads=4,
    encoder_ffn_embed_dim=128,
    encoder_layers=2,
    vocab_size=100,
    img_size=32,
)
ENGINES = ("openvino", "onnxruntime", "zentorch")
PEERS = {peer.name: peer for peer in model_peers.PEERS}


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(model, "_config", lambda case: CONFIG)
    monkeypatch.setattr(command, "measure_roofs", lambda device, dtypes: Roofs(1, dict.fromkeys(dtypes, 1e12)))
    model_peers._trial.cache_clear()
    yield
    model_peers._trial.cache_clear()


def run(case, *taking_part):
    return model.run_case(case, [model.REFERENCE, *taking_part, model.OURS], device=CPU, rounds=6)


def outcome(result, name):
    return next(outcome for outcome in result.outcomes if outcome.provider == name)


def test_the_public_code_is_right_in_both_dtypes():
    pytest.importorskip("torchscale")
    single = run(CASE, PEERS["public"], PEERS["public, autocast"])
    assert outcome(single, "public").ok
    # the reference repeats its tensor operations
    assert outcome(single, "public").errors == outcome(single, "reference").errors
    assert "float32" in outcome(single, "public, autocast").missing
    assert single.best_other in ("public", "reference")
    half = run(BFLOAT16, PEERS["public"], PEERS["public, autocast"])
    assert outcome(half, "public").ok
    assert outcome(half, "public, autocast").ok
    assert half.best_other in ("public", "public, autocast", "reference")


def test_timm_has_the_image_tower():
    pytest.importorskip("timm")
    result = run(IMAGES, PEERS["timm"], model.INT8)
    assert outcome(result, "timm").ok
    assert outcome(result, "timm").error.maximum < 1e-5
    assert 1e-3 < outcome(result, "beit3_fast, int8").error.rms < 5e-2
    assert outcome(run(CASE, PEERS["timm"]), "timm").missing == "has the image tower alone"
    assert PEERS["tensorrt"].missing(CASE, CPU) == "is for a GPU alone"


def test_an_engine_gets_the_padded_form_and_its_answer_is_judged():
    def build(setup):
        module, tensors = model_peers._positional(setup, torch.float32)
        assert [tuple(tensor.shape) for tensor in tensors] == [(3, 10), (3, 3, 32, 32), (3, 10)]
        return lambda: module(*tensors)

    result = run(CASE, Provider("engine", build, peer=True))
    assert outcome(result, "engine").errors == outcome(result, "reference").errors
    assert "engine" in result.timing.rounds


def test_a_wrong_peer_gets_no_number_and_does_not_fail_the_run():
    def build(setup):
        right = model.OURS.build(setup)
        return lambda: right().roll(1, dims=1)

    result = run(CASE, Provider("fast and wrong", build, peer=True))
    wrong = outcome(result, "fast and wrong")
    assert not wrong.ok
    assert "maximum error" in wrong.verdict.reason
    assert set(result.timing.rounds) == {"reference", "beit3_fast"}
    assert result.best_other == "reference"
    assert result.ok


def test_ours_wrong_fails_the_run():
    def build(setup):
        right = model.OURS.build(setup)
        return lambda: right().roll(1, dims=1)

    wrong = Provider("beit3_fast, optimized", build)
    result = model.run_case(CASE, [model.REFERENCE, model.OURS, wrong], device=CPU, rounds=6)
    assert not result.ok
    assert result.ours == "beit3_fast"


def test_a_peer_that_raises_while_it_is_timed_is_left_out_and_the_others_are_timed():
    calls = []

    def build(setup):
        right = model.OURS.build(setup)

        def call():
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("out of handles")
            return right()

        return call

    result = run(CASE, Provider("fragile", build, peer=True))
    assert outcome(result, "fragile").failure == "RuntimeError: out of handles"
    assert {name: len(times) for name, times in result.timing.rounds.items()} == {"reference": 6, "beit3_fast": 6}
    assert result.ok


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_is_not_installed_is_missing_with_the_reason(name, monkeypatch):
    monkeypatch.setattr(model_peers, "find_spec", lambda package: None)
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **options: pytest.fail("nothing to try"))
    reason = PEERS[name].missing(CASE, CPU)
    assert reason == f"{name} is not installed (pip install 'beit3_fast[peers]')"
    assert PEERS[name].missing(CASE, torch.device("cuda")) == "is measured on a CPU alone"
    assert outcome(run(CASE, PEERS[name]), name).missing == reason


def test_onnxruntime_has_no_bfloat16():
    assert PEERS["onnxruntime"].missing(BFLOAT16, CPU) == "has no bfloat16 on a CPU"


@pytest.mark.parametrize(
    ("returncode", "stderr", "reason"),
    [
        (0, "", None),
        (-8, "", "cannot run in a process of its own: died with SIGFPE"),
        (-11, "Segmentation fault", "cannot run in a process of its own: died with SIGSEGV"),
        (
            1,
            "Traceback\nImportError: built for torch 2.9\n",
            "cannot run in a process of its own: ImportError: built for torch 2.9",
        ),
        (1, "", "cannot run in a process of its own: ended with exit code 1"),
    ],
)
def test_an_engine_is_tried_in_a_process_of_its_own_once(returncode, stderr, reason, monkeypatch):
    started = []

    def process(command, **options):
        started.append((command[1:], pickle.loads(options["input"])[:2]))
        return types.SimpleNamespace(returncode=returncode, stdout=b"", stderr=stderr.encode())

    monkeypatch.setattr(model_peers, "find_spec", lambda package: object())
    monkeypatch.setattr(subprocess, "run", process)
    for _ in range(2):
        assert PEERS["zentorch"].missing(BFLOAT16, CPU) == reason
    assert started == [(["-m", "beit3_fast.bench.model_peers", "zentorch"], (BFLOAT16, CONFIG))]


def test_an_engine_that_hangs_is_missing(monkeypatch):
    def process(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(model_peers, "find_spec", lambda package: object())
    monkeypatch.setattr(subprocess, "run", process)
    assert PEERS["openvino"].missing(CASE, CPU) == "cannot run in a process of its own: did not finish in 600 s"


def test_the_trial_builds_and_runs_the_engine(monkeypatch):
    seen = []

    def build(setup):
        seen.append(setup.case.dtype)
        return lambda: torch.full((3, 11, 64), torch.nan)

    monkeypatch.setattr(model_peers, "PEERS", (Provider("engine", build, peer=True),))
    with pytest.raises(ValueError, match="not finite"):
        model_peers.try_out("engine", BFLOAT16, CONFIG)
    assert seen == [torch.bfloat16]


@pytest.mark.slow
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("case", [CASE, BFLOAT16], ids=lambda case: case.name)
def test_the_real_engine_where_it_is_installed(name, case):
    missing = PEERS[name].missing(case, CPU)
    if missing is not None:
        pytest.skip(missing)
    assert outcome(run(case, PEERS[name]), name).ok


class TestSelection:
    def names(self, task="forward", *arguments, **options):
        return [p.name for p in model_tasks.take_part(model_tasks.tasks()[task], *arguments, **options)]

    def test_without_peers(self):
        own = ["reference", "reference, autocast", "beit3_fast", "beit3_fast, optimized"]
        assert self.names() == own
        assert self.names(compiled=True) == [*own, "reference, SDPA, compiled"]
        assert self.names("training") == ["reference", "beit3_fast", "beit3_fast, fused AdamW"]
        assert self.names("captioning") == ["public loop", "beit3_fast", "beit3_fast, optimized"]

    def test_peers(self):
        sdpa = ["reference, SDPA", "reference, SDPA, compiled"]
        peers = ["beit3_fast, int8", *sdpa, "public", "public, autocast", "timm", *ENGINES, "tensorrt"]
        assert self.names(peers=True) == [*self.names(), *peers]
        assert self.names("training", peers=True) == [*self.names("training"), sdpa[0], "public", "public, fused AdamW"]

    def test_named_ones_come_with_the_reference_and_ours(self):
        ours = ["reference", "beit3_fast", "beit3_fast, optimized"]
        assert self.names("forward", ["openvino", "public"]) == [*ours, "public", "openvino"]
        assert self.names("training", ["openvino"]) == self.names("training")
        assert self.names("training", ["public"]) == [*self.names("training"), "public"]
        assert self.names("captioning", ["openvino"]) == ["public loop", *ours[1:]]

    def test_unknown(self):
        with pytest.raises(ValueError, match="provider 'openvinno' is unknown; did you mean openvino"):
            model_tasks.check_providers(["openvinno"])
        with pytest.raises(ValueError, match="provider 'tensorflow' is unknown"):
            command.run(command.model, device="cpu", providers=["tensorflow"])
        model_tasks.check_providers([*PEERS, "public loop", "reference, SDPA, compiled"])


def test_the_command_lists_whoever_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "select", lambda names, **options: [CASE])
    monkeypatch.setattr(model_peers, "find_spec", lambda package: None)
    target = tmp_path / "out.json"
    assert command.run(command.model, rounds=6, device="cpu", json_file=target, providers=["public", *ENGINES])
    printed = capsys.readouterr().out
    kept = {p["name"]: p for p in json.loads(target.read_text())["results"][0]["providers"]}
    for name in ("public", *ENGINES):
        assert kept[name]["missing"].startswith(("torchscale" if name == "public" else name) + " is not installed")
        assert (kept[name]["peer"], kept[name]["time_ms"], kept[name]["parity"]) == (True, None, None)
        assert f"{name} " in printed
    assert printed.count(" not run: ") == 4
    assert "did not run" not in printed


class TestFlops:
    """Against PyTorch's own count of the reference's products, where nothing is padded."""

    @pytest.mark.parametrize(
        "case",
        [
            ModelCase("joint", "base", 2, 32, 10),
            ModelCase("image", "base", 2, 32, None),
            ModelCase("text", "base", 2, None, 10),
        ],
        ids=lambda case: case.name,
    )
    def test_dense(self, case):
        from torch.utils.flop_counter import FlopCounterMode

        setup = model.Setup(case, CPU)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            setup.inputs.call(setup.reference(torch.float32))
        assert flops(case, CONFIG) == counter.get_total_flops()

    def test_padding_does_not_count(self):
        padded = ModelCase("text", "base", 2, None, 10, (4, 4))
        assert flops(padded, CONFIG) == flops(ModelCase("text", "base", 2, None, 4), CONFIG)

    def test_a_step_is_three_forwards_and_captioning_is_not_counted(self):
        step = ModelCase("step", "base", 2, 32, 10, task="training")
        assert flops(step, CONFIG) == 3 * flops(ModelCase("forward", "base", 2, 32, 10), CONFIG)
        assert flops(ModelCase("captions", "base", 2, 32, None, task="captioning"), CONFIG) is None


def test_every_row_of_the_targets_is_a_case():
    cases = {case.name: case for case in MODEL_CASES}
    for suffix in ("", "-bfloat16"):
        assert (cases["base-joint-dense" + suffix].batch, cases["base-joint" + suffix].batch) == (8, 8)
        assert cases["base-joint-dense-1" + suffix].batch == 1
        assert cases["base-image-16" + suffix].batch == cases["base-text-16" + suffix].batch == 16
    assert (cases["base-captioning-480"].image_size, cases["base-captioning-480"].task) == (480, "captioning")
    assert (cases["base-training"].batch, cases["base-training"].task) == (4, "training")
    assert all(case.task == "forward" for case in select([], quick=True))
