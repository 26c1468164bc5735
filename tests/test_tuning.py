"""The tuner without a GPU: the file and what is looked up in it, the search with kernels and timers of the tests' own,
and the search with the real kernels where something can run them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("triton", reason="the kernels that are tuned need triton")

from beit3_fast.kernels import multiway_ffn as ffn_kernels
from beit3_fast.kernels import multiway_linear as linear_kernels
from beit3_fast.kernels.config import Config
from beit3_fast.kernels.launch import record

from beit3_fast import ops, tuning
from beit3_fast._candidates import MOST, Product
from beit3_fast.cli import main
from beit3_fast.tuning import Choice, Entry, Key, cache_file, choose, row_bucket, tune

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
NAME = "Test GPU"
FFN = ("multiway_ffn", GPU, torch.bfloat16, 2000, 2, (768, 3072))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The file of this test alone; it does not exist yet. Other programs' caches stay where they are."""
    path = tmp_path / "beit3_fast" / "tuned.json"
    monkeypatch.setattr(tuning, "cache_file", lambda: path)
    tuning.forget()
    yield path
    tuning.forget()


@pytest.fixture
def gpu(monkeypatch):
    """An H100 as far as PyTorch's answers go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: NAME)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def entry(use_triton=True, configs=None, **key):
    """An entry for `FFN` whose configs are valid and not the default ones."""
    fields = {"device": NAME, "op": "multiway_ffn", "widths": (768, 3072), "num_experts": 2, "rows": 2048}
    found = Key(**{**fields, "dtype": "bfloat16", **key})
    if configs is None:
        kernels = ffn_kernels if "ffn" in found.op else linear_kernels
        valid = kernels.valid_configs(90, torch.bfloat16, *found.widths)
        configs = {role: valid[role][0] for role in tuning.ROLES[found.op]}
    return Entry(found, Choice(configs, use_triton), 1.0, 1.5, 2.0, 1e-3, 1e-3, {"torch": "2"}, "2025-01-01T00:00:00")


def default(op, arch, dtype, num_rows, num_experts, widths):
    kernels = ffn_kernels if "ffn" in op else linear_kernels
    configs = kernels.default_configs(arch, dtype, row_bucket(num_rows), num_experts, *widths)
    return Choice({role: configs[role] for role in tuning.ROLES[op]}, True)


def stored(cache):
    return json.loads(cache.read_text())["entries"]


# ---- buckets and choices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_rows", "bucket"),
    [(0, 16), (1, 16), (16, 16), (17, 20), (32, 32), (33, 40), (210, 224), (1024, 1024), (1025, 1280), (65537, 81920)],
)
def test_row_buckets(num_rows, bucket):
    assert row_bucket(num_rows) == bucket
    assert row_bucket(bucket) == bucket


def test_there_are_few_buckets_and_none_is_far_away():
    buckets = [row_bucket(num_rows) for num_rows in range(1, 2**15 + 1)]
    assert buckets == sorted(buckets)
    assert len(set(buckets)) == 4 * (15 - 4) + 1
    assert all(rows <= bucket <= max(16, 1.25 * rows) for rows, bucket in enumerate(buckets, start=1))


def test_default_rows_are_buckets():
    assert [row_bucket(num_rows) for num_rows in tuning.ROWS] == list(tuning.ROWS)


def test_row_bucket_refuses_a_negative_count():
    with pytest.raises(ValueError, match=r"num_rows must not be negative, got -1"):
        row_bucket(-1)


@pytest.mark.parametrize("op", tuning.ROLES)
@pytest.mark.parametrize("num_rows", [0, 3, 2000])
def test_without_a_file_the_defaults_of_the_chip(op, num_rows, gpu, recwarn):
    rest = (torch.bfloat16, num_rows, 2, (768, 3072))
    assert choose(op, GPU, *rest) == default(op, 90, *rest)
    assert choose(op, CPU, *rest) == default(op, 80, *rest)
    assert not recwarn


def test_the_chip_matters(gpu):
    """Otherwise the test above could not tell 8.0 from 9.0."""
    assert choose(*FFN) != choose("multiway_ffn", CPU, *FFN[2:])


def test_an_amd_gpu_is_no_hopper(gpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert choose(*FFN) == default("multiway_ffn", 942, *FFN[2:])


@pytest.mark.parametrize("op", tuning.ROLES)
def test_a_stored_winner_is_used(op, gpu):
    winner = entry(op=op, num_experts=3)
    assert winner.choice != default(op, 90, torch.bfloat16, 2000, 3, (768, 3072))
    tuning.store([winner])
    for num_rows in (1025, 2000, 2048):
        assert choose(op, GPU, torch.bfloat16, num_rows, 3, (768, 3072)) == winner.choice


def chosen(num_rows):
    """The tuned row bucket whose winner is chosen, None for the default configs."""
    choice = choose(*FFN[:3], num_rows, *FFN[4:])
    return next((key.rows for key, entry in tuning.read_entries().items() if entry.choice == choice), None)


def store_buckets(*buckets):
    """Winners that differ from each other and from the defaults."""
    valid = ffn_kernels.valid_configs(90, torch.bfloat16, 768, 3072)
    tuning.store([entry(rows=n, configs={role: valid[role][i] for role in FFN_ROLES}) for i, n in enumerate(buckets)])


FFN_ROLES = tuning.ROLES["multiway_ffn"]


@pytest.mark.parametrize("batch", range(1, 129))
def test_every_batch_of_images_finds_the_nearest_default_bucket(batch, gpu):
    """210 tokens each. In ratios: 256 and 2048 are equally far from 724, 8192 and 2048 from 4096."""
    store_buckets(*tuning.ROWS)
    rows = row_bucket(210 * batch)
    expected = next(bucket for bucket, end in zip(tuning.ROWS, (724, 4096, 16384, 2**20), strict=True) if rows <= end)
    assert chosen(210 * batch) == expected
    assert 1 / tuning.REACH <= expected / rows <= tuning.REACH


def test_no_bucket_reaches_further_than_three_times(gpu):
    store_buckets(256, 8192)
    assert [chosen(rows) for rows in (80, 81, 96, 768, 769)] == [None, 256, 256, 256, None]
    assert [chosen(rows) for rows in (2560, 2730, 3072, 24576, 28672)] == [None, 8192, 8192, 8192, None]


def test_of_two_buckets_equally_near_the_smaller(gpu):
    store_buckets(1024, 4096)
    assert [chosen(rows) for rows in (1792, 2048, 2560)] == [1024, 1024, 4096]


def test_a_bucket_whose_configs_are_no_longer_valid_hides_no_other(gpu):
    store_buckets(1024, 2048)
    spoilt = entry(configs={role: dataclasses.replace(entry().choice.configs[role], stages=99) for role in FFN_ROLES})
    tuning.store([spoilt])
    assert chosen(2048) == 1024


@pytest.mark.parametrize("op", tuning.ROLES)
def test_ragged_batches_search_no_configs_once_their_bucket_is_known(op, gpu, monkeypatch):
    kernels = ffn_kernels if "ffn" in op else linear_kernels
    searches = []
    for name in ("default_configs", "valid_configs"):
        search = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *args, search=search: searches.append(1) or search(*args))
    rest = (torch.bfloat16, 2, (768, 3072))
    choices = {choose(op, GPU, rest[0], num_rows, *rest[1:]).use_triton for num_rows in range(1537, 1793)}
    assert choices == {True}
    assert len(searches) == 2, "one look at what is valid, one at the defaults"


@pytest.mark.parametrize(
    "other",
    [
        {"device": "Another GPU"},
        {"op": "multiway_linear", "widths": (768, 3072)},
        {"widths": (768, 2304)},
        {"num_experts": 1},
        {"rows": 640},
        {"rows": 8192},
        {"dtype": "float16"},
    ],
)
def test_an_entry_holds_for_its_key_alone(other, gpu):
    tuning.store([entry(**other)])
    assert choose(*FFN) == default("multiway_ffn", 90, *FFN[2:])


def test_where_pytorch_won_it_is_chosen(gpu):
    tuning.store([entry(use_triton=False)])
    assert not choose(*FFN).use_triton


def test_cpu_tensors_never_read_the_file(gpu):
    tuning.store([entry(device=name) for name in (NAME, "cpu")])
    assert choose("multiway_ffn", CPU, *FFN[2:]) == default("multiway_ffn", 80, *FFN[2:])


def test_an_unknown_op(gpu):
    with pytest.raises(ValueError, match=r"op must be one of multiway_linear, .* got 'attention'"):
        choose("attention", *FFN[1:])


def test_the_file_is_read_once(gpu, cache, monkeypatch):
    tuning.store([entry()])
    seen = []
    read = tuning.read_entries
    monkeypatch.setattr(tuning, "read_entries", lambda: seen.append(1) or read())
    for num_rows in range(1025, 1035):
        choose("multiway_ffn", GPU, torch.bfloat16, num_rows, 2, (768, 3072))
    assert len(seen) == 1
    cache.unlink()
    assert choose(*FFN) == entry().choice
    tuning.forget()
    assert choose(*FFN) != entry().choice


def test_importing_it_does_not_import_triton():
    code = "import sys; import beit3_fast.tuning; assert 'triton' not in sys.modules; assert 'rich' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# ---- the file --------------------------------------------------------------------------------------------------------


def good_record():
    return tuning._to_record(entry())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"schema": 1}',
        b'{"schema": 1, "entries": 3}',
        b'{"schema": 1, "entries": [{}]}',
        json.dumps({"schema": 1, "entries": [good_record() | {"configs": {"fc1": {"block_m": 16}}}]}).encode(),
        json.dumps({"schema": 1, "entries": [good_record() | {"configs": [1]}]}).encode(),
        json.dumps({"schema": 1, "entries": [good_record() | {"device": []}]}).encode(),
    ],
)
def test_a_damaged_file_gives_the_defaults_and_one_warning(content, gpu, cache):
    cache.parent.mkdir()
    cache.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"tuned\.json is damaged"):
        assert choose(*FFN) == default("multiway_ffn", 90, *FFN[2:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for num_rows in (2001, 300):
            assert choose(*FFN[:3], num_rows, *FFN[4:]) == default("multiway_ffn", 90, FFN[2], num_rows, *FFN[4:])
    with pytest.warns(RuntimeWarning, match="damaged"):  # what is written in its place
        tuning.store([entry()])
    assert choose(*FFN) == entry().choice


def test_a_folder_in_its_place_is_damage(gpu, cache):
    cache.mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert choose(*FFN) == default("multiway_ffn", 90, *FFN[2:])


def test_another_schema_gives_the_defaults(gpu, cache, recwarn):
    tuning.store([entry()])
    content = json.loads(cache.read_text())
    assert content["schema"] == tuning.SCHEMA
    cache.write_text(json.dumps(content | {"schema": tuning.SCHEMA + 1}))
    tuning.forget()
    assert choose(*FFN) == default("multiway_ffn", 90, *FFN[2:])
    assert not recwarn


@pytest.mark.parametrize(
    "change",
    [
        lambda fc1, fc2: {},
        lambda fc1, fc2: {"fc1": fc1},
        lambda fc1, fc2: {"fc1": fc1, "fc2": fc2, "fc3": fc2},
        lambda fc1, fc2: {"fc1": fc1, "fc2": dataclasses.replace(fc2, stages=99)},
        lambda fc1, fc2: {"fc1": dataclasses.replace(fc1, block_m=60), "fc2": fc2},
        lambda fc1, fc2: {"fc1": dataclasses.replace(fc1, block_m=str(fc1.block_m)), "fc2": fc2},
    ],
)
def test_configs_that_are_not_valid_give_the_defaults(change, gpu, recwarn):
    good = entry()
    tuning.store([good])
    assert choose(*FFN) == good.choice, "the entry is used when it is valid"
    tuning.store([entry(configs=change(**good.choice.configs))])
    assert choose(*FFN) == default("multiway_ffn", 90, *FFN[2:])
    assert not recwarn


def test_store_keeps_what_is_there(cache):
    first, second = entry(), entry(dtype="float16")
    tuning.store([first])
    tuning.store([second])
    assert tuning.read_entries() == {first.key: first, second.key: second}
    replaced = dataclasses.replace(first, pytorch_ms=7.0, error=None, default_ms=None)
    tuning.store([replaced])
    assert tuning.read_entries() == {first.key: replaced, second.key: second}


def test_clear_removes_one_device(cache):
    mine, other = entry(), entry(device="Another GPU")
    tuning.store([mine, other, entry(rows=16)])
    assert tuning.clear(NAME) == 2
    assert tuning.read_entries() == {other.key: other}
    assert tuning.clear(NAME) == 0


def test_a_write_that_fails_leaves_the_old_file(cache, monkeypatch):
    tuning.store([entry()])
    before = cache.read_bytes()

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        tuning.store([entry(rows=16)])
    assert cache.read_bytes() == before
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_where_the_file_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value, folder in (("/somewhere", Path("/somewhere")), ("", tmp_path / ".cache")):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache_file() == folder / "beit3_fast" / "tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == tmp_path / ".cache" / "beit3_fast" / "tuned.json"


# ---- the search, with kernels of our own -----------------------------------------------------------------------------

CONFIGS = [Config(16, 64, 32, 4, stages) for stages in (2, 3, 4)]  # the first is the default for so few rows


class Kernels:
    """Stands in for the linear kernels: plain PyTorch, and a note of the configs it was called with."""

    def __init__(self, monkeypatch):
        self.called = None  # the last call's configs
        self.change = lambda configs, results: results
        valid = {"forward": CONFIGS, "dx": CONFIGS, "dweight": CONFIGS}
        monkeypatch.setattr(linear_kernels, "valid_configs", lambda *_: valid)
        monkeypatch.setattr(linear_kernels, "default_configs", lambda *_: dict.fromkeys(valid, CONFIGS[0]))
        monkeypatch.setattr(linear_kernels, "forward", self.forward)
        monkeypatch.setattr(linear_kernels, "backward", self.backward)

    def forward(self, *args, configs):
        self.called = configs
        return self.change(configs, (ops.multiway_linear_reference(*args), None))

    def backward(self, dy, x, weight, offsets, *, configs):
        self.called = configs
        bias = weight.new_zeros(weight.shape[:2])
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        out = ops.multiway_linear_reference(*leaves, offsets)
        return self.change(configs, torch.autograd.grad(out, leaves, dy))


@pytest.fixture
def fake(monkeypatch):
    return Kernels(monkeypatch)


def timer(fake, milliseconds, pytorch=9.0, log=None):
    """Calls what is timed, and says how long the configs it ran with are to take."""

    def measure(run):
        fake.called = None
        run()
        if log is not None:
            log.append(fake.called)
        return pytorch if fake.called is None else milliseconds(fake.called)

    return measure


def search(op, timing, **options):
    settings = {"device": "cpu", "ops": [op], "sizes": [(32, 64)], "rows": [40], "dtypes": [torch.float32]}
    return tune(timer=timing, **{**settings, **options})


def total(costs):
    """Milliseconds from a number for each (role, stages)."""
    return lambda configs: sum(costs[role, config.stages] for role, config in configs.items())


COSTS = {("dx", 2): 2.0, ("dx", 3): 1.0, ("dx", 4): 3.0, ("dweight", 2): 5.0, ("dweight", 3): 6.0, ("dweight", 4): 4.0}


def test_the_fastest_configs_win_role_by_role(fake, cache):
    log = []
    outcomes = search("multiway_linear_backward", timer(fake, total(COSTS), pytorch=9.0, log=log))
    assert [outcome.key.widths for outcome in outcomes] == [(32, 96), (32, 32)]
    for outcome in outcomes:
        won = outcome.entry
        assert won.choice == Choice({"dx": CONFIGS[1], "dweight": CONFIGS[2]}, use_triton=True)
        assert (won.triton_ms, won.default_ms, won.pytorch_ms) == (5.0, 7.0, 9.0)
        assert outcome.skipped == ()
    tried = [(configs["dx"].stages, configs["dweight"].stages) for configs in log[:6]]
    assert tried == [(2, 2), (3, 2), (4, 2), (3, 2), (3, 3), (3, 4)], "defaults first, the winner of a role is kept"
    assert {record["op"] for record in stored(cache)} == {"multiway_linear_backward"}
    assert tuning.read_entries() == {outcome.key: outcome.entry for outcome in outcomes}


def test_what_is_stored_says_how_it_was_found(fake, cache):
    search("multiway_linear", timer(fake, lambda configs: 2.0 + configs["forward"].stages))
    record = stored(cache)[0]
    expected = {
        "device": "cpu",
        "op": "multiway_linear",
        "widths": [32, 32],
        "num_experts": 2,
        "rows": 40,
        "dtype": "float32",
        "configs": {"forward": CONFIGS[0].to_dict()},
        "use_triton": True,
        "triton_ms": 4.0,
        "default_ms": 4.0,
        "pytorch_ms": 9.0,
    }
    assert {name: record[name] for name in expected} == expected
    assert 0 < record["error"] < 1e-6
    assert 0 < record["pytorch_error"] < 1e-6
    assert record["versions"].keys() == {"torch", "triton", "beit3_fast"}
    assert record["date"].startswith("20")


def test_pytorch_wins_where_it_is_faster(fake, monkeypatch, gpu):
    (outcome, _) = search("multiway_linear", timer(fake, lambda configs: 6 - configs["forward"].stages, pytorch=1.9))
    assert outcome.entry.choice == Choice({"forward": CONFIGS[2]}, use_triton=False)
    assert (outcome.entry.triton_ms, outcome.entry.pytorch_ms) == (2.0, 1.9)
    tuning.store([dataclasses.replace(outcome.entry, key=dataclasses.replace(outcome.key, device=NAME))])
    assert choose("multiway_linear", GPU, torch.float32, 40, 2, (32, 96)) == outcome.entry.choice


@pytest.mark.parametrize(
    ("op", "output"), [("multiway_linear", 0), *(("multiway_linear_backward", output) for output in range(3))]
)
def test_a_wrong_config_never_wins_however_fast(op, output, fake):
    """Wrong by one element of one output, with the config that is the fastest in every role."""

    def change(configs, results):
        if any(config == CONFIGS[1] for config in configs.values()):
            results[output].view(-1)[-1] += 0.1
        return results

    fake.change = change
    log = []
    timing = timer(fake, lambda configs: 1 if CONFIGS[1] in configs.values() else 2, log=log)
    outcome = search(op, timing)[0]
    assert CONFIGS[1] not in outcome.entry.choice.configs.values()
    assert outcome.entry.choice.use_triton
    assert not any(configs and CONFIGS[1] in configs.values() for configs in log), "it is not even timed"
    assert len(outcome.skipped) == len(tuning.ROLES[op])
    assert all(f" {CONFIGS[1]}: maximum error " in reason for reason in outcome.skipped)


def test_nan_is_wrong(fake):
    fake.change = lambda configs, results: [r if r is None else r * float("nan") for r in results]
    outcome = search("multiway_linear", timer(fake, lambda configs: 1))[0]
    assert (outcome.entry.choice.use_triton, outcome.entry.triton_ms, outcome.entry.error) == (False, None, None)
    assert len(outcome.skipped) == 3


def test_a_config_that_raises_is_skipped_with_its_reason(fake):
    from triton.runtime.errors import OutOfResources

    def change(configs, results):
        if configs["forward"] == CONFIGS[1]:
            raise OutOfResources(300000, 100000, "shared memory")
        if configs["forward"] == CONFIGS[0]:
            raise RuntimeError("no such instruction\nand a second line")
        return results

    fake.change = change
    outcome = search("multiway_linear", timer(fake, lambda configs: 1))[0]
    assert outcome.entry.choice == Choice({"forward": CONFIGS[2]}, use_triton=True)
    assert (outcome.entry.triton_ms, outcome.entry.default_ms) == (1, None)
    assert outcome.skipped[0] == "forward 16x64x32 w4 s2: no such instruction"
    assert outcome.skipped[1].startswith("forward 16x64x32 w4 s3: out of resource: shared memory")
    assert len(outcome.skipped) == 2


def test_a_config_that_cannot_be_timed_is_skipped(fake):
    def milliseconds(configs):
        if configs["forward"] == CONFIGS[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 1

    outcome = search("multiway_linear", timer(fake, milliseconds))[0]
    assert outcome.entry.choice.configs == {"forward": CONFIGS[1]}
    assert outcome.entry.default_ms is None
    assert outcome.skipped == ("forward 16x64x32 w4 s2: CUDA out of memory",)


def test_a_bug_is_not_taken_for_a_config_that_does_not_run(fake):
    def change(configs, results):
        raise TypeError("a bug")

    fake.change = change
    with pytest.raises(TypeError, match="a bug"):
        search("multiway_linear", timer(fake, lambda configs: 1))


def test_one_lucky_time_does_not_make_a_winner(fake):
    """A config that is fast only the first time loses to the default when they are timed in turns."""
    times = {2: iter([5.0] * 100), 3: iter([1.0] + [6.0] * 100), 4: iter([8.0] * 100)}
    outcome = search("multiway_linear", timer(fake, lambda configs: next(times[configs["forward"].stages])))[0]
    assert outcome.entry.choice.configs == {"forward": CONFIGS[0]}
    assert (outcome.entry.triton_ms, outcome.entry.default_ms) == (5.0, 5.0)


def test_what_cannot_be_set_up_is_no_end(fake, monkeypatch, cache):
    """Out of memory with one key's inputs: the others are tuned."""
    make = tuning._Problem.__init__

    def first_fails(self, key, device):
        if key.rows == 32:
            raise torch.OutOfMemoryError("CUDA out of memory")
        make(self, key, device)

    monkeypatch.setattr(tuning._Problem, "__init__", first_fails)
    small, large = search("multiway_linear", timer(fake, lambda configs: 1), rows=[32, 33], sizes=[(32, 64)])[:2]
    assert small.entry is None
    assert small.skipped == ("could not be set up: CUDA out of memory",)
    assert large.entry is not None
    assert {record["rows"] for record in stored(cache)} == {40}


def test_keys_are_tuned_once_and_progress_rises(fake):
    shares, whats = [], []
    outcomes = search(
        "multiway_linear",
        timer(fake, lambda configs: 1),
        rows=[40, 64, 33, 60],
        dtypes=[torch.float32, torch.bfloat16],
        progress=lambda share, what: (shares.append(share), whats.append(what)),
    )
    keys = [(outcome.key.dtype, outcome.key.widths, outcome.key.rows) for outcome in outcomes]
    assert keys == [
        (dtype, widths, rows)
        for dtype in ("float32", "bfloat16")
        for widths in ((32, 96), (32, 32))
        for rows in (40, 64)
    ]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert whats[:3] == [
        f"multiway_linear 32 x 96, 40 rows, float32: {what}"
        for what in ("float64", "compiling forward", "forward 16x64x32 w4 s2")
    ]


@pytest.mark.parametrize(("num_experts", "expected"), [(1, [0, 64]), (2, [0, 47, 64]), (3, [0, 47, 55, 64])])
def test_every_expert_has_rows(num_experts, expected, fake):
    assert tuning._offsets(64, num_experts) == expected
    outcome = search("multiway_linear", timer(fake, lambda configs: 1), num_experts=num_experts)[0]
    assert outcome.entry.key.num_experts == num_experts
    assert outcome.skipped == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ops": ["attention"]}, "ops must be among multiway_linear, .* got 'attention'"),
        ({"dtypes": [torch.float64]}, "dtypes must be among bfloat16, float16, float32, got torch.float64"),
        ({"sizes": [(32, 0)]}, "sizes must be positive"),
        ({"rows": [-3]}, "rows must be positive"),
        ({"rows": []}, "rows must be positive"),
        ({"num_experts": 0}, "num_experts must be positive"),
        ({"timer": None}, "tuning needs a CUDA GPU"),
        ({"timer": None, "device": "cuda"}, "tuning needs a CUDA GPU"),
    ],
)
def test_bad_arguments(options, message, monkeypatch, cache):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        tune(**{"device": "cpu", "timer": lambda run: 1.0, **options})
    assert not cache.exists()


# ---- what is compiled ahead, and on what operands it is timed --------------------------------------------------------


compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1: no compiler")


class OnAGPU:
    """A problem whose tensors are meta tensors, and say that they are on a GPU."""

    device = GPU
    key = Key(NAME, "multiway_ffn", (64, 128), 2, 16, "bfloat16")

    def run(self, configs):
        def meta(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="meta")

        wide, offsets = meta(2, 128), meta(3, dtype=torch.int32)
        weights = (meta(2, 128, 64), wide, wide, wide, meta(2, 64, 128), meta(2, 64))
        return ffn_kernels.forward(meta(16, 64), *weights, offsets, configs=configs)


def two_tiles():
    """Configs for a block whose fc1 differs in the width of its tile."""
    fc1, fc2 = (ffn_kernels.default_configs(90, torch.bfloat16, 16, 2, 64, 128)[role] for role in FFN_ROLES)
    return [{"fc1": dataclasses.replace(fc1, block_n=n), "fc2": fc2} for n in (64, 128)]


@compiles
def test_launches_are_compiled_once_and_only_what_they_need(gpu):
    asked = []
    compiled = tuning._Compiled(lambda builds: [(build, asked.append(build)) for build in builds])
    first, second = two_tiles()
    assert compiled.why_not(OnAGPU(), [first, first]) == [None, None]
    assert [build.name for build in asked] == ["fold", "fc1", "fc2"]
    assert {build.arch for build in asked} == {90}
    asked.clear()
    assert compiled.why_not(OnAGPU(), [first, second]) == [None, None]
    assert [build.name for build in asked] == ["fc1", "fc2"], "fc2 adds up what the tiles of fc1 left"
    assert asked[0].config == str(second["fc1"])


@compiles
def test_what_a_build_is_refused_for_holds_for_every_config_that_needs_it(gpu):
    first, second = two_tiles()

    def each(builds):
        return [(build, "a hazard" if build.config == str(second["fc1"]) else None) for build in builds]

    assert tuning._Compiled(each).why_not(OnAGPU(), [first, second]) == [None, "a hazard"]


def test_nothing_is_compiled_for_what_is_not_on_an_nvidia_gpu(gpu, monkeypatch):
    compiled = tuning._Compiled(lambda builds: pytest.fail("compiled"))
    problem = OnAGPU()
    problem.device = CPU
    assert compiled.why_not(problem, two_tiles()) == [None, None]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert compiled.why_not(OnAGPU(), two_tiles()) == [None, None]


def test_a_refused_config_is_neither_run_nor_timed(fake, monkeypatch):
    def why_not(self, problem, tries):
        return [f"hazard {configs['forward'].stages}" * (configs["forward"].stages < 4) or None for configs in tries]

    monkeypatch.setattr(tuning._Compiled, "why_not", why_not)
    log = []
    outcome = search("multiway_linear", timer(fake, lambda configs: 1, log=log))[0]
    assert outcome.entry.choice.configs == {"forward": CONFIGS[2]}
    assert outcome.entry.default_ms is None
    assert outcome.skipped == ("forward 16x64x32 w4 s2: hazard 2", "forward 16x64x32 w4 s3: hazard 3")
    assert not any(configs and configs["forward"] in CONFIGS[:2] for configs in log)


def test_few_configs_are_all_tried_and_many_only_if_asked_for(gpu, monkeypatch):
    key = Key(NAME, "multiway_ffn_backward", (768, 3072), 2, 2048, "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    defaults = ffn_kernels.default_configs(90, torch.bfloat16, 2048, 2, 768, 3072)
    default = {role: defaults[role] for role in tuning.ROLES[key.op]}
    valid = ffn_kernels.valid_configs(90, torch.bfloat16, 768, 3072)
    for exhaustive in (False, True):
        found = tuning._candidates(key, GPU, default, exhaustive)
        assert list(found) == list(default)
        for role, configs in found.items():
            assert configs[0] == default[role]
            assert len(configs) == len(set(configs))
            assert set(configs) <= set(valid[role])
            assert (len(configs) == len(valid[role])) == exhaustive
            assert exhaustive or len(configs) <= MOST + 1


@pytest.mark.parametrize(
    ("op", "role", "product"),
    [
        ("multiway_linear", "forward", Product(((1535, 1), (513, 1)), 3072)),
        ("multiway_linear_backward", "dx", Product(((1535, 1), (513, 1)), 768)),
        ("multiway_linear_backward", "dweight", Product(((3072, 1535), (3072, 513)), 768)),
        ("multiway_ffn", "fc1", Product(((1535, 1), (513, 1)), 3072)),
        ("multiway_ffn", "fc2", Product(((1535, 1), (513, 1)), 768)),
        ("multiway_ffn_backward", "dhidden", Product(((1535, 1), (513, 1)), 3072)),
        ("multiway_ffn_backward", "dx", Product(((1535, 1), (513, 1)), 768)),
        ("multiway_ffn_backward", "dfc1", Product(((3072, 1535), (3072, 513)), 768)),
        ("multiway_ffn_backward", "dfc2", Product(((768, 1535), (768, 513)), 3072)),
    ],
)
def test_what_a_role_computes(op, role, product):
    assert tuning._product(Key(NAME, op, (768, 3072), 2, 2048, "bfloat16"), role) == product


@pytest.mark.parametrize("op", tuning.ROLES)
def test_operands_take_turns_and_no_call_of_pytorch_waits(op, fake, monkeypatch):
    """On a GPU: here the sets are added as they are made there."""
    problem = tuning._Problem(Key("cpu", op, (32, 64), 2, 40, "float32"), CPU) if "linear" in op else None
    if problem is None:
        monkeypatch.setattr(ffn_kernels, "forward", lambda *inputs, **_: (None, *inputs[:2]))
        problem = tuning._Problem(Key("cpu", op, (32, 64), 2, 40, "float32"), CPU)
    inputs, dy, saved = problem._sets[0]
    other = (tuning._clones(inputs), dy.clone(), tuning._clones(saved))
    problem._sets.append(other)
    plain = problem.plain_calls()
    assert len(problem.calls({})) == len(plain) == 2
    first, second = ([tensor.clone() for tensor in call()] for call in plain)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other[0][0].zero_()
    other[1].zero_()
    assert all(torch.equal(a, b) for a, b in zip(first, plain[0](), strict=True)), "each has memory of its own"
    assert problem._host_offsets.device == CPU


def test_a_plain_call_that_cannot_be_captured_is_timed_with_a_word_about_it(fake, monkeypatch):
    from beit3_fast.bench import timing

    def prepared(calls, device):
        if isinstance(calls[0], functools.partial):
            return timing.in_turn(calls)
        raise timing.CaptureError("cannot be captured in a CUDA graph: it waits")

    monkeypatch.setattr(timing, "prepared", prepared)
    outcome = search("multiway_linear", timer(fake, lambda configs: 1))[0]
    assert outcome.entry.pytorch_ms == 9.0
    assert outcome.skipped == ("PyTorch: timed with the host's time: cannot be captured in a CUDA graph: it waits",)


# ---- the search, with the real kernels -------------------------------------------------------------------------------


@contextlib.contextmanager
def launched():
    """Launches with CPU tensors: by Triton's interpreter where that is on, otherwise by a PTX simulator."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        yield
    else:
        simulate = pytest.importorskip("ptxsim.simulate", reason="the PTX simulator is not installed")
        with simulate.simulated(stats=False):
            yield


def depth_of_stages(run):
    """Launches take the less the more stages they have; without a launch it is plain PyTorch. Nothing is run."""
    with record() as launches:
        run()
    stages = [launch.options["num_stages"] for launch in launches if "num_stages" in launch.options]
    return 1.0 / sum(stages) if launches else 9.0


@pytest.mark.slow
@pytest.mark.parametrize("op", tuning.ROLES)
def test_real_kernels(op, monkeypatch):
    """Two configs a role: the default, and the same with one more stage; with two more a result is spoilt."""
    kernels = ffn_kernels if "ffn" in op else linear_kernels
    normal = kernels.default_configs(80, torch.float16, 16, 2, 32, 64)
    good = {role: dataclasses.replace(config, stages=config.stages + 1) for role, config in normal.items()}
    bad = {role: dataclasses.replace(config, stages=config.stages + 2) for role, config in normal.items()}
    spoilt = tuning.ROLES[op][-1]
    choices = {role: [good[role]] + [bad[role]] * (role == spoilt) for role in normal}
    monkeypatch.setattr(kernels, "valid_configs", lambda *_: choices)
    name = "backward" if op.endswith("backward") else "forward"
    real = getattr(kernels, name)

    def spoil(*args, configs, **options):
        results = real(*args, configs=configs, **options)
        return tuple(result * 1.1 for result in results) if configs[spoilt] == bad[spoilt] else results

    monkeypatch.setattr(kernels, name, spoil)
    with launched():
        outcome = search(op, depth_of_stages, sizes=[(32, 64)], rows=[16], dtypes=[torch.float16])[0]
    assert outcome.entry.choice == Choice({role: good[role] for role in tuning.ROLES[op]}, use_triton=True)
    assert [reason.split(": ")[0] for reason in outcome.skipped] == [f"{spoilt} {bad[spoilt]}"]
    assert outcome.entry.triton_ms < outcome.entry.default_ms < outcome.entry.pytorch_ms == 9.0


# ---- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments):
    result = CliRunner().invoke(main, ["tune", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("arguments", [[], ["--clear"], ["--width", "64", "--rows", "16"]])
def test_without_a_gpu_one_line_and_exit_code_2(arguments, monkeypatch, cache):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stderr == "beit3-fast: tune needs a CUDA GPU: PyTorch sees none\n"
    assert result.stdout == ""
    assert not cache.exists()


def test_list_prints_what_is_stored(cache):
    lost = dataclasses.replace(entry(rows=64, use_triton=False), triton_ms=8.0)
    failed = dataclasses.replace(entry(rows=32, use_triton=False), triton_ms=None, default_ms=None, error=None)
    tuning.store([entry(), lost, failed, entry(device="Another GPU", dtype="float16")])
    result = invoke("--list")
    assert result.exit_code == 0
    fc1 = f"fc1 {entry().choice.configs['fc1']}"
    for text in (NAME, "Another GPU", "768 x 3072", fc1, "2.00x", "1.50x", "0.25x", "PyTorch"):
        assert text in result.stdout
    assert f"4 entries in {cache}" in result.stdout


def test_clear_removes_this_gpus_entries(gpu):
    other = entry(device="Another GPU")
    tuning.store([entry(), other])
    result = invoke("--clear")
    assert (result.exit_code, result.stdout) == (0, f"removed 1 entries of {NAME}\n")
    assert tuning.read_entries() == {other.key: other}


def test_options_reach_the_tuner(gpu, monkeypatch):
    seen = []
    monkeypatch.setattr(tuning, "tune", lambda **options: seen.append(options) or [])
    assert invoke().exit_code == 0
    arguments = ["--width", 64, "--rows", 16, "--rows", 99, "--dtype", "float16", "--dtype", "float32"]
    assert invoke(*arguments, "--op", "multiway_ffn", "--experts", 3, "--all").exit_code == 0
    assert invoke("--width", 64, "--hidden", 100).exit_code == 0
    for options in seen:
        assert options.pop("device") == GPU
        options.pop("progress")(0.5, "half")
    assert seen[0] == {
        "ops": tuple(tuning.ROLES),
        "sizes": ((768, 3072), (1024, 4096)),
        "rows": tuning.ROWS,
        "dtypes": [torch.bfloat16],
        "num_experts": 2,
        "exhaustive": False,
    }
    assert seen[1] == {
        "ops": ("multiway_ffn",),
        "sizes": [(64, 256)],
        "rows": (16, 99),
        "dtypes": [torch.float16, torch.float32],
        "num_experts": 3,
        "exhaustive": True,
    }
    assert seen[2]["sizes"] == [(64, 100)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hidden", 64], "--hidden needs --width"),
        (["--op", "attention"], "ops must be among"),
        (["--rows", 0], "rows must be positive"),
        (["--experts", 0], "num_experts must be positive"),
    ],
)
def test_mistakes_are_one_line(arguments, message, gpu):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_file_that_cannot_be_written_is_said_first(gpu, cache, monkeypatch):
    cache.parent.write_text("a file where the folder should be")
    monkeypatch.setattr(tuning, "tune", lambda **_: pytest.fail("tuned for nothing"))
    result = invoke()
    assert result.exit_code == 2
    assert str(cache.parent) in result.stderr


@pytest.mark.parametrize(
    ("change", "code"), [({}, 0), ({"default_ms": None}, 1), (None, 1)], ids=["good", "default failed", "no entry"]
)
def test_exit_code_and_table(change, code, gpu, monkeypatch):
    found = None if change is None else dataclasses.replace(entry(), **change)
    outcomes = [tuning.Outcome(entry().key, found, ("fc1 16x64x32 w4 s2: [out] of memory",))]
    monkeypatch.setattr(tuning, "tune", lambda **_: outcomes)
    result = invoke()
    assert result.exit_code == code
    assert NAME in result.stdout
    assert ("2.00x" in result.stdout) == (found is not None)
    line = "skipped: multiway_ffn 768 x 3072, 2048 rows, bfloat16: fc1 16x64x32 w4 s2: [out] of memory\n"
    assert line in result.stdout
