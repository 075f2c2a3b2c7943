"""Training of classifiers, toward labels or toward the logits of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..models.class_labels import infer_problem, place_labels
from ..models.classification import encode_texts, pad_rows
from ..models.task import model_task
from ..text.texts import Text
from .class_loss import label_losses
from .distillation import TargetRow, TargetTrainer, target_columns, target_rows

Losses = Callable[[Tensor, Tensor, str], Tensor]
"""``(logits, targets, objective) -> losses``, as in `class_loss`."""


def class_examples(
    model: Any, tokenizer: Any, texts: Sequence[Text], *, padding: int, cutoff: int
) -> tuple[list[TargetRow], dict[str, Any]]:
    """Tokenize labeled texts for a classifier.

    Returns:
        The rows, and the arguments of `loop.train` that belong to them.

    Raises:
        LoraSuiteError: For a text without tokens, and for a malformed label or one out of range.
    """
    task = infer_problem(model_task(model, model.active_peft_config.task_type), texts)
    rows = encode_texts(
        tokenizer, texts, per_token=task.per_token, padding=padding, limit=cutoff, where="the model"
    )  # fmt: skip
    places, labels = place_labels(texts, rows, task)
    trainer = partial(ClassTrainer, targets=labels, losses=label_losses, objective=task.objective)
    return target_rows([(row.ids, 0) for row in rows], places), {"trainer": trainer, "collate": class_batch}


class ClassTrainer(TargetTrainer):
    """A Trainer of a classifier of texts or of tokens.

    Args:
        *args: Arguments of the Trainer.
        targets: Targets, (targets, columns).
        losses: Loss of each logits and target.
        objective: transformers' ``problem_type``.
        **settings: Keyword arguments of the Trainer.
    """

    def __init__(self, *args: Any, targets: Tensor, losses: Losses, objective: str, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.targets, self.losses, self.objective = targets, losses, objective

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return this batch's part of the step's mean loss."""
        row, position, target = (inputs.pop(name) for name in ("row", "position", "target"))
        outputs = model(**inputs, use_cache=False)
        logits = outputs.logits[row] if outputs.logits.ndim == 2 else outputs.logits[row, position]
        wanted = self.targets[target.to(self.targets.device)].to(logits.device)
        loss = self.losses(logits.float(), wanted.float(), self.objective).sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


def class_batch(rows: Sequence[TargetRow], *, padding: int) -> dict[str, Tensor]:
    """Pad rows with the padding token, and add the columns of `target_columns`."""
    return pad_rows([row.ids for row in rows], padding) | target_columns(rows)
