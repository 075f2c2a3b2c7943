"""Trials of a model type: upgrade a random LoRA to a tiny model of it, load what was written with PEFT, and compare."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from tiny_sizes import NOT_BUILT
from tiny_types import NEW, OLD, WORDS, load_type, logits_of, save_type
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from peft_lorasuite import LoraSuiteError, MapOptions, UpgradeMap, upgrade

PROMPTS = [f" {a} {b} {c}" for a in WORDS[:2] for b in WORDS[2:6] for c in WORDS[10:12]]
STEPS = 6
"""Tokens of an answer."""
LEARNED = 0.9
"""Share of the divergence that may be left."""
EVERYWHERE: dict[str, Any] = {"length": STEPS, "teacher_weight": 0.0}
"""Two random models have nothing in common: ask for the change of the logits alone."""
METHODS: dict[str, dict[str, Any]] = {
    "distill": EVERYWHERE | {"epochs": 10, "learning_rate": 5e-3, "anchor_text_tokens": 0},
    "transplant": EVERYWHERE,
}
"""Method -> its options."""
PAIRS = ("same", "llama")
"""Old backbone: the same type with other sizes and weights, or a Llama."""


class Side(NamedTuple):
    """A saved backbone and, of an old one, its adapter."""

    model_type: str
    backbone: Path
    adapter: Path


def save_old(model_type: str, folder: Path, seed: int = 1) -> Side:
    """Write an old backbone of a type with its adapter."""
    side = Side(model_type, folder / "backbone", folder / "adapter")
    save_type(model_type, side.backbone, sizes=OLD, seed=seed, adapter=side.adapter)
    return side


def save_new(model_type: str, folder: Path) -> Side:
    """Write a new backbone of a type: larger, deeper, with other weights."""
    side = Side(model_type, folder / "backbone", folder / "none")
    save_type(model_type, side.backbone, sizes=NEW, seed=5)
    return side


class Expected:
    """What an upgrade aims at: the change of the old logits by the adapter, added to the new ones.

    Args:
        old: The old backbone with its adapter.
        new: The new backbone; both have the same tokenizer.
    """

    def __init__(self, old: Side, new: Side) -> None:
        self.new = new
        tokenizer = PreTrainedTokenizerFast.from_pretrained(old.backbone)
        self.tokens = len(tokenizer)
        ids = torch.tensor([tokenizer(text)["input_ids"] for text in PROMPTS])
        self.answers = slice(ids.shape[1] - 1, -1)
        adapted = _load(old, old.adapter)
        for _ in range(STEPS):
            ids = torch.cat([ids, logits_of(adapted, ids)[:, -1:, : self.tokens].argmax(-1)], dim=1)
        self.ids = ids
        after, before, start = (self._read(model) for model in (adapted, _load(old), _load(new)))
        self.target = (start + after - before).log_softmax(-1)
        self.start = self._divergence(start)

    def _read(self, model: Any) -> Tensor:
        return logits_of(model, self.ids)[:, self.answers, : self.tokens].log_softmax(-1)

    def _divergence(self, log_probs: Tensor) -> float:
        values = torch.nn.functional.kl_div(log_probs, self.target, reduction="none", log_target=True)
        return float(values.sum(-1).mean())

    def left(self, adapter: Path) -> float:
        """Return the mean divergence, in nats, of the new backbone with an adapter that PEFT loads."""
        return self._divergence(self._read(_load(self.new, adapter)))


def _load(side: Side, adapter: Path | None = None) -> Any:
    model = load_type(side.model_type, side.backbone)
    return (model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter))).eval()


def trials(old: Side, new: Side, folder: Path, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Upgrade an adapter by each method, write it, and measure what was written.

    Returns:
        ``outcome``: ``"learned"``, ``"served"`` (written, but the divergence did not fall), ``"refused"`` (one
        `LoraSuiteError`) or ``"fault"`` (any other exception), with ``why``; the divergence before and after.
    """
    pair = UpgradeMap.build(str(old.backbone), str(new.backbone), MapOptions(layer_map="proportional"))
    expected = Expected(old, new)
    return [_trial(pair, old, new, expected, method, folder / method) for method in methods]


def _trial(pair: UpgradeMap, old: Side, new: Side, expected: Expected, method: str, folder: Path) -> dict[str, Any]:
    start, found = time.perf_counter(), {"method": method}
    try:
        upgraded = upgrade(
            str(old.adapter), pair, method=method, options=METHODS[method], old=str(old.backbone),
            new=str(new.backbone), prompts=PROMPTS,
        )  # fmt: skip
        upgraded.save(folder)
        left = expected.left(folder)
        found["outcome"] = "learned" if left < LEARNED * expected.start else "served"
        found |= {"divergence": round(expected.start, 4), "left": round(left, 4)}
    except Exception as error:  # anything but a LoraSuiteError is a fault of the package, to be counted
        found |= failure(error)
    return found | {"seconds": round(time.perf_counter() - start, 1)}


def failure(error: Exception) -> dict[str, str]:
    """Return the outcome of a failed upgrade, without the paths of temporary folders."""
    text = re.sub(r"/\S*/(?=\w)", "", " ".join(str(error).split()))[:300]
    if isinstance(error, LoraSuiteError):
        return {"outcome": "refused", "why": text}
    last = traceback.extract_tb(error.__traceback__)[-1]
    return {"outcome": "fault", "why": f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"}


def run_type(model_type: str, folder: Path, llama: Side) -> dict[str, Any]:
    """Try a type as the new backbone, from the same type and from a Llama."""
    if model_type in NOT_BUILT:
        return {"built": False, "why": NOT_BUILT[model_type]}
    try:
        new, same = save_new(model_type, folder / "new"), save_old(model_type, folder / "old")
    except Exception as error:  # whatever a type needs beside its config: another package, other inputs
        return {"built": False, **failure(error)}
    found: dict[str, Any] = {"built": True}
    for pair, old in zip(PAIRS, (same, llama), strict=True):
        try:
            found[pair] = trials(old, new, folder / pair, list(METHODS))
        except Exception as error:
            found[pair] = [{"method": method, **failure(error)} for method in METHODS]
    return found
