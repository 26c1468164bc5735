"""The released models: the backbone with a head, under the public code's names, signatures and state-dict keys."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..layout import TokenLayout
from .beit3 import BEiT3
from .encoder import Kept
from .generation import BeamCache, Captions, ImagePrefix, beam_search
from .inputs import InputNames
from .losses import ClipLoss
from .modules import MultiwayLayerNorm, MultiwayLinear
from .released_keys import released_names

NormLayer = Callable[[int], nn.Module]


@torch.no_grad()
def _init_weights(module: nn.Module) -> None:
    """Linear weights from a normal of std .02 cut at one std, biases 0, LayerNorms 1 and 0 (unilm ``BEiT3Wrapper``)."""
    if isinstance(module, (nn.Linear, MultiwayLinear)):
        # the inverse of the cumulative distribution: 40 ms for 3072 x 3072, where nn.init.trunc_normal_ takes 1429
        inside = math.erf(1 / math.sqrt(2))
        module.weight.uniform_(-inside, inside).erfinv_().mul_(0.02 * math.sqrt(2)).clamp_(-0.02, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.LayerNorm, MultiwayLayerNorm)):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def _scale(linear: nn.Module, factor: float = 0.001) -> None:
    if isinstance(linear, nn.Linear):
        linear.weight.mul_(factor)
        linear.bias.mul_(factor)


class BEiT3Wrapper(nn.Module):
    """A backbone in ``self.beit3`` and what the public fine-tuning code asks of a model.

    Args:
        args: an :class:`EncoderConfig`, or torchscale's.
    """

    def __init__(self, args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.args = args
        self.beit3 = BEiT3(args)
        self.apply(_init_weights)

    def get_num_layers(self) -> int:
        return self.beit3.encoder.num_layers

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that the public recipe does not decay. Those it finds by their one dimension are two-dimensional
        here (a row per expert) and therefore named."""
        names = {
            "pos_embed",
            "cls_token",
            "beit3.encoder.embed_positions.A.weight",
            "beit3.vision_embed.cls_token",
            "logit_scale",
        }
        parameters = dict(self.named_parameters())
        return names | {
            name for name, keys in released_names(self).items() if keys != [name] and parameters[name].ndim == 2
        }

    def _embed_dim(self) -> int:
        return self.beit3.config.encoder_embed_dim


class TwoLayerMLP(nn.Module):
    """LN, Linear, LN, GELU, Linear."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int,
        norm_layer: NormLayer,
        norm_input: bool = True,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(in_features) if norm_input else nn.Identity()
        self.dense1 = nn.Linear(in_features, hidden_features)
        self.norm2 = norm_layer(hidden_features)
        self.act = nn.GELU()
        self.dense2 = nn.Linear(hidden_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(self.act(self.norm2(self.dense1(self.norm1(x)))))


class Pooler(nn.Module):
    """LN, Linear, tanh of one row per sample."""

    def __init__(self, input_features: int, output_features: int, norm_layer: NormLayer) -> None:
        super().__init__()
        self.norm = norm_layer(input_features)
        self.dense = nn.Linear(input_features, output_features)
        self.activation = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        """(B, D) -> (B, D)"""
        return self.activation(self.dense(self.norm(x)))


class BEiT3ForVisualReasoning(BEiT3Wrapper):
    """NLVR2: is a statement about two images true?"""

    def __init__(self, args: Any, num_classes: int, norm_layer: NormLayer = nn.LayerNorm, **kwargs: Any) -> None:
        super().__init__(args)
        width = self._embed_dim()
        self.head = TwoLayerMLP(width * 4, width * 2, num_classes, norm_layer)
        self.head.apply(_init_weights)
        _scale(self.head.dense1)
        _scale(self.head.dense2)

    def forward(
        self,
        image_a: Tensor,
        image_b: Tensor,
        text_description: Tensor,
        padding_mask: Tensor | None,
        *,
        text_lengths: Sequence[int] | None = None,
        layout: TokenLayout | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Images (B, C, H, W), text (B, T), padding (B, T) with 1 = padding -> logits (B, num_classes).

        `layout` (:meth:`BEiT3.layout`) is of the 2B samples: image a's, then image b's.
        """
        for name, image in (("image_a", image_a), ("image_b", image_b)):
            self.beit3.check_inputs(
                image, text_description, padding_mask, text_lengths, InputNames(name, "text_description")
            )
        cls = self.beit3.encode_first(
            ("vision", "text"),
            torch.cat([image_a, image_b]),
            torch.cat([text_description, text_description]),
            None if padding_mask is None else torch.cat([padding_mask, padding_mask]),
            text_lengths=None if text_lengths is None else [*text_lengths, *text_lengths],
            layout=layout,
        )
        pairs = torch.cat(cls, dim=-1)  # [2B, 2D]: image a's samples, then image b's
        return self.head(torch.cat(pairs.chunk(2), dim=-1))


class BEiT3ForImageClassification(BEiT3Wrapper):
    """Image classification from the mean of the patch tokens; the text experts take no part."""

    def __init__(self, args: Any, num_classes: int, norm_layer: NormLayer = nn.LayerNorm, **kwargs: Any) -> None:
        super().__init__(args)
        width = self._embed_dim()
        self.fc_norm = norm_layer(width)
        self.head = nn.Linear(width, num_classes) if num_classes > 0 else nn.Identity()
        self.fc_norm.apply(_init_weights)
        self.head.apply(_init_weights)
        _scale(self.head)

    def forward(self, image: Tensor, *, layout: TokenLayout | None = None, **kwargs: Any) -> Tensor:
        """(B, C, H, W) -> logits (B, num_classes); `layout`: :meth:`BEiT3.layout` of such a batch."""
        rows, layout = self.beit3.encode(image, None, layout=layout)
        patches = rows.view(layout.batch_size, layout.vision_width, -1)[:, 1:]
        return self.head(self.fc_norm(patches.mean(1)))


class BEiT3ForCaptioning(BEiT3Wrapper):
    """Captioning by masked-token prediction, left to right; :meth:`generate` decodes with a key/value cache."""

    def __init__(self, args: Any, **kwargs: Any) -> None:
        super().__init__(args)
        self.mlm_head = nn.Linear(self._embed_dim(), self.beit3.config.vocab_size)
        self.mlm_head.apply(_init_weights)

    def forward(
        self,
        image: Tensor | None,
        text_ids: Tensor,
        padding_mask: Tensor | None,
        language_masked_pos: Tensor | None,
        text_len: int | None = None,
        incremental_state: dict[int, dict[str, Tensor]] | None = None,
        *,
        text_lengths: Sequence[int] | None = None,
        layout: TokenLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[int, dict[str, Tensor]] | None]:
        """The public call, training and incremental decoding.

        Args:
            image: (B, C, H, W); None in later decoding steps.
            text_ids: (B, T).
            padding_mask: (B, T), 1 = padding.
            language_masked_pos: (B, T), 1 = positions to predict; None = all of them.
            text_len: tokens of text so far, in decoding.
            incremental_state: earlier keys and values by layer, extended in place.
            text_lengths: valid tokens of each text, on the host.
            layout: :meth:`BEiT3.layout` of such a batch; not for decoding.

        Returns:
            logits (masked positions, vocabulary) or (B, T, vocabulary), and the incremental state.
        """
        names = InputNames(text="text_ids")
        decodes = image is None or incremental_state is not None
        if layout is not None and decodes:
            raise ValueError("layout must be None in incremental decoding, where padded columns take part")
        padding = padding_mask if image is not None else None
        self.beit3.check_inputs(image, text_ids, padding, text_lengths, names, layout)
        if language_masked_pos is not None and language_masked_pos.shape != text_ids.shape:
            raise ValueError(
                f"language_masked_pos must have the text's shape {tuple(text_ids.shape)}, "
                f"got {tuple(language_masked_pos.shape)}"
            )
        if decodes:
            text_feats = self._incremental(image, text_ids, padding_mask, text_len, incremental_state)
        else:
            rows, layout = self.beit3.encode(
                image,
                text_ids,
                padding_mask,
                mask="captioning",
                text_lengths=text_lengths,
                layout=layout,
                names=names,
            )
            text_feats = layout.unpack(rows)[:, layout.vision_width :]
        if language_masked_pos is not None:
            text_feats = text_feats[language_masked_pos.bool()]
        return self.mlm_head(text_feats), incremental_state

    def _incremental(
        self,
        image: Tensor | None,
        text_ids: Tensor,
        padding_mask: Tensor | None,
        text_len: int | None,
        incremental_state: dict[int, dict[str, Tensor]] | None,
    ) -> Tensor:
        text_len = text_ids.size(1) if text_len is None else text_len
        image_len = self.beit3.vision_embed.num_position_embeddings()
        total = image_len + text_len
        position = torch.arange(total, device=text_ids.device)
        forbidden = (position > position.unsqueeze(1)) & (position >= image_len)  # [query, key]
        positions = None
        if image is None:
            forbidden, padding_mask = forbidden[-2:], None
            positions = torch.arange(text_len, text_ids.size(1) + text_len, device=text_ids.device).unsqueeze(0)
        out = self.beit3(
            text_ids,
            image,
            padding_mask,
            attn_mask=forbidden,
            incremental_state=incremental_state,
            positions=positions,
        )["encoder_out"]
        return out if image is None else out[:, image_len:]

    @torch.no_grad()
    def generate(
        self,
        image: Tensor,
        *,
        num_beams: int = 3,
        max_length: int = 64,
        length_penalty: float = 0.6,
        bos_token_id: int = 0,
        pad_token_id: int = 1,
        eos_token_id: int = 2,
        mask_token_id: int = 64001,
    ) -> Captions:
        """Caption images by beam search: the tokens of the public generation loop, with the image encoded once.

        Args:
            image: (B, C, H, W).
            num_beams: beams per image.
            max_length: tokens of BOS, the words and the placeholder of the next, at least 3.
            length_penalty: exponent of the length in the score; larger favours longer captions.
            bos_token_id, pad_token_id, eos_token_id, mask_token_id: of the released tokenizer by default.

        Returns:
            :class:`Captions`, one per image.

        Raises:
            TypeError, ValueError: bad input, named in the message.
        """
        config = self.beit3.config
        longest = config.max_source_positions - self.beit3.encoder.embed_positions.FIRST
        if num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, got {num_beams}")
        if not 3 <= max_length <= longest:
            raise ValueError(f"max_length must lie in [3, {longest}], got {max_length}")
        special = {
            "bos_token_id": bos_token_id,
            "pad_token_id": pad_token_id,
            "eos_token_id": eos_token_id,
            "mask_token_id": mask_token_id,
        }
        for name, token in special.items():
            if not 0 <= token < config.vocab_size:
                raise ValueError(f"{name} must lie in [0, {config.vocab_size}), got {token}")
        self.beit3.check_inputs(image, None, None)
        layout = TokenLayout.from_lengths(
            [self.beit3.vision_embed.num_position_embeddings()] * len(image), [0] * len(image), device=image.device
        )
        prefix = ImagePrefix(layout, config.encoder_attention_heads)
        positions = self.beit3.encoder.embed_positions
        vision = self.beit3.vision_embed(image) + positions.vision(layout.vision_width)
        # of the last layer, keys and values are all that is read
        nothing = Kept(torch.empty(0, dtype=torch.int32, device=image.device), vision=0)
        self.beit3.encoder(vision.flatten(0, 1), layout, store=prefix, keep=nothing)
        rows = len(image) * num_beams
        cache = BeamCache(prefix, num_beams, columns=max_length - 1)
        step_layout = TokenLayout.from_lengths([0] * rows, [2] * rows, device=image.device)
        mask_tokens = torch.full((rows,), mask_token_id, device=image.device)
        one_expert = torch.arange(0, rows + 1, rows, dtype=torch.int32, device=image.device)  # [0, rows], no wait

        def step(last_words: Tensor, position: int) -> Tensor:
            words = self.beit3.text_embed(torch.stack([last_words, mask_tokens], dim=1))  # [R, 2, D]
            x = words + positions.text(2, start=position)
            out = self.beit3.encoder(x.flatten(0, 1), step_layout, store=cache)
            head, read = self.mlm_head, out[1::2]  # the MASK's row predicts the next word
            # nn.Linear takes three times as long for a handful of rows on a CPU
            return ops.multiway_linear(read, head.weight[None], head.bias[None], one_expert, bounds=(0, rows))

        return beam_search(
            step,
            cache.advance,
            batch_size=len(image),
            num_beams=num_beams,
            max_length=max_length,
            length_penalty=length_penalty,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            special_token_ids=set(special.values()),
            device=image.device,
        )


class BEiT3ForVisualQuestionAnswering(BEiT3Wrapper):
    """VQAv2 as classification over frequent answers."""

    def __init__(self, args: Any, num_classes: int, norm_layer: NormLayer = nn.LayerNorm, **kwargs: Any) -> None:
        super().__init__(args)
        width = self._embed_dim()
        self.pooler = Pooler(width, width, norm_layer)
        self.pooler.apply(_init_weights)
        self.head = nn.Sequential(
            nn.Linear(width, width * 2), norm_layer(width * 2), nn.GELU(), nn.Linear(width * 2, num_classes)
        )
        self.head.apply(_init_weights)

    def forward(
        self,
        image: Tensor,
        question: Tensor,
        padding_mask: Tensor | None,
        *,
        text_lengths: Sequence[int] | None = None,
        layout: TokenLayout | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Image (B, C, H, W), question (B, T), padding (B, T) with 1 = padding -> logits (B, num_classes).

        `layout`: :meth:`BEiT3.layout` of such a batch.
        """
        names = InputNames(text="question")
        (cls,) = self.beit3.encode_first(
            ("vision",), image, question, padding_mask, text_lengths=text_lengths, layout=layout, names=names
        )
        return self.head(self.pooler(cls))


class BEiT3ForRetrieval(BEiT3Wrapper):
    """Dual encoder: images and texts to unit vectors, trained with a contrastive loss over all ranks."""

    def __init__(self, args: Any, **kwargs: Any) -> None:
        super().__init__(args)
        width = self._embed_dim()
        self.language_head = nn.Linear(width, width, bias=False)
        self.vision_head = nn.Linear(width, width, bias=False)
        self.language_head.apply(_init_weights)
        self.vision_head.apply(_init_weights)
        distributed = dist.is_available() and dist.is_initialized()
        self.criterion = ClipLoss(
            rank=dist.get_rank() if distributed else 0, world_size=dist.get_world_size() if distributed else 1
        )
        self.logit_scale = nn.Parameter(torch.ones([]) * math.log(1 / 0.07))

    def forward(
        self,
        image: Tensor | None = None,
        text_description: Tensor | None = None,
        padding_mask: Tensor | None = None,
        only_infer: bool = False,
        *,
        text_lengths: Sequence[int] | None = None,
        layout: TokenLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | None, ...]:
        """Image (B, C, H, W), text (B, T), padding (B, T) with 1 = padding.

        `layout` (:meth:`BEiT3.layout`) is of the texts alone; images are never padded.

        Returns:
            (vision, language) with ``only_infer``, else (loss, vision, language); unit rows (B, D), None for an absent
            modality.
        """
        vision = language = None
        names = InputNames(text="text_description")
        padding, lengths = (padding_mask, text_lengths) if layout is None else (None, None)
        self.beit3.check_inputs(image, text_description, padding, lengths, names)
        if not only_infer and (image is None or text_description is None):
            raise ValueError("image and text_description must both be given for the loss; only_infer=True takes one")
        if image is not None:
            (cls,) = self.beit3.encode_first(("vision",), image, None)
            vision = F.normalize(self.vision_head(cls), dim=-1)
        if text_description is not None:
            (bos,) = self.beit3.encode_first(
                ("text",), None, text_description, padding_mask, text_lengths=text_lengths, layout=layout, names=names
            )
            language = F.normalize(self.language_head(bos), dim=-1)
        if only_infer:
            return vision, language
        loss, _, _ = self.criterion(vision, language, self.logit_scale.exp())
        return loss, vision, language


class BEiT3ForPretraining(BEiT3Wrapper):
    """Masked data modelling: the heads that the released pretraining checkpoints carry.

    Args:
        args: an :class:`EncoderConfig`, or torchscale's.
        num_visual_tokens: codes of the image tokenizer.
    """

    def __init__(self, args: Any, num_visual_tokens: int = 8192, **kwargs: Any) -> None:
        super().__init__(args)
        self.mlm_head = nn.Linear(self._embed_dim(), self.beit3.config.vocab_size)
        self.mim_head = nn.Linear(self._embed_dim(), num_visual_tokens)
        self.mlm_head.apply(_init_weights)
        self.mim_head.apply(_init_weights)

    def forward(
        self,
        image: Tensor | None = None,
        text_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        vision_masked_position: Tensor | None = None,
        language_masked_pos: Tensor | None = None,
        *,
        text_lengths: Sequence[int] | None = None,
        layout: TokenLayout | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Image (B, C, H, W) with masked patches (B, patches), text (B, T) with masked positions (B, T), 1 = masked.

        `layout`: :meth:`BEiT3.layout` of such a batch.

        Returns:
            logits over visual tokens (masked patches, codes), or (B, patches, codes) without a mask, and over words
            (masked positions, vocabulary) or (B, T, vocabulary); None for an absent modality.
        """
        rows, layout = self.beit3.encode(
            image,
            text_ids,
            padding_mask,
            text_lengths=text_lengths,
            vision_masked_position=vision_masked_position,
            layout=layout,
            names=InputNames(text="text_ids"),
        )
        vision, text = layout.unpack(rows).split([layout.vision_width, layout.text_width], dim=1)
        patches = words = None
        if image is not None:
            patches = vision[:, 1:]
            patches = patches if vision_masked_position is None else patches[vision_masked_position.bool()]
        if text_ids is not None:
            words = text if language_masked_pos is None else text[language_masked_pos.bool()]
        return (
            None if patches is None else self.mim_head(patches),
            None if words is None else self.mlm_head(words),
        )
