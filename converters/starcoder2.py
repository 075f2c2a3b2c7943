"""StarCoder2: LayerNorm, biases, no gate projection, rotary positions."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Site

from .llama import describe


@register("starcoder2")
def starcoder2(config: Any) -> Architecture:
    """Describe a StarCoder2 backbone."""
    bias, attention, mlp = bool(config.use_bias), "input_layernorm", "post_attention_layernorm"
    layer = (
        Site("self_attn.q_proj", ("q",), bias=bias, norm=attention),
        Site("self_attn.k_proj", ("k",), bias=bias, norm=attention),
        Site("self_attn.v_proj", ("v",), bias=bias, norm=attention),
        Site("self_attn.o_proj", ("o",), bias=bias),
        Site("mlp.c_fc", ("up",), bias=bias, norm=mlp),
        Site("mlp.c_proj", ("down",), bias=bias),
    )
    return describe(config, "starcoder2", layer, norm="layer")
