"""What trainers make of a state dict when they save it: under which key, with which prefix, beside what."""

from __future__ import annotations

import argparse
import os
import pathlib
import pickle
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import Tensor

import beit3_fast
from beit3_fast import CheckpointError, EncoderConfig
from beit3_fast.models import BEiT3ForRetrieval

SIZES = {"encoder_embed_dim": 64, "encoder_attention_heads": 1, "encoder_ffn_embed_dim": 128, "encoder_layers": 1}


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = EncoderConfig(**SIZES, vocab_size=50, img_size=32, max_source_positions=16)
    return {key: torch.randn_like(value) for key, value in BEiT3ForRetrieval(config).state_dict().items()}


def assert_loads(path: Path, weights: dict[str, Tensor]) -> None:
    model = beit3_fast.load_model(str(path))
    assert isinstance(model, BEiT3ForRetrieval)
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], value) for key, value in weights.items())


def prefixed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in weights.items()}


@pytest.mark.parametrize("key", ["model", "module", "state_dict", "model_state_dict", "model_ema"])
def test_the_key_that_weights_are_under(key: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"epoch": 3, key: weights}, tmp_path / "c.pth")
    assert_loads(tmp_path / "c.pth", weights)


def test_the_weights_come_before_their_average(weights: dict[str, Tensor], tmp_path: Path) -> None:
    average = {key: torch.zeros_like(value) for key, value in weights.items()}
    torch.save({"model_ema": average, "model": weights}, tmp_path / "c.pth")
    assert_loads(tmp_path / "c.pth", weights)


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "bin"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module."])
def test_what_wrappers_put_before_every_key(
    prefix: str, suffix: str, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    path = tmp_path / f"c.{suffix}"
    if suffix == "pth":
        torch.save({"model": prefixed(weights, prefix)}, path)
    else:  # a safetensors file is one whatever it is called
        safetensors.torch.save_file(prefixed(weights, prefix), path)
    assert_loads(path, weights)


def test_a_prefix_of_some_keys_is_no_wrappers(weights: dict[str, Tensor], tmp_path: Path) -> None:
    first, *others = weights
    torch.save({f"module.{first}": weights[first]} | {key: weights[key] for key in others}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError):
        beit3_fast.load_model(str(tmp_path / "c.pth"))


BESIDE: dict[str, Any] = {
    "a float of numpy": numpy.float64(0.5),
    "an int of numpy": numpy.int64(3),
    "a bool of numpy": numpy.bool_(True),
    "half precision": numpy.float32(0.25),
    "a path": pathlib.Path("/x/y"),
    "paths of other systems": [pathlib.PureWindowsPath("c:/x"), pathlib.PurePosixPath("x")],
    "a command line": argparse.Namespace(
        lr=1e-4, out=pathlib.Path("/x"), device=torch.device("cpu"), best=numpy.float64(1)
    ),
}


@pytest.mark.parametrize("beside", BESIDE)
def test_plain_values_beside_the_weights(beside: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": weights, "beside": BESIDE[beside]}, tmp_path / "c.pth")
    assert_loads(tmp_path / "c.pth", weights)


class Runs:
    """Pickled, a call of a function of the operating system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("inside", ["beside", "a command line", "a numpy object"])
def test_code_is_never_run(inside: str, weights: dict[str, Tensor], tmp_path: Path) -> None:
    target = tmp_path / "ran"
    value: Any = Runs(target)
    if inside == "a command line":
        value = argparse.Namespace(out=value)
    if inside == "a numpy object":
        value = numpy.array([value], dtype=object)
    torch.save({"model": weights, "beside": value}, tmp_path / "c.pth", pickle_module=pickle)
    with pytest.raises(CheckpointError, match="never executed"):
        beit3_fast.load_model(str(tmp_path / "c.pth"))
    assert not target.exists()
