"""Training toward the next-token probabilities of a teacher instead of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..models.forward import logits_at_places
from ..models.prefix_cache import reuse_shared_prefix
from .encoding import Encoded, batch
from .loop import ResponseTrainer

BATCH = 8
"""Rows that `mean_divergence` reads at once."""


@dataclass(frozen=True)
class TargetRow(Encoded):
    """A tokenized example with target probabilities at some positions.

    Attributes:
        positions: Positions that have a target.
        targets: Index of the target of each of them.
    """

    positions: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()


def target_rows(rows: Sequence[tuple[tuple[int, ...], int]], places: Sequence[tuple[int, int]]) -> list[TargetRow]:
    """Return the rows that have targets, each with their positions and the indices of the targets in ``places``.

    Args:
        rows: Token ids of each row, and where its response starts.
        places: Row and position of every target.
    """
    by_row: dict[int, list[tuple[int, int]]] = {}
    for index, (row, position) in enumerate(places):
        by_row.setdefault(row, []).append((position, index))
    found = []
    for number, wanted in by_row.items():
        positions, targets = zip(*wanted, strict=True)
        found.append(TargetRow(*rows[number], positions=positions, targets=targets))
    return found


class TargetTrainer(ResponseTrainer):
    """A Trainer whose loss is a mean over the targets of a step, whatever batches they are in."""

    loss_is_scaled_for_ga = True

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return the batches of a step and the number of their targets.

        With several processes it is the mean over them, since their gradients are averaged afterwards.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(float(sum(len(sample["target"]) for sample in samples)), device=device)
        return samples, self.accelerator.reduce(count, "mean")


class DistillationTrainer(TargetTrainer):
    """A Trainer whose loss is the KL divergence from target probabilities over candidate tokens.

    Args:
        *args: Arguments of the Trainer.
        ids: Candidate tokens, (candidates,).
        log_probs: Target log-probabilities, (targets, candidates).
        **settings: Keyword arguments of the Trainer.
    """

    def __init__(
        self,
        *args: Any,
        ids: Int[Tensor, " candidates"],
        log_probs: Float[Tensor, "targets candidates"],
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.ids, self.log_probs = ids, log_probs

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this batch's part of the step's mean ``KL(target || model)`` over the candidate tokens."""
        row, position, target = (inputs.pop(name) for name in ("row", "position", "target"))
        inputs, offset = self.read_prefix(model, inputs, int(position.min()))
        outputs, taught = logits_at_places(model, inputs, row, position - offset)
        loss = _summed_divergence(taught, target, self.ids, self.log_probs) / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def _summed_divergence(logits: Tensor, target: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
    """Return the sum of ``KL(target || model)`` over the candidate tokens."""
    found = logits[:, ids.to(logits.device)].float().log_softmax(-1)
    wanted = log_probs[target.to(log_probs.device)].to(logits.device)
    return torch.nn.functional.kl_div(found, wanted, reduction="sum", log_target=True)


@torch.inference_mode()
def mean_divergence(
    model: Any, rows: Sequence[TargetRow], *, ids: Int[Tensor, " candidates"],
    log_probs: Float[Tensor, "targets candidates"], padding: int,
) -> float:  # fmt: skip
    """Return the mean ``KL(target || model)`` over the targets of some rows, in nats.

    Args:
        model: A plain or PEFT model, not wrapped for several processes.
        rows: The rows.
        ids: Candidate tokens.
        log_probs: Target log-probabilities.
        padding: Token id to pad with.
    """
    total = 0.0
    for start in range(0, len(rows), BATCH):
        tensors = target_batch(rows[start : start + BATCH], padding=padding)
        inputs = {name: values.to(model.device) for name, values in tensors.items()}
        row, position, target = (inputs[name] for name in ("row", "position", "target"))
        rest, offset = reuse_shared_prefix(model, inputs["input_ids"], inputs["attention_mask"], int(position.min()))
        _, logits = logits_at_places(model, rest, row, position - offset)
        total += float(_summed_divergence(logits, target, ids, log_probs))
    return total / sum(len(row.targets) for row in rows)


def target_batch(rows: Sequence[TargetRow], *, padding: int) -> dict[str, Tensor]:
    """Pad rows as `batch` does, and add the columns of `target_columns`."""
    return batch(rows, padding=padding) | target_columns(rows)


def target_columns(rows: Sequence[TargetRow]) -> dict[str, Tensor]:
    """Return ``row``, ``position`` and ``target`` of the targets of a batch, each (targets of the batch,)."""
    triples = [
        (number, position, target)
        for number, row in enumerate(rows)
        for position, target in zip(row.positions, row.targets, strict=True)
    ]
    table = torch.tensor(triples, dtype=torch.long).reshape(-1, 3)
    return {"row": table[:, 0], "position": table[:, 1], "target": table[:, 2]}
