"""Lower bounds on a named GPU, from what a kernel was counted to do: what it cannot be faster than there, never a time.

Each bound is one resource's count over that resource's rate, as if nothing else took time and no block ever waited:

    DRAM            the operands' bytes, each once, as with cold caches, over the bandwidth
    tensor cores    the matrix instructions' FLOPs, vain ones of tiles included, over their bfloat16 rate
    issue slots     warp instructions over four a cycle and multiprocessor; of the PTX only those are counted that the
                    assembler can neither drop nor merge: matrix, memory and special-function instructions, barriers,
                    shuffles and fused multiply-adds; address arithmetic, moves and conversions come on top
    shared memory   wavefronts over one a cycle and multiprocessor; those of wgmma's and TMA's own accesses come on top

Rates are those of the data sheets, at the clock that they are given for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SCHEDULERS = 4
SURVIVORS = (
    *("mma.", "wgmma.mma_async", "ldmatrix", "stmatrix"),
    *("ld.global", "ld.shared", "st.global", "st.shared", "atom.", "red."),
    *("cp.async.ca", "cp.async.cg", "cp.async.bulk.tensor", "cp.async.bulk.shared", "cp.async.bulk.global"),
    *("bar.", "barrier.", "shfl.", "fma."),
    *("ex2.", "lg2.", "rcp.", "rsqrt.", "sqrt.approx", "sin.", "cos.", "tanh."),
)
"""How PTX instructions begin that take an issue slot of their own whatever the assembler does."""


@dataclass(frozen=True)
class Chip:
    """A GPU: ``arch`` the architecture that code for it is compiled for, ``clock`` in Hz, ``tensor`` dense bfloat16
    FLOP a second, ``dram`` bytes a second."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    tensor: float
    dram: float


CHIPS = {
    "a100": Chip("A100 SXM 80 GB", 80, 108, 1.41e9, 312e12, 2039e9),
    "h100": Chip("H100 SXM 80 GB", 90, 132, 1.83e9, 989.4e12, 3350e9),
}


@dataclass(frozen=True)
class Work:
    """What a launch does, on any chip: ``bytes`` each operand's once, ``flops`` of matrix instructions, ``issued`` warp
    instructions that no assembler drops, ``wavefronts`` of shared memory."""

    bytes: int
    flops: int
    issued: int
    wavefronts: int


def work(stats: Mapping[str, Any]) -> Work:
    """From a launch's counts in the simulator (its ``to_dict()``)."""
    return Work(
        bytes=stats["unique_read"] + stats["unique_written"],
        flops=stats["mma_flops"],
        issued=sum(count for opcode, count in stats["opcodes"].items() if opcode.startswith(SURVIVORS)),
        wavefronts=sum(part["wavefronts"] for part in stats["shared"].values()),
    )


def bounds(done: Work, chip: Chip) -> dict[str, float]:
    """Microseconds below which ``chip`` cannot do the work, by resource."""
    cycles = chip.multiprocessors * chip.clock
    seconds = {
        "DRAM": done.bytes / chip.dram,
        "tensor cores": done.flops / chip.tensor,
        "issue slots": done.issued / (SCHEDULERS * cycles),
        "shared memory": done.wavefronts / cycles,
    }
    return {resource: 1e6 * value for resource, value in seconds.items()}
