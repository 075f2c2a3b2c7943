"""Phi-1, Phi-1.5, Phi-2: attention and feed-forward in parallel after one LayerNorm, biases, no gate projection."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Site

from .llama import describe


@register("phi")
def phi(config: Any) -> Architecture:
    """Describe a Phi backbone; only the first dimensions of each head are rotated."""
    norm = "input_layernorm"
    layer = (
        Site("self_attn.q_proj", ("q",), bias=True, norm=norm),
        Site("self_attn.k_proj", ("k",), bias=True, norm=norm),
        Site("self_attn.v_proj", ("v",), bias=True, norm=norm),
        Site("self_attn.dense", ("o",), bias=True),
        Site("mlp.fc1", ("up",), bias=True, norm=norm),
        Site("mlp.fc2", ("down",), bias=True),
    )
    return describe(
        config,
        "phi",
        layer,
        final_norm="model.final_layernorm",
        norm="layer",
        parallel=True,
        qk_norm=bool(config.qk_layernorm),
    )
