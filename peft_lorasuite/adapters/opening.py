"""Loading an adapter by name onto its backbone, as a model of its task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from ..io.source import Source
from ..models.backbone import Backbone
from ..models.task import CAUSAL, CLASSIFIERS, LabelsLike
from .loading import adapter_folder, add_adapter, old_backbone_loader
from .peft_format import DIRECT_KINDS, check_config
from .reading import read_adapter, read_config


def open_adapter(
    model: Any, base: Any = None, revision: str | None = None, *, labels: LabelsLike | None = None,
    problem_type: str | None = None,
) -> Any:  # fmt: skip
    """Return a PEFT model as it is; load an adapter by name onto its backbone, ready for training.

    Args:
        model: A PEFT model, or the folder or Hub id of an adapter.
        base: The backbone; by default the base model of the adapter's config.
        revision: Revision of the adapter on the Hub.
        labels: Names of a classifier's labels; by default those of files beside the adapter.
        problem_type: Its ``problem_type``, likewise.
    """
    from peft import PeftModel

    if isinstance(model, PeftModel):
        return model
    if not isinstance(model, (str, Path)):
        raise LoraSuiteError("not an adapter", got=type(model).__name__, wanted="a PEFT model, a folder or a Hub id")
    source = Source(str(model), "adapter", revision)
    config, folder = read_config(source), adapter_folder(source)
    check_config(config, source.name)
    backbone: Backbone = old_backbone_loader(source, base, None, {}, do="pass the backbone (--base, base=)")()
    task = CAUSAL
    if config["peft_type"] in DIRECT_KINDS or config.get("task_type") in CLASSIFIERS:
        # refuses what `upgrade` refuses: PEFT would initialize missing tensors
        task = read_adapter(source, backbone.arch, old=backbone).with_labels(labels, problem_type).task
    return add_adapter(backbone.load(task=task), folder, source, base=repr(backbone), is_trainable=True)


def adapter_task_type(model: Any, revision: str | None = None) -> str | None:
    """Return the task type of a PEFT model, or of an adapter by name; None for anything else."""
    if isinstance(model, (str, Path)):
        return read_config(Source(str(model), "adapter", revision)).get("task_type")
    kind = getattr(getattr(model, "active_peft_config", None), "task_type", None)
    return getattr(kind, "value", kind)
