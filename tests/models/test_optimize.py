"""optimize(): an inference copy with packed weights, which is otherwise the model it was made from."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracles import public
from oracles.pairs import assert_close, assert_outputs_close, pair
from torch import nn

import beit3_fast
from beit3_fast.models.modules import MultiwayLinear
from beit3_fast.ops import can_pack

SIZES = {"encoder_embed_dim": 64, "encoder_ffn_embed_dim": 128, "encoder_attention_heads": 4}

pytestmark = pytest.mark.skipif(not can_pack(torch.zeros(1, 64, 2)), reason="the CPU library is not loaded")


def make(head: str = "vqav2") -> tuple[nn.Module, nn.Module, dict[str, Any]]:
    """(public, ours, a batch), wide enough to be packed."""
    reference, ours = pair(head, **SIZES)
    return reference, ours, public.training_batch(head)


def packed_layers(model: nn.Module) -> list[MultiwayLinear]:
    return [module for module in model.modules() if isinstance(module, MultiwayLinear) and module.weight.ndim > 3]


def outputs(model: nn.Module, batch: dict[str, Any], head: str = "vqav2") -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return public.outputs(model, head, batch)


@pytest.mark.parametrize("head", sorted(public.CLASSES))
def test_every_head_gives_the_released_outputs(head: str) -> None:
    reference, ours, batch = make(head)
    optimized = beit3_fast.optimize(ours)
    assert len(packed_layers(optimized)) == sum(isinstance(module, MultiwayLinear) for module in ours.modules())
    assert not packed_layers(ours)
    assert_outputs_close(outputs(optimized, batch, head), outputs(reference, batch, head), head)


@pytest.mark.parametrize("int8", [False, True], ids=["own dtype", "int8"])
def test_its_state_dict_is_the_models(int8: bool) -> None:
    _, ours, _ = make()
    saved, expected = beit3_fast.optimize(ours, int8=int8).state_dict(), ours.state_dict()
    assert list(saved) == list(expected)
    for name, value in expected.items():
        assert saved[name].shape == value.shape
        assert saved[name].dtype == value.dtype
        if int8:
            assert (saved[name] - value).abs().max() <= value.abs().max() / 127 / 2 + 1e-7
        else:
            assert torch.equal(saved[name], value)


@pytest.mark.parametrize("int8", [False, True], ids=["own dtype", "int8"])
@pytest.mark.parametrize("assign", [False, True])
def test_loading_replaces_what_is_packed(int8: bool, assign: bool) -> None:
    _, ours, batch = make()
    _, other = pair("vqav2", seed=5, **SIZES)
    optimized = beit3_fast.optimize(ours, int8=int8)
    optimized.load_state_dict(other.state_dict(), assign=assign)
    expected = beit3_fast.optimize(other, int8=int8)
    assert torch.equal(outputs(optimized, batch)["logits"], outputs(expected, batch)["logits"])


def test_loading_other_shapes_says_which() -> None:
    _, ours, _ = make()
    optimized = beit3_fast.optimize(ours)
    state = ours.state_dict()
    name = next(key for key in state if key.endswith("fc1.weight"))
    state[name] = state[name][:-1]
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        optimized.load_state_dict(state)


def test_a_write_into_a_weight_is_seen() -> None:
    """Also one that no version counter notices: there is one copy of a weight."""
    _, ours, batch = make()
    optimized = beit3_fast.optimize(ours)
    with torch.no_grad():
        for model in (ours, optimized):
            for module in model.modules():
                if isinstance(module, MultiwayLinear):
                    module.weight.data.mul_(0.5)
                    module.weight.detach().numpy()[:] *= 0.5
    assert_outputs_close(outputs(optimized, batch), outputs(ours, batch), "after the write")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_move_is_followed(dtype: torch.dtype) -> None:
    """Whatever the way to a dtype, the weights are those of a model converted to it, in the form that is right."""
    _, ours, batch = make()
    floating = {name for name, value in batch.items() if torch.is_tensor(value) and value.is_floating_point()}
    batch = {name: value.to(dtype) if name in floating else value for name, value in batch.items()}
    expected = beit3_fast.optimize(copy.deepcopy(ours).to(dtype))
    first = beit3_fast.optimize(ours, dtype)
    moved = beit3_fast.optimize(ours).to(dtype)
    around = beit3_fast.optimize(ours).double().to(dtype)
    assert len(packed_layers(moved)) == (0 if dtype == torch.float64 else len(packed_layers(beit3_fast.optimize(ours))))
    for model in (first, moved, around):
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        assert_outputs_close(outputs(model, batch), outputs(expected, batch), "moved")


@pytest.mark.parametrize("int8", [False, True], ids=["own dtype", "int8"])
def test_copies(int8: bool) -> None:
    _, ours, batch = make()
    optimized = beit3_fast.optimize(ours, int8=int8)
    expected = outputs(optimized, batch)["logits"]
    for again in (copy.deepcopy(optimized), pickle.loads(pickle.dumps(optimized))):
        assert torch.equal(outputs(again, batch)["logits"], expected)
    optimized.share_memory()
    assert all(parameter.is_shared() for parameter in optimized.parameters())
    assert torch.equal(outputs(optimized, batch)["logits"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_is_near(dtype: torch.dtype) -> None:
    """Some hundredths of the output's size: what the README says of it, on a model of two layers."""
    _, ours, batch = make()
    exact = ours.double()
    wide = {name: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for name, v in batch.items()}
    truth = outputs(exact, wide)["logits"]
    quantized = beit3_fast.optimize(exact.float(), dtype, int8=True)
    assert all(layer.weight.dtype == torch.int8 for layer in packed_layers(quantized))
    cast = {name: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for name, v in batch.items()}
    actual = outputs(quantized, cast)["logits"].double()
    error = ((actual - truth).square().mean() / truth.square().mean()).sqrt()
    assert 1e-4 < error < 0.05


def test_a_gradient_of_the_inputs_and_of_weights_set_free() -> None:
    _, ours, batch = make()
    optimized = beit3_fast.optimize(ours)
    gradients = []
    for model in (ours.requires_grad_(False), optimized):
        image = batch["image"].clone().requires_grad_()
        public.outputs(model, "vqav2", {**batch, "image": image})["logits"].square().sum().backward()
        gradients.append(image.grad)
    assert_close(gradients[1], gradients[0], "image gradient")
    optimized.requires_grad_(True)
    public.outputs(optimized, "vqav2", batch)["logits"].square().sum().backward()
    assert all(layer.weight.grad is not None for layer in packed_layers(optimized))


def test_under_autocast_the_weights_stay() -> None:
    _, ours, batch = make()
    optimized = beit3_fast.optimize(ours)
    plain = outputs(ours, batch)["logits"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = outputs(optimized, batch)["logits"].float()
    assert (under - plain).abs().max() < 0.05 * plain.abs().max()


def test_other_backends_unpack() -> None:
    _, ours, batch = make()
    optimized = beit3_fast.optimize(ours)
    with beit3_fast.use_backend("reference"):
        assert_outputs_close(outputs(optimized, batch), outputs(ours, batch), "reference backend")


def test_widths_that_cannot_be_packed_stay() -> None:
    _, ours = pair("vqav2")  # width 48
    optimized = beit3_fast.optimize(ours)
    assert all(layer.ffn.fc2.weight.ndim == 3 for layer in optimized.beit3.encoder.layers)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("model",), TypeError, "model must be a torch.nn.Module"),
        ((nn.Linear(2, 2),), TypeError, "model must be a beit3_fast model"),
        ((None, torch.int8), ValueError, "dtype must be a floating-point dtype"),
    ],
)
def test_bad_arguments(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    if arguments[0] is None:
        arguments = (make()[1], *arguments[1:])
    with pytest.raises(error, match=message):
        beit3_fast.optimize(*arguments)
