"""Outputs, losses and every gradient against the public models, fp32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import public
from oracles.pairs import assert_close, assert_gradients_close, assert_outputs_close, fast_copy, pair

import beit3_fast.models as fast

# NLVR2's public forward concatenates the mask with itself and so cannot do without one.
CASES = [
    (head, padding)
    for head in public.HEADS
    for padding in ("padded", "unpadded", "none")
    if not (head == "imageclassification" and padding != "none") and not (head == "nlvr2" and padding == "none")
]
# Four pairs: with two, the contrastive gradients of the last biases all but cancel and are rounding noise in both.
BASE = {"image_size": 96, "vocab_size": 1000, "batch": 4, "text_len": 14}


def check_training(reference: torch.nn.Module, ours: torch.nn.Module, head: str, batch: dict[str, Any]) -> None:
    """One backward pass of the public handler's loss on both."""
    handler = public.handler(head)
    losses = []
    for model in (reference, ours):
        model.zero_grad(set_to_none=True)
        loss = handler.train_batch(model, **batch)["loss"]
        loss.backward()
        losses.append(loss.detach())
    assert_close(losses[1], losses[0], f"{head} loss")
    assert_gradients_close(ours, reference)


@pytest.mark.parametrize(("head", "padding"), CASES)
def test_outputs_tiny(head: str, padding: str) -> None:
    reference, ours = pair(head)
    batch = public.training_batch(head, padding=padding)
    with torch.no_grad():
        assert_outputs_close(public.outputs(ours, head, batch), public.outputs(reference, head, batch), head)


@pytest.mark.parametrize(("head", "padding"), CASES)
def test_loss_and_gradients_tiny(head: str, padding: str) -> None:
    reference, ours = pair(head)
    reference.train(), ours.train()
    check_training(reference, ours, head, public.training_batch(head, padding=padding))


@pytest.mark.slow
@pytest.mark.parametrize("head", public.HEADS)
def test_base(head: str, base_public_model: Any) -> None:
    reference = base_public_model(head)
    ours = fast_copy(reference, head)
    with torch.no_grad():
        for padding in ("padded", "unpadded"):
            batch = public.training_batch(head, padding=padding, **BASE)
            assert_outputs_close(public.outputs(ours, head, batch), public.outputs(reference, head, batch), head)
    try:
        check_training(reference, ours, head, public.training_batch(head, padding="padded", **BASE))
    finally:
        reference.zero_grad(set_to_none=True)


@pytest.mark.parametrize("head", ["imageclassification", "retrieval"])
def test_experts_of_an_absent_modality_get_no_gradient(head: str) -> None:
    """An image-only pass leaves every text parameter without gradient, as in the public model."""
    reference, ours = pair(head)
    image = public.inputs()["image"]
    for model in (reference, ours):
        output = model(image=image) if head == "imageclassification" else model(image=image, only_infer=True)[0]
        output.square().sum().backward()
    expected = public.gradients(reference)
    absent = [key for key, grad in expected.items() if grad is None]
    assert any(".B." in key for key in absent)
    assert "beit3.text_embed.weight" in absent
    actual = fast.released_gradients(ours)
    for key in absent:
        assert actual[key] is None or not actual[key].count_nonzero(), key


# ------------------------------------------------------------------------------------------------------- retrieval


@pytest.mark.parametrize("padding", ["padded", "unpadded", "none"])
def test_retrieval_one_modality(padding: str) -> None:
    reference, ours = pair("retrieval")
    data = public.inputs(padding=padding)
    with torch.no_grad():
        vision, language = ours(image=data["image"], only_infer=True)
        assert language is None
        assert_close(vision, reference(image=data["image"], only_infer=True)[0], "vision")
        text = {"text_description": data["tokens"], "padding_mask": data["mask"], "only_infer": True}
        vision, language = ours(**text)
        assert vision is None
        assert_close(language, reference(**text)[1], "language")
        both = ours(image=data["image"], **text)
    assert isinstance(both, tuple)
    assert len(both) == 2


def test_retrieval_positional_arguments() -> None:
    reference, ours = pair("retrieval")
    data = public.inputs()
    arguments = (data["image"], data["tokens"], data["mask"])
    with torch.no_grad():
        for actual, expected in zip(ours(*arguments), reference(*arguments), strict=True):
            assert_close(actual, expected, "retrieval")


def test_retrieval_criterion_is_callable_on_its_own() -> None:
    """The public engine and its users reach for `model.criterion` and `model.logit_scale`."""
    reference, ours = pair("retrieval")
    features = torch.nn.functional.normalize(torch.randn(2, 4, 48), dim=-1)
    with torch.no_grad():
        expected = reference.criterion(*features, reference.logit_scale.exp())
        actual = ours.criterion(*features, ours.logit_scale.exp())
    for name, left, right in zip(("loss", "per_image", "per_text"), actual, expected, strict=True):
        assert_close(left, right, name)


def test_unknown_keyword_arguments_are_ignored_as_in_public() -> None:
    """The public captioning handler passes image_id, which no forward reads."""
    for head in public.HEADS:
        _, ours = pair(head)
        batch = public.training_batch(head)
        batch.pop("global_step", None)
        names = {
            "imageclassification": {"image": "image"},
            "nlvr2": {
                "image_a": "image",
                "image_b": "image2",
                "text_description": "language_tokens",
                "padding_mask": "padding_mask",
            },
            "vqav2": {"image": "image", "question": "language_tokens", "padding_mask": "padding_mask"},
            "captioning": {
                "image": "image",
                "text_ids": "masked_tokens",
                "padding_mask": "padding_mask",
                "language_masked_pos": "language_masked_pos",
            },
            "retrieval": {"image": "image", "text_description": "language_tokens", "padding_mask": "padding_mask"},
        }[head]
        arguments = {name: batch[key] for name, key in names.items()}
        with torch.no_grad():
            plain = ours(**arguments)
            extra = ours(**arguments, image_id=torch.arange(3))
        first = (plain[0], extra[0]) if isinstance(plain, tuple) else (plain, extra)
        assert torch.equal(*first)


# -------------------------------------------------------------------------------------------------------- backbone


def backbone_inputs(data: dict[str, Any], mode: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    if mode != "image":
        arguments |= {"textual_tokens": data["tokens"], "text_padding_position": data["mask"]}
    if mode != "text":
        arguments["visual_tokens"] = data["image"]
    return arguments


def valid_rows(data: dict[str, Any], mode: str, vision_len: int) -> torch.Tensor:
    """(B, S) bool: the rows of `encoder_out` that mean something."""
    batch, text_len = data["tokens"].shape
    vision = torch.ones(batch, vision_len if mode != "text" else 0, dtype=torch.bool)
    text = torch.arange(text_len)[None, :] < torch.tensor(data["lengths"])[:, None]
    return vision if mode == "image" else torch.cat([vision, text], dim=1)


def check_backbone(
    reference: torch.nn.Module, ours: torch.nn.Module, data: dict[str, Any], mode: str, **extra: Any
) -> dict[str, Any]:
    arguments = backbone_inputs(data, mode) | extra
    with torch.no_grad():
        expected, actual = reference(**arguments), ours(**arguments)
    assert set(actual) >= set(expected)
    assert actual["multiway_split_position"] == expected["multiway_split_position"]
    assert len(actual["l_aux"]) == len(expected["l_aux"])
    assert not any(actual["l_aux"])
    assert actual["encoder_states"] == expected["encoder_states"] == []
    rows = valid_rows(data, mode, reference.vision_embed.num_position_embeddings())
    for key in ("encoder_out", "encoder_embedding"):
        assert actual[key].shape == expected[key].shape
        assert_close(actual[key][rows], expected[key][rows], f"{mode} {key}")
    assert not actual["encoder_out"][~rows].count_nonzero(), "padded rows of encoder_out are zeros"
    assert torch.equal(actual["encoder_padding_mask"].bool(), expected["encoder_padding_mask"].bool())
    return actual


@pytest.mark.parametrize("normalize_output", [True, False])
@pytest.mark.parametrize("padding", ["padded", "unpadded", "none"])
@pytest.mark.parametrize("mode", ["joint", "image", "text"])
def test_backbone(mode: str, padding: str, normalize_output: bool) -> None:
    reference, ours = pair(None, normalize_output=normalize_output)
    check_backbone(reference, ours, public.inputs(padding=padding), mode)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32, torch.float32])
@pytest.mark.parametrize("mode", ["joint", "text"])
def test_backbone_takes_a_padding_mask_of_any_dtype(mode: str, dtype: torch.dtype) -> None:
    reference, ours = pair(None)
    check_backbone(reference, ours, public.inputs(mask_dtype=dtype), mode)


@given(
    lengths=st.lists(st.integers(0, 11), min_size=1, max_size=4),
    slack=st.integers(0, 3),
    mode=st.sampled_from(["joint", "image", "text"]),
    seed=st.integers(0, 5),
)
def test_backbone_random_shapes(lengths: list[int], slack: int, mode: str, seed: int) -> None:
    if mode != "joint":  # the public model returns NaN for a text-only row with no valid token
        lengths = [max(length, 1) for length in lengths]
    text_len = max(1, max(lengths) + slack)
    reference, ours = _shared_pair()
    data = public.inputs(len(lengths), text_len, lengths=lengths, seed=seed)
    check_backbone(reference, ours, data, mode)


_PAIR: list[tuple[torch.nn.Module, torch.nn.Module]] = []


def _shared_pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    if not _PAIR:
        _PAIR.append(pair(None))
    return _PAIR[0]


@pytest.mark.parametrize(
    "overrides",
    [
        {"encoder_attention_heads": 1},
        {"encoder_embed_dim": 64, "encoder_attention_heads": 1, "encoder_ffn_embed_dim": 80},
        {"encoder_embed_dim": 40, "encoder_attention_heads": 5, "encoder_ffn_embed_dim": 24},
        {"encoder_layers": 1},
        {"in_chans": 1},
        {"patch_size": 16},
        {"layernorm_eps": 1e-2},
    ],
    ids=lambda overrides: ",".join(f"{key}={value}" for key, value in overrides.items()),
)
def test_backbone_other_configurations(overrides: dict[str, Any]) -> None:
    reference, ours = pair(None, **overrides)
    data = public.inputs()
    data["image"] = data["image"][:, : overrides.get("in_chans", 3)]
    check_backbone(reference, ours, data, "joint")


@pytest.mark.parametrize("mode", ["joint", "image"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_vision_masked_position(mode: str, dtype: torch.dtype) -> None:
    reference, ours = pair(None)
    data = public.inputs()
    masked = (torch.rand(3, 16) < 0.4).to(dtype)
    masked[0, 0] = 1
    actual = check_backbone(reference, ours, data, mode, vision_masked_position=masked)
    assert not torch.equal(actual["encoder_out"], check_backbone(reference, ours, data, mode)["encoder_out"])


def test_vision_masked_position_gradients() -> None:
    reference, ours = pair(None)
    data = public.inputs()
    masked = torch.rand(3, 16) < 0.4
    for model in (reference, ours):
        out = model(**backbone_inputs(data, "joint"), vision_masked_position=masked)["encoder_out"]
        weights = torch.linspace(-1, 1, out[:, :17].numel()).view_as(out[:, :17])
        (out[:, :17] * weights).sum().backward()
    assert public.gradients(reference)["vision_embed.mask_token"].abs().max() > 0
    assert_gradients_close(ours, reference)


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
@pytest.mark.parametrize("mode", ["joint", "image", "text"])
def test_attn_mask(mode: str, dtype: torch.dtype) -> None:
    """Any (S, S) tensor of zeros and ones, 1 = forbidden; every query may see itself and token 0."""
    reference, ours = pair(None)
    size = {"joint": 17 + 9, "image": 17, "text": 9}[mode]
    forbidden = (torch.rand(size, size) < 0.5).to(dtype)
    forbidden.fill_diagonal_(0)
    forbidden[:, 0] = 0
    data = public.inputs()
    actual = check_backbone(reference, ours, data, mode, attn_mask=forbidden)
    assert not torch.allclose(actual["encoder_out"], check_backbone(reference, ours, data, mode)["encoder_out"])


def test_attn_mask_gradients() -> None:
    reference, ours = pair(None)
    forbidden = (torch.rand(26, 26) < 0.5).long()
    forbidden.fill_diagonal_(0)
    forbidden[:, 0] = 0
    data = public.inputs()
    rows = valid_rows(data, "joint", 17)
    for model in (reference, ours):
        out = model(**backbone_inputs(data, "joint"), attn_mask=forbidden)["encoder_out"][rows]
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert_gradients_close(ours, reference)


@pytest.mark.parametrize("shared", [True, False], ids=["one row for all", "a row a sample"])
@pytest.mark.parametrize("mode", ["image", "text"])
def test_positions(mode: str, shared: bool) -> None:
    reference, ours = pair(None)
    size, rows = (17, 19) if mode == "image" else (9, 64)
    positions = torch.randint(rows, (1 if shared else 3, size))
    data = public.inputs()
    actual = check_backbone(reference, ours, data, mode, positions=positions)
    assert not torch.allclose(actual["encoder_out"], check_backbone(reference, ours, data, mode)["encoder_out"])


def test_non_contiguous_inputs() -> None:
    reference, ours = pair(None)
    data = public.inputs()
    strided = dict(data)
    strided["image"] = data["image"].to(memory_format=torch.channels_last)
    strided["tokens"] = data["tokens"].t().contiguous().t()
    strided["mask"] = data["mask"].t().contiguous().t()
    actual = check_backbone(reference, ours, strided, "joint")
    assert_close(actual["encoder_out"], check_backbone(reference, ours, data, "joint")["encoder_out"], "strided")


def test_inputs_are_not_written_to() -> None:
    _, ours = pair("vqav2")
    batch = public.training_batch("vqav2")
    before = {key: value.clone() for key, value in batch.items()}
    public.outputs(ours, "vqav2", batch)["logits"].sum().backward()
    for key, value in batch.items():
        assert torch.equal(value, before[key]), key


def test_what_is_in_a_padded_position_does_not_matter() -> None:
    """Padding is skipped, not just masked: any id may stand there, valid or not in the public code."""
    for head in ("vqav2", "retrieval", "captioning", "nlvr2"):
        _, ours = pair(head)
        batch = public.training_batch(head)
        changed = dict(batch)
        for key in ("language_tokens", "masked_tokens"):
            if key in batch:
                changed[key] = batch[key].masked_fill(batch["padding_mask"].bool(), 7)
        with torch.no_grad():
            for name, value in public.outputs(ours, head, batch).items():
                assert torch.equal(value, public.outputs(ours, head, changed)[name]), f"{head} {name}"


# --------------------------------------------------------------------------------------- lengths known on the host


@pytest.mark.parametrize("mode", ["joint", "text"])
def test_text_lengths_replace_the_mask(mode: str) -> None:
    _, ours = pair(None)
    data = public.inputs()
    arguments = backbone_inputs(data, mode)
    with torch.no_grad():
        expected = ours(**arguments)["encoder_out"]
        both = ours(**arguments, text_lengths=data["lengths"])["encoder_out"]
        arguments.pop("text_padding_position")
        actual = ours(**arguments, text_lengths=data["lengths"])["encoder_out"]
    assert torch.equal(actual, expected)
    assert torch.equal(both, expected)


@pytest.mark.parametrize("head", ["nlvr2", "vqav2", "captioning", "retrieval"])
def test_text_lengths_of_the_heads(head: str) -> None:
    """Every forward takes them; for NLVR2 they are those of the B texts, not of the 2 B pairs."""
    _, ours = pair(head)
    batch = public.training_batch(head)
    lengths = public.inputs()["lengths"]
    tokens, mask = batch["language_tokens"], batch["padding_mask"]
    first = {
        "nlvr2": lambda **kw: ours(batch["image"], batch["image2"], tokens, kw.pop("padding_mask"), **kw),
        "vqav2": lambda **kw: ours(batch["image"], tokens, **kw),
        "captioning": lambda **kw: ours(
            batch["image"], batch["masked_tokens"], language_masked_pos=batch["language_masked_pos"], **kw
        )[0],
        "retrieval": lambda **kw: ours(batch["image"], tokens, **kw)[0],
    }[head]
    with torch.no_grad():
        expected = first(padding_mask=mask)
        assert torch.equal(first(padding_mask=None, text_lengths=lengths), expected)
        assert torch.equal(first(padding_mask=mask, text_lengths=lengths), expected)


# --------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize("head", [None, *public.HEADS])
def test_own_config_builds_the_same_model(head: str | None) -> None:
    from oracles import pairs

    reference, ours = pair(head)
    fields = {
        "encoder_embed_dim": 48,
        "encoder_attention_heads": 4,
        "encoder_ffn_embed_dim": 192,
        "encoder_layers": 3,
        "img_size": 32,
        "patch_size": 8,
        "vocab_size": 200,
        "max_source_positions": 64,
        "normalize_output": head not in ("imageclassification", "vqav2"),
        "multiway": True,
        "no_output_layer": True,
        "drop_path_rate": 0.0,
        "checkpoint_activations": False,
        "layernorm_eps": 1e-5,
        "in_chans": 3,
    }
    model = pairs.build(head, fast.EncoderConfig(**fields)).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    with torch.no_grad():
        if head is None:
            arguments = backbone_inputs(public.inputs(), "joint")
            assert torch.equal(model(**arguments)["encoder_out"], ours(**arguments)["encoder_out"])
        else:
            batch = public.training_batch(head)
            for name, value in public.outputs(ours, head, batch).items():
                assert torch.equal(public.outputs(model, head, batch)[name], value), name


def test_attributes_that_the_public_code_reads() -> None:
    """`utils.load_model_and_may_interpolate` and the training script use these."""
    for head in public.HEADS:
        reference, ours = pair(head)
        assert ours.get_num_layers() == reference.get_num_layers() == 3
        assert ours.beit3.vision_embed.num_patches == reference.beit3.vision_embed.num_patches
        assert (
            ours.beit3.vision_embed.num_position_embeddings() == reference.beit3.vision_embed.num_position_embeddings()
        )
        assert ours.beit3.vision_embed.patch_size == reference.beit3.vision_embed.patch_size == (8, 8)
        assert ours.no_weight_decay() >= reference.no_weight_decay()
