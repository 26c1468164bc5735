"""Images and texts in, batches out: the public evaluation pipelines without torchvision or transformers.

`ImageTransform` gives, bit for bit, what the public evaluation transforms give on PIL images; `Tokenizer` reads
`beit3.spm` with the ids that XLM-R gives its pieces; `Processor` makes a `Batch` of both, whose text lengths are
host integers, so that the model packs the texts without waiting for a device. `demo_pairs` and
`demo_tokenizer_path` name the small data that come with the package.

Source: unilm/beit3 `datasets.py` (transforms, padding) and transformers 4 `XLMRobertaTokenizer` (ids, special
tokens, decoding).
"""

from __future__ import annotations

import importlib.resources
import json
import math
import operator
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from PIL import Image

__all__ = ["Batch", "ImageTransform", "Processor", "Tokenizer", "demo_pairs", "demo_tokenizer_path"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
PADDINGS = ("max_length", "longest")


def _integer(name: str, value: Any, minimum: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}") from None
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


@dataclass(frozen=True)
class ImageTransform:
    """Resizes an image to size x size with PIL's (antialiased) bicubic filter, scales it to [0, 1] and normalises it.

    Images of any PIL mode become RGB by `convert("RGB")`, which drops an alpha channel. An EXIF orientation is not
    applied: the public loader does not apply it either.

    Args:
        size: side of the result, in pixels.
        mean, std: per channel (R, G, B), on the [0, 1] scale.
        crop: False squeezes the image into the square; True resizes the shorter side to `size` and crops the centre.

    Raises:
        TypeError: a size that is no integer.
        ValueError: a size below 1, or mean and std that are not three finite numbers (std above 0).
    """

    size: int
    mean: Sequence[float] = field(default=HALF, kw_only=True)
    std: Sequence[float] = field(default=HALF, kw_only=True)
    crop: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _integer("size", self.size, 1))
        for name in ("mean", "std"):
            values = tuple(getattr(self, name))
            if len(values) != 3 or not all(math.isfinite(value) for value in values):
                raise ValueError(f"{name} must be three finite numbers, got {values!r}")
            object.__setattr__(self, name, values)  # a list would make equal transforms unequal, and unhashable
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std!r}")

    @classmethod
    def vision_language(cls, size: int) -> ImageTransform:
        """The evaluation transform of every task with text: squeezed to a square, mean = std = 0.5."""
        return cls(size)

    @classmethod
    def imagenet(cls, size: int) -> ImageTransform:
        """The evaluation transform of ImageNet classification (crop_pct 1): centre crop, ImageNet mean and std."""
        return cls(size, mean=IMAGENET_MEAN, std=IMAGENET_STD, crop=True)

    def __call__(self, image: Image.Image | str | os.PathLike[str] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """Transforms one image.

        Args:
            image: a PIL image, the path of an image file, or a uint8 array or tensor (height, width, 3), RGB.

        Returns:
            float32 (3, size, size) on the CPU.

        Raises:
            TypeError: anything else, or an array that is not uint8.
            ValueError: an array of another shape, an image without pixels or too long and thin to resize, or a file
                that is no image or is damaged (the path is named).
            OSError: a file that cannot be opened.
        """
        square = self._square(_rgb(image))
        pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()
        mean = torch.tensor(self.mean, dtype=torch.float32, device="cpu").view(3, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32, device="cpu").view(3, 1, 1)
        # These three roundings, in this order, are the public ones; one scale and shift would differ in the last bit.
        return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)

    def _square(self, image: Image.Image) -> Image.Image:
        size, (width, height) = self.size, image.size
        if min(width, height) < 1:
            raise ValueError(f"image has no pixels: {width} x {height}")
        if not self.crop:
            return image.resize((size, size), Image.Resampling.BICUBIC)
        longer = int(size * max(width, height) / min(width, height))
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and size * longer > 2 * limit:  # PIL's own rule for what it opens
            raise ValueError(f"image is too long and thin to resize its shorter side to {size}: {width} x {height}")
        width, height = (size, longer) if width <= height else (longer, size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - size) / 2), round((height - size) / 2)
        return image.crop((left, top, left + size, top + size))


def _rgb(image: Any) -> Image.Image:
    """The image as a loaded PIL image of mode RGB."""
    if isinstance(image, (str, os.PathLike)):
        with open(image, "rb") as file:
            try:
                return Image.open(file).convert("RGB")
            except Exception as error:  # PIL's decoders raise OSError, SyntaxError, struct.error, ... on damaged files
                raise ValueError(f"image {os.fspath(image)!r} cannot be read: {error}") from error
    if isinstance(image, Image.Image):
        return image if image.mode == "RGB" else image.convert("RGB")
    if isinstance(image, torch.Tensor):
        if image.dtype != torch.uint8:
            raise TypeError(f"image must be uint8, got {image.dtype}")
        image = image.cpu().numpy()
    if not isinstance(image, np.ndarray):
        expected = "a PIL image, a path, or a uint8 array or tensor (height, width, 3)"
        raise TypeError(f"image must be {expected}, got {type(image).__name__}")
    if image.dtype != np.uint8:
        raise TypeError(f"image must be uint8, got {image.dtype}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must have shape (height, width, 3), got {image.shape}")
    if 0 in image.shape:
        raise ValueError(f"image has no pixels: {image.shape[1]} x {image.shape[0]}")
    return Image.fromarray(np.ascontiguousarray(image))


class Tokenizer:
    """A SentencePiece model with the ids of XLM-R, as every released BEiT-3 reads its text. Nothing is lower-cased.

    `<s>` is 0, `<pad>` 1, `</s>` 2, `<unk>` 3; a piece with SentencePiece id i > 2 has id i + 1; `<mask>` comes
    last. The released `beit3.spm` has 64000 pieces, so `<mask>` is 64001 and `vocab_size` 64002; rows 64002 to
    64009 of the released embeddings are unused.

    Attributes and methods have the names of transformers' tokenizers wherever the public training and evaluation
    code reads one, so an instance serves as `tokenizer` there. `encode` is ours: it returns padded tensors. An
    instance can be pickled (data-loader workers).

    Args:
        path: a SentencePiece model file.

    Raises:
        OSError: the file cannot be opened.
        ValueError: the file is no SentencePiece model.
    """

    bos_token_id = cls_token_id = 0
    pad_token_id = 1
    eos_token_id = sep_token_id = 2
    unk_token_id = 3

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open(path, "rb") as file:
            proto = file.read()
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(proto)  # given to the constructor, an empty file would pass
        except (RuntimeError, ValueError, TypeError) as error:
            raise ValueError(f"{os.fspath(path)!r} is not a SentencePiece model: {error}") from error
        self.mask_token_id = len(self._model) + 1
        self._special = {
            "<s>": self.bos_token_id,
            "<pad>": self.pad_token_id,
            "</s>": self.eos_token_id,
            "<unk>": self.unk_token_id,
            "<mask>": self.mask_token_id,
        }
        self._special_pieces = {number: piece for piece, number in self._special.items()}
        self._at_special = re.compile("(" + "|".join(map(re.escape, self._special)) + ")")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self.mask_token_id + 1

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size})"

    @property
    def all_special_ids(self) -> list[int]:
        """The ids that `skip_special_tokens` drops, `<unk>` among them."""
        return list(self._special.values())

    def tokenize(self, text: str) -> list[str]:
        """Splits a text into pieces; no special token is added. A special token spelt out in the text stays one piece.

        Raises:
            TypeError: text that is not a string.
            ValueError: text that UTF-8 cannot encode (lone surrogates).
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {type(text).__name__}")
        pieces: list[str] = []
        parts = self._at_special.split(text)  # text, special, text, special, ..., text
        for i, part in enumerate(parts):
            if i % 2:
                pieces.append(part)
                continue
            if i + 1 < len(parts) and parts[i + 1] == "<mask>":
                part = part.rstrip()  # <mask> stands for a word and the space before it
            try:
                pieces += self._model.encode(part, out_type=str)
            except (RuntimeError, UnicodeError) as error:
                raise ValueError(f"text cannot be encoded in UTF-8: {text!r}") from error
        return pieces

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Ids of pieces (one id for one piece). Unknown pieces have id 3."""
        if not isinstance(tokens, str):
            return [self._id(piece) for piece in tokens]
        return self._id(tokens)

    def _id(self, piece: str) -> int:
        if piece in self._special:
            return self._special[piece]
        number = self._model.piece_to_id(piece)
        return number + 1 if number else self.unk_token_id

    def convert_ids_to_tokens(
        self, ids: int | Iterable[int] | torch.Tensor, skip_special_tokens: bool = False
    ) -> str | list[str]:
        """Pieces of ids (one piece for one id).

        Raises:
            TypeError: ids that are not integers.
            ValueError: an id below 0, or one that is not below `vocab_size`.
        """
        if isinstance(ids, (torch.Tensor, np.ndarray)):
            ids = ids.tolist()
        if isinstance(ids, Iterable):
            numbers = [self._checked(number) for number in ids]
            return [self._piece(n) for n in numbers if not (skip_special_tokens and n in self._special_pieces)]
        return self._piece(self._checked(ids))

    def _checked(self, number: Any) -> int:
        number = _integer("ids", number, 0)
        if number >= self.vocab_size:
            raise ValueError(f"ids must be below vocab_size = {self.vocab_size}, got {number}")
        return number

    def _piece(self, number: int) -> str:
        return self._special_pieces.get(number) or self._model.id_to_piece(number - 1)

    def encode(
        self, texts: str | Iterable[str], max_length: int = 64, *, pad_to: str = "max_length"
    ) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
        """`<s>`, the first max_length - 2 ids of the text, `</s>`, then `<pad>`; one row a text.

        An empty text gives `<s> </s>`; the public data sets refuse it.

        Args:
            texts: one text (a batch of one) or several.
            max_length: most ids in a row, special tokens included.
            pad_to: "max_length", as the public data sets do; "longest" makes rows as long as the longest text needs.

        Returns:
            ids: int64 (B, T).
            padding_mask: int64 (B, T), 1 where ids are padding.
            lengths: ids of each text that are no padding.

        Raises:
            TypeError: a text that is not a string.
            ValueError: no text at all, a max_length below 2, another pad_to.
        """
        max_length = _integer("max_length", max_length, 2)
        if pad_to not in PADDINGS:
            raise ValueError(f"pad_to must be one of {PADDINGS}, got {pad_to!r}")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError("texts must not be empty")
        rows = []
        for text in texts:
            ids = [self._id(piece) for piece in self.tokenize(text)]
            rows.append([self.bos_token_id, *ids[: max_length - 2], self.eos_token_id])
        lengths = [len(row) for row in rows]
        width = max_length if pad_to == "max_length" else max(lengths)
        padded = [row + [self.pad_token_id] * (width - len(row)) for row in rows]
        masks = [[0] * length + [1] * (width - length) for length in lengths]
        return (
            torch.tensor(padded, dtype=torch.int64, device="cpu"),
            torch.tensor(masks, dtype=torch.int64, device="cpu"),
            lengths,
        )

    def decode(self, ids: Iterable[int] | torch.Tensor, skip_special_tokens: bool = True) -> str:
        """The text of one row of ids. Raises as `convert_ids_to_tokens` does."""
        pieces = self.convert_ids_to_tokens(ids, skip_special_tokens)
        return "".join(pieces).replace("\u2581", " ").strip()

    def batch_decode(
        self, sequences: Iterable[Iterable[int]] | torch.Tensor, skip_special_tokens: bool = True
    ) -> list[str]:
        """The text of each row of ids."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]


@dataclass(frozen=True, eq=False)  # == on tensors has no single answer
class Batch:
    """What a model takes.

    Attributes:
        image: float (B, 3, S, S), or None.
        text_ids: int64 (B, T), or None.
        padding_mask: int64 (B, T), 1 = padding, or None.
        text_lengths: ids of each text that are no padding, as host integers, or None.
    """

    image: torch.Tensor | None = None
    text_ids: torch.Tensor | None = None
    padding_mask: torch.Tensor | None = None
    text_lengths: tuple[int, ...] | None = None

    def to(self, device: torch.device | str | int | None = None, dtype: torch.dtype | None = None) -> Batch:
        """The batch with its tensors on `device` and its image in `dtype`; the lengths stay on the host.

        Raises:
            TypeError: a dtype that is not a floating-point one.
        """
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
        return Batch(
            image=None if self.image is None else self.image.to(device=device, dtype=dtype),
            text_ids=None if self.text_ids is None else self.text_ids.to(device=device),
            padding_mask=None if self.padding_mask is None else self.padding_mask.to(device=device),
            text_lengths=self.text_lengths,
        )


class Processor:
    """Makes batches of images and texts as the public evaluation code does.

    Args:
        tokenizer: None serves images alone.
        image_size: side of the images, in pixels; the model's `img_size`.
        max_length: most ids of a text, special tokens included.
        imagenet: the image transform of ImageNet classification instead of that of the tasks with text.
        pad_to: "max_length" (as the public data sets do) or "longest" (exact as well, and smaller).

    Raises:
        TypeError, ValueError: naming the argument that is of a wrong type or out of range.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        image_size: int,
        max_length: int = 64,
        imagenet: bool = False,
        *,
        pad_to: str = "max_length",
    ) -> None:
        if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
            raise TypeError(f"tokenizer must be a beit3_fast Tokenizer or None, got {type(tokenizer).__name__}")
        if pad_to not in PADDINGS:
            raise ValueError(f"pad_to must be one of {PADDINGS}, got {pad_to!r}")
        image_size = _integer("image_size", image_size, 1)
        self.tokenizer = tokenizer
        self.transform = ImageTransform.imagenet(image_size) if imagenet else ImageTransform.vision_language(image_size)
        self.max_length = _integer("max_length", max_length, 2)
        self.pad_to = pad_to

    def __call__(self, images: Any = None, texts: str | Iterable[str] | None = None) -> Batch:
        """Makes a batch.

        Args:
            images: one image or several, each as `ImageTransform` takes it; an array or tensor (B, height, width, 3) is
                several.
            texts: one text or several. Their number need not be that of the images: retrieval scores any of both.

        Returns:
            A batch on the CPU, the image in float32; what was not given is None.

        Raises:
            TypeError, ValueError, OSError: as `ImageTransform` and `Tokenizer.encode` do.
            ValueError: neither images nor texts, no image in `images`, or texts without a tokenizer.
        """
        if images is None and texts is None:
            raise ValueError("images and texts are both None: nothing to process")
        image = text_ids = padding_mask = text_lengths = None
        if texts is not None:
            if self.tokenizer is None:
                raise ValueError("texts were given, but the tokenizer of this Processor is None")
            text_ids, padding_mask, lengths = self.tokenizer.encode(texts, self.max_length, pad_to=self.pad_to)
            text_lengths = tuple(lengths)
        if images is not None:
            several = _several(images)
            if not several:
                raise ValueError("images must not be empty")
            image = torch.stack([self.transform(one) for one in several])
        return Batch(image=image, text_ids=text_ids, padding_mask=padding_mask, text_lengths=text_lengths)


def _several(images: Any) -> list[Any]:
    """A list of images, from one or several. What is no image at all is left to the transform to refuse."""
    if isinstance(images, (np.ndarray, torch.Tensor)):
        return list(images) if images.ndim == 4 else [images]
    if isinstance(images, (Image.Image, str, os.PathLike)) or not isinstance(images, Iterable):
        return [images]
    return list(images)


def _data() -> Path:
    return Path(str(importlib.resources.files("beit3_fast"))) / "data"


def demo_pairs() -> list[tuple[Path, str]]:
    """The photos that come with the package, as (path, caption). Sources and licences: data/README.md."""
    entries = json.loads((_data() / "captions.json").read_text(encoding="utf-8"))
    return [(_data() / "photos" / entry["file"], entry["caption"]) for entry in entries]


def demo_tokenizer_path() -> Path:
    """A small SentencePiece model for runs with random weights: not the released `beit3.spm`, and with other pieces."""
    return _data() / "demo.spm"
