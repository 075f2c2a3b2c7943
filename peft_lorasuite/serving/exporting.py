"""`export`: an adapter in the form that a program loads whole, checked by what was written."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.peft_format import RECORD, REPORT, select_adapter
from ..adapters.plain import fill_layers, one_rank, plain_lora
from ..adapters.reading import read_adapter, read_config
from ..adapters.tokenizer import OTHERS, TOKENIZER
from ..adapters.writing import check_dtype, peft_config, state_dict, to_dtype, write_adapter
from ..errors import LoraSuiteError, check_integer
from ..io.output import atomic_folder, check_not_input
from ..io.source import Source
from ..models.backbone import Backbone
from . import mlx
from .checking import Checked, check, judge, open_base
from .engines import Engine, find_engine
from .features import Contents, features

COPIED = (REPORT, RECORD, TOKENIZER, *OTHERS)
"""Files beside the adapter that are copied."""
MODELFILE = "FROM {base}\nADAPTER .\n"
"""Ollama's file for an adapter."""


def export(
    adapter: str | Path,
    output: str | Path,
    *,
    engine: str,
    base: Any = None,
    base_model: str | None = None,
    rank: int | None = None,
    dtype: str = "float32",
    overwrite: bool = False,
    adapter_name: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | None = None,
) -> Checked:
    """Write an adapter in the form that a program loads whole, or not at all.

    All types become a plain LoRA of one rank, with the scaling in the factors. Where the program needs it, modules
    without an update get a pair that adds nothing.

    Args:
        adapter: Folder or Hub id of the adapter.
        output: The output folder.
        engine: The program: a key of `engines.ENGINES`.
        base: Its backbone: folder, Hub id or loaded model; by default the base model of the adapter's config.
        base_model: Hub id of the backbone for the written config; by default the name in the adapter's config.
        rank: Rank of the result; by default the largest that a module needs.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        overwrite: Replace the folder if it is not empty.
        adapter_name: Name of the adapter, if the folder has several in subfolders.
        revision: Revision of the adapter on the Hub.
        token: Hub token.
        cache_dir: Hub cache.

    Returns:
        What `check` finds in the written files, with facts about the conversion.

    Raises:
        LoraSuiteError: If an input is missing or malformed, the program cannot load the adapter whole, or the output
            cannot be written.
    """
    rules = find_engine(engine)
    check_dtype(dtype)
    if rank is not None:
        check_integer("rank", rank)
    source = select_adapter(Source(str(adapter), "adapter", revision, token, cache_dir), adapter_name)
    if mlx.is_layout(source):
        raise LoraSuiteError("the adapter has the files of mlx-lm", where=source.name, wanted="a PEFT adapter")
    config = read_config(source)
    backbone = open_base(source, base)
    check_not_input(output, (source.folder, backbone.source.folder))
    own = config.get("base_model_name_or_path") or backbone.name
    name, commit = (base_model, None) if base_model else (own, config.get("revision"))
    plain = _plain(source, backbone, rules, rank)
    _check_plain(plain, engine, source.name)
    with atomic_folder(output, overwrite=overwrite) as folder:
        _write(plain, folder, rules, name, commit, dtype)
        _copy_others(source, folder)
        if engine == "ollama":
            (folder / "Modelfile").write_text(MODELFILE.format(base=name), encoding="utf-8")
        check(folder, engine=engine, base=backbone).raise_findings(source.name)
    checked = check(output, engine=engine, base=backbone)
    return replace(checked, facts=checked.facts | _facts(plain))


def _plain(source: Source, base: Backbone, rules: Engine, rank: int | None) -> Adapter:
    """Read the adapter and convert it; an error is about the input, before anything is written."""
    adapter = plain_lora(read_adapter(source, base.arch, old=base, rank=rank), base, rank)
    filled = fill_layers(adapter, rules.fused, everywhere=rules.every_layer)
    added = len(filled.updates) - len(adapter.updates)
    facts = {"pairs_of_zeros": added} if added else {}
    return one_rank(replace(filled, facts={**adapter.facts, **facts}), base, rank)


def _check_plain(adapter: Adapter, engine: str, name: str) -> None:
    """Raise `LoraSuiteError` for what the program does not load of the converted adapter, in PEFT's names."""
    shapes = {tensor_name: tuple(tensor.shape) for tensor_name, tensor in state_dict(adapter).items()}
    contents = Contents(peft_config(adapter, base=""), shapes)
    judge(name, engine, features(contents, find_engine(engine), adapter.arch), contents, "").raise_findings(name)


def _write(adapter: Adapter, folder: Path, rules: Engine, base: str, revision: str | None, dtype: str) -> None:
    if rules.layout == "peft":
        return write_adapter(adapter, folder, base=base, revision=revision, dtype=dtype)
    tensors = {name: to_dtype(tensor, dtype, where=name) for name, tensor in state_dict(adapter).items()}
    return mlx.write(folder, tensors, int(adapter.facts["rank"]), adapter.arch, base)


def _copy_others(source: Source, folder: Path) -> None:
    """Copy the report, the record of the training and the tokenizer, if the adapter has them."""
    for name in COPIED:
        if (path := source.fetch(name)) is not None:
            shutil.copyfile(path, folder / name)


def _facts(adapter: Adapter) -> dict[str, Any]:
    """Return what the conversion has changed: the energy kept of a DoRA, of another type or at a lower rank."""
    names = ("pairs_of_zeros", "dora_as_lora", "converted", "least_energy_kept")
    facts = {name: adapter.facts[name] for name in names if name in adapter.facts}
    return {name: value for name, value in facts.items() if value != 1.0}
