"""The encoder: pre-norm Multiway layers with sub-LayerNorms, over rows in expert order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .. import ops
from ..layout import ExpertRows, TokenLayout
from .config import EncoderConfig
from .embedding import PositionEmbedding
from .modules import DropPath, MultiwayFeedForward, MultiwayLayerNorm, MultiwayLinear
from .released_keys import Piece, translate

EXPERTS = {1: ("",), 2: (".A", ".B"), 3: (".A", ".B", ".VL")}
"""Released suffix of each expert: none when shared, vision, language, and the paper's vision-language expert."""


BYTES_AT_ONCE = 3 * 2**20
"""Of rows in inference on a CPU, see :func:`_in_parts`: 1024 rows of the base model in fp32. There, at batch 24 of 261
tokens, 1.09x the speed of all rows at once (10,000 page faults a forward for 550,000), at batch 8 1.04x; half and twice
as many gain less."""


class Kept(NamedTuple):
    """The rows that somebody reads after the last layer.

    Attributes:
        rows: int32 (K,), row numbers that never fall, so that what is kept is in expert order too.
        vision: how many of them, from the first on, are of the vision part.
    """

    rows: Tensor
    vision: int


class KeyValueStore(Protocol):
    """Takes a layer's fused q/k/v rows and gives its attention output: decoding brings in earlier keys and values."""

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """(N, 3, H, d) -> (N, H * d)"""


class SelfAttention(nn.Module):
    """Fused q/k/v projection, attention over two-part sequences, sub-LayerNorm, output projection."""

    def __init__(self, config: EncoderConfig, num_experts: int) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.num_heads = config.encoder_attention_heads
        self.head_dim = width // self.num_heads
        self.qkv = MultiwayLinear(num_experts, width, 3 * width)
        self.out_proj = MultiwayLinear(num_experts, width, width)
        self.inner_attn_ln = MultiwayLayerNorm(num_experts, width, config.layernorm_eps)

    def project(self, x: Tensor, rows: ExpertRows) -> Tensor:
        """(N, D) -> (N, 3, H, d)"""
        return self.qkv(x, rows).view(-1, 3, self.num_heads, self.head_dim)


class EncoderLayer(nn.Module):
    """x + out(LN(attention(LN(x)))), then x + fc2(LN(gelu(fc1(LN(x))))) (torchscale ``EncoderLayer``, sub-LN)."""

    def __init__(self, config: EncoderConfig, depth: int) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.depth = depth
        self.attention_experts = attention_experts = 1 if config.shared_attention else 2
        self.ffn_experts = ffn_experts = 3 if depth >= config.encoder_layers - config.vl_ffn_layers else 2
        self.self_attn = SelfAttention(config, attention_experts)
        self.self_attn_layer_norm = MultiwayLayerNorm(attention_experts, width, config.layernorm_eps)
        self.ffn = MultiwayFeedForward(ffn_experts, width, config.encoder_ffn_embed_dim, config.layernorm_eps)
        self.final_layer_norm = MultiwayLayerNorm(ffn_experts, width, config.layernorm_eps)
        # drop_path rises linearly with depth; the first layer's is 0
        rate = config.drop_path_rate * depth / max(config.encoder_layers - 1, 1)
        self.drop_path = DropPath(rate) if rate > 0 else None
        translate(self, _layer_pieces(attention_experts, ffn_experts))

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout,
        mask: str | Tensor = "full",
        store: KeyValueStore | None = None,
        row_sample: Tensor | None = None,
        keep: Kept | None = None,
    ) -> Tensor:
        """(N, D) rows -> (N, D) rows, or the (K, D) rows that `keep` names.

        Args:
            row_sample: (N,), each row's sample, where paths are to be dropped.
            keep: all rows by default.
        """
        rows = layout.experts(self.attention_experts)
        attention = self.self_attn
        qkv = attention.project(self.self_attn_layer_norm(x, rows), rows)
        if store is None:
            heads = ops.attention(qkv, layout, attention.num_heads, mask=mask)
        else:
            heads = store.attend(self.depth, qkv)
        if keep is not None:  # keys and values came from every row; from here on no row needs another
            x, heads, rows = x.index_select(0, keep.rows), heads.index_select(0, keep.rows), kept_experts(rows, keep)
            row_sample = None if row_sample is None else row_sample.index_select(0, keep.rows)
        normed = attention.inner_attn_ln(heads, rows)
        x = self._add(x, normed, attention.out_proj, rows, layout.batch_size, row_sample)
        rows = kept_experts(layout.experts(self.ffn_experts), keep)
        return self._add(x, self.final_layer_norm(x, rows), self.ffn, rows, layout.batch_size, row_sample)

    def _add(
        self,
        x: Tensor,
        normed: Tensor,
        branch: nn.Module,
        rows: ExpertRows,
        batch_size: int,
        row_sample: Tensor | None,
    ) -> Tensor:
        if self.drop_path is None or row_sample is None:
            return branch(normed, rows, residual=x)
        return x + self.drop_path(branch(normed, rows), batch_size, row_sample)


def kept_experts(experts: ExpertRows, keep: Kept | None) -> ExpertRows:
    """The experts' rows among those that are kept: how many of these come before each of the old offsets. Rows that no
    expert owned stay past the last."""
    if keep is None:
        return experts
    count, last = keep.rows.shape[0], experts.bounds[-1]
    bounds = (count if bound == last else 0 if bound == 0 else keep.vision for bound in experts.bounds[1:])
    return ExpertRows(torch.searchsorted(keep.rows, experts.offsets, out_int32=True), (0, *bounds))


def _layer_pieces(attention_experts: int, ffn_experts: int) -> list[Piece]:
    """The released keys of a layer, in the public code's order."""

    def stacked(released: str, stored: str, experts: int, names: tuple[str, ...] = ("weight", "bias")) -> list[Piece]:
        return [
            Piece(f"{released}{suffix}.{name}", f"{stored}.{name}", index, experts)
            for index, suffix in enumerate(EXPERTS[experts])
            for name in names
        ]

    pieces = []
    for projection in ("k_proj", "v_proj", "q_proj"):
        index = ("q_proj", "k_proj", "v_proj").index(projection)  # the order in which they are stored
        for expert, suffix in enumerate(EXPERTS[attention_experts]):
            for name in ("weight", "bias"):
                pieces.append(
                    Piece(
                        f"self_attn.{projection}{suffix}.{name}",
                        f"self_attn.qkv.{name}",
                        3 * expert + index,
                        3 * attention_experts,
                    )
                )
    pieces += stacked("self_attn.out_proj", "self_attn.out_proj", attention_experts)
    pieces += stacked("self_attn.inner_attn_ln", "self_attn.inner_attn_ln", attention_experts)
    pieces += stacked("self_attn_layer_norm", "self_attn_layer_norm", attention_experts)
    for expert, suffix in enumerate(EXPERTS[ffn_experts]):
        for part in ("fc1", "fc2", "ffn_layernorm"):
            for name in ("weight", "bias"):
                pieces.append(Piece(f"ffn{suffix}.{part}.{name}", f"ffn.{part}.{name}", expert, ffn_experts))
    pieces += stacked("final_layer_norm", "final_layer_norm", ffn_experts)
    return pieces


def _in_parts(
    layers: Sequence[nn.Module], x: Tensor, layout: TokenLayout, mask: str | Tensor, parts: Sequence[TokenLayout]
) -> Tensor:
    """All layers for the samples of one part, then for the next ones: what lies between two layers stays small, and its
    memory is used again, where for that of a large batch the system has to give new pages in every layer."""
    vision, text = x.split([layout.num_vision_rows, layout.num_text_rows])
    seen = list(vision.split([part.num_vision_rows for part in parts]))
    words = list(text.split([part.num_text_rows for part in parts]))
    for i, part in enumerate(parts):
        rows = torch.cat([seen[i], words[i]])
        for layer in layers:
            rows = layer(rows, part, mask)
        seen[i], words[i] = rows.split([part.num_vision_rows, part.num_text_rows])
    return torch.cat(seen + words)


class Encoder(nn.Module):
    """Position tables, layers, and a final LayerNorm where ``normalize_output`` asks for one."""

    def __init__(self, config: EncoderConfig, vision_tokens: int) -> None:
        super().__init__()
        self.embed_positions = PositionEmbedding(vision_tokens, config.max_source_positions, config.encoder_embed_dim)
        self.layers = nn.ModuleList(EncoderLayer(config, depth) for depth in range(config.encoder_layers))
        self.num_layers = config.encoder_layers
        self.drop_path_rate = config.drop_path_rate
        self.checkpoint_activations = bool(config.checkpoint_activations)
        self.layer_norm = (
            MultiwayLayerNorm(2, config.encoder_embed_dim, config.layernorm_eps) if config.normalize_output else None
        )
        if self.layer_norm is not None:
            translate(
                self,
                [
                    Piece(f"layer_norm{suffix}.{name}", f"layer_norm.{name}", index, 2)
                    for index, suffix in enumerate(EXPERTS[2])
                    for name in ("weight", "bias")
                ],
            )
        self._scale_branches()

    @torch.no_grad()
    def _scale_branches(self) -> None:
        """The sub-LN initialisation: v, out, fc1 and fc2 are scaled by sqrt(log(2 L)) (torchscale ``Encoder``)."""
        scale = math.sqrt(math.log(2 * self.num_layers))
        for layer in self.layers:
            assert isinstance(layer, EncoderLayer)
            attention, ffn = layer.self_attn, layer.ffn
            for linear in (attention.out_proj, ffn.fc1, ffn.fc2):
                linear.weight.mul_(scale)
                linear.bias.mul_(scale)
            for fused in (attention.qkv.weight, attention.qkv.bias):
                fused[:, 2 * attention.num_heads * attention.head_dim :].mul_(scale)

    def forward(
        self,
        x: Tensor,
        layout: TokenLayout,
        mask: str | Tensor = "full",
        store: KeyValueStore | None = None,
        keep: Kept | None = None,
    ) -> Tensor:
        """(N, D) embedded rows -> (N, D) rows, or the (K, D) rows that `keep` names: what is computed for them alone in
        the last layer and after it are the output projection, the feed-forward block and the LayerNorms."""
        layers = list(self.layers)
        if (
            x.device.type == "cpu"
            and store is None
            and not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        ):
            parts = layout.parts(max(1, BYTES_AT_ONCE // (x.shape[1] * x.element_size())))
            if len(parts) > 1:
                early = layers if keep is None else layers[:-1]  # what is kept lies in rows of all samples
                x, layers = _in_parts(early, x, layout, mask, parts), layers[len(early) :]
        row_sample = layout.row_sample if self.training and self.drop_path_rate > 0 else None
        for layer in layers:
            arguments = (x, layout, mask, store, row_sample, keep if layer is self.layers[-1] else None)
            if self.checkpoint_activations and self.training and torch.is_grad_enabled():
                x = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                x = layer(*arguments)
        return x if self.layer_norm is None else self.layer_norm(x, kept_experts(layout.experts(2), keep))
