"""Images and token ids to rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VisionEmbedding(nn.Module):
    """Patch projection, optional masking, CLS token. Parameters and attributes as in torchscale ``embedding.py``."""

    def __init__(self, img_size: int, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        grid = img_size // patch_size
        self.img_size = (img_size, img_size)
        self.patch_size = (patch_size, patch_size)
        self.patch_shape = (grid, grid)
        self.num_patches = grid * grid
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))

    def num_position_embeddings(self) -> int:
        """Vision tokens per image: the patches and CLS."""
        return self.num_patches + 1

    def forward(self, x: Tensor, masked_position: Tensor | None = None) -> Tensor:
        """(B, C, H, W) -> (B, 1 + patches, D); masked_position (B, patches), 1 = replaced by the mask token.

        Raises:
            ValueError: a mask of another shape. The image itself is checked in ``inputs.py``.
        """
        tokens = self.proj(x).flatten(2).transpose(1, 2)  # [B, patches, D]
        if masked_position is not None:
            if masked_position.shape != tokens.shape[:2]:
                raise ValueError(
                    f"vision_masked_position must have shape {tuple(tokens.shape[:2])} (batch, patches), "
                    f"got {tuple(masked_position.shape)}"
                )
            masked = masked_position.unsqueeze(-1).type_as(tokens)
            tokens = tokens * (1 - masked) + self.mask_token * masked
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], dim=1)


class PositionEmbedding(nn.ModuleDict):
    """A table per modality: "A" vision, "B" text. Both start at row 2, fairseq's convention; rows 0 and 1 are never
    read."""

    FIRST = 2

    def __init__(self, vision_tokens: int, text_rows: int, embed_dim: int) -> None:
        super().__init__(
            {"A": nn.Embedding(vision_tokens + self.FIRST, embed_dim), "B": nn.Embedding(text_rows, embed_dim)}
        )

    def vision(self, tokens: int) -> Tensor:
        """(tokens, D), from CLS on."""
        return self["A"].get_parameter("weight")[self.FIRST : self.FIRST + tokens]

    def text(self, tokens: int, start: int = 0) -> Tensor:
        """(tokens, D), from column ``start`` on; BOS is column 0."""
        first = self.FIRST + start
        return self["B"].get_parameter("weight")[first : first + tokens]
