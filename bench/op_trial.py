"""Tries the peers of ``bench ops`` in a process of its own: ``python -m beit3_fast.bench.op_trial NAMES``, which
:func:`crashes` starts with the case on its standard input."""

from __future__ import annotations

import contextlib
import pickle
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from . import isolation, op_providers
from .op_cases import OpCase
from .op_providers import OURS, REFERENCE, OpProvider

MODULE = "beit3_fast.bench.op_trial"
DTYPES = (torch.float32, torch.bfloat16)

_found: dict[tuple[str, str, str], str | None] = {}
"""How the process ended, None if it did not, by op, provider and device: who was tried is not tried again."""


def crashes(case: OpCase, taking_part: Sequence[OpProvider], device: torch.device) -> dict[str, str]:
    """Who of ``taking_part`` ends a process that runs the case's op, by name, and how.

    The first case of an op that comes along is the one that is tried. Ours and the reference are not, nor is a provider
    that ``PROVIDERS`` does not list, which another process could not find.
    """
    listed = [p.name for p in taking_part if p in op_providers.PROVIDERS and p not in (OURS, REFERENCE)]
    untried = [name for name in listed if (case.op, name, device.type) not in _found]
    given = pickle.dumps((case, device, torch.get_num_threads()))
    ends = isolation.first_crashes(MODULE, untried, given)
    _found.update({(case.op, name, device.type): ends.get(name) for name in untried})
    found = {name: _found[case.op, name, device.type] for name in listed}
    return {name: end for name, end in found.items() if end is not None}


def main() -> None:
    """Runs the named providers on the case of the standard input. What they raise is left for the benchmark to find."""
    case, device, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    by_name = {provider.name: provider for provider in op_providers.PROVIDERS}
    for name in sys.argv[1:]:
        for variant in _variants(case, by_name[name]):
            with contextlib.suppress(Exception):
                _run(variant, by_name[name], device)
        isolation.survived(name)


def _variants(case: OpCase, provider: OpProvider) -> list[OpCase]:
    """The case in every dtype and direction; as it is for those that would compile each of them for seconds."""
    if provider.slow_start:
        return [case]
    dtypes = dict.fromkeys((case.dtype, *DTYPES))
    return [replace(case, dtype=dtype, backward=backward) for dtype in dtypes for backward in (False, True)]


def _run(case: OpCase, provider: OpProvider, device: torch.device) -> None:
    from .ops import Call, Problem

    if provider.missing(case, device) is None:
        layout = case.batch.layout(device)
        problem = Problem(case, layout, seed=0)
        Call(provider, provider.builds[case.op](case, layout), [problem]).results()
        if device.type == "cuda":
            torch.cuda.synchronize()  # a kernel's crash shows when it is waited for


if __name__ == "__main__":
    main()
