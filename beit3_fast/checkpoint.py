"""Released files in, released keys out.

A checkpoint is a safetensors file, or a ``.pth`` in the public code's form ``{"model": state_dict}`` (or what other
trainers call it, or the state dict itself), often in fp16. It is read without executing code, and its keys and shapes
tell what it is.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
import pickle
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .models.config import EncoderConfig, nearest
from .models.embedding import PositionEmbedding
from .models.heads import BEiT3Wrapper
from .models.registry import HEADS

VISION_POSITIONS = "beit3.encoder.embed_positions.A.weight"
_UNPATCHED_ROWS = PositionEmbedding.FIRST + 1  # two dead rows and CLS
_HEAD_DIMS = {1408: 88}  # the giant's; every other published width has heads of 64
_LISTED = 8  # keys of one kind that an error spells out

_UNDER = ("model", "module", "state_dict", "model_state_dict", "model_ema")
"""What trainers call the weights in what they save, the first that is there."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, ``torch.compile`` and Lightning put before every key."""


class CheckpointError(ValueError):
    """A file that is not a BEiT-3 checkpoint, is damaged, would execute code, or does not fit the model."""


@dataclass(frozen=True)
class CheckpointInfo:
    """What a checkpoint's keys and shapes say it is.

    Attributes:
        head: a key of ``models.registry.HEADS``: "retrieval", "vqav2", ...
        config: of the backbone.
        num_classes: of the head, None where it has no classes.
    """

    head: str
    config: EncoderConfig
    num_classes: int | None


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, on the CPU, in the file's dtype. No code in the file is executed.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a damaged file, a file whose pickle holds anything but tensors and plain values, or one
            without a state dict.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"checkpoint {str(path)!r} is a directory, expected a .pth or .safetensors file")
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    if _is_safetensors(path):
        import safetensors
        from safetensors.torch import load_file

        try:
            return _without_prefix(load_file(path))
        except safetensors.SafetensorError as error:
            raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        with torch.serialization.safe_globals(_plain_globals()):
            stored = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except pickle.UnpicklingError as error:
        # PyTorch's own words advise to load the file unsafely
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it refers to {found[1]}" if found else "unsupported pickle instructions"
        raise CheckpointError(
            f"{path} was refused: it is damaged or holds pickled code, which is never executed here ({reason})"
        ) from error
    except Exception as error:  # a damaged pickle makes the unpickler fail in any way
        raise CheckpointError(f"{path} is damaged or not a PyTorch checkpoint ({type(error).__name__})") from error
    if isinstance(stored, Mapping):
        for key in _UNDER:
            if isinstance(stored.get(key), Mapping):
                stored = stored[key]
                break
    if not isinstance(stored, Mapping) or not stored:
        raise CheckpointError(f"{path} holds a {type(stored).__name__}, expected a state dict")
    strange = [
        str(key)
        for key, value in stored.items()
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta
    ]
    if strange:
        raise CheckpointError(f"{path} holds entries that are not plain tensors: {_some(strange)}")
    return _without_prefix(stored)


def _is_safetensors(path: Path) -> bool:
    """By its name, or by its first bytes: the length of a header that is JSON and within the file."""
    with open(path, "rb") as file:
        start = file.read(9)
    named = path.suffix == ".safetensors"
    return named or (start[8:] == b"{" and 0 < int.from_bytes(start[:8], "little") < path.stat().st_size)


def _without_prefix(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict as the model itself names it: what every key begins with is the wrapper's."""
    found = next((p for p in _PREFIXES if state_dict and all(key.startswith(p) for key in state_dict)), None)
    if found is None:
        return dict(state_dict)
    return _without_prefix({key.removeprefix(found): value for key, value in state_dict.items()})


def _plain_globals() -> list[Any]:
    """What trainers store beside the weights, a command line or the best accuracy, is data: making it runs no code of
    the file. Each under the names that versions of Python and numpy give it."""
    dtypes = [value for name, value in vars(numpy.dtypes).items() if name.endswith("DType")]
    scalar = numpy.float64(0).__reduce__()[0]
    scalars = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    paths = [
        (kind, f"{module}.{name}")
        for kind, name in (
            (pathlib.PosixPath if os.name == "posix" else pathlib.PurePosixPath, "PosixPath"),
            (pathlib.WindowsPath if os.name == "nt" else pathlib.PureWindowsPath, "WindowsPath"),
            (pathlib.PurePosixPath, "PurePosixPath"),
            (pathlib.PureWindowsPath, "PureWindowsPath"),
        )
        for module in ("pathlib", "pathlib._local")
    ]
    return [argparse.Namespace, numpy.dtype, *dtypes, *scalars, *paths]


def inspect(state_dict: Mapping[str, Tensor]) -> CheckpointInfo:
    """Which head, size and resolution a state dict with released keys is.

    Raises:
        CheckpointError: keys or shapes of no BEiT-3.
    """

    def tensor(key: str, ndim: int) -> Tensor:
        value = state_dict.get(key)
        if value is None or value.ndim != ndim:
            got = "is missing" if value is None else f"has shape {tuple(value.shape)}"
            raise CheckpointError(f"not a BEiT-3 checkpoint: {key} {got}")
        return value

    vocab_size, width = tensor("beit3.text_embed.weight", 2).shape
    _, in_chans, patch_size, _ = tensor("beit3.vision_embed.proj.weight", 4).shape
    grid = math.isqrt(max(tensor(VISION_POSITIONS, 2).shape[0] - _UNPATCHED_ROWS, 0))
    if grid == 0 or grid**2 + _UNPATCHED_ROWS != state_dict[VISION_POSITIONS].shape[0]:
        raise CheckpointError(f"{VISION_POSITIONS} has {state_dict[VISION_POSITIONS].shape[0]} rows: not a square grid")
    layers = "beit3.encoder.layers."
    depths = {key[len(layers) :].split(".")[0] for key in state_dict if key.startswith(layers)}
    if not depths or depths != {str(depth) for depth in range(len(depths))}:
        raise CheckpointError(f"not a BEiT-3 checkpoint: its encoder layers are {_some(sorted(depths)) or 'none'}")
    heads, rest = divmod(width, _HEAD_DIMS.get(width, 64))
    try:
        config = EncoderConfig(
            encoder_embed_dim=width,
            encoder_attention_heads=1 if rest else heads,
            encoder_ffn_embed_dim=tensor(f"{layers}0.ffn.A.fc1.weight", 2).shape[0],
            encoder_layers=len(depths),
            normalize_output="beit3.encoder.layer_norm.A.weight" in state_dict,
            max_source_positions=tensor("beit3.encoder.embed_positions.B.weight", 2).shape[0],
            vocab_size=vocab_size,
            img_size=grid * patch_size,
            patch_size=patch_size,
            in_chans=in_chans,
            shared_attention=f"{layers}0.self_attn.q_proj.weight" in state_dict,
            vl_ffn_layers=sum(f"{layers}{depth}.ffn.VL.fc1.weight" in state_dict for depth in depths),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"not a BEiT-3 checkpoint: {error}") from error
    # a key that only this head has, and the tensor whose rows are its classes
    marks = {
        "retrieval": ("language_head.weight", None),
        "vqav2": ("pooler.dense.weight", "head.3.weight"),
        "nlvr2": ("head.dense1.weight", "head.dense2.weight"),
        "imageclassification": ("fc_norm.weight", "head.weight"),
        "pretraining": ("mim_head.weight", None),
        "captioning": ("mlm_head.weight", None),
    }
    for head, (mark, classes) in marks.items():
        if mark in state_dict:
            if head == "imageclassification" and classes not in state_dict:
                return CheckpointInfo(head, config, 0)
            return CheckpointInfo(head, config, None if classes is None else tensor(classes, 2).shape[0])
    raise CheckpointError(
        f"no known head among the checkpoint's keys; expected one of {[m for m, _ in marks.values()]}"
    )


def resize_positions(table: Tensor, img_size: int, patch_size: int) -> Tensor:
    """A vision position table for another image size: bicubic over the patch grid, CLS and dead rows kept.

    As unilm/beit3 ``load_model_and_may_interpolate``, but always computed in fp32: there is no fp16 bicubic on the CPU.

    Args:
        table: (grid ** 2 + 3, D), any floating dtype.
        img_size, patch_size: pixels; the new grid is their quotient.

    Returns:
        (new_grid ** 2 + 3, D) in table's dtype; table itself when the grid is unchanged.
    """
    kept, patches = table[:_UNPATCHED_ROWS], table[_UNPATCHED_ROWS:]
    grid, new_grid = math.isqrt(patches.shape[0]), img_size // patch_size
    if grid == new_grid or not grid or patches.shape[0] != grid**2:
        return table
    square = patches.float().view(1, grid, grid, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, size=(new_grid, new_grid), mode="bicubic", align_corners=False)
    return torch.cat([kept, resized.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)])


def load_model(
    path: str | os.PathLike[str],
    *,
    head: str | None = None,
    image_size: int | None = None,
    num_classes: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> BEiT3Wrapper:
    """The model that a released checkpoint holds, in eval mode, told from the file alone.

    Args:
        path: ``.pth`` or ``.safetensors``.
        head: another head than the file's, to fine-tune from it ("retrieval", "vqav2", "nlvr2", "captioning",
            "imageclassification", "pretraining"): the backbone is loaded, the head freshly initialised.
        image_size: another image size in pixels; position embeddings are interpolated.
        num_classes: of a new head.
        dtype: of the parameters; fp32 by default, whatever the file has.
        device: of the model; the CPU by default.
        **overrides: further fields of :class:`EncoderConfig`, e.g. ``drop_path_rate``, or ``encoder_attention_heads``
            for a model whose heads are not 64 wide.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: a damaged or foreign file, or keys and shapes that do not fit (all of them listed).
        TypeError, ValueError: a bad argument, named in the message.
    """
    if head is not None and head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}{nearest(str(head), list(HEADS))}")
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise ValueError(f"num_classes must be a positive int, got {num_classes!r}")
    if image_size is not None:
        overrides["img_size"] = image_size
    known = list(EncoderConfig.__dataclass_fields__)
    for name in overrides:
        if name not in known:
            raise TypeError(f"unknown override {name!r}{nearest(name, known)}")
    state_dict = read_state_dict(path)
    info = inspect(state_dict)
    new_head = head is not None and head != info.head
    spec = HEADS[head or info.head]
    if new_head:
        overrides = {"normalize_output": spec.normalize_output, **overrides}
    config = replace(info.config, **overrides)
    classes: dict[str, Any] = {}
    if spec.num_classes is not None:
        found = spec.num_classes if new_head or info.num_classes is None else info.num_classes
        classes["num_classes"] = found if num_classes is None else num_classes
    elif num_classes is not None:
        raise ValueError(f"num_classes must be None: a {head or info.head} model has no classes")
    if info.head == "pretraining" and not new_head:
        classes["num_visual_tokens"] = state_dict["mim_head.weight"].shape[0]
    model = spec.model(config, **classes)
    fresh_head = new_head or classes.get("num_classes") != info.num_classes
    load_state_dict(model, state_dict, source=str(path), free=_outside_backbone if fresh_head else None)
    return model.to(device=device, dtype=dtype).eval()


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> list[str]:
    """Load a checkpoint file into a model that exists, interpolating position embeddings to its image size.

    Args:
        model: one of the released classes.
        path: ``.pth`` or ``.safetensors``.
        strict: raise unless every key and shape fits; otherwise what does not fit is left out.

    Returns:
        One line for each kind of key that did not fit (empty when all did).

    Raises:
        FileNotFoundError, CheckpointError: as :func:`load_model`.
    """
    return load_state_dict(model, read_state_dict(path), source=str(path), strict=strict)


def _outside_backbone(key: str) -> bool:
    # the final LayerNorm counts as the head's: some heads go without
    return not key.startswith("beit3.") or key.startswith("beit3.encoder.layer_norm.")


def load_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor],
    *,
    source: str = "state dict",
    strict: bool = True,
    free: Callable[[str], bool] | None = None,
) -> list[str]:
    """:func:`load_checkpoint` from tensors in memory; nothing is loaded if ``strict`` and anything does not fit.

    Args:
        source: what error messages call the state dict.
        free: keys that need not fit even so, e.g. those of a head that is new.
    """
    backbone = getattr(model, "beit3", None)
    state_dict = dict(state_dict)
    if backbone is not None and VISION_POSITIONS in state_dict:
        config = backbone.config
        if state_dict[VISION_POSITIONS].ndim == 2:
            state_dict[VISION_POSITIONS] = resize_positions(
                state_dict[VISION_POSITIONS], config.img_size, config.patch_size
            )
    expected = model.state_dict()
    fitting = {
        key: value for key, value in state_dict.items() if key in expected and value.shape == expected[key].shape
    }
    bound = [key for key in {**expected, **state_dict} if key not in fitting and not (free and free(key))]
    missing = [key for key in bound if key not in state_dict]
    unexpected = [key for key in bound if key not in expected]
    shapes = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(expected[key].shape)}"
        for key in bound
        if key in expected and key in state_dict
    ]
    problems = [
        f"{len(keys)} {what}: {_some(keys)}"
        for what, keys in (
            ("missing from the file", missing),
            ("unexpected in the file", unexpected),
            ("of another shape", shapes),
        )
        if keys
    ]
    if problems and strict:
        raise CheckpointError(f"{source} does not fit {type(model).__name__}:\n  " + "\n  ".join(problems))
    model.load_state_dict(fitting, strict=False)
    return problems


def save_checkpoint(model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write a model (or a state dict) under released keys: ``.safetensors``, or ``.pth`` as ``{"model": state_dict}``.

    The file appears whole or not at all.

    Raises:
        ValueError: a path with another suffix.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"path must end in .safetensors or .pth, got {str(path)!r}")
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise TypeError(f"model must be a module or a mapping of names to tensors, got {type(model).__name__}")
    # keys are views into fused parameters: a file holds each by itself
    tensors = {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import save_file

            save_file(tensors, temporary, metadata={"format": "pt"})
        else:
            torch.save({"model": tensors}, temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def convert(source: str | os.PathLike[str], destination: str | os.PathLike[str]) -> CheckpointInfo:
    """Rewrite a checkpoint as ``.safetensors`` or ``.pth``, by the destination's suffix; tensors keep keys and dtype.

    Raises:
        FileNotFoundError, CheckpointError: the source cannot be read or is no BEiT-3.
        ValueError: the destination's suffix is neither.
    """
    if Path(destination).suffix not in (".safetensors", ".pth"):
        raise ValueError(f"destination must end in .safetensors or .pth, got {str(destination)!r}")
    state_dict = read_state_dict(source)
    info = inspect(state_dict)
    save_checkpoint(state_dict, destination)
    return info


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _some(keys: list[str]) -> str:
    more = f", ... ({len(keys) - _LISTED} more)" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more
