"""The 15 released model names and the pretraining ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from .config import EncoderConfig, nearest
from .heads import (
    BEiT3ForCaptioning,
    BEiT3ForImageClassification,
    BEiT3ForPretraining,
    BEiT3ForRetrieval,
    BEiT3ForVisualQuestionAnswering,
    BEiT3ForVisualReasoning,
    BEiT3Wrapper,
)


@dataclass(frozen=True)
class Head:
    """A task's model class and what its released models fix."""

    model: type[BEiT3Wrapper]
    num_classes: int | None = None
    normalize_output: bool = True


HEADS = {
    "imageclassification": Head(BEiT3ForImageClassification, 1000, normalize_output=False),
    "nlvr2": Head(BEiT3ForVisualReasoning, 2),
    "vqav2": Head(BEiT3ForVisualQuestionAnswering, 3129, normalize_output=False),
    "captioning": Head(BEiT3ForCaptioning),
    "retrieval": Head(BEiT3ForRetrieval),
    "pretraining": Head(BEiT3ForPretraining),
}
SIZES: dict[str, Callable[..., EncoderConfig]] = {
    "base": EncoderConfig.base,
    "large": EncoderConfig.large,
    "giant": EncoderConfig.giant,
}
_RELEASED: dict[str, dict[str, tuple[int, ...]]] = {
    "imageclassification": {"base": (224,), "large": (224,)},
    "nlvr2": {"base": (224,), "large": (224,)},
    "vqav2": {"base": (384, 480), "large": (384, 480, 768)},
    "captioning": {"base": (224, 480), "large": (480,)},
    "retrieval": {"base": (224, 384), "large": (384,)},
}
MODELS = {
    f"beit3_{size}_patch16_{img_size}_{head}": (size, img_size, head)
    for head, sizes in _RELEASED.items()
    for size, img_sizes in sizes.items()
    for img_size in img_sizes
}


def list_models() -> list[str]:
    """The released model names that :func:`create_model` knows."""
    return sorted(MODELS)


def create_model(name: str, **overrides: Any) -> BEiT3Wrapper:
    """A model by its released name, with freshly initialised weights.

    Args:
        name: e.g. ``"beit3_base_patch16_384_retrieval"``; see :func:`list_models`.
        **overrides: fields of :class:`EncoderConfig` (``img_size``, ``drop_path_rate``, ``checkpoint_activations``,
            ...), ``mlp_ratio``, and ``num_classes`` where the head has classes.

    Raises:
        ValueError: an unknown name (the nearest are offered) or a bad value.
        TypeError: an unknown override.
    """
    if name not in MODELS:
        raise ValueError(f"name must be a released model, got {name!r}{nearest(str(name), list_models())}")
    size, img_size, head = MODELS[name]
    return build(size, head, **{"img_size": img_size, **overrides})


def build(size: str, head: str, **overrides: Any) -> BEiT3Wrapper:
    """A model of a size ("base", "large", "giant") with a head of :data:`HEADS`; see :func:`create_model`."""
    spec = HEADS[head]
    known = [field.name for field in fields(EncoderConfig)] + ["mlp_ratio"]
    known += ["num_classes"] if spec.num_classes is not None else []
    for override in overrides:
        if override not in known:
            raise TypeError(f"unknown override {override!r} for a {head} model{nearest(override, known)}")
    heads = {} if spec.num_classes is None else {"num_classes": overrides.pop("num_classes", spec.num_classes)}
    config = SIZES[size](**{"normalize_output": spec.normalize_output, **overrides})
    return spec.model(config, **heads)


def factory(name: str) -> Callable[..., BEiT3Wrapper]:
    """The public code's factory function of a released name: ``factory(pretrained=False, **overrides)``.

    ``pretrained`` changes nothing there, and programs that pass True load their checkpoint afterwards; here it warns.
    """

    def create(pretrained: bool = False, **overrides: Any) -> BEiT3Wrapper:
        if pretrained:
            warnings.warn(
                f"{name}(pretrained=True) has random weights, as in the public code: none are downloaded. Load a "
                "checkpoint into it, or make it with beit3_fast.load_model(path)",
                UserWarning,
                stacklevel=2,
            )
        # timm's create_model passes options of its own, unset ones as None
        return create_model(name, **{key: value for key, value in overrides.items() if value is not None})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"``create_model({name!r}, **overrides)`` with the public code's signature."
    return create
