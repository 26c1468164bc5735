"""Multi-head attention over two-part (vision, text) sequences whose rows lie in expert order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import TokenLayout
from . import _library
from ._library import by_reference, wide
from ._triton import precision

MASKS = ("full", "captioning", "causal")


def attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    layout: TokenLayout,
    num_heads: int,
    *,
    mask: str | Tensor = "full",
    scale: float | None = None,
) -> Tensor:
    """``softmax(scale * q k^T + mask) v`` for every sample and head, each sample's two row ranges read where they lie.

    Args:
        qkv: (N, 3, H, d) fused rows in expert order, or three (N, H, d); fp32, bf16, fp16 or fp64. Softmax is in fp32
            (fp64 for fp64).
        layout: where each sample's rows are.
        num_heads: H.
        mask: "full"; "captioning" (image sees image; text sees image and earlier text, itself included: ``uni_mask`` of
            the public ``BEiT3ForCaptioning``); "causal"; or a bool or integer tensor (S, S) over positions of the
            virtual sequence, S >= layout.width, 1/True = forbidden. A query that may see no key gives zeros.
        scale: of the scores; ``d ** -0.5`` by default.

    Returns:
        (N, H * d) rows in expert order. Rows past ``layout.expert_offsets[-1]`` are unspecified.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device, named in the message.
    """
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"layout must be a TokenLayout, got {type(layout).__name__}")
    if not isinstance(qkv, Tensor):
        if not isinstance(qkv, (tuple, list)) or not all(isinstance(part, Tensor) for part in qkv):
            raise TypeError(f"qkv must be a tensor or three tensors, got {type(qkv).__name__}")
        if len({(part.shape, part.dtype, part.device) for part in qkv}) != 1 or len(qkv) != 3:
            got = ", ".join(f"{tuple(part.shape)} {part.dtype} {part.device}" for part in qkv)
            raise ValueError(f"qkv must be one tensor or three of one shape, dtype and device, got {got}")
        qkv = torch.stack(tuple(qkv), dim=1)
    if (
        qkv.ndim != 4
        or qkv.shape[3] == 0
        or qkv.shape[:3] != (layout.num_rows, 3, num_heads)
        or not qkv.is_floating_point()
    ):
        raise ValueError(
            f"qkv must be floating-point of shape ({layout.num_rows}, 3, {num_heads}, d), the rows of the layout and "
            f"num_heads; got {tuple(qkv.shape)} {qkv.dtype}"
        )
    if layout.device != qkv.device:
        raise ValueError(f"layout must be on qkv's device {qkv.device}, got {layout.device}")
    name, forbidden = "full", None
    if isinstance(mask, Tensor):
        if mask.ndim != 2 or mask.shape[0] != mask.shape[1] or mask.shape[0] < layout.width:
            raise ValueError(
                f"mask must be bool or integer of shape (S, S) with S >= {layout.width}, 1 = forbidden; "
                f"got {tuple(mask.shape)} {mask.dtype}"
            )
        if mask.is_floating_point() or mask.is_complex():
            raise ValueError(f"mask must be bool or integer, 1 = forbidden, got {mask.dtype}")
        if mask.device != qkv.device:
            raise ValueError(f"mask must be on qkv's device {qkv.device}, got {mask.device}")
        forbidden = mask.bool()
    elif mask in MASKS:
        name = mask
    else:
        raise ValueError(f"mask must be one of {', '.join(map(repr, MASKS))} or a tensor, got {mask!r}")
    if scale is not None and not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number, got {type(scale).__name__}")
    scale = qkv.shape[-1] ** -0.5 if scale is None else float(scale)
    if by_reference():
        return attention_reference(qkv, layout, num_heads, mask=mask, scale=scale)
    save = torch.is_grad_enabled() and qkv.requires_grad
    return _attention(qkv, layout.segments, forbidden, name, scale, layout.width, save)[0]


def attention_reference(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    layout: TokenLayout,
    num_heads: int,
    *,
    mask: str | Tensor = "full",
    scale: float | None = None,
) -> Tensor:
    """:func:`attention` in plain PyTorch: per sample, scores and probabilities in memory."""
    q, k, v = qkv.unbind(1) if isinstance(qkv, Tensor) else qkv
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    forbidden = mask.bool() if isinstance(mask, Tensor) else None
    name = "full" if isinstance(mask, Tensor) else mask
    pieces, order = [], []
    for rows, vision_len in _samples(layout.segments):
        probabilities, _ = _probabilities(q[rows], k[rows], _forbidden(name, forbidden, vision_len, rows), scale)
        pieces.append(torch.einsum("hij,jhd->ihd", probabilities.to(v.dtype), v[rows]))
        order.append(rows)
    if not pieces:
        return torch.zeros_like(q).flatten(1) + q[:0].sum()  # zeros, tied to the graph
    out = pieces[0].new_zeros(q.shape)
    return out.index_copy(0, torch.cat(order), torch.cat(pieces)).flatten(1)


def _samples(layout_segments: Tensor) -> Iterator[tuple[Tensor, int]]:
    """(rows of the virtual sequence, vision length) of every sample that has tokens."""
    device = layout_segments.device
    for vision_start, vision_len, text_start, text_len in layout_segments.tolist():
        if vision_len + text_len:
            vision = torch.arange(vision_start, vision_start + vision_len, device=device)
            text = torch.arange(text_start, text_start + text_len, device=device)
            yield torch.cat([vision, text]), vision_len


def rows_of_positions(layout_segments: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Row of each position of each sample's virtual sequence, and whether there is one: int64 and bool (B, width), 0
    and False past a sample's end. Nothing is read on the host."""
    vision_start, vision_len, text_start, text_len = layout_segments.long().unsqueeze(-1).unbind(1)  # each [B, 1]
    position = torch.arange(width, device=layout_segments.device)
    rows = torch.where(position < vision_len, vision_start + position, text_start + position - vision_len)
    exists = position < vision_len + text_len
    return torch.where(exists, rows, 0), exists


def gather_samples(tensor: Tensor, rows: Tensor, exists: Tensor) -> Tensor:
    """(N, ...) rows -> (B, width, ...) samples, zeros past their ends."""
    if tensor.shape[0] == 0:
        return tensor.new_zeros(*exists.shape, *tensor.shape[1:])
    return tensor[rows].masked_fill(~exists.view(*exists.shape, *[1] * (tensor.ndim - 1)), 0)


def _scatter_samples(samples: Tensor, rows: Tensor, exists: Tensor, num_rows: int) -> Tensor:
    """The inverse of :func:`gather_samples`; rows of no sample are zeros."""
    out = samples.new_zeros(num_rows + 1, *samples.shape[2:])  # the last one takes what does not exist
    out[torch.where(exists, rows, num_rows)] = samples
    return out[:num_rows]


def _forbidden(mask: str, forbidden: Tensor | None, vision_len: int | Tensor, like: Tensor) -> Tensor | None:
    """(S, S) bool, True = the query (row) may not see the key (column), S the last dimension of `like`; None =
    everything may be seen. With a vision length a sample (B, 1, 1), (B, S, S)."""
    length = like.shape[-1]
    if forbidden is not None:
        return forbidden[:length, :length]
    if mask == "full":
        return None
    position = torch.arange(length, device=like.device)
    later = position.unsqueeze(0) > position.unsqueeze(1)  # [S, S]: key after query
    if mask == "captioning":
        later = later & (position >= vision_len)  # image keys are open to all
    return later


def _probabilities(q: Tensor, k: Tensor, forbidden: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """(..., H, S, S) softmax in the wide dtype and its (..., H, S) log-sum-exp, for q, k (..., S, H, d)."""
    # q is scaled first, as in the public code: in fp16 the product alone could overflow
    scores = torch.einsum("...ihd,...jhd->...hij", q * scale, k).to(wide(q.dtype))
    if forbidden is not None:
        scores = scores.masked_fill(forbidden, float("-inf"))
    lse = scores.logsumexp(-1)
    # a query with no key at all has lse = -inf: its probabilities are zeros, not NaN
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0).unsqueeze(-1)), lse


def _hidden(mask: str, forbidden: Tensor | None, layout_segments: Tensor, exists: Tensor) -> Tensor:
    """(B, 1, S, S) bool over heads: what the mask forbids, and keys past a sample's end."""
    masked = _forbidden(mask, forbidden, layout_segments[:, 1].view(-1, 1, 1), exists)
    missing = ~exists.unsqueeze(1)  # [B, 1, S]: no query sees such a key
    return (missing if masked is None else masked | missing).unsqueeze(1)


def _plain_forward(
    qkv: Tensor, layout_segments: Tensor, forbidden: Tensor | None, mask: str, scale: float, max_length: int, save: bool
) -> tuple[Tensor, Tensor]:
    num_rows = qkv.shape[0]
    rows, exists = rows_of_positions(layout_segments, max_length)
    hidden = _hidden(mask, forbidden, layout_segments, exists)
    q, k, v = gather_samples(qkv, rows, exists).unbind(2)  # each [B, S, H, d]
    lse = qkv.new_empty(0, dtype=wide(qkv.dtype))
    if save or forbidden is not None:
        probabilities, sample_lse = _probabilities(q, k, hidden, scale)
        out = torch.einsum("bhij,bjhd->bihd", probabilities.to(v.dtype), v)
        if save:
            lse = _scatter_samples(sample_lse.transpose(1, 2), rows, exists, num_rows).t().contiguous()
    else:
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=~hidden, scale=scale).transpose(1, 2)
    return _scatter_samples(out, rows, exists, num_rows).flatten(1), lse


def _fake(
    qkv: Tensor, layout_segments: Tensor, forbidden: Tensor | None, mask: str, scale: float, max_length: int, save: bool
) -> tuple[Tensor, Tensor]:
    num_rows, _, num_heads, head_dim = qkv.shape
    lse = qkv.new_empty((num_heads, num_rows) if save else 0, dtype=wide(qkv.dtype))
    return qkv.new_empty(num_rows, num_heads * head_dim), lse


def _plain_backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    layout_segments: Tensor,
    forbidden: Tensor | None,
    mask: str,
    scale: float,
    max_length: int,
) -> Tensor:
    rows, exists = rows_of_positions(layout_segments, max_length)
    hidden = _hidden(mask, forbidden, layout_segments, exists)
    q, k, v = gather_samples(qkv, rows, exists).unbind(2)  # each [B, S, H, d]
    dy, y = (gather_samples(rows_.view_as(qkv[:, 0]), rows, exists) for rows_ in (dout, out))
    probabilities, _ = _probabilities(q, k, hidden, scale)
    dprobabilities = torch.einsum("bihd,bjhd->bhij", dy, v).to(probabilities.dtype)
    delta = (dy * y).to(probabilities.dtype).sum(-1).transpose(1, 2).unsqueeze(-1)  # [B, H, S, 1]
    dscores = (probabilities * (dprobabilities - delta)).to(q.dtype)
    dq = torch.einsum("bhij,bjhd->bihd", dscores, k) * scale
    dk = torch.einsum("bhij,bihd->bjhd", dscores, q * scale)
    dv = torch.einsum("bhij,bihd->bjhd", probabilities.to(dy.dtype), dy)
    return _scatter_samples(torch.stack((dq, dk, dv), dim=2), rows, exists, qkv.shape[0])


def _backward_fake(dout: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _has_kernel(qkv: Tensor, forbidden: Tensor | None) -> bool:
    from ..kernels import attention as kernels

    # compiled for AMD's gfx942 the kernels spill
    return forbidden is None and qkv.shape[3] <= kernels.MAX_HEAD_DIM and torch.version.hip is None


def _triton_forward(
    qkv: Tensor, layout_segments: Tensor, forbidden: Tensor | None, *args: Any
) -> tuple[Tensor, Tensor]:
    from ..kernels import attention as kernels

    if not _has_kernel(qkv, forbidden):
        return _compiled(qkv, layout_segments, forbidden, *args)
    return kernels.forward(qkv.contiguous(), layout_segments.contiguous(), *args, precision=precision(qkv.dtype))


def _triton_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, layout_segments: Tensor, forbidden: Tensor | None, *args: Any
) -> Tensor:
    from ..kernels import attention as kernels

    if not _has_kernel(qkv, forbidden):
        return _compiled_backward(dout, qkv, out, lse, layout_segments, forbidden, *args)
    tensors = (dout.contiguous(), qkv.contiguous(), out, lse, layout_segments.contiguous())
    return kernels.backward(*tensors, *args, precision=precision(qkv.dtype))


_FORWARD = (
    "(Tensor qkv, Tensor segments, Tensor? forbidden, str mask, float scale, int max_length, bool save)"
    " -> (Tensor out, Tensor lse)"
)
_BACKWARD = (
    "(Tensor dout, Tensor qkv, Tensor out, Tensor lse, Tensor segments, Tensor? forbidden, str mask, float scale,"
    " int max_length) -> Tensor dqkv"
)
_compiled = _library.define_compiled("attention_cpu" + _FORWARD, _plain_forward, _fake)
_compiled_backward = _library.define_compiled("attention_cpu_backward" + _BACKWARD, _plain_backward, _backward_fake)
_attention = _library.define("attention" + _FORWARD, _compiled, _fake, _triton_forward)
_attention_backward = _library.define(
    "attention_backward" + _BACKWARD, _compiled_backward, _backward_fake, _triton_backward
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv, layout_segments, forbidden, ctx.mask, ctx.scale, ctx.max_length, _ = inputs
    ctx.save_for_backward(qkv, *output, layout_segments, forbidden)


def _backward(ctx: Any, dout: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 7
    qkv, _, _, layout_segments, forbidden = saved = ctx.saved_tensors
    options = ctx.mask, ctx.scale, ctx.max_length
    if torch.is_grad_enabled():
        (dqkv,) = _library.gradients_to_differentiate(
            lambda rows: _plain_forward(rows, layout_segments, forbidden, *options, True)[0], (qkv,), (True,), dout
        )
    else:
        dqkv = _attention_backward(dout, *saved, *options)
    return (dqkv, *(None,) * 6)


_library.differentiate(_attention, _setup, _backward)
_library.autocast(_attention, ("qkv",))
