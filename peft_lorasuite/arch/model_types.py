"""What every causal language model type of transformers gets, with or without a converter."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from .registry import families

METHODS = {"transplant": ("distill", "transplant"), "distill": ("distill",)}
"""Entry of the table -> the methods that such a type gets without a converter; other entries say why it gets none."""
ALL = ("all",)


class ModelType(NamedTuple):
    """What a model type gets: all methods with a converter, some by running it, or none for a reason."""

    methods: tuple[str, ...]
    why: str = ""


class Measured(NamedTuple):
    """What types get without a converter (`benchmarks/any_type.py`), and the version of transformers they are of."""

    transformers: str
    types: dict[str, str]


@cache
def measured() -> Measured:
    """Read the table that is in the package."""
    text = files("peft_lorasuite").joinpath("data/methods_by_type.json").read_text(encoding="utf-8")
    return Measured(**json.loads(text))


def model_types() -> dict[str, ModelType]:
    """Return what each type of the installed transformers gets, and each with a converter, in alphabetical order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    table, converters = measured(), families()
    return {
        name: ModelType(ALL) if name in converters else without_converter(name)
        for name in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *table.types, *converters})
    }


def without_converter(name: str) -> ModelType:
    """Return what a model type gets without a converter."""
    table = measured()
    entry = table.types.get(name)
    if entry is None:
        return ModelType((), f"not measured (newer than transformers {table.transformers})")
    methods = METHODS.get(entry, ())
    return ModelType(methods, "" if methods else entry)
