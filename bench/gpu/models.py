"""Models and inputs of the report, and who computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast import optimize
from beit3_fast.layout import TokenLayout
from beit3_fast.models import BEiT3

from .. import model, model_peers, reference, training
from ..cases import ModelCase
from ..model import Setup
from .record import Missing
from .setting import Setting, Size

Call = Callable[[], Any]

TEXTS = ("padded", "dense", "none")
"""Texts in columns with padding, as the public data pipeline has them; the same columns full; images alone."""


def case(setting: Setting, size: Size, samples: int, texts: str, task: str = "forward") -> ModelCase:
    """In bfloat16."""
    sizes = setting.sizes
    columns = None if texts == "none" else sizes.padded_text
    lengths = sizes.text_lengths if texts == "padded" else None
    name = f"{size.name}-{samples}-{texts}"
    return ModelCase(name, size.name, samples, size.image_size, columns, lengths, torch.bfloat16, task=task)


class Setups:
    """Makes cases ready; the weights of a model are drawn once for all of its cases."""

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._weights: dict[str, dict[str, Tensor]] = {}

    def get(self, size: Size, samples: int, texts: str, task: str = "forward") -> Setup:
        """Weights and inputs on the device."""
        make = training.Setup if task == "training" else Setup
        wanted, device, config = case(self._setting, size, samples, texts, task), self._setting.device, size.config()
        return make(wanted, device, config, self._of(size))

    def _of(self, size: Size) -> dict[str, Tensor]:
        if size.name not in self._weights:
            self._weights.clear()  # one model's at a time
            self._weights[size.name] = model.draw_weights(size.config(), torch.bfloat16, self._setting.device)
        return self._weights[size.name]


def layout_of(setup: Setup) -> TokenLayout:
    """Where the rows of the case's inputs are, lengths known on the host: a forward with it can be captured."""
    case, config = setup.case, setup.config
    vision = (config.img_size // config.patch_size) ** 2 + 1
    return TokenLayout.from_lengths(
        [vision] * case.batch, case.lengths(), text_width=case.text_tokens or 0, device=setup.device
    )


def our_forward(backbone: BEiT3, setup: Setup) -> Call:
    """Ours on a ready layout: encoded tokens (B, V + T, D), like the others'."""
    layout, given = layout_of(setup), setup.inputs
    return lambda: layout.unpack(backbone.encode(given.visual_tokens, given.textual_tokens, layout=layout)[0])


class Encode(nn.Module):
    """Reference PyTorch on tensors by position, the padding of the whole sequence given: the public code makes that on
    the host in every forward, which no graph can hold."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, image: Tensor, ids: Tensor | None, padding: Tensor | None) -> Tensor:
        """Image (B, 3, S, S), token ids (B, T) or None, padding (B, V + T) or None to encoded tokens (B, V + T, D)."""
        tokens = self.backbone.vision_embed(image)  # type: ignore[operator]
        split = -1 if ids is None else tokens.size(1)
        if ids is not None:
            tokens = torch.cat([tokens, self.backbone.text_embed(ids)], dim=1)  # type: ignore[operator]
        return self.backbone.encoder(tokens, padding, split)[0]  # type: ignore[operator]


def plain_inputs(setup: Setup) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What :class:`Encode` takes."""
    given = setup.inputs
    padding = given.text_padding_position
    if padding is not None:
        vision = (setup.config.img_size // setup.config.patch_size) ** 2 + 1
        padding = torch.cat([padding.new_zeros(len(padding), vision), padding], dim=1)
    return given.visual_tokens, given.textual_tokens, padding


def _ours(setup: Setup, optimized: bool) -> Call:
    backbone = setup.build(BEiT3)
    assert isinstance(backbone, BEiT3)
    return our_forward(optimize(backbone) if optimized else backbone, setup)


def _plain(make: Callable[[Any], nn.Module]) -> Callable[[Setup], Call]:
    def build(setup: Setup) -> Call:
        encode, inputs = Encode(setup.build(make)), plain_inputs(setup)
        return lambda: encode(*inputs)

    return build


def _timm(setup: Setup) -> Call:
    (timm,) = (peer for peer in model_peers.PEERS if peer.name == "timm")
    reason = timm.missing(setup.case, setup.device)
    if reason is not None:
        raise Missing(reason)
    return timm.build(setup)


FORWARDS: dict[str, Callable[[Setup], Call]] = {
    "ours": lambda setup: _ours(setup, optimized=False),
    "optimized": lambda setup: _ours(setup, optimized=True),
    "SDPA": _plain(model.with_sdpa),
    "reference": _plain(reference.BEiT3),
}
IMAGE_FORWARDS = FORWARDS | {"timm": _timm}
"""For images alone."""


class Training:
    """A provider in training on a case: ours, or the plain modules that ``make`` builds.

    Args:
        compiled: options for ``torch.compile``; None leaves it alone.
    """

    def __init__(
        self, setup: training.Setup, make: Callable[[Any], nn.Module], compiled: dict[str, Any] | None = None
    ) -> None:
        backbone = setup.build(make).train().requires_grad_()
        self.parameters = [p for p in backbone.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(self.parameters, lr=training.LEARNING_RATE, fused=True)
        self._dout = setup.gradient.to(torch.bfloat16)
        if isinstance(backbone, BEiT3):
            self.forward: Call = our_forward(backbone, setup)
            return
        encode, inputs = Encode(backbone), plain_inputs(setup)
        encode = encode if compiled is None else torch.compile(encode, **compiled)  # type: ignore[assignment]
        self.forward = lambda: encode(*inputs)

    def step(self) -> None:
        """Forward, backward and AdamW."""
        self._optimizer.zero_grad()
        self.forward().backward(self._dout)
        self._optimizer.step()

    def gradients(self) -> tuple[Tensor | None, ...]:
        """Forward and backward alone."""
        return torch.autograd.grad(self.forward(), self.parameters, self._dout, allow_unused=True)


STEPS = {"ours": BEiT3, "SDPA": model.with_sdpa, "reference": reference.BEiT3}
"""Who is trained."""
