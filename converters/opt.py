"""OPT: no fused projections, biases, no gate projection, learned positions."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import UndescribedLayoutError, register
from peft_lorasuite.arch.spec import Architecture, Heads, Site


@register("opt")
def opt(config: Any) -> Architecture:
    """Describe an OPT backbone.

    Raises:
        UndescribedLayoutError: For a layout without norms before blocks and head (350M), or without gains.
    """
    if not config.do_layer_norm_before or config._remove_final_layer_norm or not config.layer_norm_elementwise_affine:
        raise UndescribedLayoutError(
            "this OPT has no norm with gains before each block and before the head (opt-350m, Galactica)",
            wanted="do_layer_norm_before and layer_norm_elementwise_affine, and a final norm",
        )
    if config.word_embed_proj_dim not in (None, config.hidden_size):
        raise UndescribedLayoutError(
            "the embedding of this OPT is projected to the hidden size",
            got=f"word_embed_proj_dim {config.word_embed_proj_dim}, hidden size {config.hidden_size}",
        )
    bias, attention, mlp = bool(config.enable_bias), "self_attn_layer_norm", "final_layer_norm"
    layer = (
        Site("self_attn.q_proj", ("q",), bias=bias, norm=attention),
        Site("self_attn.k_proj", ("k",), bias=bias, norm=attention),
        Site("self_attn.v_proj", ("v",), bias=bias, norm=attention),
        Site("self_attn.out_proj", ("o",), bias=bias),
        Site("fc1", ("up",), bias=bias, norm=mlp),
        Site("fc2", ("down",), bias=bias),
    )
    path = "model.decoder"
    return Architecture(
        "opt", config.num_hidden_layers, config.hidden_size, Heads.of(config), config.ffn_dim, config.vocab_size, layer,
        layer_path=f"{path}.layers", embedding=f"{path}.embed_tokens", final_norm=f"{path}.final_layer_norm",
        norm="layer", activation=config.activation_function, positions="learned", tied=bool(config.tie_word_embeddings),
    )  # fmt: skip
