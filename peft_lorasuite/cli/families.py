"""The command ``families``: what each model type gets. The lists do not import torch."""

from __future__ import annotations

import textwrap
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from ..arch.registry import families
from .common import Output, add_command

WIDTH = 80
LEGEND = """\
by part, by head, by group: order of the rows of a fused projection.
optional: depends on the config.
GQA: the config sets the number of key/value heads (MHA and MQA included).
Other model types are served without a converter: see families --all."""
ALL_LEGEND = """\
all: every method; the type has a converter (see families).
distill, transplant: run the models, and need no converter.
Measured on tiny random models of transformers {version}."""


def add(commands: Any) -> None:
    """Add the command."""
    command = add_command(commands, "families", "list the supported model families, or what one model gets")
    command.add_argument("model", nargs="?", metavar="MODEL", help="a backbone: its model type and methods")
    command.add_argument("--trust-remote-code", action="store_true", help="let its repository run its own code")
    command.add_argument("--all", action="store_true", dest="every",
                         help="list every model type of transformers, and the methods it gets")  # fmt: skip


def run(args: Namespace) -> Output:
    """List the families or all model types, or tell what one model gets."""
    if args.model:
        return _describe(args.model, trust_remote_code=args.trust_remote_code)
    if args.every:
        return _list_types()
    found = families()
    rows = [{"model_type": model_type, **family._asdict()} for model_type, family in found.items()]
    lines = [(name, family.summary or f"(no summary; from {family.origin})") for name, family in found.items()]
    return {"families": rows}, f"{_table([('model type', 'decoder layer'), *lines])}\n\n{LEGEND}"


def _describe(name: str, *, trust_remote_code: bool) -> Output:
    """Return the model type of a backbone, its sizes, and the methods that it gets."""
    from ..arch.model_types import ALL, ModelType, measured, without_converter
    from ..models.backbone import Backbone
    from ..models.derived import model_type

    backbone = Backbone.open(name, trust_remote_code=trust_remote_code)
    arch, kind = backbone.arch, model_type(backbone.config)
    found = ModelType(ALL) if arch.has_converter else without_converter(kind)
    layers = f"{arch.layers} layers, hidden size {arch.hidden}, vocabulary {arch.vocabulary}"
    methods = f"none: {found.why}"
    if kind not in measured().types:
        methods = "not measured; transplant and distill run the model, and may work"
    if arch.has_converter:
        heads = arch.heads
        layers += f", {heads.query} heads of {heads.size} ({heads.key_value} for keys and values)"
        methods = "all: the type has a converter"
    elif found.methods:
        methods = f"{', '.join(found.methods)}: they run the model; without a converter weights cannot be transferred"
    values = {"model": name, "model_type": kind, **found._asdict()}
    return values, _table([("model type", kind), ("sizes", layers), ("methods", methods)])


def _list_types() -> Output:
    from ..arch.model_types import measured, model_types

    found = model_types()
    rows = [{"model_type": name, **one._asdict()} for name, one in found.items()]
    lines = [(name, ", ".join(one.methods) or f"none: {one.why}") for name, one in found.items()]
    text = _table([("model type", "methods"), *lines])
    return {"model_types": rows}, f"{text}\n\n{ALL_LEGEND.format(version=measured().transformers)}"


def _table(lines: Iterable[tuple[str, str]]) -> str:
    """Format one line per model type; a line that is too long continues in the second column."""
    lines = list(lines)
    column = max(len(name) for name, _ in lines) + 2
    return "\n".join(
        textwrap.fill(f"{name:{column}}{text}", max(WIDTH, 2 * column), subsequent_indent=" " * column)
        for name, text in lines
    )
