"""``bench all`` and the files it writes: several kinds in one document, whatever becomes of one of them."""

from __future__ import annotations

import csv
import json

import pytest
from beit3_fast.bench import command, everything, table_csv
from beit3_fast.bench.outputs import Outputs
from beit3_fast.bench.report import console
from click.testing import CliRunner

from beit3_fast.cli import main

MACHINE = {"cpu": "chip", "gpu": None, "threads": 2, "torch": "2.14", "git_revision": "abc+"}
SETTINGS = {"device": "cpu", "quick": True}


def document(kind, cases, **changes):
    """One whose cases took ours 1 ms and the reference 2 ms."""

    def provider(name, milliseconds, **other):
        time = {"median": milliseconds, "low": 0.5 * milliseconds, "high": 2 * milliseconds}
        entry = {"name": name, "missing": None, "failure": None, "parity": "passed", "reason": None, "roof": 0.5}
        return entry | {"time_ms": time | {"rounds": [milliseconds] * 6}} | other

    providers = [
        provider("reference", 2.0),
        provider("beit3_fast", 1.0, roof={"share": 0.25, "bound": "memory"}),
        provider("wrong", 1.0, parity="failed", reason="maximum error", time_ms=None),
        provider("absent", 1.0, parity=None, missing="not installed", time_ms=None),
    ]
    results = [
        {"case": {"name": case, "dtype": "float32"}, "skipped": None, "providers": providers} for case in range(cases)
    ]
    about = {"machine": MACHINE, "settings": {"device": "cpu"}}
    return {"schema": 1, "kind": kind, **about, "results": results, **changes}


def measuring(kind, *, cases=1, right=True, raises=None):
    """A kind that writes after every case and then ends in some way."""

    def measure(outputs):
        for done in range(1, cases + 1):
            outputs.keep(document(kind, done))
        if raises is not None:
            raise raises
        outputs.finish(document(kind, cases))
        return right

    return measure


def run(kinds, outputs):
    return everything.run(kinds, outputs, MACHINE, SETTINGS, console())


def read(path):
    return json.loads(path.read_text())


def test_every_kind_is_kept_in_order(tmp_path, capsys):
    target = tmp_path / "all.json"
    assert run({"ops": measuring("ops", cases=2), "model": measuring("model")}, Outputs(target))
    kept = read(target)
    assert {name: kept[name] for name in ("schema", "kind", "complete", "settings", "not_run")} == {
        "schema": 1,
        "kind": "all",
        "complete": True,
        "settings": SETTINGS,
        "not_run": [],
    }
    assert [(run["kind"], len(run["results"])) for run in kept["runs"]] == [("ops", 2), ("model", 1)]
    assert "ops: passed\nmodel: passed\n" in capsys.readouterr().out


def test_what_is_written_while_a_kind_runs_holds_the_others_too(tmp_path):
    target, seen = tmp_path / "all.json", []

    def looking(outputs):
        for done in (1, 2):
            outputs.keep(document("model", done))
            kept = read(target)
            seen.append((kept["complete"], [(run["kind"], len(run["results"])) for run in kept["runs"]]))
        return True

    run({"ops": measuring("ops"), "model": looking, "memory": measuring("memory")}, Outputs(target))
    assert seen == [(False, [("ops", 1), ("model", 1)]), (False, [("ops", 1), ("model", 2)])]


@pytest.mark.parametrize("cases", [0, 1])
def test_a_kind_that_raises_loses_nothing_of_the_others(cases, tmp_path, capsys):
    target = tmp_path / "all.json"
    kinds = {
        "ops": measuring("ops"),
        "model": measuring("model", cases=cases, raises=RuntimeError("no [such] kernel")),
        "scaling": measuring("scaling"),
    }
    assert not run(kinds, Outputs(target))
    kept = read(target)
    assert [run["kind"] for run in kept["runs"]] == ["ops", *["model"] * cases, "scaling"]
    assert kept["not_run"] == [{"kind": "model", "reason": "RuntimeError: no [such] kernel", "failed": True}]
    assert kept["complete"]
    assert "ops: passed\nmodel: raised RuntimeError: no [such] kernel\nscaling: passed" in capsys.readouterr().out


def test_a_kind_that_lacks_something_is_listed_and_fails_nothing(tmp_path, capsys):
    target = tmp_path / "all.json"
    assert run({"memory": measuring("memory", cases=0, raises=ModuleNotFoundError("no triton"))}, Outputs(target))
    assert read(target)["not_run"] == [{"kind": "memory", "reason": "no triton", "failed": False}]
    assert "memory: not run: no triton" in capsys.readouterr().out


def test_a_mistake_of_one_kind_fails_the_run(capsys):
    assert not run({"ops": measuring("ops", right=False), "model": measuring("model")}, Outputs())
    assert "ops: FAILED: see its tables\nmodel: passed" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_had(tmp_path, capsys, monkeypatch):
    target, page = tmp_path / "all.json", tmp_path / "all.html"
    pages = []
    monkeypatch.setattr("beit3_fast.bench.page.write", lambda path, documents: pages.append((path, documents)))
    kinds = {
        "ops": measuring("ops"),
        "model": measuring("model", cases=2, raises=KeyboardInterrupt()),
        "memory": measuring("memory"),
    }
    with pytest.raises(KeyboardInterrupt):
        run(kinds, Outputs(target, html=page))
    kept = read(target)
    assert kept["complete"] is False
    assert [(run["kind"], len(run["results"])) for run in kept["runs"]] == [("ops", 1), ("model", 2)]
    assert pages == [(page, [kept])], "the page is written once, of all that was done"
    assert "ops: passed\nmodel: not finished\nmemory: not finished" in capsys.readouterr().out


def test_the_command_runs_every_kind_with_its_options(monkeypatch, tmp_path):
    called = []

    def kind(name):
        def measure(options, **own):
            called.append((name, (options.quick, options.threads, options.device), own))
            return True

        return measure

    for name in ("model", "ops", "scaling", "breakdown", "memory"):
        monkeypatch.setattr(command, name, kind(name))
    shared = (True, 1, "cpu")
    target = tmp_path / "all.json"
    done = CliRunner().invoke(main, ["bench", "all", "--quick", "--threads=1", "--device=cpu", f"--json={target}"])
    assert done.exit_code == 0, done.output
    assert called == [
        ("model", shared, {"cases": command.QUICK_MODEL_CASES}),
        ("ops", shared, {}),
        ("scaling", shared, {}),
        ("breakdown", shared, {}),
        ("memory", shared, {}),
    ]
    kept = read(target)
    assert (kept["complete"], kept["machine"]["threads"]) == (True, 1)
    called.clear()
    assert command.run(command.everything, device="cpu")
    assert called[0] == ("model", (False, None, "cpu"), {"cases": ()})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device must be cpu or cuda, got 'tpu'"),
        ({"threads": 0}, "threads must be at least 1, got 0"),
        ({"csv_file": "/no/such/folder/out.csv"}, "--csv: the folder '/no/such/folder' does not exist"),
        ({"html_file": "/"}, "--html: '/' is a folder"),
    ],
)
def test_bad_options_stop_before_any_work(options, message, monkeypatch):
    monkeypatch.setattr(everything, "run", lambda *arguments: pytest.fail("work was done"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        command.run(command.everything, **{"device": "cpu", **options})


# ---- CSV ----


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        assert tuple(table.fieldnames) == table_csv.COLUMNS
        return list(table)


def test_csv_has_a_row_for_every_case_and_provider(tmp_path):
    target = tmp_path / "out.csv"
    Outputs(csv=target).keep(document("ops", 2))
    rows = rows_of(target)
    assert [(row["case"], row["provider"]) for row in rows] == [
        (case, name) for case in "01" for name in ("reference", "beit3_fast", "wrong", "absent")
    ]
    ours, wrong, absent = rows[1], rows[2], rows[3]
    assert ours == {
        **dict.fromkeys(table_csv.COLUMNS, ""),
        "kind": "ops",
        "case": "0",
        "dtype": "float32",
        "provider": "beit3_fast",
        "parity": "passed",
        "time_ms": "1.0",
        "time_ms_low": "0.5",
        "time_ms_high": "2.0",
        "rounds": "6",
        "speedup": "2.0",
        "speedup_low": "2.0",
        "speedup_high": "2.0",
        "roof": "0.25",
        "device": "cpu",
        "chip": "chip",
        "threads": "2",
        "torch": "2.14",
        "git_revision": "abc+",
    }
    assert (wrong["parity"], wrong["note"], wrong["time_ms"], wrong["speedup"]) == ("failed", "maximum error", "", "")
    assert (absent["parity"], absent["note"]) == ("", "not installed")
    assert rows[0]["roof"] == "0.5"


def test_csv_of_every_kind(tmp_path):
    skipped = document("model", 1)
    skipped["results"][0] |= {"skipped": "no memory", "providers": []}
    points = [{"x": 2, "skipped": None, "providers": document("model", 1)["results"][0]["providers"][:2]}]
    for entry in points[0]["providers"]:
        del entry["time_ms"]["rounds"]
    points.append({"x": 4, "skipped": "needs 9 GiB", "providers": []})
    parts = [{"name": "attention", "ms": 1.5}, {"name": "copies", "ms": 1.0}]
    split = {"case": {"name": "0", "dtype": "float32"}, "left_out": [{"name": "public", "reason": "not installed"}]}
    split["providers"] = [{"name": "reference", "total_ms": 2.5, "parts": parts}]
    memory_case = {"name": "base", "dtype": "bfloat16"}
    bytes_ = {"case": memory_case, "part": "layer", "ours": {"kept": 1, "peak": 2}, "public": {"kept": 3, "peak": 4}}
    whole = {
        "kind": "all",
        "runs": [
            skipped,
            {"kind": "scaling", "curves": [{"name": "batch", "dtype": "float32", "points": points}]},
            {"kind": "breakdown", "results": [split]},
            {"kind": "memory", "results": [bytes_]},
        ],
    }
    target = tmp_path / "out.csv"
    Outputs(csv=target).keep(whole)
    rows = rows_of(target)
    found = {(row["kind"], row["case"], row["part"], row["provider"]): row for row in rows}
    assert len(found) == len(rows)
    assert found["model", "0", "", ""]["note"] == "skipped: no memory"
    assert found["scaling", "batch=4", "", ""]["note"] == "skipped: needs 9 GiB"
    ours = found["scaling", "batch=2", "", "beit3_fast"]
    assert [ours[name] for name in ("rounds", "speedup", "speedup_low", "speedup_high")] == ["", "2.0", "0.5", "8.0"]
    assert found["breakdown", "0", "total", "reference"]["time_ms"] == "2.5"
    assert found["breakdown", "0", "copies", "reference"]["time_ms"] == "1.0"
    assert found["breakdown", "0", "", "public"]["note"] == "not installed"
    assert [found["memory", "base", "layer", name]["peak_bytes"] for name in ("beit3_fast", "public")] == ["2", "4"]
    assert found["memory", "base", "layer", "public"]["kept_bytes"] == "3"


def test_csv_of_an_unknown_kind_leaves_no_file(tmp_path):
    target = tmp_path / "out.csv"
    with pytest.raises(ValueError, match="documents of kind 'static' have no rows; known: all, model"):
        table_csv.write(target, {"kind": "static"})
    assert list(tmp_path.iterdir()) == []
