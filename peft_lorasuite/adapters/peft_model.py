"""Loading an adapter on its backbone with PEFT, with a check that PEFT uses all of its tensors."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..arch.spec import Architecture
from ..compat import check_vera
from ..errors import LoraSuiteError, short_message
from ..io.checkpoint import read_tensors
from ..io.source import Source
from ..io.temporary import temporary_folder
from ..models.backbone import Backbone
from ..models.quantized import quantization
from .adapter import Adapter
from .key_names import KeyName, group_by_module, parse_names
from .modules import scaling
from .peft_format import CONFIG, LORA_DEFAULTS, OTHER_FORMULAS, PREFIX, WEIGHTS, split_ending
from .token_tables import DELTA, find_table, tied_copies, trained_tokens
from .writing import write_adapter

UNPATTERNED = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters", "layer_replication")
"""Config entries that select modules; a list of full module names replaces them."""

BASE_ENDINGS = ("weight", "bias", "base_layer.bias")
"""Endings of a linear module's own tensors."""
WITHOUT_EFFECT = {
    **dict.fromkeys((*OTHER_FORMULAS, "trainable_token_indices")), "use_qalora": False, "ensure_weight_tying": False
}  # fmt: skip
"""Config entries that are left out where they have no effect, and PEFT's defaults: it does not accept all values."""


@contextmanager
def load_with_adapter(backbone: Backbone, adapter: Adapter, *, merge: bool = True) -> Iterator[Any]:
    """Load a backbone with its adapter, of any PEFT type, under normalized tensor names.

    Args:
        backbone: The backbone.
        adapter: Its adapter.
        merge: Merge them, see `merge_adapter`; otherwise PEFT can disable the adapter.

    Raises:
        LoraSuiteError: If PEFT would not use a tensor of the adapter, or not find one that it expects.
    """
    with backbone.running(task=adapter.task.running) as model, temporary_folder() as folder:
        if adapter.source is None or adapter.experts:
            write_adapter(adapter.at_one_rank() if adapter.experts else adapter, folder, base=backbone.name)
            if adapter.source is not None:
                _add_saved(adapter, adapter.source, folder)
        else:
            tensors = read_tensors(adapter.source.require(WEIGHTS), where=f"{adapter.origin}/{WEIGHTS}")
            own = [name for update in adapter.tables.values() for name in update.names
                   if update.form == "full" and not len(update.ids)]  # fmt: skip
            config = LORA_DEFAULTS | adapter.source.read_json(CONFIG)  # not that of a converted adapter
            folder = normalized_folder(adapter.source, config, tensors, backbone.arch, folder, own)
        with torch.random.fork_rng():  # PEFT initializes factors randomly before it loads them
            adapted = add_adapter_strict(model, folder, adapter.origin).eval()
        yield merge_adapter(adapted, backbone) if merge else adapted


def _add_saved(adapter: Adapter, source: Source, folder: Path) -> None:
    """Add the token tables and the classification head of an adapter's own files to a written folder."""
    from safetensors.torch import load_file, save_file

    names = {name for table in adapter.tables.values() for name in table.names} | set(
        adapter.head.names if adapter.head else ()
    )
    if not names:
        return
    tensors = read_tensors(source.require(WEIGHTS), where=f"{adapter.origin}/{WEIGHTS}")
    config = LORA_DEFAULTS | source.read_json(CONFIG)
    kept = {name: key for name, key in parse_names(tensors, adapter.arch).items() if name in names}
    own = _explicit_config(config, tensors, kept, adapter.arch)
    written = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    for path in own["target_modules"]:
        rank = own["rank_pattern"].get(path, own["r"])
        alpha = own["alpha_pattern"][path] * (rank**0.5 if config.get("use_rslora") else 1)
        written["target_modules"].append(path)
        written["rank_pattern"][path], written["alpha_pattern"][path] = rank, alpha
    written |= {name: own[name] for name in ("modules_to_save", "trainable_token_indices")}
    saved = load_file(folder / WEIGHTS) | {key.peft_name: tensors[name].contiguous() for name, key in kept.items()}
    save_file(saved, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(written), encoding="utf-8")


def merge_adapter(model: Any, backbone: Backbone) -> Any:
    """Merge the adapter of a model that is loaded only for this, which makes it two to three times faster.

    A model that the caller has loaded is not merged, nor is a quantized one, whose weights cannot hold the update, nor
    one where merging would change more than PEFT computes, or fail.
    """
    keep = backbone.in_memory or quantization(backbone.config) is not None or not _can_merge(model)
    return model if keep else model.merge_and_unload().eval()


def _can_merge(model: Any) -> bool:
    """Whether no LoRA adds a bias where there is none, or changes a weight that another module has as well."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners = Counter(id(weight) for module in model.modules() for weight in module.parameters(recurse=False))
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer) or isinstance(layer, TrainableTokensLayer):
            continue  # new values of tokens are the same for both tables
        base = layer.get_base_layer()
        adds_bias = any(getattr(layer, "lora_bias", {}).values()) and getattr(base, "bias", None) is None
        if adds_bias or any(owners[id(weight)] > 1 for weight in base.parameters(recurse=False)):
            return False
    return True


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
        check_vera(result.unexpected_keys, where=where)
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


def names_modules(model: Any, names: Iterable[str]) -> bool:
    """Whether tensor names are PEFT's for modules of a loaded model, which can be a multimodal one."""
    modules = {path for path, _ in model.named_modules()}
    return all(name.startswith(PREFIX) and split_ending(name.removeprefix(PREFIX))[0] in modules for name in names)


def renamed_folder(source: Source, arch: Architecture, scratch: Path) -> Path:
    """Return a folder with an adapter under PEFT's names: its own if all used tensors have these, else ``scratch``.

    Raises:
        LoraSuiteError: If none of its tensors belongs to the text model: PEFT would initialize a new adapter.
    """
    where = f"{source.name}/{WEIGHTS}"
    tensors = read_tensors(source.require(WEIGHTS), where=where)
    parsed = parse_names(tensors, arch)
    groups, unused = group_by_module(parsed)
    if not groups:
        name, reason = next(iter(unused.items()))
        raise LoraSuiteError(
            "none of the adapter's tensors belongs to the backbone", where=where, got=f"{name}: {reason}",
            do="pass the backbone that it was trained on, or rename the tensors as PEFT does",
        )  # fmt: skip
    if all(name == parsed[name].peft_name for owned in groups.values() for name in owned.values()):
        return source.require(CONFIG).parent
    return normalized_folder(source, LORA_DEFAULTS | source.read_json(CONFIG), tensors, arch, scratch)


def normalized_folder(
    source: Source, config: Mapping[str, Any], tensors: Mapping[str, Tensor], arch: Architecture, scratch: Path,
    own_tables: Collection[str] = (),
) -> Path:  # fmt: skip
    """Return a folder with an adapter under PEFT's names: its own folder if it uses them, else ``scratch``.

    Args:
        source: Folder or repository of the adapter.
        config: Its PEFT config.
        tensors: Saved name -> tensor.
        arch: Architecture of the backbone.
        scratch: An empty folder.
        own_tables: Names of token tables that the backbone has already.
    """
    parsed = parse_names(tensors, arch)
    groups, _ = group_by_module(parsed)
    copies = {*own_tables, *tied_copies(groups, tensors, arch)}
    kept = {owned[end]: parsed[owned[end]] for owned in groups.values() for end in owned
            if owned[end] not in copies and end != "base_layer.weight"}  # fmt: skip
    named = len(kept) == len(parsed) and all(name == key.peft_name for name, key in kept.items())
    if named and all(config.get(name, default) == default for name, default in WITHOUT_EFFECT.items()):
        return source.require(CONFIG).parent
    from safetensors.torch import save_file

    save_file({key.peft_name: tensors[name].contiguous() for name, key in kept.items()}, scratch / WEIGHTS)
    (scratch / CONFIG).write_text(json.dumps(_explicit_config(config, tensors, kept, arch)), encoding="utf-8")
    return scratch


def _explicit_config(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], parsed: Mapping[str, KeyName], arch: Architecture
) -> dict[str, Any]:
    """Return a config with all modules by their full names, ranks and alphas: patterns may match only saved names."""
    whole = {name for name in config.get("modules_to_save") or [] if find_table(name, arch) is None}
    whole |= {key.module for key in parsed.values() if key.ending == "weight" and find_table(key.module, arch)}
    tables = {key.module: find_table(key.module, arch) or "" for key in parsed.values() if key.ending == DELTA}
    indices = config.get("trainable_token_indices")
    explicit = {
        **{name: value for name, value in config.items() if name not in WITHOUT_EFFECT},
        **{name: None for name in UNPATTERNED if name in config},
        "modules_to_save": sorted(whole) or None,
        "trainable_token_indices": {path: trained_tokens(indices, table, arch) for path, table in tables.items()}
        or None,
    }
    if config["peft_type"] != "LORA":
        explicit = {name: value for name, value in explicit.items() if name in config}
        owned = (key.module for key in parsed.values() if not (key.ending in BASE_ENDINGS and arch.find(key.module)))
        return explicit | _explicit_modules(config, owned, arch)
    ranks, alphas = {}, {}
    for name, key in parsed.items():
        if key.ending in ("lora_A.weight", "lora_embedding_A"):
            rank = len(tensors[name])
            root = rank**0.5 if config.get("use_rslora") else rank
            ranks[key.module], alphas[key.module] = rank, scaling(config, key.paths, rank) * root
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.get("r", 8)
    return {
        **explicit,
        "target_modules": sorted(ranks),
        "r": common,
        "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common},
        "alpha_pattern": alphas,
    }


def _explicit_modules(config: Mapping[str, Any], names: Iterable[str], arch: Architecture) -> dict[str, Any]:
    """Return the entries of another PEFT type that list modules, with full names.

    Args:
        config: The adapter's PEFT config.
        names: Names of tensors without PEFT's prefix.
        arch: Architecture of the backbone.
    """
    paths = [re.escape(site.path) for site in arch.sites]
    before = rf"{re.escape(arch.layer_path)}\.\d+\." if arch.has_converter else ""
    roots = re.compile(rf"{before}(?:{'|'.join(paths)})(?=\.|$)")
    modules = sorted({found[0] for path in names if (found := roots.match(path))})
    if not modules:  # of norms or token tables, by the names in the config
        return {}
    entries = {"target_modules": modules} if config.get("target_modules") else {}
    forward = config.get("feedforward_modules")  # of IA3
    if isinstance(forward, list):
        entries["feedforward_modules"] = [path for path in modules if path.rpartition(".")[2] in
                                          {name.rpartition(".")[2] for name in forward}]  # fmt: skip
    return entries
