"""A process of ``bench ... --base``: runs calls with the library it was started with, one when asked.

Requests come on standard input as pickled tuples, each answered on standard output by (True, the answer) or (False,
what was raised). Whatever else is printed goes to standard error.

    ("start", threads)               the folder of the package that is running
    ("prepare", case, provider)      None, or why the provider of ours may not be timed; a later case replaces it
    ("time",)                        nanoseconds of one call
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import beit3_fast

from . import model_tasks, ops
from .cases import ModelCase
from .op_cases import OpCase
from .op_providers import OURS, REFERENCE
from .outcome import Outcome, judge
from .timing import MIN_ROUNDS, wall_clock

CPU = torch.device("cpu")

Time = Callable[[], float]


def prepare(case: ModelCase | OpCase, provider: str) -> Time | str:
    """What times one call, or why there may be none."""
    return _op(case) if isinstance(case, OpCase) else _model(case, provider)


def _op(case: OpCase) -> Time | str:
    """The bench's own parity, with a stopwatch that keeps the calls for later and stops nothing."""
    calls: dict[str, ops.Call] = {}

    def keep(call: Any) -> float:
        calls[call.provider.name] = call
        return 1.0

    result = ops.run_case(case, [REFERENCE, OURS], device=CPU, rounds=MIN_ROUNDS, stopwatch=keep)
    if result.skipped is not None:
        return result.skipped
    outcome = next(outcome for outcome in result.outcomes if outcome.provider == OURS.name)
    if not outcome.ok:
        return outcome.words
    measure, call = ops.cold(CPU), calls[OURS.name]
    return lambda: measure(call)


def _model(case: ModelCase, provider: str) -> Time | str:
    task = model_tasks.tasks()[case.task]
    setup = task.make_setup(case, CPU)
    truth = setup.truth()
    known = {entry.name: entry for entry in task.own}
    outcomes: dict[str, Outcome] = {}
    for name in dict.fromkeys((known[provider].judged_by, provider)):
        with torch.no_grad():
            run = known[name].build(setup)
        with setup.running():
            errors = setup.errors(run(), truth)
        verdict = judge(errors, known[name].computes_in(case), known[name].judge, outcomes)
        outcomes[name] = Outcome(name, errors=errors, verdict=verdict)
    if not outcomes[provider].ok:
        return outcomes[provider].words
    clock = wall_clock()

    def measure() -> float:
        with setup.running():
            return clock(run)

    return measure


def serve(requests: Any, answers: Any) -> None:
    """Answers until there are no more requests; ``requests`` and ``answers`` are binary files."""
    measure: Time | None = None
    while True:
        try:
            what, *arguments = pickle.load(requests)
        except EOFError:
            return
        answer: Any = None
        right = True
        try:
            if what == "start":
                torch.set_num_threads(*arguments)
                answer = str(Path(beit3_fast.__file__).parent)
            elif what == "prepare":
                measure = None  # its memory goes before the next case's comes
                prepared = prepare(*arguments)
                if isinstance(prepared, str):
                    answer = prepared
                else:
                    measure = prepared
            elif measure is None:
                raise RuntimeError("nothing was prepared")
            else:
                answer = measure()
        except Exception as error:
            right, answer = False, f"{type(error).__name__}: {error}"
        pickle.dump((right, answer), answers)
        answers.flush()


if __name__ == "__main__":
    own_output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, own_output)
