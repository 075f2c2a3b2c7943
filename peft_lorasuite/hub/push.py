"""Push an upgraded adapter or an upgrade map to the Hub: its files and a model card, in one verified commit."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.peft_format import CONFIG, WEIGHTS
from ..adapters.tokenizer import OTHERS, TOKENIZER
from ..adapters.writing import RECORD, REPORT, write_peft_model
from ..checking.page import DATA
from ..errors import LoraSuiteError, error_context
from ..io.checkpoint import no_safetensors_error, read_tensors
from ..io.json_file import read_json
from ..io.paths import exists, is_folder
from ..io.retry import with_retries
from ..io.source import Source, hub_errors
from ..io.temporary import temporary_folder
from ..mapping.upgrade_map import UpgradeMap
from ..upgrading.report import REPORT_SCHEMA
from ..upgrading.upgrade import Upgraded
from . import card
from .card_check import read_check
from .repository import Pushed, check_id, check_secrets, publish

if TYPE_CHECKING:
    from peft import PeftModel

    from ..evaluation.scores import Evaluation

log = logging.getLogger(__name__)

README = "README.md"
STALE = ("adapter_model.bin", REPORT, RECORD, DATA, TOKENIZER, *OTHERS, *card.PICTURES)
"""Files of a replaced adapter that would not match the new one."""

__all__ = ["Pushed", "check_push", "push_map", "push_upgraded"]


def push_upgraded(
    model_or_dir: Upgraded | PeftModel | str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    overwrite: bool = False,
    token: str | bool | None = None,
    base_model: str | None = None,
    license: str | None = None,
    evaluation: Evaluation | str | Path | None = None,
    picture: str | Path | None = None,
) -> Pushed:
    """Push an upgraded adapter and its model card to the Hub in one commit, then download and verify it.

    Args:
        model_or_dir: What `upgrade` or `from_upgraded` returned, or a folder written by `upgrade`.
        repo_id: Repository to push to, ``owner/name``; created if it does not exist.
        private: Whether a new repository is private; by default the setting of the account. With True, pushing to an
            existing public repository is an error.
        create_pr: Open a pull request in an existing repository instead of committing to its main branch.
        commit_message: Title of the commit.
        overwrite: Replace other content of the repository.
        token: Hub token; by default the token of the logged-in user.
        base_model: Hub id of the new backbone, required if the adapter was upgraded to a local folder.
        license: License for the card; by default the license of the source adapter.
        evaluation: Scores of this adapter for the card: an `Evaluation`, or the JSON file written by ``evaluate``.
        picture: PNG file of the layer map for the card, or a folder of figures from `card_pictures`.

    Returns:
        Repository, commit and URL, and the pull request if one was opened.

    Raises:
        LoraSuiteError: If something is missing, the repository has other content, or the Hub refuses the push. The
            repository is then unchanged; one that was created for this push is deleted.
    """
    check_id(repo_id)
    evaluation = card.load_evaluation(evaluation)
    with _adapter_folder(model_or_dir) as source, temporary_folder() as folder, error_context(repo_id):
        report = _read_report(source)
        base = _copy_adapter(source, folder, base_model)
        license_fields = {"license": license} if license else _source_license(model_or_dir, source, report, token)
        training = read_json(folder / RECORD, where=RECORD) if (folder / RECORD).is_file() else None
        pictures = _copy_pictures(picture, folder)
        check = read_check(source)
        if check is not None:
            (folder / DATA).write_bytes((source / DATA).read_bytes())
        try:
            text = card.adapter_card(
                repo_id, base, report, license=license_fields, license_inherited=not license,
                evaluation=evaluation, training=training, pictures=pictures, check=check,
            )  # fmt: skip
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise LoraSuiteError(f"the report is incomplete: {error!r}", where=REPORT) from error
        (folder / README).write_text(text, encoding="utf-8")
        check_secrets(folder, token)
        _check_base(base, token)
        title = commit_message or f"Upgrade adapter from {report['old']} to {report['new']} with peft-lorasuite"
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
    """Push an upgrade map and its model card to the Hub in one commit, then download and verify it.

    Build the map from Hub ids rather than from local folders: it then records the hashes of the weight files, and
    whoever uses it can verify that it matches their backbones without downloading weights.

    Args:
        upgrade_map: The map, as returned by `UpgradeMap.build` or `UpgradeMap.load`.
        repo_id: Repository to push to, ``owner/name``; created if it does not exist.
        private: Whether a new repository is private; by default the setting of the account. With True, pushing to an
            existing public repository is an error.
        create_pr: Open a pull request in an existing repository instead of committing to its main branch.
        commit_message: Title of the commit.
        overwrite: Replace other content of the repository.
        token: Hub token; by default the token of the logged-in user.
        picture: PNG file of the layer map for the card, or a folder of figures from `card_pictures`.

    Returns:
        Repository, commit and URL, and the pull request if one was opened.

    Raises:
        LoraSuiteError: If the repository has other content, or the Hub refuses the push. The repository is then
            unchanged; one that was created for this push is deleted.
    """
    check_id(repo_id)
    with temporary_folder() as scratch, error_context(repo_id):
        folder = upgrade_map.save(scratch / "map")
        text = card.map_card(repo_id, upgrade_map, pictures=_copy_pictures(picture, folder))
        (folder / README).write_text(text, encoding="utf-8")
        check_secrets(folder, token)
        key_files = tuple(path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
        title = commit_message or f"Upgrade map from {upgrade_map.old.name} to {upgrade_map.new.name}"
        return publish(
            folder, repo_id, key_files, tuple(card.PICTURES),
            private=private, create_pr=create_pr, message=title, overwrite=overwrite, token=token,
        )  # fmt: skip


def check_push(repo_id: str, base_model: str, *, token: str | bool | None = None) -> None:
    """Check before an upgrade what a push would refuse after it: the repository id and the new backbone.

    Args:
        repo_id: Repository that an adapter will be pushed to.
        base_model: Hub id of the new backbone.
        token: Hub token.
    """
    check_id(repo_id)
    _check_base(_hub_id(base_model), token)


@contextmanager
def _adapter_folder(model_or_dir: Any) -> Iterator[Path]:
    """Yield a folder with the files of the adapter; a result in memory is written to a temporary one."""
    if isinstance(model_or_dir, (str, Path)):
        if not is_folder(model_or_dir):
            raise LoraSuiteError(
                "the folder does not exist", where=model_or_dir, do="pass the folder written by `upgrade`"
            )
        yield Path(model_or_dir).expanduser()
        return
    with temporary_folder() as folder:
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
    write_peft_model(model, folder)


def _read_report(folder: Path) -> dict[str, Any]:
    if not (folder / REPORT).is_file():
        raise LoraSuiteError(
            f"the adapter has no {REPORT}, which the card is written from",
            do="push the result of `upgrade` or `from_upgraded`; for any other adapter use PEFT's push_to_hub",
        )
    return read_json(folder / REPORT, where=REPORT, schema=REPORT_SCHEMA)


def _copy_adapter(source_folder: Path, folder: Path, base_model: str | None) -> str:
    """Copy the files of the adapter and no others; return the Hub id of its backbone."""
    source = Source(str(source_folder), "adapter")
    config = source.read_json(CONFIG)
    if source.fetch(WEIGHTS) is None:
        raise no_safetensors_error(source, WEIGHTS)
    read_tensors(source_folder / WEIGHTS, where=WEIGHTS)
    base = check_id(base_model, owner=False) if base_model else _hub_id(config.get("base_model_name_or_path"))
    if base_model is not None and base_model != config.get("base_model_name_or_path"):
        config |= {"base_model_name_or_path": base_model, "revision": None}
    if isinstance(config.get("target_modules"), list):  # PEFT writes a set, in an order that changes between runs
        config["target_modules"] = sorted(config["target_modules"])
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
    for name in (WEIGHTS, REPORT, RECORD, TOKENIZER, *OTHERS):
        if (source_folder / name).is_file():
            (folder / name).write_bytes((source_folder / name).read_bytes())
    return base


def _hub_id(base: Any) -> str:
    """Check that the name of a backbone is a Hub id and not a local folder of that name."""
    if not isinstance(base, str) or exists(base):
        raise LoraSuiteError(
            "the new backbone is a folder, which nobody else can load", wanted="a Hub id",
            do="set it with base_model= (--base-model)",
        )  # fmt: skip
    return check_id(base, owner=False)


def _copy_pictures(picture: str | Path | None, folder: Path) -> list[str]:
    """Copy one picture, or the known ones of a folder, and return their names on the card."""
    if picture is None:
        return []
    path = Path(picture)
    candidates = {name: path / name for name in card.PICTURES} if is_folder(path) else {card.PICTURE: path}
    found = {name: file.read_bytes() for name, file in candidates.items() if file.is_file()}
    if not found or not all(data.startswith(b"\x89PNG") for data in found.values()):
        raise LoraSuiteError("the picture must be a PNG file, or a folder of them", where=path.name)
    for name, data in found.items():
        (folder / name).write_bytes(data)
    return list(found)


def _source_license(
    model_or_dir: Any, folder: Path, report: dict[str, Any], token: str | bool | None
) -> dict[str, str]:
    """Read the license from the card of the source adapter, on the Hub at the commit that was upgraded.

    If the source adapter was a local folder that is not known any more, the card in the upgraded folder is read
    instead: the license may have been added there by hand.
    """
    source = model_or_dir.source if isinstance(model_or_dir, Upgraded) else None
    commit = (report.get("revisions") or {}).get("adapter")
    if source is None and commit is None:
        source = Source(str(folder), "adapter")
    source = source or Source(str(report["adapter"]), "adapter", str(commit), token, hub_only=True)
    try:
        return card.read_license(source.fetch(README))
    except LoraSuiteError as error:
        log.warning("the license of the source adapter is not known: %s", error)
        return {}


def _check_base(base: str, token: str | bool | None) -> None:
    """Check that the backbone is on the Hub: without it nobody could load the adapter."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    with hub_errors(Source(base, "backbone", hub_only=True)):
        try:
            with_retries(lambda: HfApi(token=token).model_info(base))
        except RepositoryNotFoundError:
            raise LoraSuiteError(
                "the new backbone is not on the Hub", where=base, do="pass its Hub id as base_model="
            ) from None
