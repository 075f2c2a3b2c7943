"""States read off forward passes at some positions: after the final norm, and around the last ``down`` projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...models.backbone import Backbone
from ...progress import Progress
from .positions import Tokens, forward

At = tuple[int, int]
"""A row and a position in it."""


class LastLayer(NamedTuple):
    """What is read around the last ``down`` projection at some positions.

    Attributes:
        x: Input of the projection, (positions, I).
        h: Output of the layer, (positions, D).
        y: Output of the projection, (positions, D).
    """

    x: Tensor
    h: Tensor
    y: Tensor

    def at(self, rows: slice | list[int]) -> LastLayer:
        """Return some of the positions."""
        return LastLayer(*(values[rows] for values in self))


def down_projection(model: Any, backbone: Backbone, layer: int) -> torch.nn.Module:
    """Return a layer's ``down`` projection."""
    return model.get_submodule(backbone.arch.layer_path)[layer].get_submodule(backbone.arch.site("down").path)


def final_states(
    model: Any, rows: Sequence[Tokens], wanted: Sequence[At], known: Mapping[At, Tensor], progress: Progress
) -> Float[Tensor, "positions hidden"]:
    """Return the states after the final norm, in the order of ``wanted``; those that are not known yet are read."""
    kept = dict(known)
    needed: dict[int, list[int]] = {}
    for row, position in wanted:
        if (row, position) not in kept:
            needed.setdefault(row, []).append(position)
    unread = list(needed)
    for numbers, states, taken in forward(model, [rows[row] for row in unread], progress) if unread else ():
        for line, number in enumerate(numbers):
            kept |= _at(states[line], unread[number], needed[unread[number]], taken)
    return torch.stack([kept[place] for place in wanted])


def last_layer(
    model: Any, new: Backbone, rows: Sequence[Tokens], wanted: Sequence[At], progress: Progress
) -> LastLayer:
    """Read the last layer at the wanted positions, in their order."""
    seen: dict[str, Tensor] = {}

    def keep(module: Any, args: Any, output: Any) -> None:
        seen["x"], seen["y"] = args[0], output

    def keep_state(module: Any, args: Any, output: Any) -> None:
        seen["h"] = output[0] if isinstance(output, tuple) else output

    last = new.arch.layers - 1
    hooks = [
        down_projection(model, new, last).register_forward_hook(keep),
        model.get_submodule(new.arch.layer_path)[last].register_forward_hook(keep_state),
    ]
    kept: dict[str, dict[At, Tensor]] = {"x": {}, "h": {}, "y": {}}
    places: dict[int, list[int]] = {}
    for row, position in wanted:
        places.setdefault(row, []).append(position)
    try:
        for numbers, _, taken in forward(model, rows, progress):
            for name, table in kept.items():
                values = seen[name].reshape(len(numbers), -1, seen[name].shape[-1])
                for line, number in enumerate(numbers):
                    table |= _at(values[line].detach(), number, places.get(number, []), taken)
    finally:
        for hook in hooks:
            hook.remove()
    return LastLayer(**{name: torch.stack([table[place] for place in wanted]) for name, table in kept.items()})


def _at(values: Tensor, row: int, positions: Sequence[int], taken: int) -> dict[At, Tensor]:
    """Copy the values at a row's positions, so that the batch around them can go; the first ``taken`` were not run."""
    found = values[[position - taken for position in positions]].cpu()
    return {(row, position): value for position, value in zip(positions, found, strict=True)}
