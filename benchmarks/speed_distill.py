"""Time of `distill` against bare passes of the same models over the same tokens, in one run.

The seconds are the processor's. A bare pass reads padded batches of the whole rows: forward alone for each model that
`distill` reads (the old adapted one, the old one, the new one), forward and backward for the new one with its LoRA,
once an epoch, with the logits and the loss at the taught positions. It is timed right after the stage that it is
compared to and on the same loaded model, and is left out of the total.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from common import hide_loading_bars
from speed_dtype import given_or_demo
from torch import Tensor

from peft_lorasuite import Backbone, UpgradeMap, upgrade
from peft_lorasuite.methods.behavior import probe
from peft_lorasuite.models.classification import pad_rows
from peft_lorasuite.models.forward import final_states, unwrap
from peft_lorasuite.training import loop
from peft_lorasuite.training.distillation import target_batch

BATCH = 8


class Recorder:
    """Times the stages of `distill` and the bare passes beside them.

    Attributes:
        stages: Stage -> seconds.
        bare: Stage -> seconds of the bare passes.
        tokens: Stage -> tokens of its rows.
    """

    def __init__(self) -> None:
        self.stages: dict[str, float] = defaultdict(float)
        self.bare: dict[str, float] = defaultdict(float)
        self.tokens: dict[str, int] = defaultdict(int)

    def watch(self, name: str, work: Callable[..., Any], bare: Callable[..., int] | None = None) -> Callable[..., Any]:
        """Return ``work`` with its time recorded; then ``bare`` runs with the same arguments and returns its tokens."""

        def called(*arguments: Any, **settings: Any) -> Any:
            start = time.process_time()
            result = work(*arguments, **settings)
            done = time.process_time()
            self.stages[name] += done - start
            if bare is not None:
                self.tokens[name] += bare(*arguments, **settings)
                self.bare[name] += time.process_time() - done
            return result

        return called

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the stages of what runs in the context."""
        stages = [
            (probe, "generate_answers", None), (probe, "read_final_states", forward),
            (probe, "read_last_layer", lambda model, place, rows, *_, **__: forward(model, rows)),
            (loop, "train", forward_backward), (Backbone, "load", None), (probe, "load_with_adapter", None),
        ]  # fmt: skip
        with ExitStack() as stack:
            for owner, name, bare in stages:
                if hasattr(owner, name):
                    stack.enter_context(patch.object(owner, name, self.watch(name, getattr(owner, name), bare)))
            yield


def forward(model: Any, rows: Sequence[Any], *_: Any, **__: Any) -> int:
    """Read the rows once, up to the states that the head reads."""
    with torch.inference_mode():
        for number in range(0, len(rows), BATCH):
            final_states(model, inputs_of(pad_rows([row.ids for row in rows[number : number + BATCH]], 0)))
    return sum(len(row.ids) for row in rows)


def forward_backward(
    model: Any, rows: Sequence[Any], padding: int, options: Any, *_: Any, trainer: Any, **__: Any
) -> int:
    """Compute loss and gradients of every batch of every epoch, without the Trainer and without steps."""
    ids, log_probs = (trainer.keywords[name] for name in ("ids", "log_probs"))
    order = loop.LengthSampler([len(row.ids) for row in rows], options.batch_size, options.seed)
    head = unwrap(model).get_output_embeddings()
    model.train()
    for _ in range(options.epochs):
        numbers = list(order)
        for start in range(0, len(numbers), options.batch_size):
            inputs = target_batch([rows[one] for one in numbers[start : start + options.batch_size]], padding=padding)
            places = inputs["row"], inputs["position"]
            taught = head.register_forward_pre_hook(lambda module, read, places=places: (read[0][places][None],))
            logits = model(**inputs_of(inputs)).logits[0, :, ids].float().log_softmax(-1)
            taught.remove()
            loss = torch.nn.functional.kl_div(logits, log_probs[inputs["target"]], reduction="sum", log_target=True)
            (loss / len(logits)).backward()
    model.zero_grad()
    return options.epochs * sum(len(row.ids) for row in rows)


def inputs_of(columns: dict[str, Tensor]) -> dict[str, Any]:
    """Return what the model itself reads of a batch."""
    return {"input_ids": columns["input_ids"], "attention_mask": columns["attention_mask"], "use_cache": False}


def distillation(args: argparse.Namespace) -> dict[str, Any]:
    """Time `distill`, its stages and the bare passes, on the given pair or on the demo pair."""
    hide_loading_bars()
    old, new, adapter, prompts = given_or_demo(args)
    built = UpgradeMap.load(args.map) if args.map else UpgradeMap.build(old, new)
    recorder = Recorder()
    start = time.process_time()
    with recorder.watching():
        upgrade(
            adapter, built, method="distill", options={"prompts": args.number}, old=Backbone.open(old),
            new=Backbone.open(new), prompts=prompts,
        )  # fmt: skip
    bare = sum(recorder.bare.values())
    total = time.process_time() - start - bare
    return {
        "training": _ratio(recorder.stages["train"], recorder.bare["train"]), "method": _ratio(total, bare),
        "stages": _rounded(recorder.stages), "bare": _rounded(recorder.bare), "tokens": dict(recorder.tokens),
        "prompts": args.number, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _ratio(seconds: float, bare: float) -> dict[str, float]:
    return {"seconds": round(seconds, 2), "bare": round(bare, 2), "ratio": round(seconds / bare, 2)}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}
