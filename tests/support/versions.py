"""What tests need of the versions of libraries, and configs in the spelling of the installed transformers."""

from __future__ import annotations

from typing import Any

import pytest

from peft_lorasuite.compat import first_version, has, installed

NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}


def needs(library: str, minimum: str, what: str) -> None:
    """Skip the test where an installed library is older than ``minimum``; ``what`` is the subject of the reason."""
    if not has(library, minimum):
        found = ".".join(map(str, installed(library)))
        pytest.skip(f"{what} needs {library} >= {minimum} (here {found})")


def needs_type(model_type: str) -> None:
    """Skip the test where the installed transformers does not have a model type."""
    if minimum := first_version(model_type):
        needs("transformers", minimum, f"model type {model_type}")


TINY_SINCE_5 = ("glm4v", "gpt_neo", "jamba", "mixtral", "qwen2_moe", "qwen3_vl", "zamba")
"""Types whose configs or kernels have transformers 4 build other tiny models, or none."""


def needs_tiny(model_type: str) -> None:
    """Skip the test where the installed transformers does not build the tiny model of a type."""
    needs_type(model_type)
    if model_type in TINY_SINCE_5:
        needs("transformers", "5.0", f"the tiny model of type {model_type}")


def installed_spelling(values: dict[str, Any], model_type: str = "") -> dict[str, Any]:
    """Return config values with ``rope_parameters`` written as the installed transformers reads them (5.0)."""
    if has("transformers", "5.0"):
        return values
    model_type = values.get("model_type", model_type)
    result = {
        name: installed_spelling(value, model_type) if name.endswith("_config") and isinstance(value, dict) else value
        for name, value in values.items()
    }
    rope = dict(result.pop("rope_parameters", None) or {})
    if "full_attention" in rope:
        result["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = dict(rope["full_attention"])
    names = NEOX if model_type == "gpt_neox" else {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            result[names.get(name, name)] = rope.pop(name)
    if set(rope) - {"rope_type"}:
        result["rope_scaling"] = {"type": rope.get("rope_type")} | rope if model_type == "phi3" else rope
    return result
