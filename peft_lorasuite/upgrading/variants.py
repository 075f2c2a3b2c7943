"""What an adapter is beside its low-rank factors: made plain before a method runs, and given back afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..adapters.adapter import Adapter, by_site, join_sites
from ..adapters.dora import dora_to_lora
from ..adapters.peft_format import PREFIX, TRAINED_BIAS
from ..adapters.token_tables import TableUpdate, needs_backbone_error, table_tensors
from ..arch.spec import Site
from ..errors import LoraSuiteError, unknown_name_error
from ..linalg.lowrank import LowRank
from ..methods.base import MethodInput, MethodResult
from .dora import restore_magnitudes
from .token_tables import transfer_table

OUTPUT_TYPES = ("same", "lora")


def prepare(adapter: Adapter, output_type: str, old: Any, rank: int | None) -> Adapter:
    """Return the adapter as the kind that the result is to have: its own, or a plain LoRA."""
    if output_type not in OUTPUT_TYPES:
        raise unknown_name_error("output type", output_type, OUTPUT_TYPES)
    if adapter.extras:
        raise LoraSuiteError(
            "the adapter is the result of an upgrade and holds tensors of its backbone", where=adapter.origin,
            do="save it and upgrade the folder",
        )  # fmt: skip
    if adapter.kind == "dora" and output_type == "lora":
        if old is None:
            raise needs_backbone_error("a DoRA's true change depends on its weights")
        return dora_to_lora(adapter, old, rank)
    return replace(adapter, kind="lora") if output_type == "lora" else adapter


def own_rank(adapter: Adapter, draft: MethodResult, layer: int, site: Site, rank: int) -> int:
    """Return the rank of one module: AdaLoRA's keep their own, others share one."""
    if adapter.kind != "adalora":
        return rank
    sources = [draft.sources.get((layer, part)) for part in site.parts]
    return min(rank, max((adapter.updates[key].rank for key in sources if key is not None), default=rank))


def complete(
    result: Adapter, inputs: MethodInput, draft: MethodResult, *, output_type: str, method: str, rank: int
) -> tuple[Adapter, dict[str, Any], dict[str, str]]:
    """Give the result what is not low-rank.

    Returns:
        The result; facts for the report; and what became of the source's tensors that no update accounts for.
    """
    source, facts, fates = inputs.adapter, dict(inputs.adapter.facts), {}
    if draft.updates and not draft.sources:  # it was made of what the whole adapter does, tables and biases included
        info = f"{method} makes an update of its own, a plain LoRA, of what the whole adapter does"
        return (
            result,
            {**facts, "kind": info},
            {name: "transferred" for table in source.tables.values() for name in table.names},
        )
    if source.kind == "adalora":
        result = replace(result, kind="adalora", config=source.config)
    if source.kind == "dora":
        result = restore_magnitudes(result, inputs, draft, by_index=method == "copy")
    facts["kind"] = source.kind
    if source.config.get("bias", "none") != "none" and any(
        update.bias is not None for update in source.updates.values()
    ):
        result, lost = _with_trained_biases(result, inputs, draft, same=output_type == "same")
        fates |= lost
    if source.tables:
        result, info, lost = _with_tables(result, inputs, rank)
        facts["tables"], fates = info, fates | lost
    bare = sum(update.bias is not None and not site.bias for (_, site), update in by_site(result).items())
    if bare:
        facts["biases"] = f"{bare} modules that had none get a bias from the adapter: PEFT cannot merge these"
    return result, facts, fates


def _with_trained_biases(
    result: Adapter, inputs: MethodInput, draft: MethodResult, *, same: bool
) -> tuple[Adapter, dict[str, str]]:
    """Store trained biases as they came, whole, or as a LoRA's; modules without a bias lose them by name."""
    new = inputs.backbones("an adapter with trained biases")[1]
    arch, updates, extras, fates = result.arch, {}, dict(result.extras), {}
    for (layer, site), whole in join_sites(result.updates, arch).items():
        keys = [(layer, part) for part in site.parts]
        for key in keys:
            update = result.updates[key]
            updates[key] = update if site.bias and not same else LowRank(update.A, update.B)
        if site.bias and same and whole.bias is not None:
            path = f"{arch.layer_path}.{layer}.{site.path}"
            extras[f"{PREFIX}{path}.base_layer.bias"] = new.tensor(f"{path}.bias") + whole.bias
        elif not site.bias:
            names = {name for key in keys for name in inputs.adapter.names.get(draft.sources.get(key, (-1, "")), ())}
            fates |= {name: f"not transferred: {arch.family}'s {site.path} has no bias" for name in names
                      if name.endswith(tuple(f".{end}" for end in TRAINED_BIAS))}  # fmt: skip
    settings = {**result.settings, "bias": "lora_only"} if same else result.settings
    return replace(result, updates=updates, extras=extras, settings=settings), fates


def _with_tables(result: Adapter, inputs: MethodInput, rank: int) -> tuple[Adapter, dict[str, Any], dict[str, str]]:
    old, new = inputs.backbones("an adapter of the embedding or the head")
    generator = torch.Generator().manual_seed(inputs.seed)
    extras, settings, facts, fates = dict(result.extras), dict(result.settings), {}, {}
    for table, update in _spread(inputs).items():
        moved, info = transfer_table(table, update, old, new, inputs.map.hidden, inputs.map.inverse)
        facts[table] = info
        if moved is None:
            fates |= dict.fromkeys(update.names, f"not transferred: {info['refused']}")
            continue
        partly = "" if info["rows"] == info["of"] else f" in part: {info['rows']} of {info['of']} tokens are shared"
        fates |= dict.fromkeys(update.names, f"transferred{partly}")
        tensors, added = table_tensors(table, moved, new, PREFIX, rank, generator)
        extras |= tensors
        if moved.form == "lora":
            settings["r"] = rank
        for name, value in added.items():
            settings[name] = _both(settings.get(name), value)
    return replace(result, extras=extras, settings=settings), facts, fates


def _spread(inputs: MethodInput) -> dict[str, TableUpdate]:
    """Return the tables' updates; trained tokens of a tied table change the head too, if the new one is not tied."""
    tables = dict(inputs.adapter.tables)
    embedding = tables.get("embedding")
    if embedding and embedding.form == "tokens" and inputs.map.old.arch.tied and not inputs.map.new.arch.tied:
        tables["head"] = embedding
    return tables


def _both(first: Any, second: Any) -> Any:
    return second if first is None else ({**first, **second} if isinstance(second, dict) else [*first, *second])
