"""What the op tests share: inputs, an evaluation with gradients, and the rule that says what is close enough."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
EXACT = 1e-11  # float64 against float64, of the tensor's largest magnitude (at least 1)
FAR_MEAN = 1e3

# Root mean square error, of the truth's own: what no implementation may exceed, however poor plain PyTorch is.
CAPS = {torch.float64: 1e-9, torch.float32: 5e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def assert_parity(
    actual: Tensor, plain: Tensor, truth: Tensor, dtype: torch.dtype, what: str = "", floor: float | None = None
) -> None:
    """The project's parity rule: `actual` is as near to the float64 `truth` as plain PyTorch in `dtype` is.

    The largest error is at most twice plain PyTorch's plus a rounding floor, the root mean square error at most twice
    plain PyTorch's plus half the floor, and that never exceeds ``CAPS`` of the truth's root mean square (or the floor).

    Args:
        dtype: what the computation ran in. `actual` may be kept in another; the coarser of the two counts.
        floor: the absolute error that rounding alone explains; by default one unit in the last place of the truth's
            largest magnitude. Give it where a result is a difference of far larger terms.
    """
    assert actual.shape == truth.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}"
    assert actual.dtype == plain.dtype, f"{what}: {actual.dtype}, expected {plain.dtype}"
    if truth.numel() == 0:
        return
    truth = truth.double()
    assert truth.isfinite().all(), f"{what}: the truth is not finite"
    assert plain.isfinite().all(), f"{what}: plain PyTorch is not finite"
    assert actual.isfinite().all(), f"{what}: not finite"
    coarser = max(dtype, actual.dtype, key=lambda d: torch.finfo(d).eps)
    if floor is None:
        floor = torch.finfo(coarser).eps * truth.abs().max().item()
    error, plain_error = (actual.double() - truth).abs(), (plain.double() - truth).abs()
    worst, allowed = error.max().item(), 2 * plain_error.max().item() + floor
    assert worst <= allowed, f"{what}: error {worst:.3e}, allowed {allowed:.3e} (plain PyTorch, floor {floor:.1e})"
    rms, allowed = _rms(error), 2 * _rms(plain_error) + floor / 2
    assert rms <= allowed, f"{what}: rms error {rms:.3e}, allowed {allowed:.3e} (plain PyTorch, floor {floor:.1e})"
    cap = max(CAPS[coarser] * _rms(truth), floor)
    assert rms <= cap, f"{what}: rms error {rms:.3e}, never more than {cap:.3e}"


def assert_exact(actual: Tensor, expected: Tensor, what: str = "", tolerance: float = EXACT) -> None:
    """Equal up to the rounding of float64."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    if expected.numel() == 0:
        return
    assert actual.isfinite().all(), f"{what}: not finite"
    error = (actual - expected).abs().max().item()
    allowed = tolerance * max(1.0, expected.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


# --- inputs -----------------------------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype = torch.float64, scale: float = 1.0) -> Tensor:
    """Standard normal values that `dtype` holds exactly, times `scale`."""
    return (torch.randn(*shape, dtype=torch.float64) * scale).to(dtype)


def affine(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """LayerNorm weights: spread around 1, no two alike."""
    return (1 + 0.5 * torch.randn(*shape, dtype=torch.float64)).to(dtype)


def token_rows(count: int, width: int, dtype: torch.dtype = torch.float64, *, far: Tensor | None = None) -> Tensor:
    """(count, width) normal rows; those that the bool (count,) `far` names lie around +-1e3."""
    values = torch.randn(count, width, dtype=torch.float64)
    if far is not None:
        sign = torch.where(torch.arange(count) % 2 == 0, 1.0, -1.0).double()
        values = values + (FAR_MEAN * sign * far.double()).unsqueeze(1)
    return values.to(dtype)


MEMORY_FORMS = ("contiguous", "transposed", "every second row", "columns of a wider buffer", "offset")


def in_memory(tensor: Tensor, form: str) -> Tensor:
    """The values of a matrix, laid out in memory as `form` says."""
    rows, width = tensor.shape
    if form == "transposed":
        return tensor.t().contiguous().t()
    if form == "every second row":
        buffer = tensor.new_full((2 * rows, width), float("nan"))[::2]
    elif form == "columns of a wider buffer":
        buffer = tensor.new_full((rows, width + 3), float("nan"))[:, 2 : width + 2]
    elif form == "offset":
        buffer = tensor.new_full((rows * width + 1,), float("nan"))[1:].view(rows, width)
    else:
        return tensor.contiguous()
    return buffer.copy_(tensor)


@dataclass(frozen=True)
class Partition:
    """Rows in expert order: `counts[e]` of expert e, one after the other, then `padding` rows that nobody owns."""

    counts: tuple[int, ...]
    padding: int = 0

    @property
    def num_experts(self) -> int:
        return len(self.counts)

    @property
    def used(self) -> int:
        return sum(self.counts)

    @property
    def num_rows(self) -> int:
        return self.used + self.padding

    @property
    def offsets(self) -> Tensor:
        return torch.tensor([0, *accumulate(self.counts)], dtype=torch.int32)

    def expert_of_row(self, row_index: Tensor | None = None) -> Tensor:
        """(num_rows,) the expert of every row of x, -1 for padding, written down one by one."""
        ids = torch.full((self.num_rows,), -1)
        position = 0
        for expert, count in enumerate(self.counts):
            for _ in range(count):
                ids[position if row_index is None else int(row_index[position])] = expert
                position += 1
        return ids


def partitions(*, min_experts: int = 1, max_experts: int = 4, max_count: int = 6) -> st.SearchStrategy[Partition]:
    """One to four experts, any of them absent, no rows at all included, sometimes with unused capacity."""
    counts = st.lists(st.integers(0, max_count), min_size=min_experts, max_size=max_experts)
    return st.builds(lambda c, p: Partition(tuple(c), p), counts, st.sampled_from([0, 0, 1, 3]))


def permutation(partition: Partition, dtype: torch.dtype | None) -> Tensor | None:
    """A random ``row_index`` of that integer dtype, or None."""
    return None if dtype is None else torch.randperm(partition.num_rows).to(dtype)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor on another device."""
    return torch.empty(shape, dtype=dtype, device="meta")


# --- evaluation -------------------------------------------------------------------------------------------------------

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Inputs = Mapping[str, Tensor | None]


@dataclass(frozen=True)
class Evaluation:
    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor | None]
    cotangents: tuple[Tensor, ...]

    def items(self) -> Iterator[tuple[str, Tensor]]:
        for i, output in enumerate(self.outputs):
            yield f"output {i}", output
        for name, gradient in self.gradients.items():
            if gradient is not None:
                yield f"gradient of {name}", gradient

    def __getitem__(self, name: str) -> Tensor:
        return dict(self.items())[name]


def evaluate(
    function: Function,
    inputs: Inputs,
    cotangents: Sequence[Tensor] | None = None,
    *,
    frozen: Sequence[str] = (),
) -> Evaluation:
    """Outputs of ``function(**inputs)`` and the gradient of every input that is not None or `frozen`.

    `cotangents` (random ones by default) are cast to the outputs' dtypes; they stay as they are in memory.
    """
    leaves = {
        name: None if value is None else value.detach().requires_grad_(name not in frozen)
        for name, value in inputs.items()
    }
    result = function(**leaves)
    outputs = result if isinstance(result, tuple) else (result,)
    if cotangents is None:
        cotangents = [torch.randn(output.shape, dtype=torch.float64).to(output.dtype) for output in outputs]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    reached = [
        (output, cotangent.to(output.dtype))
        for output, cotangent in zip(outputs, cotangents, strict=True)
        if output.requires_grad
    ]
    gradients: Sequence[Tensor | None] = [None] * len(wanted)
    if reached:
        differentiable, reached_cotangents = zip(*reached, strict=True)
        gradients = torch.autograd.grad(differentiable, tuple(wanted.values()), reached_cotangents, allow_unused=True)
    for leaf, gradient in zip(wanted.values(), gradients, strict=True):
        assert gradient is None or (gradient.dtype, gradient.shape) == (leaf.dtype, leaf.shape)
    return Evaluation(
        tuple(output.detach() for output in outputs), dict(zip(wanted, gradients, strict=True)), tuple(cotangents)
    )


def by_name(*evaluations: Evaluation) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Each output and gradient in turn, of all `evaluations`: what one of them has, all must have."""
    tables = [dict(evaluation.items()) for evaluation in evaluations]
    for table in tables:
        assert table.keys() == tables[0].keys()
    for name in tables[0]:
        yield name, tuple(table[name] for table in tables)


def in_double(inputs: Inputs) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.double() for name, value in inputs.items()}


def assert_evaluations_exact(actual: Evaluation, expected: Evaluation, tolerance: float = EXACT) -> None:
    """Every output and every gradient; a gradient that does not exist stands for zeros."""
    for i, (ours, theirs) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
        assert_exact(ours, theirs, f"output {i}", tolerance)
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, ours in actual.gradients.items():
        theirs = expected.gradients[name]
        if ours is None or theirs is None:
            for gradient in (ours, theirs):
                assert gradient is None or not gradient.count_nonzero(), f"gradient of {name}: one side has none"
        else:
            assert_exact(ours, theirs, f"gradient of {name}", tolerance)


# --- what an op does, seen from below ---------------------------------------------------------------------------------


class RecordedOps(TorchDispatchMode):
    """Collects (name, outputs) of the calls that reach ``torch.ops.beit3_fast`` while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Tensor, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        namespace, name = func.name().split("::")
        if namespace == "beit3_fast":
            self.calls.append((name.split(".")[0], result if isinstance(result, tuple) else (result,)))
        return result


def saved_elements(function: Callable[[], Any], but_not: Sequence[Tensor] = ()) -> list[int]:
    """Sizes of the floating-point tensors that autograd keeps for the backward of `function`, `but_not` left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in but_not}
    sizes = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in known:
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        _result = function()  # held: what is saved dies with the graph
    return sorted(sizes)


@contextlib.contextmanager
def refuses(error: type[Exception], name: str) -> Iterator[None]:
    """What is done inside raises exactly `error`, with a message that names the argument `name`."""
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    assert re.search(rf"\b{name}\b", str(caught.value)), f"{name!r} is not named in {str(caught.value)!r}"


def assert_refuses(
    function: Callable[..., Any], good: dict[str, Any], bad: dict[str, Any], error: type[Exception], name: str
) -> None:
    """``function(**good)`` works; with `bad` in place of some arguments it raises `error` and names the argument."""
    function(**good)
    with refuses(error, name):
        function(**{**good, **bad})
