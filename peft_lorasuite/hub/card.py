"""Model cards of upgraded adapters and of upgrade maps, rendered from the templates in ``data/``.

Text from other people's files (names, options, reasons, the license of the source adapter) is untrusted. It is escaped
here, before it reaches a template: in the body it is shown as inline code on a single line, so that none of it is
interpreted as Markdown or HTML. Jinja inserts values as they are and does not evaluate them as templates.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import LoraSuiteError
from ..io.paths import is_file
from ..upgrading.repeat import repeat_command
from ..upgrading.report import lost_tensors
from .card_check import check_values
from .card_task import chat_values, pipeline_tag, sample_rows, task_values

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCardData

    from ..evaluation.scores import Evaluation
    from ..mapping.upgrade_map import UpgradeMap

PICTURE = "layer_map.png"
PICTURES = {
    PICTURE: "Layer similarity of the two backbones and the layer map",
    "heads.png": "Matched attention heads and their similarity",
    "explained.png": "Share of the new backbone's weights explained by the head and unit maps",
    "hidden_map.png": "Quality of the hidden map",
    "prediction.png": "Alignment scores and their thresholds",
    "energy.png": "Energy kept per module",
    "size.png": "Size of the update per module, old adapter and upgraded adapter",
    "gap.png": "Gap recovered and accuracy of each measured result",
}
"""File name of each figure of a card, in order, and its alternative text."""
TAGS = ["lora", "lorasuite", "upgraded-adapter"]
MAP_TAGS = ["lorasuite", "upgrade-map"]
MAX_LISTED = 10
"""Number of tensors listed as not transferred."""
MAX_LENGTH = 300
"""Characters kept of an untrusted string."""
LICENSE_FIELDS = ("license", "license_name", "license_link")

log = logging.getLogger(__name__)


def adapter_card(
    repo_id: str,
    base: str,
    report: Mapping[str, Any],
    *,
    license: Mapping[str, str] | None = None,
    license_inherited: bool = True,
    evaluation: Evaluation | None = None,
    training: Mapping[str, Any] | None = None,
    pictures: Iterable[str] = (),
    check: Mapping[str, Any] | None = None,
) -> str:
    """Render the card of an upgraded adapter.

    Args:
        repo_id: Repository of the adapter.
        base: Hub id of the new backbone.
        report: Values of ``lorasuite_report.json``.
        license: License fields of the metadata, as returned by `read_license`.
        license_inherited: Whether the license comes from the card of the source adapter.
        evaluation: Scores of this adapter.
        training: Record of a fine-tuning run after the upgrade; its numbers are added to the metadata.
        pictures: Names from `PICTURES` that are stored beside the card.
        check: Values of ``check.json``.
    """
    from huggingface_hub import ModelCardData

    title = repo_id.split("/")[1]
    license_fields: dict[str, Any] = clean(license or {})
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag=pipeline_tag(report),
        tags=TAGS,
        model_name=title if evaluation else None,
        eval_results=_eval_results(evaluation) if evaluation else None,
        base_model_relation="adapter",
        lorasuite=_metadata(report, training),
        **license_fields,
    )
    lost = [(code(name), code(fate)) for name, fate in lost_tensors(report["tensors"])]
    return _render(
        "adapter_card.md",
        data,
        title=title,
        repo_id=repo_id,
        base=base,
        **task_values(report, code),
        **check_values(check, code),
        new_backbone=_link(base),
        source_adapter=_origin(report, "adapter"),
        old_backbone=_origin(report, "old"),
        version=code(report["version"]),
        fine_tuned=bool(training),
        method=code(report["method"]["name"]),
        options=code(json.dumps(report["method"].get("options") or {}, sort_keys=True)),
        rank=int(report["rank"]),
        verdict=code(report["verdict"]) if report.get("verdict") else "",
        coverage=None if report["coverage"] is None else f"{float(report['coverage']):.1%}",
        energy_kept=f"{float(report['energy_kept']):.1%}",
        samples=sample_rows(report, code),
        samples_held_out=bool((report.get("facts") or {}).get("samples_held_out")),
        repeat=code(repeat_command(report), most=2000),
        **_added_tokens(report),
        **chat_values(report),
        lost=lost[:MAX_LISTED],
        more_lost=len(lost[MAX_LISTED:]),
        scores=_score_rows(evaluation) if evaluation else [],
        scoring=code(evaluation.scoring) if evaluation else "",
        figures=_figures(pictures),
        license_text=code(", ".join(license_fields.values())) if license_fields else "",
        license_inherited=license_inherited,
    )


def _added_tokens(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tokens that were added to the new tokenizer, the rows for them, and tokens that were lost."""
    facts = (report.get("facts") or {}).get("added_tokens") or {}
    added, lost = list(facts.get("added") or []), list(facts.get("lost") or {})
    return {
        "tokens": [code(token) for token in added[:MAX_LISTED]],
        "more_tokens": len(added[MAX_LISTED:]),
        "rows": int(facts.get("rows") or 0),
        "lost_tokens": [code(token) for token in lost[:MAX_LISTED]],
        "more_lost_tokens": len(lost[MAX_LISTED:]),
    }


def map_card(repo_id: str, upgrade_map: UpgradeMap, *, pictures: Iterable[str] = ()) -> str:
    """Render the card of an upgrade map; the arguments are those of `adapter_card`."""
    from huggingface_hub import ModelCardData

    values = clean(upgrade_map.describe())
    sides = {role: {key: values[role][key] for key in ("name", "revision")} for role in ("old", "new")}
    details = {key: values[key] for key in ("options", "layers", "facts")}
    data = ModelCardData(
        base_model=[side["name"] for side in sides.values() if side["revision"]] or None,
        library_name="peft",
        tags=MAP_TAGS,
        lorasuite={"kind": "upgrade map", **sides, **details},
    )
    return _render(
        "map_card.md",
        data,
        title=repo_id.split("/")[1],
        repo_id=repo_id,
        old_backbone=code(sides["old"]["name"]),
        new_backbone=code(sides["new"]["name"]),
        version=__version__,
        layers=len(upgrade_map.layers),
        figures=_figures(pictures),
    )


def read_license(readme: Path | None) -> dict[str, str]:
    """Read the license fields of a card; empty without a card, a license or readable metadata."""
    if readme is None:
        return {}
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        data = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError, TypeError, AttributeError, YAMLError) as error:
        log.warning("the card of the source adapter cannot be read (%s): no license is set", type(error).__name__)
        return {}
    found = {name: clean(data[name]) for name in LICENSE_FIELDS if isinstance(data.get(name), str)}
    if not found.get("license_link", "https://").startswith("https://"):
        del found["license_link"]  # a file of the source repository, which is not copied
    return found


def load_evaluation(evaluation: Evaluation | str | Path | None) -> Evaluation | None:
    """Return an evaluation unchanged, or load the JSON file that `Evaluation.save` wrote."""
    from ..evaluation.scores import Evaluation

    if evaluation is None or isinstance(evaluation, Evaluation):
        return evaluation
    if not is_file(evaluation):
        raise LoraSuiteError("the evaluation does not exist", where=evaluation, do="pass the JSON file from `evaluate`")
    return Evaluation.load(evaluation)


def code(text: Any, most: int = MAX_LENGTH) -> str:
    """Format untrusted text as inline code on a single line, also inside a table: none of it is Markdown or HTML."""
    # `` would open a longer code span
    return f"`{_clean_text(text, most).replace('`', chr(39)).replace('|', '/') or ' '}`"


def clean(value: Any) -> Any:
    """Clean every string in nested values, keys included, for the metadata."""
    if isinstance(value, Mapping):
        return {_clean_text(name): clean(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(inner) for inner in value]
    return value if isinstance(value, (bool, int, float)) or value is None else _clean_text(value)


def _clean_text(text: Any, most: int = MAX_LENGTH) -> str:
    """Keep printable characters on a single line, without ``---``, which would end the metadata."""
    plain = "".join(letter if letter.isprintable() else " " for letter in str(text))
    while "---" in plain:
        plain = plain.replace("---", "--")
    return plain[:most]


def _render(template: str, data: ModelCardData, **values: Any) -> str:
    """Fill in a template of the package; strings in ``values`` must be escaped already."""
    from huggingface_hub import ModelCard

    with as_file(files("peft_lorasuite") / "data" / template) as path:
        card = ModelCard.from_template(data, template_path=str(path), **values)
    return str(card).rstrip() + "\n"


def _metadata(report: Mapping[str, Any], training: Mapping[str, Any] | None) -> dict[str, Any]:
    commits = report.get("revisions") or {}
    packages = {"peft_lorasuite": report["version"], "peft": version("peft"), "transformers": version("transformers")}
    values = {
        "source_adapter": {"name": report["adapter"], "revision": commits.get("adapter")},
        "old_backbone": {"name": report["old"], "revision": commits.get("old")},
        "new_backbone": {"name": report["new"], "revision": commits.get("new")},
        "method": report["method"]["name"],
        "options": report["method"].get("options") or {},
        "rank": report["rank"],
        "coverage": report["coverage"],
        "energy_kept": report["energy_kept"],
        "versions": packages,
    }
    if training:
        values["fine_tuning"] = {k: value for k, value in training.items() if isinstance(value, (bool, int, float))}
    return clean(values)


def _eval_results(evaluation: Evaluation) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=clean(score.task),
            dataset_name=clean(score.task),
            metric_type=clean(score.metric),
            metric_value=round(score.value, 4),
            metric_name=f"{clean(score.metric)} ({clean(evaluation.scoring)}, {score.n} items)",
        )
        for score in evaluation.tasks
    ]


def _score_rows(evaluation: Evaluation) -> list[tuple[str, str, str, int]]:
    return [
        (code(score.task), f"{score.value:.1%}", f"{score.interval[0]:.1%} to {score.interval[1]:.1%}", score.n)
        for score in evaluation.tasks
    ]


def _figures(pictures: Iterable[str]) -> list[tuple[str, str]]:
    chosen = set(pictures)
    return [(name, caption) for name, caption in PICTURES.items() if name in chosen]


def _origin(report: Mapping[str, Any], role: str) -> str:
    """Format the name of an input: a link with its commit for a Hub repository, code for a folder."""
    commit = (report.get("revisions") or {}).get(role)
    return f"{_link(report[role])} at {code(commit[:12])}" if commit else code(report[role])


def _link(repo_id: str) -> str:
    """Format a Hub id as a link, and any other text as code."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return code(repo_id)
    return f"[{code(repo_id)}](https://huggingface.co/{repo_id})"
