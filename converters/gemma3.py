"""Gemma 3: Gemma 2 with normalised queries and keys, and one rotary base for sliding and one for full attention."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .gemma2 import gemma


def thetas(config: Any) -> tuple[float, ...]:
    """Read the rotary base of every layer from its kind of attention."""
    return tuple(float(config.rope_parameters[kind]["rope_theta"]) for kind in config.layer_types)


@register("gemma3_text")
def gemma3_text(config: Any) -> Architecture:
    """Describe a Gemma 3 backbone that reads text only (270M and 1B)."""
    return gemma(config, "gemma3", qk_norm=True, rope_thetas=thetas(config))


@register("gemma3")
def gemma3(config: Any) -> Architecture:
    """Describe the language model inside a Gemma 3 backbone that also sees pictures (4B and larger)."""
    text = config.text_config
    inside = "model.language_model"
    return gemma(
        text,
        "gemma3",
        qk_norm=True,
        rope_thetas=thetas(text),
        layer_path=f"{inside}.layers",
        embedding=f"{inside}.embed_tokens",
        final_norm=f"{inside}.norm",
        disk=((inside, "language_model.model"), ("lm_head", "language_model.lm_head")),
    )
