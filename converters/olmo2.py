"""OLMo 2: a norm after each block instead of before it; queries and keys normalized over all heads together."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .llama import describe, sites


@register("olmo2")
def olmo2(config: Any) -> Architecture:
    """Describe an OLMo 2 backbone."""
    bias = bool(config.attention_bias)
    post_norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    layer = sites(qkv_bias=bias, o_bias=bias, norms=(None, None), post_norms=post_norms)
    return describe(config, "olmo2", layer, qk_norm=True)
