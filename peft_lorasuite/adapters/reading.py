"""Reading a PEFT adapter from a folder or the Hub."""

from __future__ import annotations

from typing import Any

from ..arch.spec import Architecture
from ..errors import LoraSuiteError
from ..io.checkpoint import no_safetensors_error, open_safetensors, read_tensors
from ..io.source import Source
from ..models.backbone import Backbone
from .adapter import Adapter
from .parsing import from_tensors
from .peft_format import CONFIG, DIRECT_KINDS, WEIGHTS, check_config, needs_backbones
from .token_tables import needs_backbone_error


def read_config(source: Source) -> dict[str, Any]:
    """Read an adapter's config, refusing what is no adapter."""
    config = source.read_json(CONFIG, do="name the folder or Hub repository of a PEFT adapter")
    if not config.get("peft_type"):
        raise LoraSuiteError(
            "the config names no peft_type", where=f"{source.name}/{CONFIG}", do="is it a PEFT adapter?"
        )
    if not isinstance(config.get("revision") or "", str):
        raise LoraSuiteError(
            "the revision of the base model is no text", where=f"{source.name}/{CONFIG}", got=repr(config["revision"]),
            do="mend the config",
        )  # fmt: skip
    return config


def adapter_needs_backbones(source: Source) -> bool:
    """Whether carrying an adapter needs both backbones; refuses at once what is not transferred at all."""
    config = read_config(source)
    check_config(config, source.name)
    path = source.fetch(WEIGHTS)
    if path is None:
        raise no_safetensors_error(source, WEIGHTS)
    return needs_backbones(config, open_safetensors(path, where=f"{source.name}/{WEIGHTS}").keys())


def read_adapter(
    source: Source, arch: Architecture, *, old: Backbone | None = None, rank: int | None = None
) -> Adapter:
    """Read an adapter of a backbone.

    Args:
        source: Its folder or repository.
        arch: Its backbone's shape.
        old: The backbone itself: for trained biases and tables, and for kinds that are converted to LoRA first.
        rank: Rank of such a conversion.

    Raises:
        LoraSuiteError: When a file is missing or broken, a shape does not fit the backbone, or the adapter is of a
            kind that is not transferred.
    """
    config = read_config(source)
    check_config(config, source.name)
    path = source.fetch(WEIGHTS)
    if path is None:
        raise no_safetensors_error(source, WEIGHTS)
    where = f"{source.name}/{WEIGHTS}"
    tensors = read_tensors(path, where=where)
    if config["peft_type"] not in DIRECT_KINDS:
        from .conversion import convert_to_lora

        if old is None:
            raise needs_backbone_error(f"the adapter is a {config['peft_type']} and is made a LoRA first")
        return convert_to_lora(source, config, tensors, old, rank, from_tensors)
    return from_tensors(tensors, config, arch, source=source, old=old)


def base_model_of(
    adapter: Source, *, do: str = "name the old backbone (--from, source_model=)"
) -> tuple[str, str | None]:
    """Return the base model that an adapter's config names, and its revision."""
    config = read_config(adapter)
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise LoraSuiteError("the adapter's config names no base model", where=adapter.name, do=do)
    return name, config.get("revision")
