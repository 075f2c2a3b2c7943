"""A classification head that reads more than the final state: inner features of a layer, written by a LoRA.

The final state of a language model serves to predict the next token, and a head on it misses much of what the model
knows. So the head is fitted together with a linear map of the input of one layer's ``down`` projection. A LoRA of that
projection writes the map's outputs into the residual stream, in directions in which the final states hardly vary, and
the head is fitted again to read them there. No training is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ...adapters.class_head import ClassHead
from ...linalg.basis import clamp_gain
from ...linalg.lowrank import LowRank
from ...linalg.ridge import RidgePath, solve_ridge
from ...models.activations import hidden_state
from ...models.backbone import Backbone
from ...models.classification import Row, forward_rows
from ...models.loading import decoder_layers
from ...models.prefix_cache import decoder, unwrap
from ...models.task import MULTI_LABEL, REGRESSION, Task
from ...progress import Progress
from ...training.class_loss import teacher_losses
from .fact_editing import apply_update
from .states import down_projection

RIDGES = tuple(10.0**power for power in range(-6, 3))
"""Candidate ridges, relative to the mean squared length of the features."""
DEPTHS = (0.25, 0.5, 0.75, 1.0)
"""Layers whose features are tried, as a fraction of the depth."""
STRENGTH = 0.3
"""Length of what is written, relative to that of the residual state."""
LEAST_GAIN = 0.02
"""Share of the divergence by which features of a layer must lower it to be used."""
READOUT_RIDGE = 1e-6
OTHER_TOKENS = 6000
"""Further tokens of the texts at most, on which the head is fitted to read what is written."""


class Features(NamedTuple):
    """States of the new model at some tokens.

    Attributes:
        final: After the final norm, (tokens, D).
        inner: Layer -> input of its ``down`` projection, (tokens, I).
        length: Layer -> mean length of its output.
    """

    final: Tensor
    inner: dict[int, Tensor]
    length: dict[int, float]


@dataclass(frozen=True, eq=False)
class ClassFit:
    """A fitted head, with an update if it reads features of a layer.

    Attributes:
        head: The head.
        update: Layer and update of its ``down`` projection, if there is one.
        left_out: Prediction at every place by a fit to the others, with the error of what is written, (places, labels).
        facts: Facts for the report.
    """

    head: ClassHead
    update: tuple[int, LowRank] | None
    left_out: Tensor
    facts: dict[str, Any]


def fit_classifier(
    model: Any, new: Backbone, rows: Sequence[Row], places: Sequence[tuple[int, int]],
    logits: Float[Tensor, "places labels"], task: Task, *, bias: bool, rank: int, padding: int, seed: int,
    progress: Progress,
) -> ClassFit:  # fmt: skip
    """Fit a head, and an update that writes features of a layer for it, to target logits.

    Args:
        model: The loaded new model.
        new: Its backbone.
        rows: The texts.
        places: Row and position of every target.
        logits: Target logits.
        task: The task; it decides how outputs are compared.
        bias: Whether the head has a bias.
        rank: Rank of the update.
        padding: Padding token.
        seed: Seed of the choice of further tokens.
        progress: Shows the progress.
    """
    layers = sorted({max(round(depth * new.arch.layers) - 1, 0) for depth in DEPTHS})
    wanted, objective = logits.double(), task.objective
    if objective not in (REGRESSION, MULTI_LABEL):
        wanted = wanted - wanted.mean(dim=1, keepdim=True)  # a softmax ignores what all logits have in common
    features = read_features(model, new, rows, places, layers, padding, progress)
    alone = _best_fit(features.final, None, wanted, objective, bias)
    fits = {layer: _best_fit(features.final, x, wanted, objective, bias) for layer, x in features.inner.items()}
    layer = min(fits, key=lambda number: fits[number].loss)
    plain = ClassFit(
        ClassHead(alone.final.float(), alone.offset.float() if bias else None), None, alone.left_out,
        {"ridge": alone.ridge},
    )  # fmt: skip
    if fits[layer].loss > (1 - LEAST_GAIN) * alone.loss:
        return plain
    update = _writer(new, layer, fits[layer].inner, features, rank)
    tokens = [*places, *_other_tokens(rows, places, seed)]
    before = read_features(model, new, rows, tokens, [layer], padding, progress)
    goal = before.final.double() @ fits[layer].final.T + before.inner[layer].double() @ fits[layer].inner.T
    with apply_update(down_projection(model, new, layer), update):
        after = read_features(model, new, rows, tokens, [], padding, progress).final
    weight, offset = solve_ridge(after, goal, READOUT_RIDGE, intercept=bias)
    reached = after[: len(places)].double() @ weight.T + offset + fits[layer].offset
    intended = goal[: len(places)] + fits[layer].offset
    missed = float(teacher_losses(reached, intended, objective).mean())
    if missed > alone.loss - fits[layer].loss:
        return plain
    head = ClassHead(weight.float(), (offset + fits[layer].offset).float() if bias else None)
    facts = {"ridge": fits[layer].ridge, "layer": layer, "written_error": round(missed, 4)}
    return ClassFit(head, (layer, update), fits[layer].left_out + reached - intended, facts)


class _Fit(NamedTuple):
    """A regression on final states and inner features: its leave-one-out loss, ridge, weights and predictions."""

    loss: float
    ridge: float
    final: Tensor
    inner: Tensor
    offset: Tensor
    left_out: Tensor


def _best_fit(final: Tensor, inner: Tensor | None, wanted: Tensor, objective: str, bias: bool) -> _Fit:
    """Fit a regression, with the ridge of the lowest leave-one-out loss; both kinds of features count the same."""
    scales = [float(block.double().pow(2).sum(dim=1).mean().sqrt()) for block in (final, inner) if block is not None]
    blocks = [final.double() / scales[0]] + ([] if inner is None else [inner.double() / scales[1]])
    path = RidgePath(torch.cat(blocks, dim=1), wanted, intercept=bias)
    losses = {ridge: float(teacher_losses(path.left_out(ridge), wanted, objective).mean()) for ridge in RIDGES}
    best = min(losses, key=lambda ridge: losses[ridge])
    weight, offset = path.solve(best)
    size = final.shape[1]
    rest = weight[:, size:] / scales[-1]
    return _Fit(losses[best], best, weight[:, :size] / scales[0], rest, offset, path.left_out(best))


def _writer(new: Backbone, layer: int, weight: Tensor, features: Features, rank: int) -> LowRank:
    """Return the update of a ``down`` projection that writes ``weight @ x`` into the residual stream.

    It is written in the directions in which the final states vary least, each component with the same strength.
    """
    _, s, Vt = torch.linalg.svd(weight, full_matrices=False)
    rank = min(rank, int((s > 1e-6 * s[0]).sum()), *new.arch.shape("down"))
    values = features.inner[layer].double() @ Vt[:rank].T
    spread = values.std(dim=0).clamp(min=1e-12)
    centered = features.final.double() - features.final.double().mean(dim=0)
    quiet = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, :rank]
    gain = new.tensor(f"{new.arch.final_norm}.weight") + new.arch.gain_offset
    directions = torch.nn.functional.normalize(quiet / clamp_gain(gain)[:, None], dim=0)
    strength = STRENGTH * features.length[layer] / (rank**0.5 * new.arch.residual_scale)
    return LowRank((Vt[:rank] / spread[:, None]).float(), (strength * directions).float())


def _other_tokens(rows: Sequence[Row], places: Sequence[tuple[int, int]], seed: int) -> list[tuple[int, int]]:
    """Draw tokens of the same texts beside the given places."""
    taken = set(places)
    used = sorted({row for row, _ in places})
    others = [(row, at) for row in used for at in range(1, len(rows[row].ids)) if (row, at) not in taken]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:OTHER_TOKENS]
    return [others[number] for number in order.tolist()]


def read_features(
    model: Any, new: Backbone, rows: Sequence[Row], places: Sequence[tuple[int, int]], layers: Sequence[int],
    padding: int, progress: Progress,
) -> Features:  # fmt: skip
    """Return the states of the new model at some places, given as (row, position)."""
    wanted: dict[int, list[tuple[int, int]]] = {}
    for index, (row, position) in enumerate(places):
        wanted.setdefault(row, []).append((position, index))
    used = sorted(wanted)
    final = torch.empty(len(places), new.arch.hidden)
    inner = {layer: torch.empty(len(places), new.arch.intermediate) for layer in layers}
    lengths: dict[int, list[float]] = {layer: [] for layer in layers}
    with _recorded(model, new, layers) as seen:
        for numbers, output in forward_rows(decoder(model), [rows[row] for row in used], padding, progress):
            for line, number in enumerate(numbers):
                at, indices = (list(column) for column in zip(*wanted[used[number]], strict=True))
                final[indices] = output.last_hidden_state[line, at].float().cpu()
                for layer in layers:
                    x, out = (values.reshape(len(numbers), -1, values.shape[-1])[line, at] for values in seen[layer])
                    inner[layer][indices] = x.float().cpu()
                    lengths[layer].append(float(out.float().norm(dim=-1).mean()))
    return Features(final, inner, {layer: sum(found) / len(found) for layer, found in lengths.items()})


@contextmanager
def _recorded(model: Any, new: Backbone, layers: Sequence[int]) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
    """Record, at every pass, the input of each layer's ``down`` projection and the layer's output."""
    inputs: dict[int, Tensor] = {}
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep_input(layer: int) -> Any:
        return lambda module, args, output: inputs.__setitem__(layer, args[0])

    def keep_output(layer: int) -> Any:
        return lambda module, args, output: seen.__setitem__(layer, (inputs[layer], hidden_state(output)))

    stack = decoder_layers(unwrap(model), new.arch.layer_path)
    hooks = [down_projection(model, new, layer).register_forward_hook(keep_input(layer)) for layer in layers]
    hooks += [stack[layer].register_forward_hook(keep_output(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
