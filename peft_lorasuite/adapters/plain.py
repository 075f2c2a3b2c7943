"""Plain LoRAs: no other type, no bias, no full tables, and on request one rank and a pair in every layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from ..arch.layout import split
from ..errors import LoraSuiteError
from ..linalg.lowrank import LowRank
from ..models.backbone import Backbone
from ..models.task import find_head
from .adapter import Adapter, Key, join_sites
from .dora import dora_to_lora
from .peft_format import COPIED, PRUNED
from .token_tables import TableUpdate, table_tensors

LAYER = re.compile(r"^(?P<before>.+?)\.(?P<layer>\d+)\.(?P<path>.+)$")
"""A module in a list of layers; of two lists, that of the layers comes before that of the experts."""
KEEP_OR_DISTILL = (
    'load it with PEFT as it is, or upgrade it by behavior (method="distill", --method distill), which gives a LoRA'
)
EXACT = 1e-6
"""Fraction of a token table's change that its LoRA may lose."""


def plain_lora(adapter: Adapter, base: Backbone, rank: int | None = None) -> Adapter:
    """Return an adapter, as it was read, as a plain LoRA of the same backbone.

    An AdaLoRA keeps its update; a DoRA becomes the best approximation of it, whose energy is in the facts; the change
    of a token table becomes its LoRA.

    Args:
        adapter: The adapter.
        base: Its backbone.
        rank: Rank of the LoRA of a DoRA.

    Raises:
        LoraSuiteError: If a part of the adapter cannot be in a plain LoRA.
    """
    lost = {name: why for name, why in adapter.unused.items() if not why.startswith(COPIED) and why != PRUNED}
    if lost:
        name, why = next(iter(lost.items()))
        raise _not_plain_error(adapter, name, why)
    if adapter.added is not None:
        tokens = ", ".join(map(repr, [*adapter.added.saved, *adapter.added.lost][:3])) or "rows beyond the vocabulary"
        raise _not_plain_error(adapter, tokens, "it adds tokens to its backbone")
    refuse_biases(adapter)
    if adapter.kind == "dora":
        adapter = dora_to_lora(adapter, base, rank)
    for table, update in adapter.tables.items():
        table_as_lora(table, update, adapter.arch.tied)
    placed = {} if adapter.head is None else {"place": find_head(base.config, adapter.task), "head": adapter.head}
    adapter = replace(adapter, kind="lora")
    return adapter.with_head(**placed) if placed else adapter


def refuse_biases(adapter: Adapter) -> None:
    """Raise `LoraSuiteError` if a module's update has a bias."""
    for (layer, site), update in join_sites(adapter.updates, adapter.arch).items():
        if update.bias is not None:
            module = adapter.arch.module(layer, site)
            raise _not_plain_error(adapter, module, "it has a bias (lora_bias, or a trained bias)")


def _not_plain_error(adapter: Adapter, where: str, why: str) -> LoraSuiteError:
    return LoraSuiteError(
        f"the adapter cannot be a plain LoRA: {why}", where=f"{adapter.origin}, {where}",
        do=KEEP_OR_DISTILL,
    )  # fmt: skip


def table_as_lora(table: str, update: TableUpdate, tied: bool = False) -> TableUpdate:
    """Return the change of a token table in the form of a LoRA.

    Args:
        table: ``embedding`` or ``head``.
        update: The change.
        tied: Whether the head shares the embedding's weight: new values of it change both, and a LoRA only one.

    Raises:
        LoraSuiteError: If it also changes the head's bias, or is of both tables at once.
    """
    if update.form == "lora":
        return update
    changed = f"{len(update.ids)} rows of the {table}, saved as new values"
    if update.bias is not None and bool(update.bias.any()):
        why = "the head's bias was trained"
    elif tied and len(update.ids):
        why = "the new values are those of embedding and head, which share their weight"
    else:
        return replace(update, form="lora", bias=None)
    names = ", ".join(update.names)
    raise LoraSuiteError(
        f"the change of a token table cannot be a LoRA: {why}", where=names or table, got=changed,
        do=KEEP_OR_DISTILL,
    )  # fmt: skip


def one_rank(adapter: Adapter, base: Backbone, rank: int | None = None) -> Adapter:
    """Return a plain LoRA with all modules at one rank, and with its token tables as tensors.

    Args:
        adapter: From `plain_lora`.
        base: Its backbone.
        rank: The rank; by default the largest that a linear module needs.

    Returns:
        The adapter. Its facts have the smallest fraction of a module's energy that is kept.

    Raises:
        LoraSuiteError: If the rank exceeds the dimensions of a module, or is too small for a token table.
    """
    generator = torch.Generator().manual_seed(0)
    sites = join_sites(adapter.updates, adapter.arch)
    needed = {key: whole.rank for key, whole in sites.items()}
    if len({*needed.values(), *([rank] if rank else [])}) > 1:
        sites = {key: whole.truncated(rank or whole.rank)[0] for key, whole in sites.items()}
    tables = {table: one for table, one in adapter.tables.items() if len(one.ids)}
    ranks = [whole.rank for whole in sites.values()] or [_table_rank(one) for one in tables.values()]
    final = rank or max([*ranks, 1])
    updates: dict[Key, LowRank] = {}
    for (layer, site), whole in sites.items():
        if final > min(whole.shape):
            raise LoraSuiteError(
                "the rank exceeds the dimensions of the module",
                where=adapter.arch.module(layer, site), got=final, wanted=f"at most {min(whole.shape)}",
            )  # fmt: skip
        padded = whole.padded(final, generator)
        rows = split(padded.B, site, adapter.arch.in_layer(layer))
        updates |= {(layer, part): LowRank(padded.A, B) for part, B in rows.items()}
    extras, settings = dict(adapter.extras), {**adapter.settings, "r": final}
    for table, update in tables.items():
        lora = exact_lora(table, update, final, adapter.arch.tied)
        tensors, entries = table_tensors(table, lora, base, final, generator, torch.zeros(0, dtype=torch.long))
        extras |= tensors
        settings["target_modules"] = [*settings.get("target_modules", []), *entries["target_modules"]]
    lost = _energy_lost(adapter, sites) if rank else 0.0
    facts = {**adapter.facts, "rank": final, "least_energy_kept": round(1 - lost, 6)}
    return replace(adapter, updates=updates, tables={}, extras=extras, settings=settings, facts=facts)


def _table_rank(update: TableUpdate) -> int:
    return LowRank(update.shared, update.rows).truncated(min(update.rows.shape))[0].rank


def exact_lora(table: str, update: TableUpdate, rank: int, tied: bool = False) -> TableUpdate:
    """Return the change of a token table as a LoRA; raise `LoraSuiteError` if the rank is too small for it."""
    lora = table_as_lora(table, update, tied)
    kept = LowRank(update.shared, update.rows).truncated(rank)[1] if update.form != "lora" else 1.0
    if kept < 1 - EXACT:
        raise LoraSuiteError(
            f"the rank is too small for the change of the {table}: it keeps {kept:.1%} of the energy",
            where=", ".join(update.names), got=rank, wanted=_table_rank(update), do="pass that rank (--rank, rank=)",
        )  # fmt: skip
    return lora


def _energy_lost(adapter: Adapter, sites: dict[Any, LowRank]) -> float:
    """Return the largest fraction of a module's energy that is lost."""
    before = join_sites(adapter.updates, adapter.arch)
    lost = [1 - (sites[key].norm() / whole.norm()) ** 2 for key, whole in before.items() if whole.norm()]
    return max([*lost, 0.0])


def module_type(module: str) -> str:
    """Return a module's path in its layer; that of a module outside of the layers is its full name."""
    match = LAYER.match(module)
    return match["path"] if match else module


def fill_layers(adapter: Adapter, groups: Iterable[tuple[str, ...]] = (), *, everywhere: bool = True) -> Adapter:
    """Return a plain LoRA with updates of zero in modules that a loader takes for granted.

    Args:
        adapter: The adapter.
        groups: Names of modules of which the loader needs all where it finds one, such as q_proj, k_proj and v_proj.
        everywhere: Whether it needs a module in every layer if it is in one.
    """
    arch, updates = adapter.arch, dict(adapter.updates)
    places = {arch.module(layer, site): (layer, site) for layer, site in arch.modules}
    wanted = {arch.module(layer, site) for layer, site in join_sites(updates, arch)}
    if everywhere:
        kinds = set(map(module_type, wanted))
        wanted |= {module for module in places if module_type(module) in kinds}
    for module in list(wanted):
        parent, _, own = module.rpartition(".")
        wanted |= {f"{parent}.{other}" for group in groups if own in group for other in group}
    for layer, site in (places[module] for module in sorted(wanted & places.keys())):
        for part in site.parts:
            rows, columns = arch.in_layer(layer).shape(part)
            updates.setdefault((layer, part), LowRank(torch.zeros(0, columns), torch.zeros(rows, 0)))
    return replace(adapter, updates=updates)
