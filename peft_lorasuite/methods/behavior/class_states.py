"""States of the new model that a classification head is fitted to: final ones, and inputs of attention outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...models.activations import hidden_state
from ...models.backbone import Backbone
from ...models.classification import Row, forward_rows
from ...models.devices import solving_device
from ...models.forward import unwrap
from ...models.loading import decoder_layers
from ...models.prefix_cache import decoder
from ...models.task import Task
from ...progress import Progress

LOWEST_LAYER = 2 / 3
"""Depth of the first layer whose attention is read."""


class Features(NamedTuple):
    """States of the new model at some tokens.

    Attributes:
        final: After the final norm, (tokens, D).
        attention: Inputs of the ``o`` projections of the layers, or what a function made of them, (tokens, values).
        length: Mean length of the output of the first layer.
    """

    final: Tensor
    attention: Tensor
    length: float


@dataclass(frozen=True, eq=False)
class ClassProblem:
    """What a head of the new model is fitted to.

    Attributes:
        model: The loaded new model.
        new: Its backbone.
        rows: The texts.
        places: Row and position of every target.
        task: The task; it decides how outputs are compared.
        bias: Whether the head has a bias.
        rank: Rank of the updates.
        padding: Padding token.
        seed: Seed of the choice of further tokens.
        progress: Shows the progress.
    """

    model: Any
    new: Backbone
    rows: Sequence[Row]
    places: Sequence[tuple[int, int]]
    task: Task
    bias: bool
    rank: int
    padding: int
    seed: int
    progress: Progress

    @property
    def device(self) -> torch.device:
        """Where the fit is solved."""
        return solving_device(self.model.device)

    @property
    def layers(self) -> list[int]:
        """The layers whose attention is read."""
        arch = self.new.arch
        lowest = min(int(LOWEST_LAYER * arch.layers), arch.layers - 1)
        return [layer for layer in range(lowest, arch.layers) if arch.has(layer, "o")]


def read_features(
    problem: ClassProblem, places: Sequence[tuple[int, int]], summed: Callable[[int, Tensor], Tensor] | None = None
) -> Features:
    """Return the states of the new model at some places, given as (row, position).

    Args:
        problem: The problem.
        places: The places.
        summed: Function of a layer and the input of its projection, whose results are added up over the layers;
            without it the inputs themselves are concatenated.
    """
    wanted: dict[int, list[tuple[int, int]]] = {}
    for index, (row, position) in enumerate(places):
        wanted.setdefault(row, []).append((position, index))
    used, found, lengths = sorted(wanted), {}, []
    with _recorded(problem) as seen:
        rows = [problem.rows[row] for row in used]
        for numbers, output in forward_rows(decoder(problem.model), rows, problem.padding, problem.progress):
            for line, number in enumerate(numbers):
                at, indices = (list(column) for column in zip(*wanted[used[number]], strict=True))
                inputs = [(layer, seen[layer][line, at].to(problem.device).float()) for layer in problem.layers]
                if summed is None:
                    values = torch.cat([x for _, x in inputs], dim=1)
                else:
                    values = torch.stack([summed(*one) for one in inputs]).sum(dim=0)
                final = output.last_hidden_state[line, at].to(problem.device).float()
                found |= {index: (final[n], values[n]) for n, index in enumerate(indices)}
                lengths.append(float(seen[-1][line, at].float().norm(dim=-1).mean()))
    final, attention = (torch.stack([found[index][side] for index in range(len(places))]) for side in (0, 1))
    return Features(final, attention, sum(lengths) / len(lengths))


@contextmanager
def _recorded(problem: ClassProblem) -> Iterator[dict[int, Tensor]]:
    """Record, at every pass, the input of each layer's ``o`` projection and, as -1, the output of the first layer."""
    seen: dict[int, Tensor] = {}

    def keep_input(layer: int) -> Any:
        return lambda module, args, output: seen.__setitem__(layer, args[0])

    hooks = [projection(problem, layer).register_forward_hook(keep_input(layer)) for layer in problem.layers]
    first = decoder_layers(unwrap(problem.model), problem.new.arch.layer_path)[problem.layers[0]]
    hooks.append(first.register_forward_hook(lambda module, args, output: seen.__setitem__(-1, hidden_state(output))))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def projection(problem: ClassProblem, layer: int) -> torch.nn.Module:
    """Return the ``o`` projection of a layer of the new model."""
    arch = problem.new.arch
    return decoder_layers(unwrap(problem.model), arch.layer_path)[layer].get_submodule(arch.site("o").path)
