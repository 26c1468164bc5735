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
from .encoder import Encoder, Kept
from .inputs import InputNames, check_attention_mask, check_inputs, check_layout, check_positions

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
        layout: TokenLayout | None = None,
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
            layout: :meth:`layout` of such a batch, made once and used again; text_padding and text_lengths then say
                nothing new and are not looked at.
            names: what the caller calls these inputs, for error messages.

        Returns:
            rows (N, D), layout.

        Raises:
            TypeError, ValueError: bad input, named in the message.
        """
        self.check_inputs(image, text, text_padding, text_lengths, names, layout)
        layout = layout or self.layout(image, text, text_padding, text_lengths)
        vision = None if image is None else self.vision_embed(image, vision_masked_position)
        return self.encoder(self._rows(vision, text, layout), layout, mask), layout

    def encode_first(
        self,
        parts: tuple[str, ...],
        image: Tensor | None,
        text: Tensor | None,
        text_padding: Tensor | None = None,
        *,
        text_lengths: Sequence[int] | None = None,
        layout: TokenLayout | None = None,
        names: InputNames = InputNames(),  # noqa: B008  (frozen)
    ) -> tuple[Tensor, ...]:
        """Each sample's first token as :meth:`encode` gives it, for whoever reads nothing else: what the last layer
        computes for each row on its own it computes for these rows alone.

        Args:
            parts: "vision" (the image's CLS token), "text" (the text's BOS token), or both in this order.
            image, text, text_padding, text_lengths, layout, names: as :meth:`encode` takes them.

        Returns:
            (B, D) for each part; zeros for a sample without such tokens.

        Raises:
            TypeError, ValueError: bad input, named in the message.
        """
        if parts not in (("vision",), ("text",), ("vision", "text")):
            raise ValueError(f"parts must be ('vision',), ('text',) or ('vision', 'text'), got {parts!r}")
        self.check_inputs(image, text, text_padding, text_lengths, names, layout)
        layout = layout or self.layout(image, text, text_padding, text_lengths)
        rows = self._rows(None if image is None else self.vision_embed(image), text, layout)
        if layout.num_rows == 0:  # texts of nothing but padding
            return (rows.new_zeros(layout.batch_size, rows.shape[1]),) * len(parts)
        columns = {"vision": (layout.vision_start, layout.vision_len), "text": (layout.text_start, layout.text_len)}
        starts, lengths = zip(*(columns[part] for part in parts), strict=True)
        # a sample without the token gives another's row, or the buffer's last: it still never falls
        keep = Kept(torch.cat(starts).clamp(max=layout.num_rows - 1), layout.batch_size if "vision" in parts else 0)
        firsts = self.encoder(rows, layout, keep=keep).split(layout.batch_size)
        return tuple(
            torch.where((length > 0).unsqueeze(1), first, 0) for first, length in zip(firsts, lengths, strict=True)
        )

    def _rows(
        self, vision: Tensor | None, text: Tensor | None, layout: TokenLayout, positions: Tensor | None = None
    ) -> Tensor:
        """Vision tokens (B, V, D) and token ids (B, T) to embedded rows in expert order."""
        tables, rows = self.encoder.embed_positions, []
        if vision is not None:
            table = tables.vision(layout.vision_width) if positions is None else tables["A"](positions)
            rows.append((vision + table).flatten(0, 1))
        if text is not None:
            # Expanded over the batch, then packed: the table's gradient is then one sum over samples. A lookup by
            # column would add it up in the parameters' dtype, sample after sample.
            table = tables.text(layout.text_width) if positions is None else tables["B"](positions)
            columns = table.expand(layout.batch_size, layout.text_width, -1)
            rows.append(self.text_embed(layout.pack_text(text)) + layout.pack_text(columns))
        return torch.cat(rows) if len(rows) > 1 else rows[0]

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
        layout: TokenLayout | None = None,
    ) -> dict[str, Any]:
        """The public call (torchscale ``BEiT3.forward``).

        Args:
            textual_tokens: int64/int32 (B, T) or None.
            visual_tokens: (B, C, H, W) or None.
            text_padding_position: (B, T), 1/True = padding.
            attn_mask: (S, S) over the image's and the text's columns, 1 = forbidden.
            vision_masked_position: (B, patches), 1 = replaced by the mask token.
            incremental_state: {layer: {"prev_key", "prev_value": (B, H, S', d)}}, extended in place by this call's.
            positions: (1 or B, S) rows of the position table, for one modality alone; columns + 2 by default.
            text_lengths: valid tokens of each text, on the host (not in the public code).
            layout: :meth:`layout` of such a batch, made once and used again (not in the public code, and not for
                incremental decoding); what it says of padding is then what counts.

        Returns:
            dict with ``encoder_out`` (B, S, D): zeros at padded positions, where the public code returns values that
            nothing depends on; ``encoder_embedding`` (B, S, D) before positions; ``encoder_padding_mask`` (B, S);
            ``multiway_split_position`` (-1 image alone, 0 text alone, else the image's token count); ``encoder_states``
            (empty) and ``l_aux`` (a None per layer).

        Raises:
            TypeError, ValueError: bad input, named in the message.
        """
        self.check_inputs(visual_tokens, textual_tokens, text_padding_position, text_lengths, PUBLIC_NAMES, layout)
        if positions is not None:
            check_positions(self.config, visual_tokens, textual_tokens, positions)
        # the public code lets padded columns take part (as zeros) when it decodes incrementally
        dense = incremental_state is not None
        if layout is not None and dense:
            raise ValueError("layout must be None with incremental_state, where padded columns take part")
        layout = layout or self.layout(
            visual_tokens, textual_tokens, None if dense else text_padding_position, None if dense else text_lengths
        )
        if attn_mask is not None:
            earlier = (incremental_state or {}).get(0, {}).get("prev_key")
            keys = layout.width + (0 if earlier is None else earlier.shape[2])
            check_attention_mask(attn_mask, layout.width, keys, None if dense else text_padding_position)
            attn_mask = attn_mask != 0
        vision = None if visual_tokens is None else self.vision_embed(visual_tokens, vision_masked_position)
        rows = self._rows(vision, textual_tokens, layout, positions)
        if incremental_state is None:
            encoded = self.encoder(rows, layout, "full" if attn_mask is None else attn_mask)
        else:
            if text_padding_position is not None and textual_tokens is not None:
                padded = text_padding_position.flatten().unsqueeze(1) != 0
                seen, words = rows.split([layout.num_vision_rows, layout.num_text_rows])
                rows = torch.cat([seen, words.masked_fill(padded, 0)])
            encoded = self.encoder(rows, layout, store=IncrementalState(incremental_state, layout, attn_mask))
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

    def check_inputs(
        self,
        image: Tensor | None,
        text: Tensor | None,
        text_padding: Tensor | None = None,
        text_lengths: Sequence[int] | None = None,
        names: InputNames = InputNames(),  # noqa: B008  (frozen)
        layout: TokenLayout | None = None,
    ) -> None:
        """Refuse inputs that this model cannot take, under the caller's names; see ``inputs.py``."""
        dtype = self.vision_embed.proj.weight.dtype
        if layout is not None:
            text_padding = text_lengths = None
        check_inputs(self.config, dtype, image, text, text_padding, text_lengths, names)
        if layout is not None:
            check_layout(layout, image, text, self.vision_embed.num_position_embeddings())

    def layout(
        self,
        image: Tensor | None,
        text: Tensor | None,
        text_padding: Tensor | None = None,
        text_lengths: Sequence[int] | None = None,
    ) -> TokenLayout:
        """Where each token of a batch is; of the inputs only shapes, device and what says what is padding are read.

        A forward makes one itself. Whoever runs many batches of one kind, or captures a forward in a CUDA graph, may
        make it once and hand it over: with ``text_padding`` on a GPU it has room for every column, and the same
        launches then serve all lengths.

        Args:
            image: (B, C, H, W) or None. text: (B, T) or None; one of them is needed.
            text_padding: (B, T), 1/True = padding. text_lengths: valid tokens of each (right-padded) text, on the host.

        Raises:
            TypeError, ValueError: lengths or a mask that do not fit.
        """
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
            return TokenLayout.from_padding(text_padding != 0, vision_tokens=vision_tokens, device=text.device)
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
