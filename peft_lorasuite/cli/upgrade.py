"""``upgrade`` and ``distill``: convert an adapter, fine-tune it if there are samples, write it, push it."""

from __future__ import annotations

import time
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoraSuiteError
from ..io.output import check_not_input, check_output
from ..io.source import split_revision
from ..io.temporary import temporary_folder
from ..methods.registry import summaries
from ..models.distributed import is_main_process
from ..progress import Progress
from .brief_help import BriefParser
from .common import (
    DATA,
    PROMPTS,
    Output,
    add_chat,
    add_command,
    add_engine,
    add_labels,
    add_loading,
    add_output,
    add_training,
    add_written_form,
    chat_options,
    load_options,
    pair,
    positive,
    seed,
    setup_logging,
    training_options,
)

if TYPE_CHECKING:
    from ..text.chat_options import ChatOptions

USUAL = ("--method", "--prompts", "--to", "--from", "--map", "--finetune", "-o", "--push")
"""Options of the brief help."""


def add(commands: Any) -> None:
    """Add both commands."""
    methods = [f"  {name:<12}{summary}" for name, summary in summaries().items()]
    methods.insert(0, f"  {'auto':<12}Pick one from the map of the pair and the prompts.")
    command = add_command(
        commands, "upgrade", "convert an adapter for a new backbone", "\n".join(["methods:", *methods])
    )
    command.add_argument("--method", default="auto", metavar="M", help="see below (default: auto)")
    command.add_argument(
        "--prompts", metavar="FILE", help=f"unlabeled prompts, for methods that run the models: {PROMPTS}"
    )
    _add_arguments(command)
    command = add_command(
        commands, "distill", "convert an adapter by a short training on unlabeled prompts",
        "The same as `upgrade --method distill --prompts FILE`: both backbones are run, and the new adapter is\n"
        "trained toward the effect of the old adapter on the logits of its backbone.",
    )  # fmt: skip
    command.add_argument("--prompts", metavar="FILE", required=True, help=PROMPTS)
    command.set_defaults(method="distill")
    _add_arguments(command)


def _add_arguments(command: BriefParser) -> None:
    command.add_argument("adapter", metavar="ADAPTER", help="the old adapter")
    command.add_argument("--to", required=True, metavar="NEW", dest="new", help="new backbone")
    command.add_argument("--from", metavar="OLD", dest="old", help="old backbone (default: the adapter's base model)")
    command.add_argument(
        "--map", metavar="DIR", help="upgrade map of the pair (default: the cached one, built if necessary)"
    )
    command.add_argument("--adapter-name", metavar="NAME", help="name of the adapter, if the folder has several")
    command.add_argument("--set", action="append", default=[], type=pair, metavar="KEY=VALUE", dest="options",
                         help="an option of the method; may be repeated")  # fmt: skip
    command.add_argument(
        "--rank",
        type=positive,
        metavar="R",
        help="rank of the result (default: the adapter's, with transplant and distill at least 16)",
    )
    command.add_argument("--output-type", choices=("same", "lora"), default="same",
                         help="a DoRA stays a DoRA, or becomes a plain LoRA (default: same)")  # fmt: skip
    add_labels(command)
    command.add_argument("--seed", type=seed, default=0, help="random seed (default: 0)")
    command.add_argument("--finetune", metavar="DATA", help=f"labeled samples to fine-tune on afterwards: {DATA}")
    add_chat(command, old=True, formats=True)
    add_training(command)
    add_output(command, "the new adapter and its report")
    add_engine(command, required=False, what="write the result in the form that this program loads whole")
    add_written_form(command)
    group = command.add_argument_group("publishing")
    group.add_argument("--push", metavar="REPO_ID", help="push the result to this Hub repository, with a model card")
    group.add_argument("--private", action="store_true", help="the repository is, or becomes, private")
    group.add_argument("--create-pr", action="store_true", help="push as a pull request")
    add_loading(command)
    command.show_only(*USUAL)


def run(args: Namespace) -> Output:
    """Check, convert, write and push."""
    progress = setup_logging(args)
    prompts, samples, chat = _check(args)
    from ..upgrading.inputs import open_inputs
    from ..upgrading.upgrade import upgrade
    from .closing import closing_text, next_steps

    start = time.perf_counter()
    adapter, revision = split_revision(args.adapter)
    inputs = open_inputs(
        adapter, args.new, old=args.old, upgrade_map=args.map, method=args.method, options=dict(args.options),
        prompts=prompts, chat=chat, rank=args.rank, adapter_name=args.adapter_name, revision=revision,
        load=load_options(args), progress=progress,
    )  # fmt: skip
    upgraded = upgrade(
        inputs.source, inputs.upgrade_map, method=args.method, options=dict(args.options) or None, old=inputs.old,
        new=inputs.new, prompts=prompts, chat=chat, rank=args.rank, output_type=args.output_type, labels=args.labels,
        problem_type=args.problem_type, seed=args.seed, progress=progress,
    )  # fmt: skip
    if args.base_model:
        upgraded = replace(upgraded, base=args.base_model, revision=None)
    checked = _write(upgraded, inputs.new, samples, chat, args, progress)
    seconds = round(time.perf_counter() - start, 2)
    values = {"output": str(args.output), "report": upgraded.report.to_dict(), "seconds": seconds}
    text = closing_text(str(args.output), upgraded.report, seconds)
    if checked is not None:
        values["check"], text = checked.to_dict(), f"{text}\n\n{checked}"
    else:
        text = f"{text}\n{next_steps(str(args.output), upgraded, args.adapter)}"
    if args.push and is_main_process():
        pushed = _push(args, inputs.upgrade_map)
        values["pushed"], text = asdict(pushed), f"{text}\n\npushed to {pushed.url}"
    return values, text


def _check(args: Namespace) -> tuple[Any, list[Any] | None, ChatOptions]:
    """Check all inputs before any long work; return prompts, samples and how conversations are rendered."""
    given = (args.adapter, args.new, args.old, args.map, args.prompts, args.finetune)
    check_output(args.output, overwrite=args.overwrite, inputs=given)
    from ..adapters.peft_format import select_adapter
    from ..adapters.reading import read_config
    from ..io.source import Source
    from ..models.task import CLASSIFIERS
    from ..text.examples import given_prompts, read_records, read_texts
    from ..text.templates import check_template
    from ..training.options import MAX_EXAMPLES, FinetuneOptions

    if args.template is not None:
        check_template(args.template)
    chat = chat_options(args)
    prompts = given_prompts(
        args.prompts, args.template, options=dict(args.options), seed=args.seed, form=chat.prompt_format
    )
    if args.finetune:
        FinetuneOptions(**training_options(args))
    adapter, revision = split_revision(args.adapter)
    config = read_config(select_adapter(Source(adapter, "adapter", revision), args.adapter_name))
    samples: list[Any] | None = None
    if args.finetune and config.get("task_type") in CLASSIFIERS:
        samples = read_texts(args.finetune, args.template)
    elif args.finetune:
        samples = read_records(args.finetune, max(args.samples, MAX_EXAMPLES), args.seed)
    _check_form(args)
    if args.push:
        from ..hub.push import check_push

        check_push(args.push, args.base_model or split_revision(args.new)[0])
    elif args.private or args.create_pr:
        raise LoraSuiteError("nothing to push", got="--private or --create-pr", do="add --push REPO_ID")
    if not args.old:
        check_not_input(args.output, [config.get("base_model_name_or_path")])
    return prompts, samples, chat


def _check_form(args: Namespace) -> None:
    """Check the options of the written files before any long work."""
    if args.base_model:
        from ..hub.repository import check_id

        check_id(args.base_model, owner=False)
    if args.engine == "mlx" and args.push:
        raise LoraSuiteError(
            "the files of mlx-lm are no PEFT adapter, which a push expects", got="--for mlx and --push",
            do="leave one of them out",
        )  # fmt: skip
    if args.finetune and args.save_dtype != "float32" and args.engine is None:
        raise LoraSuiteError(
            "a fine-tuned adapter is written in float32", got=f"--save-dtype {args.save_dtype}",
            do="add --for ENGINE, or export the result with that dtype",
        )  # fmt: skip


def _write(
    upgraded: Any, new: Any, samples: list[Any] | None, chat: ChatOptions, args: Namespace, progress: Progress
) -> Any:
    """Write the adapter, fine-tuned if there are samples; for a program in its form, and return what it loads."""
    if args.engine is None:
        _write_peft(upgraded, new, samples, chat, args, args.output, progress)
        return None
    from ..serving.exporting import export

    with temporary_folder() as scratch:
        _write_peft(upgraded, new, samples, chat, args, scratch / "adapter", progress)
        if not is_main_process():
            return None
        return export(
            scratch / "adapter", args.output, engine=args.engine, base=new, base_model=args.base_model, rank=args.rank,
            dtype=args.save_dtype, overwrite=args.overwrite,
        )  # fmt: skip


def _write_peft(
    upgraded: Any, new: Any, samples: list[Any] | None, chat: ChatOptions, args: Namespace, folder: str | Path,
    progress: Progress,
) -> None:  # fmt: skip
    if samples is not None:
        _finetune(upgraded, new, samples, chat, args, folder, progress)
    elif is_main_process():
        upgraded.save(folder, overwrite=args.overwrite, dtype="float32" if args.engine else args.save_dtype)


def _finetune(
    upgraded: Any, new: Any, samples: list[Any], chat: ChatOptions, args: Namespace, folder: str | Path,
    progress: Progress,
) -> None:  # fmt: skip
    from ..model import attach
    from ..training.finetune import finetune

    model = attach(new.load(task=upgraded.adapter.task), upgraded, is_trainable=True)
    finetune(
        model, samples, tokenizer=upgraded.tokenizer or new.tokenizer, chat=chat, output=folder,
        overwrite=args.overwrite, progress=progress,
        **training_options(args),
    )  # fmt: skip


def _push(args: Namespace, upgrade_map: Any) -> Any:
    """Push the written folder, with the figures of the map where matplotlib is installed."""
    from ..hub.push import push_upgraded

    settings = {"private": args.private or None, "create_pr": args.create_pr, "base_model": args.base_model}
    written = f"the adapter itself was written to {args.output}"
    try:
        with temporary_folder() as scratch:
            picture = _figures(upgrade_map, args, scratch)
            return push_upgraded(args.output, args.push, picture=picture, **settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(written) from None
    except LoraSuiteError as error:
        raise LoraSuiteError(
            error.what, where=error.where, got=error.got, wanted=error.wanted,
            do=f"{error.do}; {written}" if error.do else written,
        ) from error  # fmt: skip


def _figures(upgrade_map: Any, args: Namespace, folder: Path) -> Path | None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return None
    from ..io.source import Source
    from ..reporting.inspect import card_pictures

    name, revision = split_revision(args.adapter)
    before, bases = Source(name, "adapter", revision), (args.old and split_revision(args.old)[0], None)
    return card_pictures(folder, upgrade_map, args.output, before=before, bases=bases)
