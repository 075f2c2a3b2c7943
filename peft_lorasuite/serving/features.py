"""What an adapter's files contain that a program may refuse or drop: feature -> the tensors or entries that show it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..adapters.class_head import is_head
from ..adapters.peft_format import LORA_DEFAULTS, OTHER_FORMULAS, PREFIX, TRAINED_BIAS, split_ending
from ..adapters.plain import LAYER, module_type
from ..adapters.writing import REQUIRED
from ..arch.spec import Architecture
from .engines import Engine

PAIRS = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B")
OLD_ENTRIES = {*REQUIRED, "auto_mapping", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
               "megatron_config", "megatron_core", "layer_replication"}  # fmt: skip
"""Entries of a LoRA's config that PEFT 0.10 knows."""
BY_ENDING = {
    "lora_magnitude_vector": "dora",
    "lora_A": "adalora",
    "lora_B": "adalora",
    "lora_E": "adalora",
    "lora_B.bias": "lora_bias",
    **dict.fromkeys(TRAINED_BIAS, "trained bias"),
    "token_adapter.trainable_tokens_delta": "token rows",
    "base_layer.weight": "table copy",
    "weight": "full weights",
    "lora_embedding_A": "embedding",
    "lora_embedding_B": "embedding",
    "": "other type",
}
"""Ending of a tensor's name -> feature; those of a plain LoRA have none."""


@dataclass(frozen=True)
class Contents:
    """An adapter's files, without the values of its tensors.

    Attributes:
        config: ``adapter_config.json``.
        shapes: Name of a tensor -> its shape.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def pairs(self) -> dict[str, int]:
        """Module with a pair of factors -> its rank."""
        split = {name: split_ending(name.removeprefix(PREFIX)) for name in self.shapes}
        return {module: self.shapes[name][0] for name, (module, ending) in split.items() if ending in PAIRS[::2]}


def features(contents: Contents, engine: Engine, arch: Architecture | None) -> dict[str, list[str]]:
    """Return the features of an adapter, each with the names that show it.

    Args:
        contents: The files.
        engine: The program, by which some features are defined.
        arch: Architecture of the backbone; without it, features that depend on the backbone are not found.
    """
    config, pairs = contents.config, contents.pairs
    found = defaultdict(list, _by_names(contents, arch))
    if config.get("peft_type") != "LORA":
        found["adalora" if config.get("peft_type") == "ADALORA" else "other type"].append(_entry(config, "peft_type"))
    for feature, entries in (("dora", ["use_dora"]), ("rslora", ["use_rslora"]), ("other formula", OTHER_FORMULAS)):
        found[feature] += [_entry(config, name) for name in entries if config.get(name)]
    rank = config.get("r", LORA_DEFAULTS["r"])
    found["ranks"] += [f"{module} of rank {own}, r {rank}" for module, own in pairs.items() if own != rank]
    found["scalings"] += [f"alpha_pattern of {name}" for name in config.get("alpha_pattern") or {}]
    found["new entries"] += [_entry(config, name) for name in sorted(set(config) - OLD_ENTRIES)]
    found["lone part"] += _lone_parts(pairs, engine.fused)
    most = max(engine.ranks, default=0)
    found["rank"] += [f"{module} of rank {own}, at most {most}" for module, own in pairs.items() if most and own > most]
    if arch is not None:
        found["some layers"] += _some_layers(pairs, arch)
        found["other module"] += _other_modules(contents, arch)
        if engine.families and arch.family not in engine.families:
            found["family"].append(arch.family)
    return {feature: names for feature, names in found.items() if names}


def _entry(config: Mapping[str, Any], name: str) -> str:
    return f"{name} {str(config.get(name))[:40]}"


def _by_names(contents: Contents, arch: Architecture | None) -> dict[str, list[str]]:
    """Return the features that a tensor's name shows."""
    found = defaultdict(list)
    for name in contents.shapes:
        module, ending = split_ending(name.removeprefix(PREFIX))
        outside = LAYER.match(module) is None
        is_output = outside and module.rpartition(".")[2] in ("lm_head", "embed_out", "output")
        feature = BY_ENDING.get(ending, "")
        if feature in ("full weights", "trained bias") and is_head(module):
            feature = "class head"
        if not feature and is_output:
            feature = "head"
        if not feature and ".experts." in module:
            feature = "experts"
        if feature in ("head", "embedding") and arch is not None and arch.tied:
            found[f"tied {feature}"].append(name)
        if feature:
            found[feature].append(name)
    return found


def _lone_parts(pairs: Mapping[str, int], fused: Iterable[tuple[str, ...]]) -> list[str]:
    """Return modules whose partners have no pair in the same layer."""
    lone = []
    for module in pairs:
        parent, _, own = module.rpartition(".")
        for group in fused:
            missing = [f"{parent}.{other}" for other in group if f"{parent}.{other}" not in pairs]
            if own in group and missing:
                lone.append(f"{module} without {missing[0]}")
    return lone


def _some_layers(pairs: Mapping[str, int], arch: Architecture) -> list[str]:
    """Return modules that have a pair in some of the layers alone that have them."""
    layers = Counter(map(module_type, (arch.module(layer, site) for layer, site in arch.modules)))
    found = Counter(kind for kind in map(module_type, pairs) if kind in layers)
    return [f"{kind} in {count} of {layers[kind]} layers" for kind, count in found.items() if count < layers[kind]]


def _other_modules(contents: Contents, arch: Architecture) -> list[str]:
    """Return tensors of pairs whose module the backbone does not have under this name, or in this shape."""
    others = []
    for name, shape in contents.shapes.items():
        module, ending = split_ending(name.removeprefix(PREFIX))
        if ending not in PAIRS:
            continue
        place, table = arch.find(module), module in (arch.embedding, arch.head)
        if table:
            wanted = {arch.vocabulary, arch.hidden}
        elif place is not None and place[0] < arch.layers:
            out, in_ = arch.module_shape(*place)
            wanted = {out if "B" in ending else in_}
        else:
            wanted = set()
        if len(shape) != 2 or not wanted & set(shape):
            others.append(f"{name} of {shape}")
    return others
