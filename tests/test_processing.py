"""Processing against torchvision, sentencepiece and the public data sets."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import re
import subprocess
import sys
from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given
from oracles import public as oracle
from PIL import Image
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torchvision import transforms
from torchvision.datasets.folder import default_loader

from beit3_fast.processing import Batch, ImageTransform, Processor, Tokenizer, demo_pairs, demo_tokenizer_path

BICUBIC = transforms.InterpolationMode.BICUBIC
SENTENCES = [f"the quick brown fox number {i} jumps over {i * 7} lazy dogs; naïve café" for i in range(200)]


# ----------------------------------------------------------------------------------------------------------- images


def torchvision_transform(kind: str, size: int) -> transforms.Compose:
    resize = {
        "vision_language": [transforms.Resize((size, size), interpolation=BICUBIC)],
        "imagenet": [transforms.Resize(size, interpolation=BICUBIC), transforms.CenterCrop(size)],
    }[kind]
    statistics = {
        "vision_language": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
        "imagenet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    }[kind]
    return transforms.Compose([*resize, transforms.ToTensor(), transforms.Normalize(*statistics)])


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """Smooth colours plus noise: both the filter's taps and its rounding show."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 255, width)[None, :, None] * np.array([1.0, 0.5, 0.2])
    pixels = np.clip(ramp + random.normal(0, 60, (height, width, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(random.integers(0, 256, (height, width), dtype=np.uint8)))
        return image
    if mode == "I;16":
        return Image.fromarray(random.integers(0, 65536, (height, width), dtype=np.uint16))
    return image.convert(mode)


def assert_equal_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert found.is_contiguous()
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize("size", [224, 384, 480, 768])
@pytest.mark.parametrize("kind", ["vision_language", "imagenet"])
@pytest.mark.parametrize("shape", [(640, 427), (301, 500), (1000, 51)], ids=str)
def test_transform_is_torchvisions_bit_for_bit(kind, size, shape):
    image = noise(*shape)
    transform = getattr(ImageTransform, kind)(size)
    assert_equal_bits(transform(image), torchvision_transform(kind, size)(image))


@pytest.mark.parametrize("kind", ["vision_language", "imagenet"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (3, 2), (224, 224), (224, 225), (223, 224), (448, 449)], ids=str)
def test_tiny_and_odd_shapes(kind, shape):
    image = noise(*shape)
    assert_equal_bits(getattr(ImageTransform, kind)(224)(image), torchvision_transform(kind, 224)(image))


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 70), st.sampled_from(["vision_language", "imagenet"]))
def test_transform_at_any_shape(width, height, size, kind):
    image = noise(width, height, seed=width * 100 + height)
    assert_equal_bits(getattr(ImageTransform, kind)(size)(image), torchvision_transform(kind, size)(image))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", ["vision_language", "imagenet"])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        *itertools.product(["RGB", "L", "RGBA", "LA", "P", "1", "I;16"], ["png"]),
        *itertools.product(["RGB", "L", "CMYK"], ["jpg"]),
        ("P", "gif"),
    ],
)
def test_every_mode_as_the_public_loader_reads_it(tmp_path, kind, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    noise(97, 60, mode).save(path)
    expected = torchvision_transform(kind, 64)(default_loader(str(path)))
    transform = getattr(ImageTransform, kind)(64)
    assert expected.std() > (0.01 if mode == "I;16" else 0.1), "there is something to compare"
    assert_equal_bits(transform(path), expected)
    assert_equal_bits(transform(str(path)), expected)
    with Image.open(path) as image:
        assert_equal_bits(transform(image), expected)


def test_palette_with_transparency(tmp_path):
    image = noise(40, 30).quantize(16)
    image.info["transparency"] = 3
    image.save(tmp_path / "p.png")
    expected = torchvision_transform("vision_language", 32)(default_loader(str(tmp_path / "p.png")))
    assert_equal_bits(ImageTransform(32)(tmp_path / "p.png"), expected)


def test_exif_orientation_is_not_applied_as_the_public_loader_does_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    noise(80, 40).save(tmp_path / "turned.jpg", exif=exif)
    expected = torchvision_transform("imagenet", 32)(default_loader(str(tmp_path / "turned.jpg")))
    assert_equal_bits(ImageTransform.imagenet(32)(tmp_path / "turned.jpg"), expected)


def test_arrays_and_tensors_equal_the_image():
    image = noise(50, 31)
    pixels = np.asarray(image)
    expected = ImageTransform(24)(image)
    flipped = np.ascontiguousarray(pixels[:, ::-1])[:, ::-1]
    assert not flipped.flags["C_CONTIGUOUS"]
    channels_first = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()
    for same in (pixels, flipped, torch.from_numpy(pixels.copy()), channels_first.permute(1, 2, 0)):
        assert_equal_bits(ImageTransform(24)(same), expected)


def test_the_image_given_is_not_changed():
    image = noise(16, 16)
    before = image.tobytes()
    ImageTransform(16)(image).zero_()
    assert image.tobytes() == before


def test_transform_is_frozen_comparable_and_reads_its_fields():
    transform = ImageTransform(8, mean=[0.1, 0.2, 0.3], std=(0.5, 0.25, 1.0))
    assert transform == ImageTransform(np.int64(8), mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 1.0))
    assert hash(transform) != hash(ImageTransform(8))
    assert ImageTransform.vision_language(8) == ImageTransform(8)
    with pytest.raises(AttributeError):
        transform.size = 9
    white = transform(Image.new("RGB", (3, 3), "white"))
    assert torch.allclose(white[:, 0, 0], torch.tensor([0.9 / 0.5, 0.8 / 0.25, 0.7]))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"size": 0}, ValueError, "size must be at least 1, got 0"),
        ({"size": -224}, ValueError, "size must be at least 1, got -224"),
        ({"size": 224.0}, TypeError, "size must be an integer, got float"),
        ({"size": (224, 224)}, TypeError, "size must be an integer, got tuple"),
        ({"size": 8, "mean": (0.5, 0.5)}, ValueError, "mean must be three"),
        ({"size": 8, "mean": (0.5, float("nan"), 0.5)}, ValueError, "mean must be three finite"),
        ({"size": 8, "std": (0.5, 0.0, 0.5)}, ValueError, "std must be above 0"),
    ],
)
def test_bad_transform(arguments, error, message):
    with pytest.raises(error, match=message):
        ImageTransform(**arguments)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), ValueError, r"\(height, width, 3\), got \(3, 8, 8\)"),
        (np.zeros((8, 8), np.uint8), ValueError, r"\(height, width, 3\), got \(8, 8\)"),
        (np.zeros((8, 8, 4), np.uint8), ValueError, r"\(height, width, 3\), got \(8, 8, 4\)"),
        (np.zeros((0, 8, 3), np.uint8), ValueError, "no pixels"),
        (np.zeros((8, 8, 3), np.float32), TypeError, "image must be uint8, got float32"),
        (torch.zeros(8, 8, 3), TypeError, "image must be uint8, got torch.float32"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"\(height, width, 3\)"),
        (Image.new("RGB", (0, 5)), ValueError, "no pixels"),
        (None, TypeError, "image must be a PIL image, a path, .* got NoneType"),
        (b"\xff\xd8", TypeError, "got bytes"),
    ],
)
def test_bad_images(image, error, message):
    with pytest.raises(error, match=message):
        ImageTransform(8)(image)


def test_bad_image_files_name_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jpg"):
        ImageTransform(8)(tmp_path / "missing.jpg")
    with pytest.raises(OSError, match=tmp_path.name):
        ImageTransform(8)(tmp_path)
    (tmp_path / "text.jpg").write_text("not an image")
    whole = demo_pairs()[0][0].read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    png = io.BytesIO()
    noise(64, 64).save(png, "png")
    (tmp_path / "broken.png").write_bytes(png.getvalue()[:60] + b"\0" * 40 + png.getvalue()[100:])
    for name in ("text.jpg", "cut.jpg", "broken.png"):
        with pytest.raises(ValueError, match=rf"{name}' cannot be read"):
            ImageTransform(8)(tmp_path / name)


def test_an_image_too_thin_to_crop_is_refused_before_the_memory_is_taken():
    with pytest.raises(ValueError, match="too long and thin"):
        ImageTransform.imagenet(224)(Image.new("RGB", (1, 20_000)))


# ------------------------------------------------------------------------------------------------------------- texts


def train(path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A SentencePiece model of each kind: ours, one that normalises as XLM-R's, one that spells out bytes."""
    folder = tmp_path_factory.mktemp("spm")
    return {
        "demo": demo_tokenizer_path(),
        "nfkc": train(folder / "nfkc.spm"),
        "bytes": train(folder / "bytes.spm", byte_fallback=True, remove_extra_whitespaces=False),
    }


@pytest.fixture(scope="module")
def pairs_of_models(models):
    return {
        name: (Tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path)))
        for name, path in models.items()
    }


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(demo_tokenizer_path())


def expected_ids(model, text: str) -> list[int]:
    """The id map, on SentencePiece's own ids."""
    return [number + 1 if number else 3 for number in model.encode(text)]


TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=60),
    st.lists(
        st.sampled_from(
            [*"abc xyz,.!▁\t\n\u3000", " the", " fox", "naïve", "é", "e\u0301", "ﬁ", "漢字", "😀", "👩\u200d🚀"]
        ),
        max_size=300,
    ).map("".join),
).filter(lambda text: not any(special in text for special in ("<s>", "</s>", "<pad>", "<unk>", "<mask>")))


@given(TEXTS, st.integers(2, 70))
@pytest.mark.parametrize("name", ["demo", "nfkc", "bytes"])
def test_ids_are_sentencepieces_through_the_id_map(pairs_of_models, name, text, max_length):
    tokenizer, model = pairs_of_models[name]
    pieces, wanted = tokenizer.tokenize(text), expected_ids(model, text)
    assert pieces == model.encode(text, out_type=str)
    assert tokenizer.convert_tokens_to_ids(pieces) == wanted

    ids, mask, lengths = tokenizer.encode([text], max_length)
    row = [0, *wanted[: max_length - 2], 2]
    padding = max_length - len(row)
    assert ids.tolist() == [row + [1] * padding]
    assert mask.tolist() == [[0] * len(row) + [1] * padding]
    assert lengths == [len(row)]
    assert ids.dtype == mask.dtype == torch.int64

    # words come back; what has no piece is dropped with the special tokens
    if 3 not in wanted:
        assert tokenizer.decode([0, *wanted, 2, 1, 1]) == "".join(pieces).replace("▁", " ").strip()


def test_a_plain_text_survives_the_round_trip(pairs_of_models):
    for tokenizer, _ in pairs_of_models.values():
        text = "the quick brown fox jumps over lazy dogs"
        ids, _, _ = tokenizer.encode([text, ""], 64)
        assert tokenizer.batch_decode(ids) == [text, ""]
        assert tokenizer.batch_decode(ids.numpy()) == [text, ""]
        assert tokenizer.batch_decode(ids.tolist()) == [text, ""]


def test_mask_takes_the_space_before_it(pairs_of_models):
    """As transformers' `<mask>` (lstrip) does; only a model that keeps extra spaces shows it."""
    tokenizer, model = pairs_of_models["bytes"]
    assert model.encode("the fox ", out_type=str) != model.encode("the fox", out_type=str)
    wanted = [*model.encode("the fox", out_type=str), "<mask>", *model.encode(" dogs ", out_type=str), "</s>"]
    assert tokenizer.tokenize("the fox \t<mask> dogs </s>") == wanted


# What transformers 4.57.1's XLMRobertaTokenizer answers on demo.spm. Its version 5 cannot read such a file any more.
TRANSFORMERS = [
    ("a red rocket", ["▁a", "▁red", "▁rocket"], [39, 55, 752], "a red rocket", "<s> a red rocket</s>"),
    (
        "  A cat \t sits.\n",
        ["▁A", "▁cat", "▁", "\t", "▁s", "it", "s", ".", "\n"],
        [330, 74, 5, 3, 30, 157, 6, 345, 3],
        "A cat  sits.",
        "<s> A cat <unk> sits.<unk></s>",
    ),
    (
        "A cat <mask>  sits</s> 😀😀x",
        ["▁A", "▁cat", "<mask>", "▁s", "it", "s", "</s>", "▁", "😀😀", "x"],
        [330, 74, 2001, 30, 157, 6, 2, 5, 3, 777],
        "A cat sits x",
        "<s> A cat<mask> sits</s> <unk>x</s>",
    ),
    (
        "naïve café, 漢字!",
        ["▁", "na", "ï", "ve", "▁c", "af", "é", ",", "▁", "漢字", "!"],
        [5, 385, 3, 138, 26, 788, 3, 4, 5, 3, 831],
        "nave caf, !",
        "<s> na<unk>ve caf<unk>, <unk>!</s>",
    ),
    ("<s><pad><unk>", ["<s>", "<pad>", "<unk>"], [0, 1, 3], "", "<s><s><pad><unk></s>"),
]


@pytest.mark.parametrize(("text", "pieces", "ids", "plain", "full"), TRANSFORMERS)
def test_answers_of_transformers_4(tokenizer, text, pieces, ids, plain, full):
    assert tokenizer.tokenize(text) == pieces
    assert tokenizer.convert_tokens_to_ids(pieces) == ids
    row = [0, *ids, 2]
    assert tokenizer.encode(text)[0][0].tolist() == row + [1] * (64 - len(row))
    assert tokenizer.decode(row) == plain
    assert tokenizer.decode(row, skip_special_tokens=False) == full


def test_special_ids(tokenizer):
    assert len(sentencepiece.SentencePieceProcessor(model_file=str(demo_tokenizer_path()))) == 2000
    names = ("bos", "cls", "pad", "eos", "sep", "unk", "mask")
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [0, 0, 1, 2, 2, 3, 2001]
    assert tokenizer.vocab_size == len(tokenizer) == 2002
    assert sorted(tokenizer.all_special_ids) == [0, 1, 2, 3, 2001]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 2001]) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tokenizer.convert_ids_to_tokens([0, 4, 1], skip_special_tokens=True) == [","]


def test_released_size_gives_the_released_ids(monkeypatch):
    """beit3.spm has 64000 pieces; the public configuration has `<mask>` at 64001."""
    monkeypatch.setattr(sentencepiece.SentencePieceProcessor, "__len__", lambda self: 64000)
    released = Tokenizer(demo_tokenizer_path())
    assert (released.mask_token_id, released.vocab_size) == (64001, 64002)


def test_every_id_has_one_piece_and_back(tokenizer):
    pieces = tokenizer.convert_ids_to_tokens(range(tokenizer.vocab_size))
    assert len(set(pieces)) == tokenizer.vocab_size
    assert tokenizer.convert_tokens_to_ids(pieces) == list(range(tokenizer.vocab_size))
    assert tokenizer.convert_ids_to_tokens(74) == pieces[74]
    assert tokenizer.convert_tokens_to_ids(pieces[74]) == 74
    assert tokenizer.convert_tokens_to_ids("no such piece") == 3


def test_empty_and_blank_texts(tokenizer):
    for pad_to, width in (("max_length", 5), ("longest", 2)):
        ids, mask, lengths = tokenizer.encode(["", "   "], 5, pad_to=pad_to)
        assert ids.tolist() == [[0, 2] + [1] * (width - 2)] * 2
        assert mask.tolist() == [[0, 0] + [1] * (width - 2)] * 2
        assert lengths == [2, 2]


def test_longest_is_max_length_without_the_common_padding(tokenizer):
    texts = ["a cat", "a red rocket stands between four towers", "", "word " * 5000]
    for chosen in (texts[:3], texts):
        ids, mask, lengths = tokenizer.encode(chosen, 16)
        short_ids, short_mask, short_lengths = tokenizer.encode(iter(chosen), 16, pad_to="longest")
        width = max(lengths)
        assert short_lengths == lengths
        assert torch.equal(short_ids, ids[:, :width])
        assert torch.equal(short_mask, mask[:, :width])
        assert ids[:, width:].eq(1).all()
        assert (mask == 0).sum(1).tolist() == lengths
    assert lengths[-1] == 16
    assert ids[-1, -1] == 2, "a cut text ends with </s> as well"


def test_bad_texts(tokenizer, tmp_path):
    with pytest.raises(TypeError, match="text must be a string, got bytes"):
        tokenizer.tokenize(b"a cat")
    with pytest.raises(TypeError, match="text must be a string, got int"):
        tokenizer.encode(["a cat", 7])
    with pytest.raises(ValueError, match="UTF-8"):
        tokenizer.encode("lone \ud800 surrogate")
    with pytest.raises(ValueError, match="texts must not be empty"):
        tokenizer.encode([])
    with pytest.raises(ValueError, match="max_length must be at least 2, got 1"):
        tokenizer.encode("a cat", max_length=1)
    with pytest.raises(TypeError, match="max_length must be an integer"):
        tokenizer.encode("a cat", max_length=None)
    with pytest.raises(ValueError, match=r"pad_to must be one of .* got 'left'"):
        tokenizer.encode("a cat", pad_to="left")
    with pytest.raises(ValueError, match="ids must be below vocab_size = 2002, got 2002"):
        tokenizer.decode([5, 2002])
    with pytest.raises(ValueError, match="ids must be at least 0, got -1"):
        tokenizer.convert_ids_to_tokens(-1)
    with pytest.raises(TypeError, match="ids must be an integer, got float"):
        tokenizer.decode([1.5])
    with pytest.raises(TypeError, match="ids must be an integer, got list"):
        tokenizer.decode([[5, 6]])


def test_bad_tokenizer_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.spm"):
        Tokenizer(tmp_path / "missing.spm")
    whole = demo_tokenizer_path().read_bytes()
    for name, content in {"empty": b"", "text": b"hello " * 99, "half": whole[: len(whole) // 2]}.items():
        path = tmp_path / f"{name}.spm"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}\.spm' is not a SentencePiece model"):
            Tokenizer(path)


def test_tokenizer_can_be_pickled(tokenizer):
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.tokenize("a cat <mask>") == tokenizer.tokenize("a cat <mask>")
    assert copy.mask_token_id == tokenizer.mask_token_id
    assert "2002" in repr(copy)


# ------------------------------------------------------------------------------------------------- public data sets


@pytest.fixture(scope="module")
def datasets():
    """The names of the public, unmodified `datasets.py`."""
    return SimpleNamespace(**oracle.engine().get_sentencepiece_model_for_beit3.__globals__)


@pytest.mark.parametrize("task", ["vqav2", "imagenet"])
def test_equals_the_public_evaluation_transform(datasets, task):
    args = SimpleNamespace(task=task, input_size=96, crop_pct=None)
    transform = datasets.build_transform(is_train=False, args=args)
    processor = Processor(None, image_size=96, imagenet=task == "imagenet")
    paths = [path for path, _ in demo_pairs()]
    batch = processor(images=paths)
    assert_equal_bits(batch.image, torch.stack([transform(default_loader(str(path))) for path in paths]))
    assert batch.text_ids is batch.padding_mask is batch.text_lengths is None


def coco(folder, split):
    images = [
        {
            "filepath": str(path.parent),
            "filename": path.name,
            "split": split,
            "cocoid": number,
            "sentences": [{"raw": caption}],
        }
        for number, (path, caption) in enumerate(demo_pairs())
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))


def test_serves_the_public_retrieval_data_set_and_equals_its_examples(datasets, tokenizer, tmp_path):
    coco(tmp_path, "test")
    datasets.RetrievalDataset.make_coco_dataset_index(str(tmp_path), tokenizer)
    args = SimpleNamespace(task="coco_retrieval", input_size=32)
    data = datasets.RetrievalDataset(
        data_path=str(tmp_path),
        split="test",
        transform=datasets.build_transform(is_train=False, args=args),
        tokenizer=tokenizer,
        num_max_bpe_tokens=31,
        task="coco_retrieval",
    )
    examples = [data[i] for i in range(len(data))]
    batch = Processor(tokenizer, 32, max_length=31)(*zip(*demo_pairs(), strict=True))
    assert len(examples) == 6
    assert_equal_bits(batch.image, torch.stack([example["image"] for example in examples]))
    assert batch.text_ids.tolist() == [example["language_tokens"] for example in examples]
    assert batch.padding_mask.tolist() == [example["padding_mask"] for example in examples]
    assert batch.text_lengths == tuple(31 - sum(example["padding_mask"]) for example in examples)
    assert 2 < min(batch.text_lengths) < 31 == max(batch.text_lengths), "some text is cut, some is padded"


def test_serves_the_public_captioning_data_set(datasets, tokenizer, tmp_path):
    coco(tmp_path, "train")
    datasets.CaptioningDataset.make_coco_captioning_dataset_index(str(tmp_path), tokenizer)
    data = datasets.CaptioningDataset(
        data_path=str(tmp_path),
        split="train",
        transform=datasets.build_transform(is_train=False, args=SimpleNamespace(task="coco_captioning", input_size=32)),
        tokenizer=tokenizer,
        num_max_bpe_tokens=32,
        task="coco_captioning",
        mask_prob=0.6,
    )
    example = data[1]
    changed = [a for a, b in zip(example["masked_tokens"], example["language_tokens"], strict=True) if a != b]
    assert tokenizer.mask_token_id in changed
    assert tokenizer.batch_decode([example["language_tokens"]]) == [demo_pairs()[1][1]]


# ------------------------------------------------------------------------------------------------ processor and batch


def test_processor_takes_one_or_several_of_every_kind(tokenizer):
    processor = Processor(tokenizer, 16)
    images = [noise(20, 20, seed=i) for i in range(3)]
    arrays = np.stack([np.asarray(image) for image in images])
    expected = torch.stack([ImageTransform.vision_language(16)(image) for image in images])
    for several in (images, tuple(images), iter(images), arrays, torch.from_numpy(arrays), list(arrays)):
        assert torch.equal(processor(several).image, expected)
    for one in (images[0], arrays[0], torch.from_numpy(arrays[0])):
        assert torch.equal(processor(images=one).image, expected[:1])
    path = demo_pairs()[0][0]
    assert torch.equal(processor(path).image, processor([str(path)]).image)

    batch = processor(texts="a cat")
    assert batch.image is None
    assert batch.text_ids.shape == batch.padding_mask.shape == (1, 64)
    assert batch.text_lengths == (4,)
    assert all(type(length) is int for length in batch.text_lengths)
    assert Processor(tokenizer, 16, pad_to="longest")(texts=["a cat", ""]).text_ids.shape == (2, 4)
    assert processor(images, texts=["a", "b"]).text_ids.shape[0] == 2, "numbers of images and texts are free"


def test_batch_moves_tensors_casts_only_the_image_and_keeps_the_lengths(tokenizer):
    batch = Processor(tokenizer, 16)(images=[noise(20, 20)], texts=["a cat"])
    moved = batch.to("meta", torch.bfloat16)
    assert (moved.image.device.type, moved.image.dtype) == ("meta", torch.bfloat16)
    for tensor in (moved.text_ids, moved.padding_mask):
        assert (tensor.device.type, tensor.dtype) == ("meta", torch.int64)
    assert moved.text_lengths is batch.text_lengths
    assert batch.image.device.type == "cpu", "the batch itself stays"
    half = batch.to(dtype=torch.float16)
    assert torch.equal(half.image, batch.image.half())
    assert half.text_ids is batch.text_ids
    assert Batch().to("meta", torch.float16).image is None
    with pytest.raises(AttributeError):
        batch.image = None
    for dtype in (torch.int64, "float16"):
        with pytest.raises(TypeError, match="dtype must be a floating-point"):
            batch.to(dtype=dtype)


def test_a_default_device_changes_nothing(tokenizer):
    processor = Processor(tokenizer, 16)
    image = noise(20, 20)
    expected = processor(image, "a cat")
    with torch.device("meta"):
        batch = processor(image, "a cat")
    assert torch.equal(batch.image, expected.image)
    assert torch.equal(batch.text_ids, expected.text_ids)
    assert torch.equal(batch.padding_mask, expected.padding_mask)


def test_bad_processor_input(tokenizer):
    processor = Processor(tokenizer, 16)
    with pytest.raises(ValueError, match="images and texts are both None"):
        processor()
    with pytest.raises(ValueError, match="images must not be empty"):
        processor(images=[])
    with pytest.raises(ValueError, match="texts must not be empty"):
        processor(texts=[])
    with pytest.raises(TypeError, match="image must be a PIL image"):
        processor(images=3)
    with pytest.raises(ValueError, match="tokenizer of this Processor is None"):
        Processor(None, 16)(texts="a cat")
    with pytest.raises(TypeError, match=r"tokenizer must be .* got str"):
        Processor("beit3.spm", 16)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        Processor(tokenizer, 0)
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        Processor(tokenizer, 16, max_length=1)
    with pytest.raises(ValueError, match="pad_to must be one of"):
        Processor(tokenizer, 16, pad_to="shortest")


# -------------------------------------------------------------------------------------------------------- demo data


def test_demo_pairs_are_real_captioned_photos_with_a_licence():
    pairs = demo_pairs()
    assert len(pairs) == len({caption for _, caption in pairs}) == 6
    folder = pairs[0][0].parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path, _ in pairs)
    readme = (folder.parent / "README.md").read_text()
    entries = json.loads((folder.parent / "captions.json").read_text())
    for (path, caption), entry in zip(pairs, entries, strict=True):
        assert sorted(entry) == ["caption", "credit", "file", "licence"]
        assert entry["licence"] in ("public domain", "CC0 1.0")
        assert caption.endswith(".")
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{path.name}`"))
        assert f"| {entry['licence']} |" in row
        assert path.stat().st_size < 60_000
        with Image.open(path) as image:
            assert image.format == "JPEG"
            assert 256 < max(image.size) <= 512
            assert not image.getexif()
            assert len(image.convert("L").getcolors()) > 100, "a photo, not a drawing"


def test_demo_tokenizer_reads_the_captions(tokenizer):
    assert demo_tokenizer_path().stat().st_size < 100_000
    ids, _, lengths = tokenizer.encode([caption for _, caption in demo_pairs()])
    assert not ids.eq(tokenizer.unk_token_id).any()
    assert max(lengths) < 64
    printable = "".join(map(chr, range(32, 127)))
    assert 3 not in tokenizer.encode(printable, 200)[0]


def test_demo_tokenizer_holds_no_path_of_the_machine_that_made_it():
    content = demo_tokenizer_path().read_bytes()
    assert not re.search(rb"/\w+/\w", content)


# ---------------------------------------------------------------------------------------------------------- imports


def test_imports_neither_torchvision_nor_transformers_and_is_not_imported_by_the_package():
    program = (
        "import sys; sys.modules['torchvision'] = sys.modules['transformers'] = None\n"
        "import beit3_fast\n"
        "assert 'beit3_fast.processing' not in sys.modules and 'sentencepiece' not in sys.modules\n"
        "from beit3_fast.processing import *\n"
        "batch = Processor(Tokenizer(demo_tokenizer_path()), 8)(*map(list, zip(*demo_pairs())))\n"
        "assert batch.image.shape == (6, 3, 8, 8)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
