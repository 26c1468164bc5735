"""Released names, factories and configurations against the public ones, and the architecture of the paper."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import timm
import timm.models
import torch
from oracles import public
from oracles.pairs import assert_close
from torch import Tensor, nn

import beit3_fast
import beit3_fast.models as fast
from beit3_fast import EncoderConfig
from beit3_fast.models import registry

ALL = (*public.HEADS, "pretraining")
TINY: dict[str, Any] = {
    "encoder_layers": 3,
    "encoder_embed_dim": 48,
    "encoder_attention_heads": 4,
    "encoder_ffn_embed_dim": 96,
    "vocab_size": 200,
    "img_size": 32,
    "patch_size": 8,
    "max_source_positions": 64,
}


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Full-size models without memory; the slow public initialisation has no values to set."""
    monkeypatch.setattr(public.modeling.BEiT3Wrapper, "_init_weights", lambda *_: None)
    with torch.device("meta"):
        yield


def shapes(model: nn.Module) -> list[tuple[str, torch.Size, torch.dtype]]:
    """In the order of the state dict."""
    return [(key, value.shape, value.dtype) for key, value in model.state_dict().items()]


# ------------------------------------------------------------------------------------------------------ released names


@pytest.mark.parametrize("name", public.FACTORIES)
def test_every_released_name_is_the_public_model(name: str, on_meta: Any) -> None:
    expected = getattr(public.modeling, name)()
    actual = getattr(fast, name)()
    assert type(actual).__name__ == type(expected).__name__
    assert shapes(actual) == shapes(expected)
    assert sum(p.numel() for p in actual.parameters()) == sum(p.numel() for p in expected.parameters())
    assert actual.get_num_layers() == expected.get_num_layers()
    assert shapes(beit3_fast.create_model(name)) == shapes(expected)


def test_the_list_of_names() -> None:
    assert beit3_fast.list_models() == sorted(public.FACTORIES)
    assert fast.list_models is beit3_fast.list_models
    assert len(public.FACTORIES) == 15


# Published or derived counts: "276M" and "222M" are those of the released pretraining files.
@pytest.mark.parametrize(
    ("size", "head", "overrides", "parameters"),
    [
        ("base", "imageclassification", {}, 221_754_856),
        ("large", "imageclassification", {}, 673_725_416),
        ("base", "vqav2", {"img_size": 480}, 228_110_649),
        ("large", "vqav2", {"img_size": 768}, 684_423_225),
        ("base", "captioning", {"img_size": 480}, 270_751_754),
        ("base", "retrieval", {}, 222_167_041),
        ("large", "retrieval", {}, 674_799_617),
        ("base", "pretraining", {}, 276_510_730),
        ("large", "pretraining", {}, 746_709_514),
    ],
)
def test_published_parameter_counts(
    size: str, head: str, overrides: dict[str, Any], parameters: int, on_meta: Any
) -> None:
    assert sum(p.numel() for p in registry.build(size, head, **overrides).parameters()) == parameters


@pytest.mark.parametrize(
    "arguments",
    [
        {"drop_path_rate": 0.15},
        {"drop_path_rate": 0.2, "vocab_size": 100, "checkpoint_activations": True},
        {"checkpoint_activations": None, "mlp_ratio": 2.5},
        {"img_size": 112, "patch_size": 14},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["beit3_base_patch16_224_retrieval", "beit3_base_patch16_224_imageclassification"])
def test_factory_arguments(name: str, arguments: dict[str, Any], on_meta: Any) -> None:
    """Of the public factories, those at 224 pixels take an image size as well."""
    expected = getattr(public.modeling, name)(pretrained=False, **arguments)
    for actual in (getattr(fast, name)(pretrained=False, **arguments), beit3_fast.create_model(name, **arguments)):
        assert shapes(actual) == shapes(expected)
        for option in ("drop_path_rate", "img_size", "vocab_size", "normalize_output", "encoder_ffn_embed_dim"):
            assert getattr(actual.beit3.config, option) == getattr(expected.args, option)
        assert actual.beit3.encoder.checkpoint_activations == bool(expected.args.checkpoint_activations)
        rates = [
            [0.0 if layer.drop_path is None else layer.drop_path.drop_prob for layer in model.beit3.encoder.layers]
            for model in (actual, expected)
        ]
        assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize("name", public.FACTORIES)
def test_factory_metadata(name: str) -> None:
    factory = getattr(fast, name)
    assert factory.__name__ == name
    assert name in factory.__doc__


def test_through_timm(on_meta: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public training script asks timm for a model by name; timm adds options of its own, unset ones as None."""
    name = "beit3_base_patch16_224_retrieval"
    models = []
    for package in (public.modeling, fast):
        monkeypatch.setitem(timm.models._registry._model_entrypoints, name, getattr(package, name))
        options = {"drop_path_rate": 0.1, "vocab_size": 100, "checkpoint_activations": None, "num_classes": None}
        models.append(timm.create_model(name, pretrained=False, **options))
    expected, actual = models
    assert isinstance(expected, public.modeling.BEiT3ForRetrieval)
    assert isinstance(actual, fast.BEiT3ForRetrieval)
    assert shapes(actual) == shapes(expected)


def test_options_that_are_none(on_meta: Any) -> None:
    unset = {"pretrained_cfg": None, "pretrained_cfg_overlay": None, "cache_dir": None, "img_size": None}
    model = fast.beit3_base_patch16_224_retrieval(False, **unset, drop_path_rate=None, vocab_size=None)
    assert shapes(model) == shapes(fast.beit3_base_patch16_224_retrieval())


def test_weights_are_not_downloaded(on_meta: Any) -> None:
    """The flag changes nothing, as in the public code, whose users load a checkpoint next; here it is said."""
    for name in public.FACTORIES:
        with pytest.warns(UserWarning, match=rf"{name}\(pretrained=True\) has random weights.*load_model"):
            model = getattr(fast, name)(pretrained=True)
        assert shapes(model) == shapes(getattr(fast, name)())


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("beit3_base_patch16_224_retreival", "beit3_base_patch16_224_retrieval"),
        ("beit3_base_patch16_480_retrieval", "beit3_base_patch16_384_retrieval"),
        ("beit3_large_patch16_480_caption", "beit3_large_patch16_480_captioning"),
        ("beit3_base_patch16_224_vqa", "beit3_base_patch16_"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, suggestion: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.*did you mean.*{suggestion}"):
        beit3_fast.create_model(name)
    with pytest.raises(AttributeError, match=name):
        getattr(fast, name)


@pytest.mark.parametrize("name", ["resnet50", "", "BEIT3", None, 3])
def test_a_name_like_no_other(name: Any) -> None:
    with pytest.raises(ValueError, match="name must be a released model") as error:
        beit3_fast.create_model(name)
    assert repr(name) in str(error.value)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("drop_path", "drop_path_rate"),
        ("image_size", "img_size"),
        ("encoder_layer", "encoder_layers"),
        ("num_classes", "num_classes"),
        ("dropout", "dropout"),
        ("pretrained", "pretrained"),
    ],
)
def test_an_unknown_override_suggests_the_nearest(option: str, words: str) -> None:
    for create in (beit3_fast.create_model, lambda name, **kwargs: getattr(fast, name)(**kwargs)):
        if option == "pretrained" and create is not beit3_fast.create_model:
            continue
        with pytest.raises(TypeError, match=f"{option}.*retrieval.*{words if words != option else ''}"):
            create("beit3_base_patch16_224_retrieval", **{option: 1})


@pytest.mark.parametrize("name", ["imageclassification", "nlvr2", "vqav2"])
def test_number_of_classes(name: str, on_meta: Any) -> None:
    model = registry.build("base", name, num_classes=13)
    reference = public.CLASSES[name](public.modeling._get_base_config(), num_classes=13)
    outside = {key: shape for key, shape, _ in shapes(model) if not key.startswith("beit3.")}
    assert outside == {key: shape for key, shape, _ in shapes(reference) if not key.startswith("beit3.")}


# ------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"encoder_embed_dim": 0}, "encoder_embed_dim must be a positive int, got 0"),
        ({"encoder_embed_dim": -768}, "encoder_embed_dim.*-768"),
        ({"encoder_embed_dim": 768.0}, "encoder_embed_dim.*768.0"),
        ({"encoder_embed_dim": "768"}, "encoder_embed_dim.*'768'"),
        ({"encoder_embed_dim": None}, "encoder_embed_dim.*None"),
        ({"encoder_embed_dim": 770}, "encoder_embed_dim.*encoder_attention_heads.*770 and 12"),
        ({"encoder_attention_heads": 0}, "encoder_attention_heads.*0"),
        ({"encoder_attention_heads": 7}, "encoder_attention_heads.*7"),
        ({"encoder_ffn_embed_dim": 0}, "encoder_ffn_embed_dim.*0"),
        ({"encoder_layers": 0}, "encoder_layers.*0"),
        ({"encoder_layers": 2.5}, "encoder_layers.*2.5"),
        ({"vocab_size": 0}, "vocab_size.*0"),
        ({"vocab_size": -1}, "vocab_size.*-1"),  # torchscale's default
        ({"img_size": 0}, "img_size.*0"),
        ({"img_size": 225}, "img_size must be a multiple of patch_size.*225"),
        ({"img_size": (224, 224)}, r"img_size.*\(224, 224\)"),
        ({"img_size": 8}, "img_size.*8"),
        ({"patch_size": 0}, "patch_size.*0"),
        ({"in_chans": 0}, "in_chans.*0"),
        ({"max_source_positions": 2}, "max_source_positions.*2"),
        ({"max_source_positions": 10.5}, "max_source_positions.*10.5"),
        ({"max_source_positions": "64"}, "max_source_positions.*'64'"),
        ({"drop_path_rate": -0.1}, "drop_path_rate.*-0.1"),
        ({"drop_path_rate": 1.0}, "drop_path_rate.*1.0"),
        ({"drop_path_rate": math.nan}, "drop_path_rate.*nan"),
        ({"drop_path_rate": "0.1"}, "drop_path_rate.*'0.1'"),
        ({"drop_path_rate": None}, "drop_path_rate.*None"),
        ({"layernorm_eps": -1e-5}, "layernorm_eps.*-1e-05"),
        ({"layernorm_eps": None}, "layernorm_eps.*None"),
        ({"vl_ffn_layers": -1}, "vl_ffn_layers.*-1"),
        ({"vl_ffn_layers": 13}, r"vl_ffn_layers.*\[0, 12\].*13"),
        ({"vl_ffn_layers": 1.5}, "vl_ffn_layers.*1.5"),
        ({"encoder_layers": 3, "vl_ffn_layers": 4}, r"vl_ffn_layers.*\[0, 3\].*4"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        EncoderConfig(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"encoder_layers": 1},
        {"img_size": 16},
        {"max_source_positions": 3},
        {"drop_path_rate": 0},
        {"drop_path_rate": 0.999},
        {"vl_ffn_layers": 12},
        {"checkpoint_activations": None},
        {"encoder_embed_dim": 12, "encoder_ffn_embed_dim": 1},
    ],
    ids=str,
)
def test_configurations_at_the_border(options: dict[str, Any]) -> None:
    config = EncoderConfig(**options)
    assert all(getattr(config, name) == value for name, value in options.items())


def test_the_defaults_are_the_public_base() -> None:
    reference = vars(public.modeling._get_base_config())
    config = EncoderConfig()
    assert config == EncoderConfig.base()
    for name, value in vars(config).items():
        if name in reference:
            assert value == reference[name] or (name == "checkpoint_activations" and not value and not reference[name])
    assert EncoderConfig.large(img_size=480) == EncoderConfig.from_args(
        public.modeling._get_large_config(img_size=480, checkpoint_activations=False)
    )


def scale_config(**options: Any) -> public.EncoderConfig:
    """torchscale's, as the public factories make it."""
    return public.EncoderConfig(
        **{"multiway": True, "no_output_layer": True, "vocab_size": 64010, "layernorm_embedding": False, **options}
    )


def test_from_torchscale_arguments() -> None:
    options = {
        "encoder_embed_dim": 96,
        "encoder_attention_heads": 6,
        "encoder_ffn_embed_dim": 100,
        "encoder_layers": 5,
        "normalize_output": False,
        "drop_path_rate": 0.2,
        "max_source_positions": 77,
        "layernorm_eps": 1e-6,
        "vocab_size": 123,
        "img_size": 64,
        "patch_size": 8,
        "in_chans": 1,
        "checkpoint_activations": True,
    }
    config = EncoderConfig.from_args(scale_config(**options))
    assert config == EncoderConfig(**options)
    assert EncoderConfig.from_args(config) is config
    assert EncoderConfig.from_args(copy.deepcopy(config)) == config


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"deepnorm": True}, "deepnorm|subln|encoder_normalize_before"),
        ({"deepnorm": True, "subln": False}, "deepnorm|subln|encoder_normalize_before"),
        ({"subln": False}, "subln"),
        ({"moe_freq": 2}, "moe_freq"),
        ({"moe_freq": 2, "moe_expert_count": 4, "use_xmoe": True}, "moe_freq"),
        ({"xpos_rel_pos": True}, "xpos_rel_pos"),
        ({"rel_pos_buckets": 32}, "rel_pos_buckets"),
        ({"max_rel_pos": 128}, "max_rel_pos"),
        ({"dropout": 0.1}, "dropout"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"activation_dropout": 0.1}, "activation_dropout"),
        ({"activation_fn": "relu"}, "activation_fn"),
        ({"multiway": False}, "multiway"),
        ({"layernorm_embedding": True}, "layernorm_embedding"),
        ({"no_scale_embedding": False}, "no_scale_embedding"),
        ({"share_encoder_input_output_embed": True}, "share_encoder_input_output_embed"),
        ({"bert_init": True}, "bert_init"),
        ({"fsdp": True}, "fsdp"),
        ({"no_output_layer": False}, "no_output_layer"),  # torchscale's default: a projection to the vocabulary
        ({"vocab_size": -1}, "vocab_size"),
        ({"img_size": 225}, "img_size"),
    ],
    ids=str,
)
def test_torchscale_arguments_that_are_refused(options: dict[str, Any], words: str) -> None:
    args = scale_config(**options)
    with pytest.raises(ValueError, match=words):
        EncoderConfig.from_args(args)
    for model in (fast.BEiT3, fast.BEiT3ForRetrieval):
        with pytest.raises(ValueError, match=words):
            model(args)


@pytest.mark.parametrize(
    "options",
    [
        {"xpos_scale_base": 1024},
        {"ddp_rank": 3},
        {"moe_top1_expert": True, "moe_expert_count": 4, "moe_gating_use_fp32": False},
        {"moe_second_expert_policy": "all", "moe_eval_capacity_token_fraction": -1},
    ],
    ids=str,
)
def test_torchscale_arguments_that_are_accepted_change_nothing(options: dict[str, Any]) -> None:
    """An option that is not refused must not have an effect in the public code either."""
    args = scale_config(**{**TINY, **options})
    model, reference = fast.BEiT3(args), public.randomise(public.BEiT3(args))
    assert shapes(model) == shapes(reference)
    model.load_state_dict(reference.state_dict())
    tokens = torch.arange(3, 9).view(2, 3)
    actual, expected = (m.eval()(textual_tokens=tokens)["encoder_out"] for m in (model, reference))
    assert_close(actual, expected, "encoder_out")


@pytest.mark.parametrize(
    "args", [None, 3, "base", {"encoder_embed_dim": 768}, nn.Linear], ids=lambda args: type(args).__name__
)
def test_arguments_that_are_no_configuration(args: Any) -> None:
    with pytest.raises(TypeError, match=f"EncoderConfig.*{type(args).__name__}"):
        EncoderConfig.from_args(args)
    with pytest.raises(TypeError, match="EncoderConfig"):
        fast.BEiT3ForCaptioning(args)


def test_unknown_options() -> None:
    with pytest.raises(TypeError, match=r"encoder_layer.*did you mean encoder_layers"):
        EncoderConfig(encoder_layer=3)
    with pytest.raises(TypeError, match="drop_path"):
        EncoderConfig.base(drop_path=0.1)
    assert EncoderConfig(multiway=True, dropout=0.0, encoder_layers=3) == EncoderConfig(encoder_layers=3)
    assert EncoderConfig.base(multiway=True, layernorm_embedding=False, no_output_layer=True) == EncoderConfig()


# ------------------------------------------------------------------------------------------- the paper's architecture


def test_giant(on_meta: Any) -> None:
    """The parts of the 1.9 B model as the paper gives them: matrices of V-FFN, L-FFN, VL-FFN and shared attention."""
    config = EncoderConfig.giant()
    assert (config.encoder_layers, config.encoder_embed_dim, config.encoder_attention_heads) == (40, 1408, 16)
    assert (config.encoder_ffn_embed_dim, config.patch_size, config.img_size) == (6144, 14, 224)
    assert config.shared_attention
    assert config.vl_ffn_layers == 3
    state = fast.BEiT3(config).state_dict()
    parts = {
        part: sum(value.numel() for key, value in state.items() if f".{part}" in key and value.ndim == 2)
        for part in ("ffn.A.", "ffn.B.", "ffn.VL.", "self_attn.")
    }
    millions = {part: round(count / 1e6) for part, count in parts.items()}
    assert millions == {"ffn.A.": 692, "ffn.B.": 692, "ffn.VL.": 52, "self_attn.": 317}
    layers = sum(value.numel() for key, value in state.items() if ".layers." in key)
    assert sum(parts.values()) < layers < 1.002 * sum(parts.values())
    assert not any(".VL." in key for key in state if any(f"layers.{depth}." in key for depth in range(37)))
    assert all(f"beit3.encoder.layers.{depth}.ffn.VL.fc1.weight"[6:] in state for depth in (37, 38, 39))


def paper_model(**overrides: Any) -> fast.BEiT3:
    """A backbone of the paper's architecture, every parameter random."""
    config = EncoderConfig(**{**TINY, "shared_attention": True, "vl_ffn_layers": 2, **overrides})
    model = fast.BEiT3(config).eval()
    generator = torch.Generator().manual_seed(0)
    for key, value in model.state_dict().items():
        value.normal_(0.0, 0.2, generator=generator)
        if ("norm" in key and key.endswith("weight")) or key.endswith("_ln.weight"):
            value.add_(1.0)
    return model


MODES = {"image": (True, False), "text": (False, True), "image and text": (True, True)}


def encode(model: nn.Module, mode: str, padding: bool = True) -> Tensor:
    data = public.inputs(batch=2, text_len=5, padding="padded" if padding else "none")
    image, text = MODES[mode]
    out = model(
        visual_tokens=data["image"] if image else None,
        textual_tokens=data["tokens"] if text else None,
        text_padding_position=data["mask"] if text else None,
    )["encoder_out"].clone()
    if text and padding:
        columns = [17 if image else 0] * 2
        for row, (column, length) in enumerate(zip(columns, data["lengths"], strict=True)):
            out[row, column + length :] = 0.0  # nothing depends on padded columns
    return out


def public_twin(model: fast.BEiT3, mode: str) -> nn.Module:
    """The public model that does the same on this kind of input: its two experts are tied where ours are one."""
    config = model.config
    ours = model.state_dict()
    reference = public.BEiT3(scale_config(**TINY)).eval()
    state = {}
    for key in reference.state_dict():
        shared = key.replace(".A.", ".").replace(".B.", ".")
        fused = key.replace(".A.", ".VL.").replace(".B.", ".VL.")
        if config.shared_attention and "self_attn" in key:
            state[key] = ours[shared]
        elif mode == "image and text" and fused != key and fused in ours:
            state[key] = ours[fused]
        else:
            state[key] = ours[key]
    reference.load_state_dict(state, strict=True)
    return reference


@pytest.mark.parametrize(
    "overrides", [{}, {"vl_ffn_layers": 0}, {"shared_attention": False}, {"vl_ffn_layers": 3}], ids=str
)
@pytest.mark.parametrize("padding", [True, False])
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_paper_is_a_public_model_with_tied_experts(mode: str, padding: bool, overrides: dict[str, Any]) -> None:
    model = paper_model(**overrides)
    assert_close(encode(model, mode, padding), encode(public_twin(model, mode), mode, padding), mode)


# (a parameter of the top layer, the inputs that it takes part in)
PARTS = {
    "ffn.A.fc1.weight": {"image"},
    "ffn.A.ffn_layernorm.bias": {"image"},
    "final_layer_norm.A.weight": {"image"},
    "ffn.B.fc2.weight": {"text"},
    "final_layer_norm.B.bias": {"text"},
    "ffn.VL.fc1.weight": {"image and text"},
    "ffn.VL.ffn_layernorm.weight": {"image and text"},
    "final_layer_norm.VL.weight": {"image and text"},
    "self_attn.q_proj.weight": set(MODES),
    "self_attn.out_proj.bias": set(MODES),
    "self_attn.inner_attn_ln.weight": set(MODES),
    "self_attn_layer_norm.bias": set(MODES),
}
BELOW = {"ffn.A.fc1.weight": {"image", "image and text"}, "ffn.B.fc2.weight": {"text", "image and text"}}


@pytest.mark.parametrize(
    ("key", "modes"),
    [(f"encoder.layers.{depth}.{key}", modes) for depth in (1, 2) for key, modes in PARTS.items()]
    + [(f"encoder.layers.0.{key}", modes) for key, modes in BELOW.items()],
)
def test_which_part_serves_which_input(key: str, modes: set[str]) -> None:
    """By changing it, and by its gradient."""
    model = paper_model()
    for mode in MODES:
        model.zero_grad()
        out = encode(model, mode)
        (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
        gradient = fast.released_gradients(model)[key]
        assert (gradient is not None and bool(gradient.any())) == (mode in modes), mode
        with torch.no_grad():
            changed = copy.deepcopy(model)
            changed.state_dict()[key].add_(torch.randn(model.state_dict()[key].shape))
            difference = (encode(changed, mode) - encode(model, mode)).abs().max()
        assert difference > 1e-2 if mode in modes else difference == 0, mode


def test_shared_attention_is_one_set_of_weights() -> None:
    tied, separate = paper_model().state_dict(), paper_model(shared_attention=False).state_dict()
    assert not any(".self_attn" in key and (".A." in key or ".B." in key) for key in tied)
    count = {
        name: sum(v.numel() for k, v in state.items() if "self_attn" in k)
        for name, state in (("tied", tied), ("separate", separate))
    }
    assert count["separate"] == 2 * count["tied"]
    assert {key.replace(".self_attn", "") for key in tied if "ffn" in key} == {key for key in separate if "ffn" in key}
    assert sum("layers.2.self_attn" in key for key in tied) == 12  # q, k, v, out and two LayerNorms


@pytest.mark.parametrize("head", ["retrieval", "vqav2", "captioning", "pretraining"])
def test_every_head_runs_on_the_paper_architecture(head: str) -> None:
    model = registry.build("giant", head, **{**TINY, "vl_ffn_layers": 1}).train()
    data = public.inputs(batch=2)
    if head == "retrieval":
        loss = model(data["image"], data["tokens"], data["mask"])[0]
    elif head == "vqav2":
        loss = model(data["image"], data["tokens"], data["mask"]).sum()
    elif head == "captioning":
        loss = model(data["image"], data["tokens"], data["mask"], None)[0].sum()
    else:
        loss = sum(out.sum() for out in model(data["image"], data["tokens"], data["mask"]))
    loss.backward()
    used = {key for key, grad in fast.released_gradients(model).items() if grad is not None and grad.any()}
    top = "beit3.encoder.layers.2.ffn"
    assert (f"{top}.VL.fc1.weight" in used) == (head != "retrieval")
    assert (f"{top}.A.fc1.weight" in used) == (f"{top}.B.fc1.weight" in used) == (head == "retrieval")


# -------------------------------------------------------------------------------------------------------- released keys


@pytest.mark.parametrize("overrides", [{}, {"shared_attention": True, "vl_ffn_layers": 1}], ids=["released", "paper"])
@pytest.mark.parametrize("head", ALL)
def test_released_names_cover_every_key_once(head: str, overrides: dict[str, Any]) -> None:
    model = registry.build("base", head, **TINY, **overrides)
    names, state = fast.released_names(model), model.state_dict()
    parameters = dict(model.named_parameters())
    assert list(names) == list(parameters)
    assert sorted(key for keys in names.values() for key in keys) == sorted(state)
    for name, keys in names.items():  # and lie in the parameter one after another
        together = torch.cat([state[key].flatten() for key in keys])
        assert torch.equal(together, parameters[name].detach().flatten()), name


@pytest.mark.parametrize("overrides", [{}, {"shared_attention": True, "vl_ffn_layers": 1}], ids=["released", "paper"])
@pytest.mark.parametrize("head", ALL)
def test_released_gradients_cover_every_key_once(head: str, overrides: dict[str, Any]) -> None:
    model = registry.build("base", head, **TINY, **overrides)
    state = model.state_dict()
    assert set(fast.released_gradients(model)) == set(state)
    assert all(gradient is None for gradient in fast.released_gradients(model).values())
    for parameter in model.parameters():  # a gradient that tells which key it belongs to
        parameter.grad = parameter.detach().clone().add_(torch.arange(parameter.numel()).view(parameter.shape))
        parameter.data.copy_(parameter.grad)
    gradients = fast.released_gradients(model)
    assert set(gradients) == set(state)
    for key, value in model.state_dict().items():
        assert torch.equal(gradients[key], value), key
    for gradient in gradients.values():  # views: clipping or scaling them reaches the parameters
        gradient.zero_()
    assert not any(p.grad.any() for p in model.parameters())
