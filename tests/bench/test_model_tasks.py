"""``bench model``'s other tasks, a training step and captioning: right and wrong ones on a backbone of toy width."""

from __future__ import annotations

from dataclasses import replace

import beit3_fast.bench.captioning as captioning
import beit3_fast.bench.command as command
import beit3_fast.bench.model as model
import beit3_fast.bench.model_tasks as model_tasks
import beit3_fast.bench.training as training
import pytest
import torch
from beit3_fast.bench import public_captions
from beit3_fast.bench.cases import ModelCase
from beit3_fast.bench.report import document, table
from beit3_fast.bench.roofs import Roofs
from oracles import public
from rich.console import Console

from beit3_fast.models import BEiT3, EncoderConfig

CPU = torch.device("cpu")
CONFIG = EncoderConfig(
    encoder_embed_dim=64,
    encoder_attention_heads=4,
    encoder_ffn_embed_dim=128,
    encoder_layers=2,
    vocab_size=200,
    img_size=32,
)
STEP = ModelCase("toy-training", "base", 3, 32, 10, (4, 10, 7), task="training")
CAPTIONS = ModelCase("toy-captioning", "base", 2, 32, None, task="captioning")
ROOFS = Roofs(1e9, {torch.float32: 1e12, torch.bfloat16: 1e12})


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(model, "_config", lambda case: CONFIG)


def outcome(result, name):
    return next(outcome for outcome in result.outcomes if outcome.provider == name)


# ---- training ----

OWN = ["reference", "beit3_fast", "beit3_fast, fused AdamW"]
EVERYBODY = [*OWN, "reference, SDPA", "public", "public, fused AdamW"]


def step(*taking_part):
    return model.run_case(STEP, [*training.OWN, *taking_part], device=CPU, rounds=6, make_setup=training.Setup)


def test_a_step_of_everybody_is_right():
    result = step(*training.PEERS)
    assert [o.provider for o in result.outcomes] == EVERYBODY
    assert [o.verdict.reason for o in result.outcomes] == [""] * len(EVERYBODY)
    assert 1e-7 < outcome(result, "beit3_fast").error.maximum < 2e-5
    assert set(result.timing.rounds) == set(EVERYBODY)


def test_a_step_moves_the_weights_and_starts_from_no_gradient():
    setup = training.Setup(STEP, CPU)
    seen = []

    def make(config):
        seen.append(BEiT3(config))
        return seen[-1]

    run = training._step(setup, make)
    before = {name: p.detach().clone() for name, p in seen[-1].named_parameters()}
    first = {name: g.clone() for name, g in run()().items()}
    moved = [name for name, p in seen[-1].named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) > 20
    second = run()()
    scale = max(gradient.abs().max() for gradient in first.values())
    # weights a millionth away: the same gradients, not twice as large
    assert all((second[name] - first[name]).abs().max() < 0.05 * scale for name in first)


def test_padding_has_no_gradient():
    setup = training.Setup(STEP, CPU)
    assert setup.gradient.shape == (3, 15, 64)
    assert setup.gradient[0, 5 + 4 :].eq(0).all()
    assert setup.gradient[0, : 5 + 4].ne(0).all()
    assert setup.gradient[1].ne(0).all()


def spoilt(change):
    """Ours with changed gradients."""

    def build(setup):
        run = training._step(setup, BEiT3)

        def step():
            gradients = run()
            return lambda: change(gradients())

        return step

    return model.Provider("wrong", build)


def scaled(gradients):
    name = "encoder.layers.1.ffn.B.fc1.bias"
    return {**gradients, name: gradients[name] * 1.001}


def swapped(gradients):
    one, other = "encoder.layers.0.ffn.A.fc1.weight", "encoder.layers.0.ffn.B.fc1.weight"
    return {**gradients, one: gradients[other], other: gradients[one]}


def not_finite(gradients):
    name = "encoder.layers.0.self_attn.q_proj.A.bias"
    return {**gradients, name: gradients[name] / 0}


@pytest.mark.parametrize("change", [scaled, swapped, not_finite])
def test_a_wrong_gradient_gets_no_time(change):
    result = step(spoilt(change))
    assert not outcome(result, "wrong").ok
    assert "error" in outcome(result, "wrong").verdict.reason
    assert not result.ok
    assert set(result.timing.rounds) == set(OWN)


def test_a_gradient_left_out_is_seen():
    result = step(spoilt(lambda gradients: dict(list(gradients.items())[1:])))
    assert "gradients must be those of" in outcome(result, "wrong").failure


def test_memory_of_a_step_is_shown_and_kept(monkeypatch):
    figures = {
        "reference": training.Memory(peak=5_000_000_000, held=3_000_000_000),
        "beit3_fast": training.Memory(peak=4_000_000_000, held=3_000_000_000),
        "beit3_fast, fused AdamW": training.Memory(peak=4_000_000_000, held=3_000_000_000),
    }
    monkeypatch.setattr(training, "memory", lambda case, config, name: figures[name])
    result = model_tasks.run(STEP, device=CPU, rounds=6)
    assert result.memory == figures
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table(result, ROOFS))
    printed = capture.get()
    assert "5.00 GB" in printed
    assert f"beyond them {result.ours} takes 0.50x of reference's" in printed
    kept = {p["name"]: p["memory"] for p in document([result], ROOFS, {}, {}, complete=True)["results"][0]["providers"]}
    assert kept["beit3_fast"] == {"peak": 4_000_000_000, "held": 3_000_000_000}


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    wide = replace(STEP, batch=16, text_tokens=100, text_lengths=None)
    config = EncoderConfig(**{**vars(CONFIG), "vocab_size": 30_000})
    torch.set_num_threads(1)
    measured = training.memory(wide, config, "reference")
    weights = sum(t.nbytes for t in training.Setup(wide, CPU, config).weights.values())
    assert measured.held == 4 * weights
    # all of that, the activations (some 40 tensors a layer of batch x tokens x width), and not the whole machine
    assert measured.held < measured.peak < measured.held + 300e6


def test_without_a_figure_for_memory_the_times_stand(monkeypatch):
    monkeypatch.setattr(training, "memory", lambda case, config, name: None)
    result = model_tasks.run(STEP, device=CPU, rounds=6)
    assert result.timing is not None
    Console(width=160, quiet=True).print(table(result, ROOFS))


# ---- captioning ----


@pytest.fixture(scope="module")
def captions():
    before = model._config
    model._config = lambda case: CONFIG
    try:
        return model_tasks.run(CAPTIONS, device=CPU, rounds=6)
    finally:
        model._config = before


def test_everybody_finds_the_public_captions(captions):
    assert [o.provider for o in captions.outcomes] == ["public loop", "beit3_fast", "beit3_fast, optimized"]
    assert [o.verdict.reason for o in captions.outcomes] == ["", "", ""]
    assert captions.ok
    assert captions.baseline == captions.best_other == "public loop"
    assert set(captions.timing.rounds) == {"public loop", "beit3_fast", "beit3_fast, optimized"}
    kept = document([captions], ROOFS, {}, {}, complete=True)["results"][0]
    assert kept["flops"] is None
    ours = next(p for p in kept["providers"] if p["name"] == kept["ours"])
    assert ours["speedup"]["median"] == next(p for p in kept["providers"] if p["peer"])["ours_faster"]["median"]


def test_captions_run_to_the_limit():
    truth = captioning.Setup(CAPTIONS, CPU).truth()
    assert [len(words) for words in truth.tokens] == [17, 17]  # of 20: BOS, the placeholder, and a last word scored


def test_another_word_gets_no_time():
    def build(setup):
        run = model_tasks.tasks()["captioning"].own[1].build(setup)

        def changed():
            found = run()
            return replace(found, tokens=[found.tokens[0], [*found.tokens[1][:-1], 5]])

        return changed

    wrong = model.Provider("wrong", build, judged_by="wrong")
    result = model.run_case(CAPTIONS, [wrong], device=CPU, rounds=6, make_setup=captioning.Setup)
    assert "words of caption 1" in result.outcomes[0].verdict.reason
    assert result.timing is None
    assert not result.ok


@pytest.mark.parametrize("eos_bias", [-1e4, 6.0, 9.0], ids=["never", "sometimes", "early"])
def test_the_loop_is_the_public_one(eos_bias):
    """Word for word and score for score the unmodified ``CaptioningHandler.eval_batch``."""
    captioner = public.public_model("captioning", seed=1, vocab_size=200)
    with torch.no_grad():
        captioner.mlm_head.weight.mul_(3)
        captioner.mlm_head.bias[public.EOS] += eos_bias
    image = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tokens, scores = public.generate(captioner, image, num_beams=3, max_length=12, vocab_size=200, mask_token_id=199)
    found = public_captions.generate(captioner, image, num_beams=3, max_length=12, mask_token=199)
    assert [[word for word in words if word != public.UNK] for words in found.tokens] == tokens
    assert found.scores == pytest.approx(scores, rel=1e-6)


def test_without_the_public_model_captioning_is_skipped(monkeypatch, capsys):
    monkeypatch.setattr(captioning, "find_spec", lambda name: None)
    monkeypatch.setattr(command, "select", lambda names, **options: [CAPTIONS])
    monkeypatch.setattr(command, "measure_roofs", lambda device, dtypes: ROOFS)
    assert command.run(command.model, device="cpu", rounds=6)
    assert "skipped: beit3-gml is not installed" in capsys.readouterr().out
