"""Gemma 2: Gemma with norms before and after each block."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .gemma import multiplier
from .llama import describe, sites


def normed(config: Any, family: str, **differences: Any) -> Architecture:
    """Describe a Gemma with norms before and after each block."""
    bias = bool(config.attention_bias)
    layer = sites(
        qkv_bias=bias,
        o_bias=bias,
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    )
    fields = {"gain_offset": 1.0, "embedding_scale": multiplier(config)} | differences
    return describe(config, family, layer, **fields)


@register("gemma2")
def gemma2(config: Any) -> Architecture:
    """Describe a Gemma 2 backbone."""
    return normed(config, "gemma2")
