"""Training in ``bench model``: a step of forward, backward and AdamW, and the memory that it takes.

Right is who has the gradients of reference PyTorch in float64. The gradient of the output is random, and zero at
padded positions. Models have no dropout and no drop path, so that everybody computes the same. AdamW is PyTorch's, made
as the public code makes it, and again with ``fused=True``: one pass over weights, gradients and moments.

Memory is the resident memory of a process of its own that makes one step after another and nothing else.
"""

from __future__ import annotations

import contextlib
import gc
import json
import pickle
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast.models import BEiT3, EncoderConfig, released_gradients

from . import isolation, model, parity, reference
from .cases import ModelCase
from .model import BASELINE, FUSED_ADAMW, OURS, SDPA, Provider, Run, with_sdpa
from .model_peers import PEERS as FORWARD_PEERS
from .model_peers import public_backbone

LEARNING_RATE = 1e-5
SMALL = ModelCase("small", "base", 2, 32, 6, (4, 6))
SMALL_CONFIG: dict[str, Any] = {
    "encoder_embed_dim": 64,
    "encoder_attention_heads": 2,
    "encoder_ffn_embed_dim": 128,
    "encoder_layers": 1,
    "vocab_size": 100,
    "img_size": 32,
}
LEAST_SCALE = 1e-3
"""Of the largest gradient. What a key's bias adds to all of a query's scores, the softmax takes away: its gradient is a
sum that cancels, and its rounding error is measured on this scale rather than on its own."""

Gradients = Callable[[], "dict[str, Tensor]"]
"""The gradients of the last step by released key."""


class Setup(model.Setup):
    """A backbone in training."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        case = self.case
        vision = 0 if case.image_size is None else (case.image_size // self.config.patch_size) ** 2 + 1
        shape = case.batch, vision + (case.text_tokens or 0), self.config.encoder_embed_dim
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(self.device)
        self.gradient = gradient * self.meaningful(gradient).unsqueeze(-1)

    def running(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def truth(self) -> dict[str, Tensor]:
        backbone = self.build_reference(self.case.truth)
        _forward_and_backward(self, backbone)
        return _gradients(backbone)

    def errors(self, output: Gradients, truth: dict[str, Tensor]) -> dict[str, parity.Error]:
        """Of all gradients together: each on its own scale, the largest and the root mean square over parameters."""
        found = output()
        if found.keys() != truth.keys():
            raise ValueError(f"gradients must be those of {len(truth)} parameters, got {len(found)}")
        errors = {name: parity.error(found[name], gradient) for name, gradient in truth.items()}
        largest = {name: gradient.abs().max().item() for name, gradient in truth.items()}
        sizes = {name: gradient.square().mean().sqrt().item() for name, gradient in truth.items()}
        maxima = [_rescaled(errors[n].maximum, largest[n], max(largest.values())) for n in truth]
        squares = torch.tensor([_rescaled(errors[n].rms, sizes[n], max(sizes.values())) for n in truth]).square()
        return {
            "gradients": parity.Error(
                torch.tensor(maxima).max().item(),  # keeps a NaN
                squares.mean().sqrt().item(),
                torch.tensor([error.absolute for error in errors.values()]).max().item(),
            )
        }


def _rescaled(error: float, scale: float, largest: float) -> float:
    return error * scale / max(scale, LEAST_SCALE * largest)


def _forward_and_backward(setup: Setup, backbone: nn.Module) -> None:
    out = setup.inputs.to(next(backbone.parameters()).dtype).call(backbone)
    out.backward(setup.gradient.to(out.dtype))


def _gradients(backbone: nn.Module) -> dict[str, Tensor]:
    return {name: gradient for name, gradient in released_gradients(backbone).items() if gradient is not None}


def _step(setup: Setup, make: Callable[[EncoderConfig], nn.Module], fused: bool | None = None) -> Run:
    backbone = setup.build(make).train().requires_grad_()
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=LEARNING_RATE, fused=fused)

    def run() -> Gradients:
        optimizer.zero_grad()
        _forward_and_backward(setup, backbone)
        optimizer.step()
        return lambda: _gradients(backbone)

    return run


_PUBLIC = next(peer for peer in FORWARD_PEERS if peer.name == "public")
_PUBLIC_FUSED = replace(_PUBLIC, name=f"{_PUBLIC.name}, fused AdamW")
STEPS: dict[str, Callable[[Setup], Run]] = {
    BASELINE: partial(_step, make=reference.BEiT3),
    SDPA.name: partial(_step, make=with_sdpa),
    OURS.name: partial(_step, make=BEiT3),
    FUSED_ADAMW: partial(_step, make=BEiT3, fused=True),
    _PUBLIC.name: partial(_step, make=public_backbone),
    _PUBLIC_FUSED.name: partial(_step, make=public_backbone, fused=True),
}
OWN = [Provider(name, STEPS[name]) for name in (BASELINE, OURS.name, FUSED_ADAMW)]
PEERS = [replace(peer, build=STEPS[peer.name]) for peer in (SDPA, _PUBLIC, _PUBLIC_FUSED)]


# ---- memory ----


@dataclass(frozen=True)
class Memory:
    """Bytes: ``peak`` the most in a step; ``held`` what of it is weights, gradients and Adam's moments, which do not
    depend on who computes."""

    peak: int
    held: int


def memory(case: ModelCase, config: EncoderConfig, name: str) -> Memory | None:
    """What the provider of that name takes for a step on the CPU, beyond an idle process; None where the system does
    not tell, or the process failed."""
    given = pickle.dumps((case, config, name, torch.get_num_threads()))
    end, printed = isolation.run("beit3_fast.bench.training", [], given)
    if end is not None:  # killed for memory, no /proc: the times stand without it
        return None
    return Memory(**json.loads(printed.splitlines()[-1]))


def _measure(case: ModelCase, config: EncoderConfig, name: str, threads: int) -> Memory:
    torch.set_num_threads(threads)
    device = torch.device("cpu")
    STEPS[name](Setup(SMALL, device, EncoderConfig(**SMALL_CONFIG)))()  # imports what a step imports
    idle = _resident("VmRSS")
    setup = Setup(case, device, config)
    step = STEPS[name](setup)
    held = 4 * sum(tensor.nbytes for tensor in setup.weights.values())  # weights, gradients, two moments
    setup.weights.clear()
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for _ in range(2):  # the second one with all moments in place
        step()
    return Memory(_resident("VmHWM") - idle, held)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(found[1]) * 1024


if __name__ == "__main__":  # what memory() starts
    print(json.dumps(asdict(_measure(*pickle.loads(sys.stdin.buffer.read())))))
