"""The C++ probe: that it builds, what it measures, and that a run does without it where it cannot be had."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
import types

import beit3_fast.bench.probe as probe
import numpy as np
import pytest
import torch

pybind11 = pytest.importorskip("pybind11", reason="pybind11 is not installed")
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def fresh():
    probe.load.cache_clear()
    yield
    probe.load.cache_clear()


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A cache folder with the compiled probe: ten seconds, once for all of xdist's processes."""
    folder = tmp_path_factory.getbasetemp().parent / f"probe-{os.environ.get('PYTEST_XDIST_TESTRUNUID', os.getpid())}"
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.setenv("XDG_CACHE_HOME", str(folder))
        probe.load.cache_clear()
        probe.load()
    return folder


@pytest.fixture
def module(built, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(built))
    monkeypatch.setattr(probe, "_compile", lambda command, target: pytest.fail("compiled twice"))
    return probe.load()


def cached(folder):
    (file,) = (folder / "beit3_fast").iterdir()
    return file


# ---- what it measures ----


@needs_compiler
def test_every_loop_multiplies_and_adds_within_reason(module):
    """Sound on a loaded machine: a thread's own processor time counts, and clocks lie between 0.5 and 7 GHz."""
    lanes = {"avx512_bf16": (16, 32), "avx512": (16, 16), "avx2": (8, 8), "portable": (4, 4)}
    isas = module.isas()
    assert isas[-1] == "portable"
    for isa in isas:
        for bf16 in (False, True):
            rate = module.multiply_adds(isa, bf16, 1, 0.01)
            # a fused one, or two instructions, of `lanes` lanes, at most two of them a cycle (three: nobody yet)
            assert 0.5e9 * lanes[isa][bf16] / 2 < rate < 7e9 * lanes[isa][bf16] * 2 * 2, (isa, bf16)


@needs_compiler
def test_a_chain_of_threads_adds_up(module):
    isa = module.isas()[0]
    alone = max(module.multiply_adds(isa, False, 1, 0.02) for _ in range(3))
    both = max(module.multiply_adds(isa, False, 2, 0.02) for _ in range(3))
    assert 0.9 * alone < both < 2.3 * alone  # processor time: two threads of one core share it, two cores do not


@needs_compiler
def test_widest_vectors_are_no_slower(module):
    rates = [max(module.multiply_adds(isa, False, 1, 0.01) for _ in range(3)) for isa in module.isas()]
    assert rates[0] > 0.7 * max(rates)
    assert rates[0] >= 0.9 * rates[-1]


@needs_compiler
def test_passes_over_memory_touch_every_element(module):
    a, b, out = np.full(1001, 2, np.float32), np.arange(1001, dtype=np.float32), np.empty(1001, np.float32)
    for threads in (1, 2, 3):
        out[:] = np.nan
        assert module.triad(a, b, out, 3.0, threads, 1) > 0
        assert np.array_equal(out, 2 + 3 * b)
        out[:] = np.nan
        assert module.copy(b, out, threads, 2) > 0
        assert np.array_equal(out, b)
        module.fill(out, 5.0, threads)
        assert (out == 5).all()
        assert module.read(b, threads, 1) > 0


@needs_compiler
def test_rates_of_memory_count_what_moves(module):
    """An array in a cache, against numpy's copy of it: the same kind of work, within a wide margin."""
    import time

    source, target = np.ones(2**16, np.float32), np.empty(2**16, np.float32)

    def copy():
        start = time.perf_counter()
        for _ in range(100):
            np.copyto(target, source)
        return 100 * 2 * source.nbytes / (time.perf_counter() - start)

    by_numpy = max(copy() for _ in range(5))
    assert 0.1 < module.copy(source, target, 1, 500) / by_numpy < 10


@needs_compiler
def test_bad_arguments_of_the_module(module):
    array = np.zeros(10, np.float32)
    with pytest.raises(ValueError, match="isa avx9 is not one of this processor's"):
        module.multiply_adds("avx9", False, 1, 0.01)
    for call in (lambda: module.multiply_adds("portable", False, 0, 0.01), lambda: module.read(array, 0, 1)):
        with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
            call()
    with pytest.raises(ValueError, match="arrays must be of one size, got 10 and 5"):
        module.copy(array, array[:5], 1, 1)
    with pytest.raises(TypeError):  # a conversion would be copied to and thrown away
        module.copy(array, np.zeros(10), 1, 1)


@needs_compiler
def test_limits(module):
    found = probe.measure(2, 2**20)
    assert set(found.peaks) == set(found.isas) == {torch.float32, torch.bfloat16}
    for dtype, peak in found.peaks.items():
        assert found.isas[dtype] in module.isas()
        assert 1e9 < peak.core <= 1.5 * peak.all
    assert found.peaks[torch.bfloat16].core > 0.8 * found.peaks[torch.float32].core
    assert set(found.memory) == {"read", "copy", "triad"}
    assert min(found.memory.values()) > 1e7
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"):
        probe.measure(0, 2**20)


def test_no_more_threads_than_cores(monkeypatch):
    asked = set()

    def note(*arguments):
        asked.add(arguments[2])
        return 1.0

    fake = types.SimpleNamespace(
        isas=lambda: ["portable"],
        multiply_adds=note,
        fill=lambda array, value, threads: asked.add(threads),
        read=lambda array, threads, repetitions: note(0, 0, threads),
        copy=lambda a, b, threads, repetitions: note(0, 0, threads),
        triad=lambda a, b, c, factor, threads, repetitions: note(0, 0, threads),
    )
    monkeypatch.setattr(probe, "load", lambda: fake)
    monkeypatch.setattr(probe, "_cores", lambda: 4)
    probe.measure(64, 4)
    assert asked == {1, 4}


# ---- where it comes from ----


@needs_compiler
def test_it_is_compiled_once(built, module):
    assert re.fullmatch(r"probe-[0-9a-f]{16}\.so", cached(built).name)
    assert module.__name__ == "beit3_fast_probe"


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "empty", "changed"])
def test_a_damaged_cache_is_replaced(damage, built, tmp_path, monkeypatch):
    folder = tmp_path / "beit3_fast"
    folder.mkdir()
    whole = cached(built).read_bytes()
    other = bytearray(whole)
    other[len(whole) // 2] ^= 1
    file = folder / cached(built).name
    file.write_bytes({"cut": whole[:5000], "empty": b"", "changed": bytes(other)}[damage])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probe, "_compile", lambda command, target: target.write_bytes(whole))
    assert "portable" in probe.load().isas()
    assert file.read_bytes() == whole
    assert cached(tmp_path) == file, "nothing else is left there"


@needs_compiler
def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(built, tmp_path, monkeypatch):
    (tmp_path / "beit3_fast").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    whole = cached(built).read_bytes()
    monkeypatch.setattr(probe, "_compile", lambda command, target: target.write_bytes(whole))
    assert probe.load().multiply_adds("portable", False, 1, 0.001) > 0


def test_the_cache_follows_source_compiler_and_python(tmp_path, monkeypatch):
    command = ["cc", *probe.FLAGS, "-Ia", "-Ib", str(probe.SOURCE)]
    said = [b"cc 1"]
    monkeypatch.setattr(probe.subprocess, "run", lambda *a, **o: types.SimpleNamespace(stdout=said[0]))
    keys = [probe._key(command)]
    assert probe._key(command) == keys[0]
    said[0] = b"cc 2"
    keys.append(probe._key(command))
    keys.append(probe._key(["c++", *command[1:]]))
    monkeypatch.setattr(sys, "version", "4.0")
    keys.append(probe._key(command))
    source = tmp_path / "probe.cpp"
    source.write_text("other")
    monkeypatch.setattr(probe, "SOURCE", source)
    keys.append(probe._key(command))
    assert len(set(keys)) == 5


class TestUnavailable:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.delenv("CXX", raising=False)

    def refuses(self, reason):
        with pytest.raises(probe.Unavailable, match=reason):
            probe.measure(1, 2**20)

    def test_no_compiler(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        self.refuses("no C[+][+] compiler was found")
        monkeypatch.setenv("CXX", "icpc -fast")
        self.refuses("icpc was not found")

    @needs_compiler
    def test_no_pybind11(self, monkeypatch):
        monkeypatch.setattr(probe, "find_spec", lambda name: None)
        self.refuses("pybind11 is not installed")

    @needs_compiler
    def test_no_headers_of_python(self, tmp_path, monkeypatch):
        monkeypatch.setattr(probe.sysconfig, "get_path", lambda name: str(tmp_path))
        self.refuses(f"Python's headers are not in {tmp_path}")

    @pytest.mark.parametrize(
        ("does", "reason"),
        [
            ("echo 'probe.cpp:5:10: fatal error: no such file' >&2; exit 1", "fatal error: no such file"),
            ("exit 3", "did not compile the probe: no message"),
            ("exit 0", "did not compile the probe: no message"),
            (
                'for last; do true; done; [ "$last" = --version ] || echo nonsense > "$last"',
                "the compiled probe cannot be loaded",
            ),
        ],
    )
    def test_a_compiler_that_fails(self, does, reason, tmp_path, monkeypatch):
        compiler = tmp_path / "compiler"
        compiler.write_text(f"#!/bin/sh\n{does}\n")
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        self.refuses(reason)

    def test_a_compiler_that_hangs(self, tmp_path, monkeypatch):
        compiler = tmp_path / "compiler"
        compiler.write_text('#!/bin/sh\ncase "$*" in *--version*) exit 0;; esac\nexec sleep 60\n')
        compiler.chmod(0o755)
        monkeypatch.setenv("CXX", str(compiler))
        monkeypatch.setattr(probe, "BUILD_SECONDS", 0.2)
        self.refuses("timed out after 0.2 seconds")
