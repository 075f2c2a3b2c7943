"""Qwen2 and Qwen2.5: Llama's layer with biases of query, key and value."""

from __future__ import annotations

from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .llama import describe, sites


@register("qwen2")
def qwen2(config: Any) -> Architecture:
    """Describe a Qwen2 backbone."""
    return describe(config, "qwen2", sites(qkv_bias=True))
