"""What the compiled kernels do, counted by running them in a PTX simulator: no GPU, and no times.

Each case calls an op's kernels at base-size widths in bf16 inside ``ptxsim.simulate.simulated`` and counts per launch:

    operations      tensor-core FLOPs over the algorithm's (2 N I O of a linear layer; 2 S S d a product of attention):
                    what tiles compute in vain
    instructions    warp instructions per matrix instruction (mma.sync m16n8k16; a warp's wgmma), epilogue included, as
                    PTX has them: ptxas drops most moves
    main loop       the same without prologue and epilogue, from the difference that a doubled depth makes
    sectors         bytes over 32 x the sectors they touch, loads and stores
    banks           shared-memory wavefronts over the fewest possible
    traffic         bytes requested from L2 and stored, over each operand's bytes once

For a named chip there are lower bounds besides (:mod:`.chips`): microseconds below which it cannot do what was counted.
They are no times: what a launch takes above the largest of them only a GPU can tell.

The JSON is an object::

    schema     1; raised when a field changes its meaning or goes away
    kind       "simulate"
    chip       null, or the chip that bounds are for: name, arch, multiprocessors, clock, tensor, dram (Hz, FLOP and
               bytes a second)
    results    one object a batch and architecture: batch, arch ("sm_80"), main_loop, and
      launches   call, kernel, operations, instructions, sectors, banks, traffic as above (null without matrix
                 instructions); work: bytes, flops, issued, wavefronts; lower_bounds_us: null, or microseconds by
                 resource ("DRAM", "tensor cores", "issue slots", "shared memory"); binds: null, or the largest's name
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from ..kernels import attention, decode_attention, multiway_ffn, multiway_linear
from ..kernels.config import default_row_config
from ..layout import TokenLayout
from .chips import Chip, Work, bounds, work

SCHEMA = 1
WIDTH, HIDDEN, HEADS = 768, 3072, 12
VISION, TEXT = 197, 13
BEAMS, WORDS, IMAGE = 3, 10, 901  # of decoding: a base model at 480 pixels
TARGETS = (80, 90)


@dataclass(frozen=True)
class Counted:
    """One launch's counts; those of matrix instructions are None where there are none. ``work`` is what bounds follow
    from."""

    call: str
    kernel: str
    operations: float | None
    instructions: float | None
    sectors: float
    banks: float
    traffic: float
    work: Work


def run(batch: int, target: int, progress: Callable[[str], None] = lambda _: None) -> list[Counted]:
    """Counts of linear layer, feed-forward block and attention, forward and backward, for `batch` x (197 + 13) tokens.

    Args:
        target: 80 or 90, the architecture to compile for.

    Raises:
        ModuleNotFoundError: the simulator cannot be imported.
    """
    from ptxsim.simulate import simulated

    rows = batch * (VISION + TEXT)
    offsets = torch.tensor([0, batch * VISION, rows], dtype=torch.int32)
    product = 2 * batch * (VISION + TEXT) ** 2 * WIDTH
    products = {
        "_attention_kernel": 2 * product,
        "_key_gradient_kernel": 4 * product,
        "_query_gradient_kernel": 3 * product,
        "_decode_kernel": 2 * 2 * batch * BEAMS * (2 * (IMAGE + WORDS) + 3) * WIDTH,
    }
    counted = []
    for name, call in _calls(rows, offsets, target).items():
        progress(f"{name}, sm_{target}, batch {batch}")
        with simulated(target=target, threads=torch.get_num_threads()) as log:
            call()
        for kernel, stats in log:
            useful = products.get(kernel, 2 * rows * WIDTH * HIDDEN)
            counted.append(_count(name, kernel, stats.to_dict(), useful))
    return counted


def main_loop(batch: int, target: int, depth: int = WIDTH) -> float:
    """Warp instructions per matrix instruction of the linear layer's main loop, from `depth` and twice that."""
    from ptxsim.simulate import simulated

    rows = batch * (VISION + TEXT)
    offsets = torch.tensor([0, batch * VISION, rows], dtype=torch.int32)
    totals = []
    for k in (depth, 2 * depth):
        weight = _rows(2, HIDDEN, k)
        configs = {"forward": default_row_config(target, torch.bfloat16, rows, 2, HIDDEN, k)}
        with simulated(target=target, threads=torch.get_num_threads()) as log:
            multiway_linear.forward(_rows(rows, k), weight, None, offsets, configs=configs)
        stats = log[0][1].to_dict()
        totals.append((stats["warp_instructions"], _products(stats)))
    return (totals[1][0] - totals[0][0]) / (totals[1][1] - totals[0][1])


def tile_waste(vision: int, text: int, batch: int, arch: int = 80) -> tuple[int, float]:
    """(row tile of the default config, rows that tiles compute over rows there are) for fc1 of base size in bf16."""
    rows = batch * (vision + text)
    block_m = default_row_config(arch, torch.bfloat16, rows, 2, HIDDEN, WIDTH).block_m
    computed = sum(-(-count // block_m) * block_m for count in (batch * vision, batch * text))
    return block_m, computed / rows


def _rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16)


def _calls(rows: int, offsets: Tensor, target: int) -> dict[str, Callable[[], Any]]:
    x, dy, wide = _rows(rows, WIDTH), _rows(rows, WIDTH), _rows(rows, HIDDEN)
    w1, b1, gain, shift = _rows(2, HIDDEN, WIDTH), _rows(2, HIDDEN), _rows(2, HIDDEN), _rows(2, HIDDEN)
    w2, b2 = _rows(2, WIDTH, HIDDEN), _rows(2, WIDTH)
    linear = multiway_linear.default_configs(target, x.dtype, rows, 2, WIDTH, HIDDEN)
    ffn = multiway_ffn.default_configs(target, x.dtype, rows, 2, WIDTH, HIDDEN)
    saved: list[Tensor] = []
    qkv = _rows(rows, 3, HEADS, WIDTH // HEADS)
    batch = rows // (VISION + TEXT)
    layout = TokenLayout.from_lengths([VISION] * batch, [TEXT] * batch)
    of_sample = layout.segments, "full", (WIDTH // HEADS) ** -0.5, layout.width
    attended: list[Tensor] = []

    image = TokenLayout.from_lengths([IMAGE] * batch, [0] * batch)
    slots = batch * BEAMS
    step = (
        _rows(2 * slots, 3, HEADS, WIDTH // HEADS),
        _rows(image.num_rows, 2, HEADS, WIDTH // HEADS),
        image.segments,
        _rows(WORDS, slots, 2, HEADS, WIDTH // HEADS),
        torch.arange(slots, dtype=torch.int32).repeat(WORDS, 1),
    )

    def feed_forward(save: bool) -> None:
        saved[:] = multiway_ffn.forward(
            x, w1, b1, gain, shift, w2, b2, offsets, dy, save=save, configs=ffn
        )[1:]  # fmt: skip

    return {
        "linear": lambda: multiway_linear.forward(x, w1, b1, offsets, configs=linear),
        "linear + GELU": lambda: multiway_linear.forward(x, w1, b1, offsets, True, configs=linear),
        "linear backward": lambda: multiway_linear.backward(wide, x, w1, offsets, configs=linear),
        "feed-forward": lambda: feed_forward(save=False),
        "feed-forward, training": lambda: feed_forward(save=True),
        "feed-forward backward": lambda: multiway_ffn.backward(
            dy, x, w1, gain, shift, w2, offsets, None, *saved, configs=ffn
        ),
        "attention": lambda: attended.extend(attention.forward(qkv, *of_sample, True)),
        "attention backward": lambda: attention.backward(dy, qkv, *attended, *of_sample),
        "decoding": lambda: decode_attention.forward(*step, WORDS, (WIDTH // HEADS) ** -0.5, IMAGE),
    }


def _products(stats: dict[str, Any]) -> int:
    return sum(form["count"] for form in stats["mma"].values())


def _count(call: str, kernel: str, stats: dict[str, Any], useful: int) -> Counted:
    products = _products(stats)
    moved = [stats["global_load"], stats["global_store"]]
    requested = sum(part["bytes"] for part in moved)
    shared = stats["shared"].values()
    ideal = sum(part["ideal"] for part in shared)
    return Counted(
        call=call,
        kernel=kernel.strip("_").removesuffix("_kernel"),
        operations=stats["mma_flops"] / useful if products else None,
        instructions=stats["warp_instructions"] / products if products else None,
        sectors=requested / (32 * sum(part["sectors"] for part in moved)),
        banks=sum(part["wavefronts"] for part in shared) / ideal if ideal else 1.0,
        traffic=requested / (stats["unique_read"] + stats["unique_written"]),
        work=work(stats),
    )


def table(batch: int, target: int, counted: Sequence[Counted], loop: float) -> Table:
    """One batch size and architecture."""
    shown = Table(
        title=f"sm_{target}, bf16, {batch} x ({VISION} + {TEXT}) tokens, {WIDTH} <-> {HIDDEN}; counted, not timed",
        title_justify="left",
        title_style="bold",
        caption=f"main loop of the linear layer: {loop:.2f} warp instructions per matrix instruction",
        caption_justify="left",
    )
    shown.add_column("call")
    shown.add_column("launch")
    for name in ("operations", "instructions", "sectors", "banks", "traffic"):
        shown.add_column(name, justify="right")
    previous = None
    for item in counted:
        cells = [
            "" if item.operations is None else f"{item.operations:.3f}x",
            "" if item.instructions is None else f"{item.instructions:.2f}",
            f"{item.sectors:.0%}",
            f"{item.banks:.2f}x",
            f"{item.traffic:.1f}x",
        ]
        shown.add_row("" if item.call == previous else item.call, item.kernel, *cells)
        previous = item.call
    return shown


def bounds_table(batch: int, chip: Chip, counted: Sequence[Counted]) -> Table:
    """Lower bounds on ``chip`` for one batch size."""
    shown = Table(
        title=f"lower bounds on {chip.name}, {batch} x ({VISION} + {TEXT}) tokens: microseconds, no times",
        title_justify="left",
        title_style="bold",
        caption="what a launch cannot be faster than, were one resource all it needed; data-sheet rates, cold caches",
        caption_justify="left",
    )
    shown.add_column("call")
    shown.add_column("launch")
    resources = list(bounds(Work(0, 0, 0, 0), chip))
    for name in resources:
        shown.add_column(name, justify="right")
    shown.add_column("at least", justify="right")
    shown.add_column("bound by")
    previous = None
    for item in counted:
        found = bounds(item.work, chip)
        binds = max(resources, key=lambda name: found[name])
        cells = [f"{found[name]:.2f}" for name in resources]
        shown.add_row("" if item.call == previous else item.call, item.kernel, *cells, f"{found[binds]:.2f} us", binds)
        previous = item.call
    return shown


def waste_table(arch: int = 80) -> Table:
    """Row-tile padding of fc1 for usual token counts, with the default configs."""
    shown = Table(
        title=f"rows computed over rows there are (row tile), sm_{arch}", title_justify="left", title_style="bold"
    )
    shown.add_column("vision + text tokens")
    batches = (1, 8, 32)
    for batch in batches:
        shown.add_column(f"batch {batch}", justify="right")
    for vision in (197, 577, 901):
        for text in (10, 13, 20, 32, 64):
            cells = []
            for batch in batches:
                block_m, share = tile_waste(vision, text, batch, arch)
                cells.append(f"{share:.3f}x ({block_m})")
            shown.add_row(f"{vision} + {text}", *cells)
    return shown


def document(results: Sequence[tuple[int, int, Sequence[Counted], float]], chip: Chip | None = None) -> dict[str, Any]:
    """The JSON of a run; the module's docstring describes it."""
    return {
        "schema": SCHEMA,
        "kind": "simulate",
        "chip": None if chip is None else asdict(chip),
        "results": [
            {
                "batch": batch,
                "arch": f"sm_{target}",
                "main_loop": loop,
                "launches": [_launch(item, chip) for item in counted],
            }
            for batch, target, counted, loop in results
        ],
    }


def _launch(item: Counted, chip: Chip | None) -> dict[str, Any]:
    found = None if chip is None else bounds(item.work, chip)
    binds = None if found is None else max(found, key=lambda name: found[name])
    return asdict(item) | {"lower_bounds_us": found, "binds": binds}
