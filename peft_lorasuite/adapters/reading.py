"""Reading a PEFT adapter from a folder or the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..io.checkpoint import no_safetensors_error, open_safetensors, read_tensors
from ..io.source import Source
from ..linalg.lowrank import check_values
from ..models.backbone import Backbone
from .adapter import Adapter
from .added_tokens import read_added_tokens
from .class_head import stored_labels
from .parsing import from_tensors
from .peft_format import CONFIG, DIRECT_KINDS, LORA_DEFAULTS, WEIGHTS, check_config, needs_backbones
from .token_tables import needs_backbone_error

PASS_OLD = "pass the old backbone (--from, source_model=)"
"""What to do if the base model in an adapter's config cannot be used."""


def read_config(source: Source) -> dict[str, Any]:
    """Read an adapter's config, with PEFT's default rank and alpha where it has none.

    Raises:
        LoraSuiteError: If it is missing or malformed, or has no ``peft_type``.
    """
    config = source.read_json(CONFIG, do="pass the folder or Hub repository of a PEFT adapter")
    where = f"{source.name}/{CONFIG}"
    if not config.get("peft_type"):
        raise LoraSuiteError("the config has no peft_type", where=where, do="check that it is a PEFT adapter")
    return {**LORA_DEFAULTS, **config} if config["peft_type"] == "LORA" else config


def adapter_needs_backbones(source: Source) -> bool:
    """Whether the upgrade of an adapter needs both backbones; raises `LoraSuiteError` if it cannot be upgraded."""
    config = read_config(source)
    check_config(config, source.name)
    path = source.fetch(WEIGHTS)
    if path is None:
        raise no_safetensors_error(source, WEIGHTS)
    return needs_backbones(config, open_safetensors(path, where=f"{source.name}/{WEIGHTS}").keys())


def read_adapter(
    source: Source, arch: Architecture, *, old: Backbone | None = None, rank: int | None = None,
    labels_given: bool = False,
) -> Adapter:  # fmt: skip
    """Read an adapter.

    Args:
        source: Folder or repository of the adapter.
        arch: Architecture of its backbone.
        old: Its backbone; needed for trained biases and token tables, and for types that are converted to LoRA first.
        rank: Rank of the LoRA that such a type is converted to.
        labels_given: Whether the caller gives a classifier's labels: malformed ones in its files do not count then.

    Raises:
        LoraSuiteError: If a file is missing or malformed, a tensor does not fit the backbone, the adapter cannot be
            transferred, or the backbone is needed and not given.
    """
    config = read_config(source)
    check_config(config, source.name)
    path = source.fetch(WEIGHTS)
    if path is None:
        raise no_safetensors_error(source, WEIGHTS)
    where = f"{source.name}/{WEIGHTS}"
    tensors = read_tensors(path, where=where)
    check_values(*(tensor for tensor in tensors.values() if tensor.is_floating_point()), where=where)
    check_gathered(tensors, where=where)
    if config["peft_type"] == "TRAINABLE_TOKENS":
        config, tensors = _as_lora(config, tensors)
    added = None if old is None else read_added_tokens(source, tensors, config, old)
    if added is not None:
        old, arch = added.backbone, added.backbone.arch
    if config["peft_type"] not in DIRECT_KINDS:
        from .conversion import convert_to_lora

        if old is None:
            raise needs_backbone_error(f"the adapter is a {config['peft_type']} and is converted to LoRA first")
        adapter = convert_to_lora(source, config, tensors, old, rank, from_tensors)
    else:
        adapter = from_tensors(tensors, config, arch, source=source, old=old)
    task = adapter.task
    if adapter.head:
        try:
            task = stored_labels(task, source, old)
        except LoraSuiteError:
            if not labels_given:
                raise
    return replace(adapter, added=added, task=task)


def check_gathered(tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Raise `LoraSuiteError` for tensors of shape (0,): DeepSpeed ZeRO-3 leaves them where nothing is gathered."""
    empty = [name for name, tensor in tensors.items() if tuple(tensor.shape) == (0,)]
    if empty:
        raise LoraSuiteError(
            "tensors are empty: the adapter was saved under DeepSpeed ZeRO-3 without gathering its weights",
            where=where, got=f"{len(empty)} of {len(tensors)} of shape (0,), such as {empty[0]}",
            do="save it again with stage3_gather_16bit_weights_on_model_save and trainer.save_model(), or convert the"
            " training's checkpoint with zero_to_fp32.py",
        )  # fmt: skip


def _as_lora(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config and tensors of trained tokens as a LoRA with ``trainable_token_indices`` has them."""
    names = config.get("target_modules")
    names = [names] if isinstance(names, str) else names or ["embed_tokens"]
    entries = {"peft_type": "LORA", "trainable_token_indices": dict.fromkeys(names, config.get("token_indices"))}
    end = ".trainable_tokens_delta"
    renamed = {name.replace(end, f".token_adapter{end}") if "token_adapter" not in name else name: tensor
               for name, tensor in tensors.items()}  # fmt: skip
    kept = {name: config.get(name) for name in ("task_type", "base_model_name_or_path", "revision")}
    return LORA_DEFAULTS | kept | entries, renamed


def base_model_of(adapter: Source, *, do: str = PASS_OLD) -> tuple[str, str | None]:
    """Return the name and the revision of the base model in an adapter's config.

    Args:
        adapter: The adapter.
        do: What the error advises if the config has none.
    """
    config = read_config(adapter)
    name = config.get("base_model_name_or_path")
    if not name:
        raise LoraSuiteError("the adapter's config has no base_model_name_or_path", where=adapter.name, do=do)
    return name, config.get("revision")
