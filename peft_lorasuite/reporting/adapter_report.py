"""The HTML report of an upgraded adapter: what was transferred, energy kept, norms of the updates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import LoraSuiteError
from ..io.source import Source
from ..mapping.fingerprint import public_name
from ..mapping.upgrade_map import UpgradeMap
from ..text.summary import without_template
from ..upgrading.repeat import repeat_command
from ..upgrading.report import TRANSFERRED, lost_tensors
from . import html
from .adapter_figures import energy_figure, loss_figure, norm_figure
from .gap import Result
from .html import ReportContents, Section
from .map_report import differences_table, gap_section, map_sections
from .module_norms import NormTable, measure_norms
from .style import shorten

MOST_SAMPLES = 10
"""Prompts whose answers are shown."""
MOST_LINES = 200
"""Tensors that are listed as not transferred."""


def adapter_page(
    report: Mapping[str, Any], upgraded: Source, adapter: Source | None, upgrade_map: UpgradeMap | None,
    results: Sequence[Result], contents: ReportContents, bases: Sequence[Any] = (None, None),
) -> str:  # fmt: skip
    """Return the HTML report of an upgraded adapter.

    Args:
        report: Values of its ``lorasuite_report.json``.
        upgraded: Its folder or repository.
        adapter: The old adapter, if it is known where it is.
        upgrade_map: The map that was used, if it was given.
        results: Measured results.
        contents: Records which figures are shown.
        bases: Old and new backbone, where the adapters' configs do not have their current paths.
    """
    if upgrade_map is not None:
        _check_pair(report, upgrade_map)
    method = str(report["method"]["name"])
    names = {name: shorten(report[name], 60) for name in ("adapter", "old", "new")}
    about = f"LoRA adapter {names['adapter']} of {names['old']}, converted for {names['new']} by {method}."
    sections = [
        _samples_section(report),
        gap_section(results, contents),
        _loss_section(report, contents),
        _coverage_section(report["tensors"], report["coverage"]),
        *_module_sections(report, measure_norms(report, upgraded, adapter, bases), contents),
        *_map_sections(upgrade_map, contents),
        _provenance_section(report, method),
    ]
    return html.page(f"{names['adapter']} on {names['new']}", about, [_verdict(report)], sections)


def _verdict(report: Mapping[str, Any]) -> str:
    """Return the verdict in the words of the report: the same with a map and without one."""
    found = (report.get("facts") or {}).get("prediction")
    text = str(report.get("verdict") or "not predicted")
    return html.verdict(f"{text[:1].upper()}{text[1:]}.", f"Based on: {found['because']}." if found else "")


def _samples_section(report: Mapping[str, Any]) -> Section:
    """Show what the three models answered, where the method ran them."""
    facts = report.get("facts") or {}
    samples = without_template(facts.get("samples") or [])
    labels = {"prompt": "prompt", "base": "new base model", "upgraded": "upgraded", "old": "old adapter"}
    tables = [
        html.name_value_table({label: sample[name] for name, label in labels.items()})
        for sample in samples[:MOST_SAMPLES]
    ]
    about = "Greedy answers to prompts that the method has read; the old adapter's answers were its targets."
    if facts.get("samples_held_out"):
        about = "Greedy answers to prompts that the method has left out."
    return Section("Sample answers", [html.paragraph(about, "quiet"), *tables] if tables else [])


def _loss_section(report: Mapping[str, Any], contents: ReportContents) -> Section:
    """Draw the loss of `distill`."""
    facts = (report.get("facts") or {}).get(str(report["method"]["name"]))
    losses = facts.get("losses") if isinstance(facts, Mapping) else None
    if not isinstance(losses, Sequence) or len(losses) < 2:
        return Section("Loss", [])
    caption = f"Loss of the training, from {losses[0]:.3f} to {losses[-1]:.3f}: means over equal parts of the steps."
    return Section("Loss", [contents.add_figure("loss", lambda: loss_figure(losses), caption)])


def _check_pair(report: Mapping[str, Any], upgrade_map: UpgradeMap) -> None:
    """Refuse a map of other backbones, as far as their names show it."""
    pair = public_name(upgrade_map.old.name), public_name(upgrade_map.new.name)
    if pair != (report["old"], report["new"]):
        raise LoraSuiteError(
            "the map is of other backbones than the adapter", where="--map", got=" to ".join(pair),
            wanted=f"{report['old']} to {report['new']}",
        )  # fmt: skip


def _coverage_section(tensors: Mapping[str, str], coverage: float | None) -> Section:
    """Count per kind of module what was transferred, and list what was not, each with the reason."""
    if coverage is None:
        text = (
            "The result was made from what the whole adapter does; none of its modules comes from one of the adapter."
        )
        return Section("Coverage", [html.paragraph(text)])
    total = Counter(map(_module_name, tensors))
    transferred = Counter(_module_name(name) for name, fate in tensors.items() if fate == TRANSFERRED)
    lines = [
        (kind, transferred[kind], count, f"{transferred[kind] / count:.0%}") for kind, count in sorted(total.items())
    ]
    body = [
        html.paragraph(f"{coverage:.1%} of the old adapter's {len(tensors)} tensors were transferred."),
        html.table(("module", "transferred", "tensors", "share"), lines),
    ]
    lost = lost_tensors(tensors)
    if lost:
        shown = f"The first {MOST_LINES} of {len(lost)}; lorasuite_report.json has all."
        body.append(html.table(("tensor", "status"), lost[:MOST_LINES], shown if len(lost) > MOST_LINES else ""))
    return Section("Coverage", body)


def _module_name(tensor: str) -> str:
    """Return the last name of a tensor's module: ``q_proj`` for ``model.layers.0.self_attn.q_proj.lora_A.weight``."""
    names = [name for name in tensor.split(".") if not name.startswith("lora_")]
    while len(names) > 1 and (names[-1] in ("weight", "bias", "base_layer", "default") or names[-1].isdigit()):
        names.pop()
    return names[-1]


def _module_sections(report: Mapping[str, Any], norms: NormTable, contents: ReportContents) -> list[Section]:
    """Return the sections on energy and norms; an adapter of embedding and head alone has no modules."""
    if not norms.modules:
        reason = "the adapter changes no module of a layer"
        body = [contents.add_missing("energy", reason), contents.add_missing("size", reason)]
        return [Section("Energy and size", body)]
    energy = (
        f"Share of each update's energy ||dW||^2 that is left after truncation to rank {report['rank']}; on average "
        f"{float(report['energy_kept']):.1%}."
    )
    if len(norms.modules) == 1:
        only = norms.modules[0]
        text = f"{energy} The only module is {only.site} of layer {only.layer}, with an update of norm {only.new:.3g}."
        return [Section("Energy and size", [html.paragraph(text)])]
    unit = ", in percent of the norm of the module's weights" if norms.relative else ""
    size = f"Frobenius norm of each update{unit}, as transferred (before any fine-tuning)."
    missing = [contents.add_missing(name, reason) for name, reason in norms.missing.items()]
    return [
        Section("Energy kept", [contents.add_figure("energy", lambda: energy_figure(norms.modules), energy)]),
        Section(
            "Size of the updates",
            [contents.add_figure("size", lambda: norm_figure(norms), size), *missing],
        ),
    ]


def _map_sections(upgrade_map: UpgradeMap | None, contents: ReportContents) -> list[Section]:
    if upgrade_map is not None:
        return map_sections(upgrade_map, contents, methods=False)
    reason = "prediction, layers, heads and hidden map need the upgrade map, which was not given (--map DIR)"
    return [Section("Upgrade map", [contents.add_missing("map", reason)])]


def _provenance_section(report: Mapping[str, Any], method: str) -> Section:
    revisions = report.get("revisions") or {}
    values: dict[str, Any] = {
        label: f"{report[key]}{f' at {revisions[key][:12]}' if revisions.get(key) else ''}"
        for label, key in (("old adapter", "adapter"), ("old backbone", "old"), ("new backbone", "new"))
    }
    values |= {"method": method, "rank": report["rank"], "written by": f"peft-lorasuite {report['version']}"}
    options = report["method"].get("options") or {}
    facts = dict(report.get("facts") or {})
    differences = facts.pop("differences", None)
    for shown in ("prediction", "samples"):
        facts.pop(shown, None)
    details = {"Options of the method": options, "Measurements": facts}
    body = [
        html.name_value_table(values), html.paragraph("To repeat this:"), html.code_block(repeat_command(report)),
        *(html.details(title, html.name_value_table(_as_text(found))) for title, found in details.items() if found),
    ]  # fmt: skip
    if isinstance(differences, list):
        body.append(differences_table([str(sentence) for sentence in differences]))
    return Section("How it was made", body)


def _as_text(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
    }
