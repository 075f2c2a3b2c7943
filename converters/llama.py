"""Llama, Mistral, Ministral: no fused projections, gated MLP, RMSNorm, rotary positions; others build on this file."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Heads, Site


def sites(
    *,
    qkv_bias: bool = False,
    o_bias: bool = False,
    mlp_bias: bool = False,
    norms: tuple[str | None, str | None] = ("input_layernorm", "post_attention_layernorm"),
    post_norms: tuple[str | None, str | None] = (None, None),
) -> tuple[Site, ...]:
    """Return the seven linear modules of a Llama layer; norms are given as (attention, feed-forward)."""
    attention, mlp = norms
    return (
        Site("self_attn.q_proj", ("q",), bias=qkv_bias, norm=attention),
        Site("self_attn.k_proj", ("k",), bias=qkv_bias, norm=attention),
        Site("self_attn.v_proj", ("v",), bias=qkv_bias, norm=attention),
        Site("self_attn.o_proj", ("o",), bias=o_bias, post_norm=post_norms[0]),
        Site("mlp.gate_proj", ("gate",), bias=mlp_bias, norm=mlp),
        Site("mlp.up_proj", ("up",), bias=mlp_bias, norm=mlp),
        Site("mlp.down_proj", ("down",), bias=mlp_bias, post_norm=post_norms[1]),
    )


def rotary(config: Any, heads: Heads) -> dict[str, Any]:
    """Return the fields of rotary positions: the number of rotated dimensions of a head, and the base."""
    rope = getattr(config, "rope_parameters", None) or {}
    fraction = rope.get("partial_rotary_factor") or 1.0
    return {"rotary_size": int(heads.size * fraction), "rope_thetas": (float(rope.get("rope_theta") or 10000.0),)}


def describe(config: Any, family: str, layer_sites: tuple[Site, ...], **differences: Any) -> Architecture:
    """Describe a backbone with Llama's config; ``differences`` are the fields of `Architecture` that differ."""
    heads = Heads.of(config)
    values: dict[str, Any] = {
        "family": family,
        "layers": config.num_hidden_layers,
        "hidden": config.hidden_size,
        "heads": heads,
        "intermediate": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "sites": layer_sites,
        "activation": getattr(config, "hidden_act", None) or config.hidden_activation,
        "tied": bool(getattr(config, "tie_word_embeddings", True)),
    }
    return Architecture(**(values | rotary(config, heads) | differences))


@register("llama", "mistral", "ministral")
def llama(config: Any) -> Architecture:
    """Describe a Llama, Mistral or Ministral backbone."""
    bias, mlp = (bool(getattr(config, name, False)) for name in ("attention_bias", "mlp_bias"))
    return describe(config, "llama", sites(qkv_bias=bias, o_bias=bias, mlp_bias=mlp))
