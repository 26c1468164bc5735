"""Checkpoints: what a file is told to be, what is loaded from it, and that no file can do more than fail."""

from __future__ import annotations

import argparse
import builtins
import contextlib
import copy
import functools
import os
import pickle
import re
import signal
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from oracles import public
from oracles.pairs import assert_close, assert_outputs_close, shared_state
from torch import Tensor, nn

import beit3_fast
from beit3_fast import CheckpointError, EncoderConfig, checkpoint
from beit3_fast.models import BEiT3ForPretraining, encoder, registry

ALL = (*public.HEADS, "pretraining")
TINY: dict[str, Any] = {  # heads of 64, as every released model has them
    "encoder_layers": 2,
    "encoder_embed_dim": 128,
    "encoder_attention_heads": 2,
    "encoder_ffn_embed_dim": 256,
    "vocab_size": 300,
    "img_size": 64,
    "max_source_positions": 64,
}
POSITIONS = "beit3.encoder.embed_positions.A.weight"
QUERY = "beit3.encoder.layers.1.self_attn.q_proj.A.weight"
KEY_BIAS = "beit3.encoder.layers.0.self_attn.k_proj.B.bias"


def ours(head: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """Our tiny model of `head`, every parameter random, in eval mode."""
    with torch.device("meta"):
        model = registry.build("base", head, **{**TINY, **overrides})
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.randn(v.shape, generator=generator) * 0.1 for key, v in model.state_dict().items()}
    model.load_state_dict({key: v + (1 if "norm" in key else 0) for key, v in state.items()}, assign=True)
    return model.eval()


def theirs(head: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """The public tiny model of `head`, every parameter random, in eval mode."""
    return public.randomise(copy.deepcopy(_uninitialised(head, **overrides)), seed).eval()


@functools.cache
def _uninitialised(head: str, **overrides: Any) -> nn.Module:
    """Building the public model takes longer than most tests."""
    return public.empty_model(head, public.config(head, **{**TINY, "patch_size": 16, **overrides}))


def batch_for(head: str, image_size: int = 64, **kwargs: Any) -> dict[str, Any]:
    return public.training_batch(head, image_size=image_size, vocab_size=300, **kwargs)


def outputs(model: nn.Module, head: str, image_size: int = 64) -> dict[str, Tensor]:
    with torch.no_grad():
        if head == "pretraining":
            data = public.inputs(image_size=image_size, vocab_size=300)
            patches, words = model(data["image"], data["tokens"], data["mask"])
            return {"patches": patches, "words": words}
        return public.outputs(model, head, batch_for(head, image_size))


def assert_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert (actual[key].dtype, actual[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(actual[key], value), key


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail instead of waiting for ever."""

    def expired(*_: Any) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


# ------------------------------------------------------------------------------------------------- the forms of a file


def write_model(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"model": state}, folder / "model.pth")
    return folder / "model.pth"


def write_module(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"module": state}, folder / "module.pth")
    return folder / "module.pth"


def write_raw(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "raw.pth")
    return folder / "raw.pth"


def write_legacy(state: dict[str, Tensor], folder: Path) -> Path:
    """The format of PyTorch before 1.6: pickles one after another, no zip."""
    torch.save({"model": state}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    return folder / "legacy.pth"


def trainer_state(state: dict[str, Tensor]) -> dict[str, Any]:
    """What the public `save_model` writes: weights, AdamW's moments, the epoch, the loss scaler, the command line."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr_scale": 0.5}], betas=(0.9, 0.98))
    weight.square().sum().backward()
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))  # an unused scaler has no state
    return {
        "model": state,
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scaler": scaler.state_dict(),
        "args": argparse.Namespace(task="coco_retrieval", opt_betas=[0.9, 0.98], clip_grad=None, lr=2e-4, dist=False),
        "model_ema": {key: torch.zeros_like(value) for key, value in state.items()},
    }


def write_trainer(state: dict[str, Tensor], folder: Path) -> Path:
    """By the public code's own `save_model`."""
    stored = trainer_state(state)
    args = stored["args"]
    args.output_dir = str(folder)

    class Holds:
        def __init__(self, state: Any) -> None:
            self.state = state

        def state_dict(self) -> Any:
            return self.state

    public.utils.save_model(
        args, 3, None, Holds(state), Holds(stored["optimizer"]), Holds(stored["scaler"]), model_ema=None
    )
    return folder / "checkpoint-3.pth"


def write_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    contiguous = {key: value.detach().clone().contiguous() for key, value in state.items()}
    safetensors.torch.save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder / "model.safetensors"


Writer = Callable[[dict[str, Tensor], Path], Path]
WRITERS: tuple[Writer, ...] = (write_model, write_module, write_raw, write_legacy, write_trainer, write_safetensors)
named = {"ids": lambda value: getattr(value, "__name__", None)}


@pytest.mark.parametrize(
    ("write", "dtype"),
    [
        *((write, torch.float16) for write in WRITERS),
        (write_trainer, torch.float32),
        (write_safetensors, torch.float32),
    ],
    **named,
)
@pytest.mark.parametrize("head", public.HEADS)
def test_a_public_checkpoint_gives_the_public_outputs(
    head: str, write: Writer, dtype: torch.dtype, tmp_path: Path
) -> None:
    reference = theirs(head).to(dtype)
    path = write(dict(reference.state_dict()), tmp_path)
    reference.float()
    model = beit3_fast.load_model(path)
    assert type(model).__name__ == type(reference).__name__
    assert not model.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    assert_same_tensors(model.state_dict(), reference.state_dict())
    assert_outputs_close(outputs(model, head), outputs(reference, head), head)


@pytest.mark.parametrize(("suffix", "dtype"), [(".pth", torch.float16), (".safetensors", torch.float32)])
@pytest.mark.parametrize("head", ALL)
def test_our_checkpoint_round_trip(head: str, suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved = ours(head).to(dtype)
    path = tmp_path / f"checkpoint{suffix}"
    beit3_fast.save_checkpoint(saved, path)
    model = beit3_fast.load_model(path, dtype=dtype)
    assert type(model) is type(saved)
    assert model.beit3.config == saved.beit3.config
    assert_same_tensors(model.state_dict(), saved.state_dict())
    actual, expected = outputs(model.float(), head), outputs(saved.float(), head)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint.pth")
    beit3_fast.save_checkpoint(ours("retrieval"), path)
    assert type(beit3_fast.load_model(path)).__name__ == "BEiT3ForRetrieval"


@pytest.mark.parametrize("write", WRITERS, **named)
def test_reading_keeps_dtypes(write: Writer, tmp_path: Path) -> None:
    state = {
        "half": torch.randn(3).half(),
        "bfloat": torch.randn(2, 2).bfloat16(),
        "float": torch.randn(()),
        "double": torch.randn(2).double(),
    }
    assert_same_tensors(checkpoint.read_state_dict(write(state, tmp_path)), state)


@pytest.mark.parametrize("write", WRITERS, **named)
def test_a_loaded_model_does_not_depend_on_the_file(write: Writer, tmp_path: Path) -> None:
    """Reading may map the file into memory; the model must not."""
    path = write(dict(theirs("retrieval").state_dict()), tmp_path)
    model = beit3_fast.load_model(path)
    expected = shared_state(model)
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert_same_tensors(model.state_dict(), expected)


# ----------------------------------------------------------------------------------------------------- what a file is

CLASSES = {"imageclassification": 1000, "nlvr2": 2, "vqav2": 3129}


@pytest.mark.parametrize("name", public.FACTORIES)
def test_every_released_model_is_told_by_its_shapes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(public.modeling.BEiT3Wrapper, "_init_weights", lambda *_: None)  # there are no values to set
    with torch.device("meta"):
        state = getattr(public.modeling, name)().state_dict()
    size, image_size, head = re.fullmatch(r"beit3_(base|large)_patch16_(\d+)_(\w+)", name).groups()
    info = checkpoint.inspect(state)
    assert info.head == head
    assert info.num_classes == CLASSES.get(head)
    base = size == "base"
    assert info.config == EncoderConfig(
        encoder_embed_dim=768 if base else 1024,
        encoder_attention_heads=12 if base else 16,
        encoder_ffn_embed_dim=3072 if base else 4096,
        encoder_layers=12 if base else 24,
        normalize_output=head not in ("imageclassification", "vqav2"),
        max_source_positions=1024,
        vocab_size=64010,
        img_size=int(image_size),
        patch_size=16,
    )


@pytest.mark.parametrize("head", ALL)
@pytest.mark.parametrize("size", ["base", "large", "giant"])
def test_every_size_and_head_is_told_by_its_shapes(size: str, head: str) -> None:
    with torch.device("meta"):
        model = registry.build(size, head)
    info = checkpoint.inspect(model.state_dict())
    assert info == checkpoint.CheckpointInfo(head, model.beit3.config, CLASSES.get(head))


@pytest.mark.parametrize("head", ALL)
def test_unusual_sizes_are_told(head: str) -> None:
    sizes = {
        "encoder_layers": 11,  # two digits: not in the order of strings
        "encoder_embed_dim": 192,
        "encoder_attention_heads": 3,
        "encoder_ffn_embed_dim": 100,
        "vocab_size": 77,
        "img_size": 96,
        "patch_size": 8,
        "in_chans": 4,
        "max_source_positions": 50,
    }
    with torch.device("meta"):
        model = registry.build("base", head, **sizes)
    info = checkpoint.inspect(model.state_dict())
    assert info.head == head
    assert info.config == model.beit3.config


def test_heads_that_are_not_64_wide(tmp_path: Path) -> None:
    """Shapes cannot tell the number of attention heads: it is an argument."""
    sizes = {"encoder_embed_dim": 200, "encoder_attention_heads": 5}
    saved = ours("retrieval", **sizes)
    beit3_fast.save_checkpoint(saved, tmp_path / "wide.pth")
    model = beit3_fast.load_model(tmp_path / "wide.pth", encoder_attention_heads=5)
    assert model.beit3.config == saved.beit3.config
    assert_outputs_close(outputs(model, "retrieval"), outputs(saved, "retrieval"), "five heads of 40")


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("head", ["imageclassification", "nlvr2", "vqav2"])
def test_the_number_of_classes_is_told(head: str, num_classes: int, tmp_path: Path) -> None:
    saved = ours(head, num_classes=num_classes)
    beit3_fast.save_checkpoint(saved, tmp_path / "checkpoint.pth")
    assert_same_tensors(beit3_fast.load_model(tmp_path / "checkpoint.pth").state_dict(), saved.state_dict())


def test_a_headless_classifier_is_told(tmp_path: Path) -> None:
    """`num_classes=0` leaves the head out, in the public constructor and in ours."""
    beit3_fast.save_checkpoint(ours("imageclassification", num_classes=0), tmp_path / "features.pth")
    model = beit3_fast.load_model(tmp_path / "features.pth")
    assert isinstance(model.head, nn.Identity)


def test_the_number_of_visual_tokens_is_told(tmp_path: Path) -> None:
    saved = BEiT3ForPretraining(EncoderConfig(**TINY), num_visual_tokens=100)
    beit3_fast.save_checkpoint(saved, tmp_path / "checkpoint.pth")
    assert_same_tensors(beit3_fast.load_model(tmp_path / "checkpoint.pth").state_dict(), saved.state_dict())


PAPER = (
    {"shared_attention": True},
    {"vl_ffn_layers": 1},
    {"shared_attention": True, "vl_ffn_layers": 2},
    {"shared_attention": True, "vl_ffn_layers": 3, "encoder_layers": 3},
)


@pytest.mark.parametrize("overrides", PAPER)
@pytest.mark.parametrize(("head", "suffix"), [("retrieval", ".pth"), ("pretraining", ".safetensors")])
def test_paper_architecture_round_trip(head: str, suffix: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    saved = ours(head, **{"encoder_layers": 4, **overrides})
    beit3_fast.save_checkpoint(saved, tmp_path / f"paper{suffix}")
    model = beit3_fast.load_model(tmp_path / f"paper{suffix}")
    assert model.beit3.config == saved.beit3.config
    assert_same_tensors(model.state_dict(), saved.state_dict())
    assert_outputs_close(outputs(model, head), outputs(saved, head), head)


def tiny_state() -> dict[str, Tensor]:
    return shared_state(ours("retrieval"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beit3.text_embed.weight", None),
        ("beit3.text_embed.weight", torch.zeros(300)),
        ("beit3.text_embed.weight", torch.zeros(0, 128)),
        ("beit3.text_embed.weight", torch.zeros(300, 0)),
        ("beit3.vision_embed.proj.weight", None),
        ("beit3.vision_embed.proj.weight", torch.zeros(128, 768)),
        ("beit3.vision_embed.proj.weight", torch.zeros(128, 3, 0, 0)),
        (POSITIONS, None),
        (POSITIONS, torch.zeros(3, 128)),
        (POSITIONS, torch.zeros(2, 128)),
        (POSITIONS, torch.zeros(20, 128)),
        (POSITIONS, torch.zeros(19)),
        ("beit3.encoder.embed_positions.B.weight", torch.zeros(2, 128)),
        ("beit3.encoder.layers.0.ffn.A.fc1.weight", None),
        ("beit3.encoder.layers.first.ffn.A.fc1.weight", torch.zeros(1)),
        ("language_head.weight", None),
    ],
)
def test_shapes_of_no_beit3(key: str, value: Tensor | None, tmp_path: Path) -> None:
    state = tiny_state()
    state.pop(key, None)
    if value is not None:
        state[key] = value
    with pytest.raises(CheckpointError):
        checkpoint.inspect(state)
    with pytest.raises(CheckpointError):
        beit3_fast.load_model(write_raw(state, tmp_path))


@pytest.mark.parametrize("state", [{}, {"a": torch.zeros(2)}, nn.Linear(2, 2).state_dict()])
def test_another_model_is_refused(state: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"beit3\.text_embed\.weight"):
        checkpoint.inspect(state)


def test_a_key_cannot_make_the_model_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The depth is the number of layers that the file holds, not the largest number in a key."""
    made = []
    original = encoder.EncoderLayer.__init__

    def counted(self: nn.Module, *args: Any) -> None:
        made.append(self)
        assert len(made) < 100, "layers are being made that the file does not hold"
        original(self, *args)

    monkeypatch.setattr(encoder.EncoderLayer, "__init__", counted)
    state = {**tiny_state(), "beit3.encoder.layers.1000000.ffn.A.fc1.bias": torch.zeros(1)}
    made.clear()
    with pytest.raises(CheckpointError):
        beit3_fast.load_model(write_raw(state, tmp_path))


# ------------------------------------------------------------------------------------------------ position embeddings


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("image_size", [16, 48, 64, 80, 128])
def test_positions_are_interpolated_as_by_the_public_code(
    image_size: int, dtype: torch.dtype, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = theirs("retrieval").to(dtype)
    table = saved.state_dict()[POSITIONS]
    path = write_model(dict(saved.state_dict()), tmp_path)
    reference = theirs("retrieval", seed=1, img_size=image_size)
    public.utils.load_model_and_may_interpolate(str(path), reference, "model|module", "")
    assert ("Position interpolate" in capsys.readouterr().out) == (image_size != 64)

    model = beit3_fast.load_model(path, image_size=image_size)
    assert model.beit3.config.img_size == image_size
    assert_same_tensors(model.state_dict(), reference.state_dict())
    assert torch.equal(model.state_dict()[POSITIONS][:3], table[:3].float())
    assert_outputs_close(outputs(model, "retrieval", image_size), outputs(reference, "retrieval", image_size), "scaled")

    existing = ours("retrieval", seed=1, img_size=image_size)
    assert beit3_fast.load_checkpoint(existing, path) == []
    assert_same_tensors(existing.state_dict(), reference.state_dict())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_resize_positions(dtype: torch.dtype) -> None:
    table = torch.randn(3 + 4 * 4, 10).to(dtype)
    for img_size, grid in ((24, 3), (40, 5), (8, 1)):
        resized = checkpoint.resize_positions(table, img_size, 8)
        assert resized.shape == (3 + grid**2, 10)
        assert resized.dtype == dtype
        assert torch.equal(resized[:3], table[:3])
    assert checkpoint.resize_positions(table, 32, 8) is table


def test_resizing_keeps_what_is_constant_and_the_axes() -> None:
    table = torch.zeros(3 + 6 * 6, 2)
    table[3:] = torch.stack(torch.meshgrid(torch.arange(6.0), torch.full((6,), 7.0), indexing="ij"), -1).flatten(0, 1)
    resized = checkpoint.resize_positions(table, 12 * 16, 16)[3:].view(12, 12, 2)
    torch.testing.assert_close(resized[..., 1], torch.full((12, 12), 7.0))
    assert torch.equal(resized[:, :1, 0].expand(12, 12), resized[..., 0])  # the same along every row of patches
    assert (resized[1:-1, 0, 0].diff() > 0).all()


@pytest.mark.parametrize("shape", [(33, 128), (20, 128), (3, 128), (2, 128), (0, 128), (19,), (), (28, 64)])
@pytest.mark.parametrize("strict", [True, False])
def test_positions_of_no_square_grid(shape: tuple[int, ...], strict: bool, tmp_path: Path) -> None:
    """A table that cannot be resized is a key that does not fit, like any other."""
    path = write_raw({**tiny_state(), POSITIONS: torch.zeros(shape)}, tmp_path)
    model = ours("retrieval", seed=1)
    before = shared_state(model)
    if strict:
        with pytest.raises(CheckpointError, match=re.escape(POSITIONS)):
            beit3_fast.load_checkpoint(model, path)
        assert_same_tensors(model.state_dict(), before)
    else:
        (problem,) = beit3_fast.load_checkpoint(model, path, strict=False)
        assert POSITIONS in problem
        assert_same_tensors(model.state_dict(), {**tiny_state(), POSITIONS: before[POSITIONS]})


# --------------------------------------------------------------------------------------------- arguments of load_model


@pytest.mark.parametrize("target", public.HEADS)
@pytest.mark.parametrize("source", ["retrieval", "vqav2", "pretraining"])
def test_another_head_takes_what_the_public_loader_takes(
    source: str, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From each file the public loader fills the keys that fit; the rest keeps its fresh initialisation."""
    state = shared_state(ours(source, **({"num_classes": 5} if source == "vqav2" else {})))
    path = write_model(state, tmp_path)
    reference = theirs(target, seed=3)
    untouched = shared_state(reference)
    public.utils.load_model_and_may_interpolate(str(path), reference, "model|module", "")
    classes = {"num_classes": public.NUM_CLASSES[target]} if target in public.NUM_CLASSES else {}
    model = beit3_fast.load_model(path, head=target, **classes)
    actual, expected = model.state_dict(), reference.state_dict()
    assert type(model).__name__ == type(reference).__name__
    assert not model.training
    assert set(actual) == set(expected)
    taken = {key for key in expected if not torch.equal(expected[key], untouched[key])}
    assert any(key.startswith("beit3.") for key in taken)
    for key, value in actual.items():
        same = key in state and state[key].shape == value.shape and torch.equal(state[key], value)
        assert same == (key in taken), key
        assert value.shape == expected[key].shape, key
        assert value.isfinite().all(), key


def test_a_fresh_head_is_initialised(tmp_path: Path) -> None:
    path = write_model(tiny_state(), tmp_path)
    model = beit3_fast.load_model(path, head="vqav2")
    assert model.head[3].weight.shape == (3129, 256)
    assert 0 < model.head[3].weight.abs().max() <= 0.02
    assert not model.head[3].bias.any()
    assert torch.equal(model.pooler.norm.weight, torch.ones(128))
    assert model.beit3.config.normalize_output is False
    back = beit3_fast.load_model(write_raw(shared_state(model), tmp_path), head="retrieval")
    assert back.beit3.config.normalize_output is True
    assert torch.equal(back.state_dict()["beit3.encoder.layer_norm.B.weight"], torch.ones(128))


@pytest.mark.parametrize("head", ["imageclassification", "nlvr2", "vqav2"])
def test_another_number_of_classes(head: str, tmp_path: Path) -> None:
    saved = ours(head, num_classes=5)
    path = write_model(shared_state(saved), tmp_path)
    model = beit3_fast.load_model(path, num_classes=9)
    changed = [key for key, value in model.state_dict().items() if value.shape != saved.state_dict()[key].shape]
    last = {"imageclassification": "head", "nlvr2": "head.dense2", "vqav2": "head.3"}[head]
    assert changed == [f"{last}.weight", f"{last}.bias"]
    assert model.state_dict()[f"{last}.bias"].shape == (9,)
    kept = {key: value for key, value in model.state_dict().items() if key not in changed}
    assert_same_tensors(kept, {key: saved.state_dict()[key] for key in kept})
    assert_same_tensors(beit3_fast.load_model(path, num_classes=5).state_dict(), saved.state_dict())
    assert_same_tensors(beit3_fast.load_model(path, head=head).state_dict(), saved.state_dict())


@pytest.mark.parametrize("num_classes", [0, -1, "3", 2.5])
def test_a_number_of_classes_that_is_none(num_classes: Any, tmp_path: Path) -> None:
    path = write_model(shared_state(ours("vqav2", num_classes=5)), tmp_path)
    with pytest.raises((TypeError, ValueError), match="num_classes"):
        beit3_fast.load_model(path, num_classes=num_classes)


@pytest.mark.parametrize("head", ["retrieval", "captioning", "pretraining"])
def test_a_head_without_classes_takes_no_number_of_them(head: str, tmp_path: Path) -> None:
    path = write_model(shared_state(ours(head)), tmp_path)
    with pytest.raises(ValueError, match=f"num_classes.*{head}"):
        beit3_fast.load_model(path, num_classes=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    state = shared_state(ours("captioning").half())
    model = beit3_fast.load_model(write_model(state, tmp_path), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert_same_tensors(model.state_dict(), {key: value.to(dtype) for key, value in state.items()})


def test_device(tmp_path: Path) -> None:
    path = write_model(tiny_state(), tmp_path)
    assert {p.device.type for p in beit3_fast.load_model(path, device="meta").parameters()} == {"meta"}
    assert {p.device.type for p in beit3_fast.load_model(path, device=torch.device("cpu")).parameters()} == {"cpu"}


def test_overrides(tmp_path: Path) -> None:
    path = write_model(tiny_state(), tmp_path)
    overrides = {
        "drop_path_rate": 0.3,
        "checkpoint_activations": True,
        "layernorm_eps": 1e-3,
        "encoder_attention_heads": 4,
    }
    model = beit3_fast.load_model(path, **overrides)
    plain = beit3_fast.load_model(path)
    for name, value in overrides.items():
        assert getattr(model.beit3.config, name) == value != getattr(plain.beit3.config, name)
    assert_same_tensors(model.state_dict(), plain.state_dict())
    assert model.beit3.encoder.layers[1].drop_path.drop_prob == pytest.approx(0.3)
    reference = theirs("retrieval", encoder_attention_heads=4, layernorm_eps=1e-3)
    reference.load_state_dict(plain.state_dict(), strict=True)
    assert_outputs_close(outputs(model, "retrieval"), outputs(reference, "retrieval"), "four heads")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"head": "retreival"}, ValueError, "head.*retreival.*did you mean retrieval"),
        ({"head": 3}, (TypeError, ValueError), "head"),
        ({"image_size": 65}, ValueError, "img_size.*65"),
        ({"image_size": 0}, ValueError, "img_size.*0"),
        ({"image_size": "96"}, (TypeError, ValueError), "img_size.*'96'"),
        ({"drop_path": 0.1}, TypeError, "drop_path.*did you mean drop_path_rate"),
        ({"drop_path_rate": 1.5}, ValueError, "drop_path_rate.*1.5"),
        ({"dtype": torch.int32}, (TypeError, ValueError), "dtype"),
        ({"encoder_attention_heads": 3}, ValueError, "encoder_attention_heads.*3"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: Any, words: str, tmp_path: Path) -> None:
    path = write_model(tiny_state(), tmp_path)
    with pytest.raises(error, match=words):
        beit3_fast.load_model(path, **arguments)


# ------------------------------------------------------------------------------------------------ keys that do not fit


def broken_state() -> tuple[dict[str, Tensor], list[str], list[str]]:
    """A state dict with every kind of fault in fused and plain parameters; the keys to be named, and what of them."""
    state = tiny_state()
    missing = [KEY_BIAS, "beit3.encoder.layers.1.ffn.B.ffn_layernorm.weight", "vision_head.weight"]
    for key in missing:
        del state[key]
    unexpected = ["mim_head.bias", "beit3.encoder.layers.0.self_attn.q_proj.C.weight", "beit3.encoder.layers.0.extra"]
    state |= {key: torch.zeros(3) for key in unexpected}
    misshaped = {
        QUERY: (128, 64),
        "beit3.encoder.layers.0.final_layer_norm.A.weight": (1,),  # would broadcast
        "beit3.vision_embed.cls_token": (1, 128),
        "language_head.weight": (64, 128),
        "logit_scale": (1,),
    }
    state |= {key: torch.zeros(shape) for key, shape in misshaped.items()}
    shapes = [f"{tuple(shape)} instead of" for shape in misshaped.values()]
    return state, [*missing, *unexpected, *misshaped], shapes


@pytest.mark.parametrize("into", ["load_model", "load_checkpoint", "load_state_dict"])
def test_one_error_lists_every_key_that_does_not_fit(into: str, tmp_path: Path) -> None:
    state, keys, shapes = broken_state()
    path = write_model(state, tmp_path)
    model = ours("retrieval", seed=1)
    before = shared_state(model)
    load = {
        "load_model": lambda: beit3_fast.load_model(path),
        "load_checkpoint": lambda: beit3_fast.load_checkpoint(model, path),
        "load_state_dict": lambda: checkpoint.load_state_dict(model, state),
    }[into]
    with pytest.raises(CheckpointError) as error:
        load()
    message = str(error.value)
    for words in (*keys, *shapes, "3 missing", "3 unexpected", "5 of another shape", "BEiT3ForRetrieval"):
        assert words in message
    assert (into == "load_state_dict") != (str(path) in message)
    inner = {name for name, _ in model.named_parameters()} - set(before)
    assert inner
    assert not any(name in message for name in inner), "a key of ours that no file has"
    assert_same_tensors(model.state_dict(), before)


def test_many_keys_are_counted() -> None:
    state = {key: value for key, value in tiny_state().items() if ".B." not in key}
    with pytest.raises(CheckpointError, match="43 missing") as error:
        checkpoint.load_state_dict(ours("retrieval"), state)
    named = str(error.value).count(".B.")
    assert 0 < named <= 43
    assert named == 43 or f"{43 - named} more" in str(error.value)


def test_without_strict_the_rest_is_loaded(tmp_path: Path) -> None:
    state, keys, _ = broken_state()
    model = ours("retrieval", seed=1)
    before = shared_state(model)
    problems = beit3_fast.load_checkpoint(model, write_model(state, tmp_path), strict=False)
    assert len(problems) == 3
    assert all(key in " ".join(problems) for key in keys)
    expected = {key: before[key] if key in keys else state[key] for key in before}
    assert_same_tensors(model.state_dict(), expected)
    assert beit3_fast.load_checkpoint(model, write_model(tiny_state(), tmp_path), strict=False) == []
    assert_same_tensors(model.state_dict(), tiny_state())


def test_the_backbone_must_fit_a_new_head(tmp_path: Path) -> None:
    state = tiny_state()
    del state[KEY_BIAS]
    with pytest.raises(CheckpointError, match=re.escape(KEY_BIAS)):
        beit3_fast.load_model(write_model(state, tmp_path), head="vqav2")
    with pytest.raises(CheckpointError, match=r"beit3\.text_embed\.weight"):
        beit3_fast.load_model(write_model(tiny_state(), tmp_path), head="vqav2", vocab_size=500)
    with pytest.raises(CheckpointError, match="40 unexpected"):
        beit3_fast.load_model(write_model(tiny_state(), tmp_path), head="vqav2", encoder_layers=1)


def test_a_file_in_mixed_precision_loses_nothing(tmp_path: Path) -> None:
    """Whatever the dtypes, in whatever order: the model holds each tensor's own values."""
    for low in (".k_proj.A.", ".q_proj.B.", ".fc1.", "ffn.A.", "layer_norm.A."):
        state = {key: value.bfloat16() if low in key else value for key, value in tiny_state().items()}
        model = beit3_fast.load_model(write_model(state, tmp_path))
        assert_same_tensors(model.state_dict(), {key: value.float() for key, value in state.items()})


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("key", [QUERY, "language_head.weight"])
@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_plain_values(kind: str, key: str, tmp_path: Path) -> None:
    state = tiny_state()
    state[key] = state[key].to_sparse() if kind == "sparse" else state[key].to("meta")
    with pytest.raises(CheckpointError, match=re.escape(key)):
        beit3_fast.load_model(write_model(state, tmp_path))


# ---------------------------------------------------------------------------------------------------- damaged files


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Small files of every format with everything that a trainer stores; what they hold does not matter here."""
    folder = tmp_path_factory.mktemp("whole")
    state = {"a": torch.randn(20, 7).half(), "b": torch.randn(9), "c": torch.randn(3, 3)}
    stored = trainer_state(state)
    torch.save(stored, folder / "zip.pth")
    torch.save(stored, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    write_safetensors(state, folder)
    files = files_in(folder)
    for name in files:
        assert_same_tensors(checkpoint.read_state_dict(folder / name), state)
    return files


FORMATS = ["zip.pth", "legacy.pth", "model.safetensors"]


def read(data: bytes, path: Path) -> dict[str, Tensor]:
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    with within(10):
        return checkpoint.read_state_dict(path)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=200)
@given(point=st.floats(0, 1, exclude_max=True))
@example(point=0.0)
@example(point=0.999999)
def test_truncated(name: str, whole_files: dict[str, bytes], tmp_path_factory: Any, point: float) -> None:
    data = whole_files[name]
    path = tmp_path_factory.getbasetemp() / f"truncated.{name}"
    with pytest.raises(CheckpointError, match=re.escape(path.name)):
        read(data[: int(point * len(data))], path)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("length", [*range(12), 16, 18, 32, 64, 100, -100, -22, -8, -4, -2, -1])
def test_truncated_near_the_ends(name: str, length: int, whole_files: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / name
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read(whole_files[name][:length], path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=200, phases=[Phase.explicit, Phase.generate])  # a smaller corruption is no simpler one
@given(
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_corrupt(
    name: str,
    whole_files: dict[str, bytes],
    tmp_path_factory: Any,
    edits: list[tuple[float, int]],
    cut: tuple[float, float] | None,
) -> None:
    """Changed bytes in the weights cannot be noticed; wherever they are, what is not read is a CheckpointError."""
    data = bytearray(whole_files[name])
    for where, value in edits:
        data[int(where * len(data))] = value
    if cut is not None:
        start, end = sorted(int(where * len(data)) for where in cut)
        del data[start:end]
    with contextlib.suppress(CheckpointError):
        read(bytes(data), tmp_path_factory.getbasetemp() / f"corrupt.{name}")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pt", ""])
@pytest.mark.parametrize(
    "data", [b"", b"hello", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02.", b"\xff" * 64, bytes(64), b"{}"]
)
def test_another_kind_of_file(data: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"file{suffix}"
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        read(data, path)


def test_a_zip_of_other_things(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("archive/readme.txt", "hello")
    with pytest.raises(CheckpointError):
        beit3_fast.load_model(tmp_path / "archive.pth")


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_module_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "script.pth")
    with pytest.raises(CheckpointError):
        beit3_fast.load_model(tmp_path / "script.pth")


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"model": {}},
        {"model": None, "epoch": 3},
        {"model": {"a": torch.zeros(2), "step": 3}},
        {"model": {"a": torch.zeros(2), "b": None}},
        {"model": {"a": torch.zeros(2), "b": [torch.zeros(2)]}},
        {"model": {"a": torch.zeros(2), 3: torch.zeros(2)}},
        {"a": torch.zeros(2), "args": argparse.Namespace(lr=0.1)},
        [torch.zeros(2)],
        torch.zeros(2),
        3,
        None,
    ],
    ids=repr,
)
def test_no_state_dict(stored: Any, tmp_path: Path) -> None:
    torch.save(stored, tmp_path / "file.pth")
    for load in (checkpoint.read_state_dict, beit3_fast.load_model):
        with pytest.raises(CheckpointError, match=re.escape(str(tmp_path / "file.pth"))):
            load(tmp_path / "file.pth")


def test_entries_that_are_no_tensors_are_named(tmp_path: Path) -> None:
    torch.save({"model": {**tiny_state(), "global_step": 3}}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="global_step"):
        beit3_fast.load_model(tmp_path / "file.pth")


@pytest.mark.parametrize("name", ["none.pth", "none.safetensors", "no/such/folder.pth", "nul\0byte.pth"])
def test_no_such_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        beit3_fast.load_model(tmp_path / name)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ""])
def test_a_folder(suffix: str, tmp_path: Path) -> None:
    """The public trainer's DeepSpeed checkpoints are folders: the error must not deny that it exists."""
    folder = tmp_path / f"checkpoint-1{suffix}"
    folder.mkdir()
    with pytest.raises((OSError, CheckpointError)) as error:
        beit3_fast.load_model(folder)
    assert str(folder) in str(error.value)
    assert "does not exist" not in str(error.value)


@pytest.mark.parametrize("path", [None, 3, b"model.pth", ["model.pth"]])
def test_no_path(path: Any) -> None:
    for load in (checkpoint.read_state_dict, beit3_fast.load_model):
        with pytest.raises(TypeError):
            load(path)
    with pytest.raises(TypeError):
        beit3_fast.save_checkpoint(ours("retrieval"), path)


# ---------------------------------------------------------------------------------------------------- code in pickles


class Calls:
    """Pickles as a call: reading it the trusting way makes the call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def attacks(marker: Path) -> dict[str, Calls]:
    write = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": Calls(os.system, f"touch '{marker}'"),
        "eval": Calls(builtins.eval, write),
        "exec": Calls(builtins.exec, write),
        "open": Calls(builtins.open, str(marker), "w"),
        "Path.touch": Calls(Path.touch, marker),
    }


PLACES: dict[str, Callable[[Any], Any]] = {
    "top": lambda bad: bad,
    "model": lambda bad: {"model": bad},
    "an entry": lambda bad: {"model": {**tiny_state(), "language_head.bias": bad}},
    "the optimizer": lambda bad: {**trainer_state(tiny_state()), "optimizer": {"state": {0: {"exp_avg": [bad]}}}},
    "the command line": lambda bad: {**trainer_state(tiny_state()), "args": argparse.Namespace(lr=0.1, hook=bad)},
}


def write_zip(stored: Any, path: Path) -> None:
    torch.save(stored, path)


def write_old(stored: Any, path: Path) -> None:
    torch.save(stored, path, _use_new_zipfile_serialization=False)


def write_pickle(stored: Any, path: Path) -> None:
    with path.open("wb") as file:
        pickle.dump(stored, file)


def check_refused(path: Path, marker: Path) -> str:
    """Refused without a trace; and would have run, had it been trusted."""
    with pytest.raises(CheckpointError, match="never executed") as error:
        beit3_fast.load_model(path)
    with pytest.raises(CheckpointError):
        checkpoint.convert(path, path.with_suffix(".safetensors"))
    assert not marker.exists()
    assert not path.with_suffix(".safetensors").exists()
    with contextlib.suppress(Exception):
        torch.load(path, weights_only=False)
    assert marker.exists(), "the attack is not armed"
    return str(error.value)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("write", [write_zip, write_old], **named)
def test_code_is_refused_wherever_it_is(write: Callable[[Any, Path], None], place: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    write(PLACES[place](attacks(marker)["os.system"]), tmp_path / "bad.pth")
    message = check_refused(tmp_path / "bad.pth", marker)
    assert "system" in message
    assert "bad.pth" in message


@pytest.mark.parametrize("attack", attacks(Path()))
@pytest.mark.parametrize("write", [write_zip, write_old], **named)
def test_code_is_refused_whatever_it_is(write: Callable[[Any, Path], None], attack: str, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    write({"model": attacks(marker)[attack]}, tmp_path / "bad.pth")
    check_refused(tmp_path / "bad.pth", marker)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_plain_pickle_is_refused(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    data = pickle.dumps({"model": attacks(marker)["os.system"]}, protocol=protocol)
    (tmp_path / "bad.pth").write_bytes(data)
    with pytest.raises(CheckpointError):
        beit3_fast.load_model(tmp_path / "bad.pth")
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists(), "the attack is not armed"


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [write_zip, write_old, write_pickle], **named)
def test_the_error_does_not_advise_to_run_the_code(write: Callable[[Any, Path], None], tmp_path: Path) -> None:
    """PyTorch's own message proposes `weights_only=False`."""
    write({"model": attacks(tmp_path / "executed")["os.system"]}, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError) as error:
        beit3_fast.load_model(tmp_path / "bad.pth")
    assert "weights_only" not in str(error.value)


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    """A whole module is code by reference: its class would be imported."""
    torch.save(ours("retrieval"), tmp_path / "module.pth")
    with pytest.raises(CheckpointError, match="BEiT3ForRetrieval"):
        beit3_fast.load_model(tmp_path / "module.pth")


def test_reading_does_not_widen_what_others_may_unpickle(tmp_path: Path) -> None:
    allowed = set(torch.serialization.get_safe_globals())
    path = write_trainer(tiny_state(), tmp_path)
    checkpoint.read_state_dict(path)
    assert set(torch.serialization.get_safe_globals()) == allowed
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)


# ------------------------------------------------------------------------------------------------------------- saving


@pytest.mark.parametrize(("suffix", "dtype"), [(".pth", torch.float16), (".safetensors", torch.float32)])
@pytest.mark.parametrize("head", ALL)
def test_each_tensor_is_written_once(head: str, suffix: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Keys are views of fused parameters; a file that kept those would hold every layer many times over."""
    model = ours(head).to(dtype)
    path = tmp_path / f"checkpoint{suffix}"
    beit3_fast.save_checkpoint(model, path)
    state = model.state_dict()
    payload = sum(value.numel() * value.element_size() for value in state.values())
    assert payload <= path.stat().st_size < payload + 600 * len(state)
    if suffix == ".pth":
        stored = torch.load(path, weights_only=True)["model"]
        assert list(stored) == list(state)
        for key, value in stored.items():
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), key
    else:
        stored = safetensors.torch.load_file(path)
    assert_same_tensors(stored, state)


@pytest.mark.parametrize("head", public.HEADS)
def test_the_public_code_reads_what_we_write(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = ours(head, **({"num_classes": 11} if head == "vqav2" else {}))
    if head == "imageclassification":
        saved = ours(head, num_classes=7)
    beit3_fast.save_checkpoint(saved, tmp_path / "ours.pth")
    reference = theirs(head, seed=1)
    reference.load_state_dict(torch.load(tmp_path / "ours.pth")["model"], strict=True)
    assert_outputs_close(outputs(saved, head), outputs(reference, head), head)
    again = theirs(head, seed=2)
    public.utils.load_model_and_may_interpolate(str(tmp_path / "ours.pth"), again, "model|module", "")
    assert_same_tensors(again.state_dict(), saved.state_dict())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_memory_formats_and_views_are_written(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"views{suffix}"
    base = torch.randn(4, 6)
    state = {"turned": base.T, "every_other": base[:, ::2], "whole": base, "expanded": base[:1].expand(5, 6)}
    beit3_fast.save_checkpoint(state, path)
    assert_same_tensors(checkpoint.read_state_dict(path), state)
    model = ours("imageclassification").to(memory_format=torch.channels_last)
    beit3_fast.save_checkpoint(model, path)
    assert_same_tensors(beit3_fast.load_model(path).state_dict(), model.state_dict())


@pytest.mark.parametrize("path", ["model.pt", "model", "model.bin", "model.pth.tar", "model.PTH", "pth"])
def test_the_suffix_is_checked_first(path: str, tmp_path: Path) -> None:
    target = tmp_path / path
    with pytest.raises(ValueError, match=re.escape(path)):
        beit3_fast.save_checkpoint(ours("retrieval"), target)
    with pytest.raises(ValueError, match=re.escape(path)):
        checkpoint.convert(tmp_path / "none.pth", target)
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupt"])
@pytest.mark.parametrize("when", ["writing", "renaming"])
def test_a_failure_leaves_the_old_file_and_nothing_else(
    when: str, error: BaseException, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"checkpoint{suffix}"
    beit3_fast.save_checkpoint(ours("retrieval"), path)
    before = files_in(tmp_path)
    seen = []

    def fail(first: Any, second: Any, *args: Any, **kwargs: Any) -> None:
        if when == "writing":
            seen.append(Path(second))
            seen[-1].write_bytes(b"half of it")
        else:
            seen.append(Path(first))
        raise error

    if when == "renaming":
        monkeypatch.setattr(os, "replace", fail)
    elif suffix == ".pth":
        monkeypatch.setattr(torch, "save", fail)
    else:
        monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(type(error)):
        beit3_fast.save_checkpoint(ours("retrieval", seed=1), path)
    with pytest.raises(type(error)):
        beit3_fast.save_checkpoint(ours("retrieval", seed=1), tmp_path / f"new{suffix}")
    assert seen
    assert seen[0].parent == tmp_path
    assert seen[0] != path
    assert files_in(tmp_path) == before


def test_a_model_that_cannot_be_read_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pth"
    beit3_fast.save_checkpoint(ours("retrieval"), path)
    before = files_in(tmp_path)
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        beit3_fast.save_checkpoint(ours("retrieval").to("meta"), path)
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("model", [3, None, "model", [torch.zeros(2)], {"a": 3}, {"a": None}])
def test_what_is_no_model_is_not_saved(model: Any, tmp_path: Path) -> None:
    for suffix in (".pth", ".safetensors"):
        with pytest.raises((TypeError, ValueError)):
            beit3_fast.save_checkpoint(model, tmp_path / f"x{suffix}")
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_saving_replaces_the_old_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"checkpoint{suffix}"
    beit3_fast.save_checkpoint(ours("vqav2"), path)
    model = ours("retrieval", seed=1)
    beit3_fast.save_checkpoint(model, path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert_same_tensors(beit3_fast.load_model(path).state_dict(), model.state_dict())


def test_saving_onto_the_file_that_was_read(tmp_path: Path) -> None:
    """Read tensors may still be mapped from the file that they go back to."""
    for path in (write_model(tiny_state(), tmp_path), write_safetensors(tiny_state(), tmp_path)):
        state = checkpoint.read_state_dict(path)
        beit3_fast.save_checkpoint(state, path)
        assert_same_tensors(state, tiny_state())
        assert_same_tensors(checkpoint.read_state_dict(path), tiny_state())


@pytest.mark.skipif(os.name != "posix", reason="permission bits are POSIX")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_permissions_honour_the_umask(umask: int, suffix: str, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        beit3_fast.save_checkpoint({"a": torch.zeros(2)}, tmp_path / f"a{suffix}")
        assert os.umask(umask) == umask, "saving changed the process's umask"
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / f"a{suffix}").stat().st_mode) == 0o666 & ~umask


def test_saving_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    model = ours("retrieval").train()
    model(**{"image": torch.zeros(1, 3, 64, 64), "text_description": torch.zeros(1, 3, dtype=torch.long)})[0].backward()
    parameters = [(p, p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None]
    beit3_fast.save_checkpoint(model, tmp_path / "model.pth")
    assert model.training
    assert parameters
    for parameter, value, grad in parameters:
        assert torch.equal(parameter, value)
        assert torch.equal(parameter.grad, grad)
        assert parameter.requires_grad


# --------------------------------------------------------------------------------------------------------- converting


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("write", [write_model, write_raw, write_legacy, write_trainer], **named)
def test_convert_and_back(write: Writer, dtype: torch.dtype, tmp_path: Path) -> None:
    state = {key: value.to(dtype) for key, value in theirs("captioning").state_dict().items()}
    state["mlm_head.bias"] = state["mlm_head.bias"].double()
    source = write(state, tmp_path)
    there = checkpoint.convert(source, tmp_path / "there.safetensors")
    back = checkpoint.convert(tmp_path / "there.safetensors", tmp_path / "back.pth")
    assert there == back == checkpoint.inspect(state)
    assert_same_tensors(safetensors.torch.load_file(tmp_path / "there.safetensors"), state)
    assert_same_tensors(torch.load(tmp_path / "back.pth", weights_only=True)["model"], state)
    payload = sum(value.numel() * value.element_size() for value in state.values())
    assert (tmp_path / "back.pth").stat().st_size < payload + 600 * len(state)


def test_convert_what_shares_memory(tmp_path: Path) -> None:
    """`torch.save(model.state_dict())` of a fused model stores views into shared storages."""
    model = ours("retrieval")
    source = write_raw(model.state_dict(), tmp_path)
    checkpoint.convert(source, tmp_path / "there.safetensors")
    assert_same_tensors(safetensors.torch.load_file(tmp_path / "there.safetensors"), model.state_dict())


def test_convert_onto_itself(tmp_path: Path) -> None:
    path = write_trainer(tiny_state(), tmp_path)
    checkpoint.convert(path, path)
    assert set(torch.load(path, weights_only=True)) == {"model"}
    assert_same_tensors(checkpoint.read_state_dict(path), tiny_state())


def test_convert_refuses_what_is_no_beit3(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError):
        checkpoint.convert(tmp_path / "foreign.pth", tmp_path / "there.safetensors")
    with pytest.raises(FileNotFoundError):
        checkpoint.convert(tmp_path / "none.pth", tmp_path / "there.safetensors")
    assert set(files_in(tmp_path)) == {"foreign.pth"}


def test_interpolated_outputs_of_a_converted_half_file(tmp_path: Path) -> None:
    """The whole way at once: a released fp16 file, converted, another image size and dtype, against the public code."""
    source = write_model(dict(theirs("retrieval").half().state_dict()), tmp_path)
    checkpoint.convert(source, tmp_path / "there.safetensors")
    reference = theirs("retrieval", seed=1, img_size=96)
    public.utils.load_model_and_may_interpolate(str(source), reference, "model|module", "")
    model = beit3_fast.load_model(tmp_path / "there.safetensors", image_size=96)
    assert_close(
        outputs(model, "retrieval", 96)["vision"], outputs(reference, "retrieval", 96)["vision"], "vision features"
    )
