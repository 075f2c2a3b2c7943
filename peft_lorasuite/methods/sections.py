"""Sections of an upgrade map by method: adding one to a map, and looking one up for an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import LoraSuiteError
from ..mapping.fingerprint import check_identity
from ..mapping.sections import Section, SectionRequest, SectionSpec, build_section
from ..mapping.upgrade_map import UpgradeMap
from ..models.backbone import Backbone
from ..progress import Progress, no_progress
from .base import MethodInput
from .options import make_options
from .registry import find, names


def add_section(
    upgrade_map: UpgradeMap,
    method: str,
    old: Any,
    new: Any,
    *,
    options: Any = None,
    parts: Sequence[str] | None = None,
    progress: Progress = no_progress,
) -> UpgradeMap:
    """Return the map with the section of a method added; nothing else is rebuilt.

    Saving the result over the map's folder adds one file.

    Args:
        upgrade_map: The map of the pair.
        method: Name of a method with a section, such as ``cross-lora``.
        old: The old backbone: folder, Hub id, loaded model or `Backbone`.
        new: The new backbone, likewise.
        options: The method's options, as its dataclass or a mapping.
        parts: Parts to build for; by default all parts that both backbones have.
        progress: Shows the progress.

    Raises:
        LoraSuiteError: For a method without a section, or a backbone of another pair.
    """
    spec, chosen = section_spec(method), make_options(find(method), options)
    old, new = Backbone.open(old), Backbone.open(new)
    check_identity(upgrade_map.old, old, "old")
    check_identity(upgrade_map.new, new, "new")
    built = _build(upgrade_map, spec, old, new, upgrade_map.common_parts(parts), chosen, progress)
    return replace(upgrade_map, sections={**upgrade_map.sections, built.name: built})


def section_spec(method: str) -> SectionSpec:
    """Return the declaration of a method's section.

    Raises:
        LoraSuiteError: For a method without a section.
    """
    spec = find(method).section
    if spec is None:
        known = [name for name in names() if find(name).section is not None]
        raise LoraSuiteError(
            f"the method {method!r} has no section in a map", wanted=" or ".join(known), do="leave it out"
        )
    return spec


def get_section(inputs: MethodInput, method: str, spec: SectionSpec, options: Any) -> Section:
    """Return the map's section of a method, or build it for the adapter's parts if both backbones are available.

    Raises:
        LoraSuiteError: When a backbone is missing and the map does not have the section for these options and parts.
    """
    parts = inputs.map.common_parts(inputs.adapter.parts)
    stored = inputs.map.sections.get(spec.name)
    if stored is not None and set(parts) <= set(stored.parts) and spec.covers(stored.settings, options):
        return stored
    if inputs.old is not None and inputs.new is not None:
        return _build(inputs.map, spec, inputs.old, inputs.new, parts, options, inputs.progress)
    wanted = {name: getattr(options, name) for name in spec.settings}
    what = f"the upgrade map has no section for {method!r}"
    raise LoraSuiteError(
        what if stored is None else f"{what} with these options and parts", where=inputs.map.source,
        got=f"{stored.settings}, {', '.join(stored.parts)}" if stored else "none", wanted=wanted,
        do=f"add it (add_section(map, {method!r}, old, new) or `map OLD NEW --methods {method}`), "
        "or pass both backbones",
    )  # fmt: skip


def _build(
    upgrade_map: UpgradeMap, spec: SectionSpec, old: Backbone, new: Backbone, parts: Sequence[str], options: Any,
    progress: Progress,
) -> Section:  # fmt: skip
    request = SectionRequest(
        upgrade_map.layers, upgrade_map.basis, old, new, parts, options, upgrade_map.options.seed, progress
    )
    return build_section(spec, request, upgrade_map.key)
