"""``bench compare`` on documents made here, whose speeds are known."""

from __future__ import annotations

import json
import random

import pytest
from beit3_fast.bench import command
from beit3_fast.bench import compare as bench
from beit3_fast.bench.timing import Estimate, interleave, wall_clock
from click.testing import CliRunner

from beit3_fast.cli import main

MACHINE = {"cpu": "chip", "gpu": None, "cores": 2, "threads": 2, "isa": "AVX2", "system": "Linux", "torch": "2.14"}
SPREAD = (0.99, 0.995, *[1.0] * 8, 1.005, 1.01)


def provider(name, milliseconds, parity="passed", **changes):
    """One whose rounds scatter by a percent around ``milliseconds``; None is no time."""
    rounds = None if milliseconds is None else [milliseconds * factor for factor in SPREAD]
    time = rounds and {"median": milliseconds, "low": rounds[0], "high": rounds[-1], "rounds": rounds}
    return {
        "name": name,
        "missing": None,
        "failure": None,
        "parity": parity,
        "reason": None,
        "time_ms": time,
        **changes,
    }


def result(name="base-joint", reference=100.0, ours=50.0, batch=8, **changes):
    entries = [provider("reference", reference), provider("beit3_fast", ours), provider("peer", 1.0)]
    return {"case": {"name": name, "batch": batch, "flops": 7}, "skipped": None, "providers": entries, **changes}


def run(*results, kind="ops", **changes):
    about = {"machine": MACHINE, "settings": {"device": "cpu", "rounds": 6}}
    return {"schema": 1, "kind": kind, "complete": True, **about, "results": list(results), **changes}


def only(old, new, **options):
    """The one change between two runs of one case."""
    found = bench.compare(run(old), run(new), **options)
    (change,) = found.changes
    assert found.ok == (not change.regression)
    return change


def test_a_machine_that_is_slower_as_a_whole_is_no_difference():
    change = only(result(), result(reference=300.0, ours=150.0))
    assert (change.verdict, change.regression) == ("no difference", False)
    assert change.ratio.median == pytest.approx(1)


@pytest.mark.parametrize(
    ("ours", "words", "regression"), [(55.0, "slower", True), (45.0, "faster", False), (51.0, "no difference", False)]
)
def test_a_change_of_ours_is_seen(ours, words, regression):
    change = only(result(), result(ours=ours))
    assert (change.verdict, change.regression) == (words, regression)
    assert change.ratio.median == pytest.approx(50 / ours)


def test_the_interval_spans_all_that_both_runs_allow():
    old, new = result(), result(ours=40.0)
    old["providers"][1]["time_ms"]["rounds"] = [50.0] * 12  # so that the ratios are 2 x SPREAD
    new["providers"][1]["time_ms"]["rounds"] = [40.0] * 12
    change = only(old, new)
    assert change.old.ratio.median == 2
    assert change.ratio.low == pytest.approx(2.5 * 0.995 / (2 * 1.005))
    assert change.ratio.high == pytest.approx(2.5 * 1.005 / (2 * 0.995))


def test_the_ratio_is_taken_within_each_round():
    """Both slow down threefold late in the run: their times scatter, their ratio does not."""
    drifting = result()
    for entry, milliseconds in zip(drifting["providers"], (100.0, 50.0), strict=False):
        entry["time_ms"]["rounds"] = [milliseconds * factor for factor in (*[1] * 7, *[3] * 5)]
    change = only(drifting, result(ours=60.0))
    assert change.old.ratio == Estimate(2.0, 2.0, 2.0)
    assert change.verdict == "slower"


def test_tolerance():
    old, new = result(), result(ours=56.0)
    assert only(old, new).verdict == "slower"
    assert only(old, new, tolerance=20).verdict == "no difference"
    for bad in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="tolerance must be a percentage of at least 0"):
            bench.compare(run(old), run(new), bad)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (1.04, 1.2, "faster"),
        (1.02, 1.2, "no difference"),
        (0.9, 0.96, "slower"),
        (0.9, 0.98, "no difference"),
        (0.5, 2.0, "no difference"),
    ],
)
def test_a_verdict_needs_the_whole_interval_beyond_the_tolerance(low, high, words):
    assert bench.verdict(Estimate((low + high) / 2, low, high), 3.0) == words


@pytest.mark.parametrize(
    "now",
    [
        provider("beit3_fast", None, "failed", reason="maximum error 1 > 2e-5"),
        provider("beit3_fast", None, None, failure="RuntimeError: no such kernel"),
    ],
)
def test_what_passed_and_fails_now_is_a_regression(now):
    new = result()
    new["providers"][1] = now
    change = only(result(), new)
    assert change.regression
    assert change.verdict == f"now fails: {now['reason'] or now['failure']}"
    assert not only(new, new).regression, "it failed before as well"
    back = only(new, result())
    assert (back.regression, back.verdict) == (False, f"passes now; failed: {now['reason'] or now['failure']}")


def test_without_a_reference_no_time_is_compared():
    new = result(ours=500.0)
    new["providers"][0] = provider("reference", None, "failed", reason="the cap")
    change = only(result(), new)
    assert (change.ratio, change.regression) == (None, False)
    assert change.verdict == "no time of the reference to compare with"


def test_the_baseline_that_the_document_names_is_the_reference():
    old, new = (result(ours=ours, baseline="peer") for ours in (50.0, 60.0))
    change = only(old, new)
    assert change.old.ratio.median == pytest.approx(1 / 50, rel=1e-2)
    assert change.verdict == "slower"


def test_what_is_in_one_run_alone_is_listed():
    found = bench.compare(run(result("a"), result("b")), run(result("b"), result("c")))
    assert found.only_old == ["ops a, beit3_fast"]
    assert found.only_new == ["ops c, beit3_fast"]
    assert [change.new.case for change in found.changes] == ["b"]
    assert found.ok
    assert bench.listed(found) == [
        "only in the old run: ops a, beit3_fast",
        "only in the new run: ops c, beit3_fast",
    ]


def test_cases_of_one_name_that_differ_are_not_compared():
    found = bench.compare(run(result()), run(result(batch=2, ours=500.0)))
    assert (found.changes, found.only_old, found.only_new) == ([], [], [])
    assert found.differing == ["ops base-joint, beit3_fast: batch 8 in the old run, 2 in the new one"]
    counted_otherwise = result()
    counted_otherwise["case"] |= {"flops": 8, "new field": 1}
    assert only(result(), counted_otherwise).verdict == "no difference"


def test_kinds_are_kept_apart_and_all_holds_several():
    old = run(kind="all", runs=[run(result()), run(result(), kind="model"), {"schema": 1, "kind": "memory"}])
    new = run(kind="all", runs=[run(result(ours=60.0)), run(result(), kind="model")])
    assert [(c.new.kind, c.verdict) for c in bench.compare(old, new).changes] == [
        ("ops", "slower"),
        ("model", "no difference"),
    ]


@pytest.mark.parametrize(("moved", "words"), [(1.15, "slower"), (1.3, "cannot be told"), (0.5, "cannot be told")])
def test_nothing_is_claimed_where_the_reference_changed_by_more(moved, words):
    """Its code is the same in both runs: what slowed it down may have slowed ours down otherwise."""
    change = only(result(), result(reference=100.0 * moved, ours=60.0 * moved))
    assert change.verdict.startswith(words)
    assert change.regression == (words == "slower")
    if words != "slower":
        assert change.verdict == f"cannot be told: the reference took {moved:.2f}x as long"


def with_rounds(number, **changes):
    """A result of so many rounds."""
    case = result(**changes)
    for entry in case["providers"]:
        entry["time_ms"]["rounds"] = [entry["time_ms"]["median"]] * number
    return case


@pytest.mark.parametrize(("cases", "needed"), [(1, 7), (3, 8), (20, 11), (51, 12), (52, 13)])
def test_more_cases_need_more_rounds(cases, needed):
    names = [str(index) for index in range(cases)]
    old, enough, few = (
        run(*(with_rounds(rounds, name=name, ours=ours) for name in names))
        for rounds, ours in ((needed, 50.0), (needed, 100.0), (needed - 1, 100.0))
    )
    assert {change.verdict for change in bench.compare(old, enough).changes} == {"slower"}
    for pair in ((old, few), (few, old)):
        found = bench.compare(*pair)
        assert {(change.verdict, change.ratio, change.regression) for change in found.changes} == {
            (f"too few rounds to tell: {needed - 1}, and among so many cases {needed} are needed", None, False)
        }


def test_cases_without_times_need_no_more_rounds():
    """A verdict that cannot be given cannot be false."""
    failed = [result(str(index)) for index in range(60)]
    for case in failed:
        case["providers"][1] = provider("beit3_fast", None, "failed", reason="the cap")
    old, new = run(with_rounds(7), *failed), run(with_rounds(7, ours=100.0), *failed)
    assert bench.compare(old, new).changes[0].verdict == "slower"


def scaling(ours):
    entries = [provider("reference", 100.0), provider("beit3_fast, optimized", ours)]
    for entry in entries:
        del entry["time_ms"]["rounds"]
    point = {"x": 2, "tokens": 420, "flops": 7, "providers": entries}
    return run(kind="scaling", curves=[{"name": "batch", "dtype": "float32", "points": [point]}])


def test_older_curves_have_no_rounds_and_compare_by_the_ends_of_their_intervals():
    found = bench.compare(scaling(50.0), scaling(60.0))
    (change,) = found.changes
    (warning,) = found.warnings
    assert warning.startswith("1 of 1 cases have no time of every round")
    assert (change.new.case, change.verdict) == ("batch=2 float32", "slower")
    assert change.old.ratio == Estimate(2.0, pytest.approx(2 * 0.99 / 1.01), pytest.approx(2 * 1.01 / 0.99))


def test_another_machine_is_a_warning():
    other = run(result(), machine={**MACHINE, "torch": "2.15", "threads": 1}, complete=False)
    assert bench.compare(run(result()), other).warnings == [
        "threads differs: 2 in the old run, 1 in the new one",
        "torch differs: 2.14 in the old run, 2.15 in the new one",
        "the new run was interrupted: cases are missing",
    ]
    assert bench.compare(run(result()), run(result())).warnings == []


def files(tmp_path, *documents):
    paths = [tmp_path / f"{index}.json" for index in range(len(documents))]
    for path, document in zip(paths, documents, strict=True):
        path.write_text(json.dumps(document))
    return paths


def test_command_prints_it_and_fails_on_a_regression(tmp_path, capsys):
    old, new = files(tmp_path, run(result("a"), result("gone")), run(result("a", ours=60.0), machine={"torch": "3"}))
    assert not command.compare(old, new)
    printed = " ".join(capsys.readouterr().out.split())
    for words in ("warning: torch differs", "0.83x [0.8", "slower", "only in the old run: ops gone, beit3_fast"):
        assert words in printed
    assert command.compare(old, old)
    assert command.compare(old, new, tolerance=30)
    codes = [
        CliRunner().invoke(main, ["bench", "compare", str(old), str(new), *more]).exit_code
        for more in ([], ["--tolerance=30"], ["--tolerance=-1"])
    ]
    assert codes == [1, 0, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "no document of beit3-fast bench"),
        ('{"schema": 2, "kind": "ops"}', "has schema 2, this version reads 1"),
        ('{"schema": 1, "kind": "static"}', "is of kind 'static'; only model, ops, scaling and all have times"),
    ],
)
def test_bad_files(content, message, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        command.compare(path, path)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.json"):
        command.compare(tmp_path / "none.json", path)


# ---- A against A, measured by a clock that scatters and drifts ----


def measured(noise, slower=(), cases=20, rounds=24):
    """A document of cases whose times an unsteady clock took: 5 % noise, and a third slower at the end of each."""
    now, calls = 0, 0

    def work(milliseconds):
        def call():
            nonlocal now, calls
            calls += 1
            now += round(1e6 * milliseconds * noise.lognormvariate(0, 0.05) * (1 + calls / (6 * rounds)))

        return call

    results = []
    for index in range(cases):
        calls = 0
        providers = {"reference": work(100.0), "beit3_fast": work(130.0 if index in slower else 100.0)}
        timing = interleave(providers, rounds=rounds, stopwatch=wall_clock(lambda: now))
        case = result(str(index))
        case["providers"] = [provider(name, 1.0, time_ms=timing.document(name)) for name in providers]
        results.append(case)
    return run(*results)


def test_two_runs_of_the_same_agree_as_a_whole():
    """Of 200 comparisons of 20 cases, without any tolerance, at most 5 % may show anything."""
    noise = random.Random(0)
    told = [not only_no_difference(bench.compare(measured(noise), measured(noise), 0.0)) for _ in range(200)]
    assert sum(told) <= 10


def only_no_difference(found):
    return {change.verdict for change in found.changes} == {"no difference"}


@pytest.mark.parametrize("seed", range(20))
def test_a_real_change_is_seen_under_the_same_noise(seed):
    noise = random.Random(seed)
    found = bench.compare(measured(noise), measured(noise, slower=(3, 11)))
    assert [change.new.case for change in found.changes if change.verdict == "slower"] == ["3", "11"]
