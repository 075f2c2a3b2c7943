"""Inputs of one early projection, with no layer run behind it: where names end, elsewhere, in other text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ...models.activations import batches, pad_batch
from ...models.backbone import Backbone
from ...models.prefix_cache import decoder, reuse_shared_prefix
from ...progress import Progress, no_progress
from ...text.calibration import built_in_text
from .positions import Tokens, length_batches, shared_prefix

QUIET = 4
"""Positions per row, where no name ends, that are read as well."""


class _ReadError(Exception):
    """Ends a pass at the layer whose input is wanted."""


@torch.no_grad()
def read_keys(
    model: Any, down: torch.nn.Module, named: Sequence[tuple[Tokens, Sequence[int]]], seed: int,
    progress: Progress = no_progress,
) -> tuple[Float[Tensor, "ends in_"], Float[Tensor, "others in_"]]:  # fmt: skip
    """Read the projection's input where names end, row by row, and at some other positions of the same rows.

    Args:
        model: The loaded model.
        down: The projection.
        named: Rows of tokens, each with the positions where a name ends.
        seed: Of the draw of the other positions.
        progress: Shows how far it is.
    """
    rows = [row for row, _ in named]
    common, generator = shared_prefix(rows), torch.Generator().manual_seed(seed)
    kept: dict[int, Tensor] = {}
    others: list[Tensor] = []
    for numbers in progress("reading names", length_batches(rows)):
        batch = {name: v.to(model.device) for name, v in pad_batch([rows[number].ids for number in numbers]).items()}
        begun, taken = reuse_shared_prefix(model, batch["input_ids"], batch["attention_mask"], common)
        x = _inputs(model, down, begun)
        for line, number in enumerate(numbers):
            ids, ends = rows[number].ids, named[number][1]
            kept[number] = x[line, [end - taken for end in ends]]
            free = [position for position in range(taken, len(ids)) if position not in ends]
            drawn = torch.randperm(len(free), generator=generator)[:QUIET].tolist()
            others.append(x[line, [free[position] - taken for position in drawn]])
    return torch.cat([kept[number] for number in range(len(rows))]), torch.cat(others)


@torch.no_grad()
def read_text(
    model: Any, new: Backbone, down: torch.nn.Module, seed: int, count: int
) -> Float[Tensor, "tokens in_"]:  # fmt: skip
    """Read the projection's input at so many tokens of the built-in text, drawn by the seed.

    It stands for all that the adapter was not made for, and whose words may look like names. A text's first token is
    left out: its state is like no other.
    """
    texts, found = built_in_text(), []
    for _, inputs in batches(new, texts, range(len(texts))):
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        found.append(_inputs(model, down, inputs)[:, 1:][inputs["attention_mask"][:, 1:].bool().cpu()])
    x = torch.cat(found)
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:count]]


def _inputs(model: Any, down: torch.nn.Module, begun: Mapping[str, Any]) -> Float[Tensor, "rows length in_"]:
    seen: dict[str, Tensor] = {}

    def stop(module: Any, args: Any, output: Any) -> None:
        seen["x"] = args[0]
        raise _ReadError

    hook = down.register_forward_hook(stop)
    try:
        with suppress(_ReadError):
            decoder(model)(**begun)
    finally:
        hook.remove()
    rows = len(begun["input_ids"])
    return seen["x"].reshape(rows, -1, seen["x"].shape[-1]).float().cpu()
