"""accelerate(): a live public model gives its own outputs through our backbone."""

from __future__ import annotations

import pytest
import torch
from oracles import public
from oracles.pairs import assert_close, assert_outputs_close
from torch import nn

import beit3_fast
from beit3_fast.models import BEiT3, released_names


@pytest.mark.parametrize("head", sorted(public.CLASSES))
def test_outputs_and_loss_stay(head: str) -> None:
    model = public.public_model(head)
    batch = public.training_batch(head)
    before = public.outputs(model, head, batch)
    returned = beit3_fast.accelerate(model)
    assert returned is model
    assert isinstance(model.beit3, BEiT3)
    assert_outputs_close(public.outputs(model, head, batch), before, head)


def test_state_dict_stays_released() -> None:
    model = public.public_model("retrieval")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    beit3_fast.accelerate(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_bare_backbone_is_returned() -> None:
    backbone = public.public_model(None)
    data = public.inputs()
    expected = backbone(data["tokens"], data["image"])["encoder_out"]
    ours = beit3_fast.accelerate(backbone)
    assert isinstance(ours, BEiT3)
    assert_close(ours(data["tokens"], data["image"])["encoder_out"], expected, "encoder_out")


def test_mode_dtype_and_frozen_parameters_carry_over() -> None:
    model = public.public_model("vqav2").double().train()
    for parameter in model.beit3.encoder.layers[0].parameters():
        parameter.requires_grad_(False)
    beit3_fast.accelerate(model)
    assert model.beit3.training
    frozen = {name for name, parameter in model.beit3.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in released_names(model.beit3) if name.startswith("encoder.layers.0.")}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_half_frozen_stack_is_refused() -> None:
    model = public.public_model("vqav2")
    model.beit3.encoder.layers[1].ffn.A.fc1.weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"ffn\.A\.fc1\.weight.*ffn\.B\.fc1\.weight.*freeze all of them or none"):
        beit3_fast.accelerate(model)


def test_model_without_backbone_is_refused() -> None:
    with pytest.raises(ValueError, match="model must hold a torchscale BEiT3 backbone"):
        beit3_fast.accelerate(nn.Linear(2, 2))
