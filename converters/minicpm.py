"""MiniCPM: Llama's layer with three multipliers, loaded as Granite, which computes the same without remote code."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture, Heads

from .llama import describe, sites


@register("minicpm")
def minicpm(config: Any) -> Architecture:
    """Describe a MiniCPM backbone; the defaults are those of its first release."""
    heads = Heads.of(config)
    embedding_scale = float(getattr(config, "scale_emb", 1))
    residual_scale = float(getattr(config, "scale_depth", 1)) / config.num_hidden_layers**0.5
    floor = float(getattr(config, "hidden_act_param", 0.0)) if config.hidden_act == "fatrelu" else 0.0
    activation = "relu" if config.hidden_act == "fatrelu" else config.hidden_act
    granite = {
        "model_type": "granite",
        "hidden_act": activation,
        "num_key_value_heads": heads.key_value,
        "tie_word_embeddings": getattr(config, "tie_word_embeddings", True),
        "embedding_multiplier": embedding_scale,
        "residual_multiplier": residual_scale,
        "logits_scaling": config.hidden_size / getattr(config, "dim_model_base", 1),
        "attention_multiplier": heads.size**-0.5,
    }
    return describe(
        config,
        "minicpm",
        sites(),
        activation=activation,
        activation_floor=floor,
        embedding_scale=embedding_scale,
        residual_scale=residual_scale,
        runs_as=tuple(granite.items()),
    )
