"""Mixtral: Llama's attention before experts, whose modules are w1, w3 and w2 in checkpoints."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.experts import Experts
from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .llama import describe, sites


@register("mixtral")
def mixtral(config: Any) -> Architecture:
    """Describe a Mixtral backbone."""
    experts = Experts(
        config.num_local_experts,
        config.intermediate_size,
        "post_attention_layernorm",
        modules=("w1", "w3", "w2"),
        stored="block_sparse_moe",
    )
    return describe(config, "mixtral", sites()[:4], experts=experts)
