"""Per-token layers with one set of parameters per expert."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops


class MultiwayLinear(nn.Module):
    """Experts' linear layers, stacked: weight (E, O, I), bias (E, O)."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``nn.Linear``'s init, uniform within in_features ** -0.5 for weight and bias."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, expert_offsets: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.multiway_linear(x, self.weight, self.bias, expert_offsets, residual=residual)

    def extra_repr(self) -> str:
        experts, out_features, in_features = self.weight.shape
        return f"experts={experts}, in_features={in_features}, out_features={out_features}"


class MultiwayLayerNorm(nn.Module):
    """Experts' LayerNorms, stacked: weight (E, D), bias (E, D)."""

    def __init__(self, num_experts: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, x: Tensor, expert_offsets: Tensor) -> Tensor:
        normed = ops.layer_norm(x, self.weight, self.bias, expert_offsets, eps=self.eps)
        assert isinstance(normed, Tensor)
        return normed

    def extra_repr(self) -> str:
        return f"experts={self.weight.shape[0]}, width={self.weight.shape[1]}, eps={self.eps}"


class MultiwayFeedForward(nn.Module):
    """fc1, GELU, sub-LayerNorm and fc2, one of each per expert."""

    def __init__(self, num_experts: int, width: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.fc1 = MultiwayLinear(num_experts, width, hidden)
        self.fc2 = MultiwayLinear(num_experts, hidden, width)
        self.ffn_layernorm = MultiwayLayerNorm(num_experts, hidden, eps)
        self.folded: Tensor | None = None
        self.register_load_state_dict_post_hook(_fold_again)

    @torch.no_grad()
    def fold(self) -> None:
        """Keep, for inference, what the LayerNorm's affine adds up to behind fc2. A load or a move folds again."""
        norm, fc2 = self.ffn_layernorm, self.fc2
        self.folded = ops.fold_norm(norm.weight, norm.bias, fc2.weight, fc2.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> MultiwayFeedForward:
        super()._apply(fn, recurse)
        _fold_again(self)
        return self

    def forward(self, x: Tensor, expert_offsets: Tensor, residual: Tensor | None = None) -> Tensor:
        return ops.multiway_ffn(
            x,
            self.fc1.weight,
            self.fc1.bias,
            self.ffn_layernorm.weight,
            self.ffn_layernorm.bias,
            self.fc2.weight,
            self.fc2.bias,
            expert_offsets,
            residual=residual,
            eps=self.ffn_layernorm.eps,
            folded=self.folded,
        )


def _fold_again(block: MultiwayFeedForward, *_: Any) -> None:
    if block.folded is not None:
        block.fold()


class DropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382): a dropped sample's rows become zero, the others are scaled up.

    Draws the same random numbers in the same order as the public code (timm ``drop_path``).
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, rows: Tensor, batch_size: int, row_sample: Tensor) -> Tensor:
        """(N, D) rows; row_sample (N,) is the sample of each."""
        keep = 1 - self.drop_prob
        scale = rows.new_empty(batch_size, 1).bernoulli_(keep).div_(keep)
        return rows * scale.index_select(0, row_sample)

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"
