"""What is benchmarked, as data: one entry a case. Adding a case is adding an entry to ``MODEL_CASES``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from beit3_fast.models import EncoderConfig
from beit3_fast.models.config import nearest

PADDED_TEXT = 64
"""What the public data pipeline pads every text to."""

CAPTION_LENGTHS = (13, 9, 17, 11, 15, 12, 16, 11)
"""Valid tokens per caption, begin and end included; their mean, 13, is what captions of photos come to."""


CAPTION_BEAMS = 3
CAPTION_TOKENS = 20
"""The begin token and the placeholder of the next word included, as ``generate(max_length=...)`` counts."""


@dataclass(frozen=True)
class ModelCase:
    """One forward of the backbone, or another task on it.

    Attributes:
        name: what ``--case`` takes.
        size: "base" or "large".
        batch: samples.
        image_size: pixels a side; None for text alone.
        text_tokens: tokens a text is padded to; None for an image alone.
        text_lengths: valid tokens per text, repeated over the batch; None when no text is padded.
        dtype: of weights and images.
        truth: dtype of the reference run that errors are measured against; float64 where that does not take minutes.
        task: "forward"; "training", a step of forward, backward and AdamW; "captioning", ``CAPTION_BEAMS`` beams to
            ``CAPTION_TOKENS`` tokens.
    """

    name: str
    size: str
    batch: int
    image_size: int | None
    text_tokens: int | None
    text_lengths: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float32
    truth: torch.dtype = torch.float64
    task: str = "forward"

    def lengths(self) -> list[int]:
        """Valid text tokens of every sample."""
        if self.text_tokens is None:
            return [0] * self.batch
        pattern = self.text_lengths or (self.text_tokens,)
        return [pattern[i % len(pattern)] for i in range(self.batch)]


MODEL_CASES = (
    ModelCase("base-joint", "base", 8, 224, PADDED_TEXT, CAPTION_LENGTHS),
    ModelCase("base-joint-dense", "base", 8, 224, PADDED_TEXT),
    ModelCase("base-joint-dense-1", "base", 1, 224, PADDED_TEXT),
    ModelCase("base-image", "base", 8, 224, None),
    ModelCase("base-image-16", "base", 16, 224, None),
    ModelCase("base-text", "base", 8, None, PADDED_TEXT, CAPTION_LENGTHS),
    ModelCase("base-text-16", "base", 16, None, PADDED_TEXT, CAPTION_LENGTHS),
    ModelCase("base-joint-480", "base", 2, 480, PADDED_TEXT, CAPTION_LENGTHS),
    ModelCase("base-joint-bfloat16", "base", 8, 224, PADDED_TEXT, CAPTION_LENGTHS, torch.bfloat16),
    ModelCase("base-joint-dense-bfloat16", "base", 8, 224, PADDED_TEXT, dtype=torch.bfloat16),
    ModelCase("base-joint-dense-1-bfloat16", "base", 1, 224, PADDED_TEXT, dtype=torch.bfloat16),
    ModelCase("base-image-bfloat16", "base", 8, 224, None, dtype=torch.bfloat16),
    ModelCase("base-image-16-bfloat16", "base", 16, 224, None, dtype=torch.bfloat16),
    ModelCase("base-text-16-bfloat16", "base", 16, None, PADDED_TEXT, CAPTION_LENGTHS, torch.bfloat16),
    ModelCase("large-joint", "large", 2, 224, PADDED_TEXT, CAPTION_LENGTHS),
    ModelCase("large-joint-bfloat16", "large", 2, 224, PADDED_TEXT, CAPTION_LENGTHS, torch.bfloat16, torch.float32),
    ModelCase("base-captioning-480", "base", 1, 480, None, task="captioning"),
    ModelCase("base-training", "base", 4, 224, PADDED_TEXT, CAPTION_LENGTHS, task="training"),
    ModelCase("base-training-dense", "base", 4, 224, PADDED_TEXT, task="training"),
)

GPU_CASES = (
    ModelCase("base-joint-64-bfloat16", "base", 64, 224, PADDED_TEXT, CAPTION_LENGTHS, torch.bfloat16, torch.float32),
    ModelCase("base-joint-dense-64-bfloat16", "base", 64, 224, PADDED_TEXT, None, torch.bfloat16, torch.float32),
    *(
        ModelCase(
            f"base-training-{batch}-bfloat16",
            "base",
            batch,
            224,
            PADDED_TEXT,
            CAPTION_LENGTHS,
            torch.bfloat16,
            torch.float32,
            "training",
        )
        for batch in (8, 64)
    ),
)
"""Sized for a GPU: on a CPU, where they take minutes, they run only if they are named. There PyTorch adds up the
gradients of bfloat16 LayerNorms in bfloat16 as well, so that in training the reference itself misses the cap."""

QUICK_CASES = ("base-joint", "base-joint-dense", "base-image", "base-text")
QUICK_BATCH = 2


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32"."""
    return str(dtype).removeprefix("torch.")


def flops(case: ModelCase, config: EncoderConfig) -> int | None:
    """Floating-point operations of the case's matrix products on tokens that are no padding; None for captioning.

    A token meets every weight of its expert once, a multiplication and an addition each; attention multiplies each of
    a sample's tokens with each of them twice. A training step is three forwards: the backward multiplies the gradient
    with the weights and with the inputs. So a provider that also computes padding does more, and gets nothing for it.
    """
    if case.task == "captioning":
        return None
    width, patches = config.encoder_embed_dim, ((case.image_size or 0) // config.patch_size) ** 2
    vision = patches + 1 if case.image_size else 0
    per_token = 2 * (4 * width * width + 2 * width * config.encoder_ffn_embed_dim)
    sequences = [vision + length for length in case.lengths()]
    layer = sum(per_token * tokens + 4 * tokens**2 * width for tokens in sequences)
    embedding = case.batch * patches * 2 * config.in_chans * config.patch_size**2 * width
    return (config.encoder_layers * layer + embedding) * (3 if case.task == "training" else 1)


def check_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raises :class:`ValueError` if ``name`` is not among ``known``, and offers the nearest ones that are."""
    known = list(known)
    if name not in known:
        hint = nearest(name, known) or f"; known: {', '.join(known)}"
        raise ValueError(f"{what} {name!r} is unknown{hint}")


def select(
    names: Iterable[str], *, quick: bool = False, batch: int | None = None, gpu: bool = False
) -> list[ModelCase]:
    """The cases of these names in the order given; with no names all of them, or the quick ones.

    ``quick`` also lowers every batch to at most ``QUICK_BATCH``; ``batch`` replaces every case's own. ``gpu`` says that
    the cases run on a GPU: without it and without names, ``GPU_CASES`` are left out.

    Raises:
        ValueError: an unknown name (the nearest known ones are offered) or a batch below 1.
    """
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    known = {case.name: case for case in (*MODEL_CASES, *GPU_CASES)}
    chosen = []
    everything = [case.name for case in (*MODEL_CASES, *(GPU_CASES if gpu else ()))]
    for name in list(names) or (QUICK_CASES if quick else everything):
        check_known("case", name, known)
        case = known[name]
        if batch is not None:
            case = replace(case, batch=batch)
        elif quick:
            case = replace(case, batch=min(case.batch, QUICK_BATCH))
        chosen.append(case)
    return chosen
