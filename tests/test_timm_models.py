"""The public script's way to a model: timm.create_model after one import."""

from __future__ import annotations

import pytest

from beit3_fast.models import BEiT3ForRetrieval

timm = pytest.importorskip("timm")


def test_timm_knows_every_released_name() -> None:
    import beit3_fast.timm_models

    for name in beit3_fast.list_models():
        assert timm.is_model(name)


def test_create_model_as_the_public_script_calls_it() -> None:
    import beit3_fast.timm_models  # noqa: F401

    model = timm.create_model(
        "beit3_base_patch16_224_retrieval",
        pretrained=False,
        drop_path_rate=0.2,
        vocab_size=300,
        checkpoint_activations=None,
    )
    assert type(model) is BEiT3ForRetrieval
    assert model.beit3.config.drop_path_rate == 0.2
    assert model.beit3.config.vocab_size == 300
