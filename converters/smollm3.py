"""SmolLM3: Llama's layer, where some layers do not rotate their heads."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Heads

from .llama import describe, rotary, sites


@register("smollm3")
def smollm3(config: Any) -> Architecture:
    """Describe a SmolLM3 backbone; its config marks the layers that rotate with 1, whatever the list is called."""
    bias, mlp = bool(config.attention_bias), bool(config.mlp_bias)
    (theta,) = rotary(config, Heads.of(config))["rope_thetas"]
    thetas = tuple(theta if rotated else 0.0 for rotated in config.no_rope_layers[: config.num_hidden_layers])
    return describe(config, "smollm3", sites(qkv_bias=bias, o_bias=bias, mlp_bias=mlp), rope_thetas=thetas)
