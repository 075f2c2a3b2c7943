"""Inputs of an early projection, read without running the layers after it: at entities, elsewhere, in other text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...models.activations import batches, length_batches, pad_batch
from ...models.backbone import Backbone
from ...models.prefix_cache import decoder, reuse_shared_prefix
from ...progress import Progress, no_progress
from ...text.calibration import built_in_text
from .positions import Tokens, shared_prefix

ANCHORS_PER_ROW = 4
"""Positions read in each row at which no entity ends."""


class _StopForward(Exception):  # noqa: N818 (control flow, not an error)
    """Ends a forward pass at the projection whose input is read."""


@torch.no_grad()
def read_keys(
    model: Any, down: torch.nn.Module, named: Sequence[tuple[Tokens, Sequence[int]]], seed: int,
    progress: Progress = no_progress,
) -> tuple[Float[Tensor, "ends in_"], Float[Tensor, "others in_"]]:  # fmt: skip
    """Read the projection's input where entities end, and at some other positions of the same rows.

    Args:
        model: The loaded model.
        down: The projection.
        named: Rows of tokens, each with the positions where its entity ends.
        seed: Seed of the draw of the other positions.
        progress: Shows the progress.

    Returns:
        The inputs where entities end, in the order of ``named``, and those at the other positions.
    """
    rows = [row for row, _ in named]
    common, generator = shared_prefix(rows), torch.Generator().manual_seed(seed)
    keys: dict[int, Tensor] = {}
    others: list[Tensor] = []
    for numbers in progress("reading names", length_batches(rows)):
        batch = {name: v.to(model.device) for name, v in pad_batch([rows[number].ids for number in numbers]).items()}
        inputs, skipped = reuse_shared_prefix(model, batch["input_ids"], batch["attention_mask"], common)
        x = _projection_inputs(model, down, inputs)
        for line, number in enumerate(numbers):
            ids, ends = rows[number].ids, named[number][1]
            keys[number] = x[line, [end - skipped for end in ends]]
            free = [position for position in range(skipped, len(ids)) if position not in ends]
            drawn = torch.randperm(len(free), generator=generator)[:ANCHORS_PER_ROW].tolist()
            others.append(x[line, [free[position] - skipped for position in drawn]])
    return torch.cat([keys[number] for number in range(len(rows))]), torch.cat(others)


@torch.no_grad()
def read_text(
    model: Any, new: Backbone, down: torch.nn.Module, seed: int, count: int
) -> Float[Tensor, "tokens in_"]:  # fmt: skip
    """Read the projection's input at ``count`` random tokens of the built-in text.

    It represents everything unrelated to the adapter, including words that resemble entities. The first token of a
    text is left out, since its state is an outlier (attention sink).
    """
    texts, found = built_in_text(), []
    for _, inputs in batches(new, texts, range(len(texts))):
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        found.append(_projection_inputs(model, down, inputs)[:, 1:][inputs["attention_mask"][:, 1:].bool()])
    x = torch.cat(found)
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]]


def _projection_inputs(
    model: Any, down: torch.nn.Module, inputs: Mapping[str, Any]
) -> Float[Tensor, "rows length in_"]:
    seen: dict[str, Tensor] = {}

    def stop(module: Any, args: Any, output: Any) -> None:
        seen["x"] = args[0]
        raise _StopForward

    hook = down.register_forward_hook(stop)
    try:
        with suppress(_StopForward):
            decoder(model)(**inputs)
    finally:
        hook.remove()
    rows = len(inputs["input_ids"])
    return seen["x"].reshape(rows, -1, seen["x"].shape[-1]).float()
