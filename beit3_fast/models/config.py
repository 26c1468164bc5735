"""What a BEiT-3 encoder is made of, under the public code's names."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

# Options of torchscale's EncoderConfig that BEiT-3 never switches on, with the only value that is supported here.
_FIXED = {
    "encoder_normalize_before": True,
    "activation_fn": "gelu",
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "no_scale_embedding": True,
    "layernorm_embedding": False,
    "moe_freq": 0,
    "rel_pos_buckets": 0,
    "max_rel_pos": 0,
    "deepnorm": False,
    "subln": True,
    "bert_init": False,
    "multiway": True,
    "share_encoder_input_output_embed": False,
    "fsdp": False,
    "no_output_layer": True,
    "xpos_rel_pos": False,
}
# Options that have no effect on a BEiT-3 encoder, whatever their value.
_IGNORED = {
    "moe_top1_expert",
    "moe_expert_count",
    "moe_gating_use_fp32",
    "moe_eval_capacity_token_fraction",
    "moe_second_expert_policy",
    "moe_normalize_gate_prob_before_dropping",
    "use_xmoe",
    "ddp_rank",
    "xpos_scale_base",
}


def nearest(name: str, known: list[str]) -> str:
    """ " Did you mean ...?" for a misspelt name, or nothing."""
    matches = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(matches)}?" if matches else ""


@dataclass(init=False)
class EncoderConfig:
    """Configuration of a BEiT-3 backbone. Field names are torchscale's ``EncoderConfig``'s.

    The released models duplicate everything per token for each modality. ``shared_attention`` and ``vl_ffn_layers``
    describe the architecture of the paper (arXiv 2208.10442, section 2.1), of which no weights were released: attention
    and its LayerNorms shared, a feed-forward expert per modality, and in the top ``vl_ffn_layers`` layers a third
    expert that takes all tokens of image-text input.

    Args:
        **options: the fields below, by name. Torchscale's other options are taken too, as far as BEiT-3 leaves them at
            the value that they have here.

    Raises:
        TypeError: an unknown name (the nearest is offered), or a value of another type.
        ValueError: a size that is not positive, a width that its heads or an image size that its patches do not divide,
            an option that BEiT-3 does not use at another value.
    """

    encoder_embed_dim: int = 768
    encoder_attention_heads: int = 12
    encoder_ffn_embed_dim: int = 3072
    encoder_layers: int = 12
    normalize_output: bool = True
    drop_path_rate: float = 0.0
    max_source_positions: int = 1024
    layernorm_eps: float = 1e-5
    vocab_size: int = 64010
    img_size: int = 224
    patch_size: int = 16
    in_chans: int = 3
    checkpoint_activations: bool | None = False
    shared_attention: bool = False
    vl_ffn_layers: int = 0

    def __init__(self, **options: Any) -> None:
        known = [field.name for field in fields(self)]
        for name, value in options.items():
            if name in known:
                setattr(self, name, value)
            elif name in _FIXED:
                if value != _FIXED[name]:
                    raise ValueError(f"{name} must be {_FIXED[name]!r} for BEiT-3, got {value!r}")
            elif name not in _IGNORED:
                raise TypeError(f"unknown option {name!r}{nearest(name, known)}")
        self._check()

    def _check(self) -> None:
        for name in (
            "encoder_embed_dim",
            "encoder_attention_heads",
            "encoder_ffn_embed_dim",
            "encoder_layers",
            "vocab_size",
            "img_size",
            "patch_size",
            "in_chans",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}")
        if self.encoder_embed_dim % self.encoder_attention_heads:
            raise ValueError(
                f"encoder_embed_dim must be a multiple of encoder_attention_heads, got {self.encoder_embed_dim} and "
                f"{self.encoder_attention_heads}"
            )
        if self.img_size % self.patch_size:
            raise ValueError(f"img_size must be a multiple of patch_size ({self.patch_size}), got {self.img_size}")
        for name in ("max_source_positions", "vl_ffn_layers"):
            if not isinstance(getattr(self, name), int):
                raise TypeError(f"{name} must be an int, got {getattr(self, name)!r}")
        for name in ("drop_path_rate", "layernorm_eps"):
            if not isinstance(getattr(self, name), (int, float)):
                raise TypeError(f"{name} must be a float, got {getattr(self, name)!r}")
        if not self.layernorm_eps > 0:
            raise ValueError(f"layernorm_eps must be positive, got {self.layernorm_eps}")
        if self.max_source_positions < 3:
            raise ValueError(f"max_source_positions must be at least 3, got {self.max_source_positions}")
        if not 0.0 <= self.drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must lie in [0, 1), got {self.drop_path_rate}")
        if not 0 <= self.vl_ffn_layers <= self.encoder_layers:
            raise ValueError(f"vl_ffn_layers must lie in [0, {self.encoder_layers}], got {self.vl_ffn_layers}")

    @classmethod
    def base(cls, mlp_ratio: float = 4, **overrides: Any) -> EncoderConfig:
        """12 layers, width 768, 12 heads: the released base models."""
        sizes = {"encoder_embed_dim": 768, "encoder_attention_heads": 12, "encoder_layers": 12}
        return cls(**{**sizes, "encoder_ffn_embed_dim": int(768 * mlp_ratio), **overrides})

    @classmethod
    def large(cls, mlp_ratio: float = 4, **overrides: Any) -> EncoderConfig:
        """24 layers, width 1024, 16 heads: the released large models."""
        sizes = {"encoder_embed_dim": 1024, "encoder_attention_heads": 16, "encoder_layers": 24}
        return cls(**{**sizes, "encoder_ffn_embed_dim": int(1024 * mlp_ratio), **overrides})

    @classmethod
    def giant(cls, **overrides: Any) -> EncoderConfig:
        """40 layers, width 1408, 16 heads of 88, patch 14: the paper's 1.9 B model (weights were never released)."""
        sizes = {
            "encoder_embed_dim": 1408,
            "encoder_attention_heads": 16,
            "encoder_layers": 40,
            "encoder_ffn_embed_dim": 6144,
            "patch_size": 14,
            "shared_attention": True,
            "vl_ffn_layers": 3,
        }
        return cls(**{**sizes, **overrides})

    @classmethod
    def from_args(cls, args: Any) -> EncoderConfig:
        """From one of ours or from a torchscale ``EncoderConfig`` (its attributes are read)."""
        if isinstance(args, cls):
            return args
        if not hasattr(args, "encoder_embed_dim"):
            raise TypeError(f"args must be an EncoderConfig (ours or torchscale's), got {type(args).__name__}")
        return cls(**vars(args))
