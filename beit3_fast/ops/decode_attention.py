"""Attention of a decoding step: new tokens of every beam against cached keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layout import TokenLayout
from . import _library
from ._library import by_reference, check_tensors, wide
from ._triton import precision
from .attention import gather_samples, rows_of_positions


def decode_attention(
    qkv: Tensor,
    prefix: Tensor,
    layout: TokenLayout,
    words: Tensor,
    history: Tensor,
    length: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """Each beam's T new tokens attend to their sample's prefix, to the beam's words, and to the new tokens up to
    themselves: the rows that "captioning" attention over the whole sequence would give them.

    Nothing is copied to re-order beams: a word's keys and values stay in the slot they were written to, and `history`
    says which slot holds each beam's t-th word. No backward.

    Args:
        qkv: (R * T, 3, H, d), beam after beam, R = B * beams; fp32, bf16, fp16 or fp64.
        prefix: (N, 2, H, d), keys and values at the rows of `layout`; shared by the beams of a sample.
        layout: where each of the B samples' prefix lies.
        words: (C, R, 2, H, d), keys and values by place and slot; what `history` does not name is not read.
        history: int32 (C, R), slots in [0, R).
        length: how many words of each beam count, 0 to C.
        scale: of the scores; ``d ** -0.5`` by default.

    Returns:
        (R * T, H * d).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, or one that asks for a gradient;
            named in the message.
    """
    check_tensors(qkv=qkv, prefix=prefix, words=words, history=history)
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"layout must be a TokenLayout, got {type(layout).__name__}")
    if qkv.ndim != 4 or qkv.shape[1] != 3 or 0 in qkv.shape[2:] or not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating-point of shape (R * T, 3, H, d), got {tuple(qkv.shape)} {qkv.dtype}")
    heads = tuple(qkv.shape[2:])
    if prefix.shape != (layout.num_rows, 2, *heads):
        raise ValueError(f"prefix must have shape {(layout.num_rows, 2, *heads)}, got {tuple(prefix.shape)}")
    if words.ndim != 5 or words.shape[2:] != (2, *heads):
        raise ValueError(f"words must have shape (C, R, 2, {heads[0]}, {heads[1]}), got {tuple(words.shape)}")
    columns, beams = words.shape[:2]
    if layout.batch_size == 0 or beams == 0 or beams % layout.batch_size or qkv.shape[0] % beams:
        raise ValueError(
            f"words must have as many slots as there are beams, a multiple of the {layout.batch_size} samples, and qkv "
            f"as many rows for each; got {beams} slots, {qkv.shape[0]} rows"
        )
    if history.shape != (columns, beams) or history.dtype != torch.int32:
        raise ValueError(
            f"history must be int32 of shape {(columns, beams)}, got {history.dtype} {tuple(history.shape)}"
        )
    if not isinstance(length, int):
        raise TypeError(f"length must be an int, got {type(length).__name__}")
    if not 0 <= length <= columns:
        raise ValueError(f"length must lie in [0, {columns}], the places of words, got {length}")
    for name, tensor in {"prefix": prefix, "words": words, "history": history, "layout": layout.segments}.items():
        if tensor.device != qkv.device:
            raise ValueError(f"{name} must be on qkv's device {qkv.device}, got {tensor.device}")
        if tensor.is_floating_point() and tensor.dtype != qkv.dtype and not torch.is_autocast_enabled(qkv.device.type):
            raise ValueError(f"{name} must have qkv's dtype {qkv.dtype}, got {tensor.dtype}")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (qkv, prefix, words)):
        raise ValueError("qkv, prefix and words must not ask for gradients, decoding has none: use torch.no_grad()")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    scale = heads[1] ** -0.5 if scale is None else float(scale)
    if by_reference():
        return decode_attention_reference(qkv, prefix, layout, words, history, length, scale=scale)
    return _decode_attention(qkv, prefix, layout.segments, words, history, length, scale, layout.width)


def decode_attention_reference(
    qkv: Tensor,
    prefix: Tensor,
    layout: TokenLayout,
    words: Tensor,
    history: Tensor,
    length: int,
    *,
    scale: float | None = None,
) -> Tensor:
    """:func:`decode_attention` in plain PyTorch: scores and probabilities in memory."""
    scale = qkv.shape[3] ** -0.5 if scale is None else scale
    return _forward(qkv, prefix, layout.segments, words, history, length, scale, layout.width)


def _forward(
    qkv: Tensor,
    prefix: Tensor,
    layout_segments: Tensor,
    words: Tensor,
    history: Tensor,
    length: int,
    scale: float,
    max_prefix: int,
) -> Tensor:
    _, slots, _, num_heads, head_dim = words.shape
    samples = layout_segments.shape[0]
    beams, tokens = slots // samples, qkv.shape[0] // slots
    rows, exists = rows_of_positions(layout_segments, max_prefix)
    keys, values = gather_samples(prefix, rows, exists).permute(2, 0, 3, 1, 4)  # each [B, H, P, d]
    q, *new_kv = qkv.view(samples, beams, tokens, 3, num_heads, head_dim).permute(3, 0, 4, 1, 2, 5)
    place = torch.arange(length, device=qkv.device).unsqueeze(1)
    own = words[place, history[:length].long()].unflatten(1, (samples, beams))
    own = own.permute(3, 1, 4, 2, 0, 5)  # [2, B, H, beams, length, d]
    own_keys, own_values = (torch.cat(pair, dim=-2) for pair in zip(own, new_kv, strict=True))
    q = q * scale  # first, as in the public code: in fp16 the product alone could overflow
    # all beams against their one prefix: [B, H, beams * T, P]
    to_prefix = (q.flatten(2, 3) @ keys.transpose(-1, -2)).masked_fill(~exists.view(samples, 1, 1, -1), float("-inf"))
    later = torch.ones(tokens, length + tokens, dtype=torch.bool, device=qkv.device).triu(length + 1)
    to_own = (q @ own_keys.transpose(-1, -2)).masked_fill(later, float("-inf"))
    scores = torch.cat([to_prefix.unflatten(2, (beams, tokens)), to_own], dim=-1).to(wide(q.dtype))
    p_prefix, p_own = scores.softmax(-1).to(q.dtype).split([max_prefix, length + tokens], dim=-1)
    heads = (p_prefix.flatten(2, 3) @ values).unflatten(2, (beams, tokens)) + p_own @ own_values
    return heads.permute(0, 2, 3, 1, 4).reshape(slots * tokens, num_heads * head_dim)


def _fake(qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[2] * qkv.shape[3])


def _triton_forward(qkv: Tensor, *args: Any) -> Tensor:
    from ..kernels import decode_attention as kernels

    if qkv.shape[3] > kernels.MAX_HEAD_DIM or torch.version.hip is not None:
        return _compiled(qkv, *args)
    *tensors, length, scale, max_prefix = args
    contiguous = (tensor.contiguous() for tensor in (qkv, *tensors))
    return kernels.forward(*contiguous, length, scale, max_prefix, precision=precision(qkv.dtype))


_SIGNATURE = (
    "(Tensor qkv, Tensor prefix, Tensor segments, Tensor words, Tensor history, SymInt length, float scale,"
    " int max_prefix) -> Tensor"
)
_compiled = _library.define_compiled("decode_attention_cpu" + _SIGNATURE, _forward, _fake)
_decode_attention = _library.define("decode_attention" + _SIGNATURE, _compiled, _fake, _triton_forward)
_library.autocast(_decode_attention, ("qkv", "prefix", "words"))
