"""What the op files share: registration in PyTorch's dispatcher, argument checks, expert segments.

Every op is ``torch.ops.beit3_fast.<op>`` with its backward ``torch.ops.beit3_fast.<op>_backward``. The plain PyTorch
implementation is registered for every device (CompositeExplicitAutograd); a compiled kernel registers itself for its
device and takes precedence there. An op with Triton kernels asks :mod:`._triton` whether they serve the call: on a GPU
that they support, and everywhere under ``use_backend("triton")``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backend import current_backend
from ._triton import on_device, serves

_LIBRARY = torch.library.Library("beit3_fast", "DEF")


def define(
    schema: str, fallback: Callable[..., Any], fake: Callable[..., Any], triton: Callable[..., Any] | None = None
) -> torch._ops.OpOverload:
    """Define an op, its plain PyTorch implementation for all devices and its shapes (for torch.compile and export).

    `triton`, with the same arguments, takes the calls whose first tensor :func:`._triton.serves`. All three get the
    schema's arguments by position: what only passes them on may take ``*args``.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=torch.Tag.pt2_compliant_tag)

    def implementation(*args: Any) -> Any:
        if triton is not None and serves(args[0]):
            with on_device(args[0]):
                return triton(*args)
        return fallback(*args)

    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"beit3_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.beit3_fast, name).default


def define_compiled(schema: str, plain: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Define an op that the CPU library compiles; on other devices, and where there is no such library, it is `plain`.

    Returns:
        The op, but `plain` on other devices, and where a tensor is of fp64, which the library does not have. Only
        `plain` gets the keyword arguments: what the host knows, so that it need not wait for the device to say so.
    """
    op = define(schema, plain, fake)

    def compiled(*args: Any, **known: Any) -> Any:
        in_double = torch.float64 in [arg.dtype for arg in args if isinstance(arg, Tensor)]
        if in_double or args[0].device.type != "cpu":
            return plain(*args, **known)
        return op(*args)

    return compiled


def differentiate(op: torch._ops.OpOverload, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Register the op's backward; outputs that were not used arrive there as None."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        setup(ctx, inputs, output)

    torch.library.register_autograd(op.name(), backward, setup_context=setup_context, lib=_LIBRARY)


def by_reference() -> bool:
    """Whether an op runs its reference: the backend asks for it, or a forward-mode derivative is being taken, which the
    kernels do not have and would silently drop."""
    return current_backend() == "reference" or forward_ad._current_level >= 0


def gradients_to_differentiate(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)`` that can be differentiated again, None where none is needed.

    For a backward with ``create_graph=True``: what a kernel returns has no graph, and a second derivative through it
    would silently be wrong. `function` is plain PyTorch, and computes the forward once more.
    """
    leaves = [value for value, need in zip(inputs, needed, strict=True) if need and value is not None]
    if not leaves:  # a residual alone is differentiated
        return [None] * len(needed)
    found = iter(torch.autograd.grad(function(*inputs), leaves, dy, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]


def autocast(op: torch._ops.OpOverload, arguments: Sequence[str]) -> None:
    """Under autocast, cast the named floating-point arguments to its dtype; others (a residual stream) stay."""
    positions = [i for i, argument in enumerate(op._schema.arguments) if argument.name in arguments]
    name = op.name().split("::")[1]
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        keyset = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))

        def kernel(*args: Any, device_type: str = device_type, keyset: Any = keyset) -> Any:
            dtype = torch.get_autocast_dtype(device_type)
            cast = list(args)
            for i in positions:
                if isinstance(cast[i], Tensor) and cast[i].is_floating_point() and cast[i].dtype != torch.float64:
                    cast[i] = cast[i].to(dtype)
            with torch._C._ExcludeDispatchKeyGuard(keyset):
                return op(*cast)

        _LIBRARY.impl(name, kernel, key)


def segments(
    expert_offsets: Tensor, num_rows: int, *, all_experts: bool = False, bounds: Sequence[int] | None = None
) -> Iterator[tuple[int, slice]]:
    """(expert, rows) for every expert that has rows (or for all): from the bounds that the host knows, without them
    from the offsets, which on a GPU is a wait.

    Raises:
        ValueError: offsets that do not start at 0, decrease, or exceed num_rows.
    """
    offsets = expert_offsets.tolist() if bounds is None else bounds
    if offsets[0] != 0 or offsets[-1] > num_rows or any(a > b for a, b in pairwise(offsets)):
        name = "expert_offsets" if bounds is None else "bounds"
        raise ValueError(f"{name} must rise from 0 to at most {num_rows} (the rows of x), got {list(offsets)}")
    for expert, (start, stop) in enumerate(pairwise(offsets)):
        if start < stop or all_experts:
            yield expert, slice(start, stop)


def rows_in_use(rows: Tensor, where: slice, expert_offsets: Tensor) -> Tensor:
    """``rows[where]``, zeros past the last offset: what lies there must not enter a sum over rows, NaN included."""
    positions = torch.arange(where.start, where.stop, device=rows.device)
    return torch.where((positions < expert_offsets[-1]).unsqueeze(1), rows[where], 0)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that statistics and activations are computed in: fp32, or fp64 for fp64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty(like: Tensor) -> Tensor:
    """The (0,) tensor that stands for an output nobody asked for."""
    return like.new_empty(0)


def check_rows(x: Tensor) -> None:
    check_tensors(x=x)
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating-point rows of shape (N, width), got {tuple(x.shape)} {x.dtype}")


def check_tensors(**arguments: Any) -> None:
    for name, value in arguments.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")


def check_eps(eps: float) -> None:
    if not isinstance(eps, (int, float)):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not eps >= 0:
        raise ValueError(f"eps must not be negative, got {eps}")


def check_parameter(name: str, value: Tensor, shape: tuple[int | None, ...], x: Tensor) -> None:
    """A floating-point tensor of the expected shape (None = any) beside x."""
    check_tensors(**{name: value})
    fits = value.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, value.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise ValueError(f"{name} must be floating-point, got {value.dtype}")
    if value.device != x.device:
        raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")


def check_same_dtype(x: Tensor, **others: Tensor | None) -> None:
    """Operands of a matrix product share one dtype, unless autocast is about to give them one."""
    if torch.is_autocast_enabled(x.device.type):
        return
    for name, other in others.items():
        if other is not None and other.dtype != x.dtype:
            raise ValueError(f"{name} must have x's dtype {x.dtype}, got {other.dtype}")


def check_offsets(expert_offsets: Tensor, num_experts: int, x: Tensor) -> None:
    check_tensors(expert_offsets=expert_offsets)
    if expert_offsets.dtype != torch.int32 or expert_offsets.shape != (num_experts + 1,):
        raise ValueError(
            f"expert_offsets must be int32 with {num_experts + 1} entries (experts + 1), "
            f"got {expert_offsets.dtype} {tuple(expert_offsets.shape)}"
        )
    if expert_offsets.device != x.device:
        raise ValueError(f"expert_offsets must be on x's device {x.device}, got {expert_offsets.device}")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # on a GPU a look would be a wait
        next(segments(expert_offsets, x.shape[0]), None)


def check_bounds(bounds: Sequence[int] | None, num_experts: int, x: Tensor) -> None:
    """One bound an expert and one more; while tracing, where they may be symbols, only their number is looked at."""
    if bounds is None:
        return
    if not isinstance(bounds, Sequence) or len(bounds) != num_experts + 1:
        raise ValueError(f"bounds must be {num_experts + 1} ints (experts + 1), got {bounds!r}")
    if not torch.compiler.is_compiling() and (
        bounds[0] != 0 or bounds[-1] != x.shape[0] or any(a > b for a, b in pairwise(bounds))
    ):
        raise ValueError(f"bounds must rise from 0 to {x.shape[0]}, the rows of x, got {list(bounds)}")


def check_residual(residual: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    if residual is not None:
        check_parameter("residual", residual, shape, x)


def check_row_index(row_index: Tensor | None, x: Tensor) -> None:
    if row_index is None:
        return
    check_tensors(row_index=row_index)
    if row_index.dtype not in (torch.int32, torch.int64) or row_index.shape != (x.shape[0],):
        raise ValueError(
            f"row_index must be int32 or int64 of shape ({x.shape[0]},), one entry per row of x; "
            f"got {row_index.dtype} {tuple(row_index.shape)}"
        )
    if row_index.device != x.device:
        raise ValueError(f"row_index must be on x's device {x.device}, got {row_index.device}")
    if row_index.device.type == "cpu" and row_index.numel() and not torch.compiler.is_compiling():
        low, high = row_index.aminmax()
        if low < 0 or high >= x.shape[0]:
            raise ValueError(f"row_index must lie in [0, {x.shape[0]}), got values from {int(low)} to {int(high)}")
