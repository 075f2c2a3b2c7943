"""Configs, model types and names of modules: differences between versions of transformers."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from typing import Any

from .versions import has, needs_version, require

ROPE_DEFAULTS = {"rope_type": "default", "partial_rotary_factor": 1.0}
OLDER_ROPE_NAMES = {"type": "rope_type"}
SLIDING_UNSCALED = ("olmo3",)
"""Model types whose layers with a sliding window have the same rotary base, but no scaling of it."""
LAYERED = ("gemma4", "gemma4_text")
"""Model types whose layers have values of their own in the config."""
PER_LAYER = ("head_dim", "num_key_value_heads")
OLDER_HEADS = {"gpt_neox": ("lm_head", "embed_out", "5.14")}
"""Family -> path of the head in a model, its path before, and the version of transformers that renamed it."""


def first_version(model_type: str) -> str | None:
    """Return the version of transformers that added a model type; None if 4.57.1 has it or no version is known."""
    return next((version for version, types in new_model_types().items() if model_type in types), None)


@cache
def new_model_types() -> dict[str, list[str]]:
    """Return version of transformers -> types of causal language models that it added after 4.57.1."""
    return json.loads((files("peft_lorasuite") / "data" / "model_types.json").read_text(encoding="utf-8"))


def require_model_type(model_type: str, *, where: object = None) -> None:
    """Raise `LoraSuiteError` where the installed transformers is too old for a model type."""
    if minimum := first_version(model_type):
        require("transformers", minimum, f"model type {model_type!r}", where=where)


def installed_names(arch: Any) -> Any:
    """Return an `Architecture` with the names that its modules have in the installed version (transformers 5.14)."""
    new, old, renamed = OLDER_HEADS.get(arch.family, ("", "", "0"))
    if has("transformers", renamed) or arch.head != new:
        return arch
    return replace(arch, head=old, disk=tuple(pair for pair in arch.disk if pair[0] != new))


def current_config(config: Any) -> Any:
    """Return a config with the values that transformers 5.0 has, such as ``rope_parameters``.

    A Gemma 4 config has a plain ``per_layer_config``, as the newest versions write it. Anything but a config of
    transformers is returned as it is.

    Raises:
        LoraSuiteError: When ``rope_parameters`` is read and the config has one that the installed version ignores.
    """
    transformers = sys.modules.get("transformers")
    if transformers is None or not isinstance(config, transformers.PretrainedConfig):
        return config
    if has("transformers", "5.0"):
        return _LayeredConfig(config) if model_type(config) in LAYERED else config
    return _CurrentConfig(config)


class _LayeredConfig:
    """A config whose layers have values of their own."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "per_layer_config":
            return _layer_values(self._config)
        if name in PER_LAYER:  # an error of transformers 5.24 where the layers differ
            return self._config.to_dict()[name]
        return current_config(getattr(self._config, name))


def _layer_values(config: Any) -> dict[str, dict[str, Any]]:
    """Return layer -> its own values, which the first versions with Gemma 4 have as those of full attention."""
    values = config.to_dict()
    if "global_head_dim" not in values:
        own = values.get("per_layer_config") or {}
        return {str(int(layer)): dict(one) for layer, one in own.items()}  # "05" if there are more than ten
    own = {"head_dim": values["global_head_dim"]}
    if values["attention_k_eq_v"] and values.get("num_global_key_value_heads"):
        own["num_key_value_heads"] = values["num_global_key_value_heads"]
    full = [str(layer) for layer, kind in enumerate(values["layer_types"]) if kind == "full_attention"]
    return {layer: {name: value for name, value in own.items() if value} for layer in full}


class _CurrentConfig:
    """A config of transformers 4 with the names of transformers 5."""

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        if name == "rope_parameters":
            return _rope_parameters(self._config)
        if name == "model_type":
            return model_type(self._config)
        if name == "tie_word_embeddings":  # of a multimodal model, the one of its text model counts
            return getattr(self._config.get_text_config(decoder=True), name, True)
        return current_config(getattr(self._config, name))


def model_type(config: Any) -> str:
    """Return the model type, which a multimodal Qwen2 gives as that of its text model (transformers 5.0)."""
    if has("transformers", "5.0"):
        return getattr(config, "model_type", None) or ""
    return vars(config).get("model_type") or getattr(type(config), "model_type", "")


def spell_scaling(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return config values with the ``rope_type`` of ``rope_scaling``; older classes ignore ``type`` (5.0)."""
    scaling = values.get("rope_scaling")
    if has("transformers", "5.0") or not isinstance(scaling, Mapping) or "type" not in scaling:
        return dict(values)
    return {**values, "rope_scaling": {"rope_type": scaling["type"], **scaling}}


def _rope_parameters(config: Any) -> dict[str, Any]:
    """Return the ``rope_parameters`` by which transformers 4 runs a model."""
    if not hasattr(config, "rope_theta") or not type(config).model_type:
        return config.rope_parameters
    written = getattr(config, "rope_scaling", None) or {}  # GLM-4 has none
    scaling = {OLDER_ROPE_NAMES.get(name, name): value for name, value in written.items()}
    used = {**ROPE_DEFAULTS, "partial_rotary_factor": getattr(config, "partial_rotary_factor", None) or 1.0, **scaling}
    used["rope_theta"] = config.rope_theta
    if hasattr(config, "rope_local_base_freq") or model_type(config) in SLIDING_UNSCALED:
        local = {**ROPE_DEFAULTS, "rope_theta": getattr(config, "rope_local_base_freq", config.rope_theta)}
        used = {"full_attention": used, "sliding_attention": local}
    _check_rope(config.__dict__.get("rope_parameters"), used)
    return used


def _check_rope(written: Any, used: Mapping[str, Any]) -> None:
    """Refuse a ``rope_parameters`` of transformers 5 where transformers 4, which ignores it, runs other values."""
    for name, value in (written or {}).items() if isinstance(written, Mapping) else ():
        if isinstance(value, Mapping):
            _check_rope(value, used[name] if isinstance(used.get(name), Mapping) else used)
        elif value is not None and value != used.get(name):
            raise needs_version("transformers", "5.0", f"rope_parameters in the config ({name} {value})")
