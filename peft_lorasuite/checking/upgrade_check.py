"""`check_upgrade`: whether an upgraded adapter can replace the old one, measured on what was written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..adapters.chat_template import read_chat_template
from ..adapters.loading import adapter_folder, old_backbone_loader
from ..adapters.peft_format import CONFIG, select_adapter
from ..adapters.reading import read_adapter, read_config
from ..errors import LoraSuiteError, check_integer, check_seed, error_context
from ..io.source import LoadOptions, Source, split_revision
from ..mapping.fingerprint import public_name
from ..methods.base import MethodInput
from ..models.backbone import Backbone
from ..models.memory import free_models
from ..progress import Progress, no_progress, numbered, stage
from ..serving.checking import check
from ..text.chat_options import ChatLike, ChatOptions
from .answers import refuses
from .judging import answer_lines
from .page import Line, UpgradeCheck, weights_hash
from .sides import OldSide, Side, ask, contents, measure_new, measure_old
from .suite import kept_lines, load_suite
from .task import Task, plan_task, read_conversations
from .thresholds import read_thresholds
from .written import Written, gguf_line, load_written, merged_line

REFUSALS = "refusals kept"
OLD, RETRAINED, NEW = "asking the old adapted model", "asking the retrained model", "asking the upgraded model"
"""Stages of a check."""


@dataclass(frozen=True)
class CheckOptions:
    """What is measured, and how much of it.

    Attributes:
        suite: Tasks of lm-evaluation-harness (see `load_suite`).
        refusals: File of prompts that a model should refuse.
        limit: Prompts, and items of each task of ``suite``, at most.
        length: Tokens of an answer at most.
        seed: Random seed.
    """

    suite: Mapping[str, Any] = field(default_factory=dict)
    refusals: str | Path | None = None
    limit: int = 200
    length: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        check_integer("limit", self.limit, 2)
        check_integer("length", self.length)


def check_upgrade(
    adapter: str | Path,
    *,
    old: str | Path,
    base: Any = None,
    old_base: Any = None,
    data: Any = None,
    suite: str | Sequence[str] = (),
    refusals: str | Path | None = None,
    retrained: str | Path | None = None,
    engine: str | None = None,
    require: Mapping[str, Any] | None = None,
    chat: ChatLike = None,
    limit: int = 200,
    length: int = 128,
    adapter_name: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    dtype: Any = "auto",
    device_map: Any = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> UpgradeCheck:
    """Check whether an upgraded adapter can replace the old one.

    The files of the adapter are loaded by PEFT's own loader, and compared with the old adapted model and with the new
    backbone without an adapter.

    Args:
        adapter: Folder or Hub id (``owner/name@revision``) of the upgraded adapter.
        old: The same of the old adapter.
        base: Backbone of the upgraded adapter (folder, Hub id or loaded model); by default the base model of its
            config.
        old_base: Backbone of the old adapter, likewise.
        data: Prompts of the task, with reference answers or without: a file, the Hub id of a dataset, a dataset, a
            list, ``"self"`` or ``"built-in"``; by default chosen among these two.
        suite: Tasks of lm-evaluation-harness that the adapter has nothing to do with, as a list or separated by
            commas; a YAML file is a task of its own.
        refusals: File of prompts that should be refused.
        retrained: An adapter that was retrained on the new backbone: what its answers differ by is allowed, and its
            likelihood is what a full transfer would reach.
        engine: Program that will load the adapter (see `check`), which adds a line.
        require: Thresholds in place of the defaults of `thresholds.THRESHOLDS`.
        chat: How prompts and conversations are rendered: `ChatOptions`, or a mapping of their names to values.
        limit: Prompts, and items of each task of ``suite``, at most.
        length: Tokens of an answer at most.
        adapter_name: Name of the upgraded adapter, if the folder has several in subfolders.
        token: Hub token.
        cache_dir: Hub cache.
        trust_remote_code: Whether transformers may run code of the repositories.
        dtype: Dtype in which the models run.
        device_map: As in transformers.
        seed: Random seed.
        progress: Shows the progress.

    Raises:
        LoraSuiteError: If an input is missing or malformed, PEFT cannot load an adapter, or it is no adapter of a
            causal language model.
    """
    limits = read_thresholds(require)
    names = [one.strip() for one in (suite.split(",") if isinstance(suite, str) else suite) if one.strip()]
    options = CheckOptions(refusals=refusals, limit=limit, length=length, seed=seed)
    load = LoadOptions(token, cache_dir, False, trust_remote_code, dtype, device_map)
    source, new = _open(adapter, base, load, "pass its backbone (--base, base=)", adapter_name)
    again_source = None if retrained is None else _open(retrained, new, load, "")[0]
    for one in filter(None, (source, again_source)):
        adapter_folder(one)  # a damaged file is an error before a model runs; `read_adapter` checks that of the old one
    old_source, old_backbone = _open(old, old_base, load, "pass its backbone (--from, old_base=)")
    progress = numbered(progress, [OLD, *([] if retrained is None else [RETRAINED]), NEW])
    chat = ChatOptions.of(chat)
    if chat.new_template is None and (own := read_chat_template(source)) is not None:
        chat = replace(chat, new_template=own)
    engine_lines = [] if engine is None else [_engine_line(adapter, engine, new, adapter_name, load)]
    options = replace(options, suite=load_suite(names))
    with error_context(source.name):
        found = read_adapter(old_source, old_backbone.arch, old=old_backbone)
        old_backbone = old_backbone if found.added is None else found.added.backbone
        unmapped: Any = None  # prompts are chosen without the upgrade map
        inputs = MethodInput(found, unmapped, old_backbone, new, data, seed, progress, chat)
        choose = plan_task(inputs, old_backbone, new, limit=limit, length=length)
        if refusals is not None:
            read_conversations(refusals, limit, seed, chat.prompt_format)  # before any model is loaded
        with stage(progress, OLD):
            task, before = measure_old(old_backbone, found, choose, length=length, seed=seed, progress=progress)
        again = again_source and _measure_retrained(again_source, new, task, before, options, progress)
        with stage(progress, NEW), load_written(source, new) as written:
            after = measure_new(written, task, before, length=length, seed=seed, progress=progress)
            lines = answer_lines(before, after, again, limits, seed, labeled=task.labeled)
            lines += _model_lines(written, after, task, source, options, chat, limits, progress)
    free_models()
    settings = {
        "prompts": len(task.chosen.prompts), "source": task.chosen.origin.get("source", "given"),
        "labels": "yes" if task.labeled else "no", "limit": limit,
        "length": length, "seed": seed, **{name: limits[name] for name in require or {}},
    }  # fmt: skip
    folder = source.require(CONFIG).parent
    return UpgradeCheck(
        public_name(source.name), public_name(new.name), public_name(old_source.name), public_name(old_backbone.name),
        (*lines, *engine_lines), weights_hash(folder), settings,
    )  # fmt: skip


def _open(
    name: str | Path, base: Any, load: LoadOptions, do: str, adapter_name: str | None = None
) -> tuple[Source, Backbone]:
    """Open an adapter of a causal language model, and its backbone."""
    path, revision = split_revision(name)
    source = select_adapter(Source(path, "adapter", revision, **load.hub_kwargs()), adapter_name)
    kind = read_config(source).get("task_type")
    if kind not in (None, "CAUSAL_LM"):
        raise LoraSuiteError(
            "only adapters of causal language models are checked against old ones", where=source.name,
            got=f"task_type {kind}", do="evaluate classifiers on texts with labels (`evaluate ADAPTER --data FILE`)",
        )  # fmt: skip
    return source, old_backbone_loader(source, base, None, load.model_kwargs(), do=do)()


def _measure_retrained(
    source: Source, new: Backbone, task: Task, old: OldSide, options: CheckOptions, progress: Progress
) -> Side:
    with stage(progress, RETRAINED), load_written(source, new) as written:
        side = measure_new(written, task, old, length=options.length, seed=options.seed, progress=progress)
    free_models()
    return side


def _model_lines(
    written: Written, side: Side, task: Task, source: Source, options: CheckOptions, chat: ChatOptions,
    limits: Mapping[str, float], progress: Progress,
) -> list[Line]:  # fmt: skip
    """Return the lines about the upgraded model beside its answers; afterwards it is merged."""
    return [
        *kept_lines(written, options.suite, options.limit, limits, options.seed),
        _refusal_line(written, task, options, chat, limits["refusals"], progress),
        written.keys_line(),
        merged_line(written, side.rows, limits),
        gguf_line(source.require(CONFIG).parent, written.backbone),
    ]


def _refusal_line(
    written: Written, task: Task, options: CheckOptions, chat: ChatOptions, limit: float, progress: Progress
) -> Line:
    """Return the share of the new backbone's refusals that the upgraded model refuses as well."""
    if options.refusals is None:
        return Line.skipped(REFUSALS, "no file of such prompts (--refusals)")
    prompts = read_conversations(options.refusals, options.limit, options.seed, chat.prompt_format)
    side, model = task.chosen.chat.new, written.model

    def refused() -> list[bool]:
        turns = ask(model, written.backbone, side, prompts, options.length, progress)
        return [refuses(text) for text in contents(side, prompts, turns)]

    after = refused()
    with model.disable_adapter():
        before = refused()
    both = sum(one and other for one, other in zip(before, after, strict=True))
    measured = f"the new backbone refuses {sum(before)} of {len(before)}, the upgraded model {both} of these"
    if not any(before):
        return Line.skipped(REFUSALS, "the new backbone refuses none of the prompts", measured)
    share = both / sum(before)
    return Line.of(REFUSALS, share >= limit, f"{share:.1%}: {measured}", f"at least {limit:.0%}", share)


def _engine_line(
    name: str | Path, engine: str, base: Backbone, adapter_name: str | None, load: LoadOptions
) -> Line:  # fmt: skip
    """Return what a program that serves the adapter would refuse or drop."""
    path, revision = split_revision(name)
    checked = check(
        path, engine=engine, base=base, adapter_name=adapter_name, revision=revision, token=load.token,
        cache_dir=load.cache_dir,
    )  # fmt: skip
    found = "; ".join(map(str, checked.findings)) or "nothing refused or dropped"
    return Line.of(f"{engine} loads it", checked.passed, found, "whole")
