"""Forward passes of any causal language model: the inputs that it accepts, its final states, logits at some columns."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError, short_message

RUNNING = re.compile(r"transformers[/\\](?:models|generation)[/\\]|torch[/\\]autograd[/\\]")
"""Paths of the code that runs a model and computes its gradients."""


@contextmanager
def forward_errors(model_types: Sequence[str]) -> Iterator[None]:
    """Turn what a model's own code raises into a `LoraSuiteError`: some types need more than the ids of a text.

    Args:
        model_types: The types without a converter that are run; nothing is turned if there is none.
    """
    try:
        yield
    except (LoraSuiteError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # families raise exceptions of any type
        files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
        if not (model_types and any(map(RUNNING.search, files))):
            raise
        raise LoraSuiteError(
            f"the model cannot be run or trained on text alone: {short_message(error)}",
            where=" and ".join(model_types), do="choose another backbone, or update transformers",
        ) from error  # fmt: skip


class _HeadReached(Exception):  # noqa: N818 (control flow, not an error)
    """Ends a forward pass at the language-model head."""


def unwrap(model: Any) -> Any:
    """Return the transformers model inside a PEFT model, or a plain model itself; adapters stay attached."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def model_inputs(model: Any, **inputs: Any) -> dict[str, Any]:
    """Return those of the inputs that the model accepts; some have no cache and no attention mask."""
    known = _parameters(model)
    anything = any(one.kind == inspect.Parameter.VAR_KEYWORD for one in known.values())
    return {name: value for name, value in inputs.items() if anything or name in known}


def final_states(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return what the language-model head reads, (rows, length, D); the head itself does not run.

    In most families it is the decoder's ``last_hidden_state``; others scale or project that first.
    """
    found: list[Tensor] = []

    def stop(module: Any, args: Any) -> None:
        found.append(args[0])
        raise _HeadReached

    hook = unwrap(model).get_output_embeddings().register_forward_pre_hook(stop)
    try:
        model(**inputs)
    except _HeadReached:
        pass
    finally:
        hook.remove()
    return found[0]


def logits_at(model: Any, inputs: dict[str, Any], columns: Tensor) -> tuple[Any, Tensor]:
    """Return the outputs of a model, and its logits at some columns, (rows, columns, tokens)."""
    if keeps_logits(model):
        outputs = model(**inputs, logits_to_keep=columns)
        return outputs, outputs.logits
    outputs = model(**inputs)
    return outputs, outputs.logits[:, columns]


def logits_at_places(model: Any, inputs: dict[str, Any], rows: Tensor, columns: Tensor) -> tuple[Any, Tensor]:
    """Return the outputs of a model, and its logits at some places alone, (places, tokens).

    The head, which is as wide as the vocabulary, is computed for nothing else.

    Args:
        model: A plain or PEFT model; it may be wrapped for several processes.
        inputs: Its inputs, without labels.
        rows: Row of every place in the batch, (places,).
        columns: Column of every place, (places,).
    """
    head = unwrap(getattr(model, "module", model)).get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda module, args: (args[0][rows, columns][None], *args[1:]))
    try:
        outputs = model(**inputs)
    finally:
        hook.remove()
    return outputs, outputs.logits[0]


def keeps_logits(model: Any) -> bool:
    """Return whether a model can compute the logits at some columns alone."""
    return "logits_to_keep" in _parameters(model)


def _parameters(model: Any) -> dict[str, inspect.Parameter]:
    model = getattr(model, "module", model)  # of several processes
    return dict(inspect.signature(unwrap(model).forward).parameters)
