"""Qwen3.5: Gemma's gains, gated attention with normalized queries and keys, in some layers linear attention instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Site

from .llama import describe, sites


@register("qwen3_5_text")
def qwen3_5_text(config: Any) -> Architecture:
    """Describe a Qwen3.5 backbone; the modules of linear attention are left out, since no other family has them."""
    bias, norm = bool(config.attention_bias), "input_layernorm"
    query = Site("self_attn.q_proj", ("q", "q_gate"), "head part dim", bias=bias, norm=norm)
    attention = (query, *sites(qkv_bias=bias, o_bias=bias)[1:4])
    width = config.linear_num_value_heads * config.linear_value_head_dim
    rows = 2 * config.linear_num_key_heads * config.linear_key_head_dim + 3 * width + 2 * config.linear_num_value_heads
    full = tuple(layer for layer, kind in enumerate(config.layer_types) if kind == "full_attention")
    return describe(
        config,
        "qwen3_5",
        (*(replace(site, layers=full) for site in attention), *sites()[4:]),
        gain_offset=1.0,
        qk_norm=True,
        other_weights=(config.num_hidden_layers - len(full)) * rows * config.hidden_size,
        disk=(("model", "model.language_model"),),
    )


@register("qwen3_5")
def qwen3_5(config: Any) -> Architecture:
    """Describe a Qwen3.5 backbone with a vision tower, whose text model transformers loads as a causal model."""
    return qwen3_5_text(config.text_config)
