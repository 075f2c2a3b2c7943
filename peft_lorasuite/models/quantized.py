"""Quantized checkpoints: a map is not built from them, and the error names the unquantized one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import LoraSuiteError

SUFFIX = re.compile(
    r"(?:-unsloth)?-(?:bnb|4bit|8bit|nf4|gptq|awq|fp8|int4|int8|w4a16|w8a8|w8a16|hqq|aqlm|mxfp4|nvfp4)(?:-.*)?$",
    re.IGNORECASE,
)
"""What the names of quantized copies of a checkpoint end with."""


def unquantized_name(name: str) -> str | None:
    """Return the name that a quantized copy was probably made from: without its suffix, None if it has none."""
    short = SUFFIX.sub("", name.rstrip("/"))
    return short if short not in (name.rstrip("/"), "") and not short.endswith("/") else None


def quantization(config: Any) -> str | None:
    """Return the quantization method of a checkpoint's config; None if its weights are stored as plain numbers."""
    values = getattr(config, "quantization_config", None) or {}
    values = values if isinstance(values, Mapping) else values.to_dict()
    method = getattr(values.get("quant_method"), "value", values.get("quant_method"))
    if not values or method == "gguf" or values.get("dequantize"):  # loaded, and saved again, as plain numbers
        return None
    return str(method or "unknown")


def layers_quantization(config: Any, *, experts: bool) -> str | None:
    """Return the quantization method of the modules in a checkpoint's layers; None if they are plain numbers.

    Args:
        config: The config.
        experts: Whether the layers have experts, which MXFP4 quantizes alone (GPT-OSS).
    """
    method = quantization(config)
    return None if experts and method == "mxfp4" else method


def quantized_error(name: str, where: str, got: object) -> LoraSuiteError:
    """Build the error for weights of a backbone that cannot be read as plain numbers."""
    short = unquantized_name(name)
    return LoraSuiteError(
        "the weights are quantized", where=where, got=got,
        do="build the map from the unquantized or dequantized checkpoint"
        f"{f', probably {short}' if short else ''} (old: --from, source_model=; new: --to); the adapter then fits the"
        " quantized one too",
    )  # fmt: skip


def loading_advice(name: str, config: Any) -> str | None:
    """Return what to do if a quantized checkpoint cannot be loaded; None if it is not quantized."""
    method, short = quantization(config), unquantized_name(name)
    if method is None:
        return None
    packages = "install the packages of its quantization method"
    return f"{packages}, or pass the unquantized checkpoint{f', probably {short}' if short else ''} (--from, --to)"
