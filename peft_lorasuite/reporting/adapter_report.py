"""The report of an upgraded adapter: what was transferred, what the rank kept, how large the updates are."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..io.source import Source
from . import adapter_figures
from . import html as pages
from . import map_report as map_pages
from .gap import Gain
from .module_norms import Sizes, sizes
from .style import short

if TYPE_CHECKING:
    from ..mapping.upgrade_map import UpgradeMap
    from .drawn import Drawn

CARRIED = "transferred"
MOST_LINES = 200
"""Lost tensors that are listed one by one."""


def document(
    report: Mapping[str, Any], upgraded: Source, before: Source | None, upgrade_map: UpgradeMap | None,
    rows: Sequence[Gain], drawn: Drawn, bases: Sequence[Any] = (None, None),
) -> str:  # fmt: skip
    """Return the HTML report of an upgraded adapter.

    Args:
        report: Values of its ``lorasuite_report.json``.
        upgraded: Its folder or repository.
        before: The adapter that it was made of, if it can be named.
        upgrade_map: The map that it was made with, if it was given.
        rows: Measured rows.
        drawn: Takes note of what is drawn.
        bases: Old and new backbone, where they are not where the adapters' configs say.
    """
    method = str(report["method"]["name"])
    named = {name: short(report[name], 60) for name in ("adapter", "old", "new")}
    about = f"LoRA adapter {named['adapter']} of {named['old']}, transferred to {named['new']} by {method}."
    head = [_verdict(report, method, upgrade_map)]
    parts = [
        map_pages.gap_part(rows, drawn),
        _coverage(report["tensors"], float(report["coverage"])),
        *_modules(report, sizes(report, upgraded, before, bases), drawn),
        *_map(upgrade_map, drawn),
        _made(report, method),
    ]
    return pages.page(f"{named['adapter']} on {named['new']}", about, head, parts)


def _verdict(report: Mapping[str, Any], method: str, upgrade_map: UpgradeMap | None) -> str:
    if upgrade_map is not None:
        _check_pair(report, upgrade_map)
        return map_pages.gate_told(upgrade_map, method)
    kept = report.get("facts", {}).get("prediction")
    if not kept:
        return pages.text("The gate's prediction is not shown: it is read off the upgrade map (--map DIR).", "quiet")
    word = "Likely to hold." if kept["verdict"] == "holds" else "Likely to fall short: plan to retrain."
    info = f"Expected by {method}: {float(kept['expected_gap_recovered']):.0%} of the gap recovered, a rough guess."
    return pages.verdict(word, f"{info} It rests on: {kept['because']}.")


def _check_pair(report: Mapping[str, Any], upgrade_map: UpgradeMap) -> None:
    """Refuse a map of other backbones, as far as names tell."""
    from ..errors import LoraSuiteError
    from ..mapping.fingerprint import public_name

    pair = public_name(upgrade_map.old.name), public_name(upgrade_map.new.name)
    if pair != (report["old"], report["new"]):
        raise LoraSuiteError(
            "the map is of other backbones than the adapter", where="--map", got=" to ".join(pair),
            wanted=f"{report['old']} to {report['new']}",
        )  # fmt: skip


def _coverage(tensors: Mapping[str, str], share: float) -> pages.Part:
    """Count per kind of module what was transferred, and list what was not, each with its reason."""
    whole, converted = (
        Counter(map(_kind, tensors)),
        Counter(_kind(name) for name, fate in tensors.items() if fate == CARRIED),
    )
    lines = [(kind, converted[kind], count, f"{converted[kind] / count:.0%}") for kind, count in sorted(whole.items())]
    body = [
        pages.text(f"{share:.1%} of the old adapter's {len(tensors)} tensors were transferred."),
        pages.table(("module", "transferred", "tensors", "share"), lines),
    ]
    lost = [(name, fate) for name, fate in tensors.items() if fate != CARRIED]
    if lost:
        info = "" if len(lost) <= MOST_LINES else f"The first {MOST_LINES} of {len(lost)}; the report's JSON lists all."
        body.append(pages.table(("tensor", "what became of it"), lost[:MOST_LINES], info))
    return pages.Part("Coverage", body)


def _kind(tensor: str) -> str:
    """Return the module's own name: of ``model.layers.0.self_attn.q_proj.lora_A.weight``, ``q_proj``."""
    words = [word for word in tensor.split(".") if not word.startswith("lora_")]
    while len(words) > 1 and (words[-1] in ("weight", "bias", "base_layer", "default") or words[-1].isdigit()):
        words.pop()
    return words[-1]


def _modules(report: Mapping[str, Any], measured: Sizes, drawn: Drawn) -> list[pages.Part]:
    """Return the sections on energy and size; an adapter that touches token tables alone has no modules."""
    if not measured.rows:
        reason = "the adapter changes no module of a layer"
        return [pages.Part("Energy and size", [drawn.lacks("energy", reason), drawn.lacks("size", reason)])]
    energy = (
        f"How much of each update ||dW||^2 is left after it was cut to rank {report['rank']}; on average "
        f"{float(report['energy_kept']):.1%}."
    )
    unit = ", in percent of the module's own weights'" if measured.relative else ""
    size = f"Frobenius norm of each update{unit}, as it was transferred (before any fine-tuning)."
    why = [drawn.lacks(name, reason) for name, reason in measured.missing.items()]
    return [
        pages.Part(
            "Energy kept", [drawn.figure("energy", lambda: adapter_figures.energy_figure(measured.rows), energy)]
        ),
        pages.Part(
            "Size of the updates, old against new",
            [drawn.figure("size", lambda: adapter_figures.size_figure(measured), size), *why],
        ),
    ]


def _map(upgrade_map: UpgradeMap | None, drawn: Drawn) -> list[pages.Part]:
    if upgrade_map is not None:
        return map_pages.map_parts(upgrade_map, drawn)
    reason = "layers, heads, hidden map and gate are read off the upgrade map, which was not named (--map DIR)"
    return [pages.Part("Upgrade map", [drawn.lacks("map", reason)])]


def _made(report: Mapping[str, Any], method: str) -> pages.Part:
    pins = report.get("revisions") or {}
    values: dict[str, Any] = {
        role: f"{report[key]}{f' at {pins[key][:12]}' if pins.get(key) else ''}"
        for role, key in (("old adapter", "adapter"), ("old backbone", "old"), ("new backbone", "new"))
    }
    values |= {"method": method, "rank": report["rank"], "written by": f"peft-lorasuite {report['version']}"}
    values |= {f"option {name}": value for name, value in (report["method"].get("options") or {}).items()}
    found = dict(report.get("facts") or {})
    differences = found.pop("differences", None)
    found.pop("prediction", None)
    values |= {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in found.items()
    }
    body = [pages.facts(values)]
    if isinstance(differences, list):
        body.append(map_pages.differences_told([str(one) for one in differences]))
    return pages.Part("How it was made", body)
