"""Whoever ends the process ends one of its own: the others are measured, and the report says how it ended."""

from __future__ import annotations

import json
import signal
import textwrap
from pathlib import Path

import beit3_fast.bench.command as command
import beit3_fast.bench.isolation as isolation
import beit3_fast.bench.op_providers as op_providers
import beit3_fast.bench.op_trial as op_trial
import beit3_fast.bench.ops as bench
import pytest
import torch
from beit3_fast.bench.op_cases import Batch, OpCase, Shape
from beit3_fast.bench.op_providers import OpProvider
from beit3_fast.bench.roofs import Roofs

CPU = torch.device("cpu")
CASE = OpCase(Shape("norm", "layer_norm", width=64), Batch("tiny", 3, 5, (4, 1), 6))


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module that other processes find: ``write(source)`` returns its name."""

    def write(source):
        (tmp_path / "tried.py").write_text(textwrap.dedent(source))
        return "tried"

    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return write


TRIED = """
import os, signal, sys
sys.path.insert(0, {path!r})
from isolation import survived
for name in sys.argv[1:]:
    if name.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, name))
    if name == "abort":
        os.abort()
    if name == "exit":
        sys.exit("no such device")
    if name == "quiet":
        os._exit(5)
    if name == "leaves":
        os._exit(0)
    survived(name)
print("given", sys.stdin.read())
"""


@pytest.fixture
def tried(module):
    return module(TRIED.format(path=str(Path(isolation.__file__).parent)))


def test_everyone_is_tried_and_only_the_guilty_are_blamed(tried):
    names = ["good", "SIGSEGV", "better", "abort", "SIGKILL", "exit", "quiet", "leaves", "best"]
    assert isolation.first_crashes(tried, names) == {
        "SIGSEGV": "died with SIGSEGV",
        "abort": "died with SIGABRT",
        "SIGKILL": "died with SIGKILL (memory may have run out)",
        "exit": "no such device",
        "quiet": "ended with exit code 5",
        "leaves": "ended the process",
    }


def test_without_a_crash_one_process_does(tried, monkeypatch):
    started = []
    run = isolation.run
    monkeypatch.setattr(isolation, "run", lambda *arguments: started.append(arguments) or run(*arguments))
    assert isolation.first_crashes(tried, ["a", "b", "c"], b"this") == {}
    assert len(started) == 1
    assert isolation.first_crashes(tried, []) == {}
    assert len(started) == 1, "nobody to try"


def test_what_a_process_is_given_and_prints(tried):
    end, output = isolation.run(tried, ["a"], b"this")
    assert end is None
    assert output.split() == ["survived:", "a", "given", "this"]


def test_whoever_hangs_is_stopped(module, monkeypatch):
    monkeypatch.setattr(isolation, "SECONDS", 1)
    name = module("import sys, time\nprint('begun', flush=True)\ntime.sleep(60)\n")
    assert isolation.run(name, []) == ("did not finish in 1 s", "begun\n")
    assert isolation.first_crashes(name, ["one"]) == {"one": "did not finish in 1 s"}


def test_a_signal_without_a_name():
    assert isolation.signal_name(signal.SIGRTMIN + 1) == f"signal {signal.SIGRTMIN + 1}"


# ---- in bench ops ----

CRASHING = """
    import os
    from beit3_fast.bench import op_providers, op_trial
    from beit3_fast.bench.op_providers import OpProvider

    def crash(case, layout):
        return lambda **tensors: os.abort() if case.backward else tensors["x"]

    def refuse(case, layout):
        raise RuntimeError("no such kernel")

    op_providers.PROVIDERS += (OpProvider("crashing", {"layer_norm": crash}), OpProvider("bad", {"layer_norm": refuse}))
    if __name__ == "__main__":
        op_trial.main()
"""


@pytest.fixture
def crashing(module, monkeypatch):
    """A provider that aborts in its backward, and one that raises."""

    def build(case, layout):
        raise RuntimeError("ran in the benchmark's own process")

    added = tuple(OpProvider(name, {"layer_norm": build}) for name in ("crashing", "bad"))
    monkeypatch.setattr(op_providers, "PROVIDERS", (*op_providers.PROVIDERS, *added))
    monkeypatch.setattr(op_trial, "MODULE", module(CRASHING))
    monkeypatch.setattr(op_trial, "_found", {})
    monkeypatch.setattr(bench, "cold", lambda device: lambda call: call.ready() or bench.wall_clock()(call))
    return added


def test_a_provider_that_aborts_does_not_take_the_run_with_it(crashing, tmp_path, monkeypatch, capsys):
    """A crash in the backward counts for the forward too: who is tried once is tried in full."""
    target = tmp_path / "out.json"
    taking_part = [*op_providers.PROVIDERS[:3], *crashing]
    monkeypatch.setattr(command, "select_op_cases", lambda *arguments, **options: [CASE])
    monkeypatch.setattr(command, "select_providers", lambda *arguments, **options: taking_part)
    monkeypatch.setattr(command, "measure_roofs", lambda device, dtypes: Roofs(1e10, {torch.float32: 1e11}))
    assert command.run(command.ops, rounds=6, device="cpu", json_file=target)
    assert "did not run: died with SIGABRT" in capsys.readouterr().out
    kept = {p["name"]: p for p in json.loads(target.read_text())["results"][0]["providers"]}
    assert kept["crashing"]["failure"] == "died with SIGABRT"
    assert {kept["crashing"][field] for field in ("missing", "parity", "time_ms", "errors")} == {None}
    assert kept["bad"]["failure"] == "RuntimeError: ran in the benchmark's own process", "raising is no crash"
    assert all(kept[name]["time_ms"] for name in ("reference", "beit3_fast", "two-stream"))


def test_who_was_tried_is_not_tried_again(crashing, monkeypatch):
    ends = op_trial.crashes(CASE, [*op_providers.PROVIDERS[:3], *crashing], CPU)
    assert ends == {"crashing": "died with SIGABRT"}
    monkeypatch.setattr(isolation, "run", lambda *arguments: pytest.fail("tried again"))
    assert op_trial.crashes(CASE, crashing, CPU) == ends
    assert op_trial.crashes(CASE, crashing[1:], CPU) == {}


def test_ours_the_reference_and_strangers_are_not_tried(monkeypatch):
    monkeypatch.setattr(isolation, "run", lambda *arguments: pytest.fail("somebody was tried"))
    stranger = OpProvider("stranger", {"layer_norm": lambda case, layout: None})
    assert op_trial.crashes(CASE, [op_providers.OURS, op_providers.REFERENCE, stranger], CPU) == {}


def test_a_trial_covers_both_directions_and_dtypes_but_for_those_that_compile():
    half = OpCase(CASE.shape, CASE.batch, torch.float16)
    variants = op_trial._variants(half, op_providers.PROVIDERS[2])
    assert {(v.dtype, v.backward) for v in variants} == {
        (dtype, backward) for dtype in (torch.float16, torch.float32, torch.bfloat16) for backward in (False, True)
    }
    compiled = next(provider for provider in op_providers.PROVIDERS if provider.slow_start)
    assert op_trial._variants(half, compiled) == [half]
