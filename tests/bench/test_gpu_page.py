"""README's GPU table and plots, from made-up results."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from beit3_fast.bench.gpu import command, page
from beit3_fast.bench.gpu.record import append, read
from beit3_fast.bench.gpu.summary import Figures
from PIL import Image

CARD = "Example GPU 80GB"
README = f"# Title\n\nabove\n\n{page.BEGIN}\nold\n{page.END}\n\nbelow\n"


def line(section, figure, values, **case):
    return {"section": section, "figure": figure, "case": case, "values": values}


def results():
    forward = {"model": "base", "batch": 64, "texts": "padded"}
    product = {"model": "base", "gemm": "qkv", "role": "forward", "rows": 13440}
    return [
        line("environment", "gpu", {"name": CARD}),
        line("environment", "software", {"torch": "2.11.0", "triton": "3.6.0"}),
        line("roofs", "product", {"tflop_s": 700.4}, kind="bf16"),
        line("roofs", "copy", {"gb_s": 3000.2}),
        line("tests", "test", {"outcome": "passed"}, name="a"),
        {"section": "tests", "figure": "test", "case": {"name": "b"}, "failed": "AssertionError"},
        line("parity", "parity", {"ok": True, "error": 1e-3}, op="ffn"),
        line("parity", "parity", {"ok": False, "error": 1.0}, op="qkv"),
        line("parity", "repeats", {"ok": True}, op="ffn"),
        line("inference", "forward", {"ms": 8.0}, **forward, by="ours", mode="captured"),
        line("inference", "forward", {"ms": 7.5}, **forward, by="optimized", mode="captured"),
        line("inference", "forward", {"ms": 9.0}, **forward, by="ours", mode="eager"),
        line("inference", "forward", {"ms": 20.0}, **forward, by="SDPA", mode="eager"),
        line("compiled", "forward", {"ms": 15.0}, batch=64, by="SDPA", mode="default"),
        line("compiled", "forward", {"ms": 4.0}, batch=1, by="SDPA", mode="reduce-overhead"),
        line("training", "step", {"ms": 50.0, "peak_gb": 10.0}, model="base", batch=64, texts="padded", by="ours"),
        line("training", "step", {"ms": 60.0, "peak_gb": 30.0}, model="base", batch=64, texts="padded", by="SDPA"),
        line("compiled", "step", {"ms": 40.0}, batch=64, by="SDPA", mode="default"),
        line("cublas", "cublas", {"us": 100.0, "tflop_s": 475.0}, **product),
        line("roles", "role", {"us": 125.0, "tflop_s": 380.0}, **product, config="a", **{"as": "default, before"}),
        line("roles", "role", {"us": 110.0, "tflop_s": 432.0}, **product, config="b", **{"as": "b"}),
        line("cublas", "cublas", {"us": 10.0, "tflop_s": 74.0}, **{**product, "rows": 210}),
    ]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    return tmp_path


def keep(checkout: Path, lines, name: str) -> Path:
    file = checkout / "bench" / "results" / name
    for each in lines:
        append(file, each)
    return file


def test_without_a_result_there_is_no_table(checkout, capsys):
    assert not page.update(root=checkout)
    assert (checkout / "README.md").read_text() == README
    assert list((checkout / "docs").iterdir()) == []
    assert "there is no result in bench/results, so there is no table" in capsys.readouterr().out


def test_the_table_says_what_was_measured_on_which_card(checkout):
    name = command.kept_name(results(), datetime.date(2026, 3, 1))
    keep(checkout, results(), name)
    assert page.update(root=checkout)
    text = (checkout / "README.md").read_text()
    assert text.startswith("# Title\n\nabove\n\n")
    assert text.endswith("\n\nbelow\n")
    assert "old" not in text
    assert f"Measured on one **{CARD}**, torch 2.11.0, Triton 3.6.0, measured roofs 700 TFLOP/s in bf16" in text
    assert "(`bench/results/example-gpu-80gb-2026-03-01.jsonl`)" in text
    assert "1 of 2 kernel cases within the parity rule; 1 of 1 kernel cases the same bits 100 times" in text
    assert "1 GPU tests passed, 1 failed" in text
    padded = page.TEXTS["padded"]
    assert f"| base, batch 64, {padded} | 7.5 | 9 | 20 | 15 (the same, torch.compile) | 2.00x |" in text
    assert "batch 1," not in text  # ours has no time there
    assert f"| base, batch 64, {padded} | 50 | 60 | 40 | 0.80x | 10.0, 30.0 |" in text
    for plot in page.PLOTS.values():
        assert f"](docs/{plot})" in text
        with Image.open(checkout / "docs" / plot) as picture:
            assert picture.size[0] >= 1000
    # made again, it is the same
    page.update(root=checkout)
    assert (checkout / "README.md").read_text() == text


def test_the_newest_result_counts(checkout, capsys):
    keep(checkout, results(), "z-2026-01-01.jsonl")
    keep(checkout, results(), "a-2026-02-01.jsonl")
    page.update(root=checkout)
    assert "a-2026-02-01.jsonl" in (checkout / "README.md").read_text()
    page.update(checkout / "bench" / "results" / "z-2026-01-01.jsonl", root=checkout)
    assert "z-2026-01-01.jsonl" in (checkout / "README.md").read_text()


def test_the_products_are_those_of_the_largest_batch():
    assert page.products(Figures(results())) == {
        "qkv\nforward": {"cuBLAS": 475.0, "default": 380.0, "before": 380.0, "best": 432.0}
    }


def test_a_dry_run_makes_no_table(checkout):
    file = keep(checkout, [each for each in results() if each["figure"] != "gpu"], "dry-2026-01-01.jsonl")
    with pytest.raises(ValueError, match="no GPU's name: they are of a dry run"):
        page.update(file, root=checkout)
    assert (checkout / "README.md").read_text() == README


def test_a_run_that_was_cut_off_makes_a_shorter_table(checkout):
    file = keep(checkout, results()[:9], "cut-2026-01-01.jsonl")
    page.update(file, root=checkout)
    assert "| forward, ms |" not in (checkout / "README.md").read_text()


@pytest.mark.parametrize("text", ["nothing", page.END + page.BEGIN, README + README])
def test_markers_are_needed(text):
    with pytest.raises(ValueError, match=r"README\.md must hold"):
        page.insert(text, "table")


def test_the_readme_has_the_markers_and_no_table_without_a_result():
    text = (page.ROOT / "README.md").read_text(encoding="utf-8")
    kept = sorted((page.ROOT / command.KEPT).glob("*.jsonl"), key=lambda file: file.stem[-10:])
    if kept:
        assert text == page.insert(text, page.markdown(Figures(read(kept[-1])), kept[-1].name))
    else:
        assert f"{page.BEGIN}\n{page.END}" in text
