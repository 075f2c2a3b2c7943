"""What the commands do: each takes its arguments and returns what it tells a machine, and what it tells a human."""

from __future__ import annotations

import tempfile
import time
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from ..io.output import check_apart, check_free
from ..io.source import name_and_revision
from ..models.distributed import is_first, wait
from ..progress import Progress
from .calls import Told, begin, open_backbone
from .families import families as known_families
from .inspect import chat, demo, evaluate, inspect

__all__ = ["chat", "demo", "distill", "evaluate", "families", "finetune", "inspect", "map", "upgrade"]


def families(args: Namespace) -> Told:
    """List the families."""
    rows = known_families()
    head = ("model type", "fused", "bias", "grouped heads", "positions", "norm", "tested")
    cells = [
        (", ".join(f.model_types), f.fused or "-", f.biased, f.grouped, f.positions, f.norm, f.tested) for f in rows
    ]
    widths = [max(len(row[column]) for row in (head, *cells)) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *cells)
    ]
    foot = (
        "fused: parts that one projection holds, and the order of its rows. by config: the checkpoint decides.\n"
        "tested: layers against the model's own, planted upgrades, every pair of families."
    )
    told = {"families": [{**asdict(row), "tested": row.tested} for row in rows]}
    return told, "\n".join([*lines, "", foot])


def map(args: Namespace) -> Told:
    """Build and write a map, or say what that would cost."""
    progress = begin(args)
    if args.output is not None:
        check_free(args.output, overwrite=args.overwrite, inputs=(args.old, args.new, args.calibration))
    from ..mapping.upgrade_map import MapOptions, UpgradeMap
    from ..models.backbone import Backbone

    start = time.perf_counter()
    for method in args.methods:
        _check_section(method)
    old, new = (open_backbone(Backbone, name, args) for name in (args.old, args.new))
    names = ("hidden_map", "similarity", "layer_map", "head_map", "tokens", "seed")
    options = MapOptions(**{name: getattr(args, name) for name in names})
    if args.output is None or args.plan:
        from ..planning.plan import plan, text
        from ..planning.rates import measure_rates

        planned = plan(old, new, options, rates=measure_rates(), dtype=args.dtype, low_memory=args.low_memory)
        return planned.to_dict(), text(planned)
    built = UpgradeMap.build(
        old, new, options, methods=args.methods,
        calibration=args.calibration, device_map=args.device_map, low_memory=args.low_memory, dtype=args.dtype,
        progress=progress,
    )  # fmt: skip
    if is_first():
        built.save(args.output, overwrite=args.overwrite)
    wait()
    seconds = round(time.perf_counter() - start, 2)
    told = {"output": str(args.output), "layers": built.pairs, "facts": dict(built.facts), "seconds": seconds}
    told["sections"] = list(built.sections)
    told["bytes"] = {path.stem: path.stat().st_size for path in sorted(Path(args.output).glob("*.safetensors"))}
    agreement = built.facts["hidden"]["agreement"]
    sections = f", with what {', '.join(args.methods)} wants" if args.methods else ""
    sizes = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in told["bytes"].items())
    line = (
        f"wrote {args.output}: {len(built.pairs)} layers matched, {built.facts['shared_tokens']} shared tokens, "
        f"{agreement:.0%} of them nearest to themselves after the hidden map{sections}; on disk: {sizes} ({seconds} s)"
    )
    return told, line


def _check_section(method: str) -> None:
    """Refuse a method that keeps nothing in a map, before the long work."""
    from ..methods import base

    if base.find(method).section is None:
        keeping = [name for name in base.names() if base.find(name).section is not None]
        raise LoraSuiteError(
            f"the method {method!r} needs nothing in the map beyond what every map has", where="--methods",
            wanted=" or ".join(keeping), do="leave it out",
        )  # fmt: skip


def upgrade(args: Namespace) -> Told:
    """Carry an adapter over, fine-tune it if there are samples, write it, and push it if a repository is named."""
    progress = begin(args)
    given = (args.adapter, args.new, args.old, args.map, args.prompts, args.finetune)
    check_free(args.output, overwrite=args.overwrite, inputs=given)
    prompts, samples = _texts(args)
    if args.push:
        from ..hub.push import check_push

        check_push(args.push, args.base_model or name_and_revision(args.new)[0])
    elif args.private or args.create_pr or args.base_model:
        raise LoraSuiteError(
            "there is nothing to push", got="--private, --create-pr or --base-model", do="name --push REPO_ID"
        )
    from ..adapters.adapter import old_backbone, read_config, reads_backbones
    from ..adapters.peft_format import select
    from ..io.source import Source
    from ..mapping.upgrade_map import UpgradeMap
    from ..methods.base import reads_old
    from ..models.backbone import Backbone
    from ..upgrading.map_cache import map_for
    from ..upgrading.upgrade import check_rank
    from ..upgrading.upgrade import upgrade as carry

    start = time.perf_counter()
    _check_method(args.method, dict(args.options))
    name, revision = name_and_revision(args.adapter)
    new = open_backbone(Backbone, args.new, args)
    check_rank(args.rank, new.arch)
    source = select(Source(name, "adapter", revision), args.adapter_name)
    if not args.old:
        check_apart(args.output, [read_config(source).get("base_model_name_or_path")])
    reads = reads_backbones(source)
    old_name, old_revision = name_and_revision(args.old) if args.old else (None, None)
    access = {"trust_remote_code": args.trust_remote_code, "dtype": args.dtype, "device_map": args.device_map}
    old = old_backbone(source, old_name, old_revision, access)
    if args.map:
        where, at = name_and_revision(args.map)
        upgrade_map = UpgradeMap.load(where, revision=at)
    else:
        settings = {"device_map": args.device_map} if args.device_map else {}
        settings |= {"dtype": args.dtype} if args.dtype != "auto" else {}
        kept = () if args.method == "auto" else [args.method]
        upgrade_map = map_for(old(), new, methods=kept, progress=progress, **settings)
    wanted = reads or not args.map or args.old or prompts is not None or reads_old(args.method, upgrade_map)
    carried = carry(
        source, upgrade_map, method=args.method, options=dict(args.options) or None, old=old() if wanted else None,
        new=new, prompts=prompts, rank=args.rank, as_=args.as_, seed=args.seed, progress=progress,
    )  # fmt: skip
    if samples is None:
        if is_first():
            carried.save(args.output, overwrite=args.overwrite)
    else:
        _fine_tune(carried, new, samples, args, progress)
    seconds = round(time.perf_counter() - start, 2)
    told = {"output": str(args.output), "report": carried.report.to_dict(), "seconds": seconds}
    text = _upgrade_text(args.output, carried.report, seconds)
    if args.push and is_first():
        pushed = _push(args, upgrade_map)
        told["pushed"], text = asdict(pushed), f"{text}\npushed to {pushed.url}"
    return told, text


def distill(args: Namespace) -> Told:
    """Carry an adapter over by training on unlabelled prompts: `upgrade` with the method of that name."""
    return upgrade(args)


def _push(args: Namespace, upgrade_map: Any) -> Any:
    """Push the folder that was written, with the pictures of the map where matplotlib is there to draw them."""
    from ..hub.push import push_upgraded

    settings = {"private": args.private or None, "create_pr": args.create_pr, "base_model": args.base_model}
    written = f"the adapter itself was written to {args.output}"
    try:
        with tempfile.TemporaryDirectory() as scratch:
            picture = _pictures(upgrade_map, args, Path(scratch))
            return push_upgraded(args.output, args.push, picture=picture, **settings)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(written) from None
    except LoraSuiteError as error:
        raise LoraSuiteError(
            error.what, where=error.where, got=error.got, wanted=error.wanted,
            do=f"{error.do}; {written}" if error.do else written,
        ) from error  # fmt: skip


def _pictures(upgrade_map: Any, args: Namespace, folder: Path) -> Path | None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        return None
    from ..io.source import Source
    from ..reporting.inspect import card_pictures

    name, revision = name_and_revision(args.adapter)
    before, bases = Source(name, "adapter", revision), (args.old and name_and_revision(args.old)[0], None)
    return card_pictures(folder, upgrade_map, args.output, before=before, bases=bases)


def finetune(args: Namespace) -> Told:
    """Train an adapter on labelled samples."""
    progress = begin(args)
    check_free(args.output, overwrite=args.overwrite, inputs=(args.adapter, args.base, args.data))
    from ..text.examples import read_examples
    from ..training.finetune import finetune as train

    start = time.perf_counter()
    examples = read_examples(args.data)
    name, revision = name_and_revision(args.adapter)
    trained = train(
        name, examples, base=args.base, revision=revision, output=args.output, overwrite=args.overwrite,
        progress=progress, **_training(args),
    )  # fmt: skip
    seconds = round(time.perf_counter() - start, 2)
    told = {"output": str(args.output), "training": trained.finetune_record, "seconds": seconds}
    record = trained.finetune_record
    return told, f"wrote {args.output}: trained on {record['used']} samples, loss {record['loss']:.3f} ({seconds} s)"


def _texts(args: Namespace) -> tuple[list[str] | None, list[Any] | None]:
    """Read prompts and samples before the long work, so that a wrong file costs no time."""
    from ..evaluation.answers import check_template
    from ..text.examples import check_enough, read_examples, read_prompts

    if args.template is not None:
        check_template(args.template)
    prompts = check_enough(read_prompts(args.prompts, args.template)) if args.prompts else None
    if not args.finetune:
        return prompts, None
    from ..training.loop import FinetuneOptions

    FinetuneOptions(**_training(args))
    return prompts, read_examples(args.finetune)


def _check_method(name: str, options: dict[str, str]) -> None:
    """Refuse an unknown method or option before the long work."""
    from ..methods import base

    if name != "auto":
        base.make_options(base.find(name), options)


def _training(args: Namespace) -> dict[str, Any]:
    names = (
        "samples", "epochs", "batch_size", "micro_batch_size", "learning_rate", "warmup", "cutoff", "template",
        "new_layers", "seed",
    )  # fmt: skip
    return {name: getattr(args, name) for name in names}


def _fine_tune(carried: Any, new: Any, samples: list[Any], args: Namespace, progress: Progress) -> None:
    from ..model import attach
    from ..training.finetune import finetune as train

    model = attach(new.load(), carried, is_trainable=True)
    train(
        model, samples, tokenizer=new.tokenizer, output=args.output, overwrite=args.overwrite, progress=progress,
        **_training(args),
    )  # fmt: skip


def _upgrade_text(output: str, report: Any, seconds: float) -> str:
    lines = [
        f"wrote {output}: {len(report.modules)} modules of rank {report.rank} by {report.method['name']}, "
        f"{report.coverage:.0%} of the adapter's tensors carried, {report.energy_kept:.1%} of the energy kept "
        f"({seconds} s)"
    ]
    lost = [f"  {name}: {fate}" for name, fate in report.tensors.items() if fate != "carried"]
    more = [f"  and {len(lost) - 5} more: see lorasuite_report.json"] if len(lost) > 5 else []
    hints = [f"  {hint}" for hint in report.facts.get("hints", [])]
    return "\n".join([*lines, *lost[:5], *more, *hints])
