"""Initial values have the public distribution, key by key: seeded samples of both, compared as samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from oracles import public
from oracles.pairs import build
from torch import nn

import beit3_fast.models as fast

ALL = [None, *public.HEADS]
SEEDS = 3
# One comparison in a million would fail by chance; some 10 000 are made, with fixed seeds.
SIGMAS = 5.0


def sample(make: Callable[[], nn.Module], first_seed: int) -> dict[str, torch.Tensor]:
    """Every released key's initial values over several seeds, flattened."""
    states = []
    for seed in range(first_seed, first_seed + SEEDS):
        torch.manual_seed(seed)
        states.append({key: value.flatten().double() for key, value in make().state_dict().items()})
    return {key: torch.cat([state[key] for state in states]) for key in states[0]}


def compare(key: str, actual: torch.Tensor, expected: torch.Tensor) -> str | None:
    """What differs between two samples beyond the sampling error, or None."""
    assert actual.numel() == expected.numel()
    n = expected.numel()
    if expected.std(correction=0) == 0:  # constants, and only constants, are exact
        return None if torch.equal(actual, expected) else f"{key}: not constant {expected[0].item()}"
    if torch.equal(actual[: n // SEEDS], actual[n // SEEDS : 2 * n // SEEDS]):
        return f"{key}: the same for two seeds"
    std = expected.std().item()
    if abs(actual.mean() - expected.mean()) > SIGMAS * std * math.sqrt(2 / n):
        return f"{key}: mean {actual.mean():.4g}, public {expected.mean():.4g}"
    centred = (expected - expected.mean()) / std
    kurtosis = centred.pow(4).mean().item()
    spread = math.sqrt(max(kurtosis - 1, 0.1) / (4 * n)) * math.sqrt(2)  # relative error of a standard deviation
    if abs(actual.std().item() / std - 1) > SIGMAS * spread:
        return f"{key}: std {actual.std():.4g}, public {std:.4g}"
    # Two-sample Kolmogorov-Smirnov: the largest gap between the empirical distributions, so the shape as well.
    grid = torch.cat([actual, expected]).sort().values
    gap = max_gap(actual, expected, grid)
    critical = math.sqrt(-0.5 * math.log(1e-6 / 2)) * math.sqrt(2 / n)
    if gap > critical:
        return f"{key}: distribution function off by {gap:.3f}, allowed {critical:.3f}"
    bounded = kurtosis < 2.2  # uniform 1.8, cut at one standard deviation 1.94, normal 3
    for name, extreme in (("min", torch.min), ("max", torch.max)):
        left, right = extreme(actual).item(), extreme(expected).item()
        allowed = (expected.max() - expected.min()).item() * 20 / n if bounded else 0.35 * abs(right)
        if n >= 60 and abs(left - right) > allowed:
            return f"{key}: {name} {left:.4g}, public {right:.4g}"
    return None


def max_gap(left: torch.Tensor, right: torch.Tensor, grid: torch.Tensor) -> float:
    sides = [torch.searchsorted(values.sort().values, grid, right=True) / values.numel() for values in (left, right)]
    return (sides[0] - sides[1]).abs().max().item()


@pytest.mark.parametrize("head", ALL)
def test_initial_values(head: str | None) -> None:
    args = public.config(head, encoder_layers=4)
    expected = sample(lambda: public.build(head, args), 0)
    actual = sample(lambda: build(head, args), 100)
    assert actual.keys() == expected.keys()
    wrong = [message for key in expected if (message := compare(key, actual[key], expected[key]))]
    assert not wrong, f"{len(wrong)} of {len(expected)}:\n" + "\n".join(wrong[:20])


@pytest.mark.parametrize("head", ALL)
def test_no_two_random_parameters_start_alike(head: str | None) -> None:
    """Experts, layers and projections are drawn one by one: a copy would train as one for a while."""
    state = build(head, public.config(head)).state_dict()
    seen: dict[tuple[float, ...], str] = {}
    for key, value in state.items():
        if value.numel() > 8 and value.std() > 0:
            fingerprint = tuple(value.flatten()[:8].tolist())
            assert fingerprint not in seen, f"{key} starts as {seen[fingerprint]}"
            seen[fingerprint] = key


def test_same_seed_same_values() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build("vqav2", public.config("vqav2")).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_head_scale() -> None:
    """Classification and NLVR2 heads start a thousand times smaller; the others do not."""
    state = build("imageclassification", public.config("imageclassification")).state_dict()
    assert 0 < state["head.weight"].abs().max() <= 2e-5
    state = build("nlvr2", public.config("nlvr2")).state_dict()
    for key in ("head.dense1.weight", "head.dense2.weight"):
        assert 0 < state[key].abs().max() <= 2e-5
    state = build("vqav2", public.config("vqav2")).state_dict()
    assert 0.015 < state["head.0.weight"].abs().max() <= 0.02


def test_logit_scale() -> None:
    ours = build("retrieval", public.config("retrieval"))
    assert ours.logit_scale.item() == pytest.approx(math.log(1 / 0.07), rel=1e-7)
    assert ours.logit_scale.shape == ()


@pytest.mark.parametrize("layers", [1, 3, 12])
def test_sub_layernorm_scaling_of_the_bare_backbone(layers: int) -> None:
    """fc1, fc2, out_proj, v_proj: uniform bound times sqrt(log(2 L)), weights and biases; q and k without."""
    state = build(None, public.config(None, encoder_layers=layers)).state_dict()
    gain = math.sqrt(math.log(2 * layers))
    for name, fan_in, scale in (
        ("self_attn.q_proj", 48, 1.0),
        ("self_attn.k_proj", 48, 1.0),
        ("self_attn.v_proj", 48, gain),
        ("self_attn.out_proj", 48, gain),
    ):
        for branch in "AB":
            weight = state[f"encoder.layers.0.{name}.{branch}.weight"]
            assert weight.abs().max().item() == pytest.approx(scale * fan_in**-0.5, rel=0.02)
    for branch in "AB":
        weight = state[f"encoder.layers.0.ffn.{branch}.fc2.weight"]
        assert weight.abs().max().item() == pytest.approx(gain * 192**-0.5, rel=0.02)


def test_fine_tuning_classes_lose_the_sub_layernorm_scaling() -> None:
    """Every Linear is drawn again, cut at one sigma of 0.02."""
    for head in public.HEADS:
        state = build(head, public.config(head)).state_dict()
        for key, value in state.items():
            if "proj" in key and key.startswith("beit3.encoder") and key.endswith("weight"):
                assert 0.0195 < value.abs().max() <= 0.02, key


def test_create_model_is_in_training_mode() -> None:
    with torch.device("meta"):
        model = fast.create_model("beit3_base_patch16_224_retrieval")
        expected = public.modeling.beit3_base_patch16_224_retrieval()
    assert model.training == expected.training
