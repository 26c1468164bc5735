"""The backbone: embeddings and encoder, with the public code's call and the row form that everything here uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import TokenLayout
from .config import EncoderConfig
from .embedding import VisionEmbedding
from .encoder import Encoder, KeyValueStore
from .inputs import InputNames, check_attention_mask, check_inputs

PUBLIC_NAMES = InputNames(image="visual_tokens", text="textual_tokens", padding="text_padding_position")


class BEiT3(nn.Module):
    """The multimodal backbone (torchscale ``BEiT3``): released state-dict keys, call and return values.

    Args:
        args: an :class:`EncoderConfig`, or torchscale's.
    """

    def __init__(self, args: Any, **kwargs: Any) -> None:
        super().__init__()
        config = EncoderConfig.from_args(args)
        self.args = args
        self.config = config
        self.text_embed = nn.Embedding(config.vocab_size, config.encoder_embed_dim)
        nn.init.normal_(self.text_embed.weight, std=config.encoder_embed_dim**-0.5)
        self.vision_embed = VisionEmbedding(
            config.img_size, config.patch_size, config.in_chans, config.encoder_embed_dim
        )
        self.encoder = Encoder(config, self.vision_embed.num_position_embeddings())

    def encode(
        self,
        image: Tensor | None,
        text: Tensor | None,
        text_padding: Tensor | None = None,
        *,
        mask: str | Tensor = "full",
        text_lengths: Sequence[int] | None = None,
        vision_masked_position: Tensor | None = None,
        names: InputNames = InputNames(),  # noqa: B008  (frozen)
    ) -> tuple[Tensor, TokenLayout]:
        """Encoded rows in expert order and their layout; padded text takes no part.

        Args:
            image: (B, C, H, W) or None.
            text: int64/int32 token ids (B, T) or None.
            text_padding: (B, T), 1/True = padding, or None.
            mask: as :func:`beit3_fast.ops.attention` takes it.
            text_lengths: valid tokens of each (right-padded) text, on the host: then nothing waits for the device.
            vision_masked_position: (B, patches), 1 = masked.
            names: what the caller calls these inputs, for error messages.

        Returns:
            rows (N, D), layout.

        Raises:
            TypeError, ValueError: bad input, named in the message.
        """
        self.check_inputs(image, text, text_padding, text_lengths, names)
        layout = self._layout(image, text, text_padding, text_lengths)
        vision, words = self._embed(image, text, layout, vision_masked_position)
        return self._encode(vision, words, layout, mask), layout

    def _embed(
        self, image: Tensor | None, text: Tensor | None, layout: TokenLayout, vision_masked_position: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Before positions: vision tokens (B, V, D) and the valid words (num_text_rows, D)."""
        vision = None if image is None else self.vision_embed(image, vision_masked_position)
        return vision, None if text is None else self.text_embed(layout.pack_text(text))

    def _encode(
        self,
        vision: Tensor | None,
        words: Tensor | None,
        layout: TokenLayout,
        mask: str | Tensor = "full",
        store: KeyValueStore | None = None,
        text_positions: Tensor | None = None,
    ) -> Tensor:
        """:meth:`_embed`'s tokens with their positions, joined in expert order, through the encoder."""
        positions, rows = self.encoder.embed_positions, []
        if vision is not None:
            rows.append((vision + positions.vision()).flatten(0, 1))
        if words is not None:
            rows.append(words + (positions.text(layout.text_column) if text_positions is None else text_positions))
        return self.encoder(torch.cat(rows) if len(rows) > 1 else rows[0], layout, mask, store)

    def forward(
        self,
        textual_tokens: Tensor | None = None,
        visual_tokens: Tensor | None = None,
        text_padding_position: Tensor | None = None,
        attn_mask: Tensor | None = None,
        vision_masked_position: Tensor | None = None,
        incremental_state: dict[int, dict[str, Tensor]] | None = None,
        positions: Tensor | None = None,
        *,
        text_lengths: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """The public call (torchscale ``BEiT3.forward``).

        Args:
            textual_tokens: int64/int32 (B, T) or None.
            visual_tokens: (B, C, H, W) or None.
            text_padding_position: (B, T), 1/True = padding.
            attn_mask: (S, S) over the image's and the text's columns, 1 = forbidden.
            vision_masked_position: (B, patches), 1 = replaced by the mask token.
            incremental_state: {layer: {"prev_key", "prev_value": (B, H, S', d)}}, extended in place by this call's.
            positions: (1 or B, T) rows of the text position table, for text alone; columns + 2 by default.
            text_lengths: valid tokens of each text, on the host (not in the public code).

        Returns:
            dict with ``encoder_out`` (B, S, D): zeros at padded positions, where the public code returns values that
            nothing depends on; ``encoder_embedding`` (B, S, D) before positions; ``encoder_padding_mask`` (B, S);
            ``multiway_split_position`` (-1 image alone, 0 text alone, else the image's token count); ``encoder_states``
            (empty) and ``l_aux`` (a None per layer).

        Raises:
            TypeError, ValueError: bad input, named in the message.
        """
        self.check_inputs(visual_tokens, textual_tokens, text_padding_position, text_lengths, PUBLIC_NAMES)
        dense = incremental_state is not None or positions is not None
        if positions is not None and visual_tokens is not None:
            raise ValueError("positions must be None when visual_tokens is given: they index the text position table")
        if positions is not None and incremental_state is None and text_padding_position is not None:
            raise ValueError("positions must be None when text_padding_position is given")
        layout = self._layout(
            visual_tokens, textual_tokens, None if dense else text_padding_position, None if dense else text_lengths
        )
        if attn_mask is not None:
            earlier = (incremental_state or {}).get(0, {}).get("prev_key")
            check_attention_mask(attn_mask, layout.width, layout.width + (0 if earlier is None else earlier.shape[2]))
        vision, words = self._embed(visual_tokens, textual_tokens, layout, vision_masked_position)
        if dense:
            encoded = self._encode_dense(
                vision, words, layout, text_padding_position, attn_mask, incremental_state or {}, positions
            )
        else:
            encoded = self._encode(vision, words, layout, "full" if attn_mask is None else attn_mask)
        embeddings = [] if vision is None else [vision]
        if textual_tokens is not None:
            embeddings.append(self.text_embed(textual_tokens))
        padding = torch.zeros(layout.batch_size, layout.width, dtype=torch.bool, device=encoded.device)
        if text_padding_position is not None and textual_tokens is not None:
            padding = torch.cat([padding[:, : layout.vision_width], text_padding_position.to(encoded.device)], dim=1)
        return {
            "encoder_out": layout.unpack(encoded),
            "encoder_embedding": torch.cat(embeddings, dim=1),
            "encoder_padding_mask": padding,
            "encoder_states": [],
            "l_aux": [None] * self.encoder.num_layers,
            "multiway_split_position": -1 if textual_tokens is None else layout.vision_width,
        }

    def _encode_dense(
        self,
        vision: Tensor | None,
        words: Tensor | None,
        layout: TokenLayout,
        text_padding: Tensor | None,
        attn_mask: Tensor | None,
        incremental_state: dict[int, dict[str, Tensor]],
        positions: Tensor | None,
    ) -> Tensor:
        """The public code's incremental form: every column takes part, earlier keys and values come from the state."""
        store = IncrementalState(incremental_state, layout, attn_mask)
        table = self.encoder.embed_positions
        text_positions = None
        if words is not None:
            if positions is None:
                text_positions = table.text(layout.text_column)
            else:
                text_positions = table["B"](positions.expand(layout.batch_size, layout.text_width)).flatten(0, 1)
            if text_padding is not None:  # padded words enter as zeros, and are attended to
                kept = (1 - text_padding.to(words)).view(-1, 1)
                words, text_positions = words * kept, text_positions * kept
        return self._encode(vision, words, layout, store=store, text_positions=text_positions)

    def check_inputs(
        self,
        image: Tensor | None,
        text: Tensor | None,
        text_padding: Tensor | None = None,
        text_lengths: Sequence[int] | None = None,
        names: InputNames = InputNames(),  # noqa: B008  (frozen)
    ) -> None:
        """Refuse inputs that this model cannot take, under the caller's names; see ``inputs.py``."""
        dtype = self.vision_embed.proj.weight.dtype
        check_inputs(self.config, dtype, image, text, text_padding, text_lengths, names)

    def _layout(
        self,
        image: Tensor | None,
        text: Tensor | None,
        text_padding: Tensor | None,
        text_lengths: Sequence[int] | None,
    ) -> TokenLayout:
        vision_tokens = 0 if image is None else self.vision_embed.num_position_embeddings()
        if text is None:
            assert image is not None
            return TokenLayout.from_lengths([vision_tokens] * len(image), [0] * len(image), device=image.device)
        batch_size, width = text.shape
        if text_lengths is not None:
            return TokenLayout.from_lengths(
                [vision_tokens] * batch_size, text_lengths, text_width=width, device=text.device
            )
        if text_padding is not None:
            return TokenLayout.from_padding(text_padding, vision_tokens=vision_tokens, device=text.device)
        return TokenLayout.from_lengths([vision_tokens] * batch_size, [width] * batch_size, device=text.device)


class IncrementalState:
    """The public decoding protocol as a :class:`KeyValueStore`: keys and values of earlier calls in a dict of dicts."""

    def __init__(self, state: dict[int, dict[str, Tensor]], layout: TokenLayout, forbidden: Tensor | None) -> None:
        self.state = state
        self.layout = layout
        self.allowed = None if forbidden is None else forbidden == 0

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """(N, 3, H, d) rows of whole samples -> (N, H * d)."""
        q, k, v = self.layout.unpack(qkv).permute(2, 0, 3, 1, 4)  # each [B, H, S, d]
        earlier = self.state.setdefault(layer, {})
        if "prev_key" in earlier:
            k = torch.cat([earlier["prev_key"], k], dim=2)
            v = torch.cat([earlier["prev_value"], v], dim=2)
        earlier["prev_key"], earlier["prev_value"] = k, v
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=self.allowed)
        return self.layout.pack(heads.transpose(1, 2).flatten(2))


_: type[KeyValueStore] = IncrementalState
