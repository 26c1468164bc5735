"""beit3_fast.backend: the one switch, as a call and as a context manager."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from beit3_fast.backend import BACKENDS, current_backend, use_backend
from beit3_fast.ops import route_tokens


@pytest.fixture(autouse=True)
def _auto_before_and_after() -> Iterator[None]:
    assert current_backend() == "auto"
    yield
    use_backend("auto")


class _OpCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def dispatched() -> bool:
    """Whether an op reaches ``torch.ops.beit3_fast``."""
    with _OpCalls() as calls:
        route_tokens(torch.tensor([0]), 1)
    return "beit3_fast::route_tokens" in calls.names


def test_default_is_auto() -> None:
    assert dispatched()


def test_plain_call_stays() -> None:
    use_backend("reference")
    assert current_backend() == "reference"
    assert not dispatched()
    use_backend("auto")
    assert current_backend() == "auto"
    assert dispatched()


def test_context_manager_restores() -> None:
    with use_backend("reference"):
        assert current_backend() == "reference"
        assert not dispatched()
    assert current_backend() == "auto"
    assert dispatched()


def test_context_managers_nest() -> None:
    with use_backend("reference"):
        with use_backend("auto"):
            assert current_backend() == "auto"
            with use_backend("reference"):
                assert current_backend() == "reference"
            assert current_backend() == "auto"
        assert current_backend() == "reference"


def test_context_manager_restores_what_a_call_chose() -> None:
    use_backend("reference")
    with use_backend("auto"):
        pass
    assert current_backend() == "reference"


def test_exception_restores_and_goes_on() -> None:
    error = RuntimeError("inside")
    with pytest.raises(RuntimeError) as caught, use_backend("reference"):
        raise error
    assert caught.value is error
    assert current_backend() == "auto"


def test_a_call_inside_is_undone() -> None:
    with use_backend("reference"):
        use_backend("auto")
    assert current_backend() == "auto"
    use_backend("reference")
    with use_backend("reference"):
        use_backend("auto")
    assert current_backend() == "reference"


def test_holds_for_every_thread() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(current_backend()))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize("name", ["cuda", "", "Reference", None, 0, ["auto"]])
def test_unknown_name(name: Any) -> None:
    with use_backend("reference"):
        with pytest.raises(ValueError, match="backend must be one of") as caught:
            use_backend(name)
        assert type(caught.value) is ValueError
        assert all(repr(known) in str(caught.value) for known in BACKENDS)
        assert repr(name) in str(caught.value)
        assert current_backend() == "reference"


def test_package_exports_it() -> None:
    import beit3_fast

    assert beit3_fast.use_backend is use_backend
