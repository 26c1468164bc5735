"""``beit3-fast bench ops|model --base REVISION``: this working tree against another revision of the same repository.

Two versions of one package cannot live in one process, so each has its own (:mod:`.base_server`), and rounds
interleave: one call here, one call there, never both at once, each timed by the process that runs it. Both run the
bench of this working tree on the same seeded inputs, so that nothing differs but the library. Both must pass parity;
what is reported is the median of the per-round ratios base / new with its interval, at the confidence at which the
intervals of all cases hold at once with 95 %: for any verdict among them to be chance has at most 5 %.

The other revision is checked out by ``git worktree`` in a temporary folder. Its CPU library is compiled there if csrc/
differs; otherwise it shares this tree's. CPU only: a CUDA library would take minutes to compile.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import beit3_fast

from .cases import ModelCase
from .compare import styled, too_few, verdict
from .model import OUR_NAMES
from .model_tasks import tasks
from .op_cases import OpCase
from .op_providers import OURS
from .ops import WARMUP
from .outcome import ProviderError, blaming
from .report import interval, milliseconds
from .timing import Estimate, Timing, confidence_of_each, interleave, rounds_needed

ROOT = Path(__file__).resolve().parent.parent
SIDES = ("new", "base")
SETTLE = 0.005
"""Seconds between two calls: OpenMP's threads of the process that has just worked keep spinning for a moment."""


@dataclass(frozen=True)
class Result:
    """One provider of ours in one case: ``problems`` says by side why it failed there, ``timing`` has both sides where
    none did."""

    case: ModelCase | OpCase
    provider: str
    problems: dict[str, str]
    timing: Timing | None

    def faster(self, confidence: float) -> Estimate | None:
        """How many times faster this tree is; None without times, or with too few rounds for such an interval."""
        if self.timing is None or len(self.timing.rounds["new"]) < rounds_needed(confidence):
            return None
        return self.timing.speedup("new", over="base", confidence=confidence)

    def verdict(self, tolerance: float, confidence: float) -> tuple[str, bool]:
        """In words, and whether this tree is the worse: slower beyond the tolerance, or wrong where the base is not."""
        faster = self.faster(confidence)
        if faster is not None:
            words = verdict(faster, tolerance)
            return words, words == "slower"
        if self.timing is not None:
            return too_few(len(self.timing.rounds["new"]), rounds_needed(confidence)), False
        return "; ".join(f"{side}: {why}" for side, why in self.problems.items()), "new" in self.problems


class Server:
    """A process that runs the bench's calls with one version of the library."""

    def __init__(self, package: Path, threads: int) -> None:
        """Starts it.

        Args:
            package: the folder ``beit3_fast`` that it runs.
            threads: of the CPU.

        Raises:
            RuntimeError: it did not start, or imported another package.
        """
        self._process = subprocess.Popen(
            [sys.executable, "-m", "beit3_fast.bench.base_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=package.parent,  # where Python looks first for packages
        )
        try:
            found = Path(self.ask("start", threads))
            if found.resolve() != package.resolve():
                raise RuntimeError(f"the process should run {str(package)!r}, but imported {str(found)!r}")
        except BaseException:
            self.close()
            raise

    def ask(self, *request: Any) -> Any:
        """The answer to a request.

        Raises:
            RuntimeError: the process is gone, or raised: its message.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(request, self._process.stdin)
            self._process.stdin.flush()
            right, answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            code = self._process.wait()
            raise RuntimeError(f"the process that runs it ended with exit code {code}") from None
        if not right:
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def servers(
    revision: str, threads: int, progress: Callable[[str], None] = lambda message: None
) -> Iterator[dict[str, Server]]:
    """A process with this tree's library and one with that of ``revision``, by side.

    Raises:
        ValueError: this package runs from no checkout, or it has no such revision.
        RuntimeError: the revision's library does not compile, or its process does not start.
        ModuleNotFoundError: the library must be compiled, and there is no cmake.
    """
    commit = commit_of(revision)
    with tempfile.TemporaryDirectory(prefix="beit3_fast_base_") as folder, contextlib.ExitStack() as opened:
        tree = Path(folder) / "tree"
        progress(f"checking out {revision}")
        _git("worktree", "add", "--detach", str(tree), commit)
        opened.callback(_git, "worktree", "remove", "--force", str(tree), check=False)
        # As an installed package has them; but the bench is this tree's, so that both sides are measured alike.
        (tree / "beit3_fast" / "kernels").symlink_to(tree / "kernels", target_is_directory=True)
        (tree / "beit3_fast" / "bench").symlink_to(Path(__file__).resolve().parent, target_is_directory=True)
        progress(f"the library of {revision}")
        _library(revision, tree)
        running = {}
        for side, package in {"new": Path(beit3_fast.__file__).parent, "base": tree / "beit3_fast"}.items():
            progress(f"starting {side}")
            running[side] = Server(package, threads)
            opened.callback(running[side].close)
        yield running


def commit_of(revision: str) -> str:
    """The commit's full name.

    Raises:
        ValueError: this package runs from no checkout, or it has no such revision.
    """
    if not (ROOT / ".git").exists():
        raise ValueError(f"--base compares with another revision of a git checkout, and {str(ROOT)!r} is none")
    done = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}", check=False)
    if done.returncode:
        raise ValueError(f"--base must be a revision of {str(ROOT)!r}, got {revision!r}")
    return done.stdout.strip()


def _library(revision: str, tree: Path) -> None:
    """Puts the CPU library into the other tree: this tree's if it is made of the same sources, else one compiled there;
    none if this tree has none."""
    mine, its = ROOT / "beit3_fast" / "lib", tree / "beit3_fast" / "lib"
    name = "libbeit3_fast_cpu.so"
    if not (mine / name).is_file():
        return
    sources = ("csrc", "CMakeLists.txt")
    changed = _git("diff", "--quiet", revision, "--", *sources, check=False).returncode != 0
    added = _git("ls-files", "--others", "--exclude-standard", "--", *sources).stdout != ""
    its.mkdir()
    if not changed and not added:
        shutil.copy(mine / name, its / name)
        return
    build = tree / "build"
    torch_folder = Path(torch.__file__).parent
    options = ["-GNinja", "-DCMAKE_BUILD_TYPE=Release", f"-DTORCH_FOLDER={torch_folder}"]
    for command in (["-S", str(tree), "-B", str(build), *options], ["--build", str(build)]):
        done = subprocess.run([_cmake(), *command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the library of {revision} does not compile:\n{done.stdout}{done.stderr}")
    shutil.copy(build / name, its / name)


def _cmake() -> str:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which("cmake", path=path)
    if found is None:
        raise ModuleNotFoundError("cmake is needed to compile the other revision's library: pip install cmake ninja")
    return found


def _git(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=check)


def run_case(
    case: ModelCase | OpCase,
    running: dict[str, Server],
    *,
    rounds: int,
    progress: Callable[[str], None] = lambda message: None,
) -> list[Result]:
    """Parity on both sides, then interleaved times, of every provider of ours in the case.

    One side's mistake, or its end, is a result and no exception.
    """
    results = []
    for provider in _ours(case):
        problems = {}
        for side in SIDES:
            progress(f"{case.name}: parity of {provider}, {side}")
            try:
                problem = running[side].ask("prepare", case, provider)
            except RuntimeError as error:
                problem = str(error)
            if problem:
                problems[side] = problem
        timing = None
        if not problems:
            try:
                timing = interleave(
                    {side: _call(side, running[side]) for side in SIDES},
                    rounds=rounds,
                    warmup=WARMUP,
                    stopwatch=_ask_the_process,
                    after_round=lambda done: progress(f"{case.name}: round {done} of {rounds}"),
                )
            except ProviderError as error:
                problems[error.provider] = str(error)
        results.append(Result(case, provider, problems, timing))
    return results


def _ours(case: ModelCase | OpCase) -> list[str]:
    if isinstance(case, OpCase):
        return [OURS.name]
    return [provider.name for provider in tasks()[case.task].own if provider.name in OUR_NAMES]


def _call(side: str, server: Server) -> Callable[[], float]:
    def call() -> float:
        time.sleep(SETTLE)
        with blaming(side):
            return server.ask("time")

    return call


def _ask_the_process(call: Callable[[], object]) -> float:
    """A stopwatch: each process times its own call, the way there and back left out."""
    nanoseconds = call()
    assert isinstance(nanoseconds, float)
    return nanoseconds


def confidence_in(results: Sequence[Result]) -> float:
    """Of each interval, for all of them to hold at once with 95 %."""
    return confidence_of_each(sum(result.timing is not None for result in results))


def ok(results: Sequence[Result], tolerance: float) -> bool:
    """This tree is nowhere slower, and right wherever the other is."""
    return not any(result.verdict(tolerance, confidence_in(results))[1] for result in results)


def table(results: Sequence[Result], revision: str, tolerance: float) -> Table:
    """All cases: times of both sides and how much faster this tree is."""
    shown = Table(
        title=f"this tree against {revision}; tolerance {tolerance:g} %",
        title_justify="left",
        title_style="bold",
        caption="faster by: median of the per-round ratios base / new; above 1 this tree is the faster\n"
        "intervals so wide that the chance of any false verdict in this table is at most 5 %",
        caption_justify="left",
    )
    shown.add_column("case", overflow="fold")
    shown.add_column("provider", overflow="fold")
    for side in SIDES:
        shown.add_column(side, justify="right")
    shown.add_column("faster by", justify="right")
    shown.add_column("verdict")
    confidence = confidence_in(results)
    for result in results:
        words, regression = result.verdict(tolerance, confidence)
        times = ["", "", ""]
        if result.timing is not None:
            times = [f"{milliseconds(result.timing.time(side).median)} ms" for side in SIDES]
            faster = result.faster(confidence)
            times.append("" if faster is None else interval(faster))
        shown.add_row(result.case.name, result.provider, *times, styled(words, regression))
    return shown
