"""GPT-OSS: attention with biases and sinks before experts, stored as (in, out) with alternating gate and up columns."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.experts import Experts
from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .llama import describe, sites


@register("gpt_oss")
def gpt_oss(config: Any) -> Architecture:
    """Describe a GPT-OSS backbone."""
    bias = bool(config.attention_bias)
    experts = Experts(
        config.num_local_experts,
        config.intermediate_size,
        "post_attention_layernorm",
        router="mlp.router",
        transposed=True,
    )
    return describe(config, "gpt_oss", sites(qkv_bias=bias, o_bias=bias)[:4], experts=experts)
