"""Who computes the ops: ours, reference PyTorch and the peers. Adding a peer is adding an entry to ``PROVIDERS``.

A provider gets its tensors in the form it would have them in at home, and is timed from there:

* rows in expert order (the form of ``beit3_fast.ops``), or with ``padded`` the (B, S, ...) columns of the public code;
* parameters stacked over the experts, or with ``separate`` a tuple of one tensor an expert.

Whatever else it needs it does in its own time: a peer that takes rows in expert order but wants every sample's tokens
beside each other gathers the two row ranges before its kernel and scatters the result after it. Index tensors, which a
model would build once for all its layers, are made beforehand. These peers exist here alone: no model chooses them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beit3_fast import ops
from beit3_fast.layout import TokenLayout

from .cases import check_known
from .op_cases import OpCase

EPS = 1e-5

Compute = Callable[..., Tensor]
"""Takes the op's tensors by name, returns its output."""

Build = Callable[[OpCase, TokenLayout], Compute]


def _everywhere(case: OpCase, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class OpProvider:
    """Something that computes ops.

    Attributes:
        name: what ``--provider`` takes.
        builds: for each op it computes, ``build(case, layout)``, which returns the function that is timed.
        missing: why it cannot compute a case on a device, None if it can.
        padded: takes and returns (B, S, ...) rather than rows in expert order.
        separate: takes a parameter as a tuple of one tensor an expert.
        slow_start: compiles for seconds a case, so a quick run leaves it out.
    """

    name: str
    builds: Mapping[str, Build]
    missing: Callable[[OpCase, torch.device], str | None] = _everywhere
    padded: bool = False
    separate: bool = False
    slow_start: bool = False


# ---- ours, and the plain PyTorch beside it ----


def _bounds(layout: TokenLayout) -> tuple[int, ...]:
    return 0, layout.num_vision_rows, layout.num_rows


def _host_offsets(layout: TokenLayout) -> Tensor:
    """For reference PyTorch, which reads them, and would wait for a GPU to say them."""
    return torch.tensor(_bounds(layout), dtype=torch.int32)


def _by_rows(
    function: Callable[..., Any],
    offsets: Callable[[TokenLayout], Tensor] = lambda layout: layout.expert_offsets,
    **known: Callable[[TokenLayout], Any],
) -> Build:
    """For ops that take the experts' offsets as their last positional argument, and by keyword what else is known, if
    they ask for it: those of an older revision (``--base``) may not."""
    asked = inspect.signature(function).parameters

    def build(case: OpCase, layout: TokenLayout) -> Compute:
        given, options = offsets(layout), {name: value(layout) for name, value in known.items() if name in asked}

        def compute(residual: Tensor | None = None, **tensors: Tensor) -> Tensor:
            fused = {} if residual is None else {"residual": residual}
            return function(*tensors.values(), given, **fused, **options)

        return compute

    return build


def _by_samples(function: Callable[..., Tensor]) -> Build:
    return lambda case, layout: lambda qkv: function(qkv, layout, case.shape.heads, mask=case.shape.mask)


# ---- the public code's way: split at the end of the vision tokens, one module an expert, concatenate ----


def _streams(x: Tensor, layout: TokenLayout, expert: Callable[[Tensor, int], Tensor]) -> Tensor:
    parts = torch.split(x, [layout.vision_width, layout.text_width], dim=1)
    return torch.cat([expert(part, index) for index, part in enumerate(parts)], dim=1)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x.float()).type_as(x)


def _public_norm(case: OpCase, layout: TokenLayout) -> Compute:
    def compute(x: Tensor, weight: tuple[Tensor, ...], bias: tuple[Tensor, ...]) -> Tensor:
        return _streams(x, layout, lambda part, e: F.layer_norm(part, part.shape[-1:], weight[e], bias[e], EPS))

    return compute


def _public_linear(case: OpCase, layout: TokenLayout) -> Compute:
    def compute(
        x: Tensor, weight: tuple[Tensor, ...], bias: tuple[Tensor, ...], residual: Tensor | None = None
    ) -> Tensor:
        out = _streams(x, layout, lambda part, e: F.linear(part, weight[e], bias[e]))
        return out if residual is None else residual + out

    return compute


def _public_ffn(case: OpCase, layout: TokenLayout) -> Compute:
    def compute(
        x: Tensor,
        fc1_weight: tuple[Tensor, ...],
        fc1_bias: tuple[Tensor, ...],
        norm_weight: tuple[Tensor, ...],
        norm_bias: tuple[Tensor, ...],
        fc2_weight: tuple[Tensor, ...],
        fc2_bias: tuple[Tensor, ...],
        residual: Tensor | None = None,
    ) -> Tensor:
        def expert(part: Tensor, e: int) -> Tensor:
            hidden = _gelu(F.linear(part, fc1_weight[e], fc1_bias[e]))
            hidden = F.layer_norm(hidden, hidden.shape[-1:], norm_weight[e], norm_bias[e], EPS)
            return F.linear(hidden, fc2_weight[e], fc2_bias[e])

        out = _streams(x, layout, expert)
        return out if residual is None else residual + out

    return compute


def _public_attention(case: OpCase, layout: TokenLayout) -> Compute:
    """Scores and probabilities in memory, softmax in fp32, and the mask applied whether or not anything is padded."""
    hidden = _padding(layout)[:, None, None, :]
    if case.shape.mask == "captioning":
        hidden = hidden | ~_captioning(layout.width, layout.vision_width, layout.device)

    def compute(qkv: Tensor) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, H, S, d]
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
        scores = scores.masked_fill(hidden, -math.inf)
        probabilities = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
        return (probabilities @ v).transpose(1, 2).flatten(2)

    return compute


def _padding(layout: TokenLayout) -> Tensor:
    """(B, S) bool, True where a column is padding."""
    text_column = torch.arange(layout.width, device=layout.device) - layout.vision_width
    return text_column >= layout.text_len.unsqueeze(1)


def _captioning(tokens: int, vision: int, device: torch.device) -> Tensor:
    """(S, S) bool: which key (column) a query (row) of a sample sees; image sees image, text sees image and the text up
    to itself."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril() | (
        torch.arange(tokens, device=device) < vision
    )


PUBLIC: dict[str, Build] = {
    "layer_norm": _public_norm,
    "multiway_linear": _public_linear,
    "multiway_ffn": _public_ffn,
    "attention": _public_attention,
}


def _compiled(build: Build) -> Build:
    def compiled(case: OpCase, layout: TokenLayout) -> Compute:
        torch.compiler.reset()  # graphs of earlier cases count towards the limit on recompilations
        return torch.compile(build(case, layout), fullgraph=True, dynamic=False)

    return compiled


# ---- attention libraries: they want a sample's tokens beside each other ----


def _sample_rows(layout: TokenLayout) -> list[Tensor]:
    """For each sample, the rows of its virtual sequence."""
    pieces = []
    for vision_start, vision_len, text_start, text_len in layout.segments.tolist():
        ranges = (range(vision_start, vision_start + vision_len), range(text_start, text_start + text_len))
        pieces.append(torch.tensor([row for rows in ranges for row in rows], device=layout.device))
    return pieces


def _back(order: Tensor) -> Tensor:
    """Where each row went: the inverse of a permutation."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def _sdpa_padded(case: OpCase, layout: TokenLayout) -> Compute:
    samples = _sample_rows(layout)
    lengths = [rows.numel() for rows in samples]
    width = max(lengths)
    order = torch.stack([F.pad(rows, (0, width - rows.numel())) for rows in samples])  # [B, S], padding reads row 0
    valid = torch.arange(width, device=layout.device) < torch.tensor(lengths, device=layout.device).unsqueeze(1)
    back = valid.flatten().nonzero().flatten()[_back(torch.cat(samples))]
    allowed = None if min(lengths) == width else valid[:, None, None, :]
    if case.shape.mask == "captioning":
        seen = _captioning(width, case.batch.vision, layout.device)
        allowed = seen if allowed is None else seen & allowed

    def compute(qkv: Tensor) -> Tensor:
        q, k, v = qkv.index_select(0, order.flatten()).unflatten(0, order.shape).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return out.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, back)

    return compute


def _sdpa_per_sample(case: OpCase, layout: TokenLayout) -> Compute:
    samples = _sample_rows(layout)
    back = _back(torch.cat(samples))
    masks = [
        _captioning(rows.numel(), case.batch.vision, layout.device) if case.shape.mask == "captioning" else None
        for rows in samples
    ]

    def compute(qkv: Tensor) -> Tensor:
        outs = []
        for rows, mask in zip(samples, masks, strict=True):
            q, k, v = qkv.index_select(0, rows).permute(1, 2, 0, 3).unsqueeze(1)
            outs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1).flatten(1))
        return torch.cat(outs).index_select(0, back)

    return compute


def _xformers(case: OpCase, layout: TokenLayout) -> Compute:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    samples = _sample_rows(layout)
    order = torch.cat(samples)
    back = _back(order)
    mask = BlockDiagonalMask.from_seqlens([rows.numel() for rows in samples])

    def compute(qkv: Tensor) -> Tensor:
        q, k, v = qkv.index_select(0, order).unsqueeze(0).unbind(2)  # each [1, N, H, d]
        return memory_efficient_attention(q, k, v, attn_bias=mask)[0].flatten(1).index_select(0, back)

    return compute


def _flash_attn(case: OpCase, layout: TokenLayout) -> Compute:
    from flash_attn import flash_attn_varlen_func

    samples = _sample_rows(layout)
    order = torch.cat(samples)
    back = _back(order)
    lengths = [rows.numel() for rows in samples]
    ends = torch.tensor([0, *lengths], device=layout.device).cumsum(0).int()

    def compute(qkv: Tensor) -> Tensor:
        q, k, v = qkv.index_select(0, order).unbind(1)
        out = flash_attn_varlen_func(q, k, v, ends, ends, max(lengths), max(lengths))
        return out.flatten(1).index_select(0, back)

    return compute


# ---- per-token libraries: they take rows in expert order as they are ----


def _ranges(rows: Tensor, layout: TokenLayout, expert: Callable[[Tensor, int], Tensor]) -> Tensor:
    parts = rows.split([layout.num_vision_rows, layout.num_text_rows])
    return torch.cat([expert(part, index) for index, part in enumerate(parts)])


def _grouped(x: Tensor, weight: Tensor, bias: Tensor, layout: TokenLayout) -> Tensor:
    out = F.grouped_mm(x, weight.transpose(-2, -1), offs=layout.expert_offsets[1:])
    return _ranges(out, layout, lambda part, e: part + bias[e])  # it has no bias of its own


def _grouped_linear(case: OpCase, layout: TokenLayout) -> Compute:
    def compute(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        out = _grouped(x, weight, bias, layout)
        return out if residual is None else residual + out

    return compute


def _grouped_ffn(case: OpCase, layout: TokenLayout) -> Compute:
    def compute(
        x: Tensor,
        fc1_weight: Tensor,
        fc1_bias: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        fc2_weight: Tensor,
        fc2_bias: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        hidden = _gelu(_grouped(x, fc1_weight, fc1_bias, layout))
        hidden = _ranges(
            hidden, layout, lambda part, e: F.layer_norm(part, part.shape[-1:], norm_weight[e], norm_bias[e], EPS)
        )
        out = _grouped(hidden, fc2_weight, fc2_bias, layout)
        return out if residual is None else residual + out

    return compute


def _liger_norm(case: OpCase, layout: TokenLayout) -> Compute:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def compute(x: Tensor, weight: tuple[Tensor, ...], bias: tuple[Tensor, ...]) -> Tensor:
        return _ranges(x, layout, lambda part, e: LigerLayerNormFunction.apply(part, weight[e], bias[e], EPS))

    return compute


def _gpu_package(package: str, *dtypes: torch.dtype) -> Callable[[OpCase, torch.device], str | None]:
    """Needs an installed package, a GPU, and one of ``dtypes`` where some are named."""

    def missing(case: OpCase, device: torch.device) -> str | None:
        if find_spec(package) is None:
            return f"{package} is not installed"
        if device.type != "cuda":
            return "needs a GPU"
        if dtypes and case.dtype not in dtypes:
            return f"does not take {str(case.dtype).removeprefix('torch.')}"
        if case.shape.mask != "full":
            return f"has no {case.shape.mask} mask over samples of different lengths"
        return None

    return missing


def _no_grouped_mm(case: OpCase, device: torch.device) -> str | None:
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} does not have it"
    if device.type == "cuda" and case.dtype != torch.bfloat16:
        return "takes bfloat16 alone on a GPU"
    return None


OURS = OpProvider(
    "beit3_fast",
    {
        "layer_norm": _by_rows(ops.layer_norm),
        "multiway_linear": _by_rows(ops.multiway_linear, bounds=_bounds),
        "multiway_ffn": _by_rows(ops.multiway_ffn, bounds=_bounds),
        "attention": _by_samples(ops.attention),
    },
)
REFERENCE = OpProvider(
    "reference",
    {
        "layer_norm": _by_rows(ops.layer_norm_reference, _host_offsets),
        "multiway_linear": _by_rows(ops.multiway_linear_reference, _host_offsets),
        "multiway_ffn": _by_rows(ops.multiway_ffn_reference, _host_offsets),
        "attention": _by_samples(ops.attention_reference),
    },
)
PROVIDERS = (
    REFERENCE,  # first: the others are judged by it
    OURS,
    OpProvider("two-stream", PUBLIC, padded=True, separate=True),
    # the two streams' mathematics: reference PyTorch asks for the offsets' values, which breaks its graph in pieces
    OpProvider(
        "two-stream-compiled",
        {op: _compiled(build) for op, build in PUBLIC.items()},
        padded=True,
        separate=True,
        slow_start=True,
    ),
    OpProvider("sdpa-padded", {"attention": _sdpa_padded}),
    OpProvider("sdpa-per-sample", {"attention": _sdpa_per_sample}),
    OpProvider("xformers", {"attention": _xformers}, _gpu_package("xformers")),
    OpProvider("flash-attn", {"attention": _flash_attn}, _gpu_package("flash_attn", torch.float16, torch.bfloat16)),
    OpProvider("grouped_mm", {"multiway_linear": _grouped_linear, "multiway_ffn": _grouped_ffn}, _no_grouped_mm),
    OpProvider("liger", {"layer_norm": _liger_norm}, _gpu_package("liger_kernel"), separate=True),
)


def select_providers(names: Iterable[str] = (), *, quick: bool = False) -> list[OpProvider]:
    """The reference, ours, and the peers of these names; with no names all of them, in a quick run those that take
    long to start as missing.

    Raises:
        ValueError: an unknown name (the nearest known ones are offered).
    """
    names = list(names)
    for name in names:
        check_known("provider", name, [provider.name for provider in PROVIDERS])
    if names:
        return [provider for provider in PROVIDERS if provider.name in (REFERENCE.name, OURS.name, *names)]
    return [_left_out(provider) if quick and provider.slow_start else provider for provider in PROVIDERS]


def _left_out(provider: OpProvider) -> OpProvider:
    return replace(provider, missing=lambda case, device: "left out of a quick run: slow to compile")
