"""Single calls in bfloat16 for tools that watch a process: ``python -m beit3_fast.bench.gpu.calls SAMPLES NAME...``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ..op_providers import OURS
from ..ops import Call, Problem
from .kernel_cases import DecodeStep, cases
from .setting import REAL, TINY, Setting

DRY = "--dry-run"
NAMES = ("norm", "qkv", "ffn", "attention", "ffn-backward", "attention-backward")
"""What a tool is let run: every kind of kernel."""


def run(names: list[str], samples: int, setting: Setting) -> None:
    """Makes each call once.

    Raises:
        KeyError: an unknown name.
    """
    known = {
        case.shape.name + ("-backward" if case.backward else ""): case
        for case in cases(setting.base, setting.batch(samples), torch.bfloat16)
    }
    for name in names:
        if name == "decode":
            DecodeStep(setting.base, samples, torch.bfloat16, setting)()
            continue
        case = known[name]
        layout = case.batch.layout(setting.device)
        Call(OURS, OURS.builds[case.op](case, layout), [Problem(case, layout, seed=0)]).results()
    if not setting.dry:
        torch.cuda.synchronize()


if __name__ == "__main__":
    dry = DRY in sys.argv
    count, *wanted = [argument for argument in sys.argv[1:] if argument != DRY]
    run(wanted, int(count), Setting(Path.cwd(), dry, TINY if dry else REAL))
