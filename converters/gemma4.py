"""Gemma 4: Gemma 3 with heads of two sizes, shared keys and values, per-layer embeddings and layer scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from peft_lorasuite.arch.registry import UndescribedLayoutError, register
from peft_lorasuite.arch.spec import Architecture, Borrowed, Heads, LayerSizes, Site

from .gemma2 import normed
from .gemma3 import thetas
from .multimodal import TEXT, inside

GATE = Site("per_layer_input_gate", ("ple_gate",))
DOWN = Site("per_layer_projection", ("ple_down",), post_norm="post_per_layer_input_norm")


@register("gemma4_text")
def gemma4_text(config: Any) -> Architecture:
    """Describe a Gemma 4 text model.

    Raises:
        UndescribedLayoutError: For experts, and for a draft model, which reads the keys and values of another one.
    """
    kinds, first_shared = config.layer_types, config.num_hidden_layers - config.num_kv_shared_layers
    if config.enable_moe_block or not first_shared:
        raise UndescribedLayoutError("this Gemma 4 has experts, or no keys and values of its own")
    tied = [n for n in range(first_shared) if config.attention_k_eq_v and kinds[n] == "full_attention"]
    owners = {"k": range(first_shared), "v": [n for n in range(first_shared) if n not in tied]}
    borrowed, last = [Borrowed(n, "v", n, "k") for n in tied], {kind: n for n, kind in enumerate(kinds[:first_shared])}
    for layer in range(first_shared, len(kinds)):
        source = last[kinds[layer]]
        borrowed += [Borrowed(layer, "k", source, "k"), Borrowed(layer, "v", source, "k" if source in tied else "v")]
    (heads, units, rotated), *_ = sizes = [_sizes(config, n, n >= first_shared) for n in range(len(kinds))]
    others = {one: [n for n, own in enumerate(sizes) if own == one] for one in sizes if one != sizes[0]}
    text = normed(
        config, "gemma4", gain_offset=0.0, qk_norm=True, v_norm=True, heads=heads, intermediate=units,
        rotary_size=rotated, rotary_across=True, rope_thetas=thetas(config), layer_scale="layer_scalar",
        other_sizes=tuple(LayerSizes(tuple(layers), *one) for one, layers in others.items()), borrowed=tuple(borrowed),
        ple_size=config.hidden_size_per_layer_input or 0,
    )  # fmt: skip
    layers = {part: tuple(own) for part, own in owners.items() if len(own) < len(kinds)}
    sites = tuple(replace(site, layers=layers.get(site.parts[0])) for site in text.sites)
    return replace(text, sites=sites + ((GATE, DOWN) if text.ple_size else ()))


def _sizes(config: Any, layer: int, shared: bool) -> tuple[Heads, int, int]:
    """Return heads, intermediate size and rotated dimensions of a layer."""
    own, rope = config.per_layer_config.get(str(layer), {}), config.rope_parameters[config.layer_types[layer]]
    size, groups = (own.get(name) or getattr(config, name) for name in ("head_dim", "num_key_value_heads"))
    part = rope.get("partial_rotary_factor", 1.0) if rope["rope_type"] == "proportional" else 1.0
    units = config.intermediate_size * (2 if shared and config.use_double_wide_mlp else 1)
    return Heads(config.num_attention_heads, groups, size), units, 2 * int(part * size // 2)


@register("gemma4")
def gemma4(config: Any) -> Architecture:
    """Describe the text model of a multimodal Gemma 4."""
    return replace(inside(gemma4_text(config.text_config), config, stored=TEXT, stored_head="lm_head"), disk=())
