"""Qwen3: Llama's layer with queries and keys normalized per head."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .llama import describe, sites


@register("qwen3")
def qwen3(config: Any) -> Architecture:
    """Describe a Qwen3 backbone."""
    bias = bool(config.attention_bias)
    return describe(config, "qwen3", sites(qkv_bias=bias, o_bias=bias), qk_norm=True)
