"""Training towards given next-token probabilities instead of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .encoding import Encoded, batch
from .loop import ResponseTrainer


@dataclass(frozen=True)
class TargetRow(Encoded):
    """A row whose loss is taken against target probabilities.

    Attributes:
        positions: Positions that have a target.
        targets: Index of the target of each of them.
    """

    positions: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()


class DistillationTrainer(ResponseTrainer):
    """KL divergence from target probabilities over candidate tokens instead of the loss on labels.

    Args:
        ids: The candidate tokens, (candidates,).
        log_probs: Target log-probabilities, (targets, candidates).
        *args: Of the Trainer.
        **settings: Of the Trainer.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *args: Any,
        ids: Int[Tensor, " candidates"],
        log_probs: Float[Tensor, "targets candidates"],
        **settings: Any,
    ) -> None:
        super().__init__(*args, **settings)
        self.ids, self.log_probs = ids, log_probs

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Return a step's batches and the number of their targets.

        Several processes return their mean number, since their gradients are averaged afterwards.
        """
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.tensor(float(sum(len(one["target"]) for one in samples)), device=device)
        return samples, self.accelerator.reduce(count, "mean")

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """``KL(target || model)`` over the candidate tokens: this batch's part of the step's mean."""
        line, position, target = (inputs.pop(name) for name in ("line", "position", "target"))
        begun, taken = self.begun(model, inputs, int(position.min()))
        columns, column = position.unique(return_inverse=True)
        outputs = model(**begun, logits_to_keep=columns - taken)
        logits = outputs.logits[line, column][:, self.ids.to(position.device)].float()
        wanted = self.log_probs[target.cpu()].to(position.device)
        summed = torch.nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
        loss = summed / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def target_batch(rows: Sequence[TargetRow], *, padding: int) -> dict[str, Tensor]:
    """Pad rows as `batch` does, and list the positions that have a target: line, position, index of the target."""
    listed = [
        (line, position, target)
        for line, row in enumerate(rows)
        for position, target in zip(row.positions, row.targets, strict=True)
    ]
    table = torch.tensor(listed, dtype=torch.long).reshape(-1, 3)
    return batch(rows, padding=padding) | {"line": table[:, 0], "position": table[:, 1], "target": table[:, 2]}
