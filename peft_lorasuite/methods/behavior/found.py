"""For the report: what a forward pass has shown of backbones without a converter, and what of them is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ...arch.spec import Site
from ...models.backbone import Backbone
from .states import LastProjection
from .targets import Head

EXPERTS = ".experts."
NO_PLACE = "no linear module's output reaches the final norm of the new model as it is, so training starts from zero"
"""Hint where no transplant can be fitted."""


def describe_found(
    old: tuple[Backbone, Head], new: tuple[Backbone, Head], model: Any, place: LastProjection | None
) -> dict[str, Any]:
    """Return the entry ``found`` of the report, and hints; nothing if both backbones have converters.

    Args:
        old: The old backbone and its head.
        new: The new backbone and its head.
        model: The loaded new model, without adapters.
        place: Its last projection.
    """
    sides = {"old": old, "new": new}
    found: dict[str, Any] = {
        role: _describe_head(head) for role, (backbone, head) in sides.items() if not backbone.arch.has_converter
    }
    if "new" not in found:
        return {"found": found} if found else {}
    sites = new[0].arch.sites
    experts = sorted({_short(name) for name, weight in model.named_parameters() if EXPERTS in name and weight.ndim > 2})
    found["new"] |= {
        "last_projection": place and place.module,
        "norm_behind_it": place is not None and place.gain is not None,
        "trained": _last_names(site for site in sites if site.trained),
        "not_trained": _last_names(site for site in sites if not site.trained) + experts,
    }
    return {"found": found} | ({} if place else {"hints": [NO_PLACE]})


def _describe_head(head: Head) -> dict[str, Any]:
    return {"final_norm": head.norm_path, "logits_divided_by": round(head.scaling, 6), "soft_cap": head.cap}


def _last_names(sites: Iterable[Site]) -> list[str]:
    return sorted({_short(site.path) for site in sites})


def _short(path: str) -> str:
    """Return the last name of a module or parameter, with the one before it if it is a number."""
    before, _, last = path.rpartition(".")
    return f"{before.rpartition('.')[2]}.{last}" if last.isdecimal() else last
