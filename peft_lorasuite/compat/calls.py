"""Calls of transformers, its Trainer and PEFT: differences between their versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LoraSuiteError
from .versions import has, needs_version, require


def body_name(model: Any) -> str:
    """Return the name of a model's part without the head; multimodal classes do not give it (transformers 5.0)."""
    return model.base_model_prefix or "model"


def body(model: Any) -> Any:
    """Return a model without its head, or a model that has none itself (transformers 5.0)."""
    return getattr(model, body_name(model), model)


def mismatched_weights(model: Any, info: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return (name, shape in the checkpoint, shape in the model) of the weights that do not fit (transformers 5.0).

    Before, the loading info has the names alone: the shape in the checkpoint is None.
    """
    if has("transformers", "5.0"):
        return sorted((name, tuple(got), tuple(wanted)) for name, got, wanted in info["mismatched_keys"])
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    return [(name, None, shapes.get(name)) for name in sorted(info["mismatched_keys"])]


def cache_argument(cache: Any) -> dict[str, Any]:
    """Return the keyword argument of a model that takes a cache; a wrong name would be ignored (transformers 5.24)."""
    return {"cache" if has("transformers", "5.24") else "past_key_values": cache}


def output_cache(output: Any) -> Any:
    """Return the cache in the output of a model (transformers 5.24)."""
    return output.cache if has("transformers", "5.24") else output.past_key_values


def check_tokenizer(settings: Mapping[str, Any], *, where: object) -> None:
    """Raise `LoraSuiteError` for a tokenizer_config.json that the installed transformers cannot read (5.0).

    Args:
        settings: The values of the file.
        where: Its name.
    """
    if settings.get("tokenizer_class") == "TokenizersBackend":
        require("transformers", "5.0", "tokenizer_class 'TokenizersBackend'", where=where)
    if isinstance(settings.get("extra_special_tokens"), list):
        require("transformers", "5.0", "a list of extra_special_tokens", where=where)


def tokenizer_error(error: BaseException, *, where: object) -> LoraSuiteError | None:
    """Return the error for a tokenizer of unnamed class and a model type unknown to transformers (5.0); else None."""
    if has("transformers", "5.0") or not str(error).startswith("Unrecognized configuration class"):
        return None
    return needs_version("transformers", "5.0", "a tokenizer_config.json without tokenizer_class", where=where)


def training_arguments(*, warmup: float, use_cache: bool) -> dict[str, Any]:
    """Return arguments of ``TrainingArguments`` that not every version has (transformers 5.0).

    Args:
        warmup: Steps of the warm-up; a value below 1 is a fraction of the steps.
        use_cache: Value of the config, which the Trainer overwrites with its own from 5.0 on.
    """
    if has("transformers", "5.0"):
        return {"warmup_steps": warmup, "use_cache": use_cache}
    return {"warmup_ratio": warmup} if warmup < 1 else {"warmup_steps": int(warmup)}


def converts_to_lora(model: Any) -> bool:
    """Return whether PEFT converts the adapter of a model to a LoRA itself (PEFT 0.19)."""
    return has("peft", "0.19") and model.supports_lora_conversion()


def check_vera(unexpected: Sequence[str], *, where: object) -> None:
    """Raise `LoraSuiteError` if PEFT has ignored the saved projections of a VeRA and drawn others (PEFT 0.21)."""
    if "base_model.vera_A" in unexpected:
        require("peft", "0.21", "a VeRA with save_projection", where=where)


def unsaved_biases(model: Any, name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the biases that ``bias="lora_only"`` has trained and PEFT has left out of a state dict (PEFT 0.21).

    Args:
        model: The PEFT model.
        name: Name of the adapter.
        tensors: The state dict of the adapter; its names tell the adapted modules.
    """
    if has("peft", "0.21") or getattr(model.peft_config[name], "bias", "none") != "lora_only":
        return {}
    biases = {f"{key.partition('.lora_')[0]}.base_layer.bias" for key in tensors if ".lora_" in key}
    return {key: value for key, value in model.state_dict().items() if key in biases - set(tensors)}
