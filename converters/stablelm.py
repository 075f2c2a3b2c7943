"""StableLM: Llama's layer with LayerNorm, partly rotated heads, optionally parallel attention and MLP."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .llama import describe, sites


@register("stablelm")
def stablelm(config: Any) -> Architecture:
    """Describe a StableLM backbone; parallel attention and MLP share one norm."""
    parallel = bool(config.use_parallel_residual)
    norms = ("input_layernorm", "input_layernorm" if parallel else "post_attention_layernorm")
    layer = sites(qkv_bias=bool(config.use_qkv_bias), norms=norms)
    return describe(config, "stablelm", layer, norm="layer", parallel=parallel, qk_norm=bool(config.qk_layernorm))
