"""What ``bench model`` runs for each task of a case: how it is set up, and who takes part."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import captioning, model, model_peers, training
from .cases import ModelCase, check_known
from .model import CaseResult, Provider


@dataclass(frozen=True)
class Task:
    """``own`` always takes part, ``peers`` where they are asked for; who others are judged by comes first."""

    make_setup: type[model.Setup]
    own: list[Provider]
    peers: list[Provider]


def tasks() -> dict[str, Task]:
    """By the name that a case gives its task."""
    peers = [model.INT8, model.SDPA, model.COMPILED, *model_peers.PEERS]
    return {
        "forward": Task(model.Setup, model.providers(), peers),
        "training": Task(training.Setup, training.OWN, training.PEERS),
        "captioning": Task(captioning.Setup, captioning.PROVIDERS, []),
    }


def check_providers(names: Iterable[str]) -> None:
    """Raises :class:`ValueError` for a name that no task knows (the nearest known ones are offered)."""
    known = dict.fromkeys(provider.name for task in tasks().values() for provider in (*task.own, *task.peers))
    for name in names:
        check_known("provider", name, known)


def take_part(task: Task, names: Iterable[str] = (), *, peers: bool = False, compiled: bool = False) -> list[Provider]:
    """With names these, the baseline and ours; otherwise the task's own, and with ``peers`` everybody."""
    names = list(names)
    if names:
        chosen = {task.make_setup.baseline, *model.OUR_NAMES, *names}
        return [provider for provider in (*task.own, *task.peers) if provider.name in chosen]
    if peers:
        return [*task.own, *task.peers]
    return [*task.own, *(provider for provider in task.peers if compiled and provider is model.COMPILED)]


def run(
    case: ModelCase,
    names: Iterable[str] = (),
    *,
    peers: bool = False,
    compiled: bool = False,
    device: torch.device,
    rounds: int,
    progress: Callable[[str], None] = lambda message: None,
) -> CaseResult:
    """A case's parity, times and, for training on a CPU, memory.

    A case whose task needs what is not installed is skipped with the reason.
    """
    task = tasks()[case.task]
    taking_part = take_part(task, names, peers=peers, compiled=compiled)
    options: dict[str, Any] = {"device": device, "rounds": rounds, "progress": progress}
    try:
        result = model.run_case(case, taking_part, make_setup=task.make_setup, **options)
    except ModuleNotFoundError as error:
        return CaseResult(case, [], None, task.make_setup.baseline, skipped=str(error))
    if case.task != "training" or device.type != "cpu":
        return result
    memory = {}
    for outcome in result.outcomes:
        if outcome.ok:
            progress(f"{case.name}: memory of {outcome.provider}")
            memory[outcome.provider] = training.memory(case, model._config(case), outcome.provider)
    return replace(result, memory=memory)
