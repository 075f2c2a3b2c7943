"""`inspect`: an HTML report of an upgrade map or an upgraded adapter, and the figures of a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.peft_format import CONFIG
from ..adapters.writing import REPORT
from ..errors import LoraSuiteError, error_context
from ..io.output import check_output_file, write_file
from ..io.source import Source, split_revision
from ..mapping.upgrade_map import META, UpgradeMap
from ..upgrading.report import REPORT_SCHEMA
from . import adapter_figures, map_figures
from .adapter_report import adapter_page
from .gap import Result, read_results
from .html import ReportContents
from .map_report import map_page
from .module_norms import measure_norms
from .style import require_matplotlib


def inspect(
    name: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    upgrade_map: UpgradeMap | str | Path | None = None,
    old_adapter: str | Path | None = None,
    old: str | Path | None = None,
    new: str | Path | None = None,
    rows: str | Path | None = None,
    overwrite: bool = False,
) -> ReportContents:
    """Write an HTML report of an upgrade map or an upgraded adapter: one file, without scripts or external resources.

    Backbones are read if they are on this machine; nothing is downloaded for a figure.

    Args:
        name: Folder or Hub id of a map, or of an adapter written by `upgrade`.
        output: The HTML file.
        revision: Branch, tag or commit on the Hub.
        upgrade_map: For an adapter: the map that was used, to show its figures too.
        old_adapter: For an adapter: the old adapter (``owner/name@revision`` selects a revision); by default the Hub
            repository that the report has, if it is in the Hub cache.
        old: For an adapter: the old backbone, if it is not where the old adapter's config says.
        new: For an adapter: the new backbone, if it is not where the adapter's config says.
        rows: Folder with measured results (of ``evaluate -o`` or ``benchmarks/gap.py``), for the gap recovered.
        overwrite: Replace the file if it exists.

    Returns:
        The figures that the report shows, and what it does not show, with the reasons.

    Raises:
        LoraSuiteError: If matplotlib is not installed, ``name`` is neither a map nor an upgraded adapter, or the file
            exists. Nothing is written then.
    """
    target = check_output_file(output, overwrite=overwrite)
    require_matplotlib()
    results = read_results(rows) if rows is not None else []
    source = Source(str(name), "map or adapter", revision)
    contents = ReportContents()
    with error_context(source):
        if source.fetch(META) is not None:
            _check_no_adapter_options(source, upgrade_map, old_adapter, old, new)
            document = map_page(UpgradeMap.load(source.name, revision=revision), results, contents)
        elif source.fetch(CONFIG) is not None:
            document = _inspect_adapter(source, upgrade_map, old_adapter, (old, new), results, contents)
        else:
            raise LoraSuiteError(
                "neither an upgrade map nor an adapter", wanted=f"{META} or {CONFIG}",
                do="pass a folder written by `map` or `upgrade`",
            )  # fmt: skip
    write_file(target, document)
    return contents


def card_pictures(
    folder: str | Path,
    upgrade_map: UpgradeMap,
    upgraded: str | Path | None = None,
    *,
    before: Source | None = None,
    bases: tuple[Any, Any] = (None, None),
    rows: str | Path | None = None,
) -> Path:
    """Draw the figures of a model card as PNG files into a folder, and return the folder.

    Backbones are read if they are on this machine; nothing is downloaded for a figure.

    Args:
        folder: An existing folder.
        upgrade_map: The map.
        upgraded: Folder of the upgraded adapter: its energy kept and the norms of its updates are drawn too.
        before: The old adapter, for the norms before the upgrade.
        bases: Old and new backbone, where the adapters' configs do not have their current paths.
        rows: Folder with measured results, as for `inspect`, for the gap recovered.

    Raises:
        LoraSuiteError: If matplotlib is not installed, or ``rows`` has no results.
    """
    figures = {
        "layer_map.png": map_figures.layer_map_figure, "heads.png": map_figures.heads_figure,
        "explained.png": map_figures.residual_figure, "hidden_map.png": map_figures.hidden_figure,
        "prediction.png": map_figures.prediction_figure,
    }  # fmt: skip
    if not map_figures.has_heads(upgrade_map):
        del figures["heads.png"]
    for name, draw in figures.items() if upgrade_map.maps_weights else ():
        draw(upgrade_map).savefig(Path(folder) / name)
    if rows is not None:
        adapter_figures.gap_figure(read_results(rows)).savefig(Path(folder) / "gap.png")
    if upgraded is not None:
        source = Source(str(upgraded), "adapter")
        norms = measure_norms(source.read_json(REPORT, schema=REPORT_SCHEMA), source, before, bases)
        if norms.modules:
            adapter_figures.energy_figure(norms.modules).savefig(Path(folder) / "energy.png")
            adapter_figures.norm_figure(norms).savefig(Path(folder) / "size.png")
    return Path(folder)


def _check_no_adapter_options(source: Source, upgrade_map: Any, old_adapter: Any, old: Any, new: Any) -> None:
    options = {"--map": upgrade_map, "--old-adapter": old_adapter, "--from": old, "--to": new}
    for option, value in options.items():
        if value is not None:
            raise LoraSuiteError(f"{option} is for an adapter, and this is a map", where=source)


def _inspect_adapter(
    source: Source, upgrade_map: Any, old_adapter: Any, bases: tuple[Any, Any], results: list[Result],
    contents: ReportContents,
) -> str:  # fmt: skip
    if source.fetch(REPORT) is None:
        raise LoraSuiteError(
            "no upgrade wrote this adapter, or its report is missing", wanted=REPORT,
            do="pass the folder written by `upgrade`; PEFT's save_pretrained writes no report",
        )  # fmt: skip
    report = source.read_json(REPORT, schema=REPORT_SCHEMA)
    if isinstance(upgrade_map, (str, Path)):
        upgrade_map = UpgradeMap.load(upgrade_map)
    adapter = _find_old_adapter(report, old_adapter)
    if adapter is None and bases[0] is not None:
        raise LoraSuiteError(
            "the old backbone is of no use without its adapter", where="--from", do="add --old-adapter"
        )
    return adapter_page(report, source, adapter, upgrade_map, results, contents, bases)


def _find_old_adapter(report: dict[str, Any], old_adapter: str | Path | None) -> Source | None:
    """Return the given old adapter, or the Hub repository of the report; its files need not be on this machine."""
    revisions = report.get("revisions") or {}
    if old_adapter is not None:
        name, revision = split_revision(old_adapter)
        source = Source(name, "adapter", revision)
        source.require(CONFIG, do="pass the adapter that was upgraded")
        return source
    if revisions.get("adapter"):
        return Source(str(report["adapter"]), "adapter", revisions["adapter"], local_files_only=True, hub_only=True)
    return None
