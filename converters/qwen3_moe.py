"""Qwen3 with experts: Qwen3's attention; some layers may have a plain feed-forward layer, which is left out."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.experts import Experts
from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .llama import describe, sites


@register("qwen3_moe")
def qwen3_moe(config: Any) -> Architecture:
    """Describe a Qwen3 backbone with experts."""
    bias, step = bool(config.attention_bias), config.decoder_sparse_step
    plain = set(config.mlp_only_layers or ())
    dense = tuple(layer for layer in range(config.num_hidden_layers) if layer in plain or (layer + 1) % step)
    experts = Experts(config.num_experts, config.moe_intermediate_size, "post_attention_layernorm", dense=dense)
    layer = sites(qkv_bias=bias, o_bias=bias)[:4]
    return describe(config, "qwen3_moe", layer, qk_norm=True, experts=experts)
