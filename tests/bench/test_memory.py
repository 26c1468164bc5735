"""``bench memory``: allocations followed one by one, against sums made by hand and against the public code."""

from __future__ import annotations

import json
import warnings

import beit3_fast.bench.command as command
import beit3_fast.bench.memory as memory
import pytest
import torch
import torch.nn.functional as F
from beit3_fast.bench.memory import Memory, MemoryCase

pytest.importorskip("triton")

SMALL = MemoryCase("small", "base", 1 + 3**2, 4)


def leaf(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("data", [True, False], ids=["with data", "without"])
class TestByHand:
    """x is 4 x 8, w 8 x 16, all in fp32: x 128 bytes, a product 256, w and its gradient 512."""

    def step(self, data, run, *shapes):
        if data:
            tensors = [torch.rand(*shape, requires_grad=True) for shape in shapes]
            return memory.training_step(lambda: run(*tensors), tensors[1:])
        with memory._without_data(torch.float32):
            tensors = [leaf(*shape) for shape in shapes]
            return memory.training_step(lambda: run(*tensors), tensors[1:])

    def test_a_product(self, data):
        # out; then dout and dx beside it
        assert self.step(data, lambda x, w: x @ w, (4, 8), (8, 16)) == Memory(256, 256 + 256 + 128)

    def test_what_an_activation_keeps(self, data):
        # exp keeps its result, which is the output; the product dies in the forward; in the backward there are the
        # output, dout, the gradient of the product and dx
        assert self.step(data, lambda x, w: (x @ w).exp(), (4, 8), (8, 16)) == Memory(256, 3 * 256 + 128)
        # sin keeps the product; its backward makes cos of it first, then the product with dout
        assert self.step(data, lambda x, w: (x @ w).sin(), (4, 8), (8, 16)) == Memory(2 * 256, 5 * 256)

    def test_views_and_work_in_place_are_free(self, data):
        def run(x, w):
            return (x @ w).view(2, 2, 16).transpose(0, 1).mul_(2)

        assert self.step(data, run, (4, 8), (8, 16)).kept == 256

    def test_what_dies_in_the_forward_counts_at_the_peak(self, data):
        def run(x, w):
            return (x @ w).repeat(100, 1)[:1]

        assert self.step(data, run, (4, 8), (8, 16)).peak >= 256 + 100 * 256

    def test_gradients_of_parameters_do_not_count(self, data):
        def run(x, w):
            return x * w.sum()

        # sum and out are kept; then dout, dx, dout * x and its sum; w's gradient of 40 kB is none of our business
        assert self.step(data, run, (4, 8), (100, 100)).peak < 10 * 128


def test_a_kernels_own_rows_count():
    rows, width, hidden = 24, 32, 64
    with memory._without_data(torch.float32), memory.use_backend("triton"):
        x = leaf(rows, width)
        parameters = [leaf(2, hidden, width), leaf(2, hidden), leaf(2, hidden), leaf(2, hidden)]
        parameters += [leaf(2, width, hidden), leaf(2, width)]
        offsets = SMALL_OFFSETS
        counted = memory.training_step(lambda: memory.ops.multiway_ffn(x, *parameters, offsets), parameters)
    row = 4 * rows
    saved = row * (hidden + 1 + 1 + width) + 4 * 2 * 2 * width  # pre-activation, mean, rstd, branch; folded affine
    assert counted.kept == saved + row * width
    assert counted.peak == counted.kept + row * width + 2 * row * hidden + row * width  # dout, workspace, dx


SMALL_OFFSETS = torch.tensor([0, 20, 24], dtype=torch.int32)


def test_public_softmax_is_one_kernel_as_on_a_gpu():
    def run(scores):
        return F.softmax(scores, dim=-1, dtype=torch.float32)

    with memory._without_data(torch.bfloat16):
        scores = torch.empty(10, 10, requires_grad=True)
        converted = memory.training_step(lambda: run(scores), [])
        with memory._CudaSoftmax():
            fused = memory.training_step(lambda: run(scores), [])
    assert fused == Memory(400, 400 + 400 + 200)
    assert converted.peak > fused.peak


@pytest.mark.parametrize("part", memory.PARTS)
@pytest.mark.parametrize("case", [*memory.MEMORY_CASES, SMALL], ids=lambda case: case.name)
def test_public_is_what_the_public_code_allocates(case, part):
    """To the byte."""
    from oracles import public as oracle
    from torchscale.architecture.encoder import EncoderLayer
    from torchscale.component.multiway_network import set_split_position

    config = memory._config(case)
    released = oracle.EncoderConfig(
        encoder_embed_dim=config.encoder_embed_dim,
        encoder_attention_heads=config.encoder_attention_heads,
        encoder_ffn_embed_dim=config.encoder_ffn_embed_dim,
        encoder_layers=config.encoder_layers,
        multiway=True,
        no_output_layer=True,
    )
    with warnings.catch_warnings(), memory._without_data(case.dtype), memory._CudaSoftmax():
        warnings.simplefilter("ignore")
        layer = EncoderLayer(released, 0)
        layer.apply(set_split_position(case.vision_tokens))
        for module in layer.modules():  # its experts are deep copies, whose views do not share memory without data
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(torch.empty(parameter.shape)))
        tokens = case.vision_tokens + case.text_tokens
        x = torch.empty(1, tokens, config.encoder_embed_dim, requires_grad=True)
        padding = torch.zeros(1, tokens, dtype=torch.bool)

        def run():
            if part == "layer":
                return layer(x, padding)[0]
            return layer.self_attn(query=x, key=x, value=x, key_padding_mask=padding)[0]

        released_step = memory.training_step(run, layer.parameters())
    assert released_step == memory.public(case, part)


def test_ours_by_hand():
    tokens, width, heads = 14, 768, 12
    rows = 2 * tokens * width  # bytes of N x D in bfloat16
    statistics = 4 * tokens * (heads + 2)  # log-sum-exp of attention, mean and rstd of the LayerNorm
    # q/k/v, attention's output, the normed rows; the block's output
    assert memory.ours(SMALL, "attention").kept == (3 + 1 + 1 + 1) * rows + statistics
    # the two other LayerNorms with their rows; then the block's pre-activation, branch, statistics and folded affine
    statistics += 4 * tokens * (2 + 2 + 2) + 4 * 2 * 2 * width
    assert memory.ours(SMALL, "layer").kept == (6 + 1 + 1 + 4 + 1 + 1) * rows + statistics


def test_ours_is_several_times_smaller():
    for case in memory.MEMORY_CASES:
        for part in memory.PARTS:
            ours, public = memory.ours(case, part), memory.public(case, part)
            assert 3 * ours.peak < public.peak
            assert 4 * ours.kept < public.kept


def test_nothing_of_ours_grows_with_the_square_of_the_tokens():
    def peak(side):
        return memory.ours(MemoryCase("square", "base", 1 + side**2, text_tokens=side**2 - 1), "layer").peak

    assert peak(20) == pytest.approx(4 * peak(10), rel=0.02)


def test_defaults_come_back():
    def fail():
        with memory._without_data(torch.bfloat16):
            assert torch.get_default_dtype() == torch.bfloat16
            raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        fail()
    assert torch.get_default_dtype() == torch.float32


def test_command(tmp_path, capsys, monkeypatch):
    target = tmp_path / "memory.json"
    assert command.run(command.memory, json_file=target)
    printed = capsys.readouterr().out
    for words in ("base@480", "large@768", "901 + 64", "2305 + 64", "MB"):
        assert words in printed
    kept = json.loads(target.read_text())
    assert (kept["schema"], kept["kind"]) == (1, "memory")
    assert [(result["case"]["name"], result["part"]) for result in kept["results"]] == [
        ("base@480", "attention"),
        ("base@480", "layer"),
        ("large@768", "attention"),
        ("large@768", "layer"),
    ]
    assert kept["results"][0]["case"]["dtype"] == "bfloat16"
    assert set(kept["results"][0]["ours"]) == set(kept["results"][0]["public"]) == {"kept", "peak"}
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="triton is not installed"):
        command.run(command.memory)
