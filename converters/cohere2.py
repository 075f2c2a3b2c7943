"""Cohere 2 (Command R7B, Aya): Llama's modules in parallel after one LayerNorm; full attention does not rotate."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Heads

from .llama import describe, rotary, sites


@register("cohere2")
def cohere2(config: Any) -> Architecture:
    """Describe a Cohere 2 backbone; its LayerNorms have no biases."""
    bias = bool(config.attention_bias)
    layer = sites(qkv_bias=bias, o_bias=bias, norms=("input_layernorm", "input_layernorm"))
    (theta,) = rotary(config, Heads.of(config))["rope_thetas"]
    thetas = tuple(theta if kind == "sliding_attention" else 0.0 for kind in config.layer_types)
    return describe(config, "cohere2", layer, norm="layer", parallel=True, rotary_interleaved=True, rope_thetas=thetas)
