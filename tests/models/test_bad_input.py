"""Bad input is refused with an error that names the argument, before a single layer has run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracles import public
from oracles.pairs import assert_close, build, fast_class, pair

import beit3_fast.models as fast

# What each public forward calls its image, its text and its padding mask.
NAMES: dict[str | None, dict[str, str]] = {
    None: {"image": "visual_tokens", "text": "textual_tokens", "mask": "text_padding_position"},
    "imageclassification": {"image": "image"},
    "nlvr2": {"image": "image_a", "text": "text_description", "mask": "padding_mask"},
    "vqav2": {"image": "image", "text": "question", "mask": "padding_mask"},
    "captioning": {"image": "image", "text": "text_ids", "mask": "padding_mask"},
    "retrieval": {"image": "image", "text": "text_description", "mask": "padding_mask"},
}
WITH_TEXT = [head for head, names in NAMES.items() if "text" in names]


def good_arguments(head: str | None, **kwargs: Any) -> dict[str, Any]:
    data = public.inputs(**kwargs)
    values = {"image": data["image"], "text": data["tokens"], "mask": data["mask"]}
    arguments = {name: values[role] for role, name in NAMES[head].items()}
    if head == "nlvr2":
        arguments["image_b"] = data["image"].clone()
    if head == "captioning":
        arguments["language_masked_pos"] = None
    return arguments


@contextmanager
def refused(model: torch.nn.Module, name: str, *mentions: object) -> Iterator[None]:
    """A ValueError or TypeError that names the argument and says the given things; no encoder layer runs."""
    backbone = model if isinstance(model, fast.BEiT3) else model.beit3
    ran = []
    handle = backbone.encoder.layers[0].register_forward_pre_hook(lambda *args: ran.append(True))
    try:
        with pytest.raises((ValueError, TypeError)) as error:
            yield
    finally:
        handle.remove()
    message = str(error.value)
    assert name in message, f"{name!r} is not named in: {message}"
    for mention in mentions:
        assert str(mention) in message, f"{mention!r} is not in: {message}"
    assert not ran, "a layer ran before the error"


@pytest.mark.parametrize("head", NAMES)
def test_the_good_arguments_are_good(head: str | None) -> None:
    """Guards the tests below: they break one thing each."""
    _, ours = pair(head)
    ours(**good_arguments(head))


# ----------------------------------------------------------------------------------------------------------- images

IMAGES: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[object, ...]]] = {
    "smaller": (lambda image: image[..., :24, :24], (32, 24)),
    "larger": (lambda image: torch.zeros(3, 3, 64, 64), (32, 64)),
    "not square": (lambda image: image[..., :24], (32, 24)),
    "one channel": (lambda image: image[:, :1], (3, 1)),
    "channels last": (lambda image: image.permute(0, 2, 3, 1), (32,)),
    "no batch": (lambda image: image[0], ("(3, 32, 32)",)),
    "five dimensions": (lambda image: image[:, None], (32,)),
    "bytes": (lambda image: image.to(torch.uint8), ("uint8",)),
    "integers": (lambda image: image.long(), ("int64",)),
    "double": (lambda image: image.double(), ("float64", "float32")),
    "half": (lambda image: image.half(), ("float16", "float32")),
    "numpy": (lambda image: image.numpy(), ("ndarray",)),
}


@pytest.mark.parametrize("case", IMAGES)
@pytest.mark.parametrize("head", NAMES)
def test_image(head: str | None, case: str) -> None:
    _, ours = pair(head)
    arguments = good_arguments(head)
    change, mentions = IMAGES[case]
    name = NAMES[head]["image"]
    arguments[name] = change(arguments[name])
    if head == "nlvr2":
        arguments["image_b"] = change(arguments["image_b"])
    with refused(ours, name, *mentions):
        ours(**arguments)


@pytest.mark.parametrize("head", NAMES)
def test_empty_batch(head: str | None) -> None:
    """Empty as a whole, in every argument: either of them may be named."""
    _, ours = pair(head)
    arguments = {name: value if value is None else value[:0] for name, value in good_arguments(head).items()}
    with refused(ours, "empty"):
        ours(**arguments)


def test_empty_batch_of_generate() -> None:
    _, ours = pair("captioning")
    with refused(ours, "image", "empty"):
        ours.generate(torch.zeros(0, 3, 32, 32), mask_token_id=199, max_length=8)


def test_the_second_image_of_nlvr2() -> None:
    _, ours = pair("nlvr2")
    arguments = good_arguments("nlvr2")
    with refused(ours, "image_b", 24):
        ours(**{**arguments, "image_b": arguments["image_b"][..., :24]})
    with refused(ours, "image_b", 2):
        ours(**{**arguments, "image_b": arguments["image_b"][:2]})


@pytest.mark.parametrize("shape", [(3, 17), (2, 16), (3, 4, 4), (16,)])
def test_vision_masked_position(shape: tuple[int, ...]) -> None:
    _, ours = pair(None)
    with refused(ours, "vision_masked_position", "16"):
        ours(**good_arguments(None), vision_masked_position=torch.zeros(shape))


# ------------------------------------------------------------------------------------------------------------- text


def _with(tokens: torch.Tensor, row: int, column: int, value: int) -> torch.Tensor:
    tokens = tokens.clone()
    tokens[row, column] = value
    return tokens


TEXTS: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[object, ...]]] = {
    "id past the vocabulary": (lambda tokens: _with(tokens, 1, 1, 200), (200,)),
    "negative id": (lambda tokens: _with(tokens, 0, 0, -1), (-1, 200)),
    "floats": (lambda tokens: tokens.float(), ("float32",)),
    "bools": (lambda tokens: tokens.bool(), ("bool",)),
    "no batch": (lambda tokens: tokens[0], ("(9,)",)),
    "three dimensions": (lambda tokens: tokens[..., None], ("(3, 9, 1)",)),
    "a list": (lambda tokens: tokens.tolist(), ("list",)),
    "strings": (lambda tokens: ["a cat"] * 3, ("list",)),
    "fewer than images": (lambda tokens: tokens[:2], (3, 2)),
}


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("head", WITH_TEXT)
def test_text(head: str | None, case: str) -> None:
    _, ours = pair(head)
    arguments = good_arguments(head)
    change, mentions = TEXTS[case]
    name = NAMES[head]["text"]
    arguments[name] = change(arguments[name])
    if case == "fewer than images":
        mask = NAMES[head]["mask"]
        arguments[mask] = arguments[mask][:2]
    with refused(ours, name, *mentions):
        ours(**arguments)


@pytest.mark.parametrize("head", WITH_TEXT)
def test_text_longer_than_the_position_table(head: str | None) -> None:
    """64 rows, the first two never used: 62 tokens fit and 63 do not."""
    _, ours = pair(head)
    ours(**good_arguments(head, text_len=62))
    with refused(ours, NAMES[head]["text"], 62, 63):
        ours(**good_arguments(head, text_len=63))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_integer_types_of_ids_are_good(dtype: torch.dtype) -> None:
    reference, ours = pair("vqav2")
    arguments = good_arguments("vqav2")
    arguments["question"] = arguments["question"].to(dtype)
    with torch.no_grad():
        assert_close(ours(**arguments), reference(**arguments), "logits")


# ----------------------------------------------------------------------------------------------------- padding masks

MASKS: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[object, ...]]] = {
    "too wide": (lambda mask: torch.zeros(3, 10, dtype=torch.long), ("(3, 9)", "(3, 10)")),
    "one column": (lambda mask: mask[:, :1], ("(3, 9)", "(3, 1)")),
    "one row": (lambda mask: mask[:1], ("(3, 9)", "(1, 9)")),
    "over image and text": (lambda mask: torch.zeros(3, 26, dtype=torch.long), ("(3, 9)", "(3, 26)")),
    "square": (lambda mask: torch.zeros(3, 9, 9, dtype=torch.long), ("(3, 9)",)),
    "a list": (lambda mask: mask.tolist(), ("list",)),
    "inverted": (lambda mask: 1 - mask, ("1 = padding",)),
    "inverted bool": (lambda mask: ~mask.bool(), ("1 = padding",)),
    "inverted in one row": (lambda mask: torch.cat([mask[:2], 1 - mask[2:]]), ("1 = padding",)),
    "left padding": (lambda mask: mask.flip(1), ("1 = padding",)),
}


@pytest.mark.parametrize("case", MASKS)
@pytest.mark.parametrize("head", WITH_TEXT)
def test_padding_mask(head: str | None, case: str) -> None:
    _, ours = pair(head)
    arguments = good_arguments(head)
    change, mentions = MASKS[case]
    name = NAMES[head]["mask"]
    arguments[name] = change(arguments[name])
    with refused(ours, name, *mentions):
        ours(**arguments)


def test_padding_mask_of_text_alone() -> None:
    _, ours = pair("retrieval")
    arguments = good_arguments("retrieval")
    with refused(ours, "padding_mask", "1 = padding"):
        ours(
            text_description=arguments["text_description"], padding_mask=1 - arguments["padding_mask"], only_infer=True
        )


def test_padding_mask_without_text() -> None:
    """The public code ignores a mask without a text; so do we."""
    _, ours = pair("retrieval")
    arguments = good_arguments("retrieval")
    with torch.no_grad():
        expected = ours(image=arguments["image"], only_infer=True)[0]
        actual = ours(image=arguments["image"], padding_mask=arguments["padding_mask"], only_infer=True)[0]
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", ["joint", "text"])
def test_holes_in_the_padding(mode: str) -> None:
    """Padding in the middle of a text is unusual and legal: valid tokens keep their positions."""
    reference, ours = pair(None)
    data = public.inputs(padding="unpadded")
    mask = torch.tensor([[0, 0, 1, 0, 1, 1, 0, 0, 1], [0] * 9, [0, 1, 1, 1, 1, 1, 1, 1, 0]])
    arguments = {"textual_tokens": data["tokens"], "text_padding_position": mask}
    valid = mask == 0
    if mode == "joint":
        arguments["visual_tokens"] = data["image"]
        valid = torch.cat([torch.ones(3, 17, dtype=torch.bool), valid], dim=1)
    with torch.no_grad():
        assert_close(ours(**arguments)["encoder_out"][valid], reference(**arguments)["encoder_out"][valid], "holes")


# ------------------------------------------------------------------------------------------------- fully padded rows


def all_padding(rows: list[int], batch: int = 3) -> dict[str, Any]:
    return public.inputs(batch, lengths=[0 if row in rows else 5 for row in range(batch)])


@pytest.mark.parametrize("rows", [[1], [0, 2], [0, 1, 2]], ids=str)
def test_fully_padded_text_alone(rows: list[int]) -> None:
    """The public model returns NaN there; the other rows are untouched and every gradient is finite."""
    reference, ours = pair("retrieval")
    data = all_padding(rows)
    arguments = {"text_description": data["tokens"], "padding_mask": data["mask"], "only_infer": True}
    language = ours(**arguments)[1]
    assert language.isfinite().all()
    with torch.no_grad():
        expected = reference(**arguments)[1]
    others = [row for row in range(3) if row not in rows]
    assert expected[rows].isnan().all()
    if others:
        assert_close(language.detach()[others], expected[others], "other rows")
    language.square().sum().backward()
    for key, grad in fast.released_gradients(ours).items():
        assert grad is None or grad.isfinite().all(), key


@pytest.mark.parametrize("rows", [[1], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("head", ["vqav2", "nlvr2", "captioning"])
def test_fully_padded_text_beside_an_image(head: str, rows: list[int]) -> None:
    reference, ours = pair(head)
    data = all_padding(rows)
    arguments = good_arguments(head) | {
        NAMES[head]["image"]: data["image"],
        NAMES[head]["text"]: data["tokens"],
        NAMES[head]["mask"]: data["mask"],
    }
    result = ours(**arguments)
    result = result[0] if isinstance(result, tuple) else result
    assert result.isfinite().all()
    if head == "vqav2":  # reads the image's CLS row, which then depends on the image alone
        with torch.no_grad():
            assert_close(result.detach(), reference(**arguments), "logits")
    result.square().sum().backward()
    for key, grad in fast.released_gradients(ours).items():
        assert grad is None or grad.isfinite().all(), key


# ------------------------------------------------------------------------------------------------------ other inputs


def test_neither_image_nor_text() -> None:
    _, ours = pair(None)
    with pytest.raises(ValueError, match=r"(?s)(visual_tokens.*textual_tokens|textual_tokens.*visual_tokens)"):
        ours()


def test_retrieval_loss_of_one_modality() -> None:
    _, ours = pair("retrieval")
    arguments = good_arguments("retrieval")
    with pytest.raises(ValueError, match="text_description"):
        ours(image=arguments["image"])
    with pytest.raises(ValueError, match="image"):
        ours(text_description=arguments["text_description"])


@pytest.mark.parametrize("shape", [(25, 26), (9, 9), (3, 26, 26, 1), (26,)])
def test_attn_mask(shape: tuple[int, ...]) -> None:
    _, ours = pair(None)
    with refused_anywhere("attn_mask", "26"):
        ours(**good_arguments(None), attn_mask=torch.zeros(shape, dtype=torch.long))


@contextmanager
def refused_anywhere(name: str, *mentions: object) -> Iterator[None]:
    with pytest.raises((ValueError, TypeError)) as error:
        yield
    for mention in (name, *mentions):
        assert str(mention) in str(error.value), f"{mention!r} is not in: {error.value}"


@pytest.mark.parametrize(
    ("lengths", "mention"),
    [([3, 4], 3), ([3, 4, 10], 9), ([3, -1, 4], -1), ([9, 9, 9], "9"), ([[3], [4], [5]], "")],
    ids=["too few", "too long", "negative", "not the mask's", "nested"],
)
def test_text_lengths(lengths: list[Any], mention: object) -> None:
    for head in ("vqav2", "retrieval", "captioning"):
        _, ours = pair(head)
        with refused(ours, "text_lengths", mention):
            ours(**good_arguments(head), text_lengths=lengths)


@pytest.mark.parametrize("shape", [(3, 8), (2, 9), (9,), (3, 9, 1)])
def test_language_masked_pos(shape: tuple[int, ...]) -> None:
    _, ours = pair("captioning")
    with refused(ours, "language_masked_pos", "(3, 9)", shape):
        ours(**{**good_arguments("captioning"), "language_masked_pos": torch.ones(shape, dtype=torch.long)})


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 0},
        {"max_length": 2},
        {"max_length": 63},
        {"mask_token_id": 200},
        {"eos_token_id": -1},
    ],
    ids=str,
)
def test_generate(settings: dict[str, int]) -> None:
    _, ours = pair("captioning")
    image = public.inputs()["image"]
    (name, value), *_ = settings.items()
    with refused(ours, name, value):
        ours.generate(image, **({"mask_token_id": 199, "max_length": 8} | settings))


@pytest.mark.parametrize("case", ["smaller", "no batch", "bytes", "numpy"])
def test_image_of_generate(case: str) -> None:
    _, ours = pair("captioning")
    image = IMAGES[case][0](public.inputs()["image"])
    with refused(ours, "image", *IMAGES[case][1]):
        ours.generate(image, mask_token_id=199, max_length=8)


def test_generate_with_the_default_mask_id_on_a_small_vocabulary() -> None:
    _, ours = pair("captioning")
    with refused(ours, "mask_token_id", 64001, 200):
        ours.generate(public.inputs()["image"], max_length=8)


# ---------------------------------------------------------------------------------------------- names and configuration


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("beit3_base_patch16_224_retreival", "beit3_base_patch16_224_retrieval"),
        ("beit3_base_patch16_384_retrival", "beit3_base_patch16_384_retrieval"),
        ("BEIT3_BASE_PATCH16_224_NLVR2", "beit3_base_patch16_224_nlvr2"),
        ("beit3_large_patch16_480_vqa", "beit3_large_patch16_480_vqav2"),
        ("beit3_base_patch16_224_image_classification", "beit3_base_patch16_224_imageclassification"),
    ],
)
def test_unknown_model_name(name: str, nearest: str) -> None:
    with refused_anywhere(name, nearest):
        fast.create_model(name)


def test_unknown_model_name_that_is_like_nothing() -> None:
    with refused_anywhere("resnet50"):
        fast.create_model("resnet50")


@pytest.mark.parametrize("head", [None, "vqav2"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder_attention_heads", 5),
        ("encoder_layers", 0),
        ("vocab_size", -1),
        ("patch_size", 0),
        ("img_size", 36),
        ("drop_path_rate", 1.5),
        ("subln", False),
        ("deepnorm", True),
        ("multiway", False),
        ("xpos_rel_pos", True),
        ("activation_fn", "relu"),
        ("dropout", 0.1),
        ("attention_dropout", 0.1),
        ("layernorm_embedding", True),
        ("no_scale_embedding", False),
        ("encoder_normalize_before", False),
        ("no_output_layer", False),
        ("bert_init", True),
        ("moe_freq", 2),
    ],
)
def test_a_torchscale_config_that_is_no_beit3(head: str | None, name: str, value: object) -> None:
    """Silently building something else than was asked for would be the worst answer."""
    args = public.config(head)
    setattr(args, name, value)
    with refused_anywhere(name, value):
        build(head, args)


def test_relative_positions_are_refused() -> None:
    args = public.config(None, rel_pos_buckets=32, max_rel_pos=128)
    with refused_anywhere("rel_pos"):
        build(None, args)


def test_unknown_configuration_field() -> None:
    with refused_anywhere("encoder_embed_dims"):
        fast.EncoderConfig(encoder_embed_dims=48)


@pytest.mark.parametrize("args", [None, 768, "base", {"encoder_embed_dim": 768}], ids=str)
def test_something_else_than_a_configuration(args: Any) -> None:
    with refused_anywhere("args"):
        fast_class("retrieval")(args)


@pytest.mark.parametrize("name", ["beit3_base_patch16_224_retrieval"])
def test_unknown_override(name: str) -> None:
    """The public factories swallow any keyword; a typing error deserves better. Names the public code knows pass."""
    with torch.device("meta"), refused_anywhere("drop_path_rates"):
        fast.create_model(name, drop_path_rates=0.1)
