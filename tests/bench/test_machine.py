from __future__ import annotations

import json
import subprocess

import pytest
import torch
from beit3_fast.bench import machine

import beit3_fast


def test_the_header_is_complete_and_fits_into_json():
    about = machine.machine(torch.device("cpu"))
    assert json.loads(json.dumps(about)) == about
    assert about["beit3_fast"] == beit3_fast.__version__
    assert about["torch"] == torch.__version__
    assert about["gpu"] is None
    assert about["cores"] >= 1
    assert about["threads"] == torch.get_num_threads()
    assert about["cpu"]


def test_cpu_name_where_linux_tells_it(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "Path", lambda path: cpuinfo)
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Fast 9000: the new one\nflags\t: fpu\n")
    assert machine.cpu_name() == "Fast 9000: the new one"
    cpuinfo.unlink()
    assert machine.cpu_name()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True
        )

    (tmp_path / "bench").mkdir()
    source = tmp_path / "bench" / "machine.py"
    source.write_text("1")
    git("init", "-q")
    git("add", "bench")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(machine, "__file__", str(source))
    return tmp_path


def test_revision_of_a_checkout(checkout):
    revision = machine.git_revision()
    assert len(revision) >= 7
    assert set(revision) <= set("0123456789abcdef")
    (checkout / "untracked").touch()
    assert machine.git_revision() == revision
    (checkout / "bench" / "machine.py").write_text("2")
    assert machine.git_revision() == revision + "+"


def test_no_revision_is_borrowed_from_a_repository_around_the_environment(checkout, monkeypatch):
    installed = checkout / ".venv" / "site-packages" / "beit3_fast" / "bench"
    installed.mkdir(parents=True)
    monkeypatch.setattr(machine, "__file__", str(installed / "machine.py"))
    assert machine.git_revision() is None


def test_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert machine.git_revision() is None


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with machine.use_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with machine.use_threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads must be at least 1, got 0"), machine.use_threads(0):
        pass
