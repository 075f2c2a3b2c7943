"""Loading of models, adapters and tokenizers by name, with transformers and PEFT; pickle files are never loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..arch.spec import Architecture
from ..errors import LoraSuiteError, short_message
from ..io.checkpoint import Checkpoint, no_safetensors_error, open_safetensors, read_tensors
from ..io.source import DEFAULTS, LoadOptions, Source, split_revision
from ..io.temporary import temporary_folder
from ..models.backbone import Backbone
from ..models.config import load_config
from ..models.dtype import choose_dtype
from ..models.loading import check_depth, load_errors
from ..models.loading import load_model as load_checkpoint
from ..models.task import CLASSIFIERS, HEADS
from ..models.tokenizer import open_tokenizer
from ..models.upcast import compute_in_float32
from .fit_vocabulary import find_tokenizer, fit_vocabulary
from .peft_format import CONFIG, WEIGHTS
from .peft_model import names_modules, renamed_folder
from .reading import PASS_OLD, base_model_of, check_gathered, read_config
from .tokenizer import fetch_tokenizer


def load_model(source: Source, *, trust_remote_code: bool = False) -> Any:
    """Load a causal language model of any architecture in transformers, on GPUs if there are any."""
    if source.fetch(CONFIG) is not None:
        raise LoraSuiteError("the model is an adapter", where=source.name, wanted="a backbone")
    access = {"revision": source.commit, "trust_remote_code": trust_remote_code}
    config = load_config(source, access if trust_remote_code else None).get_text_config()
    checkpoint = Checkpoint(source)
    check_depth(checkpoint, getattr(config, "num_hidden_layers", None) or 1, where=repr(source))
    checkpoint.fetch()  # raises for pickle files and missing shards
    device_map = "auto" if torch.accelerator.is_available() else None
    stored = checkpoint.dtype
    running = choose_dtype("auto", stored, parameters=checkpoint.num_bytes // stored.itemsize, device_map=device_map)
    running.log(source.name)
    options = {**access, "dtype": running.dtype, "device_map": device_map, "use_safetensors": True}
    with load_errors(source.name):
        model = load_checkpoint(source.location, options, where=source.name)
    return compute_in_float32(model) if running.upcast else model


def known_architecture(source: Source, *, trust_remote_code: bool = False) -> Architecture | None:
    """Return the architecture of a backbone; None for a type that cannot be upgraded, but evaluated."""
    try:
        return Backbone(source, trust_remote_code=trust_remote_code).arch
    except LoraSuiteError:
        return None


def adapter_folder(source: Source) -> Path:
    """Return the local folder of an adapter after a check of its config and weights, before any model is loaded."""
    read_config(source)
    path = source.fetch(WEIGHTS)
    if path is None:
        raise no_safetensors_error(source, WEIGHTS)
    where = f"{source.name}/{WEIGHTS}"
    tensors = read_tensors(path, where=where)
    if not tensors:  # PEFT would load a newly initialized adapter
        raise LoraSuiteError("the adapter has no tensors", where=where, do="fetch it again")
    check_gathered(tensors, where=where)
    fetch_tokenizer(source)
    return source.require(CONFIG).parent


def add_adapter(
    model: Any, folder: Path, source: Source, *, base: Any, arch: Callable[[], Architecture | None] | None = None,
    is_trainable: bool = False,
) -> Any:  # fmt: skip
    """Add an adapter to a model with PEFT, after resizing the model's token tables to those of the adapter.

    PEFT only warns of tensors that it does not find, and initializes them.

    The attribute ``adapter_tokenizer`` of the result is the tokenizer in the folder if it has tokens that the model's
    own lacks, else None.

    Args:
        model: The backbone.
        folder: Folder of the adapter, from `adapter_folder`.
        source: Source of the adapter, for error messages.
        base: Name of the backbone, for error messages.
        arch: Returns the architecture of the backbone, for tensor names that PEFT does not know; without it they stay
            as they are.
        is_trainable: Whether the adapter is to be trained.
    """
    from peft import PeftModel

    kind = read_config(source).get("task_type")
    if kind in CLASSIFIERS and not any(hasattr(model, name) for name in HEADS):
        raise LoraSuiteError(
            "the adapter is a classifier, and the model has no classification head", where=source, got=kind,
            do="evaluate it on texts with labels (`evaluate ADAPTER --data FILE`, evaluate_classifier)",
        )  # fmt: skip
    tokenizer = find_tokenizer(folder, partial(load_tokenizer, model, None))
    try:
        fit_vocabulary(model, folder)
        with temporary_folder() as scratch:
            named = _named_folder(model, folder, source, arch, scratch)
            loaded: Any = PeftModel.from_pretrained(model, str(named), is_trainable=is_trainable)
    except LoraSuiteError:
        raise
    except Exception as error:  # for a malformed config PEFT raises many kinds of errors
        raise LoraSuiteError(
            f"the adapter does not fit {base}: {short_message(error)}", where=source,
            do="pass the backbone that it was made for, or fetch it again",
        ) from error  # fmt: skip
    loaded.adapter_tokenizer = tokenizer
    return loaded


def _named_folder(
    model: Any, folder: Path, source: Source, arch: Callable[[], Architecture | None] | None, scratch: Path
) -> Path:
    """Return a folder with the adapter under names that PEFT knows, as far as the architecture shows them."""
    names = open_safetensors(folder / WEIGHTS, where=f"{source.name}/{WEIGHTS}").keys()
    found = None if arch is None or names_modules(model, names) else arch()
    return folder if found is None else renamed_folder(source, found, scratch)


def load_tokenizer(model: Any, tokenizer: Any, revision: str | None = None, load: LoadOptions = DEFAULTS) -> Any:
    """Return the tokenizer, load it by its name, or if it is None load the tokenizer of the adapter or the model.

    Args:
        model: The model, with an adapter's tokenizer as ``adapter_tokenizer`` if it has one.
        tokenizer: A tokenizer, a folder or Hub id, or None.
        revision: Revision of the model's own tokenizer.
        load: How files are downloaded, and whether code of a repository may run.
    """
    if tokenizer is not None and not isinstance(tokenizer, (str, Path)):
        return tokenizer
    if tokenizer is None and getattr(model, "adapter_tokenizer", None) is not None:
        return model.adapter_tokenizer
    if tokenizer:
        name, revision = split_revision(tokenizer)
    else:
        name = str(getattr(model.config, "_name_or_path", "") or "")
    if not name:
        raise LoraSuiteError("the model does not say where its tokenizer is", do="pass tokenizer=")
    source, revision = Source(name, "tokenizer", revision, **load.hub_kwargs()), revision or "main"
    options = {**load.hub_kwargs(), "trust_remote_code": load.trust_remote_code}
    return open_tokenizer(source, name, do="pass tokenizer=", revision=revision, **options)


def old_backbone_loader(
    adapter: Source, source_model: Any, revision: str | None, access: dict[str, Any], *, do: str = PASS_OLD
) -> Callable[[], Backbone]:
    """Return a function that opens the old backbone, which may not be needed if there is an upgrade map.

    Args:
        adapter: The adapter, whose config names the backbone if ``source_model`` is None.
        source_model: The old backbone, or None.
        revision: Revision of the old backbone; overrides the one in the adapter's config.
        access: Keyword arguments of `Backbone.open`.
        do: What the error advises if the base model of the config cannot be opened.
    """
    if source_model is not None:
        return lambda: Backbone.open(source_model, revision=revision, **access)
    name, own = base_model_of(adapter, do=do)
    untrusted = adapter.folder is None

    def open_base_model() -> Backbone:
        try:
            backbone = Backbone.open(name, revision=revision or own, hub_only=untrusted, **access)
            _ = backbone.source.commit, backbone.config  # looks the name up
        except LoraSuiteError as error:
            raise LoraSuiteError(
                f"{error.what}; it is the base model in the config of {adapter.name}", where=error.where,
                got=error.got, wanted=error.wanted, do=f"{error.do or 'check the name'}, or {do}",
            ) from error  # fmt: skip
        return backbone

    return open_base_model
