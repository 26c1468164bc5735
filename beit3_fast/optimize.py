"""An inference copy of a model: frozen, in a dtype of choice, weights packed, constants folded."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

from .models.modules import MultiwayFeedForward, MultiwayLinear

Model = TypeVar("Model", bound=nn.Module)


def optimize(model: Model, dtype: torch.dtype | None = None, *, int8: bool = False) -> Model:
    """A copy of `model` for inference: in eval mode, without gradients, weights packed, feed-forward blocks folded.

    On a CPU the layers' weights are stored in the order in which the products read them; they have another shape then,
    but the state dict, loading and moving are as before, and there is no second copy that a change could leave behind.
    For a GPU, what the LayerNorm inside each feed-forward block adds up to behind its second layer is computed here
    once, so that a block is two launches. Loading other weights into the copy or moving it folds again; writing into
    its parameters does not.

    Args:
        model: any of the package's models, or a module that contains one; it is not changed.
        dtype: of the copy's floating-point parameters and buffers; None keeps them.
        int8: on a CPU, compute the products of the layers (not of the heads and embeddings) in int8: weights in 127
            steps to the largest magnitude of each output, rows in 127 steps to theirs. Faster, and no longer the
            released outputs: the README says how far off.

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
        elif isinstance(module, MultiwayLinear):
            module.pack("int8" if int8 else "as is")
    return optimized
