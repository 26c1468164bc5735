"""When the Triton kernels are taken, and the warning where they are not formally safe."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from beit3_fast.ops import _triton


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    cached = (_triton.missing, _triton.unsupported, _triton._taken, _triton._warn_once)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`machine(capability, version)`: two GPUs of that compute capability, and that Triton."""

    def pretend(capability: tuple[int, int], version: str | None) -> None:
        def version_of(name: str) -> str:
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
        monkeypatch.setattr(metadata, "version", version_of)

    return pretend


def takes(index: int = 0, dtype: torch.dtype = torch.bfloat16) -> tuple[bool, list[str]]:
    """Whether the kernels take a tensor on that GPU, and what was warned of meanwhile."""
    x: Any = SimpleNamespace(device=torch.device("cuda", index), dtype=dtype)  # all that is asked of a tensor
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return _triton.serves(x), [str(warning.message) for warning in caught]


@pytest.mark.parametrize("version", ["3.6.0", "3.7.0", "3.6.0+git1234"])
@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (10, 3), (11, 0)], ids=str)
def test_an_unfenced_triton_is_warned_of_once(machine: Any, capability: tuple[int, int], version: str) -> None:
    machine(capability, version)
    taken, messages = takes()
    assert taken
    assert len(messages) == 1
    assert f"Triton {version[:5]}" in messages[0]
    assert ">= 3.7.1" in messages[0]
    assert takes() == (True, [])
    assert takes(1) == (True, [])


@pytest.mark.parametrize(
    ("capability", "version"),
    [((9, 0), "3.7.1"), ((9, 0), "3.8.0"), ((9, 0), "3.10.0"), ((9, 0), None), ((8, 0), "3.6.0"), ((12, 0), "3.6.0")],
    ids=str,
)
def test_nothing_else_is_warned_of(machine: Any, capability: tuple[int, int], version: str | None) -> None:
    machine(capability, version)
    assert takes() == (True, [])


def test_what_the_kernels_do_not_run_on_is_not_warned_of(machine: Any) -> None:
    machine((9, 0), "3.6.0")
    assert takes(dtype=torch.float64) == (False, [])
    machine((7, 5), "3.6.0")
    assert takes() == (False, [])
