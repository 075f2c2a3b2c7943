"""Checks of loaded models: of what transformers loaded, and of a model that the caller passes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ..arch.spec import Architecture
from ..compat import body_name, mismatched_weights, model_type
from ..errors import LoraSuiteError, short_message
from .logs import drop_messages, no_bars
from .quantized import quantized_error
from .task import CAUSAL, Task

ACCESS = ("revision", "token", "cache_dir", "local_files_only", "trust_remote_code")
"""Options of loading that say how files are found."""


@contextmanager
def load_errors(where: str, do: str | None = None) -> Iterator[None]:
    """Turn what transformers raises for a config, a file, a dtype or a device into a `LoraSuiteError`.

    Args:
        where: Name of the model.
        do: What the user can do.
    """
    try:
        yield
    except LoraSuiteError:
        raise
    except Exception as error:  # families and quantizers raise exceptions of any type
        raise LoraSuiteError(f"the model cannot be loaded: {short_message(error)}", where=where, do=do) from error


def auto_class(config: Any, task: Task = CAUSAL) -> Any:
    """Return the class of transformers that loads a backbone: some multimodal types have no causal language model."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    multimodal = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    only = model_type(config) in multimodal and model_type(config) not in causal
    return AutoModelForImageTextToText if only and task.causal else task.auto_class


def empty_model(config: Any, location: str, access: Mapping[str, Any] | None) -> Any:
    """Return a model without weights; of trusted code that of the revision, which ``from_config`` does not know.

    Args:
        config: The model's config.
        location: Its folder or Hub id.
        access: Options of loading, where the code of its repository is trusted.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    kind = auto_class(config)
    reference = (getattr(config, "auto_map", None) or {}).get(kind.__name__)
    with torch.device("meta"):
        if access is not None and reference:
            files = {name: value for name, value in access.items() if name != "trust_remote_code"}
            return get_class_from_dynamic_module(reference, location, **files)._from_config(copy.deepcopy(config))
        return kind.from_config(copy.deepcopy(config), trust_remote_code=False)


def load_model(location: str, options: dict[str, Any], *, where: str, task: Task = CAUSAL) -> Any:
    """Load a model of the task's class.

    The head of a classifier, which comes with the adapter, and a language-model head that is not read may be missing
    from the checkpoint.

    Raises:
        LoraSuiteError: When the checkpoint has no or another shape of another weight: transformers would initialize it
            at random.
    """
    from transformers import AutoConfig

    access = {name: options[name] for name in ACCESS if name in options}
    config = options.get("config") or AutoConfig.from_pretrained(location, **access)
    lenient = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that the errors below name the weight
    optional = task.classifies or not task.reads_head
    with no_bars(), drop_messages("transformers.modeling_utils") if optional else nullcontext():
        loaded: Any = auto_class(config, task).from_pretrained(location, **options, **lenient)
    model, info = loaded

    def needed(name: str) -> bool:
        return not optional or name.startswith(f"{body_name(model)}.")

    for name, got, wanted in mismatched_weights(model, info):
        if needed(name):
            raise LoraSuiteError("a weight does not fit the config", where=f"{where}, {name}", got=got, wanted=wanted)
    if not getattr(config, "quantization_config", None):
        check_plain(model, where)
    missing = sorted(filter(needed, info["missing_keys"]))
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise LoraSuiteError(
            "the checkpoint lacks a tensor", where=where, wanted=f"{missing[0]}{more}", do="fetch it again"
        )
    return model


def check_plain(model: nn.Module, where: str) -> None:
    """Refuse 8-bit numbers without a quantization config, which not every version of transformers converts."""
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.element_size() == 1:
            raise quantized_error(name, f"{where}, {name}", weight.dtype)


def check_depth(names: Iterable[str], layers: int, *, where: str) -> None:
    """Raise `LoraSuiteError` if a checkpoint has fewer layers than its config; building them first can take minutes.

    Args:
        names: Names of the checkpoint's tensors.
        layers: Number of layers in the config.
        where: The backbone, for the message.
    """
    found = {int(part) for name in names for part in name.split(".") if part.isdecimal() and len(part) < 10}
    if found and max(found) + 1 < layers:
        raise LoraSuiteError(
            "the checkpoint has fewer layers than its config", where=where, got=f"{max(found) + 1} layers",
            wanted=f"{layers} layers", do="fix the number of layers in config.json, or fetch the backbone again",
        )  # fmt: skip


def check_model(model: Any) -> nn.Module:
    """Return a model in memory, checked.

    Raises:
        LoraSuiteError: For anything but a transformers model without adapters.
    """
    if not isinstance(model, nn.Module):
        raise LoraSuiteError("the backbone must be a folder, a Hub id or a loaded model", got=type(model).__name__)
    if hasattr(model, "peft_config") or any(".base_layer." in name for name, _ in model.named_parameters()):
        raise LoraSuiteError(
            "the model already has an adapter", got=type(model).__name__, wanted="a backbone without adapters",
            do="pass its base model (unload() or merge_and_unload()), or load the backbone again",
        )  # fmt: skip
    if getattr(model, "config", None) is None or not hasattr(model, "base_model"):
        raise LoraSuiteError(
            "the backbone must be a transformers model", got=type(model).__name__,
            do="load it with AutoModelForCausalLM",
        )  # fmt: skip
    return model


def decoder_layers(model: Any, layer_path: str) -> Any:
    """Return the list of decoder layers; the path lacks its first component in a model without a head."""
    inner = layer_path if hasattr(model, layer_path.partition(".")[0]) else layer_path.partition(".")[2]
    return model.get_submodule(inner)


def set_activation_floor(model: Any, arch: Architecture) -> Any:
    """Set the threshold of a model's activation functions, if its architecture has one (FATReLU), and return it."""
    for layer in decoder_layers(model, arch.layer_path) if arch.activation_floor else ():
        layer.mlp.act_fn = nn.Threshold(arch.activation_floor, 0.0)
    return model
