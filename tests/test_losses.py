"""Losses against the public ones, in value and gradient; the contrastive loss also over two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from beit3 import utils as public_utils
from torch import Tensor

import beit3_fast
from beit3_fast.models import BEiT3ForRetrieval, BertCaptioningLoss, ClipLoss, EncoderConfig, vqa_loss

SMALL = EncoderConfig(
    encoder_layers=1, encoder_embed_dim=8, encoder_attention_heads=2, encoder_ffn_embed_dim=8, vocab_size=20
)

# oracles.public is imported where it is used: run as a script, by each of two processes, this file needs less


def value_and_gradients(loss: Callable[..., Any], *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The loss at copies of `inputs` and its gradients; a tuple's first entry is the loss."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    value = value[0] if isinstance(value, tuple) else value
    return value.detach(), list(torch.autograd.grad(value, leaves))


def assert_agree(ours: Callable[..., Any], public: Callable[..., Any], *inputs: Tensor, rtol: float = 1e-12) -> None:
    value, gradients = value_and_gradients(ours, *inputs)
    expected, expected_gradients = value_and_gradients(public, *inputs)
    assert value.shape == ()
    assert value.dtype == expected.dtype
    torch.testing.assert_close(value, expected, rtol=rtol, atol=rtol)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        scale = wanted.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=rtol * scale)


# -------------------------------------------------------------------------------------------------------- captioning


@pytest.mark.parametrize("iteration", [0, 100, 101, 5000])
@pytest.mark.parametrize("drop_worst_ratio", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_captioning_loss(label_smoothing: float, drop_worst_ratio: float, iteration: int) -> None:
    arguments = (label_smoothing, drop_worst_ratio, 100)
    logits = torch.randn(23, 50, dtype=torch.float64) * 3
    target = torch.randint(50, (23,))
    target[:2] = torch.tensor([0, 49])
    ours, public = BertCaptioningLoss(*arguments), public_utils.BertCaptioningLoss(*arguments)
    assert_agree(lambda x: ours(x, target, iteration), lambda x: public(x, target, iteration), logits)


def test_dropping_the_worst_starts_after_the_threshold() -> None:
    logits, target = torch.randn(20, 30) * 4, torch.randint(30, (20,))
    loss = BertCaptioningLoss(0.1, 0.2, 100)
    before, at, after = (loss(logits, target, iteration) for iteration in (0, 100, 101))
    assert before == at > after
    (gradient,) = value_and_gradients(lambda x: loss(x, target, 101), logits)[1]
    assert (gradient.abs().sum(1) == 0).sum() == 4  # a fifth of 20 tokens teaches nothing


@pytest.mark.parametrize("num_classes", [2, 64010])
def test_captioning_loss_over_few_and_many_words(num_classes: int) -> None:
    """In fp32, as in training: the constant that stands for the entropy does not cost the small values their digits."""
    logits, target = torch.randn(5, num_classes), torch.randint(num_classes, (5,))
    ours, public = (cls(0.1, 0.2, 100) for cls in (BertCaptioningLoss, public_utils.BertCaptioningLoss))
    assert_agree(lambda x: ours(x, target, 0), lambda x: public(x, target, 0), logits, rtol=2e-6)
    assert_agree(lambda x: ours(x, target, 200), lambda x: public(x, target, 200), logits, rtol=2e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_captioning_loss_of_a_sure_prediction_is_finite(label_smoothing: float) -> None:
    target = torch.arange(6)
    logits = 200.0 * F.one_hot(target, 9).double()
    logits[0] = -logits[0]
    ours, public = (cls(label_smoothing, 0.0, 0) for cls in (BertCaptioningLoss, public_utils.BertCaptioningLoss))
    assert_agree(lambda x: ours(x, target, 1), lambda x: public(x, target, 1), logits)


def test_captioning_loss_has_the_public_minimum() -> None:
    """A Kullback-Leibler divergence: zero where the prediction is the smoothed target."""
    target = torch.randint(12, (7,))
    smoothed = torch.full((7, 12), 0.1 / 11, dtype=torch.float64).scatter_(1, target[:, None], 0.9)
    assert BertCaptioningLoss(0.1, 0.0, 0)(smoothed.log(), target, 1).abs() < 1e-12


def test_captioning_loss_in_the_public_handler() -> None:
    from oracles import public

    logits = torch.randn(11, 40, dtype=torch.float64)
    masked = torch.zeros(3, 7, dtype=torch.long)
    masked.view(-1)[:11] = 1
    tokens = torch.randint(40, (3, 7))
    handler = public.handler("captioning", label_smoothing=0.1, drop_worst_ratio=0.2, drop_worst_after=10)
    ours = BertCaptioningLoss(0.1, 0.2, 10)
    for step in (3, 30):
        batch = {"image": None, "padding_mask": None, "masked_tokens": None, "image_id": None, "global_step": step}

        def loss(x: Tensor, batch: dict[str, Any] = batch) -> Tensor:
            result = handler.train_batch(
                lambda **_: (x, None), language_tokens=tokens, language_masked_pos=masked, **batch
            )
            return result["loss"]

        assert_agree(lambda x, step=step: ours(x, tokens[masked.bool()], step), loss, logits)


# --------------------------------------------------------------------------------------------------------------- VQA


@pytest.mark.parametrize("answers", [1, 7, 3129])
def test_vqa_loss(answers: int) -> None:
    from oracles import public

    logits = torch.randn(4, answers, dtype=torch.float32) * 3
    labels = torch.tensor([0.0, 0.3, 0.6, 0.9, 1.0])[torch.randint(5, (4, answers))]
    handler = public.handler("vqav2")

    def loss(x: Tensor) -> Tensor:
        batch = {"image": None, "language_tokens": None, "padding_mask": None, "labels": labels}
        return handler.train_batch(lambda **_: x, **batch)["loss"]

    assert_agree(lambda x: vqa_loss(x, labels), loss, logits, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_vqa_loss_is_taken_in_fp32(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(2, 3129).to(dtype), torch.rand(2, 3129).to(dtype)
    loss = vqa_loss(logits, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, vqa_loss(logits.float(), labels.float()), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------------- contrastive


def unit_rows(rows: int, width: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator, dtype=dtype), dim=-1)


@pytest.mark.parametrize("cache_labels", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 9])
def test_clip_loss(batch_size: int, cache_labels: bool) -> None:
    image, text = unit_rows(batch_size, 16, 1), unit_rows(batch_size, 16, 2)
    scale = torch.tensor(13.0, dtype=torch.float64)
    ours, public = (cls(cache_labels=cache_labels) for cls in (ClipLoss, public_utils.ClipLoss))
    if batch_size > 1:
        assert_agree(ours, public, image, text, scale)
    for _ in range(2):  # with cached labels, too
        for actual, expected in zip(ours(image, text, scale), public(image, text, scale), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    half = slice(0, max(batch_size // 2, 1))  # a last batch that is smaller
    torch.testing.assert_close(ours(image[half], text[half], scale)[0], public(image[half], text[half], scale)[0])


def test_clip_loss_has_no_state() -> None:
    """As in the public code, a checkpoint has nothing of it."""
    assert ClipLoss().state_dict() == {}
    assert list(ClipLoss().parameters()) == []
    assert isinstance(BEiT3ForRetrieval(SMALL).criterion, ClipLoss)


WORLD, PAIRS, WIDTH = 2, 3, 8
SCALE = 11.0


def run_rank(rank: int, folder: str) -> None:
    """One of two processes: both losses and every gradient, with a weight per rank so that no rank hides another."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    image, text = (unit_rows(WORLD * PAIRS, WIDTH, seed).chunk(WORLD)[rank] for seed in (1, 2))
    scale = torch.tensor(SCALE, dtype=torch.float64)
    results: dict[str, Any] = {}
    for weights in ((1.0, 1.0), (1.0, 3.0)):
        for name, module in (("ours", ClipLoss), ("public", public_utils.ClipLoss)):
            criterion = module(rank=rank, world_size=WORLD)
            leaves = [tensor.clone().requires_grad_() for tensor in (image, text, scale)]
            loss, per_image, per_text = criterion(*leaves)
            (loss * weights[rank]).backward()
            results[f"{name} {weights}"] = {
                "loss": loss.detach(),
                "logits_per_image": per_image.detach(),
                "logits_per_text": per_text.detach(),
                **dict(zip(("image", "text", "scale"), (leaf.grad for leaf in leaves), strict=True)),
            }
    criterion = BEiT3ForRetrieval(SMALL).criterion
    results["criterion"] = (criterion.rank, criterion.world_size)
    torch.save(results, Path(folder) / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(beit3_fast.__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(folder)], env=environment) for rank in range(WORLD)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * WORLD
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0)])
def test_clip_loss_of_two_processes_is_the_public_one(ranks: list[dict[str, Any]], weights: tuple[float, ...]) -> None:
    for rank in ranks:
        ours, public = rank[f"ours {weights}"], rank[f"public {weights}"]
        assert ours.keys() == public.keys()
        for name, expected in public.items():
            assert expected.abs().max() > 0
            torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-12, msg=name)
        assert ours["logits_per_image"].shape == (PAIRS, WORLD * PAIRS)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0)])
def test_clip_loss_of_two_processes_is_that_of_one(ranks: list[dict[str, Any]], weights: tuple[float, ...]) -> None:
    """Each rank's loss is the cross entropy of its own rows among all pairs, computed here with no process at all."""
    leaves = [unit_rows(WORLD * PAIRS, WIDTH, seed).requires_grad_() for seed in (1, 2)]
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    logits = scale * leaves[0] @ leaves[1].T
    labels = torch.arange(WORLD * PAIRS)
    per_pair = (
        F.cross_entropy(logits, labels, reduction="none") + F.cross_entropy(logits.T, labels, reduction="none")
    ) / 2
    losses = per_pair.view(WORLD, PAIRS).mean(1)
    sum(weight * loss for weight, loss in zip(weights, losses, strict=True)).backward()
    found = [rank[f"ours {weights}"] for rank in ranks]
    torch.testing.assert_close(torch.stack([rank["loss"] for rank in found]), losses.detach())
    for name, leaf in zip(("image", "text"), leaves, strict=True):
        torch.testing.assert_close(torch.cat([rank[name] for rank in found]), leaf.grad, msg=name)
    torch.testing.assert_close(sum(rank["scale"] for rank in found), scale.grad)
    if weights == (1.0, 1.0):
        single = ClipLoss()(leaves[0], leaves[1], scale)[0]
        torch.testing.assert_close(torch.stack([rank["loss"] for rank in found]).mean(), single.detach())


def test_the_retrieval_model_finds_its_process(ranks: list[dict[str, Any]]) -> None:
    assert [rank["criterion"] for rank in ranks] == [(0, WORLD), (1, WORLD)]


if __name__ == "__main__":
    run_rank(int(sys.argv[1]), sys.argv[2])
