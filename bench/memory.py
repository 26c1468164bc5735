"""``beit3-fast bench memory``: what one encoder layer allocates in a training step, ours against the public code.

Nothing is computed and no GPU is needed: both run on tensors without data, and every allocation is followed from its
birth to its death. Counted is what an op returns, for ours with the rows that its GPU kernels use meanwhile
(``_WORKSPACE``); not counted are smaller buffers inside kernels and libraries, on either side, and the allocator's
rounding. Weights, their gradients and the layer's input are left out: they do not depend on who computes.

The JSON is an object::

    schema     1; raised when a field changes its meaning or goes away
    kind       "memory"
    results    one object a case and part:
      case     name, size, vision_tokens, text_tokens, batch, dtype
      part     "attention" (projections included) or "layer"
      ours, public   one object each: kept (bytes alive between forward and backward), peak (the most alive at once)
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from beit3_fast import ops, use_backend
from beit3_fast.layout import TokenLayout
from beit3_fast.models import EncoderConfig
from beit3_fast.models.encoder import EncoderLayer

from . import reference
from .cases import dtype_name

SCHEMA = 1
PARTS = ("attention", "layer")


@dataclass(frozen=True)
class MemoryCase:
    """One sample through one layer of a released size, no text token padded."""

    name: str
    size: str
    vision_tokens: int
    text_tokens: int = 64
    batch: int = 1
    dtype: torch.dtype = torch.bfloat16


MEMORY_CASES = (
    MemoryCase("base@480", "base", 901),
    MemoryCase("large@768", "large", 2305),
)


@dataclass(frozen=True)
class Memory:
    """Bytes: ``kept`` alive between forward and backward, ``peak`` the most alive at once."""

    kept: int
    peak: int


_WORKSPACE: dict[Any, Callable[..., int]] = {
    # the activated hidden rows, which nobody saves
    torch.ops.beit3_fast.multiway_ffn.default: lambda x, fc1_weight, *_: x.shape[0] * fc1_weight.shape[1] * x.itemsize,
    # the hidden rows once more, and their gradient
    torch.ops.beit3_fast.multiway_ffn_backward.default: lambda dy, x, fc1_weight, *_: (
        2 * x.shape[0] * fc1_weight.shape[1] * x.itemsize
    ),
    # the row sums of dout * out
    torch.ops.beit3_fast.attention_backward.default: lambda dout, qkv, out, lse, *_: lse.nbytes,
}
"""Row-sized buffers that a GPU kernel's launch allocates beside what it returns, from the op's arguments."""


class Allocations(TorchDispatchMode):
    """Follows every storage that appears under it; ``events`` holds (storage, bytes), negative at its death."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []
        self._alive: dict[int, int] = {}  # a storage's address, good while it lives, to its number
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for argument in tree_leaves((args, kwargs)):
            self._meet(argument, new=False)
        result = func(*args, **(kwargs or {}))
        for output in tree_leaves(result):
            self._meet(output, new=True)
        if func in _WORKSPACE:
            size = _WORKSPACE[func](*args)
            self._count += 1
            self.events += [(self._count, size), (self._count, -size)]
        return result

    def number(self, tensor: Tensor) -> int | None:
        """The number under which the tensor's storage is in ``events``."""
        return self._alive.get(tensor.untyped_storage()._cdata)

    def bytes(self, without: Iterable[int | None] = ()) -> Iterator[int]:
        """Bytes alive after each event, some storages left out."""
        ignored, total = set(without), 0
        for number, size in self.events:
            total += 0 if number in ignored else size
            yield total

    def _meet(self, value: Any, *, new: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        self._count += 1
        number = self._alive[address] = self._count
        size = storage.nbytes() if new else 0  # what was there before does not count
        self.events.append((number, size))
        weakref.finalize(storage, self._forget, address, number, size)

    def _forget(self, address: int, number: int, size: int) -> None:
        del self._alive[address]
        self.events.append((number, -size))


class _CudaSoftmax(TorchFunctionMode):
    """On a GPU a softmax of 16-bit scores in fp32 is one kernel; elsewhere, so on tensors without data, PyTorch
    converts the scores first, for which the public code must not pay."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.softmax and kwargs.get("dtype") == torch.float32 and args[0].itemsize == 2:
            return torch.ops.aten._softmax(args[0], kwargs["dim"], True)
        return func(*args, **kwargs)


def training_step(run: Callable[[], Tensor], parameters: Iterable[Tensor]) -> Memory:
    """What a forward and a backward allocate, the gradients of ``parameters`` left out.

    ``run`` must take gradients somewhere, and may use tensors without data.
    """
    parameters = list(parameters)
    with Allocations() as allocations:
        out = run()
        forward = len(allocations.events)
        out.backward(torch.empty_like(out))
    gradients = [allocations.number(parameter.grad) for parameter in parameters if parameter.grad is not None]
    alive = list(allocations.bytes(without=gradients))
    return Memory(kept=alive[forward - 1], peak=max(alive))


def ours(case: MemoryCase, part: str) -> Memory:
    """Our layer, or its attention, as on a GPU.

    Raises:
        ValueError: Triton is not installed.
    """
    config = _config(case)
    layout = TokenLayout.from_lengths([case.vision_tokens] * case.batch, [case.text_tokens] * case.batch)
    with _without_data(case.dtype), use_backend("triton"):
        layer = EncoderLayer(config, 0)
        x = torch.empty(layout.num_rows, config.encoder_embed_dim, requires_grad=True)
        block, rows = layer.self_attn, layout.experts(layer.attention_experts)

        def attention() -> Tensor:
            heads = ops.attention(block.project(x, rows), layout, block.num_heads)
            return block.out_proj(block.inner_attn_ln(heads, rows), rows)

        if part == "attention":
            return training_step(attention, block.parameters())
        return training_step(lambda: layer(x, layout), layer.parameters())


def public(case: MemoryCase, part: str) -> Memory:
    """The public code's layer, or its attention, by the operations that it asks for."""
    config = _config(case)
    tokens, split = case.vision_tokens + case.text_tokens, case.vision_tokens
    with _without_data(case.dtype), _CudaSoftmax():
        layer = reference.EncoderLayer(
            config.encoder_embed_dim, config.encoder_attention_heads, config.encoder_ffn_embed_dim, config.layernorm_eps
        )
        x = torch.empty(case.batch, tokens, config.encoder_embed_dim, requires_grad=True)
        padding = torch.zeros(case.batch, tokens, dtype=torch.bool)
        measured: nn.Module = layer.self_attn if part == "attention" else layer

        def run() -> Tensor:
            if part == "attention":
                return layer.self_attn(x, padding, split)[0]
            return layer(x, padding, split)

        return training_step(run, measured.parameters())


@contextlib.contextmanager
def _without_data(dtype: torch.dtype) -> Iterator[None]:
    """Tensors made in the block have a shape, ``dtype`` by default, and no memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):  # a layout's few numbers are read on the host
            yield
    finally:
        torch.set_default_dtype(before)


def _config(case: MemoryCase) -> EncoderConfig:
    make = {"base": EncoderConfig.base, "large": EncoderConfig.large}[case.size]
    return make(img_size=16 * math.isqrt(case.vision_tokens - 1))


@dataclass(frozen=True)
class MemoryResult:
    case: MemoryCase
    part: str
    ours: Memory
    public: Memory


def run(cases: Sequence[MemoryCase] = MEMORY_CASES) -> list[MemoryResult]:
    """Every case's attention and layer."""
    return [MemoryResult(case, part, ours(case, part), public(case, part)) for case in cases for part in PARTS]


def table(results: Sequence[MemoryResult]) -> Table:
    shown = Table(
        title="memory of one layer's training step: activations of one sample",
        title_justify="left",
        title_style="bold",
        caption="computed from shapes; weights and their gradients left out",
        caption_justify="left",
    )
    shown.add_column("model")
    shown.add_column("tokens")
    shown.add_column("part")
    for what in ("kept for backward", "peak"):
        shown.add_column(f"{what}: public", justify="right")
        shown.add_column("ours", justify="right")
        shown.add_column("less by", justify="right")
    for result in results:
        row = [result.case.name, f"{result.case.vision_tokens} + {result.case.text_tokens}", result.part]
        for theirs, our in ((result.public.kept, result.ours.kept), (result.public.peak, result.ours.peak)):
            row += [f"{theirs / 1e6:,.1f} MB", f"{our / 1e6:,.1f} MB", f"{theirs / our:.1f}x"]
        shown.add_row(*row)
    return shown


def document(results: Sequence[MemoryResult]) -> dict[str, Any]:
    """The JSON of a run; the module's docstring describes it."""
    return {
        "schema": SCHEMA,
        "kind": "memory",
        "results": [
            {
                "case": {**asdict(result.case), "dtype": dtype_name(result.case.dtype)},
                "part": result.part,
                "ours": asdict(result.ours),
                "public": asdict(result.public),
            }
            for result in results
        ],
    }
