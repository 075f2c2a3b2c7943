"""Gemma 2: Llama's layer with norms before and after each block, gains stored minus one, scaled embeddings."""

from __future__ import annotations

import struct
from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .llama import describe, sites


def gemma(config: Any, family: str, **differences: Any) -> Architecture:
    """Describe a Gemma 2 or 3 backbone.

    Transformers rounds the multiplier of the embedding, sqrt(hidden size), to the dtype of the weights: 55.5 instead
    of 55.43 in bfloat16 for a hidden size of 3072.
    """
    bias = bool(config.attention_bias)
    layer = sites(
        qkv_bias=bias,
        o_bias=bias,
        norms=("input_layernorm", "pre_feedforward_layernorm"),
        post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    )
    scale = round_to(config.hidden_size**0.5, str(config.dtype or "float32").removeprefix("torch."))
    return describe(config, family, layer, gain_offset=1.0, embedding_scale=scale, **differences)


def round_to(value: float, dtype: str) -> float:
    """Round a positive number to a dtype as torch does; converters do not import torch."""
    if dtype == "float16":
        return struct.unpack("<e", struct.pack("<e", value))[0]
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    if dtype == "bfloat16":
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


@register("gemma2")
def gemma2(config: Any) -> Architecture:
    """Describe a Gemma 2 backbone."""
    return gemma(config, "gemma2")
