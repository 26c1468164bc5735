"""Reference PyTorch is the public code: the same bits out, from the same operations in the same order."""

from __future__ import annotations

import contextlib

import pytest
import torch
from beit3_fast.bench import reference
from oracles import public as oracle
from torch.utils._python_dispatch import TorchDispatchMode

BATCH, TEXT = 3, 7


def config(**overrides):
    settings = {
        "encoder_embed_dim": 48,
        "encoder_attention_heads": 4,
        "encoder_ffn_embed_dim": 80,
        "encoder_layers": 3,
        "img_size": 32,
        "patch_size": 16,
        "vocab_size": 50,
        "max_source_positions": 20,
        "multiway": True,
        "normalize_output": True,
        "no_output_layer": True,
    }
    return oracle.EncoderConfig(**{**settings, **overrides})


def randomised(module, dtype):
    """Nothing at its default: identical LayerNorms or zero tokens would hide a swap of experts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.1)
    return module.to(dtype)


class Recorder(TorchDispatchMode):
    """Every aten operation with the shapes, strides and dtypes it got, in order.

    Not for inference mode: there PyTorch also reports calls that return their input untouched (dropout with p = 0),
    which reference PyTorch leaves out.
    """

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations.append((str(func), self._describe(args), self._describe(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def _describe(self, value):
        if isinstance(value, torch.Tensor):
            return ("tensor", tuple(value.shape), value.stride(), value.dtype)
        if isinstance(value, (list, tuple)):
            return tuple(map(self._describe, value))
        if isinstance(value, dict):
            return tuple((key, self._describe(item)) for key, item in sorted(value.items()))
        return value


def record(call):
    with Recorder() as recorder:
        result = call()
    return result, recorder.operations


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(BATCH, 3, 32, 32, generator=generator)
    ids = torch.randint(0, 50, (BATCH, TEXT), generator=generator)
    padding = (torch.arange(TEXT) >= torch.tensor([[4], [7], [2]])).long()
    return image, ids, padding


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"])
def dtype(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["normalised", "not normalised"])
def backbones(request, dtype):
    public = randomised(oracle.BEiT3(config(normalize_output=request.param)), dtype).eval()
    ours = reference.BEiT3(config(normalize_output=request.param)).to(dtype).eval()
    ours.load_state_dict(public.state_dict(), strict=True)
    return ours, public


def inputs(mode, batch, dtype):
    image, ids, padding = batch
    image = image.to(dtype)
    return {
        "joint padded": {"textual_tokens": ids, "visual_tokens": image, "text_padding_position": padding},
        "joint bool mask": {"textual_tokens": ids, "visual_tokens": image, "text_padding_position": padding.bool()},
        "joint": {"textual_tokens": ids, "visual_tokens": image},
        "image": {"visual_tokens": image},
        "text padded": {"textual_tokens": ids, "text_padding_position": padding},
        "text": {"textual_tokens": ids},
    }[mode]


MODES = ["joint padded", "joint bool mask", "joint", "image", "text padded", "text"]


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_backbone_gives_the_public_bits_from_the_public_operations(mode, batch, dtype, backbones):
    ours, public = backbones
    call = inputs(mode, batch, dtype)
    out, operations = record(lambda: ours(**call))
    expected, expected_operations = record(lambda: public(**call))
    assert torch.equal(out["encoder_out"], expected["encoder_out"])
    assert torch.equal(out["encoder_embedding"], expected["encoder_embedding"])
    assert out["multiway_split_position"] == expected["multiway_split_position"]
    assert operations == expected_operations
    assert len(operations) > 100


@pytest.mark.parametrize("mode", MODES)
def test_the_fused_attention_computes_the_same(mode, batch):
    explicit = randomised(reference.BEiT3(config()), torch.float64)
    fused = reference.BEiT3(config(), attention="sdpa").double()
    fused.load_state_dict(explicit.state_dict(), strict=True)
    call = inputs(mode, batch, torch.float64)
    valid = torch.ones(explicit(**call)["encoder_out"].shape[:2], dtype=torch.bool)
    if "text_padding_position" in call:
        valid[:, -TEXT:] = call["text_padding_position"] == 0
    outs = [backbone(**call)["encoder_out"][valid] for backbone in (explicit, fused)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-10, atol=1e-10)
    gradients = [
        torch.autograd.grad(out.square().sum(), backbone.encoder.layers[0].self_attn.k_proj.A.weight, allow_unused=True)
        for out, backbone in zip(outs, (explicit, fused), strict=True)
    ]
    if "visual_tokens" in call:
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)


def test_the_fused_attention_has_a_mask_only_where_texts_are_padded(batch, monkeypatch):
    masks = []
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask=None: masks.append(attn_mask) or sdpa(q, k, v, attn_mask=attn_mask),
    )
    backbone = reference.BEiT3(config(), attention="sdpa")
    backbone(**inputs("joint", batch, torch.float32))
    assert masks == [None] * 3
    backbone(**inputs("joint padded", batch, torch.float32))
    assert torch.equal(masks[-1][:, 0, 0, -TEXT:], batch[2] == 0)
    assert masks[-1][:, 0, 0, :-TEXT].all()


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="attention must be one of 'explicit', 'sdpa', got 'flash'"):
        reference.BEiT3(config(), attention="flash")


@pytest.mark.parametrize("mode", MODES)
def test_backbone_under_autocast(mode, batch):
    public = randomised(oracle.BEiT3(config()), torch.float32).eval()
    ours = reference.BEiT3(config()).eval()
    ours.load_state_dict(public.state_dict())
    call = inputs(mode, batch, torch.float32)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        out, operations = record(lambda: ours(**call))
        expected, expected_operations = record(lambda: public(**call))
    assert torch.equal(out["encoder_out"], expected["encoder_out"])
    assert operations == expected_operations


@pytest.mark.parametrize("mode", MODES)
def test_backbone_gradients(mode, batch, dtype, backbones):
    ours, public = backbones
    call = inputs(mode, batch, dtype)

    def step(model):
        model.train()
        out = model(**call)["encoder_out"]
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(dtype)
        (out * weights).sum().backward()

    _, operations = record(lambda: step(ours))
    _, expected_operations = record(lambda: step(public))
    assert operations == expected_operations
    expected = dict(public.named_parameters())
    used = 0
    for name, parameter in ours.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None, name
        else:
            used += 1
            assert torch.equal(parameter.grad, expected[name].grad), name
    assert used > 50


@pytest.fixture
def retrievers(dtype):
    public = randomised(oracle.modeling.BEiT3ForRetrieval(config()), dtype)
    ours = reference.BEiT3ForRetrieval(config()).to(dtype)
    ours.load_state_dict(public.state_dict(), strict=True)
    return ours, public


@pytest.mark.parametrize("present", ["both", "image", "text", "text unpadded"])
@torch.no_grad()
def test_retrieval_vectors(present, batch, dtype, retrievers):
    ours, public = retrievers
    image, ids, padding = batch
    call = {
        "image": image.to(dtype) if present in ("both", "image") else None,
        "text_description": ids if present != "image" else None,
        "padding_mask": padding if present in ("both", "text") else None,
        "only_infer": True,
    }
    vectors, operations = record(lambda: ours.eval()(**call))
    expected, expected_operations = record(lambda: public.eval()(**call))
    for ours_vector, public_vector in zip(vectors, expected, strict=True):
        assert (ours_vector is None) == (public_vector is None)
        assert ours_vector is None or torch.equal(ours_vector, public_vector)
    assert operations == expected_operations


def test_retrieval_loss_and_gradients(batch, dtype, retrievers):
    ours, public = retrievers
    image, ids, padding = batch

    def step(model):
        loss, vision, language = model.train()(image.to(dtype), ids, padding)
        loss.backward()
        return loss.detach(), vision.detach(), language.detach()

    results, operations = record(lambda: step(ours))
    expected, expected_operations = record(lambda: step(public))
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))
    assert operations == expected_operations
    gradients = {name: p.grad for name, p in public.named_parameters()}
    for name, parameter in ours.named_parameters():
        same = parameter.grad is None if gradients[name] is None else torch.equal(parameter.grad, gradients[name])
        assert same, name


def test_state_dict_keys_and_order_are_the_released_ones():
    public = oracle.modeling.BEiT3ForRetrieval(config()).state_dict()
    ours = reference.BEiT3ForRetrieval(config()).state_dict()
    assert list(ours) == list(public)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in public.items()}


@torch.inference_mode()
def test_float64_is_a_truth(batch):
    """The public code rounds GELU and softmax to float32 in a float64 module; a truth must not."""
    public = randomised(oracle.BEiT3(config()), torch.float64).eval()
    truth = reference.BEiT3(config()).double().eval()
    truth.load_state_dict(public.state_dict())
    call = inputs("joint padded", batch, torch.float64)

    def without_rounding(module, patched):
        with contextlib.ExitStack() as stack:
            if patched:  # the public code with its two casts to float32 taken out
                stack.enter_context(pytest.MonkeyPatch.context()).setattr(torch.Tensor, "float", torch.Tensor.double)
                softmax = torch.nn.functional.softmax
                stack.enter_context(pytest.MonkeyPatch.context()).setattr(
                    torch.nn.functional, "softmax", lambda x, dim, dtype: softmax(x, dim=dim, dtype=torch.float64)
                )
            return module(**call)["encoder_out"]

    out = without_rounding(truth, patched=False)
    scale = out.abs().max()
    assert (out - without_rounding(public, patched=True)).abs().max() <= 1e-13 * scale
    assert (out - without_rounding(public, patched=False)).abs().max() > 1e-10 * scale


def test_with_weights_owns_its_memory_and_is_strict(batch):
    source = randomised(reference.BEiT3(config()), torch.float32)
    weights = source.state_dict()
    copy = reference.with_weights(lambda: reference.BEiT3(config()), weights, device="cpu", dtype=torch.float32)
    assert not copy.training
    image, ids, padding = batch
    with torch.inference_mode():
        expected = source.eval()(ids, image, padding)["encoder_out"]
        assert torch.equal(copy(ids, image, padding)["encoder_out"], expected)
        source.text_embed.weight.zero_()
        assert torch.equal(copy(ids, image, padding)["encoder_out"], expected)
    del weights["text_embed.weight"]
    with pytest.raises(RuntimeError, match=r"text_embed\.weight"):
        reference.with_weights(lambda: reference.BEiT3(config()), weights, device="cpu", dtype=torch.float32)


def test_what_the_reference_does_not_do_is_refused(batch):
    with pytest.raises(ValueError, match=r"drop_path_rate must be 0 in reference PyTorch, got 0\.1"):
        reference.BEiT3(config(drop_path_rate=0.1))
    model = reference.BEiT3(config())
    with pytest.raises(ValueError, match="got neither"):
        model()
    with pytest.raises(ValueError, match="32 x 32"):
        model(visual_tokens=torch.zeros(1, 3, 16, 16))
