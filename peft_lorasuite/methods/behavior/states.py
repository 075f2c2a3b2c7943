"""Hidden states at some positions: after the final norm, and around the last projection before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...adapters.adapter import Key
from ...models.backbone import Backbone
from ...models.forward import unwrap
from ...models.head_probe import find_projection, first_tensor
from ...models.loading import decoder_layers
from ...progress import Progress
from .positions import Tokens, forward_batches
from .targets import Head

RowPosition = tuple[int, int]
"""Index of a row and a position in it."""


@dataclass(frozen=True, eq=False)
class LastProjection:
    """The last projection before the final norm: the last layer's last part, or the one that was found.

    Attributes:
        key: Layer and part of its update.
        module: Its name in the model.
        target: Name of the module that reads the sum to which its output is added: the final norm, or the head.
        factor: What its output is multiplied by before it is added.
        gain: Gain of the RMS norm between its output and the sum, (D,), if there is one.
    """

    key: Key
    module: str
    target: str
    factor: float
    gain: Tensor | None


class LastLayer(NamedTuple):
    """States around the last projection at some positions.

    Attributes:
        x: Input of the projection, (positions, I); of no width if there is no such projection.
        h: Input of the final norm, (positions, D).
        y: Output of the projection, (positions, D), likewise.
    """

    x: Tensor
    h: Tensor
    y: Tensor

    def at(self, rows: slice | list[int]) -> LastLayer:
        """Return the states at some of the positions."""
        return LastLayer(*(values[rows] for values in self))


def last_projection(model: Any, backbone: Backbone, head: Head) -> LastProjection | None:
    """Return the last projection of a loaded model; None if no linear module's output reaches the final norm.

    Args:
        model: The loaded model, without adapters.
        backbone: Its backbone.
        head: Its head.
    """
    arch, target = backbone.arch, head.norm_path or backbone.arch.head
    if not arch.has_converter:
        found = find_projection(model, backbone, target)
        if found is None:
            return None
        return LastProjection(
            (arch.site(found.module).number, found.module), found.module, target, found.factor, found.gain
        )
    layer, part = arch.layers - 1, arch.last_part
    if part is None:
        return None
    site, factor = arch.site(part), arch.residual_scale * backbone.layer_scales.at(layer)
    gain = None if site.post_norm is None else backbone.gain(layer, part) * backbone.layer_scales.before(layer)
    return LastProjection((layer, part), arch.module(layer, site), target, factor, gain)


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
    model: Any, place: LastProjection | str, rows: Sequence[Tokens], wanted: Sequence[RowPosition], progress: Progress
) -> LastLayer:
    """Return the states around the last projection at ``wanted``.

    Args:
        model: The loaded model, without adapters.
        place: The projection; without one, the name of the module that reads the final state.
        rows: The tokens of turns.
        wanted: Rows and positions.
        progress: Shows the progress.
    """
    seen: dict[str, Tensor] = {}

    def keep(module: Any, args: Any, output: Any) -> None:
        seen["x"], seen["y"] = args[0], output

    def keep_state(module: Any, args: Any, kwargs: Any) -> None:
        seen["h"] = first_tensor(args, kwargs)
        if isinstance(place, str):
            seen["x"] = seen["y"] = seen["h"][..., :0]

    target = place if isinstance(place, str) else place.target
    hooks = [model.get_submodule(target).register_forward_pre_hook(keep_state, with_kwargs=True)]
    if not isinstance(place, str):
        hooks.append(model.get_submodule(place.module).register_forward_hook(keep))
    kept: dict[str, dict[RowPosition, Tensor]] = {"x": {}, "h": {}, "y": {}}
    positions: dict[int, list[int]] = {}
    for row, position in wanted:
        positions.setdefault(row, []).append(position)
    try:
        for numbers, _, skipped in forward_batches(model, rows, progress):
            for name, table in kept.items():
                values = seen[name].unflatten(0, (len(numbers), -1)) if seen[name].ndim < 3 else seen[name]
                for line, number in enumerate(numbers):
                    table |= _select(values[line].detach(), number, positions.get(number, []), skipped)
    finally:
        for hook in hooks:
            hook.remove()
    return LastLayer(**{name: torch.stack([table[place] for place in wanted]) for name, table in kept.items()})


def _select(values: Tensor, row: int, positions: Sequence[int], skipped: int) -> dict[RowPosition, Tensor]:
    """Copy the values at a row's positions, so that the batch can be freed; the first ``skipped`` are not in it."""
    found = values[[position - skipped for position in positions]]
    return {(row, position): value for position, value in zip(positions, found, strict=True)}
