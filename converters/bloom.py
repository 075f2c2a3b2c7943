"""Bloom: query, key and value fused head by head, ALiBi positions, a LayerNorm after the embedding."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Heads, Site


@register("bloom")
def bloom(config: Any) -> Architecture:
    """Describe a Bloom backbone; the intermediate size is four times the hidden size."""
    layer = (
        Site("self_attention.query_key_value", ("q", "k", "v"), "head part dim", bias=True, norm="input_layernorm"),
        Site("self_attention.dense", ("o",), bias=True),
        Site("mlp.dense_h_to_4h", ("up",), bias=True, norm="post_attention_layernorm"),
        Site("mlp.dense_4h_to_h", ("down",), bias=True),
    )
    return Architecture(
        family="bloom",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=Heads.of(config),
        intermediate=4 * config.hidden_size,
        vocabulary=config.vocab_size,
        sites=layer,
        layer_path="transformer.h",
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        norm="layer",
        activation="gelu_new",
        positions="alibi",
        tied=bool(config.tie_word_embeddings),
        embedding_norm="transformer.word_embeddings_layernorm",
    )
