"""How fp32 products are taken: by whichever of PyTorch's settings was used. In processes of their own, since these
settings cannot be undone."""

from __future__ import annotations

import subprocess
import sys

import pytest

SETTINGS = {
    "pass": "ieee",
    "torch.set_float32_matmul_precision('highest')": "ieee",
    "torch.set_float32_matmul_precision('high')": "tf32",
    "torch.set_float32_matmul_precision('medium')": "tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "torch.backends.fp32_precision = 'tf32'": "tf32",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
    "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'": "ieee",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_precision_follows_the_setting(setting: str) -> None:
    code = (
        f"import torch; {setting}; from beit3_fast.ops._triton import precision; "
        "print(*map(precision, (torch.float32, torch.bfloat16, torch.float16, torch.float64)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [SETTINGS[setting], "ieee", "ieee", "ieee"]
