"""The report of an upgrade map: what the gate says, the layers, the heads, the hidden map."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..arch.differences import differences
from ..mapping.upgrade_map import UpgradeMap
from ..upgrading import auto, prediction
from . import adapter_figures
from . import gap as gains
from . import html as pages
from . import map_figures as report
from .gap import Gain
from .style import short

if TYPE_CHECKING:
    from .drawn import Drawn

METHODS = ("lorasuite", "transplant")
"""The methods that stand for carrying weights and for carrying behavior in the gate's table."""


def document(upgrade_map: UpgradeMap, rows: Sequence[Gain], drawn: Drawn) -> str:
    """Return the HTML report of a map."""
    names = short(upgrade_map.old.name, 60), short(upgrade_map.new.name, 60)
    parts = [*map_parts(upgrade_map, drawn), gap_part(rows, drawn), _made(upgrade_map)]
    about = "Upgrade map: how the layers, heads and dimensions of one backbone correspond to those of another."
    head = [gate_told(upgrade_map, "lorasuite")]
    return pages.page(f"{names[0]} to {names[1]}", about, head, parts)


def gate_told(upgrade_map: UpgradeMap, method: str) -> str:
    """Return the gate's verdict on an upgrade by a method, and what it rests on."""
    found = prediction.predict(upgrade_map, method)
    word = "Likely to hold." if found.verdict == "holds" else "Likely to fall short: plan to retrain."
    info = f"Expected by {method}: {found.gap:.0%} of the gap recovered, a rough guess. It rests on: {found.because}."
    return pages.verdict(word, info)


def map_parts(upgrade_map: UpgradeMap, drawn: Drawn) -> list[pages.Part]:
    """Return the sections with a map's pictures."""
    return [
        _gate(upgrade_map, drawn),
        _layers(upgrade_map, drawn),
        _heads(upgrade_map, drawn),
        _hidden(upgrade_map, drawn),
    ]


def _gate(upgrade_map: UpgradeMap, drawn: Drawn) -> pages.Part:
    picked = auto.pick(upgrade_map, can_run=True)
    found = {name: prediction.predict(upgrade_map, name) for name in METHODS}
    lines = [(name, one.verdict, f"{one.gap:.0%}") for name, one in found.items()]
    caption = "Scores of this pair, and the thresholds (upright marks) from which on the gate counts it as aligned."
    return pages.Part(
        "What the gate predicts",
        [
            drawn.figure("gate", lambda: report.gate_figure(upgrade_map), caption),
            pages.table(("method", "verdict", "gap expected"), lines, "Predicted from the map alone, before any run."),
            pages.text(f"With both backbones at hand, auto takes {picked.method}: {picked.why}."),
        ],
    )


def _layers(upgrade_map: UpgradeMap, drawn: Drawn) -> pages.Part:
    caption = (
        "How alike the outputs of old and new layers are on the same text, and which old layer each new one is matched "
        "with. New layers without a point match no old one: nothing is transferred to them."
    )
    left = sorted(set(range(upgrade_map.new.arch.layers)) - {new for _, new in upgrade_map.pairs})
    info = f"New layers that match no old one: {', '.join(map(str, left))}." if left else "Every new layer is matched."
    body = [drawn.figure("layers", lambda: report.layer_map_figure(upgrade_map), caption), pages.text(info)]
    return pages.Part("Layers", body)


def _heads(upgrade_map: UpgradeMap, drawn: Drawn) -> pages.Part:
    first = (
        "Every cell is a query head of the new backbone; the number in it is the old head that it is matched with, its "
        "color how alike the two are. Key and value heads follow the query heads of their group."
    )
    second = "How much of the new backbone's own weights the fitted maps of heads and feed-forward units explain."
    body = [
        drawn.figure("heads", lambda: report.heads_figure(upgrade_map), first),
        drawn.figure("explained", lambda: report.residual_figure(upgrade_map), second),
    ]
    return pages.Part("Heads and units", body)


def _hidden(upgrade_map: UpgradeMap, drawn: Drawn) -> pages.Part:
    caption = (
        "The hidden map moves embeddings of the old backbone into the space of the new one. A shared token finds "
        "itself if its moved embedding is nearest, by cosine, to its own new embedding."
    )
    return pages.Part("Hidden map", [drawn.figure("hidden", lambda: report.hidden_figure(upgrade_map), caption)])


def gap_part(rows: Sequence[Gain], drawn: Drawn) -> pages.Part:
    """Return the section with the measured rows, or with the way to have it."""
    title = "Gap recovered"
    if not rows:
        reason = "no measured rows were named (--rows DIR, as evaluate -o DIR or benchmarks/gap.py write it)"
        return pages.Part(title, [drawn.lacks("gap", reason)])
    measured = gains.gap(rows)
    shares = measured.shares if measured else [None] * len(rows)
    lines = [
        (row.label, "-" if share is None else f"{share:.0%}", f"{row.accuracy:.1%}", f"{row.interval[0]:.1%} to "
         f"{row.interval[1]:.1%}", "-" if row.nll is None else f"{row.nll:.3f}", row.items,
         "-" if row.seconds is None else f"{row.seconds:.0f}")
        for row, share in zip(rows, shares, strict=True)
    ]  # fmt: skip
    head = ("row", "gap recovered", "accuracy", "95 % interval", "nats per token", "items", "seconds")
    if measured:
        unit = "the answers' likelihood" if measured.value == "nll" else "accuracy"
        info = f"Counted in {unit}: 0 % is the bare new backbone, 100 % the row {short(measured.ceiling)}."
    else:
        info = "No gap can be told: it takes a row 'base' and a row 'full' (or 'old-adapted') that is clearly better."
    info += " Hatched bars were trained on labels."
    return pages.Part(
        title, [drawn.figure("gap", lambda: adapter_figures.gap_figure(rows), info), pages.table(head, lines)]
    )


def _made(upgrade_map: UpgradeMap) -> pages.Part:
    old, new = upgrade_map.old, upgrade_map.new
    values: dict[str, Any] = {
        "old backbone": _named(old),
        "new backbone": _named(new),
        "options": ", ".join(f"{name} {value}" for name, value in vars(upgrade_map.options).items()),
        "matched layers": f"{len(upgrade_map.layers)} of {old.arch.layers} old and {new.arch.layers} new",
        "shared tokens": f"{upgrade_map.facts.get('shared_tokens', 0):,}",
        "sections for methods": ", ".join(upgrade_map.sections) or "none",
    }
    seconds = upgrade_map.facts.get("seconds") or {}
    values |= {f"seconds, {name}": value for name, value in seconds.items()}
    return pages.Part("How it was made", [pages.facts(values), differences_told(differences(old.arch, new.arch))])


def _named(identity: Any) -> str:
    arch = identity.arch
    at = f" at {identity.revision[:12]}" if identity.revision else ""
    return (
        f"{short(identity.name, 80)}{at} ({arch.family}, {arch.layers} layers, hidden size {arch.hidden}, "
        f"{arch.heads.query} query and {arch.heads.key_value} key/value heads of {arch.heads.size})"
    )


def differences_told(found: Sequence[str]) -> str:
    """Return what the two structures differ in, and how an upgrade meets it."""
    if not found:
        return pages.text("Beyond their sizes the two structures differ in nothing that an upgrade has to meet.")
    return pages.table(("What the two structures differ in, and how that is met",), [(one,) for one in found])
