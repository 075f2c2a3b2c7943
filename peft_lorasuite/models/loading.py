"""Whole models: what transformers must have found when it loads one, and what one in memory must be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..errors import LoraSuiteError, short_message


@contextmanager
def load_errors(where: str) -> Iterator[None]:
    """Turn whatever transformers raises for a config, a file, a dtype or a device into one sentence."""
    try:
        yield
    except LoraSuiteError:
        raise
    except Exception as error:  # every family and every quantizer raises what it likes
        raise LoraSuiteError(f"the model cannot be loaded: {short_message(error)}", where=where) from error


def load_causal_lm(location: str, options: dict[str, Any], *, where: str) -> Any:
    """Load a model, refusing a checkpoint that lacks a weight: transformers would draw it at random."""
    from transformers import AutoModelForCausalLM

    lenient = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # both are refused below, by name
    both: Any = AutoModelForCausalLM.from_pretrained(location, **options, **lenient)
    model, found = both
    for name, got, wanted in sorted(found["mismatched_keys"]):
        raise LoraSuiteError(
            "a weight does not fit the config", where=f"{where}, {name}", got=tuple(got), wanted=tuple(wanted)
        )
    missing = sorted(found["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise LoraSuiteError(
            "the checkpoint lacks a tensor", where=where, wanted=f"{missing[0]}{more}", do="fetch it again"
        )
    return model


def check_model(model: Any) -> nn.Module:
    """Return a model in memory if it is a whole, plain causal language model."""
    if not isinstance(model, nn.Module):
        raise LoraSuiteError("no backbone", got=type(model).__name__, wanted="a folder, a Hub id or a loaded model")
    if hasattr(model, "peft_config") or any(".base_layer." in name for name, _ in model.named_parameters()):
        raise LoraSuiteError(
            "the model carries an adapter already", got=type(model).__name__, wanted="a backbone without one",
            do="hand over its base (unload() or merge_and_unload()), or load the backbone again",
        )  # fmt: skip
    head = getattr(model, "get_output_embeddings", lambda: None)
    if getattr(model, "config", None) is None or head() is None:
        raise LoraSuiteError(
            "no causal language model", got=type(model).__name__, wanted="a transformers model with its head",
            do="load it with AutoModelForCausalLM",
        )  # fmt: skip
    return model
