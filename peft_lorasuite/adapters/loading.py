"""Models, adapters and tokenizers by name, through the loaders of transformers and PEFT; never a pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import LoraSuiteError, short_message
from ..io.checkpoint import Checkpoint, no_safetensors_error, read_tensors
from ..io.source import Source, split_revision
from ..models.backbone import Backbone
from ..models.dtype import choose_dtype
from ..models.loading import load_causal_lm, load_errors
from ..models.upcast import compute_in_float32
from .peft_format import CONFIG, WEIGHTS
from .reading import base_model_of, read_config


def load_model(source: Source) -> Any:
    """Load a model of any family that transformers knows, on the GPUs if there are any."""
    if source.fetch(CONFIG) is not None:
        raise LoraSuiteError("the model is an adapter itself", where=source.name, wanted="a backbone")
    source.require("config.json")
    checkpoint = Checkpoint(source)
    checkpoint.fetch()  # refuses a pickle, and what is not whole
    where = source.name if source.folder is None else str(source.folder)
    device_map = "auto" if torch.accelerator.is_available() else None
    stored = checkpoint.dtype
    running = choose_dtype("auto", stored, parameters=checkpoint.num_bytes // stored.itemsize, device_map=device_map)
    running.log(source.name)
    options = {"revision": source.commit, "dtype": running.dtype, "device_map": device_map, "use_safetensors": True}
    with load_errors(source.name):
        model = load_causal_lm(where, options, where=source.name)
    return compute_in_float32(model) if running.upcast else model


def adapter_folder(source: Source) -> Path:
    """Return the local folder of an adapter, after its config and weights were read: cheap, and before any model."""
    read_config(source)
    path = source.fetch(WEIGHTS)
    if path is None:
        raise no_safetensors_error(source, WEIGHTS)
    if not read_tensors(path, where=f"{source.name}/{WEIGHTS}"):  # PEFT would put a new adapter in its place
        raise LoraSuiteError(
            "the adapter's file holds no tensor", where=f"{source.name}/{WEIGHTS}", do="fetch it again"
        )
    return source.require(CONFIG).parent


def add_adapter(model: Any, folder: Path, source: Source, *, base: Any, is_trainable: bool = False) -> Any:
    """Put an adapter, see `adapter_folder`, on a model; ``base`` is what the model is called."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except Exception as error:  # PEFT raises whatever its code meets first in a config that it does not know
        raise LoraSuiteError(
            f"the adapter does not fit {base}: {short_message(error)}", where=source,
            do="name the backbone that it was made for, or fetch it again",
        ) from error  # fmt: skip


def load_tokenizer(model: Any, tokenizer: Any, revision: str | None = None) -> Any:
    """Return a tokenizer as it is, or load it by name, or from where the backbone came from, at its ``revision``."""
    from transformers import AutoTokenizer

    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    if tokenizer:
        name, revision = split_revision(tokenizer)
    else:
        name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name:
        raise LoraSuiteError("the model does not say where its tokenizer is", do="pass tokenizer=")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision or "main")
    except Exception as error:  # see Backbone.tokenizer
        raise LoraSuiteError(
            f"the tokenizer cannot be loaded: {short_message(error)}", where=name, do="pass tokenizer="
        ) from error


def old_backbone_loader(adapter: Source, source_model: Any, revision: str | None, access: dict[str, Any]) -> Any:
    """Return a function that opens the old backbone when it is wanted: a published map can make it unnecessary."""
    if source_model is not None:
        return lambda: Backbone.open(source_model, revision=revision, **access)
    name, own = base_model_of(adapter)
    stranger = adapter.folder is None
    return lambda: Backbone.open(name, revision=revision or own, hub_only=stranger, **access)
