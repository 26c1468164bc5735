"""The public BEiT-3: torchscale 0.3.0 and the fine-tuning code of unilm/beit3 (as packaged by beit3-gml).

Everything here builds, feeds or drives that code as it is; nothing re-implements it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import types
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

with warnings.catch_warnings():  # timm announces that two of the paths torchscale imports have moved
    warnings.simplefilter("ignore", FutureWarning)
    import beit3.modeling_finetune as modeling
    import beit3.optim_factory as optim_factory
    import beit3.utils as utils
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

__all__ = [
    "BOS",
    "EOS",
    "FACTORIES",
    "HEADS",
    "PAD",
    "UNK",
    "BEiT3",
    "EncoderConfig",
    "config",
    "empty_model",
    "engine",
    "generate",
    "gradients",
    "handler",
    "inputs",
    "modeling",
    "optim_factory",
    "public_model",
    "randomise",
    "training_batch",
    "utils",
]

BOS, PAD, EOS, UNK = 0, 1, 2, 3  # the XLM-R ids that the public code decodes with
NUM_CLASSES = {"imageclassification": 7, "nlvr2": 2, "vqav2": 11}
CLASSES: dict[str, type[nn.Module]] = {
    "imageclassification": modeling.BEiT3ForImageClassification,
    "nlvr2": modeling.BEiT3ForVisualReasoning,
    "vqav2": modeling.BEiT3ForVisualQuestionAnswering,
    "captioning": modeling.BEiT3ForCaptioning,
    "retrieval": modeling.BEiT3ForRetrieval,
}
HEADS = tuple(CLASSES)
FACTORIES = (
    "beit3_base_patch16_224_imageclassification",
    "beit3_large_patch16_224_imageclassification",
    "beit3_base_patch16_224_nlvr2",
    "beit3_large_patch16_224_nlvr2",
    "beit3_base_patch16_384_vqav2",
    "beit3_base_patch16_480_vqav2",
    "beit3_large_patch16_384_vqav2",
    "beit3_large_patch16_480_vqav2",
    "beit3_large_patch16_768_vqav2",
    "beit3_base_patch16_224_captioning",
    "beit3_base_patch16_480_captioning",
    "beit3_large_patch16_480_captioning",
    "beit3_base_patch16_224_retrieval",
    "beit3_base_patch16_384_retrieval",
    "beit3_large_patch16_384_retrieval",
)

# Tiny widths are no multiple of 64 or 32 (head width 12) so that nothing passes because a tile happens to fit.
_SIZES: dict[str, dict[str, int]] = {
    "tiny": {
        "encoder_embed_dim": 48,
        "encoder_attention_heads": 4,
        "encoder_ffn_embed_dim": 192,
        "encoder_layers": 3,
        "img_size": 32,
        "patch_size": 8,
        "vocab_size": 200,
        "max_source_positions": 64,
    },
    "base": {
        "encoder_embed_dim": 768,
        "encoder_attention_heads": 12,
        "encoder_ffn_embed_dim": 3072,
        "encoder_layers": 12,
        "img_size": 96,  # 36 patches: the depth and the widths matter here, not the token count
        "patch_size": 16,
        "vocab_size": 1000,
        "max_source_positions": 1024,
    },
}


def config(head: str | None, size: str = "tiny", image_size: int | None = None, **overrides: Any) -> EncoderConfig:
    """A torchscale EncoderConfig as the public factories make it for `head` (None: the bare backbone)."""
    values: dict[str, Any] = {
        "multiway": True,
        "layernorm_embedding": False,
        "normalize_output": head not in ("imageclassification", "vqav2"),
        "no_output_layer": True,
        **_SIZES[size],
    }
    if image_size is not None:
        values["img_size"] = image_size
    return EncoderConfig(**{**values, **overrides})


def build(head: str | None, args: EncoderConfig) -> nn.Module:
    """The public class of `head`, initialised by its own constructor."""
    if head is None:
        return BEiT3(args)
    if head in NUM_CLASSES:
        return CLASSES[head](args, num_classes=NUM_CLASSES[head])
    return CLASSES[head](args)


def empty_model(head: str | None, args: EncoderConfig) -> nn.Module:
    """The public model with uninitialised parameters: base size in a tenth of the time."""
    with torch.device("meta"):
        model = build(head, args)
    return model.to_empty(device="cpu")


def public_model(
    head: str | None, size: str = "tiny", image_size: int | None = None, seed: int = 0, **overrides: Any
) -> nn.Module:
    """The public model of `head`, every parameter random, in eval mode."""
    model = empty_model(head, config(head, size, image_size, **overrides))
    return randomise(model, seed).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values, biases, LayerNorm affines and learned tokens included.

    The public initialisation would hide a swap of experts: its biases and tokens are zero and its affines one.
    Values depend on the parameter's name and `seed` alone.
    """
    norms = {
        f"{prefix}.{name}": name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name in ("weight", "bias")
    }
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        if name in norms:
            parameter.uniform_(-0.2, 0.2, generator=generator)
            if norms[name] == "weight":
                parameter.add_(1.0)
        elif name == "logit_scale":
            parameter.uniform_(2.0, 2.7, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.2, generator=generator)
        elif "embed" in name and parameter.ndim < 4:  # embedding tables, cls and mask tokens
            parameter.normal_(0.0, 0.6, generator=generator)
        else:
            fan_in = parameter[0].numel()
            parameter.normal_(0.0, fan_in**-0.5, generator=generator)
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    """Every parameter's gradient by its released key."""
    return {name: parameter.grad for name, parameter in model.named_parameters()}


# ---------------------------------------------------------------------------------------------------------- inputs


def inputs(
    batch: int = 3,
    text_len: int = 9,
    *,
    image_size: int = 32,
    vocab_size: int = 200,
    padding: str = "padded",
    lengths: Sequence[int] | None = None,
    mask_dtype: torch.dtype = torch.long,
    seed: int = 0,
) -> dict[str, Any]:
    """Random images, token ids and a padding mask (1 = PAD) with uneven lengths.

    padding: "padded" (every row shorter than `text_len`, no two alike where possible), "unpadded" (a mask of zeros)
    or "none" (no mask). Returns image (B, 3, H, W), tokens (B, T) long, mask (B, T) or None, lengths: list of B ints.
    """
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(batch, 3, image_size, image_size, generator=generator)
    tokens = torch.randint(UNK + 1, vocab_size, (batch, text_len), generator=generator)
    tokens[:, 0] = BOS
    if lengths is None:
        lengths = [text_len] * batch
        if padding == "padded":
            lengths = [2 + (text_len - 3 - 2 * row) % max(text_len - 2, 1) for row in range(batch)]
    mask = torch.zeros(batch, text_len, dtype=mask_dtype)
    for row, length in enumerate(lengths):
        tokens[row, length:] = PAD
        mask[row, length:] = 1
    return {
        "image": image,
        "tokens": tokens,
        "mask": None if padding == "none" else mask,
        "lengths": list(lengths),
    }


def training_batch(head: str, *, seed: int = 0, num_classes: int | None = None, **kwargs: Any) -> dict[str, Any]:
    """Keyword arguments of the public handler's `train_batch` for `head`; `kwargs` go to `inputs`."""
    data = inputs(seed=seed, **kwargs)
    image, tokens, mask, lengths = data["image"], data["tokens"], data["mask"], data["lengths"]
    batch = image.shape[0]
    generator = torch.Generator().manual_seed(seed + 1)
    num_classes = num_classes or NUM_CLASSES.get(head, 0)
    if head == "imageclassification":
        return {"image": image, "label": torch.randint(num_classes, (batch,), generator=generator)}
    text = {"language_tokens": tokens, "padding_mask": mask}
    if head == "nlvr2":
        return {
            "image": image,
            "image2": torch.randn(image.shape, generator=generator),
            **text,
            "label": torch.randint(num_classes, (batch,), generator=generator),
        }
    if head == "vqav2":
        return {"image": image, **text, "labels": torch.rand(batch, num_classes, generator=generator)}
    if head == "retrieval":
        return {"image": image, **text, "image_id": torch.arange(batch)}
    masked = torch.rand(tokens.shape, generator=generator) < 0.6
    masked[:, 0] = False  # the public data set never masks BOS, and always masks something
    masked[:, 1] = True
    for row, length in enumerate(lengths):
        masked[row, length:] = False
    return {
        "image": image,
        **text,
        "masked_tokens": tokens.masked_fill(masked, kwargs.get("vocab_size", 200) - 1),
        "language_masked_pos": masked.long(),
        "image_id": torch.arange(batch),
        "global_step": 0,
    }


def outputs(model: nn.Module, head: str, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What the model's forward returns for a training batch, by name."""
    if head == "imageclassification":
        return {"logits": model(image=batch["image"])}
    tokens, mask = batch["language_tokens"], batch["padding_mask"]
    if head == "nlvr2":
        return {"logits": model(batch["image"], batch["image2"], tokens, mask)}
    if head == "vqav2":
        return {"logits": model(image=batch["image"], question=tokens, padding_mask=mask)}
    if head == "captioning":
        logits, state = model(batch["image"], batch["masked_tokens"], mask, batch["language_masked_pos"])
        assert state is None
        return {"logits": logits}
    loss, vision, language = model(image=batch["image"], text_description=tokens, padding_mask=mask)
    return {"loss": loss, "vision": vision, "language": language}


# ---------------------------------------------------------------------------------------------------------- engine


class IdTokenizer:
    """Stands in for the SentencePiece tokenizer: a caption is the tuple of its ids without the special ones."""

    def __init__(self, mask_token_id: int) -> None:
        self.cls_token_id, self.pad_token_id, self.sep_token_id = BOS, PAD, EOS
        self.mask_token_id = mask_token_id

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> list[tuple[int, ...]]:
        assert skip_special_tokens
        special = {self.cls_token_id, self.pad_token_id, self.sep_token_id, self.mask_token_id, UNK}
        return [tuple(token for token in row if token not in special) for row in ids.tolist()]


@contextlib.contextmanager
def _as_a_script() -> Iterator[None]:
    """Make `import utils`, `import datasets`, ... inside the public package work, and leave no trace of it.

    Its engine and data sets are written to be run from their own folder. OpenCV, which only its image augmentation
    needs, is replaced by an empty module where it is not installed.
    """
    names = ("utils", "datasets", "glossary", "randaug", "cv2")
    saved = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    path = list(sys.path)
    sys.path.insert(0, str(Path(modeling.__file__).parent))
    sys.modules["utils"] = utils  # one copy: the models hold the same ClipLoss
    sys.modules["cv2"] = saved.get("cv2") or types.ModuleType("cv2")
    try:
        yield
    finally:
        sys.path[:] = path
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(saved)


@functools.lru_cache(maxsize=1)
def engine() -> types.ModuleType:
    """The public `engine_for_finetuning`, unmodified."""
    with _as_a_script():
        return importlib.import_module("beit3.engine_for_finetuning")


def handler(head: str, **settings: Any) -> Any:
    """The public task handler of `head`; `settings` override its command-line defaults."""
    args = types.SimpleNamespace(
        task={
            "imageclassification": "imagenet",
            "nlvr2": "nlvr2",
            "vqav2": "vqav2",
            "captioning": "coco_captioning",
            "retrieval": "flickr30k",
        }[head],
        mixup=0.0,
        cutmix=0.0,
        cutmix_minmax=None,
        label_smoothing=0.1,
        drop_worst_ratio=0.2,
        drop_worst_after=12000,
        num_beams=3,
        num_max_bpe_tokens=64,
        length_penalty=0.6,
        vocab_size=64010,
        mask_token_id=64001,
    )
    vars(args).update(settings)
    module = engine()
    original = module.get_sentencepiece_model_for_beit3
    module.get_sentencepiece_model_for_beit3 = lambda args: IdTokenizer(args.mask_token_id)
    try:
        return module.get_handler(args)
    finally:
        module.get_sentencepiece_model_for_beit3 = original


@torch.no_grad()
def generate(
    model: nn.Module,
    image: torch.Tensor,
    *,
    num_beams: int,
    max_length: int,
    length_penalty: float = 0.6,
    vocab_size: int = 64010,
    mask_token_id: int = 64001,
) -> tuple[list[list[int]], list[float]]:
    """Captions of `image` by the unmodified public loop, `CaptioningHandler.eval_batch`, driving `model`.

    Returns per image the token ids without special tokens and the length-normalised score of the winner.
    """
    task = handler(
        "captioning",
        num_beams=num_beams,
        num_max_bpe_tokens=max_length,
        length_penalty=length_penalty,
        vocab_size=vocab_size,
        mask_token_id=mask_token_id,
    )
    task.before_eval(metric_logger=None, data_loader=None)
    hypotheses: list[Any] = []

    class Recorded(utils.BeamHypotheses):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            hypotheses.append(self)

    original = utils.BeamHypotheses
    utils.BeamHypotheses = Recorded  # the loop keeps its scores to itself
    try:
        task.eval_batch(model, image, image_id=torch.arange(image.shape[0]))
    finally:
        utils.BeamHypotheses = original
    captions = [list(prediction["caption"]) for prediction in task.predictions]
    return captions, [max(score for score, _ in hypothesis.hyp) for hypothesis in hypotheses]
