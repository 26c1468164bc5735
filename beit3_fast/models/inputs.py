"""Bad input is refused here, by the name that the caller used, before any work.

Values are looked at on the CPU alone: a look at a GPU tensor would be a wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import TokenLayout, host_lengths
from .config import EncoderConfig
from .embedding import PositionEmbedding


@dataclass(frozen=True)
class InputNames:
    """What a model's forward calls its image, its text and its padding mask."""

    image: str = "image"
    text: str = "text"
    padding: str = "padding_mask"


def _readable(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_inputs(
    config: EncoderConfig,
    dtype: torch.dtype,
    image: Tensor | None,
    text: Tensor | None,
    padding: Tensor | None,
    lengths: Sequence[int] | None,
    names: InputNames,
) -> None:
    """The inputs of one forward; padding without text is ignored, as in the public code.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    if image is None and text is None:
        raise ValueError(f"{names.image} or {names.text} must be given, got neither")
    if image is not None:
        check_image(config, dtype, image, names.image)
    if text is not None:
        check_text(config, text, names.text)
        if image is not None and image.shape[0] != text.shape[0]:
            raise ValueError(
                f"{names.image} and {names.text} must have one batch size, got {image.shape[0]} and {text.shape[0]}"
            )
        if padding is not None:
            check_padding(text, padding, names.padding)
        if lengths is not None:
            check_lengths(text, padding, lengths)


def check_image(config: EncoderConfig, dtype: torch.dtype, image: Tensor, name: str) -> None:
    """(batch, channels, img_size, img_size) in the parameters' dtype, unless autocast will see to that."""
    if not isinstance(image, Tensor) or not image.is_floating_point():
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(f"{name} must be a floating-point tensor (normalised pixels), got {got}")
    if image.dtype != dtype and not torch.is_autocast_enabled(image.device.type):
        raise TypeError(f"{name} must have the model's dtype {dtype}, got {image.dtype}")
    size = (config.in_chans, config.img_size, config.img_size)
    if image.ndim != 4 or image.shape[1:] != size:
        raise ValueError(
            f"{name} must have shape (batch, {', '.join(map(str, size))}), got {tuple(image.shape)}; "
            "load_model(path, image_size=...) gives a model of another image size"
        )
    if image.shape[0] == 0:
        raise ValueError(f"{name} is an empty batch; at least one sample is needed")


def check_text(config: EncoderConfig, text: Tensor, name: str) -> None:
    """(batch, tokens) integer ids within the vocabulary, no longer than the position table."""
    if not isinstance(text, Tensor) or text.dtype not in (torch.int64, torch.int32):
        got = text.dtype if isinstance(text, Tensor) else type(text).__name__
        raise TypeError(f"{name} must be an int64 or int32 tensor of token ids, got {got}")
    if text.ndim != 2 or 0 in text.shape:
        raise ValueError(f"{name} must have shape (batch, tokens), neither empty; got {tuple(text.shape)}")
    longest = config.max_source_positions - PositionEmbedding.FIRST
    if text.shape[1] > longest:
        raise ValueError(f"{name} must have at most {longest} tokens (the position table), got {text.shape[1]}")
    if _readable(text):
        low, high = text.aminmax()
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"{name} must hold token ids in [0, {config.vocab_size}), got values from {int(low)} to {int(high)}"
            )


def check_padding(text: Tensor, padding: Tensor, name: str) -> None:
    """The text's shape; 1 = padding, and no text starts with padding unless it is nothing else."""
    if not isinstance(padding, Tensor) or padding.shape != text.shape:
        got = tuple(padding.shape) if isinstance(padding, Tensor) else type(padding).__name__
        raise ValueError(f"{name} must be a tensor of the text's shape {tuple(text.shape)}, got {got}")
    if _readable(padding):
        padded = padding != 0
        inverted = padded[:, 0] & ~padded.all(dim=1)
        if inverted.any():
            row = int(inverted.nonzero()[0])
            raise ValueError(
                f"{name}: 1 = padding, but row {row} pads its first token and not its others; is the mask inverted?"
            )


def check_lengths(text: Tensor, padding: Tensor | None, lengths: Sequence[int]) -> None:
    """One length a text, no longer than its columns, and what the padding mask says where there is one."""
    values = host_lengths("text_lengths", lengths, text.shape[0])
    if max(values) > text.shape[1]:
        raise ValueError(f"text_lengths must not exceed the text's {text.shape[1]} columns, got {values}")
    if padding is not None and _readable(padding):
        valid = (padding == 0).sum(1).tolist()
        if valid != values:
            raise ValueError(f"text_lengths {values} disagree with the padding mask's {valid}")


def check_layout(layout: TokenLayout, image: Tensor | None, text: Tensor | None, vision_tokens: int) -> None:
    """A ready layout of a batch of this size, on its device."""
    given = image if image is not None else text
    assert given is not None
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"layout must be a TokenLayout, got {type(layout).__name__}")
    widths = (0 if image is None else vision_tokens, 0 if text is None else text.shape[1])
    found = (layout.batch_size, layout.vision_width, layout.text_width)
    if found != (given.shape[0], *widths) or layout.num_vision_rows != given.shape[0] * widths[0]:
        raise ValueError(
            f"layout must be of {given.shape[0]} samples of {widths[0]} vision and up to {widths[1]} text tokens, "
            f"got {found[0]} samples of {found[1]} and {found[2]}"
        )
    if layout.device != given.device:
        raise ValueError(f"layout must be on the inputs' device {given.device}, got {layout.device}")


def check_attention_mask(mask: Tensor, queries: int, keys: int, padding: Tensor | None) -> None:
    """(queries, keys), not zero = forbidden. Its columns are the packed ones only if texts are padded on the right."""
    if not isinstance(mask, Tensor) or mask.shape != (queries, keys):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attn_mask must have shape ({queries}, {keys}), queries by keys, 1 = forbidden; got {got}")
    if padding is not None and _readable(padding):
        valid = padding == 0
        if (valid[:, 1:] & ~valid[:, :-1]).any():
            raise ValueError("attn_mask must be None when text_padding_position has padding between valid tokens")


def check_positions(config: EncoderConfig, image: Tensor | None, text: Tensor | None, positions: Tensor) -> None:
    """(1 or batch, tokens) integer rows of the one modality's position table."""
    if image is not None and text is not None:
        raise ValueError("positions must be None for image-text input: each modality has its own table")
    if text is not None:
        (batch_size, tokens), rows = text.shape, config.max_source_positions
    else:
        assert image is not None
        batch_size, tokens = image.shape[0], (config.img_size // config.patch_size) ** 2 + 1
        rows = tokens + PositionEmbedding.FIRST
    if positions.is_floating_point() or positions.shape not in ((1, tokens), (batch_size, tokens)):
        raise ValueError(
            f"positions must be integer of shape (1, {tokens}) or ({batch_size}, {tokens}), "
            f"got {tuple(positions.shape)} {positions.dtype}"
        )
    if _readable(positions):
        low, high = positions.aminmax()
        if low < 0 or high >= rows:
            raise ValueError(f"positions must lie in [0, {rows}), got values from {int(low)} to {int(high)}")
