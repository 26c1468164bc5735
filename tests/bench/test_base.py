"""``--base``: two versions of the library in two processes, and what comes of their times."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from beit3_fast.bench import base, base_server, command, model, model_tasks, op_cases
from beit3_fast.bench import ops as op_bench
from beit3_fast.bench.cases import ModelCase
from beit3_fast.bench.timing import Timing, wall_clock
from rich.console import Console

import beit3_fast
from beit3_fast.models import EncoderConfig

TINY = op_cases.Batch("tiny", 2, 5, (3, 1), 4)
NORM = op_cases.OpCase(op_cases.Shape("norm", "layer_norm", width=64), TINY)
TOY = ModelCase("toy", "base", 2, 32, 10, (4, 10))


class Fake:
    """A server whose calls take as long as it was told; what it was asked is in ``asked``."""

    def __init__(self, nanoseconds=1e6, problem=None, raises=None):
        self.nanoseconds, self.problem, self.raises = nanoseconds, problem, raises
        self.asked = []

    def ask(self, *request):
        self.asked.append(request)
        if request[0] == "prepare":
            return self.problem
        if self.raises is not None:
            raise RuntimeError(self.raises)
        return self.nanoseconds


def compared(new, base_side, case=NORM):
    (result,) = base.run_case(case, {"new": new, "base": base_side}, rounds=6)
    return result, *result.verdict(3.0, 0.95)


@pytest.mark.parametrize(
    ("new", "words", "regression"),
    [(1e6, "no difference", False), (2e6, "slower", True), (0.5e6, "faster", False), (1.02e6, "no difference", False)],
)
def test_rounds_interleave_and_the_slower_one_is_seen(new, words, regression):
    mine, other = Fake(new), Fake(1e6)
    result, *verdict = compared(mine, other)
    assert verdict == [words, regression]
    assert result.timing.rounds == {"new": [new] * 6, "base": [1e6] * 6}
    assert mine.asked == other.asked == [("prepare", NORM, "beit3_fast"), *[("time",)] * (op_bench.WARMUP + 6)]


@pytest.mark.parametrize(
    ("new", "other", "words", "regression"),
    [
        (Fake(problem="out: the cap"), Fake(), "new: out: the cap", True),
        (Fake(), Fake(problem="out: the cap"), "base: out: the cap", False),
        (Fake(raises="it ended"), Fake(), "new: RuntimeError: it ended", True),
        (Fake(), Fake(raises="it ended"), "base: RuntimeError: it ended", False),
    ],
)
def test_one_that_fails_gets_no_time(new, other, words, regression):
    result, *verdict = compared(new, other)
    assert verdict == [words, regression]
    assert result.timing is None


def test_among_many_cases_a_verdict_needs_more_rounds_and_a_wider_interval():
    timing = Timing({"base": [1.02, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2, 1.2], "new": [1.0] * 9})
    few = Timing({side: times[:6] for side, times in timing.rounds.items()})
    alone, among = ([base.Result(NORM, "beit3_fast", {}, timing)] * count for count in (1, 8))
    assert alone[0].verdict(3.0, base.confidence_in(alone)) == ("faster", False)
    assert among[0].verdict(3.0, base.confidence_in(among)) == ("no difference", False)
    slow = [base.Result(NORM, "beit3_fast", {}, Timing({"new": [2.0] * 6, "base": [1.0] * 6}))]
    failed = [base.Result(NORM, "beit3_fast", {"base": "the cap"}, None)] * 9
    assert not base.ok([*slow, *failed], 3.0), "who has no times takes no share of the confidence"
    assert base.ok(slow * 2, 3.0)
    words, _ = slow[0].verdict(3.0, base.confidence_in(slow * 2))
    assert words == "too few rounds to tell: 6, and among so many cases 7 are needed"
    shown = io.StringIO()
    Console(width=200, file=shown).print(base.table([base.Result(NORM, "beit3_fast", {}, few)] * 2, "HEAD", 3.0))
    assert "too few rounds" in shown.getvalue()


def test_every_provider_of_ours_that_the_task_has_takes_part():
    results = base.run_case(TOY, {"new": Fake(), "base": Fake()}, rounds=6)
    assert [result.provider for result in results] == ["beit3_fast", "beit3_fast, optimized"]
    own = {provider.name for task in model_tasks.tasks().values() for provider in task.own}
    assert own >= set(model.OUR_NAMES)


def served(*requests):
    """What the server's loop answers to these requests, in this process."""
    asked = io.BytesIO(b"".join(pickle.dumps(request) for request in requests))
    answered = io.BytesIO()
    base_server.serve(asked, answered)
    answered.seek(0)
    answers = []
    while answered.tell() < len(answered.getvalue()):
        answers.append(pickle.load(answered))
    return answers


@pytest.fixture
def quick_server(monkeypatch):
    clock = wall_clock()
    monkeypatch.setattr(op_bench, "cold", lambda device: lambda call: clock(call))
    config = {"encoder_embed_dim": 64, "encoder_attention_heads": 4, "encoder_ffn_embed_dim": 128}
    config |= {"encoder_layers": 1, "vocab_size": 100}
    monkeypatch.setattr(model, "_config", lambda case: EncoderConfig(**config, img_size=case.image_size or 32))


@pytest.mark.parametrize("case", [NORM, TOY], ids=["op", "model"])
def test_the_server_checks_parity_and_times_calls(case, quick_server, monkeypatch):
    threads = torch.get_num_threads()
    answers = served(("start", threads), ("prepare", case, "beit3_fast"), ("time",), ("time",))
    assert answers[:2] == [(True, str(Path(beit3_fast.__file__).parent)), (True, None)]
    assert all(right and 0 < nanoseconds < 60e9 for right, nanoseconds in answers[2:])


def test_the_server_refuses_to_time_what_is_wrong(quick_server, monkeypatch):
    monkeypatch.setitem(base_server.OURS.builds, "layer_norm", lambda case, layout: lambda x, weight, bias: x)
    (right, problem), (late, message) = served(("prepare", NORM, "beit3_fast"), ("time",))
    assert right
    assert "maximum error" in problem
    assert (late, message) == (False, "RuntimeError: nothing was prepared")

    def wrong(setup):
        run = model.OURS.build(setup)
        return lambda: run().roll(1, dims=1)

    task = model_tasks.tasks()["forward"]
    own = [model.Provider("beit3_fast", wrong) if entry.name == "beit3_fast" else entry for entry in task.own]
    changed = model_tasks.Task(task.make_setup, own, [])
    monkeypatch.setattr(model_tasks, "tasks", lambda: {"forward": changed})
    ((right, problem),) = served(("prepare", TOY, "beit3_fast"))
    assert right
    assert problem.startswith("FAILED: maximum error")


# ---- the whole way, with a repository made for it ----


def git(folder, *arguments):
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """This library without its compiled parts, in two commits: in the second one layer_norm is wrong."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root, here = tmp_path_factory.mktemp("repository"), Path(beit3_fast.__file__).parent
    left_out = shutil.ignore_patterns("lib", "data", "__pycache__", "bench", "kernels")
    shutil.copytree(here, root / "beit3_fast", ignore=left_out)
    kernels = Path(beit3_fast.ops.__file__).parents[2] / "kernels"
    kernels = kernels if kernels.is_dir() else here / "kernels"
    shutil.copytree(kernels, root / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "csrc").mkdir()
    (root / "csrc" / "ops.cpp").write_text("// first\n")
    git(root, "init", "--quiet", "--initial-branch=main")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "right")
    with (root / "beit3_fast" / "ops" / "__init__.py").open("a") as file:
        file.write("\n_right = layer_norm\ndef layer_norm(*arguments, **options):\n")
        file.write("    return _right(*arguments, **options) + 1\n")
    git(root, "commit", "--quiet", "-am", "wrong")
    return root


def test_each_process_runs_its_own_version(repository, monkeypatch, capsys):
    monkeypatch.setattr(base, "ROOT", repository)
    monkeypatch.setattr(command, "select_op_cases", lambda names, ops, quick: [NORM])
    assert command.run(command.ops, base="HEAD", threads=1)
    printed = " ".join(capsys.readouterr().out.split())
    assert "this tree against HEAD; tolerance 3 %" in printed
    assert "base: FAILED: maximum error" in printed, "the base's mistake is seen, and is no fault of this tree"
    assert len(git(repository, "worktree", "list").splitlines()) == 1, "the checkout is gone"


def test_both_versions_are_timed(repository, monkeypatch):
    monkeypatch.setattr(base, "ROOT", repository)
    with base.servers("HEAD~1", threads=1) as running:
        result, *_ = compared(running["new"], running["base"])
        assert result.problems == {}
        assert all(len(times) == 6 and min(times) > 0 for times in result.timing.rounds.values())
        os.kill(running["base"]._process.pid, 9)
        result, words, regression = compared(running["new"], running["base"])
        assert (words, regression) == ("base: the process that runs it ended with exit code -9", False)


@pytest.mark.parametrize("revision", ["nonsense", "--version", ""])
def test_a_bad_revision_is_named(revision, repository, monkeypatch):
    monkeypatch.setattr(base, "ROOT", repository)
    with pytest.raises(ValueError, match=f"--base must be a revision of .*, got '{revision}'"):
        command.run(command.ops, base=revision)


def test_no_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="is none"):
        base.commit_of("HEAD")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"json_file": Path("out.json")}, "--base runs ours against ours and prints it"),
        ({"providers": ["sdpa-padded"]}, "--base runs ours against ours and prints it"),
        ({"rounds": 5}, "rounds must be at least 6"),
        ({"device": "cuda"}, "--base runs on the CPU alone|device cuda is not available"),
        ({"cases": ["nonsense"]}, "case 'nonsense' is unknown"),
    ],
)
def test_bad_options_stop_before_any_work(options, message, monkeypatch):
    monkeypatch.setattr(base, "servers", lambda *arguments: pytest.fail("work was done"))
    for kind in (command.ops, command.model):
        with pytest.raises(ValueError, match=message):
            command.run(kind, base="HEAD", **options)


# ---- the other revision's library ----


@pytest.fixture
def two_trees(repository, tmp_path, monkeypatch):
    """This tree's folder, with a library, and another tree's; what was compiled is in the list."""
    root = tmp_path / "this"
    git(tmp_path, "clone", "--quiet", str(repository), str(root))
    (root / ".gitignore").write_text("lib/\n")
    (root / "beit3_fast" / "lib").mkdir()
    (root / "beit3_fast" / "lib" / "libbeit3_fast_cpu.so").write_text("this tree's")
    other = tmp_path / "other"
    (other / "beit3_fast").mkdir(parents=True)
    monkeypatch.setattr(base, "ROOT", root)
    compiled = []
    real = subprocess.run

    def run(command, **options):
        if command[0] == "git":
            return real(command, **options)
        compiled.append(command[1])
        if command[1] == "--build":
            (other / "build").mkdir()
            (other / "build" / "libbeit3_fast_cpu.so").write_text("compiled")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(base.subprocess, "run", run)
    monkeypatch.setattr(base, "_cmake", lambda: "cmake")
    return root, other, compiled


def library_of(other):
    return (other / "beit3_fast" / "lib" / "libbeit3_fast_cpu.so").read_text()


def test_the_same_sources_share_this_trees_library(two_trees):
    _, other, compiled = two_trees
    base._library("HEAD", other)
    assert (library_of(other), compiled) == ("this tree's", [])


@pytest.mark.parametrize("name", ["ops.cpp", "new.cpp"])
def test_other_sources_are_compiled(name, two_trees):
    root, other, compiled = two_trees
    (root / "csrc" / name).write_text("// second\n")  # changed, or not even known to git
    base._library("HEAD", other)
    assert (library_of(other), compiled) == ("compiled", ["-S", "--build"])


def test_a_tree_without_a_library_compares_with_none(two_trees):
    root, other, compiled = two_trees
    (root / "beit3_fast" / "lib" / "libbeit3_fast_cpu.so").unlink()
    base._library("HEAD", other)
    assert compiled == []
    assert not (other / "beit3_fast" / "lib").exists()


def test_a_library_that_does_not_compile_is_told(two_trees, monkeypatch):
    root, other, _ = two_trees
    (root / "csrc" / "ops.cpp").write_text("// second\n")
    git_runs = base.subprocess.run

    def run(command, **options):
        if command[0] == "git":
            return git_runs(command, **options)
        return subprocess.CompletedProcess(command, 1, "", "no such header")

    monkeypatch.setattr(base.subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"the library of HEAD does not compile:\s+no such header"):
        base._library("HEAD", other)
