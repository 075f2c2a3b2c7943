"""Loading an adapter on its backbone with PEFT, with a check that PEFT uses all of its tensors."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraSuiteError, short_message
from ..io.checkpoint import read_tensors
from ..models.backbone import Backbone
from .adapter import Adapter
from .key_names import KeyName, parse_names
from .modules import scaling
from .peft_format import CONFIG, WEIGHTS
from .writing import write_adapter

UNPATTERNED = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters", "layer_replication")
"""Config entries that select modules; a list of full module names replaces them."""


@contextmanager
def load_with_adapter(backbone: Backbone, adapter: Adapter) -> Iterator[Any]:
    """Load a backbone with its adapter, of any PEFT type, under normalized tensor names.

    A model that is loaded only for this is merged with the adapter, which makes it two to three times faster. A model
    that the caller has loaded is not merged.

    Raises:
        LoraSuiteError: If PEFT would not use a tensor of the adapter, or not find one that it expects.
    """
    with backbone.running() as model, tempfile.TemporaryDirectory() as written:
        folder = _normalized_folder(adapter, backbone, Path(written))
        with torch.random.fork_rng():  # PEFT initializes factors randomly before it loads them
            adapted = add_adapter_strict(model, folder, adapter.origin).eval()
        yield adapted if backbone.in_memory else adapted.merge_and_unload().eval()


def add_adapter_strict(model: Any, folder: Path, where: str) -> Any:
    """Add an adapter to its backbone; raise `LoraSuiteError` unless its tensors are exactly those that PEFT expects.

    Args:
        model: The backbone.
        folder: Folder of the adapter.
        where: Name of the adapter, for error messages.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT only warns of what raises an error below
            adapted = PeftModel.from_pretrained(model, str(folder))
            result = adapted.load_adapter(str(folder), "default")  # again: only this call returns the keys it found
    except Exception as error:  # the loaders of PEFT's types raise many kinds of errors
        raise LoraSuiteError(
            f"PEFT cannot load the adapter on the old backbone: {short_message(error)}", where=where,
            do="pass the backbone that it was trained on (--from, source_model=)",
        ) from error  # fmt: skip
    shared = "vblora_vector_bank"  # stored once, under the model's own name, and listed for every module
    missing = [key for key in result.missing_keys if shared not in key or key.startswith(f"base_model.{shared}")]
    if missing or result.unexpected_keys:
        kind: Any = adapted.active_peft_config.peft_type
        raise LoraSuiteError(
            f"the tensors do not match those of {kind.value} on the old backbone",
            where=f"{where}/{WEIGHTS}", got=_abbreviate(result.unexpected_keys), wanted=_abbreviate(missing),
            do="fetch it again, or pass the backbone that it was trained on (--from, source_model=)",
        )  # fmt: skip
    return adapted


def _abbreviate(keys: list[str]) -> str | None:
    """Return the first key and the number of others; None if there are none."""
    return (keys[0] + (f" and {len(keys) - 1} more" if keys[1:] else "")) if keys else None


def _normalized_folder(adapter: Adapter, backbone: Backbone, scratch: Path) -> Path:
    """Return a folder with the adapter under PEFT's names: its own folder if it uses them, else ``scratch``."""
    if adapter.source is None:
        write_adapter(adapter, scratch, base=backbone.name)
        return scratch
    folder, weights = adapter.source.require(CONFIG).parent, adapter.source.require(WEIGHTS)
    tensors = read_tensors(weights, where=f"{adapter.origin}/{WEIGHTS}")
    parsed = parse_names(tensors, backbone.arch)
    if all(name == key.peft_name and not key.reason for name, key in parsed.items()):
        return folder
    from safetensors.torch import save_file

    kept = {name: key for name, key in parsed.items() if not key.reason}
    save_file({key.peft_name: tensors[name].contiguous() for name, key in kept.items()}, scratch / WEIGHTS)
    config = _explicit_config(adapter.config, tensors, kept)
    (scratch / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return scratch


def _explicit_config(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], parsed: Mapping[str, KeyName]
) -> dict[str, Any]:
    """Return a config with all modules by their full names, ranks and alphas: patterns may match only saved names."""
    if config["peft_type"] != "LORA":
        modules = {key.module for key in parsed.values()}
        return {**config, "target_modules": sorted(modules)} if config.get("target_modules") else dict(config)
    ranks, alphas = {}, {}
    for name, key in parsed.items():
        if key.ending in ("lora_A.weight", "lora_embedding_A"):
            rank = len(tensors[name])
            root = rank**0.5 if config.get("use_rslora") else rank
            ranks[key.module], alphas[key.module] = rank, scaling(config, key.saved_module, rank) * root
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.get("r", 8)
    return {
        **config,
        **{name: None for name in UNPATTERNED if name in config},
        "target_modules": sorted(ranks),
        "r": common,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common},
        "alpha_pattern": alphas,
    }
