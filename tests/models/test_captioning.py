"""Captioning: the incremental protocol and beam search against the unmodified public generation loop."""

from __future__ import annotations

import inspect

import pytest
import torch
from oracles import public
from oracles.pairs import assert_close, fast_copy, pair

IMAGE_LEN = 17
SMALL = {"bos_token_id": 0, "eos_token_id": 2, "mask_token_id": 199}


def model_pair(
    seed: int = 0, *, eos_bias: float = 0.0, sharpness: float = 3.0, vocab_size: int = 200
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """(public, ours) with the EOS logit raised or lowered.

    `sharpness` scales the logits: with unit logits every caption would be decided by the length penalty alone.
    """
    reference = public.public_model("captioning", seed=seed, vocab_size=vocab_size)
    with torch.no_grad():
        reference.mlm_head.weight.mul_(sharpness)
        reference.mlm_head.bias[public.EOS] += eos_bias
    return reference, fast_copy(reference, "captioning")


def images(batch: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------- full forward


@pytest.mark.parametrize("padding", ["padded", "unpadded", "none"])
def test_logits_of_every_position(padding: str) -> None:
    reference, ours = pair("captioning")
    data = public.inputs(padding=padding)
    valid = torch.arange(9)[None, :] < torch.tensor(data["lengths"])[:, None]
    with torch.no_grad():
        expected, state = reference(data["image"], data["tokens"], data["mask"], None)
        actual, our_state = ours(data["image"], data["tokens"], data["mask"], None)
    assert state is None
    assert our_state is None
    assert actual.shape == expected.shape
    assert_close(actual[valid], expected[valid], "logits")


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_masked_positions_come_in_reading_order(dtype: torch.dtype) -> None:
    reference, ours = pair("captioning")
    data = public.inputs()
    chosen = torch.zeros(3, 9, dtype=dtype)
    for row, column in ((0, 1), (1, 3), (1, 1), (2, 2)):
        chosen[row, column] = 1
    with torch.no_grad():
        actual = ours(data["image"], data["tokens"], data["mask"], chosen)[0]
        assert_close(actual, reference(data["image"], data["tokens"], data["mask"], chosen)[0], "masked")
    assert actual.shape == (4, 200)


def test_no_masked_position_gives_no_row() -> None:
    _, ours = pair("captioning")
    data = public.inputs()
    with torch.no_grad():
        actual = ours(data["image"], data["tokens"], data["mask"], torch.zeros(3, 9, dtype=torch.long))[0]
    assert actual.shape == (0, 200)


def test_a_token_does_not_see_later_text_and_the_image_sees_no_text() -> None:
    _, ours = pair("captioning")
    data = public.inputs(padding="unpadded")
    changed = data["tokens"].clone()
    changed[:, 5:] = 50
    with torch.no_grad():
        before = ours(data["image"], data["tokens"], data["mask"], None)[0]
        after = ours(data["image"], changed, data["mask"], None)[0]
    torch.testing.assert_close(after[:, :5], before[:, :5], rtol=1e-5, atol=1e-5)
    assert (after[:, 5:] - before[:, 5:]).abs().max() > 1e-2


# ----------------------------------------------------------------------------------------------- incremental protocol


def decode(model: torch.nn.Module, image: torch.Tensor, words: torch.Tensor, mask_id: int) -> list[torch.Tensor]:
    """Feed `words` one at a time by the public protocol; the two rows of logits of every step."""
    steps = []
    state: dict[int, dict[str, torch.Tensor]] = {}
    batch = image.shape[0]
    for step in range(words.shape[1]):
        text = torch.stack([words[:, step], torch.full((batch,), mask_id)], dim=1)
        logits, state = model(
            image=image if step == 0 else None,
            text_ids=text,
            language_masked_pos=None,
            padding_mask=torch.zeros_like(text),
            text_len=step + 2,
            incremental_state=state,
        )
        steps.append(logits)
        for layer in state:  # the MASK that was read leaves the cache
            for key in state[layer]:
                state[layer][key] = state[layer][key][:, :, :-1, :]
    return steps


@pytest.mark.parametrize("batch", [1, 3])
def test_incremental_decoding_equals_full_recomputation_and_public(batch: int) -> None:
    reference, ours = pair("captioning")
    words = torch.randint(4, 190, (batch, 7))
    words[:, 0] = public.BOS
    with torch.no_grad():
        steps = decode(ours, images(batch), words, 199)
        expected = decode(reference, images(batch), words, 199)
        for step, logits in enumerate(steps):
            assert_close(logits, expected[step], f"step {step}")
            text = torch.cat([words[:, : step + 1], torch.full((batch, 1), 199)], dim=1)
            full = ours(images(batch), text, torch.zeros_like(text), None)[0]
            assert_close(logits, full[:, -2:], f"step {step} against full recomputation")


def test_incremental_state_has_the_public_shapes_and_values() -> None:
    reference, ours = pair("captioning")
    text = torch.tensor([[0, 199], [0, 199]])
    states = []
    for model in (reference, ours):
        with torch.no_grad():
            _, state = model(images(2), text, torch.zeros_like(text), None, text_len=2, incremental_state={})
        states.append(state)
    expected, actual = states
    assert set(actual) == set(expected) == {0, 1, 2}
    for layer in expected:
        assert set(actual[layer]) == {"prev_key", "prev_value"}
        for key in expected[layer]:
            assert actual[layer][key].shape == (2, 4, IMAGE_LEN + 2, 12)
            assert_close(actual[layer][key], expected[layer][key], f"layer {layer} {key}")


def test_a_state_of_the_public_model_carries_over() -> None:
    """The two implementations may take turns."""
    reference, ours = pair("captioning")
    text = torch.tensor([[0, 199]])
    for first, second in ((reference, ours), (ours, reference)):
        with torch.no_grad():
            _, state = first(images(1), text, None, None, text_len=2, incremental_state={})
            state = {layer: {key: value[:, :, :-1] for key, value in entry.items()} for layer, entry in state.items()}
            following = torch.tensor([[17, 199]])
            actual, _ = second(None, following, None, None, text_len=3, incremental_state=state)
            full = reference(images(1), torch.tensor([[0, 17, 199]]), None, None)[0][:, -2:]
        assert_close(actual, full, "after the change")


def test_reordered_states() -> None:
    """Beam search permutes the cache's rows between steps."""
    _, ours = pair("captioning")
    words = torch.tensor([[0, 10, 20], [0, 30, 40]])
    order = torch.tensor([1, 1])
    with torch.no_grad():
        state: dict = {}
        for step in range(2):
            text = torch.stack([words[:, step], torch.full((2,), 199)], dim=1)
            _, state = ours(
                images(2) if step == 0 else None, text, None, None, text_len=step + 2, incremental_state=state
            )
            for layer in state:
                for key in state[layer]:
                    state[layer][key] = state[layer][key][:, :, :-1]
        for layer in state:
            for key in state[layer]:
                state[layer][key] = state[layer][key].index_select(0, order)
        text = torch.stack([words[order, 2], torch.full((2,), 199)], dim=1)
        actual, _ = ours(None, text, None, None, text_len=4, incremental_state=state)
        full_text = torch.cat([words[order], torch.full((2, 1), 199)], dim=1)
        full = ours(images(2)[order], full_text, None, None)[0][:, -2:]
    assert_close(actual, full, "reordered")


# ------------------------------------------------------------------------------------------------------ beam search


def decoded(ours: torch.nn.Module, image: torch.Tensor, **settings: object) -> tuple[list[list[int]], list[float]]:
    result = ours.generate(image, **settings)
    scores = result.scores.tolist() if isinstance(result.scores, torch.Tensor) else list(result.scores)
    return [[token for token in row if token != public.UNK] for row in result.tokens], scores


@pytest.mark.parametrize("num_beams", [1, 3, 5])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_public_loop_runs_unmodified_on_our_model(batch: int, num_beams: int) -> None:
    reference, ours = model_pair(seed=batch, eos_bias=6.0)
    settings = {"num_beams": num_beams, "max_length": 10, "vocab_size": 200, "mask_token_id": 199}
    tokens, scores = public.generate(reference, images(batch), **settings)
    our_tokens, our_scores = public.generate(ours, images(batch), **settings)
    assert our_tokens == tokens
    assert our_scores == pytest.approx(scores, rel=1e-4)


@pytest.mark.parametrize("eos_bias", [-1e4, 0.0, 6.0, 9.0], ids=["never", "unbiased", "sometimes", "early"])
@pytest.mark.parametrize("num_beams", [1, 3, 5])
def test_generate_returns_the_public_tokens(num_beams: int, eos_bias: float) -> None:
    for seed, (batch, max_length) in enumerate(((1, 12), (2, 12), (3, 12), (3, 5), (2, 3), (1, 4))):
        reference, ours = model_pair(seed=seed, eos_bias=eos_bias)
        settings = {"num_beams": num_beams, "max_length": max_length}
        image = images(batch, seed)
        tokens, scores = public.generate(reference, image, vocab_size=200, mask_token_id=199, **settings)
        our_tokens, our_scores = decoded(ours, image, **settings, **SMALL)
        assert our_tokens == tokens, f"seed {seed}, batch {batch}, max_length {max_length}"
        assert our_scores == pytest.approx(scores, rel=1e-4), f"seed {seed}, batch {batch}, max_length {max_length}"


def test_the_search_above_meets_every_ending() -> None:
    """Guards the tests, not the code: captions must end at once, by EOS on the way, and by the length limit."""
    lengths = set()
    for eos_bias in (-1e4, 0.0, 6.0, 9.0):
        for seed in range(3):
            reference, _ = model_pair(seed=seed, eos_bias=eos_bias)
            settings = {"num_beams": 3, "max_length": 12, "vocab_size": 200, "mask_token_id": 199}
            lengths |= {len(row) for row in public.generate(reference, images(3, seed), **settings)[0]}
    assert {0, 9} <= lengths
    assert lengths & set(range(2, 9))


@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 1.0, 2.0])
def test_length_penalty(length_penalty: float) -> None:
    reference, ours = model_pair(seed=1, eos_bias=6.0)
    settings = {"num_beams": 3, "max_length": 12, "length_penalty": length_penalty}
    tokens, scores = public.generate(reference, images(3), vocab_size=200, mask_token_id=199, **settings)
    our_tokens, our_scores = decoded(ours, images(3), **settings, **SMALL)
    assert our_tokens == tokens
    assert our_scores == pytest.approx(scores, rel=1e-4)


def test_generate_with_the_released_vocabulary_and_defaults() -> None:
    """64010 tokens, MASK = 64001, 3 beams, penalty 0.6: nothing but the image and a length limit is given."""
    reference, ours = model_pair(eos_bias=9.0, vocab_size=64010)
    tokens, scores = public.generate(reference, images(2), num_beams=3, max_length=16)
    our_tokens, our_scores = decoded(ours, images(2), max_length=16)
    assert our_tokens == tokens
    assert our_scores == pytest.approx(scores, rel=1e-4)


def test_generate_defaults_are_those_of_the_public_script() -> None:
    _, ours = pair("captioning")
    parameters = inspect.signature(ours.generate).parameters
    assert parameters["num_beams"].default == 3
    assert parameters["max_length"].default == 64
    assert parameters["length_penalty"].default == 0.6


def test_generate_does_not_depend_on_the_other_images_of_the_batch() -> None:
    _, ours = model_pair(seed=2, eos_bias=6.0)
    image = images(3)
    together, _ = decoded(ours, image, num_beams=3, max_length=12, **SMALL)
    alone = [decoded(ours, image[row : row + 1], num_beams=3, max_length=12, **SMALL)[0][0] for row in range(3)]
    assert together == alone


def test_generate_leaves_the_model_as_it_was() -> None:
    """In training mode, with drop path: decoding neither changes the mode nor leaves a gradient graph."""
    _, ours = model_pair(eos_bias=6.0)
    image = images(2).requires_grad_()
    expected, _ = decoded(ours, image, num_beams=2, max_length=8, **SMALL)
    assert not ours.training
    assert image.grad is None
    assert decoded(ours, image, num_beams=2, max_length=8, **SMALL)[0] == expected
    ours.train()
    ours.generate(image, num_beams=2, max_length=8, **SMALL)
    assert ours.training


def test_generate_encodes_each_image_once() -> None:
    """The prefix is computed once per image, not once per beam."""
    _, ours = model_pair()
    seen = []
    ours.beit3.vision_embed.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[0]))
    ours.generate(images(2), num_beams=5, max_length=6, **SMALL)
    if not seen:
        pytest.skip("the patch projection is not called as a module, so its calls cannot be counted from outside")
    assert sum(seen) == 2
