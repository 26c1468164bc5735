"""The peers of ``bench model``: the public code, and the inference engines people would turn to instead.

An engine gets reference PyTorch's module with the case's weights, in the form that it can run: every text padded to
the same length, with the padding mask. Converting, compiling and packing weights come before the timing; threads are
those of the run. Adding a peer is adding an entry to ``PEERS``.

An engine is tried on the case in a process of its own first: one that crashes there, as some do on some processors,
runs out of memory or does not come to an end is missing from the run and does not end it. ``python -m
beit3_fast.bench.model_peers NAME`` is that process, started through :mod:`.isolation` with the case on its standard
input.
"""

from __future__ import annotations

import functools
import importlib
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beit3_fast.models import EncoderConfig

from . import isolation, model
from .cases import ModelCase, check_known
from .model import Provider, Run, Setup, in_bfloat16, under_autocast

MODULE = "beit3_fast.bench.model_peers"
Missing = Callable[[ModelCase, torch.device], "str | None"]


# ---- the public code ----


def quietly_import(name: str) -> Any:
    """A module of the public code; timm warns that two paths that it imports have moved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return importlib.import_module(name)


def public_config(config: EncoderConfig) -> Any:
    """Torchscale's own configuration of the same model."""
    make = quietly_import("torchscale.architecture.config").EncoderConfig
    ours = {field.name: getattr(config, field.name) for field in fields(config)}
    options = {name: value for name, value in ours.items() if name in vars(make())}
    return make(**options, multiway=True, no_output_layer=True, layernorm_embedding=False)


def public_backbone(config: EncoderConfig) -> nn.Module:
    """Torchscale's BEiT3."""
    return quietly_import("torchscale.model.BEiT3").BEiT3(public_config(config))


def _public(setup: Setup) -> Run:
    backbone = setup.build(public_backbone)
    return lambda: setup.inputs.call(backbone)


def _public_autocast(setup: Setup) -> Run:
    return under_autocast(setup.build(public_backbone, torch.float32), setup)


# ---- timm ----


def _timm(setup: Setup) -> Run:
    """timm's own BEiT-3, a VisionTransformer, with the case's weights through timm's checkpoint filter."""
    timm = quietly_import("timm")
    from timm.models.vision_transformer import checkpoint_filter_fn

    config = setup.config
    tower = timm.create_model(
        "beit3_base_patch16_224",
        img_size=config.img_size,
        patch_size=config.patch_size,
        embed_dim=config.encoder_embed_dim,
        depth=config.encoder_layers,
        num_heads=config.encoder_attention_heads,
        mlp_ratio=config.encoder_ffn_embed_dim / config.encoder_embed_dim,
        num_classes=0,
        global_pool="token",  # the final LayerNorm is that of all tokens
    )
    released = {f"beit3.{name}": tensor.clone() for name, tensor in setup.weights.items()}
    state = checkpoint_filter_fn(released, tower)
    for part in ("weight", "bias"):
        state[f"norm.{part}"] = state.pop(f"layer_norm.{part}")  # no released image model has one
    tower.load_state_dict(state, strict=True)
    tower = tower.to(device=setup.device, dtype=setup.case.dtype).eval()
    return lambda: tower.forward_features(setup.inputs.visual_tokens)


def _images_alone(case: ModelCase, device: torch.device) -> str | None:
    return None if case.text_tokens is None else "has the image tower alone"


# ---- engines ----


class _Positional(nn.Module):
    """A backbone as engines want it: tensors in by position, one tensor out."""

    def __init__(self, backbone: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.backbone = backbone
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.backbone(**dict(zip(self.names, tensors, strict=True)))["encoder_out"]


def _positional(setup: Setup, dtype: torch.dtype) -> tuple[nn.Module, tuple[Tensor, ...]]:
    given = {name: tensor for name, tensor in vars(setup.inputs.to(dtype)).items() if tensor is not None}
    return _Positional(setup.reference(dtype), list(given)).eval(), tuple(given.values())


def _openvino(setup: Setup) -> Run:
    """In float32 weights; a bfloat16 case asks the engine to compute in bfloat16."""
    import openvino

    module, tensors = _positional(setup, torch.float32)
    with warnings.catch_warnings():  # of tracing: that sizes and the split become constants, as they should
        warnings.simplefilter("ignore")
        converted = openvino.convert_model(module, example_input=tensors)
    converted.reshape({index: list(tensor.shape) for index, tensor in enumerate(tensors)})
    precision = "bf16" if setup.case.dtype == torch.bfloat16 else "f32"
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = openvino.compile_model(converted, "CPU", options).create_infer_request()
    arrays = [tensor.numpy() for tensor in tensors]

    def run() -> Tensor:
        return torch.from_numpy(request.infer(arrays, share_inputs=True, share_outputs=True)[0])

    return run


def _onnxruntime(setup: Setup) -> Run:
    import onnxruntime

    module, tensors = _positional(setup, torch.float32)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # its threads go on spinning after a run, in the time of whoever runs next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, tensors, file, opset_version=18, dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    arrays = dict(zip((given.name for given in session.get_inputs()), (t.numpy() for t in tensors), strict=True))
    return lambda: torch.from_numpy(session.run(None, arrays)[0])


def _zentorch(setup: Setup) -> Run:
    import torch._inductor.config
    import zentorch  # noqa: F401  (registers the backend)

    torch.compiler.reset()  # graphs of earlier cases count towards the limit on recompilations
    module, tensors = _positional(setup, setup.case.dtype)
    compiled = torch.compile(module, backend="zentorch", dynamic=False)
    # as with TORCHINDUCTOR_FREEZING=1; the first call compiles
    with torch._inductor.config.patch(freezing=True), setup.running():
        compiled(*tensors)
    return lambda: compiled(*tensors)


def _tensorrt(setup: Setup) -> Run:
    import torch_tensorrt  # noqa: F401  (registers the backend)

    torch.compiler.reset()
    module, tensors = _positional(setup, setup.case.dtype)
    compiled = torch.compile(module, backend="torch_tensorrt", dynamic=False)
    with setup.running():
        compiled(*tensors)  # compiles
    return lambda: compiled(*tensors)


# ---- who can take part ----


def _package(name: str, install: str) -> Missing:
    def missing(case: ModelCase, device: torch.device) -> str | None:
        return None if find_spec(name) else f"{name} is not installed (pip install {install})"

    return missing


def _bfloat16_case(case: ModelCase, device: torch.device) -> str | None:
    return None if case.dtype == torch.bfloat16 else "computes in bfloat16, the case is in float32"


def _float32_case(case: ModelCase, device: torch.device) -> str | None:
    return None if case.dtype == torch.float32 else "has no bfloat16 on a CPU"


def _cpu(case: ModelCase, device: torch.device) -> str | None:
    return None if device.type == "cpu" else "is measured on a CPU alone"


def _survives(name: str) -> Missing:
    def missing(case: ModelCase, device: torch.device) -> str | None:
        return _trial(name, case)

    return missing


def _gpu(case: ModelCase, device: torch.device) -> str | None:
    return None if device.type == "cuda" else "is for a GPU alone"


def _first(*reasons: Missing) -> Missing:
    """The first reason against taking part."""

    def missing(case: ModelCase, device: torch.device) -> str | None:
        return next(filter(None, (reason(case, device) for reason in reasons)), None)

    return missing


def _engine(name: str, *reasons: Missing) -> Missing:
    return _first(_cpu, *reasons, _package(name, "'beit3_fast[peers]'"), _survives(name))


@functools.cache
def _trial(name: str, case: ModelCase) -> str | None:
    """Runs an engine on the case in a process of its own; why it cannot be used, None if it can."""
    end, _ = isolation.run(MODULE, [name], pickle.dumps((case, model._config(case), torch.get_num_threads())))
    return None if end is None else f"cannot run in a process of its own: {end}"


def try_out(name: str, case: ModelCase, config: EncoderConfig) -> None:
    """Builds the engine for a case and runs it once.

    Raises:
        ValueError: an unknown name, or a result that is not finite.
        Exception: whatever the engine raises.
    """
    check_known("provider", name, [provider.name for provider in PEERS])
    (provider,) = (provider for provider in PEERS if provider.name == name)
    setup = Setup(case, torch.device("cpu"), config)
    with torch.no_grad():
        run = provider.build(setup)
    with setup.running():
        out = setup.valid(run())
    if not out.isfinite().all():
        raise ValueError(f"{name} gave values that are not finite")


_TORCHSCALE = _package("torchscale", "--no-deps torchscale==0.3.0 fairscale timm")

PEERS = (
    Provider("public", _public, missing=_TORCHSCALE, peer=True),
    Provider(
        "public, autocast",
        _public_autocast,
        judged_by="public, autocast",
        computes_in=in_bfloat16,
        missing=_first(_bfloat16_case, _TORCHSCALE),
        peer=True,
    ),
    Provider("timm", _timm, missing=_first(_images_alone, _package("timm", "timm")), peer=True),
    Provider("openvino", _openvino, missing=_engine("openvino"), peer=True),
    Provider("onnxruntime", _onnxruntime, missing=_engine("onnxruntime", _float32_case), peer=True),
    Provider("zentorch", _zentorch, missing=_engine("zentorch"), peer=True),
    Provider(
        "tensorrt",
        _tensorrt,
        missing=_first(_gpu, _package("torch_tensorrt", "torch-tensorrt")),
        peer=True,
    ),
)


if __name__ == "__main__":
    tried_case, its_config, threads = pickle.load(sys.stdin.buffer)
    torch.set_num_threads(threads)
    try_out(sys.argv[1], tried_case, its_config)
