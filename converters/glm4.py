"""GLM-4 (0414): fused gate and up projections, norms before and after each block, partly rotated interleaved heads."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Site

from .llama import describe


@register("glm4")
def glm4(config: Any) -> Architecture:
    """Describe a GLM-4 backbone."""
    bias, attention, mlp = bool(config.attention_bias), "input_layernorm", "post_attention_layernorm"
    layer = (
        Site("self_attn.q_proj", ("q",), bias=bias, norm=attention),
        Site("self_attn.k_proj", ("k",), bias=bias, norm=attention),
        Site("self_attn.v_proj", ("v",), bias=bias, norm=attention),
        Site("self_attn.o_proj", ("o",), post_norm="post_self_attn_layernorm"),
        Site("mlp.gate_up_proj", ("gate", "up"), norm=mlp),
        Site("mlp.down_proj", ("down",), post_norm="post_mlp_layernorm"),
    )
    return describe(config, "glm4", layer, rotary_interleaved=True)
