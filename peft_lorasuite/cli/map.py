"""``map``: build the upgrade map of two backbones, or estimate what that takes."""

from __future__ import annotations

import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from ..io.output import check_output
from ..models.distributed import is_main_process, wait_for_everyone
from .common import (
    NAME,
    Output,
    add_command,
    add_loading,
    add_overwrite,
    load_options,
    names,
    positive,
    seed,
    setup_logging,
)

EXAMPLE = f"""example:
  {NAME} map Qwen/Qwen2.5-0.5B Qwen/Qwen2.5-1.5B@main -o map"""
CHOICES = {
    "--hidden-map": ("embeddings", "polar", "identity"),
    "--similarity": ("cka", "cca", "pwcca", "procrustes"),
    "--layer-map": ("cka", "first", "medium", "last", "proportional"),
    "--head-map": ("hungarian", "index"),
}


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(
        commands, "map", "build the upgrade map of two backbones, once for all their adapters", EXAMPLE
    )
    command.add_argument("old", metavar="OLD", help="old backbone")
    command.add_argument("new", metavar="NEW", help="new backbone")
    where = command.add_mutually_exclusive_group(required=True)
    where.add_argument("-o", "--output", metavar="DIR", help="folder for the map, new or empty")
    where.add_argument("--plan", action="store_true", help="estimate time, memory and bytes from the configs alone")
    add_overwrite(command)
    command.add_argument("--methods", type=names, default=[], metavar="M[,M]",
                         help="add what these methods store in a map (cross-lora)")  # fmt: skip
    for name, values in CHOICES.items():
        command.add_argument(name, choices=values, default=values[0], help=f"default: {values[0]}")
    command.add_argument("--calibration", metavar="FILE", help="text file for the layer similarity (default: built in)")
    command.add_argument("--tokens", type=positive, default=2048, help="calibration tokens (default: 2048)")
    command.add_argument("--seed", type=seed, default=0, help="random seed (default: 0)")
    command.add_argument("--low-memory", action="store_true",
                         help="keep the layers on disk while the models run: the same map, slower")  # fmt: skip
    add_loading(command)


def run(args: Namespace) -> Output:
    """Build and write a map, or estimate what that takes."""
    progress = setup_logging(args)
    if args.output is not None:
        check_output(args.output, overwrite=args.overwrite, inputs=(args.old, args.new, args.calibration))
    from ..mapping.options import MapOptions
    from ..mapping.upgrade_map import UpgradeMap
    from ..methods.sections import add_section, section_spec
    from ..models.backbone import Backbone

    start = time.perf_counter()
    for method in args.methods:
        section_spec(method)
    old, new = (Backbone.open(name, **load_options(args).model_kwargs()) for name in (args.old, args.new))
    chosen = ("hidden_map", "similarity", "layer_map", "head_map", "tokens", "seed")
    options = MapOptions(**{name: getattr(args, name) for name in chosen})
    if args.output is None:
        from ..planning.plan import measure_rates, plan

        planned = plan(old, new, options, rates=measure_rates(), dtype=args.dtype, low_memory=args.low_memory)
        return planned.to_dict(), str(planned)
    built = UpgradeMap.build(
        old, new, options, calibration=args.calibration, low_memory=args.low_memory, progress=progress
    )
    for method in args.methods:
        built = add_section(built, method, old, new, progress=progress)
    if is_main_process():
        built.save(args.output, overwrite=args.overwrite)
    wait_for_everyone()
    return _output(args, built, round(time.perf_counter() - start, 2))


def _output(args: Namespace, built: Any, seconds: float) -> Output:
    values = {"output": str(args.output), "layers": built.pairs, "facts": dict(built.facts), "seconds": seconds}
    values["sections"] = list(built.sections)
    values["bytes"] = {path.stem: path.stat().st_size for path in sorted(Path(args.output).glob("*.safetensors"))}
    if not built.maps_weights:
        names = " and ".join(map(repr, built.without_converter))
        return values, f"wrote {args.output}: no converter for {names}, so the map identifies the pair and no more"
    agreement = built.facts["hidden"]["agreement"]
    sections = f", with the sections of {', '.join(args.methods)}" if args.methods else ""
    sizes = ", ".join(f"{name} {size / 1e6:.2f} MB" for name, size in values["bytes"].items())
    return values, (
        f"wrote {args.output}: {len(built.pairs)} layers matched, {built.facts['shared_tokens']} shared tokens, "
        f"{agreement:.0%} of them nearest to themselves after the hidden map{sections}; on disk: {sizes} ({seconds} s)"
    )
