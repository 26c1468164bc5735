"""Make a live model of the public code fast, where it stands."""

from __future__ import annotations

import torch
from torch import nn

from .models.beit3 import BEiT3
from .models.released_keys import released_names


def accelerate(model: nn.Module) -> nn.Module:
    """Replace every torchscale ``BEiT3`` backbone inside ``model`` by ours, with its weights, dtype, device and mode.

    For code that builds its model through torchscale or unilm/beit3 and cannot swap the import. Call it before the
    optimizer is made: the backbone's parameters are new tensors.

    Args:
        model: a module that holds torchscale backbones, or such a backbone itself.

    Returns:
        ``model``, changed in place; for a bare backbone its replacement.

    Raises:
        ValueError: there is no torchscale backbone in it, or one whose parameters are partly frozen in a way that
            stacked parameters cannot follow.
    """
    if _is_public_backbone(model):
        return _replacement(model)
    places = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if _is_public_backbone(child)
    ]
    if not places:
        raise ValueError(f"model must hold a torchscale BEiT3 backbone, found none in {type(model).__name__}")
    for parent, name in places:
        setattr(parent, name, _replacement(getattr(parent, name)))
    return model


def _is_public_backbone(module: nn.Module) -> bool:
    return type(module).__name__ == "BEiT3" and type(module).__module__.startswith("torchscale")


def _replacement(public: nn.Module) -> BEiT3:
    parameters = dict(public.named_parameters())
    frozen = {}
    with torch.device("meta"):
        ours = BEiT3(public.args)
    for name, keys in released_names(ours).items():
        wanted = {parameters[key].requires_grad for key in keys}
        if len(wanted) > 1:
            raise ValueError(f"{', '.join(keys)} are stored as one parameter here: freeze all of them or none")
        frozen[name] = not wanted.pop()
    ours.load_state_dict(public.state_dict(), assign=True)
    for name, parameter in ours.named_parameters():
        parameter.requires_grad_(not frozen[name])
    return ours.train(public.training)
