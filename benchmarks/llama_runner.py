"""Run llama.cpp in a process of its own: ``llama_runner.py MODEL.gguf LORA.gguf|- INPUT.json OUTPUT.npz``.

INPUT has ``prompts``, lists of token ids, ``forced``, longer ones, and ``new``, a number. OUTPUT gets the greedy tokens
that follow the prompts, and the logits at every position of the forced sequences. All is computed in float32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np


def load(model: str, lora: str, length: int) -> Any:
    """Load a model, with its cache of keys and values in float32 as well."""
    kind = llama_cpp.GGML_TYPE_F32
    return llama_cpp.Llama(model, lora_path=None if lora == "-" else lora, n_ctx=length, n_batch=length, n_threads=1,
                           n_threads_batch=1, logits_all=True, type_k=kind, type_v=kind, verbose=False)  # fmt: skip


def logits(llama: Any, ids: list[int]) -> np.ndarray:
    """Return the logits at each position of a sequence."""
    llama.reset()
    llama.eval(ids)
    return llama.scores[: len(ids)].copy()


def greedy(llama: Any, ids: list[int], new: int) -> list[int]:
    """Return the likeliest token, again and again."""
    llama.reset()
    llama.eval(ids)
    found: list[int] = []
    for _ in range(new):
        found.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval([found[-1]])
    return found


def main() -> None:
    """Generate, and write the results."""
    model, lora, source, out = sys.argv[1:]
    given = json.loads(Path(source).read_text(encoding="utf-8"))
    longest = max(map(len, given["forced"])) + given["new"]
    llama = load(model, lora, (longest + 255) // 256 * 256)
    tokens = [greedy(llama, ids, given["new"]) for ids in given["prompts"]]
    rows = {f"logits{n}": logits(llama, ids) for n, ids in enumerate(given["forced"])}
    np.savez(out, tokens=np.array(tokens), **rows)


if __name__ == "__main__":
    main()
