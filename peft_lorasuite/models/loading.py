"""Checks of loaded models: of what transformers loaded, and of a model that the caller passes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import LoraSuiteError, short_message


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


def load_causal_lm(location: str, options: dict[str, Any], *, where: str) -> Any:
    """Load a causal language model.

    Raises:
        LoraSuiteError: When the checkpoint has no or another shape of a weight: transformers would initialize it at
            random.
    """
    from transformers import AutoModelForCausalLM

    lenient = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # so that the errors below name the weight
    loaded: Any = AutoModelForCausalLM.from_pretrained(location, **options, **lenient)
    model, info = loaded
    for name, got, wanted in sorted(info["mismatched_keys"]):
        raise LoraSuiteError(
            "a weight does not fit the config", where=f"{where}, {name}", got=tuple(got), wanted=tuple(wanted)
        )
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise LoraSuiteError(
            "the checkpoint lacks a tensor", where=where, wanted=f"{missing[0]}{more}", do="fetch it again"
        )
    return model


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
        LoraSuiteError: For anything but a causal language model without adapters.
    """
    if not isinstance(model, nn.Module):
        raise LoraSuiteError("the backbone must be a folder, a Hub id or a loaded model", got=type(model).__name__)
    if hasattr(model, "peft_config") or any(".base_layer." in name for name, _ in model.named_parameters()):
        raise LoraSuiteError(
            "the model already has an adapter", got=type(model).__name__, wanted="a backbone without adapters",
            do="pass its base model (unload() or merge_and_unload()), or load the backbone again",
        )  # fmt: skip
    head = getattr(model, "get_output_embeddings", lambda: None)
    if getattr(model, "config", None) is None or head() is None:
        raise LoraSuiteError(
            "the model must be a causal language model", got=type(model).__name__,
            wanted="a transformers model with its head", do="load it with AutoModelForCausalLM",
        )  # fmt: skip
    return model
