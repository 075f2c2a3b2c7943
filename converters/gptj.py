"""GPT-J: attention and feed-forward in parallel after one LayerNorm; rotary pairs are interleaved."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Heads, Site


@register("gptj")
def gptj(config: Any) -> Architecture:
    """Describe a GPT-J backbone; its rotary base is fixed."""
    heads = Heads.of(config)
    layer = (
        Site("attn.q_proj", ("q",), norm="ln_1"),
        Site("attn.k_proj", ("k",), norm="ln_1"),
        Site("attn.v_proj", ("v",), norm="ln_1"),
        Site("attn.out_proj", ("o",)),
        Site("mlp.fc_in", ("up",), bias=True, norm="ln_1"),
        Site("mlp.fc_out", ("down",), bias=True),
    )
    return Architecture(
        family="gptj",
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        intermediate=config.n_inner or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        sites=layer,
        layer_path="transformer.h",
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        norm="layer",
        activation=config.activation_function,
        rotary_size=config.rotary_dim or heads.size,
        rotary_interleaved=True,
        tied=bool(config.tie_word_embeddings),
        parallel=True,
    )
