"""`upgrade`: convert one adapter, in four phases: check, prepare, convert, report."""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.peft_format import select_adapter
from ..adapters.reading import read_adapter
from ..adapters.writing import REPORT, write_adapter
from ..arch.differences import differences
from ..errors import LoraSuiteError, check_seed, error_context
from ..io.output import atomic_folder, check_not_input
from ..io.source import LoadOptions, Source
from ..linalg.lowrank import decomposition_errors
from ..mapping.fingerprint import check_identity, public_name
from ..mapping.same_base import compare_pair
from ..mapping.upgrade_map import UpgradeMap
from ..methods.base import MethodInput, MethodResult
from ..methods.options import make_options
from ..methods.registry import find
from ..models.backbone import Backbone
from ..models.forward import forward_errors
from ..models.task import LabelsLike
from ..progress import Progress, no_progress
from ..text.chat_options import ChatLike, ChatOptions
from ..text.examples import PromptsLike, given_prompts
from ..text.summary import Summarized
from . import auto, prediction, variants
from .added_tokens import NewTokens, add_tokens, describe
from .class_heads import add_task
from .equal_logits import prove
from .experts import add_experts
from .inputs import AdapterLike, BackboneLike, MapLike, check_base_model, check_rank
from .module_ranks import join_modules
from .report import Report, coverage, tensor_fates
from .zero_updates import zero_update_warnings

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class Upgraded(Summarized):
    """An upgraded adapter.

    Attributes:
        adapter: The adapter for the new backbone.
        report: What was transferred, and what was not.
        base: Name of the new backbone, for the adapter's config.
        revision: Revision of the new backbone on the Hub.
        source: Folder or repository of the old adapter, if it was read from one.
        tokenizer: The new tokenizer with the tokens that were added to it, and with the chat template that the adapter
            was made for; None if the backbone's own has both.
    """

    adapter: Adapter
    report: Report
    base: str
    revision: str | None = None
    source: Source | None = None
    tokenizer: Any = None

    def _summary(self) -> tuple[str, dict[str, str]]:
        _, rows = self.report._summary()
        return f"Upgraded: {self.report.verdict}", rows | {"next": "save(folder), report"}

    def save(self, folder: str | Path, *, overwrite: bool = False, dtype: str = "float32") -> Path:
        """Write a plain PEFT folder with the report, whole or not at all.

        Args:
            folder: The output folder.
            overwrite: Replace the folder if it is not empty.
            dtype: ``float32``, ``float16`` or ``bfloat16``.

        Returns:
            The folder.

        Raises:
            LoraSuiteError: If the folder is not empty, is one of the inputs, or cannot be written.
        """
        check_not_input(folder, (self.base, self.source and self.source.folder))
        with atomic_folder(folder, overwrite=overwrite) as part:
            self.write(part, dtype)
        return Path(folder)

    def write(self, folder: Path, dtype: str = "float32") -> None:
        """Write the files of `save` into an existing, empty folder."""
        write_adapter(self.adapter, folder, base=self.base, revision=self.revision, dtype=dtype)
        text = json.dumps(self.report.to_dict(), indent=2) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)


def upgrade(
    adapter: AdapterLike,
    upgrade_map: MapLike,
    *,
    method: str = "auto",
    options: Any = None,
    old: BackboneLike | None = None,
    new: BackboneLike | None = None,
    prompts: PromptsLike | None = None,
    chat: ChatLike = None,
    rank: int | None = None,
    output_type: str = "same",
    labels: LabelsLike | None = None,
    problem_type: str | None = None,
    seed: int = 0,
    adapter_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    progress: Progress = no_progress,
) -> Upgraded:
    """Convert an adapter for the new backbone of an upgrade map.

    Args:
        adapter: Folder or Hub id of a PEFT adapter, or a loaded `Adapter`.
        upgrade_map: The map of the pair of backbones, or its folder or Hub id.
        method: Name of a method, or ``"auto"``.
        options: Options of the method: its dataclass, or a mapping of names to values.
        old: The old backbone, for methods that read or run it.
        new: The new backbone, for methods that read or run it.
        prompts: Unlabeled prompts, for methods that run the models: a file, the Hub id of a dataset, a dataset or a
            list, or ``"self"``. Conversations are rendered by the chat template of each side.
        chat: How conversations are rendered: `ChatOptions`, or a mapping of their names to values.
        rank: Rank of the result; by default the largest of the adapter, or what the method chooses.
        output_type: ``"same"`` keeps a DoRA or an AdaLoRA, ``"lora"`` makes it a LoRA; all other types become one.
        labels: Names of a classifier's labels by index, or ``id2label``; by default those of files beside the adapter.
        problem_type: transformers' ``problem_type`` of a classifier; by default that of these files.
        seed: Seed of the padding and of the method.
        adapter_name: Name of the adapter, if the folder has several in subfolders.
        revision: Revision of the adapter on the Hub.
        token: Hub token.
        cache_dir: Hub cache.
        progress: Shows the progress.

    Returns:
        The adapter for the new backbone, and the report.

    Raises:
        LoraSuiteError: If a file is missing or malformed, a backbone is not that of the map, an option is invalid, or
            nothing of the adapter can be transferred.
    """
    load, chat = LoadOptions(token, cache_dir), ChatOptions.of(chat)
    upgrade_map, old, new = _check(upgrade_map, old, new, rank, seed, load)
    with decomposition_errors():
        adapter = _prepare(
            adapter,
            upgrade_map,
            old,
            rank,
            output_type,
            adapter_name,
            revision,
            load,
            labels_given=labels is not None,
        )
    adapter = adapter.with_labels(labels, problem_type)
    prompts = given_prompts(prompts, options=options, seed=seed, form=chat.prompt_format, token=token)
    facts: dict[str, Any] = ({"seed": seed} if seed else {}) | check_base_model(adapter, upgrade_map)
    if method == "auto":
        choice = auto.pick(
            upgrade_map, can_run=bool(old and new), task=adapter.task, prompts=prompts,
            same=compare_pair(upgrade_map, old, new),
        )  # fmt: skip
        method, facts["auto"] = choice.method, choice.reason
        log.info("method %s: %s", choice.method, choice.reason)
    chosen = find(method, auto=True)
    facts |= auto.check_method(chosen, upgrade_map)
    settings = make_options(chosen, options)
    inputs, tokens = _add_tokens(
        MethodInput(adapter, upgrade_map, old, new, prompts, seed, progress, chat), by_behavior=chosen.needs_backbones
    )
    context = error_context(f"{chosen.name} of {adapter.origin}")
    with context, decomposition_errors(), forward_errors(upgrade_map.without_converter):
        method_result = chosen.run(inputs, settings)
        facts["prediction"] = prediction.facts(upgrade_map, method, method_result.facts)
        result, modules, type_facts, fates = _convert(inputs, method_result, rank, output_type, method, tokens)
    facts |= {**method_result.facts, **type_facts}
    facts |= prove(inputs, result, facts, settings) if chosen.name == "rekey" else {}
    if tokens.facts:
        facts["added_tokens"] = tokens.facts
        facts["hints"] = [*facts.get("hints", []), *describe(tokens.facts)]
    if hint := variants.tied_head_hint(result):
        facts["hints"] = [*facts.get("hints", []), hint]
    if not chosen.needs_backbones:  # the sentences say what happens to the weights
        facts["differences"] = differences(upgrade_map.old.arch, upgrade_map.new.arch)
    fates = tensor_fates(adapter, method_result, modules, fates)
    facts["prediction"] = prediction.with_coverage(facts["prediction"], coverage(fates, modules))
    if warnings := zero_update_warnings(adapter, result, inputs.old):
        facts["warnings"] = [*warnings, *facts.get("warnings", [])]
        facts["prediction"] |= {"verdict": "retrain", "expected_gap_recovered": 0.0}
    if chosen.needs_backbones and old is not None and new is not None:
        sides = {"old": old, "new": new}
        facts["dtype"] = {role: str(one.running_dtype().compute).removeprefix("torch.") for role, one in sides.items()}
    report = Report(
        adapter=public_name(adapter.origin),
        old=public_name(upgrade_map.old.name),
        new=public_name(upgrade_map.new.name),
        method={"name": chosen.name, "options": asdict(settings)},
        rank=result.rank or rank or method_result.rank or adapter.rank,
        modules=modules,
        tensors=fates,
        facts=facts,
        revisions=_revisions(adapter, upgrade_map, old, new),
    )
    base = (upgrade_map.new.name, upgrade_map.new.revision)
    if new is not None:
        base = (new.name, None if new.source.folder else new.source.revision)
    return Upgraded(result, report, *base, adapter.source, _tokenizer(tokens, method_result.chat_template))


def _tokenizer(tokens: NewTokens, chat_template: str | None) -> Any:
    """Return the tokenizer to save with the adapter; None if the new backbone's own fits."""
    if tokens.backbone is None or chat_template is None:
        return tokens.tokenizer
    tokenizer = copy.deepcopy(tokens.tokenizer or tokens.backbone.tokenizer)
    tokenizer.chat_template = chat_template
    return tokenizer


def _check(
    upgrade_map: MapLike, old: BackboneLike | None, new: BackboneLike | None, rank: int | None, seed: int,
    load: LoadOptions,
) -> tuple[UpgradeMap, Backbone | None, Backbone | None]:  # fmt: skip
    """Open the map and the backbones, and check that they match."""
    check_seed(seed)
    if not isinstance(upgrade_map, UpgradeMap):
        upgrade_map = UpgradeMap.load(upgrade_map, **load.hub_kwargs())
    check_rank(rank, upgrade_map.new.arch)
    backbones = {role: None if one is None else Backbone.open(one) for role, one in (("old", old), ("new", new))}
    for role, backbone in backbones.items():
        check_identity(getattr(upgrade_map, role), backbone, role)
    return upgrade_map, backbones["old"], backbones["new"]


def _prepare(
    adapter: AdapterLike, upgrade_map: UpgradeMap, old: Backbone | None, rank: int | None, output_type: str,
    adapter_name: str | None, revision: str | None, load: LoadOptions, *, labels_given: bool,
) -> Adapter:  # fmt: skip
    """Read the adapter, and convert it to the type of the result."""
    if not isinstance(adapter, Adapter):
        source = adapter
        if not isinstance(source, Source):
            source = Source(str(adapter), "adapter", revision, **load.hub_kwargs())
        adapter = read_adapter(
            select_adapter(source, adapter_name), upgrade_map.old.arch, old=old, rank=rank, labels_given=labels_given
        )
    return variants.prepare(adapter, output_type, old, rank)


def _add_tokens(inputs: MethodInput, *, by_behavior: bool) -> tuple[MethodInput, NewTokens]:
    """Give both backbones of the input the tokens that were added for the adapter."""
    if inputs.adapter.added is None or inputs.new is None:
        return inputs, NewTokens(inputs.new)
    tokens = add_tokens(inputs.adapter, inputs.map, inputs.new, by_behavior=by_behavior)
    return replace(inputs, old=inputs.adapter.added.backbone, new=tokens.backbone), tokens


def _convert(
    inputs: MethodInput,
    method_result: MethodResult,
    rank: int | None,
    output_type: str,
    method: str,
    tokens: NewTokens,
) -> tuple[Adapter, list[dict[str, Any]], dict[str, Any], dict[str, str]]:
    """Return the adapter of a method's result; its modules, facts and fates of tensors for the report."""
    adapter, arch = inputs.adapter, inputs.map.new.arch
    if not (method_result.has_updates or adapter.tables or tokens.ids or adapter.head):
        raise LoraSuiteError(
            "nothing of the adapter can be transferred to the new backbone", got=dict(method_result.dropped)
        )
    final = rank or method_result.rank or adapter.rank
    result, modules = join_modules(method_result, arch, final, inputs.seed, adapter)
    result, facts, fates = variants.complete(
        result, inputs, method_result, output_type=output_type, method=method, rank=final, added=tokens.ids
    )
    result, experts, expert_fates = add_experts(result, adapter, method_result, method, final)
    result, task_facts, head_fates = add_task(result, inputs, method_result, method)
    return result, [*modules, *experts], {**facts, **task_facts}, {**fates, **expert_fates, **head_fates}


def _revisions(
    adapter: Adapter, upgrade_map: UpgradeMap, old: Backbone | None, new: Backbone | None
) -> dict[str, str | None]:
    """Return the commits of the inputs; of a backbone that was not opened, that of the map."""
    return {
        "adapter": adapter.source.commit if adapter.source else None,
        "old": old.source.commit if old else upgrade_map.old.revision,
        "new": new.source.commit if new else upgrade_map.new.revision,
    }
