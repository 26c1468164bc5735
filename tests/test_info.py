"""`info()` tells what there is and why the rest is not; importing the package is quick and needs nothing optional."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import beit3_fast
from beit3_fast import _extension, _info

COMPILED = {
    "multiway_linear": "multiway_linear_cpu",
    "multiway_ffn": "multiway_linear_cpu",
    "attention": "attention_cpu",
    "decode_attention": "decode_attention_cpu",
}
TRITON = ("multiway_linear", "multiway_ffn", "attention", "decode_attention", "route_tokens")
OPS = ("layer_norm", "multiway_linear", "multiway_ffn", "attention", "decode_attention", "route_tokens")


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    assert beit3_fast.info() is None
    return capsys.readouterr().out


def test_versions(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys)
    assert f"beit3_fast {beit3_fast.__version__} " in out
    assert f"python {platform.python_version()}" in out
    assert f"torch {torch.__version__}" in out
    assert str(Path(beit3_fast.__file__).parent) in out  # which of several installations this is
    assert torch.backends.cpu.get_cpu_capability() in out
    assert f"{torch.get_num_threads()} threads" in out
    assert re.fullmatch(r"\d+\.\d+\.\d+", beit3_fast.__version__)


def test_every_op_and_what_serves_it(capsys: pytest.CaptureFixture[str]) -> None:
    lines = {line.split()[0]: line for line in printed(capsys).splitlines() if line.split()}
    assert set(OPS) <= set(beit3_fast.ops.__all__)
    public_ops = {name for name in beit3_fast.ops.__all__ if f"{name}_reference" in beit3_fast.ops.__all__}
    assert public_ops == set(OPS), "an op that info() does not know"
    for op in OPS:
        assert op in lines
        served = re.split(r"\s{2,}", lines[op].strip())
        assert len(served) == 3, lines[op]  # the op, on CPU, on GPU
        for device, by in zip(("CPU", "CUDA"), served[1:], strict=True):
            name = COMPILED.get(op, op) if device == "CPU" else op
            compiled = torch._C._dispatch_has_kernel_for_dispatch_key(f"beit3_fast::{name}", device)
            triton = device == "CUDA" and op in TRITON and find_spec("triton") is not None
            assert by == ("compiled" if compiled else "Triton" if triton else "plain PyTorch")


def test_a_compiled_kernel_is_shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch._C,
        "_dispatch_has_kernel_for_dispatch_key",
        lambda op, key: (op, key) == ("beit3_fast::attention", "CUDA"),
    )
    lines = printed(capsys).splitlines()
    attention = next(line for line in lines if line.split()[:1] == ["attention"])
    assert re.fullmatch(r"attention\s+plain PyTorch\s+compiled", attention.strip())
    assert sum("compiled" in line.split() and line.split()[0] in OPS for line in lines) == 1


def test_the_state_of_the_compiled_libraries(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys)
    status = _extension.status()
    assert status
    for part, record in status.items():
        line = next(line for line in out.splitlines() if f"compiled {part} library" in line)
        assert record.reason
        assert record.reason in line
        assert ("not loaded" in line) == (not record.loaded)


def test_why_a_library_is_unavailable(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    records = {
        "cpu": SimpleNamespace(loaded=True, reason="libbeit3_cpu.so"),
        "cuda": SimpleNamespace(loaded=False, reason="built without nvcc"),
    }
    monkeypatch.setattr(_info._extension, "status", lambda: records)
    out = printed(capsys)
    assert re.search(r"cpu library: loaded.*libbeit3_cpu\.so", out)
    assert re.search(r"cuda library: not loaded.*built without nvcc", out)


def test_packages_that_are_not_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert "triton not installed" in printed(capsys)
    monkeypatch.setattr(metadata, "version", lambda name: f"9.8.7+{name}")
    assert "triton 9.8.7+triton" in printed(capsys)


@pytest.mark.parametrize(("version", "told"), [("3.6.0", True), ("3.7.0", True), ("3.7.1", False), ("3.10.0", False)])
def test_a_triton_that_is_not_formally_safe(
    version: str, told: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: version)
    line = next(line for line in printed(capsys).splitlines() if line.strip().startswith("Triton kernels"))
    assert (f"Triton {version} leaves out a fence" in line and ">= 3.7.1" in line) == told


@pytest.mark.parametrize(
    ("cuda", "available", "devices", "words"),
    [
        (None, False, [], "CPU build"),
        ("13.0", False, [], "none found"),
        ("13.0", True, ["NVIDIA H100"], "NVIDIA H100"),
        ("13.0", True, ["NVIDIA A100", "NVIDIA L4"], "NVIDIA A100, NVIDIA L4"),
    ],
)
def test_devices(
    cuda: str | None,
    available: bool,
    devices: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: devices[index])
    line = next(line for line in printed(capsys).splitlines() if line.strip().startswith("GPU"))
    assert words in line


# ---------------------------------------------------------------------------------------------------------- importing

OPTIONAL = ("PIL", "sentencepiece", "matplotlib", "click", "rich", "triton", "torchvision", "timm", "torchscale")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    path = str(Path(beit3_fast.__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {code}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What `import beit3_fast` does to a fresh interpreter that has PyTorch."""
    return json.loads(
        python(
            "import json, torch; "
            "state = lambda: [torch.get_num_threads(), str(torch.get_default_dtype()), torch.is_grad_enabled(), "
            "torch.initial_seed(), torch.get_float32_matmul_precision(), list(sys.path)]; "
            "modules, before = set(sys.modules), state(); "
            "import beit3_fast, beit3_fast.models; "
            "json.dump({'modules': sorted(set(sys.modules) - modules), 'before': before, 'after': state(), "
            "'cuda': torch.cuda.is_initialized()}, sys.stdout)"
        )
    )


def test_importing_is_lean(imported: dict[str, Any]) -> None:
    """Nothing optional, nothing heavy: what `import torch` has not brought in, this package does not either."""
    added = imported["modules"]
    assert "beit3_fast.models.heads" in added
    heavy = (*OPTIONAL, "safetensors", "torchscale", "fairscale", "transformers", "cv2", "scipy", "pandas")
    heavy_torch = ("torch._inductor", "torch._dynamo", "torch.utils.cpp_extension", "torch.onnx", "torch.testing")
    brought = [name for name in added if name.split(".")[0] in heavy or name.startswith(heavy_torch)]
    assert brought == []
    foreign = {name.split(".")[0] for name in added} - {"beit3_fast", "torch", *sys.stdlib_module_names}
    # torch.distributed.nn registers a module under this name
    assert foreign <= {"_remote_module_non_scriptable"}


def test_everything_optional_may_be_missing() -> None:
    """The model and info() work without what only processing, the demo, the kernels or other files need."""
    out = python(
        "import torch; "
        f"sys.modules.update(dict.fromkeys({(*OPTIONAL, 'safetensors')!r})); "  # importing these raises ImportError now
        "import beit3_fast; beit3_fast.info(); "
        "small = dict(encoder_layers=1, encoder_embed_dim=8, encoder_attention_heads=2, encoder_ffn_embed_dim=8); "
        "model = beit3_fast.create_model('beit3_base_patch16_224_imageclassification', img_size=16, **small); "
        "print('logits', *model(torch.zeros(2, 3, 16, 16)).shape)"
    )
    assert "logits 2 1000" in out
    assert all(op in out for op in OPS)


def test_a_pytorch_without_distributed() -> None:
    """Some builds have none (`torch.distributed.is_available()` is False): only a loss over several ranks needs it."""
    code = (
        "import torch; torch.distributed.is_available = lambda: False; "
        "names = ('torch.distributed.nn', 'torch.distributed.nn.functional', 'torch.distributed.distributed_c10d'); "
        "sys.modules.update(dict.fromkeys(names)); "
        "import beit3_fast.models as models; "
        "print(float(models.ClipLoss()(torch.eye(2), torch.eye(2), torch.tensor(1.0))[0]))"
    )
    assert float(python(code)) == pytest.approx(0.3132617)


def test_importing_changes_nothing_global(imported: dict[str, Any]) -> None:
    assert imported["after"] == imported["before"]
    assert not imported["cuda"], "a process that forks its data loaders must not have initialised CUDA"
