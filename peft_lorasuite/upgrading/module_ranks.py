"""Joining the parts of fused modules, and bringing every module to the rank of the result."""

from __future__ import annotations

from typing import Any

import torch

from ..adapters.adapter import Adapter, Key, join_sites
from ..arch.layout import split
from ..arch.spec import Architecture, Site
from ..errors import LoraSuiteError
from ..linalg.lowrank import LowRank, check_values
from ..methods.base import MethodResult
from .variants import module_rank


def join_modules(
    method_result: MethodResult, arch: Architecture, rank: int, seed: int, source: Adapter
) -> tuple[Adapter, list[dict[str, Any]]]:
    """Join the parts of fused modules, and truncate or pad every module to one rank.

    Args:
        method_result: Updates of the parts.
        arch: The new architecture.
        rank: Rank of the result.
        seed: Seed of the padding.
        source: The old adapter; modules of an AdaLoRA keep their own ranks.

    Returns:
        The new adapter, and its modules for the report.

    Raises:
        LoraSuiteError: If the rank exceeds the dimensions of a module.
    """
    generator = torch.Generator().manual_seed(seed)
    updates: dict[Key, LowRank] = {}
    modules = []
    for (layer, site), whole in join_sites(method_result.updates, arch).items():
        path = arch.module(layer, site)
        if rank > min(whole.shape):
            raise LoraSuiteError(
                "the rank exceeds the dimensions of the module", where=path, got=rank,
                wanted=f"at most {min(whole.shape)}",
            )  # fmt: skip
        check_values(whole.A, whole.B, where=path, whose="result")
        own_rank = module_rank(source, method_result, layer, site, rank)
        truncated, kept = whole.truncated(own_rank)
        padded = truncated.padded(own_rank, generator)
        rows = split(padded.B, site, arch.in_layer(layer))
        biases = {} if padded.bias is None else split(padded.bias, site, arch.in_layer(layer))
        for part in site.parts:
            updates[layer, part] = LowRank(padded.A, rows[part], biases.get(part))
        origins, figures = _describe_parts(method_result, layer, site)
        modules.append(
            {
                "module": path,
                "from": origins,
                "energy_kept": round(kept, 6),
                "norm": round(padded.norm(), 6),
                "figures": figures,
            }
        )
    return Adapter(arch, updates, source.config), modules


def _describe_parts(method_result: MethodResult, layer: int, site: Site) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return for each updated part of a module the old layer and part that it comes from, and its figures."""
    keys = {part: (layer, part) for part in site.parts if (layer, part) in method_result.updates}
    origins = {part: list(method_result.sources[key]) for part, key in keys.items() if key in method_result.sources}
    figures = {
        part: {name: round(value, 6) for name, value in method_result.figures[key].items()}
        for part, key in keys.items()
        if key in method_result.figures
    }
    return origins, figures
