"""GPT-NeoX and Pythia: query, key and value fused head by head, LayerNorm, usually parallel attention and MLP."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Site

from .llama import describe


@register("gpt_neox")
def gpt_neox(config: Any) -> Architecture:
    """Describe a GPT-NeoX backbone; its language-model head is stored as ``embed_out``."""
    bias = bool(config.attention_bias)
    layer = (
        Site("attention.query_key_value", ("q", "k", "v"), "head part dim", bias=bias, norm="input_layernorm"),
        Site("attention.dense", ("o",), bias=bias),
        Site("mlp.dense_h_to_4h", ("up",), bias=True, norm="post_attention_layernorm"),
        Site("mlp.dense_4h_to_h", ("down",), bias=True),
    )
    return describe(
        config,
        "gpt_neox",
        layer,
        layer_path="gpt_neox.layers",
        embedding="gpt_neox.embed_in",
        final_norm="gpt_neox.final_layer_norm",
        norm="layer",
        parallel=bool(config.use_parallel_residual),
        disk=(("lm_head", "embed_out"),),
    )
