"""The tensors of one module: its site in the backbone, its factors and its scaling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..arch.layout import split
from ..arch.spec import Architecture, Site
from ..errors import LoraSuiteError
from ..linalg.lowrank import LowRank, check_values
from ..models.backbone import Backbone
from .peft_format import LINEAR_ENDINGS, OPTIONAL_ENDINGS, TRAINED_BIAS
from .token_tables import needs_backbone_error

Paths: TypeAlias = tuple[str, ...]
"""The paths of a module that patterns in the config can match (`KeyName.paths`), the saved one first."""


def scaling(config: Mapping[str, Any], paths: Paths, rank: int) -> float:
    """Return the scaling of a module: ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA.

    AdaLoRA divides by its initial rank, whatever the rank after pruning.

    Args:
        config: The adapter's PEFT config.
        paths: The module's paths, for ``alpha_pattern``.
        rank: The module's rank.
    """
    if config["peft_type"] == "ADALORA":
        return config["lora_alpha"] / (config["init_r"] + 1e-5)
    alpha = _value_of(config, "alpha_pattern", paths, config.get("lora_alpha", rank))
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def check_rank(config: Mapping[str, Any], paths: Paths, rank: int, where: str) -> None:
    """Raise `LoraSuiteError` if the rank of a LoRA's tensors is not the one in its config, as PEFT does.

    Args:
        config: The adapter's PEFT config.
        paths: The module's paths, for ``rank_pattern``.
        rank: The rank of its tensors.
        where: Place for the error message.
    """
    wanted = _value_of(config, "rank_pattern", paths, config.get("r", rank))
    if config["peft_type"] == "LORA" and rank != wanted:
        raise LoraSuiteError(
            "the rank of the tensors is not the one in the adapter's config", where=f"{where}, {paths[0]}", got=rank,
            wanted=f"r={wanted}", do="fetch the adapter again, or fix r or rank_pattern in the config",
        )  # fmt: skip


def _value_of(config: Mapping[str, Any], entry: str, paths: Paths, default: Any) -> Any:
    """Return the value that a pattern sets for a module, by the first path that one matches; else the default."""
    patterns = config.get(entry)
    if not patterns:
        return default
    from peft.utils.other import get_pattern_key  # importing PEFT takes longer than an upgrade

    matched = (get_pattern_key(list(patterns), path) for path in paths)
    return next((patterns[key] for key in matched if key in patterns), default)


def parameter_paths(config: Mapping[str, Any], paths: Paths) -> Paths:
    """Return the paths of a module, of its weight if the config targets that (``target_parameters``)."""
    targets = [str(target) for target in config.get("target_parameters") or ()]
    own = tuple(f"{path}.weight" for path in paths)
    return own if any(f".{path}".endswith(f".{target}") for path in own for target in targets) else paths


def read_update(
    used: Mapping[str, Tensor], config: Mapping[str, Any], paths: Paths, old: Backbone | None, arch: Architecture,
    place: tuple[int, Site],
) -> LowRank | None:  # fmt: skip
    """Return the update of a module, with the scaling in its factors; None if AdaLoRA has pruned it completely.

    Args:
        used: Ending -> tensor of the module.
        config: The adapter's PEFT config.
        paths: The module's paths.
        old: The backbone; needed for trained biases.
        arch: Architecture of the backbone.
        place: Layer and site of the module.
    """
    A, B = (next((used[name] for name in (f"lora_{end}.weight", f"lora_{end}") if name in used), None) for end in "AB")
    stored = next((used[name] for name in TRAINED_BIAS if name in used), None)
    bias = None if stored is None else _bias_change(stored, old, arch, place)
    if bias is not None and config.get("bias", "none") == "none" and not bias.any():
        bias = None  # a copy of the backbone's, of a state dict that was saved as a whole
    if A is None or B is None:
        out, in_ = arch.module_shape(*place)
        return LowRank(torch.zeros(1, in_), torch.zeros(out, 1), bias)
    if not A.numel():
        return None
    scale = scaling(config, paths, A.shape[0])
    A = A.float() * used["lora_E"].float() if "lora_E" in used else A.float()
    if "lora_B.bias" in used:
        bias = used["lora_B.bias"].float() * scale
    A, B = check_values(A, B.float() * scale, where=paths[0])
    return LowRank(A, B, bias)


def _bias_change(stored: Tensor, old: Backbone | None, arch: Architecture, place: tuple[int, Site]) -> Tensor:
    """Return the change of a module's bias by the training (``bias="all"`` or ``"lora_only"``)."""
    if old is None:
        raise needs_backbone_error("the adapter has trained biases")
    if not place[1].bias:
        raise LoraSuiteError(
            f"the adapter has a trained bias, and {arch.family} has no bias there",
            where=f"layer {place[0]}, {place[1].path}", do="pass the backbone that it was trained on",
        )  # fmt: skip
    return stored.float() - old.tensor(f"{arch.module(*place)}.bias")


def check_shapes(used: Mapping[str, Tensor], kind: str, arch: Architecture, layer: int, site: Site, where: str) -> None:
    """Raise `LoraSuiteError` if a tensor of a module is missing, or shapes do not fit each other or the module."""
    place = f"{where}, layer {layer}, {site.path}"
    needed = [end for end in LINEAR_ENDINGS[kind] if end not in OPTIONAL_ENDINGS]
    missing = [end for end in needed if end not in used]
    if missing and len(missing) < len(needed):
        raise LoraSuiteError(f"a {kind} lacks a tensor", where=place, wanted=missing[0], do="fetch the adapter again")
    do = "pass the backbone that it was trained on (--from, source_model=)"
    if arch.has_converter and layer >= arch.layers:
        got, wanted = f"layer {layer}", f"{arch.layers} layers"
        raise LoraSuiteError("the adapter does not fit the old backbone", where=place, got=got, wanted=wanted, do=do)
    out, in_ = arch.module_shape(layer, site)
    first = used.get(needed[0])
    rank = len(first) if first is not None and first.ndim else 0
    if first is not None and first.ndim == 2 and not rank and kind != "adalora":
        raise LoraSuiteError("the rank of the update is zero", where=place, do="fetch the adapter again")
    shapes = {"lora_A": (rank, in_), "lora_B": (out, rank), "lora_E": (rank, 1)}
    for end, tensor in used.items():
        wanted = shapes.get(end.removesuffix(".weight"), (out,))
        if tuple(tensor.shape) != wanted:
            what = "the adapter does not fit the old backbone"
            if wanted == (out, rank) and tensor.shape[:-1] == wanted[:1]:
                what, do = "the ranks of A and B differ", "fetch the adapter again"
            got, wanted = f"{end} of {tuple(tensor.shape)}", f"(rank, {in_})" if end == needed[0] else wanted
            raise LoraSuiteError(what, where=place, got=got, wanted=wanted, do=do)


def split_parts(update: LowRank, site: Site, arch: Architecture) -> dict[str, LowRank]:
    """Split the update of a fused module into its parts, which all have the same A.

    Args:
        update: The update.
        site: The module's site.
        arch: The architecture with the sizes of the layer.
    """
    rows = split(update.B, site, arch)
    biases = {} if update.bias is None else split(update.bias, site, arch)
    return {part: LowRank(update.A, B, biases.get(part)) for part, B in rows.items()}
