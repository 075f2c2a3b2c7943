"""Resizing a loaded model to the token tables of an adapter before PEFT loads it, and finding its tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..errors import LoraSuiteError
from ..io.checkpoint import open_safetensors
from ..io.json_file import read_json
from ..models.extended import TableRows, resize_tables
from .peft_format import CONFIG, WEIGHTS
from .tokenizer import added_tokens, load_tokenizer_folder

WHOLE = r"(?:weight|original_module\.weight|modules_to_save\.(?:[^.]+\.)?weight|(?:token_adapter\.)?base_layer\.weight)"
"""Ending of a tensor that has all rows of a token table."""


def fit_vocabulary(model: Any, folder: Path) -> None:
    """Resize a model's token tables to those of an adapter, where they differ.

    Args:
        model: The backbone.
        folder: Folder of the adapter.

    Raises:
        LoraSuiteError: If the adapter trains a token that no table and no tokenizer has.
    """
    rows, own = _saved_rows(model, folder), len(model.get_input_embeddings().weight)
    if rows is None:
        rows = max(own, _last_token(folder) + 1)
        tokenizer = load_tokenizer_folder(folder, folder.name) if rows > own else None
        if rows > own + len(tokenizer or ()):
            raise LoraSuiteError(
                "the adapter trains a token that its backbone lacks", where=f"{folder.name}/{CONFIG}", got=rows - 1,
                wanted=f"a token id below {own}", do="pass the backbone that it was made for",
            )  # fmt: skip
    if rows != own:
        resize_tables(model, TableRows(rows, {}))


def find_tokenizer(folder: Path, base: Any) -> Any:
    """Return the tokenizer in an adapter's folder if it has tokens that its base lacks, else None.

    Args:
        folder: Folder of the adapter.
        base: Returns the tokenizer of the backbone; called only if the folder has a tokenizer.
    """
    tokenizer = load_tokenizer_folder(folder, folder.name)
    return tokenizer if tokenizer is not None and added_tokens(tokenizer, base()) else None


def _saved_rows(model: Any, folder: Path) -> int | None:
    """Return the rows of the token tables that are saved with an adapter; None if no table is."""
    tables = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    names = {re.escape(name.rpartition(".")[2]) for name, module in model.named_modules() if module in tables}
    pattern = re.compile(
        rf"(?:.*\.)?(?:{'|'.join(names)})\.(?:({WHOLE}|lora_B\.(?:[^.]+\.)?weight)|lora_embedding_A(?:\.[^.]+)?)"
    )
    file = open_safetensors(folder / WEIGHTS, where=f"{folder.name}/{WEIGHTS}")
    for name in file.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
        found = pattern.fullmatch(name)
        shape = file.get_slice(name).get_shape() if found else []
        if found and len(shape) == 2:
            return shape[0] if found[1] else shape[1]
    return None


def _last_token(folder: Path) -> int:
    """Return the highest id among the trained tokens in an adapter's config; -1 if there are none."""
    indices = read_json(folder / CONFIG, where=f"{folder.name}/{CONFIG}").get("trainable_token_indices") or []
    lists = indices.values() if isinstance(indices, dict) else [indices]
    return max((n for one in lists if isinstance(one, list) for n in one if type(n) is int), default=-1)
