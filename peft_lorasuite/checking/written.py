"""The upgraded adapter as it was written: loaded by PEFT, merged, and converted for llama.cpp."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters.loading import adapter_folder, add_adapter
from ..errors import short_message
from ..io.source import Source
from ..io.temporary import temporary_folder
from ..models.backbone import Backbone
from ..models.extended import ExtendedBackbone, TableRows, restore_tables
from ..models.quantized import quantization
from ..training.encoding import Encoded
from .page import Line

CONVERTER = "convert_lora_to_gguf.py"
"""llama.cpp's converter, if it is in the PATH."""
ROWS, TOKENS = 4, 64
"""Rows, and tokens of each, on which the merged model is compared."""
FOLDERS = re.compile(r"(?:[A-Za-z]:)?(?:[/\\][\w.~+-]+)+[/\\]")
"""What is left out of messages that go into the page: folders of this machine."""
MERGED, GGUF, KEYS = "merged logits", "GGUF", "keys that PEFT loads"


@dataclass(frozen=True, eq=False)
class Written:
    """An adapter on its backbone.

    Attributes:
        model: The PEFT model, not merged.
        backbone: The backbone, with the tokens and the tokenizer that the adapter adds.
        missing: Tensors that PEFT expects and the file lacks.
        unused: Tensors of the file that PEFT does not use.
    """

    model: Any
    backbone: Backbone
    missing: Sequence[str]
    unused: Sequence[str]

    def keys_line(self) -> Line:
        """Return the line about missing and unused tensors."""
        found = {"missing": self.missing, "unused": self.unused}
        names = [f"{len(keys)} {what}, such as {keys[0]}" for what, keys in found.items() if keys]
        count = len(self.missing) + len(self.unused)
        return Line.of(KEYS, not count, "; ".join(names) or "none missing or unused", "none", float(count))


@contextmanager
def load_written(source: Source, backbone: Backbone) -> Iterator[Written]:
    """Load an adapter on its backbone with PEFT's own loader; a model in memory is restored afterwards."""
    folder = adapter_folder(source)
    with backbone.running() as model, restore_tables(model) if backbone.in_memory else nullcontext():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)  # they are a line of the page
            adapted: Any = add_adapter(model, folder, source, base=repr(backbone)).eval()
            result = adapted.load_adapter(str(folder), "default")  # again: only this call returns the keys it found
        rows = len(adapted.get_input_embeddings().weight)
        if adapted.adapter_tokenizer is not None or rows != backbone.arch.vocabulary:
            tokenizer = adapted.adapter_tokenizer or backbone.tokenizer
            backbone = ExtendedBackbone(backbone, tokenizer, TableRows(rows, {}))
        yield Written(adapted.eval(), backbone, sorted(result.missing_keys), sorted(result.unexpected_keys))


def merged_line(written: Written, rows: Sequence[Encoded], limits: Mapping[str, float]) -> Line:
    """Merge the adapter, and compare the logits; the PEFT model cannot be used afterwards."""
    backbone = written.backbone
    if backbone.in_memory:
        return Line.skipped(MERGED, "the backbone is a loaded model, which is not changed")
    if (method := quantization(backbone.config)) is not None:
        return Line.skipped(MERGED, f"the backbone is quantized ({method}) and cannot hold the update")
    ids = [row.ids[:TOKENS] for row in rows[:ROWS]]
    before = _logits(written.model, ids)
    try:
        merged = written.model.merge_and_unload().eval()
    except Exception as error:  # PEFT's types raise many kinds of errors where they cannot be merged
        return Line.of(MERGED, False, "", "", reason=f"PEFT cannot merge it: {short_message(error)}")
    after = _logits(merged, ids)
    exact = merged.dtype.itemsize > 2
    limit = limits["merged" if exact else "merged_16bit"]
    largest = max(float(one.abs().max()) for one in before)
    apart = max(float((one - other).abs().max()) for one, other in zip(before, after, strict=True))
    value = apart / largest if largest else apart
    dtype = str(merged.dtype).removeprefix("torch.")
    measured = f"differ by {value:.1e} of the largest, {dtype}"
    return Line.of(MERGED, value <= limit, measured, f"at most {limit:g}", value)


@torch.inference_mode()
def _logits(model: Any, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    return [model(torch.tensor([row], device=model.device)).logits.float().cpu() for row in rows]


def gguf_line(folder: Path, base: Backbone) -> Line:
    """Convert the adapter with llama.cpp's converter, where it is installed."""
    converter = shutil.which(CONVERTER)
    if converter is None:
        return Line.skipped(GGUF, f"llama.cpp's {CONVERTER} is not in the PATH")
    if base.source.folder is None:
        return Line.skipped(GGUF, "the converter needs the backbone as a folder")
    with temporary_folder() as scratch:
        target = scratch / "adapter.gguf"
        words = [sys.executable, converter, str(folder), "--base", str(base.source.folder), "--outfile", str(target)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        said = FOLDERS.sub("", (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])[:200]
        ok = done.returncode == 0 and target.is_file()
    return Line.of(GGUF, ok, "converted, its logits not compared" if ok else said, "converted")
