"""Captioning in ``bench model``: ours against the public generation loop on the public model.

Everybody captions the same images with the same weights, which never end a caption before its length limit. Right is
who finds the words that the public loop finds in float64, with scores within the cap.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast import optimize
from beit3_fast.models import BEiT3ForCaptioning, Captions, EncoderConfig

from . import model, parity
from .cases import CAPTION_BEAMS, CAPTION_TOKENS, ModelCase
from .model import OPTIMIZED, OURS, Provider, Run
from .model_peers import public_config, quietly_import
from .public_captions import EOS, MASK, generate

PUBLIC = "public loop"
SHARPNESS = 3.0
"""Factor on the logits: with smaller ones the words would be decided by rounding."""


class Setup(model.Setup):
    """A backbone with the head that predicts words.

    Raises:
        ModuleNotFoundError: the public model, which says what is right, is not installed.
    """

    baseline = PUBLIC

    def __init__(self, case: ModelCase, device: torch.device, config: EncoderConfig | None = None) -> None:
        if find_spec("beit3") is None:
            raise ModuleNotFoundError("beit3-gml is not installed, whose captions ours are compared with")
        super().__init__(case, device, config)
        generator = torch.Generator().manual_seed(2)
        vocabulary, width = self.config.vocab_size, self.config.encoder_embed_dim
        bias = 0.1 * torch.randn(vocabulary, generator=generator)
        bias[EOS] = -1e4
        head = {
            "mlm_head.weight": torch.randn(vocabulary, width, generator=generator) * SHARPNESS * width**-0.5,
            "mlm_head.bias": bias,
        }
        self.weights = {
            **{f"beit3.{name}": tensor for name, tensor in self.weights.items()},
            **{name: tensor.to(case.dtype).to(device) for name, tensor in head.items()},
        }
        self.mask_token = min(MASK, vocabulary - 1)
        assert self.inputs.visual_tokens is not None
        self.image: Tensor = self.inputs.visual_tokens

    def public_run(self, dtype: torch.dtype) -> Run:
        """The public loop on the public model in ``dtype``."""
        public, image = self.build(_public_model, dtype), self.image.to(dtype)
        options = {"num_beams": CAPTION_BEAMS, "max_length": CAPTION_TOKENS, "mask_token": self.mask_token}
        return lambda: generate(public, image, **options)

    def truth(self) -> Captions:
        with self.running():
            return self.public_run(self.case.truth)()

    def errors(self, output: Captions, truth: Captions) -> dict[str, parity.Error]:
        """Of the scores, and without bound for a caption with another word."""
        errors = {"scores": parity.error(torch.tensor(output.scores), torch.tensor(truth.scores))}
        for index, (found, right) in enumerate(zip(output.tokens, truth.tokens, strict=True)):
            if found != right:
                errors[f"words of caption {index}"] = parity.Error(math.inf, math.inf, math.inf)
        return errors


def _public_model(config: EncoderConfig) -> nn.Module:
    return quietly_import("beit3.modeling_finetune").BEiT3ForCaptioning(public_config(config))


def _generate(captioner: Any, setup: Setup) -> Run:
    options = {"num_beams": CAPTION_BEAMS, "max_length": CAPTION_TOKENS, "mask_token_id": setup.mask_token}
    return lambda: captioner.generate(setup.image, **options)


PROVIDERS = [
    Provider(PUBLIC, lambda setup: setup.public_run(setup.case.dtype), judged_by=PUBLIC, peer=True),
    Provider(OURS.name, lambda setup: _generate(setup.build(BEiT3ForCaptioning), setup), judged_by=OURS.name),
    Provider(
        OPTIMIZED.name,
        lambda setup: _generate(optimize(setup.build(BEiT3ForCaptioning)), setup),
        judged_by=OPTIMIZED.name,
    ),
]
