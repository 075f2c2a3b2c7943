"""Gemma 3: Gemma 2 with normalized queries and keys, and different rotary bases for sliding and full attention."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .gemma2 import normed


def thetas(config: Any) -> tuple[float, ...]:
    """Return the rotary base of each layer, which depends on its type of attention."""
    rope = config.rope_parameters
    return tuple(float(rope.get(kind, rope)["rope_theta"]) for kind in config.layer_types)


@register("gemma3_text")
def gemma3_text(config: Any) -> Architecture:
    """Describe a text-only Gemma 3 backbone (270M and 1B)."""
    return normed(config, "gemma3", qk_norm=True, rope_thetas=thetas(config))


@register("gemma3")
def gemma3(config: Any) -> Architecture:
    """Describe the language model of a multimodal Gemma 3 backbone (4B and larger)."""
    text = config.text_config
    prefix = "model.language_model"
    return normed(
        text,
        "gemma3",
        qk_norm=True,
        rope_thetas=thetas(text),
        layer_path=f"{prefix}.layers",
        embedding=f"{prefix}.embed_tokens",
        final_norm=f"{prefix}.norm",
        disk=((prefix, "language_model.model"), ("lm_head", "language_model.lm_head")),
    )
