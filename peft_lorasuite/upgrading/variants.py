"""Adapter types beyond plain LoRA: prepared before a method runs, and restored in its result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from ..adapters.adapter import Adapter, join_sites
from ..adapters.dora import dora_to_lora
from ..adapters.peft_format import PREFIX, is_trained_bias
from ..adapters.plain import refuse_biases
from ..adapters.token_tables import needs_backbone_error
from ..arch.spec import Site
from ..errors import LoraSuiteError, unknown_name_error
from ..linalg.lowrank import LowRank
from ..methods.base import MethodInput, MethodResult
from .dora import restore_magnitudes
from .report import TRANSFERRED
from .token_tables import add_tables, write_tables

OUTPUT_TYPES = ("same", "lora")


def prepare(adapter: Adapter, output_type: str, old: Any, rank: int | None) -> Adapter:
    """Return the adapter as the type that the result will have: its own, or a plain LoRA.

    Args:
        adapter: The adapter.
        output_type: ``"same"`` or ``"lora"``.
        old: The old backbone, for a DoRA that becomes a LoRA.
        rank: Rank of such a conversion.
    """
    if output_type not in OUTPUT_TYPES:
        raise unknown_name_error("output type", output_type, OUTPUT_TYPES)
    if adapter.extras:
        raise LoraSuiteError(
            "the adapter is the result of an upgrade and has tensors of its backbone", where=adapter.origin,
            do="save it and upgrade the folder",
        )  # fmt: skip
    if adapter.kind == "dora" and output_type == "lora":
        if old is None:
            raise needs_backbone_error("the update of a DoRA depends on the weights of its backbone")
        return dora_to_lora(adapter, old, rank)
    return replace(adapter, kind="lora") if output_type == "lora" else adapter


def module_rank(adapter: Adapter, method_result: MethodResult, layer: int, site: Site, rank: int) -> int:
    """Return the rank of one module: modules of an AdaLoRA keep their own, others share one."""
    if adapter.kind != "adalora":
        return rank
    sources = [method_result.sources.get((layer, part)) for part in site.parts]
    return min(rank, max((adapter.updates[key].rank for key in sources if key is not None), default=rank))


def complete(
    result: Adapter,
    inputs: MethodInput,
    method_result: MethodResult,
    *,
    output_type: str,
    method: str,
    rank: int,
    added: Mapping[str, Tensor] = MappingProxyType({}),
) -> tuple[Adapter, dict[str, Any], dict[str, str]]:
    """Add what is not low-rank to the result: magnitudes, trained biases, embedding and head.

    Args:
        result: The new adapter with its low-rank updates.
        inputs: What the method was given.
        method_result: What the method returned.
        output_type: ``"same"`` or ``"lora"``.
        method: Name of the method.
        rank: Rank of the result.
        added: ``embedding`` or ``head`` -> new ids of added tokens, whose rows belong to the result.

    Returns:
        The result; facts for the report; and the fates of the tensors that belong to none of the updates.
    """
    source, facts, fates, plain = inputs.adapter, dict(inputs.adapter.facts), {}, output_type == "lora"
    if plain and any(map(len, added.values())):
        raise LoraSuiteError(
            "the adapter cannot be a plain LoRA: it adds tokens to its backbone", where=source.origin,
            do="keep its type (output_type=\"same\", --output-type same)",
        )  # fmt: skip
    if method_result.updates and not method_result.sources:  # fitted to the behavior of the whole adapter
        facts["kind"] = f"{method} fits a new plain LoRA to the behavior of the whole adapter"
        if added:
            new = inputs.backbones("added tokens")[1]
            result = write_tables(result, {}, new, rank, inputs.seed, added)
        return result, facts, {name: TRANSFERRED for table in source.tables.values() for name in table.names}
    if source.kind == "adalora":
        result = replace(result, kind="adalora", config=source.config)
    if source.kind == "dora":
        result = restore_magnitudes(result, inputs, method_result, by_index=method in ("copy", "rekey"))
    facts["kind"] = source.kind
    has_biases = any(update.bias is not None for update in source.updates.values())
    trained = any(is_trained_bias(name) for names in source.names.values() for name in names)
    if has_biases and (trained or source.config.get("bias", "none") != "none"):
        result, bias_fates = _add_trained_biases(result, inputs, method_result, same=not plain)
        fates |= bias_fates
    if source.tables or added:
        result, facts["tables"], table_fates = add_tables(
            result, inputs, rank, added, by_id=method == "rekey" and not added, as_lora=plain
        )
        fates |= table_fates
    if plain:
        refuse_biases(replace(result, source=source.source))
    joined = join_sites(result.updates, result.arch)
    without_bias = sum(update.bias is not None and not site.bias for (_, site), update in joined.items())
    if without_bias:
        facts["biases"] = f"{without_bias} modules without a bias get one from the adapter; PEFT cannot merge these"
    return result, facts, fates


def _add_trained_biases(
    result: Adapter, inputs: MethodInput, method_result: MethodResult, *, same: bool
) -> tuple[Adapter, dict[str, str]]:
    """Add trained biases, as trained biases of the backbone or (``same=False``) of the LoRA.

    Returns:
        The result, and the fates of biases whose new module has none.
    """
    new = inputs.backbones("an adapter with trained biases")[1]
    arch, updates, extras, fates = result.arch, {}, dict(result.extras), {}
    for (layer, site), whole in join_sites(result.updates, arch).items():
        keys = [(layer, part) for part in site.parts]
        for key in keys:
            update = result.updates[key]
            updates[key] = update if site.bias and not same else LowRank(update.A, update.B)
        if site.bias and same and whole.bias is not None:
            path = arch.module(layer, site)
            extras[f"{PREFIX}{path}.base_layer.bias"] = new.tensor(f"{path}.bias") + whole.bias
        elif not site.bias:
            names = {
                name for key in keys for name in inputs.adapter.names.get(method_result.sources.get(key, (-1, "")), ())
            }
            fates |= {name: f"not transferred: {arch.family}'s {site.path} has no bias" for name in names
                      if is_trained_bias(name)}  # fmt: skip
    settings = {**result.settings, "bias": "lora_only"} if same else result.settings
    return replace(result, updates=updates, extras=extras, settings=settings), fates


def tied_head_hint(result: Adapter) -> str:
    """Return a hint if the result has a LoRA of a head that shares its weight with the embedding, else nothing."""
    if not result.arch.tied or result.arch.head not in result.settings.get("target_modules", []):
        return ""
    return ("the new backbone's head shares its weight with the embedding: PEFT applies the LoRA to the head alone; "
            "llama.cpp, Ollama and mlx-lm cannot (see `check --for`)")  # fmt: skip
