"""Phi-3 and Phi-4: Llama's layer with fused query, key and value, and fused gate and up projections."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Site

from .llama import describe


@register("phi3")
def phi3(config: Any) -> Architecture:
    """Describe a Phi-3 backbone."""
    layer = (
        Site("self_attn.qkv_proj", ("q", "k", "v"), norm="input_layernorm"),
        Site("self_attn.o_proj", ("o",)),
        Site("mlp.gate_up_proj", ("gate", "up"), norm="post_attention_layernorm"),
        Site("mlp.down_proj", ("down",)),
    )
    return describe(config, "phi3", layer)
