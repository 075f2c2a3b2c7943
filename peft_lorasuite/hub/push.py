"""Publishing on the Hub: an upgraded adapter or an upgrade map, with its card, in one commit that is read back."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..adapters.adapter import CONFIG, WEIGHTS
from ..adapters.writing import RECORD, REPORT, write_adapter
from ..errors import LoraSuiteError, context
from ..io.checkpoint import no_safetensors, read_all
from ..io.paths import exists, is_folder
from ..io.source import Source, hub_errors, read_json
from ..mapping.upgrade_map import UpgradeMap
from ..upgrading.upgrade import Upgraded
from . import card
from .repository import Pushed, check_id, check_secrets, publish

log = logging.getLogger(__name__)

README = "README.md"
STALE = ("adapter_model.bin", REPORT, RECORD, *card.PICTURES)
"""Files of an adapter that is replaced, which would lie about the new one."""

__all__ = ["Pushed", "check_push", "push_map", "push_upgraded"]


def push_upgraded(
    model_or_dir: Any,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    base_model: str | None = None,
    license: str | None = None,
    evaluation: Any = None,
    picture: str | Path | None = None,
) -> Pushed:
    """Push an upgraded adapter to the Hub with a card that says what it is, in one commit, and read it back.

    Args:
        model_or_dir: What `upgrade` or `from_upgraded` returned, or a folder that `upgrade` wrote.
        repo_id: Where to, ``owner/name``; created if it does not exist.
        private: Whether a new repository is private; by default the account's setting. True also refuses to push to
            a repository that is public.
        create_pr: Propose the change as a pull request of a repository that exists.
        commit_message: Title of the commit.
        overwrite: Replace what the repository holds, if that is something else.
        token: Hub token; by default the one that is logged in.
        base_model: Hub id of the new backbone, if the adapter names a folder.
        license: Licence for the card; by default the source adapter's.
        evaluation: Scores of this adapter (`scores.Evaluation`, or the JSON that it wrote), for the card.
        picture: PNG of the layer map for the card, or a folder of pictures as `inspection.card_pictures` draws them.

    Returns:
        Where it is: repository, commit, address, and the pull request if there is one.

    Raises:
        LoraSuiteError: When something is missing, the repository holds something else, or the Hub refuses. Then the
            repository is as it was; one that was created for this push is removed again.
    """
    check_id(repo_id)
    evaluation = card.evaluation_of(evaluation)
    with _folder_of(model_or_dir) as given, tempfile.TemporaryDirectory() as scratch, context(repo_id):
        folder = Path(scratch)
        report = _report(given)
        base = _copy_adapter(given, folder, base_model)
        licence = {"license": license} if license else _licence(model_or_dir, given, report, token)
        training = read_json(folder / RECORD, where=RECORD) if (folder / RECORD).is_file() else None
        pictures = _copy_pictures(picture, folder)
        try:
            text = card.adapter_card(
                repo_id, base, report,
                licence=licence, evaluation=evaluation, training=training, pictures=pictures,
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise LoraSuiteError(f"the report is incomplete: {error!r}", where=REPORT) from error
        (folder / README).write_text(text, encoding="utf-8")
        check_secrets(folder, token)
        _check_base(base, token)
        title = commit_message or f"Adapter carried over from {report['old']} to {report['new']} by peft-lorasuite"
        return publish(
            folder, repo_id, (CONFIG, WEIGHTS), STALE,
            private=private, create_pr=create_pr, message=title, overwrite=overwrite, token=token,
        )  # fmt: skip


def push_map(
    upgrade_map: UpgradeMap,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    picture: str | Path | None = None,
) -> Pushed:
    """Publish an upgrade map; arguments, result and errors as in `push_upgraded`."""
    check_id(repo_id)
    with tempfile.TemporaryDirectory() as scratch, context(repo_id):
        folder = upgrade_map.save(Path(scratch) / "map")
        text = card.map_card(repo_id, upgrade_map, pictures=_copy_pictures(picture, folder))
        (folder / README).write_text(text, encoding="utf-8")
        check_secrets(folder, token)
        content = tuple(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
        title = commit_message or f"Upgrade map from {upgrade_map.old.name} to {upgrade_map.new.name}"
        return publish(
            folder, repo_id, content, tuple(card.PICTURES),
            private=private, create_pr=create_pr, message=title, overwrite=overwrite, token=token,
        )  # fmt: skip


def check_push(repo_id: str, base_model: str, *, token: str | bool | None = None) -> None:
    """Refuse before the work what a push would refuse after it: a name that is none, a backbone that is not on the Hub.

    Args:
        repo_id: Where an adapter will be pushed to.
        base_model: Hub id of the new backbone that its card will name.
        token: Hub token.
    """
    check_id(repo_id)
    _check_base(_hub_id(base_model), token)


@contextmanager
def _folder_of(model_or_dir: Any) -> Iterator[Path]:
    """Give a folder with the adapter's files, whatever was handed over."""
    if isinstance(model_or_dir, (str, Path)):
        if not is_folder(model_or_dir):
            raise LoraSuiteError(
                "there is no such folder", where=model_or_dir, do="name the folder that `upgrade` wrote"
            )
        yield Path(model_or_dir).expanduser()
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if isinstance(model_or_dir, Upgraded):
            model_or_dir.write(folder)
        else:
            _write_model(model_or_dir, folder)
        yield folder


def _write_model(model: Any, folder: Path) -> None:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        kind = type(model).__name__
        raise LoraSuiteError("this cannot be pushed", got=kind, wanted="an upgraded adapter, a PEFT model or a folder")
    write_adapter(model, folder)


def _report(folder: Path) -> dict[str, Any]:
    if not (folder / REPORT).is_file():
        raise LoraSuiteError(
            f"there is no {REPORT}, from which the card is written",
            do="push what `upgrade` or `from_upgraded` made; for any other adapter PEFT's push_to_hub will do",
        )
    return read_json(folder / REPORT, where=REPORT)


def _copy_adapter(given: Path, folder: Path, base_model: str | None) -> str:
    """Copy what belongs to the adapter and nothing else; return the Hub id of its backbone."""
    source = Source(str(given), "adapter")
    config = source.read_json(CONFIG)
    if source.fetch(WEIGHTS) is None:
        raise no_safetensors(source, WEIGHTS)
    read_all(given / WEIGHTS, where=WEIGHTS)
    base = check_id(base_model, owner=False) if base_model else _hub_id(config.get("base_model_name_or_path"))
    if base_model is not None and base_model != config.get("base_model_name_or_path"):
        config |= {"base_model_name_or_path": base_model, "revision": None}
    if isinstance(config.get("target_modules"), list):  # PEFT writes a set, each time in another order
        config["target_modules"] = sorted(config["target_modules"])
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    for name in (WEIGHTS, REPORT, RECORD):
        if (given / name).is_file():
            (folder / name).write_bytes((given / name).read_bytes())
    return base


def _hub_id(base: Any) -> str:
    """Return the Hub id of a backbone; a folder of this machine is none, whatever its name."""
    if not isinstance(base, str) or exists(base):
        raise LoraSuiteError(
            "the new backbone is a folder, which nobody else can load", wanted="a Hub id",
            do="say which with base_model= (--base-model)",
        )  # fmt: skip
    return check_id(base, owner=False)


def _copy_pictures(picture: str | Path | None, folder: Path) -> list[str]:
    """Copy a picture, or those that a folder holds, and return their names on the card."""
    if picture is None:
        return []
    place = Path(picture)
    files = {name: place / name for name in card.PICTURES} if is_folder(place) else {card.PICTURE: place}
    found = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    if not found or not all(data.startswith(b"\x89PNG") for data in found.values()):
        raise LoraSuiteError("the picture is no PNG file", where=place.name)
    for name, data in found.items():
        (folder / name).write_bytes(data)
    return list(found)


def _licence(model_or_dir: Any, given: Path, report: dict[str, Any], token: str | bool | None) -> dict[str, str]:
    """Read the licence from the source adapter's card, in its folder or in its repository at that commit.

    For a folder whose source is out of reach its own card is read: somebody may have written the licence there.
    """
    source = model_or_dir.source if isinstance(model_or_dir, Upgraded) else None
    commit = (report.get("revisions") or {}).get("adapter")
    if source is None and commit is None:
        source = Source(str(given), "adapter")
    source = source or Source(str(report["adapter"]), "adapter", str(commit), token, hub_only=True)
    try:
        return card.licence_of(source.fetch(README))
    except LoraSuiteError as error:
        log.warning("no licence is carried over: %s", error)
        return {}


def _check_base(base: str, token: str | bool | None) -> None:
    """Refuse a backbone that is not on the Hub: nobody could load the adapter."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    from ..io.retry import patiently

    with hub_errors(Source(base, "backbone", hub_only=True)):
        try:
            patiently(lambda: HfApi(token=token).model_info(base))
        except RepositoryNotFoundError:
            raise LoraSuiteError(
                "the new backbone is not on the Hub", where=base, do="name its Hub id with base_model="
            ) from None
