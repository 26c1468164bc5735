"""The JSON of every kind of run against ``bench/schema.json``, and that the schema lets nothing else through."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from beit3_fast.bench import command, model, op_cases, training
from beit3_fast.bench import ops as op_bench
from beit3_fast.bench.cases import ModelCase
from beit3_fast.bench.op_providers import OURS, REFERENCE
from beit3_fast.bench.roofs import Roofs
from beit3_fast.bench.timing import wall_clock

from beit3_fast.models import EncoderConfig

jsonschema = pytest.importorskip("jsonschema", reason="jsonschema is not installed: pip install 'beit3_fast[test]'")

SCHEMA = json.loads(Path(command.__file__).with_name("schema.json").read_text(encoding="utf-8"))
KINDS = ("model", "ops", "scaling", "breakdown", "memory", "all")
TOY = {
    "encoder_embed_dim": 64,
    "encoder_attention_heads": 4,
    "encoder_ffn_embed_dim": 128,
    "encoder_layers": 1,
    "vocab_size": 100,
}
JOINT = ModelCase("toy-joint", "base", 2, 32, 10, (4, 10))
MODEL_CASES = [JOINT, replace(JOINT, name="toy-training", task="training"), replace(JOINT, text_tokens=None)]
TINY = op_cases.Batch("tiny", 2, 5, (3, 1), 4)
OP_CASES = [
    op_cases.OpCase(op_cases.Shape("norm", "layer_norm", width=64), TINY),
    op_cases.OpCase(op_cases.Shape("attention", "attention", width=64, heads=4), TINY, torch.bfloat16, True),
]


VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def check(document):
    """By its kind's part of the schema, whose messages name the field."""
    jsonschema.Draft202012Validator({**SCHEMA, "oneOf": [{"$ref": f"#/$defs/{document['kind']}"}]}).validate(document)
    VALIDATOR.validate(document)


def shortened(value):
    """The document with one entry in each list, the last one."""
    if isinstance(value, dict):
        return {name: inner if name == "rounds" else shortened(inner) for name, inner in value.items()}
    return [shortened(value[-1])] if isinstance(value, list) and value else value


def warm(device):
    clock = wall_clock()

    def measure(call):
        call.ready()
        return clock(call)

    return measure


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Every kind's document of one ``bench all``, on toys, and that of the whole."""
    target = tmp_path_factory.mktemp("schema") / "all.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "_config", lambda case: EncoderConfig(**TOY, img_size=case.image_size or 32))
        patch.setattr(training, "memory", lambda *arguments: training.Memory(peak=2, held=1))
        patch.setattr(command, "select", lambda names, **options: MODEL_CASES)
        patch.setattr(command, "select_op_cases", lambda names, ops, quick: OP_CASES)
        patch.setattr(command, "measure_roofs", lambda device, dtypes: Roofs(1e9, dict.fromkeys(dtypes, 1e12)))
        patch.setattr(op_bench, "cold", warm)
        assert command.run(command.everything, quick=True, device="cpu", json_file=target)
    whole = json.loads(target.read_text())
    return {run["kind"]: run for run in whole["runs"]} | {"all": whole}


def of_kind(documents, kind):
    if kind == "memory" and find_spec("triton") is None:
        pytest.skip("bench memory needs triton")
    return documents[kind]


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert [entry["$ref"] for entry in SCHEMA["oneOf"]] == [f"#/$defs/{kind}" for kind in KINDS]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_fits(kind, documents):
    check(of_kind(documents, kind))


def objects(value):
    """Every object in a document whose names are fields, not data."""
    if isinstance(value, dict):
        yield value
        for name, inner in value.items():
            if name not in ("matrix_gflop_s", "peak_gflop_s", "memory_gb_s", "exponents", "errors"):
                yield from objects(inner)
    elif isinstance(value, list) and value:
        yield from objects(value[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_more_or_less_does_not_fit(kind, documents):
    document = shortened(of_kind(documents, kind))
    found = list(objects(document))
    assert len(found) > 3
    optional = {"bandwidth_gb_s", "peak_gflop_s", "memory_gb_s", "probe"}  # of roofs: not every kind has them
    for part in found:
        part["a field nobody knows"] = 1
        assert not VALIDATOR.is_valid(document)
        del part["a field nobody knows"]
        for name in sorted(set(part) - optional):
            value = part.pop(name)
            assert not VALIDATOR.is_valid(document), f"{name} is not required"
            part[name] = value
    check(document)


@pytest.mark.parametrize("kind", KINDS)
def test_another_version_or_kind_does_not_fit(kind, documents):
    document = of_kind(documents, kind)
    assert not VALIDATOR.is_valid(document | {"schema": 2})
    assert not VALIDATOR.is_valid(document | {"kind": "another"})


def test_values_of_a_wrong_type_do_not_fit(documents):
    for name, value in (("parity", "maybe"), ("time_ms", {"median": 1}), ("missing", 3), ("roof", "fast")):
        document = copy.deepcopy(documents["model"])
        document["results"][0]["providers"][0][name] = value
        assert not VALIDATOR.is_valid(document), name


@pytest.mark.parametrize("trouble", ["wrong", "raises", "no memory", "interrupted"])
def test_what_went_wrong_fits(trouble, tmp_path, monkeypatch):
    def build(case, layout):
        def compute(**tensors):
            if trouble == "raises":
                raise RuntimeError("no such kernel")
            return REFERENCE.builds[case.op](case, layout)(**tensors) * float("nan")

        return compute

    bad = replace(OURS, builds=dict.fromkeys(OURS.builds, build))
    target = tmp_path / "ops.json"
    monkeypatch.setattr(command, "select_op_cases", lambda names, ops, quick: OP_CASES[:1])
    monkeypatch.setattr(command, "select_providers", lambda names, quick: [REFERENCE, bad])
    monkeypatch.setattr(command, "measure_roofs", lambda device, dtypes: Roofs(1e9, dict.fromkeys(dtypes, 1e12)))
    monkeypatch.setattr(op_bench, "cold", warm)
    if trouble == "no memory":
        monkeypatch.setattr(op_bench, "free_memory", lambda device: 1)
    if trouble == "interrupted":
        monkeypatch.setattr(op_bench, "run_case", lambda *arguments, **options: exec("raise KeyboardInterrupt"))
        with pytest.raises(KeyboardInterrupt):
            command.run(command.ops, device="cpu", json_file=target)
    else:
        assert command.run(command.ops, device="cpu", json_file=target) == (trouble == "no memory")
    document = json.loads(target.read_text())
    check(document)
    if trouble in ("wrong", "raises"):
        ours = document["results"][0]["providers"][1]
        assert ours["time_ms"] is None
        assert (ours["parity"], bool(ours["failure"])) == (("failed", False) if trouble == "wrong" else (None, True))
