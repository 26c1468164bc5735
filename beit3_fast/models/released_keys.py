"""Released state-dict keys over fused parameters.

Parameters are stored the way the kernels read them: experts stacked, q/k/v in one matrix. A module with such parameters
lists, in the public code's order, which released key is which slice of which parameter; state-dict hooks translate both
ways, so that checkpoints and strict loading see the released keys alone.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import unpack_weight


@dataclass(frozen=True)
class Piece:
    """``released`` is piece ``index`` of the ``count`` equal pieces of parameter ``stored``, along its leading
    dimensions."""

    released: str
    stored: str
    index: int
    count: int

    def of(self, stored: Tensor) -> Tensor:
        """The piece as a view of the stored parameter ((E, O, I) or (E, O))."""
        rows = stored.shape[0] * stored.shape[1] // self.count
        return stored.reshape(self.count, rows, *stored.shape[2:])[self.index]


def translate(module: nn.Module, pieces: list[Piece]) -> None:
    """Make state_dict() and load_state_dict() of ``module`` speak released keys."""
    module._released_pieces = pieces  # type: ignore[assignment]
    module.register_state_dict_post_hook(_split)
    module.register_load_state_dict_pre_hook(_fuse)


def _split(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    pieces: list[Piece] = module._released_pieces  # type: ignore[assignment]
    stored = {piece.stored: state_dict.pop(prefix + piece.stored) for piece in _one_per_stored(pieces)}
    for piece in pieces:
        state_dict[prefix + piece.released] = piece.of(stored[piece.stored])


def _fuse(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    pieces: list[Piece] = module._released_pieces  # type: ignore[assignment]
    parameters = {
        piece.stored: unpack_weight(module.get_parameter(piece.stored).detach()) for piece in _one_per_stored(pieces)
    }
    found: dict[str, list[tuple[Piece, Tensor]]] = {}
    for own in {piece.stored for piece in pieces} - {piece.released for piece in pieces}:
        if state_dict.pop(prefix + own, None) is not None:  # a name of ours is no released key
            unexpected_keys.append(prefix + own)
    for piece in pieces:
        key = prefix + piece.released
        shape = piece.of(parameters[piece.stored]).shape
        if key not in state_dict:
            missing_keys.append(key)
            continue
        value = state_dict.pop(key)
        if not isinstance(value, Tensor):
            error_msgs.append(
                f"While copying the parameter named {key}, expected a tensor, got {type(value).__name__}."
            )
            continue
        if value.shape != shape:
            error_msgs.append(
                f"size mismatch for {key}: copying a param with shape {value.shape} from checkpoint, "
                f"the shape in current model is {shape}."
            )
            continue
        found.setdefault(piece.stored, []).append((piece, value))
    for stored, parameter in parameters.items():
        arrived = found.get(stored, [])
        if arrived and len(arrived) == arrived[0][0].count:
            dtype = functools.reduce(torch.promote_types, [value.dtype for _, value in arrived])
            fused = torch.empty_like(parameter, dtype=dtype, device=arrived[0][1].device)
        else:  # what is missing keeps its present value
            fused = parameter.clone()
        for part, value in arrived:
            part.of(fused).copy_(value.detach())
        state_dict[prefix + stored] = fused


def _one_per_stored(pieces: list[Piece]) -> list[Piece]:
    return list({piece.stored: piece for piece in pieces}.values())


def released_names(model: nn.Module) -> dict[str, list[str]]:
    """For every parameter of the model the released keys that it holds, in storage order."""
    names: dict[str, list[tuple[int, str]]] = {}
    for prefix, module in model.named_modules():
        prefix = prefix + "." if prefix else ""
        for piece in getattr(module, "_released_pieces", []):
            names.setdefault(prefix + piece.stored, []).append((piece.index, prefix + piece.released))
    return {
        name: [key for _, key in sorted(names[name])] if name in names else [name]
        for name, _ in model.named_parameters()
    }


def released_gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Gradients under released keys: views of the fused parameters' gradients, None where there is none yet."""
    gradients: dict[str, Tensor | None] = {}
    for name, parameter in model.named_parameters():
        gradients[name] = parameter.grad
    for prefix, module in model.named_modules():
        prefix = prefix + "." if prefix else ""
        pieces: list[Piece] = getattr(module, "_released_pieces", [])
        grads = {piece.stored: gradients.pop(prefix + piece.stored) for piece in _one_per_stored(pieces)}
        for piece in pieces:
            grad = grads[piece.stored]
            gradients[prefix + piece.released] = None if grad is None else piece.of(grad)
    return gradients
