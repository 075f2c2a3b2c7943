"""Falcon: query, key and value fused per key/value group; one group (7B), several (40B, 11B) or one per head (RW)."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Heads, Site

from .llama import rotary


@register("falcon")
def falcon(config: Any) -> Architecture:
    """Describe a Falcon backbone; its norms depend on three values of the config."""
    new_architecture = bool(config.new_decoder_architecture)
    groups = config.num_kv_heads if new_architecture else 1 if config.multi_query else config.num_attention_heads
    heads = Heads(config.num_attention_heads, groups, config.hidden_size // config.num_attention_heads)
    bias = bool(config.bias)
    attention, mlp = _norms(config, new_architecture)
    positions: dict[str, Any] = {"positions": "alibi"} if config.alibi else rotary(config, heads)
    layer = (
        Site("self_attention.query_key_value", ("q", "k", "v"), "group part dim", bias=bias, norm=attention),
        Site("self_attention.dense", ("o",), bias=bias),
        Site("mlp.dense_h_to_4h", ("up",), bias=bias, norm=mlp),
        Site("mlp.dense_4h_to_h", ("down",), bias=bias),
    )
    return Architecture(
        family="falcon",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        intermediate=config.ffn_hidden_size,
        vocabulary=config.vocab_size,
        sites=layer,
        layer_path="transformer.h",
        embedding="transformer.word_embeddings",
        final_norm="transformer.ln_f",
        norm="layer",
        activation=config.activation,
        tied=bool(config.tie_word_embeddings),
        parallel=new_architecture or bool(config.parallel_attn),
        **positions,
    )


def _norms(config: Any, new_architecture: bool) -> tuple[str, str]:
    """Return the paths of the norms before attention and before the feed-forward layer."""
    if new_architecture and config.num_ln_in_parallel_attn in (None, 2):
        return "ln_attn", "ln_mlp"
    if new_architecture or config.parallel_attn:
        return "input_layernorm", "input_layernorm"
    return "input_layernorm", "post_attention_layernorm"
