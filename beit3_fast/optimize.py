"""An inference copy of a model: frozen, in a dtype of choice, constants folded."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from .models.modules import MultiwayFeedForward

Model = TypeVar("Model", bound=nn.Module)


def optimize(model: Model, dtype: torch.dtype | None = None) -> Model:
    """A copy of `model` for inference: in eval mode, without gradients, feed-forward blocks folded.

    What the LayerNorm inside each feed-forward block adds up to behind its second layer is computed here once, so that
    a block is two GPU launches; the weights themselves stay as they are. Loading other weights into the copy or moving
    it folds again; writing into its parameters does not.

    Args:
        model: any of the package's models, or a module that contains one; it is not changed.
        dtype: of the copy's floating-point parameters and buffers; None keeps them.

    Raises:
        TypeError: something that is not a module, or holds no feed-forward block of this package.
        ValueError: a dtype that is not floating-point.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating-point dtype, got {dtype}")
    if not any(isinstance(module, MultiwayFeedForward) for module in model.modules()):
        raise TypeError(f"model must be a beit3_fast model, got {type(model).__name__}; see beit3_fast.accelerate")
    optimized = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        optimized.to(dtype)
    for module in optimized.modules():
        if isinstance(module, MultiwayFeedForward):
            module.fold()
    return optimized
