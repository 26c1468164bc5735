"""The demo on models of toy width: the real command, the public code as the oracle, and the picture looked over."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from beit3_fast.bench import parity
from beit3_fast.bench.machine import machine
from beit3_fast.bench.picture import compose
from beit3_fast.bench.timing import Timing
from click.testing import CliRunner
from oracles import public as oracle
from PIL import Image

import beit3_fast.demo as demo
from beit3_fast.checkpoint import save_checkpoint
from beit3_fast.cli import main
from beit3_fast.models import BEiT3ForRetrieval, EncoderConfig, create_model
from beit3_fast.processing import Processor, Tokenizer, demo_pairs, demo_tokenizer_path

SIZES = {"encoder_embed_dim": 64, "encoder_attention_heads": 1, "encoder_ffn_embed_dim": 96, "encoder_layers": 2}
TOY = {**SIZES, "img_size": 32, "vocab_size": 64010}


def toy_model(seed=0):
    """Random everywhere, so that the scores differ."""
    generator = torch.Generator().manual_seed(seed)
    model = BEiT3ForRetrieval(EncoderConfig(**TOY))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.logit_scale.fill_(3.0)
    return model.eval()


@pytest.fixture
def toy(monkeypatch):
    model = toy_model()
    monkeypatch.setattr(demo, "build", lambda checkpoint, name, seed: model)
    return model


@pytest.fixture
def command(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        result = CliRunner().invoke(main, ["demo", "--rounds", "6", *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


def public_scores(weights, images, texts, dtype=torch.float32):
    """Cosines (texts, images) of the public model on what our processor gives it."""
    model = oracle.modeling.BEiT3ForRetrieval(
        oracle.EncoderConfig(**TOY, multiway=True, normalize_output=True, no_output_layer=True)
    )
    model.load_state_dict(weights, strict=True)
    batch = Processor(Tokenizer(demo_tokenizer_path()), image_size=32)(images=images, texts=texts)
    with torch.inference_mode():
        vision, language = model.eval().to(dtype)(
            batch.image.to(dtype), batch.text_ids, batch.padding_mask, only_infer=True
        )
    return language.float() @ vision.float().T


def test_default_run(toy, command, tmp_path):
    result = command("--json", "demo.json")
    assert result.exit_code == 0, result.output
    assert "RANDOM WEIGHTS" in result.output
    assert "mean nothing" in result.output
    assert "Parity with reference PyTorch: passed, within 2e-05" in result.output
    for part in ("image tower", "text tower", "both"):
        assert part in result.output
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.size == (1650, 1100)
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10_000, "photos are in it"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.json", "demo.png"]

    found = json.loads((tmp_path / "demo.json").read_text())
    pairs = demo_pairs()
    assert (found["schema"], found["kind"], found["weights"]) == (1, "demo", "random, seed 0")
    assert found["texts"] == [text for _, text in pairs]
    expected = public_scores(toy.state_dict(), [Image.open(path).convert("RGB") for path, _ in pairs], found["texts"])
    assert torch.allclose(torch.tensor(found["cosine"]), expected, atol=2e-5)
    assert expected.std() > 1e-3
    assert torch.allclose(torch.tensor(found["probability"]), (expected * toy.logit_scale.exp()).softmax(0), atol=1e-3)
    assert found["parity"]["passed"] is True
    assert all(0 <= error["maximum"] < 2e-5 for error in found["parity"]["error"].values())
    assert found["times_ms"]["both"]["speedup"]["low"] > 0


def test_own_images_and_texts_with_a_checkpoint(command, tmp_path):
    model = toy_model(seed=3)
    save_checkpoint(model, tmp_path / "mine.safetensors")
    photo = Path(demo_pairs()[2][0])
    texts = ["a cup of coffee", "a horse"]
    options = ["--checkpoint", "mine.safetensors", "--tokenizer", demo_tokenizer_path(), "--output", "mine.svg"]
    result = command("--image", photo, "--text", texts[0], "--text", texts[1], "--json", "o.json", *options)
    assert result.exit_code == 0, result.output
    assert "RANDOM WEIGHTS" not in result.output
    assert (tmp_path / "mine.svg").read_text().startswith("<?xml")
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["texts"] == texts
    assert found["images"] == [photo.stem]
    expected = public_scores(model.state_dict(), [Image.open(photo).convert("RGB")], texts)
    assert torch.allclose(torch.tensor(found["cosine"]), expected, atol=2e-5)
    assert f"{expected[0, 0]:.4f}" in result.output


def test_bfloat16(toy, command, tmp_path):
    result = command("--dtype", "bfloat16", "--json", "o.json")
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["settings"]["dtype"] == "bfloat16"
    assert "twice reference PyTorch in bfloat16" in found["parity"]["summary"]
    assert all(1e-4 < error["maximum"] < 5e-2 for error in found["parity"]["error"].values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tower", [0, 1])
def test_a_wrong_model_fails_gets_no_times_and_exit_code_1(tower, dtype, toy, command, tmp_path, monkeypatch):
    right = BEiT3ForRetrieval.forward

    def wrong(self, *arguments, **options):
        vectors = list(right(self, *arguments, **options))
        if vectors[tower] is not None:
            vectors[tower] = vectors[tower].roll(1, dims=0)  # every sample gets its neighbour's vector
        return tuple(vectors)

    monkeypatch.setattr(BEiT3ForRetrieval, "forward", wrong)
    result = command("--dtype", dtype, "--json", "o.json")
    assert result.exit_code == 1
    assert "FAILED" in result.output
    assert "No times" in result.output
    found = json.loads((tmp_path / "o.json").read_text())
    assert found["parity"]["passed"] is False
    assert found["times_ms"] is None
    assert ("image tower", "text tower")[tower] in found["parity"]["summary"]
    assert (tmp_path / "demo.png").exists()


def test_what_cannot_work_is_refused_before_any_work(command, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "measure", lambda *arguments, **options: pytest.fail("work was done"))
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (tmp_path / "c.pth").touch()
    for arguments, message in (
        (["--checkpoint", "c.pth"], "--checkpoint needs --tokenizer"),
        (["--checkpoint", "c.pth", "--tokenizer", "t", "--model", "m"], "--model cannot be combined with --checkpoint"),
        (["--checkpoint", "no.pth", "--tokenizer", "t"], "--checkpoint: the file 'no.pth' does not exist"),
        (["--checkpoint", "c.pth", "--tokenizer", "no.spm"], "--tokenizer: the file 'no.spm' does not exist"),
        (["--output", "nowhere/demo.png"], "--output: the folder 'nowhere' does not exist"),
        (["--output", "/proc/demo.png"], "--output: nothing can be written"),
        (["--output", "demo.txt"], "--output must end in one of .png"),
        (["--json", "nowhere/a.json"], "--json: the folder 'nowhere' does not exist"),
        (["--image", "missing.jpg"], "--image: the file 'missing.jpg' does not exist"),
        (["--image", "broken.jpg"], "--image: 'broken.jpg' is not an image that can be read"),
        (["--text", "  "], "--text must not be empty"),
        (["--rounds", "3"], "rounds must be at least 6"),
        (["--threads", "0"], "threads must be at least 1"),
    ):
        result = command(*arguments)
        assert result.exit_code == 2, (arguments, result.output)
        assert result.stderr.startswith("beit3-fast: ")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jpg", "c.pth"]


def test_models_of_another_kind(command, tmp_path):
    result = command("--model", "beit3_base_patch16_224_retreival")
    assert result.exit_code == 2
    assert "did you mean beit3_base_patch16_224_retrieval" in result.stderr
    save_checkpoint(create_model("beit3_base_patch16_224_captioning", **TOY), tmp_path / "captions.pth")
    result = command("--checkpoint", "captions.pth", "--tokenizer", demo_tokenizer_path())
    assert result.exit_code == 2
    assert "--checkpoint 'captions.pth' must be a retrieval model, got BEiT3ForCaptioning" in result.stderr


def test_weights_are_random_but_seeded(monkeypatch):
    monkeypatch.setattr("beit3_fast.models.create_model", lambda name: BEiT3ForRetrieval(EncoderConfig(**TOY)))
    state = torch.get_rng_state()
    first, again, other = (demo.build(None, demo.DEFAULT_MODEL, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state), "the caller's random numbers are left alone"
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["vision_head.weight"], other["vision_head.weight"])


def test_without_matplotlib(command, monkeypatch):
    find_spec = demo.importlib.util.find_spec
    monkeypatch.setattr(
        demo.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name)
    )
    monkeypatch.setitem(sys.modules, "beit3_fast.bench.picture", None)
    result = command()
    assert result.exit_code == 2
    assert "matplotlib, which is not installed: pip install 'beit3_fast[bench]'" in result.stderr


def make_result(images=6, texts=6, *, trained=False, ok=True, scale=1.0, words=0, dtype="float32"):
    """A result as a run would give it, without the run."""
    generator = torch.Generator().manual_seed(0)
    pairs = [pair for pair, _ in zip(itertools.cycle(demo_pairs()), range(max(images, texts)))]
    cosine = torch.randn(texts, images, generator=generator) * 0.1

    def times(milliseconds):
        return [milliseconds * scale * 1e6 * (1 + 0.02 * i) for i in range(8)]

    timing = Timing(
        {
            "reference, image tower": times(2000),
            "beit3_fast, image tower": times(1500),
            "reference, text tower": times(600),
            "beit3_fast, text tower": times(130),
        }
    )
    error = parity.Error(maximum=8e-7, rms=2e-7, absolute=9e-8)
    return demo.Result(
        pairing=demo.Pairing(
            images=[Image.open(path).convert("RGB") for path, _ in pairs[:images]],
            names=[Path(path).stem for path, _ in pairs[:images]],
            texts=[text + " and for $5 or $6 a good deal more" * words for _, text in pairs[:texts]],
            captioned=images == texts,
        ),
        model="beit3_large_patch16_384_coco_retrieval.pth (384 x 384)" if trained else demo.DEFAULT_MODEL,
        parameters=222_000_000,
        weights="beit3_large_patch16_384_coco_retrieval.pth" if trained else "random, seed 0",
        trained=trained,
        dtype=dtype,
        valid_tokens=13.2,
        padded_tokens=64,
        cosine=cosine,
        probability=(cosine * 14).softmax(0),
        parity=demo.Parity(
            {"image tower": error, "text tower": error},
            ok,
            "within 2e-05 of the output's size" if ok else "image tower: 3.1e-01 > 2e-05; text tower: 2.2e-01 > 2e-05",
        ),
        timing=demo._with_sums(timing) if ok else None,
        machine={**machine(torch.device("cpu")), "cpu": "AMD EPYC 9V74 80-Core Processor (virtual)", "threads": 128},
        settings={"device": "cpu", "rounds": 8},
    )


RESULTS = {
    "default": {},
    "trained": {"trained": True},
    "failed": {"ok": False},
    "one image": {"images": 1, "texts": 3},
    "one text": {"images": 3, "texts": 1, "trained": True},
    "many": {"images": 14, "texts": 13, "words": 3},
    "nine": {"images": 9, "texts": 9, "trained": True, "words": 2},
    "long captions": {"words": 5, "dtype": "bfloat16"},
    "fast": {"scale": 1e-3},
    "slow": {"scale": 50},
}


@pytest.mark.parametrize("name", RESULTS)
def test_no_text_of_the_picture_overlaps_another_or_leaves_it(name):
    figure = compose(make_result(**RESULTS[name]))
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    page = figure.bbox
    boxes = []
    for text in figure.findobj(lambda artist: hasattr(artist, "get_text") and hasattr(artist, "get_window_extent")):
        if text.get_visible() and text.get_text().strip():
            box = text.get_window_extent(renderer)
            assert page.x0 <= box.x0, f"{text.get_text()!r} leaves the page at the left"
            assert page.x1 >= box.x1, f"{text.get_text()!r} leaves the page at the right"
            assert page.y0 <= box.y0, f"{text.get_text()!r} leaves the page below"
            assert page.y1 >= box.y1, f"{text.get_text()!r} leaves the page above"
            boxes.append((text.get_text(), box.padded(-1)))
    assert len(boxes) > 25
    for (one, first), (other, second) in itertools.combinations(boxes, 2):
        assert not first.overlaps(second), f"{one!r} and {other!r} overlap"


def test_the_picture_says_when_weights_are_random_and_when_parity_failed():
    def words(result):
        return " ".join(t.get_text() for t in compose(result).findobj(lambda artist: hasattr(artist, "get_text")))

    assert "RANDOM WEIGHTS (seed 0): the scores mean nothing" in words(make_result())
    assert "RANDOM" not in words(make_result(trained=True))
    failed = words(make_result(ok=False))
    assert "FAILED" in failed
    assert "a wrong result has no speed" in failed
    assert "1.33x" not in failed
    assert "1.33x" in words(make_result())


def test_both_is_the_sum_within_a_round():
    timing = make_result().timing
    image, text = timing.rounds["beit3_fast, image tower"], timing.rounds["beit3_fast, text tower"]
    assert timing.rounds["beit3_fast, both"] == [a + b for a, b in zip(image, text, strict=True)]
