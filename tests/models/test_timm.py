"""timm's own BEiT-3 (a VisionTransformer): a second oracle for images, which shares no code with torchscale."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from oracles import public
from oracles.pairs import assert_close, fast_copy, pair
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import nn

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}


def timm_twin(ours: nn.Module, **kwargs: Any) -> VisionTransformer:
    """timm's beit3_base_patch16_224, cut to size, with our weights read by timm's own checkpoint filter."""
    model = timm.create_model("beit3_base_patch16_224", pretrained=False, **kwargs)
    state = {key: value.clone() for key, value in ours.state_dict().items()}
    model.load_state_dict(checkpoint_filter_fn(state, model), strict=True)
    return model.eval()


def check(ours: nn.Module, twin: VisionTransformer, image: torch.Tensor) -> None:
    with torch.no_grad():
        features = twin.forward_features(image)
        assert_close(ours.beit3(visual_tokens=image)["encoder_out"], features, "features")
        assert_close(ours(image=image), twin(image), "logits")


def test_tiny() -> None:
    _, ours = pair("imageclassification")
    check(ours, timm_twin(ours, **TINY), public.inputs(batch=4)["image"])


@pytest.mark.slow
def test_base() -> None:
    reference = public.public_model("imageclassification", "base", image_size=224)
    ours = fast_copy(reference, "imageclassification")
    del reference
    check(ours, timm_twin(ours, num_classes=7), public.inputs(batch=2, image_size=224)["image"])


def test_gradients() -> None:
    _, ours = pair("imageclassification")
    twin = timm_twin(ours, **TINY)
    image = public.inputs(batch=4)["image"]
    weights = torch.linspace(-1, 1, 28).view(4, 7)
    images = []
    for model in (ours, twin):
        leaf = image.clone().requires_grad_()
        (model(leaf) * weights).sum().backward()
        images.append(leaf.grad)
    assert_close(images[0], images[1], "gradient of the image")
