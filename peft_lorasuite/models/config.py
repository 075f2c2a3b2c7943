"""Configs of backbones, read by transformers, and without leave of the user without running code of a repository."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..arch.registry import has_converter
from ..arch.spec import Architecture
from ..compat import require_model_type, spell_scaling
from ..errors import LoraSuiteError, short_message
from ..io.source import Source


def load_config(source: Source, access: Mapping[str, Any] | None = None) -> Any:
    """Return the transformers config.

    For a model type without a converter it is read by the code of the repository, if there is some and it is trusted;
    for one that transformers does not know, it otherwise has the plain values.

    Args:
        source: The backbone.
        access: Options of loading, where the code of its repository is trusted.
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = _read_values(source)
    require_model_type(values["model_type"], where=source.full_name("config.json"))
    if access is not None and "auto_map" in values and not has_converter(values["model_type"]):
        return _config_of_code(source, access)
    if values["model_type"] not in CONFIG_MAPPING:
        scaling = values.pop("rope_scaling", None) or {}
        rope = {"rope_theta": values.get("rope_theta", 10000.0), **scaling}
        return PretrainedConfig.from_dict({"rope_parameters": rope, **values})
    try:
        return AutoConfig.for_model(**spell_scaling(values))
    except Exception as error:  # strict dataclasses raise many types; all mean the same to the user
        raise LoraSuiteError(
            f"the config cannot be read: {short_message(error)}", where=source.full_name("config.json")
        ) from error


def _config_of_code(source: Source, access: Mapping[str, Any]) -> Any:
    """Return the config as the class in the repository reads it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source.location, **access)
    except Exception as error:  # the code can raise anything
        raise LoraSuiteError(
            f"the code of the repository cannot read the config: {short_message(error)}",
            where=source.full_name("config.json"),
        ) from error


def running_config(source: Source, arch: Architecture) -> Any:
    """Return the config of the known model type that runs a checkpoint of an unknown one; None if not needed."""
    if not arch.runs_as:
        return None
    from transformers import AutoConfig

    values = {name: value for name, value in _read_values(source).items() if name != "auto_map"}
    return AutoConfig.for_model(**spell_scaling({**values, **dict(arch.runs_as)}))


def _read_values(source: Source) -> dict[str, Any]:
    """Read config.json; where it leaves the model type to the repository's code, derive it from the model class."""
    values = _decode_floats(source.read_json("config.json"))
    classes = values.get("architectures") or [""]
    guess = str(classes[0]).removesuffix("ForCausalLM").lower() if "auto_map" in values else None
    model_type = values.get("model_type") or guess
    if not isinstance(model_type, str) or not model_type:
        raise LoraSuiteError("the config has no model_type", where=source.full_name("config.json"))
    return {**values, "model_type": model_type}


def _decode_floats(value: Any) -> Any:
    """Replace what transformers writes for a number that JSON lacks, such as ``{"__float__": "Infinity"}``."""
    if isinstance(value, dict):
        if set(value) == {"__float__"}:
            with suppress(TypeError, ValueError):  # otherwise transformers refuses it by its name
                return float(value["__float__"])
        return {name: _decode_floats(one) for name, one in value.items()}
    return [_decode_floats(one) for one in value] if isinstance(value, list) else value
