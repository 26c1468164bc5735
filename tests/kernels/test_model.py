"""A tiny BEiT-3 through Triton launches, all but its LayerNorms: outputs, gradients, captions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import public
from oracles.pairs import assert_outputs_close, fast_copy, pair

import beit3_fast
from beit3_fast.models import released_gradients

from .conftest import INTERPRETED

# fp32 sums in another order than the public model's; what one launch may differ by is tested launch by launch
TOLERANCE = 1e-4
HEADS = ("nlvr2", "retrieval") if INTERPRETED else public.HEADS  # the interpreter takes 20 seconds a head


@pytest.mark.parametrize("head", HEADS)
def test_forward_and_backward(launches: Any, head: str) -> None:
    """The public handler's loss and the backward pass, against the plain PyTorch backend."""
    _, ours = pair(head)
    batch = public.training_batch(head, padding="padded")
    results = []
    for backend in ("reference", "triton"):
        ours.zero_grad(set_to_none=True)
        context = launches(check_races=False) if backend == "triton" else beit3_fast.use_backend(backend)
        with context as log:
            loss = public.handler(head).train_batch(ours, **batch)["loss"]
            loss.backward()
        results.append((loss.detach(), released_gradients(ours)))
    if not INTERPRETED:
        names = {name for name, _ in log}
        assert names >= {"_linear_kernel", "_fc1_kernel", "_fc2_kernel", "_hidden_gradient_kernel"}
        assert names >= {"_attention_kernel", "_key_gradient_kernel", "_query_gradient_kernel"}
    (expected_loss, expected), (loss, actual) = results
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    largest = max(grad.abs().max().item() for grad in expected.values() if grad is not None)
    for key, grad in expected.items():
        if grad is None:
            continue
        scale = max(grad.abs().max().item(), 1e-3 * largest)
        assert (actual[key] - grad).abs().max().item() <= TOLERANCE * scale, key


@pytest.mark.parametrize("head", ["vqav2"])
def test_outputs_are_the_public_model_s(launches: Any, head: str) -> None:
    reference, ours = pair(head)
    batch = public.training_batch(head, padding="padded")
    with torch.no_grad():
        expected = public.outputs(reference, head, batch)
        with launches():
            actual = public.outputs(ours, head, batch)
    assert_outputs_close(actual, expected, head)


@pytest.mark.simulated_only
def test_captions_by_beam_search(launches: Any) -> None:
    reference = public.public_model("captioning", vocab_size=200)
    with torch.no_grad():
        reference.mlm_head.weight.mul_(3.0)
    ours = fast_copy(reference, "captioning")
    image = torch.randn(2, 3, 32, 32)
    options = {"num_beams": 2, "max_length": 6, "bos_token_id": 0, "eos_token_id": 2, "mask_token_id": 199}
    expected = ours.generate(image, **options)
    with launches(check_races=False) as log:
        actual = ours.generate(image, **options)
    assert "_decode_kernel" in {name for name, _ in log}
    assert [list(tokens) for tokens in actual.tokens] == [list(tokens) for tokens in expected.tokens]
    assert list(actual.scores) == pytest.approx(list(expected.scores), rel=1e-4)


@pytest.mark.simulated_only
def test_bf16_forward_and_backward(launches: Any) -> None:
    """In bf16 our error against fp32 is no larger than that of plain PyTorch in bf16."""
    _, ours = pair("vqav2")
    batch = public.training_batch("vqav2", padding="padded")
    with torch.no_grad():
        exact = public.outputs(ours, "vqav2", batch)
        ours.bfloat16()
        batch = {k: v.bfloat16() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in batch.items()}
        errors = []
        for backend in ("reference", "triton"):
            context = launches(check_races=False) if backend == "triton" else beit3_fast.use_backend(backend)
            with context:
                actual = public.outputs(ours, "vqav2", batch)
            errors.append(max((actual[name].float() - exact[name]).abs().max().item() for name in exact))
    assert errors[1] <= 2 * errors[0]


def test_optimized_copy_needs_two_launches_a_feed_forward_block(launches: Any) -> None:
    _, ours = pair("vqav2")
    batch = public.training_batch("vqav2", padding="padded")
    copy = beit3_fast.optimize(ours)
    with torch.no_grad():
        expected = public.outputs(ours, "vqav2", batch)
        with launches(check_races=False) as log:
            actual = public.outputs(copy, "vqav2", batch)
    assert_outputs_close(actual, expected, "vqav2")
    assert "_fold_kernel" not in {name for name, _ in log}
