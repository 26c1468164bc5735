"""Reference PyTorch: BEiT-3 as plain eager modules that issue the public code's tensor operations, one for one.

The public implementation (``torchscale`` 0.3 and ``unilm/beit3``) pins packages that no longer install beside a current
PyTorch. Speed and parity claims still have to be made against it, so this module repeats what it asks of PyTorch: the
same aten operations, on the same values, in the same order, under the released state-dict keys. That covers everything
wasteful about it too (each per-token module splits the sequence, runs both experts and concatenates; six q/k/v products
a layer; materialised scores with an fp32 softmax; a mask applied even when nothing is padded; multiplications by 1.0).
What it leaves out is host work that computes nothing, such as walking all modules to store the split position or
calling dropouts of probability 0, so the reference is if anything a little faster here than at home.

Two differences are deliberate. In float64 the GELU and the softmax stay in float64, where the public code drops to
float32: a float64 copy of this module is therefore a truth to measure every lower precision against. And only what the
benchmarks run is here: the encoder without attention masks, incremental decoding or drop path, and the retrieval head.

``attention="sdpa"`` is no longer the public code: it hands scores, softmax and mask to
``F.scaled_dot_product_attention``, which is what anybody would change first. ``torch.compile`` is judged on that one,
since the compiler does not find the fused kernel behind the public code's products, its fp32 softmax and its mask.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_ONLY = -1
TEXT_ONLY = 0

# Rows 0 and 1 of both position tables are never read: fairseq reserved them and the released weights kept them.
FIRST_POSITION = 2

ATTENTIONS = ("explicit", "sdpa")
"""How scores become mixed values: the public code's operations, or PyTorch's fused ones."""


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


class Multiway(nn.Module):
    """One module per modality: ``A`` for vision tokens, ``B`` for text tokens.

    ``forward(x, split)`` takes (batch, tokens, ...) with the first ``split`` tokens vision; ``IMAGE_ONLY`` and
    ``TEXT_ONLY`` send all of ``x`` through one of the two.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.A = make()
        self.B = make()

    def forward(self, x: Tensor, split: int) -> Tensor:
        if split == IMAGE_ONLY:
            return self.A(x)
        if split == TEXT_ONLY:
            return self.B(x)
        vision, text = torch.split(x, [split, x.size(1) - split], dim=1)
        return torch.cat([self.A(vision), self.B(text)], dim=1)


class PositionTable(nn.Embedding):
    """Learned positions, looked up by the number of tokens in ``x`` alone."""

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(FIRST_POSITION, x.size(1) + FIRST_POSITION, device=x.device).unsqueeze(0)
        return F.embedding(positions, self.weight)


class Positions(Multiway):
    def __init__(self, vision_tokens: int, text_tokens: int, dim: int) -> None:
        nn.Module.__init__(self)
        self.A = PositionTable(vision_tokens + FIRST_POSITION, dim)
        self.B = PositionTable(text_tokens, dim)


class PatchEmbedding(nn.Module):
    """(batch, channels, size, size) to (batch, 1 + patches, dim): a strided convolution behind a class token."""

    def __init__(self, image_size: int, patch_size: int, channels: int, dim: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.num_tokens = (image_size // patch_size) ** 2 + 1
        self.mask_token = nn.Parameter(
            torch.zeros(1, 1, dim)
        )  # in every released file; read by masked pretraining only
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Tensor) -> Tensor:
        if tuple(image.shape[-2:]) != (self.image_size, self.image_size):
            raise ValueError(f"image must be {self.image_size} x {self.image_size} pixels, got {tuple(image.shape)}")
        patches = self.proj(image).flatten(2).transpose(1, 2)
        return torch.cat((self.cls_token.expand(patches.size(0), -1, -1), patches), dim=1)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.k_proj = Multiway(lambda: nn.Linear(dim, dim))
        self.v_proj = Multiway(lambda: nn.Linear(dim, dim))
        self.q_proj = Multiway(lambda: nn.Linear(dim, dim))
        self.out_proj = Multiway(lambda: nn.Linear(dim, dim))
        self.inner_attn_ln = Multiway(lambda: nn.LayerNorm(dim, eps=eps))

    def forward(self, x: Tensor, padding: Tensor | None, split: int) -> tuple[Tensor, Tensor | None]:
        """Returns the attended tokens and the probabilities, which nobody reads but the public code returns as well."""
        q = self.q_proj(x, split)
        k = self.k_proj(x, split)
        v = self.v_proj(x, split)
        mixed, probabilities = self.attend(q, k, v, padding)
        mixed = self.out_proj(self.inner_attn_ln(mixed, split), split)
        if probabilities is not None:
            probabilities = probabilities.unflatten(0, (-1, self.heads)).transpose(1, 0)
        return mixed, probabilities

    def attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values (B, S, D) to mixed values (B, S, D) and probabilities (B * heads, S, S)."""
        assert padding is not None, "the public code applies a mask even when nothing is padded"
        batch, tokens, dim = q.shape
        q *= self.scale

        q, k, v = (t.view(batch, tokens, self.heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        q, k, v = (t.reshape(batch * self.heads, tokens, self.head_dim) for t in (q, k, v))
        scores = torch.bmm(q, k.transpose(1, 2))
        scores = scores.view(batch, self.heads, tokens, tokens)
        scores = scores.masked_fill(padding.unsqueeze(1).unsqueeze(2).to(torch.bool), -math.inf)
        scores = scores.view(batch * self.heads, tokens, tokens)
        probabilities = F.softmax(scores, dim=-1, dtype=_at_least_float32(scores)).type_as(scores)

        mixed = torch.bmm(probabilities, v)
        mixed = mixed.transpose(0, 1).reshape(tokens, batch, dim).transpose(0, 1)
        return mixed, probabilities


class FusedAttention(Attention):
    """The same mathematics through ``F.scaled_dot_product_attention``; it keeps no probabilities."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Without padding there is no mask, which opens the way to the fastest kernels."""
        q, k, v = (t.unflatten(2, (self.heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        allowed = None if padding is None else (padding == 0)[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return mixed.transpose(1, 2).flatten(2), None


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.ffn_layernorm = nn.LayerNorm(hidden, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc1(x.reshape(-1, x.size(-1)))
        hidden = F.gelu(hidden.to(_at_least_float32(hidden))).type_as(hidden)
        return self.fc2(self.ffn_layernorm(hidden)).view(x.shape)


class EncoderLayer(nn.Module):
    residual_scale = 1.0  # multiplied in all the same, as the public code does

    def __init__(self, dim: int, heads: int, hidden: int, eps: float, attention: str = "explicit") -> None:
        super().__init__()
        self.self_attn = (FusedAttention if attention == "sdpa" else Attention)(dim, heads, eps)
        self.self_attn_layer_norm = Multiway(lambda: nn.LayerNorm(dim, eps=eps))
        self.ffn = Multiway(lambda: FeedForward(dim, hidden, eps))
        self.final_layer_norm = Multiway(lambda: nn.LayerNorm(dim, eps=eps))

    def forward(self, x: Tensor, padding: Tensor | None, split: int) -> Tensor:
        attended, _ = self.self_attn(self.self_attn_layer_norm(x, split), padding, split)
        x = x * self.residual_scale + attended
        fed = self.ffn(self.final_layer_norm(x, split), split)
        return x * self.residual_scale + fed


class Encoder(nn.Module):
    embedding_scale = 1.0  # likewise

    def __init__(self, config: Any, vision_tokens: int, attention: str = "explicit") -> None:
        super().__init__()
        self.attention = attention
        dim, eps = config.encoder_embed_dim, config.layernorm_eps
        self.embed_positions = Positions(vision_tokens, config.max_source_positions, dim)
        self.layers = nn.ModuleList(
            EncoderLayer(dim, config.encoder_attention_heads, config.encoder_ffn_embed_dim, eps, attention)
            for _ in range(config.encoder_layers)
        )
        self.layer_norm = Multiway(lambda: nn.LayerNorm(dim, eps=eps)) if config.normalize_output else None

    def forward(self, tokens: Tensor, padding: Tensor | None, split: int) -> tuple[Tensor, Tensor]:
        masked: Tensor | None = padding
        if padding is None:
            padding = torch.zeros([tokens.size(0), tokens.size(1)], device=tokens.device).bool()
            masked = padding if self.attention == "explicit" else None
        embedding = self.embedding_scale * tokens
        x = embedding + self.embed_positions(embedding, split)
        x = x * (1 - padding.unsqueeze(-1).type_as(x))
        for layer in self.layers:
            x = layer(x, masked, split)
        if self.layer_norm is not None:
            x = self.layer_norm(x, split)
        return x, embedding


class BEiT3(nn.Module):
    """The backbone, with torchscale's state-dict keys.

    ``config`` is any object with the public names: ``beit3_fast.models.EncoderConfig`` or torchscale's. Its
    ``drop_path_rate`` must be 0, and ``attention`` one of :data:`ATTENTIONS`: :class:`ValueError` otherwise.
    """

    def __init__(self, config: Any, attention: str = "explicit") -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(map(repr, ATTENTIONS))}, got {attention!r}")
        if config.drop_path_rate:
            raise ValueError(f"drop_path_rate must be 0 in reference PyTorch, got {config.drop_path_rate}")
        self.text_embed = nn.Embedding(config.vocab_size, config.encoder_embed_dim)
        self.vision_embed = PatchEmbedding(
            config.img_size, config.patch_size, config.in_chans, config.encoder_embed_dim
        )
        self.encoder = Encoder(config, self.vision_embed.num_tokens, attention)

    def forward(
        self,
        textual_tokens: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        text_padding_position: Tensor | None = None,
    ) -> dict[str, Any]:
        """Encodes an image (B, C, S, S), token ids (B, T), or both as one sequence, the image first.

        ``text_padding_position`` (B, T) is 1 where the text is padding. Returns ``encoder_out`` (B, tokens, D), what
        went in before positions as ``encoder_embedding``, and the number of vision tokens (-1 image alone, 0 text
        alone) as ``multiway_split_position``. Rows of padded tokens hold finite values without a meaning.
        """
        if visual_tokens is not None and textual_tokens is not None:
            vision = self.vision_embed(visual_tokens)
            split = vision.size(1)
            tokens = torch.cat([vision, self.text_embed(textual_tokens)], dim=1)
            padding = None
            if text_padding_position is not None:
                valid = torch.zeros(vision.shape[:-1]).to(vision.device).bool()
                padding = torch.cat([valid, text_padding_position], dim=1)
        elif visual_tokens is not None:
            tokens, padding, split = self.vision_embed(visual_tokens), None, IMAGE_ONLY
        elif textual_tokens is not None:
            tokens, padding, split = self.text_embed(textual_tokens), text_padding_position, TEXT_ONLY
        else:
            raise ValueError("textual_tokens, visual_tokens or both must be given, got neither")
        out, embedding = self.encoder(tokens, padding, split)
        return {"encoder_out": out, "encoder_embedding": embedding, "multiway_split_position": split}


class BEiT3ForRetrieval(nn.Module):
    """The backbone with the released retrieval head: one unit vector per image and per text."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        dim = config.encoder_embed_dim
        self.beit3 = BEiT3(config)
        self.language_head = nn.Linear(dim, dim, bias=False)
        self.vision_head = nn.Linear(dim, dim, bias=False)
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))

    def forward(
        self,
        image: Tensor | None = None,
        text_description: Tensor | None = None,
        padding_mask: Tensor | None = None,
        only_infer: bool = False,
    ) -> tuple[Tensor | None, ...]:
        """Returns (vision, language) unit vectors (B, D); without ``only_infer`` the contrastive loss comes first."""
        vision = language = None
        if image is not None:
            encoded = self.beit3(visual_tokens=image)["encoder_out"]
            vision = F.normalize(self.vision_head(encoded[:, 0, :]), dim=-1)
        if text_description is not None:
            encoded = self.beit3(text_description, text_padding_position=padding_mask)["encoder_out"]
            language = F.normalize(self.language_head(encoded[:, 0, :]), dim=-1)
        if only_infer:
            return vision, language
        if vision is None or language is None:
            raise ValueError("image and text_description must both be given for the loss")
        return self._contrastive_loss(vision, language), vision, language

    def _contrastive_loss(self, vision: Tensor, language: Tensor) -> Tensor:
        scale = self.logit_scale.exp()
        per_image = scale * vision @ language.T
        per_text = scale * language @ vision.T
        labels = torch.arange(per_image.shape[0], device=vision.device, dtype=torch.long)
        return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def with_weights(
    make: Callable[[], nn.Module], state_dict: dict[str, Tensor], *, device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """Builds a module in eval mode directly with its weights, in memory of its own.

    ``make()`` runs on the meta device, so no time goes into an initialisation that would be overwritten. Keys and
    shapes must match exactly: :class:`RuntimeError` from ``load_state_dict`` otherwise.
    """
    with torch.device("meta"):
        module = make()
    module = module.to(dtype).to_empty(device=device)
    module.load_state_dict(state_dict, strict=True)
    return module.eval()
