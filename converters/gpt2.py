"""GPT-2: weights stored as (in, out), query, key and value fused part by part, learned positions."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Heads, Site


@register("gpt2")
def gpt2(config: Any) -> Architecture:
    """Describe a GPT-2 backbone."""
    layer = (
        Site("attn.c_attn", ("q", "k", "v"), bias=True, norm="ln_1", conv1d=True),
        Site("attn.c_proj", ("o",), bias=True, conv1d=True),
        Site("mlp.c_fc", ("up",), bias=True, norm="ln_2", conv1d=True),
        Site("mlp.c_proj", ("down",), bias=True, conv1d=True),
    )
    return Architecture(
        family="gpt2",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=Heads.of(config),
        intermediate=config.n_inner or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        sites=layer,
        layer_path="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        norm="layer",
        activation=config.activation_function,
        positions="learned",
        tied=bool(config.tie_word_embeddings),
    )
