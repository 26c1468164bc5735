from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import beit3_fast
from beit3_fast.cli import main
from beit3_fast.models import BEiT3ForRetrieval, EncoderConfig


def invoke(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def checkpoint(tmp_path):
    model = BEiT3ForRetrieval(
        EncoderConfig(
            encoder_embed_dim=64,
            encoder_attention_heads=1,
            encoder_ffn_embed_dim=96,
            encoder_layers=1,
            img_size=32,
            vocab_size=70,
        )
    )
    path = tmp_path / "tiny.pth"
    torch.save({"model": model.state_dict()}, path)
    return path


def test_help_names_every_command():
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("info", "demo", "bench", "convert"):
        assert f"\n  {command} " in result.output
    assert "model" in invoke("bench", "--help").output


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "model", "--help"]])
def test_help_imports_nothing_that_is_slow(arguments):
    code = (
        "import sys; from beit3_fast.cli import main; main(sys.argv[1:], standalone_mode=False);"
        "slow = {'matplotlib', 'rich', 'PIL', 'sentencepiece', 'beit3_fast.bench', 'beit3_fast.demo'};"
        "assert not slow & set(sys.modules), slow & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_version():
    assert invoke("--version").output == f"beit3-fast {beit3_fast.__version__}\n"


def test_info():
    result = invoke("info")
    assert result.exit_code == 0
    assert beit3_fast.__version__ in result.output
    assert "attention" in result.output


def test_convert_there_and_back(checkpoint, tmp_path):
    original = torch.load(checkpoint, weights_only=True)["model"]
    there, back = tmp_path / "tiny.safetensors", tmp_path / "back.pth"
    result = invoke("convert", checkpoint, there)
    assert result.exit_code == 0, result.output
    assert f"wrote {there}" in result.output
    assert "retrieval" in result.output
    assert invoke("convert", there, back).exit_code == 0
    for converted in (load_file(there), torch.load(back, weights_only=True)["model"]):
        assert converted.keys() == original.keys()
        assert all(torch.equal(converted[key], original[key]) for key in original)


def test_a_mistake_is_one_line_and_exit_code_2(checkpoint, tmp_path):
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    for arguments, message in (
        (["convert", tmp_path / "missing.pth", tmp_path / "a.safetensors"], "does not exist"),
        (["convert", tmp_path / "broken.pth", tmp_path / "a.safetensors"], "broken.pth"),
        (["convert", checkpoint, tmp_path / "a.txt"], "destination must end in"),
        (["bench", "model", "--case", "base-jiont"], "did you mean base-joint"),
        (["bench", "model", "--rounds", "2"], "rounds must be at least 6"),
        (["bench", "model", "--json", tmp_path / "nowhere" / "a.json"], "--json: the folder"),
        (["bench", "model", "--json", tmp_path], "is a folder"),
        (["bench", "gpu", "--out", tmp_path / "out", "--budget", "1"], "budget must be at least 5 seconds"),
        (["bench", "gpu", "--out", tmp_path / "out", "--section", "pairty"], "did you mean parity"),
        (["bench", "gpu-table", tmp_path / "missing.jsonl"], "missing.jsonl"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("beit3-fast: ")
        assert result.stderr.count("\n") == 1
        assert message in result.stderr
        assert result.stdout == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.pth", "tiny.pth"]


def test_debug_shows_where_it_came_from(tmp_path):
    with pytest.raises(FileNotFoundError):
        invoke("--debug", "convert", tmp_path / "missing.pth", tmp_path / "a.pth")


def test_usage_errors_are_clicks():
    for arguments in (["bench", "modle"], ["demo", "--dtype", "float8"], ["convert", "a"], ["--nonsense"]):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert "Usage: " in result.stderr


def test_a_bug_of_ours_is_not_hidden(monkeypatch):
    def broken():
        raise AssertionError("a bug")

    monkeypatch.setattr(beit3_fast, "info", broken)
    with pytest.raises(AssertionError, match="a bug"):
        invoke("info")


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_exit_code_tells_whether_parity_held(passed, code, monkeypatch, tmp_path):
    import beit3_fast.bench.command as command

    import beit3_fast.demo as demo

    seen = []
    monkeypatch.setattr(command, "run", lambda kind, **options: seen.append(options) or passed)
    monkeypatch.setattr(demo, "run", lambda **options: seen.append(options) or passed)
    options = ["--case", "a", "--case", "b", "--quick", "--batch", 3, "--rounds", 7, "--threads", 2, "--compile"]
    assert invoke("bench", "model", *options, "--device", "cpu", "--json", tmp_path / "o.json").exit_code == code
    options = ["--image", "a.jpg", "--image", "b.jpg", "--text", "t", "--checkpoint", "c.pth", "--tokenizer", "b.spm"]
    options += [
        "--output",
        "o.png",
        "--json",
        "o.json",
        "--rounds",
        9,
        "--threads",
        1,
        "--dtype",
        "bfloat16",
        "--seed",
        4,
    ]
    assert invoke("demo", *options, "--model", "m").exit_code == code
    bench_options, demo_options = seen
    assert bench_options == {
        "cases": ("a", "b"),
        "providers": (),
        "peers": False,
        "quick": True,
        "batch": 3,
        "rounds": 7,
        "threads": 2,
        "compiled": True,
        "device": "cpu",
        "json_file": tmp_path / "o.json",
        "base": None,
        "csv_file": None,
        "html_file": None,
    }
    assert {name: str(value) for name, value in demo_options.items()} == {
        "images": str(demo_options["images"]),
        "texts": "('t',)",
        "checkpoint": "c.pth",
        "tokenizer": "b.spm",
        "model": "m",
        "output": "o.png",
        "json_file": "o.json",
        "rounds": "9",
        "threads": "1",
        "dtype": "bfloat16",
        "seed": "4",
    }
    assert [path.name for path in demo_options["images"]] == ["a.jpg", "b.jpg"]
