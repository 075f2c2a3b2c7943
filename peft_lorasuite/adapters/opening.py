"""Loading an adapter by name onto its backbone, as a model of its task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from ..io.source import DEFAULTS, LoadOptions, Source
from ..models.backbone import Backbone
from ..models.task import CAUSAL, CLASSIFIERS, LabelsLike
from .loading import adapter_folder, add_adapter, load_tokenizer, old_backbone_loader
from .peft_format import DIRECT_KINDS, check_config
from .reading import read_adapter, read_config


def adapter_source(model: Any, revision: str | None = None, load: LoadOptions = DEFAULTS) -> Source | None:
    """Return the files of an adapter that is given by name; None for a loaded model."""
    return Source(str(model), "adapter", revision, **load.hub_kwargs()) if isinstance(model, (str, Path)) else None


def open_adapter(
    model: Any, tokenizer: Any = None, base: Any = None, revision: str | None = None, load: LoadOptions = DEFAULTS, *,
    labels: LabelsLike | None = None, problem_type: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Return a PEFT model as it is; load an adapter by name onto its backbone, ready for training. With its tokenizer.

    Args:
        model: A PEFT model, or the folder or Hub id of an adapter.
        tokenizer: Tokenizer, or its folder or Hub id; by default that of the adapter or the backbone.
        base: The backbone; by default the base model of the adapter's config.
        revision: Revision of the adapter on the Hub.
        load: How files are downloaded, and how the backbone is loaded.
        labels: Names of a classifier's labels; by default those of files beside the adapter.
        problem_type: Its ``problem_type``, likewise.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        return model, load_tokenizer(model, tokenizer, load=load)
    source = adapter_source(model, revision, load)
    if source is None:
        raise LoraSuiteError("not an adapter", got=type(model).__name__, wanted="a PEFT model, a folder or a Hub id")
    config, folder = read_config(source), adapter_folder(source)
    check_config(config, source.name)
    open_base = old_backbone_loader(source, base, None, load.model_kwargs(), do="pass the backbone (--base, base=)")
    backbone: Backbone = open_base()
    task = CAUSAL
    if config["peft_type"] in DIRECT_KINDS or config.get("task_type") in CLASSIFIERS:
        # refuses what `upgrade` refuses: PEFT would initialize missing tensors
        found = read_adapter(source, backbone.arch, old=backbone, labels_given=labels is not None)
        task = found.with_labels(labels, problem_type).task
    loaded = add_adapter(
        backbone.load(task=task), folder, source, base=repr(backbone), arch=lambda: backbone.arch, is_trainable=True
    )
    return loaded, load_tokenizer(loaded, tokenizer, backbone.source.revision, load)


def adapter_task_type(model: Any, revision: str | None = None, load: LoadOptions = DEFAULTS) -> str | None:
    """Return the task type of a PEFT model, or of an adapter by name; None for anything else."""
    source = adapter_source(model, revision, load)
    if source is not None:
        return read_config(source).get("task_type")
    kind = getattr(getattr(model, "active_peft_config", None), "task_type", None)
    return getattr(kind, "value", kind)
