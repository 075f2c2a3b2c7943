"""Granite: Llama's layer with multipliers of the embedding and of the output of each block."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .llama import describe, sites


@register("granite")
def granite(config: Any) -> Architecture:
    """Describe a Granite backbone."""
    bias, mlp = bool(config.attention_bias), bool(config.mlp_bias)
    return describe(
        config,
        "granite",
        sites(qkv_bias=bias, o_bias=bias, mlp_bias=mlp),
        embedding_scale=float(config.embedding_multiplier),
        residual_scale=float(config.residual_multiplier),
    )
