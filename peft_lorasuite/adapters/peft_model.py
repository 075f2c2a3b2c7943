"""An adapter on its loaded backbone, through PEFT's own loader, with a check that PEFT used every tensor."""

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
"""Options that choose modules by name, which a list of full names replaces."""


@contextmanager
def load_adapted(backbone: Backbone, adapter: Adapter) -> Iterator[Any]:
    """Load a backbone with its adapter, of whatever PEFT type, under the names that the reader resolved.

    The weights are merged where the model is loaded for this alone: it runs two to three times faster then. A model
    that the caller holds is left as it is.

    Raises:
        LoraSuiteError: When PEFT would leave a tensor of the adapter unused, or a part of the adapter random.
    """
    with backbone.running() as model, tempfile.TemporaryDirectory() as written:
        folder = _resolved_folder(adapter, backbone, Path(written))
        with torch.random.fork_rng():  # PEFT draws factors before it reads them
            adapted = load_checked(model, folder, adapter.origin).eval()
        yield adapted if backbone.in_memory else adapted.merge_and_unload().eval()


def load_checked(model: Any, folder: Path, where: str) -> Any:
    """Put an adapter on its backbone; refuses one whose tensors are not those that PEFT expects there."""
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PEFT warns of is refused below
            adapted = PeftModel.from_pretrained(model, str(folder))
            result = adapted.load_adapter(str(folder), "default")  # again: only this call returns the keys it found
    except Exception as error:  # every type has a loader of its own, and they raise many kinds
        raise LoraSuiteError(
            f"PEFT cannot load the adapter on the old backbone: {short_message(error)}", where=where,
            do="name the backbone that it was trained on (--from, source_model=)",
        ) from error  # fmt: skip
    shared = "vblora_vector_bank"  # stored once, under the model's own name, and listed for every module
    missing = [key for key in result.missing_keys if shared not in key or key.startswith(f"base_model.{shared}")]
    if missing or result.unexpected_keys:
        kind: Any = adapted.active_peft_config.peft_type
        raise LoraSuiteError(
            f"the tensors are not those that {kind.value} has on the old backbone",
            where=f"{where}/{WEIGHTS}", got=_first(result.unexpected_keys), wanted=_first(missing),
            do="fetch it again, or name the backbone that it was trained on (--from, source_model=)",
        )  # fmt: skip
    return adapted


def _first(keys: list[str]) -> str | None:
    """Name the first of some keys; None if there are none."""
    return (keys[0] + (f" and {len(keys) - 1} more" if keys[1:] else "")) if keys else None


def _resolved_folder(adapter: Adapter, backbone: Backbone, scratch: Path) -> Path:
    """Return a folder with the adapter under PEFT's own names: its own one where it has them already."""
    if adapter.source is None:
        write_adapter(adapter, scratch, base=backbone.name)
        return scratch
    place, weights = adapter.source.require(CONFIG).parent, adapter.source.require(WEIGHTS)
    tensors = read_tensors(weights, where=f"{adapter.origin}/{WEIGHTS}")
    parsed = parse_names(tensors, backbone.arch)
    if all(name == key.peft_name and not key.reason for name, key in parsed.items()):
        return place
    from safetensors.torch import save_file

    kept = {name: key for name, key in parsed.items() if not key.reason}
    save_file({key.peft_name: tensors[name].contiguous() for name, key in kept.items()}, scratch / WEIGHTS)
    config = _explicit_config(adapter.config, tensors, kept)
    (scratch / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    return scratch


def _explicit_config(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], parsed: Mapping[str, KeyName]
) -> dict[str, Any]:
    """Name every module of a LoRA in full, with its own rank and alpha: patterns may match the saved names alone."""
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
