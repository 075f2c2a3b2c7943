"""Model cards of upgraded adapters and of upgrade maps: what was made, from what, how, and how to load it.

Whatever others wrote (names, options, reasons, the source adapter's card) is shown as code on one line, never as
Markdown or HTML of its own.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..errors import LoraSuiteError
from ..io.paths import is_file

if TYPE_CHECKING:
    from ..evaluation.scores import Evaluation
    from ..mapping.upgrade_map import UpgradeMap

PICTURE = "layer_map.png"
PICTURES = {
    PICTURE: "Similarity of the layers of both backbones, and the layer map",
    "heads.png": "Which old head each new one comes from, and how alike they are",
    "explained.png": "Share of the new backbone's weights that the maps of heads and units explain",
    "hidden_map.png": "Quality of the hidden map",
    "gate.png": "What the prediction rests on",
    "energy.png": "Energy kept, module by module",
    "size.png": "Size of the updates, module by module, old adapter against new",
    "gap.png": "Gap recovered by each measured row, and its accuracy",
}
"""Files of a card's pictures, in order, and what a screen reader says."""
TAGS = ["lora", "lorasuite", "upgraded-adapter"]
MAP_TAGS = ["lorasuite", "upgrade-map"]
SHOWN = 10
"""Lost tensors that are listed."""
LICENCE_FIELDS = ("license", "license_name", "license_link")

log = logging.getLogger(__name__)


def adapter_card(
    repo_id: str,
    base: str,
    report: Mapping[str, Any],
    *,
    licence: Mapping[str, str] | None = None,
    evaluation: Evaluation | None = None,
    training: Mapping[str, Any] | None = None,
    pictures: Iterable[str] = (),
) -> str:
    """Write the card of an upgraded adapter.

    Args:
        repo_id: Where it will be.
        base: Hub id of the new backbone.
        report: Values of ``lorasuite_report.json``.
        licence: What `licence_of` found.
        evaluation: Scores of this adapter.
        training: Record of a fine-tuning after the upgrade; its numbers are shown.
        pictures: Which of `PICTURES` lie beside the card.
    """
    from huggingface_hub import ModelCardData

    found = licence or {}
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=TAGS,
        model_name=repo_id.split("/")[1] if evaluation else None,
        eval_results=None if evaluation is None else _results(evaluation),
        base_model_relation="adapter",
        lorasuite=_block(report, training),
        license=found.get("license"),
        license_name=found.get("license_name"),
        license_link=found.get("license_link"),
    )
    parts = [
        f"# {repo_id.split('/')[1]}",
        f"A LoRA adapter for {_link(base)}. It is {_named(report, 'adapter')}, which was made for "
        f"{_named(report, 'old')}, carried over by peft-lorasuite {code(report['version'])}"
        + (", then fine-tuned." if training else "."),
        _how_to_load(repo_id, base),
        _table(report),
        _lost(report["tensors"]),
        _scores(evaluation),
        _shown(pictures, "## Pictures\n\n"),
        _licence_told(licence),
    ]
    return _whole(data, parts)


def map_card(repo_id: str, upgrade_map: UpgradeMap, *, pictures: Iterable[str] = ()) -> str:
    """Write the card of an upgrade map."""
    from huggingface_hub import ModelCardData

    told = upgrade_map.describe()
    sides = {name: {"name": told[name]["name"], "revision": told[name]["revision"]} for name in ("old", "new")}
    data = ModelCardData(
        base_model=[side["name"] for side in sides.values() if side["revision"]] or None,
        library_name="peft",
        tags=MAP_TAGS,
        lorasuite=one_line({"kind": "upgrade map", **sides, **{k: told[k] for k in ("options", "layers", "facts")}}),
    )
    old, new = (code(side["name"]) for side in sides.values())
    parts = [
        f"# {repo_id.split('/')[1]}",
        f"An upgrade map from {old} to {new}, made by peft-lorasuite {__version__}: with it, any LoRA adapter of the "
        "first becomes one of the second without reading the weights of either.",
        f'```python\nfrom peft_lorasuite import upgrade\n\nupgrade("me/old-lora", "{repo_id}").save("new-lora")\n```',
        f"It holds numbers derived from the weights of both: {len(upgrade_map.layers)} matched layers, their heads and "
        "feed-forward units. Whether it may be passed on depends on the licences of both backbones.",
        _shown(pictures),
    ]
    return _whole(data, parts)


def _shown(pictures: Iterable[str], head: str = "") -> str:
    lines = [f"![{PICTURES[name]}]({name})" for name in PICTURES if name in set(pictures)]
    return head + "\n\n".join(lines) if lines else ""


def licence_of(readme: Path | None) -> dict[str, str]:
    """Read the licence from a card; empty where there is no card, no licence, or no readable metadata."""
    if readme is None:
        return {}
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        data = ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (ValueError, OSError, TypeError, AttributeError, YAMLError) as error:
        log.warning("the source adapter's card cannot be read (%s): no licence is carried over", type(error).__name__)
        return {}
    found = {name: _clean(data[name]) for name in LICENCE_FIELDS if isinstance(data.get(name), str)}
    if not found.get("license_link", "https://").startswith("https://"):
        del found["license_link"]  # a file of the other repository
    return found


def evaluation_of(given: Any) -> Evaluation | None:
    """Return an evaluation as it is, or read the JSON that `Evaluation.save` wrote."""
    from ..evaluation.scores import Evaluation

    if given is None or isinstance(given, Evaluation):
        return given
    if not is_file(given):
        raise LoraSuiteError("there is no such evaluation", where=given, do="name the JSON that `evaluate` wrote")
    return Evaluation.load(given)


def code(text: Any) -> str:
    """Show a stranger's text as code on one line: nothing in it is Markdown or HTML."""
    return f"`{_clean(text).replace('`', chr(39)).replace('|', '/')}`"


def one_line(value: Any) -> Any:
    """Clean every text in nested values for the metadata block."""
    if isinstance(value, Mapping):
        return {_clean(name): one_line(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [one_line(inner) for inner in value]
    return value if isinstance(value, (bool, int, float)) or value is None else _clean(value)


def _clean(text: Any) -> str:
    """Keep printable characters, one line, nothing that ends a block of metadata, 300 characters at most."""
    plain = "".join(letter if letter.isprintable() else " " for letter in str(text))
    while "---" in plain:
        plain = plain.replace("---", "--")
    return plain[:300]


def _block(report: Mapping[str, Any], training: Mapping[str, Any] | None) -> dict[str, Any]:
    pins = report.get("revisions") or {}
    made = {"peft_lorasuite": report["version"], "peft": version("peft"), "transformers": version("transformers")}
    block = {
        "source_adapter": {"name": report["adapter"], "revision": pins.get("adapter")},
        "old_backbone": {"name": report["old"], "revision": pins.get("old")},
        "new_backbone": {"name": report["new"], "revision": pins.get("new")},
        "method": report["method"]["name"],
        "options": report["method"].get("options") or {},
        "rank": report["rank"],
        "coverage": report["coverage"],
        "energy_kept": report["energy_kept"],
        "versions": made,
    }
    return one_line(block | ({"fine_tuning": _numbers(training)} if training else {}))


def _numbers(training: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in training.items() if isinstance(value, (bool, int, float))}


def _results(evaluation: Evaluation) -> list[Any]:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_clean(score.task),
            dataset_name=_clean(score.task),
            metric_type=_clean(score.metric),
            metric_value=round(score.value, 4),
            metric_name=f"{_clean(score.metric)} ({_clean(evaluation.scoring)}, {score.n} items)",
        )
        for score in evaluation.tasks
    ]


def _named(report: Mapping[str, Any], role: str) -> str:
    """Name a source: a link for what has a commit on the Hub, code for what came from a folder."""
    pin = (report.get("revisions") or {}).get(role)
    return f"{_link(report[role])} at {code(pin[:12])}" if pin else code(report[role])


def _link(repo_id: str) -> str:
    """Link a Hub id; anything else is shown as code."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return code(repo_id)
    return f"[{code(repo_id)}](https://huggingface.co/{repo_id})"


def _how_to_load(repo_id: str, base: str) -> str:
    lines = [
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer",
        "",
        f'model = AutoPeftModelForCausalLM.from_pretrained("{repo_id}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")',
    ]
    return "## How to load it\n\n```python\n" + "\n".join(lines) + "\n```\n\nIt is an ordinary PEFT LoRA."


def _table(report: Mapping[str, Any]) -> str:
    options = json.dumps(report["method"].get("options") or {}, sort_keys=True)
    rows = {
        "method": code(report["method"]["name"]),
        "options": code(options),
        "rank": str(int(report["rank"])),
        "tensors of the source that were carried": f"{float(report['coverage']):.1%}",
        "energy kept at this rank": f"{float(report['energy_kept']):.1%}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["## How it was made", "", "| | |", "| --- | --- |", *lines])


def _lost(tensors: Mapping[str, str]) -> str:
    lost = [f"- {code(name)}: {code(fate)}" for name, fate in tensors.items() if fate != "carried"]
    more = [f"- and {len(lost) - SHOWN} more, listed in `lorasuite_report.json`"] if len(lost) > SHOWN else []
    return "\n".join(["What was not carried:", "", *lost[:SHOWN], *more]) if lost else ""


def _scores(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return ""
    rows = [
        f"| {code(s.task)} | {s.value:.1%} | {s.interval[0]:.1%} to {s.interval[1]:.1%} | {s.n} |"
        for s in evaluation.tasks
    ]
    head = ["| benchmark | accuracy | 95 % interval | items |", "| --- | --- | --- | --- |"]
    return "\n".join([f"## Evaluation (scored by {code(evaluation.scoring)})", "", *head, *rows])


def _licence_told(licence: Mapping[str, str] | None) -> str:
    told = "states no licence" if not licence else f"states {code(licence.get('license', licence))}, carried over here"
    return f"## Licence\n\nThe source adapter's card {told}. The licences of both backbones apply as well."


def _whole(data: Any, parts: Iterable[str]) -> str:
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"
