"""State dicts: the released keys and shapes, interchangeable with the public models both ways."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm.utils
import torch
from oracles import public
from oracles.pairs import assert_close, build, fast_copy, pair, shared_state
from torch import nn

import beit3_fast.models as fast

ALL = [None, *public.HEADS]
QUERY = "beit3.encoder.layers.1.self_attn.q_proj.A.weight"
SIBLING = "beit3.encoder.layers.1.self_attn.q_proj.B.weight"


def assert_same_state(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(actual) == set(expected)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype, key
        assert torch.equal(actual[key], value), key


def logits(model: nn.Module, head: str = "vqav2") -> torch.Tensor:
    with torch.no_grad():
        return public.outputs(model, head, public.training_batch(head))["logits"]


# ------------------------------------------------------------------------------------------------ keys and exchange


@pytest.mark.parametrize("normalize_output", [True, False])
@pytest.mark.parametrize("head", ALL)
def test_keys_and_shapes(head: str | None, normalize_output: bool) -> None:
    args = public.config(head, normalize_output=normalize_output)
    expected = {key: value.shape for key, value in public.build(head, args).state_dict().items()}
    actual = {key: value.shape for key, value in build(head, args).state_dict().items()}
    assert actual == expected


@pytest.mark.parametrize("name", public.FACTORIES)
def test_keys_and_shapes_of_every_released_name(name: str) -> None:
    with torch.device("meta"):
        expected = getattr(public.modeling, name)().state_dict()
        actual = fast.create_model(name).state_dict()
    assert {key: value.shape for key, value in actual.items()} == {key: value.shape for key, value in expected.items()}
    assert callable(getattr(fast, name))


def test_the_released_names() -> None:
    assert set(fast.list_models()) >= set(public.FACTORIES)


@pytest.mark.parametrize("overrides", [{"drop_path_rate": 0.2}, {"vocab_size": 500}, {"checkpoint_activations": True}])
def test_factories_take_the_public_overrides(overrides: dict[str, object]) -> None:
    name = "beit3_base_patch16_224_retrieval"
    with torch.device("meta"):
        expected = getattr(public.modeling, name)(pretrained=False, **overrides).state_dict()
        for model in (getattr(fast, name)(pretrained=False, **overrides), fast.create_model(name, **overrides)):
            assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize("head", ALL)
def test_interchangeable_both_ways(head: str | None) -> None:
    reference = public.public_model(head, seed=1)
    ours = build(head, public.config(head))
    result = ours.load_state_dict(reference.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(ours.state_dict(), reference.state_dict())

    fresh = public.public_model(head, seed=2)
    result = fresh.load_state_dict(ours.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_state(fresh.state_dict(), reference.state_dict())


def test_loading_copies_the_values() -> None:
    state = shared_state(public.public_model("vqav2"))
    ours = build("vqav2", public.config("vqav2"))
    ours.load_state_dict(state)
    before = shared_state(ours)
    for value in state.values():
        value.zero_()
    assert_same_state(ours.state_dict(), before)


def test_loading_leaves_the_given_dict_alone() -> None:
    state = shared_state(public.public_model("vqav2"))
    before = dict(state)
    ours = build("vqav2", public.config("vqav2"))
    ours.load_state_dict(state)
    assert list(state) == list(before)
    assert all(state[key] is before[key] for key in before)


def test_loading_casts_to_the_parameters_dtype() -> None:
    """Released files are half precision."""
    reference = public.public_model("vqav2")
    half = {key: value.half() for key, value in reference.state_dict().items()}
    ours = build("vqav2", public.config("vqav2"))
    ours.load_state_dict(half, strict=True)
    assert_same_state(ours.state_dict(), {key: value.float() for key, value in half.items()})


def test_loading_from_a_file(tmp_path: Path) -> None:
    reference, ours = pair("vqav2")
    torch.save({"model": ours.state_dict()}, tmp_path / "ours.pth")
    state = torch.load(tmp_path / "ours.pth", weights_only=True)["model"]
    assert_same_state(state, reference.state_dict())
    reference.load_state_dict(state, strict=True)


def test_a_saved_state_is_no_bigger_than_its_parameters() -> None:
    """Keys that are views of one fused tensor must not each drag the whole of it into the file."""
    reference, ours = pair("retrieval")
    sizes = []
    for model in (reference, ours):
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        sizes.append(buffer.tell())
    assert sizes[1] < 1.2 * sizes[0]


def test_metadata_is_kept() -> None:
    _, ours = pair("vqav2")
    state = ours.state_dict()
    assert hasattr(state, "_metadata")
    ours.load_state_dict(state, strict=True)


def test_prefix() -> None:
    """As a part of a larger model, by `state_dict` of the whole and by the prefix argument."""
    reference, ours = pair("vqav2")

    class Whole(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.module = model

    expected = Whole(reference).state_dict()
    assert_same_state(Whole(ours).state_dict(), expected)
    assert_same_state(ours.state_dict(prefix="module."), expected)
    fresh = Whole(build("vqav2", public.config("vqav2")))
    fresh.load_state_dict(expected, strict=True)
    assert_same_state(fresh.module.state_dict(), reference.state_dict())


@pytest.mark.parametrize("part", ["beit3", "beit3.vision_embed", "beit3.text_embed"])
def test_state_dict_of_a_part(part: str) -> None:
    reference, ours = pair("vqav2")
    assert_same_state(ours.get_submodule(part).state_dict(), reference.get_submodule(part).state_dict())


def test_keep_vars() -> None:
    _, ours = pair("vqav2")
    assert not any(value.requires_grad for value in ours.state_dict().values())
    kept = ours.state_dict(keep_vars=True)
    assert set(kept) == set(ours.state_dict())
    assert all(value.requires_grad for value in kept.values())


# ----------------------------------------------------------------------------------------------- partial and broken


@pytest.mark.parametrize(
    "key",
    [
        QUERY,
        "beit3.encoder.layers.0.self_attn.v_proj.B.bias",
        "beit3.encoder.layers.2.ffn.A.ffn_layernorm.weight",
        "beit3.encoder.layers.0.self_attn.inner_attn_ln.B.bias",
        "beit3.encoder.embed_positions.B.weight",
        "beit3.vision_embed.proj.weight",
        "beit3.text_embed.weight",
        "beit3.vision_embed.cls_token",
        "pooler.norm.weight",
        "head.3.bias",
    ],
)
def test_a_missing_key_is_named_and_the_rest_loads(key: str) -> None:
    state = shared_state(public.public_model("vqav2", seed=1))
    _, ours = pair("vqav2", seed=2)
    before = shared_state(ours)
    value = state.pop(key)
    with pytest.raises(RuntimeError) as error:
        copy.deepcopy(ours).load_state_dict(state, strict=True)
    assert f'"{key}"' in str(error.value)
    assert "Missing key" in str(error.value)
    result = ours.load_state_dict(state, strict=False)
    assert result.missing_keys == [key]
    assert result.unexpected_keys == []
    assert_same_state(ours.state_dict(), {**state, key: before[key]})
    assert not torch.equal(value, before[key])


def test_a_whole_expert_may_be_missing() -> None:
    state = {key: v for key, v in public.public_model("vqav2", seed=1).state_dict().items() if ".B." not in key}
    _, ours = pair("vqav2", seed=2)
    before = shared_state(ours)
    result = ours.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == {key for key in before if ".B." in key}
    assert result.unexpected_keys == []
    assert_same_state(ours.state_dict(), {**before, **state})


def test_an_empty_state_dict_names_every_key() -> None:
    _, ours = pair("captioning")
    result = ours.load_state_dict({}, strict=False)
    assert sorted(result.missing_keys) == sorted(ours.state_dict())


@pytest.mark.parametrize(
    "key",
    [
        "mlm_head.weight",
        "beit3.encoder.layers.7.ffn.A.fc1.weight",
        "beit3.encoder.layers.1.self_attn.q_proj.C.weight",
        "beit3.encoder.layers.1.self_attn.q_proj.weight",
        "beit3.encoder.layers.1.ffn.A.fc3.weight",
        "beit3.encoder.relative_position.weight",
    ],
)
def test_an_unexpected_key_is_named(key: str) -> None:
    reference, ours = pair("vqav2")
    state = {**reference.state_dict(), key: torch.zeros(3)}
    with pytest.raises(RuntimeError) as error:
        ours.load_state_dict(state, strict=True)
    assert f'"{key}"' in str(error.value)
    assert "Unexpected key" in str(error.value)
    result = ours.load_state_dict(state, strict=False)
    assert result.missing_keys == []
    assert result.unexpected_keys == [key]


def test_our_own_parameter_names_are_unexpected_in_a_file() -> None:
    """The inner names are ours alone: a file that has them is not a released file."""
    _, ours = pair("vqav2")
    for key in sorted(set(dict(ours.named_parameters())) - set(ours.state_dict())):
        result = ours.load_state_dict({**ours.state_dict(), key: torch.zeros(1)}, strict=False)
        assert result.unexpected_keys == [key]


@pytest.mark.parametrize(
    "key",
    [
        QUERY,
        "beit3.encoder.layers.0.ffn.B.fc1.bias",
        "beit3.encoder.layer_norm.A.weight",
        "beit3.encoder.embed_positions.A.weight",
        "beit3.vision_embed.proj.weight",
        "mlm_head.weight",
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_misshapen_key_is_named_with_both_shapes(key: str, strict: bool) -> None:
    reference, ours = pair("captioning")
    state = dict(reference.state_dict())
    wanted = tuple(state[key].shape)
    state[key] = torch.zeros(wanted[0] + 1, *wanted[1:])
    with pytest.raises(RuntimeError) as error:
        ours.load_state_dict(state, strict=strict)
    message = str(error.value)
    assert "size mismatch" in message
    assert key in message
    for shape in (wanted, tuple(state[key].shape)):
        assert ", ".join(map(str, shape)) in message


def test_a_misshapen_key_is_not_broadcast() -> None:
    reference, ours = pair("captioning")
    state = dict(reference.state_dict())
    state[QUERY] = state[QUERY][:1]
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.load_state_dict(state)


def test_a_value_that_is_no_tensor_is_refused() -> None:
    reference, ours = pair("captioning")
    state = dict(reference.state_dict())
    state[QUERY] = [[1.0]]
    with pytest.raises(RuntimeError) as error:
        ours.load_state_dict(state)
    assert QUERY in str(error.value)


# ------------------------------------------------------------------------------------------- the public way of loading


def test_public_load_state_dict(capsys: pytest.CaptureFixture[str]) -> None:
    """It walks the modules and calls each one's `_load_from_state_dict`, bypassing `load_state_dict`."""
    reference = public.public_model("vqav2", seed=1)
    _, ours = pair("vqav2", seed=2)
    public.utils.load_state_dict(ours, reference.state_dict())
    assert_same_state(ours.state_dict(), reference.state_dict())
    assert capsys.readouterr().out == ""


def test_public_load_state_dict_reports(capsys: pytest.CaptureFixture[str]) -> None:
    """Missing, unexpected and misshapen keys come out under the released names, each once."""
    reference = public.public_model("vqav2", seed=1)
    state = dict(reference.state_dict())
    missing = state.pop(QUERY)
    state["beit3.mim_head.weight"] = torch.zeros(2)
    state[SIBLING] = torch.zeros(2, 2)
    reports = []
    for model in (public.public_model("vqav2", seed=2), pair("vqav2", seed=2)[1]):
        before = shared_state(model)
        public.utils.load_state_dict(model, state)
        reports.append(capsys.readouterr().out)
        after = model.state_dict()
        assert torch.equal(after[QUERY], before[QUERY])
        assert not torch.equal(after[QUERY], missing)
        assert torch.equal(after[SIBLING], before[SIBLING])
        assert torch.equal(after["head.0.weight"], state["head.0.weight"])
    expected, actual = reports
    assert f"not initialized from pretrained model: ['{QUERY}']" in expected
    assert f"not initialized from pretrained model: ['{QUERY}']" in actual
    assert "not used in BEiT3ForVisualQuestionAnswering: ['beit3.mim_head.weight']" in actual
    assert f"size mismatch for {SIBLING}" in expected
    assert SIBLING in actual
    assert "size mismatch" in actual


@pytest.mark.parametrize(("head", "image_size"), [("vqav2", 32), ("vqav2", 48), ("retrieval", 64)])
def test_public_load_model_and_may_interpolate(head: str, image_size: int, tmp_path: Path) -> None:
    saved = public.public_model(head, seed=1)
    path = str(tmp_path / "checkpoint.pth")
    torch.save({"model": saved.state_dict()}, path)
    models = pair(head, seed=2, img_size=image_size)
    for model in models:
        public.utils.load_model_and_may_interpolate(path, model, "model|module", "")
    assert_same_state(models[1].state_dict(), models[0].state_dict())


@pytest.mark.parametrize("num_classes", [7, 3])
def test_public_loading_drops_a_head_of_another_size(num_classes: int, tmp_path: Path) -> None:
    saved = public.public_model("imageclassification", seed=1)
    path = str(tmp_path / "checkpoint.pth")
    torch.save({"model": saved.state_dict()}, path)
    models = [
        cls(public.config("imageclassification"), num_classes=num_classes)
        for cls in (public.modeling.BEiT3ForImageClassification, fast.BEiT3ForImageClassification)
    ]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        public.utils.load_model_and_may_interpolate(path, model, "model|module", "")
    assert_same_state(models[1].state_dict(), models[0].state_dict())


# ---------------------------------------------------------------------------------------------- assign, copies, EMA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_assign(dtype: torch.dtype) -> None:
    reference = public.public_model("vqav2", seed=1).to(dtype)
    ours = build("vqav2", public.config("vqav2"))
    ours.load_state_dict(reference.state_dict(), strict=True, assign=True)
    assert_same_state(ours.state_dict(), reference.state_dict())
    assert all(isinstance(p, nn.Parameter) and p.requires_grad and p.dtype == dtype for p in ours.parameters())
    reference.float(), ours.float().eval()
    assert_close(logits(ours), logits(reference), "after assign")


def test_assign_onto_the_meta_device() -> None:
    reference = public.public_model("vqav2")
    with torch.device("meta"):
        ours = build("vqav2", public.config("vqav2"))
    ours.load_state_dict(reference.state_dict(), strict=True, assign=True)
    assert not any(parameter.is_meta for parameter in ours.parameters())
    assert_close(logits(ours.eval()), logits(reference), "from meta")


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, _pickled, _saved], ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("head", ALL)
def test_clones_are_equal_and_independent(head: str | None, clone: Callable[[nn.Module], nn.Module]) -> None:
    _, ours = pair(head)
    twin = clone(ours)
    expected = shared_state(ours)
    assert_same_state(twin.state_dict(), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not any(value.count_nonzero() for value in twin.state_dict().values())
    assert_same_state(ours.state_dict(), expected)
    twin.load_state_dict(expected, strict=True)
    if head == "vqav2":
        assert torch.equal(logits(twin), logits(ours))


def test_clone_of_a_model_that_has_run() -> None:
    _, ours = pair("vqav2")
    expected = logits(ours)
    assert torch.equal(logits(copy.deepcopy(ours)), expected)
    assert torch.equal(logits(_pickled(ours)), expected)


def test_writing_into_the_state_dict_writes_the_parameters() -> None:
    """`state_dict()` hands out references, in PyTorch; averaging of weights is built on that."""
    reference, ours = pair("vqav2")
    with torch.no_grad():
        for model in (reference, ours):
            for value in model.state_dict().values():
                value.mul_(1.25)
    assert_same_state(ours.state_dict(), reference.state_dict())
    assert_close(logits(ours), logits(reference), "after writing")


@pytest.mark.parametrize("average", [timm.utils.ModelEma, timm.utils.ModelEmaV2, timm.utils.ModelEmaV3])
def test_timm_weight_averaging(average: type) -> None:
    """ModelEma writes into `state_dict()`, V2 zips its values, V3 walks the parameters."""
    averages = []
    for model in pair("vqav2", seed=1):
        ema = average(model, decay=0.75)
        model.load_state_dict(public.public_model("vqav2", seed=2).state_dict())
        ema.update(model)
        averages.append((ema.ema if average is timm.utils.ModelEma else ema.module).eval())
    assert_same_state(averages[1].state_dict(), averages[0].state_dict())
    assert_close(logits(averages[1]), logits(averages[0]), "averaged weights")


def test_public_ema_resume() -> None:
    _, ours = pair("vqav2", seed=1)
    ema = timm.utils.ModelEma(ours)
    state = shared_state(public.public_model("vqav2", seed=2))
    public.utils._load_checkpoint_for_ema(ema, {"state_dict_ema": state})
    assert_same_state(ema.ema.state_dict(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_state_dict_follows_the_module_dtype(dtype: torch.dtype) -> None:
    reference, ours = pair("vqav2")
    assert_same_state(ours.to(dtype).state_dict(), reference.to(dtype).state_dict())


def test_loading_into_a_model_that_has_run_takes_effect() -> None:
    """Nothing derived from the old weights may survive a load."""
    reference, ours = pair("vqav2", seed=1)
    logits(ours)
    reference.load_state_dict(public.public_model("vqav2", seed=2).state_dict())
    ours.load_state_dict(reference.state_dict())
    assert_close(logits(ours), logits(reference), "after reload")


@pytest.mark.slow
def test_base_exchange(base_public_model: Callable[[str], nn.Module]) -> None:
    reference = base_public_model("retrieval")
    assert_same_state(fast_copy(reference, "retrieval").state_dict(), reference.state_dict())
