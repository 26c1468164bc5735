"""Settings every test shares: one thread a worker, a fixed seed, and base-size public models built once."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch

# `from oracles import ...` works from every test folder; last, so that no folder here hides an installed package.
sys.path.append(str(Path(__file__).resolve().parent))

# The same examples on every machine: a red test can be run again.
hypothesis.settings.register_profile(
    "beit3_fast", derandomize=True, deadline=None, max_examples=25, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile("beit3_fast")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):  # the workers already fill the cores
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def base_public_model() -> Callable[..., torch.nn.Module]:
    """`base_public_model(head)`: a randomised public model of base size; the last one built is kept.

    Only one is kept because each takes 0.7 GB. Tests must leave its parameters as they found them.
    """
    from oracles import public

    @functools.lru_cache(maxsize=1)
    def build(head: str) -> torch.nn.Module:
        return public.public_model(head, size="base")

    return build
