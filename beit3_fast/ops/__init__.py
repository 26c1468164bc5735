"""The operations of a BEiT-3 layer, each beside its plain PyTorch reference."""

from .attention import attention, attention_reference
from .decode_attention import decode_attention, decode_attention_reference
from .layer_norm import layer_norm, layer_norm_reference
from .multiway_ffn import fold_norm, multiway_ffn, multiway_ffn_reference
from .multiway_linear import multiway_linear, multiway_linear_reference
from .packed import (
    can_pack,
    is_packed,
    pack_weight,
    packed_ffn,
    packed_linear,
    quantize_weight,
    serves_packed,
    unpack_weight,
)
from .route_tokens import route_tokens, route_tokens_reference

__all__ = [
    "attention",
    "attention_reference",
    "can_pack",
    "decode_attention",
    "decode_attention_reference",
    "fold_norm",
    "is_packed",
    "layer_norm",
    "layer_norm_reference",
    "multiway_ffn",
    "multiway_ffn_reference",
    "multiway_linear",
    "multiway_linear_reference",
    "pack_weight",
    "packed_ffn",
    "packed_linear",
    "quantize_weight",
    "route_tokens",
    "route_tokens_reference",
    "serves_packed",
    "unpack_weight",
]
