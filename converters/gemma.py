"""Gemma: Llama's layer with gains stored minus one and scaled embeddings."""

from __future__ import annotations

import struct
from typing import Any

from peft_lorasuite.arch.registry import register
from peft_lorasuite.arch.spec import Architecture

from .llama import describe, sites


def multiplier(config: Any) -> float:
    """Return the multiplier of the embedding, sqrt(hidden size).

    Transformers rounds it to the dtype of the weights: 55.5 instead of 55.43 in bfloat16 for a hidden size of 3072.
    """
    return round_to(config.hidden_size**0.5, str(config.dtype or "float32").removeprefix("torch."))


def round_to(value: float, dtype: str) -> float:
    """Round a positive number to a dtype as torch does; converters do not import torch."""
    if dtype == "float16":
        return struct.unpack("<e", struct.pack("<e", value))[0]
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    if dtype == "bfloat16":
        bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", bits))[0]


@register("gemma")
def gemma(config: Any) -> Architecture:
    """Describe a Gemma backbone of the first release."""
    bias = bool(config.attention_bias)
    layer = sites(qkv_bias=bias, o_bias=bias)
    return describe(config, "gemma", layer, gain_offset=1.0, embedding_scale=multiplier(config))
