"""The released models under their public names, over rows in expert order."""

from __future__ import annotations

from collections.abc import Callable

from .beit3 import BEiT3
from .config import EncoderConfig
from .generation import Captions
from .heads import (
    BEiT3ForCaptioning,
    BEiT3ForImageClassification,
    BEiT3ForPretraining,
    BEiT3ForRetrieval,
    BEiT3ForVisualQuestionAnswering,
    BEiT3ForVisualReasoning,
    BEiT3Wrapper,
)
from .losses import BertCaptioningLoss, ClipLoss, vqa_loss
from .registry import MODELS, create_model, factory, list_models
from .released_keys import released_gradients, released_names

__all__ = [
    "BEiT3",
    "BEiT3ForCaptioning",
    "BEiT3ForImageClassification",
    "BEiT3ForPretraining",
    "BEiT3ForRetrieval",
    "BEiT3ForVisualQuestionAnswering",
    "BEiT3ForVisualReasoning",
    "BEiT3Wrapper",
    "BertCaptioningLoss",
    "Captions",
    "ClipLoss",
    "EncoderConfig",
    "create_model",
    "list_models",
    "released_gradients",
    "released_names",
    "vqa_loss",
]


def __getattr__(name: str) -> Callable[..., BEiT3Wrapper]:
    # beit3_base_patch16_224_retrieval(pretrained=False, **overrides) and its 14 siblings
    if name in MODELS:
        return factory(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
