"""Warnings for an adapter that changes nothing, before the upgrade or after it."""

from __future__ import annotations

import math

from ..adapters.adapter import Adapter
from ..adapters.dora import magnitude_ratios
from ..linalg.lowrank import LowRank
from ..models.backbone import Backbone

NEARLY_ZERO = 1e-7
"""Root mean square of an update below which it changes nothing: weights have .01 and more."""
ROUNDING = 5e-3
"""Relative change of a DoRA's magnitude that rounding to 16 bits explains."""


def zero_update_warnings(adapter: Adapter, result: Adapter, old: Backbone | None) -> list[str]:
    """Return warnings for an adapter that changes nothing, before the upgrade or after it.

    Args:
        adapter: The old adapter.
        result: The new adapter.
        old: The old backbone, to which the magnitudes of a DoRA are compared.
    """
    warnings = []
    if (size := _largest(adapter)) < NEARLY_ZERO and not _changes_more(adapter, old):
        warnings.append(f"the adapter changes nothing: was it trained? (largest update {size:.0e} per weight)")
    size = _largest(result)
    if size < NEARLY_ZERO and not (result.magnitudes or result.extras or result.head):
        warnings.append(f"the result changes nothing (largest update {size:.0e} per weight)")
    return warnings


def _largest(adapter: Adapter) -> float:
    """Return the largest root mean square of the updates of modules and token tables, over their entries.

    The search ends at the first update that changes something, which may not be the largest.
    """
    tables = [LowRank(table.shared, table.rows) for table in adapter.tables.values()]
    updates = [*adapter.updates.values(), *adapter.experts.values(), *tables]
    sizes: list[float] = []
    for update in updates:
        sizes.append(_root_mean_square(update))
        if sizes[-1] >= NEARLY_ZERO:
            break
    return max(sizes, default=0.0)


def _root_mean_square(update: LowRank) -> float:
    bias = 0.0 if update.bias is None else float(update.bias.pow(2).mean().sqrt())
    return max(update.norm() / max(math.prod(update.shape), 1) ** 0.5, bias)


def _changes_more(adapter: Adapter, old: Backbone | None) -> bool:
    """Whether an adapter changes added tokens, a head, or the magnitudes of a DoRA."""
    if (adapter.added and adapter.added.saved) or adapter.extras or adapter.head or adapter.others:
        return True
    if not adapter.magnitudes or old is None:
        return bool(adapter.magnitudes)
    return any(bool((ratio - 1).abs().max() > ROUNDING) for ratio in magnitude_ratios(adapter, old).values())
