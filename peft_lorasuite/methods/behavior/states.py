"""Hidden states at some positions: after the final norm, and around the last ``down`` projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...models.backbone import Backbone
from ...models.loading import decoder_layers
from ...models.prefix_cache import unwrap
from ...progress import Progress
from .positions import Tokens, forward_batches

RowPosition = tuple[int, int]
"""Index of a row and a position in it."""


class LastLayer(NamedTuple):
    """States around the last ``down`` projection at some positions.

    Attributes:
        x: Input of the projection, (positions, I).
        h: Output of the layer, (positions, D).
        y: Output of the projection, (positions, D).
    """

    x: Tensor
    h: Tensor
    y: Tensor

    def at(self, rows: slice | list[int]) -> LastLayer:
        """Return the states at some of the positions."""
        return LastLayer(*(values[rows] for values in self))


def down_projection(model: Any, backbone: Backbone, layer: int) -> torch.nn.Module:
    """Return a layer's ``down`` projection."""
    layers = decoder_layers(unwrap(model), backbone.arch.layer_path)
    return layers[layer].get_submodule(backbone.arch.site("down").path)


def read_final_states(
    model: Any, rows: Sequence[Tokens], wanted: Sequence[RowPosition], known: Mapping[RowPosition, Tensor],
    progress: Progress,
) -> Float[Tensor, "positions hidden"]:  # fmt: skip
    """Return the states after the final norm at ``wanted``, computing only those that are not in ``known``."""
    kept = dict(known)
    needed: dict[int, list[int]] = {}
    for row, position in wanted:
        if (row, position) not in kept:
            needed.setdefault(row, []).append(position)
    unread = list(needed)
    for numbers, states, skipped in forward_batches(model, [rows[row] for row in unread], progress) if unread else ():
        for line, number in enumerate(numbers):
            kept |= _select(states[line], unread[number], needed[unread[number]], skipped)
    return torch.stack([kept[place] for place in wanted])


def read_last_layer(
    model: Any, new: Backbone, rows: Sequence[Tokens], wanted: Sequence[RowPosition], progress: Progress
) -> LastLayer:
    """Return the states around the last ``down`` projection at ``wanted``."""
    seen: dict[str, Tensor] = {}

    def keep(module: Any, args: Any, output: Any) -> None:
        seen["x"], seen["y"] = args[0], output

    def keep_state(module: Any, args: Any, output: Any) -> None:
        seen["h"] = output[0] if isinstance(output, tuple) else output

    last = new.arch.layers - 1
    hooks = [
        down_projection(model, new, last).register_forward_hook(keep),
        decoder_layers(unwrap(model), new.arch.layer_path)[last].register_forward_hook(keep_state),
    ]
    kept: dict[str, dict[RowPosition, Tensor]] = {"x": {}, "h": {}, "y": {}}
    positions: dict[int, list[int]] = {}
    for row, position in wanted:
        positions.setdefault(row, []).append(position)
    try:
        for numbers, _, skipped in forward_batches(model, rows, progress):
            for name, table in kept.items():
                values = seen[name].reshape(len(numbers), -1, seen[name].shape[-1])
                for line, number in enumerate(numbers):
                    table |= _select(values[line].detach(), number, positions.get(number, []), skipped)
    finally:
        for hook in hooks:
            hook.remove()
    return LastLayer(**{name: torch.stack([table[place] for place in wanted]) for name, table in kept.items()})


def _select(values: Tensor, row: int, positions: Sequence[int], skipped: int) -> dict[RowPosition, Tensor]:
    """Copy the values at a row's positions, so that the batch can be freed; the first ``skipped`` are not in it."""
    found = values[[position - skipped for position in positions]].cpu()
    return {(row, position): value for position, value in zip(positions, found, strict=True)}
