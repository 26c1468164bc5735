"""These tests need what a machine with a GPU is likely to have, and nothing to compare with that must be installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ABSENT = ("torchscale", "fairscale", "beit3", "torchvision", "PIL", "jsonschema", "pybind11", "ptxsim", "xdist", "cv2")


def test_they_are_collected_without_the_public_code(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        f"sys.modules |= dict.fromkeys({ABSENT!r})\n"
        "import pytest\n"
        f"sys.exit(pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', {str(FOLDER)!r}]))\n"
    )
    environment = os.environ | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    for variable in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER"):
        environment.pop(variable, None)
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
