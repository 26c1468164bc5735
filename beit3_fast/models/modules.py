"""Per-token layers with one set of parameters per expert."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..layout import ExpertRows


class MultiwayLinear(nn.Module):
    """Experts' linear layers, stacked: weight (E, O, I), bias (E, O).

    After :meth:`pack` the weight lies as the CPU's products read it (``ops.pack_weight``), or as int8 with its
    ``scales`` (``ops.quantize_weight``). There is no second copy that could go stale; ``state_dict`` and loading know
    nothing of it.
    """

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features))
        self.scales: Tensor | None = None
        self.packing: str | None = None
        self.register_state_dict_post_hook(_unpack_saved)
        self.register_load_state_dict_pre_hook(_pack_loaded)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """``nn.Linear``'s init, uniform within in_features ** -0.5 for weight and bias."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    @torch.no_grad()
    def pack(self, how: str = "as is") -> None:
        """Keep the weight, for inference, as the CPU's products read it, where its shape, dtype and device allow.

        A move to another dtype or device brings it into the form that is right there; int8 stays on the CPU alone.

        Args:
            how: "as is", or "int8".
        """
        weight = self.unpacked()
        self.packing, self.scales = how, None
        if how == "int8" and ops.can_pack(weight, torch.int8):
            weight, self.scales = ops.quantize_weight(weight)
        elif ops.can_pack(weight):
            weight = ops.pack_weight(weight)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def unpacked(self) -> Tensor:
        """The weight (E, O, I), in the dtype of the bias."""
        return ops.unpack_weight(self.weight, self.scales, self.bias.dtype)

    def _apply(self, fn: Any, recurse: bool = True) -> MultiwayLinear:
        super()._apply(fn, recurse)
        if self.packing is not None and not ops.is_packed(self.weight):
            self.pack(self.packing)
        return self

    def forward(
        self, x: Tensor, rows: ExpertRows, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        if ops.serves_packed(x, self.weight):
            return ops.packed_linear(
                x,
                self.weight,
                self.bias,
                rows.offsets,
                scales=self.scales,
                activation=activation,
                residual=residual,
            )
        return ops.multiway_linear(
            x,
            self.unpacked(),
            self.bias,
            rows.offsets,
            activation=activation,
            residual=residual,
            bounds=rows.bounds,
        )

    def extra_repr(self) -> str:
        experts, out_features = self.bias.shape
        in_features = self.weight.numel() // self.bias.numel()
        return f"experts={experts}, in_features={in_features}, out_features={out_features}, packed={self.packing}"


def _unpack_saved(linear: MultiwayLinear, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    if linear.weight.ndim > 3:
        state_dict[prefix + "weight"] = linear.unpacked()


@torch.no_grad()
def _pack_loaded(linear: MultiwayLinear, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    key = prefix + "weight"
    if linear.weight.ndim == 3 or key not in state_dict:
        return
    weight = state_dict[key].to(linear.bias)  # of the right shape: the owner of the released keys has seen to it
    if linear.scales is None:
        state_dict[key] = ops.pack_weight(weight)
    else:
        state_dict[key], linear.scales = ops.quantize_weight(weight)


class MultiwayLayerNorm(nn.Module):
    """Experts' LayerNorms, stacked: weight (E, D), bias (E, D)."""

    def __init__(self, num_experts: int, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, x: Tensor, rows: ExpertRows) -> Tensor:
        normed = ops.layer_norm(x, self.weight, self.bias, rows.offsets, eps=self.eps)
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
        self.folded = ops.fold_norm(norm.weight, norm.bias, ops.unpack_weight(fc2.weight), fc2.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> MultiwayFeedForward:
        super()._apply(fn, recurse)
        _fold_again(self)
        return self

    def forward(self, x: Tensor, rows: ExpertRows, residual: Tensor | None = None) -> Tensor:
        if ops.serves_packed(x, self.fc1.weight):
            hidden = self.ffn_layernorm(self.fc1(x, rows, activation="gelu"), rows)
            return self.fc2(hidden, rows, residual)
        fc1, norm, fc2 = self.fc1, self.ffn_layernorm, self.fc2
        if ops.serves_packed(x, fc1.weight) and ops.serves_packed(x, fc2.weight):
            return ops.packed_ffn(
                x,
                fc1.weight,
                fc1.bias,
                norm.weight,
                norm.bias,
                fc2.weight,
                fc2.bias,
                rows.offsets,
                fc1_scales=fc1.scales,
                fc2_scales=fc2.scales,
                residual=residual,
                eps=norm.eps,
            )
        return ops.multiway_ffn(
            x,
            fc1.unpacked(),
            fc1.bias,
            norm.weight,
            norm.bias,
            fc2.unpacked(),
            fc2.bias,
            rows.offsets,
            residual=residual,
            eps=norm.eps,
            folded=self.folded,
            bounds=rows.bounds,
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
