"""OLMo 2 and 3: a norm after each block instead of before it; queries and keys normalized over all heads together."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .gemma3 import thetas
from .llama import describe, sites


def normed(config: Any, family: str, **differences: Any) -> Architecture:
    """Describe an OLMo with norms after each block."""
    bias = bool(config.attention_bias)
    post_norms = ("post_attention_layernorm", "post_feedforward_layernorm")
    layer = sites(qkv_bias=bias, o_bias=bias, norms=(None, None), post_norms=post_norms)
    return describe(config, family, layer, qk_norm=True, **differences)


@register("olmo2")
def olmo2(config: Any) -> Architecture:
    """Describe an OLMo 2 backbone."""
    return normed(config, "olmo2")


@register("olmo3")
def olmo3(config: Any) -> Architecture:
    """Describe an OLMo 3 backbone, whose rotary parameters depend on the type of attention of a layer."""
    return normed(config, "olmo3", rope_thetas=thetas(config))
