"""Write what an upgrade map or an upgraded adapter is into one HTML file, for whoever decides whether to use it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ..adapters.peft_format import CONFIG
from ..adapters.writing import REPORT
from ..errors import LoraSuiteError, context
from ..io.output import writing
from ..io.paths import exists, is_folder
from ..io.source import Source, name_and_revision
from ..mapping.upgrade_map import META, UpgradeMap
from . import adapter_report as adapter_pages
from . import map_report as map_pages
from .drawn import Drawn
from .gap import Gain, read_rows
from .module_norms import sizes
from .style import require


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
) -> Drawn:
    """Write an HTML report of an upgrade map or of an upgraded adapter; it stands alone, without script or network.

    Args:
        name: Folder or Hub id of a map, or of an adapter that `upgrade` wrote.
        output: The HTML file.
        revision: Branch, tag or commit on the Hub.
        upgrade_map: For an adapter, the map that it was made with: its pictures come along.
        old_adapter: For an adapter, the one that it was made of (``owner/name@revision`` pins it); by default the Hub
            repository that its report names, if it is on this machine.
        old: For an adapter, its old backbone, where it is not what the old adapter's config names.
        new: The new backbone, likewise.
        rows: Folder with measured rows (``evaluate -o`` or ``benchmarks/gap.py``): the bars of the gap.
        overwrite: Replace the file if it exists.

    Returns:
        What was drawn, and what was not and why: backbones that are not on this machine are not fetched for it.

    Raises:
        LoraSuiteError: When matplotlib is missing, the name is neither a map nor an upgraded adapter, or the file is
            not free. Then nothing is written.
    """
    target = check_free_file(output, overwrite=overwrite)
    require()
    measured = read_rows(rows) if rows is not None else []
    source = Source(str(name), "map or adapter", revision)
    drawn = Drawn()
    with context(source):
        if source.fetch(META) is not None:
            options = {"--map": upgrade_map, "--old-adapter": old_adapter, "--from": old, "--to": new}
            for option, given in options.items():
                if given is not None:
                    raise LoraSuiteError(f"{option} is for an adapter, and this is a map", where=source)
            document = map_pages.document(UpgradeMap.load(source.name, revision=revision), measured, drawn)
        elif source.fetch(CONFIG) is not None:
            document = _adapter(source, upgrade_map, old_adapter, (old, new), measured, drawn)
        else:
            raise LoraSuiteError(
                "this is neither an upgrade map nor an adapter", wanted=f"{META} or {CONFIG}",
                do="name what `map` or `upgrade` wrote",
            )  # fmt: skip
    write_whole(target, document)
    return drawn


def card_pictures(
    folder: str | Path,
    upgrade_map: UpgradeMap,
    upgraded: str | Path | None = None,
    *,
    before: Source | None = None,
    bases: tuple[Any, Any] = (None, None),
    rows: str | Path | None = None,
) -> Path:
    """Draw the pictures of a model card as PNG files into a folder, and return it.

    Args:
        folder: An existing folder.
        upgrade_map: The map.
        upgraded: For an adapter, the folder that `upgrade` wrote: energy kept and size of the updates are drawn too.
        before: The adapter that it was made of, for the sizes before the upgrade.
        bases: Old and new backbone, where they are not where the adapters' configs say. What is on this machine is
            read for the size of the updates against the weights; nothing is fetched for this.
        rows: Folder with measured rows, as for `inspect`: the bars of the gap recovered.

    Raises:
        LoraSuiteError: When matplotlib is missing, or there are no rows in the folder.
    """
    from . import adapter_figures
    from . import map_figures as figures

    drawn = {
        "layer_map.png": figures.layer_map_figure, "heads.png": figures.heads_figure,
        "explained.png": figures.residual_figure, "hidden_map.png": figures.hidden_figure,
        "gate.png": figures.gate_figure,
    }  # fmt: skip
    for name, draw in drawn.items():
        draw(upgrade_map).savefig(Path(folder) / name)
    if rows is not None:
        adapter_figures.gap_figure(read_rows(rows)).savefig(Path(folder) / "gap.png")
    if upgraded is not None:
        source = Source(str(upgraded), "adapter")
        measured = sizes(source.read_json(REPORT), source, before, bases)
        if measured.rows:
            adapter_figures.energy_figure(measured.rows).savefig(Path(folder) / "energy.png")
            adapter_figures.size_figure(measured).savefig(Path(folder) / "size.png")
    return Path(folder)


def _adapter(
    source: Source, upgrade_map: Any, old_adapter: Any, bases: tuple[Any, Any], measured: list[Gain], drawn: Drawn
) -> str:
    if source.fetch(REPORT) is None:
        raise LoraSuiteError(
            "the adapter was not upgraded by this package: its report is missing", wanted=REPORT,
            do="name the folder that `upgrade` wrote",
        )  # fmt: skip
    report = source.read_json(REPORT)
    if isinstance(upgrade_map, (str, Path)):
        upgrade_map = UpgradeMap.load(upgrade_map)
    pins = report.get("revisions") or {}
    if not isinstance(pins, dict):
        raise LoraSuiteError("the report's revisions are no such thing", where=REPORT, got=repr(pins))
    before = None
    if old_adapter is not None:
        place, revision = name_and_revision(old_adapter)
        before = Source(place, "adapter", revision)
        before.need(CONFIG, do="name the adapter that was upgraded")  # what the report names need not be there
    elif pins.get("adapter"):
        before = Source(str(report["adapter"]), "adapter", pins["adapter"], local_files_only=True, hub_only=True)
    elif bases[0] is not None:
        raise LoraSuiteError(
            "an old backbone without its adapter says nothing", where="--from", do="name --old-adapter"
        )
    try:
        return adapter_pages.document(report, source, before, upgrade_map, measured, drawn, bases)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, LoraSuiteError):
            raise
        raise LoraSuiteError(f"the report is incomplete: {error!r}", where=REPORT) from error


def check_free_file(path: str | Path, *, overwrite: bool = False) -> Path:
    """Return the file to write to, or refuse: called before the work."""
    target = Path(path).expanduser()
    if is_folder(target):
        raise LoraSuiteError(
            "the output is a folder", where=target, wanted="a file", do="add a name such as report.html"
        )
    if exists(target) and not overwrite:
        raise LoraSuiteError("the output file exists", where=target, do="choose another, or allow it with --overwrite")
    return target


def write_whole(target: Path, document: str) -> None:
    """Write a file whole or not at all: under another name beside it first."""
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(document)
                file.flush()
                os.fsync(file.fileno())
            part.chmod(0o644)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
